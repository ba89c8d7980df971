"""Lightning callbacks: checkpoints that allow exact resumption, a clean end on signals, logs of short epochs."""

import os
import shutil
import signal
import time
from pathlib import Path
from types import FrameType
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Checkpoint
from pytorch_lightning.plugins.io import TorchCheckpointIO
from pytorch_lightning.utilities.rank_zero import rank_zero_info

from hacan.checkpoints.checkpoint import atomic_save
from hacan.errors import UserError
from hacan.lock import FolderLock

BEST, LAST, PREVIOUS = "best.ckpt", "last.ckpt", "previous.ckpt"
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


def epoch_is_complete(trainer: pl.Trainer) -> bool:
    """Return whether the last batch of the current epoch has been trained; False if a signal cut the epoch short."""
    return trainer.fit_loop.epoch_loop._num_ready_batches_reached()


class AtomicCheckpointIO(TorchCheckpointIO):
    """Write checkpoints atomically: after a crash the previous file is still there."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        """Write to a temporary file and rename it to `path`."""
        atomic_save(checkpoint, Path(path))


class KeepCheckpoints(Checkpoint):  # a Checkpoint is called after the module, whose metric it needs
    """Save last.ckpt after every epoch (its predecessor as previous.ckpt) and best.ckpt by the validation metric.

    On SIGTERM (sent by SLURM before the time limit), SIGHUP and Ctrl-C it finishes the current optimiser step, saves
    last.ckpt and ends the training; `resume_from=last` continues with the next batch. `every_minutes` > 0 also saves
    last.ckpt within an epoch, which bounds the loss of a kill -9.

    Lightning's ModelCheckpoint is not used because resumption would not be exact: it saves between accumulated batches,
    an interrupted epoch skips the validation, and its state holds absolute paths.
    """

    def __init__(self, folder: Path, *, every_minutes: float = 10.0) -> None:
        self.folder = folder
        self.every_minutes = every_minutes
        self.best_value = float("-inf")
        self.interrupted = False
        self._lock: FolderLock | None = None
        self._saved_at = time.monotonic()
        self._handlers_before: dict[int, Any] = {}

    @property
    def state_key(self) -> str:
        """Return the key of the state in a checkpoint, which does not depend on the class name."""
        return "KeepCheckpoints"

    def state_dict(self) -> dict[str, Any]:
        """Return the best value so far."""
        return {"best_rsum": self.best_value}  # the key of older checkpoints

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the best value so far."""
        self.best_value = state_dict["best_rsum"]

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Lock the folder before training; raise `UserError` if it cannot be written or another run uses it.

        The first process decides for all, because only it knows the folder of the run's record.
        """
        self.folder = Path(trainer.strategy.broadcast(str(self.folder)))
        problem = ""
        if trainer.is_global_zero:
            try:
                self._lock_folder()
            except UserError as error:
                problem = str(error)
        problem = trainer.strategy.broadcast(problem)
        if problem:  # only the first process prints it
            raise UserError(problem) if trainer.is_global_zero else SystemExit(2)

    def _lock_folder(self) -> None:
        lock = FolderLock(self.folder, remedy="give this run another folder, save_path=PATH")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            lock.acquire()
        except OSError as error:
            raise UserError(
                f"cannot write checkpoints to {self.folder}: {error.strerror}; give another folder, save_path=PATH"
            ) from error
        self._lock = lock

    def _release_folder(self) -> None:
        if self._lock is not None:
            self._lock.release()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Install the signal handlers."""
        self._saved_at = time.monotonic()
        self._handlers_before = {number: signal.signal(number, self._on_signal) for number in SIGNALS}

    def _on_signal(self, signum: int, frame: FrameType | None) -> None:
        if signum == signal.SIGINT and self.interrupted:  # the second Ctrl-C
            raise KeyboardInterrupt
        self.interrupted = True

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save within an epoch on a signal or after `every_minutes`, at the end of an optimiser step.

        Not after the last batch, where `on_train_epoch_end` saves: a run resumed here would skip the validation.
        """
        if trainer.fit_loop._should_accumulate() or epoch_is_complete(trainer):
            return
        due = self.every_minutes > 0 and time.monotonic() - self._saved_at > 60 * self.every_minutes
        # All processes must decide alike, or some would wait for the others.
        if not trainer.strategy.reduce_boolean_decision(due or self.interrupted, all=False):
            return
        self._save(trainer)
        self._stop_if_interrupted(trainer)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save last.ckpt, and best.ckpt if the validation metric is the best so far."""
        if not epoch_is_complete(trainer):
            return  # cut short by a signal: last.ckpt has been saved
        value = float(trainer.callback_metrics.get("val_selection", float("-inf")))
        better = value > self.best_value
        self.best_value = max(value, self.best_value)
        self._save(trainer, as_best=better)
        self._stop_if_interrupted(trainer)

    def _stop_if_interrupted(self, trainer: pl.Trainer) -> None:
        self.interrupted = trainer.strategy.reduce_boolean_decision(self.interrupted, all=False)
        if self.interrupted:
            rank_zero_info(f"interrupted: saved {self.folder / LAST}; continue with resume_from=last")
            trainer.should_stop = True

    def _save(self, trainer: pl.Trainer, *, as_best: bool = False) -> None:
        last = self.folder / LAST
        finite = [torch.isfinite(parameter).all() for parameter in trainer.lightning_module.parameters()]
        if not torch.stack(finite).all():  # gradients can overflow although the loss is finite; equal in all processes
            kept = f"{last}, of an earlier step, is kept" if last.exists() else "nothing is saved"
            raise UserError(
                f"the weights are not finite after optimiser step {trainer.global_step}: {kept}; lower learning_rate, "
                "or use precision=32-true"
            )
        if trainer.is_global_zero and last.exists():
            _replace_by_copy(last, self.folder / PREVIOUS)
        # best.ckpt comes first: the state in last.ckpt says that the best value so far has been saved.
        trainer.save_checkpoint(self.folder / BEST if as_best else last)
        if as_best and trainer.is_global_zero:
            _replace_by_copy(self.folder / BEST, last)
        self._saved_at = time.monotonic()

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Restore the previous signal handlers."""
        for number, handler in self._handlers_before.items():
            signal.signal(number, handler)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Release the folder."""
        self._release_folder()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Release the folder after an error."""
        self._release_folder()


class LogShortEpochs(pl.Callback):
    """Log at least once per epoch, also if an epoch has fewer optimiser steps than the logging interval."""

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Lower the interval to the number of steps of an epoch."""
        steps = max(1, int(trainer.num_training_batches) // trainer.accumulate_grad_batches)
        interval = min(getattr(trainer, "log_every_n_steps"), steps)  # noqa: B009  # set by a connector
        setattr(trainer, "log_every_n_steps", interval)  # noqa: B010


def _replace_by_copy(source: Path, target: Path) -> None:
    """Atomically replace `target` by a hard link to `source`, or by a copy if the file system has no hard links."""
    partial = target.with_name(f".{target.name}.partial")
    partial.unlink(missing_ok=True)
    try:
        try:
            os.link(source, partial)  # the next save replaces the name `source`, not the content
        except OSError:  # a file system without hard links
            shutil.copyfile(source, partial)
        os.replace(partial, target)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise UserError(f"cannot write {target}: {error.strerror}; {source} is kept") from error
