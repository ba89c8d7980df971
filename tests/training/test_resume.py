"""A run that was killed anywhere and resumed ends as one that was never interrupted, bit for bit."""

import os
import shutil
import signal

import pytest
import torch
from tiny_run import TINY_DEMO, assert_same, run_py, train_here

from config import ex
from hacan import pipeline
from hacan.errors import UserError
from hacan.lock import OWNER
from hacan.settings import Settings
from hacan.training.callbacks import BEST, LAST, PREVIOUS, SIGNALS, KeepCheckpoints
from hacan.training.module import TrainingModule
from hacan.training.resume import check_same_run, checkpoint_to_resume

PARTS = ("state_dict", "optimizer_states", "callbacks", "PairDataModule", "global_step", "epoch")
EXACT = {  # 60 pairs: 3 steps of 2 batches an epoch; backbones wake up in the second, the rate falls in the third
    **TINY_DEMO,
    "max_epoch": 3,
    "freeze_backbone_epochs": 1,
    "lr_decay_every": 2,
}


class Killed(Exception):
    """Raised in place of a SIGKILL."""


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """As many threads here as `run_py` gives its processes: sums of another number of threads round otherwise."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return tmp_path_factory.mktemp("demo")


@pytest.fixture
def settings_in(pictures):
    """Return the settings of the tiny demo with checkpoints in `folder`."""
    run = ex._create_run("print_config", named_configs=["demo_config"])
    defaults = dict(run.config.items())

    def make(folder, **updates):
        places = {"data_root": str(pictures), "save_path": str(folder / "checkpoints"), "log_dir": str(folder)}
        return Settings.from_flat({**defaults, **EXACT, **places, **updates})

    return make


@pytest.fixture
def kill_at(monkeypatch):
    """Save after every step, and call `how` after a number of batches."""

    def install(batches, how):
        class Until(KeepCheckpoints):
            seen = 0

            def __init__(self, folder):
                super().__init__(folder, every_minutes=1e-9)

            def on_train_batch_end(self, trainer, *arguments):
                self.seen += 1
                if self.seen == batches and how is sigterm:
                    how()
                super().on_train_batch_end(trainer, *arguments)
                if self.seen == batches and how is not sigterm:
                    how()

        monkeypatch.setattr("hacan.training.trainer.KeepCheckpoints", Until)
        return monkeypatch

    return install


def killed():
    raise Killed


def sigterm():
    os.kill(os.getpid(), signal.SIGTERM)


def sigint():
    os.kill(os.getpid(), signal.SIGINT)


def sighup():
    os.kill(os.getpid(), signal.SIGHUP)


WHOLE = {}


@pytest.fixture
def whole(settings_in, tmp_path_factory):
    """The checkpoint folder of a run that nothing interrupted."""
    if not WHOLE:
        folder = tmp_path_factory.mktemp("whole")
        WHOLE["best"] = train_here(settings_in(folder), folder)
    return WHOLE["best"].parent


def same_end(folder, whole):
    ends = [torch.load(place / LAST, weights_only=True) for place in (folder, whole)]
    for part in PARTS:
        assert_same(ends[0][part], ends[1][part], part)
    bests = [torch.load(place / BEST, weights_only=True)["state_dict"] for place in (folder, whole)]
    assert_same(*bests, "best")


# 6 batches an epoch, a step every 2: in the middle of a step, after an epoch's last batch, later, in the last epoch
@pytest.mark.parametrize("batches", [5, 6, pytest.param(9, marks=pytest.mark.slow), 16])
def test_a_killed_run_ends_as_if_it_had_not_been(settings_in, kill_at, whole, tmp_path, batches):
    patched = kill_at(batches, killed)
    with pytest.raises(Killed):
        train_here(settings_in(tmp_path), tmp_path)
    patched.undo()
    assert not (tmp_path / "checkpoints" / OWNER).exists()
    best = train_here(settings_in(tmp_path, resume_from="last"), tmp_path)
    assert best == tmp_path / "checkpoints" / BEST
    same_end(best.parent, whole)


# in the middle of a step, in the last epoch, at its very end
@pytest.mark.parametrize(
    ("batches", "send"),
    [(9, sigterm), (9, sigint), (9, sighup), pytest.param(15, sigterm, marks=pytest.mark.slow), (18, sigterm)],
)
def test_a_signal_saves_and_ends_and_the_rest_follows(
    settings_in, kill_at, whole, tmp_path, batches, send, monkeypatch
):
    validated = []
    validate = pipeline.validate
    monkeypatch.setattr(pipeline, "validate", lambda *a, **k: validated.append(1) or validate(*a, **k))
    before = [signal.getsignal(number) for number in SIGNALS]
    kill_at(batches, send)
    assert train_here(settings_in(tmp_path), tmp_path) is None
    assert [signal.getsignal(number) for number in SIGNALS] == before
    assert len(validated) == batches // 6  # the epoch that was cut short waits for no validation
    monkeypatch.undo()
    best = train_here(settings_in(tmp_path, resume_from="last"), tmp_path)
    same_end(best.parent, whole)


def test_the_same_seed_gives_the_same_run_and_another_seed_another(settings_in, whole, tmp_path):
    again = train_here(settings_in(tmp_path / "again"), tmp_path / "again")
    same_end(again.parent, whole)
    other = train_here(settings_in(tmp_path / "other", seed=1, max_epoch=1), tmp_path / "other")
    states = [torch.load(path, weights_only=True)["state_dict"] for path in (other, again)]
    assert any(not torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_training_on_keeps_the_best_in_the_same_folder_or_brings_it_along(settings_in, whole, tmp_path):
    shutil.copytree(whole, tmp_path / "old")
    kept = torch.load(tmp_path / "old" / LAST, weights_only=True)
    kept["callbacks"]["KeepCheckpoints"]["best_rsum"] = 601.0  # no later epoch is better
    torch.save(kept, tmp_path / "old" / LAST)
    before = (tmp_path / "old" / BEST).read_bytes()
    updates = {"resume_from": str(tmp_path / "old" / LAST), "max_epoch": 4}
    moved = train_here(settings_in(tmp_path / "new", **updates), tmp_path / "new")
    assert moved == tmp_path / "old" / BEST
    assert (tmp_path / "new" / "checkpoints" / LAST).is_file()
    assert train_here(settings_in(tmp_path / "x", save_path="", **updates), tmp_path / "x") == moved
    assert moved.read_bytes() == before
    assert torch.load(tmp_path / "old" / LAST, weights_only=True)["epoch"] == 3


def test_a_truncated_checkpoint_is_named_and_the_one_before_it_offered(settings_in, whole, tmp_path):
    shutil.copytree(whole, tmp_path / "checkpoints")
    last = tmp_path / "checkpoints" / LAST
    last.write_bytes(last.read_bytes()[:5000])
    (tmp_path / "checkpoints" / BEST).unlink()
    with pytest.raises(UserError, match=rf"{LAST}.*{PREVIOUS}") as error:
        train_here(settings_in(tmp_path, resume_from="last"), tmp_path)
    assert "\n" not in str(error.value)
    previous = str(tmp_path / "checkpoints" / PREVIOUS)
    best = train_here(settings_in(tmp_path, resume_from=previous), tmp_path)
    assert_same(
        torch.load(best.parent / LAST, weights_only=True)["state_dict"],
        torch.load(whole / LAST, weights_only=True)["state_dict"],
    )


def test_a_loss_that_is_not_finite_keeps_the_last_good_checkpoint(settings_in, tmp_path, monkeypatch):
    losses = TrainingModule.batch_loss

    def diverge(self, *arguments, **options):
        total, terms = losses(self, *arguments, **options)
        bad = self.current_epoch == 1 and self.trainer.fit_loop.epoch_loop.batch_idx == 3
        return (total * float("nan"), terms | {"total": float("nan")}) if bad else (total, terms)

    monkeypatch.setattr(TrainingModule, "batch_loss", diverge)
    with pytest.raises(
        UserError, match=r"not finite at epoch 1, batch 3, optimiser step 4 \(total nan, triplet .*captions"
    ):
        train_here(settings_in(tmp_path), tmp_path)
    last = tmp_path / "checkpoints" / LAST
    kept = torch.load(last, weights_only=True)
    assert kept["epoch"] == 0 and all(torch.isfinite(value).all() for value in kept["state_dict"].values())
    monkeypatch.undo()
    train_here(settings_in(tmp_path, resume_from=str(last), max_epoch=2), tmp_path)  # and one can go on from there
    assert torch.load(last, weights_only=True)["epoch"] == 1


def test_another_model_or_other_batches_are_refused(settings_in, whole, tmp_path, caplog):
    last = str(whole / LAST)
    for updates in ({"embed_dim": 17}, {"per_gpu_batchsize": 5}, {"direction": "i2t"}):
        with pytest.raises(UserError, match=f"^{next(iter(updates))}=.*checkpoint=PATH"):
            train_here(settings_in(tmp_path, resume_from=last, **updates), tmp_path)
    check_same_run(
        settings_in(tmp_path, margin=0.3), torch.load(last, weights_only=True)["hacan"]["settings"], source=last
    )
    assert "margin was 0.2, is 0.3" in caplog.text
    assert "max_epoch" not in caplog.text


def test_resume_from_nowhere_says_where_it_looked(settings_in, tmp_path):
    for wanted, words in (("last", "no last.ckpt in"), (str(tmp_path / "x.ckpt"), "no such file")):
        with pytest.raises(UserError, match=words):
            train_here(settings_in(tmp_path, resume_from=wanted), tmp_path)


KILLER = """
import os, runpy, signal, sys
from hacan.training.callbacks import KeepCheckpoints
step, seen, until = KeepCheckpoints.on_train_batch_end, [], int(os.environ["KILL_AT"])
def on_train_batch_end(self, *arguments):
    self.every_minutes = 1e-9
    step(self, *arguments)
    seen.append(1)
    if len(seen) == until:
        os.kill(os.getpid(), signal.SIGKILL)
KeepCheckpoints.on_train_batch_end = on_train_batch_end
sys.argv[0] = "run.py"
runpy.run_path("run.py", run_name="__main__")
"""


@pytest.mark.slow
def test_sigkill_in_the_middle_of_an_epoch_costs_nothing(whole, pictures, tmp_path, monkeypatch):
    (tmp_path / "killer.py").write_text(KILLER)
    monkeypatch.setenv("KILL_AT", "9")
    arguments = {**EXACT, "data_root": pictures, "log_dir": tmp_path}
    done = run_py(script=tmp_path / "killer.py", **arguments)
    assert done.returncode == -signal.SIGKILL, done.stderr
    checkpoints = tmp_path / "demo" / "1" / "checkpoints"
    assert (checkpoints / OWNER).exists()  # of the killed process
    done = run_py(**arguments, resume_from="last")
    assert done.returncode == 0, done.stderr
    assert "resuming from" in done.stderr
    assert not (checkpoints / OWNER).exists()
    same_end(checkpoints, whole)


def test_last_is_the_highest_run_number_whatever_the_time_stamps(settings_in, tmp_path):
    for number, stamp in ((2, 3_000_000_000), (10, 1_000_000_000), (9, 2_000_000_000)):
        path = tmp_path / "home" / str(number) / "checkpoints" / LAST
        path.parent.mkdir(parents=True)
        path.touch()
        os.utime(path, (stamp, stamp))
    settings = settings_in(tmp_path, resume_from="last", save_path="")
    assert checkpoint_to_resume(settings, tmp_path / "home") == tmp_path / "home" / "10" / "checkpoints" / LAST
