// Layers across, module types down: a cell is a matrix, or the median of the experts of a layer.

// What is beyond is drawn together: a page with thousands of types or layers is not read.
const MOST_TYPES = 40;
const MOST_COLUMNS = 256;

const grid = (() => {
  const byCount = types.map((_, type) => type).sort((a, b) => membersOfType[b].length - membersOfType[a].length || a - b);
  const kept = types.length > MOST_TYPES ? new Set(byCount.slice(0, MOST_TYPES - 1)) : new Set(byCount);
  const rows = types.map((_, type) => type).filter((type) => kept.has(type)).map((type) => ({ label: types[type], of: [type] }));
  const rest = byCount.filter((type) => !kept.has(type));
  if (rest.length) rows.push({ label: `${rest.length} other types`, of: rest });
  const rowOf = new Int32Array(types.length);
  rows.forEach((row, number) => row.of.forEach((type) => (rowOf[type] = number)));

  const prefixOf = (name) => name.replace(/[0-9]+$/, "");
  const perColumn = Math.ceil(layers.length / MOST_COLUMNS) || 1;
  const columns = [];
  layers.forEach((name, layer) => {
    const prefix = prefixOf(name);
    const before = columns[columns.length - 1];
    if (before && before.prefix === prefix && before.of.length < perColumn) before.of.push(layer);
    else columns.push({ label: name.slice(prefix.length) || "•", name, prefix, of: [layer] });
  });
  if (layerOf.some((layer) => layer < 0)) columns.push({ label: "–", name: "no layer", prefix: null, of: [-1] });
  const columnOf = new Int32Array(layers.length + 1);
  columns.forEach((column, number) => column.of.forEach((layer) => (columnOf[layer + 1] = number)));

  const cells = new Map();
  for (let i = 0; i < N; i++) {
    const key = rowOf[typeOf[i]] * columns.length + columnOf[layerOf[i] + 1];
    if (!cells.has(key)) cells.set(key, []);
    cells.get(key).push(i);
  }
  return { rows, columns, cells };
})();

// Ten steps of colour over a measure's values: classes s0 to s9, or d0 to d9 around the middle.
function colourScale(measure) {
  const found = [];
  for (const members of grid.cells.values()) {
    const value = median(known(members, measure.column));
    if (value === value) found.push(value);
  }
  const [least, most] = rangeOf([found]);
  const clip = (step) => Math.max(0, Math.min(9, step));
  if (measure.scale === "sequential") {
    let step = niceStep(Math.max(most - least, 1e-9, Math.abs(most) * 0.02), 9);
    let from = Math.floor(least / step + 1e-9) * step;
    if (from + 10 * step < most) {
      step = niceStep(step * 1.3, 1);
      from = Math.floor(least / step + 1e-9) * step;
    }
    // ρ has an end, which the scale does not pass.
    if (measure.most) from = Math.max(0, Math.min(from, measure.most - 10 * step));
    return { edges: Array.from({ length: 11 }, (_, k) => from + k * step), classOf: (value) => `s${clip(Math.floor((value - from) / step + 1e-9))}`, prefix: "s" };
  }
  const log = measure.scale === "log";
  const position = log ? Math.log2 : (value) => value;
  // A few cells far out take the last colours, lest all others look alike.
  const distances = found.map((value) => Math.abs(position(value))).filter(Number.isFinite).sort((a, b) => a - b);
  const reach = Math.max(distances[Math.floor(distances.length * 0.98)] ?? 0, 1e-9);
  const finer = niceStep(reach, 5, [1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 8]);
  const step = log ? Math.max(finer, 0.05) : finer;
  return {
    edges: Array.from({ length: 11 }, (_, k) => (log ? 2 ** ((k - 5) * step) : (k - 5) * step)),
    classOf: (value) => `d${clip(Math.floor(position(value) / step + 5))}`,
    prefix: "d",
  };
}

const heat = { cell: 20, height: 22, cursor: null, scale: null, measure: null };

function drawHeat(merged, measure) {
  heat.measure = measure;
  heat.scale = colourScale(measure);
  const box = $("heat");
  const labels = Math.min(LABELS + 8, widthOf(box) * 0.36);
  const room = (box.clientWidth || 900) - labels - 4;
  heat.cell = Math.max(11, Math.min(34, Math.floor(room / (grid.columns.length || 1))));
  const top = 4;
  const body = grid.rows.length * heat.height;
  const bars = 30;
  const prefixes = [];
  grid.columns.forEach((column, number) => {
    const before = prefixes[prefixes.length - 1];
    if (before?.prefix === column.prefix) before.to = number;
    else prefixes.push({ prefix: column.prefix, from: number, to: number });
  });
  const named = prefixes.filter((part) => part.prefix !== null);
  const height = top + body + bars + 40;
  const side = draw("svg", { width: labels, height, "aria-hidden": "true" });
  grid.rows.forEach((row, number) => {
    side.append(draw("text", { class: "name", x: labels - 10, y: top + number * heat.height + 15, "text-anchor": "end" }, draw("title", {}, shown(row.label)), fitted(row.label, labels - 12)));
  });
  side.append(
    draw("text", { x: labels - 10, y: top + body + bars - 6, "text-anchor": "end" }, "share merged"),
    draw("text", { x: labels - 10, y: top + body + bars + 14, "text-anchor": "end" }, "layer"),
  );
  const width = grid.columns.length * heat.cell + 2;
  const svg = draw("svg", { width, height, viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": `${measure.label} of ${plural(N, "module")}, by layer and module type` });
  for (let row = 0; row < grid.rows.length; row++) {
    for (let column = 0; column < grid.columns.length; column++) {
      const key = row * grid.columns.length + column;
      const members = grid.cells.get(key);
      if (!members) continue;
      const value = median(known(members, measure.column));
      svg.append(draw("rect", {
        class: value === value ? heat.scale.classOf(value) : "void",
        x: column * heat.cell + 0.5, y: top + row * heat.height + 0.5, width: heat.cell - 1, height: heat.height - 1, "data-tip": key,
      }));
    }
  }
  const every = Math.ceil(26 / heat.cell);
  grid.columns.forEach((column, number) => {
    const last = number === grid.columns.length - 1;
    const place = number - (prefixes.find((part) => number <= part.to)?.from ?? 0);
    if (place % every === 0 || (last && column.prefix === null)) {
      svg.append(draw("text", { x: (number + 0.5) * heat.cell, y: top + body + bars + 14, "text-anchor": "middle" }, fitted(column.label, Math.max(heat.cell * every, 26))));
    }
  });
  for (const part of named) {
    if (named.length < 2) break;
    svg.append(draw("text", { x: ((part.from + part.to + 1) / 2) * heat.cell, y: top + body + bars + 30, "text-anchor": "middle" }, fitted(part.prefix.replace(/\.$/, ""), Math.max((part.to - part.from + 1) * heat.cell, 24))));
  }
  svg.append(draw("g", { id: "heat-marks", "pointer-events": "none" }), draw("rect", { id: "heat-cursor", class: "cursor", width: heat.cell, height: heat.height, visibility: "hidden" }));
  const scroll = tag("div", { tabindex: 0, role: "group", "aria-label": "Heat map: arrow keys move from cell to cell", "aria-describedby": "heat-detail" }, svg);
  scroll.addEventListener("keydown", (event) => moveCursor(event));
  scroll.addEventListener("focus", () => moveCursor(null));
  scroll.addEventListener("blur", () => $("heat-cursor").setAttribute("visibility", "hidden"));
  scroll.addEventListener("click", (event) => {
    const key = event.target.dataset?.tip;
    if (key !== undefined) placeCursor(Number(key));
  });
  box.replaceChildren(side, scroll);
  tips(scroll, (key) => describeCell(key));
  drawLegend();
  markHeat(merged);
}

// What changes with the rule: a bar at the foot of a cell, as long as the share that is merged.
function markHeat(merged) {
  heat.merged = merged;
  const marks = $("heat-marks");
  if (!marks) return;
  const found = [];
  const ofColumn = grid.columns.map(() => [0, 0]);
  for (const [key, members] of grid.cells) {
    const column = key % grid.columns.length;
    const row = Math.floor(key / grid.columns.length);
    let count = 0;
    for (const i of members) count += merged[i];
    ofColumn[column][0] += count;
    ofColumn[column][1] += members.length;
    if (!count) continue;
    const width = Math.max(((heat.cell - 5) * count) / members.length, 1.5);
    found.push(draw("rect", { class: "mark", x: column * heat.cell + 2.5, y: 4 + (row + 1) * heat.height - 7, width: width.toFixed(1), height: 4 }));
  }
  const bottom = 4 + grid.rows.length * heat.height + 26;
  ofColumn.forEach(([count, all], column) => {
    const height = all ? (22 * count) / all : 0;
    found.push(
      draw("rect", { class: "band", x: column * heat.cell + 1, y: bottom - 22, width: heat.cell - 2, height: 22 }),
      draw("rect", { class: "merge", x: column * heat.cell + 1, y: (bottom - height).toFixed(1), width: heat.cell - 2, height: height.toFixed(1) }),
    );
  });
  marks.replaceChildren(...found);
}

function describeCell(key) {
  const members = grid.cells.get(key);
  if (!members) return [tag("b", {}, "no module here")];
  if (members.length === 1) return describe(members[0], heat.merged);
  const row = grid.rows[Math.floor(key / grid.columns.length)];
  const column = grid.columns[key % grid.columns.length];
  const values = known(members, heat.measure.column);
  const [least, most] = rangeOf([values]);
  const count = members.reduce((sum, i) => sum + heat.merged[i], 0);
  const format = heat.measure.format;
  return [
    tag("b", {}, `${shown(row.label)}, ${shown(column.name)}${column.of.length > 1 ? " and those after it" : ""}`),
    ` · ${plural(members.length, "module")} · ${values.length ? `${heat.measure.label} ${format(median(values))} in the median, ${format(least)} to ${format(most)}` : `${heat.measure.label} undefined`} · ${whole(count)} to merge`,
  ];
}

function placeCursor(key) {
  heat.cursor = key;
  const column = key % grid.columns.length;
  const row = Math.floor(key / grid.columns.length);
  const cursor = $("heat-cursor");
  cursor.setAttribute("x", column * heat.cell);
  cursor.setAttribute("y", 4 + row * heat.height);
  cursor.setAttribute("visibility", "visible");
  const scroll = cursor.ownerSVGElement.parentElement;
  if (column * heat.cell < scroll.scrollLeft) scroll.scrollLeft = column * heat.cell - 20;
  if ((column + 1) * heat.cell > scroll.scrollLeft + scroll.clientWidth) scroll.scrollLeft = (column + 1) * heat.cell - scroll.clientWidth + 20;
  $("heat-detail").replaceChildren(...describeCell(key));
}

function moveCursor(event) {
  const [rows, columns] = [grid.rows.length, grid.columns.length];
  if (!rows || !columns) return;
  if (!event) {
    if ($("heat").querySelector(":focus-visible")) placeCursor(heat.cursor ?? 0);
    return;
  }
  let row = Math.floor((heat.cursor ?? 0) / columns);
  let column = (heat.cursor ?? 0) % columns;
  const moves = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0], Home: [0, -columns], End: [0, columns] };
  if (!moves[event.key]) return;
  event.preventDefault();
  row = Math.max(0, Math.min(rows - 1, row + moves[event.key][0]));
  column = Math.max(0, Math.min(columns - 1, column + moves[event.key][1]));
  placeCursor(row * columns + column);
}

function drawLegend() {
  const { edges, prefix } = heat.scale;
  const step = 46;
  const svg = draw("svg", { width: 10 * step + 170, height: 32, role: "img", "aria-label": `Colours from ${heat.measure.format(edges[0])} to ${heat.measure.format(edges[10])}` });
  for (let k = 0; k < 10; k++) svg.append(draw("rect", { class: `${prefix}${k}`, x: 26 + k * step, y: 2, width: step - 1, height: 10 }));
  edges.forEach((edge, k) => {
    if (k % 2 === 0) svg.append(draw("text", { x: 26 + k * step, y: 26, "text-anchor": "middle" }, heat.measure.format(Math.abs(edge) < 1e-12 ? 0 : edge)));
  });
  svg.append(
    draw("rect", { class: "mark", x: 10 * step + 58, y: 5, width: 14, height: 4 }),
    draw("text", { x: 10 * step + 80, y: 12 }, "to merge"),
  );
  $("heat-legend").replaceChildren(svg);
}
