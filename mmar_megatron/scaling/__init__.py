"""Accounting: what a training step costs, and what a device can give."""
