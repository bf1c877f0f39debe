"""What the exercise is asked to do."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Settings:
    """What a learner chose.

    Attributes:
        model: folder or Hub id of the base; the embedded sample's without one.
        adapter_path: folder or Hub id of the adapter, None for the sample's.
        data: text for the parity; by default the sample's, or what base and adapter write.
        adapters: how many adapters the learner uses.
        prompt_tokens: length of the prompt that is timed.
        generation_tokens: tokens to generate after it.
        trials: timed generations of each model.
        load_trials: processes that load each model, for load time and memory.
        seed: of everything that is drawn.
        ignore: patterns of modules to leave out of the adapter.
        trust_remote_code: let the model's own code run.
    """

    model: str | None = None
    adapter_path: str | None = None
    data: str | None = None
    adapters: int = 3
    prompt_tokens: int = 32
    generation_tokens: int = 16
    trials: int = 10
    load_trials: int = 2
    seed: int = 0
    ignore: tuple[str, ...] = ()
    trust_remote_code: bool = False
