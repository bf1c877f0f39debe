"""Which files of a model folder come along, and which stay."""

from pathlib import Path

import pytest

from mlx_fusekit.checkpoint.belongings import find_companions
from mlx_fusekit.errors import CheckpointError

COPIED = (
    "LICENSE",
    "NOTICE.txt",
    "USE_POLICY.md",
    "added_tokens.json",
    "chat_template.jinja",
    "generation_config.json",
    "merges.txt",
    "qwen.tiktoken",
    "tokenizer.model",
)
LEFT_OUT = ("README.md", "modeling_x.py", "training.pt", "weights.safetensors")
#: Weights, what is written afresh, and what is hidden: nobody need know.
SILENT = (
    ".gitattributes",
    "adapter_config.json",
    "config.json",
    "fusekit.json",
    "model-00001-of-00002.safetensors",
    "model.safetensors.index.json",
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    (folder / "assets").mkdir(parents=True)
    (folder / "assets" / "picture.json").touch()
    (folder / "additional_chat_templates").mkdir()
    for name in (*COPIED, *LEFT_OUT, *SILENT, "additional_chat_templates/tools.jinja"):
        (folder / name).write_text(name)
    return folder


def test_what_a_tokenizer_or_a_licence_needs_comes_along(folder: Path) -> None:
    found = find_companions(folder)
    assert set(found.copied) == {*COPIED, "additional_chat_templates/tools.jinja"}
    assert found.left_out == LEFT_OUT
    assert found.code == ("modeling_x.py",)


def test_code_comes_along_if_it_is_trusted(folder: Path) -> None:
    found = find_companions(folder, trust_remote_code=True)
    assert "modeling_x.py" in found.copied
    assert "modeling_x.py" not in found.left_out
    assert found.code == ()


def test_a_link_may_not_lead_out(folder: Path) -> None:
    (folder / "vocab.json").symlink_to(folder / "added_tokens.json")
    assert "vocab.json" in find_companions(folder).copied
    (folder.parent / "secret.json").write_text("{}")
    (folder / "more.json").symlink_to(folder.parent / "secret.json")
    with pytest.raises(CheckpointError, match=r"more\.json: a link that leads out"):
        find_companions(folder)
