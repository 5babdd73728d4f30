"""The training loop and what surrounds it: metrics, validation, previews, checkpoints."""
