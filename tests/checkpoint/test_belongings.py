"""Which files belong to a model, and what is done with them."""

from pathlib import Path

import pytest

from mlx_fusekit.checkpoint.belongings import (
    KINDS,
    Companions,
    Step,
    belongs,
    download_patterns,
    find_companions,
    matches,
)
from mlx_fusekit.errors import CheckpointError

DOWNLOADED, COPIED, PUBLISHED = Step.DOWNLOAD, Step.COPY, Step.PUBLISH
NOTHING = Step(0)


@pytest.mark.parametrize(
    ("name", "steps"),
    [
        ("config.json", DOWNLOADED | PUBLISHED),
        ("model.safetensors.index.json", DOWNLOADED | PUBLISHED),
        ("fusekit.json", DOWNLOADED | PUBLISHED),
        ("tokenizer.json", Step.ALL),
        ("spiece.model", Step.ALL),
        ("source.vocab", Step.ALL),
        ("additional_chat_templates/tools.jinja", Step.ALL),
        ("USE_POLICY.md", Step.ALL),
        ("LICENCE", Step.ALL),
        ("README.md", DOWNLOADED),
        ("adapter_config.json", DOWNLOADED),
        ("adapters.safetensors", DOWNLOADED),
        ("Modelfile", PUBLISHED),
        # Some tokenizer may read them; a training set or a secret may be called so.
        ("secrets.json", DOWNLOADED | COPIED),
        ("train.jsonl", DOWNLOADED | COPIED),
        ("notes.txt", DOWNLOADED | COPIED),
        ("letters.model", DOWNLOADED | COPIED),
        ("modeling_tiny.py", NOTHING),
        ("pytorch_model.bin", NOTHING),
        (".env", NOTHING),
        ("figure.png", NOTHING),
    ],
)
def test_what_is_done_with_a_file(name: str, steps: Step) -> None:
    assert {step for step in Step if belongs(name, step)} == set(steps)
    assert matches(name, download_patterns()) == (DOWNLOADED in steps)


def test_code_is_taken_where_it_is_trusted() -> None:
    assert all(belongs("modeling_x.py", step, trust_remote_code=True) for step in Step)
    assert matches("modeling_x.py", download_patterns(trust_remote_code=True))


def test_nothing_is_lost_on_the_way() -> None:
    """What is published came along with the base, or is made for the fused model."""
    made = ("settings", "how it was fused", "Ollama")
    for kind in KINDS:
        if kind.purpose not in made and PUBLISHED in kind.steps:
            assert kind.steps == Step.ALL, kind.purpose


def test_the_user_hears_what_stays_and_is_not_made_anew(tmp_path: Path) -> None:
    names = ["config.json", "model.safetensors", "fusekit.json", "adapter_config.json", ".env"]
    told = ["README.md", "adapters.safetensors", "code.py", "weights.bin"]
    for name in [*names, *told, "tokenizer.json"]:
        (tmp_path / name).touch()
    (tmp_path / "folder").mkdir()
    assert find_companions(tmp_path) == Companions(("tokenizer.json",), tuple(told))


def test_a_link_may_not_lead_out(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "added_tokens.json").touch()
    (folder / "vocab.json").symlink_to(folder / "added_tokens.json")
    assert "vocab.json" in find_companions(folder).copied
    (tmp_path / "secret.json").write_text("{}")
    (folder / "more.json").symlink_to(tmp_path / "secret.json")
    with pytest.raises(CheckpointError, match=r"more\.json: a link that leads out"):
        find_companions(folder)
