"""Keeping a share of the tokens, for strategies that drop the others."""

import torch
from torch import Tensor

from ..kernels.format import Side
from .adaptive import Evidence


def share(part: float, tokens: Tensor) -> Tensor:
    """`part` of a number of tokens, rounded up."""
    return (part * tokens.double() - 1e-6).ceil().long()


def keep_best(evidence: Evidence, score: Tensor | None, keep: float, recent: Tensor) -> dict[Side, Tensor]:
    """Widths by side that keep the share `keep` of the real tokens so far: the newest, and then the best.

    score: `[batch, kv_heads, n]`; of equal ones the newer stays. None, as no attention was seen: nothing is dropped.
    recent: how many of the newest stay in any case, `[batch]`.

    The exact tail is part of the budget and of the newest. The tokens before it get what it leaves, but at least half
    their share, `keep / 2` of them: what is dropped while the text is short would be missing when it is long.
    """
    held = evidence.widths["key"] > 0
    arriving = evidence.real.shape[1] - held.shape[2]
    held = torch.nn.functional.pad(held, (0, arriving), value=True) & evidence.real[:, None]
    if score is not None:
        older = evidence.real.sum(-1)
        tail = evidence.seen - older
        room = torch.maximum(share(keep, evidence.seen) - tail, share(keep / 2, older))
        age = tail[:, None] + evidence.real.flip(-1).cumsum(-1).flip(-1)
        newest = (age <= recent[:, None])[:, None]
        score = score.masked_fill(newest, torch.inf).masked_fill(~held, -torch.inf)
        # flipped, so that the stable order of equal scores is newest first
        order = score.flip(-1).argsort(dim=-1, descending=True, stable=True)
        rank = order.argsort(dim=-1).flip(-1)
        held &= newest | (rank < room[:, None, None])
    widths = held.to(torch.uint8) * 16
    return {"key": widths, "value": widths}
