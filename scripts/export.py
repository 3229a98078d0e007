"""Write a trained network for other programs.

    python scripts/export.py logs/version_0/checkpoints/best.ckpt --to onnx
    python scripts/export.py pretrained --to html

onnx and torch-export take pixels, (N, 784) float32 from 0 to 1, and give the probability of the first digit, (N, 1),
for any N. html is a page to draw on. The file is loaded back and compared with the network on the test set before it is
written. It needs: pip install '.[export]'
"""

import argparse
import sys
from pathlib import Path

from lit_threeseven import ThreeSevenDataModule
from lit_threeseven.networks import load
from lit_threeseven.run.options import silence_libraries
from lit_threeseven.use.export import ENDINGS, FORMATS, export
from lit_threeseven.weights import PRETRAINED


def main() -> None:
    """Export; a mistake ends it with a sentence."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="a checkpoint of a run, or pretrained for the single layer that ships")
    parser.add_argument("--to", choices=FORMATS, required=True, help="format")
    parser.add_argument("--out", type=Path, help="file to write (default: the checkpoint's name, in this folder)")
    parser.add_argument("--data-dir", help="MNIST root, for networks that tell digits other than 3 and 7 apart")
    args = parser.parse_args()
    silence_libraries()
    source = PRETRAINED / "LitThreeSeven.ckpt" if args.checkpoint == "pretrained" else Path(args.checkpoint)
    out = args.out or Path(source.stem + ENDINGS[args.to])
    try:
        if out.is_dir():
            raise ValueError(f"--out {out} is a folder; give a file in it.")
        model = load(source)
        where = {"source": "torchvision", "data_dir": args.data_dir} if args.data_dir else {}
        data = ThreeSevenDataModule(digits=model.digits, **where)
        data.setup("test")
        worst = export(model, out, args.to, *data.test.tensors)
    except ImportError as error:
        sys.exit(f"export: error: {error}; install what it needs with pip install '.[export]'.")
    except (OSError, RuntimeError, ValueError) as error:
        sys.exit(f"export: error: {error}")
    print(
        f"{out}: {out.stat().st_size:,} bytes, at most {worst:.0e} from the network on {len(data.test):,} test images"
    )


if __name__ == "__main__":
    main()
