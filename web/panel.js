import { createCandidates } from "./candidates.js";
import { element, setText } from "./dom.js";
import { createFooter } from "./footer.js";
import { createHeader } from "./header.js";
import { showMessage } from "./message.js";
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
 * @property {string[]} changed labels of inputs that changed since the prompts were learned
 * @property {Set<string> | null} blocked blocked words in lower case; null where none can be
 * @property {boolean} keep the node gives its kept prompt
 * @property {boolean} scores the node scores prompts and learns none
 */

/**
 * The live view of one node.
 * @param {object} actions
 * @param {() => void} actions.onFinish
 * @param {(word: string) => void} actions.onToggle a word was clicked
 */
export function createPanel({ onFinish, onToggle }) {
  const root = element("section", "pez-live");
  const header = createHeader();
  const words = createWords(onToggle);
  const note = element("p", "pez-note");
  const candidates = createCandidates();
  const detail = element("div", "pez-detail");
  detail.append(words.element, note, candidates.element);
  const hint = element("p", "pez-hint");
  const rows = createRows(open);
  const message = element("p", "pez-message");
  message.setAttribute("role", "alert");
  const content = element("div", "pez-content");
  const scroll = element("div", "pez-scroll");
  scroll.append(message, content);
  scroll.dataset.captureWheel = "true"; // Nodes 2.0: scrolls once it has the focus
  scroll.tabIndex = 0;
  const footer = createFooter(onFinish, () => copied());
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
      const idle = text(view.scores ? "idleScore" : "idle");
      setText(hint, isRunning(view) || view.message.length ? "" : idle);
      place(hint);
    }
    footer.update(view, found);
  }

  function showDetail(found) {
    words.update(found, view.blocked, view.scores);
    setText(note, translateNote(found.note));
    candidates.update(found.candidates);
  }

  function place(shown) {
    if (content.firstChild !== shown) content.replaceChildren(shown);
  }

  return { element: root, scroll, update };
}
