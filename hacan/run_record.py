"""Sacred's record of a run, on disks that may be full: config.json and run.json in the run's folder."""

import logging
import os
from pathlib import Path
from typing import Any

from sacred.observers import FileStorageObserver

from hacan.errors import one_line_errors

log = logging.getLogger(__name__)


class RunRecord(FileStorageObserver):
    """Sacred's record of a run; metrics.json in it is the evaluation's, with its receipt.

    A run whose record cannot be begun is not begun. Later a full disk is a warning: the record stays as it was.
    """

    _begun, _warned = False, False

    def started_event(self, *arguments: Any, **options: Any) -> str:
        """Begin the record, or end the program with one line."""
        with one_line_errors():
            name = super().started_event(*arguments, **options)
        self._begun = True
        return name

    def failed_event(self, *arguments: Any, **options: Any) -> None:
        """Note the failure in the record, where there is one."""
        if self._begun:
            super().failed_event(*arguments, **options)

    def save_json(self, obj: Any, filename: str) -> None:
        """Write a file of the record in one step."""
        partial = Path(str(self.dir)) / f".{filename}.partial"
        try:
            super().save_json(obj, partial.name)
            os.replace(partial, partial.with_name(filename))
        except OSError as error:
            partial.unlink(missing_ok=True)
            if not self._begun:
                raise
            if not self._warned:
                log.warning("the run's record, %s, stays as it was: %s", Path(str(self.dir)) / filename, error.strerror)
            self._warned = True

    def log_metrics(self, metrics_by_name: dict[str, Any], info: dict[str, Any]) -> None:
        """Leave metrics.json alone, which Sacred would rewrite every ten seconds; scalars go to the CSV log."""
