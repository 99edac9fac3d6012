"""Ask several things about one long document, its cache within a memory budget.

    python examples/chat_under_budget.py --budget 4MB
    python examples/chat_under_budget.py --model PATH --document report.txt --prompt "Question: Who paid? Answer:"

What every strategy will hold is known before anything is read: the most accurate one that fits is taken. The document
is read once. Each prompt is answered behind it, and then the cache is cut back to the document.
"""

import argparse
from pathlib import Path

import torch

from cachequant import registry
from cachequant.benchmarks.errors import Unusable
from cachequant.benchmarks.plan.formula import Setting, device_bytes, formula
from cachequant.benchmarks.plan.shapes import shape_of
from cachequant.benchmarks.plan.sizes import parse_size
from cachequant.benchmarks.subjects import context_of, load_model, read_text
from cachequant.core import PackedCache

# from the most accurate to the smallest, as the leaderboard has them; none of these has to be calibrated
STRATEGIES = ("none", "uniform:bits=8", *(f"uniform:bits={bits},key_scale=channel,key_rope=pre" for bits in (4, 3, 2)))

# the bundled model has read Python and nothing else: it goes on writing
PROMPTS = ("\n\ndef main(", "\n\nclass Error(", "\n\nif __name__")

CHUNK = 256
"""Tokens of the document per forward pass: less memory beside the cache than all at once."""


def main() -> None:
    given = arguments()
    _, model, tokenizer = load_model(given.model, getattr(torch, given.dtype), given.device)
    prompts = [encoded(tokenizer, prompt) for prompt in given.prompt]
    longest = max(len(prompt) for prompt in prompts) + given.answer
    document = beginning(tokenizer, given.document, given.tokens or context_of(model) - longest)
    tokens = len(document) + longest

    spec, planned = choose(model, given.strategies, tokens, parse_size(given.budget))
    print(f"{len(document):,} tokens of document, at most {longest} of chat: {spec}, at most {planned:,} bytes\n")

    cache = PackedCache(model, registry.parse(spec))
    read(model, cache, document)
    for prompt in prompts:
        ids = torch.tensor([[*document, *prompt]], device=model.device)
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            past_key_values=cache,
            max_new_tokens=given.answer,
            do_sample=False,
            pad_token_id=tokenizer.eos_token_id,
        )
        held = cache.memory()
        print(f"--- {held.device_bytes:,} bytes held, DynamicCache would hold {held.exact_bytes:,}")
        print(tokenizer.decode(out[0, len(document) :], skip_special_tokens=True).strip(), "\n")
        cache.truncate(len(document))


def choose(model, specs: list[str], tokens: int, budget: int) -> tuple[str, int]:
    """The first strategy that stays within the budget whatever happens, and its bytes at most.

    Raises Unusable, naming what would fit.
    """
    shape = shape_of("the model", model.config, str(model.dtype).removeprefix("torch."))
    planned = {}
    for spec in specs:
        planned[spec] = device_bytes(formula(registry.parse(spec), shape, Setting()).held(tokens, "worst"))
        if planned[spec] <= budget:
            return spec, planned[spec]
    least = min(planned, key=lambda spec: planned[spec])
    raise Unusable(
        f"{tokens} tokens take {planned[least]:,} bytes with {least}, the smallest; {budget:,} are too few", ""
    )


@torch.inference_mode()
def read(model, cache: PackedCache, document: list[int]) -> None:
    """Fill the cache with the document."""
    for part in torch.tensor([document], device=model.device).split(CHUNK, dim=1):
        model(part, past_key_values=cache, logits_to_keep=1)


def beginning(tokenizer, document: Path | None, tokens: int) -> list[int]:
    """The first tokens of a text, of held-out standard library without one."""
    _, text = read_text(document, "heldout", "--document")
    start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    return [*start, *encoded(tokenizer, text)][:tokens]


def encoded(tokenizer, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False, verbose=False).input_ids


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget", default="4MB", help="memory of the cache, such as 800MiB (default: 4MB)")
    parser.add_argument("--model", help="folder or hub name (default: the bundled reference)")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--document", type=Path, help="UTF-8 text (default: Python's standard library)")
    parser.add_argument("--tokens", type=int, help="how many of the document (default: what the model takes)")
    parser.add_argument("--prompt", action="append", help="repeat for several")
    parser.add_argument("--answer", type=int, default=40, help="tokens of an answer (default: 40)")
    parser.add_argument("--strategies", nargs="+", default=STRATEGIES, help="specs, the most accurate first")
    given = parser.parse_args()
    given.prompt = given.prompt or PROMPTS
    return given


if __name__ == "__main__":
    try:
        main()
    except (LookupError, ValueError) as error:
        raise SystemExit(f"error: {error}") from None
