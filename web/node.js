import { app } from "../../scripts/app.js";
import { picturesOfCandidates } from "./finds.js";
import { keptOf, readKept, withCandidate } from "./found.js";
import { allNodes, chain, labelOf, setResult, setWidgets, sourceOf, widgetOf } from "./graph.js";
import { messageParts } from "./message.js";
import { createPanel } from "./panel.js";
import { finish, isRunning } from "./runs.js";
import { text } from "./strings.js";
import { phrases, toggled } from "./words.js";

const HEIGHT = 240;
const MARGIN = 8;
const WIDTH = 360;
const SCORES = new Set(["PEZ_ScorePrompt", "PEZ_ChooseByImage"]);
/** Wires that a run cannot do without, as in the nodes' `REQUIRED`. */
const REQUIRED = { PEZ_ImageToPrompt: ["clip", "images"], PEZ_ExtractStyle: ["clip", "images"] };

/** The live views by node. */
const views = new WeakMap();

/**
 * The live view of a node, if it has one.
 * @param {object} node
 * @returns {NodeView | undefined}
 */
export const viewOf = (node) => views.get(node);

/** What the page has mounted, by execution id. */
const mounted = new Map();

/**
 * Put every live view where the page shows that of an older node with the same id. Nodes 2.0 mounts
 * the element of a widget once, and undo makes new nodes under the old ids.
 */
export function remount() {
  for (const [id, node] of allNodes()) {
    const element = viewOf(node)?.element;
    if (!element) continue;
    const before = mounted.get(id);
    if (before !== element && before?.isConnected) before.replaceWith(element);
    mounted.set(id, element);
  }
}

/** Joins a node, its live view and its kept prompt. */
export class NodeView {
  #node;
  #panel;
  #run = null;
  #changed = [];
  /** @type {import("./finds.js").Find[]} */
  #finds = [];

  /** @param {object} node a new node, before it gets its values from a workflow */
  constructor(node) {
    this.#node = node;
    this.#panel = createPanel({
      onFinish: () => finish(this.#run),
      onToggle: (word) => this.#toggle(word),
      onKeep: () => this.#keep(keptOf(this.#run)),
      onPick: (k, choice) => this.#keep(withCandidate(this.#keptText(), k, choice)),
      onFind: (k) => this.#keep(this.#finds[k].kept),
    });
    this.#addWidget();
    this.#hideKept();
    for (const name of ["keep", "block"]) {
      const widget = widgetOf(node, name);
      if (widget) chain(widget, "callback", () => this.refresh());
    }
    chain(node, "onConfigure", (saved) => {
      this.#findKept(saved);
      this.refresh();
    });
    chain(node, "onConnectionsChange", () => this.refresh());
    views.set(node, this);
    this.refresh();
  }

  get element() {
    return this.#panel.element;
  }

  /**
   * Show a run, and keep its result.
   * @param {import("./runs.js").Run} run
   */
  show(run) {
    this.#run = run;
    if (run.kept !== null) {
      // a kept prompt is what the widget has already, and may have become by an edit
      if (run.state !== "kept") setResult(this.#node, "kept", run.kept);
      run.kept = null; // opening the workflow again must not overwrite later changes
      this.#changed = run.changed;
    }
    this.refresh();
  }

  /**
   * Name the inputs that changed since the kept prompt was learned.
   * @param {string[]} names
   */
  setChanged(names) {
    this.#changed = names;
    this.refresh();
  }

  /**
   * Offer what the node has learned before.
   * @param {import("./finds.js").Find[]} finds
   */
  setFinds(finds) {
    this.#finds = finds;
    this.refresh();
  }

  /** Show the present state. */
  refresh() {
    const kept = this.#kept();
    this.#panel.update({
      step: 0,
      steps: 0,
      secondsLeft: null,
      ...this.#base(),
      pictures: (found) => picturesOfCandidates(this.#finds, found),
      message: this.#message(),
      missing: this.#missing().map((name) => labelOf(this.#node, name)),
      changed: this.#changed.map((name) => labelOf(this.#node, name)),
      blocked: this.#blocked(),
      keep: this.#keeps() && kept !== null,
      canPick: kept !== null && this.#canSwitch(),
      canKeep: this.#canKeep(),
      finds: this.#canSwitch() ? this.#finds : [],
      scores: SCORES.has(this.#node.comfyClass),
    });
  }

  #keptText() {
    return widgetOf(this.#node, "kept")?.value;
  }

  #kept() {
    return readKept(this.#keptText());
  }

  /**
   * Find the kept prompt of a saved node where the order of its widgets differs: another pack may
   * have put its own before it, on this computer or on the one that saved the workflow.
   */
  #findKept(saved) {
    const widget = widgetOf(this.#node, "kept");
    if (!widget) return;
    const stored = this.#node.properties.pez_kept; // by the server, which knows no order
    delete this.#node.properties.pez_kept;
    const values = Object.values(saved.widgets_values ?? []);
    const text = readKept(stored) ? stored : !this.#kept() && values.find((one) => readKept(one));
    if (text) widget.value = text;
  }

  /** Keep a prompt that a person has chosen. */
  #keep(kept) {
    setWidgets(this.#node, { kept, keep: true });
    this.refresh();
  }

  /** Whether the panel shows the best of a run that was cancelled or has failed. */
  #canKeep() {
    const run = this.#run;
    const early = run?.state === "cancelled" || run?.state === "failed";
    return early && this.#canSwitch() && !this.#keeps() && keptOf(run) !== "";
  }

  #keeps() {
    return sourceOf(this.#node, "keep")?.value === true;
  }

  /** Whether `keep` is a switch here, and no wire. */
  #canSwitch() {
    return sourceOf(this.#node, "keep") !== undefined;
  }

  /** A search that runs comes first, then the prompt that the node would give. */
  #base() {
    const run = this.#run;
    if (run && isRunning(run)) return run;
    const kept = this.#kept();
    if (kept && this.#keeps()) return { state: "kept", items: kept };
    const ended = run?.state === "done" || run?.state === "finished" || run?.state === "kept";
    if (run && !ended && run.items.length) return run;
    if (kept) {
      const same = ended && run.items[0]?.prompt === kept[0].prompt;
      return same ? { ...run, items: kept } : { state: "stored", items: kept };
    }
    return ended || run?.state === "failed" ? run : { state: "idle", items: [] };
  }

  #missing() {
    const { comfyClass, inputs } = this.#node;
    const unwired = (name) => inputs?.find((one) => one.name === name)?.link == null;
    return (REQUIRED[comfyClass] ?? ["clip"]).filter(unwired);
  }

  #message() {
    return this.#run?.state === "failed" ? messageParts(this.#node, this.#run.message) : [];
  }

  /** Blocked words in lower case, if this node can block any. */
  #blocked() {
    const widget = sourceOf(this.#node, "block");
    if (!widget) return null;
    return new Set(phrases(String(widget.value ?? "")).map((word) => word.toLowerCase()));
  }

  #toggle(word) {
    const { value } = sourceOf(this.#node, "block");
    setWidgets(this.#node, { block: toggled(String(value ?? ""), word) });
  }

  #addWidget() {
    const widget = this.#node.addDOMWidget("pez_live", "pez_live", this.#panel.element, {
      serialize: false, // not into the prompt that is queued
      hideOnZoom: false,
      margin: MARGIN,
      getMinHeight: () => HEIGHT + 2 * MARGIN,
    });
    widget.label = text("live"); // for App Mode
    // In the workflow it has a place without a value: the page would give the values of widgets
    // behind it, which other packs add, to the wrong ones.
    const [width, height] = this.#node.size;
    this.#node.setSize([Math.max(width, WIDTH), height + HEIGHT + 2 * MARGIN]);
    this.#panel.scroll.addEventListener("wheel", forwardWheel, { passive: false });
  }

  #hideKept() {
    const widget = widgetOf(this.#node, "kept");
    if (!widget) return;
    widget.hidden = true; // for the canvas
    widget.options.hidden = true; // for Nodes 2.0
    // a prompt that is stored but not given must not change what is queued, or nothing is cached
    widget.serializeValue = () => (this.#keeps() || !this.#canSwitch() ? widget.value : "");
  }
}

/** The wheel zooms the canvas over a view that has nothing to scroll. */
function forwardWheel(event) {
  const { scrollHeight, clientHeight } = event.currentTarget;
  if (scrollHeight > clientHeight && !event.ctrlKey) {
    event.stopPropagation();
    return;
  }
  event.preventDefault();
  event.stopPropagation();
  app.canvas.processMouseWheel(event);
}
