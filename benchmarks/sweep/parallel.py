"""What a run needs when torchrun started it in several processes: who is who, one answer for all, a split model.

Without torchrun everything here works for the one process there is, but for loading a split model.
"""

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

_BACKENDS = {"cpu": "gloo", "cuda": "nccl"}

# in place of a length, when the main process has nothing to send
_FAILED = -1


def rank() -> int:
    """Which process this is, from 0 on."""
    return dist.get_rank() if _started() else int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """How many processes there are; 1 without torchrun."""
    return dist.get_world_size() if _started() else int(os.environ.get("WORLD_SIZE", "1"))


def is_main() -> bool:
    """Whether this is the process that prints and writes."""
    return rank() == 0


def start(device: str) -> torch.device:
    """Join the other processes, if there are any, and return the device of this one; doing it again changes nothing.

    device: `cpu`, whose processes talk over gloo, or `cuda`, where each takes the GPU of its local rank and talks over
        nccl.

    Raises ValueError for other devices, and where a process has no GPU of its own.
    """
    if device not in _BACKENDS:
        raise ValueError(f"device={device!r}: processes of torchrun compute on 'cpu' or 'cuda', each on its own device")
    if device == "cpu":
        own = torch.device("cpu")
    else:
        place, there = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
        if place >= there:
            raise ValueError(
                f"process {rank()} has no GPU of its own: there are {there} here. Start as many processes as GPUs"
            )
        own = torch.device("cuda", place)
        torch.cuda.set_device(own)
    if world_size() > 1 and not _started():
        dist.init_process_group(_BACKENDS[device], device_id=own if own.type == "cuda" else None)
    return own


def stop() -> None:
    """Leave the other processes; the last thing that a run does."""
    if _started():
        dist.destroy_process_group()


def share(value: Any) -> Any:
    """What the main process gave, in every process, as JSON brings it back: tuples become lists.

    value: anything JSON can say; that of other processes is ignored.

    Raises TypeError, in every process, for what JSON cannot say, and RuntimeError before `start`.
    """
    _require_started()
    content = b""
    reason = ""
    if is_main():
        try:
            content = json.dumps(value, ensure_ascii=False).encode()
        except (TypeError, ValueError) as error:
            reason = f" ({error})"
    length = torch.tensor(_FAILED if reason else len(content), device=_device())
    if _started():
        dist.broadcast(length, src=0)
    if int(length) == _FAILED:
        raise TypeError(f"the main process has something to share that JSON cannot say{reason}; share plain data")
    if not _started():
        return json.loads(content)
    sent = torch.frombuffer(bytearray(content), dtype=torch.uint8) if is_main() else torch.empty(int(length)).byte()
    sent = sent.to(_device())
    dist.broadcast(sent, src=0)
    return json.loads(sent.cpu().numpy().tobytes())


def total(number: int) -> int:
    """The sum of what the processes gave, in every process: bytes, most often. Replicated ones count in each.

    Raises RuntimeError before `start`.
    """
    _require_started()
    summed = torch.tensor(number, dtype=torch.int64, device=_device())
    if _started():
        dist.all_reduce(summed)
    return int(summed)


def load_sharded(source: str | Path, dtype: torch.dtype, device: str) -> Any:
    """The model of a folder or hub name, each process holding its share of the weights; in evaluation mode.

    device: as for `start`, which this calls.

    Raises ValueError in a single process, for models that transformers has no plan for, and where the processes are to
    compute on CPUs although there is a GPU, which transformers would take.
    """
    if world_size() == 1:
        raise ValueError(
            "a model is split over the processes that torchrun starts, and this is the only one; use "
            "torchrun --nproc-per-node 2, or device_map in one process"
        )
    if device == "cpu" and torch.accelerator.is_available():
        raise ValueError("transformers splits models over GPUs where there are any; hide them: CUDA_VISIBLE_DEVICES=''")
    start(device)
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, attn_implementation="sdpa", **_plan())
    return model.eval()


def _plan() -> dict[str, Any]:
    """The argument by which the installed transformers is told to follow the model's own plan."""
    from transformers.distributed.configuration_utils import DistributedConfig

    if "tp_plan" in {field.name for field in dataclasses.fields(DistributedConfig)}:
        return {"distributed_config": DistributedConfig(tp_plan="auto")}
    return {"tp_plan": "auto"}


def _started() -> bool:
    return dist.is_available() and dist.is_initialized()


def _require_started() -> None:
    if world_size() > 1 and not _started():
        raise RuntimeError(f"{world_size()} processes have not met yet; call start(device) first")


def _device() -> torch.device:
    """Where numbers have to lie to be sent."""
    nccl = _started() and dist.get_backend() == "nccl"
    return torch.device("cuda", torch.cuda.current_device()) if nccl else torch.device("cpu")
