"""Whether the machines of a job are fit for the run, found out before hours are spent on it."""
