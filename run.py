"""The command line: `python run.py with data_root=/data loss="GCD"` (Sacred; see config.py for the keys).

config -> settings -> data, model, trainer -> fit or test. Settings are judged before torch is even imported, so that a
wrong key costs a second.
"""

import logging
import os
import warnings
from pathlib import Path
from typing import Any

# sacred 0.8.7 imports pkg_resources; requirements.txt pins the setuptools that has it.
warnings.filterwarnings("ignore", message="pkg_resources is deprecated")
warnings.filterwarnings("ignore", message=".*LeafSpec.*")  # Lightning 2.6 on torch 2.11

from sacred.run import Run  # noqa: E402

from config import ex  # noqa: E402
from hacan.errors import is_first_process, one_line_errors, require_writable  # noqa: E402
from hacan.public_config import ignored_keys  # noqa: E402
from hacan.run_record import RunRecord  # noqa: E402
from hacan.settings import Settings  # noqa: E402


@ex.config_hook
def judge_and_record(config: dict[str, Any], command_name: str, logger: Any) -> dict[str, Any]:
    """Judge the settings before the run exists, then have it recorded under log_dir/exp_name."""
    if command_name == "main":
        with one_line_errors():
            settings = Settings.from_flat(config)
            from hacan.alignment import form_of  # torch is imported only now

            form_of(settings.model.alignment)
            run = settings.run
            require_writable(Path(run.log_dir) / run.exp_name, key=f"log_dir={run.log_dir}")
        if is_first_process() and (ignored := ignored_keys(config)):
            logger.warning("%s: no effect in the public code, and none here", ", ".join(ignored))
        if not is_first_process():
            logging.disable(logging.INFO)  # the first one says it
            logging.getLogger(str(ex.path)).setLevel(logging.ERROR)  # nor do they mind that they have no observer
        if is_first_process() and not ex.observers:
            ex.observers.append(RunRecord(Path(run.log_dir) / run.exp_name))
    return {}


def build_data(settings: Settings, tokenizer: Any) -> Any:
    """The data module of these settings: their data set's records, and how its pictures are framed."""
    from datamodules.datamodule import PairDataModule
    from datamodules.readers import framing_of, read_records

    data = settings.data
    return PairDataModule(
        records=read_records(
            data.datasets, data.data_root, use_restval=data.use_restval, scenes_pictures=data.scenes_pictures
        ),
        tokenizer=tokenizer,
        image_size=data.image_size,
        max_text_len=data.max_text_len,
        batch_size=data.batch_size,
        per_gpu_batchsize=data.per_gpu_batchsize,
        num_workers=data.num_workers,
        seed=settings.run.seed,
        on_bad_image=data.on_bad_image,
        framing=framing_of(data.datasets),
    )


@ex.automain
def main(_run: Run, _config: dict[str, Any]) -> dict[str, float]:
    """Train and evaluate, or only evaluate; returns the final figures, which Sacred records."""
    with one_line_errors():
        settings = Settings.from_flat(_config)
        home = Path(settings.run.log_dir) / settings.run.exp_name
        folder = Path(_run.observers[0].dir) if _run.observers else home / f"process-{os.getpid()}"

        from datamodules.tokens import load_tokenizer  # torch and its kin are imported only now
        from hacan import pipeline
        from hacan.checkpoints.loading import open_checkpoint, open_models

        models, tokenizer, settings = open_models(settings, load_tokenizer)
        data = build_data(settings, tokenizer)
        names = list(settings.run.checkpoint)
        if not settings.run.test_only:
            best = pipeline.train(settings, models[0], tokenizer, data, run_folder=folder, home=home)
            if best is None:  # interrupted: the checkpoint is there, and the run goes on another time
                return {}
            opened = open_checkpoint(best, score_memory=settings.eval.score_memory)
            models, names = [opened.model], [str(best)]
        evaluation = pipeline.test(settings, models, names, data, run_folder=folder, home=home, tokenizer=tokenizer)
        return evaluation.hierarchical._asdict()
