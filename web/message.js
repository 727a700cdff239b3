import { element } from "./dom.js";
import { labelOf } from "./graph.js";

// a text in quotation marks is a value of the user; an apostrophe behind a letter is no such mark
const VALUE_OR_NAME = /(?<!\w)'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*"|`(?<name>\w+)`/g;

/**
 * An error as texts in turn plain and bold: inputs get the names that the page shows.
 * @param {object} node
 * @param {string} message with names of inputs in backticks, and values in quotation marks
 * @returns {string[]}
 */
export function messageParts(node, message) {
  const trimmed = message.trim();
  const parts = [];
  let end = 0;
  for (const { 0: all, index, groups } of trimmed.matchAll(VALUE_OR_NAME)) {
    if (!groups.name) continue;
    parts.push(trimmed.slice(end, index), labelOf(node, groups.name));
    end = index + all.length;
  }
  return [...parts, trimmed.slice(end)];
}

/**
 * Show an error.
 * @param {HTMLElement} target
 * @param {string[]} parts from `messageParts`; [] for none
 */
export function showMessage(target, parts) {
  if (target.textContent === parts.join("")) return;
  target.replaceChildren(...parts.map((part, k) => (k % 2 ? element("b", "", part) : part)));
}
