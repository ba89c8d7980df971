"""The embedded demo: generated images of coloured shapes in a row or in a column, with five captions each.

Scenes and the claims of captions are data, so that the program can decide whether a caption describes an image. A
caption is detailed enough to describe only one image of its split. Drawing is in `scene_drawing.py`.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from hacan.errors import UserError

SHAPES = ("circle", "square", "triangle", "star")
COLOURS = ("red", "green", "blue", "yellow", "purple", "orange")
SIZES = {"small": ("small", "little"), "large": ("large", "big")}  # size -> words for it
BACKGROUNDS = ("white", "gray", "black")
LAYOUTS = ("row", "column")  # first to last: left to right, top to bottom

# Each template names every object of the scene. `a` comes before `b`, `b` before `c` in the scene's order.
TEMPLATES: dict[tuple[str, int], tuple[str, ...]] = {
    ("row", 2): (
        "{a} to the left of {b}",
        "{b} to the right of {a}",
        "{a} left of {b}",
        "there is {a} on the left and {b} on the right",
    ),
    ("column", 2): (
        "{a} above {b}",
        "{b} below {a}",
        "{a} over {b}",
        "there is {a} at the top and {b} at the bottom",
    ),
    ("row", 3): (
        "from left to right {a}, {b} and {c}",
        "{a} to the left of {b}, and {c} on the right",
        "{c} to the right of {b}, and {a} on the left",
        "{b} with {a} on the left and {c} on the right",
    ),
    ("column", 3): (
        "from top to bottom {a}, {b} and {c}",
        "{a} above {b}, and {c} at the bottom",
        "{c} below {b}, and {a} at the top",
        "{b} with {a} above and {c} below",
    ),
}
BETWEEN = ("{b} between {a} and {c}", "{b} between {c} and {a}")  # true of a row and of a column, in either order
ON_BACKGROUND = ("{caption} on a {background} background", "on {background}, {caption}")
CAPTIONS_PER_SCENE = 5


@dataclass(frozen=True)
class Thing:
    """A shape of a colour and a size; within a scene no two things share shape and colour."""

    shape: str
    colour: str
    size: str

    @property
    def kind(self) -> tuple[str, str]:
        """Colour and shape, which are unique within a scene."""
        return self.colour, self.shape


@dataclass(frozen=True)
class Scene:
    """Two or three things in order, on a background."""

    things: tuple[Thing, ...]
    layout: str
    background: str


@dataclass(frozen=True)
class Claim:
    """Meaning of a caption. `sizes[i]` None: size not mentioned; `layout` None: "between", in a row or column."""

    kinds: tuple[tuple[str, str], ...]
    sizes: tuple[str | None, ...]
    layout: str | None
    background: str | None

    def describes(self, scene: Scene) -> bool:
        """Return whether the claim is true of `scene`, which may have more things than are mentioned."""
        place = {thing.kind: i for i, thing in enumerate(scene.things)}
        if any(kind not in place for kind in self.kinds):
            return False
        places = [place[kind] for kind in self.kinds]
        for where, size in zip(places, self.sizes, strict=True):
            if size is not None and scene.things[where].size != size:
                return False
        if self.background is not None and scene.background != self.background:
            return False
        rising = places == sorted(places)
        if self.layout is None:
            return rising or places == sorted(places, reverse=True)
        return rising and scene.layout == self.layout


def full_claim(scene: Scene) -> Claim:
    """Return the most detailed claim of a scene."""
    kinds, sizes = tuple(thing.kind for thing in scene.things), tuple(thing.size for thing in scene.things)
    return Claim(kinds, sizes, scene.layout, scene.background)


class SceneIndex:
    """Index of scenes by pairs of kinds, to find the scenes that a claim describes without a full scan."""

    def __init__(self, scenes: Sequence[Scene] = ()) -> None:
        self._by_pair: dict[frozenset, list[Scene]] = defaultdict(list)
        for scene in scenes:
            self.add(scene)

    def add(self, scene: Scene) -> None:
        """Add one scene."""
        for pair in _kind_pairs(scene):
            self._by_pair[pair].append(scene)

    def described_by(self, claim: Claim) -> list[Scene]:
        """Return the scenes that `claim` (of at least two kinds) describes."""
        return [scene for scene in self._by_pair.get(frozenset(claim.kinds[:2]), ()) if claim.describes(scene)]

    def describing(self, scene: Scene) -> bool:
        """Return whether the full claim of an indexed scene is true of `scene`, or vice versa."""
        met = {other for pair in _kind_pairs(scene) for other in self._by_pair.get(pair, ())}
        claim = full_claim(scene)
        return any(full_claim(other).describes(scene) or claim.describes(other) for other in met)


def _kind_pairs(scene: Scene) -> Iterator[frozenset]:
    return (frozenset(pair) for pair in combinations([thing.kind for thing in scene.things], 2))


def sample_scenes(counts: dict[str, int], *, seed: int) -> dict[str, list[Scene]]:
    """Return the scenes of each split; no full claim of one scene is true of another, in any split."""
    rng = np.random.default_rng([seed, 0])
    kinds = [(colour, shape) for colour in COLOURS for shape in SHAPES]
    seen = SceneIndex()
    splits: dict[str, list[Scene]] = {}
    for split, count in counts.items():
        splits[split] = []
        misses = 0
        while len(splits[split]) < count:
            n_things = 2 if rng.random() < 0.4 else 3
            chosen = rng.choice(len(kinds), size=n_things, replace=False)
            sizes = rng.choice(list(SIZES), size=n_things)
            things = tuple(
                Thing(shape=kinds[kind][1], colour=kinds[kind][0], size=str(size))
                for kind, size in zip(chosen, sizes, strict=True)
            )
            scene = Scene(things, str(rng.choice(LAYOUTS)), str(rng.choice(BACKGROUNDS)))
            if seen.describing(scene):
                misses += 1
                if misses > 200 + 20 * count:
                    raise UserError(
                        f"there are not {sum(counts.values())} different scenes: draw fewer (scenes_pictures)"
                    )
            else:
                seen.add(scene)
                splits[split].append(scene)
    return splits


def caption_scene(scene: Scene, others: SceneIndex, rng: np.random.Generator) -> tuple[list[str], list[Claim]]:
    """Return five captions of `scene` and their claims; each describes no other scene of `others`."""
    captions: list[str] = []
    claims: list[Claim] = []
    attempts = 0
    while len(captions) < CAPTIONS_PER_SCENE:
        attempts += 1
        everything = attempts > 20  # short captions are ambiguous: mention everything
        between = len(scene.things) == 3 and not everything and rng.random() < 0.25
        templates = BETWEEN if between else TEMPLATES[scene.layout, len(scene.things)]
        told = [everything or rng.random() < 0.5 for _ in scene.things]
        claim = Claim(
            kinds=tuple(thing.kind for thing in scene.things),
            sizes=tuple(thing.size if tell else None for thing, tell in zip(scene.things, told, strict=True)),
            layout=None if between else scene.layout,
            background=scene.background if everything or rng.random() < 0.4 else None,
        )
        caption = _in_words(claim, str(rng.choice(templates)), rng)
        if caption not in captions and others.described_by(claim) == [scene]:
            captions.append(caption)
            claims.append(claim)
    return captions, claims


def _in_words(claim: Claim, template: str, rng: np.random.Generator) -> str:
    names = {}
    for letter, (colour, shape), size in zip("abc", claim.kinds, claim.sizes, strict=False):
        words = [colour, shape] if size is None else [str(rng.choice(SIZES[size])), colour, shape]
        names[letter] = f"{'an' if words[0] == 'orange' else 'a'} {' '.join(words)}"
    caption = template.format(**names)
    if claim.background is not None:
        caption = str(rng.choice(ON_BACKGROUND)).format(caption=caption, background=claim.background)
    return caption[0].upper() + caption[1:] + "."


def scenes_vocabulary() -> list[str]:
    """Return the WordPiece vocabulary of the demo: special tokens, words of the grammar, letters and digits."""
    texts = [text for group in TEMPLATES.values() for text in group] + list(BETWEEN) + list(ON_BACKGROUND)
    fields = {"{a}", "{b}", "{c}", "{caption}", "{background}"}
    words = {word for text in texts for word in text.replace(",", " ").split() if word not in fields}
    words |= {*SHAPES, *COLOURS, *BACKGROUNDS, "a", "an", *(word for group in SIZES.values() for word in group)}
    characters = sorted("abcdefghijklmnopqrstuvwxyz0123456789")
    pieces = [*characters, *(f"##{character}" for character in characters), *"""!"#$%&'()*+,-./:;<=>?@[]^_`{|}~"""]
    return ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *sorted(words - set(pieces)), *pieces]
