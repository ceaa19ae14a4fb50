// Curves of a run with uPlot: training loss, held-out loss, learning rate. Thousands of points stay smooth.

import { h } from "./dom.js";
import { clockTime, moment, number, rate } from "./format.js";

export const TRAINING_LOSS = "training loss (smoothed)"; // by the worker's reporter
const REDRAW_MS = 500;
const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

/** What the legend shows: the value at the cursor, or the last one before it. */
const legendValue = (format) => (plot, _, series, index) =>
  format(plot.data[series].findLast((one, place) => place <= index && (one ?? null) !== null) ?? null);

/** Let the legend show the newest values while no cursor is in the chart. */
function showNewest(plot) {
  if (plot.cursor.left < 0) plot.setLegend({ idx: plot.data[0].length - 1 }, false);
}

/** Times and values with an empty value in each gap, where nothing was received: no line is drawn over it. */
function withGaps(at, values, gaps) {
  if (!gaps.length) return [at, values];
  const times = [], all = [];
  let next = 0;
  at.forEach((time, index) => {
    for (; next < gaps.length && gaps[next].to_at <= time; next += 1) {
      if (!index || gaps[next].from_at < at[index - 1]) continue; // before the curve, or thinned away
      times.push((gaps[next].from_at + gaps[next].to_at) / 2);
      all.push(null);
    }
    times.push(time);
    all.push(values[index]);
  });
  return [times, all];
}

/** Merge training points of one field and development points to columns over one axis of times. */
export function columns(view, field = "loss") {
  const loss = withGaps(view.curve.at, view.curve[field], view.gaps);
  const development = [view.development.map(({ at }) => at), view.development.map((point) => point.loss)];
  return window.uPlot.join([loss, development].filter(([at]) => at.length)).concat(
    view.curve.at.length && !view.development.length ? [new Array(loss[0].length).fill(null)] : []);
}

/** One chart of a run. `push(progress)` adds a point; the canvas is drawn at most twice a second. */
export class RunChart {
  constructor(view, { field = "loss", height = 260, label = "loss" } = {}) {
    this.view = view;
    this.field = field;
    this.label = label;
    this.node = h("div", { class: "chart", role: "img", "data-keep": `${view.task}-${field}` });
    this.height = height;
    this.timer = null;
    this.plot = null;
    new ResizeObserver(() => this.resize()).observe(this.node);
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.remake());
    this.draw();
  }

  push(progress) {
    const { curve, development, gaps } = this.view;
    const heard = this.view.heard ?? curve.at.at(-1) ?? progress.at;
    if (progress.at - heard > this.view.gap_after_s) gaps.push({ from_at: heard, to_at: progress.at });
    this.view.heard = Math.max(heard, progress.at);
    if (progress.phase === "train" && progress.loss !== null && progress.at > (curve.at.at(-1) ?? 0)) {
      for (const name of Object.keys(curve)) curve[name].push(progress[name]);
    }
    if (progress.dev_loss !== null && progress.dev_loss !== development.at(-1)?.loss)
      development.push({ at: progress.at, step: progress.step, loss: progress.dev_loss });
    this.timer ??= setTimeout(() => { this.timer = null; this.draw(); }, REDRAW_MS);
  }

  /** Show another course of the same run. */
  renew(view) {
    this.view = view;
    this.draw();
  }

  data() {
    const all = columns(this.view, this.field); // both charts of a page have the same axis of times
    return this.field === "loss" ? all : all.slice(0, 2);
  }

  draw() {
    const { curve, development } = this.view;
    if (!window.uPlot) {
      this.node.textContent = "Curves need the package uplot-python on the gateway's machine (podium[dashboard]).";
      return;
    }
    if (!curve.at.length) {
      this.node.textContent = "No training step has been reported yet.";
      return;
    }
    const held = development.length ? `; held-out ${number(development.at(-1).loss)}` : "";
    const count = this.view.gaps.length;
    const gaps = count ? `; ${count} gap${count > 1 ? "s" : ""} without a report` : "";
    this.node.setAttribute("aria-label",
      `${this.label} over ${curve.at.length} points: now ${this.text(curve[this.field].at(-1))}${held}${gaps}`);
    if (this.plot) this.plot.setData(this.data());
    else this.remake();
  }

  /** A value of the curve as text. */
  text(value) {
    return this.field === "lr" ? rate(value) : number(value);
  }

  remake() {
    if (!window.uPlot || !this.view.curve.at.length) return;
    this.plot?.destroy();
    this.node.textContent = "";
    const axis = { stroke: colour("--dim"), grid: { stroke: colour("--line"), width: 1 }, ticks: { stroke: colour("--line") } };
    const line = { label: this.label, stroke: colour("--bar"), width: 1.5, points: { show: false },
      value: legendValue((value) => this.text(value)) };
    const dots = { label: "held-out loss", stroke: colour("--warn"), width: 2, spanGaps: true, points: { show: true, size: 6 },
      value: legendValue(number) };
    this.plot = new window.uPlot({
      width: this.width(), height: this.height,
      series: [{ label: "time", value: legendValue(moment) }, line, ...(this.field === "loss" ? [dots] : [])],
      axes: [{ ...axis, space: 70, values: (_, marks) => marks.map(clockTime) }, { ...axis, size: 64, values: this.field === "lr" ? (_, marks) => marks.map(rate) : undefined }],
      cursor: { drag: { x: true, y: false } },
      hooks: { draw: [(plot) => this.marks(plot), showNewest], setLegend: [showNewest] },
    }, this.data(), this.node);
  }

  /** Draw a line where each trial of the profile `auto` began. */
  marks(plot) {
    const context = plot.ctx;
    context.save();
    context.strokeStyle = colour("--dim");
    context.setLineDash([4, 4]);
    for (const { at } of trialsOf(this.view)) {
      const x = plot.valToPos(at, "x", true);
      if (x < plot.bbox.left || x > plot.bbox.left + plot.bbox.width) continue;
      context.beginPath();
      context.moveTo(x, plot.bbox.top);
      context.lineTo(x, plot.bbox.top + plot.bbox.height);
      context.stroke();
    }
    context.restore();
  }

  width() {
    return Math.max(200, this.node.clientWidth);
  }

  resize() {
    if (this.plot && this.plot.width !== this.width()) this.plot.setSize({ width: this.width(), height: this.height });
    else if (!this.plot) this.draw();
  }
}

/** The trials that a run of the profile `auto` reports, each with its outcome. */
export function trialsOf(view) {
  const trials = new Map();
  for (const { at, text } of view.messages) {
    const match = /^trial (\d+): (.*)/.exec(text);
    if (!match) continue;
    const [, name, what] = match;
    if (trials.has(name)) trials.get(name).outcome = what;
    else trials.set(name, { name, at, what, outcome: "" });
  }
  return [...trials.values()];
}
