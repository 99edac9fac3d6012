"""Every snippet of the README, of CONTRIBUTING and of docs/ runs, or says why it does not.

Blocks of Python share one namespace per page, commands run in this process, JSON, TOML and YAML are parsed, and text is
left alone. A page prepares what its snippets need in an HTML comment, `<!-- invisible-code-block: python`; what cannot
run in a test says so in another, `<!-- skip: next "the reason" -->`. On command lines words in capitals stand for
what the page's namespace holds under that name; PATH, a small model, and FILE, a text, are given.
"""

import json
import re
import runpy
import shlex
import sys
import tomllib
from importlib.util import find_spec
from pathlib import Path
from unittest import SkipTest

import pytest
import torch
import yaml
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

from cachequant.benchmarks import corpus, reference
from cachequant.benchmarks.cli import app

ROOT = Path(find_spec("cachequant.core").origin).parents[1]
DOCS = ROOT / "docs"
if not DOCS.is_dir():
    pytest.skip("an installed wheel has no docs", allow_module_level=True)

from sybil import Document, Example  # noqa: E402
from sybil.parsers.markdown import CodeBlockParser, PythonCodeBlockParser, SkipParser  # noqa: E402

pytestmark = pytest.mark.slow

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.rglob("*.md"))]
SHOWN_ONLY = {"", "text"}
"""Languages of blocks that are shown and not run."""
FENCE = re.compile(r"^[ \t]*```(\w*)", re.MULTILINE)
SKIP = re.compile(r"^[ \t]*(<!--+\s*;?\s*skip.*)", re.MULTILINE)
REASON = re.compile(r'<!-- skip: (?:next|start) "[^"]{10,}" -->|<!-- skip: end -->')
STAND_IN = re.compile(r"\b[A-Z]{2,}\b")


@pytest.fixture(scope="module")
def stand_ins(tmp_path_factory):
    """What words in capitals stand for unless a page says otherwise: two random layers, and a text to read."""
    folder = tmp_path_factory.mktemp("documented")
    tokenizer = AutoTokenizer.from_pretrained(reference.FOLDER)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=64,
        max_position_embeddings=4096,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    (folder / "text.txt").write_text(corpus.stdlib_text("heldout").text[:200_000], encoding="utf-8")
    return {"PATH": folder / "model", "FILE": folder / "text.txt"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_every_snippet_of_a_page_runs(page, stand_ins, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    document = parsed(page)
    document.namespace.update(stand_ins)
    for example in document:
        try:
            example.evaluate()
        except SkipTest:
            continue
        except Exception as error:
            error.add_note(f"in the snippet at {page.relative_to(ROOT)}:{example.line}")
            raise


@pytest.mark.parametrize(
    "block",
    [
        '```python\nraise RuntimeError("wrong")\n```',
        "```bash\ncachequant bench --strategies no-such-strategy\n```",
        "```bash\npip install cachequant\n```",
        "```json\n{\n```",
        "```toml\nname =\n```",
        "```yaml\nname: [\n```",
        "```ruby\nputs 1\n```",
        "<!-- skip: next -->\n```bash\npip install cachequant\n```",
    ],
    ids=["python", "command", "foreign command", "json", "toml", "yaml", "foreign language", "no reason"],
)
def test_a_block_that_cannot_run_is_noticed(block, tmp_path):
    page = tmp_path / "page.md"
    page.write_text(f"A page\n\n{block}\n", encoding="utf-8")
    with pytest.raises((RuntimeError, AssertionError, ValueError, yaml.YAMLError)):
        for example in parsed(page):
            example.evaluate()


def parsed(page: Path) -> Document:
    """The snippets of a page, in their order.

    Raises ValueError for a block whose language nobody runs, and for one that is skipped without a reason.
    """
    text = page.read_text(encoding="utf-8")
    known = {"python", *RUN, *SHOWN_ONLY}
    if unknown := set(FENCE.findall(text)) - known:
        raise ValueError(f"{page}: nobody runs {sorted(unknown)}; use one of {sorted(known)}")
    if bare := [comment for comment in SKIP.findall(text) if not REASON.fullmatch(comment.strip())]:
        raise ValueError(f'{page}: {bare[0]!r} gives no reason; write <!-- skip: next "why it cannot run" -->')
    blocks = [CodeBlockParser(language, run) for language, run in RUN.items()]
    return Document.parse(str(page), PythonCodeBlockParser(), *blocks, SkipParser())


def run_commands(example: Example) -> None:
    for line in example.parsed.replace("\\\n", " ").splitlines():
        words = [with_stand_ins(word, example.namespace) for word in shlex.split(line, comments=True)]
        if words:
            run_command(words)


def with_stand_ins(word: str, namespace: dict[str, object]) -> str:
    return STAND_IN.sub(lambda found: str(namespace.get(found[0], found[0])), word)


def run_command(words: list[str]) -> None:
    if words[0] == "cachequant":
        done = CliRunner().invoke(app, words[1:], env={"COLUMNS": "160", "TERM": "dumb"})
        assert not done.exit_code, (
            f"{shlex.join(words)} ended with {done.exit_code}:\n{done.output}\n{done.exception!r}"
        )
    elif words[:2] == ["python", "-m"] and words[2].startswith("cachequant."):
        run_module(words[2], words[2:])
    else:
        raise AssertionError(f"{shlex.join(words)!r} is no command of cachequant: skip its block and say why")


def run_module(name: str, arguments: list[str]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", arguments)
        try:
            runpy.run_module(name, run_name="__main__", alter_sys=True)
        except SystemExit as ended:
            assert not ended.code, f"python -m {shlex.join(arguments)} ended with {ended.code}"


RUN = {
    "bash": run_commands,
    "json": lambda example: json.loads(example.parsed) and None,
    "toml": lambda example: tomllib.loads(example.parsed) and None,
    "yaml": lambda example: yaml.safe_load(example.parsed) and None,
}
