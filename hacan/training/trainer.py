"""Settings -> the Lightning objects of a training: the module with its losses, and the Trainer with its devices."""

import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from lightning_fabric import Fabric
from lightning_fabric.strategies import DDPStrategy as FabricDDPStrategy
from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger
from pytorch_lightning.strategies import DDPStrategy

from hacan.errors import UserError
from hacan.models.hacan import HACAN
from hacan.settings import Settings, TrainSettings
from hacan.training.callbacks import AtomicCheckpointIO, KeepCheckpoints, LogShortEpochs
from hacan.training.console import ProgressBar, quieten
from hacan.training.module import Training

log = logging.getLogger(__name__)


def build_training(
    settings: Settings,
    model: HACAN,
    *,
    validate: Callable[[HACAN], dict[str, float]] | None,
    describe: Callable[[], dict[str, Any]] | None,
) -> Training:
    """The LightningModule of these settings around `model`."""
    loss, train = settings.loss, settings.train
    return Training(
        model,
        loss=loss.loss,
        margin=loss.margin,
        triplet_reduction=loss.triplet_reduction,
        global_loss_weight=loss.global_loss_weight,
        infonce_temperature=loss.infonce_temperature,
        warmup_epochs=loss.warmup_epochs,
        warmup_loss=loss.warmup_loss,
        all_negatives_epochs=loss.all_negatives_epochs,
        learning_rate=train.learning_rate,
        lr_decay_every=train.lr_decay_every,
        lr_decay=train.lr_decay,
        freeze_backbone_epochs=train.freeze_backbone_epochs,
        gather_negatives=train.gather_negatives,
        seed=settings.run.seed,
        pairs_per_step=settings.data.batch_size,
        validate=validate,
        describe=describe,
    )


def build_trainer(settings: Settings, *, run_folder: Path, checkpoint_folder: Path) -> pl.Trainer:
    """The Trainer of these settings: logs to `run_folder` (TensorBoard and CSV), checkpoints to `checkpoint_folder`."""
    data, train = settings.data, settings.train
    on_gpu = _devices_suffice(train)
    processes = train.num_gpus * train.num_nodes
    quieten()
    # A backbone that is frozen in some epochs has parameters without gradients, which plain DDP would wait for.
    strategy = DDPStrategy(find_unused_parameters=True, process_group_backend=None if on_gpu else "gloo")
    return pl.Trainer(
        accelerator="gpu" if on_gpu else "cpu",
        devices=train.num_gpus,
        num_nodes=train.num_nodes,
        strategy=strategy if processes > 1 else "auto",
        precision=precision_here(train, on_gpu=on_gpu),
        max_epochs=train.max_epoch,
        accumulate_grad_batches=data.batch_size // min(data.per_gpu_batchsize * processes, data.batch_size),
        use_distributed_sampler=False,  # ours shards each global batch itself, and knows its place after a resume
        deterministic=True if train.deterministic else None,
        logger=[
            TensorBoardLogger(run_folder, name="", version="tensorboard"),
            CSVLogger(run_folder, name="", version="csv"),
        ],
        log_every_n_steps=1 if settings.run.fast_dev_run else 10,
        limit_train_batches=2 if settings.run.fast_dev_run else None,
        callbacks=[KeepCheckpoints(checkpoint_folder), LogShortEpochs(), ProgressBar(refresh_rate=10)],
        plugins=[AtomicCheckpointIO()],
        num_sanity_val_steps=0,
        enable_model_summary=False,
    )


def launch_processes(train: TrainSettings) -> None:
    """Start the processes of these settings for an evaluation alone, as a training's Trainer would; or join them."""
    on_gpu = _devices_suffice(train)
    Fabric(
        accelerator="gpu" if on_gpu else "cpu",
        devices=train.num_gpus,
        num_nodes=train.num_nodes,
        strategy=FabricDDPStrategy(process_group_backend=None if on_gpu else "gloo"),
    ).launch()


def only_deterministic_kernels() -> None:
    """What `Trainer(deterministic=True)` does, for an evaluation alone."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS adds in one order only with such a workspace
    torch.use_deterministic_algorithms(True)


def _devices_suffice(train: TrainSettings) -> bool:
    """Whether to use GPUs; a UserError where there are some, but fewer than asked for."""
    found = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if 0 < found < train.num_gpus:
        raise UserError(f"num_gpus={train.num_gpus}, but this machine has {found}; give num_gpus={found} or less")
    return found > 0


def precision_here(train: TrainSettings, *, on_gpu: bool) -> str:
    """The precision asked for, or float32 on a CPU: 16-bit arithmetic is emulated there, slower and no smaller."""
    if on_gpu or train.precision == "32-true":
        return train.precision
    log.warning("precision=%s needs a GPU; this run computes in 32-true on the CPU", train.precision)
    return "32-true"
