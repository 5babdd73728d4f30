"""Painting and reading in bulk: many prompts, many pictures, in batches, and on from where a stopped command was."""
