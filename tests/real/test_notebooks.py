"""Every notebook runs from a bare start to its end, on the embedded sample."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("ipykernel", reason="ipykernel is not installed")
nbclient = pytest.importorskip("nbclient", reason="nbclient is not installed")
nbformat = pytest.importorskip("nbformat", reason="nbformat is not installed")

FOLDER = Path(__file__).parents[2] / "notebooks"
#: No cell may take longer.
CELL_SECONDS = 300


def executed(name: str, folder: Path) -> dict[str, str]:
    """What each code cell printed, by the cell's id; a cell that fails raises."""
    book = nbformat.read(FOLDER / name, 4)
    client = nbclient.NotebookClient(
        book,
        timeout=CELL_SECONDS,
        kernel_name="python3",
        resources={"metadata": {"path": str(folder)}},
    )
    client.execute()
    return {cell.id: printed(cell) for cell in book.cells if cell.cell_type == "code"}


def printed(cell: Any) -> str:
    return "".join(
        output.text if output.output_type == "stream" else "".join(output.get("data", {}))
        for output in cell.outputs
        if output.get("name") != "stderr"
    )


def number(pattern: str, text: str) -> float:
    found = re.search(pattern, text)
    assert found is not None, text
    return float(found[1].replace(",", ""))


def test_fusing_a_4bit_model(tmp_path: Path) -> None:
    told = executed("01_fuse_a_4bit_model.ipynb", tmp_path)
    # What its text says of the figures.
    low, high = (
        number(rf"{end} steps", told["weight"])
        for end in (r"of ([\d.]+) to [\d.]+", r"to ([\d.]+)")
    )
    assert 0 < low < high < 0.5
    update, noise = (
        number(rf"{name} +([\d.]+) steps", told["toy"]) for name in ("update", "noise")
    )
    assert noise > 0.9 * update
    assert number(r"rounded .*exact +([\d.]+)%", told["judge"]) < 10
    assert number(r"base\+adapter .*exact +([\d.]+)%", told["judge"]) > 25
    assert number(r"calibrated .*exact +([\d.]+)%", told["judge-calibrated"]) > 25
    assert number(r"is ([\d,.]+) times closer", told["judge-calibrated"]) > 50
    for cell in ("fuse-nearest", "fuse-calibrated"):
        assert "1.00 times the base's size" in told[cell]
    assert "image/png" in told["plot"]


def test_is_fusing_worth_it(tmp_path: Path) -> None:
    told = executed("02_is_fusing_worth_it.ipynb", tmp_path)
    assert all(arm in told["benchmark"] for arm in ("base ", "base+adapter", "fused"))
    low = number(r"interval ([\d.]+) to", told["speedup"])
    ratio = number(r"is ([\d.]+) times", told["speedup"])
    high = number(r"to ([\d.]+):", told["speedup"])
    assert low <= ratio <= high
    assert "break-even" in told["tokens"]
    assert number(r"first (\d+)%", told["equivalence"]) > 50
    assert number(r"10 tasks: +([\d.]+) MB", told["disk"]) < number(
        r"10 tasks.*, +([\d.]+)", told["disk"]
    )
    assert "image/png" in told["plot"]


def test_to_llama_cpp_and_ollama(tmp_path: Path) -> None:
    told = executed("03_to_llama_cpp_and_ollama.ipynb", tmp_path)
    assert "exact: True" in told["export-gguf"]
    assert told["modelfile"].startswith("FROM ./fused.gguf\n")
    assert "ollama create fused" in told["modelfile"]
    whole, small = (
        number(rf"{name} ([\d.]+) MB", told["export-lora"]) for name in ("base", "adapter")
    )
    assert small < whole / 2
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    assert "NOT OK" not in told["verify"]
    assert number(r"KL ([\d.]+)", told["verify"]) < 0.05
    assert number(r"exact answers: ([\d.]+)%", told["verify"]) > 90
