import json

import numpy as np
import pytest
import torch
from bad_json import error_of
from hypothesis import given, settings
from hypothesis import strategies as st

from datamodules.loader import Pair, PairCollator, UnreadableImage, pad_tokens
from datamodules.scenes import scenes_vocabulary
from datamodules.tokens import load_tokenizer, tokenise
from hacan.images.preprocessing import normalise

TOKENIZER = load_tokenizer("scenes")
CLS, SEP, PAD, UNK = (TOKENIZER.convert_tokens_to_ids(token) for token in ("[CLS]", "[SEP]", "[PAD]", "[UNK]"))


def ids(*words):
    return TOKENIZER.convert_tokens_to_ids(list(words))


# tokens


def test_tokens_are_lower_case_word_pieces_between_cls_and_sep():
    table = tokenise(["A RED circle.", "Éa", "circle"], TOKENIZER, max_text_len=32)
    assert table[0].tolist() == [CLS, *ids("a", "red", "circle", "."), SEP]
    assert table[1].tolist() == [CLS, *ids("e", "##a"), SEP]
    assert table.lengths.tolist() == [6, 4, 3] and len(table) == 3 and table.padding_id == PAD


def test_long_captions_are_cut_before_sep():
    table = tokenise(["red " * 10_000, "red " * 5, "red " * 6], TOKENIZER, max_text_len=7)
    assert table[0].tolist() == table[1].tolist() == [CLS, *ids("red") * 5, SEP]
    assert table[2].tolist() == [CLS, *ids("red") * 5, SEP]


def test_odd_captions():
    table = tokenise(["", "  \n", "\0", "\U0001f600", "\ud83d", "a\0b"], TOKENIZER, max_text_len=9)
    assert table[0].tolist() == table[1].tolist() == table[2].tolist() == [CLS, SEP]
    assert table[3].tolist() == [CLS, UNK, SEP]
    assert table[4].tolist() == [CLS, *ids("?"), SEP]
    assert table[5].tolist() == [CLS, *ids("a", "##b"), SEP]


def test_no_captions_at_all():
    table = tokenise([], TOKENIZER, max_text_len=9)
    assert len(table) == 0 and len(table.ids) == 0


def test_tokenising_in_parts_changes_nothing(monkeypatch):
    captions = ["red " * (i % 5) for i in range(23)]
    whole = tokenise(captions, TOKENIZER, max_text_len=6)
    monkeypatch.setattr("datamodules.tokens._AT_ONCE", 4)
    parts = tokenise(captions, TOKENIZER, max_text_len=6)
    assert np.array_equal(whole.ids, parts.ids) and np.array_equal(whole.offsets, parts.offsets)


@settings(max_examples=60, deadline=None)
@given(captions=st.lists(st.text(), min_size=1, max_size=4))
def test_any_text_becomes_tokens_within_bounds(captions):
    table = tokenise(captions, TOKENIZER, max_text_len=5)
    for caption in range(len(captions)):
        tokens = table[caption]
        assert 2 <= len(tokens) <= 5 and tokens[0] == CLS and tokens[-1] == SEP


# loading tokenizers


def test_a_vocabulary_file_and_its_folder_give_the_same_tokenizer(tmp_path):
    (tmp_path / "vocab.txt").write_text("\n".join(scenes_vocabulary()) + "\n", encoding="utf-8")
    for place in (tmp_path, tmp_path / "vocab.txt"):
        tokenizer = load_tokenizer(str(place))
        assert tokenizer("A big CIRCLE").input_ids == TOKENIZER("A big CIRCLE").input_ids


def test_a_saved_tokenizer_is_loaded_from_its_folder(tmp_path):
    TOKENIZER.save_pretrained(tmp_path)
    assert load_tokenizer(str(tmp_path))("a red circle!").input_ids == TOKENIZER("a red circle!").input_ids


def test_tokenizers_that_are_not_there_are_looked_for_aloud(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    message = error_of(load_tokenizer, "no-such-model-here")
    assert "'no-such-model-here'" in message and "hub" in message and "tokenizer=PATH" in message
    assert "no such file" in error_of(load_tokenizer, str(tmp_path / "nowhere"))
    assert "no such file" in error_of(load_tokenizer, "vocab_that_is_not_there.txt")
    assert "no tokenizer.json and no vocab.txt" in error_of(load_tokenizer, str(tmp_path))


@pytest.mark.parametrize(
    ("name", "content", "part"),
    [
        ("vocab.txt", b"[PAD]\n[UNK]\ncircle\n", "lacks [CLS], [SEP]"),
        ("vocab.txt", b"\xff\xfe", "cannot be read"),
        ("tokenizer.json", b"{", "could not be loaded"),
        ("tokenizer.json", b'{"version": "1.0"}', "could not be loaded"),
    ],
)
def test_broken_tokenizer_files_are_named(tmp_path, name, content, part):
    (tmp_path / name).write_bytes(content)
    message = error_of(load_tokenizer, str(tmp_path))
    assert str(tmp_path) in message and part in message


def test_a_tokenizer_without_padding_is_refused(tmp_path):
    TOKENIZER.save_pretrained(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    path.write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    assert "padding token" in error_of(load_tokenizer, str(tmp_path))


# collating


def test_padding_goes_to_the_longest_caption_of_the_batch():
    captions = [np.array(tokens, np.int32) for tokens in ([5, 6], [7, 8, 9, 10], [11, 12, 13])]
    token_ids, mask = pad_tokens(captions, padding_id=99)
    assert token_ids.tolist() == [[5, 6, 99, 99], [7, 8, 9, 10], [11, 12, 13, 99]]
    assert mask.tolist() == [[True, True, False, False], [True] * 4, [True, True, True, False]]
    assert token_ids.dtype == torch.int64 and mask.dtype == torch.bool
    assert pad_tokens([], padding_id=0)[0].shape == (0, 0)


def item(number, width):
    pixels = torch.randint(0, 256, (3, 5, 7), dtype=torch.uint8, generator=torch.Generator().manual_seed(number))
    return Pair(pixels, np.arange(width, dtype=np.int32), image_id=number * 10, caption_id=number)


def test_a_batch_leaves_bad_images_out_and_reports_them():
    bad = UnreadableImage("x.jpg", "image x.jpg cannot be decoded")
    batch, found = PairCollator(padding_id=0, image_size=7)([item(1, 2), bad, item(2, 4), item(3, 3)])
    assert found == [bad]
    assert batch.image_ids.tolist() == [10, 20, 30] and batch.caption_ids.tolist() == [1, 2, 3]
    assert batch.token_mask.sum(dim=1).tolist() == [2, 4, 3] and batch.token_ids.shape == (3, 4)
    torch.testing.assert_close(batch.images[1], normalise(item(2, 4).image[None])[0])


def test_a_batch_of_bad_images_alone_has_no_pair_but_its_shapes():
    bad = UnreadableImage("x.jpg", "image x.jpg cannot be decoded")
    batch, found = PairCollator(padding_id=0, image_size=7)([bad, bad])
    assert found == [bad, bad] and batch.images.shape == (0, 3, 7, 7) and batch.images.dtype == torch.float32
    assert [len(values) for values in batch] == [0] * 5 and batch.token_mask.dtype == torch.bool
