"""Write the table of architectures in docs/gguf.md, with what each measures in llama.cpp.

    python scripts/gguf_support.py

Runs the comparison of ``tests/real/test_gguf_architectures.py`` (a minute; needs llama-cpp-python).
"""

import sys
import tempfile
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests" / "real")]

from support.tiny_architectures import CONFIGS, make_model  # noqa: E402
from test_gguf_architectures import compare, export  # noqa: E402

from mlx_fusekit.gguf.models.architectures import supported  # noqa: E402

DOCUMENT = ROOT / "docs" / "gguf.md"
START, END = "<!-- table: scripts/gguf_support.py -->\n", "<!-- end of table -->\n"


def main() -> None:
    """Measure, and replace the table."""
    measured = defaultdict[str, list[tuple[float, float]]](list)
    for name, config in CONFIGS.items():
        with tempfile.TemporaryDirectory() as folder:
            measured[config["model_type"]].append(correlations(name, Path(folder)))
        sys.stderr.write(f"{name}\n")
    lines = [
        "| model type | in llama.cpp | f32: correlation | 4-bit repacked: correlation | notes |",
        "|---|---|---|---|---|",
    ]
    for entry in supported():
        exact, repacked = (min(column) for column in zip(*measured[entry.model_type], strict=True))
        lines.append(
            f"| `{entry.model_type}` | `{entry.architecture}` | {exact:.9f} | {repacked:.4f} "
            f"| {entry.notes} |"
        )
    before, _, rest = DOCUMENT.read_text("utf-8").partition(START)
    after = rest.partition(END)[2]
    DOCUMENT.write_text(before + START + "\n".join(lines) + "\n" + END + after, "utf-8")


def correlations(name: str, folder: Path) -> tuple[float, float]:
    """Of the logits of MLX and llama.cpp: exported as f32, and from 4 bits."""
    found = []
    for bits, outtype in ((None, "f32"), (4, "auto")):
        model = make_model(folder / outtype, name, bits=bits)
        export(model, folder / f"{outtype}.gguf", outtype)
        found.append(compare(model, folder / f"{outtype}.gguf").correlation)
    return found[0], found[1]


if __name__ == "__main__":
    main()
