"""Where a figure was measured: without this no figure is printed."""

import os
import platform
import subprocess
from datetime import UTC, datetime
from enum import StrEnum
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from pydantic import BaseModel, ConfigDict


class Precision(StrEnum):
    """Dtypes a model can be measured in."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class Environment(BaseModel):
    """Device, versions, threads and date of a run."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    date: str
    device: str
    threads: int
    python: str
    platform: str
    torch: str
    transformers: str
    cachequant: str
    commit: str | None
    """Git commit of the checkout that ran, None outside one."""

    @classmethod
    def current(cls, device: str = "cpu") -> "Environment":
        """Describe this process, computing on `device`."""
        return cls(
            date=datetime.now(UTC).isoformat(timespec="seconds"),
            device=_device_name(torch.device(device)),
            threads=torch.get_num_threads(),
            python=platform.python_version(),
            platform=f"{platform.system()} {platform.machine()}",
            torch=torch.__version__,
            transformers=_version("transformers"),
            cachequant=_version("cachequant", "from source"),
            commit=_commit(),
        )

    def __str__(self) -> str:
        threads = f"{self.threads} thread" + "s" * (self.threads != 1)
        source = f"cachequant {self.cachequant}" + (f" ({self.commit[:10]})" if self.commit else "")
        return (
            f"{source}, torch {self.torch}, transformers {self.transformers}, Python {self.python}, "
            f"{self.device}, {threads}, {self.date[:10]}"
        )


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type != "cpu":
        return str(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return f"CPU ({platform.processor() or platform.machine()})"
    model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return f"CPU ({model or platform.machine()}, {os.cpu_count()} cores)"


def _version(package: str, otherwise: str = "not installed") -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return otherwise


def _commit() -> str | None:
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None
    try:
        found = subprocess.run(
            ["git", "-C", str(root), "rev-parse", "--verify", "--quiet", "HEAD"], capture_output=True, text=True
        )
    except OSError:
        return None
    return found.stdout.strip() or None
