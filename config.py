"""The Sacred experiment: defaults (the Flickr30K preset), and the named configs.

Allowed values are defined in `hacan/settings.py`; METHOD section numbers give the source of a constant. Named configs
are used as `python run.py with coco_config data_root=/data`.
"""

from inspect import Parameter, Signature

from sacred import SETTINGS

from hacan.public_config import DATASET_OF_EXPERIMENT, PUBLIC_KEYS, text_encoder_of
from hacan.sacred_setup import Experiment, git_commit_is_readable, read_plain_configs

# Sacred's capture of standard output would record every redraw of a progress bar.
SETTINGS.CAPTURE_MODE = "no"
SETTINGS.CONFIG.READ_ONLY_CONFIG = False

# The named configs have comments instead of docstrings, because Sacred makes a docstring a config entry.
read_plain_configs()
ex = Experiment("HACAN", save_git_info=git_commit_is_readable(__file__))


def public_keys(**_: object) -> None:
    """Declare the public codes' own keys: Sacred rejects a key that neither the config nor a captured function has."""


_parameters = [Parameter(key, Parameter.KEYWORD_ONLY, default=None) for key in PUBLIC_KEYS]
public_keys.__signature__ = Signature(_parameters)  # type: ignore[attr-defined]  # functions accept it
ex.capture(public_keys)


@ex.config
def config() -> None:
    # Flickr30K, hybrid alignment, GCD loss (METHOD sections 1, 2, 4, 5, 6).
    # run
    exp_name = "hacan"
    seed = 0
    log_dir = "result"
    save_path = ""
    test_only = False
    checkpoint = ""
    trust_checkpoint = False
    resume_from = ""
    fast_dev_run = False
    report = False

    # data
    data_root = ""
    datasets = DATASET_OF_EXPERIMENT.get(exp_name, "f30k")
    use_restval = True
    captions_per_image = 0 if datasets in ("captions", "scenes") else 5  # the field's protocol
    coco_val_images = 0
    drop_last = True
    eval_split = "test"
    augmentation = True
    image_size = 224
    max_text_len = 32
    tokenizer = "bert-base-uncased"
    batch_size = 64
    per_gpu_batchsize = min(64, batch_size)
    num_workers = 8
    on_bad_image = "error"
    scenes_pictures = [1000, 100, 200]

    # model
    image_encoder = "convnext_base.fb_in22k"
    image_weights = "pretrained"
    image_encoder_args = ""
    image_levels = [-2, -1]
    text_encoder = text_encoder_of(tokenizer)
    text_weights = "pretrained"
    text_encoder_args = ""
    text_levels = [-3, -1]
    embed_dim = 768
    activation = "leaky_relu"
    alignment = "hybrid"
    direction = "t2i"
    lambda_softmax = 9.0
    focal_type = "prob"
    ksf = "focal"
    streams = ["ksf", "lrg_high", "lrg_mid"]

    # loss
    loss = "GCD"
    margin = 0.2
    triplet_reduction = "sum"
    global_loss_weight = 10.0
    infonce_temperature = 0.05
    warmup_epochs = 0
    warmup_loss = "InfoNCE"
    all_negatives_epochs = 0

    # training
    max_epoch = 30
    learning_rate = 1e-4
    lr_decay_every = 10
    lr_decay = 0.1
    freeze_backbone_epochs = 10
    frozen_dropout = True
    cache_features = False
    precision = "16-mixed"
    num_gpus = 1
    num_nodes = 1
    gather_negatives = True
    deterministic = False
    val_metric = "rsum"

    # evaluation
    inference_topk = 50
    coarse = "global"
    fold5 = False
    eval_precision = "auto"
    score_memory = 256
    feature_memory = 8192
    feature_disk = 16384
    bootstrap = 1000
    curve = False
    judged_matches = "auto"


@ex.named_config
def coco_config() -> None:
    # MS-COCO, Karpathy's split (METHOD section 5: direction i2t).
    datasets = "coco"
    direction = "i2t"


@ex.named_config
def f8k_config() -> None:
    # Flickr8K, Karpathy's split.
    datasets = "f8k"


@ex.named_config
def release_config() -> None:
    # The first public code with its surroundings (METHOD sections 5, 6); on COCO: `with coco_config release_config`.
    coarse = "release"
    val_metric = "release"
    eval_precision = "32-true"
    freeze_backbone_epochs = 11
    use_restval = False
    coco_val_images = 1000
    drop_last = False


@ex.named_config
def revised_config() -> None:
    # The authors' later public code with its surroundings (METHOD sections 3, 4, 5, the revised column).
    alignment = "revised"
    loss = "GCD_revised"
    triplet_reduction = "mean"
    global_loss_weight = 1.0
    learning_rate = 1e-5
    val_metric = "rsum_full"
    eval_precision = "32-true"
    freeze_backbone_epochs = 10
    use_restval = False
    coco_val_images = 1000
    drop_last = False


@ex.named_config
def demo_config() -> None:
    # The embedded demo: generated scenes, small encoders from scratch, minutes on two CPU cores.
    exp_name = "demo"
    data_root = "data/demo"
    datasets = "scenes"
    image_size = 96
    tokenizer = "scenes"
    num_workers = 0

    image_encoder = "convnext_atto"
    image_weights = "random"
    # Without layer scale: its initial value of 1e-6 makes every block an identity in a short training.
    image_encoder_args = "depths=[1, 1, 2, 1], dims=[32, 64, 96, 128], ls_init_value=None"
    text_encoder = "bert"
    text_weights = "random"
    text_encoder_args = (
        "hidden_size=128, num_hidden_layers=3, num_attention_heads=4, intermediate_size=256, "
        "max_position_embeddings=64, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0"
    )
    text_levels = [-2, -1]
    embed_dim = 128

    # From scratch, hardest negatives and hinges do not train at first: start with all negatives and InfoNCE, with a
    # weight that balances the sum of the triplet loss.
    max_epoch = 6
    learning_rate = 1e-3
    lr_decay_every = 4
    lr_decay = 0.3
    freeze_backbone_epochs = 0
    precision = "32-true"
    global_loss_weight = 100.0
    warmup_epochs = 5
    all_negatives_epochs = 5
