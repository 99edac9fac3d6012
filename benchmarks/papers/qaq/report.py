"""The answers to QAQ's questions as sentences, Markdown, JSON and picture."""

import io
import os
from collections.abc import Iterator
from pathlib import Path

from ...report.board import describe
from .curves import Advantage, Comparison, Compressed
from .figures import LEVELS, Geometry, Paper, repository_ratio
from .results import DROPPING, OTHERS, QAQ, QUESTIONS, SIDES, VALUE_TARGET, Equal, Line, Result

ACCOUNTED = (QAQ, "no outliers", DROPPING)
BESIDE = "Llama-2-7B"
"""The paper's model whose shape the accounting is shown for."""


def verdicts(result: Result, paper: Paper) -> list[str]:
    """What was found, a sentence each."""
    found = [f"{answer.question}, {answer.panel}: {_sentence(answer.packed)}." for answer in result.answers]
    least, most = paper.compression.over_compared
    for panel in result.shapes:
        here = [each for each in result.equal if each.panel == panel and each.size == "packed"]
        if here:
            shown = ", ".join(f"{_times(each.keeping)} at KL {each.kl:g}" for each in here if each.keeping.ratio)
            found.append(
                f"Compression, {panel}: {_claim(here, least)}; QAQ over the best eviction {shown or 'nowhere known'}; "
                f"the paper claims {least:g} to {most:g} times."
            )
    return found


def failures(result: Result) -> list[str]:
    """One line per row without figures."""
    return [f"{line.row.strategy} on {line.row.panel}: {line.row.error}" for line in result.lines if line.row.error]


def markdown(result: Result, paper: Paper) -> str:
    """All tables, with the conditions under them."""
    cards = ", ".join(f"{card.panel} ({card.architecture}, {card.dtype})" for card in result.board.models)
    parts = [f"# {result.title}", f"{result.source}, on {cards}."]
    if found := verdicts(result, paper):
        parts += ["## Verdicts", _list(found)]
    if lost := failures(result):
        parts.append(_list([f"failed: {each}" for each in lost]))
    parts += [*_ablations(result, paper), *_compression(result, paper), *_accounting(result, paper), *_rows(result)]
    return "\n\n".join([*parts, "## How", *_how(result, paper)]) + "\n"


def write(result: Result, paper: Paper, folder: Path, name: str) -> None:
    """`<name>.md` and `<name>.json`."""
    _put(folder / f"{name}.md", markdown(result, paper).encode())
    _put(folder / f"{name}.json", (result.model_dump_json(indent=2) + "\n").encode())


def draw(result: Result, path: Path) -> None:
    """The picture."""
    # imported here: results can be written and printed without matplotlib
    from .chart import figure

    image = io.BytesIO()
    figure(result).savefig(image, format="png")
    _put(path, image.getvalue())


def _ablations(result: Result, paper: Paper) -> Iterator[str]:
    if not result.answers:
        return
    yield "## Ablations"
    yield (
        "Bits without over bits with what the paper recommends, at equal mean KL: above 1 it saves bits. Mean over the "
        "logarithm of KL where both curves overlap, least and most in brackets. It holds, or does not, where it would "
        "even if the winner's KL were a tenth more than measured. In the last column sizes are by the paper's "
        "accounting: codes, scales, 16 bits per outlier."
    )
    for question in QUESTIONS:
        answers = [answer for answer in result.answers if answer.question == question.title]
        if not answers:
            continue
        yield f"### {question.title}"
        if ablation := paper.ablation(question.table):
            yield f"Paper, table {ablation.table}, {len(ablation.rows)} rows: {ablation.summary()}."
        elif question.worse == "shared bits":
            yield _one_side(paper)
        yield _table(
            ["model", "mean KL", "packed bits", "verdict", "paper's accounting", "verdict"],
            [
                [
                    answer.panel,
                    _span(answer.packed),
                    _ratio(answer.packed),
                    answer.packed.verdict,
                    _ratio(answer.paper),
                    answer.paper.verdict,
                ]
                for answer in answers
            ],
            left=(0, 3, 5),
        )


def _one_side(paper: Paper) -> str:
    side = paper.one_side
    bits, keys, values = (", ".join(f"{each:g}" for each in row) for row in (side.bits, side.keys, side.values))
    return (
        f"Paper, figure {side.figure} ({side.note}), {side.model}, {side.task}, accuracy where one side has {bits} "
        f"bits and the other 16: keys {keys}; values {values}; both 16: {side.exact:g}. It has no table of shared bits."
    )


def _compression(result: Result, paper: Paper) -> Iterator[str]:
    if not result.equal:
        return
    claim = paper.compression
    least, most = claim.over_compared
    yield "## Compression at equal accuracy"
    printed = "; ".join(
        f"{model} {', '.join(f'{task} {ratio:g}' for task, ratio in zip(paper.tasks, ratios, strict=True))}"
        for model, ratios in claim.ratios.items()
    )
    compared = ", ".join(f"{name} {_range(low, high)}" for name, (low, high) in claim.compared.items())
    yield (
        f"Paper, table {claim.table}, {claim.title.lower()}: {printed}. Others, as it quotes them: {compared}. It "
        f"claims {least:g} to {most:g} times the best of them."
    )
    yield (
        "16 bits over the bits at which a method reaches a mean KL. ≥: its smallest setting is still more accurate "
        "than that. -: none of its settings is as accurate. The tail that QAQ and uniform keep exact is not packed; "
        "evictions count it in their budget. In windows this short it matters, so sizes as held stand below."
    )
    for panel in result.shapes:
        for size, title in (("packed", "packed part"), ("held", f"as held, {_dtype(result, panel)} tail included")):
            here = [each for each in result.equal if each.panel == panel and each.size == size]
            if not here:
                continue
            yield f"### {panel}: {title}"
            names = (QAQ, DROPPING, *OTHERS)
            yield _table(
                [
                    "mean KL",
                    *(_named(name) for name in names),
                    "qaq / eviction",
                    "dropping / eviction",
                    "best eviction",
                ],
                [
                    [
                        f"{each.kl:g}",
                        *(_compressed(each.compressed[name]) for name in names),
                        _times(each.keeping),
                        _times(each.dropping),
                        each.keeping.best or "-",
                    ]
                    for each in here
                ],
                left=(),
            )


def _accounting(result: Result, paper: Paper) -> Iterator[str]:
    lines = [line for line in result.lines if line.curve in ACCOUNTED and line.average is not None]
    if not lines:
        return
    beside = paper.models[BESIDE]
    yield "## Accounting"
    yield (
        "What the authors' code would report for the bits that our tokens took: codes and 16 bits per outlier "
        "(average), and a 16-bit scale and mean per token, per token and layer, or per token, layer and head; for the "
        f"model measured and for {BESIDE}. It counts no indices, widths, copies or scores, and outliers by `alpha`, "
        "though each row has a whole number of them at either end. Ours: 16 over the packed bits, and what these "
        "consist of, in bits per number; outliers with their indices."
    )
    for panel, shape in result.shapes.items():
        here = [line for line in lines if line.row.panel == panel]
        if not here:
            continue
        yield f"### {panel}"
        headings = ["", "target", "average", *(f"{level}" for level in LEVELS)]
        headings += [*(f"{BESIDE}: {level}" for level in LEVELS), "ours"]
        headings += ["codes", "scales", "outliers", "widths, scores"]
        yield _table(headings, [_accounted(line, shape, beside) for line in here], left=(0, 1))


def _accounted(line: Line, shape: Geometry, beside: Geometry) -> list[str]:
    parts, average, bits = line.parts, line.average, line.bits("packed")
    if parts is None or average is None or bits is None:
        return [_named(line.curve), line.setting]
    return [
        _named(line.curve),
        line.setting,
        f"{average:.2f}",
        *(f"{repository_ratio(average, level, each):.2f}x" for each in (shape, beside) for level in LEVELS),
        f"{16 / bits:.2f}x",
        f"{parts.codes + parts.exact:.2f}",
        f"{parts.scales:.2f}",
        f"{parts.outliers:.2f}",
        f"{parts.widths:.2f}",
    ]


def _rows(result: Result) -> Iterator[str]:
    if not result.lines:
        return
    yield "## All rows"
    yield (
        f"A target is `sigma_key`; `sigma_value` is {VALUE_TARGET:g} times it, at most 1. "
        + " ".join(f"{_named(name)}: {_settings(fields)}." for name, fields in SIDES.items() if fields)
    )
    for panel in result.shapes:
        lines = [line for line in result.lines if line.row.panel == panel]
        if lines:
            headings = ["curve", "setting", "packed", "bits", "KL mean", "KL p99", "top-1", "perplexity", "strategy"]
            yield f"### {panel}"
            yield _table(headings, [_cells(line) for line in lines], left=(0, 1, 8))


def _cells(line: Line) -> list[str]:
    row = line.row
    cells = [_named(line.curve), line.setting]
    if row.memory is None or row.accuracy is None:
        return [*cells, "failed", *["-"] * 5, f"`{row.strategy}`"]
    memory, accuracy = row.memory, row.accuracy
    cells += [f"{memory.packed_bits_per_element:.2f}", f"{memory.bits_per_element:.2f}"]
    cells += [f"{accuracy.kl_mean:.4f}", f"{accuracy.kl_p99:.3f}", f"{accuracy.top1:.1%}", f"{accuracy.perplexity:.2f}"]
    return [*cells, f"`{row.strategy}`"]


def _how(result: Result, paper: Paper) -> Iterator[str]:
    yield from describe(result.board).splitlines()
    yield (
        "Between neighbouring points of a curve bits are linear in the logarithm of KL; points that another of the "
        "same curve beats in both are left out. packed: bits of the packed part, to which bits fall in long contexts."
    )
    held = [line.row.memory.host_bytes for line in result.lines if line.row.memory and line.row.memory.host_bytes]
    if held:
        yield f"Exact copies in host memory, beside these bits: {max(held) / 2**20:.1f} MiB, of qaq with a host copy."
    yield from (f"Differs from the paper: {difference}" for difference in paper.differences)
    seconds = sum(line.row.seconds for line in result.lines)
    yield f"{len(result.lines)} rows took {seconds:.0f} s."


# ---- words and cells -----------------------------------------------------------------------------------------------


def _sentence(found: Comparison) -> str:
    if found.ratio is None:
        return "no overlap, the curves share no divergence"
    return f"{found.verdict}; without it {_ratio(found)} times the bits, at mean KL {_span(found)}"


def _claim(equal: list[Equal], least: float) -> str:
    """Whether QAQ compresses `least` times more than the best eviction; bounds may leave it open."""
    told = [
        ratio >= least
        for ratio, bound in ((each.keeping.ratio, each.keeping.bound) for each in equal)
        if ratio is not None and (not bound or (bound == "at least") == (ratio >= least))
    ]
    verdict = "holds" if all(told) else "holds in part" if any(told) else "does not hold"
    counts = f"{sum(told)} of {len(equal)} divergences, open at {len(equal) - len(told)}"
    return f"{verdict if told else 'undecided'}, at {counts}"


def _ratio(found: Comparison) -> str:
    if found.ratio is None or found.least is None or found.most is None:
        return "-"
    return f"{found.ratio:.2f} ({found.least:.2f} to {found.most:.2f})"


def _range(low: float, high: float) -> str:
    return f"{low:g}" if low == high else f"{low:g} to {high:g}"


def _span(found: Comparison) -> str:
    return "-" if found.overlap is None else f"{found.overlap[0]:.4f} to {found.overlap[1]:.4f}"


def _times(found: Advantage) -> str:
    sign = {"": "", "at least": "≥ ", "at most": "≤ "}[found.bound]
    return "-" if found.ratio is None else f"{sign}{found.ratio:.2f}x"


def _compressed(found: Compressed) -> str:
    return "-" if found.ratio is None else f"{'≥ ' if found.at_least else ''}{found.ratio:.2f}x"


def _named(curve: str) -> str:
    return f"qaq, {curve}" if curve in SIDES and curve != QAQ else curve


def _settings(fields: dict[str, object]) -> str:
    return ", ".join(f"`{name}={value}`" for name, value in fields.items())


def _dtype(result: Result, panel: str) -> str:
    return next(card.dtype for card in result.board.models if card.panel == panel)


def _list(lines: list[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)


def _table(headings: list[str], rows: list[list[str]], left: tuple[int, ...]) -> str:
    rule = ["---" if place in left else "---:" for place in range(len(headings))]
    return "\n".join(f"| {' | '.join(line)} |" for line in (headings, rule, *rows))


def _put(path: Path, data: bytes) -> None:
    """Write `path` in one step: a reader sees the old file or the new one."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_bytes(data)
    os.replace(partial, path)
