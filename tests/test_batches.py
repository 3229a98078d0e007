from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from lit_threeseven import LitThreeSeven
from lit_threeseven.batches import Batch, Batches, shared
from lit_threeseven.functional import mean_squared_error, scale

ROWS = 23


@pytest.fixture(scope="module")
def data() -> TensorDataset:
    """Images that can be told apart by their first pixel."""
    images = torch.randint(0, 256, (ROWS, 28, 28), generator=torch.Generator().manual_seed(0)).byte()
    images[:, 0, 0] = torch.arange(ROWS)
    return TensorDataset(images, torch.arange(ROWS).remainder(2).float().unsqueeze(1))


def loaders_of(data: TensorDataset, batch_size: int | None, world_size: int, **options: Any) -> list[Batches]:
    """A loader for each of several processes."""
    return [Batches(data, batch_size, share=(rank, world_size), **options) for rank in range(world_size)]


def rows_of(batch: Batch) -> list[int]:
    return (batch.x[:, 0] * 255).round().int().tolist()


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 30])
@pytest.mark.parametrize("batch_size", [None, 1, 2, 7, 23, 100])
@pytest.mark.parametrize("shuffle", [False, True])
def test_every_row_is_seen_exactly_once_on_exactly_one_process(data, world_size, batch_size, shuffle):
    loaders = loaders_of(data, batch_size, world_size, shuffle=shuffle)
    epochs = [list(loader) for loader in loaders]
    assert [len(epoch) for epoch in epochs] == [len(loaders[0])] * world_size
    seen = []
    for shares in zip(*epochs, strict=True):
        sizes = [len(share.x) for share in shares]
        assert max(sizes) - min(sizes) <= 1
        assert {share.global_rows for share in shares} == {sum(sizes)}
        assert shares[0].divisor * world_size == pytest.approx(sum(sizes))
        seen += [row for share in shares for row in rows_of(share)]
        assert [share.rows.tolist() for share in shares] == [rows_of(share) for share in shares]
    assert sorted(seen) == list(range(ROWS))
    if not shuffle:
        assert seen == list(range(ROWS))


def test_global_batches_are_the_same_on_any_number_of_processes(data):
    def global_batches(world_size: int) -> list[list[int]]:
        loaders = loaders_of(data, 5, world_size, shuffle=True)
        for loader in loaders:
            loader.sampler.set_epoch(4)
        return [[row for share in shares for row in rows_of(share)] for shares in zip(*loaders, strict=True)]

    assert global_batches(1) == global_batches(2) == global_batches(3)


def test_mean_loss_over_processes_is_the_loss_of_the_global_batch(data):
    (whole,) = Batches(data)
    shares = [next(iter(loader)) for loader in loaders_of(data, None, 3)]
    losses = [mean_squared_error(share.x[:, :1], share.y, share.divisor) for share in shares]
    expected = mean_squared_error(whole.x[:, :1], whole.y)
    torch.testing.assert_close(torch.stack(losses).mean(), expected)


def test_order_depends_on_seed_and_epoch_alone(data):
    def order(seed: int, epoch: int) -> list[list[int]]:
        torch.rand(1)  # the global generator plays no part
        loader = Batches(data, 5, shuffle=True, seed=seed)
        loader.sampler.set_epoch(epoch)
        return [rows_of(batch) for batch in loader]

    assert order(0, 3) == order(0, 3)
    assert order(0, 3) != order(0, 4)
    assert order(0, 3) != order(1, 3)


def test_rows_keep_their_labels(data):
    images, y = data.tensors
    for x, labels in Batches(data, 5, shuffle=True):
        rows = (x[:, 0] * 255).round().long()
        assert torch.equal(x, scale(images).flatten(1)[rows])
        assert torch.equal(labels, y[rows])


def test_a_full_batch_is_made_once(data):
    loader = Batches(data, shuffle=True)
    (first,), (second,) = loader, loader
    assert first.x is second.x
    assert first.y is second.y


def test_a_batch_is_a_pair(data):
    (batch,) = Batches(data)
    x, y = batch
    assert x is batch.x is batch[0]
    assert y is batch.y is batch[1]
    assert len(batch) == 2


def test_a_batch_moves_to_another_device_whole(data):
    (batch,) = Batches(data, share=(0, 2))
    moved = batch.to("meta")
    assert moved.x.device.type == moved.y.device.type == moved.rows.device.type == "meta"
    assert (moved.global_rows, moved.divisor) == (ROWS, ROWS / 2)
    assert batch.to("cpu") is batch


def test_a_loader_resumes_after_the_batches_that_were_seen(data):
    loader = Batches(data, 5, shuffle=True)
    epochs = [[rows_of(batch) for batch in loader] for _ in range(3)]
    for epoch in range(3):
        for seen in range(6):
            resumed = Batches(data, 5, shuffle=True)
            resumed.load_state_dict({"epoch": epoch, "seen": seen})
            resumed.sampler.set_epoch(epoch)
            assert [rows_of(batch) for batch in resumed] == epochs[epoch][seen:]


def test_a_loader_says_where_it_is(data):
    loader = Batches(data, 5)
    list(loader)
    iterator = iter(loader)
    next(iterator)
    next(iterator)
    assert loader.state_dict() == {"epoch": 1, "seen": 2}


def test_bytes_are_those_of_the_images_and_their_loss_is_divided_by_all_rows(data):
    (first, _) = loaders_of(data, None, 2, as_bytes=True)
    (batch,) = first
    assert batch.x.dtype == torch.uint8
    assert torch.equal(batch.x, data.tensors[0][:12].flatten(1))
    assert batch.divisor == ROWS


def test_a_full_batch_that_was_made_in_inference_mode_can_be_trained_on(data):
    loader = Batches(data)
    with torch.inference_mode():
        list(loader)
    ((x, y),) = loader
    W = torch.zeros(784, 1, requires_grad=True)
    mean_squared_error(torch.sigmoid(x @ W), y).backward()
    assert W.grad.abs().sum() > 0


def test_a_batch_of_another_loader_is_taken_as_it_is_and_bytes_become_floats(data):
    images, y = data.tensors
    x, labels, divisor = shared([images, y], check=True)
    assert torch.equal(x, images / 255)
    assert labels is y
    assert divisor == ROWS


@pytest.mark.parametrize(
    ("x", "y", "sentence"),
    [
        (torch.ones(2, 784), torch.tensor([[3.0], [7.0]]), r"Labels must be 1 .* and 0 .*, got \[3.0, 7.0\]"),
        (torch.full((2, 784), 255.0), torch.ones(2, 1), "Pixels must be bytes or floats from 0 to 1, got 255 to 255"),
        (torch.full((2, 784), -1.0), torch.ones(2, 1), "Pixels must be .* got -1 to -1"),
    ],
)
def test_other_labels_and_pixels_are_refused_in_a_sentence(x, y, sentence, trainer):
    with pytest.raises(ValueError, match=sentence):
        shared((x, y), check=True)
    for stage in ("fit", "test"):
        with pytest.raises(ValueError, match=sentence):
            getattr(trainer(), stage)(LitThreeSeven(), DataLoader(TensorDataset(x, y), batch_size=2))
