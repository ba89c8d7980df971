"""Seconds and peak memory of the stages of an evaluation."""

import resource
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

MIB = 2**20


class StageMeter:
    """Seconds and peak memory by stage: resident memory of this process, and allocated memory of a GPU."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.stages: dict[str, dict[str, float]] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Measure the enclosed code; seconds of repeated names add up."""
        on_gpu = self._device.type == "cuda"
        if on_gpu:
            torch.cuda.synchronize(self._device)
            torch.cuda.reset_peak_memory_stats(self._device)
        start, watch = time.perf_counter(), _MemoryWatch()
        try:
            yield
        finally:
            if on_gpu:
                torch.cuda.synchronize(self._device)
            before = self.stages.get(name, {"seconds": 0.0, "host_peak_mib": 0.0})
            entry = {
                "seconds": before["seconds"] + time.perf_counter() - start,
                "host_peak_mib": max(before["host_peak_mib"], watch.stop()),
            }
            if on_gpu:
                peak = torch.cuda.max_memory_allocated(self._device) / MIB
                entry["device_peak_mib"] = max(before.get("device_peak_mib", 0.0), peak)
            self.stages[name] = entry


class _MemoryWatch:
    """Highest resident memory (MiB) of this process while it runs; without /proc, the highest since its start."""

    def __init__(self, interval: float = 0.05) -> None:
        self._peak, self._interval, self._ended = _resident_mib(), interval, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while not self._ended.wait(self._interval):
            self._peak = max(self._peak, _resident_mib())

    def stop(self) -> float:
        self._ended.set()
        self._thread.join()
        return max(self._peak, _resident_mib())


def _resident_mib() -> float:
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * resource.getpagesize() / MIB
    except OSError:
        unit = 1 if sys.platform == "darwin" else 1024  # bytes there, KiB elsewhere
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / MIB
