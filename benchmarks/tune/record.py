"""The committed figures: presets for the reference model and its outlier twin beside the best settings alike.

`python -m cachequant.benchmarks.tune.record --out benchmarks/results` measures them anew; interrupted, the same command
goes on. For each width, the best plain setting of that width says how many bytes there are.
"""

import json
from pathlib import Path
from typing import Annotated

import torch
import typer
from pydantic import BaseModel, ConfigDict

from .allocate import allocate
from .bench import Bench, Material, gather
from .budget import Budget
from .files import Study, require_writable, write_preset
from .journal import Journal
from .menu import DEFAULT, Menu, compose
from .report import comparison, layers, markdown, summary, verified

NAME = "tune-reference"

app = typer.Typer(add_completion=False)


class Record(BaseModel):
    """All studies of one recording."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    studies: tuple[Study, ...]


@app.command()
def record(
    out: Annotated[Path, typer.Option(help="Folder for the figures and the presets.")],
    widths: Annotated[str, typer.Option(help="Widths whose best plain settings are the budgets.")] = "2,3,4",
    windows: Annotated[int, typer.Option(min=1, help="Stretches of text, on either text.")] = 6,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads. Default: torch's choice.")] = None,
) -> None:
    """Tune presets for the reference model and its twin, and write down what they are worth."""
    if threads:
        torch.set_num_threads(threads)
    require_writable(out / f"{NAME}.json")
    materials, _ = gather(windows=windows, twin=True)
    studies = []
    for material in materials:
        for study in _studies(material, [int(width) for width in widths.split(",")], out):
            studies.append(study)
            write(Record(studies=tuple(studies)), out)
    for left in out.glob(f"{NAME}-*.journal.jsonl*"):
        left.unlink()


def _studies(material: Material, widths: list[int], out: Path) -> list[Study]:
    panel = material.verifying.card.panel.replace(" ", "-")
    studies = []
    with Journal(out / f"{NAME}-{panel}.journal.jsonl", material.about).opened() as journal:
        bench = Bench(material.verifying, material.tuning, material.task, 128, journal)
        menu, notes = compose(bench, DEFAULT)
        for width in widths:
            budget = _budget(bench, menu, width)
            typer.echo(f"{panel}: {budget.text}")
            found, preset = allocate(bench, menu, budget, report=_told)
            study = Study.of(bench, strategies=DEFAULT, budget=budget, allocation=found, notes=tuple(notes))
            write_preset(preset, out / f"preset-{panel}-{width}bit.json", study)
            for line in summary(study):
                typer.echo(line)
            studies.append(study)
    return studies


def _budget(bench: Bench, menu: Menu, width: int) -> Budget:
    """What the best setting of one width for keys and values of all layers takes."""
    plain = [rung for rung in menu.rungs if getattr(rung.strategy, "bits", None) == width]
    best = min(plain, key=lambda rung: bench.measure(rung.strategy, "verifying").kl)
    size = menu.cost(menu.everywhere(best.spec, best.spec))
    return Budget(text=f"as {best.spec}", unit="bytes", amount=size)


def write(record: Record, out: Path) -> None:
    """JSON for programs, Markdown for readers."""
    content = json.loads(record.model_dump_json())
    (out / f"{NAME}.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    parts = ["# Presets for the reference model and its outlier twin", _ABOUT, markdown(comparison(record.studies))]
    for study in record.studies:
        if study.allocation is None:
            continue
        parts += [
            f"## {study.model.panel}, {study.allocation.budget_bits:.3f} bits",
            *summary(study),
            markdown(verified(study.allocation)),
            markdown(layers(study.allocation)),
        ]
    (out / f"{NAME}.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")


_ABOUT = (
    "Each budget is the bytes of the best single `uniform` setting of that width for keys and values of all layers. "
    "*Best split*: the best of all settings alike for all layers, those with other strategies or widths for keys than "
    "for values among them, picked on the text they are compared on. All figures are of text that nothing was tuned "
    "on, streamed through the packed cache; divergence in nats per token. *bits*: packed bits per cached number, "
    "metadata included, as held; *held*: with the exact tail. Written by "
    "`python -m cachequant.benchmarks.tune.record`; `docs/tuning.md` says how to read it."
)


def _told(what: str, done: int, total: int) -> None:
    typer.echo(f"  {what} {done}/{total}", err=True)


if __name__ == "__main__":
    app()
