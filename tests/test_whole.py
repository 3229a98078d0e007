"""Whole numbers and what is made of them; whole runs are compared in test_devices.py."""

import gc
import hashlib
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lit_threeseven import LitThreeSeven, ThreeSevenDataModule, functional, whole
from lit_threeseven.functional import GradientDescent, linear, mean_squared_error, sigmoid, sum_of_squares
from lit_threeseven.metrics import of_rows


def packed(x: Tensor) -> whole.Products:
    """As `keep` packs them."""
    return whole.packed(x, 7), whole.packed(x.t(), 4)


PRODUCTS = [whole.products, packed]


@pytest.fixture(scope="module")
def data() -> tuple[Tensor, Tensor]:
    """Bytes, ``(12396, 784)``, and labels of the training images."""
    module = ThreeSevenDataModule(val_fraction=0)
    module.setup("fit")
    images, y = module.train.tensors
    return images.flatten(1), y


@pytest.fixture(params=PRODUCTS)
def product(request):
    """Each of the products in turn."""
    return request.param


@pytest.mark.parametrize(("bits", "count"), [(7, 4), (4, 7), (4, 14)])
def test_digits_are_those_of_the_number_and_add_up_to_less_than_four_times_as_much(bits, count):
    most = 2.0 ** (bits * count - 1)
    random = torch.Generator().manual_seed(0)
    x = torch.cat([torch.randn(500, generator=random) * 10.0**power for power in range(bits * count // 4 + 1)])
    x = torch.cat([x.round(), torch.arange(-5000.0, 5000.0), torch.tensor([most, -most])]).unsqueeze(1)
    powers = torch.tensor([[2.0 ** (bits * k)] for k in range(count + 1)])
    digits = whole.digits(x, powers, bits)
    assert digits.shape == (count, len(x))
    assert digits.abs().max() <= 2 ** (bits - 1)
    assert [sum(int(digit) << bits * k for k, digit in enumerate(row)) for row in digits.t().tolist()] == integers(x)
    absolute = digits.abs().double().t() @ powers[:-1].double()
    assert (absolute < 4 * x.abs().double())[x != 0].all()


def integers(numbers: Tensor) -> list[int]:
    return list(map(int, numbers.flatten().tolist()))


def multiplied(x: Tensor, numbers: Tensor) -> list[int]:
    """Bytes times whole numbers, by integers of any size."""
    return [sum(map(int.__mul__, row, integers(numbers))) for row in x.tolist()]


@pytest.mark.parametrize("bits", [whole.SUM, 14])
@pytest.mark.parametrize("rows", [1, 2, 3, 17, 1100])
def test_products_are_those_of_integers_however_bright_the_pixels(product, rows, bits, monkeypatch):
    monkeypatch.setattr(whole, "SUM", bits)  # 14: parts of one term and of eight
    monkeypatch.setattr(whole, "ROWS", 70)
    random = torch.Generator().manual_seed(rows)
    any_bytes, white = torch.randint(0, 256, (rows, 50), generator=random).byte(), torch.full((rows, 50), 255).byte()
    for x in (any_bytes, white, torch.zeros(rows, 50).byte()):
        times, transposed_times = product(x)
        for weights in (
            torch.randn(50, 1, generator=random) * 2**24,
            torch.full((50, 1), -(2.0**27)),
            torch.zeros(50, 1),
        ):
            assert integers(times(weights.round())) == multiplied(x, weights.round())
        drawn = [torch.randn(rows, 1, generator=random) * 2.0**power for power in (-9, 9, 30)]
        for slopes in (*drawn, torch.full((rows, 1), 2.0**43 // rows), torch.full((rows, 1), 8.0)):
            assert integers(transposed_times(slopes.round())) == multiplied(x.t(), slopes.round())


@pytest.mark.parametrize(("transposed", "size", "number"), [(0, 2**11, 63 * 0x4081), (1, 2**14, 0x777777)])
def test_the_largest_sums_are_exact(product, transposed, size, number):
    """As many terms as a packed sum may have, twice, and almost as large ones, of which no bit is zero for all."""
    random = torch.Generator().manual_seed(0)
    x = torch.randint(254, 256, (size, 3) if transposed else (3, size), generator=random).byte()
    numbers = torch.full((size, 1), float(number))
    assert integers(product(x)[transposed](numbers)) == multiplied(x.t() if transposed else x, numbers)


def test_numbers_that_add_up_to_the_most_are_exact(product):
    for rows in (1, 3, 2**13, 2**17):
        slopes = torch.full((rows, 1), float(2**43 // rows))
        assert integers(product(torch.full((rows, 2), 255).byte())[1](slopes)) == [255 * sum(integers(slopes))] * 2
    wide = torch.full((2, 2**10), 255).byte()
    assert integers(product(wide)[0](torch.full((2**10, 1), -(2.0**33)))) == [-255 * 2**43] * 2


@pytest.mark.parametrize("power", [60, 94, 110, 119, 120, 125, 127])
def test_numbers_beyond_are_as_exact_as_float64_s_or_not_finite(product, power):
    random = torch.Generator().manual_seed(0)
    x = torch.randint(0, 256, (50, 20), generator=random).byte()
    for transposed, size in enumerate(reversed(x.shape)):
        numbers = torch.randn(size, 1, generator=random).clamp(-1, 1) * 2.0**power
        found, matrix = product(x)[transposed](numbers), x.t() if transposed else x
        if power < 120 or product is whole.products:
            torch.testing.assert_close(found, matrix.double() @ numbers.double(), rtol=1e-13, atol=0)
        else:
            assert not found.isfinite().any()


def test_without_rows_all_sums_are_zero():
    times, transposed_times = whole.products(torch.zeros(0, 50).byte())
    assert times(torch.ones(50, 1)).shape == (0, 1)
    assert torch.equal(transposed_times(torch.ones(0, 1)), torch.zeros(50, 1).double())


def fails(*args):
    raise RuntimeError("not here")


@pytest.mark.parametrize("fault", [None, "missing", "refuses", "wrong"])
def test_bytes_that_are_kept_give_the_same_bits_and_are_given_up_with_their_batch(monkeypatch, fault, data):
    """Where they can't be packed, or would not be exact, float64 takes the place of the fast product by itself."""
    expected = results(data)
    usual = torch._make_per_tensor_quantized_tensor
    if fault == "missing":
        monkeypatch.delattr(torch, "_make_per_tensor_quantized_tensor")
    elif fault:
        wrong = fails if fault == "refuses" else lambda x, *rest: usual(x.roll(1, 1), *rest)
        monkeypatch.setattr(torch, "_make_per_tensor_quantized_tensor", wrong)
    x = data[0].clone()
    whole.keep(x)
    assert (x in whole.KEPT) is (not fault)
    assert all(map(torch.equal, results((x, data[1])), expected))
    ways = [weakref.ref(way) for way in whole.KEPT.get(x, ())]
    del x
    gc.collect()
    assert [way() for way in ways] == [None] * (0 if fault else 2)


def results(data: tuple[Tensor, Tensor], product: Any = None, init_std: float = 0.3) -> list[Tensor]:
    """Probability, loss and gradients of a network, by one of the products."""
    x, y = data
    torch.manual_seed(0)
    model = LitThreeSeven(init_std=init_std)
    with pytest.MonkeyPatch.context() as patch:
        if product:
            patch.setattr(whole, "products", product)
        probability = model(x)
        loss = mean_squared_error(probability, y)
        loss.backward()
    return [probability.detach(), loss.detach(), model.W.grad, model.b.grad]


@pytest.mark.parametrize("rows", [1, 64, 3000])
def test_each_product_gives_the_same_bits(data, rows):
    part = data[0][:rows], data[1][:rows]
    expected = results(part, PRODUCTS[0])
    for product in PRODUCTS[1:]:
        assert all(map(torch.equal, results(part, product), expected))


def reference(data: tuple[Tensor, Tensor], init_std: float, dtype: torch.dtype) -> list[Tensor]:
    """The same by plain autograd."""
    torch.manual_seed(0)
    model = LitThreeSeven(init_std=init_std)
    W, b = (tensor.detach().to(dtype).requires_grad_() for tensor in (model.W, model.b))
    p = torch.sigmoid(data[0].to(dtype) / 255 @ W + b)
    loss = (p - data[1]).square().mean()
    loss.backward()
    return [p.detach(), loss.detach(), W.grad, b.grad]


@pytest.mark.parametrize("init_std", [0.01, 1.0, 1e4])
@pytest.mark.parametrize("rows", [1, 64, 12396])
def test_probability_loss_and_gradient_are_as_close_to_the_true_ones_as_those_of_float32(data, init_std, rows):
    part = data[0][:rows], data[1][:rows]
    true, plain = (reference(part, init_std, dtype) for dtype in (torch.float64, torch.float32))
    for found, other, expected in zip(results(part, init_std=init_std), plain, true, strict=True):
        error, limit = (found - expected).abs().max(), (other - expected).abs().max()
        assert error <= max(2 * limit, 3e-7 * expected.abs().max(), 2**-42)


def test_gradients_of_the_parts_are_those_of_float64(data):
    """As `torch.autograd.gradcheck` would find them, which needs float64."""
    x, y = data[0][:50], data[1][:50]
    W, b, z = torch.randn(784, 1) * 0.1, torch.randn(1), torch.randn(50, 1)
    parts = {
        "W": (lambda W: linear(x, W, b), lambda W: x.double() / 255 @ W + b, W),
        "b": (lambda b: linear(x, W, b), lambda b: x.double() / 255 @ W.double() + b, b),
        "sigmoid": (sigmoid, torch.sigmoid, z),
        "squares": (lambda z: sum_of_squares(z, y), lambda z: ((z - y) ** 2).sum(), z),
        "mean": (lambda z: mean_squared_error(z, y), lambda z: ((z - y) ** 2).mean(), z),
    }
    for name, (ours, theirs, at) in parts.items():
        at = at.clone().requires_grad_()
        exact = at.detach().double().requires_grad_()
        found, expected = ours(at), theirs(exact)
        factor = torch.randn(expected.shape, generator=torch.Generator().manual_seed(0))
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)
        (found * factor).sum().backward()
        (expected * factor).sum().backward()
        torch.testing.assert_close(at.grad.double(), exact.grad, rtol=1e-5, atol=1e-5, msg=name)


@pytest.mark.parametrize("transform", [torch.func.jacrev, torch.func.grad])
def test_a_sigmoid_can_be_transformed(transform):
    x = torch.linspace(-3, 3, 7)
    derivative = transform(lambda x: sigmoid(x).sum())(x)
    torch.testing.assert_close(derivative, torch.sigmoid(x) * (1 - torch.sigmoid(x)))


@pytest.mark.parametrize("slope", [-1e20, -1e30, float("inf"), float("nan")])
def test_gradients_of_slopes_that_are_large_or_not_finite_are_right_or_not_finite(data, product, monkeypatch, slope):
    monkeypatch.setattr(whole, "products", product)
    x, slopes = data[0][:3], torch.tensor([[1.0], [slope], [0.5]])
    W, b = torch.zeros(784, 1, requires_grad=True), torch.zeros(1, requires_grad=True)
    linear(x, W, b).backward(slopes)
    expected = x.t().double() / 255 @ slopes.double(), slopes.sum(0)
    for found, true in zip((W.grad, b.grad), expected, strict=True):
        if abs(slope) < 1e25:
            torch.testing.assert_close(found, true.float())
        else:
            assert not found[true != 0].isfinite().any()


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_makes_all_probabilities_nan(data, product, monkeypatch, number):
    monkeypatch.setattr(whole, "products", product)
    W = torch.zeros(784, 1)
    W[7] = number
    assert sigmoid(linear(data[0][:3], W, torch.zeros(1))).isnan().all()


@pytest.mark.parametrize("shares", [2, 3, 5, 7, 64])
@pytest.mark.parametrize("rows", [100, 12396])
def test_shares_of_any_number_add_up_to_the_same_bits(data, monkeypatch, shares, rows):
    """Each share's whole numbers are kept as they are handed to the other processes, and added up in two orders."""
    x, y = data[0][:rows], data[1][:rows]
    expected = results((x, y))[2:]
    sums: list[Tensor] = []
    monkeypatch.setattr(functional, "over_processes", lambda tensor: sums.append(tensor.clone()) or tensor)
    torch.manual_seed(0)
    model = LitThreeSeven(init_std=0.3)
    for part, labels in zip(x.tensor_split(shares), y.tensor_split(shares), strict=True):
        mean_squared_error(model(part), labels, rows).backward()
    totals = torch.stack(sums).sum(0), torch.stack(sums).flip(0).cumsum(0)[-1]
    assert all(torch.equal(part, part.round()) for part in sums)
    for total in totals:
        monkeypatch.setattr(functional, "over_processes", lambda tensor, total=total: total)
        model.zero_grad()
        mean_squared_error(model(x[:1]), y[:1], rows).backward()
        assert torch.equal(model.W.grad, expected[0])
        assert torch.equal(model.b.grad, expected[1])


def test_a_share_without_rows_has_a_gradient_of_zero(data):
    model = LitThreeSeven()
    loss = mean_squared_error(model(data[0][:0]), data[1][:0], 10)
    loss.backward()
    assert (loss, model.b.grad) == (0, 0)
    assert torch.equal(model.W.grad, torch.zeros(784, 1))


def test_the_sigmoid_is_close_to_the_true_one_and_the_same_bits_everywhere():
    x = torch.linspace(-87, 30, 10_001)
    error = (sigmoid(x).double() / x.double().sigmoid() - 1).abs()
    assert error.max() < 2**-22
    bits = hashlib.sha256(sigmoid((x * 64).round() / 64).numpy().astype("<f4").tobytes()).hexdigest()
    assert bits == "f5baa229cccd4adedb4a8657a43aa391d1f9033100c549b25d579f801b5d424c"


def test_a_second_derivative_of_the_sigmoid_is_close_to_the_true_one():
    x = torch.linspace(-3, 3, 7)
    p = torch.sigmoid(x)
    found = torch.func.vmap(torch.func.grad(torch.func.grad(sigmoid)))(x)
    torch.testing.assert_close(found, p * (1 - p) * (1 - 2 * p), rtol=1e-3, atol=1e-4)


def test_squares_add_up_to_the_same_bits_in_any_order():
    random = torch.Generator().manual_seed(0)
    error = torch.rand(5000, 1, generator=random)
    found = {
        sum_of_squares(error[torch.randperm(5000, generator=random)], torch.zeros(5000, 1)).item() for _ in range(20)
    }
    assert len(found) == 1
    assert found.pop() == pytest.approx(error.double().square().sum().item(), rel=1e-7)


@pytest.mark.parametrize("stage", [0, 1])
def test_metrics_are_those_of_torchmetrics_but_for_rounding_and_have_no_order(stage):
    from torchmetrics.functional.classification import binary_auroc

    random = torch.Generator().manual_seed(0)
    p = torch.rand(3000, 1, generator=random).mul(50).round() / 50  # with ties
    y = (torch.rand(3000, 1, generator=random) < p).float()
    found = []
    for _ in range(5):
        metrics, order = of_rows(), torch.randperm(3000, generator=random)
        with torch.inference_mode(bool(stage)):
            for part in order.tensor_split(7):
                for metric in metrics.values():
                    metric.update(p[part], y[part])
            found.append(tuple(metric.compute().item() for metric in metrics.values()))
    assert len(set(found)) == 1
    expected = (p - y).square().mean(), ((p >= 0.5) == y.bool()).float().mean(), binary_auroc(p, y.int())
    assert found[0] == pytest.approx([float(value) for value in expected], abs=1e-6)


def test_gradient_descent_is_that_of_torch_but_for_rounding():
    ends = []
    for optimizer in (GradientDescent, torch.optim.SGD):
        random = torch.Generator().manual_seed(0)
        weight = nn.Parameter(torch.randn(1000, generator=random))
        steps = optimizer([weight], lr=0.3)
        for _ in range(5):
            weight.grad = torch.randn(1000, generator=random)
            steps.step()
        ends.append(weight.detach())
    torch.testing.assert_close(*ends, rtol=1e-6, atol=1e-6)


def test_gradient_descent_rounds_the_product_before_it_is_subtracted():
    weight = nn.Parameter(torch.tensor([1.0]))
    weight.grad = torch.tensor([1 + 2**-12])
    GradientDescent([weight], lr=1 + 2**-12).step()  # the product is 1 + 2^-11 + 2^-24, whose last bit is lost
    assert weight.item() == -(2**-11)


@pytest.mark.parametrize("lr", [-1.0, float("nan"), float("inf")])
def test_a_rate_below_zero_is_refused(lr):
    with pytest.raises(ValueError, match="lr must be a finite number of at least 0, got"):
        GradientDescent([nn.Parameter(torch.zeros(1))], lr=lr)


def test_the_start_is_the_same_bits_everywhere():
    torch.manual_seed(0)
    model = LitThreeSeven()
    start = "61fca18b7ee1931242ff4701f621f0c51bc3d187cd909f5139f81b574c834f64"
    assert model.digest() == start
    model.W.data.view(torch.int32)[0, 0] ^= 1
    assert model.digest() != start
