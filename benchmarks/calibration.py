"""Calibrating what a leaderboard ranks, on a text that it does not measure on."""

import hashlib
import json
from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from .. import registry
from ..core import LayerSpec, PackedCache, detach
from ..core.calibration import CalibratedStrategy, Calibration
from ..core.calibration.artifact import view
from ..core.hf.calibrate import Report, cut
from ..strategies.preset import Preset

SAMPLES = 8
LONGEST_WINDOW = 2048
# more than tokenizers need for code and prose, three to five
CHARACTERS_PER_TOKEN = 12


class CalibrationCard(BaseModel):
    """What a strategy had learned from when it was measured."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    text: str
    sha256: str
    """Of the text."""
    windows: int
    length: int
    """Tokens per window."""
    windows_sha256: str
    """Of the token ids."""
    digest: str
    """Of what was learned."""
    seconds: float
    """Of the calibration, which strategies that need the same statistics share."""


class CalibrationText:
    """A text to learn from, read and tokenized when the first strategy needs it.

    read: returns its name and its content.
    """

    def __init__(self, read: Callable[[], tuple[str, str]], tokenizer: Any, samples: int = SAMPLES) -> None:
        self._read, self._tokenizer, self._samples = read, tokenizer, samples
        self._windows: Tensor | None = None

    @cached_property
    def content(self) -> tuple[str, str]:
        """Name and text."""
        return self._read()

    @cached_property
    def sha256(self) -> str:
        """Of the text."""
        return hashlib.sha256(self.content[1].encode()).hexdigest()

    def windows(self, model: Any) -> Tensor:
        """Token ids `[samples, length]`, 2048 or what `model` takes; its twin gets the same."""
        if self._windows is None:
            text = self.content[1]
            try:
                windows, _ = cut(model, self._tokenizer, _stretches(text, self._samples), self._samples, None, 0)
            except ValueError:
                # a tokenizer with longer tokens than any language has, or a text that is too short: it will be told
                windows, _ = cut(model, self._tokenizer, text, self._samples, None, 0)
            self._windows = windows
        return self._windows


def _stretches(text: str, samples: int) -> str:
    """As many characters as windows may need, from all over `text`: tokenizing the rest takes longer than learning."""
    size = LONGEST_WINDOW * CHARACTERS_PER_TOKEN
    if len(text) <= samples * size:
        return text
    starts = [i * (len(text) - size) // max(1, samples - 1) for i in range(samples)]
    return "\n\n".join(text[start : start + size] for start in starts)


def uncalibrated(strategy: Any) -> bool:
    """Whether it, or a strategy it consists of, has to learn from a text before it can be used."""
    if isinstance(strategy, Preset):
        return any(map(uncalibrated, strategy.children()))
    return isinstance(strategy, CalibratedStrategy) and not strategy.calibrated


class Calibrator:
    """Makes strategies ready for one model; those that read the same statistics share one calibration."""

    def __init__(self, model: Any, text: CalibrationText) -> None:
        self._model, self._text = model, text
        self._found: dict[str, tuple[Calibration, CalibrationCard]] = {}
        self.report: Report | None = None
        """Called with `(pass, windows done, windows)` while a calibration runs."""

    def ready(self, strategy: Any) -> tuple[Any, CalibrationCard | None]:
        """The strategy as it can be measured, and what it was calibrated on here: None if it needed nothing."""
        if not uncalibrated(strategy):
            return strategy, None
        if isinstance(strategy, Preset):
            cards = []

            def child_ready(child: Any) -> Any:
                ready, card = self.ready(child)
                cards.append(card)
                return ready

            ready = strategy.with_each(child_ready)
            return ready, next(filter(None, cards))  # all children learn from the same text
        key = self._what_decides(strategy)
        if key not in self._found:
            self._found[key] = self._calibrate(strategy)
        calibration, card = self._found[key]
        return strategy.with_calibration(calibration), card

    def _calibrate(self, strategy: CalibratedStrategy) -> tuple[Calibration, CalibrationCard]:
        windows = self._text.windows(self._model)
        calibrated = strategy.calibrate(
            self._model, None, windows, samples=len(windows), heldout=0, report=self.report
        ).calibration
        if not isinstance(calibrated, Calibration):
            raise TypeError(f"calibrating {strategy.name!r} gave {calibrated!r} instead of a calibration")
        evidence = calibrated.record.evidence
        card = CalibrationCard(
            text=self._text.content[0],
            sha256=self._text.sha256,
            windows=evidence.windows,
            length=evidence.length,
            windows_sha256=evidence.windows_sha256,
            digest=calibrated.digest,
            seconds=evidence.seconds,
        )
        return calibrated, card

    def _what_decides(self, strategy: CalibratedStrategy) -> str:
        """Equal for strategies of which the same is measured; `CalibratedStrategy` refuses statistics where not."""
        views = {}
        for spec in self._layers:
            formats = strategy.formats(spec)
            if formats is not None:
                views[spec.index] = {"key": view(formats, "key"), "value": view(formats, "value")}
        how = type(strategy).calibrate
        return json.dumps([f"{how.__module__}.{how.__qualname__}", strategy.recipe().model_dump(), views])

    @cached_property
    def _layers(self) -> list[LayerSpec]:
        """The layers that can be packed, by the tensors that arrive."""
        cache = PackedCache(self._model, registry.parse("none"))
        try:
            with torch.inference_mode():
                self._model(torch.zeros(1, 1, dtype=torch.long, device=self._model.device), past_key_values=cache)
        finally:
            detach(self._model)
        return [layer.spec for layer in cache.packed_layers]
