"""Training of HACAN as a LightningModule (METHOD section 5).

All randomness and all schedules are functions of (seed, epoch, batch), so an interrupted run resumes with the same
numbers.
"""

import hashlib
import logging
import math
from collections.abc import Callable
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor

from hacan.errors import UserError
from hacan.losses import HACANLoss
from hacan.models.hacan import HACAN, describe_non_finite
from hacan.settings import LossSettings, TrainSettings
from hacan.training.backbone_features import BackboneFeatures
from hacan.training.callbacks import epoch_is_complete
from hacan.training.distributed import gather_counts, gather_rows, gather_texts
from hacan.types import EncodedImages, EncodedTexts, PairBatch

log = logging.getLogger(__name__)

COLLAPSE_STEPS = 100  # consecutive steps with a triplet loss of 2 * margin per pair before the warning
COLLAPSE_TOLERANCE = 0.01  # relative
UNREADABLE_BATCHES = 20  # consecutive batches without a readable image before training stops


class TrainingModule(pl.LightningModule):
    """Losses, optimiser, freezing and logging for one HACAN.

    validate(model) returns the metrics of the validation split, called after each epoch; `selection` (the value of
    val_metric) and `rsum` are among them.
    describe() returns what a checkpoint needs besides the weights. batches_per_step: see `HACANLoss`.
    encode_backbones(model) returns stored outputs of the backbones (cache_features), called before the first epoch.
    """

    def __init__(
        self,
        model: HACAN,
        *,
        loss: LossSettings,
        train: TrainSettings,
        seed: int,
        batches_per_step: int = 1,
        validate: Callable[[HACAN], dict[str, float]] | None = None,
        describe: Callable[[], dict[str, Any]] | None = None,
        encode_backbones: Callable[[HACAN], BackboneFeatures] | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.loss = HACANLoss(loss, batches_per_step=batches_per_step)
        self.train_settings = train
        self.seed = seed
        self.validate = validate
        self.describe = describe
        self.encode_backbones = encode_backbones
        self._stored: BackboneFeatures | None = None
        self._collapsed_steps = 0
        self._unreadable_batches = 0

    # -- schedule -----------------------------------------------------------------------------------------------------

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return Adam over all parameters; it skips those of a frozen backbone, which have no gradient."""
        return torch.optim.Adam(self.parameters(), lr=self.train_settings.learning_rate)

    def learning_rate_at(self, epoch: int) -> float:
        """Return the learning rate of an epoch: times `lr_decay` every `lr_decay_every` epochs (METHOD section 5)."""
        train = self.train_settings
        return train.learning_rate * train.lr_decay ** (epoch // train.lr_decay_every)

    def on_fit_start(self) -> None:
        """Encode the train split with the backbones, if their outputs are stored."""
        if self.encode_backbones is not None:
            self._stored = self.encode_backbones(self.model)

    def on_train_start(self) -> None:
        """Set the state of the epoch; a run that resumes within an epoch gets no `on_train_epoch_start`."""
        self._start_epoch()

    def on_train_epoch_start(self) -> None:
        """Set the learning rate and the freezing of the epoch."""
        self._start_epoch()

    def _start_epoch(self) -> None:
        for group in self.trainer.optimizers[0].param_groups:
            group["lr"] = self.learning_rate_at(self.current_epoch)
        train = self.train_settings
        self.model.freeze_backbones(self.current_epoch < train.freeze_backbone_epochs, dropout=train.frozen_dropout)

    def on_train_batch_start(self, batch: PairBatch, batch_idx: int) -> None:
        """Seed dropout with (seed, epoch, batch, process), so that a resumed run drops the same units."""
        place = f"{self.seed}/{self.current_epoch}/{batch_idx}/{self.global_rank}"
        torch.manual_seed(int.from_bytes(hashlib.blake2b(place.encode(), digest_size=8).digest()) >> 1)

    # -- the step -----------------------------------------------------------------------------------------------------

    def training_step(self, batch: PairBatch, batch_idx: int) -> Tensor:
        """Return the total loss of a batch (METHOD section 4).

        A batch without pairs (on_bad_image=skip, and no image of the batch was readable) contributes a zero gradient.
        """
        count = len(batch.image_ids)
        distributed = self.trainer.world_size > 1
        counts = gather_counts(count, self.device) if distributed else (count,)
        self._check_readable(sum(counts))
        images, texts = self._encode(batch)
        gathered = distributed and self.train_settings.gather_negatives
        if not (sum(counts) if gathered else count):
            return torch.cat([values[:0].flatten() for values in (*images, texts.high, texts.mid, texts.pooled)]).sum()
        with torch.autocast(self.device.type, enabled=False):
            total, terms = self.batch_loss(images, texts, batch.image_ids, counts=counts if gathered else None)
        if not math.isfinite(terms["total"]):
            raise UserError(
                f"the loss is not finite at epoch {self.current_epoch}, batch {batch_idx}, optimiser step "
                f"{self.global_step} ({', '.join(f'{name} {value:g}' for name, value in terms.items())}; "
                f"images {batch.image_ids.tolist()}, captions {batch.caption_ids.tolist()}): the last checkpoint is "
                f"kept; lower learning_rate, or use precision=32-true{self._non_finite_scores(images, texts)}"
            )
        if self.current_epoch >= self.loss.settings.all_negatives_epochs:
            self._warn_of_collapse(terms["hinge_per_pair"])
        self.log_dict({f"train/{name}": value for name, value in terms.items()}, batch_size=max(count, 1))
        self.log("train/learning_rate", self.learning_rate_at(self.current_epoch), batch_size=max(count, 1))
        self.log("loss", terms["total"], prog_bar=True, logger=False, batch_size=max(count, 1))
        return total

    def batch_loss(
        self, images: EncodedImages, texts: EncodedTexts, image_ids: Tensor, *, counts: tuple[int, ...] | None = None
    ) -> tuple[Tensor, dict[str, float]]:
        """Return the total loss (a scalar with gradient) and its terms as numbers.

        counts: pairs of every process, to take negatives from the batches of all; None: from this batch alone. Rows of
        `images` and `texts` beyond the pairs of `image_ids` (the blank pair of an empty batch) do not count.
        """
        count = len(image_ids)
        texts = EncodedTexts(*(values[:count] for values in texts))
        if counts is None:
            scores, pooled = self.model.score(images, texts), images.pooled
        else:
            texts = gather_texts(texts, counts)
            scores = gather_rows(self.model.score(images, texts)[:count], counts)
            pooled = gather_rows(images.pooled[:count], counts)
            image_ids = gather_rows(image_ids, counts)
        return self.loss(scores, pooled, texts.pooled, image_ids, epoch=self.current_epoch)

    def _encode(self, batch: PairBatch) -> tuple[EncodedImages, EncodedTexts]:
        """Return the features of a batch; for a batch without pairs, those of one blank pair.

        With several processes each must take part in every gather and reach every parameter, or the others wait for it.
        """
        if self._stored is not None:
            return self._stored.encode(self.model, batch.caption_ids)
        if len(batch.image_ids):
            return self.model.encode_images(batch.images), self.model.encode_texts(batch.token_ids, batch.token_mask)
        pixels = batch.images.new_zeros(1, *batch.images.shape[1:])
        token_ids = batch.token_ids.new_zeros(1, 2)
        self.model.eval()  # the blank image must not change running statistics of a normalisation layer
        blank = self.model.encode_images(pixels), self.model.encode_texts(token_ids, torch.ones_like(token_ids).bool())
        self.model.train()
        return blank

    def _non_finite_scores(self, images: EncodedImages, texts: EncodedTexts) -> str:
        """Return which streams of the alignment are not finite, for an error message; empty if all are finite."""
        with torch.no_grad():
            finite = bool(self.model.score(images, texts).isfinite().all())
        return "" if finite else f". {describe_non_finite(self.model.alignment, images, texts)}"

    def _check_readable(self, pairs: int) -> None:
        """Raise `UserError`, in all processes at once, after `UNREADABLE_BATCHES` batches without a readable image."""
        self._unreadable_batches = 0 if pairs else self._unreadable_batches + 1
        if self._unreadable_batches == UNREADABLE_BATCHES:
            raise UserError(
                f"{UNREADABLE_BATCHES} batches in a row without a readable image: check that the disk of data_root is "
                "mounted. The last checkpoint is kept; continue with resume_from=last"
            )

    def _warn_of_collapse(self, hinge_per_pair: float) -> None:
        """Warn once if the triplet loss stays at 2 * margin per pair, its value when all scores are equal."""
        plateau = 2 * self.loss.settings.margin
        collapsed = plateau > 0 and abs(hinge_per_pair - plateau) <= COLLAPSE_TOLERANCE * plateau
        self._collapsed_steps = self._collapsed_steps + 1 if collapsed else 0
        if self._collapsed_steps == COLLAPSE_STEPS:
            log.warning(
                "the triplet loss has been 2 * margin = %g per pair for %d steps: all fine scores are equal "
                "(collapse). Lower learning_rate, or start with all_negatives_epochs=1 or warmup_epochs=1",
                plateau,
                COLLAPSE_STEPS,
            )

    # -- after each epoch ---------------------------------------------------------------------------------------------

    def on_train_epoch_end(self) -> None:
        """Log the metrics of the validation split, unless a signal cut the epoch short."""
        if self.validate is None or not epoch_is_complete(self.trainer):
            return
        self.model.eval()
        metrics = self.validate(self.model)
        self.model.train()
        self.log("val_selection", metrics.pop("selection"), logger=False, rank_zero_only=True)
        self.log_dict({f"val/{name}": value for name, value in metrics.items()}, rank_zero_only=True)
        self.log("val_rsum", metrics["rsum"], prog_bar=True, logger=False, rank_zero_only=True)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the description that makes the checkpoint readable without the config of this run."""
        if self.describe is not None:
            checkpoint["hacan"] = self.describe()
