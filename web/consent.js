import { widgetOf } from "./graph.js";
import { post } from "./runs.js";

/**
 * Tell the server that a person wants a model downloaded, when they switch `download` on by hand.
 * Workflows set widgets without a call of their callbacks, so one that comes with `download` on
 * starts nothing.
 * @param {object} node a PEZ Load CLIP
 */
export function followConsent(node) {
  const download = widgetOf(node, "download");
  const model = widgetOf(node, "model");
  if (!download || !model) return;
  let byHand = false; // since then; another model may be chosen after the switch
  onChange(download, (value) => {
    byHand = value === true;
    if (byHand) agree(model.value);
  });
  onChange(model, (value) => {
    if (byHand && download.value === true) agree(value);
  });
}

/** Call `then` with the value, behind whatever the widget calls already. */
function onChange(widget, then) {
  const before = widget.callback;
  widget.callback = function (value, ...rest) {
    const result = before?.call(this, value, ...rest);
    then(value);
    return result;
  };
}

function agree(model) {
  // without an answer the run tells what to do
  post("/pez/agree", { model: String(model) }).catch(() => {});
}
