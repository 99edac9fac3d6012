"""The report as one HTML file that opens offline: data, style and script inlined, nothing loaded from elsewhere."""

import base64
import hashlib
import html
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, model_validator

from .files import replace

TEMPLATE = Path(__file__).parent / "template"

# One script in this order: later files use what earlier ones define.
SCRIPTS = ("elements.js", "figures.js", "choose.js", "plot.js", "table.js", "heat.js", "page.js")


class _Record(BaseModel):
    # JSON has no infinity: a figure that is not finite must not reach the page as a gap
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Panel(_Record):
    """A model that strategies were measured on."""

    name: str
    details: str
    """Architecture, parameters, dtype, context: one line."""


class MetricInfo(_Record):
    """A figure of a task and how it is written."""

    name: str
    """Its key in `PageRow.metrics` and `PageRow.errors`."""
    label: str
    better: Literal["higher", "lower"]
    digits: int = 2
    """After the point, of the percentage where `percent` is set."""
    percent: bool = False
    """The figure is a share, 0 to 1, shown as per cent."""
    unit: str = ""
    """"nats", for example; nothing for plain numbers and shares."""


class TaskInfo(_Record):
    """A task with its metrics, the most telling one first."""

    id: str
    title: str
    note: str = ""
    """How it is measured: one line."""
    metrics: tuple[MetricInfo, ...]
    """None at all where no run of the task came to figures."""


class PageMemory(_Record):
    """What a cache held at the end of a run."""

    bits_per_element: float
    """Device bits per cached number, everything included."""
    packed_bits_per_element: float
    """Of the packed part alone; 0 where nothing is packed."""
    device_bytes: int
    host_bytes: int
    kinds: dict[str, int] = {}
    """Bytes by kind, `MemoryReport.rows`; they add up to device and host bytes."""


class PageRow(_Record):
    """One strategy on one model in one task: its figures, or the reason why there are none."""

    strategy: str
    """A spec that `registry.parse` reads, unless `baseline` is set."""
    label: str = ""
    """A short name for the plot; the spec where there is none."""
    family: str
    """What shares a colour: the strategy's name without its settings."""
    baseline: bool = False
    """A cache that readers have without this package: drawn apart, no spec to copy."""
    panel: str
    """`Panel.name`."""
    task: str
    """`TaskInfo.id`."""
    status: Literal["ok", "failed"]
    error: str | None = None
    metrics: dict[str, float] = {}
    """By `MetricInfo.name`; a figure that could not be had, or is not finite, is left out."""
    errors: dict[str, float] = {}
    """Standard errors of `metrics`, by the same names."""
    memory: PageMemory | None = None
    latency: dict[str, float] = {}
    """Times by name, in the unit that the name tells: `decode_ms`."""
    seconds: float = 0.0
    """The whole run took."""
    predictions: str | None = None
    """Where the predictions lie, relative to the page."""
    pareto: bool = False
    """On the front of bits held and the task's first metric, as every report of the run marks it. Fronts of other
    axes, and of a part of the families, are computed in the page."""

    @model_validator(mode="after")
    def _figures_or_reason(self) -> Self:
        if (self.status == "failed") != (self.error is not None):
            raise ValueError(
                f"{self.strategy} on {self.panel} has status={self.status!r} and error={self.error!r}; "
                "a failed row has its reason in `error`, one that is ok has error=None"
            )
        if unknown := sorted(self.errors.keys() - self.metrics.keys()):
            raise ValueError(
                f"{self.strategy} on {self.panel}: standard errors of {unknown}, which it has no figure of"
            )
        return self


class LayerBits(_Record):
    """How many bits the keys and values of each layer take."""

    strategy: str
    panel: str
    layers: tuple[tuple[int, float, float], ...]
    """Index of the layer, bits per key number, bits per value number."""


class RetrievalMap(_Record):
    """How often something hidden in a long context was found, by length of the context and depth in it."""

    strategy: str
    panel: str
    task: str
    rows: tuple[int, ...]
    """Lengths in tokens."""
    columns: tuple[float, ...]
    """Depths: 0 is the beginning of the context, 1 its end."""
    values: tuple[tuple[float | None, ...], ...]
    """`[lengths, depths]`, shares from 0 to 1; None was not measured."""

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if [len(line) for line in self.values] != [len(self.columns)] * len(self.rows):
            raise ValueError(
                f"the map of {self.strategy} has {len(self.values)} lines of {sorted({len(v) for v in self.values})} "
                f"values; give one line of {len(self.columns)} depths for each of {len(self.rows)} lengths"
            )
        return self


class Page(_Record):
    """All that the report shows.

    Raises:
        ValueError: a row names a panel, task or metric that the page does not have, or two rows are of one cell.
    """

    title: str
    created: str
    """ISO 8601."""
    environment: dict[str, str]
    """Device, versions, commit: whatever the figures hang on."""
    notes: tuple[str, ...] = ()
    """The conditions without which the figures mean nothing: protocol, texts, calibration."""
    panels: tuple[Panel, ...]
    tasks: tuple[TaskInfo, ...]
    rows: tuple[PageRow, ...] = ()
    layers: tuple[LayerBits, ...] = ()
    maps: tuple[RetrievalMap, ...] = ()

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        panels = {panel.name for panel in self.panels}
        metrics = {task.id: {metric.name for metric in task.metrics} for task in self.tasks}
        _named("panel", [each.panel for each in (*self.rows, *self.layers, *self.maps)], panels)
        _named("task", [each.task for each in (*self.rows, *self.maps)], metrics)
        cells = set()
        for row in self.rows:
            _named(f"metric of the task {row.task}", row.metrics, metrics[row.task])
            cell = (row.strategy, row.panel, row.task)
            if cell in cells:
                raise ValueError(f"two rows of {row.strategy} on {row.panel} in the task {row.task}; give one")
            cells.add(cell)
        return self


def write_page(page: Page, path: Path) -> None:
    """Write the report to `path`; a reader sees the old file or the new one, never half of one."""
    replace(path, render(page))


def render(page: Page) -> str:
    """The HTML of the report."""
    style = (TEMPLATE / "page.css").read_text(encoding="utf-8")
    parts = "\n".join((TEMPLATE / name).read_text(encoding="utf-8") for name in SCRIPTS)
    script = f'"use strict";\n(() => {{\n{parts}\n}})();\n'
    # what a spec or an error message says is text wherever it ends up: nothing but these two may run or load
    policy = f"default-src 'none'; style-src '{_digest(style)}'; script-src '{_digest(script)}'"
    values = {
        "policy": policy,
        "title": html.escape(page.title),
        "style": style,
        "script": script,
        "data": _inert(page.model_dump_json()),
    }
    # in one pass: a title that looks like a placeholder stays a title
    template = (TEMPLATE / "page.html").read_text(encoding="utf-8")
    return re.sub(r"\{\{(\w+)\}\}", lambda match: values[match[1]], template)


def _named(kind: str, names: Iterable[str], known: Iterable[str]) -> None:
    if unknown := sorted(set(names) - set(known)):
        raise ValueError(f"no {kind} is called {', '.join(map(repr, unknown))}; the page has {sorted(known)}")


def _inert(data: str) -> str:
    """The same JSON without a character that HTML reads as the beginning or end of anything."""
    return data.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def _digest(text: str) -> str:
    """By which a content security policy knows an inlined element."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
