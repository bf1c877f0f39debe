"""Where wider bits go, and what they cost."""

import numpy as np
import pytest
from support.tiny import make_adapter, make_model

from mlx_fusekit.checkpoint.folder import Checkpoint
from mlx_fusekit.fusing.fuse import prepare_fuse
from mlx_fusekit.merging.formats import FormatOptions
from mlx_fusekit.merging.plan import plan_fuse
from mlx_fusekit.requantize.widening import choose_widths, next_width, step_bits, stored_bytes


@pytest.fixture(
    params=[{"bits": 4}, {"bits": 3, "group_size": 32}, {"mode": "mxfp4", "group_size": 32}],
    ids=["4-bit", "3-bit", "mxfp4"],
)
def prepared(request, tmp_path):
    base = make_model(tmp_path / "base", **request.param)
    adapter = make_adapter(tmp_path / "adapter", base)
    return prepare_fuse(base, adapter, tmp_path / "fused", requantize="nearest")


def steps_of(prepared):
    return {step.module: step for step in prepared.plan.merged}


def test_promised_bytes_are_the_plans(prepared):
    plan, steps = prepared.plan, steps_of(prepared)
    for bits in (5, 6, 8):
        path = "model.layers.1.mlp.down_proj"
        wider = plan_fuse(plan.base, plan.adapter, FormatOptions(widths={path: bits}))
        promised = stored_bytes(steps[path], bits) - stored_bytes(
            steps[path], step_bits(steps[path])
        )
        before = sum(tensor.nbytes for file in plan.files for tensor in file.tensors)
        after = sum(tensor.nbytes for file in wider.files for tensor in file.tensors)
        assert promised == after - before


def test_widened_modules_are_in_the_configuration(prepared):
    plan = prepared.plan
    path = "model.layers.0.self_attn.q_proj"
    wider = plan_fuse(plan.base, plan.adapter, FormatOptions(widths={path: 6}))
    assert wider.quantization is not None
    assert wider.quantization[path]["bits"] == 6
    assert [step.module for step in wider.merged if step.target_spec != step.source_spec] == [path]


def test_the_costliest_byte_goes_first(prepared):
    steps = steps_of(prepared)
    small, large = "model.layers.0.self_attn.k_proj", "model.layers.0.mlp.up_proj"
    costs = {(small,): 1.0, (large,): 1.0, ("model.layers.1.mlp.gate_proj",): 0.01}
    chosen = choose_widths(costs, steps, kl=1.0, aim=0.8)
    assert set(chosen.bits) == {small}
    assert chosen.predicted_kl <= 0.8
    costs[(large,)] = 100.0
    assert set(choose_widths(costs, steps, kl=1.0, aim=0.9).bits) == {large}


def test_groups_widen_together_and_only_as_far_as_needed(prepared):
    steps = steps_of(prepared)
    group = tuple(f"model.layers.0.self_attn.{name}_proj" for name in "qkv")
    rest = ("model.layers.1.mlp.down_proj",)
    costs = {group: 3.0, rest: 1.0}
    aims = np.geomspace(0.9, 0.02, 8)
    added = []
    for aim in aims:
        chosen = choose_widths(costs, steps, kl=1.0, aim=aim)
        assert len({chosen.bits.get(path) for path in group}) == 1
        assert chosen.predicted_kl <= aim
        added.append(chosen.added_bytes)
    assert added == sorted(added)


def test_the_cap_holds(prepared):
    steps = steps_of(prepared)
    costs = {(path,): 1.0 for path in steps}
    for cap in (0, 100, 5_000, 20_000):
        chosen = choose_widths(costs, steps, kl=1.0, aim=1e-9, most_added_bytes=cap)
        assert chosen.added_bytes <= cap
        real = sum(
            stored_bytes(steps[p], b) - stored_bytes(steps[p], step_bits(steps[p]))
            for p, b in chosen.bits.items()
        )
        assert real == chosen.added_bytes


def test_a_budget_also_makes_narrower(prepared):
    """From the narrowest on, a byte goes where it gains most, also below the planned width."""
    steps = steps_of(prepared)
    small, large = "model.layers.0.self_attn.k_proj", "model.layers.0.mlp.up_proj"
    costs = {(path,): 1.0 for path in steps} | {(small,): 1000.0, (large,): 0.001}
    planned = sum(stored_bytes(steps[p], step_bits(steps[p])) for p in steps)
    for cap in (-planned // 8, 0):
        chosen = choose_widths(costs, steps, kl=1.0, most_added_bytes=cap, narrowest=2)
        bits = {p: chosen.bits.get(p, step_bits(steps[p])) for p in steps}
        assert bits[large] < bits[small]
        after = sum(stored_bytes(steps[p], bits[p]) for p in steps)
        assert after - planned == chosen.added_bytes <= cap
        assert chosen.added_bytes > cap - 20_000  # no wider width fits any more


def test_an_impossible_aim_ends_at_the_widest(prepared):
    steps = steps_of(prepared)
    chosen = choose_widths({(path,): 1.0 for path in steps}, steps, kl=1.0, aim=1e-30)
    assert set(chosen.bits.values()) == {8}
    assert set(chosen.bits) == set(steps)


def test_widths_are_those_of_mlx():
    assert [next_width(bits) for bits in (1, 2, 3, 4, 5, 6, 8)] == [2, 3, 4, 5, 6, 8, None]


def test_widths_add_to_bits(tmp_path):
    base = make_model(tmp_path / "base")
    adapter = make_adapter(tmp_path / "adapter", base)
    plan = prepare_fuse(base, adapter, tmp_path / "fused", requantize="nearest").plan
    assert isinstance(plan.base, Checkpoint)
    path = "model.layers.0.mlp.up_proj"
    wider = plan_fuse(plan.base, plan.adapter, FormatOptions(bits=5, widths={path: 8}))
    bits = {step.module: step.target_spec.bits for step in wider.merged if step.target_spec}
    assert bits.pop(path) == 8
    assert set(bits.values()) == {5}
