"""The static cache: what it decodes is what the packed cache decodes, in one graph and in memory allocated once."""

import copy
from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
import torch._dynamo as dynamo
from torch import Tensor
from transformers import CompileConfig, PreTrainedModel

from cachequant import registry
from cachequant.core import Format, LayerFormat, PackedCache, StaticPackedCache, Strategy, Tables, attach, detach
from cachequant.core.hf.static_layer import StaticPackedLayer
from cachequant.kernels import ops
from cachequant.kernels.ops import Buffers

BLOCK, TAIL = 32, 16
STEPS = 45  # two blocks are packed on the way
OPTIONS: dict[str, Any] = {"residual_length": TAIL, "sink_tokens": 3, "skip_layers": [-1]}
DOUBLE = {"rtol": 0, "atol": 1e-9}
SINGLE = {"rtol": 0, "atol": 1e-3}  # rounding may flip a code

STRATEGIES = {
    "token": "uniform:bits=4,block=32",
    "channel": "uniform:bits=3,block=32,key_scale=channel",
    "rotated": "uniform:bits=2,block=32,rotation=hadamard",
    "groups": "uniform:bits=3,value_bits=8,block=32,group_size=8,symmetric=true",
    "codebook": "kvquant:bits=3,block=32,key_rope=post,calibration=prompt",
    "exact": "none:block=32",
}

# one token; too short for a block; a block is there, but not due; it is due; some are packed
PROMPTS = (1, 9, 47, 48, 100)

Forward = Callable[..., Any]


class Chosen(Strategy):
    """One format for both sides."""

    name: ClassVar[str] = "chosen"

    fmt: Format

    def formats(self, layer):
        return LayerFormat(key=self.fmt, value=self.fmt, block=BLOCK)

    def tables(self, layer, side, first, valid):
        scale = torch.full((layer.kv_heads, layer.head_dim), 0.4)
        return Tables(codebook=torch.linspace(-1, 1, 16) ** 3, scale=scale, zero=-4 * scale)


class OwnEncoder(Strategy):
    """Shared bytes, but chosen by the strategy."""

    name: ClassVar[str] = "own-encoder"

    def formats(self, layer):
        return LayerFormat(key=Format(), value=Format(), block=BLOCK)

    def encode(self, states, fmt, side, block, valid, tables):
        return super().encode(0.9 * states, fmt, side, block, valid, tables)


def strategy(name: str) -> Any:
    return registry.parse(STRATEGIES[name])


@pytest.fixture
def model(build) -> PreTrainedModel:
    return build("llama", num_hidden_layers=2)


@torch.no_grad()
def decode(
    model: PreTrainedModel, cache: Any, prompt: Tensor, steps: int, forward: Forward | None = None, **inputs: Any
) -> Tensor:
    """Logits `[rows, 1 + steps, vocabulary]` of decoding greedily after a prompt."""
    forward = model if forward is None else forward
    logits = [model(prompt, past_key_values=cache, **inputs).logits[:, -1:]]
    for _ in range(steps):
        logits.append(forward(input_ids=logits[-1].argmax(-1), past_key_values=cache).logits[:, -1:])
    return torch.cat(logits, dim=1)


@torch.no_grad()
def decode_on(model: PreTrainedModel, cache: Any, token: Tensor, steps: int) -> Tensor:
    logits = [model(token.clone(), past_key_values=cache).logits]
    for _ in range(steps - 1):
        logits.append(model(logits[-1].argmax(-1), past_key_values=cache).logits)
    return torch.cat(logits, dim=1)


@torch.no_grad()
def decode_one(model: PreTrainedModel, cache: Any) -> None:
    model(torch.full((2, 1), 7), past_key_values=cache)


def compiled(model: PreTrainedModel, backend: str = "eager") -> Forward:
    dynamo.reset()
    dynamo.utils.counters.clear()
    return torch.compile(model.forward, fullgraph=True, backend=backend)


def tensors(cache: StaticPackedCache) -> list[Tensor]:
    return [tensor for layer in cache.packed_layers for tensor in layer.tensors()]


def graphs() -> int:
    return dynamo.utils.counters["stats"]["unique_graphs"]


# ---- the same numbers ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", STRATEGIES)
def test_steps_give_the_logits_of_the_packed_cache(model, tokens, name):
    prompt = tokens(2, 40)
    model.double()
    expected = decode(model, PackedCache(model, strategy(name), **OPTIONS), prompt, STEPS)
    cache = StaticPackedCache(model, strategy(name), max_length=40 + STEPS, **OPTIONS)
    torch.testing.assert_close(decode(model, cache, prompt, STEPS), expected, **DOUBLE)


@pytest.mark.parametrize(
    ("options", "length"),
    [
        *((OPTIONS, length) for length in PROMPTS),
        *(({"residual_length": 0}, length) for length in (1, 9, 100)),
        *(({"residual_length": 33, "sink_tokens": 40}, length) for length in (9, 48, 100)),
    ],
)
def test_prompts_of_any_length_may_come_before(model, tokens, length, options):
    prompt = tokens(2, length)
    model.double()
    expected = decode(model, PackedCache(model, strategy("token"), **options), prompt, 36)
    cache = StaticPackedCache(model, strategy("token"), max_length=length + 36, **options)
    torch.testing.assert_close(decode(model, cache, prompt, 36), expected, **DOUBLE)


FORMATS = {
    "static": Format(scale="static"),
    "codebook-outliers": Format(codes="codebook", scale="channel", outliers=2),
    "trimmed": Format(bits=3, outliers=2, trim=1),
    "mean-grid": Format(grid="mean", scale="channel"),
}


@pytest.mark.parametrize("fmt", FORMATS.values(), ids=FORMATS)
def test_steps_encode_every_kind_of_format(model, tokens, fmt):
    prompt, chosen = tokens(2, 40), Chosen(fmt=fmt)
    expected = decode(model, PackedCache(model, chosen, **OPTIONS), prompt, STEPS)
    cache = StaticPackedCache(model, chosen, max_length=40 + STEPS, **OPTIONS)
    torch.testing.assert_close(decode(model, cache, prompt, STEPS), expected, **SINGLE)


@pytest.mark.parametrize("name", ["token", "rotated", "codebook", "exact"])
def test_the_path_that_never_looks_at_a_count_gives_the_same(model, tokens, monkeypatch, name):
    prompt = tokens(2, 40)
    expected = decode(model, PackedCache(model, strategy(name), **OPTIONS), prompt, STEPS)
    monkeypatch.setattr(ops, "_readable", lambda count: False)
    cache = StaticPackedCache(model, strategy(name), max_length=120, **OPTIONS)
    torch.testing.assert_close(decode(model, cache, prompt, STEPS), expected, **SINGLE)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_served(model, tokens, dtype):
    model.to(dtype)
    prompt = tokens(2, 40)
    expected = decode(model, PackedCache(model, strategy("token"), **OPTIONS), prompt, 40)
    cache = StaticPackedCache(model, strategy("token"), max_length=80, **OPTIONS)
    actual = decode(model, cache, prompt, 40)
    assert actual.dtype == dtype
    torch.testing.assert_close(actual[:, :2], expected[:, :2], rtol=0, atol=0.1)


@pytest.mark.parametrize(
    "architecture", ["gemma2", "gemma3", "gpt-oss", "mistral-sliding", "gpt-neox", "qwen3-next", "lfm2"]
)
@pytest.mark.filterwarnings("ignore:no layer of MistralForCausalLM")
def test_softcaps_learned_sinks_and_sliding_layers_are_as_in_the_packed_cache(build, tokens, architecture):
    prompt = tokens(2, 40)
    model = build(architecture)
    options = {"residual_length": TAIL, "sink_tokens": 3}
    expected = decode(model, PackedCache(model, strategy("token"), **options), prompt, STEPS)
    cache = StaticPackedCache(model, strategy("token"), max_length=100, **options)
    torch.testing.assert_close(decode(model, cache, prompt, STEPS), expected, **SINGLE)


# ---- generate --------------------------------------------------------------------------------------------------------

MODES: dict[str, tuple[dict[str, Any], list[int]]] = {
    "greedy": ({}, [0]),
    "sampling": ({"do_sample": True, "top_k": 20, "num_return_sequences": 2}, [0]),
    "beam": ({"num_beams": 3}, [0]),
    "padded": ({}, [17, 0, 41]),
    "padded-beam": ({"num_beams": 3}, [17, 0, 41]),
    "chunked-prefill": ({"prefill_chunk_size": 17}, [0]),
    "padded-chunked-prefill": ({"prefill_chunk_size": 17}, [17, 0, 41]),
    "prompt-lookup": ({"prompt_lookup_num_tokens": 6}, [0]),
}


def generate(model: PreTrainedModel, cache: Any, ids: Tensor, mask: Tensor, settings: dict[str, Any]) -> Any:
    torch.manual_seed(3)
    settings = {"do_sample": False, "max_new_tokens": 30, **settings}
    return model.generate(
        ids,
        attention_mask=mask,
        past_key_values=cache,
        return_dict_in_generate=True,
        output_logits=True,
        **settings,
    )


@pytest.mark.parametrize("mode", MODES)
def test_generate_gives_what_it_gives_with_the_packed_cache(model, tokens, left_padded, mode):
    settings, pads = MODES[mode]
    ids, mask = left_padded(tokens(len(pads), 70), pads)
    model.double()
    expected = generate(model, PackedCache(model, strategy("channel"), **OPTIONS), ids, mask, settings)
    cache = StaticPackedCache(model, strategy("channel"), max_length=130, **OPTIONS)
    actual = generate(model, cache, ids, mask, settings)
    assert torch.equal(actual.sequences, expected.sequences)
    torch.testing.assert_close(torch.stack(actual.logits), torch.stack(expected.logits), **DOUBLE)


@pytest.mark.parametrize(("name", "beginning"), [("channel", 20), ("codebook", 33)])
def test_a_conversation_goes_on_with_prompts_between_steps(model, tokens, name, beginning):
    model.double()
    results = []
    for make in (PackedCache, StaticPackedCache):
        extra = {"max_length": 200} if make is StaticPackedCache else {}
        cache, logits = make(model, strategy(name), **OPTIONS, **extra), []
        for turn, length in enumerate((beginning, 37, 5)):
            logits.append(decode(model, cache, tokens(2, length, seed=turn), 30))
        results.append(torch.cat(logits, dim=1))
    torch.testing.assert_close(results[1], results[0], **DOUBLE)


def test_generate_compiles_by_itself_where_it_may(model, tokens):
    ids = tokens(1, 40)
    mask = torch.ones_like(ids)
    expected = generate(model, PackedCache(model, strategy("token"), **OPTIONS), ids, mask, {})
    dynamo.reset()
    dynamo.utils.counters.clear()
    config = CompileConfig(fullgraph=True, backend="eager", mode=None)
    config._compile_all_devices = True
    cache = StaticPackedCache(model, strategy("token"), max_length=100, **OPTIONS)
    actual = generate(model, cache, ids, mask, {"compile_config": config})
    assert torch.equal(actual.sequences, expected.sequences)
    assert graphs() == 1


# ---- one graph -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "backend", "steps"),
    [("token", "eager", 80), ("codebook", "eager", STEPS), ("channel", "aot_eager", STEPS)],
)
def test_decoding_is_one_graph_across_block_boundaries(model, tokens, name, backend, steps):
    prompt = tokens(2, 40)
    expected = decode(model, PackedCache(model, strategy(name), **OPTIONS), prompt, steps)
    cache = StaticPackedCache(model, strategy(name), max_length=40 + steps, **OPTIONS)
    actual = decode(model, cache, prompt, steps, compiled(model, backend))
    assert graphs() == 1
    assert cache.packed_layers[0].packed_tokens >= 2 * BLOCK
    assert torch.equal(actual.argmax(-1), expected.argmax(-1))
    torch.testing.assert_close(actual, expected, **SINGLE)
    cache.require_sound()


def test_inductor_compiles_the_same_graph(build, tokens):
    model, prompt = build("llama", num_hidden_layers=1), tokens(1, 40)
    options = {"residual_length": TAIL, "sink_tokens": 2}
    expected = decode(model, PackedCache(model, strategy("token"), **options), prompt, 60)
    cache = StaticPackedCache(model, strategy("token"), max_length=100, **options)
    actual = decode(model, cache, prompt, 60, compiled(model, "inductor"))
    assert graphs() == 1
    assert torch.equal(actual.argmax(-1), expected.argmax(-1))


@torch.no_grad()
def test_padded_rows_are_decoded_in_one_graph_with_a_mask_of_full_length(model, tokens, left_padded):
    ids, mask = left_padded(tokens(3, 70), [17, 0, 41])
    expected = generate(model, PackedCache(model, strategy("channel"), **OPTIONS), ids, mask, {})
    cache = StaticPackedCache(model, strategy("channel"), max_length=120, **OPTIONS)
    forward = compiled(model)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    step = model(ids, attention_mask=mask, position_ids=positions, past_key_values=cache)
    logits, positions = [step.logits[:, -1]], positions[:, -1:]
    full = torch.nn.functional.pad(mask, (0, 120 - 70), value=1)
    for _ in range(29):
        positions = positions + 1
        token = logits[-1].argmax(-1, keepdim=True)
        step = forward(input_ids=token, attention_mask=full, position_ids=positions, past_key_values=cache)
        logits.append(step.logits[:, -1])
    assert graphs() == 1
    torch.testing.assert_close(torch.stack(logits), torch.stack(expected.logits), **SINGLE)


def test_a_prompt_of_inference_mode_may_be_followed_by_steps_outside(model, tokens):
    prompt = tokens(2, 60)
    expected = decode(model, PackedCache(model, strategy("token"), **OPTIONS), prompt, 30)
    cache = StaticPackedCache(model, strategy("token"), max_length=100, **OPTIONS)
    with torch.inference_mode():
        first = decode(model, cache, prompt, 5)
    rest = decode_on(model, cache, first[:, -1:].argmax(-1), 25)
    torch.testing.assert_close(torch.cat([first.clone(), rest], dim=1), expected, **SINGLE)


def test_the_next_text_uses_the_same_memory_and_graph(model, tokens):
    cache = StaticPackedCache(model, strategy("codebook"), max_length=120, **OPTIONS)
    forward = compiled(model)
    first = decode(model, cache, tokens(2, 40), 60, forward)
    held = [tensor.data_ptr() for tensor in tensors(cache)]
    decode(model, cache, tokens(2, 9, seed=2), 5, forward)
    cache.reset()
    assert cache.get_seq_length() == 0
    again = decode(model, cache, tokens(2, 40), 60, forward)
    assert [tensor.data_ptr() for tensor in tensors(cache)] == held
    assert graphs() == 1
    assert torch.equal(again, first)


def test_prompts_are_not_compiled(model, tokens):
    cache = StaticPackedCache(model, strategy("token"), max_length=100, **OPTIONS)
    with pytest.raises(Exception, match="only a forward of one token can be compiled"), torch.no_grad():
        compiled(model)(input_ids=tokens(1, 8), past_key_values=cache)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", ["token", "channel", "exact"])
def test_a_cuda_graph_replays_the_step(model, tokens, name):
    model, prompt = model.cuda(), tokens(2, 40).cuda()
    expected = decode(model, StaticPackedCache(model, strategy(name), max_length=120, **OPTIONS), prompt, STEPS)
    cache = StaticPackedCache(model, strategy(name), max_length=120, **OPTIONS)
    token = prompt[:, :1].clone()
    with torch.no_grad():
        # warm up on a text of its own: kernels compile, and constants reach the device
        model(prompt, past_key_values=cache)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(12):
                model(token, past_key_values=cache)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = model(token, past_key_values=cache).logits
        cache.reset()
        logits = [model(prompt, past_key_values=cache).logits[:, -1:]]
        for _ in range(STEPS):
            token.copy_(logits[-1].argmax(-1))
            graph.replay()
            logits.append(captured.clone())
    cache.require_sound()
    torch.testing.assert_close(torch.cat(logits, dim=1), expected, **SINGLE)


# ---- the operations --------------------------------------------------------------------------------------------------


@pytest.fixture(params=["token", "codebook", "exact"])
def layer(request, model, tokens) -> StaticPackedLayer:
    """A layer of 47 tokens: with one more, a block is due."""
    cache = StaticPackedCache(model, strategy(request.param), max_length=100, **OPTIONS)
    decode(model, cache, tokens(2, 47), 0)
    return cache.layers[0]


def states(seed: int = 0, heads: int = 2) -> Tensor:
    return torch.randn(2, heads, 1, 16, generator=torch.Generator().manual_seed(seed))


def append_arguments(buffers: Buffers) -> tuple[Any, ...]:
    held = (buffers.tails, buffers.real, buffers.key_parts, buffers.value_parts, buffers.sinks)
    counts = (buffers.first, buffers.length, buffers.blocks, buffers.overflowed)
    tables = (buffers.key_tables, buffers.value_tables)
    return (states(0), states(1), *held, *counts, *tables, buffers.layout)


def attend_arguments(buffers: Buffers, mask: Tensor | None = None) -> tuple[Any, ...]:
    held = (buffers.tails, buffers.key_parts, buffers.value_parts, buffers.sinks)
    counts = (buffers.first, buffers.length, buffers.blocks)
    tables = (buffers.key_tables, buffers.value_tables)
    return (states(2, heads=4), mask, None, *held, *counts, *tables, 0.25, None, buffers.layout)


@pytest.mark.parametrize(("layer", "steps"), [("codebook", 1), ("exact", 0)], indirect=["layer"])
def test_operations_say_truly_what_they_do(layer, steps):
    for step in range(steps):
        layer.buffers.append(states(step), states(step + 1))
    torch.library.opcheck(torch.ops.cachequant.append.default, append_arguments(layer.buffers))
    for mask in (None, torch.ones(2, 1, 1, 100, dtype=torch.bool)):
        torch.library.opcheck(torch.ops.cachequant.attend.default, attend_arguments(layer.buffers, mask))


def test_operations_never_wait_for_a_gpu(layer):
    def elsewhere(value: Any) -> Any:
        if isinstance(value, list):
            return [elsewhere(item) for item in value]
        return value.to("meta") if isinstance(value, Tensor) else value

    append, attend = append_arguments(layer.buffers), attend_arguments(layer.buffers, torch.ones(2, 1, 1, 100) > 0)
    # this device has no numbers: reading one, as `int(tensor)` or `if tensor`, raises
    ops.append._init_fn(*map(elsewhere, append))
    out = ops.attend._init_fn(*map(elsewhere, attend))
    assert out.device.type == "meta" and out.shape == (2, 1, 4, 16)


def test_masks_hide_what_they_hide_of_every_segment(layer):
    for step in range(40):
        layer.buffers.append(states(step), states(step + 1))
    query = states(2, heads=4)
    generator = torch.Generator().manual_seed(5)
    seen = torch.rand(2, 1, 1, 100, generator=generator) < 0.5
    by_bool = layer.buffers.attend(query, seen, 0.25, None, None)
    by_floats = layer.buffers.attend(query, torch.zeros(2, 4, 1, 100).masked_fill(~seen, -torch.inf), 0.25, None, None)
    torch.testing.assert_close(by_floats, by_bool)
    assert not torch.equal(by_bool, layer.buffers.attend(query, None, 0.25, None, None))
    assert not layer.buffers.attend(query, torch.zeros(2, 1, 1, 87) > 0, 0.25, None, None).any()


# ---- bytes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", STRATEGIES)
def test_memory_counts_what_is_held_and_what_the_packed_cache_counts(model, tokens, name):
    packed = PackedCache(model, strategy(name), residual_length=TAIL, sink_tokens=3)
    cache = StaticPackedCache(model, strategy(name), max_length=150, residual_length=TAIL, sink_tokens=3)
    for each in (packed, cache):
        decode(model, each, tokens(2, 110), 8)
    mine, theirs = cache.memory(), packed.memory()
    assert (mine.tokens, mine.elements, mine.exact_bytes) == (theirs.tokens, theirs.elements, theirs.exact_bytes)
    for row in theirs.rows.keys() - {"spare", "sinks"}:
        assert mine.rows.get(row, 0) == theirs.rows[row], row
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage() for t in tensors(cache)}
    assert mine.device_bytes == sum(storage.nbytes() for storage in storages.values())


def test_steps_allocate_nothing(model, tokens):
    cache = StaticPackedCache(model, strategy("token"), max_length=200, **OPTIONS)
    decode(model, cache, tokens(2, 40), 0)
    before = cache.memory().device_bytes
    for _ in range(100):
        decode_one(model, cache)
    assert cache.memory().device_bytes == before


# ---- changes between steps -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("removed", [0, 1, TAIL])
def test_newest_tokens_can_be_removed(model, tokens, removed):
    model.double()
    results = []
    for make, extra in ((PackedCache, {}), (StaticPackedCache, {"max_length": 200})):
        cache = make(model, strategy("channel"), **OPTIONS, **extra)
        decode(model, cache, tokens(2, 70), 29)
        cache.crop(-removed) if removed else cache.truncate(99)
        results.append(torch.cat([decode(model, cache, tokens(2, 3, seed=4), 0), *more(model, cache, 30)], dim=1))
    torch.testing.assert_close(results[1], results[0], **DOUBLE)


@torch.no_grad()
def more(model: PreTrainedModel, cache: Any, steps: int) -> list[Tensor]:
    return [model(torch.full((2, 1), 5 + i), past_key_values=cache).logits for i in range(steps)]


def test_cuts_go_between_blocks_or_not_at_all(model, tokens):
    cache = StaticPackedCache(model, strategy("token"), max_length=200, **OPTIONS)
    expected = decode(model, cache, tokens(2, 100), 20)
    with pytest.raises(ValueError, match="between blocks of 32"):
        cache.truncate(50)
    assert cache.get_seq_length() == 120
    cache.truncate(32)
    assert cache.get_seq_length() == 32 and cache.packed_layers[0].packed_tokens == 32
    cache.truncate(0)
    torch.testing.assert_close(decode(model, cache, tokens(2, 100), 20), expected)


def test_copies_go_their_own_way(model, tokens):
    cache = StaticPackedCache(model, strategy("token"), max_length=200, **OPTIONS)
    decode(model, cache, tokens(2, 40), 30)
    twin = copy.deepcopy(cache)
    expected = more(model, cache, 30)
    for actual, wanted in zip(more(model, twin, 30), expected, strict=True):
        assert torch.equal(actual, wanted)


def test_the_batch_changes_only_after_a_reset(model, tokens):
    cache = StaticPackedCache(model, strategy("token"), max_length=100, **OPTIONS)
    decode(model, cache, tokens(2, 40), 10)
    with pytest.raises(ValueError, match="one batch size"):
        cache.batch_repeat_interleave(2)
    with pytest.raises(ValueError, match="one batch size"):
        cache.batch_select_indices(torch.tensor([0]))
    with pytest.raises(ValueError, match="holds a batch of 2, this forward has 3"), torch.no_grad():
        model(tokens(3, 1), past_key_values=cache)
    cache.reset()
    expected = decode(model, PackedCache(model, strategy("token"), **OPTIONS), tokens(3, 40), 10)
    torch.testing.assert_close(decode(model, cache, tokens(3, 40), 10), expected, **SINGLE)


# ---- too much, and the wrong thing -----------------------------------------------------------------------------------


def test_prompts_that_do_not_fit_are_refused_and_change_nothing(model, tokens):
    cache = StaticPackedCache(model, strategy("token"), max_length=60, **OPTIONS)
    with pytest.raises(ValueError, match="0 tokens are held and 61 more come, but max_length=60"):
        decode(model, cache, tokens(1, 61), 0)
    expected = decode(model, cache, tokens(1, 50), 10)
    cache.truncate(50)
    with pytest.raises(ValueError, match="50 tokens are held and 11 more come"):
        decode(model, cache, tokens(1, 11), 0)
    with pytest.raises(ValueError, match="holds a batch of 1, this forward has 2"):
        decode(model, cache, tokens(2, 5), 0)
    assert cache.get_seq_length() == 50
    with torch.no_grad():
        again = compiled(model)(input_ids=expected[:, :1].argmax(-1), past_key_values=cache).logits
    torch.testing.assert_close(again, expected[:, 1:2])


def test_a_step_beyond_the_end_is_refused_where_the_host_counts(model, tokens):
    cache = StaticPackedCache(model, strategy("token"), max_length=60, **OPTIONS)
    decode(model, cache, tokens(2, 50), 10)
    held = [tensor.clone() for tensor in tensors(cache)]
    with pytest.raises(ValueError, match="60 tokens are held and 1 more come"):
        decode_one(model, cache)
    assert all(torch.equal(now, before) for now, before in zip(tensors(cache), held, strict=True))


def test_a_compiled_step_beyond_the_end_stores_nothing_and_says_so(model, tokens):
    cache = StaticPackedCache(model, strategy("token"), max_length=60, **OPTIONS)
    forward = compiled(model)
    first = decode(model, cache, tokens(2, 50), 10, forward)
    cache.require_sound()
    held = [tensor.clone() for layer in cache.packed_layers for tensor in layer.buffers.batched()]
    with torch.no_grad():
        for _ in range(70):
            forward(input_ids=tokens(2, 1), past_key_values=cache)
    kept = [tensor for layer in cache.packed_layers for tensor in layer.buffers.batched()]
    assert all(torch.equal(now, before) for now, before in zip(kept, held, strict=True))
    assert cache.get_seq_length() == 60
    for look in (cache.require_sound, lambda: cache.crop(-1), lambda: decode(model, cache, tokens(2, 2), 0)):
        with pytest.raises(RuntimeError, match="steps went beyond max_length=60"):
            look()
    cache.truncate(50)
    cache.require_sound()
    with torch.no_grad():
        again = forward(input_ids=first[:, :1].argmax(-1), past_key_values=cache).logits
    assert torch.equal(again, first[:, 1:2])


def test_an_interrupted_prompt_is_noticed_and_mended(model, tokens, monkeypatch):
    cache = StaticPackedCache(model, strategy("token"), max_length=200, **OPTIONS)
    decode(model, cache, tokens(2, 40), 20)
    with monkeypatch.context() as patched:
        patched.setattr(model.model.layers[0].mlp, "forward", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            decode(model, cache, tokens(2, 5), 0)
    for length in (1, 5, 1):
        with pytest.raises(RuntimeError, match="an earlier forward was interrupted"):
            decode(model, cache, tokens(2, length), 0)
    cache.truncate(60)
    expected = PackedCache(model, strategy("token"), **OPTIONS)
    decode(model, expected, tokens(2, 40), 20)
    torch.testing.assert_close(
        decode(model, cache, tokens(2, 5), 20), decode(model, expected, tokens(2, 5), 20), **SINGLE
    )


REFUSED = {
    "adaptive": ("qaq", "new widths while decoding"),
    "pre-rope": ("uniform:key_rope=pre", "keys before RoPE"),
    "custom": (Chosen(fmt=Format(codes="custom")), "bytes of its own"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_strategies_that_cannot_be_served_are_refused_at_once(build, what):
    chosen, reason = REFUSED[what]
    chosen = registry.parse(chosen) if isinstance(chosen, str) else chosen
    with pytest.raises(ValueError, match=f"(?s){reason}.*PackedCache"):
        StaticPackedCache(build("llama"), chosen, max_length=100)


def test_encoders_of_their_own_are_refused_before_anything_is_decoded(model, tokens):
    cache = StaticPackedCache(model, OwnEncoder(), max_length=100)
    with pytest.raises(ValueError, match="a way of its own"):
        decode(model, cache, tokens(1, 8), 1)


def test_models_that_cache_latents_are_refused(build):
    with pytest.raises(ValueError, match=r"caches latents.*use PackedCache"):
        StaticPackedCache(build("deepseek-v3"), strategy("token"), max_length=100)


def test_other_mistakes_say_what_to_do(model, tokens, tmp_path):
    with pytest.raises(ValueError, match="at least one token"):
        StaticPackedCache(model, strategy("token"), max_length=0)
    cache = StaticPackedCache(model, strategy("token"), max_length=100, **OPTIONS)
    decode(model, cache, tokens(2, 40), 10)
    with pytest.raises(NotImplementedError, match="use PackedCache"):
        cache.save(tmp_path / "cache.safetensors")
    with pytest.raises(NotImplementedError, match=r"PackedCache\.load"):
        StaticPackedCache.load(tmp_path / "cache.safetensors", model, strategy("token"))
    with pytest.raises(RuntimeError, match=r"under torch\.no_grad"):
        model(tokens(2, 1), past_key_values=cache)
    detach(model)
    with pytest.raises(RuntimeError, match=r"Call attach\(model\)"), torch.no_grad():
        model(tokens(2, 1), past_key_values=cache)
    attach(model)
    decode_one(model, cache)
    assert cache.get_seq_length() == 51
