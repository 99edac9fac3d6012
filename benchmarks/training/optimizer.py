"""Muon for the matrices of the reference model, AdamW for the rest, and the schedule of both.

Muon: https://kellerjordan.github.io/posts/muon/
"""

from collections.abc import Mapping
from typing import Any

import torch

MUON_RATE, ADAM_RATE = 0.02, 4e-3
WEIGHT_DECAY = 0.03
WARMUP_STEPS, MOMENTUM_STEPS = 40, 200
FLAT_UNTIL = 0.45


def rate_at(progress: float, step: int) -> float:
    """Learning-rate factor: a short warm-up, flat, then linear to zero."""
    return min(1.0, (step + 1) / WARMUP_STEPS, max(0.0, (1 - progress) / (1 - FLAT_UNTIL)))


class MuonAndAdam:
    """Updates every matrix but the embeddings by Muon, everything else by AdamW."""

    def __init__(self, model: torch.nn.Module):
        named = dict(model.named_parameters())
        self.matrices = {name: param for name, param in named.items() if param.ndim == 2 and "embed" not in name}
        self.others = {name: param for name, param in named.items() if name not in self.matrices}
        self.muon = Muon(list(self.matrices.values()), MUON_RATE)
        self.adam = torch.optim.AdamW(self.others.values(), ADAM_RATE, betas=(0.9, 0.97), weight_decay=0.0)

    def update(self, progress: float, step: int) -> None:
        """Apply the gradients and drop them; `progress` is the share of the training time that is over."""
        rate = rate_at(progress, step)
        for group in self.muon.param_groups:
            group["lr"] = MUON_RATE * rate
            group["momentum"] = 0.85 + 0.10 * min(1.0, step / MOMENTUM_STEPS)
        for group in self.adam.param_groups:
            group["lr"] = ADAM_RATE * rate
        for optimizer in (self.muon, self.adam):
            optimizer.step()
            optimizer.zero_grad()

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return the state of both optimizers by "kind/parameter"."""
        tensors = {}
        for optimizer, named in ((self.muon, self.matrices), (self.adam, self.others)):
            for name, param in named.items():
                tensors.update({f"{kind}/{name}": value for kind, value in optimizer.state[param].items()})
        return tensors

    def load(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Take over what `tensors` returned."""
        for key, value in tensors.items():
            kind, name = key.split("/", 1)
            if name in self.matrices:
                self.muon.state[self.matrices[name]][kind] = value
            else:
                self.adam.state[self.others[name]][kind] = value


class Muon(torch.optim.Optimizer):
    """Momentum whose update is orthogonalized. For matrices only."""

    def __init__(self, params: list[torch.nn.Parameter], lr: float):
        super().__init__(params, {"lr": lr, "momentum": 0.95, "weight_decay": WEIGHT_DECAY})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        if closure is not None:
            raise ValueError(f"got closure={closure!r}; compute the gradients first and call step()")
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
