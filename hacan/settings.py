"""Validated, frozen settings of a flat config.

Defaults are in `config.py`, allowed values here. A wrong type, range or choice raises `UserError` with one line: the
key, the value and what was expected. Standard library only.
"""

import ast
import dataclasses
import difflib
import math
import os
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hacan.errors import UserError
from hacan.public_config import translate

DATASETS = ("f30k", "f8k", "coco", "captions", "scenes")
LOSSES = ("GCD", "GCD_release", "GCD_revised", "F_HN", "M_HN", "InfoNCE", "none")
STREAMS = ("ksf", "lrg_high", "lrg_mid")
PRECISIONS = ("32-true", "16-mixed", "bf16-mixed")
PATH_KEYS: tuple[str, ...] = (
    "data_root",
    "log_dir",
    "save_path",
    "resume_from",
    "image_weights",
    "text_encoder",
    "text_weights",
)
PATH_KEYS += ("tokenizer", "judged_matches")  # a leading ~ is the home folder
VAL_METRICS = ("rsum", "rsum_full", "release")


def _key(
    doc: str,
    *,
    choices: tuple = (),
    low: float = -math.inf,
    high: float = math.inf,
    above: bool = False,
    before: Any = dataclasses.MISSING,
) -> Any:
    """Return a field with its rules: one of `choices`, or a number in [low, high], or in (low, high] with `above`.

    before: of a key that was added later, the value for checkpoints that do not have it.
    """
    rule = {"doc": doc, "choices": choices, "low": low, "high": high, "above": above}
    return dataclasses.field(default=before, metadata=rule)


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """the run and its folders"""

    exp_name: str = _key("name of the run's folder below log_dir")
    seed: int = _key("seed of weights, data order and augmentation", low=0, high=2**32 - 1)
    log_dir: str = _key("folder of all runs: Sacred's records, logs, metrics")
    save_path: str = _key("folder of the checkpoints; empty: the run's own folder")
    test_only: bool = _key("evaluate `checkpoint` and train nothing")
    checkpoint: tuple[str, ...] = _key("weights to start from or to evaluate; several are an ensemble")
    trust_checkpoint: bool = _key("read checkpoints that are pickles of more than tensors, which can run code")
    resume_from: str = _key("checkpoint of an interrupted run to continue, or `last`")
    fast_dev_run: bool = _key("train and validate on two batches, as a test of the set-up")
    report: bool = _key("write report.html beside metrics.json")


@dataclass(frozen=True, kw_only=True)
class DataSettings:
    """images, captions and batches"""

    data_root: str = _key("folder that holds the data set's folder")
    datasets: str = _key("data set", choices=DATASETS)
    use_restval: bool = _key("COCO: train on the restval images too")
    captions_per_image: int = _key(
        "number of captions of an image that are used, the first ones; 0: all", low=0, before=0
    )
    coco_val_images: int = _key("COCO: images of the val split that are used, from the first; 0: all", low=0, before=0)
    drop_last: bool = _key("leave out the last batch of an epoch if it is smaller than batch_size", before=True)
    eval_split: str = _key("split that is evaluated at the end", choices=("train", "val", "test"))
    augmentation: bool = _key("random crop and flip in training; False: the crop of the evaluation", before=True)
    image_size: int = _key("side of the image encoder's square input, in pixels", low=32, high=2048)
    max_text_len: int = _key("largest number of tokens per caption, including [CLS] and [SEP]", low=3, high=512)
    tokenizer: str = _key("hub name, folder or vocab.txt; `scenes`: the vocabulary of the embedded demo")
    batch_size: int = _key("pairs per optimiser step, over all processes", low=1)
    per_gpu_batchsize: int = _key(
        "largest number of pairs per forward pass of a process; gradients accumulate up to batch_size", low=1
    )
    num_workers: int = _key("processes that decode images; 0: the training process", low=0, high=1024)
    on_bad_image: str = _key("unreadable image; skip: left out, and reported", choices=("error", "skip"))
    scenes_pictures: tuple[int, ...] = _key("embedded demo: number of images drawn for train, val and test")


@dataclass(frozen=True, kw_only=True)
class ModelSettings:
    """encoders, projections and the fine alignment"""

    image_encoder: str = _key("name of a timm backbone with two feature levels")
    image_weights: str = _key("`pretrained` (from timm's hub), `random`, or the path of a weights file")
    image_encoder_args: dict = _key("further arguments for timm.create_model")
    image_levels: tuple[int, ...] = _key("the mid and the high feature level, as timm counts them (-1: the last)")
    text_encoder: str = _key("hub name or folder of a BERT-like encoder; with text_weights=random a model type")
    text_weights: str = _key("`pretrained` (text_encoder's own), `random`, or the path of a weights file")
    text_encoder_args: dict = _key("with text_weights=random: arguments of the encoder's transformers config")
    text_levels: tuple[int, ...] = _key("the mid and the high entry of hidden_states (-1: the last layer)")
    embed_dim: int = _key("joint width d of regions, tokens and global embeddings", low=1)
    activation: str = _key("activation of the aggregators", choices=("leaky_relu", "tanh", "none"))
    alignment: str = _key("form of the fine similarity: hybrid, revised, or one registered in hacan/alignment")
    direction: str = _key("which side is the query", choices=("i2t", "t2i", "both"))
    lambda_softmax: float = _key("inverse temperature of the hybrid attention", low=0, above=True)
    focal_type: str = _key("rule of the hybrid Key Semantic Filter", choices=("prob", "equal"))
    ksf: str = _key(
        "hybrid Key Semantic Filter; plain: cross attention without the filter",
        choices=("focal", "plain"),
        before="focal",
    )
    streams: tuple[str, ...] = _key(
        "terms of the fine similarity: ksf (V_h, T_h), lrg_high (V_h, T_m), lrg_mid (V_m, T_h); []: the cosine of the "
        "global embeddings instead",
        before=STREAMS,
    )


@dataclass(frozen=True, kw_only=True)
class LossSettings:
    """losses, their weights and schedule"""

    loss: str = _key("loss on the global embeddings; GCD_release is GCD", choices=LOSSES)
    margin: float = _key("margin of every hinge", low=0)
    triplet_reduction: str = _key("triplet loss over the batch", choices=("sum", "mean"))
    global_loss_weight: float = _key("weight of the global loss; the triplet loss has weight 1", low=0)
    infonce_temperature: float = _key("temperature of InfoNCE", low=0, above=True)
    warmup_epochs: int = _key("first epochs, which use warmup_loss instead of loss", low=0)
    warmup_loss: str = _key("global loss of the warm-up epochs", choices=LOSSES)
    all_negatives_epochs: int = _key(
        "first epochs in which the triplet loss uses all negatives instead of the hardest", low=0
    )


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """optimiser, schedule and devices"""

    max_epoch: int = _key("number of epochs", low=1)
    learning_rate: float = _key("Adam's learning rate", low=0, above=True)
    lr_decay_every: int = _key("epochs between two decays of the learning rate", low=1)
    lr_decay: float = _key("factor of each decay", low=0, high=1, above=True)
    freeze_backbone_epochs: int = _key("first epochs in which both backbones are frozen", low=0)
    frozen_dropout: bool = _key("dropout of frozen backbones in training, as in the public codes", before=True)
    cache_features: bool = _key(
        "encode the train split once and train on stored outputs of the backbones; needs frozen backbones without "
        "augmentation and dropout",
        before=False,
    )
    precision: str = _key("arithmetic of the encoders", choices=PRECISIONS)
    num_gpus: int = _key("devices per node (on a machine without GPUs: processes)", low=1)
    num_nodes: int = _key("machines", low=1)
    gather_negatives: bool = _key("with several processes, take negatives from the batches of all")
    deterministic: bool = _key("only deterministic kernels, on a GPU too (slower)")
    val_metric: str = _key(
        "validation metric that selects best.ckpt. rsum: Rsum of hierarchical retrieval; rsum_full: Rsum of the full "
        "fine ranking; release: R@1 of the full fine ranking plus R@1 of the global ranking, both directions",
        choices=VAL_METRICS,
        before="rsum",
    )


@dataclass(frozen=True, kw_only=True)
class EvalSettings:
    """retrieval and its protocol"""

    inference_topk: int = _key("length K of the shortlist that the fine stage re-ranks", low=1)
    coarse: str = _key("score of the coarse stage", choices=("global", "release"))
    fold5: bool = _key("COCO 1K: the mean over five folds of the test split, each ranked on its own")
    eval_precision: str = _key(
        "arithmetic of the encoders in validation and evaluation; auto: as in training", choices=("auto", *PRECISIONS)
    )
    score_memory: int = _key("memory of fine scoring, in MiB", low=1)
    feature_memory: int = _key("memory for the features of a split, in MiB; the rest is memory-mapped", low=1)
    feature_disk: int = _key(
        "disk space of cached features, in MiB; those of the current evaluation are always kept",
        low=0,
    )
    bootstrap: int = _key("bootstrap resamples of the 95% intervals; 0: no intervals", low=0)
    curve: bool = _key("also write metrics, time and memory over K")
    judged_matches: str = _key(
        "COCO test: ECCV Caption and CxC. Path of captions_val2014.json; auto: search data_root; off"
    )


@dataclass(frozen=True, kw_only=True)
class Settings:
    """All settings of a run, in groups."""

    run: RunSettings
    data: DataSettings
    model: ModelSettings
    loss: LossSettings
    train: TrainSettings
    eval: EvalSettings

    @classmethod
    def from_flat(cls, config: Mapping[str, Any]) -> "Settings":
        """Return the settings of a flat config; raise `UserError` for unknown or missing keys and invalid values."""
        config = translate(config)
        parts: dict[str, Any] = {field.name: field.type for field in dataclasses.fields(cls)}
        known = {field.name: part for part, kind in parts.items() for field in dataclasses.fields(kind)}
        for key in config:
            if key not in known:
                close = difflib.get_close_matches(key, known, n=3)
                hint = f"did you mean {' or '.join(close)}?" if close else f"the keys are {', '.join(sorted(known))}"
                raise UserError(f"there is no config key {key!r}: {hint}")
        missing = sorted(set(known) - set(config))
        if missing:
            raise UserError(f"the config lacks {', '.join(missing)}")
        values: dict[str, dict[str, Any]] = {part: {} for part in parts}
        for part, kind in parts.items():
            hints = typing.get_type_hints(kind)
            for field in dataclasses.fields(kind):
                values[part][field.name] = _checked(field.name, config[field.name], hints[field.name], field.metadata)
        settings = cls(**{part: kind(**values[part]) for part, kind in parts.items()})
        _check_together(settings)
        return settings

    def to_flat(self) -> dict[str, Any]:
        """Return the flat config as plain values: `Settings.from_flat(s.to_flat()) == s`."""
        return {key: value for part in dataclasses.asdict(self).values() for key, value in part.items()}


def _checked(key: str, value: Any, kind: Any, rule: Mapping[str, Any]) -> Any:
    """Return `value` as `kind`; raise `UserError` if it breaks the rule."""
    value = _plain(key, value)
    if typing.get_origin(kind) is tuple:
        member = typing.get_args(kind)[0]
        if not isinstance(value, tuple) or not all(_is(member, item) for item in value):
            raise UserError(f"{key}={value!r}: expected a list of {member.__name__} values")
        return value
    if kind is float and _is(int, value):
        value = float(value)
    if not _is(kind, value):
        expected = f"one of {', '.join(rule['choices'])}" if rule["choices"] else f"a value of type {kind.__name__}"
        raise UserError(f"{key}={value!r}: expected {expected}, found {type(value).__name__}")
    if rule["choices"] and value not in rule["choices"]:
        raise UserError(f"{key}={value!r}: expected one of {', '.join(rule['choices'])}")
    if kind in (int, float):
        too_low = value <= rule["low"] if rule["above"] else value < rule["low"]
        if too_low or value > rule["high"] or not math.isfinite(value):
            raise UserError(f"{key}={value!r}: expected {_range(rule)}")
    return value


def _plain(key: str, value: Any) -> Any:
    """Return plain Python values of what people type and of Sacred's list and dict classes."""
    if isinstance(value, list):
        value = tuple(value)
    if key in PATH_KEYS and isinstance(value, str):
        value = os.path.expanduser(value)
    if isinstance(value, Mapping):
        return {name: _plain(key, item) for name, item in value.items()}
    if key in ("image_encoder_args", "text_encoder_args") and isinstance(value, str):
        return _keywords(key, value)
    if key == "datasets" and isinstance(value, tuple):  # common in this field: datasets=["f30k"]
        if len(value) != 1:
            raise UserError(
                f"datasets={list(value)!r}: expected one data set; to train on several, merge their captions"
            )
        return value[0]
    if key in ("checkpoint", "streams") and isinstance(value, str):  # Sacred passes a list without quotes as a string
        inner = value.strip()
        if inner.startswith("[") and inner.endswith("]"):
            value = tuple(path.strip().strip("'\"") for path in inner[1:-1].split(",") if path.strip())
        else:
            value = (value,) if value else ()
    if key == "checkpoint" and isinstance(value, tuple):
        value = tuple(os.path.expanduser(path) if isinstance(path, str) else path for path in value)
    if key in ("precision", "eval_precision") and value in (16, "16", 32, "32", "bf16"):  # Lightning's older names
        return {"16": "16-mixed", "32": "32-true", "bf16": "bf16-mixed"}[str(value)]
    return value


def _keywords(key: str, text: str) -> dict[str, Any]:
    """Return the arguments of a text such as "depths=[1, 2]"; Sacred rejects new keys in a dict of a named config."""
    try:
        call = ast.parse(f"f({text})", mode="eval").body
        if not isinstance(call, ast.Call) or call.args:
            raise ValueError("an argument without a name")
        return {str(word.arg): ast.literal_eval(word.value) for word in call.keywords}
    except (SyntaxError, ValueError) as error:
        raise UserError(
            f"{key}={text!r}: expected arguments as in a call, such as 'depths=[1, 2], dims=[8, 16]'"
        ) from error


def _is(kind: type, value: Any) -> bool:
    """Return whether `value` is of `kind`; a bool is not a number."""
    return isinstance(value, kind) and not (kind in (int, float) and isinstance(value, bool))


def _range(rule: Mapping[str, Any]) -> str:
    """Return the range of a number in interval notation.

    >>> _range({"low": 0, "high": 1, "above": True})
    'a number in (0, 1]'
    """
    low, high = rule["low"], rule["high"]
    if not math.isfinite(low) and not math.isfinite(high):
        return "a finite number"
    opening = "(" if rule["above"] or not math.isfinite(low) else "["
    closing = "]" if math.isfinite(high) else ")"
    return f"a number in {opening}{low:g}, {high:g}{closing}"


def _check_together(settings: Settings) -> None:
    """Raise `UserError` if a rule between keys is broken."""
    run, data, model = settings.run, settings.data, settings.model
    processes = settings.train.num_gpus * settings.train.num_nodes
    if data.per_gpu_batchsize > data.batch_size:
        raise UserError(
            f"per_gpu_batchsize={data.per_gpu_batchsize} is larger than batch_size={data.batch_size}, the pairs "
            f"of an optimiser step: give batch_size={data.per_gpu_batchsize * processes} too (the public code reads "
            "per_gpu_batchsize only), or a smaller per_gpu_batchsize"
        )
    if model.alignment == "revised" and settings.loss.loss == "GCD" and not run.test_only:
        raise UserError(
            "loss='GCD' with alignment='revised': the revised public code calls GCD what is GCD_revised here; give "
            "loss=GCD_revised for that loss, or loss=GCD_release for the GCD of the first release"
        )
    together = min(data.per_gpu_batchsize * processes, data.batch_size)  # pairs per forward pass, over all processes
    if data.batch_size % processes:
        raise UserError(
            f"batch_size={data.batch_size} cannot be divided among {processes} processes (num_gpus x "
            "num_nodes): give a multiple of them"
        )
    if data.batch_size % together:  # `together` is a multiple of `processes`
        raise UserError(
            f"batch_size={data.batch_size} is not a multiple of per_gpu_batchsize={data.per_gpu_batchsize} times "
            f"{processes} process(es) (num_gpus x num_nodes): give a per_gpu_batchsize whose multiple it is, since "
            "gradients accumulate up to batch_size"
        )
    for key in ("image_levels", "text_levels"):
        if len(getattr(model, key)) != 2:
            raise UserError(f"{key}={list(getattr(model, key))!r}: expected two numbers, the mid and the high level")
    if set(model.streams) - set(STREAMS) or len(set(model.streams)) < len(model.streams):
        raise UserError(f"streams={list(model.streams)}: expected some of {', '.join(STREAMS)}, each once")
    if settings.eval.coarse == "release" and set(model.streams) < set(STREAMS):
        raise UserError(f"coarse=release needs all streams, found streams={list(model.streams)}; use coarse=global")
    _check_cached_features(settings)
    if len(data.scenes_pictures) != 3 or min(data.scenes_pictures) < 1:
        raise UserError(f"scenes_pictures={list(data.scenes_pictures)!r}: expected three numbers from 1, one a split")
    if not run.exp_name or os.path.isabs(run.exp_name) or ".." in run.exp_name.split("/"):
        raise UserError(f"exp_name={run.exp_name!r}: expected the name of a folder below log_dir")
    if run.test_only and not run.checkpoint:
        raise UserError("test_only=True needs checkpoint=PATH, the weights to evaluate")
    if run.test_only and run.resume_from:
        raise UserError("resume_from continues a training; with test_only=True give checkpoint=PATH instead")
    if len(run.checkpoint) > 1 and not run.test_only:
        raise UserError("several checkpoints are an ensemble, which cannot be trained: add test_only=True")
    if settings.eval.fold5 and data.datasets != "coco":
        raise UserError(f"fold5=True is the five-fold 1K protocol of COCO, not of datasets={data.datasets!r}")
    if not data.data_root:
        raise UserError("data_root is empty: give the folder that holds your data set, data_root=PATH")


def _check_cached_features(settings: Settings) -> None:
    """Raise `UserError` if stored features of the backbones would not be those of every epoch."""
    train, data = settings.train, settings.data
    if not train.cache_features:
        return
    epochs = train.freeze_backbone_epochs
    for holds, reason, remedy in (
        (
            epochs >= train.max_epoch,
            f"the backbones are trained after {epochs} epochs",
            f"freeze_backbone_epochs={train.max_epoch}",
        ),
        (not data.augmentation, "every epoch has other crops and flips", "augmentation=False"),
        (not train.frozen_dropout, "dropout of the frozen backbones changes their outputs", "frozen_dropout=False"),
        (data.on_bad_image == "error", "every image is encoded in advance", "on_bad_image=error"),
    ):
        if not holds:
            raise UserError(f"cache_features=True: {reason}, which stored features leave out; set {remedy}")


def values_before() -> dict[str, Any]:
    """Return the values of later keys for configs that were stored before the keys existed."""
    groups: Any = [field.type for field in dataclasses.fields(Settings)]
    fields = [field for group in groups for field in dataclasses.fields(group)]
    return {field.name: field.default for field in fields if field.default is not dataclasses.MISSING}


def describe() -> dict[str, dict[str, Mapping[str, Any]]]:
    """Return the rules (doc, choices, low, high, above) of every config key, by group: run, data, model, ..."""
    groups: Any = {field.name: field.type for field in dataclasses.fields(Settings)}
    return {name: {field.name: field.metadata for field in dataclasses.fields(group)} for name, group in groups.items()}


def format_keys(config: Mapping[str, Any]) -> str:
    """Return a text with every config key by group: its value in `config`, its meaning, and its choices or range."""
    lines = []
    for group, keys in describe().items():
        lines += ["", f"{group}: {Settings.__annotations__[group].__doc__}"]
        for key, rule in keys.items():
            allowed = ", ".join(rule["choices"]) if rule["choices"] else _range(rule) if _is_bounded(rule) else ""
            lines.append(f"  {key} = {config[key]!r}")
            lines.append(f"      {rule['doc']}{f' [{allowed}]' if allowed else ''}")
    return "\n".join(lines[1:])


def _is_bounded(rule: Mapping[str, Any]) -> bool:
    return math.isfinite(rule["low"]) or math.isfinite(rule["high"])
