"""A model class of lm-evaluation-harness whose scores are computed from the packed cache.

The harness's own class scores a continuation in one forward over context and continuation, which attends to what it
has just computed: a quantized cache given to it is never read. Here every scored token, and every generated one, is
computed by attention over what the cache holds, or over what a simulation holds in its place.
"""

import inspect
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, get_args

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm
from transformers import Cache, DynamicCache, PreTrainedModel

from ... import registry
from ...core import AdaptiveStrategy, CacheQuantizer, PackedCache, Side, SimulatedCache
from ...core.hf.blocks import BlockLayer
from .batches import LONGEST_CHUNK, UNSCORED, Grid, Layout, Row, aligned, batched, flush
from .harness import require_harness
from .reading import Meter, Protocol, Reading, packed_by_layer

require_harness()

from lm_eval.api.instance import Instance  # noqa: E402 (said in our words first that it is missing)
from lm_eval.api.registry import register_model  # noqa: E402
from lm_eval.models.huggingface import HFLM  # noqa: E402

PROTOCOLS: tuple[Protocol, ...] = get_args(Protocol)

# its decorator says less of the class than there is
_HFLM: Any = HFLM


class CacheQuantLM(_HFLM):
    """Use as any model of lm-evaluation-harness: `simple_evaluate(model=CacheQuantLM(model, "uniform"), tasks=[...])`.

    pretrained: a decoder-only transformers model, or a folder or hub name to load it from.
    strategy: a spec such as `uniform:bits=4`, or any `CacheQuantizer`; None: transformers' own `DynamicCache`.
    cache: instead of a strategy, a function that makes an empty cache for the model, such as transformers'
        `QuantizedCache`. Its rows are evaluated one by one: what others make of a batch is not known.
    protocol: how log-likelihoods are computed.

        decode: all tokens of a context but the last are prefilled; the last one and the continuation are fed through
            the cache, in chunks that give what tokens fed one by one give.
        stream: the same in one forward, by the streaming-exact simulation. Not for strategies that pack tokens again.
        paper: every query reads every token packed, itself included, as papers evaluate. No cache works like this: for
            comparison with their figures only.

        Generation always goes through the cache; under `paper` with no exact tail.
    residual_length, sink_tokens, skip_layers: those of `PackedCache`.

    The other arguments are the harness's. `batch_size` is a number: rows are batched where that gives what each row
    gives alone. `reading` says how much of what was read was packed; a warning says that nothing was.

    Raises ValueError for arguments that do not go together, and what `registry.parse` and `PackedCache` raise.
    """

    def __init__(
        self,
        pretrained: str | PreTrainedModel,
        strategy: str | CacheQuantizer | None = None,
        *,
        cache: Callable[[PreTrainedModel], Cache] | None = None,
        protocol: Protocol = "decode",
        residual_length: int | None = None,
        sink_tokens: int | None = None,
        skip_layers: Iterable[int] | None = None,
        batch_size: int | str | None = 1,
        **arguments: Any,
    ) -> None:
        self._strategy = registry.parse(strategy) if isinstance(strategy, str) else strategy
        self._make_cache = cache
        self._protocol: Protocol = protocol
        skipped = None if skip_layers is None else tuple(skip_layers)
        given = {"residual_length": residual_length, "sink_tokens": sink_tokens, "skip_layers": skipped}
        self._options = {name: option for name, option in given.items() if option is not None}
        self._require_consistent()
        rows = str(batch_size or 1)
        if not rows.isdigit() or int(rows) < 1:
            raise ValueError(
                f"batch_size={batch_size!r}: what fits depends on what the cache packs, so it is not searched; "
                "give a number, such as 8"
            )
        super().__init__(pretrained, batch_size=int(rows), **arguments)
        if self.backend != "causal":
            raise ValueError(f"{type(self.model).__name__} is no decoder-only model, and its cache cannot be packed")
        self._takes_positions = "position_ids" in inspect.signature(type(self.model).forward).parameters
        self._meter = Meter(self.model)
        self._stock = self._strategy is None and type(self._new_cache()) is DynamicCache
        self._grid = self._find_grid()

    @property
    def reading(self) -> Reading:
        """What was read of the cache by all that was evaluated since this was made, or since `forget_reading`."""
        return self._meter.read(self._protocol)

    def forget_reading(self) -> None:
        """Begin to count anew."""
        self._meter = Meter(self.model)

    # ---- what the harness asks for ---------------------------------------------------------------------------------

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """See the harness."""
        answers = super().loglikelihood(requests, disable_tqdm=disable_tqdm)
        self._warn_where_unread()
        return answers

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """See the harness; each window is streamed through a cache of its own, from its first token on."""
        answers = super().loglikelihood_rolling(requests, disable_tqdm=disable_tqdm)
        self._warn_where_unread()
        return answers

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """See the harness."""
        alike: dict[int, list[int]] = defaultdict(list)
        for i, request in enumerate(requests):
            # what cannot share a batch in the end should not be collated into one
            alike[self._phase(len(self.tok_encode(request.args[0])))].append(i)
        answers = [""] * len(requests)
        for indices in tqdm(alike.values(), disable=disable_tqdm, desc="Generating"):
            texts = super().generate_until([requests[i] for i in indices], disable_tqdm=True)
            for i, text in zip(indices, texts, strict=True):
                answers[i] = text
        self._warn_where_unread()
        return answers

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[Any, list[int], list[int]]],
        disable_tqdm: bool = False,
        override_bs: int | None = None,
        **kwargs: Any,
    ) -> list[tuple[float, bool]]:
        rows = [self._row(i, context, continuation) for i, (_, context, continuation) in enumerate(requests)]
        answers: list[tuple[float, bool]] = [(0.0, True)] * len(rows)
        with tqdm(total=len(rows), disable=disable_tqdm or self.rank != 0, desc="Log-likelihoods") as progress:
            for batch in batched(rows, self.batch_size, self._scoring_grid):
                for row, answer in zip(batch, self._scores(batch), strict=True):
                    answers[row.request] = answer
                    text = requests[row.request][0]
                    if text is not None:  # windows of a longer text have none
                        self.cache_hook.add_partial("loglikelihood", text, answer)
                progress.update(len(batch))
        return answers

    def _model_generate(self, context: Tensor, max_length: int, stop: list[str], **generation_kwargs: Any) -> Tensor:
        mask = generation_kwargs.pop("attention_mask", torch.ones_like(context))
        lengths = mask.sum(-1).tolist()
        alike: dict[int, list[int]] = defaultdict(list)
        for i, length in enumerate(lengths):
            alike[i if self._grid.alone else self._phase(length)].append(i)
        found: dict[int, Tensor] = {}
        for rows in alike.values():
            width = max(lengths[i] for i in rows)
            cut = context.shape[1] - width
            generated = self._generated(
                context[rows, cut:], mask[rows, cut:], max_length=max_length - cut, stop=stop, **generation_kwargs
            )
            found |= {i: torch.cat([context[i, :cut], text]) for i, text in zip(rows, generated, strict=True)}
        return torch.nn.utils.rnn.pad_sequence(
            [found[i] for i in range(len(context))], batch_first=True, padding_value=self.tokenizer.pad_token_id or 0
        )

    # ---- generation ------------------------------------------------------------------------------------------------

    def _generated(self, ids: Tensor, mask: Tensor, **arguments: Any) -> Tensor:
        """Rows that may share a batch, continued: int64 `[batch, tokens]`."""
        cache = self._new_cache()
        starts = ids.shape[1] - mask.sum(-1).cpu()
        if ids.shape[1] > 1:
            # generate would take the first token from its own prefill, which reads nothing packed
            positions = (mask.cumsum(-1) - 1).clamp(min=0)
            self._forward(ids[:, :-1], cache, starts, positions[:, :-1], keep=1)
        beams = arguments.get("num_beams") or 1
        if beams > 1:
            cache.batch_repeat_interleave(beams)
        with self._metered(starts.repeat_interleave(beams)):
            texts = super()._model_generate(ids, attention_mask=mask, past_key_values=cache, **arguments)
        self._meter.weigh(cache, len(starts) * beams)
        return texts

    @contextmanager
    def _metered(self, starts: Tensor) -> Iterator[None]:
        """Count what each forward is about to read."""

        def count(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
            cache, queries = kwargs["past_key_values"], kwargs["input_ids"].shape[1]
            positions = int(cache.get_seq_length()) + torch.arange(queries)
            counted = torch.ones(len(starts), queries, dtype=torch.bool)
            self._meter.add(packed_by_layer(cache, queries), starts, positions, counted)

        hook = self.model.register_forward_pre_hook(count, with_kwargs=True)
        try:
            yield
        finally:
            hook.remove()

    # ---- log-likelihoods -------------------------------------------------------------------------------------------

    def _row(self, request: int, context: list[int], continuation: list[int]) -> Row:
        """What fits into the model, from the end."""
        room = self.max_length + 1 - len(continuation)
        if not continuation or not context:
            raise ValueError(f"request {request}: a context and a continuation of at least one token each are needed")
        if room < 1:
            raise ValueError(
                f"request {request}: a continuation of {len(continuation)} tokens does not fit into the model's "
                f"{self.max_length}; give a larger max_length if the model takes more, or shorten it"
            )
        return Row(request, tuple(context[-room:]), tuple(continuation))

    @property
    def _scoring_grid(self) -> Grid:
        # padding follows the rows where everything is packed in one forward, so nothing is shifted
        return self._grid.model_copy(update={"block": 1}) if self._protocol == "paper" else self._grid

    def _scores(self, rows: list[Row]) -> list[tuple[float, bool]]:
        layout = flush(rows, self._grid.block or 1) if self._protocol == "paper" else aligned(rows)
        parts = list(
            {"decode": self._decoded, "stream": self._streamed, "paper": self._as_papers}[self._protocol](layout)
        )
        chances, hits = (torch.cat(part, dim=1) for part in zip(*parts, strict=True))
        scored = layout.targets[:, layout.scored_from :] != UNSCORED
        return [
            (float(chance[mask].double().sum()), bool(hit[mask].all()))
            for chance, hit, mask in zip(chances, hits, scored, strict=True)
        ]

    def _decoded(self, layout: Layout) -> Iterator[tuple[Tensor, Tensor]]:
        """Through the cache: chances and hits of the columns from the first scored one on, chunk by chunk."""
        cache, begin = self._new_cache(), layout.scored_from
        if begin:
            self._prefill(cache, layout, begin)
        for step in self._grid.steps(begin, layout.ids.shape[1]):
            self._count(layout, step, packed_by_layer(cache, step.stop - step.start))
            ids, positions = layout.ids[:, step], layout.positions[:, step]
            logits = self._forward(ids, cache, layout.starts, positions)
            yield self._judged(logits, layout.targets[:, step])
        self._meter.weigh(cache, len(layout.ids))

    def _prefill(self, cache: Cache, layout: Layout, columns: int) -> None:
        """The first columns, once for rows that have them in common."""
        prefixes = torch.cat([layout.starts[:, None], layout.ids[:, :columns]], dim=1).tolist()
        # the first row with each prefix, in order
        different = sorted({prefixes.index(prefix) for prefix in prefixes})
        starts, positions = layout.starts[different], layout.positions[different, :columns]
        self._forward(layout.ids[different, :columns], cache, starts, positions, keep=1)
        if len(different) < len(prefixes):
            chosen = [different.index(prefixes.index(prefix)) for prefix in prefixes]
            cache.batch_select_indices(torch.tensor(chosen, device=self.model.device))

    def _streamed(self, layout: Layout) -> Iterator[tuple[Tensor, Tensor]]:
        """What `_decoded` gives, in one forward."""
        begin, columns = layout.scored_from, layout.ids.shape[1]
        assert self._strategy is not None  # checked when we were made
        cache = SimulatedCache(self.model, self._strategy, prefill=begin, **self._options)
        logits = self._forward(layout.ids, cache, layout.starts, layout.positions, keep=columns - begin)
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
        assert self._strategy is not None  # checked when we were made
        cache = SimulatedCache(self.model, self._strategy, every_token=True, **self._options)
        mask = (torch.arange(columns) < layout.ends[:, None]).long()
        logits = self._forward(layout.ids, cache, layout.starts, layout.positions, keep=columns - begin, mask=mask)
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
        chances = F.log_softmax(logits, dim=-1, dtype=self.softmax_dtype).gather(-1, targets[..., None])[..., 0]
        return chances.cpu(), (logits.argmax(-1) == targets).cpu()

    def _count(self, layout: Layout, step: slice, packed: list[tuple[Tensor, int]]) -> None:
        counted = layout.targets[:, step] != UNSCORED
        self._meter.add(packed, layout.starts, torch.arange(step.start, step.stop), counted)

    # ---- the model and its cache -----------------------------------------------------------------------------------

    def _forward(
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
        enabled = self.mixed_precision_dtype is not None
        with torch.no_grad(), torch.autocast(device.type, dtype=self.mixed_precision_dtype, enabled=enabled):
            return self.model(ids.to(device), **arguments).logits

    def _new_cache(self) -> Cache:
        """An empty cache, the one under test."""
        if self._make_cache is not None:
            return self._make_cache(self.model)
        if self._strategy is None:
            return DynamicCache(config=self.model.config)
        options = {"residual_length": 0, **self._options} if self._protocol == "paper" else self._options
        return PackedCache(self.model, self._strategy, **options)

    def _phase(self, length: int) -> int:
        """Contexts of equal phase may share a batch."""
        return length % self._grid.block if self._grid.block else length

    def _find_grid(self) -> Grid:
        """Ask a cache that holds one token how it packs."""
        if self._stock:
            return Grid(block=1, chunk=LONGEST_CHUNK)
        if self._make_cache is not None:
            return Grid(block=None, chunk=1, alone=True)
        if isinstance(self._strategy, AdaptiveStrategy):
            return Grid(block=None, chunk=1)
        cache = self._new_cache()
        assert isinstance(cache, PackedCache)
        self._forward(torch.zeros(1, 1, dtype=torch.long), cache, torch.zeros(1), torch.zeros(1, 1))
        layers = [layer for layer in cache.layers if isinstance(layer, BlockLayer)]
        blocks = [layer.formats.block for layer in layers] or [1]
        return Grid(
            block=max(blocks),
            chunk=min(blocks) if layers else LONGEST_CHUNK,
            residual=cache.options.residual_length if layers else 0,
            alone=any(_fits_itself(self._strategy, layer) for layer in layers),
        )

    def _require_consistent(self) -> None:
        if self._protocol not in PROTOCOLS:
            raise ValueError(f"protocol={self._protocol!r} is none; use one of {', '.join(PROTOCOLS)}")
        if self._strategy is not None and self._make_cache is not None:
            raise ValueError("a strategy and a cache were given; give the one that is to be evaluated")
        if self._strategy is None and self._options:
            raise ValueError(f"{', '.join(self._options)} are options of packed caches; give a strategy with them")
        if self._protocol == "decode":
            return
        if self._strategy is None:
            raise ValueError(f"protocol={self._protocol!r} simulates a strategy; for caches use protocol='decode'")
        if isinstance(self._strategy, AdaptiveStrategy):
            raise ValueError(
                f"{self._strategy.name!r} packs tokens again while decoding, which one forward cannot show; "
                "use protocol='decode'"
            )
        if self._protocol == "paper" and self._options.get("residual_length"):
            raise ValueError(
                f"protocol='paper' keeps no tail exact, residual_length={self._options['residual_length']} was given; "
                "leave it out, or use another protocol"
            )

    def _warn_where_unread(self) -> None:
        reading = self.reading
        if self._stock or not reading.tokens or reading.packed_share:
            return
        remedy = "use longer contexts"
        if self._strategy is not None:
            grid = self._grid
            remedy = (
                f"a block is packed when it stands before the newest {grid.residual} tokens, the residual_length; "
                "use a smaller one (0 keeps none exact), a strategy with smaller blocks, or longer contexts"
            )
            if grid.block and grid.block > 1:
                remedy = f"blocks have {grid.chunk} tokens, and {remedy}"
        warnings.warn(
            f"these scores are those of the exact model: none of the {reading.tokens} tokens read anything packed. "
            f"{remedy[0].upper()}{remedy[1:]}",
            stacklevel=3,
        )


register_model("cachequant")(CacheQuantLM)


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
