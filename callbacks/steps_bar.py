"""The rich progress bar for runs that are counted in steps."""

from lightning.pytorch.callbacks import RichProgressBar


class StepsBar(RichProgressBar):
    """Lightning's rich progress bar, which calls the only epoch of a run without ``max_epochs`` "Epoch 0/-2"."""

    def _get_train_description(self, current_epoch: int) -> str:
        if self.trainer.max_epochs not in (None, -1):
            return super()._get_train_description(current_epoch)
        return f"{f'Epoch {current_epoch}':{len(self.validation_description)}}"
