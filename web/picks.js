import { button, element, setText } from "./dom.js";
import { text } from "./strings.js";

/**
 * A prompt that can be chosen.
 * @typedef {object} Choice
 * @property {string} prompt
 * @property {number | null} similarity
 * @property {string} picture address of an image that was made of it; "" without one
 * @property {boolean} chosen the node gives this one
 */

/**
 * Prompts to choose from, folded away.
 * @param {string} label key of the text of the fold
 * @param {(k: number) => void} onPick a prompt was clicked
 */
export function createPicks(label, onPick) {
  const root = element("details", "pez-picks");
  const summary = element("summary", "");
  const list = element("ol", "");
  root.append(summary, list);
  let shown = "";

  /** @param {Choice[]} choices */
  function update(choices) {
    const now = JSON.stringify(choices);
    if (now === shown) return; // what is being clicked has to stay
    shown = now;
    root.style.display = choices.length > 1 ? "" : "none";
    setText(summary, text(label, { count: choices.length }));
    list.replaceChildren(...choices.map(line));
  }

  function line(choice, k) {
    const made = element("li", "");
    const pick = button("pez-pick", () => onPick(k));
    pick.title = text("pick");
    pick.setAttribute("aria-pressed", String(choice.chosen));
    if (choice.picture) pick.append(picture(choice.picture));
    const similarity = choice.similarity?.toFixed(3) ?? "";
    pick.append(element("span", "pez-number", similarity), element("span", "", choice.prompt));
    made.append(pick);
    return made;
  }

  return { element: root, update };
}

function picture(address) {
  const made = element("img", "pez-picture");
  made.alt = "";
  made.loading = "lazy";
  made.addEventListener("error", () => made.remove()); // the file is gone
  made.src = address;
  return made;
}
