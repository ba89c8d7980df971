"""Speed and memory of the fine alignment at real sizes, beside the pure matrix products of the same sizes.

    python scripts/benchmark_alignment.py                    # everything, about nine minutes on two CPU cores
    python scripts/benchmark_alignment.py --only pairs       # one part: all, pairs, training, share
    python scripts/benchmark_alignment.py --device cuda      # the same table on a GPU
    python scripts/benchmark_alignment.py --eager            # as where there is no C compiler

49 and 196 regions and tokens 768 wide, drawn from a normal distribution; caption lengths ([CLS] and [SEP] included) are
drawn from 12.6 +- 2.6, rounded, within 8 to 32. Ours, the products and the twins run in turns; each time is the fastest
of its runs. Peak memory is what the first call of a process of its own adds to what it held, the features included.
"""

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

import references
from full_size import HIGH, MID, WIDTH, full_size_settings

from hacan.alignment import build_alignment, pack_texts
from hacan.alignment.native import attention_library
from hacan.build import build_model
from hacan.losses import global_loss, hard_negatives, triplet_ranking_loss
from hacan.types import EncodedImages, EncodedTexts, PackedTexts

LAMBDA, FOCAL = 9.0, "prob"
DIRECTIONS = ("i2t", "t2i", "both")
BATCH = 64
PARTS = ("all", "pairs", "training", "share")


def main() -> None:
    """Print the tables that were asked for."""
    options = arguments()
    if options.eager:
        os.environ["HACAN_EAGER"] = "1"  # before the first score, and for the processes that measure memory
    torch.manual_seed(options.seed)
    if options.threads:
        torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    if options.peak_of:
        print(peak_of_first_call(options, device))
        return
    print(f"torch {torch.__version__}, {device}, {torch.get_num_threads()} threads, seed {options.seed}")
    if device.type == "cpu":
        print(f"hybrid scores without gradients: {'by attention.c' if attention_library() else 'by torch alone'}")
    print()
    tables = {"all": all_pairs, "pairs": listed_pairs, "training": training, "share": share_of_a_step}
    for part in options.only:
        for line in tables[part](options, device):
            print(line, flush=True)
        print()


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="parts to run")
    parser.add_argument("--images", type=int, default=64, help="images of the gallery")
    parser.add_argument("--runs", type=int, default=4, help="runs of each; the fastest counts")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0: as torch chooses")
    parser.add_argument("--score-memory", type=int, default=256, help="working set in MiB")
    parser.add_argument("--eager", action="store_true", help="do without the compiled functions of attention.c")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--peak-of", nargs=4, help=argparse.SUPPRESS)  # what a process of its own measures
    return parser.parse_args()


# ------------------------------------------------------------------------------------------------- what is measured


def all_pairs(options: argparse.Namespace, device: torch.device) -> Iterator[str]:
    """Every image with every caption, five captions an image."""
    images, texts = gallery(options.images, 5 * options.images, device)
    packed = pack_texts(texts)
    count = len(images.high) * len(texts.high)
    yield f"All pairs: {len(images.high)} images x {len(texts.high)} captions, {len(packed.high)} tokens"
    yield from header("ratio to products")
    for name, direction, dtype in rows(device):
        alignment = form(name, direction, options, dtype)

        def products(dtype: torch.dtype | None = dtype) -> None:
            for regions, tokens in streams(images, packed, dtype):
                for some in regions.split(16):  # 3,136 columns: as fast as any larger product
                    tokens @ some.flatten(0, 1).T

        ours, bound = fastest(options.runs, device, lambda: alignment(images, packed), products)  # noqa: B023
        peak = peak_memory(options, "all", name, direction, dtype)
        yield row(name, direction, dtype, count, ours, bound, peak, literal_rate(name, direction, images, texts))


def listed_pairs(options: argparse.Namespace, device: torch.device) -> Iterator[str]:
    """Re-ranking: each image with a shortlist of 50 of its gallery's captions, drawn at random."""
    images, texts = gallery(options.images, 5 * options.images, device)
    packed = pack_texts(texts)
    pairs = shortlists(len(images.high), len(texts.high))
    yield f"Re-ranking: shortlists of 50 captions for {len(images.high)} images, out of {len(texts.high)} captions"
    yield from header("ratio to products")
    for name, direction, dtype in rows(device):
        alignment = form(name, direction, options, dtype)
        factors = [
            (regions[i], tokens[token_rows(packed, pairs[pairs[:, 0] == i, 1]).to(device)])
            for regions, tokens in streams(images, packed, dtype)
            for i in range(len(images.high))
        ]

        def products(factors: list[tuple[Tensor, Tensor]] = factors) -> None:
            for regions, tokens in factors:  # the tokens of each list already side by side: no gather is timed
                tokens @ regions.T

        ours, bound = fastest(options.runs, device, lambda: alignment.pairs(images, packed, pairs), products)  # noqa: B023
        peak = peak_memory(options, "pairs", name, direction, dtype)
        yield row(name, direction, dtype, len(pairs), ours, bound, peak, literal_rate(name, direction, images, texts))


def training(options: argparse.Namespace, device: torch.device) -> Iterator[str]:
    """Forward and backward of a batch of 64 pairs, beside the twin that loops over captions (8 of them, times 8)."""
    images, texts = gallery(BATCH, BATCH, device)
    some = EncodedTexts(*(field[: BATCH // 8] for field in texts))
    yield f"Training step of the alignment: forward and backward of {BATCH} x {BATCH} pairs"
    yield "(the caption loop runs 8 of the 64 captions; its time and its memory are 8 times that)\n"
    yield "| form | direction | ms | caption loop, ms | times faster | peak MiB | caption loop, peak MiB |"
    yield "|---|---|---:|---:|---:|---:|---:|"
    for name, direction, _ in rows(device)[: 2 * len(DIRECTIONS)]:
        alignment = form(name, direction, options, None)

        def ours(alignment: Callable = alignment) -> None:
            step(alignment, images, texts)

        def loop(name: str = name, direction: str = direction) -> None:
            step(partial(caption_loop, name, direction), images, some)

        mine, twin = fastest(2, device, ours, loop)
        mine_mib, twin_mib = (peak_memory(options, task, name, direction, None) for task in ("step", "loop"))
        yield (
            f"| {name} | {direction} | {1e3 * mine:.0f} | {8e3 * twin:.0f} | {8 * twin / mine:.1f} "
            f"| {mine_mib:.0f} | {8 * twin_mib:.0f} |"
        )


def step(score: Callable, images: EncodedImages, texts: EncodedTexts) -> None:
    """Forward and backward of the scores of all pairs, to the features."""
    leaves = [x.clone().requires_grad_() for x in (*images[:2], *texts[:2])]
    scores = score(EncodedImages(*leaves[:2], images.pooled), texts._replace(high=leaves[2], mid=leaves[3]))
    torch.autograd.grad(scores.sum(), leaves)


def caption_loop(name: str, direction: str, images: EncodedImages, texts: EncodedTexts) -> Tensor:
    """The second twin: every image at once, caption after caption."""
    return references.by_caption(name, images, texts, direction, LAMBDA, FOCAL)


def share_of_a_step(options: argparse.Namespace, device: torch.device) -> Iterator[str]:
    """What alignment and losses take of a training step of batch 64 with frozen full-size encoders."""
    part = 8  # pictures and captions go through the frozen encoders 8 at a time: nothing is kept between them
    yield f"Share of alignment and losses in a training step of batch {BATCH}, encoders frozen (random weights)\n"
    yield "| form | direction | encoders, s | projections and the rest, s | alignment and losses, s | share |"
    yield "|---|---|---:|---:|---:|---:|"
    model = full_size_model(device)
    pixels = torch.randn(part, 3, 224, 224, device=device)
    lengths = caption_lengths(BATCH)
    mask = (torch.arange(int(lengths.max()))[None] < lengths[:, None]).to(device)
    token_ids = torch.randint(1000, 30000, mask.shape, device=device) * mask

    @torch.no_grad()
    def encode() -> None:
        model.image_encoder(pixels)
        model.text_encoder(token_ids[:part], mask[:part])

    encoders = BATCH // part * fastest(2, device, encode)[0]
    with torch.no_grad():
        image_features = repeat(model.image_encoder(pixels), BATCH // part)
        text_features = model.text_encoder(token_ids, mask)
    weights = [weight for key, weight in model.named_parameters() if key.startswith(("project", "aggregate"))]

    def rest(score: Callable[[EncodedImages, EncodedTexts], Tensor]) -> None:
        images = EncodedImages(
            model.project_image_high(image_features.high),
            model.project_image_mid(image_features.mid),
            model.aggregate_image(image_features.pooled),
        )
        texts = EncodedTexts(
            model.project_text_high(text_features.high),
            model.project_text_mid(text_features.mid),
            mask,
            model.aggregate_text(text_features.pooled),
        )
        torch.autograd.grad(score(images, texts), weights)

    for name, direction, _ in rows(device)[: 2 * len(DIRECTIONS)]:
        losses = partial(loss_of_batch, form(name, direction, options, None))
        whole, bare = fastest(2, device, partial(rest, losses), partial(rest, sum_of_features))
        ours = whole - bare
        share = ours / (encoders + whole)
        yield f"| {name} | {direction} | {encoders:.1f} | {bare:.2f} | {ours:.2f} | {100 * share:.0f}% |"


def loss_of_batch(alignment: torch.nn.Module, images: EncodedImages, texts: EncodedTexts) -> Tensor:
    """The hybrid preset's total loss of a batch of different images."""
    scores = alignment(images, texts)
    negatives = hard_negatives(scores, torch.arange(len(scores), device=scores.device))
    triplet = triplet_ranking_loss(scores, negatives, margin=0.2, reduction="sum")
    return triplet + 10 * global_loss("GCD", images.pooled, texts.pooled, negatives, margin=0.2)


def sum_of_features(images: EncodedImages, texts: EncodedTexts) -> Tensor:
    """Something that costs nothing and needs the gradient of every feature."""
    return sum(field.sum() for field in (*images, texts.high, texts.mid, texts.pooled))


# --------------------------------------------------------------------------------------------------------- features


def caption_lengths(count: int) -> Tensor:
    """Tokens of captions like COCO's, [CLS] and [SEP] included."""
    return (12.6 + 2.6 * torch.randn(count)).round().clamp(8, 32).long()


def gallery(images: int, captions: int, device: torch.device) -> tuple[EncodedImages, EncodedTexts]:
    """Features of that many images and captions."""
    lengths = caption_lengths(captions)
    mask = torch.arange(int(lengths.max()))[None] < lengths[:, None]
    return (
        EncodedImages(*(torch.randn(images, *size, device=device) for size in ((HIGH, WIDTH), (MID, WIDTH), (WIDTH,)))),
        EncodedTexts(
            torch.randn(*mask.shape, WIDTH, device=device),
            torch.randn(*mask.shape, WIDTH, device=device),
            mask.to(device),
            torch.randn(captions, WIDTH, device=device),
        ),
    )


def shortlists(images: int, captions: int) -> Tensor:
    """Pairs of each image with 50 captions drawn at random."""
    drawn = torch.cat([torch.randperm(captions)[:50] for _ in range(images)])
    return torch.stack([torch.arange(images).repeat_interleave(50), drawn], dim=1)


def token_rows(texts: PackedTexts, captions: Tensor) -> Tensor:
    """Rows of the tokens of some captions."""
    return torch.cat([torch.arange(int(texts.offsets[j]), int(texts.offsets[j + 1])) for j in captions.tolist()])


def streams(images: EncodedImages, texts: PackedTexts, dtype: torch.dtype | None) -> list[tuple[Tensor, Tensor]]:
    """The factors of the three products that no form can do without."""
    factors = [(images.high, texts.high), (images.high, texts.mid), (images.mid, texts.high)]
    return [(regions.to(dtype), tokens.to(dtype)) for regions, tokens in factors] if dtype else factors


def form(name: str, direction: str, options: argparse.Namespace, dtype: torch.dtype | None) -> torch.nn.Module:
    """The alignment of a table's row."""
    return build_alignment(
        name,
        direction=direction,
        temperature=LAMBDA,
        focal_type=FOCAL,
        score_memory=options.score_memory,
        product_dtype=dtype,
    )


def full_size_model(device: torch.device) -> torch.nn.Module:
    """ConvNeXt-Base and BERT-base with random weights, backbones frozen."""
    model = build_model(full_size_settings(), image_size=224, score_memory=256).to(device)
    model.freeze_backbones(True)
    return model


def repeat(features: tuple, times: int) -> tuple:
    """The features of a batch that holds the same pictures several times."""
    return type(features)(
        *(field.repeat(times, *[1] * (field.ndim - 1)) if isinstance(field, Tensor) else field for field in features)
    )


# ------------------------------------------------------------------------------------------------------ measurement


def rows(device: torch.device) -> list[tuple[str, str, torch.dtype | None]]:
    """What the tables compare: float32 everywhere, bfloat16 where the hardware multiplies in it."""
    found = [(name, direction, None) for name in ("hybrid", "revised") for direction in DIRECTIONS]
    if device.type != "cpu" or has_bfloat16():
        found += [(name, direction, torch.bfloat16) for name, direction, _ in found]
    return found


def has_bfloat16() -> bool:
    """Whether this CPU has instructions for products in bfloat16."""
    try:
        flags = Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    return any(flag in flags for flag in ("avx512_bf16", "amx_bf16"))


def header(last: str) -> Iterator[str]:
    """The head of a table of rates."""
    if not has_bfloat16():
        yield "(no bfloat16 rows: this CPU has neither avx512_bf16 nor amx_bf16)"
    yield (
        f"\n| form | direction | precision | pairs/s | products alone, pairs/s | {last} | peak MiB "
        "| literal twin, pairs/s |"
    )
    yield "|---|---|---|---:|---:|---:|---:|---:|"


def row(
    name: str,
    direction: str,
    dtype: torch.dtype | None,
    count: int,
    ours: float,
    bound: float,
    peak: float,
    literal: float,
) -> str:
    """One row of a table of rates."""
    precision = "float32" if dtype is None else str(dtype).removeprefix("torch.")
    return (
        f"| {name} | {direction} | {precision} | {count / ours:,.0f} | {count / bound:,.0f} | {bound / ours:.2f} "
        f"| {peak:.0f} | {literal:.1f} |"
    )


def fastest(runs: int, device: torch.device, *functions: Callable[[], object]) -> list[float]:
    """Seconds of each function, run in turns: the least of its runs, after one that is not counted."""
    times = [[] for _ in functions]
    with torch.set_grad_enabled(torch.is_grad_enabled()):
        for _ in tqdm(range(runs + 1), leave=False, disable=None, unit="round"):
            for function, seconds in zip(functions, times, strict=True):
                wait(device)
                start = time.perf_counter()
                function()
                wait(device)
                seconds.append(time.perf_counter() - start)
    return [min(seconds[1:]) for seconds in times]


def wait(device: torch.device) -> None:
    """Until the device has done what was asked of it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def literal_rate(name: str, direction: str, images: EncodedImages, texts: EncodedTexts) -> float:
    """Pairs per second of the literal twin, on one pair."""
    image, valid = (images.high[0], images.mid[0]), texts.mask[0]
    text = (texts.high[0][valid], texts.mid[0][valid])
    start = time.perf_counter()
    if name == "hybrid":
        references.hybrid_fine(image, text, direction=direction, temperature=LAMBDA, focal_type=FOCAL)
    else:
        references.revised_fine(image, text, direction=direction)
    return 1 / (time.perf_counter() - start)


def peak_memory(options: argparse.Namespace, task: str, name: str, direction: str, dtype: torch.dtype | None) -> float:
    """MiB that the first call of a process of its own adds at its peak."""
    precision = str(dtype or torch.float32).removeprefix("torch.")
    command = [sys.executable, __file__, "--peak-of", task, name, direction, precision]
    for key in ("images", "device", "threads", "score_memory", "seed"):
        command += [f"--{key.replace('_', '-')}", str(getattr(options, key))]
    return float(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


def peak_of_first_call(options: argparse.Namespace, device: torch.device) -> float:
    """What --peak-of asks for, in MiB: of the GPU, or of this process's resident memory (Linux)."""
    task, name, direction, precision = options.peak_of
    alignment = form(name, direction, options, None if precision == "float32" else getattr(torch, precision))
    sizes = (BATCH, BATCH) if task in ("step", "loop") else (options.images, 5 * options.images)
    images, texts = gallery(*sizes, device)
    few = gallery(2, 3, device)
    tasks = {
        "all": (lambda: alignment(images, packed), lambda: alignment(*few)),
        "pairs": (lambda: alignment.pairs(images, packed, pairs), lambda: alignment(*few)),
        "step": (lambda: step(alignment, images, texts), lambda: step(alignment, *few)),
        "loop": (lambda: step(loop, images, some), lambda: step(loop, *few)),
    }
    packed, pairs = pack_texts(texts), shortlists(*sizes) if task == "pairs" else None
    some = EncodedTexts(*(field[: BATCH // 8] for field in texts))
    loop = partial(caption_loop, name, direction)
    function, warm_up = tasks[task]
    warm_up()  # the libraries' own memory
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        function()
        return (torch.cuda.max_memory_allocated(device) - before) / 2**20
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again from here
    before = resident("VmRSS")
    function()
    return resident("VmHWM") - before


def resident(what: str) -> float:
    """VmRSS or VmHWM of this process in MiB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{what}:"):
            return int(line.split()[1]) / 1024
    raise OSError(f"no {what} in /proc/self/status: peak memory is read as Linux gives it")


if __name__ == "__main__":
    main()
