"""Adapters written, in mlx-lm's form and PEFT's: from others, or the difference of two models."""
