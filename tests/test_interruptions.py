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
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from processes import Job, curves, free_port

from lit_threeseven import LitThreeSeven, ThreeSevenDataModule, dataset
from lit_threeseven.run import LastCheckpoint, options

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
    [("shuffled batches", 1), *(pytest.param(recipe, 15, marks=pytest.mark.slow) for recipe in RECIPES)],
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
@pytest.mark.parametrize("processes", [1, 2, 3])
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


ENTRY_POINTS = {
    "console script": [str(Path(sys.executable).with_name("lit-threeseven"))],
    "scripts/train.py": [sys.executable, str(TRAIN)],
    "python -m": [sys.executable, "-m", "lit_threeseven"],
}


class Terminal:
    """The command as a terminal starts it: with what it starts itself in a session of its own, output in a file."""

    def __init__(self, folder: Path, *args: str, entry_point: str = "console script") -> None:
        self._output = folder / "output.txt"
        command = [*ENTRY_POINTS[entry_point], *args, "--trainer.accelerator", "cpu"]
        with self._output.open("w") as file:
            self.process = subprocess.Popen(command, cwd=folder, stdout=file, stderr=file, start_new_session=True)

    @property
    def output(self) -> str:
        """What its processes printed."""
        return self._output.read_text()

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
        pytest.param(signal.SIGTERM, "python -m", 2, marks=pytest.mark.slow),
        *(pytest.param(signal.SIGINT, "console script", s, marks=pytest.mark.slow) for s in (0.5, 1.5, 3, 5, 7)),
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


TWO = ("fit", "--trainer.devices", "2", "--trainer.max_epochs", "1000000")


@pytest.mark.slow
@pytest.mark.parametrize("seconds", [0, 1, 3, 6])
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


def test_a_run_begun_anew_removes_what_a_killed_process_was_writing(cli):
    unfinished = last(cli.folder).with_name(".last.ckpt.unfinished")
    for max_epochs in ("2", "4"):  # begun anew, and resumed
        unfinished.parent.mkdir(parents=True, exist_ok=True)
        unfinished.write_bytes(b"half a checkpoint")
        assert cli("fit", "--run", "r", "--trainer.max_epochs", max_epochs)[0] == 0
        assert not unfinished.exists()


def test_a_file_whose_name_the_system_gives_in_bytes_is_named_in_text():
    error = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/full/größe".encode())
    assert options.explain(error, True, "", "").startswith("/full/größe can't be used (No space left on device)")


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


@pytest.mark.slow
@pytest.mark.parametrize("log_every_n_steps", [1, 10**6])
def test_a_disk_that_fills_under_torchrun_ends_with_one_sentence_of_all_processes(tmp_path, log_every_n_steps):
    torchrun = " ".join([*TORCHRUN, "--standalone", "--redirects", "3", "--log-dir", "printed"])
    in_a_small_folder(
        tmp_path,
        f"""
        {torchrun} -- {TRAIN} fit --trainer.accelerator cpu --trainer.default_root_dir small \
            --trainer.max_epochs 100000 --trainer.check_val_every_n_epoch 100 \
            --trainer.log_every_n_steps {log_every_n_steps} & job=$!
        until test -e small/logs/version_0/checkpoints/last.ckpt || ! kill -0 $job; do sleep 0.02; done
        dd if=/dev/zero of=small/filler bs=1k 2>/dev/null
        wait $job
        """,
    )
    printed = "".join(path.read_text() for path in (tmp_path / "printed").rglob("*.log"))
    assert re.fullmatch(r"lit-threeseven: error: .*No space left on device.* intact.*\n", printed), printed


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


@pytest.mark.parametrize("rank", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_node_that_waits_for_another_says_where_and_how_long(tmp_path, rank):
    port = free_port()
    job = Job(tmp_path, "fit", "--trainer.num_nodes", "2", environments=[node(rank, 2, port)], patience=77)
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
