"""The LightningDataModule of all data sets, which differ only in their records."""

import logging
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from transformers import PreTrainedTokenizerBase

from datamodules.evaluation_data import EvaluationImages, EvaluationTexts, unreadable_images
from datamodules.readers import read_records
from datamodules.records import CaptionedImage, of_split
from datamodules.sampling import TrainingOrder
from datamodules.tokens import TokenTable, tokenise
from datamodules.training_data import TrainingLoader, TrainingPairs
from datamodules.transforms import PHOTOS, Cropping, cropping_of, evaluation_transform, training_transform
from hacan.errors import UserError
from hacan.types import Split

log = logging.getLogger(__name__)


class PairDataModule(pl.LightningDataModule):
    """Training batches of image-caption pairs and evaluation splits from any records.

    `batch_size` counts the pairs of an optimiser step over all processes, `per_gpu_batchsize` those of one forward
    pass of one process. `load_images=False`: the images of training batches have no pixels, for a training on stored
    features. `progress`: show bars while captions are tokenised.
    """

    def __init__(
        self,
        *,
        records: Iterable[CaptionedImage],
        tokenizer: PreTrainedTokenizerBase,
        image_size: int,
        max_text_len: int,
        batch_size: int,
        per_gpu_batchsize: int,
        num_workers: int,
        seed: int,
        on_bad_image: str = "error",
        drop_last: bool = True,
        augmentation: bool = True,
        load_images: bool = True,
        cropping: Cropping = PHOTOS,
        eval_batch_size: int | None = None,
        progress: bool = True,
    ) -> None:
        super().__init__()
        if on_bad_image not in ("error", "skip"):
            raise ValueError(f"on_bad_image={on_bad_image!r}; expected error or skip")
        self._records = list(records)
        self._drop_last, self._load_images = drop_last, load_images
        transform = training_transform if augmentation else evaluation_transform
        self._training_transform = transform(image_size, cropping)
        self._tokenizer, self._max_text_len = tokenizer, max_text_len
        self._image_size, self._cropping = image_size, cropping
        self._batch_size, self._per_gpu_batchsize = batch_size, per_gpu_batchsize
        self._eval_batch_size = eval_batch_size or per_gpu_batchsize
        self._num_workers, self._seed, self._on_bad_image = num_workers, seed, on_bad_image
        self._progress = progress
        self._splits: dict[str, tuple[Split, TokenTable]] = {}
        self._training: TrainingLoader | None = None
        self._position = (0, 0)

    # training

    def train_dataloader(self) -> TrainingLoader:
        """Return the training batches of this process, whose rank is that of the attached trainer."""
        rank, world_size = (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        self._training = self.training_loader(rank=rank, world_size=world_size)
        self._training.sampler.set_position(*self._position)
        return self._training

    def training_loader(self, *, rank: int = 0, world_size: int = 1) -> TrainingLoader:
        """Return the training batches of process `rank` of `world_size`, starting at the first epoch."""
        split, tokens = self._split("train")
        if not len(tokens):
            raise UserError("the train split has images but no captions: nothing to train on")
        if len(tokens) < world_size:
            raise UserError(
                f"the train split has {len(tokens)} pair(s) for {world_size} processes: use fewer (num_gpus)"
            )
        pairs = TrainingPairs(
            paths=np.array(split.paths, dtype=np.str_),
            image_ids=np.array(split.ids, dtype=np.int64),
            image_of_text=split.image_of_text.numpy(),
            tokens=tokens,
            transform=self._training_transform if self._load_images else None,
            seed=self._seed,
        )
        order = TrainingOrder(
            n_pairs=len(tokens),
            batch_size=self._batch_size,
            per_gpu_batchsize=self._per_gpu_batchsize,
            drop_last=self._drop_last,
            seed=self._seed,
            rank=rank,
            world_size=world_size,
        )
        return TrainingLoader(
            pairs,
            order,
            padding_id=tokens.padding_id,
            image_size=self._image_size,
            num_workers=self._num_workers,
            on_bad_image=self._on_bad_image,
        )

    def set_progress(self, epoch: int, batch: int) -> None:
        """Start training at batch `batch` (per process, from 0) of epoch `epoch`; call it before `fit`."""
        self._position = (epoch, batch)
        if self._training is not None:
            self._training.sampler.set_position(epoch, batch)

    def state_dict(self) -> dict[str, Any]:
        """Return the position of the next training batch, which Lightning stores in checkpoints."""
        if self._training is not None:
            return self._training.state_dict()
        return {"epoch": self._position[0], "batch": self._position[1]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the position; Lightning calls this before it requests the loader."""
        self.set_progress(state_dict["epoch"], state_dict["batch"])

    def teardown(self, stage: str) -> None:
        """Stop the worker processes at the end of a run."""
        if self._training is not None:
            self._training.stop()

    @property
    def skipped(self) -> dict[str, str]:
        """Unreadable images that the current epoch has skipped: path and reason."""
        return self._training.skipped if self._training is not None else {}

    # evaluation

    def eval_split(self, name: str) -> Split:
        """Return a split: images and captions in the order of the records, and their batches."""
        return self._split(name)[0]

    def eval_images(self, name: str, rows: Sequence[int] | None = None) -> EvaluationImages:
        """Return the pixels of a split, each image once; `rows`: only these images (a shard)."""
        split, _ = self._split(name)
        return EvaluationImages(
            split.paths,
            range(len(split.paths)) if rows is None else rows,
            transform=evaluation_transform(self._image_size, self._cropping),
            batch_size=self._eval_batch_size,
            num_workers=self._num_workers,
        )

    def eval_texts(self, name: str, rows: Sequence[int] | None = None) -> EvaluationTexts:
        """Return the tokens of a split, each caption once, shortest first; `rows`: only these captions (a shard)."""
        _, tokens = self._split(name)
        return EvaluationTexts(tokens, range(len(tokens)) if rows is None else rows, batch_size=self._eval_batch_size)

    def check_images(self, *names: str) -> None:
        """Raise `UserError` for an unreadable image of an evaluation split; with on_bad_image=skip it is left out."""
        for name in dict.fromkeys(names):
            self._split(name)
            if self._on_bad_image == "error":
                for _, reason in unreadable_images(of_split(self._records, name), progress=self._progress):
                    raise UserError(f"{reason}; it is in the {name} split; on_bad_image=skip leaves such images out")

    def _readable(self, name: str, records: list[CaptionedImage]) -> list[CaptionedImage]:
        bad = {record.path: reason for record, reason in unreadable_images(records, progress=self._progress)}
        if bad:
            log.warning(
                "%s split: %d unreadable image(s) left out, the first: %s", name, len(bad), next(iter(bad.values()))
            )
        return [record for record in records if record.path not in bad]

    def _split(self, name: str) -> tuple[Split, TokenTable]:
        if name not in self._splits:
            records = of_split(self._records, name)
            count = len(records)
            if self._on_bad_image == "skip" and name != "train":
                records = self._readable(name, records)
            counts = torch.tensor([len(record.captions) for record in records], dtype=torch.int64)
            split = Split(
                dataset="",
                name=name,
                ids=tuple(record.image_id for record in records),
                captions=tuple(caption for record in records for caption in record.captions),
                image_of_text=torch.repeat_interleave(torch.arange(len(records)), counts),
                image_batches=partial(self.eval_images, name),
                text_batches=partial(self.eval_texts, name),
                batch_size=self._eval_batch_size,
                paths=tuple(str(record.path) for record in records),
                left_out=count - len(records),
            )
            tokens = tokenise(split.captions, self._tokenizer, max_text_len=self._max_text_len, progress=self._progress)
            self._splits[name] = (split, tokens)
        return self._splits[name]


def build_data(settings: Any, tokenizer: PreTrainedTokenizerBase) -> PairDataModule:
    """Return the data module of a run's `hacan.settings.Settings`."""
    data = settings.data
    records = read_records(
        data.datasets,
        data.data_root,
        use_restval=data.use_restval,
        captions_per_image=data.captions_per_image,
        scenes_pictures=data.scenes_pictures,
    )
    if data.datasets == "coco" and data.coco_val_images:
        val = [record for record in records if record.split == "val"][: data.coco_val_images]
        records = [record for record in records if record.split != "val"] + val
    return PairDataModule(
        records=records,
        tokenizer=tokenizer,
        image_size=data.image_size,
        max_text_len=data.max_text_len,
        batch_size=data.batch_size,
        per_gpu_batchsize=data.per_gpu_batchsize,
        num_workers=data.num_workers,
        seed=settings.run.seed,
        on_bad_image=data.on_bad_image,
        drop_last=data.drop_last,
        augmentation=data.augmentation,
        load_images=not settings.train.cache_features,
        cropping=cropping_of(data.datasets),
    )
