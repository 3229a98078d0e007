"""The page to draw on and to open pictures in: in V8, the JavaScript engine of Chromium, and in a real browser."""

import base64
import io
import json
import math
import re

import drawn
import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from playwright.sync_api import expect
from processes import browser
from py_mini_racer import MiniRacer

from lit_threeseven import LitThreeSeven, dataset
from lit_threeseven.networks import LitThreeSevenMLP
from lit_threeseven.use import NoInkError, explain, export, normalize, pictures
from lit_threeseven.use.find import find

THREE = [(0.48 + 0.17 * math.cos(a), 0.32 + 0.16 * math.sin(a)) for a in np.linspace(3.5, 7.8, 30)]
THREE += [(0.48 + 0.2 * math.cos(a), 0.66 + 0.18 * math.sin(a)) for a in np.linspace(-1.57, 2.8, 30)]
SEVEN = [[(0.25, 0.2), (0.5, 0.19), (0.75, 0.2), (0.6, 0.5), (0.45, 0.85)], [(0.35, 0.5), (0.72, 0.52)]]


@pytest.fixture(scope="module")
def mnist():
    """Test images, their labels, and training images."""
    training, _ = dataset.load(dataset.BUNDLED_ROOT, (3, 7), train=True)
    return *dataset.load(dataset.BUNDLED_ROOT, (3, 7), train=False), training


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
def engine(mnist):
    """V8 with the script of the page of the single layer."""
    return v8(LitThreeSeven.from_pretrained(), mnist)


def v8(model, mnist):
    (script,) = re.findall(r'<script id="network">(.*?)</script>', export.page(model, *mnist), re.DOTALL)
    engine = MiniRacer()
    engine.eval(export.ATOB + script)
    return lambda expression: json.loads(engine.eval(f"JSON.stringify({expression})"))


def test_the_page_is_one_small_file_that_needs_no_network(cli, tmp_path):
    file = tmp_path / "page.html"
    code, output, _ = cli("export", "pretrained", "--to", "html", "--out", file)
    assert code == 0
    assert re.search(r"of 2,038 test images are the network's, within \de-0[789]\n", output)
    text = file.read_text("utf-8")
    assert len(text.encode()) < 300_000
    assert "default-src 'none'" in text
    assert not re.search(r"https?://|\bsrc=|@import|\bimport\(|\bfetch\(|XMLHttp|WebSocket", text)


def test_the_page_s_examples_are_test_images(mnist):
    images, y, training = mnist
    text = export.page(LitThreeSeven.from_pretrained(), images, y, training)
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
        script = f"const ink = new Float64Array(560 * 560); {steps}"
        here = draw(strokes)
        found = engine(f"(() => {{ {script} const x = place(ink, 560, 560); return [x, predict(x)]; }})()")
        expected = pictures.place(here)
        assert np.abs(np.array(found[0]) - expected.flatten()).max() < 1e-9
        x = torch.from_numpy(expected).float().unsqueeze(0)
        assert found[1]["probability"] == pytest.approx(model(x).item(), abs=1e-6)
        parts = np.array(list(found[1]["parts"].values()))
        assert np.abs(parts - explain.contributions(model, x).flatten().numpy()).max() < 1e-5
    assert engine("place(new Float64Array(100), 10, 10)") is None


def test_a_page_of_hidden_layers_shows_the_pixels_parts_too(mnist):
    torch.manual_seed(0)
    model = LitThreeSevenMLP(hidden_sizes=[12, 5]).eval()
    engine = v8(model, mnist)
    x = mnist[0][:1] / 255
    found = engine(f"predict({json.dumps(x.flatten().tolist())})")
    assert found["probability"] == pytest.approx(model(x).item(), abs=1e-6)
    expected = explain.contributions(model, x).flatten().numpy()
    assert np.abs(np.array(list(found["parts"].values())) - expected).max() < 1e-5


def read(engine, picture: Image.Image) -> dict:
    """What the page makes of a picture's pixels."""
    rgba = json.dumps(np.asarray(picture.convert("RGBA")).flatten().tolist())
    return engine(
        f"(() => {{ const x = read({rgba}, {picture.width}, {picture.height}); if (!x.image) return x;"
        "return { probability: predict(x.image).probability, distance: distance(x.image), image: x.image }; })()"
    )


@pytest.mark.slow
def test_the_page_and_the_package_answer_pictures_alike(engine, mnist):
    model = LitThreeSeven.from_pretrained()
    kinds = ("photo", "pencil", "felt pen", "chalk", "squared light", "light falls off", "with a gap", "transparent")
    kinds += ("noisy and blurred", "slide dark", "white on yellow", "cut close", "jpeg 10", "crumpled", "sheet askew")
    shown = [picture for name in kinds for picture, _ in drawn.pictures(name, 1)]
    shown = [picture if picture.mode == "RGBA" else picture.convert("RGB") for picture in shown]
    for picture in shown:
        picture.thumbnail((200, 200))
    digits = [Image.fromarray(image.numpy()) for image in mnist[0][:40:4]]
    shown += [digit.resize((196, 196), how) for digit in digits for how in (0, Image.Resampling.BICUBIC)]
    shown += [Image.merge("LA", (digits[1], digits[1].point(lambda value: 255 - value // 2)))]
    framed = Image.new("RGB", (150, 170), (0, 90, 40))
    framed.paste(digits[0].resize((112, 112), Image.Resampling.BICUBIC), (20, 30))
    answered = 0
    for picture in [*digits, *shown, framed]:
        found = read(engine, picture)
        if "missing" in found:
            continue
        answered += 1
        (digit,) = find(picture)
        assert np.abs(np.array(found["image"]) - digit.image.flatten().numpy()).max() < 1e-5
        with torch.no_grad():
            assert found["probability"] == pytest.approx(model(digit.image.unsqueeze(0)).item(), abs=1e-5)
    assert answered >= 36


def test_the_page_reads_clear_pictures_alone(engine):
    for name in ("punch holes", "check boxes", "sheet askew", "hard shadow", "name in print above", "coffee ring"):
        for picture, _ in drawn.pictures(name, 2):
            picture = picture.convert("RGB").reduce(2)
            assert read(engine, picture) == {"missing": "clear digit"}, name
    assert read(engine, drawn.two_digits(np.random.default_rng(1)).reduce(3)) == {"missing": "clear digit"}
    for blank in (
        Image.new("RGB", (1, 1)),
        Image.new("L", (40, 9), 200),
        Image.new("RGBA", (30, 30)),
        Image.linear_gradient("L").resize((60, 60)).point(lambda value: 200 + value // 16),
    ):
        assert read(engine, blank) == {"missing": "ink"}
        with pytest.raises(NoInkError):
            find(blank)


def test_the_page_remarks_on_what_is_unlike_training_images(engine, mnist):
    images, _, training = mnist
    limit = engine("given.likeness.limit")
    pixels = json.dumps(images[::4].flatten(1).tolist())
    distances = np.array(engine(f"{pixels}.map((x) => distance(x.map((value) => value / 255)))"))
    assert (distances > limit).mean() < 0.01
    random = np.random.default_rng(0)
    for _ in range(10):
        circle, cross = (Image.new("L", (280, 280)) for _ in range(2))
        left, top, right, bottom = np.array([60, 50, 220, 230]) + random.uniform(-20, 20, 4)
        ImageDraw.Draw(circle).ellipse((left, top, right, bottom), outline=255, width=27)
        for ends in ((left, top, right, bottom), (right, top, left, bottom)):
            ImageDraw.Draw(cross).line(ends, fill=255, width=27)
        for shape in (circle, cross):
            x = pictures.place(np.asarray(shape) / 255)
            assert engine(f"distance({x.flatten().tolist()})") > limit
    hand = drawn.Hand(random)
    for digit in (3, 7) * 10:
        x = pictures.place(np.pad(hand.strokes(digit, 200, random.uniform(0.09, 0.14)), 9))
        assert engine(f"distance({x.flatten().tolist()})") < limit
    again = export.likeness(training, images)
    assert torch.equal(again[0], export.likeness(training, images)[0])


def test_a_page_of_few_training_images_is_written_too(mnist):
    images, y, training = mnist
    centres, limit = export.likeness(training[:3], images[:5])
    assert centres.shape == (3, 81)
    assert 0 < limit < 1
    assert export.page(LitThreeSeven.from_pretrained(), images, y, training[:3])


@pytest.fixture(scope="module")
def page_file(mnist, tmp_path_factory):
    file = tmp_path_factory.mktemp("page") / "page.html"
    file.write_text(export.page(LitThreeSeven.from_pretrained(), *mnist), "utf-8")
    return file


def stroke(page, pointer: str, points: list) -> None:
    """Real pointer events of the browser's own, from a mouse or a finger."""
    page.locator("#drawing").scroll_into_view_if_needed()
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
    # it is drawn with the next frame
    page.evaluate("new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")
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
        assert page.get_by_role("button", name="Undo").get_attribute("aria-disabled") == "true"
        empty = page.locator("#parts").screenshot()

        stroke(page, pointer, THREE)
        three = shown(page)
        page.wait_for_timeout(600)
        page.screenshot(path=tmp_path / f"{name}.png", full_page=True)
        assert page.locator("#digit").text_content() == "3"
        assert page.locator("#status").text_content() == page.locator("#says").text_content()
        assert page.locator("#parts").screenshot() != empty

        # the same strokes in Python, and the picture of the drawing read as any picture
        points = page.evaluate("drawn")
        assert np.abs(np.array(points[0][-1]) / 560 - THREE[-1]).max() < 0.01
        x = torch.from_numpy(pictures.place(draw(points))).float().unsqueeze(0)
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
        assert "Draw a three or a seven" in page.locator("#status").text_content()

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
        assert page.locator("#status").text_content().startswith("A seven: ")
        page.keyboard.press(" ")
        assert page.locator("#status").text_content() == "Pen up"
        page.keyboard.press("Control+z")
        page.wait_for_timeout(100)
        assert page.locator("#digit").text_content() == "?"
        focused = []
        for _ in range(5):
            page.keyboard.press("Tab")
            focused.append(page.evaluate("document.activeElement.ariaLabel || document.activeElement.textContent"))
        assert focused[:3] == ["Undo", "Clear", "Open a picture"]
        assert focused[3].startswith("Example 1")
        page.locator("#examples button").first.focus()
        page.keyboard.press("Enter")
        page.wait_for_timeout(100)
        assert page.locator("#digit").text_content() == "7"
        names = page.locator("canvas[role], button, [role]:not([role=status])").evaluate_all(
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


def give(page, how: str, name: str, content: bytes) -> None:
    """Open, paste or drop a file, and wait until it is read."""
    if how == "open":
        page.set_input_files("#file", {"name": name, "mimeType": "", "buffer": content})
    else:
        page.evaluate(
            """([how, name, text]) => {
              const data = new DataTransfer();
              if (name) data.items.add(new File([Uint8Array.from(atob(text), (c) => c.charCodeAt(0))], name));
              else data.setData("text/plain", "three");
              const options = { bubbles: true, cancelable: true, clipboardData: data, dataTransfer: data };
              document.body.dispatchEvent(
                how === "paste" ? new ClipboardEvent("paste", options) : new DragEvent("drop", options));
            }""",
            [how, name, base64.b64encode(content).decode()],
        )
    expect(page.locator("#note")).not_to_contain_text("Reading")
    page.wait_for_timeout(100)


def saved(picture: Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


@pytest.mark.slow
def test_pictures_are_opened_pasted_and_dropped_into_the_page(page_file):
    model = LitThreeSeven.from_pretrained()
    ((seven, _), (three, _)) = drawn.pictures("photo", 2, 4)
    (clear, _), *_ = drawn.pictures("transparent", 1)
    with browser() as chromium:
        page = chromium.new_page()
        complaints = []
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.goto(page_file.as_uri())
        note = page.locator("#note")
        for how in ("open", "paste", "drop"):
            for picture in (three.convert("RGB"), seven.convert("RGB"), clear):
                picture.thumbnail((600, 600))
                give(page, how, "digit.png", saved(picture, "PNG"))
                assert shown(page) == pytest.approx(model(find(picture)[0].image.unsqueeze(0)).item(), abs=1e-3)
                assert note.text_content() == ""
            page.get_by_role("button", name="Clear").click()

        # 12 million pixels, and turned by its EXIF data
        exif = Image.Exif()
        exif[0x0112] = 8  # the left side is up
        large = three.convert("RGB").resize((4000, 3000)).transpose(Image.Transpose.ROTATE_270)
        page.evaluate(
            "slowest = 0, last = performance.now(), setInterval(() => {"
            "const now = performance.now(); slowest = Math.max(slowest, now - last); last = now; }, 10)"
        )
        give(page, "open", "large.jpg", saved(large, "JPEG", exif=exif))
        expect(page.locator("#digit")).to_have_text("3")
        assert page.evaluate("slowest") < 2000  # milliseconds; a tenth of that on an idle machine
        stroke(page, "mouse", SEVEN[1])  # to draw on it
        assert page.evaluate("drawn.length") == 2

        for name, content, sentence in [
            ("notes.txt", b"hello", "notes.txt isn't a picture that this browser can read; save it as PNG or JPEG."),
            ("a.svg", b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>', "a.svg isn't a picture"),
            ("a.pdf", b"%PDF-1.4", "a.pdf isn't a picture"),
            ("a.heic", b"\0\0\0\x18ftypheic" + bytes(99), "a.heic isn't a picture"),
            ("empty.png", b"", "empty.png isn't a picture"),
            ("half.png", saved(three.convert("RGB"), "PNG")[:200], "half.png isn't a picture"),
            ("blank.png", saved(Image.new("RGB", (300, 200), "white"), "PNG"), "There is no ink in this picture."),
            (
                "two.png",
                saved(drawn.two_digits(np.random.default_rng(1)), "PNG"),
                "This page only reads one clear digit on plain paper; lit-threeseven recognize reads other",
            ),
        ]:
            for how in ("open", "paste", "drop") if name == "notes.txt" else ("open",):
                give(page, how, name, content)
                expect(note).to_contain_text(sentence)
        for how in ("paste", "drop"):
            give(page, how, "", b"")
            expect(note).to_contain_text("isn't a picture")
        assert page.locator("#digit").text_content() == "?"
        with page.expect_file_chooser() as chooser:
            page.get_by_role("button", name="Open a picture").click()
        assert chooser.value.element.get_attribute("accept") == "image/*"
        assert page.get_by_role("button", name="Take a photo").is_hidden()
        assert page.locator("#photo").get_attribute("capture") == "environment"
        assert complaints == []


@pytest.mark.slow
def test_each_change_on_the_page_can_be_undone(page_file):
    with browser() as chromium:
        page = chromium.new_page()
        page.goto(page_file.as_uri())
        undo, clear = (page.get_by_role("button", name=name) for name in ("Undo", "Clear"))
        for points in SEVEN:
            stroke(page, "mouse", points)
        seven = shown(page)
        clear.focus()
        page.keyboard.press("Enter")
        assert page.evaluate("document.activeElement.id") == "clear"
        expect(page.locator("#digit")).to_have_text("?")
        page.keyboard.press("Enter")  # nothing is left to clear
        page.keyboard.press("Control+z")
        assert shown(page) == seven
        clear.click()
        page.get_by_role("button", name="Example 5").click()
        undo.click()
        expect(page.locator("#digit")).to_have_text("?")
        undo.click()
        assert shown(page) == seven
        undo.click()
        assert page.evaluate("drawn.length") == 1
        undo.focus()
        page.keyboard.press("Enter")
        page.keyboard.press("Enter")
        assert page.evaluate("[drawn.length, document.activeElement.id]") == [0, "undo"]
        expect(undo).to_have_attribute("aria-disabled", "true")

        circle = [(0.5 + 0.3 * math.cos(a), 0.5 + 0.3 * math.sin(a)) for a in np.linspace(0, 6.3, 30)]
        stroke(page, "mouse", circle)
        expect(page.locator("#remark")).to_contain_text("it is unlike the training images")
        expect(page.locator("#status")).to_contain_text("it is unlike the training images")


def box(page, name: str) -> tuple[float, float, float, float]:
    """Left, top, right and bottom of what is shown."""
    found = page.locator(name).bounding_box()
    return found["x"], found["y"], found["x"] + found["width"], found["y"] + found["height"]


def contrast(page, name: str, property_: str) -> float:
    """Contrast of a colour with the background, as WCAG defines it."""
    colours = page.locator(name).evaluate(
        f"(one) => [getComputedStyle(one).{property_}, getComputedStyle(one).backgroundColor]"
    )
    light = []
    for colour in colours:
        parts = np.array([int(part) / 255 for part in re.findall(r"\d+", colour)[:3]])
        light.append(
            np.where(parts <= 0.04, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4) @ [0.2126, 0.7152, 0.0722]
        )
    return (max(light) + 0.05) / (min(light) + 0.05)


@pytest.mark.slow
def test_the_page_fits_every_window(page_file, tmp_path):
    phone = {"has_touch": True, "is_mobile": True}
    with browser() as chromium:

        def at(width: int, height: int, **options):
            page = chromium.new_context(viewport={"width": width, "height": height}, **options).new_page()
            page.goto(page_file.as_uri())
            stroke(page, "mouse", SEVEN[0])
            page.wait_for_timeout(200)
            page.screenshot(path=tmp_path / f"{width}-{height}-{len(options)}.png")
            assert page.evaluate("document.documentElement.scrollWidth") <= width
            return page

        for width, height, options in ((1100, 420, {}), (844, 390, phone)):
            page = at(width, height, **options)
            assert box(page, "#drawing")[3] < height - 20  # room for a finger to scroll
            assert box(page, "#drawing")[3] - box(page, "#drawing")[1] > 200

        for width, height in ((320, 640), (320, 180)):
            page = at(width, height)
            assert box(page, "#digit")[1] > box(page, "#drawing")[3]
            assert box(page, "#drawing")[3] - box(page, "#drawing")[1] < height

        page = at(390, 844, **phone)
        assert box(page, "#seen")[1] == pytest.approx(box(page, "#parts")[1], abs=0.5)
        assert page.get_by_role("button", name="Take a photo").is_visible()
        page.get_by_role("button", name="Example 12").tap()
        page.wait_for_timeout(900)
        assert box(page, "#drawing")[1] >= -1
        assert box(page, "#digit")[3] < 844

        page = at(1000, 800)
        for share in (0, 1):
            page.evaluate(f"$('mark').style.setProperty('--at', {share})")
            page.wait_for_timeout(150)
            left, _, right, _ = box(page, ".scale")
            assert left <= box(page, "#mark")[0] < box(page, "#mark")[2] <= right
        assert box(page, "#first")[2] < box(page, "#second")[0]
        assert page.locator("#sums b").all_text_contents()[1].endswith("seven")
        page.evaluate("document.documentElement.dir = 'rtl'")
        stroke(page, "mouse", SEVEN[0])
        page.wait_for_timeout(150)
        assert box(page, "#mark")[2] < box(page, "#first")[0]
        colours = np.asarray(Image.open(io.BytesIO(page.locator(".scale").screenshot())).convert("RGB"), int)[5]
        assert colours[20, 2] > colours[20, 0] + 50  # blue, where the seven is
        assert colours[-20, 0] > colours[-20, 2] + 50

        for scheme in ("light", "dark"):
            page = at(900, 700, color_scheme=scheme)
            for name in ("#open", "#drawing"):
                assert contrast(page, name, "borderTopColor") >= 3

        page = at(900, 600, forced_colors="active")
        bar = np.asarray(Image.open(io.BytesIO(page.locator(".scale").screenshot())).convert("L"), int)
        assert np.ptp(bar[:, :100]) > 100  # away from the mark
