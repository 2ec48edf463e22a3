"""How a run is put together: what is checked, started and closed, in which order."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from qwench.config.config import Config
from qwench.config.sections.algorithm import AlgorithmConfig
from qwench.config.sections.checkpoint import CheckpointConfig
from qwench.config.sections.data import DataConfig
from qwench.config.sections.debug import DebugConfig
from qwench.config.sections.engine import EngineConfig
from qwench.config.sections.logging import LoggingConfig
from qwench.config.sections.reward import RewardConfig
from qwench.config.sections.rollout import RolloutConfig
from qwench.config.sections.training import TrainingConfig
from qwench.data.prompts import LoadedPrompts
from qwench.errors import ConfigError
from qwench.foreign.data_source import ForeignSource
from qwench.launch import build, outputs
from qwench.launch.inputs import Inputs
from qwench.observability.timing import PhaseTimer
from qwench.samples import Group, Prompt, Sample
from tests.unit.launch.test_build import PROMPTS
from tests.unit.launch.test_generation import eval_settings
from tests.unit.launch.test_placement import inputs_of


class Said(list[object]):
    """What was done, in order; and the parts that were made."""

    made: dict[str, object]


SIZE = {"rollout_batch_size": 4, "num_rollout": 2}
EVALUATED = [Prompt(text="z", token_ids=(1,))]
LOADED = LoadedPrompts(prompts=PROMPTS, num_dropped=0)


def of(**sections: object) -> Inputs:
    return inputs_of(Config(**{"rollout": RolloutConfig(**SIZE), **sections}))


class Part(SimpleNamespace):
    """Says when one of its methods is called, and with what."""

    def __init__(self, said: Said, name: str, **more: object) -> None:
        super().__init__(said=said, name=name, **more)

    def __getattr__(self, method: str) -> Callable[..., object]:
        if method.startswith("__"):
            raise AttributeError(method)
        return lambda *given, **options: (
            self.said.append((f"{self.name}.{method}", *given, *options.values())) or f"{method} made"
        )


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> Said:
    """Replace all that is started by parts that say what is done with them."""
    done = Said()
    rollouts = Part(done, "rollouts")

    def stream(*given: object, **options: object) -> Part:
        done.append(("generation.stream", *given, *options.values()))
        return rollouts

    made = done.made = {
        "_read_prompts": (LOADED, {"x": EVALUATED}),
        "run_identity": "identity",
        "check_ready": None,
        "_prompt_source": Part(done, "source", num_rollouts_per_epoch=lambda size: size + 1),
        "check_resumes": None,
        "start_report": Part(done, "report", samples="show samples"),
        "open_processes": "processes",
        "start_ranks": "ranks",
        "make_servers": (["server"], "token"),
        "start_beside": None,
        "build_generation": Part(done, "generation", engines="engines", stream=stream),
        "_gpus": Part(done, "gpus"),
        "take_turns": "turns",
        "start_learner": SimpleNamespace(state="state"),
        "make_publisher": Part(done, "publisher"),
        "metric_log": Part(done, "metrics", log="log"),
        "recorders": ["record"],
        "make_memory_probe": "memory probe",
        "GreedyProbe": "probe",
        "is_fp8_checkpoint": False,
        "finish_report": "finished",
    }
    for name, result in made.items():

        def act(*given: object, name: str = name, result: object = result, **options: object) -> object:
            done.append((name, *given, *([options] if options else [])))
            return result

        monkeypatch.setattr(build, name, act)
    made["rollouts"], started = rollouts, ExitStack()
    monkeypatch.setattr(
        build, "open_outputs", lambda inputs, timer, **options: done.append("outputs") or ("kept", "name", started)
    )
    return done


def names(said: Said) -> list[str]:
    return [one if isinstance(one, str) else one[0] for one in said]


def find(said: Said, name: str) -> tuple[object, ...]:
    [one] = [one for one in said if isinstance(one, tuple) and one[0] == name]
    return one[1:]


@pytest.mark.parametrize("sections", [{}, {"engine": EngineConfig(rollout_external_engine_addrs=("10.0.0.1:80",))}])
def test_a_run_is_built_from_its_prompts_to_its_learner_and_closed_backwards(
    sections: dict[str, object], said: Said, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = of(**sections)
    monkeypatch.setattr(build, "_begin", lambda config, plan: inputs if plan is inputs.plan else None)
    run = build.build(inputs.config, inputs.plan)
    assert names(said) == [
        "_read_prompts", "run_identity", "check_ready", "_prompt_source", "outputs", "check_resumes", "start_report",
        "open_processes", "start_ranks", "make_servers", "start_beside", "build_generation", "take_turns", "_gpus",
        "gpus.make_room", "start_learner", "make_publisher", "metric_log", "recorders", "generation.stream",
        "generation.evaluator", "generation.evaluations_beside", "make_memory_probe", "is_fp8_checkpoint",
    ]  # fmt: skip
    (ready, identity, prompts), source = find(said, "check_ready"), said.made["_prompt_source"]
    assert ready is inputs and identity == "identity" and prompts == {"prompts": (PROMPTS, EVALUATED)}
    planned = inputs.with_epochs_of(5)
    assert find(said, "check_resumes") == ("kept", source, {"num_rollout": 2})
    assert find(said, "start_report") == (planned, "8 prompts")
    started = find(said, "open_processes")[1]
    assert find(said, "open_processes")[0] == planned
    assert find(said, "start_ranks") == ("processes", started)
    assert find(said, "make_servers") == (planned, "processes", {"with_weights": False})
    beside = find(said, "start_beside")
    assert beside[:3] == (planned, ["server"], "ranks") and beside[4] is started
    options = {"with_weights": False, "servers": ["server"], "token": "token", "source": source}
    assert find(said, "build_generation") == (planned, options)
    assert find(said, "take_turns") == (inputs.config, "processes", ["server"])
    timer = beside[3]
    assert find(said, "_gpus") == (planned, "engines", timer, {"take_turns": "turns"})
    assert find(said, "start_learner") == (planned, "ranks", timer, beside[5])
    gpus, publisher = run.gpus, run.publisher
    assert (gpus, publisher, run.metrics) == tuple(said.made[name] for name in ("_gpus", "make_publisher", "metric_log"))
    assert find(said, "make_publisher") == (planned, "state", "engines", gpus, timer)
    assert find(said, "metric_log") == (planned, said.made["start_report"]) and find(said, "recorders") == (planned, "name")
    assert find(said, "generation.stream") == (source, 2, publisher, ["show samples", "record"], None)
    assert find(said, "generation.evaluator") == ({"x": EVALUATED},)
    assert find(said, "generation.evaluations_beside") == ("evaluator made", "log", publisher)
    probed, lengths = find(said, "make_memory_probe")
    assert (probed, list(lengths)) == (planned, [1] * 8)
    assert (run.plan, run.learner, run.rollouts) == (planned.plan, said.made["start_learner"], said.made["rollouts"])
    assert run.engines == "engines"
    assert (run.evaluate, run.beside, run.checkpoints) == (None, "evaluations_beside made", "kept")
    assert (run.timer, run.memory_probe, run.probe) == (timer, "memory probe", None)
    assert (run.finish.func, run.finish.args) == (build.finish_report, (said.made["start_report"], planned))
    assert "perf/engines_time" in timer.take()
    said.clear()
    beside[5].callback(said.append, "learner")
    run.close()
    forgotten = ["publisher.forget_adapters"] if sections else []
    assert names(said) == ["rollouts.close", "metrics.close", *forgotten, "learner", "generation.close"]


def test_finished_groups_are_scored_by_the_reference_at_the_temperature_of_the_run() -> None:
    external = EngineConfig(rollout_external_engine_addrs=("10.0.0.1:80",))
    inputs = of(engine=external, algorithm=AlgorithmConfig(use_kl_loss=True))
    generation = SimpleNamespace(stream=lambda source, *, early, **options: early)
    asked: list[object] = []
    learner = SimpleNamespace(log_probs=lambda samples, **options: asked.append(options) or [[-1.0] for _ in samples])
    early = build._stream(inputs, generation, "source", learner, waiter=None, observers=())
    samples = [Sample(prompt=Prompt(text="", token_ids=(1,)), sample_id=i, group_id=0) for i in range(2)]
    early.score([Group(group_id=0, samples=samples)])
    assert asked == [{"temperature": inputs.config.rollout.rollout_temperature, "model": "reference"}]
    assert [sample.ref_log_probs for sample in samples] == [[-1.0], [-1.0]]


def test_a_run_that_only_generates_has_no_learner(said: Said, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = of(debug=DebugConfig(debug_rollout_only=True))
    assert not inputs.plan.devices.trains
    monkeypatch.setattr(build, "_begin", lambda config, plan: inputs)
    monkeypatch.setattr(build, "is_fp8_checkpoint", lambda folder: folder == inputs.model_folder)
    monkeypatch.setattr(build, "make_servers", lambda *given, **options: said.append(options) or (None, None))
    evaluator = SimpleNamespace(evaluate=print)
    generation = SimpleNamespace(
        engines="engines", close=lambda: None, stream=lambda *given, **options: SimpleNamespace(close=lambda: None),
        evaluator=lambda prompts: evaluator, evaluations_beside=lambda *given: None,
    )  # fmt: skip
    monkeypatch.setattr(build, "build_generation", lambda inputs, **options: said.append(options) or generation)
    run = build.build(inputs.config, inputs.plan)
    unused = {"start_ranks", "start_learner", "make_publisher", "gpus.make_room", "make_memory_probe"}
    assert not unused & {one[0] for one in said if isinstance(one, tuple)}
    assert find(said, "start_beside")[1:3] == ((), None)
    assert [one["with_weights"] for one in said if isinstance(one, dict)] == [True, True]
    assert (run.learner, run.publisher, run.memory_probe, run.probe) == (None, None, None, "probe")
    assert (run.evaluate.func, run.evaluate.args, run.beside) == (print, ("engines", None), None)
    assert find(said, "GreedyProbe") == (PROMPTS,)
    run.close()


def test_a_learner_that_was_built_beside_the_engines_is_not_built_again(said: Said, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs, learner = of(), SimpleNamespace(state="its state")
    monkeypatch.setattr(build, "_begin", lambda config, plan: inputs)
    monkeypatch.setattr(build, "start_beside", lambda *given: learner)
    monkeypatch.setattr(build, "_read_prompts", lambda inputs: (LOADED, {}))
    run = build.build(inputs.config, inputs.plan)
    assert run.learner is learner and "start_learner" not in names(said)
    assert find(said, "make_publisher")[1] == "its state" and run.evaluate is None


@pytest.mark.parametrize(
    ("sections", "way"),
    [
        ({"algorithm": AlgorithmConfig(loss_type="sft_loss")}, "sft"),
        ({"debug": DebugConfig(load_debug_rollout_data="{rollout_id}.jsonl")}, "replay"),
    ],
)
def test_conversations_and_recorded_rollouts_are_runs_of_their_own(
    sections: dict[str, object], way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = of(**sections)
    monkeypatch.setattr(build, "_begin", lambda config, plan: inputs)
    monkeypatch.setattr(build, "_build_sft", lambda given: ("sft", given))
    monkeypatch.setattr(build, "_build_replay", lambda *given: ("replay", *given))
    assert build.build(inputs.config, inputs.plan) == (way, inputs, *([] if way == "sft" else ["{rollout_id}.jsonl"]))


@pytest.mark.parametrize("kind", ["prompts", "sft", "replay"])
def test_a_dry_run_checks_what_a_start_checks_and_writes_nothing(
    kind: str, said: Said, monkeypatch: pytest.MonkeyPatch
) -> None:
    sections = {
        "sft": {"algorithm": AlgorithmConfig(loss_type="sft_loss")},
        "replay": {"debug": DebugConfig(load_debug_rollout_data="{rollout_id}.jsonl")},
    }
    inputs, opened = of(**sections.get(kind, {})), []
    monkeypatch.setattr(build, "read_inputs", lambda config, plan: inputs if plan is inputs.plan else None)
    monkeypatch.setattr(build, "read_conversations", lambda given: ("loaded", "held out"))
    talks = SimpleNamespace(num_rollouts_per_epoch=lambda: 7)
    monkeypatch.setattr(build, "_conversations", lambda given, loaded: talks if loaded == "loaded" else None)
    monkeypatch.setattr(build, "check_recorded", lambda *given, num_rollout: said.append(("recorded", *given, num_rollout)))
    monkeypatch.setattr(build, "open_outputs", lambda given, timer, *, writes: opened.append((given, writes)) or ("kept", 0, 0))
    build.check(inputs.config, inputs.plan)
    epochs = {"prompts": 5, "sft": 7}
    planned = inputs.with_epochs_of(epochs[kind]) if kind in epochs else inputs
    prompts = (PROMPTS, EVALUATED) if kind == "prompts" else ()
    assert find(said, "check_ready") == (planned, "identity", {"prompts": prompts}) and opened == [(planned, False)]
    if kind == "replay":
        assert find(said, "recorded") == ("{rollout_id}.jsonl", 2) and "check_resumes" not in names(said)
    else:
        source = talks if kind == "sft" else said.made["_prompt_source"]
        assert find(said, "check_resumes") == ("kept", source, {"num_rollout": 2})


@pytest.mark.parametrize("brings", [False, True])
@pytest.mark.parametrize("custom", [None, "a.b"])
def test_prompts_are_read_after_functions_and_checked_against_rewards(
    brings: bool, custom: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = Said()
    for name in (
        "check_imports", "load_post_process", "load_target_functions", "load_user_terms", "load_hooks", "load_user_functions",
        "check_teachers", "check_prompts",
    ):  # fmt: skip
        monkeypatch.setattr(build, name, lambda *given, name=name, **options: done.append((name, *given, *options.values())))
    sets = (eval_settings(name="one"), eval_settings(name="two", custom_generate_function_path="c.d"))
    read = {one.name: SimpleNamespace(prompts=one.name) for one in sets}
    monkeypatch.setattr(build, "read_training_prompts", lambda inputs: LOADED)
    monkeypatch.setattr(build, "read_eval_prompts", lambda inputs: read)
    inputs = of(
        rollout=RolloutConfig(**SIZE, custom_generate_function_path=custom), reward=RewardConfig(rm_url="http://a:1"),
        data=DataConfig(disable_rollout_global_dataset=brings),
    )  # fmt: skip
    inputs = replace(inputs, plan=replace(inputs.plan, eval_sets=sets))
    config = inputs.config
    loaded, evaluated = build._read_prompts(inputs)
    prompts = [] if brings else PROMPTS
    assert (loaded.prompts, loaded.num_dropped, evaluated) == (prompts, 0, {"one": "one", "two": "two"})
    teachers, graded = (config.distillation, "http://a:1"), custom is not None
    assert done == [
        ("check_imports", config, sets),
        ("load_post_process", config, Namespace),
        ("load_target_functions", config, Namespace),
        ("load_user_terms", config, Namespace),
        ("load_hooks", config.foreign),
        ("load_user_functions", config),
        ("check_teachers", *teachers, prompts),
        ("check_prompts", inputs.training_reward, prompts, graded),
        ("check_teachers", *teachers, "one"),
        ("check_prompts", inputs.reward_of(sets[0]), "one", graded),
        ("check_teachers", *teachers, "two"),
        ("check_prompts", inputs.reward_of(sets[1]), "two", True),
    ]

    def refuse(reward: object, prompts: object, **options: object) -> None:
        if prompts == "two":
            raise ConfigError("no answers")

    monkeypatch.setattr(build, "check_prompts", refuse)
    with pytest.raises(ConfigError, match=r"^evaluation set two: no answers$"):
        build._read_prompts(inputs)


def test_prompts_come_from_the_users_class_from_nowhere_or_by_their_difficulty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "ForeignSource", lambda *given, **options: (given, options))
    monkeypatch.setattr(build, "make_args", lambda *given, **options: (given, options))
    rollout = RolloutConfig(**SIZE, n_samples_per_prompt=3)
    inputs = of(data=DataConfig(data_source_path="a.b"), rollout=rollout)
    args = ((inputs.config, inputs.plan), {"host": "", "port": 0})
    made = (("a.b", args), {"tokenizer": inputs.tokenizer, "n_samples_per_prompt": 3})
    assert build._prompt_source(inputs, LOADED) == made
    assert isinstance(build._prompt_source(of(data=DataConfig(disable_rollout_global_dataset=True)), LOADED), build.NoPrompts)
    monkeypatch.setattr(build, "Curriculum", lambda *given: ("curriculum", *given))
    monkeypatch.setattr(build, "PromptSource", lambda *given, **options: options)
    assert build._prompt_source(of(data=DataConfig()), LOADED)["curriculum"] is None


def test_a_source_of_the_user_goes_on_from_its_own_folder_and_a_shorter_run_is_said(
    caplog: pytest.LogCaptureFixture,
) -> None:
    resumed = Said()
    source = object.__new__(ForeignSource)
    source.resume_from = resumed.append
    lengths: list[int] = []
    saved = SimpleNamespace(
        folder=Path("run/iter_0000001"),
        rollouts={"source": [1]},
        check_length=lambda number: lengths.append(number) or "is done",
    )
    with caplog.at_level("INFO"):
        build.check_resumes(SimpleNamespace(saved=saved, foreign_run=None), source, num_rollout=2)
    assert (resumed, lengths) == ([Path("run")], [2]) and caplog.messages == ["is done"]


def outputs_of(folder: Path, *, rank: int = 0) -> Inputs:
    """Return the inputs of a run that writes checkpoints, logs and disagreements of graders below a folder."""
    config = Config(
        rollout=RolloutConfig(**SIZE, n_samples_per_prompt=2), training=TrainingConfig(num_steps_per_rollout=2),
        checkpoint=CheckpointConfig(save=folder / "save"), logging=LoggingConfig(log_dir=folder / "log"),
        reward=RewardConfig(rm_type="math", second_grader="math-verify"),
        data=DataConfig(chat_template_path=Path("chat.jinja"), apply_chat_template=True),
    )  # fmt: skip
    return replace(inputs_of(config), rank=rank, tokenizer=SimpleNamespace(chat_template="template"))


@pytest.mark.parametrize(("rank", "writes"), [(0, True), (0, False), (1, True)])
def test_the_main_rank_alone_checks_outputs_and_a_run_logs_once_they_are_checked(
    rank: int, writes: bool, tmp_path: Path
) -> None:
    outputs.open_outputs(outputs_of(tmp_path), PhaseTimer())[2].close()  # an earlier start
    log = tmp_path / "log" / "driver.log"
    log.unlink()
    inputs = outputs_of(tmp_path, rank=rank)
    for damaged in ("metrics.jsonl", "second_grader.jsonl"):
        (tmp_path / "log" / damaged).write_text("my notes\n")
        with nullcontext() if rank else pytest.raises(ConfigError, match=damaged):
            outputs.open_outputs(inputs, PhaseTimer(), writes=writes)
        assert not log.exists()
        (tmp_path / "log" / damaged).unlink()
    _, name, held = outputs.open_outputs(inputs, PhaseTimer(), writes=writes)
    held.close()
    assert (name, log.exists()) == ("" if rank else str(tmp_path / "save"), writes and not rank)


def test_checkpoints_have_the_steps_of_a_rollout_and_export_the_users_template(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    written: list[object] = []
    monkeypatch.setattr(outputs, "CheckpointManager", lambda *given, **options: options)
    monkeypatch.setattr(outputs, "write_hf_checkpoint", lambda *given, **options: written.append((*given, options)))
    for rank, writes in ((0, True), (0, False), (1, True)):
        inputs = outputs_of(tmp_path, rank=rank)
        made, _, held = outputs.open_outputs(inputs, PhaseTimer(), writes=writes)
        held.close()
        assert (made["is_main"], made["steps_per_rollout"]) == (writes and not rank, 2)
    made["write_hf"](Path("hf"), "buckets")
    assert written == [(Path("hf"), "buckets", {"source": inputs.model_folder, "chat_template": "template"})]


def test_a_start_is_logged_before_anything_is_built(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    done = Said()
    inputs = of()
    monkeypatch.setattr(build.transformers_logging, "disable_progress_bar", lambda: done.append("quiet"))
    monkeypatch.setattr(build, "read_inputs", lambda *given: done.append(given) or inputs)
    monkeypatch.setattr(build, "open_driver_log", lambda *given: done.append(given))
    assert build._begin(inputs.config, inputs.plan) is inputs
    assert done == ["quiet", (inputs.config, inputs.plan), (inputs.config.logging.log_level, inputs.console)]
