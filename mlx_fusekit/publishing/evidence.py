"""Reports that a user gives to be published with a model, checked to be about that model."""

import sys
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlx_fusekit.checkpoint.folder import read_json
from mlx_fusekit.errors import CheckpointError, ConfigurationError
from mlx_fusekit.publishing.files import PublishedModel

if TYPE_CHECKING:
    from mlx_fusekit.bench.report import BenchReport

_NUMBERS = (
    *(f"kl_{base}{name}" for base in ("", "base_") for name in ("mean", "median", "p99")),
    *(f"{what}{of}" for what in ("top1_agreement",) for of in ("", "_base")),
    *(f"{what}_{of}" for what in ("perplexity", "exact_match") for of in ("fused", "base")),
    "perplexity_reference",
    "exact_match_reference",
    "recovered",
    "max_kl",
)
#: What ``passed`` is with each verdict.
_PASSED = {"kept": True, "lost": False, "not judged": None}


@dataclass(frozen=True)
class Evidence:
    """What was measured of a model.

    Attributes:
        parity: a report of ``verify --json``; None without one.
        verified_file: the GGUF file that it is about; None where it is about the MLX model.
        bench: a report of ``bench --json``.
        arm: the model's name in it.
        warnings: one line each.
    """

    parity: Mapping[str, Any] | None = None
    verified_file: str | None = None
    bench: "BenchReport | None" = None
    arm: str | None = None
    warnings: tuple[str, ...] = ()

    @property
    def verified(self) -> bool:
        """Whether ``verify`` found that the model kept its fine-tune."""
        return self.parity is not None and self.parity["verdict"] == "kept"


def read_evidence(
    model: PublishedModel,
    repo: str,
    verify_report: str | Path | None = None,
    bench_report: str | Path | None = None,
) -> Evidence:
    """Read the reports of a model.

    Args:
        model: that is published.
        repo: where to; a report may call the model by this name too.
        verify_report: JSON file that ``verify --json`` printed.
        bench_report: JSON file that ``bench --json`` wrote.

    Raises:
        ConfigurationError: when a file is no such report, or one of another model.
    """
    warnings, parity, verified_file, bench, arm = [], None, None, None, None
    names = {model.folder.resolve().name, repo.rpartition("/")[2]}
    ggufs = {gguf.name for gguf in model.ggufs}
    if verify_report is not None:
        path = Path(verify_report).expanduser()
        parity = _read_parity(path)
        name = Path(parity["fused"]).name
        _check_about(f"--verify-report {path}", {name}, names | ggufs)
        _check_sources(path, parity, model)
        verified_file = name if name in ggufs else None
        if _is_older(path, model):
            warnings.append(f"{path} is older than the model; verify it again if it has changed")
    if bench_report is not None:
        bench, arm = _read_bench(Path(bench_report).expanduser(), names)
    if parity is None:
        warnings.append(
            "the model was not verified; give the output of `mlx-fusekit verify --json` as "
            "--verify-report, and the card will show it"
        )
    elif parity["verdict"] == "lost":
        warnings.append("the model lost its fine-tune by --verify-report, and the card will say so")
    elif parity["verdict"] != "kept":
        warnings.append(
            "--verify-report does not judge whether the model kept its fine-tune, and the card "
            f"will say so ({parity['verdict_reason']})"
        )
    return Evidence(parity, verified_file, bench, arm, tuple(warnings))


def _read_parity(path: Path) -> dict[str, Any]:
    what = f"--verify-report {path}"
    report = _json(path, what)
    known = {
        "fused": isinstance(report.get("fused"), str),
        "reference": isinstance(report.get("reference"), str),
        "adapters": isinstance(report.get("adapters"), list),
        "tokens": isinstance(report.get("tokens"), int),
        "passed": "passed" in report and isinstance(report["passed"], bool | None),
        "kl_mean": "kl_mean" in report,
    }
    if missing := [name for name, ok in known.items() if not ok]:
        raise ConfigurationError(
            f"{what}: not a report of `mlx-fusekit verify --json` (it has no {missing[0]})"
        )
    for name in _NUMBERS:
        value = report.get(name)
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if value is not None and not (number and abs(value) <= sys.float_info.max):
            raise ConfigurationError(f"{what}: {name} is {value!r}, which is no number")
    return report | _read_verdict(report, what)


def _read_verdict(report: Mapping[str, Any], what: str) -> dict[str, str]:
    """The verdict and its reason; reports from before there were verdicts judge nothing."""
    if "verdict" not in report:
        old = "the report is of a version of mlx-fusekit that gave no verdict"
        return {"verdict": "not judged", "verdict_reason": old}
    verdict, reason = report["verdict"], report.get("verdict_reason")
    if not isinstance(verdict, str) or verdict not in _PASSED or not isinstance(reason, str):
        raise ConfigurationError(f"{what}: verdict is {verdict!r}, which `verify` never says")
    if report["passed"] is not _PASSED[verdict]:
        raise ConfigurationError(
            f"{what}: verdict is {verdict!r}, but passed is {report['passed']!r}; give the output "
            "of `mlx-fusekit verify --json` as it was printed"
        )
    return {"verdict": verdict, "verdict_reason": reason}


def _read_bench(path: Path, names: Collection[str]) -> tuple["BenchReport", str]:
    # It imports mlx-lm, which takes longer than all else that is checked here.
    from mlx_fusekit.bench.report import read_report

    what = f"--bench-report {path}"
    report = read_report(_json(path, what), what)
    own = {name: Path(report.arms[name].model).name for name in report.fused}
    _check_about(what, set(own.values()), names)
    return report, next(name for name, model in own.items() if model in names)


def _check_about(what: str, found: Collection[str], names: Collection[str]) -> None:
    if not set(found) & set(names):
        listed = ", ".join(sorted(found)) or "no fused model"
        raise ConfigurationError(
            f"{what}: is about {listed}, and not about {' or '.join(sorted(names))}; give the "
            "report of the model that is published"
        )


def _check_sources(path: Path, parity: Mapping[str, Any], model: PublishedModel) -> None:
    """Two models may lie in folders of the same name; they were hardly made of the same."""
    base = (model.recipe or {}).get("base")
    known = base.get("id") if isinstance(base, dict) else None
    if not parity["adapters"] or not isinstance(known, str):
        return
    adapters = (model.recipe or {}).get("adapters")
    fused = [
        adapter.get("weight")
        for adapter in (adapters if isinstance(adapters, list) else [])
        if isinstance(adapter, dict)
    ]
    measured = parity.get("weights", fused)  # which reports of earlier versions do not tell
    if fused and measured != fused:
        raise ConfigurationError(
            f"--verify-report {path}: compares with adapters of the weights {measured}, but this "
            f"model was made with {fused}; give the report of the model that is published"
        )
    if parity.get("combine") != (model.recipe or {}).get("combine"):
        raise ConfigurationError(
            f"--verify-report {path}: compares with adapters that were combined in another way "
            "than this model's; verify it again, without --combine"
        )
    if Path(parity["reference"]).name != Path(known).name:
        raise ConfigurationError(
            f"--verify-report {path}: compares with {parity['reference']}, but this model was made "
            f"of {known}; give the report of the model that is published"
        )


def _is_older(report: Path, model: PublishedModel) -> bool:
    weights = [name for name in model.names if name.endswith((".safetensors", ".gguf"))]
    newest = max((model.folder / name).stat().st_mtime for name in weights)
    return report.stat().st_mtime < newest


def _json(path: Path, what: str) -> dict[str, Any]:
    try:
        return read_json(path)
    except CheckpointError as error:
        raise ConfigurationError(f"{what}: {str(error).partition(': ')[2]}") from error
