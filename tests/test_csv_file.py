"""Strict CSV: what a spreadsheet or an editor leaves behind is said with its line, and no row is lost."""

import pytest

from datamodules.captions_file import read_captions_file
from hacan.csv_file import read_csv
from hacan.errors import UserError
from hacan.search.folder import texts_of_csv


def rows_of(path, text):
    path.write_text(text, encoding="utf-8")
    return list(read_csv(path))


def test_rows_have_their_first_line_and_columns(tmp_path):
    path = tmp_path / "x.csv"
    found = rows_of(path, '\ufeffImage, Caption\na.jpg,"a dog,\nrunning"\nb.jpg,"say ""hi"""\n')
    assert found == [
        (f"{path}, line 2", {"image": "a.jpg", "caption": "a dog,\nrunning"}),
        (f"{path}, line 4", {"image": "b.jpg", "caption": 'say "hi"'}),
    ]


def test_empty_rows_of_a_spreadsheet_are_skipped_and_counted(tmp_path, caplog):
    found = rows_of(tmp_path / "x.csv", "image,caption\na.jpg,x\n,\n , \n\nb.jpg,y\n,,,\n")
    assert [row["image"] for _, row in found] == ["a.jpg", "b.jpg"]
    assert "x.csv: 3 empty row(s) skipped" in caplog.text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('image,caption\na.jpg,x\nb.jpg,"open\nc.jpg,y\n', "row that starts in line 3 opens a quotation mark"),
        ('image,caption\na.jpg,"open\nb.jpg,"a, b"\nc.jpg,y\n', "row that starts in line 2 is not CSV"),
        ("image,caption,Caption\na.jpg,x,y\n", "line 1: the column 'caption' is there more than once"),
        ("image,caption\na.jpg,a dog, running\n", "line 2 has 3 cells, expected 2"),
    ],
)
def test_what_would_lose_rows_is_an_error_in_training_and_in_an_index(tmp_path, text, message):
    path = tmp_path / "captions.csv"
    for read in (lambda: rows_of(path, text), lambda: read_captions_file(tmp_path), lambda: texts_of_csv(path)):
        with pytest.raises(UserError, match=message) as error:
            read()
        assert "captions.csv" in str(error.value) and "\n" not in str(error.value)
