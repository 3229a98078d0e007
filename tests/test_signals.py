"""Ctrl-C and SIGTERM: what a run saves and says, at any moment and on several processes."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from processes import RECIPES, TRAIN, Job, assert_bit_identical, last, said

from lit_threeseven import LitThreeSeven, ThreeSevenDataModule
from lit_threeseven.checkpoints import LastCheckpoint


@pytest.mark.parametrize(
    ("signum", "processes"),
    [
        (signal.SIGTERM, 1),
        (signal.SIGINT, 1),
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
    assert_bit_identical(tmp_path, uninterrupted("one batch"))


def test_a_stopped_run_without_a_name_says_which_file_to_resume(tmp_path):
    command = ("fit", "--trainer.max_epochs", "1000000", "--trainer.check_val_every_n_epoch", "5")
    job = Job(tmp_path, *command)
    job.wait_until(lambda: last(tmp_path, "version_0").exists())
    job.kill(signal.SIGTERM)
    assert job.wait() == [128 + signal.SIGTERM]
    found = re.search(r"To resume, run the same command with --ckpt_path (\S+)\n", job.outputs[0])
    assert Path(found[1]).samefile(last(tmp_path, "version_0"))


ENTRY_POINTS = {
    "console script": [str(Path(sys.executable).with_name("lit-threeseven"))],
    "scripts/train.py": [sys.executable, str(TRAIN)],
    "python -m": [sys.executable, "-m", "lit_threeseven"],
}


class Terminal:
    """The command as a terminal starts it: with what it starts itself in a session of its own, output in a file."""

    def __init__(self, folder: Path, *args: str, entry_point: str = "console script", **environment: str) -> None:
        self._output = folder / "output.txt"
        command = [*ENTRY_POINTS[entry_point], *args, "--trainer.accelerator", "cpu"]
        with self._output.open("w") as file:
            options = {"cwd": folder, "stdout": file, "stderr": file, "env": os.environ | environment}
            self.process = subprocess.Popen(command, start_new_session=True, **options)

    @property
    def output(self) -> str:
        """What its processes printed."""
        return said(self._output.read_text())

    def processes(self) -> list[int]:
        """Its processes that still run."""
        found = []
        for path in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                state, _, _, session = (path / "stat").read_text().rpartition(")")[2].split()[:4]
                if int(session) == self.process.pid and state != "Z":
                    found.append(int(path.name))
        return found

    def wait_until(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 120
        while not condition():
            assert self.process.poll() is None, self.output
            assert time.monotonic() < deadline, self.output
            time.sleep(0.005)

    def is_ready(self) -> bool:
        """Whether Python has started, and the command handles SIGTERM."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return bool(int(re.search(r"SigCgt:\s*(\w+)", status)[1], 16) & 1 << signal.SIGTERM - 1)

    def end(self) -> int:
        """Wait for its end, which must not take long nor leave a process behind; gives the exit code of a shell."""
        try:
            code = self.process.wait(30)
            time.sleep(0.2)
            assert self.processes() == [], self.output
        finally:
            for pid in self.processes():
                os.kill(pid, signal.SIGKILL)
        return code if code >= 0 else 128 - code


@pytest.mark.parametrize(
    ("signum", "entry_point", "seconds"),
    [
        (signal.SIGINT, "console script", 0),
        pytest.param(signal.SIGINT, "scripts/train.py", 1, marks=pytest.mark.slow),
        pytest.param(signal.SIGTERM, "python -m", 5, marks=pytest.mark.slow),
    ],
)
def test_a_signal_during_start_up_ends_the_command_with_one_line(tmp_path, signum, entry_point, seconds):
    terminal = Terminal(tmp_path, "fit", "--trainer.max_epochs", "1000000", entry_point=entry_point)
    terminal.wait_until(terminal.is_ready)
    time.sleep(seconds)
    os.kill(terminal.process.pid, signum)
    assert terminal.end() == 128 + signum
    name = {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM"}[signum]
    assert re.fullmatch(rf"lit-threeseven: Stopped by {name}(\.| after .*)\n", terminal.output)
    assert "after" in terminal.output or not (tmp_path / "logs").exists()


def test_a_local_rank_that_was_left_over_does_not_hide_the_line(tmp_path):
    terminal = Terminal(tmp_path, "fit", LOCAL_RANK="1")
    terminal.wait_until(terminal.is_ready)
    os.kill(terminal.process.pid, signal.SIGINT)
    assert terminal.end() == 128 + signal.SIGINT
    assert terminal.output == "lit-threeseven: Stopped by Ctrl-C.\n"


TWO = ("fit", "--trainer.devices", "2", "--trainer.max_epochs", "1000000")


@pytest.mark.slow
@pytest.mark.parametrize("seconds", [1, 6])
def test_ctrl_c_at_two_processes_during_start_up_ends_both_with_one_line(tmp_path, seconds):
    terminal = Terminal(tmp_path, *TWO)
    terminal.wait_until(lambda: len(terminal.processes()) == 2)
    time.sleep(seconds)
    os.killpg(terminal.process.pid, signal.SIGINT)
    assert terminal.end() == 128 + signal.SIGINT
    assert re.fullmatch(r"lit-threeseven: Stopped by Ctrl-C(\.| after .*)\n", terminal.output)
    assert "after" in terminal.output or not (tmp_path / "logs").exists()


@pytest.mark.slow
@pytest.mark.parametrize("to", ["the first process", "both"])
def test_a_second_signal_ends_two_processes_at_once(tmp_path, to):
    # the first one would be followed after 500 epochs
    rarely = ("--trainer.check_val_every_n_epoch", "500", "--trainer.log_every_n_steps", "500")
    terminal = Terminal(tmp_path, *TWO, *rarely)
    terminal.wait_until(last(tmp_path, "version_0").exists)
    kill = os.kill if to == "the first process" else os.killpg
    for _ in range(2):
        time.sleep(0.3)
        kill(terminal.process.pid, signal.SIGTERM)
    assert terminal.end() == 128 + signal.SIGTERM
    assert terminal.output == "lit-threeseven: Stopped by SIGTERM.\n"
    assert torch.load(last(tmp_path, "version_0"), weights_only=True)["epoch"] % 500 == 499


@pytest.mark.slow
def test_a_process_that_has_a_signal_is_silent_when_the_others_stop_first(tmp_path):
    rarely = ("--trainer.check_val_every_n_epoch", "500", "--trainer.log_every_n_steps", "500")
    job = Job(tmp_path, "fit", "--run", "r", "--trainer.max_epochs", "1000000", *rarely, processes=2)
    job.wait_until(last(tmp_path).exists)
    job.kill(signal.SIGTERM, rank=1)
    time.sleep(0.1)
    job.kill(signal.SIGKILL, rank=0)
    assert job.wait() == [-signal.SIGKILL, 0]
    assert job.outputs == ["", ""]


@pytest.mark.parametrize(("log_every_n_steps", "expected"), [(4, [4, 8, 10, 14, 18, 20, 24]), (0, range(1, 26))])
def test_processes_ask_for_a_signal_once_in_log_every_n_steps_steps_and_at_a_save(
    trainer, monkeypatch, tmp_path, log_every_n_steps, expected
):
    asked = []

    def fit(max_epochs: int, ckpt_path: Path | None = None) -> None:
        save = LastCheckpoint(every_n_epochs=10, dirpath=tmp_path)
        run = trainer(
            max_epochs=max_epochs, log_every_n_steps=log_every_n_steps, callbacks=[save], enable_checkpointing=True
        )
        monkeypatch.setattr(type(run), "world_size", 2)

        def ask(decision: bool, all: bool) -> bool:
            asked.append(run.global_step)
            return decision

        monkeypatch.setattr(run.strategy, "reduce_boolean_decision", ask)
        run.fit(LitThreeSeven(), ThreeSevenDataModule(), ckpt_path=ckpt_path, weights_only=True)

    fit(12)
    assert asked == [step for step in expected if step <= 12]
    asked.clear()
    fit(25, tmp_path / "last.ckpt")
    assert asked == [step for step in expected if step > 10]
