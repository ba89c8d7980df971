"""The backbones: widths, levels, grids and global vectors of several families, against their literal forms."""

import pytest
import timm
import torch
from timm.layers import LayerNorm2d
from transformers import AutoConfig, AutoModel

from hacan.errors import UserError
from hacan.models.image_encoder import ImageEncoder
from hacan.models.text_encoder import TextEncoder

# name, arguments, image size -> grids and widths of (mid, high) and the final norm, by timm's own documentation
IMAGE_BACKBONES = {
    "convnext_atto": (
        {"depths": (1, 1, 1, 1), "dims": (8, 12, 20, 28)}, 64, (4, 4), (2, 2), (20, 28), "head.norm"
    ),
    "tf_efficientnet_lite0": ({}, 64, (4, 4), (2, 2), (112, 320), None),
    "vit_tiny_patch16_224": ({"depth": 3, "img_size": 48}, 48, (3, 3), (3, 3), (192, 192), "norm"),
    "vit_base_patch16_clip_224": (
        {"depth": 2, "img_size": 48, "embed_dim": 24, "num_heads": 2}, 48, (3, 3), (3, 3), (24, 24), "norm"
    ),
    "resnet18": ({}, 64, (4, 4), (2, 2), (256, 512), None),
}  # fmt: skip


def image_backbone(name):
    torch.manual_seed(0)
    return timm.create_model(name, num_classes=0, **IMAGE_BACKBONES[name][0])


@pytest.mark.parametrize("name", IMAGE_BACKBONES)
def test_image_levels_have_the_widths_and_grids_of_the_backbone(name):
    _, size, mid_grid, high_grid, widths, _ = IMAGE_BACKBONES[name]
    encoder = ImageEncoder(backbone=image_backbone(name), levels=(-2, -1)).eval()
    features = encoder(torch.randn(3, 3, size, size))
    assert (encoder.mid_width, encoder.high_width) == widths
    assert (features.mid_grid, features.high_grid) == (mid_grid, high_grid)
    assert features.mid.shape == (3, mid_grid[0] * mid_grid[1], widths[0])
    assert features.high.shape == (3, high_grid[0] * high_grid[1], widths[1])
    assert features.pooled.shape == (3, widths[1])


@pytest.mark.parametrize("name", IMAGE_BACKBONES)
def test_image_features_are_those_of_the_whole_backbone(name):
    _, size, _, _, _, norm_path = IMAGE_BACKBONES[name]
    pixels = torch.randn(3, 3, size, size)
    whole = image_backbone(name).eval()
    norm = whole.get_submodule(norm_path) if norm_path else None
    mid, high = whole.forward_intermediates(pixels, indices=2, intermediates_only=True)
    features = ImageEncoder(backbone=image_backbone(name), levels=(-2, -1)).eval()(pixels)
    torch.testing.assert_close(features.mid, mid.flatten(2).transpose(1, 2))
    torch.testing.assert_close(features.high, high.flatten(2).transpose(1, 2))
    pooled = high.sum(dim=(2, 3)) / (high.shape[2] * high.shape[3])
    if norm is not None:  # (x - mean) / sqrt(variance + eps) * weight + bias, over the channels
        centred = pooled - pooled.mean(dim=1, keepdim=True)
        pooled = centred / (centred.square().mean(dim=1, keepdim=True) + norm.eps).sqrt() * norm.weight + norm.bias
    torch.testing.assert_close(features.pooled, pooled)


def test_convnext_global_vector_is_what_timm_feeds_its_head():
    whole = image_backbone("convnext_atto").eval()
    pixels = torch.randn(3, 3, 64, 64)
    expected = whole(pixels)  # without classes: pooled and normalised
    features = ImageEncoder(backbone=whole, levels=(-2, -1)).eval()(pixels)
    torch.testing.assert_close(features.pooled, expected)


def test_regions_are_in_row_major_order():
    encoder = ImageEncoder(backbone=image_backbone("convnext_atto"), levels=(-2, -1)).eval()
    features = encoder(torch.randn(3, 3, 64, 96))
    assert features.mid_grid == (4, 6) and features.high_grid == (2, 3)
    high = encoder.backbone.forward_intermediates(torch.zeros(1, 3, 64, 96), indices=[3], intermediates_only=True)[0]
    regions = encoder(torch.zeros(1, 3, 64, 96)).high
    for row in range(2):
        for column in range(3):
            torch.testing.assert_close(regions[0, row * 3 + column], high[0, :, row, column])


def test_vit_regions_leave_the_prefix_tokens_out():
    backbone = image_backbone("vit_tiny_patch16_224").eval()
    assert backbone.num_prefix_tokens == 1
    pixels = torch.randn(2, 3, 48, 48)
    tokens = []
    hook = backbone.blocks[-1].register_forward_hook(lambda module, inputs, output: tokens.append(output))
    features = ImageEncoder(backbone=backbone, levels=(-2, -1)).eval()(pixels)
    hook.remove()
    torch.testing.assert_close(features.high, tokens[0][:, 1:])


def test_no_parameter_is_without_use():
    """Unused parameters would block DDP and enlarge checkpoints."""
    for name, (_, size, *_) in IMAGE_BACKBONES.items():
        encoder = ImageEncoder(backbone=image_backbone(name), levels=(-2, -1))
        features = encoder(torch.randn(2, 3, size, size))
        (features.high.sum() + features.mid.sum() + features.pooled.square().sum()).backward()
        idle = [key for key, parameter in encoder.named_parameters() if parameter.grad is None]
        assert idle == [], name


def test_lower_levels_cut_the_rest_off():
    encoder = ImageEncoder(backbone=image_backbone("convnext_atto"), levels=(1, 2)).eval()
    assert (encoder.mid_width, encoder.high_width) == (12, 20)
    assert encoder.final_norm is None  # the head's norm is for the last stage's width
    assert encoder(torch.randn(2, 3, 64, 64)).high_grid == (4, 4)


@pytest.mark.parametrize("levels", [(-1, -2), (-1, -1), (2, 4), (-5, -1)])
def test_wrong_image_levels_are_named(levels):
    with pytest.raises(UserError, match=r"image_levels=\[.*4 feature levels of image_encoder='tiny'"):
        ImageEncoder(backbone=image_backbone("convnext_atto"), levels=levels, name="tiny")


def test_a_backbone_without_levels_is_named():
    with pytest.raises(UserError, match=r"image_encoder='plain' .* has no feature levels"):
        ImageEncoder(backbone=torch.nn.Linear(3, 4), levels=(-2, -1), name="plain")


def test_final_norm_leaves_the_backbone():
    encoder = ImageEncoder(backbone=image_backbone("convnext_atto"), levels=(-2, -1))
    assert isinstance(encoder.final_norm, LayerNorm2d)
    assert not [key for key in encoder.state_dict() if key.startswith("backbone.head")]


# ------------------------------------------------------------------------------------------------------------- text

BERT = {"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 40, "vocab_size": 30}
TEXT_BACKBONES = {
    "bert": (BERT, True),
    "roberta": (BERT, True),
    "mpnet": (BERT, True),
    "albert": (BERT | {"embedding_size": 10}, True),
    "electra": (BERT | {"embedding_size": 24}, False),
    "distilbert": ({"dim": 24, "n_layers": 3, "n_heads": 4, "hidden_dim": 40, "vocab_size": 30}, False),
}


def text_encoder(name, levels=(-2, -1), **updates):
    torch.manual_seed(0)
    backbone = AutoModel.from_config(AutoConfig.for_model(name, **(TEXT_BACKBONES[name][0] | updates)))
    return TextEncoder(backbone=backbone, levels=levels, name=name).eval()


@pytest.mark.parametrize("name", TEXT_BACKBONES)
def test_text_levels_and_global_vector(name, captions):
    encoder = text_encoder(name)
    ids, mask = captions
    features = encoder(ids, mask)
    assert encoder.width == 24 and encoder.has_pooler == TEXT_BACKBONES[name][1]
    assert features.high.shape == features.mid.shape == (7, 6, 24) and features.pooled.shape == (7, 24)
    ids = torch.where(mask, ids, encoder.pad_id)
    outputs = encoder.backbone(input_ids=ids, attention_mask=mask.long(), output_hidden_states=True)
    torch.testing.assert_close(features.high, outputs.hidden_states[3])
    torch.testing.assert_close(features.mid, outputs.hidden_states[2])
    pooled = outputs.pooler_output if TEXT_BACKBONES[name][1] else outputs.last_hidden_state[:, 0]
    torch.testing.assert_close(features.pooled, pooled)
    assert not torch.equal(features.high, features.mid)


@pytest.mark.parametrize("name", TEXT_BACKBONES)
def test_padding_changes_nothing(name, captions):
    encoder = text_encoder(name)
    ids, mask = captions
    features = encoder(ids, mask)
    wider_ids = torch.cat([ids, torch.randint(5, 18, (7, 3))], dim=1)  # whatever stands there
    wider_ids = torch.where(torch.cat([mask, torch.zeros(7, 3, dtype=torch.bool)], dim=1), wider_ids, 11)
    wider = encoder(wider_ids, torch.cat([mask, torch.zeros(7, 3, dtype=torch.bool)], dim=1))
    torch.testing.assert_close(wider.pooled, features.pooled)
    torch.testing.assert_close(wider.high[:, :6][mask], features.high[mask])
    torch.testing.assert_close(wider.mid[:, :6][mask], features.mid[mask])


@pytest.mark.parametrize("name", TEXT_BACKBONES)
def test_a_batch_of_one_is_a_row_of_a_batch(name, captions):
    encoder = text_encoder(name)
    ids, mask = captions
    features = encoder(ids, mask)
    for row in range(7):
        own = mask[row].sum()
        alone = encoder(ids[row : row + 1, :own], mask[row : row + 1, :own])
        torch.testing.assert_close(alone.high[0], features.high[row, :own])
        torch.testing.assert_close(alone.pooled[0], features.pooled[row])


def test_a_caption_of_padding_alone_is_finite_and_harms_no_other(captions):
    encoder = text_encoder("bert")
    ids, mask = captions
    features = encoder(ids, mask)
    empty = mask.clone()
    empty[4] = False
    with_empty = encoder(ids, empty)
    assert all(torch.isfinite(value).all() for value in with_empty)
    others = torch.arange(7) != 4
    torch.testing.assert_close(with_empty.pooled[others], features.pooled[others])


def test_no_text_parameter_is_without_use(captions):
    for name in TEXT_BACKBONES:
        encoder = text_encoder(name).train()
        features = encoder(*captions)
        (features.high.sum() + features.mid.sum() + features.pooled.square().sum()).backward()
        assert [key for key, parameter in encoder.named_parameters() if parameter.grad is None] == [], name


def test_the_papers_text_levels_are_layers_10_and_12_of_12(captions):
    encoder = text_encoder("bert", levels=(-3, -1), num_hidden_layers=12)
    ids, mask = captions
    states = encoder.backbone(input_ids=ids, attention_mask=mask.long(), output_hidden_states=True).hidden_states
    features = encoder(ids, mask)
    torch.testing.assert_close(features.mid, states[10])
    torch.testing.assert_close(features.high, states[12])


def test_captions_beyond_the_positions_are_named():
    encoder = text_encoder("roberta", max_position_embeddings=12)
    assert encoder.max_tokens == 10  # RoBERTa keeps the positions up to its pad id
    ids = torch.full((2, 10), 5)
    assert torch.isfinite(encoder(ids, torch.ones(2, 10, dtype=torch.bool)).high).all()
    with pytest.raises(UserError, match=r"captions of 11 tokens.*'roberta'.*max_text_len=10"):
        encoder(torch.full((2, 11), 5), torch.ones(2, 11, dtype=torch.bool))


def test_wrong_text_levels_are_named():
    with pytest.raises(UserError, match=r"text_levels=\[-5, -1\].*'bert' has 4 hidden states"):
        text_encoder("bert", levels=(-5, -1))
