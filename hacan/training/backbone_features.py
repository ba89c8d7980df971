"""Stored outputs of frozen backbones: the train split is encoded once, and every epoch trains the heads on it."""

from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from hacan.models.hacan import HACAN
from hacan.retrieval.ensemble import build_scorer
from hacan.retrieval.feature_cache import FeatureStorage, encode_gallery
from hacan.retrieval.provenance import architecture_hash
from hacan.retrieval.stage_meter import StageMeter
from hacan.types import EncodedImages, EncodedTexts, Gallery, Processes, Split


class BackboneFeatures:
    """Outputs of both backbones for the N images and M captions of a split, in float32."""

    def __init__(self, gallery: Gallery) -> None:
        self.gallery = gallery

    def encode(self, model: HACAN, caption_ids: Tensor) -> tuple[EncodedImages, EncodedTexts]:
        """Return the features of B pairs, given by the indices [B] of their captions in the split."""
        device, captions = caption_ids.device, caption_ids.cpu()
        rows = self.gallery.image_of_text[captions]
        high, mid, pooled = (values[rows].to(device) for values in self.gallery.images)
        texts = self.gallery.texts
        lengths = texts.offsets[captions + 1] - texts.offsets[captions]
        positions = torch.arange(int(lengths.max()))
        mask = positions < lengths[:, None]
        places = (texts.offsets[captions][:, None] + positions).masked_fill(~mask, 0)
        tokens = [values[places].masked_fill(~mask[..., None], 0).to(device) for values in (texts.high, texts.mid)]
        pooled_texts = texts.pooled[captions].to(device)
        images = model.project_images(high, mid, pooled)  # images before texts, as in a training without stored outputs
        return images, model.project_texts(tokens[0], tokens[1], mask.to(device), pooled_texts)


class _Backbones(nn.Module):
    """The backbones of a HACAN with its interface for encoding: their outputs in place of the projected features."""

    def __init__(self, model: HACAN) -> None:
        super().__init__()
        self.image_encoder, self.text_encoder, self.alignment = model.image_encoder, model.text_encoder, model.alignment

    def encode_images(self, pixels: Tensor) -> EncodedImages:
        features = self.image_encoder(pixels)
        return EncodedImages(high=features.high, mid=features.mid, pooled=features.pooled)

    def encode_texts(self, token_ids: Tensor, token_mask: Tensor) -> EncodedTexts:
        features = self.text_encoder(token_ids, token_mask)
        return EncodedTexts(high=features.high, mid=features.mid, mask=token_mask, pooled=features.pooled)


def encode_backbones(
    model: HACAN,
    split: Split,
    *,
    device: torch.device,
    precision: str,
    folder: Path,
    memory: int,
    processes: Processes,
) -> BackboneFeatures:
    """Encode a split with both backbones in evaluation mode, or load what `folder` has of it.

    memory: MiB of features that are held in memory; the rest is mapped to files. Runs with the same backbones, images
    and tokens share the stored features.
    """
    was_training = model.training
    backbones = cast(HACAN, _Backbones(model))
    scorer = build_scorer(
        backbones, name="backbones", device=device, precision=precision, architecture_hash=architecture_hash(backbones)
    )
    gallery = encode_gallery(
        scorer,
        split,
        storage=FeatureStorage(folder=folder, memory=memory, half=False),
        meter=StageMeter(device),
        processes=processes,
        progress=processes.rank == 0,
    )
    model.train(was_training)
    return BackboneFeatures(gallery)
