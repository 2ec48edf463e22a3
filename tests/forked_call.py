"""Calls what a file names: `python -m tests.forked_call FILE`; see `tests.forked`."""

from __future__ import annotations

import pickle
import sys
from pathlib import Path

if __name__ == "__main__":
    call, arguments = pickle.loads(Path(sys.argv[1]).read_bytes())
    call(*arguments)
