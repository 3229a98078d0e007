"""Runs that are killed, stopped, starved of disk, or given the wrong checkpoint: real processes, signals and files."""

import errno
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from processes import Job, curves, free_port

from lit_threeseven import LitThreeSeven, ThreeSevenDataModule, dataset

TRAIN = Path(__file__).parents[1] / "scripts" / "train.py"
RUN = ("fit", "--run", "r")  # the same command begins it and resumes it
RECIPES = {
    "one batch": (*RUN, "--trainer.max_epochs", "300", "--trainer.log_every_n_steps", "3"),
    "shuffled batches": (*RUN, "--trainer.max_epochs", "30", "--data.batch_size", "901"),
    "momentum, no hold-out": (
        *(*RUN, "--trainer.max_epochs", "300", "--data.val_fraction", "0"),
        *("--optimizer", "SGD", "--optimizer.lr", "0.5", "--optimizer.momentum", "0.9"),
    ),
}


def last(folder: Path, run: str = "r") -> Path:
    return folder / "logs" / run / "checkpoints" / "last.ckpt"


def state(folder: Path) -> dict[str, object]:
    """What a run ends with: weights, optimizer, progress."""
    checkpoint = torch.load(last(folder), weights_only=True)
    return {name: checkpoint[name] for name in ("state_dict", "optimizer_states", "epoch", "global_step")}


def assert_bit_identical(folder: Path, other: Path) -> None:
    found, expected = state(folder), state(other)
    torch.testing.assert_close(found["state_dict"], expected["state_dict"], rtol=0, atol=0)
    for name in ("epoch", "global_step"):
        assert found[name] == expected[name]
    assert repr(found["optimizer_states"]) == repr(expected["optimizer_states"])
    assert curves(folder / "logs/r") == curves(other / "logs/r")
    for best in other.glob("logs/r/checkpoints/best.ckpt"):
        assert torch.equal(
            torch.load(best, weights_only=True)["state_dict"]["W"],
            torch.load(folder / best.relative_to(other), weights_only=True)["state_dict"]["W"],
        )


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """The folder of each recipe's uninterrupted run, made when it is first asked for."""
    folders = {}

    def run(recipe: str, processes: int = 1) -> Path:
        key = recipe, processes
        if key not in folders:
            folders[key] = tmp_path_factory.mktemp("uninterrupted")
            Job(folders[key], *RECIPES[recipe], processes=processes).run()
        return folders[key]

    return run


@pytest.mark.parametrize(
    ("recipe", "kills"),
    [("shuffled batches", 3), *(pytest.param(recipe, 15, marks=pytest.mark.slow) for recipe in RECIPES)],
)
def test_a_run_killed_at_random_moments_ends_where_an_uninterrupted_one_does(uninterrupted, tmp_path, recipe, kills):
    expected = uninterrupted(recipe)
    start = time.monotonic()
    Job(tmp_path / "timed", *RECIPES[recipe]).run()
    duration = time.monotonic() - start
    moments = random.Random(kills)
    folder = tmp_path / "killed"
    killed = 0
    while killed < kills:
        job = Job(folder, *RECIPES[recipe])
        time.sleep(moments.uniform(0, duration))
        job.kill(signal.SIGKILL)
        code = job.wait()
        if code == [0]:  # it finished before the kill: start again
            assert_bit_identical(folder, expected)
            shutil.rmtree(folder)
        else:
            assert code == [-signal.SIGKILL], job.outputs
            killed += 1
    Job(folder, *RECIPES[recipe]).run()
    assert_bit_identical(folder, expected)
    assert not list(folder.glob("logs/*/checkpoints/.*")), "an unfinished file was left"


@pytest.mark.parametrize("processes", [1, *(pytest.param(n, marks=pytest.mark.slow) for n in (2, 3))])
def test_a_run_of_two_processes_resumes_on_any_number(uninterrupted, tmp_path, processes):
    job = Job(tmp_path, *RECIPES["shuffled batches"], processes=2)
    job.wait_until(lambda: last(tmp_path).exists())
    job.kill(signal.SIGKILL, rank=1)
    assert 0 not in job.wait()
    assert "lost contact" in job.outputs[0]
    assert len(job.outputs[0].strip().splitlines()) == 1
    Job(tmp_path, *RECIPES["shuffled batches"], processes=processes).run()
    expected = uninterrupted("shuffled batches", processes=2)
    if processes == 2:
        assert_bit_identical(tmp_path, expected)
    for name, weight in state(expected)["state_dict"].items():
        assert (state(tmp_path)["state_dict"][name] - weight).abs().max() <= 1e-5 * weight.abs().max()


@pytest.mark.parametrize(
    ("signum", "processes"),
    [
        (signal.SIGTERM, 1),
        (signal.SIGINT, 1),
        pytest.param(signal.SIGTERM, 2, marks=pytest.mark.slow),
        pytest.param(signal.SIGINT, 2, marks=pytest.mark.slow),
    ],
)
def test_a_signal_saves_first_and_says_how_to_resume(uninterrupted, tmp_path, signum, processes):
    recipe = (*RECIPES["one batch"], "--trainer.check_val_every_n_epoch", "15")
    job = Job(tmp_path, *recipe, processes=processes)
    job.wait_until(lambda: last(tmp_path).exists())
    job.kill(signum, rank=processes - 1)  # one of them is enough
    codes = job.wait()
    assert codes[0] == 128 + (signum if processes == 1 else signal.SIGTERM)
    found = re.fullmatch(
        r"lit-threeseven: Stopped by (SIGTERM|Ctrl-C|a signal) after (\d+) epochs; all progress is saved. "
        r"To resume, run the same command\n",
        job.outputs[0],
    )
    assert found, job.outputs
    assert torch.load(last(tmp_path), weights_only=True)["epoch"] + 1 == int(found[2])
    Job(tmp_path, *recipe, processes=processes).run()
    assert_bit_identical(tmp_path, uninterrupted("one batch", processes))


def test_a_stopped_run_without_a_name_says_which_file_to_resume(tmp_path):
    command = ("fit", "--trainer.max_epochs", "1000000", "--trainer.check_val_every_n_epoch", "5")
    job = Job(tmp_path, *command)
    job.wait_until(lambda: last(tmp_path, "version_0").exists())
    job.kill(signal.SIGTERM)
    assert job.wait() == [128 + signal.SIGTERM]
    found = re.search(r"To resume, run the same command with --ckpt_path (\S+)\n", job.outputs[0])
    assert Path(found[1]).samefile(last(tmp_path, "version_0"))


TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--monitor-interval", "0.1"]


@pytest.mark.slow
@pytest.mark.parametrize("rendezvous", [["--master-port", "PORT"], ["--standalone"]], ids=["static", "standalone"])
@pytest.mark.parametrize("before", ["the last checkpoint", "the first one"])
def test_a_worker_that_is_killed_under_torchrun_is_restarted_and_resumes(uninterrupted, tmp_path, rendezvous, before):
    rendezvous = [option.replace("PORT", str(free_port())) for option in rendezvous]
    command = [*TORCHRUN, "--max-restarts", "2", *rendezvous, "--", str(TRAIN), *RECIPES["shuffled batches"]]
    errors = tmp_path / "errors.txt"
    waited_for = last(tmp_path) if before == "the last checkpoint" else tmp_path / "logs/r"
    with errors.open("w") as file:
        agent = subprocess.Popen([*command, "--trainer.accelerator", "cpu"], cwd=tmp_path, stdout=file, stderr=file)
    try:
        deadline = time.monotonic() + 120
        while not waited_for.exists():
            assert time.monotonic() < deadline, errors.read_text()
            time.sleep(0.01)
        workers = Path(f"/proc/{agent.pid}/task/{agent.pid}/children").read_text().split()
        os.kill(int(workers[-1]), signal.SIGKILL)
        assert agent.wait(120) == 0, errors.read_text()
    finally:
        agent.terminate()
    assert_bit_identical(tmp_path, uninterrupted("shuffled batches", processes=2))


def in_a_small_folder(tmp_path: Path, script: str) -> subprocess.CompletedProcess:
    """Run a shell script where the folder `small` is a 1 MB disk, and copy what is left on it to `kept`."""
    (tmp_path / "small").mkdir()
    script = textwrap.dedent(f"""
        mount -t tmpfs -o size=1m none small
        {script}
        code=$?
        mount -o remount,size=4m,rw small
        cp -r small kept
        exit $code
    """)
    user = [] if os.geteuid() == 0 else ["--map-root-user"]
    return subprocess.run(
        ["unshare", "--mount", *user, "sh", "-c", script],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.mark.slow
@pytest.mark.parametrize("log_every_n_steps", [1, 10**6])  # what fails first: the curves, or the checkpoint
def test_a_disk_that_fills_in_mid_run_ends_it_with_a_sentence(tmp_path, log_every_n_steps):
    command = (
        f"{sys.executable} {TRAIN} fit --trainer.default_root_dir small --trainer.max_epochs 100000 "
        f"--trainer.check_val_every_n_epoch 100 --trainer.log_every_n_steps {log_every_n_steps}"
    )
    result = in_a_small_folder(
        tmp_path,
        f"""
        {command} & job=$!
        until test -e small/logs/version_0/checkpoints/last.ckpt || ! kill -0 $job; do sleep 0.02; done
        dd if=/dev/zero of=small/filler bs=1k 2>/dev/null
        wait $job
        """,
    )
    assert result.returncode == 1
    assert re.fullmatch(r"lit-threeseven: error: .*No space left on device.* intact.*\n", result.stderr), result.stderr
    assert result.stdout == ""
    for name in ("last", "best"):
        checkpoint = tmp_path / f"kept/logs/version_0/checkpoints/{name}.ckpt"
        assert torch.load(checkpoint, weights_only=True)["global_step"] >= 100
    folder = tmp_path / "kept"
    steps = torch.load(last(folder, "version_0"), weights_only=True)["global_step"]
    Job(folder, "fit", "--trainer.max_epochs", str(steps + 5), "--ckpt_path", "last").run()
    assert torch.load(last(folder, "version_0"), weights_only=True)["global_step"] == steps + 5


@pytest.mark.parametrize("step", [7, 12, 19, 24])  # of 12 in an epoch
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


def test_a_checkpoint_that_can_t_be_written_leaves_the_one_before(cli, monkeypatch):
    cli("fit", "--run", "r", "--trainer.max_epochs", "3")
    before = contents(cli.folder)

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    code, _, error = cli("fit", "--run", "r", "--trainer.max_epochs", "6")
    assert code == 1
    assert re.search(r"\.ckpt can't be used \(No space left on device\).*Everything saved before is intact", error)
    assert contents(cli.folder) == before


def contents(folder: Path) -> dict[Path, bytes]:
    """Every file in a folder."""
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_another_recipe_is_refused_and_what_differs_is_named(cli):
    cli("fit", "--trainer.max_epochs", "3", "--data.batch_size", "5000")
    before = contents(cli.folder)
    other = ("--model.lr", "0.5", "--data.seed", "3", "--optimizer", "Adam", "--data.pixels", "dense")
    code, _, error = cli("fit", "--ckpt_path", "last", "--trainer.max_epochs", "6", *other)
    assert code == 1
    for part in ("model.lr 1.0 instead of 0.5", "data.seed 0 instead of 3", "data.batch_size 5000 instead of None"):
        assert part in error
    assert "optimizer SGD instead of Adam, optimizer.lr 1.0 instead of 0.5" in error
    assert error.endswith("; give the same settings, or another checkpoint.")
    assert contents(cli.folder) == before

    same = ("fit", "--ckpt_path", "last", "--data.batch_size", "5000")
    code, _, error = cli(*same, "--optimizer=SGD", "--optimizer.lr=2")
    assert code == 1
    assert "optimizer.lr 1.0 instead of 2.0" in error
    assert cli(*same, "--trainer.max_epochs", "4")[0] == 0


def test_another_optimizer_of_your_own_trainer_is_refused(cli, trainer):
    class ByAdam(LitThreeSeven):
        def configure_optimizers(self):
            return torch.optim.Adam(self.parameters())

    run = trainer(max_epochs=1)
    run.fit(ByAdam(), ThreeSevenDataModule())
    run.save_checkpoint("adam.ckpt")
    code, _, error = cli("fit", "--ckpt_path", "adam.ckpt")
    assert code == 1
    assert "adam.ckpt was made with optimizer Adam instead of SGD; give" in error


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
    assert "lr_scheduler OneCycleLR instead of None" in error or "optimizer LBFGS instead of SGD" in error


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
    assert "Test accuracy" in cli(*command)[1]
    before = contents(cli.folder)
    assert cli(*command) == (0, "Finished        logs/r, 3 epochs\n", "")
    assert contents(cli.folder) == before


def test_a_finished_run_can_be_extended_and_keeps_its_name(cli):
    assert cli("fit", "--run", "r", "--trainer.max_epochs", "3")[0] == 0
    code, table, errors = cli("fit", "--run", "r", "--trainer.max_epochs", "1000", "--trainer.max_steps", "5")
    assert (code, errors) == (0, "")
    assert "5 epochs" in table
    assert [path.name for path in (cli.folder / "logs").iterdir()] == ["r"]
    assert "2,038" in cli("test", "--run", "r")[1]
    assert "logs/r/checkpoints/last.predictions.csv" in cli("predict", "--run", "r", "--ckpt_path", "last")[1]


def test_a_run_killed_during_its_test_is_tested_when_it_resumes(cli, monkeypatch):
    command = ("--run", "r", "--trainer.max_epochs", "3")

    class Killed(BaseException):
        pass

    def killed(*args):
        raise Killed

    with monkeypatch.context() as during:
        during.setattr(LitThreeSeven, "test_step", killed)
        with pytest.raises(Killed):
            cli(*command)
    assert "Test accuracy" in cli(*command)[1]
    assert list(curves(cli.folder / "logs/r")["test/loss"])


def test_two_processes_can_t_train_the_same_run_and_a_killed_one_does_not_block_it(cli, tmp_path):
    command = ("fit", "--run", "r", "--trainer.max_epochs", "1000000", "--trainer.check_val_every_n_epoch", "5")
    job = Job(cli.folder, *command)
    job.wait_until(lambda: last(cli.folder).exists())
    code, _, error = cli(*command)
    assert code == 1
    assert re.search(r"Another process is training in \S+/logs/r; wait for it, or choose another --run", error)
    assert job.processes[0].is_alive()
    job.kill(signal.SIGKILL)
    job.wait()
    steps = torch.load(last(cli.folder), weights_only=True)["global_step"]
    assert cli("fit", "--run", "r", "--trainer.max_epochs", str(steps + 1))[0] == 0


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


def test_a_requeued_slurm_job_resumes_its_run(uninterrupted, tmp_path):
    world = {"SLURM_JOB_ID": "12", "SLURM_JOB_NAME": "train", "SLURM_NTASKS": "1", "SLURM_NTASKS_PER_NODE": "1"}
    world |= {"SLURM_STEP_NUM_TASKS": "1", "SLURM_STEP_NUM_NODES": "1"}
    world |= {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0"}
    job = Job(tmp_path, *RECIPES["shuffled batches"], environments=[world])
    job.wait_until(lambda: last(tmp_path).exists())
    job.kill(signal.SIGKILL)
    assert job.wait() == [-signal.SIGKILL]
    Job(tmp_path, *RECIPES["shuffled batches"], environments=[world | {"SLURM_RESTART_COUNT": "1"}]).run()
    assert_bit_identical(tmp_path, uninterrupted("shuffled batches"))


def node(rank: int, world_size: int, port: int) -> dict[str, str]:
    """The environment variables of a node's only process, as Lightning expects them."""
    return {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "NODE_RANK": str(rank),
        "LOCAL_RANK": "0",
        "WORLD_SIZE": str(world_size),
    }


@pytest.mark.slow
def test_nodes_that_disagree_about_the_number_of_nodes_end_with_a_sentence(tmp_path):
    port = free_port()
    first = Job(tmp_path / "first", "fit", "--trainer.num_nodes", "2", environments=[node(0, 2, port)], patience=15)
    second = Job(tmp_path / "second", "fit", "--trainer.num_nodes", "3", environments=[node(1, 3, port)], patience=15)
    for job in (first, second):
        assert job.wait() == [1]
        assert "start all nodes with the same number of nodes and devices" in job.outputs[0].splitlines()[-1]
        assert "Traceback" not in job.outputs[0]


def test_more_processes_than_torchrun_has_started_are_refused(tmp_path):
    job = Job(tmp_path, "fit", "--trainer.devices", "3", processes=2)
    assert job.wait() == [1, 1]
    assert re.search(r"`devices=3`.* does not match the world size .2.", job.outputs[0])
    assert job.outputs[1] == job.outputs[0]  # printed a little later, unless the process is ended first


def test_a_stale_local_rank_does_not_hide_the_sentence(tmp_path):
    job = Job(tmp_path, "fit", "--model.lr", "0", environments=[{"LOCAL_RANK": "1"}])
    assert job.wait() == [1]
    assert "lr must be a finite float32 above 0" in job.outputs[0]


def test_a_port_in_use_ends_with_a_sentence(tmp_path):
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        environment = node(0, 2, port)
        job = Job(tmp_path, "fit", "--trainer.num_nodes", "2", environments=[environment])
        assert job.wait() == [1]
    assert "a free MASTER_PORT" in job.outputs[0]
    assert re.search("in use", job.outputs[0])
    assert len(job.outputs[0].strip().splitlines()) == 1
