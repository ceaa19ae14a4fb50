// Curves of a run with uPlot: training loss, held-out loss, learning rate. Thousands of points stay smooth.

import { h } from "./dom.js";
import { clockTime, moment, number } from "./format.js";

const REDRAW_MS = 500;
const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

/** Merge training and development points to columns over one axis of times. */
export function columns(view) {
  const loss = [view.curve.at, view.curve.loss];
  const development = [view.development.map(({ at }) => at), view.development.map((point) => point.loss)];
  return window.uPlot.join([loss, development].filter(([at]) => at.length)).concat(
    view.curve.at.length && !view.development.length ? [new Array(view.curve.at.length).fill(null)] : []);
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
    const { curve, development } = this.view;
    if (progress.phase === "train" && progress.loss !== null && progress.at > (curve.at.at(-1) ?? 0)) {
      for (const name of Object.keys(curve)) curve[name].push(progress[name]);
    }
    if (progress.dev_loss !== null && progress.dev_loss !== development.at(-1)?.loss)
      development.push({ at: progress.at, step: progress.step, loss: progress.dev_loss });
    this.timer ??= setTimeout(() => { this.timer = null; this.draw(); }, REDRAW_MS);
  }

  data() {
    const { curve } = this.view;
    if (this.field !== "loss") return [curve.at, curve[this.field]];
    return columns(this.view);
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
    this.node.setAttribute("aria-label",
      `${this.label} over ${curve.at.length} points: now ${number(curve[this.field].at(-1), this.field === "lr" ? 6 : 3)}${held}`);
    if (this.plot) this.plot.setData(this.data());
    else this.remake();
  }

  remake() {
    if (!window.uPlot || !this.view.curve.at.length) return;
    this.plot?.destroy();
    this.node.textContent = "";
    const axis = { stroke: colour("--dim"), grid: { stroke: colour("--line"), width: 1 }, ticks: { stroke: colour("--line") } };
    const line = { label: this.label, stroke: colour("--bar"), width: 1.5, points: { show: false }, spanGaps: true };
    const dots = { label: "held-out loss", stroke: colour("--warn"), width: 2, spanGaps: true, points: { show: true, size: 6 } };
    this.plot = new window.uPlot({
      width: this.width(), height: this.height,
      series: [{ label: "time", value: (_, at) => (at === null ? "-" : moment(at)) }, line, ...(this.field === "loss" ? [dots] : [])],
      axes: [{ ...axis, space: 90, values: (_, marks) => marks.map(clockTime) }, { ...axis, size: 64, values: this.field === "lr" ? (_, marks) => marks.map((mark) => mark.toExponential(1)) : undefined }],
      cursor: { drag: { x: true, y: false } },
      hooks: { draw: [(plot) => this.marks(plot)] },
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
