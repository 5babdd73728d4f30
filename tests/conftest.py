"""Settings that every test runs under; they must be made before torch is imported."""

import os

# Models here are so small that threads only get in each other's way; groups in distributed/ bring processes of their own.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["MPLBACKEND"] = "Agg"
