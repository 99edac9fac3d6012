"""The device that is measured, the time that is left for it, and processes that work beside this one."""

import gc
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

import torch

Item = TypeVar("Item")
Found = TypeVar("Found")

ROUNDS = 5
# data of one timing, so that nothing of it is found in the cache of the device: more than any has
ROTATED_BYTES = 320_000_000
MOST_SETS = 160
MOST_WORKERS = 12


class Clock:
    """Seconds that are left, of everything and of the section that runs."""

    def __init__(self, seconds: float, sections: dict[str, float]) -> None:
        """sections: by name, how the seconds are shared out; what one leaves over goes to those after it."""
        self._start = time.monotonic()
        self._end = self._start + seconds
        self._waiting = dict(sections)
        self._section_end = self._end

    @contextmanager
    def section(self, name: str, spent: dict[str, float]) -> Iterator[None]:
        """Run a section; `spent` gets its seconds."""
        begun = time.monotonic()
        share = self._waiting[name] / sum(self._waiting.values())
        del self._waiting[name]
        self._section_end = begun + max(0.0, self._end - begun) * share
        try:
            yield
        finally:
            spent[name] = round(time.monotonic() - begun, 2)
            self._section_end = self._end

    def left(self) -> float:
        """Of the section."""
        return self._section_end - time.monotonic()


class Machine:
    """Where kernels run: a CUDA device, or in a dry run the CPU, on which nothing is timed."""

    def __init__(self, device: torch.device, clock: Clock) -> None:
        self.device = device
        self.clock = clock
        self.dry = device.type != "cuda"

    def microseconds(self, calls: Sequence[Callable[[], object]], rounds: int = ROUNDS) -> float | None:
        """Median time per call of a CUDA graph that makes all of them, one after the other; None in a dry run."""
        if self.dry:
            calls[0]()
            return None

        def all_calls() -> None:
            for call in calls:
                call()

        graph = captured(all_calls)
        found = replayed(graph, rounds)
        graph.reset()
        return 1e3 * found / len(calls)

    def sets(self, size: int) -> int:
        """How many inputs of `size` bytes to take turns with."""
        return 1 if self.dry else max(1, min(MOST_SETS, -(-ROTATED_BYTES // max(1, size))))

    def room(self, size: float) -> bool:
        """Whether `size` more bytes can be allocated, with a little to spare."""
        if self.dry:
            return True
        self.free()
        return size * 1.05 + 2e9 < torch.cuda.mem_get_info(self.device)[0]

    def free(self) -> None:
        """Give back what nothing refers to."""
        gc.collect()
        if not self.dry:
            torch.cuda.synchronize(self.device)
            torch.cuda.empty_cache()

    def synchronize(self) -> None:
        """Wait for the device."""
        if not self.dry:
            torch.cuda.synchronize(self.device)


def captured(work: Callable[[], object]) -> torch.cuda.CUDAGraph:
    """`work` as a CUDA graph, after a run beside it in which everything is compiled and allocated."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        work()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph


def replayed(graph: torch.cuda.CUDAGraph, rounds: int = ROUNDS, replays: int = 1) -> float:
    """Median milliseconds of a replay."""
    for _ in range(2):
        graph.replay()
    times = []
    for _ in range(rounds):
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(replays):
            graph.replay()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop) / replays)
    return statistics.median(times)


def in_parallel(
    work: Callable[[Item], Found], items: Iterable[Item], machine: Machine, share: float = 1.0
) -> Iterator[tuple[Item, Found | None]]:
    """Results of `work`, a function of a module, as they come; None for what there was no time for.

    share: of the section's time that is left, how much may be used.

    On a GPU the work is done by processes, because most of it is compiling: they share the compiler's cache with this
    one, and an address fault is theirs.
    """
    items = list(items)
    end = time.monotonic() + machine.clock.left() * share
    count = min(MOST_WORKERS, (os.cpu_count() or 1) - 2, len(items))
    if machine.dry or count < 2:
        for item in items:
            yield item, work(item) if time.monotonic() < end else None
        return
    missing = dict(enumerate(items))
    with multiprocessing.get_context("spawn").Pool(count) as pool:
        running = pool.imap_unordered(_numbered, [(work, number, item) for number, item in missing.items()])
        while missing:
            try:
                number, found = running.next(timeout=max(0.1, end - time.monotonic()))  # type: ignore[attr-defined]
            except multiprocessing.TimeoutError:
                break
            yield missing.pop(number), found
    for item in missing.values():
        yield item, None


def _numbered(task: tuple[Callable[[Item], Found], int, Item]) -> tuple[int, Found]:
    torch.set_num_threads(1)
    work, number, item = task
    return number, work(item)
