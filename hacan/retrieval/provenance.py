"""The receipt of a result: everything that makes its numbers comparable, beside what they cost."""

import json
import math
import platform
import resource
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from hacan.errors import UserError
from hacan.retrieval.store import MIB, write_atomically

TIE_RULE = "a tie with a wrong item counts against us, at the border of the shortlist too"
MISS_RULE = "no correct item in the shortlist: no rank, a miss at every K"
PACKAGES = ("torch", "timm", "transformers", "numpy", "opencv-python-headless")

# What is measured: results that differ here answer different questions.
DATA_FIELDS = ("dataset", "split", "protocol", "images", "texts", "queries_i2t", "queries_t2i", "ids_hash")
RULE_FIELDS = ("tie_rule", "miss_rule", "top_k", "coarse")
# Who is measured: what a comparison is usually about. They are named, not refused.
SYSTEM_FIELDS = ("alignment", "direction", "precision", "features", "members")


def name_of_alignment(receipt: Mapping[str, Any]) -> str:
    """The form of the fine similarity as people read it: "hybrid alignment, direction t2i"."""
    direction = f", direction {receipt['direction']}" if receipt["direction"] else ""
    return f"{receipt['alignment']} alignment{direction}"


class StageMeter:
    """Seconds and peak memory of named stages: resident memory of this process, and of its device where it has one."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.stages: dict[str, dict[str, float]] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Measure what runs inside; a name that comes again adds its seconds."""
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
    """Highest resident memory (MiB) of this process while it runs; where /proc is missing, the highest so far."""

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


def versions() -> dict[str, str]:
    """Versions of what a number depends on."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def differing_fields(one: Mapping[str, Any], other: Mapping[str, Any], fields: tuple[str, ...]) -> list[str]:
    """The fields in which two receipts differ; a field that only one of them has differs too."""
    absent = object()
    return [field for field in fields if one.get(field, absent) != other.get(field, absent)]


def check_comparable(one: Mapping[str, Any], other: Mapping[str, Any], *, across: tuple[str, ...] = ()) -> list[str]:
    """Refuse (UserError) receipts that measure different things; return the fields in which the systems differ.

    across: rules (of RULE_FIELDS) in which the two may differ on purpose, such as top_k.
    """
    forbidden = [field for field in across if field not in RULE_FIELDS]
    if forbidden:
        raise UserError(
            f"results cannot be compared across {forbidden[0]}: a paired test needs the same queries; across may name "
            f"{', '.join(RULE_FIELDS)}"
        )
    for field in differing_fields(one, other, DATA_FIELDS + RULE_FIELDS):
        if field not in across:
            hint = f" (to compare across it on purpose: --across {field})" if field in RULE_FIELDS else ""
            raise UserError(
                f"the results measure different things: {field} is {one.get(field)!r} in the first and "
                f"{other.get(field)!r} in the second{hint}"
            )
    return differing_fields(one, other, RULE_FIELDS + SYSTEM_FIELDS)


def strict(value: Any) -> Any:
    """The value for strict JSON, which has no infinity and no NaN: they become null ("there is no such number")."""
    if isinstance(value, Mapping):
        return {str(key): strict(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [strict(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def write_json(path: Path, value: Any) -> None:
    """Strict JSON, written atomically."""
    write_atomically(path, json.dumps(strict(value), indent=1, allow_nan=False) + "\n")
