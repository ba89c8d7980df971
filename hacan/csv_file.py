"""Strict reading of CSV files with captions: every row has the columns of the first line, and every quote is closed."""

import csv
import logging
from collections.abc import Iterator
from pathlib import Path

from hacan.errors import UserError

log = logging.getLogger(__name__)


def read_csv(path: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """Yield (place, row) of a CSV file in UTF-8; the place names file and line, the row is keyed by lower-case columns.

    Rows without any text, as spreadsheets append them, are skipped, and their number is logged. Raise `UserError` for
    a missing first line, repeated columns, a row with more or fewer cells, and a quotation mark that is not closed.
    """
    empty = 0
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file, strict=True)
            columns = [name.strip().lower() for name in next(reader, [])]
            repeated = sorted({name for name in columns if columns.count(name) > 1})
            if repeated:
                raise UserError(
                    f"{path}, line 1: the column {repeated[0]!r} is there more than once; rename one of them"
                )
            first = reader.line_num + 1  # of the row that is read next
            while (cells := _next_row(reader, path, first)) is not None:
                place, first = f"{path}, line {first}", reader.line_num + 1
                if not any(cell.strip() for cell in cells):
                    empty += bool(cells)
                elif len(cells) != len(columns):
                    raise UserError(
                        f"{place} has {len(cells)} cells, expected {len(columns)} ({', '.join(columns)}); put a "
                        'caption with commas between double quotes: dog.jpg,"a dog, running"'
                    )
                else:
                    yield place, dict(zip(columns, cells, strict=True))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read as CSV in UTF-8: {error}") from error
    if empty:
        log.warning("%s: %d empty row(s) skipped", path, empty)


def csv_columns(path: Path) -> list[str]:
    """Return the lower-case names of the columns of a CSV file."""
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            return [name.strip().lower() for name in next(csv.reader(file), [])]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path} cannot be read as CSV in UTF-8: {error}") from error


def _next_row(reader: Iterator[list[str]], path: Path, line: int) -> list[str] | None:
    try:
        return next(reader, None)
    except csv.Error as error:
        what = "opens a quotation mark that is not closed" if "end of data" in str(error) else f"is not CSV: {error}"
        raise UserError(f"{path}: the row that starts in line {line} {what}") from error
