// Make elements, and replace what is shown only where it has changed.

/** Make an element. `on*` are listeners, `class` and others attributes; false and null are left out. */
export function h(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === false || value === null || value === undefined) continue;
    if (name.startsWith("on")) node[name] = value;
    else node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.flat(9).filter((child) => child !== null && child !== undefined && child !== false));
  return node;
}

/** Show `nodes` in `place`. What is equal stays, so that focus, selection and open details are kept. */
export function show(place, ...nodes) {
  const wanted = nodes.flat(9).filter(Boolean);
  wanted.forEach((node, index) => {
    const old = place.children[index];
    if (!old) place.append(node);
    else merge(old, node);
  });
  while (place.children.length > wanted.length) place.lastElementChild.remove();
}

/** Make `old` equal to `fresh`, touching only what differs. Nodes with `data-keep` are never touched. */
function merge(old, fresh) {
  if (old.dataset.keep && old.dataset.keep === fresh.dataset.keep) return;
  if (old.isEqualNode(fresh) && !old.querySelector("button")) return;
  if (old.tagName !== fresh.tagName || old.id !== fresh.id) {
    const focused = old === document.activeElement;
    old.replaceWith(fresh);
    if (focused) fresh.focus();
    return;
  }
  // A button stays the same element: one that is replaced between press and release is not clicked.
  if (old.tagName === "BUTTON") old.onclick = fresh.onclick;
  for (const { name } of [...old.attributes])
    if (!fresh.hasAttribute(name) && !(old.tagName === "DETAILS" && name === "open")) old.removeAttribute(name);
  for (const { name, value } of [...fresh.attributes]) {
    if (name === "style") continue; // the Content-Security-Policy forbids the attribute
    if (old.getAttribute(name) !== value) old.setAttribute(name, value);
  }
  for (const side of ["width", "height"]) // of bars
    if (old.style[side] !== fresh.style[side]) old.style[side] = fresh.style[side];
  mergeChildren(old, fresh);
}

function mergeChildren(old, fresh) {
  const wanted = [...fresh.childNodes];
  wanted.forEach((node, index) => {
    const there = old.childNodes[index];
    if (!there) old.append(node);
    else if (there.nodeType === 1 && node.nodeType === 1) merge(there, node);
    else if (there.nodeType !== node.nodeType) there.replaceWith(node);
    else if (there.data !== node.data) there.data = node.data;
  });
  while (old.childNodes.length > wanted.length) old.lastChild.remove();
}

/** A bar of `share` (0 to 1) for the eye; the number next to it is for everyone. */
export function bar(share, kind = "") {
  const fill = h("div", { class: `fill ${kind}` });
  fill.style.width = `${Math.round(1000 * Math.min(1, Math.max(0, share))) / 10}%`;
  return h("div", { class: "track", "aria-hidden": "true" }, fill);
}

/** A table with a caption; `rows` are lists of cells. */
export function table(caption, heads, rows, empty) {
  if (!rows.length) return h("p", { class: "dim" }, empty);
  return h("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": caption },
    h("table", {},
      h("caption", {}, caption),
      h("thead", {}, h("tr", {}, heads.map((head) => h("th", { scope: "col" }, head)))),
      h("tbody", {}, rows.map((cells) => h("tr", {}, cells.map((cell) => cell?.tagName === "TD" ? cell : h("td", {}, cell ?? "")))))));
}

/** A list of names and values; pairs whose value is empty are left out. */
export function facts(pairs) {
  const known = pairs.filter(([, value]) => value !== null && value !== undefined && value !== "");
  return h("dl", {}, known.map(([name, value]) => [h("dt", {}, name), h("dd", {}, value)]));
}
