"""Which implementation of the kernels serves a device, and why another does not."""

import importlib
import os
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from typing import Literal, NamedTuple

import torch

Name = Literal["triton", "cpu", "reference"]

OLDEST_TRITON = (3, 6)
OLDEST_CAPABILITY = (8, 0)


class Path(NamedTuple):
    """One implementation, and what keeps it from being used; None: it is live."""

    name: Name
    problem: str | None


_reference_only: ContextVar[bool] = ContextVar("reference_only", default=False)


@contextmanager
def reference_only() -> Iterator[None]:
    """Everything inside runs on the torch reference: to compare with it, and to find out which path is at fault."""
    token = _reference_only.set(True)
    try:
        yield
    finally:
        _reference_only.reset(token)


def paths(device: torch.device) -> list[Path]:
    """All implementations for tensors on `device`, the preferred one first."""
    off = "switched off by kernels.backend.reference_only()" if _reference_only.get() else None
    return [
        Path("triton", off or triton_problem(device)),
        Path("cpu", off or (None if device.type == "cpu" else f"serves tensors on the CPU, these are on {device}")),
        Path("reference", None),
    ]


def triton_serves(device: torch.device) -> bool:
    """Whether the Triton kernels take tensors on `device`; where a GPU has to do without, a warning says why."""
    if _reference_only.get():
        return False
    problem = triton_problem(device)
    if problem is not None and device.type == "cuda" and not torch.compiler.is_compiling():
        warn_once(f"packed caches run on the slower torch path: {problem}. `cachequant doctor` says more")
    return problem is None


def cpu_serves(device: torch.device) -> bool:
    """Whether the fast CPU path takes tensors on `device`."""
    return not _reference_only.get() and device.type == "cpu"


def interpreted() -> bool:
    """Whether Triton kernels run in the interpreter, on CPU tensors: slow, for tests."""
    # the words that Triton takes
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")


def triton_problem(device: torch.device) -> str | None:
    """What keeps the Triton kernels from tensors on `device`; None if nothing does."""
    if device.type == "cpu":
        if interpreted():
            return _triton_missing()
        return "tensors are on the CPU (TRITON_INTERPRET=1 runs the kernels there, slowly, for tests)"
    if device.type != "cuda":
        return f"compiles for CUDA and ROCm, not for {device.type}"
    return _triton_missing() or _gpu_problem(device.index)


def triton_version() -> str:
    """The version of Triton. Raises whatever importing it raises, AttributeError where it is an empty folder."""
    # of the module: builds of torch bring it as distributions of several names
    return importlib.import_module("triton").__version__


@cache
def _triton_missing() -> str | None:
    try:
        version = triton_version()
    except ModuleNotFoundError as error:
        if error.name == "triton":
            return "triton is not installed; on Linux, pip install triton"
        return f"triton cannot be imported ({error}); install it again"
    except Exception as error:  # a broken library raises anything
        return f"triton cannot be imported ({_brief(error)}); install it again"
    if tuple(int(part) for part in re.findall(r"\d+", version)[:2]) < OLDEST_TRITON:
        return f"triton {version} is older than {'.'.join(map(str, OLDEST_TRITON))}; install a newer torch"
    return None


@cache
def _gpu_problem(index: int | None) -> str | None:
    """What keeps Triton from a GPU, by number; None: the one that is current at the first question."""
    try:
        # says what is wrong: torch without CUDA, no driver, one too old, no GPU
        torch.cuda.init()
        capability = torch.cuda.get_device_capability(index)
        name = torch.cuda.get_device_name(index)
    except Exception as error:
        return f"CUDA cannot be used ({_brief(error)})"
    if torch.version.hip is None and capability < OLDEST_CAPABILITY:
        needed = ".".join(map(str, OLDEST_CAPABILITY))
        return f"{name} has compute capability {capability[0]}.{capability[1]}, the kernels need {needed}"
    try:
        # builds a helper in C where that is not cached
        importlib.import_module("triton.runtime").driver.active.get_current_target()
    except Exception as error:
        return f"Triton's driver does not start ({_brief(error)})"
    return None


def _brief(error: Exception) -> str:
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0]}" if text else type(error).__name__


@cache
def warn_once(message: str) -> None:
    """Say once per process that something is served by a slower path."""
    warnings.warn(message, stacklevel=3)
