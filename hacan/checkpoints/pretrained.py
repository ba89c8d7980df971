"""A trained model for inference, and its folder: load, save, export, and exchange with the Hugging Face hub.

The folder holds safetensors weights, config.json, the tokenizer's files and a model card. The three methods that people
expect (`from_pretrained`, `save_pretrained`, `push_to_hub`) call huggingface_hub's API. Its `PyTorchModelHubMixin` is
not used: it saves one nn.Module with one config, deletes config.json before it writes, and has no place for a
tokenizer.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import jinja2
import numpy as np
import torch
from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import pad
from transformers import PreTrainedTokenizerBase

from hacan.alignment import form_of, hyperparameters_of
from hacan.checkpoints.checkpoint import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    file_hash,
    tokenizer_files,
    tokenizer_from_description,
)
from hacan.checkpoints.loading import Checkpoint, open_checkpoint
from hacan.errors import UserError
from hacan.images.io import read_image
from hacan.images.preprocessing import preprocess_image, uses_centre_crop
from hacan.models.hacan import HACAN
from hacan.models.weights import check_hub
from hacan.retrieval.provenance import hash_of_tensors
from hacan.settings import ModelSettings
from hacan.types import EncodedImages, EncodedTexts

# Settings that inference needs; the others, such as folders of the training machine, are not exported.
EXPORTED_SETTINGS = (*ModelSettings.__dataclass_fields__, "image_size", "max_text_len", "datasets")
METRICS_FILE, CARD_FILE = "metrics.json", "README.md"
TEMPLATES = jinja2.Environment(
    loader=jinja2.PackageLoader("hacan.checkpoints"), undefined=jinja2.StrictUndefined, keep_trailing_newline=True
)  # Markdown: nothing to escape


WriteOnnx = Callable[["Pretrained", Path], Iterable[tuple[Path, float]]]


class Pretrained:
    """A model with its tokenizer and image preprocessing, in evaluation mode.

    >>> model = hacan.load_pretrained("exported")
    >>> images = model.encode_images(["cat.jpg", "dog.jpg"])
    >>> texts = model.encode_texts(["a sleeping cat", "a dog on a beach", "two trains"])
    >>> model.score(images, texts)  # [2, 3]: rows are images, columns are texts
    """

    def __init__(
        self,
        *,
        model: HACAN,
        tokenizer: PreTrainedTokenizerBase,
        image_size: int,
        centre_crop: bool,
        max_text_len: int,
        device: torch.device | str = "cpu",
        description: Mapping[str, Any] | None = None,
        source: Path | None = None,
    ) -> None:
        """description: what `describe_model` returned for this model; `save_pretrained` needs it.

        source: the checkpoint or folder of the model; its metrics.json is saved with the model and quoted in the card.
        """
        self.model = model.eval().to(device)
        self.tokenizer = tokenizer
        self.image_size = image_size
        self.centre_crop = centre_crop
        self.max_text_len = max_text_len
        self.device = torch.device(device)
        self.description = description
        self.source = source

    # -- loading and saving -------------------------------------------------------------------------------------------

    @classmethod
    def load(cls, path: str | Path, *, device: torch.device | str = "cpu") -> Self:
        """Return the model of an exported folder or of a training's checkpoint."""
        return cls._of_checkpoint(open_checkpoint(path), path=path, device=device)

    @classmethod
    def _of_checkpoint(cls, checkpoint: Checkpoint, *, path: str | Path, device: torch.device | str = "cpu") -> Self:
        if checkpoint.description is None:
            raise UserError(
                f"{path} is a {checkpoint.kind} checkpoint, which holds no tokenizer and no settings: evaluate it with "
                "run.py, or give a checkpoint of a training, or a folder that scripts/export.py wrote"
            )
        settings = checkpoint.description["settings"]
        return cls(
            model=checkpoint.model,
            tokenizer=tokenizer_from_description(checkpoint.description),
            image_size=settings["image_size"],
            centre_crop=uses_centre_crop(settings["datasets"]),
            max_text_len=settings["max_text_len"],
            device=device,
            description=checkpoint.description,
            source=Path(path),
        )

    @classmethod
    def from_pretrained(
        cls, name: str | Path, *, device: torch.device | str = "cpu", revision: str | None = None, **download: Any
    ) -> Self:
        """Return the model of a local folder or checkpoint, or of a repository of the Hugging Face hub.

        download: further arguments of `huggingface_hub.snapshot_download`, such as cache_dir, token, local_files_only.
        """
        if Path(name).exists():
            return cls.load(name, device=device)
        check_hub(str(name))
        try:
            folder = snapshot_download(str(name), revision=revision, **download)
        except (OSError, HfHubHTTPError, HFValidationError) as error:
            reason = " ".join(str(error).split())[:200]
            raise UserError(
                f"{name} is neither a file nor a folder here, and the Hugging Face hub did not provide it ({reason}): "
                "give a folder that scripts/export.py wrote, a checkpoint, or the name of a hub repository"
            ) from error
        return cls.load(folder, device=device)

    def save_pretrained(self, folder: str | Path) -> list[Path]:
        """Write the model's folder, as scripts/export.py does; return its files. Files already there are replaced."""
        return _write_folder(self, Path(folder), source="`save_pretrained`")

    def push_to_hub(
        self,
        repo_id: str,
        *,
        token: str | None = None,
        private: bool | None = None,
        revision: str | None = None,
        commit_message: str = "Upload HACAN",
    ) -> str:
        """Upload the model's folder to a hub repository, which is created if needed; return the URL of the commit."""
        api = HfApi(token=token)
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            repository = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
            return api.upload_folder(
                repo_id=repository, folder_path=folder, revision=revision, commit_message=commit_message
            ).commit_url

    # -- inference ----------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def encode_images(self, images: Sequence[str | Path | np.ndarray], *, batch_size: int = 32) -> EncodedImages:
        """Return the features of N image files or uint8 [H, W, 3] RGB arrays."""
        _check_sequence(images, "images", (str, Path, np.ndarray))
        parts = []
        for start in range(0, len(images), batch_size):
            pixels = torch.stack([self._pixels(image) for image in images[start : start + batch_size]])
            parts.append(self.model.encode_images(pixels.to(self.device)))
        return EncodedImages(*(torch.cat(values) for values in zip(*parts, strict=True)))

    @torch.inference_mode()
    def encode_texts(self, captions: Sequence[str], *, batch_size: int = 256) -> EncodedTexts:
        """Return the features of M captions, padded to the longest; captions are cut to `max_text_len` tokens."""
        _check_sequence(captions, "captions", (str,))
        parts = [self._encode_batch(list(captions[at : at + batch_size])) for at in range(0, len(captions), batch_size)]
        width = max(part.mask.shape[1] for part in parts)
        return EncodedTexts(
            high=torch.cat([pad(part.high, (0, 0, 0, width - part.high.shape[1])) for part in parts]),
            mid=torch.cat([pad(part.mid, (0, 0, 0, width - part.mid.shape[1])) for part in parts]),
            mask=torch.cat([pad(part.mask, (0, width - part.mask.shape[1])) for part in parts]),
            pooled=torch.cat([part.pooled for part in parts]),
        )

    @torch.inference_mode()
    def score(self, images: EncodedImages, texts: EncodedTexts) -> Tensor:
        """Return the fine similarity of all pairs, [N, M] float32."""
        return self.model.score(images, texts)

    @torch.inference_mode()
    def global_similarity(self, images: EncodedImages, texts: EncodedTexts) -> Tensor:
        """Return the cosine of the global embeddings of all pairs, [N, M] float32: the coarse score."""
        return self.model.global_similarity(images, texts)

    def _pixels(self, image: str | Path | np.ndarray) -> Tensor:
        array = image if isinstance(image, np.ndarray) else read_image(image)
        return preprocess_image(array, image_size=self.image_size, centre_crop=self.centre_crop)

    def _encode_batch(self, captions: list[str]) -> EncodedTexts:
        # Tokenizers reject lone surrogates, which JSON can hold.
        valid = [caption.encode("utf-8", "replace").decode("utf-8") for caption in captions]
        encoded = self.tokenizer(
            valid, truncation=True, max_length=self.max_text_len, padding=True, return_tensors="pt"
        ).to(self.device)
        return self.model.encode_texts(encoded["input_ids"], encoded["attention_mask"].bool())


def _check_sequence(items: Sequence, name: str, kinds: tuple[type, ...]) -> None:
    if isinstance(items, (str, Path, np.ndarray)) or len(items) == 0:
        found = "an empty list" if not isinstance(items, (str, Path, np.ndarray)) else f"one {type(items).__name__}"
        raise ValueError(f"{name} is {found}, expected a list of at least one: [...]")
    for place, item in enumerate(items):
        if not isinstance(item, kinds):
            expected = " or ".join(kind.__name__ for kind in kinds)
            raise ValueError(f"{name}[{place}] is {item!r:.40} of type {type(item).__name__}, expected {expected}")


# -- the folder -------------------------------------------------------------------------------------------------------


def export(
    checkpoint: str | Path, folder: str | Path, *, write_onnx: WriteOnnx | None = None, trust: bool = False
) -> list[Path]:
    """Write a training's checkpoint as a folder for `hacan.load_pretrained`; return its files.

    The card quotes the metrics.json beside the checkpoint, in the folder above it, or in an exported folder.
    write_onnx(model, folder) writes ONNX files too, and returns their paths and differences to PyTorch.
    """
    checkpoint = Path(checkpoint)
    pretrained = Pretrained._of_checkpoint(open_checkpoint(checkpoint, trust=trust), path=checkpoint)
    source = f"{checkpoint.name}, SHA-256 `{file_hash(checkpoint)}`" if checkpoint.is_file() else checkpoint.name
    return _write_folder(pretrained, Path(folder), source=source, write_onnx=write_onnx)


def _write_folder(
    pretrained: Pretrained, folder: Path, *, source: str, write_onnx: WriteOnnx | None = None
) -> list[Path]:
    """Write all files to a temporary folder, then move them: a failure leaves what was there."""
    if pretrained.description is None:
        raise ValueError("the model has no description; load it from a checkpoint or a folder, then save it")
    metrics = _metrics_of(pretrained.source)
    partial = folder / f".partial-{os.getpid()}"
    try:
        partial.mkdir(parents=True, exist_ok=True)
        names = _write_files(pretrained, partial, source=source, metrics=metrics, write_onnx=write_onnx)
        for name in names:
            os.replace(partial / name, folder / name)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise UserError(
            f"cannot write to {folder}: {reason}; what was there is kept, free space or give another"
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return [folder / name for name in names]


def _write_files(
    pretrained: Pretrained,
    folder: Path,
    *,
    source: str,
    metrics: dict[str, Any] | None,
    write_onnx: WriteOnnx | None,
) -> list[str]:
    model, description = pretrained.model, pretrained.description or {}
    state = {name: value.contiguous() for name, value in model.state_dict().items()}
    save_file(state, folder / WEIGHTS_FILE, metadata={"format": "pt"})
    (folder / WEIGHTS_FILE).chmod((folder.stat().st_mode & 0o777) & 0o666)  # save_file ignores the umask
    tokenizer = tokenizer_files(description["tokenizer"])
    for name, text in tokenizer.items():
        (folder / name).write_text(text, encoding="utf-8")
    config = _exported_config(description)
    (folder / CONFIG_FILE).write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    if metrics is not None:
        (folder / METRICS_FILE).write_text(json.dumps(metrics, indent=1) + "\n", encoding="utf-8")
    onnx_files = [] if write_onnx is None else list(write_onnx(pretrained, folder))
    card = _model_card(model, config["settings"], source=source, metrics=metrics, onnx_files=onnx_files)
    (folder / CARD_FILE).write_text(card, encoding="utf-8")
    names = [WEIGHTS_FILE, CONFIG_FILE, *tokenizer, CARD_FILE, *([METRICS_FILE] if metrics is not None else [])]
    return [*names, *(path.name for path, _ in onnx_files)]


def _exported_config(description: Mapping[str, Any]) -> dict[str, Any]:
    """Return the description without the contents of tokenizer files and without paths of the training machine."""
    settings = {key: description["settings"][key] for key in EXPORTED_SETTINGS if key in description["settings"]}
    for key in ("image_encoder", "image_weights", "text_encoder", "text_weights"):
        if Path(settings[key]).is_absolute() or Path(settings[key]).exists() or settings[key].startswith("."):
            settings[key] = Path(settings[key]).name
    return {
        "format": description["format"],
        "settings": settings,
        "text_config": {key: value for key, value in description["text_config"].items() if key != "_name_or_path"},
        "tokenizer_files": list(tokenizer_files(description["tokenizer"])),
    }


def _metrics_of(source: Path | None) -> dict[str, Any] | None:
    """Return the metrics.json of an exported folder, or in a checkpoint's folder or the folder above, or None."""
    if source is None:
        return None
    for folder in (source,) if source.is_dir() else (source.parent, source.parent.parent):
        file = folder / METRICS_FILE
        if file.is_file():
            try:
                return json.loads(file.read_text(encoding="utf-8"))
            except ValueError as error:
                raise UserError(f"{file} is broken ({error}): repeat the evaluation, or remove it") from error
    return None


def _model_card(
    model: HACAN,
    settings: Mapping[str, Any],
    *,
    source: str,
    metrics: Mapping[str, Any] | None,
    onnx_files: Sequence[tuple[Path, float]],
) -> str:
    try:
        record = {} if metrics is None else metrics["receipt"]
        weights_hash = hash_of_tensors(model.state_dict())
        members = [] if metrics is None else record["members"]
        return TEMPLATES.get_template("model_card.md.jinja").render(
            settings=settings,
            parameters=sum(parameter.numel() for parameter in model.parameters()),
            hyperparameters={
                key: settings[key] for key in hyperparameters_of(form_of(settings["alignment"])) if key in settings
            },
            source=source,
            onnx_files=onnx_files,
            metrics=metrics,
            record=record,
            same_weights=metrics is not None
            and not record["ensemble"]
            and any(member["hash"] == weights_hash for member in members),
        )
    except (KeyError, TypeError, jinja2.UndefinedError) as error:
        raise UserError(f"{METRICS_FILE} beside the checkpoint is not of this program: {error}") from error
