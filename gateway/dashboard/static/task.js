// A task's whole story: offer, decision, plan, attempts, curves, messages, submission.

import { get, post, token } from "./api.js";
import { RunChart, TRAINING_LOSS, trialsOf } from "./charts.js";
import { facts, h, show, table } from "./dom.js";
import { clockTime, duration, moment, number, shortDigest, whole } from "./format.js";
import { termBars } from "./offers.js";
import { FILLED_MS, progressBar, timeLeft } from "./overview.js";
import { lossOf, rankOf, spareOf } from "./results.js";
import { RUNNING, task } from "./store.js";

const POINTS = 10_000;

export function taskPage(main, key) {
  const head = h("section", { class: "card", "aria-labelledby": "task-title" });
  const curves = h("section", { class: "card", "aria-labelledby": "curves-title" });
  const story = h("div", { class: "stack" });
  const said = h("section", { class: "card", "aria-labelledby": "said-title" });
  main.replaceChildren(head, curves, story, said);
  const page = { key, head, curves, story, said, records: null, course: null, charts: [], answer: "" };
  read(page).catch((error) => show(head, h("h2", {}, key), h("p", { class: "bad" }, error.message)));
  return (what, data) => {
    if (!page.records) return;
    if (what === "progress" && data.task === key) grow(page, data);
    if (what === "tasks" && data === key) read(page, false).catch(() => {});
    if (what === "all") setTimeout(() => page.head.isConnected && read(page).catch(() => {}), FILLED_MS);
    drawHead(page);
  };
}

async function read(page, also_course = true) {
  const path = `/v1/tasks/${encodeURIComponent(page.key)}`;
  page.records = await get(`${path}/story`);
  if (also_course) {
    page.course = await get(`${path}/progress?points=${POINTS}`);
    if (page.charts.length) page.charts.forEach((chart) => chart.renew(page.course));
    else page.charts = [new RunChart(page.course, { label: TRAINING_LOSS }),
      new RunChart(page.course, { field: "lr", label: "learning rate", height: 160 })];
    show(page.curves, h("h2", { id: "curves-title" }, "Curves"), page.charts.map((chart) => chart.node),
      h("p", { class: "dim" }, "Drag to zoom, double-click to see all. Dashed lines are the trials of the profile auto."));
  }
  drawHead(page);
  drawStory(page);
  drawSaid(page);
}

function grow(page, progress) {
  if (progress.message)
    page.course.messages.push({ at: progress.at, phase: progress.phase, step: progress.step, text: progress.message });
  page.charts.forEach((chart, index) => {
    if (index === 0) chart.push(progress); // both share the columns: the first adds the point
    else chart.timer ??= setTimeout(() => { chart.timer = null; chart.draw(); }, 600);
  });
  if (progress.message) drawSaid(page);
}

function drawHead(page) {
  const view = task(page.key) ?? page.records.now;
  const { progress, result } = view;
  show(page.head,
    h("h2", { id: "task-title" }, `${view.task_id} `, h("span", { class: `badge ${badge(view)}` }, view.state)),
    result ? null : progressBar(view),
    facts([
      ["slot", view.slot], ["model", view.model], ["time left", timeLeft(view)],
      ["phase", progress && !result ? `${progress.phase}, step ${whole(progress.step)}, ${whole(progress.tokens_per_s)} tokens/s` : ""],
      ["loss", !result && progress && progress.loss !== null ? `${number(progress.loss)}, held-out ${number(progress.dev_loss)}, base ${number(progress.base_loss)}` : ""],
      ["held-out loss", result ? lossOf(result) : ""],
      ["spare time", result ? spareOf(result) : ""], ["upstream's rank", result ? rankOf(page.records.now.score) : ""],
      ["damaged", view.damaged], ["artifact", result?.artifact], ["reason", result?.reason === result?.status ? "" : result?.reason], ["digest", result?.digest],
    ]),
    actions(page, view));
}

const badge = (view) => (view.state === "submitted" ? "good" : RUNNING.has(view.state) ? "" : "bad");

function actions(page, view) {
  if (view.result) return null;
  if (!token()) return h("p", { class: "dim" }, "To cancel or requeue this task enter a token (button at the top).");
  return h("div", {}, h("p", { class: "row" },
    h("button", { type: "button", class: "danger", onclick: () => act(page, "cancel", "End this task as cancelled? It can't be undone.") }, "Cancel task"),
    h("button", { type: "button", onclick: () => act(page, "requeue", "End the worker and restart from the newest checkpoint?") }, "Requeue")),
  h("p", { role: "status" }, page.answer));
}

async function act(page, operation, question) {
  if (!confirm(question)) return;
  page.answer = `${operation} was sent`;
  drawHead(page);
  try {
    const view = await post(`/v1/tasks/${encodeURIComponent(page.key)}/${operation}`, { reason: "requested on the dashboard" });
    page.answer = `${operation}: done, the task is ${view.state}`;
  } catch (error) {
    page.answer = error.message;
  }
  drawHead(page);
}

function drawStory(page) {
  const { now, job, reservation, chain } = page.records;
  const offer = job?.offer ?? reservation?.offer;
  const offered = h("section", { class: "card", "aria-labelledby": "offer-title" }, h("h2", { id: "offer-title" }, "Offer"), facts([
    ["type", offer?.task_type], ["model", offer?.model], ["time to complete", offer ? duration(3600 * offer.hours_to_complete) : ""],
    ["data", job?.offer.dataset.split("?")[0]], ["format", job?.offer.file_format],
    ["columns", job ? h("code", {}, columnsOf(job.offer.dataset_type)) : ""],
    ["received", moment(now.received_at)], ["deadline", moment(now.deadline_at)], ["gateway", job?.gateway],
  ]));
  const decided = h("section", { class: "card", "aria-labelledby": "decision-title" }, h("h2", { id: "decision-title" }, "Decision"),
    h("p", {}, now.decision.reason), termBars(now.decision));
  show(page.story,
    h("div", { class: "cards" }, h("div", { class: "stack" }, offered, result(now)), decided),
    h("section", { class: "card", "aria-label": "Records" }, table("Attempts and records", ["stored", "record", "node", "what"],
      chain.map(({ stored, record }) => [stored ? moment(Date.parse(stored) / 1000) : moment(record.at), record.kind, record.node ?? "",
        h("td", { class: "wide" }, detail(record))]), "No node has claimed it yet.")));
}

function columnsOf(columns) {
  return Object.entries(columns).filter(([, value]) => value !== null).map(([name, value]) => `${name}: ${value}`).join(", ");
}

function detail(record) {
  if (record.kind === "claimed") return `attempt ${record.attempt} from step ${record.step}, lease epoch ${record.epoch}`;
  if (record.kind === "submitting") return `digest ${shortDigest(record.digest)}`;
  if (record.kind === "moved") return `off slot ${record.slot}: ${record.reason}`;
  return [...new Set([record.status, record.code, record.reason])].filter(Boolean).join(": ");
}

function result(now) {
  const metrics = now.result?.metrics;
  if (!metrics) return null;
  return h("section", { class: "card", "aria-labelledby": "measured-title" }, h("h2", { id: "measured-title" }, "Measured"), facts([
    ["held-out loss", lossOf(now.result)], ["rows", `${whole(metrics.train_examples)} trained, ${whole(metrics.dev_examples)} held out`],
    ["dropped", Object.entries(metrics.dropped_rows).map(([why, count]) => `${count}: ${why}`).join("; ")],
    ["steps", whole(metrics.steps)], ["tokens", `${whole(metrics.tokens)}, ${number(metrics.epochs, 2)} epochs`],
    ["speed", `${whole(metrics.tokens_per_s)} tokens/s`], ["resumes", String(metrics.resumes)],
    ["skipped steps", metrics.skipped_steps ? String(metrics.skipped_steps) : ""], ["submission", metrics.kind],
  ]));
}

const NUMBERS = "the plan in numbers: "; // shared/planning/plan.py writes it
const isPlan = ({ text }) => text.startsWith("plan: ");
const isNumbers = ({ text }) => text.startsWith(NUMBERS);
const numbersIn = ({ text }) => text.slice(NUMBERS.length).split(" ").map((pair) => pair.replaceAll("_", " ").split("="));
const counted = (count, noun) => `${count} ${noun}${count === 1 ? "" : "s"}`;

function drawSaid(page) {
  const { course } = page;
  const trials = trialsOf(course);
  const plan = course.messages.filter(isPlan), numbers = course.messages.findLast(isNumbers);
  const log = course.messages.filter((message) => !isPlan(message) && !isNumbers(message));
  show(page.said, h("h2", { id: "said-title" }, "Log"),
    trials.length ? table("Trials of the profile auto", ["trial", "what", "outcome"],
      trials.map(({ name, what, outcome }) => [name, h("td", { class: "wide" }, what), outcome]), "") : h("p", { class: "dim" }, "One training run, no trials."),
    h("details", {}, h("summary", {}, `Plan: ${counted(plan.length, "deviation")} from the profile`),
      numbers ? facts(numbersIn(numbers)) : "", h("ul", {}, plan.map(({ text }) => h("li", {}, text.slice(6))))),
    h("details", {}, h("summary", {}, `Held-out loss: ${counted(course.development.length, "measurement")}`),
      table("Held-out loss", ["time", "step", "loss"], course.development.map((point) => [moment(point.at), whole(point.step), number(point.loss, 4)]), "None yet.")),
    h("div", { class: "log", tabindex: "0", role: "log", "aria-label": "messages of the run" },
      log.length ? log.slice(-500).map(({ at, phase, step, text }) => h("p", {},
        h("span", { class: "dim" }, clockTime(at)), h("span", {}, phase), h("span", { class: "dim" }, step ? `step ${step}` : ""), h("span", {}, text)))
        : h("p", { class: "dim" }, "The run has said nothing yet.")));
}
