"""The search index: images are encoded once and found by sentences or images, coarse to fine as in the evaluation.

Its address, a folder or a URI of an object storage, holds index.json (model, shapes), the tables of the vectors, and
one float16 file of fine features per item.
"""

import contextlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from torch import Tensor

from hacan.alignment import pack_texts
from hacan.checkpoints.pretrained import Pretrained
from hacan.errors import UserError
from hacan.lock import FolderLock
from hacan.retrieval.provenance import hash_of_tensors
from hacan.search.collection import Collection
from hacan.search.files import IndexFiles
from hacan.search.store import Hit, Item, VectorTable
from hacan.search.sync import Update, sync_folder, sync_texts
from hacan.types import EncodedImages, EncodedTexts

FORMAT = 2
FILE = "index.json"
PICTURES, TEXTS = "pictures", "texts"
SHORTLIST = 50  # K of METHOD section 6
MAX_SIZE = 100_000  # of a shape in index.json


class Result(NamedTuple):
    """One search result."""

    rank: int  # from 1
    id: str  # hash of its content
    name: str  # path of an image, or a text
    coarse: float  # cosine of the global embeddings
    fine: float | None  # fine similarity, by which results are ordered; None between two images


class Index:
    """Images and texts, searchable with one model. Use `create` or `open`.

    Other processes can search while one updates: a search sees the index as it is at that moment.
    """

    def __init__(self, files: IndexFiles, about: dict[str, Any], pretrained: Pretrained, *, new: bool = False) -> None:
        self.address, self.about, self.pretrained, self._files = files.address, about, pretrained, files
        high, mid, width = about["shapes"]["high"], about["shapes"]["mid"], about["shapes"]["width"]
        words = about["max_text_len"]
        self.collections = {
            kind: Collection(
                VectorTable(self.address, kind, width=width if new else None),
                files,
                high=(of_high, width),
                mid=(of_mid, width),
            )
            for kind, of_high, of_mid in ((PICTURES, high, mid), (TEXTS, words, words))
        }

    @classmethod
    def create(cls, address: str | Path, *, model: str | Path | Pretrained, device: torch.device | str = "cpu") -> Self:
        """Return a new, empty index in a folder, or below the URI of an object storage, s3://BUCKET/FOLDER."""
        files = IndexFiles(address)
        if cls.exists(address):
            raise UserError(f"{address} holds an index already: open it, or give another folder")
        if not files.is_empty():
            raise UserError(f"{address} exists and is not an index: give a new or an empty folder")
        pretrained = _loaded(model, device)
        mid, high = pretrained.model.region_grids(height=pretrained.image_size, width=pretrained.image_size)
        about = {
            "format": FORMAT,
            "model": "" if isinstance(model, Pretrained) else str(Path(model).resolve()),
            **_identity(pretrained),
            "shapes": {
                "high": high[0] * high[1],
                "mid": mid[0] * mid[1],
                "width": pretrained.model.project_image_high.out_features,
            },
        }
        index = cls(files, about, pretrained, new=True)
        files.write(FILE, (json.dumps(about, indent=1) + "\n").encode())
        return index

    @staticmethod
    def exists(address: str | Path) -> bool:
        """Return whether there is an index at the address."""
        try:
            IndexFiles(address).read(FILE)
        except FileNotFoundError:
            return False
        return True

    @classmethod
    def open(
        cls, address: str | Path, *, model: str | Path | Pretrained | None = None, device: torch.device | str = "cpu"
    ) -> Self:
        """Return an existing index with its model; give `model` if that has moved. Another model is a `UserError`."""
        files = IndexFiles(address)
        about = _read_about(files)
        source = model if model is not None else about["model"]
        if source == "":
            raise UserError(f"{address} does not know where its model is: give it, --model OUT_DIR_OR_CKPT")
        pretrained = _loaded(source, device)
        given = _identity(pretrained)
        if any(about[key] != value for key, value in given.items()):
            raise UserError(
                f"{address} was created with the model {about['model_hash'][:12]}, but {_name(source)} is "
                f"{given['model_hash'][:12]}: give the original model with --model, or index into a new folder"
            )
        return cls(files, about, pretrained)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        """Nothing is left open."""

    def count(self, kind: str = PICTURES) -> int:
        """Return the number of images, or of `texts`."""
        return self.collections[kind].table.count()

    def item(self, item: str, kind: str = PICTURES) -> Item | None:
        """Return the item of an id (payload `paths` of an image, `text` of a text), or None."""
        return self.collections[kind].table.item(item)

    def items(self, kind: str = PICTURES) -> list[Item]:
        """Return all items of a kind, by id."""
        return list(self.collections[kind].table.items())

    # ----------------------------------------------------------------------------------------------------- building

    def update(self, folder: str | Path, *, batch_size: int = 16, progress: bool = True) -> Update:
        """Make the index hold exactly the images below `folder`, and those of other folders.

        Known contents are not encoded again, also if the file was moved; unreadable files are listed. An interrupted
        update resumes after its last batch when it is called again.
        """
        with self._writing():
            return sync_folder(
                self.collections[PICTURES], self.pretrained, folder, batch_size=batch_size, progress=progress
            )

    def set_texts(self, texts: Sequence[str], *, batch_size: int = 64, progress: bool = True) -> Update:
        """Make the index hold exactly these texts; known ones are not encoded again."""
        with self._writing():
            return sync_texts(self.collections[TEXTS], self.pretrained, texts, batch_size=batch_size, progress=progress)

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """Lock a folder: one process changes it at a time. An object storage has no locks, and needs none.

        There, batches of several machines that index other folders of images are merged by LanceDB.
        """
        if self._files.remote:
            yield
            return
        with FolderLock(Path(self.address), remedy="wait until it has ended", wait=0):
            yield

    # ---------------------------------------------------------------------------------------------------- searching

    @torch.inference_mode()
    def search(
        self,
        text: str = "",
        *,
        image: str | Path | np.ndarray | None = None,
        find: str = "",
        top: int = 10,
        shortlist: int = SHORTLIST,
    ) -> list[Result]:
        """Search by a sentence or by an image (a file, or uint8 [H, W, 3] RGB).

        Rank all items by the coarse cosine, re-rank the best `shortlist` by the fine similarity (METHOD section 6).
        find: `texts` or `images`; by default images for a sentence, and for an image texts if there are any.
        """
        if bool(text.strip()) == (image is not None):
            raise UserError("give either a sentence or an image")
        if top < 1 or shortlist < 1:
            raise UserError(f"top={top}, shortlist={shortlist}: expected numbers from 1")
        find = find or (TEXTS if image is not None and self.count(TEXTS) else PICTURES)
        if find not in (PICTURES, TEXTS) or (find == TEXTS and image is None):
            raise UserError(f"find={find!r} with {'an image' if image is not None else 'a sentence'}: a sentence finds "
                            "images; an image finds texts or images")  # fmt: skip
        if find == TEXTS and not self.count(TEXTS):
            raise UserError(f"{self.address} holds no texts: add some with scripts/index.py --captions FILE.csv")
        if find == PICTURES and not self.count():
            raise UserError(f"{self.address} holds no images: add some with scripts/index.py FOLDER --index INDEX")
        query = self.pretrained.encode_texts([text]) if image is None else self.pretrained.encode_images([image])
        hits = self.shortlist(query.pooled[0], find, max(top, shortlist))
        if image is not None and find == PICTURES:
            return _results(hits, [None] * len(hits))[:top]
        fine = self.fine(query, hits).tolist()
        order = sorted(range(len(hits)), key=lambda place: -fine[place])  # stable: ties keep the coarse order
        return _results([hits[place] for place in order], [fine[place] for place in order])[:top]

    def shortlist(self, pooled: Tensor, find: str, k: int) -> list[Hit]:
        """Return the k items with the highest cosine to a global embedding [d]: the coarse stage."""
        return self.collections[find].table.nearest(pooled.float().cpu().numpy(), k)

    def features(self, item: str) -> EncodedImages:
        """Return the stored fine features of one image; the global embedding is zeros."""
        high, mid = self.collections[PICTURES].features([item], self.pretrained.device)
        return EncodedImages(high, mid, high.new_zeros(1, high.shape[-1]))

    @torch.inference_mode()
    def fine(self, query: EncodedImages | EncodedTexts, hits: Sequence[Hit]) -> Tensor:
        """Return the fine similarity [n] of one query and the items of a shortlist: the fine stage."""
        if not hits:
            return torch.empty(0)
        ids, device = [hit.id for hit in hits], self.pretrained.device
        of_texts = isinstance(query, EncodedImages)
        high, mid = self.collections[TEXTS if of_texts else PICTURES].features(ids, device)
        pooled = query.pooled.expand(len(ids), -1)  # not read by the fine stage
        each, one = torch.arange(len(ids)), torch.zeros(len(ids), dtype=torch.int64)
        if of_texts:
            lengths = torch.tensor([hit.payload["tokens"] for hit in hits], device=device)
            mask = torch.arange(high.shape[1], device=device) < lengths[:, None]
            texts = pack_texts(EncodedTexts(high, mid, mask, pooled))
            assert isinstance(query, EncodedImages)
            return self.pretrained.model.alignment.pairs(query, texts, torch.stack([one, each], 1)).cpu()
        assert isinstance(query, EncodedTexts)
        images = EncodedImages(high, mid, pooled)
        return self.pretrained.model.alignment.pairs(images, pack_texts(query), torch.stack([each, one], 1)).cpu()


def _results(hits: Sequence[Hit], fine: Sequence[float | None]) -> list[Result]:
    return [
        Result(
            rank, hit.id, hit.payload["text"] if "text" in hit.payload else hit.payload["paths"][0], hit.coarse, score
        )
        for rank, (hit, score) in enumerate(zip(hits, fine, strict=True), start=1)
    ]


def _read_about(files: IndexFiles) -> dict[str, Any]:
    """Return the validated content of index.json, which can be a stranger's."""
    try:
        about = json.loads(files.read(FILE))
    except (FileNotFoundError, ValueError) as error:
        raise UserError(
            f"{files.address} is not an index ({FILE}: {error}); create one with scripts/index.py"
        ) from error
    if not isinstance(about, dict) or about.get("format") != FORMAT:
        found = about.get("format") if isinstance(about, dict) else None
        made = "made by an earlier version, with another store" if found == 1 else f"of format {str(found)[:40]}"
        raise UserError(f"{files.address} is {made}; expected format {FORMAT}: index the images into a new folder")
    shapes = about.get("shapes")
    sizes = [shapes.get(key) for key in ("high", "mid", "width")] if isinstance(shapes, dict) else [None]
    if not all(type(size) is int and 0 < size <= MAX_SIZE for size in (*sizes, about.get("max_text_len"))):
        raise UserError(f"{files.address}/{FILE} is damaged: expected shapes and max_text_len from 1 to {MAX_SIZE}")
    if missing := {"model", "model_hash", "image_size", "centre_crop"} - about.keys():
        raise UserError(f"{files.address}/{FILE} is damaged: it lacks {min(missing)!r}; index into a new folder")
    return about


def _loaded(model: str | Path | Pretrained, device: torch.device | str) -> Pretrained:
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # a name, a backend, or a number
        raise UserError(
            f"device {str(device)!r} is not available here: give cpu, or cuda where there is a GPU"
        ) from error
    return model if isinstance(model, Pretrained) else Pretrained.load(model, device=device)


def _name(model: str | Path | Pretrained) -> str:
    return "the model given" if isinstance(model, Pretrained) else str(model)


def _identity(pretrained: Pretrained) -> dict[str, Any]:
    """Return what features depend on: the weights, and the preprocessing of images and texts."""
    return {
        "model_hash": hash_of_tensors(pretrained.model.state_dict()),
        "image_size": pretrained.image_size,
        "centre_crop": pretrained.centre_crop,
        "max_text_len": pretrained.max_text_len,
    }
