"""attention.c: it is compiled, kept and used where it can be, and never missed where it cannot."""

import ctypes
import os
import re
import stat

import numpy as np
import pytest
import torch
from test_alignment import changed, features, form

from hacan.alignment import base, native
from hacan.alignment.native import attention_library
from hacan.types import EncodedImages

CC = os.environ.get("CC") or "cc"
needs_compiler = pytest.mark.skipif(attention_library() is None, reason="no C compiler here")


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """A process that has not loaded the library yet, with an empty cache of its own; returns the cache's folder."""
    attention_library.cache_clear()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("HACAN_EAGER", raising=False)
    yield tmp_path / "cache" / "hacan"
    attention_library.cache_clear()


def compiler(folder, monkeypatch, script):
    """A compiler of our own in $CC."""
    path = folder / "our-cc"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("CC", str(path))


@pytest.fixture
def calls(monkeypatch):
    """Names of the compiled functions that were called."""
    library, called = attention_library(), []

    class Watched:
        def __getattr__(self, name):
            called.extend([name] if name != "work_i2t" else [])
            return getattr(library, name)

    monkeypatch.setattr("hacan.alignment.fused.attention_library", Watched)
    return called


@needs_compiler
@pytest.mark.parametrize(
    ("direction", "expected"),
    [("i2t", {"score_i2t"}), ("t2i", {"weigh_t2i", "score_t2i"}), ("both", {"score_i2t", "weigh_t2i", "score_t2i"})],
)
def test_float32_scores_without_gradients_are_the_compiled_functions(calls, direction, expected):
    images, texts = features(1)
    alignment = form("hybrid", "prob", direction)
    alignment(images, texts)
    assert set(calls) == expected
    calls.clear()
    alignment.pairs(images, texts, torch.tensor([[2, 1], [0, 6]]))
    assert set(calls) == expected


@needs_compiler
def test_gradients_float64_and_the_revised_form_are_torch_alone(calls):
    images, texts = features(1)
    form("hybrid", "prob", "both")(images._replace(high=images.high.clone().requires_grad_()), texts)
    form("revised", "prob", "both")(images, texts)
    form("hybrid", "prob", "both")(changed(images, torch.Tensor.double), changed(texts, torch.Tensor.double))
    assert calls == []


@needs_compiler
@pytest.mark.parametrize("focal_type", ["prob", "equal"])
@pytest.mark.parametrize("direction", ["i2t", "t2i"])
@pytest.mark.parametrize("regions", [(49, 196), (15, 16), (17, 33)], ids=str)
def test_real_sizes_equal_float64(direction, focal_type, regions):
    images, texts = features(3, images=5, texts=(12, 9, 30, 1, 12, 17), high=regions[0], mid=regions[1], width=64)
    alignment = form("hybrid", focal_type, direction)
    scores = alignment(images, texts)
    exact = alignment(changed(images, torch.Tensor.double), changed(texts, torch.Tensor.double))
    torch.testing.assert_close(scores.double(), exact, atol=1e-5, rtol=0)


@needs_compiler
def test_the_exponential_is_good_to_two_units_in_the_last_place():
    # one word, so that b is 1 for the first region and -1 for the others, whose weights are then exp(-2 lambda)
    regions = 41
    dots, starts = torch.full((regions,), -1e6), torch.tensor([0, 1])
    dots[0] = 1e6
    weights, along, floors, norms = (torch.empty(regions) for _ in range(4))
    for temperature in torch.arange(0, 50, 1 / 64).tolist():
        attention_library().weigh_t2i(
            dots.data_ptr(), 1, 1, regions, starts.data_ptr(), temperature, 0,
            weights.data_ptr(), along.data_ptr(), floors.data_ptr(), norms.data_ptr(), 1,
        )  # fmt: skip
        exact = np.exp(-min(2 * temperature, 87.0))
        assert weights[0] == 1
        assert np.abs(weights[1:].double().numpy() - exact).max() <= 2 * np.spacing(np.float32(exact))


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("direction", ["i2t", "t2i", "both"])
def test_images_in_shares_of_the_cache_score_the_same(direction, monkeypatch):
    images, texts = features(9, images=7, texts=(5, 9, 2, 11, 7))
    alignment = form("hybrid", "prob", direction)
    expected = alignment(images, texts)
    monkeypatch.setattr("hacan.alignment.plan.CPU_BLOCK", 300)
    cut, whole = [], base.shares_of_cache
    monkeypatch.setattr(base, "shares_of_cache", lambda *arguments: cut.append(whole(*arguments)) or cut[-1])
    torch.testing.assert_close(alignment(images, texts), expected, atol=1e-6, rtol=0)
    assert max(len(shares) for shares in cut) > 2


@needs_compiler
def test_scores_do_not_depend_on_the_number_of_threads(monkeypatch):
    images, texts = features(4, images=7, texts=(5, 9, 2, 11, 7, 3, 8, 1, 4))
    alignment, found = form("hybrid", "prob", "both"), []
    for threads in (1, 2, 5):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)  # the products keep theirs
        found.append(alignment(images, texts))
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_stays_visible(value):
    images, texts = features(5)
    high = images.high.clone()
    high[1, 2, 3] = value
    scores = form("hybrid", "prob", "both")(EncodedImages(high, images.mid, images.pooled), texts)
    assert scores[1].isnan().all()
    assert scores[[0, 2]].isfinite().all()


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("direction", ["i2t", "t2i"])
def test_a_length_that_overflows_is_no_score(direction):
    # the Gram matrix of what attention looks at is infinite in one place, where a weight of 0 meets it
    images, texts = features(10, images=1, texts=(4,))
    large = texts.high.clone(), images.high.clone()
    large[direction == "t2i"][0, 1] *= 1e19
    scores = form("hybrid", "prob", direction)(images._replace(high=large[1]), texts._replace(high=large[0]))
    assert scores.isnan().all()


@needs_compiler
def test_the_library_is_compiled_once_and_kept(fresh, tmp_path, monkeypatch):
    compiler(tmp_path, monkeypatch, f'echo "$@" >> {tmp_path}/log\nexec {CC} "$@"')
    for _ in range(2):
        assert isinstance(attention_library(), ctypes.CDLL)
        attention_library.cache_clear()
    assert (tmp_path / "log").read_text().count(" -c ") == 1
    assert [path.suffix for path in fresh.iterdir()] == [".so"]  # and nothing half done beside it


@needs_compiler
def test_another_source_is_another_library(fresh, tmp_path, monkeypatch):
    attention_library()
    source = tmp_path / "attention.c"
    source.write_text(native.SOURCE.read_text() + "\n/* changed */\n")
    monkeypatch.setattr(native, "SOURCE", source)
    attention_library.cache_clear()
    assert attention_library() is not None
    assert len(list(fresh.iterdir())) == 2


@needs_compiler
def test_another_processor_is_another_library(fresh, monkeypatch):
    attention_library()
    told = native._processor()
    assert any(line.startswith(("flags", "Features")) for line in told)
    monkeypatch.setattr(native, "_processor", lambda: [*told, "flags : another"])
    attention_library.cache_clear()
    attention_library()
    assert len(list(fresh.iterdir())) == 2


@needs_compiler
def test_a_kept_library_that_is_spoilt_is_made_anew(fresh):
    attention_library()
    attention_library.cache_clear()
    (kept,) = fresh.iterdir()
    kept.unlink()  # the file that this process has loaded must not change under it
    kept.write_text("spoilt")
    assert attention_library() is not None
    assert kept.stat().st_size > 1000


@needs_compiler
@pytest.mark.parametrize("why", ["a file is there", "others may write", "no home"])
def test_a_cache_that_is_no_place_for_it_is_done_without(fresh, monkeypatch, caplog, why):
    if why == "a file is there":
        fresh.parent.write_text("a file where a folder should be")
    elif why == "others may write":
        fresh.mkdir(parents=True)
        fresh.chmod(0o777)
    else:
        monkeypatch.delenv("XDG_CACHE_HOME")
        monkeypatch.setattr(native.Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
    assert attention_library() is not None
    assert not fresh.is_dir() or not list(fresh.iterdir())
    assert not caplog.records


def test_a_cc_that_cannot_be_read_is_warned_of(fresh, monkeypatch, caplog):
    monkeypatch.setenv("CC", "gcc 'x")
    assert attention_library() is None
    assert "No closing quotation" in caplog.text


@needs_compiler
def test_cc_may_bring_arguments(fresh, monkeypatch):
    monkeypatch.setenv("CC", f"{CC} -DOURS")
    assert attention_library() is not None


@needs_compiler
def test_an_eager_of_0_is_no_wish(fresh, monkeypatch):
    monkeypatch.setenv("HACAN_EAGER", "0")
    assert attention_library() is not None


@needs_compiler
@pytest.mark.parametrize("why", ["no compiler", "HACAN_EAGER"])
def test_without_a_compiler_the_scores_are_the_same(fresh, monkeypatch, caplog, why):
    images, texts = features(6)
    alignment = form("hybrid", "prob", "both")
    expected = alignment(images, texts)
    attention_library.cache_clear()
    monkeypatch.setenv(*("CC", "a-compiler-that-is-not-there") if why == "no compiler" else ("HACAN_EAGER", "1"))
    assert attention_library() is None
    torch.testing.assert_close(alignment(images, texts), expected, atol=1e-6, rtol=0)
    assert not caplog.records  # nothing is wrong


@pytest.mark.parametrize(
    ("script", "why"),
    [
        ("echo In file x >&2; echo our-cc: error: no -fopenmp >&2; exit 1", "our-cc: error: no -fopenmp"),
        ('while [ "$1" != -o ] && [ $# -gt 1 ]; do shift; done; echo text > "$2"', "file too short|invalid ELF header"),
    ],
    ids=["fails", "makes nonsense"],
)
def test_a_compiler_that_fails_is_warned_of_once(fresh, tmp_path, monkeypatch, caplog, script, why):
    compiler(tmp_path, monkeypatch, f"case $1 in --version) echo 1; exit;; esac\n{script}")
    images, texts = features(7)
    scores = form("hybrid", "prob", "both")(images, texts)
    form("hybrid", "prob", "both")(images, texts)
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert record.getMessage().startswith(f"{tmp_path}/our-cc could not make a library of attention.c")
    assert re.search(why, record.getMessage())
    assert scores.isfinite().all()
    assert not list(fresh.iterdir())
