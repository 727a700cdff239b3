import { createCurve } from "./curve.js";
import { element, setText } from "./dom.js";
import { isRunning } from "./runs.js";
import { text } from "./strings.js";

/** How far the search is, and what it has reached. */
export function createHeader() {
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

  /**
   * @param {import("./panel.js").View} view
   * @param {import("./found.js").Found} [found] the prompt whose words are shown
   */
  function update(view, found) {
    setText(status, statusOf(view));
    setText(left, leftOf(view));
    setText(average, view.items.length > 1 && !found ? text("mean") : "");
    const value = found ? found.similarity : mean(view.items.map((item) => item.similarity));
    setText(similarity, value === null ? "" : value.toFixed(3));
    const label = text("curve", { value: value?.toFixed(3) ?? "" });
    curve.update(found?.curve ?? [], view.step, label);
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
  const state = stateOf(view);
  const named = state === "starting" && view.phase ? view.phase : state;
  const said = text(named, { step: view.step, steps: view.steps });
  return isRunning(view) || !several ? said : `${said} · ${several}`;
}

function stateOf(view) {
  if (view.scores && view.state === "done") return "scored";
  return view.state === "failed" && !view.items.length ? "error" : view.state;
}

function leftOf(view) {
  const takesTime = view.state === "running" || (view.state === "starting" && view.phase);
  if (!takesTime || view.secondsLeft === null) return "";
  const seconds = Math.ceil(view.secondsLeft);
  const time = `${Math.floor(seconds / 60)}:${String(seconds % 60).padStart(2, "0")}`;
  return text(view.moreFollows ? "leftOfPart" : "left", { time });
}

function mean(values) {
  const numbers = values.filter((value) => value !== null);
  return numbers.length ? numbers.reduce((a, b) => a + b) / numbers.length : null;
}
