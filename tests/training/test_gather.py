"""Two processes of 4 pairs have the loss and the gradients of one process of 8, with uneven parts too."""

import os
import socket

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from hacan.alignment import HybridAlignment
from hacan.losses import global_loss, hard_negatives, triplet_ranking_loss
from hacan.training.distributed import gather_counts, gather_rows, gather_texts
from hacan.types import EncodedImages, EncodedTexts

WIDTH, JOINT = 6, 5
LENGTHS = [3, 4, 2, 4, 7, 3, 5, 1]  # the second process has the wider captions
IMAGE_IDS = [0, 1, 1, 2, 3, 4, 5, 5]


class Projections(nn.Module):
    """A small model with parameters on both sides of the scores."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.image, self.text = nn.Linear(WIDTH, JOINT), nn.Linear(WIDTH, JOINT)

    def forward(self, pixels, tokens, mask):
        regions, words = self.image(pixels), self.text(tokens)
        pooled_images = nn.functional.normalize(regions.mean(1), dim=-1)
        pooled_texts = nn.functional.normalize(words[:, 0], dim=-1)
        return (
            EncodedImages(high=regions[:, :3], mid=regions, pooled=pooled_images),
            EncodedTexts(high=words, mid=words * 0.5, mask=mask, pooled=pooled_texts),
        )


def batch(rows):
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randn(8, 4, WIDTH, generator=generator)[rows]
    tokens = torch.randn(8, max(LENGTHS), WIDTH, generator=generator)[rows]
    lengths = torch.tensor(LENGTHS)[rows]
    width = int(lengths.max())
    return pixels, tokens[:, :width], torch.arange(width) < lengths[:, None], torch.tensor(IMAGE_IDS)[rows]


def loss_of(model, rows, *, gather):
    pixels, tokens, mask, image_ids = batch(rows)
    images, texts = model(pixels, tokens, mask)
    align = HybridAlignment(direction="t2i", lambda_softmax=9.0, focal_type="prob")
    if gather:
        counts = gather_counts(len(image_ids), image_ids.device)
        texts = gather_texts(texts, counts)
        scores, pooled = gather_rows(align(images, texts), counts), gather_rows(images.pooled, counts)
        image_ids = gather_rows(image_ids, counts)
    else:
        scores, pooled = align(images, texts), images.pooled
    negatives = hard_negatives(scores.detach(), image_ids)
    triplet = triplet_ranking_loss(scores, negatives, margin=0.2, reduction="mean")
    return triplet + global_loss("GCD", pooled, texts.pooled, negatives, margin=0.2)


def one_of_two(rank, port, split, queue):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2)
    model = nn.parallel.DistributedDataParallel(Projections())
    rows = torch.arange(8)[:split] if rank == 0 else torch.arange(8)[split:]
    loss = loss_of(model, rows, gather=True)
    loss.backward()
    queue.put((rank, loss.item(), [parameter.grad.tolist() for parameter in model.parameters()]))
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.parametrize("split", [4, 5])
def test_two_processes_agree_with_one(split):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = mp.get_context("spawn")
    queue = context.Queue()
    processes = [context.Process(target=one_of_two, args=(rank, port, split, queue)) for rank in range(2)]
    for process in processes:
        process.start()
    results = sorted(queue.get(timeout=120) for _ in processes)
    for process in processes:
        process.join(timeout=60)
    model = Projections()
    loss = loss_of(model, torch.arange(8), gather=False)
    loss.backward()
    for _, theirs, gradients in results:
        assert theirs == pytest.approx(loss.item(), abs=1e-5)
        for parameter, gradient in zip(model.parameters(), gradients, strict=True):
            torch.testing.assert_close(torch.tensor(gradient), parameter.grad, atol=1e-5, rtol=1e-4)
