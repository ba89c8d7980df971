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


def test_the_batch_of_a_process_is_not_larger_than_the_step():
    assert settings_as_typed("batch_size=32").data.per_gpu_batchsize == 32
    assert settings_as_typed("batch_size=128").data.per_gpu_batchsize == 64
    with pytest.raises(UserError, match=r"per_gpu_batchsize=128 is larger than batch_size=64.*give batch_size=256 too"):
        settings_as_typed("per_gpu_batchsize=128", "num_gpus=2")


def test_gcd_with_the_revised_alignment_asks_which_one():
    for typed in (["revised_config", "loss=GCD"], ["alignment=revised"]):
        with pytest.raises(UserError, match=r"GCD_revised.*GCD_release") as error:
            settings_as_typed(*typed)
        assert "\n" not in str(error.value)
    assert settings_as_typed("revised_config").loss.loss == "GCD_revised"
    assert settings_as_typed("alignment=revised", "loss=GCD_release").loss.loss == "GCD_release"


@pytest.mark.parametrize("files", [["tokenizer.json"], ["tokenizer.json", "config.json"]])
def test_a_folder_given_as_tokenizer_is_also_the_text_encoder(tmp_path, files):
    for file in files:
        (tmp_path / file).write_text("{}")
    expected = str(tmp_path) if "config.json" in files else "bert-base-uncased"
    assert settings_as_typed(f"tokenizer={tmp_path}").model.text_encoder == expected
    assert settings_as_typed(f"tokenizer={tmp_path}", "text_encoder=other").model.text_encoder == "other"


@pytest.mark.parametrize(
    ("named", "expected"),
    [
        (
            "release_config",
            {
                "alignment": "hybrid",
                "loss": "GCD",
                "triplet_reduction": "sum",
                "global_loss_weight": 10.0,
                "learning_rate": 1e-4,
                "coarse": "release",
                "val_metric": "release",
                "freeze_backbone_epochs": 11,
            },
        ),
        (
            "revised_config",
            {
                "alignment": "revised",
                "loss": "GCD_revised",
                "triplet_reduction": "mean",
                "global_loss_weight": 1.0,
                "learning_rate": 1e-5,
                "coarse": "global",
                "val_metric": "rsum_full",
                "freeze_backbone_epochs": 10,
            },
        ),
    ],
)
@pytest.mark.parametrize("coco", [False, True])
def test_named_configs_of_the_public_codes(named, expected, coco):
    """METHOD section 5; in both orders with coco_config."""
    both = {"lr_decay": 0.1, "lr_decay_every": 10, "max_epoch": 30, "batch_size": 64, "eval_precision": "32-true"}
    both |= {"use_restval": False, "coco_val_images": 1000, "drop_last": False, "captions_per_image": 5, "seed": 0}
    both |= {"inference_topk": 50, "precision": "16-mixed", "margin": 0.2}
    for typed in ([named, "coco_config"], ["coco_config", named]) if coco else ([named],):
        flat = settings_as_typed(*typed).to_flat()
        assert {key: flat[key] for key in (*expected, *both)} == expected | both
        assert (flat["datasets"], flat["direction"]) == (("coco", "i2t") if coco else ("f30k", "t2i"))


@pytest.mark.parametrize(
    ("datasets", "captions"), [("f30k", 5), ("f8k", 5), ("coco", 5), ("captions", 0), ("scenes", 0)]
)
def test_captions_per_image_is_five_for_the_named_data_sets(datasets, captions):
    assert settings_as_typed(f"datasets={datasets}").data.captions_per_image == captions
