import csv
import gc
import re
import subprocess
import sys
from pathlib import Path

import lightning as L
import psutil
import pytest
import torch
from lightning.pytorch.tuner import Tuner
from matplotlib.image import imread
from processes import Job, curves, weights
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lit_threeseven import LitThreeSeven, ThreeSevenDataModule
from lit_threeseven.batches import Batch
from lit_threeseven.networks import LitThreeSevenMany, LitThreeSevenMLP
from lit_threeseven.networks.many import SEEN

SCRIPTS = Path(__file__).parents[1] / "scripts"
MLP = ("--model", "LitThreeSevenMLP", "--model.hidden_sizes", "[20, 10]")
DEEP = (*MLP, "--data.batch_size=3000", "--data.rotation=10", "--data.zoom=0.1", "--data.shift=1.5")
DEEP += ("--optimizer=Adam", "--optimizer.lr=0.01", "--lr_scheduler=OneCycleLR", "--lr_scheduler.max_lr=0.01")
DEEP += ("--lr_scheduler.total_steps=4", "--trainer.max_epochs=4", "--trainer.log_every_n_steps=1")


def test_layers_compute_what_the_formula_says():
    model = LitThreeSevenMLP(hidden_sizes=[5, 4])
    x = torch.rand(3, 784)
    h1 = torch.sigmoid(x @ model.W1 + model.b1)
    h2 = torch.sigmoid(h1 @ model.W2 + model.b2)
    torch.testing.assert_close(model(x.view(3, 28, 28)), torch.sigmoid(h2 @ model.W3 + model.b3))
    assert list(model.state_dict()) == ["W1", "b1", "W2", "b2", "W3", "b3"]


def test_layers_train_as_a_plain_loop_does(trainer):
    torch.manual_seed(0)
    model = LitThreeSevenMLP(hidden_sizes=[8], lr=0.5)
    W1, b1, W2, b2 = (parameter.detach().clone().requires_grad_() for parameter in model.parameters())
    data = ThreeSevenDataModule(batch_size=2000)
    trainer(max_epochs=2).fit(model, data)
    loader = data.train_dataloader()
    for _ in range(2):
        for x, y in loader:
            p = torch.sigmoid(torch.sigmoid(x @ W1 + b1) @ W2 + b2)
            gradients = torch.autograd.grad(((p - y) ** 2).mean(), (W1, b1, W2, b2))
            with torch.no_grad():
                for parameter, gradient in zip((W1, b1, W2, b2), gradients, strict=True):
                    parameter -= 0.5 * gradient
    for trained, expected in zip(model.parameters(), (W1, b1, W2, b2), strict=True):
        torch.testing.assert_close(trained, expected, rtol=1e-4, atol=1e-6)


def test_a_deep_stack_of_sigmoids_still_learns_by_plain_gradient_descent(trainer):
    L.seed_everything(0, verbose=False)
    model, data = LitThreeSevenMLP(hidden_sizes=[30] * 6), ThreeSevenDataModule(batch_size=64)
    run = trainer(max_epochs=2)
    run.fit(model, data)
    assert run.validate(model, data, verbose=False)[0]["val/accuracy"] > 0.97


@pytest.mark.parametrize(
    ("seed", "epochs", "least"),
    [(0, 5, 0.75), *(pytest.param(seed, 14, 0.85, marks=pytest.mark.slow) for seed in range(1, 10))],
)
def test_hidden_layers_learn_from_full_batches_with_their_defaults_on_every_seed(trainer, seed, epochs, least):
    L.seed_everything(seed, verbose=False)
    model, data, run = LitThreeSevenMLP(), ThreeSevenDataModule(), trainer(max_epochs=epochs)
    run.fit(model, data)
    assert run.validate(model, data, verbose=False)[0]["val/accuracy"] > least


def test_start_is_reproducible_and_centred():
    starts = []
    for _ in range(2):
        torch.manual_seed(7)
        starts.append(LitThreeSevenMLP(hidden_sizes=[300, 50]))
    assert starts[0].digest() == starts[1].digest()
    W1, b1, W2, b2, *_ = starts[0].state_dict().values()
    assert W1.std() * 28 == pytest.approx(4, rel=0.02)
    assert W2.std() * 300**0.5 == pytest.approx(4, rel=0.02)
    assert not b1.any()
    torch.testing.assert_close(b2, -0.5 * W2.sum(0))


def test_the_main_job_trains_layers_and_its_checkpoint_says_what_it_is(cli):
    code, table, errors = cli(*DEEP)
    assert (code, errors) == (0, "")
    accuracy = [line for line in table.splitlines() if "accuracy" in line]
    code, tested, errors = cli("test", "--ckpt_path", "best")  # the checkpoint says which network it is
    assert (code, errors) == (0, "")
    assert accuracy[0] in tested
    assert cli("predict", "--ckpt_path", "best")[0] == 0
    assert cli("validate", "--ckpt_path", "best", *MLP)[0] == 0
    path = "logs/version_0/checkpoints/best.ckpt"
    assert LitThreeSevenMLP.load_from_checkpoint(path).hparams["hidden_sizes"] == [20, 10]
    code, _, error = cli("fit", "--ckpt_path", path)
    assert code == 1
    kept, own = "lit_threeseven.networks.layers.LitThreeSevenMLP", "lit_threeseven.module.LitThreeSeven"
    assert f"is of {kept}, not {own}" in error
    code, _, error = cli("test", *MLP, "--model.hidden_sizes=[7]", "--ckpt_path", path)
    assert code == 1
    assert "The checkpoint has model.hidden_sizes [20, 10], not [7]; drop that option" in error
    cli("fit", "--trainer.max_epochs", "1", "--run", "single")
    code, _, error = cli("test", "--model", "LitThreeSevenMLP", "--run", "single")
    assert code == 1
    assert "is of lit_threeseven.module.LitThreeSeven, not lit_threeseven.networks.layers.LitThreeSevenMLP" in error


def test_a_checkpoint_of_another_network_is_refused_from_python(trainer, tmp_path):
    run = trainer(max_epochs=1)
    run.fit(LitThreeSeven(), ThreeSevenDataModule())
    run.save_checkpoint(tmp_path / "single.ckpt")
    with pytest.raises(ValueError, match=r"is of lit_threeseven.module.LitThreeSeven, not .*LitThreeSevenMLP"):
        LitThreeSevenMLP.load_from_checkpoint(tmp_path / "single.ckpt")


def test_layers_resume_bit_for_bit(cli):
    cli("fit", *DEEP, "--trainer.default_root_dir=whole", "--trainer.check_val_every_n_epoch=1")
    cli(
        "fit",
        *DEEP,
        "--trainer.default_root_dir=parts",
        "--trainer.check_val_every_n_epoch=1",
        "--trainer.max_epochs=2",
    )
    code, _, error = cli(
        "fit", *DEEP, "--trainer.default_root_dir=parts", "--trainer.check_val_every_n_epoch=1", "--ckpt_path=last"
    )
    assert (code, error) == (0, "")
    whole, parts = weights(cli.folder / "whole"), weights(cli.folder / "parts")
    assert whole.keys() == parts.keys()
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    runs = [curves(cli.folder / name / "logs/version_0") for name in ("whole", "parts")]
    assert runs[0]["train/loss"] == runs[1]["train/loss"]


@pytest.mark.slow
def test_several_processes_train_layers_to_the_weights_of_one(cli, tmp_path):
    cli("fit", *DEEP)
    job = Job(tmp_path / "several", "fit", *DEEP, processes=2)
    job.run()
    one, several = weights(cli.folder), weights(tmp_path / "several")
    for name, weight in one.items():
        torch.testing.assert_close(weight, several[name], rtol=1e-5, atol=1e-5)


def test_the_first_layer_s_units_are_drawn(cli):
    cli("fit", *DEEP)
    run = EventAccumulator(str(cli.folder / "logs/version_0")).Reload()
    assert {"weights/W1 picture", "views/train examples", "views/val hardest"} <= set(run.Tags()["images"])
    assert {f"weights/W{i}{kind}" for i in (1, 2, 3) for kind in ("", " gradient")} <= set(run.Tags()["histograms"])
    assert cli.folder.joinpath("logs/version_0/hparams.yaml").read_text().count("hidden_sizes") == 1


MODELS = [(1.0, 0.01, 0), (1.0, 0.01, 1), (0.1, 0.01, 0), (10.0, 1.0, 5), (0.001, 1.0, 3)]


@pytest.mark.parametrize(("batch_size", "epochs"), [(None, 30), (3001, 8)])
def test_each_of_many_networks_ends_where_it_does_alone(trainer, batch_size, epochs):
    data = ThreeSevenDataModule(batch_size=batch_size)
    many = LitThreeSevenMany(MODELS)
    run = trainer(max_epochs=epochs)
    run.fit(many, data)
    for k, (lr, init_std, seed) in enumerate(MODELS):
        torch.manual_seed(seed)
        alone = LitThreeSeven(lr, init_std)
        run = trainer(max_epochs=epochs)
        run.fit(alone, data)
        torch.testing.assert_close(many.single(k).state_dict(), alone.state_dict(), rtol=0, atol=1e-4)
        metrics = run.validate(alone, data, verbose=False)[0]
        assert many.results["loss"][k].item() == pytest.approx(metrics["val/loss"], abs=1e-4)
        assert many.results["accuracy"][k].item() == pytest.approx(metrics["val/accuracy"], abs=1e-3)


def test_a_network_that_diverges_leaves_the_others_alone(trainer):
    found = []
    for models in (MODELS, [(1.0, 3e38, 0), *MODELS]):
        many = LitThreeSevenMany(models)
        run, data = trainer(max_epochs=20), ThreeSevenDataModule()
        run.fit(many, data)
        run.validate(many, data.train_dataloader(), verbose=False)
        found.append(many)
    without, with_it = found
    assert not with_it.W[:, 0].isfinite().all()
    torch.testing.assert_close(with_it.W[:, 1:], without.W, rtol=0, atol=1e-6)
    assert with_it.diverged(torch.full((6,), 0.9), with_it.results["loss"]).tolist() == [True, *[False] * 5]
    assert not without.diverged(without.results["loss"], without.results["loss"]).any()
    assert without.diverged(without.results["loss"] - 1e-6, without.results["loss"]).all()


@pytest.mark.parametrize("ink", [0, 1])
def test_a_batch_that_comes_again_gives_the_same_but_for_rounding_and_is_given_up(ink):
    random = torch.Generator().manual_seed(0)
    x, many = ink * torch.rand(500, 784, generator=random), LitThreeSevenMany(MODELS)
    x[:, ::3] = 0
    batch = Batch(x, torch.randint(2, (500, 1), generator=random).float(), torch.arange(500), 500, 500)
    found = []
    for _ in range(3):
        loss = many.training_step(batch, 0)
        found.append([loss.detach(), *torch.autograd.grad(loss, (many.W, many.b))])
    assert SEEN[batch] is not None
    empty = Batch(x[:0], torch.zeros(0, 1), torch.arange(0), 500, 250)
    assert [float(many.training_step(empty, 0)) for _ in range(2)] == [0, 0]
    for later in found[1:]:
        torch.testing.assert_close(later, found[0], rtol=1e-5, atol=1e-6)
    kept = len(SEEN)
    del batch
    gc.collect()
    assert len(SEEN) < kept


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "64-true"])
def test_many_networks_learn_in_any_precision(trainer, precision):
    many, data = LitThreeSevenMany(MODELS), ThreeSevenDataModule()
    trainer(max_epochs=20, precision=precision).fit(many, data)
    trainer().validate(many, data, verbose=False)
    assert many.results["accuracy"].max() > 0.95


def test_losses_are_kept_from_the_first_step_to_the_last_and_not_too_many(trainer):
    many = LitThreeSevenMany(MODELS[:1])
    run = trainer(max_epochs=300)
    run.fit(many, ThreeSevenDataModule())
    steps = [step for step, _ in many.curve]
    assert steps[:3] == [0, 1, 2]
    assert steps[-1] == 299
    assert 50 < len(steps) <= 100
    assert steps == sorted(steps)


@pytest.mark.parametrize("network", [LitThreeSeven, LitThreeSevenMLP, lambda: LitThreeSevenMany(MODELS)])
def test_lightning_s_learning_rate_finder_works_with_every_network(network, trainer, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = network()
    data = ThreeSevenDataModule(batch_size=500)
    finder = Tuner(trainer(max_epochs=5, enable_checkpointing=True)).lr_find(model, data, num_training=30)
    assert len(finder.results["lr"]) > 10
    assert 0 < finder.suggestion() == model.lr


def swept(cli, *args: str) -> tuple[Path, list[dict], str]:
    code, output, error = cli("sweep", *args, "--accelerator", "cpu")
    assert (code, error) == (0, "")
    folder = Path(re.search(r": (.*)$", output.splitlines()[0])[1])
    return folder, list(csv.DictReader((folder / "table.csv").open())), output


def test_a_sweep_writes_a_table_a_figure_and_the_best_network(cli):
    folder, rows, output = swept(cli, "--lr", "0.001,1,10", "--init_std", "0.01,3e38", "--seeds", "2", "--epochs", "30")
    recipes = [(float(row["lr"]), float(row["init_std"]), int(row["seed"])) for row in rows]
    assert recipes == [(lr, std, seed) for lr in (0.001, 1, 10) for std in (0.01, 3e38) for seed in (0, 1)]
    assert [row["diverged"] for row in rows] == ["False", "False", "True", "True"] * 3
    best = min((row for row in rows if row["diverged"] == "False"), key=lambda row: float(row["val_loss"]))
    best = {name: float(best[name]) for name in ("lr", "init_std", "seed", "val_loss")}
    chosen = f"lr {best['lr']:.4g}, init_std {best['init_std']:.4g}, seed {best['seed']:.0f}"
    assert f"The best by val_loss: {chosen}" in output
    code, tested, error = cli("validate", "--ckpt_path", str(folder / "best.ckpt"))
    assert (code, error) == (0, "")
    assert f"Val loss        {best['val_loss']:.4f}" in tested
    model = LitThreeSeven.load_from_checkpoint(folder / "best.ckpt")
    assert (model.hparams["lr"], model.hparams["init_std"]) == (best["lr"], best["init_std"])
    assert imread(folder / "loss.png").std() > 0.05
    runs = [path for path in folder.iterdir() if path.is_dir()]
    assert len(runs) == 12
    written = EventAccumulator(str(folder / "lr=1 init_std=0.01 seed=1")).Reload()
    assert written.Scalars("val/loss")[0].value == pytest.approx(float(rows[5]["val_loss"]))


def test_a_sweep_of_mini_batches_calls_no_network_diverged_that_learns(cli):
    slowly = ("--lr", "0.0001", "--seeds", "16", "--batch_size", "400", "--epochs", "1")
    _, table, output = swept(cli, *slowly)
    assert "16 networks, 0 of them diverged" in output
    assert {row["diverged"] for row in table} == {"False"}


@pytest.mark.slow
def test_a_sweep_on_two_processes_ends_where_one_on_one_does(cli):
    grid = ("--lr", "0.1,1", "--seeds", "3", "--epochs", "40", "--batch_size", "5000")
    _, alone, _ = swept(cli, *grid)
    command = [sys.executable, "-m", "lit_threeseven", "sweep", *grid, "--accelerator", "cpu", "--devices", "2"]
    result = subprocess.run([*command, "--out", "two"], capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("6 networks") == 1
    both = csv.DictReader(Path("two/version_0/table.csv").read_text().splitlines())
    for one, two in zip(alone, both, strict=True):
        for name in ("val_loss", "val_accuracy", "train_loss", "train_accuracy"):
            assert float(one[name]) == pytest.approx(float(two[name]), abs=1e-5)


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        (["--seeds", "0"], "Give at least one network"),
        (["--lr", "1,0.1,1.0"], "none twice; got 3, 2 different"),
        (["--lr", "1,-1"], "lr must be a finite float32 above 0, got -1.0"),
        (["--init_std", "0"], "init_std must be a finite float32 above 0, got 0.0"),
        (["--epochs", "0"], "--epochs must be at least 1, got 0"),
        (["--val_fraction", "1"], "val_fraction must be from 0 to less than 1, got 1.0"),
        (["--devices", "x"], "devices.* should be an int > 0"),
        (["--seeds", "200000000"], "200,000,000 networks at once take .* GB, and .* GB are free: .* would fit"),
        (["--lr", ","], "argument --lr: invalid numbers value: ','"),
    ],
)
def test_a_grid_that_can_t_be_trained_is_refused_in_a_sentence(args, sentence, cli):
    code, output, error = cli("sweep", *args)
    assert (code, output) == (1, "")
    assert re.search(sentence, error)
    assert "\n" not in error
    assert list(cli.folder.iterdir()) == []


def test_how_many_networks_would_fit_is_estimated(monkeypatch):
    memory = type("Memory", (), {"available": 4 * (6 * 1000 + 3 * 784) * 4})
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
    models = [(1.0, 0.01, seed) for seed in range(5)]
    LitThreeSevenMany(models[:4], rows=1000)
    with pytest.raises(ValueError, match=r"5 networks .* 4 would fit"):
        LitThreeSevenMany(models, rows=1000)


@pytest.mark.parametrize("seed", [0, pytest.param(range(1, 10), marks=pytest.mark.slow)])
def test_the_fast_recipe_reaches_98_2_percent_on_every_seed(cli, seed):
    for number in [seed] if seed == 0 else seed:
        options = ("--seed_everything", str(number), "--data.seed", str(number))
        code, table, error = cli("--config", "fast", *options)
        assert (code, error) == (0, "")
        (accuracy,) = [line.split()[-1] for line in table.splitlines() if "accuracy" in line]
        assert float(accuracy[:-1]) >= 98.2


@pytest.mark.slow
def test_the_deep_recipe_reaches_99_6_percent_in_a_third_of_its_epochs(cli):
    epochs = [
        f"--{option}=20"
        for option in ("trainer.max_epochs", "trainer.check_val_every_n_epoch", "lr_scheduler.init_args.total_steps")
    ]
    code, table, error = cli("--config", "deep", *epochs)
    assert (code, error) == (0, "")
    (accuracy,) = [line.split()[-1] for line in table.splitlines() if "accuracy" in line]
    assert float(accuracy[:-1]) >= 99.6
