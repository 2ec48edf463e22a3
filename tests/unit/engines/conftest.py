"""Fixtures of the tests of engines."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.unit.engines.supervised import Scene


@pytest.fixture
def make_scene() -> Iterator[type[Scene]]:
    scenes = []

    def make(**options) -> Scene:
        scenes.append(Scene(**options))
        return scenes[-1]

    yield make
    for scene in scenes:
        scene.pool.close()
