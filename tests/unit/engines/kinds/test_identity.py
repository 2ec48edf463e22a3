"""What a server that runs already must agree with the run about."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from qwench.engines.kinds.identity import ModelIdentity, check_serves
from qwench.errors import ConfigError

SIZES = {"vocab_size": 288, "hidden_size": 64, "num_hidden_layers": 2}


class Server:
    """A server's answers."""

    base_url = "http://engine:1"

    def __init__(self, model: dict[str, object], settings: dict[str, object]) -> None:
        self.model, self.settings = model, settings

    async def model_info(self) -> dict[str, object]:
        return {"model_path": "/nowhere", "model_type": "qwen3", **self.model}

    async def server_info(self) -> dict[str, object]:
        return self.settings

    async def tokenize(self, text: str) -> list[int]:
        return [1, 2]


def kind_of(settings: dict[str, object], *, model: dict[str, object] = SIZES, ranks_requests: bool = True) -> str:
    identity = ModelIdentity(model_type="qwen3", sizes=SIZES, encode=lambda text: [1, 2], ranks_requests=ranks_requests)
    return asyncio.run(check_serves(Server(model, settings), identity)).name  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("change", "theirs", "ours"),
    [
        ({"model_type": "llama"}, "model_type llama", "qwen3"),
        ({"vocab_size": 289}, "vocab_size 289", "288"),
        ({"hidden_size": 65}, "hidden_size 65", "64"),
        ({"num_hidden_layers": 3}, "num_hidden_layers 3", "2"),
    ],
)
def test_a_server_of_another_model_is_refused(change, theirs, ours):
    with pytest.raises(ConfigError, match=rf"engine at http://engine:1 serves /nowhere with {theirs}; this run needs {ours}\."):
        kind_of({}, model=SIZES | change)


def test_a_server_that_tells_no_vocabulary_must_cut_text_alike():
    sizes = {"hidden_size": 64}
    identity = ModelIdentity(model_type="qwen3", sizes=SIZES, encode=lambda text: [1, 3])
    with pytest.raises(ConfigError, match="with a tokenizer that cuts text in another way; this run needs the same tokens"):
        asyncio.run(check_serves(Server(sizes, {}), identity))  # type: ignore[arg-type]
    asyncio.run(check_serves(Server(SIZES, {}), identity))  # type: ignore[arg-type]  # its vocabulary is told


def test_a_server_needs_the_context_of_the_run():
    identity = ModelIdentity(model_type="qwen3", sizes=SIZES, encode=lambda text: [1, 2], context_len=100)
    asyncio.run(check_serves(Server(SIZES, {"context_length": 100}), identity))  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="a context of 99 tokens; this run needs --rollout-max-context-len 100"):
        asyncio.run(check_serves(Server(SIZES, {"context_length": 99}), identity))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "settings",
    [
        {"enable_priority_scheduling": False, "default_priority_value": 0},
        {"enable_priority_scheduling": True, "default_priority_value": None},
    ],
)
def test_a_server_without_priorities_cannot_let_evaluations_wait(settings):
    with pytest.raises(ConfigError, match=r"--eval-low-priority .* --enable-priority-scheduling --default-priority-value 0"):
        kind_of(settings, model={})
    assert kind_of(settings, model={}, ranks_requests=False) == "sglang"


def test_a_server_whose_weights_change_under_requests_must_cache_no_prefixes():
    identity = ModelIdentity(model_type="qwen3", sizes=SIZES, encode=lambda text: [1, 2], keeps_requests=True)
    settings = {"disable_radix_cache": False}
    with pytest.raises(ConfigError, match=r"http://engine:1 .* --disable-radix-cache, or give --pause"):
        asyncio.run(check_serves(Server(SIZES, settings), identity))  # type: ignore[arg-type]
    for told in ({"disable_radix_cache": True}, {}):  # `qwench serve` tells nothing: it drops prefixes by itself
        asyncio.run(check_serves(Server(SIZES, told), identity))  # type: ignore[arg-type]
    asyncio.run(check_serves(Server(SIZES, settings), replace(identity, keeps_requests=False)))  # type: ignore[arg-type]


def test_a_server_with_priorities_lets_evaluations_wait():
    assert kind_of({"enable_priority_scheduling": True, "default_priority_value": 0}, model={}) == "sglang"
    assert kind_of({}, model=SIZES) == "embedded"  # it reports no such setting
