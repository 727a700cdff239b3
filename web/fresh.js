import { app } from "../../scripts/app.js";
import { readKept } from "./found.js";
import { allNodes, widgetOf } from "./graph.js";
import { post } from "./runs.js";

/**
 * Tell for every node with a kept prompt which inputs have changed since it was learned.
 * @returns {Promise<Map<object, string[]>>} names of inputs by node; empty if the server is silent
 */
export async function changedInputs() {
  const kept = [...allNodes()]
    .map(([id, node]) => [id, node, readKept(widgetOf(node, "kept")?.value)])
    // asking makes the page read every widget, and some do more then than answer
    .filter(([, node, text]) => text && widgetOf(node, "keep")?.value);
  if (!kept.length) return new Map();
  try {
    const { output } = await app.graphToPrompt();
    return compare(kept, await post("/pez/inputs", { prompt: output }));
  } catch {
    return new Map(); // a workflow that is half wired, or a server that is away
  }
}

function compare(kept, now) {
  const found = new Map();
  for (const [id, node, { inputs }] of kept) {
    if (!now[id]) continue; // bypassed or muted
    const names = Object.keys({ ...inputs, ...now[id] }).filter(
      (name) => inputs[name] !== now[id][name],
    );
    // a node of a subgraph that is used twice has two execution ids, and learned from one of them
    if (!found.has(node) || names.length < found.get(node).length) found.set(node, names.sort());
  }
  return found;
}
