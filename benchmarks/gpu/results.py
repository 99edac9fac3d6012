"""What the GPU command measures, as it is written to JSON."""

import os
import subprocess
from importlib.metadata import PackageNotFoundError, version
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict

from ...kernels import backend
from ..environment import Environment

MODULES = ("flash_attn_interface", "flash_attn_3", "flash_attn", "flash-attn", "optimum-quanto", "hqq")


class Figures(BaseModel):
    """Base of all that is written."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Hardware(Figures):
    """The device and what drives it."""

    environment: Environment
    capability: str | None
    multiprocessors: int | None
    memory_bytes: int | None
    l2_bytes: int | None
    driver: str | None
    cuda: str | None
    triton: str | None
    packages: dict[str, str]
    """Versions of the optional packages that are installed."""

    @classmethod
    def current(cls, device: torch.device, commit: str | None) -> "Hardware":
        """Of this process. commit: of these sources, where they are no checkout."""
        environment = Environment.current(str(device))
        if environment.commit is None and commit is not None:
            environment = environment.model_copy(update={"commit": commit})
        properties = torch.cuda.get_device_properties(device) if device.type == "cuda" else None
        return cls(
            environment=environment,
            capability=None if properties is None else f"{properties.major}.{properties.minor}",
            multiprocessors=getattr(properties, "multi_processor_count", None),
            memory_bytes=getattr(properties, "total_memory", None),
            l2_bytes=getattr(properties, "L2_cache_size", None),
            driver=_driver() if properties is not None else None,
            cuda=torch.version.cuda or torch.version.hip,
            triton=_or_none(backend.triton_version),
            packages={name: found for name in MODULES if (found := _version(name)) is not None},
        )


class Ceilings(Figures):
    """Bandwidth of the device's memory, in units of 1e12 bytes per second; None in a dry run."""

    read_tb_s: float | None
    """A kernel that reads 4 GiB and writes nothing to speak of."""
    copy_tb_s: float | None
    """Bytes read and bytes written."""


class Exactness(Figures):
    """Whether float16 subnormals pass a matrix unit unchanged."""

    shape: str
    instruction: str | None
    exact: bool


class Check(Figures):
    """One comparison with the reference."""

    case: str
    variant: Literal["assembly", "portable", "encode", "unpack"]
    error: float | None
    """attention: relative to the norm of the float64 result. encode: share of numbers that differ. unpack: largest
    difference relative to the largest number. None: it could not be run."""
    tolerance: float
    replay_equal: bool | None = None
    """Whether a CUDA graph gave what the eager call gave, bit for bit; None: not tried."""
    failure: str | None = None

    @property
    def wrong(self) -> bool:
        """Whether a result came that is not right."""
        return self.replay_equal is False or (self.error is not None and not self.error <= self.tolerance)


class AttentionTiming(Figures):
    """Attention of one decoding step over one layer."""

    batch: int
    kv_heads: int
    group: int
    """Query heads per kv head."""
    tokens: int
    contender: str
    sixteen_bit: bool
    """A baseline: it reads a float16 cache."""
    bytes: int
    """Read from the cache."""
    us: float | None
    """Median; None in a dry run."""
    tb_s: float | None
    share: float | None
    """Of the read ceiling."""
    ratio: float | None
    """How many times faster than the best 16-bit contender of the same shape."""

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """What contenders are compared at."""
        return self.batch, self.kv_heads, self.group, self.tokens


class EncodeTiming(Figures):
    """Encoding keys and values of one layer's prompt."""

    strategy: str
    tokens: int
    kv_heads: int
    ms: float | None
    ms_per_million: float | None
    """Per million token-heads, keys and values together."""
    share_of_attention: float | None
    """Of the time of causal attention over the same prompt."""
    share_of_layer: float | None
    """Of that and the layer's matrix products."""


class DecodeTiming(Figures):
    """Decoding one token with a whole model."""

    model: str
    contender: str
    tokens: int
    eager_ms: float | None
    """Median over steps, launched one kernel at a time from Python."""
    graph_ms: float | None
    """Median over replays of one step as a CUDA graph."""
    tokens_per_s: float | None
    """Of the faster of the two."""
    cache_bytes: int
    peak_bytes: int | None
    """Most that was allocated in the eager steps, weights included."""
    graph_failure: str | None = None
    """Why no graph was captured."""


class PrefillTiming(Figures):
    """A prompt through a whole model into an empty cache."""

    model: str
    contender: str
    tokens: int
    ms: float | None
    ratio: float | None
    """To DynamicCache."""
    peak_bytes: int | None


class Results(BaseModel):
    """Everything, filled section by section."""

    model_config = ConfigDict(extra="forbid")

    hardware: Hardware
    dry: bool
    budget_s: float
    sections: tuple[str, ...]
    spent_s: dict[str, float] = {}
    ceilings: Ceilings | None = None
    exactness: list[Exactness] = []
    checks: list[Check] = []
    attention: list[AttentionTiming] = []
    encode: list[EncodeTiming] = []
    decode: list[DecodeTiming] = []
    prefill: list[PrefillTiming] = []
    notes: list[str] = []
    skipped: list[str] = []
    """What was left out, and why."""
    failures: list[str] = []


def message(error: BaseException) -> str:
    """An exception in one line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:400]}" if text else type(error).__name__


def _driver() -> str | None:
    """The driver's version, by the first tool that says it."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=10, env=dict(os.environ))
    except (OSError, subprocess.TimeoutExpired):
        return None
    return found.stdout.split()[0] if found.returncode == 0 and found.stdout.strip() else None


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _or_none(read: object) -> str | None:
    try:
        return read()  # type: ignore[operator]
    except Exception:  # a broken library raises anything
        return None
