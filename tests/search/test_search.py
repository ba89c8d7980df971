"""The index over one's own images: the shortlist and the order of brute force, updates, interruptions, mistakes."""

import os
import pathlib
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import time

import cv2
import numpy as np
import pytest
import torch

from hacan.checkpoints.checkpoint import atomic_save, describe_model
from hacan.checkpoints.pretrained import Pretrained
from hacan.errors import UserError
from hacan.search import Index
from hacan.search.collection import Collection
from hacan.search.files import IndexFiles
from hacan.search.folder import images_below, texts_of_csv
from hacan.search.results_page import format_table, write_page
from hacan.search.store import VectorTable

ROOT = pathlib.Path(__file__).parents[2]
TEXTS = ["a dog runs", "a small red cat sits on the grass", "the blue dog", "cat", "a big cat by a dog"]


@pytest.fixture
def pretrained(make_model, tokenizer):
    model = make_model()
    with torch.no_grad():  # away from the start, where ConvNeXt's branches weigh nothing
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return Pretrained(model=model, tokenizer=tokenizer, image_size=64, centre_crop=True, max_text_len=12)


@pytest.fixture
def trained_checkpoint(pretrained, make_settings, tokenizer, tmp_path):
    """The same model in training mode."""
    description = describe_model(pretrained.model, make_settings(datasets="f8k"), tokenizer)
    path = tmp_path / "best.ckpt"
    atomic_save({"state_dict": pretrained.model.state_dict(), "hacan": description}, path)
    return path


def draw(path, seed):
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    cv2.imwrite(str(path), cv2.resize(noise, (50, 40), interpolation=cv2.INTER_CUBIC))


@pytest.fixture
def folder(tmp_path):
    """11 images at three depths, one of them twice, and two files that are none."""
    root = tmp_path / "pictures"
    for seed in range(4):
        draw(root / f"{seed}.png", seed)
    for seed in range(4, 9):
        draw(root / "deep" / "er" / f"{seed}.jpg", seed)
    draw(root / "deep" / "9.webp", 9)
    draw(root / "deep" / "10.JPEG", 10)
    shutil.copy(root / "2.png", root / "deep" / "copy of 2.png")
    (root / "bad.jpg").write_text("no image")
    (root / "empty.png").touch()
    (root / "notes.txt").write_text("-")
    draw(root / ".hidden" / "secret.png", 77)
    return root


@pytest.fixture
def index(pretrained, folder, tmp_path):
    with Index.create(tmp_path / "index", model=pretrained) as index:
        index.update(folder, batch_size=4, progress=False)
        index.set_texts(TEXTS, batch_size=2, progress=False)
        yield index


def numbers_of(update):
    return update.added, update.kept, update.moved, update.removed


def counted(index, monkeypatch):
    """Count the images that are encoded."""
    numbers, encode = [], index.pretrained.encode_images
    monkeypatch.setattr(
        index.pretrained, "encode_images", lambda pictures: numbers.append(len(pictures)) or encode(pictures)
    )
    return numbers


# ---------------------------------------------------------------------------------------------------------- searching


def test_a_sentence_finds_what_brute_force_finds(index, pretrained):
    paths = [item.payload["paths"][0] for item in index.items()]
    assert len(paths) == 11
    images = pretrained.encode_images(paths)
    images = images._replace(high=images.high.half().float(), mid=images.mid.half().float())
    for text in TEXTS:
        texts = pretrained.encode_texts([text])
        fine, coarse = pretrained.score(images, texts)[:, 0], pretrained.global_similarity(images, texts)[:, 0]
        found = index.search(text, top=11)
        assert [paths.index(result.name) for result in found] == fine.argsort(descending=True).tolist()
        torch.testing.assert_close(torch.tensor([r.fine for r in found]), fine.sort(descending=True).values)
        best = coarse.argsort(descending=True)[:5]
        expected = best[fine[best].argsort(descending=True)].tolist()
        found = index.search(text, top=3, shortlist=5)
        assert [paths.index(result.name) for result in found] == expected[:3]
        assert [result.rank for result in found] == [1, 2, 3]
        for result in found:
            assert result.coarse == pytest.approx(float(coarse[paths.index(result.name)]), abs=1e-5)


def test_a_image_finds_texts_as_brute_force_does(index, pretrained, folder):
    texts = pretrained.encode_texts(TEXTS)
    texts = texts._replace(high=texts.high.half().float(), mid=texts.mid.half().float())
    fine = pretrained.score(pretrained.encode_images([folder / "1.png"]), texts)[0]
    found = index.search(image=folder / "1.png")
    assert [TEXTS.index(result.name) for result in found] == fine.argsort(descending=True).tolist()
    torch.testing.assert_close(torch.tensor([r.fine for r in found]), fine.sort(descending=True).values)


def test_a_image_finds_itself_among_images(index, folder):
    best = index.search(image=folder / "deep" / "9.webp", find="pictures", top=4)
    assert best[0].name.endswith("9.webp") and best[0].coarse == pytest.approx(1, abs=1e-5) and best[0].fine is None
    assert [r.coarse for r in best] == sorted((r.coarse for r in best), reverse=True)


def test_the_store_ranks_as_brute_force_with_ties(tmp_path):
    generator = np.random.default_rng(0)
    vectors = generator.standard_normal((300, 7)).astype(np.float32)
    vectors[40:60] = vectors[3]  # more than fit the shortlist
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    table = VectorTable(str(tmp_path / "vectors"), "things", width=7)
    table.add([f"{row:04x}" for row in range(300)], vectors, [{"row": row} for row in range(300)])
    for query in (vectors[3], vectors[7], -vectors[3]):
        scores = vectors @ query
        expected = np.argsort(-scores.round(6), kind="stable")[:13].tolist()
        assert [hit.payload["row"] for hit in table.nearest(query, 13)] == expected


@pytest.mark.parametrize("arguments", [{}, {"text": " "}, {"text": "a dog", "image": "x.png"}])
def test_a_query_is_a_sentence_or_a_image(index, arguments):
    with pytest.raises(UserError, match="either a sentence or an image"):
        index.search(**arguments)


def test_queries_that_make_no_sense_are_named(index):
    with pytest.raises(UserError, match="from 1"):
        index.search("a dog", top=0)
    with pytest.raises(UserError, match="a sentence finds images"):
        index.search("a dog", find="texts")
    index.set_texts([], progress=False)
    with pytest.raises(UserError, match="holds no texts"):
        index.search(image=np.zeros((9, 8, 3), np.uint8), find="texts")


# ----------------------------------------------------------------------------------------------------------- updating


def test_unchanged_files_are_not_encoded_again(index, folder, monkeypatch):
    numbers = counted(index, monkeypatch)
    update = index.update(folder, progress=False)
    assert numbers == [] and numbers_of(update) == (0, 11, 0, 0)
    assert sorted(os.path.basename(path) for path, _ in update.bad) == ["bad.jpg", "empty.png"]
    assert all("cannot be decoded" in reason for _, reason in update.bad)


def test_changes_are_followed(index, folder, monkeypatch):
    before = index.search("a dog runs", top=11)
    (folder / "deep" / "er" / "5.jpg").rename(folder / "moved.jpg")
    (folder / "3.png").unlink()
    draw(folder / "1.png", 50)
    draw(folder / "new.png", 51)
    numbers = counted(index, monkeypatch)
    assert numbers_of(index.update(folder, progress=False)) == (2, 9, 1, 2)
    assert sum(numbers) == 2
    after = {result.name: result for result in index.search("a dog runs", top=20)}
    assert len(after) == 11 and str(folder / "3.png") not in after
    moved = next(result for result in before if result.name.endswith("5.jpg"))
    assert after[str(folder / "moved.jpg")][3:] == pytest.approx(moved[3:])
    features = list((pathlib.Path(index.address) / "features" / "pictures").rglob("*.f16"))
    assert {path.stem for path in features} == {item.id for item in index.items()}  # those of removed images are gone


def test_copies_are_one_item_until_the_last_leaves(index, folder):
    item = next(item for item in index.items() if len(item.payload["paths"]) == 2)
    (folder / "2.png").unlink()
    assert numbers_of(index.update(folder, progress=False)) == (0, 11, 1, 0)
    assert index.item(item.id).payload["paths"] == [str(folder / "deep" / "copy of 2.png")]


def test_other_folders_keep_theirs_and_a_moved_folder_is_followed(index, folder, tmp_path):
    draw(tmp_path / "other" / "a.png", 60)
    assert numbers_of(index.update(tmp_path / "other", progress=False)) == (1, 11, 0, 0)
    folder.rename(tmp_path / "renamed")
    assert numbers_of(index.update(tmp_path / "renamed", progress=False)) == (0, 12, 11, 0)
    assert all("/pictures/" not in path for item in index.items() for path in item.payload["paths"])


def test_an_interrupted_update_goes_on(pretrained, folder, tmp_path, monkeypatch):
    index = Index.create(tmp_path / "index", model=pretrained)
    encode, calls = pretrained.encode_images, []

    def interrupted(pictures):
        calls.append(len(pictures))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return encode(pictures)

    monkeypatch.setattr(pretrained, "encode_images", interrupted)
    with pytest.raises(KeyboardInterrupt):
        index.update(folder, batch_size=4, progress=False)
    monkeypatch.setattr(pretrained, "encode_images", encode)
    with Index.open(tmp_path / "index", model=pretrained) as index:
        kept = index.count()
        assert kept == calls[0] + calls[1]
        assert numbers_of(index.update(folder, progress=False)) == (11 - kept, kept, 0, 0)
        images = pretrained.encode_images([item.payload["paths"][0] for item in index.items()])
        scores = pretrained.score(images, pretrained.encode_texts(["a cat"]))[:, 0].sort(descending=True).values
        found = torch.tensor([result.fine for result in index.search("a cat", top=11)])
        torch.testing.assert_close(found, scores, rtol=1e-2, atol=1e-2)  # float16 features


def test_texts_are_replaced(index, monkeypatch):
    assert numbers_of(index.set_texts([TEXTS[1], "a red dog", TEXTS[3]], progress=False)) == (1, 2, 0, 3)
    assert {item.payload["text"] for item in index.items("texts")} == {TEXTS[1], "a red dog", TEXTS[3]}


# ----------------------------------------------------------------------------------------------------------- mistakes


def test_another_model_is_refused_in_one_line(index, pretrained, make_model, tokenizer, tmp_path):
    other = Pretrained(model=make_model(), tokenizer=tokenizer, image_size=64, centre_crop=True, max_text_len=12)
    with pytest.raises(UserError, match=r"was created with the model [0-9a-f]{12}, but the model given is") as caught:
        Index.open(tmp_path / "index", model=other)
    assert "\n" not in str(caught.value)
    pretrained.centre_crop = False  # the same weights, other pixels
    with pytest.raises(UserError, match=r"was created with the model"):
        Index.open(tmp_path / "index", model=pretrained)


@pytest.mark.parametrize("device", ["cuda:99", "nonsense", "mps"])
def test_a_device_that_does_not_exist_is_one_line(index, pretrained, device):
    with pytest.raises(UserError, match=f"device '{device}' is not available here: give cpu"):
        Index.open(index.address, model=pretrained, device=device)


def test_places_that_hold_no_index_are_named(index, pretrained, tmp_path, folder):
    with pytest.raises(UserError, match="is not an index"):
        Index.open(tmp_path / "nothing", model=pretrained)
    with pytest.raises(UserError, match="holds an index already"):
        Index.create(tmp_path / "index", model=pretrained)
    with pytest.raises(UserError, match="new or an empty folder"):
        Index.create(folder, model=pretrained)
    with pytest.raises(UserError, match="is not a folder"):
        index.update(tmp_path / "nothing", progress=False)
    with pytest.raises(UserError, match="does not know where its model is"):
        Index.open(tmp_path / "index")
    (tmp_path / "index" / "index.json").write_text("{")
    with pytest.raises(UserError, match="is not an index"):
        Index.open(tmp_path / "index", model=pretrained)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"format": 1, "store": ""}', "made by an earlier version"),
        ('{"format": "x"}', "of format x; expected format 2"),
        ("[]", "expected format 2"),
        ('{"format": 2}', "damaged"),
        ('{"format": 2, "shapes": {"high": 4, "mid": 16, "width": 1e99}, "max_text_len": 12}', "damaged"),
        ('{"format": 2, "shapes": {"high": 4, "mid": 16, "width": 8}, "max_text_len": 12}', "lacks 'centre_crop'"),
    ],
)
def test_other_formats_are_named_in_one_line(index, pretrained, content, message):
    (pathlib.Path(index.address) / "index.json").write_text(content)
    with pytest.raises(UserError, match=message) as caught:
        Index.open(index.address, model=pretrained)
    assert "\n" not in str(caught.value)


def test_features_are_stored_in_float16(tmp_path):
    table = VectorTable(str(tmp_path), "pictures", width=2)
    collection = Collection(table, IndexFiles(tmp_path), high=(3, 2), mid=(4, 2))
    generator = np.random.default_rng(0)
    high, mid = (
        generator.standard_normal((2, *shape)).astype(np.float32) for shape in (collection.high, collection.mid)
    )
    pooled = np.eye(2, dtype=np.float32)
    collection.put(["aa", "bb"], high=high, mid=mid, pooled=pooled, payloads=[{}, {}])
    found = collection.features(["bb", "aa"], torch.device("cpu"))
    assert np.array_equal(found[0].numpy(), high[::-1].astype(np.float16))
    assert np.array_equal(found[1].numpy(), mid[::-1].astype(np.float16))
    with pytest.raises(UserError, match="do not fit float16"):
        collection.put(["cc"], high=high[:1] + 1e6, mid=mid[:1], pooled=pooled[:1], payloads=[{}])
    assert table.count() == 2
    collection.put(["aa"], high=high[:1], mid=mid[:1], pooled=pooled[:1], payloads=[{}])  # twice is once
    assert table.count() == 2
    (tmp_path / "features" / "pictures" / "aa" / "aa.f16").write_bytes(b"short")
    with pytest.raises(UserError, match="has 5 bytes, expected 28"):
        collection.features(["aa"], torch.device("cpu"))
    with pytest.raises(UserError, match="the index is damaged"):
        collection.features(["../../secret"], torch.device("cpu"))


def test_images_are_found_at_any_depth(folder):
    names = [str(path.relative_to(folder)) for path in images_below(folder).images]
    assert names == sorted(names) and len(names) == 14
    assert "deep/er/4.jpg" in names and "notes.txt" not in names and ".hidden/secret.png" not in names


def test_the_content_of_a_file_decides(folder, index):
    jpeg = (folder / "deep" / "er" / "4.jpg").read_bytes()
    image = cv2.imdecode(np.frombuffer(jpeg, np.uint8), cv2.IMREAD_COLOR)
    for suffix in (".gif", ".bmp", ".tiff", ".avif", ".jp2", ".ppm"):
        image = 255 - image
        cv2.imwrite(str(folder / f"other{suffix}"), image + np.uint8(len(suffix)))
    for name in ("photo.jfif", "photo.jpe", "photo", "photo.txt"):
        (folder / name).write_bytes(jpeg + name.encode())  # other bytes, the same pixels
    (folder / "phone.heic").write_bytes(b"\0\0\0\x18ftypheic" + bytes(40))
    (folder / "phone.jpg").write_bytes(b"\0\0\0\x18ftypmif1" + bytes(40))
    (folder / "film.mp4").write_bytes(b"\0\0\0\x18ftypisom" + bytes(40))
    (folder / "README").write_text("BM is no bitmap")
    os.mkfifo(folder / "pipe.jpg")
    (folder / "device.png").symlink_to("/dev/zero")
    (folder / "gone.png").symlink_to(folder / "nothing")
    found = images_below(folder)
    names = {path.name for path in found.images}
    assert {"photo.jfif", "photo.jpe", "photo", "photo.txt", "other.gif", "other.bmp", "other.tiff", "bad.jpg"} <= names
    kinds = {"HEIC": 2, ".mp4": 1, ".txt": 1, ".ppm": 1, "without suffix": 1, "pipes and devices": 2}
    assert dict(found.left_out) == kinds
    assert [pathlib.Path(path).name for path, _ in found.unreadable] == ["gone.png"]
    update = index.update(folder, progress=False)
    assert update.left_out == kinds and {pathlib.Path(path).name for path, _ in update.bad} == {
        "bad.jpg",
        "empty.png",
        "gone.png",
    }
    paths = [path for item in index.items() for path in item.payload["paths"]]
    assert {pathlib.Path(path).name for path in paths} >= {"photo", "other.gif", "other.avif", "other.jp2"}
    with pytest.raises(UserError, match="not a regular file"):
        index.search(image=folder / "pipe.jpg")


def test_images_that_cannot_be_read_now_stay_in_the_index(folder, index, monkeypatch):
    locked, walk = folder / "deep" / "er", os.walk

    def refuse(top, onerror=None, **more):
        for place, folders, files in walk(top, onerror=onerror, **more):
            if "er" in folders:  # as a folder of another user, whose rights root does not notice
                folders.remove("er")
                onerror(PermissionError(13, "Permission denied", str(locked)))
            yield place, folders, files

    monkeypatch.setattr(os, "walk", refuse)
    update = index.update(folder, progress=False)
    assert (update.kept, update.removed) == (11, 0)
    assert (str(locked), "the folder cannot be listed: Permission denied") in update.bad
    monkeypatch.undo()
    shutil.rmtree(locked)
    assert index.update(folder, progress=False).removed == 5


def test_any_name_of_a_file_is_shown(pretrained, tmp_path, capsys):
    place = tmp_path / "named"
    place.mkdir()
    names = [b"caf\xe9.png", b"two\nlines.png", b"\x1b[31mred.png", "\u202egnp.exe.png".encode(), "\u00e9.png".encode()]
    for seed, name in enumerate(names):
        draw(place / "x.png", seed)
        os.rename(place / "x.png", os.fsencode(place) + b"/" + name)
    index = Index.create(tmp_path / "index", model=pretrained)
    assert index.update(place, progress=False).added == len(names)
    results = index.search("a dog")
    assert {os.fsencode(result.name) for result in results} == {os.fsencode(place) + b"/" + name for name in names}
    table = format_table(results)
    assert len(table.splitlines()) == 1 + len(names) and table.isascii() is False
    shown = {line.split("/")[-1] for line in table.splitlines()[1:]}
    assert shown == {"caf\\xe9.png", "two\\nlines.png", "\\x1b[31mred.png", "\\u202egnp.exe.png", "\u00e9.png"}
    write_page(tmp_path / "found.html", results, text="a dog\udce9", explain_with=pretrained)
    assert "caf\\xe9.png" in (tmp_path / "found.html").read_text(encoding="utf-8")


def test_texts_come_from_a_csv_file(tmp_path):
    path = tmp_path / "texts.csv"
    path.write_text('\ufeffimage,Caption\na.jpg,"A dog, running"\nb.jpg,\nc.jpg, cat \nd.jpg,cat\n', encoding="utf-8")
    assert texts_of_csv(path) == ["A dog, running", "cat"]
    for content, message in (("image,words\na,b\n", "expected caption or text"), ("text\n \n", "no text")):
        path.write_text(content)
        with pytest.raises(UserError, match=message):
            texts_of_csv(path)
    path.write_bytes(b"text\n\xff\xfe\n")
    with pytest.raises(UserError, match="cannot be read as CSV in UTF-8"):
        texts_of_csv(path)
    with pytest.raises(UserError, match="cannot be read"):
        texts_of_csv(tmp_path / "nothing.csv")


# ------------------------------------------------------------------------------------------------------------ scripts


def test_the_scripts_index_and_search(trained_checkpoint, folder, tmp_path, capsys):
    place = str(tmp_path / "made")
    index_main = runpy.run_path(str(ROOT / "scripts" / "index.py"))["main"]
    search_main = runpy.run_path(str(ROOT / "scripts" / "search.py"))["main"]
    assert index_main([str(folder), "--index", place]) == 2
    assert "give --model OUT_DIR_OR_CKPT" in capsys.readouterr().err
    (tmp_path / "texts.csv").write_text("caption\n" + "\n".join(TEXTS) + "\n")
    common = [str(folder), "--index", place, "--captions", str(tmp_path / "texts.csv")]
    assert index_main([*common, "--model", str(trained_checkpoint)]) == 0
    printed = capsys.readouterr()
    assert "11 images (11 added, 0 kept, 0 of them moved, 0 removed, 2 files skipped)" in printed.out
    assert "5 texts (5 added, 0 removed)" in printed.out and f"skipped {folder / 'bad.jpg'}" in printed.err
    assert index_main(common) == 0
    assert "(0 added, 11 kept" in capsys.readouterr().out

    sheet = tmp_path / "out" / "found.html"
    assert search_main([place, "a <b> red cat", "--top", "3", "--html", str(sheet), "--explain"]) == 0
    printed = capsys.readouterr().out
    assert [line.split()[0] for line in printed.splitlines()[:4]] == ["rank", "1", "2", "3"]
    page = sheet.read_text()
    assert page.count("<li") == 3 and "&lt;b&gt;" in page and "<b> red" not in page
    assert "http" not in page and str(folder) not in page
    assert page.count("LRG mid") == 3 and page.count("data:image/jpeg;base64,") > 3 * (1 + 3 * 2)
    assert search_main([place, "--image", str(folder / "1.png"), "--html", str(sheet)]) == 0
    printed = capsys.readouterr().out
    assert all(text in printed for text in TEXTS) and sheet.read_text().count("<li") == 5
    similar = ["--image", str(folder / "1.png"), "--find", "pictures", "--html", str(sheet), "--explain"]
    assert search_main([place, *similar]) == 0
    assert "no heatmaps" in capsys.readouterr().err and sheet.read_text().count("<li") == 10
    assert search_main([place]) == 2 and search_main([str(tmp_path / "nowhere"), "a cat"]) == 2
    assert "either a sentence or an image" in (errors := capsys.readouterr().err) and "is not an index" in errors


def test_nothing_is_asked_of_the_network(trained_checkpoint, folder, tmp_path, monkeypatch):
    asked = []

    def refuse(*arguments, **keywords):
        asked.append(arguments)
        raise OSError("there is no network")

    for name in ("connect", "connect_ex", "sendto"):
        monkeypatch.setattr(socket.socket, name, refuse)
    for name in ("getaddrinfo", "gethostbyname", "create_connection"):
        monkeypatch.setattr(socket, name, refuse)
    place = str(tmp_path / "made")
    (tmp_path / "texts.csv").write_text("caption\n" + "\n".join(TEXTS) + "\n")
    index_main = runpy.run_path(str(ROOT / "scripts" / "index.py"))["main"]
    search_main = runpy.run_path(str(ROOT / "scripts" / "search.py"))["main"]
    captions = ["--captions", str(tmp_path / "texts.csv")]
    assert index_main([str(folder), "--index", place, "--model", str(trained_checkpoint), *captions]) == 0
    assert search_main([place, "a cat", "--explain", "--html", str(tmp_path / "found.html")]) == 0
    assert search_main([place, "--image", str(folder / "1.png")]) == 0
    assert asked == []


@pytest.mark.slow
def test_a_killed_indexing_goes_on(trained_checkpoint, tmp_path):
    for seed in range(90):
        draw(tmp_path / "pictures" / f"{seed:02d}.png", seed)
    place = tmp_path / "made"
    command = [sys.executable, str(ROOT / "scripts" / "index.py"), str(tmp_path / "pictures"), "--index", str(place)]
    # each batch waits, so that the end comes in the middle
    slow = (
        "import runpy, sys, time; from hacan.search.store import VectorTable as T; add = T.add\n"
        "T.add = lambda *a: (add(*a), time.sleep(0.3))\n"
        "sys.argv = sys.argv[1:]; sys.exit(runpy.run_path(sys.argv[0])['main']())"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        [sys.executable, "-c", slow, *command[1:], "--model", str(trained_checkpoint)], env=environment
    ) as process:
        while process.poll() is None and not (place.is_dir() and _stored(place) >= 32):
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
    kept = _stored(place)
    assert 32 <= kept < 90
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert f"90 images ({90 - kept} added, {kept} kept" in done.stdout


def _stored(place):
    """Number of indexed images, as another process sees it."""
    return VectorTable(str(place), "pictures").count() if (place / "index.json").exists() else 0
