"""Config keys of the public codes: each gets an answer that helps."""

import pytest
from sacred.arg_parser import get_config_updates

from config import ex
from hacan.errors import UserError
from hacan.public_config import REPLACED, WITHOUT_EFFECT, ignored_keys, translate
from hacan.settings import Settings

# All keys of the public codes' config files, as METHOD section 5 lists them; those of DEAD are never read there.
DEAD = {*WITHOUT_EFFECT, "vit", "lr_update"}
ALIVE = {
    *("exp_name", "seed", "datasets", "loss_names", "batch_size", "margin", "image_size", "max_text_len", "tokenizer"),
    *("input_image_embed_size", "input_text_embed_size", "hidden_size", "learning_rate", "max_epoch", "resume_from"),
    *("fast_dev_run", "val_check_interval", "test_only", "checkpoint", "data_root", "log_dir", "per_gpu_batchsize"),
    *("num_gpus", "num_nodes", "load_path", "num_workers", "precision", "direction", "lambda_softmax", "focal_type"),
    *("activation", "loss", "global_loss_weight", "inference_topk", "fold5", "experiment_name"),
}
ALL_KEYS = sorted(DEAD | ALIVE)


def settings_as_typed(*words):
    updates, named = get_config_updates(["data_root=/data", *words])
    run = ex._create_run("print_config", config_updates=updates, named_configs=named)
    return Settings.from_flat(dict(run.config.items()))


def test_there_are_57_public_keys():
    assert len(set(ALL_KEYS)) == 57


@pytest.mark.parametrize("key", ALL_KEYS)
def test_every_public_key_is_accepted_ignored_or_replaced(key):
    own = {field for part in Settings.__dataclass_fields__.values() for field in part.type.__dataclass_fields__}
    checked = {"loss_names", "val_check_interval"}
    assert (key in own) + (key in WITHOUT_EFFECT) + (key in REPLACED) + (key in checked) == 1


@pytest.mark.parametrize("key", sorted(DEAD))
def test_a_dead_key_is_ignored_or_names_the_key_to_use(key):
    if key in WITHOUT_EFFECT:
        settings_as_typed(f"{key}=3")
        assert ignored_keys({key: 3, "seed": 0}) == [key]
    else:
        with pytest.raises(UserError, match=rf"{key}=.*use (lr_decay_every|image_encoder)"):
            settings_as_typed(f"{key}=3")


@pytest.mark.parametrize(
    ("typed", "remedy"),
    [
        ("hidden_size=512", "embed_dim"),
        ("vit=swin_base", "image_encoder"),
        ("experiment_name=mine", "exp_name"),
        ("lr_update=5", "lr_decay_every"),
        ("load_path=old", "checkpoint=PATH"),
        ("input_text_embed_size=768", "text_encoder"),
        ("val_check_interval=0.5", "once after each epoch"),
        ("loss_names={'itm': 1}", "irtr"),
        ("num_gpus=[2]", "CUDA_VISIBLE_DEVICES=2"),
        ("activation=relu", "activation=none"),
    ],
)
def test_a_replaced_key_or_value_is_refused_with_the_remedy(typed, remedy):
    with pytest.raises(UserError, match=remedy) as error:
        settings_as_typed(typed)
    assert typed.split("=")[0] in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("typed", "part", "key", "value"),
    [
        ("resume_from=None", "run", "resume_from", ""),
        ("checkpoint=None", "run", "checkpoint", ()),
        ("num_gpus=[0]", "train", "num_gpus", 1),
        ("num_gpus=[0, 1]", "train", "num_gpus", 2),
        ("exp_name=finetune_irtr_coco", "data", "datasets", "coco"),
        ("exp_name=finetune_irtr_f30k", "data", "datasets", "f30k"),
        ("precision=16", "train", "precision", "16-mixed"),
        ("val_check_interval=1.0", "train", "num_nodes", 1),
        ("loss_names={'irtr': 1, 'itm': 0}", "train", "num_nodes", 1),
    ],
)
def test_public_notations_are_understood(typed, part, key, value):
    assert getattr(getattr(settings_as_typed(typed), part), key) == value


def test_an_explicit_data_set_wins_over_the_experiment_name():
    assert settings_as_typed("exp_name=finetune_irtr_coco", "datasets=f8k").data.datasets == "f8k"


def test_translate_leaves_other_configs_unchanged():
    config = {"seed": 1, "checkpoint": "a.ckpt", "num_gpus": 2}
    assert translate(config) == config
