import pytest
import torch

from lit_threeseven.dataset import BUNDLED_ROOT, load
from lit_threeseven.pixels import flatten, scale


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
def test_flattening_and_scaling_leave_the_caller_s_tensor_as_it_was(function):
    pixels = torch.full((2, 784), 255, dtype=torch.uint8)
    assert (function(pixels) == 1).all()
    assert (pixels == 255).all()


def test_floats_are_left_as_they_are():
    x = torch.rand(2, 784)
    assert scale(x) is x
