"""What a calibration costs: seconds and memory as the text, its windows and the model grow.

    python -m cachequant.benchmarks.calibration_cost --out benchmarks/results

Every figure comes from a process of its own: memory that one calibration has freed would otherwise serve the next.
Needs Linux, which tells a process how much it held at most.
"""

import multiprocessing
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
import typer
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict
from rich.console import Console
from transformers import AutoConfig, AutoModelForCausalLM

from .. import registry
from ..core.calibration import CalibratedStrategy, Calibration
from . import reference
from .environment import Environment
from .errors import Unusable
from .subjects import calibration_windows, load_model, read_text

NAME = "calibration-cost"

SAMPLES, LENGTHS, LAYERS = (4, 8, 16, 32), (256, 512, 1024, 2048), (3, 6, 12)
# where the others vary
FIXED_SAMPLES, FIXED_LENGTH = 8, 512

SPECS = {True: "kvquant:bits=3", False: "kvquant:bits=3,weights=equal"}

WARM_UP = 128

Question = Literal["samples", "length", "layers"]


class Cell(BaseModel):
    """One calibration."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    question: Question
    """What varies between this cell and its neighbours."""
    samples: int
    length: int
    layers: int
    gradients: bool
    seconds: float
    cpu_seconds: float
    """Of all threads."""
    memory_bytes: int
    """The most that was held while it ran, beyond what was held before."""
    artifact_bytes: int


class Report(BaseModel):
    """All cells with what they were measured under."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    environment: Environment
    model: str
    specs: dict[str, str]
    """With and without gradients."""
    cells: tuple[Cell, ...]


def plan() -> list[tuple[Question, int, int, int, bool]]:
    """Question, samples, length, layers and gradients of every cell; 6 layers are the reference model itself."""
    varied: list[tuple[Question, int, int, int]] = [
        *(("samples", samples, FIXED_LENGTH, 6) for samples in SAMPLES),
        *(("length", FIXED_SAMPLES, length, 6) for length in LENGTHS),
        *(("layers", FIXED_SAMPLES, FIXED_LENGTH, layers) for layers in LAYERS),
    ]
    return [(*cell, gradients) for cell in varied for gradients in (True, False)]


def build_model(layers: int, random: bool) -> Any:
    """The reference model, or a random one of its shape with as many layers."""
    if not random:
        return load_model(None, torch.float32, "cpu")[1]
    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(reference.FOLDER)
    config.num_hidden_layers = layers
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="sdpa").eval()


def measure(
    ids: NDArray[np.int64], samples: int, length: int, layers: int, gradients: bool, random: bool, threads: int
) -> dict[str, Any]:
    """Calibrate in this process; the figures of a cell. ids: `[windows, tokens]`, as many and as long as is asked."""
    torch.set_num_threads(threads)
    windows = torch.from_numpy(ids)
    model = build_model(layers, random)
    strategy = registry.parse(SPECS[gradients])
    assert isinstance(strategy, CalibratedStrategy)
    # what is loaded and allocated once, whatever is calibrated
    strategy.calibrate(model, None, windows[:1, :WARM_UP], samples=1, heldout=0)
    before = _forget_peak()
    wall, cpu = time.perf_counter(), time.process_time()
    calibrated = strategy.calibrate(model, None, windows[:samples, :length].contiguous(), samples=samples, heldout=0)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    memory = _held("VmHWM") - before
    assert isinstance(calibrated.calibration, Calibration)
    with tempfile.TemporaryDirectory() as folder:
        calibrated.calibration.save(folder)
        size = sum(path.stat().st_size for path in Path(folder).iterdir())
    return {
        "seconds": round(wall, 3),
        "cpu_seconds": round(cpu, 3),
        "memory_bytes": memory,
        "artifact_bytes": size,
    }


def markdown(report: Report) -> str:
    """One table per question, and under what it was answered."""
    titles = {
        "samples": f"More windows of {FIXED_LENGTH} tokens, reference model",
        "length": f"Longer windows, {FIXED_SAMPLES} of them, reference model",
        "layers": f"More layers, {FIXED_SAMPLES} windows of {FIXED_LENGTH} tokens, random weights",
    }
    parts = ["# What a calibration costs"]
    for question, title in titles.items():
        chosen = [cell for cell in report.cells if cell.question == question]
        cells = {(getattr(cell, question), cell.gradients): cell for cell in chosen}
        lines = [
            f"| {question} | CPU s | wall s | peak MiB | no gradients: CPU s | wall s | peak MiB | artifact KiB |",
            f"| {' | '.join(['---:'] * 8)} |",
        ]
        for value in dict.fromkeys(value for value, _ in cells):
            pair = [cells[value, gradients] for gradients in (True, False)]
            figures = [
                f"{cell.cpu_seconds:.2f} | {cell.seconds:.2f} | {cell.memory_bytes / 2**20:.0f}" for cell in pair
            ]
            lines.append(f"| {value} | {' | '.join(figures)} | {pair[0].artifact_bytes / 2**10:.0f} |")
        parts += [f"## {title}", "\n".join(lines)]
    parts.append(
        f"Strategies: `{report.specs['gradients']}`, and `{report.specs['no gradients']}`, which needs no backward "
        "pass. Seconds: both passes over the windows, one run; without loading, tokenizing and held-out perplexity. "
        "Those of the CPU are the process's own, those of the wall grow with whatever else the machine does. Peak: the "
        "most resident memory (VmHWM) while calibrating, above what the process held before, with the model loaded and "
        f"one window of {WARM_UP} tokens calibrated. Each cell in a process of its own."
    )
    parts.append(f"Model: {report.model}. {report.environment}.")
    return "\n\n".join(parts) + "\n"


def main(
    out: Annotated[Path, typer.Option(help="Folder for calibration-cost.json and .md.")] = Path("cachequant-bench"),
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads. Default: torch's choice.")] = None,
) -> None:
    """Measure seconds and peak memory of calibrating the reference model and random ones of its shape."""
    if sys.platform != "linux":
        raise typer.BadParameter("peak memory is read from /proc, which only Linux has")
    console = Console()
    if threads:
        torch.set_num_threads(threads)
    try:
        _, model, tokenizer = load_model(None, torch.float32, "cpu")
        text, content = read_text(None, "train", "--text")
        windows = calibration_windows(model, tokenizer, content, max(SAMPLES), max(LENGTHS), 0)
    except Unusable as error:
        raise typer.BadParameter(str(error)) from error
    cells: list[Cell] = []
    # a server that has torch imported, and computed nothing, forks a process for each cell
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([f"{__package__}.subjects"])
    with console.status("") as status, ProcessPoolExecutor(1, context, max_tasks_per_child=1) as pool:
        for question, samples, length, layers, gradients in plan():
            status.update(f"{samples} windows of {length}, {layers} layers{', gradients' if gradients else ''}")
            asked = {"samples": samples, "length": length, "layers": layers, "gradients": gradients}
            random, threads = question == "layers", torch.get_num_threads()
            found = pool.submit(measure, windows.numpy(), **asked, random=random, threads=threads).result()
            cells.append(Cell.model_validate({"question": question, **asked, **found}))
    parameters = sum(parameter.numel() for parameter in model.parameters())
    report = Report(
        environment=Environment.current(),
        model=f"reference, {parameters / 1e6:.1f}M parameters, float32, on the {text}",
        specs={"gradients": SPECS[True], "no gradients": SPECS[False]},
        cells=tuple(cells),
    )
    out.mkdir(parents=True, exist_ok=True)
    (out / f"{NAME}.json").write_text(report.model_dump_json(indent=2) + "\n", encoding="utf-8")
    (out / f"{NAME}.md").write_text(markdown(report), encoding="utf-8")
    console.print(markdown(report), highlight=False, markup=False, soft_wrap=True)


def _forget_peak() -> int:
    """Bytes held now, from which the peak counts anew."""
    Path("/proc/self/clear_refs").write_text("5")
    return _held("VmRSS")


def _held(name: Literal["VmRSS", "VmHWM"]) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    line = next(line for line in lines if line.startswith(name))
    return 1024 * int(line.split()[1])


if __name__ == "__main__":
    typer.run(main)
