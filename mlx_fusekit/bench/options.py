"""What a benchmark is asked to do."""

from dataclasses import dataclass

from mlx_fusekit.errors import ConfigurationError

#: Tokens of a prompt that go through the model at once, mlx-lm's default.
PREFILL_STEP = 2048


@dataclass(frozen=True)
class Workload:
    """What every arm is asked to do.

    Attributes:
        prompt_tokens: lengths of random prompts, each with every length of generation.
        generation_tokens: lengths to generate.
        prompt: a text to process instead of random tokens.
        batch_size: sequences that run together.
        trials: timed generations of each arm and shape.
        load_trials: processes of their own that load each arm, for load time and, in the first of
            them, peak memory; none for neither.
        delay_seconds: to wait before each trial.
        prefill_step: tokens of a prompt that go through the model at once.
        seed: of prompts, order and intervals.
    """

    prompt_tokens: tuple[int, ...] = (512,)
    generation_tokens: tuple[int, ...] = (128,)
    prompt: str | None = None
    batch_size: int = 1
    trials: int = 10
    load_trials: int = 3
    delay_seconds: float = 0.0
    prefill_step: int = PREFILL_STEP
    seed: int = 0

    def __post_init__(self) -> None:
        numbers = (*self.prompt_tokens, *self.generation_tokens, self.batch_size, self.trials)
        if min(numbers) < 1 or self.prefill_step < 1 or self.delay_seconds < 0:
            raise ConfigurationError("-p, -g, -b, -n and --prefill-step-size: give at least 1")
