// What figures share: round numbers, axes, strips of points or histograms beside chance.

function niceStep(span, count, factors = [1, 2, 2.5, 5]) {
  const rough = span / Math.max(count, 1);
  const power = 10 ** Math.floor(Math.log10(rough));
  return power * (factors.find((factor) => factor * power >= rough * 0.999) ?? 10);
}

function ticks(least, most, count = 6) {
  if (!(most > least)) return [least];
  const step = niceStep(most - least, count);
  const first = Math.ceil(least / step - 1e-9);
  const last = Math.floor(most / step + 1e-9);
  return Array.from({ length: last - first + 1 }, (_, k) => Number(((first + k) * step).toPrecision(12)));
}

function rangeOf(columns) {
  let least = Infinity;
  let most = -Infinity;
  for (const column of columns) {
    for (const value of column) {
      if (value < least) least = value;
      if (value > most) most = value;
    }
  }
  return least <= most ? [least, most] : [0, 1];
}

function axisLabel(value) {
  return sign(String(Math.abs(value) >= 1e4 ? Number(value.toPrecision(3)).toExponential() : value));
}

// Horizontal axis with a title below it.
function bottomAxis(svg, at, x, domain, title) {
  svg.append(draw("line", { class: "axis", x1: x(domain[0]), x2: x(domain[1]), y1: at, y2: at }));
  for (const tick of ticks(domain[0], domain[1])) {
    svg.append(
      draw("line", { class: "axis", x1: x(tick), x2: x(tick), y1: at, y2: at + 4 }),
      draw("text", { x: x(tick), y: at + 16, "text-anchor": "middle" }, axisLabel(tick)),
    );
  }
  svg.append(draw("text", { class: "name", x: (x(domain[0]) + x(domain[1])) / 2, y: at + 33, "text-anchor": "middle" }, title));
}

const LABELS = 132;
const fitted = (text, width) => shown(text, Math.floor(width / 6.2));

function widthOf(box) {
  return Math.max(320, Math.min(box.clientWidth || 900, 1040));
}

// Points are drawn one by one up to this many in a row, beyond it as a histogram.
const MOST_POINTS = 150;
const ROW = 34;

// Rows of points or histograms. A row: { label, items, value(i), low(i), high(i), merged(i), chance: {at, from, to}, bound }.
function strips(box, { rows, domain, title, bound, label }) {
  const width = widthOf(box);
  const left = Math.min(LABELS, width * 0.34);
  const right = width - 52;
  const height = rows.length * ROW + 46;
  const x = (value) => left + ((Math.max(domain[0], Math.min(domain[1], value)) - domain[0]) / (domain[1] - domain[0])) * (right - left);
  const svg = draw("svg", { width, height, viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": label });
  for (const tick of ticks(domain[0], domain[1])) svg.append(draw("line", { class: "grid", x1: x(tick), x2: x(tick), y1: 0, y2: rows.length * ROW }));
  rows.forEach((row, number) => {
    const top = number * ROW;
    const middle = top + ROW / 2;
    svg.append(
      draw("text", { class: "name", x: left - 10, y: middle + 4, "text-anchor": "end" }, draw("title", {}, shown(row.label)), fitted(row.label, left - 12)),
      draw("line", { class: "grid", x1: left, x2: right, y1: top + ROW, y2: top + ROW }),
    );
    if (row.chance) {
      const { from, to, at } = row.chance;
      if (to > from) svg.append(draw("rect", { class: "band", x: x(from), y: top + 3, width: Math.max(x(to) - x(from), 1), height: ROW - 6 }));
      if (Number.isFinite(at)) svg.append(draw("line", { class: "chance", x1: x(at), x2: x(at), y1: top + 3, y2: top + ROW - 3 }));
    }
    const items = row.items.filter((i) => Number.isFinite(row.value(i)));
    if (items.length > MOST_POINTS) histogram(svg, row, items, x, domain, top);
    else points(svg, row, items, x, top);
    if (Number.isFinite(row.bound)) svg.append(draw("line", { class: "bound", x1: x(row.bound), x2: x(row.bound), y1: top + 1, y2: top + ROW - 1 }));
    svg.append(draw("text", { x: right + 10, y: middle + 4 }, items.length ? whole(items.length) : "none"));
  });
  if (Number.isFinite(bound)) svg.append(draw("line", { class: "bound", x1: x(bound), x2: x(bound), y1: 0, y2: rows.length * ROW }));
  bottomAxis(svg, rows.length * ROW + 2, x, domain, title);
  box.replaceChildren(svg);
}

function points(svg, row, items, x, top) {
  const middle = top + ROW / 2;
  // Points that would cover each other take turns above and below the middle.
  const last = [];
  const lanes = [0, -6, 6, -11, 11];
  for (const i of [...items].sort((a, b) => row.value(a) - row.value(b))) {
    const at = x(row.value(i));
    let lane = lanes.findIndex((_, number) => !(at - last[number] < 5.5));
    if (lane < 0) lane = i % lanes.length;
    last[lane] = at;
    const y = middle + lanes[lane];
    const kind = row.merged(i) ? "merge" : "keep";
    const [from, to] = [row.low?.(i), row.high?.(i)];
    if (to > from) svg.append(draw("line", { class: `span ${kind}`, x1: x(from), x2: x(to), y1: y, y2: y }));
    svg.append(draw("circle", { class: `dot ${kind}`, cx: at.toFixed(1), cy: y, r: 3.4, "data-tip": i }));
  }
}

function histogram(svg, row, items, x, domain, top) {
  const bins = 80;
  const all = new Array(bins).fill(0);
  const merged = new Array(bins).fill(0);
  for (const i of items) {
    const share = (row.value(i) - domain[0]) / (domain[1] - domain[0]);
    const bin = Math.max(0, Math.min(bins - 1, Math.floor(share * bins)));
    all[bin]++;
    merged[bin] += row.merged(i) ? 1 : 0;
  }
  const most = Math.max(...all);
  const step = (x(domain[1]) - x(domain[0])) / bins;
  all.forEach((count, bin) => {
    if (!count) return;
    const left = x(domain[0]) + bin * step;
    const reach = (ROW - 6) / most;
    const bottom = top + ROW - 1;
    const width = Math.max(step - 0.6, 0.6);
    for (const [kind, from, to] of [["merge", 0, merged[bin]], ["keep", merged[bin], count]]) {
      if (to > from) svg.append(draw("rect", { class: kind, x: left.toFixed(2), width: width.toFixed(2), y: (bottom - to * reach).toFixed(2), height: Math.max((to - from) * reach, 0.5).toFixed(2) }));
    }
  });
}

// A table of short length, by header names and rows of cells: text, or {text, class}.
function simpleTable(table, headers, rows, foot) {
  const cell = (name) => (content, column) => {
    const of = typeof content === "object" ? content : { text: content };
    return tag(name, { class: [headers[column].number ? "" : "text", of.class ?? ""].join(" ").trim() || null }, of.text);
  };
  table.replaceChildren(
    tag("thead", {}, tag("tr", {}, headers.map((header) => tag("th", { scope: "col", class: header.number ? null : "text" }, header.text)))),
    tag("tbody", {}, rows.map((row) => tag("tr", {}, row.map(cell("td"))))),
    foot ? tag("tfoot", {}, tag("tr", {}, foot.map(cell("td")))) : "",
  );
}
