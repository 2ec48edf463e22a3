"""The address with SGLang's API, and what functions reach through it."""

import asyncio
import re
import socket
from argparse import Namespace
from types import SimpleNamespace

import aiohttp
import pytest
from aiohttp import web

from qwench.engines.protocol import FinishReason, GenerateResult, SamplingParams
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


@pytest.mark.parametrize(
    ("text", "words", "said"),
    [
        ("", {}, "sto\0p"),
        ("", {"skip_special_tokens": True}, "stop"),
        ("kept", {}, "kept"),
        ("stop", {"stop": "p"}, "sto"),
        ("stop", {"stop": "p", "no_stop_trim": True}, "stop"),
    ],
)
def test_an_answer_without_text_is_decoded_and_one_with_text_is_trimmed_as_the_request_says(text, words, said):
    async def check(gateway, engine):
        async def generate(request):
            ids, matched = tuple(map(ord, "sto\0p")), request.sampling.stop[0] if request.sampling.stop else None
            ends = {"finish_reason": FinishReason.STOP, "matched": matched, "weight_versions": (1, 2, 3, 4, 5)}
            return GenerateResult(request_id=request.request_id, output_ids=ids, log_probs=(-1.0,) * 5, text=text, **ends)

        engine.generate = generate
        call = Call(requests=Requests(engine))
        CURRENT_CALL.set(call)
        words_of_engine = {"skip_special_tokens": False, **words}
        assert (await gateway.answer({**PAYLOAD, "sampling_params": words_of_engine}))["text"] == said
        assert call.versions == [5]

    with_gateway(check)


def test_requests_under_way_end_with_the_gateway_or_when_it_is_asked():
    ended = []

    async def check(gateway, engine):
        async def end() -> None:
            ended.append(gateway.url)

        gateway.requests = SimpleNamespace(abort_in_flight=end)
        await post(f"{gateway.url}/abort_request", {})
        assert ended == [gateway.url]

    with_gateway(check)
    assert len(ended) == 2
    with pytest.raises(EngineError, match="was not reached in 1 tries"):
        asyncio.run(post(ended[0], {}, max_retries=0))


def test_agents_reach_their_sessions_at_an_address_of_their_own_that_must_be_free():
    async def check(gateway, engine):
        ipv6 = (("::", r"\[::1\]"), ("::1", r"\[::1\]")) if socket.has_dualstack_ipv6() else ()
        for host, shown in (("0.0.0.0", "127.0.0.1"), ("127.0.0.1", "127.0.0.1"), *ipv6):
            own = Gateway(engine, Tokenizer(), max_tokens=100, agents_at=(host, 0))
            await own.open()
            url = own.open_session("a", None)
            assert re.fullmatch(rf"http://{shown}:\d+/sessions/a", url) and f":{own.port}/" not in url
            own.close_session("a")
            await own.close()
        assert gateway.open_session("b", None) == f"{gateway.url}/sessions/b"
        taken = Gateway(engine, Tokenizer(), max_tokens=100, agents_at=("127.0.0.1", gateway.port))
        said = rf"sessions of agents cannot listen on 127\.0\.0\.1 port {gateway.port} \(.*in use.*\); choose another with"
        with pytest.raises(ConfigError, match=f"^{said} --session-server-ip and --session-server-port"):
            await taken.open()
        await taken.close()

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
                    if status != 413:
                        assert list((await reply.json())["error"]) == ["message"]
            async with client.post(f"{gateway.url}/sessions/x/chat/completions", headers=headers) as reply:
                assert reply.status == 404, "agents may run on other machines"

    with_gateway(check)


def test_a_server_that_is_not_there_is_asked_as_often_as_wanted(monkeypatch):
    monkeypatch.setattr(session, "_RETRY_S", 0.0)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/generate"
    with pytest.raises(EngineError, match=rf"{url} was not reached in 3 tries: "):
        asyncio.run(post(url, PAYLOAD, max_retries=2))


async def asked_of_a_server_that_hangs_up(times: int, ask) -> tuple[object, list[tuple[str, str, str | None]]]:
    """Return the answer to `ask(url)` and the requests that came; the first `times` get none."""
    came = []

    async def answer(http: web.Request) -> web.Response:
        came.append((http.method, await http.text(), http.headers.get("X-Mine")))
        if len(came) <= times:
            http.transport.close()
        return web.json_response({"tries": len(came)})

    runner = web.AppRunner(web.Application())
    runner.app.router.add_route("*", "/", answer)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    try:
        return await ask(f"http://127.0.0.1:{runner.addresses[0][1]}/"), came
    finally:
        await runner.cleanup()


def test_what_found_no_answer_is_sent_again_as_it_was(monkeypatch):
    monkeypatch.setattr(session, "_RETRY_S", 0.0)
    words = {"headers": {"X-Mine": "1"}, "action": "patch"}
    patched = asyncio.run(asked_of_a_server_that_hangs_up(2, lambda url: post(url, {"a": 1}, max_retries=2, **words)))
    assert patched == ({"tries": 3}, [("PATCH", '{"a": 1}', "1")] * 3)
    posted = asyncio.run(asked_of_a_server_that_hangs_up(3, lambda url: post(url, {"a": 1})))
    assert posted == ({"tries": 4}, [("POST", '{"a": 1}', None)] * 4)
    assert asyncio.run(asked_of_a_server_that_hangs_up(1, session.get)) == ({"tries": 2}, [("GET", "", None)] * 2)
    with pytest.raises(EngineError, match="was not reached in 2 tries"):
        asyncio.run(asked_of_a_server_that_hangs_up(9, session.get))


def test_a_server_that_does_not_answer_is_not_asked_again():
    async def ask(gateway, engine):
        current_session().answer_timeout_s = 0.05
        await post(url, PAYLOAD, max_retries=2)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/generate"
        with pytest.raises(EngineError, match=rf"{url} gave no answer within 0\.05 s"):
            with_gateway(ask)


def test_requests_of_a_generate_call_are_its_own_and_end_with_the_rollout():
    async def check(gateway, engine):
        call = Call(requests=Requests(engine))
        CURRENT_CALL.set(call)
        await post(f"{gateway.url}/generate", PAYLOAD)
        assert call.versions == [0]
        state = GenerateState(current_session().args)
        assert not state.aborted and state is GenerateState(current_session().args)
        assert state.sampling_params["max_new_tokens"] == 8 and state.semaphore._value == 4
        assert (state.remaining_batch_size, state.pendings) == (0, set())
        state.remaining_batch_size = 3
        state.reset()
        assert (state.remaining_batch_size, state.pendings) == (0, set())
        call.requests.aborting = True
        answer = await post(f"{gateway.url}/generate", PAYLOAD)
        assert (answer["meta_info"]["finish_reason"]["type"], answer["output_ids"], state.aborted) == ("abort", [], True)

    with_gateway(check)


@pytest.mark.parametrize(("engines", "concurrency", "room"), [(3, 4, 12), (0, 4, 4), (2, 0, 1)])
def test_a_state_has_room_for_the_requests_of_all_engines(engines, concurrency, room):
    async def check(gateway, engine):
        args = Namespace(sglang_server_concurrency=concurrency, rollout_num_engines=engines)
        assert GenerateState(args).semaphore._value == room

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
