import json

import pytest
from bad_json import ANY_JSON, LEAVES, error_of, nested, records_or_user_error
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from datamodules.captions_file import read_captions_file, split_of_name
from datamodules.inspection import inspect_data_set
from datamodules.readers import read_records
from datamodules.records import CaptionedImage
from hacan.errors import UserError


@pytest.fixture
def root(tmp_path):
    (tmp_path / "images" / "deep").mkdir(parents=True)
    for name in ("a.jpg", "b,ü.jpg", "deep/c.jpg"):
        (tmp_path / "images" / name).write_bytes(b"-")
    return tmp_path


CSV = """\ufeffimage,Caption,split,remark
a.jpg,"A dog, running",train,x
"b,ü.jpg",two
lines?,val,
deep/c.jpg,"two
lines",test,
a.jpg,,train,
"""


def test_csv_with_splits(root):
    (root / "captions.csv").write_text(CSV.replace("two\nlines?,val", '"say ""hi""",val'), encoding="utf-8")
    assert read_records("captions", root) == [
        CaptionedImage(root / "images" / "a.jpg", ("A dog, running", ""), 0, "train"),
        CaptionedImage(root / "images" / "b,ü.jpg", ('say "hi"',), 1, "val"),
        CaptionedImage(root / "images" / "deep" / "c.jpg", ("two\nlines",), 2, "test"),
    ]


def test_jsonl_with_splits_and_images_beside_it(root):
    for picture in list((root / "images").glob("*.jpg")):
        picture.rename(root / picture.name)
    (root / "images" / "deep" / "c.jpg").rename(root / "c.jpg")
    (root / "images" / "deep").rmdir()
    (root / "images").rmdir()
    rows = [
        {"image": "a.jpg", "caption": "one\u2028line", "split": "train"},
        {"image": "c.jpg", "caption": "\U0001f600", "split": "val", "more": [1]},
        {"image": "a.jpg", "caption": "again", "split": "train"},
    ]
    text = "\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    (root / "captions.jsonl").write_text(text + "\n", encoding="utf-8")
    assert read_records("captions", root) == [
        CaptionedImage(root / "a.jpg", ("one\u2028line", "again"), 0, "train"),
        CaptionedImage(root / "c.jpg", ("\U0001f600",), 1, "val"),
    ]


def test_without_splits_a_hash_of_the_name_assigns_them_with_a_warning(root, caplog):
    (root / "captions.csv").write_text('image,caption\na.jpg,x\n"b,ü.jpg",y\na.jpg,z\n', encoding="utf-8")
    records = read_captions_file(root)
    assert [record.split for record in records] == [split_of_name("a.jpg"), split_of_name("b,ü.jpg")]
    assert "assigned by a hash" in caplog.text
    assert split_of_name("a.jpg") == "train"  # written down: it must never change


def test_split_by_name_is_about_80_10_10():
    splits = [split_of_name(f"image {i}.jpg") for i in range(4000)]
    for split, share in {"train": 0.8, "val": 0.1, "test": 0.1}.items():
        assert abs(splits.count(split) / len(splits) - share) < 0.02


@pytest.mark.parametrize(
    ("name", "text", "part"),
    [
        ("captions.csv", "", "no column image and no column caption"),
        ("captions.csv", "file,caption\na,b\n", "no column image"),
        ("captions.csv", "image,caption\n", "has no captions"),
        ("captions.csv", "image,caption\na.jpg,a dog, running\n", "line 2 has 3 cells"),
        ("captions.csv", "image,caption\na.jpg\n", "line 2 has 1 cells"),
        ("captions.csv", "image,caption,split\na.jpg,x,exam\n", "'exam': expected one of train, val, test, dev, valid"),
        ("captions.csv", "image,caption,split\na.jpg,x,val\na.jpg,y,test\n", "belongs to one split"),
        ("captions.csv", "image,caption,split\na.jpg,x,val\na.jpg,y,train\n", "belongs to one split"),
        ("captions.csv", "image,caption\n,x\n", "line 2, 'image' is ''"),
        ("captions.csv", "image,caption\nz.jpg,x\ny.jpg,x\n", "z.jpg and 1 more"),
        ("captions.jsonl", "\n \n", "has no captions"),
        ("captions.jsonl", '{"image": "a.jpg", "caption": "x"}\n{"image"', "line 2"),
        ("captions.jsonl", "[1]", "expected an object"),
        ("captions.jsonl", '{"image": "a.jpg"}', "lacks the key 'caption'"),
        ("captions.jsonl", '{"image": "a.jpg", "caption": ["x"]}', "'caption' is ['x']"),
        ("captions.jsonl", '{"image": "a.jpg", "caption": "x", "split": 1}', "'split' is 1"),
        ("captions.jsonl", '{"image": "a\\u0000", "caption": "x"}', "name of an image file"),
    ],
)
def test_bad_files_say_where(root, name, text, part):
    (root / name).write_text(text, encoding="utf-8")
    message = error_of(read_captions_file, root)
    assert part in message and (name in message or "z.jpg" in message)


def test_no_file_and_files_of_other_encodings(root):
    message = error_of(read_captions_file, root)
    assert "captions.csv" in message and "captions.jsonl" in message
    for name in ("captions.jsonl", "captions.csv"):
        (root / name).write_bytes("image,caption\na.jpg,grün\n".encode("latin-1"))
        assert "UTF-8" in error_of(read_captions_file, root)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    lines=st.lists(
        st.fixed_dictionaries({"image": ANY_JSON, "caption": ANY_JSON}, optional={"split": ANY_JSON})
        | st.builds(nested, st.integers(1, 12), LEAVES),
        max_size=3,
    ),
    cut=st.integers(0, 9),
)
def test_any_json_lines_give_records_or_one_line(tmp_path, lines, cut):
    text = "\n".join(map(json.dumps, lines))
    (tmp_path / "captions.jsonl").write_text(text[: len(text) - cut], encoding="utf-8")
    records_or_user_error(lambda: read_captions_file(tmp_path, check_files=False))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=st.lists(st.text('ab",\n\r\0 é', max_size=12), max_size=4))
def test_any_csv_gives_records_or_one_line(tmp_path, rows):
    (tmp_path / "captions.csv").write_text("image,caption\n" + "\n".join(rows), encoding="utf-8", newline="")
    records_or_user_error(lambda: read_captions_file(tmp_path, check_files=False))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ("p0.jpg,x,train\n./p0.jpg,y,test\n", "line 3: './p0.jpg' is in the split 'test' here and in 'train' above"),
        ("p0.jpg,x,train\np1.jpg,y,\n", "line 3 has no split, but"),
        ("p0.jpg,x,\np1.jpg,y,test\n", "line 3 has a split, but"),
        ("../secret.jpg,x,train\n", "expected a path within"),
        ("/etc/passwd,x,train\n", "expected a path within"),
    ],
)
def test_leaks_between_splits_and_paths_out_of_the_folder_are_errors(tmp_path, rows, message):
    (tmp_path / "captions.csv").write_text("image,caption,split\n" + rows)
    assert message in error_of(read_captions_file, tmp_path, check_files=False)


def test_spellings_of_one_image_are_one_record_and_dev_is_val(tmp_path):
    (tmp_path / "captions.csv").write_text("image,caption,split\np0.jpg,x,dev\n./p0.jpg,y,validation\n")
    (record,) = read_captions_file(tmp_path, check_files=False)
    assert (record.path, record.captions, record.split) == (tmp_path / "p0.jpg", ("x", "y"), "val")


NFC, NFD = "caf\u00e9", "cafe\u0301"


@pytest.mark.parametrize(("listed", "there"), [(NFC, NFD), (NFD, NFC)])
@pytest.mark.parametrize("place", ["{}.jpg", "{}/a.jpg", "{0}/{0}.jpg"])
def test_names_in_another_unicode_form_are_matched(tmp_path, listed, there, place):
    file = tmp_path / "images" / place.format(there)
    file.parent.mkdir(parents=True)
    file.touch()
    (tmp_path / "captions.csv").write_text(
        f"image,caption,split\n{place.format(listed)},a dog,train\n", encoding="utf-8"
    )
    (record,) = read_captions_file(tmp_path)
    assert record.path.is_file()
    findings = inspect_data_set("captions", tmp_path)
    assert not findings.splits["train"].missing


def test_two_forms_of_one_name_are_one_image(tmp_path):
    (tmp_path / f"{NFD}.jpg").touch()
    lines = [f"{NFC}.jpg,a dog,train", f"{NFD}.jpg,a cat,train"]
    (tmp_path / "captions.csv").write_text("image,caption,split\n" + "\n".join(lines), encoding="utf-8")
    (record,) = read_captions_file(tmp_path)
    assert record.captions == ("a dog", "a cat") and record.path.is_file()
    (tmp_path / "captions.csv").write_text(
        "image,caption,split\n" + "\n".join([lines[0], lines[1].replace("train", "test")]), encoding="utf-8"
    )
    with pytest.raises(UserError, match="an image belongs to one split"):
        read_captions_file(tmp_path)
