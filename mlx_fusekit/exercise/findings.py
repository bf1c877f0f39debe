"""What the exercise measured, as ``report.json`` holds it."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mlx_fusekit.bench.environment import Environment
from mlx_fusekit.bench.report import BenchReport, read_report
from mlx_fusekit.bench.typed import typed
from mlx_fusekit.checkpoint.folder import read_json
from mlx_fusekit.errors import CheckpointError, ConfigurationError

FORMAT = "mlx-fusekit exercise 1"
JSON_NAME = "report.json"
#: The two ways to fuse, by the names of their commands.
ROUNDED, CALIBRATED = "mlx_lm.fuse", "mlx-fusekit fuse"
#: The arms of the benchmark that the exercise is about.
BASE, ADAPTED, FUSED = "base", "base+adapter", "fused"


@dataclass(frozen=True)
class Fusing:
    """One way to fuse.

    Attributes:
        folder: the fused model's, in the exercise's.
        seconds: from the start of the command until the model was on the disk.
        disk_bytes: of its weight files.
    """

    folder: str
    seconds: float
    disk_bytes: int


@dataclass(frozen=True)
class Closeness:
    """How close a model is to base+adapter; None where it cannot be told.

    Attributes:
        kl_mean: KL divergence from base+adapter, in nats a token.
        top1_agreement: share of tokens with the same most likely token.
        exact_match: share of answers whose every token is the most likely one; None where the
            text holds no answers.
    """

    kl_mean: float | None
    top1_agreement: float | None
    exact_match: float | None


@dataclass(frozen=True)
class Findings:
    """Everything that a report is written from.

    Attributes:
        model: Hub id or folder name of the base.
        revision: the commit of a base from the Hub.
        adapter: Hub id or folder name of the adapter.
        kind: "lora", "dora" or "full".
        rank: of LoRA and DoRA, None otherwise.
        scale: the ``s`` of ``W + s*B*A``; None of a full fine-tune.
        formats: how many modules were merged, by the format they were written in.
        quantized: whether they had to be brought back to few bits.
        adapters: how many adapters the learner uses.
        fusing: by :data:`ROUNDED` and :data:`CALIBRATED`; the first is missing where it failed.
        parity: by model: base, those of ``fusing``, base+adapter.
        parity_data: which text that was measured on.
        parity_tokens: how many tokens were scored.
        bench: base, base+adapter and the calibrated model.
        plots: names of the pictures beside the report.
        seed: of everything that is drawn.
    """

    model: str
    revision: str | None
    adapter: str
    kind: str
    rank: int | None
    scale: float | None
    formats: dict[str, int]
    quantized: bool
    adapters: int
    fusing: dict[str, Fusing]
    parity: dict[str, Closeness]
    parity_data: str
    parity_tokens: int
    bench: BenchReport
    plots: tuple[str, ...]
    seed: int

    def as_json(self) -> dict[str, Any]:
        """The findings as a JSON object without paths of this machine."""
        bench = self.bench.as_json()
        for arm in bench["arms"].values():
            arm["adapter"] = arm["adapter"] and self.adapter
        facts = {name: getattr(self, name) for name in self.__dataclass_fields__ if name != "bench"}
        facts |= {
            "fusing": {name: asdict(value) for name, value in self.fusing.items()},
            "parity": {name: asdict(value) for name, value in self.parity.items()},
            "plots": list(self.plots),
            "machine": fingerprint(self.bench.environment),
        }
        return {"format": FORMAT, **facts, "bench": bench}


def read_findings(value: Mapping[str, Any], name: str) -> Findings:
    """Findings from their JSON object.

    Args:
        value: as :meth:`Findings.as_json` made it.
        name: of the file, for messages.

    Raises:
        ConfigurationError: when it is none.
    """
    if value.get("format") != FORMAT:
        raise ConfigurationError(f"{name}: not written by `mlx-fusekit exercise`")
    try:
        facts = {key: value[key] for key in Findings.__dataclass_fields__}
        facts |= {
            "fusing": {key: typed(Fusing, entry) for key, entry in facts["fusing"].items()},
            "parity": {key: typed(Closeness, entry) for key, entry in facts["parity"].items()},
            "plots": tuple(facts["plots"]),
            "bench": read_report(facts["bench"], name),
        }
        found = typed(Findings, facts)
        if found.bench.speedup is None or CALIBRATED not in found.fusing:
            raise ValueError("no fused model was timed")
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ConfigurationError(f"{name}: damaged ({error!r}); run the exercise again") from error
    return found


def read_findings_file(path: Path) -> Findings:
    """Findings from ``report.json``.

    Raises:
        ConfigurationError: when the file is missing, or holds none.
    """
    try:
        return read_findings(read_json(path), path.name)
    except CheckpointError as error:
        raise ConfigurationError(str(error)) from error


def digest(value: Mapping[str, Any]) -> str:
    """SHA-256 of a JSON object's content, however it is laid out, in hexadecimal."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def fingerprint(environment: Environment) -> str:
    """Twelve hexadecimal digits that tell machines of different makes apart.

    Of what stays when software is updated, and of nothing that names the machine or its owner: two
    machines of the same make have the same.
    """
    system = environment.os.split()
    facts = (
        environment.chip,
        environment.cores,
        round(environment.memory_bytes / 1e9),
        system[0],
        system[-1],
    )
    return hashlib.sha256(json.dumps(facts).encode("utf-8")).hexdigest()[:12]
