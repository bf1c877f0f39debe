"""Models in memory, ready to run."""
