"""`PredictionsFile`: a network's answers for the test images, as a CSV file."""

from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor, distributed
from typing_extensions import override

from lit_threeseven import ThreeSevenDataModule
from lit_threeseven.errors import UserError
from lit_threeseven.weights import write_whole


class PredictionsFile(L.Callback):
    """Write the results of `predict_step` for the test images, one row per image, in order, on any number of devices.

    The columns are the image's number, the digit it shows, and the network's results: one column for each entry of a
    dictionary, or several if an entry has several numbers per image.

    Args:
        data: The data module of the images.
        path: File to write; None writes nothing.

    Attributes:
        images: How many rows there are.
        right: How many of them name the right "digit"; None if the network gives none.

    Raises:
        UserError: If the network gives neither a tensor nor a dictionary of tensors, with one row for each image.

    Example:
        >>> data = ThreeSevenDataModule()
        >>> trainer = L.Trainer(accelerator="cpu", callbacks=[PredictionsFile(data, Path("answers.csv"))])
    """

    def __init__(self, data: ThreeSevenDataModule, path: Path | None) -> None:
        self.data, self.path = data, path
        self.images = 0
        self.right: int | None = None
        self._batches: list[dict[str, Tensor]] = []  # columns of each

    @override
    def on_predict_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keep a batch's answers."""
        given, rows = outputs if isinstance(outputs, dict) else {"output": outputs}, batch.rows
        if not all(isinstance(value, Tensor) and value.ndim and len(value) == len(rows) for value in given.values()):
            raise UserError("predict_step must give a tensor, or a dictionary of tensors, with one row for each image.")
        columns = {"rows": rows}
        for name, value in given.items():
            parts = value.flatten(1).T if value.ndim > 1 else [value]
            columns |= {f"{name} {k}" if len(parts) > 1 else name: part for k, part in enumerate(parts)}
        self._batches.append({name: column.cpu() for name, column in columns.items()})

    @override
    def on_predict_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Gather the answers of all processes, and write them."""
        shares = [self._batches] * trainer.world_size
        if len(shares) > 1:
            distributed.all_gather_object(shares, self._batches)
        batches = [batch for share in shares for batch in share]
        columns = {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}
        order = columns["rows"].argsort()
        columns = {name: column[order] for name, column in columns.items()}
        rows, digits = columns.pop("rows"), self.data.digits
        truth = torch.where(self.data.test.tensors[1][rows, 0] == 1, *digits)
        self.images = len(rows)  # --trainer.limit_predict_batches leaves some out
        self.right = int((columns["digit"] == truth).sum()) if "digit" in columns else None
        names = [f"probability of {digits[0]}" if name == "probability" else name for name in columns]
        lines = [",".join(["image", "truth", *names])]
        for row in torch.stack([column.double() for column in (rows, truth, *columns.values())], dim=1).tolist():
            lines.append(",".join(f"{value:.9g}" for value in row))
        if self.path and trainer.is_global_zero:
            write_whole(self.path, "\n".join([*lines, ""]).encode())
