"""Messages between the trainer ranks during a publication."""

from __future__ import annotations

from typing import Any

import orjson
import torch
import torch.distributed as dist

from qwench.errors import EngineLostError, QwenchError, WeightSyncError

Message = dict[str, Any]  # a JSON object has no closed type


class RankExchange:
    """All ranks of the trainer; alone when there is no process group. Messages are JSON: nothing is unpickled."""

    def __init__(self) -> None:
        joined = dist.is_available() and dist.is_initialized()
        self.rank = dist.get_rank() if joined else 0
        self.size = dist.get_world_size() if joined else 1

    def gather(self, message: Message, *, failure: QwenchError | None = None) -> list[Message]:
        """Return every rank's message, in the order of ranks; collective.

        Args:
            failure: of this rank. Every rank then raises, so that none waits for a failed one.

        Raises:
            WeightSyncError: a rank failed.
            EngineLostError: a rank lost an engine.
        """
        told: Message = {
            "message": message,
            "failure": None if failure is None else str(failure),
            "lost": isinstance(failure, EngineLostError),
        }
        if self.size == 1:
            answers = [told]
        else:
            answers = [orjson.loads(content) for content in _all_gather(orjson.dumps(told), self.size)]
        if failure is not None:
            raise failure
        for rank, answer in enumerate(answers):
            if answer["failure"] is not None:
                kind = EngineLostError if answer["lost"] else WeightSyncError
                raise kind(f"rank {rank}: {answer['failure']}")
        return [answer["message"] for answer in answers]


def _all_gather(content: bytes, size: int) -> list[bytes]:
    """Return the content of every rank, gathered as host tensors."""
    lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(size)]
    dist.all_gather(lengths, torch.tensor([len(content)]))
    longest = int(max(lengths))
    padded = torch.frombuffer(bytearray(content.ljust(longest)), dtype=torch.uint8)
    gathered = [torch.empty(longest, dtype=torch.uint8) for _ in range(size)]
    dist.all_gather(gathered, padded)
    return [bytes(one.numpy()[: int(length)]) for one, length in zip(gathered, lengths, strict=True)]
