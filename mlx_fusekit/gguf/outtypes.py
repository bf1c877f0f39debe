"""How tensors may be written; apart, so that ``--help`` of the command imports nothing heavy."""

#: In the type of the same values (``auto``), only so or wider (``lossless``), or converted.
OUTTYPES = ("auto", "lossless", "f32", "f16", "bf16", "q8_0")
