"""Teachers on servers: what they are asked, and the reverse KL over the likeliest tokens."""

import asyncio
import math
import re
import socket
import socketserver
import threading

import pytest
import torch

from qwench.config.sections.distillation import DistillationConfig
from qwench.engines.embedded.http.serving import ServerThread
from qwench.engines.protocol import FinishReason, GenerateResult, SamplingParams, Scores, Scoring
from qwench.errors import ConfigError, EngineError
from qwench.models.built_tokenizers import build_small_tokenizer
from qwench.rollout import teacher as module
from qwench.rollout.generate import Requests
from qwench.rollout.teacher import Teachers, check_teachers, choose_tokens, server_url, weighted_reverse_kl
from qwench.samples import Prompt, Sample, Status
from tests.contract.engine_hosts import make_engine, make_model, prompt_of

URL = "http://127.0.0.1:1/generate"


def result_of(scores: Scores | None, reason: FinishReason = FinishReason.LENGTH) -> GenerateResult:
    return GenerateResult(request_id="t", output_ids=[], log_probs=[], finish_reason=reason, weight_versions=[], scores=scores)


def section(**flags) -> DistillationConfig:
    return DistillationConfig(use_opd=True, opd_type="sglang", **flags)


def teachers_of(config: DistillationConfig, urls: dict[str, str]) -> Teachers:
    return Teachers(config, urls, generate_timeout_s=60.0)


def finished(length: int = 5, *, prompt_length: int = 7, **metadata: object) -> Sample:
    tokens = prompt_of(prompt_length + length, seed=length)
    prompt = Prompt(text="", token_ids=tuple(tokens[:prompt_length]), metadata=metadata)
    sample = Sample(prompt=prompt, sample_id=3, group_id=0, status=Status.COMPLETED)
    sample.append(tokens[prompt_length:], log_probs=[-1.0] * length, version=0)
    return sample


def taught(config: DistillationConfig, sample: Sample, *, student, teacher) -> Sample:
    """Let a model score a sample behind a server, as the teacher of another one's engine."""

    async def teach(url: str) -> None:
        teachers, policy = teachers_of(config, {"default": url}), make_engine(student)
        try:
            await teachers.teach(sample, Requests(policy))
        finally:
            await teachers.close()
            await policy.close()

    with ServerThread(make_engine(teacher), token=None) as server:
        asyncio.run(teach(server.base_url + "/generate"))
    return sample


def log_probs_of(model, sample: Sample) -> torch.Tensor:
    """Return [R, V] of an independent forward."""
    with torch.no_grad():
        return model(torch.tensor([sample.tokens])).logits[0, len(sample.prompt.token_ids) - 1 : -1].log_softmax(-1)


def test_the_teacher_scores_the_sampled_tokens():
    model = make_model("qwen3", seed=1)
    sample = taught(section(), finished(), student=model, teacher=model)
    expected = log_probs_of(model, sample).gather(-1, torch.tensor(sample.response_tokens)[:, None])[:, 0]
    torch.testing.assert_close(torch.tensor(sample.teacher_log_probs), expected, atol=1e-4, rtol=0)
    assert sample.teacher_kl == []


@pytest.mark.parametrize("mode", ["student_p", "teacher_p", "none"])
@pytest.mark.parametrize("strategy", ["only-student", "only-teacher", "intersection", "union", "xor"])
def test_the_likeliest_tokens_are_compared_as_an_independent_sum_compares_them(strategy, mode):
    student, teacher = make_model("qwen3"), make_model("qwen3", seed=1)
    config = section(opd_log_prob_top_k=4, opd_top_k_strategy=strategy, opd_reward_weight_mode=mode)
    sample = taught(config, finished(), student=student, teacher=teacher)
    p, q = log_probs_of(student, sample), log_probs_of(teacher, sample)
    masks = [torch.zeros_like(one).scatter_(-1, one.topk(4).indices, 1.0).bool() for one in (p, q)]
    mask = {
        "only-student": masks[0],
        "only-teacher": masks[1],
        "intersection": masks[0] & masks[1],
        "union": masks[0] | masks[1],
        "xor": masks[0] ^ masks[1],
    }[strategy]
    weights = {"student_p": p.exp(), "teacher_p": q.exp(), "none": torch.ones_like(p)}[mode] * mask
    if strategy != "xor":
        weights = weights / weights.sum(-1, keepdim=True).clamp_min(1e-30)
    torch.testing.assert_close(torch.tensor(sample.teacher_kl), (weights * (p - q)).sum(-1), atol=2e-4, rtol=1e-4)
    assert len(sample.teacher_log_probs) == sample.response_length


ASKED = {
    "only-student": ([(2, ())], [(0, (4, 5, 6))]),
    "only-teacher": ([(0, (5, 6, 7))], [(2, ())]),
    "intersection": ([(2, ())], [(2, ())]),
    "union": ([(2, ()), (0, (5, 6, 7))], [(2, (4, 5, 6))]),
    "xor": ([(2, ()), (0, (5, 6, 7))], [(2, (4, 5, 6))]),
}
"""Strategy -> what the student and what the teacher are asked: how many of the likeliest tokens, and which others."""


@pytest.mark.parametrize("strategy", ASKED)
def test_nothing_is_asked_that_the_strategy_does_not_compare(strategy):
    asked: list[list[tuple[int, tuple[int, ...]]]] = [[], []]

    def answer(who: int, scoring: Scoring) -> Scores:
        assert scoring.start == 7
        asked[who].append((scoring.top_k, tuple(scoring.token_ids)))
        likeliest = ([4, 5], [6, 5]) if who == 0 else ([5, 6], [7, 6])
        top = [[(-1.0, token) for token in row] for row in likeliest] if scoring.top_k else []
        return Scores(log_probs=[-1.0] * 2, top=top, of_token_ids=[[-2.0] * len(scoring.token_ids)] * 2)

    class Scripted:
        def __init__(self, who: int) -> None:
            self.who, self.closed = who, False

        async def generate(self, request):
            assert request.sampling == SamplingParams(max_new_tokens=0, temperature=0.0)
            assert self.who == 0 or request.request_id == f"teacher-{len(asked[1])}"
            return result_of(answer(self.who, request.scoring))

        async def abort(self, request_id=None): ...

        async def close(self) -> None:
            self.closed = True

    teachers = teachers_of(section(opd_log_prob_top_k=2, opd_top_k_strategy=strategy), {})
    teachers._servers["default"] = server = Scripted(1)
    asyncio.run(teachers.teach(finished(0), Requests(Scripted(0))))
    assert asked == [[], []], "there is no response to score"
    sample = finished(2)
    asyncio.run(teachers.teach(sample, Requests(Scripted(0))))
    asyncio.run(teachers.close())
    assert (asked[0], asked[1], server.closed) == (*ASKED[strategy], True)
    assert sample.teacher_log_probs == [-1.0, -1.0] and len(sample.teacher_kl) == 2


def test_worked_values_of_one_position():
    """p = 0.6, 0.3 and q = 0.3, 0.6: log 2 and -log 2, weighed 2 to 1 by p, 1 to 2 by q, equally, or not divided."""
    p, q = [math.log(0.6), math.log(0.3)], [math.log(0.3), math.log(0.6)]
    assert weighted_reverse_kl(p, q, "student_p", "union") == pytest.approx(math.log(2) / 3)
    assert weighted_reverse_kl(p, q, "teacher_p", "union") == pytest.approx(-math.log(2) / 3)
    assert weighted_reverse_kl(p, q, "none", "union") == pytest.approx(0.0)
    assert weighted_reverse_kl(p, q, "student_p", "xor") == pytest.approx(0.3 * math.log(2))
    assert weighted_reverse_kl([], [], "student_p", "intersection") == 0.0


def test_worked_choices_of_tokens():
    chosen = {name: choose_tokens([5, 2, 9], [2, 7, 5], name) for name in ("only-student", "only-teacher", "intersection")}
    assert chosen == {"only-student": [5, 2, 9], "only-teacher": [2, 7, 5], "intersection": [5, 2]}
    assert choose_tokens([5, 2, 9], [2, 7, 5], "union") == [5, 2, 9, 7]
    assert choose_tokens([5, 2, 9], [2, 7, 5], "xor") == [9, 7]


@pytest.mark.parametrize("url", ["http://h:1/generate", "http://h:1/generate/", "http://h:1", "http://h:1/"])
def test_an_address_with_and_without_its_path_is_the_same(url):
    assert server_url(url) == "http://h:1"


def test_rows_without_a_teacher_are_refused_before_the_run():
    config = section(opd_teacher_urls=("math=http://m:1", "code=http://c:1"))
    named = Prompt(text="", token_ids=(1,), metadata={"opd_teacher": "math"})
    check_teachers(config, None, [named])
    unnamed = Prompt(text="", token_ids=(1,), place="train.jsonl:7")
    with pytest.raises(ConfigError, match=r"train.jsonl:7 has metadata.opd_teacher None, .* names math, code"):
        check_teachers(config, None, [named, unnamed])
    check_teachers(section(opd_teacher_urls=("default=http://m:1",)), None, [unnamed])
    check_teachers(section(), "http://m:1", [unnamed])


def test_the_address_of_a_teacher_may_hold_an_equals_sign():
    config = section(opd_teacher_urls=("math=http://m:1/?key=a",))
    assert config.teacher_urls(None) == {"math": "http://m:1/?key=a"}


def test_a_row_is_scored_by_the_teacher_that_it_names():
    config = section(opd_teacher_urls=("math=http://m:1", "default=http://d:1"), opd_teacher_key="who")
    teachers = teachers_of(config, config.teacher_urls(None))
    found = [teachers._server_of(finished(who=name)).base_url for name in ("math", "code")]
    assert found == ["http://m:1", "http://d:1"]
    with pytest.raises(EngineError, match=r"sample 3 has metadata.who 'code'"):
        teachers_of(config, {"math": "http://m:1"})._server_of(finished(who="code"))


def test_a_teacher_that_is_gone_ends_the_run_with_its_name(monkeypatch):
    pauses: list[int] = []
    monkeypatch.setattr(module, "pause_s", lambda attempt: pauses.append(attempt) or 0.0)
    monkeypatch.setattr("qwench.engines.client.CONNECT_BACKOFF_S", 0.0)
    teachers = teachers_of(section(), {"default": URL})

    async def teach() -> None:
        try:
            await teachers.teach(finished(), Requests(make_engine(make_model("qwen3"))))
        finally:
            await teachers.close()

    with pytest.raises(EngineError, match=r"teacher default .* cannot be reached .*asked 6 times"):
        asyncio.run(teach())
    assert pauses == [0, 1, 2, 3, 4]
    with pytest.raises(ConfigError, match=r"the teacher default --rm-url http://127.0.0.1:1 cannot be reached"):
        teachers.check_reachable()


def probe(tokenizer, *, of_server) -> None:
    with ServerThread(make_engine(make_model("qwen3"), tokenizer=of_server), token=None) as server:
        teachers_of(section(), {"default": server.base_url}).check_tokens(tokenizer)


def test_a_teacher_with_another_tokenizer_is_refused():
    ours, other = build_small_tokenizer(), build_small_tokenizer()
    probe(ours, of_server=ours)
    other.add_tokens(["frac"])
    text = module.PROBE + "".join(ours.all_special_tokens)
    theirs, own = other(text)["input_ids"], ours(text)["input_ids"]
    at = module.PROBE.index("frac")  # the tokens before it are characters
    assert theirs[:at] == own[:at] and theirs[at] != own[at]
    said = f"reads a text as {theirs[at : at + 3]} from token {at} on where the policy reads {own[at : at + 3]}, so it"
    with pytest.raises(ConfigError, match=rf"the teacher default --rm-url .* has another tokenizer .* {re.escape(said)}"):
        probe(ours, of_server=other)


def test_every_teacher_is_checked_also_behind_one_that_does_not_tell(monkeypatch):
    def tokens_of(url: str, text: str) -> list[int]:
        if "silent" in url:
            raise OSError("silent")
        return [1]

    monkeypatch.setattr(module, "_tokens_of", tokens_of)
    with pytest.raises(ConfigError, match=r"the teacher b .* has another tokenizer"):
        teachers_of(section(), {"a": "http://silent", "b": "http://b"}).check_tokens(build_small_tokenizer())


def test_a_teacher_that_does_not_tell_its_tokens_is_named(caplog):
    probe(build_small_tokenizer(), of_server=None)
    assert "does not tell how it reads a text (HTTP Error 400" in caplog.text and "is not checked" in caplog.text


def test_a_teacher_that_speaks_another_protocol_is_named(caplog):
    class Other(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            self.request.recv(2**16)
            self.request.sendall(b"SSH-2.0-OpenSSH_9.6\r\n")

    with socketserver.TCPServer(("127.0.0.1", 0), Other) as server:
        threading.Thread(target=server.handle_request).start()
        url = f"http://127.0.0.1:{server.server_address[1]}"
        teachers_of(section(), {"default": url}).check_tokens(build_small_tokenizer())
    assert "does not tell how it reads a text (SSH-2.0" in caplog.text


def test_a_teacher_is_asked_again_after_the_run_s_deadline_of_a_request(monkeypatch):
    monkeypatch.setattr(module, "pause_s", lambda attempt: 0.0)

    async def teach(url: str) -> None:
        teachers = Teachers(section(), {"default": url}, generate_timeout_s=0.05)
        try:
            await teachers.teach(finished(), Requests(make_engine(make_model("qwen3"))))
        finally:
            await teachers.close()

    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        with pytest.raises(EngineError, match=r"teacher default .* did not answer /generate within 0\.05 s.*asked 6 times"):
            asyncio.run(teach(url))


def test_a_teacher_that_aborts_is_asked_again(monkeypatch):
    monkeypatch.setattr(module, "pause_s", lambda attempt: 0.0)
    answers = [None, Scores(log_probs=[-1.0])]

    class AbortsOnce:
        async def generate(self, request):
            assert (request.sampling.max_new_tokens, request.sampling.temperature) == (0, 0.0)
            scores = answers.pop(0)
            reason = FinishReason.LENGTH if scores else FinishReason.ABORT
            return result_of(scores, reason)

    asked = teachers_of(section(), {})._ask(AbortsOnce(), [1, 2], Scoring(start=1))
    assert asyncio.run(asked) == Scores(log_probs=[-1.0])
