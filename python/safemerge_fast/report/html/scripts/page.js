// The page: what is shown, and what follows the rule.

const start = N ? startRule() : null;
const state = { rule: start && { ...start }, merged: reported, pending: 0 };

function lead() {
  const text = [];
  if (N) {
    const merged = tally(reported);
    const undefinedCount = rho.reduce((sum, value) => sum + (value !== value), 0);
    text.push(`${DATA.kind === "merge" ? "Merged" : "By the rule given"}: ${whole(merged.modules)} of ${plural(N, "module")} in ${whole(merged.layers)} of ${plural(layers.length, "layer")}${Number.isFinite(merged.update) ? `, which hold ${percent(1)(merged.update)} of the squared norm of the update` : ""}.`);
    const near = z.reduce((sum, value) => sum + (Math.abs(value) < 2), 0);
    const withZ = z.reduce((sum, value) => sum + (value === value), 0);
    if (withZ) text.push(`Of ${whole(withZ)}, ${whole(near)} lie within two standard deviations of chance.`);
    const rounded = rounding.reduce((sum, value) => sum + (value >= 0.25), 0);
    if (rounded) text.push(`In ${whole(rounded)}, what alignment changed is near the rounding of the dtypes.`);
    if (undefinedCount) text.push(`${whole(undefinedCount)} ${undefinedCount === 1 ? "has" : "have"} no ρ.`);
  } else if (DATA.sweep) {
    const judged = DATA.sweep.candidates.filter((candidate) => !candidate.problem);
    text.push(`${plural(judged.filter((candidate) => !candidate.control).length, "candidate")} and ${plural(judged.filter((candidate) => candidate.control).length, "control")} were judged by ${plural(DATA.sweep.metrics.length, "metric")}; ${whole(judged.filter((candidate) => candidate.pareto).length)} are in the Pareto set.`);
  } else {
    text.push("No module was analysed.");
  }
  $("lead").textContent = text.join(" ");
}

function provenance() {
  if (DATA.roles?.length) {
    const sampled = DATA.roles.some((role) => role.sample);
    const headers = [{ text: "role" }, { text: "model" }, { text: "files", number: true }, { text: "size", number: true }, ...(sampled ? [{ text: "digest of a sample" }] : [])];
    simpleTable($("roles"), headers, DATA.roles.map((role) => [role.role, shown(role.model), whole(role.files), bytes(role.bytes), role.sample ?? "–"].slice(0, headers.length)));
  }
  const pairs = (id, rows) => $(id).replaceChildren(...rows.flatMap(([name, value]) => [tag("dt", {}, shown(name)), tag("dd", {}, shown(value, 1000))]));
  pairs("facts", DATA.facts);
  pairs("settings", DATA.settings.map(([name, value, isDefault]) => [name, `${value}${isDefault ? " (default)" : ""}`]));
  $("settings").parentElement.hidden = !DATA.settings.length;
  if (DATA.repeat) {
    $("repeat-box").hidden = false;
    $("repeat").textContent = shown(DATA.repeat, 8000);
  }
  $("notes").replaceChildren(...DATA.notes.map((note) => tag("li", {}, shown(note, 1000))));
  $("footer").textContent = `Made by ${DATA.program}. This page is one file and loads nothing else.`;
  if (DATA.reference) $("reference").textContent = DATA.reference;
  if (DATA.warnings.length) {
    $("warnings").hidden = false;
    const most = 8;
    const items = DATA.warnings.map((warning) => tag("li", {}, shown(warning, 1000)));
    $("warning-list").replaceChildren(...items.slice(0, most));
    if (items.length > most) {
      $("warnings").append(tag("details", {}, tag("summary", {}, `${whole(items.length - most)} more`), tag("ul", {}, items.slice(most, 500)), items.length > 500 ? tag("p", { class: "note" }, "The rest stands in the JSON.") : ""));
    }
  }
}

function offerRules() {
  const offered = [...(RULES[start.kind].given ? [start.kind] : []), ...DATA.offered.filter((kind) => RULES[kind])];
  $("save").hidden = !DATA.offered.includes("modules");
  for (const kind of offered) $("kind").append(tag("option", { value: kind }, RULES[kind].label));
  $("per-type-label").hidden = !DATA.offered.includes("per_type");
  $("kind").addEventListener("input", () => {
    const kind = $("kind").value;
    const rule = { ...state.rule, kind, perType: RULES[kind].rank ? state.rule.perType : false };
    const merged = tally(state.merged).modules;
    const share = N ? merged / N : 0;
    // Begins where about as much is merged as now.
    rule.value = { threshold: DATA.rule.threshold, null: 1, z: 0, lowest: merged, fraction: Number(share.toFixed(2)) }[kind];
    if (kind === start.kind) rule.value = start.value;
    if (kind === "lowest") rule.value = Math.min(rule.value, domainOf(rule).most);
    setRule(rule, true);
  });
  const take = (text, source) => {
    const value = Number(text);
    if (text === "" || !Number.isFinite(value)) return;
    setRule({ ...state.rule, value }, false, source);
  };
  $("slider").addEventListener("input", () => take($("slider").value, "slider"));
  $("value").addEventListener("input", () => {
    if ($("value").validity.valid) take($("value").value, "value");
  });
  $("value").addEventListener("change", () => setRule(state.rule, false));
  const regroup = (change) => {
    const rule = { ...state.rule, ...change };
    if (rule.kind === "lowest") rule.value = Math.min(rule.value, domainOf(rule).most);
    setRule(rule, true);
  };
  $("per-type").addEventListener("input", () => regroup({ perType: $("per-type").checked }));
  $("by-layer").addEventListener("input", () => regroup({ byLayer: $("by-layer").checked, perType: false }));
  $("undefined").addEventListener("input", () => setRule({ ...state.rule, keepUndefined: $("undefined").value === "keep" }, true));
  $("reset").addEventListener("click", () => setRule({ ...start }, true));
  $("rule").addEventListener("submit", (event) => event.preventDefault());
  $("copy").addEventListener("click", copyCommand);
  $("save").addEventListener("click", saveList);
}

// Shows a rule: controls at once, figures with the next frame.
function setRule(rule, isNew, source) {
  state.rule = rule;
  const { least, most, step } = domainOf(rule);
  const slider = $("slider");
  const valueBox = $("value");
  slider.min = least;
  slider.max = most;
  slider.step = step;
  if (source !== "slider") slider.value = rule.value;
  if (source !== "value") valueBox.value = rule.value;
  valueBox.step = RULES[rule.kind].rank && rule.kind === "lowest" ? 1 : "any";
  valueBox.min = rule.kind === "z" ? "" : 0;
  valueBox.max = rule.kind === "null" || rule.kind === "z" ? "" : most;
  slider.setAttribute("aria-valuetext", `${RULES[rule.kind].value} = ${rule.value}`);
  $("kind").value = rule.kind;
  $("value-label").textContent = RULES[rule.kind].value;
  $("per-type").checked = rule.perType;
  $("per-type").disabled = !RULES[rule.kind].rank || rule.byLayer;
  $("by-layer").checked = rule.byLayer;
  for (const control of [slider, valueBox, $("undefined"), $("by-layer")]) control.disabled = Boolean(RULES[rule.kind].given);
  $("undefined").value = rule.keepUndefined ? "keep" : "merge";
  state.isNew = state.isNew || isNew;
  if (state.pending) return;
  state.pending = requestAnimationFrame(() => {
    state.pending = 0;
    const fresh = state.isNew;
    state.isNew = false;
    apply(fresh);
  });
}

// How many modules have an interval that the boundary lies in.
function reachesAcross(rule) {
  const axis = Object.values(AXES).find((found) => found.kind === rule.kind);
  if (!axis || rule.byLayer) return 0;
  let count = 0;
  for (let i = 0; i < N; i++) count += axis.low(i) < rule.value && rule.value <= axis.high(i) ? 1 : 0;
  return count;
}

function apply(fresh) {
  const { rule } = state;
  state.merged = decide(rule);
  const counts = tally(state.merged);
  const tile = (value, text) => tag("div", { class: "tile" }, tag("b", {}, value), tag("span", {}, text));
  $("counts").replaceChildren(
    tile(`${whole(counts.modules)} of ${whole(N)}`, `modules (${percent(1)(N ? counts.modules / N : NaN)})`),
    tile(percent(1)(counts.update), "of ‖Δ‖², the squared update"),
    tile(`${whole(counts.layers)} of ${whole(layers.length)}`, "layers touched"),
    tile(whole(counts.ofType.filter(Boolean).length) + ` of ${whole(types.length)}`, "module types touched"),
  );
  let [added, removed] = [0, 0];
  for (let i = 0; i < N; i++) {
    added += state.merged[i] && !reported[i] ? 1 : 0;
    removed += !state.merged[i] && reported[i] ? 1 : 0;
  }
  const open = reachesAcross(rule);
  const subject = DATA.kind === "merge" ? "what was merged" : "the rule that the report began with";
  $("difference").textContent = added || removed ? `Beside ${subject}: ${whole(added)} more, ${whole(removed)} fewer.` : `The same modules as ${subject}.`;
  if (open) $("difference").append(` Of ${plural(open, "module")} the interval reaches across ${RULES[rule.kind].value}; a merge measures ${open === 1 ? "it" : "them"} further.`);
  $("command").textContent = shown(`${DATA.command[0]} ${commandWords(rule)} ${DATA.command[1]}`, 8000);
  if (fresh) drawCurve(rule);
  markCurve(rule);
  if (!heat.measure) redrawHeat();
  else markHeat(state.merged);
  drawStrips(rule, state.merged, $("axis").value);
  drawTypes(state.merged, counts);
  markTable(state.merged);
}

function redrawHeat() {
  const measure = MEASURES[$("measure").value];
  drawHeat(state.merged, measure);
  const medians = [...grid.cells.values()].some((members) => members.length > 1);
  caption("heat-caption", `${measure.label} by layer and module type`, `Colours show ${measure.about}. A dark bar at the foot of a cell marks what the rule above merges${medians ? ", as long as the share of its modules; cells of several modules, such as experts, show their median" : ""}. Dashed cells are undefined. Below, the share of each layer's modules that is merged.`);
}

async function copyCommand() {
  const text = $("command").textContent;
  let done = true;
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    getSelection().selectAllChildren($("command"));
    done = document.execCommand?.("copy") ?? false;
  }
  $("said").textContent = done ? "Copied." : "Selected; copy it with the keyboard.";
}

// One name a line; a list in JSON where a line would not be read as the name that it is.
const NO_LINE = /[\n\r\v\f\x1c-\x1e\x85\u2028\u2029]|^\s|\s$|^#|^$|\p{Cs}/u;
function listOfModules() {
  const found = names.filter((_, i) => state.merged[i]);
  return found.some((name) => NO_LINE.test(name)) ? { file: "modules.json", text: JSON.stringify(found, null, 1) } : { file: "modules.txt", text: found.map((name) => `${name}\n`).join("") };
}

function saveList() {
  const { file, text } = listOfModules();
  const link = tag("a", { href: URL.createObjectURL(new Blob([text], { type: "text/plain" })), download: file });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
  $("said").textContent = `${plural(state.merged.reduce((sum, value) => sum + value, 0), "name")} in ${file}, for merge --modules.`;
}

function theme() {
  const root = document.documentElement;
  const dark = () => (root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches);
  const label = () => ($("theme").textContent = dark() ? "Light" : "Dark");
  $("theme").setAttribute("aria-label", "Change between light and dark");
  $("theme").addEventListener("click", () => {
    root.dataset.theme = dark() ? "light" : "dark";
    label();
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", label);
  label();
}

function redrawAll() {
  if (N) {
    drawCurve(state.rule);
    markCurve(state.rule);
    redrawHeat();
    drawStrips(state.rule, state.merged, $("axis").value);
  }
  drawSurvival();
  if (DATA.sweep) plotSweep();
}

theme();
lead();
$("survival").hidden = !DATA.survival;
$("sweep").hidden = !DATA.sweep;
provenance();
if (N) {
  for (const id of ["choice", "layers", "types", "modules", "method"]) $(id).hidden = false;
  const measured = Object.entries(MEASURES).filter(([, measure]) => measure.column.some(Number.isFinite));
  for (const [key, measure] of measured.length ? measured : [["rho", MEASURES.rho]]) $("measure").append(tag("option", { value: key }, measure.label));
  for (const [key, axis] of Object.entries(AXES)) if (key === "rho" || axis.column.some(Number.isFinite)) $("axis").append(tag("option", { value: key }, axis.label));
  $("measure").addEventListener("input", redrawHeat);
  $("axis").addEventListener("input", () => drawStrips(state.rule, state.merged, $("axis").value));
  tips($("strips"), (i) => describe(i, state.merged));
  offerRules();
  prepareTable();
  $("kind").value = start.kind;
  state.isNew = true;
  setRule({ ...start }, true);
  arrange();
}
if (DATA.sweep) drawSweep();
drawSurvival();

let drawnWidth = innerWidth;
addEventListener("resize", () => {
  if (innerWidth === drawnWidth) return;
  drawnWidth = innerWidth;
  schedule(redrawAll);
});
// On paper there is no scrolling: short tables are printed whole.
addEventListener("beforeprint", () => {
  table.all = N > 0 && table.rows.length <= 2000;
  if (N) showRows();
});
addEventListener("afterprint", () => {
  table.all = false;
  if (N) showRows();
});
