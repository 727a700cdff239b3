/**
 * One prompt with all that the panel shows of it.
 * @typedef {object} Found
 * @property {string} prompt
 * @property {number | null} similarity
 * @property {[string, number][]} words each word and its contribution
 * @property {[number, number][]} curve step and similarity
 * @property {[string, number][]} candidates prompts and their similarity
 * @property {string} note
 * @property {[number, number]} fixed numbers of words before and behind the learned ones
 */

// what the page shows of them; a workflow may hold megabytes
const MOST_FOUND = 1000;
const MOST_PAIRS = 1000;
const LONGEST_PROMPT = 20_000;

const isPair = (type) => (value) =>
  Array.isArray(value) && typeof value[0] === type && Number.isFinite(value[1]);

const pairs = (value, type) => (Array.isArray(value) ? value.slice(0, MOST_PAIRS).filter(isPair(type)) : []);

const counts = (value) =>
  Array.isArray(value) && value.length === 2 && value.every(Number.isInteger) ? value : [0, 0];

/**
 * Prompts out of JSON, which may be anyone's.
 * @param {unknown} values
 * @returns {Found[]}
 */
export function readFound(values) {
  if (!Array.isArray(values)) return [];
  return values
    .slice(0, MOST_FOUND)
    .filter((value) => typeof value?.prompt === "string")
    .map((value) => ({
      prompt: value.prompt.slice(0, LONGEST_PROMPT),
      similarity: Number.isFinite(value.similarity) ? value.similarity : null,
      words: pairs(value.words, "string"),
      curve: pairs(value.curve, "number"),
      candidates: pairs(value.candidates, "string"),
      note: typeof value.note === "string" ? value.note : "",
      fixed: counts(value.fixed),
    }));
}

/**
 * The prompts in the widget `kept` of a node.
 * @param {unknown} text
 * @returns {Found[] | null} null where there is nothing that can be read
 */
export function readKept(text) {
  if (typeof text !== "string" || !text) return null;
  try {
    const items = readFound(JSON.parse(text).items);
    return items.length ? items : null;
  } catch {
    return null;
  }
}

/**
 * The text for the widget `kept` with another candidate in place of the prompt.
 * @param {string} kept
 * @param {number} k which of the prompts
 * @param {number} choice which of its candidates
 */
export function withCandidate(kept, k, choice) {
  const all = JSON.parse(kept);
  const item = all.items[k];
  const [prompt, similarity] = pairs(item.candidates, "string")[choice];
  if (prompt === item.prompt) return kept;
  // nobody knows what the words of this one contribute, or how the search came to it
  const changed = { ...item, prompt, similarity, words: [], curve: [] };
  if (item.each) changed.similarities = item.each[choice];
  all.items[k] = changed;
  return JSON.stringify(all);
}

/**
 * The text for the widget `kept` with the best prompts of a run that ended too early.
 * @param {import("./runs.js").Run} run
 * @returns {string} "" where a prompt is missing
 */
export function keptOf({ items, inputs }) {
  if (!items.length || !items.every((item) => item.prompt && item.similarity !== null)) return "";
  const whole = items.map(({ fixed, ...item }) => ({
    ...item,
    candidates: [[item.prompt, item.similarity]],
    ...(fixed.some(Boolean) && { fixed }),
  }));
  return JSON.stringify({ version: 1, items: whole, inputs });
}
