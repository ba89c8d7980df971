"""What happens around training steps: checkpoints that survive, and a clean end on SIGTERM."""

import os
import shutil
import signal
import time
from pathlib import Path
from types import FrameType
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Checkpoint
from pytorch_lightning.plugins.io import TorchCheckpointIO
from pytorch_lightning.utilities.rank_zero import rank_zero_info

from hacan.checkpoints import atomic_save
from hacan.errors import UserError

BEST, LAST, PREVIOUS = "best.ckpt", "last.ckpt", "previous.ckpt"


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
        self._saved_at = time.monotonic()
        self._handler_before: Any = None

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run must know: the Rsum to beat."""
        return {"best_rsum": self.best_rsum}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up the Rsum to beat."""
        self.best_rsum = state_dict["best_rsum"]

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Refuse a folder that cannot be written, before anything is trained."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            probe = self.folder / f".probe-{os.getpid()}"
            probe.touch()
            probe.unlink()
        except OSError as error:
            raise UserError(
                f"cannot write checkpoints to {self.folder}: {error.strerror}; give another folder, save_path=PATH"
            ) from error

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Listen for SIGTERM."""
        self._saved_at = time.monotonic()
        self._handler_before = signal.signal(signal.SIGTERM, self._on_sigterm)

    def _on_sigterm(self, signum: int, frame: FrameType | None) -> None:
        self.interrupted = True

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save within an epoch on SIGTERM or after `every_minutes`, only where an optimiser step is complete."""
        if trainer.fit_loop._should_accumulate():
            return
        # Every process must come to the same decision, or some would wait for the others for ever.
        interrupted = trainer.strategy.reduce_boolean_decision(self.interrupted, all=False)
        due = self.every_minutes > 0 and time.monotonic() - self._saved_at > 60 * self.every_minutes
        if interrupted or trainer.strategy.reduce_boolean_decision(due, all=False):
            self._save_last(trainer)
        if interrupted:
            rank_zero_info(f"SIGTERM: saved {self.folder / LAST}; go on with resume_from=last")
            trainer.should_stop = True

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write last.ckpt, and best.ckpt when the validation Rsum is the best so far."""
        if self.interrupted and not trainer.fit_loop.epoch_loop._num_ready_batches_reached():
            return  # stopped within the epoch: last.ckpt was written there, and holds the place to go on from
        rsum = float(trainer.callback_metrics.get("val_rsum", float("-inf")))
        better = rsum > self.best_rsum
        self.best_rsum = max(rsum, self.best_rsum)
        self._save_last(trainer)
        if better and trainer.is_global_zero:
            _replace_by_copy(self.folder / LAST, self.folder / BEST)

    def _save_last(self, trainer: pl.Trainer) -> None:
        last = self.folder / LAST
        if trainer.is_global_zero and last.exists():
            _replace_by_copy(last, self.folder / PREVIOUS)
        trainer.save_checkpoint(last)
        self._saved_at = time.monotonic()

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Stop listening."""
        signal.signal(signal.SIGTERM, self._handler_before)


def _replace_by_copy(source: Path, target: Path) -> None:
    """`target` becomes `source`'s content in one step; a second name of the same file where the disk knows them."""
    partial = target.with_name(f".{target.name}.partial")
    partial.unlink(missing_ok=True)
    try:
        os.link(source, partial)  # the next save replaces the name `source`, not the content
    except OSError:  # a file system without hard links
        shutil.copyfile(source, partial)
    os.replace(partial, target)
