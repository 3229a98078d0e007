"""`export`: a trained network for other programs, or as a page."""

from pathlib import Path
from typing import Literal


def export(
    checkpoint: str,
    to: Literal["onnx", "torch-export", "safetensors", "html"] = "onnx",
    out: str | None = None,
    data_dir: str | None = None,
) -> tuple[Path, float, int]:
    """Save a trained network for other programs.

    onnx and torch-export take pixels, (N, 784) float32 from 0 to 1, and give the probability of the first digit, (N,
    1), for any N. safetensors is a folder to share, with a model card, for from_pretrained. html is a page to draw on,
    or to open pictures in. Each file is loaded back and compared with the network on the test images before it is kept.
    This needs: pip install 'lit_threeseven[export]'

    Args:
        checkpoint: A checkpoint's file; best or last of the newest run; or pretrained, for the single layer that ships.
        to: Format.
        out: File or folder to write; by default the checkpoint's name, in the current folder.
        data_dir: MNIST root, for networks that tell digits other than 3 and 7 apart.

    Returns:
        The file or folder, the largest difference between its probabilities and the network's, and the number of test
        images.

    Raises:
        UserError: If the checkpoint can't be used, or the file's answers differ.
        ImportError: If a package for this format is not installed.
        OSError: If the file can't be written.
    """
    from lit_threeseven import dataset, runs
    from lit_threeseven.datamodule import ThreeSevenDataModule
    from lit_threeseven.errors import UserError
    from lit_threeseven.networks import load
    from lit_threeseven.use import export as formats

    source = runs.find(checkpoint)
    path = Path(out or source.stem + formats.ENDINGS[to])
    if path.is_dir() and to != "safetensors":
        raise UserError(f"--out {path} is a folder; give a file in it.")
    model = load(source)
    data = ThreeSevenDataModule("torchvision" if data_dir else "bundled", data_dir, model.digits)
    data.setup("test")
    images, labels = data.test.tensors
    training, _ = dataset.load(data.root, model.digits, train=True)
    return path, formats.export(model, path, to, images, labels, training), len(images)


def show(result: tuple[Path, float, int]) -> None:
    """Print what was written."""
    path, worst, images = result
    size = sum(file.stat().st_size for file in (path.iterdir() if path.is_dir() else [path]))
    same = f"within {worst:.0e}" if worst else "to the last bit"
    print(f"{path}: {size:,} bytes; its probabilities of {images:,} test images are the network's, {same}")
