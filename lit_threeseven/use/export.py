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
from lit_threeseven.use import pictures
from lit_threeseven.weights import write_whole

TOLERANCE = 1e-6  # of a probability
LARGEST_PAGE = 300_000  # bytes
PEN = 27  # radius of the page's pen, of 560 pixels in both directions
EXAMPLES = 12

# What a format makes of pixels, (N, 784) float32, 0 to 1, when it is loaded back: probabilities, (N, 1).
Program = Callable[[Tensor], Tensor]


def export(model: LitThreeSeven, path: Path, form: str, images: Tensor, labels: Tensor) -> float:
    """Write a network to a file in one of `FORMATS`, once it has been loaded back and compared.

    "onnx" and "torch-export" take ``pixels``, ``(N, 784)`` float32, 0 to 1, for any N, and give ``probability``,
    ``(N, 1)``. "safetensors" is a folder, see `LitThreeSeven.save_pretrained`. "html" is a page to draw on, see `page`.

    Args:
        model: A network in evaluation mode.
        path: File, or folder, to write; files that are there are replaced.
        form: One of `FORMATS`.
        images: Test images, ``(N, 28, 28)`` uint8, to compare with.
        labels: Their labels, ``(N, 1)``; the page's examples are some of both digits.

    Returns:
        The largest difference of a probability between file and network.

    Raises:
        UserError: If the file's answers differ by more than 1e-6, or the page would be too large.
        ImportError: If a package for this format is not installed.
        OSError: If the file can't be written.
    """
    x = images.flatten(1).float() / 255
    with tempfile.TemporaryDirectory() as folder:
        unchecked = Path(folder, path.name)
        program = FORMATS[form](model, unchecked, images, labels)
        with torch.no_grad():
            differences = [(program(part) - model(part)).abs().max().item() for part in (x, x[:1])]
        worst = max(differences)
        if not worst <= TOLERANCE:
            raise UserError(f"The {form} file differs from the network by {worst:.1e}, more than {TOLERANCE:.0e}.")
        for file in unchecked.iterdir() if unchecked.is_dir() else [unchecked]:
            write_whole(path / file.relative_to(unchecked), file.read_bytes())
    return worst


def to_safetensors(model: LitThreeSeven, path: Path, images: Tensor, labels: Tensor) -> Program:
    """Write what `from_pretrained` reads, here and with Hugging Face's; gives what it makes of it."""
    with torch.no_grad():
        right = ((model(images) >= THRESHOLD) == labels.bool()).double().mean().item()
    model.training_facts = model.training_facts | {f"of {len(images):,} test images right": f"{right:.2%}"}
    model.save_pretrained(path)
    return type(model).from_pretrained(path)


def to_onnx(model: LitThreeSeven, path: Path, images: Tensor, labels: Tensor) -> Program:
    """Write ONNX; gives what onnxruntime makes of it."""
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
    ClearMetadataAndDocStringPass()(made.model)  # among it the paths of this installation
    made.model.metadata_props["digits"] = json.dumps(model.digits)
    made.save(path)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda x: torch.from_numpy(session.run(None, {"pixels": x.numpy()})[0])


def to_torch_export(model: LitThreeSeven, path: Path, images: Tensor, labels: Tensor) -> Program:
    """Write what `torch.export.load` reads; gives what it makes of it."""
    dynamic = {"x": {0: torch.export.Dim("N")}}
    program = torch.export.export(_Pure(model).eval(), (torch.zeros(2, PIXELS),), dynamic_shapes=dynamic)
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # the paths of this installation
    torch.export.save(program, path, extra_files={"digits": json.dumps(model.digits)})
    return torch.export.load(path).module()


def to_html(model: LitThreeSeven, path: Path, images: Tensor, labels: Tensor) -> Program:
    """Write the page; gives what the engine of Chromium makes of its script."""
    from py_mini_racer import MiniRacer

    path.write_text(page(model, images, labels), "utf-8")
    (script,) = re.findall(r'<script id="network">(.*?)</script>', path.read_text("utf-8"), re.DOTALL)
    engine = MiniRacer()
    engine.eval(ATOB + script)

    def program(x: Tensor) -> Tensor:
        rows = json.dumps(x.tolist())
        answers = engine.eval(f"JSON.stringify({rows}.map((x) => predict(x).probability))")
        return torch.tensor(json.loads(str(answers))).unsqueeze(1)

    return program


# What pages have from the browser: base64 as bytes, one character each.
ATOB = """
const atob = (text) => {
  const letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
  const bits = [...text.replace(/=+$/, "")].map((c) => letters.indexOf(c).toString(2).padStart(6, "0")).join("");
  return (bits.match(/.{8}/g) ?? []).map((byte) => String.fromCharCode(parseInt(byte, 2))).join("");
};
"""


def page(model: LitThreeSeven, images: Tensor, labels: Tensor) -> str:
    """A page of HTML to draw a digit on, which needs neither a network connection nor anything else.

    Its normalisation is `pictures.place`.

    Args:
        model: A network in evaluation mode.
        images: ``(N, 28, 28)`` uint8, 0 to 255; the first few of each digit become examples.
        labels: ``(N, 1)``, 1 for the first digit.

    Raises:
        UserError: If it would be larger than 300 KB, as with wide hidden layers.
    """
    parameters = [parameter.detach().cpu().numpy() for parameter in model.parameters()]
    chosen = torch.cat([(labels.flatten() == label).nonzero()[: EXAMPLES // 2, 0] for label in (1, 0)]).sort().values
    low, high = pictures.INK
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
        "pen": PEN,
    }
    text = Path(__file__).with_name("page.html").read_text("utf-8").replace("/*given*/null", json.dumps(given))
    size = len(text.encode())
    if size > LARGEST_PAGE:
        raise UserError(
            f"The page would have {size / 1000:,.0f} KB, at most {LARGEST_PAGE // 1000} are allowed; export a network "
            "with narrower hidden layers, such as --model.hidden_sizes '[40]'."
        )
    return text


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
