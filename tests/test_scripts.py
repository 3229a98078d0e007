import re
from pathlib import Path

import benchmark
import pytest
import torch
from matplotlib.image import imread
from torchvision.datasets import MNIST

from lit_threeseven import LitThreeSeven, ThreeSevenDataModule, dataset
from lit_threeseven.watch import figures

SCRIPTS = Path(__file__).parents[1] / "scripts"


def contents(root: Path) -> dict[str, bytes]:
    return {name: (dataset.raw_folder(root) / name).read_bytes() for name in dataset.FILES}


def test_bundle_is_made_of_the_threes_and_sevens_of_a_full_root(script, small_mnist, tmp_path, monkeypatch):
    monkeypatch.setattr(dataset, "BUNDLED_ROOT", tmp_path / "bundled")
    code, output = script("build_bundle.py", small_mnist)
    assert code == 1  # the checksums are not those of the shipped bundle
    assert output.count("DIFFERS") == 4
    first = contents(tmp_path / "bundled")
    made, full = MNIST(tmp_path / "bundled", train=True), MNIST(small_mnist, train=True)
    chosen = (full.targets == 3) | (full.targets == 7)
    assert torch.equal(made.data, full.data[chosen])
    assert torch.equal(made.targets, full.targets[chosen])
    script("build_bundle.py", small_mnist)
    assert contents(tmp_path / "bundled") == first


def test_bundle_check_accepts_the_shipped_files_and_no_others(script, small_mnist):
    shipped = contents(dataset.BUNDLED_ROOT)
    code, output = script("build_bundle.py", dataset.BUNDLED_ROOT, "--check")  # the bundle can stand in for a full root
    assert code == 0
    assert output.count("as shipped") == 4
    code, output = script("build_bundle.py", small_mnist, "--check")
    assert code == 1
    assert output.count("DIFFERS") == 4
    assert contents(dataset.BUNDLED_ROOT) == shipped


def test_building_the_bundle_from_a_folder_without_mnist_is_refused_in_a_sentence(script, tmp_path):
    code, output = script("build_bundle.py", tmp_path)
    assert code == 1
    assert "No such file" in output


def test_article_starts_are_those_of_the_article_s_recipe(script, cli):
    code, output = script("article_starts.py", "--starts", 2, "--epochs", 20)
    assert code == 0
    losses = dict(re.findall(r"^ +(\d)  (0\.\d{4})  [\d.]+%$", output, re.MULTILINE))
    assert list(losses) == ["0", "1"]
    for seed in losses:
        options = (
            "--seed_everything",
            seed,
            "--trainer.max_epochs",
            "20",
            "--trainer.default_root_dir",
            seed,
        )
        cli("fit", "--config", "article", *options)
        checkpoint = torch.load(f"{seed}/logs/version_0/checkpoints/last.ckpt", weights_only=True)
        model = LitThreeSeven(init_std=1.0)
        model.load_state_dict(checkpoint["state_dict"])
        images, y = dataset.load(dataset.BUNDLED_ROOT, (3, 7), train=True)
        loss = ((model(images.flatten(1) / 255) - y) ** 2).mean().item()
        assert float(losses[seed]) == pytest.approx(loss, abs=2e-4)


def test_weights_of_a_checkpoint_can_be_drawn(script, cli):
    cli("fit", "--trainer.max_epochs", "5")
    code, _ = script("draw_weights.py", "logs/version_0/checkpoints/best.ckpt", "weights.png")
    assert code == 0
    picture = imread("weights.png")
    assert min(picture.shape[:2]) > 300
    assert picture.std() > 0.05


def test_a_checkpoint_that_can_t_be_drawn_is_named_in_a_sentence(script, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("text.ckpt").write_text("no checkpoint")
    torch.save({"state_dict": {"weight": torch.zeros(3)}}, "other.ckpt")
    for name, sentence in {
        "none.ckpt": "No such file or directory: 'none.ckpt'",
        "text.ckpt": "text.ckpt is not a lit-threeseven checkpoint, or is truncated",
        "other.ckpt": "other.ckpt can't be used: The checkpoint holds a network with weight (3,)",
    }.items():
        code, output = script("draw_weights.py", name, "weights.png")
        assert code == 1
        assert sentence in output
        assert "\n" not in output
    assert not Path("weights.png").exists()


def test_a_picture_that_can_t_be_written_is_reported_in_a_sentence(script, tmp_path, trainer):
    run = trainer(max_epochs=1)
    run.fit(LitThreeSeven(), ThreeSevenDataModule())
    run.save_checkpoint(tmp_path / "model.ckpt")
    code, output = script("draw_weights.py", tmp_path / "model.ckpt", tmp_path / "absent" / "weights.png")
    assert code == 1
    assert output.startswith("The picture could not be written: ")


def test_benchmark_names_the_targets_that_are_missed(capsys):
    met = {name: target * 0.99 for name, target in benchmark.TARGETS.items()}
    assert benchmark.report({"a  row": 0.001}, met | {"without a target": 1e9}, quick=False) == 0
    assert capsys.readouterr().err == ""
    missed = "main recipe / article's loop, from memory"
    assert benchmark.report({}, met | {missed: 0.7}, quick=False) == 1
    assert capsys.readouterr().err == f"\nMissed targets:\n  {missed}: 0.700, at most 0.650\n"


def test_a_quick_benchmark_shows_the_targets_and_judges_nothing(capsys):
    assert benchmark.report({}, {"main recipe / usual way": 9.0}, quick=True) == 0
    output = capsys.readouterr()
    assert re.search(r"main recipe / usual way +9.000 +0.025", output.out)
    assert output.err == ""


def test_a_figure_that_is_not_a_number_misses_its_target():
    assert benchmark.missed({"main recipe / usual way": float("nan")}) != []


def test_weights_are_drawn_in_a_palette_centred_on_zero():
    W = torch.linspace(-1, 3, 784).reshape(784, 1)
    figure = figures.weights(W, (1, 8))
    image = figure.axes[0].images[0]
    assert (image.get_array()[:, :28] == W.reshape(28, 28).numpy()).all()  # the rest is the colour bar
    assert (image.norm.vmin, image.norm.vmax) == (-3, 3)
    assert "1" in figure.axes[0].get_title()


@pytest.mark.slow
def test_tour_goes_through_every_step(script, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, output = script("tour.py", "--out", tmp_path / "tour")
    assert code == 0
    for fact in ("threes (6131, 28, 28), sevens (6265, 28, 28)", "x (12396, 784)", "test set: 1,010 threes"):
        assert fact in output
    for other in ("the formula", "the Trainer's step"):
        assert float(re.search(rf"largest difference from {other} (\S+)", output)[1]) < 1e-5
    assert float(re.search(r"test images are right: ([\d.]+)%", output)[1]) >= 98.2
    pictures = {path.stem: imread(path) for path in (tmp_path / "tour").iterdir()}
    expected = {"digits", "numbers", "sigmoid", "loss", "W", "confusion_matrix", "threshold"}
    assert pictures.keys() == expected
    assert all(picture.std() > 0.05 for picture in pictures.values())


def test_tour_is_a_notebook_in_the_percent_format():
    cells = re.split(r"^# %%", (SCRIPTS / "tour.py").read_text(), flags=re.MULTILINE)
    assert cells[0] == ""
    prose = [cell for cell in cells if cell.startswith(" [markdown]")]
    assert len(prose) > 10
    assert all(line.startswith("#") for cell in prose for line in cell.strip().splitlines()[1:])
