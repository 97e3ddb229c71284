"""Logs that Ctrl-C leaves whole."""

from typing import Any

from lightning.pytorch.loggers import TensorBoardLogger

from unitransformer.stop_signals import holding_interrupt


class WholeTensorBoardLogger(TensorBoardLogger):
    """A queue to TensorBoard's thread that is left while something is put into it never ends, and
    closing waits for that."""

    def log_metrics(self, *arguments: Any, **options: Any) -> None:
        with holding_interrupt():
            super().log_metrics(*arguments, **options)

    def log_hyperparams(self, *arguments: Any, **options: Any) -> None:
        with holding_interrupt():
            super().log_hyperparams(*arguments, **options)
