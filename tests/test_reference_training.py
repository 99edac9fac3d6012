"""The reference model's training: its sequences, its loop, its checkpoints, and the card written from its log."""

import copy
import json
import math
import random
import re
from collections import Counter

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from cachequant.benchmarks import passkey, reference
from cachequant.benchmarks.corpus import Corpus, stdlib_text
from cachequant.benchmarks.training import card, figures, train
from cachequant.benchmarks.training.architecture import CONTEXT, new_model, train_tokenizer
from cachequant.benchmarks.training.curriculum import ANSWER_WEIGHT, STAGES, Sampler, Stage, stage_at
from cachequant.benchmarks.training.optimizer import FLAT_UNTIL, Muon, orthogonalized, rate_at

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(reference.FOLDER)


@pytest.fixture(scope="module")
def corpus():
    return Corpus(stdlib_text("heldout").text[:60_000], "3.0", "0" * 64, 1)


@pytest.fixture(scope="module")
def sampler(tokenizer, corpus):
    return Sampler(tokenizer, corpus.text)


@pytest.fixture
def counting(tokenizer):
    """A sampler whose text never repeats a token."""
    sampler = Sampler(tokenizer, "")
    sampler.ids = list(range(sampler.first_ordinary, 4096))
    return sampler


def stage(length=256, batch=8, tiled=0.0, copied=0.0, passkey=0.0, max_period=64):
    return Stage(1.0, length, batch, tiled, copied, passkey, max_period)


# --- sequences


@pytest.mark.parametrize("kind", ["text", "tiled", "copied", "passkey"])
@pytest.mark.parametrize("length", [256, CONTEXT])
def test_every_sequence_begins_with_bos_and_fills_the_length(sampler, tokenizer, kind, length):
    chosen = stage(length) if kind == "text" else stage(length, **{kind: 1.0})
    ids, weights, positions = sampler.batch(chosen, random.Random(0))
    assert ids.shape == (8, length + 1)
    assert weights.shape == positions.shape == (8, length)
    assert (ids[:, 0] == tokenizer.bos_token_id).all()
    assert not (ids[:, 1:] == tokenizer.bos_token_id).any()


def test_sequences_depend_on_the_generator_alone(sampler):
    mixed = stage(tiled=0.3, copied=0.3, passkey=0.3)
    first, again, other = (sampler.batch(mixed, random.Random(seed)) for seed in (1, 1, 2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], other[0])


def test_tiled_tokens_repeat_with_one_period_and_the_first_is_not_scored(sampler):
    ids, weights, _ = sampler.batch(stage(batch=50, tiled=1.0, max_period=40), random.Random(0))
    for row, scored in zip(ids[:, 1:], weights, strict=True):
        period = int((scored == 0).sum())
        assert 8 <= period <= 40
        assert (scored[:period] == 0).all() and (scored[period:] == 1).all()
        assert torch.equal(row[period:], row[:-period])


def test_copied_spans_repeat_earlier_text(counting):
    ids, weights, _ = counting.batch(stage(batch=50, copied=1.0), random.Random(0))
    assert (weights == 1).all()
    for row in ids[:, 1:].tolist():
        places = [i for i, token in enumerate(row) if token in row[:i]]
        assert 16 <= len(places) <= 64
        assert places == list(range(places[0], places[-1] + 1))
        source = row.index(row[places[0]])
        assert row[source : source + len(places)] == [row[i] for i in places]


def test_longer_sequences_have_more_copied_spans(counting):
    ids, _, _ = counting.batch(stage(2048, batch=10, copied=1.0), random.Random(0))
    repeated = [sum(count - 1 for count in Counter(row).values()) for row in ids[:, 1:].tolist()]
    assert min(repeated) > 64


def test_pass_keys_are_told_asked_for_and_answered(sampler, tokenizer):
    ids, weights, _ = sampler.batch(stage(batch=20, passkey=1.0), random.Random(0))
    pattern = re.escape(passkey.NEEDLE).replace(r"\{key\}", r"(\d{5})")
    for row, scored in zip(ids, weights, strict=True):
        text = tokenizer.decode(row)
        (key,) = re.findall(pattern, text)
        assert text.endswith(f"{passkey.QUESTION} {key}")
        assert (scored[: -passkey.ANSWER_TOKENS] == 1).all()
        assert scored[-passkey.ANSWER_TOKENS :].tolist() == pytest.approx([ANSWER_WEIGHT * 256] * passkey.ANSWER_TOKENS)
        assert tokenizer.decode(row[-passkey.ANSWER_TOKENS :]).strip() == key


def test_positions_rise_within_the_context_and_those_of_text_have_no_gaps(sampler):
    _, _, plain = sampler.batch(stage(batch=20), random.Random(0))
    assert (plain == torch.arange(256)).all()
    _, _, stretched = sampler.batch(stage(batch=60, tiled=1.0), random.Random(0))
    assert (stretched[:, 0] == 0).all() and (stretched.diff() >= 1).all() and (stretched < CONTEXT).all()
    gaps = (stretched[:, -1] > 255).sum()
    assert 15 < gaps < 45, "about half of the sequences should be stretched"
    _, _, full = sampler.batch(stage(CONTEXT, batch=10, tiled=1.0), random.Random(0))
    assert (full == torch.arange(CONTEXT)).all()


def test_stages_follow_each_other_and_end_on_full_contexts():
    assert stage_at(0.0) is STAGES[0]
    assert stage_at(STAGES[0].until) is STAGES[1]
    assert stage_at(1.0) is stage_at(1.5) is STAGES[-1]
    assert STAGES[-1].length == CONTEXT
    for each in STAGES:
        assert each.tiled + each.copied + each.passkey < 1


# --- tokenizer, model and optimizer


def test_tokenizer_keeps_digits_apart_and_puts_bos_first(corpus):
    tokenizer = train_tokenizer(corpus.text)
    assert tokenizer("a").input_ids[0] == tokenizer.bos_token_id
    assert len(tokenizer(" 48213", add_special_tokens=False).input_ids) == passkey.ANSWER_TOKENS
    assert tokenizer.decode(tokenizer("défi 48213\n", add_special_tokens=False).input_ids) == "défi 48213\n"


def test_new_model_has_the_bundled_shape(tokenizer):
    model = new_model(tokenizer)
    bundled = json.loads((reference.FOLDER / "config.json").read_text())
    config = json.loads(model.config.to_json_string(use_diff=False))
    same = ("vocab_size", "hidden_size", "num_hidden_layers", "num_key_value_heads", "head_dim", "rope_parameters")
    assert {name: config[name] for name in same} == {name: bundled[name] for name in same}


def test_rate_warms_up_stays_and_falls_to_zero():
    assert rate_at(0.0, 0) < rate_at(0.0, 10) < rate_at(0.0, 1000) == 1
    assert rate_at(FLAT_UNTIL, 1000) == 1
    assert rate_at(0.9, 1000) == pytest.approx(0.1 / (1 - FLAT_UNTIL))
    assert rate_at(1.0, 1000) == rate_at(1.1, 1000) == 0


@pytest.mark.parametrize("shape", [(8, 20), (20, 8)])
def test_orthogonalized_matrices_have_singular_values_near_one(shape):
    matrices = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(orthogonalized(matrices))
    assert values.shape == (3, 8)
    assert (values > 0.5).all() and (values < 1.5).all()


def test_muon_refuses_a_closure():
    with pytest.raises(ValueError, match="compute the gradients first"):
        Muon([torch.nn.Parameter(torch.ones(2, 2))], 0.1).step(lambda: 0.0)


# --- loop and checkpoints


@pytest.fixture
def plan(tmp_path):
    return train.parse(
        ["--out", str(tmp_path), "--state", str(tmp_path / "state"), "--threads", "1", "--minutes", "0.0001"]
    )


def toy_trainer(plan, tokenizer, corpus, **changes):
    """A trainer of a toy-size model; a resumed one begins with other weights."""
    plan = train.Plan(**vars(plan) | changes)
    torch.manual_seed(int(plan.resume))
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "vocab_size": 4096}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}
    tokens = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    config = LlamaConfig(**sizes, **heads, **tokens, max_position_embeddings=CONTEXT, tie_word_embeddings=True)
    return train.Trainer(plan, 0, LlamaForCausalLM(config), tokenizer, corpus)


def test_a_step_changes_every_weight_and_counts_itself(plan, tokenizer, corpus):
    trainer = toy_trainer(plan, tokenizer, corpus)
    before = copy.deepcopy(trainer.model.state_dict())
    trainer.train_step(0.0)
    assert not [name for name, param in trainer.model.state_dict().items() if torch.equal(param, before[name])]
    assert (trainer.step, trainer.tokens) == (1, STAGES[0].batch * STAGES[0].length)
    assert trainer.loss == pytest.approx(math.log(4096), rel=0.1)


def test_some_steps_lower_the_loss(plan, tokenizer, corpus):
    trainer = toy_trainer(plan, tokenizer, corpus)
    rows = figures.windows(tokenizer, trainer.sampler.ids, 128, 8)
    before = figures.mean_loss(trainer.model, rows)
    trainer.step = 200  # beyond the warm-up
    for _ in range(12):
        trainer.train_step(0.0)
    assert figures.mean_loss(trainer.model, rows) < before - 0.1


def test_resuming_goes_on_exactly_where_the_checkpoint_was_written(plan, tokenizer, corpus):
    whole = toy_trainer(plan, tokenizer, corpus)
    whole.train_step(0.0)
    whole.save()
    resumed = toy_trainer(plan, tokenizer, corpus, resume=True, minutes=9.0)
    assert (resumed.step, resumed.tokens, resumed.loss) == (whole.step, whole.tokens, whole.loss)
    assert resumed.log == whole.log | {"minutes": 9.0}
    for trainer in (whole, resumed):
        trainer.train_step(0.5)
    assert whole.loss == resumed.loss
    for before, after in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(before, after)


def test_resuming_without_a_checkpoint_says_what_to_do(plan, tokenizer, corpus):
    with pytest.raises(FileNotFoundError, match="start without it"):
        toy_trainer(plan, tokenizer, corpus, resume=True)


def test_a_run_trains_reports_and_writes_a_model_that_loads(plan, tokenizer, corpus):
    trainer = toy_trainer(plan, tokenizer, corpus)
    trainer.run()
    log = json.loads((plan.out / card.LOG).read_text())
    assert log["curve"][-1]["step"] == trainer.step >= 1
    assert log["curve"][-1]["length"] == CONTEXT
    loaded = LlamaForCausalLM.from_pretrained(plan.out)
    assert loaded.dtype == torch.float16
    for trained, read in zip(trainer.model.parameters(), loaded.parameters(), strict=True):
        assert torch.equal(trained.half(), read)
    assert plan.state.is_file()


@pytest.mark.parametrize("arguments", [["--minutes", "0"], ["--threads", "0"]])
def test_command_line_refuses_no_time_and_no_threads(arguments, capsys):
    with pytest.raises(SystemExit):
        train.parse(arguments)
    assert f"{arguments[0]} 0" in capsys.readouterr().err


# --- figures and card


@pytest.fixture
def log():
    return card.read_log(reference.FOLDER)


@pytest.fixture(scope="module")
def config():
    return json.loads((reference.FOLDER / "config.json").read_text())


def test_rounding_keeps_the_extremes_and_at_most_two_to_the_bits_levels():
    states = torch.randn(1, 2, 3, 64, generator=torch.Generator().manual_seed(0))
    lossy = figures.rounded(states, 2)
    torch.testing.assert_close(lossy.amax(-1), states.amax(-1))
    torch.testing.assert_close(lossy.amin(-1), states.amin(-1))
    assert all(len(torch.unique(group.round(decimals=4))) <= 4 for group in lossy.flatten(0, 2))


def test_fewer_bits_move_the_model_further():
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 100}
    heads = {"num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 64}
    model = LlamaForCausalLM(LlamaConfig(**sizes, **heads)).eval()
    found = figures.sensitivity(model, torch.randint(0, 100, (2, 40)))
    assert found["8 bit"]["kl"] < found["4 bit"]["kl"] < found["2 bit"]["kl"]
    assert found["8 bit"]["perplexity"] == pytest.approx(found["exact"]["perplexity"], rel=1e-3)


def test_figures_are_rounded_to_four_significant_digits():
    assert figures.significant({"a": {"b": 123.456}, "c": 0.000123456, "d": 123456, "e": "x"}) == {
        "a": {"b": 123.5},
        "c": 0.0001235,
        "d": 123456,
        "e": "x",
    }


def test_bundled_card_is_the_one_its_log_makes(log, config):
    assert (reference.FOLDER / card.CARD).read_text(encoding="utf-8") == card.card(log, config)


def test_writing_a_card_twice_gives_the_same_bytes(tmp_path, log, config):
    (tmp_path / card.LOG).write_text(json.dumps(log))
    (tmp_path / "config.json").write_text(json.dumps(config))
    card.write(tmp_path)
    first = (tmp_path / card.CARD).read_bytes()
    card.write(tmp_path)
    assert (tmp_path / card.CARD).read_bytes() == first


@pytest.mark.parametrize(
    ("path", "value", "shown"),
    [
        (("seed",), 4711, "--seed 4711 "),
        (("train_tokens",), 1234567, "| 1,234,567 |"),
        (("measured", "heldout_sha256"), "abc", "| `abc` |"),
        (("curve", -1, "step"), 98765, "98,765 steps"),
        (("curve", 0, "heldout_loss"), 6.789, "| 6.79 |"),
        (("measured", "perplexity", "512"), 77.77, "77.77 /"),
        (("measured", "passkey", "512", "0.25"), 0.13, "| 13 % |"),
        (("measured", "sensitivity_twin", "3 bit", "kl"), 9.87, "| 9.9 |"),
        (("measured", "passkey_twin", "2 bit"), 0.37, "| 37 % |"),
    ],
)
def test_every_figure_of_the_card_comes_from_the_log(log, config, path, value, shown):
    assert shown not in card.card(log, config)
    entry = log
    for key in path[:-1]:
        entry = entry[key]
    entry[path[-1]] = value
    assert shown in card.card(log, config)


def test_the_story_of_one_training_is_not_told_of_another(log, config):
    assert "stopped at minutes" in card.card(log, config)
    del log["notes"]
    assert "stopped at minutes" not in card.card(log, config)


def test_card_names_no_machine_path(log, config):
    assert not re.search(r"/(home|root|tmp|work|usr|Users)\b", card.card(log, config))


def test_card_says_what_its_log_lacks(tmp_path, log, config):
    del log["measured"]
    with pytest.raises(ValueError, match=r"no measured.*--measure"):
        card.card(log, config)
    with pytest.raises(FileNotFoundError, match=r"training\.train"):
        card.write(tmp_path)
