"""Sums without an order, and what is made of them; whole runs are compared in test_devices.py."""

import hashlib

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from networks import OwnForward
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lit_threeseven import LitThreeSeven, ThreeSevenDataModule, exact
from lit_threeseven.batches import Batch, Batches, Shares
from lit_threeseven.pixels import WholePixels, flatten

needs_mkl = pytest.mark.skipif(not torch.backends.mkl.is_available(), reason="a sparse product needs MKL")


@pytest.fixture(autouse=True)
def deterministic():
    yield torch.use_deterministic_algorithms(True)
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="module")
def data() -> tuple[Tensor, Tensor]:
    """Bytes and labels of the training images."""
    module = ThreeSevenDataModule(val_fraction=0)
    module.setup("fit")
    return module.train.tensors


def gradients(W: Tensor, b: Tensor, images: Tensor, y: Tensor, sparse: bool = False) -> list[Tensor]:
    """Loss, accuracy, and the gradients of `W` and `b`, of one process that has the whole batch."""
    W, b = (tensor.detach().clone().requires_grad_() for tensor in (W, b))
    loss, accuracy = exact.Step.apply(W, b, Batch(WholePixels(images, sparse), y, len(y), 1))
    loss.backward()
    return [loss.detach(), accuracy, W.grad, b.grad]


def reference(W: Tensor, b: Tensor, images: Tensor, y: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """The same by plain autograd."""
    W, b, y = (tensor.detach().clone().to(dtype) for tensor in (W, b, y))
    W.requires_grad_()
    b.requires_grad_()
    p = torch.sigmoid(images.flatten(1).to(dtype) / 255 @ W + b)
    loss = (p - y).square().mean()
    loss.backward()
    return [loss.detach(), ((p >= 0.5) == y.bool()).to(dtype).mean(), W.grad, b.grad]


@pytest.mark.parametrize("limit", [2.0**19, 2.0**-30])
def test_rounded_numbers_add_up_to_the_same_bits_in_any_order(limit):
    random = torch.Generator().manual_seed(0)
    terms = torch.randn(4096, generator=random, dtype=torch.float64) * limit / 2**16
    rounded = exact.rounded(terms, limit)
    assert (rounded - terms).abs().max() <= limit / 2**54
    sums = {rounded[torch.randperm(4096, generator=random)].view(64, 64).sum(0).sum().item() for _ in range(20)}
    assert sums == {rounded.sum().item()}
    assert len({terms[torch.randperm(4096, generator=random)].cumsum(0)[-1].item() for _ in range(20)}) > 1


@pytest.mark.parametrize("x", [1e-100, 0.3, 0.5, 1.0, 1.5, 6e38])
def test_the_next_power_of_two(x):
    power = exact.power_above(torch.tensor(x, dtype=torch.float64)).item()
    assert x < power <= 2 * x
    assert power.hex().startswith("0x1.0000000000000p")
    assert exact.power_above(torch.zeros((), dtype=torch.float64)) == 0


def test_the_exponential_is_close_to_the_true_one_and_the_same_bits_everywhere():
    x = torch.linspace(-87, 87, 10_001, dtype=torch.float64)
    error = (exact.exponential(x) / x.exp() - 1).abs()
    assert error.max() < 2**-30
    assert error[x.abs() <= 20].max() < 2**-40
    bits = hashlib.sha256(exact.exponential((x * 64).round() / 64).numpy().astype("<f8").tobytes()).hexdigest()
    assert bits == "5291159a554ef9097fb3d8d5543dedf9f8ee6ef83d4a0a08aa65ecbc7062b68b"


@pytest.mark.parametrize("init_std", [0.01, 1.0, 1e4])
@pytest.mark.parametrize("rows", [1, 64, 12396])
def test_loss_and_gradient_are_closer_to_the_true_ones_than_those_of_float32(data, init_std, rows):
    images, y = (tensor[:rows] for tensor in data)
    torch.manual_seed(0)
    model = LitThreeSeven(init_std=init_std)
    W, b = model.W.detach(), model.b.detach()
    true, plain = (reference(W, b, images, y, dtype) for dtype in (torch.float64, torch.float32))
    for found, other, expected in zip(gradients(W, b, images, y), plain, true, strict=True):
        error, limit = (found - expected).abs().max(), (other - expected).abs().max()
        assert error <= max(limit, 1e-7 * expected.abs().max())


@needs_mkl
def test_sparse_and_dense_pixels_give_the_same_bits(data):
    model = LitThreeSeven(init_std=0.3)
    dense, sparse = (gradients(model.W.detach(), model.b.detach(), *data, sparse) for sparse in (False, True))
    assert all(map(torch.equal, dense, sparse))
    rows = torch.tensor([3, 0, 7])
    assert torch.equal(WholePixels(data[0], sparse=True)[rows], flatten(data[0])[rows])


@pytest.mark.parametrize("shares", [2, 3, 5, 7, 64])
def test_shares_of_any_number_add_up_to_the_same_bits(data, monkeypatch, shares):
    sums = []
    monkeypatch.setattr(exact.distributed, "all_reduce", lambda tensor: sums.append(tensor.clone()))
    model = LitThreeSeven(init_std=0.3)
    W, b = model.W.detach(), model.b.detach()
    for batch_size in (None, 100):
        sums.clear()
        for world_size in (shares, 2):  # Two: a single process doesn't add up
            for rank in range(world_size):
                shared = Shares(*data, batch_size, rank=rank, world_size=world_size, store=WholePixels)
                exact.Step.apply(W, b, shared[0])
        several, one = torch.stack(sums[:shares]), torch.stack(sums[shares:])
        assert torch.equal(several.sum(0), one.sum(0))
        assert torch.equal(several.flip(0).cumsum(0)[-1], one.sum(0))


def test_a_step_of_nobody_s_rows_is_zero(data):
    W, b = torch.ones(784, 1, requires_grad=True), torch.ones(1, requires_grad=True)
    loss, accuracy = exact.Step.apply(W, b, Batch(WholePixels(data[0][:0]), data[1][:0], 10, 1))
    loss.backward()
    assert (loss, accuracy, b.grad) == (0, 0, 0)
    assert torch.equal(W.grad, torch.zeros(784, 1))


OPTIMIZERS = {
    "SGD": {"lr": 0.3, "momentum": 0.9, "nesterov": True, "weight_decay": 0.01},
    "RMSprop": {"centered": True, "momentum": 0.5},
    "Adam": {"amsgrad": True},
}


@pytest.mark.parametrize("name", sorted(exact.ELEMENTWISE))
def test_an_update_without_fused_operations_is_that_of_torch_but_for_rounding(name):
    results = []
    for mode in (exact.Unfused(), torch.enable_grad()):
        random = torch.Generator().manual_seed(0)
        weight = nn.Parameter(torch.randn(1000, generator=random))
        optimizer = getattr(torch.optim, name)([weight], **{"foreach": False} | OPTIMIZERS.get(name, {}))
        for _ in range(5):
            weight.grad = torch.randn(1000, generator=random)
            with mode:
                optimizer.step()
        results.append(weight.detach())
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)


def test_unfused_operations_round_each_product():
    x = torch.tensor([1.0])
    y = torch.tensor([1 + 2**-12])
    with exact.Unfused():
        fused = x.double().add(y.double() * y.double(), alpha=-1)  # as if nothing was rounded: -2^-11 - 2^-24
        assert torch.equal(x.add(y * y, alpha=-1), x - y * y)
        assert torch.equal(x.addcmul(y, y, value=-1), torch.tensor([-(2**-11)]))
        assert torch.equal(x.clone().addcmul_(y, y, value=-1), torch.tensor([-(2**-11)]))
    assert fused.item() == -(2**-11) - 2**-24


@pytest.mark.parametrize("most", [0.01, 1e9])
def test_gradients_are_clipped_as_torch_does_but_for_rounding(most):
    random = torch.Generator().manual_seed(0)
    parameters = [nn.Parameter(torch.zeros(shape)) for shape in ((784, 1), (1,))]
    for parameter in parameters:
        parameter.grad = torch.randn(parameter.shape, generator=random)
    expected = [nn.Parameter(torch.zeros_like(parameter)) for parameter in parameters]
    for parameter, other in zip(parameters, expected, strict=True):
        other.grad = parameter.grad.clone()
    exact.clip_norm(parameters, most)
    nn.utils.clip_grad_norm_(expected, most)
    for parameter, other in zip(parameters, expected, strict=True):
        torch.testing.assert_close(parameter.grad, other.grad, rtol=1e-6, atol=0)


def test_metrics_are_those_of_torchmetrics_but_for_rounding_and_have_no_order():
    random = torch.Generator().manual_seed(0)
    p = torch.rand(3000, 1, generator=random).mul(50).round() / 50  # with ties
    y = (torch.rand(3000, 1, generator=random) < p).float()
    plain, results = LitThreeSeven().val_metrics, []
    plain["loss"].update(p, y)
    plain["auroc"].update(p, y)
    for _ in range(5):
        metrics, order = exact.metrics(), torch.randperm(3000, generator=random)
        for part in order.tensor_split(7):
            metrics["loss"].update(p[part], y[part])
            metrics["auroc"].update(p[part], y[part])
        results.append((metrics["loss"].compute().item(), metrics["auroc"].compute().item()))
    assert len(set(results)) == 1
    assert results[0] == pytest.approx((plain["loss"].compute().item(), plain["auroc"].compute().item()), abs=1e-6)


def test_auroc_of_a_single_digit_is_zero_as_torchmetrics_has_it():
    auroc = exact.metrics()["auroc"]
    auroc.update(torch.rand(5, 1), torch.ones(5, 1))
    assert auroc.compute() == 0


class OwnLoss(LitThreeSeven):
    takes_sparse_pixels = True

    def training_step(self, batch, batch_idx):
        x, y = batch
        return nn.functional.binary_cross_entropy(self(x), y)


class OwnOptimizer(LitThreeSeven):
    takes_sparse_pixels = True

    def configure_optimizers(self):
        return torch.optim.LBFGS(self.parameters())


@pytest.mark.parametrize(
    ("model", "options", "named"),
    [
        (OwnForward, {}, "OwnForward, ThreeSevenDataModule, SGD and 32-true"),
        (OwnLoss, {}, "OwnLoss, ThreeSevenDataModule, SGD and 32-true"),
        (OwnOptimizer, {}, "OwnOptimizer, ThreeSevenDataModule, LBFGS and 32-true"),
        (LitThreeSeven, {"precision": "bf16-mixed"}, "LitThreeSeven, ThreeSevenDataModule, SGD and bf16-mixed"),
    ],
)
def test_where_the_bits_may_differ_one_sentence_says_so_before_training(trainer, model, options, named):
    with pytest.warns(UserWarning, match=rf"the same bits everywhere only for.*this run has {named}") as warnings:
        trainer(max_epochs=1, deterministic=True, **options).fit(model(), ThreeSevenDataModule())
    assert sum("the same bits" in str(warning.message) for warning in warnings) == 1


def test_a_loader_of_your_own_trains_with_a_sentence(trainer, data):
    loader = DataLoader(TensorDataset(flatten(data[0]), data[1]), batch_size=4000)
    with pytest.warns(UserWarning, match="this run has LitThreeSeven, NoneType, SGD and 32-true"):
        trainer(max_epochs=1, deterministic=True).fit(LitThreeSeven(), loader)
    shares = ThreeSevenDataModule().train_dataloader()  # without the Trainer it can't know
    assert isinstance(shares, Batches)
    with pytest.warns(UserWarning, match="this run has LitThreeSeven, NoneType, SGD and 32-true"):
        trainer(max_epochs=1, deterministic=True).fit(LitThreeSeven(), shares)


def test_the_exact_run_ends_where_the_ordinary_one_does_but_for_rounding(trainer, recwarn):
    results = []
    for options in ({"deterministic": True}, {}):
        torch.use_deterministic_algorithms(False)
        torch.manual_seed(0)
        model = LitThreeSeven()
        trainer(max_epochs=50, **options).fit(model, ThreeSevenDataModule())
        assert model.is_exact == bool(options)
        results.append(model.state_dict())
    assert not any("same bits" in str(warning.message) for warning in recwarn)
    torch.testing.assert_close(*results, rtol=0, atol=1e-6)


def test_the_start_is_the_same_bits_everywhere():
    torch.manual_seed(0)
    model = LitThreeSeven()
    start = "61fca18b7ee1931242ff4701f621f0c51bc3d187cd909f5139f81b574c834f64"
    assert model.digest() == start
    model.W.data.view(torch.int32)[0, 0] ^= 1
    assert model.digest() != start


def test_the_training_batch_of_an_exact_run_can_be_looked_at(trainer):
    seen = []

    class Look(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            seen.append(batch.x[torch.tensor([5])])

    data = ThreeSevenDataModule(batch_size=3000)
    trainer(max_steps=2, max_epochs=-1, deterministic=True, callbacks=[Look()]).fit(LitThreeSeven(), data)
    assert [(x.shape, x.dtype, bool(x.max() <= 1)) for x in seen] == [((1, 784), torch.float32, True)] * 2
