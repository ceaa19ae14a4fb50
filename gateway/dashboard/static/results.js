// Results of tasks, and how they went day by day.

import { h, show, table } from "./dom.js";
import { duration, number, percent, whole } from "./format.js";
import { RUNNING, now, state } from "./store.js";

const DAYS = 30, DAY_S = 86_400;
const RANKS = { 3: "first place", 0: "valid", "-1": "not valid" };

export function results(main) {
  const days = h("section", { class: "card", "aria-labelledby": "days-title" });
  const list = h("section", { class: "card", "aria-label": "Results" });
  main.replaceChildren(days, list);
  const draw = () => {
    show(days, h("h2", { id: "days-title" }, "The last 30 days"), daysChart(), daysTable());
    show(list, resultsTable(500, true));
  };
  draw();
  return draw;
}

/** The newest results; `details` adds the column that needs a whole page's width. */
export function resultsTable(most, details = false) {
  const ended = [...state.tasks.values()].filter((view) => !RUNNING.has(view.state) && view.result).slice(0, most);
  return table("Ended tasks, newest first", ["task", "result", "held-out loss", "spare time", "rank", details && "artifact or reason"].filter(Boolean),
    ended.map((view) => [
      h("a", { href: `#/task/${encodeURIComponent(view.task)}` }, view.task),
      h("span", { class: `badge ${view.state === "submitted" ? "good" : "bad"}` }, view.state),
      lossOf(view.result), spareOf(view.result), rankOf(view.score),
      ...(details ? [h("td", { class: "wide" }, view.result.artifact ?? view.result.reason)] : []),
    ]), "No task has ended yet.");
}

export function lossOf({ metrics }) {
  return metrics ? `${number(metrics.base_loss)} -> ${number(metrics.final_loss)}` : "-";
}

export function spareOf({ deadline_margin_s: spare }) {
  if (spare === null) return "-";
  return spare >= 0 ? duration(spare) : h("span", { class: "bad" }, `${duration(-spare)} late`);
}

export const rankOf = (score) => (score ? RANKS[score.quality_score] ?? `score ${score.quality_score}` : "not known");

/** One column for each of the last days (UTC): in time, late and failed ones on each other. The table of days has the numbers. */
export function daysChart() {
  if (!state.days.length) return null;
  const known = new Map(state.days.map((day) => [day.day, day]));
  const names = Array.from({ length: DAYS }, (_, index) => new Date(1000 * (now() - (DAYS - 1 - index) * DAY_S)).toISOString().slice(0, 10));
  const most = Math.max(...state.days.map((day) => day.submitted + day.failed + day.expired));
  return h("div", { "aria-hidden": "true" },
    h("div", { class: "days" }, names.map((name) => h("div", { title: name }, dayParts(known.get(name), most)))),
    h("p", { class: "dim" }, `The last ${DAYS} days, today on the right, at most ${whole(most)} a day: `, h("span", { class: "in-time" }, "in time"), ", ",
      h("span", { class: "warn" }, "late"), ", ", h("span", { class: "bad" }, "failed or expired")));
}

function dayParts(day, most) {
  if (!day || !most) return null;
  return [part("", (day.submitted - day.late) / most), part("late", day.late / most), part("failed", (day.failed + day.expired) / most)];
}

function part(kind, share) {
  const node = h("i", { class: kind });
  node.style.height = `${100 * share}%`;
  return node;
}

function daysTable() {
  const share = (count, all) => (all ? `${count} (${percent(count / all)})` : "-");
  return table("By day (UTC)", ["day", "delivered", "late", "failed", "expired", "cancelled", "first place"],
    [...state.days].reverse().map((day) => {
      const counted = day.submitted + day.failed + day.expired;
      return [day.day, share(day.submitted, counted), share(day.late, day.submitted), String(day.failed),
        String(day.expired), String(day.cancelled), share(day.first, day.scored)];
    }), "No task has ended in the last 30 days.");
}
