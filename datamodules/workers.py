"""Processes that decode images: started quietly, watched, and stopped at once when something is wrong."""

from collections.abc import Iterator
from typing import Any

import cv2
import torch
from torch.utils.data import DataLoader, Dataset

from hacan.errors import UserError


class WatchedLoader:
    """A torch DataLoader whose dead worker is one line for a person, and whose workers can be stopped explicitly."""

    def __init__(self, dataset: Dataset, *, num_workers: int, **arguments: Any) -> None:
        self._num_workers = num_workers
        self._iterator: Any = None
        self._loader = DataLoader(
            dataset,
            num_workers=num_workers,
            pin_memory=torch.cuda.is_available(),
            worker_init_fn=_quiet_worker,
            **arguments,
        )

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[Any]:
        try:
            self._iterator = iter(self._loader)
            yield from self._iterator
        except RuntimeError as error:
            if not str(error).startswith("DataLoader worker (pid"):  # errors inside a worker say "Caught ... in"
                raise
            self.stop()
            raise UserError(
                f"a process that decodes images died ({' '.join(str(error).split())}); most often memory, or "
                f"/dev/shm, is full: try fewer than num_workers={self._num_workers}"
            ) from error

    def stop(self) -> None:
        """End the workers now. Left to the garbage collector, while a traceback holds on to them, it takes 5 s each."""
        if self._num_workers and self._iterator is not None:
            self._iterator._shutdown_workers()  # torch has no public way; Lightning's CombinedLoader does the same
            self._loader._iterator = self._iterator = None


def _quiet_worker(_: int) -> None:
    """One thread per worker: OpenCV's thread pool does not survive a fork, and the workers are the parallelism."""
    cv2.setNumThreads(0)
