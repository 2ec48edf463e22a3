"""What ranks tell each other, and how the failure of one is raised on all."""

from __future__ import annotations

import orjson
import pytest
import torch

from qwench.errors import EngineLostError, WeightSyncError
from qwench.weights import exchange
from qwench.weights.exchange import RankExchange


def told(message: dict, *, failure: str | None = None, lost: bool = False) -> bytes:
    return orjson.dumps({"message": message, "failure": failure, "lost": lost})


def exchange_with(monkeypatch, *others: bytes) -> RankExchange:
    """Return the exchange of rank 0 with ranks that say this."""
    monkeypatch.setattr(exchange, "_all_gather", lambda content, size: [content, *others])
    one = RankExchange()
    one.size = 1 + len(others)
    return one


def test_a_rank_alone_hears_itself_and_raises_its_failure():
    alone = RankExchange()
    assert (alone.rank, alone.size) == (0, 1)
    assert alone.gather({"a": [1]}) == [{"a": [1]}]
    failure = EngineLostError("gone")
    with pytest.raises(EngineLostError) as raised:
        alone.gather({}, failure=failure)
    assert raised.value is failure


def test_messages_come_in_the_order_of_ranks(monkeypatch):
    assert exchange_with(monkeypatch, told({"b": 2}), told({"c": 3})).gather({"a": 1}) == [{"a": 1}, {"b": 2}, {"c": 3}]


@pytest.mark.parametrize(("lost", "kind"), [(True, EngineLostError), (False, WeightSyncError)])
def test_the_failure_of_another_rank_is_raised_with_its_number(monkeypatch, lost, kind):
    ranks = exchange_with(monkeypatch, told({}), told({}, failure="out of memory", lost=lost))
    with pytest.raises(kind, match=r"^rank 2: out of memory$") as raised:
        ranks.gather({})
    assert type(raised.value) is kind


def test_a_rank_tells_the_others_of_its_failure_before_it_raises(monkeypatch):
    heard: list[dict] = []

    def all_gather(content: bytes, size: int) -> list[bytes]:
        heard.append(orjson.loads(content))
        return [content, told({}, failure="another one")]

    monkeypatch.setattr(exchange, "_all_gather", all_gather)
    ranks = RankExchange()
    ranks.size = 2
    for failure, lost in ((WeightSyncError("refused"), False), (EngineLostError("gone"), True)):
        with pytest.raises(type(failure), match=str(failure)):
            ranks.gather({"a": 1}, failure=failure)
        assert heard.pop() == {"message": {"a": 1}, "failure": str(failure), "lost": lost}


def test_what_ranks_say_may_be_of_any_length(monkeypatch):
    contents = [b"ab", b"cdef", b"g"]

    def all_gather(everywhere: list[torch.Tensor], own: torch.Tensor) -> None:
        if own.dtype == torch.int64:
            assert own.tolist() == [2]
            said = [torch.tensor([len(one)]) for one in contents]
        else:
            assert bytes(own.numpy()) == b"ab  "
            said = [torch.frombuffer(bytearray(one.ljust(4)), dtype=torch.uint8) for one in contents]
        for place, one in zip(everywhere, said, strict=True):
            place.copy_(one)

    monkeypatch.setattr(exchange.dist, "all_gather", all_gather)
    assert exchange._all_gather(b"ab", 3) == contents
    for joined, expected in ((True, (2, 3)), (False, (0, 1))):
        monkeypatch.setattr(exchange.dist, "is_initialized", lambda joined=joined: joined)
        monkeypatch.setattr(exchange.dist, "get_rank", lambda: 2)
        monkeypatch.setattr(exchange.dist, "get_world_size", lambda: 3)
        ranks = RankExchange()
        assert (ranks.rank, ranks.size) == expected
