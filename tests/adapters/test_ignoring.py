"""Modules that the user leaves out of an adapter: what is fused, told and refused."""

import json
import re
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from support.command import exit_code
from support.peft import as_peft, pair, write_peft
from support.tiny import LLAMA, make_adapter, make_model, save_adapter

from mlx_fusekit import benchmark, export_lora, fuse, samples, verify
from mlx_fusekit.bench.arms import ArmSource, load_arm
from mlx_fusekit.errors import AdapterError, ConfigurationError
from mlx_fusekit.inspecting import inspect

HIDDEN = LLAMA["hidden_size"]
Q, V = (f"model.layers.1.self_attn.{name}_proj" for name in "qv")
TOWER = "model.vision_tower.encoder.layers.0.fc1"
PATTERN = "*vision_tower*"
TEXT = pair(Q, HIDDEN, HIDDEN) | pair(V, HIDDEN // 2, HIDDEN)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("ignoring") / "base")


def weights(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


def in_mlx_lms_form(folder: Path, tensors: dict[str, Any]) -> Path:
    leaves = {"A": "lora_a", "B": "lora_b"}
    turned = {
        re.sub(r"lora_(.)\.weight", lambda found: leaves[found[1]], name): mx.array(value).T
        for name, value in tensors.items()
    }
    return save_adapter(folder, turned, num_layers=-1)


@pytest.mark.parametrize("write", [write_peft, in_mlx_lms_form])
def test_a_tower_is_refused_with_the_pattern_that_leaves_it_out(
    base: Path, tmp_path: Path, write: Any
) -> None:
    """What is then fused is what the adapter without it gives, and what was left out is told."""
    adapter = write(tmp_path / "both", TEXT | pair(TOWER, 8, 8))
    with pytest.raises(AdapterError, match=rf"{TOWER}\.lora_\S+ belongs .* mlx-lm") as refusal:
        fuse(base, adapter, tmp_path / "fused")
    found = re.search(r"leave it out with --ignore '(\S+)'$", str(refusal.value))
    assert found is not None
    assert found[1] == PATTERN
    report = fuse(base, adapter, tmp_path / "fused", requantize="nearest", ignore=[found[1]])
    fuse(base, write(tmp_path / "text", TEXT), tmp_path / "alone", requantize="nearest")
    assert weights(tmp_path / "fused") == weights(tmp_path / "alone") != weights(base)
    assert report.as_json()["ignored"] == (TOWER,)
    assert f"--ignore leaves out 1 module of both ('{TOWER}', for one)" in report.warnings
    (entry,) = json.loads((tmp_path / "fused" / "fusekit.json").read_text())["adapters"]
    assert (entry["ignore"], entry["ignored"]) == ([PATTERN], [TOWER])


@pytest.mark.parametrize(
    ("pattern", "left"),
    [
        (f"base_model.model.{Q}", [V]),
        ("*.[pq]_proj", [V]),
        ("*.?_proj", None),
        ("*", None),
        ("*.Q_proj", "'*.Q_proj': matches no module of the adapter (closest: 'model.layers.1.self"),
        ("q_proj", "'q_proj': matches no module of the adapter (closest: '" + Q),
        ("*self_atn.v_proj", "matches no module of the adapter (closest: '" + V),
        ("", "--ignore '': matches no module"),
    ],
)
def test_patterns(tmp_path: Path, pattern: str, left: Any) -> None:
    """Of the whole path, with PEFT's prefix or without, case counting."""
    adapter = write_peft(tmp_path / "adapter", TEXT)
    if isinstance(left, list):
        facts = inspect(adapter, ignore=[pattern])
        assert facts.as_json()["targets"] == {m.rpartition(".")[2]: 1 for m in left}
        return
    error: Any = ConfigurationError if left else AdapterError
    with pytest.raises(
        error, match=re.escape(left or "--ignore leaves nothing of it; ignore less")
    ):
        inspect(adapter, ignore=[pattern])


def test_of_several_adapters_one_must_have_the_module(base: Path, tmp_path: Path) -> None:
    both = write_peft(tmp_path / "both", TEXT | pair(TOWER, 8, 8))
    text = write_peft(tmp_path / "text", TEXT)
    report = fuse(base, [text, both], tmp_path / "fused", dequantize=True, ignore=[PATTERN])
    assert report.ignored == (TOWER,)
    with pytest.raises(ConfigurationError, match="'norm': matches no module of the adapter"):
        fuse(base, [text, both], tmp_path / "other", ignore=[PATTERN, "norm"])
    assert not (tmp_path / "other").exists()


def test_only_lora_counts_as_something_left(tmp_path: Path) -> None:
    tensors = pair(Q, HIDDEN, HIDDEN) | {"model.norm.weight": mx.ones(HIDDEN)}
    adapter = write_peft(tmp_path / "adapter", tensors)
    with pytest.raises(AdapterError, match="--ignore leaves no LoRA tensors of it; ignore less"):
        inspect(adapter, ignore=["*_proj"])
    assert inspect(adapter, ignore=["*norm"]).as_json()["modules"] == 1


def test_a_module_goes_with_all_of_its_tensors(base: Path, tmp_path: Path) -> None:
    """Its bias too, which mlx-lm saves under the name of the linear in its layer."""
    tensors = {f"{Q}.lora_a": mx.ones((HIDDEN, 4)), f"{Q}.lora_b": mx.ones((4, HIDDEN))}
    tensors |= {f"{V}.lora_a": mx.ones((HIDDEN, 4)), f"{V}.lora_b": mx.ones((4, HIDDEN // 2))}
    tensors |= {f"{Q}.linear.bias": mx.ones(HIDDEN), "model.norm.weight": mx.ones(HIDDEN)}
    adapter = save_adapter(tmp_path / "adapter", tensors)
    report = fuse(base, adapter, tmp_path / "fused", dequantize=True, ignore=["*.q_proj"])
    assert (report.ignored, report.modules, report.parameters) == ((Q,), {"bfloat16": 1}, 1)


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_the_unfused_arm_has_none_of_it(tmp_path: Path, kind: str) -> None:
    """mlx-lm by itself would load the whole file."""
    base = make_model(tmp_path / "base", bits=None)
    values = {f"{module}.weight": mx.ones((HIDDEN, HIDDEN)) for module in (Q, Q.replace("1", "0"))}
    if kind == "lora":
        adapter = make_adapter(tmp_path / "adapter", base, keys=["self_attn.q_proj"])
    else:
        adapter = save_adapter(tmp_path / "adapter", values, kind="full")
    arm = load_arm(ArmSource("a", "base", base, adapter, ignore=(Q,)))
    changed = [layer.self_attn.q_proj for layer in arm.model.model.layers]
    if kind == "lora":
        assert ["lora_a" in module for module in changed] == [True, False]
    else:
        assert [bool((module.weight == 1).all()) for module in changed] == [True, False]


def test_what_takes_no_adapter_refuses_it(base: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"--ignore 'a': is for an adapter, and .* model"):
        inspect(base, ignore=["a"])
    with pytest.raises(ConfigurationError, match="--ignore 'a': goes with --adapter-path; drop"):
        verify(None, None, base, reference=base, ignore=["a"])
    with pytest.raises(ConfigurationError, match="--ignore 'a': goes with --adapter-path; drop"):
        benchmark(base, None, base, ignore=["a"])


@pytest.mark.parametrize(
    "command", ["fuse", "verify", "bench", "export-lora", "convert-adapter", "exercise"]
)
def test_every_command_takes_it(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    command: str,
) -> None:
    """And refuses a pattern that matches nothing before it does anything."""
    monkeypatch.chdir(tmp_path)
    base, adapter = str(samples.model_path()), str(samples.adapter_path())
    more = {
        "export-lora": ["--gguf-path", "x.gguf"],
        "verify": ["--fused", base],
        "convert-adapter": ["--save-path", "x", "--to", "mlx"],
    }
    own = more.get(command, [])
    arguments = (command, "--model", base, "--adapter-path", adapter, *own, "--ignore", "*a")
    assert exit_code(monkeypatch, *arguments) == 1
    assert "--ignore '*a': matches no module of the adapter" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_the_teacher_is_the_one_that_was_fused(tmp_path: Path) -> None:
    base, fused = samples.model_path(), tmp_path / "fused"
    adapter = as_peft(samples.adapter_path(), tmp_path / "adapter")
    tensors = mx.load(str(adapter / "adapter_model.safetensors"))
    assert isinstance(tensors, dict)
    towers = {f"base_model.model.{name}": mx.array(v) for name, v in pair(TOWER, 8, 8).items()}
    mx.save_safetensors(str(adapter / "adapter_model.safetensors"), tensors | towers)
    fuse(base, adapter, fused, dequantize=True, dtype="float32", ignore=[PATTERN])
    parity = verify(base, adapter, fused, ignore=[PATTERN], max_tokens=60)
    lora = export_lora(base, adapter, tmp_path / "lora.gguf", ignore=[PATTERN])
    assert (parity.kl_mean < 1e-6, lora.modules) == (True, 28)
    for told in (parity.warnings, lora.notes):
        assert any("--ignore leaves out 1 module" in line for line in told)
