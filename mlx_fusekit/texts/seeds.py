"""Seeds for the parts of a work that must not draw the same random numbers."""

import hashlib


def derived_seed(seed: int, part: str) -> int:
    """A seed of 32 bits that depends on ``seed`` and the part's name, on every machine alike."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{part}".encode()).digest()[:4], "big")
