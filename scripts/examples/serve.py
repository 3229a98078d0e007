r"""Answer over HTTP which digit a picture shows, with LitServe and a file that `lit-threeseven export` wrote.

pip install litserve
lit-threeseven export pretrained --to torch-export
python scripts/examples/serve.py LitThreeSeven.pt2
curl http://127.0.0.1:8000/predict --json "{\"image\": \"$(base64 --wrap 0 .readme/three.png)\"}"

Ctrl-C stops it. Instead of an image in base64, you can send 28×28 pixels from 0 to 1: {"pixels": [[…], …]}.
"""

import argparse
import base64
import io
import json

import torch
from PIL import Image

from lit_threeseven.errors import needed
from lit_threeseven.use import NoInkError, normalize

with needed("LitServe", "litserve"):
    import litserve
    from fastapi import HTTPException


class ThreeOrSeven(litserve.LitAPI):
    """Gives "digit" and "probability", that of the first digit; a bad request gets one sentence and code 400."""

    def __init__(self, file: str) -> None:
        super().__init__()
        self.file = file

    def setup(self, device: str) -> None:
        """Load the network."""
        about = {"digits": ""}
        self.network = torch.export.load(self.file, extra_files=about).module()
        self.digits = json.loads(about["digits"])

    def decode_request(self, request: dict) -> torch.Tensor:
        """Return the pixels, ``(1, 784)``."""
        try:
            if "image" in request:
                pixels = normalize(Image.open(io.BytesIO(base64.b64decode(request["image"]))))
            else:
                pixels = torch.tensor(request["pixels"], dtype=torch.float32)
        except (KeyError, TypeError, ValueError, OSError, NoInkError) as error:
            raise HTTPException(400, "Send an image with a digit in it, or 28×28 pixels.") from error
        if pixels.numel() != 784 or not ((pixels >= 0) & (pixels <= 1)).all():
            raise HTTPException(400, "Send 28×28 pixels from 0 to 1.")
        return pixels.view(1, 784)

    def predict(self, x: torch.Tensor) -> dict[str, float]:
        """Return the digit and the probability."""
        with torch.no_grad():
            probability = self.network(x).item()
        return {"digit": self.digits[probability < 0.5], "probability": probability}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", help="a .pt2 file")
    parser.add_argument("--port", type=int, default=8000, help="on the loopback address (default: 8000)")
    args = parser.parse_args()
    server = litserve.LitServer(ThreeOrSeven(args.file), accelerator="cpu", timeout=10)
    server.run(host="127.0.0.1", port=args.port, generate_client_file=False)
