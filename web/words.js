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
 * Whether a prompt has a learned word that is blocked by now.
 * @param {import("./found.js").Found} found
 * @param {Set<string> | null} blocked blocked words in lower case
 */
export const hasBlocked = (found, blocked) =>
  weighed(found).some(({ word, learned }) => learned && blocked?.has(bare(word).toLowerCase()));

/**
 * The words of a prompt, shaded by their contribution.
 * @param {(word: string) => void} onToggle a word was clicked
 */
export function createWords(onToggle) {
  const root = element("div", "pez-words");
  let shown = "";

  /**
   * @param {import("./found.js").Found} found
   * @param {Set<string> | null} blocked blocked words in lower case; null where none can be
   * @param {boolean} scores all words are given, so that none is marked as fixed
   */
  function update(found, blocked, scores) {
    const blockedHere = blocked && [...blocked].sort();
    const now = JSON.stringify([found.prompt, found.words, found.fixed, blockedHere]);
    if (now === shown) return; // a word that is being clicked has to stay
    shown = now;
    root.replaceChildren(
      ...weighed(found).map(({ word, learned, value, strength }) => {
        const clickable = blocked && learned && bare(word);
        const made = clickable ? wordButton(word, blocked) : element("span", "", word);
        made.classList.add("pez-word");
        made.classList.toggle("pez-fixed", !learned && !scores);
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

/**
 * Each word with its contribution, and that against the strongest. The words of the contributions
 * may be those of an older prompt.
 */
function weighed({ prompt, words, fixed }) {
  // a weight of several words has one contribution
  const left = words.flatMap(([unit, value]) => unit.split(/\s+/).map((word) => [word, value]));
  // one by one: a call cannot take as many arguments as a stranger's workflow has words
  const strongest = words.reduce((most, [, value]) => Math.max(most, Math.abs(value)), 1e-9);
  const all = prompt.split(/\s+/).filter(Boolean);
  const syntax = syntaxOf(all);
  return all.map((word, k) => {
    const learned = k >= fixed[0] && k < all.length - fixed[1] && !syntax[k];
    const at = left.findIndex(([one]) => one === word);
    if (at < 0) return { word, learned, value: null, strength: 0 };
    const [[, value]] = left.splice(at, 1);
    return { word, learned, value, strength: Math.abs(value) / strongest };
  });
}

/** Which words are syntax, which no search touches; see `pez_core/prompt_text.py`. */
function syntaxOf(words) {
  let depth = 0;
  const found = words.map((word) => {
    const plain = word.replace(/\\./g, ""); // escaped brackets open nothing
    const opened = (plain.match(/[([<{]/g) ?? []).length;
    const closed = (plain.match(/[)\]>}]/g) ?? []).length;
    const inside = depth > 0 || opened > 0;
    depth = Math.max(0, depth + opened - closed);
    return inside || /^(BREAK|AND|:[-+]?[\d.]+|embedding:.*|__.+__,?)$/.test(word);
  });
  words.forEach((word, k) => {
    if (!word.includes("\\(") && !word.includes("\\)")) return;
    found[k] = true; // of a name such as saber \(fate\)
    for (let n = k - 1; n >= Math.max(0, k - 3) && !words[n].endsWith(","); n--) found[n] = true;
  });
  return found;
}

function shade(made, value, strength) {
  if (value === null) return;
  made.classList.add(value < 0 ? "pez-takes" : "pez-adds");
  made.style.setProperty("--pez-strength", strength.toFixed(2));
  const worth = text(value < 0 ? "takes" : "adds", { value: Math.abs(value).toFixed(4) });
  made.title = made.title ? `${worth} · ${made.title}` : worth;
}
