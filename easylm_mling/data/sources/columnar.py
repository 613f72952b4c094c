"""Columns of parquet and Arrow files, a portion at a time, and the offsets of an Arrow stream's record batches."""

import struct
from collections.abc import Callable, Iterator, Sequence

import pyarrow as pa
import pyarrow.parquet as pq

from easylm_mling.storage.files import LOCAL_CHUNK, Retry, open_arrow, open_binary

# Rows turned into Python objects at a time: web pages are a few KB each, so this is about a megabyte.
ROWS = 256
# Fewer where rows are long.
_PORTION_BYTES = 1 << 26
# Read of a remote file at a time where only heads are wanted, which are shorter than this.
HEADER_CHUNK = 1 << 13
_RECORD_BATCH = 3

# (position, rows, a function from the number of a row to its offset in a BadRecord). Positions: see data/sources/readers.py.
Portion = tuple[int, pa.RecordBatch, Callable[[int], int]]


def portions(path: str, layout: str, start: int, columns: Sequence[str], retry: Retry) -> Iterator[Portion]:
    """Yield those of the columns that the file has, in the order of `columns`, from position `start` to its end.

    Strings may be invalid UTF-8.

    In memory is a page of one column chunk of parquet, or one record batch of Arrow; local Arrow files are mapped. Raises
    pa.ArrowException or OSError for a damaged file.
    """
    if layout == "parquet":
        return _parquet_portions(path, start, columns, retry)
    return (_arrow_portions if layout == "arrow" else _arrow_file_portions)(path, start, columns, retry)


def open_parquet(file) -> pq.ParquetFile:
    """Open a parquet file that is read a page at a time."""
    # Unbuffered reading would hold a whole column chunk of a row group, which may be hundreds of megabytes.
    return pq.ParquetFile(file, buffer_size=LOCAL_CHUNK, pre_buffer=False)


def chunk_bytes(file: pq.ParquetFile, group: int, columns: Sequence[str]) -> int:
    """Return the bytes of top-level columns in a row group, decompressed; a column may have several leaves."""
    leaves = [i for i, c in enumerate(file.metadata.schema) if c.path.partition(".")[0] in columns or c.path in columns]
    return sum(file.metadata.row_group(group).column(i).total_uncompressed_size for i in leaves)


def _parquet_portions(path, start, columns, retry):
    with open_binary(path, retry) as binary, open_parquet(binary) as file:
        columns = [name for name in columns if name in file.schema_arrow.names]
        groups = range(file.num_row_groups)
        offset = sum(file.metadata.row_group(g).num_rows for g in groups[:start])
        for group in groups[start:]:
            row = chunk_bytes(file, group, columns) // max(1, file.metadata.row_group(group).num_rows)
            rows = max(1, min(ROWS, _PORTION_BYTES // max(1, row)))
            for batch in file.iter_batches(rows, row_groups=[group], columns=columns, use_threads=False):
                yield group, batch.select(columns), offset.__add__
                offset += len(batch)


def _arrow_portions(path, start, columns, retry):
    with open_arrow(path, retry) as source:
        schema = pa.ipc.read_schema(source)
        columns = [name for name in columns if name in schema.names]
        if start:
            source.seek(start)
        while True:
            position = source.tell()
            try:
                message = pa.ipc.read_message(source)
            except EOFError:
                return
            _check_kind(message.type == "record batch")
            rows = pa.ipc.read_record_batch(message, schema).select(columns)
            yield position, rows, lambda _, position=position: position


def _arrow_file_portions(path, start, columns, retry):
    with open_arrow(path, retry) as source:
        # Only these columns are read, which matters for a remote file.
        schema = pa.ipc.open_file(source).schema
        columns = [name for name in columns if name in schema.names]
        fields = [schema.get_field_index(name) for name in columns]
        file = pa.ipc.open_file(source, options=pa.ipc.IpcReadOptions(included_fields=fields))
        for index in range(start, file.num_record_batches):
            yield index, file.get_batch(index).select(columns), _RowsBefore(path, index, retry)


class _RowsBefore:
    """From a row of record batch `index` of an Arrow file to its row in the file; counts at the first bad record."""

    def __init__(self, path: str, index: int, retry: Retry):
        self._path, self._index, self._retry, self._rows = path, index, retry, -1

    def __call__(self, row: int) -> int:
        if self._rows < 0:
            with open_arrow(self._path, self._retry, HEADER_CHUNK) as source:
                source.seek(8)  # behind its magic bytes an Arrow file is a stream
                pa.ipc.read_message(source)
                heads = arrow_heads(source)
                self._rows = sum(next(heads)[2] for _ in range(self._index))
        return self._rows + row


def arrow_heads(source: pa.NativeFile) -> Iterator[tuple[int, int, int, int]]:
    """Yield (first byte, byte after the last, rows, bytes of the body) of each record batch from the position of `source` on.

    Only heads are read: pyarrow would read the bodies, too, the whole of a remote file. Raises pa.ArrowInvalid or
    EOFError for a damaged stream. Source: "Encapsulated message format" of Arrow's columnar format, and the binary
    format of FlatBuffers.
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
    """Return (kind, rows, bytes of the body) of a message from its flatbuffer; rows are those of a record batch."""
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
    """Return the position of a field, or 0 if it has its default: a table points back to its vtable of offsets."""
    vtable = table - _at("<i", metadata, table)
    size = _at("<H", metadata, vtable)
    offset = _at("<H", metadata, vtable + 4 + 2 * number) if 4 + 2 * number < size else 0
    return table + offset if offset else 0


def _at(kind: str, metadata: bytes, position: int) -> int:
    if position < 0:
        raise struct.error("it points before its start")
    return struct.unpack_from(kind, metadata, position)[0]


def _check_kind(is_batch: bool):
    if not is_batch:
        raise pa.ArrowInvalid("another message where a record batch should be")
