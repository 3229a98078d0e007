"""Time this package beside what it replaces, in one run.

    python scripts/benchmark.py --json figures.json

Timings alternate in one process after a warm-up, and each figure is the median over the rounds. Peak memory is measured
in separate processes. The exit code is 1 if a figure misses its target. `--quick` takes less than a minute; its figures
are rough, so its targets are twice as high.
"""

import argparse
import contextlib
import datetime
import io
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import lightning as L
import torch
import yaml
from lightning.pytorch.callbacks import Timer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lit_threeseven import LitThreeSeven, ThreeSevenDataModule
from lit_threeseven.functional import mean_squared_error
from lit_threeseven.module import THRESHOLD
from lit_threeseven.networks import LitThreeSevenMany
from lit_threeseven.pixels import SparsePixels, flatten
from lit_threeseven.run.cli import ThreeSevenCLI
from lit_threeseven.run.options import silence_libraries

GOAL = 0.98  # test accuracy
TILES_BATCH = 256

# The highest value allowed for each figure: ratios of rows, and memory.
TARGETS = {
    "main recipe / article's loop": 0.50,
    "main recipe / usual way": 1 / 40,
    "main recipe, deterministic / article's loop": 0.65,
    "step alone / article's loop": 0.30,
    "batches of 64: ours / usual way": 0.60,
    "batches of 64: ours, deterministic / ours": 1.3,
    f"{GOAL:.0%} of the test set: the fast recipe / scikit-learn": 1.5,
    "16 networks at once / article's loop": 1.5,
    "64 networks at once / article's loop": 6.0,
    "time per image: many times the size / once": 1.2,
    "memory per image (KB)": 1.1,
    "main job's memory beyond lightning's (MB)": 200,
    "pictures' share of the main job": 0.05,
}
QUICK_SLACK = 2
NOTHING_WRITTEN = {"logger": False, "enable_checkpointing": False}

# Above IN_CACHE the article's loop gets its pixels from a large cache: from memory it reaches about 0.4, since it also
# computes. Sparse pixels save reading from memory, so the targets that compare with that loop are then only shown.
FROM_CACHE = "article's loop: its speed of reading / that of memory"
IN_CACHE = 0.7


class Tiled(ThreeSevenDataModule):
    """The training set, `times` times over."""

    times = 1

    def setup(self, stage: str) -> None:
        """Read, then repeat."""
        super().setup(stage)
        images, y = self.train.tensors
        self.train = TensorDataset(images.repeat(self.times, 1, 1), y.repeat(self.times, 1))


class Fast(LitThreeSeven):
    """The network with the optimizer of the fast recipe; it gets dense pixels, as there."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Read it from the recipe."""
        chosen = yaml.safe_load((Path(__file__).parent / "configs" / "fast.yaml").read_text())["optimizer"]
        return getattr(torch.optim, chosen["class_path"])(self.parameters(), **chosen["init_args"])


class Usual(L.LightningModule):
    """The network as it is usually written for a Trainer."""

    def __init__(self) -> None:
        super().__init__()
        self.W, self.b = nn.Parameter(torch.randn(784, 1) * 0.01), nn.Parameter(torch.zeros(1))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        """Predict and compare."""
        x, y = batch
        loss = nn.functional.mse_loss(torch.sigmoid(x @ self.W + self.b), y)
        self.log("train/loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Gradient descent."""
        return torch.optim.SGD(self.parameters(), lr=1.0)


def article(x: Tensor, y: Tensor, epochs: int) -> float:
    """Seconds of the article's loop."""
    W, b = torch.randn(784, 1).requires_grad_(), torch.randn(1).requires_grad_()
    start = time.perf_counter()
    for _ in range(epochs):
        prediction = 1 / (1 + torch.exp(-(x @ W + b)))
        loss = ((prediction - y) ** 2).mean()
        loss.backward()
        W.data -= 0.001 * W.grad
        b.data -= 0.001 * b.grad
        W.grad.zero_()
        b.grad.zero_()
    return time.perf_counter() - start


def step_alone(x: Tensor | SparsePixels, y: Tensor, epochs: int) -> float:
    """Seconds of prediction, loss, gradient and update, without a Trainer."""
    model = LitThreeSeven()
    optimizer = model.configure_optimizers()
    start = time.perf_counter()
    for _ in range(epochs):
        loss = mean_squared_error(model(x), y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return time.perf_counter() - start


@contextlib.contextmanager
def determinism_undone() -> Iterator[None]:
    """Switch off again what a `Trainer(deterministic=True)` switches on for the whole process."""
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def main_recipe(epochs: int, *options: str) -> float:
    """Seconds of the main recipe's whole fit: reading, training, validation, curves and checkpoints."""
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()), determinism_undone():
        place = ["--trainer.default_root_dir", folder, "--trainer.max_epochs", str(epochs)]
        return ThreeSevenCLI(["fit", *place, *options]).fit_seconds


def drawing(epochs: int) -> float:
    """Seconds that the main job, fit and test, draws pictures for TensorBoard."""
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        options = ["--trainer.default_root_dir", folder, "--trainer.max_epochs", str(epochs)]
        profile = ThreeSevenCLI([*options, "--trainer.profiler", "simple"]).trainer.profiler
    return sum(sum(seconds) for hook, seconds in profile.recorded_durations.items() if "TensorBoardPictures" in hook)


def trainer_fit(
    model: L.LightningModule, data: L.LightningDataModule | DataLoader, epochs: int, **options: Any
) -> float:
    """Seconds of a plain Trainer's epochs, with its default TensorBoard curves and a checkpoint per epoch."""
    timer = Timer()
    with tempfile.TemporaryDirectory() as folder:
        L.Trainer(
            accelerator="cpu",
            max_epochs=epochs,
            default_root_dir=folder,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[timer],
            **options,
        ).fit(model, data)
    return timer.time_elapsed("train")


def usual(x: Tensor, y: Tensor, batch_size: int | None, epochs: int) -> float:
    """Seconds of Trainer, TensorDataset and DataLoader."""
    loader = DataLoader(TensorDataset(x, y), batch_size=batch_size or len(x), shuffle=batch_size is not None)
    return trainer_fit(Usual(), loader, epochs)


def ours(
    batch_size: int | None,
    epochs: int,
    times: int = 1,
    network: Callable[[], L.LightningModule] = LitThreeSeven,
    **options: Any,
) -> float:
    """Seconds of the same Trainer with this package."""
    data = Tiled(batch_size=batch_size, val_fraction=0)
    data.times = times
    with determinism_undone():
        return trainer_fit(network(), data, epochs, **options)


def many_at_once(networks: int, epochs: int) -> float:
    """Seconds of full-batch epochs of a Trainer with that many networks, as in sweep.py."""
    models = [(1.0, 0.01, seed) for seed in range(networks)]
    return ours(None, epochs, network=lambda: LitThreeSevenMany(models), **NOTHING_WRITTEN)


def bandwidth(size: int = 2**28) -> float:
    """Bytes per second that can be read from a block of memory that no cache holds; the best of several readings."""
    block = torch.ones(size // 4)
    seconds = []
    for _ in range(10):
        start = time.perf_counter()
        block.sum()
        seconds.append(time.perf_counter() - start)
    return size / min(seconds)


def size_of(x: Tensor | SparsePixels) -> int:
    """Bytes that one product with the pixels reads."""
    if isinstance(x, Tensor):
        return x.nbytes
    csr = x.by_rows
    return csr.values().nbytes + csr.col_indices().nbytes + csr.crow_indices().nbytes


def alternate(timers: dict[str, tuple[Callable[[int], float], int]], rounds: int) -> dict[str, float]:
    """Median seconds per epoch of each timer, given with its number of epochs.

    The timers take turns, `rounds` times, after a shorter turn that doesn't count.
    """
    seconds = {name: [] for name in timers}
    for turn in range(rounds + 1):
        for name, (timer, epochs) in timers.items():
            epochs = max(1, epochs // 10) if turn == 0 else epochs
            if sys.stderr.isatty():
                print(f"\r{f'round {turn} of {rounds}' if turn else 'warm-up'}: {name:50}", end="", file=sys.stderr)
            seconds[name].append(timer(epochs) / epochs)
    if sys.stderr.isatty():
        print(f"\r{'':70}\r", end="", file=sys.stderr)
    return {name: statistics.median(values[1:]) for name, values in seconds.items()}


def until_goal(rounds: int) -> dict[str, float]:
    """Seconds of training until the test accuracy is `GOAL`, ours and scikit-learn's where that is installed.

    First the number of iterations is found, then that many are timed.
    """
    data = ThreeSevenDataModule(val_fraction=0)
    data.setup()
    images, test_y = data.test.tensors
    test_x = flatten(images)

    class Stop(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, model: LitThreeSeven, *args: object) -> None:
            trainer.should_stop = ((model(test_x) >= THRESHOLD) == test_y.bool()).float().mean() >= GOAL

    timers = {}
    for recipe, network in (("the default recipe", LitThreeSeven), ("the fast recipe", Fast)):
        torch.manual_seed(0)
        search = L.Trainer(
            accelerator="cpu",
            max_epochs=2000,
            callbacks=[Stop()],
            enable_progress_bar=False,
            enable_model_summary=False,
            **NOTHING_WRITTEN,
        )
        search.fit(network(), data)
        epochs = search.current_epoch
        timers[f"{recipe}, {epochs} epochs"] = (
            lambda _, n=epochs, network=network: ours(None, n, network=network, **NOTHING_WRITTEN),
            1,
        )
    try:
        from sklearn.linear_model import LogisticRegression
    except ImportError:
        print("scikit-learn is not installed, so its row is missing: pip install '.[benchmark]'", file=sys.stderr)
    else:
        x, y = flatten(data.train.tensors[0]).numpy(), data.train.tensors[1].squeeze(1).numpy()

        def regression(iterations: int) -> tuple[float, float]:
            start = time.perf_counter()
            model = LogisticRegression(max_iter=iterations).fit(x, y)
            return time.perf_counter() - start, model.score(test_x.numpy(), test_y.squeeze(1).numpy())

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that it has not converged
            iterations = next(i for i in range(1, 1000) if regression(i)[1] >= GOAL)
            timers[f"scikit-learn, {iterations} iterations"] = (lambda _: regression(iterations)[0], 1)
            return alternate(timers, rounds)
    return alternate(timers, rounds)


def peak_memory(code: str) -> float | None:
    """Peak memory in bytes of a Python process that runs `code`; None if the system does not report it (Linux does)."""
    status = Path("/proc/self/status")
    if not status.exists():
        return None
    code += f"\nprint(open('{status}').read())"
    output = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    return int(output.split("VmHWM:")[1].split()[0]) * 1024


def memory_of_tiles(times: int) -> float | None:
    """Peak memory in bytes of one epoch of mini-batches of the tiled set."""
    return peak_memory(
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import benchmark;"
        f"benchmark.silence_libraries(); benchmark.ours({TILES_BATCH}, 1, {times})"
    )


def machine() -> str:
    """What this runs on, and when."""
    names = [
        line.split(":")[1].strip()
        for line in (Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else [])
        if line.startswith("model name")
    ]
    return (
        f"{names[0] if names else platform.processor()}, {os.cpu_count()} cores, {platform.system()}, "
        f"Python {platform.python_version()}, torch {torch.__version__}, lightning {L.__version__}, "
        f"{datetime.date.today():%d %B %Y}"
    )


def measure(quick: bool) -> tuple[dict[str, float], dict[str, float]]:
    """All figures: seconds per row, and the figures that have a target."""
    data = ThreeSevenDataModule()
    data.setup("fit")
    whole = ThreeSevenDataModule(val_fraction=0)
    whole.setup("fit")
    images, y = whole.train.tensors
    x = flatten(images)
    store = SparsePixels if torch.backends.mkl.is_available() else flatten
    stored, stored_y = store(data.train.tensors[0]), data.train.tensors[1]

    epochs, few, rounds = (1000, 2, 3) if quick else (2000, 10, 5)
    rows = alternate(
        {
            "a  article's loop": (lambda n: article(x, y, n), epochs // 4),
            "b  Trainer, DataLoader, full batch": (lambda n: usual(x, y, None, n), few),
            "c  main recipe, everything on": (main_recipe, epochs),
            "c  the same, deterministic": (lambda n: main_recipe(n, "--trainer.deterministic", "true"), epochs),
            "d  its step alone": (lambda n: step_alone(stored, stored_y, n), epochs // 4),
        },
        rounds,
    )
    rounds = 1 if quick else 5
    a, b, c, exact, d = rows.values()
    memory = bandwidth()
    rows["e  floor: reading the pixels once"] = size_of(stored) / memory

    batches = {}
    for batch_size in (64, 256):
        batches[f"f  batches of {batch_size}, usual way"] = (lambda n, s=batch_size: usual(x, y, s, n), few // 2)
        batches[f"f  batches of {batch_size}, ours"] = (lambda n, s=batch_size: ours(s, n), few // 2)
        batches[f"f  batches of {batch_size}, ours, deterministic"] = (
            lambda n, s=batch_size: ours(s, n, deterministic=True),
            few // 2,
        )
    mini = alternate(batches, min(rounds, 3))
    rows |= mini

    goal = until_goal(rounds)
    rows |= {f"g  {GOAL:.0%} of the test set: {name}": value for name, value in goal.items()}
    _, fast, *sklearn = goal.values()

    many = alternate(
        {f"j  {k} networks at once": (lambda n, k=k: many_at_once(k, n), epochs * 4 // k) for k in (16, 64)}, rounds
    )
    rows |= many

    times = (1, 10) if quick else (1, 10, 100)
    tiles = alternate(
        {
            f"h  batches of {TILES_BATCH}, {t} times the size, per image": (
                lambda n, t=t: ours(TILES_BATCH, n, t) / t / len(whole.train),
                max(1, times[-1] // t // 5),
            )
            for t in times
        },
        min(rounds, 3),
    )
    rows |= tiles
    per_image = list(tiles.values())

    rows["i  main job, drawing its pictures"] = statistics.median(drawing(epochs) for _ in range(rounds))

    figures = {
        **{f"{GOAL:.0%} of the test set: the fast recipe / scikit-learn": fast / other for other in sklearn},
        **{f"{name[3:]} / article's loop": value / a for name, value in many.items()},
        FROM_CACHE: 2 * x.nbytes / a / memory,
        "main recipe / article's loop": c / a,
        "main recipe / article's loop, per image": c / len(data.train) / (a / len(whole.train)),
        "main recipe / usual way": c / b,
        "main recipe, deterministic / article's loop": exact / a,
        "step alone / article's loop": d / a,
        "batches of 64: ours / usual way": mini["f  batches of 64, ours"] / mini["f  batches of 64, usual way"],
        "batches of 64: ours, deterministic / ours": (
            mini["f  batches of 64, ours, deterministic"] / mini["f  batches of 64, ours"]
        ),
        "time per image: many times the size / once": per_image[-1] / per_image[0],
    }
    with tempfile.TemporaryDirectory() as folder:
        options = ["--trainer.default_root_dir", folder, "--trainer.max_epochs", str(epochs)]
        start = time.perf_counter()
        job = peak_memory(f"from lit_threeseven.run.cli import main; main({options})")
        rows["i  main job, from the command to the table"] = time.perf_counter() - start
        figures["pictures' share of the main job"] = (
            rows["i  main job, drawing its pictures"] / (rows["i  main job, from the command to the table"])
        )
    with ThreadPoolExecutor() as pool:  # together: only their memory counts
        tiles_memory = [pool.submit(memory_of_tiles, t) for t in (times[0], times[-1])]
        peaks = [peak_memory("import lightning"), job, *(memory.result() for memory in tiles_memory)]
    if None in peaks:
        print(
            "This system does not report the peak memory of a process, so those figures are missing.", file=sys.stderr
        )
    else:
        libraries, job, once, tiled = peaks
        figures["memory per image (KB)"] = (tiled - once) / (times[-1] - 1) / len(whole.train) / 1000
        figures["main job's memory beyond lightning's (MB)"] = (job - libraries) / 1e6
    return rows, figures


def missed(figures: dict[str, float], slack: float = 1.0) -> list[str]:
    """The figures above `slack` times their target, each with its value."""
    return [
        f"{name}: {figures[name]:.3f}, at most {target * slack:.3f}"
        for name, target in judged(figures).items()
        if name in figures and not figures[name] <= target * slack
    ]


def judged(figures: dict[str, float]) -> dict[str, float]:
    """The targets that can be judged on this machine."""
    cached = figures.get(FROM_CACHE, 0) > IN_CACHE
    return {name: target for name, target in TARGETS.items() if not (cached and name.endswith("article's loop"))}


def report(rows: dict[str, float], figures: dict[str, float], quick: bool) -> int:
    """Print the tables, and the missed targets on stderr; gives the exit code."""
    slack = QUICK_SLACK if quick else 1.0
    print(machine() + (" (quick: rough figures)" if quick else ""))
    print("\nTime per epoch, unless the row says otherwise\n")
    for name, seconds in rows.items():
        print(f"{name:62} {seconds * 1000:10.3f} ms" if seconds >= 1e-4 else f"{name:62} {seconds * 1e6:10.3f} µs")
    print(f"\n{'Figure':62} {'measured':>10} {'at most':>8}\n")
    for name, value in figures.items():
        target = judged(figures).get(name)
        print(f"{name:62} {value:10.3f}" + (f" {target * slack:8.3f}" if target else ""))
    misses = missed(figures, slack)
    if misses:
        print("\nMissed targets:", *misses, sep="\n  ", file=sys.stderr)
    return 1 if misses else 0


def main() -> int:
    """Measure, print the tables, write the JSON file; the exit code is 1 if a target is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="file to write all figures to, in seconds")
    parser.add_argument("--quick", action="store_true", help="less than a minute, with rough figures")
    args = parser.parse_args()
    silence_libraries()
    warnings.filterwarnings("ignore", category=UserWarning, module="lightning")

    rows, figures = measure(args.quick)
    code = report(rows, figures, args.quick)
    if args.json:
        content = {"machine": machine(), "quick": args.quick, "seconds": rows, "figures": figures, "at_most": TARGETS}
        args.json.write_text(json.dumps(content, indent=2))
    return code


if __name__ == "__main__":
    sys.exit(main())
