"""Time and peak memory of an evaluation of COCO-5K size, by stage, on drawn features; and what encoding costs.

    python scripts/benchmarks/evaluation.py                       # 5,000 images, 25,000 captions; fine stage on a share
    python scripts/benchmarks/evaluation.py --share 1             # the whole fine stage
    python scripts/benchmarks/evaluation.py --only encoding       # full-size encoders on drawn images

The first part never runs an encoder: features are drawn, so that the memory is that of the evaluation. The second runs
the bare backbones and `encode_gallery` over the same images and captions, in turns, and prints the ratio.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from full_size import HIGH, MID, full_size_settings

from datamodules.datamodule import PairDataModule
from datamodules.records import CaptionedImage
from datamodules.tokens import load_tokenizer
from hacan.alignment import FORMS, build_alignment
from hacan.models.factory import build_model
from hacan.retrieval.cached_scores import CachedScores
from hacan.retrieval.ensemble import GalleryScores, Scorer, build_scorer
from hacan.retrieval.feature_cache import FeatureStorage, encode_gallery
from hacan.retrieval.ranking import FINE_IMAGES, coarse_ranks, fine_shard, listed_pairs, rank_pairs, shortlists
from hacan.retrieval.stage_meter import StageMeter
from hacan.types import EncodedImages, EncodedTexts, Gallery, Split

LONGEST = 32  # tokens of a caption
WORDS = [
    "a",
    "the",
    "man",
    "woman",
    "dog",
    "cat",
    "red",
    "small",
    "sits",
    "runs",
    "on",
    "in",
    "near",
    "street",
    "water",
]


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line, measure, print; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=["ranking", "encoding"], help="one part (default: both)")
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--captions", type=int, default=5, help="per image")
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--top-k", type=int, default=50)
    parser.add_argument("--share", type=float, default=0.01, help="of the images whose listed pairs are scored")
    parser.add_argument("--alignment", choices=list(FORMS), default="hybrid")
    parser.add_argument("--direction", choices=["i2t", "t2i", "both"], default="i2t")
    parser.add_argument("--score-memory", type=int, default=256, help="MiB")
    parser.add_argument("--feature-memory", type=int, default=8192, help="MiB; less than the features: mapped files")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--encoded-images", type=int, default=64, help="images of the second part")
    parser.add_argument("--turns", type=int, default=3, help="of the second part")
    options = parser.parse_args(arguments)
    print(f"{options.device}, {torch.get_num_threads()} threads, torch {torch.__version__}: {' '.join(sys.argv)}\n")
    if options.only != "encoding":
        benchmark_ranking(options)
    if options.only != "ranking":
        benchmark_encoding(options)
    return 0


def benchmark_ranking(options: argparse.Namespace) -> None:
    """Bank, coarse, fine and rank stages on drawn features."""
    device = torch.device(options.device)
    meter = StageMeter(device)
    gallery = drawn_gallery(options, meter)
    sizes = [sum(t.numel() * t.element_size() for t in part) / 2**20 for part in gallery[:2]]
    size = sum(sizes)
    alignment = build_alignment(
        options.alignment,
        {"direction": options.direction, "lambda_softmax": 9.0, "focal_type": "prob"},
        score_memory=options.score_memory,
    ).to(device)
    scores = GalleryScores([alignment_alone(alignment, device)], [gallery], coarse_kind="global")
    cached = CachedScores(scores.coarse, images=options.images, texts=len(gallery.image_of_text))
    with torch.no_grad():
        with meter.stage("coarse"):
            lists = shortlists(cached, gallery.image_of_text, images=options.images, top_k=options.top_k)
            coarse_ranks(cached, gallery.image_of_text, images=options.images)
        pairs = listed_pairs(lists)
        parts = max(1, min(round(1 / options.share), -(-options.images // FINE_IMAGES)))
        with meter.stage("fine"):
            scored = len(fine_shard(scores.pairs, pairs, rank=parts // 2, world_size=parts))
        with meter.stage("rank"):
            rank_pairs(lists, pairs, torch.zeros(len(pairs)), gallery.image_of_text)
    print(
        f"\n{options.images:,} images x ({HIGH} + {MID}) regions, {len(gallery.image_of_text):,} captions of "
        f"{float(gallery.texts.offsets.diff().float().mean()):.1f} tokens on average, {options.width} wide, "
        f"{gallery.images.high.dtype}: {size:,.0f} MiB of features "
        f"(the captions', which a GPU would hold: {sizes[1]:,.0f}), "
        f"{'in memory' if size <= options.feature_memory else 'mapped to files'}\n"
        f"{options.alignment} {options.direction}, K = {options.top_k}: {len(pairs):,} listed pairs\n"
    )
    print("| stage | seconds | share measured | seconds for all | host peak MiB | device peak MiB |")
    print("|---|---|---|---|---|---|")
    for name, figures in meter.stages.items():
        share = scored / len(pairs) if name == "fine" else 1.0
        on_device = f"{figures['device_peak_mib']:,.0f}" if "device_peak_mib" in figures else "-"
        print(
            f"| {name} | {figures['seconds']:.1f} | {share:.3f} | {figures['seconds'] / share:,.0f} | "
            f"{figures['host_peak_mib']:,.0f} | {on_device} |"
        )
    print(f"\nfine: {scored / meter.stages['fine']['seconds']:,.0f} pairs per second")


def drawn_gallery(options: argparse.Namespace, meter: StageMeter) -> Gallery:
    """Features stored by `encode_gallery` itself, of encoders that draw: a caption resembles its image's embedding."""
    texts = options.images * options.captions
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randn(texts, generator=generator).mul(2.5).add(13).round().clamp(8, LONGEST).long()
    image_of_text = torch.arange(options.images).repeat_interleave(options.captions)
    anchors = F.normalize(torch.randn(options.images, options.width, generator=generator), dim=-1)
    noise = torch.randn(4096, 1, options.width, generator=generator) / 4

    def features(rows: Tensor, length: int, shift: int) -> Tensor:
        drawn = noise[(rows[:, None] * 37 + torch.arange(length) + shift) % len(noise), 0]
        return drawn + anchors[rows % options.images, None] * 4

    def image_batches(rows: Sequence[int]) -> Iterator[tuple[Tensor, Tensor]]:
        for part in torch.tensor(rows).split(64):
            yield part, part

    def text_batches(rows: Sequence[int]) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        rows = torch.tensor(rows)
        for part in rows[lengths[rows].argsort(stable=True)].split(256):
            mask = torch.arange(int(lengths[part].max())) < lengths[part, None]
            yield part, part[:, None].expand_as(mask), mask

    def encode_images(rows: Tensor) -> EncodedImages:
        return EncodedImages(features(rows, HIGH, 0), features(rows, MID, 1000), anchors[rows])

    def encode_texts(token_ids: Tensor, mask: Tensor) -> EncodedTexts:
        rows = token_ids[:, 0]
        owners = image_of_text[rows]
        pooled = F.normalize(anchors[owners] + 1.3 * F.normalize(noise[rows % len(noise), 0], dim=-1), dim=-1)
        width = mask.shape[1]
        return EncodedTexts(features(owners, width, 2000), features(owners, width, 3000), mask, pooled)

    scorer = alignment_alone(torch.nn.Identity(), torch.device("cpu"))
    return encode_gallery(
        scorer._replace(encode_images=encode_images, encode_texts=encode_texts),
        Split(
            dataset="drawn",
            name="test",
            ids=range(options.images),
            captions=[""] * texts,
            image_of_text=image_of_text,
            image_batches=image_batches,
            text_batches=text_batches,
            batch_size=64,
        ),
        storage=FeatureStorage(memory=options.feature_memory),
        meter=meter,
    )


def alignment_alone(alignment: torch.nn.Module, device: torch.device) -> Scorer:
    """A scorer of features, without encoders."""
    return Scorer(
        name="drawn",
        checkpoint_hash="",
        alignment="",
        direction="",
        precision="32-true",
        device=device,
        encode_images=lambda pixels: pixels,
        encode_texts=lambda token_ids, mask: token_ids,
        score=lambda images, texts, streams: alignment(images, texts, streams=streams),
        score_pairs=lambda images, texts, pairs, streams: alignment.pairs(images, texts, pairs, streams=streams),
    )


def benchmark_encoding(options: argparse.Namespace) -> None:
    """The bare backbones against `encode_gallery`, over the same images and captions, in one run."""
    device = torch.device(options.device)
    with tempfile.TemporaryDirectory() as folder:
        data = drawn_data(Path(folder), options)
        settings = full_size_settings(alignment=options.alignment, direction=options.direction)
        model = build_model(settings, image_size=224, score_memory=options.score_memory, tokenizer=None)
        model = model.eval().to(device)
        split = data.eval_split("test")
        pictures, captions = list(data.eval_images("test")), list(data.eval_texts("test"))

        def bare() -> float:
            start = time.perf_counter()
            for _, pixels in pictures:
                model.image_encoder(pixels.to(device))
            for _, token_ids, mask in captions:
                model.text_encoder(token_ids.to(device), mask.to(device))
            return finished(device) - start

        scorer = build_scorer(model, name="benchmark", device=device)
        inputs = split._replace(dataset="drawn", batch_size=16, images_hash="drawn")

        def encode(home: Path) -> float:
            start = time.perf_counter()
            storage = FeatureStorage(folder=home, memory=options.feature_memory)
            encode_gallery(scorer, inputs, storage=storage, meter=StageMeter(device), progress=False)
            return finished(device) - start

        with torch.no_grad():
            bare()  # warm-up
            times = [
                (bare(), encode(Path(folder, f"cache-{turn}")))
                for turn in tqdm(range(options.turns), desc="bare, then encode_gallery")
            ]
    forward, encoding = map(min, zip(*times, strict=True))  # the turn that other work on the machine disturbed least
    print(
        f"\n{len(split.paths)} images of 500 x 375 pixels and {len(split.captions)} captions, convnext_base and "
        f"bert-base of random weights, the faster of {options.turns} turns each:\n"
        f"bare forward passes of both backbones {forward:.2f} s; encode_gallery (decoding, projections, aggregators, "
        f"features cached on disk) {encoding:.2f} s; ratio {encoding / forward:.3f}\n"
        f"turns: {', '.join(f'{one:.2f} and {other:.2f}' for one, other in times)} s"
    )


def drawn_data(folder: Path, options: argparse.Namespace) -> PairDataModule:
    """A test split of noise images (JPEG) with captions of 8 to 14 words."""
    generator = np.random.default_rng(0)
    records = []
    for image in range(options.encoded_images):
        path = folder / f"{image}.jpg"
        small = generator.integers(0, 255, (24, 32, 3), dtype=np.uint8)
        cv2.imwrite(str(path), cv2.resize(small, (500, 375), interpolation=cv2.INTER_CUBIC))
        captions = tuple(" ".join(generator.choice(WORDS, generator.integers(8, 15))) for _ in range(options.captions))
        records.append(CaptionedImage(path=path, captions=captions, image_id=image, split="test"))
    vocabulary = folder / "vocab.txt"
    vocabulary.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]))
    return PairDataModule(
        records=records,
        tokenizer=load_tokenizer(str(vocabulary)),
        image_size=224,
        max_text_len=LONGEST,
        batch_size=16,
        per_gpu_batchsize=16,
        num_workers=0 if options.device == "cpu" else 8,
        seed=0,
        progress=False,
    )


def finished(device: torch.device) -> float:
    """The time when the device has done what was asked of it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


if __name__ == "__main__":
    sys.exit(main())
