"""Training and evaluation on a device other than the CPU, on a machine that has none.

torch's fake tensors have a device and a shape but no numbers, and refuse to mix devices as those of a GPU do. So what
is tested here is where every tensor lies, not what is computed. A scalar on the CPU may be mixed in, as on a GPU.
"""

from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode  # torch documents no public name for it
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import TensorDataset

from lit_threeseven import LitThreeSeven, ThreeSevenDataModule, batches, functional, module
from lit_threeseven.batches import Batch, Batches

# Of torch's devices this is one that needs neither a driver nor a special build. A fake "cuda" needs both: without them
# `backward` ends in "hasPrimaryContext expects a valid device index", or the interpreter is aborted.
DEVICE = "lazy:0"


@pytest.fixture(autouse=True)
def fake_numbers_are_not_kept():
    yield
    functional._table.cache_clear()


class Prepared:
    """A network on `DEVICE` and its data, as a Trainer has them when it begins; in a `with`, new tensors are fake, too.

    Args:
        data_device: Where the data is put.
        options: Those of the data module.
    """

    def __init__(self, data_device: str = DEVICE, **options) -> None:
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)
        self.model, self.data, self.logged = LitThreeSeven(), ThreeSevenDataModule(**options), {}
        self.model.trainer = self.data.trainer = SimpleNamespace(
            strategy=SimpleNamespace(root_device=torch.device(data_device), barrier=lambda: None),
            datamodule=self.data,
            lightning_module=self.model,
            precision="32-true",
            world_size=1,
            overfit_batches=1,  # no shuffling: numpy's numbers would be real
            log_every_n_steps=1,
            global_step=0,
        )
        self.data.setup()
        self.model.setup("fit")
        for name in ("train", "val", "test"):
            tensors = getattr(self.data, name).tensors
            setattr(self.data, name, TensorDataset(*(self.mode.from_tensor(tensor) for tensor in tensors)))
        # Not `to(DEVICE)`: torch 2.9 would really copy. This reaches the metrics' tensors, too.
        self.model._apply(lambda tensor: self.mode.from_tensor(tensor).to(DEVICE))
        self.model.log_dict = lambda values, **options: self.logged.update(values)
        self.model.check_finite = lambda: None  # it asks for numbers

    def __enter__(self) -> "Prepared":
        self.mode.__enter__()
        return self

    def __exit__(self, *error) -> None:
        self.mode.__exit__(*error)

    def batch(self, name: str) -> Batch:
        """The first batch of a loader, moved as Lightning does."""
        return next(iter(getattr(self.data, f"{name}_dataloader")())).to(DEVICE)


class NoWaiting(TorchDispatchMode):
    """Refuses to ask the device for numbers, which waits until it has finished its work."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        copied = func.name() == "aten::_to_copy" and str((kwargs or {}).get("device")) == "cpu"
        assert not copied, "a copy to the CPU"
        assert func.name() != "aten::_local_scalar_dense", "a number is asked for"
        return func(*args, **(kwargs or {}))


def train(*args, mode: Any = None, **options) -> tuple[Prepared, Batch]:
    """Take one step: loss, gradient and update, in Lightning's order."""
    with Prepared(*args, **options) as run, mode or nullcontext():
        batch = run.batch("train")
        run.model.on_train_batch_start(batch, 0)

        def closure():
            loss = run.model.training_step(batch, 0)
            loss.backward()
            return loss

        run.model.optimizer_step(0, 0, run.model.configure_optimizers(), closure)
    return run, batch


def devices(*tensors: Tensor) -> set[str]:
    return {str(tensor.device) for tensor in tensors}


@pytest.mark.parametrize("batch_size", [None, 1000])
def test_loss_gradient_and_update_stay_on_the_device(batch_size):
    run, batch = train(batch_size=batch_size)
    assert batch.x.dtype == torch.uint8
    W, b = run.model.W, run.model.b
    assert devices(W, b, W.grad, b.grad, run.logged["train/loss"], run.logged["train/accuracy"]) == {DEVICE}


@pytest.mark.parametrize("batch_size", [None, 1000])
def test_a_step_never_waits_for_the_device(batch_size):
    run, _ = train(mode=NoWaiting(), batch_size=batch_size)
    assert devices(run.model.W.grad) == {DEVICE}


@pytest.mark.parametrize("wait", [Tensor.item, Tensor.cpu])
def test_a_step_that_waits_would_be_noticed(monkeypatch, wait):
    squared_error = module.mean_squared_error

    def faulty(*args):
        loss = squared_error(*args)
        wait(loss)
        return loss

    monkeypatch.setattr(module, "mean_squared_error", faulty)
    with pytest.raises(AssertionError, match=r"a copy to the CPU|a number is asked for"):
        train(mode=NoWaiting())


def test_a_batch_made_on_the_cpu_trains_on_the_device(monkeypatch):
    monkeypatch.setattr(batches, "keep", lambda x: None)  # which looks at numbers
    run, batch = train("cpu")
    assert devices(batch.x, batch.y, run.model.W, run.model.W.grad) == {DEVICE}


def test_evaluation_and_prediction_stay_on_the_device():
    with Prepared() as run:
        run.model.validation_step(run.batch("val"), 0)
        run.model.test_step(run.batch("test"), 0)
        found = [*run.model.predict_step(run.batch("predict"), 0).values()]
        for stage in ("val", "test"):
            loss, accuracy, auroc = (run.logged[f"{stage}/{name}"] for name in ("loss", "accuracy", "auroc"))
            # The AUROC is not computed: what shapes that takes depends on numbers.
            found += [loss.compute(), accuracy.compute(), *auroc.preds, *auroc.target]
    assert devices(*found) == {DEVICE}


def on_the_cpu_in_the_prediction(monkeypatch):
    sigmoid = module.sigmoid
    monkeypatch.setattr(module, "sigmoid", lambda x: sigmoid(x) + torch.zeros(len(x), 1))


def on_the_cpu_in_the_gradient(monkeypatch):
    sigmoid = module.sigmoid

    def faulty(x):
        x.register_hook(lambda gradient: gradient + torch.zeros(len(gradient), 1))
        return sigmoid(x)

    monkeypatch.setattr(module, "sigmoid", faulty)


def on_the_cpu_in_the_labels(monkeypatch):
    made = Batches._batch

    def faulty(self, *args):
        batch = made(self, *args)
        return replace(batch, y=batch.y + torch.zeros(len(batch.y), 1))

    monkeypatch.setattr(Batches, "_batch", faulty)


def on_the_cpu_in_the_batch(monkeypatch):
    monkeypatch.setattr(Batch, "to", lambda self, device: replace(self, x=self.x.cpu(), y=self.y.cpu()))


@pytest.mark.parametrize(
    "fault",
    [
        on_the_cpu_in_the_prediction,
        on_the_cpu_in_the_gradient,
        on_the_cpu_in_the_labels,
        on_the_cpu_in_the_batch,
    ],
)
def test_a_tensor_left_on_the_cpu_would_be_noticed(monkeypatch, fault):
    fault(monkeypatch)
    with pytest.raises(RuntimeError, match=r"two .*devices.*(lazy:0.*cpu|cpu.*lazy:0)"):
        train()
