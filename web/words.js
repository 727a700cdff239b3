import { button, element } from "./dom.js";
import { text } from "./strings.js";

/**
 * A word as it is blocked: without the punctuation around it.
 * @param {string} word
 * @returns {string} empty where nothing is left to block
 */
export function bare(word) {
  const inner = word.replace(/^[\p{P}\p{Z}]+|[\p{P}\p{Z}]+$/gu, "");
  return inner.replace(/,/g, " ").trim(); // commas stand between blocked words
}

/**
 * The phrases of a list with commas.
 * @param {string} list
 * @returns {string[]}
 */
export const phrases = (list) =>
  list
    .split(/[,\n]/)
    .map((phrase) => phrase.trim())
    .filter(Boolean);

/**
 * Put a word into a list with commas, or take it out if it is in there.
 * @param {string} list
 * @param {string} word
 * @returns {string}
 */
export function toggled(list, word) {
  const before = phrases(list);
  const others = before.filter((phrase) => phrase.toLowerCase() !== word.toLowerCase());
  return (others.length < before.length ? others : [...before, word]).join(", ");
}

/**
 * Whether a prompt has a word that is blocked by now.
 * @param {string} prompt
 * @param {Set<string> | null} blocked blocked words in lower case
 */
export const hasBlocked = (prompt, blocked) =>
  prompt.split(/\s+/).some((word) => blocked?.has(bare(word).toLowerCase()));

/**
 * The words of a prompt, shaded by what they add to it.
 * @param {(word: string) => void} onToggle a word was clicked
 */
export function createWords(onToggle) {
  const root = element("div", "pez-words");
  let shown = "";

  /**
   * @param {import("./found.js").Found} found
   * @param {Set<string> | null} blocked blocked words in lower case; null where none can be
   */
  function update(found, blocked) {
    const blockedHere = blocked && [...blocked].sort();
    const now = JSON.stringify([found.prompt, found.words, blockedHere]);
    if (now === shown) return; // a word that is being clicked has to stay
    shown = now;
    root.replaceChildren(
      ...weighed(found).map(([word, value, strength]) => {
        const made = blocked && bare(word) ? wordButton(word, blocked) : element("span", "", word);
        made.classList.add("pez-word");
        shade(made, value, strength);
        return made;
      }),
    );
  }

  function wordButton(word, blocked) {
    const made = button("", () => onToggle(bare(word)));
    made.textContent = word;
    const isBlocked = blocked.has(bare(word).toLowerCase());
    made.setAttribute("aria-pressed", String(isBlocked));
    made.title = text(isBlocked ? "unblock" : "block");
    return made;
  }

  return { element: root, update };
}

/** Each word with what it adds, and that against the strongest; words may be of an older prompt. */
function weighed({ prompt, words }) {
  const left = [...words];
  const strongest = Math.max(...words.map(([, value]) => Math.abs(value)), 1e-9);
  return prompt
    .split(/\s+/)
    .filter(Boolean)
    .map((word) => {
      const at = left.findIndex(([one]) => one === word);
      if (at < 0) return [word, null, 0];
      const [[, value]] = left.splice(at, 1);
      return [word, value, Math.abs(value) / strongest];
    });
}

function shade(made, value, strength) {
  if (value === null) return;
  made.classList.add(value < 0 ? "pez-takes" : "pez-adds");
  made.style.setProperty("--pez-strength", strength.toFixed(2));
  const worth = text(value < 0 ? "takes" : "adds", { value: Math.abs(value).toFixed(4) });
  made.title = made.title ? `${worth} · ${made.title}` : worth;
}
