"""Sweeps: many small runs from one specification, and the table of what they reached."""
