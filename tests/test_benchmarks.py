"""The harness measures what it says it measures: metrics by hand, streaming against transformers, files, commands."""

import csv
import hashlib
import io
import json
import math
import shutil
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from rich.console import Console
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from typer.testing import CliRunner

from cachequant import registry
from cachequant.benchmarks import contenders, held, leaderboard, metrics, speed, subjects
from cachequant.benchmarks.calibration import CalibrationText, Calibrator
from cachequant.benchmarks.cli import app
from cachequant.benchmarks.contenders import Candidate
from cachequant.benchmarks.corpus import Corpus
from cachequant.benchmarks.environment import Environment
from cachequant.benchmarks.held import Memory
from cachequant.benchmarks.leaderboard import Leaderboard, Row, Subject
from cachequant.benchmarks.report import board as report
from cachequant.benchmarks.report.chart import short_label
from cachequant.benchmarks.report.sheet import Line, Sheet, grouped, marked, of_leaderboard
from cachequant.benchmarks.report.tables import terminal_tables
from cachequant.benchmarks.streaming import ExactRun, Protocol, cut_windows, stream
from cachequant.benchmarks.subjects import ModelCard, Panel, TextCard
from cachequant.benchmarks.sweep.workbench import Workbench
from cachequant.benchmarks.tasks.base import Metric
from cachequant.core import Format, LayerFormat, LayerSpec, MemoryReport, PackedCache, SimulatedCache, Strategy, detach
from cachequant.core.calibration import CalibratedStrategy

VOCABULARY = 64
PROTOCOL = Protocol(windows=2, length=208, prefill=80, chunk=32, residual_length=16)


class Crude(Strategy):
    """Two bits with one scale for a whole head."""

    name: ClassVar[str] = "crude"
    variants = ({"bits": 2}, {"bits": 8})
    bits: int = 2

    def formats(self, layer: LayerSpec) -> LayerFormat:
        side = Format.model_validate({"bits": self.bits})
        return LayerFormat(key=side, value=side, block=32)


class Crashing(Crude):
    """Fails as plugins do: in the middle of a forward."""

    name: ClassVar[str] = "crashing"

    def encode(self, *args, **kwargs):
        raise RuntimeError("no kernel\nfor this [device]")


def build_model(context: int = 256, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=context,
        initializer_range=0.2,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def model():
    return build_model()


@pytest.fixture(scope="module")
def windows():
    ids = torch.randint(1, VOCABULARY, (1000,), generator=torch.Generator().manual_seed(0)).tolist()
    return cut_windows(ids, PROTOCOL, bos=0)


@pytest.fixture(scope="module")
def exact(model, windows):
    return ExactRun(model, windows, PROTOCOL, lambda: DynamicCache(config=model.config))


def card_of(panel: str) -> ModelCard:
    return ModelCard(panel=panel, architecture="Llama", parameters=1, layers=2, context=256, dtype="float32")


def subject_of(panel: str, model: Any, windows: torch.Tensor, calibrator: Any = None) -> Subject:
    """A model that reads `windows`."""
    panel_ = Panel(
        card=card_of(panel),
        model=model,
        tokenizer=None,
        text=TextCard(name="random", sha256="0" * 64, tokens=1000),
        ids=(),
        residual_length=PROTOCOL.residual_length,
        calibrator=calibrator or Calibrator(model, CalibrationText(lambda: ("none", ""), by_words)),
    )
    return Subject(panel_, ExactRun(model, windows, PROTOCOL, lambda: DynamicCache(config=model.config)))


@pytest.fixture(scope="module")
def board(model, windows):
    empty = Leaderboard(
        protocol=PROTOCOL,
        environment=Environment.current(),
        text=TextCard(name="random", sha256="0" * 64, tokens=1000),
        models=(card_of("tiny"),),
    )
    candidates = [Candidate("none", lambda: registry.parse("none"))]
    candidates += [Candidate(f"crude:bits={bits}", lambda bits=bits: Crude(bits=bits)) for bits in (2, 8)]
    candidates += [Candidate("crashing", Crashing)]
    return empty.with_rows(leaderboard.run([subject_of("tiny", model, windows)], candidates))


# --- metrics


def test_scores_equal_those_computed_by_hand():
    exact = torch.tensor([[0.5, 0.5], [0.25, 0.75]]).log()
    measured = torch.tensor([[0.5, 0.5], [0.75, 0.25]]).log() + 3.0  # logits may carry any constant
    scores = metrics.score_tokens(exact, measured, torch.tensor([0, 1]))
    torch.testing.assert_close(scores.loss, -torch.tensor([0.5, 0.25]).log())
    # 0.25 ln(0.25/0.75) + 0.75 ln(0.75/0.25)
    torch.testing.assert_close(scores.divergence, torch.tensor([0.0, 0.5 * math.log(3)]))
    assert scores.agrees.tolist() == [True, False]
    summary = metrics.summarize([scores])
    assert summary.perplexity == pytest.approx(math.sqrt(8))
    assert summary.kl_mean == pytest.approx(0.25 * math.log(3))
    assert summary.kl_p99 == pytest.approx(0.99 * 0.5 * math.log(3))
    assert (summary.tokens, summary.top1) == (2, 0.5)


def test_scores_that_are_not_finite_are_an_error():
    exact = torch.full((1, 2), 0.5).log()
    scores = metrics.score_tokens(exact, torch.tensor([[torch.nan, 0.0]]), torch.tensor([0]))
    with pytest.raises(ValueError, match="1 of 1 scored tokens"):
        metrics.summarize([scores])
    with pytest.raises(ValueError, match="no token"):
        metrics.summarize([])


@pytest.mark.parametrize(
    ("points", "front"),
    [
        ([], []),
        ([(1, 1)], [True]),
        ([(1, 3), (2, 2), (3, 1)], [True, True, True]),
        ([(1, 1), (2, 2)], [True, False]),
        ([(1, 1), (1, 1)], [True, True]),
        ([(1, 2), (1, 1)], [False, True]),
        ([(1, 1), (2, 1)], [True, False]),
        ([(2, 1), (1, 2), (2, 2), (1, 2)], [True, True, False, True]),
    ],
)
def test_pareto_front_keeps_what_nothing_beats(points, front):
    assert metrics.pareto_front(points) == front


# --- streaming


def test_windows_begin_with_bos_spread_over_the_text_and_do_not_overlap():
    windows = cut_windows(range(1, 1001), PROTOCOL, bos=0)
    assert windows.shape == (2, PROTOCOL.length + 1)
    assert windows[:, 0].tolist() == [0, 0]
    assert windows[0, 1] == 1
    assert windows[1, -1] == 1000
    without = cut_windows(range(1, 1001), PROTOCOL, bos=None)
    assert without.shape == windows.shape
    assert without[0, 0] == 1


def test_a_text_that_is_too_short_is_refused_with_a_remedy():
    with pytest.raises(ValueError, match="300 tokens, 2 windows of 208 need 416; use at most 1 windows"):
        cut_windows(range(300), PROTOCOL, bos=0)


@pytest.mark.parametrize(("context", "length"), [(512, 416), (1024, 928), (2048, 1056), (32768, 1056)])
def test_protocol_packs_the_largest_block_before_it_scores(context, length):
    protocol = Protocol.fitting(context)
    assert (protocol.length, protocol.prefill) == (length, 256 + 32)
    assert protocol.steps[0].start == protocol.prefill
    assert sum(step.stop - step.start for step in protocol.steps) * protocol.windows == protocol.scored


def test_protocol_refuses_windows_without_scored_tokens_and_beyond_the_context():
    with pytest.raises(ValueError, match="nothing to score"):
        Protocol.fitting(256)
    with pytest.raises(ValueError, match="use at most 512"):
        Protocol.fitting(512, length=513)


def test_streamed_logits_are_those_of_one_forward(model, windows):
    streamed = torch.cat(list(stream(model, windows, PROTOCOL, DynamicCache(config=model.config))), 1)
    with torch.no_grad():
        whole = model(windows[:, :-1]).logits[:, PROTOCOL.prefill :]
    torch.testing.assert_close(streamed, whole, rtol=1e-4, atol=1e-4)


def test_the_packed_cache_without_quantization_scores_as_dynamic_cache(model, exact):
    stock = exact.compare(model, DynamicCache(config=model.config))
    try:
        packed = exact.compare(model, PackedCache(model, registry.parse("none"), residual_length=16))
    finally:
        detach(model)
    assert stock.kl_mean == 0
    assert packed.perplexity == pytest.approx(stock.perplexity, rel=1e-6)
    assert packed.kl_mean < 1e-6
    assert packed.top1 > 0.99
    assert packed.tokens == PROTOCOL.scored


@pytest.mark.parametrize("block", [32, 64])
def test_streaming_equals_decoding_token_by_token(model, windows, block):
    strategy = registry.parse(f"uniform:bits=2,block={block}")
    single = PROTOCOL.model_copy(update={"chunk": 1})
    try:
        streamed, decoded = (
            torch.cat(list(stream(model, windows, each, PackedCache(model, strategy, residual_length=16))), 1)
            for each in (PROTOCOL, single)
        )
    finally:
        detach(model)
    torch.testing.assert_close(streamed, decoded, rtol=0, atol=0.05)
    assert (streamed - decoded).abs().mean() < 1e-4


def test_streaming_equals_the_simulation_of_it(model, windows):
    strategy = registry.parse("uniform:bits=2,block=32")
    schedule = {"prefill": PROTOCOL.prefill, "chunk": PROTOCOL.chunk}
    try:
        streamed = stream(model, windows, PROTOCOL, PackedCache(model, strategy, residual_length=16))
        streamed = torch.cat(list(streamed), 1)
        simulated = SimulatedCache(model, strategy, residual_length=16, **schedule)
        with torch.no_grad():
            whole = model(windows[:, :-1], past_key_values=simulated).logits[:, PROTOCOL.prefill :]
    finally:
        detach(model)
    # rounding may turn a code over, and with it a little of the logits
    torch.testing.assert_close(streamed, whole, rtol=0, atol=0.05)
    assert (streamed - whole).abs().mean() < 1e-4


def test_coarse_quantization_lowers_every_score(model, exact):
    try:
        fine, coarse = (exact.compare(model, PackedCache(model, Crude(bits=b), residual_length=16)) for b in (8, 2))
    finally:
        detach(model)
    assert coarse.kl_mean > 10 * fine.kl_mean > 0
    assert coarse.kl_p99 > fine.kl_p99
    assert coarse.top1 < fine.top1
    assert abs(coarse.perplexity - fine.perplexity) > 1e-3


def test_an_exact_run_too_large_to_keep_is_computed_anew(model, windows, exact, monkeypatch):
    monkeypatch.setattr("cachequant.benchmarks.streaming.KEPT_BYTES", 0)
    fresh = ExactRun(model, windows, PROTOCOL, lambda: DynamicCache(config=model.config))
    for kept, again in zip(exact.passes(), fresh.passes(), strict=True):
        assert torch.equal(kept, again)


# --- leaderboard


def test_a_crashing_strategy_becomes_a_row_with_its_reason(board):
    rows = {row.strategy: row for row in board.rows}
    assert rows["crashing"].error == "RuntimeError: no kernel for this [device]"
    assert rows["crashing"].accuracy is None
    assert all(rows[name].error is None for name in ("none", "crude:bits=2", "crude:bits=8"))


def test_a_strategy_that_cannot_be_constructed_becomes_a_row(model, windows):
    row = leaderboard.measure(subject_of("tiny", model, windows), contenders.variant(Crude, {"bits": "many"}))
    assert row.strategy == "crude:bits=many"
    assert "bits: Input should be a valid integer" in (row.error or "")


def test_bits_are_those_of_the_bytes_held(board):
    rows = {row.strategy: row.memory for row in board.rows if row.memory}
    assert rows["none"].packed_bits_per_element == pytest.approx(32)
    # what the tail has allocated beyond its tokens is held too
    assert 32 <= rows["none"].bits_per_element < 36
    assert rows["none"].ratio <= 1
    # 192 of 208 tokens packed with two bits and 32 bits of metadata per 32 numbers, 16 exact ones
    assert rows["crude:bits=2"].packed_bits_per_element == pytest.approx(3)
    assert rows["crude:bits=2"].bits_per_element >= (192 * 3 + 16 * 32) / 208
    assert rows["crude:bits=2"].tokens == 208


def test_the_packed_part_leaves_out_what_does_not_grow():
    rows = {"key codes": 30, "value codes": 30, "tail": 40, "codebooks": 1000, "spare": 7}
    weighed = MemoryReport(tokens=4, elements=40, exact_bytes=160, device_bytes=1107, host_bytes=0, rows=rows)
    assert held.packed_bits(weighed) == pytest.approx(8 * 60 / 30)
    nothing = MemoryReport(tokens=0, elements=0, exact_bytes=0, device_bytes=0, host_bytes=0, rows={})
    assert held.packed_bits(nothing) == 0


def test_pareto_is_judged_panel_by_panel(board):
    rows = [row.model_copy(update={"panel": panel}) for panel in ("one", "other") for row in board.rows if row.accuracy]
    marks = [[row.pareto for row in leaderboard.mark_pareto(rows) if row.panel == panel] for panel in ("one", "other")]
    assert marks[0] == marks[1] == [True, True, True]


def test_measuring_leaves_the_model_its_own_attention(board, model):
    assert model.config._attn_implementation == "sdpa"


# --- calibration

LEARNED = torch.randint(1, VOCABULARY, (900,), generator=torch.Generator().manual_seed(3)).tolist()
RANDOM_TEXT = ("random", " ".join(map(str, LEARNED)))


def by_words(text, **options):
    """A tokenizer of texts that list their ids."""
    return SimpleNamespace(input_ids=[int(word) for word in text.split()])


by_words.eos_token_id = None


@pytest.fixture
def calibrated(model, windows, monkeypatch):
    """Rows of a model and of another one for given specs, and the calibrations that were made on the way."""
    monkeypatch.setattr(CalibratedStrategy, "calibrate", counting(made := [], CalibratedStrategy.calibrate))
    other = build_model(seed=1)
    text = CalibrationText(lambda: RANDOM_TEXT, by_words, samples=3)
    measured = []
    for panel, each in (("one", model), ("other", other)):
        measured.append(subject_of(panel, each, windows, Calibrator(each, text)))

    def measure(*specs):
        return list(leaderboard.run(measured, contenders.candidates(specs)))

    measure.made = made
    measure.ready = lambda spec: measured[0].panel.calibrator.ready(registry.parse(spec))
    return measure


def counting(made, method):
    def wrapped(self, model, *arguments, **options):
        made.append((registry.spec(self), id(model)))
        return method(self, model, *arguments, **options)

    wrapped.__qualname__, wrapped.__module__ = method.__qualname__, method.__module__
    return wrapped


def test_strategies_that_read_the_same_statistics_share_one_calibration_per_model(calibrated):
    rows = calibrated("kvquant:bits=4", "kvquant:bits=2,datatype=int", "kvquant:weights=fisher", "qnorm:bits=2")
    assert [row.error for row in rows] == [None] * 8
    assert [spec for spec, _ in calibrated.made] == ["kvquant"] * 2 + ["kvquant:bits=2,datatype=int"] * 2
    assert len({model for _, model in calibrated.made}) == 2
    # equal steps need no gradients, so the recipe is another
    assert len({(row.panel, row.calibration) for row in rows}) == 4


@pytest.mark.parametrize("change", ["outliers=0", "sink_tokens=0", "key_rope=post", "block=64", "profile=repository"])
def test_what_would_be_measured_otherwise_is_calibrated_anew(calibrated, change):
    _, one = calibrated.ready("kvquant")
    strategy, other = calibrated.ready(f"kvquant:{change}")
    assert one != other
    assert len(calibrated.made) == 2
    assert strategy.calibration.record.settings == strategy.with_calibration(None).model_dump(exclude={"calibration"})


def test_rows_keep_their_spec_and_say_what_was_learned(calibrated, board):
    (row, other) = calibrated("kvquant:bits=2")
    assert row.strategy == "kvquant:bits=2"
    card = row.calibration
    assert (card.text, card.windows, card.length) == ("random", 3, 256)
    assert card.sha256 == hashlib.sha256(RANDOM_TEXT[1].encode()).hexdigest()
    assert card.windows_sha256 == other.calibration.windows_sha256
    assert card.seconds > 0
    text = report.describe(board.with_rows([row, other]))
    assert "first, on 3 windows of 256 tokens of the text random, sha256 " + card.sha256[:12] in text
    assert "2 calibrations took" in text
    assert text.count("kvquant:bits=2") == 1
    assert "alibrat" not in report.describe(board)


def test_strategies_that_are_ready_do_not_read_the_calibration_text(model, windows):
    def absent():
        raise FileNotFoundError("there is no text")

    calibrator = Calibrator(model, CalibrationText(absent, by_words))
    subject = subject_of("tiny", model, windows, calibrator)
    rows = list(leaderboard.run([subject], contenders.candidates(["kvquant:calibration=prompt", "none", "kvquant"])))
    assert [row.error for row in rows] == [None, None, "FileNotFoundError: there is no text"]
    assert [row.calibration for row in rows] == [None] * 3


def test_a_calibration_that_fails_becomes_a_row(model, windows):
    text = CalibrationText(lambda: ("short", "1 2 3"), by_words)
    subject = subject_of("tiny", model, windows, Calibrator(model, text))
    row = leaderboard.measure(subject, contenders.candidates(["kvquant"])[0])
    assert "ValueError: the text has 3 tokens; 8 windows of 256" in row.error
    assert model.config._attn_implementation == "sdpa"


def test_a_calibration_of_another_model_becomes_a_row(model, windows, tmp_path):
    ids = torch.randint(1, VOCABULARY, (2, 256), generator=torch.Generator().manual_seed(0))
    other = build_model()
    with torch.no_grad():
        other.model.layers[1].self_attn.k_proj.weight.mul_(1.5)
    kvquant = registry.get("kvquant")(outliers=0).calibrate(other, None, ids, samples=2, heldout=0)
    given = registry.spec(kvquant.save_pretrained(tmp_path))
    row = leaderboard.measure(subject_of("tiny", model, windows), contenders.candidates([given])[0])
    assert row.strategy == given
    assert "is of another model" in row.error


def test_who_has_to_be_calibrated_is_known_before():
    found = contenders.candidates(["none", "kvquant", "kvquant:calibration=prompt", "qnorm:base=uniform"])
    assert [contenders.needs_calibration(each) for each in found] == [False, True, False, True]
    assert not contenders.needs_calibration(contenders.variant(Crude, {"bits": "many"}))


# --- report


def test_report_files_are_written_and_parse(board, tmp_path):
    paths = report.write_all(board, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(path.name for path in paths)
    assert Leaderboard.model_validate_json((tmp_path / "leaderboard.json").read_text()) == board
    lines = list(csv.DictReader((tmp_path / "leaderboard.csv").open()))
    assert [line["strategy"] for line in lines] == [row.strategy for row in board.rows]
    assert float(lines[1]["accuracy_kl_mean"]) == board.rows[1].accuracy.kl_mean
    markdown = (tmp_path / "leaderboard.md").read_text()
    assert markdown.count("\n| `") == len(board.rows)
    assert "RuntimeError: no kernel" in markdown
    assert (tmp_path / "leaderboard.png").read_bytes().startswith(b"\x89PNG")


def test_a_report_of_failures_alone_can_be_drawn(board, tmp_path):
    failed = board.with_rows([Row(panel="tiny", strategy="crashing", error="RuntimeError: no")])
    assert len(report.write_all(failed, tmp_path)) == 4


@pytest.mark.parametrize("width", [80, 120, 200])
def test_the_terminal_table_is_never_cropped(board, width):
    console = Console(width=width, record=True, file=io.StringIO())
    other = [row.model_copy(update={"panel": "other"}) for row in board.rows]
    models = (*board.models, board.models[0].model_copy(update={"panel": "other"}))
    both = board.model_copy(update={"models": models}).with_rows([*board.rows, *other])
    for table in terminal_tables(of_leaderboard(both), console.width):
        console.print(table)
    text = console.export_text()
    assert "…" not in text
    assert text.count("crude:bits=2") == text.count("perplexity") / (2 if width == 200 else 1)


def test_rows_are_sorted_by_bits_with_failures_last(board):
    assert [spec for spec, _ in grouped(of_leaderboard(board))] == ["crude:bits=2", "crude:bits=8", "none", "crashing"]


@pytest.mark.parametrize(
    ("spec", "label"),
    [
        ("uniform", "4-bit"),
        ("uniform:bits=2,key_scale=channel,key_rope=pre", "2-bit channel pre"),
        ("uniform:key_bits=8,symmetric=true,group_size=32", "4-bit key 8-bit symmetric group size 32"),
        ("none", "none"),
        ("gone:alpha=0.5", "alpha 0.5"),
    ],
)
def test_chart_labels_are_short(spec, label):
    assert short_label(spec) == label


# --- speed


def test_contenders_take_turns_and_the_first_turn_is_not_counted():
    calls = []
    times = speed.interleave({name: lambda name=name: calls.append(name) for name in "ab"}, 2)
    assert calls == ["a", "b"] * 3
    assert [len(rounds) for rounds in times.values()] == [2, 2]


def test_bytes_and_times_of_each_contender():
    model = build_model(512).to(torch.bfloat16)
    runners = speed.contenders(model, ["uniform:bits=4"])
    held = {row.contender: row for row in speed.measure_held(runners, 256)}
    # keys and values of two layers, two heads of 32, two bytes each
    assert held[speed.BASELINE].bytes == 256 * 2 * 2 * 2 * 32 * 2
    assert held["PackedCache uniform"].ratio > 1
    assert all(row.bytes < held[speed.BASELINE].bytes for row in held.values() if row.contender != speed.BASELINE)
    decode = speed.measure_decode(runners, 64, 2)
    assert [row.contender for row in decode] == list(held)
    assert decode[0].wall_ratio == decode[0].cpu_ratio == 1
    assert model.config._attn_implementation == "sdpa"
    with pytest.raises(ValueError, match="before RoPE"):
        speed.contenders(model, ["uniform:key_rope=pre"])


# --- command line


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model folder with a tokenizer that knows one word per id, and a text."""
    folder = tmp_path_factory.mktemp("model")
    build_model(512).save_pretrained(folder)
    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCABULARY)}, unk_token="w1"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="w0", unk_token="w1").save_pretrained(folder)
    ids = torch.randint(2, VOCABULARY, (1500,), generator=torch.Generator().manual_seed(0)).tolist()
    (folder / "text.txt").write_text(" ".join(f"w{i}" for i in ids))
    ids = torch.randint(2, VOCABULARY, (1500,), generator=torch.Generator().manual_seed(1)).tolist()
    (folder / "other.txt").write_text(" ".join(f"w{i}" for i in ids))
    (folder / "short.txt").write_text("w2 w3")
    return folder


def invoke(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "200"})


def results_in(out):
    return json.loads((out / "leaderboard.json").read_text())["results"]


@pytest.mark.parametrize("offers", [registry, registry.tasks])
def test_list_shows_every_strategy_and_task_with_its_fields(offers):
    result = invoke("list")
    assert result.exit_code == 0
    for name in offers.names():
        assert name in result.output
        for field in offers.describe(name).fields:
            assert field.name in result.output


def test_bench_measures_a_model_and_its_twin(folder, tmp_path):
    common = ("--model", folder, "--text", folder / "text.txt", "--tasks", "perplexity:windows=2", "--no-baselines")
    common += ("--out", tmp_path / "new" / "out")
    result = invoke("bench", *common, "--strategies", "none; uniform:bits=4", "--strategies", "uniform:group_size=24")
    assert result.exit_code == 0, result.output
    board = json.loads((tmp_path / "new" / "out" / "leaderboard.json").read_text())
    cells = [result["cell"] for result in board["results"]]
    assert [(cell["strategy"], cell["model"]["panel"]) for cell in cells] == [
        (spec, panel)
        for spec in ("none", "uniform", "uniform:group_size=24")
        for panel in (folder.name, "outlier twin")
    ]
    assert [bool(result["error"]) for result in board["results"]] == [False] * 4 + [True] * 2
    assert {cell["task"] for cell in cells} == {"perplexity:length=416,windows=2"}
    assert len(board["models"][0]["weights_sha256"]) == 64
    assert str(folder) not in json.dumps(board)
    assert "a group of 24 channels does not divide head_dim=32" in " ".join(result.output.split())


def test_bench_calibrates_on_a_text_that_is_not_measured(folder, tmp_path):
    common = ("--model", folder, "--text", folder / "text.txt", "--tasks", "perplexity:windows=1", "--no-baselines")
    common += ("--out", tmp_path)
    learning = ("--calibration-text", folder / "other.txt", "--calibration-samples", 2)
    result = invoke("bench", *common, *learning, "--strategies", "kvquant:bits=2;none")
    assert result.exit_code == 0, result.output
    board = json.loads((tmp_path / "leaderboard.json").read_text())
    assert [result["error"] for result in board["results"]] == [None] * 4
    cards = [result["calibration"] for result in board["results"]]
    assert cards[2:] == [None, None]
    assert [(card["text"], card["windows"], card["length"]) for card in cards[:2]] == [("other.txt", 2, 512)] * 2
    flat = " ".join(result.output.split())
    assert "Calibrated for each model first, on 2 windows of 512 tokens of the text other.txt" in flat
    assert board["notes"] == []
    lines = list(csv.DictReader((tmp_path / "leaderboard.csv").open()))
    assert [line["calibration_windows"] for line in lines] == ["2", "2", "", ""]


def test_bench_notes_that_the_standard_library_calibrates_for_a_text_of_ones_own(folder, tmp_path, monkeypatch):
    asked = []

    def library(split):
        asked.append(split)
        return Corpus("w2 w3 w4 " * 400, "3.0", "", 1)

    monkeypatch.setattr(subjects, "stdlib_text", library)
    common = ("--model", folder, "--text", folder / "text.txt", "--out", tmp_path, "--no-twin", "--no-baselines")
    common += ("--tasks", "perplexity:windows=1")
    notes = []
    for spec in ("kvquant", "none"):
        result = invoke("bench", *common, "--calibration-samples", 1, "--strategies", spec)
        assert result.exit_code == 0, result.output
        notes.append(json.loads((tmp_path / "leaderboard.json").read_text())["notes"])
    assert asked == ["train"]
    assert notes[1] == []
    assert "not on text like text.txt; --calibration-text gives another" in notes[0][0]


def test_an_interrupted_bench_keeps_what_it_measured(folder, tmp_path, monkeypatch):
    measure = Workbench.measure

    def interrupted(self, planned):
        if planned.cell.strategy == "uniform":
            raise KeyboardInterrupt
        return measure(self, planned)

    monkeypatch.setattr(Workbench, "measure", interrupted)
    common = ("--model", folder, "--text", folder / "text.txt", "--out", tmp_path, "--no-twin", "--no-baselines")
    result = invoke("bench", *common, "--tasks", "perplexity:windows=2", "--strategies", "none;uniform")
    assert result.exit_code == 130
    assert [result["cell"]["strategy"] for result in results_in(tmp_path)] == ["none"]


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("--strategies", "unifrom"), "no strategy named 'unifrom'"),
        (("--strategies", "uniform:bits=5"), "bits: Input should be 2, 3, 4 or 8"),
        (("--model", "/no/such/model"), "there is no folder '/no/such/model'"),
        (("--model", "{folder}/.."), "cannot load the model"),
        (("--text", "{folder}/absent.txt"), "No such file"),
        (("--text", "{folder}/model.safetensors"), "as UTF-8"),
        (("--text", "{folder}/short.txt"), "the text has 2 tokens"),
        (("--calibration-text", "{folder}/absent.txt"), "Invalid value for --calibration-text: cannot read"),
        (("--calibration-text", "{folder}/text.txt"), "is the text that is measured; calibrate on another"),
        (("--strategies", "kvquant:calibration=/no/such/folder"), "there is no calibration folder"),
        (("--tasks", "perplexity:length=600"), "beyond the model's context; use at most 512"),
        (("--tasks", "perplexity:length=200"), "nothing to score"),
        (("--lengths", "600"), "beyond the model's context; use at most 512"),
        (("--out", "{folder}/text.txt"), "cannot write to"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(folder, tmp_path, arguments, complaint):
    given = {"--model": folder, "--text": folder / "text.txt", "--out": tmp_path, "--strategies": "uniform"}
    given |= {arguments[0]: arguments[1].format(folder=folder)}
    result = invoke("bench", *(part for pair in given.items() for part in pair))
    assert result.exit_code == 2
    flat = " ".join(result.output.replace("│", " ").split())
    assert complaint in flat
    assert "Traceback" not in flat


def test_a_changed_configuration_and_other_weight_files_are_another_model(folder, tmp_path):
    def card(path):
        panels, _ = subjects.open_panels(str(path), folder / "text.txt", twin=False)
        return panels[0].card

    shutil.copytree(folder, tmp_path / "same")
    first = card(tmp_path / "same")
    config = json.loads((tmp_path / "same" / "config.json").read_text())
    config["rope_parameters"] = {**config["rope_parameters"], "rope_theta": 100.0}
    (tmp_path / "same" / "config.json").write_text(json.dumps(config))
    changed = card(tmp_path / "same")
    assert changed.weights_sha256 == first.weights_sha256
    assert changed.identity_sha256 != first.identity_sha256


def test_a_model_called_like_its_twin_gets_a_panel_of_its_own(folder, tmp_path):
    shutil.copytree(folder, tmp_path / subjects.TWIN)
    panels, _ = subjects.open_panels(str(tmp_path / subjects.TWIN), folder / "text.txt")
    assert len({panel.card.panel for panel in panels}) == 2


@pytest.mark.parametrize("device", ["bogus", "cuda:99"])
def test_a_device_that_is_not_there_is_named(folder, tmp_path, device):
    result = invoke("bench", "--model", folder, "--text", folder / "text.txt", "--out", tmp_path, "--device", device)
    assert result.exit_code == 2
    assert "Invalid value for --device" in result.output


@pytest.mark.parametrize("width", [60, 80, 120])
def test_tables_of_many_metrics_are_divided_rather_than_cropped(width):
    metrics = tuple(Metric(name=f"m{i}", label=f"figure number {i}", better="higher") for i in range(8))
    line = Line("uniform:bits=2,key_scale=channel", "tiny", None, {metric.name: 0.5 for metric in metrics})
    console = Console(width=width, record=True, file=io.StringIO())
    for table in terminal_tables(Sheet("many", ("tiny",), metrics, (line,)), width):
        console.print(table)
    text = console.export_text()
    assert all(f"figure number {i}" in text for i in range(8))
    assert "…" not in text
    assert "uniform" in text


def test_what_was_not_read_ranks_nothing():
    memory = Memory(
        tokens=1,
        device_bytes=1,
        host_bytes=0,
        exact_bytes=1,
        bits_per_element=2,
        packed_bits_per_element=2,
        ratio=1,
    )
    metrics = (
        Metric(name="acc", label="accuracy", better="higher"),
        Metric(name="packed_share", label="", better="higher"),
    )
    lines = [
        Line("unread", "p", memory, {"acc": 1.0, "packed_share": 0.0}),
        Line("read", "p", memory, {"acc": 0.5, "packed_share": 0.4}),
    ]
    assert [line.pareto for line in marked(lines, metrics[0])] == [False, True]
