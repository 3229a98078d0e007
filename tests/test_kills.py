"""Runs whose processes are killed: what they end with, and what they leave behind."""

import os
import random
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from processes import RECIPES, TORCHRUN, TRAIN, Job, assert_bit_identical, curves, free_port, last

from lit_threeseven import LitThreeSeven


@pytest.mark.parametrize(
    ("recipe", "kills"),
    [("shuffled batches", 1), *(pytest.param(recipe, 2, marks=pytest.mark.slow) for recipe in RECIPES)],
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


@pytest.mark.slow
def test_a_run_of_two_processes_resumes_on_three(uninterrupted, tmp_path):
    job = Job(tmp_path, *RECIPES["shuffled batches"], processes=2)
    job.wait_until(lambda: last(tmp_path).exists())
    job.kill(signal.SIGKILL, rank=1)
    assert 0 not in job.wait()
    assert "lost contact" in job.outputs[0]
    assert len(job.outputs[0].strip().splitlines()) == 1
    Job(tmp_path, *RECIPES["shuffled batches"], processes=3).run()
    assert_bit_identical(tmp_path, uninterrupted("shuffled batches"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rendezvous", "before"), [("--standalone", "the last checkpoint"), ("--master-port", "the first one")]
)
def test_a_worker_that_is_killed_under_torchrun_is_restarted_and_resumes(uninterrupted, tmp_path, rendezvous, before):
    rendezvous = [rendezvous] if rendezvous == "--standalone" else [rendezvous, str(free_port())]
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
    assert_bit_identical(tmp_path, uninterrupted("shuffled batches"))


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


def test_a_run_begun_anew_removes_what_a_killed_process_was_writing(cli):
    unfinished = last(cli.folder).with_name(".last.ckpt.unfinished")
    for max_epochs in ("2", "4"):  # begun anew, and resumed
        unfinished.parent.mkdir(parents=True, exist_ok=True)
        unfinished.write_bytes(b"half a checkpoint")
        assert cli("fit", "--run", "r", "--trainer.max_epochs", max_epochs)[0] == 0
        assert not unfinished.exists()
