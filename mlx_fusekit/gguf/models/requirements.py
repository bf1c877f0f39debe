"""Settings that llama.cpp fixes or derives: refusals of what it cannot run, and its formulas."""

from collections.abc import Callable, Sequence

from mlx_fusekit.gguf.models.hyperparameters import array, count, sliding_layers
from mlx_fusekit.gguf.models.settings import Settings

#: A check of the settings: raises what cannot be exported, returns what the user should know.
Check = Callable[[Settings], str | None]


def only(field: str, *allowed: object) -> Check:
    """A setting that must have one of these values; missing is None."""

    def check(settings: Settings) -> None:
        value = settings.get(field)
        if value not in allowed:
            listed = " or ".join(str(one) for one in allowed)
            raise settings.refuse(
                f"{field} is {value!r}, but llama.cpp runs this architecture with {listed} only, "
                "so the model cannot be exported"
            )

    return check


def no_sliding(settings: Settings) -> None:
    """llama.cpp has no sliding window here."""
    if any(sliding_layers(settings, 1) if settings.used.get("layer_types") else ()):
        raise settings.refuse(
            "layer_types has sliding_attention, which llama.cpp does not run in this "
            "architecture, so the model cannot be exported"
        )


def partial_rotation(settings: Settings) -> int:
    """Rotated dimensions of a head of which only a part is rotated."""
    part = float(settings["partial_rotary_factor"])
    if not 0 < part <= 1:
        raise settings.refuse(
            f"partial_rotary_factor is {part:g}; it is the part of a head that is rotated, more "
            "than 0 and at most 1; correct it"
        )
    nested = (settings.declared.get("rope_parameters") or {}).get("partial_rotary_factor", part)
    if float(nested) != part:
        raise settings.refuse(
            f"partial_rotary_factor is {nested} in rope_parameters, but mlx-lm runs {part}; write "
            "it beside rope_parameters too"
        )
    return int(settings.head_dim * part)


def softmax_scale(many_layers: int) -> Check:
    """llama.cpp guesses Gemma's scale of the scores: from the number of layers."""

    def check(settings: Settings) -> None:
        guess = settings.head_dim
        if settings.layers == many_layers:
            guess = int(settings["hidden_size"]) // settings.heads
        if float(settings["query_pre_attn_scalar"]) != guess:
            raise settings.refuse(
                f"query_pre_attn_scalar is {settings['query_pre_attn_scalar']}, but llama.cpp "
                f"takes {guess} for a model of {settings.layers} layers, so the model cannot be "
                "exported"
            )

    return check


def window_of_gemma2(settings: Settings) -> str:
    """Say that llama.cpp applies a window that mlx-lm leaves out."""
    window = settings.get("sliding_window", 4096)
    return f"mlx-lm lets every layer see the whole text; llama.cpp every other one {window} tokens"


def no_rope_every_fourth(settings: Settings) -> None:
    """llama.cpp leaves rotary embeddings out of every fourth layer."""
    usual = [int((i + 1) % 4 != 0) for i in settings.layer_numbers()]
    if [int(bool(value)) for value in settings["no_rope_layers"]] != usual:
        raise settings.refuse(
            "no_rope_layers is not every fourth layer, as llama.cpp takes it to be, so the model "
            "cannot be exported"
        )


def norms_of_large_cohere(settings: Settings) -> None:
    """llama.cpp normalizes queries and keys of models of 64 layers and more."""
    if bool(settings.get("use_qk_norm")) != (settings.layers >= 64):
        raise settings.refuse(
            f"use_qk_norm is {settings.get('use_qk_norm')} with {settings.layers} layers; "
            "llama.cpp runs it with 64 layers or more, and only then, so the model cannot be "
            "exported"
        )


def window_of_exaone4(settings: Settings) -> None:
    """llama.cpp has a sliding window in models of 64 layers."""
    if bool(settings.get("sliding_window_pattern")) != (settings.layers == 64):
        raise settings.refuse(
            f"sliding_window_pattern is {settings.get('sliding_window_pattern')!r} with "
            f"{settings.layers} layers; llama.cpp runs a sliding window with 64 layers, and only "
            "then, so the model cannot be exported"
        )


def pattern_of_exaone4(settings: Settings) -> list[bool] | None:
    """Which layers see a window only, where that is not three of four."""
    if not (pattern := settings.get("sliding_window_pattern")):
        return None
    slides = [pattern[i % len(pattern)] == "L" for i in settings.layer_numbers()]
    return None if slides == [(i + 1) % 4 != 0 for i in settings.layer_numbers()] else slides


def same_heads(settings: Settings) -> None:
    """llama.cpp has no grouped queries here."""
    if settings.heads != settings.key_value_heads:
        raise settings.refuse(
            "num_key_value_heads differs from num_attention_heads, which llama.cpp does not run "
            "in this architecture, so the model cannot be exported"
        )


def queries_of_deepseek(settings: Settings) -> None:
    """llama.cpp takes some numbers of layers to mean a model without query rank."""
    lite = settings.layers in (26, 27) or (
        settings.layers == 48 and settings["vocab_size"] == 128256
    )
    if lite and settings.get("q_lora_rank"):
        raise settings.refuse(
            f"q_lora_rank is {settings['q_lora_rank']}, but llama.cpp takes a model of "
            f"{settings.layers} layers to have none, so the model cannot be exported"
        )


def epsilon_inside(settings: Settings) -> str | None:
    """llama.cpp has one epsilon for all norms; mlx-lm's of latent and linear attention is fixed."""
    epsilon = float(settings["rms_norm_eps"])
    if epsilon == 1e-6:
        return None
    return f"mlx-lm's norms inside attention use an epsilon of 1e-06, llama.cpp's {epsilon:g}"


def normalizes(settings: Settings) -> bool:
    """Whether mlx-lm makes the weights of the chosen experts sum to one."""
    return bool(settings["norm_topk_prob"]) and int(settings["num_experts_per_tok"]) > 1


def groups(field: str) -> Callable[[Settings], int | None]:
    """Groups of experts, where there are any and not all of them are used."""

    def value(settings: Settings) -> int | None:
        groups, used = int(settings.get("n_group", 1)), int(settings.get("topk_group", 1))
        return int(settings[field]) if 1 < groups != used else None

    return value


def key_value_heads_of_lfm2(settings: Settings) -> list[int]:
    """Key and value heads of each layer; of convolutions none."""
    attends = settings["full_attn_idxs"]
    return [settings.key_value_heads if i in attends else 0 for i in settings.layer_numbers()]


def width_of_lfm2(settings: Settings) -> int:
    """The feed-forward width that mlx-lm's class derives."""
    width = int(settings["block_ff_dim"])
    if not settings["block_auto_adjust_ff_dim"]:
        return width
    width = int(2 * width / 3)
    if (factor := settings.get("block_ffn_dim_multiplier")) is not None:
        width = int(factor * width)
    multiple = int(settings["block_multiple_of"])
    return multiple * -(-width // multiple)


def dense_or_routed(settings: Settings) -> None:
    """llama.cpp has experts in every layer here."""
    dense = settings.get("mlp_only_layers") or int(settings.get("decoder_sparse_step", 1)) != 1
    if dense:
        raise settings.refuse(
            "some layers are not mixtures of experts (mlp_only_layers, decoder_sparse_step), which "
            "llama.cpp does not run in this architecture, so the model cannot be exported"
        )


def head_of_linear_attention(settings: Settings) -> None:
    """llama.cpp takes keys and values of linear attention to be as wide."""
    key, value = settings["linear_key_head_dim"], settings["linear_value_head_dim"]
    if key != value:
        raise settings.refuse(
            f"linear_key_head_dim is {key} and linear_value_head_dim {value}; llama.cpp takes "
            "them to be the same, so the model cannot be exported"
        )


def sections_of_qwen35(settings: Settings) -> list[int]:
    """How many rotated pairs belong to time, height, width; text needs none of them."""
    return _sections(settings, (11, 11, 10))


def sections_of_qwen3_vl(settings: Settings) -> list[int]:
    """The same, with the widths that transformers takes where none are given."""
    return _sections(settings, (24, 20, 20))


def _sections(settings: Settings, default: Sequence[int]) -> list[int]:
    keys = ("rope_parameters", "rope_scaling")
    found = ((settings.get(key) or {}).get("mrope_section") for key in keys)
    return (list(next((widths for widths in found if widths), default)) + [0] * 4)[:4]


def deepstack_layers(settings: Settings) -> int:
    """Layers that take image features too; none where the model has no vision any more."""
    vision = settings.declared.get("vision_config")
    return len(vision.get("deepstack_visual_indexes") or ()) if isinstance(vision, dict) else 0


#: What llama.cpp reads of Qwen3-VL beyond the keys of its text model.
QWEN3_VL_KEYS = (
    array(name="rope.dimension_sections", value=sections_of_qwen3_vl),
    count(name="n_deepstack_layers", value=deepstack_layers),
)
QWEN3_VL_NOTES = "the slowest two of 64 rotated pairs stand still in llama.cpp"
