"""Number formats: stored floating-point types, codebooks, and MLX's quantization."""
