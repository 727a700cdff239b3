/** Inputs that had another name or other values, or were missing, in older files (renames.json). */
const table = { inputs: {}, values: {}, newer: {} };

/** Read the table; the nodes are not registered before. */
export async function loadRenames() {
  const answer = await fetch(new URL("./renames.json", import.meta.url));
  Object.assign(table, await answer.json());
}

const newName = (name) => table.inputs[name] ?? name;

/**
 * Let a type of node read what older versions of the pack have saved.
 * @param {Function} nodeType
 */
export function updateOnLoad(nodeType) {
  const { configure } = nodeType.prototype;
  nodeType.prototype.configure = function (saved) {
    updateNode(saved);
    // by its names: the page completes what was saved while it reads it
    const names = (saved.inputs ?? []).filter((one) => one.widget).map((one) => one.name);
    const done = configure.call(this, saved);
    addNewer(this, names);
    return done;
  };
}

/** Rename the inputs of a saved node, and replace its old values. */
function updateNode(saved) {
  for (const input of saved.inputs ?? []) {
    input.name = newName(input.name);
    if (input.widget) input.widget.name = newName(input.widget.name);
  }
  if (!Array.isArray(saved.widgets_values)) return;
  // a file has values by place, and no other widget has these texts
  const values = new Map(Object.values(table.values).flatMap(Object.entries));
  saved.widgets_values = saved.widgets_values.map((value) => values.get(value) ?? value);
}

/** Give the inputs that a saved node lacks the value with which its search stays the same. */
function addNewer(node, names) {
  if (!names.includes("effort")) return; // it lists no widgets but those with a link
  for (const [older, values] of Object.entries(table.newer)) {
    if (!names.includes(older)) continue;
    for (const [name, value] of Object.entries(values)) {
      const widget = node.widgets?.find((one) => one.name === name);
      if (widget && !names.includes(name)) widget.value = value;
    }
  }
}

/**
 * Rename the widgets that subgraphs show of the nodes inside of them.
 * @param {object} workflow as it was saved
 */
export function updatePromoted(workflow) {
  const subgraphs = workflow.definitions?.subgraphs ?? [];
  for (const node of [workflow, ...subgraphs].flatMap((graph) => graph.nodes ?? [])) {
    const inside = subgraphs.find((graph) => graph.id === node.type)?.nodes ?? [];
    for (const promoted of node.properties?.proxyWidgets ?? []) {
      const source = inside.find((one) => String(one.id) === String(promoted[0]));
      if (source?.type.startsWith("PEZ_")) promoted[1] = newName(promoted[1]);
    }
  }
}
