"""One model, a text to tune on and another to verify on, and what a strategy costs and keeps on either."""

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict
from transformers import DynamicCache

from ... import registry
from ...core import LayerSpec, PackedCache, detach
from ..contenders import Contender
from ..corpus import SEPARATOR
from ..environment import Environment
from ..errors import Unusable, message
from ..held import weigh
from ..streaming import ExactRun, Protocol, cut_windows
from ..subjects import Panel, TextCard, open_panels, read_text
from ..sweep.cells import code_digest
from ..tasks.perplexity import Perplexity
from .journal import Journal

Stage = Literal["tuning", "verifying"]

# Characters read for a token of the tuning text; a text of which that is too little is read whole.
CHARACTERS = 8


class Figures(BaseModel):
    """What a strategy held and lost on one text."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kl: float
    """Mean divergence from the exact model, nats per token."""
    kl_p99: float
    top1: float
    perplexity: float
    tokens: int
    """Scored."""
    device_bytes: int
    bits: float
    """Packed bits per number, metadata included, to which long contexts converge."""
    held_bits: float
    """All device bytes, exact tail included, per number, at the end of the windows."""


class Bench:
    """Measures strategies on one panel. What was measured before, the journal knows.

    chunk: tokens per pass while tuning. Passes of whole blocks find the same tokens packed as passes of the smallest
        block do, in less time.
    """

    def __init__(self, verifying: Panel, tuning: Panel, task: Perplexity, chunk: int, journal: Journal) -> None:
        self.panel, self._journal = verifying, journal
        self._panels: dict[Stage, Panel] = {"verifying": verifying, "tuning": tuning}
        protocol = task.protocol(verifying)
        self.protocols: dict[Stage, Protocol] = {
            "verifying": protocol,
            "tuning": protocol.model_copy(update={"chunk": chunk}),
        }
        self._exact: dict[Stage, ExactRun] = {}

    @property
    def windows(self) -> int:
        """Stretches of text in a batch."""
        return self.protocols["verifying"].windows

    def text(self, stage: Stage) -> TextCard:
        """What is read."""
        return self._panels[stage].text

    def ready(self, strategy: Any) -> Any:
        """The strategy, calibrated for the model if it has to be."""
        return self.panel.calibrator.ready(strategy)[0]

    def measure(self, strategy: Any, stage: Stage) -> Figures:
        """The figures of one strategy, which is ready. Raises whatever it raises."""
        described = json.dumps(strategy.describe(), sort_keys=True)
        digest = hashlib.sha256(described.encode()).hexdigest()[:16]
        name = f"{stage} by {self.protocols[stage].chunk} {digest}"
        known = self._journal.find(name)
        if known is not None:
            return Figures.model_validate(known["figures"])
        figures = self._measured(strategy, stage)
        self._journal.put(name, {"spec": registry.spec(strategy), "figures": figures.model_dump()})
        return figures

    def shapes(self) -> list[LayerSpec]:
        """The layers that can be packed, by the tensors that arrive."""
        return [layer.spec for layer in self._probed("none").packed_layers]

    def rope_bytes(self) -> float:
        """Per packed token and sequence: angles, where any layer keeps keys before RoPE; 0 for models that cannot.

        The batch shares them, and those of tokens in the exact tail are held too.
        """
        try:
            cache = self._probed("none:key_rope=pre")
        except (ValueError, RuntimeError):
            return 0.0
        tables = [tensor for table in cache.rotary_tables.by_kind.values() for tensor in table.tensors().values()]
        held = sum(tensor.numel() * tensor.element_size() for tensor in tables) / max(1, cache.get_seq_length())
        protocol = self.protocols["verifying"]
        return held / self.windows * protocol.length / (protocol.length - protocol.residual_length)

    def serves(self, strategy: Any) -> None:
        """Raise ValueError unless the model can be cached so."""
        try:
            PackedCache(self.panel.model, strategy)
        finally:
            detach(self.panel.model)

    def _measured(self, strategy: Any, stage: Stage) -> Figures:
        model = self.panel.model
        exact = self._run(stage)
        try:
            cache = Contender("", strategy, model, self.panel.residual_length).new_cache()
            accuracy = exact.compare(model, cache)
            _, memory = weigh(cache, model, self.windows)
        finally:
            detach(model)
        return Figures(
            kl=accuracy.kl_mean,
            kl_p99=accuracy.kl_p99,
            top1=accuracy.top1,
            perplexity=accuracy.perplexity,
            tokens=accuracy.tokens,
            device_bytes=memory.device_bytes,
            bits=memory.packed_bits_per_element,
            held_bits=memory.bits_per_element,
        )

    def _run(self, stage: Stage) -> ExactRun:
        if stage not in self._exact:
            panel, protocol = self._panels[stage], self.protocols[stage]
            detach(panel.model)
            windows = cut_windows(panel.ids, protocol, panel.tokenizer.bos_token_id)
            self._exact[stage] = ExactRun(
                panel.model, windows, protocol, lambda: DynamicCache(config=panel.model.config)
            )
        return self._exact[stage]

    def _probed(self, spec: str) -> PackedCache:
        """A cache after one token."""
        model = self.panel.model
        try:
            cache = PackedCache(model, registry.parse(spec))
            with torch.inference_mode():
                model(torch.zeros(1, 1, dtype=torch.long, device=model.device), past_key_values=cache)
        finally:
            detach(model)
        return cache


@dataclasses.dataclass(frozen=True)
class Material:
    """A model with the text to verify on and the text to tune on."""

    verifying: Panel
    tuning: Panel
    task: Perplexity

    @property
    def about(self) -> dict[str, Any]:
        """What measurements on it depend on, strategies aside."""
        current = Environment.current()
        return {
            "model": self.verifying.card.model_dump(),
            "torch": current.torch,
            "transformers": current.transformers,
            "cachequant": current.cachequant,
            "code": code_digest(),
            "device": str(self.verifying.model.device),
            "text": self.verifying.text.sha256,
            "tuning text": self.tuning.text.sha256,
            "tokens": _digest(self.verifying.ids),
            "tuning tokens": _digest(self.tuning.ids),
            "windows": self.task.windows,
            "window length": self.task.length,
            "residual length": self.verifying.residual_length,
        }


def gather(
    model: str | None = None,
    text: Path | None = None,
    calibration_text: Path | None = None,
    *,
    windows: int = 6,
    window_length: int | None = None,
    residual_length: int = 32,
    twin: bool = False,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> tuple[list[Material], list[str]]:
    """The model, and its outlier twin if asked for, with both texts; and what is odd about them.

    text: verified on; the held-out standard library when None. calibration_text: tuned and calibrated on; the rest of
        the standard library when None.

    Raises Unusable.
    """
    panels, notes = open_panels(
        model,
        text,
        dtype=dtype,
        device=device,
        twin=twin,
        residual_length=residual_length,
        calibration_text=calibration_text,
        calibrating=True,
    )
    first = panels[0]
    try:
        task = Perplexity(windows=windows, length=window_length)
        task = task.model_copy(update={"length": task.protocol(first).length})
    except ValueError as error:
        raise Unusable(message(error), "--window-length") from error
    try:
        cut_windows(first.ids, task.protocol(first), first.tokenizer.bos_token_id)
    except ValueError as error:
        raise Unusable(message(error), "--text") from error
    name, content = read_text(calibration_text, "train", "--calibration-text")
    protocol = task.protocol(first)
    ids = _tokens(first, _thinned(content, windows, CHARACTERS * protocol.length))
    if len(ids) < windows * (protocol.length + 1):
        ids = _tokens(first, content)
    try:
        cut_windows(ids, protocol, first.tokenizer.bos_token_id)
    except ValueError as error:
        raise Unusable(message(error), "--calibration-text") from error
    card = TextCard(name=name, sha256=hashlib.sha256(content.encode()).hexdigest(), tokens=len(ids))
    return [Material(panel, dataclasses.replace(panel, text=card, ids=ids), task) for panel in panels], notes


def _thinned(content: str, pieces: int, characters: int) -> str:
    """Pieces spread evenly over a text that is longer than they are."""
    if len(content) <= pieces * characters:
        return content
    starts = [i * (len(content) - characters) // max(1, pieces - 1) for i in range(pieces)]
    return SEPARATOR.join(content[start : start + characters] for start in starts)


def _digest(ids: Sequence[int]) -> str:
    """The same text is other tokens to another tokenizer."""
    return hashlib.sha256(json.dumps(list(ids)).encode()).hexdigest()[:16]


def _tokens(panel: Panel, content: str) -> list[int]:
    return panel.tokenizer(content, add_special_tokens=False, verbose=False).input_ids
