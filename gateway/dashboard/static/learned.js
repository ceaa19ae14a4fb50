// The rates that were learned from results and scores, with the counts behind them.

import { get } from "./api.js";
import { bar, h, show, table } from "./dom.js";
import { number } from "./format.js";

export function learned(main) {
  const place = h("div", { class: "cards" });
  main.replaceChildren(h("h2", {}, "Learned rates"), place);
  const draw = async () => {
    const view = await get("/v1/tables");
    show(place, Object.entries(view.tables).map(([name, one]) => h("section", { class: "card", "aria-label": name },
      h("h2", {}, name.replaceAll("_", " ")),
      rates(`Rate of: ${one.rate_of}. House value: ${number(one.house, 2)}.`, one.rates))));
  };
  draw().catch((error) => show(place, h("p", { class: "bad" }, error.message)));
  return (what) => what === "slow" && draw().catch(() => {});
}

function rates(caption, known) {
  const heads = ["for", "rate", "successes", "trials", "where it comes from"];
  return table(caption, heads, Object.entries(known).map(([key, rate]) => [
    key, h("td", { class: "rate" }, number(rate.value), bar(rate.value)), number(rate.successes, 1), number(rate.trials, 1),
    h("td", { class: "wide" }, rate.cause),
  ]), `${caption} No evidence yet.`);
}
