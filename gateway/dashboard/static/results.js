// Results of tasks, and how they went day by day.

import { h, show, table } from "./dom.js";
import { duration, number, percent } from "./format.js";
import { RUNNING, state } from "./store.js";

const RANKS = { 3: "first place", 0: "valid", "-1": "not valid" };

export function results(main) {
  const days = h("section", { class: "card", "aria-labelledby": "days-title" });
  const list = h("section", { class: "card", "aria-label": "Results" });
  main.replaceChildren(days, list);
  const draw = () => {
    show(days, h("h2", { id: "days-title" }, "The last 30 days"), daysChart(), daysTable());
    show(list, resultsTable(500));
  };
  draw();
  return draw;
}

export function resultsTable(most) {
  const ended = [...state.tasks.values()].filter((view) => !RUNNING.has(view.state) && view.result).slice(0, most);
  return table("Ended tasks, newest first", ["task", "result", "held-out loss, before -> after", "spare time", "rank", "artifact or reason"],
    ended.map((view) => [
      h("a", { href: `#/task/${encodeURIComponent(view.task)}` }, view.task),
      h("span", { class: `badge ${view.state === "submitted" ? "good" : "bad"}` }, view.state),
      lossOf(view.result), spareOf(view.result), rankOf(view.score),
      h("td", { class: "wide" }, view.result.artifact ?? view.result.reason),
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

/** One column per day: submitted, late and failed ones on each other. The table below has the numbers. */
export function daysChart() {
  if (!state.days.length) return null;
  const ends = (day) => day.submitted + day.failed + day.expired + day.cancelled;
  const most = Math.max(...state.days.map(ends), 1);
  return h("div", { class: "days", "aria-hidden": "true" }, state.days.map((day) => h("div", { title: day.day },
    part("", (day.submitted - day.late) / most), part("late", day.late / most), part("failed", (day.failed + day.expired) / most))));
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
