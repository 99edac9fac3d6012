"""The HTML report says what it was given, is safe with any text, and works in a real browser without a network."""

import ast
import json
import os
import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from pydantic import ValidationError

from cachequant.benchmarks.report import page as report
from cachequant.benchmarks.report.page import (
    LayerBits,
    MetricInfo,
    Page,
    PageMemory,
    PageRow,
    Panel,
    RetrievalMap,
    TaskInfo,
    write_page,
)

NASTY = "evil:base=\"</script><script>window.pwned=1</script>\",note='ü€→𝄞 &amp; <!--',path=C:\\n"
MARKUP = "ValueError: <img src=x onerror=window.pwned=1>\n  </script> & \"quotes\" 'too' \u2028 {{data}}"

KL = MetricInfo(name="kl", label="KL mean", better="lower", digits=4, unit="nats")
TOP1 = MetricInfo(name="top1", label="top-1", better="higher", digits=1, percent=True)
FOUND = MetricInfo(name="found", label="found", better="higher", digits=1, percent=True)
TASKS = (
    TaskInfo(id="stream", title="Perplexity and KL", note="streamed", metrics=(KL, TOP1)),
    TaskInfo(id="passkey", title="Passkey", metrics=(FOUND,)),
)
PANELS = (Panel(name="small", details="a model of two layers"), Panel(name="outlier twin", details="the same, uneven"))
SPECS = (
    "uniform",
    "uniform:bits=2",
    "uniform:bits=3,key_scale=channel,key_rope=pre",
    "uniform:bits=8",
    "kvquant",
    "kvquant:bits=2",
    'qnorm:base="uniform:bits=2"',
    "h2o:keep=0.5",
    "DynamicCache",
)
KINDS = {"key codes": 600, "value codes": 300, "tail": 100, "spare": 0}


def row(spec: str, panel: str, task: TaskInfo, rng: random.Random, **more) -> PageRow:
    bits = 32.0 if spec == "DynamicCache" else rng.uniform(2.5, 9)
    metrics = {
        metric.name: rng.uniform(0.2, 1) if metric.percent else 10 ** rng.uniform(-4, 0) for metric in task.metrics
    }
    fields = {
        "strategy": spec,
        "family": spec.partition(":")[0],
        "baseline": spec == "DynamicCache",
        "panel": panel,
        "task": task.id,
        "status": "ok",
        "metrics": metrics,
        "errors": {name: 0.1 * value for name, value in metrics.items()},
        "memory": PageMemory(
            bits_per_element=bits,
            packed_bits_per_element=bits - 0.5,
            device_bytes=1000,
            host_bytes=4096 if spec == "kvquant" else 0,
            kinds=KINDS,
        ),
        "latency": {"decode_ms": rng.uniform(1, 9)},
        "seconds": 1.5,
    }
    return PageRow.model_validate(fields | more)


def failure(spec: str, panel: str, task: TaskInfo = TASKS[0], error: str = MARKUP) -> PageRow:
    return PageRow(
        strategy=spec, family=spec.partition(":")[0], panel=panel, task=task.id, status="failed", error=error
    )


def value(each: PageRow, metric: MetricInfo) -> float:
    return each.metrics[metric.name] * (1 if metric.better == "lower" else -1)


def bits(each: PageRow) -> float:
    return each.memory.bits_per_element


def decoding(each: PageRow) -> float:
    return each.latency["decode_ms"]


def front(rows: list[PageRow], metric: MetricInfo, size: Callable[[PageRow], float] = bits) -> set[str]:
    """By definition, pair by pair: no other is at most as large and as bad, one of them smaller."""
    points = {each.strategy: (size(each), value(each, metric)) for each in rows if each.memory}
    return {
        spec
        for spec, (large, bad) in points.items()
        if not any(a <= large and b <= bad and (a, b) != (large, bad) for a, b in points.values())
    }


def select(page: Page, panel: str, task: str) -> list[PageRow]:
    return [each for each in page.rows if (each.panel, each.task) == (panel, task)]


def build(rows: tuple[PageRow, ...] | None = None, **more) -> Page:
    if rows is None:
        rng = random.Random(5)
        rows = tuple(row(spec, panel.name, task, rng) for task in TASKS for panel in PANELS for spec in SPECS)
        rows += (failure("crash:bits=3", "small"), failure(NASTY, "outlier twin"))
        page = build(rows)
        marked = {
            (panel.name, task.id): front(select(page, panel.name, task.id), task.metrics[0])
            for panel in PANELS
            for task in TASKS
        }
        rows = tuple(
            each.model_copy(update={"pareto": each.strategy in marked[each.panel, each.task]}) for each in rows
        )
        more = {
            "layers": tuple(
                LayerBits(strategy=spec, panel="small", layers=((0, 2.5, 4.0), (1, 3.0, 8.0))) for spec in SPECS
            ),
            "maps": (
                RetrievalMap(
                    strategy="uniform",
                    panel="small",
                    task="passkey",
                    rows=(512, 1024),
                    columns=(0.0, 0.5, 1.0),
                    values=((1.0, 0.5, 0.0), (0.25, None, 0.75)),
                ),
            ),
        } | more
    fields = {
        "title": "Accuracy & memory",
        "created": "2026-11-21T16:57:51+00:00",
        "environment": {"device": "CPU <two cores>", "torch": "2.13"},
        "notes": ("Newest 32 exact.", NASTY),
        "panels": PANELS,
        "tasks": TASKS,
        "rows": rows,
    }
    return Page.model_validate(fields | more)


def embedded(text: str) -> str:
    return re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)[1]


# --- the file


def test_the_data_in_the_file_is_the_page_that_was_given(tmp_path):
    page = build()
    write_page(page, tmp_path / "report.html")
    assert Page.model_validate_json(embedded((tmp_path / "report.html").read_text(encoding="utf-8"))) == page


def test_no_text_can_end_the_script_it_lies_in():
    text = report.render(build(title=f"{{{{data}}}} {NASTY}"))
    assert text.lower().count("</script") == 2
    assert text.count("{{data}}") == 1 + embedded(text).count("{{data}}") + text.count("<h1>{{data}}")
    assert not set("<>&") & set(embedded(text))
    assert json.loads(embedded(text))["rows"][-1]["error"] == MARKUP


def test_nothing_in_the_file_names_another_one():
    text = report.render(build(rows=()))
    assert not re.search(
        r"\bsrc\s*=|\bhref\s*=|url\((?!#)|@import|\bimport\s*\(|fetch\(|XMLHttpRequest|WebSocket", text
    )
    addresses = set(re.findall(r"https?:[^\"'\s)]*", text))
    assert addresses == {"http://www.w3.org/2000/svg"}  # a name, which nothing loads
    assert "default-src 'none'" in text


def test_every_file_of_the_template_is_inlined():
    assert {path.name for path in report.TEMPLATE.iterdir()} == {"page.html", "page.css", *report.SCRIPTS}


def test_a_page_that_cannot_be_written_leaves_the_old_one(tmp_path, monkeypatch):
    path = tmp_path / "report.html"
    write_page(build(rows=()), path)
    old = path.read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space"):
        write_page(build(), path)
    assert path.read_bytes() == old
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rows": (failure("a", "large"),)}, "no panel is called 'large'; the page has"),
        (
            {"rows": (failure("a", "small", TaskInfo(id="other", title="", metrics=(KL,))),)},
            "no task is called 'other'",
        ),
        ({"rows": (failure("a", "small"), failure("a", "small"))}, "two rows of a on small in the task stream"),
        ({"rows": (row("a", "small", TASKS[0], random.Random(0), metrics={"x": 1}, errors={}),)}, "no metric of the"),
    ],
)
def test_rows_that_the_page_has_no_place_for_are_refused(change, message):
    with pytest.raises(ValidationError, match=message):
        build(**change)


def test_rows_that_contradict_themselves_are_refused():
    rng = random.Random(0)
    with pytest.raises(ValidationError, match="a failed row has its reason"):
        row("a", "small", TASKS[0], rng, status="failed")
    with pytest.raises(ValidationError, match="has its reason"):
        row("a", "small", TASKS[0], rng, error="no")
    with pytest.raises(ValidationError, match=r"standard errors of \['x'\]"):
        row("a", "small", TASKS[0], rng, errors={"x": 1.0})
    with pytest.raises(ValidationError, match="finite number"):
        row("a", "small", TASKS[0], rng, metrics={"kl": float("inf"), "top1": 1.0})
    with pytest.raises(ValidationError, match="one line of 2 depths for each of 1 lengths"):
        RetrievalMap(strategy="a", panel="small", task="passkey", rows=(5,), columns=(0, 1), values=((1, 1, 1),))


# --- in a browser

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
QUIET = ("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking")


@pytest.fixture(scope="module")
def browser():
    sync_api = pytest.importorskip("playwright.sync_api", reason="drives a browser: needs playwright")
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        pytest.skip(f"no browser is installed under a name of {', '.join(BROWSERS)}")
    with sync_api.sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=found, args=list(QUIET))
        yield opened
        opened.close()


@pytest.fixture
def visit(browser, tmp_path):
    """Open a page; nothing may be logged as an error, and nothing but the file requested."""
    contexts, complaints, requests = [], [], []

    def opening(page: Page, hash: str = "", width: int = 1280, dark: bool = False):
        path = Path(tmp_path / "report.html")
        write_page(page, path)
        context = browser.new_context(
            viewport={"width": width, "height": 900}, color_scheme="dark" if dark else "light", offline=True
        )
        contexts.append(context)
        context.add_init_script("navigator.clipboard.writeText = async (text) => { window.clipboard = text; }")
        tab = context.new_page()
        tab.on("console", lambda message: complaints.append(message.text) if message.type != "log" else None)
        tab.on("pageerror", lambda error: complaints.append(str(error)))
        tab.on("request", lambda request: requests.append(request.url))
        tab.set_default_timeout(20000)
        tab.goto(path.as_uri() + hash)
        tab.wait_for_selector("#failures li, #failures .quiet")
        return tab

    yield opening
    for context in contexts:
        context.close()
    assert complaints == []
    assert all(url.startswith("file:") and url.split("#")[0].endswith("report.html") for url in requests), requests


def texts(tab, selector: str) -> list[str]:
    return tab.locator(selector).evaluate_all("found => found.map((each) => each.textContent)")


def specs_in(tab) -> list[str]:
    return tab.locator("#table tr[data-strategy]").evaluate_all("rows => rows.map((row) => row.dataset.strategy)")


def choose(tab, group: str, value: str) -> None:
    tab.locator(f"input[name='{group}'][value='{value}']").check()


def test_the_header_tells_what_was_measured_where(visit):
    tab = visit(build())
    assert tab.title() == tab.inner_text("h1") == "Accuracy & memory"
    assert "11 strategies of KV-cache quantization, measured on 2 models and 2 tasks, 2026-11-21" in tab.inner_text(
        "#lede"
    )
    assert not tab.is_visible("#environment dd >> nth=0")
    tab.click("#environment summary")
    assert tab.is_visible("text=CPU <two cores>")
    tab.click("#notes summary")
    assert texts(tab, "#notes li") == ["Newest 32 exact.", NASTY]


def test_columns_sort_by_number_and_failures_stay_last(visit):
    page = build()
    tab = visit(page)
    rows = {each.strategy: each for each in select(page, "small", "stream") if each.status == "ok"}
    order = sorted(rows, key=lambda spec: rows[spec].memory.bits_per_element)
    assert specs_in(tab) == [*order, "crash:bits=3"]
    for head, descending, key in (
        ("KL mean", False, lambda spec: rows[spec].metrics["kl"]),
        ("top-1", True, lambda spec: rows[spec].metrics["top1"]),
        ("decode ms", False, lambda spec: rows[spec].latency["decode_ms"]),
    ):
        button = tab.locator("#table thead button", has_text=head)
        for turned in (descending, not descending):
            button.click()
            assert specs_in(tab) == [*sorted(rows, key=key, reverse=turned), "crash:bits=3"]
            state = tab.locator("#table thead th", has_text=head).get_attribute("aria-sort")
            assert state == ("descending" if turned else "ascending")
            assert tab.evaluate("document.activeElement.textContent").startswith(head), "the keyboard keeps its place"
    assert "failed: ValueError: <img src=x" in tab.inner_text("#table tr.failed .reason")


def test_the_filter_narrows_the_table(visit):
    page = build()
    tab = visit(page)
    tab.fill("#filter", "uniform bits=")
    assert {*specs_in(tab)} == {spec for spec in SPECS if "uniform" in spec and "bits=" in spec}
    assert tab.inner_text("#count") == "4 of 10 rows"
    tab.fill("#filter", "front")
    assert {*specs_in(tab)} == front(select(page, "small", "stream"), KL)
    tab.fill("#filter", "no such thing")
    assert specs_in(tab) == []


def test_the_front_is_of_the_axes_that_are_shown(visit):
    page = build()
    tab = visit(page, "#filter=front")
    for panel in PANELS:
        choose(tab, "panel", panel.name)
        for task in TASKS:
            choose(tab, "task", task.id)
            for metric in task.metrics:
                choose(tab, "metric", metric.name)
                for axis, size in (("bits", bits), ("latency decode_ms", decoding)):
                    tab.select_option("#x", axis)
                    expected = front(select(page, panel.name, task.id), metric, size)
                    assert {*specs_in(tab)} == expected
                    drawn = tab.locator(".point.optimal").evaluate_all(
                        "all => all.map((each) => each.dataset.strategy)"
                    )
                    assert {*drawn} == expected


def test_the_chooser_finds_what_python_finds(visit):
    page = build()
    tab = visit(page)
    for panel in PANELS:
        choose(tab, "panel", panel.name)
        for task in TASKS:
            choose(tab, "task", task.id)
            for metric in task.metrics:
                choose(tab, "metric", metric.name)
                rows = [each for each in select(page, panel.name, task.id) if each.memory]
                sizes = sorted(each.memory.bits_per_element for each in rows)
                for budget in (sizes[1] + 0.01, sizes[3] + 0.01, sizes[6] + 0.01, 40):
                    tab.fill("#budget-number", str(budget))
                    fitting = [each for each in rows if each.memory.bits_per_element <= budget]
                    best, second = sorted(fitting, key=lambda each: value(each, metric))[:2]
                    assert tab.inner_text("#answer .best code") == best.strategy
                    assert texts(tab, "#answer .other >> nth=0 >> code") == [second.strategy]
                    figure = best.metrics[metric.name]
                    written = f"{figure:.1%}".replace("%", " %") if metric.percent else f"{figure:.4f}"
                    assert tab.inner_text("#answer .headline b") == written
                    chosen = tab.locator(".point.chosen").get_attribute("data-strategy")
                    assert chosen == best.strategy


def test_the_chooser_says_what_it_cannot_buy_and_what_it_did_not_measure(visit):
    page = build()
    tab = visit(page)
    tab.fill("#budget-number", "1")
    smallest = min(
        (each for each in select(page, "small", "stream") if each.memory), key=lambda each: each.memory.bits_per_element
    )
    answer = tab.inner_text("#answer")
    assert (
        answer == f"Nothing fits. The smallest is {smallest.strategy} at {smallest.memory.bits_per_element:.2f} bits."
    )


def test_the_slider_sets_the_budget(visit):
    tab = visit(build())
    tab.focus("#budget-slider")
    tab.keyboard.press("End")
    most = tab.locator("#budget-slider").input_value()
    assert tab.locator("#budget-number").input_value() == most
    assert 8 < float(most) <= 16
    assert f"{16 / float(most):.1f}\u00d7 smaller than a 16-bit cache" in tab.inner_text("#budget-meaning")


def test_hidden_families_are_not_chosen(visit):
    page = build()
    tab = visit(page, "#budget=40")
    rows = [each for each in select(page, "small", "stream") if each.memory]
    hidden = set()
    while len({each.family for each in rows} - hidden) > 1:
        best = min((each for each in rows if each.family not in hidden), key=lambda each: value(each, KL))
        assert tab.inner_text("#answer .best code") == best.strategy
        tab.locator("#legend button[aria-pressed]", has_text=best.family).click()
        hidden.add(best.family)
        left = [each for each in rows if each.family not in hidden]
        assert tab.locator(".point").count() == len(left)
        assert tab.locator(".point.optimal").count() == len(front(left, KL))
    tab.click("text=show all")
    assert tab.locator(".point").count() == len(rows)


def test_a_hovered_point_tells_its_figures_and_their_error(visit):
    page = build()
    tab = visit(page)
    tab.locator(".point[data-strategy='kvquant']").hover()
    row = next(each for each in select(page, "small", "stream") if each.strategy == "kvquant")
    tip = tab.inner_text("#tip")
    assert tip.startswith("kvquant\n")
    assert f"{row.memory.bits_per_element:.2f}" in tip
    assert f"{row.metrics['kl']:.4f} ± {row.errors['kl']:.4f}" in tip
    assert f"{100 * row.metrics['top1']:.1f} % ± {100 * row.errors['top1']:.1f}" in tip
    assert "4.0 KiB" in tip, "what lies in host memory is not in the bits"
    tab.mouse.move(0, 0)
    assert not tab.is_visible("#tip")


def test_points_and_rows_mark_each_other(visit):
    tab = visit(build())
    tab.locator(".point[data-strategy='uniform:bits=8']").click()
    marked = "all => all.map((each) => each.dataset.strategy)"
    assert tab.locator("#table tr.selected").evaluate_all(marked) == ["uniform:bits=8"]
    tab.locator("#table tr[data-strategy='kvquant'] td.figure >> nth=1").click()
    assert tab.locator(".point.selected").evaluate_all(marked) == ["kvquant"]
    assert "kvquant" in tab.inner_text("#selected")
    tab.fill("#filter", "uniform")
    tab.click("text=see in table")
    assert tab.locator("#table tr.selected").evaluate_all(marked) == ["kvquant"]


def test_the_plot_is_read_by_keyboard(visit):
    page = build()
    tab = visit(page)
    assert tab.locator(".point[tabindex='0']").count() == 1, "one stop for the tab key"
    tab.locator(".point[tabindex='0']").focus()
    order = sorted(
        (each for each in select(page, "small", "stream") if each.memory), key=lambda each: each.memory.bits_per_element
    )
    for each in order[1:]:
        tab.keyboard.press("ArrowRight")
        assert tab.inner_text("#tip code") == each.strategy
    tab.keyboard.press("Enter")
    assert tab.locator("#table tr.selected").get_attribute("data-strategy") == order[-1].strategy


def test_a_link_restores_what_was_looked_at(visit):
    page = build()
    tab = visit(page)
    choose(tab, "panel", "outlier twin")
    choose(tab, "metric", "top1")
    tab.select_option("#x", "latency decode_ms")
    tab.fill("#budget-number", "5.5")
    tab.fill("#filter", "uniform")
    tab.locator("#table thead button", has_text="top-1").click()
    tab.locator("#legend button", has_text="h2o").click()
    tab.locator(".point[data-strategy='uniform:bits=2']").click()
    tab.mouse.move(0, 0)
    hash = tab.evaluate("location.hash")
    again = visit(page, hash)
    for each in ("#choosers", "#answer", "#table", "#selected", "#legend", "#plot"):
        assert again.inner_text(each) == tab.inner_text(each)
    assert again.locator("#x").input_value() == "latency decode_ms"
    assert again.locator("#filter").input_value() == "uniform"
    assert again.locator("#budget-number").input_value() == "5.5"
    assert again.locator(".point.selected").get_attribute("data-strategy") == "uniform:bits=2"


def test_a_link_to_what_is_not_there_shows_what_is(visit):
    tab = visit(build(), "#model=gone&task=gone&metric=gone&x=gone&sort=-gone&budget=-3&hide=gone&pick=gone")
    assert tab.locator("input[name='panel']:checked").input_value() == "small"
    assert len(specs_in(tab)) == len(SPECS) + 1


def test_what_is_copied_is_the_spec_in_python(visit):
    rows = (*build().rows, row(NASTY, "small", TASKS[0], random.Random(1)))
    tab = visit(build(rows))
    for spec in ("uniform:bits=2", 'qnorm:base="uniform:bits=2"', NASTY):
        tab.locator("#table tbody tr").filter(has=tab.get_by_role("button", name=spec, exact=True)).locator(
            ".copy"
        ).click()
        tab.wait_for_function("window.clipboard")
        call = ast.parse(tab.evaluate("window.clipboard"), mode="eval").body
        assert ast.unparse(call.func) == "registry.parse"
        assert ast.literal_eval(call.args[0]) == spec
    assert tab.locator("#table tr[data-strategy='DynamicCache'] .copy").count() == 0


def test_a_row_opens_to_what_its_memory_consists_of(visit):
    tab = visit(build())
    tab.click("[aria-label='Details of uniform']")
    assert tab.locator("#table .open[aria-expanded='true']").count() == 1
    assert texts(tab, ".memory li") == ["key codes 600 B 60.0 %", "value codes 300 B 30.0 %", "tail 100 B 10.0 %"]
    widths = tab.locator(".memory .bar span").evaluate_all("all => all.map((each) => each.offsetWidth)")
    assert widths[0] == pytest.approx(2 * widths[1], rel=0.02)
    tab.click("[aria-label='Details of uniform']")
    assert tab.locator(".memory").count() == 0


def test_heat_maps_show_their_figures(visit):
    tab = visit(build())
    first = tab.locator("#layers tbody tr >> nth=0").locator("td:not(.gap)")
    assert first.all_inner_texts() == ["2.5", "3.0", "4.0", "8.0"]
    shares = first.evaluate_all("all => all.map((each) => parseFloat(each.style.getPropertyValue('--share')))")
    assert shares == pytest.approx([0, 100 * 0.5 / 5.5, 100 * 1.5 / 5.5, 100], abs=0.1)
    assert tab.locator("#maps tbody td").all_inner_texts() == ["100", "50", "0", "25", "", "75"]
    assert "not measured" in tab.locator("#maps td.none").get_attribute("title")
    choose(tab, "panel", "outlier twin")
    assert tab.inner_text("#maps > div") == "Not measured on outlier twin."


def test_text_stays_text(visit):
    tab = visit(build(title=NASTY))
    choose(tab, "panel", "outlier twin")
    assert tab.inner_text("h1") == NASTY
    assert NASTY in texts(tab, "#failures code")
    assert MARKUP in texts(tab, "#failures .long")
    assert tab.evaluate("window.pwned") is None
    assert tab.locator("img").count() == 0


@pytest.mark.parametrize(
    "page",
    [
        build(rows=()),
        build(rows=(), panels=(), tasks=()),
        build(rows=(failure("crash", "small"), failure(NASTY, "small"))),
        build(rows=(failure("crash", "small"),), tasks=(TaskInfo(id="stream", title="-", metrics=()), TASKS[1])),
        build(rows=(row("alone", "small", TASKS[0], random.Random(3)),)),
        build(rows=(row("bare", "small", TASKS[0], random.Random(3), memory=None, metrics={}, errors={}, latency={}),)),
        build(rows=tuple(row(s, "small", TASKS[0], random.Random(3), metrics={"kl": 0.0, "top1": 1.0}) for s in "ab")),
    ],
    ids=[
        "no rows",
        "nothing at all",
        "only failures",
        "a task without metrics",
        "one row",
        "no figures",
        "exact twins",
    ],
)
def test_pages_with_little_in_them_open(visit, page):
    tab = visit(page)
    failed = [each for each in page.rows if each.status == "failed"]
    assert tab.locator("#failures li").count() == len(failed)
    assert tab.locator(".point").count() == sum(bool(each.memory and each.metrics) for each in page.rows)
    if page.panels:
        choose(tab, "panel", "outlier twin")
        choose(tab, "task", "passkey")


@pytest.mark.parametrize("width", [1280, 400])
@pytest.mark.parametrize("metric", ["kl", "top1"])
def test_nothing_sticks_out_and_no_labels_lie_on_each_other(visit, width, metric):
    tab = visit(build(), f"#metric={metric}", width=width)
    tab.click("[aria-label='Details of uniform']")
    tab.click("#notes summary")
    tab.locator(".point[data-strategy='uniform']").hover()
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    outside = tab.evaluate(
        """() => [...document.querySelectorAll('body *')]
            .filter((each) => !each.closest('.scroll') && each.getBoundingClientRect().width > 0)
            .map((each) => [each.getBoundingClientRect(), each.outerHTML.slice(0, 120)])
            .filter(([box]) => box.right > innerWidth + 0.5 || box.left < -0.5)"""
    )
    assert outside == []
    edges = "all => all.map((each) => each.getBoundingClientRect()).map((b) => [b.left, b.right, b.top, b.bottom])"
    boxes = tab.locator("#plot .label text").evaluate_all(edges)
    assert boxes, "points of the front are labelled"
    for i, (left, right, top, bottom) in enumerate(boxes):
        for other in boxes[:i]:
            # glyph boxes have a little air above and below
            assert right <= other[0] or other[1] <= left or bottom - 2 <= other[2] + 1 or other[3] - 2 <= top + 1
        for point in tab.locator("#plot .point path").evaluate_all(edges):
            x, y = (point[0] + point[1]) / 2, (point[2] + point[3]) / 2
            assert not (left < x < right and top < y < bottom)


def test_dark_readers_get_a_dark_page(visit):
    light = (
        "getComputedStyle(document.body).backgroundColor.match(/\\d+/g).reduce((sum, each) => sum + Number(each), 0)"
    )
    ink = light.replace("backgroundColor", "color")
    tab = visit(build())
    assert tab.evaluate(light) > 600 > 200 > tab.evaluate(ink)
    tab.emulate_media(color_scheme="dark")
    assert tab.evaluate(light) < 200 < 600 < tab.evaluate(ink)
