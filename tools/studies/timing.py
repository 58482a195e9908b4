"""Time several functions in turns."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from statistics import median, quantiles

import torch


@dataclass
class Times:
    """Measurements of one function.

    Attributes:
        seconds: of each round.
        peak_mib: peak GPU memory of a round above that before it, in MiB; 0 on a CPU.
    """

    seconds: list[float] = field(default_factory=list)
    peak_mib: float = 0.0

    @property
    def median(self) -> float:
        """Median of the seconds."""
        return median(self.seconds)

    @property
    def spread(self) -> float:
        """Interquartile range as a fraction of the median; 0 for a single round."""
        if len(self.seconds) < 2:
            return 0.0
        low, _, high = quantiles(self.seconds, n=4)
        return (high - low) / self.median


def interleave(
    steps: Mapping[str, Callable[[], object]], rounds: int, warm_up: int = 3, cold: bool = False
) -> dict[str, Times]:
    """Time every function once per round, so that disturbances affect all of them alike.

    Args:
        steps: functions by name.
        rounds: number of timed rounds.
        warm_up: rounds before them that are not timed, for compilation and autotuning.
        cold: on a GPU, measure GPU time with cleared caches. Clearing them keeps the GPU busy
            while the function is launched, so launch overhead does not count. By default
            wall-clock time is measured.

    Returns:
        measurements by name.
    """
    cuda = torch.cuda.is_available()
    times = {name: Times() for name in steps}
    for i in range(warm_up + rounds):
        for name, step in steps.items():
            if cuda:
                seconds = _cold_seconds(step) if cold else _gpu_wall_seconds(step, times[name])
            else:
                seconds = _wall_seconds(step)
            if i >= warm_up:
                times[name].seconds.append(seconds)
    return times


def _wall_seconds(step: Callable[[], object]) -> float:
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def _gpu_wall_seconds(step: Callable[[], object], times: Times) -> float:
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
    # Larger than any cache, and slower than a kernel launch
    torch.empty(2**30, dtype=torch.uint8, device="cuda").zero_()
    start.record()
    step()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1e3
