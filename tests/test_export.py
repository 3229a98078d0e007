"""Trained networks in other programs: ONNX, torch.export, and the page, in V8 and in a real browser."""

import base64
import io
import json
import math
import re
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from PIL import Image
from processes import browser
from py_mini_racer import MiniRacer

from lit_threeseven import LitThreeSeven, dataset
from lit_threeseven.networks import LitThreeSevenMLP
from lit_threeseven.use import explain, export, normalize, pictures
from lit_threeseven.weights import PRETRAINED

NETWORKS = [LitThreeSeven, LitThreeSevenMLP]
THREE = [(0.48 + 0.17 * math.cos(a), 0.32 + 0.16 * math.sin(a)) for a in np.linspace(3.5, 7.8, 30)]
THREE += [(0.48 + 0.2 * math.cos(a), 0.66 + 0.18 * math.sin(a)) for a in np.linspace(-1.57, 2.8, 30)]
SEVEN = [[(0.25, 0.2), (0.5, 0.19), (0.75, 0.2), (0.6, 0.5), (0.45, 0.85)], [(0.35, 0.5), (0.72, 0.52)]]


@pytest.fixture(scope="module")
def test_set():
    return dataset.load(dataset.BUNDLED_ROOT, (3, 7), train=False)


def probabilities(model, x):
    with torch.no_grad():
        return model(x).numpy()


def draw(strokes: list, width: int = 560) -> np.ndarray:
    """Ink of strokes, ``(width, width)``, 0 to 1: how much of each pixel a round pen covers, as the page says."""
    rows, columns = np.mgrid[:width, :width] + 0.5
    ink = np.zeros((width, width))
    for points in strokes:
        for (x0, y0), (x1, y1) in zip([points[0], *points], points, strict=False):
            dx, dy = x1 - x0, y1 - y0
            t = ((columns - x0) * dx + (rows - y0) * dy) / ((dx * dx + dy * dy) or 1)
            t = t.clip(0, 1)
            distance = np.hypot(columns - x0 - t * dx, rows - y0 - t * dy)
            ink = np.maximum(ink, (export.PEN + 0.5 - distance).clip(0, 1))
    return ink


@pytest.fixture(scope="module")
def engine(test_set):
    """V8 with the script of the page of the single layer."""
    return v8(LitThreeSeven.from_pretrained(), test_set)


def v8(model, test_set):
    (script,) = re.findall(r'<script id="network">(.*?)</script>', export.page(model, *test_set), re.DOTALL)
    engine = MiniRacer()
    engine.eval(export.ATOB + script)
    return lambda expression: json.loads(engine.eval(f"JSON.stringify({expression})"))


@pytest.mark.parametrize("network", NETWORKS)
def test_onnx_gives_the_network_s_probabilities_for_any_batch_size(network, cli, test_set, tmp_path):
    file = tmp_path / "model.onnx"
    code, output, _ = cli("export", PRETRAINED / f"{network.__name__}.ckpt", "--to", "onnx", "--out", file)
    assert code == 0
    assert re.search(
        r"probabilities of 2,038 test images are the network's, (within \de-0[78]|to the last bit)", output
    )
    session = onnxruntime.InferenceSession(file)
    assert [(put.name, put.shape, put.type) for put in session.get_inputs()] == [
        ("pixels", ["N", 784], "tensor(float)")
    ]
    assert [put.name for put in session.get_outputs()] == ["probability"]
    assert session.get_modelmeta().custom_metadata_map["digits"] == "[3, 7]"
    assert b"site-packages" not in file.read_bytes()
    x = test_set[0].flatten(1).float() / 255
    for part in (x[:1], x[:7], x):
        (found,) = session.run(None, {"pixels": part.numpy()})
        assert np.abs(found - probabilities(network.from_pretrained(), part)).max() <= 1e-6


@pytest.mark.parametrize("network", NETWORKS)
def test_torch_export_gives_the_network_s_probabilities_for_any_batch_size(network, cli, test_set, tmp_path):
    file = tmp_path / "model.pt2"
    code, _, _ = cli("export", PRETRAINED / f"{network.__name__}.ckpt", "--to", "torch-export", "--out", file)
    assert code == 0
    extra = {"digits": ""}
    program = torch.export.load(file, extra_files=extra).module()
    assert json.loads(extra["digits"]) == [3, 7]
    assert b"site-packages" not in file.read_bytes()
    x = test_set[0].flatten(1).float() / 255
    for part in (x[:1], x[:7], x):
        assert np.abs(program(part).detach().numpy() - probabilities(network.from_pretrained(), part)).max() <= 1e-6


def test_a_file_that_differs_from_the_network_is_not_kept(test_set, tmp_path, monkeypatch):
    def wrong(model, path, images, labels):
        path.write_text("wrong")
        return lambda x: model(x) + 2e-6

    monkeypatch.setitem(export.FORMATS, "onnx", wrong)
    with pytest.raises(ValueError, match=r"onnx file differs from the network by [12].\de-06, more than 1e-06"):
        export.export(LitThreeSeven.from_pretrained(), tmp_path / "model.onnx", "onnx", *test_set)
    monkeypatch.setitem(export.FORMATS, "onnx", lambda model, path, *_: path.touch() or (lambda x: x * float("nan")))
    with pytest.raises(ValueError, match="differs from the network"):
        export.export(LitThreeSeven.from_pretrained(), tmp_path / "model.onnx", "onnx", *test_set)
    assert list(tmp_path.iterdir()) == []


def test_mistakes_in_an_export_end_with_a_sentence(cli, tmp_path, monkeypatch):
    Path("text.ckpt").write_text("hello")
    for arguments, sentence in {
        ("none.ckpt", "--to", "onnx"): "There is no checkpoint file none.ckpt",
        ("text.ckpt", "--to", "onnx"): "text.ckpt is not a lit-threeseven checkpoint",
        ("pretrained", "--to", "torch-export", "--out", "/proc/x.pt2"): "/proc",
        (PRETRAINED / "LitThreeSevenMLP.ckpt", "--to", "html"): "The page would have 2,5.. KB, at most 300 are allowed",
    }.items():
        code, _, error = cli("export", *arguments)
        assert code == 1
        assert re.search(rf"lit-threeseven: error: .*{sentence}", error)
        assert "\n" not in error
    monkeypatch.setitem(export.FORMATS, "html", lambda *_: __import__("not_installed_here"))
    code, _, error = cli("export", "pretrained", "--to", "html")
    assert (code, "pip install 'lit_threeseven[export]'" in error) == (1, True)
    assert [path.name for path in Path().iterdir()] == ["text.ckpt"]


def test_the_page_is_one_small_file_that_needs_no_network(cli, tmp_path):
    file = tmp_path / "page.html"
    code, output, _ = cli("export", "pretrained", "--to", "html", "--out", file)
    assert code == 0
    assert re.search(r"of 2,038 test images are the network's, within \de-0[789]\n", output)
    text = file.read_text("utf-8")
    assert len(text.encode()) < 300_000
    assert "default-src 'none'" in text
    assert not re.search(r"https?://|\bsrc=|@import|\bimport\(|\bfetch\(|XMLHttp|WebSocket", text)


def test_the_page_s_examples_are_test_images(test_set):
    images, y = test_set
    text = export.page(LitThreeSeven.from_pretrained(), images, y)
    examples = json.loads(re.search(r"const given = (.*);", text)[1])["examples"]
    assert sorted(example["digit"] for example in examples) == [3] * 6 + [7] * 6
    for example in examples:
        pixels = torch.frombuffer(bytearray(base64.b64decode(example["pixels"])), dtype=torch.uint8)
        (place,) = (images.flatten(1) == pixels).all(1).nonzero().flatten().tolist()
        assert y[place] == (example["digit"] == 3)


def test_the_page_and_the_package_bring_strokes_into_the_same_form(engine):
    random = np.random.default_rng(0)
    model = LitThreeSeven.from_pretrained()
    drawings = [[[(560 * x, 560 * y) for x, y in stroke] for stroke in strokes] for strokes in ([THREE], SEVEN)]
    drawings += [[random.uniform(0, 560, (4, 2)).tolist()] for _ in range(6)] + [[[(3.0, 557.0)]]]
    for strokes in drawings:
        steps = "".join(
            f"line(ink, 560, {json.dumps(a)}, {json.dumps(b)});"
            for points in strokes
            for a, b in zip([points[0], *points], points, strict=False)
        )
        drawn = f"const ink = new Float64Array(560 * 560); {steps}"
        here = draw(strokes)
        found = engine(f"(() => {{ {drawn} const x = place(ink, 560, 560); return [x, predict(x)]; }})()")
        expected = pictures.place(here)
        assert np.abs(np.array(found[0]) - expected.flatten()).max() < 1e-9
        x = torch.from_numpy(expected).float().unsqueeze(0)
        assert found[1]["probability"] == pytest.approx(model(x).item(), abs=1e-6)
        parts = np.array(list(found[1]["parts"].values()))
        assert np.abs(parts - explain.contributions(model, x).flatten().numpy()).max() < 1e-5
    assert engine("place(new Float64Array(100), 10, 10)") is None


def test_a_page_of_hidden_layers_shows_the_pixels_parts_too(test_set):
    torch.manual_seed(0)
    model = LitThreeSevenMLP(hidden_sizes=[12, 5]).eval()
    engine = v8(model, test_set)
    x = test_set[0][:1] / 255
    found = engine(f"predict({json.dumps(x.flatten().tolist())})")
    assert found["probability"] == pytest.approx(model(x).item(), abs=1e-6)
    expected = explain.contributions(model, x).flatten().numpy()
    assert np.abs(np.array(list(found["parts"].values())) - expected).max() < 1e-5


def test_networks_of_other_digits_are_exported_with_their_own_test_set(cli, small_mnist):
    data = ["--data.source", "torchvision", "--data.data_dir", str(small_mnist), "--data.digits", "[1, 8]"]
    cli("fit", *data, "--trainer.max_epochs", "2", "--run", "other")
    code, output, error = cli("export", "logs/other/checkpoints/best.ckpt", "--to", "html")
    assert code == 1
    assert "The bundle holds the digits (3, 7)" in error
    code, output, error = cli("export", "logs/other/checkpoints/best.ckpt", "--to", "html", "--data_dir", small_mnist)
    assert code == 0
    assert "of 20 test images" in output
    assert '"digits": [1, 8]' in Path("best.html").read_text("utf-8")


@pytest.fixture(scope="module")
def page_file(test_set, tmp_path_factory):
    file = tmp_path_factory.mktemp("page") / "page.html"
    file.write_text(export.page(LitThreeSeven.from_pretrained(), *test_set), "utf-8")
    return file


def stroke(page, pointer: str, points: list) -> None:
    """Real pointer events of the browser's own, from a mouse or a finger."""
    box = page.locator("#drawing").bounding_box()
    places = [(box["x"] + x * box["width"], box["y"] + y * box["height"]) for x, y in points]
    if pointer == "mouse":
        page.mouse.move(*places[0])
        page.mouse.down()
        for place in places[1:]:
            page.mouse.move(*place)
        page.mouse.up()
    else:
        touch = page.context.new_cdp_session(page)
        for i, (x, y) in enumerate(places):
            kind = "touchMove" if i else "touchStart"
            touch.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": [{"x": x, "y": y}]})
        touch.send("Input.dispatchTouchEvent", {"type": "touchEnd", "touchPoints": []})


def shown(page) -> float:
    page.wait_for_timeout(100)  # it is drawn with the next frame
    return float(page.locator("#status").get_attribute("data-probability"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "pointer", "window", "scheme"),
    [
        ("desktop", "mouse", (1280, 900), "light"),
        ("phone-dark", "touch", (360, 740), "dark"),
    ],
)
def test_the_page_in_a_browser(page_file, tmp_path, name, pointer, window, scheme):
    """Screenshots stay in the test's own temporary folder."""
    model = LitThreeSeven.from_pretrained()
    phone = pointer == "touch"
    with browser() as chromium:
        context = chromium.new_context(
            viewport={"width": window[0], "height": window[1]},
            color_scheme=scheme,
            has_touch=phone,
            is_mobile=phone,
            device_scale_factor=3 if phone else 1,
            offline=True,
        )
        page = context.new_page()
        complaints = []
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda request: request.url == page_file.as_uri() or complaints.append(request.url))
        page.goto(page_file.as_uri())
        page.screenshot(path=tmp_path / f"{name}-empty.png", full_page=True)
        assert page.evaluate("document.documentElement.scrollWidth") <= window[0]
        assert page.locator("#digit").text_content() == "?"
        assert page.get_by_role("button", name="Undo").is_disabled()
        empty = page.locator("#parts").screenshot()

        stroke(page, pointer, THREE)
        three = shown(page)
        page.wait_for_timeout(600)
        page.screenshot(path=tmp_path / f"{name}.png", full_page=True)
        assert page.locator("#digit").text_content() == "3"
        assert page.get_by_role("status").text_content() == page.locator("#says").text_content()
        assert page.locator("#parts").screenshot() != empty

        # the same strokes in Python, and the picture of the drawing read as any picture
        drawn = page.evaluate("drawn")
        assert np.abs(np.array(drawn[0][-1]) / 560 - THREE[-1]).max() < 0.01
        x = torch.from_numpy(pictures.place(draw(drawn))).float().unsqueeze(0)
        assert model(x).item() == pytest.approx(three, abs=1e-5)
        picture = page.evaluate("document.getElementById('drawing').toDataURL()")
        picture = Image.open(io.BytesIO(base64.b64decode(picture.partition(",")[2])))
        assert model(normalize(picture).unsqueeze(0)).item() == pytest.approx(three, abs=1e-3)

        stroke(page, pointer, SEVEN[1])
        assert shown(page) != three
        page.get_by_role("button", name="Undo").click()
        assert shown(page) == three
        page.get_by_role("button", name="Clear").click()
        page.wait_for_timeout(600)
        assert page.locator("#digit").text_content() == "?"
        assert "Draw a three or a seven" in page.get_by_role("status").text_content()

        for points in SEVEN:
            stroke(page, pointer, points)
        assert shown(page) < 0.5
        assert page.locator("#digit").text_content() == "7"

        examples = page.get_by_role("button", name="Example")
        assert examples.count() == 12
        for k in range(12):
            examples.nth(k).click()
            page.wait_for_timeout(100)
            assert page.locator("#digit").text_content() in examples.nth(k).get_attribute("aria-label").replace(
                "a three", "3"
            ).replace("a seven", "7")
        assert complaints == []


@pytest.mark.slow
def test_the_page_can_be_used_with_the_keyboard_alone(page_file, tmp_path):
    with browser() as chromium:
        page = chromium.new_page()
        page.goto(page_file.as_uri())
        complaints = []
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.id") == "drawing"
        page.mouse.move(300, 300)
        page.mouse.down()
        for key in (" ", "ArrowDown"):  # nothing happens while the mouse draws
            page.keyboard.press(key)
        page.mouse.up()
        page.get_by_role("button", name="Undo").click()
        page.locator("#drawing").focus()
        page.keyboard.press("ArrowDown")
        page.keyboard.press("ArrowUp")
        for key, times in (("Shift+ArrowLeft", 4), (" ", 1), ("Shift+ArrowRight", 7), ("Shift+ArrowDown", 3)):
            for _ in range(times):
                page.keyboard.press(key)
        for _ in range(12):
            page.keyboard.press("ArrowLeft")
            for _ in range(2):
                page.keyboard.press("ArrowDown")
        page.screenshot(path=tmp_path / "keyboard.png")
        page.wait_for_timeout(600)
        assert page.locator("#digit").text_content() == "7"
        assert page.get_by_role("status").text_content().startswith("A seven: ")
        page.keyboard.press(" ")
        assert page.get_by_role("status").text_content() == "Pen up"
        page.keyboard.press("Control+z")
        page.wait_for_timeout(100)
        assert page.locator("#digit").text_content() == "?"
        focused = []
        for _ in range(14):
            page.keyboard.press("Tab")
            focused.append(page.evaluate("document.activeElement.getAttribute('aria-label')"))
        assert focused[0].startswith("Example 1")  # Undo and Clear have nothing to do
        page.locator("#examples button").first.focus()
        page.keyboard.press("Enter")
        page.wait_for_timeout(100)
        assert page.locator("#digit").text_content() == "7"
        names = page.locator("canvas[role], button, [role]").evaluate_all(
            "all => all.map((one) => one.getAttribute('aria-label') || one.textContent)"
        )
        assert all(names)
        assert complaints == []


@pytest.mark.slow
def test_the_page_fits_a_phone_held_sideways(page_file, tmp_path):
    with browser() as chromium:
        page = chromium.new_page(viewport={"width": 568, "height": 320})
        page.goto(page_file.as_uri())
        page.screenshot(path=tmp_path / "sideways.png")
        drawing, answer = (page.locator(name).bounding_box() for name in ("#drawing", "#digit"))
        assert drawing["height"] == pytest.approx(drawing["width"], abs=1)
        assert drawing["height"] < 320
        assert answer["y"] < 320
        assert page.evaluate("document.documentElement.scrollWidth") <= 568
