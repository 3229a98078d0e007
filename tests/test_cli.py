import csv
import gc
import inspect
import io
import os
import re
import signal
import subprocess
import sys
from importlib import import_module
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from processes import curves, weights

from lit_threeseven import LitThreeSeven, ThreeSevenDataModule, dataset, processes, recipes
from lit_threeseven.__main__ import load
from lit_threeseven.commands import COMMANDS
from lit_threeseven.networks import LitThreeSevenMLP
from lit_threeseven.run import cli as cli_module
from lit_threeseven.signals import count

TRAIN = Path(__file__).parents[1] / "scripts" / "train.py"
SHORT = ("--trainer.max_epochs", "20")


def value(table: str, name: str) -> str:
    return re.search(rf"^{name} +(.*)$", table, re.MULTILINE).group(1)


def scalars(run: Path) -> dict[str, dict[int, float]]:
    """Every scalar of a TensorBoard run: name to step to value."""
    return {tag: dict(pairs) for tag, pairs in curves(run).items()}


def test_main_job_trains_tests_and_prints_a_table(cli):
    code, table, errors = cli("--trainer.max_epochs", "200")
    assert (code, errors) == (0, "")
    assert value(table, "Images") == "11,157 to train, 1,239 to validate, 2,038 to test"
    assert float(value(table, "Test loss")) < 0.03
    assert float(value(table, "Test accuracy").rstrip("%")) > 97
    assert float(value(table, "Test AUROC")) > 0.99
    assert re.fullmatch(r"\d+\.\d s, 200 epochs", value(table, "Training time"))
    assert (cli.folder / value(table, "Checkpoint")).is_file()
    assert re.fullmatch(r"(\S+/)?tensorboard --logdir logs", value(table, "Curves"))
    assert value(table, "Optimizer") == "GradientDescent, learning rate 1"
    assert len(table.splitlines()) == 9


def test_main_job_writes_curves_checkpoints_and_its_configuration(cli):
    cli("--trainer.max_epochs", "200")
    run = cli.folder / "logs" / "version_0"
    assert {path.name for path in (run / "checkpoints").iterdir()} == {"best.ckpt", "last.ckpt"}
    assert (run / "config.yaml").is_file()
    logged = scalars(run)
    assert {name for name in logged if "/" in name} == {
        *("Loss/train", "Loss/val"),  # TensorBoard shows these first
        *("train/loss", "train/accuracy"),
        *("val/loss", "val/accuracy", "val/auroc"),
        *("test/loss", "test/accuracy", "test/auroc"),
    }
    assert list(logged["train/loss"]) == [0, *range(19, 200, 20)]
    assert list(logged["val/loss"]) == list(range(9, 200, 10))
    assert (logged["Loss/train"], logged["Loss/val"]) == (logged["train/loss"], logged["val/loss"])
    assert logged["train/loss"][199] < logged["train/loss"][19]


def test_last_checkpoint_is_that_of_the_last_epoch(cli):
    cli("fit", "--trainer.max_epochs", "43")  # validated, and saved, every second epoch
    checkpoint = torch.load(cli.folder / "logs/version_0/checkpoints/last.ckpt", weights_only=True)
    assert checkpoint["global_step"] == 43


def test_best_checkpoint_is_the_one_with_the_smallest_validation_loss(cli):
    cli("--trainer.max_epochs", "12", "--optimizer", "SGD", "--optimizer.lr", "150")  # jumps up and down
    losses = scalars(cli.folder / "logs/version_0")["val/loss"]
    best = torch.load(cli.folder / "logs/version_0/checkpoints/best.ckpt", weights_only=True)
    assert min(losses, key=losses.get) == best["global_step"] - 1
    assert best["global_step"] < 12


@pytest.mark.slow
def test_main_job_reaches_98_2_percent_with_another_seed(cli):
    code, table, _ = cli("--seed_everything", "1", "--data.seed", "1")
    assert code == 0
    assert float(value(table, "Test accuracy").rstrip("%")) >= 98.2


@pytest.mark.slow
def test_train_script_without_arguments_is_the_main_job_with_ten_lines_on_stderr_and_the_network_that_ships(tmp_path):
    result = subprocess.run([sys.executable, TRAIN], cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0
    assert re.fullmatch(r"(Training: epoch [\d,]+ of 2,000, loss 0\.\d+\n){10}", result.stderr)
    assert float(value(result.stdout, "Test accuracy").rstrip("%")) >= 98.2
    assert value(result.stdout, "Training time").endswith("2,000 epochs")
    (published,) = re.findall(
        r"^Digest +(\w{64})$", (Path(__file__).parents[1] / "README.md").read_text(), re.MULTILINE
    )
    assert value(result.stdout, "Digest") == published == LitThreeSeven.from_pretrained().digest()
    assert [path.name for path in tmp_path.iterdir()] == ["logs"]


def test_article_s_recipe_trains_on_all_images_from_a_far_start(cli):
    recipe = "article"
    code, table, errors = cli("--config", str(recipe), *SHORT)
    assert (code, errors) == (0, "")
    assert value(table, "Images").startswith("12,396 to train, 0 to validate")
    model = torch.load(cli.folder / "logs/version_0/checkpoints/last.ckpt", weights_only=True)
    assert model["hyper_parameters"]["lr"] == 0.001
    assert model["hyper_parameters"]["init_std"] == 1.0
    assert model["state_dict"]["W"].std().item() == pytest.approx(1, rel=0.1)
    assert len(scalars(cli.folder / "logs/version_0")["train/loss"]) == 20


def test_other_digits_come_from_a_full_mnist(cli, small_mnist):
    other = ("--data.source", "torchvision", "--data.data_dir", str(small_mnist), "--data.digits", "[1, 8]")
    code, table, _ = cli(*SHORT, *other)
    assert code == 0
    assert value(table, "Images") == "54 to train, 6 to validate, 20 to test"
    code, table, _ = cli("predict", *other, "--ckpt_path", "best")
    assert code == 0
    with (cli.folder / value(table, "Predictions")).open() as file:
        assert {row["digit"] for row in csv.DictReader(file)} == {"1", "8"}
    code, _, error = cli("test", "--ckpt_path", "best")
    assert code == 1
    assert "The data has digits=(3, 7), and the network digits=(1, 8); make them the same" in error


def test_test_validate_and_predict_agree_with_the_run(cli):
    _, table, _ = cli(*SHORT)
    before = sorted((cli.folder / "logs/version_0").iterdir())
    _, tested, _ = cli("test", "--ckpt_path", value(table, "Checkpoint"))
    for name in ("Test loss", "Test accuracy", "Test AUROC"):
        assert value(tested, name) == value(table, name)
    _, validated, _ = cli("validate", "--ckpt_path", "best")
    losses = scalars(cli.folder / "logs/version_0")["val/loss"]
    assert float(value(validated, "Val loss")) == pytest.approx(min(losses.values()), abs=1e-4)
    _, predicted, _ = cli("predict", "--ckpt_path", "last")
    with (cli.folder / value(predicted, "Predictions")).open() as file:
        rows = list(csv.DictReader(file))
    assert [int(row["image"]) for row in rows] == list(range(2038))
    assert sum(row["truth"] == "3" for row in rows) == 1010
    assert all((row["digit"] == "3") == (float(row["probability of 3"]) >= 0.5) for row in rows)
    right = sum(row["digit"] == row["truth"] for row in rows)
    assert right / 2038 == pytest.approx(float(value(table, "Test accuracy").rstrip("%")) / 100, abs=1e-4)
    assert value(predicted, "Images") == f"2,038, {right:,} of them right"
    assert sorted((cli.folder / "logs/version_0").iterdir()) == before


@pytest.mark.parametrize("batch_size", ["null", "2000"])
def test_a_resumed_fit_ends_where_an_uninterrupted_one_does(cli, batch_size):
    options = ("--data.batch_size", batch_size, "--trainer.check_val_every_n_epoch", "5")
    cli("fit", *options, "--trainer.max_epochs", "20")
    cli("fit", *options, "--trainer.max_epochs", "12", "--trainer.default_root_dir", "two")
    code, table, _ = cli(
        *("fit", *options, "--trainer.max_epochs", "20"),
        *("--trainer.default_root_dir", "two", "--ckpt_path", "last"),
    )
    assert code == 0
    assert value(table, "Checkpoint") == "two/logs/version_0/checkpoints/best.ckpt"  # it resumed in its own folder
    straight, resumed = weights(cli.folder), weights(cli.folder / "two")
    assert torch.equal(straight["W"], resumed["W"])
    assert torch.equal(straight["b"], resumed["b"])
    assert scalars(cli.folder / "two/logs/version_0")["val/loss"] == scalars(cli.folder / "logs/version_0")["val/loss"]


def test_another_optimizer_can_be_chosen(cli):
    code, _, errors = cli("fit", *SHORT, "--optimizer", "Adam", "--optimizer.lr", "0.02")
    assert (code, errors) == (0, "")
    state = torch.load(cli.folder / "logs/version_0/checkpoints/last.ckpt", weights_only=True)["optimizer_states"][0]
    assert "exp_avg" in state["state"][0]
    assert state["param_groups"][0]["lr"] == 0.02


def test_logger_checkpoints_and_bar_can_be_switched_off(cli):
    off = [f"--trainer.{name}=false" for name in ("logger", "enable_checkpointing", "enable_progress_bar")]
    code, table, _ = cli(*SHORT, *off)
    assert code == 0
    assert "Checkpoint" not in table
    assert "Curves" not in table
    assert list(cli.folder.rglob("*")) == []


@pytest.fixture
def broken_checkpoints(cli):
    """A run, and beside it files that can't be used as its checkpoint."""
    cli("fit", *SHORT)
    good = cli.folder / "logs/version_0/checkpoints/best.ckpt"
    (cli.folder / "half.ckpt").write_bytes(good.read_bytes()[:3000])
    (cli.folder / "text.ckpt").write_text("hello")
    other = torch.load(good, weights_only=True)
    other["state_dict"] = {"layer.weight": torch.zeros(3, 2)}
    torch.save(other, cli.folder / "other.ckpt")

    class Payload:
        def __reduce__(self):
            return (os.mkdir, (str(cli.folder / "payload ran"),))

    torch.save({"state_dict": Payload()}, cli.folder / "code.ckpt")
    return cli


@pytest.mark.parametrize("subcommand", ["fit", "test", "predict", "validate"])
def test_a_file_that_is_not_a_checkpoint_is_refused_in_a_sentence(broken_checkpoints, subcommand):
    run = broken_checkpoints
    before = sorted(run.folder.rglob("*"))
    for file, sentence in {
        "nope.ckpt": "There is no checkpoint file nope.ckpt; give a file",
        "half.ckpt": r"half.ckpt is not a lit-threeseven checkpoint, or is truncated",
        "text.ckpt": r"text.ckpt is not a lit-threeseven checkpoint, or is truncated",
        "code.ckpt": r"code.ckpt is refused: it holds \w+.mkdir, which could run code. None was run",
        "other.ckpt": "holds a network with layer.weight .3, 2., not LitThreeSeven with W .784, 1",
    }.items():
        code, _, error = run(subcommand, "--ckpt_path", file)
        assert code == 1
        assert re.search(sentence, error)
        assert "\n" not in error
    assert sorted(run.folder.rglob("*")) == before


MLP = ("--model", "LitThreeSevenMLP")
SGD = ("--optimizer", "SGD", "--lr_scheduler")
CYCLE = ("--lr_scheduler.max_lr=1", "--lr_scheduler.total_steps=2")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--data.source", "torchvision"], "could not be downloaded to data/MNIST/raw .*source=.bundled"),
        (["--data.digits", "[3, 3]"], r"two different digits from 0 to 9, such as \(3, 7\), got \(3, 3\)"),
        (["--data.digits", "[1, 2, 3]"], r"--data.digits must be a list of 2, got \[1, 2, 3\]"),
        (
            ["--data.digits", "[1, 8]"],
            r"holds the digits \(3, 7\), not \(1, 8\); use source=.torchvision",
        ),
        (["--data.val_fraction", "1"], "val_fraction must be from 0 to less than 1, got 1.0"),
        (["--data.batch_size", "0"], "batch_size must be at least 1, .* got 0"),
        (["--data.batch_size", "1.5"], "--data.batch_size must be a whole number or null, got 1.5"),
        (["--data.data_dir", "x"], "data_dir=.x. is not used by the bundled data; use source=.torchvision"),
        (["--data.data_dir", "s3://x"], "data_dir must be a local path, got s3://x"),
        (["--data.source", "torchvision", "--data.data_dir", "a_file"], "could not be downloaded to a_file/MNIST"),
        (["--model.lr", "0"], "lr must be a finite float32 above 0, got 0.0"),
        (["--model.lr=1e-60"], "lr must be a finite float32 above 0, got 1e-60"),
        (["--model.lr", "nan"], "--model.lr must be a number, got nan"),
        (["--model.lr", ".nan"], "lr must be a finite float32 above 0, got nan"),
        (["--model.init_std", ".inf"], "init_std must be a finite float32 above 0, got inf"),
        (["--nonsense", "3"], "unrecognized arguments: --nonsense 3 .*--help"),
        (["fitt"], "invalid choice: 'fitt'"),
        (["--seed_everything=-1"], "--seed_everything must be from 0 to 4294967295, got -1"),
        (["--seed_everything=4294967296"], "--seed_everything must be from .*, got 4294967296"),
        (["--config", "unknown_key.yaml"], "--model.lrr is not an option of LitThreeSeven"),
        (["--model", "LitThreeEight"], "--model must be the name of a class, got LitThreeEight"),
        (["--model", "json.JSONDecoder"], "--model json.JSONDecoder: .*does not correspond to a subclass of"),
        (["--model.hidden_sizes", "[3]"], "--model.hidden_sizes is not an option of LitThreeSeven"),
        ([*MLP, "--model.hidden_sizes", "[20, 2.5]"], "--model.hidden_sizes must be a whole number, got 2.5"),
        ([*MLP, "--model.hidden_sizes", "[]"], r"hidden_sizes must be whole numbers above 0, such as .*, got \[\]"),
        ([*MLP, "--model.hidden_sizes", "[20, 0]"], r"hidden_sizes must be whole numbers above 0, .*, got \[20, 0\]"),
        ([*MLP, "--model.hidden_sizes=[1000000, 1000000]"], "needs 16,012.6 GB to train, and .* GB are free"),
        ([*MLP, "--model.gain", "0"], "gain must be a finite float32 above 0"),
        (["--data.rotation", "200"], "rotation must be from 0 to 180, got 200"),
        (["--data.zoom", "1", "--data.batch_size", "64"], "zoom must be from 0 to 0.99, got 1"),
        (["--data.shift=-1"], "shift must be from 0 to 28, got -1"),
        (["--config", "unknown_section.yaml"], "does not accept option 'modell.lr'"),
        (["--config", "absent.yaml"], "--config absent.yaml can't be read .No such file"),
        (["--config", "number.yaml"], "number.yaml: model must contain options, got 3"),
        (["--config", "latin.yaml"], "latin.yaml is not a plain YAML file in UTF-8"),
        (["--config=bomb.yaml"], "bomb.yaml is not a plain YAML file in UTF-8 .more than 20 aliases"),
        (["--trainer.default_root_dir", "a_file"], "a_file/logs.* can't be used .*--trainer.default_root_dir"),
        (["--trainer.default_root_dir", "/proc/none"], "/proc/none.* can't be used"),
        (["--trainer.default_root_dir=s3://x/y"], "default_root_dir must be a local path, got s3://x/y"),
        (["--trainer.accelerator", "mps"], "MPSAccelerator. can not run on your system"),
        (["--trainer.accelerator", "tpu"], "torch_xla.*--trainer.accelerator tpu"),
        (["--trainer.precision", "transformer-engine"], "transformer_engine.*--trainer.precision"),
        (["--trainer.precision", "99"], "--trainer.precision must be 64, 32, 16 or .*'bf16' or null, got 99"),
        (["--trainer.devices", "0"], "devices='0'.* is not a valid input"),
        (["--trainer.devices", "abc", "--trainer.accelerator", "cpu"], "devices.* should be an int > 0"),
        (["--trainer.devices", "null", "--trainer.accelerator", "cpu"], "devices.* should be an int > 0"),
        (["--trainer.max_epochs", "many"], "--trainer.max_epochs must be a whole number or null, got many"),
        (["--trainer.max_epochs", "0"], "--trainer.max_epochs 0 leaves nothing to do"),
        (["--trainer.limit_test_batches", "0"], "--trainer.limit_test_batches 0 leaves nothing to do"),
        (["--trainer.val_check_interval", "0"], "--trainer.val_check_interval 0 leaves nothing to do"),
        (["--trainer.accumulate_grad_batches", "0"], "--trainer.accumulate_grad_batches 0 leaves nothing to do"),
        (["--trainer.max_time", "{secs: 3}"], "'secs'.*--trainer.max_time"),
        (["--trainer.strategy", "ddp_spawn"], "--trainer.strategy ddp_spawn is for notebooks; use ddp"),
        (
            ["--trainer.callbacks", "EarlyStopping", "--trainer.callbacks.monitor", "nope"],
            "EarlyStopping monitors nope; there are",
        ),
        (["test"], "test needs --run NAME, or --ckpt_path"),
        (["predict", "--ckpt_path", "best"], "No run in .*/logs has saved a checkpoint"),
        (["test", "--run", "r"], "There is no checkpoint file .*/logs/r/checkpoints/best.ckpt"),
        (["fit", "--run", "../r"], r"--run takes the name of a folder in .*logs, .*got '\.\./r'"),
        (["fit", "--run", "r", "--ckpt_path", "last"], "--run and --ckpt_path both say what to resume"),
        (["--optimizer", "SGD", "--optimizer.lr=-1"], "--optimizer.lr must be a finite float32 above 0, got -1.0"),
        (["--optimizer", "Adam", "--optimizer.lr", "1e39"], "--optimizer.lr must be a finite float32 above 0, got 1e"),
        (["--optimizer", "SGD", "--optimizer.lr", "null"], "--optimizer.lr must be a finite float32 above 0, got None"),
        (["--optimizer", "SGD", "--optimizer.momentum=-1"], "Invalid momentum value: -1.0"),
        (["--optimizer", "SparseAdam"], "SparseAdam does not support dense gradients"),
        (
            ["--lr_scheduler", "StepLR", "--lr_scheduler.step_size", "9"],
            "--lr_scheduler needs an --optimizer to schedule",
        ),
        ([*SGD, "StepLR", "--lr_scheduler.step_size", "0"], "ZeroDivisionError.*StepLR --lr_scheduler.step_size 0"),
        (["--trainer.max_epochs=400", *SGD, "OneCycleLR", *CYCLE], "The specified number of total steps is 2"),
    ],
)
def test_a_mistake_ends_with_one_sentence_and_nothing_written(cli, no_network, arguments, sentence):
    (cli.folder / "unknown_key.yaml").write_text("model: {lrr: 3}")
    (cli.folder / "unknown_section.yaml").write_text("modell: {lr: 3}")
    (cli.folder / "number.yaml").write_text("model: 3")
    (cli.folder / "latin.yaml").write_bytes(b"model: {lr: 1}  # \xe9")
    (cli.folder / "bomb.yaml").write_text("a: &a [x, x]\n" + "b: [*a, *a, *a]\n" * 8)
    (cli.folder / "a_file").touch()
    before = sorted(cli.folder.rglob("*"))
    if not {"test", "predict", "fit"} & {*arguments}:
        arguments = (
            [*arguments, *("--trainer.max_epochs", "40")]
            if "--trainer.max_epochs" not in " ".join(arguments)
            else arguments
        )
    code, output, error = cli(*arguments)
    assert (code, output) == (1, "")
    assert error.startswith("lit-threeseven: error: ")
    assert re.search(sentence, error)
    assert "\n" not in error
    assert sorted(cli.folder.rglob("*")) == before


@pytest.mark.parametrize(("subcommand", "limit"), [("test", "test"), ("validate", "val"), ("predict", "predict")])
def test_limits_that_leave_nothing_are_refused(trained, subcommand, limit):
    code, _, error = trained(subcommand, "--ckpt_path", "last", f"--trainer.limit_{limit}_batches", "0")
    assert code == 1
    assert f"--trainer.limit_{limit}_batches 0 leaves nothing to do" in error


DAMAGE = {
    "epoch": None,
    "global_step": "many",
    "pytorch-lightning_version": None,
    "loops": [3],
    "callbacks": "none",
    "optimizer_states": [3],
    "lr_schedulers": None,
    "recipe": "secret",
    "hyper_parameters": "three",
    "loops.fit_loop": None,
    "state_dict.W": torch.full((784, 1), float("nan")),
    "state_dict.b": torch.zeros(1).to_sparse(),
}


@pytest.mark.parametrize("entry", DAMAGE)
def test_a_checkpoint_with_a_damaged_entry_is_refused_and_the_run_stays_as_it_was(trained, entry):
    path = trained.folder / "logs/version_0/checkpoints/last.ckpt"
    checkpoint = torch.load(path, weights_only=True)
    part = checkpoint
    for name in entry.split(".")[:-1]:
        part = part[name]
    part[entry.split(".")[-1]] = DAMAGE[entry]
    torch.save(checkpoint, path)
    before = {file: file.read_bytes() for file in trained.folder.rglob("*") if file.is_file()}
    code, _, error = trained("fit", "--ckpt_path", "last", "--trainer.max_epochs", "9")
    assert code == 1
    assert str(path) in error
    assert "\n" not in error
    assert {file: file.read_bytes() for file in trained.folder.rglob("*") if file.is_file()} == before


def test_home_folder_and_variables_in_paths_are_expanded(cli, monkeypatch):
    monkeypatch.setenv("HOME", str(cli.folder / "home"))
    monkeypatch.setenv("PLACE", str(cli.folder / "place"))
    assert cli("fit", "--trainer.max_epochs", "1", "--trainer.default_root_dir=~/x")[0] == 0
    assert cli("fit", "--trainer.max_epochs", "1", "--trainer.default_root_dir=$PLACE/x")[0] == 0
    for folder in ("home", "place"):
        assert {path.name for path in (cli.folder / folder / "x/logs/version_0").iterdir()} > {
            "checkpoints",
            "config.yaml",
        }
    assert {path.name for path in cli.folder.iterdir()} == {"home", "place"}


@pytest.fixture
def trained(cli):
    """The command line in a folder with a run of three epochs."""
    cli("fit", "--trainer.max_epochs", "3")
    return cli


def test_a_missing_bundle_ends_with_one_sentence_and_nothing_written(cli, tmp_path, monkeypatch):
    monkeypatch.setattr(dataset, "BUNDLED_ROOT", tmp_path / "absent")
    code, _, error = cli()
    assert code == 1
    assert re.search(
        r"train-images-idx3-ubyte is not an intact MNIST file .*No such file .*Reinstall lit_threeseven.", error
    )
    assert list(cli.folder.iterdir()) == []


def test_validating_without_a_hold_out_is_refused(cli):
    cli("fit", *SHORT, "--data.val_fraction", "0")
    code, _, error = cli("validate", "--ckpt_path", "last", "--data.val_fraction", "0")
    assert code == 1
    assert "val_fraction is 0, which leaves nothing to validate on" in error


def test_validating_on_images_that_were_trained_on_is_refused(cli):
    cli("fit", *SHORT, "--data.seed", "1")
    code, _, error = cli("validate", "--ckpt_path", "best")
    assert code == 1
    assert "was made with data.seed 1 instead of 0; give the same settings" in error
    assert cli("validate", "--ckpt_path", "best", "--data.seed", "1")[0] == 0


def test_best_and_last_are_those_of_the_newest_run_that_has_saved(cli):
    for epochs in ("2", "3"):
        cli("fit", "--trainer.max_epochs", epochs)
    (cli.folder / "logs/version_1").rename(cli.folder / "logs/version_10")
    (cli.folder / "logs/version_11").mkdir()
    for name in ("best", "last"):
        _, table, _ = cli("predict", "--ckpt_path", name)
        assert value(table, "Predictions") == f"logs/version_10/checkpoints/{name}.predictions.csv"


def test_weights_alone_are_tested_but_not_resumed(cli):
    cli("fit", *SHORT)
    state = torch.load(cli.folder / "logs/version_0/checkpoints/last.ckpt", weights_only=True)["state_dict"]
    torch.save({"state_dict": state, "pytorch-lightning_version": "2.6.0"}, cli.folder / "weights.ckpt")
    assert cli("test", "--ckpt_path", "weights.ckpt")[0] == 0
    code, _, error = cli("fit", "--ckpt_path", "weights.ckpt")
    assert code == 1
    assert "weights.ckpt contains only weights; training can't resume from it" in error


def test_part_of_the_test_images_can_be_predicted(cli):
    cli("fit", *SHORT)
    part = ("--data.batch_size", "64", "--trainer.limit_predict_batches", "2")
    code, table, _ = cli("predict", "--ckpt_path", "best", *part)
    assert code == 0
    assert value(table, "Images").startswith("128, ")
    assert len((cli.folder / value(table, "Predictions")).read_text().splitlines()) == 129


def test_validation_can_run_every_few_steps(cli):
    options = ("--data.batch_size", "1000", "--trainer.max_epochs", "3", "--trainer.val_check_interval", "15")
    code, _, errors = cli("fit", *options)
    assert (code, errors) == (0, "")
    assert list(scalars(cli.folder / "logs/version_0")["val/loss"]) == [14, 29]


def test_a_non_finite_loss_names_the_learning_rate(cli):
    code, _, error = cli("--model.init_std", "3e38", "--model.lr", "0.125", *SHORT)
    assert code == 1
    assert re.search("non-finite within .* steps at learning rate 0.125; choose a smaller one", error)
    assert list(cli.folder.rglob("*.ckpt")) == []


def test_a_mistake_at_the_terminal_has_no_traceback(tmp_path):
    command = [sys.executable, "-m", "lit_threeseven", "--model.lr", "0"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert result.returncode == 1
    assert result.stderr == "lit-threeseven: error: lr must be a finite float32 above 0, got 0.0.\n"
    assert list(tmp_path.iterdir()) == []


def test_no_garbage_is_collected_while_a_command_is_imported_but_afterwards(tmp_path, monkeypatch):
    (tmp_path / "imported_once.py").write_text("import gc\non = gc.isenabled()\n")
    monkeypatch.syspath_prepend(tmp_path)
    module = load("imported_once")
    assert not module.on
    assert gc.isenabled()
    assert gc.get_freeze_count()
    assert load("imported_once") is module


@pytest.mark.slow
def test_python_s_development_mode_shows_the_traceback_behind_a_sentence(tmp_path):
    command = [sys.executable, "-X", "dev", "-m", "lit_threeseven", "--model.lr", "0"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 1
    assert "Traceback" in result.stderr
    assert "UserError: lr must be a finite float32 above 0" in result.stderr


def test_an_error_that_is_not_the_user_s_keeps_its_traceback(cli, monkeypatch):
    def fails(*args):
        raise ZeroDivisionError

    monkeypatch.setattr(LitThreeSeven, "on_train_end", fails)
    with pytest.raises(ZeroDivisionError):
        cli(*SHORT)


def test_a_scheduler_can_watch_the_validation_loss(cli):
    plateau = ("--lr_scheduler", "ReduceLROnPlateau", "--lr_scheduler.monitor", "val/loss")
    code, _, errors = cli("fit", "--trainer.max_epochs", "60", "--optimizer", "SGD", *plateau)  # validated every third
    assert (code, errors) == (0, "")
    (scheduler,) = torch.load(cli.folder / "logs/version_0/checkpoints/last.ckpt", weights_only=True)["lr_schedulers"]
    assert scheduler["last_epoch"] == 20
    assert scheduler["best"] == pytest.approx(min(scalars(cli.folder / "logs/version_0")["val/loss"].values()))


def test_one_epoch_is_not_one_epochs():
    assert (count(1), count(2000)) == ("1 epoch", "2,000 epochs")


def test_a_trial_prediction_leaves_the_predictions_alone(trained):
    trained("predict", "--ckpt_path", "last")
    path = trained.folder / "logs/version_0/checkpoints/last.predictions.csv"
    before = path.read_bytes()
    code, table, _ = trained(
        "predict", "--ckpt_path", "last", "--trainer.fast_dev_run", "true", "--data.batch_size", "9"
    )
    assert (code, "Predictions" in table) == (0, False)
    assert path.read_bytes() == before


def test_the_command_knows_its_version(cli):
    code, output, _ = cli("--version")
    assert (code, output.split()[-1]) == (0, version("lit_threeseven"))


@pytest.mark.parametrize("subcommand", ["fit", "validate", "test", "predict"])
def test_help_explains_every_argument(subcommand, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as end:
        cli_module.main([subcommand, "--help"])
    assert end.value.code == 0
    lines = io.StringIO(capsys.readouterr().out).read()
    arguments = re.findall(r"^  (-.*\n(?:   .*\n)*)", lines, re.MULTILINE)
    assert len(arguments) > 40
    for argument in arguments:
        names, _, explanation = re.sub(r"\s{2,}", "\0", argument.strip(), count=1).partition("\0")
        assert re.search(r"[a-z]+ [a-z]+", explanation.split("(type:")[0]), names
    text = " ".join(lines.split())
    assert "Checkpoint to resume or use: a file; best or last" in text


def test_help_without_a_subcommand_names_every_command(cli):
    code, page, _ = cli("--help")
    assert code == 0
    assert len(page.splitlines()) <= 40
    for command in ("fit", "validate", "test", "predict", *COMMANDS):
        assert re.search(rf"^  {command} +\w+", page, re.MULTILINE)
    assert all(path.stem in page for path in recipes.FOLDER.glob("*.yaml"))


@pytest.mark.parametrize("command", COMMANDS)
def test_a_light_command_s_help_is_short_and_explains_every_option(cli, command):
    code, page, _ = cli(command, "--help")
    assert code == 0
    assert len(page.splitlines()) <= 40
    for argument in inspect.signature(getattr(import_module(f"lit_threeseven.commands.{command}"), command)).parameters:
        assert re.search(rf"^  (--)?{argument}\b.*\w+", page, re.MULTILINE | re.IGNORECASE)


@pytest.mark.parametrize("network", ["LitThreeSeven", "LitThreeSevenMLP"])
def test_help_explains_the_arguments_of_each_network(network, capsys):
    with pytest.raises(SystemExit) as end:
        cli_module.main(["fit", "--model.help", network])
    assert end.value.code == 0
    lines = " ".join(capsys.readouterr().out.split())
    assert "Learning rate of plain gradient descent, above 0." in lines
    assert ("Number of units in each hidden layer" in lines) == (network == "LitThreeSevenMLP")


def test_a_folder_s_name_is_not_taken_for_lost_contact(cli, no_network):
    code, _, error = cli("fit", "--data.source", "torchvision", "--data.data_dir", "gloomy")
    assert code == 1
    assert re.search("error: MNIST could not be downloaded to gloomy/MNIST/raw", error)


def test_a_command_after_its_options_is_refused_with_advice(cli):
    code, _, error = cli("--config", "fast", "fit")
    assert code == 1
    assert "fit comes first: lit-threeseven fit" in error


@pytest.mark.parametrize(
    ("options", "fewest"),
    [
        (("--trainer.max_epochs", "-1", "--trainer.max_time", "00:00:00:03"), 2),
        (("--data.batch_size", "64", "--trainer.max_steps", "300"), 1),
        (("--trainer.max_steps", "100"), 20),
        (("--trainer.max_epochs", "39"), 19),
    ],
)
def test_a_fit_validates_and_saves_at_most_twenty_times_and_at_least_once(cli, options, fewest):
    assert cli("fit", *options)[0] == 0
    assert fewest <= len(scalars(cli.folder / "logs/version_0")["val/loss"]) <= 20
    assert (cli.folder / "logs/version_0/checkpoints/best.ckpt").exists()


def test_the_newest_run_may_have_a_name(cli):
    for named in ((), ("--run", "second")):
        assert cli("fit", "--trainer.max_epochs", "2", *named)[0] == 0
    _, table, _ = cli("predict", "--ckpt_path", "best")
    assert value(table, "Predictions") == "logs/second/checkpoints/best.predictions.csv"


def test_help_needs_neither_torch_nor_lightning(tmp_path):
    program = """
import sys
from lit_threeseven.__main__ import main
main(["--help"])
print(*(name for name in ("torch", "lightning", "jsonargparse", "matplotlib") if name in sys.modules))
for command in ("sweep", "export"):
    try:
        main([command, "--help"])
    except SystemExit as end:
        assert not end.code
print(*(name for name in ("torch", "lightning", "jsonargparse", "matplotlib") if name in sys.modules))
"""
    command = [sys.executable, "-c", program]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=True)
    lines = result.stdout.splitlines()
    assert lines[lines.index("  --version   show the version") + 1] == ""
    assert lines[-1] == ""


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--trainer.logger", "CSVLogger"], "CSVLogger needs save_dir, as in --trainer.logger.save_dir …"),
        (["--data.digits", "3,7"], r"--data.digits must be a list of 2, such as \[3, 7\], got 3,7"),
        (["--lr", "0.1"], r"did you mean --model.lr\?"),
        (["--model.learning_rate", "0.1"], "--model.learning_rate is not an option of LitThreeSeven"),
        (["--trainer.epochs", "3"], r"did you mean --trainer.m.._epochs\?"),
        (["--batch-size", "3"], r"did you mean --data.batch_size\?"),
        (["--config", "slow"], "There is no recipe slow; there are article, deep, fast"),
        (["recognize", "x.png", "--trainer.devices", "2"], "unrecognized arguments: --trainer.devices 2"),
    ],
)
def test_a_mistake_is_answered_with_what_was_meant(cli, arguments, sentence):
    code, output, error = cli(*arguments)
    assert (code, output) == (1, "")
    assert re.search(sentence, error), error
    assert "\n" not in error
    assert "class '" not in error


def test_a_profiler_s_summary_is_printed(cli):
    code, output, _ = cli("fit", *SHORT, "--trainer.profiler", "simple")
    assert code == 0
    assert "optimizer_step" in output


@pytest.mark.parametrize("error", [KeyError("x"), RuntimeError("something is wrong"), TypeError("ours")])
def test_an_error_in_the_user_s_own_setup_keeps_its_traceback(cli, monkeypatch, error):
    def setup(self, stage):
        raise error

    monkeypatch.setattr(LitThreeSeven, "setup", setup)
    with pytest.raises(type(error)):
        cli("fit", *SHORT)


def test_a_subclass_may_return_a_scheduler_and_ask_for_its_trainer(cli, monkeypatch):
    monkeypatch.syspath_prepend(cli.folder)
    (cli.folder / "scheduled_nets.py").write_text("""
import torch
from lit_threeseven import LitThreeSeven


class Scheduled(LitThreeSeven):
    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=self.lr)
        steps = self.trainer.estimated_stepping_batches
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=2.0, total_steps=steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}
""")
    options = ("--model", "scheduled_nets.Scheduled", "--run", "r")
    code, table, errors = cli(*options, "--trainer.max_epochs", "40")
    assert (code, errors) == (0, "")
    assert value(table, "Optimizer").startswith("SGD, learning rate ")
    assert "Test accuracy" in cli("test", *options)[1]


@pytest.mark.parametrize(("seconds", "expected"), [({2: 1.0, 1: 1.1}, 1), ({2: 1.0, 1: 1.9}, 2)])
def test_one_thread_is_used_where_two_are_hardly_faster(monkeypatch, seconds, expected):
    threads = [2]
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads[-1])
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    monkeypatch.setattr("timeit.repeat", lambda step, **_: [step() is None or seconds[threads[-1]]])
    data = ThreeSevenDataModule()
    data.setup("fit")
    processes.choose_threads(LitThreeSeven(), data)
    assert threads[-1] == expected
    processes.choose_threads(LitThreeSevenMLP(hidden_sizes=[3]), data)  # whose bits depend on it
    assert threads[-1] == expected


@pytest.mark.parametrize(
    ("command", "option"),
    [
        (("--trainer.max_epochs", "1"), "--trainer.default_root_dir"),
        (("sweep", "--epochs", "1"), "--out"),
        (("export", "pretrained", "--to", "html"), "--out"),
    ],
)
def test_a_folder_that_can_t_be_written_to_is_named_with_the_option_for_another(cli, monkeypatch, command, option):
    monkeypatch.chdir("/proc")
    code, output, error = cli(*command)
    assert (code, output) == (1, "")
    assert re.search(rf"can't be used .*{option}", error), error
    assert "\n" not in error


def test_output_that_nobody_reads_to_its_end_is_no_error(tmp_path):
    program = Path(sys.executable).with_name("lit-threeseven")
    for command in ("--help", "recognize --help"):
        shell = f"set -o pipefail; {program} {command} | head -1"
        result = subprocess.run(["bash", "-c", shell], cwd=tmp_path, capture_output=True, text=True, timeout=120)
        assert result.stdout.startswith("usage: lit-threeseven")
        assert (result.stderr, result.returncode in (0, 128 + signal.SIGPIPE)) == ("", True)
