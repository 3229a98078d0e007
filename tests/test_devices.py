"""Several CPU processes over gloo: the same weights, the same metrics, every row once."""

import csv
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from build_bundle import idx_bytes
from processes import Job, curves, free_port, weights

from lit_threeseven import dataset

SCRIPTS = Path(__file__).parents[1] / "scripts"
RECIPES = {
    "one batch": ("--data.batch_size", "null", "--trainer.max_epochs", "100"),
    "batches that don't divide": ("--data.batch_size", "1001", "--trainer.max_epochs", "8"),
}


def predictions(folder: Path) -> list[list[float]]:
    (path,) = folder.glob("logs/*/checkpoints/last.predictions.csv")
    with path.open() as file:
        return [[float(value) for value in row] for row in list(csv.reader(file))[1:]]


def assert_same(one: Path, many: Path) -> None:
    """Same weights within 1e-5 of the largest, same logged values within 1e-6, same predictions."""
    for name, weight in weights(one).items():
        assert (weights(many)[name] - weight).abs().max() <= 1e-5 * weight.abs().max()
    expected, found = curves(one / "logs/version_0"), curves(many / "logs/version_0")
    assert found.keys() == expected.keys()
    for tag in expected:
        assert [step for step, _ in found[tag]] == [step for step, _ in expected[tag]]
        assert [value for _, value in found[tag]] == pytest.approx([value for _, value in expected[tag]], abs=1e-6)


@pytest.fixture(scope="module")
def on_one_device(tmp_path_factory):
    """The folder of each recipe's run on one device, made when it is first asked for."""
    folders = {}

    def run(recipe: str) -> Path:
        if recipe not in folders:
            folders[recipe] = tmp_path_factory.mktemp("one")
            Job(folders[recipe], *RECIPES[recipe], "--trainer.log_every_n_steps", "4").run()
            Job(folders[recipe], "predict", *RECIPES[recipe][:2], "--ckpt_path", "last").run()
        return folders[recipe]

    return run


@pytest.mark.parametrize(
    ("recipe", "processes"),
    [
        ("one batch", 2),
        ("batches that don't divide", 3),
        *(pytest.param("one batch", processes, marks=pytest.mark.slow) for processes in (3, 4)),
        *(pytest.param("batches that don't divide", processes, marks=pytest.mark.slow) for processes in (2, 4)),
    ],
)
def test_several_processes_end_where_one_does(on_one_device, tmp_path, recipe, processes):
    job = Job(tmp_path, *RECIPES[recipe], "--trainer.log_every_n_steps", "4", processes=processes).run()
    one = on_one_device(recipe)
    assert_same(one, tmp_path)
    assert "11,157 to train, 1,239 to validate, 2,038 to test" in job.outputs[0]
    assert job.outputs[1:] == [""] * (processes - 1)
    assert len(list(tmp_path.glob("logs/*"))) == 1
    assert len(list(tmp_path.glob("logs/*/events*"))) == len(list(one.glob("logs/*/events*")))

    Job(tmp_path, "predict", *RECIPES[recipe][:2], "--ckpt_path", "last", processes=processes).run()
    expected, found = predictions(one), predictions(tmp_path)
    assert [row[:3] for row in found] == [row[:3] for row in expected]
    assert len(found) == 2038
    assert [row[3] for row in found] == pytest.approx([row[3] for row in expected], abs=1e-6)


def test_three_processes_train_on_two_rows(tmp_path):
    root = tmp_path / "mnist"
    raw = dataset.raw_folder(root)
    raw.mkdir(parents=True)
    for part in ("train", "t10k"):
        images = torch.randint(0, 256, (2, 28, 28), generator=torch.Generator().manual_seed(0)).byte()
        (raw / f"{part}-images-idx3-ubyte").write_bytes(idx_bytes(images))
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(idx_bytes(torch.tensor([3, 7]).byte()))
    options = ("--data.source", "torchvision", "--data.data_dir", str(root), "--data.val_fraction", "0")
    options = (*options, "--trainer.max_epochs", "50", "--trainer.log_every_n_steps", "1")
    Job(tmp_path / "one", *options).run()
    job = Job(tmp_path / "three", *options, processes=3).run()
    assert_same(tmp_path / "one", tmp_path / "three")
    assert "3 processes share batches of 2 images: some have nothing to do" in job.outputs[0]
    assert job.outputs[1:] == ["", ""]
    for folder, processes in (("one", 1), ("three", 3)):
        Job(tmp_path / folder, "predict", *options[:6], "--ckpt_path", "last", processes=processes).run()
    assert len(predictions(tmp_path / "three")) == 2
    assert torch.tensor(predictions(tmp_path / "three")) == pytest.approx(torch.tensor(predictions(tmp_path / "one")))


@pytest.mark.slow
def test_your_own_trainer_gives_the_same_results_on_three_devices(tmp_path):
    program = textwrap.dedent("""
        import sys
        import lightning as L
        import torch
        from lit_threeseven import LitThreeSeven, ThreeSevenDataModule

        L.seed_everything(0)
        torch.set_num_threads(1)
        model, data = LitThreeSeven(), ThreeSevenDataModule(batch_size=1001)
        options = {"strategy": "ddp"} if int(sys.argv[1]) > 1 else {}
        trainer = L.Trainer(accelerator="cpu", devices=int(sys.argv[1]), max_epochs=3, logger=False, **options)
        trainer.fit(model, data)
        metrics = trainer.validate(model, data)[0] | trainer.test(model, data)[0]
        predictions = torch.cat([batch["probability"] for batch in trainer.predict(model, data)])
        if trainer.is_global_zero:
            torch.save({"W": model.W.detach(), "metrics": metrics, "predictions": predictions}, f"{sys.argv[1]}.pt")
    """)
    (tmp_path / "program.py").write_text(program)
    results = []
    for devices in ("1", "3"):
        command = [sys.executable, "program.py", devices]
        subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, timeout=120)
        results.append(torch.load(tmp_path / f"{devices}.pt", weights_only=True))
    one, three = results
    assert (one["W"] - three["W"]).abs().max() <= 1e-5 * one["W"].abs().max()
    assert three["metrics"] == pytest.approx(one["metrics"], abs=1e-6)
    assert three["predictions"].shape == (2038, 1)
    torch.testing.assert_close(three["predictions"], one["predictions"], rtol=0, atol=1e-6)


def torchrun(*options: str) -> list[str]:
    return [sys.executable, "-m", "torch.distributed.run", *options, str(SCRIPTS / "train.py")]


@pytest.mark.slow
def test_two_torchrun_nodes_end_where_one_process_does(on_one_device, tmp_path):
    port = str(free_port())
    recipe = [*RECIPES["one batch"], "--trainer.log_every_n_steps", "4", "--trainer.accelerator", "cpu"]
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
    assert_same(on_one_device("one batch"), tmp_path)
    assert len(list(tmp_path.glob("logs/*"))) == 1


def test_slurm_s_processes_end_where_one_does(on_one_device, tmp_path):
    world = {"SLURM_JOB_ID": "1", "SLURM_JOB_NAME": "test", "SLURM_NTASKS": "2"}  # as with srun -n 2
    world |= {"SLURM_STEP_NODELIST": "127.0.0.1", "SLURM_NODEID": "0", "MASTER_PORT": str(free_port())}
    world |= {"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NUM_NODES": "1"}
    environments = [world | {"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)} for rank in range(2)]
    job = Job(tmp_path, *RECIPES["one batch"], "--trainer.log_every_n_steps", "4", environments=environments).run()
    assert "Test accuracy" in job.outputs[0]
    assert job.outputs[1] == ""
    assert_same(on_one_device("one batch"), tmp_path)


@pytest.mark.slow
def test_verifying_devices_finds_no_difference(tmp_path):
    command = [sys.executable, str(SCRIPTS / "verify_devices.py"), "--devices", "2", "--epochs", "20"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.count("   same\n") == 2
    assert "No difference." in result.stdout


@pytest.mark.slow
def test_verifying_devices_reports_a_difference(tmp_path):
    other = tmp_path / "other.py"  # what is launched trains one epoch more
    other.write_text(
        "import subprocess, sys\n"
        "sys.exit(subprocess.run([sys.executable, *sys.argv[1:], '--trainer.max_epochs', '6']).returncode)\n"
    )
    command = [sys.executable, str(SCRIPTS / "verify_devices.py"), "--epochs", "5", "--accelerator", "cpu"]
    command += ["--launch", f"{sys.executable} {other}"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 1
    assert result.stdout.count("DIFFERENT: weights, metrics, predictions") == 2, result.stdout + result.stderr
