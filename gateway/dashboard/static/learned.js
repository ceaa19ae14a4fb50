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
      h("p", { class: "dim" }, `${one.rate_of}; house value ${number(one.house, 2)}`),
      table(name.replaceAll("_", " "), ["of", "rate", "", "yes", "trials", "because"], Object.entries(one.rates).map(([key, rate]) => [
        key, number(rate.value), bar(rate.value), number(rate.successes, 1), number(rate.trials, 1), h("td", { class: "wide" }, rate.cause),
      ]), "The house value, no evidence yet."))));
  };
  draw().catch((error) => show(place, h("p", { class: "bad" }, error.message)));
  return (what) => what === "slow" && draw().catch(() => {});
}
