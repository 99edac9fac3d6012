"""Writes what kernels compile to with the installed Triton into `figures.json`, and prints it.

    python tests/kernels/ahead_of_time/record.py [part of a name ...]

An older Triton beside, `pip install --target DIR triton==3.6.0`, is recorded with `PYTHONPATH=DIR`.
"""

import json
import sys
from pathlib import Path

from machine_code import missing, release
from variants import CASES, VARIANTS, measure

FILE = Path(__file__).parent / "figures.json"


def record(parts: list[str]) -> None:
    measured = {}
    for name, target in CASES:
        if missing(target) is not None or not all(part in f"{name} {target}" for part in parts):
            continue
        code = measure(VARIANTS[name], target)
        figure = {
            "instructions": round(code.per(VARIANTS[name].elements), 3),
            "registers": code.registers,
            "stack": code.stack,
            "shared": code.shared,
        }
        measured[f"{name} {target}"] = figure
        print(f"{name:24} {target:7}", *(f"{key} {value:<7}" for key, value in figure.items()), flush=True)
    figures = json.loads(FILE.read_text()) if FILE.exists() else {}
    figures[release()] = figures.get(release(), {}) | measured
    cases = [f"{name} {target}" for name, target in CASES]
    ordered = {
        version: {case: figures[version][case] for case in cases if case in figures[version]}
        for version in sorted(figures)
    }
    FILE.write_text(json.dumps(ordered, indent=1) + "\n")


if __name__ == "__main__":
    record(sys.argv[1:])
