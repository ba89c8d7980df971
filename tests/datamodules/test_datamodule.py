import os
import signal

import cv2
import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from bad_json import error_of
from hypothesis import given, settings
from hypothesis import strategies as st

from datamodules.datamodule import PairDataModule
from datamodules.records import CaptionedImage
from datamodules.sampling import TrainingOrder, derived_seed
from datamodules.tokens import load_tokenizer
from datamodules.training_data import seeded
from datamodules.transforms import PHOTOS, evaluation_transform
from hacan.errors import UserError
from hacan.images.preprocessing import normalise
from hacan.types import PairBatch

TOKENIZER = load_tokenizer("scenes")
CAPTIONS = (3, 1, 5, 0, 2, 4, 5, 2)  # of the eight train images: 22 pairs
VAL_CAPTIONS = (2, 0, 3, 1, 1)


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    found = []
    for split, counts in {"val": VAL_CAPTIONS, "train": CAPTIONS}.items():
        for number, count in enumerate(counts):
            path = folder / f"{split} {number}.png"
            pixels = np.random.default_rng(number).integers(0, 256, (20 + number, 33, 3), dtype=np.uint8)
            cv2.imwrite(str(path), pixels)
            captions = tuple("red " * (1 + (number + caption) % 4) for caption in range(count))
            found.append(CaptionedImage(path, captions, 1000 + number, split))
    return found


MADE = []


@pytest.fixture(autouse=True)
def workers_end_with_their_test():
    yield
    while MADE:
        MADE.pop().teardown("fit")


def module(records, **changes):
    arguments = {
        "records": records,
        "tokenizer": TOKENIZER,
        "image_size": 16,
        "max_text_len": 5,
        "batch_size": 4,
        "per_gpu_batchsize": 2,
        "num_workers": 0,
        "seed": 5,
        "progress": False,
    }
    MADE.append(PairDataModule(**{**arguments, **changes}))
    return MADE[-1]


def order(**changes):
    return TrainingOrder(**{"n_pairs": 23, "batch_size": 6, "per_gpu_batchsize": 3, "seed": 1, **changes})


def pairs_of(batches):
    return [[pair for _, pair in batch] for batch in batches]


def by_row(batches):
    return {int(row): image for rows, images in batches for row, image in zip(rows, images, strict=True)}


def flat(batches):
    return [pair for batch in batches for pair in batch]


def same(one, other):
    return len(one) == len(other) and all(
        all(torch.equal(a, b) for a, b in zip(x, y, strict=True)) for x, y in zip(one, other, strict=True)
    )


# order


def test_an_epoch_is_a_shuffle_without_its_uneven_step():
    batches = pairs_of(order())
    assert len(batches) == len(order()) == 6 and all(len(batch) == 3 for batch in batches)  # 3 steps of 6 pairs
    pairs = flat(batches)
    assert len(set(pairs)) == 18 and pairs != sorted(pairs) and order().n_left_out == 5


def test_the_uneven_step_is_kept_without_drop_last():
    batches = pairs_of(order(drop_last=False))
    assert [len(batch) for batch in batches] == [3] * 7 + [2] and sorted(flat(batches)) == list(range(23))
    assert batches[:6] == pairs_of(order()) and order(drop_last=False).n_left_out == 0
    shards = [pairs_of(order(drop_last=False, rank=rank, world_size=2)) for rank in range(2)]
    assert [[len(batch) for batch in shard] for shard in shards] == [[3, 3, 3, 3], [3, 3, 3, 2]]
    # with 3 processes, a chunk of 2 pairs cannot be shared
    assert len(flat(pairs_of(order(drop_last=False, per_gpu_batchsize=1, world_size=3)))) == 7


def test_epochs_differ_and_repeat_themselves():
    first, again, second, other_seed = order(), order(), order(), order(seed=2)
    second.set_epoch(1)
    assert pairs_of(first) == pairs_of(again)
    assert len({str(pairs_of(batches)) for batches in (first, second, other_seed)}) == 3
    assert {epoch for batch in second for epoch, _ in batch} == {1}


@pytest.mark.parametrize("batch", range(7))
def test_it_starts_at_any_batch(batch):
    part = order()
    part.set_position(2, batch)
    whole = order()
    whole.set_position(2, 0)
    if batch < 6:
        assert pairs_of(part) == pairs_of(whole)[batch:]
    else:
        assert (part.epoch, part.next_batch) == (3, 0)
    assert len(part) == 6


def test_set_epoch_keeps_the_position_of_the_epoch_that_runs():
    batches = order()
    batches.set_position(2, 4)
    batches.set_epoch(2)
    assert (batches.epoch, batches.next_batch) == (2, 4)
    batches.set_epoch(3)
    assert (batches.epoch, batches.next_batch) == (3, 0)


@settings(max_examples=100, deadline=None)
@given(n_pairs=st.integers(1, 70), steps=st.integers(1, 3), per_gpu=st.integers(1, 4), world=st.integers(1, 4))
def test_a_step_takes_the_same_pairs_whatever_the_number_of_processes(n_pairs, steps, per_gpu, world):
    sizes = {"n_pairs": n_pairs, "batch_size": steps * per_gpu * world}
    if n_pairs < world:
        with pytest.raises(ValueError, match="n_pairs"):
            order(**sizes, per_gpu_batchsize=per_gpu, world_size=world)
        return
    shares = [pairs_of(order(**sizes, per_gpu_batchsize=per_gpu, rank=rank, world_size=world)) for rank in range(world)]
    alone = pairs_of(order(**sizes, per_gpu_batchsize=per_gpu * world))
    assert len({len(share) for share in shares}) == 1
    together = [flat(parts) for parts in zip(*shares, strict=True)]
    assert together == alone[: len(together)]
    assert all(parts for share in shares for parts in share)
    dropped = sum(map(len, alone)) - sum(map(len, together))
    assert dropped < world and (not dropped or n_pairs < sizes["batch_size"])  # only the tail of an only step


def test_a_data_set_smaller_than_a_step_is_one_uneven_step():
    batches = pairs_of(order(n_pairs=5, batch_size=8, per_gpu_batchsize=2))
    assert [len(batch) for batch in batches] == [2, 2, 1]
    assert sorted(flat(batches)) == [0, 1, 2, 3, 4]


def test_wrong_sizes_are_refused():
    for changes in ({"batch_size": 7}, {"rank": 2, "world_size": 2}, {"rank": -1}):
        with pytest.raises(ValueError):
            order(**changes)
    for position in ((0, 7), (-1, 0), (0, -1)):
        with pytest.raises(ValueError, match="expected epoch"):
            order().set_position(*position)


def test_seeds_of_neighbours_are_unrelated_and_leave_the_outer_generator_alone():
    assert len({derived_seed(a, b) for a in range(20) for b in range(20)}) == 400
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    with seeded(7):
        inner = torch.rand(1)
    assert torch.equal(torch.rand(2), expected)
    with seeded(7):
        assert torch.equal(torch.rand(1), inner)


# training batches


def test_batches_hold_what_the_records_say(records):
    train = [record for record in records if record.split == "train"]
    captions = [(record.image_id, caption) for record in train for caption in record.captions]
    loader = module(records).train_dataloader()
    assert len(loader) == 10
    seen = []
    for batch in loader:
        assert isinstance(batch, PairBatch) and batch.images.shape == (2, 3, 16, 16)
        assert batch.images.dtype == torch.float32 and batch.token_ids.shape[1] == batch.token_mask.sum(dim=1).max()
        for row in range(2):
            image_id, caption = captions[batch.caption_ids[row]]
            assert batch.image_ids[row] == image_id
            words = TOKENIZER(caption, truncation=True, max_length=5).input_ids
            assert batch.token_ids[row][batch.token_mask[row]].tolist() == words
            assert (batch.token_ids[row][~batch.token_mask[row]] == TOKENIZER.pad_token_id).all()
        seen += batch.caption_ids.tolist()
    assert len(set(seen)) == 20


def test_pixels_are_the_images_and_augmentation_differs_between_epochs_and_pairs(records):
    loader = module(records).train_dataloader()
    epochs = []
    for epoch in range(2):
        loader.sampler.set_epoch(epoch)
        epochs.append(
            {int(c): image for batch in loader for c, image in zip(batch.caption_ids, batch.images, strict=True)}
        )
    common = set(epochs[0]) & set(epochs[1])
    assert len(common) > 10
    assert not any(torch.equal(epochs[0][caption], epochs[1][caption]) for caption in common)
    assert not torch.equal(epochs[0][4], epochs[0][5])  # one image, two captions: two crops


def test_workers_change_nothing_nor_does_the_global_seed(records):
    torch.manual_seed(1)
    alone = list(module(records).train_dataloader())
    torch.manual_seed(2)
    loader = module(records, num_workers=2).train_dataloader()
    assert same(alone, list(loader))
    second = module(records).train_dataloader()
    second.sampler.set_epoch(1)
    assert same(list(second), list(loader))  # the loader goes on with its next epoch by itself, workers alive


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("done", [1, 4, 10])
def test_a_resumed_loader_gives_the_very_next_batch(records, num_workers, done):
    loader = module(records, num_workers=num_workers).train_dataloader()
    iterator = iter(loader)
    for _ in range(done):
        next(iterator)
    state = loader.state_dict()
    rest = list(iterator) or list(loader)
    assert state == ({"epoch": 0, "batch": done} if done < 10 else {"epoch": 1, "batch": 0})

    resumed = module(records, num_workers=num_workers)
    resumed.load_state_dict(state)
    assert same(list(resumed.train_dataloader()), rest)
    by_hand = module(records, num_workers=num_workers)
    by_hand_loader = by_hand.train_dataloader()
    by_hand.set_progress(0, done)  # also when Lightning has asked for the loader already
    assert by_hand.state_dict() == state and same(list(by_hand_loader), rest)


def test_an_iteration_left_early_can_be_started_again(records):
    loader = module(records, num_workers=2).train_dataloader()
    first = next(iter(loader))
    loader.sampler.set_position(0, 0)
    again = list(loader)
    assert len(again) == 10 and same([first], again[:1])


def test_processes_share_each_step(records):
    alone = list(module(records, per_gpu_batchsize=4).training_loader())
    shares = [list(module(records).training_loader(rank=rank, world_size=2)) for rank in range(2)]
    for batch, left, right in zip(alone, *shares, strict=True):
        assert torch.equal(batch.caption_ids, torch.cat([left.caption_ids, right.caption_ids]))
        assert torch.equal(batch.images, torch.cat([left.images, right.images]))


# bad images


@pytest.fixture
def spoilt(records, tmp_path):
    """The records with image 2 (five captions) damaged and image 5 (four captions) gone."""
    damaged = tmp_path / "damaged.png"
    damaged.write_bytes(b"not a image")
    paths = {1002: damaged, 1005: tmp_path / "gone.png"}
    return [
        CaptionedImage(paths[record.image_id], record.captions, record.image_id, record.split)
        if record.split == "train" and record.image_id in paths
        else record
        for record in records
    ]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_bad_image_stops_training_with_its_name(spoilt, num_workers):
    message = error_of(list, module(spoilt, num_workers=num_workers).train_dataloader())
    assert "damaged.png" in message or "gone.png" in message
    assert "on_bad_image=skip" in message


@pytest.mark.parametrize("num_workers", [0, 2])
def test_skipped_images_are_counted_and_reported(spoilt, records, num_workers, caplog):
    sizes = {"batch_size": 22, "per_gpu_batchsize": 11, "num_workers": num_workers}
    data = module(spoilt, on_bad_image="skip", **sizes)
    found, whole = list(data.train_dataloader()), list(module(records, **sizes).train_dataloader())
    for batch, reference in zip(found, whole, strict=True):
        keep = (reference.image_ids != 1002) & (reference.image_ids != 1005)
        assert torch.equal(batch.image_ids, reference.image_ids[keep])  # smaller, and nothing in their place
        assert torch.equal(batch.images, reference.images[keep])
    assert sum(len(batch.images) for batch in found) == 22 - 9
    assert sorted(os.path.basename(path) for path in data.skipped) == ["damaged.png", "gone.png"]
    assert "2 unreadable image(s) skipped" in caplog.text and "epoch 0" in caplog.text
    assert caplog.text.count("reported at the end of the epoch") == 1  # the first one is said at once


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_batch_without_readable_images_is_yielded_empty(spoilt, num_workers):
    """All processes take the same number of batches, whichever has the bad images."""
    only = [record for record in spoilt if record.image_id in (1002, 1005)]
    loader = module(only, on_bad_image="skip", num_workers=num_workers).train_dataloader()
    batches = list(loader)
    assert len(batches) == len(loader) == 4
    assert all(batch.images.shape == (0, 3, 16, 16) and len(batch.image_ids) == 0 for batch in batches)


def test_evaluation_needs_every_image(records, tmp_path):
    bad = [CaptionedImage(tmp_path / "gone.png", ("x",), 1, "val"), *records]
    for num_workers in (0, 1):
        data = module(bad, num_workers=num_workers)
        message = error_of(list, data.eval_images("val"))
        assert "gone.png" in message and "on_bad_image=skip evaluates without" in message


@pytest.mark.parametrize("name", ["val", "test"])
def test_unreadable_images_of_an_evaluation_are_named_in_advance_or_left_out(records, tmp_path, name, caplog):
    (tmp_path / "damaged.png").write_bytes(b"not an image")
    whole = [record for record in records if record.split == "val"]
    bad = CaptionedImage(tmp_path / "damaged.png", ("x", "y"), 77, name)
    listed = [*records, *(CaptionedImage(one.path, one.captions, one.image_id, "test") for one in whole), bad]
    message = error_of(module(listed).check_images, "val", "test")
    assert "damaged.png" in message and f"in the {name} split" in message and "on_bad_image=skip" in message
    data = module(listed, on_bad_image="skip")
    data.check_images("val", "test")
    split = data.eval_split(name)
    assert (len(split.ids), split.left_out) == (len(whole), 1) and 77 not in split.ids
    assert len(split.captions) == len(split.image_of_text) == sum(len(record.captions) for record in whole)
    assert f"{name} split: 1 unreadable image(s) left out" in caplog.text
    assert sum(len(rows) for rows, _ in data.eval_images(name)) == len(whole)


def kill_self(_):
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("room", ["training_data", "evaluation_data"])
def test_a_dead_worker_is_one_line(records, monkeypatch, room):
    monkeypatch.setattr(f"datamodules.{room}.read_image", kill_self)
    data = module(records, num_workers=2)
    batches = data.train_dataloader() if room == "training_data" else data.eval_images("val")
    message = error_of(list, batches)
    assert "died" in message and "num_workers=2" in message


def test_other_errors_of_workers_keep_their_traceback(records, monkeypatch):
    def broken(_):
        raise RuntimeError("a bug of ours")

    monkeypatch.setattr("datamodules.training_data.read_image", broken)
    with pytest.raises(RuntimeError, match="a bug of ours"):
        list(module(records, num_workers=1).train_dataloader())


def test_splits_without_images_or_captions_are_named(records):
    assert "'test'" in error_of(module(records).eval_split, "test")
    val_only = [record for record in records if record.split == "val"]
    assert "'train'" in error_of(module(val_only).train_dataloader)
    mute = [CaptionedImage(records[0].path, (), 1, "train")]
    assert "no captions" in error_of(module(mute).train_dataloader)
    one = [CaptionedImage(records[0].path, ("x",), 1, "train")]
    with pytest.raises(UserError, match="1 pair"):
        module(one).training_loader(rank=0, world_size=2)
    with pytest.raises(ValueError, match="on_bad_image"):
        module(records, on_bad_image="ignore")


# evaluation


def test_ground_truth_of_a_split(records):
    split = module(records).eval_split("val")
    assert split.image_of_text.tolist() == [0, 0, 2, 2, 2, 3, 4] and split.image_of_text.dtype == torch.int64
    assert split.ids == (1000, 1001, 1002, 1003, 1004) and len(split.captions) == 7
    assert [os.path.basename(path) for path in split.paths] == [f"val {i}.png" for i in range(5)]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_each_image_of_a_split_comes_once_and_is_decoded_once(records, num_workers, monkeypatch):
    import datamodules.evaluation_data as room

    calls = []
    read = room.read_image
    monkeypatch.setattr(room, "read_image", lambda path: calls.append(path) or read(path))
    data = module(records, num_workers=num_workers)
    images = data.eval_images("val")
    batches = list(images)
    assert len(batches) == len(images) == 3
    assert torch.cat([rows for rows, _ in batches]).tolist() == [0, 1, 2, 3, 4]
    assert num_workers or len(calls) == 5
    transform = evaluation_transform(16, PHOTOS)
    for rows, pixels in batches:
        for row, found in zip(rows, pixels, strict=True):
            expected = normalise(transform(read(data.eval_split("val").paths[row]))[None])[0]
            torch.testing.assert_close(found, expected)


def test_each_caption_of_a_split_comes_once_short_ones_first(records):
    data = module(records)
    batches = list(data.eval_texts("val"))
    assert len(batches) == len(data.eval_texts("val")) == 4
    rows = torch.cat([rows for rows, _, _ in batches])
    assert sorted(rows.tolist()) == list(range(7))
    lengths = torch.cat([mask.sum(dim=1) for _, _, mask in batches])
    assert (lengths.diff() >= 0).all() and lengths[0] < lengths[-1]
    for some, token_ids, mask in batches:
        for row, found, real in zip(some, token_ids, mask, strict=True):
            caption = data.eval_split("val").captions[row]
            assert found[real].tolist() == TOKENIZER(caption, truncation=True, max_length=5).input_ids


def test_shards_of_a_split(records):
    data = module(records, eval_batch_size=3)
    whole = {
        int(row): pixels for rows, images in data.eval_images("val") for row, pixels in zip(rows, images, strict=True)
    }
    for part in ([1, 4], [0, 2, 3], []):
        found = list(data.eval_images("val", rows=part))
        assert [int(row) for rows, _ in found for row in rows] == part
        assert all(
            torch.equal(pixels, whole[int(r)]) for rows, images in found for r, pixels in zip(rows, images, strict=True)
        )
        texts = list(data.eval_texts("val", rows=part))
        assert sorted(int(row) for rows, *_ in texts for row in rows) == sorted(part)


# under Lightning


class Recorder(pl.LightningModule):
    """Record every batch; stop after `stop_after` of them, as a killed process does."""

    def __init__(self, checkpoint=None, stop_after=None):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.seen, self._checkpoint, self._stop_after = [], checkpoint, stop_after

    def training_step(self, batch, _):
        self.seen.append((self.current_epoch, batch.caption_ids.tolist(), batch.images.sum().item()))
        return self.weight.sum()

    def on_train_batch_end(self, *_):
        if len(self.seen) == self._stop_after:
            self.trainer.save_checkpoint(self._checkpoint)
            raise InterruptedError

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(recorder, data, ckpt_path=None):
    trainer = pl.Trainer(
        max_epochs=3,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        accumulate_grad_batches=2,
    )
    trainer.fit(recorder, datamodule=data, ckpt_path=ckpt_path)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("num_workers", "stop_after"), [(0, 4), (0, 10), (0, 16), (2, 14), (2, 20)])
def test_a_run_resumed_by_lightning_sees_the_very_next_batches(records, tmp_path, num_workers, stop_after):
    whole = Recorder()
    fit(whole, module(records))
    assert [epoch for epoch, *_ in whole.seen] == [0] * 10 + [1] * 10 + [2] * 10
    killed = Recorder(tmp_path / "x.ckpt", stop_after)
    with pytest.raises(InterruptedError):
        fit(killed, module(records, num_workers=num_workers))
    resumed = Recorder()
    fit(resumed, module(records, num_workers=num_workers), ckpt_path=tmp_path / "x.ckpt")
    assert killed.seen + resumed.seen == whole.seen
