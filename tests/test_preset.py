"""A preset gives every layer and side to a strategy, survives its file, and refuses what it cannot hold."""

import copy
import json
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from cachequant import registry
from cachequant.core import Format, LayerFormat, LayerSpec, PackedCache, Strategy, contract
from cachequant.core.hf.tiny import tiny_model
from cachequant.registry import presets, specs
from cachequant.registry.hookspecs import hookimpl

MIXED: dict[str, Any] = {
    "default": {"key": "uniform:bits=4", "value": "uniform:bits=2"},
    "layers": {1: {"key": "kvquant:bits=3,calibration=prompt", "value": "none"}},
    "options": {"sink_tokens": 2},
}
LAYER = contract.LAYER
SECOND = LayerSpec(index=1, layers=2, kv_heads=2, head_dim=64, value_dim=64)


def preset(**settings: Any) -> Any:
    return registry.get("preset")(**settings)


def file_of(path: Path, **changes: Any) -> Path:
    content = {"cachequant_preset": 1, "default": "uniform:bits=4", **changes}
    path.write_text(json.dumps(content))
    return path


def tokens(length: int, batch: int = 2) -> torch.Tensor:
    return torch.randint(2, 97, (batch, length), generator=torch.Generator().manual_seed(5))


class Own(Strategy):
    """float8 bytes of its own, or four bits whose states are halved first."""

    name: ClassVar[str] = "own"

    scale: float = 1.0
    custom: bool = True

    def formats(self, layer: LayerSpec) -> LayerFormat:
        return LayerFormat(
            **{side: Format(codes="custom") if self.custom else Format() for side in ("key", "value")}, block=128
        )

    def encode(self, states, fmt, side, block, valid, tables):
        if not self.custom:
            return super().encode(states * self.scale, fmt, side, block, valid, tables)
        scaled = states.unflatten(2, (-1, block)) * self.scale
        return {"float8": scaled.to(torch.float8_e4m3fn).view(torch.uint8)}

    def decode(self, packed, fmt, side, block, tables):
        return packed["float8"].flatten(2, 3).view(torch.float8_e4m3fn).float() / self.scale


class Plugin:
    @hookimpl
    def cachequant_strategies(self):
        return [Own]


@pytest.fixture
def own():
    registry.register(Plugin(), "tests")
    yield
    registry.unregister("tests")


# --- the contract, in settings that the variants do not cover


@contract.parametrize_with_strategies(
    preset(**MIXED),
    preset(default={"key": "none", "value": "uniform:bits=3,block=32"}),
    preset(default="uniform:key_scale=channel,key_rope=pre", layers={0: "none"}),
    preset(default={"key": "kivi", "value": "turboquant:boundary_layers=0"}, rotation="value"),
)
def test_presets_keep_the_contract(strategy, check):
    check(strategy)


def test_bytes_of_a_strategys_own_making_keep_the_contract(own):
    mixed = preset(default={"key": "own", "value": "uniform"}, layers={1: "uniform:bits=8"})
    contract.check_strategy(mixed)


# --- who packs what


def test_each_layer_and_side_is_packed_by_the_strategy_that_is_named_for_it():
    mixed = preset(**MIXED)
    first, second = mixed.formats(LAYER), mixed.formats(SECOND)
    assert (first.key.bits, first.value.bits) == (4, 2)
    assert second.key == registry.parse("kvquant:bits=3,calibration=prompt").formats(SECOND).key
    assert second.value.codes == "exact"


def test_a_preset_of_one_strategy_computes_what_the_strategy_computes():
    model, ids = tiny_model(), tokens(300)
    logits = []
    for strategy in (
        registry.parse("kvquant:bits=3,calibration=prompt"),
        preset(default="none", layers=dict.fromkeys(range(2), "kvquant:bits=3,calibration=prompt")),
    ):
        cache = PackedCache(model, strategy, residual_length=16)
        with torch.no_grad():
            model(ids[:, :280], past_key_values=cache)
            logits.append(model(ids[:, 280:], past_key_values=cache).logits)
    assert torch.equal(*logits)


def test_the_other_layers_hold_the_bytes_of_their_own_strategies():
    model = tiny_model()
    held = {}
    for name, strategy in {
        "mixed": preset(default="uniform:bits=2", layers={1: "uniform:bits=8"}),
        "narrow": registry.parse("uniform:bits=2"),
        "wide": registry.parse("uniform:bits=8"),
    }.items():
        cache = PackedCache(model, strategy, residual_length=0)
        with torch.no_grad():
            model(tokens(256), past_key_values=cache)
        held[name] = [layer.used_bytes() for layer in cache.packed_layers]
    assert held["mixed"] == [held["narrow"][0], held["wide"][1]]


def test_a_layer_for_which_both_strategies_answer_none_stays_exact(own):
    class Shy(Own):
        name: ClassVar[str] = "shy"

        def formats(self, layer):
            return None

    assert preset(default=Shy()).formats(LAYER) is None


def test_an_exact_side_takes_the_block_of_the_other():
    assert preset(default={"key": "none:block=256", "value": "uniform:block=32"}).formats(LAYER).block == 32


def test_a_side_with_scales_of_a_block_gives_the_other_its_block():
    for key, value, block in (
        ("kivi", "uniform", 32),
        ("turboquant:boundary_layers=0", "kvquant:calibration=prompt,block=64", 64),
        ("uniform:block=32", "uniform:bits=2,block=64", 64),
    ):
        assert preset(default={"key": key, "value": value}).formats(LAYER).block == block


def test_blocks_of_two_sizes_in_one_layer_are_refused_with_both_names():
    mixed = preset(default={"key": "kivi", "value": "kvquant:calibration=prompt"})
    with pytest.raises(ValueError, match=r"layer 0: .*'kivi'.* 32 .*'kvquant:calibration=prompt'.* 128"):
        mixed.formats(LAYER)


def test_options_of_the_preset_win_and_else_most_is_kept_exact():
    sinks = "kvquant:calibration=prompt,sink_tokens={}"
    children = {"key": sinks.format(4), "value": sinks.format(1)}
    assert preset(default=children).cache_options() == {"sink_tokens": 4}
    assert preset(default=children, options={"sink_tokens": 0, "skip_layers": [-1]}).cache_options() == {
        "sink_tokens": 0,
        "skip_layers": (-1,),
    }
    cache = PackedCache(tiny_model(), preset(default=children, options={"residual_length": 7}))
    assert (cache.options.residual_length, cache.options.sink_tokens) == (7, 4)


# --- what it refuses


@pytest.mark.parametrize("spec", ["qaq", "h2o:keep=0.5", "scissorhands"])
def test_strategies_that_change_widths_are_refused_with_the_reason(spec):
    with pytest.raises(ValueError, match=r"layers\.1\.value.*widths of their own.*whole model"):
        preset(default="uniform", layers={1: {"key": "uniform", "value": spec}})


def test_a_preset_within_a_preset_is_refused():
    with pytest.raises(ValueError, match="a preset itself"):
        preset(default=preset(default="uniform"))


def test_a_preset_of_nothing_says_what_it_needs():
    with pytest.raises(ValueError, match="preset:FILE"):
        preset()


def test_two_strategies_with_bytes_of_their_own_on_one_side_are_refused(own):
    with pytest.raises(ValueError, match=r"'own:scale=2.0' and 'own'.*keys.*does not know its layer"):
        preset(default={"key": "own:scale=2", "value": "uniform"}, layers={1: "own"})


def test_an_encoder_of_its_own_for_shared_formats_is_not_confused_with_the_shared_one(own):
    mixed = preset(default="uniform", layers={1: "own:custom=false"})
    with pytest.raises(ValueError, match="cannot tell them"):
        PackedCache(tiny_model(), mixed)
    alone = preset(default="own:custom=false,scale=0.5")
    states = torch.randn(1, 2, 128, 64, generator=torch.Generator().manual_seed(0))
    formats = alone.formats(LAYER)
    got = alone.encode(states, formats.key, "key", 128, None, contract.Tables())
    expected = Own(custom=False, scale=0.5).encode(states, formats.key, "key", 128, None, contract.Tables())
    assert all(torch.equal(got[name], expected[name]) for name in expected)


def test_q_norm_over_the_shared_encoder_may_serve_some_layers():
    mixed = preset(default="uniform", layers={1: "qnorm:base=uniform,bits=2,calibration=prompt"})
    cache = PackedCache(tiny_model(), mixed)
    assert len(cache.packed_layers) == 2


def test_layers_beyond_the_model_are_refused(tmp_path):
    path = file_of(tmp_path / "big.json", layers={"5": "uniform"})
    with pytest.raises(ValueError, match=r"big\.json: layers\.5 .* layers 0 to 1"):
        PackedCache(tiny_model(), registry.parse(f"preset:{path}"))
    with pytest.raises(ValueError, match="layers 0 to 1"):
        preset(default="uniform", layers={2: "uniform"}).formats(LAYER)


def test_a_child_that_lacks_its_calibration_is_refused_when_the_cache_is_made():
    with pytest.raises(ValueError, match="cachequant calibrate kvquant"):
        PackedCache(tiny_model(), preset(default="uniform", layers={0: "kvquant"}))


def test_errors_of_children_name_the_layer():
    mixed = preset(default="uniform", layers={1: {"key": "uniform:group_size=48", "value": "uniform"}})
    with pytest.raises(ValueError, match=r"layer 1: .*48 channels does not divide"):
        mixed.formats(SECOND)


# --- names and files


def test_a_spec_names_the_file_with_or_without_the_field(tmp_path):
    path = tmp_path / "my preset, tuned.json"
    presets.write(path, preset(**MIXED), {"found": "by hand"})
    bare = file_of(tmp_path / "plain name.json")
    assert registry.parse(f"preset:{bare}") == registry.parse(f"preset:file={bare}")
    quoted = registry.parse(f'preset:"{path}"')
    assert quoted == registry.parse(f"preset:file='{path}'")
    assert quoted.describe() == preset(**MIXED).describe()
    assert registry.parse(registry.spec(quoted)) == quoted
    assert presets.read(path).evidence == {"found": "by hand"}


def test_the_home_directory_may_be_abbreviated(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    file_of(tmp_path / "mine.json", layers={"0": "uniform:bits=8"})
    assert registry.parse("preset:~/mine.json").formats(LAYER).key.bits == 8


def test_fields_beside_a_file_take_the_place_of_its_own_and_stay_in_the_spec(tmp_path):
    path = file_of(tmp_path / "p.json", layers={"1": "uniform:bits=8"}, options={"sink_tokens": 1})
    changed = registry.parse(f'preset:{path},options={{"residual_length":64}}')
    assert changed.cache_options() == {"residual_length": 64}
    assert changed.formats(SECOND).key.bits == 8
    assert registry.parse(registry.spec(changed)) == changed
    assert "layers" not in registry.spec(changed)


@pytest.mark.parametrize("settings", [MIXED, {"default": "uniform"}], ids=["mixed", "plain"])
def test_an_inline_preset_survives_its_spec(settings):
    mixed = preset(**settings)
    again = registry.parse(registry.spec(mixed))
    assert again == mixed and hash(again) == hash(mixed) and again.describe() == mixed.describe()


def test_settings_from_a_file_outlive_the_file(tmp_path):
    path = file_of(tmp_path / "p.json")
    loaded = registry.parse(f"preset:{path}")
    path.unlink()
    assert type(loaded).model_validate(loaded.model_dump()) == loaded == copy.deepcopy(loaded)
    assert str(path) not in json.dumps(loaded.describe())


def test_a_saved_cache_is_read_with_the_same_preset_under_another_name(tmp_path):
    model = tiny_model()
    cache = PackedCache(model, registry.parse(f"preset:{file_of(tmp_path / 'a.json')}"))
    with torch.no_grad():
        model(tokens(300), past_key_values=cache)
    cache.save(tmp_path / "cache.safetensors")
    same = registry.parse(f"preset:{file_of(tmp_path / 'b.json')}")
    PackedCache.load(tmp_path / "cache.safetensors", model, same)
    other = registry.parse(f"preset:{file_of(tmp_path / 'c.json', layers={'1': 'uniform:bits=8'})}")
    with pytest.raises(ValueError, match="another strategy"):
        PackedCache.load(tmp_path / "cache.safetensors", model, other)


DAMAGED = {
    "truncated": ('{"cachequant_preset": 1, "default"', "damaged"),
    "not text": (b"\xff\xfe\x00", "damaged"),
    "other JSON": ('{"model": "x"}', "no preset"),
    "a list": ("[1]", "no preset"),
    "another version": ('{"cachequant_preset": 2, "default": "uniform"}', "preset version 2.* version 1"),
    "no default": ('{"cachequant_preset": 1}', "default: Field required"),
    "unknown strategy": (
        '{"cachequant_preset": 1, "default": "uniform", "layers": {"3": {"key": "uniforn", "value": "none"}}}',
        r"layers\.3\.key: no strategy named 'uniforn'.*did you mean 'uniform'",
    ),
    "unknown field": ('{"cachequant_preset": 1, "default": "uniform:bit=4"}', r"default.*no field 'bit'"),
    "a refused value": ('{"cachequant_preset": 1, "default": "uniform:bits=5"}', r"default.*bits: .*2, 3, 4 or 8"),
    "one side": ('{"cachequant_preset": 1, "default": {"key": "uniform"}}', r"default\.value: Field required"),
    "a layer that is no number": ('{"cachequant_preset": 1, "default": "uniform", "layers": {"x": "none"}}', "x"),
    "a negative layer": ('{"cachequant_preset": 1, "default": "uniform", "layers": {"-1": "none"}}', "-1"),
    "a layer twice": (
        '{"cachequant_preset": 1, "default": "uniform", "layers": {"1": "none", "1": "uniform"}}',
        "'1' stands there twice",
    ),
    "an unknown entry": ('{"cachequant_preset": 1, "default": "uniform", "layer": {}}', "layer: "),
    "an unknown option": ('{"cachequant_preset": 1, "default": "uniform", "options": {"sinks": 1}}', r"options\.sinks"),
    "a missing calibration": (
        '{"cachequant_preset": 1, "default": "kvquant:calibration=./gone"}',
        "default.*no calibration folder",
    ),
}


@pytest.mark.parametrize(("content", "complaint"), DAMAGED.values(), ids=DAMAGED.keys())
def test_a_file_that_cannot_be_used_is_named_with_the_entry(content, complaint, tmp_path):
    path = tmp_path / "odd.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=rf"(?s)odd\.json.*{complaint}"):
        registry.parse(f"preset:{path}")


def test_a_missing_file_is_named():
    with pytest.raises(FileNotFoundError, match=r"nowhere\.json"):
        registry.parse("preset:nowhere.json")


def test_a_calibration_beside_the_file_is_found_wherever_both_lie(tmp_path):
    model, home = tiny_model(), tmp_path / "here"
    home.mkdir()
    calibrated = registry.get("kvquant")(bits=3).calibrate(model, None, tokens(256, 3), samples=3, heldout=0)
    mixed = preset(default="uniform", layers={1: calibrated})
    with pytest.raises(ValueError, match="never saved"):
        presets.write(home / "p.json", mixed, {})
    saved = mixed.with_each(lambda child: child.save_pretrained(home / "learned") if child.name == "kvquant" else child)
    presets.write(home / "p.json", saved, {})
    assert "calibration=./learned" in (home / "p.json").read_text()
    moved = home.rename(tmp_path / "there")
    loaded = registry.parse(f"preset:{moved / 'p.json'}")
    assert loaded.describe() == mixed.describe()
    PackedCache(model, loaded)


def test_an_interrupted_write_leaves_the_older_preset(tmp_path, monkeypatch):
    path = tmp_path / "p.json"
    presets.write(path, preset(default="uniform"), {})
    before = path.read_bytes()

    def full(*arguments: Any, **options: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="No space"):
        presets.write(path, preset(default="none"), {})
    assert path.read_bytes() == before
    assert [each.name for each in tmp_path.iterdir()] == ["p.json"]


# --- values without their field's name


def test_only_the_first_value_may_lack_its_name_and_only_where_the_strategy_says_so():
    assert specs.split("preset:a b.json,options={}", "file") == ("preset", {"file": "a b.json", "options": "{}"})
    with pytest.raises(ValueError, match="cannot read 'b'"):
        specs.split("preset:a.json,b", "file")
    with pytest.raises(ValueError, match="cannot read '4'"):
        registry.parse("uniform:4")
    with pytest.raises(ValueError, match="sets 'file' twice"):
        registry.parse("preset:a.json,file=b.json")
    with pytest.raises(ValueError, match="no field after the colon"):
        registry.parse("preset:")


# --- what may be searched


@pytest.mark.parametrize("cls", registry.strategies().values(), ids=lambda cls: cls.name)
def test_what_a_strategy_declares_searchable_it_accepts(cls):
    for field, values in cls.searchable.items():
        assert len(values) > 1 and len(set(map(repr, values))) == len(values)
        for value in values:
            built = cls(**{field: value})
            assert registry.parse(registry.spec(built)) == built


@pytest.mark.parametrize("name", ["uniform", "kvquant", "qnorm", "qaq", "h2o", "scissorhands"])
def test_the_strategies_with_settings_declare_some_searchable(name):
    assert registry.get(name).searchable  # type: ignore[attr-defined]


# --- rotation


def test_a_preset_rotates_sides_whose_strategies_do_not():
    made = registry.parse('preset:default={"key":"int8","value":"uniform:bits=2"},rotation={"sides":"both","size":16}')
    formats = made.formats(LAYER)
    assert [(each.rotation, each.rotation_size) for each in (formats.key, formats.value)] == [("hadamard", 16)] * 2
    assert registry.parse(registry.spec(made)) == made
    alone = registry.parse("preset:default=int8,rotation=key").formats(LAYER)
    assert (alone.key.rotation, alone.value.rotation) == ("hadamard", "none")
    # what a strategy rotates itself stays as it has it
    own = registry.parse("preset:default=rotated,rotation=both").formats(LAYER)
    assert (own.key.rotation_size, own.value.rotation_size) == (16, None)


def test_a_rotated_preset_packs_what_the_rotated_strategy_packs():
    model = tiny_model()
    ids = torch.randint(2, 97, (2, 300), generator=torch.Generator().manual_seed(0))
    logits = []
    for spec in ("preset:default=uniform,rotation=both", "uniform:rotation=hadamard", "uniform"):
        cache = PackedCache(model, registry.parse(spec), residual_length=16)
        with torch.no_grad():
            model(ids, past_key_values=cache)
            logits.append(model(ids[:, :1], past_key_values=cache).logits)
    assert torch.equal(logits[0], logits[1])
    assert not torch.equal(logits[0], logits[2])


@pytest.mark.parametrize("default", ["kivi", "kvquant:calibration=prompt", "fp8:scale=tensor"])
def test_rotation_of_what_belongs_to_channels_is_refused(default):
    made = registry.parse(f'preset:default={{"key":"{default}","value":"uniform"}},rotation=both')
    with pytest.raises(ValueError, match="layer 0: rotation mixes channels"):
        made.formats(LAYER)


@pytest.mark.parametrize("rotation", [{"size": 16}, {"sides": "both", "size": 3}])
def test_sizes_of_no_rotation_are_refused_as_they_are_given(rotation):
    with pytest.raises(ValueError, match="rotated together: a power of two, with sides"):
        preset(default="uniform", rotation=rotation)


class OwnValues(Own):
    """Bytes of its own for values, in every second layer."""

    name: ClassVar[str] = "own-values"

    def formats(self, layer: LayerSpec) -> LayerFormat | None:
        key = Format(codes="exact")
        return None if layer.index else LayerFormat(key=key, value=Format(codes="custom"), block=128)


def test_what_a_strategy_leaves_exact_is_not_given_to_its_encoder():
    model = tiny_model()
    for made in (OwnValues(), preset(default="uniform", layers={0: {"key": "none", "value": "int8"}})):
        cache = PackedCache(model, made, residual_length=0)
        with torch.no_grad():
            model(tokens(256), past_key_values=cache)
            assert model(tokens(3), past_key_values=cache).logits.isfinite().all()
    contract.check_strategy(OwnValues())


def test_rotation_survives_a_file(tmp_path):
    path = file_of(tmp_path / "turned.json", rotation="value")
    made = registry.parse(f"preset:{path}")
    assert made.rotation.sides == "value"
    assert made.describe()["rotation"] == "value"
    presets.write(tmp_path / "again.json", made, {})
    assert presets.read(tmp_path / "again.json").contents.rotation == made.rotation


# --- composition


BLOCKWISE = [
    "none", "uniform", "int8", "fp8", "fp8:scale=head", "kivi", "rotated", "turboquant:boundary_layers=0",
    "turboquant:key_bits=8,boundary_layers=0", "kvquant:calibration=prompt,block=32",
    "qnorm:base=\"uniform:block=32\",calibration=prompt",
]  # fmt: skip


@pytest.mark.parametrize("value", BLOCKWISE)
@pytest.mark.parametrize("key", BLOCKWISE)
def test_any_two_strategies_share_a_layer_beside_others_with_sinks_and_skipped_layers(key, value):
    """What a layer then holds is what its key strategy packs of keys, and its value strategy of values."""
    sides = json.dumps({"key": key, "value": value})
    options = {"sink_tokens": 2, "skip_layers": [1]}
    made = registry.parse(f"preset:default={sides},options={json.dumps(options)}")
    assert registry.parse(registry.spec(made)) == made
    model = tiny_model()
    cache = PackedCache(model, made, residual_length=16)
    with torch.no_grad():
        model(tokens(200), past_key_values=cache)
        assert model(tokens(3), past_key_values=cache).logits.isfinite().all()
    assert len(cache.packed_layers) == 1
    formats = cache.packed_layers[0].formats
    for side, spec in (("key", key), ("value", value)):
        assert getattr(formats, side) == getattr(registry.parse(spec).formats(LAYER), side)
