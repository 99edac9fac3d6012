"""Results as terminal tables, Markdown, JSON and picture."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich import box
from rich.markup import escape
from rich.table import Table

from .results import (
    AttentionTiming,
    Ceilings,
    Check,
    DecodeTiming,
    EncodeTiming,
    Exactness,
    PrefillTiming,
    Results,
)

DRY = "dry run: no timings"
NAME = "gpu"
STEM = {"json": f"{NAME}.json", "md": f"{NAME}.md", "png": f"{NAME}.png"}


class Sheet(NamedTuple):
    """One table; the first `words` columns are text."""

    title: str
    headings: tuple[str, ...]
    rows: list[tuple[str, ...]]
    words: int = 1


# ---- sheets ----------------------------------------------------------------------------------------------------------


def ceilings(found: Ceilings) -> Sheet:
    """The device's bandwidth."""
    rows = [("read only", _number(found.read_tb_s, 2)), ("copy, read and written", _number(found.copy_tb_s, 2))]
    return Sheet("Memory bandwidth", ("what", "TB/s"), rows)


def exactness(found: Sequence[Exactness]) -> Sheet:
    """Subnormals in matrix units."""
    rows = [(each.shape, each.instruction or "-", "exact" if each.exact else "FLUSHED") for each in found]
    return Sheet("float16 subnormals in the matrix units", ("product", "instruction", "result"), rows, 3)


def checks(found: Sequence[Check]) -> Sheet:
    """Comparisons with the reference, one line per case."""
    cases: dict[str, dict[str, Check]] = {}
    for each in found:
        cases.setdefault(each.case, {})[each.variant] = each
    variants = [name for name in ("assembly", "portable", "encode", "unpack") if any(name in c for c in cases.values())]
    rows = []
    for name, by_variant in cases.items():
        shown = [by_variant.get(variant) for variant in variants]
        equal = {each.replay_equal for each in by_variant.values()} - {None}
        graph = "-" if not equal else "equal" if equal == {True} else "DIFFERS"
        rows.append((name, *("-" if each is None else _checked(each) for each in shown), graph))
    title = "Errors against the reference (attention: relative, in float64; encode: share that differs)"
    return Sheet(title, ("case", *variants, "graph replay"), rows)


def attention(found: Sequence[AttentionTiming]) -> list[Sheet]:
    """One sheet per shape."""
    shapes: dict[tuple[int, ...], list[AttentionTiming]] = {}
    for each in found:
        shapes.setdefault(each.shape, []).append(each)
    headings = ("contender", "MB read", "us", "TB/s", "of read ceiling", "vs best 16-bit")
    sheets = []
    for (batch, kv_heads, group, tokens), rows in shapes.items():
        title = f"Decode attention, {_tokens(tokens)} tokens, batch {batch}, {kv_heads} kv heads x {group}"
        sheets.append(Sheet(title, headings, [_attention_row(each) for each in rows]))
    return sheets


def encode(found: Sequence[EncodeTiming]) -> Sheet:
    """Packing a prompt."""
    rows = [
        (
            each.strategy,
            _tokens(each.tokens),
            _number(each.ms, 3),
            _number(each.ms_per_million, 2),
            _percent(each.share_of_attention),
            _percent(each.share_of_layer),
        )
        for each in found
    ]
    headings = ("strategy", "tokens", "ms", "ms per 1M token-heads", "of attention", "of the layer")
    return Sheet("Encoding keys and values of one layer's prompt", headings, rows)


def decode(found: Sequence[DecodeTiming]) -> list[Sheet]:
    """One sheet per model and context."""
    groups: dict[tuple[str, int], list[DecodeTiming]] = {}
    for each in found:
        groups.setdefault((each.model, each.tokens), []).append(each)
    headings = ("cache", "ms eager", "ms graph", "tokens/s", "cache GB", "peak GB")
    return [
        Sheet(f"Decoding, {model} at {_tokens(tokens)} tokens", headings, [_decode_row(each) for each in rows])
        for (model, tokens), rows in groups.items()
    ]


def prefill(found: Sequence[PrefillTiming]) -> Sheet:
    """Whole prompts."""
    rows = [
        (
            each.model,
            each.contender,
            _tokens(each.tokens),
            _number(each.ms, 1),
            _times(each.ratio),
            _gb(each.peak_bytes),
        )
        for each in found
    ]
    headings = ("model", "cache", "tokens", "ms", "vs DynamicCache", "peak GB")
    return Sheet("Prefill of an empty cache", headings, rows, 2)


def sheets(results: Results) -> list[Sheet]:
    """All that there is."""
    found: list[Sheet] = []
    if results.ceilings is not None:
        found.append(ceilings(results.ceilings))
    if results.exactness:
        found.append(exactness(results.exactness))
    found += attention(results.attention)
    if results.encode:
        found.append(encode(results.encode))
    found += decode(results.decode)
    if results.prefill:
        found.append(prefill(results.prefill))
    if results.checks:
        found.append(checks(results.checks))
    return found


def table(sheet: Sheet) -> Table:
    """For rich."""
    made = Table(title=escape(sheet.title), box=box.SIMPLE_HEAD, title_justify="left", pad_edge=False)
    for number, heading in enumerate(sheet.headings):
        made.add_column(heading, justify="left" if number < sheet.words else "right")
    for row in sheet.rows:
        made.add_row(*map(escape, row))
    return made


def markdown(results: Results) -> str:
    """All tables, with the conditions under them."""
    parts = [f"# {title(results)}", describe(results)]
    for sheet in sheets(results):
        lines = [
            sheet.headings,
            ["---" if i < sheet.words else "---:" for i in range(len(sheet.headings))],
            *sheet.rows,
        ]
        parts.append(f"## {sheet.title}\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines))
    for heading, lines in (("Notes", results.notes), ("Left out", results.skipped), ("Failed", results.failures)):
        if lines:
            parts.append(f"## {heading}\n\n" + "\n".join(f"- {line}" for line in lines))
    return "\n\n".join(parts) + "\n"


def title(results: Results) -> str:
    """What was measured where; a dry run says so first."""
    name = results.hardware.environment.device
    return f"Kernels on {name}" if not results.dry else f"{DRY} (kernels interpreted on {name})"


def conditions(results: Results) -> str:
    """Device and versions, in a line."""
    hardware = results.hardware
    facts = [
        f"driver {hardware.driver}" if hardware.driver else "",
        f"CUDA {hardware.cuda}" if hardware.cuda else "",
        f"Triton {hardware.triton}" if hardware.triton else "",
        *(f"{name} {version}" for name, version in hardware.packages.items()),
    ]
    return f"{hardware.environment}; {', '.join(filter(None, facts)) or 'no CUDA, no Triton'}."


def describe(results: Results) -> str:
    """The conditions without which the figures mean nothing."""
    lines = [conditions(results)]
    if results.dry:
        lines.append(f"**{DRY}.** The kernels ran in Triton's interpreter on tiny shapes, to prove the logic.")
        return "\n\n".join(lines)
    seconds = ", ".join(f"{name} {taken:.0f} s" for name, taken in results.spent_s.items())
    lines.append(
        "Times are medians of 5 replays of a CUDA graph over inputs that take turns, more than 300 MB of them, so that "
        "none is found in the cache of the device. MB read are those of the cache alone; the ratio is to the best of "
        f"the 16-bit contenders at the same shape. Budget {results.budget_s:.0f} s: {seconds}."
    )
    return "\n\n".join(lines)


def write(results: Results, folder: Path) -> list[Path]:
    """All files; returns their paths."""
    paths = {kind: folder / name for kind, name in STEM.items()}
    write_json(results, folder)
    paths["md"].write_text(markdown(results), encoding="utf-8")
    # imported here: figures can be measured and printed without matplotlib
    from .chart import draw

    draw(results, paths["png"])
    return list(paths.values())


def write_json(results: Results, folder: Path) -> None:
    """What there is so far."""
    (folder / STEM["json"]).write_text(results.model_dump_json(indent=2) + "\n", encoding="utf-8")


# ---- cells -----------------------------------------------------------------------------------------------------------


def _attention_row(each: AttentionTiming) -> tuple[str, ...]:
    figures = (_number(each.us, 1), _number(each.tb_s, 2), _percent(each.share), _times(each.ratio))
    return (each.contender, f"{each.bytes / 1e6:.1f}", *figures)


def _decode_row(each: DecodeTiming) -> tuple[str, ...]:
    figures = (_number(each.eager_ms, 2), _number(each.graph_ms, 2), _number(each.tokens_per_s, 1))
    return (each.contender, *figures, _gb(each.cache_bytes), _gb(each.peak_bytes))


def _checked(each: Check) -> str:
    if each.error is None:
        return "failed"
    return f"{each.error:.1e}" + (" WRONG" if each.wrong else "")


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:,.{digits}f}"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.0%}" if value >= 0.1 else f"{value:.1%}"


def _times(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}x"


def _gb(value: int | None) -> str:
    return "-" if value is None else f"{value / 1e9:.2f}"


def _tokens(count: int) -> str:
    if count % 1024:
        return str(count)
    return f"{count // 1024}K" if count < 1 << 20 else f"{count >> 20}M"


def distinct(names: Iterable[Any]) -> list[Any]:
    """Each once, in their order."""
    return list(dict.fromkeys(names))
