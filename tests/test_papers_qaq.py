"""QAQ's claims: the paper's figures are data, verdicts follow from curves, and the command measures them."""

import json
import math

import pytest
import torch
from pydantic import ValidationError
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from typer.testing import CliRunner

from cachequant import registry
from cachequant.benchmarks.leaderboard import Memory, Row
from cachequant.benchmarks.metrics import Accuracy
from cachequant.benchmarks.papers.qaq import __main__ as qaq
from cachequant.benchmarks.papers.qaq.curves import (
    Advantage,
    Compressed,
    Point,
    Reading,
    advantage,
    bits_at,
    compare,
    compressed,
    curve,
    reading,
)
from cachequant.benchmarks.papers.qaq.figures import LEVELS, Geometry, Paper, average_bits, load, repository_ratio
from cachequant.benchmarks.papers.qaq.report import _claim
from cachequant.benchmarks.papers.qaq.results import (
    DROPPING,
    EVICTIONS,
    OTHERS,
    QAQ,
    QUESTIONS,
    SIDES,
    Equal,
    Line,
    answers,
    at_equal,
    line,
    parts_of,
    plan,
)
from cachequant.core import MemoryReport

WORDS = 61
SMALL = Geometry(layers=2, channels=64, heads=1)


# --- the figures and the accounting


def test_figures_are_those_of_the_tables():
    paper = load()
    assert paper.compression.ratios["Llama-2-7B"] == (7.477, 9.022, 7.477)
    assert [(each.table, len(each.rows)) for each in paper.ablations] == [(2, 6), (3, 6)]
    for ablation in paper.ablations:
        assert {(row.model, row.task) for row in ablation.rows} == {
            (model, task) for model in paper.models for task in paper.tasks
        }
        for row in ablation.rows:
            assert row.accuracy[0] < row.accuracy[1], "the paper recommends the second side"
            assert row.ratio[0] > row.ratio[1]
    assert "accuracy +2.9 to +15.0 points, compression 4.4 to 6.0 % less" in paper.ablations[0].summary()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data["models"].pop("Llama-2-13B"), "Llama-2-13B"),
        (lambda data: data["tasks"].remove("PIQA"), "PIQA"),
        (lambda data: data["compression"]["ratios"]["Llama-2-7B"].pop() and None, "do not match the tasks"),
        (lambda data: data.update(note="x"), "Extra inputs"),
    ],
)
def test_damaged_figures_are_refused(change, message):
    data = json.loads(load().model_dump_json())
    change(data)
    with pytest.raises(ValidationError, match=message):
        Paper.model_validate(data)


@pytest.mark.parametrize(
    ("bits", "alpha", "expected"),
    [(2.0, 0.0, (7.9990, 7.9689, 7.1111)), (2.0, 0.01, (7.4758, 7.4494, 6.6946))],
)
def test_accounting_is_that_of_the_repository(bits, alpha, expected):
    average = average_bits(bits, alpha)
    assert average == pytest.approx(2.14 if alpha else 2.0)
    shape = load().models["Llama-2-7B"]
    assert [repository_ratio(average, level, shape) for level in LEVELS] == pytest.approx(expected, abs=5e-5)


def test_symmetric_ranges_need_half_the_scales():
    shape = load().models["Llama-2-7B"]
    assert repository_ratio(2, "head", shape, symmetric=True) == pytest.approx(16 / (2 + 16 / 128))


def test_average_bits_of_small_groups_are_those_of_the_repository():
    assert average_bits(2, 0.25) == 5.5


# --- curves


def test_curves_are_linear_in_the_logarithm_of_divergence():
    points = curve([Point(0.1, 2), Point(0.001, 4)])
    assert bits_at(points, 0.01) == pytest.approx(3)
    assert [bits_at(points, kl) for kl in (0.001, 0.1, 0.0009, 0.11)] == [4, 2, None, None]
    assert bits_at(curve([Point(0.1, 2)]), 0.1) == 2


def test_points_that_others_beat_and_exact_ones_are_left_out():
    found = curve([Point(0.1, 2), Point(0.05, 3), Point(0.2, 2.5), Point(0.05, 4), Point(0, 16)])
    assert found == (Point(0.05, 3), Point(0.1, 2))


def test_beyond_its_last_point_a_curve_is_enough_and_before_its_first_it_is_not():
    points = curve([Point(0.01, 4), Point(0.1, 2)])
    assert reading(points, 0.005) is None
    assert reading(points, 0.01) == Reading(4, False)
    assert reading(points, 0.5) == Reading(2, True)
    assert reading((), 0.5) is None
    assert compressed(points, 0.5) == Compressed(ratio=8, at_least=True)


STEEP = curve([Point(0.001, 8), Point(0.1, 4)])


@pytest.mark.parametrize(
    ("factor", "verdict"), [(0.8, "holds"), (0.99, "undecided"), (1.01, "undecided"), (1.25, "does not hold")]
)
def test_verdicts_survive_noise_of_a_tenth(factor, verdict):
    scaled = curve(Point(point.kl, factor * point.bits) for point in STEEP)
    found = compare(scaled, STEEP)
    assert found.verdict == verdict
    assert found.overlap == (0.001, 0.1)
    assert (found.ratio, found.least, found.most) == pytest.approx((1 / factor,) * 3)


def test_ratios_are_averaged_over_the_overlap_alone():
    other = curve([Point(0.01, 3), Point(1, 1)])
    found = compare(other, STEEP)
    assert found.overlap == (0.01, 0.1)
    # from 6 to 4 bits over from 3 to 2
    assert found.ratio == pytest.approx(2)
    crossing = compare(curve([Point(0.001, 4), Point(0.1, 3.9)]), curve([Point(0.001, 8), Point(0.1, 3)]))
    assert (crossing.least, crossing.most) == pytest.approx((3 / 3.9, 2))
    assert crossing.verdict == "holds"


def test_a_bend_within_the_overlap_counts():
    bent = curve([Point(0.001, 8), Point(0.01, 4), Point(0.1, 3)])
    found = compare(bent, STEEP)
    assert found.most == pytest.approx(6 / 4)
    assert found.ratio == pytest.approx((14 + 10) / (12 + 7))


@pytest.mark.parametrize(
    "other", [(), curve([Point(0.2, 2), Point(0.4, 1)]), curve([Point(0.1, 4), Point(1, 1)]), curve([Point(0.01, 5)])]
)
def test_curves_that_share_no_divergence_are_not_compared(other):
    found = compare(STEEP, other)
    assert (found.verdict, found.ratio, found.overlap) == ("no overlap", None, None)


@pytest.mark.parametrize(
    ("ours", "others", "expected"),
    [
        (Compressed(ratio=6), {"a": Compressed(ratio=3), "b": Compressed(ratio=2)}, ("a", 2, "")),
        (Compressed(ratio=6, at_least=True), {"a": Compressed(ratio=3), "b": Compressed()}, ("a", 2, "at least")),
        (Compressed(ratio=6), {"a": Compressed(ratio=3), "b": Compressed(ratio=2, at_least=True)}, ("a", 2, "at most")),
        (Compressed(ratio=6, at_least=True), {"a": Compressed(ratio=3, at_least=True)}, ("a", None, "")),
        (Compressed(), {"a": Compressed(ratio=3)}, ("a", None, "")),
        (Compressed(ratio=6), {"a": Compressed()}, (None, None, "")),
    ],
)
def test_advantages_say_what_they_are_bounds_of(ours, others, expected):
    found = advantage(ours, others)
    assert (found.best, found.ratio, found.bound) == expected


# --- what is measured


def test_every_spec_is_there_once_and_parses_to_itself():
    specs = [spec for settings in plan().values() for spec in settings.values()]
    assert len(specs) == len(set(specs)) == 46
    assert all(registry.spec(registry.parse(spec)) == spec for spec in specs)
    assert plan()[QAQ]["target 0.002"] == "qaq", "the default is one of the targets"
    assert {side for question in QUESTIONS for side in (question.better, question.worse)} <= SIDES.keys()


def test_targets_of_values_end_at_their_largest():
    strategy = registry.parse(plan([0.4], [0.5])[QAQ]["target 0.4"])
    assert (strategy.sigma_key, strategy.sigma_value) == (0.4, 1.0)
    with pytest.raises(ValueError, match=r"at most 0\.5"):
        plan([0.6], [0.5])


def report_of(**rows: int) -> MemoryReport:
    named = {name.replace("_", " "): size for name, size in rows.items()}
    host = named.get("host copy", 0)
    return MemoryReport(
        tokens=100,
        elements=1000,
        exact_bytes=4000,
        device_bytes=sum(named.values()) - host,
        host_bytes=host,
        rows=named,
    )


def test_parts_add_up_to_the_packed_bits():
    report = report_of(
        tail=800, key_codes=100, value_codes=100, value_exact=20, key_scales=10, value_outliers=30, widths=5,
        attention_history=15, spare=70, host_copy=999,
    )  # fmt: skip
    parts = parts_of(report)
    # four fifths of the numbers are packed
    assert (parts.codes, parts.exact, parts.scales, parts.outliers) == pytest.approx((2.0, 0.2, 0.1, 0.3))
    assert parts.widths == pytest.approx(0.05)


def row_of(spec: str, bits: float, kl: float) -> Row:
    memory = Memory(
        tokens=1, device_bytes=1, host_bytes=0, exact_bytes=1, bits_per_element=bits + 1, packed_bits_per_element=bits,
        ratio=1,
    )  # fmt: skip
    accuracy = Accuracy(tokens=1, perplexity=1, kl_mean=kl, kl_p99=kl, top1=1)
    return Row(panel="model", strategy=spec, memory=memory, accuracy=accuracy)


def test_lines_carry_the_papers_accounting_of_qaq_alone():
    report = report_of(key_codes=125, value_codes=125)
    found = line(QAQ, "target", row_of("qaq", 2, 0.1), report, SMALL)
    assert found.average == pytest.approx(2 * 0.99 + 0.16)
    assert found.bits("paper") == pytest.approx(2.14 + 32 / 64)
    assert line("uniform", "2 bits", row_of("uniform:bits=2", 2, 0.1), report, SMALL).bits("paper") is None
    failed = line(QAQ, "target", Row(panel="model", strategy="qaq", error="no"), report, SMALL)
    assert (failed.parts, failed.bits("packed"), failed.bits("paper")) == (None, None, None)


def lines_of(name: str, *points: tuple[float, float]) -> list[Line]:
    return [Line(curve=name, setting=str(kl), row=row_of(name, bits, kl)) for kl, bits in points]


def test_questions_are_answered_when_both_sides_are_there():
    recommended = lines_of(QAQ, (0.01, 4), (0.1, 3))
    assert answers("model", recommended) == []
    found = answers("model", [*recommended, *lines_of("no outliers", (0.01, 5), (0.1, 4))])
    assert [(each.packed.verdict, each.paper.verdict) for each in found] == [("holds", "no overlap")]
    assert found[0].question == QUESTIONS[0].title


def test_compression_is_compared_packed_and_as_held():
    names = (QAQ, DROPPING, *OTHERS)
    lines = [each for name in names for each in lines_of(name, (0.01, 4), (1, 2 if name in EVICTIONS else 1))]
    assert at_equal("model", lines[:-2], [0.1]) == []
    packed, held = at_equal("model", lines, [0.1])
    assert packed.compressed[QAQ].ratio == pytest.approx(16 / 2.5)
    assert packed.keeping.ratio == packed.dropping.ratio == pytest.approx(3 / 2.5)
    assert held.keeping.ratio == pytest.approx(4 / 3.5)


def advantages(*found: tuple[float | None, str]) -> list[Equal]:
    return [
        Equal(
            panel="model",
            size="packed",
            kl=0.1,
            compressed={},
            keeping=Advantage(best="h2o", ratio=ratio, bound=bound),
            dropping=Advantage(),
        )
        for ratio, bound in found
    ]


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        ([(1.7, ""), (2.0, "at least")], "holds, at 2 of 2 divergences, open at 0"),
        ([(1.7, ""), (0.9, "at least"), (None, "")], "holds, at 1 of 3 divergences, open at 2"),
        ([(1.7, ""), (1.5, "at most")], "holds in part, at 1 of 2 divergences, open at 0"),
        ([(1.5, ""), (1.7, "at most")], "does not hold, at 0 of 2 divergences, open at 1"),
        ([(None, ""), (1.7, "at most")], "undecided, at 0 of 2 divergences, open at 2"),
    ],
)
def test_claims_count_no_more_than_bounds_tell(found, expected):
    assert _claim(advantages(*found), 1.6) == expected


# --- the command


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A model with its tokenizer, and a text."""
    folder = tmp_path_factory.mktemp("qaq")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=64,
        max_position_embeddings=512,
        initializer_range=0.2,
    )
    vocabulary = {"<s>": 0, "</s>": 1, "<unk>": 2, **{f"w{i}": i + 3 for i in range(WORDS)}}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    tokenizer.save_pretrained(folder / "tiny")
    LlamaForCausalLM(config).eval().save_pretrained(folder / "tiny")
    ids = torch.randint(0, WORDS, (1000,), generator=torch.Generator().manual_seed(0)).tolist()
    (folder / "test.txt").write_text(" ".join(f"w{i}" for i in ids))
    return folder


def invoke(*arguments):
    result = CliRunner().invoke(qaq.app, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def test_command_answers_the_questions(files, tmp_path):
    result = invoke(
        *("--model", files / "tiny", "--text", files / "test.txt", "--windows", 1, "--length", 352),
        *(
            "--targets",
            "0.002,0.1",
            "--targets",
            0.02,
            "--keeps",
            "0.9,0.2",
            "--divergences",
            "0.05",
            "--out",
            tmp_path,
        ),
    )
    assert result.exit_code == 0, result.output
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        f"qaq-paper-tiny.{kind}" for kind in ("json", "md", "png")
    ]
    written = json.loads((tmp_path / "qaq-paper-tiny.json").read_text())
    panels = ["tiny", "outlier twin"]
    assert list(written["shapes"]) == panels
    assert written["shapes"]["tiny"] == SMALL.model_dump()
    assert len(written["lines"]) == len(panels) * (3 * len(SIDES) + 2 * 2 + 4)
    assert not [each["row"]["error"] for each in written["lines"] if each["row"]["error"]]
    for each in written["lines"]:
        total = sum(each["parts"].values())
        assert math.isclose(total, each["row"]["memory"]["packed_bits_per_element"], rel_tol=1e-6)
        assert (each["paper_ratio"] is not None) == (each["curve"] in SIDES)
    assert len(written["answers"]) == len(panels) * len(QUESTIONS)
    assert [each["size"] for each in written["equal"]] == ["packed", "held"] * len(panels)
    markdown = (tmp_path / "qaq-paper-tiny.md").read_text()
    for heading in ("## Verdicts", "### Outliers: 1 % exact", "## Compression at equal", "## Accounting", "## How"):
        assert heading in markdown
    assert "Compression, tiny" in result.output
    assert written["board"]["environment"]["torch"] == torch.__version__


def test_rows_that_fail_are_reported_with_their_reason(files, tmp_path, monkeypatch):
    # a group that the model's heads cannot have
    monkeypatch.setattr(
        qaq, "plan", lambda *_: {QAQ: {"target": "qaq"}, "no outliers": {"target": "uniform:group_size=128"}}
    )
    result = invoke(
        *("--model", files / "tiny", "--text", files / "test.txt", "--windows", 1, "--length", 320),
        *("--no-twin", "--out", tmp_path),
    )
    assert result.exit_code == 0, result.output
    written = json.loads((tmp_path / "qaq-paper-tiny.json").read_text())
    reason = written["lines"][1]["row"]["error"]
    assert "does not divide head_dim=64" in reason
    assert [each["packed"]["verdict"] for each in written["answers"]] == ["no overlap"]
    assert f"- failed: uniform:group_size=128 on tiny: {reason}" in (tmp_path / "qaq-paper-tiny.md").read_text()
    assert "no figure" in result.output


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--targets", "0.6"], "at most 0.5"),
        (["--targets", "small"], "write numbers like 0.0005"),
        (["--keeps", "1.5"], "keep"),
        (["--divergences", "0"], "greater than 0"),
        (["--length", "9999"], "beyond the model's context"),
    ],
)
def test_command_refuses_what_cannot_be_measured(files, tmp_path, options, message):
    result = invoke("--model", files / "tiny", "--text", files / "test.txt", "--out", tmp_path, *options)
    assert result.exit_code == 2
    assert message in " ".join(result.output.replace("│", " ").split())
