"""Adapters that clients load and unload by name; folders are not read."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace

import orjson
import pytest

from qwench.engines.embedded.http import adapter_routes
from qwench.engines.embedded.http.adapter_routes import AdapterRoutes, LoadBody
from qwench.errors import CheckpointError, ConfigError, EngineError
from tests.unit.engines.embedded.http.test_server import SIZES, NotingEngine, ask

LOADED = {"mine": "/lora"}


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> NotingEngine:
    """An engine that is given what loads an adapter, as a name and a folder."""

    def load_folder(name: str, folder: Path, model: object):
        assert model is SIZES
        if folder.name == "broken":
            raise CheckpointError("half a file")
        return lambda *given: (name, str(folder), *given)

    monkeypatch.setattr(adapter_routes, "load_folder", load_folder)
    return NotingEngine()


def load(engine: NotingEngine, name: str, folder: str = "/new") -> tuple[int, dict[str, object]]:
    return ask(engine, "/load_lora_adapter", {"lora_name": name, "lora_path": folder})


def answered(error: str = "") -> tuple[int, dict[str, object]]:
    return 400 if error else 200, {"success": not error, "loaded_adapters": LOADED, "error_message": error}


@pytest.mark.parametrize("name", ["n", "x" * 256])
def test_an_adapter_is_read_and_handed_to_the_engine(name, engine):
    assert load(engine, name) == answered()
    (asked, change) = engine.noted[-1]
    assert (asked, change("store", "in use")) == ("change_adapters", (name, "/new", "store", "in use"))
    assert ask(engine, "/load_lora_adapter", {"lora_name": name, "lora_path": "/new"}, token="secret")[0] == 401
    assert ask(engine, "/unload_lora_adapter", {"lora_name": name}, token="secret")[0] == 401


@pytest.mark.parametrize("name", ["", "x" * 257, "a\n"])
def test_a_name_that_is_none_is_refused(name, engine):
    assert load(engine, name) == answered(f"lora_name {name[:40]!r} is no name: 1 to 256 printable characters.")
    assert engine.noted == []


def test_what_goes_wrong_is_said_with_what_is_loaded(engine):
    assert load(engine, "new", "/broken") == answered("half a file")
    engine.failure = EngineError("it is loaded")
    assert load(engine, "new") == answered("it is loaded")
    assert ask(engine, "/unload_lora_adapter", {"lora_name": "new"}) == answered("it is loaded")


def test_an_adapter_is_unloaded_by_its_name(engine):
    assert ask(engine, "/unload_lora_adapter", {"lora_name": "mine"}) == answered()
    asked, change = engine.noted[-1]
    unloaded: list[str] = []
    change(SimpleNamespace(unload=unloaded.append), None)
    assert (asked, unloaded) == ("change_adapters", ["mine"])


def test_adapters_named_at_the_start_are_loaded_and_later_ones_are_of_the_base_while_that_is_served(engine, monkeypatch):
    checked: list[Path] = []

    def check(folder: Path) -> None:
        checked.append(folder)
        raise ConfigError("another base")

    loaded: list[object] = []
    monkeypatch.setattr(adapter_routes, "load_folder", lambda *named: lambda *given: loaded.append((named, given)))
    routes, body = AdapterRoutes(engine, {"a": Path("/a")}, check), LoadBody(lora_name="new", lora_path="/new")
    assert loaded == [(("a", Path("/a"), SIZES), (engine.adapters, set()))]
    engine.adapters.folders = {"mine": "/\u00e9\udcff"}
    answer = asyncio.run(routes.load(body))
    assert (answer.status_code, answer.media_type, checked) == (200, "application/json", [])
    assert '"loaded_adapters": {"mine": "/\u00e9?"}' in answer.body.decode(), "a path that is no UTF-8"
    engine.version, engine.adapters.folders = 0, LOADED
    assert orjson.loads(asyncio.run(routes.load(body)).body) == answered("another base")[1]
    assert checked == [Path("/new")]
