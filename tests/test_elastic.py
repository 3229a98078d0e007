"""A torchrun world that loses a node, and gets another one, while it trains."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import lightning as L
import pytest
import torch
from processes import Job, free_port, weights
from torch import distributed

RECIPE = ("--trainer.max_epochs", "100", "--trainer.check_val_every_n_epoch", "1")
TRAIN = Path(__file__).parents[1] / "scripts" / "train.py"
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "1:3", "--nproc-per-node", "1"]
TORCHRUN += ["--max-restarts", "5", "--rdzv-backend", "c10d", "--rdzv-id", "first"]
CONF = "keep_alive_interval=1,last_call_timeout=3"  # seconds; a node is lost after three intervals


class Slowly(L.Callback):
    """Leave time for a node to be lost, and more for another one to come."""

    def on_train_epoch_end(self, trainer, pl_module):
        time.sleep(0.2 if trainer.world_size == 1 else 0.05)


class Node:
    """A torchrun and its worker; torchrun ranks nodes by address."""

    def __init__(self, folder: Path, address: str, port: int, is_host: bool = False) -> None:
        self.folder = folder
        self._output = folder / f"{address}.txt"
        options = ["--local-addr", address, "--rdzv-endpoint", f"127.0.0.1:{port}"]
        options += ["--rdzv-conf", f"{CONF},is_host={int(is_host)}"]  # on one machine any node could be the host
        command = [*TORCHRUN, *options, "--", str(TRAIN), "fit", "--run", "first", "--trainer.accelerator", "cpu"]
        environment = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", "PYTHONPATH": str(Path(__file__).parent)}
        with self._output.open("w") as file:
            self.agent = subprocess.Popen(
                [*command, *RECIPE, "--trainer.callbacks", "test_elastic.Slowly"],
                cwd=folder,
                env=os.environ | environment,
                stdout=file,
                stderr=file,
            )

    @property
    def output(self) -> str:
        return self._output.read_text()

    @property
    def workers(self) -> list[Path]:
        """The folders of its workers in /proc."""
        children = Path(f"/proc/{self.agent.pid}/task/{self.agent.pid}/children")
        return [Path("/proc", pid) for pid in children.read_text().split()]

    @property
    def world_size(self) -> int:
        """The size of the world that its worker is in; 0 while there is no worker."""
        with suppress(OSError):  # the worker has just ended
            for worker in self.workers:
                for variable in (worker / "environ").read_bytes().split(b"\0"):
                    if variable.startswith(b"WORLD_SIZE="):
                        return int(variable[11:])
        return 0

    @property
    def epoch(self) -> int:
        """The last one that was saved."""
        last = self.folder / "logs/first/checkpoints/last.ckpt"
        return torch.load(last, weights_only=True)["epoch"] if last.exists() else -1

    def wait_until(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 120
        while not condition():
            assert self.agent.poll() is None, self.output
            assert time.monotonic() < deadline, self.output
            time.sleep(0.05)

    def wait_until_it_trains(self, world_size: int) -> None:
        """Wait until a world of this size has begun, and has saved an epoch."""
        self.wait_until(lambda: self.world_size == world_size)
        before = self.epoch
        self.wait_until(lambda: self.epoch > before)

    def kill(self) -> None:
        """Kill torchrun, and the worker, which is in a process group of its own."""
        if self.agent.poll() is None:
            for pid in (self.agent.pid, *(int(worker.name) for worker in self.workers)):
                with suppress(ProcessLookupError):  # it has just ended
                    os.kill(pid, signal.SIGKILL)
            self.agent.wait()


@pytest.mark.slow
def test_a_run_continues_when_a_node_is_lost_and_when_one_is_added(tmp_path):
    port = free_port()
    first, lost = nodes = [Node(tmp_path, "127.0.0.3", port, is_host=True), Node(tmp_path, "127.0.0.2", port)]
    try:
        first.wait_until_it_trains(world_size=2)
        lost.kill()
        first.wait_until_it_trains(world_size=1)
        added = Node(tmp_path, "127.0.0.1", port)
        nodes.append(added)
        first.wait_until_it_trains(world_size=2)
        assert [node.agent.wait(120) for node in (first, added)] == [0, 0], first.output + added.output
    finally:
        for node in nodes:
            node.kill()
    assert "Traceback" not in first.output + added.output
    (more, before) = re.search(
        r"(\d+) epochs after the first (\d+)\n", added.output
    ).groups()  # rank 0, as the lost one
    assert int(more) + int(before) == 100
    Job(tmp_path / "one", "fit", *RECIPE).run()
    for name, expected in weights(tmp_path / "one").items():
        assert torch.equal(weights(tmp_path)[name], expected)


@pytest.mark.slow
def test_processes_of_nodes_that_count_restarts_differently_meet(tmp_path):
    store = distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    world = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1", "LOCAL_RANK": "0", "TORCHELASTIC_RUN_ID": "test"}
    world |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    environments = [
        world | {"RANK": str(rank), "GROUP_RANK": str(rank), "TORCHELASTIC_RESTART_COUNT": count}
        for rank, count in enumerate("10")
    ]
    Job(tmp_path, "fit", "--trainer.max_epochs", "2", environments=environments, patience=10).run()
