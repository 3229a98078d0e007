"""The processes of a run: how they meet, how long they wait, and what they say if they don't."""

import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import lightning as L
import pytest
from processes import CONTEXT, TIME_LIMIT, Job, free_port

from lit_threeseven import LitThreeSeven, ThreeSevenDataModule, resumable
from lit_threeseven.errors import UserError


def node(rank: int, world_size: int, port: int) -> dict[str, str]:
    """The environment variables of a node's only process, as Lightning expects them."""
    return {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "NODE_RANK": str(rank),
        "LOCAL_RANK": "0",
        "WORLD_SIZE": str(world_size),
    }


def _fit_with_version(version: str, folder: Path, environment: dict[str, str]) -> None:
    os.environ.update(environment)
    os.chdir(folder)
    resumable.__version__ = version
    trainer = L.Trainer(accelerator="cpu", devices=1, num_nodes=2, strategy="ddp", max_epochs=1)
    try:
        trainer.fit(LitThreeSeven(), ThreeSevenDataModule())
    except UserError as error:
        Path(environment["NODE_RANK"]).write_text(str(error))


@pytest.mark.slow
def test_two_processes_with_different_versions_are_refused_by_name(tmp_path):
    port = free_port()
    processes = [
        CONTEXT.Process(target=_fit_with_version, args=(version, tmp_path, node(rank, 2, port)))
        for rank, version in enumerate(("1.2.3", "1.2.4"))
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(TIME_LIMIT)
        process.kill()
    expected = "Process 0 runs lit_threeseven 1.2.3, and process 1 1.2.4; install one version on all machines."
    assert [(tmp_path / rank).read_text() for rank in "01"] == [expected] * 2
    assert not list(tmp_path.glob("lightning_logs/*/checkpoints"))


@pytest.mark.slow
def test_nodes_that_disagree_about_the_number_of_nodes_end_with_a_sentence(tmp_path):
    port = free_port()
    first = Job(tmp_path / "first", "fit", "--trainer.num_nodes", "2", environments=[node(0, 2, port)], patience=3)
    second = Job(tmp_path / "second", "fit", "--trainer.num_nodes", "3", environments=[node(1, 3, port)], patience=3)
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


@pytest.mark.parametrize(
    ("rank", "strategy"), [(0, "ddp_find_unused_parameters_true"), pytest.param(1, "auto", marks=pytest.mark.slow)]
)
def test_a_node_that_waits_for_another_says_where_and_how_long(tmp_path, rank, strategy):
    port = free_port()
    options = ("fit", "--trainer.num_nodes", "2", "--trainer.strategy", strategy)
    job = Job(tmp_path, *options, environments=[node(rank, 2, port)], patience=77)
    job.wait_until(lambda: job.outputs[0] != "")
    job.kill(signal.SIGKILL)
    job.wait()
    expected = f"lit-threeseven: Waiting at 127.0.0.1:{port} for the other processes of this run, 77 s at most.\n"
    assert job.outputs == [expected]


def test_a_process_of_torchrun_that_waits_for_another_says_so(tmp_path):
    world = node(0, 2, free_port()) | {"RANK": "0", "LOCAL_WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "test"}
    job = Job(tmp_path, "fit", environments=[world])
    job.wait_until(lambda: job.outputs[0] != "")
    job.kill(signal.SIGKILL)
    job.wait()
    assert "for the other processes of this run" in job.outputs[0]


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


@pytest.mark.slow
def test_a_program_leaves_the_other_processes_before_python_ends():
    """Otherwise one in some hundred ends with "terminate called without an active exception", and exit code -6."""
    program = """
import atexit, sys
from torch import distributed
atexit.register(lambda: print(distributed.is_initialized()))  # what is registered first is called last
from lit_threeseven import LitThreeSeven
distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{sys.argv[1]}", rank=0, world_size=1)
"""
    command = [sys.executable, "-c", program, str(free_port())]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert output.splitlines()[-1] == "False"  # torch 2.9 prints a line of gloo's before it
