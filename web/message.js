import { element } from "./dom.js";
import { labelOf } from "./graph.js";

/**
 * An error as texts in turn plain and bold: inputs get the names that the page shows.
 * @param {object} node
 * @param {string} message with names of inputs in backticks
 * @returns {string[]}
 */
export const messageParts = (node, message) =>
  message.trim().split(/`(\w+)`/).map((part, k) => (k % 2 ? labelOf(node, part) : part));

/**
 * Show an error.
 * @param {HTMLElement} target
 * @param {string[]} parts from `messageParts`; [] for none
 */
export function showMessage(target, parts) {
  if (target.textContent === parts.join("")) return;
  target.replaceChildren(...parts.map((part, k) => (k % 2 ? element("b", "", part) : part)));
}
