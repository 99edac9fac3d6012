// The best strategy that a budget of bits buys, the runner-up, and how sure either is.

// Best first; of two alike the smaller one.
function ranked(candidates) {
  return [...candidates].sort((a, b) =>
    cost(valueOf(a)) - cost(valueOf(b)) || bitsOf(a) - bitsOf(b) || (a.strategy < b.strategy ? -1 : 1));
}

const measured = (panel) => rowsOf(panel).filter((row) => shown(row) && finite(bitsOf(row)) && finite(valueOf(row)));
const affordable = (panel) => ranked(measured(panel).filter((row) => bitsOf(row) <= state.budget));
const best = () => affordable(state.panel)[0];

function renderChoose() {
  const info = metric(), all = measured(state.panel), [first, second] = affordable(state.panel);
  const sizes = all.map(bitsOf);
  const slider = byId("budget-slider"), number = byId("budget-number");
  slider.disabled = number.disabled = !all.length;
  slider.min = sizes.length ? Math.floor(10 * Math.min(...sizes)) / 10 : 0;
  slider.max = sizes.length ? Math.max(Number(slider.min) + 1, Math.min(16, Math.ceil(largest(sizes)))) : 16;
  slider.value = state.budget;
  if (document.activeElement !== number) number.value = Number(state.budget.toFixed(2));
  replace(byId("budget-meaning"), finite(16 / state.budget) ? `${(16 / state.budget).toFixed(1)}× smaller than a 16-bit cache` : "");

  if (!all.length) return replace(byId("answer"), el("p", { class: "quiet" }, rows().length ? "No figures to choose by." : "Nothing was measured here."));
  if (!first) {
    const smallest = all.reduce((a, b) => (bitsOf(b) < bitsOf(a) ? b : a));
    return replace(byId("answer"),
      el("p", {}, `Nothing fits. The smallest is `, code(smallest.strategy), ` at ${bitsOf(smallest).toFixed(2)} bits.`));
  }
  const more = ranked(all.filter((row) => bitsOf(row) > state.budget && cost(valueOf(row)) < cost(valueOf(first))))
    .sort((a, b) => bitsOf(a) - bitsOf(b) || cost(valueOf(a)) - cost(valueOf(b)))[0];
  replace(byId("answer"),
    el("h3", {}, `Best ${info.label}`),
    el("p", { class: "best", "data-strategy": first.strategy }, mark(first.family), name(first), first.baseline ? "" : copyButton(first.strategy)),
    el("p", { class: "headline" }, el("b", {}, write(valueOf(first), info)), info.unit ? ` ${info.unit} ` : " ", el("span", { class: "quiet" }, spread(first, info)),
      el("br"), `${bitsOf(first).toFixed(2)} bits held`, hostNote(first)),
    elsewhere(first),
    second && other("Runner-up", second, doubt(first, second)),
    more && other(`For ${(bitsOf(more) - state.budget).toFixed(2)} bits more`, more, ""),
  );
}

function other(heading, row, remark) {
  return el("div", { class: "other" },
    el("h3", {}, heading),
    el("p", { class: "who" }, mark(row.family), name(row)),
    el("p", {}, `${write(valueOf(row), metric())}, ${bitsOf(row).toFixed(2)} bits held`, remark && el("span", { class: "quiet" }, ` (${remark})`)),
  );
}

const name = (row) => el("button", {
  type: "button", class: "name", "data-focus": `name ${row.strategy}`, "data-strategy": row.strategy, onclick: () => select(row.strategy),
}, code(row.strategy));

// Both read the same text, so their errors cancel in part: what is told apart here is apart.
function doubt(a, b) {
  const errors = [a, b].map((row) => row.errors[state.metric]);
  if (!errors.every(finite)) return "";
  const apart = Math.abs(valueOf(a) - valueOf(b)) > 1.96 * Math.hypot(...errors);
  return apart ? "" : "not told apart by the standard errors";
}

function hostNote(row) {
  return row.memory?.host_bytes ? `, and ${bytes(row.memory.host_bytes)} in host memory that bits do not count` : "";
}

// A strategy that is good on one model only fails on the next.
function elsewhere(chosen) {
  const lines = page.panels.filter((panel) => panel.name !== state.panel).flatMap((panel) => {
    const row = rowsOf(panel.name).find((each) => each.strategy === chosen.strategy);
    if (!row) return [];
    if (row.status === "failed") return [[panel.name, "failed", true]];
    if (!finite(valueOf(row)) || !finite(bitsOf(row))) return [];
    const order = affordable(panel.name), place = order.findIndex((each) => each.strategy === chosen.strategy);
    const figure = write(valueOf(row), metric());
    if (place < 0) return [[panel.name, `${figure}, but ${bitsOf(row).toFixed(2)} bits there`, true]];
    return [[panel.name, `${figure}, ${place ? `place ${place + 1}` : "best"} of ${order.length} that fit`, place >= 3]];
  });
  if (!lines.length) return null;
  return el("ul", { class: "elsewhere" }, lines.map(([panel, text, warn]) => el("li", {}, el("span", { class: "quiet" }, `on ${panel}: `), el("span", { class: warn ? "warn" : false }, text))));
}
