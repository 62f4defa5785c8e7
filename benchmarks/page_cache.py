"""A file's pages in memory, or not: so that what is measured starts from a known state. Needs no rights."""

import errno
import os
from pathlib import Path

from llama_mp.errors import RunError


def fill(file: Path) -> None:
    """Read all of `file`."""
    with file.open("rb", buffering=0) as opened:
        while opened.read(1 << 24):
            pass


def drop(file: Path) -> None:
    """Have the kernel forget a file that is on disk. Raises RunError where its file system keeps it in memory."""
    opened = os.open(file, os.O_RDONLY)
    try:
        os.posix_fadvise(opened, 0, 0, os.POSIX_FADV_DONTNEED)
        os.preadv(opened, [bytearray(1)], os.fstat(opened).st_size // 2, os.RWF_NOWAIT)
    except BlockingIOError:  # it would have to be read from the disk; the kernel now begins to, a few pages
        return
    except OSError as error:
        if error.errno != errno.EOPNOTSUPP:  # of a file system that is memory
            raise
    finally:
        os.close(opened)
    raise RunError(f"{file} stays in memory on this file system: give another --folder, or --cold false")
