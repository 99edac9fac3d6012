"""What a cache costs in accuracy: perplexity, KL divergence to the exact model, top-1 agreement."""

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor


class TokenScores(NamedTuple):
    """One number per scored token, each of shape `[tokens]`."""

    loss: Tensor
    """Negative log-likelihood of the token that came next, in nats."""
    divergence: Tensor
    """KL(exact || measured) over the vocabulary, in nats."""
    agrees: Tensor
    """Whether both distributions have the same most likely token."""


class Accuracy(BaseModel):
    """The scores of all tokens, summed up."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    tokens: int
    perplexity: float
    kl_mean: float
    kl_p99: float
    top1: float
    """Share of tokens, 0 to 1, on whose most likely successor the measured and the exact model agree."""


def score_tokens(exact: Tensor, logits: Tensor, targets: Tensor) -> TokenScores:
    """Compare the measured `logits` with the log-probabilities `exact`, both `[tokens, vocabulary]`.

    targets: `[tokens]`, the ids that really came next.
    """
    measured = torch.log_softmax(logits.float(), -1)
    loss = -measured.gather(-1, targets[:, None]).squeeze(-1)
    # rounding may turn the divergence of equal distributions into a tiny negative number
    divergence = (exact.exp() * (exact - measured)).sum(-1).clamp_min(0)
    return TokenScores(loss, divergence, exact.argmax(-1) == measured.argmax(-1))


def summarize(scores: Iterable[TokenScores]) -> Accuracy:
    """Perplexity, mean and 99th percentile of the divergence, and agreement over all tokens.

    Raises:
        ValueError: there is no token, or a score is not finite.
    """
    parts = list(scores)
    if not sum(part.loss.numel() for part in parts):
        raise ValueError("no token was scored; use windows longer than their prefill")
    loss, divergence, agrees = (torch.cat(column).double() for column in zip(*parts, strict=True))
    if not (loss.isfinite().all() and divergence.isfinite().all()):
        bad = int((~(loss.isfinite() & divergence.isfinite())).sum())
        raise ValueError(f"{bad} of {loss.numel()} scored tokens have logits that are not finite")
    return Accuracy(
        tokens=loss.numel(),
        # beyond float range a perplexity says nothing more
        perplexity=math.exp(min(loss.mean().item(), 700.0)),
        kl_mean=divergence.mean().item(),
        kl_p99=divergence.quantile(0.99).item(),
        top1=agrees.mean().item(),
    )


def pareto_front(points: Sequence[tuple[float, float]]) -> list[bool]:
    """For each (cost, loss), smaller being better: whether no other is at least as good in both and better in one.

    Equal points do not exclude each other.
    """
    return [not any(cost <= c and loss <= e and (cost, loss) != (c, e) for cost, loss in points) for c, e in points]
