import { api } from "../../scripts/api.js";
import { app } from "../../scripts/app.js";
import { bringDrawings } from "./drawings.js";
import { earlierFinds } from "./finds.js";
import { followConsent } from "./consent.js";
import { changedInputs } from "./fresh.js";
import { allNodes, findNode } from "./graph.js";
import { NodeView, remount, viewOf } from "./node.js";
import { followProblems } from "./problems.js";
import { loadRenames, updateOnLoad, updatePromoted } from "./renames.js";
import { belongsToOpenWorkflow, catchUp, followRuns, runsOfOpenWorkflow } from "./runs.js";
import { translateWidgets } from "./strings.js";

const NODES = new Set([
  "PEZ_ImageToPrompt",
  "PEZ_ExtractStyle",
  "PEZ_DistillPrompt",
  "PEZ_ConcatPrompts",
  "PEZ_ScorePrompt",
  "PEZ_ChooseByImage",
]);
const QUIET = 600; // milliseconds without a change, before the server is asked what changed

let waiting;
let asked = 0;
let askedFinds = 0;

app.registerExtension({
  name: "PEZ.LiveView",

  async init() {
    const link = document.createElement("link");
    link.rel = "stylesheet";
    link.href = new URL("./pez.css", import.meta.url).href;
    document.head.append(link);
    await loadRenames();
  },

  beforeRegisterNodeDef(nodeType, definition) {
    if (!definition.name.startsWith("PEZ_")) return;
    updateOnLoad(nodeType);
    translateWidgets(definition);
  },

  async beforeConfigureGraph(workflow) {
    updatePromoted(workflow);
    await bringDrawings(workflow);
  },

  nodeCreated(node) {
    if (NODES.has(node.comfyClass)) new NodeView(node);
    if (node.comfyClass === "PEZ_LoadCLIP") followConsent(node);
    if (node.comfyClass?.startsWith("PEZ_")) foldAdvanced(node);
  },

  afterConfigureGraph() {
    remount();
    runsOfOpenWorkflow().forEach(show);
    catchUp();
    compareSoon();
    offerFinds();
  },

  async setup() {
    api.addEventListener("graphChanged", compareSoon);
    api.addEventListener("status", offerFinds); // the history is written after the run's own end
    followProblems((node) => node.comfyClass?.startsWith("PEZ_") && !viewOf(node));
    await followRuns((run) => {
      if (!belongsToOpenWorkflow(run)) return; // shown when that workflow is opened
      show(run);
      if (run.state === "done" || run.state === "finished") compareSoon();
    });
  },
});

/**
 * Nodes 2.0 folds what the schema calls advanced. The classic renderer has "Show Advanced" in the
 * node's menu for widgets with a mark of its own, but leaves their room empty unless they are hidden.
 */
function foldAdvanced(node) {
  const advanced = node.widgets?.filter((one) => one.options?.advanced && !one.hidden) ?? [];
  for (const widget of advanced) {
    widget.advanced = true;
    Object.defineProperty(widget, "hidden", { get: () => !node.showAdvanced, set() {} });
  }
  const [width, height] = node.computeSize();
  if (advanced.length) node.setSize([Math.max(node.size[0], width), height]);
}

/** @param {import("./runs.js").Run} run */
function show(run) {
  viewOf(findNode(run.node) ?? {})?.show(run);
}

async function offerFinds() {
  const question = ++askedFinds;
  const all = await earlierFinds();
  if (question !== askedFinds) return; // another answer is on its way
  for (const [node, finds] of all) viewOf(node)?.setFinds(finds);
}

function compareSoon() {
  clearTimeout(waiting);
  waiting = setTimeout(compare, QUIET);
}

async function compare() {
  // a subgraph may show a widget of the node inside of it, which hears nothing of a change
  for (const [, node] of allNodes()) viewOf(node)?.refresh();
  const question = ++asked;
  const changed = await changedInputs();
  if (question !== asked) return; // another answer is on its way
  for (const [node, names] of changed) viewOf(node)?.setChanged(names);
}
