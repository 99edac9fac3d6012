"""The examples run, on any model, and do what they claim."""

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from cachequant.benchmarks import reference

EXAMPLES = Path(find_spec("cachequant.core").origin).parents[1] / "examples"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not EXAMPLES.is_dir(), reason="an installed wheel has no examples"),
]


def run(script, *arguments, cwd, code=0, path=()):
    """What a script prints: the output of one that ends well, else the errors."""
    paths = [*map(str, path), *filter(None, [os.environ.get("PYTHONPATH")])]
    done = subprocess.run(
        [sys.executable, *map(str, script), *map(str, arguments)],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "COLUMNS": "200"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done.stderr if code else done.stdout


# ---- chat_under_budget.py


def chat(cwd, *arguments, code=0):
    return run([EXAMPLES / "chat_under_budget.py"], *arguments, cwd=cwd, code=code)


def held(output):
    """Bytes held after every answer, and what the stock cache would hold."""
    found = re.findall(r"--- ([\d,]+) bytes held, DynamicCache would hold ([\d,]+)", output)
    return [tuple(int(number.replace(",", "")) for number in each) for each in found]


def answers(output):
    return [part.partition("\n")[2].strip() for part in output.split("\n--- ")[1:]]


def test_chat_keeps_its_budget_with_the_first_strategy_that_fits(tmp_path):
    wide = chat(tmp_path, "--tokens", 700, "--answer", 4, "--budget", "5MB")
    assert "none, at most" in wide
    narrow = chat(tmp_path, "--tokens", 700, "--answer", 4, "--budget", "2.5MB")
    chosen, planned = re.search(r"of chat: (\S+), at most ([\d,]+) bytes", narrow).groups()
    assert chosen.startswith("uniform:")
    measured = held(narrow)
    assert len(measured) == 3
    for ours, stock in measured:
        assert ours <= int(planned.replace(",", "")) <= 2_500_000 < stock


def test_every_prompt_finds_the_document_as_the_first_did(tmp_path):
    settings = ("--tokens", 700, "--budget", "2MB", "--answer", 12)
    both = chat(tmp_path, *settings, "--prompt", "\n\ndef main(", "--prompt", "\n\nclass Error(")
    alone = chat(tmp_path, *settings, "--prompt", "\n\nclass Error(")
    assert answers(both)[1] == answers(alone)[0] != ""


def test_a_budget_that_nothing_keeps_is_told_with_what_would(tmp_path):
    told = chat(tmp_path, "--tokens", 700, "--budget", "100KB", code=1)
    assert re.search(r"error: \d+ tokens take [\d,]+ bytes with uniform:bits=2\S+, the smallest", told)
    assert "Traceback" not in told


# ---- compare_on_your_text.py


def test_comparison_reads_the_text_given_and_puts_the_best_first(tmp_path):
    text = tmp_path / "mine.txt"
    text.write_text("\n".join(f"The {number} th line of a text about {number * 7} things." for number in range(400)))
    output = run(
        [EXAMPLES / "compare_on_your_text.py"],
        *("--text", text, "--model", reference.FOLDER, "--windows", 1),
        *("--strategies", "uniform:bits=2", "uniform:bits=8", "DynamicCache", "uniform"),
        cwd=tmp_path,
    )
    assert "reference_model, 768 tokens of mine.txt" in output
    rows = re.findall(r"^(\S+) +([\d.]+) +([\d.e-]+) +([\d.]+)%$", output, re.M)
    assert [row[0] for row in rows] == ["DynamicCache", "uniform:bits=8", "uniform", "uniform:bits=2"]
    bits, divergences = ([float(row[column]) for row in rows] for column in (1, 2))
    assert bits == sorted(bits, reverse=True)
    assert divergences == sorted(divergences)
    assert divergences[0] == 0 < divergences[1]


def test_comparison_refuses_unknown_strategies_and_short_texts_in_a_line(tmp_path):
    script = [EXAMPLES / "compare_on_your_text.py"]
    told = run(script, "--windows", 1, "--strategies", "unifrom", cwd=tmp_path, code=1)
    assert "did you mean 'uniform'?" in told and "Traceback" not in told
    short = tmp_path / "short.txt"
    short.write_text("a few words")
    told = run(script, "--text", short, cwd=tmp_path, code=1)
    assert "tokens" in told and "Traceback" not in told


# ---- layer_sensitivity.py


def test_sensitivity_of_every_layer_and_side_becomes_a_picture(tmp_path):
    output = run([EXAMPLES / "layer_sensitivity.py"], "--windows", 1, "--out", "picture.png", cwd=tmp_path)
    rows = re.findall(r"^layer +(\d+), (keys|values) +KL ([\d.e-]+)$", output, re.M)
    assert {row[:2] for row in rows} == {(str(layer), side) for layer in range(6) for side in ("keys", "values")}
    losses = [float(row[2]) for row in rows]
    assert losses == sorted(losses, reverse=True)
    assert losses[0] > losses[-1] > 0
    from matplotlib.image import imread

    picture = imread(tmp_path / "picture.png")
    assert picture.shape[0] > 300 and picture.shape[1] > 500
    assert picture[..., :3].std() > 0.1


# ---- nf4/


def test_package_passes_its_own_tests(tmp_path):
    output = run(
        ["-m", "pytest", "-q", "-p", "no:cacheprovider", EXAMPLES / "nf4"], cwd=tmp_path, path=[EXAMPLES / "nf4"]
    )
    assert re.search(r"\d+ passed", output)
