// The page as a whole: what is chosen lies in the address, and every change of it goes through `update`.

function update() {
  settle();
  renderChoosers();
  renderLegend();
  renderAxis();
  renderChoose();
  renderPlot();
  renderSelected();
  renderTable();
  renderHeats();
  highlightSelected();
  remember();
}

// What an address says, or a change of task leaves behind, may not exist: the first there is then.
function settle() {
  const known = (list, value) => (list.includes(value) ? value : list[0]);
  state.panel = known(page.panels.map((each) => each.name), state.panel);
  state.task = known(page.tasks.map((each) => each.id), state.task);
  state.metric = task() && known(task().metrics.map((each) => each.name), state.metric);
  state.x = known(axes().map((each) => each.key), state.x) ?? "bits";
  if (state.sort !== "strategy" && !columns().some((each) => each.key === state.sort)) [state.sort, state.descending] = ["bits", false];
}

function renderChoosers() {
  const titles = page.tasks.map((each) => [each.id, each.title]);
  replace(byId("choosers"),
    choice("Model", "panel", page.panels.map((each) => [each.name, each.name]), state.panel, (value) => { state.panel = value; update(); }),
    choice("Task", "task", titles, state.task, (value) => { state.task = value; update(); }),
    task().metrics.length > 0 && choice("Accuracy by", "metric", task().metrics.map((each) => [each.name, each.label]), state.metric, (value) => { state.metric = value; update(); }));
  const details = page.panels.find((each) => each.name === state.panel).details;
  replace(byId("about"), [details, task().note].filter(Boolean).join(" · "));
}

function renderAxis() {
  const select = byId("x");
  replace(select, axes().map((each) => el("option", { value: each.key, selected: each.key === state.x }, each.label)));
  byId("axis").hidden = axes().length < 2;
}

function select(strategy) {
  state.selected = state.selected === strategy ? null : strategy;
  renderSelected();
  highlightSelected();
  remember();
}

const highlightSelected = () => highlight("selected", state.selected);

function highlight(style, strategy) {
  for (const each of document.querySelectorAll(`.${style}`)) each.classList.remove(style);
  if (strategy) for (const each of document.querySelectorAll("[data-strategy]")) each.classList.toggle(style, each.dataset.strategy === strategy);
  if (style === "selected") for (const each of document.querySelectorAll(".point")) each.setAttribute("aria-pressed", String(each.dataset.strategy === strategy));
}

function goTo(strategy) {
  state.filter = byId("filter").value = "";
  update();
  const row = [...byId("table").querySelectorAll("tr[data-strategy]")].find((each) => each.dataset.strategy === strategy);
  row.scrollIntoView({ block: "center", behavior: matchMedia("(prefers-reduced-motion: reduce)").matches ? "auto" : "smooth" });
  row.querySelector(".open").focus({ preventScroll: true });
}

// --- the address

// Browsers refuse addresses that change with every step of a slider.
let waiting;
function rememberSoon() {
  clearTimeout(waiting);
  waiting = setTimeout(remember, 200);
}

function remember() {
  const first = page.tasks.find((each) => each.id === state.task).metrics[0]?.name, parts = new URLSearchParams();
  parts.set("model", state.panel);
  parts.set("task", state.task);
  if (state.metric !== first) parts.set("metric", state.metric);
  if (state.x !== "bits") parts.set("x", state.x);
  parts.set("budget", Number(state.budget.toFixed(2)));
  parts.set("sort", (state.descending ? "-" : "") + state.sort);
  if (state.filter) parts.set("filter", state.filter);
  for (const family of state.hidden) parts.append("hide", family);
  if (state.selected) parts.set("pick", state.selected);
  const hash = `#${parts}`;
  if (hash !== location.hash) history.replaceState(null, "", hash);
}

function recall() {
  const parts = new URLSearchParams(location.hash.slice(1)), sort = parts.get("sort") ?? "bits";
  state.panel = parts.get("model");
  state.task = parts.get("task");
  state.metric = parts.get("metric");
  state.x = parts.get("x") ?? "bits";
  state.budget = Number(parts.get("budget")) > 0 ? Number(parts.get("budget")) : usual();
  [state.sort, state.descending] = [sort.replace(/^-/, ""), sort.startsWith("-")];
  state.filter = byId("filter").value = parts.get("filter") ?? "";
  state.hidden = new Set(parts.getAll("hide").filter((family) => families.has(family)));
  state.selected = parts.get("pick");
  update();
}

// A quarter of a 16-bit cache, or what the smallest takes.
function usual() {
  const sizes = page.rows.map(bitsOf).filter(finite);
  return sizes.length ? Math.max(4, Math.ceil(10 * Math.min(...sizes)) / 10) : 4;
}

// --- what does not change

function renderHeader() {
  const strategies = new Set(page.rows.map((row) => row.strategy)).size, date = page.created.slice(0, 10);
  replace(byId("lede"),
    `${count(strategies, "strategy", "strategies")} of KV-cache quantization, measured on ${count(page.panels.length, "model")} and ${count(page.tasks.length, "task")}, ${date}. `,
    "Accuracy is read through the packed cache, and memory is every byte it held: codes, scales, exact tokens and spare room.");
  byId("notes").hidden = !page.notes.length;
  replace(byId("notes").lastElementChild, el("ul", {}, page.notes.map((note) => el("li", {}, note))));
  replace(byId("environment").lastElementChild, el("dl", {},
    [["made", page.created], ...Object.entries(page.environment)].map(([term, fact]) => [el("dt", {}, term), el("dd", {}, fact)])));
}

function setBudget(value) {
  if (!(value > 0)) return;
  state.budget = value;
  renderChoose();
  renderPlot();
  highlightSelected();
  rememberSoon();
}

function start() {
  renderHeader();
  renderFailures();
  if (!page.panels.length || !page.tasks.length) {
    byId("choosers").hidden = byId("overview").hidden = byId("all").hidden = byId("layers").hidden = byId("maps").hidden = true;
    return;
  }
  byId("budget-slider").addEventListener("input", (event) => setBudget(Number(event.target.value)));
  byId("budget-number").addEventListener("input", (event) => setBudget(Number(event.target.value)));
  byId("x").addEventListener("change", (event) => { state.x = event.target.value; update(); });
  byId("filter").addEventListener("input", (event) => { state.filter = event.target.value; renderTable(); highlightSelected(); rememberSoon(); });
  for (const form of document.forms) form.addEventListener("submit", (event) => event.preventDefault());
  addEventListener("hashchange", recall);
  let width = 0;
  new ResizeObserver(() => {
    if (byId("plot").clientWidth === width) return;
    width = byId("plot").clientWidth;
    renderPlot();
    highlightSelected();
  }).observe(byId("plot"));
  addEventListener("beforeprint", () => { for (const each of document.querySelectorAll("details")) each.open = true; });
  recall();
}

start();
