"""A calibration is kept whole, serves its own model and settings only, and says what is wrong otherwise."""

import copy
import json
from typing import Any, ClassVar

import pytest
import torch
from safetensors.torch import load_file, save_file

from cachequant import registry
from cachequant.core import Format, LayerFormat, LayerSpec, PackedCache, Side, Tables
from cachequant.core.calibration import CalibratedStrategy, Calibration, Statistics, fitted_tables
from cachequant.core.calibration.artifact import NUMBERS, RECORD
from cachequant.core.hf import identity
from cachequant.core.hf.identity import identify
from cachequant.strategies.kvquant import KVQuant
from cachequant.strategies.qnorm import QNorm


@pytest.fixture(scope="module")
def model(build):
    return build()


@pytest.fixture(scope="module")
def calibrated(model, windows):
    """KVQuant of 3 bits, calibrated for `model`."""
    strategy = KVQuant(bits=3, block=32, outliers=0.04, sink_tokens=2)
    return strategy.calibrate(model, None, windows(3, 64), samples=2)


@pytest.fixture
def folder(calibrated, tmp_path):
    calibrated.save_pretrained(tmp_path / "artifact")
    return tmp_path / "artifact"


def edit(folder: Any, **changes: Any) -> None:
    record = json.loads((folder / RECORD).read_text())
    (folder / RECORD).write_text(json.dumps({**record, **changes}))


# ---- round trips -----------------------------------------------------------------------------------------------------


def test_what_is_saved_is_read_back_equal(calibrated, folder):
    assert sorted(path.name for path in folder.iterdir()) == [RECORD, NUMBERS]
    loaded = KVQuant.from_pretrained(folder)
    assert loaded == calibrated
    assert hash(loaded) == hash(calibrated)
    assert loaded.calibration.source == str(folder)
    assert loaded.calibration.record.model_copy(update={"numbers": ""}) == calibrated.calibration.record
    for index, sides in calibrated.calibration.statistics.items():
        for side, statistics in sides.items():
            found = loaded.calibration.of(index, side).tensors()
            assert found.keys() == statistics.tensors().keys()
            assert all(torch.equal(found[name], tensor) for name, tensor in statistics.tensors().items())


def test_saving_returns_the_strategy_that_knows_its_place(calibrated, tmp_path):
    saved = calibrated.save_pretrained(tmp_path)
    assert saved == calibrated
    assert calibrated.calibration.source is None
    assert registry.spec(saved) == registry.spec(KVQuant.from_pretrained(tmp_path))
    assert str(tmp_path) in registry.spec(saved)


def test_a_spec_leads_back_to_the_same_strategy(calibrated, folder):
    loaded = KVQuant.from_pretrained(folder)
    assert registry.parse(registry.spec(loaded)) == loaded == calibrated
    assert KVQuant.model_validate(loaded.model_dump(mode="json")) == loaded
    assert KVQuant.model_validate(loaded.model_dump()) == loaded


def test_what_was_never_saved_is_named_by_its_contents(calibrated, folder):
    assert f"calibration=unsaved-{calibrated.calibration.digest}" in registry.spec(calibrated)
    with pytest.raises(FileNotFoundError, match="there is no calibration folder 'unsaved-"):
        registry.parse(registry.spec(calibrated))


def test_settings_may_be_changed_when_reading(calibrated, folder, model, windows):
    two = KVQuant.from_pretrained(folder, bits=2)
    assert (two.bits, two.block, two.outliers) == (2, 32, 0.04)
    assert two != calibrated
    two.require_model(model)
    cache = PackedCache(model, two, residual_length=0)
    with torch.no_grad():
        model(windows(1, 97), past_key_values=cache)
    assert cache.packed_layers[0].tables["key"].codebook.shape == (4,)


def test_other_contents_make_another_calibration(calibrated, model, windows):
    other = calibrated.calibrate(model, None, windows(3, 64, seed=2), samples=2)
    assert other.calibration != calibrated.calibration
    assert other != calibrated
    assert other.with_calibration(calibrated.calibration) == calibrated


def test_saving_again_replaces(calibrated, folder, model, windows):
    other = calibrated.calibrate(model, None, windows(3, 64, seed=2), samples=2)
    other.save_pretrained(folder)
    assert KVQuant.from_pretrained(folder) == other
    assert sorted(path.name for path in folder.iterdir()) == [RECORD, NUMBERS]


def test_calibrations_do_not_depend_on_names_of_folders(calibrated, folder, tmp_path):
    folder.rename(tmp_path / "elsewhere")
    assert KVQuant.from_pretrained(tmp_path / "elsewhere") == calibrated


def test_evidence_and_settings_make_no_other_calibration(calibrated):
    record = calibrated.calibration.record
    evidence = record.evidence.model_copy(update={"seconds": 1e6, "perplexity": 7.0})
    told = record.model_copy(update={"evidence": evidence, "settings": {"bits": 2}})
    assert Calibration(told, calibrated.calibration.statistics) == calibrated.calibration
    recipe = record.model_copy(update={"recipe": record.recipe.model_copy(update={"outliers": 0.05})})
    assert Calibration(recipe, calibrated.calibration.statistics) != calibrated.calibration


def test_a_deep_copy_is_the_calibration_itself(calibrated):
    assert copy.deepcopy(calibrated.calibration) is calibrated.calibration
    assert copy.deepcopy(calibrated) == calibrated


def test_homes_are_expanded(calibrated, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    saved = calibrated.save_pretrained("~/kept")
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]
    assert KVQuant.from_pretrained("~/kept") == saved == calibrated


def test_the_calibration_is_no_setting_to_change_when_reading(calibrated, folder):
    with pytest.raises(ValueError, match=f"the calibration comes from {folder}; construct the strategy"):
        KVQuant.from_pretrained(folder, calibration=calibrated.calibration)


# ---- missing, damaged, old -------------------------------------------------------------------------------------------


def test_a_missing_folder_is_named(tmp_path):
    for source in (tmp_path / "nothing", "nothing", "./a/b", "~/nothing/there"):
        with pytest.raises(FileNotFoundError, match="there is no calibration folder"):
            KVQuant.from_pretrained(source)


@pytest.mark.parametrize("missing", [RECORD, NUMBERS])
def test_a_missing_file_is_named(folder, missing):
    (folder / missing).unlink()
    with pytest.raises(FileNotFoundError, match=f"holds no calibration: {missing} is missing"):
        KVQuant.from_pretrained(folder)


def test_an_empty_folder_holds_no_calibration(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no calibration"):
        registry.parse(f'kvquant:calibration="{tmp_path}"')


@pytest.mark.parametrize("damaged", [RECORD, NUMBERS])
@pytest.mark.parametrize("damage", [lambda data: data[: len(data) // 2], lambda data: b"[]", lambda data: b""])
def test_a_damaged_file_says_so(folder, damaged, damage):
    path = folder / damaged
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=r"the calibration in .* is damaged .*calibrate again"):
        KVQuant.from_pretrained(folder)


def test_another_file_version_is_refused(folder):
    edit(folder, version=0)
    with pytest.raises(ValueError, match="has file version 0, this cachequant reads version 1; calibrate again"):
        KVQuant.from_pretrained(folder)


def test_a_record_without_fields_is_damaged(folder):
    record = json.loads((folder / RECORD).read_text())
    del record["evidence"]
    (folder / RECORD).write_text(json.dumps(record))
    with pytest.raises(ValueError, match="is damaged"):
        KVQuant.from_pretrained(folder)


def test_numbers_that_the_record_promises_are_missed(folder):
    tensors = load_file(folder / NUMBERS)
    save_file({name: t for name, t in tensors.items() if not name.startswith("1.value")}, folder / NUMBERS)
    with pytest.raises(ValueError, match=f"{NUMBERS} is not the one that {RECORD} was written with; calibrate again"):
        KVQuant.from_pretrained(folder)


def test_sides_that_were_saved_without_numbers_are_missed(calibrated, tmp_path):
    whole = calibrated.calibration
    partial = {**whole.statistics, 1: {"key": whole.of(1, "key")}}
    Calibration(whole.record, partial).save(tmp_path)
    with pytest.raises(ValueError, match="it lacks the values of layer 1; calibrate again"):
        KVQuant.from_pretrained(tmp_path)


@pytest.mark.parametrize("mixed", [RECORD, NUMBERS])
def test_files_of_two_calibrations_are_refused(calibrated, folder, model, windows, tmp_path, mixed):
    other = calibrated.calibrate(model, None, windows(3, 64, seed=2), samples=2)
    other.save_pretrained(tmp_path / "other")
    (folder / mixed).write_bytes((tmp_path / "other" / mixed).read_bytes())
    with pytest.raises(ValueError, match=f"{NUMBERS} is not the one that {RECORD} was written with; calibrate again"):
        KVQuant.from_pretrained(folder)


@pytest.mark.parametrize("name", ["nonsense", "0.key.other", "x.key.density"])
def test_numbers_nobody_knows_are_damage(folder, name):
    save_file({**load_file(folder / NUMBERS), name: torch.ones(2)}, folder / NUMBERS)
    with pytest.raises(ValueError, match="damaged"):
        KVQuant.from_pretrained(folder)


def test_another_strategys_artifact_is_refused(folder):
    with pytest.raises(ValueError, match="holds a calibration of 'kvquant', not of 'qnorm'"):
        QNorm.from_pretrained(folder)


# ---- the hub ---------------------------------------------------------------------------------------------------------


def test_a_hub_id_is_downloaded(calibrated, folder, monkeypatch, tmp_path):
    asked = []

    def download(repo: str, **options: Any) -> str:
        asked.append((repo, sorted(options["allow_patterns"])))
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    monkeypatch.chdir(tmp_path)
    loaded = KVQuant.from_pretrained("someone/llama-kvquant")
    assert asked == [("someone/llama-kvquant", [RECORD, NUMBERS])]
    assert loaded == calibrated
    assert "calibration=someone/llama-kvquant" in registry.spec(loaded)


def test_a_folder_goes_before_the_hub(calibrated, folder, monkeypatch):
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *a, **k: pytest.fail("asked the hub"))
    monkeypatch.chdir(folder.parent.parent)
    assert KVQuant.from_pretrained(f"{folder.parent.name}/{folder.name}") == calibrated


def test_a_hub_that_has_nothing_is_reported(monkeypatch, tmp_path):
    from huggingface_hub.errors import LocalEntryNotFoundError

    def download(repo: str, **options: Any) -> str:
        raise LocalEntryNotFoundError("offline")

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="no folder 'someone/nothing', and the hub gave no calibration"):
        KVQuant.from_pretrained("someone/nothing")


def test_names_that_no_repository_can_have_are_reported(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="no folder 'some one/nothing', and the hub gave no calibration"):
        KVQuant.from_pretrained("some one/nothing")


def test_pushing_uploads_what_saving_writes(calibrated, monkeypatch):
    calls: list[Any] = []

    class Api:
        def __init__(self, token: str | None = None) -> None:
            calls.append(("token", token))

        def create_repo(self, repo_id: str, **options: Any) -> None:
            calls.append((repo_id, options))

        def upload_folder(self, repo_id: str, folder_path: str) -> str:
            calls.append((repo_id, Calibration.load(folder_path)))
            return "https://hub/commit"

    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    assert calibrated.push_to_hub("me/mine", private=True, token="t") == "https://hub/commit"
    assert calls[0] == ("token", "t")
    assert calls[1] == ("me/mine", {"exist_ok": True, "private": True})
    assert calls[2] == ("me/mine", calibrated.calibration)


# ---- whose and for what ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", [KVQuant(), QNorm(base="uniform"), QNorm()], ids=registry.spec)
def test_without_a_calibration_the_error_tells_how_to_get_one(model, strategy, tmp_path):
    message = rf"(?s){strategy.name} is not calibrated.*cachequant calibrate {strategy.name} --model.*'prompt'"
    for attempt in (
        lambda: PackedCache(model, strategy),
        lambda: strategy.require_model(model),
        lambda: strategy.save_pretrained(tmp_path),
    ):
        with pytest.raises(ValueError, match=message):
            attempt()


def test_another_configuration_is_refused(calibrated, folder, build):
    for strategy, place in ((calibrated, "given"), (KVQuant.from_pretrained(folder), f"in {folder}")):
        with pytest.raises(ValueError, match=f"calibration {place} is of another model: num_hidden_layers was 2, is 3"):
            PackedCache(build(num_hidden_layers=3), strategy)


def test_other_weights_of_the_same_configuration_are_refused(calibrated, build):
    other = build()
    with torch.no_grad():
        other.model.layers[1].self_attn.k_proj.weight.mul_(1.1)
    with pytest.raises(ValueError, match=r"the weights k_proj\.weight of attention layer 1 are others"):
        PackedCache(other, calibrated)


def test_another_seed_of_the_same_configuration_is_refused(calibrated, build):
    with pytest.raises(ValueError, match="is of another model"):
        PackedCache(build(seed=1), calibrated)


@pytest.mark.parametrize("change", [lambda bias: bias + 1, lambda bias: -bias], ids=["size", "sign"])
def test_other_biases_are_refused(build, windows, change):
    model, other = build(attention_bias=True), build(attention_bias=True)
    strategy = KVQuant(block=32).calibrate(model, None, windows(2, 64), samples=2, heldout=0)
    strategy.require_model(other)
    with torch.no_grad():
        bias = other.model.layers[0].self_attn.v_proj.bias
        bias.copy_(change(bias))
    # weights that were read before are read again
    with pytest.raises(ValueError, match=r"the weights v_proj\.bias of attention layer 0 are others"):
        strategy.require_model(other)


def test_marks_are_the_same_under_another_default_dtype(build):
    model, other = build(), build()
    expected = identify(model)
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert identify(other) == expected
    finally:
        torch.set_default_dtype(torch.float32)


def test_adapters_and_small_changes_are_no_other_model(calibrated, build):
    model = build()
    with torch.no_grad():
        for layer in model.model.layers:
            weight = layer.self_attn.k_proj.weight
            weight.add_(0.1 * weight.std() * torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)))
            layer.self_attn.k_proj.lora_A = torch.nn.Linear(4, 4)
            layer.self_attn.temperature = torch.nn.Parameter(torch.tensor(1.0))
    calibrated.require_model(model)
    assert "temperature" in identify(model)["attention_weights"]["0"]
    assert not any("lora" in name for name in identify(model)["attention_weights"]["0"])


def test_marks_are_those_of_parameters_put_in_the_place_of_others(build):
    model = build()
    attention, found = model.model.layers[0].self_attn, set()
    for seed in range(8):
        # freed first, so that the next one may get its memory
        shape, attention.k_proj.weight = attention.q_proj.weight[:32].shape, None
        weight = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
        attention.k_proj.weight = torch.nn.Parameter(weight)
        found.add(tuple(identify(model)["attention_weights"]["0"]["k_proj.weight"]))
    assert len(found) == 8


def test_marks_are_read_once_for_each_state_of_the_weights(model, monkeypatch):
    identify(model)
    monkeypatch.setattr(identity, "_mark", lambda weight: pytest.fail("read again"))
    identify(model)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_the_same_model_in_another_dtype_is_accepted(calibrated, build, windows, dtype):
    model = build(dtype=dtype)
    cache = PackedCache(model, calibrated, residual_length=0)
    with torch.no_grad():
        model(windows(1, 97)[:, :-1], past_key_values=cache)
        logits = model(windows(1, 97)[:, -1:], past_key_values=cache).logits
    assert logits.isfinite().all()
    assert cache.packed_layers[0].packed_tokens == 96


def test_a_copy_of_the_model_elsewhere_is_accepted(calibrated, model, tmp_path):
    from transformers import AutoModelForCausalLM

    model.save_pretrained(tmp_path)
    calibrated.require_model(AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"outliers": 0.01}, "outliers was 0.04, is 0.01"),
        ({"sink_tokens": 1}, "sink_tokens was 2, is 1"),
        ({"profile": "repository"}, "ranges_include_sinks was False, is True"),
        ({"key_scale": "token"}, "key scale was 'static', is 'token'"),
        ({"key_scale": "channel"}, "key scale was 'static', is 'channel'"),
        ({"key_rope": "post"}, "key rope was 'pre', is 'post'"),
        ({"value_scale": "static"}, "value scale was 'token', is 'static'"),
        ({"block": 64}, "value .*was .*, is"),
    ],
    ids=str,
)
def test_settings_that_the_calibration_depends_on_are_refused(calibrated, model, settings, message):
    changed = KVQuant(**{**calibrated._given(), **settings})
    with pytest.raises(ValueError, match=rf"does not fit these settings: .*{message}.*calibrate again"):
        PackedCache(model, changed)


@pytest.mark.parametrize(
    "settings",
    [
        {"bits": 2},
        {"key_bits": 2, "value_bits": 4},
        {"datatype": "nf"},
        {"datatype": "int"},
        {"weights": "equal"},
        {"weights": "fisher"},
        {"q_norm": True},
    ],
    ids=str,
)
def test_settings_that_it_does_not_depend_on_are_accepted(calibrated, model, windows, settings):
    changed = KVQuant(**{**calibrated._given(), **settings})
    cache = PackedCache(model, changed, residual_length=0)
    with torch.no_grad():
        model(windows(1, 97)[:, :-1], past_key_values=cache)
        assert model(windows(1, 97)[:, -1:], past_key_values=cache).logits.isfinite().all()


def test_what_was_measured_without_gradients_cannot_be_weighted(model, windows):
    equal = KVQuant(weights="equal", block=32).calibrate(model, None, windows(2, 64), samples=2, heldout=0)
    with pytest.raises(ValueError, match="gradients was False, is True"):
        KVQuant(**{**equal._given(), "weights": None}).require_model(model)


def test_statistics_that_are_not_there_are_named(calibrated):
    with pytest.raises(ValueError, match="no key statistics of layer 7; calibrate again"):
        calibrated.calibration.of(7, "key")


def test_tables_are_fitted_once_for_each_layer_and_side(calibrated):
    fits: list[Any] = []

    class Counting(CalibratedStrategy):
        """Counts its fits."""

        name: ClassVar[str] = "counting"

        def formats(self, layer: LayerSpec) -> LayerFormat:
            return LayerFormat(key=Format(codes="codebook"), value=Format(codes="codebook"))

        def fit(self, layer: LayerSpec, side: Side, fmt: Format, statistics: Statistics) -> Tables:
            fits.append((layer.index, side))
            return fitted_tables(statistics, fmt, side, "nuq", "equal")

    from cachequant.core.hf.tiny import tiny_model

    model = tiny_model()
    ids = torch.randint(2, 97, (2, 300), generator=torch.Generator().manual_seed(0))
    strategy = Counting().calibrate(model, None, ids, samples=2, heldout=0)
    for _ in range(3):
        with torch.no_grad():
            model(ids, past_key_values=PackedCache(model, strategy))
    assert sorted(fits) == [(index, side) for index in (0, 1) for side in ("key", "value")]
