import { element, setText } from "./dom.js";
import { text } from "./strings.js";

/** The prompts of all restarts, folded away. */
export function createCandidates() {
  const root = element("details", "pez-candidates");
  const summary = element("summary", "");
  const list = element("ol", "");
  root.append(summary, list);
  let shown = "";

  /** @param {[string, number][]} candidates prompts and their similarity */
  function update(candidates) {
    const now = JSON.stringify(candidates);
    if (now === shown) return;
    shown = now;
    root.style.display = candidates.length > 1 ? "" : "none";
    setText(summary, text("candidates", { count: candidates.length }));
    list.replaceChildren(
      ...candidates.map(([prompt, similarity]) => {
        const line = element("li", "");
        line.append(element("span", "pez-number", similarity.toFixed(3)), ` ${prompt}`);
        return line;
      }),
    );
  }

  return { element: root, update };
}
