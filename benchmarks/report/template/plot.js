// Accuracy against memory: points, their front, labels that cover nothing, and what pointer and keyboard do with them.

let placed = [];

function renderPlot() {
  const box = byId("plot"), x = across(), info = metric();
  placed = [];
  const all = x ? points(x) : [];
  if (!all.length) {
    const some = rows().some((row) => finite(valueOf(row)));
    return replace(box, el("p", { class: "empty" }, some ? "All families are hidden, or no memory was counted." : "No figures for this model and task."));
  }
  const width = Math.max(280, box.clientWidth), height = Math.round(Math.min(560, Math.max(340, 0.7 * width)));
  const xs = horizontal(x, all), ys = vertical(info, all);
  const frame = { left: 12 + textWidth(ys.widest), right: width - (xs.beyond ? 74 : 14), top: 30, bottom: height - 46 - (ys.floor && info.better === "lower" ? 20 : 0) };
  const inside = (value) => frame.left + xs.at(value) * (frame.right - frame.left);
  const px = (value) => (xs.beyond && value > xs.most ? frame.right + 38 : inside(value));
  const py = (value) => (ys.floor && value < ys.floor ? frame.bottom + 20 : frame.bottom - ys.at(value) * (frame.bottom - frame.top));

  const optimal = front(all), stars = new Set(optimal);
  placed = all.map((point) => ({ ...point, px: px(point.x), py: py(point.y), optimal: stars.has(point) }))
    .sort((a, b) => a.px - b.px || a.py - b.py);
  aside(placed.filter((point) => point.px > frame.right));

  const chosen = best();
  const drawing = svg("svg", { width, height, viewBox: `0 0 ${width} ${height}`, role: "group", "aria-label": `${info.label} against ${x.title}; arrow keys go from point to point` },
    svg("defs", {}, svg("clipPath", { id: "frame" }, svg("rect", { x: frame.left, y: frame.top - 6, width: frame.right - frame.left, height: frame.bottom - frame.top + 12 }))),
    budget(x, px, frame),
    grid(xs, ys, inside, py, frame),
    titles(x, info, frame, width, height, xs),
    svg("path", { class: "front", d: staircase(optimal, px, py, frame, info), "clip-path": "url(#frame)" }),
    whiskers(placed, py, frame, ys),
    placed.toSorted((a, b) => a.optimal - b.optimal).map((point) => drawPoint(point, x, info, point.row === chosen)),
    labels(placed, edges(optimal, px, py, frame), frame, width, ys, chosen),
  );
  drawing.addEventListener("pointermove", (event) => hover(nearest(event)));
  drawing.addEventListener("pointerleave", () => hover(null));
  drawing.addEventListener("click", (event) => {
    const point = nearest(event);
    if (point) select(point.row.strategy);
  });
  drawing.addEventListener("keydown", walk);
  replace(box, drawing, el("div", { id: "tip", role: "tooltip", hidden: true }));
}

// --- scales

function horizontal(x, all) {
  const values = all.map((point) => point.x), most = largest(values);
  const low = Math.min(...values), high = most, beyond = most < Math.max(...values);
  if (low > 0) {
    const pad = low === high ? 1.3 : (high / low) ** 0.06;
    return { ...logarithmic(low / pad, high * pad, x.key === "device" ? binary(low / pad, high * pad) : undefined), most, beyond, write: shortFigure(x) };
  }
  const pad = 0.05 * (high - low || 1);
  return { ...linear(low - pad, high + pad), most, beyond, write: shortFigure(x) };
}

function vertical(info, all) {
  const values = all.map((point) => point.y), high = Math.max(...values), positive = values.filter((value) => value > 0);
  const wide = positive.length && Math.min(...values) >= 0 && high / Math.min(...positive) >= 12;
  const put = (value) => (info.percent ? `${Number((100 * value).toPrecision(6))} %` : plainTick(value));
  if (wide && info.better === "lower") {
    // what lies six decades below the worst is rounding: a line of its own, under the axis
    const least = 2e-6 * high, above = positive.filter((value) => value >= least);
    const scale = logarithmic(Math.min(...above) / 1.5, high * 1.5);
    const floor = values.some((value) => value < least) ? least : 0;
    return { ...scale, floor, write: put, widest: scale.ticks.map(put).concat(floor ? ["≈ 0"] : []).reduce(wider) };
  }
  const low = Math.min(...values), pad = 0.06 * (high - low || Math.abs(high) || 1);
  const scale = linear(low - pad, high + pad, info.percent ? 1 : Infinity);
  return { ...scale, floor: 0, write: put, widest: scale.ticks.map(put).reduce(wider) };
}

const wider = (a, b) => (b.length > a.length ? b : a);
const plainTick = (value) => (value && (Math.abs(value) < 1e-4 || Math.abs(value) >= 1e5) ? value.toExponential(0).replace("+", "") : String(Number(value.toPrecision(6))));
const shortFigure = (x) => (x.key === "device" ? bytes : plainTick);

function logarithmic(low, high, own) {
  const decades = Math.log10(high / low), steps = decades > 2.2 ? [1] : decades > 1.2 ? [1, 2, 5] : decades > 0.45 ? [1, 1.5, 2, 3, 4, 5, 6, 8] : [1, 1.2, 1.4, 1.6, 1.8, 2, 2.5, 3, 3.5, 4, 4.5, 5, 5.5, 6, 7, 8, 9];
  const ticks = [];
  for (let power = Math.floor(Math.log10(low)); 10 ** power <= high; power += 1) {
    for (const step of steps) ticks.push(Number((step * 10 ** power).toPrecision(4)));
  }
  return { at: (value) => Math.log(value / low) / Math.log(high / low), ticks: (own ?? ticks).filter((tick) => tick >= low && tick <= high) };
}

// Round numbers of MiB, or whatever unit the figures are written in.
function binary(low, high) {
  const unit = 1024 ** Math.floor(Math.log2(low) / 10);
  return logarithmic(low / unit, high / unit).ticks.map((tick) => tick * unit);
}

function linear(low, high, end = Infinity) {
  high = Math.max(Math.min(high, end + 0.02 * (end - low)), low + 1e-12);
  const rough = (high - low) / 6, power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((each) => each * power).find((each) => each >= rough);
  const ticks = [];
  for (let i = Math.ceil(low / step); i * step <= high + 1e-9; i += 1) if (i * step <= end + 1e-9) ticks.push(Number((i * step).toPrecision(8)));
  return { at: (value) => (value - low) / (high - low), ticks };
}

// --- drawing

function budget(x, px, frame) {
  if (x.key !== "bits") return null;
  const at = Math.min(Math.max(px(state.budget), frame.left), frame.right);
  return svg("g", { class: "budget" },
    svg("rect", { x: at, y: frame.top, width: frame.right - at, height: frame.bottom - frame.top }),
    svg("line", { x1: at, x2: at, y1: frame.top, y2: frame.bottom }),
    at < frame.right && svg("text", { x: at + 5, y: frame.top + 12 }, "over budget"));
}

function grid(xs, ys, px, py, frame) {
  let edge = -Infinity;
  const columns = xs.ticks.filter((tick) => {
    const half = textWidth(xs.write(tick)) / 2 + 6, fits = px(tick) - half > edge;
    if (fits) edge = px(tick) + half;
    return fits;
  });
  return svg("g", { class: "grid" },
    ys.ticks.map((tick) => [
      svg("line", { x1: frame.left, x2: frame.right, y1: py(tick), y2: py(tick) }),
      svg("text", { x: frame.left - 6, y: py(tick) + 4, "text-anchor": "end" }, ys.write(tick))]).flat(),
    columns.map((tick) => [
      svg("line", { class: "tick", x1: px(tick), x2: px(tick), y1: frame.bottom, y2: frame.bottom + 4 }),
      svg("text", { x: px(tick), y: frame.bottom + 18 + (ys.floor ? 20 : 0), "text-anchor": "middle" }, xs.write(tick))]).flat(),
    svg("line", { class: "axis", x1: frame.left, x2: frame.right, y1: frame.bottom, y2: frame.bottom }),
    ys.floor && svg("text", { x: frame.left - 6, y: frame.bottom + 24, "text-anchor": "end" }, "≈ 0"),
    ys.floor && svg("line", { x1: frame.left, x2: frame.right, y1: frame.bottom + 20, y2: frame.bottom + 20 }),
  );
}

function titles(x, info, frame, width, height, xs) {
  const errors = width > 560 && placed.some((point) => finite(point.row.errors[info.name]));
  const better = info.better === "lower" ? "↓ lower is better" : "↑ higher is better";
  return svg("g", { class: "titles" },
    svg("text", { x: 0, y: 14 }, svg("tspan", { class: "strong" }, withUnit(info)), svg("tspan", { dx: 8 }, better), errors && svg("tspan", { dx: 12 }, "thin lines: ± one standard error")),
    svg("text", { x: frame.right, y: height - 6, "text-anchor": "end" }, svg("tspan", {}, x.key === "bits" && width > 560 ? x.title : x.label), svg("tspan", { dx: 8 }, "← smaller")),
    xs.beyond && svg("text", { x: frame.right + 38, y: frame.top - 8, "text-anchor": "middle" }, "off scale"),
    xs.beyond && svg("line", { class: "break", x1: frame.right + 8, x2: frame.right + 8, y1: frame.top, y2: frame.bottom }));
}

function staircase(optimal, px, py, frame, info) {
  const steps = optimal.toSorted((a, b) => a.x - b.x || cost(a.y) - cost(b.y));
  if (!steps.length) return "";
  const worst = info.better === "lower" ? frame.top - 6 : frame.bottom + 6;
  let d = `M${px(steps[0].x)},${worst}`;
  for (const step of steps) d += `H${px(step.x)}V${py(step.y)}`;
  return `${d}H${frame.right}`;
}

// The front again, as the narrow boxes that a label had better not lie on.
function edges(optimal, px, py, frame) {
  const steps = optimal.toSorted((a, b) => a.x - b.x || cost(a.y) - cost(b.y)).map((step) => [Math.min(px(step.x), frame.right), py(step.y)]);
  return steps.flatMap(([x, y], i) => {
    const [end, next] = steps[i + 1] ?? [frame.right, y];
    return [{ left: x, right: end, top: y - 1, bottom: y + 1 }, { left: end - 1, right: end + 1, top: Math.min(y, next), bottom: Math.max(y, next) }];
  });
}

function whiskers(all, py, frame, ys) {
  return svg("g", { class: "whiskers", "clip-path": "url(#frame)" }, all.flatMap((point) => {
    const error = point.row.errors[state.metric];
    if (!finite(error) || (ys.floor && point.y < ys.floor)) return [];
    const lowest = ys.floor || ys.ticks[0] > 0 ? Math.max(point.y - error, 1e-3 * point.y) : point.y - error;
    return [svg("line", { x1: point.px, x2: point.px, y1: Math.min(py(lowest), frame.bottom), y2: py(point.y + error) })];
  }));
}

function drawPoint(point, x, info, chosen) {
  const style = families.get(point.row.family);
  const says = `${point.row.strategy}, ${x.label} ${x.write(point.x)}, ${info.label} ${write(point.y, info)}${point.optimal ? ", on the front" : ""}`;
  return svg("g", {
    class: ["point", point.optimal ? "optimal" : "", style.baseline ? "baseline" : "", chosen ? "chosen" : ""].filter(Boolean).join(" "),
    "data-strategy": point.row.strategy, "data-focus": `point ${point.row.strategy}`, role: "button", "aria-label": says,
    "aria-pressed": String(state.selected === point.row.strategy),
    tabindex: (state.selected && placed.some((each) => each.row.strategy === state.selected) ? state.selected : placed[0].row.strategy) === point.row.strategy ? 0 : -1,
    onfocus: () => hover(point), onblur: () => hover(null), style: { color: style.color },
  },
    svg("circle", { class: "ring", cx: point.px, cy: point.py, r: 11 }),
    svg("path", { d: shape(style.shape, point.px, point.py, point.optimal ? 5.4 : 4.6) }));
}

// Caches off the scale with equal figures lie over each other: side by side then.
function aside(far) {
  const groups = Map.groupBy(far, (point) => Math.round(point.py / 12));
  for (const group of groups.values()) group.forEach((point, i) => { point.px += (i - (group.length - 1) / 2) * Math.min(14, 48 / group.length); });
}

// --- labels: of the front, then only where there is room

const FONT = "11.5px system-ui, sans-serif";
const pen = document.createElement("canvas").getContext("2d");
function textWidth(text) {
  pen.font = FONT;
  return pen.measureText(text).width;
}

function labels(all, lines, frame, width, ys, chosen) {
  const taken = all.map((point) => ({ left: point.px - 6, right: point.px + 6, top: point.py - 6, bottom: point.py + 6 }));
  if (state.x === "bits") taken.push({ left: frame.left, right: frame.right, top: frame.top, bottom: frame.top + 14 });
  const wanted = all.filter((point) => point.optimal || point.row === chosen).sort((a, b) => (b.row === chosen) - (a.row === chosen) || a.px - b.px);
  const limit = width > 560 ? 110 : 34, leaders = [];
  return svg("g", { "aria-hidden": "true" }, wanted.map((point) => {
    const text = shorten(labelOf(point.row)), w = textWidth(text) * (point.row === chosen ? 1.1 : 1) + 4, h = 14;
    const inside = (each) => each.left >= frame.left + 2 && each.top >= frame.top && each.bottom <= frame.bottom + (ys.floor ? 28 : -1) && each.right <= (point.px > frame.right ? width : frame.right + 6);
    const found = spots(w, h).map(([dx, dy]) => ({ left: point.px + dx, right: point.px + dx + w, top: point.py + dy, bottom: point.py + dy + h }))
      .filter((each) => inside(each) && ![...taken, ...leaders].some((one) => overlap(one, each)))
      .map((each) => {
        const end = { x: Math.min(Math.max(point.px, each.left), each.right), y: Math.min(Math.max(point.py, each.top), each.bottom) };
        const reach = Math.hypot(end.x - point.px, end.y - point.py), leader = reach > 14 ? dots(point, end, reach) : [];
        const crossed = leader.filter((dot) => taken.some((one) => overlap(one, dot))).length;
        const over = lines.filter((one) => overlap(one, each)).length;
        return { ...each, end, reach, leader, over, price: reach + 70 * over + 30 * crossed };
      })
      .reduce((a, b) => (a && a.price <= b.price ? a : b), null);
    if (!found || found.price > limit) return null;
    // room between two labels on one line, which would read as one
    taken.push({ ...found, left: found.left - 8, right: found.right + 8 });
    leaders.push(...found.leader);
    const { end, reach } = found;
    return svg("g", { class: `label${point.row === chosen ? " chosen" : ""}`, "data-strategy": point.row.strategy },
      reach > 14 && svg("line", { x1: point.px + (8 / reach) * (end.x - point.px), y1: point.py + (8 / reach) * (end.y - point.py), x2: end.x, y2: end.y }),
      found.over && svg("rect", { x: found.left, y: found.top, width: w, height: h }),
      svg("text", { x: found.left + 2, y: found.top + 11 }, text));
  }));
}

// The way from a point to its label, as small boxes, without those on the point.
function dots(point, end, reach) {
  const found = [];
  for (let at = 10; at < reach; at += 3) {
    const x = point.px + (at / reach) * (end.x - point.px), y = point.py + (at / reach) * (end.y - point.py);
    found.push({ left: x - 1, right: x + 1, top: y - 1, bottom: y + 1 });
  }
  return found;
}

// Upper left corners of a label around its point, at origin.
function spots(w, h) {
  const found = [];
  for (const away of [8, 12, 18, 26, 36, 48, 62, 78]) {
    const near = 0.7 * away;
    found.push([near, -near - h], [away, -h / 2], [-w / 2, -away - h], [near, near], [-w / 2, away], [-away - w, -h / 2], [-near - w, near], [-near - w, -near - h]);
    if (away > 18) found.push([-0.4 * away - w, away], [0.4 * away, -away - h], [-away - w, 0.4 * away], [away, -0.4 * away - h], [away, 0.4 * away]);
  }
  return found;
}

const overlap = (a, b) => a.left < b.right && b.left < a.right && a.top < b.bottom && b.top < a.bottom;
const shorten = (text) => (text.length > 34 ? `${text.slice(0, 33)}…` : text);

// --- pointer and keyboard

function nearest(event) {
  const box = byId("plot").getBoundingClientRect(), x = event.clientX - box.left, y = event.clientY - box.top;
  const reach = (point) => Math.hypot(point.px - x, point.py - y);
  const found = placed.reduce((a, b) => (a && reach(a) <= reach(b) ? a : b), null);
  return found && reach(found) < 26 ? found : null;
}

function hover(point) {
  const tip = byId("tip");
  if (!tip) return;
  highlight("hovered", point?.row.strategy);
  tip.hidden = !point;
  if (!point) return;
  const x = across(), info = metric(), row = point.row;
  replace(tip,
    el("p", { class: "who" }, mark(row.family), code(row.strategy)),
    el("dl", {},
      el("dt", {}, x.label), el("dd", {}, x.write(point.x)),
      task().metrics.filter((each) => finite(row.metrics[each.name])).map((each) => [
        el("dt", { class: each === info ? "strong" : false }, each.label),
        el("dd", { class: each === info ? "strong" : false }, write(row.metrics[each.name], each), " ", el("span", { class: "quiet" }, spread(row, each)))]),
      latencies().filter((each) => finite(each.of(row)) && each.key !== x.key).map((each) => [el("dt", {}, each.label), el("dd", {}, each.write(each.of(row)))]),
      row.memory?.host_bytes ? [el("dt", {}, "host memory"), el("dd", {}, bytes(row.memory.host_bytes))] : []),
    el("p", { class: "quiet" }, [row.baseline ? "baseline" : "", point.optimal ? "on the Pareto front" : "", doubt(row, best() ?? row) && row !== best() ? "not told apart from the best in budget" : ""].filter(Boolean).join(", ")));
  const box = byId("plot"), w = tip.offsetWidth, h = tip.offsetHeight;
  const left = point.px + 14 + w <= box.clientWidth ? point.px + 14 : point.px - 14 - w;
  tip.style.left = `${Math.max(0, Math.min(left, box.clientWidth - w))}px`;
  tip.style.top = `${Math.max(-20, point.py - h - 12 < -20 ? point.py + 14 : point.py - h - 12)}px`;
}

function walk(event) {
  const here = placed.findIndex((point) => point.row.strategy === document.activeElement?.dataset.strategy);
  const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
  if (step && here >= 0) {
    event.preventDefault();
    const next = placed[(here + step + placed.length) % placed.length].row.strategy;
    for (const each of byId("plot").querySelectorAll(".point")) {
      each.setAttribute("tabindex", each.dataset.strategy === next ? 0 : -1);
      if (each.dataset.strategy === next) each.focus();
    }
  } else if ((event.key === "Enter" || event.key === " ") && here >= 0) {
    event.preventDefault();
    select(placed[here].row.strategy);
  } else if (event.key === "Escape") {
    hover(null);
  }
}

function renderLegend() {
  const here = new Set(rows().map((row) => row.family));
  replace(byId("legend"), [...families].filter(([family]) => here.has(family)).map(([family]) =>
    el("button", {
      type: "button", "aria-pressed": String(!state.hidden.has(family)), "data-focus": `family ${family}`,
      title: state.hidden.has(family) ? "show" : "hide",
      onclick: () => {
        if (!state.hidden.delete(family)) state.hidden.add(family);
        update();
      },
    }, mark(family), family, families.get(family).baseline ? el("span", { class: "quiet" }, " baseline") : "")),
    state.hidden.size ? el("button", { type: "button", class: "link", "data-focus": "family all", onclick: () => { state.hidden.clear(); update(); } }, "show all") : "");
}

function renderSelected() {
  const row = rows().find((each) => each.strategy === state.selected);
  if (!row) return replace(byId("selected"), el("p", { class: "quiet" }, "Click a point to mark its row in the table; click a family to leave it out, also from the choice."));
  replace(byId("selected"),
    el("p", {}, mark(row.family), code(row.strategy), " ", row.baseline ? "" : copyButton(row.strategy),
      el("button", { type: "button", class: "link", "data-focus": "goto", onclick: () => goTo(row.strategy) }, "see in table"),
      el("button", { type: "button", class: "link", "data-focus": "unselect", onclick: () => select(null) }, "clear")));
}
