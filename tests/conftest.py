"""Tiny random models that are built as run.py builds them. Different sizes on every axis."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from transformers import BertTokenizerFast

from config import ex
from hacan.models.factory import build_model
from hacan.settings import Settings

IMAGE_SIZE = 64
WORDS = "[PAD] [UNK] [CLS] [SEP] [MASK] a dog cat red blue big small runs sits on by the grass"
TINY = {
    "data_root": "unused",
    "image_size": IMAGE_SIZE,
    "max_text_len": 12,
    "image_encoder": "convnext_atto",
    "image_weights": "random",
    "image_encoder_args": {"depths": [1, 1, 2, 1], "dims": [8, 12, 20, 28]},
    "text_encoder": "bert",
    "text_weights": "random",
    "text_encoder_args": {
        "hidden_size": 24,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "intermediate_size": 40,
        "max_position_embeddings": 16,
    },
    "embed_dim": 18,
    "precision": "32-true",
    "num_workers": 0,
}


@pytest.fixture(scope="session")
def make_settings():
    """Return the settings of the tiny model with changes."""
    run = ex._create_run("print_config")
    defaults = dict(run.config.items())
    return lambda **updates: Settings.from_flat({**defaults, **TINY, **updates})


@pytest.fixture(scope="session")
def tokenizer():
    return BertTokenizerFast(vocab={word: i for i, word in enumerate(WORDS.split())}, do_lower_case=True)


@pytest.fixture
def make_model(make_settings, tokenizer):
    """A tiny random HACAN in evaluation mode, the same one each time; `settings` changes come by name."""

    def make(**updates):
        torch.manual_seed(0)
        settings = make_settings(**updates)
        return build_model(
            settings.model, image_size=settings.data.image_size, score_memory=64, tokenizer=tokenizer
        ).eval()

    return make


@pytest.fixture
def pixels():
    """3 images."""
    return torch.randn(3, 3, IMAGE_SIZE, IMAGE_SIZE, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def captions():
    """Token ids [7, 6] and mask [7, 6] of 7 captions of 2 to 6 tokens."""
    mask = torch.arange(6) < torch.tensor([6, 2, 4, 5, 3, 6, 2])[:, None]
    ids = torch.randint(5, len(WORDS.split()), mask.shape, generator=torch.Generator().manual_seed(2))
    return ids * mask, mask
