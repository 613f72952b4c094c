"""Work ahead: a thread makes the next item while the last one is used."""

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")


def ahead(items: Iterable[Item]) -> Iterator[Item]:
    """Yield what `items` yields (no None), and raise what it raises, one item ahead. Items must not share memory."""
    iterator = iter(items)
    with ThreadPoolExecutor(1, "easylm-ahead") as thread:
        following = thread.submit(next, iterator, None)
        while (current := following.result()) is not None:
            following = thread.submit(next, iterator, None)
            yield current
