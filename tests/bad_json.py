"""Strategies for JSON of wrong types, and what a reader must make of it: records, or a UserError of one line."""

import json

import pytest
from hypothesis import strategies as st

from datamodules.records import CaptionedImage
from hacan.errors import UserError

KEYS = st.sampled_from(
    [
        "images",
        "filename",
        "filepath",
        "split",
        "imgid",
        "sentences",
        "raw",
        "annotations",
        "id",
        "image_id",
        "file_name",
        "caption",
        "image",
    ]
)
LEAVES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=8),
    st.sampled_from(["train", "restval", "a/b"]),
)
ANY_JSON = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS | st.text(max_size=3), inner, max_size=5),
    max_leaves=20,
)


@st.composite
def damaged(draw, content):
    """`content` with one node replaced by any JSON value, or one key removed."""
    copy = json.loads(json.dumps(content))
    holder, key = None, None
    node = copy
    while isinstance(node, dict | list) and node and (holder is None or draw(st.integers(0, 4))):
        holder, key = node, draw(st.sampled_from(sorted(node) if isinstance(node, dict) else range(len(node))))
        node = holder[key]
    if isinstance(holder, dict) and draw(st.booleans()):
        del holder[key]
    else:
        holder[key] = draw(ANY_JSON)
    return copy


def nested(depth, value):
    for level in range(depth):
        value = [value] if level % 2 else {"images": value, "sentences": [value], "raw": value}
    return value


def records_or_user_error(read):
    """Return valid records, or check that the error is one line."""
    try:
        records = read()
    except UserError as error:
        assert "\n" not in str(error) and len(str(error)) < 2000
        return
    assert records
    for record in records:
        assert isinstance(record, CaptionedImage) and record.split in ("train", "val", "test")
        assert isinstance(record.image_id, int) and all(isinstance(caption, str) for caption in record.captions)
        "".join(record.captions).encode("utf-8")
    assert len({record.image_id for record in records}) == len(records)


def error_of(call, *args, **kwargs):
    with pytest.raises(UserError) as caught:
        call(*args, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)
