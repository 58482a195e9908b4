"""Time several functions in turns, and count what a function launches on a GPU."""

import gc
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from statistics import median, quantiles

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile


@dataclass
class Times:
    """Measurements of one function.

    Attributes:
        seconds: of each round; NaN once the function has run out of memory.
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

    A function that runs out of memory is not called again, and its times are NaN.

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
    times = {name: Times() for name in steps}
    measure = _wall_seconds
    if torch.cuda.is_available():
        measure = _cold_seconds if cold else _gpu_wall_seconds
    failed = set()
    # As in training: the objects of the other functions would make each collection longer
    gc.collect()
    gc.freeze()
    for i in range(warm_up + rounds):
        for name, step in steps.items():
            if name in failed:
                continue
            try:
                seconds = measure(step, times[name])
            except torch.OutOfMemoryError:
                failed.add(name)
                times[name] = Times([float("nan")], float("nan"))
                torch.cuda.empty_cache()
                continue
            if i >= warm_up:
                times[name].seconds.append(seconds)
    gc.unfreeze()
    return times


def _wall_seconds(step: Callable[[], object], times: Times) -> float:
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


def _cold_seconds(step: Callable[[], object], times: Times) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    # Larger than any cache, and it takes longer than Python takes to launch the function's kernels
    torch.empty(2**32, dtype=torch.uint8, device="cuda").zero_()
    start.record()
    step()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1e3


def gpu_work(step: Callable[[], object]) -> dict[str, float]:
    """Profile one call of a function that has been called before.

    Returns:
        "busy": seconds in which the GPU computed; "cpu": seconds in which the CPU did not wait for
        the GPU; "launches": number of kernels and copies.
    """
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        wall = _gpu_wall_seconds(step, Times())
    events = profiler.events() or []
    busy = [e.time_range.elapsed_us() for e in events if e.device_type == DeviceType.CUDA]
    waits = [e.time_range.elapsed_us() for e in events if e.name.endswith("Synchronize")]
    return {"busy": 1e-6 * sum(busy), "cpu": wall - 1e-6 * sum(waits), "launches": len(busy)}
