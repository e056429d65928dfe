"""Locks of the operating system: they end with the process that holds them, however that ends."""

import errno
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import IO, Any

from ..errors import InputError

try:
    import fcntl
except ModuleNotFoundError:  # not on Windows
    fcntl = None  # type: ignore[assignment]

#: The file in a folder that a run holds locked.
LOCK = ".disalign.lock"


def try_lock(file: IO[Any], inherited: bool = True) -> bool:
    """Lock an open file until it is closed; whether it was free.

    Where there are no locks (Windows, some network file systems) every file is free.

    Args:
        file: to lock.
        inherited: forked children hold the lock too, and a second file object of this process does not; else the
            other way round, and ``file`` must be open for writing.
    """
    try:
        if fcntl:
            (fcntl.flock if inherited else fcntl.lockf)(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno not in (errno.EACCES, errno.EAGAIN)
    return True


@contextmanager
def locked_folder(folder: str | os.PathLike[str], option: str) -> Iterator[None]:
    """Within it no other process writes to a folder that takes this lock too.

    A file that a killed run leaves locks nothing.

    Args:
        folder: made if it is missing.
        option: that names the folder, for the message.

    Raises:
        InputError: another process holds the lock.
    """
    os.makedirs(folder, exist_ok=True)
    path = os.path.join(folder, LOCK)
    with open(path, "a+") as file:
        # Not inherited: workers that outlive a killed run by some seconds would hold it. Another run may just have
        # ended, and taken the file with it.
        if not (try_lock(file, inherited=False) and is_at(file, path)):
            file.seek(0)
            raise InputError(
                f"expected a folder of this run's own as {option}, but another run writes to {os.fspath(folder)!r} "
                f"({file.read().strip()}); wait for its end, or give another {option}"
            )
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        try:
            yield
        finally:
            with suppress(OSError):
                os.unlink(path)


def is_at(file: IO[Any], path: str) -> bool:
    """Whether an open file is still the one at a path."""
    with suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(file.fileno()), os.stat(path))
    return False
