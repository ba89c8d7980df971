"""The command line: `python run.py with data_root=/data loss="GCD"` (Sacred; see config.py for the keys).

config -> settings -> data, model, trainer -> fit or test. Settings are judged before torch is even imported, so that a
wrong key costs a second.
"""

import logging
import os
import sys
import warnings
from pathlib import Path
from typing import Any

warnings.filterwarnings(
    "ignore", message="pkg_resources is deprecated"
)  # sacred 0.8.7 imports it; setuptools is pinned

from sacred import SETTINGS  # noqa: E402
from sacred.observers import FileStorageObserver  # noqa: E402
from sacred.run import Run  # noqa: E402

from config import ex  # noqa: E402
from hacan.errors import UserError  # noqa: E402
from hacan.settings import Settings  # noqa: E402


def is_first_process() -> bool:
    """Whether this process records the run: the first one of torchrun, SLURM or Lightning's own launcher."""
    return all(os.environ.get(name, "0") == "0" for name in ("RANK", "LOCAL_RANK", "SLURM_PROCID"))


@ex.config_hook
def judge_and_record(config: dict[str, Any], command_name: str, logger: logging.Logger) -> dict[str, Any]:
    """Judge the settings before the run exists, then have it recorded under log_dir/exp_name."""
    if command_name == "main":
        settings = Settings.from_flat(config)
        if is_first_process() and not ex.observers:
            ex.observers.append(FileStorageObserver(Path(settings.run.log_dir) / settings.run.exp_name))
    return {}
