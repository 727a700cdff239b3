import { api } from "../../scripts/api.js";
import { readKept } from "./found.js";
import { allNodes, rootGraph } from "./graph.js";

/**
 * An earlier result of a node.
 * @typedef {object} Find
 * @property {string} kept text for the widget `kept`
 * @property {import("./found.js").Found[]} items
 * @property {string[]} pictures addresses of the images that were made of it, or of its targets
 */

/**
 * What the nodes of the open workflow have learned so far, newest first.
 * @returns {Promise<Map<object, Find[]>>} by node; empty without an answer
 */
export async function earlierFinds() {
  const workflow = rootGraph()?.id;
  if (!workflow) return new Map();
  const response = await api
    .fetchApi(`/pez/finds?${new URLSearchParams({ workflow })}`)
    .catch(() => null);
  if (!response?.ok) return new Map();
  const answer = await response.json();
  return new Map(
    [...allNodes()].filter(([id]) => answer[id]).map(([id, node]) => [node, answer[id].flatMap(read)]),
  );
}

function read({ kept, pictures }) {
  const items = readKept(kept);
  return items ? [{ kept, items, pictures: pictures.map(address) }] : [];
}

/** The address of an image file on the server, in a form that is small to send. */
const address = (file) => api.apiURL(`/view?${new URLSearchParams({ ...file, preview: "webp;60" })}`);

/**
 * The images that were made of the candidates of a prompt, in their order.
 * @param {Find[]} finds
 * @param {import("./found.js").Found} found
 * @returns {string[]} [] where there are none, or too few or many to say which is which
 */
export function picturesOfCandidates(finds, found) {
  const same = (one) => JSON.stringify(one) === JSON.stringify(found.candidates);
  const find = finds.find(({ items }) => items.length === 1 && same(items[0].candidates));
  return find?.pictures.length === found.candidates.length ? find.pictures : [];
}
