"""Running a GGUF file in the real llama.cpp, through llama-cpp-python's low-level functions.

Everything is set for measuring and not for speed: CPU only, keys and values in float32, ordinary
attention, the file read rather than mapped into memory.
"""

import ctypes
import importlib
import os
import weakref
from collections import deque
from collections.abc import Iterator, Sequence
from functools import cache, partial
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from mlx_fusekit.errors import CheckpointError, ConfigurationError
from mlx_fusekit.formats.floats import Float32

#: Tokens that go through the model at once.
BATCH_TOKENS = 512
#: Lines of llama.cpp's log that an error message may quote.
_LOG_LINES = 50
_ERROR_LEVEL = 4

_log: deque[str] = deque(maxlen=_LOG_LINES)
#: What C calls must not be collected.
_callbacks: list[Any] = []


class LlamaCpp:
    """A GGUF file, open in llama.cpp; a context manager.

    Args:
        path: of the file.
        context: most tokens of a text. Models whose rotary embeddings have factors for short and
            long contexts choose by it.
        threads: of the CPU; all by default.
        vocabulary_only: read no weights; only tokens can be had then.
        adapter: GGUF adapter to apply.
        adapter_scale: what its own scale is multiplied by.

    Raises:
        ConfigurationError: when llama-cpp-python is not installed.
        CheckpointError: when llama.cpp cannot run the file or the adapter, with what it says.
    """

    def __init__(
        self,
        path: Path,
        *,
        context: int = 2048,
        threads: int | None = None,
        vocabulary_only: bool = False,
        adapter: Path | None = None,
        adapter_scale: float = 1.0,
    ) -> None:
        self._library = library = _llama_cpp()
        self.path = path
        _log.clear()
        parameters = _model_parameters(library, vocabulary_only)
        self._model = library.llama_model_load_from_file(str(path).encode(), parameters)
        if not self._model:
            raise CheckpointError(f"{path}: llama.cpp cannot load it ({_last_words()})")
        self._close = weakref.finalize(self, partial(library.llama_model_free, self._model))
        self._vocabulary = library.llama_model_get_vocab(self._model)
        self._context: Any = None
        # Before the context, which makes room for what the adapters add to the graph.
        opened = None if adapter is None else self._open_adapter(adapter)
        if not vocabulary_only:
            self._open_context(context, threads or os.cpu_count() or 1)
            if opened is not None:
                self._apply(opened, adapter_scale)

    def _open_adapter(self, path: Path) -> Any:
        """An adapter in memory; it is freed with the model."""
        adapter = self._library.llama_adapter_lora_init(self._model, str(path).encode())
        if not adapter:
            self.close()
            raise CheckpointError(f"{path}: llama.cpp cannot apply it ({_last_words()})")
        return adapter

    def _apply(self, adapter: Any, scale: float) -> None:
        library = self._library
        adapters = (library.llama_adapter_lora_p_ctypes * 1)(adapter)
        if library.llama_set_adapters_lora(self._context, adapters, 1, (ctypes.c_float * 1)(scale)):
            self.close()
            raise CheckpointError(f"{self.path}: llama.cpp cannot adapt it ({_last_words()})")

    def _open_context(self, context: int, threads: int) -> None:
        library = self._library
        parameters = _context_parameters(library, context, threads)
        self._context = library.llama_init_from_model(self._model, parameters)
        if not self._context:
            self.close()
            raise CheckpointError(f"{self.path}: llama.cpp cannot run it ({_last_words()})")
        self._batch = int(library.llama_n_batch(self._context))
        self._close.detach()
        self._close = weakref.finalize(self, partial(_free, library, self._context, self._model))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Free the model; nothing else may be called afterwards."""
        self._close()

    @property
    def vocabulary_size(self) -> int:
        """How many tokens it knows, which is the width of its logits."""
        return int(self._library.llama_vocab_n_tokens(self._vocabulary))

    @property
    def context(self) -> int:
        """Most tokens of a text; llama.cpp may have rounded up what was asked for."""
        return int(self._library.llama_n_ctx(self._context))

    def logits(self, tokens: Sequence[int]) -> Float32:
        """Logits at every position of a text, ``[tokens, vocabulary]``.

        Raises:
            ConfigurationError: when the text is longer than the context.
            CheckpointError: when llama.cpp fails.
        """
        self._begin(len(tokens))
        width = self.vocabulary_size
        out = np.empty((len(tokens), width), np.float32)
        for first in range(0, len(tokens), self._batch):
            chunk = tokens[first : first + self._batch]
            self._decode(chunk, first, every_logit=True)
            pointer = self._library.llama_get_logits(self._context)
            out[first : first + len(chunk)] = np.ctypeslib.as_array(
                pointer, shape=(len(chunk), width)
            )
        return out

    def generate(self, prompt: Sequence[int], count: int) -> list[int]:
        """The most likely continuation, token by token, until the model ends its turn.

        Args:
            prompt: at least one token.
            count: most tokens to generate.

        Raises:
            ConfigurationError: when prompt and continuation are longer than the context.
            CheckpointError: when llama.cpp fails.
        """
        self._begin(len(prompt) + count)
        return list(self._generated(prompt, count))

    def _generated(self, prompt: Sequence[int], count: int) -> Iterator[int]:
        for first in range(0, len(prompt), self._batch):
            self._decode(prompt[first : first + self._batch], first)
        for place in range(len(prompt), len(prompt) + count):
            pointer = self._library.llama_get_logits_ith(self._context, -1)
            token = int(np.ctypeslib.as_array(pointer, shape=(self.vocabulary_size,)).argmax())
            if self._library.llama_vocab_is_eog(self._vocabulary, token):
                return
            yield token
            self._decode([token], place)

    def tokenize(
        self, text: str, *, add_special: bool = False, parse_special: bool = True
    ) -> list[int]:
        """Token ids of a text.

        Args:
            text: any.
            add_special: begin and end it with special tokens, as the file says.
            parse_special: take special tokens that are written out as such.
        """
        data = text.encode()
        size = len(data) + 16
        for _ in range(2):
            buffer = (self._library.llama_token * size)()
            found = self._library.llama_tokenize(
                self._vocabulary, data, len(data), buffer, size, add_special, parse_special
            )
            if found >= 0:
                return list(buffer[:found])
            size = -found
        raise AssertionError("llama.cpp said how many tokens there are, and there were more")

    def _begin(self, tokens: int) -> None:
        """Empty the memory of what was run before; llama.cpp ends the process if it overflows."""
        if self._context is None:
            raise AssertionError(f"{self.path} was opened for its vocabulary only")
        if tokens > self.context:
            raise ConfigurationError(
                f"{self.path}: a text of {tokens} tokens does not fit into a context of "
                f"{self.context}; ask for a larger one"
            )
        memory = self._library.llama_get_memory(self._context)
        self._library.llama_memory_clear(memory, True)

    def _decode(self, tokens: Sequence[int], first: int, *, every_logit: bool = False) -> None:
        """Run tokens that stand at ``first`` and after; logits are had of all or of the last."""
        _log.clear()
        batch = self._library.llama_batch_init(len(tokens), 0, 1)
        try:
            batch.n_tokens = len(tokens)
            for i, token in enumerate(tokens):
                batch.token[i] = token
                batch.pos[i] = first + i
                batch.n_seq_id[i] = 1
                batch.seq_id[i][0] = 0
                batch.logits[i] = every_logit or i == len(tokens) - 1
            status = self._library.llama_decode(self._context, batch)
        finally:
            self._library.llama_batch_free(batch)
        if status != 0:
            raise CheckpointError(
                f"{self.path}: llama.cpp failed on a text of {first + len(tokens)} tokens "
                f"({_last_words() or f'status {status}'})"
            )


def _free(library: Any, context: Any, model: Any) -> None:
    library.llama_free(context)
    library.llama_model_free(model)


def _model_parameters(library: Any, vocabulary_only: bool) -> Any:
    parameters = library.llama_model_default_params()
    _set(parameters, "n_gpu_layers", 0)
    _set(parameters, "vocab_only", vocabulary_only)
    # The one or the other, depending on the version.
    _set(parameters, "load_mode", getattr(library, "LLAMA_LOAD_MODE_NONE", 0))
    _set(parameters, "use_mmap", False)
    _set(parameters, "use_extra_bufts", False)  # would repack weights for speed
    return parameters


def _context_parameters(library: Any, context: int, threads: int) -> Any:
    parameters = library.llama_context_default_params()
    for name in ("n_batch", "n_ubatch", "n_outputs_max", "n_outputs_max_per_seq"):
        _set(parameters, name, BATCH_TOKENS)
    _set(parameters, "n_ctx", context)
    _set(parameters, "n_threads", threads)
    _set(parameters, "n_threads_batch", threads)
    _set(parameters, "type_k", library.GGML_TYPE_F32)
    _set(parameters, "type_v", library.GGML_TYPE_F32)
    _set(parameters, "flash_attn_type", getattr(library, "LLAMA_FLASH_ATTN_TYPE_DISABLED", 0))
    _set(parameters, "flash_attn", False)
    _set(parameters, "offload_kqv", False)
    _set(parameters, "op_offload", False)
    return parameters


def _set(parameters: ctypes.Structure, name: str, value: Any) -> None:
    """Set a field, where this version of llama.cpp has it."""
    if any(field[0] == name for field in type(parameters)._fields_):
        setattr(parameters, name, value)


@cache
def _llama_cpp() -> Any:
    """The library, with its log kept instead of printed."""
    try:
        library: Any = importlib.import_module("llama_cpp")
    except ImportError as error:
        raise ConfigurationError(
            "llama.cpp is not installed, which runs GGUF files; install it: "
            "pip install 'mlx-fusekit[llamacpp]'"
        ) from error

    _callbacks.append(library.llama_log_callback(_keep))
    library.llama_log_set(_callbacks[-1], ctypes.c_void_p(0))
    library.llama_backend_init()
    return library


def _keep(level: int, text: bytes, _: Any) -> None:
    if level == _ERROR_LEVEL:
        _log.append(text.decode(errors="replace").strip())


def _last_words() -> str:
    """The first error that llama.cpp logged since it was asked; later ones follow from it."""
    return next((line for line in _log if line), "")
