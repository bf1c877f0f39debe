"""Which token ids stand for no text."""

from typing import Any


def special_ids(tokenizer: Any) -> frozenset[int]:
    """Ids of begin, end, padding, roles, modalities and the like."""
    added = getattr(tokenizer, "added_tokens_decoder", None) or {}
    special = {int(token) for token, entry in added.items() if entry.special}
    return frozenset(special | set(tokenizer.all_special_ids))
