"""The streaming protocol: text continued chunk by chunk through the cache under test.

A single forward pass over a text reads nothing that was quantized, so it measures nothing. Here every window begins
with a prefill that is not scored; every logit scored afterwards was computed by attention that read the packed cache.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor

from .metrics import Accuracy, TokenScores, score_tokens, summarize

# Blocks that formats may have, in tokens. The prefill takes one of the largest, so that something is packed whatever
# the strategy; further passes take one of the smallest.
SMALLEST_BLOCK, LARGEST_BLOCK = 32, 256

# Above this the exact log-probabilities are computed anew for each strategy instead of being kept.
KEPT_BYTES = 2 * 2**30


class Protocol(BaseModel):
    """How much text is read, and in which steps."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    windows: int = Field(6, ge=1, description="Independent stretches of text, evaluated as one batch.")
    length: int = Field(1056, ge=2, description="Tokens fed per window, the first being BOS where the model has one.")
    prefill: int = Field(288, ge=1, description="Tokens of the first forward pass; not scored.")
    chunk: int = Field(32, ge=1, description="Tokens of each further forward pass; all scored.")
    residual_length: int = Field(32, ge=0, description="Newest tokens that the cache keeps exact.")

    @model_validator(mode="after")
    def _something_is_scored(self) -> "Protocol":
        if self.length <= self.prefill:
            raise ValueError(
                f"window length {self.length} leaves nothing to score after a prefill of {self.prefill} tokens; "
                f"use at least {self.prefill + self.chunk}"
            )
        return self

    @classmethod
    def fitting(
        cls, context: int, windows: int = 6, length: int | None = None, residual_length: int = 32
    ) -> "Protocol":
        """The default protocol in a model that takes `context` tokens.

        A pass reads packed what was packed before it. All passes end where blocks of the smallest size end, beyond the
        residual, so each token finds packed exactly what it would find when decoded alone, whatever the block.

        Raises:
            ValueError: the model's context, or the length asked for, is too short.
        """
        prefill = residual_length + LARGEST_BLOCK
        if length is None:
            length = residual_length + min(1024, (context - residual_length) // 128 * 128)
        if length > context:
            raise ValueError(f"window length {length} is beyond the model's context; use at most {context}")
        if length <= prefill:
            raise ValueError(
                f"window length {length} (the model's context is {context}) leaves nothing to score: "
                f"{LARGEST_BLOCK} tokens are packed and {residual_length} kept exact before the first scored token; "
                f"use a longer window or a smaller residual length"
            )
        return cls(
            windows=windows, length=length, prefill=prefill, chunk=SMALLEST_BLOCK, residual_length=residual_length
        )

    @property
    def scored(self) -> int:
        """Tokens scored over all windows."""
        return self.windows * (self.length - self.prefill)

    @property
    def steps(self) -> list[slice]:
        """Token ranges of the scored passes."""
        return [
            slice(start, min(start + self.chunk, self.length)) for start in range(self.prefill, self.length, self.chunk)
        ]


def cut_windows(ids: Sequence[int], protocol: Protocol, bos: int | None) -> Tensor:
    """Token ids `[windows, length + 1]`, spread evenly over the text without overlap; the last id is only a target.

    Raises:
        ValueError: the text is too short.
    """
    taken = protocol.length + (bos is None)
    needed = protocol.windows * taken
    if len(ids) < needed:
        fitting = len(ids) // taken
        remedy = f"use at most {fitting} windows of this length" if fitting else "use a longer text or shorter windows"
        raise ValueError(
            f"the text has {len(ids)} tokens, {protocol.windows} windows of {protocol.length} need {needed}; {remedy}"
        )
    starts = [i * (len(ids) - taken) // max(1, protocol.windows - 1) for i in range(protocol.windows)]
    start_ids = [] if bos is None else [bos]
    return torch.tensor([[*start_ids, *ids[start : start + taken]] for start in starts])


@torch.inference_mode()
def stream(model: Any, windows: Tensor, protocol: Protocol, cache: Any) -> Iterator[Tensor]:
    """Logits `[windows, tokens, vocabulary]` of each scored pass, the context held by the (empty) `cache`."""
    ids = windows.to(model.device)
    model(ids[:, : protocol.prefill], past_key_values=cache, use_cache=True, logits_to_keep=1)
    for step in protocol.steps:
        yield model(ids[:, step], past_key_values=cache, use_cache=True).logits


class ExactRun:
    """The unquantized model's log-probabilities on `windows`, to which caches are compared.

    make_cache: returns an empty cache that keeps everything exact, transformers' `DynamicCache`.
    """

    def __init__(self, model: Any, windows: Tensor, protocol: Protocol, make_cache: Callable[[], Any]) -> None:
        self.windows = windows
        self.protocol = protocol
        self._fresh = lambda: stream(model, windows, protocol, make_cache())
        vocabulary = model.config.get_text_config().vocab_size
        self._kept: list[Tensor] | None = None
        if 4 * vocabulary * protocol.scored <= KEPT_BYTES:
            self._kept = [_log_probabilities(logits) for logits in self._fresh()]

    def passes(self) -> Iterator[Tensor]:
        """Log-probabilities `[windows, tokens, vocabulary]`, float32, of each scored pass."""
        if self._kept is not None:
            yield from self._kept
        else:
            yield from map(_log_probabilities, self._fresh())

    def compare(self, model: Any, cache: Any) -> Accuracy:
        """Stream the same windows through `cache`; its memory stays held for the caller to read.

        Raises:
            ValueError: the model's logits are not finite.
        """
        return summarize(score for window in self.score(model, cache) for score in window)

    @torch.inference_mode()
    def score(self, model: Any, cache: Any) -> list[list[TokenScores]]:
        """As `compare`, the scores of each window apart, pass by pass."""
        measured = stream(model, self.windows, self.protocol, cache)
        scores: list[list[TokenScores]] = [[] for _ in self.windows]
        for step, exact, logits in zip(self.protocol.steps, self.passes(), measured, strict=True):
            targets = self.windows[:, step.start + 1 : step.stop + 1].to(logits.device)
            # window by window, so that no second copy of a whole pass is ever held
            for window, row in zip(scores, zip(exact, logits, targets, strict=True), strict=True):
                window.append(score_tokens(*row))
        return scores


def _log_probabilities(logits: Tensor) -> Tensor:
    return torch.log_softmax(logits.float(), -1)
