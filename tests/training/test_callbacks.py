"""The folder of checkpoints: one run at a time, full and read-only disks, and what a failed save leaves."""

import errno
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch

from hacan.errors import UserError, one_line_errors
from hacan.lock import LOCK, OWNER, FolderLock
from hacan.training.callbacks import BEST, LAST, PREVIOUS, AtomicCheckpointIO, KeepCheckpoints, LogShortEpochs


class Tiny(pl.LightningModule):
    """A module with one weight that grows by one per step, and a given Rsum per epoch."""

    def __init__(self, rsums):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.rsums = rsums

    def training_step(self, batch, _):
        self.log("x", 1.0)
        return -self.weight.sum()

    def on_train_epoch_end(self):
        self.log("val_selection", self.rsums[self.current_epoch])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1.0)


def fit(folder, rsums=(10.0, 30.0, 20.0), callbacks=None, ckpt_path=None, **options):
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=len(rsums),
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=callbacks or [KeepCheckpoints(folder)],
        plugins=[AtomicCheckpointIO()],
        **options,
    )
    trainer.fit(Tiny(rsums), torch.utils.data.DataLoader(range(2)), ckpt_path=ckpt_path)
    return trainer


def weight(path):
    return torch.load(path, weights_only=True)["state_dict"]["weight"].item()


def test_last_previous_and_best(tmp_path):
    fit(tmp_path)
    assert [weight(tmp_path / name) for name in (LAST, PREVIOUS, BEST)] == [6.0, 4.0, 4.0]  # two steps an epoch
    assert {path.name for path in tmp_path.iterdir()} == {LAST, PREVIOUS, BEST, LOCK}


def test_a_resumed_run_has_the_old_rsum_to_beat(tmp_path):
    fit(tmp_path)
    fit(tmp_path, rsums=(0.0, 0.0, 0.0, 29.0), ckpt_path=tmp_path / LAST)
    assert (weight(tmp_path / BEST), weight(tmp_path / LAST)) == (4.0, 8.0)
    fit(tmp_path, rsums=(0.0, 0.0, 0.0, 0.0, 31.0), ckpt_path=tmp_path / LAST)
    assert weight(tmp_path / BEST) == 10.0


@pytest.mark.parametrize("fails", [1, 3])
def test_a_full_disk_is_one_line_and_keeps_what_was_there(tmp_path, monkeypatch, fails):
    saves, sync = [], os.fsync

    def full(descriptor):
        saves.append(1)
        if len(saves) == fails:  # a save syncs its file and the folder: 1 is the first save's, 3 the second's
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        sync(descriptor)

    monkeypatch.setattr("hacan.checkpoints.checkpoint.os.fsync", full)
    with pytest.raises(UserError, match=r"cannot write .*(best|last).ckpt: No space left on device") as error:
        fit(tmp_path)
    assert "\n" not in str(error.value)
    whole = [] if fails == 1 else [BEST, LAST, PREVIOUS]
    assert {path.name for path in tmp_path.iterdir()} == {*whole, LOCK}  # no partial file, no owner of the lock
    assert all(weight(tmp_path / name) == 2.0 for name in whole)
    monkeypatch.undo()
    fit(tmp_path, ckpt_path=tmp_path / LAST if whole else None)
    assert weight(tmp_path / LAST) == 6.0


def test_weights_that_are_not_finite_take_no_good_checkpoints_place(tmp_path):
    class Diverges(pl.Callback):
        def on_train_epoch_start(self, trainer, module):
            if trainer.current_epoch == 2:
                module.weight.data.fill_(float("nan"))

    with pytest.raises(UserError, match=rf"not finite after optimiser step 6: .*{LAST}, of an earlier step, is kept"):
        fit(tmp_path, callbacks=[KeepCheckpoints(tmp_path), Diverges()])
    assert [weight(tmp_path / name) for name in (LAST, PREVIOUS, BEST)] == [4.0, 2.0, 4.0]


def test_a_folder_that_cannot_be_written_is_named_before_training(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write checkpoints to .*file/x: Not a directory; .*save_path="):
        fit(tmp_path / "file" / "x")


@pytest.fixture
def no_superuser():
    """A user who may not write to read-only folders, as root may."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    yield
    os.seteuid(0)


@pytest.fixture
def read_only(tmp_path):
    """A folder that its readers can look into; pytest's own are closed to every other user."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run"
        path.mkdir()
        Path(folder).chmod(0o755)
        path.chmod(0o555)
        yield path


def test_a_read_only_folder_is_named_before_training(read_only, no_superuser):
    with pytest.raises(UserError, match=rf"cannot write checkpoints to {read_only}: Permission denied; .*save_path="):
        fit(read_only)
    assert not list(read_only.iterdir())


def test_a_second_run_in_the_folder_is_refused_while_the_first_runs(tmp_path, monkeypatch):
    monkeypatch.setattr("hacan.lock.WAIT_SECONDS", 0)
    with FolderLock(tmp_path, remedy=""):
        with pytest.raises(UserError, match=rf"in use by .*process {os.getpid()} on .*save_path=PATH"):
            fit(tmp_path)
        assert {path.name for path in tmp_path.iterdir()} == {LOCK, OWNER}  # the refused run changes nothing
    fit(tmp_path)
    FolderLock(tmp_path, remedy="", wait=0).acquire()


def test_a_killed_process_releases_the_folder(tmp_path):
    code = (
        "import sys, time, pathlib; from hacan.lock import FolderLock\n"
        f"lock = FolderLock(pathlib.Path({str(tmp_path)!r}), remedy=''); lock.acquire()\n"
        "print('locked', flush=True); time.sleep(60)"
    )
    holder = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == "locked\n"
    with pytest.raises(UserError, match=f"process {holder.pid} on .*; wait"):
        FolderLock(tmp_path, remedy="wait", wait=0).acquire()
    holder.kill()
    holder.wait()
    FolderLock(tmp_path, remedy="", wait=0).acquire()


@pytest.mark.parametrize("content", ["[]", "{", '{"pid": 1}'])
def test_a_damaged_lock_file_is_no_obstacle(tmp_path, content):
    (tmp_path / LOCK).write_text(content)
    (tmp_path / OWNER).write_text(content)
    first = FolderLock(tmp_path, remedy="", wait=0)
    first.acquire()
    (tmp_path / OWNER).write_text(content)
    with pytest.raises(UserError, match="in use by another process; wait"):
        FolderLock(tmp_path, remedy="wait", wait=0).acquire()
    first.release()
    first.release()


def test_best_is_saved_before_last(tmp_path, monkeypatch):
    """A kill between the two must not leave a last.ckpt whose state claims a best that is not there."""
    saved = []
    save = pl.Trainer.save_checkpoint
    monkeypatch.setattr(
        pl.Trainer, "save_checkpoint", lambda self, path, *rest: (saved.append(path.name), save(self, path, *rest))
    )
    fit(tmp_path, callbacks=[KeepCheckpoints(tmp_path)])
    assert "best.ckpt" in saved and saved.index("best.ckpt") < saved.index("last.ckpt")


def test_a_disk_that_is_full_elsewhere_is_one_line_too_and_other_errors_keep_their_traceback(capsys):
    for error, words in ((OSError(errno.ENOSPC, "No space left"), "free space"), (UserError("so"), "error: so")):
        with pytest.raises(SystemExit) as ended, one_line_errors():
            raise error
        assert ended.value.code == 2
        printed = capsys.readouterr().err
        assert words in printed and printed.count("\n") == 1
    for other in (OSError(errno.EIO, "a disk that breaks"), RuntimeError("a bug of ours")):
        with pytest.raises(type(other)), one_line_errors():
            raise other


def test_an_error_releases_the_folder(tmp_path):
    class Broken(pl.Callback):
        def on_train_batch_start(self, *_):
            assert (tmp_path / OWNER).exists()
            raise ArithmeticError

    with pytest.raises(ArithmeticError):
        fit(tmp_path, callbacks=[KeepCheckpoints(tmp_path), Broken()])
    FolderLock(tmp_path, remedy="", wait=0).acquire()


def test_short_epochs_are_logged_too(tmp_path):
    short = fit(tmp_path / "a", callbacks=[LogShortEpochs()], log_every_n_steps=10, enable_checkpointing=False)
    assert short.log_every_n_steps == 2
    long = fit(tmp_path / "b", callbacks=[LogShortEpochs()], log_every_n_steps=1, enable_checkpointing=False)
    assert long.log_every_n_steps == 1
