"""MMAR-Megatron: pretraining of multi-modal auto-regressive models with continuous image tokens."""

__version__ = "0.1.0"
