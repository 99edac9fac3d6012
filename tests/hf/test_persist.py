"""A saved cache resumes where it was, for its own model and strategy only, and a damaged file says so."""

import json
import re

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import DynamicCache

from cachequant import registry
from cachequant.core import PackedCache
from cachequant.core.hf import persist
from cachequant.strategies.uniform import Uniform

SPECS = {
    "none": "none:block=32",
    "token": "uniform:bits=4,block=32",
    "channel": "uniform:bits=2,block=32,key_scale=channel",
    "pre": "uniform:bits=3,block=32,key_scale=channel,key_rope=pre",
    "rotated": "uniform:bits=4,block=32,rotation=hadamard",
}
ARCHITECTURES = ["llama", "dynamic-ntk", "gemma3", "gpt-neox", "gpt-oss", "qwen3-next", "lfm2", "deepseek-v3"]
OPTIONS = {"residual_length": 16, "sink_tokens": 3, "skip_layers": [-1]}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "conversation.cache"


@pytest.fixture
def saved(build, tokens, step, path):
    """A cache of 100 tokens of llama, and the file it was written to."""
    model = build("llama")
    cache = PackedCache(model, Uniform(block=32), **OPTIONS)
    step(model, tokens(2, 100), cache)
    cache.save(path)
    return model, cache


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_loaded_cache_goes_on_bit_for_bit(build, tokens, left_padded, step, path, architecture, spec):
    if architecture == "deepseek-v3" and "pre" in spec:
        pytest.skip("latent attention has no keys before RoPE")
    model = build(architecture)
    ids, mask = left_padded(tokens(2, 100), [21, 0])
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    cache = PackedCache(model, registry.parse(spec), **OPTIONS)
    step(model, ids, cache, attention_mask=mask, position_ids=positions)
    cache.save(path)
    other = build(architecture)  # as in another process
    step(other, ids, DynamicCache(config=other.config))  # dynamic NTK remembers lengths, not tokens
    loaded = PackedCache.load(path, other, registry.parse(spec))
    assert loaded.get_seq_length() == 100
    assert loaded.memory().rows["tail"] == cache.memory().rows["tail"]
    for length in (1, 1, 45, 3):
        mask = torch.nn.functional.pad(mask, (0, length), value=1)
        positions = positions[:, -1:] + torch.arange(1, length + 1)
        inputs = {"attention_mask": mask, "position_ids": positions}
        chunk = tokens(2, length, seed=length)
        assert torch.equal(step(other, chunk, loaded, **inputs), step(model, chunk, cache, **inputs))


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_loaded_cache_generates_the_same_tokens(build, tokens, step, path, spec):
    model = build("qwen3")
    cache = PackedCache(model, registry.parse(spec), residual_length=16)
    step(model, tokens(1, 90), cache)
    cache.save(path)
    answers = [
        model.generate(tokens(1, 95), past_key_values=each, max_new_tokens=30, do_sample=False)
        for each in (cache, PackedCache.load(path, model, registry.parse(spec)))
    ]
    assert torch.equal(*answers)


def test_file_is_about_as_large_as_the_cache(saved, path):
    _, cache = saved
    used = cache.memory().device_bytes - cache.memory().rows["spare"]
    assert used <= path.stat().st_size <= used + 8192


def test_empty_cache_is_saved_and_loaded(build, tokens, step, path):
    model = build("llama")
    PackedCache(model, Uniform(), **OPTIONS).save(path)
    loaded = PackedCache.load(path, model, Uniform())
    assert loaded.get_seq_length() == 0
    step(model, tokens(1, 40), loaded)


def test_options_come_from_the_file(saved, path):
    model, cache = saved
    assert PackedCache.load(path, model, cache.strategy).options == cache.options


def test_loaded_caches_share_nothing(saved, path, tokens, step):
    model, cache = saved
    first, second = (PackedCache.load(path, model, cache.strategy) for _ in range(2))
    first.truncate(3)
    step(model, tokens(2, 70, seed=5), first)
    question = tokens(2, 1, seed=6)
    assert torch.equal(step(model, question, second), step(model, question, cache))


# ---- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kept", [0, 4, 8, 100, 0.5, 0.99, -1])
def test_truncated_file_is_refused(saved, path, kept):
    model, cache = saved
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content))] if 0 < kept < 1 else content[:kept])
    with pytest.raises(ValueError, match="is damaged or truncated"):
        PackedCache.load(path, model, cache.strategy)


def test_missing_file_is_named(saved, tmp_path):
    model, cache = saved
    with pytest.raises(FileNotFoundError, match=r"nowhere\.cache"):
        PackedCache.load(tmp_path / "nowhere.cache", model, cache.strategy)


def test_file_of_another_kind_is_refused(saved, path):
    model, cache = saved
    save_file({"weight": torch.zeros(3)}, path)
    with pytest.raises(ValueError, match=r"not one that PackedCache\.save wrote"):
        PackedCache.load(path, model, cache.strategy)


@pytest.mark.parametrize(
    ("changes", "difference"),
    [
        ({"seed": 1}, "weights: "),
        ({"num_hidden_layers": 2}, "num_hidden_layers: 3 in the file, 2 here"),
        ({"num_key_value_heads": 4}, "num_key_value_heads: 2 in the file, 4 here"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, "rope_parameters: "),
    ],
    ids=["weights", "layers", "heads", "rope"],
)
def test_another_model_is_refused_naming_what_differs(saved, build, path, changes, difference):
    _, cache = saved
    with pytest.raises(ValueError, match=f"was saved from another model: .*{difference}"):
        PackedCache.load(path, build("llama", **changes), cache.strategy)


def test_another_strategy_is_refused_naming_what_differs(saved, path):
    model, _ = saved
    with pytest.raises(ValueError, match="was saved with another strategy: bits: 4 in the file, 2 here"):
        PackedCache.load(path, model, Uniform(bits=2, block=32))
    with pytest.raises(ValueError, match="was saved with another strategy: name: 'uniform' in the file, 'none' here"):
        PackedCache.load(path, model, registry.parse("none:block=32"))


def with_header(path, change) -> None:
    """Rewrite the file with its header changed."""
    with safe_open(path, framework="pt") as file:
        header = json.loads(file.metadata()["cachequant"])
    tensors = load_file(path)
    save_file(tensors, path, {"cachequant": change(header)})


def test_another_version_is_refused_naming_both(saved, path):
    model, cache = saved
    with_header(path, lambda header: json.dumps({**header, "version": persist.FILE_VERSION + 1}))
    with pytest.raises(
        ValueError,
        match=f"has file version {persist.FILE_VERSION + 1}, this cachequant reads version {persist.FILE_VERSION}",
    ):
        PackedCache.load(path, model, cache.strategy)


@pytest.mark.parametrize(
    "change",
    [lambda header: "{", lambda header: "[]", lambda header: json.dumps({"version": persist.FILE_VERSION})],
    ids=["no-json", "list", "incomplete"],
)
def test_damaged_header_is_refused(saved, path, change):
    model, cache = saved
    with_header(path, change)
    with pytest.raises(ValueError, match=re.escape(str(path))):
        PackedCache.load(path, model, cache.strategy)


def test_failed_save_leaves_the_old_file_and_no_other(saved, path, monkeypatch):
    _, cache = saved
    before = path.read_bytes()

    def fail(tensors, target, *args):
        target.write_bytes(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr(persist, "save_file", fail)
    cache.truncate(40)
    with pytest.raises(OSError, match="no space left"):
        cache.save(path)
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


def test_saving_changes_nothing(saved, path, tokens, step):
    model, cache = saved
    twin = PackedCache.load(path, model, cache.strategy)
    cache.save(path)
    cache.save(path)
    assert torch.equal(step(model, tokens(2, 1), cache), step(model, tokens(2, 1), twin))
