"""`SimulatedCache(every_token=True)` is what papers evaluate: every key and value is what its code stands for."""

import pytest
import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from cachequant import registry
from cachequant.core import LayerSpec, SimulatedCache, detach
from cachequant.core.hf.tiny import tiny_model
from cachequant.kernels import quantize

TOKENS = 384

SPECS = {
    "uniform": "uniform:bits=3",
    "uniform, small blocks": "uniform:bits=2,key_scale=channel,block=32",
    "kvquant": "kvquant:bits=3,calibration=prompt",
    "kvquant, no outliers": "kvquant:bits=2,outliers=0,calibration=prompt",
}


@pytest.fixture(scope="module")
def model():
    # in float32, rounding of one layer turns codes of the next over
    return tiny_model(torch.float64)


@pytest.fixture(scope="module")
def ids():
    return torch.randint(2, 97, (2, TOKENS), generator=torch.Generator().manual_seed(3))


@torch.no_grad()
def simulate(model, strategy, ids: Tensor, **options) -> Tensor:
    try:
        return model(ids, past_key_values=SimulatedCache(model, strategy, every_token=True, **options)).logits
    finally:
        detach(model)


@torch.no_grad()
def fake_quantized(model, strategy, ids: Tensor, sinks: int) -> Tensor:
    """The model's logits, every layer written out: no cache, no attention function of ours."""
    base = model.model
    hidden = base.embed_tokens(ids)
    cos, sin = base.rotary_emb(hidden, torch.arange(ids.shape[1])[None])
    above = torch.ones(ids.shape[1], ids.shape[1]).triu(1).bool()
    for index, layer in enumerate(base.layers):
        residual, hidden = hidden, layer.input_layernorm(hidden)
        attention = layer.self_attn
        query, key, value = (
            projection(hidden).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)
            for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        formats = strategy.formats(LayerSpec(index, len(base.layers), key.shape[1], key.shape[3], value.shape[3]))
        rotated_query, rotated_key = apply_rotary_pos_emb(query, key, cos, sin)
        if formats.key.rope == "pre":
            key = rounded(strategy, formats, "key", key, index, sinks)
            _, key = apply_rotary_pos_emb(query, key, cos, sin)
        else:
            key = rounded(strategy, formats, "key", rotated_key, index, sinks)
        value = rounded(strategy, formats, "value", value, index, sinks)
        groups = query.shape[1] // key.shape[1]
        key, value = (states.repeat_interleave(groups, dim=1) for states in (key, value))
        scores = (rotated_query @ key.transpose(-1, -2) * attention.scaling).masked_fill(above, -torch.inf)
        mixed = (scores.softmax(-1) @ value).transpose(1, 2).flatten(2)
        hidden = residual + attention.o_proj(mixed)
        hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
    return model.lm_head(base.norm(hidden))


def rounded(strategy, formats, side, states: Tensor, index: int, sinks: int) -> Tensor:
    """Encoded and decoded, the first `sinks` tokens put back."""
    block, fmt = formats.block, getattr(formats, side)
    valid = (torch.arange(states.shape[2]) >= sinks).expand(states.shape[0], -1) if sinks else None
    spec = LayerSpec(index, 2, states.shape[1], states.shape[3], states.shape[3])
    tables = strategy.tables(spec, side, states[:, :, :block], None if valid is None else valid[:, :block])
    packed = strategy.encode(states, fmt, side, block, valid, tables)
    decoded = quantize.decode(packed, fmt, side, states.shape[3], block, tables, states.dtype)
    return torch.cat([states[:, :, :sinks], decoded[:, :, sinks:]], dim=2)


@pytest.mark.parametrize("sinks", [0, 3])
@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_every_query_reads_every_token_as_its_codes(model, ids, spec, sinks):
    strategy = registry.parse(spec)
    simulated = simulate(model, strategy, ids, sink_tokens=sinks)
    expected = fake_quantized(model, strategy, ids, sinks)
    with torch.no_grad():
        exact = model(ids).logits
    torch.testing.assert_close(simulated, expected, rtol=1e-5, atol=1e-5)
    assert (exact - expected).abs().max() > 0.05, "nothing was quantized"


def test_exact_codes_give_the_models_own_logits(model, ids):
    with torch.no_grad():
        expected = model(ids).logits
    torch.testing.assert_close(simulate(model, registry.parse("none"), ids), expected, rtol=1e-5, atol=1e-5)


def test_the_first_token_is_quantized_unless_it_is_a_sink(model, ids):
    strategy = registry.parse("uniform:bits=2")
    with torch.no_grad():
        exact = model(ids).logits[:, 0]
    assert (simulate(model, strategy, ids)[:, 0] - exact).abs().max() > 0.05
    torch.testing.assert_close(simulate(model, strategy, ids, sink_tokens=1)[:, 0], exact, rtol=1e-5, atol=1e-5)


def test_a_block_that_is_not_full_is_refused_with_the_length_that_fits(model, ids):
    with pytest.raises(ValueError, match="whole blocks of 128 tokens, the sequence has 300; use 256"):
        simulate(model, registry.parse("uniform"), ids[:, :300])
    with pytest.raises(ValueError, match="the sequence has 5; use 128"):
        simulate(model, registry.parse("uniform"), ids[:, :5])


@pytest.mark.parametrize("option", [{"residual_length": 32}, {"prefill": 64}, {"chunk": 2}])
def test_options_that_would_leave_tokens_exact_are_refused(model, option):
    with pytest.raises(ValueError, match="leaves nothing exact"):
        SimulatedCache(model, registry.parse("uniform"), every_token=True, **option)


@pytest.mark.parametrize("every_token", [False, True])
def test_models_that_expand_latents_themselves_are_refused(build, every_token):
    model = build("deepseek-v3")
    ids = torch.randint(2, 97, (1, 128), generator=torch.Generator().manual_seed(0))
    cache = SimulatedCache(model, registry.parse("uniform:key_rope=post"), every_token=every_token)
    with torch.no_grad(), pytest.raises(RuntimeError, match="SimulatedCache cannot serve this model: layer 0 uses its"):
        model(ids, past_key_values=cache)
    detach(model)
