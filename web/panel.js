import { createCurve } from "./curve.js";
import { button, copyText, element, setText } from "./dom.js";
import { text } from "./strings.js";
import { createWords, hasBlocked } from "./words.js";

/**
 * What a panel shows.
 * @typedef {object} View
 * @property {string} state of a run, or "idle" or "stored"
 * @property {number} step
 * @property {number} steps
 * @property {number | null} secondsLeft
 * @property {import("./found.js").Found[]} items
 * @property {string[]} changed labels of inputs that the prompts were not learned from
 * @property {Set<string> | null} blocked blocked words in lower case; null where none can be
 * @property {boolean} keep the node gives its kept prompt
 * @property {boolean} scores the node scores prompts and learns none
 */

const COPIED = 1500; // milliseconds

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
  const scroll = element("div", "pez-scroll");
  scroll.dataset.captureWheel = "true"; // Nodes 2.0: scrolls once it has the focus
  scroll.tabIndex = 0;
  const footer = createFooter({ onFinish, copied: () => copied() });
  root.append(header.element, scroll, footer.element);

  let view;
  let opened = -1; // of several prompts, the one whose words are shown

  function open(k) {
    opened = opened === k ? -1 : k;
    update(view);
  }

  const focused = () => (view.items.length === 1 ? view.items[0] : view.items[opened]);

  const copied = () =>
    focused()?.prompt ?? view.items.map((item) => item.prompt).join("\n");

  /** @param {View} next */
  function update(next) {
    view = next;
    if (opened >= view.items.length) opened = -1;
    const found = focused();
    root.dataset.state = view.state;
    root.setAttribute("aria-live", isRunning(view) ? "off" : "polite");
    header.update(view, found);
    if (found) showDetail(found);
    if (view.items.length > 1) {
      rows.update(view.items, opened, detail);
      place(rows.element);
    } else if (found?.prompt) {
      place(detail);
    } else {
      setText(hint, isRunning(view) ? "" : text(view.scores ? "idleScore" : "idle"));
      place(hint);
    }
    footer.update(view, found);
  }

  function showDetail(found) {
    words.update(found, view.blocked);
    setText(note, found.note);
    candidates.update(found.candidates);
  }

  function place(content) {
    if (scroll.firstChild !== content) scroll.replaceChildren(content);
  }

  return { element: root, scroll, update };
}

const isRunning = ({ state }) => ["starting", "running", "finishing"].includes(state);

/** How far the search is, and what it has reached. */
function createHeader() {
  const root = element("header", "pez-header");
  const status = element("span", "pez-status");
  const left = element("span", "pez-left");
  const curve = createCurve();
  const average = element("span", "pez-mean");
  const similarity = element("span", "pez-similarity");
  similarity.title = text("similarity");
  const bar = element("div", "pez-bar");
  bar.setAttribute("role", "progressbar");
  bar.setAttribute("aria-label", text("progress"));
  bar.append(element("div", "pez-bar-done"));
  root.append(status, left, average, curve.element, similarity, bar);

  function update(view, found) {
    setText(status, statusOf(view));
    setText(left, leftOf(view));
    setText(average, view.items.length > 1 && !found ? text("mean") : "");
    const value = found ? found.similarity : mean(view.items.map((item) => item.similarity));
    setText(similarity, value === null ? "" : value.toFixed(3));
    curve.update(found?.curve ?? [], view.steps, text("curve", { value: value?.toFixed(3) ?? "" }));
    const percent = Math.round((100 * view.step) / (view.steps || 1));
    bar.setAttribute("aria-valuenow", String(percent));
    bar.firstChild.style.width = `${percent}%`;
  }

  return { element: root, update };
}

function statusOf(view) {
  const several = view.items.length > 1 ? text("several", { count: view.items.length }) : "";
  if (view.state === "idle") return "";
  if (view.keep && !isRunning(view)) return [text("kept"), several].filter(Boolean).join(" · ");
  const state = view.scores && view.state === "done" ? "scored" : view.state;
  const said = text(state, { step: view.step, steps: view.steps });
  return isRunning(view) || !several ? said : `${said} · ${several}`;
}

function leftOf(view) {
  if (view.state !== "running" || view.secondsLeft === null) return "";
  const seconds = Math.ceil(view.secondsLeft);
  const time = `${Math.floor(seconds / 60)}:${String(seconds % 60).padStart(2, "0")}`;
  return text("left", { time });
}

function mean(values) {
  const numbers = values.filter((value) => value !== null);
  return numbers.length ? numbers.reduce((a, b) => a + b) / numbers.length : null;
}

/** The prompts of all restarts, folded away. */
function createCandidates() {
  const root = element("details", "pez-candidates");
  const summary = element("summary", "");
  const list = element("ol", "");
  root.append(summary, list);
  let shown = "";

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

/** One line for each of several prompts. */
function createRows(onOpen) {
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

/** What can be done, and what should be known. */
function createFooter({ onFinish, copied }) {
  const root = element("footer", "pez-footer");
  const changed = element("span", "pez-changed");
  const blocked = element("span", "pez-blocked");
  const finish = button("pez-button pez-finish", onFinish);
  finish.title = text("finishHint");
  const copy = button("pez-button pez-copy", async () => {
    const done = await copyText(copied());
    setText(copy, text(done ? "copied" : "notCopied"));
    setTimeout(() => setText(copy, copyLabel), COPIED);
  });
  let copyLabel = text("copy");
  setText(copy, copyLabel);
  root.append(changed, blocked, finish, copy);

  function update(view, found) {
    const names = isRunning(view) ? "" : view.changed.join(", ");
    setText(changed, names && text("changed", { names }));
    changed.title = changed.textContent;
    const strikes = view.items.some((item) => hasBlocked(item.prompt, view.blocked));
    setText(blocked, strikes ? text(view.keep ? "blockedWhileKept" : "blockedHint") : "");
    finish.style.display = ["running", "finishing"].includes(view.state) ? "" : "none";
    finish.disabled = view.state === "finishing";
    setText(finish, text(view.state === "finishing" ? "finishing" : "finish"));
    copy.style.display = view.items.some((item) => item.prompt) ? "" : "none";
    const label = text(found ? "copy" : "copyAll");
    if (label !== copyLabel) setText(copy, (copyLabel = label));
  }

  return { element: root, update };
}
