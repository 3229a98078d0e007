import csv
import io
import json
import os
import pickle
import pty
import re
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import drawn
import lightning as L
import lightning.pytorch.core.saving as saving
import numpy as np
import psutil
import pytest
import torch
from matplotlib.image import imread
from PIL import Image, ImageDraw

from lit_threeseven import LitThreeSeven, ThreeSevenDataModule, dataset
from lit_threeseven.checkpoints import WholeCheckpointIO
from lit_threeseven.commands import recognize
from lit_threeseven.commands.recognize import usual
from lit_threeseven.networks import LitThreeSevenMLP, load
from lit_threeseven.use import explain
from lit_threeseven.use.files import find, read
from lit_threeseven.use.find import BLOTTED, UNLIKE, nearest
from lit_threeseven.use.find import find as look
from lit_threeseven.weights import PRETRAINED
from lit_threeseven.weights import read as read_checkpoint

COMMAND = str(Path(sys.executable).with_name("lit-threeseven"))


@pytest.fixture(scope="module")
def digits():
    """The second seven and the second three of the test set, as pictures of 200×200 pixels, dark on light."""
    images, y = dataset.load(dataset.BUNDLED_ROOT, (3, 7), train=False)
    found = {}
    for digit, label in ((7, 0), (3, 1)):
        image = images[y.flatten() == label][1].numpy()
        found[digit] = Image.fromarray(255 - image).resize((200, 200), Image.Resampling.BICUBIC)
    return found


@pytest.fixture
def pictures(cli, digits):
    """The command line in a folder with pictures in it."""
    for name, digit in {"a three.png": 3, "sieben é ☃.jpg": 7, "deep/er/three.GIF": 3, "deep/seven.webp": 7}.items():
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        digits[digit].save(name)
    Path("deep/notes.txt").write_text("not a picture")
    return cli


def answers(output: str) -> dict[str, dict]:
    return {row["file"]: row for row in map(json.loads, output.splitlines())}


def test_pictures_are_answered_without_a_trained_model_at_hand(pictures):
    code, output, _ = pictures("recognize", "a three.png", "sieben é ☃.jpg")
    assert code == 0
    head, *rows = output.splitlines()
    assert head.split() == ["digit", "probability", "file"]
    model = LitThreeSeven.from_pretrained()
    for row, digit, name in zip(rows, (3, 7), ("a three.png", "sieben é ☃.jpg"), strict=True):
        p = model(read(name)[0][0].image.unsqueeze(0)).item()
        assert row.split(maxsplit=2) == [str(digit), f"{max(p, 1 - p):.2%}", name]
    assert not Path("logs").exists()


def test_folders_in_folders_are_searched_for_pictures(pictures):
    code, output, _ = pictures("recognize", "--format", "jsonl", "deep", "a three.png")
    assert code == 0
    assert {name: row["digit"] for name, row in answers(output).items()} == {
        "deep/seven.webp": 7,
        "deep/er/three.GIF": 3,
        "a three.png": 3,
    }


def test_a_list_of_paths_comes_from_standard_input(pictures, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("a three.png\n\ndeep\n"))
    code, output, _ = pictures("recognize", "-", "--format", "jsonl")
    assert code == 0
    assert list(answers(output)) == ["a three.png", "deep/seven.webp", "deep/er/three.GIF"]
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    code, _, error = pictures("recognize", "-")
    assert code == 1
    assert "no pictures in the list" in error


def test_a_name_with_a_line_break_is_one_row_of_a_csv(pictures):
    Path("a three.png").rename("a\nthree.png")
    _, table, _ = pictures("recognize", "a\nthree.png", "--format", "csv")
    (row,) = csv.DictReader(io.StringIO(table, newline=""))
    assert (row["file"], row["digit"]) == ("a\nthree.png", "3")


def test_csv_and_json_lines_say_the_same(pictures):
    _, table, _ = pictures("recognize", ".", "missing.png", "--format", "csv")
    _, lines, _ = pictures("recognize", ".", "missing.png", "--format", "jsonl")
    rows = list(csv.DictReader(io.StringIO(table)))
    assert len(rows) == 5
    for row in rows:
        expected = answers(lines)[row["file"]]
        assert row == {name: "" if value is None else str(value) for name, value in expected.items()}


def test_one_s_own_checkpoint_answers_pictures_whatever_its_network_and_digits(pictures, small_mnist):
    pictures("fit", "--run", "mine", "--trainer.max_epochs", "30", "--trainer.enable_progress_bar", "false")
    code, output, _ = pictures("recognize", "--run", "mine", "a three.png", "--format", "jsonl")
    assert code == 0
    model = load("logs/mine/checkpoints/best.ckpt")
    p = model(read("a three.png")[0][0].image.unsqueeze(0)).item()
    assert answers(output)["a three.png"]["probability"] == pytest.approx(max(p, 1 - p))
    options = ["--data.source", "torchvision", "--data.data_dir", str(small_mnist), "--data.digits", "[1, 8]"]
    pictures("fit", "--run", "other", *options, "--trainer.max_epochs", "3", "--model", "LitThreeSevenMLP")
    code, output, _ = pictures("recognize", "--run", "other", "a three.png", "--format", "jsonl")
    assert code == 0
    assert answers(output)["a three.png"]["digit"] in (1, 8)


def test_the_network_with_hidden_layers_answers_too(pictures):
    code, output, _ = pictures("recognize", "--model", "LitThreeSevenMLP", "a three.png", "--format", "jsonl")
    assert code == 0
    p = LitThreeSevenMLP.from_pretrained()(read("a three.png")[0][0].image.unsqueeze(0)).item()
    assert answers(output)["a three.png"]["probability"] == pytest.approx(p)


def test_files_that_can_t_be_read_are_reported_and_the_others_go_on(pictures, digits):
    Path("empty.png").touch()
    Path("text.png").write_text("hello")
    digits[3].save("half.jpg")
    Path("half.jpg").write_bytes(Path("half.jpg").read_bytes()[:1500])
    Image.new("1", (20_000, 20_000)).save("bomb.png")
    Path("no pictures").mkdir()
    os.mkfifo("pipe.png")
    reasons = {
        "empty.png": "can't be read: it is not a picture, or is damaged",
        "text.png": "can't be read: it is not a picture, or is damaged",
        "half.jpg": "can't be read: .*truncated",
        "bomb.png": "can't be read: it has more than 89,478,485 pixels",
        "pipe.png": "can't be read: it is not a file",
        "no pictures": "can't be read: there are no pictures in it",
        "missing.png": "can't be read: No such file or directory",
    }
    code, output, error = pictures("recognize", *reasons, "a three.png", "--format", "jsonl")
    rows = answers(output)
    for name, reason in reasons.items():
        assert rows[name]["digit"] is None
        assert rows[name]["probability"] is None
        assert re.match(reason, rows[name]["remark"])
    assert rows["a three.png"]["digit"] == 3
    assert code == 1
    assert error == "lit-threeseven: error: 7 of the pictures can't be read."


def test_files_and_folders_without_permission_are_reported(tmp_path, digits):
    tmp_path.chmod(0o755)
    for folder in tmp_path.parents:
        if folder.stat().st_mode & 0o001 == 0:
            folder.chmod(folder.stat().st_mode | 0o011)
    (tmp_path / "locked").mkdir(mode=0)
    digits[3].save(tmp_path / "locked.png")
    (tmp_path / "locked.png").chmod(0)
    root = os.geteuid() == 0
    if root:  # who may read everything
        os.seteuid(65534)
    try:
        found = find([str(tmp_path / "locked"), str(tmp_path / "locked.png")])
        remarks = [read(file)[1] for file in found]
    finally:
        if root:
            os.seteuid(0)
    assert remarks == ["can't be read: Permission denied"] * 2


def test_pictures_without_ink_get_no_digit(pictures):
    Image.new("RGB", (90, 50), "beige").save("blank.png")
    Image.new("L", (1, 1)).save("dot.png")
    code, output, _ = pictures("recognize", "blank.png", "dot.png", "--format", "jsonl")
    assert code == 0
    assert [(row["digit"], row["remark"]) for row in answers(output).values()] == [(None, "there is no ink")] * 2


def test_of_several_frames_the_first_is_answered_and_that_is_said(pictures, digits):
    more = [digits[7].rotate(90), digits[7].rotate(180)]
    digits[3].save("moving.gif", save_all=True, append_images=more)
    digits[3].save("pages.tiff", save_all=True, append_images=more)
    code, output, _ = pictures("recognize", "moving.gif", "pages.tiff", "--format", "jsonl")
    assert code == 0
    rows = [(row["digit"], row["remark"]) for row in answers(output).values()]
    assert rows == [(3, "the first of 3 frames")] * 2


def test_a_picture_of_20000_pixels_is_read(pictures, digits):
    page = Image.new("L", (20_000, 1_500), 255)
    page.paste(digits[3].resize((1400, 1400)), (9_000, 50))
    page.save("long.png")
    _, output, _ = pictures("recognize", "long.png", "--format", "jsonl")
    assert answers(output)["long.png"]["digit"] == 3


def test_what_is_unlike_all_training_images_is_said(pictures, digits):
    random = np.random.default_rng(0)
    Image.fromarray(random.integers(0, 256, (28, 28), dtype=np.uint8)).save("noise.png")
    for name, lines in {
        "blot": [(50, 50, 250, 50, 150), (50, 150, 250, 150, 100)],
        "line": [(50, 150, 250, 150, 20)],
        "cross": [(50, 50, 250, 250, 25), (250, 50, 50, 250, 25)],
    }.items():
        picture = Image.new("L", (300, 300), 255)
        for *ends, width in lines:
            ImageDraw.Draw(picture).line(ends, fill=0, width=width)
        picture.save(f"{name}.png")
    digits[3].rotate(90, fillcolor=255).save("turned.png")
    strange = ("noise.png", "blot.png", "line.png", "cross.png", "turned.png")
    _, output, _ = pictures("recognize", *strange, "a three.png", "--format", "jsonl")
    rows = answers(output)
    assert {name: rows[name]["remark"] for name in strange} == dict.fromkeys(strange, "unlike all training images")
    assert rows["a three.png"]["remark"] == ""


def test_seven_test_images_in_a_hundred_at_most_count_as_unlike_all_training_images():
    images, _ = dataset.load(dataset.BUNDLED_ROOT, (3, 7), train=False)
    distance = nearest(images / 255)
    assert (distance > UNLIKE).float().mean().item() == pytest.approx(0.053, abs=0.001)
    strange = (distance > UNLIKE) | ((images / 255).flatten(1).norm(dim=1) > BLOTTED)
    assert strange.float().mean().item() < 0.07


@pytest.mark.slow
def test_an_answer_is_remarked_if_the_network_is_surer_of_nine_in_ten_test_images(pictures):
    images, y = dataset.load(dataset.BUNDLED_ROOT, (3, 7), train=False)
    for model in (LitThreeSeven.from_pretrained(), LitThreeSevenMLP.from_pretrained()):
        with torch.no_grad():
            p = model(images / 255)
        sure = torch.maximum(p, 1 - p)
        assert (sure > usual(model)).double().mean().item() == pytest.approx(0.9, abs=0.001)
        unsure = (sure < usual(model)) & ((p >= 0.5) == (y == 1))
        files = [Image.fromarray(image) for image in images[unsure[:, 0]].numpy()]
        found = [look(file)[0] for file in files]
        with torch.no_grad():
            p = model(torch.stack([one.image for one in found]))
        doubted = [one.certain and max(q, 1 - q) < usual(model) for one, q in zip(found, p.flatten(), strict=True)]
        files[doubted.index(True)].save("unsure.png")
        command = ("recognize", "unsure.png", "a three.png", "--format", "jsonl", "--model", type(model).__name__)
        rows = answers(pictures(*command)[1])
        assert {name: row["remark"] for name, row in rows.items()} == {
            "unsure.png": "less sure than usual",
            "a three.png": "",
        }
        assert rows["unsure.png"]["probability"] < usual(model)
    assert usual(LitThreeSeven(digits=(1, 8))) == 0  # the test images say nothing of other digits


def test_several_marks_are_answered_only_if_asked_for(pictures, digits):
    drawn.two_digits(np.random.default_rng(1)).save("both.png")
    code, output, _ = pictures("recognize", "both.png")
    assert code == 0
    assert output.splitlines()[1].split(maxsplit=1) == ["?", "both.png  (there are 2 marks; --all answers each)"]
    _, output, _ = pictures("recognize", "both.png", "--all", "--format", "jsonl", "--explain", "why")
    first, second = map(json.loads, output.splitlines())
    (left, _, right, _), (other, *_) = (
        map(int, re.match(r"box (\d+) (\d+) (\d+) (\d+)", row["remark"]).groups()) for row in (first, second)
    )
    assert left < right <= other  # from left to right
    assert len([*Path("why").iterdir()]) == 2


def test_files_that_pillow_can_t_read_are_named_for_what_they_are(pictures):
    Path("docs").mkdir()
    Path("docs/photo.heic").write_bytes(b"\0\0\0\x18ftypheic" + bytes(100))
    Path("docs/page.pdf").write_bytes(b"%PDF-1.7\n")
    Path("docs/drawing.svg").write_text("<?xml version='1.0'?><svg xmlns='http://www.w3.org/2000/svg'/>")
    Path("docs/old.eps").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    code, output, error = pictures("recognize", "docs", "--format", "jsonl")
    assert code == 1
    remarks = {name: row["remark"] for name, row in answers(output).items()}
    assert remarks == {
        "docs/drawing.svg": "can't be read: it is an SVG drawing; export it as PNG",
        "docs/old.eps": "can't be read: it is PostScript; save it as PNG",
        "docs/page.pdf": "can't be read: it is a PDF; save the page as PNG, or take a screenshot",
        "docs/photo.heic": "can't be read: it is a HEIC photo; save or export it as JPEG",
    }
    assert error == "lit-threeseven: error: 4 of the pictures can't be read."


def test_explanations_show_each_pixel_s_part_of_the_sum(pictures):
    code, _, _ = pictures("recognize", ".", "a three.png", "--explain", "why")
    assert code == 0
    names = {"a three.png", "a three.png 2", "sieben é ☃.jpg", "seven.webp", "three.GIF"}
    names = {f"{name}.explained.png" for name in names}
    assert {path.name for path in Path("why").iterdir()} == names
    for name in names:
        picture = imread(Path("why", name))[..., :3]
        assert picture.std() > 0.05
        taken, left, right = np.split(picture, 3, axis=1)
        assert np.ptp(taken, axis=2).max() > 0.5  # a red box around the digit
        assert np.ptp(left, axis=2).max() == 0  # the image is grey, its parts are red and blue
        assert np.ptp(right, axis=2).max() > 0.5


def test_parts_are_x_times_w_and_add_up_to_the_logit(digits):
    model = LitThreeSeven.from_pretrained()
    x = torch.rand(3, 28, 28)
    parts = explain.contributions(model, x)
    assert torch.allclose(parts, x * model.W.detach().view(28, 28))
    assert torch.allclose(parts.flatten(1).sum(1) + model.b, model.logits(x).flatten(), atol=1e-4)
    deep = LitThreeSevenMLP(hidden_sizes=[8])
    parts = explain.contributions(deep, x)
    h = torch.sigmoid(x.flatten(1) @ deep.W1 + deep.b1)
    by_hand = x.flatten(1) * ((h * (1 - h) * deep.W2.flatten()) @ deep.W1.t())
    assert torch.allclose(parts.flatten(1), by_hand, atol=1e-6)


def test_an_explanation_that_can_t_be_written_is_reported_in_a_sentence(pictures):
    Path("file").touch()
    code, _, error = pictures("recognize", "a three.png", "--explain", "file")
    assert code == 1
    assert re.search(r"--explain \S+file can't be written to \(File exists\)", error)


def test_an_explanation_replaces_no_picture_and_is_none_itself(pictures, digits):
    digits[7].save("a three.png.explained.png")  # a picture of the user's own
    before = Path("a three.png.explained.png").read_bytes()
    long, formula = "x" * 246 + ".png", r"cost $\bad$ $5.png"
    for name in (long, formula):
        digits[3].save(name)
    files = ["a three.png", "a three.png.explained.png", long, formula]
    code, output, error = pictures("recognize", *files, "--explain", ".", "--format", "jsonl")
    assert code == 0, error
    assert len(answers(output)) == 4
    assert Path("a three.png.explained.png").read_bytes() == before
    assert Path("a three.png 2.explained.png").exists()
    _, output, _ = pictures("recognize", ".", "--format", "jsonl")
    assert not [name for name in answers(output) if "explained" in name]
    assert len(answers(output)) == 6


def test_pictures_may_stand_on_both_sides_of_an_option(pictures):
    code, output, _ = pictures("recognize", "a three.png", "--format", "csv", "deep")
    assert code == 0
    assert len(output.splitlines()) == 4


def test_a_picture_is_answered_without_lightning(pictures):
    program = """
import sys
from lit_threeseven.__main__ import main
import lit_threeseven.use
main(["recognize", "a three.png"])
heavy = ("lightning", "torchvision", "torchmetrics", "matplotlib", "tensorboard", "torch._dynamo", "pandas")
print(*(name for name in heavy if name in sys.modules))
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=True)
    assert result.stdout.splitlines()[-1] == ""


@pytest.mark.slow
def test_hundreds_of_files_take_no_more_memory_than_a_few(digits, tmp_path):
    file = str(tmp_path / "three.png")
    digits[3].convert("RGB").resize((300, 300)).save(file)
    model, process = LitThreeSeven.from_pretrained(), psutil.Process()
    sizes = []
    for i, answer in enumerate(recognize.Answers(model, [file] * 500)):
        assert answer.digit == 3
        if i % 50 == 49:
            sizes.append(process.memory_info().rss)
    assert max(sizes[3:]) - sizes[2] < 20e6  # all pictures together have 135 MB


def test_names_that_are_no_text_are_printed(digits, tmp_path):
    digits[3].save(tmp_path / "three.png")
    os.rename(tmp_path / "three.png", os.fsencode(tmp_path) + b"/bad \xff\n\x1b[31m.png")  # noqa: PTH104
    (answer,) = recognize.Answers(LitThreeSeven.from_pretrained(), find([str(tmp_path)]))
    assert answer.digit == 3
    line = recognize._line(answer, "table")
    assert line.isprintable()
    assert json.loads(recognize._line(answer, "jsonl"))["file"] == answer.file


@pytest.mark.slow
def test_a_terminal_shows_how_far_it_has_come(pictures):
    Path("many").mkdir()
    for i in range(60):
        os.link("a three.png", f"many/{i}.png")
    leader, follower = pty.openpty()
    with (
        Path("answers").open("w") as file,
        subprocess.Popen([COMMAND, "recognize", "many"], stdout=file, stderr=follower),
    ):
        os.close(follower)
        shown = b""
        with suppress(OSError):  # the end of a terminal
            while part := os.read(leader, 1000):
                shown += part
    assert len(Path("answers").read_text().splitlines()) == 61
    assert b"Pictures:" in shown
    assert b"/60" in shown


@pytest.mark.slow
def test_a_reader_that_has_seen_enough_is_no_mistake(pictures):
    command = f"'{COMMAND}' recognize {'. ' * 300} --format csv | head -2"
    result = subprocess.run(["bash", "-o", "pipefail", "-c", command], capture_output=True, text=True, timeout=120)
    assert result.stderr == ""
    assert result.returncode == 0
    assert len(result.stdout.splitlines()) == 2


def test_the_trained_networks_that_ship_get_their_test_images_right(cli):
    data = ThreeSevenDataModule()
    data.setup("test")
    images, y = data.test.tensors
    for network, wrong in ((LitThreeSeven, 34), (LitThreeSevenMLP, 3)):
        model = network.from_pretrained()
        assert type(model) is network
        assert not model.training
        assert ((model(images / 255) >= 0.5) != (y == 1)).sum() == wrong
    code, table, _ = cli("test", "--ckpt_path", "pretrained")
    assert code == 0
    assert "98.33%" in table
    code, table, _ = cli("predict", "--ckpt_path", "pretrained")
    assert code == 0
    assert "LitThreeSeven.predictions.csv" in table
    assert [path.name for path in cli.folder.iterdir()] == ["LitThreeSeven.predictions.csv"]
    code, _, error = cli("fit", "--ckpt_path", "pretrained")
    assert code == 1
    assert "contains only weights" in error


def test_the_page_s_example_answers_a_picture(monkeypatch):
    section = (Path(__file__).parents[1] / "lit_threeseven" / "use" / "README.md").read_text()
    monkeypatch.chdir(Path(__file__).parents[1])
    names: dict = {}
    exec(re.search(r"```python\n(.*?)```", section, re.DOTALL)[1], names)
    assert names["probability"].shape == (1, 1)
    assert names["probability"].item() > 0.5
    expected = torch.logit(names["probability"]).item() - names["model"].b.item()
    assert names["parts"].sum().item() == pytest.approx(expected, abs=1e-3)


def test_a_network_of_which_none_ships_says_so():
    class Mine(LitThreeSeven):
        pass

    with pytest.raises(ValueError, match="No trained Mine ships"):
        Mine.from_pretrained()


@pytest.fixture
def payload(cli):
    """Checkpoints that would make the folder `ran` when they are loaded without care."""

    class Payload:
        def __reduce__(self):
            return os.mkdir, (str(cli.folder / "ran"),)

    state, about = LitThreeSeven().state_dict(), {"network": "LitThreeSeven", "pytorch-lightning_version": "2.6.0"}
    torch.save({"state_dict": state, "hyper_parameters": Payload()} | about, "new.ckpt")
    torch.save({"state_dict": state, "x": Payload()} | about, "old.ckpt", _use_new_zipfile_serialization=False)
    Path("plain.ckpt").write_bytes(pickle.dumps({"state_dict": Payload()}))
    torch.save({"state_dict": state, "loops": torch.nn.Linear(1, 1)} | about, "module.ckpt")
    return cli


def test_no_code_in_a_checkpoint_is_run(payload, digits, script):
    digits[3].save("three.png")
    for name in ("new.ckpt", "old.ckpt", "plain.ckpt", "module.ckpt"):
        refused = rf"{name} (is refused: it holds [\w.]+, which could run code. None was run|is not a lit-threeseven)"
        for use in (
            lambda path: load(path),
            lambda path: LitThreeSeven.load_from_checkpoint(path),
            lambda path: LitThreeSeven.load_from_checkpoint(path, weights_only=False),
            lambda path: WholeCheckpointIO().load_checkpoint(path, weights_only=False),
            lambda path: L.Trainer(logger=False, plugins=[WholeCheckpointIO()]).test(
                LitThreeSeven(), ThreeSevenDataModule(), ckpt_path=path, weights_only=False
            ),
        ):
            with pytest.raises(ValueError, match=refused):
                use(name)
        for command in (["recognize", "three.png"], ["predict"], ["test"], ["fit"]):
            code, _, error = payload(*command, "--ckpt_path", name)
            assert code == 1
            assert re.search(refused, error)
        code, _, error = payload("export", name, "--to", "html")
        assert (code, bool(re.search(refused, error))) == (1, True)
        code, error = script("draw_weights.py", name, "w.png")
        assert (code, bool(re.search(refused, error))) == (1, True)
    assert not Path("ran").exists()
    with pytest.raises((AttributeError, TypeError)):  # with care left out it does run
        torch.load("new.ckpt", weights_only=False)["hyper_parameters"].items()
    assert Path("ran").exists()


def test_a_module_that_a_checkpoint_names_is_not_imported(cli, monkeypatch):
    monkeypatch.syspath_prepend(cli.folder)
    Path("evil.py").write_text("import pathlib; pathlib.Path('ran').touch()")
    monkeypatch.setattr(saving, "_ALLOWED_INSTANTIATORS", {"evil.build"}, raising=False)  # as all were until lately
    named = {"_instantiator": "evil.build", "_class_path": "evil.Net"}
    about = {"state_dict": LitThreeSeven().state_dict(), "network": "LitThreeSeven"}
    about |= {"pytorch-lightning_version": "2.6.0", "hyper_parameters": {"lr": 0.5} | named}
    for entry in ("datamodule_hyper_parameters", "hparams", "module_arguments", "hyper_parameters"):
        torch.save(about | {entry: about.get(entry, {}) | named}, "evil.ckpt")
        assert LitThreeSeven.load_from_checkpoint("evil.ckpt").lr == 0.5
        assert load("evil.ckpt").lr == 0.5
        assert ThreeSevenDataModule.load_from_checkpoint("evil.ckpt").val_fraction == 0.1
        cli("test", "--ckpt_path", "evil.ckpt")
        assert not Path("ran").exists()

    class Careless(L.LightningModule):
        pass

    torch.save(about | {"hyper_parameters": {"_instantiator": "evil.build"}}, "evil.ckpt")
    with pytest.raises(AttributeError, match="build"):  # which evil.py doesn't have
        Careless.load_from_checkpoint("evil.ckpt", weights_only=True)
    assert Path("ran").exists()


def test_a_checkpoint_of_an_unknown_or_damaged_network_is_refused(tmp_path):
    state = LitThreeSeven().state_dict()
    for content, sentence in (
        ({"state_dict": state, "network": "CNN"}, "The checkpoint is of CNN, not lit_threeseven.module.LitThreeSeven"),
        ({"state_dict": state, "network": [1]}, "is damaged: its entry network is not of type str"),
        ({"state_dict": state, "hyper_parameters": {"lr": "x"}}, "can't be used"),
        ({"state_dict": state, "hyper_parameters": {"lr": -1}}, "lr must be a finite float32 above 0"),
        ({"state_dict": state, "hyper_parameters": 3}, "is damaged: its entry hyper_parameters is not of type dict"),
        ({"state_dict": state | {"W": state["W"] * float("nan")}}, "weights that are not finite"),
        ({"state_dict": {"W": state["W"]}}, "holds a network with W"),
    ):
        torch.save(content | {"pytorch-lightning_version": "2.6.0"}, tmp_path / "some.ckpt")
        with pytest.raises(ValueError, match=sentence):
            load(tmp_path / "some.ckpt")


@pytest.mark.parametrize(("fault", "verdict"), [(0, "as shipped"), (1, "DIFFERS")])
def test_networks_that_were_trained_again_are_compared_with_those_that_ship(monkeypatch, capsys, fault, verdict):
    import pretrained

    def train(name: str) -> dict:
        made = read_checkpoint(PRETRAINED / f"{name}.ckpt")
        next(iter(made["state_dict"].values())).view(torch.int32)[0, 0] ^= fault
        return made

    monkeypatch.setattr(pretrained, "train", train)
    monkeypatch.setattr(sys, "argv", ["pretrained.py", "--check"])
    assert pretrained.main() == fault
    networks = LitThreeSeven, LitThreeSevenMLP
    lines = [f"{kind.from_pretrained().digest()}  {kind.__name__}.ckpt  {verdict}\n" for kind in networks]
    assert capsys.readouterr().out == "".join(lines)


@pytest.mark.slow
def test_hidden_layers_are_trained_to_the_same_bits_on_other_processors(monkeypatch):
    """The whole training takes two minutes; 20 steps show as well what a processor could change."""
    import pretrained

    short = ["--trainer.max_epochs=1", "--trainer.check_val_every_n_epoch=1", "--trainer.limit_train_batches=20"]

    def train() -> torch.Tensor:
        state = pretrained.train("LitThreeSevenMLP", *short)["state_dict"]
        return torch.cat([weights.flatten() for weights in state.values()])

    here = train()
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.cpu.hwcaps=-AVX2,-FMA,-AVX512F")
    monkeypatch.setenv("NPY_DISABLE_CPU_FEATURES", "AVX512F AVX2 FMA3")
    assert torch.equal(train(), here)
    monkeypatch.setattr(pretrained, "SAME", {"ATEN_CPU_CAPABILITY": "avx2"})
    assert not torch.equal(train(), here)
