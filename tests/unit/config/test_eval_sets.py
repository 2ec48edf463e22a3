import pytest

from qwench.config.config import Config
from qwench.config.eval_sets import EvalSettings, eval_settings
from qwench.config.plan import plan_run
from qwench.config.sections.data import DataConfig
from qwench.config.sections.evaluation import EvalConfig
from qwench.config.sections.rollout import RolloutConfig
from qwench.errors import ConfigError
from tests.unit.config.architectures import QWEN3_4B

SETS = """
eval:
  defaults:
    n_samples_per_eval_prompt: 4
    temperature: 0.6
    stop: ["</s>"]
  datasets:
    - name: aime
      path: /d/aime.jsonl@[0:4]
      rm_type: deepscaler
      temperature: 0
      top_p: null
      stop_token_ids: [7, 8]
      metadata_overrides: {split: test}
    - name: gsm8k
      path: /d/gsm8k.jsonl
      label_key: answer
      n_samples_per_eval_prompt: 1
"""


@pytest.fixture
def write(tmp_path):
    def write(text):
        (tmp_path / "sets.yaml").write_text(text)
        return tmp_path / "sets.yaml"

    return write


def settings_of(path, **flags) -> dict[str, EvalSettings]:
    rollout = RolloutConfig(rollout_batch_size=1, rollout_max_response_len=9, rollout_stop=("x",))
    resolved = plan_run(Config(rollout=rollout, evaluation=EvalConfig(eval_config=path, **flags)), QWEN3_4B)
    return {one.name: one for one in resolved.eval_sets}


def test_a_value_of_the_set_wins_over_the_defaults_and_those_over_the_flags(write):
    sets = settings_of(write(SETS), eval_temperature=0.9, eval_label_key="label", eval_top_k=5, n_samples_per_eval_prompt=2)
    assert {name: (one.temperature, one.n_samples_per_eval_prompt) for name, one in sets.items()} == {
        "aime": (0.0, 4),
        "gsm8k": (0.6, 1),
    }
    assert {name: (one.label_key, one.top_k, one.max_response_len) for name, one in sets.items()} == {
        "aime": ("label", 5, 9),
        "gsm8k": ("answer", 5, 9),
    }
    assert {name: (one.stop, one.stop_token_ids) for name, one in sets.items()} == {
        "aime": (("</s>",), (7, 8)),
        "gsm8k": (("</s>",), ()),
    }


@pytest.mark.parametrize("own", [False, True])
def test_a_flag_of_evaluations_wins_over_that_of_rollouts(own):
    of_rollouts = {"temperature": 0.7, "top_p": 0.9, "top_k": 5, "min_new_tokens": 1, "max_response_len": 30}
    of_evaluations = {"temperature": 0.0, "top_p": 0.5, "top_k": 6, "min_new_tokens": 0, "max_response_len": 40}
    keys, of_data = {"input_key": "i", "label_key": "l", "tool_key": "t"}, {"input_key": "j", "label_key": "m", "tool_key": "u"}
    rollout = {
        f"rollout_{name}": value for name, value in (of_rollouts | {"max_context_len": 50, "stop_token_ids": (3,)}).items()
    }
    given = of_evaluations | {"max_context_len": 60, "max_prompt_len": 9} | keys if own else {}
    (one,) = eval_settings(
        EvalConfig(eval_prompt_data=("a", "a.jsonl"), **{f"eval_{name}": value for name, value in given.items()}),
        RolloutConfig(**rollout, rollout_stop=("x",)),
        DataConfig(**of_data, metadata_key="k"),
    )
    expected = given if own else of_rollouts | {"max_context_len": 50, "max_prompt_len": None} | of_data
    always = {"n_samples_per_eval_prompt": 1, "stop": ("x",), "stop_token_ids": (3,), "metadata_key": "k"}
    assert one == EvalSettings(name="a", path="a.jsonl", **expected, **always)


def test_further_keys_are_those_of_an_evaluation_function(write):
    path = write("eval: {judge: strict, datasets: [{name: a, path: x}]}")
    assert list(settings_of(path, eval_function_path="mine.evaluate")) == ["a"]
    with pytest.raises(ConfigError, match="eval has the unknown key 'judge'; known: defaults, datasets"):
        settings_of(path)


def test_the_reward_of_a_set_becomes_metadata_of_its_rows(write):
    sets = settings_of(write(SETS))
    assert sets["aime"].row_metadata == {"rm_type": "deepscaler", "split": "test"}
    assert sets["gsm8k"].row_metadata == {}


def test_a_set_may_name_its_functions_and_the_defaults_those_of_all_sets(write):
    sets = settings_of(
        write("""
        eval:
          defaults: {custom_rm_path: "mine.score"}
          datasets:
            - {name: a, path: x, custom_generate_function_path: "./tools.py:generate"}
            - {name: b, path: x, custom_rm_path: "other.score"}
        """)
    )
    assert {name: (one.custom_rm_path, one.custom_generate_function_path) for name, one in sets.items()} == {
        "a": ("mine.score", "./tools.py:generate"),
        "b": ("other.score", None),
    }


def test_sets_may_be_a_mapping_from_names(write):
    path = write("eval: {datasets: {a: {path: /d/a.jsonl}, b: {path: /d/b.jsonl, top_p: 0.5}}}")
    sets = settings_of(path)
    assert {name: (one.path, one.top_p) for name, one in sets.items()} == {"a": ("/d/a.jsonl", 1.0), "b": ("/d/b.jsonl", 0.5)}


def test_the_outer_mapping_may_be_left_out(write):
    path = write("datasets: [{name: a, path: /d/a.jsonl}]")
    assert list(settings_of(path)) == ["a"]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("evaluation: {}", "the file must be a mapping with the keys eval"),
        ("eval: {datasets: []}", "each under its own name (upper case is as lower case); got none"),
        ("eval: {sets: []}", "eval has the unknown key 'sets'; known: defaults, datasets"),
        ("eval: {datasets: 3}", "eval.datasets must be a list of sets, or map names to sets"),
        ("eval: {datasets: [{name: a}]}", "eval.datasets[0] has no path"),
        ("eval: {datasets: [{path: a}]}", "eval.datasets[0] has no name"),
        ("eval: {datasets: [{name: a, path: x}, {name: a, path: y}]}", "as lower case); got a a"),
        ("eval: {datasets: [{name: aime, path: x}, {name: AIME, path: y}]}", "as lower case); got aime AIME"),
        ("eval: {datasets: [{name: a, path: x, tempreture: 1}]}", "eval.datasets[0] has the unknown key 'tempreture'"),
        ("eval: {datasets: [{name: a, path: x, max_prompt_len: 1}]}", "datasets[0] has the unknown key 'max_prompt_len'"),
        (
            "eval: {datasets: [{name: a, path: x, max_context_len: 1}]}",
            "datasets[0] has the unknown key 'max_context_len'",
        ),
        ("eval: {defaults: {name: a}, datasets: []}", "eval.defaults has the unknown key 'name'"),
        ("eval: {datasets: [{name: a, path: x, top_k: many}]}", "eval.datasets[0] (a): top_k must be an integer, got 'many'"),
        (
            "eval: {datasets: [{name: a, path: x, top_p: 2}]}",
            "(a): top_p must be greater than 0 and at most 1, got 2",
        ),
        (
            "eval: {datasets: [{name: a, path: x, custom_rm_path: score}]}",
            "(a): custom_rm_path must be the import path of a function",
        ),
        ("eval: [", "sets.yaml is not YAML"),
        ("[" * 1000, "sets.yaml is not YAML"),
    ],
)
def test_a_mistake_names_the_flag_the_file_the_set_and_the_key(write, text, problem):
    path = write(text)
    with pytest.raises(ConfigError) as error:
        settings_of(path)
    assert str(error.value).startswith(f"--eval-config: {path}")
    assert problem in str(error.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"--eval-config: cannot read .*absent\.yaml"):
        settings_of(tmp_path / "absent.yaml")


@pytest.mark.parametrize(
    ("entry", "problem"),
    [
        ("n_samples_per_eval_prompt: 0", "n_samples_per_eval_prompt must be greater than 0, got 0"),
        ("max_response_len: 0", "max_response_len must be greater than 0, got 0"),
        ("temperature: -0.5", "temperature must not be negative, got -0.5"),
        ("min_new_tokens: -1", "min_new_tokens must not be negative, got -1"),
        ("top_p: 1.5", "top_p must be greater than 0 and at most 1"),
        ("top_p: 0.0", "top_p must be greater than 0 and at most 1"),
        ("top_k: 0", "top_k"),
        ("top_k: -2", "top_k"),
        ("custom_rm_path: score", "custom_rm_path must be the import path"),
        ("custom_generate_function_path: generate", "custom_generate_function_path must be the import path"),
    ],
)
def test_the_values_of_a_set_are_checked_as_flags_are(write, entry, problem):
    path = write(f"eval:\n  datasets:\n    - {{name: a, path: x, {entry}}}\n")
    with pytest.raises(ConfigError, match=problem):
        settings_of(path)


def test_sets_are_listed_in_one_place_only(tmp_path):
    with pytest.raises(ConfigError, match="--eval-prompt-data and --eval-config both list evaluation sets"):
        EvalConfig(eval_config=tmp_path / "sets.yaml", eval_prompt_data=("a", "x.jsonl"))
    assert EvalConfig(eval_config=tmp_path / "sets.yaml", eval_interval=2).has_sets


@pytest.mark.parametrize("name", ["", ".", "a b", "a/b", "a\nb", "a\n", "\U0001f600", "n" * 201], ids=repr)
def test_a_name_that_could_not_name_a_file_is_refused(name):
    with pytest.raises(ConfigError, match="an evaluation set's name is that of a file: at most 200 letters"):
        plan_run(
            Config(
                rollout=RolloutConfig(rollout_batch_size=1),
                evaluation=EvalConfig(eval_interval=1, eval_prompt_data=(name, "x.jsonl")),
            ),
            QWEN3_4B,
        )
