import { button, copyText, element, setText } from "./dom.js";
import { isRunning } from "./runs.js";
import { text } from "./strings.js";
import { hasBlocked } from "./words.js";

const COPIED = 1500; // milliseconds

/**
 * Notices and buttons.
 * @param {object} actions
 * @param {() => void} actions.onFinish
 * @param {() => void} actions.onKeep
 * @param {() => string} actions.copied what goes onto the clipboard
 */
export function createFooter({ onFinish, onKeep, copied }) {
  const root = element("footer", "pez-footer");
  const notices = element("div", "pez-notices");
  const changed = element("span", "pez-changed");
  const blocked = element("span", "pez-blocked");
  const finish = button("pez-button pez-finish", onFinish);
  finish.title = text("finishHint");
  const keep = button("pez-button pez-keep", onKeep);
  keep.title = text("keepHint");
  setText(keep, text("keep"));
  let copyLabel = text("copy");
  const copy = button("pez-button pez-copy", async () => {
    const done = await copyText(copied());
    setText(copy, text(done ? "copied" : "notCopied"));
    setTimeout(() => setText(copy, copyLabel), COPIED);
  });
  setText(copy, copyLabel);
  notices.append(changed, blocked);
  root.append(notices, finish, keep, copy);

  /**
   * @param {import("./panel.js").View} view
   * @param {import("./found.js").Found} [found] the prompt whose words are shown
   */
  function update(view, found) {
    const names = isRunning(view) ? "" : view.changed.join(text("separator"));
    setText(changed, names && text("changed", { names }));
    changed.title = changed.textContent;
    const strikes = view.items.some((item) => hasBlocked(item, view.blocked));
    setText(blocked, strikes ? text(view.keep ? "blockedWhileKept" : "blockedHint") : "");
    blocked.title = blocked.textContent;
    finish.style.display = ["running", "finishing"].includes(view.state) ? "" : "none";
    finish.disabled = view.state === "finishing";
    setText(finish, text(view.state === "finishing" ? "finishing" : "finish"));
    keep.style.display = view.canKeep ? "" : "none";
    copy.style.display = view.items.some((item) => item.prompt) ? "" : "none";
    const label = text(found ? "copy" : "copyAll");
    if (label !== copyLabel) setText(copy, (copyLabel = label));
  }

  return { element: root, update };
}
