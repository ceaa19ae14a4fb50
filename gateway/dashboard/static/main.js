// The page: which part is shown, the header, the token. Each part draws itself when something has changed.

import { get, setToken, token } from "./api.js";
import { learned } from "./learned.js";
import { offers } from "./offers.js";
import { overview } from "./overview.js";
import { results } from "./results.js";
import { begin, load, onChange, state } from "./store.js";
import { taskPage } from "./task.js";

const DRAW_MS = 250; // heartbeats and progress come several times a second
const main = document.getElementById("main");
const parts = { "": overview, decisions: offers, results, learned, task: taskPage };
const titles = { "": "Overview", decisions: "Offers", results: "Results", learned: "Learned rates" };
let part = null;

function route() {
  const [name, key] = location.hash.replace(/^#\/?/, "").split("/");
  const known = Object.hasOwn(parts, name) ? name : "";
  part = parts[known](main, key === undefined ? undefined : decodeURIComponent(key));
  document.title = `${titles[known] ?? decodeURIComponent(key)} - Podium`;
  for (const link of document.querySelectorAll("nav a"))
    link.toggleAttribute("aria-current", link.hash === `#/${known}`);
  document.querySelector("nav a[aria-current]")?.setAttribute("aria-current", "page");
}

function header() {
  const link = document.getElementById("link");
  link.textContent = state.refused || state.link;
  link.className = `link ${state.live && !state.refused ? "live" : "down"}`;
  const { gateway } = state;
  document.getElementById("gateway").textContent = gateway ? `gateway ${gateway.gateway}, version ${gateway.version}` : "";
}

let waiting = null;
const unseen = [];
function draw() {
  waiting = null;
  header();
  const seen = unseen.splice(0);
  const points = seen.filter(([what]) => what === "progress");
  for (const [what, data] of points) part?.(what, data);
  for (const [what, data] of seen.filter(([what]) => what === "tasks")) part?.(what, data);
  if (seen.some(([what]) => what === "all")) part?.("all");
  else if (!points.length && seen.some(([what]) => what !== "tasks")) part?.(seen.at(-1)[0]);
}

onChange((what, data) => {
  if (what === "link" && data === 401) askToken("This gateway needs a token.");
  if (!document.hidden || what === "progress") unseen.push([what, data]);
  waiting ??= setTimeout(draw, DRAW_MS);
});

const dialog = document.getElementById("token-dialog");
const field = document.getElementById("token-field");
const why = document.getElementById("token-why");

function askToken(text) {
  if (dialog.open) return;
  if (text) why.textContent = text;
  field.value = token();
  dialog.showModal();
}

async function saveToken() {
  const before = token();
  setToken(field.value.trim());
  try {
    await get("/v1/gateway");
    dialog.close();
    await load();
    route();
  } catch (error) {
    setToken(before);
    why.textContent = error.message;
  }
}

document.getElementById("token-button").addEventListener("click", () => askToken(""));
document.getElementById("token-form").addEventListener("submit", (event) => {
  event.preventDefault(); // the Content-Security-Policy lets no form send anything
  saveToken();
});
document.getElementById("token-drop").addEventListener("click", () => { setToken(""); dialog.close(); route(); });
document.getElementById("token-close").addEventListener("click", () => dialog.close());
addEventListener("hashchange", () => { route(); main.focus(); });
setInterval(() => { if (state.gateway && !document.hidden) { unseen.push(["clock"]); draw(); } }, 1000); // times that run

route();
begin();
