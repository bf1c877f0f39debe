"""The readers of files that strangers made, each as a function of the files' bytes.

Several files in one input are divided by :data:`DIVIDER`. What a reader may do is return, or raise
a :class:`~mlx_fusekit.errors.FusekitError` of one line, in :data:`MOST_SECONDS` and
:data:`MOST_BYTES`.
"""

import atexit
import json
import os
import resource
import shutil
import signal
import struct
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import mlx.core as mx
from support import tiny

from mlx_fusekit import samples
from mlx_fusekit.adapters.opening import open_adapter
from mlx_fusekit.bench.report import read_report
from mlx_fusekit.checkpoint.base import BaseModel
from mlx_fusekit.checkpoint.folder import Checkpoint, read_json
from mlx_fusekit.checkpoint.header import read_header
from mlx_fusekit.checkpoint.sanitized import open_base
from mlx_fusekit.errors import FusekitError
from mlx_fusekit.exercise.findings import read_findings
from mlx_fusekit.gguf.file.header import read_gguf_header
from mlx_fusekit.gguf.modelfile import Modelfile
from mlx_fusekit.gguf.models.architectures import lay_out
from mlx_fusekit.gguf.tokenizer.sentencepiece_model import read_sentencepiece
from mlx_fusekit.gguf.tokenizer.vocabulary import read_vocabulary
from mlx_fusekit.inspecting import inspect
from mlx_fusekit.publishing.evidence import read_evidence
from mlx_fusekit.publishing.files import PublishedModel
from mlx_fusekit.publishing.measured import latency_section, parity_section
from mlx_fusekit.texts.data import read_sequences, training_data

DIVIDER = b"\n---\n"
#: Of processor time, which other work on the machine does not lengthen.
MOST_SECONDS = 5
MOST_BYTES = 300_000_000
#: Of zeros that stand for the tensors of a header.
_MOST_DATA = 1_000_000
_DATA_SUFFIXES = (".jsonl", ".json", ".txt", ".csv")
MODEL = {**tiny.LLAMA, "num_hidden_layers": 1, "hidden_size": 64, "intermediate_size": 64}


class BrokenPromiseError(Exception):
    """A reader did what none may do."""


class TooLong(BaseException):
    """A reader runs for too long; no handler of errors takes it."""


def header(data: bytes) -> None:
    """A safetensors file; of JSON alone, a file with that header and zeros for tensors."""
    path = _scratch() / "header.safetensors"
    path.write_bytes(_safetensors(data))
    for tensor in read_header(path).tensors.values():
        tensor.read()
        tensor.read_rows(0, 0)


def index(data: bytes) -> None:
    """``model.safetensors.index.json`` of a model in two files."""
    folder = _model("index", shards=2)
    (folder / "model.safetensors.index.json").write_bytes(data)
    Checkpoint.open(folder)


def config(data: bytes) -> None:
    """``config.json`` of a quantized model, to where it is exported."""
    folder = _model("config")
    (folder / "config.json").write_bytes(data)
    base = open_base(folder)
    for module in base.quantized_modules:
        with _refusals_pass():
            base.quantization(module)
            base.quantization(module, 64)
    with _refusals_pass():
        inspect(folder)
    lay_out(base)


def adapter(data: bytes) -> None:
    """``adapter_config.json`` and the header of ``adapters.safetensors``, bound to a base."""
    settings, weights = _split(data, 2)
    folder = _scratch() / "adapter"
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_bytes(settings)
    (folder / "adapters.safetensors").write_bytes(_safetensors(weights))
    opened = open_adapter(folder)
    _ = opened.trained_on, opened.rank, opened.num_layers, opened.notes, opened.mlx_lm_config
    training_data(opened.config, folder)
    opened.bind(_base(), "someone/something")


def data(data: bytes) -> None:
    """A file of text; its first line may be the suffix of its name."""
    name, _, text = data.partition(b"\n")
    suffix = name.decode("ascii", "replace")
    path = _scratch() / f"data{suffix if suffix in _DATA_SUFFIXES else '.txt'}"
    path.write_bytes(text if suffix in _DATA_SUFFIXES else data)
    read_sequences(path, _tokenizer(), max_length=32, tokens=200)


def tokenizer(data: bytes) -> None:
    """The three JSON files of a tokenizer, as they are exported."""
    folder = _scratch() / "tokenizer"
    folder.mkdir(exist_ok=True)
    names = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")
    for name, content in zip(names, _split(data, 3), strict=True):
        (folder / name).write_bytes(content or b"{}")
    vocabulary = read_vocabulary(folder, 300)
    beside = Modelfile(folder / "model.gguf", None, None)
    beside.text(read_json(folder / "generation_config.json"), vocabulary.stop_texts)


def sentencepiece(data: bytes) -> None:
    """``tokenizer.model``."""
    path = _scratch() / "tokenizer.model"
    path.write_bytes(data)
    read_sentencepiece(path)


def gguf(data: bytes) -> None:
    """The beginning of a GGUF file."""
    path = _scratch() / "model.gguf"
    path.write_bytes(data)
    read_gguf_header(path)


def report(data: bytes) -> None:
    """A saved report; its first line says of which command."""
    command, _, content = data.partition(b"\n")
    path = _scratch() / "report.json"
    path.write_bytes(content)
    if command == b"verify":
        evidence = read_evidence(_published(), "someone/fused", verify_report=path)
        assert evidence.parity is not None
        parity_section(evidence.parity, "this model")
    elif command == b"bench":
        found = read_evidence(_published(), "someone/fused", bench_report=path)
        assert found.bench is not None
        assert found.arm is not None
        latency_section(found.bench, found.arm)
        read_report(read_json(path), path.name).as_json()
    else:
        read_findings(read_json(path), path.name)


TARGETS: dict[str, Callable[[bytes], None]] = {
    target.__name__: target
    for target in (
        header,
        index,
        config,
        adapter,
        data,
        tokenizer,
        sentencepiece,
        gguf,
        report,
    )
}


def run(name: str, content: bytes) -> None:
    """Let a reader read, and look whether it keeps its promises.

    Raises:
        BrokenPromiseError: or whatever the reader let through.
    """
    mx.random.seed(0)  # or the keys of all models that were made are kept, to be computed some day
    before = _peak_bytes()
    try:
        with _limited_time():
            TARGETS[name](content)
    except FusekitError:
        pass
    except TooLong as error:
        raise BrokenPromiseError(f"it took more than {MOST_SECONDS} s") from error
    grown = _peak_bytes() - before
    if grown > MOST_BYTES:
        raise BrokenPromiseError(f"it took {grown / 1e6:.0f} MB")


@contextmanager
def _refusals_pass() -> Iterator[None]:
    """For what may be refused while that which follows is still of interest."""
    try:
        yield
    except FusekitError as error:
        assert "\n" not in str(error), repr(error)


@contextmanager
def _limited_time() -> Iterator[None]:
    def stop(*_: object) -> None:
        raise TooLong

    # Not the alarm: libFuzzer has that for itself.
    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, MOST_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def _peak_bytes() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def _split(content: bytes, parts: int) -> list[bytes]:
    found = content.split(DIVIDER, parts - 1)
    return found + [b""] * (parts - len(found))


def _safetensors(content: bytes) -> bytes:
    if not content.lstrip().startswith(b"{"):
        return content
    return struct.pack("<Q", len(content)) + content + bytes(_data_size(content))


def _data_size(content: bytes) -> int:
    """How many bytes a header speaks of, as well as that can be said."""
    try:
        entries = [entry for entry in json.loads(content).values() if isinstance(entry, dict)]
        size = max((entry["data_offsets"][1] for entry in entries if "dtype" in entry), default=0)
        return size if isinstance(size, int) and 0 <= size <= _MOST_DATA else 0
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError):
        return 0


@cache
def _scratch() -> Path:
    """A folder in memory, where the system has such."""
    memory = Path("/dev/shm")
    where = memory if os.access(memory, os.W_OK) else None
    folder = Path(tempfile.mkdtemp(prefix="fusekit-fuzz-", dir=where))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


@cache
def _model(name: str, shards: int = 1) -> Path:
    folder = tiny.make_model(_scratch() / name, MODEL, bits=4, group_size=32)
    if shards > 1:
        weights = mx.load(str(folder / "model.safetensors"))
        mx.eval(weights)
        (folder / "model.safetensors").unlink()
        for shard in range(shards):
            part = dict(sorted(weights.items())[shard::shards])
            path = folder / f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
            mx.save_safetensors(str(path), part, {"format": "mlx"})
    return folder


@cache
def _base() -> BaseModel:
    return open_base(_model("base"))


@cache
def _published() -> PublishedModel:
    return PublishedModel.open(_model("published"))


@cache
def _tokenizer() -> Any:
    from mlx_lm.utils import load_tokenizer

    return load_tokenizer(samples.model_path())
