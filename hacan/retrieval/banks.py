"""Which encoded features stay on disk: a folder per bank, and those that were not used for longest go first."""

import logging
import shutil
import time
from pathlib import Path

from hacan.retrieval.store import MIB

log = logging.getLogger(__name__)

USED = "used"  # a file in a bank's folder, touched when an evaluation takes it up
GRACE = 600.0  # seconds after its last write in which a bank may be another evaluation's, under way


def mark_used(bank: Path) -> None:
    """The bank is wanted now; its folder is made where there is none."""
    bank.mkdir(parents=True, exist_ok=True)
    (bank / USED).touch()


def prune_banks(folder: Path, *, budget: int, began: float) -> list[Path]:
    """Delete banks of `folder` until the rest fits `budget` MiB, the one that was not used for longest first.

    Banks used since `began` (seconds, as time.time() gives them: when this evaluation began) stay in any case, and so
    do those that another evaluation may be filling: written to within GRACE. The deleted ones are returned.
    """
    if not folder.is_dir():
        return []
    found = sorted((_last_use(bank), bank) for bank in folder.iterdir() if bank.is_dir())
    sizes = {bank: sum(file.stat().st_size for file in _files(bank)) for _, bank in found}
    total, gone = sum(sizes.values()), []
    for used, bank in found:
        if total <= budget * MIB or used >= min(began, time.time() - GRACE):
            break
        shutil.rmtree(bank)
        total -= sizes[bank]
        gone.append(bank)
    if gone:
        freed = sum(sizes[bank] for bank in gone) / MIB
        log.info("%s: deleted %d sets of features, %.0f MiB (feature_disk=%d)", folder, len(gone), freed, budget)
    return gone


def _last_use(bank: Path) -> float:
    return max((file.stat().st_mtime for file in _files(bank)), default=0.0)


def _files(bank: Path) -> list[Path]:
    return [file for file in bank.rglob("*") if file.is_file()]
