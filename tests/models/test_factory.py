"""From settings to modules: weights from every accepted kind of file, and errors that say what to do."""

import json
import logging

import pytest
import timm
import torch
from huggingface_hub import constants
from references import original_convnext, original_convnext_state
from safetensors.torch import save_file
from transformers import BertConfig, BertModel

from hacan.errors import UserError
from hacan.models import weights
from hacan.models.factory import build_model

DEPTHS, DIMS = [1, 1, 2, 1], [8, 12, 20, 28]


class Words:
    """The part of a tokenizer that the model needs."""

    pad_token_id = 3

    def __init__(self, count):
        self.count = count

    def __len__(self):
        return self.count


def test_settings_reach_the_modules(make_model):
    model = make_model(embed_dim=14, direction="i2t", lambda_softmax=4.0, focal_type="equal", activation="tanh")
    assert model.project_image_mid.weight.shape == (14, 20) and model.project_image_high.weight.shape == (14, 28)
    assert model.project_text_mid.weight.shape == model.project_text_high.weight.shape == (14, 24)
    assert (model.alignment.direction, model.alignment.lambda_softmax) == ("i2t", 4.0)
    assert model.alignment.focal_type == "equal" and model.alignment.score_memory == 64
    assert isinstance(model.aggregate_text.activation, torch.nn.Tanh)
    assert type(make_model(alignment="revised", loss="GCD_revised").alignment).__name__ == "RevisedAlignment"


def test_a_random_text_encoder_has_the_tokenizers_vocabulary(make_settings):
    model = build_model(make_settings().model, image_size=64, score_memory=64, tokenizer=Words(33))
    embedding = model.text_encoder.backbone.embeddings.word_embeddings
    assert embedding.num_embeddings == 33 and embedding.padding_idx == model.text_encoder.pad_id == 3


def test_a_tokenizer_with_more_words_than_the_encoder_is_named(make_settings):
    settings = make_settings(text_encoder_args={**make_settings().model.text_encoder_args, "vocab_size": 20})
    with pytest.raises(UserError, match=r"tokenizer has 21 tokens.*only 20"):
        build_model(settings.model, image_size=64, score_memory=64, tokenizer=Words(21))


# ------------------------------------------------------------------------------------------------------------ image


def timm_state():
    torch.manual_seed(5)
    return timm.create_model("convnext_atto", num_classes=9, depths=DEPTHS, dims=DIMS).state_dict()


def image_tensors(model):
    encoder = model.image_encoder
    norm = {f"head.norm.{key}": value for key, value in encoder.final_norm.state_dict().items()}
    return {**encoder.backbone.state_dict(), **norm}


@pytest.mark.parametrize("kind", ["plain.pth", "wrapped.pth", "parallel.bin", "file.safetensors"])
def test_image_weights_in_timms_naming(make_model, tmp_path, kind):
    state, path = timm_state(), tmp_path / kind
    if kind == "plain.pth":
        torch.save(state, path)
    elif kind == "wrapped.pth":
        torch.save({"epoch": 3, "state_dict": state}, path)
    elif kind == "parallel.bin":
        torch.save({"state_dict": {f"module.{key}": value for key, value in state.items()}}, path)
    else:
        save_file(state, path)
    found = image_tensors(make_model(image_weights=str(path)))
    assert len(found) == len(state) - 2  # less the classifier
    assert all(torch.equal(found[key], state[key]) for key in found)


@pytest.mark.parametrize("name", ["convnext_atto", "convnext_base"])  # 1 x 1 convolutions in its blocks, and Linears
def test_image_weights_in_the_original_convnext_naming(make_model, tmp_path, pixels, name):
    torch.manual_seed(6)
    state = original_convnext_state(DEPTHS, DIMS, classes=11)
    assert {"downsample_layers.0.0.weight", "stages.2.1.dwconv.weight", "stages.2.1.pwconv1.bias"} < set(state)
    torch.save({"model": state}, tmp_path / "convnext.pth")
    features = make_model(image_encoder=name, image_weights=str(tmp_path / "convnext.pth")).image_encoder(pixels)
    mid, high, pooled = original_convnext(state, pixels, DEPTHS)
    for found, expected in ((features.mid, mid), (features.high, high)):
        torch.testing.assert_close(found, expected.flatten(2).transpose(1, 2), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(features.pooled, pooled, rtol=1e-4, atol=1e-4)


def test_position_embeddings_are_resampled_to_the_image_size(make_model, tmp_path):
    arguments = {"depth": 2, "embed_dim": 24, "num_heads": 2}
    state = timm.create_model("vit_tiny_patch16_224", img_size=48, **arguments).state_dict()
    torch.save(state, tmp_path / "vit.pth")
    model = make_model(
        image_encoder="vit_tiny_patch16_224", image_encoder_args=arguments, image_weights=str(tmp_path / "vit.pth")
    )
    assert model.image_encoder.backbone.pos_embed.shape == (1, 1 + 16, 24)  # [CLS], and 4 x 4 for 64 pixels
    assert torch.equal(model.image_encoder.backbone.blocks[1].attn.qkv.weight, state["blocks.1.attn.qkv.weight"])


def test_image_weights_of_another_shape_name_file_key_and_shapes(make_model, tmp_path):
    torch.save({"model": original_convnext_state(DEPTHS, [8, 12, 24, 28], classes=5)}, tmp_path / "other.pth")
    with pytest.raises(UserError) as error:
        make_model(image_weights=str(tmp_path / "other.pth"))
    for part in (
        str(tmp_path / "other.pth"),
        "stages.2.downsample.1.bias is [24], expected [20]",
    ):
        assert part in str(error.value)


def test_image_weights_of_another_architecture_name_file_and_keys(make_model, tmp_path):
    torch.save(timm.create_model("resnet18").state_dict(), tmp_path / "resnet.pth")
    with pytest.raises(UserError, match=r"resnet.pth lacks .* tensors of ConvNeXt: stem.0.weight.*conv1.weight"):
        make_model(image_weights=str(tmp_path / "resnet.pth"))


# ------------------------------------------------------------------------------------------------------------- text

SIZES = {"vocab_size": 40, "hidden_size": 128, "num_hidden_layers": 2, "intermediate_size": 30}


def bert(**updates):
    torch.manual_seed(7)
    return BertModel(BertConfig(**SIZES, num_attention_heads=2, max_position_embeddings=20, **updates)).eval()


def old_names(state):
    """As the first BERT files have them: `bert.` in front, LayerNorm gamma and beta, heads of pretraining beside."""
    renamed = {}
    for key, value in state.items():
        key = key.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")
        renamed[f"bert.{key}"] = value
    return {**renamed, "cls.predictions.bias": torch.zeros(40)}


def same_features(model, twin, captions):
    ids, mask = captions
    expected = twin(input_ids=ids, attention_mask=mask.long())
    found = model.text_encoder(ids, mask)
    torch.testing.assert_close(found.high, expected.last_hidden_state)
    torch.testing.assert_close(found.pooled, expected.pooler_output)


def test_a_hugging_face_folder_as_text_encoder(make_model, tmp_path, captions):
    bert().save_pretrained(tmp_path / "folder")
    model = make_model(text_encoder=str(tmp_path / "folder"), text_weights="pretrained", text_encoder_args={})
    same_features(model, bert(), captions)


def test_a_folder_of_the_old_naming(make_model, tmp_path, captions):
    bert().config.save_pretrained(tmp_path)
    torch.save(old_names(bert().state_dict()), tmp_path / "pytorch_model.bin")
    model = make_model(text_weights=str(tmp_path), text_encoder_args={})
    same_features(model, bert(), captions)


def test_a_folder_whose_weights_are_cut_into_files(make_model, tmp_path, captions):
    state = bert().state_dict()
    bert().config.save_pretrained(tmp_path)
    halves = {"one.safetensors": list(state)[::2], "two.safetensors": list(state)[1::2]}
    for name, keys in halves.items():
        save_file({key: state[key].contiguous() for key in keys}, tmp_path / name)
    index = {"weight_map": {key: name for name, keys in halves.items() for key in keys}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    same_features(make_model(text_weights=str(tmp_path), text_encoder_args={}), bert(), captions)


@pytest.mark.parametrize("names", [dict, old_names])
def test_a_lone_file_tells_the_sizes_of_its_bert(make_model, tmp_path, captions, names):
    torch.save(names(bert().state_dict()), tmp_path / "bert.bin")
    model = make_model(text_weights=str(tmp_path / "bert.bin"), text_encoder_args={})
    assert model.text_encoder.backbone.config.num_attention_heads == 2  # 64 wide each
    same_features(model, bert(), captions)


def test_text_encoder_args_go_over_what_a_file_tells(make_model, tmp_path):
    torch.save(bert().state_dict(), tmp_path / "bert.bin")
    arguments = {"num_attention_heads": 8, "hidden_dropout_prob": 0.3}
    config = make_model(
        text_weights=str(tmp_path / "bert.bin"), text_encoder_args=arguments
    ).text_encoder.backbone.config
    assert (config.num_attention_heads, config.hidden_dropout_prob) == (8, 0.3)


def test_half_precision_files_are_computed_in_float32(make_model, tmp_path):
    bert().half().save_pretrained(tmp_path / "half")
    model = make_model(text_encoder=str(tmp_path / "half"), text_weights="pretrained", text_encoder_args={})
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_a_missing_pooler_is_an_error(make_model, tmp_path, caplog):
    state = {key: value for key, value in bert().state_dict().items() if not key.startswith("pooler.")}
    torch.save(state, tmp_path / "headless.bin")
    with caplog.at_level(logging.WARNING):
        make_model(text_weights=str(tmp_path / "headless.bin"), text_encoder_args={})
    assert "has no pooler: pooler.dense.weight, pooler.dense.bias start at random" in caplog.text


def test_text_weights_of_another_shape_name_file_key_and_shapes(make_model, tmp_path):
    bert().save_pretrained(tmp_path / "folder")
    with pytest.raises(UserError) as error:
        make_model(text_weights=str(tmp_path / "folder"), text_encoder_args={"intermediate_size": 31})
    assert f"text_weights={tmp_path / 'folder'} has" in str(error.value)
    assert "encoder.layer.0.intermediate.dense.weight is [30, 128], expected [31, 128]" in str(error.value)


def test_a_file_that_is_no_bert_says_so(make_model, tmp_path):
    torch.save(timm_state(), tmp_path / "image.pth")
    with pytest.raises(UserError, match=r"image.pth has no config.json beside it.*not those of a BERT.*stem.0.weight"):
        make_model(text_weights=str(tmp_path / "image.pth"))


# ----------------------------------------------------------------------------------------------------------- errors


@pytest.fixture
def nothing_cached(monkeypatch, tmp_path):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return str(tmp_path / "hub")


@pytest.mark.parametrize(
    ("updates", "which", "remedy"),
    [
        (
            {"image_encoder": "convnext_atto.d2_in1k", "image_weights": "pretrained", "image_encoder_args": {}},
            "no weights for image_encoder='convnext_atto.d2_in1k': timm/convnext_atto.d2_in1k",
            "image_weights=PATH",
        ),
        (
            {"text_encoder": "bert-base-uncased", "text_weights": "pretrained", "text_encoder_args": {}},
            "no weights for text_encoder='bert-base-uncased'",
            "text_weights=PATH",
        ),
    ],
)
def test_offline_with_nothing_cached(make_model, nothing_cached, updates, which, remedy):
    with pytest.raises(UserError) as error:
        make_model(**updates)
    text = str(error.value)
    assert which in text and nothing_cached in text and remedy in text and "\n" not in text


@pytest.mark.parametrize(
    ("updates", "expected"),
    [
        ({"image_encoder": "convnext_bas"}, r"image_encoder='convnext_bas': timm has no such model.*convnext_base"),
        ({"image_encoder": "convnext_atto.nosuch"}, r"no such weights; the names with weights are convnext_atto\."),
        ({"image_encoder_args": {"widths": [3]}}, r"image_encoder_args=.*'widths'.*does not take them"),
        ({"image_weights": "nosuch.pth"}, r"image_weights=nosuch.pth: there is no such file or folder"),
        ({"text_weights": "nosuch"}, r"text_weights=nosuch: there is no such file or folder"),
        ({"text_encoder": "nosuch"}, r"text_encoder='nosuch'.*expected a model type of transformers"),
        ({"text_encoder": "t5", "text_encoder_args": {}}, r"type 't5': expected a bidirectional encoder"),
        ({"text_encoder": "gpt2", "text_encoder_args": {}}, r"type 'gpt2': expected a bidirectional encoder"),
        ({"text_encoder_args": {"hidden_sise": 8}}, r"config of 'bert' has no 'hidden_sise'; did you mean hidden_size"),
        ({"text_encoder_args": {"hidden_size": 25}}, r"cannot be built: .*25.*attention heads"),
    ],
)
def test_wrong_names_and_arguments(make_model, nothing_cached, updates, expected):
    with pytest.raises(UserError, match=expected) as error:
        make_model(**updates)
    assert "\n" not in str(error.value)


def test_a_folder_without_weights_or_config(make_model, tmp_path):
    with pytest.raises(UserError, match=r"has no weights: expected one of model.safetensors, pytorch_model.bin"):
        make_model(text_weights=str(tmp_path))
    with pytest.raises(UserError, match=r"has no config.json of a transformers encoder"):
        make_model(text_encoder=str(tmp_path), text_encoder_args={})


def test_images_that_the_backbone_cannot_take(make_model):
    with pytest.raises(
        UserError, match=r"image_encoder='vit_tiny_patch16_224'.*image_size=32|image_size=32.*'vit_tiny"
    ):
        make_model(
            image_encoder="vit_tiny_patch16_224", image_encoder_args={"depth": 2, "patch_size": 64}, image_size=32
        )


def test_without_weights_neither_hub_nor_files_are_needed(make_settings, nothing_cached):
    settings = make_settings(
        image_weights="gone.pth", text_encoder="bert-base-uncased", text_weights="pretrained", text_encoder_args={}
    )
    config = bert().config.to_dict()
    model = build_model(settings.model, image_size=64, score_memory=64, load_weights=False, text_config=config)
    assert model.text_encoder.backbone.config.hidden_size == 128


@pytest.mark.parametrize(
    ("reachable", "proxy", "offline"), [(False, {}, True), (True, {}, False), (False, {"https": "x"}, False)]
)
def test_the_hub_is_not_asked_without_a_network(monkeypatch, tmp_path, caplog, reachable, proxy, offline):
    """huggingface_hub retries for about a minute otherwise."""

    class Connection:
        def close(self):
            pass

    def connect(address, timeout):
        asked.append(address)
        if not reachable:
            raise OSError("Name or service not known")
        return Connection()

    asked = []
    monkeypatch.setattr(weights.socket, "create_connection", connect)
    monkeypatch.setattr(weights, "getproxies", lambda: proxy)
    monkeypatch.setattr(weights.hub, "HF_HUB_OFFLINE", False)
    weights.check_hub(str(tmp_path))
    assert not asked
    weights.check_hub(str(tmp_path), "bert-base-uncased")
    assert offline == weights.hub.HF_HUB_OFFLINE and ("cannot be reached" in caplog.text) == offline
    assert asked == ([] if proxy else [("huggingface.co", 443)])
