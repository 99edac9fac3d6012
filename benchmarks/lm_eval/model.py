"""A model class of lm-evaluation-harness whose scores are computed from the packed cache.

The harness's own class scores a continuation in one forward over context and continuation, which attends to what it
has just computed: a quantized cache given to it is never read. Here every scored token, and every generated one, is
computed by attention over what the cache holds, or over what a simulation holds in its place.
"""

import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import Cache, PreTrainedModel

from ... import registry
from ...core import CacheQuantizer, PackedCache
from .batches import Row, batched
from .cached_model import CachedModel, Source
from .harness import require_harness
from .reading import Meter, Protocol, Reading

require_harness()

from lm_eval.api.instance import Instance  # noqa: E402 (said in our words first that it is missing)
from lm_eval.api.registry import register_model  # noqa: E402
from lm_eval.models.huggingface import HFLM  # noqa: E402

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

    Raises ValueError for arguments that do not go together and for tokenizers with neither bos_token nor eos_token, and
    what `registry.parse` and `PackedCache` raise.
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
        strategy = registry.parse(strategy) if isinstance(strategy, str) else strategy
        source = Source(strategy, cache, protocol, residual_length, sink_tokens, skip_layers)
        rows = str(batch_size or 1)
        if not rows.isdigit() or int(rows) < 1:
            raise ValueError(
                f"batch_size={batch_size!r}: what fits depends on what the cache packs, so it is not searched; "
                "give a number, such as 8"
            )
        given, prefixed = arguments.get("tokenizer"), arguments.get("prefix_token_id") is not None
        if given is not None and not isinstance(given, str):
            _require_start(given, prefixed)  # before the harness adds a padding token to it
        super().__init__(pretrained, batch_size=int(rows), **arguments)
        _require_start(self.tokenizer, prefixed)
        if self.backend != "causal":
            raise ValueError(f"{type(self.model).__name__} is no decoder-only model, and its cache cannot be packed")
        self._cached = CachedModel(self.model, source, self.softmax_dtype, self.mixed_precision_dtype)

    @property
    def reading(self) -> Reading:
        """What was read of the cache by all that was evaluated since this was made, or since `forget_reading`."""
        return self._cached.meter.read(self._cached.source.protocol)

    def forget_reading(self) -> None:
        """Begin to count anew."""
        self._cached.meter = Meter(self.model)

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
        """See the harness. Raises ValueError where the tokenizer has no eos_token, at which generation ends."""
        if self.tokenizer.eos_token_id is None:
            raise ValueError(
                "the tokenizer has no eos_token, at which generated text ends; set one that the model knows, such as "
                "tokenizer.eos_token = tokenizer.bos_token"
            )
        alike: dict[int, list[int]] = defaultdict(list)
        for i, request in enumerate(requests):
            # what cannot share a batch in the end should not be collated into one
            alike[self._cached.phase(len(self.tok_encode(request.args[0])))].append(i)
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
            for batch in batched(rows, self.batch_size, self._cached.scoring_grid):
                for row, answer in zip(batch, self._cached.scores(batch), strict=True):
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
            alike[i if self._cached.grid.alone else self._cached.phase(length)].append(i)
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
        cache = self._cached.new_cache()
        starts = ids.shape[1] - mask.sum(-1).cpu()
        if ids.shape[1] > 1:
            # generate would take the first token from its own prefill, which reads nothing packed
            positions = (mask.cumsum(-1) - 1).clamp(min=0)
            self._cached.forward(ids[:, :-1], cache, starts, positions[:, :-1], keep=1)
        beams = arguments.get("num_beams") or 1
        if beams > 1:
            cache.batch_repeat_interleave(beams)
        with self._cached.metered(starts.repeat_interleave(beams)):
            texts = super()._model_generate(ids, attention_mask=mask, past_key_values=cache, **arguments)
        self._cached.meter.weigh(cache, len(starts) * beams)
        return texts

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

    def _warn_where_unread(self) -> None:
        reading = self.reading
        if self._cached.stock or not reading.tokens or reading.packed_share:
            return
        cache, grid, remedy = self._cached.new_cache(), self._cached.grid, "use longer contexts"
        if isinstance(cache, PackedCache):
            exact = cache.options.residual_length
            remedy = (
                f"the newest {exact} tokens, the residual_length, stay exact; use a smaller one, or longer contexts"
            )
            if grid.block and grid.block > 1:
                remedy = f"tokens are packed {grid.chunk} at a time, and {remedy}, or a strategy with smaller blocks"
        warnings.warn(
            f"these scores are those of the exact model: none of the {reading.tokens} tokens read anything packed. "
            f"{remedy[0].upper()}{remedy[1:]}",
            stacklevel=3,
        )


def _require_start(tokenizer: Any, prefixed: bool) -> None:
    """Raise ValueError unless there is a token to begin texts with. prefixed: whether one was given."""
    tokens = (getattr(tokenizer, name, None) for name in ("bos_token_id", "eos_token_id"))
    if not prefixed and all(token is None for token in tokens):
        raise ValueError(
            "the tokenizer has neither bos_token nor eos_token, and the harness begins texts with one of them; set "
            "tokenizer.bos_token or tokenizer.eos_token to a token that the model knows, or give prefix_token_id"
        )


register_model("cachequant")(CacheQuantLM)
