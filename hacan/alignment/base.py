"""What both forms share: entry points for all pairs and for listed pairs, cut into blocks of equal caption length."""

import torch
from torch import Tensor, nn

from hacan.alignment.packing import lengths_of, pack_texts
from hacan.types import EncodedImages, EncodedTexts, PackedTexts

STREAMS = ("ksf", "lrg_high", "lrg_mid")
DIRECTIONS = ("i2t", "t2i", "both")
LEVELS = {"ksf": ("high", "high"), "lrg_high": ("high", "mid"), "lrg_mid": ("mid", "high")}  # of image, of text


class FineAlignment(nn.Module):
    """Images x captions -> fine scores, block by block; a form says how one block of one stream is scored."""

    def __init__(self, *, direction: str, score_memory: int = 256) -> None:
        super().__init__()
        if direction not in DIRECTIONS:
            raise ValueError(f"direction={direction!r}: expected one of {', '.join(DIRECTIONS)}")
        if score_memory <= 0:
            raise ValueError(f"score_memory={score_memory!r}: expected a number of MiB above 0")
        self.direction = direction
        self.score_memory = score_memory

    def score_block(self, stream: str, regions: Tensor, tokens: Tensor) -> Tensor:
        """Regions [N, R, d] x tokens [m, L, d] of one length -> scores [N, m] of one stream."""
        raise NotImplementedError

    def forward(
        self, images: EncodedImages, texts: EncodedTexts | PackedTexts, *, streams: tuple[str, ...] = STREAMS
    ) -> Tensor:
        """Fine similarity of all pairs, [N, M] float32 (float64 for float64 features)."""
        texts = texts if isinstance(texts, PackedTexts) else pack_texts(texts)
        with torch.autocast(images.high.device.type, enabled=False):
            lengths = lengths_of(texts)
            order, columns = [], []
            for length in lengths.unique().tolist():
                captions = (lengths == length).nonzero().flatten()
                per_block = max(1, int(self.score_memory * 2**20 / 40 / (max(length, 1) * images.mid.shape[1])))
                for chunk in captions.split(per_block):
                    of_images = max(1, per_block // len(chunk))
                    columns.append(
                        torch.cat(
                            [
                                self._rectangle(images, rows, texts, chunk, length, streams)
                                for rows in torch.arange(len(images.high)).split(of_images)
                            ]
                        )
                    )
                    order.append(chunk)
            return torch.cat(columns, 1)[:, torch.cat(order).argsort().to(columns[0].device)]

    def pairs(
        self,
        images: EncodedImages,
        texts: EncodedTexts | PackedTexts,
        pairs: Tensor,
        *,
        streams: tuple[str, ...] = STREAMS,
    ) -> Tensor:
        """Fine similarity of the listed pairs: pairs [P, 2] int64 (image, text) -> scores [P]."""
        texts = texts if isinstance(texts, PackedTexts) else pack_texts(texts)
        lengths = lengths_of(texts)
        pairs = pairs.cpu()
        scores, order = [], []
        with torch.autocast(images.high.device.type, enabled=False):
            for image in pairs[:, 0].unique().tolist():
                places = (pairs[:, 0] == image).nonzero().flatten()
                for length in lengths[pairs[places, 1]].unique().tolist():
                    here = places[lengths[pairs[places, 1]] == length]
                    row = torch.tensor([image])
                    scores.append(self._rectangle(images, row, texts, pairs[here, 1], length, streams).flatten())
                    order.append(here)
        return torch.cat(scores)[torch.cat(order).argsort().to(scores[0].device)]

    def _rectangle(
        self,
        images: EncodedImages,
        rows: Tensor,
        texts: PackedTexts,
        captions: Tensor,
        length: int,
        streams: tuple[str, ...],
    ) -> Tensor:
        """Scores [N, m] of some images and some captions of one length, all streams summed."""
        first, last = int(rows[0]), int(rows[-1]) + 1
        dtype = torch.promote_types(images.high.dtype, torch.float32)
        total = images.high.new_zeros(len(rows), len(captions), dtype=dtype)
        if length == 0:  # a caption without a valid token
            return total
        tokens = (texts.offsets[captions][:, None] + torch.arange(length)).to(texts.high.device)
        for stream in streams:
            of_image, of_text = LEVELS[stream]
            regions = getattr(images, of_image)[first:last].to(dtype)
            total = total + self.score_block(stream, regions, getattr(texts, of_text)[tokens].to(dtype))
        return total
