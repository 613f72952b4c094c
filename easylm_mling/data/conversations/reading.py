"""The conversations of one unit of a file, and the rows among them that are none."""

from collections.abc import Callable, Iterator

from easylm_mling.config.conversations import ConversationConfig
from easylm_mling.data.conversations.messages import document
from easylm_mling.data.sources.readers import BadRecord, read_rows
from easylm_mling.storage.files import DEFAULT_RETRY, Retry


def read_conversations(
    path: str,
    layout: str,
    start: int,
    end: int,
    config: ConversationConfig,
    retry: Retry = DEFAULT_RETRY,
    holds: Callable[[int], bool] | None = None,
) -> Iterator[tuple[int, bytes, bytes] | BadRecord]:
    """Yield (offset, head, canonical JSON) of the conversations that start in [start, end), and the bad records between.

    Offset and head: see readers.BadRecord; `holds`: see readers.read_rows. Raises ConfigError, naming the file, if it is damaged or unreadable.
    """
    for item in read_rows(path, layout, start, end, config.columns, retry, holds):
        if isinstance(item, BadRecord):
            yield item
            continue
        offset, head, row = item
        try:
            text = document(row, config)
        except ValueError as error:
            yield BadRecord(str(error), path, offset, head)
            continue
        yield offset, head, text
