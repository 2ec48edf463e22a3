"""`--rm-type remote_rm` against a server of this machine."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from qwench.commands.reward_check import check_file
from qwench.config.sections.reward import RewardConfig
from qwench.errors import ConfigError, RewardError
from qwench.rewards import remote
from qwench.rewards.graders import check_prompts
from qwench.rewards.pool import RewardPool, check_reward
from qwench.rewards.remote import check_reachable, pause_s
from qwench.samples import Prompt, Sample


class Listener(ThreadingHTTPServer):
    request_queue_size = 128  # a connection beyond the queue is tried again after seconds


class Server:
    """Answers what it is told to, in turn; the last answer again and again."""

    def __init__(self, *answers: tuple[int, str]) -> None:
        self.asked: list[dict] = []
        left = list(answers)
        asked = self.asked

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                asked.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
                status, content = left.pop(0) if len(left) > 1 else left[0]
                self.send_response(status)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content.encode())

            def log_message(self, *arguments: object) -> None:
                pass

        self._server = Listener(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}/grade"
        threading.Thread(target=self._server.serve_forever, args=[0.01], daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def serve() -> Iterator:
    servers: list[Server] = []

    def start(*answers: tuple[int, str]) -> Server:
        servers.append(Server(*answers))
        return servers[-1]

    yield start
    for server in servers:
        server.close()


@pytest.fixture
def no_pauses(monkeypatch) -> list[int]:
    attempts: list[int] = []

    def pause(attempt: int) -> float:
        attempts.append(attempt)
        return 0.0

    monkeypatch.setattr(remote, "pause_s", pause)
    return attempts


def sample(response: str = "so \\boxed{4}", **metadata) -> Sample:
    prompt = Prompt(text="2+2?", token_ids=(1,), label="4", metadata=metadata)
    return Sample(prompt=prompt, sample_id=7, group_id=0, response=response)


def graded(config: RewardConfig, one: Sample):
    pool = RewardPool(config)
    try:
        return asyncio.run(pool.grade(one))
    finally:
        pool.close()


def test_the_server_gets_prompt_response_and_label_and_its_number_is_the_score(serve):
    server = serve((200, "0.25"))
    verdict = graded(RewardConfig(rm_type="remote_rm", rm_url=server.url), sample())
    assert (verdict.score, verdict.reason) == (0.25, "remote")
    assert server.asked == [{"prompt": "2+2?", "response": "so \\boxed{4}", "label": "4"}]


def test_a_record_has_its_score_under_the_key_of_the_flag(serve):
    server = serve((200, '{"score": 1, "style": -2.5, "reason": "neat"}'))
    for key, score in ((None, 1.0), ("style", -2.5)):
        verdict = graded(RewardConfig(rm_type="boxed_remote_rm", rm_url=server.url, reward_key=key), sample())
        assert (verdict.score, verdict.reason, verdict.extra["style"]) == (score, "neat", -2.5)
    assert [one["response"] for one in server.asked] == ["4", "4"]


def test_a_row_may_ask_the_server_while_others_do_not(serve):
    server = serve((200, "3"))
    config = RewardConfig(rm_type="math", rm_url=server.url)
    assert graded(config, sample(rm_type="remote_rm")).score == 3.0
    assert graded(config, sample()).reason == "exact"
    assert len(server.asked) == 1


def test_a_request_that_fails_is_sent_again(serve, no_pauses):
    server = serve((503, "busy"), (200, "not json"), (429, "slowly"), (408, "late"), (200, "1"))
    assert graded(RewardConfig(rm_type="remote_rm", rm_url=server.url), sample()).score == 1.0
    assert len(server.asked) == 5 and no_pauses == [0, 1, 2, 3]


def test_after_ten_attempts_the_run_ends(serve, no_pauses):
    server = serve((500, "broken"))
    with pytest.raises(RewardError, match=r"did not grade sample 7, asked 10 times: status 500: broken"):
        graded(RewardConfig(rm_type="remote_rm", rm_url=server.url), sample())
    assert len(server.asked) == 10 and no_pauses == list(range(9))


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ((422, "no such field"), r"asked 1 time: status 422: no such field"),
        ((400, "x" * 300), rf"asked 1 time: status 400: {'x' * 200};"),
        ((200, f'"{"x" * 300}"'), rf"got {'x' * 200}\."),
        ((200, '{"points": 1}'), r"must answer a finite number, or an object with one under 'score'"),
        ((200, '"good"'), r"got good"),
        ((200, "NaN"), r"got nan"),
    ],
)
def test_what_is_no_score_ends_the_run_at_once(serve, no_pauses, answer, message):
    server = serve(answer)
    with pytest.raises(RewardError, match=message):
        graded(RewardConfig(rm_type="remote_rm", rm_url=server.url), sample())
    assert len(server.asked) == 1


def test_no_more_than_64_requests_are_under_way_of_two_minutes_each(monkeypatch):
    reward = remote.RemoteReward("http://127.0.0.1:1", key=None)
    running: list[int] = []
    most: list[int] = []

    async def post(body, timeout_s) -> float:
        assert timeout_s == 120.0
        running.append(1)
        most.append(len(running))
        for _ in range(5):
            await asyncio.sleep(0)
        running.pop()
        return 1.0

    monkeypatch.setattr(reward._server, "_post", post)

    async def grade_all():
        return await asyncio.gather(*(reward.grade(sample()) for _ in range(70)))

    assert [verdict.score for verdict in asyncio.run(grade_all())] == [1.0] * 70
    assert max(most) == 64


def test_pauses_double_up_to_half_a_minute():
    for attempt, least in enumerate([1, 2, 4, 8, 16, 30, 30, 30, 30]):
        assert least <= pause_s(attempt) < least + 1
    assert 30 <= pause_s(5000) < 31


def test_a_server_that_is_not_there_is_found_before_the_run():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/"
    with pytest.raises(ConfigError, match=rf"the server --rm-url {url} cannot be reached: .*; start it"):
        check_reward(RewardConfig(rm_type="remote_rm", rm_url=url))
    with pytest.raises(ConfigError, match="row 0 of the prompts is graded by remote_rm; give the server's address by --rm-url"):
        check_prompts(RewardConfig(rm_type="math"), [sample(rm_type="remote_rm").prompt])
    pool = RewardPool(RewardConfig(rm_type="math", reward_num_workers=1))
    with pytest.raises(RewardError, match="sample 7 is graded by remote_rm, and no --rm-url is given"):
        asyncio.run(pool.grade(sample(rm_type="remote_rm")))
    pool.close()


@pytest.mark.parametrize(
    ("url", "port"), [("https://grader/score", 443), ("http://grader/score", 80), ("https://grader:8443/score", 8443)]
)
def test_the_port_that_is_tried_is_that_of_the_scheme_unless_the_url_names_one(monkeypatch, url, port):
    asked = []
    with socket.socket() as unconnected:
        monkeypatch.setattr(
            socket, "create_connection", lambda *target, timeout: (asked.append((*target, timeout)), unconnected)[1]
        )
        check_reachable(url)
    assert asked == [(("grader", port), 10.0)]


def test_prompts_need_no_label_for_it():
    prompts = [Prompt(text="", token_ids=())]
    check_prompts(RewardConfig(rm_type="remote_rm", rm_url="http://127.0.0.1:1"), prompts)
    with pytest.raises(ConfigError, match="row 0 of the prompts has no label, which --rm-type math needs"):
        check_prompts(RewardConfig(rm_type="math"), prompts)


def test_reward_check_asks_the_server_for_a_whole_file(serve, tmp_path):
    server = serve((200, "1"))
    lines = [{"response": str(n), "label": "4", "prompt": "2+2?"} for n in range(100)]
    file = tmp_path / "responses.jsonl"
    file.write_text("\n".join(map(json.dumps, lines)))
    summary = check_file(file, config=RewardConfig(rm_type="remote_rm", rm_url=server.url))
    assert (summary.num_responses, summary.mean_score) == (100, 1.0)
    assert sorted(int(one["response"]) for one in server.asked) == list(range(100))
