import math

import pytest
import torch

from lit_threeseven.functional import mean_squared_error, scale, sigmoid


@pytest.mark.parametrize("x", [-80.0, -20.0, -1.5, 0.0, 0.3, 5.0, 30.0])
def test_sigmoid_is_the_equation(x):
    assert sigmoid(torch.tensor(x)).item() == pytest.approx(1 / (1 + math.exp(-x)), rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_sigmoid_has_finite_values_and_gradients_for_every_finite_input(dtype):
    largest = torch.finfo(dtype).max
    x = torch.tensor([-largest, -1e4, -89.0, -12.0, 0.0, 12.0, 89.0, 1e4, largest], dtype=dtype, requires_grad=True)
    y = sigmoid(x)
    y.sum().backward()
    assert y.isfinite().all()
    assert ((y >= 0) & (y <= 1)).all()
    assert x.grad.isfinite().all()


def test_sigmoid_gradient_is_that_of_the_equation():
    x = torch.linspace(-30, 30, 201, dtype=torch.float64, requires_grad=True)
    y = sigmoid(x)
    y.sum().backward()
    torch.testing.assert_close(x.grad, (y * (1 - y)).detach())


def test_mean_squared_error_is_the_equation():
    prediction, target = torch.tensor([[0.3], [0.9], [0.5]]), torch.tensor([[1.0], [1.0], [0.0]])
    assert mean_squared_error(prediction, target).item() == pytest.approx((0.49 + 0.01 + 0.25) / 3)


def test_mean_squared_error_s_gradient_is_that_of_the_equation():
    prediction = torch.rand(30, 1, dtype=torch.float64, requires_grad=True)
    target = torch.arange(30, dtype=torch.float64).remainder(2).unsqueeze(1)
    mean_squared_error(prediction, target).backward()
    torch.testing.assert_close(prediction.grad, (2 * (prediction - target) / 30).detach())


def test_mean_over_processes_is_the_mean_over_the_global_batch():
    prediction, target = torch.rand(10, 1), torch.rand(10, 1)
    shares = [slice(0, 4), slice(4, 10), slice(10, 10)]  # unequal, and one empty
    losses = [mean_squared_error(prediction[s], target[s], divisor=10 / 3) for s in shares]
    torch.testing.assert_close(torch.stack(losses).mean(), mean_squared_error(prediction, target))


def test_mean_squared_error_refuses_shapes_that_would_broadcast():
    with pytest.raises(ValueError, match=r"same shape, got \(3, 1\) and \(3,\)"):
        mean_squared_error(torch.zeros(3, 1), torch.zeros(3))


def test_bytes_are_scaled_to_the_unit_interval_and_left_as_they_were():
    pixels = torch.arange(256).byte().view(2, 128)
    assert torch.equal(scale(pixels), torch.arange(256).view(2, 128) / 255)
    assert torch.equal(pixels, torch.arange(256).byte().view(2, 128))


def test_floats_are_not_scaled():
    x = torch.rand(2, 784)
    assert scale(x) is x
