"""Several rewards of one response, and a language model as a judge."""

import asyncio
import json
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from qwench.config.sections.reward import RewardConfig
from qwench.errors import ConfigError, RewardError
from qwench.rewards import remote
from qwench.rewards.graders import check_prompts
from qwench.rewards.judge import Judge, fill_template, read_template, read_verdict
from qwench.rewards.scores import combine
from qwench.rollout.sample_metrics import sample_metrics
from qwench.samples import Prompt, Sample, Verdict
from tests.unit.rewards.samples import graded


def sample(response: str, label: str | None = "7", **metadata: object) -> Sample:
    made = Sample(prompt=Prompt(text="3+4", token_ids=(1,), label=label, metadata=metadata), sample_id=0, group_id=0)
    made.response = response
    return made


def test_the_sum_is_weighted_and_each_reward_is_kept_apart():
    verdicts = {"math": Verdict(score=1.0, reason="exact"), "judge": Verdict(score=0.5, reason="judged", extra={"cost": 3})}
    whole = combine(verdicts, (0.7, 0.3))
    assert whole.score == pytest.approx(0.85)
    assert (whole.reason, whole.parts) == ("exact+judged", {"math": 1.0, "judge": 0.5})
    assert whole.extra == {"cost": 3, "math": 1.0, "judge": 0.5}


def test_a_reward_that_could_not_judge_leaves_the_response_ungraded():
    late = Verdict(score=0.0, reason="timeout", extra={"error": "late"})
    whole = combine({"math": Verdict(score=1.0, reason="exact"), "judge": late}, (1.0, 1.0))
    assert not whole.graded and whole.extra == {"error": "late", "reward": "judge"} and whole.parts == {}


def test_the_pool_grades_by_every_reward_and_reward_key_picks_one():
    response = sample("so \\boxed{7}")
    reward = RewardConfig(rm_type="math,f1", reward_weights="2,-1")
    [both] = graded(reward, response)
    assert both.parts["math"] == 1.0 and 0 <= both.parts["f1"] < 1
    assert both.score == pytest.approx(2 - both.parts["f1"])
    [picked] = graded(RewardConfig(rm_type="math,f1", reward_key="math"), response)
    assert picked.score == 1.0
    response.verdict = both
    assert sample_metrics([response])["reward/math"] == 1.0


def test_rows_may_name_several_and_must_fit_the_weights():
    prompt = sample("", rm_type="math,f1").prompt
    check_prompts(RewardConfig(), [prompt])
    with pytest.raises(ConfigError, match=r"1 rewards \(math\) have other than one of --reward-weights each"):
        check_prompts(RewardConfig(rm_type="math,f1", reward_weights="1,2"), [sample("", rm_type="math").prompt])
    with pytest.raises(ConfigError, match="names its own reward: --rm-type 'f2' is unknown"):
        check_prompts(RewardConfig(), [sample("", rm_type="math,f2").prompt])
    with pytest.raises(ConfigError, match=r"^--rm-type 'f2' is unknown"):
        check_prompts(RewardConfig(rm_type="math,f2"), [sample("").prompt])


@pytest.mark.parametrize(("rm_type", "flag"), [("judge", "--judge-url"), ("remote_rm", "--rm-url")])
def test_a_row_that_asks_a_server_needs_its_address(rm_type, flag):
    asking = sample("", rm_type=rm_type)
    with pytest.raises(ConfigError, match=rf"^row 0 .* is graded by {rm_type}; give the server's address by {flag}\."):
        check_prompts(RewardConfig(), [asking.prompt])
    with pytest.raises(RewardError, match=rf"^sample 0 is graded by {rm_type}, and no {flag} is given"):
        graded(RewardConfig(rm_type="math"), asking)


def test_a_judge_needs_a_server():
    with pytest.raises(ConfigError, match=r"^--rm-type judge asks a language model; give --judge-url and --judge-model"):
        Judge(RewardConfig(), key=None)


class Model:
    """An OpenAI-compatible server that answers as its table says, in order, and keeps what it was asked."""

    def __init__(self, *answers: object) -> None:
        self.asked: list[tuple[str, str | None, dict[str, object]]] = []
        left, outer = list(answers), self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                outer.asked.append((self.path, self.headers.get("Authorization"), body))
                answer = left.pop(0) if len(left) > 1 else left[0]
                raw = json.dumps(answer).encode()
                self.send_response(answer if isinstance(answer, int) else 200)
                self.send_header("Content-Length", str(len(raw)))
                self.end_headers()
                self.wfile.write(raw)

            def log_message(self, *arguments: object) -> None:
                """Say nothing."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}/v1"
        threading.Thread(target=self._server.serve_forever, args=[0.01], daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


def said(text: str) -> dict[str, object]:
    usage = {"prompt_tokens": 11, "completion_tokens": 4}
    return {"choices": [{"message": {"content": text}}], "usage": usage}


@pytest.mark.parametrize(
    ("text", "scores", "score"),
    [
        ("fine. Score: 0.75", (0, 1), 0.75),
        ("Score: 1\nno, **Score:** 0", (0, 1), 0.0),
        ("score = 3", (0, 10), 3.0),
        ("Score: **-1**", (-1, 1), -1.0),
        ("Score: 1e-1", (0, 1), 0.1),
        ("Score: .5.", (0, 1), 0.5),
        ("Score: 1, since the answer agrees", (0, 1), 1.0),
        ("Score: 1/10", (0, 1), 0.1),
        ("**Score:** **1**/10", (0, 1), 0.1),
        ("Score: 7 / 10", (0, 10), 7.0),
        ("Score: 1/2", (0, 10), 5.0),
        ("Score: 3 out of 4.", (0, 1), 0.75),
        ("Score: 3 of the criteria", (0, 3), 3.0),
        ("Score: 85%", (0, 1), 0.85),
        ("Score: 85%", (0, 100), 85.0),
        ("Score: 5 %", (0, 10), 0.5),
        ("Score: **5** percent", (0, 10), 0.5),
        ("Score: 1.\nOf 3 steps, all are right", (0, 1), 1.0),
        ('{"score": 0.5}', (0, 1), 0.5),
        ('{"reason": "half", "score":"7/10", "max_score": 10}', (0, 10), 7.0),
        ("{'score': -1, 'sure': 1}", (-1, 1), -1.0),
        ('{"score": 0.3, "reason": "a perfect score: 1 is not due"}', (0, 1), 0.3),
        ('```json\n{"Score": "2/4", "reason": "not score 1"}\n```\n', (0, 1), 0.5),
        ('{"score": "0.5 (half)", "reason": "no score 1"}', (0, 1), 0.5),
        ('{"reason": "half. Score: 0.5"}', (0, 1), 0.5),
        ('{"final_score": 0.5, "max_score": 1, "reason": "score 1 is not due"}', (0, 1), 0.5),
        ('{"Overall Score": "7/10"}', (0, 1), 0.7),
        ('Here it is: {"final_score": 0.5, "max_score": 1}', (0, 1), 0.5),
        ("{\u201cscore\u201d: 0.5, \u201cmax_score\u201d: 1}", (0, 1), 0.5),
        ("Score: \u201c0.5\u201d", (0, 1), 0.5),
        ("Final score: '0.5'", (0, 1), 0.5),
        ('Score: 0.5, as I score "1 + 1 = 2" low', (0, 1), 0.5),
        ('{"final_score": 0.9, "score": 0.2}', (0, 1), 0.9),
        ('{"score": 0.2, "overall_score": 0.9}', (0, 1), 0.9),
    ],
)
def test_the_last_score_that_the_judge_says_counts(text, scores, score):
    verdict = read_verdict(said(text), scores=scores)
    assert (verdict.score, verdict.reason) == (score, "judged")


@pytest.mark.parametrize("number", ["95", "-0.1", "1.01", "9" * 400, "11/10", "1/0", "-1/2", "101%", "1/-2"])
def test_a_score_outside_of_the_judges_scale_is_ungraded_and_said(number):
    verdict = read_verdict(said(f"Score: {number}"), scores=(0, 1))
    assert (verdict.graded, verdict.reason, verdict.score) == (False, "grader_error", 0.0)
    assert str(verdict.extra["error"]).startswith("the judge said a score outside of --judge-scores 0 1: '")


@pytest.mark.parametrize("number", ["0,5", "1-2", "1/2/3", "0.5x", "1/2%", "1.2.3", "0 - 1"])
def test_a_score_that_is_no_number_is_ungraded_whatever_was_said_before(number):
    verdict = read_verdict(said(f"Score: 1 at first\nScore: {number}"), scores=(0, 1))
    assert (verdict.graded, verdict.score) == (False, 0.0)
    assert str(verdict.extra["error"]).startswith("the judge said no score: ")


def test_what_a_judge_says_without_a_score_is_shown_from_its_end_and_may_have_no_known_cost():
    verdict = read_verdict({"choices": [{"message": {"content": "x" * 300 + "end"}}]}, scores=(0, 1))
    assert verdict.extra == {
        "error": f"the judge said no score: '{'x' * 197}end'", "judge_prompt_tokens": 0, "judge_completion_tokens": 0,
    }  # fmt: skip
    with pytest.raises(RewardError, match=rf"got {'y' * 200}; give the base URL"):
        read_verdict("y" * 300, scores=(0, 1))


def test_a_share_of_no_score_above_zero_is_ungraded():
    assert not read_verdict(said("Score: 1/2"), scores=(-1, 0)).graded


def test_an_answer_without_a_score_is_ungraded_and_no_completion_ends_the_run():
    assert not read_verdict(said("well done"), scores=(0, 1)).graded
    assert not read_verdict(said('{"max_score": 1, "score": {"of": 1}}'), scores=(0, 1)).graded
    assert not read_verdict(said('{"score": null, "reason": "no score 1"}'), scores=(0, 1)).graded
    with pytest.raises(RewardError, match=r"--judge-url must answer a chat completion, got .*oops"):
        read_verdict({"oops": 1}, scores=(0, 1))


def test_a_response_cannot_fill_in_the_template():
    text = fill_template("{prompt}|{response}|{label}", sample("{label} {prompt}"))
    assert text == "3+4|{label} {prompt}|7"


def test_the_judge_is_asked_again_and_its_cost_is_counted(monkeypatch):
    monkeypatch.setattr(remote, "pause_s", lambda attempt: 0.0)
    model = Model(500, said("Score: 0.5"))
    try:
        reward = RewardConfig(rm_type="judge", judge_url=model.url, judge_model="big")
        response = sample("seven", label=None)
        [response.verdict] = graded(reward, response, key="k")
    finally:
        model.close()
    assert response.verdict.score == 0.5
    path, key, body = model.asked[-1]
    assert (len(model.asked), path, key) == (2, "/v1/chat/completions", "Bearer k")
    question = body["messages"][0]["content"]
    assert body == {"model": "big", "messages": [{"role": "user", "content": question}], "temperature": 0}
    assert question == fill_template(read_template(reward), response) and "seven" in question and "(none)" in question
    metrics = sample_metrics([response, response])
    assert (metrics["judge/prompt_tokens"], metrics["judge/completion_tokens"]) == (22.0, 8.0)


def test_a_judge_past_its_deadline_leaves_the_response_ungraded(monkeypatch):
    monkeypatch.setattr(remote, "pause_s", lambda attempt: 30.0)
    model = Model(500)
    try:
        reward = RewardConfig(rm_type="judge", judge_url=model.url, judge_model="big", judge_timeout_s=0.5)
        [verdict] = graded(reward, sample("x"))
    finally:
        model.close()
    assert (verdict.reason, verdict.graded) == ("timeout", False)


class PatientServer:
    """Counts requests, each of which is under way for some seconds of the loop; the first ones fail."""

    def __init__(self, judge: Judge, monkeypatch: pytest.MonkeyPatch, *, seconds: float, failures: int = 0) -> None:
        self.limits: list[float] = []
        self._seconds, self._failures = seconds, failures
        monkeypatch.setattr(judge._server, "_post", self._post)

    async def _post(self, body: object, timeout_s: float) -> dict[str, object]:
        self.limits.append(timeout_s)
        if len(self.limits) <= self._failures:
            raise ConnectionRefusedError("nobody listens")
        await asyncio.sleep(self._seconds)
        return said("Score: 1")


def judge_of(**flags: object) -> Judge:
    return Judge(RewardConfig(rm_type="judge", judge_url="http://127.0.0.1:1", judge_model="big", **flags), key=None)


def test_the_wait_for_a_place_is_not_the_judges(monkeypatch):
    """Three rounds of 0.2 s are longer than the deadline of one request."""
    monkeypatch.setattr(remote, "_REQUESTS_AT_ONCE", 2)
    judge = judge_of(judge_timeout_s=0.5)
    PatientServer(judge, monkeypatch, seconds=0.2)

    async def grade_all() -> list[Verdict]:
        return await asyncio.gather(*(judge.grade(sample(str(n))) for n in range(6)))

    assert [verdict.reason for verdict in asyncio.run(grade_all())] == ["judged"] * 6


def test_only_the_deadline_ends_the_requests_to_a_judge(monkeypatch):
    """Refused connections are asked again more often than a reward server's, and no request is cut off earlier."""
    monkeypatch.setattr(remote, "pause_s", lambda attempt: 0.0)
    judge = judge_of(judge_timeout_s=300.0)
    server = PatientServer(judge, monkeypatch, seconds=0.0, failures=25)
    assert asyncio.run(judge.grade(sample("x"))).score == 1.0
    assert server.limits == [300.0] * 26


def test_a_judge_that_is_gone_leaves_the_response_ungraded():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    judge = Judge(
        RewardConfig(rm_type="judge", judge_url=f"http://127.0.0.1:{port}", judge_model="big", judge_timeout_s=0.5), key=None
    )
    verdict = asyncio.run(judge.grade(sample("x")))
    assert verdict.reason == "timeout"
    assert "no verdict within 0.5 s" in verdict.extra["error"] and "Cannot connect" in verdict.extra["error"]


def test_a_judge_that_refuses_ends_the_run():
    model = Model(401)
    try:
        reward = RewardConfig(rm_type="judge", judge_url=model.url, judge_model="big")
        with pytest.raises(RewardError, match=r"--judge-url .* did not grade sample 0, asked 1 time: status 401"):
            graded(reward, sample("x"))
    finally:
        model.close()


def test_a_template_without_the_response_is_refused(tmp_path: Path):
    template = tmp_path / "template.txt"
    template.write_text("judge {prompt}")
    reward = RewardConfig(judge_url="http://a", judge_model="b", judge_prompt_path=template)
    with pytest.raises(ConfigError, match=r"--judge-prompt-path .* has no \{response\}"):
        read_template(reward)
    template.write_text("judge {response}")
    assert read_template(reward) == "judge {response}"
    template.unlink()
    with pytest.raises(ConfigError, match=r"--judge-prompt-path .* cannot be read"):
        read_template(reward)
