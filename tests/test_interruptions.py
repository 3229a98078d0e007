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

from lit_threeseven import LitThreeSeven, ThreeSevenDataModule

TRAIN = Path(__file__).parents[1] / "scripts" / "train.py"
RECIPES = {
    "one batch": ("fit", "--trainer.max_epochs", "300", "--trainer.log_every_n_steps", "3"),
    "shuffled batches": ("fit", "--trainer.max_epochs", "30", "--data.batch_size", "901"),
    "momentum, no hold-out": (
        *("fit", "--trainer.max_epochs", "300", "--data.val_fraction", "0"),
        *("--optimizer", "SGD", "--optimizer.lr", "0.5", "--optimizer.momentum", "0.9"),
    ),
}


def run_folder(folder: Path) -> Path:
    (run,) = folder.glob("logs/version_*")
    return run


def last(folder: Path) -> Path:
    return folder / "logs" / "version_0" / "checkpoints" / "last.ckpt"


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
    assert curves(run_folder(folder)) == curves(run_folder(other))
    for best in other.glob("logs/version_0/checkpoints/best.ckpt"):
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


def go_on(folder: Path, recipe: str, processes: int = 1) -> Job:
    """The same command, from the last checkpoint if there is one."""
    resume = ("--ckpt_path", "last") if last(folder).exists() else ()
    if not resume:
        shutil.rmtree(folder / "logs", ignore_errors=True)
    return Job(folder, *RECIPES[recipe], *resume, processes=processes)


@pytest.mark.parametrize(
    ("recipe", "kills"),
    [("shuffled batches", 3), *(pytest.param(recipe, 20, marks=pytest.mark.slow) for recipe in RECIPES)],
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
        job = go_on(folder, recipe)
        time.sleep(moments.uniform(0, duration))
        job.kill(signal.SIGKILL)
        code = job.wait()
        if code == [0]:  # it was faster, and all of it has to be killed again
            assert_bit_identical(folder, expected)
            shutil.rmtree(folder)
        else:
            assert code == [-signal.SIGKILL], job.outputs
            killed += 1
    go_on(folder, recipe).run()
    assert_bit_identical(folder, expected)
    assert not list(folder.glob("logs/*/checkpoints/.*")), "an unfinished file was left"


@pytest.mark.parametrize("processes", [1, 2, pytest.param(3, marks=pytest.mark.slow)])
def test_a_run_on_two_processes_goes_on_on_any_number(uninterrupted, tmp_path, processes):
    job = Job(tmp_path, *RECIPES["shuffled batches"], processes=2)
    job.wait_until(lambda: last(tmp_path).exists())
    job.kill(signal.SIGKILL, rank=1)
    assert 0 not in job.wait()
    assert "lost one another" in job.outputs[0]
    assert len(job.outputs[0].strip().splitlines()) == 1
    go_on(tmp_path, "shuffled batches", processes).run()
    expected = uninterrupted("shuffled batches", processes=2)
    if processes == 2:
        assert_bit_identical(tmp_path, expected)
    for name, weight in state(expected)["state_dict"].items():
        assert (state(tmp_path)["state_dict"][name] - weight).abs().max() <= 1e-5 * weight.abs().max()


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_first_and_says_how_to_go_on(uninterrupted, tmp_path, signum, processes):
    recipe = (*RECIPES["one batch"], "--trainer.check_val_every_n_epoch", "15")
    job = Job(tmp_path, *recipe, processes=processes)
    job.wait_until(lambda: last(tmp_path).exists())
    job.kill(signum, rank=processes - 1)  # one of them is enough
    codes = job.wait()
    assert codes[0] == 128 + (signum if processes == 1 else signal.SIGTERM)
    found = re.fullmatch(
        r"lit-threeseven: Stopped by (SIGTERM|Ctrl-C|a signal) after (\d+) epochs, which are saved. "
        r"To go on from there, give the same command and --ckpt_path (\S+)\n",
        job.outputs[0],
    )
    assert found, job.outputs
    assert torch.load(found[3], weights_only=True)["epoch"] + 1 == int(found[2])
    Job(tmp_path, *recipe, "--ckpt_path", found[3], processes=processes).run()
    assert_bit_identical(tmp_path, uninterrupted("one batch", processes))


@pytest.mark.parametrize(
    "rendezvous", [["--master-port", "PORT"], pytest.param(["--standalone"], marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("before", ["the last checkpoint", pytest.param("the first one", marks=pytest.mark.slow)])
def test_a_worker_that_is_killed_under_torchrun_is_restarted_and_goes_on(uninterrupted, tmp_path, rendezvous, before):
    Job(tmp_path, "fit", "--trainer.max_epochs", "2").run()  # an older run's last checkpoint is not to be taken up
    shutil.move(tmp_path / "logs/version_0", tmp_path / "logs/version_older")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--max-restarts", "2"]
    command += [option.replace("PORT", str(free_port())) for option in rendezvous]
    command += ["--monitor-interval", "0.1", str(TRAIN), *RECIPES["shuffled batches"], "--trainer.accelerator", "cpu"]
    # under SLURM, torchrun's restarts are torchrun's, also in a job that was put back in the queue
    slurm = {"SLURM_RESTART_COUNT": "1", "SLURM_JOB_ID": "1", "SLURM_JOB_NAME": "train"}
    errors = tmp_path / "errors.txt"
    waited_for = last(tmp_path) if before == "the last checkpoint" else tmp_path / "logs/version_0/.job"
    with errors.open("w") as file:
        agent = subprocess.Popen(command, cwd=tmp_path, stdout=file, stderr=file, env=os.environ | slurm)
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
    shutil.rmtree(tmp_path / "logs/version_older")
    assert_bit_identical(tmp_path, uninterrupted("shuffled batches", processes=2))


def in_a_small_folder(tmp_path: Path, script: str) -> subprocess.CompletedProcess:
    """Run a shell script in a mount namespace where `small` is a disk of 1 MB, and keep what is then on it."""
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


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("dd if=/dev/zero of=small/filler bs=1k 2>/dev/null", "No space left on device"),
        ("mount -o remount,ro small", "Read-only file system"),
    ],
)
@pytest.mark.parametrize(
    "log_every_n_steps", [1, pytest.param(10**6, marks=pytest.mark.slow)]
)  # what fails first: the curves, or the checkpoint
def test_a_disk_that_fills_in_mid_run_ends_it_with_a_sentence(tmp_path, fault, reason, log_every_n_steps):
    command = (
        f"{sys.executable} {TRAIN} fit --trainer.default_root_dir small --trainer.max_epochs 100000 "
        f"--trainer.check_val_every_n_epoch 100 --trainer.log_every_n_steps {log_every_n_steps}"
    )
    result = in_a_small_folder(
        tmp_path,
        f"""
        {command} & job=$!
        until test -e small/logs/version_0/checkpoints/last.ckpt || ! kill -0 $job; do sleep 0.02; done
        {fault}
        wait $job
        """,
    )
    assert result.returncode == 1
    assert re.fullmatch(rf"lit-threeseven: error: .*{reason}.* whole.*\n", result.stderr), result.stderr
    assert result.stdout == ""
    for name in ("last", "best"):
        checkpoint = tmp_path / f"kept/logs/version_0/checkpoints/{name}.ckpt"
        assert torch.load(checkpoint, weights_only=True)["global_step"] >= 100
    folder = tmp_path / "kept"
    steps = torch.load(last(folder), weights_only=True)["global_step"]
    Job(folder, "fit", "--trainer.max_epochs", str(steps + 5), "--ckpt_path", "last").run()
    assert torch.load(last(folder), weights_only=True)["global_step"] == steps + 5


@pytest.mark.parametrize("step", [7, 12, 19, 24])  # of 12 in an epoch
def test_a_trainer_of_one_s_own_goes_on_within_an_epoch(trainer, tmp_path, step):
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
    cli("fit", "--trainer.max_epochs", "3")
    before = last(cli.folder).read_bytes()

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    code, _, error = cli("fit", "--trainer.max_epochs", "6", "--ckpt_path", "last")
    assert code == 1
    assert re.search(r"\.ckpt could not be written \(No space left on device\); what was saved before is whole", error)
    assert last(cli.folder).read_bytes() == before
    assert {path.name for path in last(cli.folder).parent.iterdir()} == {"best.ckpt", "last.ckpt"}


def test_going_on_with_another_recipe_is_refused_and_what_differs_is_named(cli):
    cli("fit", "--trainer.max_epochs", "3", "--data.batch_size", "5000")
    before = sorted(cli.folder.rglob("*"))
    other = ("--model.lr", "0.5", "--data.seed", "3", "--optimizer", "Adam", "--data.pixels", "dense")
    code, _, error = cli("fit", "--ckpt_path", "last", "--trainer.max_epochs", "6", *other)
    assert code == 1
    assert "model.lr 1.0 instead of 0.5, data.seed 0 instead of 3, data.batch_size 5000 instead of None" in error
    assert "optimizer SGD instead of Adam, optimizer.lr 1.0 instead of 0.001" in error
    assert error.endswith("; give the same settings, or another checkpoint.")
    assert sorted(cli.folder.rglob("*")) == before

    code, _, error = cli(
        "fit", "--ckpt_path", "last", "--data.batch_size", "5000", "--optimizer=SGD", "--optimizer.lr=2"
    )
    assert code == 1
    assert "optimizer.lr 1.0 instead of 2.0" in error
    code, _, _ = cli("fit", "--ckpt_path", "last", "--data.batch_size", "5000", "--trainer.max_epochs", "4")
    assert code == 0


def test_another_optimizer_of_a_trainer_of_one_s_own_is_refused(cli, trainer):
    class ByAdam(LitThreeSeven):
        def configure_optimizers(self):
            return torch.optim.Adam(self.parameters())

    run = trainer(max_epochs=1)
    run.fit(ByAdam(), ThreeSevenDataModule())
    run.save_checkpoint("adam.ckpt")
    code, _, error = cli("fit", "--ckpt_path", "adam.ckpt")
    assert code == 1
    assert "adam.ckpt was made with optimizer Adam instead of SGD; give" in error


def test_an_argument_out_of_range_is_told_where_a_run_goes_on_too(cli):
    cli("fit", "--trainer.max_epochs", "3")
    code, _, error = cli("fit", "--ckpt_path", "last", "--model.lr=-1", "--trainer.precision", "32-true")
    assert code == 1
    assert "was made with model.lr 1.0 instead of -1.0, optimizer.lr 1.0 instead of -1.0; give" in error


def test_last_where_there_is_none_is_refused(cli):
    code, _, error = cli("fit", "--ckpt_path", "last")
    assert code == 1
    assert "There is no run in" in error


CYCLE = ("--optimizer", "SGD", "--lr_scheduler", "OneCycleLR", "--lr_scheduler.max_lr", "2")


@pytest.mark.parametrize(
    "recipe",
    [
        (*CYCLE, "--lr_scheduler.total_steps", "100", "--trainer.accumulate_grad_batches", "2"),
        ("--optimizer", "LBFGS", "--trainer.gradient_clip_val", "1"),
    ],
    ids=["OneCycleLR", "LBFGS"],
)
def test_the_same_recipe_goes_on_and_leaving_a_part_of_it_out_is_refused(cli, recipe):
    assert cli("fit", "--trainer.max_epochs", "3", *recipe)[0] == 0
    assert cli("fit", "--trainer.max_epochs", "5", *recipe, "--ckpt_path", "last")[0] == 0
    assert torch.load(last(cli.folder), weights_only=True)["epoch"] == 5
    code, _, error = cli("fit", "--trainer.max_epochs", "6", *recipe[:2], "--ckpt_path", "last")
    assert code == 1
    assert "lr_scheduler OneCycleLR instead of None" in error or "gradient_clip_val 1 instead of None" in error
    code, _, error = cli("fit", "--trainer.max_epochs", "6", "--ckpt_path", "last")
    assert code == 1
    assert "optimizer" in error


def test_a_run_in_a_folder_that_was_moved_keeps_its_best_checkpoint_there(cli):
    cli("fit", "--trainer.max_epochs", "40")
    before = torch.load(cli.folder / "logs/version_0/checkpoints/best.ckpt", weights_only=True)
    (cli.folder / "elsewhere").mkdir()
    (cli.folder / "logs").rename(cli.folder / "elsewhere/logs")
    (cli.folder / "logs").symlink_to("elsewhere/logs")
    best = cli.folder / "logs/version_0/checkpoints/best.ckpt"
    state = torch.load(last(cli.folder), weights_only=True)
    for name, part in state["callbacks"].items():
        if "val/loss" in name:
            part["best_model_score"] = torch.tensor(0.0)  # which no later one is below
    torch.save(state, last(cli.folder))
    code, table, errors = cli("--trainer.max_epochs", "44", "--ckpt_path", str(last(cli.folder)))
    assert (code, errors) == (0, "")
    assert table.count("elsewhere/logs/version_0/checkpoints/best.ckpt") == 1
    assert torch.equal(torch.load(best, weights_only=True)["state_dict"]["W"], before["state_dict"]["W"])
    assert [path.name for path in (cli.folder / "logs").iterdir()] == ["version_0"]


def test_a_run_that_goes_on_in_a_new_folder_finds_a_best_checkpoint_of_its_own(cli):
    cli("fit", "--trainer.max_epochs", "40")
    last(cli.folder).rename(cli.folder / "kept.ckpt")
    shutil.rmtree(cli.folder / "logs")
    code, table, _ = cli("--trainer.max_epochs", "44", "--ckpt_path", "kept.ckpt")
    assert code == 0
    assert "logs/version_0/checkpoints/best.ckpt" in table
    assert (cli.folder / "logs/version_0/checkpoints/best.ckpt").is_file()


@pytest.mark.parametrize("saved", [True, False])
def test_a_requeued_slurm_job_goes_on_with_its_own_run(uninterrupted, tmp_path, saved):
    recipe = RECIPES["shuffled batches"]
    world = {"SLURM_JOB_ID": "12", "SLURM_JOB_NAME": "train", "SLURM_NTASKS": "1", "SLURM_NTASKS_PER_NODE": "1"}
    world |= {"SLURM_STEP_NUM_TASKS": "1", "SLURM_STEP_NUM_NODES": "1"}
    world |= {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0"}
    job = Job(tmp_path, *recipe, environments=[world])
    job.wait_until(lambda: last(tmp_path).exists() if saved else (tmp_path / "logs/version_0/.job").exists())
    job.kill(signal.SIGKILL)
    assert job.wait() == [-signal.SIGKILL]
    Job(tmp_path, *recipe, environments=[world | {"SLURM_JOB_ID": "13"}]).run()  # another one's, begun later
    shutil.rmtree(tmp_path / "logs/version_1")
    again = world | {"SLURM_RESTART_COUNT": "1"}
    Job(tmp_path, *recipe, environments=[again]).run()
    assert_bit_identical(tmp_path, uninterrupted("shuffled batches"))
    best = str(tmp_path / "logs/version_0/checkpoints/best.ckpt")
    assert (
        "best.predictions.csv" in Job(tmp_path, "predict", "--ckpt_path", best, environments=[again]).run().outputs[0]
    )
    Job(tmp_path, *recipe, "--seed_everything", "2", environments=[again]).run()  # another step of the same job
    assert not torch.equal(
        *(
            torch.load(last(tmp_path).parents[2] / v / "checkpoints/last.ckpt")["state_dict"]["W"]
            for v in ("version_0", "version_1")
        )
    )


def node(rank: int, world_size: int, port: int) -> dict[str, str]:
    """The environment in which Lightning expects a node's only process."""
    return {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "NODE_RANK": str(rank),
        "LOCAL_RANK": "0",
        "WORLD_SIZE": str(world_size),
    }


@pytest.mark.slow
def test_nodes_that_disagree_about_their_number_end_with_a_sentence(tmp_path):
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
    assert "torchrun has started 2 processes, 2 on this machine, and --trainer.devices 3" in job.outputs[0]
    assert job.outputs[1] == ""


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
