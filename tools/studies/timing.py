"""Times of rivals, measured side by side."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from statistics import median, quantiles

import torch


@dataclass
class Times:
    """Seconds of each round, and the peak memory of one, in MiB, where there is a GPU."""

    seconds: list[float] = field(default_factory=list)
    peak_mib: float = 0.0

    @property
    def median(self) -> float:
        """Half of the rounds took less."""
        return median(self.seconds)

    @property
    def spread(self) -> float:
        """The middle half of the rounds lies this far apart, as a share of the median."""
        if len(self.seconds) < 2:
            return 0.0
        low, _, high = quantiles(self.seconds, n=4)
        return (high - low) / self.median


def interleave(
    steps: Mapping[str, Callable[[], object]], rounds: int, warm_up: int = 3, cold: bool = False
) -> dict[str, Times]:
    """Time every step once a round, so that whatever slows the machine down slows down all alike.

    Args:
        steps: by name; what a step returns is dropped at once.
        rounds: that count.
        warm_up: rounds before them, in which kernels are compiled and chosen.
        cold: on a GPU, count its own time alone, from empty caches. Filling them keeps it busy
            while the step is launched; else a step's time is what a user waits.
    """
    cuda = torch.cuda.is_available()
    times = {name: Times() for name in steps}
    for i in range(warm_up + rounds):
        for name, step in steps.items():
            if cuda:
                seconds = _cold_seconds(step) if cold else _watch(step, times[name])
            else:
                seconds = _wait(step)
            if i >= warm_up:
                times[name].seconds.append(seconds)
    return times


def _wait(step: Callable[[], object]) -> float:
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def _watch(step: Callable[[], object], times: Times) -> float:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    start = time.perf_counter()
    step()
    torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    times.peak_mib = (torch.cuda.max_memory_allocated() - before) / 2**20
    return seconds


def _cold_seconds(step: Callable[[], object]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    # More than any cache holds, and longer than a launch takes
    torch.empty(2**30, dtype=torch.uint8, device="cuda").zero_()
    start.record()
    step()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1e3
