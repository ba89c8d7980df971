"""Heatmaps, galleries and the HTML report: the right place, the right query, nothing that a caption can break."""

import base64
import html.parser
import json
import math
import re
from functools import partial
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import references
import torch
from torch.nn import functional as F

from hacan.alignment import FineAlignment, HybridAlignment, RevisedAlignment
from hacan.checkpoints.pretrained import Pretrained
from hacan.errors import UserError
from hacan.images.preprocessing import preprocess_image
from hacan.report.attention import pair_attention
from hacan.report.charts import Line, inline_svg, line_chart
from hacan.report.heatmap_data import heatmap_data
from hacan.report.heatmaps import (
    Explanation,
    StreamMaps,
    Word,
    explain,
    figure,
    image_of_pixels,
    overlay,
    upsample,
    words_of,
)
from hacan.report.page import write_report
from hacan.report.query_selection import Item, choose_queries, select_queries
from hacan.report.thumbnails import data_uri, jpeg, shrink
from hacan.report.training_log import find_training_log, training_charts
from hacan.retrieval.eccv_cxc import TITLES
from hacan.retrieval.ensemble import build_scorer
from hacan.retrieval.evaluate import evaluate
from hacan.retrieval.feature_cache import FeatureStorage
from hacan.retrieval.results import Protocol
from hacan.types import EncodedImages, EncodedTexts, RetrievalResult, Split

ROWS, COLUMNS, WORDS, WIDTH = 2, 3, 5, 9


def make_hybrid(**changes):
    return HybridAlignment(**{"direction": "t2i", "lambda_softmax": 9.0, "focal_type": "prob"} | changes)


def random_pair(words=WORDS, padding=2):
    generator = torch.Generator().manual_seed(3)
    high, mid = (torch.randn(1, n, WIDTH, generator=generator) for n in (ROWS * COLUMNS, 10))
    tokens = [torch.randn(1, words + padding, WIDTH, generator=generator) for _ in range(2)]
    mask = torch.arange(words + padding)[None] < words
    return EncodedImages(high, mid, high[:, 0]), EncodedTexts(*tokens, mask, tokens[0][:, 0])


@pytest.mark.parametrize("direction", ["i2t", "t2i", "both"])
@pytest.mark.parametrize("form", ["prob", "equal", "revised"])
def test_the_streams_add_up_to_the_score_of_the_alignment(form, direction):
    alignment = (
        RevisedAlignment(direction=direction)
        if form == "revised"
        else make_hybrid(direction=direction, focal_type=form)
    )
    images, texts = random_pair()
    found = pair_attention(alignment, images, texts)
    assert sum(part.score for part in found.values()) == pytest.approx(float(alignment(images, texts)), abs=2e-6)
    for stream, part in found.items():
        assert part.score == pytest.approx(float(alignment(images, texts, streams=(stream,))), abs=2e-6)


def test_the_maps_are_the_attention_weights_of_the_method():
    images, texts = random_pair()
    tokens, regions = texts.high[0, :WORDS], images.mid[0]
    found = pair_attention(make_hybrid(), images, texts)["lrg_mid"].values
    torch.testing.assert_close(found[:WORDS], references.hybrid_weights(tokens, regions, 9.0) * len(regions))
    assert found.shape == (WORDS + 2, len(regions))
    assert found[WORDS:].isnan().all()  # padding takes no part
    turned = pair_attention(make_hybrid(direction="i2t"), images, texts)["lrg_mid"].values
    torch.testing.assert_close(turned[:WORDS], references.hybrid_weights(regions, tokens, 9.0).T * WORDS)
    focal = pair_attention(make_hybrid(), images, texts)["ksf"].values[:WORDS] / (ROWS * COLUMNS)
    for row, weights in zip(focal, references.hybrid_weights(texts.high[0, :WORDS], images.high[0], 9.0), strict=True):
        torch.testing.assert_close(row, references.hybrid_focal(weights, "prob"))


def test_the_revised_form_gives_the_ends_no_map_and_the_filter_its_signs():
    images, texts = random_pair()
    found = pair_attention(RevisedAlignment(direction="t2i"), images, texts)
    for part in found.values():
        assert part.values[[0, WORDS - 1]].isnan().all()
        assert not part.values[1 : WORDS - 1].isnan().any()
    assert found["ksf"].values[1 : WORDS - 1].min() < 0 < found["ksf"].values[1 : WORDS - 1].max()
    torch.testing.assert_close(found["lrg_high"].values[1].mean(), torch.tensor(1.0))


def test_a_word_that_is_one_region_has_its_maximum_there():
    """Region 4, row 1 and column 1 of the grid, is word 2."""
    images, texts = random_pair(padding=0)
    regions = F.normalize(torch.eye(ROWS * COLUMNS, WIDTH))[None]
    tokens = torch.zeros(1, WORDS, WIDTH)
    tokens[0, :, 8] = 1.0  # of no region
    tokens[0, 2] = regions[0, 4]
    images, texts = images._replace(high=regions, mid=regions), texts._replace(high=tokens, mid=tokens)
    for alignment in (make_hybrid(), make_hybrid(direction="i2t"), RevisedAlignment(direction="t2i")):
        for part in pair_attention(alignment, images, texts).values():
            grid = part.values[2].view(ROWS, COLUMNS)
            assert grid.argmax() == 4
            assert grid[1, 1] > 2 * grid.abs().sum() / grid.numel()


class WithoutAttention(RevisedAlignment):
    name = "blind"
    attention = FineAlignment.attention


def test_a_form_without_attention_has_no_heatmaps():
    with pytest.raises(UserError, match="alignment=blind has no heatmaps: WithoutAttention defines no attention"):
        pair_attention(WithoutAttention(direction="t2i"), *random_pair())


def test_several_items_at_once_are_refused():
    images, texts = random_pair()
    with pytest.raises(ValueError, match="2 images and 1 texts were given, expected one of each"):
        pair_attention(make_hybrid(), EncodedImages(*(torch.cat([x, x]) for x in images)), texts)


def test_rows_and_columns_of_the_grid_are_those_of_the_image(make_model):
    """A patch at the upper right of a wide image changes the regions of the upper right most."""
    model = make_model()
    blank, patched = torch.zeros(2, 1, 3, 64, 96)
    patched[..., :16, 80:] = 4.0
    grids = dict(zip(("mid", "high"), model.region_grids(height=64, width=96), strict=True))
    assert grids == {"mid": (4, 6), "high": (2, 3)}
    with torch.no_grad():
        before, after = model.encode_images(blank), model.encode_images(patched)
    for level, (rows, columns) in grids.items():
        change = (getattr(after, level) - getattr(before, level)).norm(dim=-1).view(rows, columns)
        assert divmod(int(change.argmax()), columns) == (0, columns - 1)


def test_an_upsampled_grid_keeps_its_orientation_and_its_range():
    grid = np.zeros((ROWS, COLUMNS), np.float32)
    grid[0, 2] = 7.0
    spread = upsample(grid, 40, 90)
    assert spread.shape == (40, 90)
    assert spread[0, 89] == spread.max() == 7.0
    assert spread[39, 0] == spread.min() == 0.0
    assert spread[9, 59:61].mean() == pytest.approx(3.5)  # half way between the centres of columns 1 and 2


def test_an_overlay_is_opaque_for_high_and_transparent_for_low_values():
    picture = np.full((40, 90, 3), 100, np.uint8)
    grid = np.zeros((ROWS, COLUMNS), np.float32)
    grid[1, 0] = 2.0
    brightness = overlay(picture, grid, 0.0, 2.0).astype(int).sum(2)
    assert np.unravel_index(brightness.argmax(), brightness.shape)[0] >= 20
    assert np.unravel_index(brightness.argmax(), brightness.shape)[1] < 30
    np.testing.assert_array_equal(overlay(picture, grid, 0.0, 2.0, alpha=0.0), picture)
    assert len(np.unique(overlay(picture, np.ones_like(grid), 1.0, 1.0))) <= 3  # nothing to choose from: one colour


def test_the_image_of_an_explanation_is_preprocessed():
    generator = np.random.default_rng(0)
    picture = cv2.resize(generator.integers(0, 256, (9, 14, 3), dtype=np.uint8), (140, 90))
    seen = image_of_pixels(preprocess_image(picture, image_size=64))
    assert seen.shape == (64, 64, 3)
    resized = cv2.resize(picture, (round(140 * 73 / 90), 73), interpolation=cv2.INTER_AREA)
    top, left = (73 - 64) // 2, (resized.shape[1] - 64) // 2
    assert np.abs(seen.astype(int) - resized[top : top + 64, left : left + 64]).mean() < 12


@pytest.fixture
def pieces():
    """A tokenizer that knows `snow` and `##boarder`."""
    from transformers import BertTokenizerFast

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "snow", "##board", "##er", "jumps", ",", "high"]
    return BertTokenizerFast(vocab={word: i for i, word in enumerate(words)}, do_lower_case=True)


def test_word_pieces_are_merged_to_words(pieces):
    assert words_of("A Snowboarder jumps, high", pieces, max_text_len=32) == [
        Word("[CLS]", (0,), special=True),
        Word("A", (1,)),
        Word("Snowboarder", (2, 3, 4)),
        Word("jumps", (5,)),
        Word(",", (6,)),
        Word("high", (7,)),
        Word("[SEP]", (8,), special=True),
    ]
    cut = words_of("A snowboarder jumps, high", pieces, max_text_len=5)
    assert [(word.text, word.tokens) for word in cut[1:-1]] == [("A", (1,)), ("snowboard", (2, 3))]


COLOURS = {"red": (1.0, -1.0, -1.0), "green": (-1.0, 1.0, -1.0), "blue": (-1.0, -1.0, 1.0)}


class CellColours:
    """A model whose regions are the mean colours of their cells and whose words are colours."""

    def __init__(self, tokenizer, alignment):
        self.tokenizer, self.max_text_len, self.image_size, self.centre_crop = tokenizer, 12, 48, False
        self.model = SimpleNamespace(alignment=alignment, region_grids=lambda height, width: ((6, 4), (3, 2)))

    def encode_images(self, pictures):
        pixels = torch.stack([preprocess_image(p, image_size=48, centre_crop=False) for p in pictures]).sign()
        high, mid = (F.adaptive_avg_pool2d(pixels, size).flatten(2).mT for size in ((3, 2), (6, 4)))
        return EncodedImages(high, mid, F.normalize(high.mean(1)))

    def encode_texts(self, captions):
        encoded = self.tokenizer(captions)["input_ids"]
        names = [self.tokenizer.convert_ids_to_tokens(ids) for ids in encoded]
        tokens = torch.tensor([[COLOURS.get(name, (0.1, 0.1, 0.1)) for name in row] for row in names])
        return EncodedTexts(tokens, tokens, torch.ones(tokens.shape[:2], dtype=torch.bool), F.normalize(tokens[:, 0]))


@pytest.mark.parametrize("alignment", [make_hybrid(), make_hybrid(direction="both"), RevisedAlignment(direction="t2i")])
def test_the_map_of_a_word_is_high_at_its_region(tokenizer, alignment):
    """An image of 60 x 90 pixels, red at the lower left and blue at the upper right."""
    picture = np.full((60, 90, 3), 128, np.uint8)
    picture[40:, :45] = (255, 0, 0)
    picture[:20, 45:] = (0, 0, 255)
    found = explain(CellColours(tokenizer, alignment), picture, "a red cat on the blue grass")
    words = [word.text for word in found.words]
    assert "[CLS]" in words or isinstance(alignment, RevisedAlignment)
    assert found.image.shape == (48, 48, 3)
    for stream in found.streams:
        rows, columns = stream.grids.shape[1:]
        assert (rows, columns) == ((6, 4) if stream.stream == "lrg_mid" else (3, 2))
        row, column = divmod(int(stream.grids[words.index("red")].argmax()), columns)
        assert row >= rows * 2 / 3
        assert column < columns / 2
        row, column = divmod(int(stream.grids[words.index("blue")].argmax()), columns)
        assert row < rows / 3
        assert column >= columns / 2
    assert found.score == pytest.approx(sum(stream.score for stream in found.streams))


def test_a_figure_has_a_map_for_each_word_and_stream():
    streams = [StreamMaps(name, np.random.default_rng(0).random((4, 2, 3)), "x", 0.1) for name in ("ksf", "lrg_mid")]
    words = [Word("[CLS]", (0,), special=True), Word("$a$", (1,)), Word("dog", (2,)), Word("[SEP]", (3,), special=True)]
    drawn = figure(Explanation(np.zeros((8, 8, 3), np.uint8), "$a$ dog", words, streams))
    titles = [axis.get_title() for axis in drawn.axes if axis.images]
    assert titles == ["KSF: +0.100", r"\$a\$", "dog", "LRG mid: +0.100", r"\$a\$", "dog"]
    drawn.canvas.draw()  # a dollar sign starts no formula


def test_queries_by_rank_and_by_chance():
    ranks = torch.tensor([3.0, 0.0, math.inf, 9.0, 0.0, math.inf, 1.0])
    asked = torch.tensor([True, True, True, True, True, False, True])
    assert set(choose_queries(ranks, asked, kind="best", count=3, seed=0)[:2]) == {1, 4}
    assert choose_queries(ranks, asked, kind="best", count=3, seed=0)[2] == 6
    assert choose_queries(ranks, asked, kind="worst", count=3, seed=0) == [2, 3, 0]  # 5 has no answer
    drawn = [choose_queries(ranks, asked, kind="random", count=4, seed=seed) for seed in (5, 5, 6, 7, 8)]
    assert drawn[0] == drawn[1]
    assert len({tuple(sample) for sample in drawn}) > 1
    assert sorted(choose_queries(ranks, asked, kind="random", count=99, seed=0)) == [0, 1, 2, 3, 4, 6]
    with pytest.raises(ValueError, match="kind is 'odd', expected one of best, worst, random"):
        choose_queries(ranks, asked, kind="odd", count=1, seed=0)


def test_a_gallery_counts_over_the_whole_split_when_folds_are_ranked_apart():
    """2 folds of 2 images; the texts of the folds are interleaved, and image 1 has none."""
    image_of_text = torch.tensor([2, 0, 3, 0, 2])
    first = RetrievalResult(
        torch.tensor([1.0, math.inf]), torch.tensor([0.0, 1.0]),
        torch.tensor([[1, 0], [0, 1]]), torch.tensor([[0, 1], [1, 0]]),
    )  # fmt: skip
    second = RetrievalResult(
        torch.tensor([0.0, math.inf]), torch.tensor([0.0, 1.0, math.inf]),
        torch.tensor([[0, 2], [2, 0]]), torch.tensor([[0, 1], [0, 1], [1, -1]]),
    )  # fmt: skip
    found = select_queries([first, second], image_of_text, images=4, count=9, shown=2)
    assert [query.direction for query in found] == sorted(query.direction for query in found)
    by_query = {(q.direction, q.index): q for q in found if q.kind == "best"}
    assert set(by_query) == {("i2t", i) for i in (0, 2, 3)} | {("t2i", j) for j in range(5)}
    assert by_query["i2t", 0].items == [Item(3, 1, True), Item(1, 2, True)]  # the fold's texts are 1 and 3
    assert by_query["i2t", 2].items == [Item(0, 1, True), Item(4, 2, True)]  # and 0, 2, 4
    assert by_query["i2t", 3].items == [Item(4, 1, False), Item(0, 2, False)]
    assert by_query["i2t", 3].rank == math.inf
    assert by_query["i2t", 3].best_correct == Item(2, None, True)
    assert by_query["t2i", 4].items == [Item(3, 1, False)]
    assert by_query["t2i", 4].best_correct == Item(2, None, True)
    assert by_query["t2i", 3].rank == 2.0
    assert by_query["t2i", 3].best_correct == Item(0, 2, True)
    ranks = [q.rank for q in found if (q.direction, q.kind) == ("t2i", "worst")]
    assert ranks == sorted(ranks, reverse=True)


def test_a_chart_leaves_out_what_is_not_finite_and_escapes_names():
    chart = line_chart("a < b", [Line("<i>", [1, 2, 3], [1.0, math.nan, 3.0])], x_label="x", y_label="y & z")
    assert chart.axes[0].lines[0].get_xdata().tolist() == [1.0, 3.0]
    svg = inline_svg(chart, label='a < b "quoted"')
    assert "a &lt; b" in svg and "&lt;i&gt;" in svg and "y &amp; z" in svg and "&#34;quoted&#34;" in svg
    assert not re.search(r"https?:|<i>", svg)
    assert svg == inline_svg(chart, label='a < b "quoted"')  # the same every time
    assert line_chart("none", [Line("a", [1], [math.nan])], x_label="", y_label="") is None
    many = line_chart("many", [Line("a", range(5000), [float(k % 2) for k in range(5000)])], x_label="", y_label="")
    assert len(many.axes[0].lines[0].get_xdata()) == 300


LOG = """epoch,step,train/total,train/triplet,train/global_GCD,val/rsum,val/r1_i2t
0,9,30.5,20.5,1.0,,
0,9,,,,215.0,6.25
1,19,20.25,10.0,0.5,,
1,19,,,,240.5,12.5
1,2"""


def test_curves_come_from_the_log_of_the_run_or_of_the_checkpoint(tmp_path):
    log = tmp_path / "1" / "csv" / "metrics.csv"
    log.parent.mkdir(parents=True)
    log.write_text(LOG)
    checkpoint = str(tmp_path / "1" / "checkpoints" / "best.ckpt")
    assert find_training_log(tmp_path / "1", []) == log
    assert find_training_log(tmp_path / "2", [checkpoint]) == log
    assert find_training_log(tmp_path / "2", [checkpoint, checkpoint]) is None  # of an ensemble's members, neither
    charts = training_charts(log)
    titles = [chart.axes[0].get_title() for chart in charts]
    assert titles == ["Training loss", "Global loss, unweighted", "Validation recalls", "Validation Rsum"]
    assert charts[0].axes[0].lines[0].get_xydata().tolist() == [[10, 30.5], [20, 20.25]]
    assert charts[3].axes[0].lines[0].get_xydata().tolist() == [[1, 215.0], [2, 240.5]]
    log.write_text("epoch,step\n")
    assert training_charts(log) == []


VOID = {"meta", "img", "br"}


class Page(html.parser.HTMLParser):
    """Parser that checks closed tags and collects addresses and text."""

    def __init__(self, text):
        super().__init__()
        self.open, self.addresses, self.ids, self.text, self.hits, self.tags = [], [], set(), "", 0, []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.handle_startendtag(tag, attributes)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        found = dict(attributes)
        self.tags.append(tag)
        self.addresses += [found[name] for name in ("src", "href", "action", "data", "poster") if name in found]
        self.ids |= {found["id"]} if "id" in found else set()
        self.hits += "hit" in found.get("class", "").split()
        if tag == "img":
            assert found["alt"]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data if self.open[-1:] not in (["script"], ["style"]) else ""


CAPTIONS = [
    "a dog runs",
    "<script>alert(1)</script> a cat & </script> \"quoted\" 'too'",
    "the big cat",
    "a red dog sits by the grass",
    "blue grass",
    "the small dog",
    "",
]
IMAGE_OF_TEXT = torch.tensor([0, 0, 1, 2, 2, 2, 1])


@pytest.fixture
def evaluated(make_model, tokenizer, tmp_path):
    """A tiny evaluation of 3 images, one with markup in its name, and 7 captions, as write_report takes it."""
    model = make_model()
    pretrained = Pretrained(model=model, tokenizer=tokenizer, image_size=64, centre_crop=True, max_text_len=12)
    paths = [tmp_path / name for name in ("one.png", "<b>two.png", "three.jpg")]
    generator = np.random.default_rng(1)
    for path, size in zip(paths, ((70, 90), (300, 240), (64, 64)), strict=True):
        cv2.imwrite(str(path), generator.integers(0, 256, (*size, 3), dtype=np.uint8))

    def image_batches(rows):
        for row in rows:
            picture = cv2.imread(str(paths[row]), cv2.IMREAD_COLOR_RGB)
            yield torch.tensor([row]), preprocess_image(picture, image_size=64)[None]

    def text_batches(rows):
        for row in rows:
            found = tokenizer([CAPTIONS[row]], truncation=True, max_length=12, return_tensors="pt")
            yield torch.tensor([row]), found["input_ids"], found["attention_mask"].bool()

    split = Split("f8k", "test", [1, 2, 3], CAPTIONS, IMAGE_OF_TEXT, image_batches, text_batches, 2)
    scorer = build_scorer(model, name="a<b>.ckpt", device=torch.device("cpu"))
    arguments = {"paths": [str(path) for path in paths], "captions": CAPTIONS, "image_of_text": IMAGE_OF_TEXT}

    def make(**changes):
        storage = FeatureStorage(memory=64)
        return evaluate([scorer], split, Protocol(top_k=2)._replace(**changes), storage=storage, progress=False)

    return make, pretrained, partial(write_report, **arguments, progress=False, queries=2)


def test_a_report_stands_alone_and_captions_are_only_text(evaluated, tmp_path):
    make, pretrained, write = evaluated
    path = write(tmp_path / "report.html", make(curve=True, bootstrap=20), pretrained=pretrained)
    text = path.read_text(encoding="utf-8")
    assert not re.search(r"https?:", text)
    assert "//" not in re.sub(r"base64,[\w+/=]*|^\s*//.*$|\"values\": ?\"[\w+/=]*\"", "", text, flags=re.MULTILINE)
    page = Page(text)
    assert all(address.startswith(("data:image/jpeg;base64,", "#")) for address in page.addresses)
    assert all(address[1:] in page.ids for address in page.addresses if address.startswith("#"))
    assert CAPTIONS[1] in page.text
    assert "a<b>.ckpt" in page.text
    assert page.tags.count("script") == 2  # ours, and its data
    assert page.tags.count("b") == text.count('class="card"')  # none from a file's name
    for word in (
        "Rsum",
        "Audit, not a result",
        "release's rule",
        "95% bootstrap intervals",
        "suggested: K",
        "Provenance",
    ):
        assert word in page.text, word
    assert "training" not in page.ids  # nothing was trained here
    assert page.hits >= 10  # each query shows what is correct
    assert path.stat().st_size < 1_000_000


def test_a_report_of_a_form_without_attention_says_so(evaluated, tmp_path):
    make, pretrained, write = evaluated
    pretrained.model.alignment = WithoutAttention(direction="t2i")
    page = Page(write(tmp_path / "report.html", make(), pretrained=pretrained).read_text(encoding="utf-8"))
    assert "alignment=blind defines no attention()" in page.text and "viewer" not in page.ids


def test_every_section_of_a_report_has_a_link_and_the_provenance_is_readable(evaluated, tmp_path):
    make, pretrained, write = evaluated
    (tmp_path / "csv").mkdir()
    (tmp_path / "csv" / "metrics.csv").write_text(LOG)
    evaluation = make(curve=True)
    text = write(tmp_path / "report.html", evaluation, pretrained=pretrained).read_text(encoding="utf-8")
    links = re.findall(r'<a href="#(\w+)"', text)
    assert links == re.findall(r'<section id="(\w+)"', text)
    assert {"training", "curve"} < set(links)
    assert "peak resident memory of the process" in text
    page = Page(text)
    member = evaluation.provenance["members"][0]
    assert f"checkpoint{member['checkpoint']}hash{member['hash']}" in re.sub(r"\s+", "", page.text)  # no JSON
    assert "judged matches" not in page.text


def test_judged_matches_of_coco_are_in_the_report(evaluated, tmp_path):
    make, _, write = evaluated
    judged = {key: {"i2t": 10 + place, "t2i": 20.25 + place} for place, key in enumerate(TITLES)}
    path = write(tmp_path / "report.html", make()._replace(extended=judged))
    text = Page(path.read_text(encoding="utf-8")).text
    for place, title in enumerate(TITLES.values()):
        assert f"{title}{10 + place}.0{20.25 + place:.1f}" in text


def test_special_tokens_do_not_set_the_scale(tokenizer):
    grids = np.full((4, 2, 3), 1.0, np.float32)
    grids[0], grids[3], grids[1, 0, 0], grids[2, 1, 2] = 50.0, -50.0, 3.0, 0.5
    assert StreamMaps("ksf", grids, "x", 0.1, special=(0, 3)).range == (0.5, 3.0)
    assert StreamMaps("ksf", grids, "x", 0.1).range == (-50.0, 50.0)
    assert StreamMaps("ksf", grids[:1], "x", 0.1, special=(0,)).range == (50.0, 50.0)  # an empty caption
    found = explain(CellColours(tokenizer, make_hybrid()), np.zeros((9, 9, 3), np.uint8), "a red cat")
    assert all(stream.special == (0, 4) for stream in found.streams)


def test_the_data_of_the_viewer_are_the_maps(evaluated, tmp_path):
    make, pretrained, write = evaluated
    text = write(tmp_path / "report.html", make(), pretrained=pretrained).read_text(encoding="utf-8")
    data = json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)[1])
    buttons = {int(number) for number in re.findall(r'data-pair="(\d+)"', text)}
    assert buttons == set(range(len(data["pairs"])))
    assert all(str(pair["image"]) in data["pictures"] for pair in data["pairs"])
    pair = data["pairs"][0]
    path = tmp_path / ("one.png", "<b>two.png", "three.jpg")[pair["image"]]
    found = explain(pretrained, path, pair["caption"])
    assert [word["text"] for word in pair["words"]] == [word.text for word in found.words]
    for plain, stream in zip(pair["streams"], found.streams, strict=True):
        grids = np.frombuffer(base64.b64decode(plain["values"]), np.uint8).reshape(stream.grids.shape)
        assert grids.shape == (len(found.words), plain["rows"], plain["columns"])
        low, high = stream.range
        shown = stream.grids.clip(low, high)  # a special token may go beyond
        np.testing.assert_allclose(low + grids / 255 * (high - low), shown, atol=(high - low) / 500)


def test_a_report_without_model_intervals_or_curve_says_so(evaluated, tmp_path):
    make, _, write = evaluated
    (tmp_path / "csv").mkdir()
    (tmp_path / "csv" / "metrics.csv").write_text(LOG)
    page = Page(write(tmp_path / "report.html", make()).read_text(encoding="utf-8"))
    assert "None: this report was made without a model." in page.text
    assert "No intervals: this evaluation was made with bootstrap=0." in page.text
    assert "training" in page.ids
    assert "curve" not in page.ids
    assert "script" not in page.tags


def test_a_pair_is_right_or_wrong_by_its_image(evaluated, tmp_path):
    _, pretrained, write = evaluated
    paths = write.keywords["paths"]
    data = heatmap_data(
        pretrained,
        [(0, 1), (2, 1)],
        paths=paths,
        captions=CAPTIONS,
        image_of_text=IMAGE_OF_TEXT.tolist(),
        progress=False,
    )
    assert [pair["correct"] for pair in data["pairs"]] == [True, False]
    assert set(data["pictures"]) == {0, 2}


def test_half_an_emoji_in_a_caption_spoils_nothing(evaluated, pieces, tmp_path):
    make, pretrained, write = evaluated
    captions = [f"{caption} \ud83d" for caption in CAPTIONS]
    text = write(tmp_path / "report.html", make(), pretrained=pretrained, captions=captions).read_text(encoding="utf-8")
    assert "a dog runs ?" in Page(text).text
    assert words_of("high \ud83d", pieces, max_text_len=9)[1].text == "high"


def test_images_shrink_and_never_grow():
    picture = np.zeros((30, 90, 3), np.uint8)
    picture[..., 0] = 200  # red
    assert shrink(picture, 45).shape == (15, 45, 3)
    assert shrink(picture, 90) is picture
    assert shrink(picture, 1).shape == (1, 1, 3)
    decoded = cv2.imdecode(np.frombuffer(jpeg(picture), np.uint8), cv2.IMREAD_COLOR_RGB)
    assert np.abs(decoded.astype(int) - picture).max() < 8
    assert len(data_uri(picture, quality=20)) <= len(data_uri(picture))
    with pytest.raises(ValueError, match=r"image is float64 of shape \(4, 4\)"):
        jpeg(np.zeros((4, 4)))
