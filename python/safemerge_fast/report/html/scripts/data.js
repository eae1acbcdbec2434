// The data, decoded: columns of numbers, NaN where nothing is known.

const DATA = JSON.parse(document.getElementById("data").textContent);
const MODULES = DATA.modules ?? { count: 0, shared: [], rest: [], types: [], type: [], layers: [], layer: [], merged: [], columns: [], reason: [] };
const N = MODULES.count;

function numbers(name) {
  const column = MODULES[name] ?? [];
  const found = new Float64Array(N);
  for (let i = 0; i < N; i++) found[i] = column[i] ?? NaN;
  return found;
}

function decodeNames() {
  const names = new Array(N);
  let before = "";
  for (let i = 0; i < N; i++) {
    before = before.slice(0, MODULES.shared[i]) + MODULES.rest[i];
    names[i] = before;
  }
  return names;
}

function quotient(over, under) {
  return over.map((value, i) => (under[i] ? value / under[i] : NaN));
}

const names = decodeNames();
const types = MODULES.types;
const typeOf = MODULES.type;
const layers = MODULES.layers;
const layerOf = MODULES.layer;
const reported = Uint8Array.from(MODULES.merged);
const rho = numbers("rho");
const rhoNull = numbers("rho_null");
const ratio = quotient(rho, rhoNull);
const low = numbers("rho_low");
const high = numbers("rho_high");
const nullSd = numbers("null_sd");
// log 0, which JSON cannot say.
const z = numbers("z").map((value, i) => (rho[i] === 0 && rhoNull[i] > 0 && nullSd[i] > 0 ? -Infinity : value));
const vNorm = numbers("v_norm");
const deltaNorm = numbers("delta_norm");
const weightNorm = numbers("weight_norm");
const relative = quotient(deltaNorm, weightNorm);
const rounding = numbers("v_rounding");
const cosine = numbers("cos_v_delta");
const squares = deltaNorm.map((norm) => (norm > 0 ? norm * norm : 0));
const allSquares = squares.reduce((sum, value) => sum + value, 0);

// Members of each type, and of the experts' groups: matrices of one kind in one layer.
const membersOfType = types.map(() => []);
for (let i = 0; i < N; i++) membersOfType[typeOf[i]].push(i);
const isExpert = types.map((type) => type.startsWith("experts."));

function median(values) {
  if (!values.length) return NaN;
  const sorted = Float64Array.from(values).sort();
  const middle = sorted.length >> 1;
  return sorted.length % 2 ? sorted[middle] : (sorted[middle - 1] + sorted[middle]) / 2;
}

function known(indices, column) {
  const found = [];
  for (const i of indices) if (column[i] === column[i]) found.push(column[i]);
  return found;
}
