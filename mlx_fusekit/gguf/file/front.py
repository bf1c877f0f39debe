"""What comes before the tensors in a GGUF file, as bytes."""

import io

import gguf
from gguf.gguf_writer import WriterState


def front_bytes(writer: gguf.GGUFWriter) -> bytes:
    """Header, metadata and the tensors' places, as gguf writes them; the tensors follow, padded.

    Args:
        writer: made without a path, with everything added; used up.
    """
    buffer = io.BytesIO()
    writer.fout, writer.state = [buffer], WriterState.EMPTY
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    return buffer.getvalue()
