// The stream of offers: each with its decision, and the terms of the score as bars.

import { bar, h, show } from "./dom.js";
import { duration, moment, number } from "./format.js";
import { loadMoreDecisions, state } from "./store.js";

export function offers(main) {
  const list = h("section", { class: "card", "aria-labelledby": "offers-title" });
  main.replaceChildren(list);
  const draw = () => show(list, h("h2", { id: "offers-title" }, "Offers"),
    state.decisions.length ? h("div", {}, state.decisions.map(decisionRow)) : h("p", { class: "dim" }, "No offer yet."),
    state.nextDecision ? h("button", { type: "button", onclick: loadMoreDecisions }, "Older offers") : null);
  draw();
  return draw;
}

export function decisionRow(decision) {
  const { offer } = decision;
  return h("details", {},
    h("summary", {},
      h("span", { class: `badge ${decision.accepted ? "good" : "bad"}` }, decision.accepted ? "accepted" : "rejected"), " ",
      decision.task_id, h("span", { class: "dim" }, ` ${moment(decision.decided_at)}`),
      h("div", { class: "dim" }, decision.reason)),
    offer ? h("p", {}, `${offer.task_type} of ${offer.model}, within ${duration(3600 * offer.hours_to_complete)}`) : null,
    termBars(decision),
    decision.accepted ? h("p", {}, h("a", { href: `#/task/${encodeURIComponent(decision.task)}` }, "The task's page")) : null);
}

/** The terms of the score, each with its share of the priority and where its value comes from. */
export function termBars(decision) {
  if (!decision.terms) return h("p", { class: "dim" }, "Decided without a score.");
  const terms = Object.entries(decision.terms);
  const largest = Math.max(...terms.map(([, term]) => term.weight), 1e-9);
  return h("div", {},
    h("p", {}, `priority ${number(decision.priority)}, policy ${decision.policy}`),
    terms.map(([name, term]) => h("div", { class: "term" },
      h("span", {}, name.replaceAll("_", " ")),
      bar((term.value * term.weight) / largest),
      h("span", { class: "number" }, number(term.value * term.weight)),
      h("span", { class: "dim cause" }, `${number(term.value)} x ${number(term.weight, 2)}: ${term.cause}`))));
}
