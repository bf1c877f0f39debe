"""PEFT's adapters on classes of mlx-lm that change values when they convert a checkpoint.

Right is what mlx-lm makes of the checkpoint that PEFT merges: transformers' tensors, changed there,
loaded by mlx-lm's class.
"""

import io
import re
import shutil
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.utils import load_model, save_config, save_model
from support.every_class import NOT_RUN, config_of, names
from support.peft import Tensors, pair, random, write_peft
from support.raw_forms import raw_form
from support.sweep import random_model

from mlx_fusekit import convert_adapter, fuse
from mlx_fusekit.adapters.sources import NamedSources
from mlx_fusekit.adapters.updates import FullUpdate
from mlx_fusekit.errors import AdapterError

#: Of raw weights, what is transposed there.
_TURNED = {"gpt2": r"c_attn|c_proj|c_fc"}


class Checkpoints:
    """A class's model as transformers has it, and as mlx-lm converts it."""

    def __init__(self, folder: Path, name: str) -> None:
        self.folder, self.name = folder, name
        model, config = random_model(name), config_of(name)
        save_model(folder / "made", model)
        save_config(config, folder / "made" / "config.json")
        made = mx.load(str(folder / "made" / "model.safetensors"))
        assert isinstance(made, dict)
        self.raw = {n: np.array(v) for n, v in raw_form(name, made).items()}
        self.before = self.converted(self.raw)
        self.base = self.write("base", self.before, "mlx")

    def write(self, name: str, tensors: Tensors, form: str) -> Path:
        folder = self.folder / name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        shutil.copy(self.folder / "made" / "config.json", folder)
        arrays = {n: mx.array(value.copy()) for n, value in tensors.items()}
        mx.save_safetensors(str(folder / "model.safetensors"), arrays, {"format": form})
        return folder

    def converted(self, raw: Tensors) -> Tensors:
        """The parameters that mlx-lm's class makes of a checkpoint."""
        with redirect_stdout(io.StringIO()):
            model, _ = load_model(self.write("raw", raw, "pt"))
        return {n: np.array(v) for n, v in tree_flatten(model.parameters())}

    def trained(self, chosen: str) -> tuple[dict[str, Any], Tensors]:
        """An adapter's tensors for the chosen ones of the checkpoint, and what they make of it.

        Matrices get a LoRA of scale 2, all else is saved as a whole, and so are GPT-2's square
        matrices, in the name of all that transformers has transposed.
        """
        tensors: dict[str, Any] = {}
        merged = dict(self.raw)
        for name, value in self.raw.items():
            if not re.search(chosen, name):
                continue
            turned = re.search(_TURNED.get(self.name, "^$"), name) is not None
            if value.ndim != 2 or (turned and value.shape[0] == value.shape[1]):
                tensors[name] = merged[name] = random(*value.shape, seed=len(name))
                continue
            module = name.removesuffix(".weight")
            rows, columns = reversed(value.shape) if turned else value.shape
            first, second = random(4, columns, seed=len(name)), random(rows, 4, seed=len(name))
            tensors |= {f"{module}.lora_A.weight": first, f"{module}.lora_B.weight": second}
            delta = 2 * second @ first
            merged[name] = value + (delta.T if turned else delta)
        return tensors, merged


@pytest.mark.parametrize(
    ("name", "chosen"),
    [
        ("qwen3_next", r"norm\.weight|conv1d|layers\.1\.self_attn\.q_proj"),
        ("qwen3_5", r"norm\.weight|conv1d|layers\.1\.self_attn\.q_proj"),
        ("qwen3_5_moe", r"norm\.weight|layers\.1\.self_attn\.q_proj"),
        ("step3p5", r"norm\.weight|layers\.1\.self_attn\.q_proj"),
        ("gpt2", r"c_attn\.weight|c_fc\.weight|attn\.c_proj\.weight|ln_f"),
        ("falcon_h1", r"_proj\.weight|conv1d|lm_head|norm\.weight"),
    ],
)
@pytest.mark.parametrize("base", ["base", "raw"])
def test_values_that_a_class_changes(tmp_path: Path, name: str, chosen: str, base: str) -> None:
    """Norms, convolutions, transposed matrices and multiplied ones, onto both forms of a base."""
    checkpoints = Checkpoints(tmp_path, name)
    tensors, merged = checkpoints.trained(chosen)
    expected = checkpoints.converted(merged)
    checkpoints.write("raw", checkpoints.raw, "pt")
    fuse(tmp_path / base, write_peft(tmp_path / "adapter", tensors), tmp_path / "fused")
    found = mx.load(str(tmp_path / "fused" / "model.safetensors"))
    assert isinstance(found, dict)
    assert found.keys() == expected.keys()
    for tensor, value in expected.items():
        np.testing.assert_allclose(np.array(found[tensor]), value, atol=1e-6, err_msg=tensor)
    assert sum(not np.array_equal(v, checkpoints.before[n]) for n, v in expected.items()) > 3


def test_multiplied_rows_of_single_tokens_and_dora(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, "falcon_h1")
    module, embedding = "model.layers.0.feed_forward.down_proj", "model.embed_tokens"
    tensors, merged = checkpoints.trained(rf"{module}\.weight")
    magnitude = 1 + np.abs(random(merged[f"{module}.weight"].shape[0]))
    whole = merged[f"{module}.weight"]
    whole *= (magnitude / np.linalg.norm(whole, axis=1))[:, None]
    rows = random(2, 64)
    merged[f"{embedding}.weight"] = merged[f"{embedding}.weight"].copy()
    merged[f"{embedding}.weight"][[5, 3]] = rows
    tensors |= {
        f"{module}.lora_magnitude_vector": magnitude,
        f"{embedding}.token_adapter.trainable_tokens_delta": rows,
    }
    adapter = write_peft(tmp_path / "adapter", tensors, trainable_token_indices=[5, 3])
    fuse(checkpoints.base, adapter, tmp_path / "fused")
    found = mx.load(str(tmp_path / "fused" / "model.safetensors"))
    assert isinstance(found, dict)
    for tensor, value in checkpoints.converted(merged).items():
        np.testing.assert_allclose(np.array(found[tensor]), value, atol=1e-6, err_msg=tensor)


def test_a_head_that_a_class_normalizes(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, "baichuan_m1")
    for chosen in (r"lm_head|layers\.0\.self_attn\.o_proj", r"layers\.0\.self_attn\.o_proj"):
        tensors, _ = checkpoints.trained(chosen)
        if "lm_head.lora_A.weight" not in tensors:
            tensors["lm_head.weight"] = random(*checkpoints.raw["lm_head.weight"].shape)
        adapter = write_peft(tmp_path / "adapter", tensors)
        with pytest.raises(
            AdapterError, match=r"normalizes lm_head\.weight .* --ignore '\*lm_head'"
        ):
            fuse(checkpoints.base, adapter, tmp_path / "fused")
        NamedSources.find(checkpoints.base, adapter, ignore=["*lm_head"]).open()


@pytest.mark.parametrize(
    ("name", "chosen"),
    [
        ("qwen3_next", r"model\.norm\.weight|conv1d|layers\.1\.self_attn\.q_proj"),
        ("falcon_h1", r"layers\.1\.self_attn\.o_proj"),
    ],
)
def test_no_adapter_is_written_that_would_have_other_values(
    tmp_path: Path, name: str, chosen: str
) -> None:
    checkpoints = Checkpoints(tmp_path, name)
    adapter = write_peft(tmp_path / "adapter", checkpoints.trained(chosen)[0])
    with pytest.raises(AdapterError, match=r"other values of it than transformers .* --to mlx"):
        convert_adapter(checkpoints.base, adapter, tmp_path / "out", "peft")
    convert_adapter(checkpoints.base, adapter, tmp_path / "out", "mlx")
    base, made = tmp_path / "base", tmp_path / "out"
    for source, target in ((adapter, "one"), (made, "two")):
        fuse(base, source, tmp_path / target)
    one, two = (mx.load(str(tmp_path / n / "model.safetensors")) for n in ("one", "two"))
    for tensor, value in one.items():
        np.testing.assert_allclose(np.array(two[tensor]), np.array(value), atol=1e-6)


def test_rows_that_a_class_takes_apart_in_its_own_order(tmp_path: Path) -> None:
    """HunYuan's has each group's queries, keys and values side by side."""
    checkpoints = Checkpoints(tmp_path, "hunyuan")
    module = "model.layers.0.self_attn.qkv_proj"
    rows = sum(len(checkpoints.before[f"{module.replace('qkv', part)}.weight"]) for part in "qkv")
    with pytest.raises(AdapterError, match="qkv_proj' is no module of the base model"):
        fuse(
            checkpoints.base,
            write_peft(tmp_path / "adapter", pair(module, rows, 64)),
            tmp_path / "fused",
        )


@pytest.mark.real
@pytest.mark.parametrize("name", [name for name in names() if name not in NOT_RUN])
def test_no_other_class_changes_values(tmp_path: Path, name: str) -> None:
    """One tensor at a time: what is not refused is what mlx-lm makes of the merged checkpoint."""
    checkpoints = Checkpoints(tmp_path, name)
    taken = 0
    for stored in checkpoints.raw:
        if not stored.endswith((".weight", ".bias")):
            continue
        tensors, merged = checkpoints.trained(f"^{re.escape(stored)}$")
        if stored in tensors:  # an adapter has some LoRA beside what was saved as a whole
            anchor = next(n for n, v in checkpoints.raw.items() if v.ndim == 2 and n != stored)
            tensors |= checkpoints.trained(f"^{re.escape(anchor)}$")[0]
        try:
            adapter = write_peft(tmp_path / "adapter", tensors)
            bound = NamedSources.find(checkpoints.base, adapter).open().adapter
        except AdapterError:
            continue
        expected = checkpoints.converted(merged)
        whole = {f"{m}.weight": u for m, u in bound.weights.items() if isinstance(u, FullUpdate)}
        taken += 1
        for target, update in {**whole, **bound.parameters}.items():
            value = update.tensor.read_rows(0, int(np.prod(update.tensor.shape[:-1])))
            np.testing.assert_allclose(
                value.reshape(expected[target].shape), expected[target], atol=1e-6
            )
        if stored in tensors:
            continue
        for module, update in bound.weights.items():
            change = expected[f"{module}.weight"] - checkpoints.before[f"{module}.weight"]
            np.testing.assert_allclose(
                (update.up @ update.down).reshape(change.shape), change, atol=1e-5
            )
    assert taken
