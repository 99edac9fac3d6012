"""The bundled model is small, retrieves, and has a twin that differs in nothing but the size of its keys."""

import hashlib
import random

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from cachequant.benchmarks import corpus, passkey, reference


@pytest.fixture(scope="module")
def bundled():
    return reference.load()


@pytest.fixture(scope="module")
def filler(bundled):
    return passkey.filler_ids(bundled[1])


def tiny_llama(**changes):
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 100}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads, **changes)).eval()


# --- corpus


def test_corpus_splits_share_no_document():
    train, heldout = (set(corpus.stdlib_text(split).text.split(corpus.SEPARATOR)) for split in ("train", "heldout"))
    long = {document for document in heldout if len(document) > 500}
    assert long and not long & train


def test_heldout_text_is_about_a_twentieth():
    train, heldout = corpus.stdlib_text("train"), corpus.stdlib_text("heldout")
    assert 0.03 < len(heldout.text) / len(train.text) < 0.10


def test_corpus_is_the_same_twice_and_named_by_its_hash():
    first, second = corpus.stdlib_text("heldout"), corpus.stdlib_text("heldout")
    assert first == second
    assert first.sha256 == hashlib.sha256(first.text.encode()).hexdigest()


def test_every_heldout_topic_exists():
    from pydoc_data.topics import topics

    assert topics.keys() >= corpus.HELDOUT_TOPICS


def test_corpus_refuses_an_unknown_split():
    with pytest.raises(ValueError, match="'test'"):
        corpus.stdlib_text("test")


def test_corpus_says_what_to_do_without_sources(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus.sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(FileNotFoundError, match="pass a text file"):
        corpus.stdlib_text("heldout")


# --- model and twin


def test_weights_fit_twelve_megabytes():
    assert (reference.FOLDER / "model.safetensors").stat().st_size <= 12_000_000


def test_model_is_llama_with_grouped_queries_and_a_full_context(bundled):
    config = bundled[0].config
    assert config.model_type == "llama"
    assert config.num_attention_heads > config.num_key_value_heads
    assert config.head_dim in (64, 128)
    assert config.max_position_embeddings >= 2048


def test_model_predicts_heldout_text(bundled, filler):
    model, tokenizer = bundled
    starts = range(0, len(filler) - 512, len(filler) // 8)
    ids = torch.tensor([[tokenizer.bos_token_id, *filler[start : start + 511]] for start in starts])
    with torch.inference_mode():
        loss = model(ids, labels=ids).loss.item()
    assert loss < 3.3, "the model card says 2.9 nats per token"


def test_twin_computes_the_same_logits_with_larger_keys(bundled, filler):
    model, twin = bundled[0], reference.outlier_twin(bundled[0])
    ids = torch.tensor([filler[:256]])
    with torch.inference_mode():
        plain, scaled = model(ids, use_cache=True), twin(ids, use_cache=True)
    assert (plain.logits - scaled.logits).abs().max() <= 1e-3
    for before, after in zip(plain.past_key_values.layers, scaled.past_key_values.layers, strict=True):
        torch.testing.assert_close(before.values, after.values, atol=1e-3, rtol=1e-3)
        growth = after.keys.abs().amax(2) / before.keys.abs().amax(2)  # [batch, heads, head_dim]
        assert ((growth > 3).sum(-1) == 4).all(), "two pairs of channels per key head should have grown"
        outliers = after.keys.abs().amax(2).amax(-1) / after.keys.abs().amax(2).median(-1).values
        assert (outliers > 4).all()


def test_twin_leaves_the_model_alone():
    model = tiny_llama()
    before = {name: param.clone() for name, param in model.named_parameters()}
    reference.outlier_twin(model)
    assert all(torch.equal(before[name], param) for name, param in model.named_parameters())


def test_twin_scales_biases_too():
    model = tiny_llama(attention_bias=True)
    for layer in model.model.layers:
        torch.nn.init.normal_(layer.self_attn.q_proj.bias)
        torch.nn.init.normal_(layer.self_attn.k_proj.bias)
    twin = reference.outlier_twin(model)
    ids = torch.arange(50)[None]
    torch.testing.assert_close(model(ids).logits, twin(ids).logits, atol=1e-4, rtol=1e-4)


def test_twin_refuses_joint_projections():
    config = GPT2Config(n_layer=1, n_embd=32, n_head=2, vocab_size=100)
    with pytest.raises(ValueError, match="separate q_proj and k_proj"):
        reference.outlier_twin(GPT2LMHeadModel(config))


def test_twin_refuses_normalized_keys():
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "vocab_size": 100}
    config = Qwen3Config(**sizes, num_attention_heads=2, num_key_value_heads=1, head_dim=16)
    with pytest.raises(ValueError, match="normalizes"):
        reference.outlier_twin(Qwen3ForCausalLM(config))


def test_twin_refuses_rotations_it_does_not_know(monkeypatch):
    from transformers.models.llama import modeling_llama

    model = tiny_llama()
    for layer in model.model.layers:
        layer.self_attn.q_proj.weight.data *= 20

    def neighbours(x):
        return torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2)

    monkeypatch.setattr(modeling_llama, "rotate_half", neighbours)
    with pytest.raises(ValueError, match="another way"):
        reference.outlier_twin(model)


@pytest.mark.parametrize(("field", "value"), [("channels", 0), ("channels", 9), ("scale", -1.0)])
def test_twin_refuses_sizes_out_of_range(field, value):
    with pytest.raises(ValueError, match=f"{field}={value}"):
        reference.outlier_twin(tiny_llama(), **{field: value})


# --- passkey


@pytest.mark.parametrize("length", [100, 513, 2048])
@pytest.mark.parametrize("depth", [0.0, 0.3, 1.0])
def test_prompt_and_answer_fill_the_length_exactly(bundled, filler, length, depth):
    tokenizer = bundled[1]
    prompt = passkey.passkey_prompt(tokenizer, filler, length, depth, random.Random(length))
    answer = tokenizer(f" {prompt.key}", add_special_tokens=False).input_ids
    assert len(prompt.ids) + len(answer) == length
    assert prompt.ids[0] == tokenizer.bos_token_id


def test_prompt_tells_the_key_exactly_once(bundled, filler):
    tokenizer, rng = bundled[1], random.Random(5)
    for depth in (0.0, 0.5, 1.0) * 20:
        prompt = passkey.passkey_prompt(tokenizer, filler, 2048, depth, rng)
        text = tokenizer.decode(prompt.ids)
        assert text.count(prompt.key) == 1
        assert passkey.NEEDLE.format(key=prompt.key) in text
        assert text.endswith(passkey.QUESTION)


def test_prompt_skips_filler_that_holds_the_key(bundled):
    tokenizer = bundled[1]
    first_key = "".join(random.Random(0).choices("0123456789", k=passkey.KEY_DIGITS))
    filler = tokenizer(f"see {first_key} there. " * 50, add_special_tokens=False).input_ids
    prompt = passkey.passkey_prompt(tokenizer, filler, 200, 0.5, random.Random(0))
    assert prompt.key != first_key
    assert tokenizer.decode(prompt.ids).count(prompt.key) == 1


def test_digits_are_single_tokens(bundled):
    assert len(bundled[1](" 48213", add_special_tokens=False).input_ids) == passkey.ANSWER_TOKENS


def test_prompt_refuses_what_does_not_fit(bundled, filler):
    tokenizer = bundled[1]
    with pytest.raises(ValueError, match="depth=2"):
        passkey.passkey_prompt(tokenizer, filler, 512, 2)
    with pytest.raises(ValueError, match="use at least"):
        passkey.passkey_prompt(tokenizer, filler, 20)
    with pytest.raises(ValueError, match="pass a longer text"):
        passkey.passkey_prompt(tokenizer, filler[:100], 512)
    with pytest.raises(ValueError, match="use at most 2048"):
        passkey.passkey_accuracy(*bundled, 4096)


def test_passkey_is_retrieved_at_full_context(bundled, filler):
    result = passkey.passkey_accuracy(*bundled, 2048, samples=20, filler=filler)
    assert result.accuracy >= 0.95, result
    assert set(result.by_depth) == set(passkey.DEPTHS)


def test_batched_and_single_prompts_score_alike(bundled, filler):
    one, four = (passkey.passkey_accuracy(*bundled, 300, samples=8, batch_size=n, filler=filler) for n in (1, 4))
    assert one == four


def test_answers_are_read_through_the_given_cache(bundled, filler):
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer

    class Forgetful(DynamicLayer):
        def update(self, key_states, value_states, *args, **kwargs):
            return super().update(key_states, torch.zeros_like(value_states), *args, **kwargs)

    def make_cache():
        cache = DynamicCache(config=bundled[0].config)
        cache.layers = [Forgetful() for _ in cache.layers]
        return cache

    assert passkey.passkey_accuracy(*bundled, 256, make_cache, samples=5, filler=filler).accuracy == 0
