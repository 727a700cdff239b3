import { app } from "../../scripts/app.js";

/** The graph of the open workflow, whichever of its subgraphs is on the screen. */
export const rootGraph = () => app.rootGraph ?? app.graph;

/**
 * All nodes of the open workflow with their execution ids, which are paths such as `12:5`.
 * @returns {Generator<[string, object]>}
 */
export function* allNodes(graph = rootGraph(), path = "") {
  for (const node of graph?.nodes ?? []) {
    const id = path + node.id;
    yield [id, node];
    if (node.isSubgraphNode?.()) yield* allNodes(node.subgraph, `${id}:`);
  }
}

/**
 * A node of the open workflow.
 * @param {string} executionId
 */
export function findNode(executionId) {
  let graph = rootGraph();
  let node;
  for (const id of executionId.split(":")) {
    node = graph?.nodes.find((one) => String(one.id) === id);
    graph = node?.subgraph;
  }
  return node;
}

/**
 * A widget of a node by its name.
 * @param {object} node
 * @param {string} name
 */
export const widgetOf = (node, name) => node.widgets?.find((widget) => widget.name === name);

/**
 * The widget that gives an input its value: the node's own, or the one that a subgraph shows of it.
 * @param {object} node
 * @param {string} name
 * @returns {object | undefined} none where the value comes through another wire
 */
export function sourceOf(node, name) {
  const input = node.inputs?.find((one) => one.widget?.name === name);
  if (input?.link == null) return widgetOf(node, name);
  const { graph } = node;
  const link = graph?.getLink?.(input.link);
  if (!link || link.origin_id !== graph.inputNode?.id) return undefined;
  const outside = [...allNodes()].map(([, one]) => one).filter((one) => one.subgraph === graph);
  // a subgraph that is used twice shows two
  return outside.length === 1 ? sourceOf(outside[0], graph.inputs[link.origin_slot].name) : undefined;
}

/**
 * What the page calls an input of a node.
 * @param {object} node
 * @param {string} name
 * @returns {string}
 */
export function labelOf(node, name) {
  const input = node.inputs?.find((one) => one.name === name);
  return input?.label ?? input?.localized_name ?? widgetOf(node, name)?.label ?? name;
}

/**
 * Set widgets as a person would: the workflow counts as modified, and it can be undone in one step.
 * @param {object} node
 * @param {Record<string, string | boolean>} values by the names of the widgets
 */
export function setWidgets(node, values) {
  const changed = Object.entries(values)
    .map(([name, value]) => [sourceOf(node, name), value])
    .filter(([widget, value]) => widget && widget.value !== value);
  if (!changed.length) return;
  app.canvas?.emitBeforeChange?.();
  for (const [widget, value] of changed) {
    widget.value = value;
    widget.callback?.(value);
  }
  app.canvas?.emitAfterChange?.();
}

/**
 * Set a widget to a result: no step of its own to undo, and no other step takes it back.
 * @param {object} node
 * @param {string} name
 * @param {string} value
 */
export function setResult(node, name, value) {
  const widget = widgetOf(node, name);
  if (!widget || widget.value === value) return;
  widget.value = value;
  const tracker = app.extensionManager?.workflow?.activeWorkflow?.changeTracker;
  const states = [tracker?.activeState, ...(tracker?.undoQueue ?? []), ...(tracker?.redoQueue ?? [])];
  const place = node.widgets.indexOf(widget);
  for (const state of states) {
    const values = savedNode(state, node)?.widgets_values;
    if (values?.length > place) values[place] = value;
  }
  tracker?.updateModified?.();
}

/** A node as a saved state of the workflow has it. */
function savedNode(state, node) {
  const subgraphs = state?.definitions?.subgraphs ?? [];
  const graph = node.graph === rootGraph() ? state : subgraphs.find(({ id }) => id === node.graph?.id);
  return graph?.nodes?.find(({ id, type }) => String(id) === String(node.id) && type === node.type);
}

/**
 * Do something after a method of one object, whatever the method was.
 * @param {object} object
 * @param {string} name
 * @param {Function} after
 */
export function chain(object, name, after) {
  const before = object[name];
  object[name] = function (...values) {
    const result = before?.apply(this, values);
    after.apply(this, values);
    return result;
  };
}
