"""Resuming an interrupted run: find its checkpoint and check that it belongs to the same run."""

import dataclasses
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hacan.errors import UserError
from hacan.settings import ModelSettings, Settings, values_before
from hacan.training.callbacks import LAST

log = logging.getLogger(__name__)

# Settings that a resumed run may change without a warning.
MAY_CHANGE: tuple[str, ...] = (
    "exp_name",
    "log_dir",
    "save_path",
    "checkpoint",
    "trust_checkpoint",
    "resume_from",
    "test_only",
)
MAY_CHANGE += ("report", "data_root", "num_workers", "max_epoch", "image_weights", "text_weights", "tokenizer")
MAY_CHANGE += ("eval_split", "fold5", "score_memory", "feature_memory", "feature_disk", "bootstrap", "curve")
MAY_CHANGE += ("cache_features", "judged_matches", "eval_precision")
# Settings that determine which pairs a batch holds; they must not change.
BATCHES: tuple[str, ...] = (
    "datasets",
    "use_restval",
    "captions_per_image",
    "drop_last",
    "batch_size",
    "per_gpu_batchsize",
)
BATCHES += ("augmentation", "num_gpus", "num_nodes", "image_size")


def check_same_run(settings: Settings, stored: Mapping[str, Any], *, source: Path) -> None:
    """Compare with the `stored` flat config of the checkpoint `source`.

    Raise `UserError` if the model or the batches differ; warn of other differences, except `MAY_CHANGE`.
    """
    now = json.loads(json.dumps(settings.to_flat()))
    stored = json.loads(json.dumps({**values_before(), **stored}))
    changed = {key: value for key, value in stored.items() if now.get(key) != value and key not in MAY_CHANGE}
    model = {field.name for field in dataclasses.fields(ModelSettings)} - {"image_weights", "text_weights"}
    for key in changed:
        if key in model or key in BATCHES:
            raise UserError(
                f"{key}={now.get(key)!r}, but {source} is of a run with {key}={changed[key]!r}: resume_from continues "
                "the same run; to start a new one from these weights give checkpoint=PATH"
            )
    if changed:
        differences = ", ".join(f"{key} was {value!r}, is {now.get(key)!r}" for key, value in changed.items())
        log.warning("resumed with other settings than before: %s", differences)


def checkpoint_to_resume(settings: Settings, home: Path) -> Path | None:
    """Return the checkpoint that `resume_from` names, or None if it is empty.

    `last` is last.ckpt in `save_path`, or of the newest run below `home` (log_dir/exp_name).
    """
    wanted = settings.run.resume_from
    if not wanted:
        return None
    if wanted != "last":
        if not Path(wanted).is_file():
            raise UserError(f"resume_from={wanted!r}: there is no such file; give a checkpoint, or last")
        return Path(wanted)
    places = [Path(settings.run.save_path)] if settings.run.save_path else home.glob("*/checkpoints")
    found = [place / LAST for place in places if (place / LAST).is_file()]
    if not found:
        where = settings.run.save_path or f"{home}/*/checkpoints"
        raise UserError(f"resume_from=last: there is no {LAST} in {where}; give the checkpoint's path")
    # By the number of the run: time stamps are wrong after a change of the clock.
    numbers = {path: path.parent.parent.name for path in found}
    return max(found, key=lambda path: int(numbers[path]) if numbers[path].isdigit() else -1)
