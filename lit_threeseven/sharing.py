"""A folder to share a trained network: weights in safetensors, arguments in JSON, and a model card."""

import json
from pathlib import Path
from typing import Any

from torch import Tensor

from lit_threeseven.errors import UserError
from lit_threeseven.weights import write_whole

WEIGHTS, CONFIG, CARD = "model.safetensors", "config.json", "README.md"  # Hugging Face's names


def write(folder: Path, state: dict[str, Tensor], config: dict[str, Any], facts: dict[str, str]) -> None:
    """Write a network into a folder.

    Args:
        folder: Created if it doesn't exist.
        state: The weights.
        config: "network", the name of its class, and the arguments.
        facts: What the model card says about its training, one row each.

    Raises:
        OSError: If a file can't be written.
    """
    from safetensors.torch import save

    module, _, name = config["network"].rpartition(".")
    first, second = config["digits"]
    rows = "\n".join(f"| {fact} | {value} |" for fact, value in facts.items())
    card = f"""---
license: apache-2.0
library_name: lit_threeseven
pipeline_tag: image-classification
datasets:
- ylecun/mnist
---

# {name}: {first} or {second}?

It takes images of 28×28 pixels like MNIST's, and gives the probability that one shows a {first} and not a {second}.
For anything else its answers mean nothing.

```python
from {module} import {name}

model = {name}.from_pretrained("{folder.name}")
```

| | |
|---|---|
{rows}

It was trained on images of MNIST, made by Yann LeCun, Corinna Cortes and Christopher Burges and licensed
[CC BY-SA 3.0](https://creativecommons.org/licenses/by-sa/3.0/). The code is licensed under Apache-2.0.
"""
    tensors = {name: weight.detach().cpu().contiguous() for name, weight in state.items()}
    write_whole(folder / WEIGHTS, save(tensors, {"format": "pt"}))
    write_whole(folder / CONFIG, (json.dumps(config, indent=2) + "\n").encode())
    write_whole(folder / CARD, card.encode())


def read(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read the weights and the configuration from a folder, see `write`.

    Raises:
        OSError: If a file can't be read.
        UserError: If a file is damaged.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        config = json.loads((folder / CONFIG).read_text("utf-8"))
        state = load((folder / WEIGHTS).read_bytes())
    except (ValueError, SafetensorError) as error:
        raise UserError(f"{folder} can't be read: its {CONFIG} or {WEIGHTS} is damaged ({error}).") from error
    if not isinstance(config, dict):
        raise UserError(f"{folder} can't be read: its {CONFIG} is not a JSON object.")
    return state, config
