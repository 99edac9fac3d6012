"""A model and the cache it is evaluated through: log-likelihoods under each protocol, and what was read for them."""

import inspect
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, get_args

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel

from ...core import AdaptiveStrategy, CacheQuantizer, PackedCache, Side, SimulatedCache
from ...core.hf.blocks import BlockLayer
from .batches import LONGEST_CHUNK, UNSCORED, Grid, Layout, Row, aligned, flush
from .reading import Meter, Protocol, packed_by_layer

PROTOCOLS: tuple[Protocol, ...] = get_args(Protocol)


class Source:
    """What makes the caches: a strategy with options of `PackedCache`, a function, or neither for `DynamicCache`.

    Raises ValueError for what does not go together.
    """

    def __init__(
        self,
        strategy: CacheQuantizer | None,
        make_cache: Callable[[PreTrainedModel], Cache] | None,
        protocol: Protocol,
        residual_length: int | None = None,
        sink_tokens: int | None = None,
        skip_layers: Iterable[int] | None = None,
    ) -> None:
        self.strategy, self.make_cache = strategy, make_cache
        self.protocol: Protocol = protocol
        skipped = None if skip_layers is None else tuple(skip_layers)
        given = {"residual_length": residual_length, "sink_tokens": sink_tokens, "skip_layers": skipped}
        self.options = {name: option for name, option in given.items() if option is not None}
        self._require_consistent()

    def new_cache(self, model: Any) -> Cache:
        """An empty cache, the one under test."""
        if self.make_cache is not None:
            return self.make_cache(model)
        if self.strategy is None:
            return DynamicCache(config=model.config)
        options = {"residual_length": 0, **self.options} if self.protocol == "paper" else self.options
        return PackedCache(model, self.strategy, **options)

    def simulated(self, model: Any, **schedule: Any) -> SimulatedCache:
        """The cache of one forward that stands for a streamed run."""
        assert self.strategy is not None  # checked when we were made
        return SimulatedCache(model, self.strategy, **schedule, **self.options)

    def _require_consistent(self) -> None:
        if self.protocol not in PROTOCOLS:
            raise ValueError(f"protocol={self.protocol!r} is none; use one of {', '.join(PROTOCOLS)}")
        if self.strategy is not None and self.make_cache is not None:
            raise ValueError("a strategy and a cache were given; give the one that is to be evaluated")
        if self.strategy is None and self.options:
            raise ValueError(f"{', '.join(self.options)} are options of packed caches; give a strategy with them")
        if self.protocol == "decode":
            return
        if self.strategy is None:
            raise ValueError(f"protocol={self.protocol!r} simulates a strategy; for caches use protocol='decode'")
        if isinstance(self.strategy, AdaptiveStrategy):
            raise ValueError(
                f"{self.strategy.name!r} packs tokens again while decoding, which one forward cannot show; "
                "use protocol='decode'"
            )
        if self.protocol == "paper" and self.options.get("residual_length"):
            raise ValueError(
                f"protocol='paper' keeps no tail exact, residual_length={self.options['residual_length']} was given; "
                "leave it out, or use another protocol"
            )


class CachedModel:
    """A model whose log-likelihoods are computed through caches of one source.

    softmax_dtype: of the log-probabilities; the logits' own when None.
    autocast: dtype of mixed precision, if any.
    """

    def __init__(
        self,
        model: Any,
        source: Source,
        softmax_dtype: torch.dtype | None = None,
        autocast: torch.dtype | None = None,
    ) -> None:
        self.model, self.source = model, source
        self.meter = Meter(model)
        self._softmax_dtype, self._autocast = softmax_dtype, autocast
        self._takes_positions = "position_ids" in inspect.signature(type(model).forward).parameters
        self.stock = source.strategy is None and type(self.new_cache()) is DynamicCache
        """Whether it is the exact cache that models use by default."""
        self.grid = self._find_grid()
        """What generation asks of batches."""

    def new_cache(self) -> Cache:
        """An empty cache, the one under test."""
        return self.source.new_cache(self.model)

    @property
    def scoring_grid(self) -> Grid:
        """What log-likelihoods ask of batches."""
        # padding follows the rows where everything is packed in one forward, so nothing is shifted
        return self.grid.model_copy(update={"block": 1}) if self.source.protocol == "paper" else self.grid

    def phase(self, length: int) -> int:
        """Contexts of equal phase may share a batch."""
        return length % self.grid.block if self.grid.block else length

    def scores(self, rows: list[Row]) -> list[tuple[float, bool]]:
        """Log-likelihood of each row's continuation, and whether greedy decoding gives it; the rows are one batch."""
        layout = flush(rows, self.grid.block or 1) if self.source.protocol == "paper" else aligned(rows)
        run = {"decode": self._decoded, "stream": self._streamed, "paper": self._as_papers}[self.source.protocol]
        parts = list(run(layout))
        chances, hits = (torch.cat(part, dim=1) for part in zip(*parts, strict=True))
        scored = layout.targets[:, layout.scored_from :] != UNSCORED
        return [
            (float(chance[mask].double().sum()), bool(hit[mask].all()))
            for chance, hit, mask in zip(chances, hits, scored, strict=True)
        ]

    @contextmanager
    def metered(self, starts: Tensor) -> Iterator[None]:
        """Count what each forward is about to read, of rows that begin at the columns `starts`."""

        def count(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
            cache, queries = kwargs["past_key_values"], kwargs["input_ids"].shape[1]
            positions = int(cache.get_seq_length()) + torch.arange(queries)
            counted = torch.ones(len(starts), queries, dtype=torch.bool)
            self.meter.add(packed_by_layer(cache, queries), starts, positions, counted)

        hook = self.model.register_forward_pre_hook(count, with_kwargs=True)
        try:
            yield
        finally:
            hook.remove()

    def forward(
        self,
        ids: Tensor,
        cache: Cache,
        starts: Tensor,
        positions: Tensor,
        keep: int = 0,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Logits `[batch, n, vocabulary]` of `ids [batch, n]`, the last `keep` alone where that is not 0.

        starts: the column of each row's first token: what precedes it is hidden, where there is no other mask.
        """
        device = self.model.device
        arguments: dict[str, Any] = {"past_key_values": cache, "use_cache": True, "logits_to_keep": keep}
        if mask is None and starts.any():
            columns = int(cache.get_seq_length()) + ids.shape[1]
            mask = (torch.arange(columns) >= starts[:, None]).long()
        if mask is not None and not mask.all():
            arguments["attention_mask"] = mask.to(device)
            if self._takes_positions:
                arguments["position_ids"] = positions.to(device)
        enabled = self._autocast is not None
        with torch.no_grad(), torch.autocast(device.type, dtype=self._autocast, enabled=enabled):
            return self.model(ids.to(device), **arguments).logits

    # ---- inside ----------------------------------------------------------------------------------------------------

    def _decoded(self, layout: Layout) -> Iterator[tuple[Tensor, Tensor]]:
        """Through the cache: chances and hits of the columns from the first scored one on, chunk by chunk."""
        cache, begin = self.new_cache(), layout.scored_from
        if begin:
            self._prefill(cache, layout, begin)
        for step in self.grid.steps(begin, layout.ids.shape[1]):
            self._count(layout, step, packed_by_layer(cache, step.stop - step.start))
            ids, positions = layout.ids[:, step], layout.positions[:, step]
            logits = self.forward(ids, cache, layout.starts, positions)
            yield self._judged(logits, layout.targets[:, step])
        self.meter.weigh(cache, len(layout.ids))

    def _prefill(self, cache: Cache, layout: Layout, columns: int) -> None:
        """The first columns, once for rows that have them in common."""
        prefixes = torch.cat([layout.starts[:, None], layout.ids[:, :columns]], dim=1).tolist()
        # the first row with each prefix, in order
        different = sorted({prefixes.index(prefix) for prefix in prefixes})
        starts, positions = layout.starts[different], layout.positions[different, :columns]
        self.forward(layout.ids[different, :columns], cache, starts, positions, keep=1)
        if len(different) < len(prefixes):
            chosen = [different.index(prefixes.index(prefix)) for prefix in prefixes]
            cache.batch_select_indices(torch.tensor(chosen, device=self.model.device))

    def _streamed(self, layout: Layout) -> Iterator[tuple[Tensor, Tensor]]:
        """What `_decoded` gives, in one forward."""
        begin, columns = layout.scored_from, layout.ids.shape[1]
        cache = self.source.simulated(self.model, prefill=begin)
        logits = self.forward(layout.ids, cache, layout.starts, layout.positions, keep=columns - begin)
        asked = torch.arange(begin, columns)
        packed = [
            (_packed_before(layer, asked), layer.options.sink_tokens)
            if isinstance(layer, BlockLayer)
            else (torch.zeros_like(asked), 0)
            for layer in cache.layers
        ]
        self._count(layout, slice(begin, columns), packed)
        yield self._judged(logits, layout.targets[:, begin:])

    def _as_papers(self, layout: Layout) -> Iterator[tuple[Tensor, Tensor]]:
        """Everything read packed, in one forward; columns after a row's end are padding to whole blocks."""
        begin, columns = layout.scored_from, layout.ids.shape[1]
        cache = self.source.simulated(self.model, every_token=True)
        mask = (torch.arange(columns) < layout.ends[:, None]).long()
        logits = self.forward(layout.ids, cache, layout.starts, layout.positions, keep=columns - begin, mask=mask)
        asked = torch.arange(begin, columns)
        packed = [
            (asked + 1, layer.options.sink_tokens) if isinstance(layer, BlockLayer) else (torch.zeros_like(asked), 0)
            for layer in cache.layers
        ]
        self._count(layout, slice(begin, columns), packed)
        yield self._judged(logits, layout.targets[:, begin:])

    def _judged(self, logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Log-probabilities of the targets, and whether they are the most likely tokens: `[batch, n]`."""
        targets = targets.clamp(min=0).to(logits.device)
        chances = F.log_softmax(logits, dim=-1, dtype=self._softmax_dtype).gather(-1, targets[..., None])[..., 0]
        return chances.cpu(), (logits.argmax(-1) == targets).cpu()

    def _count(self, layout: Layout, step: slice, packed: list[tuple[Tensor, int]]) -> None:
        counted = layout.targets[:, step] != UNSCORED
        self.meter.add(packed, layout.starts, torch.arange(step.start, step.stop), counted)

    def _find_grid(self) -> Grid:
        """Ask a cache that holds one token how it packs."""
        if self.stock:
            return Grid(block=1, chunk=LONGEST_CHUNK)
        cache = self.new_cache()
        if not isinstance(cache, PackedCache):
            return Grid(block=None, chunk=1, alone=True)
        if isinstance(cache.strategy, AdaptiveStrategy):
            return Grid(block=None, chunk=1)
        self.forward(torch.zeros(1, 1, dtype=torch.long), cache, torch.zeros(1), torch.zeros(1, 1))
        layers = [layer for layer in cache.layers if isinstance(layer, BlockLayer)]
        blocks = [layer.formats.block for layer in layers] or [1]
        return Grid(
            block=max(blocks),
            chunk=min(blocks) if layers else LONGEST_CHUNK,
            residual=cache.options.residual_length if layers else 0,
            alone=any(_fits_itself(cache.strategy, layer) for layer in layers),
        )


def _packed_before(layer: BlockLayer, columns: Tensor) -> Tensor:
    """Tokens that are packed when the tokens of these columns are fed one by one."""
    block = layer.formats.block
    return (columns - layer.options.residual_length).clamp(min=0) // block * block


def _fits_itself(strategy: CacheQuantizer, layer: BlockLayer) -> bool:
    """Whether a strategy's tables depend on the first block, which all rows of a batch share."""
    generator = torch.Generator().manual_seed(0)
    dims: dict[Side, int] = {"key": layer.head_dim, "value": layer.value_dim}
    for side, dim in dims.items():
        if getattr(layer.formats, side).codes == "exact":
            continue
        shape = (1, layer.kv_heads, layer.formats.block, dim)
        normal = torch.randn(shape, generator=generator).to(layer.device, layer.dtype)
        # of another shape, not only another width, which normalization would undo
        one, other = (strategy.tables(layer.spec, side, first, None).tensors() for first in (normal, normal**3))
        if any(not torch.equal(one[name], other[name]) for name in one):
            return True
    return False
