"""What mlx-lm's classes do to the values of a checkpoint in transformers' form.

Most classes rename and stack. These few change values: norms become the distance from one plus one,
multipliers are folded into weights, matrices are transposed. They do it to checkpoints that they
take for transformers', of which they look at another tensor each; so theirs is put beside the one
in question, and their own ``sanitize`` computes.

Source: ``models/*.py`` of mlx-lm 0.32.2; ``tests/wild/test_peft_values.py`` asks every class.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from mlx_fusekit.checkpoint.mlx_lm import MLX_LM_ERRORS, build, computes_anew, one_line
from mlx_fusekit.errors import CheckpointError
from mlx_fusekit.formats.floats import Float32


@dataclass(frozen=True)
class _Class:
    """A class that changes values.

    Attributes:
        changed: names of the parameters whose values it may change, seen from MLX's names.
        sign: by what it knows transformers' form, names and shapes.
        outer: what MLX's names have before transformers'.
        multiplies: whether it multiplies rows of weights, so that updates of them change too.
    """

    changed: str
    sign: Mapping[str, tuple[int, ...]]
    outer: str = ""
    multiplies: bool = False


_NORMS = r"norm\.weight$|conv1d\.weight$"
_QWEN3_5 = _Class(_NORMS, {"language_model.model.layers.0.linear_attn.conv1d.weight": (1, 1, 2)})
_CLASSES = {
    "falcon_h1": _Class(
        r"(proj|embed_tokens|lm_head|conv1d)\.weight$",
        {"model.layers.0.mamba.conv1d.weight": (1, 1, 2)},
        multiplies=True,
    ),
    "gpt2": _Class(r"(c_attn|c_proj|c_fc)\.weight$", {}, outer="model."),
    "qwen3_5": _QWEN3_5,
    "qwen3_5_moe": _QWEN3_5,
    "qwen3_next": _Class(
        _NORMS,
        {
            f"model.layers.0.mlp.experts.{{expert}}.{name}.weight": (1, 1)
            for name in ("up_proj", "down_proj", "gate_proj")
        },
    ),
    "step3p5": _Class(r"norm\.weight$", {"model.layers.0.moe.gate.weight": (1, 1)}),
}
#: Classes that may normalize the rows or columns of the head.
_NORMALIZING = ("baichuan_m1", "bailing_moe", "bailing_moe_linear")


class ClassValues:
    """What the class of a configuration does to values.

    All names are MLX's, of parameters.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        self._config = config
        self._known = _CLASSES.get(str(config.get("model_type")))

    @cached_property
    def _model(self) -> Any:
        return build(self._config)

    def normalizes(self, name: str) -> bool:
        """Whether it normalizes a weight, as some do their head."""
        is_head = self._config.get("model_type") in _NORMALIZING and name.endswith("lm_head.weight")
        return is_head and computes_anew(self._config, name)

    def changes(self, name: str) -> bool:
        """Whether it may change the values of a tensor."""
        return self._known is not None and re.search(self._known.changed, name) is not None

    def multiplies(self, name: str) -> bool:
        """Whether it may multiply the rows of a weight."""
        return self._known is not None and self._known.multiplies and self.changes(name)

    def converted(self, name: str, values: Float32) -> Float32:
        """The values of a parameter that it :meth:`changes`, of those of transformers' tensor.

        Args:
            name: of the parameter.
            values: transformers', in its shape.

        Raises:
            CheckpointError: with mlx-lm's reason, where it cannot convert them.
        """
        import mlx.core as mx

        assert self._known is not None, "asked of a class that changes values"
        experts = range(int(self._config.get("num_experts") or 0))
        beside = {
            sign.format(expert=expert): mx.zeros(shape)
            for sign, shape in self._known.sign.items()
            for expert in (experts if "{" in sign else [0])
        }
        try:
            given = {**beside, name.removeprefix(self._known.outer): mx.array(values)}
            return np.array(self._model.sanitize(given)[name], np.float32)
        except MLX_LM_ERRORS as error:
            reason = f"mlx-lm cannot convert {name} ({one_line(error)})"
            raise CheckpointError(reason) from error

    def row_factors(self, name: str, rows: int) -> Float32 | None:
        """What it multiplies the rows of a weight with; None where it multiplies none.

        Args:
            name: of the weight.
            rows: how many it has.
        """
        if not self.multiplies(name):
            return None
        return self.converted(name, np.ones((rows, 1), np.float32))[:, 0]
