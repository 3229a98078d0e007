import pytest
import torch

from lit_threeseven.dataset import flatten, load
from lit_threeseven.pixels import SparsePixels, sparse_obstacle, store

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def images():
    return load("bundled", "", (3, 7), train=False)[0]


@pytest.mark.parametrize("layout", ["dense", "sparse"])
@pytest.mark.parametrize("rows", [0, 1, 2038])
def test_products_are_those_of_the_flattened_images(images, layout, rows):
    x, expected = store(images[:rows], layout), flatten(images[:rows])
    W, s = torch.randn(784, 1), torch.randn(rows, 1)
    assert len(x) == rows
    torch.testing.assert_close(x.flatten(1) @ W, expected @ W, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(x.T @ s, expected.T @ s, rtol=1e-4, atol=1e-4)
    some = torch.arange(rows).flip(0)[:3]
    assert torch.equal(x[some], expected[some])


def test_sparse_pixels_take_less_memory_than_dense_ones(images):
    x = store(images, "sparse")
    assert isinstance(x, SparsePixels)
    assert x.nbytes < 0.85 * flatten(images).nbytes


def test_dense_pixels_of_a_full_batch_lie_column_by_column(images):
    assert store(images, "dense").stride() == (1, 2038)


def test_sparse_pixels_need_a_cpu_a_full_batch_float32_and_mkl(monkeypatch):
    assert "mini-batches" in sparse_obstacle(CPU, full_batch=False)
    assert "cuda:1" in sparse_obstacle(torch.device("cuda:1"), full_batch=True)
    assert "bf16-mixed" in sparse_obstacle(CPU, full_batch=True, precision="bf16-mixed")
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    assert sparse_obstacle(CPU, full_batch=True) is None
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: False)
    assert "without MKL" in sparse_obstacle(CPU, full_batch=True)
