"""The files of a run: the preset, the study beside it, and what interrupted runs leave."""

from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from ...core.calibration import CalibratedStrategy, Calibration
from ...registry import presets
from ..environment import Environment
from ..streaming import Protocol
from ..subjects import ModelCard, TextCard
from .allocate import Allocation
from .bench import Bench
from .budget import Budget
from .search import Search


class Study(BaseModel):
    """All that a run found, and under what."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: ModelCard
    text: TextCard
    """Verified on."""
    tuning_text: TextCard
    protocol: Protocol
    tuning_chunk: int
    """Tokens per pass on the tuning text."""
    environment: Environment
    strategies: tuple[str, ...]
    """Searched, or given to places."""
    budget: Budget | None = None
    allocation: Allocation | None = None
    search: Search | None = None
    chosen: str | None = None
    """The strategy of a search that keeps the budget."""
    notes: tuple[str, ...] = ()

    @classmethod
    def of(cls, bench: Bench, **found: Any) -> "Study":
        """With what `bench` measures on."""
        return cls(
            model=bench.panel.card,
            text=bench.text("verifying"),
            tuning_text=bench.text("tuning"),
            protocol=bench.protocols["verifying"],
            tuning_chunk=bench.protocols["tuning"].chunk,
            environment=Environment.current(str(bench.panel.model.device)),
            **found,
        )

    @property
    def evidence(self) -> dict[str, Any]:
        """What a preset file says of where it comes from."""
        found: dict[str, Any] = {
            "model": self.model.model_dump(mode="json"),
            "tuned_on": self.tuning_text.model_dump(mode="json"),
            "verified_on": self.text.model_dump(mode="json"),
            "protocol": self.protocol.model_dump(mode="json"),
            "budget": None if self.budget is None else self.budget.text,
            "date": self.environment.date,
            "environment": str(self.environment),
        }
        if self.allocation is not None:
            rival = self.allocation.rival
            found["verified"] = self.allocation.verified.model_dump(mode="json")
            found["best_setting_alike_for_all_layers"] = None if rival is None else rival.model_dump(mode="json")
        if self.search is not None:
            figures = [each.verified for each in self.search.front if each.strategy == self.chosen]
            found["verified"] = figures[0].model_dump(mode="json") if figures and figures[0] else None
        return found


def study_file(out: Path) -> Path:
    """Where the study of a preset lies."""
    return out.with_name(out.stem + ".study.json")


def journal_file(out: Path) -> Path:
    """Where measurements are kept as they come."""
    return out.with_name(out.stem + ".journal.jsonl")


def require_writable(out: Path) -> None:
    """Make the folder, and find out before the work whether files can be written there. Raises OSError."""
    if out.is_dir():
        raise IsADirectoryError(21, "it is a folder; name a file", str(out))
    out.parent.mkdir(parents=True, exist_ok=True)
    probe = out.with_name(out.name + ".writable")
    probe.write_text("")
    probe.unlink()


def write_study(study: Study, path: Path) -> None:
    """Replace the file only when the new one is complete."""
    partial = path.with_name(path.name + ".partial")
    try:
        partial.write_text(study.model_dump_json(indent=2) + "\n", encoding="utf-8")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def write_preset(preset: Any, out: Path, study: Study) -> list[Path]:
    """The preset with its evidence, and beside it the calibrations that it needs; returns all that was written."""
    folders: list[Path] = []

    def kept(child: Any) -> Any:
        if not isinstance(child, CalibratedStrategy) or not isinstance(child.calibration, Calibration):
            return child
        if child.calibration.source is not None:
            return child
        folder = out.with_name(f"{out.stem}.calibration-{child.calibration.digest[:8]}")
        if folder not in folders:
            folders.append(folder)
        return child.with_calibration(child.calibration.save(folder))

    presets.write(out, preset.with_each(kept), study.evidence)
    return [out, *folders]
