"""What a person is told of a run: facts in, lines out.

    start        model, data, devices, length, folders              one line each, before the first step
    samples      a response with its reward and the reason          after each rollout
    write        one line a rollout (fine-tuning: a step), the bar  and every --table-interval rollouts the table
    finish       what was saved where, and what to type next

Reinforcement learning counts rollouts, fine-tuning counts optimizer steps and knows no rollouts.
"""

from __future__ import annotations

import textwrap
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from statistics import fmean

from rich.table import Table
from rich.text import Text

from qwench.observability.console import Console, RunBar, visible
from qwench.observability.metrics import Axis, Record
from qwench.observability.summary import evaluations, format_seconds, summarize
from qwench.samples import Rollout, Sample

NEXT = "next"
"""The label of a command that can be pasted."""
_DONE = "perf/step_time"
"""In the metrics of a rollout that is learned from, and in no others."""
_IN_LINE: Mapping[str, Mapping[str, str]] = {
    "rollout": {
        "rollout/raw_reward": "reward",
        "rollout/response_len/mean": "length",
        "train/loss": "loss",
        "train/grad_norm": "grad norm",
    },
    "step": {
        "train/loss": "loss",
        "train/grad_norm": "grad norm",
        "train/lr-pg_0": "lr",
        "perf/actor_train_tok_per_s": "tokens/s",
    },
}
"""Unit -> what its line shows, under which name."""
_MAX_CHARACTERS, _MAX_LINES = 800, 12
"""Of a shown response; its middle is left out. The end is where the answer is."""


class RunReport:
    """See the module docstring. It is a sink of the metric log."""

    def __init__(
        self,
        console: Console,
        *,
        unit: str,
        total: int,
        show_samples: int | None = None,
        table_interval: int | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Say nothing yet.

        Args:
            unit: what is counted: `rollout` or `step`.
            total: of the whole run, in units.
            show_samples: responses of each rollout. None: 1 on a terminal, where they pass by; a log file would keep them all.
            table_interval: rollouts between two tables. None: no table.
        """
        self._console, self._unit, self._total = console, unit, total
        self._show_samples = (0 if console.width is None else 1) if show_samples is None else show_samples
        self._table_interval = table_interval
        self._clock = clock
        self._open = ExitStack()
        self._bar: RunBar | None = None
        self._done = self._done_before = 0
        self._began_at = clock()

    def start(self, facts: Mapping[str, str]) -> None:
        """Say what the run is about to do."""
        say_facts(self._console, facts)

    def drop_from(self, first_steps: Mapping[Axis, int]) -> None:
        """Begin at the position of a resumed run, and show the bar."""
        self._done = self._done_before = first_steps[Axis.TRAIN if self._unit == "step" else Axis.ROLLOUT]
        self._show_bar()

    def samples(self, rollout: Rollout) -> None:
        """Show responses of the first groups, one of each."""
        for group in rollout.groups[: self._show_samples]:
            self._console.say("\n".join(_sample_lines(group.samples[0], rollout.rollout_id)))

    def write(self, rollout_id: int, records: Sequence[Record]) -> None:
        """Say what was measured: a line for each evaluation set, then one for the rollout or for each of its steps."""
        steps = [record.metrics for record in records if record.axis is Axis.TRAIN]
        others = {name: value for record in records if record.axis is not Axis.TRAIN for name, value in record.metrics.items()}
        # An evaluation beside training ends some rollouts after the one that it belongs to.
        late = f" after rollout {rollout_id}" if self._unit == "rollout" and rollout_id < self._done else ""
        for group in evaluations(others):
            self._console.say(f"{group.title}{late}  {_joined(group.values)}")
        if _DONE not in others:
            return
        if self._bar is None:
            self._show_bar()
        parts = [_mean(steps)] if self._unit == "rollout" else steps
        for step in parts:
            self._done += 1
            self._say_line({**others, **step}, seconds=others[_DONE] / len(parts))
        if self._table_interval is not None and (rollout_id + 1) % self._table_interval == 0:
            self._console.show(_table({**others, **_mean(steps)}))

    def check(self) -> None:
        """Keep no record that could be lost."""

    def close(self) -> None:
        """Remove the bar."""
        self._bar = None
        self._open.close()

    @property
    def is_unfinished(self) -> bool:
        """Tell whether units of the run are left."""
        return self._done < self._total

    def finish(self, facts: Mapping[str, str]) -> None:
        """Say that the run is done, and list its files."""
        self.close()
        took = f" in {format_seconds(self._clock() - self._began_at)}" if self._done > self._done_before else ", nothing to do"
        say_facts(self._console, {"done": f"{self._done} of {self._total} {self._unit}s{took}", **facts})

    def _show_bar(self) -> None:
        self._began_at = self._clock()
        self._bar = self._open.enter_context(self._console.run(self._unit, done=self._done, total=self._total))

    def _say_line(self, metrics: Mapping[str, float], *, seconds: float) -> None:
        """Say one unit in one line, which on a terminal fits into it."""
        values = {label: _short(metrics[name]) for name, label in _IN_LINE[self._unit].items() if name in metrics}
        fields = [f"{self._unit} {self._done}/{self._total}", *(f"{label} {value}" for label, value in values.items())]
        fields.append(format_seconds(seconds))
        left = format_seconds((self._clock() - self._began_at) / (self._done - self._done_before) * (self._total - self._done))
        width = self._console.width
        if width is None and self._done < self._total:
            fields.append(f"{left} left")  # the bar of a terminal shows it
        while width is not None and len("  ".join(fields)) > width and len(fields) > 1:
            fields.pop()
        self._console.say("  ".join(fields))
        if self._bar is not None:
            newest = next((f"{label} {value}" for label, value in values.items()), "")
            self._bar.show(self._done, left=f"{left} left", note=newest)


def say_facts(console: Console, facts: Mapping[str, str]) -> None:
    """Say each fact after its label. What is no command to be pasted is wrapped at words."""
    for label, fact in facts.items():
        head, text = f"{visible(label):<9} ", visible(fact)
        if label != NEXT and console.width is not None:
            text = _wrapped(text, first=len(head), width=console.width)
        console.say(Text.assemble((head, "bold"), text))


def _wrapped(text: str, *, first: int, width: int) -> str:
    """Wrap text that begins in column `first`; a word longer than a line is left whole."""
    wrapper = textwrap.TextWrapper(
        max(width, 2 * first),
        initial_indent=" " * first,
        subsequent_indent=" " * 10,
        break_long_words=False,
        break_on_hyphens=False,
    )
    return wrapper.fill(text)[first:]


def _mean(steps: Sequence[Mapping[str, float]]) -> dict[str, float]:
    names = {name: None for step in steps for name in step}
    return {name: fmean(step[name] for step in steps if name in step) for name in names}


def _table(metrics: Mapping[str, float]) -> Table:
    """Return one row for each group of metrics."""
    table = Table(show_header=False, pad_edge=False, box=None)
    for group in summarize(metrics):
        values = Text("  ").join(Text.assemble((f"{label} ", "dim"), value) for label, value in group.values.items())
        table.add_row(Text(group.title), values)
    return table


def _sample_lines(sample: Sample, rollout_id: int) -> Iterator[str]:
    reward = "no reward" if sample.reward is None else f"reward {_short(sample.reward)}"
    reason = f", {sample.verdict.reason}" if sample.verdict is not None else ""
    label = f", label {_cut(str(sample.prompt.label), characters=60, lines=1)}" if sample.prompt.label is not None else ""
    yield f"sample {sample.sample_id} of rollout {rollout_id}: {reward}{reason}{label}"
    for name, text in (("prompt", _asked(sample)), ("response", sample.response)):
        for i, line in enumerate(_cut(text, characters=_MAX_CHARACTERS, lines=_MAX_LINES).split("\n")):
            yield f"  {name if i == 0 else '':<9}| {line}"


def _asked(sample: Sample) -> str:
    """Return what the user asked last; of a prompt that is no conversation, its end."""
    messages = sample.prompt.messages
    if not isinstance(messages, str) and messages and isinstance(messages[-1].get("content"), str):
        return str(messages[-1]["content"])
    return sample.prompt.text


def _cut(text: str, *, characters: int, lines: int) -> str:
    """Return text of at most so many characters and lines, a third of them from its beginning, without its middle."""
    text = visible(text.expandtabs(4))
    if len(text) > characters:
        text = (
            f"{text[: characters // 3]} ... {len(text) - characters:,} characters ... {text[-(characters - characters // 3) :]}"
        )
    rows = text.split("\n")
    if len(rows) <= lines:
        return text
    if lines == 1:
        return " ".join(rows)
    head = lines // 3
    return "\n".join([*rows[:head], f"... {len(rows) - lines + 1} lines ...", *rows[len(rows) - lines + 1 + head :]])


def _short(value: float) -> str:
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e12 else f"{value:.3g}"


def _joined(values: Mapping[str, str]) -> str:
    return "  ".join(f"{label} {value}" for label, value in values.items())
