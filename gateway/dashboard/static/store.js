// What the gateway knows, as the page holds it: loaded once, then kept current by events.

import { follow, get } from "./api.js";

const RETRY_MS = 1000;
const MOST_TASKS = 500;
const MOST_DECISIONS = 500;
const SLOW_MS = 10_000; // alerts, days and the gateway's condition
export const RUNNING = new Set(["queued", "running", "submitting"]);

export const state = {
  slots: new Map(), tasks: new Map(), decisions: [], nextDecision: null,
  alerts: [], days: [], gateway: null, skew: 0, link: "connecting", live: false, refused: "", loaded: false,
};
let reloading = false;

const listeners = new Set();
export const onChange = (listener) => listeners.add(listener);
const changed = (what, data) => listeners.forEach((listener) => listener(what, data));

/** The gateway's clock now, in Unix seconds. */
export const now = () => Date.now() / 1000 + state.skew;

export const task = (key) => state.tasks.get(key);

/** Load everything, and try again until it succeeds: a gateway that starts answers 503 for a moment. */
async function reload() {
  if (reloading) return;
  reloading = true;
  for (;;) {
    try {
      await load();
      break;
    } catch (error) {
      failed(error);
      await new Promise((resolve) => setTimeout(resolve, RETRY_MS));
    }
  }
  reloading = false;
}

/** Load everything once. */
export async function load() {
  const [slots, tasks, decisions] = await Promise.all([
    get("/v1/slots"), get(`/v1/tasks?limit=${MOST_TASKS}`), get("/v1/decisions?limit=100"), loadSlow(),
  ]);
  setSlots(slots);
  state.tasks = new Map(tasks.tasks.map((view) => [view.task, view]));
  state.decisions = decisions.decisions;
  state.nextDecision = decisions.next;
  state.refused = "";
  state.loaded = true;
  changed("all");
}

export async function loadMoreDecisions() {
  if (!state.nextDecision) return;
  const page = await get(`/v1/decisions?limit=100&before=${state.nextDecision}`);
  state.decisions.push(...page.decisions);
  state.nextDecision = page.next;
  changed("decisions");
}

export async function loadSlow() {
  const [alerts, days, gateway] = await Promise.all([get("/v1/alerts"), get("/v1/days?days=30"), get("/v1/gateway")]);
  state.alerts = alerts.alerts;
  state.days = days.days;
  state.gateway = gateway;
  state.skew = gateway.now - Date.now() / 1000;
  changed("slow");
}

function setSlots(page) {
  state.slots = new Map(page.slots.map((slot) => {
    const age = slot.last_heartbeat_age_s;
    return [slot.slot, { ...slot, seen_at: age === null ? null : Date.now() / 1000 - age }];
  }));
}

let asking = false, askAgain = false;
export async function reloadSlots() {
  askAgain = true; // what changes while an answer is on its way may not be in it
  if (asking) return;
  asking = true;
  try {
    while (askAgain) {
      askAgain = false;
      setSlots(await get("/v1/slots"));
      changed("slots");
    }
  } finally {
    asking = false;
  }
}

const apply = {
  hello: () => state.loaded || reload(),
  reset: reload,
  lost: reload,
  decision(decision) {
    const known = state.decisions.some((one) => one.task === decision.task && one.decided_at === decision.decided_at);
    if (!known) state.decisions = [decision, ...state.decisions].slice(0, MOST_DECISIONS);
    changed("decisions");
  },
  task(view) {
    const score = state.tasks.get(view.task)?.score ?? null; // events don't carry it
    state.tasks = new Map([[view.task, { ...view, score: view.score ?? score }],
      ...[...state.tasks].filter(([key]) => key !== view.task)].sort((a, b) => b[1].received_at - a[1].received_at));
    reloadSlots().catch(failed);
    if (view.result) loadSlow().catch(failed);
    changed("tasks", view.task);
  },
  slot: () => reloadSlots().then(loadSlow).catch(failed),
  progress(progress) {
    const view = state.tasks.get(progress.task);
    if (view) state.tasks.set(progress.task, { ...view, progress });
    changed("progress", progress);
  },
  heartbeat(beat) {
    const slot = state.slots.get(beat.slot);
    if (!slot || (beat.epoch < (slot.epoch ?? 0) && beat.node !== slot.node)) return; // a standby
    Object.assign(slot, {
      node: beat.node, epoch: beat.epoch, hardware: beat.hardware, gpus: beat.gpus, faults: beat.faults,
      memory_total: beat.memory_total, memory_used: beat.memory_used, version: beat.version, seen_at: Date.now() / 1000,
    });
    if (slot.live !== beat.epoch > 0) reloadSlots().catch(failed);
    changed("heartbeat", beat.slot);
  },
};

/** Whether a slot's node was heard recently. */
export function isLive(slot) {
  const missing = state.gateway?.settings.heartbeat_missing_s ?? 5;
  return slot.seen_at !== null && Date.now() / 1000 - slot.seen_at < missing && slot.epoch > 0;
}

function failed(error) {
  state.refused = error.message;
  changed("link");
}

/** Begin: follow the events, and look at what no event announces now and then. */
export function begin() {
  follow((type, data) => apply[type]?.(data), (text, live, status) => {
    state.link = text;
    state.live = live;
    changed("link", status);
  });
  setInterval(() => state.live && loadSlow().catch(failed), SLOW_MS);
}
