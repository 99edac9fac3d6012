"""Train the bundled reference model on the standard library's text, on an ordinary CPU.

    python -m cachequant.benchmarks.training.train --minutes 54 --threads 2 --out some/folder

The model is then measured, and its card written.
"""

import argparse
import copy
import json
import math
import os
import platform
import random
import shutil
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.multiprocessing.spawn import spawn
from transformers import AutoTokenizer

from .. import reference
from ..corpus import Corpus, stdlib_text
from ..passkey import filler_ids, passkey_accuracy
from . import card
from .architecture import new_model, train_tokenizer
from .curriculum import Sampler, stage_at
from .figures import mean_loss, windows
from .optimizer import MuonAndAdam

EVAL_MINUTES = 4.0


@dataclass(frozen=True)
class Plan:
    """What the command line asks for."""

    out: Path
    state: Path
    minutes: float
    seed: int
    threads: int
    resume: bool


class Trainer:
    """One process of the training; process 0 also reports and writes.

    What a step draws depends on the seed, the process and the step only.

    Raises:
        FileNotFoundError: the plan is to resume, and there is no state.
    """

    def __init__(self, plan: Plan, rank: int, model: Any, tokenizer: Any, corpus: Corpus):
        self.plan, self.rank, self.model, self.tokenizer = plan, rank, model, tokenizer
        self.sampler = Sampler(tokenizer, corpus.text)
        self.optimizer = MuonAndAdam(model)
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
            "parameters": sum(param.numel() for param in model.parameters()),
            "curve": [],
        }
        if plan.resume:
            self._load_state()

    def run(self) -> None:
        """Train until the time is over, with a report and a checkpoint every few minutes and at the end."""
        last, next_eval = time.monotonic(), self.seconds + 60 * EVAL_MINUTES
        while (progress := self._shared(self.seconds) / (60 * self.plan.minutes)) < 1:
            self.train_step(progress)
            now = time.monotonic()
            self.seconds, last = self.seconds + now - last, now
            if self._shared(self.seconds) >= next_eval:
                if self.rank == 0:
                    self._report(progress)
                    self.save()
                next_eval += 60 * EVAL_MINUTES
                # measuring is not training time
                self._shared(0.0)
                last = time.monotonic()
        if self.rank == 0:
            self._report(1.0)
            self.save()

    def train_step(self, progress: float) -> None:
        """Train on one batch; `progress` is the share of the training time that is over."""
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
        self.optimizer.update(progress, self.step)
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

    # --- checkpoints

    def save(self) -> None:
        """Write the model folder file by file, so that a reader or a kill never meets a half-written one."""
        with tempfile.TemporaryDirectory(dir=self.plan.state.parent) as folder:
            copy.deepcopy(self.model).half().save_pretrained(folder)
            Path(folder, card.LOG).write_text(json.dumps(self.log, indent=1) + "\n")
            for path in Path(folder).iterdir():
                replace_file(path, self.plan.out / path.name)
            state = Path(folder, "state")
            weights = {f"model/{name}": param.detach() for name, param in self.model.named_parameters()}
            counts = {"step": self.step, "tokens": self.tokens, "seconds": self.seconds, "loss": self.loss}
            metadata = {"log": json.dumps(self.log), "counts": json.dumps(counts)}
            save_file(weights | self.optimizer.tensors(), state, metadata)
            replace_file(state, self.plan.state)

    def _load_state(self) -> None:
        if not self.plan.state.is_file():
            raise FileNotFoundError(f"--resume found no state at {self.plan.state}; start without it")
        with safe_open(self.plan.state, "pt") as file:
            metadata = file.metadata()
        self.log = json.loads(metadata["log"]) | {"minutes": self.plan.minutes}
        for key, value in json.loads(metadata["counts"]).items():
            setattr(self, key, value)
        tensors = load_file(self.plan.state)
        for name, param in self.model.named_parameters():
            param.data.copy_(tensors.pop(f"model/{name}"))
        self.optimizer.load(tensors)


def replace_file(source: Path, target: Path) -> None:
    """Put `source` in the place of `target` in one step, even from another file system."""
    nearby = target.with_name(f".{target.name}.new")
    shutil.copyfile(source, nearby)
    os.replace(nearby, target)


# --- command line


def parse(arguments: list[str] | None = None) -> Plan:
    """Read the command line, or `arguments` instead."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=reference.FOLDER, help="model folder")
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
    plan = Plan(**vars(parser.parse_args(arguments)))
    if plan.minutes <= 0 or plan.threads < 1:
        parser.error(f"got --minutes {plan.minutes} --threads {plan.threads}; use more than 0 and at least 1")
    return plan


def work(rank: int, plan: Plan, rendezvous: str) -> None:
    """Train in process `rank` of `plan.threads`, which find each other through the file `rendezvous`."""
    torch.set_num_threads(1)
    if plan.threads > 1:
        dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=plan.threads)
    tokenizer = AutoTokenizer.from_pretrained(plan.out)
    torch.manual_seed(plan.seed)
    Trainer(plan, rank, new_model(tokenizer), tokenizer, stdlib_text("train")).run()
    if plan.threads > 1:
        dist.destroy_process_group()


def train(plan: Plan) -> None:
    """Train the tokenizer, unless resuming, and the model into `plan.out`."""
    plan.out.mkdir(parents=True, exist_ok=True)
    if not plan.resume:
        train_tokenizer(stdlib_text("train").text).save_pretrained(plan.out)
    with tempfile.TemporaryDirectory() as folder:
        # one thread per process is a third faster than one process of many threads at these sizes
        spawn(work, (plan, f"{folder}/rendezvous"), nprocs=plan.threads)


def main() -> None:
    plan = parse()
    train(plan)
    card.update(plan.out, plan.threads)


if __name__ == "__main__":
    main()
