"""A model that device_map spreads over memory and disk generates, learns and saves as one that is in one place."""

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from cachequant import registry
from cachequant.core import PackedCache, StaticPackedCache
from cachequant.core.hf.attach import attention_modules
from cachequant.core.hf.compat import computes_on

pytestmark = pytest.mark.slow

pytest.importorskip("accelerate")

# weights on disk are brought to the CPU by hooks, layer by layer, and let go after use
PLACES = {
    "model.embed_tokens": "disk",
    "model.rotary_emb": "cpu",
    "model.layers.0": "cpu",
    "model.layers.1": "disk",
    "model.norm": "cpu",
    "lm_head": "disk",
}
RESIDUAL = 16
SPECS = [
    "none:block=32",
    "uniform:bits=4,rotation=hadamard,block=32",
    "uniform:bits=4,key_scale=channel,key_rope=pre,block=32",
    "kvquant:bits=3,block=32,calibration=prompt",
    "qaq:interval=16",
    "qaq:interval=16,granularity=token",
    "h2o:interval=16,keep=0.5",
]
CALIBRATED = "kvquant:bits=3,block=32"


class Pair(NamedTuple):
    whole: PreTrainedModel
    spread: PreTrainedModel


@pytest.fixture(scope="module", params=["llama", "qwen3"])
def pair(
    request: pytest.FixtureRequest,
    build: Callable[..., PreTrainedModel],
    tmp_path_factory: pytest.TempPathFactory,
) -> Pair:
    """The same weights in one place, and spread."""
    folder = tmp_path_factory.mktemp("spread")
    build(request.param, num_hidden_layers=2, head_dim=32).save_pretrained(folder)
    # `build` shares its models between tests, and attaching changes them
    whole = AutoModelForCausalLM.from_pretrained(folder)
    spread = AutoModelForCausalLM.from_pretrained(folder, device_map=PLACES, offload_folder=str(folder / "offloaded"))
    return Pair(whole.eval(), spread.eval())


@pytest.fixture(scope="module")
def prompt(tokens, left_padded) -> dict[str, Tensor]:
    ids, mask = left_padded(tokens(2, 100), [9, 0])
    return {"input_ids": ids, "attention_mask": mask}


def generated(model: PreTrainedModel, cache: PackedCache, prompt: dict[str, Tensor]) -> Tensor:
    return model.generate(**prompt, past_key_values=cache, max_new_tokens=24, do_sample=False)[:, 100:]


def test_its_weights_really_are_elsewhere(pair):
    assert next(pair.spread.model.layers[1].parameters()).device.type == "meta"
    assert {computes_on(module).type for module in attention_modules(pair.spread).values()} == {"cpu"}


@pytest.mark.parametrize("spec", SPECS)
def test_a_spread_model_generates_the_same_tokens(pair, prompt, spec):
    caches = [PackedCache(model, registry.parse(spec), residual_length=RESIDUAL) for model in pair]
    whole, spread = (generated(*each, prompt) for each in zip(pair, caches, strict=True))
    assert len(whole.unique()) > 4, "a model that repeats itself shows nothing"
    assert torch.equal(spread, whole)
    assert caches[1].memory() == caches[0].memory()


def test_a_static_cache_serves_a_spread_model(pair, prompt):
    strategy = registry.parse("uniform:bits=4,block=32")
    caches = [StaticPackedCache(model, strategy, residual_length=RESIDUAL, max_length=200) for model in pair]
    whole, spread = (generated(*each, prompt) for each in zip(pair, caches, strict=True))
    assert torch.equal(spread, whole)


@pytest.mark.parametrize("spec", [SPECS[2], SPECS[4]])
def test_a_loaded_cache_continues_on_a_spread_model(pair, prompt, spec, tmp_path):
    strategy, file = registry.parse(spec), tmp_path / "cache.safetensors"
    cache = PackedCache(pair.spread, strategy, residual_length=RESIDUAL)
    with torch.no_grad():
        pair.spread(**{name: tensor[:, :-1] for name, tensor in prompt.items()}, past_key_values=cache)
    cache.save(file)
    loaded = PackedCache.load(file, pair.spread, strategy)
    assert torch.equal(generated(pair.spread, loaded, prompt), generated(pair.spread, cache, prompt))


def test_a_spread_model_can_be_calibrated_for_one_that_is_not(pair, prompt, tokens, tmp_path):
    texts = tokens(3, 128, seed=5)
    strategy: Any = registry.parse(CALIBRATED)
    learned = [strategy.calibrate(model, None, texts, samples=2, length=128, heldout=1) for model in pair]
    statistics = [each.calibration.statistics for each in learned]
    for index, sides in statistics[0].items():
        for side, expected in sides.items():
            found = statistics[1][index][side].tensors()
            assert all(torch.equal(tensor, found[name]) for name, tensor in expected.tensors().items())
    saved = learned[1].save_pretrained(tmp_path / "calibration")
    outputs = [generated(model, PackedCache(model, saved, residual_length=RESIDUAL), prompt) for model in pair]
    assert torch.equal(*outputs)


def test_where_a_module_computes_is_said_by_its_weights_or_by_its_hooks():
    class Hook:
        def __init__(self, device: Any) -> None:
            self.execution_device = device

    class Several:
        hooks = (object(), Hook("cpu"))

    def module(device: str, hook: Any) -> torch.nn.Module:
        made: Any = torch.nn.Sequential(torch.nn.Linear(2, 2, device=device))
        made[0]._hf_hook = hook
        return made

    assert computes_on(module("cpu", None)) == torch.device("cpu")
    assert computes_on(module("meta", Hook("cpu"))) == torch.device("cpu")
    assert computes_on(module("meta", Hook("cuda:1"))) == torch.device("cuda", 1)
    assert computes_on(module("meta", Several())) == torch.device("cpu")
    assert computes_on(module("meta", None)) == torch.device("meta")
