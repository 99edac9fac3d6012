"""Models decode through the interpreted Triton kernels as through the reference. Run by `test_interpreted.py`."""

import warnings

import pytest
import torch

from cachequant import registry
from cachequant.core import PackedCache
from cachequant.core.hf.tiny import tiny_model
from cachequant.kernels import backend, fused

STRATEGIES = [
    "uniform:bits=2,group_size=32",
    "turboquant:key_bits=3,value_bits=3,boundary_layers=0",
    "uniform:bits=4,key_scale=channel,key_rope=pre",
    "fp8:scale=tensor",
]


@pytest.fixture(scope="module")
def model():
    return tiny_model()


def logits(model, spec, mask, **options):
    """Of the prompt's last token, of a chunk and of a single token, `[batch, 7, vocabulary]`."""
    # no token twice: where numbers tie for a slot, either may get it
    embedded = torch.randn(len(mask), mask.shape[1], 64, generator=torch.Generator().manual_seed(1))
    cache = PackedCache(model, registry.parse(spec), residual_length=8, **options)
    with torch.no_grad():
        return torch.cat(
            [
                model(
                    inputs_embeds=embedded[:, start:stop], attention_mask=mask[:, :stop], past_key_values=cache
                ).logits[:, -keep:]
                for start, stop, keep in ((0, 140, 1), (140, 145, 5), (145, 146, 1))
            ],
            dim=1,
        )


@pytest.fixture
def launches(monkeypatch):
    """How many times the fused kernels were asked."""
    counted = []

    def attend(query, packed, exact, *rest, real=fused.attend):
        counted.append((packed is not None, len(exact)))
        return real(query, packed, exact, *rest)

    monkeypatch.setattr(fused, "attend", attend)
    return counted


def agree(model, spec, mask, launches, **options):
    with backend.reference_only():
        expected = logits(model, spec, mask, **options)
    assert not launches
    with warnings.catch_warnings():
        # a warning would say that the torch path served it
        warnings.simplefilter("error", UserWarning)
        found = logits(model, spec, mask, **options)
    # a chunk and a token, in each of two layers
    assert len(launches) == 4
    assert (found - expected).norm() <= 3e-3 * expected.norm()


@pytest.mark.parametrize("spec", STRATEGIES)
def test_decoding_agrees_with_the_reference(model, spec, launches):
    agree(model, spec, torch.ones(1, 146, dtype=torch.long), launches)


@pytest.mark.parametrize("spec", ["uniform:bits=4", "none", "kvquant:calibration=prompt,bits=4"])
def test_sinks_beside_left_padding_agree(model, spec, launches):
    mask = torch.ones(2, 146, dtype=torch.long)
    mask[1, :30] = 0
    agree(model, spec, mask, launches, sink_tokens=3)


def test_more_sinks_than_packed_tokens_agree(model, launches):
    agree(model, "uniform:bits=4,block=32", torch.ones(1, 146, dtype=torch.long), launches, sink_tokens=128)


def test_an_added_mask_is_served_by_the_reference_with_a_warning(model, launches):
    ids = torch.arange(148)[None] % 90
    cache = PackedCache(model, registry.parse("uniform:bits=4"), residual_length=8)
    backend.warn_once.cache_clear()
    with torch.no_grad():
        model(ids, past_key_values=cache)
        with pytest.warns(UserWarning, match="added, or differs by head"):
            model(ids[:, :1], past_key_values=cache, attention_mask=torch.zeros(1, 1, 1, 149))
    assert not launches


def test_training_takes_the_reference(model, launches):
    cache = PackedCache(model, registry.parse("uniform:bits=4"), residual_length=8)
    with torch.no_grad():
        model(torch.arange(148)[None] % 90, past_key_values=cache)
    model(torch.tensor([[5]]), past_key_values=cache).logits.sum().backward()
    assert not launches
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters() if parameter.grad is not None)
