// The decision, as the program makes it: strictly below a boundary, or the lowest of a rank; ties by name.

const RULES = {
  threshold: { label: "ρ below τ", value: "τ", column: rho, command: (v) => ["--threshold", v] },
  null: { label: "ρ/ρ_null below K", value: "K", column: ratio, command: (v) => ["--select", `null:${v}`] },
  z: { label: "z below K", value: "K", column: z, command: (v) => ["--select", `z:${v}`] },
  lowest: { label: "the N of lowest ρ", value: "N", column: rho, rank: true, command: (v) => ["--select", `lowest:${v}`] },
  fraction: { label: "the share F of lowest ρ", value: "F", column: rho, rank: true, command: (v) => ["--select", `fraction:${v}`] },
  // What was merged by a list: no value chooses, the report's decisions stand.
  list: { label: "the list that was given", value: "", column: rho, given: true, command: () => ["--modules", "modules.txt"] },
};

function startRule() {
  const told = DATA.rule;
  const [kind, amount] = told.select.split(":");
  return {
    kind,
    value: amount === undefined ? told.threshold : Number(amount),
    perType: told.perType,
    byLayer: told.granularity === "layer",
    keepUndefined: told.onUndefined === "keep",
  };
}

// The sum without rounding between (Shewchuk), as Python's math.fsum: means must not differ in their last bit.
function exactSum(values) {
  if (!values.every(Number.isFinite)) return values.reduce((sum, x) => sum + x, 0);
  const partials = [];
  for (let x of values) {
    let kept = 0;
    for (let y of partials) {
      if (Math.abs(x) < Math.abs(y)) [x, y] = [y, x];
      const sum = x + y;
      const rest = y - (sum - x);
      if (rest) partials[kept++] = rest;
      x = sum;
    }
    partials.length = kept;
    partials.push(x);
  }
  let place = partials.length - 1;
  if (place < 0) return 0;
  let sum = partials[place];
  let rest = 0;
  while (place > 0) {
    const x = sum;
    const y = partials[--place];
    sum = x + y;
    rest = y - (sum - x);
    if (rest) break;
  }
  if (place > 0 && ((rest < 0 && partials[place - 1] < 0) || (rest > 0 && partials[place - 1] > 0))) {
    const twice = rest * 2;
    const x = sum + twice;
    if (twice === x - sum) sum = x;
  }
  return sum;
}

// Order by code points, as Python has it; UTF-16 would put surrogates before the last of the first plane.
function compareText(a, b) {
  const length = Math.min(a.length, b.length);
  for (let i = 0; i < length; i++) {
    let x = a.charCodeAt(i);
    let y = b.charCodeAt(i);
    if (x === y) continue;
    x = x >= 0xe000 ? x - 0x800 : x >= 0xd800 ? x + 0x2000 : x;
    y = y >= 0xe000 ? y - 0x800 : y >= 0xd800 ? y + 0x2000 : y;
    return x - y;
  }
  return a.length - b.length;
}

const unitsCache = new Map();

// What shares one decision: a module, or the modules of a layer by the mean of their values.
function unitsOf(kind, byLayer) {
  const column = RULES[kind].column;
  const key = `${column === rho ? "rho" : kind} ${byLayer}`;
  if (unitsCache.has(key)) return unitsCache.get(key);
  const unitOf = new Int32Array(N);
  const unitNames = [];
  const members = [];
  if (byLayer) {
    const seen = new Map();
    for (let i = 0; i < N; i++) {
      const name = layerOf[i] >= 0 ? layers[layerOf[i]] : names[i];
      if (!seen.has(name)) {
        seen.set(name, members.length);
        unitNames.push(name);
        members.push([]);
      }
      unitOf[i] = seen.get(name);
      members[unitOf[i]].push(i);
    }
  } else {
    for (let i = 0; i < N; i++) unitOf[i] = i;
  }
  const values = byLayer
    ? Float64Array.from(members, (group) => {
        const found = known(group, column);
        return found.length ? exactSum(found) / found.length : NaN;
      })
    : column;
  const title = byLayer ? unitNames : names;
  const order = [];
  for (let u = 0; u < values.length; u++) if (values[u] === values[u]) order.push(u);
  const made = { unitOf, values, order, title, sorted: false };
  unitsCache.set(key, made);
  return made;
}

function decide(rule) {
  if (RULES[rule.kind].given) return reported;
  const units = unitsOf(rule.kind, rule.byLayer);
  const merged = new Uint8Array(units.values.length);
  if (!rule.keepUndefined) for (let u = 0; u < merged.length; u++) if (units.values[u] !== units.values[u]) merged[u] = 1;
  if (!RULES[rule.kind].rank) {
    for (const u of units.order) if (units.values[u] < rule.value) merged[u] = 1;
  } else {
    if (!units.sorted) {
      units.order.sort((a, b) => units.values[a] - units.values[b] || compareText(units.title[a], units.title[b]));
      units.sorted = true;
    }
    const perType = rule.perType && !rule.byLayer;
    const group = (u) => (perType ? typeOf[u] : 0);
    const sizes = new Array(perType ? types.length : 1).fill(0);
    for (const u of units.order) sizes[group(u)]++;
    const left = sizes.map((size) =>
      rule.kind === "lowest" ? Math.min(Math.floor(rule.value), size) : Math.floor(rule.value * size + 0.5),
    );
    for (const u of units.order) if (left[group(u)]-- > 0) merged[u] = 1;
  }
  return rule.byLayer ? Uint8Array.from(units.unitOf, (u) => merged[u]) : merged;
}

function tally(merged) {
  let modules = 0;
  let update = 0;
  const touched = new Set();
  const ofType = types.map(() => 0);
  const updateOfType = types.map(() => 0);
  for (let i = 0; i < N; i++) {
    if (!merged[i]) continue;
    modules++;
    update += squares[i];
    ofType[typeOf[i]]++;
    updateOfType[typeOf[i]] += squares[i];
    if (layerOf[i] >= 0) touched.add(layerOf[i]);
  }
  return { modules, update: allSquares ? update / allSquares : NaN, layers: touched.size, ofType, updateOfType };
}

// Values that a rule's slider runs over.
function domainOf(rule) {
  const finite = Array.from(RULES[rule.kind].column).filter(Number.isFinite);
  let least = Infinity;
  let most = -Infinity;
  for (const value of finite) {
    if (value < least) least = value;
    if (value > most) most = value;
  }
  if (!finite.length) [least, most] = [0, 1];
  switch (rule.kind) {
    case "threshold":
    case "fraction":
      return { least: 0, most: 1, step: rule.kind === "threshold" ? 0.005 : 0.01 };
    case "null":
      return { least: 0, most: Math.max(Math.ceil((most + 0.05) * 20) / 20, 1.2), step: 0.01 };
    case "z": {
      const reach = Math.max(most - least, 1);
      const step = 10 ** Math.floor(Math.log10(reach) - 2);
      return { least: Math.floor(least) - 1, most: Math.ceil(most) + 1, step: Math.max(step, 0.01) };
    }
    default: {
      const units = unitsOf(rule.kind, rule.byLayer);
      const inTypes = membersOfType.map((group) => known(group, rho).length);
      return { least: 0, most: rule.perType && !rule.byLayer ? inTypes.reduce((a, b) => Math.max(a, b), 0) : units.order.length, step: 1 };
    }
  }
}

function commandWords(rule) {
  const words = RULES[rule.kind].command(String(rule.value));
  if (RULES[rule.kind].rank && rule.perType && !rule.byLayer) words.push("--per-type");
  if (rule.byLayer) words.push("--granularity", "layer");
  if (rule.keepUndefined && !RULES[rule.kind].given) words.push("--on-undefined", "keep");
  return words.join(" ");
}
