"""From an MLX model folder to one GGUF file: the public ``export_gguf()``."""

import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf

from mlx_fusekit import hub
from mlx_fusekit.adapters.sources import open_model
from mlx_fusekit.checkpoint.base import BaseModel
from mlx_fusekit.checkpoint.folder import is_adapter, optional_json
from mlx_fusekit.errors import CheckpointError, ConfigurationError
from mlx_fusekit.gguf.file.encoding import TensorEncoding
from mlx_fusekit.gguf.file.plan import plan_gguf
from mlx_fusekit.gguf.file.target import gguf_target
from mlx_fusekit.gguf.file.writer import write_gguf
from mlx_fusekit.gguf.model_facts import add_facts, read_model_facts
from mlx_fusekit.gguf.modelfile import Modelfile
from mlx_fusekit.gguf.models import hyperparameters
from mlx_fusekit.gguf.models.architectures import Layout, lay_out
from mlx_fusekit.gguf.outtypes import OUTTYPES
from mlx_fusekit.gguf.tokenizer.vocabulary import Vocabulary, read_vocabulary
from mlx_fusekit.progress import StepProgress, of_step

_GENERATION_CONFIG = "generation_config.json"


@dataclass(frozen=True)
class ExportReport:
    """What an export did, or with ``dry_run`` would do.

    Attributes:
        model: that was exported: Hub id, or the path the user gave.
        gguf_path: the file.
        architecture: llama.cpp's name.
        outtype: as asked for.
        bytes: size of the file; of a dry run, of its tensors.
        types: number of tensors by GGUF type.
        exact: whether every tensor holds the very values that MLX dequantizes.
        inexact: the tensors that do not, with their errors; errors are None in a dry run.
        notes: what llama.cpp will do otherwise than mlx-lm, one line each.
        modelfile: Ollama's, where one was written.
        ollama_command: the line that makes an Ollama model of it.
    """

    model: str
    gguf_path: str
    architecture: str
    outtype: str
    bytes: int
    types: dict[str, int]
    exact: bool
    inexact: tuple[TensorEncoding, ...]
    notes: tuple[str, ...]
    modelfile: str | None
    ollama_command: str | None
    dry_run: bool
    seconds: float

    def as_json(self) -> dict[str, Any]:
        """The report as a JSON object."""
        fields = {name: getattr(self, name) for name in self.__dataclass_fields__}
        fields["inexact"] = [
            {
                "tensor": tensor.name,
                "type": tensor.ggml_type.name,
                "relative_rms_error": tensor.rel_rmse,
                "max_absolute_error": tensor.max_abs_error,
            }
            for tensor in self.inexact
        ]
        return fields | {"notes": list(self.notes)}


@dataclass(frozen=True)
class _Exportable:
    """A model that was found to be exportable."""

    layout: Layout
    vocabulary: Vocabulary

    @classmethod
    def of(cls, base: BaseModel) -> "_Exportable":
        """Refuse an architecture, a setting, a tensor or a tokenizer; reads headers only."""
        layout = lay_out(base)
        embedding = next(t for t in layout.tensors if t.name == "token_embd.weight")
        return cls(layout, read_vocabulary(base.folder, embedding.shape[0]))

    def keys(self, found: hub.LocalFolder) -> gguf.GGUFWriter:
        """All metadata of the file."""
        writer = gguf.GGUFWriter(None, self.layout.architecture)
        writer.add_type(gguf.GGUFType.MODEL)
        texts = {token.text for token in self.vocabulary.tokens}
        add_facts(read_model_facts(found), writer, texts)
        hyperparameters.write(self.layout.hyperparameters, writer)
        self.vocabulary.add_to(writer)
        return writer

    def modelfile_text(self, modelfile: Modelfile, folder: Path) -> str:
        """What Ollama's Modelfile says; refuses what it cannot hold."""
        generation = optional_json(folder, _GENERATION_CONFIG) or {}
        return modelfile.text(generation, self.vocabulary.stop_texts)


def check_export(base: BaseModel, outtype: str = "auto") -> None:
    """Refuse a model that cannot be exported, before anything is made of it.

    Raises:
        CheckpointError: naming the architecture, the setting, the tensor or the tokenizer file.
        ConfigurationError: for an outtype that there is not.
    """
    _check_outtype(outtype)
    _Exportable.of(base)


def _check_outtype(outtype: str) -> None:
    if outtype not in OUTTYPES:
        raise ConfigurationError(f"--outtype {outtype}: choose one of {', '.join(OUTTYPES)}")


def export_gguf(
    model: str | Path,
    gguf_path: str | Path,
    *,
    outtype: str = "auto",
    modelfile: bool = False,
    system: str | None = None,
    ollama: str | None = None,
    revision: str | None = None,
    overwrite: bool = False,
    dry_run: bool = False,
    trust_remote_code: bool = False,
    workers: int | None = None,
    progress: StepProgress | None = None,
) -> ExportReport:
    """Write a model as one GGUF file that llama.cpp and Ollama run.

    Args:
        model: folder or Hub id, quantized or not.
        gguf_path: the file to write.
        outtype: ``auto`` repacks quantized tensors into the block type that holds the same values
            and keeps the others as they are; ``lossless`` refuses any rounding and widens instead;
            ``f32``, ``f16``, ``bf16`` and ``q8_0`` convert.
        modelfile: write Ollama's Modelfile beside it.
        system: system prompt for the Modelfile.
        ollama: name under which ``ollama create`` makes a model of it.
        revision: of a Hub id.
        overwrite: replace an existing GGUF file and Modelfile.
        dry_run: plan only; reads headers, scales and the tokenizer, and writes nothing.
        trust_remote_code: let model code that lies in the folder run.
        workers: threads.
        progress: called with bytes written.

    Raises:
        FusekitError: before the first byte is written, for what cannot be exported.
    """
    start = time.perf_counter()
    target = gguf_target(Path(gguf_path).expanduser(), overwrite=overwrite)
    _check_outtype(outtype)
    target.check()
    beside = None
    if modelfile or system or ollama:
        beside = Modelfile(target.path, system, ollama, overwrite)
        beside.check()
    found = hub.resolve(model, revision=revision, code=trust_remote_code)
    if is_adapter(found.path):
        raise CheckpointError(
            f"--model {model}: is an adapter, not a model; `mlx-fusekit export-lora` writes it for "
            "llama.cpp, and `mlx-fusekit fuse` makes a model of it and its base"
        )
    base = open_model(found)
    exportable = _Exportable.of(base)
    text = exportable.modelfile_text(beside, found.path) if beside is not None else ""
    plan = plan_gguf(base, exportable.layout.tensors, outtype=outtype, workers=workers)
    encodings, nbytes = plan.encodings, plan.data_bytes
    if not dry_run:
        keys, told = exportable.keys(found), of_step(progress, "writing")
        written = write_gguf(plan, keys, target, workers=workers, progress=told)
        encodings, nbytes = written.tensors, written.nbytes
        if beside is not None:
            beside.write(text)
    inexact = tuple(encoding for encoding in encodings if not encoding.exact)
    return ExportReport(
        model=found.public_name,
        gguf_path=str(gguf_path),
        architecture=exportable.layout.architecture,
        outtype=outtype,
        bytes=nbytes,
        types=dict(Counter(encoding.ggml_type.name for encoding in encodings).most_common()),
        exact=not inexact,
        inexact=inexact,
        notes=(*exportable.layout.notes, *exportable.vocabulary.notes),
        modelfile=str(beside.path) if beside is not None else None,
        ollama_command=beside.ollama_command if beside is not None else None,
        dry_run=dry_run,
        seconds=time.perf_counter() - start,
    )
