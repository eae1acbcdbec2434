// The table of modules: rows exist only where one looks. The experts of a layer are one row that opens.

const ROW_HEIGHT = 30;

const COLUMNS = [
  { key: "name", label: "module", width: "27%", text: true },
  { key: "rho", label: "ρ", column: rho, cell: (i) => fixed(4)(rho[i]) },
  { key: "interval", label: "interval of ρ", width: "13%", column: high.map((value, i) => value - low[i]), cell: interval },
  { key: "rhoNull", label: "ρ_null", column: rhoNull, cell: (i) => fixed(4)(rhoNull[i]) },
  { key: "ratio", label: "ρ/ρ_null", column: ratio, cell: (i) => times(ratio[i]) },
  { key: "z", label: "z", column: z, cell: (i) => fixed(1)(z[i]) },
  { key: "relative", label: "‖Δ‖/‖W‖", column: relative, cell: (i) => percentShort(relative[i]) },
  { key: "cosine", label: "cos(V, Δ)", column: cosine, cell: (i) => fixed(3)(cosine[i]) },
  { key: "rounding", label: "rounding", column: rounding, cell: (i) => percentShort(rounding[i]) },
  { key: "decision", label: "decision", cell: (i) => (table.merged[i] ? "merge" : "keep") },
];

const table = {
  merged: reported, sort: "layer", direction: 1, open: new Set(), all: false, chosen: null,
  groups: [], groupOf: null, lower: null, rows: [], inner: [], members: new Map(), scheduled: false,
};

function prepareTable() {
  const seen = new Map();
  table.groupOf = new Int32Array(N).fill(-1);
  for (let i = 0; i < N; i++) {
    if (!isExpert[typeOf[i]]) continue;
    const key = `${layerOf[i]} ${typeOf[i]}`;
    if (!seen.has(key)) {
      seen.set(key, table.groups.length);
      table.groups.push([]);
    }
    table.groups[seen.get(key)].push(i);
    table.groupOf[i] = seen.get(key);
  }
  for (const [g, group] of table.groups.entries()) if (group.length < 2) table.groupOf[group[0]] = -1;
  table.lower = names.map((name) => name.toLowerCase());
  const element = $("table");
  element.querySelector("colgroup").replaceChildren(...COLUMNS.map((column) => {
    const col = document.createElement("col");
    if (column.width) col.style.width = column.width;
    return col;
  }));
  element.tHead.replaceChildren(tag("tr", { "aria-rowindex": 1 }, COLUMNS.map((column) => {
    const button = tag("button", { type: "button" }, column.label);
    button.addEventListener("click", () => {
      table.direction = table.sort === column.key ? -table.direction : 1;
      table.sort = column.key;
      arrange();
    });
    return tag("th", { scope: "col", class: column.text ? "text" : null, "data-key": column.key }, button);
  })));
  types.slice(0, 500).forEach((type, number) => $("filter-type").append(tag("option", { value: number }, shown(type, 40))));
  for (const id of ["filter", "filter-type", "filter-decision"]) $(id).addEventListener("input", () => schedule(arrange));
  const box = $("table-box");
  box.addEventListener("scroll", () => schedule(showRows));
  element.tBodies[0].addEventListener("keydown", moveInTable);
  element.tBodies[0].addEventListener("click", (event) => {
    const button = event.target.closest("button");
    const code = Number((button ?? event.target.closest("tr"))?.dataset.row);
    if (!Number.isFinite(code)) return;
    if (code < 0) fold(-code - 1);
    else choose(code);
  });
}

function schedule(work) {
  if (table.scheduled === work) return;
  table.scheduled = work;
  requestAnimationFrame(() => {
    table.scheduled = false;
    work();
  });
}

// Filters, groups and sorts; then shows what is in sight.
function arrange() {
  const wanted = $("filter").value.trim().toLowerCase();
  const type = $("filter-type").value;
  const decision = $("filter-decision").value;
  table.members = new Map();
  const entries = [];
  let count = 0;
  for (let i = 0; i < N; i++) {
    if (wanted && !table.lower[i].includes(wanted)) continue;
    if (type !== "" && typeOf[i] !== Number(type)) continue;
    if (decision !== "" && table.merged[i] !== Number(decision)) continue;
    count++;
    const group = table.groupOf[i];
    if (group < 0) {
      entries.push(i);
      continue;
    }
    if (!table.members.has(group)) {
      table.members.set(group, []);
      entries.push(-group - 1);
    }
    table.members.get(group).push(i);
  }
  const sorted = sortedBy(entries, (code) => (code < 0 ? table.members.get(-code - 1) : [code]));
  table.rows = [];
  table.inner = [];
  for (const code of sorted) {
    table.rows.push(code);
    table.inner.push(false);
    if (code >= 0 || !table.open.has(-code - 1)) continue;
    for (const i of sortedBy(table.members.get(-code - 1), (k) => [k])) {
      table.rows.push(i);
      table.inner.push(true);
    }
  }
  for (const th of $("table").tHead.rows[0].cells) {
    th.setAttribute("aria-sort", th.dataset.key === table.sort ? (table.direction > 0 ? "ascending" : "descending") : "none");
  }
  $("table").setAttribute("aria-rowcount", table.rows.length + 1);
  $("shown").textContent = `${count === N ? `All ${plural(N, "module")}` : `${whole(count)} of ${plural(N, "module")}`}${table.members.size ? `; the experts of a layer are one row that opens` : ""}.`;
  showRows();
}

function sortedBy(codes, membersOf) {
  if (table.sort === "layer") {
    // As at first: layer by layer, what is in none last, and the files' order within.
    const place = (code) => (layerOf[membersOf(code)[0]] < 0 ? Infinity : layerOf[membersOf(code)[0]]);
    return [...codes].sort((a, b) => (place(a) === place(b) ? 0 : place(a) - place(b)));
  }
  if (table.sort === "name") return [...codes].sort((a, b) => table.direction * compareText(names[membersOf(a)[0]], names[membersOf(b)[0]]));
  const column = COLUMNS.find((found) => found.key === table.sort).column ?? table.merged;
  const keyed = codes.map((code) => [code, median(known(membersOf(code), column))]);
  // What is undefined comes last, whatever the direction.
  keyed.sort(([, a], [, b]) => (a !== a ? (b !== b ? 0 : 1) : b !== b ? -1 : table.direction * (a - b)));
  return keyed.map(([code]) => code);
}

function showRows() {
  const body = $("table").tBodies[0];
  const box = $("table-box");
  const total = table.rows.length;
  const first = table.all ? 0 : Math.max(0, Math.min(Math.floor(box.scrollTop / ROW_HEIGHT) - 8, total - 1));
  const last = table.all ? total : Math.min(total, first + Math.ceil(Math.min(box.clientHeight || 540, 1600) / ROW_HEIGHT) + 18);
  const focused = body.contains(document.activeElement) ? document.activeElement.dataset.row : null;
  const rows = [];
  const space = (height) => {
    const row = tag("tr", { class: "space", "aria-hidden": "true" }, tag("td", { colspan: COLUMNS.length }));
    row.style.height = `${height}px`;
    return row;
  };
  if (first > 0) rows.push(space(first * ROW_HEIGHT));
  for (let place = first; place < last; place++) rows.push(makeRow(table.rows[place], place));
  if (last < total) rows.push(space((total - last) * ROW_HEIGHT));
  body.replaceChildren(...rows);
  if (focused) (body.querySelector(`button[data-row="${focused}"]`) ?? box).focus({ preventScroll: true });
}

function makeRow(code, place) {
  const inner = table.inner[place];
  const row = tag("tr", { "aria-rowindex": place + 2, "data-row": code, class: code >= 0 && code === table.chosen ? "chosen" : null });
  if (code < 0) {
    const group = -code - 1;
    const members = table.members.get(group);
    const first = members[0];
    const open = table.open.has(group);
    const layer = layerOf[first] >= 0 ? `${shown(layers[layerOf[first]], 60)}, ` : "";
    const button = tag("button", { type: "button", class: "fold", "aria-expanded": open, "data-row": code }, `${open ? "▾" : "▸"} ${layer}${whole(members.length)} ${shown(types[typeOf[first]], 60)}`);
    const count = members.reduce((sum, i) => sum + table.merged[i], 0);
    row.append(tag("td", { class: "text" }, button));
    for (const column of COLUMNS.slice(1, -1)) {
      const values = column.column ? known(members, column.column) : [];
      let text = values.length ? MEASURES[column.key]?.format(median(values)) ?? fixed(4)(median(values)) : "–";
      if (column.key === "interval") {
        const [least, most] = rangeOf([known(members, rho)]);
        text = values.length ? `${fixed(2)(least)} … ${fixed(2)(most)}` : "";
      }
      row.append(tag("td", { title: column.key === "interval" ? "lowest and highest ρ of these modules" : "median of these modules" }, text));
    }
    row.append(tag("td", { class: count ? "merge" : "keep" }, count === members.length ? "merge all" : count ? `merge ${whole(count)}` : "keep"));
    return row;
  }
  const name = shown(names[code], 400);
  COLUMNS.forEach((column) => {
    if (column.text) row.append(tag("td", { class: inner ? "text inner" : "text" }, tag("button", { type: "button", class: "pick", "data-row": code, title: name }, inner ? tailOf(code) : shown(names[code], 160))));
    else if (column.key === "decision") row.append(tag("td", { class: table.merged[code] ? "merge" : "keep" }, column.cell(code)));
    else row.append(tag("td", {}, column.cell(code)));
  });
  return row;
}

// The experts of a layer differ at the ends of their names.
function tailOf(code) {
  const layer = layerOf[code] >= 0 ? layers[layerOf[code]] : "";
  const name = names[code];
  return shown(layer && name.startsWith(layer) && name.length > layer.length ? `…${name.slice(layer.length)}` : name, 160);
}

function fold(group) {
  if (table.open.has(group)) table.open.delete(group);
  else table.open.add(group);
  arrange();
}

function choose(code) {
  table.chosen = code;
  $("row-detail").replaceChildren(...describe(code, table.merged));
  showRows();
}

function moveInTable(event) {
  const step = { ArrowDown: 1, ArrowUp: -1, PageDown: 15, PageUp: -15 }[event.key];
  const code = Number(document.activeElement.dataset?.row);
  if (!step || !Number.isFinite(code)) return;
  event.preventDefault();
  const place = Math.max(0, Math.min(table.rows.length - 1, table.rows.indexOf(code) + step));
  const box = $("table-box");
  const top = place * ROW_HEIGHT;
  if (top < box.scrollTop) box.scrollTop = top;
  if (top + 2 * ROW_HEIGHT > box.scrollTop + box.clientHeight - ROW_HEIGHT) box.scrollTop = top + 3 * ROW_HEIGHT - box.clientHeight;
  showRows();
  $("table").querySelector(`button[data-row="${table.rows[place]}"]`)?.focus({ preventScroll: true });
}

// The rule has changed.
function markTable(merged) {
  table.merged = merged;
  if (table.sort === "decision" || $("filter-decision").value !== "") arrange();
  else showRows();
}
