"""Build the bundled threes and sevens from any full MNIST root, byte for byte the same each time.

python scripts/build_bundle.py ROOT            write them into the package
python scripts/build_bundle.py ROOT --check    compare the shipped files with those built from ROOT
"""

import argparse
import hashlib
import struct
import sys
from pathlib import Path

import torch

from lit_threeseven import dataset
from lit_threeseven.errors import UserError


def idx_bytes(tensor: torch.Tensor) -> bytes:
    """A uint8 tensor as a file in MNIST's IDX format."""
    header = struct.pack(f">{1 + tensor.ndim}I", 0x0800 + tensor.ndim, *tensor.shape)
    return header + tensor.contiguous().numpy().tobytes()


def bundle(root: Path) -> dict[str, bytes]:
    """The four bundled files, by name: the threes and sevens of ``root`` in their own order."""
    files = {}
    for part, train in (("train", True), ("t10k", False)):
        images, digits = dataset.read(root, train)
        chosen = torch.isin(digits, torch.tensor(dataset.BUNDLED_DIGITS))
        files[f"{part}-images-idx3-ubyte"] = idx_bytes(images[chosen])
        files[f"{part}-labels-idx1-ubyte"] = idx_bytes(digits[chosen].byte())
    return files


def main() -> int:
    """Write or check the bundle; the exit code is 1 if it differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", type=Path, metavar="ROOT", help="folder that contains MNIST/raw with all of MNIST")
    parser.add_argument("--check", action="store_true", help="only compare, write nothing")
    args = parser.parse_args()

    try:
        files = bundle(args.root)
    except UserError as error:
        print(error, file=sys.stderr)
        return 1

    folder = dataset.raw_folder(dataset.BUNDLED_ROOT)
    same = True
    for name, content in files.items():
        path, digest = folder / name, hashlib.sha256(content).hexdigest()
        if not args.check:
            folder.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        shipped = path.is_file() and path.read_bytes() == content and dataset.FILES[name] == digest
        same &= shipped
        print(f"{digest}  {name}  {'as shipped' if shipped else 'DIFFERS'}")
    if not same:
        print("The bundle or its checksums in lit_threeseven/dataset.py do not match this root.", file=sys.stderr)
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
