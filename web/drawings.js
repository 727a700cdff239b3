import { api } from "../../scripts/api.js";

/** The drawings of the example workflows, in the folder `examples` beside this file. */
const DRAWING = /^pez-[a-z-]+\.png$/;

/**
 * Put the drawings of an example into the input folder, where Load Image reads them.
 * @param {object} workflow that is about to be opened
 */
export async function bringDrawings(workflow) {
  const known = imageOptions();
  if (!known) return;
  const loaders = workflow?.nodes?.filter((node) => node.type === "LoadImage") ?? [];
  const names = new Set(loaders.map((node) => String(node.widgets_values?.[0])));
  const missing = [...names].filter((name) => DRAWING.test(name) && !known.includes(name));
  await Promise.all(missing.map((name) => bring(name).then((here) => here && known.push(name))));
}

/** The files that Load Image offers; the page's own list, which is changed in place. */
function imageOptions() {
  const [type, options] = LiteGraph.registered_node_types.LoadImage?.nodeData?.input?.required?.image ?? [];
  return Array.isArray(type) ? type : options?.options;
}

async function bring(name) {
  const answer = await fetch(new URL(`./examples/${name}`, import.meta.url));
  if (!answer.ok) return false;
  const body = new FormData();
  body.append("image", await answer.blob(), name);
  const uploaded = await api.fetchApi("/upload/image", { method: "POST", body });
  return uploaded.ok;
}
