"""The fused attention kernels against float64 attention over what the reference decodes. Needs TRITON_INTERPRET=1."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from cachequant.kernels import fused, quantize
from cachequant.kernels.format import Format, LayerFormat
from cachequant.kernels.triton import launch

sys.path.insert(0, str(Path(__file__).parents[1]))
from grid import PAIRS, SPECIAL, TOLERANCE, Case, Problem, expected, guarded, poison_like, problem, relative_error


@pytest.fixture(autouse=True)
def poison(monkeypatch):
    """What kernels write to holds no number before."""
    new_empty = Tensor.new_empty

    def poisoned(self: Tensor, *arguments, **options) -> Tensor:
        fresh = new_empty(self, *arguments, **options)
        return fresh.fill_(poison_like(fresh))

    monkeypatch.setattr(Tensor, "new_empty", poisoned)


def require_right(given: Problem) -> Tensor:
    found, want = fused.attend(*given), expected(given)
    assert found.dtype == given.query.dtype
    assert found.shape == want.shape
    assert relative_error(found, want) < TOLERANCE
    return found


@pytest.mark.parametrize("name", PAIRS)
def test_any_two_options_together_attend_as_decoded_tokens_do(monkeypatch, name):
    # one program per kv head, or one per step
    monkeypatch.setattr(launch, "processors", lambda device: 100 if name.endswith(("0", "4", "8")) else 0)
    require_right(problem(PAIRS[name]))


@pytest.mark.parametrize("name", SPECIAL)
def test_unusual_calls_attend_as_decoded_tokens_do(monkeypatch, name):
    monkeypatch.setattr(launch, "processors", lambda device: 100)
    require_right(problem(SPECIAL[name]))


# ---- how arguments lie in memory -----------------------------------------------------------------------------------


def test_more_slots_than_are_merged_at_a_time(monkeypatch):
    monkeypatch.setattr(launch, "EXACT_TILE", 16)
    require_right(problem(Case(value=Format(rotation="hadamard"), exact=(2200,), heads=1)))


@pytest.mark.parametrize("processors", [0, 1, 2, 100])
def test_any_number_of_programs_gives_the_same(monkeypatch, processors):
    monkeypatch.setattr(launch, "processors", lambda device: processors)
    case = Case(Format(bits=2), Format(bits=3), block=64, blocks=9, exact=(4,), heads=2, dtype=torch.float32)
    require_right(problem(case))


def test_logits_of_learned_sinks_may_lie_apart():
    given = problem(Case(sink=True, heads=7, kv_heads=2))
    require_right(given._replace(sink=given.sink.repeat_interleave(2)[::2]))


def test_masks_of_any_strides_are_read_right():
    given = problem(Case(batch=2, heads=2, queries=2, mask="queries", exact=(9,), blocks=1))
    seen, shown = given.packed.visible, given.exact[0].visible
    by_token = seen.transpose(1, 2).contiguous().transpose(1, 2)
    for mask in (by_token, seen[:1].expand(2, -1, -1), seen[:, :1].expand(-1, 2, -1), seen[:, :1], seen[:1]):
        require_right(given._replace(packed=given.packed._replace(visible=mask)))
    segment = given.exact[0]._replace(visible=shown[:, :1].expand(-1, 2, -1))
    require_right(given._replace(exact=[segment]))


def test_angles_of_any_strides_are_read_right():
    given = problem(Case(Format(rope="pre"), batch=2, own_angles=True, blocks=1, heads=2))
    cos, sin = given.packed.angles
    by_channel = cos.transpose(1, 2).contiguous().transpose(1, 2)
    whole = [torch.cat([angle, angle], -1)[..., :32] for angle in (cos, sin)]
    longer = [torch.cat([angle, angle], 1) for angle in (cos, sin)]
    shared = cos[:1].expand(2, -1, -1)
    for angles in ((by_channel, sin), whole, longer, (shared, sin), (shared, sin[:1].expand(2, -1, -1))):
        require_right(given._replace(packed=given.packed._replace(angles=tuple(angles))))
    rounded = tuple(angle.half() for angle in (cos, sin))
    require_right(given._replace(packed=given.packed._replace(angles=rounded)))


def test_exact_tokens_of_any_strides_are_read_right():
    given = problem(Case(None, kv_heads=2, batch=2, exact=(9,), queries=2))
    segment = given.exact[0]
    by_token = segment._replace(key=segment.key.transpose(1, 2).contiguous().transpose(1, 2))
    by_channel = segment._replace(value=segment.value.transpose(2, 3).contiguous().transpose(2, 3))
    shared = segment._replace(
        key=segment.key[:1].expand(2, -1, -1, -1), value=segment.value[:, :1].expand(-1, 2, -1, -1)
    )
    for other in (by_token, by_channel, shared):
        require_right(given._replace(exact=[other]))


def test_every_row_of_very_different_queries_is_right():
    given = problem(Case(Format(bits=2), Format(bits=2), dtype=torch.float32, queries=3))
    given.query[:, 0] *= 1e3
    given.query[:, :, 1] *= 1e-3
    found, want = fused.attend(*given), expected(given)
    assert ((found - want).norm(dim=-1) / want.norm(dim=-1)).max() < 2 * TOLERANCE


def test_a_hidden_value_far_beyond_the_others_leaves_them_precise():
    given = problem(Case(first=1, exact=(), dtype=torch.float32))
    values = torch.randn(1, 1, 256, 64, generator=torch.Generator().manual_seed(0))
    values[:, :, 0] *= 1e4
    packed = quantize.encode(values, Format(), "value", 128)
    require_right(given._replace(packed=given.packed._replace(value=packed)))


def test_inputs_are_left_as_they_were():
    given = problem(Case(Format(outliers=1, rotation="hadamard"), exact=(4, 9), mask="queries", sink=True, queries=2))
    before = [tensor.clone() for tensor in tensors(given)]
    fused.attend(*given)
    assert all(torch.equal(old, new) for old, new in zip(before, tensors(given), strict=True))


def tensors(given: Problem) -> list[Tensor]:
    packed = [*given.packed.key.values(), *given.packed.value.values(), given.packed.visible]
    return [given.query, given.sink, *packed, *(part for segment in given.exact for part in segment[:3])]


# ---- what is refused -----------------------------------------------------------------------------------------------


ASKED = problem(Case(batch=2, kv_heads=2, heads=2, queries=3, mask="queries"))
BEFORE_ROPE = problem(Case(Format(rope="pre"), batch=2, own_angles=True, blocks=1))
KEYS, VALUES, SEEN, TAIL = ASKED.packed.key, ASKED.packed.value, ASKED.packed.visible, ASKED.exact[0]


def packed_with(given: Problem = ASKED, **fields) -> Problem:
    return given._replace(packed=given.packed._replace(**fields))


def exact_with(**fields) -> Problem:
    return ASKED._replace(exact=[TAIL._replace(**fields)])


def angles_with(change: Callable[[Tensor], Tensor]) -> Problem:
    return packed_with(BEFORE_ROPE, angles=tuple(change(angle) for angle in BEFORE_ROPE.packed.angles))


def first_of(buffers: dict[str, Tensor], dim: int) -> dict[str, Tensor]:
    return {name: tensor.narrow(dim, 0, 1).contiguous() for name, tensor in buffers.items()}


def format_with(**fields) -> Problem:
    return packed_with(formats=ASKED.packed.formats.model_copy(update={"key": Format(**fields)}))


def by_row(codes: Tensor) -> Tensor:
    return codes.transpose(-1, -2).contiguous().transpose(-1, -2)


REFUSED = {
    "a query of float64": (ASKED._replace(query=ASKED.query.double()), "query is torch.float64"),
    "a query of integers": (ASKED._replace(query=ASKED.query.long()), "query is torch.int64"),
    "nothing": (ASKED._replace(packed=None, exact=[]), "nothing to attend to"),
    "query heads that kv heads do not divide": (ASKED._replace(query=ASKED.query[:, :3]), "3 query heads"),
    "a query of another batch": (ASKED._replace(query=ASKED.query[:1]), "expected"),
    "a query of another batch than packed keys": (ASKED._replace(query=ASKED.query[:1], exact=[]), "key codes"),
    "a query of another head_dim": (ASKED._replace(query=ASKED.query[..., :32]), "head_dim 32"),
    "a query of another head_dim than packed keys": (
        ASKED._replace(query=ASKED.query[..., :32], exact=[]),
        "head_dim 32",
    ),
    "values of fewer blocks than keys": (packed_with(value=first_of(VALUES, 2)), "value codes"),
    "values of fewer heads than keys": (packed_with(value=first_of(VALUES, 1)), "value codes"),
    "exact keys of other heads": (exact_with(key=TAIL.key[:, :1], value=TAIL.value[:, :1]), "exact keys"),
    "exact keys of another head_dim": (exact_with(key=TAIL.key[..., :32]), "exact keys"),
    "exact keys of another batch": (exact_with(key=TAIL.key[:1], value=TAIL.value[:1]), "exact keys"),
    "exact values of another value_dim": (exact_with(value=TAIL.value[..., :32]), "exact keys"),
    "fewer exact values than keys": (exact_with(value=TAIL.value[:, :, :4]), "exact keys"),
    "a mask of bytes": (packed_with(visible=SEEN.byte()), "expected bool"),
    "a mask without queries": (packed_with(visible=SEEN[:, 0]), "expected bool"),
    "a mask of too few tokens": (packed_with(visible=SEEN[..., :-1]), "expected bool"),
    "a mask of other queries": (packed_with(visible=SEEN[:, :2]), "expected bool"),
    "a mask of another batch": (packed_with(visible=SEEN.repeat(2, 1, 1)), "expected bool"),
    "a mask of numbers for exact tokens": (exact_with(visible=TAIL.visible.float()), "expected bool"),
    "a mask of too few exact tokens": (exact_with(visible=TAIL.visible[..., 1:]), "expected bool"),
    "no angles": (packed_with(BEFORE_ROPE, angles=None), "cos and sin"),
    "angles of whole heads": (angles_with(lambda angle: angle.repeat(1, 1, 2)), "cos or sin"),
    "angles of too few tokens": (angles_with(lambda angle: angle[:, 1:]), "cos or sin"),
    "angles of another batch": (angles_with(lambda angle: angle.repeat(2, 1, 1)), "cos or sin"),
    "transposed codes": (packed_with(key={**KEYS, "codes": by_row(KEYS["codes"])}), "key codes .* contiguous"),
    "heads that share codes": (
        packed_with(value={**VALUES, "codes": VALUES["codes"][:, :1].expand(-1, 2, -1, -1, -1)}),
        "value codes .* contiguous",
    ),
    "buffers with room for different numbers of blocks": (
        packed_with(key={**KEYS, "codes": guarded(KEYS["codes"], 1)}),
        "one number is needed",
    ),
    "a count of 64 bits": (packed_with(held=torch.tensor([1])), "held is torch.int64"),
    "too few logits of learned sinks": (ASKED._replace(sink=torch.zeros(2)), "sink logits"),
    "codes that the kernels do not serve": (format_with(codes="exact"), "do not serve key codes='exact'"),
    "static scales without tables": (format_with(scale="static"), "tables with scale and zero"),
    "codebooks without tables": (format_with(codes="codebook"), "codebook"),
    "a query elsewhere": (ASKED._replace(query=ASKED.query.to("meta")), "query is on meta"),
    "codes elsewhere": (packed_with(key={**KEYS, "codes": KEYS["codes"].to("meta")}), "on .'meta'"),
    "a mask elsewhere": (packed_with(visible=SEEN.to("meta")), "on .'meta'"),
    "a count elsewhere": (packed_with(held=torch.ones(1, dtype=torch.int32, device="meta")), "on .'meta'"),
    "angles elsewhere": (angles_with(lambda angle: angle.to("meta")), "on .'meta'"),
    "exact tokens elsewhere": (exact_with(value=TAIL.value.to("meta")), "on .'meta'"),
    "logits of learned sinks elsewhere": (ASKED._replace(sink=torch.zeros(4, device="meta")), "on .'meta'"),
}


@pytest.mark.parametrize(("given", "message"), REFUSED.values(), ids=REFUSED)
def test_what_does_not_fit_is_refused(given, message):
    with pytest.raises(ValueError, match=message):
        fused.attend(*given)


UNSERVED = {
    "exact keys": ({"codes": "exact"}, {}, {}, "key codes='exact'"),
    "custom values": ({}, {"codes": "custom"}, {}, "value codes='custom'"),
    "codebooks of 8 bits": ({"codes": "codebook", "bits": 8}, {}, {}, "key codes='codebook' with 8 bits"),
    "codebooks of 8 bits for values": ({}, {"codes": "codebook", "bits": 8}, {}, "value codes='codebook' with 8 bits"),
    "many groups": ({"group": 8}, {}, {}, "key group=8"),
    "many groups of values": ({}, {"group": 8}, {}, "value group=8"),
    "values in small groups": ({}, {"group": 24}, {"value_dim": 96}, "value group=24"),
    "odd values": ({}, {}, {"value_dim": 72}, "value group=72"),
    "very wide keys": ({}, {}, {"head_dim": 512}, "key heads of 512"),
    "very wide values": ({}, {}, {"value_dim": 512}, "value heads of 512"),
    "channel scales of small blocks before RoPE": (
        {"scale": "channel", "rope": "pre"}, {}, {"block": 64}, "key scale='channel' before RoPE with block=64"
    ),
    "channel scales of small value blocks": (
        {}, {"scale": "channel"}, {"block": 64}, "value scale='channel' with block=64"
    ),
    "pairs of neighbours": ({"rope": "pre"}, {}, {"block_angles": False}, "rope='pre' of a model"),
    "keys before RoPE of an odd head": (
        {"rope": "pre", "bits": 2}, {}, {"head_dim": 72}, "rope='pre' with 2 bits and head_dim=72"
    ),
    "rotated keys before RoPE": ({"rope": "pre", "rotation": "hadamard"}, {}, {}, "rope='pre' with rotation"),
}  # fmt: skip


@pytest.mark.parametrize(("key", "value", "sizes", "sentence"), UNSERVED.values(), ids=UNSERVED)
def test_what_the_kernels_do_not_serve_is_named(key, value, sizes, sentence):
    sizes = {"block": 128, "head_dim": 128, "value_dim": 128, "block_angles": True} | sizes
    formats = LayerFormat(key=Format(**key), value=Format(**value), block=sizes["block"])
    found = fused.unserved(formats, sizes["head_dim"], sizes["value_dim"], sizes["block_angles"])
    assert found is not None
    assert sentence in found


@pytest.mark.parametrize("rope", ["post", "pre"])
@pytest.mark.parametrize(
    ("head_dim", "bits"),
    [(16, 4), (24, 3), (24, 8), (40, 4), (48, 2), (72, 8), (80, 2), (96, 3), (96, 2), (100, 4), (112, 4), (160, 2)],
)
def test_heads_of_any_size_are_refused_or_served(head_dim, bits, rope):
    case = Case(Format(bits=bits, rope=rope), head_dim=head_dim, value_dim=16, blocks=1, heads=1, exact=())
    formats = LayerFormat(key=case.key, value=case.value)
    if fused.unserved(formats, head_dim, 16) is None:
        require_right(problem(case))
    else:
        assert rope == "pre"
