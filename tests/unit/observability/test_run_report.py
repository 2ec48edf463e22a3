import pytest

from qwench.observability.metrics import MetricLog
from qwench.observability.run_report import RunReport, say_facts
from qwench.samples import Group, Prompt, Rollout, Sample, Verdict
from tests.fakes.console import RecordingConsole

LEARNED = {"rollout/raw_reward": 0.4375, "rollout/response_len/mean": 43.5, "perf/step_time": 8.0}


class HandClock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def opened(*, width=None, unit="rollout", total=4, steps=2, first=0, **options):
    console, clock = RecordingConsole(width=width), HandClock()
    report = RunReport(console, unit=unit, total=total, clock=clock, **options)
    log = MetricLog([report], num_steps_per_rollout=steps)
    clock.now += 50.0  # until the run begins
    if first is not None:
        log.resume(first, first_step=first * steps)
    return console, clock, report, log


def sample(response, **fields):
    prompt = Prompt(text="<|im_start|>user\n1+1", token_ids=(1,), label="2", messages=[{"role": "user", "content": "1+1"}])
    verdict = Verdict(score=0.0, reason="wrong")
    return Sample(prompt=prompt, sample_id=96, group_id=12, response=response, verdict=verdict, reward=0.0, **fields)


def shown_sample(response, **options):
    console, _, report, _ = opened(**{"show_samples": 1, **options})
    report.samples(Rollout(rollout_id=3, groups=[Group(group_id=12, samples=[sample(response)])]))
    return "\n".join(console.lines)


def test_a_rollout_is_one_line_with_the_mean_of_its_steps_and_the_time_left():
    console, clock, _, log = opened()
    clock.now += 10.0
    log.log(0, LEARNED, steps=[{"train/loss": 0.1, "train/grad_norm": 1.0}, {"train/loss": 0.3, "train/grad_norm": 2.0}])
    assert console.events == [
        ("run", "rollout", 0, 4),
        ("say", "rollout 1/4  reward 0.438  length 43.5  loss 0.2  grad norm 1.5  8.00s  30.0s left"),
        ("bar", 1, "30.0s left", "reward 0.438"),
    ]


def test_fine_tuning_has_a_line_for_each_step_and_knows_no_rollouts():
    console, clock, report, log = opened(unit="step", total=8, first=1, table_interval=2)
    clock.now += 4.0
    steps = [{"train/loss": 2.0, "train/lr-pg_0": 1e-5}, {"train/loss": 1.0, "train/grad_norm": 3.0}]
    assert report.is_unfinished
    log.log(1, {"perf/step_time": 4.0, "perf/actor_train_tok_per_s": 12345.0}, steps=steps)
    report.finish({"saved": "runs/a"})
    assert [line for line in console.lines if "step" in line] == [
        "step 3/8  loss 2  lr 1e-05  tokens/s 12,345  2.00s  20.0s left",
        "step 4/8  loss 1  grad norm 3  tokens/s 12,345  2.00s  8.00s left",
        "done      4 of 8 steps in 4.00s",
    ]
    assert ("bar", 4, "8.00s left", "loss 1") in console.events
    assert not any("rollout" in str(event) for event in console.events)


def test_a_line_fits_into_the_terminal_however_long_its_numbers_are():
    console, _, _, log = opened(width=60, total=20_000)
    log.log(0, LEARNED, steps=[{"train/loss": -1.23456e-7, "train/grad_norm": 1234567.0}])
    (line,) = console.lines
    assert line == "rollout 1/20000  reward 0.438  length 43.5  loss -1.23e-07"
    narrow, _, _, log = opened(width=4)
    log.log(0, LEARNED)
    assert narrow.lines == ["rollout 1/4"]
    whole = "rollout 1/4  reward 0.438  length 43.5  8.00s"
    for columns, shown in ((len(whole), whole), (len(whole) - 1, whole.removesuffix("  8.00s"))):
        exact, _, _, log = opened(width=columns)
        log.log(0, LEARNED)
        assert exact.lines == [shown]


def test_a_run_that_only_generates_begins_with_its_first_rollout_and_the_last_has_no_time_left():
    console, _, report, log = opened(total=1, first=None)
    report.start({"model": "Qwen/Qwen3"})
    log.log(0, LEARNED)
    assert console.events == [
        ("say", "model     Qwen/Qwen3"),
        ("run", "rollout", 0, 1),
        ("say", "rollout 1/1  reward 0.438  length 43.5  8.00s"),
        ("bar", 1, "0.00s left", "reward 0.438"),
    ]


def test_what_is_no_rollout_has_no_line():
    console, _, _, log = opened()
    log.log(0, {"rollout/probe": 1.0})
    assert console.lines == []


def test_each_evaluation_set_is_a_line():
    console, _, _, log = opened()
    log.log(2, {"eval/a": 0.5, "eval/a/response_len/mean": 7.0, "eval/b/loss": 1.25})
    assert console.lines == ["evaluation a  reward 0.5  length 7", "evaluation  b/loss 1.25"]


def test_an_evaluation_that_ends_late_names_its_rollout():
    console, _, _, log = opened(first=1)
    log.log(1, {"eval/a": 0.25, "eval/a/response_len/mean": 7.0})
    for rollout_id in (1, 2):
        log.log(rollout_id, LEARNED, steps=[{"train/loss": 0.1}])
    for rollout_id in (2, 3):
        log.log(rollout_id, {"eval/a": 0.5, "eval/a/response_len/mean": 7.0})
    shown = [line for line in console.lines if line.startswith("evaluation")]
    assert shown == [
        "evaluation a  reward 0.25  length 7",
        "evaluation a after rollout 2  reward 0.5  length 7",
        "evaluation a  reward 0.5  length 7",
    ]


def test_the_table_comes_when_it_is_asked_for():
    console, _, _, log = opened(table_interval=3)
    for rollout_id in range(4):
        log.log(rollout_id, LEARNED, steps=[{"train/loss": 0.1}, {"train/loss": 0.3}])
    assert [event[0] for event in console.events if event[0] in ("say", "table")] == ["say", "say", "say", "table", "say"]
    (table,) = [event[1] for event in console.events if event[0] == "table"]
    assert [line.split() for line in table.splitlines()] == [
        ["reward", "reward", "0.4375"],
        ["response", "length", "mean", "43.5"],
        ["loss", "loss", "0.2"],
        ["time", "all", "8.00s"],
    ]


@pytest.mark.parametrize(("width", "asked", "shown"), [(80, None, 1), (None, None, 0), (None, 2, 2), (80, 0, 0)])
def test_a_terminal_shows_one_response_and_a_log_file_none_unless_asked(width, asked, shown):
    console, _, report, _ = opened(width=width, show_samples=asked)
    report.samples(Rollout(rollout_id=3, groups=[Group(group_id=i, samples=[sample("a"), sample("b")]) for i in range(3)]))
    assert len(console.lines) == shown


def test_a_sample_is_shown_with_its_reward_the_reason_and_the_label():
    assert shown_sample("<think>\n[bold]1+1[/bold]\n</think>") == "\n".join(
        [
            "sample 96 of rollout 3: reward 0, wrong, label 2",
            "  prompt   | 1+1",
            "  response | <think>",
            "           | [bold]1+1[/bold]",
            "           | </think>",
        ]
    )


@pytest.mark.parametrize(
    ("messages", "asked"),
    [
        ("1+1", "the whole prompt"),
        ([], "the whole prompt"),
        ([{"role": "assistant", "tool_calls": []}], "the whole prompt"),
        ([{"role": "user", "content": "first"}, {"role": "user", "content": "last"}], "last"),
    ],
)
def test_the_last_message_is_shown_and_the_prompt_where_there_is_none(messages, asked):
    console, _, report, _ = opened(show_samples=1)
    prompt = Prompt(text="the whole prompt", token_ids=(1,), label=None, messages=messages)
    ungraded = Sample(prompt=prompt, sample_id=7, group_id=1, response="x")
    report.samples(Rollout(rollout_id=3, groups=[Group(group_id=1, samples=[ungraded])]))
    lines = "\n".join(console.lines).splitlines()
    assert lines == ["sample 7 of rollout 3: no reward", f"  prompt   | {asked}", "  response | x"]


@pytest.mark.parametrize(("reward", "shown"), [(999.4, "999"), (1000.0, "1,000"), (-1234.5, "-1,234"), (1.5e12, "1.5e+12")])
def test_a_large_reward_has_no_decimals(reward, shown):
    console, _, report, _ = opened(show_samples=1)
    graded = Sample(prompt=Prompt(text="q", token_ids=(1,)), sample_id=7, group_id=1, response="x", reward=reward)
    report.samples(Rollout(rollout_id=3, groups=[Group(group_id=1, samples=[graded])]))
    assert console.lines[0].splitlines()[0] == f"sample 7 of rollout 3: reward {shown}"


def test_a_label_is_one_line():
    console, _, report, _ = opened(show_samples=1)
    prompt = Prompt(text="q", token_ids=(1,), label="two\nlines" + "x" * 60)
    graded = Sample(prompt=prompt, sample_id=7, group_id=1, response="x", reward=1234.5)
    report.samples(Rollout(rollout_id=3, groups=[Group(group_id=1, samples=[graded])]))
    cut = f"two lines{'x' * 11} ... 9 characters ... {'x' * 40}"  # 69 characters of which 60 are shown
    assert console.lines[0].splitlines()[0] == f"sample 7 of rollout 3: reward 1,234, label {cut}"


def test_a_long_response_loses_its_middle_and_keeps_its_end():
    text = shown_sample("start " + "x" * 5000 + r" \boxed{7}")
    assert len(text) < 1000
    assert "start" in text
    assert text.endswith(r"\boxed{7}")
    assert "4,216 characters" in text
    assert "x" * 800 in shown_sample("x" * 800) and f"{'x' * 266} ... 1 characters ... {'x' * 534}" in shown_sample("x" * 801)
    assert "lines" not in shown_sample("\n".join("abcdefghijkl"))
    assert shown_sample("a\tb").endswith("| a   b")
    many = shown_sample("\n".join(str(i) for i in range(100))).splitlines()
    assert len(many) == 14
    assert [line.split("| ")[1] for line in many[-9:]] == ["3", "... 89 lines ...", *map(str, range(93, 100))]


def test_a_response_cannot_move_the_cursor_or_turn_the_text():
    text = shown_sample("a\x1b[2J\x07\r\x08b\u202ec\u2028d\ud800e \U0001f600 \u4e2d")
    assert r"a\x1b[2J\x07\r\x08b\u202ec\u2028d\ud800e" in text
    assert text.endswith("\U0001f600 \u4e2d")


def test_a_run_that_was_done_before_says_so():
    console, _, report, _ = opened(first=4)
    assert not report.is_unfinished
    report.finish({"saved": "runs/a", "next": "qwench serve --hf-checkpoint 'runs/my model'"})
    assert console.lines == [
        "done      4 of 4 rollouts, nothing to do",
        "saved     runs/a",
        "next      qwench serve --hf-checkpoint 'runs/my model'",
    ]
    assert console.events[1] == ("end of run",)


@pytest.mark.parametrize(
    ("width", "devices"),
    [
        (None, "devices   CPU: 1 trainer rank and 1 engine"),
        (30, "devices   CPU: 1 trainer rank\n          and 1 engine"),
        (4, "devices   CPU: 1\n          trainer\n          rank and 1\n          engine"),
    ],
)
def test_facts_are_wrapped_at_words_and_commands_are_not(width, devices):
    console, command = RecordingConsole(width=width), "qwench serve --hf-checkpoint a b"
    say_facts(console, {"devices": "CPU: 1 trainer rank and 1 engine", "next": command})
    assert console.lines == [devices, f"next      {command}"]


def test_a_path_longer_than_the_line_is_left_whole():
    console = RecordingConsole(width=20)
    say_facts(console, {"a_set_of_questions": "/a/long-path/of/many/folders 4 prompts"})
    assert console.lines == ["a_set_of_questions /a/long-path/of/many/folders\n          4 prompts"]
