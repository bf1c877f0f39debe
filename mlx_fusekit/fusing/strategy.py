"""How merged weights are re-quantized, as far as the base can be run for it."""

from mlx_fusekit.adapters.fitting import vocabulary_size
from mlx_fusekit.checkpoint.belongings import has_tokenizer
from mlx_fusekit.errors import CheckpointError, ConfigurationError
from mlx_fusekit.figures import size
from mlx_fusekit.fusing.options import FuseOptions
from mlx_fusekit.fusing.report import LOSSY_BITS
from mlx_fusekit.hub import LocalFolder
from mlx_fusekit.machine import memory_bytes
from mlx_fusekit.merging.plan import FusePlan
from mlx_fusekit.requantize.strategy import Strategy

#: Share of the machine's memory that a model may take to be run.
_RUNNABLE_SHARE = 0.8


def chosen_strategy(
    plan: FusePlan, model: LocalFolder, options: FuseOptions
) -> tuple[Strategy | None, tuple[str, ...]]:
    """The strategy to use, and warnings about it.

    Raises:
        ConfigurationError: when it cannot be done, and nothing else that was asked for can.
    """
    specs = [step.target_spec for step in plan.requantized if step.target_spec is not None]
    if not specs:
        options.refuse_calibration()
        return None, ()
    strategy = options.strategy
    if not strategy.calibrates:
        return strategy, ()
    _check_budget(plan, options)
    other = strategy.otherwise if options.rounding_will_do else None
    if other is not None and all(spec.bits > LOSSY_BITS for spec in specs):
        return other, ()
    obstacle = _obstacle(plan, options)
    if obstacle is not None and other is not None:
        return other, (f"not calibrated: {obstacle}",)
    # What the user can mend is said, and not worked around at the cost of the fine-tune.
    obstacle = obstacle or _what_to_mend(plan, model)
    if obstacle is None:
        return strategy, ()
    raise ConfigurationError(
        f"--requantize {options.requantize}: {obstacle}; --requantize nearest works without, but "
        "can lose the fine-tune"
    )


def _check_budget(plan: FusePlan, options: FuseOptions) -> None:
    """Refuse bits a weight that cannot be reached, or not here."""
    target = options.target_bpw
    if target is None:
        return
    from mlx_fusekit.requantize.needs import memory_needs, streams
    from mlx_fusekit.requantize.widening import NARROWEST, least_bits_per_weight

    least = least_bits_per_weight(plan)
    if target < least:
        raise ConfigurationError(
            f"--target-bpw {target:g}: with all modules at {NARROWEST} bits the model takes "
            f"{least:.2f} bits a weight; allow that many"
        )
    if streams(plan, options.calibrating):
        needed = memory_needs(plan, options.calibration_tokens).resident
        raise ConfigurationError(
            f"--target-bpw {target:g}: choosing widths takes the whole model in memory, about "
            f"{size(needed)}; allow that with --memory, or say --q-bits instead"
        )


def _obstacle(plan: FusePlan, options: FuseOptions) -> str | None:
    """Why the base cannot be run on text, as far as its files tell."""
    base = plan.base.folder
    if not has_tokenizer(base):
        return f"{base} has no tokenizer, which calibration text needs"
    from mlx_fusekit.requantize.needs import memory_needs, streams

    calibrating = options.calibrating
    needs = memory_needs(plan, calibrating.tokens)
    if needs.spilled > _RUNNABLE_SHARE * memory_bytes():
        return (
            f"it takes about {size(needs.spilled)}, a layer at a time, and this machine's memory "
            f"({size(memory_bytes())}) is too small for it"
        )
    streams(plan, calibrating)  # refuses what --memory does not allow
    return None


def _what_to_mend(plan: FusePlan, model: LocalFolder) -> str | None:
    """Why the base cannot be run as the command was given."""
    from mlx_fusekit.running.tokenizers import tokenizer_of

    if plan.base.config.get("model_file") is not None and not model.trusted:
        return f"{model.path}: the model is code of its own, which needs --trust-remote-code"
    try:
        tokenizer_of(model, plan.base.config, vocabulary_size(plan.base))
    except CheckpointError as error:
        return str(error)
    return None
