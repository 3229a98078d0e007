"""A network of the user's own, named on the command line: any LightningModule whose batches are x, y."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lit_threeseven import weights

PICTURE = Path(__file__).parents[1] / ".readme" / "three.png"
SOURCE = '''
import lightning as L
import torch
from torch import nn


class Tanh(L.LightningModule):
    """A hidden layer of torch's own.

    Args:
        width: Units of the hidden layer.
        activation: What follows it.
    """

    def __init__(self, width: int, activation: nn.Module | None = None) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(784, width), activation or nn.Tanh(), nn.Linear(width, 1))

    def forward(self, x):
        return self.net(x)

    def loss(self, batch, name):
        x, y = batch
        loss = nn.functional.binary_cross_entropy_with_logits(self(x), y)
        self.log(name, loss, batch_size=len(y), sync_dist=True, on_epoch=True)
        return loss

    def training_step(self, batch, batch_idx):
        return self.loss(batch, "train/loss")

    def validation_step(self, batch, batch_idx):
        self.loss(batch, "val/loss")

    def test_step(self, batch, batch_idx):
        x, y = batch
        self.log("test/accuracy", ((self(x) > 0) == y).float().mean())

    def predict_step(self, batch, batch_idx):
        return self(batch[0])

    def configure_optimizers(self):
        steps = self.trainer.estimated_stepping_batches
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)
        return {"optimizer": optimizer, "lr_scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 10)}


class Silent(Tanh):
    """Logs nothing, and neither validates, tests nor predicts."""

    validation_step = L.LightningModule.validation_step
    test_step = L.LightningModule.test_step
    predict_step = L.LightningModule.predict_step

    def training_step(self, batch, batch_idx):
        x, y = batch
        return nn.functional.binary_cross_entropy_with_logits(self(x), y)


class Plainest(Tanh):
    """Takes no arguments."""

    def __init__(self) -> None:
        super().__init__(2)
'''
MODEL = ("--model", "strangers.Tanh", "--model.width", "4")


@pytest.fixture
def own(cli, monkeypatch):
    """The command line in a folder with `strangers.py`."""
    (cli.folder / "strangers.py").write_text(SOURCE)
    monkeypatch.syspath_prepend(cli.folder)
    return cli


def test_it_is_trained_tested_and_predicted_with(own):
    code, table, errors = own(*MODEL, "--run", "r", "--trainer.max_epochs", "20")
    assert (code, errors) == (0, "")
    accuracy = re.search(r"Test accuracy +(\d.*)\n", table)[1]
    assert float(accuracy.rstrip("%")) > 95
    assert accuracy in own("test", *MODEL, "--run", "r")[1]
    assert own("predict", *MODEL, "--run", "r")[0] == 0
    header, *rows = (own.folder / "logs/r/checkpoints/best.predictions.csv").read_text().splitlines()
    assert header == "image,truth,output"
    right = [(float(row.split(",")[2]) > 0) == (row.split(",")[1] == "3") for row in rows]
    assert f"{sum(right) / len(rows):.2%}" == accuracy


@pytest.mark.parametrize("batch_size", ["null", "4000"])
def test_resumed_by_its_run_it_ends_where_an_uninterrupted_one_does(own, batch_size):
    options = (*MODEL, "--model.activation", "ReLU", "--data.batch_size", batch_size)
    own("fit", *options, "--run", "whole", "--trainer.max_epochs", "12")
    own("fit", *options, "--run", "parts", "--trainer.max_epochs", "5")
    code, _, errors = own("fit", *options, "--run", "parts", "--trainer.max_epochs", "12")
    assert (code, errors) == (0, "")
    ends = [weights.read(own.folder / "logs" / run / "checkpoints/last.ckpt") for run in ("whole", "parts")]
    assert ends[0]["global_step"] == ends[1]["global_step"]
    for name, weight in ends[0]["state_dict"].items():
        assert torch.equal(weight, ends[1]["state_dict"][name])


def test_its_checkpoint_keeps_class_and_arguments_and_is_used_by_that_class_only(own):
    own("fit", *MODEL, "--run", "r", "--trainer.max_epochs", "2")
    kept = weights.read(own.folder / "logs/r/checkpoints/last.ckpt")
    assert kept["network"] == "strangers.Tanh"
    assert kept["hyper_parameters"] == {"width": 4, "activation": None}
    for command in ("test", "fit"):
        code, output, error = own(command, "--run", "r", "--trainer.max_epochs", "3")
        assert (code, output) == (1, "")
        assert re.search("is of strangers.Tanh, not lit_threeseven.*--model strangers.Tanh", error)
    code, _, error = own("test", "--model", "strangers.Tanh", "--model.width", "5", "--run", "r")
    assert code == 1
    assert "model.width 4, not 5" in error


def test_a_checkpoint_imports_no_class_that_it_names(own, monkeypatch):
    own("fit", *MODEL, "--run", "r", "--trainer.max_epochs", "2")
    path = own.folder / "logs/r/checkpoints/best.ckpt"
    (own.folder / "evil.py").write_text("raise SystemExit('imported')")
    checkpoint = weights.read(path)
    checkpoint["hyper_parameters"]["activation"] = {"class_path": "evil.Evil"}
    torch.save(checkpoint, path)
    assert own("test", *MODEL, "--run", "r")[0] == 0


def test_recognize_takes_no_network_whose_answers_may_be_no_probabilities(own):
    own("fit", *MODEL, "--run", "r", "--trainer.max_epochs", "2")
    code, output, error = own("recognize", PICTURE, "--model", "strangers.Tanh", "--run", "r")
    assert (code, output) == (1, "")
    assert "strangers.Tanh is no subclass of LitThreeSeven" in error


def test_one_without_arguments_is_trained_resumed_and_tested(own):
    options = ("--model", "strangers.Plainest", "--run", "r")
    for command in ((), ("fit",), ("test",)):
        code, table, errors = own(*command, *options, "--trainer.max_epochs", str(5 + 3 * len(command)))
        assert (code, errors) == (0, "")
    assert "Test accuracy" in table


def test_an_argument_that_a_class_no_longer_takes_is_left_out(own):
    own("fit", *MODEL, "--run", "r", "--trainer.max_epochs", "2")
    path = own.folder / "logs/r/checkpoints/best.ckpt"
    checkpoint = weights.read(path)
    checkpoint["hyper_parameters"]["gone"] = 5
    torch.save(checkpoint, path)
    assert own("test", *MODEL, "--run", "r")[0] == 0


@pytest.mark.parametrize(
    ("option", "name", "why"),
    [
        ("--model", "absent.Net", "No module named 'absent'"),
        ("--model", "strangers.Absent", "module 'strangers' has no attribute 'Absent'"),
        ("--model", "broken.Net", "invalid syntax"),
        ("--trainer.callbacks", "absent.Callback", "No module named 'absent'"),
        ("--trainer.logger", "absent.Logger", "No module named 'absent'"),
        ("--optimizer", "torch.optim.Absent", "module 'torch.optim' has no attribute 'Absent'"),
    ],
)
def test_a_class_that_cannot_be_imported_is_named_with_the_reason(own, option, name, why):
    (own.folder / "broken.py").write_text("class Net(:\n")
    code, output, error = own(option, name)
    assert (code, output) == (1, "")
    assert error.startswith(f"lit-threeseven: error: {option} {name}: {why}")


def test_its_own_options_are_listed(own):
    code, output, _ = own("fit", "--model.help", "strangers.Tanh")
    assert code == 0
    assert "Units of the hidden layer" in output


def test_one_that_logs_nothing_is_trained_and_what_it_lacks_is_named(own):
    model = ("--model", "strangers.Silent", "--model.width", "4")
    code, table, errors = own("fit", *model, "--run", "r", "--trainer.max_epochs", "3")
    assert (code, errors) == (0, "")
    assert "Checkpoint      logs/r/checkpoints/last.ckpt" in table
    code, _, error = own("predict", *model, "--run", "r", "--ckpt_path", "last")
    assert (code, "\n" in error) == (1, False)
    assert "Silent needs a predict_step" in error
    code, _, error = own("test", *model, "--run", "r", "--ckpt_path", "last")
    assert (code, "\n" in error) == (1, False)
    assert "test_step" in error


def test_the_main_job_of_one_without_a_test_step_ends_without_a_test(own):
    code, table, errors = own("--model", "strangers.Silent", "--model.width", "4", "--trainer.max_epochs", "3")
    assert (code, errors) == (0, "")
    assert "Test" not in table


@pytest.mark.slow
def test_a_file_in_this_folder_is_found_and_trains_on_two_processes(tmp_path):
    (tmp_path / "strangers.py").write_text(SOURCE)
    program, devices = (
        Path(sys.executable).with_name("lit-threeseven"),
        ("--trainer.accelerator=cpu", "--trainer.devices=2"),
    )
    for command in (("fit", "--trainer.max_epochs", "3"), ("predict",)):
        subprocess.run([program, *command, *MODEL, *devices, "--run", "r"], cwd=tmp_path, check=True, timeout=120)
    rows = (tmp_path / "logs/r/checkpoints/best.predictions.csv").read_text().splitlines()[1:]
    assert [int(row.split(",")[0]) for row in rows] == list(range(2038))
