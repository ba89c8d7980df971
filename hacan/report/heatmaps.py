"""Word-by-region heatmaps of an image and a caption, as overlays on the preprocessed image.

>>> model = hacan.load_pretrained("exported")
>>> found = explain(model, "dog.jpg", "a dog on a beach")
>>> overlay(found.image, found.streams[0].grids[1], *found.streams[0].range)  # [H, W, 3] uint8: "dog", KSF
>>> figure(found).savefig("dog.png")
"""

from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from matplotlib import colormaps
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from hacan.checkpoints.pretrained import Pretrained
from hacan.errors import UserError
from hacan.images.io import read_image
from hacan.images.preprocessing import MEAN, STD, preprocess_image
from hacan.report.attention import pair_attention

if TYPE_CHECKING:
    from matplotlib.figure import Figure

STREAM_NAMES = {"ksf": "KSF", "lrg_high": "LRG high", "lrg_mid": "LRG mid"}
COLORMAP = "inferno"  # perceptually uniform; dark for small weights
ALPHA = 0.75  # opacity of the highest value
FAINT = 0.35  # opacity of the lowest value, as a share of ALPHA
WORDS_PER_LINE = 8  # in a figure


class Word(NamedTuple):
    """A word of a caption and its tokens."""

    text: str  # as written in the caption
    tokens: tuple[int, ...]  # positions in the token sequence
    special: bool = False  # [CLS], [SEP]


class StreamMaps(NamedTuple):
    """The maps of all words in one stream."""

    stream: str  # ksf, lrg_high, lrg_mid
    grids: np.ndarray  # [words, rows, columns] float32
    unit: str
    score: float  # contribution to the fine similarity
    special: tuple[int, ...] = ()  # positions of [CLS] and [SEP] in the words

    @property
    def range(self) -> tuple[float, float]:
        """Smallest and largest value over the words: the common colour scale of the stream.

        [CLS] and [SEP] are excluded if there are other words, because one of them often attends to a single region.
        Their own maps are clipped to the scale.
        """
        words = np.delete(self.grids, self.special, axis=0)
        shown = words if len(words) else self.grids
        return float(shown.min()), float(shown.max())


class Explanation(NamedTuple):
    """The heatmaps of an image and a caption."""

    image: np.ndarray  # [H, W, 3] uint8 RGB, resized and cropped as for the model
    caption: str
    words: list[Word]
    streams: list[StreamMaps]

    @property
    def score(self) -> float:
        """Fine similarity of the pair."""
        return sum(stream.score for stream in self.streams)


def explain(pretrained: Pretrained, image: str | Path | np.ndarray, caption: str) -> Explanation:
    """Return the heatmaps of an image (a file, or uint8 [H, W, 3] RGB) and a caption; word pieces are averaged."""
    array, caption = image if isinstance(image, np.ndarray) else read_image(image), _encodable(caption)
    size = pretrained.image_size
    seen = image_of_pixels(preprocess_image(array, image_size=size, centre_crop=pretrained.centre_crop))
    attention = pair_attention(
        pretrained.model.alignment, pretrained.encode_images([array]), pretrained.encode_texts([caption])
    )
    mid, high = pretrained.model.region_grids(height=size, width=size)
    words = words_of(caption, pretrained.tokenizer, max_text_len=pretrained.max_text_len)
    some = next(iter(attention.values())).values
    words = [word for word in words if not torch.isnan(some[list(word.tokens)]).any()]
    special = tuple(place for place, word in enumerate(words) if word.special)
    streams = []
    for name, found in attention.items():
        rows, columns = mid if name == "lrg_mid" else high
        by_word = torch.stack([found.values[list(word.tokens)].mean(0) for word in words])
        streams.append(StreamMaps(name, by_word.view(-1, rows, columns).numpy(), found.unit, found.score, special))
    return Explanation(seen, caption, words, streams)


def words_of(caption: str, tokenizer: PreTrainedTokenizerBase, *, max_text_len: int) -> list[Word]:
    """Return the words of the truncated caption with their tokens; special tokens are separate words."""
    caption = _encodable(caption)
    encoded = tokenizer(caption, truncation=True, max_length=max_text_len, return_offsets_mapping=True)
    names = tokenizer.convert_ids_to_tokens(encoded["input_ids"])
    words: list[Word] = []
    last = None
    for place, (word_id, (start, end)) in enumerate(zip(encoded.word_ids(), encoded["offset_mapping"], strict=True)):
        if word_id is None:
            words.append(Word(names[place], (place,), special=True))
        elif word_id == last:
            words[-1] = Word(words[-1].text + caption[start:end], (*words[-1].tokens, place))
        else:
            words.append(Word(caption[start:end], (place,)))
        last = word_id
    return words


def image_of_pixels(pixels: Tensor) -> np.ndarray:
    """Undo the normalisation: pixels [3, H, W] -> [H, W, 3] uint8 RGB."""
    mean, std = torch.tensor(MEAN)[:, None, None], torch.tensor(STD)[:, None, None]
    return ((pixels.cpu() * std + mean) * 255).round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0).numpy()


def upsample(grid: np.ndarray, height: int, width: int) -> np.ndarray:
    """Resize [rows, columns] to [height, width], bilinear between the centres of the cells."""
    cells = torch.from_numpy(np.ascontiguousarray(grid, np.float32))[None, None]
    return torch.nn.functional.interpolate(cells, size=(height, width), mode="bilinear", align_corners=False)[
        0, 0
    ].numpy()


def overlay(image: np.ndarray, grid: np.ndarray, low: float, high: float, *, alpha: float = ALPHA) -> np.ndarray:
    """Return the image [H, W, 3] uint8 with the map [rows, columns] on top, coloured from `low` to `high`."""
    values = upsample(grid, *image.shape[:2])
    scaled = np.clip((values - low) / (high - low), 0, 1) if high > low else np.zeros_like(values)
    colours = colormaps[COLORMAP](scaled)[..., :3] * 255
    opacity = alpha * (FAINT + (1 - FAINT) * scaled[..., None])
    return np.rint(image * (1 - opacity) + colours * opacity).astype(np.uint8)


def figure(found: Explanation, *, alpha: float = ALPHA) -> "Figure":
    """Return a figure of all words but special tokens, with a row and a colour scale per stream."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure

    places = [place for place, word in enumerate(found.words) if not word.special]
    per_line = -(-len(places) // max(1, -(-len(places) // WORDS_PER_LINE))) or 1  # balanced lines
    lines = [places[at : at + per_line] for at in range(0, len(places), per_line)] or [[]]
    columns = 1 + max(1, len(lines[0]))
    rows = len(lines) * len(found.streams)
    drawn = Figure(figsize=(1.5 * columns + 1.1, 1.75 * rows + 0.9), layout="constrained")
    drawn.suptitle(_plain(f"{found.caption}\nfine similarity {found.score:.3f}"), fontsize=11, wrap=True)
    axes = drawn.subplots(rows, columns, squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    for line, shown in enumerate(lines):
        for k, stream in enumerate(found.streams):
            row = axes[line * len(found.streams) + k]
            low, high = stream.range
            row[0].imshow(found.image)
            row[0].set_title(f"{STREAM_NAMES[stream.stream]}: {stream.score:+.3f}", fontsize=9)
            for axis, place in zip(row[1:], shown, strict=False):
                axis.imshow(overlay(found.image, stream.grids[place], low, high, alpha=alpha))
                axis.set_title(_plain(found.words[place].text), fontsize=9)
            scale = ScalarMappable(Normalize(low, high if high > low else low + 1e-6), COLORMAP)
            bar = drawn.colorbar(scale, ax=list(row), fraction=0.03, pad=0.01)
            bar.ax.tick_params(labelsize=7)
            bar.set_label(stream.unit.replace(", ", ",\n"), fontsize=7)
    return drawn


def save_figure(found: Explanation, path: Path, *, alpha: float = ALPHA) -> None:
    """Save the figure in the format of the suffix of `path`."""
    formats = ("png", "jpg", "jpeg", "pdf", "svg", "webp")
    if path.suffix.lower().removeprefix(".") not in formats:
        raise UserError(f"{path} has no known image suffix: use .{', .'.join(formats)}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure(found, alpha=alpha).savefig(path, dpi=110)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}; give another path") from error


def _encodable(text: str) -> str:
    """Return the text with lone surrogates replaced by question marks."""
    return text.encode("utf-8", "replace").decode("utf-8")


def _plain(text: str) -> str:
    return text.replace("$", r"\$")  # no mathtext
