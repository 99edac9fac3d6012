"""How long a layer's prompt takes to be packed, beside what else a prompt costs."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F

from ...kernels import quantize
from ...kernels.format import LayerFormat
from .attention import HEAD_DIM
from .cases import SIDES, fitted, timed_formats
from .machine import Machine
from .results import EncodeTiming, message

# of Llama-3.1-8B
KV_HEADS, QUERY_HEADS, HIDDEN, INTERMEDIATE = 8, 32, 4096, 14336
TOKENS = 32 * 1024
SECONDS = 6.0


def run(machine: Machine) -> Iterator[EncodeTiming | str]:
    """One strategy after the other; sentences about what failed or had to be left out."""
    tokens = 256 if machine.dry else TOKENS
    kv_heads = 1 if machine.dry else KV_HEADS
    attention, products = (None, None) if machine.dry else prefill(machine, tokens)
    if attention is not None and products is not None:
        yield (
            f"note: causal attention over {tokens} tokens of a layer of Llama-3.1-8B takes {attention:.2f} ms (SDPA), "
            f"its matrix products {products:.2f} ms"
        )
    for name, formats in timed_formats().items():
        if machine.clock.left() < (0 if machine.dry else SECONDS):
            yield f"encoding, {name}: the section's time was up"
            continue
        try:
            taken = _encode(machine, formats, tokens, kv_heads)
        except Exception as error:
            yield f"failed: encoding, {name}: {message(error)}"
            continue
        ms = None if taken is None else taken / 1e3
        layer = None if attention is None or products is None else attention + products
        yield EncodeTiming(
            strategy=name,
            tokens=tokens,
            kv_heads=kv_heads,
            ms=ms,
            ms_per_million=None if ms is None else ms * 1e6 / (tokens * kv_heads),
            share_of_attention=None if ms is None or attention is None else ms / attention,
            share_of_layer=None if ms is None or layer is None else ms / layer,
        )
        machine.free()


def _encode(machine: Machine, formats: LayerFormat, tokens: int, kv_heads: int) -> float | None:
    """Microseconds for keys and values, written to buffers that are there already."""
    device = machine.device
    states = torch.float16 if machine.dry else torch.bfloat16  # the interpreter has no bfloat16 to rely on
    calls = []
    for _ in range(machine.sets(4 * tokens * kv_heads * HEAD_DIM)):
        work = []
        for side in SIDES:
            fmt, block = getattr(formats, side), formats.block
            numbers = torch.randn(1, kv_heads, tokens, HEAD_DIM, device=device).to(states)
            shapes = quantize.packed_shapes(fmt, side, HEAD_DIM, block)
            out = {
                name: torch.empty((1, kv_heads, tokens // block, *shape), dtype=dtype, device=device)
                for name, (shape, dtype) in shapes.items()
            }
            work.append((numbers, fmt, side, block, None, fitted(fmt, kv_heads, HEAD_DIM, device), out))
        calls.append(lambda work=work: [quantize.encode(*arguments) for arguments in work])
    return machine.microseconds(calls)


def prefill(machine: Machine, tokens: int) -> tuple[float, float]:
    """Milliseconds of causal attention and of the matrix products of one layer."""
    device, dtype = machine.device, torch.bfloat16

    def states(heads: int) -> torch.Tensor:
        return torch.randn(1, heads, tokens, HEAD_DIM, device=device, dtype=dtype)

    query, key, value = states(QUERY_HEADS), states(KV_HEADS), states(KV_HEADS)
    attention = machine.microseconds(
        [lambda: F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)]
    )
    hidden = torch.randn(tokens, HIDDEN, device=device, dtype=dtype)
    wide = torch.randn(tokens, INTERMEDIATE, device=device, dtype=dtype)
    heads = (QUERY_HEADS + 2 * KV_HEADS) * HEAD_DIM
    weights = [torch.randn(out, HIDDEN, device=device, dtype=dtype) for out in (heads, HIDDEN, 2 * INTERMEDIATE)]
    down = torch.randn(HIDDEN, INTERMEDIATE, device=device, dtype=dtype)
    products = machine.microseconds([lambda: [*(F.linear(hidden, each) for each in weights), F.linear(wide, down)]])
    assert attention is not None and products is not None  # on a GPU
    return attention / 1e3, products / 1e3
