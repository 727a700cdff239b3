import { button, element, setText } from "./dom.js";

/**
 * One line for each of several prompts.
 * @param {(k: number) => void} onOpen a line was clicked
 */
export function createRows(onOpen) {
  const root = element("div", "pez-rows");
  const rows = [];

  function addRow() {
    const k = rows.length;
    const row = button("pez-row", () => onOpen(k));
    const prompt = element("span", "pez-row-prompt");
    const similarity = element("span", "pez-number");
    row.append(element("span", "pez-row-place", String(k + 1)), prompt, similarity);
    rows.push({ row, prompt, similarity });
    root.append(row);
  }

  /**
   * @param {import("./found.js").Found[]} items
   * @param {number} opened the line whose detail is shown; -1 for none
   * @param {HTMLElement} detail
   */
  function update(items, opened, detail) {
    while (rows.length < items.length) addRow();
    while (rows.length > items.length) rows.pop().row.remove();
    items.forEach((item, k) => {
      setText(rows[k].prompt, item.prompt || "…");
      setText(rows[k].similarity, item.similarity?.toFixed(3) ?? "");
      rows[k].row.setAttribute("aria-expanded", String(k === opened));
    });
    if (opened < 0) detail.remove();
    else if (rows[opened].row.nextSibling !== detail) rows[opened].row.after(detail);
  }

  return { element: root, update };
}
