"""`cachequant new` writes a package that installs, is listed, passes the contract and generates; or nothing at all."""

import importlib.util
import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from cachequant import registry
from cachequant.benchmarks.cli import app
from cachequant.benchmarks.errors import Unusable
from cachequant.benchmarks.scaffold.package import TEMPLATE, write_package
from cachequant.core import PackedCache, detach
from cachequant.core.hf.tiny import tiny_model
from cachequant.core.protocol import CONTRACT_VERSION

FILES = {"README.md", "pyproject.toml", "two_bits_or_more.py", "tests/test_contract.py"}


@pytest.fixture
def package(tmp_path):
    folder = tmp_path / "two-bits-or-more"
    write_package("two-bits-or-more", folder)
    return folder


def files_of(folder):
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def invoke(*arguments):
    return CliRunner().invoke(app, ["new", *map(str, arguments)], env={"COLUMNS": "300"})


def module_of(package):
    specification = importlib.util.spec_from_file_location("two_bits_or_more", package / "two_bits_or_more.py")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def run(*command, package):
    """Standard output of a command in the package, installed as far as `importlib.metadata` can tell."""
    metadata = package / "two_bits_or_more-0.1.0.dist-info"
    metadata.mkdir(exist_ok=True)
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: two-bits-or-more\nVersion: 0.1.0\n")
    points = tomllib.loads((package / "pyproject.toml").read_text())["project"]["entry-points"]["cachequant"]
    lines = [f"{name} = {module}" for name, module in points.items()]
    (metadata / "entry_points.txt").write_text("\n".join(["[cachequant]", *lines, ""]))
    paths = [str(package), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "COLUMNS": "200"}
    done = subprocess.run(command, cwd=package, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


# ---- what is written


def test_package_has_a_strategy_a_test_and_an_entry_point(package):
    assert files_of(package) == FILES
    project = tomllib.loads((package / "pyproject.toml").read_text())
    assert project["project"]["name"] == "two-bits-or-more"
    assert project["project"]["dependencies"] == ["cachequant"]
    assert project["project"]["entry-points"]["cachequant"] == {"two-bits-or-more": "two_bits_or_more"}
    assert "pytest>=8" in project["project"]["optional-dependencies"]["test"]
    assert project["tool"]["setuptools"]["py-modules"] == ["two_bits_or_more"]


def test_strategy_is_read_in_forty_lines(package):
    assert len((package / "two_bits_or_more.py").read_text().splitlines()) <= 40


def test_strategy_is_written_for_the_contract_that_is_installed(package):
    assert module_of(package).TwoBitsOrMore.contract == CONTRACT_VERSION


def test_no_name_of_the_template_is_left(package):
    for path in files_of(package):
        text = (package / path).read_text()
        assert not [name for name in ("my-strategy", "my_strategy", "MyStrategy", "AUTHOR") if name in text]


def test_template_holds_no_file_that_nobody_writes(package):
    assert len(list(TEMPLATE.iterdir())) == len(FILES)


def test_author_is_told_only_if_there_is_one(tmp_path):
    write_package("alone", tmp_path / "alone")
    write_package("signed", tmp_path / "signed", author='Zoë "Z" O\\Hara')
    alone, signed = (
        tomllib.loads((tmp_path / name / "pyproject.toml").read_text(encoding="utf-8")) for name in ("alone", "signed")
    )
    assert "authors" not in alone["project"]
    assert signed["project"]["authors"] == [{"name": 'Zoë "Z" O\\Hara'}]


def test_strategy_generates_in_fewer_bytes(package):
    module = module_of(package)
    registry.register(module, "test:two-bits-or-more")
    model = tiny_model()
    try:
        strategy = registry.parse("two-bits-or-more:value_bits=3,group_size=16")
        cache = PackedCache(model, strategy, residual_length=0)
        ids = torch.randint(1, model.config.vocab_size, (1, 300), generator=torch.Generator().manual_seed(0))
        out = model.generate(ids, attention_mask=torch.ones_like(ids), past_key_values=cache, max_new_tokens=3)
        assert out.shape[1] == 303
        report = cache.memory()
        assert report.rows["value codes"] < report.rows["key codes"]
        assert report.ratio > 2
    finally:
        registry.unregister("test:two-bits-or-more")
        detach(model)


def test_ruff_finds_nothing_to_change(package):
    ruff = shutil.which("ruff") or shutil.which("ruff", path=str(Path(sys.executable).parent))
    if ruff is None:
        pytest.skip("ruff is not installed")
    for command in (("check", "--select", "E,F,I,UP,B,SIM,RUF"), ("format", "--check")):
        done = subprocess.run([ruff, *command, "--no-cache", str(package)], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout


@pytest.mark.slow
def test_it_is_listed_and_passes_its_own_tests(package):
    listed = run(sys.executable, "-m", "cachequant.benchmarks.cli", "list", package=package)
    assert "two-bits-or-more (from two-bits-or-more:two-bits-or-more)" in listed
    told = run(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", package=package)
    assert " passed" in told
    broken = (package / "two_bits_or_more.py").read_text().replace("bits=self.value_bits, ", "codes='custom', ")
    assert "codes='custom'" in broken
    (package / "two_bits_or_more.py").write_text(broken)
    with pytest.raises(AssertionError, match="failed"):
        run(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", package=package)


# ---- the command


def test_command_says_what_to_do_next(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = invoke("two-bits-or-more")
    assert result.exit_code == 0, result.output
    assert [line.strip() for line in result.output.splitlines()[1:]] == [
        "pip install -e 'two-bits-or-more[test]'",
        "pytest two-bits-or-more",
        'cachequant bench --strategies "two-bits-or-more;uniform"',
    ]
    assert files_of(tmp_path / "two-bits-or-more") == FILES


def test_an_empty_folder_is_filled_even_if_one_is_in_it(tmp_path, monkeypatch):
    empty = tmp_path / "empty"
    empty.mkdir()
    monkeypatch.chdir(empty)
    result = invoke("two-bits-or-more", "--out", ".")
    assert result.exit_code == 0, result.output
    assert files_of(Path.cwd()) == FILES
    assert os.listdir(tmp_path) == ["empty"]


# ---- what is refused


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("MyStrategy", "use lower-case words joined by hyphens"),
        ("my_strategy", "use lower-case words joined by hyphens"),
        ("my--strategy", "use lower-case words joined by hyphens"),
        ("../escape", "use lower-case words joined by hyphens"),
        ("4bit", "the first beginning with a letter"),
        ("uniform", "a strategy named 'uniform' is installed already (plugin 'cachequant:uniform')"),
        ("none", "a strategy named 'none' is installed already"),
        ("class", "a module 'class', which is a keyword of Python; choose another name, such as class-cache"),
        ("true", "a class 'True', which is a keyword of Python"),
        ("json", "a module 'json', and there is one already"),
        ("torch", "a module 'torch', and there is one already"),
        ("tests", "a module 'tests', which stands for something else"),
        ("conftest", "a module 'conftest', which stands for something else"),
        ("setup", "a module 'setup', which stands for something else"),
        ("test-contract", "a module 'test_contract', which stands for something else"),
        ("test-mine", "in a folder with tests; choose another name, such as mine-cache"),
        ("field", "a class 'Field', which its file has to import from elsewhere"),
        ("layer-format", "a class 'LayerFormat', which its file has to import from elsewhere"),
        ("huggingface-hub", "there is one already"),
    ],
)
def test_names_that_cannot_be_had_are_refused_with_a_reason(name, reason, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = invoke(name)
    assert result.exit_code == 2
    assert reason in " ".join(result.output.split())
    assert not list(tmp_path.iterdir())


def test_name_of_a_distribution_is_refused_even_if_no_module_is_called_so(tmp_path):
    # pip would replace one by the other
    with pytest.raises(Unusable, match="a distribution 'pyyaml', and one is installed already"):
        write_package("pyyaml", tmp_path / "pyyaml")


def test_name_of_a_strategy_of_a_third_party_is_refused(package, tmp_path):
    registry.register(module_of(package), "test:two-bits-or-more")
    try:
        with pytest.raises(Unusable, match=r"plugin 'test:two-bits-or-more'\); choose another name"):
            write_package("two-bits-or-more", tmp_path / "again")
    finally:
        registry.unregister("test:two-bits-or-more")


@pytest.mark.parametrize("author", ["", "  ", "two\nlines"])
def test_authors_without_a_name_are_refused(author, tmp_path):
    with pytest.raises(Unusable, match="--author") as caught:
        write_package("mine", tmp_path / "mine", author=author)
    assert caught.value.option == "--author"
    assert not list(tmp_path.iterdir())


def test_a_folder_with_anything_in_it_is_left_alone(package):
    (package / "pyproject.toml").write_text("mine")
    result = invoke("another-one", "--out", package)
    assert result.exit_code == 2
    assert "is not empty; choose another folder with --out" in result.output
    assert (package / "pyproject.toml").read_text() == "mine"


def test_a_file_and_a_folder_that_is_not_there_are_refused(tmp_path):
    (tmp_path / "file").write_text("")
    for out, reason in (
        ("file", "is a file"),
        ("file/inside", "there is no folder"),
        ("no/where", "there is no folder"),
    ):
        with pytest.raises(Unusable, match=reason) as caught:
            write_package("mine", tmp_path / out)
        assert caught.value.option == "--out"
    assert files_of(tmp_path) == {"file"}


def test_nothing_half_written_is_left(tmp_path, monkeypatch):
    write = Path.write_text

    def failing(path, *arguments, **options):
        if path.name == "test_contract.py":
            raise OSError(28, "No space left on device")
        return write(path, *arguments, **options)

    monkeypatch.setattr(Path, "write_text", failing)
    with pytest.raises(Unusable, match="No space left on device"):
        write_package("mine", tmp_path / "mine")
    assert not list(tmp_path.iterdir())
