"""Stand-ins of small functions of the references."""

import asyncio
from argparse import Namespace

import pytest
from aiohttp import web

from qwench.foreign.modules import (
    MODULES,
    check_no_aborted,
    check_reward_nonzero_std,
    check_reward_nonzero_std_with_fallback,
    load_tokenizer,
)
from qwench.foreign.sample import DynamicFilterOutput, Sample, SampleStatus
from qwench.foreign.session import wait_http_ok
from qwench.models.made.tokenizers import build_small_tokenizer

ARGS = Namespace(reward_key=None)


def rewarded(*rewards):
    return [Sample(reward=reward) for reward in rewards]


def test_filters_of_the_references_keep_what_theirs_keep():
    # torch.tensor([0.5, 0.5 + 1e-6]).std() is 7.1e-7: not above 1e-6
    dropped = DynamicFilterOutput(keep=False, reason="zero_std_0.5")
    assert check_reward_nonzero_std(ARGS, rewarded(0.5, 0.5 + 1e-6)) == dropped
    assert check_reward_nonzero_std(ARGS, [rewarded(0.5, 0.5), rewarded(0.6)]).keep
    assert check_reward_nonzero_std_with_fallback(ARGS, rewarded(1, 1)) == DynamicFilterOutput(
        keep=False, reason="zero_std_1.0", keep_when_insufficient=True
    )
    aborted = [*rewarded(1), [Sample(status=SampleStatus.ABORTED)]]
    assert check_no_aborted(ARGS, aborted) == DynamicFilterOutput(keep=False, reason="group_has_aborted")
    assert check_no_aborted(ARGS, rewarded(1, 0)) == DynamicFilterOutput(keep=True)


def test_a_tokenizer_gets_the_chat_template_of_a_file(tmp_path):
    build_small_tokenizer().save_pretrained(tmp_path)
    (tmp_path / "mine.jinja").write_text("{{ messages[0].content }}!")
    tokenizer = load_tokenizer(str(tmp_path), chat_template_path=str(tmp_path / "mine.jinja"))
    assert tokenizer.apply_chat_template([{"role": "user", "content": "q"}], tokenize=False) == "q!"


def test_an_address_is_waited_for_until_it_answers_with_200(monkeypatch):
    asked = []

    async def answer(request: web.Request) -> web.Response:
        asked.append((request.method, await request.text()))
        return web.Response(status=200 if len(asked) == 3 else 503)

    async def wait() -> None:
        app = web.Application()
        app.router.add_route("*", "/", answer)
        runner = web.AppRunner(app)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        url = f"http://127.0.0.1:{runner.addresses[0][1]}/"
        await wait_http_ok(url, json_payload={"a": 1}, timeout=60.0)
        with pytest.raises(TimeoutError, match="was not ready after 0 s: status 503"):
            await wait_http_ok(url, timeout=0)
        await runner.cleanup()

    monkeypatch.setattr("qwench.foreign.session._RETRY_S", 0.0)
    asyncio.run(wait())
    assert asked == [("POST", '{"a": 1}')] * 3 + [("GET", "")]
    assert MODULES["utils.http_utils"]["wait_http_ok"] is wait_http_ok
