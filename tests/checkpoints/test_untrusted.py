"""Checkpoints and folders of strangers: no code of theirs runs, and damage is noticed."""

import json
import sys

import pytest
import torch
from transformers import BertConfig, BertModel

from datamodules.tokens import load_tokenizer
from hacan.checkpoints.checkpoint import DESCRIPTION, describe_model, tokenizer_from_description
from hacan.checkpoints.loading import open_checkpoint
from hacan.checkpoints.pretrained import Pretrained, export
from hacan.errors import UserError
from hacan.models.factory import build_model

CODE = "import pathlib\npathlib.Path({marker!r}).touch()\nclass Tok: pass\n"
AUTO_MAP = {"AutoTokenizer": ["tok.Tok", "tok.Tok"], "AutoModel": "tok.Tok", "AutoConfig": "tok.Tok"}


@pytest.fixture
def no_questions(monkeypatch):
    """transformers asks "[y/N]" before it runs code, unless it is told not to."""

    def asked(*_):
        raise AssertionError("asked a question")

    monkeypatch.setattr("builtins.input", asked)
    yield
    assert "tok" not in sys.modules


@pytest.fixture
def folder(tmp_path, tokenizer):
    """A tokenizer's folder whose config names code beside it."""
    place = tmp_path / "stranger"
    tokenizer.save_pretrained(place)
    config = json.loads((place / "tokenizer_config.json").read_text()) | {
        "auto_map": AUTO_MAP,
        "tokenizer_class": "Tok",
    }
    (place / "tokenizer_config.json").write_text(json.dumps(config))
    (place / "tok.py").write_text(CODE.format(marker=str(tmp_path / "ran")))
    return place


def test_code_in_a_tokenizers_folder_does_not_run(folder, tmp_path, no_questions):
    try:
        load_tokenizer(str(folder))
    except UserError as error:
        assert "\n" not in str(error)
    assert not (tmp_path / "ran").exists()


@pytest.fixture
def checkpoint(tmp_path, folder, make_model, make_settings, tokenizer):
    """A checkpoint of ours whose description holds code and names it."""
    model = make_model()
    description = describe_model(model, make_settings(), tokenizer)
    description["tokenizer"] |= {file.name: file.read_text() for file in folder.iterdir() if file.suffix != ".txt"}
    description["tokenizer"]["../../escaped.json"] = "{}"
    description["text_config"] |= {"auto_map": AUTO_MAP, "_attn_implementation": "stranger/kernel"}
    path = tmp_path / "run" / "stranger.ckpt"
    path.parent.mkdir()
    torch.save({DESCRIPTION: description, "state_dict": model.state_dict()}, path)
    return path


def test_code_in_a_checkpoint_does_not_run_and_is_not_exported(checkpoint, tmp_path, no_questions):
    opened = open_checkpoint(checkpoint)
    assert tokenizer_from_description(opened.description)("a b")["input_ids"]
    assert opened.model.text_encoder.backbone.config._attn_implementation != "stranger/kernel"
    names = {path.name for path in export(checkpoint, tmp_path / "out")}
    assert "tok.py" not in names and "tokenizer.json" in names and not (tmp_path / "out" / "tok.py").exists()
    assert "auto_map" not in (tmp_path / "out" / "tokenizer_config.json").read_text()
    Pretrained.load(tmp_path / "out")
    assert not (tmp_path / "ran").exists() and not list(tmp_path.rglob("escaped.json"))


def test_a_folder_of_a_text_encoder_cannot_name_code(tmp_path, make_settings, tokenizer, no_questions):
    sizes = {"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 32}
    BertModel(BertConfig(vocab_size=len(tokenizer), **sizes)).save_pretrained(tmp_path / "bert")
    config = json.loads((tmp_path / "bert" / "config.json").read_text())
    config |= {"auto_map": AUTO_MAP, "_attn_implementation": "stranger/kernel"}
    (tmp_path / "bert" / "config.json").write_text(json.dumps(config))
    (tmp_path / "bert" / "tok.py").write_text(CODE.format(marker=str(tmp_path / "ran")))
    settings = make_settings(text_encoder=str(tmp_path / "bert"), text_weights="pretrained", text_encoder_args="")
    model = build_model(settings.model, image_size=64, score_memory=64, tokenizer=tokenizer)
    assert model.text_encoder.backbone.config._attn_implementation in ("sdpa", "eager")
    assert not (tmp_path / "ran").exists()


def test_a_flipped_byte_is_noticed(checkpoint, tmp_path):
    """Either the file is refused, or the byte had no meaning and all tensors are equal."""
    original, data = open_checkpoint(checkpoint).model.state_dict(), checkpoint.read_bytes()
    generator = torch.Generator().manual_seed(0)
    refused = 0
    for place in torch.randint(0, len(data), (40,), generator=generator).tolist():
        changed = bytearray(data)
        changed[place] ^= 0x10
        path = tmp_path / "flipped.ckpt"
        path.write_bytes(changed)
        try:
            found = open_checkpoint(path).model.state_dict()
        except UserError as error:
            refused += 1
            assert "flipped.ckpt" in str(error) and "\n" not in str(error)
        else:
            assert all(torch.equal(found[name], value) for name, value in original.items()), place
    assert refused >= 20


def test_the_damaged_record_is_named(checkpoint):
    weights = next(iter(open_checkpoint(checkpoint).model.state_dict().values())).numpy().tobytes()[:64]
    data = checkpoint.read_bytes()
    place = data.index(weights)
    checkpoint.write_bytes(data[:place] + bytes(64) + data[place + 64 :])
    with pytest.raises(UserError, match=r"stranger.ckpt is damaged: its record stranger/data/\d+ does not have"):
        open_checkpoint(checkpoint)
