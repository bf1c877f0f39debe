"""Fusing, from end to end."""
