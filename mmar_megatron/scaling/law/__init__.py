"""Scaling laws: how loss falls with parameters and tokens, and what a budget is best spent on."""
