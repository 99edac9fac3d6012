// Heat maps: bits of every layer, and what was found at which length and depth.

// From 0 to 1 along one hue; the stronger half is written in the other ink.
function cell(value, share, text, title) {
  if (!finite(value)) return el("td", { class: "none", title: `${title}: not measured` }, "");
  return el("td", { class: `heat${share > 0.65 ? " strong" : ""}`, title: `${title}: ${text}`, style: { "--share": `${(100 * share).toFixed(1)}%` } }, el("span", {}, text));
}

function scale(from, to) {
  return el("p", { class: "scale" }, el("span", {}, from), el("i", { "aria-hidden": "true" }), el("span", {}, to));
}

// Of the panel, and nothing else: large ones take a while to draw.
let drawnPanel = null;
function renderHeats() {
  if (drawnPanel === state.panel) return;
  drawnPanel = state.panel;
  renderLayers();
  renderMaps();
}

function renderLayers() {
  const here = page.layers.filter((each) => each.panel === state.panel);
  byId("layers").hidden = !page.layers.length;
  if (!here.length) return replace(byId("layers").lastElementChild, el("p", { class: "quiet" }, `Not recorded on ${state.panel}.`));
  const indices = [...new Set(here.flatMap((each) => each.layers.map(([index]) => index)))].sort((a, b) => a - b);
  const every = here.flatMap((each) => each.layers.flatMap(([, key, value]) => [key, value]));
  const low = Math.min(...every), high = Math.max(...every);
  const line = (each, side) => {
    const bits = new Map(each.layers.map((layer) => [layer[0], layer[side]]));
    return indices.map((index) => cell(bits.get(index), high > low ? (bits.get(index) - low) / (high - low) : 0, bits.get(index)?.toFixed(bits.get(index) < 9.95 ? 1 : 0), `layer ${index}, ${side === 1 ? "keys" : "values"}`));
  };
  const numbers = indices.map((index) => el("th", { scope: "col" }, String(index)));
  replace(byId("layers").lastElementChild,
    el("div", { class: "scroll" }, el("table", { class: `heats${indices.length > 16 ? " dense" : ""}` },
      el("thead", {},
        el("tr", {}, el("th", { rowspan: 2, scope: "col", class: "spec" }, "strategy"), el("th", { colspan: indices.length, scope: "colgroup" }, "keys, by layer"), el("td", { class: "gap", rowspan: 2 }), el("th", { colspan: indices.length, scope: "colgroup" }, "values, by layer")),
        el("tr", {}, numbers, numbers.map((each) => each.cloneNode(true)))),
      el("tbody", {}, here.map((each) => el("tr", { "data-strategy": each.strategy }, heatName(each.strategy), line(each, 1), el("td", { class: "gap" }), line(each, 2)))))),
    scale(`${low.toFixed(1)} bits per number`, `${high.toFixed(1)} bits`));
}

function heatName(strategy) {
  const row = page.rows.find((each) => each.strategy === strategy);
  return el("th", { scope: "row", class: "spec" }, el("div", {}, row ? mark(row.family) : "", code(strategy)));
}

function renderMaps() {
  const here = page.maps.filter((each) => each.panel === state.panel);
  byId("maps").hidden = !page.maps.length;
  if (!here.length) return replace(byId("maps").lastElementChild, el("p", { class: "quiet" }, `Not measured on ${state.panel}.`));
  const groups = Map.groupBy(here, (each) => each.task);
  replace(byId("maps").lastElementChild,
    scale("never found", "always"),
    [...groups].map(([id, maps]) => el("div", {},
      el("h3", {}, page.tasks.find((each) => each.id === id).title),
      el("div", { class: "maps", style: { "--width": `${6 + 2.1 * Math.max(...maps.map((each) => each.columns.length))}rem` } }, maps.map(retrieval)))));
}

function retrieval(map) {
  const row = page.rows.find((each) => each.strategy === map.strategy), share = (value) => `${Math.round(100 * value)}`;
  return el("figure", { "data-strategy": map.strategy },
    el("figcaption", {}, row ? mark(row.family) : "", code(map.strategy)),
    el("div", { class: "scroll" }, el("table", { class: "heats" },
      el("thead", {},
        el("tr", {}, el("th", { scope: "col", rowspan: 2 }, "tokens"), el("th", { scope: "colgroup", colspan: map.columns.length }, "found, %, by depth, %")),
        el("tr", {}, map.columns.map((depth) => el("th", { scope: "col" }, share(depth))))),
      el("tbody", {}, map.rows.map((length, i) => el("tr", {}, el("th", { scope: "row" }, length.toLocaleString("en")),
        map.values[i].map((value, j) => cell(value ?? NaN, value, share(value), `${length} tokens, depth ${share(map.columns[j])} %`))))))));
}

function renderFailures() {
  const failed = page.rows.filter((row) => row.status === "failed");
  byId("failures-title").textContent = failed.length ? `Failures (${failed.length})` : "Failures";
  const title = new Map(page.tasks.map((each) => [each.id, each.title]));
  replace(byId("failures").lastElementChild, failed.length
    ? el("ul", {}, failed.map((row) => el("li", {}, el("p", {}, code(row.strategy), ` on ${row.panel}, ${title.get(row.task)}`), el("p", { class: "long" }, row.error))))
    : el("p", { class: "quiet" }, page.rows.length ? "None: every run finished." : "Nothing was run."));
}
