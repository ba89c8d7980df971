"""How this program uses Sacred: plain configs, an optional git commit, and a record that survives a full disk."""

import json
import logging
import os
import traceback
from pathlib import Path
from typing import Any, NoReturn

# GitPython, which Sacred imports, raises on import where there is no git executable, unless it is told otherwise.
os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")

import sacred
import sacred.arg_parser
import yaml
from sacred.config import config_files
from sacred.dependencies import get_commit_if_possible
from sacred.observers import FileStorageObserver
from sacred.utils import SacredError

from hacan.errors import UserError, one_line_errors

log = logging.getLogger(__name__)

PROJECT = Path(__file__).resolve().parents[1]
CONFIG_FORMATS = (".json", ".yaml", ".yml")


class Experiment(sacred.Experiment):
    """A Sacred experiment whose command line answers a mistake with one line."""

    def run(self, *arguments: Any, **options: Any) -> Any:
        """Run a command; end the program with one line if the command line names something that does not exist."""
        with one_line_errors():
            try:
                return super().run(*arguments, **options)
            except (ImportError, LookupError, ValueError, SacredError) as error:
                files = [Path(frame.filename) for frame in traceback.extract_tb(error.__traceback__)[1:]]
                if any(file.is_relative_to(PROJECT) and "site-packages" not in file.parts for file in files):
                    raise  # by this project's code, not by Sacred's
                reason = " ".join(str(error.args[0] if error.args else error).split())
                raise UserError(f"Sacred cannot follow the command line: {reason}; see run.py --help") from error


def plain(value: Any) -> Any:
    """Return the value of a config file or of the command line as plain data.

    Sacred decodes values with jsonpickle, whose `py/...` keys can import modules and call functions. The only one that
    is decoded here is `py/tuple`, which Sacred writes into config.json. Raise `UserError` for the others.
    """
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if not isinstance(value, dict):
        return value
    if set(value) == {"py/tuple"}:
        return plain(value["py/tuple"])
    for key in value:
        if isinstance(key, str) and key.startswith("py/"):
            raise UserError(
                f"the config holds the key {key!r}, a jsonpickle instruction that can run code: expected plain values; "
                "remove it"
            )
    return {key: plain(item) for key, item in value.items()}


def read_plain_configs() -> None:
    """Make Sacred read config files and values as plain data: JSON and YAML, never a pickle."""

    def restore(value: Any) -> Any:
        with one_line_errors():
            return plain(value)

    def load_json(file: Any) -> Any:
        with one_line_errors():
            try:
                return plain(json.load(file))
            except ValueError as error:
                raise UserError(f"{file.name} is not a JSON file: {error}") from error

    def load_yaml(file: Any) -> Any:
        with one_line_errors():
            try:
                return plain(yaml.safe_load(file))
            except yaml.YAMLError as error:
                raise UserError(
                    f"{file.name} is not a YAML file of plain values: {' '.join(str(error).split())}"
                ) from error

    def refuse(file: Any) -> NoReturn:
        with one_line_errors():
            raise UserError(
                f"{file.name} is a pickle, which can run code: give the config as {' or '.join(CONFIG_FORMATS)}"
            )

    sacred.arg_parser.restore = restore
    for extension, load in zip(CONFIG_FORMATS, (load_json, load_yaml, load_yaml), strict=True):
        config_files.HANDLER_BY_EXT[extension] = config_files.Handler(load, None, "")
    config_files.HANDLER_BY_EXT[".pickle"] = config_files.Handler(refuse, None, "b")


def git_commit_is_readable(file: str | Path) -> bool:
    """Return whether Sacred can record the git commit of `file`; log the reason if it cannot.

    It cannot without a git executable, in a repository without commits, or in one that belongs to another user.
    """
    try:
        get_commit_if_possible(str(Path(file).resolve()), save_git_info=True)
    except Exception as error:  # GitPython raises its own errors, ValueError, OSError and ImportError
        reason = " ".join(str(error).split()) or type(error).__name__
        log.warning("the run's record has no git commit: %s", reason[:200])
        return False
    return True


class RunRecord(FileStorageObserver):
    """Sacred's record of a run: config.json and run.json in the run's folder.

    A run does not start if its record cannot be written. Later a full disk is a warning.
    """

    _started, _warned = False, False

    def started_event(self, *arguments: Any, **options: Any) -> str:
        """Start the record, or end the program with one line."""
        with one_line_errors():
            try:
                name = super().started_event(*arguments, **options)
            except FileExistsError as error:
                raise UserError(f"{error.filename} exists: --id was used before; give another one") from error
        self._started = True
        return name

    def failed_event(self, *arguments: Any, **options: Any) -> None:
        """Record the failure, if the record was started."""
        if self._started:
            super().failed_event(*arguments, **options)

    def save_json(self, obj: Any, filename: str) -> None:
        """Write a file of the record atomically."""
        path = Path(str(self.dir)) / filename
        partial = path.with_name(f".{filename}.partial")
        try:
            super().save_json(obj, partial.name)
            os.replace(partial, path)
        except OSError as error:
            partial.unlink(missing_ok=True)
            if not self._started:
                raise
            if not self._warned:
                log.warning("the run's record, %s, stays as it was: %s", path, error.strerror)
            self._warned = True

    def log_metrics(self, metrics_by_name: dict[str, Any], info: dict[str, Any]) -> None:
        """Do nothing: Sacred would write metrics.json, which is the evaluation's; scalars are in the CSV log."""
