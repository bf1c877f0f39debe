"""Make the embedded sample of ``mlx_fusekit.samples`` from nothing but a seed.

    python scripts/train_sample.py

generates the text, pre-trains a tiny Llama-architecture model on it, quantizes it to 4 bits with
mlx-lm, trains a LoRA adapter for text-to-SQL with mlx-lm's trainer, and prints the exact match on
unseen questions of the base, of base+adapter, and of mlx-lm's own fuse.
"""

import argparse
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path
from random import Random

OPENBLAS = Path("/usr/lib/x86_64-linux-gnu/openblas-pthread/libopenblas.so.0")
SIZE_LIMIT_BYTES = 4_000_000
GENERAL_CHATS = 150
DATA = Path(__file__).resolve().parents[1] / "mlx_fusekit" / "samples" / "data"


def main() -> None:
    """Make every file of the sample, then measure it."""
    arguments = _parse_arguments()
    _preload_openblas()
    start = time.perf_counter()
    out: Path = arguments.out
    shutil.rmtree(out, ignore_errors=True)
    (out / "sql").mkdir(parents=True)
    with tempfile.TemporaryDirectory() as scratch:
        _make_model(out, Path(scratch) / "float", arguments)
        _make_adapter(out, arguments)
        _check_size(out)
        print(f"made in {time.perf_counter() - start:.0f} s", flush=True)
        _print_figures(out, Path(scratch) / "fused")
    print(f"finished after {time.perf_counter() - start:.0f} s")


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Make the embedded sample from a seed.")
    parser.add_argument("--out", type=Path, default=DATA, help="Folder to (re)write.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=1800, help="Pre-training steps.")
    parser.add_argument("--iters", type=int, default=500, help="Adapter training iterations.")
    parser.add_argument("--learning-rate", type=float, default=4e-4, help="The adapter's peak.")
    return parser.parse_args()


def _preload_openblas() -> None:
    """Start again under OpenBLAS where Debian has it: mlx-cpu's own BLAS is far slower."""
    if OPENBLAS.exists() and "LD_PRELOAD" not in os.environ:
        os.environ["LD_PRELOAD"] = str(OPENBLAS)
        os.execv(sys.executable, [sys.executable, *sys.argv])


def _make_model(out: Path, float_folder: Path, arguments: argparse.Namespace) -> None:
    """Write general.jsonl and sample-4bit/."""
    import mlx.core as mx
    from sample import adapter, model, text

    mx.random.seed(arguments.seed)
    rng = Random(arguments.seed)
    held_out = [text.general_chat(rng) for _ in range(GENERAL_CHATS)]
    adapter.write_chats(out / "general.jsonl", held_out)
    texts = model.pretraining_texts(rng, held_out)
    tokenizer = model.make_tokenizer(texts, float_folder)
    print(f"pre-training, {arguments.steps} steps", flush=True)
    trained = model.pretrain(tokenizer, texts, rng, arguments.steps)
    model.save_float_model(trained, float_folder)
    model.quantize(float_folder, out / "sample-4bit")


def _make_adapter(out: Path, arguments: argparse.Namespace) -> None:
    """Write sql/ and adapter/."""
    from sample import adapter

    adapter.write_task(out / "sql", Random(arguments.seed + 1))
    adapter.train_adapter(
        out / "sample-4bit",
        out / "sql",
        out / "adapter",
        arguments.iters,
        arguments.learning_rate,
        arguments.seed,
    )


def _check_size(out: Path) -> None:
    size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    print(f"{size:,} bytes in {out.name}/")
    if size > SIZE_LIMIT_BYTES:
        raise SystemExit(f"the sample is larger than {SIZE_LIMIT_BYTES:,} bytes")


def _print_figures(out: Path, fused: Path) -> None:
    """Measure on every test item; float32 arithmetic is only for speed, the weights are equal."""
    from sample import adapter

    model, lora, test = out / "sample-4bit", out / "adapter", out / "sql" / "test.jsonl"
    adapter.fuse_with_mlx_lm(model, lora, fused)
    print("exact match on unseen questions, float32 arithmetic:")
    print(f"  base          {adapter.measure(model, None, test):.4f}")
    print(f"  base+adapter  {adapter.measure(model, lora, test):.4f}")
    print(f"  mlx_lm.fuse   {adapter.measure(fused, None, test):.4f}", flush=True)
    as_loaded = adapter.measure(model, lora, test, as_loaded=True)
    print(f"base+adapter as mlx_lm.load gives it (bfloat16): {as_loaded:.4f}")


if __name__ == "__main__":
    main()
