"""The progress bar on a terminal, and TensorBoard, read back from its files and in a real browser."""

import gc
import io
import os
import pty
import re
import socket
import subprocess
import sys
import time
import tracemalloc
import urllib.request
from contextlib import suppress
from functools import partial
from io import BytesIO
from pathlib import Path

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.tuner import Tuner
from matplotlib.image import imread
from processes import Job, browser
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lit_threeseven import LitThreeSeven, ThreeSevenDataModule
from lit_threeseven.watch import FitProgressBar, TensorBoardPictures, bar, figures

CURVES = ("confusion_matrix", "roc", "precision_recall")


def written(run: Path) -> EventAccumulator:
    everything = dict.fromkeys(("images", "scalars", "tensors", "histograms"), 0)
    return EventAccumulator(str(run), size_guidance=everything).Reload()


def pictures(run: Path) -> dict[str, list[int]]:
    """Name of each picture to the steps at which it was drawn; none of them may be blank."""
    events = written(run)
    for tag in events.Tags()["images"]:
        for image in events.Images(tag):
            assert imread(BytesIO(image.encoded_image_string)).std() > 0.01
    return {tag: [image.step for image in events.Images(tag)] for tag in events.Tags()["images"]}


def recipe(run: Path) -> str:
    return written(run).Tensors("recipe/text_summary")[0].tensor_proto.string_val[0].decode()


def hparams(run: Path) -> dict:
    content = written(run).PluginTagToContent("hparams")
    return HParamsPluginData.FromString(content["_hparams_/session_start_info"]).session_start_info.hparams


@pytest.fixture
def watched(trainer, tmp_path):
    """Make a Trainer with the callback on it; its run is in tmp_path / "run"."""

    def make(*callbacks, **kwargs) -> L.Trainer:
        logger = TensorBoardLogger(tmp_path, "", "run", log_graph=True, default_hp_metric=False)
        return trainer(logger=logger, callbacks=[TensorBoardPictures(), *callbacks], **kwargs)

    return make


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> tuple[Path, LitThreeSeven]:
    """A run of 23 epochs with a validation after every fourth, and its network."""
    folder = tmp_path_factory.mktemp("watched")
    model, data = LitThreeSeven(lr=0.5), ThreeSevenDataModule()
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=23,
        check_val_every_n_epoch=4,
        logger=TensorBoardLogger(folder, "", "run", log_graph=True, default_hp_metric=False),
        callbacks=[TensorBoardPictures()],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=1,
    )
    trainer.fit(model, data)
    trainer.test(model, data, verbose=False)
    return folder / "run", model


def test_a_run_shows_training_images_and_the_hardest_ones(run):
    found = pictures(run[0])
    assert found["views/train examples"] == [0]
    assert found["views/val hardest"][-1] == 19  # the last validation


def test_a_run_shows_the_weights_after_powers_of_ten_epochs_and_at_the_end(run):
    folder, model = run
    assert pictures(folder)["weights/W picture"] == [0, 9, 22]
    events = written(folder)
    assert [h.step for h in events.Histograms("weights/W")] == [0, 9, 22]
    assert [h.step for h in events.Histograms("weights/W gradient")] == [0, 9, 22]
    last = events.Histograms("weights/W")[-1].histogram_value
    assert last.num == 784
    assert last.max == pytest.approx(model.W.max().item())


def test_a_run_shows_the_curves_of_its_validation_and_of_its_test(run):
    found = pictures(run[0])
    for name in CURVES:
        assert found[f"views/val {name}"] == found["views/val hardest"]
        assert found[f"views/test {name}"] == [23]
    assert {"val", "test"} <= set(written(run[0]).PluginTagToContent("pr_curves"))


def test_the_graph_is_that_of_the_network_alone(run):
    names = [node.name for node in written(run[0]).Graph().node]
    assert {"LitThreeSeven/W/W", "LitThreeSeven/b/b"} <= set(names)
    assert len(names) < 30
    assert not any("auroc" in name for name in names)


def test_the_recipe_is_shown_as_text(run):
    text = recipe(run[0])
    for row in ("| lr | 0.5 |", "| optimizer | GradientDescent |", "| max_epochs | 23 |", "| init_std | 0.01 |"):
        assert row in text


def test_hyper_parameters_stand_beside_the_final_metrics(run):
    content = written(run[0]).PluginTagToContent("hparams")
    experiment = HParamsPluginData.FromString(content["_hparams_/experiment"]).experiment
    assert {"val/loss", "val/accuracy", "test/accuracy", "test/auroc"} <= {i.name.tag for i in experiment.metric_infos}
    assert hparams(run[0])["lr"].number_value == 0.5
    assert hparams(run[0])["val_fraction"].number_value == 0.1
    assert hparams(run[0])["optimizer"].string_value == "GradientDescent"


@pytest.mark.parametrize("scheduled", [False, True])
def test_the_recipe_names_the_optimizer_in_use_and_the_learning_rate_it_starts_with(watched, tmp_path, scheduled):
    class OwnOptimizer(LitThreeSeven):
        def configure_optimizers(self):
            adam = torch.optim.Adam(self.parameters(), lr=0.01)
            return ([adam], [torch.optim.lr_scheduler.LinearLR(adam, 0.1)]) if scheduled else adam

    watched(max_epochs=1).fit(OwnOptimizer(), ThreeSevenDataModule())
    assert "| lr | 0.01 |" in recipe(tmp_path / "run")
    assert "| optimizer | Adam |" in recipe(tmp_path / "run")
    assert hparams(tmp_path / "run")["lr"].number_value == 0.01
    assert hparams(tmp_path / "run")["optimizer"].string_value == "Adam"


@pytest.mark.parametrize("precision", ["64-true", "bf16-true", "16-true", "bf16-mixed"])
def test_all_pictures_are_there_in_every_precision(watched, tmp_path, precision):
    model, data = LitThreeSeven(), ThreeSevenDataModule()
    run = watched(max_epochs=1, precision=precision)
    run.fit(model, data)
    run.test(model, data, verbose=False)
    expected = {f"views/{stage} {name}" for stage in ("val", "test") for name in CURVES}
    assert set(pictures(tmp_path / "run")) == expected | {
        "views/val hardest",
        "views/train examples",
        "weights/W picture",
    }
    events = written(tmp_path / "run")
    assert {"weights/W", "weights/W gradient"} == set(events.Tags()["histograms"])
    assert set(events.PluginTagToContent("pr_curves")) == {"val", "test"}
    assert events.Tags()["graph"]


class Someone(L.LightningModule):
    """Someone's classifier: it has neither `W` nor `digits`, and its steps return losses."""

    def __init__(self) -> None:
        super().__init__()
        self.network = nn.Linear(5, 10)

    def training_step(self, batch, batch_idx):
        x, y = batch
        return nn.functional.cross_entropy(self.network(x), y)

    validation_step = test_step = training_step

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters())


@pytest.mark.parametrize("validated", [True, False])
def test_for_any_other_module_only_the_recipe_is_shown(watched, tmp_path, recwarn, validated):
    loader = DataLoader(TensorDataset(torch.rand(20, 5), torch.arange(20) % 10), batch_size=8)
    run, model = watched(max_epochs=1), Someone()
    run.fit(model, loader, loader if validated else None)
    run.test(model, loader, verbose=False)
    assert pictures(tmp_path / "run") == {}
    assert "| optimizer | Adam |" in recipe(tmp_path / "run")
    assert not [warning for warning in recwarn if "pictures" in str(warning.message)]


def test_drawing_does_not_change_training(trainer, watched):
    weights = []
    for make in (trainer, watched):
        L.seed_everything(0, verbose=False)
        model = LitThreeSeven()
        make(max_epochs=2).fit(model, ThreeSevenDataModule(batch_size=4000, val_fraction=0))
        weights.append(model.state_dict())
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


@pytest.mark.parametrize("batch_size", [None, 5000])
def test_without_validation_data_only_weights_and_training_images_are_drawn(watched, tmp_path, batch_size):
    data = ThreeSevenDataModule(val_fraction=0, batch_size=batch_size)
    watched(max_epochs=12, check_val_every_n_epoch=5).fit(LitThreeSeven(), data)
    steps = [0, 9, 11] if batch_size is None else [2, 29, 35]
    assert pictures(tmp_path / "run") == {"views/train examples": [0], "weights/W picture": steps}


def test_a_run_that_ends_early_shows_what_it_ended_with(watched, tmp_path):
    class Enough(L.Callback):
        def on_validation_end(self, trainer, pl_module):
            trainer.should_stop = trainer.current_epoch == 5

    watched(Enough(), max_epochs=1000, check_val_every_n_epoch=2).fit(LitThreeSeven(), ThreeSevenDataModule())
    found = pictures(tmp_path / "run")
    assert found["weights/W picture"] == [0, 5]
    assert found["views/val hardest"] == found["views/val roc"] == [5]


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


def test_numbers_of_a_confusion_matrix_stand_out_from_their_background():
    said = torch.full((10, 1), 0.9)  # everything is a three
    y = torch.tensor([[1.0]] * 6 + [[0.0]] * 4)
    numbers = {text.get_text(): text.get_color() for text in figures.quality("confusion_matrix", said, y).axes[0].texts}
    assert numbers == {"6": "white", "4": "white", "0": figures.INK}


def test_your_own_dataloaders_are_drawn_too(watched, tmp_path):
    x, y = torch.rand(40, 28, 28), torch.arange(40.0).remainder(2).unsqueeze(1)
    loader = DataLoader(TensorDataset(x, y), batch_size=16)
    watched(max_epochs=1).fit(LitThreeSeven(), loader, loader)
    assert {
        "views/train examples",
        "weights/W picture",
        "views/val hardest",
        *(f"views/val {name}" for name in CURVES),
    } == set(pictures(tmp_path / "run"))


def test_a_run_survives_validation_by_steps_and_validation_steps_that_return_nothing(watched, tmp_path):
    class Silent(LitThreeSeven):
        def validation_step(self, batch, batch_idx):
            super().validation_step(batch, batch_idx)

    run = watched(max_steps=9, val_check_interval=3, check_val_every_n_epoch=None)
    run.fit(Silent(), ThreeSevenDataModule(batch_size=2000))
    assert run.global_step == 9
    found = pictures(tmp_path / "run")
    assert not any(name.startswith("val/") for name in found)
    assert found["weights/W picture"] == [5, 8]  # after the first epoch, and in the middle of the second
    assert len(written(tmp_path / "run").Scalars("val/loss")) == 3


def test_the_hardest_images_are_those_with_the_highest_loss(watched, monkeypatch):
    drawn = {}
    draw = figures.images
    monkeypatch.setattr(figures, "images", lambda x, c, title: drawn.update({title: (x, c)}) or draw(x, c, title))
    model, data = LitThreeSeven(), ThreeSevenDataModule(batch_size=500)
    watched(max_epochs=1).fit(model, data)
    x, captions = drawn["The highest losses, and the probability of a 3"]
    images, y = data.val.tensors
    expected = images.flatten(1) / 255
    probability = model(expected).detach()
    order = (probability - y).abs().squeeze(1).argsort(descending=True)[:12]
    assert torch.equal(x, expected[order])
    assert captions[0] == f"is a {3 if y[order[0]] else 7}\nsays {probability[order[0]].item():.2f}"


@pytest.mark.slow
def test_only_the_first_process_writes_and_all_rows_are_drawn(cli, tmp_path):
    options = ("--trainer.max_epochs", "2", "--data.batch_size", "5000")
    job = Job(tmp_path / "several", *options, processes=2)
    cli(*options)
    job.run()
    one, several = (folder / "logs" / "version_0" for folder in (cli.folder, tmp_path / "several"))
    assert pictures(one) == pictures(several)
    assert len(list(several.glob("events*"))) == len(list(one.glob("events*")))
    for tag in ("views/val hardest", "views/test confusion_matrix"):
        images = [written(run).Images(tag)[0].encoded_image_string for run in (one, several)]
        assert images[0] == images[1]


def test_a_resumed_run_continues_the_same_pictures(cli):
    cli("fit", "--trainer.max_epochs", "9")
    cli("fit", "--trainer.max_epochs", "12", "--ckpt_path", "last")
    found = pictures(cli.folder / "logs/version_0")
    assert found["views/train examples"] == [0]
    assert found["weights/W picture"] == [0, 8, 9, 11]


@pytest.mark.parametrize("logger", [False, "csv"])
def test_without_tensorboard_nothing_is_drawn_or_said(trainer, tmp_path, logger, recwarn):
    logger = CSVLogger(tmp_path) if logger else False
    run = trainer(logger=logger, callbacks=[TensorBoardPictures()], max_epochs=3)
    run.fit(LitThreeSeven(), ThreeSevenDataModule())
    assert run.global_step == 3
    assert not list(tmp_path.rglob("events*"))
    assert not [warning for warning in recwarn if "TensorBoard" in str(warning.message)]


def test_a_picture_that_fails_is_reported_once_and_all_others_are_there(watched, monkeypatch, tmp_path):
    quality = figures.quality
    monkeypatch.setattr(figures, "weights", lambda *args: 1 / 0)
    monkeypatch.setattr(figures, "quality", lambda kind, *args: 1 / (kind != "roc") and quality(kind, *args))
    model, data, run = LitThreeSeven(), ThreeSevenDataModule(), watched(max_epochs=12)
    with pytest.warns(UserWarning, match="There will be no more pictures") as told:
        run.fit(model, data)
    messages = [str(warning.message) for warning in told if "no more pictures" in str(warning.message)]
    assert [re.search("such as '(.*)', which failed with (.*)Error", message).groups() for message in messages] == [
        ("weights/W picture", "ZeroDivision"),
        ("views/val roc", "ZeroDivision"),
    ]
    assert run.global_step == 12
    run.test(model, data, verbose=False)
    others = {"views/train examples", "views/val hardest"}
    others |= {
        f"views/{stage} {name}" for stage in ("val", "test") for name in ("confusion_matrix", "precision_recall")
    }
    assert set(pictures(tmp_path / "run")) == others


class Screen(io.StringIO):
    """A text buffer that claims to be a terminal."""

    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


STATE = r"Training \|(.{20})\| epoch (\d+)(?: of (\d+))?(?:, loss ([\d.]+))?(?:, (\S+) left)?"


@pytest.fixture
def screen(trainer, monkeypatch):
    """Fit with the bar on a terminal; gives what was written, the states of the bar, and the Trainer."""

    def fit(
        *callbacks, network=LitThreeSeven, batch_size=None, resume=None, **options
    ) -> tuple[str, list[tuple[str, ...]], L.Trainer]:
        options |= {"enable_progress_bar": True, "callbacks": [FitProgressBar(), *callbacks]}
        run, data = trainer(**options), ThreeSevenDataModule(batch_size=batch_size)
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stderr", Screen())
            patch.setattr(bar, "tqdm", partial(bar.tqdm, mininterval=0))
            with suppress(ZeroDivisionError):
                run.fit(network(), data, ckpt_path=resume)
            text = sys.stderr.getvalue()
        return text, re.findall(STATE, text), run

    return fit


class Fails(L.Callback):
    def on_train_batch_end(self, trainer, *args):
        if trainer.global_step == 15:
            raise ZeroDivisionError


def test_one_progress_bar_over_all_epochs(screen):
    text, states, _ = screen(max_epochs=30)
    epochs = [int(epoch) for _, epoch, *_ in states]
    assert epochs == sorted(epochs)
    assert set(epochs) == set(range(1, 31))
    bar, _, of, loss, left = states[-1]
    assert (bar, of, left) == (20 * "█", "30", "00:00")
    assert 0 < float(loss) < 0.1
    assert text.count("\n") == 1  # it stays on one line


def test_a_resumed_run_s_bar_starts_where_the_run_was(screen, tmp_path):
    screen(max_epochs=5)[2].save_checkpoint(tmp_path / "saved.ckpt")
    _, states, _ = screen(max_epochs=10, resume=tmp_path / "saved.ckpt")
    assert states[0][:3] == (10 * "█" + 10 * " ", "6", "10")
    assert states[-1][:3] == (20 * "█", "10", "10")


def test_the_bar_moves_within_an_epoch(screen):
    _, states, _ = screen(max_epochs=1, batch_size=1000)
    assert {state[1:3] for state in states} == {("1", "1")}
    assert len({state[0] for state in states}) > 10


def test_the_bar_fills_up_with_steps_if_only_these_are_limited(screen):
    _, states, _ = screen(max_epochs=None, max_steps=30, batch_size=2000)
    assert states[-1][:3] == (20 * "█", "5", "")


def test_a_fit_without_limits_shows_no_time_left(screen):
    _, states, _ = screen(Fails(), max_epochs=-1)
    assert int(states[-1][1]) > 10
    assert {(of, left) for _, _, of, _, left in states} == {("", "")}


def test_the_bar_stays_where_it_was_if_a_fit_fails_and_ends_its_line(screen):
    text, states, _ = screen(Fails(), max_epochs=30)
    assert states[-1][0].count("█") in (9, 10)
    assert text.endswith("left\n")


def test_the_bar_is_shown_on_terminals_that_do_not_report_their_size(trainer, monkeypatch):
    leader, follower = pty.openpty()
    run = trainer(enable_progress_bar=True, callbacks=[FitProgressBar()])
    with monkeypatch.context() as patch, os.fdopen(follower, "w") as terminal:
        for name in ("stderr", "__stdout__"):
            patch.setattr(sys, name, terminal)
        run.fit(LitThreeSeven(), ThreeSevenDataModule())
        output = os.read(leader, 65536).decode()
    os.close(leader)
    assert re.findall(STATE, output)[-1][1:3] == ("3", "3")


def test_a_log_file_gets_a_line_for_every_tenth_of_the_run(trainer, capsys, tmp_path):
    run = trainer(enable_progress_bar=True, callbacks=[FitProgressBar()], max_epochs=40)
    run.fit(LitThreeSeven(), ThreeSevenDataModule())
    line = r"Training: epoch (\d+) of 50, loss 0\.\d{4}"
    lines = capsys.readouterr().err.splitlines()
    assert [int(re.fullmatch(r"Training: epoch (\d+) of 40, loss 0\.\d{4}", line)[1]) for line in lines] == [
        *range(4, 41, 4)
    ]
    run.save_checkpoint(tmp_path / "saved.ckpt")
    resumed = trainer(enable_progress_bar=True, callbacks=[FitProgressBar()], max_epochs=50)
    resumed.fit(LitThreeSeven(), ThreeSevenDataModule(), ckpt_path=tmp_path / "saved.ckpt")
    assert re.findall(line, capsys.readouterr().err) == ["45", "50"]


class Switches(L.Callback):
    """Switches the bar off after 10 steps, and on after 20."""

    def on_train_batch_end(self, trainer, *args):
        switch = {10: trainer.progress_bar_callback.disable, 20: trainer.progress_bar_callback.enable}
        switch.get(trainer.global_step, lambda: None)()


def test_a_bar_can_be_switched_off_and_on_in_a_fit(screen):
    text, states, run = screen(Switches(), max_epochs=30)
    assert {int(epoch) for _, epoch, *_ in states} == {*range(1, 11), *range(21, 31)}
    assert text.count("\n") == 1
    assert run.progress_bar_callback.is_enabled
    assert not run.progress_bar_callback.is_disabled


def test_a_bar_that_is_switched_off_stays_off(trainer, monkeypatch):
    run = trainer(enable_progress_bar=True, callbacks=[FitProgressBar()])
    run.progress_bar_callback.disable()
    monkeypatch.setattr(sys, "stderr", Screen())
    run.fit(LitThreeSeven(), ThreeSevenDataModule())
    assert sys.stderr.getvalue() == ""


@pytest.mark.parametrize("search", ["lr_find", "scale_batch_size"])
def test_the_bar_leaves_lightning_s_tuner_alone_and_is_back_afterwards(trainer, monkeypatch, tmp_path, search):
    monkeypatch.chdir(tmp_path)
    run = trainer(enable_progress_bar=True, callbacks=[FitProgressBar()], enable_checkpointing=True)
    monkeypatch.setattr(sys, "stderr", Screen())
    options = {"lr_find": {"num_training": 20}, "scale_batch_size": {"steps_per_trial": 1, "max_trials": 2}}
    getattr(Tuner(run), search)(LitThreeSeven(), datamodule=ThreeSevenDataModule(batch_size=2000), **options[search])
    assert "Training" not in sys.stderr.getvalue()
    assert run.progress_bar_callback.is_enabled


class Prints(LitThreeSeven):
    def on_train_epoch_end(self):
        self.print("epoch", self.current_epoch, sep="-", file=sys.stderr)


def test_a_network_prints_above_the_bar(screen, monkeypatch):
    text, states, _ = screen(max_epochs=5, network=Prints)
    assert re.findall(r"\repoch-(\d)\n\rTraining", text) == ["0", "1", "2", "3", "4"]
    assert states[-1][:3] == (20 * "█", "5", "5")


def test_every_public_method_of_lightning_s_bar_works(trainer, capsys):
    found = {}

    class Calls(L.Callback):
        def on_validation_batch_start(self, trainer, pl_module, *args):
            own = trainer.progress_bar_callback
            own.has_dataloader_changed(0)
            others = ("_", "setup", "print", "total_test", "total_predict")  # called by Lightning, tested, not of a fit
            names = [name for name in vars(ProgressBar) if not name.startswith(others)]
            arguments = {"get_metrics": (trainer, pl_module), "has_dataloader_changed": (0,)}
            for name in sorted(names, key="reset_dataloader_idx_tracker".__eq__):
                value = getattr(own, name)
                found[name] = value(*arguments.get(name, ())) if callable(value) else value

    run = trainer(enable_progress_bar=True, callbacks=[FitProgressBar(), Calls()], max_epochs=1)
    run.fit(LitThreeSeven(), ThreeSevenDataModule(batch_size=2000))
    assert found["total_train_batches"] == 6
    assert found["total_val_batches_current_dataloader"] == 1
    assert found["get_metrics"] == {}


@pytest.mark.slow
def test_memory_stays_flat_over_epochs(watched):
    sizes = {}

    class Watch(L.Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            if trainer.current_epoch + 1 in (200, 599):
                gc.collect()
                sizes[trainer.current_epoch + 1] = tracemalloc.get_traced_memory()[0]

    tracemalloc.start()
    try:
        watched(Watch(), max_epochs=600, log_every_n_steps=20, check_val_every_n_epoch=20).fit(
            LitThreeSeven(), ThreeSevenDataModule()
        )
    finally:
        tracemalloc.stop()
    assert sizes[599] - sizes[200] < 80_000
    gc.collect()
    assert not [thing for thing in gc.get_objects() if type(thing).__name__ == "Figure"]


@pytest.mark.slow
def test_tensorboard_in_a_browser_shows_this_run(cli, tmp_path):
    """Screenshots stay in the folder `browser` of the test's own temporary folder."""
    for seed in ("0", "1"):
        cli("--trainer.max_epochs", "100", "--seed_everything", seed)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    address = f"http://127.0.0.1:{port}"
    program = [str(Path(sys.executable).with_name("tensorboard")), "--logdir", "logs", "--port", str(port)]
    shots = tmp_path / "browser"
    shots.mkdir()
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
            with browser() as chromium:
                page = chromium.new_page(viewport={"width": 1500, "height": 1100})
                page.set_default_timeout(60_000)

                def visit(tab: str, expected: str, count: int = 1) -> None:
                    page.goto(f"{address}/#{tab}")
                    page.reload()
                    page.locator(expected).nth(count - 1).wait_for()
                    page.wait_for_timeout(1000)
                    page.screenshot(path=shots / f"{tab}.png")

                visit("timeseries", "card-view", 3)
                page.get_by_role("combobox", name="Filter tags (regex)").fill("train/loss|val/accuracy|W picture")
                page.keyboard.press("Escape")  # closes the suggestions that cover the charts
                page.locator("image-card img").first.wait_for()
                lines = page.locator("scalar-card .series-view path")
                lines.nth(7).wait_for(state="attached")  # of two charts and two runs, as measured and smoothed
                page.wait_for_timeout(1000)
                assert all(line.count("L") >= 4 for line in lines.evaluate_all("p => p.map(x => x.getAttribute('d'))"))
                for tag in ("train/loss", "val/accuracy", "weights/W picture"):
                    assert page.get_by_title(tag).count(), tag
                page.screenshot(path=shots / "timeseries.png")

                visit("images", "tf-image-loader img", 6)
                shown = page.locator("tf-image-loader").evaluate_all("cards => cards.map(card => card.tag)")
                assert {f"views/test {name}" for name in CURVES} <= set(shown)
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

                visit("graphs", "tf-graph-scene g.node", 3)
                names = page.locator("tf-graph-scene g.node").evaluate_all("n => n.map(x => x.dataset.name)")
                assert "LitThreeSeven" in names
                page.locator("tf-graph-scene g.node[data-name=LitThreeSeven]").first.dblclick()
                for name in ("LitThreeSeven/W", "LitThreeSeven/b"):
                    page.locator(f'tf-graph-scene g.node[data-name="{name}"]').first.wait_for()
                page.wait_for_timeout(1000)
                page.screenshot(path=shots / "graphs.png")
                chromium.close()
        finally:
            server.terminate()
    assert all(
        imread(shots / f"{tab}.png").std() > 0.05 for tab in ("timeseries", "images", "pr_curves", "hparams", "graphs")
    )


@pytest.mark.parametrize(("network", "rows"), [(LitThreeSeven, ["W (784, 1) 784", "b (1,) 1", "in all 785"])])
def test_lightning_s_summary_lists_the_parameters_by_name(trainer, capsys, network, rows):
    run = trainer(enable_model_summary=True)
    for _ in range(2):
        run.fit(network(), ThreeSevenDataModule())
        lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
        assert lines == ["Parameter Shape Numbers", *rows]
