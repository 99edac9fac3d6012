"""What strategies are asked to decide widths by."""

from dataclasses import replace

import torch
from torch import Tensor

from ...kernels.format import Side
from ..adaptive import AdaptiveStrategy, Evidence
from .layers import LAYER, layer_of
from .material import SIDES


def evidence_for(strategy: AdaptiveStrategy) -> list[tuple[str, Evidence]]:
    """What a cache may know of two batch rows when it asks for widths, and what to call it."""
    generator = torch.Generator().manual_seed(11)
    known = []
    for what, tokens, packed in (("a single token", 1, 0), ("a prompt", 90, 0), ("decoding", 120, 90)):
        known.append((what, _known(strategy, tokens, packed, generator)))
    prompt = known[1][1]
    flat: dict[Side, Tensor] = {side: torch.zeros_like(low) for side, low in prompt.low.items()}
    known.append(("unseen tokens", replace(prompt, attention=None)))
    known.append(("tokens without a range", replace(prompt, low=flat, high=flat)))
    return known


def _known(strategy: AdaptiveStrategy, tokens: int, packed: int, generator: torch.Generator) -> Evidence:
    layer = layer_of(strategy)
    formats = strategy.formats(layer)
    assert formats is not None
    heads = LAYER.kv_heads if formats.heads == "apart" else 1
    real = torch.ones(2, tokens, dtype=torch.bool)
    real[1, : tokens // 4] = False
    span: dict[Side, Tensor] = {side: torch.rand(2, heads, tokens, generator=generator) * 6 + 0.1 for side in SIDES}
    attention = (
        torch.rand(2, LAYER.kv_heads, 1, 7, tokens, generator=generator)
        .pow(8)
        .masked_fill(~real[:, None, None, None], 0)
    )
    seen = strategy.attention_window
    rows = None if seen == 0 else strategy.notice(attention / attention.sum(-1, keepdim=True).clamp(min=1e-9))
    if rows is not None:
        rows = rows.sum(2, keepdim=True) if seen is None else rows[:, :, -seen:]
    states: dict[Side, Tensor] = {
        side: torch.randn(2, LAYER.kv_heads, tokens, LAYER.head_dim, generator=generator) for side in SIDES
    }
    queries = strategy.notice_query(layer, torch.randn(2, LAYER.kv_heads, 2, 7, LAYER.head_dim, generator=generator))
    evidence = Evidence(
        tokens=tokens,
        seen=real.sum(-1),
        newer=0,
        real=real,
        attention=rows,
        low={side: -width / 2 for side, width in span.items()},
        high={side: width / 2 for side, width in span.items()},
        widths={side: torch.zeros(2, heads, 0, dtype=torch.uint8) for side in SIDES},
        measured=strategy.measure(layer, queries, states, real),
    )
    if strategy.together:
        evidence = strategy.merge([evidence, evidence])
    if packed:
        held = {side: widths[:, :, :packed] for side, widths in strategy.widths(layer, evidence).items()}
        evidence = replace(evidence, widths=held)
    return evidence
