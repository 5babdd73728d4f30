"""Engines: they own the wrapped model and the optimizer, and take steps."""
