import copy

import pytest
import torch

from lit_threeseven import LitThreeSeven, ThreeSevenDataModule
from lit_threeseven.dataset import BUNDLED_ROOT, load
from lit_threeseven.pixels import SparsePixels, flatten, scale

needs_mkl = pytest.mark.skipif(not torch.backends.mkl.is_available(), reason="sparse products need MKL")
STORES = [flatten, pytest.param(SparsePixels, marks=needs_mkl)]


@pytest.fixture(scope="module")
def images():
    return load(BUNDLED_ROOT, (3, 7), train=False)[0]


def test_flattened_images_are_rows_of_pixels_in_the_unit_interval(images):
    x = flatten(images)
    assert x.shape == (2038, 784)
    assert x.dtype == torch.float32
    assert x.min() == 0
    assert x.max() == 1
    assert torch.equal(x[5], images[5].reshape(784).to(torch.float32) / 255)
    assert torch.equal(flatten(images.flatten(1)), x)


def test_one_image_can_be_scaled_by_itself(images):
    assert torch.equal(scale(images[5]), flatten(images)[5].reshape(28, 28))


@pytest.mark.parametrize("function", [flatten, scale])
@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8])
def test_flattening_and_scaling_leave_the_caller_s_tensor_as_it_was(function, dtype):
    pixels = torch.full((2, 784), 255, dtype=dtype)
    assert (function(pixels) == 1).all()
    assert (pixels == 255).all()


@pytest.mark.parametrize("store", STORES)
@pytest.mark.parametrize("columns", [1, 5])
@pytest.mark.parametrize("rows", [0, 1, 2038])
def test_products_and_their_gradients_are_those_of_the_flattened_images(images, store, rows, columns):
    x, expected = store(images[:rows]), flatten(images[:rows]).double()
    W = torch.randn(784, columns, requires_grad=True)
    factor = torch.randn(rows, columns)
    product = x.flatten(1) @ W
    (product * factor).sum().backward()
    assert x.shape[0] == rows
    assert product.shape == (rows, columns)
    torch.testing.assert_close(product.double(), expected @ W.double(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(W.grad.double(), expected.t() @ factor.double(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("store", STORES)
def test_some_rows_are_those_of_the_flattened_images(images, store):
    rows = torch.tensor([2037, 3, 0])
    assert torch.equal(store(images)[rows], flatten(images)[rows])


@pytest.mark.parametrize("pixels", ["dense", pytest.param("sparse", marks=needs_mkl)])
def test_a_full_batch_can_be_deep_copied(trainer, pixels):
    class Keeps(ThreeSevenDataModule):
        def train_dataloader(self):
            self.loader = super().train_dataloader()
            return self.loader

    data, model = Keeps(pixels=pixels), LitThreeSeven()
    trainer(max_epochs=1).fit(model, data)
    batch = next(iter(data.loader))
    assert isinstance(batch.x, SparsePixels) == (pixels == "sparse")
    x, y = copy.deepcopy(batch)
    assert torch.equal(model(x), model(batch.x))
    assert torch.equal(y, batch.y)
