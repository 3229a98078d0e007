"""The processes of a run: what has started them, how they meet, and what is to be done when they lose one another."""

import os
import re
import shlex
import signal
import socket
import sys
import threading
from datetime import timedelta
from pathlib import Path

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from torch import distributed

from lit_threeseven.errors import Stopped

# File in the folder of a run that says which job of torchrun or SLURM it belongs to.
MARKER = ".job"

# What the libraries say of a process that is not there (any more).
LOST = re.compile("gloo|nccl", re.IGNORECASE)

# How long a process waits for another one.
PATIENCE = timedelta(minutes=2)


def processes_started() -> tuple[str, int, int] | None:
    """What has started the processes of this run, how many, and how many on this machine; None if Lightning is to."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return "torchrun", int(os.environ["WORLD_SIZE"]), int(os.environ["LOCAL_WORLD_SIZE"])
    if "SLURM_STEP_NUM_TASKS" in os.environ and os.environ.get("SLURM_JOB_NAME") not in ("bash", "interactive"):
        tasks = int(os.environ["SLURM_STEP_NUM_TASKS"])
        return "srun", tasks, tasks // int(os.environ["SLURM_STEP_NUM_NODES"])
    return None


def local_rank() -> int:
    """Number of this process on its machine; 0 where there is one."""
    return int(os.environ.get("LOCAL_RANK") or os.environ.get("SLURM_LOCALID") or 0)


def job_name(args: list[str]) -> str:
    """A name of a job of torchrun or SLURM that is the same in all of its attempts; empty without one.

    Args:
        args: The command line, which tells the steps of a SLURM job apart.
    """
    if error_file := os.environ.get("TORCHELASTIC_ERROR_FILE"):  # {log folder of the job}/attempt_{n}/{rank}/error.json
        return str(Path(error_file).parents[2])
    if (started := processes_started()) and started[0] == "srun":
        return f"SLURM {os.environ['SLURM_JOB_ID']} {shlex.join(args)}"
    return ""


def begun_run(logs: Path, job: str) -> Path | None:
    """The folder of the run that a job has begun before; None if there is none yet.

    Args:
        logs: Folder that holds the runs.
        job: Its name.
    """
    return next((path.parent for path in logs.glob(f"*/{MARKER}") if path.read_text() == job), None)


def restarted_run(logs: Path, job: str) -> Path | None:
    """The run to go on with where torchrun has restarted this program, or SLURM has put its job in the queue again.

    torchrun's processes agree on it, and meet at a new port, since its own store may still hold the addresses of the
    processes before them.

    Args:
        logs: Folder that holds the runs.
        job: Name of the job.

    Returns:
        The folder of the run; None in a first attempt, or if there is none yet.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return begun_run(logs, job) if int(os.environ.get("SLURM_RESTART_COUNT", 0)) else None
    restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))
    if not restarted or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return None
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = distributed.TCPStore(address, port, is_master=False, timeout=PATIENCE)
    key = f"lit_threeseven/attempt_{restarted}"
    if rank_zero_only.rank == 0:
        begun = begun_run(logs, job)
        with socket.socket() as listener:
            listener.bind(("", 0))
            store.set(key, f"{listener.getsockname()[1]} {begun or ''}")
    new_port, run = store.get(key).decode().split(" ", 1)
    os.environ |= {"MASTER_PORT": new_port, "TORCHELASTIC_USE_AGENT_STORE": "False"}
    return Path(run) if run else None


class EndTogether(Callback):
    """Begin and end with the other processes of a run.

    This process gives up if they have not all come after a while, which gloo alone does not always do. When it fails it
    ends those that Lightning has started: they may be waiting for it.
    """

    def __init__(self) -> None:
        self._watch = threading.Timer(1.5 * PATIENCE.total_seconds(), self._give_up)
        self._watch.daemon = True
        self._watch.start()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """They are all there."""
        self._watch.cancel()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """End them."""
        if trainer.strategy.launcher and not isinstance(exception, Stopped):
            trainer.strategy.launcher.kill(signal.SIGTERM)

    @staticmethod
    def _give_up() -> None:
        if not local_rank():
            print(f"lit-threeseven: error: {lost('no answer')}", file=sys.stderr, flush=True)
        os._exit(1)  # the main thread is deep inside torch


def lost(reason: str) -> str:
    """What to say when other processes are not there."""
    return (
        f"The processes of this run lost one another, or did not all come ({reason}). If none of them says why, "
        "start all nodes with the same number of nodes and devices, and with the MASTER_ADDR and a free "
        "MASTER_PORT of the first."
    )
