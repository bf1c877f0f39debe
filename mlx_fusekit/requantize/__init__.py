"""Strategies that bring merged float32 weights back into a quantized format."""

from mlx_fusekit.requantize.strategy import Nearest, Requantizer, TargetFormat

__all__ = ["Nearest", "Requantizer", "TargetFormat"]
