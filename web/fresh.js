import { app } from "../../scripts/app.js";
import { readKept } from "./found.js";
import { allNodes, sourceOf, widgetOf } from "./graph.js";
import { post } from "./runs.js";

/**
 * The inputs that have changed since prompts were kept.
 * @returns {Promise<Map<object, string[]>>} names of inputs by node; empty without an answer
 */
export async function changedInputs() {
  // asking makes the page read every widget, and those of some packs do more then than answer
  const keeps = ([, node]) => sourceOf(node, "keep")?.value && readKept(widgetOf(node, "kept")?.value);
  const nodes = [...allNodes()].filter(keeps);
  if (!nodes.length) return new Map();
  try {
    const { output } = await app.graphToPrompt();
    return byNode(nodes, await post("/pez/changed", { prompt: output }));
  } catch {
    return new Map(); // a workflow that is half wired, or a server that is away
  }
}

function byNode(nodes, changed) {
  const found = new Map();
  for (const [id, node] of nodes) {
    const names = changed[id];
    if (!names) continue; // bypassed or muted
    // a node of a subgraph that is used twice has two execution ids, and learned from one of them
    if (!found.has(node) || names.length < found.get(node).length) found.set(node, names);
  }
  return found;
}
