"""Train the bundled reference model on the standard library's text, on an ordinary CPU.

Plain text alone teaches a model of this size no retrieval, so that no retrieval test could tell one cache from
another. Part of the sequences therefore repeat random tokens, copy spans of text, or ask for a pass key. Positions of
these are stretched while sequences are short: a full context's distances are met before full contexts are paid for.

    python -m cachequant.benchmarks.train_reference --minutes 54 --threads 2 --out some/folder
"""

import argparse
import copy
import functools
import json
import math
import os
import platform
import random
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Cache,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)
from transformers.cache_utils import DynamicLayer

from .corpus import stdlib_text
from .passkey import ANSWER_TOKENS, filler_ids, passkey_accuracy, passkey_prompt
from .reference import outlier_twin

VOCABULARY = 4096
CONTEXT = 2048
BOS, EOS = "<s>", "</s>"

MUON_RATE, ADAM_RATE = 0.02, 4e-3
WEIGHT_DECAY = 0.03
WARMUP_STEPS, MOMENTUM_STEPS = 40, 200
FLAT_UNTIL = 0.45
ANSWER_WEIGHT = 0.04  # times the length, so that an answer counts alike in short and long sequences
STRETCHED = 0.5

EVAL_MINUTES = 4.0
MEASURED_BITS = (8, 4, 3, 2)


@dataclass(frozen=True)
class Stage:
    """What a training step is made of until `until`, as a share of the training time."""

    until: float
    length: int
    batch: int  # sequences per process
    tiled: float  # shares of the sequences; plain text is the rest
    copied: float
    passkey: float
    max_period: int


# Retrieval first and on short sequences, where it is cheap to learn; text and full contexts later.
STAGES = (
    Stage(0.172, 256, 12, tiled=0.45, copied=0.15, passkey=0.10, max_period=48),
    Stage(0.222, 256, 12, tiled=0.20, copied=0.15, passkey=0.10, max_period=128),
    Stage(0.371, 256, 12, tiled=0.50, copied=0.15, passkey=0.10, max_period=24),
    Stage(0.443, 256, 12, tiled=0.12, copied=0.15, passkey=0.12, max_period=128),
    Stage(0.581, 512, 8, tiled=0.10, copied=0.15, passkey=0.12, max_period=256),
    Stage(0.668, 1024, 4, tiled=0.08, copied=0.15, passkey=0.15, max_period=512),
    Stage(1.000, 2048, 2, tiled=0.04, copied=0.12, passkey=0.22, max_period=1024),
)


def stage_at(progress: float) -> Stage:
    return next(stage for stage in STAGES if progress < stage.until or stage is STAGES[-1])


def rate_at(progress: float, step: int) -> float:
    """Learning-rate factor: a short warm-up, flat, then linear to zero."""
    return min(1.0, (step + 1) / WARMUP_STEPS, max(0.0, (1 - progress) / (1 - FLAT_UNTIL)))


# --- tokenizer and model


def train_tokenizer(text: str) -> PreTrainedTokenizerFast:
    """Byte-level BPE; digits stand alone, so that a pass key is retrieved digit by digit."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(text.splitlines(keepends=True), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS, pad_token=EOS, model_max_length=CONTEXT
    )


def new_model(tokenizer: Any) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=CONTEXT,
        rope_parameters={"rope_type": "default", "rope_theta": 20000.0},
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        attn_implementation="sdpa",
    )
    model = LlamaForCausalLM(config)
    model.generation_config.pad_token_id = tokenizer.eos_token_id
    return model


# --- training sequences


class Sampler:
    """Draws training sequences; what a step draws depends on the seed, the process and the step only."""

    def __init__(self, tokenizer: Any, text: str):
        self.tokenizer = tokenizer
        self.ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
        self.first_ordinary = max(tokenizer.bos_token_id, tokenizer.eos_token_id) + 1

    def batch(self, stage: Stage, rng: random.Random) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return ids [batch, length + 1], weights of the targets [batch, length] and positions [batch, length]."""
        rows = [self._row(stage, rng) for _ in range(stage.batch)]
        ids, weights, positions = zip(*rows, strict=True)
        return torch.tensor(ids), torch.tensor(weights), torch.tensor(positions)

    def _row(self, stage: Stage, rng: random.Random) -> tuple[list[int], list[float], list[int]]:
        length = stage.length
        kinds: tuple[Callable[..., tuple[list[int], list[float]]], ...]
        kinds = (self._tiled, self._copied, self._passkey, self._text)
        shares = (stage.tiled, stage.copied, stage.passkey, 1 - stage.tiled - stage.copied - stage.passkey)
        kind = rng.choices(kinds, shares)[0]
        ids, weights = kind(stage, rng)
        stretch = kind != self._text and length < CONTEXT and rng.random() < STRETCHED
        return ids, weights, stretched_positions(length, rng) if stretch else list(range(length))

    def _text(self, stage: Stage, rng: random.Random) -> tuple[list[int], list[float]]:
        start = rng.randrange(len(self.ids) - stage.length)
        return [self.tokenizer.bos_token_id, *self.ids[start : start + stage.length]], [1.0] * stage.length

    def _tiled(self, stage: Stage, rng: random.Random) -> tuple[list[int], list[float]]:
        """Random tokens repeated with one period; the first period cannot be predicted and is not scored."""
        period = rng.randint(8, min(stage.max_period, stage.length // 2))
        # drawn from the text, tokens are frequent ones, and copying them is of use there too
        source = self.ids if rng.random() < 0.5 else range(self.first_ordinary, VOCABULARY)
        tile = rng.choices(source, k=period)
        ids = (tile * (stage.length // period + 1))[: stage.length]
        return [self.tokenizer.bos_token_id, *ids], [0.0] * period + [1.0] * (stage.length - period)

    def _copied(self, stage: Stage, rng: random.Random) -> tuple[list[int], list[float]]:
        """Text in which some spans come a second time at a later place."""
        ids, weights = self._text(stage, rng)
        for _ in range(max(1, stage.length // 256)):
            span = rng.randint(16, 64)
            source = rng.randint(1, stage.length - 2 * span)
            target = rng.randint(source + span, stage.length - span)
            ids[target : target + span] = ids[source : source + span]
        return ids, weights

    def _passkey(self, stage: Stage, rng: random.Random) -> tuple[list[int], list[float]]:
        # more often far back, where it is harder to find
        depth = rng.random() ** 2
        prompt = passkey_prompt(self.tokenizer, self.ids, stage.length + 1, depth, rng)
        answer = self.tokenizer(f" {prompt.key}", add_special_tokens=False).input_ids
        weights = [1.0] * (stage.length - ANSWER_TOKENS) + [ANSWER_WEIGHT * stage.length] * ANSWER_TOKENS
        return prompt.ids + answer, weights


def stretched_positions(length: int, rng: random.Random) -> list[int]:
    """Positions 0..CONTEXT that rise by one but for a few gaps: long distances in a short sequence."""
    gaps = rng.randint(1, 4)
    cuts = {rng.randrange(1, length): rng.randint(0, (CONTEXT - length) // gaps) for _ in range(gaps)}
    positions, shift = [], 0
    for i in range(length):
        shift += cuts.get(i, 0)
        positions.append(i + shift)
    return positions


# --- optimizer


class Muon(torch.optim.Optimizer):
    """Momentum whose update is orthogonalized, https://kellerjordan.github.io/posts/muon/. For matrices only."""

    def __init__(self, params: list[torch.nn.Parameter], lr: float):
        super().__init__(params, {"lr": lr, "momentum": 0.95, "weight_decay": WEIGHT_DECAY})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            by_shape: dict[tuple[int, ...], list[tuple[torch.nn.Parameter, torch.Tensor]]] = {}
            for param in group["params"]:
                state = self.state[param]
                momentum = state.setdefault("momentum", torch.zeros_like(param))
                momentum.lerp_(param.grad, 1 - group["momentum"])
                update = param.grad.lerp(momentum, group["momentum"])
                by_shape.setdefault(tuple(param.shape), []).append((param, update))
            for (rows, columns), pairs in by_shape.items():
                updates = orthogonalized(torch.stack([update for _, update in pairs]))
                scale = max(1.0, rows / columns) ** 0.5
                for (param, _), update in zip(pairs, updates, strict=True):
                    param.mul_(1 - group["lr"] * group["weight_decay"])
                    param.add_(update, alpha=-group["lr"] * scale)


def orthogonalized(matrices: torch.Tensor) -> torch.Tensor:
    """Bring the singular values of `matrices` [n, rows, columns] near one by four Newton-Schulz iterations."""
    tall = matrices.shape[1] > matrices.shape[2]
    x = (matrices.mT if tall else matrices).bfloat16()
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(4):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return (x.mT if tall else x).float()


# --- training


@dataclass(frozen=True)
class Plan:
    """What the command line asks for."""

    out: Path
    state: Path
    minutes: float
    seed: int
    threads: int
    resume: bool
    measure: bool


class Trainer:
    """One process of the training; process 0 also measures and writes."""

    def __init__(self, plan: Plan, rank: int):
        self.plan, self.rank = plan, rank
        self.tokenizer = AutoTokenizer.from_pretrained(plan.out)
        corpus = stdlib_text("train")
        self.sampler = Sampler(self.tokenizer, corpus.text)
        torch.manual_seed(plan.seed)
        self.model = new_model(self.tokenizer)
        named = dict(self.model.named_parameters())
        self.matrices = {name: param for name, param in named.items() if param.ndim == 2 and "embed" not in name}
        self.others = {name: param for name, param in named.items() if name not in self.matrices}
        self.muon = Muon(list(self.matrices.values()), MUON_RATE)
        self.adam = torch.optim.AdamW(self.others.values(), ADAM_RATE, betas=(0.9, 0.97), weight_decay=0.0)
        self.step, self.tokens, self.seconds, self.loss = 0, 0, 0.0, float("nan")
        self.log: dict[str, Any] = {
            "python": corpus.python,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "machine": platform.machine(),
            "seed": plan.seed,
            "minutes": plan.minutes,
            "threads": plan.threads,
            "train_sha256": corpus.sha256,
            "train_characters": len(corpus.text),
            "train_files": corpus.n_files,
            "train_tokens": len(self.sampler.ids),
            "parameters": sum(param.numel() for param in self.model.parameters()),
            "curve": [],
        }
        if plan.resume:
            self._load_state()

    def run(self) -> None:
        last, next_eval = time.monotonic(), self.seconds + 60 * EVAL_MINUTES
        while (progress := self._shared(self.seconds) / (60 * self.plan.minutes)) < 1:
            self._train_step(progress)
            now = time.monotonic()
            self.seconds, last = self.seconds + now - last, now
            if self._shared(self.seconds) >= next_eval:
                if self.rank == 0:
                    self._report(progress)
                    self._save()
                next_eval += 60 * EVAL_MINUTES
                # measuring is not training time
                self._shared(0.0)
                last = time.monotonic()
        if self.rank == 0:
            self._report(1.0)
            self._save()

    def _train_step(self, progress: float) -> None:
        stage = stage_at(progress)
        rng = random.Random(f"{self.plan.seed} {self.rank} {self.step}")
        ids, weights, positions = self.sampler.batch(stage, rng)
        with torch.autocast("cpu", torch.bfloat16):
            # without a mask, transformers would take a gap in the positions for the border of two packed sequences
            mask = torch.ones_like(positions)
            logits = self.model(ids[:, :-1], attention_mask=mask, position_ids=positions, use_cache=False).logits
        losses = F.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
        loss = (losses * weights.flatten()).sum() / weights.sum()
        loss.backward()
        self._average_gradients()
        rate = rate_at(progress, self.step)
        for group in self.muon.param_groups:
            group["lr"] = MUON_RATE * rate
            group["momentum"] = 0.85 + 0.10 * min(1.0, self.step / MOMENTUM_STEPS)
        for group in self.adam.param_groups:
            group["lr"] = ADAM_RATE * rate
        for optimizer in (self.muon, self.adam):
            optimizer.step()
            optimizer.zero_grad()
        self.step += 1
        self.tokens += stage.batch * stage.length * self.plan.threads
        self.loss = loss.item() if math.isnan(self.loss) else 0.98 * self.loss + 0.02 * loss.item()

    def _average_gradients(self) -> None:
        if self.plan.threads == 1:
            return
        grads = [param.grad for param in self.model.parameters() if param.grad is not None]
        flat = torch.cat([grad.flatten() for grad in grads])
        dist.all_reduce(flat)
        flat /= self.plan.threads
        for grad, mean in zip(grads, flat.split([grad.numel() for grad in grads]), strict=True):
            grad.copy_(mean.view_as(grad))

    def _shared(self, seconds: float) -> float:
        """The clock of process 0, so that all processes decide alike."""
        if self.plan.threads == 1:
            return seconds
        clock = torch.tensor([seconds], dtype=torch.float64)
        dist.broadcast(clock, 0)
        return clock.item()

    def _report(self, progress: float) -> None:
        torch.set_num_threads(self.plan.threads)
        length = stage_at(progress).length
        samples = max(5, min(10, 8192 // length))
        heldout = filler_ids(self.tokenizer)
        point = {
            "step": self.step,
            "tokens": self.tokens,
            "minutes": round(self.seconds / 60, 2),
            "length": length,
            "train_loss": round(self.loss, 4),
            "heldout_loss": round(mean_loss(self.model, windows(self.tokenizer, heldout, 512, 16)), 4),
            "passkey": passkey_accuracy(
                self.model, self.tokenizer, length, samples=samples, seed=1, filler=heldout
            ).accuracy,
        }
        self.log["curve"].append(point)
        print(json.dumps(point), flush=True)
        torch.set_num_threads(1)

    def _save(self) -> None:
        """Write the model folder file by file, so that a reader or a kill never meets a half-written one."""
        with tempfile.TemporaryDirectory(dir=self.plan.state.parent) as folder:
            copy.deepcopy(self.model).half().save_pretrained(folder)
            Path(folder, "training_log.json").write_text(json.dumps(self.log, indent=1) + "\n")
            for path in Path(folder).iterdir():
                replace_file(path, self.plan.out / path.name)
            state = Path(folder, "state")
            save_file(self._state_tensors(), state, {"log": json.dumps(self.log), "counts": json.dumps(self._counts())})
            replace_file(state, self.plan.state)

    def _counts(self) -> dict[str, float]:
        return {"step": self.step, "tokens": self.tokens, "seconds": self.seconds, "loss": self.loss}

    def _state_tensors(self) -> dict[str, torch.Tensor]:
        tensors = {f"model/{name}": param.detach() for name, param in self.model.named_parameters()}
        for optimizer, named in ((self.muon, self.matrices), (self.adam, self.others)):
            for name, param in named.items():
                tensors.update({f"{key}/{name}": value for key, value in optimizer.state[param].items()})
        return tensors

    def _load_state(self) -> None:
        if not self.plan.state.is_file():
            raise FileNotFoundError(f"--resume found no state at {self.plan.state}; start without it")
        with safe_open(self.plan.state, "pt") as file:
            metadata = file.metadata()
        self.log = json.loads(metadata["log"]) | {"minutes": self.plan.minutes}
        for key, value in json.loads(metadata["counts"]).items():
            setattr(self, key, value)
        named = self.matrices | self.others
        for key, value in load_file(self.plan.state).items():
            kind, name = key.split("/", 1)
            param = named[name]
            if kind == "model":
                param.data.copy_(value)
            else:
                (self.muon if name in self.matrices else self.adam).state[param][kind] = value


def replace_file(source: Path, target: Path) -> None:
    """Put `source` in the place of `target` in one step, even from another file system."""
    nearby = target.with_name(f".{target.name}.new")
    shutil.copyfile(source, nearby)
    os.replace(nearby, target)


@torch.inference_mode()
def mean_loss(model: Any, rows: torch.Tensor) -> float:
    """Mean loss in nats per token over windows `rows` [windows, length]."""
    losses = []
    for row in rows:
        logits = model(row[None], use_cache=False).logits[0, :-1]
        losses.append(F.cross_entropy(logits.float(), row[1:]))
    return torch.stack(losses).mean().item()


# --- what the model card says


class RoundedLayer(DynamicLayer):
    """Keeps keys (after RoPE) and values as `bits` wide asymmetric quantization would return them, in full precision.

    A simulation that depends on no strategy of this project: it says what the model is sensitive to, not what any
    strategy loses.
    """

    def __init__(self, bits: int):
        super().__init__()
        self.bits = bits

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return super().update(rounded(key_states, self.bits), rounded(value_states, self.bits), *args, **kwargs)


def rounded(states: torch.Tensor, bits: int, group: int = 64) -> torch.Tensor:
    """Round `states` [batch, heads, seq, head_dim] to 2**bits levels between the extremes of each group of channels."""
    grouped = states.unflatten(-1, (-1, group))
    low, high = grouped.amin(-1, keepdim=True), grouped.amax(-1, keepdim=True)
    step = ((high - low) / (2**bits - 1)).clamp_min(1e-8)
    return (((grouped - low) / step).round() * step + low).flatten(-2)


def rounded_cache(model: Any, bits: int) -> Cache:
    return Cache(layers=[RoundedLayer(bits) for _ in range(model.config.num_hidden_layers)])


@torch.inference_mode()
def sensitivity(model: Any, rows: torch.Tensor) -> dict[str, dict[str, float]]:
    """Perplexity, mean KL divergence from the exact cache in nats, and top-1 agreement with it, by bits.

    Args:
        rows: token ids [windows, length], each window beginning with BOS.
    """
    exact = [F.log_softmax(model(row[None], use_cache=False).logits[0, :-1], -1) for row in rows]
    figures = {"exact": {"perplexity": perplexity(exact, rows)}}
    for bits in MEASURED_BITS:
        logits = [model(row[None], past_key_values=rounded_cache(model, bits)).logits[0, :-1] for row in rows]
        lossy = [F.log_softmax(each, -1) for each in logits]
        pairs = list(zip(exact, lossy, strict=True))
        figures[f"{bits} bit"] = {
            "perplexity": perplexity(lossy, rows),
            "kl": sum((p.exp() * (p - q)).sum(-1).mean().item() for p, q in pairs) / len(pairs),
            "top1": sum((p.argmax(-1) == q.argmax(-1)).float().mean().item() for p, q in pairs) / len(pairs),
        }
    return figures


def perplexity(log_probs: list[torch.Tensor], rows: torch.Tensor) -> float:
    losses = [F.nll_loss(each, row[1:]) for each, row in zip(log_probs, rows, strict=True)]
    return torch.stack(losses).mean().exp().item()


def windows(tokenizer: Any, ids: list[int], length: int, count: int) -> torch.Tensor:
    """Cut `count` evenly spaced windows [count, length] from `ids`, each beginning with BOS."""
    stride = (len(ids) - length) // count
    return torch.tensor([[tokenizer.bos_token_id, *ids[i * stride : i * stride + length - 1]] for i in range(count)])


def measure(folder: Path, threads: int) -> None:
    """Measure the trained model and its twin, and add the figures to its log."""
    torch.set_num_threads(threads)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa").eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    heldout = filler_ids(tokenizer)
    corpus = stdlib_text("heldout")
    figures: dict[str, Any] = {
        "python": corpus.python,
        "heldout_sha256": corpus.sha256,
        "heldout_characters": len(corpus.text),
        "heldout_files": corpus.n_files,
        "heldout_tokens": len(heldout),
    }
    figures["perplexity"] = {
        str(length): math.exp(mean_loss(model, windows(tokenizer, heldout, length, 24576 // length)))
        for length in (512, 1024, 2048)
    }
    figures["passkey"] = {}
    for length, samples in ((512, 50), (1024, 50), (2048, 100)):
        result = passkey_accuracy(model, tokenizer, length, samples=samples, seed=7, filler=heldout)
        figures["passkey"][str(length)] = {"all": result.accuracy, **{str(k): v for k, v in result.by_depth.items()}}
    for name, each in {"plain": model, "twin": outlier_twin(model)}.items():
        figures[f"sensitivity_{name}"] = sensitivity(each, windows(tokenizer, heldout, 512, 24))
        figures[f"passkey_{name}"] = {}
        for bits in MEASURED_BITS:
            caches = functools.partial(rounded_cache, each, bits)
            result = passkey_accuracy(each, tokenizer, CONTEXT, caches, samples=20, seed=7, filler=heldout)
            figures[f"passkey_{name}"][f"{bits} bit"] = result.accuracy
    path = folder / "training_log.json"
    log = json.loads(path.read_text()) | {"measured": significant(figures)}
    path.write_text(json.dumps(log, indent=1) + "\n")
    print(json.dumps(log["measured"], indent=1))


def significant(figures: Any) -> Any:
    """Round every number in nested dictionaries to four significant digits."""
    if isinstance(figures, dict):
        return {key: significant(value) for key, value in figures.items()}
    return float(f"{figures:.4g}") if isinstance(figures, float) else figures


# --- command line


def work(rank: int, plan: Plan, rendezvous: str) -> None:
    torch.set_num_threads(1)
    if plan.threads > 1:
        dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=plan.threads)
    Trainer(plan, rank).run()
    if plan.threads > 1:
        dist.destroy_process_group()


def parse() -> Plan:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "reference_model", help="model folder")
    parser.add_argument(
        "--state",
        type=Path,
        default=Path(tempfile.gettempdir()) / "cachequant_reference_state.safetensors",
        help="where training can be resumed from",
    )
    parser.add_argument("--minutes", type=float, default=54.0, help="training time, without the measuring")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2, help="processes of one thread each")
    parser.add_argument("--resume", action="store_true", help="go on from --state")
    parser.add_argument("--measure", action="store_true", help="do not train, only measure the model in --out")
    return Plan(**vars(parser.parse_args()))


def train(plan: Plan) -> None:
    plan.out.mkdir(parents=True, exist_ok=True)
    if not plan.resume:
        train_tokenizer(stdlib_text("train").text).save_pretrained(plan.out)
    with tempfile.TemporaryDirectory() as folder:
        # one thread per process is a third faster than one process of many threads at these sizes
        torch.multiprocessing.spawn(work, (plan, f"{folder}/rendezvous"), nprocs=plan.threads)


def main() -> None:
    plan = parse()
    if not plan.measure:
        train(plan)
    measure(plan.out, plan.threads)


if __name__ == "__main__":
    main()
