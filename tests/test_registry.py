"""Strategies are found by name, read from and written to one line of text, and come in through one door."""

import importlib.metadata
import json
import types
import warnings
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import pytest
from pydantic import Field, ValidationError, model_validator
from typer.testing import CliRunner

from cachequant import registry
from cachequant.benchmarks.cli import app
from cachequant.benchmarks.contenders import candidates
from cachequant.core import CacheQuantizer, Format, LayerFormat, LayerSpec, Strategy
from cachequant.core.protocol import CONTRACT_VERSION
from cachequant.registry import plugins, tasks
from cachequant.registry.hookspecs import hookimpl


class Sample(Strategy):
    """One field of every kind.

    Not part of the summary.
    """

    name: ClassVar[str] = "sample"

    bits: Literal[2, 4] = Field(4, description="Bits per code.")
    share: float = Field(0.01, gt=0, lt=1, description="Share of exact values.")
    window: int | None = Field(5, ge=0, multiple_of=1)
    label: str = "plain"
    note: str | None = None
    mode: Literal["none", "fast"] = "fast"
    layers: list[int] = Field(default_factory=list, max_length=3)
    exact: bool = False

    def formats(self, layer: LayerSpec) -> LayerFormat:
        return LayerFormat(key=Format(bits=self.bits), value=Format())


class Needy(Strategy):
    name: ClassVar[str] = "needy"

    bits: int

    def formats(self, layer: LayerSpec) -> LayerFormat:
        return LayerFormat(key=Format(), value=Format())


class Plain(Strategy):
    """No settings."""

    name: ClassVar[str] = "plain"

    def formats(self, layer: LayerSpec) -> None: ...


@dataclass(frozen=True)
class Duck:
    """Satisfies the protocol without deriving from anything of ours."""

    name: ClassVar[str] = "duck"

    bits: int = 4
    wings: int | None = None

    def require_model(self, model): ...

    def cache_options(self): ...

    def formats(self, layer): ...

    def tables(self, layer, side, first, valid): ...

    def encode(self, states, fmt, side, block, valid, tables): ...

    def decode(self, packed, fmt, side, block, tables): ...


class Short(Strategy):
    """Two names for its settings."""

    name: ClassVar[str] = "short"
    aliases: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "short_4bit": {"key_bits": 4, "value_bits": 4},
        "short-k8v4": {"key_bits": 8, "value_bits": 4},
    }

    key_bits: Literal[2, 4, 8] = 4
    value_bits: Literal[2, 4, 8] = 2
    boundary: int = 2

    @model_validator(mode="after")
    def _values_are_not_wider(self):
        if self.value_bits > self.key_bits:
            raise ValueError("values cannot be wider than keys")
        return self

    def formats(self, layer: LayerSpec) -> LayerFormat:
        return LayerFormat(key=Format(bits=self.key_bits), value=Format(bits=self.value_bits))


def plugin_of(*strategies: Any) -> Any:
    class Plugin:
        @hookimpl
        def cachequant_strategies(self):
            return list(strategies)

    return Plugin()


@contextmanager
def registered(*strategies: Any, name: str = "tests"):
    registry.register(plugin_of(*strategies), name)
    try:
        yield
    finally:
        registry.unregister(name)


class FakeEntryPoint:
    """What importlib.metadata yields, as far as the registry reads it."""

    def __init__(self, name: str, plugin: Any, dist: str | None = None) -> None:
        self.name = name
        self.value = f"{name}_module"
        self.dist = types.SimpleNamespace(name=dist) if dist else None
        self.plugin = plugin

    def load(self) -> Any:
        if isinstance(self.plugin, BaseException):
            raise self.plugin
        return self.plugin() if isinstance(self.plugin, types.FunctionType) else self.plugin


@pytest.fixture
def installed(monkeypatch):
    """Call it with entry points to see the registry of a process in which they are installed."""

    def install(*entries: FakeEntryPoint) -> None:
        def entry_points(group: str) -> list[FakeEntryPoint]:
            assert group == "cachequant"
            return list(entries)

        monkeypatch.setattr(importlib.metadata, "entry_points", entry_points)
        monkeypatch.setattr(registry, "_plugins", plugins.Plugins())
        monkeypatch.setattr(tasks, "plugins", plugins.Plugins(plugins.TASK))

    return install


def every_variant():
    return [
        pytest.param(strategy(**settings), id=f"{name}-{'-'.join(map(str, settings.values()))}")
        for name, strategy in registry.strategies().items()
        for settings in getattr(strategy, "variants", ({},))
    ]


# --- lookup


def test_documented_usage_works():
    strategy = registry.get("uniform")(bits=4, group_size=64)
    assert strategy.bits == 4
    assert strategy.group_size == 64
    assert isinstance(strategy, CacheQuantizer)


def test_names_are_sorted_and_hold_the_builtin_strategies():
    assert registry.names() == sorted(registry.names())
    assert {"none", "uniform"} <= set(registry.names())


def test_strategies_are_classes_keyed_by_their_own_name():
    for name, strategy in registry.strategies().items():
        assert strategy.name == name
        assert registry.get(name) is strategy


def test_every_builtin_module_offers_a_strategy():
    offering = {offer.plugin for offer in registry._plugins.offers()}
    assert {f"cachequant:{word}" for word in plugins.BUILTIN} <= offering


def test_unknown_name_lists_what_is_installed_and_the_closest():
    with pytest.raises(registry.UnknownStrategy, match=r"no strategy named 'unifrm'; installed: .*\bnone\b") as caught:
        registry.get("unifrm")
    assert str(caught.value).endswith("did you mean 'uniform'?")
    assert isinstance(caught.value, LookupError)


def test_unknown_name_far_from_all_others_gets_no_guess():
    with pytest.raises(registry.UnknownStrategy) as caught:
        registry.get("zzzz")
    assert "did you mean" not in str(caught.value)


def test_spec_given_to_get_is_pointed_to_parse():
    with pytest.raises(registry.UnknownStrategy, match=r"registry\.parse\('uniform:bits=4'\)"):
        registry.get("uniform:bits=4")


def test_wrong_value_names_the_field():
    with pytest.raises(ValidationError, match=r"bits\n.*Input should be 2, 3, 4 or 8"):
        registry.get("uniform")(bits=5)


def test_misspelt_field_is_named():
    with pytest.raises(ValidationError, match=r"bitz\n.*Extra inputs are not permitted"):
        registry.get("uniform")(bitz=4)


# --- plugins


def test_registered_plugin_is_found_until_unregistered():
    with registered(Sample):
        assert registry.get("sample") is Sample
        assert "sample" in registry.names()
    assert "sample" not in registry.names()


def test_strategy_needs_no_base_class_of_ours():
    with registered(Duck):
        assert registry.parse("duck:bits=2,wings=none") == Duck(bits=2)
        assert registry.spec(Duck(bits=2)) == "duck:bits=2"
        assert [field.name for field in registry.describe("duck").fields] == ["bits", "wings"]
        with pytest.raises(ValueError, match=r"no field 'bit'.*it takes bits, wings; did you mean 'bits'"):
            registry.parse("duck:bit=2")


def test_plugin_name_is_taken_once():
    with registered(Sample), pytest.raises(ValueError, match="'tests' is registered already; unregister it first"):
        registry.register(plugin_of(Needy), "tests")


def test_unregistering_an_unknown_plugin_lists_the_known():
    with pytest.raises(LookupError, match=r"no plugin named 'nobody'; installed: .*cachequant:uniform"):
        registry.unregister("nobody")


def test_a_name_that_two_plugins_claim_is_refused_and_both_are_named():
    with registered(Sample, name="first"), registered(Sample, name="second"):
        for look in (registry.get, registry.describe, registry.parse):
            with pytest.raises(registry.DuplicateStrategy, match=r"'first'.*'second'.*'sample'; uninstall one or"):
                look("sample")
    assert issubclass(registry.DuplicateStrategy, ValueError)


def test_all_other_names_go_on_working_while_two_plugins_claim_one():
    before = registry.names()
    with registered(Sample, Plain, name="first"), registered(Sample, name="second"):
        assert registry.get("uniform").__name__ == "Uniform"
        message = r"skipped plugins that collide: .*'first'.*'second'.*'sample'; uninstall one"
        for look in (registry.names, registry.strategies):
            with pytest.warns(RuntimeWarning, match=message) as caught:
                assert set(look()) == {*before, "plain"}
            assert len(caught) == 1


def test_builtin_name_cannot_be_taken_over():
    class Impostor(Sample):
        name: ClassVar[str] = "uniform"

    with pytest.raises(registry.DuplicateStrategy, match=r"'cachequant:uniform'.*'tests'.*; rename that of 'tests'"):
        registry.register(plugin_of(Impostor), "tests")
    assert registry.get("uniform").__name__ == "Uniform"


class Nameless(Strategy):
    def formats(self, layer): ...


class Shouting(Sample):
    name: ClassVar[str] = "Very_Loud"


class Formless(Strategy):
    name: ClassVar[str] = "formless"


class BareProtocol(CacheQuantizer):
    name: ClassVar[str] = "bare"


@pytest.mark.parametrize(
    ("offered", "complaint"),
    [
        pytest.param(Nameless, "it has no name; write `name: ClassVar", id="no-name"),
        pytest.param(Shouting, "its name is 'Very_Loud'; use lower-case words", id="bad-name"),
        pytest.param(Formless, r"it does not define formats\(", id="no-formats"),
        pytest.param(BareProtocol, r"formats\(.*; .*tables\(.*; .*encode\(.*; .*decode\(", id="protocol-stubs"),
        pytest.param(int, r"does not define formats\(.*it has no name", id="no-strategy-at-all"),
        pytest.param(Sample(), "return the class itself", id="instance"),
    ],
)
def test_class_that_is_no_strategy_is_refused_with_what_it_lacks(offered, complaint):
    before = registry.names()
    with pytest.raises(TypeError, match=rf"plugin 'tests' offers .*{complaint}"):
        registry.register(plugin_of(offered), "tests")
    assert registry.names() == before
    with registered(Sample):
        assert registry.get("sample") is Sample, "the refused plugin's name is free again"


@pytest.mark.parametrize("plugin", [types.SimpleNamespace(), Sample], ids=["empty", "strategy-class"])
def test_plugin_without_hook_is_told_how_to_write_one(plugin):
    with pytest.raises(TypeError, match="'tests' implements no hook; give it a function `cachequant_strategies`"):
        registry.register(plugin, "tests")


def test_hook_must_return_a_list():
    plugin = types.SimpleNamespace(cachequant_strategies=hookimpl(lambda: Sample))
    with pytest.raises(TypeError, match="of plugin 'tests' must return a list, got"):
        registry.register(plugin, "tests")


# --- entry points


def test_installed_plugin_is_discovered(installed):
    installed(FakeEntryPoint("sample", plugin_of(Sample), dist="cachequant-sample"))
    assert registry.get("sample") is Sample
    assert registry.describe("sample").plugin == "cachequant-sample:sample"


def test_broken_plugin_is_skipped_with_a_warning_that_names_it(installed):
    installed(
        FakeEntryPoint("broken", ImportError("no module named 'fp8_lib'"), dist="broken-dist"),
        FakeEntryPoint("sample", plugin_of(Sample)),
    )
    with pytest.warns(RuntimeWarning, match=r"'broken-dist:broken' \(broken_module\): ImportError.*fp8_lib") as caught:
        assert {"none", "sample", "uniform"} <= set(registry.names())
    assert len(caught) == 1
    assert "broken" not in registry.names()


def test_installed_plugin_with_an_unusable_class_is_skipped_with_a_warning(installed):
    installed(FakeEntryPoint("formless", plugin_of(Formless)), FakeEntryPoint("sample", plugin_of(Sample)))
    with pytest.warns(RuntimeWarning, match="plugin 'formless' offers .* does not define formats"):
        assert "sample" in registry.names()
    assert "formless" not in registry.names()


def test_installed_plugins_that_share_a_strategy_name_raise_on_lookup(installed):
    installed(FakeEntryPoint("a", plugin_of(Sample)), FakeEntryPoint("b", plugin_of(Sample)))
    with pytest.raises(registry.DuplicateStrategy, match=r"'a'.*'b'"):
        registry.get("sample")


def test_installed_plugin_that_takes_a_builtin_name_is_skipped_with_a_warning(installed):
    class Impostor(Sample):
        name: ClassVar[str] = "uniform"

    installed(
        FakeEntryPoint("fake", plugin_of(Impostor), dist="impostors"), FakeEntryPoint("sample", plugin_of(Sample))
    )
    message = r"skipped plugin 'impostors:fake' \(fake_module\): .*named 'uniform'; rename that of 'impostors:fake'$"
    with pytest.warns(RuntimeWarning, match=message) as caught:
        assert "sample" in registry.names()
    assert len(caught) == 1
    assert registry.get("uniform").__name__ == "Uniform"


def test_installed_plugin_that_takes_a_builtin_alias_is_skipped_with_a_warning(installed):
    alias = next(alias for cls in registry.strategies().values() for alias in getattr(cls, "aliases", {}))

    class Impostor(Short):
        aliases: ClassVar[Mapping[str, Mapping[str, Any]]] = {alias: {"key_bits": 8}}

    installed(FakeEntryPoint("fake", plugin_of(Impostor)))
    with pytest.warns(RuntimeWarning, match=rf"skipped plugin 'fake' .* both offer a strategy named '{alias}'; rename"):
        assert "short" not in registry.names()
    assert registry.spec(registry.parse(alias)).partition(":")[0] != "short"


def test_plugin_that_ends_the_process_on_import_is_skipped_with_a_warning(installed):
    installed(FakeEntryPoint("quitter", SystemExit(2)), FakeEntryPoint("sample", plugin_of(Sample)))
    with pytest.warns(RuntimeWarning, match=r"skipped plugin 'quitter' \(quitter_module\): SystemExit\(2\); repair or"):
        assert "sample" in registry.names()


def of_contract(version: Any) -> type[Strategy]:
    class Dated(Sample):
        name: ClassVar[str] = "dated"
        contract: ClassVar[Any] = version

    return Dated


@pytest.mark.parametrize(
    ("version", "told"),
    [
        (
            CONTRACT_VERSION + 1,
            f"written for contract {CONTRACT_VERSION + 1}; this cachequant has contract {CONTRACT_VERSION}: "
            "upgrade cachequant$",
        ),
        (
            CONTRACT_VERSION - 1,
            f"written for contract {CONTRACT_VERSION - 1}; this cachequant has contract {CONTRACT_VERSION}: "
            "upgrade the plugin; its author runs .*check_strategy, and writes .* when it passes$",
        ),
        (
            str(CONTRACT_VERSION),
            f"with contract = '{CONTRACT_VERSION}', which has to be a whole number, .*; repair or uninstall it$",
        ),
    ],
    ids=["newer", "older", "text"],
)
def test_plugin_for_another_contract_is_skipped_and_told_what_to_do(version, told, installed):
    dated = of_contract(version)
    installed(FakeEntryPoint("dated", plugin_of(dated), dist="other"), FakeEntryPoint("sample", plugin_of(Sample)))
    with pytest.warns(RuntimeWarning, match=f"skipped plugin 'other:dated' .*{told}"):
        assert "dated" not in registry.names()
    assert registry.get("sample") is Sample


def test_plugin_for_another_contract_cannot_be_registered():
    message = rf"plugin 'tests' offers 'dated', written for contract {CONTRACT_VERSION + 1}"
    with pytest.raises(TypeError, match=message):
        registry.register(plugin_of(of_contract(CONTRACT_VERSION + 1)), "tests")
    assert "dated" not in registry.names()


@pytest.mark.parametrize("version", [None, CONTRACT_VERSION])
def test_plugin_for_this_contract_is_registered(version):
    with registered(of_contract(version)):
        assert "dated" in registry.names()


def test_list_tells_of_skipped_plugins_once_and_below_all_else(installed):
    installed(
        FakeEntryPoint("broken", ImportError("no module named 'fp8_lib'"), dist="broken-dist"),
        FakeEntryPoint("a", plugin_of(Sample, Plain)),
        FakeEntryPoint("b", plugin_of(Sample)),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = CliRunner().invoke(app, ["list"])
    assert result.exit_code == 0
    assert "plain" in result.stdout and "uniform" in result.stdout and "warning" not in result.stdout
    first, second = result.stderr.splitlines()
    assert first.startswith("warning: skipped plugin 'broken-dist:broken' (broken_module): ImportError(")
    assert second.startswith("warning: skipped plugins that collide: plugin 'a' ")


def test_plugin_may_build_on_a_strategy_it_looks_up(installed):
    def load():
        base: Any = registry.get("uniform")
        return plugin_of(type("Derived", (base,), {"__module__": __name__, "name": "derived"}))

    installed(FakeEntryPoint("derived", load))
    assert registry.parse("derived:bits=2").bits == 2


def test_discovery_happens_once_and_only_when_asked(installed):
    loads = []

    def load():
        loads.append(1)
        return plugin_of(Sample)

    installed(FakeEntryPoint("sample", load))
    assert not loads
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: registry.get("sample"), range(32)))
    assert loads == [1]
    assert found == [Sample] * 32


def test_interrupted_discovery_is_started_over(installed):
    interruptions = [KeyboardInterrupt()]

    def load():
        if interruptions:
            raise interruptions.pop()
        return plugin_of(Sample)

    installed(FakeEntryPoint("sample", load))
    with pytest.raises(KeyboardInterrupt):
        registry.names()
    assert "sample" in registry.names()


# --- aliases


@pytest.mark.parametrize("alias", ["short_4bit", "short-k8v4"])
def test_an_alias_builds_the_strategy_with_its_settings(alias):
    with registered(Short):
        assert registry.get(alias)() == registry.parse(alias) == Short(**Short.aliases[alias])


def test_settings_of_an_alias_can_be_overridden():
    with registered(Short):
        expected = Short(key_bits=8, value_bits=2, boundary=0)
        assert registry.get("short-k8v4")(boundary=0, value_bits=2) == expected
        assert registry.parse("short-k8v4:boundary=0,value_bits=2") == expected


def test_specs_and_lists_of_names_know_no_aliases():
    with registered(Short):
        assert registry.spec(registry.parse("short-k8v4")) == "short:key_bits=8,value_bits=4"
        assert "short" in registry.names()
        assert not set(Short.aliases) & set(registry.names())


def test_an_alias_is_described_with_its_settings_in_place():
    with registered(Short):
        plain, short = registry.describe("short"), registry.describe("short-k8v4")
    assert (plain.name, plain.stands_for) == ("short", "short")
    assert plain.aliases == {"short_4bit": "short:value_bits=4", "short-k8v4": "short:key_bits=8,value_bits=4"}
    assert (short.name, short.stands_for) == ("short-k8v4", "short:key_bits=8,value_bits=4")
    assert [field.default for field in plain.fields] == [4, 2, 2]
    assert [field.default for field in short.fields] == [8, 4, 2]


def test_an_alias_may_fill_a_required_field():
    class Sated(Needy):
        name: ClassVar[str] = "sated"
        aliases: ClassVar[Mapping[str, Mapping[str, Any]]] = {"sated4": {"bits": 4}}

    with registered(Sated):
        (field,) = registry.describe("sated4").fields
        assert (field.required, field.default) == (False, 4)
        assert registry.describe("sated").fields[0].required
        assert registry.parse("sated4").bits == 4


def test_a_misspelt_alias_is_guessed():
    with (
        registered(Short),
        pytest.raises(registry.UnknownStrategy, match=r"; aliases: .*short-k8v4.*did you mean 'short-k8v4'"),
    ):
        registry.parse("short-k8v5")


def test_list_shows_what_aliases_stand_for():
    with registered(Short):
        lines = CliRunner().invoke(app, ["list"]).stdout.splitlines()
    assert "  short-k8v4 is short:key_bits=8,value_bits=4" in lines


@pytest.mark.parametrize(
    ("aliases", "complaint"),
    [
        ({"Short": {}}, "'Short' is no alias; use lower-case words joined by hyphens or underscores"),
        ({"short:k8": {}}, "'short:k8' is no alias"),
        (
            {"s8": {"bits": 8}},
            "'s8' stands for {'bits': 8}, which does not build: bits: Extra inputs are not permitted$",
        ),
        (
            {"s2": {"key_bits": 2, "value_bits": 4}},
            "'s2' stands for .*: Value error, values cannot be wider than keys$",
        ),
        ({"s2": None}, "'s2' stands for None, which does not build"),
        ({"faulty": {"key_bits": 8}}, "'faulty' is its name; leave it out"),
        (["s2"], r"they are \['s2'\]; write a mapping"),
    ],
    ids=["upper case", "colon", "unknown field", "refused", "no settings", "its name", "no mapping"],
)
def test_an_alias_that_does_not_work_is_refused_when_its_plugin_is_registered(aliases, complaint):
    given = aliases

    class Faulty(Short):
        name: ClassVar[str] = "faulty"
        aliases: ClassVar[Any] = given

    with pytest.raises(TypeError, match=rf"plugin 'tests' offers 'faulty' with aliases: {complaint}"):
        registry.register(plugin_of(Faulty), "tests")
    assert "faulty" not in registry.names()


def test_aliases_of_a_base_are_not_those_of_what_derives_from_it():
    class Derived(Short):
        name: ClassVar[str] = "derived"

    with registered(Short, Derived):
        assert registry.describe("derived").aliases == {}
        assert type(registry.parse("short_4bit")) is Short


def test_an_alias_cannot_be_a_builtin_name():
    class Impostor(Short):
        aliases: ClassVar[Mapping[str, Mapping[str, Any]]] = {"uniform": {"key_bits": 8}}

    with pytest.raises(
        registry.DuplicateStrategy, match=r"both offer a strategy named 'uniform'; rename that of 'tests'"
    ):
        registry.register(plugin_of(Impostor), "tests")


def test_an_alias_that_is_anothers_name_is_a_dispute():
    class Other(Sample):
        name: ClassVar[str] = "short-k8v4"

    with registered(Short, name="first"), registered(Other, name="second"):
        with pytest.raises(registry.DuplicateStrategy, match=r"'first'.*'second'.*named 'short-k8v4'"):
            registry.get("short-k8v4")
        with pytest.warns(RuntimeWarning, match="skipped plugins that collide"):
            assert "short-k8v4" not in registry.names()
        assert registry.parse("short_4bit").value_bits == 4


class Shortened(Short):
    """An alias of its own, and one that is another's, too."""

    name: ClassVar[str] = "shortened"
    aliases: ClassVar[Mapping[str, Mapping[str, Any]]] = {"short_4bit": {"value_bits": 4}, "shortest": {"key_bits": 2}}


def test_an_alias_that_two_plugins_claim_is_dropped_and_warned_of():
    with registered(Short, name="first"), registered(Shortened, name="second"):
        message = (
            r"skipped plugin aliases that collide: .*'first'.*'second'.*'short_4bit'; uninstall one or rename its a"
        )
        with pytest.warns(RuntimeWarning, match=message) as caught:
            assert {"short", "shortened"} <= set(registry.names())
        assert len(caught) == 1
        with pytest.raises(registry.DuplicateStrategy, match=r"'first'.*'second'.*'short_4bit'; .* rename its alias"):
            registry.get("short_4bit")
        assert list(registry.describe("short").aliases) == ["short-k8v4"]
        assert list(registry.describe("shortened").aliases) == ["shortest"]
        result = CliRunner().invoke(app, ["list"])
        assert "short_4bit" not in result.stdout and "shortest is" in result.stdout
        assert result.stderr.startswith("warning: skipped plugin aliases that collide: ")
    with registered(Short):
        assert "short_4bit" in registry.describe("short").aliases


def test_names_and_aliases_in_dispute_are_not_listed_as_installed():
    with (
        registered(Short, Sample, name="first"),
        registered(Shortened, Sample, name="second"),
        pytest.raises(registry.UnknownStrategy) as caught,
    ):
        registry.get("sampled")
    assert "short-k8v4" in str(caught.value) and "shortened" in str(caught.value)
    assert not any(name in str(caught.value) for name in ("sample,", "'sample'", "short_4bit"))


def test_aliases_compete_in_benchmarks_as_what_they_stand_for():
    with registered(Short):
        (found,) = candidates(["short-k8v4:boundary=0"])
        assert (found.spec, found.family) == ("short:key_bits=8,value_bits=4,boundary=0", "short")
        assert found.build() == Short(key_bits=8, value_bits=4, boundary=0)


def test_bench_measures_an_alias(tmp_path):
    arguments = ["--strategies", "short-k8v4", "--tasks", "perplexity:windows=1,length=320"]
    with registered(Short):
        result = CliRunner().invoke(app, ["bench", *arguments, "--no-twin", "--no-baselines", "--out", str(tmp_path)])
    assert result.exit_code == 0, result.output
    (row,) = json.loads((tmp_path / "leaderboard.json").read_text())["results"]
    assert (row["cell"]["strategy"], row["error"]) == ("short:key_bits=8,value_bits=4", None)


# --- describe


def test_description_holds_what_a_user_needs_to_choose_settings():
    with registered(Sample):
        described = registry.describe("sample")
    assert described.name == "sample"
    assert described.summary == "One field of every kind."
    assert described.plugin == "tests"
    assert described.module == __name__
    fields = {field.name: field for field in described.fields}
    assert list(fields) == ["bits", "share", "window", "label", "note", "mode", "layers", "exact"]
    assert (fields["bits"].type, fields["bits"].allowed, fields["bits"].default) == ("2 | 4", (2, 4), 4)
    assert fields["bits"].description == "Bits per code."
    assert fields["share"].constraints == ("> 0", "< 1")
    assert (fields["window"].type, fields["window"].constraints) == ("int | None", (">= 0", "multiple of 1"))
    assert (fields["note"].type, fields["note"].allowed, fields["note"].required) == ("str | None", (), False)
    assert (fields["layers"].type, fields["layers"].default) == ("list[int]", [])
    assert fields["layers"].constraints == ("length <= 3",)


def test_optional_choice_allows_none():
    fields = {field.name: field for field in registry.describe("uniform").fields}
    assert fields["key_bits"].allowed == (2, 3, 4, 8, None)


def test_required_field_is_marked():
    with registered(Needy):
        (field,) = registry.describe("needy").fields
    assert field.required


def test_missing_docstring_is_an_empty_summary():
    with registered(Needy):
        assert registry.describe("needy").summary == ""


@pytest.mark.parametrize("name", registry.names())
def test_every_strategy_describes_itself_and_every_field(name):
    described = registry.describe(name)
    assert described.summary
    assert all(field.description for field in described.fields), "a field without description"
    assert described.model_dump_json()


def test_description_is_frozen():
    with pytest.raises(ValidationError, match="frozen"):
        registry.describe("none").name = "other"


# --- specs


def test_spec_without_settings_is_the_name():
    assert registry.spec(registry.get("uniform")()) == "uniform"
    assert registry.parse("uniform") == registry.get("uniform")()


def test_spec_holds_only_what_differs_from_the_defaults():
    strategy = registry.parse("uniform:bits=4,group_size=64")
    assert strategy == registry.get("uniform")(bits=4, group_size=64)
    assert registry.spec(strategy) == "uniform:group_size=64"


@pytest.mark.parametrize("strategy", every_variant())
def test_every_variant_survives_the_round_trip(strategy):
    assert registry.parse(registry.spec(strategy)) == strategy


@pytest.mark.parametrize(
    ("text", "settings"),
    [
        ("sample", {}),
        (" sample : bits = 2 , share = 0.5 ", {"bits": 2, "share": 0.5}),
        ("sample:share=1e-3", {"share": 0.001}),
        ("sample:share=.25", {"share": 0.25}),
        ("sample:exact=true", {"exact": True}),
        ("sample:exact=True", {"exact": True}),
        ("sample:exact=false", {"exact": False}),
        ("sample:window=none", {"window": None}),
        ("sample:window=null", {"window": None}),
        ("sample:window=None,note=x", {"window": None, "note": "x"}),
        ("sample:mode=none", {"mode": "none"}),
        ("sample:label=null", {"label": "null"}),
        ('sample:note="none"', {"note": "none"}),
        ("sample:label=two words", {"label": "two words"}),
        ('sample:label="a,b=c",bits=2', {"label": "a,b=c", "bits": 2}),
        ("sample:label='a,b=c',bits=2", {"label": "a,b=c", "bits": 2}),
        ("sample:label='it says \"4\"'", {"label": 'it says "4"'}),
        ('sample:label="4"', {"label": "4"}),
        ('sample:label=""', {"label": ""}),
        ("sample:label=./a/b.safetensors", {"label": "./a/b.safetensors"}),
        ("sample:label=C:x=y", {"label": "C:x=y"}),
        ("sample:layers=[0, 1],bits=2", {"layers": [0, 1], "bits": 2}),
        ("sample:layers=[]", {"layers": []}),
    ],
)
def test_spec_means(text, settings):
    with registered(Sample):
        assert registry.parse(text) == Sample(**settings)


@pytest.mark.parametrize(
    "settings",
    [
        {"label": text}
        for text in ("none", "null", "None", "true", "NaN", "-Infinity", "4", "", "a,b", "a'b", "'", 'a"b', "[1]")
    ]
    + [{"label": text} for text in ("two words", " padded ", "naïve", "line\nbreak", "./a-b_c.d/e~f", "x=y:z", "\\")]
    + [{"share": 1e-17}, {"share": 0.1 + 0.2}, {"window": None}, {"note": "none"}, {"layers": [3, 1, 2]}]
    + [{"mode": "none", "exact": True, "bits": 2, "note": "x", "label": "y"}],
    ids=str,
)
def test_any_settings_survive_the_round_trip(settings):
    strategy = Sample(**settings)
    with registered(Sample):
        assert registry.parse(registry.spec(strategy)) == strategy


def test_required_fields_are_always_written():
    assert registry.spec(Needy(bits=4)) == "needy:bits=4"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "'' names no strategy; write name or name:field=value"),
        (":bits=4", "':bits=4' names no strategy"),
        ("sample:", "has no field after the colon"),
        ("sample:bits", "cannot read 'bits' in 'sample:bits'; write field=value"),
        ("sample:bits,exact=true", "cannot read 'bits,exact=true' in .*; write field=value, separated by commas"),
        ("sample:=4", "cannot read '=4'"),
        ("sample:,bits=4", "cannot read ',bits=4'"),
        ("sample:bits=", "gives 'bits' no value"),
        ("sample:bits=,exact=true", "gives 'bits' no value"),
        ("sample:bits=4,", "ends in a comma"),
        ("sample:bits=4,bits=2", "sets 'bits' twice"),
        ("sample:layers=[1,2", "cannot read layers=\\[1,2 .* as JSON: .*close every quote and bracket"),
        ("sample:layers=[a]", "put strings inside brackets in double quotes"),
        ('sample:label="a', "as JSON: Unterminated string"),
        ('sample:label="a" b', "cannot read 'b' after label=\"a\""),
        ("sample:bitz=4", "no field 'bitz' .*it takes bits, share, .*exact; did you mean 'bits'?"),
        ("sample:zzz=4", "no field 'zzz' .*it takes bits, share, .*exact$"),
        ("plain:bits=4", "strategy 'plain' has no field 'bits' .*it takes no fields"),
        ("sample:bits=5", "bits\n.*Input should be 2 or 4"),
        ("sample:share=2", "share\n.*less than 1"),
    ],
)
def test_malformed_spec_says_what_came_and_what_to_do(text, message):
    with registered(Sample, Plain), pytest.raises(ValueError, match=message):
        registry.parse(text)


def test_unknown_strategy_in_a_spec_is_a_lookup_error():
    with pytest.raises(registry.UnknownStrategy, match="did you mean 'uniform'"):
        registry.parse("unifrom:bits=4")
