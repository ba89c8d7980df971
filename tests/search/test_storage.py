"""Where an index lives: an object storage, a read-only folder, a stranger's folder, and readers beside a writer."""

import logging
import os
import pathlib
import pickle
import shutil
import subprocess
import sys

import cv2
import numpy as np
import pytest
from moto.server import ThreadedMotoServer

from hacan.checkpoints.pretrained import Pretrained
from hacan.errors import UserError
from hacan.search import Index, store
from hacan.search.files import IndexFiles
from hacan.search.store import VectorTable

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture
def pretrained(make_model, tokenizer):
    return Pretrained(model=make_model(), tokenizer=tokenizer, image_size=64, centre_crop=True, max_text_len=12)


@pytest.fixture
def images(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for seed in range(6):
        noise = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), dtype=np.uint8)
        cv2.imwrite(str(folder / f"{seed}.png"), cv2.resize(noise, (50, 40), interpolation=cv2.INTER_CUBIC))
    return folder


@pytest.fixture
def bucket(monkeypatch):
    """The URI of an empty bucket of a local S3 server."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    logging.getLogger("werkzeug").setLevel(logging.WARNING)
    server.start()
    host, port = server.get_host_and_port()
    for name, value in {
        "AWS_ENDPOINT": f"http://{host}:{port}",  # LanceDB
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",  # Arrow
        "AWS_ALLOW_HTTP": "true",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)
    import boto3

    boto3.client("s3").create_bucket(Bucket="pictures")
    yield "s3://pictures"
    server.stop()


def test_an_index_in_an_object_storage_is_that_in_a_folder(bucket, pretrained, images, tmp_path):
    local = Index.create(tmp_path / "index", model=pretrained)
    remote = Index.create(f"{bucket}/some/index", model=pretrained)
    for index in (local, remote):
        assert index.update(images, progress=False).added == 6
        index.set_texts(["a dog", "a cat"], progress=False)
    reader = Index.open(f"{bucket}/some/index", model=pretrained)  # as on another machine
    assert reader.search("a red cat") == local.search("a red cat")
    assert reader.search(image=images / "3.png") == local.search(image=images / "3.png")
    (images / "3.png").unlink()
    assert remote.update(images, progress=False).removed == 1
    assert Index.open(f"{bucket}/some/index", model=pretrained).count() == 5
    with pytest.raises(UserError, match="holds an index already"):
        Index.create(f"{bucket}/some/index", model=pretrained)


def test_two_machines_index_into_one_bucket(bucket, pretrained, images, tmp_path):
    others = tmp_path / "others"
    others.mkdir()
    shutil.copy(images / "0.png", others / "copy.png")
    (images / "5.png").rename(others / "5.png")
    first = Index.create(f"{bucket}/index", model=pretrained)
    second = Index.open(f"{bucket}/index", model=pretrained)
    assert first.update(images, progress=False).added == 5
    update = second.update(others, progress=False)
    assert (update.added, update.kept, update.moved) == (1, 5, 1)
    assert Index.open(f"{bucket}/index", model=pretrained).count() == 6


def test_addresses_that_are_none_are_one_line(pretrained):
    for address in ("nonsense://place/x", "s3://"):
        with pytest.raises(UserError, match="is not an address of an index"):
            Index.create(address, model=pretrained)


def test_a_reader_sees_what_is_indexed_meanwhile(pretrained, images, tmp_path):
    writer = Index.create(tmp_path / "index", model=pretrained)
    reader = Index.open(tmp_path / "index", model=pretrained)
    with pytest.raises(UserError, match="holds no images: add some with"):
        reader.search("a dog")
    writer.update(images, progress=False)
    assert len(reader.search("a dog")) == 6
    (images / "0.png").unlink()
    writer.update(images, progress=False)
    assert len(reader.search("a dog")) == 5


def test_other_processes_search_while_one_indexes(pretrained, images, tmp_path):
    index = Index.create(tmp_path / "index", model=pretrained)
    script = (
        "import sys, time\nfrom hacan.search.store import VectorTable\nimport numpy as np\n"
        "table, seen, end = VectorTable(sys.argv[1], 'pictures'), set(), time.time() + 60\n"
        "while time.time() < end and max(seen, default=0) < 6:\n"
        "    hits = table.nearest(np.eye(1, int(sys.argv[2]), dtype=np.float32)[0], 10)\n"
        "    seen.add(len(hits))\n"
        "print(max(seen))"
    )
    width = str(index.about["shapes"]["width"])
    with subprocess.Popen(
        [sys.executable, "-c", script, index.address, width],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    ) as reader:
        index.update(images, batch_size=1, progress=False)
        assert reader.communicate(timeout=100)[0].strip() == "6"


@pytest.mark.skipif(os.name != "posix", reason="permissions")
def test_a_read_only_index_is_searched(pretrained, images, tmp_path):
    Index.create(tmp_path / "index", model=pretrained).update(images, progress=False)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "index").rglob("*")}
    assert len(Index.open(tmp_path / "index", model=pretrained).search("a dog")) == 6
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "index").rglob("*")} == before  # nothing is written


class Attack:
    """Creates a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (pathlib.Path.touch, (self.path,))


def test_nothing_in_a_strangers_index_runs_code(pretrained, images, tmp_path):
    place, ran = tmp_path / "index", tmp_path / "ran"
    index = Index.create(place, model=pretrained)
    index.update(images, progress=False)
    index.set_texts(["a dog"], progress=False)
    attack = pickle.dumps(Attack(ran))
    files = [path for path in place.rglob("*") if path.is_file()]
    assert len(files) > 10
    for path in files:
        content = path.read_bytes()
        path.write_bytes(attack + bytes(max(0, len(content) - len(attack))))
        try:
            stranger = Index.open(place, model=pretrained)
            stranger.search("a dog")
            stranger.search(image=images / "0.png")
        except UserError as error:
            assert "\n" not in str(error)
        path.write_bytes(content)
    assert not ran.exists()
    pickle.loads(attack)
    assert ran.exists()  # it would have


def test_damaged_files_are_one_line(pretrained, images, tmp_path):
    index = Index.create(tmp_path / "index", model=pretrained)
    index.update(images, progress=False)
    generator, damaged = np.random.default_rng(0), 0
    for path in sorted(path for path in (tmp_path / "index").rglob("*") if path.is_file()):
        content = path.read_bytes()
        for _ in range(3):
            changed = bytearray(
                content[: generator.integers(len(content) + 1)] if generator.random() < 0.5 else content
            )
            for place in generator.integers(len(changed), size=4) if changed else ():
                changed[place] = generator.integers(256)
            path.write_bytes(changed)
            try:
                Index.open(tmp_path / "index", model=pretrained).search("a dog")
            except UserError as error:
                damaged += 1
                assert "\n" not in str(error)
        path.write_bytes(content)
    assert damaged > 10


def test_ids_and_shapes_of_a_stranger_reach_no_other_file(tmp_path):
    files = IndexFiles(tmp_path)
    table = VectorTable(str(tmp_path), "pictures", width=2)
    for item in ("../../etc/passwd", "a' OR 'a' = 'a", ""):
        assert table.item(item) is None
        with pytest.raises(UserError):
            table.remove([item])
    with pytest.raises(FileNotFoundError):
        files.read("nothing")


def test_the_approximate_index_finds_what_the_scan_finds(tmp_path, monkeypatch):
    monkeypatch.setattr(store, "EXACT", 1000)
    monkeypatch.setattr(store, "PARTITION", 100)
    monkeypatch.setattr(store, "PROBES", 10)
    generator = np.random.default_rng(0)
    centres = generator.standard_normal((40, 16))
    vectors = (centres[generator.integers(40, size=2200)] + generator.standard_normal((2200, 16)) / 2).astype(
        np.float32
    )
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    table = VectorTable(str(tmp_path), "pictures", width=16)

    def recall(number):
        found = 0
        for query in vectors[:20]:
            exact = set(np.argsort(-(vectors[:number] @ query), kind="stable")[:10].tolist())
            found += len(exact & {hit.payload["row"] for hit in table.nearest(query, 10)})
        return found / 200

    def add(rows):
        table.add([f"{row:04x}" for row in rows], vectors[rows], [{"row": row} for row in rows])

    add(range(900))
    table.optimise()
    assert not table._table.list_indices() and recall(900) == 1
    add(range(900, 1100))
    table.optimise()
    assert [index.name for index in table._table.list_indices()] == ["vector_11"] and recall(1100) > 0.9
    add(range(1100, 1150))
    assert recall(1150) > 0.9  # items that the index does not hold yet are scanned
    add(range(1150, 2200))
    table.optimise()
    assert [index.name for index in table._table.list_indices()] == ["vector_22"]
