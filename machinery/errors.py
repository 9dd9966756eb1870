"""Errors that people can fix, signals that stop a run, and how a script ends. Imports nothing of the project."""

import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress


class UserError(Exception):
    """Something in data, settings or a checkpoint that the user can fix; its message is one sentence that says how."""


class Lost(UserError):
    """Another process cannot be reached; that one may know why."""


class Stopped(Exception):
    """A signal asked the run to end."""

    def __init__(self, signum: int) -> None:
        super().__init__(signal.Signals(signum).name)
        self.signal = signum


def run(main: Callable[[], None]) -> None:
    """Call a script's main and end the process.

    A user's error ends it with one line and exit status 1, a signal with 128 + its number.
    """
    status, message = 0, ""
    wait = 10 if int(os.environ.get("RANK", 0)) else 0  # seconds: most errors are everyone's; the first process says it
    with suppress(AttributeError):  # in a notebook
        sys.stdout.reconfigure(errors="backslashreplace")  # names of files need not be text
    try:
        main()
    except Stopped as stopped:
        status, wait = 128 + stopped.signal, 0
    except Lost as error:  # the process that was lost may still want to say why
        print(f"error: {error}", file=sys.stderr, flush=True)
        status, wait = 1, 20
    except UserError as error:  # from a DataLoader's worker it arrives with the worker's traceback before it
        status, message = 1, "error: " + str(error).rpartition("errors.UserError: ")[2].strip()
    except KeyboardInterrupt:
        status = 130
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
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(message or status)  # Python prints a message, and exits with 1


def group_is_open() -> bool:
    """Return whether torch.distributed was imported and has a process group."""
    dist = sys.modules.get("torch.distributed")
    return dist is not None and dist.is_available() and dist.is_initialized()
