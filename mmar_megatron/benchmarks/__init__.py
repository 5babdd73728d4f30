"""What `tools/benchmark.py` measures: ratios, all in one run, so that the machine's moods cancel out."""
