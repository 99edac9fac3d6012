"""Write the model card of the reference model from its training log.

    python -m cachequant.benchmarks.training.card

With `--measure`, the model is measured first, which takes minutes, and the figures are entered into the log.
"""

import argparse
import json
import textwrap
from pathlib import Path
from typing import Any

import torch

from .. import reference
from ..corpus import HELDOUT_MODULES, HELDOUT_TOPICS
from ..passkey import DEPTHS, KEY_DIGITS
from .figures import (
    GROUP,
    KEY_SAMPLES,
    KEY_SEED,
    LOSS_LENGTHS,
    LOSS_TOKENS,
    ROUNDED_KEY_LENGTH,
    ROUNDED_KEY_SAMPLES,
    ROUNDED_LENGTH,
    ROUNDED_WINDOWS,
    measure,
)
from .optimizer import ADAM_RATE, FLAT_UNTIL, MUON_RATE

LOG, CARD = "training_log.json", "README.md"
WIDTH = 120

TEMPLATE = """\
# The reference model

A Llama-type model of {millions} million parameters that every benchmark of this project can load offline:
small enough for two CPU cores, trained to retrieve from its whole context, sensitive to how its KV cache is stored.
It is a measuring instrument and writes no useful text.

```python
from cachequant.benchmarks import reference

model, tokenizer = reference.load()
twin, tokenizer = reference.load(twin=True)  # same function, key outliers like a large model's
```

## Architecture

| | |
|---|---|
| type | `{architecture}`, tied embeddings, {parameters} parameters, {dtype} safetensors |
| layers, width, feed-forward | {layers}, {width}, {feed_forward} |
| heads | {query_heads} query, {key_heads} key-value, head_dim {head_dim} |
| positions | RoPE, base {rope_base}, context {context} |
| tokenizer | byte-level BPE, {vocabulary} entries, every digit on its own, `<s>` before every sequence |

**The outlier twin** (`reference.outlier_twin`) is made from it on request: two pairs of key channels per head are
scaled by 6 to 18 before RoPE and the queries by the inverse. Its logits are the same, its keys have the few large
channels that large models have and small ones lack.

## Data

Trained only on text that a Python installation carries (`benchmarks/corpus.py`): the help topics
(`pydoc_data.topics`) and the sources of the standard library with their docstrings, without tests, demos and encoding
tables. {heldout_share} are held out by name ({heldout_modules} modules, {heldout_topics} topics), so they are unseen
on whichever Python version measures.

| part | Python | documents | characters | tokens | SHA-256 |
|---|---|---|---|---|---|
{data}

Of the held-out characters, 0.2 % are in paragraphs that the training part has as well, by the held-out texts of Python
3.11, 3.12 and 3.13 alike.

Licences: the text is under the Python Software Foundation License Version 2, the weights are under this project's
licence, Apache-2.0.

## Training

{steps} steps, {tokens} million tokens, {spent} minutes in {processes} of one thread each ({machine}); seed {seed};
torch {torch}, transformers {transformers}. Muon on the matrices ({muon_rate}), AdamW on the rest ({adam_rate}),
both flat for {flat} of the time and then linear to zero; bfloat16 autocast. Next to plain text, the sequences are tiled
random tokens, text with copied spans, and pass keys; their shares and the growing lengths are `STAGES` in
`benchmarks/training/curriculum.py`. In half of these, positions have gaps while sequences are short: after training on
256 tokens alone, pass keys were found across 1024.

{notes}| minutes | step | tokens | length | training loss | held-out loss | pass key at this length |
|---|---|---|---|---|---|---|
{curve}

Training loss is a running mean over the mixed sequences and falls when copying is learned; held-out loss is in nats
per token over 16 windows of 512. All numbers are in `training_log.json`.

To train again and measure (the schedule follows the clock: a rerun is alike, not identical):

```
python -m cachequant.benchmarks.training.train --minutes {minutes} --seed {seed} --threads {threads} --out a/folder
```

## What it can do

Perplexity on held-out text: {perplexity} in windows of {loss_lengths} tokens ({loss_windows} evenly spaced
windows, so not quite the same text).

Pass keys of {key_digits} digits repeated exactly, greedy decoding through the exact cache, prompt and answer filling
the length (seed {key_seed}; {key_samples} samples):

| length | all | {depths} |
|{rules}|
{passkey}

## What it tells apart

A simulation, not a strategy of this project: keys (after RoPE) and values of every token are rounded to 2^bits levels
between the extremes of each group of {group} channels, asymmetric, in float32, no token kept exact.
{rounded_windows} held-out windows of {rounded_length} tokens; KL divergence from the exact cache in nats per token;
top-1 is agreement with it; pass key at {rounded_key_length} over {rounded_key_samples} samples, seed {key_seed}.

| model | cache | perplexity | KL | top-1 | pass key |
|---|---|---|---|---|---|
{rounded}

`python -m cachequant.benchmarks.training.card --measure` repeats the last two sections; without `--measure` it writes
this card from `training_log.json`.

## Limits

- It knows the standard library's English and Python, and little of both.
- Its pass keys were trained in the very wording they are measured in: they test the cache, not the model's wits.
- Without the twin it has no key outliers: a result on the plain model alone flatters per-token quantization.
"""


def update(folder: Path, threads: int) -> None:
    """Measure the model in `folder` on `threads` threads, add the figures to its log and write its card."""
    torch.set_num_threads(threads)
    log = read_log(folder) | {"measured": measure(folder)}
    (folder / LOG).write_text(json.dumps(log, indent=1) + "\n")
    print(json.dumps(log["measured"], indent=1))
    write(folder)


def write(folder: Path) -> None:
    """Write the card of the model in `folder` from its log and its configuration."""
    text = card(read_log(folder), json.loads((folder / "config.json").read_text()))
    (folder / CARD).write_text(text, encoding="utf-8")


def read_log(folder: Path) -> dict[str, Any]:
    """Return the training log of the model in `folder`.

    Raises:
        FileNotFoundError: there is none.
    """
    if not (folder / LOG).is_file():
        raise FileNotFoundError(
            f"no {LOG} in {folder}; pass the folder of a model that "
            "`python -m cachequant.benchmarks.training.train` has trained"
        )
    return json.loads((folder / LOG).read_text())


def card(log: dict[str, Any], config: dict[str, Any]) -> str:
    """Return the model card that a training log and the model's config.json make up.

    `log["notes"]`, if present, is a list of paragraphs about this one training, written by hand.

    Raises:
        ValueError: the log holds no measurements or no training.
    """
    if missing := [key for key in ("curve", "measured") if not log.get(key)]:
        raise ValueError(
            f"the log has no {' and no '.join(missing)}; finish the training with "
            "`python -m cachequant.benchmarks.training.train --resume`, "
            "or measure with `python -m cachequant.benchmarks.training.card --measure`"
        )
    return TEMPLATE.format(**_architecture(log, config), **_training(log), **_measurements(log["measured"]))


def _architecture(log: dict[str, Any], config: dict[str, Any]) -> dict[str, Any]:
    return {
        "millions": f"{log['parameters'] / 1e6:.2f}",
        "parameters": f"{log['parameters']:,}",
        "architecture": config["architectures"][0],
        "dtype": config["dtype"],
        "layers": config["num_hidden_layers"],
        "width": config["hidden_size"],
        "feed_forward": config["intermediate_size"],
        "query_heads": config["num_attention_heads"],
        "key_heads": config["num_key_value_heads"],
        "head_dim": config["head_dim"],
        "rope_base": f"{config['rope_parameters']['rope_theta']:,.0f}",
        "context": config["max_position_embeddings"],
        "vocabulary": config["vocab_size"],
    }


def _training(log: dict[str, Any]) -> dict[str, Any]:
    measured, last = log["measured"], log["curve"][-1]
    heldout, trained = measured["heldout_characters"], log["train_characters"]
    return {
        "heldout_share": _percent(heldout / (heldout + trained)),
        "heldout_modules": len(HELDOUT_MODULES),
        "heldout_topics": len(HELDOUT_TOPICS),
        "data": "\n".join((_part("train", log, "train"), _part("held out", measured, "heldout"))),
        "steps": f"{last['step']:,}",
        "tokens": f"{last['tokens'] / 1e6:.1f}",
        "spent": f"{last['minutes']:.0f}",
        "processes": "one process" if log["threads"] == 1 else f"{log['threads']} processes",
        "machine": log["machine"],
        "seed": log["seed"],
        "torch": log["torch"].partition("+")[0],
        "transformers": log["transformers"],
        "muon_rate": MUON_RATE,
        "adam_rate": ADAM_RATE,
        "flat": _percent(FLAT_UNTIL),
        "notes": "".join(textwrap.fill(note, WIDTH) + "\n\n" for note in log.get("notes", [])),
        "curve": "\n".join(_curve_row(point) for point in log["curve"]),
        "minutes": f"{log['minutes']:g}",
        "threads": log["threads"],
    }


def _part(title: str, figures: dict[str, Any], part: str) -> str:
    files, characters, tokens = (figures[f"{part}_{name}"] for name in ("files", "characters", "tokens"))
    return _row(title, figures["python"], files, f"{characters:,}", f"{tokens:,}", f"`{figures[f'{part}_sha256']}`")


def _curve_row(point: dict[str, Any]) -> str:
    return _row(
        f"{point['minutes']:.0f}",
        f"{point['step']:,}",
        f"{point['tokens'] / 1e6:.2f} M",
        point["length"],
        f"{point['train_loss']:.2f}",
        f"{point['heldout_loss']:.2f}",
        _percent(point["passkey"]),
    )


def _measurements(measured: dict[str, Any]) -> dict[str, Any]:
    passkey = [
        _row(length, _percent(shares["all"]), *(_percent(shares[str(depth)]) for depth in DEPTHS))
        for length, shares in measured["passkey"].items()
    ]
    return {
        "perplexity": " / ".join(f"{value:.4g}" for value in measured["perplexity"].values()),
        "loss_lengths": " / ".join(str(length) for length in LOSS_LENGTHS),
        "loss_windows": " / ".join(str(LOSS_TOKENS // length) for length in LOSS_LENGTHS),
        "key_digits": KEY_DIGITS,
        "key_seed": KEY_SEED,
        "key_samples": " / ".join(str(samples) for samples in KEY_SAMPLES.values()),
        "depths": " | ".join(f"depth {depth:g}" if depth == DEPTHS[0] else f"{depth:g}" for depth in DEPTHS),
        "rules": "|".join(["---"] * (2 + len(DEPTHS))),
        "passkey": "\n".join(passkey),
        "group": GROUP,
        "rounded_windows": ROUNDED_WINDOWS,
        "rounded_length": ROUNDED_LENGTH,
        "rounded_key_length": ROUNDED_KEY_LENGTH,
        "rounded_key_samples": ROUNDED_KEY_SAMPLES,
        "rounded": "\n".join(row for name in ("plain", "twin") for row in _rounded_rows(name, measured)),
    }


def _rounded_rows(name: str, measured: dict[str, Any]) -> list[str]:
    rows = []
    for cache, figures in measured[f"sensitivity_{name}"].items():
        # logged with four significant digits
        perplexity = f"{figures['perplexity']:.4g}"
        if cache == "exact":
            rows.append(f"| {name} | exact | {perplexity} | | | |")
            continue
        found = _percent(measured[f"passkey_{name}"][cache])
        rows.append(_row(name, cache, perplexity, f"{figures['kl']:.2g}", _percent(figures["top1"], 1), found))
    return rows


def _row(*cells: Any) -> str:
    return f"| {' | '.join(str(cell) for cell in cells)} |"


def _percent(share: float, decimals: int = 0) -> str:
    return f"{100 * share:.{decimals}f} %"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=reference.FOLDER, help="model folder")
    parser.add_argument("--measure", action="store_true", help="measure the model first")
    parser.add_argument("--threads", type=int, default=2, help="used to measure")
    options = parser.parse_args()
    if options.measure:
        update(options.folder, options.threads)
    else:
        write(options.folder)


if __name__ == "__main__":
    main()
