"""mlx-fusekit: a LoRA adapter and its MLX base model become one model that knows its task."""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from mlx_fusekit.bench.harness import benchmark
    from mlx_fusekit.bench.options import Workload
    from mlx_fusekit.bench.report import BenchReport
    from mlx_fusekit.converting.convert import ConvertReport, convert_adapter
    from mlx_fusekit.differing.diff import DiffReport, diff
    from mlx_fusekit.differing.extract import ExtractReport, extract
    from mlx_fusekit.fusing.each import EachReport, PreparedEach, fuse_each, prepare_each
    from mlx_fusekit.fusing.fuse import fuse, prepare_fuse
    from mlx_fusekit.fusing.prepared import PreparedFuse
    from mlx_fusekit.fusing.quantize import prepare_quantize, quantize
    from mlx_fusekit.fusing.report import FuseReport
    from mlx_fusekit.gguf.exporting import ExportReport, export_gguf
    from mlx_fusekit.gguf.lora import LoraReport, export_lora
    from mlx_fusekit.publishing.publish import PublishReport, publish
    from mlx_fusekit.verifying.report import ParityReport
    from mlx_fusekit.verifying.verify import verify

# The public names load on first use: importing NumPy and MLX takes longer than `--help` may.
_HOMES = {
    "fuse": "fusing.fuse",
    "prepare_fuse": "fusing.fuse",
    "quantize": "fusing.quantize",
    "prepare_quantize": "fusing.quantize",
    "FuseReport": "fusing.report",
    "PreparedFuse": "fusing.prepared",
    "fuse_each": "fusing.each",
    "prepare_each": "fusing.each",
    "EachReport": "fusing.each",
    "PreparedEach": "fusing.each",
    "benchmark": "bench.harness",
    "BenchReport": "bench.report",
    "Workload": "bench.options",
    "export_gguf": "gguf.exporting",
    "ExportReport": "gguf.exporting",
    "export_lora": "gguf.lora",
    "LoraReport": "gguf.lora",
    "publish": "publishing.publish",
    "PublishReport": "publishing.publish",
    "diff": "differing.diff",
    "DiffReport": "differing.diff",
    "extract": "differing.extract",
    "ExtractReport": "differing.extract",
    "convert_adapter": "converting.convert",
    "ConvertReport": "converting.convert",
    "verify": "verifying.verify",
    "ParityReport": "verifying.report",
}

__all__ = [
    "BenchReport",
    "ConvertReport",
    "DiffReport",
    "EachReport",
    "ExportReport",
    "ExtractReport",
    "FuseReport",
    "LoraReport",
    "ParityReport",
    "PreparedEach",
    "PreparedFuse",
    "PublishReport",
    "Workload",
    "__version__",
    "benchmark",
    "convert_adapter",
    "diff",
    "export_gguf",
    "export_lora",
    "extract",
    "fuse",
    "fuse_each",
    "prepare_each",
    "prepare_fuse",
    "prepare_quantize",
    "publish",
    "quantize",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        import importlib

        return getattr(importlib.import_module(f"mlx_fusekit.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'mlx_fusekit' has no attribute {name!r}")
