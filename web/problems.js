import { api } from "../../scripts/api.js";
import { element } from "./dom.js";
import { findNode } from "./graph.js";
import { messageParts, showMessage } from "./message.js";

const HEIGHT = 110;

/** The widgets that show an error, with their nodes. */
const shown = new Map();

/**
 * Show errors on nodes that have no live view, until the next run.
 * @param {(node: object) => boolean} isOurs whether to show those of a node
 */
export function followProblems(isOurs) {
  api.addEventListener("execution_start", () => [...shown.keys()].forEach(hide));
  api.addEventListener("execution_error", ({ detail }) => {
    const node = findNode(String(detail.node_id));
    if (node && isOurs(node)) show(node, String(detail.exception_message));
  });
}

function show(node, message) {
  hide(node);
  const content = element("p", "pez-message pez-problem");
  content.setAttribute("role", "alert");
  showMessage(content, messageParts(node, message));
  const options = { serialize: false, hideOnZoom: false, getMinHeight: () => HEIGHT };
  const widget = node.addDOMWidget("pez_problem", "pez_problem", content, options);
  widget.serialize = false; // not into the workflow either
  shown.set(node, widget);
  const [width, height] = node.size;
  node.setSize([width, Math.max(height, node.computeSize()[1])]);
}

function hide(node) {
  const widget = shown.get(node);
  if (!widget) return;
  shown.delete(node);
  node.removeWidget?.(widget);
  widget.element?.remove();
}
