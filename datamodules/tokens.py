"""Tokenise all captions once; a training step pads slices of one array."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm
from transformers import AutoTokenizer, BertTokenizerFast, PreTrainedTokenizerBase  # type: ignore[attr-defined]  # loaded on demand

from datamodules.scenes import scenes_vocabulary
from hacan.errors import UserError

_AT_ONCE = 10_000  # captions per tokenizer call; bounds its memory


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """Return the tokenizer of a hub name, a folder, a vocab.txt, or of the embedded demo (`scenes`)."""
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
        tokenizer = AutoTokenizer.from_pretrained(str(path) if path.is_dir() else name, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError) as error:  # raised by transformers for missing and damaged files
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
        raise UserError(f"{path} is not a WordPiece vocabulary (one token per line): it lacks {', '.join(missing)}")
    return BertTokenizerFast(vocab={word: i for i, word in enumerate(words)}, do_lower_case=True)


@dataclass(frozen=True)
class TokenTable:
    """The tokens of M captions, concatenated: caption j is `ids[offsets[j]:offsets[j + 1]]`."""

    ids: np.ndarray  # [L] int32
    offsets: np.ndarray  # [M + 1] int64
    padding_id: int

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, caption: int) -> np.ndarray:
        """Return the tokens of a caption, [W_j] int32, including [CLS] and [SEP]."""
        return self.ids[self.offsets[caption] : self.offsets[caption + 1]]

    @property
    def lengths(self) -> np.ndarray:
        """Number of tokens of each caption, [M] int64."""
        return np.diff(self.offsets)


def tokenise(
    captions: Sequence[str], tokenizer: PreTrainedTokenizerBase, *, max_text_len: int, progress: bool = False
) -> TokenTable:
    """Return the tokens of all captions; longer ones are truncated before [SEP], an empty one is [CLS] [SEP]."""
    parts: list[np.ndarray] = [np.zeros(0, np.int32)]
    lengths = np.zeros(len(captions) + 1, np.int64)
    starts = range(0, len(captions), _AT_ONCE)
    for start in tqdm(starts, desc="tokenising", unit_scale=_AT_ONCE, disable=not progress or len(starts) < 5):
        # the tokenizer rejects lone surrogates, which JSON can contain
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
