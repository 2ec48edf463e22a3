"""Save on demand: SIGUSR1 to the driver, a file SAVE_NOW in the folder of --save, or the file of --save-trigger-sentinel.

kill -USR1 PID    or    touch FOLDER/SAVE_NOW     the run saves after the rollout that it is learning from, and goes on

The run removes the files when it has saved.
"""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

_logger = logging.getLogger(__name__)
FILE_NAME = "SAVE_NOW"


class SaveRequests:
    """What was asked for since the last save."""

    def __init__(self, folder: Path | None, sentinel: Path | None = None) -> None:
        """Take the folder of --save, without which nothing can be saved, and the file of --save-trigger-sentinel."""
        named = () if sentinel is None else (sentinel,)
        self._files = () if folder is None else (folder / FILE_NAME, *named)
        self._signalled = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Note SIGUSR1 inside the block; outside it ends the process."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = signal.signal(signal.SIGUSR1, self._note)
        try:
            yield
        finally:
            signal.signal(signal.SIGUSR1, before)

    def pending(self) -> bool:
        """Tell whether to save after this rollout."""
        if not self._files:
            if self._signalled:
                _logger.warning("SIGUSR1 asks for a checkpoint, and there is no folder for it: the run has no --save")
            self._signalled = False
            return False
        return self._signalled or any(file.exists() for file in self._files)

    def done(self) -> None:
        """Say which requests a save has met, and forget them."""
        asking = ["SIGUSR1"] if self._signalled else []
        asking += [str(file) for file in self._files if file.exists()]
        if asking:
            _logger.info("saved: %s asked for a checkpoint", " and ".join(asking))
        self._signalled = False
        for file in self._files:
            file.unlink(missing_ok=True)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._signalled = True
