/**
 * One prompt and what is known of it.
 * @typedef {object} Found
 * @property {string} prompt
 * @property {number | null} similarity
 * @property {[string, number][]} words each word and what it adds
 * @property {[number, number][]} curve step and similarity
 * @property {[string, number][]} candidates prompts and their similarity
 * @property {string} note
 */

/**
 * What a kept text holds.
 * @typedef {object} Kept
 * @property {Found[]} items
 * @property {Record<string, string>} inputs digests of what it was learned from
 */

const isPair = (type) => (value) =>
  Array.isArray(value) && typeof value[0] === type && Number.isFinite(value[1]);

const pairs = (value, type) => (Array.isArray(value) ? value.filter(isPair(type)) : []);

/**
 * Prompts out of JSON, which may be anyone's.
 * @param {unknown} values
 * @returns {Found[]}
 */
export function readFound(values) {
  if (!Array.isArray(values)) return [];
  return values
    .filter((value) => typeof value?.prompt === "string")
    .map((value) => ({
      prompt: value.prompt,
      similarity: Number.isFinite(value.similarity) ? value.similarity : null,
      words: pairs(value.words, "string"),
      curve: pairs(value.curve, "number"),
      candidates: pairs(value.candidates, "string"),
      note: typeof value.note === "string" ? value.note : "",
    }));
}

/**
 * What the widget `kept` of a node says.
 * @param {unknown} text
 * @returns {Kept | null} null where there is nothing that can be read
 */
export function readKept(text) {
  if (typeof text !== "string" || !text) return null;
  try {
    const kept = JSON.parse(text);
    const items = readFound(kept.items);
    return items.length ? { items, inputs: { ...kept.inputs } } : null;
  } catch {
    return null;
  }
}
