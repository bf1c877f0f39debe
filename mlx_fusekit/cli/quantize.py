"""``mlx-fusekit quantize``."""

from functools import partial
from typing import Any

import click

from mlx_fusekit.cli import making, options


@click.command("quantize")
@options.model("Model: folder or Hub id, merged or fine-tuned in all its weights.", required=True)
@making.save_path("quantized_model")
@making.whole_format()
@making.requantize(
    "How weights are quantized: calibrated on text, so that outputs change least; nearest by "
    "rounding, as `mlx_lm.convert -q` does; auto calibrated, and wider where --max-kl asks for it."
)
@making.calibrating("the model as it was", "text that the model writes")
@making.destinations()
@making.text_only()
@making.resume()
@making.folder()
def command(as_json: bool, dry_run: bool, **asked: Any) -> int:
    """Quantize a whole model, calibrated so that it stays close to what it is.

    What `mlx_lm.convert -q` would quantize is quantized, and the result is of the same size. Exits
    with code 3 when --max-kl is not shown to hold; the model is there all the same. To quantize
    after merging an adapter, use `mlx-fusekit fuse --quantize`.
    """
    from mlx_fusekit.fusing.quantize import prepare_quantize

    named = [asked.pop(name) for name in ("model", "save_path")]
    prepare = partial(prepare_quantize, *named, **asked)
    return making.run(prepare, dry_run=dry_run, as_json=as_json)
