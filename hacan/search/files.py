"""Files of an index by name: in a folder, or in an object storage under a URI such as s3://BUCKET/FOLDER."""

import os
from collections.abc import Iterable
from pathlib import Path

from pyarrow import fs

from hacan.errors import UserError

PARTIAL = ".partial"


class IndexFiles:
    """Reads and writes whole files below an address; a name can hold folders, `a/b`."""

    def __init__(self, address: str | Path) -> None:
        self.address = str(address)
        self.remote = "://" in self.address
        try:
            if self.remote:
                self._filesystem, self._root = fs.FileSystem.from_uri(self.address)
                if not self._root:
                    raise ValueError("it names no bucket")
            else:
                self.address = os.path.expanduser(self.address)
                self._filesystem, self._root = fs.LocalFileSystem(), os.path.abspath(self.address)
        except (OSError, ValueError) as error:
            raise UserError(
                f"{self.address} is not an address of an index ({_reason(error)}): give a folder, or a URI such as "
                "s3://BUCKET/FOLDER"
            ) from error

    def read(self, name: str) -> bytes:
        """Return a file's content; raise `FileNotFoundError` if there is none, `UserError` if it cannot be read."""
        try:
            with self._filesystem.open_input_file(self._path(name)) as file:
                return file.read()
        except (FileNotFoundError, NotADirectoryError) as error:
            raise FileNotFoundError(f"there is no {name}") from error
        except OSError as error:
            raise UserError(f"{self.address}/{name} cannot be read: {_reason(error)}") from error

    def write(self, name: str, content: bytes) -> None:
        """Write a file so that it is there completely or not at all."""
        path = self._path(name)
        try:
            if self.remote:  # an object appears when it is complete
                with self._filesystem.open_output_stream(path) as file:
                    file.write(content)
                return
            self._filesystem.create_dir(os.path.dirname(path), recursive=True)
            with self._filesystem.open_output_stream(path + PARTIAL) as file:
                file.write(content)
            self._filesystem.move(path + PARTIAL, path)
        except OSError as error:
            raise UserError(
                f"{self.address}/{name} cannot be written: {_reason(error)}; make it writable or free space, and run "
                "the same command again: it resumes"
            ) from error

    def remove(self, names: Iterable[str]) -> None:
        """Remove files; without effect for those that do not exist."""
        for name in names:
            if self._filesystem.get_file_info(self._path(name)).type != fs.FileType.NotFound:
                self._filesystem.delete_file(self._path(name))

    def is_empty(self) -> bool:
        """Return whether there is nothing at the address."""
        found = self._filesystem.get_file_info(self._root)
        if found.type == fs.FileType.Directory:
            return not self._filesystem.get_file_info(fs.FileSelector(self._root))
        return found.type == fs.FileType.NotFound

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}"


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
