"""Strategies that bring merged float32 weights back into a quantized format."""
