"""Errors that people can fix, signals that stop a run, and how a script ends. Imports nothing of the project."""

import errno
import os
import re
import select
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from typing import TextIO


class UserError(Exception):
    """Something in data, settings or a checkpoint that the user can fix; its message is one sentence that says how."""

    def _render_traceback_(self) -> list[str]:
        """Return the lines that a notebook shows instead of a traceback: IPython asks an exception for them."""
        return [f"error: {self}"]


class Lost(UserError):
    """Another process cannot be reached; that one may know why."""


class Stopped(Exception):
    """A signal asked the run to end."""

    def __init__(self, signum: int) -> None:
        super().__init__(signal.Signals(signum).name)
        self.signal = signum


def one_line(args: threading.ExceptHookArgs, otherwise: Callable = threading.excepthook) -> None:
    """Print a user's error that ends a thread as one line, where Python would print a traceback."""
    if args.exc_type and issubclass(args.exc_type, UserError):
        print(f"error: {args.exc_value}", file=sys.stderr)
    else:
        otherwise(args)


threading.excepthook = one_line


# ---------------------------------------------------------------------------------------------------------------------
# Words


def counted(number: float, noun: str) -> str:
    """Return "1 photo", "2 photos" or "0.5 minutes"."""
    return f"{number:.15g} {noun}{'s' * (number != 1)}"


OWN_WORDS = {  # of libraries, whose sentences are for programmers -> ours
    "decompression bomb": "it has more than 600 million pixels",
    "enforce fail|file write failed|unexpected pos": "the disk may be full",  # torch.save
    "truncated|not enough image data|unexpected end|end-of-stream|no more data": "it is cut off",
    "broken|data stream|decoder error|checksum|crc|bad magic|not a zip|corrupt": "it is damaged",
}


def reason_of(error: BaseException) -> str:
    """Return why a file cannot be read or written, for people, in a few words without the file's name."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    said = re.sub(r" ?<_io[^>]*>| ?'[/\\][^']*'|:$", "", next(iter(str(error).splitlines()), type(error).__name__))
    return next((ours for theirs, ours in OWN_WORDS.items() if re.search(theirs, said, re.IGNORECASE)), said)


def remedy_of(error: OSError) -> str:
    """Return what to do where a file cannot be read or written."""
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return "allow yourself to read and write there"
    return "make room there" if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) else "see what is there"


# ---------------------------------------------------------------------------------------------------------------------
# A script's end


def run(main: Callable[[], None]) -> None:
    """Call a script's main and end the process.

    A user's error ends it with one line and exit status 1, a signal with 128 + its number; so does a reader that has
    seen enough (| head), which is SIGPIPE's.
    """
    status, message = 0, ""
    wait = 10 if int(os.environ.get("RANK", 0)) else 0  # seconds: most errors are everyone's; the first process says it
    open_what_is_closed()
    with suppress(AttributeError):  # in a notebook
        sys.stdout.reconfigure(errors="backslashreplace")  # names of files need not be text
    try:
        main()
        sys.stdout.flush()
    except Stopped as stopped:
        status, wait = 128 + stopped.signal, 0
    except Lost as error:  # the process that was lost may still want to say why
        print(f"error: {error}", file=sys.stderr, flush=True)
        status, wait = 1, 20
    except UserError as error:  # from a DataLoader's worker it arrives with the worker's traceback before it
        status, message = 1, "error: " + str(error).rpartition("errors.UserError: ")[2].strip()
    except KeyboardInterrupt:
        status = 130
    except BrokenPipeError:
        unread = [stream for stream in (sys.stdout, sys.stderr) if not is_read(stream)]
        for stream in unread:  # or Python's end would say it again
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        status, wait = (141, 0) if unread else (1, wait)
        if not unread:  # it is another pipe, such as a worker's
            traceback.print_exc()
    except Exception:
        traceback.print_exc()
        status = 1
    # Here the exception is gone, and with it the DataLoader that its frames held, and its workers
    if status:
        time.sleep(wait)  # during which torchrun ends this process, if another one has ended
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 or group_is_open():
        # A group that is left after an error may wait for ever for a process that is gone, and threads of one that has
        # ended well have aborted the interpreter's end ("terminate called without an active exception")
        if message:
            print(message, file=sys.stderr)
        with suppress(BrokenPipeError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)
    sys.exit(message or status)  # Python prints a message, and exits with 1


def open_what_is_closed() -> None:
    """Let what is printed go nowhere where a stream is closed, as those of pythonw are: libraries write to them."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: PTH123, SIM115


def is_read(stream: TextIO) -> bool:
    """Return whether what a stream prints arrives: not where it is a pipe whose reader has ended."""
    with suppress(AttributeError, OSError, ValueError):  # Windows has no poll, and not every stream is a file
        poll = select.poll()
        poll.register(stream.fileno(), 0)
        return not poll.poll(0)
    return True


def group_is_open() -> bool:
    """Return whether torch.distributed was imported and has a process group."""
    dist = sys.modules.get("torch.distributed")
    return dist is not None and dist.is_available() and dist.is_initialized()
