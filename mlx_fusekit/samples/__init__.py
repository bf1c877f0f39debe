"""The embedded sample: a tiny 4-bit model, a LoRA adapter for it, and the text of both.

Everything was made by ``scripts/train_sample.py`` from its own generated text, so it may be
shipped, and it needs no download. The functions return paths inside the installed package.
"""

from pathlib import Path

_DATA = Path(__file__).parent / "data"


def model_path() -> Path:
    """Folder of the 4-bit (affine, group 64) Llama-architecture base model."""
    return _DATA / "sample-4bit"


def adapter_path() -> Path:
    """Folder of the LoRA adapter, in mlx-lm's format, that answers questions with SQL."""
    return _DATA / "adapter"


def train_data_path() -> Path:
    """Chat items (JSONL) that the adapter was trained on."""
    return _DATA / "sql" / "train.jsonl"


def evaluation_data_path() -> Path:
    """Chat items (JSONL) of the adapter's task that occur in no training text."""
    return _DATA / "sql" / "test.jsonl"


def general_data_path() -> Path:
    """Off-task text (JSONL) of the base's own domain, held out from its training."""
    return _DATA / "general.jsonl"
