"""Speed: prefill and decoding against transformers' own cache, on the same weights and in the same minute."""

import statistics
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
from pydantic import Field
from torch import Tensor
from transformers import Cache, DynamicCache

from ...core import attach, detach
from ...registry.hookspecs import hookimpl
from ..contenders import EXACT, Exact
from ..held import bits_by_layer, weigh
from ..speed import interleave
from .base import Metric, Outcome, Task
from .reading import require_length

if TYPE_CHECKING:
    from ..contenders import Contender
    from ..subjects import Panel

LENGTH = 1024

# numbers that share a scale in caches that quantize in groups, which hold whole groups only
GROUP = 64


class Speed(Task):
    """Time per prefill and per decoded token, as a multiple of DynamicCache's in the same turn."""

    name: ClassVar[str] = "speed"
    metrics: ClassVar[tuple[Metric, ...]] = (
        Metric(name="decode_ratio", label="decode time", better="lower", digits=2, unit="x"),
        Metric(name="prefill_ratio", label="prefill time", better="lower", digits=2, unit="x"),
    )

    length: int | None = Field(
        default=None,
        ge=1,
        description=f"Tokens prefilled; None: {LENGTH}, or what there is room for, in whole {GROUP}s.",
    )
    steps: int = Field(default=32, ge=1, description="Tokens decoded after them, one per turn.")
    rounds: int = Field(default=3, ge=1, description="Prefills, one per turn.")

    def fitted(self, panel: "Panel") -> Self:
        """See `Task.fitted`."""
        more = self.steps + 1  # one turn is not counted
        most = panel.card.context - more
        length = _open_length(min(most, len(panel.ids) - more)) if self.length is None else self.length
        require_length(length, most, 1, f"something to read before steps={self.steps}")
        if length + more > len(panel.ids):
            raise ValueError(
                f"the text has {len(panel.ids)} tokens, length={length} and steps={self.steps} need "
                f"{length + more}; use a longer text or fewer tokens"
            )
        return self.model_copy(update={"length": length})

    def inputs(self, panel: "Panel") -> dict[str, str]:
        """Times belong to a number of threads."""
        return {"threads": str(torch.get_num_threads()), "text_sha256": panel.text.sha256}

    def prepare(self, panel: "Panel") -> Tensor:
        """Token ids `[1, length + steps + 1]`: what is prefilled, and what is decoded."""
        task = self.fitted(panel)
        assert task.length is not None  # a fitted task has one
        start = [] if panel.tokenizer.bos_token_id is None else [panel.tokenizer.bos_token_id]
        ids = [*start, *panel.ids][: task.length + self.steps + 1]
        return torch.tensor([ids], device=panel.model.device)

    def measure(self, panel: "Panel", prepared: Tensor, contender: "Contender") -> Outcome:
        """See `Task.measure`."""
        length = prepared.shape[1] - self.steps - 1
        pair = _Pair(panel.model, prepared, length, contender)
        try:
            latency = pair.peak()
            prefill, decode = pair.times(pair.prefill, self.rounds), pair.times(pair.decode, self.steps)
        except (AssertionError, ValueError) as error:
            group = getattr(contender.source, "group_size", None)
            # what quanto and hqq say where numbers do not divide into groups
            if contender.strategy is not None or group is None or "group" not in str(error).lower():
                raise
            raise ValueError(
                f"{contender.spec} holds whole groups of {group} numbers only, and a cache of {length} tokens or "
                f"more was refused ({error}); use a length that is a multiple of {group}, or another group_size"
            ) from error
        latency |= {"prefill_ms": statistics.median(prefill[contender.spec])}
        latency |= {"decode_ms": statistics.median(decode[contender.spec])}
        cache = pair.caches[contender.spec]
        return Outcome.of(
            weigh(cache, panel.model, 1),
            metrics={"decode_ratio": _ratio(decode, contender), "prefill_ratio": _ratio(prefill, contender)},
            layers=bits_by_layer(cache),
            latency=latency,
        )


class _Pair:
    """A contender and DynamicCache, which take turns on one model; DynamicCache alone has nobody to compare with."""

    def __init__(self, model: Any, ids: Tensor, length: int, contender: "Contender") -> None:
        self._model, self._ids, self._length = model, ids, length
        self._makers: dict[str, Callable[[], Cache]] = {EXACT: lambda: DynamicCache(config=model.config)}
        if not isinstance(contender.source, Exact):
            self._makers[contender.spec] = contender.new_cache
        self._packed = contender.spec if contender.strategy is not None else None
        self.caches: dict[str, Cache] = {}

    def prefill(self, name: str) -> None:
        """The context into an empty cache, whose making counts."""
        cache = self._makers[name]()
        self._forward(self._ids[:, : self._length], cache)
        self.caches[name] = cache

    def decode(self, name: str) -> None:
        """One token more."""
        cache = self.caches[name]
        held = int(cache.get_seq_length())
        self._forward(self._ids[:, held : held + 1], cache)

    def times(self, action: Callable[[str], None], rounds: int) -> dict[str, list[float]]:
        """Milliseconds per turn."""
        actions = {name: _bound(action, name) for name in self._makers}
        switches = {name: _bound(self._switch, name) for name in self._makers}
        found = interleave(actions, rounds, switches)
        return {name: [wall for wall, _ in times] for name, times in found.items()}

    def peak(self) -> dict[str, float]:
        """`prefill_peak_bytes` that the contender's prefill allocates at most, cache included, where CUDA counts it."""
        device = self._model.device
        if device.type != "cuda":
            return {}
        name = next(reversed(self._makers))
        self._switch(name)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        self.prefill(name)
        found = torch.cuda.max_memory_allocated(device) - before
        self.caches.clear()
        return {"prefill_peak_bytes": float(found)}

    def _switch(self, name: str) -> None:
        """Leave nothing of ours on the model while transformers' caches are timed."""
        if name == self._packed:
            attach(self._model)
        else:
            detach(self._model)

    @torch.inference_mode()
    def _forward(self, ids: Tensor, cache: Cache) -> None:
        self._model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        if self._model.device.type == "cuda":
            torch.cuda.synchronize(self._model.device)


def _open_length(most: int) -> int:
    """As long as there is room for, in whole groups where there is room for one."""
    length = max(1, min(LENGTH, most))
    return length - length % GROUP if length > GROUP else length


def _bound(action: Callable[[str], None], name: str) -> Callable[[], None]:
    return lambda: action(name)


def _ratio(times: dict[str, list[float]], contender: "Contender") -> float:
    """Median over the turns; 1 for DynamicCache, which is timed once."""
    pairs = zip(times[contender.spec], times[EXACT], strict=True)
    return statistics.median(mine / theirs for mine, theirs in pairs)


@hookimpl
def cachequant_tasks() -> list[type[Task]]:
    """Offer `speed`."""
    return [Speed]
