"""Completion in the shell, asked of click as the shell asks it."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = "import sys; sys.argv[0] = 'mlx-fusekit'\nfrom mlx_fusekit.cli import main\n"
#: The same without what it prints, to look at the process afterwards.
SILENT = (
    "import contextlib, io\n"
    "nowhere = io.TextIOWrapper(io.BytesIO())\n"
    "with contextlib.suppress(SystemExit), contextlib.redirect_stdout(nowhere): main()\n"
)
#: What takes longer to import than somebody waits for Tab.
HEAVY = ("numpy", "mlx", "mlx_lm", "transformers", "huggingface_hub", "gguf", "matplotlib")


def python(code: str, **environment: str) -> str:
    return subprocess.run(
        [sys.executable, "-c", PROGRAM + code],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        check=True,
        timeout=60,
    ).stdout


def asking(words: list[str], incomplete: str) -> dict[str, str]:
    """The environment in which bash asks how ``incomplete`` behind ``words`` goes on."""
    line = ["mlx-fusekit", *words, incomplete]
    return {
        "_MLX_FUSEKIT_COMPLETE": "bash_complete",
        "COMP_WORDS": " ".join(line),
        "COMP_CWORD": str(len(line) - 1),
    }


def complete(*words: str) -> list[tuple[str, str]]:
    """Kind and value of each completion; the last word is the incomplete one."""
    lines = python("main()", **asking(list(words[:-1]), words[-1])).splitlines()
    return [(kind, value) for kind, _, value in (line.partition(",") for line in lines)]


def plain(*words: str) -> list[str]:
    return [value for kind, value in complete(*words) if kind == "plain"]


def overview() -> list[str]:
    commands = python("sys.argv[1:] = ['--help']\nmain()").partition("Commands:")[2]
    return [line.split()[0] for line in commands.splitlines() if line[:3].strip()]


def test_commands() -> None:
    assert plain("") == overview()
    assert plain("export-") == ["export-gguf", "export-lora"]
    assert plain("bench", "") == ["report"]
    assert plain("nonsense") == []


def test_options() -> None:
    assert plain("--") == ["--version", "--help"]
    found = plain("fuse", "--")
    assert {"--model", "--adapter-path", "--save-path", "--dry-run", "--help"} <= set(found)
    assert plain("verify", "--max-") == ["--max-kl", "--max-tokens"]
    assert plain("bench", "report", "--cs") == ["--csv"]
    # One that was given and is not to be repeated is offered no more.
    assert "--model" not in plain("fuse", "--model", "base", "--")
    assert "--adapter-path" in plain("fuse", "--adapter-path", "one", "--")


def test_choices() -> None:
    assert plain("fuse", "--requantize", "") == ["auto", "calibrated", "nearest"]
    assert plain("fuse", "--dtype", "b") == ["bfloat16"]
    assert "q8_0" in plain("export-gguf", "--outtype", "")


@pytest.mark.parametrize(
    "words",
    [
        ("fuse", "--model"),
        ("fuse", "--adapter-path"),
        ("fuse", "--save-path"),
        ("fuse", "--calibration"),
        ("verify", "--fused"),
        ("verify", "--data"),
        ("bench", "--plot"),
        ("bench", "report"),
        ("export-gguf", "--gguf-path"),
        ("export-lora", "--adapter-path"),
        ("inspect",),
    ],
)
def test_paths_are_left_to_the_shell(words: tuple[str, ...]) -> None:
    assert complete(*words, "some/fo") == [("file", "some/fo")]


@pytest.mark.parametrize(
    "words",
    [("",), *((command, "--") for command in ("fuse", "verify", "bench", "export-gguf",
      "export-lora", "inspect")), ("fuse", "--requantize", "")],
)  # fmt: skip
def test_nothing_heavy_is_imported(words: tuple[str, ...]) -> None:
    code = f"{SILENT}print(*sorted(set({HEAVY}) & set(sys.modules)))\n"
    assert python(code, **asking(list(words[:-1]), words[-1])).split() == []


def test_the_names_of_commands_need_none_of_them() -> None:
    loaded = "(name for name in sys.modules if name.startswith('mlx_fusekit.cli.'))"
    code = f"{SILENT}print(*{loaded})\n"
    found = python(code, **asking([], "")).split()
    assert set(found) == {"mlx_fusekit.cli.failures", "mlx_fusekit.cli.streams"}


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_every_shell_has_a_script(shell: str) -> None:
    script = python("main()", _MLX_FUSEKIT_COMPLETE=f"{shell}_source")
    assert f"_MLX_FUSEKIT_COMPLETE={shell}_complete" in script
    if shutil.which(shell):
        subprocess.run([shell, "-n"], input=script, text=True, check=True)


def test_bash_completes(tmp_path: Path) -> None:
    bash = shutil.which("bash")
    if bash is None:
        pytest.skip("there is no bash")
    version = subprocess.run([bash, "--version"], capture_output=True, text=True, check=True).stdout
    found = re.search(r"version (\d+)\.(\d+)", version)
    if found is None or (int(found[1]), int(found[2])) < (4, 4):
        pytest.skip("completion takes bash 4.4")
    program = tmp_path / "mlx-fusekit"
    program.write_text(f"#!{sys.executable}\n{PROGRAM}main()\n")
    program.chmod(0o755)
    asked = (
        'eval "$(_MLX_FUSEKIT_COMPLETE=bash_source mlx-fusekit)"\n'
        "COMP_WORDS=(mlx-fusekit export-gguf --outtype b); COMP_CWORD=3\n"
        '_mlx_fusekit_completion mlx-fusekit\necho "${COMPREPLY[@]}"\n'
        "complete -p mlx-fusekit\n"
    )
    shown = subprocess.run(
        [bash, "--norc", "-c", asked],
        capture_output=True,
        text=True,
        env={**os.environ, "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"},
        check=True,
    ).stdout.splitlines()
    assert shown[0] == "bf16"
    assert "-F _mlx_fusekit_completion" in shown[1]
