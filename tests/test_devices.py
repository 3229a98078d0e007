"""Several CPU processes over gloo: every row once, and the same bits as on one."""

import csv
import hashlib
import json
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch
from build_bundle import idx_bytes
from processes import Job, curves, free_port

from lit_threeseven import dataset
from lit_threeseven.commands import verify

ROOT = Path(__file__).parents[1]
SCRIPTS = ROOT / "scripts"
RECIPES = {
    "one batch": ("--data.batch_size", "null", "--trainer.max_epochs", "60"),
    "batches that don't divide": ("--data.batch_size", "1001", "--trainer.max_epochs", "5"),
    "Adam, accumulated and clipped": (
        *("--data.batch_size", "1001", "--trainer.max_epochs", "5", "--optimizer", "Adam", "--optimizer.lr", "0.01"),
        *("--trainer.accumulate_grad_batches", "3", "--trainer.gradient_clip_val", "0.01"),
    ),
}
OFTEN = ("--trainer.log_every_n_steps", "4")


def predictions(folder: Path) -> list[list[float]]:
    (path,) = folder.glob("logs/*/checkpoints/last.predictions.csv")
    with path.open() as file:
        return [[float(value) for value in row] for row in list(csv.reader(file))[1:]]


def results(folder: Path, run: str = "version_0") -> dict[str, object]:
    """Everything that has to be the same bits: weights, optimizer, best epoch, and all that was logged."""
    found: dict[str, object] = {"curves": curves(folder / "logs" / run)}
    for path in folder.glob(f"logs/{run}/checkpoints/*.ckpt"):
        checkpoint = torch.load(path, weights_only=True)
        bits = {name: weight.numpy().tobytes().hex() for name, weight in checkpoint["state_dict"].items()}
        found[path.name] = [bits, checkpoint["epoch"], checkpoint["global_step"], repr(checkpoint["optimizer_states"])]
    return found


def digest(folder: Path) -> str:
    """The digest of the best weights, computed by hand."""
    (best,) = folder.glob("logs/*/checkpoints/best.ckpt")
    state = torch.load(best, weights_only=True)["state_dict"]
    return hashlib.sha256(state["W"].numpy().tobytes() + state["b"].numpy().tobytes()).hexdigest()


@pytest.fixture(scope="module")
def on_one_device(tmp_path_factory):
    """The folder of each recipe's run on one device, made when it is first asked for."""
    folders = {}

    def run(recipe: str) -> Path:
        if recipe not in folders:
            folder = folders[recipe] = tmp_path_factory.mktemp("one")
            Job(folder, *RECIPES[recipe], *OFTEN).run()
            Job(folder, "predict", *RECIPES[recipe][:2], "--ckpt_path", "last").run()
        return folders[recipe]

    return run


@pytest.mark.parametrize(
    ("recipe", "processes"),
    [
        ("one batch", 2),
        ("batches that don't divide", 3),
        pytest.param("Adam, accumulated and clipped", 5, marks=pytest.mark.slow),
        pytest.param("one batch", 7, marks=pytest.mark.slow),
    ],
)
def test_any_number_of_processes_gives_the_same_bits(on_one_device, tmp_path, recipe, processes):
    job = Job(tmp_path, *RECIPES[recipe], *OFTEN, processes=processes).run()
    one = on_one_device(recipe)
    assert results(tmp_path) == results(one)
    assert {"best.ckpt", "last.ckpt"} < results(one).keys()
    assert "11,157 to train, 1,239 to validate, 2,038 to test" in job.outputs[0]
    assert f"Digest          {digest(tmp_path)}\n" in job.outputs[0]
    assert job.outputs[1:] == [""] * (processes - 1)
    assert len(list(tmp_path.glob("logs/*"))) == 1
    assert len(list(tmp_path.glob("logs/*/events*"))) == len(list(one.glob("logs/*/events*")))
    Job(tmp_path, "predict", *RECIPES[recipe][:2], "--ckpt_path", "last", processes=processes).run()
    assert predictions(tmp_path) == predictions(one)
    assert len(predictions(one)) == 2038


def test_three_processes_train_on_two_rows(tmp_path):
    root = tmp_path / "mnist"
    raw = dataset.raw_folder(root)
    raw.mkdir(parents=True)
    for part in ("train", "t10k"):
        images = torch.randint(0, 256, (2, 28, 28), generator=torch.Generator().manual_seed(0)).byte()
        (raw / f"{part}-images-idx3-ubyte").write_bytes(idx_bytes(images))
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(idx_bytes(torch.tensor([3, 7]).byte()))
    options = ("--data.source", "torchvision", "--data.data_dir", str(root), "--data.val_fraction", "0")
    training = (*options, "--trainer.max_epochs", "50", "--trainer.log_every_n_steps", "1")
    Job(tmp_path / "one", *training).run()
    job = Job(tmp_path / "three", *training, processes=3).run()
    assert results(tmp_path / "one") == results(tmp_path / "three")
    assert "3 processes share batches of 2 images: some have nothing to do" in job.outputs[0]
    assert job.outputs[1:] == ["", ""]
    for folder, processes in (("one", 1), ("three", 3)):
        Job(tmp_path / folder, "predict", *options, "--ckpt_path", "last", processes=processes).run()
    assert len(predictions(tmp_path / "three")) == 2
    assert predictions(tmp_path / "three") == predictions(tmp_path / "one")


def train_in_a_new_process(folder: Path, *options: str, **environment: str) -> str:
    """What the main job prints in an interpreter with an environment of its own."""
    command = [sys.executable, str(SCRIPTS / "train.py"), "--trainer.accelerator", "cpu", *options]
    folder.mkdir()
    result = subprocess.run(
        command, cwd=folder, env=os.environ | environment, capture_output=True, text=True, timeout=200, check=False
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    ("torch_s", "onednn_s", "threads", "recipe"),
    [
        ("default", "SSE41", 2, "batches that don't divide"),
        ("avx2", "AVX2", 1, "batches that don't divide"),
        ("default", "SSE41", 2, "one batch"),
        ("avx2", "AVX2", 1, "one batch"),
    ],
)
def test_any_vector_width_and_number_of_threads_give_the_same_bits(
    on_one_device, tmp_path, torch_s, onednn_s, threads, recipe
):
    widths = {"ATEN_CPU_CAPABILITY": torch_s, "ONEDNN_MAX_CPU_ISA": onednn_s, "FBGEMM_ENABLE_INSTRUCTIONS": "AVX2"}
    if torch_s == "default":
        widths["MKL_ENABLE_INSTRUCTIONS"] = "SSE4_2"
    folder = tmp_path / "run"
    train_in_a_new_process(folder, *RECIPES[recipe], *OFTEN, **widths, OMP_NUM_THREADS=str(threads))
    assert results(folder) == results(on_one_device(recipe))


@pytest.mark.slow
def test_a_run_killed_four_times_on_changing_numbers_of_processes_gives_the_same_bits(tmp_path):
    recipe = ("fit", "--run", "r", "--data.batch_size", "1001", "--trainer.max_epochs", "40", *OFTEN)
    recipe = (*recipe, "--optimizer", "Adam", "--optimizer.lr", "0.001")
    one, folder = tmp_path / "one", tmp_path / "killed"
    Job(one, *recipe).run()
    start = time.monotonic()
    Job(tmp_path / "timed", *recipe, processes=2).run()
    duration = time.monotonic() - start
    chosen, killed = random.Random(0), 0
    while killed < 4:
        processes = chosen.randint(1, 4)
        job = Job(folder, *recipe, processes=processes)
        time.sleep(chosen.uniform(0, duration))
        for rank in range(processes):
            job.kill(signal.SIGKILL, rank)
        if job.wait() == [0] * processes:  # it finished before the kill: start again
            assert results(folder, "r") == results(one, "r")
            shutil.rmtree(folder)
        else:
            killed += 1
    Job(folder, *recipe, processes=3).run()
    assert results(folder, "r") == results(one, "r")


@pytest.mark.slow
def test_your_own_trainer_gives_the_same_bits_on_three_devices(tmp_path):
    program = textwrap.dedent("""
        import sys
        import lightning as L
        import torch
        from lit_threeseven import LitThreeSeven, ThreeSevenDataModule

        L.seed_everything(0)
        torch.set_num_threads(1)
        model, data, devices = LitThreeSeven(), ThreeSevenDataModule(batch_size=1001), int(sys.argv[1])
        options = {"strategy": "ddp"} if devices > 1 else {}
        trainer = L.Trainer(
            accelerator="cpu", devices=devices, max_epochs=3, logger=False, **options
        )
        trainer.fit(model, data)
        metrics = trainer.validate(model, data)[0] | trainer.test(model, data)[0]
        shares = [trainer.predict(model, data)] * devices
        if devices > 1:
            torch.distributed.all_gather_object(shares, shares[0])
        batches = [batch for share in shares for batch in share]
        rows, probability = (torch.cat([batch[name] for batch in batches]) for name in ("rows", "probability"))
        assert sorted(rows.tolist()) == list(range(2038))
        predictions = probability[rows.argsort()]
        if trainer.is_global_zero:
            results = {"digest": model.digest(), "metrics": metrics, "predictions": predictions}
            torch.save(results, f"{devices}.pt")
    """)
    (tmp_path / "program.py").write_text(program)
    results = []
    for devices in ("1", "3"):
        command = [sys.executable, "program.py", devices]
        subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, timeout=120)
        results.append(torch.load(tmp_path / f"{devices}.pt", weights_only=True))
    one, three = results
    assert one["digest"] == three["digest"]
    assert one["metrics"] == three["metrics"]
    assert len(one["predictions"]) == 2038
    assert torch.equal(one["predictions"], three["predictions"])


def torchrun(*options: str) -> list[str]:
    return [sys.executable, "-m", "torch.distributed.run", *options, str(SCRIPTS / "train.py")]


@pytest.mark.slow
def test_two_torchrun_nodes_end_where_one_process_does(on_one_device, tmp_path):
    port = str(free_port())
    recipe = [*RECIPES["one batch"], *OFTEN, "--trainer.accelerator", "cpu"]
    nodes = []
    for rank in range(2):
        options = ["--nnodes", "2", "--node-rank", str(rank), "--nproc-per-node", "1"]
        options += ["--master-addr", "127.0.0.1", "--master-port", port]
        nodes.append(
            subprocess.Popen(
                torchrun(*options) + recipe,
                cwd=tmp_path,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    (output, errors), (other_output, _) = (node.communicate(timeout=120) for node in nodes)
    assert [node.returncode for node in nodes] == [0, 0], errors
    assert "Test accuracy" in output
    assert other_output == ""
    assert results(tmp_path) == results(on_one_device("one batch"))
    assert len(list(tmp_path.glob("logs/*"))) == 1


@pytest.mark.slow
def test_slurm_s_processes_end_where_one_does(on_one_device, tmp_path):
    world = {"SLURM_JOB_ID": "1", "SLURM_JOB_NAME": "test", "SLURM_NTASKS": "2"}  # as with srun -n 2
    world |= {"SLURM_STEP_NODELIST": "127.0.0.1", "SLURM_NODEID": "0", "MASTER_PORT": str(free_port())}
    world |= {"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NUM_NODES": "1"}
    environments = [world | {"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)} for rank in range(2)]
    job = Job(tmp_path, *RECIPES["one batch"], *OFTEN, environments=environments).run()
    assert "Test accuracy" in job.outputs[0]
    assert job.outputs[1] == ""
    assert results(tmp_path) == results(on_one_device("one batch"))


FAULTS = """
import gc
import sys

gc.disable()  # it starts in half the time
import torch
from lit_threeseven import LitThreeSeven
from lit_threeseven.batches import Batch
from lit_threeseven.__main__ import main

fault, at, step = sys.argv[1], int(sys.argv[2]), LitThreeSeven.training_step
all_reduce = torch.distributed.all_reduce
_, _, *args = sys.argv[3:]  # after -m lit_threeseven


def lose(sums, *args, **kwargs):  # this process's part of a gradient
    return all_reduce(sums.mul_(0) if sums.numel() >= 784 else sums, *args, **kwargs)


def training_step(model, batch, batch_idx):
    if fault == "bit" and model.global_step == at:  # the lowest one of a weight
        model.W.data.view(torch.int32)[406] ^= 1
    if fault == "row" and model.global_step == at:
        x, y = (torch.cat([rows, rows[:1]]) for rows in (batch.x, batch.y))
        batch = Batch(x, y, batch.rows, batch.global_rows, batch.divisor)
    lost = fault == "gradient" and model.global_step == at and model.global_rank == 1
    torch.distributed.all_reduce = lose if lost else all_reduce
    return step(model, batch, batch_idx)


LitThreeSeven.training_step = training_step
gc.enable()
gc.freeze()
main(args)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "at", "found", "processes"),
    [("row", 40, "40", 1), ("gradient", 20, "2[01]", 2)],  # the same sum may hold the loss
)
def test_verifying_devices_names_the_first_step_with_a_fault(tmp_path, fault, at, found, processes):
    (tmp_path / "faults.py").write_text(FAULTS)
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(free_port())]
    launch = [sys.executable, *(torchrun if processes > 1 else []), str(tmp_path / "faults.py"), fault, str(at)]
    options = [*verify.RECIPES["batches of 4,000"], "--trainer.accelerator", "cpu"]
    faulty, published = verify.run(launch, options, tmp_path), json.loads(verify.PUBLISHED.read_text())
    difference = verify.difference(faulty, published["batches of 4,000"])
    assert re.fullmatch(rf"the loss of step {found}: [0-9.e-]+ instead of [0-9.e-]+", difference)


@pytest.mark.slow
def test_verifying_devices_ends_with_a_verdict(tmp_path):
    (tmp_path / "faults.py").write_text(FAULTS)
    command = [sys.executable, "-m", "lit_threeseven", "verify", "--accelerator", "cpu"]
    command += ["--launch", shlex.join([sys.executable, str(tmp_path / "faults.py"), "bit", "50"])]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 1, result.stdout + result.stderr
    assert result.stdout.count("  DIFFERENT: the loss of step 50: ") == 2
    assert result.stderr == "lit-threeseven: error: Bits differ from the published ones.\n"


def test_verifying_compares_every_value():
    published = json.loads(verify.PUBLISHED.read_text())
    assert published.keys() == verify.RECIPES.keys()
    found = published["one batch"]
    assert verify.difference(found, found) == ""
    assert verify.difference(found | {"other values": ""}, found) == "other values"
    assert verify.difference(found | {"digest": "0"}, found) == "digest"
    assert verify.difference(found | {"losses": found["losses"][:-1]}, found) == "losses"


def test_steps_on_a_gpu_are_checked_for_waiting_between_log_steps(monkeypatch):
    modes = []
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    verify.steps_without_waiting("cpu")
    assert modes == ["default"] * 5 + ["error"] * 10 + ["default"] * 5


@pytest.mark.slow
def test_readme_s_digest_is_that_of_the_main_job_on_two_devices(tmp_path):
    (published,) = re.findall(r"^Digest +([0-9a-f]{64})$", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert f"Digest          {published}\n" in train_in_a_new_process(tmp_path / "run", "--trainer.devices", "2")
