"""The kernels as compiled for the GPU that is here: the same grid as in the interpreter, both forms of the code.

Most of the time is compiling; with pytest-xdist `-n 8` shares it. Under the memory checker, with allocations apart::

    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck --error-exitcode 1 \\
        python -m pytest tests/kernels/test_on_gpu.py -k "unusual or encode or pools"
"""

import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from cachequant.core.pools import RowPools
from cachequant.kernels import backend, fused, quantize
from cachequant.kernels.format import Format, LayerFormat, Side
from cachequant.kernels.fused import ExactSegment, PackedSegment
from cachequant.kernels.quantize import NO_TABLES, Tables

if not torch.cuda.is_available():
    pytest.skip("needs a GPU that torch computes on", allow_module_level=True)

sys.path.insert(0, str(Path(__file__).parent))
from grid import (
    FLOAT8,
    PAIRS,
    SPECIAL,
    TOLERANCE,
    Case,
    Problem,
    expected,
    on_device,
    poison_like,
    problem,
    relative_error,
)

from cachequant.kernels.triton import launch, rows

DEVICE = torch.device("cuda", torch.cuda.current_device())
FORMS = ["portable"] if torch.version.hip else ["assembly", "portable"]

HEADS, BLOCK, BLOCKS, DIM = 3, 128, 5, 128
FORMATS = {
    **{f"{bits} bits": Format(bits=bits) for bits in (2, 3, 4, 8)},
    **{f"{bits} bits by channel": Format(bits=bits, scale="channel") for bits in (2, 3, 4, 8)},
    "groups": Format(bits=2, group=32),
    "symmetric": Format(bits=4, symmetric=True),
    "midpoint": Format(bits=3, grid="midpoint"),
    "rotated": Format(bits=4, rotation="hadamard"),
    "rotated in blocks": Format(bits=4, rotation="hadamard", rotation_size=16),
    "8-bit floats": FLOAT8,
    "8-bit floats by channel": FLOAT8.model_copy(update={"scale": "channel"}),
    "static 8-bit floats": FLOAT8.model_copy(update={"scale": "static"}),
    "outliers": Format(bits=4, outliers=3, trim=1),
    "codebook": Format(bits=4, codes="codebook", outliers=2, trim=1),
    "static codebook": Format(bits=4, codes="codebook", scale="static", outliers=2),
}


@pytest.fixture(autouse=True)
def poisoned_and_without_fallback(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What kernels write to holds no number before, and whatever is left to torch is an error."""
    new_empty = Tensor.new_empty

    def poisoned(self: Tensor, *arguments: object, **options: object) -> Tensor:
        fresh = new_empty(self, *arguments, **options)
        return fresh.fill_(poison_like(fresh))

    assert backend.triton_serves(DEVICE), backend.triton_problem(DEVICE)
    monkeypatch.setattr(Tensor, "new_empty", poisoned)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        yield
    backend.warn_once.cache_clear()


@pytest.fixture(params=FORMS)
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Kernels with NVIDIA's assembly, and without."""
    if request.param == "portable":
        monkeypatch.setattr(launch, "assembly", lambda: False)
        monkeypatch.setattr(rows, "interpreted", lambda: True)
    return request.param


# ---- attention -----------------------------------------------------------------------------------------------------


def require_right(case: Case, tolerance: float = TOLERANCE) -> None:
    given = problem(case)
    here = on_device(given, DEVICE)
    found, want = fused.attend(*here), expected(given)
    assert found.dtype == given.query.dtype
    assert relative_error(found, want) < tolerance


@pytest.mark.parametrize("name", PAIRS)
def test_any_two_options_together_attend_as_decoded_tokens_do(form: str, name: str) -> None:
    require_right(PAIRS[name])


@pytest.mark.parametrize("name", SPECIAL)
def test_unusual_calls_attend_as_decoded_tokens_do(form: str, name: str) -> None:
    require_right(SPECIAL[name])


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("heads", [1, 4, 8, 16])
def test_long_contexts_are_split_without_a_seam(form: str, bits: int, heads: int) -> None:
    case = Case(Format(bits=bits), Format(bits=bits), blocks=77, kv_heads=2, heads=heads, head_dim=128, exact=(141,))
    require_right(case)


def test_bfloat16_queries_and_tails_attend_as_decoded_tokens_do(form: str) -> None:
    # outputs have eight digits
    require_right(Case(blocks=9, head_dim=128, exact=(4, 141), dtype=torch.bfloat16), 6e-3)


@pytest.mark.parametrize(
    "case",
    [
        Case(blocks=33, kv_heads=2, head_dim=128, exact=(4, 141)),
        Case(Format(bits=2, rotation="hadamard"), Format(bits=2, rotation="hadamard"), blocks=33, head_dim=128),
        Case(Format(scale="channel", rope="pre", outliers=2), Format(outliers=2), blocks=33, head_dim=128),
        Case(Format(bits=3), blocks=33, held=17, head_dim=128, mask="padding", batch=2),
    ],
    ids=["4-bit", "rotated", "before RoPE with outliers", "3-bit, some blocks held"],
)
def test_a_cuda_graph_replays_what_an_eager_call_gives(form: str, case: Case) -> None:
    here = on_device(problem(case), DEVICE)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        fused.attend(*here)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replayed = fused.attend(*here)
    for seed in (1, 2):
        torch.manual_seed(seed)
        here.query.normal_()
        replayed.fill_(torch.nan)
        graph.replay()
        assert torch.equal(replayed, fused.attend(*here))


def test_the_same_call_gives_the_same_bits(form: str) -> None:
    here = on_device(problem(Case(blocks=33, kv_heads=2, head_dim=128, exact=(4, 141))), DEVICE)
    assert torch.equal(fused.attend(*here), fused.attend(*here))


def test_blocks_beyond_two_to_the_31_words_are_read(form: str) -> None:
    heads, blocks = 68, 8192
    if torch.cuda.mem_get_info(DEVICE)[0] < 24 * 2**30:
        pytest.skip("needs 24 GiB of free memory")
    formats = LayerFormat(key=Format(bits=8), value=Format(bits=8))
    sides: dict[Side, dict[str, Tensor]] = {}
    for side in ("key", "value"):
        shapes = quantize.packed_shapes(Format(bits=8), side, DIM, BLOCK)
        sides[side] = {
            name: torch.empty((1, heads, blocks, *shape), dtype=dtype, device=DEVICE)
            for name, (shape, dtype) in shapes.items()
        }
        sides[side]["codes"].random_(-(2**31), 2**31 - 1)
        sides[side]["scales"].uniform_(0.001, 0.01)
    assert sides["key"]["codes"].numel() > 2**31
    query = torch.randn(1, heads, 1, DIM, device=DEVICE).half()
    tables: dict[Side, Tables] = {"key": NO_TABLES, "value": NO_TABLES}
    whole = fused.attend(query, PackedSegment(sides["key"], sides["value"], formats, tables), [], DIM**-0.5)
    last = {side: {name: tensor[:, -1:].clone() for name, tensor in named.items()} for side, named in sides.items()}
    alone = fused.attend(query[:, -1:], PackedSegment(last["key"], last["value"], formats, tables), [], DIM**-0.5)
    assert relative_error(whole[:, -1:], alone.double().cpu()) < 1e-3


def test_an_exact_cache_beyond_two_to_the_31_numbers_is_read() -> None:
    heads, tokens = 17, 1 << 20
    if torch.cuda.mem_get_info(DEVICE)[0] < 16 * 2**30:
        pytest.skip("needs 16 GiB of free memory")
    key, value = (torch.randn(1, heads, tokens, DIM, device=DEVICE, dtype=torch.float16) for _ in "kv")
    query = torch.randn(1, heads, 1, DIM, device=DEVICE).half()
    found = fused.attend(query, None, [ExactSegment(key, value)], DIM**-0.5)[:, -1:]
    want = torch.nn.functional.scaled_dot_product_attention(
        query[:, -1:].double(), key[:, -1:].double(), value[:, -1:].double()
    )
    assert relative_error(found, want.cpu()) < 2e-3


# ---- encoding and unpacking ----------------------------------------------------------------------------------------


def tables_of(fmt: Format) -> Tables:
    draw = torch.Generator().manual_seed(3)
    codebook = torch.rand(2**fmt.bits, generator=draw).mul_(1.8).sub_(0.9).sort().values
    if fmt.scale != "static":
        return Tables(codebook=codebook) if fmt.codes == "codebook" else NO_TABLES
    return Tables(codebook=codebook, scale=torch.rand(HEADS, DIM, generator=draw) + 2, zero=torch.zeros(HEADS, DIM))


def states_of(seed: int = 0) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(2, HEADS, BLOCKS * BLOCK, DIM, generator=draw) * torch.linspace(0.2, 3, DIM)


@pytest.mark.parametrize("side", ["key", "value"])
@pytest.mark.parametrize("name", FORMATS)
def test_encode_and_unpack_give_what_the_reference_gives(name: str, side: Side) -> None:
    fmt, tables, states = FORMATS[name], tables_of(FORMATS[name]), states_of()
    valid = torch.rand(2, BLOCKS * BLOCK, generator=torch.Generator().manual_seed(5)) > 0.05
    with backend.reference_only():
        want = quantize.encode(states, fmt, side, BLOCK, valid, tables)
    there = tables.to(DEVICE)
    found = quantize.encode(states.to(DEVICE), fmt, side, BLOCK, valid.to(DEVICE), there)
    unequal = 0
    for part, tensor in want.items():
        differs = found[part].cpu() != tensor
        if part == "outlier_index":
            # slots that correct nothing may be anywhere
            differs &= want["outlier_value"] != 0
        unequal += int(differs.sum())
    # sums of products are rounded otherwise here; rotation consists of them
    allowed = 2e-2 if fmt.rotation == "hadamard" else 1e-4
    assert unequal <= allowed * sum(tensor.numel() for tensor in want.values())
    held = {part: tensor.to(DEVICE) for part, tensor in want.items()}
    with backend.reference_only():
        truth = quantize.decode(want, fmt, side, DIM, BLOCK, tables, torch.float64)
    decoded = quantize.decode(held, fmt, side, DIM, BLOCK, there, torch.float32)
    assert relative_error(decoded, truth) < 3e-6


@pytest.mark.parametrize("side", ["key", "value"])
def test_what_is_decoded_by_its_norm_has_it(side: Side) -> None:
    fmt = Format(bits=3, codes="codebook", symmetric=True, unit="norm")
    tables, states = tables_of(fmt).to(DEVICE), states_of().to(DEVICE)
    packed = quantize.encode(states, fmt, side, BLOCK, tables=tables)
    decoded = quantize.decode(packed, fmt, side, DIM, BLOCK, tables)
    torch.testing.assert_close(decoded.norm(dim=-1), states.norm(dim=-1), rtol=2**-10, atol=0)


def test_a_captured_encode_writes_where_a_tensor_on_the_device_says() -> None:
    fmt, states = Format(bits=4), states_of()[:, :, :BLOCK].to(DEVICE)
    shapes = quantize.packed_shapes(fmt, "key", DIM, BLOCK)
    out = {
        name: torch.zeros((2, HEADS, 4, *shape), dtype=dtype, device=DEVICE) for name, (shape, dtype) in shapes.items()
    }
    at, when = torch.tensor(0, device=DEVICE), torch.tensor(1, dtype=torch.int32, device=DEVICE)
    quantize.encode(states, fmt, "key", BLOCK, out=out, at=at, when=when)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        quantize.encode(states, fmt, "key", BLOCK, out=out, at=at, when=when)
    for place, written in ((2, 1), (3, 0)):
        at.fill_(place)
        when.fill_(written)
        graph.replay()
        for tensor in out.values():
            assert torch.equal(tensor[:, :, place], tensor[:, :, 0]) == bool(written)


# ---- rows of mixed widths ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("trim", [0, 1], ids=["without outliers", "with outliers"])
@pytest.mark.parametrize("heads", [1, 4], ids=["a head's rows", "rows of all heads"])
def test_pools_give_what_their_dense_copy_gives(form: str, heads: int, trim: int) -> None:
    draw = torch.Generator().manual_seed(heads)
    owners, tokens, lines = 3, 500, 4
    formats = tuple(Format(bits=bits, grid="midpoint", trim=trim, outliers=2 * trim) for bits in (2, 3, 4, 8))
    states = torch.randn(owners, tokens, heads * DIM, generator=draw).to(DEVICE)
    widths = torch.tensor((0, 2, 3, 4, 8), dtype=torch.uint8)[torch.randint(5, (owners, tokens), generator=draw)]
    pools = RowPools(formats, owners, heads, DIM, states).rebuilt(widths.to(DEVICE), states, None)
    query = torch.randn(owners, heads, lines, DIM, generator=draw).to(DEVICE)
    dense = pools.dense(torch.float64).unflatten(-1, (heads, DIM)).transpose(1, 2)
    scores, kept = pools.scores(query), (widths > 0).to(DEVICE)[:, None, None].expand(-1, heads, lines, -1)
    assert torch.equal(scores.isfinite(), kept)
    want = query.double() @ dense.transpose(-1, -2)
    assert relative_error(scores[kept], want[kept].cpu()) < 1e-3
    weights = torch.softmax(scores * DIM**-0.5, dim=-1)
    assert relative_error(pools.mix(weights), (weights.double() @ dense).cpu()) < 1e-3


def test_a_problem_on_the_device_is_the_same_problem() -> None:
    given = problem(SPECIAL["sinks and a tail"])
    here = on_device(given, DEVICE)
    assert isinstance(here, Problem)
    assert torch.equal(expected(on_device(here, torch.device("cpu"))), expected(given))
