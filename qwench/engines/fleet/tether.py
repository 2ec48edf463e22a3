"""A command that ends with its owner: `python -m qwench.engines.fleet.tether COMMAND ...`, with a pipe as standard input.

    owner ---pipe---> tether ---> COMMAND ---> its own children            all but the owner in one process group

The pipe closes when the owner ends, also by SIGKILL. The tether then kills the whole group. If the tether itself is killed (Ray
does that to children of a dead actor), Linux ends the command.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from functools import partial
from types import FrameType

from qwench.observability.stopping import end_with_parent
from qwench.threads import daemon
from qwench.wire.memory_files import remove_files_of


def main(argv: Sequence[str]) -> int:
    """Run the command to its end and return its exit code."""
    # Signals for the group are the command's to act on. A handler, unlike SIG_IGN, is not inherited by it.
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, _leave_to_command)
    end_with_tether = partial(end_with_parent, os.getpid()) if sys.platform == "linux" else None
    command = subprocess.Popen(argv, stdin=subprocess.DEVNULL, preexec_fn=end_with_tether)  # no other thread runs yet
    daemon("qwench-tether", _end_with_owner, os.getppid()).start()
    code = command.wait()
    return code if code >= 0 else 128 - code


def _leave_to_command(number: int, frame: FrameType | None) -> None:
    return


def _end_with_owner(owner: int) -> None:
    sys.stdin.buffer.read()
    remove_files_of(owner)  # empty where it ended by itself
    os.killpg(os.getpgrp(), signal.SIGKILL)


if __name__ == "__main__":
    # Not sys.exit: the interpreter would wait for the thread's lock on standard input.
    os._exit(main(sys.argv[1:]))
