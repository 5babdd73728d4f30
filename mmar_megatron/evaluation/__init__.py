"""Evaluation: scorers of what the model painted and wrote."""
