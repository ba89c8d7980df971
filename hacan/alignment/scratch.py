"""Memory that is used again for every block of scores."""

import math
import threading

import torch
from torch import Tensor

_kept = threading.local()


class Scratch:
    """Named tensors for the `out=` of torch's functions, the same memory under the same name every time.

    Fresh memory costs more than most of the arithmetic: the operating system hands it out page by page, zeroed. While
    gradients are needed nothing may be overwritten, and everything here is None, which `out=` takes for fresh memory.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype, *, active: bool) -> None:
        self.device, self.dtype = device, dtype
        self._active = active
        self.readable = active and device.type == "cpu"  # values may also be looked at: nothing waits for a GPU
        self._held: dict[tuple[str, torch.dtype], Tensor] = {}

    def __call__(self, name: str, *shape: int, dtype: torch.dtype | None = None) -> Tensor | None:
        """Uninitialised memory of that shape; what was in memory of that name is lost."""
        if not self._active:
            return None
        dtype = dtype or self.dtype
        size = math.prod(shape)
        held = self._held.get((name, dtype))
        if held is None or held.numel() < size:
            self._held[name, dtype] = held = torch.empty(size, dtype=dtype, device=self.device)
        return held[:size].view(shape)

    def over(self, values: Tensor) -> Tensor | None:
        """The memory of `values`, which will not be read again."""
        return values if self._active else None


def scratch_of_thread(device: torch.device, dtype: torch.dtype, *, active: bool) -> Scratch:
    """On a CPU the memory of this thread's last call, so that short calls do not pay for fresh memory either."""
    if not active or device.type != "cpu":
        return Scratch(device, dtype, active=active)
    held = _kept.__dict__.setdefault("scratches", {})
    # Memory of inference mode must not be written outside of it: a search, and then its heatmaps, are such a pair.
    return held.setdefault((dtype, torch.is_inference_mode_enabled()), Scratch(device, dtype, active=True))
