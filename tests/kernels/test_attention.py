"""Attention over packed blocks equals plain attention over what the blocks decode to, in float64, for every format."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from cachequant.kernels.attention import (
    Partial,
    attend_reference,
    dense_partial,
    finish,
    merge,
    packed_partial,
    packed_scores,
    unrotate,
)
from cachequant.kernels.format import Format
from cachequant.kernels.quantize import NO_TABLES, Tables, decode, encode
from cachequant.kernels.rotation import hadamard_rotate

BLOCK = 32
BATCH, HEADS, ROWS = 2, 3, 5
SCALE = 0.125

LEVELS = torch.linspace(-1, 1, 16) ** 3
FLOAT8 = Format(bits=8, codes="float8", symmetric=True)


def tables(head_dim: int) -> Tables:
    generator = torch.Generator().manual_seed(7)
    scale, zero = (torch.rand(HEADS, head_dim, generator=generator) + 0.1 for _ in range(2))
    return Tables(codebook=LEVELS, scale=scale, zero=zero - 1)


FORMATS = {
    **{f"{bits}bit-token": Format(bits=bits) for bits in (2, 3, 4, 8)},
    **{f"{bits}bit-channel": Format(bits=bits, scale="channel") for bits in (2, 3, 4, 8)},
    "token-group16": Format(group=16),
    "token-symmetric": Format(symmetric=True),
    "channel-symmetric": Format(bits=8, scale="channel", symmetric=True),
    "static": Format(scale="static"),
    "codebook-token": Format(codes="codebook"),
    "codebook-token-symmetric": Format(codes="codebook", symmetric=True),
    "codebook-group16": Format(codes="codebook", group=16),
    "codebook-channel": Format(codes="codebook", scale="channel"),
    "codebook-static": Format(codes="codebook", scale="static"),
    "token-outliers": Format(bits=2, outliers=3),
    "channel-outliers": Format(bits=2, scale="channel", outliers=3),
    "codebook-static-outliers": Format(codes="codebook", scale="static", outliers=1),
    "token-trim": Format(bits=2, outliers=3, trim=2),
    "channel-trim": Format(bits=2, scale="channel", outliers=3, trim=2),
    "codebook-trim": Format(codes="codebook", outliers=2, trim=1),
    "rotated": Format(rotation="hadamard"),
    "rotated-group16": Format(bits=2, group=16, rotation="hadamard"),
    "rotated-outliers": Format(bits=2, outliers=3, rotation="hadamard"),
    "rotated-blocks": Format(rotation="hadamard", rotation_size=16),
    "float8": FLOAT8,
    "float8-group16": FLOAT8.model_copy(update={"group": 16}),
    "float8-channel": FLOAT8.model_copy(update={"scale": "channel"}),
    "float8-static": FLOAT8.model_copy(update={"scale": "static"}),
    "norm-rotated": Format(codes="codebook", symmetric=True, unit="norm", rotation="hadamard"),
    "exact": Format(codes="exact"),
}
HEAD_DIMS = [64, 80]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def packed(states: Tensor, fmt: Format, side: str) -> tuple[dict[str, Tensor], Tensor]:
    """The blocks of `states`, and what they decode to."""
    head_dim = states.shape[-1]
    blocks = encode(states, fmt, side, BLOCK, tables=tables(head_dim))
    return blocks, decode(blocks, fmt, side, head_dim, BLOCK, tables(head_dim), torch.float64)


def scores_of(query: Tensor, blocks: dict[str, Tensor], fmt: Format) -> Tensor:
    basis = hadamard_rotate(query, fmt.basis(query.shape[-1]))
    return packed_scores(basis * SCALE, blocks, fmt, BLOCK, tables(query.shape[-1]))


def partial_of(scores: Tensor, blocks: dict[str, Tensor], fmt: Format, dim: int) -> Partial:
    return unrotate(packed_partial(scores, blocks, fmt, dim, BLOCK, tables(dim)), fmt)


@pytest.fixture(params=HEAD_DIMS, ids="head_dim={}".format)
def head_dim(request):
    return request.param


@pytest.mark.parametrize("fmt", FORMATS.values(), ids=FORMATS)
def test_packed_scores_are_dot_products_with_decoded_keys(fmt, head_dim):
    query = random(BATCH, HEADS, ROWS, head_dim)
    blocks, key = packed(random(BATCH, HEADS, 3 * BLOCK, head_dim, seed=1), fmt, "key")
    torch.testing.assert_close(scores_of(query, blocks, fmt), query @ key.transpose(-1, -2) * SCALE)


@pytest.mark.parametrize("fmt", FORMATS.values(), ids=FORMATS)
def test_packed_values_are_mixed_as_decoded_ones(fmt, head_dim):
    scores = random(BATCH, HEADS, ROWS, 3 * BLOCK) * 2
    blocks, value = packed(random(BATCH, HEADS, 3 * BLOCK, head_dim, seed=2), fmt, "value")
    output = finish(partial_of(scores, blocks, fmt, head_dim))
    torch.testing.assert_close(output, torch.softmax(scores, -1) @ value)


@pytest.mark.parametrize(
    "fmt", [fmt for fmt in FORMATS.values() if fmt.packed], ids=[n for n in FORMATS if n != "exact"]
)
def test_levels_with_gain_and_offset_are_read_as_they_decode(fmt, head_dim):
    moved = replace(tables(head_dim), gain=torch.tensor(1.2), offset=torch.tensor(-0.3))
    query, scores = random(BATCH, HEADS, ROWS, head_dim), random(BATCH, HEADS, ROWS, 2 * BLOCK) * 2
    states = random(BATCH, HEADS, 2 * BLOCK, head_dim, seed=1)
    key, value = (encode(states, fmt, side, BLOCK, tables=moved) for side in ("key", "value"))
    dense_key, dense_value = (
        decode(blocks, fmt, side, head_dim, BLOCK, moved, torch.float64)
        for side, blocks in (("key", key), ("value", value))
    )
    basis = hadamard_rotate(query, fmt.basis(head_dim))
    torch.testing.assert_close(packed_scores(basis, key, fmt, BLOCK, moved), query @ dense_key.transpose(-1, -2))
    output = finish(unrotate(packed_partial(scores, value, fmt, head_dim, BLOCK, moved), fmt))
    torch.testing.assert_close(output, torch.softmax(scores, -1) @ dense_value)
    plain = decode(key, fmt, "key", head_dim, BLOCK, tables(head_dim), torch.float64)
    assert (plain - dense_key).abs().max() > 0.01


# keys and values need not have the same format
PAIRS = {f"{a}/{b}": (FORMATS[a], FORMATS[b]) for a, b in zip(FORMATS, reversed(FORMATS), strict=True)}


@pytest.mark.parametrize(("key_format", "value_format"), PAIRS.values(), ids=PAIRS)
@pytest.mark.parametrize("hidden", ["none", "some", "a-block", "whole-rows"])
def test_segments_merge_to_attention_over_everything(key_format, value_format, hidden, head_dim):
    query = random(BATCH, HEADS, ROWS, head_dim)
    key, value = (random(BATCH, HEADS, 4 * BLOCK, head_dim, seed=seed) for seed in (1, 2))
    tail_key, tail_value = (random(BATCH, HEADS, 7, head_dim, seed=seed) for seed in (3, 4))
    total = 4 * BLOCK + 7
    mask = torch.ones(BATCH, 1, ROWS, total, dtype=torch.bool)
    if hidden == "some":
        mask = torch.rand(mask.shape, generator=torch.Generator().manual_seed(5)) < 0.5
    elif hidden == "a-block":
        mask[:, :, :, BLOCK : 3 * BLOCK] = False
    elif hidden == "whole-rows":
        mask[0, :, 2] = False
        mask[1, :, 4] = False
    key_blocks, decoded_key = packed(key, key_format, "key")
    value_blocks, decoded_value = packed(value, value_format, "value")
    partial = None
    for start in range(0, 4, 2):  # two chunks of two blocks
        window = mask[..., start * BLOCK : (start + 2) * BLOCK]
        chunk = {name: tensor[:, :, start : start + 2] for name, tensor in key_blocks.items()}
        scores = scores_of(query, chunk, key_format).masked_fill(~window, -torch.inf)
        chunk = {name: tensor[:, :, start : start + 2] for name, tensor in value_blocks.items()}
        piece = partial_of(scores, chunk, value_format, head_dim)
        partial = piece if partial is None else merge(partial, piece)
    scores = (query @ tail_key.transpose(-1, -2) * SCALE).masked_fill(~mask[..., 4 * BLOCK :], -torch.inf)
    output = finish(merge(partial, dense_partial(scores, tail_value)))
    expected = attend_reference(
        query, torch.cat([decoded_key, tail_key], 2), torch.cat([decoded_value, tail_value], 2), SCALE, mask
    )
    torch.testing.assert_close(output, expected)
    assert output.isfinite().all()


def pieces(count: int) -> list[Partial]:
    return [
        dense_partial(random(BATCH, HEADS, ROWS, 9, seed=s) * 5, random(BATCH, HEADS, 9, 16, seed=90 + s))
        for s in range(count)
    ]


def test_segments_merge_in_any_order():
    a, b, c = pieces(3)
    expected = finish(merge(merge(a, b), c))
    for merged in (merge(a, merge(b, c)), merge(merge(c, a), b), merge(c, merge(b, a))):
        torch.testing.assert_close(finish(merged), expected)


def test_segment_that_no_query_sees_changes_nothing():
    (a,) = pieces(1)
    unseen = dense_partial(
        torch.full((BATCH, HEADS, ROWS, 4), -torch.inf, dtype=torch.float64), random(BATCH, HEADS, 4, 16)
    )
    for merged in (merge(a, unseen), merge(unseen, a)):
        torch.testing.assert_close(finish(merged), finish(a))


def test_rows_that_saw_no_key_are_zero():
    unseen = dense_partial(torch.full((BATCH, HEADS, ROWS, 4), -torch.inf), torch.ones(BATCH, HEADS, 4, 16))
    assert finish(merge(unseen, unseen)).eq(0).all()


def test_large_scores_do_not_overflow():
    scores, value = torch.tensor([[[[3e4, -3e4, 2.9e4]]]]), torch.tensor([[[[1.0], [2.0], [3.0]]]])
    first, second = dense_partial(scores[..., :2], value[:, :, :2]), dense_partial(scores[..., 2:], value[:, :, 2:])
    assert finish(merge(first, second)).item() == 1.0


@pytest.mark.parametrize("strength", [-50.0, 0.0, 3.0, 50.0])
def test_learned_sink_takes_the_weight_of_one_more_key_without_value(strength):
    scores, value = random(BATCH, HEADS, ROWS, 9), random(BATCH, HEADS, 9, 16, seed=1)
    sink = random(HEADS, ROWS, seed=2) + strength
    extended = torch.cat([scores, sink[..., None].expand(BATCH, -1, -1, 1)], -1)
    expected = torch.softmax(extended, -1)[..., :-1] @ value
    torch.testing.assert_close(finish(dense_partial(scores, value), sink), expected)


def test_learned_sink_alone_gives_zero():
    unseen = dense_partial(torch.full((BATCH, HEADS, ROWS, 4), -torch.inf), torch.ones(BATCH, HEADS, 4, 16))
    assert finish(unseen, torch.zeros(HEADS, ROWS)).eq(0).all()


def test_reference_is_pytorch_attention():
    query, key, value = random(BATCH, HEADS, ROWS, 64), *(random(BATCH, HEADS, 11, 64, seed=s) for s in (1, 2))
    mask = torch.rand(BATCH, 1, ROWS, 11, generator=torch.Generator().manual_seed(5)) < 0.7
    mask[..., 0] = True
    expected = torch.nn.functional.scaled_dot_product_attention(query, key, value, mask, scale=SCALE)
    torch.testing.assert_close(attend_reference(query, key, value, SCALE, mask), expected)


@pytest.mark.parametrize("fmt", ["4bit-token", "2bit-channel", "rotated", "exact"])
def test_float32_queries_give_float32_scores_close_to_the_truth(fmt):
    query = random(BATCH, HEADS, ROWS, 64)
    blocks, key = packed(random(BATCH, HEADS, 2 * BLOCK, 64, seed=1), FORMATS[fmt], "key")
    scores = scores_of(query.float(), blocks, FORMATS[fmt])
    assert scores.dtype == torch.float32
    # sums of codes and the zero point cancel, so a few roundings of a number ten times as large
    torch.testing.assert_close(scores.double(), query @ key.transpose(-1, -2) * SCALE, rtol=0, atol=1e-5)


def test_tables_are_needed_only_where_a_format_reads_them():
    states = random(1, HEADS, BLOCK, 64)
    blocks = encode(states, Format(), "key", BLOCK, tables=NO_TABLES)
    assert packed_scores(states[:, :, :2], blocks, Format(), BLOCK).shape == (1, HEADS, 2, BLOCK)
