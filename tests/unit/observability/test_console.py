import io
import re
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import pytest
import rich.console

from qwench.observability.console import LiveConsole, PlainConsole, QuietConsole, StandardOutput, open_console
from qwench.observability.summary import format_seconds, format_value, summarize

METRICS = {
    "rollout/raw_reward": 0.4375,
    "train/loss": 0.125,
    "perf/update_weights_time": 0.001,
    "perf/step_time": 61.5,
    "eval/gsm8k": 0.5,
    "rollout/unlisted": 1.0,
}


class HandClock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def screen(*, terminal: bool) -> rich.console.Console:
    return rich.console.Console(file=io.StringIO(), force_terminal=terminal, width=100, highlight=False, color_system=None)


def shown(output: rich.console.Console) -> str:
    assert isinstance(output.file, io.StringIO)
    return output.file.getvalue()


def test_summary_keeps_the_order_and_leaves_out_what_was_not_measured():
    assert [(group.title, dict(group.values)) for group in summarize(METRICS)] == [
        ("reward", {"reward": "0.4375"}),
        ("loss", {"loss": "0.125"}),
        ("time", {"all": "1m02s"}),  # a publication of 1 ms is none
        ("evaluation", {"gsm8k": "0.5"}),
    ]


def test_every_metric_of_the_table_has_its_group_and_its_short_name():
    table = {
        "rollout/raw_reward": 1, "rollout/truncated_ratio": 2, "passrate/pass@1": 3, "rollout/response_len/mean": 4,
        "rollout/response_len/median": 5, "rollout/response_len/max": 6, "rollout/trained_len/mean": 7, "train/loss": 8,
        "train/pg_loss": 9, "train/pg_clipfrac": 10, "train/entropy_loss": 11, "train/grad_norm": 12, "train/lr-pg_0": 13,
        "train/ppo_kl": 14, "train/kl_loss": 15, "train/train_rollout_logprob_abs_diff": 16, "perf/rollout_time": 17,
        "perf/train_time": 18, "perf/update_weights_time": 19, "perf/save_time": 20, "perf/offload_time": 21,
        "perf/step_time": 22, "perf/peak_gpu_memory_gib": 23, "perf/tokens_per_gpu_per_sec": 24,
        "perf/actor_train_tok_per_s": 25, "perf/actor_train_tflops": 26,
    }  # fmt: skip
    assert {group.title: dict(group.values) for group in summarize(table)} == {
        "reward": {"reward": "1", "truncated": "2", "pass@1": "3"},
        "response length": {"mean": "4", "median": "5", "max": "6", "trained": "7"},
        "loss": {"loss": "8", "pg loss": "9", "clipped": "10", "entropy": "11", "grad norm": "12", "lr": "13"},
        "divergence": {"ppo kl": "14", "kl to reference": "15", "trainer vs engine": "16"},
        "time": {
            "rollout": "17.0s", "train": "18.0s", "publish": "19.0s", "save": "20.0s", "offload": "21.0s", "all": "22.0s",
        },
        "memory": {"peak GiB": "23"},
        "tokens/s": {"per GPU": "24", "training": "25"},
        "TFLOP/s per GPU": {"training": "26"},
    }  # fmt: skip
    assert summarize({"perf/save_time": 0.0049}) == [] and summarize({"perf/save_time": 0.005}) != []


def test_an_evaluation_is_a_short_line_for_each_set():
    metrics = {
        "eval/a": 0.5, "eval/a-truncated_ratio": 0.25, "eval/a-none_reward_ratio": 0.0,
        "eval/a-pass@1": 0.5, "eval/a-pass@2": 1.0,
        "eval/a/response_len/mean": 43.5, "eval/a/response_len/max": 99.0, "eval/a/reward_reason/exact": 0.5,
        "eval/a/hard": 0.1, "eval/a/hard-truncated_ratio": 0.0, "eval/a/hard-none_reward_ratio": 0.5,
        "eval/a/hard/response_len/mean": 7.0, "eval/of/my/own": 3.0,
    }  # fmt: skip
    assert [(group.title, dict(group.values)) for group in summarize(metrics)] == [
        ("evaluation a", {"reward": "0.5", "truncated": "0.25", "pass@1": "0.5", "pass@2": "1", "length": "43.5"}),
        ("evaluation a/hard", {"reward": "0.1", "ungraded": "0.5", "truncated": "0", "length": "7"}),
        ("evaluation", {"of/my/own": "3"}),
    ]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.0123, "0.01s"), (4.215, "4.21s"), (42.06, "42.1s"), (59.99, "1m00s"), (61.5, "1m02s"), (3599.6, "1h00m"),
        (9000.0, "2h30m"), (float("nan"), "nan"),
    ],
)  # fmt: skip
def test_durations_are_read_as_on_a_clock(seconds, text):
    assert format_seconds(seconds) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (1234567.0, "1,234,567"),
        (0.4375, "0.4375"),
        (1e-6, "1e-06"),
        (12.0, "12"),
        (-98765.4, "-98,765"),
        (1.5e12, "1.5e+12"),
        (float("nan"), "nan"),
    ],
)
def test_values_are_short(value, text):
    assert format_value(value) == text


@pytest.mark.parametrize("terminal", [False, True])
def test_a_line_is_never_broken_and_markup_is_text(terminal):
    output = screen(terminal=terminal)
    command = "qwench train --save '[red]runs'  :smile: " + "--flag value " * 20
    (LiveConsole(output) if terminal else PlainConsole(output)).say(command)
    assert shown(output) == command + "\n"


@pytest.mark.parametrize("terminal", [False, True])
def test_what_is_said_cannot_control_the_terminal(terminal):
    output = screen(terminal=terminal)
    console = LiveConsole(output) if terminal else PlainConsole(output)
    console.say("a\x1b]0;title\x07\x9b2Jb\u2067\ttab \u00e4\ue000\u2029")
    console.say("\x1b[2J")
    said = "a\\x1b]0;title\\x07\\x9b2Jb\\u2067  tab \u00e4\\ue000\\u2029\n"  # a tab as spaces
    assert shown(output) == said + "\\x1b[2J\n"


def test_plain_progress_speaks_at_most_every_half_minute():
    output, clock = screen(terminal=False), HandClock()
    with PlainConsole(output, clock=clock).progress("generate", total=100) as progress:
        for _ in range(7):
            clock.now += 10.0
            progress.advance(4)
            progress.advance()
    assert shown(output).splitlines() == ["generate 14/100", "generate 29/100"]


def test_live_console_draws_bars_from_many_threads_and_prints_above_them():
    output = screen(terminal=True)
    console = LiveConsole(output)
    with console.phase("rollout 0"), console.progress("generate", total=40) as progress:
        with ThreadPoolExecutor(4) as threads:
            list(threads.map(progress.advance, [10] * 4))
        console.say("a [bracketed] line")
    text = shown(output)
    assert "40/40" in text
    assert "a [bracketed] line" in text


def frames(text: str) -> list[str]:
    """Return each state of the live part, without the codes that move the cursor."""
    return [line.strip() for line in re.split(r"\r|\n|\x1b\[[0-9;?]*[A-Za-z]", text) if line.strip()]


def test_a_run_has_one_bar_that_names_what_is_done_now():
    output = screen(terminal=True)
    console = LiveConsole(output)
    with console.run("rollout", done=2, total=24) as bar:
        with console.phase("load"):
            assert any(re.search(r"rollout 2/24 .*load$", frame) for frame in frames(shown(output)))
        bar.show(3, left="1m02s left", note="reward 0.438")
        with console.phase("train"), console.progress("generate rollout 3", total=32) as progress:
            progress.advance(11)
            progress.advance()
            bar.show(4, left="58.0s left", note="reward 0.5")
        console.say("a line above")
    drawn = [frame for frame in frames(shown(output)) if "rollout" in frame]
    assert any(re.search(r"rollout 3/24 .* 1m02s left  reward 0.438  train$", frame) for frame in drawn)
    assert any(re.search(r"rollout 4/24 .* 58.0s left  reward 0.5  generate rollout 3 12/32$", frame) for frame in drawn)
    assert drawn[-1].endswith("58.0s left  reward 0.5")
    assert all(frame.count("/24") == 1 for frame in drawn)


@pytest.mark.parametrize("width", [60, 80, 120])
def test_the_bar_of_a_run_stays_on_one_line(width):
    output = rich.console.Console(file=io.StringIO(), force_terminal=True, width=width, color_system=None)
    console = LiveConsole(output)
    with console.run("rollout", done=0, total=200_000) as bar, console.phase("a very long description " * 10):
        bar.show(123_456, left="12h34m left", note="reward -0.0123")
        console.say("line")
    drawn = [frame for frame in frames(shown(output)) if "rollout" in frame]
    assert drawn
    assert max(len(frame) for frame in drawn) == width, "news that are too long take what the line has left"
    assert all(re.match(r". rollout (0|123456)/200000 ", frame) for frame in drawn)
    assert any("123456/200000 \u2501\u2501\u2501\u2501\u2501\u2501\u2501 " in frame for frame in drawn), "0.62 of 12"
    assert any(re.search("a very.*\u2026$", frame) for frame in drawn)


def test_a_bar_stays_on_one_line_of_a_narrow_terminal_and_leaves_nothing():
    output = rich.console.Console(file=io.StringIO(), force_terminal=True, width=24, color_system=None)
    with LiveConsole(output).progress("a [bold]long[/bold] description", total=1000) as progress:
        progress.advance()
    assert all(re.fullmatch(r"a \[bold\]long\S* [01]/\S*", frame) for frame in frames(shown(output)))
    assert "\n" not in shown(output)


def test_live_part_ends_when_the_outermost_context_ends_even_by_an_error():
    output = screen(terminal=True)
    console = LiveConsole(output)
    with pytest.raises(ValueError, match="boom"), console.phase("train"):
        raise ValueError("boom")
    before = shown(output)
    console.say("after")
    assert shown(output) == before + "after\n"  # no redraw of a live part around it


def test_console_without_a_terminal_is_plain(capsys):
    console = open_console()
    console.say("x" * 300)
    assert isinstance(console, PlainConsole)
    assert capsys.readouterr().out == "x" * 300 + "\n"


def test_a_character_that_the_output_has_not_ends_no_run(monkeypatch):
    written = io.BytesIO()
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(written, encoding="ascii", write_through=True))
    open_console().say("caf\u00e9")
    assert written.getvalue() == b"caf\\xe9\n"


@pytest.mark.parametrize("plain", [False, True])
def test_quiet_console_shows_nothing_and_a_plain_one_what_is_said(capsys, plain):
    console = PlainConsole(rich.console.Console()) if plain else QuietConsole()
    with console.phase("train"), console.progress("generate", total=1) as progress:
        progress.advance(1)
    console.say("text")
    console.show("table")
    with console.run("rollout", done=0, total=1) as bar:
        bar.show(1, left="", note="")
    assert capsys.readouterr().out == ("text\ntable\n" if plain else "")
    assert console.width is None


def test_a_reader_of_the_output_that_has_gone_is_an_error():
    with pytest.raises(BrokenPipeError):
        try:
            raise BrokenPipeError
        except BrokenPipeError:
            StandardOutput().on_broken_pipe()


def test_what_is_done_after_a_run_has_a_line_of_its_own():
    output = screen(terminal=True)
    console = LiveConsole(output)
    for end in ("finish", "fail"):
        with suppress(ValueError), console.run("rollout", done=0, total=1):
            if end == "fail":
                raise ValueError
        with console.phase(f"save after {end}"):
            pass
        assert any(re.search(rf"save after {end} .* 0s$", frame) for frame in frames(shown(output)))


@pytest.mark.parametrize(("said", "width"), [("0", 80), ("1", 1)])
def test_a_terminal_that_says_it_has_no_columns_gets_the_usual_80(capsys, monkeypatch, said, width):
    monkeypatch.setenv("COLUMNS", said)
    monkeypatch.setenv("FORCE_COLOR", "1")
    console = open_console()
    console.say("model")
    assert (console.width, capsys.readouterr().out) == (width, "model\n")
