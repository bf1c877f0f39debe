"""Timing base+adapter against fused models, so that the numbers can be trusted."""
