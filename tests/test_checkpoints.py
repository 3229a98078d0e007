"""What a run resumes from: where it is found, what is refused, and that the end is the same."""

import re
import shutil
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from processes import contents, curves, last

from lit_threeseven import LitThreeSeven, ThreeSevenDataModule, dataset


@pytest.mark.parametrize("step", [7, 12, 24])  # of 12 in an epoch
def test_your_own_trainer_resumes_within_an_epoch(trainer, tmp_path, step):
    def fit(folder: Path, ckpt_path: Path | None = None) -> LitThreeSeven:
        torch.manual_seed(0)
        model, save = LitThreeSeven(), ModelCheckpoint(folder, "{step}", every_n_train_steps=1, save_top_k=-1)
        run = trainer(max_epochs=3, callbacks=[save], enable_checkpointing=True)
        run.fit(model, ThreeSevenDataModule(batch_size=1000), ckpt_path=ckpt_path, weights_only=True)
        return model

    straight = fit(tmp_path / "straight")
    (checkpoint,) = (tmp_path / "straight").glob(f"step={step}.ckpt")
    resumed = fit(tmp_path / "resumed", checkpoint)
    assert resumed.trainer.global_step == 36
    assert torch.equal(resumed.W, straight.W)
    assert torch.equal(resumed.b, straight.b)


def test_another_recipe_is_refused_and_what_differs_is_named(cli):
    cli("fit", "--trainer.max_epochs", "3", "--data.batch_size", "5000")
    before = contents(cli.folder)
    other = ("--model.lr", "0.5", "--data.seed", "3", "--optimizer", "Adam")
    code, _, error = cli("fit", "--ckpt_path", "last", "--trainer.max_epochs", "6", *other)
    assert code == 1
    for part in ("model.lr 1.0 instead of 0.5", "data.seed 0 instead of 3", "data.batch_size 5000 instead of None"):
        assert part in error
    assert "optimizer GradientDescent instead of Adam, optimizer.lr 1.0 instead of 0.001" in error
    assert error.endswith("; give the same settings, or another checkpoint.")
    assert contents(cli.folder) == before

    same = ("fit", "--ckpt_path", "last", "--data.batch_size", "5000")
    code, _, error = cli(*same, "--optimizer=lit_threeseven.functional.GradientDescent", "--optimizer.lr=2")
    assert code == 1
    assert "optimizer.lr 1.0 instead of 2.0" in error
    assert cli(*same, "--trainer.max_epochs", "4")[0] == 0


def test_another_optimizer_of_your_own_trainer_is_refused(cli, trainer, monkeypatch):
    run = trainer(max_epochs=1)
    with monkeypatch.context() as patch:
        patch.setattr(LitThreeSeven, "configure_optimizers", lambda self: torch.optim.Adam(self.parameters()))
        run.fit(LitThreeSeven(), ThreeSevenDataModule())
    run.save_checkpoint("adam.ckpt")
    code, _, error = cli("fit", "--ckpt_path", "adam.ckpt")
    assert code == 1
    assert "adam.ckpt was made with optimizer Adam instead of GradientDescent; give" in error


def test_last_without_a_run_is_refused(cli):
    code, _, error = cli("fit", "--ckpt_path", "last")
    assert code == 1
    assert "No run in" in error


CYCLE = ("--optimizer", "SGD", "--lr_scheduler", "OneCycleLR", "--lr_scheduler.max_lr", "2")


@pytest.mark.parametrize(
    "recipe",
    [
        (*CYCLE, "--lr_scheduler.total_steps", "100", "--trainer.accumulate_grad_batches", "2"),
        ("--optimizer", "LBFGS", "--trainer.gradient_clip_val", "1"),
    ],
    ids=["OneCycleLR", "LBFGS"],
)
def test_the_same_recipe_resumes_and_an_incomplete_one_is_refused(cli, recipe):
    assert cli("fit", "--trainer.max_epochs", "3", *recipe)[0] == 0
    assert cli("fit", "--trainer.max_epochs", "5", *recipe, "--ckpt_path", "last")[0] == 0
    assert torch.load(last(cli.folder, "version_0"), weights_only=True)["epoch"] == 5
    code, _, error = cli("fit", "--trainer.max_epochs", "6", *recipe[:2], "--ckpt_path", "last")
    assert code == 1
    assert re.search(r"lr_scheduler OneCycleLR instead of None|gradient_clip_val 1(\.0)? instead of None", error)
    code, _, error = cli("fit", "--trainer.max_epochs", "6", "--ckpt_path", "last")
    assert code == 1
    assert "lr_scheduler OneCycleLR instead of None" in error or "optimizer LBFGS instead of GradientDescent" in error


def test_images_from_another_source_resume_if_they_are_the_same(cli, tmp_path, small_mnist):
    source = ("--data.source", "torchvision", "--data.data_dir")
    assert cli("fit", "--run", "r", "--trainer.max_epochs", "2")[0] == 0
    more = ("fit", "--run", "r", "--trainer.max_epochs", "3")
    code, _, error = cli(*more, *source, str(small_mnist))
    assert code == 1
    assert "checksum of the training images" in error
    code, _, error = cli(*more, *source, str(dataset.BUNDLED_ROOT))
    assert (code, error) == (0, "")


def test_a_run_in_a_folder_that_was_moved_keeps_its_best_checkpoint_there(cli):
    cli("fit", "--trainer.max_epochs", "40")
    run = cli.folder / "logs/version_0"
    before = torch.load(run / "checkpoints/best.ckpt", weights_only=True)
    (cli.folder / "elsewhere").mkdir()
    (cli.folder / "logs").rename(cli.folder / "elsewhere/logs")
    (cli.folder / "logs").symlink_to("elsewhere/logs")
    state = torch.load(last(cli.folder, "version_0"), weights_only=True)
    for name, part in state["callbacks"].items():
        if "val/loss" in name:
            part["best_model_score"] = torch.tensor(0.0)  # no later loss is lower
    torch.save(state, last(cli.folder, "version_0"))
    code, table, errors = cli("--trainer.max_epochs", "44", "--ckpt_path", str(last(cli.folder, "version_0")))
    assert (code, errors) == (0, "")
    assert table.count("elsewhere/logs/version_0/checkpoints/best.ckpt") == 1
    best = torch.load(run / "checkpoints/best.ckpt", weights_only=True)
    assert torch.equal(best["state_dict"]["W"], before["state_dict"]["W"])
    assert [path.name for path in (cli.folder / "logs").iterdir()] == ["version_0"]


def test_a_run_that_resumes_in_a_new_folder_finds_its_own_best_checkpoint(cli):
    cli("fit", "--trainer.max_epochs", "40")
    last(cli.folder, "version_0").rename(cli.folder / "kept.ckpt")
    shutil.rmtree(cli.folder / "logs")
    code, table, _ = cli("--trainer.max_epochs", "44", "--ckpt_path", "kept.ckpt")
    assert code == 0
    assert "logs/version_0/checkpoints/best.ckpt" in table
    assert (cli.folder / "logs/version_0/checkpoints/best.ckpt").is_file()


@pytest.mark.parametrize("steps", [10, 7])  # of 5 in an epoch
def test_a_run_resumed_with_a_step_limit_ends_where_an_uninterrupted_one_does(cli, steps):
    command = ("fit", "--data.batch_size", "1000", "--trainer.limit_train_batches", "5")
    assert cli(*command, "--run", "straight", "--trainer.max_steps", "20")[0] == 0
    for max_steps in (steps, 20):
        assert cli(*command, "--run", "resumed", "--trainer.max_steps", str(max_steps))[0] == 0
    straight, resumed = (torch.load(last(cli.folder, run), weights_only=True) for run in ("straight", "resumed"))
    assert resumed["global_step"] == straight["global_step"] == 20
    assert torch.equal(resumed["state_dict"]["W"], straight["state_dict"]["W"])


def test_a_finished_run_says_so_and_stays_as_it_is(cli):
    command = ("--run", "r", "--trainer.max_epochs", "3")
    (tested,) = re.findall("^Test loss.*\n", cli(*command)[1], re.MULTILINE)
    before = contents(cli.folder)
    code, table, errors = cli(*command)
    assert (code, errors) == (0, "")
    assert table.startswith(f"Finished        logs/r, 3 epochs\n{tested}")
    assert cli("fit", *command) == (0, "Finished        logs/r, 3 epochs\n", "")
    assert contents(cli.folder) == before


def test_a_run_that_fit_has_finished_is_tested_by_the_main_job(cli):
    command = ("--run", "r", "--trainer.max_epochs", "3")
    assert cli("fit", *command)[0] == 0
    assert "Test accuracy" in cli(*command)[1]


def test_a_finished_run_can_be_extended_and_keeps_its_name(cli):
    assert cli("fit", "--run", "r", "--trainer.max_epochs", "3")[0] == 0
    code, table, errors = cli("fit", "--run", "r", "--trainer.max_epochs", "1000", "--trainer.max_steps", "5")
    assert (code, errors) == (0, "")
    assert "2 epochs after the first 3\n" in table
    assert [path.name for path in (cli.folder / "logs").iterdir()] == ["r"]
    assert "2,038" in cli("test", "--run", "r")[1]
    assert "logs/r/checkpoints/last.predictions.csv" in cli("predict", "--run", "r", "--ckpt_path", "last")[1]


@pytest.mark.parametrize(
    "options",
    [
        ("--trainer.max_epochs", "2"),  # fewer than it has trained
        ("--trainer.max_epochs", "9", "--model.lr", "2"),
        ("--trainer.max_epochs", "60", "--trainer.callbacks", "EarlyStopping", "--trainer.callbacks.monitor", "nope"),
    ],
)
def test_a_resume_that_is_refused_or_fails_leaves_the_run_as_it_was(cli, options):
    assert cli("--run", "r", "--trainer.max_epochs", "3")[0] == 0
    before, shown = contents(cli.folder), curves(cli.folder / "logs/r")
    code, _, error = cli("--run", "r", *options)
    assert code == 1
    assert "\n" not in error
    assert contents(cli.folder) == before
    assert curves(cli.folder / "logs/r") == shown


def test_a_run_that_fails_before_its_first_checkpoint_is_not_the_newest_run(cli):
    assert cli("fit", "--trainer.max_epochs", "3")[0] == 0
    assert (
        cli("fit", "--model.init_std", "3e38", "--trainer.max_epochs", "9", "--trainer.log_every_n_steps", "1")[0] == 1
    )
    assert [path.name for path in (cli.folder / "logs").iterdir()] == ["version_0"]
    assert cli("fit", "--ckpt_path", "last", "--trainer.max_epochs", "4")[0] == 0
