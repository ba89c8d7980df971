"""The models that a run begins with: those of its checkpoints, or a new one (METHOD section 5)."""

import dataclasses
from collections.abc import Callable
from functools import partial

import torch
from transformers import PreTrainedTokenizerBase

from hacan.checkpoints.checkpoint import Checkpoint, open_checkpoint
from hacan.checkpoints.description import tokenizer_from_description
from hacan.errors import UserError
from hacan.models.factory import build_model
from hacan.models.hacan import HACAN
from hacan.models.text_encoder import check_vocabulary
from hacan.settings import Settings

MODEL_DATA_KEYS = ("image_size", "max_text_len")  # data settings that belong to the model, and travel in its checkpoint


def open_models(
    settings: Settings, load_tokenizer: Callable[[str], PreTrainedTokenizerBase]
) -> tuple[list[HACAN], PreTrainedTokenizerBase, Settings]:
    """The models of `checkpoint`, or a new one; their tokenizer; and the settings, the model's part as it was trained.

    A checkpoint of ours knows its architecture, alignment, tokenizer, image_size and max_text_len: those hold, whatever
    the config says, because other values would evaluate another model. An ensemble's members must agree on the last
    three, since they are shown the same pixels and tokens.
    """
    torch.manual_seed(settings.run.seed)  # of new weights: Sacred seeds torch only where it was imported before
    if not settings.run.checkpoint:
        tokenizer = load_tokenizer(settings.data.tokenizer)
        model = build_model(
            settings.model,
            image_size=settings.data.image_size,
            score_memory=settings.eval.score_memory,
            tokenizer=tokenizer,
            trust=settings.run.trust_checkpoint,
        )
        return [model], tokenizer, settings
    opened = [
        open_checkpoint(
            path,
            trust=settings.run.trust_checkpoint,
            settings=settings.model,
            image_size=settings.data.image_size,
            score_memory=settings.eval.score_memory,
            load_tokenizer=partial(load_tokenizer, settings.data.tokenizer),
        )
        for path in settings.run.checkpoint
    ]
    models = [checkpoint.model for checkpoint in opened]
    first = next((checkpoint for checkpoint in opened if checkpoint.description is not None), opened[0])
    settings = dataclasses.replace(settings, model=first.settings)
    if first.description is None:
        tokenizer = load_tokenizer(settings.data.tokenizer)
        for path, model in zip(settings.run.checkpoint, models, strict=True):
            check_vocabulary(tokenizer, model.text_encoder.backbone, name=path)
        return models, tokenizer, settings
    _check_ensemble(settings.run.checkpoint, opened)
    kept = {key: first.description["settings"][key] for key in MODEL_DATA_KEYS}
    settings = dataclasses.replace(settings, data=dataclasses.replace(settings.data, **kept))
    return models, tokenizer_from_description(first.description), settings


def _check_ensemble(paths: tuple[str, ...], opened: list[Checkpoint]) -> None:
    """Members of an ensemble must have been trained on the same kind of pixels and tokens."""
    for key in (*MODEL_DATA_KEYS, "tokenizer"):
        found = {}
        for path, checkpoint in zip(paths, opened, strict=True):
            if checkpoint.description is not None:
                kept = checkpoint.description
                found[path] = str(kept["tokenizer"] if key == "tokenizer" else kept["settings"][key])
        if len(set(found.values())) > 1:
            values = ", ".join(f"{path}: {value[:40]}" for path, value in found.items())
            raise UserError(f"checkpoint: the members of the ensemble differ in {key} ({values}); evaluate them apart")
