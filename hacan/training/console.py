"""Console output of a training: hide Lightning's tips and harmless warnings, and nothing else.

Each entry names one message with the reason; all other messages of Lightning and PyTorch are shown.
"""

import logging
import warnings

from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.callbacks import TQDMProgressBar

RANK_ZERO_LOGGERS = ("pytorch_lightning.utilities.rank_zero", "lightning_fabric.utilities.rank_zero")
HIDDEN_INFOS = ("💡 Tip", "TPU available", "`Trainer.fit` stopped: `max_epochs=")
RESUME_LOGGER = "pytorch_lightning.trainer.connectors.checkpoint_connector"  # pipeline.train logs the resume itself
HIDDEN_WARNINGS = (
    ".*smaller than the logging interval.*",  # LogShortEpochs lowers the interval after this warning
    r".*`self\.log\(.*sync_dist=True\)`.*",  # the logged values are equal in every process
    ".*Grad strides do not match bucket view strides.*",  # speed of DDP with 1 x 1 and depthwise kernels
    ".*LeafSpec.*",  # Lightning 2.6 on torch 2.11
    ".*Checkpoint directory .* exists and is not empty.*",  # a resumed run writes to the same folder
)


def hide_framework_messages() -> None:
    """Hide the messages listed above in this process."""
    for name in RANK_ZERO_LOGGERS:
        logger = logging.getLogger(name)
        if _is_shown not in logger.filters:
            logger.addFilter(_is_shown)
    logging.getLogger(RESUME_LOGGER).setLevel(logging.WARNING)
    for message in HIDDEN_WARNINGS:
        warnings.filterwarnings("ignore", message=message)


def _is_shown(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith(HIDDEN_INFOS)


class ProgressBar(TQDMProgressBar):
    """Lightning's progress bar without the version number of the logger."""

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, int | str | float | dict]:
        """Return the loss and the validation Rsum."""
        return {name: value for name, value in super().get_metrics(trainer, pl_module).items() if name != "v_num"}
