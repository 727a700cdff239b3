/**
 * An HTML element; its text goes in as text, for prompts come from strangers' workflows.
 * @param {string} tag
 * @param {string} className
 * @param {string} [content]
 * @returns {HTMLElement}
 */
export function element(tag, className, content = "") {
  const made = document.createElement(tag);
  made.className = className;
  made.textContent = content;
  return made;
}

/**
 * A button.
 * @param {string} className
 * @param {(event: MouseEvent) => void} onClick
 * @returns {HTMLButtonElement}
 */
export function button(className, onClick) {
  const made = element("button", className);
  made.type = "button";
  made.addEventListener("click", onClick);
  return made;
}

/**
 * Set the text of an element if it is another one, so that nothing repaints or loses a click.
 * @param {HTMLElement} target
 * @param {string} content
 */
export function setText(target, content) {
  if (target.textContent !== content) target.textContent = content;
}

/**
 * Put a text on the clipboard.
 * @param {string} content
 * @returns {Promise<boolean>} whether it is there
 */
export async function copyText(content) {
  try {
    await navigator.clipboard.writeText(content);
    return true;
  } catch {
    // no clipboard on plain http, or not allowed
    return copyBySelection(content);
  }
}

function copyBySelection(content) {
  const box = document.createElement("textarea");
  box.value = content;
  box.style.position = "fixed";
  box.style.opacity = "0";
  document.body.append(box);
  box.select();
  try {
    return document.execCommand("copy");
  } finally {
    box.remove();
  }
}
