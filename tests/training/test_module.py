"""TrainingModule: loss terms, schedule, freezing, warnings, non-finite losses."""

import logging

import pytest
import pytorch_lightning as pl
import torch

from datamodules.sampling import TrainingOrder
from hacan.errors import UserError
from hacan.losses import global_loss, hard_negatives, triplet_ranking_loss, triplet_ranking_loss_all
from hacan.training.module import TrainingModule
from hacan.training.trainer import build_trainer, effective_precision
from hacan.types import PairBatch


@pytest.fixture
def batch(pixels, captions):
    token_ids, mask = captions
    return PairBatch(
        images=torch.cat([pixels, pixels.flip(0)])[:5],
        token_ids=token_ids[:5],
        token_mask=mask[:5],
        image_ids=torch.tensor([0, 1, 2, 3, 3]),
        caption_ids=torch.arange(10, 15),
    )


@pytest.fixture
def make_training(make_settings, make_model):
    def make(**updates):
        settings = make_settings(**{"batch_size": 5, "per_gpu_batchsize": 5, **updates})
        return TrainingModule(
            make_model(**updates),
            loss=settings.loss,
            train=settings.train,
            seed=0,
            batches_per_step=settings.data.batch_size // settings.data.per_gpu_batchsize,
        )

    return make


class FakeTrainer:
    """The part of a Trainer that `batch_loss` and `training_step` read."""

    world_size = 1

    def __init__(self, epoch):
        self.current_epoch = epoch


def losses_in(training, epoch, batch):
    training._trainer = FakeTrainer(epoch)
    images = training.model.encode_images(batch.images)
    texts = training.model.encode_texts(batch.token_ids, batch.token_mask)
    total, terms = training.batch_loss(images, texts, batch.image_ids)
    return images, texts, total, terms


def test_the_total_is_the_triplet_sum_and_the_weighted_global_loss(make_training, batch):
    training = make_training(global_loss_weight=3.0)
    images, texts, total, terms = losses_in(training, 0, batch)
    scores = training.model.score(images, texts)
    negatives = hard_negatives(scores, batch.image_ids)
    triplet = triplet_ranking_loss(scores, negatives, margin=0.2, reduction="sum")
    on_globals = global_loss("GCD", images.pooled, texts.pooled, negatives, margin=0.2)
    assert total.item() == pytest.approx((triplet + 3 * on_globals).item(), rel=1e-5)
    assert terms["triplet"] == pytest.approx(triplet.item(), rel=1e-5)
    assert terms["global_GCD"] == pytest.approx(on_globals.item(), rel=1e-5)
    assert 0 < terms["active_hinges"] <= 1


def test_the_mean_reduction_divides_by_the_pairs(make_training, batch):
    _, _, _, summed = losses_in(make_training(triplet_reduction="sum"), 0, batch)
    _, _, _, mean = losses_in(make_training(triplet_reduction="mean"), 0, batch)
    assert summed["triplet"] == pytest.approx(5 * mean["triplet"], rel=1e-5)


def test_the_sum_reduction_counts_the_pairs_of_the_optimiser_step(make_training, batch):
    """Accumulated gradients are averaged, so a half step counts twice."""
    _, _, _, whole = losses_in(make_training(), 0, batch)
    _, _, _, half = losses_in(make_training(batch_size=10, per_gpu_batchsize=5), 0, batch)
    assert half["triplet"] == pytest.approx(2 * whole["triplet"], rel=1e-5)


def test_warmup_uses_all_negatives_and_the_warmup_loss(make_training, batch):
    training = make_training(all_negatives_epochs=1, warmup_epochs=2, warmup_loss="InfoNCE")
    images, texts, _, terms = losses_in(training, 0, batch)
    scores = training.model.score(images, texts)
    expected = triplet_ranking_loss_all(scores, batch.image_ids, margin=0.2, reduction="sum")
    assert terms["triplet"] == pytest.approx(expected.item(), rel=1e-5)
    assert "global_InfoNCE" in terms
    assert "global_InfoNCE" in losses_in(training, 1, batch)[3]
    assert "global_GCD" in losses_in(training, 2, batch)[3]


def test_the_learning_rate_falls_tenfold_every_ten_epochs(make_training):
    training = make_training()
    rates = [training.learning_rate_at(epoch) for epoch in (0, 9, 10, 19, 20)]
    assert rates == pytest.approx([1e-4, 1e-4, 1e-5, 1e-5, 1e-6])


class Frozen(pl.Callback):
    """Record after each epoch which parts have changed in it."""

    def __init__(self):
        self.moved = []

    def on_train_epoch_start(self, trainer, module):
        self.before = {name: value.clone() for name, value in module.model.named_parameters()}

    def on_train_epoch_end(self, trainer, module):
        after = dict(module.model.named_parameters())
        self.moved.append({name.split(".")[0] for name in after if not torch.equal(after[name], self.before[name])})


def fit(training, batch, folder, *, epochs, callbacks=()):
    trainer = pl.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        callbacks=list(callbacks),
    )
    trainer.fit(training, torch.utils.data.DataLoader([0], collate_fn=lambda _: batch))
    return trainer


def test_backbones_are_frozen_in_the_first_epochs(make_training, batch, tmp_path):
    watch = Frozen()
    training = make_training(freeze_backbone_epochs=1, learning_rate=1e-3)
    training.model.train()
    fit(training, batch, tmp_path, epochs=2, callbacks=[watch])
    heads = {"project_image_high", "project_image_mid", "project_text_high", "project_text_mid"}
    heads |= {"aggregate_image", "aggregate_text"}
    assert watch.moved[0] == heads
    assert watch.moved[1] == heads | {"image_encoder", "text_encoder"}


def test_training_lowers_the_loss(make_training, batch, tmp_path):
    training = make_training(freeze_backbone_epochs=0, learning_rate=3e-3)
    before = losses_in(training, 0, batch)[3]["total"]
    training.model.train()
    fit(training, batch, tmp_path, epochs=20)
    training.model.eval()
    assert losses_in(training, 0, batch)[3]["total"] < 0.7 * before


def test_a_loss_that_is_not_finite_names_step_ids_and_terms(make_training, batch, tmp_path):
    training = make_training()
    with torch.no_grad():
        training.model.project_image_high.weight.fill_(float("inf"))
    with pytest.raises(UserError, match=r"not finite at epoch 0, batch 0, optimiser step 0 ") as error:
        fit(training, batch, tmp_path, epochs=1)
    for part in ("total nan", "triplet nan", "global_GCD ", "images [0, 1, 2, 3, 3]", "captions [10, 11, 12, 13, 14]"):
        assert part in str(error.value)
    assert "\n" not in str(error.value)


def test_non_finite_scores_name_the_alignment_and_the_stream(make_training, batch, tmp_path, monkeypatch):
    training = make_training()
    equation = type(training.model.alignment).key_semantic_filter
    monkeypatch.setattr(type(training.model.alignment), "key_semantic_filter", lambda *args: equation(*args) / 0)
    with pytest.raises(UserError, match="alignment=hybrid: scores of ksf are not finite, although all features are"):
        fit(training, batch, tmp_path, epochs=1)


def none_of(batch):
    return PairBatch(*(values[:0] for values in batch))


@pytest.mark.parametrize("encoder", ["convnext_atto", "tf_efficientnet_lite0"])
def test_a_batch_without_a_readable_image_has_zero_gradient(make_training, batch, encoder):
    updates = {} if encoder == "convnext_atto" else {"image_encoder": encoder, "image_encoder_args": {}}
    training = make_training(**updates)
    training.model.train()
    before = {name: value.clone() for name, value in training.model.state_dict().items()}
    training._trainer = FakeTrainer(0)
    loss = training.training_step(none_of(batch), 0)
    loss.backward()
    assert loss.item() == 0 and training.model.training
    reached = {name for name, value in training.model.named_parameters() if value.grad is not None}
    assert not any(value.grad.any() for value in training.model.parameters() if value.grad is not None)
    assert all(torch.equal(value, before[name]) for name, value in training.model.state_dict().items())
    losses_in(training, 0, batch)[2].backward()  # DDP waits for as many parameters as a batch of pairs reaches
    assert {name for name, value in training.model.named_parameters() if value.grad is not None} <= reached


def test_training_stops_after_20_batches_without_a_readable_image(make_training, batch):
    training = make_training()
    training._trainer = FakeTrainer(0)
    for _ in range(19):
        training._check_readable(0)
    training._check_readable(1)
    for number in range(19):
        training.training_step(none_of(batch), number)
    with pytest.raises(UserError, match=r"20 batches in a row without a readable image.*resume_from=last"):
        training.training_step(none_of(batch), 19)


def test_a_collapse_is_warned_of_once(make_training, caplog):
    training = make_training()
    with caplog.at_level(logging.WARNING):
        for _ in range(99):
            training._warn_of_collapse(0.4)
        assert not caplog.records
        for _ in range(50):
            training._warn_of_collapse(0.401)
    assert len(caplog.records) == 1
    assert "collapse" in caplog.text


def test_a_varying_loss_is_not_a_collapse(make_training, caplog):
    training = make_training()
    for step in range(300):
        training._warn_of_collapse(0.4 if step % 50 else 0.3)
    assert not caplog.records


def test_half_precision_falls_back_on_a_cpu(make_settings, caplog):
    train = make_settings(precision="16-mixed").train
    assert effective_precision(train.precision, on_gpu=True) == "16-mixed"
    assert effective_precision(train.precision, on_gpu=False) == "32-true"
    assert "16-mixed" in caplog.text


@pytest.mark.parametrize(
    ("per_gpu", "gpus", "nodes", "accumulated"),
    [(64, 1, 1, 1), (64, 4, 1, 1), (64, 4, 2, 1), (8, 4, 1, 2), (8, 2, 2, 2)],
)
def test_gradients_accumulate_up_to_the_batch_of_all_processes(
    make_settings, tmp_path, per_gpu, gpus, nodes, accumulated
):
    """With more processes than pairs of a forward pass need, each takes a smaller share: the batch stays the same."""
    settings = make_settings(batch_size=64, per_gpu_batchsize=per_gpu, num_gpus=gpus, num_nodes=nodes)
    trainer = build_trainer(settings, run_folder=tmp_path, checkpoint_folder=tmp_path)
    order = TrainingOrder(n_pairs=640, batch_size=64, per_gpu_batchsize=per_gpu, seed=0, world_size=gpus * nodes)
    assert trainer.accumulate_grad_batches == accumulated
    assert accumulated * len(next(iter(order))) * gpus * nodes == 64
