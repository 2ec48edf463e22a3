"""A worker that never answers."""

import time

from qwench.rewards.algebra_worker import serve


def main() -> None:
    """Answer the first question, by which the worker shows that it is ready, and no other."""
    serve(lambda pairs: "equal" if next(iter(pairs))[0] == "x+1" else str(time.sleep(60)))
