import json
import math
import threading

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from hacan.errors import UserError
from hacan.retrieval.features import content_hash, encode_gallery, hash_of_files, hash_of_tensors, select_images
from hacan.retrieval.store import ArraySpec, RowStore, SpooledScores
from hacan.types import EncodedImages, EncodedTexts

IMAGES, TEXTS, HIGH, MID, WIDTH = 7, 19, 2, 3, 5


class ToySplit:
    """Pixels and tokens by seed, in batches as the data module gives them, and a model that counts what it encodes."""

    def __init__(self, batch_size=4, seed=0):
        generator = torch.Generator().manual_seed(seed)
        self.batch_size = batch_size
        self.pixels = torch.randn(IMAGES, 3, 2, 2, generator=generator)
        self.lengths = torch.randint(1, 6, (TEXTS,), generator=generator)
        self.tokens = torch.randint(1, 50, (TEXTS, 6), generator=generator)
        self.image_of_text = torch.randint(0, IMAGES, (TEXTS,), generator=generator)
        self.seen = {"images": [], "texts": []}
        self.scale = 1.0

    def image_batches(self, rows):
        for part in torch.tensor(list(rows)).split(self.batch_size):
            yield part, self.pixels[part]

    def text_batches(self, rows):
        rows = torch.tensor(list(rows))
        for part in rows[self.lengths[rows].argsort(stable=True)].split(self.batch_size):
            width = int(self.lengths[part].max())
            yield part, self.tokens[part, :width], torch.arange(width) < self.lengths[part, None]

    def encode_images(self, pixels):
        known = self.pixels.nan_to_num(7.0)
        self.seen["images"] += [int((known == p.nan_to_num(7.0)).flatten(1).all(1).nonzero()) for p in pixels]
        flat = pixels.flatten(1) * self.scale
        high = torch.stack([flat[:, i : i + WIDTH] for i in range(HIGH)], 1)
        mid = torch.stack([flat[:, i + 2 : i + 2 + WIDTH] for i in range(MID)], 1)
        return EncodedImages(high, mid, F.normalize(flat[:, :WIDTH], dim=-1))

    def encode_texts(self, token_ids, mask):
        self.seen["texts"] += token_ids[:, 0].tolist()
        high = token_ids[..., None] * torch.arange(1, WIDTH + 1) / 30
        return EncodedTexts(high, high / 2, mask, F.normalize(high[:, 0], dim=-1))

    def encode(self, **arguments):
        self.seen = {"images": [], "texts": []}
        if arguments.get("folder") is not None:
            arguments = {"key": {"checkpoint": "c"}, **arguments}
        return encode_gallery(
            self.encode_images,
            self.encode_texts,
            self.image_batches,
            self.text_batches,
            **{
                "image_of_text": self.image_of_text,
                "images": IMAGES,
                "batch_size": self.batch_size,
                "feature_memory": 10,
                "progress": False,
                **arguments,
            },
        )

    def counts(self):
        return len(self.seen["images"]), len(self.seen["texts"])

    def check(self, gallery, dtype=torch.float16):
        """Every row is its own item's, whatever the order of encoding was."""
        assert gallery.images.high.shape == (IMAGES, HIGH, WIDTH) and gallery.images.mid.shape == (IMAGES, MID, WIDTH)
        assert gallery.images.high.dtype == gallery.texts.mid.dtype == dtype
        assert gallery.images.pooled.dtype == gallery.texts.pooled.dtype == torch.float32
        expected = self.encode_images(self.pixels)
        assert torch.equal(gallery.images.high, expected.high.to(dtype))
        assert torch.equal(gallery.images.mid, expected.mid.to(dtype))
        assert torch.equal(gallery.images.pooled, expected.pooled)
        assert gallery.texts.offsets.tolist() == [0, *self.lengths.cumsum(0).tolist()]
        for row in range(TEXTS):
            one = self.encode_texts(self.tokens[row : row + 1, : self.lengths[row]], torch.ones(1, 1, dtype=torch.bool))
            place = slice(int(gallery.texts.offsets[row]), int(gallery.texts.offsets[row + 1]))
            assert torch.equal(gallery.texts.high[place], one.high[0].to(dtype))
            assert torch.equal(gallery.texts.mid[place], one.mid[0].to(dtype))
            assert torch.equal(gallery.texts.pooled[row], one.pooled[0])
        assert torch.equal(gallery.image_of_text, self.image_of_text)


@pytest.mark.parametrize("batch_size", [1, 3, 4, 100])
@pytest.mark.parametrize("feature_memory", [0, 10], ids=["mapped", "in memory"])
@pytest.mark.parametrize("kept", [False, True], ids=["for this process", "kept"])
def test_each_item_is_encoded_once_into_its_own_row(batch_size, feature_memory, kept, tmp_path):
    split = ToySplit(batch_size)
    gallery = split.encode(feature_memory=feature_memory, folder=tmp_path if kept else None)
    assert sorted(split.seen["images"]) == list(range(IMAGES)) and len(split.seen["texts"]) == TEXTS
    split.check(gallery)


def test_a_kept_bank_is_used_again_and_only_for_the_same_things(tmp_path):
    split = ToySplit()
    split.encode(folder=tmp_path)
    split.check(split.encode(folder=tmp_path))
    split.encode(folder=tmp_path)
    assert split.counts() == (0, 0)
    split.encode(folder=tmp_path, key={"checkpoint": "another"})
    assert split.counts() == (IMAGES, TEXTS)
    split.tokens[3, 0] += 1  # another caption: its hash is taken here, the caller need not know
    split.encode(folder=tmp_path)
    assert split.counts() == (IMAGES, TEXTS)


def test_an_interrupted_encoding_goes_on_after_its_last_complete_batch(tmp_path):
    class Interrupted(Exception):
        pass

    split = ToySplit()
    whole = split.encode_images

    def stops(pixels):
        if len(split.seen["images"]) == 4:
            raise Interrupted
        return whole(pixels)

    split.encode_images = stops
    with pytest.raises(Interrupted):
        split.encode(folder=tmp_path)
    split.encode_images = whole
    gallery = split.encode(folder=tmp_path)
    assert split.seen["images"] == [4, 5, 6] and len(split.seen["texts"]) == TEXTS
    split.check(gallery)


def test_half_a_line_of_the_journal_is_ignored(tmp_path):
    split = ToySplit()
    split.encode(folder=tmp_path)
    (journal,) = tmp_path.glob("*/images/journal-0.jsonl")
    journal.write_text(journal.read_text().strip()[:-5])
    gallery = split.encode(folder=tmp_path)
    assert split.seen["images"] == [4, 5, 6]
    split.check(gallery)
    split.encode(folder=tmp_path)  # the line that followed the half one counts
    assert split.counts() == (0, 0)


@pytest.mark.parametrize("damage", ["changed", "cut short", "not an array", "deleted"])
def test_damaged_features_are_encoded_again(tmp_path, damage):
    split = ToySplit()
    split.encode(folder=tmp_path)
    (file,) = tmp_path.glob("*/images/mid.npy")
    if damage == "changed":
        array = np.load(file, mmap_mode="r+")
        array[5] += 1
        array.flush()
    elif damage == "cut short":
        file.write_bytes(file.read_bytes()[:-20])
    elif damage == "not an array":
        file.write_bytes(b"nonsense")
    else:
        file.unlink()
    gallery = split.encode(folder=tmp_path)
    assert split.seen["images"] == ([4, 5, 6] if damage in ("changed", "cut short") else list(range(IMAGES)))
    split.check(gallery)


@pytest.mark.parametrize("world_size", [2, 3, 9])
def test_several_processes_fill_one_bank_with_the_features_of_one(tmp_path, world_size):
    alone = ToySplit().encode(folder=None)
    barrier = threading.Barrier(world_size)
    splits = [ToySplit() for _ in range(world_size)]
    galleries = [None] * world_size

    def process(rank):
        galleries[rank] = splits[rank].encode(
            folder=tmp_path, rank=rank, world_size=world_size, barrier=lambda: barrier.wait(30)
        )

    threads = [threading.Thread(target=process, args=(rank,)) for rank in range(world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for gallery in galleries:
        assert all(torch.equal(a, b) for a, b in zip(gallery.images, alone.images, strict=True))
        assert all(torch.equal(a, b) for a, b in zip(gallery.texts, alone.texts, strict=True))
    assert sorted(i for split in splits for i in split.seen["images"]) == list(range(IMAGES))


@pytest.mark.parametrize("scale", [1e6, 1e-7], ids=["overflow", "underflow"])
@pytest.mark.parametrize("kept", [False, True])
def test_features_that_do_not_fit_float16_are_kept_in_float32(tmp_path, scale, kept, caplog):
    split = ToySplit()
    split.scale = scale
    folder = tmp_path if kept else None
    split.check(split.encode(folder=folder), torch.float32)
    assert "do not fit float16" in caplog.text and "float32" in caplog.text
    if kept:
        split.check(split.encode(folder=folder), torch.float32)
        split.encode(folder=folder)
        assert split.counts() == (0, 0)


def test_a_late_batch_that_does_not_fit_float16(tmp_path):
    split = ToySplit()
    split.pixels[6] *= 1e6
    split.check(split.encode(folder=tmp_path), torch.float32)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_non_finite_features_are_an_error_with_a_remedy(value):
    split = ToySplit()
    split.pixels[5, 0] = value
    with pytest.raises(UserError, match=r"non-finite features .* images 4 to 6 .*precision=32-true"):
        split.encode()


def test_a_full_disk_is_one_line(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", full)
    with pytest.raises(UserError, match=r"features need .* MiB are free \(No space left on device\)"):
        ToySplit().encode(folder=tmp_path)


def test_wrong_arguments_are_named(tmp_path):
    split = ToySplit()
    with pytest.raises(ValueError, match="folder is given without a key"):
        split.encode(folder=tmp_path, key=None)
    with pytest.raises(ValueError, match="world_size is 2 without a folder"):
        split.encode(world_size=2)
    with pytest.raises(UserError, match="0 images and 19 captions"):
        split.encode(images=0)
    with pytest.raises(ValueError, match="1 of 8 images were not encoded"):
        split.image_batches = lambda rows: ToySplit().image_batches(r for r in rows if r < IMAGES)
        split.encode(images=8, batch_size=7)
    split.text_batches = lambda rows: ToySplit().text_batches(range(3, TEXTS))
    with pytest.raises(ValueError, match="left out 3 of 19 texts"):
        split.encode()


def test_select_images_is_encoding_those_alone():
    split = ToySplit()
    gallery = split.encode()
    rows = slice(2, 5)
    part = select_images(gallery, rows)
    chosen = [j for j in range(TEXTS) if 2 <= split.image_of_text[j] < 5]
    assert torch.equal(part.images.mid, gallery.images.mid[2:5])
    assert part.image_of_text.tolist() == [int(split.image_of_text[j]) - 2 for j in chosen]
    for place, row in enumerate(chosen):
        a, b = part.texts.offsets[place : place + 2].tolist()
        c, d = gallery.texts.offsets[row : row + 2].tolist()
        assert torch.equal(part.texts.high[a:b], gallery.texts.high[c:d]) and b - a == d - c
        assert torch.equal(part.texts.pooled[place], gallery.texts.pooled[row])
    assert select_images(gallery, slice(0, IMAGES)) is gallery


def test_select_images_of_ordered_captions_copies_nothing():
    split = ToySplit()
    split.image_of_text = split.image_of_text.sort().values
    gallery = split.encode()
    part = select_images(gallery, slice(2, 5))
    assert part.texts.high.untyped_storage().data_ptr() == gallery.texts.high.untyped_storage().data_ptr()
    assert part.images.high.untyped_storage().data_ptr() == gallery.images.high.untyped_storage().data_ptr()


def test_hashes_tell_contents_apart(tmp_path):
    for name, text in (("a", "one"), ("b", "two")):
        (tmp_path / name).write_text(text)
    paths = [tmp_path / "a", tmp_path / "b"]
    before = hash_of_files(paths)
    assert before == hash_of_files(paths) != hash_of_files(paths[::-1])
    (tmp_path / "b").write_text("too")  # replaced in place, same length
    assert hash_of_files(paths) != before
    with pytest.raises(UserError, match=r"missing\.jpg cannot be read"):
        hash_of_files([tmp_path / "missing.jpg"])
    state = {"w": torch.ones(2, 3), "n": torch.tensor(3)}
    assert hash_of_tensors(state) == hash_of_tensors({"n": torch.tensor(3), "w": torch.ones(2, 3)})
    assert hash_of_tensors(state) != hash_of_tensors({**state, "w": torch.ones(3, 2)})
    assert hash_of_tensors(state) != hash_of_tensors({**state, "n": torch.tensor(4)})
    assert content_hash({"a": 1, "b": [2]}) == content_hash({"b": [2], "a": 1}) != content_hash({"a": 1, "b": [3]})


def test_spooled_scores_are_computed_once(tmp_path):
    for in_memory in (0, 2**20):
        asked = []
        scores = torch.rand(5, 7)

        def compute(rows, asked=asked, scores=scores):
            asked.append(rows)
            return scores[rows]

        spooled = SpooledScores(compute, images=5, texts=7, in_memory=in_memory)
        for _ in range(2):
            assert torch.equal(spooled(slice(0, 3)), scores[:3]) and torch.equal(spooled(slice(3, 5)), scores[3:])
        assert torch.equal(spooled(slice(0, 5)), scores) and len(asked) == 2


def test_a_journal_of_other_things_is_not_believed(tmp_path):
    specs = {"high": ArraySpec((3, 2), torch.float32)}
    RowStore(specs, rows=3, folder=tmp_path, in_memory=True).write(torch.tensor([0, 1]), {"high": torch.ones(2, 2)})
    journal = tmp_path / "journal-0.jsonl"
    for line in ('{"rows": [2], "crc": 5}', '{"rows": [7], "crc": 5}', '{"rows": [], "crc": 0}', "7", "[]", "{}"):
        journal.write_text(journal.read_text() + line + "\n")
    store = RowStore(specs, rows=3, folder=tmp_path, in_memory=True)
    assert store.done.tolist() == [True, True, False]
    assert json.loads(journal.read_text().splitlines()[1])["rows"] == [0, 1]
