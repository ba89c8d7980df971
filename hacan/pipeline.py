"""What a run does with its parts: train the model, validate it, evaluate it (METHOD sections 5 and 6).

The data module comes as an argument: this package does not know where pictures come from.
"""

import logging
import shutil
import signal
from functools import partial
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
import torch.distributed as dist
from pytorch_lightning.strategies.launchers.subprocess_script import _SubprocessScriptLauncher
from transformers import PreTrainedTokenizerBase

from hacan.checkpoints.checkpoint import read_checkpoint
from hacan.checkpoints.description import DESCRIPTION, describe_model
from hacan.checkpoints.opening import FOLLOWED
from hacan.checkpoints.pretrained import Pretrained
from hacan.errors import UserError
from hacan.images.preprocessing import uses_centre_crop
from hacan.models.hacan import HACAN
from hacan.report.page import write_report
from hacan.retrieval.eccv_cxc import check_judged, coco_ids, find_annotations
from hacan.retrieval.ensemble import Member, member_of
from hacan.retrieval.evaluate import Evaluation, Processes, Protocol, Split, evaluate
from hacan.retrieval.features import hash_of_files
from hacan.retrieval.identity import form_of, settings_of
from hacan.retrieval.table import format_table
from hacan.settings import Settings
from hacan.training.callbacks import BEST, LAST, KeepCheckpoints
from hacan.training.module import TrainingModule
from hacan.training.resume import check_same_run, checkpoint_to_resume
from hacan.training.trainer import (
    build_trainer,
    effective_precision,
    launch_processes,
    use_deterministic_kernels,
)

log = logging.getLogger(__name__)

CHEAP_PAIRS = 200_000  # up to which a report draws the curve over K unasked: seconds, on the demo
EPOCH_FIGURES = ("r1_i2t", "r5_i2t", "r10_i2t", "r1_t2i", "r5_t2i", "r10_t2i", "rsum")


def train(
    settings: Settings,
    model: HACAN,
    tokenizer: PreTrainedTokenizerBase,
    data: pl.LightningDataModule,
    *,
    run_folder: Path,
    home: Path,
) -> Path | None:
    """Train, and return the best checkpoint; None when a signal ended the run: it goes on another time."""
    resume = checkpoint_to_resume(settings, home)
    own = settings.run.save_path or (resume.parent if resume is not None else run_folder / "checkpoints")
    if resume is not None:
        content = read_checkpoint(resume, trust=settings.run.trust_checkpoint)  # a broken one is named here
        check_same_run(settings, content.get(DESCRIPTION, {}).get("settings", {}), source=resume)
        log.warning("going on from %s", resume)
    module = TrainingModule(
        model,
        loss=settings.loss,
        train=settings.train,
        seed=settings.run.seed,
        pairs_per_step=settings.data.batch_size,
        validate=partial(validate, settings=settings, data=data, run_folder=run_folder),
        describe=partial(describe_model, model, settings, tokenizer),
    )
    trainer = build_trainer(settings, run_folder=run_folder, checkpoint_folder=Path(own))
    model.train()  # one that was read from a checkpoint came to be evaluated
    try:
        trainer.fit(module, datamodule=data, ckpt_path=resume, weights_only=not settings.run.trust_checkpoint)
    except BaseException:
        # Processes that this one has started would wait for it in a collective operation, on a GPU for ever.
        if isinstance(trainer.strategy.launcher, _SubprocessScriptLauncher):
            trainer.strategy.launcher.kill(signal.SIGKILL)
        raise
    keep = trainer.checkpoint_callback
    assert isinstance(keep, KeepCheckpoints)
    if keep.interrupted:
        return None
    best = keep.folder / BEST
    if not best.is_file() and resume is not None:  # save_path is new, and no epoch since was better
        best = resume.parent / BEST
    return Path(_of_first_process(str(best if best.is_file() else keep.folder / LAST)))


def validate(model: HACAN, *, settings: Settings, data: Any, run_folder: Path) -> dict[str, float]:
    """Recalls of the validation split by hierarchical inference, in percent."""
    device = next(model.parameters()).device
    members = [_member(model, settings, name="validation", device=device)]
    processes = processes_here()
    folder = Path(_of_first_process(str(run_folder / "features-validation"))) if processes.world_size > 1 else None
    protocol = Protocol(top_k=settings.eval.inference_topk, coarse=settings.eval.coarse)
    split = split_of(data, settings, "val", hashed=folder is not None)
    done = evaluate(
        members,
        split,
        protocol,
        feature_memory=settings.eval.feature_memory,
        folder=folder,
        processes=processes,
        progress=processes.rank == 0,
    )
    processes.barrier()
    if folder is not None and processes.rank == 0:
        shutil.rmtree(folder)
    return {name: getattr(done.hierarchical, name) for name in EPOCH_FIGURES}


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
    """Evaluate on `eval_split`: prints the table, writes metrics.json and ranks.npz into the run's folder.

    With `report` also report.html, with heatmaps where the `tokenizer` is given, and with the curve where it is cheap.
    """
    if settings.train.deterministic:
        use_deterministic_kernels()  # a training's Trainer has done it, test_only has none
    if settings.train.num_gpus * settings.train.num_nodes > 1 and not dist.is_initialized():  # test_only
        launch_processes(settings.train)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    members = [_member(model, settings, name=name, device=device) for model, name in zip(models, names, strict=True)]
    processes = processes_here()
    split = split_of(data, settings, settings.data.eval_split, hashed=True)
    split = split._replace(coco_ids=judged_ids(settings, data))
    evaluation = evaluate(
        members,
        split,
        protocol_of(settings),
        feature_memory=settings.eval.feature_memory,
        folder=home / "features",
        feature_disk=settings.eval.feature_disk,
        bootstrap=settings.eval.bootstrap,
        seed=settings.run.seed,
        curve=settings.eval.curve or (settings.run.report and len(split.ids) * len(split.captions) <= CHEAP_PAIRS),
        processes=processes,
        progress=processes.rank == 0,
    )
    if processes.rank == 0:
        evaluation.save(run_folder)
        print(f"\n{format_table(evaluation)}\n\nwrote {run_folder / 'metrics.json'}")
        if evaluation.curve is not None:
            print(f"wrote {run_folder / 'curve.csv'}, curve.png: {evaluation.curve.summary()}")
        if settings.run.report:
            part = data.eval_split(settings.data.eval_split)
            report = write_report(
                run_folder / "report.html",
                evaluation,
                paths=part.paths,
                captions=part.captions,
                image_of_text=part.image_of_text,
                pretrained=None if tokenizer is None else _pretrained(models[0], tokenizer, settings, device=device),
                seed=settings.run.seed,
            )
            print(f"wrote {report}")
    return evaluation


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


def protocol_of(settings: Settings) -> Protocol:
    """The protocol of these settings."""
    return Protocol(top_k=settings.eval.inference_topk, coarse=settings.eval.coarse, fold5=settings.eval.fold5)


def split_of(data: Any, settings: Settings, name: str, *, hashed: bool) -> Split:
    """A split of the data module as the evaluator takes it; `hashed`: with the hash of its pictures' contents."""
    part = data.eval_split(name)
    framing = f"{settings.data.image_size} {uses_centre_crop(settings.data.datasets)}"
    return Split(
        dataset=settings.data.datasets,
        name=name,
        ids=part.image_ids,
        captions=part.captions,
        image_of_text=part.image_of_text,
        image_batches=partial(data.eval_images, name),
        text_batches=partial(data.eval_texts, name),
        batch_size=settings.data.per_gpu_batchsize,
        images_hash=f"{hash_of_files(part.paths)} {framing}" if hashed else "",
    )


def judged_ids(settings: Settings, data: Any) -> tuple[list[int], list[int]] | None:
    """COCO's ids of the test split's images and captions, for ECCV Caption and CxC; None where they do not apply.

    `judged_matches=auto` says why they are left out, and goes on; a path that is given has to fit.
    """
    wanted = settings.eval.judged_matches
    whole_test = (settings.data.datasets, settings.data.eval_split, settings.eval.fold5) == ("coco", "test", False)
    if wanted == "off" or (wanted == "auto" and not whole_test):
        return None
    try:
        if not whole_test:
            raise UserError("these judge COCO's whole test split: datasets=coco eval_split=test fold5=False")
        path = find_annotations(Path(settings.data.data_root).expanduser()) if wanted == "auto" else Path(wanted)
        if path is None:
            raise UserError("there is no annotations/captions_val2014.json under data_root (its path will do as well)")
        part = data.eval_split("test")
        ids = coco_ids(part.paths, part.captions, part.image_of_text, path)
        check_judged(*ids)
        return ids
    except UserError as error:
        if wanted != "auto":
            raise UserError(f"judged_matches={wanted}: {error}") from error
        log.warning("ECCV Caption and CxC are left out: %s", error)
        return None


def processes_here() -> Processes:
    """The place of this process among those of torch.distributed, or alone."""
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return Processes()

    def gather(shard: torch.Tensor) -> list[torch.Tensor]:
        shards: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(shards, shard)
        return shards

    return Processes(dist.get_rank(), dist.get_world_size(), dist.barrier, gather)


def _of_first_process(text: str) -> str:
    """What the first process says; only it knows the folder of the run's record."""
    if not (dist.is_available() and dist.is_initialized()):
        return text
    said = [text]
    dist.broadcast_object_list(said, src=0)
    return said[0]


def _member(model: HACAN, settings: Settings, *, name: str, device: torch.device) -> Member:
    return member_of(
        model,
        name=name,
        device=device,
        precision=effective_precision(settings.train, on_gpu=device.type == "cuda"),
        form=form_of(model),
        settings=settings_of(model) | {key: getattr(settings.data, key) for key in FOLLOWED},
    )
