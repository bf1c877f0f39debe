"""Runs operations in processes of their own, with a fault at one of the calls that write.

``python -m support.fault_server`` reads a request a line and answers with a line; each run is a
fork of it, made before MLX has computed anything. What a run imports, the server imports too, so
that the next one need not.
"""

import atexit
import contextlib
import importlib
import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any

import mlx_fusekit
from mlx_fusekit.converting.convert import convert_adapter
from mlx_fusekit.differing.extract import extract
from mlx_fusekit.errors import FusekitError
from mlx_fusekit.fusing.each import prepare_each
from mlx_fusekit.fusing.fuse import prepare_fuse
from mlx_fusekit.gguf.exporting import export_gguf
from mlx_fusekit.gguf.lora import export_lora
from mlx_fusekit.writing import calls
from mlx_fusekit.writing.staging import write_file
from mlx_fusekit.writing.targets import FileTarget
from support.faults import FAULTS, Calls


def _fuse(folder: Path, base: str = "base", adapter: str = "adapter", **more: Any) -> None:
    prepare_fuse(
        folder / base, folder / adapter, folder / "out" / "fused", requantize="nearest", **more
    ).run(workers=2)


def _fuse_in_two(folder: Path, **more: Any) -> None:
    """As on a file system that cannot let two folders change places."""
    calls.exchange = lambda first, second: False
    _fuse(folder, **more)


def _each(folder: Path, **more: Any) -> None:
    """Two adapters; one of them may fail without the other."""
    adapters = [folder / "adapter", folder / "raw-adapter"]
    report = prepare_each(
        folder / "base", adapters, folder / "out", requantize="nearest", **more
    ).run(workers=2)
    for line in report.failed.values():
        raise FusekitError(line)


def _convert(folder: Path, **more: Any) -> None:
    """A base that mlx-lm converts, with a type that MLX does not have."""
    _fuse(folder, "raw", "raw-adapter", **more)


def _export(folder: Path, **more: Any) -> None:
    target = folder / "out" / "model.gguf"
    export_gguf(folder / "exportable", target, modelfile=True, workers=2, **more)


def _export_lora(folder: Path, **more: Any) -> None:
    target = folder / "out" / "adapter.gguf"
    export_lora(folder / "base", folder / "adapter", target, **more)


def _convert_adapter(folder: Path, **more: Any) -> None:
    target = folder / "out" / "peft"
    convert_adapter(folder / "base", folder / "adapter", target, "peft", **more)


def _extract(folder: Path, **more: Any) -> None:
    extract(folder / "base", folder / "other", folder / "out" / "extracted", rank=2, **more)


def _report(folder: Path, **more: Any) -> None:
    target = FileTarget(folder / "out" / "bench.json", "--json", **more)
    write_file(target, b"x" * 3000)


OPERATIONS = {
    "fuse": _fuse,
    "fuse in two": _fuse_in_two,
    "each": _each,
    "convert": _convert,
    "export-gguf": _export,
    "export-lora": _export_lora,
    "convert-adapter": _convert_adapter,
    "extract": _extract,
    "report": _report,
}


def _run(request: dict[str, Any], answer: int) -> None:
    """In the fork: one operation, and what came of it."""
    os.environ["TMPDIR"] = str(Path(request["folder"], "tmp"))
    known = set(sys.modules)
    fault = FAULTS.get(request["fault"])
    made = Calls(request["at"], fault, lasting=request["lasting"])
    calls._once = made
    told, code = "", 0
    try:
        OPERATIONS[request["operation"]](Path(request["folder"]), overwrite=request["overwrite"])
    except FusekitError as error:
        told, code = str(error), 1
    except BaseException:  # noqa: BLE001 - the test wants to see it
        told, code = traceback.format_exc(), 2
    atexit._run_exitfuncs()
    modules = sorted(sys.modules.keys() - known)
    found = {"made": made.made, "told": told, "code": code, "modules": modules}
    with open(answer, "w") as stream:
        json.dump(found, stream)
    os._exit(0)


def main() -> None:
    """Serve until there are no more requests."""
    _answer({"version": mlx_fusekit.__version__})
    for line in sys.stdin:
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(reader)
            os.dup2(2, 1)
            _run(json.loads(line), writer)
        os.close(writer)
        with open(reader, "rb") as answers:
            answer = answers.read()
        _, status = os.waitpid(child, 0)
        found = json.loads(answer) if answer else {"made": [], "told": "", "code": None}
        for module in found.pop("modules", ()):
            with contextlib.suppress(Exception):
                importlib.import_module(module)
        _answer(found | {"signal": os.WTERMSIG(status)})


def _answer(found: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(found) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
