"""The MMAR model on megatron-core's transformer block."""
