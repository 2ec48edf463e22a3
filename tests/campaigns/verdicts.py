r"""Compare verdicts with slime's own graders: `python -m tests.campaigns.verdicts --slime FOLDER --labels FILE.jsonl ...`.

FOLDER is a checkout of slime, whose graders evaluate text: give it trusted labels only. Every label is answered in spellings
drawn at random: itself, other ways to write it, and wrong answers. A difference is printed, unless
mathematics agrees with us.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import random
import re
import signal
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial, reduce
from pathlib import Path
from types import FrameType

from qwench.rewards.algebra_worker import settle
from qwench.rewards.expressions import Question
from qwench.rewards.graders import find_grader
from qwench.samples import Prompt, Sample

Spelling = Callable[[str, random.Random], str]
Reference = Callable[[str, str], float]
DEADLINE_S = 10
FONTS = ("\\text", "\\mathrm", "\\textbf", "\\mathbf", "\\boldsymbol")
UNITS = ("\\text{ cm}", " cm", "\\%", "^\\circ", "\\text{ square units}", " miles", "^{\\circ}")
TAILS = (" apples", " is the answer", "\\text{ apples}", " \\text{or } 0", " dollars")
UNICODE = (("\\pi", "\u03c0"), ("\\infty", "\u221e"), ("\\cup", "\u222a"), ("\\le", "\u2264"))
OTHER_LABEL = "another label"


def doubled(fraction: re.Match[str]) -> str:
    """Return a fraction that is not reduced."""
    return f"\\frac{{{2 * int(fraction[1])}}}{{{2 * int(fraction[2])}}}"


SPELLINGS: dict[str, Spelling] = {
    "itself": lambda label, _: label,
    "in dollars": lambda label, _: f"${label}$",
    "in \\( \\)": lambda label, _: f"\\({label}\\)",
    "blanks": lambda label, rng: re.sub(r"(?<=[-+=,()/ ])|(?=[-+=,()/])", lambda _: rng.choice(("", " ")), label),
    "no blanks": lambda label, _: label.replace(" ", ""),
    "thin space": lambda label, _: label.replace(",", ",\\,").replace("+", "\\,+\\,"),
    "full stop": lambda label, _: f"{label}.",
    "left-hand side": lambda label, rng: rng.choice(("x=", "x = ", "y=", "n =", "\\theta =")) + label,
    "unit": lambda label, rng: label + rng.choice(UNITS),
    "currency": lambda label, _: f"\\${label}",
    "dfrac": lambda label, rng: label.replace("\\frac", rng.choice(("\\dfrac", "\\tfrac"))),
    "bare fraction": lambda label, _: re.sub(r"\\frac\{(\w)\}\{(\w)\}", r"\\frac\1\2", label),
    "slash": lambda label, _: re.sub(r"\\frac\{([^{}]*)\}\{([^{}]*)\}", r"(\1)/(\2)", label),
    "plain slash": lambda label, _: re.sub(r"\\frac\{(\w*)\}\{(\w*)\}", r"\1/\2", label),
    "spaced fraction": lambda label, _: re.sub(r"\\frac\{([^{}]*)\}\{([^{}]*)\}", r"\\frac { \1 } { \2 }", label),
    "left right": lambda label, _: re.sub(r"(?<!\\left)\(", r"\\left(", re.sub(r"(?<!\\right)\)", r"\\right)", label)),
    "no left right": lambda label, _: label.replace("\\left", "").replace("\\right", ""),
    "text": lambda label, rng: rng.choice(FONTS) + "{" + label + "}",
    "braces": lambda label, _: f"{{{label}}}",
    "displaystyle": lambda label, _: f"\\displaystyle {label}",
    "decimal": lambda label, _: f"{label}.0" if label.isdigit() else label.replace("\\frac{1}{2}", "0.5"),
    "leading zero": lambda label, _: f"0{label}" if label[0].isdigit() else label,
    "thousands": lambda label, rng: re.sub(r"(?<=\d)(?=(?:\d{3})+$)", rng.choice((",", "{,}", r",\\!", r"\\,", " ")), label),
    "capitals": lambda label, _: label.swapcase() if "\\" not in label else label,
    "or": lambda label, rng: label.replace(",", rng.choice((" and ", " or ", " \\text{ and } ", ";"))),
    "turned round": lambda label, _: ",".join(reversed(label.split(","))),
    "terms turned round": lambda label, _: re.sub(r"^([^-+()]+)\+([^-+()]+)$", r"\2+\1", label),
    "product": lambda label, rng: re.sub(r"(?<=\d)(?=[a-z\\])", rng.choice((" ", "*", r"\\cdot ", r"\\times ")), label),
    "bare root": lambda label, _: re.sub(r"\\sqrt\{(\d)\}", r"\\sqrt\1", label),
    "unicode": lambda label, _: reduce(lambda text, pair: text.replace(*pair), UNICODE, label),
    "names": lambda label, _: label.replace("\\pi", "pi").replace("\\sqrt{", "sqrt{").replace("\\cdot", "*"),
    "power": lambda label, _: re.sub(r"\^([0-9])", r"^{\1}", label) if "{" not in label else label.replace("^", "**"),
    "times ten": lambda label, _: f"{int(label) / 100:g} \\times 10^{{2}}" if label.isdigit() else label,
    "exponent": lambda label, _: f"{int(label)}e0" if label.isdigit() else label,
    "brackets": lambda label, _: label.replace("pmatrix", "bmatrix") if "matrix" in label else f"({label})",
    "round to square": lambda label, _: label.replace("(", "[") if label.startswith("(") else label.replace("[", "("),
    "box in box": lambda label, _: f"\\boxed{{{label}}}",
    "unbalanced": lambda label, rng: (
        label + rng.choice(("\\frac{", "{", "\\right)", "\\text{")) if "}" not in label else label[:-1]
    ),
    "minus": lambda label, _: label[1:] if label[0] in "-0" else f"-{label}",
    "plus": lambda label, _: f"+{label}",
    "plus one": lambda label, _: re.sub("[0-9]+", lambda found: str(int(found[0]) + 1), label, count=1),
    "swapped digits": lambda label, _: re.sub(r"(\d)(\d)", r"\2\1", label, count=1),
    "halved": lambda label, _: f"\\frac{{{label}}}{{2}}",
    "twice": lambda label, _: re.sub(r"\\frac\{([0-9]+)\}\{([0-9]+)\}", doubled, label),
    "number and text": lambda label, rng: label + rng.choice(TAILS),
}
"""How an answer may be written, right or wrong."""
SAME_VALUE = frozenset(
    {"leading zero", "brackets", "plus", "names", "text", "slash", "plain slash", "full stop", "twice", "unicode"}
)
"""Spellings that keep the value. There slime's 0 is wrong by mathematics, and 1 is right, too."""


class SlowError(Exception):
    """A verdict took longer than the deadline."""


def reference_graders(slime: Path) -> dict[str, Reference]:
    """Return slime's graders by `--rm-type`."""
    hub = slime / "slime" / "rollout" / "rm_hub"
    found = {}
    for name in ("math_utils", "math_dapo_utils"):
        spec = importlib.util.spec_from_file_location(f"reference_{name}", hub / f"{name}.py")
        assert spec is not None and spec.loader is not None, f"{hub} is no folder of slime's graders"
        found[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(found[name])
    maths, dapo = found["math_utils"], found["math_dapo_utils"]
    return {
        "math": lambda response, label: float(maths.grade_answer_verl(response, label)),
        "dapo": lambda response, label: float(dapo.compute_score(response, label)["score"]),
    }


def our_score(rm_type: str, response: str, label: str) -> float:
    """Return the score that a run gives."""
    prompt = Prompt(text="q", token_ids=(1,), label=label)
    verdict = find_grader(rm_type)(Sample(prompt=prompt, sample_id=0, group_id=0, response=response))
    return float(settle(verdict.pairs) == "sympy_equal") if isinstance(verdict, Question) else verdict.score


def in_time(grade: Callable[[], float]) -> float | None:
    """Return a score; None: it took too long."""

    def interrupt(_signal: int, _frame: FrameType | None) -> None:
        raise SlowError

    signal.signal(signal.SIGALRM, interrupt)
    signal.alarm(DEADLINE_S)
    try:
        return grade()
    except SlowError:
        return None
    finally:
        signal.alarm(0)


def cases(labels: list[str], count: int, rng: random.Random) -> Iterator[tuple[str, str, str, str]]:
    """Yield (spelling, rm_type, response, label): every label in turn, its spelling drawn."""
    for number in range(count):
        label = labels[number % len(labels)]
        spelling = rng.choice([*SPELLINGS, OTHER_LABEL, OTHER_LABEL])
        answer = rng.choice(labels) if spelling == OTHER_LABEL else SPELLINGS[spelling](label, rng)
        if number % 8 == 0 and re.fullmatch("-?[0-9]+", label):
            yield spelling, "dapo", f"So it is.\nAnswer: {answer}", label
        else:
            yield spelling, "math", f"So it is $\\boxed{{{answer}}}$.", label


def _compare(ours: float | None, theirs: float | None, *, is_right: bool) -> str:
    if ours is None or theirs is None:
        return "slow"
    if ours == theirs:
        return "equal"
    return "right by mathematics" if is_right and ours == 1.0 else "differ"


def main(words: list[str]) -> int:
    """Run the campaign and print every difference."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--slime", type=Path, required=True)
    parser.add_argument("--labels", type=Path, nargs="+", required=True)
    parser.add_argument("--count", type=int, default=38_040)
    parser.add_argument("--seed", type=int, default=0)
    flags = parser.parse_args(words)
    reference, rng = reference_graders(flags.slime), random.Random(flags.seed)
    rows = (json.loads(line)["label"] for path in flags.labels for line in path.open(encoding="utf-8"))
    labels = [label for label in rows if label.strip()]  # a run refuses blank ones
    rng.shuffle(labels)
    counts, differing = Counter[str](), Counter[str]()
    for spelling, rm_type, response, label in cases(labels, flags.count, rng):
        theirs = in_time(partial(reference[rm_type], response, label))
        ours = in_time(partial(our_score, rm_type, response, label))
        outcome = _compare(ours, theirs, is_right=spelling in SAME_VALUE)
        counts[outcome] += 1
        counts[f"{rm_type} {theirs}"] += 1
        if outcome != "equal":
            differing[f"{outcome}: {spelling}"] += 1
        if outcome in ("slow", "differ"):
            print(f"{outcome} ({spelling}, {rm_type}): ours {ours}, theirs {theirs}: {response!r} / {label!r}", flush=True)
    print(f"{flags.count} verdicts: {dict(counts)}; {dict(differing)}")
    return int(counts["slow"] + counts["differ"] > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
