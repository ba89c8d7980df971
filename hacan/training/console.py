"""What a person sees of a training beside our own lines: Lightning's tips are left out, warnings that matter are not.

Each thing that is left out stands here by its words, with the reason; whatever Lightning or PyTorch say in other words
is shown.
"""

import logging
import warnings

from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.callbacks import TQDMProgressBar

TALKERS = ("pytorch_lightning.utilities.rank_zero", "lightning_fabric.utilities.rank_zero")
CHATTER = ("💡 Tip", "TPU available", "`Trainer.fit` stopped: `max_epochs=")
CHATTER_OF_RESUME = (
    "pytorch_lightning.trainer.connectors.checkpoint_connector"  # "Restoring states from ...": ours says it
)
HARMLESS = (
    ".*smaller than the logging interval.*",  # LogShortEpochs lowers the interval after this warning
    r".*`self\.log\(.*sync_dist=True\)`.*",  # what we log is the same in every process: from all pairs, all rankings
    ".*Grad strides do not match bucket view strides.*",  # speed of DDP at 1 x 1 and depthwise kernels
    ".*LeafSpec.*",  # Lightning 2.6 on torch 2.11
    ".*Checkpoint directory .* exists and is not empty.*",  # a resumed run goes on in its folder
)


def quieten() -> None:
    """Leave the tips and the harmless warnings out, from now on in this process."""
    for name in TALKERS:
        talker = logging.getLogger(name)
        if _is_news not in talker.filters:
            talker.addFilter(_is_news)
    logging.getLogger(CHATTER_OF_RESUME).setLevel(logging.WARNING)
    for message in HARMLESS:
        warnings.filterwarnings("ignore", message=message)


def _is_news(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith(CHATTER)


class ProgressBar(TQDMProgressBar):
    """Lightning's bar, without the version number of the logger."""

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, int | str | float | dict]:
        """Loss and validation Rsum."""
        return {name: value for name, value in super().get_metrics(trainer, pl_module).items() if name != "v_num"}
