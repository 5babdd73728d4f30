"""The training loop and what surrounds it: metrics, validation, previews, checkpoints, and what keeps a run alive or ends it."""
