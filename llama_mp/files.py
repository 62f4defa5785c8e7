"""Files that several runs may want: locked by one of them, written whole or not at all, known by a digest."""

import errno
import fcntl
import hashlib
import json
import os
import secrets
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from llama_mp.errors import RequestError

MAX_SMALL_BYTES = 1 << 24  # of a file of settings: an index of 10,000 tensors has 1 MB
DIGEST_SAMPLES, DIGEST_BLOCK_BYTES = 16, 65536
REMOVED = (errno.ENOENT, errno.ESTALE)  # the second from NFS, when another host removed an open file
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS)  # the last: Lustre mounted without them


def lock(file: int, path: Path) -> None:
    """Hold `file`, open at `path`, until it is closed; the kernel lets go of it when the process dies.

    Raises RequestError when another process holds it."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise RequestError(f"another run is writing {path}; wait for its end, or give another --output") from error
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        raise RequestError(f"--output {path}: this file system has no locks; give a path on another one") from error


def is_locked(path: Path) -> bool:
    """Whether the file at `path` is there and held by `lock`; False where the file system has no locks."""
    try:
        with path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)  # shared: two that only look do not see each other
    except BlockingIOError:
        return True
    except OSError as error:
        if error.errno not in (*NO_LOCKS, *REMOVED):
            raise
    return False


def read_small(path: Path, max_bytes: int = MAX_SMALL_BYTES) -> bytes:
    """All of a file that is small by its nature. Raises RequestError for any other, and for a pipe or a device, which
    might never end."""
    try:
        state = path.stat()
        if not stat.S_ISREG(state.st_mode):
            raise RequestError(f"{path} is {'a folder' if path.is_dir() else 'a pipe or a device'}, not a file")
        with path.open("rb") as file:
            content = file.read(max_bytes + 1) if state.st_size <= max_bytes else b""
    except OSError as error:
        raise RequestError(f"{path} cannot be read: {error.strerror}") from error
    if max(len(content), state.st_size) > max_bytes:
        raise RequestError(f"{path} has {state.st_size} bytes, but no such file has more than {max_bytes}")
    return content


def write_whole(path: Path, content: bytes | Iterable[bytes], folder: Path | None = None) -> None:
    """Let `path` hold `content`: it is, at any moment, as it was or complete; of several writers the last one's.

    The bytes are first in a file of their own in `folder`, which a kill may leave there; default: beside `path`."""
    # A name that no other process has, on this host or on another one.
    temporary = (folder or path.parent) / f"{path.name}.{secrets.token_hex(4)}.tmp"
    try:
        with open(temporary, "xb") as file:
            file.writelines([content] if isinstance(content, bytes) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)  # a full disk lets a file begin, and takes none of its bytes
        raise
    sync(path.parent)


def json_bytes(value: Any) -> bytes:
    """`value` as the JSON of a small file, for people too."""
    return f"{json.dumps(value, indent=2)}\n".encode()


def sync(path: Path) -> None:
    """Have a file, or a folder's names (a rename lasts once they are), on disk."""
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def sample_digest(file: Path) -> str:
    """A digest of a file's size and of DIGEST_SAMPLES blocks of it: another model's differs, a copy's does not."""
    size = file.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with file.open("rb") as opened:
        for sample in range(DIGEST_SAMPLES):
            opened.seek(size * sample // DIGEST_SAMPLES)
            digest.update(opened.read(DIGEST_BLOCK_BYTES))
    return digest.hexdigest()[:32]
