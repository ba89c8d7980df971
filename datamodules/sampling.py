"""The order of training pairs: a pure function of seed, epoch and position, so that a run resumes exactly."""

from collections.abc import Iterator

import numpy as np
import torch


def derived_seed(*numbers: int) -> int:
    """Return a 64-bit seed from several numbers; similar numbers give unrelated seeds."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])


class TrainingOrder:
    """Batches of (epoch, pair) of one process, starting at any batch of any epoch.

    An epoch is a shuffle of all pairs, cut into optimiser steps of `batch_size` pairs; the last, smaller one is dropped
    with `drop_last`, unless it is the only one. A step is cut into chunks of `per_gpu_batchsize` pairs per process, and
    of each chunk process r takes the r-th slice: the pairs of a step do not depend on the number of processes.
    """

    def __init__(
        self,
        *,
        n_pairs: int,
        batch_size: int,
        per_gpu_batchsize: int,
        seed: int,
        drop_last: bool = True,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        if not 0 <= rank < world_size:
            raise ValueError(f"rank={rank} is not a process of world_size={world_size}; expected 0 to world_size - 1")
        chunk = min(per_gpu_batchsize * world_size, batch_size)
        if batch_size % chunk or chunk % world_size:
            raise ValueError(
                f"batch_size={batch_size} is not a multiple of per_gpu_batchsize={per_gpu_batchsize} times "
                f"world_size={world_size}; change one of them"
            )
        if n_pairs < world_size:
            raise ValueError(f"n_pairs={n_pairs} cannot be shared by world_size={world_size} processes; use fewer")
        self._n_pairs, self._chunk, self._seed = n_pairs, chunk, seed
        self._rank, self._world_size = rank, world_size
        steps = n_pairs // batch_size
        used = steps * batch_size if steps and drop_last else n_pairs
        self._bounds = list(range(0, used, chunk))  # start of each chunk
        if used - self._bounds[-1] < world_size:  # a last chunk with fewer pairs than processes is dropped
            used = self._bounds.pop()
        self._used = used
        self.epoch = 0
        self.next_batch = 0  # start of the next iteration

    @property
    def n_left_out(self) -> int:
        """Number of pairs of each epoch that are in no batch."""
        return self._n_pairs - self._used

    def __len__(self) -> int:
        """Return the number of batches of a whole epoch."""
        return len(self._bounds)

    def set_position(self, epoch: int, batch: int) -> None:
        """Start the next iteration at `batch` of `epoch`; after the last batch, at the beginning of the next epoch."""
        if epoch < 0 or not 0 <= batch <= len(self):
            raise ValueError(f"epoch={epoch}, batch={batch}: expected epoch from 0, batch from 0 to {len(self)}")
        self.epoch, self.next_batch = (epoch + 1, 0) if batch == len(self) else (epoch, batch)

    def set_epoch(self, epoch: int) -> None:
        """Start at the beginning of `epoch`, unless the position is already within it; Lightning calls this."""
        if epoch != self.epoch:
            self.set_position(epoch, 0)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        """Yield the batches from the current position on, as keys (epoch, pair)."""
        epoch, first = self.epoch, self.next_batch
        generator = torch.Generator().manual_seed(derived_seed(self._seed, epoch))
        order = torch.randperm(self._n_pairs, generator=generator)[: self._used].numpy()
        for start in self._bounds[first:]:
            mine = np.array_split(order[start : start + self._chunk], self._world_size)[self._rank]
            yield [(epoch, int(pair)) for pair in mine]
