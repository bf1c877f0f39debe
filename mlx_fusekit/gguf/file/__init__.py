"""GGUF files: blocks, layout, and writing them whole or not at all."""
