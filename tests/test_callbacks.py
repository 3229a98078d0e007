"""What TensorBoard is given: read back from its files, and looked at in a real browser."""

import gc
import shutil
import socket
import subprocess
import sys
import time
import tracemalloc
import urllib.request
from io import BytesIO
from pathlib import Path

import lightning as L
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from matplotlib.image import imread
from processes import Job
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
from torch.utils.data import DataLoader, TensorDataset

from lit_threeseven import LitThreeSeven, ThreeSevenDataModule, figures
from lit_threeseven.callbacks import TensorBoardPictures
from lit_threeseven.dataset import flatten

CURVES = ("confusion_matrix", "roc", "precision_recall")


def written(run: Path) -> EventAccumulator:
    everything = dict.fromkeys(("images", "scalars", "tensors", "histograms"), 0)
    return EventAccumulator(str(run), size_guidance=everything).Reload()


def pictures(run: Path) -> dict[str, list[int]]:
    """Name of each picture to the steps at which there is one; all of them must be readable."""
    events = written(run)
    for tag in events.Tags()["images"]:
        for image in events.Images(tag):
            assert imread(BytesIO(image.encoded_image_string)).std() > 0.01
    return {tag: [image.step for image in events.Images(tag)] for tag in events.Tags()["images"]}


@pytest.fixture
def watched(trainer, tmp_path):
    """Make a Trainer of one's own with the callback on it; its run is in tmp_path / "run"."""

    def make(*callbacks, **kwargs) -> L.Trainer:
        logger = TensorBoardLogger(tmp_path, name="", version="run", default_hp_metric=False)
        return trainer(logger=logger, callbacks=[TensorBoardPictures(), *callbacks], **kwargs)

    return make


def test_a_run_shows_weights_images_and_curves(watched, tmp_path):
    model, data = LitThreeSeven(), ThreeSevenDataModule()
    run = watched(max_epochs=23, check_val_every_n_epoch=4)
    run.fit(model, data)
    run.test(model, data, verbose=False)
    found = pictures(tmp_path / "run")
    assert found["train/examples"] == [0]
    assert found["W/picture"] == [0, 9, 22]
    assert found["val/hardest"][-1] == 19  # the last validation
    for name in CURVES:
        assert found[f"val/{name}"] == found["val/hardest"]
        assert found[f"test/{name}"] == [23]
    events = written(tmp_path / "run")
    assert [h.step for h in events.Histograms("W/weights")] == [0, 9, 22]
    assert [h.step for h in events.Histograms("W/gradient")] == [0, 9, 22]
    last = events.Histograms("W/weights")[-1].histogram_value
    assert last.num == 784
    assert last.max == pytest.approx(model.W.max().item())
    assert events.Tags()["graph"]
    assert {"val", "test"} <= set(events.PluginTagToContent("pr_curves"))
    text = events.Tensors("recipe/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "| lr | 1.0 |" in text
    assert "| max_epochs | 23 |" in text


def test_hyper_parameters_stand_with_the_final_metrics(watched, tmp_path):
    model, data = LitThreeSeven(lr=0.5), ThreeSevenDataModule(batch_size=4000)
    watched(max_epochs=1).fit(model, data)
    content = written(tmp_path / "run").PluginTagToContent("hparams")
    experiment = HParamsPluginData.FromString(content["_hparams_/experiment"]).experiment
    metrics = {info.name.tag for info in experiment.metric_infos}
    assert {"val/loss", "val/accuracy", "test/accuracy", "test/auroc"} <= metrics
    start = HParamsPluginData.FromString(content["_hparams_/session_start_info"]).session_start_info
    assert start.hparams["lr"].number_value == 0.5
    assert start.hparams["batch_size"].number_value == 4000
    assert start.hparams["optimizer"].string_value == "SGD"


def test_pictures_in_between_are_left_out_where_time_is_short(watched, trainer, tmp_path):
    options = {"max_epochs": 102, "check_val_every_n_epoch": 2}
    watched(**options).fit(LitThreeSeven(), ThreeSevenDataModule())
    assert pictures(tmp_path / "run")["val/roc"][-1] == 101
    logger = TensorBoardLogger(tmp_path, name="", version="all")
    trainer(logger=logger, callbacks=[TensorBoardPictures(share=1.0)], **options).fit(
        LitThreeSeven(), ThreeSevenDataModule()
    )
    assert pictures(tmp_path / "all")["val/roc"] == [9, 99, 101]


@pytest.mark.parametrize("batch_size", [None, 5000])
def test_without_validation_data_training_images_are_drawn(watched, tmp_path, batch_size):
    data = ThreeSevenDataModule(val_fraction=0, batch_size=batch_size)
    watched(max_epochs=12, check_val_every_n_epoch=5).fit(LitThreeSeven(), data)
    found = pictures(tmp_path / "run")
    steps = [0, 9, 11] if batch_size is None else [2, 29, 35]
    assert found["train/hardest"] == found["train/roc"] == found["W/picture"] == steps
    assert not any(name.startswith("val/") for name in found)


def test_a_run_that_ends_early_shows_what_it_ended_with(watched, tmp_path):
    class Enough(L.Callback):
        def on_validation_end(self, trainer, pl_module):
            trainer.should_stop = trainer.current_epoch == 5

    watched(Enough(), max_epochs=1000, check_val_every_n_epoch=2).fit(LitThreeSeven(), ThreeSevenDataModule())
    found = pictures(tmp_path / "run")
    assert found["W/picture"] == [0, 5]
    assert found["val/hardest"] == found["val/roc"] == [5]


def test_a_validation_after_a_fit_that_failed_is_not_drawn(watched, tmp_path):
    class Fails(L.Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            if trainer.current_epoch == 8:
                raise ZeroDivisionError

    model, data, run = LitThreeSeven(), ThreeSevenDataModule(), watched(Fails(), max_epochs=20)
    with pytest.raises(ZeroDivisionError):
        run.fit(model, data)
    run.validate(model, data, verbose=False)
    assert not any(name.startswith("val/") for name in pictures(tmp_path / "run"))


def test_numbers_of_a_confusion_matrix_stand_out_from_their_ground():
    said = torch.full((10, 1), 0.9)  # everything is a three
    y = torch.tensor([[1.0]] * 6 + [[0.0]] * 4)
    numbers = {text.get_text(): text.get_color() for text in figures.confusion_matrix(said, y).axes[0].texts}
    assert numbers == {"6": "white", "4": "white", "0": figures.INK}


def test_dataloaders_of_one_s_own_are_drawn_too(watched, tmp_path):
    x, y = torch.rand(40, 28, 28), torch.arange(40.0).remainder(2).unsqueeze(1)
    loader = DataLoader(TensorDataset(x, y), batch_size=16)
    watched(max_epochs=1).fit(LitThreeSeven(), loader, loader)
    assert {"train/examples", "W/picture", "val/hardest", *(f"val/{name}" for name in CURVES)} == set(
        pictures(tmp_path / "run")
    )


def test_validation_by_steps_and_steps_that_give_nothing_break_no_run(watched, tmp_path):
    class Silent(LitThreeSeven):
        def validation_step(self, batch, batch_idx):
            super().validation_step(batch, batch_idx)

    run = watched(max_steps=9, val_check_interval=3, check_val_every_n_epoch=None)
    run.fit(Silent(), ThreeSevenDataModule(batch_size=2000))
    assert run.global_step == 9
    assert not any(name.startswith("val/") for name in pictures(tmp_path / "run"))
    assert len(written(tmp_path / "run").Scalars("val/loss")) == 3


def test_the_hardest_images_are_those_with_the_highest_loss(watched, monkeypatch):
    drawn = {}
    draw = figures.images
    monkeypatch.setattr(figures, "images", lambda x, c, title: drawn.update({title: (x, c)}) or draw(x, c, title))
    model, data = LitThreeSeven(), ThreeSevenDataModule(batch_size=500)
    watched(max_epochs=1).fit(model, data)
    x, captions = drawn["The highest losses, and the probability of a 3"]
    expected = flatten(data.val.images)
    probability = model(expected).detach()
    order = (probability - data.val.y).abs().squeeze(1).argsort(descending=True)[:12]
    assert torch.equal(x, expected[order])
    assert captions[0] == f"is a {3 if data.val.y[order[0]] else 7}\nsays {probability[order[0]].item():.2f}"


def test_only_the_first_process_writes_and_all_rows_are_drawn(tmp_path):
    options = ("--trainer.max_epochs", "10", "--data.batch_size", "5000")
    for processes in (1, 3):
        Job(tmp_path / str(processes), *options, processes=processes).run()
    one, three = (tmp_path / name / "logs" / "version_0" for name in ("1", "3"))
    assert pictures(one) == pictures(three)
    assert len(list(three.glob("events*"))) == len(list(one.glob("events*")))
    images = [written(run).Images("test/confusion_matrix")[0].encoded_image_string for run in (one, three)]
    assert images[0] == images[1]


def test_a_resumed_run_continues_the_same_pictures(cli):
    cli("fit", "--trainer.max_epochs", "9")
    cli("fit", "--trainer.max_epochs", "12", "--ckpt_path", "last")
    found = pictures(cli.folder / "logs/version_0")
    assert found["train/examples"] == [0]
    assert found["W/picture"] == [0, 8, 9, 11]


@pytest.mark.parametrize("logger", [False, "csv"])
def test_without_tensorboard_nothing_is_drawn_or_said(trainer, tmp_path, logger, recwarn):
    logger = CSVLogger(tmp_path) if logger else False
    run = trainer(logger=logger, callbacks=[TensorBoardPictures()], max_epochs=3)
    run.fit(LitThreeSeven(), ThreeSevenDataModule())
    assert run.global_step == 3
    assert not list(tmp_path.rglob("events*"))
    assert not [warning for warning in recwarn if "TensorBoard" in str(warning.message)]


def test_a_picture_that_fails_is_told_once_and_does_not_end_the_run(watched, monkeypatch, tmp_path):
    monkeypatch.setattr(figures, "weights", lambda *args: 1 / 0)
    with pytest.warns(
        UserWarning, match="No more pictures for TensorBoard: weights failed with ZeroDivisionError"
    ) as told:
        watched(max_epochs=12).fit(LitThreeSeven(), ThreeSevenDataModule())
    assert sum("No more pictures" in str(warning.message) for warning in told) == 1
    assert "val/loss" in written(tmp_path / "run").Tags()["scalars"]


@pytest.mark.slow
def test_memory_stays_flat_over_2000_epochs(watched):
    sizes = {}

    class Watch(L.Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            if trainer.current_epoch + 1 in (1000, 1999):
                gc.collect()
                sizes[trainer.current_epoch + 1] = tracemalloc.get_traced_memory()[0]

    tracemalloc.start()
    try:
        watched(Watch(), max_epochs=2000, log_every_n_steps=20, check_val_every_n_epoch=20).fit(
            LitThreeSeven(), ThreeSevenDataModule()
        )
    finally:
        tracemalloc.stop()
    assert sizes[1999] - sizes[1000] < 200_000
    gc.collect()
    assert not [thing for thing in gc.get_objects() if type(thing).__name__ == "Figure"]


@pytest.mark.slow
def test_tensorboard_in_a_browser_shows_this_run(cli, tmp_path):
    """Screenshots stay in the folder `browser` of the test's own temporary folder."""
    from playwright.sync_api import sync_playwright

    for seed in ("0", "1"):
        cli("--trainer.max_epochs", "100", "--seed_everything", seed)
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    assert chromium, "this test looks at TensorBoard in Chromium, which is not there; install it"
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    address = f"http://127.0.0.1:{port}"
    program = [str(Path(sys.executable).with_name("tensorboard")), "--logdir", "logs", "--port", str(port)]
    shots = tmp_path / "browser"
    shots.mkdir()
    # without WebGL, TensorBoard draws its lines as SVG, which can be looked into
    quiet = (
        "--no-sandbox",
        "--disable-gpu",
        "--disable-webgl",
        "--disable-3d-apis",
        "--disable-quic",
        "--disable-background-networking",
        "--disable-sync",
    )
    with subprocess.Popen(
        [*program, "--host", "127.0.0.1"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as server:
        try:
            deadline = time.monotonic() + 60
            while True:
                try:
                    urllib.request.urlopen(address, timeout=5).close()
                    break
                except OSError:
                    assert time.monotonic() < deadline
                    time.sleep(0.3)
            with sync_playwright() as playwright:
                browser = playwright.chromium.launch(executable_path=chromium, args=list(quiet))
                page = browser.new_page(viewport={"width": 1500, "height": 1100})
                page.set_default_timeout(60_000)

                def visit(tab: str, expected: str, count: int = 1) -> None:
                    page.goto(f"{address}/#{tab}")
                    page.reload()
                    page.locator(expected).nth(count - 1).wait_for()
                    page.wait_for_timeout(1000)
                    page.screenshot(path=shots / f"{tab}.png")

                visit("timeseries", "card-view", 4)
                page.get_by_role("combobox", name="Filter tags (regex)").fill("train/loss|val/accuracy|W/picture")
                page.keyboard.press("Escape")  # the proposals that cover the charts
                page.locator("image-card img").first.wait_for()
                lines = page.locator("scalar-card .series-view path")
                lines.nth(7).wait_for(state="attached")  # of two charts and two runs, as measured and smoothed
                page.wait_for_timeout(1000)
                assert all(line.count("L") >= 4 for line in lines.evaluate_all("p => p.map(x => x.getAttribute('d'))"))
                for tag in ("train/loss", "val/accuracy", "W/picture"):
                    assert page.get_by_title(tag).count(), tag
                page.screenshot(path=shots / "timeseries.png")

                visit("images", "tf-image-loader img", 6)
                shown = page.locator("tf-image-loader").evaluate_all("cards => cards.map(card => card.tag)")
                assert {f"test/{name}" for name in CURVES} <= set(shown)
                widths = page.locator("tf-image-loader img").evaluate_all("images => images.map(i => i.naturalWidth)")
                assert min(widths[:6]) > 300

                visit("pr_curves", "tf-pr-curve-card path.line", 4)  # two runs at validation, and at the test
                cards = page.locator("tf-pr-curve-card").evaluate_all("cards => cards.map(card => card.tag)")
                assert set(cards) == {"val", "test"}
                lines = page.locator("tf-pr-curve-card path.line").evaluate_all("p => p.map(x => x.getAttribute('d'))")
                assert all(line.count("L") > 10 for line in lines)

                visit("hparams", "tf-hparams-table-view vaadin-grid-cell-content", 4)
                table = page.locator("tf-hparams-table-view vaadin-grid-cell-content").all_text_contents()
                for word in ("version_0", "version_1", "batch_size", "val/loss"):
                    assert any(word in cell for cell in table), word
                browser.close()
        finally:
            server.terminate()
    assert all(imread(shots / f"{tab}.png").std() > 0.05 for tab in ("timeseries", "images", "pr_curves", "hparams"))
