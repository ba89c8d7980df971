"""What run.py calls: train, validate after each epoch, test (METHOD sections 5 and 6).

The data module is an argument; nothing below run.py imports `datamodules`.
"""

import logging
import shutil
import signal
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from pytorch_lightning.strategies.launchers.subprocess_script import _SubprocessScriptLauncher
from transformers import PreTrainedTokenizerBase

from hacan.checkpoints.checkpoint import DESCRIPTION, describe_model, read_checkpoint
from hacan.checkpoints.loading import MODEL_DATA_KEYS
from hacan.checkpoints.pretrained import Pretrained
from hacan.errors import UserError, is_first_process
from hacan.images.preprocessing import uses_centre_crop
from hacan.models.hacan import HACAN
from hacan.report.page import write_report
from hacan.retrieval.eccv_cxc import check_judged_queries, coco_ids, find_annotations
from hacan.retrieval.ensemble import Scorer, build_scorer
from hacan.retrieval.evaluate import evaluate
from hacan.retrieval.feature_cache import FeatureStorage
from hacan.retrieval.provenance import architecture_hash, hash_of_files, model_summary
from hacan.retrieval.results import Evaluation, Protocol, format_table
from hacan.settings import Settings
from hacan.training.backbone_features import BackboneFeatures, encode_backbones
from hacan.training.callbacks import BEST, LAST, KeepCheckpoints
from hacan.training.module import TrainingModule
from hacan.training.resume import check_same_run, checkpoint_to_resume
from hacan.training.trainer import (
    accumulated_batches,
    build_trainer,
    effective_precision,
    launch_processes,
    use_deterministic_kernels,
)
from hacan.types import Processes, Split

log = logging.getLogger(__name__)

CURVE_PAIRS = 200_000  # a report includes the curve over K up to this number of pairs, which takes seconds
VALIDATION_METRICS = ("r1_i2t", "r5_i2t", "r10_i2t", "r1_t2i", "r5_t2i", "r10_t2i", "rsum")


def train(
    settings: Settings,
    model: HACAN,
    tokenizer: PreTrainedTokenizerBase,
    data: Any,
    *,
    run_folder: Path,
    home: Path,
) -> Path | None:
    """Train the model and return the best checkpoint, or None if a signal interrupted the run.

    run_folder: of this run's logs and checkpoints; home: of all runs of this exp_name.
    """
    if is_first_process():  # problems of the data are reported before the first epoch
        data.check_images("val", settings.data.eval_split)
    resume = checkpoint_to_resume(settings, home)
    folder = settings.run.save_path or (resume.parent if resume is not None else run_folder / "checkpoints")
    if resume is not None:
        content = read_checkpoint(resume, trust=settings.run.trust_checkpoint)
        check_same_run(settings, content.get(DESCRIPTION, {}).get("settings", {}), source=resume)
        log.warning("resuming from %s", resume)
    module = TrainingModule(
        model,
        loss=settings.loss,
        train=settings.train,
        seed=settings.run.seed,
        batches_per_step=_batches_per_step(settings),
        validate=partial(validate, settings=settings, data=data, run_folder=run_folder),
        describe=partial(describe_model, model, settings, tokenizer),
        encode_backbones=partial(_train_features, settings=settings, data=data)
        if settings.train.cache_features
        else None,
    )
    trainer = build_trainer(settings, run_folder=run_folder, checkpoint_folder=Path(folder))
    model.train()  # a model read from a checkpoint is in evaluation mode
    try:
        trainer.fit(module, datamodule=data, ckpt_path=resume, weights_only=not settings.run.trust_checkpoint)
    except BaseException:
        # The processes that this one launched would wait in a collective operation, on a GPU without end.
        if isinstance(trainer.strategy.launcher, _SubprocessScriptLauncher):
            trainer.strategy.launcher.kill(signal.SIGKILL)
        raise
    checkpoints = trainer.checkpoint_callback
    assert isinstance(checkpoints, KeepCheckpoints)
    if checkpoints.interrupted:
        return None
    best = checkpoints.folder / BEST
    if not best.is_file() and resume is not None:  # save_path changed, and no epoch since the resume was better
        best = resume.parent / BEST
    return Path(_from_first_process(str(best if best.is_file() else checkpoints.folder / LAST)))


def validate(model: HACAN, *, settings: Settings, data: Any, run_folder: Path) -> dict[str, float]:
    """Return the recalls of the validation split in percent, and as `selection` the value of `val_metric`.

    The recalls are those of hierarchical retrieval, or of the full fine ranking if `val_metric` needs it.
    """
    processes = current_processes()
    # Several processes exchange features through a folder that is deleted afterwards.
    folder = Path(_from_first_process(str(run_folder / "features-validation"))) if processes.world_size > 1 else None
    split = split_of(data, settings, "val", hashed=folder is not None)
    protocol = Protocol(top_k=settings.eval.inference_topk, coarse=settings.eval.coarse)
    if settings.train.val_metric != "rsum":  # a shortlist of the whole gallery, by the global embeddings
        protocol = Protocol(top_k=max(len(split.ids), len(split.captions)))
    evaluation = evaluate(
        [_scorer(model, settings, name="validation", device=next(model.parameters()).device)],
        split,
        protocol,
        storage=FeatureStorage(folder=folder, memory=settings.eval.feature_memory),
        processes=processes,
        progress=processes.rank == 0,
    )
    processes.barrier()
    if folder is not None and processes.rank == 0:
        shutil.rmtree(folder)
    metrics = {name: getattr(evaluation.hierarchical, name) for name in VALIDATION_METRICS}
    if settings.train.val_metric == "release":  # METHOD section 5
        selection = sum(ranking.r1_i2t + ranking.r1_t2i for ranking in (evaluation.hierarchical, evaluation.coarse))
    else:
        selection = metrics["rsum"]
    return {**metrics, "selection": selection}


def test(
    settings: Settings,
    models: list[HACAN],
    names: list[str],
    data: Any,
    *,
    run_folder: Path,
    home: Path,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> Evaluation:
    """Evaluate on `eval_split`: print the table, write metrics.json and ranks.npz to `run_folder`.

    names: of the models' checkpoints. With `report` also write report.html; `tokenizer` is needed for its heatmaps.
    """
    if settings.train.deterministic:
        use_deterministic_kernels()  # without a training there is no Trainer that has done it
    if settings.train.num_gpus * settings.train.num_nodes > 1 and not dist.is_initialized():
        launch_processes(settings.train)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    scorers = [_scorer(model, settings, name=name, device=device) for model, name in zip(models, names, strict=True)]
    processes = current_processes()
    split = split_of(data, settings, settings.data.eval_split, hashed=True)
    split = split._replace(coco_ids=_judged_ids(settings, data))
    few_pairs = len(split.ids) * len(split.captions) <= CURVE_PAIRS
    evaluation = evaluate(
        scorers,
        split,
        Protocol(
            top_k=settings.eval.inference_topk,
            coarse=settings.eval.coarse,
            fold5=settings.eval.fold5,
            bootstrap=settings.eval.bootstrap,
            seed=settings.run.seed,
            curve=settings.eval.curve or (settings.run.report and few_pairs),
        ),
        storage=FeatureStorage(folder=home / "features", memory=settings.eval.feature_memory),
        disk=settings.eval.feature_disk,
        processes=processes,
        progress=processes.rank == 0,
    )
    if processes.rank == 0:
        evaluation.save(run_folder)
        print(f"\n{format_table(evaluation)}\n\nwrote {run_folder / 'metrics.json'}")
        if evaluation.curve is not None:
            print(f"wrote {run_folder / 'curve.csv'}, curve.png: {evaluation.curve.summary()}")
        if settings.run.report:
            pretrained = None if tokenizer is None else _pretrained(models[0], tokenizer, settings, device=device)
            report = write_report(
                run_folder / "report.html",
                evaluation,
                paths=split.paths,
                captions=split.captions,
                image_of_text=split.image_of_text,
                pretrained=pretrained,
                seed=settings.run.seed,
            )
            print(f"wrote {report}")
    return evaluation


def split_of(data: Any, settings: Settings, name: str, *, hashed: bool) -> Split:
    """Return a split of the data module; `hashed`: with the hash of its images that caching features needs."""
    part = data.eval_split(name)
    preprocessing = f"{settings.data.image_size} {uses_centre_crop(settings.data.datasets)}"
    images_hash = f"{hash_of_files(part.paths)} {preprocessing}" if hashed else ""
    return part._replace(dataset=settings.data.datasets, images_hash=images_hash)


def _judged_ids(settings: Settings, data: Any) -> tuple[list[int], list[int]] | None:
    """Return COCO's ids of the test images and captions for ECCV Caption and CxC, or None if they do not apply.

    With `judged_matches=auto` a problem is logged; with a path it is a `UserError`.
    """
    wanted = settings.eval.judged_matches
    whole_test = (settings.data.datasets, settings.data.eval_split, settings.eval.fold5) == ("coco", "test", False)
    if wanted == "off" or (wanted == "auto" and not whole_test):
        return None
    try:
        if not whole_test:
            raise UserError("they are defined for COCO's whole test split: datasets=coco eval_split=test fold5=False")
        path = find_annotations(Path(settings.data.data_root)) if wanted == "auto" else Path(wanted)
        if path is None:
            raise UserError("there is no annotations/captions_val2014.json under data_root; give its path")
        part = data.eval_split("test")
        ids = coco_ids(part.paths, part.captions, part.image_of_text, path)
        check_judged_queries(*ids)
        return ids
    except UserError as error:
        if wanted != "auto":
            raise UserError(f"judged_matches={wanted}: {error}") from error
        log.warning("ECCV Caption and CxC are not computed: %s", error)
        return None


def _train_features(model: HACAN, *, settings: Settings, data: Any) -> BackboneFeatures:
    """Return the outputs of the backbones for the train split; all runs below log_dir share them."""
    device = next(model.parameters()).device
    return encode_backbones(
        model,
        split_of(data, settings, "train", hashed=True),
        device=device,
        precision=effective_precision(settings.train.precision, on_gpu=device.type == "cuda"),
        folder=Path(settings.run.log_dir) / "backbone-features",
        memory=settings.eval.feature_memory,
        processes=current_processes(),
    )


def _batches_per_step(settings: Settings) -> int:
    """Return the number of batches whose gradients are averaged in an optimiser step, each with its own negatives."""
    apart = 1 if settings.train.gather_negatives else settings.train.num_gpus * settings.train.num_nodes
    return accumulated_batches(settings) * apart


def _scorer(model: HACAN, settings: Settings, *, name: str, device: torch.device) -> Scorer:
    precision = settings.train.precision if settings.eval.eval_precision == "auto" else settings.eval.eval_precision
    return build_scorer(
        model,
        name=name,
        device=device,
        precision=effective_precision(precision, on_gpu=device.type == "cuda"),
        architecture_hash=architecture_hash(model),
        settings=model_summary(model) | {key: getattr(settings.data, key) for key in MODEL_DATA_KEYS},
    )


def _pretrained(
    model: HACAN, tokenizer: PreTrainedTokenizerBase, settings: Settings, *, device: torch.device
) -> Pretrained:
    return Pretrained(
        model=model,
        tokenizer=tokenizer,
        image_size=settings.data.image_size,
        centre_crop=uses_centre_crop(settings.data.datasets),
        max_text_len=settings.data.max_text_len,
        device=device,
    )


# -- several processes ------------------------------------------------------------------------------------------------


def current_processes() -> Processes:
    """Return this process's place in torch.distributed, or a single process."""
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return Processes()

    def gather(shard: torch.Tensor) -> list[torch.Tensor]:
        shards: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(shards, shard)
        return shards

    return Processes(dist.get_rank(), dist.get_world_size(), dist.barrier, gather)


def _from_first_process(text: str) -> str:
    """Return the first process's text in all processes; only the first knows the folder of the run's record."""
    if not (dist.is_available() and dist.is_initialized()):
        return text
    texts = [text]
    dist.broadcast_object_list(texts, src=0)
    return texts[0]
