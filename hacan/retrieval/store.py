"""Arrays that are filled a batch at a time, in memory, in a folder, or both, with a journal of what is complete.

The journal is a file of lines, one a batch: its rows and a checksum of their values. A line is written after the
values; a process that is killed leaves at most half a line, which is ignored. On opening every line is checked against
the arrays, so that what a lost disk cache or a copied folder damaged is encoded again and never believed.
"""

import json
import os
import shutil
import tempfile
import uuid
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from hacan.errors import UserError

MIB = 2**20
SPOOL = 64 * MIB  # scores that are kept in memory; larger ones go to a scratch file


class ArraySpec(NamedTuple):
    """Shape and type of an array. Ragged ones give `offsets` [rows + 1]: row j owns offsets[j]:offsets[j + 1]."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    offsets: Tensor | None = None

    @property
    def bytes(self) -> int:
        """Size of the array."""
        return int(np.prod(self.shape)) * self.dtype.itemsize


class RowStore:
    """Named arrays of `rows` rows. folder: kept there, and taken up from there; in_memory: a copy in memory to work on.

    With neither, the arrays are mapped to files that vanish with the process. `writer` names the journal of one of
    several processes that fill the same folder.
    """

    def __init__(
        self, specs: Mapping[str, ArraySpec], *, rows: int, folder: Path | None, in_memory: bool, writer: int = 0
    ) -> None:
        self._specs, self._folder = dict(specs), folder
        self._journal = None if folder is None else folder / f"journal-{writer}.jsonl"
        self.done = torch.zeros(rows, dtype=torch.bool)
        self._mapped: dict[str, Tensor] = {}
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            self._mapped = {name: _map_file(folder / f"{name}.npy", spec) for name, spec in self._specs.items()}
        elif not in_memory:
            with tempfile.TemporaryDirectory(prefix="hacan-features-") as scratch:  # the mapping outlives the name
                self._mapped = {name: _map_file(Path(scratch, name), spec) for name, spec in self._specs.items()}
        if in_memory:
            self.arrays = {name: torch.empty(spec.shape, dtype=spec.dtype) for name, spec in self._specs.items()}
        else:
            self.arrays = self._mapped
        self.refresh()

    def write(self, rows: Tensor, values: Mapping[str, Tensor]) -> None:
        """Values of some rows, array by array; ragged ones one row after the other."""
        checksum = 0
        for name, value in values.items():
            places = self._places(name, rows)
            value = value.to("cpu", self._specs[name].dtype).contiguous()
            self.arrays[name][places] = value
            if self._folder is not None:
                if self._mapped is not self.arrays:
                    self._mapped[name][places] = value
                checksum = _checksum(value, checksum)
        self.done[rows] = True
        if self._journal is not None:
            with open(self._journal, "a") as file:
                line = json.dumps({"rows": rows.tolist(), "crc": checksum})
                file.write(f"\n{line}\n")  # the line before may be half a one

    def refresh(self) -> None:
        """Take up what the journals of all processes say is complete, and what proves to be so."""
        if self._folder is None:
            return
        lines = [line for path in sorted(self._folder.glob("journal-*.jsonl")) for line in _lines(path)]
        for line in tqdm(lines, desc="checking kept features", unit="batch", delay=2):
            rows = torch.tensor(line["rows"])
            if len(rows) == 0 or int(rows.max()) >= len(self.done) or bool(self.done[rows].all()):
                continue
            checksum = 0
            values = {name: self._mapped[name][self._places(name, rows)] for name in self._specs}
            for value in values.values():
                checksum = _checksum(value, checksum)
            if checksum == line["crc"]:
                self.done[rows] = True
                if self._mapped is not self.arrays:
                    for name, value in values.items():
                        self.arrays[name][self._places(name, rows)] = value

    def _places(self, name: str, rows: Tensor) -> Tensor:
        offsets = self._specs[name].offsets
        if offsets is None:
            return rows
        lengths = offsets[rows + 1] - offsets[rows]
        shifts = offsets[rows] - lengths.cumsum(0) + lengths
        return torch.arange(int(lengths.sum())) + shifts.repeat_interleave(lengths)


def write_atomically(path: Path, text: str) -> None:
    """The file is there in full or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}")
    temporary.write_text(text)
    os.replace(temporary, path)


def _map_file(path: Path, spec: ArraySpec) -> Tensor:
    """The array of a file, mapped; made where there is none of that kind."""
    numpy_type = torch.empty(0, dtype=spec.dtype).numpy().dtype
    try:
        spoilt = path.is_file()
        if spoilt:
            array = _opened(path)
            if array is not None and array.shape == spec.shape and array.dtype == numpy_type:
                _take_room(path)
                return torch.from_numpy(array)
        fresh = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}")
        try:
            array = np.lib.format.open_memmap(fresh, mode="w+", dtype=numpy_type, shape=spec.shape)
            _take_room(fresh)
            if spoilt:
                os.replace(fresh, path)
            else:
                os.link(fresh, path)  # fails where another process was first
        except FileExistsError:
            return _map_file(path, spec)
        finally:
            fresh.unlink(missing_ok=True)
    except OSError as error:
        free = shutil.disk_usage(path.parent).free // MIB
        raise UserError(
            f"the features need {spec.bytes // MIB} MiB in {path}, where {free} MiB are free ({error.strerror}): make "
            "room, or point log_dir at another disk"
        ) from error
    return torch.from_numpy(array)


def _opened(path: Path) -> np.memmap | None:
    """The array of a file; None where it is none: it is made anew, and what the journal says will not fit it."""
    try:
        return np.lib.format.open_memmap(path, mode="r+")
    except ValueError:
        return None


def _take_room(path: Path) -> None:
    """Have the disk hold the whole file: writing through a map into a hole of a full disk would kill the process."""
    with open(path, "r+b") as file:
        os.posix_fallocate(file.fileno(), 0, os.path.getsize(path))


def _lines(path: Path) -> Sequence[dict]:
    found = []
    for text in path.read_text(errors="replace").splitlines():
        try:
            line = json.loads(text)
        except ValueError:
            continue  # cut off by the end of the process
        if isinstance(line, dict) and line.keys() == {"rows", "crc"}:
            found.append(line)
    return found


def _checksum(value: Tensor, start: int) -> int:
    return zlib.crc32(value.contiguous().numpy().reshape(-1).view(np.uint8), start)


class SpooledScores:
    """Scores [N, M], computed by blocks of images once and then read back, from memory or from a scratch file."""

    def __init__(self, scores: Callable[[slice], Tensor], *, images: int, texts: int, in_memory: int = SPOOL) -> None:
        self._scores, self._known = scores, torch.zeros(images, dtype=torch.bool)
        spec = ArraySpec((images, texts), torch.float32)
        if spec.bytes <= in_memory:
            self._kept = torch.empty(spec.shape)
        else:
            with tempfile.TemporaryDirectory(prefix="hacan-scores-") as scratch:  # the mapping outlives the name
                self._kept = _map_file(Path(scratch, "scores.npy"), spec)

    def __call__(self, rows: slice) -> Tensor:
        """Scores [n, M] of a slice of the images."""
        if not bool(self._known[rows].all()):
            self._kept[rows] = self._scores(rows).float().cpu()
            self._known[rows] = True
        return self._kept[rows]
