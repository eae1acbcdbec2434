// The figures that follow the rule: what each value of it would merge, types beside chance, counts; and survival.

// Share of modules and of the squared update over the values of the rule.
function drawCurve(rule) {
  const box = $("curve");
  const width = widthOf(box);
  const [left, right, top, bottom] = [46, width - 92, 8, 148];
  const domain = domainOf(rule);
  const most = Math.max(domain.most, domain.least + 1e-9);
  const x = (value) => left + ((value - domain.least) / (most - domain.least)) * (right - left);
  const y = (share) => bottom - share * (bottom - top);
  const steps = 120;
  const lines = { modules: [], update: [] };
  for (let k = 0; k <= steps; k++) {
    let value = domain.least + ((most - domain.least) * k) / steps;
    if (RULES[rule.kind].rank && rule.kind === "lowest") value = Math.round(value);
    const found = tally(decide({ ...rule, value }));
    lines.modules.push([x(value), y(N ? found.modules / N : 0)]);
    lines.update.push([x(value), y(found.update || 0)]);
  }
  const svg = draw("svg", { width, height: bottom + 42, viewBox: `0 0 ${width} ${bottom + 42}`, role: "img", "aria-label": "Share of modules and of the squared update that each value of the rule would merge" });
  for (const share of [0, 0.25, 0.5, 0.75, 1]) {
    svg.append(draw("line", { class: "grid", x1: left, x2: right, y1: y(share), y2: y(share) }), draw("text", { x: left - 8, y: y(share) + 4, "text-anchor": "end" }, `${100 * share} %`));
  }
  for (const [name, line] of Object.entries(lines)) {
    svg.append(draw("path", { class: `line ${name}`, d: line.map(([a, b], k) => `${k ? "L" : "M"}${a.toFixed(1)} ${b.toFixed(1)}`).join("") }));
  }
  // The labels stand where the lines are furthest apart.
  let apart = 0;
  lines.modules.forEach((point, k) => {
    if (Math.abs(point[1] - lines.update[k][1]) > Math.abs(lines.modules[apart][1] - lines.update[apart][1])) apart = k;
  });
  svg.append(
    draw("text", { class: "label modules", x: right + 8, y: top + 12 }, "— modules"),
    draw("text", { class: "label update", x: right + 8, y: top + 30 }, "— ‖Δ‖²"),
    draw("line", { id: "curve-at", class: "bound", y1: top, y2: bottom }),
  );
  bottomAxis(svg, bottom, x, [domain.least, most], RULES[rule.kind].value);
  box.replaceChildren(svg);
  drawCurve.x = (value) => x(Math.max(domain.least, Math.min(most, value)));
  caption("curve-caption", "What the rule would merge", `The share of the ${plural(N, "module")}, and of the squared norm of the update, Σ‖Δ‖², that each value of ${RULES[rule.kind].value} would merge${rule.byLayer ? ", for whole layers by their means" : rule.perType && RULES[rule.kind].rank ? ", ranked within each type" : ""}. The dashed line is the value chosen above.`);
}

function markCurve(rule) {
  const line = $("curve-at");
  if (!line) return;
  const at = drawCurve.x(rule.value);
  line.setAttribute("x1", at);
  line.setAttribute("x2", at);
}

const AXES = {
  rho: { label: "ρ", column: rho, low: (i) => low[i], high: (i) => high[i], kind: "threshold", chance: "the grey line is the median of ρ_null, the ρ of a random update, and the band its range with two standard deviations of chance" },
  ratio: { label: "ρ/ρ_null", column: ratio, low: (i) => low[i] / rhoNull[i], high: (i) => high[i] / rhoNull[i], kind: "null", chance: "the grey line at 1 is chance, the band two standard deviations of it" },
  z: { label: "z", column: z, low: (i) => Math.log(low[i] / rhoNull[i]) / nullSd[i], high: (i) => Math.log(high[i] / rhoNull[i]) / nullSd[i], kind: "z", chance: "the grey line at 0 is chance, the band from −2 to 2 two standard deviations of it" },
};

function chanceOf(members, axis) {
  const deviations = known(members, nullSd);
  const sd = deviations.length ? median(deviations) : NaN;
  if (axis === "z") return deviations.length ? { at: 0, from: -2, to: 2 } : null;
  if (axis === "ratio") return known(members, rhoNull).length ? { at: 1, from: Math.exp(-2 * sd), to: Math.exp(2 * sd) } : null;
  const found = known(members, rhoNull);
  if (!found.length) return null;
  const [least, most] = rangeOf([found]);
  const spread = Number.isFinite(sd) ? Math.exp(2 * sd) : 1;
  return { at: median(found), from: least / spread, to: Math.min(most * spread, 1) };
}

function drawStrips(rule, merged, key) {
  const axis = AXES[key];
  const rows = grid.rows.map((row) => {
    const members = row.of.length === 1 ? membersOfType[row.of[0]] : row.of.flatMap((type) => membersOfType[type]);
    return {
      label: row.label,
      items: members,
      value: (i) => axis.column[i],
      low: (i) => Math.max(axis.low(i), -1e9),
      high: axis.high,
      merged: (i) => merged[i],
      chance: chanceOf(members, key),
    };
  });
  const ends = [];
  for (const row of rows) {
    if (row.chance) ends.push(row.chance.from, row.chance.to);
    for (const i of row.items) if (Number.isFinite(axis.column[i])) ends.push(axis.column[i], axis.high(i));
  }
  const threshold = rule.kind === axis.kind && !rule.byLayer ? rule.value : NaN;
  if (rule.kind === "null" && key === "rho" && !rule.byLayer) {
    for (const row of rows) row.bound = rule.value * (row.chance?.at ?? NaN);
  }
  let [least, most] = rangeOf([ends.filter(Number.isFinite)]);
  if (key !== "z") least = 0;
  const step = niceStep(Math.max(most - least, 1e-6), 6);
  const domain = [Math.floor(least / step + 1e-9) * step, Math.ceil(most / step - 1e-9) * step];
  const text = `${axis.label} of the modules of each type beside chance`;
  strips($("strips"), { rows, domain, title: axis.label, bound: threshold >= domain[0] && threshold <= domain[1] ? threshold : NaN, label: text });
  const estimated = high.some((value, i) => value > low[i]);
  const many = rows.some((row) => row.items.length > MOST_POINTS);
  caption("strips-caption", text, `Each point is a module: orange is merged by the rule above, blue kept${estimated ? "; lines through points are intervals" : ""}${many ? `; types of more than ${MOST_POINTS} modules are histograms` : ""}. In each row ${axis.chance}. Numbers at the right count the modules that have ${axis.label}.`);
}

function drawTypes(merged, counts) {
  const number = true;
  const headers = [
    { text: "module type" }, { text: "modules", number }, { text: "merge", number }, { text: "share of ‖Δ‖² merged", number },
    { text: "median ρ", number }, { text: "range of ρ", number }, { text: "median ρ_null", number }, { text: "median ρ/ρ_null", number }, { text: "median z", number },
    { text: "median ‖Δ‖/‖W‖", number },
  ];
  const line = (label, members, count, update) => {
    const values = known(members, rho);
    const all = members.reduce((sum, i) => sum + squares[i], 0);
    const [least, most] = rangeOf([values]);
    return [
      label, whole(members.length), { text: whole(count), class: count ? "merge" : "none" }, percent(1)(all ? update / all : NaN),
      fixed(3)(median(values)), values.length ? `${fixed(3)(least)} to ${fixed(3)(most)}` : "–",
      fixed(3)(median(known(members, rhoNull))), times(median(known(members, ratio))), fixed(1)(median(known(members, z))), percentShort(median(known(members, relative))),
    ];
  };
  const rows = grid.rows.map((row) => {
    const sum = (column) => row.of.reduce((total, type) => total + column[type], 0);
    return line(shown(row.label, 60), row.of.flatMap((type) => membersOfType[type]), sum(counts.ofType), sum(counts.updateOfType));
  });
  const foot = ["all", whole(N), whole(counts.modules), percent(1)(counts.update), "", "", "", "", "", ""];
  simpleTable($("type-table"), headers, rows, rows.length > 1 ? foot : null);
}

// The share of each change that is stored, of tensors that were quantised again.
function drawSurvival() {
  const found = DATA.survival;
  if (!found) return;
  const groups = new Map();
  found.types.forEach((type, i) => {
    const label = `${type}, ${found.formats[i]}`;
    if (!groups.has(label)) groups.set(label, []);
    groups.get(label).push(i);
  });
  const rows = [...groups].slice(0, MOST_TYPES).map(([label, items]) => ({ label, items, value: (i) => found.shares[i], merged: (i) => found.merged[i] }));
  const [, most] = rangeOf([found.shares]);
  const box = $("survival-plot");
  strips(box, { rows, domain: [0, Math.max(1, Math.ceil(most * 10) / 10)], title: "‖Q(W′) − W‖ / ‖W′ − W‖", bound: 0.5, label: "Share of each change that is stored, by module type and format" });
  if (!drawSurvival.told) tips(box, (i) => [tag("b", {}, shown(found.names[i])), ` · ${percent(1)(found.shares[i])} of the change is stored, as ${shown(found.formats[i])}`]);
  drawSurvival.told = true;
  const lost = found.shares.filter((share) => share < 0.5).length;
  caption("survival-caption", "What survives quantisation", `${plural(found.names.length, "tensor")} of quantised formats were changed and quantised again. Each point is a tensor: the size of the change that is stored, ‖Q(W′) − W‖, relative to the change that was computed, ‖W′ − W‖. Of ${whole(lost)} less than half is stored (dashed line)${groups.size > MOST_TYPES ? `; the first ${MOST_TYPES} of ${groups.size} kinds are drawn` : ""}.`);
}

// Figures are numbered as they stand on the page.
function caption(id, title, text) {
  const shownCaptions = [...document.querySelectorAll("figcaption")].filter((found) => !found.closest("[hidden]"));
  $(id).replaceChildren(tag("b", {}, `Figure ${shownCaptions.indexOf($(id)) + 1}. ${title}.`), ` ${text}`);
}
