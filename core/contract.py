"""What every strategy must satisfy, as plain functions a plugin author can run.

In a test file of your own::

    @pytest.mark.parametrize("check", contract.CHECKS, ids=lambda check: check.__name__)
    def test_contract(check):
        check(MyStrategy())

or all at once: `contract.check_strategy(MyStrategy())`. A failed check raises `ContractError` with the strategy, the
check and what was expected. Strategies that have to be calibrated come as they are: the checks calibrate them.
"""

import copy
import itertools
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from pydantic import ValidationError
from torch import Tensor

from ..kernels import quantize
from ..kernels.format import Format, LayerFormat, MixedFormat, Side, row_bits
from ..kernels.quantize import Tables
from ..kernels.rotation import hadamard_rotate
from .adaptive import AdaptiveStrategy, Evidence
from .calibration import CalibratedStrategy, Calibration, Statistics
from .calibration.statistics import Density, Extremes
from .protocol import CacheQuantizer, LayerSpec, Strategy

if TYPE_CHECKING:
    from .hf.cache import PackedCache

VERSION = 1

LAYER = LayerSpec(index=0, layers=2, kv_heads=2, head_dim=64, value_dim=64)
SIDES: tuple[Side, Side] = ("key", "value")
OPTIONS: dict[str, Any] = {"residual_length": 16, "sink_tokens": 2}


class ContractError(AssertionError):
    """A strategy does not do what `CacheQuantizer` asks."""


def check_strategy(strategy: CacheQuantizer) -> None:
    """Run every check; raises ContractError at the first that fails."""
    for check in CHECKS:
        check(strategy)


# ---- configuration -------------------------------------------------------------------------------------------------


def check_settings_are_frozen_strict_and_round_trip(strategy: CacheQuantizer) -> None:
    """Fields cannot be assigned, unknown fields are refused, and the dumped settings build an equal strategy."""
    if not isinstance(strategy, Strategy):
        return  # a protocol implementation of another kind has no pydantic settings
    cls = type(strategy)
    for each in (strategy, _for_model(strategy)):
        _require(cls.model_validate(each.model_dump()) == each, each, "model_validate(model_dump()) to be equal")
        _require(hash(each) == hash(copy.deepcopy(each)), each, "equal strategies to hash alike")
    try:
        cls.model_validate({**strategy.model_dump(), "no_such_field": 1})
    except ValidationError:
        pass
    else:
        raise _failure(strategy, "an unknown field to be refused (ConfigDict(extra='forbid'))")
    for field in cls.model_fields:
        try:
            setattr(strategy, field, getattr(strategy, field))
        except ValidationError:
            continue
        raise _failure(strategy, f"field {field!r} to be frozen (ConfigDict(frozen=True))")


def check_formats_depend_on_the_layer_alone(strategy: CacheQuantizer) -> None:
    """Asked twice about one layer, a strategy answers the same: its formats, or None to keep the layer exact."""
    first, second = strategy.formats(LAYER), strategy.formats(LAYER)
    kind = MixedFormat if isinstance(strategy, AdaptiveStrategy) else LayerFormat
    _require(
        first is None or isinstance(first, kind), strategy, f"formats() to return a {kind.__name__}, got {first!r}"
    )
    _require(first == second, strategy, "formats() to give the same answer twice")
    _require(_for_model(strategy).formats(LAYER) == first, strategy, "a calibration not to change formats()")


def check_missing_and_foreign_calibrations_are_refused(strategy: CacheQuantizer) -> None:
    """A strategy that needs a calibration says so, and how to get one; another model's it does not use."""
    if not isinstance(strategy, CalibratedStrategy) or not strategy.needs_statistics():
        return
    model = _model()
    _require_refusal(strategy.with_calibration(None), model, "calibrate", "an uncalibrated strategy")
    if strategy.calibration == "prompt":
        return  # fits every model
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.5)
    ready = _for_model(strategy)
    ready.require_model(model)
    _require_refusal(ready, other, "another model", "a strategy calibrated for other weights")


# ---- encode and decode ---------------------------------------------------------------------------------------------


def check_encoding_returns_whole_blocks(strategy: CacheQuantizer) -> None:
    """Every tensor of an encoding has batch, heads and blocks in front."""
    for side, formats in _sides(strategy):
        packed = _encode(strategy, side, _states(formats, blocks=3))
        _require(len(packed) > 0, strategy, f"encode({side}) to return at least one tensor")
        for name, tensor in packed.items():
            expected = (2, LAYER.kv_heads, 3)
            _require(
                tuple(tensor.shape[:3]) == expected,
                strategy,
                f"encode({side})[{name!r}] to begin with [batch, heads, blocks] {expected}, got {tuple(tensor.shape)}",
            )


def check_encoding_leaves_its_input_unchanged(strategy: CacheQuantizer) -> None:
    """encode() does not write to the states it is given."""
    for side, formats in _sides(strategy):
        states = _states(formats)
        before = states.clone()
        _encode(strategy, side, states)
        _require(torch.equal(states, before), strategy, f"encode({side}) not to change its input")


def check_encoding_is_deterministic(strategy: CacheQuantizer) -> None:
    """The same states give the same bytes."""
    for side, formats in _sides(strategy):
        first, second = (_encode(strategy, side, _states(formats)) for _ in range(2))
        _require(_same(first, second), strategy, f"encode({side}) of equal states to be equal")


def check_blocks_are_encoded_independently(strategy: CacheQuantizer) -> None:
    """Encoding a prefix gives the prefix of the encoding: the cache appends and crops block by block."""
    for side, formats in _sides(strategy):
        states = _states(formats, blocks=3)
        whole = _encode(strategy, side, states)
        prefix = _encode(strategy, side, states[:, :, : 2 * formats.block])
        cut = {name: tensor[:, :, :2] for name, tensor in whole.items()}
        _require(_same(prefix, cut), strategy, f"encode({side}) of two blocks to equal the first two of three")


def check_batch_rows_and_heads_are_independent(strategy: CacheQuantizer) -> None:
    """Changing one row and one head leaves the bytes of the others alone; batches are reordered row by row."""
    for side, formats in _sides(strategy):
        states = _states(formats)
        other = states.clone()
        other[1] *= 7
        same_row = [{n: t[:1] for n, t in _encode(strategy, side, s).items()} for s in (states, other)]
        _require(_same(*same_row), strategy, f"encode({side}) of batch row 0 not to depend on row 1")
        other = states.clone()
        other[:, 1] *= 7
        same_head = [{n: t[:, :1] for n, t in _encode(strategy, side, s).items()} for s in (states, other)]
        _require(_same(*same_head), strategy, f"encode({side}) of head 0 not to depend on head 1")


def check_decoding_gives_back_shape_and_most_of_the_signal(strategy: CacheQuantizer) -> None:
    """What is decoded has the shape that was encoded and is closer to it than zeros would be."""
    for side, formats in _sides(strategy):
        states = _states(formats)
        decoded = _decode(strategy, side, _encode(strategy, side, states), formats)
        _require(
            decoded.shape == states.shape, strategy, f"decoded {side}s of shape {states.shape}, got {decoded.shape}"
        )
        error = (decoded - states).square().mean() / states.square().mean()
        _require(bool(error < 1), strategy, f"decoded {side}s closer to the states than zeros, relative error {error}")


def check_constant_and_zero_states_decode_finite(strategy: CacheQuantizer) -> None:
    """Vectors without a range neither divide by zero nor drift.

    A grid made for them gives them back within 2 %. A static grid was made for other states: what lies on it comes
    back within its widest step, what lies beyond it as its end or, from an outlier slot, as it was.
    """
    for side, formats in _sides(strategy):
        for constant in (0.0, 1.5, -3.0):
            states = torch.full_like(_states(formats), constant)
            decoded = _decode(strategy, side, _encode(strategy, side, states), formats)
            _require(
                bool(decoded.isfinite().all()), strategy, f"constant {side}s {constant} to decode to finite numbers"
            )
            fmt: Format = getattr(formats, side)
            if fmt.packed and fmt.scale == "static":
                worst = _off_the_grid(decoded, states, fmt, _tables(strategy, side, _states(formats)))
                _require(worst <= 1.01, strategy, f"constant {side}s {constant} within a step, off by {worst} steps")
            else:
                worst = float((decoded - states).abs().max())
                _require(
                    worst <= 0.02 * abs(constant), strategy, f"constant {side}s {constant} within 2 %, off by {worst}"
                )


def check_padding_does_not_disturb_real_tokens(strategy: CacheQuantizer) -> None:
    """Enormous values in tokens marked invalid coarsen neither the grid of the valid ones nor a fit to them."""
    for side, formats in _sides(strategy):
        states = _states(formats)
        valid = torch.ones(states.shape[0], states.shape[2], dtype=torch.bool)
        valid[:, :5] = False
        real = valid[:, None, :, None]
        clean = _error(strategy, side, states, formats, real)
        loud = _error(strategy, side, torch.where(real, states, torch.full_like(states, 1e4)), formats, real)
        _require(loud <= 1.5 * clean + 1e-6, strategy, f"padding not to raise the error of {side}s: {clean} to {loud}")


def check_bytes_match_the_formula(strategy: CacheQuantizer) -> None:
    """Packed states are smaller than what came in, and exactly as large as their format says."""
    for side, formats in _sides(strategy):
        fmt = getattr(formats, side)
        states = _states(formats).half()
        packed = _encode(strategy, side, states)
        held = sum(tensor.numel() * tensor.element_size() for tensor in packed.values())
        if fmt.codes == "exact":
            continue
        _require(held < states.numel() * 2, strategy, f"packed {side}s to take fewer bytes than float16, got {held}")
        if fmt.packed:
            blocks = states.shape[0] * states.shape[1] * states.shape[2] // formats.block
            stated = blocks * sum(fmt.block_bytes(side, states.shape[3], formats.block, 2).values())
            _require(held == stated, strategy, f"packed {side}s to take the {stated} bytes of the formula, got {held}")


# ---- widths --------------------------------------------------------------------------------------------------------


def check_widths_are_those_of_the_formats(strategy: CacheQuantizer) -> None:
    """Every token gets a width that there is, whatever is known of it: attention or none, ranges or none, one token."""
    if not isinstance(strategy, AdaptiveStrategy):
        return
    for what, evidence in _evidence(strategy):
        for side, widths in strategy.widths(LAYER, evidence).items():
            shapes = [(2, heads, evidence.tokens) for heads in (1, LAYER.kv_heads)]
            _require(
                widths.dtype == torch.uint8 and tuple(widths.shape) in shapes,
                strategy,
                f"{side} widths of {what} to be uint8 of shape {shapes[-1]}, got {widths.dtype} {tuple(widths.shape)}",
            )
            found = set(widths.unique().tolist())
            allowed = _allowed_widths(strategy, side)
            _require(
                found <= allowed, strategy, f"{side} widths of {what} among {sorted(allowed)}, got {sorted(found)}"
            )


def check_deciding_changes_nothing_and_is_deterministic(strategy: CacheQuantizer) -> None:
    """Asked twice about the same evidence, a strategy gives the same widths, and leaves the evidence as it was."""
    if not isinstance(strategy, AdaptiveStrategy):
        return
    for what, evidence in _evidence(strategy):
        before = copy.deepcopy(evidence)
        first, second = (strategy.widths(LAYER, evidence) for _ in range(2))
        _require(_same(first, second), strategy, f"the widths of {what} to be the same when asked twice")
        for name in ("low", "high", "widths", "measured"):
            _require(_same(getattr(before, name), getattr(evidence, name)), strategy, f"{name} of {what} unchanged")
        if before.attention is not None and evidence.attention is not None:
            _require(torch.equal(before.attention, evidence.attention), strategy, f"attention of {what} unchanged")


def check_widths_of_a_batch_row_are_its_own(strategy: CacheQuantizer) -> None:
    """What is known of one batch row does not move the widths of another."""
    if not isinstance(strategy, AdaptiveStrategy):
        return
    evidence = dict(_evidence(strategy))["a prompt"]
    other = copy.deepcopy(evidence)
    for tensors in (other.low, other.high, other.measured):
        for tensor in tensors.values():
            tensor[1] *= 5
    if other.attention is not None:
        other.attention[1] = other.attention[1].flip(-1)
    pair = [{side: w[:1] for side, w in strategy.widths(LAYER, each).items()} for each in (evidence, other)]
    _require(_same(*pair), strategy, "the widths of batch row 0 not to depend on row 1")


# ---- in the cache --------------------------------------------------------------------------------------------------


def check_streaming_equals_the_simulation(strategy: CacheQuantizer) -> None:
    """Decoding through the packed cache and the one-forward simulation give the same logits (float64, 1e-6)."""
    from .hf.simulate import SimulatedCache

    if isinstance(strategy, AdaptiveStrategy):
        return  # packs tokens again, which one forward cannot show
    model = _model(torch.float64)
    tokens = _tokens(2, 180 + _block(strategy))
    with torch.no_grad():
        simulated = model(
            tokens, past_key_values=SimulatedCache(model, _for_model(strategy), prefill=60, chunk=37, **OPTIONS)
        ).logits
        streamed = _stream(model, _cache(model, strategy), tokens, 60, 37)
    worst = float((simulated - streamed).abs().max())
    _require(worst <= 1e-6, strategy, f"simulated and streamed logits to agree to 1e-6, differ by {worst}")


def check_generation_equals_dequantized_attention(strategy: CacheQuantizer) -> None:
    """Attention over packed bytes equals attention over what `dequantize` gives, sinks and tail included."""
    model = _model()
    cache, tokens = _filled(model, strategy)
    other = copy.deepcopy(cache)
    with torch.no_grad():
        packed = model(tokens[:, -1:], past_key_values=cache).logits
        layers = other.packed_layers
        for layer in layers:
            layer.attend = _dense_attention(layer)  # type: ignore[method-assign]
        dense = model(tokens[:, -1:], past_key_values=other).logits
    worst = float((packed - dense).abs().max())
    _require(worst <= 1e-4, strategy, f"packed and dequantized attention to agree to 1e-4, differ by {worst}")


def check_batch_operations_move_whole_rows(strategy: CacheQuantizer) -> None:
    """reorder, select and repeat of the cache do to the next logits what they do to the rows."""
    model = _model()
    index = torch.tensor([1, 0, 1])
    for name, operate in (
        ("batch_select_indices", lambda cache: cache.batch_select_indices(index)),
        ("reorder_cache", lambda cache: cache.reorder_cache(index)),
        ("batch_repeat_interleave", lambda cache: cache.batch_repeat_interleave(2)),
    ):
        cache, tokens = _filled(model, strategy)
        changed = copy.deepcopy(cache)
        operate(changed)
        rows = torch.tensor([0, 0, 1, 1]) if name == "batch_repeat_interleave" else index
        with torch.no_grad():
            expected = model(tokens[:, -1:], past_key_values=cache).logits[rows]
            got = model(tokens[rows, -1:], past_key_values=changed).logits
        _require(bool((expected - got).abs().max() <= 1e-4), strategy, f"{name} to move whole rows")


def check_crop_forgets_what_came_after(strategy: CacheQuantizer) -> None:
    """A cache cropped to a whole number of blocks equals one that never saw the rest."""
    model = _model()
    block = _block(strategy)
    tokens = _tokens(1, 3 * block + 7)
    longer = _cache(model, strategy, residual_length=0)
    with torch.no_grad():
        model(tokens[:, : 2 * block], past_key_values=longer)
        shorter = copy.deepcopy(longer)
        model(tokens[:, 2 * block :], past_key_values=longer)
        held = [_held(layer, 2 * block) for layer in longer.packed_layers]
        longer.crop(-(block + 7))
        _require(longer.get_seq_length() == 2 * block, strategy, f"crop to leave {2 * block} tokens")
        if isinstance(strategy, AdaptiveStrategy):
            # what came after may have changed widths before it was cropped
            left = [_held(layer, 2 * block) for layer in longer.packed_layers]
            _require(all(map(torch.equal, held, left)), strategy, "crop to leave the other tokens as they are")
            return
        pair = [model(tokens[:, :3], past_key_values=cache).logits for cache in (longer, shorter)]
    _require(bool((pair[0] - pair[1]).abs().max() <= 1e-4), strategy, "a cropped cache to equal one never filled")


def check_reset_and_copies_share_nothing(strategy: CacheQuantizer) -> None:
    """A reset cache behaves like a new one, and a deep copy lives on its own."""
    model = _model()
    cache, tokens = _filled(model, strategy)
    twin = copy.deepcopy(cache)
    with torch.no_grad():
        expected = model(tokens[:, -1:], past_key_values=cache).logits
        cache.reset()
        _require(cache.get_seq_length() == 0 and cache.memory().elements == 0, strategy, "reset to empty the cache")
        again = model(tokens[:, -1:], past_key_values=twin).logits
        _stream(model, cache, tokens, _block(strategy), 41)
        refilled = model(tokens[:, -1:], past_key_values=cache).logits
    _require(torch.equal(expected, again), strategy, "a deep copy to be unaffected by the original")
    _require(bool((expected - refilled).abs().max() <= 1e-4), strategy, "a reset cache to behave like a new one")


def check_saved_caches_resume(strategy: CacheQuantizer) -> None:
    """A cache read back from its file gives the same logits."""
    from .hf.cache import PackedCache

    model = _model()
    cache, tokens = _filled(model, strategy)
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        path = Path(folder) / "cache.safetensors"
        cache.save(path)
        loaded = PackedCache.load(path, model, _for_model(strategy))
        pair = [model(tokens[:, -1:], past_key_values=c).logits for c in (cache, loaded)]
    _require(torch.equal(*pair), strategy, "a cache read back from its file to give the same logits")


def check_memory_counts_every_byte(strategy: CacheQuantizer) -> None:
    """The rows of the memory report add up, and count all that the stores and tails hold."""
    model = _model()
    cache, _ = _filled(model, strategy)
    report = cache.memory()
    _require(sum(report.rows.values()) == report.device_bytes + report.host_bytes, strategy, "memory rows to add up")
    held = sum(tensor.untyped_storage().nbytes() for layer in cache.packed_layers for tensor in layer.tensors())
    counted = report.device_bytes - report.rows["rope"] - report.rows["host layers"]
    _require(held == counted, strategy, f"the memory report to count the {held} bytes held, got {counted}")


CHECKS: tuple[Callable[[CacheQuantizer], None], ...] = tuple(
    check for name, check in list(globals().items()) if name.startswith("check_") and name != "check_strategy"
)


# ---- inside --------------------------------------------------------------------------------------------------------


def _require(condition: bool, strategy: CacheQuantizer, expectation: str) -> None:
    if not condition:
        raise _failure(strategy, expectation)


def _require_refusal(strategy: CacheQuantizer, model: Any, wanted: str, what: str) -> None:
    try:
        strategy.require_model(model)
    except ValueError as error:
        _require(wanted in str(error), strategy, f"the refusal of {what} to say {wanted!r}, got {str(error)!r}")
    else:
        raise _failure(strategy, f"{what} to be refused by require_model with a ValueError")


def _failure(strategy: CacheQuantizer, expectation: str) -> ContractError:
    return ContractError(f"strategy {strategy.name!r} ({strategy!r}): expected {expectation}")


def _sides(strategy: CacheQuantizer) -> list[tuple[Side, LayerFormat]]:
    """The sides that a strategy encodes itself; rows of mixed widths are the shared kernels'."""
    formats = strategy.formats(LAYER)
    return [(side, formats) for side in SIDES] if isinstance(formats, LayerFormat) else []


def _block(strategy: CacheQuantizer) -> int:
    """Tokens that are packed at a time."""
    if isinstance(strategy, AdaptiveStrategy):
        return strategy.interval
    formats = strategy.formats(LAYER)
    return formats.block if isinstance(formats, LayerFormat) else 128


def _states(formats: LayerFormat, blocks: int = 2) -> Tensor:
    """Correlated channels of very different scale, as keys have: `[2, kv_heads, blocks * block, head_dim]`."""
    generator = torch.Generator().manual_seed(7)
    shape = (2, LAYER.kv_heads, blocks * formats.block, LAYER.head_dim)
    scales = torch.linspace(0.2, 3.0, LAYER.head_dim)
    return torch.randn(shape, generator=generator) * scales + scales.flip(0) * 0.3


def _encode(strategy: CacheQuantizer, side: Side, states: Tensor, valid: Tensor | None = None) -> dict[str, Tensor]:
    formats = strategy.formats(LAYER)
    assert isinstance(formats, LayerFormat)
    # one fit for all that is encoded, unless padding is what matters
    tables = _tables(strategy, side, _states(formats) if valid is None else states, valid)
    return _for_states(strategy).encode(states, getattr(formats, side), side, formats.block, valid, tables)


def _decode(
    strategy: CacheQuantizer, side: Side, packed: dict[str, Tensor], formats: LayerFormat, tables: Tables | None = None
) -> Tensor:
    fmt = getattr(formats, side)
    tables = tables or _tables(strategy, side, _states(formats))
    if fmt.codes == "custom":
        return _for_states(strategy).decode(packed, fmt, side, formats.block, tables)
    return quantize.decode(packed, fmt, side, LAYER.head_dim, formats.block, tables)


def _tables(strategy: CacheQuantizer, side: Side, states: Tensor, valid: Tensor | None = None) -> Tables:
    """The strategy's tables, given the first block of `states`."""
    block = _block(strategy)
    return _for_states(strategy).tables(LAYER, side, states[:, :, :block], None if valid is None else valid[:, :block])


def _error(strategy: CacheQuantizer, side: Side, states: Tensor, formats: LayerFormat, real: Tensor) -> float:
    valid = real[:, 0, :, 0]
    packed = _encode(strategy, side, states, valid)
    decoded = _decode(strategy, side, packed, formats, _tables(strategy, side, states, valid))
    return float(((decoded - states) * real).square().mean())


def _off_the_grid(decoded: Tensor, states: Tensor, fmt: Format, tables: Tables) -> float:
    """How far the worst number is from where it was, or from the end of its static grid, in the grid's widest steps."""
    if fmt.rotation == "hadamard":
        decoded, states = hadamard_rotate(decoded), hadamard_rotate(states)
    levels = torch.arange(2.0**fmt.bits) if tables.codebook is None else tables.codebook
    scale, zero = (number[:, 0, 0, 0, :, None] for number in quantize.decode_grid({}, fmt, tables))
    points = (scale * levels + zero)[:, None]  # [kv_heads, 1, head_dim, levels]
    nearest = torch.clamp(states, points[..., 0], points[..., -1])
    off = torch.minimum((decoded - states).abs(), (decoded - nearest).abs())
    return float((off / points.diff(dim=-1).amax(-1).clamp(min=1e-6)).max())


# ---- calibrating ---------------------------------------------------------------------------------------------------


def _for_model(strategy: CacheQuantizer) -> Any:
    """The strategy ready to serve the tiny model: calibrated for it, if it is one that has to be."""
    return _calibrated(strategy) if _has_to_be_calibrated(strategy) else strategy  # type: ignore[arg-type]


def _for_states(strategy: CacheQuantizer) -> Any:
    """The strategy ready to pack `_states`."""
    return _calibrated_to_states(strategy) if _has_to_be_calibrated(strategy) else strategy  # type: ignore[arg-type]


def _has_to_be_calibrated(strategy: CacheQuantizer) -> bool:
    """Or calibrated again, if it was for another model."""
    return (
        isinstance(strategy, CalibratedStrategy)
        and strategy.calibration != "prompt"
        and (strategy.needs_statistics() or strategy.calibration is not None)
    )


@lru_cache(maxsize=64)
def _calibrated(strategy: CalibratedStrategy) -> CalibratedStrategy:
    return strategy.calibrate(_model(), None, _tokens(3, 2 * _block(strategy)), samples=3, heldout=0)


@lru_cache(maxsize=64)
def _calibrated_to_states(strategy: CalibratedStrategy) -> CalibratedStrategy:
    calibration = _for_model(strategy).calibration
    assert isinstance(calibration, Calibration)
    measured: dict[Side, Statistics] = {side: _measured(strategy, side, formats) for side, formats in _sides(strategy)}
    return strategy.with_calibration(Calibration(calibration.record, {LAYER.index: measured}))


def _measured(strategy: CalibratedStrategy, side: Side, formats: LayerFormat) -> Statistics:
    """What a calibration finds in `_states`."""
    fmt: Format = getattr(formats, side)
    states, recipe = _states(formats), strategy.recipe()
    low = high = None
    grid = Tables()
    if fmt.scale == "static":
        extremes = Extremes(states.shape[0] * states.shape[2], recipe.outliers)
        extremes.add(states)
        low, high = extremes.bounds()
        grid = Statistics(torch.empty(0), low, high).grid(fmt)
    normalised, width = quantize.normalise(states, fmt, side, formats.block, None, grid)
    density = Density()
    density.add(normalised, width, torch.ones_like(normalised, dtype=torch.bool))
    sensitivity = torch.linspace(0.1, 1, LAYER.head_dim).expand(LAYER.kv_heads, -1) if recipe.gradients else None
    return Statistics(density.mass.float(), low, high, sensitivity)


# ---- evidence ------------------------------------------------------------------------------------------------------


def _evidence(strategy: AdaptiveStrategy) -> list[tuple[str, Evidence]]:
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
    formats = strategy.formats(LAYER)
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
    queries = strategy.notice_query(LAYER, torch.randn(2, LAYER.kv_heads, 2, 7, LAYER.head_dim, generator=generator))
    evidence = Evidence(
        tokens=tokens,
        seen=real.sum(-1),
        newer=0,
        real=real,
        attention=rows,
        low={side: -width / 2 for side, width in span.items()},
        high={side: width / 2 for side, width in span.items()},
        widths={side: torch.zeros(2, heads, 0, dtype=torch.uint8) for side in SIDES},
        measured=strategy.measure(LAYER, queries, states, real),
    )
    if strategy.together:
        evidence = strategy.merge([evidence, evidence])
    if packed:
        held = {side: widths[:, :, :packed] for side, widths in strategy.widths(LAYER, evidence).items()}
        evidence = replace(evidence, widths=held)
    return evidence


def _allowed_widths(strategy: AdaptiveStrategy, side: Side) -> set[int]:
    formats = strategy.formats(LAYER)
    assert formats is not None
    return {row_bits(fmt) for fmt in getattr(formats, side)} | ({0} if formats.drops else set())


def _same(first: Mapping[Any, Tensor], second: Mapping[Any, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def _model(dtype: torch.dtype = torch.float32) -> Any:
    from .hf.tiny import tiny_model

    return tiny_model(dtype)


def _tokens(batch: int, length: int) -> Tensor:
    return torch.randint(2, 97, (batch, length), generator=torch.Generator().manual_seed(3))


def _cache(model: Any, strategy: CacheQuantizer, **options: Any) -> "PackedCache":
    from .hf.cache import PackedCache

    return PackedCache(model, _for_model(strategy), **{**OPTIONS, **options})


def _filled(model: Any, strategy: CacheQuantizer) -> tuple["PackedCache", Tensor]:
    """A cache with packed blocks, sinks and a tail, and the tokens it was filled with."""
    cache = _cache(model, strategy)
    tokens = _tokens(2, 2 * _block(strategy) + 29)
    _stream(model, cache, tokens, _block(strategy), 41)
    return cache, tokens


def _stream(model: Any, cache: "PackedCache", tokens: Tensor, prefill: int, chunk: int) -> Tensor:
    bounds = [0, *range(prefill, tokens.shape[1], chunk), tokens.shape[1]]
    with torch.no_grad():
        pieces = [tokens[:, a:b] for a, b in itertools.pairwise(bounds)]
        return torch.cat([model(piece, past_key_values=cache).logits for piece in pieces], dim=1)


def _dense_attention(layer: Any) -> Callable[..., Tensor]:
    """What `PackedLayer.attend` must equal: plain attention over dequantized states."""
    from ..kernels.attention import attend_reference

    def attend(query: Tensor, key: Any, value: Any, scoring: Any) -> Tensor:
        rows = query.float().unflatten(1, (layer.kv_heads, -1)).flatten(2, 3)
        states = [_held(layer, handle.start, handle.side) for handle in (key, value)]
        states = [torch.cat([s, h.rotated_exact()], dim=2).float() for s, h in zip(states, (key, value), strict=True)]
        kept = _kept(layer, key.start, key.shape[2])
        output = attend_reference(rows, states[0], states[1], scoring.scaling, kept)
        return output.reshape(query.shape).to(query.dtype)

    return attend


def _held(layer: Any, packed: int, side: Side = "key") -> Tensor:
    """The first `packed` tokens as they are packed, dense."""
    read = layer.dense if hasattr(layer, "pools") else layer.dequantize
    return read(side, min(packed, layer.packed_tokens))


def _kept(layer: Any, packed: int, tokens: int) -> Tensor | None:
    """Which tokens were not dropped, `[batch, heads or 1, 1, tokens]`; None: all."""
    if not hasattr(layer, "pools"):
        return None
    widths = layer.pools["key"].widths.unflatten(0, (layer.tails["key"].read().shape[0], -1))[:, :, None, :packed]
    return torch.nn.functional.pad(widths > 0, (0, tokens - packed), value=True)
