"""The order in which buckets of a publication go through."""

from __future__ import annotations

import asyncio

import pytest

from qwench.engines.embedded.http import bucket_order
from qwench.engines.embedded.http.bucket_order import BucketOrder
from qwench.engines.protocol import Portion
from qwench.errors import WeightSyncError


def portion(version: int, index: int) -> Portion:
    return Portion(version=version, index=index, final=index == 2)


async def pass_through(order: BucketOrder, one: Portion, gone: list[tuple[int, int]]) -> None:
    await order.enter(one)
    gone.append((one.version, one.index))
    order.leave(one)


def test_buckets_that_come_too_early_wait_for_the_one_before():
    async def scenario():
        order, gone = BucketOrder(), []
        for version in (3, 4, 4):  # the last one is sent again from its beginning
            tasks = [asyncio.create_task(pass_through(order, portion(version, index), gone)) for index in (2, 1, 0)]
            await asyncio.wait_for(asyncio.gather(*tasks), 5)
        return gone

    assert asyncio.run(scenario()) == [(version, index) for version in (3, 4, 4) for index in range(3)]


def test_a_bucket_far_ahead_is_let_through_for_the_engine_to_refuse():
    async def scenario():
        order, gone = BucketOrder(), []
        await pass_through(order, portion(1, 0), gone)
        await asyncio.wait_for(pass_through(order, portion(1, 4), gone), 5)
        return gone

    assert asyncio.run(scenario()) == [(1, 0), (1, 4)]


def test_a_publication_that_failed_may_come_again_in_any_order():
    async def scenario():
        order, gone = BucketOrder(), []
        for index in range(2):
            await pass_through(order, portion(1, index), gone)
        order.reset()
        tasks = [asyncio.create_task(pass_through(order, portion(1, index), gone)) for index in (1, 0)]
        await asyncio.wait_for(asyncio.gather(*tasks), 5)
        return gone

    assert asyncio.run(scenario()) == [(1, 0), (1, 1), (1, 0), (1, 1)]


def test_a_bucket_whose_predecessor_never_comes_says_so(monkeypatch):
    monkeypatch.setattr(bucket_order, "PATIENCE_S", 0.05)
    with pytest.raises(
        WeightSyncError, match=r"bucket 1 of weight version 7 is here, but the one before it did not come within 0\.05 s"
    ):
        asyncio.run(BucketOrder().enter(portion(7, 1)))
