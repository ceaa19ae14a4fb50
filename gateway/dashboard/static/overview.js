// The first page: what needs you, both slots, the newest offers and results.

import { get, post, token } from "./api.js";
import { RunChart, TRAINING_LOSS } from "./charts.js";
import { bar, facts, h, show } from "./dom.js";
import { duration, gigabytes, moment, number, percent, whole } from "./format.js";
import { decisionRow } from "./offers.js";
import { daysChart, resultsTable } from "./results.js";
import { isLive, now, reloadSlots, state, task } from "./store.js";

export const FILLED_MS = 3000; // after a restart a gateway reads what it missed
const answers = new Map(); // by slot: what became of an operator's request
const charts = new Map(); // by task, of the running ones

export function overview(main) {
  const alerts = h("section", { class: "card", "aria-labelledby": "alerts-title" });
  const slots = h("div", { class: "cards" });
  const offers = h("section", { class: "card", "aria-labelledby": "offers-title" });
  const results = h("section", { class: "card", "aria-labelledby": "results-title" });
  main.replaceChildren(h("h2", { class: "skip" }, "Overview"), alerts, slots, h("div", { class: "cards" }, offers, results));
  const draw = () => {
    show(alerts, h("h2", { id: "alerts-title" }, "What needs you"), alertList());
    show(slots, [...state.slots.values()].map(slotCard));
    mountCharts(slots);
    show(offers, h("h2", { id: "offers-title" }, "Newest offers"),
      state.decisions.length ? h("div", {}, state.decisions.slice(0, 6).map(decisionRow)) : h("p", { class: "dim" }, "No offer yet."));
    show(results, h("h2", { id: "results-title" }, "Results"), daysChart(), resultsTable(6));
  };
  draw();
  return (what, data) => {
    if (what === "progress") charts.get(data.task)?.push(data);
    if (what === "all") setTimeout(() => charts.clear(), FILLED_MS);
    draw();
  };
}

function alertList() {
  if (!state.alerts.length) return h("p", { class: "good" }, "Nothing. All slots are live, and no job is in danger.");
  return h("ul", { class: "alerts" }, state.alerts.map((alert) => h("li", {},
    h("span", { class: `badge ${alert.level === "error" ? "bad" : "warn"}` }, alert.level), " ",
    alert.task ? h("a", { href: `#/task/${encodeURIComponent(alert.task)}` }, alert.what) : alert.what,
    h("div", { class: "dim" }, alert.do))));
}

function slotCard(slot) {
  const live = isLive(slot), view = slot.task ? task(slot.task) : null;
  const age = slot.seen_at === null ? "never seen" : `last seen ${duration(Date.now() / 1000 - slot.seen_at)} ago`;
  return h("section", { class: "card", "aria-labelledby": `slot-${slot.slot}`, id: `card-${slot.slot}` },
    h("h2", { id: `slot-${slot.slot}` }, `Slot ${slot.slot} `,
      h("span", { class: `badge ${live ? "good" : "bad"}` }, live ? slot.state : `no node: ${age}`), " ",
      slot.drain ? h("span", { class: "badge warn" }, slot.state === "free" ? "drained" : "draining") : null),
    facts([["node", slot.node], ["hardware", slot.hardware ? hardwareName(slot.hardware) : ""],
      ["drained", slot.drain ? `${moment(slot.drain.at)}: ${slot.drain.reason}` : ""]]),
    devices(slot, live),
    view ? running(view) : h("p", { class: "dim" }, slot.state === "reserved" ? "Reserved for a job whose data comes later." : "No job."),
    slotActions(slot));
}

/** What an operator with a token may do to a slot. */
function slotActions(slot) {
  if (!token()) return null;
  const button = slot.drain
    ? h("button", { type: "button", onclick: () => act(slot.slot, "resume", `Let slot ${slot.slot} get jobs again?`) }, `Resume slot ${slot.slot}`)
    : h("button", { type: "button", onclick: () => act(slot.slot, "drain", `Give slot ${slot.slot} no new job? The job that it has is seen through.`) }, `Drain slot ${slot.slot}`);
  return h("p", { class: "row" }, button, h("span", { role: "status" }, answers.get(slot.slot) ?? ""));
}

async function act(name, operation, question) {
  if (!confirm(question)) return;
  answers.set(name, `${operation} was sent`);
  try {
    await post(`/v1/slots/${encodeURIComponent(name)}/${operation}`, { reason: "requested on the dashboard" });
    answers.set(name, operation === "drain" ? "drained: it gets no new job" : "it may get jobs");
  } catch (error) {
    answers.set(name, error.message);
  }
  await reloadSlots().catch(() => {});
}

export function hardwareName({ device, count, memory_bytes }) {
  return device === "cpu" ? `${count} CPU core${count === 1 ? "" : "s"}` : `${count}x ${device} ${Math.round(memory_bytes / 2 ** 30)} GB`;
}

/** How busy and full the devices are; nothing while the node is silent, as it would be old. */
function devices(slot, live) {
  if (!live) return null;
  const rows = slot.gpus.map((gpu) => {
    const more = [gpu.temperature_c !== null && `${Math.round(gpu.temperature_c)} \u00b0C`, gpu.power_w !== null && `${Math.round(gpu.power_w)} W`];
    const memory = `${percent(gpu.utilization)}, ${gigabytes(gpu.memory_used)} of ${gigabytes(gpu.memory_total)}`;
    return h("div", { class: "meter" }, h("span", {}, `GPU ${gpu.index}`), bar(gpu.utilization ?? gpu.memory_used / gpu.memory_total),
      h("span", {}, [memory, ...more.filter(Boolean)].join(", ")));
  });
  if (slot.memory_total)
    rows.push(h("div", { class: "meter" }, h("span", {}, "Memory"), bar(slot.memory_used / slot.memory_total),
      h("span", {}, `${gigabytes(slot.memory_used)} of ${gigabytes(slot.memory_total)}`)));
  return h("div", {}, rows);
}

function running(view) {
  const { progress } = view;
  return h("div", {},
    h("h3", {}, h("a", { href: `#/task/${encodeURIComponent(view.task)}` }, view.task)),
    progressBar(view),
    facts([
      ["model", view.model], ["state", progress ? `${view.state}: ${progress.phase}` : view.state],
      ["time left", timeLeft(view)],
      ["loss", progress && progress.loss !== null ? `${number(progress.loss)} (base ${number(progress.base_loss)}, held-out ${number(progress.dev_loss)})` : ""],
      ["speed", progress?.tokens_per_s ? `${whole(progress.tokens_per_s)} tokens/s, step ${whole(progress.step)}` : ""],
      ["attempt", view.attempts > 1 ? String(view.attempts) : ""],
    ]),
    placeOf(view.task));
}

export function progressBar(view) {
  const share = view.progress?.progress ?? 0;
  return h("div", { class: "row" },
    h("progress", { max: 1, value: share, "aria-label": `training of ${view.task}` }), h("span", {}, percent(share)));
}

export function timeLeft(view) {
  if (!view.deadline_at || view.result) return "";
  const left = view.deadline_at - now();
  const eta = view.progress?.eta_s ? `; training ends in ${duration(view.progress.eta_s)}` : "";
  return left > 0 ? `${duration(left)} to the deadline${eta}` : h("span", { class: "bad" }, `${duration(-left)} after the deadline`);
}

/** The place of a running task's chart. The drawing of a card never touches what is in it. */
const placeOf = (key) => h("div", { class: "chart", "data-keep": `chart-${key}`, "data-task": key });

/** Put a chart into each place that has none: the run's course so far, then each event. */
function mountCharts(slots) {
  for (const place of slots.querySelectorAll("[data-task]")) {
    const key = place.dataset.task, known = charts.get(key);
    if (known?.node && !place.contains(known.node)) place.replaceChildren(known.node);
    if (known) continue;
    charts.set(key, { push() {} }); // asked for once
    get(`/v1/tasks/${encodeURIComponent(key)}/progress?points=600`)
      .then((course) => charts.set(key, new RunChart(course, { height: 200, label: TRAINING_LOSS })))
      .catch(() => charts.delete(key));
  }
}
