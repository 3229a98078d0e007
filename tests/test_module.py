import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint
from lightning.pytorch.plugins import MixedPrecision
from torch.utils._python_dispatch import TorchDispatchMode  # torch documents no public name for it
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.functional.classification import binary_auroc

from lit_threeseven import LitThreeSeven, ThreeSevenDataModule, batches
from lit_threeseven.functional import scale


class Losses(Callback):
    """Keeps what was logged after every step."""

    def __init__(self):
        self.losses = []

    def on_train_batch_end(self, trainer, *args):
        self.losses.append(trainer.callback_metrics["train/loss"].item())


def test_weights_are_the_only_entries_of_the_state_dict():
    model = LitThreeSeven()
    assert {name: tuple(weight.shape) for name, weight in model.state_dict().items()} == {
        "W": (784, 1),
        "b": (1,),
    }
    assert isinstance(model.W, torch.nn.Parameter)
    assert isinstance(model.b, torch.nn.Parameter)


def test_weights_start_normally_distributed_and_reproducibly():
    torch.manual_seed(1)
    model = LitThreeSeven(init_std=0.5)
    torch.manual_seed(1)
    again = LitThreeSeven(init_std=0.5)
    assert torch.equal(model.W, again.W)
    assert torch.equal(model.b, again.b)
    assert not torch.equal(model.W, LitThreeSeven(init_std=0.5).W)
    assert model.W.mean().item() == pytest.approx(0, abs=0.08)
    assert model.W.std().item() == pytest.approx(0.5, rel=0.1)


def test_forward_gives_the_probability_for_rows_and_for_images():
    model = LitThreeSeven()
    x = torch.rand(5, 784)
    probability = model(x)
    assert probability.shape == (5, 1)
    torch.testing.assert_close(probability, torch.sigmoid(x @ model.W + model.b))
    assert torch.equal(model(x.reshape(5, 28, 28)), probability)


def test_prediction_is_a_seven_below_one_half_and_otherwise_a_three():
    model = LitThreeSeven()
    with torch.no_grad():
        model.W.zero_()
        model.W[0] = 1
        model.b.zero_()
    x = torch.zeros(3, 784)
    x[:, 0] = torch.tensor([-1e-3, 0, 1e-3])  # just below, at, and just above a probability of 0.5
    prediction = model.predict_step((x,), 0)
    assert prediction["digit"].tolist() == [[7], [3], [3]]
    assert torch.equal(prediction["probability"], model(x))
    assert torch.equal(model.predict_step(x, 0)["digit"], prediction["digit"])


def test_accuracy_counts_a_probability_of_one_half_as_a_three(trainer):
    model = LitThreeSeven()
    with torch.no_grad():
        model.W.zero_()
        model.b.zero_()
    loader = DataLoader(TensorDataset(torch.rand(4, 784), torch.tensor([[1.0], [1.0], [1.0], [0.0]])), batch_size=4)
    assert trainer().test(model, loader, verbose=False)[0]["test/accuracy"] == 0.75


def test_predicted_digits_are_those_of_the_model():
    prediction = LitThreeSeven(digits=(1, 8)).predict_step(torch.rand(50, 784), 0)
    assert set(prediction["digit"].unique().tolist()) <= {1, 8}


def test_one_step_is_gradient_descent(trainer):
    model, data = LitThreeSeven(lr=0.7), ThreeSevenDataModule(val_fraction=0)
    data.setup("fit")
    images, y = data.train.tensors
    x = scale(images).flatten(1)
    W, b = (p.detach().double().requires_grad_() for p in (model.W, model.b))
    ((torch.sigmoid(x.double() @ W + b) - y) ** 2).mean().backward()
    trainer(max_epochs=1).fit(model, data)
    torch.testing.assert_close(model.W.double(), W - 0.7 * W.grad, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(model.b.double(), b - 0.7 * b.grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("epochs", [100])
def test_article_s_recipe_has_the_losses_of_a_plain_loop(trainer, epochs):
    torch.manual_seed(5)
    model, data = LitThreeSeven(lr=0.001, init_std=1.0), ThreeSevenDataModule(val_fraction=0)
    data.setup("fit")
    images, y = data.train.tensors
    x = images.reshape(-1, 784) / 255
    W, b = model.W.detach().clone().requires_grad_(), model.b.detach().clone().requires_grad_()
    expected = []
    for _ in range(epochs):
        prediction = 1 / (1 + torch.exp(-(x @ W + b)))
        loss = ((prediction - y) ** 2).mean()
        loss.backward()
        with torch.no_grad():
            W -= 0.001 * W.grad
            b -= 0.001 * b.grad
        W.grad.zero_()
        b.grad.zero_()
        expected.append(loss.item())
    record = Losses()
    trainer(max_epochs=epochs, callbacks=[record]).fit(model, data)
    assert record.losses == pytest.approx(expected, abs=1e-5)
    torch.testing.assert_close(model.W.detach(), W.detach(), rtol=0, atol=1e-4)


def gradient_descent(x, y, steps, clip=None):
    """W and b of a new LitThreeSeven after gradient descent by hand; each step takes a list of slices of rows."""
    torch.manual_seed(0)
    model = LitThreeSeven().to(x.dtype)
    for slices in steps:
        model.zero_grad()
        for rows in slices:
            (((torch.sigmoid(x[rows] @ model.W + model.b) - y[rows]) ** 2).mean() / len(slices)).backward()
        if clip:
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= parameter.grad
    return model.state_dict()


@pytest.mark.parametrize(
    ("options", "together", "clip", "dtype"),
    [
        ({"accumulate_grad_batches": 2}, 2, None, torch.float32),
        ({"gradient_clip_val": 0.01}, 1, 0.01, torch.float32),
        ({"precision": "64-true"}, 1, None, torch.float64),
    ],
)
def test_accumulation_clipping_and_precision_work_as_in_any_trainer(trainer, options, together, clip, dtype):
    data = ThreeSevenDataModule(val_fraction=0)
    data.setup("fit")
    images, y = data.train[:4000]
    x = scale(images).flatten(1)
    slices = [slice(start, start + 1000) for start in range(0, 4000, 1000)]
    expected = gradient_descent(
        x.to(dtype), y.to(dtype), [slices[i : i + together] for i in range(0, 4, together)], clip
    )
    torch.manual_seed(0)
    model = LitThreeSeven()
    trainer(max_epochs=1, **options).fit(model, DataLoader(TensorDataset(x, y), batch_size=1000))
    torch.testing.assert_close(model.state_dict(), expected)


@pytest.mark.parametrize("scaled", [True, False])
def test_mixed_precision_learns_with_and_without_a_gradient_scaler(trainer, scaled):
    record = Losses()
    options = {"precision": "bf16-mixed"}
    if scaled:
        options = {"plugins": [MixedPrecision("16-mixed", device="cpu", scaler=torch.amp.GradScaler("cpu"))]}
    trainer(max_epochs=20, callbacks=[record], **options).fit(LitThreeSeven(), ThreeSevenDataModule())
    assert record.losses[-1] < 0.5 * record.losses[0]


class ReadsBack(TorchDispatchMode):
    """Counts how often the value of a tensor is asked for, for which a GPU would have to finish its work."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func.name() == "aten::_local_scalar_dense"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("arguments", [{}, {"batch_size": 4000}])
def test_between_log_steps_no_step_waits_for_the_device(trainer, arguments, monkeypatch):
    monkeypatch.setattr(batches, "keep", lambda x: None)  # as on a GPU

    class Watch(Callback):
        def __init__(self):
            self.waits = []

        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            self.mode = ReadsBack()
            self.mode.__enter__()

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            self.mode.__exit__(None, None, None)
            self.waits.append(self.mode.count > 0)

    watch, data = Watch(), ThreeSevenDataModule(val_fraction=0, **arguments)
    trainer(max_steps=6, max_epochs=-1, log_every_n_steps=3, callbacks=[watch]).fit(LitThreeSeven(), data)
    assert watch.waits == [True, False, True, False, False, True]  # the first step is logged too


def test_nothing_is_logged_when_the_trainer_logs_nothing(trainer):
    run = trainer(max_epochs=2, log_every_n_steps=0)
    run.fit(LitThreeSeven(), ThreeSevenDataModule(val_fraction=0))
    assert run.global_step == 2
    assert not run.callback_metrics


@pytest.mark.parametrize(("watcher", "metric"), [(EarlyStopping, "train/loss"), (ModelCheckpoint, "train/accuracy")])
def test_a_callback_that_watches_a_training_metric_finds_it_after_every_step(trainer, watcher, metric):
    record = Losses()
    run = trainer(callbacks=[watcher(monitor=metric), record], log_every_n_steps=50, enable_checkpointing=True)
    run.fit(LitThreeSeven(), ThreeSevenDataModule())
    assert len(set(record.losses)) == 3
    assert {"train/loss", "train/accuracy"} <= run.callback_metrics.keys()


def test_a_scheduler_that_watches_a_training_metric_finds_it_after_every_step(trainer):
    class Scheduled(LitThreeSeven):
        def configure_optimizers(self):
            optimizer = super().configure_optimizers()
            scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "monitor": "train/loss"}}

    record = Losses()
    trainer(callbacks=[record], log_every_n_steps=50).fit(Scheduled(), ThreeSevenDataModule())
    assert len(set(record.losses)) == 3


def test_early_stopping_on_the_training_loss_ends_the_run(trainer):
    run = trainer(max_epochs=50, callbacks=[EarlyStopping("train/loss", patience=2, min_delta=1.0)])
    run.fit(LitThreeSeven(), ThreeSevenDataModule())
    assert run.current_epoch == 3


def test_logged_metrics_are_those_of_all_rows_whatever_the_batches(trainer):
    model = LitThreeSeven()
    whole, pieces = ThreeSevenDataModule(), ThreeSevenDataModule(batch_size=300)  # the last piece is smaller
    for stage in ("validate", "test"):
        expected = getattr(trainer(), stage)(model, whole, verbose=False)[0]
        assert getattr(trainer(), stage)(model, pieces, verbose=False)[0] == pytest.approx(expected, rel=1e-5)
    images, y = whole.test.tensors
    probability = model(scale(images).flatten(1)).detach()
    assert expected["test/loss"] == pytest.approx(((probability - y) ** 2).mean().item(), rel=1e-5)
    assert expected["test/accuracy"] == pytest.approx(((probability >= 0.5) == (y == 1)).float().mean().item())
    assert expected["test/auroc"] == pytest.approx(binary_auroc(probability, y.int()).item())


def test_training_logs_loss_and_accuracy_of_the_batch(trainer):
    model, data = LitThreeSeven(), ThreeSevenDataModule(val_fraction=0)
    data.setup("fit")
    images, y = data.train.tensors
    x = scale(images).flatten(1)
    accuracy = ((model(x) >= 0.5) == (y == 1)).float().mean().item()
    fit = trainer(max_epochs=1)
    fit.fit(model, data)
    assert fit.callback_metrics["train/accuracy"].item() == pytest.approx(accuracy)
    assert set(fit.callback_metrics) == {"train/loss", "train/accuracy"}


@pytest.mark.parametrize("shape", [(784,), (28, 28)])
def test_your_own_dataloader_trains_too(trainer, shape):
    data = ThreeSevenDataModule(val_fraction=0)
    data.setup("fit")
    images, y = data.train.tensors
    loader = DataLoader(TensorDataset(scale(images).flatten(1).reshape(-1, *shape), y), batch_size=len(y))
    torch.manual_seed(0)
    model = LitThreeSeven()
    torch.manual_seed(0)
    same = LitThreeSeven()
    trainer().fit(model, loader)
    trainer().fit(same, data)
    torch.testing.assert_close(model.W, same.W)


def test_hyper_parameters_come_back_from_a_checkpoint(trainer, tmp_path):
    model = LitThreeSeven(lr=0.3, init_std=0.2, digits=(7, 3))
    fit = trainer(max_epochs=1)
    fit.fit(model, ThreeSevenDataModule(digits=(7, 3)))
    fit.save_checkpoint(tmp_path / "model.ckpt")
    loaded = LitThreeSeven.load_from_checkpoint(tmp_path / "model.ckpt", weights_only=True)
    assert (loaded.lr, loaded.hparams.init_std, loaded.digits) == (0.3, 0.2, (7, 3))
    assert torch.equal(loaded.W, model.W)


def test_a_non_finite_loss_stops_the_run(trainer):
    model = LitThreeSeven(lr=0.25, init_std=3e38)
    with pytest.raises(FloatingPointError, match=r"non-finite within \d+ steps at learning rate 0.25"):
        trainer(max_epochs=20, log_every_n_steps=5).fit(model, ThreeSevenDataModule(val_fraction=0))
    assert model.trainer.global_step < 10


def test_non_finite_weights_are_not_saved(trainer, tmp_path):
    model = LitThreeSeven(init_std=3e38)
    fit = trainer(max_epochs=1)
    with pytest.raises(FloatingPointError, match="non-finite"):
        fit.fit(model, ThreeSevenDataModule(val_fraction=0))
    with pytest.raises(FloatingPointError, match="non-finite"):
        fit.save_checkpoint(tmp_path / "model.ckpt")
    assert not (tmp_path / "model.ckpt").exists()


@pytest.mark.parametrize("stage", ["test", "predict"])
def test_a_model_that_was_only_tested_can_be_saved(trainer, tmp_path, stage):
    model, run = LitThreeSeven(), trainer()
    getattr(run, stage)(model, ThreeSevenDataModule())
    run.save_checkpoint(tmp_path / "model.ckpt")
    loaded = LitThreeSeven.load_from_checkpoint(tmp_path / "model.ckpt", weights_only=True)
    assert torch.equal(loaded.W, model.W)


def test_a_run_with_a_step_limit_resumes_as_if_it_had_never_stopped(trainer, tmp_path):
    def run(checkpoint=None, **options):
        torch.manual_seed(0)
        model = LitThreeSeven()
        fit = trainer(max_epochs=-1, max_steps=12, limit_train_batches=5, limit_val_batches=1, **options)
        fit.fit(model, ThreeSevenDataModule(batch_size=1000), ckpt_path=checkpoint, weights_only=True)
        assert fit.global_step == 12
        return model.W

    every_step = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1)
    expected = run(callbacks=[every_step], enable_checkpointing=True)
    checkpoints = list(tmp_path.glob("*.ckpt"))  # within epochs, and at the end of each
    assert len(checkpoints) == 12
    for checkpoint in checkpoints:
        assert torch.equal(run(checkpoint), expected)


@pytest.mark.parametrize("name", ["lr", "init_std"])
@pytest.mark.parametrize("value", [0, -1.0, float("inf"), float("nan"), 1e-60, 10**400, np.float16("inf")])
def test_arguments_out_of_range_are_refused_in_a_sentence(name, value):
    with pytest.raises(ValueError, match=f"{name} must be a finite float32 above 0, got"):
        LitThreeSeven(**{name: value})


@pytest.mark.parametrize("digits", [(3, 3), (3,), (3, 10)])
def test_anything_but_two_different_digits_is_refused_in_a_sentence(digits):
    with pytest.raises(ValueError, match=r"digits must be two different digits from 0 to 9, such as \(3, 7\), got"):
        LitThreeSeven(digits=digits)
