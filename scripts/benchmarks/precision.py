"""What reduced precision does to the recalls of a trained model: of its encoders and of its features.

    python scripts/benchmarks/precision.py result/demo/1/checkpoints/best.ckpt    # the demo's test images

Every row ranks the same split by hierarchical inference. Encoders: autocast around them. Features: regions and tokens
rounded to that type, as an evaluation keeps them (float16); global embeddings stay float32, as there. Scores are
computed in float32.
"""

import argparse
import sys
from contextlib import nullcontext
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from tqdm import tqdm

from datamodules.readers import read_records
from datamodules.records import CaptionedImage, of_split
from hacan.alignment import pack_texts
from hacan.checkpoints.pretrained import Pretrained
from hacan.errors import UserError
from hacan.retrieval.metrics import retrieval_metrics
from hacan.retrieval.ranking import rank_shortlists
from hacan.types import EncodedImages, Gallery, PackedTexts

FLOAT, HALF, BRAIN = torch.float32, torch.float16, torch.bfloat16
ROWS = (  # encoders, features
    (FLOAT, FLOAT),
    (FLOAT, HALF),
    (FLOAT, BRAIN),
    (BRAIN, HALF),
)


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line, rank in every precision, print the table; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, help="of a training, or a folder that scripts/export.py wrote")
    parser.add_argument("--data", type=Path, default=Path("data/demo"), help="data_root of the data set")
    parser.add_argument("--dataset", default="scenes", help="scenes, f8k, f30k, coco or captions")
    parser.add_argument("--split", default="test")
    parser.add_argument("--top-k", type=int, default=50)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args(arguments)
    try:
        model = Pretrained.load(options.checkpoint, device=options.device)
        records = of_split(read_records(options.dataset, options.data), options.split)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    alignment = model.model.alignment
    print(f"{options.dataset} {options.split}: {len(records)} images; {options.device}; K = {options.top_k}\n")
    print("| encoders | features | i2t R@1, 5, 10 | t2i R@1, 5, 10 | Rsum | fine scores differ by at most |")
    print("|---|---|---|---|---:|---:|")
    galleries, reference = {}, None
    for encoders, features in ROWS:
        if encoders not in galleries:
            galleries[encoders] = encode(model, records, encoders)
        images, texts, image_of_text = rounded(galleries[encoders], features)
        with torch.inference_mode():
            fine = alignment(images, texts).cpu()
            coarse = (images.pooled @ texts.pooled.T).cpu()
        reference = fine if reference is None else reference
        result = rank_shortlists(coarse, fine, image_of_text, top_k=options.top_k)
        metrics = retrieval_metrics(result.ranks_i2t, result.ranks_t2i)
        names = (str(dtype).removeprefix("torch.") for dtype in (encoders, features))
        print(
            f"| {' | '.join(names)} | {metrics.r1_i2t:.1f}, {metrics.r5_i2t:.1f}, {metrics.r10_i2t:.1f} "
            f"| {metrics.r1_t2i:.1f}, {metrics.r5_t2i:.1f}, {metrics.r10_t2i:.1f} | {metrics.rsum:.1f} "
            f"| {float((fine - reference).abs().max()):.1e} |",
            flush=True,
        )
    return 0


def encode(model: Pretrained, records: list[CaptionedImage], precision: torch.dtype) -> Gallery:
    """Features of a split, the encoders in this precision."""
    captions = [caption for record in records for caption in record.captions]
    counts = torch.tensor([len(record.captions) for record in records])
    within = nullcontext() if precision is FLOAT else torch.autocast(model.device.type, dtype=precision)
    with within:
        parts = [
            model.encode_images([record.path for record in records[start : start + 32]])
            for start in tqdm(range(0, len(records), 32), desc=f"encoding, {precision}", unit="batch", leave=False)
        ]
        texts = model.encode_texts(captions)
    images = EncodedImages(*(torch.cat(values) for values in zip(*parts, strict=True)))
    owners = torch.repeat_interleave(counts)
    return rounded(Gallery(images, pack_texts(texts), owners), FLOAT)


def rounded(gallery: Gallery, dtype: torch.dtype) -> Gallery:
    """The same with regions and tokens in another precision, and global embeddings in float32."""
    images, texts, owners = gallery
    return Gallery(
        EncodedImages(images.high.to(dtype), images.mid.to(dtype), images.pooled.float()),
        PackedTexts(texts.high.to(dtype), texts.mid.to(dtype), texts.offsets, texts.pooled.float()),
        owners,
    )


if __name__ == "__main__":
    sys.exit(main())
