"""What any of Lightning's loggers can be given: pictures and the recipe; and a way to go on when one of them fails."""

from collections.abc import Callable
from functools import singledispatch, wraps
from typing import Any

from lightning.pytorch.loggers import Logger, MLFlowLogger, TensorBoardLogger, WandbLogger
from lightning.pytorch.utilities import rank_zero_warn
from matplotlib.figure import Figure
from torch.utils.tensorboard.summary import hparams


@singledispatch
def add_figure(logger: Logger, tag: str, draw: Callable[[], Figure], step: int) -> None:
    """Show the picture that `draw` makes in a logger; one that can't take pictures leaves it out.

    For a logger of your own, register a function with the same arguments: ``@add_figure.register``.
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
    """Give a logger what decides the result of a run, as parameters whose names begin with "recipe/".

    Lightning logs the arguments of network and data itself, and some loggers take a name only once.
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
    """Let a logger that fails in mid-run end neither training nor its checkpoints: it warns once, and logs no more.

    A server may be gone, or a disk full. What a logger does before the first step still raises an error.
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
    """Do some work for a logger, unless it has failed before; if it fails now, warn."""
    if vars(logger).get("has_failed"):
        return
    try:
        work(*args, **options)
    except Exception as error:
        logger.has_failed = True
        rank_zero_warn(f"{type(logger).__name__} logs no more; it failed with {error!r}. Training continues.")
