"""Whole models, decoding with packed caches and with transformers' own."""

import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, QuantizedCache, StaticCache
from transformers.utils.import_utils import is_hqq_available, is_optimum_quanto_available

from ...core import LayerSpec, PackedCache, Side, Strategy, Tables, detach
from ...core.hf.blocks import BlockLayer
from ...core.hf.static import StaticPackedCache
from ...core.hf.static_layer import StaticPackedLayer
from ...kernels.format import Format, LayerFormat
from ...kernels.quantize import packed_shapes
from ..held import held_bytes
from .cases import SIDES, fill_random, fitted, kvquant, uniform
from .machine import Clock, Machine, captured, in_parallel, replayed
from .results import DecodeTiming, PrefillTiming, message

K = 1024
# the most telling first
CONTEXTS = (128 * K, 1024 * K, 16 * K)
MILLION = 1024 * K
PREFILL_TOKENS = 16 * K
DYNAMIC = "DynamicCache"
RESIDUAL = 128
# steps beyond the context: eager ones, one that is captured, and its replays
STEPS, REPLAYS = 8, 4
SPARE = 128
FILL = "caches are filled with random packed data and random exact tokens, not by a prefill"

# share of the section's time that compiling beforehand may take, and caches that several processes fill at once
PREPARING = 0.35
PREPARED_BYTES = 5e9

SECONDS = 8.0  # that one contender at one context may take


class Plan(NamedTuple):
    """A model of random weights. layers, heads and so on are as in its name."""

    name: str
    config: dict[str, Any]


LLAMA_2 = Plan(
    "LLaMA-2-7B shape",
    {
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
    },
)
LLAMA_3 = Plan(
    "Llama-3.1-8B shape",
    {
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
)
DRY = {
    "vocab_size": 256,
    "hidden_size": 128,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 64,
}


class Synthetic(Strategy):
    """Fixed formats with tables such as a calibration gives: what is timed does not depend on their values."""

    name: ClassVar[str] = "synthetic"

    layer_format: LayerFormat

    def formats(self, layer: LayerSpec) -> LayerFormat:
        """The same formats for every layer."""
        return self.layer_format

    def tables(self, layer: LayerSpec, side: Side, first: Tensor, valid: Tensor | None) -> Tables:
        """Random tables."""
        dim = layer.head_dim if side == "key" else layer.value_dim
        return fitted(getattr(self.layer_format, side), layer.kv_heads, dim, first.device)


EXACT = LayerFormat(key=Format(codes="exact"), value=Format(codes="exact"))


class Contender(NamedTuple):
    """A cache. formats: None for transformers' own. static: preallocated. backend: of transformers' QuantizedCache."""

    name: str
    formats: LayerFormat | None = None
    static: bool = False
    backend: str | None = None

    def bytes(self, config: Any, tokens: int) -> float:
        """About as many as the cache takes."""
        token_heads = config.num_hidden_layers * config.num_key_value_heads * tokens
        if self.backend is not None:
            return token_heads * config.head_dim * 1.1
        if self.formats is None:
            # DynamicCache copies a layer to append to it
            return token_heads * config.head_dim * 4 * (1 + 2 * (not self.static) / config.num_hidden_layers)
        return token_heads * self.formats.bytes_per_token(config.head_dim, config.head_dim, 2) * 1.04

    def cache(self, model: Any, tokens: int) -> Any:
        """An empty one for `tokens` tokens; packed ones attach to the model."""
        if self.backend is not None:
            return QuantizedCache(self.backend, model.config, nbits=4, residual_length=RESIDUAL)
        if self.formats is None:
            length = tokens + SPARE
            return StaticCache(model.config, max_cache_len=length) if self.static else DynamicCache(config=model.config)
        strategy = Synthetic(layer_format=self.formats)
        if self.static:
            return StaticPackedCache(model, strategy, max_length=tokens + SPARE, residual_length=RESIDUAL)
        return PackedCache(model, strategy, residual_length=RESIDUAL)


TWO_BIT = Contender("uniform 2-bit", uniform(2), static=True)


def contenders(dry: bool) -> list[Contender]:
    """Transformers' own first."""
    found = [Contender(DYNAMIC), Contender("StaticCache", static=True)]
    for available, backend in ((is_optimum_quanto_available, "quanto"), (is_hqq_available, "hqq")):
        if available():
            found.append(Contender(f"QuantizedCache {backend} 4-bit", backend=backend))
            break
    found += [
        Contender("16-bit, ours", EXACT, static=True),
        Contender("uniform 4-bit", uniform(4), static=True),
        TWO_BIT,
        Contender("kvquant 4-bit 1% post-RoPE", kvquant(4, "post"), static=True),
        Contender("uniform 4-bit, PackedCache", uniform(4)),
        Contender("kvquant 4-bit 1% pre-RoPE, PackedCache", kvquant(4, "pre")),
    ]
    if dry:
        found = [each for each in found if "kvquant" not in each.name]
    return found


def run(machine: Machine) -> Iterator[DecodeTiming | PrefillTiming | str]:
    """One contender after the other; sentences about what failed or had to be left out."""
    yield f"note: {FILL}; weights are random"
    if not is_optimum_quanto_available() and not is_hqq_available():
        yield "transformers' QuantizedCache: neither optimum-quanto nor hqq is installed"
    yield from prepare(machine)
    # half of the time for either
    yield from _of_model(machine, LLAMA_2, machine.clock.left() / 2)
    yield from _of_model(machine, LLAMA_3, 0)


def _of_model(machine: Machine, plan: Plan, reserve: float) -> Iterator[DecodeTiming | PrefillTiming | str]:
    """Everything about one model, as long as more than `reserve` seconds are left."""
    if not _time(machine, reserve):
        yield f"{plan.name}: the section's time was up"
        return
    try:
        model = build(machine, plan)
    except Exception as error:
        yield f"failed: {plan.name}: {message(error)}"
        return
    yield from _million(machine, plan, model)
    yield from _prefill(machine, plan, model, reserve)
    for tokens in (384,) if machine.dry else CONTEXTS:
        for contender in contenders(machine.dry):
            if plan is LLAMA_2 and contender == TWO_BIT and tokens == MILLION:
                continue  # done first
            yield from _with_failure(_decoded(machine, plan, model, contender, tokens, reserve))
            machine.free()
    del model
    machine.free()


def _million(machine: Machine, plan: Plan, model: Any) -> Iterator[DecodeTiming | str]:
    """The claim that has a line of its own."""
    if plan is not LLAMA_2 or machine.dry:
        return
    found = _decoded(machine, plan, model, TWO_BIT, MILLION, 0)
    claim = "LLaMA-2-7B shape with 1M tokens in a 2-bit cache on one GPU"
    if isinstance(found, DecodeTiming):
        size, peak = found.cache_bytes / 1e9, (found.peak_bytes or 0) / 1e9
        ms = f"{1e3 / found.tokens_per_s:.1f} ms per token, " if found.tokens_per_s else ""
        yield f"note: {claim} decodes: {ms}{size:.1f} GB of cache, {peak:.1f} GB at most with the weights"
    else:
        yield f"note: {claim} was not shown"
    yield from _with_failure(found)
    machine.free()


def _with_failure(found: DecodeTiming | str) -> Iterator[DecodeTiming | str]:
    yield found
    if isinstance(found, DecodeTiming) and found.graph_failure is not None:
        what = f"{found.model} at {found.tokens} tokens, {found.contender}"
        yield f"failed: CUDA graph of {what}: {found.graph_failure}"


# ---- compiling beforehand --------------------------------------------------------------------------------------------


class Task(NamedTuple):
    """One contender with one layer of a model, for one process."""

    plan: Plan
    contender: Contender
    device: str


def prepare(machine: Machine) -> Iterator[str]:
    """Have several processes compile what models will run, so that this one finds it in the compiler's cache."""
    if machine.dry:
        return
    packed = [each for each in contenders(False) if each.formats is not None]
    tasks = [Task(plan, each, str(machine.device)) for plan in (LLAMA_2, LLAMA_3) for each in packed]
    for task, found in in_parallel(compiled, tasks, machine, PREPARING):
        if found:
            yield f"failed: compiling {task.contender.name} for the {task.plan.name}: {found}"


def compiled(task: Task) -> str | None:
    """In another process: two steps of a model of one layer at every context. Returns what went wrong."""
    machine = Machine(torch.device(task.device), Clock(60, {}))
    plan = Plan(task.plan.name, {**task.plan.config, "num_hidden_layers": 1, "vocab_size": 512})
    with torch.inference_mode():
        try:
            model = build(machine, plan)
            for tokens in CONTEXTS:
                if task.contender.bytes(model.config, tokens) < PREPARED_BYTES:
                    cache = task.contender.cache(model, tokens)
                    fill(machine, model, cache, tokens)
                    for _ in range(2):
                        model(torch.zeros(1, 1, dtype=torch.int64, device=machine.device), past_key_values=cache)
                    del cache
                    machine.free()
        except torch.OutOfMemoryError:
            return None  # compiled when it is timed
        except Exception as error:
            return message(error)
    return None


def build(machine: Machine, plan: Plan) -> Any:
    """The model, its weights made where it computes."""
    config = LlamaConfig.from_dict(
        {
            **(plan.config if not machine.dry else {**DRY, "num_key_value_heads": 2 if plan is LLAMA_2 else 1}),
            "max_position_embeddings": 2 * MILLION,
            "rope_parameters": {"rope_type": "default", "rope_theta": 5e5},
            "tie_word_embeddings": False,
        }
    )
    before = torch.get_default_dtype()
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float32 if machine.dry else torch.bfloat16)
    try:
        # outside inference mode: parameters outlive it
        with torch.inference_mode(False), torch.device(machine.device):
            model = LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(before)
    model.set_attn_implementation("sdpa")
    return model.eval().requires_grad_(False)


# ---- decoding --------------------------------------------------------------------------------------------------------


def _decoded(
    machine: Machine, plan: Plan, model: Any, contender: Contender, tokens: int, reserve: float
) -> DecodeTiming | str:
    what = f"{plan.name} at {tokens} tokens, {contender.name}"
    if not _time(machine, reserve):
        return f"{what}: the section's time was up"
    size = contender.bytes(model.config, tokens)
    if not machine.room(size):
        return f"{what}: {size / 1e9:.0f} GB of cache do not fit beside {_weights(model) / 1e9:.0f} GB of weights"
    try:
        return _measured(machine, plan, model, contender, tokens)
    except torch.OutOfMemoryError:
        return f"{what}: out of memory"
    except Exception as error:
        return f"failed: {what}: {message(error)}"
    finally:
        detach(model)


def _measured(machine: Machine, plan: Plan, model: Any, contender: Contender, tokens: int) -> DecodeTiming:
    cache = contender.cache(model, tokens)
    fill(machine, model, cache, tokens)
    ids = torch.full((1, 1), 7, device=machine.device)

    def step() -> Tensor:
        return model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits

    if not machine.dry:
        machine.synchronize()
        torch.cuda.reset_peak_memory_stats(machine.device)
    times = []
    for _ in range(1 if machine.dry else 2 + STEPS):
        start = time.perf_counter()
        logits = step()
        machine.synchronize()
        times.append(1e3 * (time.perf_counter() - start))
        if not bool(logits.isfinite().all()):
            raise ArithmeticError("the logits are not finite")
    eager = None if machine.dry else statistics.median(times[2:])
    peak = None if machine.dry else torch.cuda.max_memory_allocated(machine.device)
    size = held_bytes(cache)
    graph = None
    failure = None
    # the captured step of a cache that grows is the same step over and over; stock ones allocate all of it anew
    again = size if contender.formats is None and not contender.static else 0
    if not machine.dry and machine.room(again):
        try:
            replay = captured(step)
            graph = replayed(replay, replays=REPLAYS)
            replay.reset()
        except Exception as error:  # what cannot be captured still has its eager time
            failure = message(error)
    fastest = min((each for each in (eager, graph) if each is not None), default=None)
    return DecodeTiming(
        model=plan.name,
        contender=contender.name,
        tokens=tokens,
        eager_ms=eager,
        graph_ms=graph,
        tokens_per_s=None if fastest is None else 1e3 / fastest,
        cache_bytes=size,
        peak_bytes=peak,
        graph_failure=failure,
    )


def fill(machine: Machine, model: Any, cache: Any, tokens: int) -> None:
    """Make `cache` hold `tokens` random tokens, without the forward pass that would make them."""
    config, device, dtype = model.config, model.device, model.dtype
    if not isinstance(cache, PackedCache | StaticCache):
        shape = (1, config.num_key_value_heads, tokens, config.head_dim)
        for layer in range(config.num_hidden_layers):
            key, value = (torch.randn(shape, device=device, dtype=dtype) for _ in SIDES)
            cache.update(key, value, layer)
        return
    # a short prompt makes the layers ask their strategy, and allocate
    prompt = torch.arange(RESIDUAL + 128, device=device)[None] % config.vocab_size
    model(prompt, past_key_values=cache, use_cache=True, logits_to_keep=1)
    held = prompt.shape[1]
    if isinstance(cache, StaticCache):
        for layer in cache.layers:
            for tensor in (layer.keys, layer.values):  # type: ignore[union-attr]
                tensor.normal_()  # type: ignore[union-attr]
            layer.cumulative_length.fill_(tokens)  # type: ignore[union-attr]
        return
    for layer in cache.layers:
        if isinstance(layer, StaticPackedLayer):
            _fill_static(layer, tokens)
        elif isinstance(layer, BlockLayer):
            _extend(layer, tokens - held)
    for table in {id(table): table for table in cache.rotary_tables.by_kind.values()}.values():
        positions = torch.arange(held, tokens, device=device)[None]
        cos, sin = model.model.rotary_emb(torch.empty(0, dtype=dtype, device=device), position_ids=positions)
        table.append(cos, sin, held, 0)


def _fill_static(layer: StaticPackedLayer, tokens: int) -> None:
    """Let the buffers say that they hold `tokens` tokens."""
    buffers, block = layer.require_buffers(), layer.formats.block
    for side, parts in buffers.packed().items():
        fill_random(parts, layer.head_dim if side == "key" else block)
    for tail in buffers.tails:
        tail.normal_()
    buffers.real.fill_(True)
    buffers.length.fill_(tokens)
    buffers.blocks.fill_((tokens - layer.options.residual_length) // block)


def _extend(layer: BlockLayer, tokens: int) -> None:
    """Append random blocks of so many tokens, a multiple of the block, to the packed stores."""
    blocks = tokens // layer.formats.block
    for side in SIDES:
        dim = layer.head_dim if side == "key" else layer.value_dim
        shapes = packed_shapes(getattr(layer.formats, side), side, dim, layer.formats.block, layer.dtype)
        packed = {
            name: torch.empty((1, layer.kv_heads, blocks, *shape), dtype=dtype, device=layer.device)
            for name, (shape, dtype) in shapes.items()
        }
        fill_random(packed, dim if side == "key" else layer.formats.block)
        layer.stores[side].append(packed)


# ---- prefill ---------------------------------------------------------------------------------------------------------


def _prefill(machine: Machine, plan: Plan, model: Any, reserve: float) -> Iterator[PrefillTiming | str]:
    tokens = 256 if machine.dry else PREFILL_TOKENS
    ids = torch.arange(tokens, device=machine.device)[None] % model.config.vocab_size
    chosen = [Contender(DYNAMIC), Contender("uniform 4-bit, PackedCache", uniform(4))]
    if not machine.dry:
        chosen += [Contender("kvquant 4-bit 1% post-RoPE, PackedCache", kvquant(4, "post")), TWO_BIT]
    exact = None
    for contender in chosen:
        what = f"{plan.name}, prefill of {tokens} tokens, {contender.name}"
        if not _time(machine, reserve):
            yield f"{what}: the section's time was up"
            continue
        try:
            found = _prefilled(machine, model, ids, lambda c=contender: c.cache(model, tokens))
        except Exception as error:
            yield f"failed: {what}: {message(error)}"
            continue
        finally:
            detach(model)
            machine.free()
        ms, peak = found
        exact = ms if contender.name == DYNAMIC else exact
        yield PrefillTiming(
            model=plan.name,
            contender=contender.name,
            tokens=tokens,
            ms=ms,
            ratio=None if ms is None or exact is None else ms / exact,
            peak_bytes=peak,
        )


def _prefilled(
    machine: Machine, model: Any, ids: Tensor, new_cache: Callable[[], Any]
) -> tuple[float | None, int | None]:
    """Median milliseconds and most bytes."""
    times = []
    if not machine.dry:
        torch.cuda.reset_peak_memory_stats(machine.device)
    for _ in range(1 if machine.dry else 4):
        cache = new_cache()
        machine.synchronize()
        start = time.perf_counter()
        model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        machine.synchronize()
        times.append(1e3 * (time.perf_counter() - start))
        del cache
    if machine.dry:
        return None, None
    return statistics.median(times[1:]), torch.cuda.max_memory_allocated(machine.device)


def _time(machine: Machine, reserve: float) -> bool:
    """Whether there is time for another contender."""
    return machine.clock.left() > (0 if machine.dry else reserve + SECONDS)


def _weights(model: Any) -> int:
    return sum(parameter.numel() * parameter.itemsize for parameter in model.parameters())
