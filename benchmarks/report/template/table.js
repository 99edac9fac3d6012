// Every row with its figures: sorted by any column, filtered by words, each open to what its memory consists of.

function columns() {
  return [
    ...MEMORY.slice(0, 3),
    ...task().metrics.map((info) => ({
      key: `metric ${info.name}`, label: info.label, title: `${withUnit(info)}, ${info.better} is better`, info,
      of: (row) => row.metrics[info.name], write: (value) => write(value, info),
    })),
    ...latencies(),
  ].filter((each) => each.info || rows().some((row) => finite(each.of(row))));
}

// Words narrow down; `front` and `baseline` stand for what the words mean.
function matches(row, optimal) {
  return state.filter.toLowerCase().split(/\s+/).filter(Boolean).every((word) =>
    (word === "front" && optimal.has(row.strategy)) || (word === "baseline" && row.baseline) || (word === "failed" && row.status === "failed")
    || row.strategy.toLowerCase().includes(word));
}

function sorted(list) {
  const by = columns().find((each) => each.key === state.sort);
  const sign = state.descending ? -1 : 1, text = (a, b) => a.strategy.localeCompare(b.strategy, "en", { numeric: true });
  return [...list].sort((a, b) => {
    // what failed, or has no such figure, is last in either order
    const failed = (a.status === "failed") - (b.status === "failed");
    if (failed) return failed;
    if (!by) return sign * text(a, b);
    const u = by.of(a), v = by.of(b);
    if (!finite(u) || !finite(v)) return finite(v) - finite(u) || text(a, b);
    return sign * (u - v) || text(a, b);
  });
}

function renderTable() {
  const optimal = onFront(), every = rows(), list = sorted(every.filter((row) => matches(row, optimal))), heads = columns();
  const beside = every.some((row) => row.memory?.host_bytes);
  replace(byId("count"), list.length === every.length ? count(every.length, "row") : `${list.length} of ${count(every.length, "row")}`);
  if (!every.length) return replace(byId("table"), el("p", { class: "empty" }, "Nothing was measured for this model and task."));
  const head = (key, label, title, style) => el("th", { scope: "col", class: style, "aria-sort": state.sort === key ? (state.descending ? "descending" : "ascending") : "none" },
    el("button", { type: "button", title, "data-focus": `sort ${key}`, onclick: () => sortBy(key) }, label, el("span", { class: "arrow", "aria-hidden": "true" }, state.sort === key ? (state.descending ? "▼" : "▲") : "")));
  replace(byId("table"), el("table", {},
    el("thead", {}, el("tr", {}, head("strategy", "strategy", "the spec of the strategy", "spec"), heads.map((each) => head(each.key, each.label, each.title, `figure${each.key === "bits" && beside ? " roomy" : ""}`)))),
    el("tbody", {}, list.flatMap((row) => line(row, heads, optimal, beside)))));
}

function line(row, heads, optimal, beside) {
  const open = opened.has(row.strategy);
  const tr = el("tr", {
    class: [optimal.has(row.strategy) ? "optimal" : "", row.status === "failed" ? "failed" : "", shown(row) ? "" : "off"].filter(Boolean).join(" ") || false,
    "data-strategy": row.strategy,
    onclick: (event) => { if (!event.target.closest("button") && !String(getSelection())) select(row.strategy); },
  },
    el("th", { scope: "row", class: "spec" }, el("div", {},
      el("button", {
        type: "button", class: "open", "aria-expanded": String(open), "aria-label": `Details of ${row.strategy}`, "data-focus": `open ${row.strategy}`,
        onclick: () => { if (!opened.delete(row.strategy)) opened.add(row.strategy); renderTable(); highlightSelected(); },
      }, open ? "–" : "+"),
      mark(row.family), name(row),
      row.baseline ? el("span", { class: "tag" }, "baseline") : copyButton(row.strategy))),
    row.status === "failed"
      ? el("td", { colspan: heads.length, class: "reason" }, el("span", {}, `failed: ${row.error}`))
      : heads.map((each) => el("td", { class: `figure${each.info?.name === state.metric ? " current" : ""}${each.key === "bits" && beside ? " roomy" : ""}` },
        finite(each.of(row)) ? each.write(each.of(row)) : "–",
        each.key === "bits" && row.memory?.host_bytes ? el("span", { class: "host", title: `and ${bytes(row.memory.host_bytes)} in host memory` }, "+host") : "",
        each.key === `metric ${state.metric}` && optimal.has(row.strategy) ? el("span", { class: "star", title: "on the Pareto front" }, "◆") : "")),
  );
  return open ? [tr, el("tr", { class: "details" }, el("td", { colspan: heads.length + 1 }, details(row)))] : [tr];
}

function sortBy(key) {
  const info = columns().find((each) => each.key === key)?.info;
  // the first click shows the best on top
  if (state.sort === key) state.descending = !state.descending;
  else [state.sort, state.descending] = [key, key === "ratio" || info?.better === "higher"];
  renderTable();
  highlightSelected();
  remember();
}

// --- what a row consists of

const kinds = [...new Set(page.rows.flatMap((row) => Object.keys(row.memory?.kinds ?? {})))];
const kindColor = (kind) => `var(--kind-${kinds.indexOf(kind) % 10})`;

function details(row) {
  const uncertain = task().metrics.filter((info) => finite(row.errors[info.name]));
  const facts = [
    ["spec", code(row.strategy)],
    row.error && ["reason", el("span", { class: "long" }, row.error)],
    uncertain.length && ["standard errors", uncertain.map((info) => `${info.label} ${write(row.metrics[info.name], info)} ${spread(row, info)}`).join("; ")],
    row.memory && ["held", `${bytes(row.memory.device_bytes)} on the device${row.memory.host_bytes ? `, ${bytes(row.memory.host_bytes)} in host memory` : ""}`],
    row.seconds && ["took", `${row.seconds.toFixed(1)} s`],
    row.predictions && ["predictions", el("code", {}, row.predictions)],
  ].filter(Boolean);
  return el("div", {}, el("dl", {}, facts.map(([term, fact]) => [el("dt", {}, term), el("dd", {}, fact)])), row.memory ? memoryBar(row.memory) : "");
}

function memoryBar(memory) {
  const parts = Object.entries(memory.kinds).filter(([, size]) => size > 0), total = parts.reduce((sum, [, size]) => sum + size, 0);
  if (!total) return "";
  const share = (size) => `${((100 * size) / total).toFixed(1)} %`;
  return el("figure", { class: "memory" },
    el("div", { class: "bar", "aria-hidden": "true" }, parts.map(([kind, size]) =>
      el("span", { title: `${kind}: ${bytes(size)}, ${share(size)}`, style: { "flex-grow": size, "background-color": kindColor(kind) } }))),
    el("ul", {}, parts.map(([kind, size]) => el("li", {},
      el("i", { "aria-hidden": "true", style: { "background-color": kindColor(kind) } }), kind, " ", el("b", {}, bytes(size)), " ", el("span", { class: "quiet" }, share(size))))));
}
