"""Into which files a fused model's tensors go."""

from collections.abc import Callable, Iterable

from mlx_fusekit.checkpoint.base import BaseModel, TensorSource
from mlx_fusekit.checkpoint.writer import FileLayout, OutputTensor, new_layout, same_layout

#: As mlx-lm: files larger than this are inconvenient on the Hub.
LARGEST_FILE_BYTES = 5 << 30


def lay_out(
    base: BaseModel,
    outputs_for: Callable[[TensorSource], Iterable[OutputTensor]],
    computed: frozenset[str],
) -> tuple[FileLayout, ...]:
    """The files to be written: the base's as far as possible.

    Args:
        base: the model.
        outputs_for: gives what is written in the place of a tensor of the base.
        computed: names of the tensors that are not the base's bytes.
    """
    if base.converted:
        every = (*base.tensors.values(), *base.beside.values())
        return _cut_into_files([output for tensor in every for output in outputs_for(tensor)])
    files = []
    for name, header in base.headers.items():
        tensors = [output for ref in header.tensors.values() for output in outputs_for(ref)]
        before = [(ref.name, ref.dtype, ref.shape) for ref in header.tensors.values()]
        if [(tensor.name, tensor.dtype, tensor.shape) for tensor in tensors] == before:
            files.append(same_layout(name, header, computed))
        else:
            files.append(new_layout(name, tensors))
    grown = any(file.base is None and file.nbytes > LARGEST_FILE_BYTES for file in files)
    return _cut_into_files([t for file in files for t in file.tensors]) if grown else tuple(files)


def _cut_into_files(tensors: list[OutputTensor]) -> tuple[FileLayout, ...]:
    groups: list[list[OutputTensor]] = [[]]
    size = 0
    for tensor in tensors:
        if groups[-1] and size + tensor.nbytes > LARGEST_FILE_BYTES:
            groups.append([])
            size = 0
        groups[-1].append(tensor)
        size += tensor.nbytes
    if len(groups) == 1:
        return (new_layout("model.safetensors", groups[0]),)
    return tuple(
        new_layout(f"model-{number:05d}-of-{len(groups):05d}.safetensors", group)
        for number, group in enumerate(groups, start=1)
    )
