"""``mlx-fusekit fuse``."""

from functools import partial
from typing import Any

import click

from mlx_fusekit import launched
from mlx_fusekit.cli import fuse_each, making, options
from mlx_fusekit.errors import ConfigurationError


@click.command("fuse")
@options.model(default="mlx_model", show_default=True)
@options.adapter_path(
    "Adapter: folder or Hub id. Repeat to combine several LoRA adapters, each with a weight.  "
    "[default: adapters]",
    multiple=True,
    default=("adapters",),
    metavar="PATH[:WEIGHT]",
)
@making.save_path("fused_model")
@making.requantize(
    "How merged weights return to the base's format: calibrated on text, so that outputs "
    "change least; nearest by rounding, fast and lossy; auto calibrated, and wider where "
    "--max-kl asks for it."
)
@click.option("--bits", type=int, help="Give merged modules this many bits instead of the base's.")
@click.option("--dequantize", is_flag=True, help="Write the whole model unquantized.")
@click.option(
    "--dtype",
    type=click.Choice(["float16", "bfloat16", "float32"]),
    help="Type for --dequantize.  [default: that of the base's scales]",
)
@click.option(
    "-q",
    "--quantize",
    is_flag=True,
    help="Quantize the whole model, as `mlx_lm.convert -q` would, but calibrated.",
)
@making.whole_format(", for --quantize")
@making.calibrating(
    "base+adapter",
    "the adapter's training data where it lies, else text written by base and adapter",
    "  [auto's default: 0.1, without --quantize]",
)
@making.destinations()
@click.option(
    "--each",
    is_flag=True,
    help="Fuse every adapter by itself, into a folder of its name in --save-path, with one pass "
    "over the base.",
)
@options.combine()
@options.scale()
@options.ignore()
@making.text_only()
@making.resume()
@click.option("--again", is_flag=True, help="Fuse an adapter that the model holds already.")
@making.folder()
def command(as_json: bool, dry_run: bool, each: bool, **asked: Any) -> int:
    """Fuse adapters into a base model; one model folder comes out.

    The result loads with mlx_lm.load and needs no adapter. It has the base's format and size
    unless --bits, --quantize, --dequantize or --max-kl says otherwise. Exits with code 3 when
    --max-kl is not shown to hold; the model is there all the same. With --each, one adapter that
    fails leaves the others, and the exit code is 1.
    """
    named = [asked.pop(name) for name in ("model", "adapter_path", "save_path")]
    if each:
        if launched.ranks()[1] > 1:
            raise ConfigurationError("--each: not under mlx.launch; run it without, on one machine")
        return fuse_each.run(named, asked, dry_run=dry_run, as_json=as_json)
    from mlx_fusekit.fusing.fuse import prepare_fuse

    prepare = partial(prepare_fuse, *named, **asked)
    return making.run(prepare, dry_run=dry_run, as_json=as_json)
