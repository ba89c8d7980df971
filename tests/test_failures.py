"""What happens to people: full and closed disks, a second run, odd captions, images that are none."""

import datetime
import errno
import json
import os
import struct
import subprocess
import tempfile
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from sacred.observers import FileStorageObserver
from tiny_run import TINY_DEMO, run_py, settings_of, train_here

from datamodules.datamodule import build_data
from datamodules.tokens import load_tokenizer
from hacan import pipeline
from hacan.checkpoints.loading import open_models
from hacan.errors import UserError, one_line_errors, require_writable
from hacan.lock import LOCK, OWNER, FolderLock
from hacan.sacred_setup import RunRecord
from hacan.training.callbacks import LAST

ODD = (
    "a red dog " * 3334,  # 10,002 words
    "",
    " \n\t ",
    "\U0001f415\u200d\U0001f9ba \U0001f600 a dog",
    "\ud83d half an emoji",
    "a\0dog \0",
    "Ünïcödé 犬 ﷽",
    "a red dog",
)


# ------------------------------------------------------------------------------------------------------ own data, odd


def bomb():
    """The head of a PNG of 3 gigapixels."""
    return b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" + struct.pack(">II", 60_000, 50_000) + bytes(99)


@pytest.fixture
def odd_data(tmp_path):
    """Eight images with two odd captions each; two of the training ones are a bomb and no image at all."""
    rows = []
    for number in range(8):
        name = f"{number} \U0001f600.png"
        pixels = np.random.default_rng(number).integers(0, 256, (40, 50, 3), dtype=np.uint8)
        (tmp_path / name).write_bytes(cv2.imencode(".png", pixels)[1].tobytes())
        split = {6: "val", 7: "test"}.get(number, "train")
        rows += [{"image": name, "split": split, "caption": ODD[(number + shift) % len(ODD)]} for shift in (0, 3)]
    (tmp_path / "captions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "2 \U0001f600.png").write_bytes(bomb())
    (tmp_path / "4 \U0001f600.png").write_bytes(b"<html>404</html>")
    return tmp_path


def test_unusual_captions_are_trained_on_and_bad_images_skipped(odd_data, caplog):
    updates = {"datasets": "captions", "batch_size": 4, "per_gpu_batchsize": 2, "max_text_len": 40}
    with pytest.raises(UserError, match=r"image .*[24] \U0001f600.png .*on_bad_image=skip") as error:
        train_here(settings_of(odd_data, **updates), odd_data)
    assert "\n" not in str(error.value)
    assert "cannot be decoded" in str(error.value)
    best = train_here(settings_of(odd_data, **updates, on_bad_image="skip"), odd_data)
    assert "epoch 0: 2 unreadable image(s) skipped" in caplog.text
    settings = settings_of(odd_data, **updates, checkpoint=str(best), test_only=True)
    models, tokenizer, settings = open_models(settings, load_tokenizer)
    data = build_data(settings, tokenizer)
    found = pipeline.test(settings, models, [str(best)], data, run_folder=odd_data / "out", home=odd_data / "home")
    assert found.hierarchical.r10_t2i == 100.0  # one image: each of its odd captions finds it


# ------------------------------------------------------------------------------------------------------------- disks


@pytest.fixture
def small_disk():
    """A disk of 1.2 MiB, where this user may mount one; a checkpoint of the tiny demo takes 0.6."""
    with tempfile.TemporaryDirectory() as folder:
        mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1200k", "tmpfs", folder], capture_output=True)
        if mounted.returncode:
            pytest.skip("mounting a small disk takes a superuser; tests/test_callbacks.py makes writes fail instead")
        yield Path(folder)
        subprocess.run(["umount", folder], check=True)


def test_a_disk_that_fills_up_stops_the_run_and_keeps_what_was_saved(small_disk, tmp_path):
    settings = settings_of(tmp_path, save_path=str(small_disk), max_epoch=4)
    with pytest.raises(UserError, match=rf"cannot write {small_disk}/.*: No space left on device.*is kept") as error:
        train_here(settings, tmp_path)
    assert "\n" not in str(error.value)
    kept = torch.load(small_disk / LAST, weights_only=True)
    assert not list(small_disk.glob("*.partial")) and not [path for path in small_disk.glob(".*") if path.name != LOCK]
    moved = settings_of(tmp_path, resume_from=str(small_disk / LAST), max_epoch=kept["epoch"] + 2)
    train_here(moved, tmp_path)  # on a larger disk it goes on
    assert torch.load(tmp_path / "checkpoints" / LAST, weights_only=True)["epoch"] == kept["epoch"] + 1


NOW = datetime.datetime(2026, 1, 2)


def full(*_, **__):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "source", None, "the target")


STARTED = {
    "ex_info": {"base_dir": ".", "sources": []},
    "command": "main",
    "host_info": {},
    "meta_info": {},
    "_id": None,
}


def test_a_record_that_cannot_be_begun_ends_the_program(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(FileStorageObserver, "save_json", full)
    record = RunRecord(tmp_path)
    with pytest.raises(SystemExit) as ended:
        record.started_event(**STARTED, config={}, start_time=NOW)
    assert ended.value.code == 2
    assert capsys.readouterr().err == (
        "error: No space left on device: the target; free space there, then continue with resume_from=last\n"
    )
    record.failed_event(NOW, [])  # Sacred says this next: there is nothing to note it in


def test_a_record_that_cannot_go_on_stays_as_it_was(tmp_path, monkeypatch, caplog):
    record = RunRecord(tmp_path)
    record.started_event(**STARTED, config={"seed": 3}, start_time=NOW)
    before = (tmp_path / "1" / "run.json").read_text()
    with monkeypatch.context() as patched:
        patched.setattr(FileStorageObserver, "save_json", full)
        for _ in range(3):
            record.heartbeat_event({}, "", NOW, None)
    assert caplog.text.count("run.json, stays as it was: No space left on device") == 1
    assert (tmp_path / "1" / "run.json").read_text() == before
    record.completed_event(NOW, {"rsum": 1.0})  # space again
    assert json.loads((tmp_path / "1" / "run.json").read_text())["status"] == "COMPLETED"


def test_a_copy_that_fills_the_disk_names_its_target(capsys):
    with pytest.raises(SystemExit), one_line_errors():
        full()
    assert "the target;" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["closed", "file"])
def test_a_folder_of_logs_that_cannot_be_written_is_named_first(tmp_path, monkeypatch, kind):
    (tmp_path / "file").write_text("")
    folder = tmp_path / "file" / "x" if kind == "file" else tmp_path / "y"
    if kind == "closed":  # root may write to read-only folders
        monkeypatch.setattr("hacan.errors.tempfile.TemporaryFile", _refused)
    with pytest.raises(UserError, match=rf"^log_dir: nothing can be written to {folder} \(.+\); give another folder$"):
        require_writable(folder, key="log_dir")
    require_writable(tmp_path / "new" / "folder", key="log_dir") if kind == "file" else None


def _refused(*_, **__):
    raise PermissionError(errno.EROFS, os.strerror(errno.EROFS))


@pytest.mark.slow
def test_the_command_line_says_it_in_one_line_and_leaves_the_other_run_alone(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    lock = FolderLock(tmp_path / "checkpoints", remedy="")
    lock.acquire()
    arguments = {**TINY_DEMO, "data_root": tmp_path / "data", "log_dir": tmp_path / "log"}
    second = run_py(**arguments, save_path=tmp_path / "checkpoints")
    closed = run_py(**{**arguments, "log_dir": "/proc/nowhere"})
    for done, words in (
        (second, "in use by another process"),
        (closed, "log_dir=/proc/nowhere: nothing can be written"),
    ):
        assert done.returncode == 2 and "Traceback" not in done.stderr
        assert [words in line for line in done.stderr.splitlines() if line.startswith("error: ")] == [True]
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {LOCK, OWNER}
    lock.release()
