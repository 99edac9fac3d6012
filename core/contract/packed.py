"""Checks of tables, encode and decode."""

from dataclasses import replace

import torch
from torch import Tensor

from ...kernels import quantize
from ...kernels.float8 import from_float8
from ...kernels.format import Format
from ...kernels.quantize import Tables, packed_shapes
from ...kernels.rotation import hadamard_rotate
from ..protocol import CacheQuantizer
from .check import contract_check, require
from .kinds import packs_blocks, packs_bytes_of_its_own, packs_shared_formats
from .layers import LAYER
from .material import Packing, channel_scales, copied, of_its_own, packings, rebuilt, same, states_of

MOST_BITS = 16
"""Where that many bits hold a number, rounding of floats is all that is lost, and the bound on errors means nothing."""

TINY = 1e-6
"""Codes without a zero, such as those of logarithms, give this for it, or less."""


@contract_check(packs_blocks)
def check_tables_have_the_shapes_of_the_format(strategy: CacheQuantizer) -> None:
    """Tables hold what the format reads, in float32: a codebook of 2**bits levels, numbers per channel, scalars."""
    per_channel = (LAYER.kv_heads, LAYER.head_dim)
    for packing in packings(strategy):
        side, fmt, tables = packing.side, packing.fmt, packing.tables(packing.states())
        require(isinstance(tables, Tables), f"tables({side}) to return Tables, got {tables!r:.200}")
        held = tables.tensors()
        needed = {"codebook"} if fmt.codes == "codebook" else set()
        needed |= {"scale", "zero"} if fmt.packed and fmt.scale == "static" else set()
        require(needed <= held.keys(), f"tables({side}) with {sorted(needed)}, got {sorted(held)}")
        shapes = {"codebook": (2**fmt.bits,), "gain": (), "offset": ()}
        for name, tensor in held.items():
            expected = shapes.get(name, per_channel)
            require(
                tensor.dtype == torch.float32 and tuple(tensor.shape) == expected,
                f"{name} of tables({side}) to be float32 {expected}, got {tensor.dtype} {tuple(tensor.shape)}",
            )
            require(bool(tensor.isfinite().all()), f"{name} of tables({side}) to be finite")
        if fmt.codes == "codebook":
            require(bool((held["codebook"].diff() >= 0).all()), f"the codebook of tables({side}) to ascend")


@contract_check(packs_blocks)
def check_tables_leave_their_input_unchanged(strategy: CacheQuantizer) -> None:
    """tables() does not write to the first block and its mask."""
    for packing in packings(strategy):
        states, valid = packing.states(blocks=1), _mask(packing)
        packing.tables(states, valid)
        require(torch.equal(states, packing.states(blocks=1)), f"tables({packing.side}) not to change the first block")
        require(torch.equal(valid, _mask(packing)), f"tables({packing.side}) not to change the mask")


@contract_check(packs_blocks)
def check_tables_depend_on_their_arguments_alone(strategy: CacheQuantizer) -> None:
    """Asked again about the same first block, tables() answers the same, whatever was asked in between."""
    for packing in packings(strategy):
        first = packing.tables(packing.states(blocks=1)).tensors()
        before = copied(first)
        packing.tables(_others(packing))
        require(same(before, first), f"tables({packing.side}) not to change what it gave before")
        again = packing.tables(packing.states(blocks=1)).tensors()
        require(same(before, again), f"tables({packing.side}) of the same block to be the same, whatever came between")


@contract_check(packs_blocks)
def check_encoding_returns_whole_blocks(strategy: CacheQuantizer) -> None:
    """Every tensor of an encoding has batch, heads and blocks in front."""
    for packing in packings(strategy):
        packed = packing.encode(packing.states(blocks=3))
        require(len(packed) > 0, f"encode({packing.side}) to return at least one tensor")
        for name, tensor in packed.items():
            expected = (2, LAYER.kv_heads, 3)
            require(
                tuple(tensor.shape[:3]) == expected,
                f"encode({packing.side})[{name!r}] to begin with [batch, heads, blocks] {expected}, "
                f"got {tuple(tensor.shape)}",
            )


@contract_check(packs_shared_formats)
def check_encoding_has_the_tensors_of_its_format(strategy: CacheQuantizer) -> None:
    """Bytes that the shared kernels read have the names, shapes and dtypes that these expect."""
    for packing in packings(strategy):
        if packing.fmt.codes == "custom":
            continue
        states = packing.states()
        shapes = packed_shapes(packing.fmt, packing.side, LAYER.head_dim, packing.block, states.dtype)
        packed = packing.encode(states)
        require(
            packed.keys() == shapes.keys(),
            f"encode({packing.side}) to return {sorted(shapes)}, as its format says, got {sorted(packed)}",
        )
        for name, (shape, dtype) in shapes.items():
            expected, tensor = (2, LAYER.kv_heads, 2, *shape), packed[name]
            require(
                tuple(tensor.shape) == expected and tensor.dtype == dtype,
                f"encode({packing.side})[{name!r}] to be {dtype} {expected}, got {tensor.dtype} {tuple(tensor.shape)}",
            )


@contract_check(packs_blocks)
def check_encoding_leaves_its_input_unchanged(strategy: CacheQuantizer) -> None:
    """encode() does not write to the states, the mask and the tables it is given."""
    for packing in packings(strategy):
        states, valid, tables = packing.states(), _mask(packing, blocks=2), packing.tables(packing.states())
        before = copied(tables.tensors())
        packing.encode(states, valid, tables)
        require(torch.equal(states, packing.states()), f"encode({packing.side}) not to change its input")
        require(torch.equal(valid, _mask(packing, blocks=2)), f"encode({packing.side}) not to change the mask")
        require(same(before, tables.tensors()), f"encode({packing.side}) not to change the tables")


@contract_check(packs_blocks)
def check_encoding_is_deterministic(strategy: CacheQuantizer) -> None:
    """The same states give the same bytes, whatever was encoded in between."""
    for packing in packings(strategy):
        first = packing.encode(packing.states())
        before = copied(first)
        packing.encode(_others(packing))
        require(same(before, first), f"encode({packing.side}) not to change what it returned before")
        second = packing.encode(packing.states())
        require(same(before, second), f"encode({packing.side}) of equal states to be equal, whatever came between")


@contract_check(packs_blocks)
def check_encoding_takes_states_of_any_dtype(strategy: CacheQuantizer) -> None:
    """States in 16 bits are packed like the same numbers in float32."""
    for packing in packings(strategy):
        if packing.fmt.codes == "exact":
            continue
        for dtype in (torch.bfloat16, torch.float16):
            states = packing.states().to(dtype)
            tables = packing.tables(states)
            require(
                same(packing.encode(states, None, tables), packing.encode(states.float(), None, tables)),
                f"encode({packing.side}) of {dtype} states to be that of equal float32 ones",
            )


@contract_check(packs_blocks)
def check_blocks_are_encoded_independently(strategy: CacheQuantizer) -> None:
    """Encoding a prefix gives the prefix of the encoding: the cache appends and crops block by block."""
    for packing in packings(strategy):
        states = packing.states(blocks=3)
        whole = packing.encode(states)
        prefix = packing.encode(states[:, :, : 2 * packing.block])
        cut = {name: tensor[:, :, :2] for name, tensor in whole.items()}
        require(same(prefix, cut), f"encode({packing.side}) of two blocks to equal the first two of three")


@contract_check(packs_blocks)
def check_batch_rows_and_heads_are_independent(strategy: CacheQuantizer) -> None:
    """Changing one row and one head leaves the bytes of the others alone; batches are reordered row by row."""
    for packing in packings(strategy):
        states = packing.states()
        other = states.clone()
        other[1] *= 7
        same_row = [{n: t[:1] for n, t in packing.encode(s).items()} for s in (states, other)]
        require(same(*same_row), f"encode({packing.side}) of batch row 0 not to depend on row 1")
        other = states.clone()
        other[:, 1] *= 7
        same_head = [{n: t[:, :1] for n, t in packing.encode(s).items()} for s in (states, other)]
        require(same(*same_head), f"encode({packing.side}) of head 0 not to depend on head 1")


@contract_check(packs_blocks)
def check_decoding_gives_back_shape_and_most_of_the_signal(strategy: CacheQuantizer) -> None:
    """What is decoded has the shape that was encoded and is closer to it than zeros would be."""
    for packing in packings(strategy):
        states = packing.states()
        decoded = packing.decode(packing.encode(states))
        require(decoded.shape == states.shape, f"decoded {packing.side}s of shape {states.shape}, got {decoded.shape}")
        error = _relative_error(decoded, states)
        require(error < 1, f"decoded {packing.side}s closer to the states than zeros, relative error {error}")


@contract_check(packs_bytes_of_its_own)
def check_decoding_leaves_its_input_unchanged(strategy: CacheQuantizer) -> None:
    """decode() does not write to the packed tensors and the tables it is given."""
    for packing in of_its_own(strategy):
        tables = packing.tables(packing.states())
        packed = packing.encode(packing.states(), None, tables)
        before, numbers = copied(packed), copied(tables.tensors())
        packing.decode(packed, tables)
        require(same(before, packed), f"decode({packing.side}) not to change the packed tensors")
        require(same(numbers, tables.tensors()), f"decode({packing.side}) not to change the tables")


@contract_check(packs_bytes_of_its_own)
def check_decoding_depends_on_its_bytes_alone(strategy: CacheQuantizer) -> None:
    """Copies of bytes decode alike: later, in another order, by an equal strategy; and other bytes decode otherwise."""
    for packing in of_its_own(strategy):
        tables = packing.tables(packing.states())
        packed = packing.encode(packing.states(), None, tables)
        expected = packing.decode(packed, tables)
        packing.decode(packing.encode(_others(packing), None, tables), tables)
        later = packing.decode(copied(packed), tables)
        require(
            torch.equal(expected, later), f"decode({packing.side}) of equal bytes to be equal, whatever came between"
        )
        twin = replace(packing, strategy=rebuilt(packing.strategy))
        by_twin = twin.decode(copied(packed), tables)
        require(torch.equal(expected, by_twin), f"decode({packing.side}) by an equal strategy to be equal")
        require(not _decodes_nothing_to(packing, packed, tables, expected), f"decode({packing.side}) to read its bytes")
        turned = packing.decode({name: tensor.flip(0, 2) for name, tensor in packed.items()}, tables)
        blocks = expected.unflatten(2, (-1, packing.block)).flip(0, 2).flatten(2, 3)
        require(
            torch.allclose(turned, blocks, rtol=1e-3, atol=1e-4), f"decoded {packing.side}s to move with their bytes"
        )


@contract_check(packs_blocks)
def check_constant_and_zero_states_decode_finite(strategy: CacheQuantizer) -> None:
    """Vectors without a range do not divide by zero."""
    for packing in packings(strategy):
        for constant in (0.0, 1.5, -3.0):
            decoded = packing.decode(packing.encode(torch.full_like(packing.states(), constant)))
            require(bool(decoded.isfinite().all()), f"constant {packing.side}s {constant} to decode to finite numbers")


@contract_check(packs_blocks)
def check_constant_states_are_given_back(strategy: CacheQuantizer) -> None:
    """Vectors without a range do not drift.

    A grid made for them gives them back within 2 %. A static grid was made for other states: what lies on it comes
    back within its widest step, what lies beyond it as its end or, from an outlier slot, as it was. A codebook in units
    of a norm was made for normal numbers: others only have to come back closer than zeros would be.
    """
    for packing in packings(strategy):
        side, fmt = packing.side, packing.fmt
        for constant in (0.0, 1.5, -3.0):
            states = torch.full_like(packing.states(), constant)
            decoded = packing.decode(packing.encode(states))
            if fmt.packed and fmt.unit != "range" and constant:
                error = _relative_error(decoded, states)
                require(error < 1, f"constant {side}s {constant} closer than zeros, relative error {error}")
            elif fmt.packed and fmt.scale == "static":
                worst = _off_the_grid(decoded, states, fmt, packing.tables(packing.states()))
                require(worst <= 1.01, f"constant {side}s {constant} within a step, off by {worst} steps")
            else:
                worst = float((decoded - states).abs().max())
                require(
                    worst <= 0.02 * abs(constant) + TINY,
                    f"constant {side}s {constant} within 2 %, off by {worst}; a strategy that clips on purpose says so "
                    "in `exceptions`",
                )


@contract_check(packs_blocks)
def check_padding_does_not_disturb_real_tokens(strategy: CacheQuantizer) -> None:
    """Enormous values in tokens marked invalid coarsen neither the grid of the valid ones nor a fit to them."""
    for packing in packings(strategy):
        states, valid = packing.states(), _mask(packing, blocks=2)
        real = valid[:, None, :, None]
        clean = _error(packing, states, real)
        loud = _error(packing, torch.where(real, states, torch.full_like(states, 1e4)), real)
        require(loud <= 1.5 * clean + 1e-6, f"padding not to raise the error of {packing.side}s: {clean} to {loud}")


@contract_check(packs_blocks)
def check_bytes_match_the_formula(strategy: CacheQuantizer) -> None:
    """Packed states are smaller than what came in, and exactly as large as their format says."""
    for packing in packings(strategy):
        side, fmt = packing.side, packing.fmt
        states = packing.states().half()
        held = _bytes(packing.encode(states))
        if fmt.codes == "exact":
            continue
        require(held < states.numel() * 2, f"packed {side}s to take fewer bytes than float16, got {held}")
        if fmt.packed:
            blocks = states.shape[0] * states.shape[1] * states.shape[2] // packing.block
            stated = blocks * sum(fmt.block_bytes(side, states.shape[3], packing.block, 2).values())
            require(held == stated, f"packed {side}s to take the {stated} bytes of the formula, got {held}")


@contract_check(packs_bytes_of_its_own)
def check_bytes_can_hold_what_is_decoded(strategy: CacheQuantizer) -> None:
    """No code of so few bits could decode so well: what is decoded was not kept elsewhere.

    Shannon's bound for normal numbers of known means and deviations, which the states are; half of it is allowed.
    """
    for packing in of_its_own(strategy):
        tables, states = packing.tables(packing.states()), packing.states()
        packed = packing.encode(states, None, tables)
        held = _bytes(packed) + _bytes(tables.tensors())
        bits = 8 * held / states.numel()
        error = float((packing.decode(packed, tables) - states).square().mean())
        least = _least_error(bits)
        require(
            bits >= MOST_BITS or error >= least / 2,
            f"packed {packing.side}s to hold what is decoded from them: {bits:.3g} bits a number lose at least "
            f"{least:.3g} of mean square, but {error:.3g} was lost; return all that decode() reads",
        )


def _mask(packing: Packing, blocks: int = 1) -> Tensor:
    """The first tokens of every row are padding: `[2, blocks * block]`."""
    valid = torch.ones(2, blocks * packing.block, dtype=torch.bool)
    valid[:, :5] = False
    return valid


def _others(packing: Packing) -> Tensor:
    """States that have nothing to do with `packing.states()`."""
    return states_of(packing.block, 2, seed=8) * 3


def _relative_error(decoded: Tensor, states: Tensor) -> float:
    return float((decoded - states).square().mean() / states.square().mean())


def _error(packing: Packing, states: Tensor, real: Tensor) -> float:
    valid = real[:, 0, :, 0]
    tables = packing.tables(states, valid)
    decoded = packing.decode(packing.encode(states, valid, tables), tables)
    return float(((decoded - states) * real).square().mean())


def _decodes_nothing_to(packing: Packing, packed: dict[str, Tensor], tables: Tables, expected: Tensor) -> bool:
    """Whether zeroed bytes give what the bytes gave."""
    try:
        decoded = packing.decode({name: torch.zeros_like(tensor) for name, tensor in packed.items()}, tables)
    except Exception:
        return False  # what is no code need not decode
    return torch.equal(decoded, expected)


def _bytes(tensors: dict[str, Tensor]) -> int:
    """What tensors keep in memory: whole storages where they are views, all elements where these share memory."""
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors.values()}
    return max(sum(storages.values()), sum(tensor.numel() * tensor.element_size() for tensor in tensors.values()))


def _least_error(bits: float) -> float:
    """The mean squared error that no code of `bits` per number can beat on `states_of`: reverse water-filling."""
    variance = channel_scales().double().square()
    low, high = 0.0, float(variance.max())
    for _ in range(100):
        level = (low + high) / 2
        needed = float((variance / level).log2().clamp(min=0).mean()) / 2
        low, high = (level, high) if needed > bits else (low, level)
    return float(variance.clamp(max=high).mean())


def _off_the_grid(decoded: Tensor, states: Tensor, fmt: Format, tables: Tables) -> float:
    """How far the worst number is from where it was, or from the end of its static grid, in the grid's widest steps."""
    basis = fmt.basis(LAYER.head_dim)
    decoded, states = hadamard_rotate(decoded, basis), hadamard_rotate(states, basis)
    levels = _levels(fmt, tables)
    scale, zero = (number[:, 0, 0, 0, :, None] for number in quantize.decode_grid({}, fmt, tables))
    points = (scale * levels + zero)[:, None]  # [kv_heads, 1, head_dim, levels]
    nearest = torch.clamp(states, points[..., 0], points[..., -1])
    off = torch.minimum((decoded - states).abs(), (decoded - nearest).abs())
    return float((off / points.diff(dim=-1).amax(-1).clamp(min=1e-6)).max())


def _levels(fmt: Format, tables: Tables) -> Tensor:
    """All levels, ascending."""
    if fmt.codes == "float8":
        levels = from_float8(torch.arange(256, dtype=torch.uint8), torch.float32)
        return levels[levels.isfinite()].sort().values
    return torch.arange(2.0**fmt.bits) if tables.codebook is None else tables.codebook
