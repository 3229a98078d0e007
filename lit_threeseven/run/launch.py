"""The processes of a run: what started them, how they meet, and how long they wait for one another."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

from jsonargparse import Namespace
from lightning.pytorch.strategies import StrategyRegistry
from torch import distributed

PATIENCE = timedelta(minutes=2)  # how long a process waits for another one
GRACE = 5  # seconds that other processes leave the first one on their machine to say what is wrong


def take_devices(trainer: Namespace) -> None:
    """Tell the Trainer how many processes torchrun or srun has started."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        world_size, local = int(os.environ["WORLD_SIZE"]), int(os.environ["LOCAL_WORLD_SIZE"])
    elif "SLURM_STEP_NUM_TASKS" in os.environ and os.environ.get("SLURM_JOB_NAME") not in ("bash", "interactive"):
        world_size = int(os.environ["SLURM_STEP_NUM_TASKS"])
        local = world_size // int(os.environ["SLURM_STEP_NUM_NODES"])
        os.environ.setdefault("SLURM_NTASKS_PER_NODE", str(local))  # Lightning insists on it
    else:
        return
    if trainer.devices == "auto":
        trainer.devices, trainer.num_nodes = local, world_size // local


def local_rank() -> int:
    """Number of this process on its machine; 0 if it is alone."""
    return int(os.environ.get("LOCAL_RANK") or os.environ.get("SLURM_LOCALID") or 0)


def join_torchrun() -> None:
    """Meet torchrun's other processes in a store of this attempt's own; Lightning then adopts the group.

    torch itself uses one store for all attempts of a restarted program, with the addresses of dead processes in it.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" and not distributed.is_initialized():
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        attempt = f"attempt_{os.environ['TORCHELASTIC_RESTART_COUNT']}"
        store = distributed.PrefixStore(attempt, distributed.TCPStore(address, port, timeout=PATIENCE))
        rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        distributed.init_process_group(store=store, rank=rank, world_size=world_size, timeout=PATIENCE)


@contextmanager
def time_limit() -> Iterator[None]:
    """In this context a Trainer's DDP, named or chosen by Lightning, waits `PATIENCE` instead of half an hour."""
    options = StrategyRegistry["ddp"]["init_params"]
    options["timeout"] = PATIENCE
    try:
        yield
    finally:
        del options["timeout"]
