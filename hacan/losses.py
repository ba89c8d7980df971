"""Losses on fine scores and on global embeddings (METHOD section 4).

Pair k of a batch is image k with text k, so the positives of a score matrix [B, B] are on its diagonal. Other captions
of the same image are not negatives: `image_ids` masks them. To use negatives of several processes, pass the scores and
embeddings of the global batch.

Letters of the equations: F the fine scores, s the dot product of global embeddings, m the margin, [x]+ = max(x, 0);
T- = T[negatives.text_of_image] the hard text of each image, I- = I[negatives.image_of_text] the hard image of each
text. A pair without any negative (a batch of one image) has index -1: its hinges contribute 0, and it still counts in
a mean.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hacan.settings import LossSettings
from hacan.types import HardNegatives

REDUCTIONS = ("sum", "mean")


def hard_negatives(scores: Tensor, image_ids: Tensor) -> HardNegatives:
    """Return the hardest negative of every image and every text of a batch (METHOD section 4).

    scores [B, B] fine scores F, image_ids [B]; indices [B] int64, -1 if the batch has no negative.

        text_of_image[i] = argmax over j with another image of F_ij
        image_of_text[j] = argmax over i with another image of F_ij

    Public code: argmax of the clamped cost, which is index 0 (possibly the positive) once every cost is zero; here:
    argmax of the scores without the diagonal and other captions of the same image, because those are not wrong.
    """
    _check_square(scores, image_ids)
    others = image_ids[:, None] != image_ids[None, :]
    masked = scores.detach().masked_fill(~others, -torch.inf)
    known = others.any(1)  # symmetric in images and texts
    none = torch.full_like(image_ids, -1, dtype=torch.int64)
    return HardNegatives(
        text_of_image=torch.where(known, masked.argmax(1), none),
        image_of_text=torch.where(known, masked.argmax(0), none),
    )


def triplet_ranking_loss(scores: Tensor, negatives: HardNegatives, *, margin: float, reduction: str) -> Tensor:
    """Triplet ranking loss with the hardest negatives (METHOD section 4).

    scores [B, B] fine scores F; a scalar. reduction "sum" (hybrid preset), or "mean": the sum over B (revised preset).

        sum_i [m + F_i,neg(i) - F_ii]+  +  sum_j [m + F_neg(j),j - F_jj]+
    """
    hinges = _triplet_hinges(scores, negatives, margin)
    return _reduced(hinges[0] + hinges[1], reduction)


def triplet_ranking_loss_all(scores: Tensor, image_ids: Tensor, *, margin: float, reduction: str) -> Tensor:
    """Triplet ranking loss with all negatives: the sum of their hinges.

    scores [B, B] fine scores F, image_ids [B]; a scalar. reduction "sum", or "mean": the sum over B.

        sum_i sum_j!=i [m + F_ij - F_ii]+  +  sum_j sum_i!=j [m + F_ij - F_jj]+ , pairs of one image left out
    """
    _check_square(scores, image_ids)
    scores = _wide(scores)
    others = image_ids[:, None] != image_ids[None, :]
    positive = scores.diagonal()
    of_images = F.relu(margin + scores - positive[:, None]).masked_fill(~others, 0)
    of_texts = F.relu(margin + scores - positive[None, :]).masked_fill(~others, 0)
    return _reduced(of_images.sum(1) + of_texts.sum(0), reduction)


def share_of_active_hinges(scores: Tensor, negatives: HardNegatives, *, margin: float) -> Tensor:
    """Return the share of triplet hinges above zero, 0 to 1, among those with a negative; 0 if there are none.

    scores [B, B] fine scores; a scalar without gradient.
    """
    active = torch.stack([(hinge > 0).sum() for hinge in _triplet_hinges(scores.detach(), negatives, margin)]).sum()
    known = torch.stack([(index >= 0).sum() for index in negatives]).sum()
    return active / known.clamp(min=1)


def mutual_hard_negative_loss(images: Tensor, texts: Tensor, negatives: HardNegatives, *, margin: float) -> Tensor:
    """M_HN, on global embeddings [B, d] of unit length (METHOD section 4).

    mean( [m + s(I,T-) - s(I,T)]+ + [m + s(I-,T) - s(I,T)]+ )
    """
    batch = _Quadruples(images, texts, negatives, margin)
    return (batch.hinge("I", "T-") + batch.hinge("I-", "T")).mean()


def full_hard_negative_loss(images: Tensor, texts: Tensor, negatives: HardNegatives, *, margin: float) -> Tensor:
    """F_HN, on global embeddings [B, d] of unit length (METHOD section 4).

        M_HN + mean( [m + s(I-,I) - s(I,T)]+ + [m + s(T-,T) - s(I,T)]+ + e [m + s(I-,T-) - s(I,T)]+ )

    with e = 1 where the two negatives have the same index, else 0. Public code: the flag e [B] times a column [B, 1],
    which broadcasts to [B, B] and computes mean(e) * mean(hinge); here: element by element, because that is the
    equation of the paper.
    """
    batch = _Quadruples(images, texts, negatives, margin)
    same = negatives.text_of_image == negatives.image_of_text
    within = batch.hinge("I-", "I") + batch.hinge("T-", "T") + same * batch.hinge("I-", "T-")
    return mutual_hard_negative_loss(images, texts, negatives, margin=margin) + within.mean()


def global_contrastive_divergence(
    images: Tensor, texts: Tensor, negatives: HardNegatives, *, margin: float, slack: float = 0.2
) -> Tensor:
    """GCD, on global embeddings [B, d] of unit length (METHOD section 4).

    F_HN + mean [ |s(I,I_k) - s(T,T_k)| - 0.2 ]+  for k = text negative, and the same for k = image negative
    """
    batch = _Quadruples(images, texts, negatives, margin)
    by_text = F.relu(batch.divergence("Ik_text", "T-") - slack)
    by_image = F.relu(batch.divergence("I-", "Tk_image") - slack)
    return full_hard_negative_loss(images, texts, negatives, margin=margin) + (by_text + by_image).mean()


def global_contrastive_divergence_revised(
    images: Tensor, texts: Tensor, negatives: HardNegatives, *, margin: float
) -> Tensor:
    """GCD_revised, on global embeddings [B, d] of unit length (METHOD section 4).

    M_HN + mean( [m + s(I,I-) - s(I,T)]+ + |s(I,I-) - s(T,T_k)| ), k = image negative
         + mean( [m + s(T,T-) - s(I,T)]+ + |s(I,I_k) - s(T,T-)| ), k = text negative
         + the mean of [m + s(I-,T-) - s(I,T)]+ over the pairs whose two negatives differ (0 if there are none)
    """
    batch = _Quadruples(images, texts, negatives, margin)
    by_image = batch.hinge("I", "I-") + batch.divergence("I-", "Tk_image")
    by_text = batch.hinge("T", "T-") + batch.divergence("Ik_text", "T-")
    differ = negatives.text_of_image != negatives.image_of_text
    mixed = (differ * batch.hinge("I-", "T-")).sum() / differ.sum().clamp(min=1)
    return mutual_hard_negative_loss(images, texts, negatives, margin=margin) + (by_image + by_text).mean() + mixed


def info_nce(images: Tensor, texts: Tensor, *, temperature: float, image_ids: Tensor | None = None) -> Tensor:
    """InfoNCE, on global embeddings [B, d] of unit length: every other pair is a negative.

        mean over i of  - 1/2 log softmax_j( s(I_i, T_j) / t )_i  - 1/2 log softmax_j( s(I_j, T_i) / t )_i

    Other captions of the same image (equal image_ids [B]; None: all differ) are excluded from the softmax.
    A batch of one image has loss 0.
    """
    images, texts = _wide(images), _wide(texts)
    logits = images @ texts.T / temperature
    if image_ids is not None:
        _check_square(logits, image_ids)
        twins = image_ids[:, None] == image_ids[None, :]
        own = torch.eye(len(logits), dtype=torch.bool, device=logits.device)
        logits = logits.masked_fill(twins & ~own, -torch.inf)
    labels = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2


HARD_NEGATIVE_LOSSES: dict[str, Callable[..., Tensor]] = {
    "GCD": global_contrastive_divergence,
    "GCD_release": global_contrastive_divergence,
    "GCD_revised": global_contrastive_divergence_revised,
    "F_HN": full_hard_negative_loss,
    "M_HN": mutual_hard_negative_loss,
}


def global_loss(
    name: str,
    images: Tensor,
    texts: Tensor,
    negatives: HardNegatives | None,
    *,
    margin: float,
    temperature: float = 0.05,
    image_ids: Tensor | None = None,
) -> Tensor:
    """Return the global loss `name`: GCD, GCD_revised, F_HN, M_HN or InfoNCE (METHOD section 4), a scalar.

    images, texts [B, d] unit length, negatives by the fine scores. InfoNCE uses `temperature` and `image_ids` and no
    negatives (None is accepted); the others use `margin` and the negatives.
    """
    if images.shape != texts.shape or images.ndim != 2:
        raise ValueError(
            f"images are {tuple(images.shape)} and texts {tuple(texts.shape)}; pass two global embeddings [B, d] of "
            "the same pairs"
        )
    if name == "InfoNCE":
        return info_nce(images, texts, temperature=temperature, image_ids=image_ids)
    if name not in HARD_NEGATIVE_LOSSES:
        raise ValueError(f"unknown global loss {name!r}; choose from {', '.join([*HARD_NEGATIVE_LOSSES, 'InfoNCE'])}")
    if negatives is None or len(negatives.text_of_image) != len(images):
        found = "None" if negatives is None else f"{len(negatives.text_of_image)} entries"
        raise ValueError(
            f"negatives of {name} are {found} for {len(images)} pairs; pass hard_negatives(scores, image_ids)"
        )
    return HARD_NEGATIVE_LOSSES[name](images, texts, negatives, margin=margin)


class HACANLoss(nn.Module):
    """Total loss of a batch and its schedule (METHOD sections 4 and 5).

        total = triplet + global_loss_weight * global

    The triplet loss takes all negatives in the first `all_negatives_epochs` epochs, then the hardest. The global loss
    is `warmup_loss` in the first `warmup_epochs` epochs, then `loss`; "none" trains without it.

    batches_per_step: number of batches whose gradients are averaged in an optimiser step (accumulated ones, times the
    processes that do not share negatives). With `triplet_reduction="sum"` the triplet loss of a batch is multiplied by
    it, so that the average is the sum over the pairs of the step.
    """

    def __init__(self, settings: LossSettings, *, batches_per_step: int = 1) -> None:
        super().__init__()
        self.settings = settings
        self.batches_per_step = batches_per_step

    def global_loss_name(self, epoch: int) -> str:
        """Return the name of the global loss of an epoch (from 0)."""
        return self.settings.warmup_loss if epoch < self.settings.warmup_epochs else self.settings.loss

    def forward(
        self, scores: Tensor, images: Tensor, texts: Tensor, image_ids: Tensor, *, epoch: int
    ) -> tuple[Tensor, dict[str, float]]:
        """Return the total, a scalar with gradient, and its terms as numbers.

        scores [B, B] fine scores F; images, texts [B, d] global embeddings of unit length; image_ids [B].
        """
        settings = self.settings
        negatives = hard_negatives(scores, image_ids)
        if epoch < settings.all_negatives_epochs:
            triplet = triplet_ranking_loss_all(scores, image_ids, margin=settings.margin, reduction="mean")
        else:
            triplet = triplet_ranking_loss(scores, negatives, margin=settings.margin, reduction="mean")
        name = self.global_loss_name(epoch)
        if name == "none":
            on_globals = triplet.new_zeros(())
        else:
            on_globals = global_loss(
                name,
                images.float(),
                texts.float(),
                negatives,
                margin=settings.margin,
                image_ids=image_ids,
                temperature=settings.infonce_temperature,
            )
        weight = self.batches_per_step * len(scores) if settings.triplet_reduction == "sum" else 1
        total = weight * triplet + settings.global_loss_weight * on_globals
        terms = {
            "total": total.item(),
            "triplet": weight * triplet.item(),
            f"global_{name}": on_globals.item(),
            "hinge_per_pair": triplet.item(),
            "active_hinges": share_of_active_hinges(scores, negatives, margin=settings.margin).item(),
        }
        return total, terms


class _Quadruples:
    """Each pair (I, T) of a batch, its hard negatives (I-, T-) and their partners (Ik_text, Tk_image), all [B, d]."""

    def __init__(self, images: Tensor, texts: Tensor, negatives: HardNegatives, margin: float) -> None:
        images, texts = _wide(images), _wide(texts)
        text, image = negatives.text_of_image, negatives.image_of_text
        # An index of -1 selects a row whose terms `_known` masks.
        self._rows = {
            "I": images,
            "T": texts,
            "T-": texts[text],
            "Ik_text": images[text],
            "I-": images[image],
            "Tk_image": texts[image],
        }
        self._known = {"T-": text >= 0, "Ik_text": text >= 0, "I-": image >= 0, "Tk_image": image >= 0}
        self._margin = margin
        self._positive = self._similarity("I", "T")

    def _similarity(self, a: str, b: str) -> Tensor:
        return (self._rows[a] * self._rows[b]).sum(-1)

    def _only_known(self, values: Tensor, *names: str) -> Tensor:
        for name in names:
            if name in self._known:
                values = values.masked_fill(~self._known[name], 0)
        return values

    def hinge(self, a: str, b: str) -> Tensor:
        """[m + s(a, b) - s(I, T)]+ of every pair, [B]."""
        return self._only_known(F.relu(self._margin + self._similarity(a, b) - self._positive), a, b)

    def divergence(self, image: str, text: str) -> Tensor:
        """|s(I, image) - s(T, text)| of every pair, [B]."""
        return self._only_known((self._similarity("I", image) - self._similarity("T", text)).abs(), image, text)


def _triplet_hinges(scores: Tensor, negatives: HardNegatives, margin: float) -> tuple[Tensor, Tensor]:
    """Return the hinge of every image and of every text, [B] each."""
    _check_square(scores, negatives.text_of_image)
    scores = _wide(scores)
    rows = torch.arange(len(scores), device=scores.device)
    positive = scores.diagonal()
    text, image = negatives.text_of_image, negatives.image_of_text
    of_images = F.relu(margin + scores[rows, text] - positive).masked_fill(text < 0, 0)
    of_texts = F.relu(margin + scores[image, rows] - positive).masked_fill(image < 0, 0)
    return of_images, of_texts


def _reduced(values: Tensor, reduction: str) -> Tensor:
    if reduction not in REDUCTIONS:
        raise ValueError(f"unknown reduction {reduction!r}; choose from {', '.join(REDUCTIONS)}")
    return values.sum() if reduction == "sum" else values.mean()


def _wide(values: Tensor) -> Tensor:
    """Return at least float32, because sums of half-precision products lose the margin."""
    return values.float() if values.dtype in (torch.float16, torch.bfloat16) else values


def _check_square(scores: Tensor, per_pair: Tensor) -> None:
    if scores.ndim != 2 or scores.shape[0] != scores.shape[1] or per_pair.shape != scores.shape[:1]:
        raise ValueError(
            f"scores are {tuple(scores.shape)} with {tuple(per_pair.shape)} ids; pass a square matrix [B, B] whose "
            "diagonal holds the matching pairs, and one id per pair"
        )
