"""What is checked and timed: formats by name, packed segments of them, and the float64 truth about attention."""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from ... import registry
from ...core import LayerSpec
from ...kernels import quantize
from ...kernels.backend import reference_only
from ...kernels.format import Format, LayerFormat, Side
from ...kernels.fused import ExactSegment, PackedSegment, attend
from ...kernels.quantize import Tables, packed_shapes

SIDES: tuple[Side, Side] = ("key", "value")
KEPT = 0.01  # share of numbers that KVQuant keeps exact


def uniform(bits: int, value_bits: int | None = None, **options: object) -> LayerFormat:
    """Affine codes with a scale and zero per token, unless `options` of both sides say otherwise."""
    key = Format.model_validate({"bits": bits, **options})
    value = Format.model_validate({"bits": value_bits or bits, **options, "rope": "post"})
    return LayerFormat(key=key, value=value)


def kvquant(bits: int = 4, rope: str = "post") -> LayerFormat:
    """The formats of the strategy `kvquant` with its defaults, for heads of 128."""
    return described(f"kvquant:bits={bits},outliers={KEPT},key_rope={rope}")


def described(spec: str) -> LayerFormat:
    """The formats of a strategy by its spec, for heads of 128."""
    formats = registry.parse(spec).formats(LayerSpec(0, 1, 8, 128, 128))
    assert isinstance(formats, LayerFormat)
    return formats


def timed_formats() -> dict[str, LayerFormat]:
    """What strategies are timed with."""
    return {
        "uniform 4-bit": uniform(4),
        "uniform 2-bit": uniform(2),
        "uniform 3-bit": uniform(3),
        "uniform 8-bit": uniform(8),
        "kvquant 4-bit 1% post-RoPE": kvquant(4, "post"),
        "kvquant 4-bit 1% pre-RoPE": kvquant(4, "pre"),
        "per-channel keys 2-bit": LayerFormat(key=Format(bits=2, scale="channel"), value=Format(bits=2)),
        "fp8": described("fp8"),
        "kivi 2-bit": described("kivi"),
        "rotated 4-bit, blocks of 16": described("rotated:rotate=both"),
        "turboquant 4-bit": described("turboquant:boundary_layers=0"),
    }


def fitted(fmt: Format, kv_heads: int, head_dim: int, device: torch.device, seed: int = 0) -> Tables:
    """Tables such as a calibration gives, for what a format reads of them."""
    generator = torch.Generator().manual_seed(seed)
    named: dict[str, Tensor] = {}
    if fmt.codes == "codebook":
        inner = torch.rand(2**fmt.bits - 2, generator=generator) * 1.8 - 0.9
        named["codebook"] = torch.cat([inner, torch.tensor([-1.0, 1.0])]).sort().values
    if fmt.scale == "static":
        named["scale"] = 0.5 + torch.rand(kv_heads, head_dim, generator=generator)
        if fmt.codes == "affine":
            named["scale"] *= 4 / (2**fmt.bits - 1)
        named["zero"] = torch.randn(kv_heads, head_dim, generator=generator) * 0.2 - (2 if fmt.codes == "affine" else 0)
    return Tables(**named).to(device)


def angles(tokens: int, head_dim: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin `[1, tokens, head_dim / 2]` of RoPE with base 500000."""
    frequencies = 5e5 ** -(torch.arange(head_dim // 2, dtype=torch.float64) / (head_dim // 2))
    phases = torch.arange(tokens, dtype=torch.float64)[:, None] * frequencies
    return phases.cos()[None].to(device, dtype), phases.sin()[None].to(device, dtype)


# ---- random packed data, for timing ----------------------------------------------------------------------------------


def fill_random(named: Mapping[str, Tensor], length: int) -> None:
    """Overwrite packed buffers: any words are codes. length: numbers of a packed row."""
    for name, tensor in named.items():
        if name == "codes":
            tensor.random_(-(2**31), 2**31 - 1)
        elif name == "outlier_index":
            tensor.random_(0, length)
        elif name == "scales":
            tensor.uniform_(0.01, 0.1)
        else:
            tensor.normal_(0, 0.1)


def random_packed(
    formats: LayerFormat, leading: tuple[int, int, int], head_dim: int, device: torch.device
) -> dict[Side, dict[str, Tensor]]:
    """Packed blocks `[*leading, ...]`, leading being batch, kv heads and blocks, of random data."""
    sides: dict[Side, dict[str, Tensor]] = {}
    for side in SIDES:
        shapes = packed_shapes(getattr(formats, side), side, head_dim, formats.block)
        sides[side] = {
            name: torch.empty((*leading, *shape), dtype=dtype, device=device) for name, (shape, dtype) in shapes.items()
        }
        fill_random(sides[side], head_dim if side == "key" else formats.block)
    return sides


def packed_bytes(formats: LayerFormat, head_dim: int, token_heads: int) -> int:
    """Of keys and values of so many tokens times kv heads."""
    return round(formats.bytes_per_token(head_dim, head_dim, 2) * token_heads)


# ---- correctness -----------------------------------------------------------------------------------------------------


class Case(NamedTuple):
    """One decoding step, or `queries` of a chunk, over packed blocks."""

    name: str
    formats: LayerFormat
    group: int = 4
    head_dim: int = 128
    kv_heads: int = 2
    batch: int = 1
    queries: int = 1
    exact: int = 0
    """Exact tokens behind the packed ones."""
    first: int = 0
    masked: bool = False
    softcap: float | None = None
    dtype: torch.dtype = torch.float16
    stored: bool = False
    """Encoding and unpacking are checked too."""
    dry: bool = False
    """One of the few that a dry run takes."""


def grid() -> list[Case]:
    """Every option of the formats, and of attention; the ones that matter most first."""
    found = [
        Case(f"uniform {bits}-bit, {group} queries a head", uniform(bits), group, stored=group == 4, dry=group == 4)
        for group in (4, 1, 8)
        for bits in (4, 2, 3, 8)
    ]
    static = Format(bits=4, scale="static", codes="codebook")
    float8 = Format(bits=8, codes="float8", symmetric=True)
    found += [
        Case("kvquant 4-bit post-RoPE", kvquant(4, "post"), stored=True, dry=True),
        Case("kvquant 4-bit pre-RoPE", kvquant(4, "pre"), dry=True),
        Case("kvquant 3-bit post-RoPE", kvquant(3, "post"), stored=True),
        Case("kvquant 3-bit pre-RoPE", kvquant(3, "pre")),
        Case("kvquant 2-bit post-RoPE", kvquant(2, "post")),
        Case("kvquant 2-bit pre-RoPE", kvquant(2, "pre")),
        Case("keys 4, values 2 bits", uniform(4, 2)),
        Case("keys 8, values 3 bits", uniform(8, 3)),
        Case(
            "keys per channel 2-bit", LayerFormat(key=Format(bits=2, scale="channel"), value=Format(bits=2, group=64))
        ),
        Case("both per channel 4-bit", uniform(4, scale="channel"), stored=True, dry=True),
        Case("per channel pre-RoPE 4-bit", LayerFormat(key=Format(scale="channel", rope="pre"), value=Format())),
        Case("group 32, 4-bit", uniform(4, group=32), stored=True),
        Case("group 64, 2-bit", uniform(2, group=64)),
        Case("symmetric 4-bit", uniform(4, symmetric=True), stored=True),
        Case("static keys 4-bit", LayerFormat(key=Format(scale="static"), value=Format())),
        Case("codebook 4-bit", LayerFormat(key=static, value=Format(codes="codebook")), group=1),
        Case("outliers 4-bit", uniform(4, outliers=2), group=8, stored=True),
        Case("midpoint grid 4-bit", uniform(4, grid="midpoint"), stored=True),
        Case("Hadamard 4-bit", uniform(4, rotation="hadamard"), stored=True),
        Case("fp8", described("fp8"), stored=True),
        Case("fp8, 16 queries a head", described("fp8"), group=16),
        Case("fp8, one scale", described("fp8:scale=tensor"), stored=True),
        Case("fp8 keys pre-RoPE", LayerFormat(key=float8.model_copy(update={"rope": "pre"}), value=float8)),
        Case("fp8 per channel", uniform(8, codes="float8", symmetric=True, scale="channel"), head_dim=64),
        Case("kivi 2-bit", described("kivi"), stored=True),
        Case("kivi 4-bit, groups of 64", described("kivi:bits=4,group_size=64"), exact=5),
        Case("Hadamard in blocks of 16, 4-bit", described("rotated:rotate=both"), stored=True),
        Case("turboquant 4-bit", described("turboquant:boundary_layers=0"), stored=True),
        Case("turboquant, fp8 keys", described("turboquant_k8v4:boundary_layers=0")),
        Case("turboquant 3-bit", described("turboquant_3bit_nc:boundary_layers=0"), head_dim=64),
        Case("head_dim 64, 4-bit", uniform(4), head_dim=64, dry=True),
        Case("head_dim 64, 2-bit", uniform(2), head_dim=64),
        Case("head_dim 96, 4-bit", uniform(4), head_dim=96),
        Case("head_dim 256, 4-bit", uniform(4), head_dim=256),
        Case("block 32, 4-bit", uniform(4).model_copy(update={"block": 32})),
        Case("block 256, 2-bit", uniform(2).model_copy(update={"block": 256})),
        Case("16 queries a head", uniform(4), group=16),
        Case("7 queries a head", uniform(4), group=7),
        Case("masked batch and exact tail", uniform(4), batch=2, masked=True, exact=77, dry=True),
        Case("hidden first tokens, softcap", uniform(2), first=5, exact=1, softcap=20.0),
        Case("chunk of 9 queries", uniform(4), queries=9, exact=140),
        Case("chunk of 64 queries, kvquant pre-RoPE", kvquant(4, "pre"), queries=64, exact=64, masked=True),
        Case("bfloat16 query", uniform(4), dtype=torch.bfloat16, exact=77),
    ]
    return found


class Made(NamedTuple):
    """A case with its data."""

    case: Case
    states: dict[Side, Tensor]
    """What was packed, float32 on the CPU."""
    query: Tensor
    packed: PackedSegment
    exact: list[ExactSegment]
    truth: Tensor
    """Float64, on the device."""

    def attend(self) -> Tensor:
        """By the fused kernels."""
        return attend(self.query, self.packed, self.exact, self.scaling, self.case.softcap)

    @property
    def scaling(self) -> float:
        """Of the scores."""
        return self.case.head_dim**-0.5


def made(case: Case, blocks: int, device: torch.device, seed: int = 0) -> Made:
    """Data of a case over so many blocks, encoded by the reference on the CPU."""
    generator = torch.Generator().manual_seed(seed)
    tokens, dim = blocks * case.formats.block, case.head_dim
    shape = (case.batch, case.kv_heads, tokens, dim)
    # channels of keys differ in size, as those of models do
    sizes = 0.5 + 1.5 * torch.rand(dim, generator=generator)
    states: dict[Side, Tensor] = {
        "key": torch.randn(shape, generator=generator) * sizes,
        "value": torch.randn(shape, generator=generator),
    }
    tables: dict[Side, Tables] = {}
    packed: dict[Side, dict[str, Tensor]] = {}
    for number, side in enumerate(SIDES):
        fmt = getattr(case.formats, side)
        here = fitted(fmt, case.kv_heads, dim, torch.device("cpu"), seed + number)
        with reference_only():
            found = quantize.encode(states[side], fmt, side, case.formats.block, tables=here)
        packed[side] = {name: tensor.to(device) for name, tensor in found.items()}
        tables[side] = here.to(device)
    query = torch.randn(case.batch, case.kv_heads * case.group, case.queries, dim, generator=generator)
    pairs = angles(tokens, dim, device, torch.bfloat16 if case.dtype == torch.bfloat16 else torch.float32)
    visible = None
    if case.masked:
        # left padding of all rows but the first, and holes
        begins = torch.arange(case.batch)[:, None] * 37
        seen = (torch.arange(tokens + case.exact) >= begins) & (
            torch.rand(tokens + case.exact, generator=generator) > 0.1
        )
        seen[:, -1] = True
        visible = seen[:, None].to(device)
    segment = PackedSegment(
        packed["key"],
        packed["value"],
        case.formats,
        tables,
        first=case.first,
        visible=None if visible is None else visible[..., :tokens],
        angles=pairs if case.formats.key.rope == "pre" else None,
    )
    exact = []
    if case.exact:
        key, value = torch.randn(2, case.batch, case.kv_heads, case.exact, dim, generator=generator).to(
            device, case.dtype
        )
        later = None if visible is None else visible[..., tokens:]
        exact = [ExactSegment(key, value, later, causal=case.queries > 1)]
    query = query.to(device, case.dtype)
    return Made(case, states, query, segment, exact, truth(case, query, segment, exact))


def truth(case: Case, query: Tensor, packed: PackedSegment, exact: list[ExactSegment]) -> Tensor:
    """Attention in float64 over what the packed blocks decode to, as `fused.attend` returns it."""
    sides: dict[Side, Tensor] = {}
    held = {"key": packed.key, "value": packed.value}
    for side in SIDES:
        fmt, dim = getattr(case.formats, side), case.head_dim
        with reference_only():
            sides[side] = quantize.decode(
                held[side], fmt, side, dim, case.formats.block, packed.tables[side], torch.float64
            )
    if packed.angles is not None:
        cos, sin = (each.double()[:, None] for each in packed.angles)
        low, high = sides["key"].chunk(2, dim=-1)
        sides["key"] = torch.cat([low * cos - high * sin, high * cos + low * sin], dim=-1)
    key, value = sides["key"], sides["value"]
    tokens = key.shape[2]
    hidden = torch.zeros(case.batch, case.queries, tokens, dtype=torch.bool, device=query.device)
    hidden[..., : case.first] = True
    if packed.visible is not None:
        hidden |= ~packed.visible
    for segment in exact:
        unseen = torch.zeros(case.batch, case.queries, segment.key.shape[2], dtype=torch.bool, device=query.device)
        if segment.visible is not None:
            unseen |= ~segment.visible
        if segment.causal:
            newest = segment.key.shape[2] - case.queries + torch.arange(case.queries, device=query.device)
            unseen |= torch.arange(segment.key.shape[2], device=query.device) > newest[:, None]
        key, value = torch.cat([key, segment.key.double()], 2), torch.cat([value, segment.value.double()], 2)
        hidden = torch.cat([hidden, unseen], dim=-1)
    rows = query.double().unflatten(1, (case.kv_heads, -1)) * case.head_dim**-0.5
    # [batch, kv_heads, group, queries, keys]
    scores = rows @ key.unsqueeze(2).transpose(-1, -2)
    if case.softcap is not None:
        scores = case.softcap * torch.tanh(scores / case.softcap)
    scores = scores.masked_fill(hidden[:, None, None], -torch.inf)
    return (torch.softmax(scores, dim=-1) @ value.unsqueeze(2)).flatten(1, 2)
