"""Context-then-decode: contexts are prefilled, endings are scored by what the cache holds then.

The prefill attends exactly and is not scored. What predicts an ending is fed after it, so every scored logit was
computed by attention that read the cache.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, QuantizedCache

from ...core import detach
from ..contenders import Contender
from ..metrics import score_tokens
from ..streaming import KEPT_BYTES
from .reading import fresh_cache, packed_share, rows_at_once, steps


@dataclass(frozen=True)
class Item:
    """Token ids of a context and of what may follow it."""

    context: tuple[int, ...]
    endings: tuple[tuple[int, ...], ...]
    after: int = 1
    """Newest tokens of the context that are fed after the prefill; the last of them predicts the endings."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """Items of one shape can share a batch."""
        return len(self.context), self.after, len(self.endings)


class EndingScore(NamedTuple):
    """How one ending fared."""

    loss: float
    """Negative log-likelihood of all its tokens, in nats."""
    divergence: float
    """KL(exact || measured) per token, in nats."""
    recall: float
    """Share of its tokens that were the likeliest."""
    tokens: int


class Scored(NamedTuple):
    """What one contender made of all items."""

    endings: list[list[EndingScore]]
    packed: float
    """See `reading.PACKED`; mean over items, after their prefill."""


class EndingRun:
    """The unquantized model's predictions for `items`, to which caches are compared.

    batch_size: items per pass.
    """

    def __init__(self, model: Any, items: Sequence[Item], batch_size: int) -> None:
        detach(model)  # in the eyes of transformers alone
        self._model, self._items, self._batch_size = model, items, batch_size
        self._kept: list[list[Tensor]] | None = None
        vocabulary = model.config.get_text_config(decoder=True).vocab_size
        tokens = sum(len(ending) for item in items for ending in item.endings)
        if 4 * vocabulary * tokens <= KEPT_BYTES:
            self._kept = list(self._fresh())
        self.exact: list[list[EndingScore]] = [
            _scores(item, found, found) for item, found in zip(items, self._passes(), strict=True)
        ]
        """Scores of the unquantized model itself."""

    @property
    def first(self) -> tuple[int, ...]:
        """Token ids of the first item that are prefilled; its context, where none are."""
        item = self._items[0]
        return item.context[: len(item.context) - item.after] or item.context

    def score(self, contender: Contender) -> Scored:
        """Decode the same items through a contender's caches.

        Raises:
            ValueError: logits are not finite.
        """
        found, shares = [], []
        exact = self._passes()
        for batch in _batched(self._items, rows_at_once(contender, self._batch_size)):
            cache = fresh_cache(contender)
            measured = _decoded(self._model, batch, cache, lambda cache: shares.append(packed_share(cache)))
            found += [_scores(item, next(exact), logits) for item, logits in zip(batch, measured, strict=True)]
        return Scored(found, sum(shares) / len(shares))

    def _passes(self) -> Iterator[list[Tensor]]:
        return iter(self._fresh() if self._kept is None else self._kept)

    def _fresh(self) -> Iterator[list[Tensor]]:
        """Log-probabilities `[tokens, vocabulary]`, float32, of each ending, item by item."""
        for batch in _batched(self._items, self._batch_size):
            for logits in _decoded(self._model, batch, DynamicCache(config=self._model.config)):
                yield [torch.log_softmax(each.float(), -1) for each in logits]


def _batched(items: Sequence[Item], size: int) -> Iterator[list[Item]]:
    """All items in their order, neighbours of one shape together."""
    batch: list[Item] = []
    for item in items:
        if batch and (item.shape != batch[0].shape or len(batch) == size):
            yield batch
            batch = []
        batch.append(item)
    if batch:
        yield batch


@torch.inference_mode()
def _decoded(
    model: Any, batch: list[Item], cache: Cache, prefilled: Callable[[Cache], None] = lambda cache: None
) -> list[list[Tensor]]:
    """Logits `[tokens, vocabulary]` that predict each ending of each item, through the empty `cache`.

    prefilled: called with the cache when it holds the contexts.
    """
    length, after, endings = batch[0].shape
    start = length - after
    contexts = torch.tensor([item.context[:start] for item in batch], device=model.device)
    # what transformers has quantized it cannot repeat
    repeats_later = not isinstance(cache, QuantizedCache)
    if start:
        ids = contexts if repeats_later else contexts.repeat_interleave(endings, 0)
        model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
    prefilled(cache)
    if endings > 1 and repeats_later:
        cache.batch_repeat_interleave(endings)
    rows = [(*item.context[start:], *ending[:-1]) for item in batch for ending in item.endings]
    # padding follows what is scored, which does not see it
    fed = torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True).to(model.device)
    passes = [
        model(fed[:, step.start - start : step.stop - start], past_key_values=cache, use_cache=True).logits
        for step in steps(cache, start, start + fed.shape[1])
    ]
    logits = iter(torch.cat(passes, 1)[:, after - 1 :])
    return [[next(logits)[: len(ending)] for ending in item.endings] for item in batch]


def _scores(item: Item, exact: list[Tensor], logits: list[Tensor]) -> list[EndingScore]:
    found = []
    for ending, expected, measured in zip(item.endings, exact, logits, strict=True):
        targets = torch.tensor(ending, device=measured.device)
        scores = score_tokens(expected, measured, targets)
        if not (scores.loss.isfinite().all() and scores.divergence.isfinite().all()):
            raise ValueError("the model's logits are not finite after reading this cache")
        found.append(
            EndingScore(
                loss=scores.loss.double().sum().item(),
                divergence=scores.divergence.double().mean().item(),
                recall=(measured.argmax(-1) == targets).double().mean().item(),
                tokens=len(ending),
            )
        )
    return found
