import math
import os
import shutil
import threading
import time

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from hacan.errors import UserError
from hacan.retrieval import feature_cache
from hacan.retrieval.cached_scores import CachedScores
from hacan.retrieval.ensemble import Scorer
from hacan.retrieval.evaluate import select_images
from hacan.retrieval.feature_cache import IN_USE_SECONDS, FeatureStorage, encode_gallery, mark_used, prune
from hacan.retrieval.provenance import content_hash, hash_of_files, hash_of_tensors
from hacan.retrieval.stage_meter import MIB, StageMeter
from hacan.types import EncodedImages, EncodedTexts, Processes, Split

IMAGES, TEXTS, HIGH, MID, WIDTH = 7, 19, 2, 3, 5


@pytest.fixture(autouse=True)
def one_batch_per_shard(monkeypatch):
    monkeypatch.setattr(feature_cache, "SHARD_BATCHES", 1)


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

    def encode(self, *, folder=None, memory=10, checkpoint="c", images=IMAGES, images_hash="images", processes=None):
        self.seen = {"images": [], "texts": []}
        scorer = Scorer(
            name="toy",
            checkpoint_hash=checkpoint,
            alignment="",
            direction="",
            precision="32-true",
            device=torch.device("cpu"),
            encode_images=self.encode_images,
            encode_texts=self.encode_texts,
            score=None,
            score_pairs=None,
        )
        split = Split(
            dataset="toy",
            name="test",
            ids=range(images),
            captions=[""] * TEXTS,
            image_of_text=self.image_of_text,
            image_batches=self.image_batches,
            text_batches=self.text_batches,
            batch_size=self.batch_size,
            images_hash=images_hash,
        )
        return encode_gallery(
            scorer,
            split,
            storage=FeatureStorage(folder=folder, memory=memory),
            meter=StageMeter(torch.device("cpu")),
            processes=processes,
            progress=False,
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
@pytest.mark.parametrize("memory", [0, 10], ids=["mapped", "in memory"])
@pytest.mark.parametrize("kept", [False, True], ids=["for this process", "kept"])
def test_each_item_is_encoded_once_into_its_own_row(batch_size, memory, kept, tmp_path):
    split = ToySplit(batch_size)
    gallery = split.encode(memory=memory, folder=tmp_path if kept else None)
    assert sorted(split.seen["images"]) == list(range(IMAGES)) and len(split.seen["texts"]) == TEXTS
    split.check(gallery)


def test_cached_features_are_used_again_for_the_same_inputs_only(tmp_path):
    split = ToySplit()
    split.encode(folder=tmp_path)
    split.check(split.encode(folder=tmp_path))
    split.encode(folder=tmp_path)
    assert split.counts() == (0, 0)
    split.encode(folder=tmp_path, checkpoint="another")
    assert split.counts() == (IMAGES, TEXTS)
    split.tokens[3, 0] += 1  # another caption: its hash is taken here, the caller need not know
    split.encode(folder=tmp_path)
    assert split.counts() == (IMAGES, TEXTS)


def test_an_interrupted_encoding_resumes_after_its_last_complete_shard(tmp_path):
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


@pytest.mark.parametrize("mark", [b"", b"00000000", b"nonsense", b"\xff\xfe"])
def test_a_wrong_completion_mark_is_rejected(tmp_path, mark):
    split = ToySplit()
    split.encode(folder=tmp_path)
    (file,) = tmp_path.glob("*/images/shard-1")
    file.write_bytes(mark)
    gallery = split.encode(folder=tmp_path)
    assert split.seen["images"] == [4, 5, 6]
    split.check(gallery)
    split.encode(folder=tmp_path)
    assert split.counts() == (0, 0)


def test_files_of_another_entry_are_rejected(tmp_path):
    """The checksum depends on the key, so that copied files do not pass for this entry's."""
    one, other = ToySplit(), ToySplit(seed=1)
    one.encode(folder=tmp_path / "one")
    other.image_of_text, other.lengths, other.tokens = one.image_of_text, one.lengths, one.tokens
    other.encode(folder=tmp_path / "other", images_hash="other")
    (source,), (target,) = (tmp_path / "other").iterdir(), (tmp_path / "one").iterdir()
    shutil.rmtree(target / "images")
    shutil.copytree(source / "images", target / "images")
    gallery = one.encode(folder=tmp_path / "one")
    assert one.seen["images"] == list(range(IMAGES))
    one.check(gallery)


@pytest.mark.parametrize("shard", [1, 2, 8])
def test_a_shard_is_the_unit_of_resuming(tmp_path, monkeypatch, shard):
    monkeypatch.setattr(feature_cache, "SHARD_BATCHES", shard)
    split = ToySplit(batch_size=1)
    whole = split.encode_images

    def stops(pixels):
        if len(split.seen["images"]) == 5:
            raise InterruptedError
        return whole(pixels)

    split.encode_images = stops
    with pytest.raises(InterruptedError):
        split.encode(folder=tmp_path)
    split.encode_images = whole
    split.check(split.encode(folder=tmp_path))
    gallery = ToySplit(batch_size=1)
    split.encode(folder=tmp_path)
    assert gallery.counts() == (0, 0)


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


def damaged_header(file, old, new):
    content = file.read_bytes()
    assert content.count(old) == 1 and len(old) == len(new)
    file.write_bytes(content.replace(old, new))


FOREIGN_ARRAYS = {
    "wider": lambda file: np.save(file, np.zeros((IMAGES, MID, WIDTH + 1), np.float16)),
    "more regions": lambda file: np.save(file, np.zeros((IMAGES, MID + 1, WIDTH), np.float16)),
    "one axis": lambda file: np.save(file, np.zeros(IMAGES, np.float16)),
    "no axis": lambda file: np.save(file, np.zeros((), np.float16)),
    "another type": lambda file: np.save(file, np.load(file).astype(np.float64)),
    "strings": lambda file: np.save(file, np.array(["x"] * IMAGES)),
    "empty file": lambda file: file.write_bytes(b""),
    "header is not Python": lambda file: damaged_header(file, b"(7, 3, 5)", b"(7, 3, 5("),
    "axes exchanged": lambda file: damaged_header(file, b"(7, 3, 5)", b"(7, 5, 3)"),
    "shape beyond every disk": lambda file: damaged_header(
        file, b"(7, 3, 5), }" + b" " * 16, b"(7, 9" + b"9" * 17 + b",5), }"
    ),
}


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("kind", FOREIGN_ARRAYS)
def test_foreign_arrays_are_recreated(tmp_path, kind, world_size):
    ToySplit().encode(folder=tmp_path)
    (file,) = tmp_path.glob("*/images/mid.npy")
    FOREIGN_ARRAYS[kind](file)
    splits, galleries = encode_in_processes(tmp_path, world_size)
    assert sorted(row for split in splits for row in split.seen["images"]) == list(range(IMAGES))
    for gallery in galleries:
        ToySplit().check(gallery)
    again = ToySplit()
    again.check(again.encode(folder=tmp_path))
    again.encode(folder=tmp_path)
    assert again.counts() == (0, 0)


def encode_in_processes(folder, world_size):
    """Encode in threads that act as processes; return their splits and galleries."""
    barrier = threading.Barrier(world_size)
    splits = [ToySplit() for _ in range(world_size)]
    galleries = [None] * world_size

    def process(rank):
        processes = Processes(rank, world_size, lambda: barrier.wait(30))
        galleries[rank] = splits[rank].encode(folder=folder, processes=processes)

    threads = [threading.Thread(target=process, args=(rank,)) for rank in range(world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return splits, galleries


@pytest.mark.parametrize("world_size", [2, 3, 9])
def test_several_processes_share_the_encoding(tmp_path, world_size):
    alone = ToySplit().encode(folder=None)
    splits, galleries = encode_in_processes(tmp_path, world_size)
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
    with pytest.raises(ValueError, match="images_hash is empty"):
        split.encode(folder=tmp_path, images_hash="")
    with pytest.raises(ValueError, match="world_size is 2 without a cache folder"):
        split.encode(processes=Processes(0, 2))
    with pytest.raises(UserError, match="0 images and 19 captions"):
        split.encode(images=0)
    with pytest.raises(ValueError, match="1 of 8 images were not encoded"):
        split.image_batches = lambda rows: ToySplit().image_batches(r for r in rows if r < IMAGES)
        split.batch_size = 7
        split.encode(images=8)
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


def test_cached_scores_are_computed_once():
    for memory_limit in (0, 2**20):
        asked = []
        scores = torch.rand(5, 7)

        def compute(rows, asked=asked, scores=scores):
            asked.append(rows)
            return scores[rows]

        cached = CachedScores(compute, images=5, texts=7, memory_limit=memory_limit)
        for _ in range(2):
            assert torch.equal(cached(slice(0, 3)), scores[:3]) and torch.equal(cached(slice(3, 5)), scores[3:])
        assert torch.equal(cached(slice(0, 5)), scores) and len(asked) == 2


# ---------------------------------------------------------------------------------------------- size of the cache

NOW = time.time()


@pytest.fixture
def entries(tmp_path):
    """Entries of 3, 2 and 4 MiB that were last used two days, one day and half a day ago, and a file beside them."""
    for name, size, days in (("oldest", 3, 2.0), ("older", 2, 1.0), ("old", 4, 0.5)):
        mark_used(tmp_path / name)
        (tmp_path / name / "images").mkdir()
        (tmp_path / name / "images" / "high.npy").write_bytes(bytes(size * MIB))
        last_used(tmp_path / name, NOW - days * 86400)
    (tmp_path / "a file").write_text("not an entry")
    return tmp_path


def last_used(entry, when):
    for file in entry.rglob("*"):
        os.utime(file, (when, when))


@pytest.mark.parametrize(
    ("budget", "left"),
    [
        (9, {"oldest", "older", "old"}),
        (8, {"older", "old"}),
        (6, {"older", "old"}),
        (5, {"old"}),
        (3, set()),
        (0, set()),
    ],
)
def test_the_least_recently_used_entry_is_deleted_first(entries, budget, left):
    gone = prune(entries, budget=budget, began=NOW)
    assert {path.name for path in entries.iterdir()} == left | {"a file"}
    assert {path.name for path in gone} == {"oldest", "older", "old"} - left


def test_entries_of_this_evaluation_are_kept(entries):
    began = NOW - 3 * IN_USE_SECONDS  # they were taken up then, and only read since
    last_used(entries / "oldest", began)
    prune(entries, budget=0, began=began)
    assert {path.name for path in entries.iterdir()} == {"oldest", "a file"}


def test_an_entry_that_another_evaluation_may_be_filling_is_kept(entries):
    (entries / "older" / "images" / "shard-0").touch()
    prune(entries, budget=0, began=time.time() + 60)
    assert {path.name for path in entries.iterdir()} == {"older", "a file"}


def test_using_an_entry_makes_it_the_most_recent(entries):
    mark_used(entries / "oldest")
    prune(entries, budget=3, began=time.time())
    assert (entries / "oldest").is_dir() and not (entries / "old").exists()
    assert prune(entries / "nowhere", budget=0, began=NOW) == []
