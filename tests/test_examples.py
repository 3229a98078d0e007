"""The examples: each command of their page is run as it stands, and keeps its promise."""

import base64
import collections
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
import uuid
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import lightning as L
import psutil
import pytest
import torch
from processes import free_port

from lit_threeseven import LitThreeSeven, ThreeSevenDataModule

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "scripts" / "examples"
PUBLISHED = re.search(r"^Digest +(\w{64})$", (ROOT / "README.md").read_text(), re.MULTILINE)[1]


def command(file: str) -> str:
    """The command of an example, as its page says."""
    (line,) = re.findall(rf"`([^`]* scripts/examples/{file}[^`]*)`", (EXAMPLES / "README.md").read_text())
    return line


class Program:
    """A command that runs in a folder with the repository's scripts in it."""

    def __init__(self, line: str, folder: Path) -> None:
        self.folder, self.mark = folder, uuid.uuid4().hex
        (folder / "scripts").symlink_to(ROOT / "scripts")
        home = folder / "home"  # Ray writes into it
        home.mkdir()
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        environment = os.environ | {"PATH": path, "HOME": str(home), "OMP_NUM_THREADS": "1", "MARK": self.mark}
        with (folder / "home" / "output").open("wb") as file:
            options = {"cwd": folder, "env": environment, "stdout": file, "stderr": file, "start_new_session": True}
            self.process = subprocess.Popen(shlex.split(line), **options)

    @property
    def output(self) -> str:
        return (self.folder / "home" / "output").read_text()

    def processes(self) -> list[psutil.Process]:
        """All processes that it has started, also those that have lost their parent."""
        found = []
        for process in psutil.process_iter():
            try:
                if process.environ().get("MARK") == self.mark:
                    found.append(process)
            except psutil.Error:  # it has ended, or is a zombie
                pass
        return found

    def wait_until(self, condition) -> None:
        deadline = time.monotonic() + 120
        while not condition():
            assert self.process.poll() is None, self.output
            assert time.monotonic() < deadline, self.output
            time.sleep(0.1)

    def finish(self) -> str:
        """What it printed, once it has ended well and none of its processes is left."""
        assert self.process.wait(240) == 0, self.output
        deadline = time.monotonic() + 10
        while self.processes() and time.monotonic() < deadline:
            time.sleep(0.1)
        assert self.processes() == []
        return self.output

    def files(self) -> set[str]:
        paths = (path.relative_to(self.folder) for path in self.folder.rglob("*") if path.is_file())
        return {str(path) for path in paths if path.parts[0] not in ("home", "scripts")}


@pytest.fixture
def program(tmp_path):
    started = []

    def start(line: str) -> Program:
        started.append(Program(line, tmp_path))
        return started[-1]

    yield start
    for each in started:
        for process in each.processes():
            process.kill()


@pytest.mark.slow
def test_ray_train_ends_at_the_published_digest_although_a_worker_is_killed(program):
    run = program(command("ray_train.py"))
    saved = set()  # the second checkpoint is only begun when Ray knows of the first
    run.wait_until(lambda: saved.update(run.folder.glob("logs/ray/threeseven/checkpoint_*")) or len(saved) > 2)
    worker = next(process for process in run.processes() if "RayTrainWorker" in " ".join(process.cmdline()))
    worker.send_signal(signal.SIGKILL)
    output = run.finish()
    assert int(re.search(r"^resumed after (\d+) epochs", output, re.MULTILINE)[1]) in range(100, 2000, 100)
    assert output.endswith(f"digest {PUBLISHED}\n")
    assert all(name.startswith("logs/ray/threeseven/") for name in run.files())


@pytest.mark.slow
def test_a_pruned_trial_of_optuna_leaves_no_thread_process_or_file(script, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))

    def traces() -> tuple[object, ...]:
        return threading.enumerate(), psutil.Process().children(recursive=True), [*tmp_path.rglob("*")]

    before = traces()
    code, output = script("examples/optuna_rates.py", *shlex.split(command("optuna_rates.py"))[2:])
    assert code == 0, output
    assert traces() == before
    rows = re.findall(r"^lr +(\S+) +(\w+) +(\d+) validations$", output, re.MULTILINE)
    assert len(rows) == 12
    assert {state for _, state, _ in rows} == {"pruned", "complete"}
    assert all((state == "complete") == (validations == "10") for _, state, validations in rows)
    lr, loss = map(float, re.search(r"^best lr (\S+), validation loss (\S+)$", output, re.MULTILINE).groups())
    alone = fitted(lr, 100)
    assert alone.trainer.callback_metrics["val/loss"].item() == pytest.approx(loss, abs=1e-4)


def fitted(lr: float, epochs: int) -> LitThreeSeven:
    """The network after a fit by a plain Trainer."""
    L.seed_everything(0)
    model = LitThreeSeven(lr=lr)
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    trainer = L.Trainer(accelerator="cpu", max_epochs=epochs, check_val_every_n_epoch=epochs, **quiet)
    trainer.fit(model, ThreeSevenDataModule())
    return model


@pytest.mark.slow
def test_fabric_ends_at_the_published_digest_on_two_processes(program):
    run = program(command("fabric.py"))
    output = run.finish()
    assert "MEMBER: 2/2" in output
    assert f"2,004 of 2,038 test images right\ndigest {PUBLISHED}\n" in output
    assert run.files() == set()


@pytest.mark.slow
def test_accelerate_sees_every_row_once_in_each_epoch_and_in_evaluation(program):
    run = program(command("accelerate_loop.py"))
    output = run.finish()
    assert int(re.search(r"^([\d,]+) of 2,038 test images right$", output, re.MULTILINE)[1].replace(",", "")) > 1980
    assert run.files() == {"logs/rows/0.csv", "logs/rows/1.csv"}
    shares = [(run.folder / name).read_text().splitlines()[1:] for name in sorted(run.files())]
    assert abs(len(shares[0]) - len(shares[1])) <= 4  # one row at the end of each pass
    expected = {f"{epoch},{row}" for epoch in range(2) for row in range(11157)} | {f"test,{i}" for i in range(2038)}
    assert collections.Counter(shares[0] + shares[1]) == collections.Counter(expected)


@pytest.mark.slow
def test_hydra_builds_what_the_command_line_says_in_its_own_folder(program):
    run = program(command("hydra/train.py"))
    assert run.finish().endswith(f"digest {fitted(0.5, 200).digest()}\n")
    files = run.files()
    assert all(name.startswith("logs/hydra/") for name in files)
    assert {f"logs/hydra/{name}" for name in ("best.ckpt", "train.log", ".hydra/config.yaml")} <= files
    assert any("/events.out.tfevents." in name for name in files)
    assert not any(name.endswith("metrics.csv") for name in files)
    assert "- model.lr=0.5\n" in (run.folder / "logs/hydra/.hydra/overrides.yaml").read_text()


def post(port: int, content: object) -> tuple[int, dict[str, object]]:
    data = content if isinstance(content, bytes) else json.dumps(content).encode()
    request = Request(f"http://127.0.0.1:{port}/predict", data, {"Content-Type": "application/json"})
    try:
        with urlopen(request, timeout=30) as answer:
            return answer.status, json.load(answer)
    except HTTPError as error:
        return error.code, json.load(error)


@pytest.mark.slow
def test_litserve_answers_as_the_network_does_and_a_bad_request_with_a_sentence(program, cli, tmp_path):
    code, _, error = cli("export", "pretrained", "--to", "torch-export", "--out", tmp_path / "LitThreeSeven.pt2")
    assert code == 0, error
    port = free_port()
    run = program(command("serve.py").replace("8000", str(port)))
    run.wait_until(lambda: "Application startup complete" in run.output)
    data = ThreeSevenDataModule()
    data.setup("test")
    images = data.test.tensors[0][:4] / 255
    with torch.no_grad():
        expected = LitThreeSeven.from_pretrained()(images).flatten().tolist()
    for image, probability in zip(images, expected, strict=True):
        code, answer = post(port, {"pixels": image.tolist()})
        assert (code, answer["digit"]) == (200, 3 if probability >= 0.5 else 7)
        assert answer["probability"] == pytest.approx(probability, abs=1e-6)
    picture = (ROOT / ".readme" / "three.png").read_bytes()
    code, answer = post(port, {"image": base64.b64encode(picture).decode()})
    assert (code, answer["digit"]) == (200, 3)
    for content in ({}, {"pixels": [[0, 1]]}, {"pixels": [[2] * 28] * 28}, {"pixels": "x"}, {"image": "x"}):
        code, answer = post(port, content)
        assert code == 400
        assert re.fullmatch(r"Send .*28×28 pixels.*\.", answer["detail"])
    for content in (b"{", [1]):
        code, answer = post(port, content)
        assert code == 422
        assert answer["detail"][0]["msg"]
    run.process.send_signal(signal.SIGINT)
    run.finish()


@pytest.mark.parametrize(
    ("file", "module", "sentence"),
    [
        ("ray_train.py", "ray", "This example needs Ray: pip install 'ray[train]'"),
        ("optuna_rates.py", "optuna", "This example needs Optuna: pip install 'optuna'"),
        ("accelerate_loop.py", "accelerate", "This example needs Accelerate: pip install 'accelerate'"),
        ("hydra/train.py", "hydra", "This example needs Hydra: pip install 'hydra-core'"),
        ("serve.py", "litserve", "This example needs LitServe: pip install 'litserve'"),
    ],
)
def test_an_example_whose_package_is_missing_says_what_to_install(script, monkeypatch, file, module, sentence):
    monkeypatch.setitem(sys.modules, module, None)
    assert script(f"examples/{file}") == (1, sentence)


def test_every_example_is_on_the_page_and_short():
    for path in EXAMPLES.rglob("*.py"):
        assert command(str(path.relative_to(EXAMPLES)))
        assert len(path.read_text().splitlines()) <= 90
