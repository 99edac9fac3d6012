"""Steps of a static cache by the Triton kernels are what torch makes of them."""

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from cachequant import registry
from cachequant.core import LayerSpec, StaticPackedCache
from cachequant.kernels import backend, ops

HEADS, DIM = 2, 32
RESIDUAL = 16

STRATEGIES = {
    "token": "uniform:bits=4,block=32",
    "channel": "uniform:bits=3,block=128,key_scale=channel,value_bits=2",
    "rotated": "uniform:bits=2,block=32,rotation=hadamard",
    "codebook": "kvquant:bits=4,block=128,key_rope=post,calibration=prompt",
    "norm": "turboquant:boundary_layers=0",
    "float8": "fp8:scale=head",
    "exact": "none:block=32",
}


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "intermediate_size": 64, "num_hidden_layers": 1, "vocab_size": 300}
    config = LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=HEADS, head_dim=DIM)
    return LlamaForCausalLM(config).eval()


@torch.no_grad()
def buffers(model: LlamaForCausalLM, spec: str, sinks: int) -> ops.Buffers:
    """Of a layer that has got a prompt, by torch: one block is packed, the second is due 2 steps later."""
    strategy = registry.parse(spec)
    length = RESIDUAL + 2 * strategy.formats(LayerSpec(0, 1, HEADS, DIM, DIM)).block - 2
    options = {"max_length": length + 20, "residual_length": RESIDUAL, "sink_tokens": sinks}
    with backend.reference_only():
        cache = StaticPackedCache(model, strategy, **options)
        generator = torch.Generator().manual_seed(1)
        # no token comes twice: equal numbers compete for outlier slots, and either may win
        ids = torch.stack([torch.randperm(300, generator=generator)[:length] for _ in range(2)])
        model(ids, past_key_values=cache)
    return cache.layers[0].buffers


def run(held: ops.Buffers, steps: int, mask: Tensor | None, softcap: float | None, s_aux: Tensor | None) -> Tensor:
    """Outputs of some steps."""
    generator, outputs = torch.Generator().manual_seed(2), []
    for _ in range(steps):
        query, key, value = (torch.randn(2, heads, 1, DIM, generator=generator) for heads in (4, HEADS, HEADS))
        held.append(key, value)
        outputs.append(held.attend(query, mask, 0.2, softcap, s_aux))
    return torch.cat(outputs, dim=1)


@pytest.mark.parametrize(("name", "sinks"), [(name, 0 if name == "rotated" else 3) for name in STRATEGIES])
def test_steps_are_those_of_the_reference(model, name, sinks, recwarn):
    masked = torch.rand(2, 1, 1, 300, generator=torch.Generator().manual_seed(3)) < 0.8
    mask, softcap, s_aux = (masked, 5.0, torch.linspace(-1, 1, 4)) if sinks else (None, None, None)
    kept, held = buffers(model, STRATEGIES[name], sinks), buffers(model, STRATEGIES[name], sinks)
    with backend.reference_only():
        expected = run(kept, 4, mask, softcap, s_aux)
    # a code on the edge between two levels may be either
    torch.testing.assert_close(run(held, 4, mask, softcap, s_aux), expected, rtol=0, atol=1e-2)
    for now, wanted in zip(held.key_parts + held.value_parts, kept.key_parts + kept.value_parts, strict=True):
        assert (now != wanted).float().mean() < 0.01
    for now, wanted in zip((*held.tails, *held.sinks, held.real), (*kept.tails, *kept.sinks, kept.real), strict=True):
        assert torch.equal(now, wanted)
    assert int(held.length) == int(kept.length) and int(held.blocks) == 2
    assert not [warning for warning in recwarn if "slower" in str(warning.message)]
