"""The command line in separate processes that start quickly, form a world of any size, and may be killed.

Also the recipes that are interrupted, and what their runs end with.
"""

import multiprocessing
import os
import re
import shutil
import socket
import sys
import time
from collections.abc import Callable
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path

import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

# Each process is a copy of a server that has done the imports.
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["lit_threeseven.run.cli", "processes"])
TIME_LIMIT = 240

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
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--monitor-interval", "0.1"]


@contextmanager
def browser():
    """Headless Chromium, as Playwright's `Browser`."""
    from playwright.sync_api import sync_playwright

    program = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    assert program, "this test needs Chromium, which is not installed"
    # without WebGL, TensorBoard draws its lines as SVG, which a test can read
    options = ["--no-sandbox", "--disable-gpu", "--disable-webgl", "--disable-3d-apis", "--disable-quic"]
    options += ["--disable-background-networking", "--disable-sync"]
    with sync_playwright() as playwright:
        yield playwright.chromium.launch(executable_path=program, args=options)


def said(text: str) -> str:
    """What was printed, but for the lines that tell how far training has come."""
    return re.sub(r"^Training: .*\n", "", text, flags=re.MULTILINE)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def _main(args: list[str], folder: str, environment: dict[str, str], output: str, patience: float) -> None:
    os.setsid()
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.chdir(folder)
    os.environ.update(environment)

    import torch
    from lightning.pytorch.utilities.rank_zero import rank_zero_only

    from lit_threeseven import __main__, processes

    processes.PATIENCE, processes.GRACE = timedelta(seconds=patience), 1
    torch.set_num_threads(1)
    rank_zero_only.rank = int(
        environment.get("RANK") or environment.get("SLURM_PROCID") or 0
    )  # Lightning sets it on import, which happened in the server
    sys.stdout = open(1, "w", buffering=1, closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
    __main__.main(args)


class Job:
    """One run of the command line, as one process or as torchrun would start several."""

    def __init__(
        self,
        folder: Path,
        *args: str,
        processes: int = 1,
        environments: list[dict[str, str]] | None = None,
        patience: float = 60,
    ) -> None:
        folder.mkdir(exist_ok=True)
        self.folder = folder
        args = [*args, "--trainer.accelerator", "cpu"]
        if environments is None:
            world = {
                "WORLD_SIZE": str(processes),
                "LOCAL_WORLD_SIZE": str(processes),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(free_port()),
                "TORCHELASTIC_RUN_ID": "test",
            }
            environments = [
                world | {"RANK": str(r), "LOCAL_RANK": str(r), "GROUP_RANK": "0"} if processes > 1 else {}
                for r in range(processes)
            ]
        self._outputs = [folder / f"output-{rank}.txt" for rank in range(len(environments))]
        self.processes = [
            CONTEXT.Process(target=_main, args=(args, str(folder), environment, str(output), patience))
            for environment, output in zip(environments, self._outputs, strict=True)
        ]
        for process in self.processes:
            process.start()

    def wait(self) -> list[int]:
        """The exit codes; a negative one is the signal that ended the process."""
        deadline = time.monotonic() + TIME_LIMIT
        for process in self.processes:
            process.join(max(0.1, deadline - time.monotonic()))
        alive = [process for process in self.processes if process.is_alive()]
        for process in alive:
            process.kill()
            process.join()
        assert not alive, f"a process hangs: {self.outputs}"
        return [process.exitcode for process in self.processes]

    def run(self) -> "Job":
        """Wait for its success."""
        assert set(self.wait()) == {0}, self.outputs
        return self

    def kill(self, signum: int, rank: int = 0) -> None:
        """Send a signal to one of the processes."""
        with suppress(ProcessLookupError):  # it has ended already
            os.kill(self.processes[rank].pid, signum)

    def wait_until(self, condition: Callable[[], bool]) -> None:
        """Wait for something to happen while it runs."""
        deadline = time.monotonic() + TIME_LIMIT
        while not condition():
            assert all(process.is_alive() for process in self.processes), self.outputs
            assert time.monotonic() < deadline, self.outputs
            time.sleep(0.005)

    @property
    def outputs(self) -> list[str]:
        """What each process `said`, but for a line of gloo's that torch 2.9 prints."""
        texts = [said(output.read_text()) if output.exists() else "" for output in self._outputs]
        return [re.sub(r"^\[Gloo\] Rank .*\n", "", text, flags=re.MULTILINE) for text in texts]


def curves(run: Path) -> dict[str, list[tuple[int, float]]]:
    """The scalars of a TensorBoard run: name to (step, value) pairs in the order in which they were written."""
    events = EventAccumulator(str(run), size_guidance={"scalars": 0}).Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """The last weights of the only run in a folder."""
    (last,) = folder.glob("logs/*/checkpoints/last.ckpt")
    return torch.load(last, weights_only=True)["state_dict"]


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


def contents(folder: Path) -> dict[Path, bytes]:
    """Every file in a folder."""
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
