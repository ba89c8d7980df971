"""Training: METHOD section 5 as a LightningModule.

Everything that a step depends on is a function of (seed, epoch, batch): the learning rate and the freezing of the
epoch, the dropout of the batch. A run that was interrupted therefore goes on with the same numbers.
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
from hacan.losses import (
    global_loss,
    hard_negatives,
    share_of_active_hinges,
    triplet_ranking_loss,
    triplet_ranking_loss_all,
)
from hacan.models.hacan import HACAN, describe_non_finite
from hacan.training.callbacks import epoch_is_complete
from hacan.training.distributed import Gatherer
from hacan.types import EncodedImages, EncodedTexts, PairBatch

log = logging.getLogger(__name__)

PLATEAU_STEPS = 100  # as many steps on the plateau are a collapse, not a slow start
UNREADABLE_BATCHES = 20  # in a row are no accident
PLATEAU_WIDTH = 0.01  # relative distance from 2 * margin that still counts as the plateau


class Training(pl.LightningModule):
    """The training of one HACAN: losses, optimiser, freezing, logging.

    `validate(model)` gives the figures of the validation split after each epoch, `rsum` among them; `describe()` gives
    what a checkpoint needs beside the weights, so that it can be read without this run's config.
    `pairs_per_step` is the number of pairs of one optimiser step, all processes and accumulated batches together.
    """

    def __init__(
        self,
        model: HACAN,
        *,
        loss: str,
        margin: float,
        triplet_reduction: str,
        global_loss_weight: float,
        infonce_temperature: float,
        warmup_epochs: int,
        warmup_loss: str,
        all_negatives_epochs: int,
        learning_rate: float,
        lr_decay_every: int,
        lr_decay: float,
        freeze_backbone_epochs: int,
        seed: int,
        pairs_per_step: int,
        gather_negatives: bool,
        validate: Callable[[HACAN], dict[str, float]] | None = None,
        describe: Callable[[], dict[str, Any]] | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.loss = loss
        self.margin = margin
        self.triplet_reduction = triplet_reduction
        self.global_loss_weight = global_loss_weight
        self.infonce_temperature = infonce_temperature
        self.warmup_epochs = warmup_epochs
        self.warmup_loss = warmup_loss
        self.all_negatives_epochs = all_negatives_epochs
        self.learning_rate = learning_rate
        self.lr_decay_every = lr_decay_every
        self.lr_decay = lr_decay
        self.freeze_backbone_epochs = freeze_backbone_epochs
        self.seed = seed
        self.pairs_per_step = pairs_per_step
        self.gather_negatives = gather_negatives
        self.validate = validate
        self.describe = describe
        self._plateau_steps = 0
        self._unreadable_batches = 0

    # -- schedule -----------------------------------------------------------------------------------------------------

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Adam over all parameters; a frozen backbone's have no gradient, which Adam skips."""
        return torch.optim.Adam(self.parameters(), lr=self.learning_rate)

    def learning_rate_of(self, epoch: int) -> float:
        """Times `lr_decay` every `lr_decay_every` epochs (METHOD 5); a scheduler would be one more state to resume."""
        return self.learning_rate * self.lr_decay ** (epoch // self.lr_decay_every)

    def global_loss_of(self, epoch: int) -> str:
        """Name of the global loss of an epoch: `warmup_loss` during the warm-up, then `loss`."""
        return self.warmup_loss if epoch < self.warmup_epochs else self.loss

    def on_train_start(self) -> None:
        """Set the epoch's state here too: after a resume in the middle of an epoch its start has passed already."""
        self._begin_epoch()

    def on_train_epoch_start(self) -> None:
        """Learning rate and freezing of the epoch."""
        self._begin_epoch()

    def _begin_epoch(self) -> None:
        for group in self.trainer.optimizers[0].param_groups:
            group["lr"] = self.learning_rate_of(self.current_epoch)
        self.model.freeze_backbones(self.current_epoch < self.freeze_backbone_epochs)

    def on_train_batch_start(self, batch: PairBatch, batch_idx: int) -> None:
        """Seed dropout by (seed, epoch, batch, process), so that a resumed run drops the same units."""
        place = f"{self.seed}/{self.current_epoch}/{batch_idx}/{self.global_rank}"
        torch.manual_seed(int.from_bytes(hashlib.blake2b(place.encode(), digest_size=8).digest()) >> 1)

    # -- the step -----------------------------------------------------------------------------------------------------

    def training_step(self, batch: PairBatch, batch_idx: int) -> Tensor:
        """The total loss of a batch (METHOD 4): triplet on the fine scores + weight * loss on the global embeddings.

        A batch without pairs (every picture unreadable, on_bad_image=skip) adds nothing to its step's gradient.
        """
        count = len(batch.image_ids)
        processes = Gatherer.agree(count, self.device) if self.trainer.world_size > 1 else Gatherer((count,))
        self._watch_unreadable(sum(processes.counts))
        images, texts = self._encode(batch)
        together = self.gather_negatives and self.trainer.world_size > 1
        if not (sum(processes.counts) if together else count):
            return sum(values[:0].sum() for values in (*images, texts.high, texts.mid, texts.pooled))
        with torch.autocast(self.device.type, enabled=False):
            total, terms = self.losses(images, texts, batch.image_ids, processes=processes if together else None)
        if not math.isfinite(terms["total"]):
            raise UserError(
                f"the loss is not finite at epoch {self.current_epoch}, batch {batch_idx}, optimiser step "
                f"{self.global_step} ({', '.join(f'{name} {value:g}' for name, value in terms.items())}; "
                f"images {batch.image_ids.tolist()}, captions {batch.caption_ids.tolist()}): the last checkpoint is "
                f"kept; lower learning_rate, or use precision=32-true{self._non_finite_scores(images, texts)}"
            )
        if self.current_epoch >= self.all_negatives_epochs:
            self._watch_plateau(terms["hinge_per_pair"])
        self.log_dict({f"train/{name}": value for name, value in terms.items()}, batch_size=max(count, 1))
        self.log("train/learning_rate", self.learning_rate_of(self.current_epoch), batch_size=max(count, 1))
        self.log("loss", terms["total"], prog_bar=True, logger=False, batch_size=max(count, 1))
        return total

    def _non_finite_scores(self, images: EncodedImages, texts: EncodedTexts) -> str:
        """Which streams of the alignment are not finite, for an error message; empty where all are."""
        with torch.no_grad():
            finite = bool(self.model.score(images, texts).isfinite().all())
        return "" if finite else f". {describe_non_finite(self.model.alignment, images, texts)}"

    def _encode(self, batch: PairBatch) -> tuple[EncodedImages, EncodedTexts]:
        """The features of a batch; of a batch without pairs those of one blank pair, for its shapes and its graph.

        Among several processes every one must take part in each gather and reach each parameter: the others wait.
        """
        if len(batch.image_ids):
            return self.model.encode_images(batch.images), self.model.encode_texts(batch.token_ids, batch.token_mask)
        pixels = batch.images.new_zeros(1, *batch.images.shape[1:])
        token_ids = batch.token_ids.new_zeros(1, 2)
        self.model.eval()  # no running statistic of a normalisation may see the blank picture
        blank = self.model.encode_images(pixels), self.model.encode_texts(token_ids, torch.ones_like(token_ids).bool())
        self.model.train()
        return blank

    def losses(
        self, images: EncodedImages, texts: EncodedTexts, image_ids: Tensor, *, processes: Gatherer | None = None
    ) -> tuple[Tensor, dict[str, float]]:
        """The total loss (a scalar with gradient) and its terms as numbers; over the pairs of all `processes`.

        The first rows of `images` and `texts` are the pairs of `image_ids`; a blank one after them does not count.
        """
        count = len(image_ids)
        texts = EncodedTexts(*(values[:count] for values in texts))
        if processes is not None:
            texts = processes.texts(texts)
            scores = processes.rows(self.model.score(images, texts)[:count])
            pooled = processes.rows(images.pooled[:count])
            image_ids = processes.rows(image_ids)
        else:
            scores, pooled = self.model.score(images, texts), images.pooled
        negatives = hard_negatives(scores.detach(), image_ids)
        if self.current_epoch < self.all_negatives_epochs:
            triplet = triplet_ranking_loss_all(scores, image_ids, margin=self.margin, reduction="mean")
        else:
            triplet = triplet_ranking_loss(scores, negatives, margin=self.margin, reduction="mean")
        name = self.global_loss_of(self.current_epoch)
        on_globals = global_loss(
            name,
            pooled.float(),
            texts.pooled.float(),
            negatives,
            margin=self.margin,
            image_ids=image_ids,
            temperature=self.infonce_temperature,
        )
        # "Sum over the batch" means the batch of an optimiser step: gradients of accumulated batches and of processes
        # are averaged, so that the mean of each times the step's pairs is the sum of all.
        weight = self.pairs_per_step if self.triplet_reduction == "sum" else 1
        total = weight * triplet + self.global_loss_weight * on_globals
        terms = {
            "total": total.item(),
            "triplet": weight * triplet.item(),
            f"global_{name}": on_globals.item(),
            "hinge_per_pair": triplet.item(),
            "active_hinges": share_of_active_hinges(scores.detach(), negatives, margin=self.margin).item(),
        }
        return total, terms

    def _watch_unreadable(self, pairs: int) -> None:
        """Stop, in every process at once, where batch after batch is unreadable: a disk has gone, not a picture."""
        self._unreadable_batches = 0 if pairs else self._unreadable_batches + 1
        if self._unreadable_batches == UNREADABLE_BATCHES:
            raise UserError(
                f"{UNREADABLE_BATCHES} batches in a row without a readable picture: is the disk of data_root still "
                "there? The last checkpoint is kept; go on with resume_from=last"
            )

    def _watch_plateau(self, hinge_per_pair: float) -> None:
        """Warn once when the triplet loss stays at 2 * margin a pair: all scores equal, the known collapse."""
        plateau = 2 * self.margin
        on_it = plateau > 0 and abs(hinge_per_pair - plateau) <= PLATEAU_WIDTH * plateau
        self._plateau_steps = self._plateau_steps + 1 if on_it else 0
        if self._plateau_steps == PLATEAU_STEPS:
            log.warning(
                "the triplet loss has been at 2 * margin = %g a pair for %d steps: all fine scores are equal "
                "(collapse). Lower learning_rate, or start with all_negatives_epochs=1 or warmup_epochs=1",
                plateau,
                PLATEAU_STEPS,
            )

    # -- after each epoch ---------------------------------------------------------------------------------------------

    def on_train_epoch_end(self) -> None:
        """Figures of the validation split, by the same evaluator as the final ones; none of an epoch cut short."""
        if self.validate is None or not epoch_is_complete(self.trainer):
            return
        self.model.eval()
        figures = self.validate(self.model)
        self.model.train()
        self.log_dict({f"val/{name}": value for name, value in figures.items()}, rank_zero_only=True)
        self.log("val_rsum", figures["rsum"], prog_bar=True, logger=False, rank_zero_only=True)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add what makes the checkpoint readable without this run's config."""
        if self.describe is not None:
            checkpoint["hacan"] = self.describe()
