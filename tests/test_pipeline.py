"""What a run does with its parts: the tests of training are in test_resume.py; here validation and evaluation."""

import dataclasses
import json
import os

import numpy as np
import pytest
import torch
from tiny_run import TINY_DEMO, settings_of

from datamodules.datamodule import build_data
from datamodules.tokens import load_tokenizer
from hacan import pipeline
from hacan.checkpoints.loading import open_models
from hacan.retrieval.ranking import rank_shortlists
from hacan.settings import VAL_METRICS


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """Settings, the model of their seed, its tokenizer and the demo's data."""
    folder = tmp_path_factory.mktemp("demo")
    settings = settings_of(folder)
    models, tokenizer, settings = open_models(settings, load_tokenizer)
    models[0].eval()
    return settings, models[0], tokenizer, build_data(settings, tokenizer)


@pytest.fixture
def kernels():
    """Restore the kernels after a test that requires deterministic ones."""
    yield
    torch.use_deterministic_algorithms(False)
    os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)


def test_a_split_lists_each_image_and_caption_once(demo):
    settings, _, _, data = demo
    split = pipeline.split_of(data, settings, "val", hashed=False)
    assert (split.dataset, split.name, split.images_hash) == ("scenes", "val", "")
    assert len(split.ids) == 4 and len(split.captions) == len(split.image_of_text) == 20
    assert sorted(int(row) for rows, _ in split.image_batches() for row in rows) == [0, 1, 2, 3]
    assert sorted(int(row) for rows, *_ in split.text_batches() for row in rows) == list(range(20))
    assert split.batch_size == TINY_DEMO["per_gpu_batchsize"]


def test_the_hash_of_a_split_depends_on_images_and_cropping(demo):
    settings, _, _, data = demo
    hashes = {pipeline.split_of(data, settings, name, hashed=True).images_hash for name in ("val", "test")}
    assert len(hashes) == 2 and all(name.endswith(" 32 False") for name in hashes)  # size; squeezed, not cropped


@pytest.mark.parametrize("val_metric", VAL_METRICS)
def test_validation_has_the_figures_of_brute_force(demo, tmp_path, val_metric):
    settings, model, _, data = demo
    settings = dataclasses.replace(
        settings,
        train=dataclasses.replace(settings.train, val_metric=val_metric),
        eval=dataclasses.replace(settings.eval, inference_topk=2),
    )
    figures = pipeline.validate(model, settings=settings, data=data, run_folder=tmp_path)
    split = pipeline.split_of(data, settings, "val", hashed=False)
    with torch.no_grad():
        images = model.encode_images(torch.cat([pixels for _, pixels in split.image_batches()]))
        fine = torch.zeros(4, 20)
        coarse = torch.zeros(4, 20)
        for rows, token_ids, mask in split.text_batches():
            texts = model.encode_texts(token_ids, mask)
            fine[:, rows], coarse[:, rows] = model.score(images, texts), images.pooled @ texts.pooled.T
    top_k = settings.eval.inference_topk if val_metric == "rsum" else 20
    found = rank_shortlists(coarse, fine, split.image_of_text, top_k=top_k)
    for ranks, way in ((found.ranks_i2t, "i2t"), (found.ranks_t2i, "t2i")):
        for k in (1, 5, 10):
            assert figures[f"r{k}_{way}"] == pytest.approx(100 * (ranks < k).double().mean().item())
    selection = figures.pop("selection")
    assert figures["rsum"] == pytest.approx(sum(value for name, value in figures.items() if name != "rsum"))
    by_globals = rank_shortlists(coarse, coarse, split.image_of_text, top_k=20)
    r1 = [100 * (ranks == 0).double().mean().item() for result in (found, by_globals) for ranks in result[:2]]
    assert selection == pytest.approx(sum(r1) if val_metric == "release" else figures["rsum"])
    assert not model.training and not list(tmp_path.iterdir())


def test_the_test_split_is_written_printed_and_the_same_twice(demo, tmp_path, capsys, kernels):
    """`deterministic` holds in an evaluation alone too, and changes nothing on a CPU."""
    settings, model, tokenizer, data = demo
    assert not torch.are_deterministic_algorithms_enabled()
    ranks = []
    for number, deterministic in enumerate((False, True)):
        folder = tmp_path / str(number)
        settings = settings_of(tmp_path, data_root=settings.data.data_root, deterministic=deterministic)
        done = pipeline.test(settings, [model], ["x.ckpt"], data, run_folder=folder, home=folder, tokenizer=tokenizer)
        assert torch.are_deterministic_algorithms_enabled() == deterministic
        receipt = json.loads((folder / "metrics.json").read_text())["receipt"]
        assert (receipt["images"], receipt["texts"], receipt["members"][0]["checkpoint"]) == (6, 30, "x.ckpt")
        assert f"wrote {folder / 'metrics.json'}" in capsys.readouterr().out
        ranks.append(np.load(folder / "ranks.npz"))
    assert all(np.array_equal(ranks[0][name], ranks[1][name]) for name in ranks[0].files)
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    assert done.hierarchical.r10_t2i == 100.0  # six images


def test_alone_there_is_one_process(demo):
    processes = pipeline.current_processes()
    assert (processes.rank, processes.world_size) == (0, 1)
