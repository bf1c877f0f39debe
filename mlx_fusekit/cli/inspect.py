"""``mlx-fusekit inspect``."""

from typing import TYPE_CHECKING

import click

from mlx_fusekit import figures
from mlx_fusekit.cli import options, output
from mlx_fusekit.cli.options import PATH
from mlx_fusekit.tables import Table

if TYPE_CHECKING:
    from mlx_fusekit.inspecting import AdapterFacts, DeltaFacts, ModelFacts


@click.command("inspect")
@click.argument("path", type=PATH)
@options.model("An adapter's base: compare its update with the quantization step.")
@options.scale()
@options.ignore()
@options.revision("model")
@options.as_json()
@options.trust_remote_code()
def command(
    path: str,
    model: str | None,
    scale: float | None,
    ignore: tuple[str, ...],
    revision: str | None,
    as_json: bool,
    trust_remote_code: bool,
) -> None:
    """Show the facts of a model or adapter folder."""
    from mlx_fusekit.inspecting import ModelFacts, inspect

    facts = inspect(
        path,
        model=model,
        scale=scale,
        ignore=ignore,
        revision=revision,
        trust_remote_code=trust_remote_code,
    )
    if as_json:
        output.print_json(facts.as_json())
    elif isinstance(facts, ModelFacts):
        _print_model(facts)
    else:
        _print_adapter(facts)


def _print_model(facts: "ModelFacts") -> None:
    for warning in facts.warnings:
        output.warn(warning)
    formats = ", ".join(f"{count} x {name}" for name, count in facts.formats.items())
    rows = [
        ("architecture", facts.architecture),
        ("parameters", figures.count(facts.parameters)),
        ("layers", str(facts.layers) if facts.layers is not None else "unknown"),
        ("size", f"{figures.size(facts.bytes)} in {facts.files} file(s), {facts.tensors} tensors"),
        ("bits per weight", figures.bits(facts.bits_per_weight)),
        ("matrices", formats),
    ]
    if facts.fused:
        rows.append(("fused from", str(facts.fused.get("base", {}).get("id"))))
    output.print_facts(f"Model {facts.path}", rows)
    if facts.exceptions:
        output.say()
        rows = list(facts.exceptions.items())
        output.print_table(Table("Other formats", ("module", "format"), rows))


def _print_adapter(facts: "AdapterFacts") -> None:
    for warning in facts.warnings:
        output.warn(warning)
    targets = ", ".join(f"{name} x {count}" for name, count in sorted(facts.targets.items()))
    rows = [
        ("type", facts.fine_tune_type),
        ("trained on", facts.trained_on or "not recorded"),
        ("rank", str(facts.rank) if facts.rank is not None else figures.UNKNOWN),
        ("scale", figures.setting(facts.scale)),
        ("layers", str(facts.num_layers) if facts.num_layers is not None else "not recorded"),
        ("modules", f"{facts.modules}: {targets}"),
        ("size", f"{figures.size(facts.bytes)}, {figures.count(facts.parameters)} parameters"),
    ]
    output.print_facts(f"Adapter {facts.path}", rows)
    if facts.deltas:
        header = ("module", "format", "rank", "delta", "step", "delta/step")
        deltas = [_row(delta) for delta in sorted(facts.deltas, key=_in_order)]
        output.say()
        output.print_table(Table("Update against the base", header, deltas))


def _in_order(delta: "DeltaFacts") -> list[tuple[int, str]]:
    """Sort key under which layer 2 comes before layer 10."""
    return [(int(part) if part.isdigit() else -1, part) for part in delta.module.split(".")]


def _row(delta: "DeltaFacts") -> tuple[str, ...]:
    return (
        delta.module.removeprefix("model."),
        delta.format.replace(" group ", "/"),
        str(delta.rank) if delta.rank is not None else figures.UNKNOWN,
        figures.rms(delta.delta_rms),
        figures.rms(delta.step_rms),
        figures.ratio(delta.delta_steps),
    )
