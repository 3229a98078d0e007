import pytest
import torch

from lit_threeseven.batches import Batches
from lit_threeseven.dataset import flatten
from lit_threeseven.functional import mean_squared_error

ROWS = 23


@pytest.fixture(scope="module")
def data():
    """Images that can be told apart by their first pixel."""
    images = torch.randint(0, 256, (ROWS, 28, 28), generator=torch.Generator().manual_seed(0)).byte()
    images[:, 0, 0] = torch.arange(ROWS)
    return images, torch.arange(ROWS).remainder(2).float().unsqueeze(1)


def rows_of(batch):
    return (batch.x[:, 0] * 255).round().int().tolist()


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 30])
@pytest.mark.parametrize("batch_size", [None, 1, 2, 7, 23, 100])
@pytest.mark.parametrize("shuffle", [False, True])
def test_every_row_is_seen_exactly_once_on_exactly_one_process(data, world_size, batch_size, shuffle):
    loaders = [
        Batches(*data, None, batch_size, shuffle=shuffle, rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]
    epochs = [list(loader) for loader in loaders]
    assert [len(epoch) for epoch in epochs] == [len(loaders[0])] * world_size
    seen = []
    for shares in zip(*epochs, strict=True):
        sizes = [len(share.x) for share in shares]
        assert max(sizes) - min(sizes) <= 1
        assert shares[0].rows * world_size == pytest.approx(sum(sizes))
        seen += [row for share in shares for row in rows_of(share)]
    assert sorted(seen) == list(range(ROWS))
    if not shuffle:
        assert seen == list(range(ROWS))


def test_global_batches_are_the_same_on_any_number_of_processes(data):
    def global_batches(world_size):
        loaders = [Batches(*data, None, 5, shuffle=True, rank=r, world_size=world_size) for r in range(world_size)]
        for loader in loaders:
            loader.set_epoch(4)
        return [[row for share in shares for row in rows_of(share)] for shares in zip(*loaders, strict=True)]

    assert global_batches(1) == global_batches(2) == global_batches(3)


def test_mean_over_processes_of_the_loss_is_that_of_the_global_batch(data):
    (whole,) = Batches(*data)
    shares = [next(iter(Batches(*data, rank=rank, world_size=3))) for rank in range(3)]
    losses = [mean_squared_error(x[:, :1], y, rows) for x, y, rows in shares]
    expected = mean_squared_error(whole.x[:, :1], whole.y)
    torch.testing.assert_close(torch.stack(losses).mean(), expected)


def test_order_depends_on_seed_and_epoch_alone(data):
    def order(seed, epoch):
        torch.rand(1)  # the global generator plays no part
        loader = Batches(*data, None, 5, shuffle=True, seed=seed)
        loader.set_epoch(epoch)
        return [rows_of(batch) for batch in loader]

    assert order(0, 3) == order(0, 3)
    assert order(0, 3) != order(0, 4)
    assert order(0, 3) != order(1, 3)


def test_rows_keep_their_labels(data):
    images, y = data
    for x, labels, _ in Batches(images, y, None, 5, shuffle=True):
        rows = (x[:, 0] * 255).round().long()
        assert torch.equal(x, flatten(images)[rows])
        assert torch.equal(labels, y[rows])


def test_full_batch_is_the_same_tensor_every_epoch(data):
    loader = Batches(*data, shuffle=True)
    (first,), (second,) = loader, loader
    assert first.x is second.x
    assert first.y is second.y
