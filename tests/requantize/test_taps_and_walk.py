"""Listening to modules, the sums of what they hear, and walking layer by layer."""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx_lm.models.llama import LlamaModel
from mlx_lm.models.switch_layers import SwitchGLU, SwitchLinear
from mlx_lm.tuner.lora import LoRALinear, LoRASwitchLinear
from support.models import run_model
from support.teachers import (
    ARCHITECTURES,
    VOCABULARY,
    Case,
    case_of,
    logits_of,
    make_case,
    random_text,
)
from support.tiny import LLAMA, make_adapter, make_model

from mlx_fusekit.formats.floats import Float32
from mlx_fusekit.requantize.calibrated import Calibration
from mlx_fusekit.requantize.moments import (
    Drift,
    InputMoments,
    compensated,
    expert_moments,
    input_groups,
    noted_inputs,
)
from mlx_fusekit.requantize.ranks import Ranks
from mlx_fusekit.requantize.solver import Moments
from mlx_fusekit.requantize.taps import ModuleInput, calls_intercepted, evaluate, inputs_noted
from mlx_fusekit.requantize.walk import (
    FinalStates,
    LayerChain,
    layers_of,
    measured_batches,
    token_batches,
)
from mlx_fusekit.running.model import place
from mlx_fusekit.running.swapped import FusedModules
from mlx_fusekit.texts.sequences import TokenSequence
from mlx_fusekit.verifying.parity import Variant, compare, make_batches

TEXT = random_text(5, longest=30)


def normal(*shape: int, seed: int = 0) -> Float32:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


# ---- taps ----


def test_a_call_is_noted_and_runs_as_before() -> None:
    linear = nn.Linear(8, 4)
    kind, before = type(linear), dict(linear)
    x = mx.array(normal(2, 3, 8))
    with inputs_noted({"a": linear}) as noted:
        heard = linear(x)
        assert isinstance(linear, kind)
        assert dict(linear) == before
    assert type(linear) is kind
    assert mx.array_equal(heard, linear(x))
    assert [(call.path, call.inputs is x, call.experts) for call in noted] == [("a", True, None)]


def test_classes_come_back_after_an_error() -> None:
    first, second = nn.Linear(8, 4), LoRALinear.from_base(nn.Linear(8, 4))
    embedding, layer = nn.Embedding(5, 8), nn.Linear(8, 8)
    modules = {"first": first, "second": second, "again": first, "embedding": embedding}
    kinds = [type(module) for module in (*modules.values(), layer)]
    stopped = contextlib.suppress(KeyboardInterrupt)
    with stopped, inputs_noted(modules), calls_intercepted(layer, lambda call, x: call(x)):
        raise KeyboardInterrupt
    with pytest.raises(ValueError, match=r"addmm|matmul|Last dimension"), inputs_noted(modules):
        first(mx.zeros((2, 3)))
    with pytest.raises(ZeroDivisionError), calls_intercepted(layer, lambda call, x: 1 / 0):
        layer(mx.zeros((2, 8)))
    assert [type(module) for module in (*modules.values(), layer)] == kinds


def test_a_module_under_two_names_is_noted_under_both() -> None:
    shared = nn.Linear(8, 4)
    with inputs_noted({"a": shared, "b": shared}) as noted:
        shared(mx.zeros((1, 8)))
    assert sorted(call.path for call in noted) == ["a", "b"]


def test_an_embedding_is_noted_as_the_head_only() -> None:
    embedding = nn.Embedding(5, 8)
    x = mx.array(normal(1, 3, 8))
    with inputs_noted({"e": embedding}) as noted:
        embedding(mx.array([[1, 2]]))
        heard = embedding.as_linear(x)
    assert mx.array_equal(heard, embedding.as_linear(x))
    assert len(noted) == 1
    np.testing.assert_array_equal(noted[0].rows(np.ones((1, 3), bool)), np.array(x)[0])


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
def test_padding_is_left_out(dtype: mx.Dtype) -> None:
    x = mx.array(normal(3, 4, 8)).astype(dtype)
    valid = np.arange(4) < np.array([[2], [4], [3]])
    rows = ModuleInput("a", x).rows(valid)
    assert rows.dtype == np.float32
    np.testing.assert_array_equal(rows, np.array(x.astype(mx.float32))[valid])
    flat = ModuleInput("a", x.reshape(12, 8)).rows(valid)
    np.testing.assert_array_equal(flat, np.array(x.astype(mx.float32)).reshape(12, 8))
    turned = ModuleInput("a", x.transpose(1, 0, 2)).rows(valid.T)
    np.testing.assert_array_equal(
        turned, np.array(x.astype(mx.float32)).transpose(1, 0, 2)[valid.T]
    )


def experts_of(tokens: int, adapted: bool = False) -> tuple[SwitchGLU, mx.array, mx.array]:
    mx.random.seed(0)
    layer = SwitchGLU(16, 24, 4)
    if adapted:
        for name in ("up_proj", "down_proj"):
            layer[name] = LoRASwitchLinear.from_base(layer[name], 2)
    indices = np.random.default_rng(0).integers(0, 4, (1, tokens, 2))
    return layer, mx.array(normal(1, tokens, 16)), mx.array(indices)


def moments_of_experts(layer: SwitchGLU, x: mx.array, indices: mx.array, name: str) -> Any:
    with inputs_noted({name: layer[name]}) as noted:
        out = layer(x, indices)
    evaluate(noted, out)
    return expert_moments(
        lambda turn: iter(noted if turn == 0 else []), range(4), noted[0].inputs.shape[-1], Ranks()
    )


@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize("tokens", [10, 31, 32, 200])
def test_experts_hear_the_tokens_that_are_routed_to_them(tokens: int, adapted: bool) -> None:
    """mlx-lm sorts the tokens by their expert when there are 64 or more of both."""
    layer, x, indices = experts_of(tokens, adapted)
    rows, of = np.array(x)[0], np.array(indices)[0]
    moments, everyone = moments_of_experts(layer, x, indices, "up_proj")
    assert everyone.count == 2 * tokens
    np.testing.assert_allclose(everyone.fused, 2 * rows.T @ rows, rtol=1e-4, atol=1e-3)
    prior = 0.25 * 16 / everyone.count * everyone.fused
    for expert in range(4):
        own = rows[(of == expert).any(axis=1)]
        twice = rows[(of == expert).all(axis=1)]
        wanted = own.T @ own + twice.T @ twice + prior
        np.testing.assert_allclose(moments[expert].fused, wanted, rtol=1e-4, atol=1e-3)
        assert moments[expert].count == (of == expert).sum()


def test_sorting_makes_no_difference_to_experts() -> None:
    """Each half of the tokens is below the limit, both together are above it."""
    layer, x, indices = experts_of(40)
    for name in ("gate_proj", "down_proj"):
        whole, everyone = moments_of_experts(layer, x, indices, name)
        halves = [
            moments_of_experts(layer, x[:, part], indices[:, part], name)
            for part in (slice(None, 20), slice(20, None))
        ]
        together = sum(half[1].fused for half in halves)
        np.testing.assert_allclose(everyone.fused, together, rtol=1e-4, atol=1e-5)
        for expert in range(4):
            counts = [half[0][expert].count for half in halves]
            assert whole[expert].count == sum(counts)


def test_some_experts_at_a_time_are_the_same_as_all() -> None:
    layer, x, indices = experts_of(50)
    with inputs_noted({"up": layer.up_proj}) as noted:
        evaluate_out = layer(x, indices)
    evaluate(noted, evaluate_out)

    def calls(turn: int) -> Iterator[ModuleInput]:
        return iter([] if turn else noted)

    whole, _ = expert_moments(calls, range(4), 16, Ranks())
    for expert in range(4):
        (alone,), _ = expert_moments(calls, [expert], 16, Ranks())
        np.testing.assert_array_equal(alone.fused, whole[expert].fused)


def test_an_expert_without_tokens_leans_on_all_experts() -> None:
    layer, x, _ = experts_of(30)
    moments, everyone = moments_of_experts(layer, x, mx.zeros((1, 30, 2), mx.uint32), "up_proj")
    assert moments[3].count == 0
    np.testing.assert_allclose(
        Moments.prepared(moments[3].fused).matrix,
        Moments.prepared(everyone.fused).matrix,
        rtol=1e-4,
        atol=1e-5,
    )
    assert isinstance(layer.up_proj, SwitchLinear)


def test_groups_are_modules_with_the_same_input() -> None:
    first, second, third, never = (nn.Linear(8, 8) for _ in range(4))
    x = mx.array(normal(1, 4, 8))
    modules = {"never": never, "third": third, "second": second, "first": first}
    groups = input_groups(lambda: third(first(x) + second(x)), modules)
    assert groups == [["first", "second"], ["third"]]
    assert [c.path for c in noted_inputs(lambda: third(first(x)), "first", first)] == ["first"]


# ---- moments ----


def test_moments_are_sums_over_tokens() -> None:
    x, y = normal(50, 8), normal(50, 8, seed=1)
    weights = normal(8, 3, seed=2)
    moments = InputMoments.zero(8, Drift(np.zeros((8, 8), np.float32)))
    applied = InputMoments.zero(8, Drift(np.zeros((8, 3), np.float32), weights))
    for part in (slice(0, 20), slice(20, 20), slice(20, None)):
        moments.add(x[part], y[part], Ranks())
        applied.add(x[part], y[part], Ranks())
    np.testing.assert_allclose(np.triu(moments.fused), np.triu(y.T @ y), rtol=1e-5, atol=1e-5)
    assert moments.drift is not None
    assert applied.drift is not None
    np.testing.assert_allclose(moments.drift.sums, y.T @ (x - y), rtol=1e-5, atol=1e-4)
    np.testing.assert_allclose(
        applied.drift.sums, moments.drift.sums @ weights, rtol=1e-4, atol=1e-4
    )
    assert (moments.count, moments.skipped) == (50, 0)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e19, -3e38])
def test_tokens_that_cannot_be_summed_are_skipped_in_both_models(bad: float) -> None:
    x, y = normal(50, 8), normal(50, 8, seed=1)
    x[3, 2], y[7, 0] = bad, bad
    moments = InputMoments.zero(8, Drift(np.zeros((8, 8), np.float32)))
    moments.add(x, y, Ranks())
    x, y = (np.delete(array, [3, 7], axis=0) for array in (x, y))
    np.testing.assert_allclose(np.triu(moments.fused), np.triu(y.T @ y), rtol=1e-5, atol=1e-5)
    assert moments.drift is not None
    np.testing.assert_allclose(moments.drift.sums, y.T @ (x - y), rtol=1e-5, atol=1e-5)
    assert (moments.count, moments.skipped) == (48, 2)


def test_massive_activations_are_counted() -> None:
    """What float16 holds, in one channel of many tokens."""
    x = normal(2000, 8)
    x[:, 0] = 6e4
    moments = InputMoments.zero(8)
    moments.add(x, None, Ranks())
    assert moments.skipped == 0
    assert moments.fused[0, 0] == pytest.approx(2000 * 6e4**2, rel=1e-4)
    assert np.isfinite(Moments.prepared(moments.fused).factor.unit).all()


def compensation(x: Float32, y: Float32, weights: Float32, *, applied: bool = False) -> Float32:
    columns, rows = weights.shape
    drift = Drift(np.zeros((columns, columns), np.float32))
    if applied:
        drift = Drift(np.zeros((columns, rows), np.float32), weights)
    moments = InputMoments.zero(columns, drift)
    moments.add(x, y, Ranks())
    prepared, last = Moments.prepared(moments.fused), rows - 1
    first = compensated(weights[:, :last], [slice(0, last)], drift, prepared)
    return np.hstack([first, compensated(weights[:, last:], [slice(last, rows)], drift, prepared)])


def test_the_drift_takes_the_form_of_fewer_operations() -> None:
    tall, flat = normal(64, 4), normal(64, 600)
    assert Drift.zero([tall], tokens=1000).weights is tall
    assert Drift.zero([tall, flat], tokens=1000).weights is None
    both = Drift.zero([tall, tall], tokens=1000).weights
    np.testing.assert_array_equal(both, np.hstack([tall, tall]))


@pytest.mark.parametrize("applied", [False, True])
def test_compensation_is_ridge_regression(applied: bool) -> None:
    x, weights = normal(300, 16), normal(16, 5, seed=2)
    y = x + 0.3 * normal(300, 16, seed=1)
    damping = 0.01 * np.trace(y.T @ y) / 16
    # Least squares of the output, and a pull towards the weights.
    left = np.concatenate([y, np.sqrt(damping) * np.eye(16)])
    right = np.concatenate([x @ weights, np.sqrt(damping) * weights])
    wanted = np.linalg.lstsq(left, right, rcond=None)[0]
    found = compensation(x, y, weights, applied=applied)
    np.testing.assert_allclose(found, wanted, atol=1e-3)
    assert np.linalg.norm(y @ found - x @ weights) < 0.95 * np.linalg.norm((y - x) @ weights)


@pytest.mark.parametrize("tokens", [1, 3, 15])
def test_compensation_of_few_tokens_is_bounded(tokens: int) -> None:
    """Where the tokens say nothing, the weights stay."""
    x, weights = normal(tokens, 64), normal(64, 5, seed=2)
    y = x + 0.1 * normal(tokens, 64, seed=1)
    found = compensation(x, y, weights)
    assert np.linalg.norm(y @ found - x @ weights) < 0.1 * np.linalg.norm((y - x) @ weights)
    assert np.linalg.norm(found - weights) < 0.3 * np.linalg.norm(weights)
    silent = np.linalg.svd(y)[2][tokens:]
    np.testing.assert_allclose(silent @ found, silent @ weights, atol=1e-3)


def test_compensation_where_the_fused_models_inputs_are_dead_or_gone() -> None:
    x, weights = normal(40, 16), normal(16, 5, seed=2)
    dead = x.copy()
    dead[:, 4:] = 0
    for y in (dead, np.zeros_like(x), np.full_like(x, 1e-30), np.full_like(x, np.nan)):
        found = compensation(x, y, weights)
        assert np.isfinite(found).all()
        # What never comes in cannot be made good.
        np.testing.assert_allclose(found[4:], weights[4:], atol=1e-4)
    np.testing.assert_array_equal(compensation(x, x, weights), weights)
    nothing = np.empty((0, 16), np.float32)
    np.testing.assert_array_equal(compensation(nothing, nothing, weights), weights)


def test_compensation_that_overflows_is_none() -> None:
    drift = Drift(np.full((4, 4), 1e38, np.float32))
    weights = np.full((4, 2), 10, np.float32)
    identity = Moments.prepared(np.eye(4, dtype=np.float32))
    with np.errstate(over="ignore", invalid="ignore"):
        assert compensated(weights, [slice(0, 2)], drift, identity) is weights


# ---- batches ----


def beginnings(tokens: Sequence[int]) -> list[tuple[int, ...]]:
    return [tuple(tokens[: end + 1]) for end in range(len(tokens))]


def test_batches_hold_every_beginning_of_a_sequence_once() -> None:
    text = [*random_text(40, 2, 60), TokenSequence((5,)), TokenSequence(tuple(range(90)) * 20)]
    system = tuple(range(7, 30))
    text += [TokenSequence((*system, *sequence.tokens)) for sequence in random_text(9, 2, 60)]
    batches = token_batches(text)
    counted = [
        beginning
        for batch in batches
        for row, valid in zip(np.array(batch.tokens), batch.valid, strict=True)
        for beginning, counts in zip(beginnings(row.tolist()), valid, strict=True)
        if counts
    ]
    wanted = {beginning for sequence in text for beginning in beginnings(sequence.tokens)}
    assert len(counted) == len(set(counted))
    assert set(counted) == wanted
    assert len(counted) <= sum(len(sequence.tokens) for sequence in text) - 8 * len(system)
    assert all(b.tokens.shape == b.valid.shape for b in batches)
    assert all(b.tokens.size <= 1024 or len(b.valid) == 1 for b in batches)
    assert len(batches) < 10
    # Padding is a sequence's own tokens again.
    for batch in batches:
        for row in np.array(batch.tokens).tolist():
            begun = [s.tokens for s in text if tuple(row[: len(s.tokens)]) == s.tokens]
            assert set(row) == set(max(begun, key=len))
    assert token_batches([]) == []


# ---- the walk ----


def chain_of(case: Case, start: int = 0) -> Any:
    fused = FusedModules(case.teacher)
    return LayerChain.recorded(case.teacher, fused, token_batches(TEXT), start)


def entering(model: Any, index: int, tokens: mx.array) -> mx.array:
    """The hidden states before a layer when the whole model runs; behind all, of one past."""
    layers, seen = layers_of(model), []
    after = index == len(layers)

    def note(call: Any, x: mx.array, *args: Any, **kwargs: Any) -> Any:
        out = call(x, *args, **kwargs)
        # Computed here, since a model may write into its hidden states later on.
        seen.append(np.array((out if after else x).astype(mx.float32)))
        return out

    with calls_intercepted(layers[index - after], note):
        model(tokens)
    return seen[0]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_walking_the_layers_is_running_the_model(name: str, tmp_path: Path) -> None:
    config, keys = ARCHITECTURES[name]
    case = make_case(tmp_path, config, keys, group_size=32)
    model, batches = case.teacher.model, token_batches(TEXT)
    layers = layers_of(model)
    for start in (0, len(layers) - 1):
        chain = chain_of(case, start)
        assert chain is not None
        for layer in range(start, len(layers)):
            for batch, *states in zip(batches, chain.teacher, chain.student, strict=True):
                wanted = entering(model, layer, batch.tokens)
                for state in states:
                    np.testing.assert_allclose(np.array(state.get()), wanted, atol=1e-5)
            chain.run_teacher(layer, {})
            chain.run_student(layer)
        for batch, state in zip(batches, chain.teacher, strict=True):
            wanted = entering(model, len(layers), batch.tokens)
            np.testing.assert_allclose(np.array(state.get()), wanted, atol=1e-5)


@pytest.mark.parametrize("name", ["lfm2", "qwen3_moe", "gemma3n"])
def test_padding_changes_nothing_before_it(name: str, tmp_path: Path) -> None:
    config, _ = ARCHITECTURES[name]
    model = run_model(make_model(tmp_path / "base", config, group_size=32)).model
    (batch,) = token_batches(TEXT[:4])
    assert not batch.valid.all()
    together = np.array(model(batch.tokens))
    for row, valid, tokens in zip(together, batch.valid, np.array(batch.tokens), strict=True):
        alone = logits_of(model, tokens[valid])
        np.testing.assert_allclose(row[valid], alone, atol=1e-3)


@pytest.mark.parametrize("name", ["llama", "qwen3_moe", "gemma3n"])
def test_the_student_walks_as_the_fused_model_runs(name: str, tmp_path: Path) -> None:
    config, keys = ARCHITECTURES[name]
    case = make_case(tmp_path, config, keys, bits=3, group_size=32)
    solved, fused = Calibration(case.plan, case.teacher, TEXT).run(), FusedModules(case.teacher)
    for step in case.plan.merged:
        assert step.target_spec is not None
        fused.put(step.module, solved.experts[step.module], step.target_spec)
    batches = token_batches(TEXT)
    layers = layers_of(case.teacher.model)
    chain = LayerChain.recorded(case.teacher, fused, batches, 0)
    assert chain is not None
    for layer in range(len(layers)):
        chain.run_student(layer)
    for batch, student in zip(batches, chain.student, strict=True):
        teacher = entering(case.teacher.model, len(layers), batch.tokens)
        with fused.active() as model:
            wanted = entering(model, len(layers), batch.tokens)
        np.testing.assert_allclose(np.array(student.get()), wanted, atol=1e-5)
        assert np.abs(wanted - teacher).max() > 1e-4


def test_states_measure_what_whole_models_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the head differs, and a batch's logits are too many to be held at once."""
    case = make_case(tmp_path, LLAMA, ["self_attn.q_proj", "model.embed_tokens"], bits=3)
    monkeypatch.setattr("mlx_fusekit.verifying.parity.LOGIT_BYTES", 4 * VOCABULARY * 20)
    text = [replace(sequence, scored=1) for sequence in TEXT]
    batches = make_batches(text, VOCABULARY)
    assert max(len(batch.chunks) for batch in batches) > 1
    walk = Calibration(case.plan, case.teacher, TEXT, measured=measured_batches(batches))
    solved, fused = walk.run(), FusedModules(case.teacher)
    for step in case.plan.requantized:
        assert step.target_spec is not None
        fused.put(step.module, solved.experts[step.module], step.target_spec)
    model, base = case.teacher.model, case.teacher.without_adapter
    variants = {"fused": Variant(model, fused.active), "base": Variant(model, base)}
    whole = compare(model, variants, text)
    states = {"fused": walk.fused.active, "base": base}
    known = walk.measured_states
    assert known is not None
    named = {"fused": known["student"], "base": known["base"], "teacher": known["teacher"]}
    of = {
        name: FinalStates(
            model,
            states.get(name, contextlib.nullcontext),
            dict(zip((batch.sequences for batch in batches), own, strict=True)),
        )
        for name, own in named.items()
    }
    teacher = of.pop("teacher")
    for name, parity in compare(teacher, of, text).items():
        np.testing.assert_allclose(parity.kl, whole[name].kl, rtol=1e-3, atol=1e-6)
    assert 0 < whole["fused"].kl_mean < whole["base"].kl_mean


@pytest.mark.parametrize("name", ["llama", "cohere", "phi3", "gemma3_text", "lfm2"])
def test_what_the_student_hears_is_what_the_fused_model_hears(name: str, tmp_path: Path) -> None:
    """Of groups one after the other, each reusing what those before have computed."""
    config, keys = ARCHITECTURES[name]
    case = make_case(tmp_path, config, keys, bits=3, group_size=32)
    solved, fused = Calibration(case.plan, case.teacher, TEXT).run(), FusedModules(case.teacher)
    steps = {step.module: step for step in case.plan.merged}
    first, batches = next(iter(steps)), token_batches(TEXT)
    spec = steps[first].target_spec
    assert spec is not None
    fused.put(first, solved.experts[first], spec)
    chain = LayerChain.recorded(case.teacher, fused, batches, 0)
    assert chain is not None
    for layer, block in enumerate(layers_of(case.teacher.model)):
        own = {path: place(case.teacher.model, path).value for path in steps}
        inside = {id(module) for _, module in block.named_modules()}
        own = {path: module for path, module in own.items() if id(module) in inside}
        for group in input_groups(partial(chain.run, layer, 0), own):
            for index, batch in enumerate(batches):
                (heard,) = chain.student_inputs(layer, group, index)
                with fused.active() as model:
                    module = {group[0]: place(model, group[0]).value}
                    with inputs_noted(module) as noted:
                        model(batch.tokens)
                np.testing.assert_allclose(
                    heard.rows(batch.valid), noted[0].rows(batch.valid), atol=1e-4
                )
            for path in group:
                fused.put(path, solved.experts[path], spec)
        chain.run_student(layer)


def test_what_is_heard_on_the_walk_is_what_is_heard_in_the_model(tmp_path: Path) -> None:
    case = make_case(tmp_path)
    chain = chain_of(case)
    paths = ["self_attn.o_proj", "mlp.down_proj"]
    batches = token_batches(TEXT)
    for layer in range(2):
        full = [f"model.layers.{layer}.{path}" for path in paths]
        modules = {path: place(case.teacher.model, path).value for path in full}
        heard = chain.run_teacher(layer, modules)
        for index, batch in enumerate(batches):
            with inputs_noted(modules) as noted:
                case.teacher.model(batch.tokens)
            for ours, theirs in zip(heard[index], noted, strict=True):
                assert ours.path == theirs.path
                np.testing.assert_allclose(
                    ours.get().rows(batch.valid), theirs.rows(batch.valid), atol=1e-5
                )


class Residual(LlamaModel):
    """A model that adds its first hidden states between its layers."""

    def __call__(self, inputs: mx.array, cache: Any = None, *_: Any) -> mx.array:
        h = first = self.embed_tokens(inputs)
        for layer in self.layers:
            h = layer(h + 0.5 * first, "causal", None)
        return self.norm(h)


class Backwards(LlamaModel):
    """A model that calls its layers in another order."""

    def __call__(self, inputs: mx.array, cache: Any = None, *_: Any) -> mx.array:
        h = self.embed_tokens(inputs)
        for layer in reversed(self.layers):
            h = layer(h, "causal", None)
        return self.norm(h)


class Twice(LlamaModel):
    """A model that goes through its layers twice."""

    def __call__(self, inputs: mx.array, cache: Any = None, *_: Any) -> mx.array:
        h = self.embed_tokens(inputs)
        for layer in [*self.layers, *self.layers]:
            h = layer(h, "causal", None)
        return self.norm(h)


class Keywords(LlamaModel):
    """A model that calls its layers by keyword."""

    def __call__(self, inputs: mx.array, cache: Any = None, *_: Any) -> mx.array:
        h = self.embed_tokens(inputs)
        for layer in self.layers:
            h = layer(x=h, mask="causal", cache=None)
        return self.norm(h)


NO_CHAINS = [Residual, Backwards, Twice, Keywords]


@pytest.mark.parametrize("kind", NO_CHAINS)
def test_layers_that_are_no_chain_are_told(kind: type, tmp_path: Path) -> None:
    case = make_case(tmp_path)
    assert chain_of(case) is not None
    case.teacher.model.model.__class__ = kind
    assert chain_of(case) is None


@pytest.mark.parametrize("kind", [Residual, Twice])
def test_models_whose_layers_are_no_chain_are_calibrated(kind: type, tmp_path: Path) -> None:
    case = make_case(tmp_path, {**LLAMA, "hidden_size": 64}, bits=3)
    case.teacher.model.model.__class__ = kind
    calibration = Calibration(case.plan, case.teacher, TEXT)
    solved = calibration.run()
    assert set(solved.results) == {step.module for step in case.plan.merged}
    assert sum(r.error for r in solved.results.values()) < 0.6 * len(solved.results)
    tokens = sum(len(sequence.tokens) for sequence in TEXT)
    called = 2 if kind is Twice else 1
    assert {result.tokens for result in solved.results.values()} == {called * tokens}


def test_a_model_without_a_list_of_layers_has_none() -> None:
    assert layers_of(nn.Linear(2, 2)) == []


def test_the_modules_of_a_layer_that_is_left_are_as_before(tmp_path: Path) -> None:
    base = make_model(tmp_path / "base")
    case = case_of(base, make_adapter(tmp_path / "adapter", base))
    kinds = [(path, type(module)) for path, module in case.teacher.model.named_modules()]
    before = logits_of(case.teacher.model, TEXT[0].tokens)
    Calibration(case.plan, case.teacher, TEXT).run()
    assert [(p, type(m)) for p, m in case.teacher.model.named_modules()] == kinds
    np.testing.assert_array_equal(logits_of(case.teacher.model, TEXT[0].tokens), before)
