"""Model folders: reading them as untrusted input, and writing them whole or not at all."""
