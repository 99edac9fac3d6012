"""What `memory()` reports is what is held, the formula says the same, and decoding holds no dequantized copy."""

from itertools import product
from types import FunctionType, ModuleType
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from cachequant import registry
from cachequant.core import Format, LayerFormat, LayerSpec, PackedCache, Strategy
from cachequant.core.hf import segments
from cachequant.core.hf.handles import LazyStates
from cachequant.kernels import cpu
from cachequant.kernels.quantize import Tables

BLOCK, TAIL = 32, 16


class Chosen(Strategy):
    """Any two formats."""

    name: ClassVar[str] = "chosen"

    key: Format
    value: Format
    block: int = BLOCK

    def formats(self, layer: LayerSpec) -> LayerFormat:
        return LayerFormat(key=self.key, value=self.value, block=self.block)

    def tables(self, layer: LayerSpec, side: str, first: Tensor, valid: Tensor | None) -> Tables:
        return Tables(codebook=torch.linspace(-1, 1, 2 ** getattr(self, side).bits))


GRIDS = [
    {},
    {"group": 16},
    {"symmetric": True},
    {"scale": "channel"},
    {"scale": "channel", "symmetric": True},
    {"outliers": 2},
    {"codes": "codebook"},
]
FORMATS = [Format(bits=bits, **grid) for bits, grid in product((2, 3, 4, 8), GRIDS)] + [Format(codes="exact")]
# keys and values apart: each format of one side meets another one on the other
PAIRS = list(zip(FORMATS, FORMATS[5:] + FORMATS[:5], strict=True))


def tensors_of(root: Any) -> dict[int, Tensor]:
    """Every tensor reachable from an object through attributes and containers, once per storage."""
    found: dict[int, Tensor] = {}
    waiting, known = [root], set()
    while waiting:
        thing = waiting.pop()
        if id(thing) in known or isinstance(thing, (type, FunctionType, ModuleType, str, bytes)):
            continue
        known.add(id(thing))
        if isinstance(thing, Tensor):
            found.setdefault(thing.untyped_storage().data_ptr(), thing)
        elif isinstance(thing, dict):
            waiting += thing.values()
        elif isinstance(thing, (list, tuple, set, frozenset)):
            waiting += thing
        elif hasattr(thing, "__dict__"):
            waiting += vars(thing).values()
    return found


def reachable_bytes(root: Any) -> int:
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors_of(root).values())


@pytest.mark.parametrize("head_dim", [64, 80, 128])
@pytest.mark.parametrize(("key", "value"), PAIRS, ids=lambda fmt: f"{fmt.codes}{fmt.bits}")
def test_formula_gives_the_bytes_held_for_codes_and_metadata(blank_layer, key, value, head_dim):
    batch, heads, tokens = 3, 2, 5 * BLOCK + TAIL
    layer = blank_layer(Chosen(key=key, value=value), residual_length=TAIL)
    states = torch.randn(2, batch, heads, tokens, head_dim, generator=torch.Generator().manual_seed(0)).bfloat16()
    layer.update(*states)
    assert layer.packed_tokens == 5 * BLOCK
    held = layer.used_bytes()
    for side, fmt in (("key", key), ("value", value)):
        rows = sum(size for name, size in held.items() if name.startswith(f"{side} "))
        assert rows == fmt.bytes_per_token(side, head_dim, BLOCK, 2) * batch * heads * 5 * BLOCK
    both = LayerFormat(key=key, value=value, block=BLOCK).bytes_per_token(head_dim, head_dim, 2)
    packed = sum(size for name, size in held.items() if name.startswith(("key ", "value ")))
    assert packed == both * batch * heads * 5 * BLOCK
    assert held["tail"] == 2 * batch * heads * TAIL * head_dim * 2


CACHES = {
    "none": ("none:block=32", {}),
    "uniform": ("uniform:bits=4,block=32", {}),
    "sinks": ("uniform:bits=4,block=32", {"sink_tokens": 3}),
    "channel": ("uniform:bits=2,block=32,key_scale=channel", {"skip_layers": [0]}),
    "pre": ("uniform:bits=4,block=32,key_scale=channel,key_rope=pre", {"sink_tokens": 3}),
}


@pytest.fixture
def after(build, tokens, left_padded, step):
    """`after(architecture, cache)`: (name of the moment, cache) through the life of a cache."""

    def life(architecture: str, name: str):
        model = build(architecture)
        spec, options = CACHES[name]
        cache = PackedCache(model, registry.parse(spec), residual_length=TAIL, **options)
        ids, mask = left_padded(tokens(3, 100), [17, 0, 40])
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        yield "new", cache
        step(model, ids, cache, attention_mask=mask, position_ids=positions)
        yield "filled", cache
        for count in range(1, 40):
            mask = torch.nn.functional.pad(mask, (0, 1), value=1)
            step(model, tokens(3, 1), cache, attention_mask=mask, position_ids=positions[:, -1:] + count)
        yield "decoded", cache
        cache.reorder_cache(torch.tensor([2, 0, 0]))
        yield "reordered", cache
        if len(cache.packed_layers) == len(cache.layers):
            cache.truncate(45)
            yield "truncated", cache
        if all(hasattr(layer, "batch_select_indices") for layer in cache.layers):  # the host's linear layers lack it
            cache.batch_select_indices(torch.tensor([1]))
            yield "selected", cache
        cache.reset()
        yield "reset", cache

    return life


@pytest.mark.parametrize(
    ("architecture", "name"),
    [
        pytest.param(architecture, name, id=f"{architecture}-{name}")
        for architecture, name in product(["llama", "gemma3", "lfm2", "gpt-neox"], CACHES)
    ],
)
def test_report_is_the_sum_of_all_storages_reachable_from_the_cache(after, architecture, name):
    for moment, cache in after(architecture, name):
        report = cache.memory()
        assert report.device_bytes == reachable_bytes(cache), moment
        assert sum(report.rows.values()) == report.device_bytes + report.host_bytes, moment
        assert all(size >= 0 for size in report.rows.values()), moment


@pytest.mark.parametrize("name", CACHES)
def test_cache_holds_no_part_of_the_model(after, name):
    for moment, cache in after("llama", name):
        waiting, known = [cache], set()
        while waiting:
            thing = waiting.pop()
            assert not isinstance(thing, nn.Module), moment
            if id(thing) not in known and not isinstance(thing, (type, FunctionType, ModuleType, Tensor)):
                known.add(id(thing))
                waiting += thing.values() if isinstance(thing, dict) else []
                waiting += thing if isinstance(thing, (list, tuple)) else []
                waiting += vars(thing).values() if hasattr(thing, "__dict__") else []


def test_quarter_of_the_bits_takes_about_a_quarter_of_the_memory(build, tokens, step):
    model = build("qwen3").to(torch.bfloat16)
    cache = PackedCache(model, registry.parse("uniform:bits=4,block=32"), residual_length=TAIL)
    step(model, tokens(2, 1040), cache)
    report = cache.memory()
    assert report.tokens == 1040
    assert report.elements == 2 * 3 * 2 * 1040 * 2 * 32
    assert report.exact_bytes == 2 * report.elements
    # 4 bits, 32 bits of scale and zero per 32 channels, and 16 tokens of 1040 exact in a buffer for 32
    assert report.bits_per_element == pytest.approx(4 + 1 + (32 * 16 - 16 * 5) / 1040)
    assert report.ratio == report.exact_bytes / report.device_bytes


def test_spare_capacity_is_small(build, tokens, step):
    model = build("llama")
    cache = PackedCache(model, registry.parse("uniform:bits=4,block=32"), residual_length=TAIL)
    step(model, tokens(1, 700), cache)
    for _ in range(100):
        step(model, tokens(1, 7), cache)
    packed = {name: size for name, size in cache.memory().rows.items() if name.startswith(("key", "value"))}
    store = cache.packed_layers[0].stores["key"]
    assert store.held_bytes() <= sum(store.used_bytes().values()) * (1 + 1 / 32) + 32 * 32
    assert sum(packed.values()) > 0


# ---- peaks -----------------------------------------------------------------------------------------------------------


class Watch(TorchDispatchMode):
    """The largest floating-point storage that any operation returned, in numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.is_floating_point() and not isinstance(tensor, LazyStates):
                inputs = {
                    leaf.untyped_storage().data_ptr() for leaf in tree_leaves((args, kwargs)) if type(leaf) is Tensor
                }
                # a view of what was there before is not made by this operation
                if tensor.untyped_storage().data_ptr() not in inputs:
                    self.largest = max(self.largest, tensor.untyped_storage().nbytes() // tensor.element_size())
        return result


DECODED = {
    "token": "uniform:bits=4,block=32",
    "rotated": "uniform:bits=2,block=32,rotation=hadamard",
    "groups": "uniform:bits=4,block=32,group_size=8",
    "pre": "uniform:bits=4,block=32,key_scale=channel,key_rope=pre",
}


@pytest.mark.parametrize(
    ("spec", "sinks"),
    [pytest.param(spec, sinks, id=f"{name}-{sinks}") for (name, spec), sinks in product(DECODED.items(), (0, 3))],
)
def test_decoding_makes_no_tensor_near_the_size_of_the_cache(build, tokens, step, monkeypatch, spec, sinks, dense):
    monkeypatch.setattr(segments, "CHUNK_NUMBERS", 1 << 12)
    monkeypatch.setattr(cpu, "TILE", 1 << 12)
    model = build("llama")
    cache = PackedCache(model, registry.parse(spec), residual_length=TAIL, sink_tokens=sinks)
    step(model, tokens(2, 2000), cache)
    keys = dense(cache.packed_layers[0], "key").numel()
    before = LazyStates.dequantized
    with Watch() as watch:
        step(model, tokens(2, 1, seed=2), cache)
    assert LazyStates.dequantized == before
    assert 0 < watch.largest < keys / 8


def test_watch_sees_a_dequantized_copy(build, tokens, step, dense):
    # else the test above would prove nothing
    model = build("llama")
    cache = PackedCache(model, registry.parse("uniform:bits=4,block=32"), residual_length=TAIL)
    step(model, tokens(2, 2000), cache)
    keys = dense(cache.packed_layers[0], "key").numel()
    with Watch() as watch:
        dense(cache.packed_layers[0], "key")
    assert watch.largest >= keys


@pytest.mark.parametrize(
    "spec",
    [pytest.param(spec, id=name) for name, spec in DECODED.items()],
)
def test_prompt_is_not_kept_exact_by_anything(build, tokens, step, spec):
    model = build("llama")
    cache = PackedCache(model, registry.parse(spec), residual_length=TAIL)
    step(model, tokens(1, 2000), cache)
    floats = [tensor for tensor in tensors_of(cache).values() if tensor.dtype == torch.float32]
    # neither keys of one head, nor cos and sin in full: the rotary table holds half the channels
    assert max(tensor.untyped_storage().nbytes() // 4 for tensor in floats) < 2000 * 16
