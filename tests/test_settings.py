"""Settings: every key is checked, one line says what is wrong, and no key goes unread."""

import dataclasses
import pathlib
import re
import subprocess
import sys

import pytest

from config import ex
from datamodules.records import SPLITS
from hacan.alignment.base import DIRECTIONS
from hacan.alignment.hybrid import FOCAL_TYPES
from hacan.errors import UserError
from hacan.losses import HARD_NEGATIVE_LOSSES
from hacan.models.aggregator import ACTIVATIONS
from hacan.retrieval.ensemble import AUTOCAST_TYPES
from hacan.settings import Settings, describe

ROOT = pathlib.Path(__file__).parent.parent
NAMED = ("coco_config", "f8k_config", "release_config", "revised_config", "demo_config")


def flat(*named, **updates):
    """Return the flat config that Sacred passes to run.py."""
    run = ex._create_run("print_config", config_updates={"data_root": "/data", **updates}, named_configs=named)
    return dict(run.config.items())


@pytest.fixture(scope="module")
def defaults():
    return flat()


def with_(defaults, **updates):
    return Settings.from_flat({**defaults, **updates})


def test_the_defaults_are_the_flickr30k_preset_of_the_method(defaults):
    settings = Settings.from_flat(defaults)
    assert (settings.data.datasets, settings.model.direction, settings.loss.loss) == ("f30k", "t2i", "GCD")
    assert (settings.data.batch_size, settings.train.max_epoch, settings.train.freeze_backbone_epochs) == (64, 30, 10)
    assert (settings.train.learning_rate, settings.loss.margin, settings.model.lambda_softmax) == (1e-4, 0.2, 9.0)
    assert (settings.loss.global_loss_weight, settings.loss.triplet_reduction) == (10.0, "sum")
    assert settings.loss.warmup_epochs == settings.loss.all_negatives_epochs == 0
    assert settings.eval.inference_topk == 50


def test_the_revised_preset_is_the_revised_column_of_the_method():
    settings = Settings.from_flat(flat("revised_config"))
    assert (settings.model.alignment, settings.loss.loss) == ("revised", "GCD_revised")
    assert (settings.loss.triplet_reduction, settings.loss.global_loss_weight) == ("mean", 1.0)
    assert settings.train.learning_rate == 1e-5


@pytest.mark.parametrize("name", NAMED)
def test_named_configs_are_valid(name):
    assert Settings.from_flat(flat(name)).data.data_root


def test_coco_queries_with_the_image():
    assert Settings.from_flat(flat("coco_config")).model.direction == "i2t"


def test_settings_survive_the_way_to_a_flat_config_and_back(defaults):
    settings = with_(defaults, image_encoder_args={"dims": [8, 16]}, checkpoint="[a.ckpt, b.ckpt]", test_only=True)
    assert Settings.from_flat(settings.to_flat()) == settings


def test_every_key_of_the_config_is_a_field_and_every_field_a_key(defaults):
    assert set(defaults) == {key for group in describe().values() for key in group}


def test_every_field_has_a_reader():
    """No key without a reader: each field is used by name somewhere besides the settings and the config."""
    sources = [ROOT / "run.py", *(ROOT / "hacan").rglob("*.py"), *(ROOT / "datamodules").glob("*.py")]
    text = "\n".join(path.read_text() for path in sources if path.name != "settings.py")
    unread = [key for group in describe().values() for key in group if not re.search(rf"\.{key}\b", text)]
    assert not unread, f"config keys that nothing reads: {unread}"


def test_settings_are_frozen(defaults):
    with pytest.raises(dataclasses.FrozenInstanceError):
        Settings.from_flat(defaults).loss.margin = 1.0


@pytest.mark.parametrize(
    ("updates", "expected"),
    [
        ({"learning_rate": "abc"}, "learning_rate='abc': expected a value of type float, found str"),
        ({"learning_rate": 0.0}, "learning_rate=0.0: expected a number in (0, "),
        ({"learning_rate": float("nan")}, "learning_rate=nan: expected a number in (0, "),
        ({"batch_size": 64.0}, "batch_size=64.0: expected a value of type int, found float"),
        ({"batch_size": True}, "batch_size=True: expected a value of type int, found bool"),
        ({"loss": "gcd"}, "loss='gcd': expected one of GCD, GCD_release, GCD_revised, F_HN, M_HN, InfoNCE, none"),
        ({"loss": 3}, "loss=3: expected one of GCD, GCD_release, GCD_revised, F_HN, M_HN, InfoNCE, none, found int"),
        ({"direction": "both ways"}, "direction='both ways': expected one of i2t, t2i, both"),
        ({"image_levels": [1]}, "image_levels=[1]: expected two numbers, the mid and the high level"),
        ({"image_levels": ["a", "b"]}, "image_levels=('a', 'b'): expected a list of int values"),
        ({"image_encoder_args": "depths"}, "image_encoder_args='depths': expected arguments as in a call"),
        ({"lr_decay": 1.5}, "lr_decay=1.5: expected a number in (0, 1]"),
        ({"datasets": ["f30k", "coco"]}, "datasets=['f30k', 'coco']: expected one data set"),
        ({"per_gpu_batchsize": 48}, "batch_size=64 is not a multiple of per_gpu_batchsize=48"),
        ({"num_gpus": 3}, "batch_size=64 cannot be divided among 3 processes"),
        ({"num_gpus": 4, "per_gpu_batchsize": 12}, "batch_size=64 is not a multiple of per_gpu_batchsize=12 times 4"),
        ({"test_only": True}, "test_only=True needs checkpoint=PATH"),
        ({"test_only": True, "checkpoint": "a", "resume_from": "last"}, "resume_from continues a training"),
        ({"checkpoint": "[a.ckpt, b.ckpt]"}, "several checkpoints are an ensemble"),
        ({"fold5": True}, "fold5=True is the five-fold 1K protocol of COCO"),
        ({"data_root": ""}, "data_root is empty"),
        ({"learning_rat": 1e-3}, "there is no config key 'learning_rat': did you mean learning_rate"),
        ({"xyz": 1}, "there is no config key 'xyz': the keys are activation, "),
    ],
)
def test_a_wrong_value_is_one_line_that_names_key_value_and_choices(defaults, updates, expected):
    with pytest.raises(UserError) as error:
        with_(defaults, **updates)
    assert str(error.value).startswith(expected)
    assert "\n" not in str(error.value)


def test_a_missing_key_is_named(defaults):
    with pytest.raises(UserError, match="the config lacks margin"):
        Settings.from_flat({key: value for key, value in defaults.items() if key != "margin"})


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ({"datasets": ["f8k"]}, ("data", "datasets", "f8k")),
        ({"precision": 16}, ("train", "precision", "16-mixed")),
        ({"precision": "bf16"}, ("train", "precision", "bf16-mixed")),
        ({"margin": 1}, ("loss", "margin", 1.0)),
        ({"image_encoder_args": "depths=[1, 2], x='y'"}, ("model", "image_encoder_args", {"depths": [1, 2], "x": "y"})),
        ({"image_encoder_args": ""}, ("model", "image_encoder_args", {})),
        ({"checkpoint": "a.ckpt"}, ("run", "checkpoint", ("a.ckpt",))),
        ({"checkpoint": ""}, ("run", "checkpoint", ())),
        ({"checkpoint": "[a.ckpt, b.ckpt]", "test_only": True}, ("run", "checkpoint", ("a.ckpt", "b.ckpt"))),
        ({"checkpoint": ["a.ckpt", "b.ckpt"], "test_only": True}, ("run", "checkpoint", ("a.ckpt", "b.ckpt"))),
    ],
)
def test_what_people_type_is_understood(defaults, typed, meant):
    part, key, value = meant
    assert getattr(getattr(with_(defaults, **typed), part), key) == value


def test_the_keys_command_prints_every_key_with_its_meaning_and_value():
    result = subprocess.run(
        [sys.executable, "run.py", "keys", "with", "coco_config"], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert result.returncode == 0, result.stderr
    for group, keys in describe().items():
        assert f"\n{group}: " in f"\n{result.stdout}"
        for key, rule in keys.items():
            assert f"  {key} = " in result.stdout and rule["doc"] in result.stdout
    assert "datasets = 'coco'" in result.stdout
    assert "[a number in (0, 1]]" in result.stdout and "[sum, mean]" in result.stdout


def test_the_help_of_run_has_examples():
    result = subprocess.run([sys.executable, "run.py", "--help"], capture_output=True, text=True, cwd=ROOT, check=False)
    assert result.returncode == 0, result.stderr
    assert "python run.py with data_root=/data" in result.stdout and "python run.py keys" in result.stdout


def test_choices_are_those_of_the_modules_that_use_them():
    choices = {key: rule["choices"] for keys in describe().values() for key, rule in keys.items()}
    for key in ("loss", "warmup_loss"):
        assert set(choices[key]) == {*HARD_NEGATIVE_LOSSES, "InfoNCE", "none"}, key
    assert set(choices["activation"]) == set(ACTIVATIONS)
    assert set(choices["direction"]) == set(DIRECTIONS)
    assert set(choices["focal_type"]) == set(FOCAL_TYPES)
    assert set(choices["precision"]) == set(AUTOCAST_TYPES)
    assert set(choices["eval_split"]) == set(SPLITS)


def test_the_home_folder_is_expanded_in_every_path(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    for key in ("data_root", "log_dir", "save_path", "image_weights", "text_encoder", "text_weights", "tokenizer"):
        found = Settings.from_flat(flat() | {key: "~/x"}).to_flat()
        assert found[key] == str(tmp_path / "x"), key
    typed = flat() | {"test_only": True, "checkpoint": "[~/a.ckpt, b.ckpt]"}
    assert Settings.from_flat(typed).run.checkpoint == (str(tmp_path / "a.ckpt"), "b.ckpt")


@pytest.mark.parametrize("name", ["../..", "/tmp/x", "a/../../b", ""])
def test_exp_name_stays_below_log_dir(name):
    with pytest.raises(UserError, match="expected the name of a folder below log_dir"):
        Settings.from_flat(flat() | {"exp_name": name})
