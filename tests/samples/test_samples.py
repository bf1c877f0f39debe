"""The embedded sample is small, portable, and shows what it is there to show."""

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm
import pytest
from support.exact_match import exact_match, load_chat_items

from mlx_fusekit import samples

FOLDER = Path(samples.__file__).parent
ITEMS = 40


def _exact_match(adapter: Path | None) -> float:
    """Score the first test items; float32 arithmetic is ten times faster on MLX's CPU backend."""
    model: Any
    model, tokenizer = mlx_lm.load(
        str(samples.model_path()), adapter_path=str(adapter) if adapter else None
    )[:2]
    model.set_dtype(mx.float32)
    return exact_match(model, tokenizer, load_chat_items(samples.evaluation_data_path())[:ITEMS])


def test_the_sample_is_at_most_four_megabytes() -> None:
    files = [path for path in FOLDER.rglob("*") if path.is_file() and path.suffix != ".pyc"]
    assert 0 < sum(path.stat().st_size for path in files) <= 4_000_000


def test_the_adapter_names_no_folder_of_the_machine_that_made_it() -> None:
    config = json.loads((samples.adapter_path() / "adapter_config.json").read_text("utf-8"))
    paths = [value for value in config.values() if isinstance(value, str)]
    assert paths
    assert not [path for path in paths if path.startswith(("/", "~"))]


def test_no_evaluation_item_was_trained_on() -> None:
    trained = load_chat_items(samples.train_data_path())
    evaluation = load_chat_items(samples.evaluation_data_path())
    assert len(evaluation) >= 200
    for turn in (0, -1):
        seen = {item["messages"][turn]["content"] for item in trained}
        assert not [item for item in evaluation if item["messages"][turn]["content"] in seen]


def test_general_data_is_chat_without_sql() -> None:
    items = load_chat_items(samples.general_data_path())
    assert len(items) >= 100
    assert not any("SELECT" in message["content"] for item in items for message in item["messages"])


@pytest.mark.real
def test_the_base_does_not_know_the_task() -> None:
    assert _exact_match(None) < 0.10


@pytest.mark.real
def test_the_adapter_knows_the_task() -> None:
    assert _exact_match(samples.adapter_path()) > 0.95
