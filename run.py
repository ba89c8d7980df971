"""Train and evaluate HACAN for image-text retrieval.

Examples:
  python run.py with data_root=/data loss="GCD"                             train on Flickr30K and evaluate
  python run.py with coco_config data_root=/data                            MS-COCO
  python run.py with data_root=/data test_only=True checkpoint=best.ckpt    evaluate a checkpoint
  python run.py with demo_config                                            the embedded demo: no data needed
  python run.py keys                                                        all config keys: meaning, range, default
  python run.py print_config with coco_config                               the values of a named config

Named configs: coco_config, f8k_config, release_config, revised_config, demo_config; several can be combined.

"""

import json
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
from datamodules.files import check_root  # noqa: E402
from hacan.errors import is_first_process, one_line_errors, require_writable  # noqa: E402
from hacan.public_config import ignored_keys  # noqa: E402
from hacan.sacred_setup import RunRecord  # noqa: E402
from hacan.settings import Settings, format_keys  # noqa: E402

ex.doc = __doc__


@ex.config_hook
def prepare_run(config: dict[str, Any], command_name: str, logger: Any) -> dict[str, Any]:
    """Validate the settings before anything is loaded, and add the record below log_dir/exp_name."""
    if command_name == "main":
        with one_line_errors():
            settings = Settings.from_flat(config)
            from hacan.alignment import form_of  # imports torch

            form_of(settings.model.alignment)
            if settings.data.datasets != "scenes":  # the demo draws its images there
                check_root(Path(settings.data.data_root))
            run = settings.run
            require_writable(Path(run.log_dir) / run.exp_name, key=f"log_dir={run.log_dir}")
        if is_first_process():
            if ignored := ignored_keys(config):
                logger.warning("%s: no effect in the public code, and none here", ", ".join(ignored))
            if not ex.observers:
                ex.observers.append(RunRecord(Path(run.log_dir) / run.exp_name))
        else:  # only the first process logs and records
            logging.disable(logging.INFO)
            logging.getLogger(str(ex.path)).setLevel(logging.ERROR)
    return {}


@ex.command(unobserved=True)
def keys(_config: dict[str, Any]) -> None:
    """Print all config keys with their meaning, range or choices, and value; `with NAMED_CONFIG` shows its values."""
    print(format_keys(_config))


@ex.automain
def main(_run: Run, _config: dict[str, Any]) -> dict[str, float]:
    """Train and evaluate, or only evaluate; return the metrics, which Sacred records."""
    with one_line_errors():
        settings = Settings.from_flat(_config)
        home = Path(settings.run.log_dir) / settings.run.exp_name
        folder = Path(_run.observers[0].dir) if _run.observers else home / f"process-{os.getpid()}"

        from datamodules.datamodule import build_data  # imports torch
        from datamodules.tokens import load_tokenizer
        from hacan import pipeline
        from hacan.checkpoints.loading import open_checkpoint, open_models

        typed = [word.partition("=")[0] for word in _run.meta_info["options"]["UPDATE"] if "=" in word]
        models, tokenizer, settings = open_models(settings, load_tokenizer, typed=typed)
        if _run.observers:  # config.json has what was typed, this file what is used
            (folder / "settings.json").write_text(json.dumps(settings.to_flat(), indent=1) + "\n")
        data = build_data(settings, tokenizer)
        names = list(settings.run.checkpoint)
        if not settings.run.test_only:
            best = pipeline.train(settings, models[0], tokenizer, data, run_folder=folder, home=home)
            if best is None:  # interrupted by a signal; the checkpoint is saved
                return {}
            models = [open_checkpoint(best, score_memory=settings.eval.score_memory).model]
            names = [str(best)]
        evaluation = pipeline.test(settings, models, names, data, run_folder=folder, home=home, tokenizer=tokenizer)
        return evaluation.hierarchical._asdict()
