"""What functions of a rollout in slime's convention are given, and what their answers mean."""

import asyncio
from argparse import Namespace
from collections.abc import Callable
from types import SimpleNamespace

import pytest

from qwench.engines.protocol import SamplingParams
from qwench.errors import ConfigError, QwenchError
from qwench.foreign.rollout_functions import Adapters
from qwench.foreign.sample import RolloutFnEvalOutput, RolloutFnTrainOutput
from qwench.foreign.session import Session, close_session, current_session, open_session, run, sampling_params
from qwench.models.built_tokenizers import build_small_tokenizer
from qwench.rollout.evaluate import EvalResult
from qwench.rollout.filters import FilterResult
from qwench.rollout.generate import GenerateContext
from qwench.rollout.sampling import Sampling
from qwench.samples import Group, Prompt, Sample, Status
from tests.fakes.engine import CharTokenizer
from tests.fakes.grader import FakeGrader
from tests.unit.rewards.samples import finished

ARGS = Namespace(n_samples_per_prompt=2)


@pytest.fixture
def session():
    loop = asyncio.new_event_loop()
    whole = SamplingParams(max_new_tokens=8, seed=0)
    grader = FakeGrader(lambda sample: 1.0)
    open_session(Session(args=ARGS, tokenizer=None, gateway=None, loop=loop, sampling=Sampling(whole=whole), grader=grader))
    yield
    close_session()
    loop.close()


@pytest.mark.parametrize(
    ("answer", "result"),
    [
        (True, FilterResult(keep=True)),
        (False, FilterResult(keep=False, reason="filtered")),
        (SimpleNamespace(keep=True, reason="fine"), FilterResult(keep=True)),
        (SimpleNamespace(keep=False, reason="zero_std_0.0"), FilterResult(keep=False, reason="zero_std_0.0")),
        (SimpleNamespace(keep=False, reason=None), FilterResult(keep=False, reason="filtered")),
        (
            SimpleNamespace(keep=False, reason="same", keep_when_insufficient=True),
            FilterResult(keep=False, reason="same", keep_when_insufficient=True),
        ),
    ],
)
def test_a_filter_answers_with_a_word_or_a_record(session, answer, result):
    seen = []

    def keep(args, samples):
        seen.append((args, [sample.response for sample in samples]))
        return answer

    group = Group(group_id=0, samples=[finished("1", "1"), finished("2", "1")])
    assert Adapters(as_text=True).group_filter(keep, "mine.keep")(group) == result
    assert seen == [(ARGS, ["1", "2"])]


def test_sampling_values_of_a_request_are_those_of_the_run_within_its_budget_and_seed():
    whole = SamplingParams(
        max_new_tokens=9, temperature=0.5, top_p=0.9, top_k=3, stop=("x",), stop_token_ids=(7,), skip_special_tokens=True
    )
    values = {
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 3,
        "max_new_tokens": 9,
        "stop": ["x"],
        "stop_token_ids": [7],
        "skip_special_tokens": True,
        "no_stop_trim": True,
        "spaces_between_special_tokens": False,
    }
    assert sampling_params(Sampling(whole=whole)) == values
    assert sampling_params(Sampling(whole=whole), budget=0, seed=5) == {**values, "max_new_tokens": 0, "sampling_seed": 5}
    bare = sampling_params(Sampling(whole=SamplingParams(max_new_tokens=9)))
    assert (bare["stop"], bare["stop_token_ids"]) == (None, None)


class Counting:
    """A rollout function of miles' newer form, with state."""

    made = 0

    def __init__(self, input):  # noqa: A002  # the name tells the form
        Counting.made += 1
        self.source, self.calls = input.data_source, 0

    def __call__(self, input):  # noqa: A002
        self.calls += 1
        self.source.update_metadata({"calls": self.calls})
        return RolloutFnTrainOutput(samples=[], metrics={"calls": self.source.get_metadata()["calls"]})


def test_a_class_is_made_once_and_keeps_its_state_and_its_data_source(session):
    make_rollout = Adapters(as_text=True).make_rollout(Counting, "mine.Counting")

    async def twice():
        return [(await make_rollout(rollout_id, None)).metrics for rollout_id in (0, 1)]

    assert asyncio.run(twice()) == [{"calls": 1.0}, {"calls": 2.0}]
    assert Counting.made == 1


def test_a_function_finds_what_it_told_its_data_source_in_an_earlier_rollout(session):
    seen = []

    def roll(args, rollout_id, data_source, evaluation=False):
        seen.append((rollout_id, evaluation, dict(data_source.get_metadata())))
        data_source.update_metadata({"last": rollout_id})
        return []

    make_rollout = Adapters(as_text=True).make_rollout(roll, "mine.roll")

    async def twice():
        for rollout_id in (4, 5):
            await make_rollout(rollout_id, None)

    asyncio.run(twice())
    assert seen == [(4, False, {}), (5, False, {"last": 4})]


def test_a_data_source_hands_out_takes_back_and_counts_groups(session):
    given = groups_of("ab", "c")
    kept: list[Group] = []
    tokenizer = build_small_tokenizer()
    buffer = SimpleNamespace(waiting=kept)
    context = SimpleNamespace(
        next_groups=lambda number: given[:number], put_back=kept.extend, buffer=buffer, tokenizer=tokenizer
    )

    def roll(args, rollout_id, data_source, evaluation=False):
        groups = data_source.get_samples(2)
        assert texts_of(groups) == [["a", "b"], ["c"]] and data_source.get_buffer_length() == 0
        data_source.add_samples(groups[1:])
        assert data_source.get_buffer_length() == 1
        return groups[:1]

    async def made():
        current_session().loop = asyncio.get_running_loop()
        return await Adapters(as_text=True).make_rollout(roll, "mine.roll")(3, context)

    current_session().tokenizer = tokenizer
    rollout = asyncio.run(made())
    assert (rollout.rollout_id, [one.response for one in rollout.samples]) == (3, ["a", "b"])
    assert [[one.response for one in group.samples] for group in kept] == [["c"]]


def test_of_a_rollouts_metrics_the_numbers_are_kept(session):
    def roll(args, rollout_id, data_source, evaluation=False):
        return RolloutFnTrainOutput(samples=[], metrics={"a": 1, "b": 0.5, "c": "text", "d": None, "e": [1.0]})

    rollout = asyncio.run(Adapters(as_text=True).make_rollout(roll, "mine.roll")(0, None))
    assert rollout.metrics == {"a": 1.0, "b": 0.5}


@pytest.mark.parametrize(("needed_by", "log_probs"), [("--use-tis", None), ("--use-tis", [-0.5, -0.25]), (None, None)])
def test_a_response_without_log_probs_is_refused_where_a_flag_needs_them(session, needed_by, log_probs):
    async def write(args, sample, params):
        sample.tokens, sample.response, sample.response_length = [1, 104, 105], "hi", 2
        sample.rollout_log_probs = log_probs
        return sample

    current_session().tokenizer, current_session().needs_log_probs = CharTokenizer(), needed_by
    sampling = current_session().sampling
    context = GenerateContext(requests=None, tokenizer=CharTokenizer(), sampling=sampling, rollout_id=0, position=0)
    sample = Sample(prompt=Prompt(text="a", token_ids=(1,)), sample_id=5, group_id=1)
    answer = Adapters(as_text=True).generate(write, "mine.write")(sample, context)
    if needed_by and log_probs is None:
        with pytest.raises(QwenchError, match=r"returned no rollout_log_probs, which --use-tis needs"):
            asyncio.run(answer)
        return
    back = asyncio.run(answer)
    assert (back.sample_id, back.group_id, back.response, back.tokens) == (5, 1, "hi", [1, 104, 105])


@pytest.mark.parametrize("answer", [[1.0], (1.0, 2.0, 3.0), None])
def test_reward_post_processing_answers_with_two_lists_of_which_the_second_is_learned_from(answer):
    seen = []

    def process(args, samples):
        seen.append((args, [sample.response for sample in samples]))
        return (["raw"], [True, -2]) if len(seen) == 1 else answer

    adapted = Adapters(as_text=True).reward_post_process(process, "mine.fn", lambda: ARGS)
    assert adapted([finished("1", "1"), finished("2", "1")]) == [1.0, -2.0]
    assert seen == [(ARGS, ["1", "2"])]
    prompts = []
    for as_text in (True, False):
        noting = lambda args, samples: prompts.append(samples[0].prompt) or ([], [])  # noqa: E731 - one more function
        Adapters(as_text=as_text).reward_post_process(noting, "mine.fn", lambda: ARGS)([finished("1", "1")])
    assert prompts == [finished("1", "1").prompt.text, finished("1", "1").prompt.messages]
    with pytest.raises(
        QwenchError, match=r"^--custom-reward-post-process-path mine.fn must return raw rewards and rewards, got "
    ):
        adapted([])


def context_of(*, scope: str = "train") -> GenerateContext:
    sampling = Sampling(whole=SamplingParams(max_new_tokens=8, seed=40), seed_by_position=True)
    return GenerateContext(requests=None, tokenizer=CharTokenizer(), sampling=sampling, rollout_id=6, position=2, scope=scope)


@pytest.mark.parametrize("scope", ["train", "eval/held_out"])
def test_a_generate_function_is_given_the_samples_own_seed_and_what_is_left_of_its_budget(session, scope):
    seen = []

    async def plain(args, sample, params):
        seen.append((args, None, params))
        return sample

    async def told(args, sample, params, evaluation=None):
        seen.append((args, evaluation, params))
        return [sample, [sample]]

    class InOne:
        async def __call__(self, input):  # noqa: A002
            seen.append((input.args, input.evaluation, input.sampling_params))
            return SimpleNamespace(samples=input.sample)

    current_session().args = Namespace(sglang_server_concurrency=1, rollout_num_engines=1)
    current_session().tokenizer = CharTokenizer()
    sample = finished("abc")
    sample.append([7, 8, 9], log_probs=[-1.0] * 3, version=0)
    made = [
        asyncio.run(Adapters(as_text=True).generate(function, "mine.fn")(sample, context_of(scope=scope)))
        for function in (plain, told, InOne)
    ]
    assert [isinstance(one, list) and len(one) for one in made] == [False, 2, False]
    args, evaluating = current_session().args, scope != "train"
    assert [one[:2] for one in seen] == [(args, None), (args, evaluating), (args, evaluating)]
    for _, _, params in seen:
        assert (params["max_new_tokens"], params["sampling_seed"]) == (8 - 3, 40 + 2)


def groups_of(*texts: str) -> list[Group]:
    return [Group(group_id=i, samples=[finished(one) for one in text]) for i, text in enumerate(texts)]


def texts_of(facades) -> list[list[str]]:
    return [[one.response for one in group] for group in facades]


def test_functions_of_groups_are_given_all_of_them_and_choose_our_own(session):
    seen, groups = [], groups_of("ab", "cd", "ef")

    def pick(args, rollout_id, buffer, num_samples):
        seen.append((args, rollout_id, texts_of(buffer), num_samples))
        return [buffer[2], buffer[0]]

    def remove(args, facades):
        seen.append((args, texts_of(facades)))
        facades[0][1].remove_sample = facades[2][0].remove_sample = True

    def look(args, facades, get_samples):
        seen.append((args, texts_of(facades), get_samples))

    adapters, texts = Adapters(as_text=True), [["a", "b"], ["c", "d"], ["e", "f"]]
    picked = adapters.buffer_filter(pick, "mine.fn")(groups, 2)
    assert len(picked) == 2 and picked[0] is groups[2] and picked[1] is groups[0]
    first, second = adapters.find_removed(remove, "mine.fn")(groups)
    assert first is groups[0].samples[1] and second is groups[2].samples[0]
    adapters.on_all_groups(look, "mine.fn")(groups)
    current_session().data_source = SimpleNamespace(get_samples=len)
    adapters.on_all_groups(look, "mine.fn")(groups)
    assert seen == [(ARGS, None, texts, 2), (ARGS, texts), (ARGS, texts, None), (ARGS, texts, len)]


@pytest.mark.parametrize(
    "spoil", [list.pop, list.reverse, lambda groups: groups[0].pop(), lambda groups: groups.append(groups[0])]
)
def test_a_sample_filter_that_changes_its_lists_is_refused(session, spoil):
    find_removed = Adapters(as_text=True).find_removed(lambda args, groups: spoil(groups), "mine.fn")
    with pytest.raises(QwenchError, match=r"--rollout-sample-filter-path mine\.fn must leave its lists as they are"):
        find_removed(groups_of("ab", "cd"))


def test_hooks_see_each_sample_in_turn_and_what_they_return_takes_its_place(session):
    seen = []

    def note(args, sample, rollout_id=None, evaluation=None):
        seen.append((args, sample.response, rollout_id, evaluation))

    async def shout(args, sample):
        sample.response = sample.response.upper()
        return sample

    async def write(sample, context):
        return [finished("a"), finished("b")] if sample is None else finished("c")

    current_session().tokenizer = CharTokenizer()
    generate = Adapters(as_text=True).with_hooks(write, [(shout, "mine.shout"), (note, "mine.note")])
    made = asyncio.run(generate(None, context_of(scope="eval/x")))
    alone = asyncio.run(generate(finished(""), context_of()))
    assert ([one.response for one in made], alone.response) == (["A", "B"], "C")
    assert seen == [(ARGS, "A", 6, True), (ARGS, "B", 6, True), (ARGS, "C", 6, False)]


def test_functions_that_log_are_given_samples_and_metrics_and_may_take_the_logging_over(session):
    seen = []

    def log(rollout_id, args, samples, metrics, seconds):
        seen.append((rollout_id, args, [one.response for one in samples], metrics, seconds))
        return 1

    def log_evaluation(rollout_id, args, data, metrics):
        seen.append((rollout_id, args, data, metrics))

    assert Adapters(as_text=True).log_rollout(log, "mine.fn")(3, groups_of("ab", "c"), {"x": 1.0}, 2.5) is True
    result = EvalResult(name="held_out", groups=groups_of("ab"))
    result.samples[0].reward, result.samples[1].status = 0.5, Status.TRUNCATED
    assert Adapters(as_text=True).log_evaluation(log_evaluation, "mine.fn")([result], {"y": 2.0}) is False
    logged, (rollout_id, args, data, metrics) = seen
    assert logged == (3, ARGS, ["a", "b", "c"], {"x": 1.0}, 2.5)
    assert (rollout_id, args, metrics, list(data)) == (0, ARGS, {"y": 2.0}, ["held_out"])
    assert [one.response for one in data["held_out"].pop("samples")] == ["a", "b"]
    assert data == {"held_out": {"rewards": [0.5, None], "truncated": [False, True]}}


def test_an_evaluation_function_is_measured_by_its_rewards_and_truncations(session):
    output = RolloutFnEvalOutput(
        data={
            "a": {"rewards": [1.0, 0.5, 0.0], "truncated": [True, False, True]},
            "b": {"rewards": [{"acc": 1, "score": 9}, {"acc": 0, "score": 9}]},
            "c": {"rewards": [], "truncated": []},
        },
        metrics={"own": 3, "text": "x"},
    )
    seen = []

    def evaluate(args, rollout_id, data_source, evaluation=False):
        seen.append((args, rollout_id, data_source, evaluation))
        built_in = run(current_session().evaluate())
        assert texts_of([built_in.data["held_out"]["samples"]]) == [["a", "b"]]
        return output

    async def run_set(one):
        return EvalResult(name=one, groups=groups_of("ab"))

    async def measured():
        current_session().loop = asyncio.get_running_loop()
        return await Adapters(as_text=True).evaluate(evaluate, "mine.fn")(["held_out"], run_set)

    current_session().args, current_session().data_source = Namespace(eval_reward_key="acc"), "source"
    assert asyncio.run(measured()) == {
        "eval/own": 3.0,
        "eval/a": 0.5,
        "eval/a-truncated_ratio": pytest.approx(2 / 3),
        "eval/b": 0.5,
        "eval/c": 0.0,
        "eval/c-truncated_ratio": 0.0,
    }
    assert seen == [(current_session().args, 0, "source", True)]


MAKERS = {
    "generate": ("--custom-generate-function-path", 3),
    "make_rollout": ("--rollout-function-path", 3),
    "evaluate": ("--eval-function-path", 3),
    "group_filter": ("--dynamic-sampling-filter-path", 2),
    "buffer_filter": ("--buffer-filter-path", 4),
    "find_removed": ("--rollout-sample-filter-path", 2),
    "on_all_groups": ("--rollout-all-samples-process-path", 3),
    "with_hooks": ("--rollout-sample-hook-path", 2),
    "log_rollout": ("--custom-rollout-log-function-path", 5),
    "log_evaluation": ("--custom-eval-rollout-log-function-path", 4),
    "reward_post_process": ("--custom-reward-post-process-path", 2),
}


def adapt(maker: str, function: Callable[..., object]) -> None:
    adapters = Adapters(as_text=True)
    if maker == "with_hooks":
        adapters.with_hooks(adapters.generate(lambda args, sample, params: sample, "mine.generate"), [(function, "mine.fn")])
    elif maker == "reward_post_process":
        adapters.reward_post_process(function, "mine.fn", lambda: ARGS)
    else:
        getattr(adapters, maker)(function, "mine.fn")


@pytest.mark.parametrize("maker", MAKERS)
def test_a_function_of_another_signature_is_refused_by_its_flag(maker):
    flag, number = MAKERS[maker]
    functions = [lambda: None, lambda a: None, lambda a, b: None, lambda a, b, c: None, lambda a, b, c, d: None]
    functions.append(lambda a, b, c, d, e: None)
    for taken, function in enumerate(functions):
        if taken == number:
            adapt(maker, function)
        else:
            with pytest.raises(ConfigError, match=rf"^{flag} 'mine.fn' has the signature .*, but is called as "):
                adapt(maker, function)
