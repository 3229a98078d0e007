"""A trained network for other programs: each file is loaded back and compared with the network before it is kept."""

import base64
import json
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lit_threeseven.errors import UserError
from lit_threeseven.functional import THRESHOLD
from lit_threeseven.module import PIXELS, LitThreeSeven
from lit_threeseven.use import find, pictures
from lit_threeseven.weights import write_whole

TOLERANCE = 1e-6  # of a probability
LARGEST_PAGE = 300_000  # bytes
PEN = 27  # radius of the page's pen, of 560 pixels in both directions
EXAMPLES = 12
CENTRES = 250  # means of training images that the page compares a drawing with
PATCH, STEP = 4, 3  # pixels: images are compared by the means of overlapping squares, so a shift matters less
REMARKED = 0.005  # fraction of the test images that get the page's remark that they are unlike the training images

# A file that was loaded back: it takes pixels, (N, 784) float32, 0 to 1, and gives probabilities, (N, 1).
Program = Callable[[Tensor], Tensor]


def export(model: LitThreeSeven, path: Path, form: str, images: Tensor, labels: Tensor, training: Tensor) -> float:
    """Write a network to a file in one of `FORMATS`; the file is loaded back and compared before it is kept.

    "onnx" and "torch-export" take ``pixels``, ``(N, 784)`` float32, 0 to 1, for any N, and give ``probability``,
    ``(N, 1)``. "safetensors" is a folder, see `LitThreeSeven.save_pretrained`. "html" is a page to draw on, see `page`.

    Args:
        model: A network in evaluation mode.
        path: File or folder to write; existing files are replaced.
        form: One of `FORMATS`.
        images: Test images, ``(N, 28, 28)`` uint8, to compare with.
        labels: Their labels, ``(N, 1)``; the page's examples are some images of each digit.
        training: Training images, ``(M, 28, 28)`` uint8; the page remarks on what is unlike them.

    Returns:
        The largest difference between a probability of the file and the network's.

    Raises:
        UserError: If the file's answers differ by more than 1e-6, or the page would be too large.
        ImportError: If a package for this format is not installed.
        OSError: If the file can't be written.
    """
    x = images.flatten(1).float() / 255
    with tempfile.TemporaryDirectory() as folder:
        unchecked = Path(folder, path.name)
        program = FORMATS[form](model, unchecked, images, labels, training)
        with torch.no_grad():
            differences = [(program(part) - model(part)).abs().max().item() for part in (x, x[:1])]
        worst = max(differences)
        if not worst <= TOLERANCE:
            raise UserError(f"The {form} file differs from the network by {worst:.1e}, more than {TOLERANCE:.0e}.")
        for file in unchecked.iterdir() if unchecked.is_dir() else [unchecked]:
            write_whole(path / file.relative_to(unchecked), file.read_bytes())
    return worst


def to_safetensors(model: LitThreeSeven, path: Path, images: Tensor, labels: Tensor, training: Tensor) -> Program:
    """Write the folder that `from_pretrained` reads, ours and Hugging Face's; return the network that ours loads."""
    with torch.no_grad():
        right = ((model(images) >= THRESHOLD) == labels.bool()).double().mean().item()
    model.training_facts = model.training_facts | {f"of {len(images):,} test images right": f"{right:.2%}"}
    model.save_pretrained(path)
    return type(model).from_pretrained(path)


def to_onnx(model: LitThreeSeven, path: Path, images: Tensor, labels: Tensor, training: Tensor) -> Program:
    """Write an ONNX file; return the program that onnxruntime loads."""
    import onnxruntime
    from onnx_ir.passes.common import ClearMetadataAndDocStringPass

    made: Any = torch.onnx.export(
        _Pure(model).eval(),
        (torch.zeros(2, PIXELS),),
        input_names=["pixels"],
        output_names=["probability"],
        dynamic_shapes={"x": {0: torch.export.Dim("N")}},
        dynamo=True,
        verbose=False,
    )
    ClearMetadataAndDocStringPass()(made.model)  # it includes the paths of this installation
    made.model.metadata_props["digits"] = json.dumps(model.digits)
    made.save(path)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda x: torch.from_numpy(session.run(None, {"pixels": x.numpy()})[0])


def to_torch_export(model: LitThreeSeven, path: Path, images: Tensor, labels: Tensor, training: Tensor) -> Program:
    """Write the file that `torch.export.load` reads; return the program that it loads."""
    dynamic = {"x": {0: torch.export.Dim("N")}}
    program = torch.export.export(_Pure(model).eval(), (torch.zeros(2, PIXELS),), dynamic_shapes=dynamic)
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # the paths of this installation
    torch.export.save(program, path, extra_files={"digits": json.dumps(model.digits)})
    return torch.export.load(path).module()


def to_html(model: LitThreeSeven, path: Path, images: Tensor, labels: Tensor, training: Tensor) -> Program:
    """Write the page; return a program that runs its script in Chromium's JavaScript engine."""
    from py_mini_racer import MiniRacer

    path.write_text(page(model, images, labels, training), "utf-8")
    (script,) = re.findall(r'<script id="network">(.*?)</script>', path.read_text("utf-8"), re.DOTALL)
    engine = MiniRacer()
    engine.eval(ATOB + script)

    def program(x: Tensor) -> Tensor:
        rows = json.dumps(x.tolist())
        answers = engine.eval(f"JSON.stringify({rows}.map((x) => predict(x).probability))")
        return torch.tensor(json.loads(str(answers))).unsqueeze(1)

    return program


# A function that browsers provide: base64 as bytes, one character each.
ATOB = """
const atob = (text) => {
  const letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
  const bits = [...text.replace(/=+$/, "")].map((c) => letters.indexOf(c).toString(2).padStart(6, "0")).join("");
  return (bits.match(/.{8}/g) ?? []).map((byte) => String.fromCharCode(parseInt(byte, 2))).join("");
};
"""


def page(model: LitThreeSeven, images: Tensor, labels: Tensor, training: Tensor) -> str:
    """An HTML page to draw a digit on, or to open a picture of one; it needs no network connection and no other file.

    It normalizes drawings as `pictures.place` does. It reads only pictures that `find` calls clear, by the same steps.

    Args:
        model: A network in evaluation mode.
        images: ``(N, 28, 28)`` uint8, 0 to 255; the first few of each digit become examples.
        labels: ``(N, 1)``, 1 for the first digit.
        training: ``(M, 28, 28)`` uint8, 0 to 255, see `likeness`.

    Raises:
        UserError: If it would be larger than 300 KB, as it is with wide hidden layers.
    """
    parameters = [parameter.detach().cpu().numpy() for parameter in model.parameters()]
    chosen = torch.cat([(labels.flatten() == label).nonzero()[: EXAMPLES // 2, 0] for label in (1, 0)]).sort().values
    low, high = pictures.INK
    centres, limit = likeness(training, images)
    given = {
        "digits": model.digits,
        "threshold": THRESHOLD,
        "layers": [
            {"W": _base64(W.astype("<f4")), "b": _base64(b.astype("<f4"))}
            for W, b in zip(parameters[::2], parameters[1::2], strict=True)
        ],
        "examples": [
            {"digit": model.digits[0 if labels[i] == 1 else 1], "pixels": _base64(images[i].numpy())} for i in chosen
        ],
        "form": {"side": pictures.SIDE, "box": pictures.BOX, "centre": pictures.CENTRE}
        | {"low": low, "high": high, "outside": pictures.OUTSIDE},
        "pictures": {"large": pictures.LARGE, "grey": pictures.GREY.tolist(), "least": pictures.LEAST_CONTRAST}
        | {"clear": find.CLEAR, "trace": find.TRACE, "short": find.SHORT, "uneven": find.UNEVEN, "pen": find.PEN},
        "likeness": {"centres": _base64(centres.numpy()), "limit": limit, "patch": PATCH, "step": STEP},
        "pen": PEN,
    }
    text = Path(__file__).with_name("page.html").read_text("utf-8").replace("/*given*/null", json.dumps(given))
    size = len(text.encode())
    if size > LARGEST_PAGE:
        raise UserError(
            f"The page would have {size / 1000:,.0f} KB, at most {LARGEST_PAGE // 1000} are allowed; export a "
            "network with narrower hidden layers, such as --model.hidden_sizes '[40]'."
        )
    return text


def likeness(training: Tensor, images: Tensor) -> tuple[Tensor, float]:
    """What a page needs to tell whether a drawing is like the training images, in far less space than all of them.

    Images are compared by the cosine between the means of their patches of 4×4 pixels, one every three pixels. The
    training images are represented by 250 means, found by k-means.

    Args:
        training: ``(M, 28, 28)`` uint8.
        images: Test images, ``(N, 28, 28)`` uint8.

    Returns:
        The means, ``(250, 81)`` uint8, each scaled so that its largest number is 255; fewer if there are fewer training
        images. And the distance, one minus the cosine with the nearest mean, that one test image in 200 exceeds.
    """
    x, tests = (_patches(part) for part in (training, images))
    centres = x[torch.linspace(0, len(x) - 1, min(CENTRES, len(x))).long()]  # not random: each export is the same
    for _ in range(6):
        sums = torch.zeros_like(centres).index_add(0, (x @ centres.t()).argmax(1), x)
        centres = torch.where(sums.any(1, keepdim=True), torch.nn.functional.normalize(sums), centres)
    centres = (255 * centres / centres.amax(1, keepdim=True)).round().byte()
    cosine = (tests @ torch.nn.functional.normalize(centres.float()).t()).amax(1)
    return centres, round((1 - cosine).quantile(1 - REMARKED).item(), 4)


def _patches(images: Tensor) -> Tensor:
    """The means of each image's patches, ``(N, 81)``, scaled to a vector of length 1."""
    means = torch.nn.functional.avg_pool2d(images.unsqueeze(1).float(), PATCH, STEP).flatten(1)
    return torch.nn.functional.normalize(means)


class _Pure(torch.nn.Module):
    """The network without what Lightning adds to it."""

    def __init__(self, model: LitThreeSeven) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)


def _base64(array: np.ndarray) -> str:
    return base64.b64encode(array.tobytes()).decode()


FORMATS = {"onnx": to_onnx, "torch-export": to_torch_export, "safetensors": to_safetensors, "html": to_html}
ENDINGS = {"onnx": ".onnx", "torch-export": ".pt2", "safetensors": "", "html": ".html"}
