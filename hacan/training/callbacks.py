"""What happens around training steps: checkpoints that survive, a clean end on SIGTERM, logs of short epochs."""

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

from hacan.checkpoints.saving import atomic_save
from hacan.errors import UserError
from hacan.lock import FolderLock

BEST, LAST, PREVIOUS = "best.ckpt", "last.ckpt", "previous.ckpt"


def epoch_is_complete(trainer: pl.Trainer) -> bool:
    """Whether the last batch of the running epoch has been trained; not so where a signal has cut it short."""
    return trainer.fit_loop.epoch_loop._num_ready_batches_reached()


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint beside its place and moves it there when it is whole: a crash leaves the old one."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        """Write `checkpoint` to `path` in one step, as the file system sees it."""
        atomic_save(checkpoint, Path(path))


class KeepCheckpoints(Checkpoint):  # Lightning calls a Checkpoint after the module, whose Rsum it needs
    """Keeps last.ckpt after every epoch (the one before it as previous.ckpt), and best.ckpt by validation Rsum.

    On SIGTERM (SLURM's notice before the time limit) the current optimiser step is finished, last.ckpt is written, and
    training ends cleanly; `resume_from=last` goes on with the next batch. `every_minutes` > 0 also writes last.ckpt
    within an epoch, so that a kill -9 costs no more than that.
    """

    def __init__(self, folder: Path, *, every_minutes: float = 10.0) -> None:
        self.folder = folder
        self.every_minutes = every_minutes
        self.best_rsum = float("-inf")
        self.interrupted = False
        self._lock: FolderLock | None = None
        self._saved_at = time.monotonic()
        self._handler_before: Any = None

    @property
    def state_key(self) -> str:
        """The name under which Lightning keeps the state, whatever the class is called."""
        return "KeepCheckpoints"

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run must know: the Rsum to beat."""
        return {"best_rsum": self.best_rsum}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up the Rsum to beat."""
        self.best_rsum = state_dict["best_rsum"]

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Refuse a folder that cannot be written or that another run writes to, before anything is trained.

        The first process decides, also where the folder is: only it knows the record of this run.
        """
        self.folder = Path(trainer.strategy.broadcast(str(self.folder)))
        problem = ""
        if trainer.is_global_zero:
            try:
                self._take_folder()
            except UserError as error:
                problem = str(error)
        problem = trainer.strategy.broadcast(problem)
        if problem:  # said once, by the first process
            raise UserError(problem) if trainer.is_global_zero else SystemExit(2)

    def _take_folder(self) -> None:
        lock = FolderLock(self.folder)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            lock.acquire()
        except OSError as error:
            raise UserError(
                f"cannot write checkpoints to {self.folder}: {error.strerror}; give another folder, save_path=PATH"
            ) from error
        self._lock = lock

    def _give_folder_back(self) -> None:
        if self._lock is not None:
            self._lock.release()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Listen for SIGTERM."""
        self._saved_at = time.monotonic()
        self._handler_before = signal.signal(signal.SIGTERM, self._on_sigterm)

    def _on_sigterm(self, signum: int, frame: FrameType | None) -> None:
        self.interrupted = True

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save within an epoch on SIGTERM or after `every_minutes`, only where an optimiser step is complete.

        After its last batch the epoch's end saves: a run that went on from there would miss that epoch's validation.
        """
        if trainer.fit_loop._should_accumulate() or epoch_is_complete(trainer):
            return
        due = self.every_minutes > 0 and time.monotonic() - self._saved_at > 60 * self.every_minutes
        # Every process must come to the same decision, or some would wait for the others for ever.
        if not trainer.strategy.reduce_boolean_decision(due or self.interrupted, all=False):
            return
        self._save_last(trainer)
        self._stop_if_interrupted(trainer)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write last.ckpt, and best.ckpt when the validation Rsum is the best so far."""
        if not epoch_is_complete(trainer):
            return  # cut short: last.ckpt was written there, and holds the place to go on from
        rsum = float(trainer.callback_metrics.get("val_rsum", float("-inf")))
        better = rsum > self.best_rsum
        self.best_rsum = max(rsum, self.best_rsum)
        self._save_last(trainer)
        if better and trainer.is_global_zero:
            _replace_by_copy(self.folder / LAST, self.folder / BEST)
        self._stop_if_interrupted(trainer)

    def _stop_if_interrupted(self, trainer: pl.Trainer) -> None:
        self.interrupted = trainer.strategy.reduce_boolean_decision(self.interrupted, all=False)
        if self.interrupted:
            rank_zero_info(f"SIGTERM: saved {self.folder / LAST}; go on with resume_from=last")
            trainer.should_stop = True

    def _save_last(self, trainer: pl.Trainer) -> None:
        last = self.folder / LAST
        finite = [torch.isfinite(parameter).all() for parameter in trainer.lightning_module.parameters()]
        if not torch.stack(finite).all():  # a finite loss may have had other gradients; in every process alike
            kept = f"{last}, of an earlier step, is kept" if last.exists() else "nothing is saved"
            raise UserError(
                f"the weights are not finite after optimiser step {trainer.global_step}: {kept}; lower learning_rate, "
                "or use precision=32-true"
            )
        if trainer.is_global_zero and last.exists():
            _replace_by_copy(last, self.folder / PREVIOUS)
        trainer.save_checkpoint(last)
        self._saved_at = time.monotonic()

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Stop listening."""
        signal.signal(signal.SIGTERM, self._handler_before)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Let other runs have the folder."""
        self._give_folder_back()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Let other runs have the folder, after an error too."""
        self._give_folder_back()


class LogShortEpochs(pl.Callback):
    """Logs at least once an epoch, also where an epoch has fewer optimiser steps than the logging interval."""

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Lower the interval to the steps of an epoch."""
        steps = max(1, int(trainer.num_training_batches) // trainer.accumulate_grad_batches)
        trainer.log_every_n_steps = min(trainer.log_every_n_steps, steps)


def _replace_by_copy(source: Path, target: Path) -> None:
    """`target` becomes `source`'s content in one step; a second name of the same file where the disk knows them."""
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
