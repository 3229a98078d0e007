import csv
import io
import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lit_threeseven import cli as cli_module
from lit_threeseven import dataset
from lit_threeseven.cli import ThreeSevenCLI

TRAIN = Path(__file__).parents[1] / "scripts" / "train.py"
SHORT = ("--trainer.max_epochs", "20")


def value(table: str, name: str) -> str:
    return re.search(rf"^{name} +(.*)$", table, re.MULTILINE).group(1)


def scalars(run: Path) -> dict[str, dict[int, float]]:
    """Every scalar of a TensorBoard run: name to step to value."""
    events = EventAccumulator(str(run)).Reload()
    return {tag: {event.step: event.value for event in events.Scalars(tag)} for tag in events.Tags()["scalars"]}


def weights(folder: Path, name: str = "last", version: int = 0) -> dict[str, torch.Tensor]:
    return torch.load(folder / f"logs/version_{version}/checkpoints/{name}.ckpt", weights_only=True)["state_dict"]


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
    assert len(table.splitlines()) == 7


def test_main_job_writes_curves_checkpoints_and_its_configuration(cli):
    cli("--trainer.max_epochs", "200")
    run = cli.folder / "logs" / "version_0"
    assert {path.name for path in (run / "checkpoints").iterdir()} == {"best.ckpt", "last.ckpt"}
    assert (run / "config.yaml").is_file()
    curves = scalars(run)
    assert {name for name in curves if "/" in name} == {
        *("train/loss", "train/accuracy"),
        *("val/loss", "val/accuracy", "val/auroc"),
        *("test/loss", "test/accuracy", "test/auroc"),
    }
    assert list(curves["train/loss"]) == list(range(19, 200, 20))
    assert list(curves["val/loss"]) == list(range(9, 200, 10))
    assert curves["train/loss"][199] < curves["train/loss"][19]


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
@pytest.mark.parametrize("seed", range(4))
def test_main_job_reaches_98_2_percent_whatever_the_seed(cli, seed):
    code, table, _ = cli("--seed_everything", str(seed), "--data.seed", str(seed))
    assert code == 0
    assert float(value(table, "Test accuracy").rstrip("%")) >= 98.2


@pytest.mark.slow
def test_train_script_without_arguments_is_the_main_job_and_writes_nothing_but_its_table(tmp_path):
    result = subprocess.run([sys.executable, TRAIN], cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0
    assert result.stderr == ""
    assert float(value(result.stdout, "Test accuracy").rstrip("%")) >= 98.2
    assert value(result.stdout, "Training time").endswith("2,000 epochs")
    assert [path.name for path in tmp_path.iterdir()] == ["logs"]


def test_article_s_recipe_trains_on_all_images_from_a_far_start(cli):
    recipe = TRAIN.parent / "configs" / "article.yaml"
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
    assert "was trained on the digits [1, 8], and the data are to be [3, 7]; give --data.digits '[1, 8]'" in error


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
    assert value(table, "Checkpoint") == "two/logs/version_0/checkpoints/best.ckpt"  # it went on in its own folder
    straight, resumed = weights(cli.folder), weights(cli.folder / "two")
    assert torch.equal(straight["W"], resumed["W"])
    assert torch.equal(straight["b"], resumed["b"])
    assert scalars(cli.folder / "two/logs/version_0")["val/loss"] == scalars(cli.folder / "logs/version_0")["val/loss"]


@pytest.mark.slow
def test_two_devices_end_at_the_weights_of_one(tmp_path):
    for devices in ("1", "2"):
        command = [
            sys.executable,
            TRAIN,
            *SHORT,
            "--trainer.accelerator",
            "cpu",
            "--trainer.devices",
            devices,
        ]
        folder = tmp_path / devices
        folder.mkdir()
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
        assert result.returncode == 0, result.stderr
    assert len(re.findall("Test accuracy", result.stdout)) == 1
    torch.testing.assert_close(weights(tmp_path / "1"), weights(tmp_path / "2"), rtol=1e-5, atol=1e-7)


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


def test_one_progress_bar_over_all_epochs_on_a_terminal(tmp_path):
    leader, follower = pty.openpty()
    environment = os.environ | {"COLUMNS": "120", "TERM": "xterm"}
    command = [sys.executable, TRAIN, "fit", "--trainer.max_epochs", "300"]
    with subprocess.Popen(command, cwd=tmp_path, stdout=follower, stderr=follower, env=environment) as process:
        os.close(follower)
        output = b""
        while True:
            try:
                output += os.read(leader, 65536)
            except OSError:  # the terminal's other end is closed
                break
    os.close(leader)
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", output.decode())
    assert process.returncode == 0
    states = re.findall(r"Training \S* epoch (\d+) of 300 loss ([\d.]*) +(\S+) left", text)
    epochs = [int(epoch) for epoch, _, _ in states]
    assert epochs == sorted(epochs)
    assert epochs[-1] == 300
    assert len(epochs) > 3
    assert 0 < float(states[-1][1]) < 0.1
    assert text.count("\n") < 15  # it stays on one line, and nothing else is said


@pytest.fixture
def broken_checkpoints(cli):
    """Files beside a run's checkpoint that are none."""
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
def test_a_checkpoint_that_is_none_is_refused_in_a_sentence(broken_checkpoints, subcommand):
    run = broken_checkpoints
    before = sorted(run.folder.rglob("*"))
    for file, sentence in {
        "nope.ckpt": "There is no checkpoint file nope.ckpt; give a file",
        "half.ckpt": r"half.ckpt is no checkpoint of this program, or only a part of one",
        "text.ckpt": r"text.ckpt is no checkpoint of this program, or only a part of one",
        "code.ckpt": r"code.ckpt is no checkpoint of this program, or only a part of one",
        "other.ckpt": r"other.ckpt holds another model: {'layer.weight': \(3, 2\)} instead of {'W': \(784, 1\)",
    }.items():
        code, _, error = run(subcommand, "--ckpt_path", file)
        assert code == 1
        assert re.search(sentence, error)
        assert "\n" not in error
    assert sorted(run.folder.rglob("*")) == before


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (
            ["--data.source", "torchvision"],
            "could not be put into data/MNIST/raw .*train-images-idx3-ubyte, .*bundled",
        ),
        (["--data.digits", "[3, 3]"], r"two different digits from 0 to 9, such as \[3, 7\], got \[3, 3\]"),
        (
            ["--data.digits", "[1, 2, 3]"],
            r"--data.digits: Expected a tuple with 2 elements. Got value: \[1, 2, 3\]",
        ),
        (
            ["--data.digits", "[1, 8]"],
            r"holds the digits \[3, 7\], got digits \[1, 8\]; .*--data.source torchvision",
        ),
        (["--data.val_fraction", "1"], "val_fraction must be from 0 to less than 1, got 1.0"),
        (["--data.batch_size", "0"], "batch_size must be at least 1, .* got 0"),
        (
            ["--data.batch_size", "64", "--data.pixels", "sparse"],
            "pixels=sparse can't work here: batch_size makes mini-batches, .*; use pixels=auto",
        ),
        (["--data.batch_size", "1.5"], "--data.batch_size: .*1.5"),
        (["--model.lr", "0"], "lr must be a finite float32 above 0, such as 1.0, got 0.0"),
        (["--model.lr=-1"], "lr must be a finite float32 above 0, such as 1.0, got -1.0"),
        (["--model.lr", "nan"], "--model.lr: Expected a float. Got value: nan"),
        (["--model.lr", ".nan"], "lr must be a finite float32 above 0, such as 1.0, got nan"),
        (["--model.init_std", ".inf"], "init_std must be a finite float32 above 0, such as 0.01, got inf"),
        (["--nonsense", "3"], "unrecognized arguments: --nonsense 3 .*--help"),
        (["fitt"], "invalid choice: 'fitt'"),
        (["--config", "unknown_key.yaml"], "does not accept option 'model.lrr'"),
        (["--config", "unknown_section.yaml"], "does not accept option 'modell.lr'"),
        (["--config", "absent.yaml"], "File does not exist: .*absent.yaml"),
        (
            ["--trainer.default_root_dir", "a_file"],
            "a_file/logs.* can't be used .*--trainer.default_root_dir",
        ),
        (["--trainer.default_root_dir", "/proc/none"], "/proc/none.* can't be used"),
        (
            ["--data.source", "torchvision", "--data.data_dir", "a_file"],
            "MNIST could not be put into a_file/MNIST",
        ),
        (["--trainer.accelerator", "gpu"], "gpu"),
        (["--trainer.devices", "0"], "devices"),
        (["test"], "test needs a trained network: give --ckpt_path"),
        (
            ["predict", "--ckpt_path", "best"],
            "There is no run in .*/logs; train first without --ckpt_path",
        ),
        (
            ["validate", "--data.val_fraction", "0", "--ckpt_path", "best"],
            "There is no run in",
        ),
        (["--optimizer", "SGD", "--optimizer.lr=-1"], "optimizer.lr must be a finite number above 0, got -1.0"),
        (["--optimizer", "Adam", "--optimizer.lr", "0"], "optimizer.lr must be a finite number above 0, got 0.0"),
        (["--optimizer", "SGD", "--optimizer.momentum=-1"], "Invalid momentum value: -1.0"),
        (
            ["--lr_scheduler", "StepLR", "--lr_scheduler.step_size", "9"],
            "--lr_scheduler needs an --optimizer to schedule",
        ),
    ],
)
def test_a_mistake_ends_with_one_sentence_and_nothing_written(cli, no_network, arguments, sentence):
    (cli.folder / "unknown_key.yaml").write_text("model: {lrr: 3}")
    (cli.folder / "unknown_section.yaml").write_text("modell: {lr: 3}")
    (cli.folder / "a_file").touch()
    before = sorted(cli.folder.rglob("*"))
    code, output, error = cli(*arguments)
    assert code == 1
    assert output == ""
    assert error.startswith("lit-threeseven: error: ")
    assert re.search(sentence, error)
    assert "\n" not in error
    assert sorted(cli.folder.rglob("*")) == before


def test_a_damaged_bundle_ends_with_one_sentence_and_nothing_written(cli, tmp_path, monkeypatch):
    monkeypatch.setattr(dataset, "BUNDLED_ROOT", tmp_path / "absent")
    code, _, error = cli()
    assert code == 1
    assert re.search(
        r"train-images-idx3-ubyte is not the MNIST file .*: it is missing. Reinstall lit_threeseven.", error
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


def test_best_and_last_are_those_of_the_newest_run_only(cli):
    cli("fit", *SHORT)
    for number in ("2", "10"):
        (cli.folder / f"logs/version_{number}").mkdir()
    for name in ("best", "last"):
        code, _, error = cli("test", "--ckpt_path", name)
        assert code == 1
        assert re.search(rf"not saved a {name} checkpoint: .*version_10/checkpoints/{name}.ckpt is not there", error)


def test_weights_alone_are_tested_but_not_gone_on_with(cli):
    cli("fit", *SHORT)
    state = torch.load(cli.folder / "logs/version_0/checkpoints/last.ckpt", weights_only=True)["state_dict"]
    torch.save({"state_dict": state, "pytorch-lightning_version": "2.6.0"}, cli.folder / "weights.ckpt")
    assert cli("test", "--ckpt_path", "weights.ckpt")[0] == 0
    code, _, error = cli("fit", "--ckpt_path", "weights.ckpt")
    assert code == 1
    assert "weights.ckpt holds weights alone, and no run to go on with" in error


def test_part_of_the_test_images_can_be_predicted(cli):
    cli("fit", *SHORT)
    part = ("--data.batch_size", "64", "--trainer.limit_predict_batches", "2")
    code, table, _ = cli("predict", "--ckpt_path", "best", *part)
    assert code == 0
    assert value(table, "Images").startswith("128, ")
    assert len((cli.folder / value(table, "Predictions")).read_text().splitlines()) == 129


def test_validation_can_be_by_steps(cli):
    options = ("--data.batch_size", "1000", "--trainer.max_epochs", "3", "--trainer.val_check_interval", "15")
    code, _, errors = cli("fit", *options)
    assert (code, errors) == (0, "")
    assert list(scalars(cli.folder / "logs/version_0")["val/loss"]) == [14, 29]


def test_a_loss_that_is_no_number_names_the_learning_rate(cli):
    code, _, error = cli("--model.init_std", "3e38", "--model.lr", "0.125", *SHORT)
    assert code == 1
    assert re.search("non-finite within .* steps at learning rate 0.125; choose a smaller one", error)
    assert list(cli.folder.rglob("*.ckpt")) == []


def test_a_mistake_at_the_terminal_has_no_traceback(tmp_path):
    command = [sys.executable, TRAIN, "--model.lr", "0"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert result.returncode == 1
    assert result.stderr == "lit-threeseven: error: lr must be a finite float32 above 0, such as 1.0, got 0.0.\n"
    assert list(tmp_path.iterdir()) == []


def test_an_error_that_is_not_the_user_s_keeps_its_traceback(cli, monkeypatch):
    monkeypatch.setattr(cli_module, "metric_rows", lambda metrics: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        cli(*SHORT)
    monkeypatch.setattr(ThreeSevenCLI, "fit", lambda *args, **kwargs: os.kill(10**9, 0))
    with pytest.raises(OSError, match="No such process"):
        cli(*SHORT)


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
    assert "Learning rate of plain gradient descent, above 0." in lines
    assert re.search(r"Checkpoint to go on\s+from: a file, or best or last", lines)


def test_help_without_a_subcommand_says_what_there_is(capsys):
    with pytest.raises(SystemExit):
        cli_module.main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    for part in ("main job: fit, then test", "fit --help", *("Measure a checkpoint on the test images.",)):
        assert part in text
