"""Captions to WordPiece tokens, once and for all: what each training step pads is a slice of one array."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm
from transformers import AutoTokenizer, BertTokenizerFast, PreTrainedTokenizerBase  # type: ignore[attr-defined]  # loaded on demand

from datamodules.scenes import scenes_vocabulary
from hacan.errors import UserError

_AT_ONCE = 10_000  # captions per call of the tokenizer: bounds its memory, which is a multiple of the tokens'


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a hub name, a folder, a vocab.txt, or of the embedded demo (`scenes`); WordPiece, lower case."""
    if name == "scenes":
        return BertTokenizerFast(vocab={word: i for i, word in enumerate(scenes_vocabulary())}, do_lower_case=True)
    path = Path(name).expanduser()
    if path.is_file():
        return _from_vocabulary(path)
    if path.is_dir():
        if not any((path / file).is_file() for file in ("tokenizer.json", "vocab.txt", "vocab.json")):
            raise UserError(f"tokenizer={name!r}: the folder has no tokenizer.json and no vocab.txt; add one of them")
        configured = (path / "tokenizer.json").is_file() or (path / "tokenizer_config.json").is_file()
        if not configured and (path / "vocab.txt").is_file():
            return _from_vocabulary(path / "vocab.txt")
    elif name.count("/") > 1 or name.startswith((".", "~", "/")) or name.endswith(".txt"):
        raise UserError(f"tokenizer={name!r}: there is no such file or folder")
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(path) if path.is_dir() else name)
    except (OSError, ValueError, KeyError, TypeError) as error:  # what transformers raises for absent and broken files
        where = "that folder" if path.is_dir() else "the Hugging Face hub and its cache on this machine"
        raise UserError(
            f"tokenizer={name!r} was looked for in {where} and could not be loaded ({_first_line(error)}); "
            "give the path of a folder that holds tokenizer.json or vocab.txt, tokenizer=PATH"
        ) from error
    if not tokenizer.is_fast:
        raise UserError(f"tokenizer={name!r} has no fast form (tokenizer.json); give a BERT-like one")
    if tokenizer.pad_token_id is None:
        raise UserError(f"tokenizer={name!r} has no padding token; give a BERT-like one")
    return tokenizer


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def _from_vocabulary(path: Path) -> PreTrainedTokenizerBase:
    try:
        words = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"the vocabulary {path} cannot be read: {error}") from error
    missing = [word for word in ("[PAD]", "[UNK]", "[CLS]", "[SEP]") if word not in words]
    if missing:
        raise UserError(f"{path} is no WordPiece vocabulary (one token a line): it lacks {', '.join(missing)}")
    return BertTokenizerFast(vocab={word: i for i, word in enumerate(words)}, do_lower_case=True)


@dataclass(frozen=True)
class TokenTable:
    """The tokens of M captions, one after the other: caption j owns `ids[offsets[j]:offsets[j + 1]]`."""

    ids: np.ndarray  # [L] int32
    offsets: np.ndarray  # [M + 1] int64
    padding_id: int

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, caption: int) -> np.ndarray:
        """The tokens of one caption, [W_j] int32, [CLS] and [SEP] included."""
        return self.ids[self.offsets[caption] : self.offsets[caption + 1]]

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each caption, [M] int64."""
        return np.diff(self.offsets)


def tokenise(
    captions: Sequence[str], tokenizer: PreTrainedTokenizerBase, *, max_text_len: int, progress: bool = False
) -> TokenTable:
    """All captions as tokens; those longer than `max_text_len` are cut before [SEP], an empty one is [CLS] [SEP]."""
    parts: list[np.ndarray] = [np.zeros(0, np.int32)]
    lengths = np.zeros(len(captions) + 1, np.int64)
    starts = range(0, len(captions), _AT_ONCE)
    for start in tqdm(starts, desc="tokenising", unit_scale=_AT_ONCE, disable=not progress or len(starts) < 5):
        # a lone half of an emoji, which JSON can hold, is no text to the tokenizer
        texts = [text.encode("utf-8", "replace").decode("utf-8") for text in captions[start : start + _AT_ONCE]]
        encoded = tokenizer(
            texts,
            truncation=True,
            max_length=max_text_len,
            padding=False,
            return_attention_mask=False,
            return_token_type_ids=False,
        )["input_ids"]
        lengths[start + 1 : start + 1 + len(encoded)] = [len(ids) for ids in encoded]
        parts.extend(np.asarray(ids, np.int32) for ids in encoded)
    return TokenTable(ids=np.concatenate(parts), offsets=np.cumsum(lengths), padding_id=int(tokenizer.pad_token_id))
