"""Processes that are killed between two changes of files: before the first, before the second, and so on."""

import itertools
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator

CHANGES = {"os.link", "os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.symlink", "os.truncate"}  # audit events


def is_change(event: str, arguments: tuple, among: str) -> bool:
    """Return whether Python is about to change a file that has `among` in its path; os.replace is os.rename, too."""
    is_writing = event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
    return (is_writing or event in CHANGES) and any(among in str(path) for path in arguments[:2])


def is_killed(work: Callable[[], object], number: int, among: str = "") -> bool:
    """Do the work in a process that is killed before its change of this number, from 0; return whether it was.

    Changes count of files that have `among` in their paths.
    """
    if child := os.fork():
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert status in (0, -signal.SIGKILL)
        return status != 0
    changes = itertools.count()

    def count(event: str, arguments: tuple) -> None:
        if is_change(event, arguments, among) and next(changes) == number:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count)
    status = 1
    try:
        work()
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:  # this process never returns to pytest
        os._exit(status)


def kills(work: Callable[[], object], fewest: int, among: str = "") -> Iterator[int]:
    """Do the work again and again, killed before each of its changes in turn; yield after each, and after the whole.

    It must have made the `fewest` changes at least, which shows that it was killed at all.
    """
    for number in itertools.count():
        was_killed = is_killed(work, number, among)
        yield number
        if not was_killed:
            break
    assert number >= fewest
