"""Training: losses, metrics, the LightningModule, stages, checkpoints."""
