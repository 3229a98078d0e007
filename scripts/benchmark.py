"""Time this package and what it replaces in one run.

    python scripts/benchmark.py --json figures.json

Timings alternate in one process after a warm-up, and each figure is the median over the rounds. Peak memory is measured
in separate processes. The exit code is 1 if a figure misses its target. `--quick` takes a few minutes; its figures are
rough, and the exit code is always 0.
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
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import lightning as L
import torch
import yaml
from lightning.pytorch.callbacks import Timer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lit_threeseven import LitThreeSeven, ThreeSevenDataModule, recipes, whole
from lit_threeseven.errors import silence_libraries
from lit_threeseven.functional import mean_squared_error, scale
from lit_threeseven.module import THRESHOLD
from lit_threeseven.networks import LitThreeSevenMany, LitThreeSevenMLP
from lit_threeseven.run.cli import ThreeSevenCLI

GOAL = 0.98  # test accuracy
TILES_BATCH = 256

# The highest allowed value of each figure: ratios of rows, and memory.
TARGETS = {
    "main recipe / article's loop, from memory": 0.65,
    "main recipe / article's loop, from a cache": 0.95,
    "main recipe / usual way": 1 / 40,
    "step / the same in plain float32": 0.80,
    "step beside its two products (ms)": 0.40,
    "batches of 64: ours / usual way": 0.75,
    "batches of 256: ours / usual way": 0.55,
    f"{GOAL:.0%} of the test set: the fast recipe / scikit-learn": 1.2,
    "16 networks at once / article's loop": 1.13,
    "64 networks at once / article's loop": 4.6,
    "time per image: many times the size / once": 1.2,
    "memory per image (KB)": 1.1,
    "main job's memory beyond lightning's (MB)": 200,
    "pictures' share of the main job": 0.05,
}
NOTHING_WRITTEN = {"logger": False, "enable_checkpointing": False}

# Above IN_CACHE, the article's loop reads its pixels from a large cache: from memory it reaches about 0.4, since it
# also computes.
FROM_CACHE = "article's loop: its speed of reading / that of memory"
IN_CACHE = 0.7


class Tiled(ThreeSevenDataModule):
    """The training set, `times` times over."""

    times = 1

    def setup(self, stage: str) -> None:
        """Read the images, then repeat them."""
        super().setup(stage)
        images, y = self.train.tensors
        self.train = TensorDataset(images.repeat(self.times, 1, 1), y.repeat(self.times, 1))


class Fast(LitThreeSeven):
    """The network with the optimizer of the fast recipe."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Read it from the recipe."""
        chosen = yaml.safe_load((recipes.FOLDER / "fast.yaml").read_text())["optimizer"]
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


def step_alone(x: Tensor, y: Tensor, epochs: int) -> float:
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


def plain_step(x: Tensor, y: Tensor, epochs: int) -> float:
    """Seconds of the same step in plain float32, with torch's own functions."""
    W, b = nn.Parameter(torch.randn(784, 1) * 0.01), nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([W, b], lr=1.0)
    start = time.perf_counter()
    for _ in range(epochs):
        loss = nn.functional.mse_loss(torch.sigmoid(x @ W + b), y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return time.perf_counter() - start


def products_alone(x: Tensor, epochs: int) -> float:
    """Seconds of the two products of a step with bytes."""
    times, transposed_times = whole.products(x)
    weights, slopes = (torch.linspace(-(2**26), 2**26, size).round().unsqueeze(1) for size in reversed(x.shape))
    start = time.perf_counter()
    for _ in range(epochs):
        times(weights)
        transposed_times(slopes)
    return time.perf_counter() - start


def main_recipe(epochs: int, *options: str) -> float:
    """Seconds of the main recipe's whole fit: reading, training, validation, curves and checkpoints."""
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
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
    return trainer_fit(network(), data, epochs, **options)


def many_at_once(networks: int, epochs: int) -> float:
    """Seconds of full-batch epochs of a Trainer with that many networks, as in a sweep."""
    models = [(1.0, 0.01, seed) for seed in range(networks)]
    return ours(None, epochs, network=lambda: LitThreeSevenMany(models), **NOTHING_WRITTEN)


def bandwidth(size: int = 2**28) -> float:
    """Bytes per second read from a block of memory too large for any cache; the best of several readings."""
    block = torch.ones(size // 4)
    seconds = []
    for _ in range(10):
        start = time.perf_counter()
        block.sum()
        seconds.append(time.perf_counter() - start)
    return size / min(seconds)


def alternate(timers: dict[str, tuple[Callable[[int], float], int]], rounds: int) -> dict[str, float]:
    """Median seconds per epoch of each timer; each comes with its number of epochs.

    The timers take turns, `rounds` times, after a shorter warm-up that doesn't count. Each begins with the same number
    of threads, which the main recipe may change.
    """
    seconds, threads = {name: [] for name in timers}, torch.get_num_threads()
    for turn in range(rounds + 1):
        for name, (timer, epochs) in timers.items():
            epochs = max(1, epochs // 10) if turn == 0 else epochs
            if sys.stderr.isatty():
                print(f"\r{f'round {turn} of {rounds}' if turn else 'warm-up'}: {name:50}", end="", file=sys.stderr)
            torch.set_num_threads(threads)
            seconds[name].append(timer(epochs) / epochs)
    if sys.stderr.isatty():
        print(f"\r{'':70}\r", end="", file=sys.stderr)
    torch.set_num_threads(threads)
    return {name: statistics.median(values[1:]) for name, values in seconds.items()}


def until_goal(rounds: int) -> dict[str, float]:
    """Seconds of training until the test accuracy is `GOAL`, ours and, if it is installed, scikit-learn's.

    It first finds the number of iterations, then times that many.
    """
    data = ThreeSevenDataModule(val_fraction=0)
    data.setup()
    images, test_y = data.test.tensors
    test_x = scale(images).flatten(1)

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
        x, y = scale(data.train.tensors[0]).flatten(1).numpy(), data.train.tensors[1].squeeze(1).numpy()

        def regression(iterations: int) -> tuple[float, float]:
            start = time.perf_counter()
            model = LogisticRegression(max_iter=iterations).fit(x, y)
            return time.perf_counter() - start, model.score(test_x.numpy(), test_y.squeeze(1).numpy())

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about not having converged
            iterations = next(i for i in range(1, 1000) if regression(i)[1] >= GOAL)
            timers[f"scikit-learn, {iterations} iterations"] = (lambda _: regression(iterations)[0], 1)
            return alternate(timers, rounds)
    return alternate(timers, rounds)


def peak_memory(code: str) -> float | None:
    """Peak memory in bytes of a Python process that runs `code`; None if the system doesn't report it (Linux does)."""
    status = Path("/proc/self/status")
    if not status.exists():
        return None
    code += f"\nprint(open('{status}').read())"
    output = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    return int(output.split("VmHWM:")[1].split()[0]) * 1024


def memory_of_tiles(times: int) -> float | None:
    """Peak memory in bytes of one epoch of mini-batches on the tiled set."""
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
    flags = Path("/proc/cpuinfo").read_text() if names else ""
    vectors = [name for name in ("avx2", "avx512f", "avx_vnni", "avx512_vnni", "amx_int8") if f" {name} " in flags]
    return (
        f"{names[0] if names else platform.processor()} ({' '.join(vectors)}), "
        f"{os.cpu_count()} cores, {torch.get_num_threads()} threads, {platform.system()}, "
        f"Python {platform.python_version()}, torch {torch.__version__}, lightning {L.__version__}, "
        f"{datetime.date.today():%d %B %Y}"
    )


def measure(quick: bool) -> tuple[dict[str, float], dict[str, float]]:
    """All figures: seconds per row, and the figures that have a target."""
    data = ThreeSevenDataModule(val_fraction=0)
    data.setup("fit")
    images, y = data.train.tensors
    x = scale(images).flatten(1)
    pixels = images.flatten(1)
    whole.keep(pixels)
    threads = torch.get_num_threads()

    epochs, few, rounds = (1000, 2, 1) if quick else (2000, 10, 5)
    rows = alternate(
        {
            "a  article's loop": (lambda n: article(x, y, n), epochs // 4),
            "b  Trainer, DataLoader, full batch": (lambda n: usual(x, y, None, n), few),
            "c  main recipe, everything on": (main_recipe, 2000),
            "d  a step alone": (lambda n: step_alone(pixels, y, n), epochs // 4),
            "d  its two products": (lambda n: products_alone(pixels, n), epochs // 4),
            "d  the same step in plain float32": (lambda n: plain_step(x, y, n), epochs // 4),
        },
        rounds,
    )
    a, b, c, d, products, plain = rows.values()
    memory = bandwidth()
    rows["e  floor: reading the pixels once"] = pixels.nbytes / memory

    batches = {}
    for batch_size in (64, 256):
        batches[f"f  batches of {batch_size}, usual way"] = (lambda n, s=batch_size: usual(x, y, s, n), few // 2)
        batches[f"f  batches of {batch_size}, ours"] = (lambda n, s=batch_size: ours(s, n), few // 2)
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
                lambda n, t=t: ours(TILES_BATCH, n, t) / t / len(data.train),
                max(1, times[-1] // t // 5),
            )
            for t in times
        },
        min(rounds, 3),
    )
    rows |= tiles
    per_image = list(tiles.values())

    rows["i  main job, drawing its pictures"] = statistics.median(drawing(epochs) for _ in range(rounds))
    torch.set_num_threads(threads)

    figures = {
        **{f"{GOAL:.0%} of the test set: the fast recipe / scikit-learn": fast / other for other in sklearn},
        **{f"{name[3:]} / article's loop": value / a for name, value in many.items()},
        FROM_CACHE: 2 * x.nbytes / a / memory,
        f"main recipe / article's loop, from {'a cache' if 2 * x.nbytes / a / memory > IN_CACHE else 'memory'}": c / a,
        "main recipe / usual way": c / b,
        "step / the same in plain float32": d / plain,
        "step beside its two products (ms)": (d - products) * 1000,
        **{
            f"batches of {size}: ours / usual way": mini[f"f  batches of {size}, ours"]
            / mini[f"f  batches of {size}, usual way"]
            for size in (64, 256)
        },
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
    with ThreadPoolExecutor() as pool:  # at the same time, since only their memory counts
        tiles_memory = [pool.submit(memory_of_tiles, t) for t in (times[0], times[-1])]
        peaks = [peak_memory("import lightning"), job, *(memory.result() for memory in tiles_memory)]
    if None in peaks:
        print(
            "This system does not report the peak memory of a process, so those figures are missing.", file=sys.stderr
        )
    else:
        libraries, job, once, tiled = peaks
        figures["memory per image (KB)"] = (tiled - once) / (times[-1] - 1) / len(data.train) / 1000
        figures["main job's memory beyond lightning's (MB)"] = (job - libraries) / 1e6
    return rows, figures


def missed(figures: dict[str, float]) -> list[str]:
    """The figures above their target, each with its value."""
    return [
        f"{name}: {figures[name]:.3f}, at most {target:.3f}"
        for name, target in TARGETS.items()
        if name in figures and not figures[name] <= target
    ]


def report(rows: dict[str, float], figures: dict[str, float], quick: bool) -> int:
    """Print the tables, and the missed targets on stderr; return the exit code."""
    print(machine() + (" (quick: rough figures)" if quick else ""))
    print("\nTime per epoch, unless the row says otherwise\n")
    for name, seconds in rows.items():
        print(f"{name:62} {seconds * 1000:10.3f} ms" if seconds >= 1e-4 else f"{name:62} {seconds * 1e6:10.3f} µs")
    print(f"\n{'Figure':62} {'measured':>10} {'at most':>8}\n")
    for name, value in figures.items():
        target = TARGETS.get(name)
        print(f"{name:62} {value:10.3f}" + (f" {target:8.3f}" if target else ""))
    misses = missed(figures)
    if misses and not quick:
        print("\nMissed targets:", *misses, sep="\n  ", file=sys.stderr)
    return int(bool(misses) and not quick)


def print_pictures(count: int) -> None:
    """Print how well both networks read `count` pictures of each kind that tests/drawn.py draws."""
    sys.path.append(str(Path(__file__).parents[1] / "tests"))
    import drawn

    models = [LitThreeSeven.from_pretrained(), LitThreeSevenMLP.from_pretrained()]
    print("| kind | single layer right | hidden layers right | remarked though right |\n| --- | --- | --- | --- |")
    rows = []
    for name in drawn.KINDS:
        row = drawn.measure(name, count, 3000, models)
        rows.append([*row["right"], *row["remarked"], *row["silent"]])
        print("| {} | {:.0%} | {:.0%} | {:.0%}, {:.0%} |".format(name, *rows[-1]), flush=True)
    mean = [sum(column) / len(rows) for column in zip(*rows, strict=True)]
    print("| all | {:.1%} | {:.1%} | {:.1%}, {:.1%} |".format(*mean))
    print(f"\nWrong without a remark: {sum(r[4] for r in rows):.0f} and {sum(r[5] for r in rows):.0f}", end=" ")
    print(f"of {count * len(rows):,}.")


def main() -> int:
    """Measure, print the tables, write the JSON file; the exit code is 1 if a target is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="file for all figures, in seconds")
    parser.add_argument(
        "--quick", action="store_true", help="take a few minutes, for rough figures; the exit code is 0"
    )
    parser.add_argument(
        "--pictures", type=int, nargs="?", const=40, metavar="N", help="only read N pictures of each kind"
    )
    args = parser.parse_args()
    if args.pictures:
        print_pictures(args.pictures)
        return 0
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
