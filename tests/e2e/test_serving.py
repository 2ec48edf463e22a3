"""The engine's server in its uses beside training: behind the router, and as the judge of `--rm-type judge`."""

from __future__ import annotations

import asyncio
import json
import os
import urllib.request
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from qwench.engines.embedded.http.serving import ServerThread
from qwench.engines.fleet.servers import ServerProcess
from qwench.engines.kinds.sglang_router import SglangRouter, router_command
from qwench.models.built_tokenizers import build_small_tokenizer
from tests.contract.engine_hosts import make_engine
from tests.deadlines import patient
from tests.verbs import run_verb

TOKENIZER = build_small_tokenizer()
VERDICT = "Score: 0.75"
SIZE = 288


def model_that_says(text: str) -> Qwen3ForCausalLM:
    """Build a model that goes on with `text`, of different characters, after the newline in front of an answer, and ends."""
    config = Qwen3Config(
        vocab_size=SIZE, hidden_size=SIZE, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, max_position_embeddings=2048, tie_word_embeddings=False,
    )  # fmt: skip
    model = Qwen3ForCausalLM(config)
    said = TOKENIZER("\n" + text)["input_ids"] + [TOKENIZER.eos_token_id]
    assert len(set(said)) == len(said)
    with torch.no_grad():
        model.model.layers[0].self_attn.o_proj.weight.zero_()
        model.model.layers[0].mlp.down_proj.weight.zero_()
        model.model.embed_tokens.weight.copy_(torch.eye(SIZE))
        model.lm_head.weight.zero_()
        for before, after in pairwise(said):
            model.lm_head.weight[after, before] = 1.0
    return model.float().eval()


@pytest.fixture(scope="module")
def router_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Serve that model behind the router."""
    engine = make_engine(model_that_says(VERDICT), tokenizer=TOKENIZER)
    command = router_command([], environ=dict(os.environ), log_folder=tmp_path_factory.mktemp("logs"), generate_timeout_s=3600)
    router = SglangRouter(ServerProcess(command), generate_timeout_s=3600)

    async def add(url: str) -> None:
        await router.add(url)
        assert router._session is not None
        await router._session.close()

    with ServerThread(engine, model_path="models/judge") as server:
        router.start()
        try:
            asyncio.run(add(server.base_url))
            yield router.base_url
        finally:
            router._server.stop()


def post(url: str, body: dict[str, object]) -> str:
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=patient(30)) as response:
        return response.read().decode()


def test_a_model_of_the_engines_server_judges_responses_through_the_router(router_url, tmp_path: Path, capsys) -> None:
    rows = [{"prompt": "What is 3 + 4?", "response": response, "label": "7"} for response in ("7", "It is 8.")]
    (tmp_path / "responses.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["--rm-type", "judge", "--judge-url", f"{router_url}/v1", "--judge-model", "judge"]
    run_verb(["reward", "check", str(tmp_path / "responses.jsonl"), *words])
    said = capsys.readouterr().out
    assert "judged" in said and "0.75" in said and "grader_error" not in said


@pytest.mark.parametrize(
    ("path", "question"),
    [
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "Judge."}], "temperature": 0}),
        ("/v1/completions", {"prompt": "Judge.\n", "temperature": 0}),
    ],
)
def test_the_router_passes_openais_paths_and_streams_on(router_url, path, question) -> None:
    body = {"model": "judge", "max_tokens": 20, **question}
    (choice,) = json.loads(post(router_url + path, body))["choices"]
    text = choice["message"]["content"] if "message" in choice else choice["text"]
    assert (text, choice["finish_reason"]) == (VERDICT, "stop")
    *records, done, end = post(router_url + path, body | {"stream": True}).split("\n\n")
    assert (done, end) == ("data: [DONE]", "")
    pieces = [json.loads(one.removeprefix("data: "))["choices"][0] for one in records]
    assert "".join(one["delta"]["content"] if "delta" in one else one["text"] for one in pieces) == VERDICT
    assert pieces[-1]["finish_reason"] == "stop" and len(pieces) > 2


def test_the_router_passes_streams_of_generate_on(router_url) -> None:
    body = {"text": "Judge.\n", "sampling_params": {"temperature": 0, "max_new_tokens": 20}, "stream": True}
    *records, done, _ = post(router_url + "/generate", body).split("\n\n")
    texts = [json.loads(one.removeprefix("data: "))["text"] for one in records]
    assert done == "data: [DONE]" and texts[-1] == VERDICT
    assert texts == sorted(texts, key=len) and all(VERDICT.startswith(text) for text in texts)
