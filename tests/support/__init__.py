"""Tiny real models, adapters, tokenizers and servers that tests are made of."""
