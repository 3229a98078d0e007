"""Shared pieces: a small MNIST with all ten digits, a mirror that serves it, and the command line in this process."""

import functools
import gc
import gzip
import hashlib
import http.server
import os
import runpy
import signal
import sys
import threading
from pathlib import Path

import lightning as L
import pytest
import torch
from build_bundle import idx_bytes
from processes import RECIPES, Job, said
from torchvision.datasets import MNIST

from lit_threeseven import dataset, signals
from lit_threeseven.__main__ import main

SCRIPTS = Path(__file__).parents[1] / "scripts"

# Tests run in parallel, and so do the processes that they start.
torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")

# What is imported stays, so garbage collection needn't look at it, now or at the end.
gc.disable()


def pytest_collection_finish() -> None:
    gc.enable()
    gc.freeze()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Start with the longest tests: at the end, the others would have nothing to do beside them."""
    first = ("tests/test_elastic.py", "tests/test_networks.py::test_the_deep_recipe", "tests/test_package.py")
    items.sort(key=lambda item: not item.nodeid.startswith(first))


@pytest.fixture(scope="session")
def small_mnist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A torchvision root with 300 training and 100 test images of all ten digits; digit d is a bright row 2d."""
    root = tmp_path_factory.mktemp("small_mnist")
    raw = dataset.raw_folder(root)
    raw.mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    for part, count in (("train", 300), ("t10k", 100)):
        digits = torch.arange(count).remainder(10).byte()
        images = torch.randint(0, 100, (count, 28, 28), generator=generator).byte()
        images[torch.arange(count), 2 * digits.long()] = 255
        (raw / f"{part}-images-idx3-ubyte").write_bytes(idx_bytes(images))
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(idx_bytes(digits))
    return root


@pytest.fixture
def copied_mnist(small_mnist: Path, tmp_path: Path) -> Path:
    """A copy of `small_mnist` that a test may damage."""
    root = tmp_path / "mnist"
    raw = dataset.raw_folder(root)
    raw.mkdir(parents=True)
    for name in dataset.FILES:
        (raw / name).write_bytes((dataset.raw_folder(small_mnist) / name).read_bytes())
    return root


@pytest.fixture
def mirror(small_mnist: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A loopback server of `small_mnist` in place of torchvision's; yields the folder that it serves."""
    folder = tmp_path / "mirror"
    folder.mkdir()
    resources = []
    for name in dataset.FILES:
        content = gzip.compress((dataset.raw_folder(small_mnist) / name).read_bytes(), mtime=0)
        (folder / f"{name}.gz").write_bytes(content)
        resources.append((f"{name}.gz", hashlib.md5(content).hexdigest()))

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(MNIST, "mirrors", [f"http://127.0.0.1:{server.server_port}/"])
    monkeypatch.setattr(MNIST, "resources", resources)
    yield folder
    server.shutdown()
    server.server_close()


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Point torchvision's mirrors at a port where nobody listens."""
    monkeypatch.setattr(MNIST, "mirrors", ["http://127.0.0.1:9/"])


@pytest.fixture
def cli(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    """Run the command line in this process and in an empty folder; gives (exit code, output, errors)."""
    folder = tmp_path / "run"
    folder.mkdir()
    monkeypatch.chdir(folder)

    def run(*args: object) -> tuple[int, str, str]:
        code = 0
        try:
            main([str(arg) for arg in args])
        except SystemExit as end:
            code = end.code
            if isinstance(code, str):  # the interpreter prints it and exits with 1
                return 1, capsys.readouterr().out, code
        captured = capsys.readouterr()
        return code or 0, captured.out, said(captured.err)

    run.folder = folder
    handlers = {signum: signal.getsignal(signum) for signum in signals.SIGNALS}
    yield run
    for signum, handler in handlers.items():
        signal.signal(signum, handler)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """The folder of each recipe's uninterrupted run, made when it is first asked for."""
    folders = {}

    def run(recipe: str) -> Path:
        if recipe not in folders:
            folders[recipe] = tmp_path_factory.mktemp("uninterrupted")
            Job(folders[recipe], *RECIPES[recipe]).run()
        return folders[recipe]

    return run


@pytest.fixture
def script(monkeypatch, capsys):
    """Run a script in this process; gives its exit code and what it printed."""

    def run(name: str, *args: object) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", [name, *map(str, args)])
        code = 0
        try:
            runpy.run_path(str(SCRIPTS / name), run_name="__main__")
        except SystemExit as end:
            code = end.code
            if isinstance(code, str):  # the interpreter prints it and exits with 1
                return 1, "".join([*capsys.readouterr(), code])
        return code or 0, "".join(capsys.readouterr())

    return run


@pytest.fixture
def trainer(tmp_path: Path):
    """Make a Trainer that is quiet and writes into the test's folder only."""

    def make(**kwargs) -> L.Trainer:
        defaults = {
            "accelerator": "cpu",
            "max_epochs": 3,
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "log_every_n_steps": 1,
            "default_root_dir": tmp_path,
        }
        return L.Trainer(**defaults | kwargs)

    return make
