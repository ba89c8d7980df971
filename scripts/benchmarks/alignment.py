"""Speed and memory of the fine alignment at real sizes, beside the pure matrix products of the same sizes.

    python scripts/benchmarks/alignment.py                    # everything, about ten minutes on two CPU cores
    python scripts/benchmarks/alignment.py --only lists       # one part: all, lists, shortlists, training, share
    python scripts/benchmarks/alignment.py --device cuda      # the same tables on a GPU
    python scripts/benchmarks/alignment.py --compile          # the equations through torch.compile

49 and 196 regions and tokens 768 wide, drawn from a normal distribution; caption lengths ([CLS] and [SEP] included) are
drawn from 12.6 +- 2.6, rounded, within 8 to 32. Our scores and the products run in turns, and each time is the fastest
of its runs. Peak memory is what the first call of a new process adds to the features that it holds.
"""

import argparse
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests"))

import references
from full_size import HIGH, MID, WIDTH, full_size_settings

from hacan.alignment import build_alignment
from hacan.losses import global_loss, hard_negatives, triplet_ranking_loss
from hacan.models.factory import build_model
from hacan.types import EncodedImages, EncodedTexts, PackedTexts

LAMBDA, FOCAL = 9.0, "prob"
DIRECTIONS = ("i2t", "t2i", "both")
BATCH = 64
CAPTIONS = 4000  # of the gallery that lists are drawn from
PARTS = ("all", "lists", "shortlists", "training", "share")


def main() -> None:
    """Print the tables that were asked for."""
    options = arguments()
    torch.manual_seed(options.seed)
    if options.threads:
        torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    if options.peak_of:
        print(peak_of_first_call(options, device))
        return
    print(f"torch {torch.__version__}, {device}, {torch.get_num_threads()} threads, seed {options.seed}")
    print()
    tables = {
        "all": all_pairs,
        "lists": evaluation_lists,
        "shortlists": shortlists_of_50,
        "training": training,
        "share": share_of_a_step,
    }
    for part in options.only:
        with torch.set_grad_enabled(part in ("training", "share")):
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
    parser.add_argument("--compile", action="store_true", help="the forms' equations through torch.compile")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--peak-of", nargs=3, help=argparse.SUPPRESS)  # what a process of its own measures
    return parser.parse_args()


# ------------------------------------------------------------------------------------------------- what is measured


def all_pairs(options: argparse.Namespace, device: torch.device) -> Iterator[str]:
    """Every image with every caption, five captions an image."""
    images, texts = gallery(options.images, 5 * options.images, device)
    count = len(images.high) * (len(texts.offsets) - 1)
    yield f"All pairs: {len(images.high)} images x {len(texts.offsets) - 1} captions, {len(texts.high)} tokens"

    def products() -> None:
        for regions, tokens in streams(images, texts):
            for some in regions.split(16):  # 3,136 columns: as fast as any larger product
                tokens @ some.flatten(0, 1).T

    yield from header()
    for name, direction in rows():
        alignment = form(name, direction, options)
        ours, bound = fastest(options.runs, device, lambda: alignment(images, texts), products)  # noqa: B023
        yield row(name, direction, count, ours, bound, peak_memory(options, "all", name, direction))


def evaluation_lists(options: argparse.Namespace, device: torch.device) -> Iterator[str]:
    """Re-ranking as an evaluation of COCO's size does it: the lists of both directions, 16 images a call."""
    yield "Re-ranking: lists of 150 to 350 captions an image, as COCO's 5,000 images and K = 50 give both ways together"
    yield from re_ranking(options, device, "lists")


def shortlists_of_50(options: argparse.Namespace, device: torch.device) -> Iterator[str]:
    """Re-ranking of short lists, all images in one call."""
    yield f"Re-ranking: lists of 50 captions for {options.images} images, out of {5 * options.images} captions"
    yield from re_ranking(options, device, "shortlists")


def re_ranking(options: argparse.Namespace, device: torch.device, task: str) -> Iterator[str]:
    """The table of one kind of lists."""
    images, texts, pairs = listed(task, options.images, device)
    together = 16 if task == "lists" else options.images
    calls = [pairs[pairs[:, 0] // together == call] for call in range(-(-options.images // together))]
    some = min(16, options.images)
    factors = [
        (regions[i], tokens[token_rows(texts, pairs[pairs[:, 0] == i, 1]).to(device)])
        for regions, tokens in streams(images, texts)
        for i in range(some)  # the tokens of each list side by side: no gather is timed
    ]
    share = int((pairs[:, 0] < some).sum()) / len(pairs)

    def products() -> None:
        for regions, tokens in factors:
            tokens @ regions.T

    yield from header()
    for name, direction in rows():
        alignment = form(name, direction, options)

        def ours(alignment: torch.nn.Module = alignment) -> None:
            for some in calls:
                alignment.pairs(images, texts, some)

        mine, bound = fastest(options.runs, device, ours, products)
        yield row(name, direction, len(pairs), mine, bound / share, peak_memory(options, task, name, direction))


def training(options: argparse.Namespace, device: torch.device) -> Iterator[str]:
    """Forward and backward of a batch of 64 pairs, beside the twin that loops over captions (8 of them, times 8)."""
    images, texts = batch(device)
    some = EncodedTexts(*(field[: BATCH // 8] for field in texts))
    yield f"Training step of the alignment: forward and backward of {BATCH} x {BATCH} pairs"
    yield "(the caption loop runs 8 of the 64 captions; its time and its memory are 8 times that)\n"
    yield "| form | direction | ms | caption loop, ms | times faster | peak MiB | caption loop, peak MiB |"
    yield "|---|---|---:|---:|---:|---:|---:|"
    for name, direction in rows():
        alignment = form(name, direction, options)

        def ours(alignment: Callable = alignment) -> None:
            step(alignment, images, texts)

        def loop(name: str = name, direction: str = direction) -> None:
            step(partial(caption_loop, name, direction), images, some)

        mine, twin = fastest(2, device, ours, loop)
        mine_mib, twin_mib = (peak_memory(options, task, name, direction) for task in ("step", "loop"))
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
    part = 8  # images and captions go through the frozen encoders 8 at a time: nothing is kept between them
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

    for name, direction in rows():
        losses = partial(loss_of_batch, form(name, direction, options))
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


def gallery(images: int, captions: int, device: torch.device) -> tuple[EncodedImages, PackedTexts]:
    """Features of that many images and captions."""
    lengths = caption_lengths(captions)
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    tokens = [torch.randn(int(offsets[-1]), WIDTH, device=device) for _ in range(2)]
    regions = [torch.randn(images, count, WIDTH, device=device) for count in (HIGH, MID)]
    return (
        EncodedImages(*regions, torch.randn(images, WIDTH, device=device)),
        PackedTexts(*tokens, offsets, torch.randn(captions, WIDTH, device=device)),
    )


def batch(device: torch.device) -> tuple[EncodedImages, EncodedTexts]:
    """Features of a training batch, its captions padded."""
    images, texts = gallery(BATCH, BATCH, device)
    lengths = texts.offsets.diff()
    mask = torch.arange(int(lengths.max())) < lengths[:, None]
    padded = [tokens.new_zeros(*mask.shape, WIDTH) for tokens in (texts.high, texts.mid)]
    for tokens, real in zip(padded, (texts.high, texts.mid), strict=True):
        tokens[mask.to(device)] = real
    return images, EncodedTexts(*padded, mask.to(device), texts.pooled)


def listed(task: str, images: int, device: torch.device) -> tuple[EncodedImages, PackedTexts, Tensor]:
    """A gallery, and pairs of each image with captions drawn at random: 50 of few, or 150 to 350 of many."""
    captions = 5 * images if task == "shortlists" else CAPTIONS
    sizes = [50 if task == "shortlists" else int(torch.randint(150, 351, ())) for _ in range(images)]
    drawn = [torch.randperm(captions)[:size].sort().values for size in sizes]
    pairs = torch.stack([torch.arange(images).repeat_interleave(torch.tensor(sizes)), torch.cat(drawn)], dim=1)
    return *gallery(images, captions, device), pairs


def token_rows(texts: PackedTexts, captions: Tensor) -> Tensor:
    """Rows of the tokens of some captions."""
    return torch.cat([torch.arange(int(texts.offsets[j]), int(texts.offsets[j + 1])) for j in captions.tolist()])


def streams(images: EncodedImages, texts: PackedTexts) -> list[tuple[Tensor, Tensor]]:
    """The factors of the three products that no form can do without."""
    return [(images.high, texts.high), (images.high, texts.mid), (images.mid, texts.high)]


def form(name: str, direction: str, options: argparse.Namespace) -> torch.nn.Module:
    """The alignment of a table's row."""
    values = {"direction": direction, "lambda_softmax": LAMBDA, "focal_type": FOCAL}
    alignment = build_alignment(name, values, score_memory=options.score_memory)
    if options.compile:
        for equation in ("key_semantic_filter", "local_relationship_guidance"):
            setattr(alignment, equation, torch.compile(getattr(alignment, equation), dynamic=True))
    return alignment


def full_size_model(device: torch.device) -> torch.nn.Module:
    """ConvNeXt-Base and BERT-base with random weights, backbones frozen."""
    model = build_model(full_size_settings(), image_size=224, score_memory=256).to(device)
    model.freeze_backbones(True)
    return model


def repeat(features: tuple, times: int) -> tuple:
    """The features of a batch that holds the same images several times."""
    return type(features)(
        *(field.repeat(times, *[1] * (field.ndim - 1)) if isinstance(field, Tensor) else field for field in features)
    )


# ------------------------------------------------------------------------------------------------------ measurement


def rows() -> list[tuple[str, str]]:
    """What the tables compare."""
    return [(name, direction) for name in ("hybrid", "revised") for direction in DIRECTIONS]


def header() -> Iterator[str]:
    """The head of a table of rates."""
    yield "\n| form | direction | pairs/s | products alone, pairs/s | ratio to products | peak MiB |"
    yield "|---|---|---:|---:|---:|---:|"


def row(name: str, direction: str, count: int, ours: float, bound: float, peak: float) -> str:
    """One row of a table of rates."""
    return f"| {name} | {direction} | {count / ours:,.0f} | {count / bound:,.0f} | {bound / ours:.2f} | {peak:.0f} |"


def fastest(runs: int, device: torch.device, *functions: Callable[[], object]) -> list[float]:
    """Seconds of each function, run in turns: the least of its runs, after one that is not counted."""
    times = [[] for _ in functions]
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


def peak_memory(options: argparse.Namespace, task: str, name: str, direction: str) -> float:
    """MiB that the first call of a new process adds at its peak."""
    command = [sys.executable, __file__, "--peak-of", task, name, direction]
    for key in ("images", "device", "threads", "score_memory", "seed"):
        command += [f"--{key.replace('_', '-')}", str(getattr(options, key))]
    return float(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


def peak_of_first_call(options: argparse.Namespace, device: torch.device) -> float:
    """What --peak-of asks for, in MiB: of the GPU, or of this process's resident memory (Linux)."""
    task, name, direction = options.peak_of
    alignment = form(name, direction, options)
    if task in ("step", "loop"):
        images, texts = batch(device)
        some = EncodedTexts(*(field[: BATCH // 8] for field in texts))
        loop = partial(caption_loop, name, direction)
        function = partial(step, alignment, images, texts) if task == "step" else partial(step, loop, images, some)
    elif task == "all":
        images, texts = gallery(options.images, 5 * options.images, device)
        function = partial(alignment, images, texts)
    else:
        images, texts, pairs = listed(task, options.images, device)
        function = partial(alignment.pairs, images, texts, pairs[pairs[:, 0] < 16])
    few = EncodedImages(*(field[:2] for field in images)), EncodedTexts(*(field[:3] for field in batch(device)[1]))
    alignment(*few)  # the libraries' own memory
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        with torch.set_grad_enabled(task in ("step", "loop")):
            function()
        return (torch.cuda.max_memory_allocated(device) - before) / 2**20
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again from here
    before = resident("VmRSS")
    with torch.set_grad_enabled(task in ("step", "loop")):
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
