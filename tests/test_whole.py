"""Whole numbers and what is made of them; whole runs are compared in test_devices.py."""

import gc
import hashlib
import math

import pytest
import torch
from torch import Tensor, nn

from lit_threeseven import LitThreeSeven, ThreeSevenDataModule, functional, whole
from lit_threeseven.functional import GradientDescent, linear, mean_squared_error, sigmoid, sum_of_squares
from lit_threeseven.metrics import AUROC, of_rows

PRODUCTS = [whole.by_integers, whole.by_packing, whole.by_float64]


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


def whole_numbers(digits: Tensor) -> list[int]:
    return [sum(int(digit) * 128**k for k, digit in enumerate(row)) for row in digits.t().tolist()]


@pytest.mark.parametrize("words", [1, 2])
def test_digits_are_those_of_the_rounded_number(words):
    most = 2.0 ** (28 * words - 1)
    random = torch.Generator().manual_seed(0)
    x = torch.cat([torch.randn(500, generator=random) * 10.0**power for power in range(-2, 9 * words - 3)])
    x = torch.cat([x, torch.tensor([0.0, 0.5, 1.5, -0.5, 64.0, -64.0, 63.5, 8256.0, most, -most])]).unsqueeze(1)
    digits = whole.digits(x, words)
    assert digits.shape == (4 * words, len(x))
    assert digits.abs().max() <= 64
    assert whole_numbers(digits) == [round(value) for value in x.flatten().tolist()]  # both round half to even
    found = whole.words(digits).t().tolist()
    assert [sum(word * 2 ** (28 * k) for k, word in enumerate(row)) for row in found] == whole_numbers(digits)


@pytest.mark.parametrize("rows", [0, 1, 2, 3, 17, 513, 1100])
@pytest.mark.parametrize("words", [1, 2])
def test_products_are_those_of_integers_however_bright_the_pixels(product, rows, words):
    rows += product is whole.by_packing and not rows  # to keep no rows is not worth while
    random = torch.Generator().manual_seed(rows)
    for bytes_ in (torch.randint(0, 256, (rows, 784), generator=random), torch.full((rows, 784), 255)):
        x = bytes_.byte()
        for transposed in (False, True):
            matrix = x.t() if transposed else x
            digits = torch.randint(-64, 65, (4 * words, matrix.shape[1]), generator=random)
            for numbers in (digits, torch.full_like(digits, 64), torch.full_like(digits, -64)):
                expected = (matrix.long() @ numbers.t()).unflatten(1, (words, 4)) << 7 * torch.arange(4)
                assert torch.equal(product(matrix, numbers.float()), expected.sum(2).t())


def test_more_rows_than_a_sum_may_have_are_added_in_parts(product, monkeypatch):
    monkeypatch.setattr(whole, "TERMS", 100)
    monkeypatch.setattr(whole, "ROWS", 70)
    x = torch.randint(0, 256, (1001, 5), generator=torch.Generator().manual_seed(0)).byte()
    expected = x.sum(0) * sum(64 * 128**k for k in range(4))
    assert torch.equal(product(x.t(), torch.full((4, 1001), 64.0)), expected.unsqueeze(0))


def fails(*args):
    raise RuntimeError("not here")


@pytest.mark.parametrize("name", ["_int_mm", "_make_per_tensor_quantized_tensor"])
@pytest.mark.parametrize("fault", ["missing", "refuses", "wrong"])
def test_without_fast_products_the_one_of_float64_takes_their_place(monkeypatch, name, fault, data):
    product = whole.by_integers if name == "_int_mm" else whole.by_packing
    usual = getattr(torch, name)
    assert whole.seconds.__wrapped__(product) < math.inf
    monkeypatch.setattr(torch, name, fails if fault == "refuses" else lambda x, *rest: usual(x.roll(1, 1), *rest))
    if fault == "missing":
        monkeypatch.delattr(torch, name)
    assert whole.seconds.__wrapped__(product) == math.inf


@pytest.mark.parametrize("known", [{}, {whole.by_integers: 0.0}, {whole.by_packing: 0.0}])
def test_bytes_that_are_kept_give_the_same_bits_by_any_product_and_are_given_up_with_their_batch(
    monkeypatch, data, known
):
    expected = results(data)
    monkeypatch.setattr(
        whole, "seconds", lambda product: known.get(product, math.inf if product != whole.by_float64 else 1)
    )
    x = data[0].clone()
    whole.keep(x)
    assert (id(x) in whole.KEPT) == bool(known)
    assert all(map(torch.equal, results((x, data[1])), expected))
    key = id(x)
    del x
    gc.collect()
    assert key not in whole.KEPT


def test_a_device_other_than_the_cpu_multiplies_in_float64():
    assert whole.fastest(torch.device("cuda")) is whole.by_float64


def results(data: tuple[Tensor, Tensor], product: whole.Product | None = None, init_std: float = 0.3) -> list[Tensor]:
    """Probability, loss and gradients of a network, by one of the products."""
    x, y = data
    torch.manual_seed(0)
    model = LitThreeSeven(init_std=init_std)
    with pytest.MonkeyPatch.context() as patch:
        if product:
            patch.setattr(whole, "fastest", lambda device: product)
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
        assert error <= max(2 * limit, 3e-7 * expected.abs().max(), 2**-50)


def test_gradients_of_the_parts_are_those_of_float64(data):
    """As `torch.autograd.gradcheck` would find them, which needs float64."""
    x, y = data[0][:50], data[1][:50]
    W, b, z = torch.randn(784, 1) * 0.1, torch.randn(1), torch.randn(50, 1)
    parts = {
        "W": (lambda W: linear(x, W, b), lambda W: x.double() / 255 @ W + b, W),
        "b": (lambda b: linear(x, W, b), lambda b: x.double() / 255 @ W.double() + b, b),
        "sigmoid": (sigmoid, torch.sigmoid, z),
        "squares": (sum_of_squares, lambda z: (z * z).sum(), z),
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


@pytest.mark.parametrize("slope", [16.0, -1e30, float("inf"), float("nan")])
def test_a_slope_beyond_the_grid_makes_the_gradient_nan_and_not_wrong(data, slope):
    x, slopes = data[0][:3], torch.tensor([[1.0], [slope], [0.5]])
    W, b = torch.zeros(784, 1, requires_grad=True), torch.zeros(1, requires_grad=True)
    linear(x, W, b).backward(slopes)
    assert W.grad.isnan().all()
    assert b.grad.isnan().all()


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_makes_all_probabilities_nan(data, number):
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
    assert sums[0].dtype == torch.int64
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


def test_the_exponential_is_close_to_the_true_one_and_the_same_bits_everywhere():
    x = torch.linspace(-87, 87, 10_001)
    error = (functional._exponential(x).double() / x.double().exp() - 1).abs()
    assert error.max() < 2**-22
    bits = hashlib.sha256(functional._exponential((x * 64).round() / 64).numpy().astype("<f4").tobytes()).hexdigest()
    assert bits == "a6c73b98e84896cc600eb15ab80300137a0b12e316914fb5904fad2c0ba9b832"


def test_squares_add_up_to_the_same_bits_in_any_order():
    random = torch.Generator().manual_seed(0)
    error = torch.rand(5000, 1, generator=random)
    found = {sum_of_squares(error[torch.randperm(5000, generator=random)]).item() for _ in range(20)}
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


def test_auroc_of_a_single_digit_is_zero_as_torchmetrics_has_it():
    auroc = AUROC()
    auroc.update(torch.rand(5, 1), torch.ones(5, 1))
    assert auroc.compute() == 0


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
