"""The console of a training: our lines, Lightning's warnings, none of its tips."""

import logging
import warnings

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities.rank_zero import rank_zero_info, rank_zero_warn

from hacan.training.console import HIDDEN_WARNINGS, ProgressBar, hide_framework_messages


def test_tips_are_left_out_and_what_matters_is_not(caplog):
    hide_framework_messages()
    hide_framework_messages()  # once a trainer
    with caplog.at_level(logging.INFO):
        rank_zero_info("💡 Tip: For seamless cloud logging, try something else")
        rank_zero_info("TPU available: False, using: 0 TPU cores")
        rank_zero_info("GPU available: True (cuda), used: True")
        rank_zero_info("SIGTERM: saved last.ckpt")
    assert [record.getMessage()[:7] for record in caplog.records] == ["GPU ava", "SIGTERM"]


def test_warnings_that_matter_are_shown():
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        hide_framework_messages()
        rank_zero_warn("It is recommended to use `self.log('val/rsum', ..., sync_dist=True)` when logging")
        rank_zero_warn("The train_dataloader does not have many workers which may be a bottleneck")
        warnings.warn("Grad strides do not match bucket view strides. This may indicate", stacklevel=1)
        warnings.warn("lr_scheduler.step() before optimizer.step()", stacklevel=1)
    assert [str(warning.message)[:8] for warning in shown] == ["The trai", "lr_sched"]
    assert len(HIDDEN_WARNINGS) == 5


@pytest.mark.filterwarnings("ignore")
def test_lightning_still_gives_its_tips_in_the_words_that_are_left_out(caplog, tmp_path, monkeypatch):
    """A new version of the package may have other numbers; then update these."""
    for talker in ("pytorch_lightning.utilities.rank_zero", "lightning_fabric.utilities.rank_zero"):
        monkeypatch.setattr(logging.getLogger(talker), "filters", [])
    with caplog.at_level(logging.INFO):
        pl.Trainer(accelerator="cpu", logger=True, enable_checkpointing=True, default_root_dir=tmp_path)
    assert "💡 Tip" in caplog.text and "TPU available" in caplog.text


def test_the_bar_shows_no_version(monkeypatch):
    monkeypatch.setattr(
        "pytorch_lightning.callbacks.progress.progress_bar.get_standard_metrics", lambda _: {"v_num": "_csv"}
    )
    trainer = pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
    trainer.fit_loop.epoch_loop._results = None
    monkeypatch.setattr(type(trainer), "progress_bar_metrics", {"loss": torch.tensor(1.0)})
    assert list(ProgressBar().get_metrics(trainer, None)) == ["loss"]
