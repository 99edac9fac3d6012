"""Tasks of lm-evaluation-harness read the packed cache: exact, it changes nothing; broken, it spoils every score."""

import copy
import json
import random
import sys
import warnings
from typing import ClassVar

import pytest
import torch
from transformers import DynamicCache, QuantizedCache
from transformers.utils.import_utils import is_optimum_quanto_available
from typer.testing import CliRunner

pytest.importorskip("lm_eval")

import typer
from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from cachequant import registry
from cachequant.benchmarks import contenders, passkey, reference, subjects
from cachequant.benchmarks.lm_eval import __main__ as command
from cachequant.benchmarks.lm_eval import batches, evaluation
from cachequant.benchmarks.lm_eval.cached_model import PROTOCOLS
from cachequant.benchmarks.lm_eval.evaluation import Score, evaluate
from cachequant.benchmarks.lm_eval.local_tasks import local_task
from cachequant.benchmarks.lm_eval.model import CacheQuantLM
from cachequant.benchmarks.tasks.lm_eval import leading_lines, metrics_by_name
from cachequant.core import Format, LayerFormat, PackedCache, Strategy, detach
from cachequant.core.hf.attach import is_attached
from cachequant.registry.hookspecs import hookimpl

pytestmark = pytest.mark.slow

SHORT_TAIL = {"residual_length": 16}

# blocks as small as there are, so that short contexts will do
NONE = "none:block=32"
UNIFORM = "uniform:bits=2,block=32"
CHANNELS = "uniform:bits=2,block=32,key_scale=channel,key_rope=pre"
PROMPT = "kvquant:bits=2,block=32,calibration=prompt"


class Blank(Strategy):
    """Forgets everything: what is packed reads as zeros."""

    name: ClassVar[str] = "blank"

    def formats(self, layer):
        return LayerFormat(key=Format(codes="custom"), value=Format(codes="custom"), block=32)

    def encode(self, states, fmt, side, block, valid, tables):
        return {"nothing": torch.zeros_like(states.unflatten(2, (-1, block))[:, :, :, 0])}

    def decode(self, packed, fmt, side, block, tables):
        return packed["nothing"].repeat_interleave(block, dim=2)


class BlankPlugin:
    @hookimpl
    def cachequant_strategies(self):
        return [Blank]


@pytest.fixture
def blank():
    registry.register(BlankPlugin(), "blank")
    yield "blank"
    registry.unregister("blank")


@pytest.fixture(scope="module")
def loaded():
    return reference.load(torch.float64)


@pytest.fixture(scope="module")
def fast():
    return reference.load(torch.float32)


@pytest.fixture(autouse=True)
def unattached(loaded, fast):
    yield
    for model, _ in (loaded, fast):
        detach(model)


@pytest.fixture(scope="module")
def prompts(fast):
    """Pass keys hidden at the beginning of texts of about 120 tokens, and questions for them."""
    filler, rng = passkey.filler_ids(fast[1]), random.Random(0)
    found = [passkey.passkey_prompt(fast[1], filler, length, 0.2, rng) for length in (120, 126, 132, 120, 152, 120)]
    return [(fast[1].decode(prompt.ids, skip_special_tokens=True), prompt.key) for prompt in found]


def asked(kind, *arguments):
    return [Instance(request_type=kind, doc={}, arguments=each, idx=0) for each in arguments]


def pairs(prompts):
    """Contexts of several lengths, two continuations each, one of them long."""
    texts = [text[:cut] for (text, _), cut in zip(prompts, (None, 200, 60, None, 7, 300), strict=True)]
    return asked(
        "loglikelihood",
        *[(text, f" {key}") for text, (_, key) in zip(texts, prompts, strict=True)],
        *[(text, " not the key\n\nimport os\n" * (1 + i % 4)) for i, text in enumerate(texts)],
        ("", "import numpy"),
    )


def texts(prompts):
    return asked("loglikelihood_rolling", *[(text,) for text in (prompts[0][0] + prompts[1][0], "short")])


def questions(prompts, **arguments):
    settings = {"until": ["\n"], "max_gen_toks": 8, "do_sample": False, **arguments}
    return asked("generate_until", *[(text, settings) for text, _ in (*prompts[1:4], ("x = 1\ny", ""))])


def lm(loaded, strategy=None, batch_size=4, **arguments):
    model, tokenizer = loaded
    return CacheQuantLM(model, strategy, tokenizer=tokenizer, batch_size=batch_size, **arguments)


def answers(model, prompts):
    """Log-likelihoods, greedy or not, of all requests."""
    found = model.loglikelihood(pairs(prompts), disable_tqdm=True)
    rolling = model.loglikelihood_rolling(texts(prompts), disable_tqdm=True)
    return [chance for chance, _ in found] + rolling, [hit for _, hit in found]


@pytest.fixture(scope="module")
def stock(loaded, prompts):
    model = HFLM(pretrained=loaded[0], tokenizer=loaded[1], batch_size=4, max_length=160)
    return *answers(model, prompts), model.generate_until(questions(prompts), disable_tqdm=True)


# --- the exact strategy


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_exact_strategy_scores_as_the_harness_does(loaded, prompts, stock, protocol):
    tail = {} if protocol == "paper" else SHORT_TAIL
    model = lm(loaded, NONE, protocol=protocol, max_length=160, **tail)
    chances, hits = answers(model, prompts)
    assert chances == pytest.approx(stock[0], abs=1e-6)
    assert hits == stock[1] and True in hits and False in hits
    assert model.reading.packed_share > 0.4


def test_exact_strategy_generates_what_the_harness_does(loaded, prompts, stock):
    model = lm(loaded, NONE, max_length=160, **SHORT_TAIL)
    assert model.generate_until(questions(prompts), disable_tqdm=True) == stock[2]
    assert any(key in text for text, (_, key) in zip(stock[2], prompts[1:], strict=False))
    assert model.reading.packed_share > 0.4


@pytest.mark.parametrize("settings", [{"do_sample": True, "temperature": 0.9}, {"num_beams": 2}])
def test_exact_strategy_samples_and_searches_as_the_harness_does(loaded, prompts, settings):
    question = questions(prompts, **settings)[:1]
    found = []
    for model in (HFLM(pretrained=loaded[0], tokenizer=loaded[1]), lm(loaded, NONE, **SHORT_TAIL)):
        torch.manual_seed(3)
        found.append(model.generate_until(question, disable_tqdm=True))
    assert found[0] == found[1]
    assert model.reading.packed_share > 0.4


def test_no_strategy_is_the_stock_cache(loaded, prompts, stock):
    model = lm(loaded, max_length=160)
    assert answers(model, prompts)[0] == pytest.approx(stock[0], abs=1e-6)
    assert model.generate_until(questions(prompts), disable_tqdm=True) == stock[2]
    assert model.reading.packed_share == 0
    assert not is_attached(loaded[0])


# --- the cache is read


def test_forgetful_strategy_lowers_every_score_in_every_protocol(fast, prompts, blank, tmp_path):
    others = [key for _, key in prompts]
    files = {
        "choice": [
            {"query": text, "choices": [other for other in sorted(others)], "gold": sorted(others).index(key)}
            for text, key in prompts
        ],
        "continuation": [{"context": text, "continuation": key} for text, key in prompts],
        "generation": [{"context": text, "answer": f"{key}. Remember it."} for text, key in prompts[:3]],
    }
    paths = [written(tmp_path / f"{name}.jsonl", rows) for name, rows in files.items()]
    exact = {(score.task, score.metric): score for score in evaluate(*fast, None, paths).scores}
    assert {task for task, _ in exact} == set(files)
    for score in exact.values():
        assert score.value == 1.0 or score.metric == "log_likelihood"
    for protocol in PROTOCOLS:
        options = {} if protocol == "paper" else SHORT_TAIL
        # generation is the same under `decode` and `stream`
        found = evaluate(*fast, blank, paths[: 2 if protocol == "stream" else 3], protocol=protocol, options=options)
        for score in found.scores:
            assert score.value < exact[score.task, score.metric].value, (protocol, score)
        assert all(reading.packed_share > 0.4 for reading in found.readings.values())


@pytest.mark.parametrize("spec", [UNIFORM, CHANNELS])
def test_quantization_changes_scores(loaded, prompts, stock, spec):
    chances, _ = answers(lm(loaded, spec, max_length=160, **SHORT_TAIL), prompts)
    moved = [abs(one - other) for one, other in zip(chances, stock[0], strict=True)]
    assert max(moved) > 0.1
    assert min(moved) < 1e-6  # short ones fit into the exact tail


def test_scores_of_short_contexts_are_exact_and_a_warning_says_so(loaded, prompts):
    request = asked("loglikelihood", (prompts[0][0], " 1"))
    model = lm(loaded, UNIFORM, residual_length=512)
    with pytest.warns(UserWarning, match=r"none of the 2 tokens read anything packed.*residual_length"):
        found = model.loglikelihood(request, disable_tqdm=True)
    assert model.reading.packed_share == 0
    assert found[0][0] == pytest.approx(lm(loaded).loglikelihood(request, disable_tqdm=True)[0][0], abs=1e-6)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lm(loaded, UNIFORM, **SHORT_TAIL).loglikelihood(request, disable_tqdm=True)


# --- the protocols agree


def one_by_one(loaded, spec, context, continuation, **options):
    """The log-likelihood by feeding tokens one at a time."""
    model, tokenizer = loaded
    ids = tokenizer(context).input_ids
    targets = tokenizer(context + continuation).input_ids[len(ids) :]
    cache = PackedCache(model, registry.parse(spec), **options)
    total = 0.0
    with torch.no_grad():
        model(torch.tensor([ids[:-1]]), past_key_values=cache)
        for token, target in zip([ids[-1], *targets[:-1]], targets, strict=True):
            logits = model(torch.tensor([[token]]), past_key_values=cache).logits[0, -1]
            total += float(logits.log_softmax(-1)[target])
    return total


@pytest.mark.parametrize("spec", [UNIFORM, CHANNELS, "uniform:bits=2,block=32", PROMPT, "qaq:interval=8", "h2o"])
def test_decoding_in_chunks_is_decoding_token_by_token(loaded, prompts, spec):
    context, continuation = prompts[0][0], " the key is\n\nimport os\n" * (2 if spec.startswith("qaq") else 5)
    request = asked("loglikelihood", (context, continuation))
    ((chance, _),) = lm(loaded, spec, **SHORT_TAIL).loglikelihood(request, disable_tqdm=True)
    assert chance == pytest.approx(one_by_one(loaded, spec, context, continuation, **SHORT_TAIL), abs=1e-4)


def test_simulation_scores_as_decoding_does(loaded, prompts):
    found = [
        lm(loaded, CHANNELS, protocol=protocol, max_length=160, sink_tokens=1, **SHORT_TAIL)
        for protocol in ("decode", "stream")
    ]
    assert answers(found[0], prompts)[0] == pytest.approx(answers(found[1], prompts)[0], abs=1e-4)
    assert found[0].reading.packed_share == pytest.approx(found[1].reading.packed_share)
    assert found[0].reading.tokens == found[1].reading.tokens


def test_simulation_of_a_strategy_that_fits_itself_to_the_prompt_scores_as_decoding_does(loaded, prompts):
    requests = pairs(prompts)[:2]
    decode, stream = (
        lm(loaded, PROMPT, protocol=protocol, **SHORT_TAIL).loglikelihood(requests, disable_tqdm=True)
        for protocol in ("decode", "stream")
    )
    assert [chance for chance, _ in decode] == pytest.approx([chance for chance, _ in stream], abs=1e-4)


# --- batches


@pytest.mark.parametrize(
    ("spec", "protocol"), [*((CHANNELS, protocol) for protocol in PROTOCOLS), (UNIFORM, "decode"), (PROMPT, "decode")]
)
def test_batch_scores_as_single_rows_do(loaded, prompts, spec, protocol):
    tail = {"sink_tokens": 1} if protocol == "paper" else {"sink_tokens": 1, **SHORT_TAIL}
    one, many = (lm(loaded, spec, size, protocol=protocol, **tail) for size in (1, 16))
    requests = pairs(prompts)[:: 3 if spec == PROMPT else 1]
    expected = [chance for chance, _ in one.loglikelihood(requests, disable_tqdm=True)]
    found = [chance for chance, _ in many.loglikelihood(requests, disable_tqdm=True)]
    assert found == pytest.approx(expected, abs=1e-6)
    assert many.reading.packed_share == pytest.approx(one.reading.packed_share)


@pytest.mark.parametrize("spec", ["qaq:interval=8", "h2o:interval=8"])
def test_batch_of_an_adaptive_strategy_scores_as_single_rows_do(loaded, prompts, spec):
    requests = asked("loglikelihood", *[(text, each) for text, key in prompts[:2] for each in (f" {key}\n", " no\nx")])
    found = [
        [chance for chance, _ in lm(loaded, spec, size, **SHORT_TAIL).loglikelihood(requests, disable_tqdm=True)]
        for size in (1, 4)
    ]
    assert found[0] == pytest.approx(found[1], abs=1e-6)


def test_rows_shifted_by_whole_blocks_share_a_batch(loaded, fast, prompts, monkeypatch):
    _, tokenizer = loaded
    long = tokenizer(prompts[4][0]).input_ids
    kept = [long, long[32:], long[40:], long[:33], long[-33:]]
    rows = [(None, ids, tokenizer(" 12345", add_special_tokens=False).input_ids) for ids in kept]
    sizes = []
    original = batches.aligned
    monkeypatch.setattr(
        "cachequant.benchmarks.lm_eval.cached_model.aligned", lambda rows: sizes.append(len(rows)) or original(rows)
    )
    one, many = (
        lm(loaded, CHANNELS, size, sink_tokens=2, **SHORT_TAIL)._loglikelihood_tokens(rows, disable_tqdm=True)
        for size in (1, 8)
    )
    assert sorted(sizes[len(rows) :]) == [1, 2, 2]
    assert [chance for chance, _ in many] == pytest.approx([chance for chance, _ in one], abs=1e-6)


@pytest.mark.parametrize("spec", [UNIFORM, PROMPT, "qaq:interval=8"])
def test_batch_generates_as_single_rows_do(fast, prompts, spec):
    texts = [prompts[0][0], prompts[3][0], prompts[1][0][20:]]
    settings = {"until": ["\n\n\n"], "max_gen_toks": 12, "do_sample": False}
    requests = asked("generate_until", *[(text, settings) for text in texts])
    one, many = (lm(fast, spec, size, **SHORT_TAIL) for size in (1, 8))
    assert one.generate_until(requests, disable_tqdm=True) == many.generate_until(requests, disable_tqdm=True)
    assert many.reading.packed_share == pytest.approx(one.reading.packed_share, abs=0.05)


def test_continuations_of_one_context_share_its_prefill(loaded, prompts):
    model = lm(loaded, UNIFORM, batch_size=4, **SHORT_TAIL)
    shapes = []
    hook = loaded[0].register_forward_pre_hook(lambda module, args: shapes.append(tuple(args[0].shape)))
    model.loglikelihood(asked("loglikelihood", *[(prompts[0][0], f" {i}") for i in range(4)]), disable_tqdm=True)
    hook.remove()
    assert [shape[0] for shape in shapes] == [1, 4]


# --- what was read and held


def test_reading_counts_what_was_read_packed(loaded):
    model = lm(loaded, "uniform:bits=4", residual_length=32, sink_tokens=2)
    ids = list(range(10, 310))
    model._loglikelihood_tokens([(None, ids[:200], ids[200:])], disable_tqdm=True)
    # before token 288 = 32 + 2 * 128 one block is packed, after it two; two tokens of them are sinks
    read = sum(126 if i < 288 else 254 for i in range(199, 299))
    assert model.reading.packed_share == pytest.approx(read / sum(i + 1 for i in range(199, 299)))
    assert (model.reading.tokens, model.reading.rows) == (100, 1)
    cache = PackedCache(loaded[0], registry.parse("uniform:bits=4"), residual_length=32, sink_tokens=2)
    with torch.no_grad():
        loaded[0](torch.tensor([ids[:-1]]), past_key_values=cache)
    assert model.reading.memory.tokens == 299
    assert model.reading.memory.bits_per_element == pytest.approx(cache.memory().bits_per_element, rel=0.1)
    model.forget_reading()
    assert model.reading.tokens == 0


def test_evaluation_leaves_the_model_as_it_was(fast, prompts, tmp_path):
    path = written(tmp_path / "keys.jsonl", [{"context": prompts[0][0], "continuation": prompts[0][1]}])
    evaluate(*fast, UNIFORM, [path], options=SHORT_TAIL)
    assert not is_attached(fast[0])


# --- caches of transformers


@pytest.mark.skipif(not is_optimum_quanto_available(), reason="optimum-quanto is not installed")
def test_quantized_cache_of_transformers_is_evaluated_through_itself(fast, prompts, tmp_path):
    rows = [{"context": text, "continuation": key} for text, key in prompts[:3]]
    paths = [written(tmp_path / "keys.jsonl", rows)]
    paths.append(written(tmp_path / "asked.jsonl", [{"context": text, "answer": key} for text, key in prompts[:2]]))

    def quanto(model):
        return QuantizedCache("quanto", model.config, nbits=2, residual_length=16)

    exact = evaluate(*fast, None, paths)
    found = evaluate(*fast, quanto, paths, batch_size=2)
    again = evaluate(*fast, quanto, paths, batch_size=1)
    assert found.cache == "quanto"
    assert found.value("keys", "log_likelihood") == again.value("keys", "log_likelihood")
    assert abs(found.value("keys", "log_likelihood") - exact.value("keys", "log_likelihood")) > 1e-3
    for reading in found.readings.values():
        assert reading.packed_share > 0.8
        assert reading.memory.bits_per_element < 6


@pytest.mark.parametrize("stock_class", [True, False])
def test_any_cache_may_be_given(loaded, prompts, stock, stock_class):
    class OtherCache(DynamicCache):
        pass

    made = DynamicCache if stock_class else OtherCache
    model = lm(loaded, cache=lambda model: made(config=model.config), max_length=160)
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always", UserWarning)
        found = model.loglikelihood(pairs(prompts)[:3], disable_tqdm=True)
    assert [chance for chance, _ in found] == pytest.approx(stock[0][:3], abs=1e-6)
    # an exact cache reads nothing packed, which is no news of the stock one
    assert any("exact model" in str(warning.message) for warning in heard) != stock_class


# --- bad arguments


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"strategy": "qaq", "protocol": "stream"}, "'qaq' packs tokens again.*protocol='decode'"),
        ({"strategy": "h2o", "protocol": "paper"}, "'h2o' packs tokens again.*protocol='decode'"),
        ({"strategy": "uniform", "protocol": "exact"}, "protocol='exact' is none; use one of decode, stream, paper"),
        ({"strategy": "uniform", "protocol": "paper", "residual_length": 8}, "leave it out"),
        ({"protocol": "stream"}, "simulates a strategy"),
        ({"residual_length": 8}, "residual_length are options of packed caches"),
        ({"strategy": "uniform", "cache": DynamicCache}, "give the one that is to be evaluated"),
        ({"strategy": "uniform", "batch_size": "auto"}, "give a number"),
        ({"strategy": "uniform:bits=5"}, "bits"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(fast, arguments, said):
    with pytest.raises(ValueError, match=said):
        CacheQuantLM(fast[0], tokenizer=fast[1], **arguments)


def test_a_tokenizer_without_a_token_to_begin_with_is_refused_untouched(fast):
    tokenizer = without(fast[1], bos_token=None, eos_token=None, pad_token=None, unk_token=None)
    before = len(tokenizer)
    with pytest.raises(ValueError, match=r"set tokenizer\.bos_token or tokenizer\.eos_token to a token"):
        CacheQuantLM(fast[0], UNIFORM, tokenizer=tokenizer)
    assert len(tokenizer) == before
    CacheQuantLM(fast[0], UNIFORM, tokenizer=tokenizer, prefix_token_id=0)


def test_generation_without_a_token_to_end_at_is_refused(fast, prompts):
    model = CacheQuantLM(fast[0], UNIFORM, tokenizer=without(fast[1], bos_token="a", eos_token=None))
    with pytest.raises(ValueError, match="has no eos_token, at which generated text ends"):
        model.generate_until(questions(prompts), disable_tqdm=True)


def without(tokenizer, **ends):
    """A copy with other special tokens."""
    copied = copy.deepcopy(tokenizer)
    for name, token in ends.items():
        setattr(copied, name, token)
    return copied


def test_continuation_longer_than_the_model_is_refused(fast):
    with pytest.raises(ValueError, match="continuation of 11 tokens does not fit into the model's 10"):
        lm(fast, max_length=10)._loglikelihood_tokens([(None, [5], list(range(11)))], disable_tqdm=True)


def test_contexts_beyond_the_model_are_cut_from_the_left_as_the_harness_cuts_them(loaded, prompts):
    requests = pairs(prompts)[:3]
    expected = HFLM(pretrained=loaded[0], tokenizer=loaded[1], max_length=120).loglikelihood(
        requests, disable_tqdm=True
    )
    found = lm(loaded, NONE, max_length=120, residual_length=0).loglikelihood(requests, disable_tqdm=True)
    assert [chance for chance, _ in found] == pytest.approx([chance for chance, _ in expected], abs=1e-6)


def test_missing_harness_is_named_with_its_extra(fast, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval.models.huggingface", None)
    with pytest.raises(ImportError, match=r'pip install "cachequant\[lm-eval\]"'):
        evaluate(*fast, None, ["piqa"])


# --- as a task of leaderboards


def score(metric, task="gsm8k", higher=True):
    return Score(task=task, metric=metric, value=0.5, stderr=None, higher_is_better=higher, samples=2)


@pytest.mark.parametrize(
    ("given", "named"),
    [
        (["exact_match,flexible-extract", "exact_match,strict-match"], ["exact_match,flexible-extract", "exact_match"]),
        (["exact_match,get-answer", "acc"], ["exact_match", "acc"]),
        (["exact_match,a", "exact_match,b"], ["exact_match,a", "exact_match,b"]),
        (["exact_match,strict-match", "exact_match"], ["exact_match,strict-match", "exact_match"]),
    ],
)
def test_a_filter_is_left_out_where_no_other_is_as_strict(given, named):
    found = metrics_by_name([score(metric) for metric in given])
    assert {name: each.metric for name, each in found.items()} == dict(zip(named, given, strict=True))


def test_metrics_of_several_tasks_keep_their_names():
    assert list(metrics_by_name([score("acc", "a"), score("acc", "b")])) == ["a acc", "b acc"]


def test_of_several_filters_the_strict_one_has_the_lines(fast, tmp_path):
    task = local_task(written(tmp_path / "sums.jsonl", [{"context": "1 + 1 =", "answer": 2}] * 2))
    task["filter_list"] = [
        {"name": name, "filter": [{"function": "regex", "regex_pattern": pattern}, {"function": "take_first"}]}
        for name, pattern in (("flexible-extract", "(.)"), ("strict-match", "=(.)"))
    ]
    lines = evaluate(*fast, None, [task]).predictions
    assert [line["filter"] for line in lines] == ["flexible-extract"] * 2 + ["strict-match"] * 2
    assert leading_lines(lines) == lines[2:]
    assert leading_lines(lines[:2]) == lines[:2]


def test_metrics_that_are_not_declared_say_which_way_is_better_and_nothing_is_warned_of(tmp_path, monkeypatch):
    panel = subjects.open_panels(twin=False)[0][0]
    rows = [{"context": "import numpy as", "continuation": " np"}, {"context": "def f(", "continuation": "x"}]
    task = registry.tasks.get("lm-eval")(task=str(written(tmp_path / "short.jsonl", rows)))
    monkeypatch.setattr(evaluation, "_scores", worse(evaluation._scores))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        outcome = task.measure(panel, None, contenders.candidate("uniform").ready(panel))
    assert outcome.directions == {"log_likelihood": "lower"}
    assert outcome.metrics["packed_share"] == 0
    assert task.metrics[-1].name == "packed_share"


def worse(scores):
    """The scores, as if the harness said that less of them is better."""
    return lambda found: [each.model_copy(update={"higher_is_better": False}) for each in scores(found)]


# --- tasks from files


def written(path, rows):
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows) + "\n")
    return path


def test_the_harness_takes_the_model_by_name_and_local_tasks_as_they_are(fast, tmp_path):
    assert get_model("cachequant") is CacheQuantLM
    choices = written(tmp_path / "sums.jsonl", [{"query": "1 + 1 =", "choices": ["2", "import"], "gold": 0}] * 3)
    asked = written(tmp_path / "asked.jsonl", [{"context": f"{i} + {i} =", "answer": 2 * i} for i in range(5)])
    tasks = [local_task(choices), local_task(asked, name="double", limit=2, fewshot=2)]
    with pytest.warns(UserWarning, match="exact model"):
        found = simple_evaluate(
            model=lm(fast, NONE), tasks=tasks, bootstrap_iters=0, task_manager=TaskManager(include_defaults=False)
        )
    assert found["results"]["sums"]["acc,none"] == 1.0
    # examples stand before every question, and are not scored
    assert [sample["arguments"][0][0] for sample in found["samples"]["double"]] == [
        "0 + 0 = 0\n\n1 + 1 = 2\n\n2 + 2 =",
        "0 + 0 = 0\n\n1 + 1 = 2\n\n3 + 3 =",
    ]


def test_choices_are_scored_by_likelihood_with_the_space_between(fast, tmp_path):
    rows = [
        {"query": "Question: a\nAnswer: ", "choices": ["A", "B"], "gold": 1},
        {"query": "def f(\n", "choices": ["x", "y"], "gold": 0},
    ]
    task = local_task(written(tmp_path / "t.jsonl", rows))
    docs = task["custom_dataset"]()["test"]
    assert docs[0] == {"text": "Question: a\nAnswer:", "choices": [" A", " B"], "gold": 1}
    assert docs[1] == {"text": "def f(\n", "choices": ["x", "y"], "gold": 0}


def test_answers_after_reasoning_are_the_last_number(tmp_path):
    row = {"context": "How many?", "chain_of_thought": "It is 1,000 + 8.", "answer": "1,008"}
    score = local_task(written(tmp_path / "r.jsonl", [row]))["process_results"]
    doc = {"answer": "1,008"}
    assert score(doc, ["1000 and 8 are\n#### 1008"]) == {"exact_match": 1.0}
    assert score(doc, ["#### 1,008."]) == {"exact_match": 1.0}
    assert score(doc, ["1008 - 1 = 1007"]) == {"exact_match": 0.0}
    assert score(doc, ["no number"]) == {"exact_match": 0.0}


def test_answers_are_compared_without_case_space_and_full_stop(tmp_path):
    score = local_task(written(tmp_path / "g.jsonl", [{"context": "Capital?", "answer": "New York"}]))[
        "process_results"
    ]
    doc = {"answer": "New York"}
    assert score(doc, ["  new  york.\nAnd more"]) == {"exact_match": 1.0, "contains": 1.0}
    assert score(doc, ["It is New York!"]) == {"exact_match": 0.0, "contains": 1.0}
    assert score(doc, ["York\nNew York"]) == {"exact_match": 0.0, "contains": 0.0}
    assert score(doc, [""]) == {"exact_match": 0.0, "contains": 0.0}


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([], "has no rows"),
        (["{broken"], "line 1: not JSON"),
        (["[1]"], "line 1: list where an object is expected"),
        ([{"query": "a", "choices": ["b", "c"]}], "line 1: gold missing for a row of multiple choice; it has query"),
        ([{"foo": 1}], "line 1: fields foo are those of no kind of row"),
        ([{"query": "a", "choices": ["b", "c"], "gold": 2}], "line 1: gold is 2, with 2 choices it is 0 to 1"),
        ([{"query": "a", "choices": ["b", "c"], "gold": "1"}], "line 1: gold is '1', it must be the index"),
        ([{"query": "a", "choices": ["b"], "gold": 0}], "line 1: choices is .*at least two"),
        ([{"context": "", "continuation": "b"}], "line 1: context is '', it must be a text"),
        (
            [{"context": "a", "answer": "b"}, "", {"context": "a", "continuation": "b"}],
            "line 3: answer is missing; the rows before are of generation",
        ),
    ],
)
def test_broken_rows_are_named_by_file_and_line(tmp_path, rows, said):
    with pytest.raises(ValueError, match=said) as caught:
        local_task(written(tmp_path / "rows.jsonl", rows))
    assert "rows.jsonl" in str(caught.value)


def test_examples_that_leave_nothing_are_refused(tmp_path):
    path = written(tmp_path / "rows.jsonl", [{"context": "a", "answer": "b"}] * 2)
    with pytest.raises(ValueError, match="fewshot=2 examples leave none of 2 rows to score; use at most 1"):
        local_task(path, fewshot=2)
    with pytest.raises(ValueError, match="limit=0"):
        local_task(path, limit=0)


# --- results


def test_predictions_tell_what_was_chosen_and_how_likely_it_was(fast, tmp_path):
    path = written(tmp_path / "sums.jsonl", [{"query": "1 + 1 =", "choices": ["import", "2"], "gold": 1}])
    found = evaluate(*fast, None, [path])
    (line,) = found.predictions
    assert (line["task"], line["doc_id"], line["target"], line["prediction"], line["acc"]) == ("sums", 0, "1", "1", 1.0)
    assert line["log_likelihood_1"] > line["log_likelihood_0"]
    assert type(found).model_validate_json(found.model_dump_json()) == found
    with pytest.raises(KeyError, match="sums acc"):
        found.value("sums", "f1")


def test_tasks_of_one_name_are_refused(fast, tmp_path):
    (tmp_path / "other").mkdir()
    rows = [{"query": "1 + 1 =", "choices": ["import", "2"], "gold": 1}]
    paths = [written(folder / "sums.jsonl", rows) for folder in (tmp_path, tmp_path / "other")]
    with pytest.raises(ValueError, match="two tasks are called 'sums'"):
        evaluate(*fast, None, paths)


def runner():
    app = typer.Typer()
    app.command()(command.main)
    return app


def test_command_prints_scores_and_writes_them(tmp_path):
    path = written(tmp_path / "sums.jsonl", [{"query": "1 + 1 =", "choices": ["import", "2"], "gold": 1}] * 2)
    out = tmp_path / "scores.json"
    arguments = ["--tasks", str(path), "--strategy", "uniform:bits=2", "--protocol", "paper", "--out", str(out)]
    found = CliRunner().invoke(runner(), arguments)
    assert found.exit_code == 0, found.output
    for text in ("sums", "DynamicCache", "uniform:bits=2", "acc_norm", "1.0000", "no cache works like this"):
        assert text in " ".join(found.output.split())
    kept = json.loads(out.read_text())
    assert [each["cache"] for each in kept] == ["DynamicCache", "uniform:bits=2"]
    assert kept[1]["readings"]["sums"]["protocol"] == "paper"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--tasks", "missing.jsonl"], "missing.jsonl"),
        (["--tasks", "t.jsonl", "--strategy", "unifrom"], "unifrom"),
        (["--tasks", "t.jsonl", "--protocol", "magic"], "protocol='magic'"),
    ],
)
def test_command_refuses_what_it_cannot_do(tmp_path, monkeypatch, arguments, said):
    monkeypatch.chdir(tmp_path)
    written(tmp_path / "t.jsonl", [{"context": "a", "answer": "b"}])
    found = CliRunner().invoke(runner(), [*arguments, "--no-exact"])
    assert found.exit_code == 2
    assert said in found.output
