"""Settings to the Lightning Trainer: devices, precision, strategy, loggers and callbacks."""

import logging
import os
from pathlib import Path

import pytorch_lightning as pl
import torch
from lightning_fabric import Fabric
from lightning_fabric.strategies import DDPStrategy as FabricDDPStrategy
from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger
from pytorch_lightning.strategies import DDPStrategy

from hacan.errors import UserError
from hacan.settings import Settings, TrainSettings
from hacan.training.callbacks import AtomicCheckpointIO, KeepCheckpoints, LogShortEpochs
from hacan.training.console import ProgressBar, hide_framework_messages

log = logging.getLogger(__name__)


def build_trainer(settings: Settings, *, run_folder: Path, checkpoint_folder: Path) -> pl.Trainer:
    """Return a Trainer that logs to `run_folder` (TensorBoard and CSV) and saves to `checkpoint_folder`."""
    train = settings.train
    on_gpu = _use_gpus(train)
    processes = train.num_gpus * train.num_nodes
    hide_framework_messages()
    # While a backbone is frozen, its parameters have no gradients, and plain DDP would wait for them.
    strategy = DDPStrategy(find_unused_parameters=True, process_group_backend=None if on_gpu else "gloo")
    return pl.Trainer(
        accelerator="gpu" if on_gpu else "cpu",
        devices=train.num_gpus,
        num_nodes=train.num_nodes,
        strategy=strategy if processes > 1 else "auto",
        precision=effective_precision(train.precision, on_gpu=on_gpu),  # type: ignore[arg-type]  # a str, not Literal
        max_epochs=train.max_epoch,
        accumulate_grad_batches=accumulated_batches(settings),
        use_distributed_sampler=False,  # TrainingOrder shards each batch and restores its position
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


def accumulated_batches(settings: Settings) -> int:
    """Return the number of batches whose gradients accumulate in an optimiser step."""
    data, processes = settings.data, settings.train.num_gpus * settings.train.num_nodes
    return data.batch_size // min(data.per_gpu_batchsize * processes, data.batch_size)


def launch_processes(train: TrainSettings) -> None:
    """Launch or join the processes of an evaluation without training, as the Trainer does for a training."""
    on_gpu = _use_gpus(train)
    Fabric(
        accelerator="gpu" if on_gpu else "cpu",
        devices=train.num_gpus,
        num_nodes=train.num_nodes,
        strategy=FabricDDPStrategy(process_group_backend=None if on_gpu else "gloo"),
    ).launch()


def use_deterministic_kernels() -> None:
    """Set what `Trainer(deterministic=True)` sets, for an evaluation without training."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # required by cuBLAS for a fixed order of sums
    torch.use_deterministic_algorithms(True)


def _use_gpus(train: TrainSettings) -> bool:
    """Return whether this machine has GPUs; raise `UserError` if it has fewer than `num_gpus`."""
    found = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if 0 < found < train.num_gpus:
        raise UserError(f"num_gpus={train.num_gpus}, but this machine has {found}; give num_gpus={found} or less")
    return found > 0


def effective_precision(precision: str, *, on_gpu: bool) -> str:
    """Return the configured precision, or float32 on a CPU, where 16-bit arithmetic is emulated and slower."""
    if on_gpu or precision == "32-true":
        return precision
    log.warning("precision=%s needs a GPU; this run computes in 32-true on the CPU", precision)
    return "32-true"
