"""The processes of a run: what started them, how they connect, and how long they wait for one another."""

import os
import signal
import sys
import threading
import time
import timeit
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from contextlib import contextmanager
from datetime import timedelta
from typing import Any
from uuid import uuid4

import torch
from jsonargparse import Namespace
from lightning import LightningModule
from lightning.pytorch.strategies import DDPStrategy, StrategyRegistry
from torch import distributed
from typing_extensions import override

from lit_threeseven import LitThreeSeven, ThreeSevenDataModule
from lit_threeseven.signals import hold, local_rank

PATIENCE = timedelta(minutes=2)  # how long a process waits for another one
GRACE = 5  # seconds in which the first process of a machine says what is wrong, before the others end


def take_devices(trainer: Namespace) -> None:
    """Tell the Trainer how many processes torchrun or srun has started."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        world_size, local = int(os.environ["WORLD_SIZE"]), int(os.environ["LOCAL_WORLD_SIZE"])
    elif "SLURM_STEP_NUM_TASKS" in os.environ and os.environ.get("SLURM_JOB_NAME") not in ("bash", "interactive"):
        world_size = int(os.environ["SLURM_STEP_NUM_TASKS"])
        local = world_size // int(os.environ["SLURM_STEP_NUM_NODES"])
        os.environ.setdefault("SLURM_NTASKS_PER_NODE", str(local))  # Lightning requires it
    else:
        return
    if trainer.devices == "auto":
        trainer.devices, trainer.num_nodes = local, world_size // local


def join_torchrun() -> None:
    """Join torchrun's other processes through a store for this attempt only; Lightning then uses their group.

    torch itself uses one store for all attempts of a restarted program. It still holds the addresses of dead processes,
    and each node counts attempts on its own. So the first process names the attempt, and the others ask for that name.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True" or distributed.is_initialized():
        return
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    store = distributed.TCPStore(  # type: ignore[attr-defined]
        os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), timeout=PATIENCE
    )
    attempt = uuid4().hex
    if rank == 0:
        deadline = time.monotonic() + PATIENCE.total_seconds()
        for other in range(1, world_size):
            while not store.check([f"{attempt}_{other}"]):  # until it answers, its question may be a dead process's
                if time.monotonic() > deadline:
                    raise distributed.DistStoreError(f"process {other} of {world_size} did not start")
                store.set(store.get(f"question_{other}").decode(), attempt)
                time.sleep(0.05)
    else:
        question = uuid4().hex
        store.set(f"question_{rank}", question)
        attempt = store.get(question).decode()
        store.set(f"{attempt}_{rank}", "answered")
    own = distributed.PrefixStore(attempt, store)  # type: ignore[attr-defined]
    distributed.init_process_group(store=own, rank=rank, world_size=world_size, timeout=PATIENCE)


def meet(join: Callable[[], None], grace: float | None) -> None:
    """Call `join`, which waits for other processes, so that a signal can end it; after `grace` seconds say where."""
    met: Future[None] = Future()

    def run() -> None:
        try:
            join()
            met.set_result(None)
        except BaseException as error:
            met.set_exception(error)

    threading.Thread(target=run, daemon=True).start()  # Python handles signals in the main thread, between C calls
    if wait([met], grace).not_done and local_rank() == 0:
        place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        what = f"Waiting at {place} for the other processes of this run, {PATIENCE.total_seconds():g} s at most."
        print(f"lit-threeseven: {what}", file=sys.stderr)
    met.result()


class PatientDDP(DDPStrategy):
    """DDP that says where it waits for other processes, and can be stopped while it does, see `meet`."""

    @override
    def setup_distributed(self) -> None:
        hold(False)
        launcher: Any = self.launcher
        started = len(launcher.procs)  # by this process, just now
        meet(super().setup_distributed, None if started and self.num_nodes == 1 else GRACE * (1 + started))


@contextmanager
def patient_ddp() -> Iterator[None]:
    """In this context, Trainers use `PatientDDP` instead of DDP; it waits for at most `PATIENCE`."""
    unused = {"ddp_find_unused_parameters_true": True, "ddp_find_unused_parameters_false": False}
    kinds: dict[str, dict[str, Any]] = {"ddp": {}} | {
        name: {"find_unused_parameters": value} for name, value in unused.items()
    }
    usual = {name: StrategyRegistry[name] for name in kinds}
    for name, options in kinds.items():
        StrategyRegistry.register(name, PatientDDP, override=True, timeout=PATIENCE, **options)
    try:
        yield
    finally:
        StrategyRegistry.update(usual)


def choose_threads(model: LightningModule, data: ThreeSevenDataModule) -> None:
    """Train full batches of the single layer with one thread if more are hardly faster, as on busy cores.

    The bits are the same with any number of threads. If the user has set `OMP_NUM_THREADS`, it is kept.
    """
    threads = torch.get_num_threads()
    if threads == 1 or data.batch_size or type(model) is not LitThreeSeven or "OMP_NUM_THREADS" in os.environ:
        return
    x = data.train.tensors[0]
    seconds = {}
    with torch.no_grad():
        for count in (threads, 1):
            torch.set_num_threads(count)
            seconds[count] = min(timeit.repeat(lambda: model(x), number=1, repeat=4))
    torch.set_num_threads(threads if seconds[threads] < 0.8 * seconds[1] else 1)


def hold_signals(trainer: Any) -> None:
    """Hold signals back while a Trainer starts processes, which would print tracebacks until they handle signals."""
    if isinstance(trainer.strategy, PatientDDP) and trainer.strategy.launcher:
        hold(True)


def kill_started(trainer: Any) -> None:
    """Kill the processes that a Trainer has started: they may be waiting for this one."""
    if trainer and trainer.strategy.launcher:
        trainer.strategy.launcher.kill(signal.SIGKILL)
        trainer.strategy.launcher.procs.clear()  # otherwise Lightning kills this one too
