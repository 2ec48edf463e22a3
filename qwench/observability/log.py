"""The log of a process: the standard library's `logging`, with one line for each event.

    driver      console, and <folder of the metrics>/driver.log
    rank n      standard output (rank 0, which the driver shows) or standard error (<folder>/ranks/<n>.log)
    engine      standard error of its server (<folder>/engines/<n>.log)

A module logs by `logging.getLogger(__name__)`; the verb that runs opens the log.
"""

from __future__ import annotations

import logging
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from logging.handlers import MemoryHandler
from pathlib import Path

from qwench.errors import Stopped
from qwench.files import trouble
from qwench.observability.console import Console
from qwench.observability.processes import keep_stacks_in

DRIVER_LOG = "driver.log"
_FILE_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"
_PACKAGE = logging.getLogger("qwench")


def open_driver_log(level: str, console: Console) -> None:
    """Show messages of the package on the console, and keep them for `write_driver_log`; an earlier log of this process closes.

    Args:
        level: The lowest one that is shown: debug, info, warning or error.
    """
    kept = MemoryHandler(capacity=1)  # has no effect before `setTarget`: every record is kept
    _replace_handlers(level, [console.log_handler(), kept])


def write_driver_log(folder: Path) -> None:
    """Append what was logged so far, and what follows, to `driver.log` in a folder that belongs to this run."""
    folder.mkdir(parents=True, exist_ok=True)
    keep_stacks_in(folder)
    file = _DriverLog(folder / DRIVER_LOG, encoding="utf-8")
    file.setFormatter(logging.Formatter(_FILE_FORMAT))
    for kept in [handler for handler in _PACKAGE.handlers if isinstance(handler, MemoryHandler)]:
        kept.setTarget(file)
        kept.close()
        _PACKAGE.removeHandler(kept)
    _PACKAGE.addHandler(file)


class _DriverLog(logging.FileHandler):
    """A log file whose full disk is said once, on standard error."""

    _failed = False

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 - the standard library's name
        """Say that the file cannot be written to: the run does not need it."""
        error = sys.exception()
        if isinstance(error, OSError) and not self._failed:
            self._failed = True
            path = Path(self.baseFilename)
            sys.stderr.write(f"qwench: {path} cannot be written to ({trouble(error, path)}); the console has what it lacks\n")

    def close(self) -> None:
        """Close the file; lines that a full disk refused are lost."""
        with suppress(OSError):
            super().close()


@contextmanager
def failures_logged() -> Iterator[None]:
    """Write an error that ends the block to `driver.log`, with its traceback; the command line shows it too."""
    try:
        yield
    except (Stopped, KeyboardInterrupt) as stopped:
        number = stopped.number if isinstance(stopped, Stopped) else signal.SIGINT
        _PACKAGE.info("the run was stopped by %s", signal.Signals(number).name)
        raise
    except BaseException as error:
        record = _PACKAGE.makeRecord(
            _PACKAGE.name, logging.CRITICAL, __file__, 0, "the run failed", (), (type(error), error, error.__traceback__)
        )
        for handler in _PACKAGE.handlers:
            if isinstance(handler, logging.FileHandler):
                handler.handle(record)
        raise


def open_process_log(level: str, name: str, *, to_stdout: bool = False) -> None:
    """Write messages of the package with the name of this process, such as `rank 3`, on one of its standard streams."""
    handler = logging.StreamHandler(sys.stdout if to_stdout else sys.stderr)
    text = "%(message)s" if to_stdout else f"[{name}] {_FILE_FORMAT}"
    handler.setFormatter(logging.Formatter(text))
    _replace_handlers(level, [handler])


def _replace_handlers(level: str, handlers: list[logging.Handler]) -> None:
    for old in list(_PACKAGE.handlers):
        _PACKAGE.removeHandler(old)
        old.close()
    for handler in handlers:
        _PACKAGE.addHandler(handler)
    _PACKAGE.setLevel(level.upper())
