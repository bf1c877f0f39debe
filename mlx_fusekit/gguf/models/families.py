"""The architectures that can be exported: one entry for each of mlx-lm's model types.

An entry says which llama.cpp architecture runs the model, which keys its graph reads, and what
differs from the stored tensors beyond their names. All of it was checked against llama.cpp's
source and by running a random model of each type in both programs (tests/real).
"""

from mlx_fusekit.gguf.models.dense import DENSE
from mlx_fusekit.gguf.models.family import Family
from mlx_fusekit.gguf.models.hybrids import HYBRIDS
from mlx_fusekit.gguf.models.mixtures import MIXTURES

FAMILIES: dict[str, Family] = {**DENSE, **MIXTURES, **HYBRIDS}
