"""Other loggers beside TensorBoard: what they are given, and what happens when one of them fails."""

import json
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from processes import curves

from lit_threeseven import weights

ROOT = Path(__file__).parents[1]
PROGRAM = Path(sys.executable).with_name("lit-threeseven")
PICTURES = {"train examples", "W picture", "val hardest", "test roc", "test confusion_matrix"}
METRICS = {"train/loss", "val/loss", "val/accuracy", "test/loss", "test/accuracy", "test/auroc"}
FAILING = """
from lightning.pytorch.loggers import CSVLogger


class Failing(CSVLogger):
    def log_metrics(self, metrics, step=None):
        if step and step >= 4:
            raise ConnectionError("the server is gone")
"""


def test_a_logger_is_added_beside_tensorboard_by_one_line_of_yaml(cli):
    (cli.folder / "csv.yaml").write_text(
        "trainer: {logger: {class_path: CSVLogger, init_args: {save_dir: csv, name: r}}}"
    )
    code, table, errors = cli("--config", "csv.yaml", "--run", "r", "--trainer.max_epochs", "20")
    assert (code, errors) == (0, "")
    assert "Curves" in table
    assert "Loss/val" in curves(cli.folder / "logs/r")
    columns = (cli.folder / "csv/r/version_0/metrics.csv").read_text().splitlines()[0].split(",")
    assert set(columns) > METRICS
    assert "recipe/optimizer: GradientDescent" in (cli.folder / "csv/r/version_0/hparams.yaml").read_text()


def test_a_list_of_loggers_is_taken_as_it_is(cli):
    only = json.dumps([{"class_path": "CSVLogger", "init_args": {"save_dir": "csv"}}])
    assert cli("fit", "--trainer.max_epochs", "3", "--trainer.logger", only)[0] == 0
    assert [path.name for path in cli.folder.iterdir()] == ["csv"]


def test_a_logger_that_fails_in_mid_run_ends_neither_the_run_nor_its_checkpoints(cli, monkeypatch):
    (cli.folder / "failing_logger.py").write_text(FAILING)
    monkeypatch.syspath_prepend(cli.folder)
    options = ("--trainer.max_epochs", "20", "--trainer.log_every_n_steps", "1")
    cli("fit", "--run", "usual", *options)
    failing = ("--trainer.logger", "failing_logger.Failing", "--trainer.logger.save_dir", "csv")
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        code, _, _ = cli("fit", "--run", "failing", *options, *failing)
    assert code == 0
    assert [str(warning.message) for warning in told if "stopped logging" in str(warning.message)] == [
        "Failing stopped logging; it failed with ConnectionError('the server is gone'). Training continues."
    ]
    for name in ("best", "last"):
        usual, other = (
            weights.read(cli.folder / "logs" / run / f"checkpoints/{name}.ckpt") for run in ("usual", "failing")
        )
        assert usual["global_step"] == other["global_step"]
        assert torch.equal(usual["state_dict"]["W"], other["state_dict"]["W"])
    assert curves(cli.folder / "logs/failing")["Loss/train"] == curves(cli.folder / "logs/usual")["Loss/train"]


@pytest.fixture
def train(tmp_path, monkeypatch):
    """Run the main job with a logger, without a network or an account."""
    for name in ("WANDB_SILENT", "MLFLOW_DISABLE_TELEMETRY", "DO_NOT_TRACK"):
        monkeypatch.setenv(name, "true")

    def run(*options: str) -> None:
        command = [PROGRAM, "--trainer.max_epochs", "20", *options]
        subprocess.run(command, cwd=tmp_path, check=True, timeout=180)
        assert "Loss/val" in curves(tmp_path / "logs/version_0")

    return run


@pytest.mark.slow
def test_mlflow_gets_recipe_pictures_and_final_metrics_in_local_files(train, tmp_path):
    (line,) = re.findall(r"```yaml\n +(trainer: .*)\n", (ROOT / "lit_threeseven" / "README.md").read_text())
    (tmp_path / "mlflow.yaml").write_text(line)
    train("--config", "mlflow.yaml")
    import mlflow

    client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    (run,) = client.search_runs([experiment.experiment_id for experiment in client.search_experiments()])
    assert run.info.status == "FINISHED"
    assert run.data.params["recipe/optimizer"] == "GradientDescent"
    assert set(run.data.metrics) >= METRICS
    drawn = {path.parent.name for path in (tmp_path / "mlruns").rglob("*.png")}
    assert drawn >= PICTURES


@pytest.mark.slow
def test_wandb_gets_recipe_pictures_and_final_metrics_offline(train, tmp_path):
    (options,) = re.findall("`(--trainer.logger WandbLogger.*?)`", (ROOT / "README.md").read_text())
    train(*options.split())
    (record,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    content = record.read_bytes()
    for text in ("recipe/optimizer", *METRICS):
        assert text.encode() in content
    drawn = {path.name.rsplit("_", 2)[0] for path in record.parent.rglob("*.png")}
    assert drawn >= PICTURES
