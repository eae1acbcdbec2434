// Elements and numbers. Text goes into text nodes only: a name from a file is never read as markup.

const SVG = "http://www.w3.org/2000/svg";
const $ = (id) => document.getElementById(id);

function fill(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (value !== null && value !== undefined) element.setAttribute(name, value);
  }
  for (const child of children.flat()) {
    if (child !== null && child !== undefined) element.append(child);
  }
  return element;
}
const tag = (name, attributes = {}, ...children) => fill(document.createElement(name), attributes, children);
const draw = (name, attributes = {}, ...children) => fill(document.createElementNS(SVG, name), attributes, children);

// What is not printable is shown as its code: control characters, marks that turn the direction of writing.
const HIDDEN = /[\p{C}\p{Zl}\p{Zp}]|(?! )\p{Zs}/gu;
function shown(text, most = 160) {
  text = String(text);
  if (text.length > most) {
    const half = (most - 1) >> 1;
    text = `${text.slice(0, half)}…${text.slice(-half)}`;
  }
  return text.replace(HIDDEN, (character) => `\\u{${character.codePointAt(0).toString(16)}}`);
}

const MINUS = "−";
const sign = (text) => text.replace("-", MINUS);
const fixed = (digits) => (value) => (Number.isFinite(value) ? sign(value.toFixed(digits)) : "–");
const percent = (digits) => (value) => (Number.isFinite(value) ? `${sign((100 * value).toFixed(digits))} %` : "–");
const times = (value) => (Number.isFinite(value) ? `${value.toFixed(value < 10 ? 2 : 1)}×` : "–");
const scientific = (value) => (Number.isFinite(value) ? sign(value.toPrecision(4)) : "–");
const whole = (value) => value.toLocaleString("en-US");
const bytes = (count) => {
  const units = ["B", "kB", "MB", "GB", "TB"];
  let unit = 0;
  while (count >= 1000 && unit < units.length - 1) {
    count /= 1000;
    unit++;
  }
  return `${unit ? count.toPrecision(3) : count} ${units[unit]}`;
};
const plural = (count, noun) => `${whole(count)} ${noun}${count === 1 ? "" : "s"}`;
const percentShort = (value) => (Number.isFinite(value) ? percent(value && Math.abs(value) < 0.0995 ? 2 : 1)(value) : "–");

const MEASURES = {
  rho: { label: "ρ", column: rho, format: fixed(3), scale: "sequential", most: 1, about: "ρ, the cosine of V Vᵀ Δ and Δ; darker: more of the update lies in the safety subspace" },
  ratio: { label: "ρ/ρ_null", column: ratio, format: times, scale: "log", about: "ρ relative to the ρ of a random update; orange is below chance, blue above" },
  z: { label: "z", column: z, format: fixed(1), scale: "diverging", about: "the distance of ρ from chance, in standard deviations of log ρ by chance; orange is below chance, blue above" },
  relative: { label: "‖Δ‖/‖W‖", column: relative, format: percentShort, scale: "sequential", about: "the size of the update relative to the weights, ‖Δ‖/‖W_aligned‖" },
  cosine: { label: "cos(V, Δ)", column: cosine, format: fixed(3), scale: "diverging", about: "the cosine of V and Δ as vectors; orange: the update undoes the alignment's change" },
  rounding: { label: "rounding of V", column: rounding, format: percentShort, scale: "sequential", about: "the relative error of V that the dtypes' rounding predicts; from 25 % on ρ is unreliable" },
};

function interval(i) {
  if (!Number.isFinite(rho[i])) return "";
  return high[i] > low[i] ? `${fixed(3)(low[i])} to ${fixed(3)(high[i])}` : "exact";
}

// All that is known of a module, as nodes: [term, text] pairs behind the name.
function describe(i, merged) {
  const facts = [
    ["ρ", Number.isFinite(rho[i]) ? `${fixed(4)(rho[i])} (${interval(i)}${MODULES.columns[i] > 0 ? `, ${MODULES.columns[i]} columns` : ""})` : "undefined"],
    ["ρ_null", fixed(4)(rhoNull[i])],
    ["ρ/ρ_null", times(ratio[i])],
    ["z", fixed(1)(z[i])],
    ["‖Δ‖", scientific(deltaNorm[i])],
    ["‖V‖", scientific(vNorm[i])],
    ["‖Δ‖/‖W‖", percentShort(relative[i])],
    ["cos(V, Δ)", fixed(3)(cosine[i])],
    ["rounding of V", percentShort(rounding[i])],
  ];
  const reason = MODULES.reason[i];
  return [
    tag("b", {}, shown(names[i])),
    ` · ${facts.map(([name, value]) => `${name} ${value}`).join(" · ")}`,
    ` · ${merged[i] ? "merge" : "keep"} by the rule above`,
    reason ? ` · in the report: ${shown(reason)}` : "",
  ];
}

function tip(event, nodes) {
  const box = $("tip");
  box.hidden = !nodes;
  if (!nodes) return;
  box.replaceChildren(...nodes);
  const { width, height } = box.getBoundingClientRect();
  box.style.left = `${Math.max(4, Math.min(event.clientX + 14, innerWidth - width - 8))}px`;
  box.style.top = `${event.clientY + height + 24 > innerHeight ? event.clientY - height - 12 : event.clientY + 16}px`;
}

// Nodes for elements that carry data-tip: what to say of the thing with that number.
function tips(box, nodesOf) {
  const show = (event) => {
    const found = event.target.closest?.("[data-tip]");
    tip(event, found ? nodesOf(Number(found.dataset.tip)) : null);
  };
  box.addEventListener("pointermove", show);
  box.addEventListener("pointerdown", show);
  box.addEventListener("pointerleave", (event) => tip(event, null));
}
