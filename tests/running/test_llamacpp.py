"""Running a GGUF file in llama.cpp; see also tests/real."""

from pathlib import Path

import pytest

from mlx_fusekit.errors import ConfigurationError
from mlx_fusekit.running import llamacpp


def test_llama_cpp_that_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "llama_cpp", None)
    llamacpp._llama_cpp.cache_clear()
    try:
        with pytest.raises(ConfigurationError, match=r"pip install 'mlx-fusekit\[llamacpp\]'"):
            llamacpp.LlamaCpp(tmp_path / "model.gguf")
    finally:
        llamacpp._llama_cpp.cache_clear()
