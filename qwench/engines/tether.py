"""A command that ends with its owner: `python -m qwench.engines.tether COMMAND ...`, started with a pipe as standard input.

    owner ---pipe---> tether ---> COMMAND ---> whatever it starts          all but the owner in one process group

The pipe closes when the owner ends, however it ends (SIGKILL too); the tether then kills the whole group.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from types import FrameType


def main(argv: Sequence[str]) -> int:
    """Run the command to its end and return its exit code."""
    # Signals for the group are the command's to act on. A handler, unlike SIG_IGN, is not inherited by it.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _leave_to_command)
    command = subprocess.Popen(argv, stdin=subprocess.DEVNULL)
    threading.Thread(target=_end_with_owner, name="qwench-tether", daemon=True).start()
    code = command.wait()
    return code if code >= 0 else 128 - code


def _leave_to_command(number: int, frame: FrameType | None) -> None:
    return


def _end_with_owner() -> None:
    sys.stdin.buffer.read()
    os.killpg(os.getpgrp(), signal.SIGKILL)


if __name__ == "__main__":
    # Not sys.exit: the interpreter would wait for the thread's lock on standard input.
    os._exit(main(sys.argv[1:]))
