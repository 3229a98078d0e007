"""Checkpoints: whose weights they hold, what a network is built from, and where a run goes on."""

from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import BasePredictionWriter, ModelCheckpoint
from lightning.pytorch.tuner import Tuner
from PIL import Image
from torch import Tensor

from lit_threeseven import LitThreeSeven, ThreeSevenDataModule, weights
from lit_threeseven.networks import LitThreeSevenMany, LitThreeSevenMLP, load
from lit_threeseven.use.predictions import PredictionsFile


class Shifted(LitThreeSeven):
    """Weights of the same shapes that mean something else."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.sigmoid(2 - x.flatten(1) @ self.W - self.b)


NAMED = ("--model", f"{__name__}.Shifted")


def test_another_class_is_never_filled_with_a_checkpoint_s_weights(cli, trainer):
    short = ("--run", "shifted", "--trainer.max_epochs", "60")
    code, _, error = cli("fit", *NAMED, *short)
    assert (code, error) == (0, "")
    sentence = (
        rf"The checkpoint is of {__name__}.Shifted, not lit_threeseven.module.LitThreeSeven; .* --model {__name__}"
    )
    path = cli.folder / "logs/shifted/checkpoints/last.ckpt"
    assert weights.read(path)["network"] == f"{__name__}.Shifted"
    for command in (("test", "--run", "shifted"), ("predict", "--run", "shifted"), ("fit", *short)):
        code, _, error = cli(*command)
        assert code == 1
        assert f"The checkpoint is of {__name__}.Shifted, not lit_threeseven.module.LitThreeSeven" in error
        assert f"--model {__name__}.Shifted" in error
    with pytest.raises(ValueError, match=sentence):
        load(path)
    with pytest.raises(ValueError, match=sentence):
        LitThreeSeven.load_from_checkpoint(path)
    with pytest.raises(ValueError, match=sentence):
        trainer().test(LitThreeSeven(), ThreeSevenDataModule(), ckpt_path=path, weights_only=True)


def test_a_class_that_is_given_takes_its_own_checkpoint_with_the_arguments_that_it_was_made_with(cli):
    run = ("--run", "shifted")
    assert cli("fit", *NAMED, "--model.lr", "0.5", *run, "--trainer.max_epochs", "60")[0] == 0
    code, table, error = cli("test", *NAMED, *run)
    assert (code, error) == (0, "")
    assert float(table.split("accuracy")[1].split("%")[0]) > 95
    assert cli("fit", *NAMED, "--model.lr", "0.5", *run, "--trainer.max_epochs", "62")[0] == 0
    path = cli.folder / "logs/shifted/checkpoints/last.ckpt"
    assert Shifted.load_from_checkpoint(path).lr == 0.5
    assert isinstance(load(path, Shifted), Shifted)


@pytest.mark.parametrize("name", ["LitThreeSeven", None])
def test_a_checkpoint_of_the_last_release_is_loaded_and_resumed(cli, name):
    options = ("fit", "--run", "r", "--trainer.check_val_every_n_epoch", "2")
    cli(*options, "--trainer.max_epochs", "4")
    path = cli.folder / "logs/r/checkpoints/last.ckpt"
    checkpoint = torch.load(path, weights_only=True)
    checkpoint |= {"network": name, "optimizer": "SGD"}  # as release 0.1 wrote it
    if name is None:
        del checkpoint["network"]
    checkpoint["recipe"] |= {"optimizer": "SGD", "trainer.deterministic": False, "data.pixels": "auto"}
    defaults = {"momentum": 0, "dampening": 0, "weight_decay": 0, "nesterov": False, "maximize": False}
    checkpoint["recipe"] |= {f"optimizer.{option}": value for option, value in defaults.items()}
    checkpoint["datamodule_hyper_parameters"]["pixels"] = "auto"
    usual = torch.optim.SGD([torch.zeros(784, 1), torch.zeros(1)], lr=1.0)
    checkpoint["optimizer_states"] = [usual.state_dict()]
    torch.save(checkpoint, path)
    assert torch.equal(LitThreeSeven.load_from_checkpoint(path).W, checkpoint["state_dict"]["W"])
    code, table, error = cli(*options, "--trainer.max_epochs", "6")
    assert (code, error) == (0, "")
    assert "GradientDescent" in table
    checkpoint["recipe"]["optimizer.momentum"] = 0.9
    torch.save(checkpoint, path)
    code, _, error = cli(*options, "--trainer.max_epochs", "8")
    assert code == 1
    assert "was made with optimizer SGD instead of GradientDescent" in error


class Keeps(LitThreeSeven):
    """Reads an entry of its own."""

    def on_save_checkpoint(self, checkpoint):
        super().on_save_checkpoint(checkpoint)
        checkpoint["mine"] = 7

    def on_load_checkpoint(self, checkpoint):
        super().on_load_checkpoint(checkpoint)
        self.mine = checkpoint["mine"]


def test_a_subclass_finds_its_own_entry_in_a_checkpoint(trainer, tmp_path):
    run = trainer(max_epochs=1)
    run.fit(Keeps(), ThreeSevenDataModule())
    run.save_checkpoint(tmp_path / "own.ckpt")
    assert Keeps.load_from_checkpoint(tmp_path / "own.ckpt").mine == 7


def test_many_networks_and_data_come_back_from_a_checkpoint(trainer, tmp_path):
    many, data = LitThreeSevenMany([(1.0, 0.01, 0), (np.float64(0.1), 1.0, 1)]), ThreeSevenDataModule(seed=4)
    run = trainer(max_epochs=1)
    run.fit(many, data)
    run.save_checkpoint(tmp_path / "many.ckpt")
    loaded = LitThreeSevenMany.load_from_checkpoint(tmp_path / "many.ckpt")
    assert torch.equal(loaded.W, many.W)
    assert [tuple(model) for model in loaded.models] == [(1.0, 0.01, 0), (0.1, 1.0, 1)]
    assert ThreeSevenDataModule.load_from_checkpoint(tmp_path / "many.ckpt").seed == 4


@pytest.mark.parametrize("number", [np.float64(0.5), torch.tensor(0.5)])
def test_numbers_of_numpy_and_torch_are_kept_as_plain_ones(trainer, tmp_path, number):
    model = LitThreeSeven(lr=number, digits=tuple(np.array([3, 7])))
    run = trainer(max_epochs=1)
    run.fit(model, ThreeSevenDataModule(batch_size=np.int64(5000)))
    run.save_checkpoint(tmp_path / "plain.ckpt")
    loaded = LitThreeSeven.load_from_checkpoint(tmp_path / "plain.ckpt")
    assert (loaded.lr, type(loaded.lr), loaded.digits) == (0.5, float, (3, 7))


def test_the_example_of_an_input_can_be_set():
    model = LitThreeSeven()
    model.example_input_array = torch.ones(2, 784)
    assert torch.equal(model.example_input_array, torch.ones(2, 784))


LIMITS = [{"max_epochs": 3}, {"max_epochs": -1, "max_steps": 7}]


@pytest.mark.parametrize("batch_size", [None, 4000])
@pytest.mark.parametrize("limits", LIMITS)
def test_every_checkpoint_of_a_run_resumes_to_the_same_weights_steps_and_epochs(trainer, tmp_path, batch_size, limits):
    def run(checkpoint=None, **options):
        torch.manual_seed(0)
        model, fit = LitThreeSeven(), trainer(limit_val_batches=1, **limits, **options)
        data = ThreeSevenDataModule(batch_size=batch_size)
        fit.fit(model, data, ckpt_path=checkpoint, weights_only=True)
        return model.digest(), fit.global_step, fit.current_epoch

    every = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1)
    each = ModelCheckpoint(tmp_path, "epoch-{epoch}", save_on_train_epoch_end=True, save_top_k=-1)
    expected = run(callbacks=[every, each], enable_checkpointing=True)
    checkpoints = sorted(tmp_path.glob("*.ckpt"))
    assert len(checkpoints) > expected[1]
    assert {path.name: run(path) for path in checkpoints} == dict.fromkeys(
        (path.name for path in checkpoints), expected
    )


@pytest.mark.parametrize("batch_size", [None, 64])
@pytest.mark.parametrize("search", ["lr_find", "scale_batch_size"])
def test_a_trainer_that_has_tuned_fits_as_a_new_one_does(trainer, tmp_path, monkeypatch, batch_size, search):
    monkeypatch.chdir(tmp_path)
    ends = []
    for tuned in (True, False):
        torch.manual_seed(0)
        model, data = LitThreeSeven(), ThreeSevenDataModule(batch_size=batch_size or 12000)
        run = trainer(max_epochs=5, limit_train_batches=10, enable_checkpointing=True)
        if tuned:
            tuner = Tuner(run)
            if search == "lr_find":
                tuner.lr_find(model, data, num_training=5, update_attr=False)
            else:
                tuner.scale_batch_size(model, data, init_val=32, max_trials=2, steps_per_trial=1)
            data.batch_size, model.lr = batch_size or 12000, 1.0
        run.fit(model, data)
        ends.append((model.digest(), run.global_step, run.current_epoch))
    assert ends[0] == ends[1]


@pytest.mark.parametrize("stage", ["validate", "test", "predict"])
def test_trainers_evaluate_and_fit_in_any_order(trainer, stage):
    model, data, run = LitThreeSeven(), ThreeSevenDataModule(), trainer(max_epochs=2)
    start = LitThreeSeven()
    start.load_state_dict(model.state_dict())
    trainer(max_epochs=2).fit(start, ThreeSevenDataModule())
    getattr(run, stage)(model, data)
    run.fit(model, data)
    assert model.digest() == start.digest()
    getattr(run, stage)(model, data)
    again = trainer(max_epochs=3)
    getattr(again, stage)(model, data.train_dataloader())
    again.fit(model, data)
    trainer(max_epochs=1).fit(model, data)
    assert again.global_step == 3


def test_your_own_trainer_writes_the_file_that_predict_writes(cli, trainer):
    assert cli("predict", "--ckpt_path", "pretrained")[0] == 0
    data = ThreeSevenDataModule()
    answers = PredictionsFile(data, cli.folder / "own.csv")
    trainer(callbacks=[answers]).predict(LitThreeSeven.from_pretrained(), data)
    assert (answers.images, answers.right) == (2038, 2004)
    assert (cli.folder / "own.csv").read_text() == (cli.folder / "LitThreeSeven.predictions.csv").read_text()


def test_predictions_come_with_the_numbers_of_their_rows(trainer, tmp_path):
    class Writer(BasePredictionWriter):
        def write_on_epoch_end(self, trainer, pl_module, predictions, batch_indices):
            self.rows = torch.cat([prediction["rows"] for prediction in predictions])

    writer = Writer("epoch")
    trainer(callbacks=[writer]).predict(LitThreeSeven(), ThreeSevenDataModule(batch_size=500))
    assert torch.equal(writer.rows, torch.arange(2038))


@pytest.mark.slow
@pytest.mark.parametrize("batch_size", [None, 4000])
def test_a_compiled_network_trains_without_being_compiled_again_and_again(trainer, batch_size, recwarn):
    torch._dynamo.reset()
    model = LitThreeSeven()
    before = model.W.clone()
    trainer(max_epochs=12).fit(torch.compile(model, backend="eager"), ThreeSevenDataModule(batch_size=batch_size))
    assert not torch.equal(model.W, before)
    assert not any("recompile" in str(warning.message) for warning in recwarn)


def test_hidden_layers_and_one_layer_take_bytes_and_floats():
    images = torch.randint(0, 256, (5, 28, 28)).byte()
    for model in (LitThreeSeven(), LitThreeSevenMLP(hidden_sizes=[4])):
        torch.testing.assert_close(model(images), model(images / 255), rtol=1e-5, atol=1e-6)


def test_sizes_and_fractions_are_kept_as_plain_numbers():
    assert LitThreeSevenMLP(hidden_sizes=np.array([8, 4])).hparams["hidden_sizes"] == [8, 4]
    kept = LitThreeSeven(lr=Fraction(1, 2)).hparams["lr"]
    assert (type(kept), kept) == (float, 0.5)


def test_a_subclass_that_is_given_answers_pictures_with_its_own_checkpoint(cli, monkeypatch):
    monkeypatch.syspath_prepend(cli.folder)
    code = "class Bright(LitThreeSeven):\n    def logits(self, x):\n        return super().logits(x) + 1\n"
    Path("bright_nets.py").write_text(f"from lit_threeseven import LitThreeSeven\n\n\n{code}")
    given = ("--model", "bright_nets.Bright", "--run", "bright")
    assert cli("fit", *given, "--trainer.max_epochs", "2")[0] == 0
    Image.new("L", (28, 28), 255).save("blank.png")
    assert cli("recognize", "blank.png", *given)[0] == 0
    code, _, error = cli("recognize", "blank.png", "--run", "bright")
    assert code == 1
    assert "--model bright_nets.Bright" in error


def test_another_optimizer_with_a_name_like_the_usual_one_s_is_refused_by_its_own_name(cli):
    run = ("fit", "--run", "r", "--trainer.check_val_every_n_epoch", "2", "--trainer.max_epochs")
    assert cli(*run, "2", "--optimizer", "ASGD")[0] == 0
    code, _, error = cli(*run, "4")
    assert code == 1
    assert "was made with optimizer ASGD instead of GradientDescent" in error
