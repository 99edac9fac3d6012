"""Attention of one decoding step over one layer, against the best that reads a 16-bit cache."""

from collections.abc import Callable, Iterator
from importlib import import_module
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ... import registry
from ...core import LayerSpec
from ...kernels.format import Format, MixedFormat, Side, row_bits
from ...kernels.fused import ExactSegment, PackedSegment, attend, unserved
from ...kernels.quantize import Tables
from ...kernels.rows import Run, encode_rows, run_mix, run_scores, runs_served
from .cases import SIDES, angles, fill_random, fitted, packed_bytes, random_packed, timed_formats
from .machine import Clock, Machine, in_parallel
from .results import AttentionTiming, message

HEAD_DIM = 128
QAQ = "QAQ pools 8/4/2-bit"
# tokens of each width, of ten: 4.2 bits on average
POOLED = {8: 2, 4: 5, 2: 3}
# rows of an owner begin at multiples of this
POOL_ROWS = 32

# seconds that one shape may take with everything compiled
SHAPE_SECONDS = 6.0
# share of the section's time that compiling beforehand may take
PREPARING = 0.45
# buffers of this size are allocated by several processes at once
PREPARED_BYTES = 3e9


class Shape(NamedTuple):
    """What is attended to. group: query heads per kv head."""

    batch: int
    kv_heads: int
    group: int
    tokens: int

    @property
    def token_heads(self) -> int:
        """Tokens times kv heads, over the batch."""
        return self.batch * self.kv_heads * self.tokens

    def __str__(self) -> str:
        return f"{self.tokens} tokens, batch {self.batch}, {self.kv_heads} kv heads x {self.group}"


K = 1024
SHAPES = (
    Shape(1, 8, 4, 128 * K),
    Shape(8, 8, 4, 32 * K),
    Shape(1, 32, 1, 128 * K),
    Shape(1, 8, 4, 32 * K),
    Shape(1, 8, 4, 1024 * K),
    Shape(1, 32, 1, 32 * K),
    Shape(1, 8, 4, 8 * K),
    Shape(32, 8, 4, 8 * K),
    Shape(1, 32, 1, 8 * K),
    Shape(1, 8, 4, 4 * K),
    Shape(8, 32, 1, 8 * K),
    Shape(1, 32, 1, 1024 * K),
    Shape(1, 8, 4, 512 * K),
)
DRY_SHAPES = (Shape(1, 1, 4, 256),)


class Contender(NamedTuple):
    """make: given how many, calls that each read inputs of their own. size: bytes each reads of the cache."""

    name: str
    sixteen_bit: bool
    size: int
    make: Callable[[int], list[Callable[[], object]]]


def run(machine: Machine, read_tb_s: float | None) -> Iterator[list[AttentionTiming] | str]:
    """The timings of one shape after the other; sentences about what failed or had to be left out."""
    shapes = DRY_SHAPES if machine.dry else SHAPES
    yield from prepare(machine, shapes)
    for number, shape in enumerate(shapes):
        if machine.clock.left() < (0 if machine.dry else SHAPE_SECONDS):
            for other in shapes[number:]:
                yield f"attention over {other}: the section's time was up"
            return
        timings: list[AttentionTiming] = []
        for contender in contenders(machine, shape):
            if not machine.room(contender.size * machine.sets(contender.size)):
                yield f"attention over {shape}, {contender.name}: does not fit the device's memory"
                continue
            try:
                taken = _microseconds(machine, contender)
            except Exception as error:  # baselines refuse shapes in ways of their own
                yield f"failed: attention over {shape}, {contender.name}: {message(error)}"
                continue
            timings.append(_timing(shape, contender, taken, read_tb_s))
        machine.free()
        yield with_ratios(timings)


def _microseconds(machine: Machine, contender: Contender) -> float | None:
    # of its own, so that inputs are let go with it
    return machine.microseconds(contender.make(machine.sets(contender.size)))


def with_ratios(timings: list[AttentionTiming]) -> list[AttentionTiming]:
    """The same, compared with the best that read 16 bits."""
    best = min((each.us for each in timings if each.sixteen_bit and each.us is not None), default=None)
    return [
        each if best is None or each.us is None else each.model_copy(update={"ratio": best / each.us})
        for each in timings
    ]


def _timing(shape: Shape, contender: Contender, us: float | None, read_tb_s: float | None) -> AttentionTiming:
    speed = None if us is None else contender.size / us / 1e6
    return AttentionTiming(
        batch=shape.batch,
        kv_heads=shape.kv_heads,
        group=shape.group,
        tokens=shape.tokens,
        contender=contender.name,
        sixteen_bit=contender.sixteen_bit,
        bytes=contender.size,
        us=us,
        tb_s=speed,
        share=None if speed is None or read_tb_s is None else speed / read_tb_s,
        ratio=None,
    )


def contenders(machine: Machine, shape: Shape) -> Iterator[Contender]:
    """Baselines first."""
    yield from _baselines(machine, shape)
    for name in timed_formats():
        yield _fused(machine, shape, name)
    yield _pooled(machine, shape)


# ---- compiling beforehand --------------------------------------------------------------------------------------------


class Task(NamedTuple):
    """One contender at all shapes, for one process."""

    shapes: tuple[Shape, ...]
    name: str
    device: str


def prepare(machine: Machine, shapes: tuple[Shape, ...]) -> Iterator[str]:
    """Have several processes compile what will be timed, so that this one finds it in the compiler's cache."""
    if machine.dry:
        return
    small = tuple(shape for shape in shapes if shape.token_heads * 264 < PREPARED_BYTES)
    tasks = [Task(small, name, str(machine.device)) for name in [*timed_formats(), QAQ]]
    for task, found in in_parallel(compiled, tasks, machine, PREPARING):
        if found:
            yield f"failed: compiling {task.name}: {found}"


def compiled(task: Task) -> str | None:
    """In another process: run a contender once at every shape. Returns what went wrong."""
    machine = Machine(torch.device(task.device), Clock(60, {}))
    with torch.inference_mode():
        try:
            for shape in task.shapes:
                chosen = _pooled(machine, shape) if task.name == QAQ else _fused(machine, shape, task.name)
                chosen.make(1)[0]()
                machine.free()
        except torch.OutOfMemoryError:
            return None  # compiled when it is timed
        except Exception as error:
            return message(error)
    return None


# ---- 16 bits ---------------------------------------------------------------------------------------------------------


def _baselines(machine: Machine, shape: Shape) -> Iterator[Contender]:
    size = shape.token_heads * 4 * HEAD_DIM
    dtype = torch.float16

    def states(count: int, *inner: int) -> Tensor:
        return torch.randn(count, *inner, HEAD_DIM, device=machine.device, dtype=dtype)

    def inputs(count: int) -> tuple[Tensor, Tensor, Tensor]:
        held = (shape.batch, shape.kv_heads, shape.tokens)
        query = states(count, shape.batch, shape.kv_heads * shape.group, 1)
        return query, states(count, *held), states(count, *held)

    def folded(backend: SDPBackend | None) -> Callable[[int], list[Callable[[], object]]]:
        def make(count: int) -> list[Callable[[], object]]:
            def call(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
                query = query.view(shape.batch, shape.kv_heads, shape.group, HEAD_DIM)
                if backend is None:
                    return F.scaled_dot_product_attention(query, key, value)
                with sdpa_kernel(backend):
                    return F.scaled_dot_product_attention(query, key, value)

            return [lambda x=x: call(*x) for x in zip(*inputs(count), strict=True)]

        return make

    def grouped(count: int) -> list[Callable[[], object]]:
        return [
            lambda q=q, k=k, v=v: F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
            for q, k, v in zip(*inputs(count), strict=True)
        ]

    def ours(count: int) -> list[Callable[[], object]]:
        return [
            lambda q=q, k=k, v=v: attend(q, None, [ExactSegment(k, v)], HEAD_DIM**-0.5)
            for q, k, v in zip(*inputs(count), strict=True)
        ]

    yield Contender("SDPA, heads folded", True, size, folded(None))
    if not machine.dry:
        yield Contender("SDPA flash, heads folded", True, size, folded(SDPBackend.FLASH_ATTENTION))
        yield Contender("SDPA cuDNN, heads folded", True, size, folded(SDPBackend.CUDNN_ATTENTION))
    if shape.group > 1:
        yield Contender("SDPA, enable_gqa", True, size, grouped)
    flash = flash_attention()
    if flash is not None and not machine.dry:

        def flashed(count: int) -> list[Callable[[], object]]:
            held = (shape.batch, shape.tokens, shape.kv_heads)
            query = states(count, shape.batch, 1, shape.kv_heads * shape.group)
            return [
                lambda q=q, k=k, v=v: flash.call(q, k, v)
                for q, k, v in zip(query, states(count, *held), states(count, *held), strict=True)
            ]

        yield Contender(flash.name, True, size, flashed)
    yield Contender("Triton float16, ours", True, size, ours)


class Flash(NamedTuple):
    """call: `(query, key, value)`, each `[batch, tokens, heads, head_dim]`."""

    name: str
    call: Any


def flash_attention() -> Flash | None:
    """The newest FlashAttention that can be imported."""
    for module, name in (("flash_attn_interface", "FlashAttention 3"), ("flash_attn", "FlashAttention 2")):
        try:
            return Flash(name, import_module(module).flash_attn_with_kvcache)
        except Exception:  # a broken build raises anything
            continue
    return None


# ---- packed ----------------------------------------------------------------------------------------------------------


def _fused(machine: Machine, shape: Shape, name: str) -> Contender:
    formats = timed_formats()[name]
    size = packed_bytes(formats, HEAD_DIM, shape.token_heads)
    before_rope = formats.key.rope == "pre"
    if before_rope:
        size += 2 * shape.tokens * HEAD_DIM

    def make(count: int) -> list[Callable[[], object]]:
        problem = unserved(formats, HEAD_DIM, HEAD_DIM)
        if problem is not None:
            raise NotImplementedError(f"not served: {problem}")
        device = machine.device
        tables: dict[Side, Tables] = {
            side: fitted(getattr(formats, side), shape.kv_heads, HEAD_DIM, device) for side in SIDES
        }
        leading = (count * shape.batch, shape.kv_heads, shape.tokens // formats.block)
        packed = random_packed(formats, leading, HEAD_DIM, device)
        turned = angles(shape.tokens, HEAD_DIM, device, torch.bfloat16) if before_rope else None
        heads = shape.kv_heads * shape.group
        query = torch.randn(count, shape.batch, heads, 1, HEAD_DIM, device=device).half()
        calls = []
        for index in range(count):
            rows = slice(index * shape.batch, (index + 1) * shape.batch)
            key, value = ({name: t[rows] for name, t in packed[side].items()} for side in SIDES)
            segment = PackedSegment(key, value, formats, tables, angles=turned)
            calls.append(lambda q=query[index], s=segment: attend(q, s, [], HEAD_DIM**-0.5))
        return calls

    return Contender(name, False, size, make)


def _pooled(machine: Machine, shape: Shape) -> Contender:
    """Rows of three widths: scores, softmax and mix, as QAQ's layers compute them."""
    strategy = registry.parse("qaq:granularity=head")
    formats = strategy.formats(LayerSpec(0, 1, shape.kv_heads, HEAD_DIM, HEAD_DIM))
    assert isinstance(formats, MixedFormat)
    owners = shape.batch * shape.kv_heads
    chosen = {side: [fmt for fmt in getattr(formats, side) if row_bits(fmt) in POOLED] for side in SIDES}
    size = 0
    for side in SIDES:
        for fmt in chosen[side]:
            share = POOLED[fmt.bits] / sum(POOLED.values())
            size += round(fmt.bytes_per_token("key", HEAD_DIM, 1, 2) * share * shape.token_heads)

    def make(count: int) -> list[Callable[[], object]]:
        query = torch.randn(count, owners, 1, shape.group, HEAD_DIM, device=machine.device).half()
        if not runs_served(query[0], [*chosen["key"], *chosen["value"]], HEAD_DIM):
            raise NotImplementedError("not served: rows of these widths")
        # which token is of which width, alike for all owners
        width = torch.tensor([bits for bits, number in POOLED.items() for _ in range(number)])
        width = width[torch.randperm(len(width), generator=torch.Generator().manual_seed(0))]
        width = width.repeat(-(-shape.tokens // len(width)))[: shape.tokens]
        sets = [
            {side: [random_run(fmt, width, owners, machine) for fmt in chosen[side]] for side in SIDES} for _ in query
        ]

        def call(q: Tensor, runs: dict[Any, list[Run]]) -> Tensor:
            weights = torch.softmax(run_scores(q, runs["key"], shape.tokens) * HEAD_DIM**-0.5, dim=-1)
            return run_mix(weights, runs["value"], HEAD_DIM)

        return [lambda q=q, r=r: call(q, r) for q, r in zip(query, sets, strict=True)]

    return Contender(QAQ, False, size, make)


def random_run(fmt: Format, width: Tensor, owners: int, machine: Machine) -> Run:
    """Random rows of all tokens that have the width of `fmt`, of as many owners."""
    tokens = (width == fmt.bits).nonzero().squeeze(1).int()
    count = -(-len(tokens) // POOL_ROWS) * POOL_ROWS
    padded = F.pad(tokens, (0, count - len(tokens)), value=-1).repeat(owners).to(machine.device)
    like = encode_rows(torch.zeros(1, HEAD_DIM, device=machine.device), fmt)
    rows = {
        name: torch.empty(owners * count, *t.shape[1:], dtype=t.dtype, device=machine.device)
        for name, t in like.items()
    }
    fill_random(rows, HEAD_DIM)
    starts = torch.arange(owners + 1, dtype=torch.int32, device=machine.device) * count
    peak = float(rows["outlier_value"].abs().max()) if fmt.outliers else 0.0
    return Run(fmt, rows, starts, padded, count, peak)
