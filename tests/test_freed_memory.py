"""Memory that is freed and used again (storage/freed_memory.py)."""

import platform
import subprocess
import sys

import pytest

# Takes and frees 64 MB ten times, and prints how many pages the system had to give for the last nine.
_AGAIN = """
import ctypes, resource
from easylm_mling.storage.freed_memory import keep_freed_memory
{first}
library = ctypes.CDLL(None)
library.malloc.restype = ctypes.c_void_p
library.free.argtypes = [ctypes.c_void_p]

def use():
    block = library.malloc(64_000_000)
    ctypes.memset(block, 1, 64_000_000)
    library.free(block)

use()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(9):
    use()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc's memory can be told to stay")
def test_freed_memory_is_used_again_without_a_page_from_the_system():
    def pages(first: str) -> int:
        return int(subprocess.check_output([sys.executable, "-c", _AGAIN.format(first=first)]))

    assert pages("keep_freed_memory()") < pages("") / 10
