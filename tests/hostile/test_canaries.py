"""Nothing of a stranger's model or adapter runs, whatever is done with it."""

import json
import pickle
import shutil
from pathlib import Path

import pytest
from support.command import exit_code

from mlx_fusekit import samples

PICKLES = (
    "pytorch_model.bin",
    "adapter_model.bin",
    "training_args.bin",
    "optimizer.pt",
    "model.pkl",
    "adapters.npz",
)


class Bomb:
    """Leaves a file where it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, ...]:
        return Path.write_text, (self.marker, "it ran")


def change(path: Path, **values: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.fixture
def marker(tmp_path: Path) -> Path:
    return tmp_path / "it ran"


@pytest.fixture
def base(tmp_path: Path, marker: Path) -> Path:
    folder = Path(shutil.copytree(samples.model_path(), tmp_path / "base"))
    trap(folder, marker)
    return folder


@pytest.fixture
def adapter(tmp_path: Path, marker: Path) -> Path:
    folder = Path(shutil.copytree(samples.adapter_path(), tmp_path / "adapter"))
    trap(folder, marker)
    return folder


def trap(folder: Path, marker: Path) -> None:
    """Put code and pickles beside what is there, and name them wherever names are looked for."""
    code = f"from pathlib import Path\nPath({str(marker)!r}).write_text('it ran')\n"
    for name in ("own", "modeling_own", "tokenization_own", "mlx_lm", "transformers", "setup"):
        (folder / f"{name}.py").write_text(code)
    (folder / "__init__.py").write_text(code)
    for name in PICKLES:
        (folder / name).write_bytes(pickle.dumps(Bomb(marker)))


def test_the_traps_work(base: Path, marker: Path) -> None:
    pickle.loads((base / PICKLES[0]).read_bytes())
    assert marker.read_text() == "it ran"
    marker.unlink()
    exec((base / "own.py").read_text(), {})
    assert marker.exists()


def test_beside_a_good_model(
    base: Path, adapter: Path, marker: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fused, file = str(tmp_path / "fused"), str(tmp_path / "model.gguf")
    adapted = str(tmp_path / "extracted")
    sources = ("--model", str(base), "--adapter-path", str(adapter))
    few = ("--max-tokens", "60")
    monkeypatch.chdir(base)
    for arguments in (
        ("inspect", str(base)),
        ("inspect", str(adapter)),
        ("fuse", *sources, "--save-path", fused, "--calibration-tokens", "60", "--bits", "4"),
        ("verify", *sources, "--fused", fused, *few),
        ("export-gguf", "--model", fused, "--gguf-path", file),
        ("export-lora", *sources, "--gguf-path", str(tmp_path / "lora.gguf")),
        ("convert-adapter", *sources, "--save-path", str(tmp_path / "p"), "--to", "peft"),
        ("diff", str(base), fused),
        ("extract", "--model", str(base), "--fused", fused, "--rank", "2", "--save-path", adapted),
        ("publish", "--path", fused, "--repo", "me/name", "--dry-run"),
    ):
        assert exit_code(monkeypatch, *arguments) == 0, arguments
    assert not marker.exists()
    assert not list(Path(fused).glob("*.py"))
    assert not [name for name in PICKLES if (Path(fused) / name).exists()]


@pytest.mark.parametrize(
    ("file", "settings"),
    [
        ("config.json", {"model_file": "own.py"}),
        ("config.json", {"auto_map": {"AutoModelForCausalLM": "modeling_own.Own"}}),
        ("config.json", {"auto_map": {"AutoTokenizer": ["tokenization_own.Own", None]}}),
        (
            "tokenizer_config.json",
            {
                "tokenizer_class": "Own",
                "auto_map": {"AutoTokenizer": ["tokenization_own.Own", "tokenization_own.Own"]},
            },
        ),
        ("tokenizer_config.json", {"tool_parser_type": "own", "tokenizer_class": "own.Own"}),
        ("tokenizer_config.json", {"chat_template_type": "own"}),
        ("tokenizer_config.json", {"chat_template_type": "../../own"}),
    ],
)
def test_named_in_the_settings(
    file: str,
    settings: dict[str, object],
    base: Path,
    adapter: Path,
    marker: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    change(base / file, **settings)
    monkeypatch.chdir(base)
    sources = ("--model", str(base), "--adapter-path", str(adapter))
    made = ("--save-path", str(tmp_path / "fused"), "--calibration-tokens", "60")
    for arguments in (
        ("inspect", str(base)),
        ("fuse", *sources, *made),
        ("verify", *sources, "--fused", str(base), "--max-tokens", "60"),
        ("export-gguf", "--model", str(base), "--gguf-path", str(tmp_path / "model.gguf")),
    ):
        assert exit_code(monkeypatch, *arguments) in (0, 1, 3), arguments
    assert not marker.exists()


@pytest.mark.parametrize("name", ["model.safetensors", "model-00002-of-00002.safetensors"])
def test_a_pickle_under_the_name_of_weights(
    name: str, base: Path, adapter: Path, marker: Path, tmp_path: Path, monkeypatch
) -> None:
    shutil.copy(base / PICKLES[0], base / name)
    sources = ("--model", str(base), "--adapter-path", str(adapter))
    assert exit_code(monkeypatch, "fuse", *sources, "--save-path", str(tmp_path / "fused")) == 1
    assert not marker.exists()
