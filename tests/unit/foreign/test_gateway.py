"""The address with SGLang's API, and what functions reach through it."""

import asyncio
import socket
from argparse import Namespace

import aiohttp
import pytest

from qwench.engines.protocol import SamplingParams
from qwench.errors import ConfigError, EngineError
from qwench.foreign import session
from qwench.foreign.gateway import CURRENT_CALL, Call, Gateway
from qwench.foreign.modules import generate, generate_and_rm, generate_in_one
from qwench.foreign.sample import GenerateFnInput, Sample
from qwench.foreign.session import GenerateState, Session, close_session, current_session, open_session, post
from qwench.rollout.generate import Requests
from qwench.rollout.sampling import Sampling
from qwench.samples import Verdict
from tests.fakes.engine import CharTokenizer, FakeEngine, log_prob_of
from tests.fakes.grader import FakeGrader


class Tokenizer(CharTokenizer):
    def __call__(self, text: str, **options: object) -> dict[str, list[int]]:
        return {"input_ids": self.encode(text)}


def with_gateway(test):
    """Run `test(gateway, engine)` on a loop with an open gateway and session."""

    async def run() -> None:
        engine = FakeEngine(lambda context, request: "ok")
        gateway = Gateway(engine, Tokenizer(), max_tokens=100, agents_at=None)
        await gateway.open()
        args = Namespace(
            sglang_router_ip="127.0.0.1", sglang_router_port=gateway.port, sglang_server_concurrency=4, rollout_num_engines=1
        )
        open_session(
            Session(
                args=args,
                tokenizer=Tokenizer(),
                gateway=gateway,
                loop=asyncio.get_running_loop(),
                sampling=Sampling(whole=SamplingParams(max_new_tokens=8)),
                grader=FakeGrader(lambda sample: 1.0),
            )
        )
        try:
            await test(gateway, engine)
        finally:
            close_session()
            await gateway.close()

    asyncio.run(run())


PAYLOAD = {"text": "ab", "sampling_params": {"max_new_tokens": 5}, "return_logprob": True}
MEANT = [[log_prob_of(ord("o")), ord("o"), None], [log_prob_of(ord("k")), ord("k"), None]]


def test_an_answer_has_the_form_of_sglangs():
    async def check(gateway, engine):
        answer = await gateway.answer(PAYLOAD)
        assert (answer["text"], answer["output_ids"]) == ("ok", [ord("o"), ord("k")])
        meta = answer["meta_info"]
        assert (meta["prompt_tokens"], meta["completion_tokens"], meta["weight_version"]) == (2, 2, "0")
        assert (meta["finish_reason"]["type"], meta["output_token_logprobs"]) == ("stop", MEANT)
        with pytest.raises(EngineError, match="send either text or input_ids"):
            await gateway.answer({})
        with pytest.raises(EngineError, match="/generate: send one prompt in a request"):
            await gateway.answer({"text": ["a"]})
        with pytest.raises(EngineError, match="/generate: stream is not supported here; send stream: false"):
            await gateway.answer({"text": "a", "stream": True})
        with pytest.raises(EngineError, match="sampling_params"):
            await gateway.answer({"text": "a", "sampling_params": {"beam": 2}})

    with_gateway(check)


def test_clients_of_their_own_reach_it_over_the_wire():
    async def check(gateway, engine):
        async with aiohttp.ClientSession() as client:
            async with client.post(f"{gateway.url}/generate", json=PAYLOAD) as reply:
                assert (await reply.json())["meta_info"]["output_token_logprobs"] == MEANT
            for path in ("/workers", "/list_workers"):
                assert await session.get(gateway.url + path) == {"workers": [{"url": gateway.url}], "urls": [gateway.url]}
            for path in ("/health", "/health_generate"):
                assert await session.get(gateway.url + path) == {"status": "ok"}
            assert await post(f"{gateway.url}/abort_request", {}) == {"success": True}
            for path in ("/chat/completions", "/v1/chat/completions"):
                async with client.post(f"{gateway.url}/sessions/none{path}", json={}) as reply:
                    assert (reply.status, await reply.json()) == (404, {"error": {"message": "there is no such session"}})
            async with client.post(f"{gateway.url}/generate", json={"text": 1}) as reply:
                assert reply.status == 400

    with_gateway(check)


@pytest.mark.parametrize(
    ("headers", "body", "status"),
    [
        ({"Origin": "http://elsewhere.example"}, "{}", 403),
        ({"Sec-Fetch-Site": "cross-site"}, "{}", 403),
        ({"Host": "rebound.example"}, "{}", 403),
        ({}, "not json", 400),
        ({}, "[" * 100_000, 400),
        ({}, "x" * (2**24 + 1), 413),
    ],
)
def test_pages_of_a_browser_and_broken_bodies_are_refused(headers, body, status):
    async def check(gateway, engine):
        async with aiohttp.ClientSession() as client:
            for path in ("/generate", "/abort_request") if status == 403 else ("/generate",):
                async with client.post(f"{gateway.url}{path}", data=body, headers=headers) as reply:
                    assert reply.status == status

    with_gateway(check)


def test_a_server_that_is_not_there_is_asked_as_often_as_wanted(monkeypatch):
    monkeypatch.setattr(session, "_RETRY_S", 0.0)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/generate"
    with pytest.raises(EngineError, match=rf"{url} was not reached in 3 tries: "):
        asyncio.run(post(url, PAYLOAD, max_retries=2))


def test_a_server_that_does_not_answer_is_not_asked_again(monkeypatch):
    monkeypatch.setattr(session, "ANSWER_TIMEOUT_S", 0.05)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/generate"
        with pytest.raises(EngineError, match=rf"{url} gave no answer within 0\.05 s"):
            asyncio.run(post(url, PAYLOAD, max_retries=2))


def test_requests_of_a_generate_call_are_its_own_and_end_with_the_rollout():
    async def check(gateway, engine):
        call = Call(requests=Requests(engine))
        CURRENT_CALL.set(call)
        await post(f"{gateway.url}/generate", PAYLOAD)
        assert call.versions == [0]
        state = GenerateState(current_session().args)
        assert not state.aborted and state is GenerateState(current_session().args)
        assert state.sampling_params["max_new_tokens"] == 8 and state.semaphore._value == 4
        state.remaining_batch_size = 3
        state.reset()
        assert (state.remaining_batch_size, state.pendings) == (0, set())
        call.requests.aborting = True
        answer = await post(f"{gateway.url}/generate", PAYLOAD)
        assert (answer["meta_info"]["finish_reason"]["type"], answer["output_ids"], state.aborted) == ("abort", [], True)

    with_gateway(check)


def test_the_stand_in_of_generate_writes_a_response():
    async def check(gateway, engine):
        sample = await generate(current_session().args, Sample(prompt="ab"), {"max_new_tokens": 5})
        assert (sample.tokens, sample.response) == ([*map(ord, "abok")], "ok")
        assert (sample.status, sample.loss_mask, sample.weight_versions) == (Sample.Status.COMPLETED, [1, 1], ["0"])

    with_gateway(check)


@pytest.mark.parametrize(
    ("extra", "reward"), [({"score": 2.0, "acc": True}, {"score": 2.0, "acc": True}), ({"score": 2.0, "pred": "x"}, 1.5)]
)
def test_a_record_of_a_grader_is_the_reward_where_it_has_score_and_accuracy(extra, reward):
    asked = []

    async def check(gateway, engine):
        def verdict(sample):
            asked.append((sample.response, sample.metadata.get("rm_type")))
            return Verdict(score=1.5, reason="exact", extra=extra)

        current_session().grader = FakeGrader(verdict)
        samples = [Sample(prompt="a", tokens=[97, 98], response="b", response_length=1) for _ in range(2)]
        samples[1].metadata["rm_type"] = "own"
        assert await session.grade_all(Namespace(rm_type="dapo"), samples) == [reward] * 2
        assert await session.grade(Namespace(), samples[0]) == reward
        assert asked == [("b", "dapo"), ("b", "own"), ("b", None)]

    with_gateway(check)


@pytest.mark.parametrize(("reward", "status"), [(None, "completed"), (0.5, "completed"), (None, "aborted")])
def test_a_response_is_graded_unless_it_has_a_reward_or_was_aborted(reward, status):
    async def check(gateway, engine):
        args, call = current_session().args, Call(requests=Requests(engine))
        CURRENT_CALL.set(call)
        call.requests.aborting = status == "aborted"
        sample = await generate_and_rm(args, Sample(prompt="ab", reward=reward), {"max_new_tokens": 5})
        assert (sample.status.value, sample.reward) == (status, None if status == "aborted" else reward or 1.0)
        call.requests.aborting = False
        state = GenerateState(args)
        asked = GenerateFnInput(
            state=state, sample=Sample(prompt="ab"), sampling_params={"max_new_tokens": 5}, evaluation=False
        )
        assert (await generate_in_one(asked)).samples.response == "ok"
        with state.dp_rank_context() as rank:
            assert rank == 0

    with_gateway(check)


def test_outside_of_a_run_there_is_no_session():
    with pytest.raises(ConfigError, match="outside of a run"):
        current_session()
