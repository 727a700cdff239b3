import { api } from "../../scripts/api.js";
import { readFound } from "./found.js";
import { rootGraph } from "./graph.js";

/**
 * The last run of a node.
 * @typedef {object} Run
 * @property {string | null} workflow
 * @property {string} node execution id
 * @property {string | null} prompt id of the queued prompt
 * @property {string} state
 * @property {number} step
 * @property {number} steps
 * @property {number | null} secondsLeft
 * @property {boolean} moreFollows that is the time of a part, behind which another one comes
 * @property {string | null} phase what takes the time before the first step
 * @property {import("./found.js").Found[]} items
 * @property {string} message of an error, "" without one
 * @property {string[]} changed inputs that changed since the prompts were kept
 * @property {Record<string, string>} inputs digests of the inputs, of a run that ended too early
 * @property {string | null} kept text for the widget `kept`, if the run brought one
 * @property {number} heard when the server last spoke of it
 */

const PHASES = new Set(["loadingWords", "reading"]);
const RUNNING = new Set(["starting", "running", "finishing"]);
const SILENCE = 4000; // milliseconds after which the server is asked; a large CLIP loads longer
const MOST_RUNS = 200;
const REMEMBERED = "pez.running"; // in the tab's session storage

/** @type {Map<string, Run>} */
const runs = new Map();
let changed = () => {};
let introduced = null;

/** @param {Run} run */
export const isRunning = (run) => RUNNING.has(run.state);

/** @param {Run} run */
export const belongsToOpenWorkflow = (run) =>
  !run.workflow || !rootGraph()?.id || run.workflow === rootGraph().id;

/** The runs that the open workflow shows. */
export const runsOfOpenWorkflow = () => [...runs.values()].filter(belongsToOpenWorkflow);

/**
 * Follow what the server tells, for all workflows that may be open.
 * @param {(run: Run) => void} onChange
 */
export async function followRuns(onChange) {
  changed = onChange;
  api.addEventListener("pez.live", ({ detail }) => accept(fromEvent(detail)));
  api.addEventListener("executed", ({ detail }) => acceptResult(detail));
  api.addEventListener("status", introduce);
  api.addEventListener("reconnected", () => {
    introduced = null; // the server may have started anew
    introduce();
    catchUp();
  });
  recall();
  introduce();
  setInterval(listenAgain, SILENCE / 2);
  await catchUp();
}

/**
 * End a node's search with the best so far.
 * @param {Run} run
 */
export async function finish(run) {
  accept({ ...run, state: "finishing" });
  await post("/pez/finish", { node: run.node, prompt_id: run.prompt }).catch(() => accept(run));
}

/**
 * Ask the server in JSON.
 * @param {string} route
 * @param {object} body
 */
export async function post(route, body) {
  const headers = { "Content-Type": "application/json" };
  return await json(route, { method: "POST", headers, body: JSON.stringify(body) });
}

async function json(route, options) {
  const response = await api.fetchApi(route, options);
  if (!response.ok) throw new Error(`${route}: ${response.status}`);
  return await response.json();
}

const keyOf = (run) => `${run.workflow ?? ""}/${run.node}`;

function accept(run) {
  runs.delete(keyOf(run)); // so that the newest is the last
  runs.set(keyOf(run), run);
  if (runs.size > MOST_RUNS) runs.delete(runs.keys().next().value);
  remember();
  changed(run);
}

function fromEvent(event) {
  return {
    workflow: event.workflow ?? null,
    node: String(event.node),
    prompt: event.prompt_id ?? null,
    state: event.state,
    step: event.step ?? 0,
    steps: event.steps ?? 0,
    secondsLeft: event.seconds_left ?? null,
    moreFollows: event.more_follows === true,
    phase: PHASES.has(event.phase) ? event.phase : null,
    items: readFound(event.items),
    message: typeof event.message === "string" ? event.message : "",
    changed: [],
    inputs: event.inputs ?? {},
    kept: null,
    heard: Date.now(),
  };
}

function fromResult(result, node, prompt, workflow) {
  const run = fromEvent({ ...result, node, prompt_id: prompt, workflow });
  const before = runs.get(keyOf(run));
  const { step, steps } = before?.prompt === prompt ? before : run;
  return {
    ...run,
    step,
    steps,
    changed: result.changed ?? [],
    kept: typeof result.kept === "string" ? result.kept : null,
  };
}

async function acceptResult({ node, display_node, prompt_id, output }) {
  const result = output?.pez?.[0];
  if (!result) return;
  const workflow = await workflowOf(prompt_id);
  accept(fromResult(result, String(display_node ?? node), prompt_id, workflow));
}

/** Results do not say which workflow they belong to, and another one may be open by now. */
async function workflowOf(prompt) {
  const known = [...runs.values()].find((run) => run.prompt === prompt);
  if (known) return known.workflow;
  const queued = (await queuedPrompt(prompt)) ?? (await endedPrompt(prompt))?.prompt;
  return queued?.[3]?.extra_pnginfo?.workflow?.id ?? null;
}

async function queuedPrompt(prompt) {
  const queue = await json("/queue").catch(() => null);
  const all = [...(queue?.queue_running ?? []), ...(queue?.queue_pending ?? [])];
  return all.find(([, id]) => id === prompt);
}

async function endedPrompt(prompt) {
  const history = await json(`/history/${encodeURIComponent(prompt)}`).catch(() => null);
  return history?.[prompt];
}

/** Tell the server who shows its events, as soon as the page has a name. */
async function introduce() {
  const name = api.clientId;
  if (!name || name === introduced) return;
  introduced = name;
  await post("/pez/live", { client_id: name }).catch(() => (introduced = null));
}

async function listenAgain() {
  const silent = (run) => isRunning(run) && Date.now() - run.heard > SILENCE;
  if ([...runs.values()].some(silent)) await catchUp();
}

/** Ask the server for what went by unheard, such as runs that another page has started. */
export async function catchUp() {
  const events = await json("/pez/live").catch(() => null);
  if (!events) return; // the server is away; `reconnected` comes back here
  const live = events.filter((event) => event.workflow).map(fromEvent);
  live.forEach(accept);
  const still = new Set(live.map(keyOf));
  const gone = [...runs.values()].filter((run) => isRunning(run) && !still.has(keyOf(run)));
  await Promise.all(gone.map(learnTheEnd));
}

async function learnTheEnd(run) {
  const ended = await endedPrompt(run.prompt);
  // the history has the result once the nodes behind this one are done too
  if (!ended && (await queuedPrompt(run.prompt))) return;
  if (runs.get(keyOf(run)) !== run) return; // it was heard of meanwhile
  const result = ended?.outputs?.[run.node]?.pez?.[0];
  if (result) accept(fromResult(result, run.node, run.prompt, run.workflow));
  else accept({ ...run, ...endWithoutResult(ended, run.node) });
}

/** State and message of a run that failed or was cancelled, out of the history. */
function endWithoutResult(ended, node) {
  const messages = new Map(ended?.status?.messages ?? []);
  const error = messages.get("execution_error");
  if (String(error?.node_id) !== node) return { state: "cancelled" };
  return { state: "failed", message: String(error.exception_message).trim() };
}

/** What runs is remembered over a reload, for its result may come while the page is away. */
function remember() {
  const running = [...runs.values()].filter(isRunning);
  const brief = running.map(({ workflow, node, prompt }) => ({ workflow, node, prompt }));
  sessionStorage.setItem(REMEMBERED, JSON.stringify(brief));
}

function recall() {
  for (const { prompt, ...run } of JSON.parse(sessionStorage.getItem(REMEMBERED) ?? "[]"))
    runs.set(keyOf(run), fromEvent({ ...run, prompt_id: prompt, state: "starting" }));
}
