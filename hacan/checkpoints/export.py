"""A checkpoint becomes a folder to share: safetensors, config, tokenizer files, and a model card with its receipt."""

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file

from hacan.alignment import form_of, hyperparameters_of
from hacan.checkpoints.checkpoint import Checkpoint, open_checkpoint
from hacan.checkpoints.description import CONFIG_FILE, WEIGHTS_FILE
from hacan.checkpoints.onnx_export import OnnxFile, export_onnx
from hacan.checkpoints.saving import file_hash
from hacan.errors import UserError
from hacan.retrieval.provenance import hash_of_tensors
from hacan.settings import ModelSettings

# What inference must know beside the model's own settings. Folders of the training machine stay there.
KEPT = (*ModelSettings.__dataclass_fields__, "image_size", "max_text_len", "datasets")
METRICS_FILE, CARD = "metrics.json", "README.md"


def export(checkpoint: str | Path, folder: str | Path, *, onnx: bool = False, trust: bool = False) -> list[Path]:
    """Write `checkpoint` to `folder`, which `hacan.load_pretrained` reads; returns the files."""
    checkpoint, folder = Path(checkpoint), Path(folder)
    found = open_checkpoint(checkpoint, trust=trust)
    if found.description is None:
        raise UserError(
            f"{checkpoint} is a {found.kind} checkpoint, without settings and tokenizer: only a checkpoint that a "
            "training of this program wrote can be exported"
        )
    partial = folder / f".partial-{os.getpid()}"
    try:
        partial.mkdir(parents=True, exist_ok=True)
        names = _write(found, partial, checkpoint=checkpoint, onnx=onnx)
        for name in names:  # only what is whole takes the place of what was there
            os.replace(partial / name, folder / name)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise UserError(
            f"cannot write to {folder}: {reason}; what was there is kept, free space or give another"
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return [folder / name for name in names]


def _write(found: Checkpoint, folder: Path, *, checkpoint: Path, onnx: bool) -> list[str]:
    """Write every file of the export to `folder`; their names."""
    state = {name: value.contiguous() for name, value in found.model.state_dict().items()}
    save_file(state, folder / WEIGHTS_FILE, metadata={"format": "pt"})
    # safetensors makes files that only their owner may read; an export is to be shared, as the umask allows
    (folder / WEIGHTS_FILE).chmod((folder.stat().st_mode & 0o777) & 0o666)
    tokenizer = {Path(name).name: text for name, text in found.description["tokenizer"].items()}
    for name, text in tokenizer.items():
        (folder / name).write_text(text, encoding="utf-8")
    config = _shareable(found.description)
    (folder / CONFIG_FILE).write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    metrics = _metrics_beside(checkpoint)
    if metrics is not None:
        (folder / METRICS_FILE).write_text(json.dumps(metrics, indent=1) + "\n", encoding="utf-8")
    settings = config["settings"]
    exported = []
    if onnx:
        exported = export_onnx(
            found.model, folder, image_size=settings["image_size"], max_text_len=settings["max_text_len"]
        )
    source = f"{checkpoint.name}, SHA-256 `{file_hash(checkpoint)}`" if checkpoint.is_file() else checkpoint.name
    weights_hash = hash_of_tensors(found.model.state_dict())
    parameters = sum(parameter.numel() for parameter in found.model.parameters())
    card = _card(settings, parameters, source, _receipt(metrics, weights_hash), exported)
    (folder / CARD).write_text(card, encoding="utf-8")
    names = [WEIGHTS_FILE, CONFIG_FILE, *tokenizer, CARD, *([METRICS_FILE] if metrics is not None else [])]
    return [*names, *(file.path.name for file in exported)]


def _shareable(description: Mapping[str, Any]) -> dict[str, Any]:
    """The description without the tokenizer's files, which lie beside it, and without paths of the training machine."""
    settings = {key: description["settings"][key] for key in KEPT}
    for key in ("image_encoder", "image_weights", "text_encoder", "text_weights"):
        if Path(settings[key]).is_absolute() or Path(settings[key]).exists() or settings[key].startswith("."):
            settings[key] = Path(settings[key]).name
    return {
        "format": description["format"],
        "settings": settings,
        "text_config": {key: value for key, value in description["text_config"].items() if key != "_name_or_path"},
        "tokenizer_files": list(description["tokenizer"]),
    }


def _metrics_beside(checkpoint: Path) -> dict[str, Any] | None:
    """The metrics.json of the checkpoint's folder, or of the run's folder above it."""
    for folder in (checkpoint.parent, checkpoint.parent.parent):
        file = folder / METRICS_FILE
        if file.is_file():
            try:
                return json.loads(file.read_text(encoding="utf-8"))
            except ValueError as error:
                raise UserError(f"{file} is broken ({error}): repeat the evaluation, or remove it") from error
    return None


def _receipt(metrics: Mapping[str, Any] | None, weights_hash: str) -> str:
    """The evaluation as Markdown: the figures, what they were measured on, and whether it was of these weights."""
    if metrics is None:
        return f"No {METRICS_FILE} lay beside the checkpoint: not evaluated."
    try:
        receipt, rows = metrics["receipt"], {stage: metrics[stage] for stage in ("coarse", "hierarchical")}
        cells = [f"r{k}_{direction}" for direction in ("i2t", "t2i") for k in (1, 5, 10)]
        lines = [
            "| stage | i2t R@1 | R@5 | R@10 | t2i R@1 | R@5 | R@10 | Rsum |",
            "|---|---|---|---|---|---|---|---|",
            *(
                f"| {stage} | {' | '.join(f'{row[cell]:.1f}' for cell in cells)} | {row['rsum']:.1f} |"
                for stage, row in rows.items()
            ),
        ]
        own = any(member["hash"] == weights_hash for member in receipt["members"])
        whose = (
            "The receipt's hash is that of these weights."
            if own and not receipt["ensemble"]
            else "**The receipt names other weights than these** (by their hash): evaluate these before quoting it."
        )
        return "\n".join(
            [
                f"{receipt['dataset']} {receipt['split']}, {receipt['protocol']}: {receipt['images']:,} images, "
                f"{receipt['texts']:,} texts; shortlist K = {receipt['top_k']}, coarse score: {receipt['coarse']}.",
                "",
                *lines,
                "",
                f"{whose} Ties: {receipt['tie_rule']}. Misses: {receipt['miss_rule']}. All of it: `{METRICS_FILE}`.",
            ]
        )
    except (KeyError, TypeError) as error:
        raise UserError(f"{METRICS_FILE} beside the checkpoint is not one of ours: it lacks {error}") from error


def _card(settings: Mapping[str, Any], parameters: int, source: str, receipt: str, exported: list[OnnxFile]) -> str:
    """The model card."""
    onnx = "".join(
        f"- `{file.path.name}`: ONNX; largest relative difference to PyTorch in onnxruntime {file.difference:.1e}\n"
        for file in exported
    )
    arguments = f" with {settings['image_encoder_args']}" if settings["image_encoder_args"] else ""
    form = form_of(settings["alignment"])
    scoring = ", ".join(f"{key} `{settings[key]}`" for key in hyperparameters_of(form) if key in settings)
    return f"""# HACAN for image-text retrieval

Hybrid attention-driven cross-layer alignment: pictures and captions in, one score a pair out.

- image encoder: `{settings["image_encoder"]}`{arguments} (started from
  `{settings["image_weights"]}`), pictures of {settings["image_size"]} x {settings["image_size"]} pixels
- text encoder: `{settings["text_encoder"]}` (started from `{settings["text_weights"]}`), captions of at most
  {settings["max_text_len"]} tokens
- joint width {settings["embed_dim"]}, {parameters:,} parameters
- alignment `{settings["alignment"]}`{f": {scoring}" if scoring else ""}
- trained on: `{settings["datasets"]}`
- exported from: {source}
{onnx}
## Results

{receipt}

## Use

```python
import hacan

model = hacan.load_pretrained("THIS_FOLDER")
images = model.encode_images(["cat.jpg", "dog.jpg"])
texts = model.encode_texts(["a sleeping cat", "a dog on a beach"])
print(model.score(images, texts))  # rows are images, columns texts; higher is more alike
```
"""
