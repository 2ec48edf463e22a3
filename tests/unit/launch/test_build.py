"""What a run is built of: where its rollouts come from, and what fine-tuning shows and checks first."""

from array import array
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.text import Text

from qwench.config.config import Config
from qwench.config.sections.algorithm import AlgorithmConfig
from qwench.config.sections.data import DataConfig
from qwench.config.sections.debug import DebugConfig
from qwench.config.sections.rollout import RolloutConfig
from qwench.data.prompts import LoadedPrompts
from qwench.data.sft import LoadedSft, SftExample
from qwench.errors import ConfigError
from qwench.launch import build
from qwench.launch.inputs import Inputs
from qwench.observability.timing import PhaseTimer
from qwench.samples import Prompt
from tests.unit.launch.test_placement import inputs_of

PROMPTS = [Prompt(text=letter, token_ids=(ord(letter),)) for letter in "abcdefgh"]
TALKS = [SftExample(tokens=array("i", [1, 2, 3 + i]), loss_mask=b"\1\1", prompt_text="", messages=()) for i in range(8)]


def of(*, rollout: dict[str, object] | None = None, **sections: object) -> Inputs:
    size = {"rollout_batch_size": 4, "num_rollout": 2, **(rollout or {})}
    return inputs_of(Config(**{"rollout": RolloutConfig(**size), **sections}))


def test_prompts_are_handed_out_in_the_order_of_the_flags() -> None:
    def texts(**data: object) -> str:
        inputs = of(rollout={"n_samples_per_prompt": 3}, data=DataConfig(**data))
        source = build._prompt_source(inputs, LoadedPrompts(prompts=PROMPTS, num_dropped=0))
        groups = source.next_groups(8)
        assert {len(group.samples) for group in groups} == {3}
        return "".join(group.samples[0].prompt.text for group in groups)

    assert texts() == "abcdefgh"
    shuffled = texts(rollout_shuffle=True, rollout_seed=1)
    assert sorted(shuffled) == sorted("abcdefgh") and shuffled not in {"abcdefgh", texts(rollout_shuffle=True, rollout_seed=2)}


def test_fine_tuning_shows_its_first_conversation_and_how_the_others_pack(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = of(data=DataConfig(rollout_shuffle=True, rollout_seed=1), algorithm=AlgorithmConfig(loss_type="sft_loss"))
    loaded = LoadedSft(examples=TALKS, num_too_long=0, num_untrained=0)
    monkeypatch.setattr(build, "read_conversations", lambda given: (loaded, "held out"))
    monkeypatch.setattr(build, "check_ready", lambda given, identity: None)
    monkeypatch.setattr(build, "render_mask_preview", lambda sample, tokenizer: sample.tokens)
    monkeypatch.setattr(build, "describe_packing", lambda examples, **options: (examples, options))
    monkeypatch.setattr(build, "make_memory_probe", lambda given, lengths: list(lengths))
    monkeypatch.setattr(build, "_without_engines", lambda *given, **options: (given, options))
    (made, stream, rows, probe), options = build._build_sft(inputs)
    source = options.pop("source")
    assert options == {"preview": source.take(0).samples[0].tokens, "held_out": "held out"}
    assert options["preview"] != [*TALKS[0].tokens], "the order is shuffled"
    assert (len(source.take(1).samples), stream._source, probe) == (4, source, [3] * 8)
    plan = inputs.plan
    packing = {"per_step": plan.batch.global_batch_size, "max_tokens": plan.micro_batch_tokens, "num_ranks": plan.dp_size}
    assert rows == (TALKS, packing)
    assert made.plan == plan.with_epochs_of(2)


@pytest.mark.parametrize("held_out", [None, {"one": LoadedSft(examples=TALKS, num_too_long=0, num_untrained=0)}])
@pytest.mark.parametrize("preview", [None, Text("[[ yes ]]")])
def test_a_run_without_engines_has_all_its_parts(
    held_out: dict[str, LoadedSft] | None, preview: Text | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs, started, closed = of(), ExitStack(), []
    learner = SimpleNamespace(state="state")
    metrics = SimpleNamespace(close=lambda: closed.append("metrics"))
    rollouts = SimpleNamespace(close=lambda: closed.append("rollouts"))
    parts = {
        "open_outputs": lambda given, timer: ("checkpoints", "name", started),
        "check_resumes": lambda checkpoints, source, *, num_rollout: closed.append((checkpoints, source, num_rollout)),
        "start_report": lambda given, rows: ("report", rows),
        "open_processes": lambda given, stack: "processes",
        "start_ranks": lambda processes, stack: ("ranks", processes),
        "start_learner": lambda given, ranks, timer, stack: learner if ranks == ("ranks", "processes") else None,
        "metric_log": lambda given, report: metrics,
        "make_publisher": lambda given, model, engines, gpus, timer: (model, engines),
        "finish_report": lambda *given: given,
        "HeldOutLoss": lambda given, sets, **options: SimpleNamespace(evaluate=(given, sets, options)),
    }
    for name, part in parts.items():
        monkeypatch.setattr(build, name, part)
    run = build._without_engines(inputs, rollouts, "8 rows", "probe", source="source", preview=preview, held_out=held_out)
    assert closed == [("checkpoints", "source", 2)]
    assert inputs.console.lines == ([] if preview is None else ["first conversation, trained tokens in [[ ]]:", "[[ yes ]]"])
    assert (run.plan, run.learner, run.rollouts, run.metrics) == (inputs.plan, learner, rollouts, metrics)
    assert (run.engines, run.memory_probe, run.checkpoints, run.publisher) == (None, "probe", "checkpoints", ("state", None))
    assert run.finish.args == (("report", "8 rows"), inputs)
    assert run.evaluate == (
        held_out
        and (
            learner,
            {"one": TALKS},
            {"temperature": 1.0, "chunk": inputs.plan.batch.global_batch_size, "console": inputs.console},
        )
    )
    run.close()
    assert closed[1:] == ["rollouts", "metrics"]


def test_recorded_rollouts_are_checked_and_cut_as_the_flags_say(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs, checked = of(debug=DebugConfig(load_debug_rollout_data_subsample=0.5)), []
    monkeypatch.setattr(build, "check_recorded", lambda template, *, num_rollout: checked.append((template, num_rollout)))
    monkeypatch.setattr(build, "check_ready", lambda given, identity: None)
    monkeypatch.setattr(build, "ReplayStream", lambda template, *, subsample: (template, subsample))
    monkeypatch.setattr(build, "make_memory_probe", lambda given: "probe")
    monkeypatch.setattr(build, "_without_engines", lambda *given: given)
    assert build._build_replay(inputs, "{rollout_id}.jsonl") == (
        inputs,
        ("{rollout_id}.jsonl", 0.5),
        "2 recorded rollouts",
        "probe",
    )
    assert checked == [("{rollout_id}.jsonl", 2)]


class Source:
    """A source that refuses some cursors."""

    def __init__(self) -> None:
        self.read: list[object] = []

    def load_state_dict(self, cursor: dict[str, int]) -> None:
        if cursor["num_rows"] != 8:
            raise build.CheckpointError("has other rows")
        self.read.append(cursor)


def checkpoints_with(*, saved: dict[str, object] | None, other: dict[str, int] | None = None) -> SimpleNamespace:
    """Return checkpoints of this run, whose rollouts have a state, or of another run with a cursor."""
    folder = Path("run/iter_0000001")
    return SimpleNamespace(
        saved=saved and SimpleNamespace(folder=folder, rollouts=saved, check_length=lambda num_rollout: None),
        foreign_run=other and SimpleNamespace(folder=Path("other"), cursor=other),
    )


def test_a_run_goes_on_where_its_source_was_or_where_that_of_the_other_run_was() -> None:
    cursor = {"num_rows": 8, "at": 3}
    for saved, other, read in (
        ({"source": cursor}, None, [cursor]),
        (cursor, None, [cursor]),
        ({"recorded": 1}, None, []),
        (None, cursor, [cursor]),
        (None, None, []),
        ({"source": cursor}, {"num_rows": 8, "at": 1}, [cursor]),
    ):
        source = Source()
        build.check_resumes(checkpoints_with(saved=saved, other=other), source, num_rollout=2)
        assert source.read == read
    wrong = {"num_rows": 9}
    for checkpoints, folder in (
        (checkpoints_with(saved={"source": wrong}), "run/iter_0000001"),
        (checkpoints_with(saved=None, other=wrong), "other"),
    ):
        with pytest.raises(ConfigError, match=f"^{folder}: has other rows$"):
            build.check_resumes(checkpoints, Source(), num_rollout=2)


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("turns", [False, True])
def test_devices_change_hands_only_where_engines_and_learner_take_turns(ahead: bool, turns: bool) -> None:
    inputs = of()
    devices = replace(inputs.plan.devices, offload_rollout=True, offload_train=False, weights_may_alias=True)
    inputs = replace(inputs, plan=replace(inputs.plan, devices=devices))
    if ahead:
        inputs = replace(inputs, config=replace(inputs.config, rollout=replace(inputs.config.rollout, rollouts_ahead=1)))
    timer = PhaseTimer()
    gpus = build._gpus(inputs, "engines", timer, take_turns=turns)
    assert isinstance(gpus, build.ColocatedGpus if turns and not ahead else build.DedicatedGpus)
    assert gpus.weights_may_alias is True
    if isinstance(gpus, build.ColocatedGpus):
        assert (gpus._engines, gpus._timer, gpus._has_room, gpus._offload_train) == ("engines", timer, False, False)
