"""The command line as a user meets it."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from support.command import run
from support.tiny import make_adapter, make_model

from mlx_fusekit import samples
from mlx_fusekit.inspecting import inspect


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the default names of ``mlx_lm.fuse``: mlx_model and adapters."""
    folder = tmp_path_factory.mktemp("cli")
    make_adapter(folder / "adapters", make_model(folder / "mlx_model"))
    return folder


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; sys.argv = ['mlx-fusekit', '--help']\n"
        "from mlx_fusekit.cli import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "modules = {'numpy', 'mlx', 'mlx_lm', 'transformers', 'rich', 'huggingface_hub'}\n"
        "heavy = modules & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert "fuse" in result.stdout


def test_fuse_needs_neither_mlx_nor_mlx_lm_for_an_mlx_base(folder: Path, tmp_path: Path) -> None:
    """A merge of bytes and NumPy starts at once; mlx_lm alone takes seconds to import."""
    code = (
        "import sys\n"
        "from mlx_fusekit import fuse\n"
        f"folder = {str(folder)!r}\n"
        f"fuse(folder + '/mlx_model', folder + '/adapters', {str(tmp_path / 'f')!r})\n"
        "heavy = {'mlx_lm', 'transformers'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("command", [[], ["fuse"], ["verify"], ["inspect"]])
def test_help_fits_80_columns(command: list[str]) -> None:
    result = run(*command, "--help")
    assert result.returncode == 0
    assert max(len(line) for line in result.stdout.splitlines()) <= 80


def test_the_defaults_are_those_of_mlx_lm_fuse(folder: Path) -> None:
    result = run("fuse", cwd=folder)
    assert result.returncode == 0, result.stderr
    assert (folder / "fused_model" / "model.safetensors").exists()
    assert "Fused into fused_model" in result.stdout
    assert "warning: 14 modules are rounded to nearest at 4 bits" in result.stderr


def test_json_is_one_object_on_stdout(folder: Path, tmp_path: Path) -> None:
    for more in ([], ["--dry-run"]):
        result = run("fuse", "--save-path", str(tmp_path / "fused"), "--json", *more, cwd=folder)
        report = json.loads(result.stdout)
        assert report["dry_run"] == bool(more)
        assert report["modules"] == {"4-bit group 64": 14}
        if not more:
            for path in (tmp_path / "fused").iterdir():
                path.unlink()
            (tmp_path / "fused").rmdir()


def test_a_dry_run_shows_the_plan(folder: Path, tmp_path: Path) -> None:
    adapter = ("--adapter-path", "adapters:0.25")
    result = run("fuse", *adapter, "--save-path", str(tmp_path / "new"), "--dry-run", cwd=folder)
    assert "nothing was written" in result.stdout
    assert "adapters (weight 0.25) (lora)" in result.stdout
    assert "disk free" in result.stdout
    assert "calibrating" not in result.stdout
    assert not (tmp_path / "new").exists()


def test_the_plan_of_a_calibration_says_what_it_takes(tmp_path: Path) -> None:
    paths = ["--model", str(samples.model_path()), "--adapter-path", str(samples.adapter_path())]
    plan = ["fuse", *paths, "--save-path", str(tmp_path / "new"), "--dry-run"]
    shown = " ".join(run(*plan).stdout.split())
    assert re.search(r"calibrating about [\d.]+ MB of memory and about \d+ min on this", shown)
    whole = json.loads(run(*plan, "--json").stdout)["needs"]
    assert not whole["streamed"]
    assert 1e8 < whole["peak_bytes"] < 2e9
    assert 0 < whole["seconds"] < 600
    least = str(whole["peak_bytes"] - 1)
    layers = json.loads(run(*plan, "--json", "--memory", least).stdout)["needs"]
    assert layers["streamed"]
    assert layers["peak_bytes"] < whole["peak_bytes"]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["fuse", "--model", "nothing/here/at-all"], 1, "neither a folder here nor a Hub id"),
        (["fuse", "--model", "owner/absent"], 1, "not in the local cache"),
        (["fuse", "--adapter-path", "nothing"], 1, "error: --adapter-path nothing"),
        (["fuse", "--save-path", "mlx_model"], 1, "choose another --save-path"),
        (["fuse", "--dtype", "float16"], 1, "--dtype goes with --dequantize"),
        (["fuse", "--bits", "many"], 2, "not a valid integer"),
        (["fuse", "--requantize", "magic"], 2, "magic"),
        (["fuse", "--nonsense"], 2, "No such option"),
        (["nonsense"], 2, "No such command"),
        (["inspect"], 2, "PATH"),
        (["inspect", "."], 1, "neither a model"),
        (["inspect", "adapters", "--model", "adapters"], 1, "is an adapter, not a model"),
    ],
)
def test_a_mistake_gets_one_line(
    folder: Path, arguments: list[str], code: int, message: str
) -> None:
    result = run(*arguments, cwd=folder)
    assert result.returncode == code
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert result.stdout == ""
    if code == 1:
        assert len(result.stderr.strip().splitlines()) == 1


def test_debugging_shows_the_traceback(folder: Path) -> None:
    result = run("fuse", "--save-path", "mlx_model", cwd=folder, FUSEKIT_DEBUG="1")
    assert result.returncode == 1
    assert "Traceback" in result.stderr


def test_inspect_a_model(folder: Path) -> None:
    facts = json.loads(run("inspect", "mlx_model", "--json", cwd=folder).stdout)
    expected = inspect(folder / "mlx_model").as_json() | {"path": "mlx_model"}
    assert facts == json.loads(json.dumps(expected))
    text = run("inspect", "mlx_model", cwd=folder).stdout
    assert "4-bit group 64" in text


def test_inspect_an_adapter(folder: Path) -> None:
    paths = ("inspect", "adapters", "--model", "mlx_model", "--json")
    facts = json.loads(run(*paths, cwd=folder).stdout)
    expected = inspect(folder / "adapters", model=folder / "mlx_model").as_json()
    assert facts == json.loads(json.dumps(expected | {"path": "adapters"}))
    assert len(facts["deltas"]) == 14


def test_a_closed_pipe_is_quiet(folder: Path) -> None:
    command = f"{sys.executable} -m mlx_fusekit inspect mlx_model --json | head -c 1"
    result = subprocess.run(
        command, shell=True, capture_output=True, text=True, cwd=folder, check=False
    )
    assert "Traceback" not in result.stderr
    assert "Exception ignored" not in result.stderr
