// A sweep: candidates in the plane of two metrics, those that no other beats, and a table.

function drawSweep() {
  const sweep = DATA.sweep;
  const { metrics, candidates } = sweep;
  for (const [id, start] of [["sweep-x", 0], ["sweep-y", Math.min(1, metrics.length - 1)]]) {
    metrics.forEach((metric, number) => $(id).append(tag("option", { value: number }, shown(metric.name, 60))));
    $(id).value = start;
    $(id).addEventListener("input", plotSweep);
  }
  const headers = [{ text: "candidate" }, ...metrics.map((metric) => ({ text: `${shown(metric.name, 40)} ${metric.maximise ? "↑" : "↓"}`, number: true })), { text: "" }];
  const rows = candidates.map((candidate) => [
    shown(candidate.name, 80),
    ...candidate.values.map((value) => (value === null ? "–" : sign(String(Number(value.toPrecision(5)))))),
    candidate.problem ? { text: shown(candidate.problem, 120), class: "text none" } : candidate.control ? { text: "control", class: "text keep" } : candidate.pareto ? { text: "Pareto", class: "text merge" } : "",
  ]);
  simpleTable($("sweep-table"), headers, rows);
  tips($("sweep-plot"), (number) => describeCandidate(candidates[number]));
  $("sweep-plot").addEventListener("click", (event) => {
    const number = event.target.dataset?.tip;
    if (number === undefined) return;
    const candidate = candidates[Number(number)];
    $("sweep-detail").replaceChildren(...describeCandidate(candidate), ...(candidate.command ? [tag("pre", {}, shown(candidate.command, 4000))] : []));
  });
  plotSweep();
}

function describeCandidate(candidate) {
  const values = DATA.sweep.metrics.map((metric, k) => (candidate.values[k] === null ? null : `${shown(metric.name, 40)} ${sign(String(Number(candidate.values[k].toPrecision(5))))}`));
  const settings = Object.entries(candidate.settings).map(([name, value]) => `${shown(name)} ${shown(value)}`);
  const kind = candidate.problem ? [shown(candidate.problem)] : candidate.control ? ["a control"] : candidate.pareto ? ["in the Pareto set"] : [];
  return [tag("b", {}, shown(candidate.name)), ` · ${[...values.filter(Boolean), ...settings, ...kind].join(" · ")}`];
}

// Those of the points that no other beats in both of the metrics that are drawn, from left to right.
function frontOf(found, maximiseX, maximiseY) {
  const better = (a, b) => (maximiseX ? b.x - a.x : a.x - b.x) || (maximiseY ? b.y - a.y : a.y - b.y);
  const front = [];
  for (const point of [...found].sort(better)) {
    const last = front[front.length - 1];
    if (!last || (maximiseY ? point.y > last.y : point.y < last.y)) front.push(point);
  }
  return front.sort((a, b) => a.x - b.x || a.y - b.y);
}

function plotSweep() {
  const { metrics, candidates } = DATA.sweep;
  const [across, up] = [Number($("sweep-x").value), Number($("sweep-y").value)];
  const found = [];
  candidates.forEach((candidate, number) => {
    if (!candidate.problem && candidate.values[across] !== null && candidate.values[up] !== null) found.push({ number, candidate, x: candidate.values[across], y: candidate.values[up] });
  });
  const box = $("sweep-plot");
  const width = widthOf(box);
  const height = Math.min(440, Math.max(280, width * 0.55));
  const [left, right, top, bottom] = [58, width - 16, 12, height - 46];
  const domain = (values) => {
    const [least, most] = rangeOf([values]);
    const room = 0.06 * Math.max(most - least, Math.abs(most) * 1e-3, 1e-9);
    const ends = [least - room, most + room];
    // What is never negative has no axis below zero.
    return least >= 0 && ends[0] < 0 ? [0, ends[1]] : ends;
  };
  const [dx, dy] = [domain(found.map((point) => point.x)), domain(found.map((point) => point.y))];
  const x = (value) => left + ((value - dx[0]) / (dx[1] - dx[0])) * (right - left);
  const y = (value) => bottom - ((value - dy[0]) / (dy[1] - dy[0])) * (bottom - top);
  const arrow = (metric) => `${shown(metric.name, 50)} (${metric.maximise ? "more is better" : "less is better"})`;
  const svg = draw("svg", { width, height, viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": `Candidates by ${arrow(metrics[across])} and ${arrow(metrics[up])}` });
  for (const tick of ticks(dy[0], dy[1], 5)) {
    svg.append(draw("line", { class: "grid", x1: left, x2: right, y1: y(tick), y2: y(tick) }), draw("text", { x: left - 8, y: y(tick) + 4, "text-anchor": "end" }, axisLabel(tick)));
  }
  bottomAxis(svg, bottom, x, dx, arrow(metrics[across]));
  svg.append(draw("text", { class: "name", x: 14, y: (top + bottom) / 2, transform: `rotate(-90 14 ${(top + bottom) / 2})`, "text-anchor": "middle" }, arrow(metrics[up])));
  const front = frontOf(found.filter((point) => !point.candidate.control), metrics[across].maximise, metrics[up].maximise);
  if (front.length > 1) svg.append(draw("path", { class: "front", d: front.map((point, k) => `${k ? "L" : "M"}${x(point.x).toFixed(1)} ${y(point.y).toFixed(1)}`).join("") }));
  for (const point of found) {
    const at = { "data-tip": point.number };
    if (point.candidate.control) svg.append(draw("rect", { class: "control", x: x(point.x) - 4.5, y: y(point.y) - 4.5, width: 9, height: 9, ...at }));
    else svg.append(draw("circle", { class: `dot ${point.candidate.pareto ? "merge" : "keep"}`, cx: x(point.x), cy: y(point.y), r: point.candidate.pareto ? 6 : 4.5, ...at }));
  }
  placeLabels(svg, found, x, y, { left, right, top, bottom });
  box.replaceChildren(svg);
  const failed = candidates.filter((candidate) => candidate.problem).length;
  caption("sweep-caption", `${shown(metrics[across].name, 60)} and ${shown(metrics[up].name, 60)}`, `Each point is a candidate: orange are those that no other candidate beats in all metrics, squares are controls, which stand for comparison. The line joins those that none beats in these two metrics${failed ? `; ${plural(failed, "candidate")} could not be judged` : ""}. Values are single measurements unless the judge says otherwise.`);
}

// Names beside the points that matter, where there is room for them.
function placeLabels(svg, found, x, y, room) {
  const taken = found.map((point) => [x(point.x) - 6, y(point.y) - 6, x(point.x) + 6, y(point.y) + 6]);
  const rank = (point) => (point.candidate.control ? 1 : point.candidate.pareto ? 0 : 2);
  for (const point of [...found].sort((a, b) => rank(a) - rank(b)).slice(0, 60)) {
    const text = shown(point.candidate.name, 30);
    const width = text.length * 6.1;
    for (const [dx, dy] of [[9, 4], [-9 - width, 4], [-width / 2, -10], [-width / 2, 19]]) {
      const box = [x(point.x) + dx, y(point.y) + dy - 10, x(point.x) + dx + width, y(point.y) + dy + 3];
      const free = box[0] > room.left && box[2] < room.right + 10 && box[1] > room.top - 8 && box[3] < room.bottom
        && taken.every((other) => box[2] < other[0] || box[0] > other[2] || box[3] < other[1] || box[1] > other[3]);
      if (!free) continue;
      taken.push(box);
      svg.append(draw("text", { x: box[0], y: box[1] + 10, "pointer-events": "none" }, text));
      break;
    }
  }
}
