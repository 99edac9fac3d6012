"""What the tables of the documentation say is what the code says: fields, defaults, bytes, measured figures.

That every page can be found is checked here, too: MkDocs does not mind one that nothing leads to.
"""

import importlib.util
import re
from importlib.util import find_spec
from pathlib import Path

import pytest
from pydantic import BaseModel

from cachequant import registry
from cachequant.core import LayerSpec
from cachequant.registry import specs
from cachequant.registry.plugins import BUILTIN

ROOT = Path(find_spec("cachequant.core").origin).parents[1]
STRATEGIES = ROOT / "docs" / "strategies"
if not STRATEGIES.is_dir():
    pytest.skip("an installed wheel has no docs", allow_module_level=True)

# in the middle, where no strategy keeps layers exact
LAYER = LayerSpec(index=8, layers=16, kv_heads=8, head_dim=128, value_dim=128)
FIELDS = re.compile(r"^## Fields(?: of `([\w-]+)`)?\n(.*?)(?=^## )", re.MULTILINE | re.DOTALL)
FIELD = re.compile(r"^\| `(\w+)` \| ([^|]+) \|", re.MULTILINE)
SIZES = re.compile(r"^## Bytes\n(.*?)(?=^## |\Z)", re.MULTILINE | re.DOTALL)
SIZE = re.compile(r"^\| `([^`]+)` \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|$", re.MULTILINE)


def pages() -> list[Path]:
    return sorted(page for page in STRATEGIES.glob("*.md") if page.name != "README.md")


def field_tables() -> dict[str, dict[str, str]]:
    """Defaults by field, by strategy, as the pages have them."""
    return {
        name or page.stem: {field: default.strip() for field, default in FIELD.findall(section)}
        for page in pages()
        for name, section in FIELDS.findall(page.read_text(encoding="utf-8"))
    }


def sizes(page: Path) -> list[tuple[str, ...]]:
    """Spec, bytes of a key and of a value, and bits per number, as the page has them."""
    found = SIZES.search(page.read_text(encoding="utf-8"))
    return SIZE.findall(found[1]) if found else []


def written(default: object) -> str:
    """A default as a table shows it; of nested settings only those that are set."""
    if isinstance(default, BaseModel):
        default = default.model_dump(mode="json", exclude_defaults=True)
    return specs.write(default).strip('"')


def test_every_built_in_strategy_has_a_table_of_fields():
    assert set(field_tables()) == set(BUILTIN)


@pytest.mark.parametrize("name", BUILTIN)
def test_fields_and_defaults_are_those_of_the_code(name):
    fields = registry.describe(name).fields
    expected = {field.name: "required" if field.required else written(field.default) for field in fields}
    assert field_tables()[name] == expected


@pytest.mark.parametrize("page", pages(), ids=lambda page: page.stem)
def test_bytes_per_token_are_those_of_the_formats(page):
    for spec, *shown in sizes(page):
        formats = registry.parse(spec).formats(LAYER)
        key = formats.key.bytes_per_token("key", 128, formats.block, 2)
        value = formats.value.bytes_per_token("value", 128, formats.block, 2)
        assert shown == [f"{key:g}", f"{value:g}", f"{(key + value) / 32:.2f}"], spec


def test_most_strategies_have_a_table_of_bytes():
    """Else the check above would check nothing."""
    assert sum(bool(sizes(page)) for page in pages()) >= 7


@pytest.mark.parametrize("page", pages(), ids=lambda page: page.stem)
def test_every_strategy_page_says_when_it_fails(page):
    text = page.read_text(encoding="utf-8")
    assert "\n## Equations\n" in text or "\n## How bits are decided\n" in text
    assert re.search(r"^## Bytes|^Bytes of a row", text, re.MULTILINE)
    assert re.search(r"^## When it fails|^## When to use which|^\*\*When not to use it", text, re.MULTILINE)


def test_every_page_is_in_the_navigation():
    listed = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    missing = [page for page in (ROOT / "docs").rglob("*.md") if page.relative_to(ROOT).as_posix() not in listed]
    assert not missing


def figures():
    spec = importlib.util.spec_from_file_location("docs_figures", ROOT / "docs" / "figures.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_measured_figures_are_those_of_the_leaderboard():
    module = figures()
    rows, with_tables = module.measured(), 0
    for page in module.PAGES:
        text = page.read_text(encoding="utf-8")
        with_tables += "<!-- figures" in text
        assert module.with_figures(text, rows) == text, f"{page.name} is out of date: run `python docs/figures.py`"
        blocks = "".join(block[3] for block in module.BLOCK.finditer(text))
        assert "| ? |" not in blocks, f"{page.name} has a row that benchmarks/results/leaderboard.json lacks"
    assert with_tables >= 2


def test_a_changed_figure_is_noticed():
    module = figures()
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    figure = re.search(r"\*\*(0\.\d{4})\*\*", text)[0]
    changed = text.replace(figure, "**0.0000**")
    assert changed != text
    assert module.with_figures(changed, module.measured()) == module.with_figures(text, module.measured())
