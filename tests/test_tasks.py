"""The benchmark tasks passkey, needle, continuation and speed: they read the cache, and say what they read."""

import dataclasses
import json
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from transformers import DynamicCache
from transformers.utils.import_utils import is_optimum_quanto_available

from cachequant import registry
from cachequant.benchmarks import contenders, speed, subjects
from cachequant.benchmarks.tasks import endings, questions, reading
from cachequant.benchmarks.tasks.base import Metric, Outcome, Task
from cachequant.core import Format, LayerFormat, Strategy, attach
from cachequant.core.hf.attach import is_attached
from cachequant.registry.hookspecs import hookimpl

pytestmark = pytest.mark.slow

# small enough for a test, long enough that most of what is read is packed
SETTINGS = {
    "passkey": "passkey:length=320,samples=5",
    "needle": "needle:length=320,samples=5",
    "continuation": "continuation:length=256,samples=12",
}
EXACT = "DynamicCache"
IDENTIFYING = {"sample", "depth", "length", "key", "place", "gold", "exact_choice"}


class Blank(Strategy):
    """Forgets everything: what is packed reads as a number, 0."""

    name: ClassVar[str] = "blank"
    number: float = 0.0

    def formats(self, layer):
        return LayerFormat(key=Format(codes="custom"), value=Format(codes="custom"), block=32)

    def encode(self, states, fmt, side, block, valid, tables):
        return {"shape": torch.zeros_like(states.unflatten(2, (-1, block))[:, :, :, 0])}

    def decode(self, packed, fmt, side, block, tables):
        return torch.full_like(packed["shape"], self.number).repeat_interleave(block, dim=2)


class BlankPlugin:
    @hookimpl
    def cachequant_strategies(self):
        return [Blank]


class Held(Task):
    """Bytes after a few tokens: what a third party might measure."""

    name: ClassVar[str] = "held-bytes"
    metrics: ClassVar[tuple[Metric, ...]] = (Metric(name="bytes", label="bytes", better="lower", digits=0),)
    tokens: int = 8

    def prepare(self, panel):
        return torch.tensor([list(panel.ids[: self.tokens])])

    def measure(self, panel, prepared, contender):
        cache = contender.new_cache()
        panel.model(prepared, past_key_values=cache)
        return Outcome(metrics={"bytes": float(cache.memory().device_bytes)})


class HeldPlugin:
    @hookimpl
    def cachequant_tasks(self):
        return [Held]


@pytest.fixture(scope="module", autouse=True)
def blank():
    registry.register(BlankPlugin(), "blank-of-tasks")
    yield
    registry.unregister("blank-of-tasks")


@pytest.fixture(scope="module")
def panel():
    return subjects.open_panels(twin=False)[0][0]


@pytest.fixture(scope="module")
def prepared(panel):
    """Each task with what its contenders share."""
    tasks = {name: registry.tasks.parse(spec).fitted(panel) for name, spec in SETTINGS.items()}
    return {name: (task, task.prepare(panel)) for name, task in tasks.items()}


@pytest.fixture(scope="module")
def measured(panel, prepared):
    """Outcome of a contender at a task, measured once."""
    found: dict[tuple[str, str], Outcome] = {}

    def measure(name: str, spec: str) -> Outcome:
        if (name, spec) not in found:
            task, shared = prepared[name]
            found[name, spec] = task.measure(panel, shared, contender(panel, spec))
        return found[name, spec]

    return measure


def contender(panel: Any, spec: str) -> Any:
    return contenders.candidate(spec).ready(panel)


def shortened(panel: Any, **changed: Any) -> Any:
    """The panel with another context or fewer tokens of text."""
    if "context" in changed:
        changed["card"] = panel.card.model_copy(update={"context": changed.pop("context")})
    return dataclasses.replace(panel, **changed)


# --- as plugins


@pytest.mark.parametrize("name", ["passkey", "needle", "continuation", "speed"])
def test_tasks_are_found_by_name_and_describe_their_settings(name):
    assert registry.tasks.get(name)().name == name
    description = registry.tasks.describe(name)
    assert description.summary
    assert all(field.description for field in description.fields)


def test_a_task_is_its_spec():
    task = registry.tasks.parse("needle:length=320,samples=5")
    assert (task.length, task.samples) == (320, 5)
    assert registry.tasks.spec(task) == "needle:length=320,samples=5"


def test_a_plugin_may_offer_tasks_alone(panel):
    registry.register(HeldPlugin(), "held-bytes")
    try:
        task = registry.tasks.parse("held-bytes:tokens=4")
        outcome = task.measure(panel, task.prepare(panel), contender(panel, "none"))
        assert outcome.metrics["bytes"] > 4 * panel.card.layers
        assert "held-bytes" not in registry.names()
    finally:
        registry.unregister("held-bytes")
    assert "held-bytes" not in registry.tasks.names()


# --- what the figures say


@pytest.mark.parametrize("name", SETTINGS)
def test_exact_storage_gives_the_exact_figures(measured, name):
    exact, none = measured(name, EXACT), measured(name, "none:block=32")
    assert none.metrics["packed_share"] > 0.7
    assert exact.metrics["packed_share"] == 0
    assert none.metrics == pytest.approx({**exact.metrics, "packed_share": none.metrics["packed_share"]}, abs=1e-4)


@pytest.mark.parametrize(
    ("name", "metric", "least", "drop"),
    [("passkey", "accuracy", 1.0, 0.6), ("needle", "recall", 0.6, 0.5), ("continuation", "accuracy", 0.6, 0.25)],
)
def test_a_cache_that_forgets_lowers_the_score(measured, name, metric, least, drop):
    exact, blank = (measured(name, spec).metrics[metric] for spec in (EXACT, "blank"))
    assert exact >= least
    assert blank <= exact - drop


@pytest.mark.parametrize("name", ["needle", "continuation"])
def test_fewer_bits_cost_more(measured, name):
    kl = [measured(name, spec).metrics["kl"] for spec in (EXACT, "uniform:bits=4,block=32", "uniform:bits=2,block=32")]
    assert kl[0] == 0
    assert 3 * kl[1] < kl[2]


@pytest.mark.parametrize("name", SETTINGS)
def test_lines_of_samples_are_those_of_every_other_contender(measured, name):
    found = [measured(name, spec).samples for spec in (EXACT, "blank")]
    told = [[{key: row[key] for key in IDENTIFYING & set(row)} for row in samples] for samples in found]
    assert told[0] == told[1]
    assert len(told[0]) >= 5
    assert found[0] != found[1]


@pytest.mark.parametrize(("name", "metric"), [("passkey", "accuracy"), ("needle", "recall")])
def test_samples_say_length_and_depth_of_each_cell(measured, name, metric):
    outcome = measured(name, EXACT)
    assert [row["depth"] for row in outcome.samples] == [0, 0.25, 0.5, 0.75, 1]
    assert {row["length"] for row in outcome.samples} == {320}
    assert outcome.metrics[metric] == pytest.approx(sum(row[metric] for row in outcome.samples) / 5)


def test_answers_stand_beside_their_keys(measured):
    for row in measured("passkey", EXACT).samples:
        assert row["answer"].startswith(row["key"])
    assert {row["accuracy"] for row in measured("passkey", "blank").samples if row["answer"][:5] != row["key"]} == {0}


@pytest.mark.parametrize("name", SETTINGS)
def test_errors_are_those_of_the_mean(measured, name):
    outcome = measured(name, "blank")
    assert outcome.errors
    for metric, error in outcome.errors.items():
        values = torch.tensor([row[metric] for row in outcome.samples], dtype=torch.float64)
        assert error == pytest.approx((values.std() / len(values) ** 0.5).item())


@pytest.mark.parametrize("name", SETTINGS)
def test_memory_is_what_a_cache_holds_after_the_first_prompt(panel, measured, name):
    outcome = measured(name, "uniform:bits=4,block=32")
    memory = outcome.memory
    assert 240 <= memory.tokens <= 320
    assert sum(outcome.kinds.values()) == memory.device_bytes + memory.host_bytes
    assert memory.packed_bits_per_element < 6
    assert len(outcome.layers) == panel.card.layers
    exact = measured(name, EXACT)
    assert (exact.memory.ratio, exact.memory.tokens) == (1.0, memory.tokens)


@pytest.mark.parametrize("name", SETTINGS)
def test_bits_do_not_depend_on_the_rows_of_a_batch(panel, measured, name):
    spec = "uniform:bits=2,block=32,key_rope=pre,key_scale=channel"  # rows of a batch share its angles
    task = registry.tasks.parse(f"{SETTINGS[name]},batch_size=2")
    found, together = task.measure(panel, task.prepare(panel), contender(panel, spec)), measured(name, spec)
    assert (found.memory, found.kinds, found.layers) == (together.memory, together.kinds, together.layers)
    assert found.kinds["rope"] > 0


@pytest.mark.parametrize("name", SETTINGS)
def test_the_same_is_measured_again(panel, measured, name):
    task = registry.tasks.parse(SETTINGS[name])
    again = task.measure(panel, task.prepare(panel), contender(panel, "uniform:bits=2,block=32"))
    assert again == measured(name, "uniform:bits=2,block=32")


def test_another_seed_hides_something_else(panel):
    keys = [
        [prompt.key for prompt in registry.tasks.parse(f"passkey:length=64,samples=5,seed={seed}").prepare(panel)]
        for seed in (0, 1)
    ]
    assert keys[0] != keys[1]


@pytest.mark.parametrize("name", SETTINGS)
def test_logits_that_are_not_finite_are_no_score(panel, prepared, name):
    task, shared = prepared[name]
    with pytest.raises(ValueError, match="not finite"):
        task.measure(panel, shared, contender(panel, "blank:number=3e38"))


@pytest.mark.skipif(not is_optimum_quanto_available(), reason="optimum-quanto is not installed")
@pytest.mark.parametrize("name", SETTINGS)
def test_caches_of_transformers_are_measured(panel, measured, name):
    outcome = measured(name, "QuantizedCache:backend=quanto,nbits=2")
    assert outcome.metrics["packed_share"] > 0.8
    assert outcome.memory.ratio > 4
    assert not is_attached(panel.model)


# --- passes and batches


@pytest.mark.parametrize("spec", ["uniform:bits=2,block=32", "h2o:interval=20", "qaq:interval=32"])
def test_passes_score_what_single_tokens_score(panel, monkeypatch, spec):
    task = registry.tasks.parse("needle:length=333,samples=1,depths=1,span=64,cue=8")
    shared, measuring = task.prepare(panel), contender(panel, spec)

    def nll() -> float:
        return task.measure(panel, shared, measuring).metrics["nll"]

    passes = nll()
    monkeypatch.setattr(endings, "steps", lambda cache, start, stop: (slice(i, i + 1) for i in range(start, stop)))
    assert nll() == pytest.approx(passes, abs=1e-4)
    # so many tokens at once would find too much exact
    monkeypatch.setattr(endings, "steps", lambda cache, start, stop: [slice(start, stop)])
    assert abs(nll() - passes) > 1e-3


def test_steps_cover_every_token_once():
    taken = [i for step in reading.steps(DynamicCache(), 17, 133) for i in range(step.start, step.stop)]
    assert taken == list(range(17, 133))


@pytest.mark.parametrize(
    ("spec", "together"),
    [
        ("uniform", True),
        ("h2o", True),
        ("kvquant:datatype=int,key_scale=channel", True),
        ("kvquant:calibration=prompt", False),
        ("preset:default=uniform", True),
        ('preset:default="kvquant:calibration=prompt"', False),
        (EXACT, True),
    ],
)
def test_rows_share_a_batch_where_they_do_not_share_tables(panel, spec, together):
    assert reading.rows_at_once(contender(panel, spec), 7) == (7 if together else 1)


@pytest.mark.parametrize("spec", ["uniform:bits=2,block=32", "h2o", "kvquant:calibration=prompt,bits=2,block=32"])
def test_batches_score_what_single_rows_score(panel, spec):
    alone, together = (registry.tasks.parse(f"needle:length=160,samples=5,batch_size={size}") for size in (1, 4))
    found = [task.measure(panel, task.prepare(panel), contender(panel, spec)).metrics for task in (alone, together)]
    assert found[0] == pytest.approx(found[1], abs=1e-4)


# --- what fits


@pytest.mark.parametrize("name", ["passkey", "needle", "continuation", "speed"])
def test_open_lengths_fit_a_short_context(panel, name):
    task = registry.tasks.get(name)()
    assert task.fitted(panel).length == (1024 if name == "speed" else 512)
    room = {"continuation": 8, "speed": 33 + 11}.get(name, 0)
    assert task.fitted(shortened(panel, context=300)).length == 300 - room


def test_examples_fix_how_long_contexts_are(tmp_path):
    fixing = registry.tasks.get("continuation")(file=tmp_path / "rows.jsonl", shots=2)
    assert fixing.fixes_length
    assert not registry.tasks.parse("continuation:length=256").fixes_length


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        ("passkey:length=4096", "beyond the model's context; use at most 2048"),
        ("passkey:length=30", "use at least"),
        ("needle:length=4096", "use at most 2048"),
        ("needle:length=60", "use at least 66"),
        ("continuation:length=2047", "use at most 2040"),
        ("continuation:samples=1000", "use samples=3[0-9]+ or fewer"),
        ("speed:length=2048", "use at most 2015"),
    ],
)
def test_what_does_not_fit_the_model_is_refused(panel, spec, reason):
    task = registry.tasks.parse(spec)
    with pytest.raises(ValueError, match=reason):
        task.fitted(panel)


@pytest.mark.parametrize("name", ["passkey", "needle", "continuation"])
def test_a_text_that_is_too_short_is_refused(panel, name):
    with pytest.raises(ValueError, match="longer text"):
        registry.tasks.get(name)().fitted(shortened(panel, ids=panel.ids[:300]))


def test_speed_asks_for_a_longer_text(panel):
    with pytest.raises(ValueError, match="the text has 300 tokens, length=290 and steps=32 need 323; use a longer"):
        registry.tasks.parse("speed:length=290").fitted(shortened(panel, ids=panel.ids[:300]))


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        ("passkey:samples=3", "samples=3 leave some of depths=5 out"),
        ("needle:cue=32", "cue=32 leaves nothing of span=32"),
        ("needle:samples=3", "samples=3 leave some of depths=5 out"),
        ("continuation:shots=2", "are examples from a file"),
        ("continuation:file=a.jsonl,shots=2,length=64", "both say how long contexts are"),
        ("needle:depth=3", "did you mean 'depths'"),
    ],
)
def test_settings_that_contradict_are_refused(spec, reason):
    with pytest.raises(ValueError, match=reason):
        registry.tasks.parse(spec)


def test_a_single_depth_is_the_middle():
    assert reading.spread(1) == [0.5]
    assert reading.spread(3) == [0, 0.5, 1]


# --- questions of a file


QUESTIONS = [
    {"query": f"Which module reads {kind} files?\nAnswer: ", "choices": [f"{kind}", "the shell", "no"], "gold": i % 3}
    for i, kind in enumerate(["json", "csv", "toml", "xml", "zip", "tar", "ini", "html", "wave", "plist"] * 3)
]


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "modules.jsonl"
    path.write_text("".join(f"{json.dumps(row)}\n" for row in QUESTIONS), encoding="utf-8")
    return path


def of_file(file: Path, **settings: Any) -> Any:
    return registry.tasks.get("continuation")(file=file, **{"samples": 3, **settings})


def test_log_likelihoods_are_those_of_one_forward(panel, file):
    task = of_file(file, length=150).fitted(panel)
    shared = task.prepare(panel)
    outcome = task.measure(panel, shared, contender(panel, EXACT))
    for question, row, scores in zip(shared.questions, outcome.samples, shared.run.exact, strict=True):
        # choices differ in length: the shorter ones were padded
        assert len({len(ending) for ending in question.item.endings}) > 1
        losses = []
        for ending in question.item.endings:
            ids = torch.tensor([[*question.item.context, *ending]])
            with torch.inference_mode():
                found = torch.log_softmax(panel.model(ids, use_cache=False).logits[0], -1)
            before = len(question.item.context) - 1
            losses.append(-sum(found[before + i, token].item() for i, token in enumerate(ending)))
        assert [score.loss for score in scores] == pytest.approx(losses, abs=1e-3)
        assert row["choice"] == row["exact_choice"] == losses.index(min(losses))
        assert row["loss"] == pytest.approx(losses[question.gold], abs=1e-3)


def test_choices_read_one_packed_context(panel, file):
    task = of_file(file, length=150).fitted(panel)
    found = task.measure(panel, task.prepare(panel), contender(panel, "none:block=32")).metrics
    assert found["packed_share"] > 0.6
    assert (found["agreement"], found["kl"]) == (1, pytest.approx(0, abs=1e-6))


def test_a_question_alone_reads_nothing_packed(panel, file):
    task = of_file(file, shots=0).fitted(panel)
    found = task.measure(panel, task.prepare(panel), contender(panel, "blank")).metrics
    assert (found["packed_share"], found["kl"]) == (0, 0)


def test_examples_fill_the_length_and_never_tell_the_answer(panel, file):
    task = of_file(file, length=150).fitted(panel)
    for question in task.prepare(panel).questions:
        assert len(question.item.context) == 150
        text = panel.tokenizer.decode(question.item.context)
        asked = QUESTIONS[int(question.place.removeprefix("line ")) - 1]
        assert text.endswith(asked["query"].rstrip())
        assert "\n\nWhich module" in text
    distinct = {row["query"] for row in QUESTIONS[:10]}
    small = file.with_name("small.jsonl")
    small.write_text("".join(f"{json.dumps(row)}\n" for row in QUESTIONS[:10]), encoding="utf-8")
    for question in of_file(small, samples=10, shots=9).prepare(panel).questions:
        text = panel.tokenizer.decode(question.item.context)
        assert all(text.count(query.strip()) == 1 for query in distinct)


def test_a_space_before_the_choices_joins_their_first_token(panel, tmp_path):
    path = tmp_path / "joined.jsonl"
    path.write_text(json.dumps({"query": "x = ", "choices": ["None", "True or False"], "gold": 0}) + "\n")
    (question,) = of_file(path, samples=1, shots=0).prepare(panel).questions
    decode = panel.tokenizer.decode
    assert decode(question.item.context).endswith("x =")
    assert [decode(ending) for ending in question.item.endings] == [" None", " True or False"]
    assert question.sizes == (4, 13)


def test_hashes_follow_what_is_read(panel, file):
    before = of_file(file).inputs(panel)
    file.write_text(file.read_text() + "\n")
    after = of_file(file).inputs(panel)
    assert before["file"] == after["file"] == "modules.jsonl"
    assert before["file_sha256"] != after["file_sha256"]
    assert "text_sha256" not in after
    for name in SETTINGS:
        assert registry.tasks.get(name)().inputs(panel)["text_sha256"] == panel.text.sha256


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{", "line 2: Invalid JSON"),
        ("[1]", "line 2: .*object"),
        ('{"query": "a", "choices": ["b", "c"]}', "line 2: gold: Field required"),
        ('{"query": "", "choices": ["b", "c"], "gold": 0}', "line 2: query"),
        ('{"query": "a", "choices": ["b"], "gold": 0}', "line 2: choices"),
        ('{"query": "a", "choices": ["b", " "], "gold": 0}', "line 2: .*a choice is empty"),
        ('{"query": "a", "choices": ["b", "c"], "gold": 2}', "line 2: .*gold is 2, but there are 2 choices"),
    ],
)
def test_a_bad_line_is_named(panel, file, line, reason):
    lines = file.read_text().splitlines()
    file.write_text("\n".join([lines[0], line, *lines[2:]]))
    with pytest.raises(ValueError, match=rf"modules\.jsonl, {reason}"):
        of_file(file).fitted(panel)


def test_files_that_do_not_suffice_are_refused(panel, file):
    with pytest.raises(ValueError, match=r"cannot read .*absent\.jsonl: No such file"):
        of_file(file.with_name("absent.jsonl")).fitted(panel)
    with pytest.raises(ValueError, match="has 30 questions; use samples=30 or fewer"):
        of_file(file, samples=31).fitted(panel)
    with pytest.raises(ValueError, match="length=2000; use a smaller length or a longer file"):
        of_file(file, length=2000).fitted(panel)
    with pytest.raises(ValueError, match=r"no room for the longest question .* use at least \d+, or shots=0"):
        of_file(file, length=5).fitted(panel)
    with pytest.raises(ValueError, match="has 27 other questions; use shots=27 or fewer"):
        of_file(file, shots=28).fitted(panel)
    with pytest.raises(ValueError, match="use fewer shots"):
        of_file(file, shots=20).fitted(shortened(panel, context=100))
    file.write_text("\n")
    with pytest.raises(ValueError, match=r"modules\.jsonl has no line"):
        of_file(file).fitted(panel)


# --- questions about a text


class Numbers:
    """A tokenizer of numbers."""

    bos_token_id = None

    def decode(self, ids):
        return str(ids)


def test_all_choices_stand_in_the_passage_and_one_after_what_is_repeated(panel):
    found = questions.recollections(panel.tokenizer, panel.ids, samples=6, length=320, seed=0)
    assert len({question.gold for question in found}) > 1
    for question in found:
        context, cue = question.item.context, question.item.context[-8:]
        passage = context[1:-8]
        assert len(context) == 320
        assert question.item.after == 8
        after = [i + 8 for i in range(len(passage) - 8) if passage[i : i + 8] == cue]
        assert [passage[i : i + 8] for i in after] == [question.item.endings[question.gold]]
        older = passage[: len(passage) // 2]
        assert all(any(older[i : i + 8] == ending for i in range(len(older))) for ending in question.item.endings)
        assert len(set(question.item.endings)) == 4


def test_choices_share_no_token_of_the_passage():
    for seed in range(20):
        (question,) = questions.recollections(Numbers(), range(200), samples=1, length=161, seed=seed)
        stretches = [set(ending) for ending in question.item.endings]
        assert len(set.union(*stretches)) == sum(map(len, stretches)) == 32


def test_the_shortest_passage_has_room_for_its_choices(panel):
    for seed in range(50):
        questions.recollections(Numbers(), range(200), samples=1, length=questions.SHORTEST, seed=seed)
    with pytest.raises(ValueError, match=f"use at least {questions.SHORTEST}"):
        registry.tasks.parse(f"continuation:length={questions.SHORTEST - 1}").fitted(panel)


def test_a_text_without_different_stretches_is_refused():
    with pytest.raises(ValueError, match="token 0 of the text says the same over and over"):
        questions.recollections(Numbers(), [7, 8] * 200, samples=1, length=200, seed=0)


# --- speed


def test_the_exact_cache_is_timed_with_nothing_of_ours_attached(panel):
    seen = []
    task = registry.tasks.parse("speed:length=96,steps=2,rounds=1")
    attach(panel.model)
    hook = panel.model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append((type(kwargs["past_key_values"]).__name__, is_attached(module))),
        with_kwargs=True,
    )
    try:
        task.measure(panel, task.prepare(panel), contender(panel, "uniform"))
    finally:
        hook.remove()
    # one turn of each is not counted
    assert seen == [("DynamicCache", False), ("PackedCache", True)] * (1 + 1 + 1 + 2)


@pytest.mark.parametrize("spec", ["uniform:block=32", "uniform:key_rope=pre,key_scale=channel,block=32", "h2o", "qaq"])
def test_speed_is_told_for_every_kind_of_strategy(panel, spec):
    task = registry.tasks.parse("speed:length=192,steps=3,rounds=1").fitted(panel)
    outcome = task.measure(panel, task.prepare(panel), contender(panel, spec))
    assert all(outcome.metrics[metric.name] > 0 for metric in task.metrics)
    assert set(outcome.latency) == {"prefill_ms", "decode_ms"}
    assert outcome.memory.tokens == 192 + 1 + 3
    assert len(outcome.layers) == panel.card.layers


@pytest.mark.skipif(not is_optimum_quanto_available(), reason="optimum-quanto is not installed")
def test_a_length_that_group_wise_caches_refuse_is_named_with_one_they_take(panel):
    task = registry.tasks.parse("speed:length=65,steps=2,rounds=1")
    measuring = contender(panel, "QuantizedCache:backend=quanto,nbits=2,group_size=1024")
    with pytest.raises(ValueError, match=r"a cache of 65 tokens or more was refused .* a multiple of 1024"):
        task.measure(panel, task.prepare(panel), measuring)


def test_the_exact_cache_is_its_own_measure(panel):
    task = registry.tasks.parse("speed:length=64,steps=2,rounds=1")
    outcome = task.measure(panel, task.prepare(panel), contender(panel, EXACT))
    assert outcome.metrics == {"decode_ratio": 1, "prefill_ratio": 1}
    assert outcome.memory.ratio == 1


def test_times_belong_to_a_number_of_threads(panel):
    assert registry.tasks.get("speed")().inputs(panel)["threads"] == str(torch.get_num_threads())


def test_what_comes_before_an_action_is_done_every_time():
    done = []
    actions = {name: (lambda name=name: done.append(name)) for name in "ab"}
    before = {name: (lambda name=name: done.append(f"before {name}")) for name in "ab"}
    times = speed.interleave(actions, 1, before)
    assert done == ["before a", "a", "before b", "b"] * 2
    assert {name: len(rounds) for name, rounds in times.items()} == {"a": 1, "b": 1}
