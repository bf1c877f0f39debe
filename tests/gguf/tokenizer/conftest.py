"""Tokenizers trained on the spot."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support.tokenizer_folders import (
    TEXTS,
    Json,
    train_pieces,
)
from tokenizers import Tokenizer, models, pre_tokenizers, trainers


@pytest.fixture(scope="session")
def byte_model() -> Json:
    """A byte-level BPE model of 300 tokens, trained on the spot."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=alphabet, special_tokens=["<s>"], show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS * 3, trainer)
    model: Json = json.loads(tokenizer.to_str())["model"]
    return model


@pytest.fixture(scope="session")
def piece_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SentencePiece BPE model, trained on the spot by sentencepiece itself."""
    return train_pieces(tmp_path_factory.mktemp("pieces") / "tokenizer.model")
