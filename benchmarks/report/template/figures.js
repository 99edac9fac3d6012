// The data, what is chosen of it, and how figures are compared and written.

const page = JSON.parse(byId("data").textContent);

const state = {
  panel: page.panels[0]?.name, task: page.tasks[0]?.id, metric: page.tasks[0]?.metrics[0]?.name,
  x: "bits", budget: 4, sort: "bits", descending: false, filter: "", hidden: new Set(), selected: null,
};
const opened = new Set();

// --- what is chosen

const task = () => page.tasks.find((each) => each.id === state.task);
const metric = () => task().metrics.find((each) => each.name === state.metric);
const cells = Map.groupBy(page.rows, (row) => JSON.stringify([row.panel, row.task]));
const rowsOf = (panel) => cells.get(JSON.stringify([panel, state.task])) ?? [];
const rows = () => rowsOf(state.panel);
const shown = (row) => !state.hidden.has(row.family);
const bitsOf = (row) => row.memory?.bits_per_element;
const valueOf = (row) => row.metrics[state.metric];
const labelOf = (row) => row.label || row.strategy;

// Smaller is better after this.
const cost = (value, info = metric()) => (info.better === "lower" ? value : -value);

// --- measures: columns of the table, and what memory or time the plot goes across

const MEMORY = [
  { key: "bits", label: "bits held", title: "bits held per number, everything counted", of: bitsOf, write: (v) => v.toFixed(2) },
  {
    key: "packed", label: "packed", title: "bits per number of the packed part, to which long contexts fall",
    of: (row) => row.memory?.packed_bits_per_element || undefined, write: (v) => v.toFixed(2),
  },
  { key: "ratio", label: "vs 16-bit", title: "times smaller than a 16-bit cache", of: (row) => 16 / bitsOf(row), write: (v) => `${v.toFixed(1)}×` },
  { key: "device", label: "device", title: "bytes on the device", of: (row) => row.memory?.device_bytes, write: bytes },
];

function latencies() {
  const names = new Set(rows().flatMap((row) => Object.keys(row.latency)));
  return [...names].map((name) => ({
    key: `latency ${name}`, label: name.replaceAll("_", " "), title: name.replaceAll("_", " "),
    of: (row) => row.latency[name], write: (v) => (v >= 100 ? v.toFixed(0) : v >= 10 ? v.toFixed(1) : v.toFixed(2)),
  }));
}

function axes() {
  return [...MEMORY.filter((each) => each.key !== "ratio"), ...latencies()].filter((each) => rows().some((row) => finite(each.of(row))));
}

const finite = (value) => Number.isFinite(value);

// The largest of what belongs together: a few caches far larger than the rest, exact ones as a rule, stand aside.
function largest(values) {
  const order = [...new Set(values)].sort((a, b) => a - b);
  let most = order.at(-1);
  for (let i = order.length - 1; i >= 3 && order.length - i <= Math.max(1, order.length / 5); i -= 1) {
    if (order[i] > 1.6 * order[i - 1]) most = order[i - 1];
  }
  return most;
}

// --- the front: no other is at most as large and at most as bad, and better in one of the two

function front(points) {
  if (state.x === "bits" && state.metric === task().metrics[0]?.name && !state.hidden.size) {
    return points.filter((point) => point.row.pareto);
  }
  return points.filter((point) => !points.some((other) =>
    other.x <= point.x && cost(other.y) <= cost(point.y) && (other.x < point.x || cost(other.y) < cost(point.y))));
}

function points(across) {
  return rows().filter((row) => shown(row) && finite(across.of(row)) && finite(valueOf(row)))
    .map((row) => ({ row, x: across.of(row), y: valueOf(row) }));
}

const across = () => axes().find((each) => each.key === state.x) ?? axes()[0];
const onFront = () => (across() ? new Set(front(points(across())).map((point) => point.row.strategy)) : new Set());

// --- writing

function write(value, info) {
  if (!finite(value)) return "–";
  if (info.percent) return `${(100 * value).toFixed(info.digits)} %`;
  return plain(value, info.digits);
}

function plain(value, digits) {
  const size = Math.abs(value);
  if (size >= 1e5 || (size > 0 && size < 0.5 * 10 ** -digits)) return value.toExponential(size >= 1e5 ? 1 : 0).replace("+", "");
  return value.toFixed(size >= 1000 ? Math.min(digits, 1) : digits);
}

function spread(row, info) {
  const error = row.errors[info.name];
  if (!finite(error)) return "";
  return `± ${info.percent ? (100 * error).toFixed(info.digits) : plain(error, info.digits)}`;
}

const withUnit = (info) => (info.unit ? `${info.label}, ${info.unit}` : info.label);

function bytes(size) {
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let unit = 0;
  for (; size >= 1024 && unit < units.length - 1; unit += 1) size /= 1024;
  return `${unit && size < 100 ? size.toFixed(1) : size.toFixed(0)} ${units[unit]}`;
}

const count = (number, one, many = `${one}s`) => `${number} ${number === 1 ? one : many}`;

// --- families: colour and shape, the same on every panel

const SHAPES = ["circle", "square", "triangle", "diamond", "wedge", "plus", "cross", "hexagon"];
const COLORS = 8;
const families = (() => {
  const names = (baseline) => [...new Set(page.rows.filter((row) => row.baseline === baseline).map((row) => row.family))].sort();
  const ours = names(false).map((name, i) => [name, { color: `var(--family-${i % COLORS})`, shape: SHAPES[(i + Math.floor(i / COLORS)) % SHAPES.length], baseline: false }]);
  const others = names(true).filter((name) => !names(false).includes(name))
    .map((name, i) => [name, { color: "var(--baseline)", shape: SHAPES[i % SHAPES.length], baseline: true }]);
  return new Map([...ours, ...others]);
})();

function shape(name, x, y, size) {
  const r = size, corners = (angles, radius) => `M${angles.map((angle) => {
    const turn = (angle * Math.PI) / 180;
    return `${(x + radius * Math.sin(turn)).toFixed(2)},${(y - radius * Math.cos(turn)).toFixed(2)}`;
  }).join("L")}Z`;
  const bars = (turned) => {
    const a = 1.15 * r, b = 0.38 * r, spots = [[-b, -a], [b, -a], [b, -b], [a, -b], [a, b], [b, b], [b, a], [-b, a], [-b, b], [-a, b], [-a, -b], [-b, -b]];
    const c = Math.SQRT1_2;
    return `M${spots.map(([u, v]) => (turned ? [(u - v) * c, (u + v) * c] : [u, v])).map(([u, v]) => `${(x + u).toFixed(2)},${(y + v).toFixed(2)}`).join("L")}Z`;
  };
  switch (name) {
    case "square": return corners([45, 135, 225, 315], 1.25 * r);
    case "triangle": return corners([0, 120, 240], 1.3 * r);
    case "wedge": return corners([60, 180, 300], 1.3 * r);
    case "diamond": return corners([0, 90, 180, 270], 1.3 * r);
    case "hexagon": return corners([30, 90, 150, 210, 270, 330], 1.1 * r);
    case "plus": return bars(false);
    case "cross": return bars(true);
    default: return `M${x - r},${y}a${r},${r} 0 1,0 ${2 * r},0a${r},${r} 0 1,0 ${-2 * r},0Z`;
  }
}

function mark(family) {
  const style = families.get(family);
  return svg("svg", { class: `mark${style.baseline ? " baseline" : ""}`, width: 14, height: 14, viewBox: "0 0 14 14", "aria-hidden": "true" },
    svg("path", { d: shape(style.shape, 7, 7, 4.6), style: { color: style.color } }));
}
