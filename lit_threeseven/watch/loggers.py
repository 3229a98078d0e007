"""Pictures and the recipe for any of Lightning's loggers; and a way to continue when a logger fails."""

from collections.abc import Callable
from functools import singledispatch, wraps
from typing import Any

from lightning.pytorch.loggers import Logger, MLFlowLogger, TensorBoardLogger, WandbLogger
from lightning.pytorch.utilities import rank_zero_warn
from matplotlib.figure import Figure
from torch.utils.tensorboard.summary import hparams


@singledispatch
def add_figure(logger: Logger, tag: str, draw: Callable[[], Figure], step: int) -> None:
    """Add the picture that `draw` makes to a logger; loggers that can't store pictures ignore it.

    For your own logger, register a function with the same arguments: ``@add_figure.register``.
    """


@add_figure.register
def _(logger: TensorBoardLogger, tag: str, draw: Callable[[], Figure], step: int) -> None:
    logger.experiment.add_figure(tag, draw(), step)


@add_figure.register
def _(logger: WandbLogger, tag: str, draw: Callable[[], Figure], step: int) -> None:
    logger.log_image(tag, [draw()], step)


@add_figure.register
def _(logger: MLFlowLogger, tag: str, draw: Callable[[], Figure], step: int) -> None:
    logger.experiment.log_figure(logger.run_id, draw(), f"{tag}/{step}.png")


@singledispatch
def add_recipe(logger: Logger, recipe: dict[str, Any]) -> None:
    """Log the settings that decide the result of a run, as parameters whose names begin with "recipe/".

    Lightning logs the arguments of network and data itself, and some loggers accept a name only once.
    """
    logger.log_hyperparams({f"recipe/{name}": value for name, value in recipe.items()})


@add_recipe.register
def _(logger: TensorBoardLogger, recipe: dict[str, Any]) -> None:
    rows = "\n".join(f"| {name} | {value} |" for name, value in recipe.items())
    logger.experiment.add_text("recipe", f"| | |\n|---|---|\n{rows}", 0)
    compared = {f"{stage}/{name}": 0.0 for name in ("accuracy", "loss", "auroc") for stage in ("test", "val")}
    for summary in hparams(recipe, compared):  # into the HPARAMS tab, beside the metrics
        logger.experiment.file_writer.add_summary(summary)


def forgive(logger: Logger) -> None:
    """Keep training, with its checkpoints, if a logger fails: there is one warning, and the logger stops logging.

    A server may be gone, or a disk full. Before the first step, a failing logger still raises its error.
    """
    for name in ("log_metrics", "log_image", "save", "finalize", "after_save_checkpoint"):
        if hasattr(logger, name):
            setattr(logger, name, _forgiving(logger, getattr(logger, name)))


def _forgiving(logger: Any, method: Callable[..., None]) -> Callable[..., None]:
    @wraps(method)
    def call(*args: Any, **options: Any) -> None:
        attempt(logger, method, *args, **options)

    return call


def attempt(logger: Any, work: Callable[..., None], *args: Any, **options: Any) -> None:
    """Do some work for a logger, unless it has failed before; warn if it fails now."""
    if vars(logger).get("has_failed"):
        return
    try:
        work(*args, **options)
    except Exception as error:
        logger.has_failed = True
        rank_zero_warn(f"{type(logger).__name__} stopped logging; it failed with {error!r}. Training continues.")
