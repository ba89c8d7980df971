"""Training: the LightningModule, its callbacks, distributed negatives, resuming (METHOD section 5)."""
