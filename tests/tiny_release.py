"""A checkpoint of the public release in miniature."""

import pytorch_lightning.utilities.parsing as lightning_parsing
import torch
from pytorch_lightning.callbacks import LearningRateMonitor, ModelCheckpoint
from references import original_convnext, original_convnext_state
from transformers import BertConfig, BertModel

DEPTHS, DIMS, WIDTH = [1, 2, 3, 1], [8, 12, 16, 24], 10
BERT = {"vocab_size": 30, "hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 36}
LEFTOVERS = ("fc1", "cross_modal_text_transform_1", "cross_modal_image_transform", "cross_modal_image_transform_1",
             "cross_modal_image_transform_2")  # fmt: skip


# Keys of the config that the public codes store: the first release's, and those that only the revised code has.
FIRST_CONFIG = {
    "exp_name": "finetune_irtr_f30k",
    "direction": "t2i",
    "lambda_softmax": 9,
    "focal_type": "prob",
    "fold5": False,
}
REVISED_CONFIG = {"exp_name": "finetune_irtr_f30k", "direction": "t2i", "inference_topk": 50, "global_loss_weight": 1}


class AttributeDict(dict):
    """Pickled under the name of the class that Lightning 1.3 used for hyper-parameters."""


def save_as_lightning_1_3(path, state, config, **more):
    """Write a checkpoint as Lightning 1.3 did: callbacks keyed by class, hyper-parameters as an AttributeDict."""
    AttributeDict.__module__, AttributeDict.__qualname__ = lightning_parsing.__name__, "AttributeDict"
    present = getattr(lightning_parsing, "AttributeDict", None)
    lightning_parsing.AttributeDict = AttributeDict  # pickle looks the name up
    content = {
        "epoch": 3,
        "global_step": 1234,
        "pytorch-lightning_version": "1.3.2",
        "callbacks": {
            ModelCheckpoint: {"best_model_score": torch.tensor(1.5), "dirpath": "/x"},
            LearningRateMonitor: {},
        },
        "optimizer_states": [],
        "lr_schedulers": [],
        "hparams_name": "config",
        "hyper_parameters": AttributeDict(config=config),
        "state_dict": state,
        **more,
    }
    try:
        torch.save(content, path)
    finally:
        del lightning_parsing.AttributeDict
        if present is not None:
            lightning_parsing.AttributeDict = present


class Release:
    """The public release in miniature: its state dict under its own names, and what it computes, written out."""

    def __init__(self, words=BERT["vocab_size"], positions=20):
        torch.manual_seed(3)
        self.image = original_convnext_state(DEPTHS, DIMS, classes=13)
        self.text = BertModel(BertConfig(**BERT | {"vocab_size": words}, max_position_embeddings=positions)).eval()
        layers = {
            "cross_modal_text_transform": (WIDTH, 128),
            "cross_modal_text_transform_2": (WIDTH, 128),
            "fc3": (WIDTH, DIMS[3]),
            "fc2": (WIDTH, DIMS[2]),
            **dict.fromkeys(LEFTOVERS, (4, 6)),
        }
        for side, width in (("txt_enc", 128), ("img_enc", DIMS[3])):
            middle = (width + WIDTH) // 2
            layers |= {f"{side}.v_fc1": (width, width), f"{side}.v_fc2": (middle, width)}
            layers |= {f"{side}.v_fc3": (WIDTH, middle)}
        self.heads = {}
        for name, (rows, columns) in layers.items():
            self.heads[f"{name}.weight"] = torch.randn(rows, columns) / columns**0.5
            self.heads[f"{name}.bias"] = torch.randn(rows) / 10

    def state(self):
        return {
            **{f"text_transformer.{key}": value for key, value in self.text.state_dict().items()},
            **{f"convnexts.{key}": value for key, value in self.image.items()},
            **self.heads,
        }

    def linear(self, x, name):
        return x @ self.heads[f"{name}.weight"].T + self.heads[f"{name}.bias"]

    def aggregate(self, x, side):
        for layer in ("v_fc1", "v_fc2", "v_fc3"):
            x = self.linear(x, f"{side}.{layer}")
            x = torch.where(x > 0, x, 0.01 * x)
        return x / x.norm(dim=1, keepdim=True)

    def features(self, pixels, captions):
        mid, high, pooled = original_convnext(self.image, pixels, DEPTHS)
        ids, mask = captions
        text = self.text(input_ids=ids, attention_mask=mask.long(), output_hidden_states=True)
        return {
            "image high": self.linear(high.flatten(2).transpose(1, 2), "fc3"),
            "image mid": self.linear(mid.flatten(2).transpose(1, 2), "fc2"),
            "image global": self.aggregate(pooled, "img_enc"),
            "text high": self.linear(text.hidden_states[-1], "cross_modal_text_transform"),
            "text mid": self.linear(text.hidden_states[-3], "cross_modal_text_transform_2"),
            "text global": self.aggregate(text.pooler_output, "txt_enc"),
        }
