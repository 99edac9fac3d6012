"""What works on this machine and what does not: kernels on each device, versions, strategies."""

import subprocess
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict
from rich import box
from rich.markup import escape
from rich.table import Table

from ..core import LayerFormat, LayerSpec, MixedFormat
from ..core.calibration import CalibratedStrategy
from ..kernels import backend, fused
from ..kernels.format import row_bits
from ..registry.plugins import Plugins
from .environment import Environment

# a layer in the middle of a usual model: strategies may keep its ends exact
LAYER = LayerSpec(index=16, layers=32, kv_heads=8, head_dim=128, value_dim=128)
PATIENCE = 20  # seconds that a broken driver may take to say so

_SERVES = {
    "triton": "takes tensors on this device, fused",
    "cpu": "takes tensors on this device",
    "reference": "takes whatever the others do not, in plain torch",
}
_ANSWERS = {True: "yes", False: "no", None: "unknown"}


class _Finding(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class KernelPath(_Finding):
    """One implementation of the kernels on one device."""

    name: str
    live: bool
    reason: str
    """What it does there, or why it is not live."""


class Device(_Finding):
    """A device, and the paths that serve its tensors, the preferred one first."""

    name: str
    hardware: str
    paths: tuple[KernelPath, ...]


class Found(_Finding):
    """A strategy, the plugin it comes from, and what it does by default."""

    name: str
    plugin: str
    codes: str
    """How it codes numbers."""
    served: bool | None
    """Whether the Triton kernels attend to what it packs, of a layer like `LAYER`; None: nobody can tell."""
    note: str
    """Why they do not, and what has to be done before the strategy is used."""


class Diagnosis(_Finding):
    """All of it. `problems`: plugins that were skipped, each a sentence."""

    versions: dict[str, str]
    devices: tuple[Device, ...]
    strategies: tuple[Found, ...]
    problems: tuple[str, ...]


def examine() -> Diagnosis:
    """Look at this process and machine; what is broken is reported, never raised."""
    environment = Environment.current()
    strategies, problems = _strategies()
    with warnings.catch_warnings():
        # torch warns of a driver that the answers name
        warnings.simplefilter("ignore")
        devices = tuple(_devices(environment.device))
    return Diagnosis(versions=_versions(environment), devices=devices, strategies=strategies, problems=problems)


def report(diagnosis: Diagnosis) -> Iterator[Table | str]:
    """What a terminal shows, as markup."""
    versions = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in ("installed", "version"):
        versions.add_column(heading, overflow="fold")
    for name, version in diagnosis.versions.items():
        versions.add_row(escape(name), escape(version))
    yield versions
    for device in diagnosis.devices:
        yield f"[bold]{escape(device.name)}[/]  {escape(device.hardware)}"
        paths = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        for heading in ("kernels", "live", "because"):
            paths.add_column(heading, overflow="fold")
        for path in device.paths:
            paths.add_row(path.name, "[green]yes[/]" if path.live else "[yellow]no[/]", escape(path.reason))
        yield paths
    strategies = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in ("strategy", "plugin", "codes by default", "on Triton", "note"):
        strategies.add_column(heading, overflow="fold")
    for found in diagnosis.strategies:
        words = (found.name, found.plugin, found.codes, _ANSWERS[found.served], found.note)
        strategies.add_row(*map(escape, words))
    yield strategies
    yield f"On Triton: in layers of {LAYER.kv_heads} kv heads of {LAYER.head_dim}, on devices where Triton is live."
    for problem in diagnosis.problems:
        yield f"[red]problem:[/] {escape(problem)}"
    if not diagnosis.problems:
        yield "All plugins work."


def _versions(environment: Environment) -> dict[str, str]:
    commit = f" ({environment.commit[:10]})" if environment.commit else ""
    return {
        "cachequant": f"{environment.cachequant}{commit}",
        "python": f"{environment.python}, {environment.platform}",
        "torch": f"{environment.torch}, {_toolkit()}",
        "transformers": environment.transformers,
        "triton": _triton(),
        "NVIDIA driver": _driver(),
    }


def _toolkit() -> str:
    if torch.version.hip is not None:
        return f"built for ROCm {torch.version.hip}"
    return "built without CUDA" if torch.version.cuda is None else f"built for CUDA {torch.version.cuda}"


def _triton() -> str:
    try:
        return backend.triton_version()
    except Exception as error:  # a broken library raises anything
        return f"none: {error}"


def _driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
    except subprocess.TimeoutExpired:
        return f"nvidia-smi gives no answer in {PATIENCE} s"
    except OSError:
        return "none: there is no nvidia-smi"
    said = (done.stdout.strip() or done.stderr.strip() or "nothing").splitlines()[0]
    return said if done.returncode == 0 else f"none: nvidia-smi says {said}"


def _devices(cpu: str) -> Iterator[Device]:
    yield _device(torch.device("cpu"), cpu)
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            yield _device(torch.device("cuda", index), _gpu(index))
    else:
        # there to say why
        absent = _device(torch.device("cuda"), "none that torch can use")
        yield absent.model_copy(update={"paths": absent.paths[:1]})
    other = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if other is not None and other.type != "cuda":
        yield _device(other, "an accelerator of torch")


def _device(device: torch.device, hardware: str) -> Device:
    serves = dict(_SERVES)
    if backend.interpreted():
        serves["triton"] = "takes tensors on this device, in the interpreter: slow, for tests"
    paths = [
        KernelPath(name=path.name, live=path.problem is None, reason=path.problem or serves[path.name])
        for path in backend.paths(device)
    ]
    return Device(name=str(device), hardware=hardware, paths=tuple(paths))


def _gpu(index: int) -> str:
    try:
        found = torch.cuda.get_device_properties(index)
    except (RuntimeError, AssertionError) as error:
        return f"cannot be read: {error}"
    return f"{found.name}, compute capability {found.major}.{found.minor}, {found.total_memory / 2**30:.1f} GiB"


def _strategies() -> tuple[tuple[Found, ...], tuple[str, ...]]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        # afresh: the registry of this process tells of a broken plugin once
        offers = Plugins().offers()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = tuple(_found(offer.offered, offer.plugin) for offer in offers)
    return found, _skipped(caught)


def _skipped(caught: list[warnings.WarningMessage]) -> tuple[str, ...]:
    said = (str(warning.message) for warning in caught if issubclass(warning.category, RuntimeWarning))
    return tuple(message for message in said if message.startswith("skipped plugin"))


def _found(strategy: type[Any], plugin: str) -> Found:
    """With default settings, or the first variant of those that have no defaults."""
    try:
        made = _made(strategy)
        formats = made.formats(LAYER)
        codes = _codes(formats)
        served, notes = _served(formats)
        if isinstance(made, CalibratedStrategy) and not made.calibrated:
            notes.append(f"refused until calibrated: cachequant calibrate {strategy.name}")
    except Exception as error:  # of third parties
        codes, served, notes = f"unknown without settings ({type(error).__name__})", None, []
    return Found(name=strategy.name, plugin=plugin, codes=codes, served=served, note="; ".join(notes))


def _made(strategy: type[Any]) -> Any:
    try:
        return strategy()
    except Exception:
        variants = getattr(strategy, "variants", ())
        if not variants:
            raise
        return strategy(**variants[0])


def _codes(formats: LayerFormat | MixedFormat | None) -> str:
    if formats is None:
        return "exact"
    sides = (formats.key, formats.value)
    return ", ".join(sorted({fmt.codes for side in sides for fmt in (side if isinstance(side, tuple) else (side,))}))


def _served(formats: LayerFormat | MixedFormat | None) -> tuple[bool | None, list[str]]:
    """Whether Triton kernels attend to blocks or rows of these formats, and why not."""
    if formats is None:
        return False, ["nothing is packed: torch attends to all layers"]
    if isinstance(formats, LayerFormat):
        exact = formats.key.codes == formats.value.codes == "exact"
        problem = None if exact else fused.unserved(formats, LAYER.head_dim, LAYER.value_dim)  # type: ignore[arg-type]
    else:
        try:
            from ..kernels.triton.rows import unserved
        except Exception as error:  # a broken library raises anything
            return None, [f"rows of mixed widths are only known where Triton is ({type(error).__name__})"]
        heads = 1 if formats.heads == "apart" else LAYER.kv_heads
        sides = ((formats.key, LAYER.head_dim), (formats.value, LAYER.value_dim))
        problems = (unserved(row_bits(fmt), heads, dim) for side, dim in sides for fmt in side)
        problem = next(filter(None, problems), None)
    return problem is None, [] if problem is None else [problem]
