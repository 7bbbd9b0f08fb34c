"""What the command-line programs share: one clear line and a fixed exit code instead of a traceback."""

import argparse
import os
import signal
import sys
from collections.abc import Callable

EXIT_ERROR = 2  # argparse uses the same code for wrong flags
EXIT_INTERRUPTED = 128 + signal.SIGINT


class UserError(Exception):
    """Something the user can put right; its message is one line that names the thing and what would work."""


def fail(message: object) -> int:
    """Print `message` as one line on stderr and return the exit code of errors."""
    print("error:", " ".join(str(message).split()), file=sys.stderr)
    return EXIT_ERROR


def _unwind(signum: int, frame: object) -> None:
    sys.exit(128 + signum)


def _default_in_child() -> None:
    """A worker waiting for work may never come to run an inherited handler, and whoever ends it would hang."""
    if signal.getsignal(signal.SIGTERM) is _unwind:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


os.register_at_fork(after_in_child=_default_in_child)


def run(body: Callable[[argparse.Namespace], None], args: argparse.Namespace) -> int:
    """Run `body(args)` and return the exit code: 0, 2 after one line on stderr, or 130 after Ctrl-C.

    SIGTERM unwinds like Ctrl-C does, so that temporary folders are removed, and exits with 143. A Ctrl-C that Python
    drops, because it came inside a callback that cannot raise, still shows in the exit code.
    """
    interrupts = []

    def interrupt(signum: int, frame: object) -> None:
        interrupts.append(signum)
        raise KeyboardInterrupt

    previous = {signal.SIGTERM: signal.signal(signal.SIGTERM, _unwind)}
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not where Ctrl-C is to be ignored
        previous[signal.SIGINT] = signal.signal(signal.SIGINT, interrupt)
    try:
        body(args)
        if interrupts:
            raise KeyboardInterrupt
    except BrokenPipeError:  # whoever read our output is gone; nor must Python's own flush at exit complain
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except (UserError, OSError) as error:
        return fail(error)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    return 0
