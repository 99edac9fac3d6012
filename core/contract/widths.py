"""Checks of strategies that give every token a width of its own."""

import copy

import torch

from ...kernels.format import Side, row_bits
from ..adaptive import AdaptiveStrategy
from ..protocol import CacheQuantizer
from .check import contract_check, require
from .evidence import evidence_for
from .kinds import decides_widths
from .layers import LAYER, layer_of
from .material import same


@contract_check(decides_widths)
def check_widths_are_those_of_the_formats(strategy: CacheQuantizer) -> None:
    """Every token gets a width that there is, whatever is known of it: attention or none, ranges or none, one token."""
    assert isinstance(strategy, AdaptiveStrategy)
    for what, evidence in evidence_for(strategy):
        for side, widths in strategy.widths(layer_of(strategy), evidence).items():
            shapes = [(2, heads, evidence.tokens) for heads in (1, LAYER.kv_heads)]
            require(
                widths.dtype == torch.uint8 and tuple(widths.shape) in shapes,
                f"{side} widths of {what} to be uint8 of shape {shapes[-1]}, got {widths.dtype} {tuple(widths.shape)}",
            )
            found = set(widths.unique().tolist())
            allowed = _allowed(strategy, side)
            require(found <= allowed, f"{side} widths of {what} among {sorted(allowed)}, got {sorted(found)}")


@contract_check(decides_widths)
def check_deciding_changes_nothing_and_is_deterministic(strategy: CacheQuantizer) -> None:
    """Asked twice about the same evidence, a strategy gives the same widths, and leaves the evidence as it was."""
    assert isinstance(strategy, AdaptiveStrategy)
    layer = layer_of(strategy)
    for what, evidence in evidence_for(strategy):
        before = copy.deepcopy(evidence)
        first, second = (strategy.widths(layer, evidence) for _ in range(2))
        require(same(first, second), f"the widths of {what} to be the same when asked twice")
        for name in ("low", "high", "widths", "measured"):
            require(same(getattr(before, name), getattr(evidence, name)), f"{name} of {what} unchanged")
        if before.attention is not None and evidence.attention is not None:
            require(torch.equal(before.attention, evidence.attention), f"attention of {what} unchanged")


@contract_check(decides_widths)
def check_widths_of_a_batch_row_are_its_own(strategy: CacheQuantizer) -> None:
    """What is known of one batch row does not move the widths of another."""
    assert isinstance(strategy, AdaptiveStrategy)
    layer = layer_of(strategy)
    evidence = dict(evidence_for(strategy))["a prompt"]
    other = copy.deepcopy(evidence)
    for tensors in (other.low, other.high, other.measured):
        for tensor in tensors.values():
            tensor[1] *= 5
    if other.attention is not None:
        other.attention[1] = other.attention[1].flip(-1)
    pair = [{side: w[:1] for side, w in strategy.widths(layer, each).items()} for each in (evidence, other)]
    require(same(*pair), "the widths of batch row 0 not to depend on row 1")


def _allowed(strategy: AdaptiveStrategy, side: Side) -> set[int]:
    formats = strategy.formats(layer_of(strategy))
    assert formats is not None
    return {row_bits(fmt) for fmt in getattr(formats, side)} | ({0} if formats.drops else set())
