import { element, setText } from "./dom.js";
import { createFooter } from "./footer.js";
import { createHeader } from "./header.js";
import { showMessage } from "./message.js";
import { createPicks } from "./picks.js";
import { createRows } from "./rows.js";
import { isRunning } from "./runs.js";
import { text, translateNote } from "./strings.js";
import { createWords } from "./words.js";

/**
 * What a panel shows.
 * @typedef {object} View
 * @property {string} state of a run, or "idle" or "stored"
 * @property {number} step
 * @property {number} steps
 * @property {number | null} secondsLeft
 * @property {import("./found.js").Found[]} items
 * @property {string[]} message of an error, as texts in turn plain and bold; [] without one
 * @property {string[]} missing labels of inputs that have to be connected
 * @property {string[]} changed labels of inputs that changed since the prompts were learned
 * @property {Set<string> | null} blocked blocked words in lower case; null where none can be
 * @property {boolean} keep the node gives its kept prompt
 * @property {boolean} canPick the candidates can be chosen
 * @property {boolean} canKeep a search ended too early, and its best can be kept
 * @property {import("./finds.js").Find[]} finds what the node has learned, newest first
 * @property {(found: import("./found.js").Found) => string[]} pictures images of its candidates
 * @property {boolean} scores the node scores prompts and learns none
 */

/**
 * The live view of one node.
 * @param {object} actions
 * @param {() => void} actions.onFinish
 * @param {(word: string) => void} actions.onToggle a word was clicked
 * @param {() => void} actions.onKeep the best of a search that ended too early is to be kept
 * @param {(k: number, choice: number) => void} actions.onPick a candidate of the k-th prompt
 * @param {(k: number) => void} actions.onFind an earlier result was chosen
 */
export function createPanel({ onFinish, onToggle, onKeep, onPick, onFind }) {
  const root = element("section", "pez-live");
  const header = createHeader();
  const words = createWords(onToggle);
  const note = element("p", "pez-note");
  const candidates = createPicks("candidates", (choice) => onPick(Math.max(opened, 0), choice));
  const history = createPicks("history", onFind);
  const detail = element("div", "pez-detail");
  detail.append(words.element, note, candidates.element);
  const hint = element("p", "pez-hint");
  const rows = createRows(open);
  const message = element("p", "pez-message");
  message.setAttribute("role", "alert");
  const content = element("div", "pez-content");
  const scroll = element("div", "pez-scroll");
  scroll.append(message, content, history.element);
  scroll.dataset.captureWheel = "true"; // Nodes 2.0: scrolls once it has the focus
  scroll.tabIndex = 0;
  const footer = createFooter({ onFinish, onKeep, copied: () => copied() });
  root.append(header.element, scroll, footer.element);

  let view;
  let opened = -1; // of several prompts, the one whose words are shown

  function open(k) {
    opened = opened === k ? -1 : k;
    update(view);
  }

  const focused = () => (view.items.length === 1 ? view.items[0] : view.items[opened]);

  const copied = () => focused()?.prompt ?? view.items.map((item) => item.prompt).join("\n");

  /** @param {View} next */
  function update(next) {
    view = next;
    if (opened >= view.items.length) opened = -1;
    const found = focused();
    root.dataset.state = view.state;
    scroll.setAttribute("aria-live", isRunning(view) ? "off" : "polite");
    header.update(view, found);
    showMessage(message, view.message);
    if (found) showDetail(found);
    if (view.items.length > 1) {
      rows.update(view.items, opened, detail);
      place(rows.element);
    } else if (found?.prompt) {
      place(detail);
    } else {
      const names = view.missing.join(text("separator"));
      const idle = names ? text("missing", { names }) : text(view.scores ? "idleScore" : "idle");
      setText(hint, isRunning(view) || view.message.length ? "" : idle);
      place(hint);
    }
    history.update(isRunning(view) ? [] : view.finds.map(choiceOf));
    footer.update(view, found);
  }

  /** An earlier result; of several prompts the first stands for all. */
  function choiceOf({ items, pictures }) {
    const [{ prompt, similarity }] = items;
    const chosen = view.keep && items.every((item, k) => item.prompt === view.items[k]?.prompt);
    const more = items.length > 1 ? ` ${text("more", { count: items.length - 1 })}` : "";
    return { prompt: prompt + more, similarity, picture: pictures[0] ?? "", chosen };
  }

  function candidatesOf(found) {
    if (!view.canPick || isRunning(view)) return [];
    const pictures = view.pictures(found);
    return found.candidates.map(([prompt, similarity], k) => {
      const chosen = view.keep && prompt === found.prompt;
      return { prompt, similarity, picture: pictures[k] ?? "", chosen };
    });
  }

  function showDetail(found) {
    words.update(found, view.blocked, view.scores);
    setText(note, translateNote(found.note));
    candidates.update(candidatesOf(found));
  }

  function place(shown) {
    if (content.firstChild !== shown) content.replaceChildren(shown);
  }

  return { element: root, scroll, update };
}
