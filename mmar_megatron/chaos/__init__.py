"""Trials of a training run under kills, signals and damaged checkpoints, held against the same run left alone.

A place of its own: it watches the training command from outside, through its processes, output and files, and nothing that trains
knows of it.
"""
