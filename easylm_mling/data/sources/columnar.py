"""The text column of parquet and Arrow files, a portion at a time, and the offsets of an Arrow stream's record batches."""

import struct
from collections.abc import Callable, Iterator

import pyarrow as pa
import pyarrow.parquet as pq

from easylm_mling.storage.files import LOCAL_CHUNK, Retry, open_arrow, open_binary

# Rows turned into Python objects at a time: web pages are a few KB each, so this is about a megabyte.
ROWS = 256
# The head of a record batch is shorter, and its body need not travel.
_HEADER_CHUNK = 1 << 13
_RECORD_BATCH = 3

# (position, texts, the offset of the i-th of them for a record of what is bad): see data/sources/readers.py for what a position is.
Portion = tuple[int, pa.Array, Callable[[int], int]]


def portions(path: str, layout: str, start: int, column: str, retry: Retry) -> Iterator[Portion]:
    """The text column of a table from position `start` to the end of the file, as strings that may be invalid UTF-8.

    Of parquet one page's worth of one column chunk is in memory at a time; of Arrow one record batch, which a local
    file maps. Raises pa.ArrowException or OSError for a damaged file.
    """
    if layout == "parquet":
        return _parquet_portions(path, start, column, retry)
    return (_arrow_portions if layout == "arrow" else _arrow_file_portions)(path, start, column, retry)


def open_parquet(file) -> pq.ParquetFile:
    # Unbuffered reading would hold a whole column chunk of a row group, which may be hundreds of megabytes.
    return pq.ParquetFile(file, buffer_size=LOCAL_CHUNK, pre_buffer=False)


def _parquet_portions(path, start, column, retry):
    with open_binary(path, retry) as binary, open_parquet(binary) as file:
        groups = range(file.num_row_groups)
        offset = sum(file.metadata.row_group(g).num_rows for g in groups[:start])
        for group in groups[start:]:
            for batch in file.iter_batches(ROWS, row_groups=[group], columns=[column], use_threads=False):
                yield group, batch.column(0), offset.__add__
                offset += len(batch)


def _arrow_portions(path, start, column, retry):
    with open_arrow(path, retry) as source:
        schema = pa.ipc.read_schema(source)
        if start:
            source.seek(start)
        while True:
            position = source.tell()
            try:
                message = pa.ipc.read_message(source)
            except EOFError:
                return
            _check_kind(message.type == "record batch")
            texts = pa.ipc.read_record_batch(message, schema).column(column)
            yield position, texts, lambda _, position=position: position


def _arrow_file_portions(path, start, column, retry):
    with open_arrow(path, retry) as source:
        # Of a remote file only this column travels.
        field = pa.ipc.open_file(source).schema.get_field_index(column)
        file = pa.ipc.open_file(source, options=pa.ipc.IpcReadOptions(included_fields=[field]))
        for index in range(start, file.num_record_batches):
            yield index, file.get_batch(index).column(0), _RowsBefore(path, index, retry)


class _RowsBefore:
    """The rows before record batch `index` of an Arrow file, counted when first asked: only bad records ask."""

    def __init__(self, path: str, index: int, retry: Retry):
        self._path, self._index, self._retry, self._rows = path, index, retry, -1

    def __call__(self, row: int) -> int:
        if self._rows < 0:
            with open_arrow(self._path, self._retry, _HEADER_CHUNK) as source:
                source.seek(8)  # behind the magic bytes an Arrow file is a stream
                pa.ipc.read_message(source)
                heads = arrow_heads(source)
                self._rows = sum(next(heads)[2] for _ in range(self._index))
        return self._rows + row


def stream_heads(path: str, retry: Retry) -> tuple[pa.Schema, list[tuple[int, int, int, int]]]:
    """An Arrow stream's schema, and its `arrow_heads`."""
    with open_arrow(path, retry, _HEADER_CHUNK) as source:
        return pa.ipc.read_schema(source), list(arrow_heads(source))


def arrow_heads(source: pa.NativeFile) -> Iterator[tuple[int, int, int, int]]:
    """(first byte, byte after the last, rows, bytes of the body) of each record batch from where `source` stands.

    Reads their heads only. Source: the encapsulated messages of Arrow's columnar format, and the layout of flatbuffers.
    """
    size, position = source.size(), source.tell()
    while prefix := source.read(8):
        if len(prefix) < 8:
            raise EOFError("the stream ends inside a message")
        marker, length = struct.unpack("<Ii", prefix)
        if marker != 0xFFFFFFFF or length < 0:
            raise pa.ArrowInvalid("no message where one should begin")
        if length == 0:
            return
        try:
            kind, rows, body = _message_head(source.read(length))
        except struct.error as error:
            raise pa.ArrowInvalid(f"the head of a message is not readable: {error}") from error
        _check_kind(kind == _RECORD_BATCH)
        end = position + 8 + length + body
        if body < 0 or end > size:
            raise EOFError("the stream ends inside a record batch")
        yield position, end, rows, body
        source.seek(end)
        position = end


def _message_head(metadata: bytes) -> tuple[int, int, int]:
    """(kind, rows, bytes of the body) from the flatbuffer of a message; rows are those of a record batch."""
    message = _at("<I", metadata, 0)
    header = _field(metadata, message, 2)
    rows = _field(metadata, header + _at("<I", metadata, header), 0) if header else 0
    kind, body = _field(metadata, message, 1), _field(metadata, message, 3)
    return (
        _at("<B", metadata, kind) if kind else 0,
        _at("<q", metadata, rows) if rows else 0,
        _at("<q", metadata, body) if body else 0,
    )


def _field(metadata: bytes, table: int, number: int) -> int:
    """Where the field lies, or 0 if it has its default: a table points back to its list of fields' places."""
    places = table - _at("<i", metadata, table)
    known = _at("<H", metadata, places)
    place = _at("<H", metadata, places + 4 + 2 * number) if 4 + 2 * number < known else 0
    return table + place if place else 0


def _at(kind: str, metadata: bytes, position: int) -> int:
    if position < 0:
        raise struct.error("it points before its start")
    return struct.unpack_from(kind, metadata, position)[0]


def _check_kind(is_batch: bool):
    if not is_batch:
        raise pa.ArrowInvalid("another message where a record batch should be")
