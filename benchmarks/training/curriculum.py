"""What the reference model is trained on: plain text, repeated random tokens, copied spans of text and pass keys.

Plain text alone teaches a model of this size no retrieval, so that no retrieval test could tell one cache from
another. Positions of the other kinds are stretched while sequences are short: a full context's distances are met before
full contexts are paid for.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from ..passkey import ANSWER_TOKENS, passkey_prompt
from .architecture import CONTEXT, VOCABULARY

ANSWER_WEIGHT = 0.04  # times the length, so that an answer counts alike in short and long sequences
STRETCHED = 0.5  # share of the sequences, other than text, whose positions have gaps


@dataclass(frozen=True)
class Stage:
    """What a training step is made of until `until`, as a share of the training time."""

    until: float
    length: int
    batch: int  # sequences per process
    tiled: float  # shares of the sequences; plain text is the rest
    copied: float
    passkey: float
    max_period: int


# Retrieval first and on short sequences, where it is cheap to learn; text and full contexts later.
STAGES = (
    Stage(0.172, 256, 12, tiled=0.45, copied=0.15, passkey=0.10, max_period=48),
    Stage(0.222, 256, 12, tiled=0.20, copied=0.15, passkey=0.10, max_period=128),
    Stage(0.371, 256, 12, tiled=0.50, copied=0.15, passkey=0.10, max_period=24),
    Stage(0.443, 256, 12, tiled=0.12, copied=0.15, passkey=0.12, max_period=128),
    Stage(0.581, 512, 8, tiled=0.10, copied=0.15, passkey=0.12, max_period=256),
    Stage(0.668, 1024, 4, tiled=0.08, copied=0.15, passkey=0.15, max_period=512),
    Stage(1.000, 2048, 2, tiled=0.04, copied=0.12, passkey=0.22, max_period=1024),
)


def stage_at(progress: float) -> Stage:
    """Return the stage at `progress`, the share of the training time that is over."""
    return next(stage for stage in STAGES if progress < stage.until or stage is STAGES[-1])


class Sampler:
    """Draws training sequences of every kind; what it draws depends on the given generator alone."""

    def __init__(self, tokenizer: Any, text: str):
        self.tokenizer = tokenizer
        self.ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
        self.first_ordinary = max(tokenizer.bos_token_id, tokenizer.eos_token_id) + 1

    def batch(self, stage: Stage, rng: random.Random) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return ids [batch, length + 1], weights of the targets [batch, length] and positions [batch, length]."""
        rows = [self._row(stage, rng) for _ in range(stage.batch)]
        ids, weights, positions = zip(*rows, strict=True)
        return torch.tensor(ids), torch.tensor(weights), torch.tensor(positions)

    def _row(self, stage: Stage, rng: random.Random) -> tuple[list[int], list[float], list[int]]:
        length = stage.length
        kinds: tuple[Callable[..., tuple[list[int], list[float]]], ...]
        kinds = (self._tiled, self._copied, self._passkey, self._text)
        shares = (stage.tiled, stage.copied, stage.passkey, 1 - stage.tiled - stage.copied - stage.passkey)
        kind = rng.choices(kinds, shares)[0]
        ids, weights = kind(stage, rng)
        stretch = kind != self._text and length < CONTEXT and rng.random() < STRETCHED
        return ids, weights, stretched_positions(length, rng) if stretch else list(range(length))

    def _text(self, stage: Stage, rng: random.Random) -> tuple[list[int], list[float]]:
        start = rng.randrange(len(self.ids) - stage.length)
        return [self.tokenizer.bos_token_id, *self.ids[start : start + stage.length]], [1.0] * stage.length

    def _tiled(self, stage: Stage, rng: random.Random) -> tuple[list[int], list[float]]:
        """Random tokens repeated with one period; the first period cannot be predicted and is not scored."""
        period = rng.randint(8, min(stage.max_period, stage.length // 2))
        # drawn from the text, tokens are frequent ones, and copying them is of use there too
        source = self.ids if rng.random() < 0.5 else range(self.first_ordinary, VOCABULARY)
        tile = rng.choices(source, k=period)
        ids = (tile * (stage.length // period + 1))[: stage.length]
        return [self.tokenizer.bos_token_id, *ids], [0.0] * period + [1.0] * (stage.length - period)

    def _copied(self, stage: Stage, rng: random.Random) -> tuple[list[int], list[float]]:
        """Text in which some spans come a second time at a later place."""
        ids, weights = self._text(stage, rng)
        for _ in range(max(1, stage.length // 256)):
            span = rng.randint(16, 64)
            source = rng.randint(1, stage.length - 2 * span)
            target = rng.randint(source + span, stage.length - span)
            ids[target : target + span] = ids[source : source + span]
        return ids, weights

    def _passkey(self, stage: Stage, rng: random.Random) -> tuple[list[int], list[float]]:
        """A pass key hidden in text, asked for and answered in the last tokens."""
        # more often far back, where it is harder to find
        depth = rng.random() ** 2
        prompt = passkey_prompt(self.tokenizer, self.ids, stage.length + 1, depth, rng)
        answer = self.tokenizer(f" {prompt.key}", add_special_tokens=False).input_ids
        weights = [1.0] * (stage.length - ANSWER_TOKENS) + [ANSWER_WEIGHT * stage.length] * ANSWER_TOKENS
        return prompt.ids + answer, weights


def stretched_positions(length: int, rng: random.Random) -> list[int]:
    """Return `length` positions below CONTEXT that rise by one but for a few gaps: far apart in a short sequence."""
    gaps = rng.randint(1, 4)
    cuts = {rng.randrange(1, length): rng.randint(0, (CONTEXT - length) // gaps) for _ in range(gaps)}
    positions, shift = [], 0
    for i in range(length):
        shift += cuts.get(i, 0)
        positions.append(i + shift)
    return positions
