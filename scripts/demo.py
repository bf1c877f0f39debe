"""What ``make demo`` runs: fuse the embedded sample, verify and time it, export it, ask it.

python scripts/demo.py [--items N]

Exits with 1 if the sample's adapter does not know its task, or if a fused model cannot be made or
loaded.
"""

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import mlx_lm
from rich.console import Console
from rich.table import Table

from mlx_fusekit import samples, verify

ROOT = Path(__file__).resolve().parents[1]
OUT = ROOT / "demo"
QUESTIONS = OUT / "questions.jsonl"
ANSWER_TOKENS = 80
#: Commands as modules, which Python finds even where the environment's scripts have moved.
MODULES = {"mlx_lm.fuse": ["mlx_lm", "fuse"], "mlx-fusekit": ["mlx_fusekit"]}
#: A sample whose adapter scores no more than this has not learnt its task.
LEARNT = 0.95
#: Tokens that the verify command compares on, and more than all questions have.
VERIFIED_TOKENS = 600
ALL_TOKENS = 10**6
#: A fused model has kept the fine-tune if it scores at least this share of what the adapter does.
KEPT = 0.95

console = Console(highlight=False, markup=False)


@dataclass(frozen=True)
class Contender:
    """A model as ``mlx_lm.load`` takes it, and the command that makes it first, if one does."""

    name: str
    model: Path
    adapter: Path | None = None
    command: tuple[str, ...] = ()

    @property
    def weight_bytes(self) -> int:
        """Size of all weight files."""
        folders = [self.model] if self.adapter is None else [self.model, self.adapter]
        files = [path for folder in folders for path in folder.glob("*.safetensors")]
        return sum(path.stat().st_size for path in files)


@dataclass(frozen=True)
class Result:
    """What a model made of the unseen questions.

    Attributes:
        score: share (0 to 1) of the questions whose answer is exactly right.
        answer: its answer to the first of them.
        kl: mean KL divergence from base+adapter in nats a token of the right answers.
    """

    score: float
    answer: str
    kl: float


BASE = Contender("base", samples.model_path())
TEACHER = Contender("base + adapter", samples.model_path(), samples.adapter_path())
SOURCES = (
    *("--model", os.path.relpath(BASE.model, ROOT)),
    *("--adapter-path", os.path.relpath(samples.adapter_path(), ROOT)),
)
PEER = Contender("mlx_lm.fuse", OUT / "mlx-lm", command=("mlx_lm.fuse",))
OURS = Contender("mlx-fusekit fuse", OUT / "fused", command=("mlx-fusekit", "fuse"))
VERIFY = (
    *("verify", "--fused", os.path.relpath(OURS.model, ROOT)),
    *("--data", os.path.relpath(samples.evaluation_data_path(), ROOT)),
    *("--max-tokens", str(VERIFIED_TOKENS), "--max-kl", "0.01"),
)
BENCH = (
    *("bench", "--fused", os.path.relpath(OURS.model, ROOT)),
    *("-p", "32", "-g", "16", "-n", "6", "--load-trials", "1"),
)
GGUF = ("export-gguf", "--gguf-path", os.path.relpath(OUT / "fused.gguf", ROOT), "--modelfile")
WIDER = Contender(
    "mlx-fusekit fuse --bits 8",
    OUT / "fused-8bit",
    command=("mlx-fusekit", "fuse", "--bits", "8"),
)
CONTENDERS = (BASE, TEACHER, PEER, OURS, WIDER)


def main() -> None:
    """Fuse, ask, show, conclude."""
    parser = argparse.ArgumentParser(description="Fuse the embedded sample and evaluate it.")
    parser.add_argument("--items", type=int, default=40, help="Unseen questions (default: 40).")
    lines = samples.evaluation_data_path().read_text(encoding="utf-8").splitlines()
    lines = lines[: parser.parse_args().items]
    introduce(len(lines))
    shutil.rmtree(OUT, ignore_errors=True)
    OUT.mkdir()
    QUESTIONS.write_text("\n".join(lines), encoding="utf-8")
    for contender in CONTENDERS:
        if contender.command:
            make(contender)
    for arguments in (VERIFY, BENCH):
        console.print(run("mlx-fusekit", [*arguments, *SOURCES]), soft_wrap=True)
    model = ["--model", os.path.relpath(OURS.model, ROOT)]
    console.print(run("mlx-fusekit", [*GGUF, *model]), soft_wrap=True)
    with console.status("asking ..."):
        *_, question, expected = json.loads(lines[0])["messages"]
        results = evaluate(question)
    show(results, question["content"], expected["content"])
    conclude(results)


def introduce(items: int) -> None:
    """Say what is about to happen."""
    console.print(
        "The embedded sample is a tiny language model, quantized to 4 bits, and a LoRA\n"
        "adapter that taught it to answer questions in SQL.\n"
        "Three commands fuse the two; each leaves a folder that mlx-lm loads by itself.\n"
        "Three more verify one of them, time it, and write it for llama.cpp and Ollama.\n"
        f"Then every model gets the same {items} questions, none of which it was trained on,\n"
        "and an answer counts only if every character of it is right.\n"
    )


def make(contender: Contender) -> None:
    """Run the contender's command as a user would."""
    program, *options = contender.command
    run(program, [*options, "--save-path", os.path.relpath(contender.model, ROOT), *SOURCES])


def run(program: str, arguments: Sequence[str]) -> str:
    """Run a command from the repository; exit if it fails."""
    console.print(f"$ {shlex.join([program, *arguments])}", soft_wrap=True)
    done = subprocess.run(
        [sys.executable, "-P", "-m", *MODULES[program], *arguments],
        cwd=ROOT,
        env=os.environ | {"COLUMNS": "100"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        console.print(done.stdout)
        sys.exit(f"error: {program} ended with exit code {done.returncode}")
    return done.stdout


def evaluate(question: Mapping[str, str]) -> dict[Contender, Result]:
    """Score every model on the same questions, and ask it one."""
    found: dict[Contender, tuple[float | None, float | None]] = {}
    for contender in (PEER, OURS, WIDER):
        report = verify(
            BASE.model,
            samples.adapter_path(),
            contender.model,
            data=QUESTIONS,
            max_tokens=ALL_TOKENS,
        )
        found[contender] = report.exact_match_fused, report.kl_mean
        found[BASE] = report.exact_match_base, report.kl_base_mean
        found[TEACHER] = report.exact_match_reference, 0.0
    return {
        contender: Result(
            found[contender][0] or 0.0, ask(contender, question), found[contender][1] or 0.0
        )
        for contender in CONTENDERS
    }


def ask(contender: Contender, question: Mapping[str, str]) -> str:
    """Load the model as anybody would, with mlx-lm alone, and ask."""
    adapter = str(contender.adapter) if contender.adapter else None
    model, tokenizer = mlx_lm.load(str(contender.model), adapter_path=adapter)[:2]
    if not mx.metal.is_available():
        # The weights stay as they are; MLX's CPU backend multiplies float32 ten times faster.
        model.set_dtype(mx.float32)
    prompt = tokenizer.apply_chat_template([question], add_generation_prompt=True)
    return mlx_lm.generate(model, tokenizer, prompt, max_tokens=ANSWER_TOKENS).strip()


def show(results: dict[Contender, Result], question: str, expected: str) -> None:
    """Print the scores, then every answer to the first question."""
    table = Table(box=None, padding=(0, 2, 0, 0))
    table.add_column("model", no_wrap=True)
    table.add_column("exact answers", justify="right")
    table.add_column("KL from base + adapter", justify="right")
    table.add_column("weights", justify="right")
    for contender, result in results.items():
        table.add_row(
            contender.name,
            f"{result.score:.1%}",
            f"{result.kl:.2g}",
            f"{contender.weight_bytes / 1e6:.2f} MB",
        )
    console.print()
    console.print(table)
    console.print(f"\nThe first question: {question}\n")
    answers = Table(box=None, padding=(0, 2, 0, 0), show_header=False)
    answers.add_column(no_wrap=True)
    answers.add_column(overflow="fold")
    answers.add_row("expected", expected)
    for contender, result in results.items():
        answers.add_row(contender.name, result.answer)
    console.print(answers)


def conclude(results: dict[Contender, Result]) -> None:
    """Say what follows from the numbers; exit with 1 if the sample's adapter did not learn."""
    teacher = results[TEACHER].score
    if teacher <= LEARNT:
        sys.exit(f"error: {TEACHER.name} scores {teacher:.1%}, and should score over {LEARNT:.0%}")
    console.print("\nWhat follows:")
    for contender in (PEER, OURS, WIDER):
        score = results[contender].score
        size = contender.weight_bytes / BASE.weight_bytes
        kept = score >= KEPT * teacher
        verdict = "keeps the fine-tune" if kept else f"gives {score:.1%} instead of {teacher:.1%}"
        console.print(f"- {contender.name} {verdict}, at {size:.2f} times the base's size.")
    closer = results[PEER].kl / max(results[OURS].kl, 1e-12)
    console.print(
        f"At the same size, mlx-fusekit's model is {closer:.0f} times closer to base + adapter "
        "than mlx_lm.fuse's (KL, nats a token). This adapter changes the weights by more than "
        "a quantization step, so that rounding costs it little. Most change them by less, and "
        "then rounding costs most of the fine-tune: docs/requantization.md has real models."
    )
    console.print(f"\nThe fused models are in {OUT.name}/.")


if __name__ == "__main__":
    main()
