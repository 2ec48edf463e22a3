"""Data sources of slime's and miles' convention hand out the prompts of a run."""

import json
from argparse import Namespace
from pathlib import Path

import pytest

from qwench.data.prompts import PromptSource, load_prompts
from qwench.errors import CheckpointError, ConfigError, QwenchError
from qwench.foreign.data_source import ForeignSource, check_data_source
from qwench.foreign.sample import Sample
from qwench.foreign.stand_in_sources import DataSource, RolloutDataSource, RolloutDataSourceWithBuffer
from qwench.models.built_tokenizers import build_small_tokenizer

HERE = "tests.unit.foreign.test_data_source"
TOKENIZER = build_small_tokenizer()


class Countdown:
    """Gives the numbers from 100 downwards; notes what it is asked to save and load."""

    def __init__(self, args):
        self.args, self.left, self.calls = args, 100, []

    def get_samples(self, num_samples):
        groups = []
        for _ in range(num_samples):
            groups.append([Sample(prompt=str(self.left), label="even", metadata={"turn": self.left}) for _ in range(2)])
            self.left -= 1
        return groups

    def add_samples(self, groups):
        raise AssertionError("the run keeps its own buffer")

    def save(self, rollout_id):
        self.calls.append(("save", rollout_id, self.left))

    def load(self, rollout_id=None):
        self.calls.append(("load", rollout_id, self.args.load))
        self.left = 90

    def __len__(self):
        return 10


class Short(Countdown):
    def get_samples(self, num_samples):
        return super().get_samples(num_samples)[1:]


class NoLength:
    def __init__(self, args): ...
    def get_samples(self, num_samples): ...
    def add_samples(self, groups): ...
    def load(self, rollout_id): ...


def a_function(args):
    """Be no class."""


def make(name: str = "Countdown", **args) -> ForeignSource:
    given = Namespace(**{"load": None, "save": "/out", **args})
    return ForeignSource(f"{HERE}.{name}", given, tokenizer=TOKENIZER, n_samples_per_prompt=2)


def test_groups_are_tokenised_and_numbered_by_the_run():
    source = make()
    groups = source.next_groups(2) + source.next_groups(0) + source.next_groups(1)
    assert [group.group_id for group in groups] == [0, 1, 2]
    samples = [sample for group in groups for sample in group.samples]
    assert [(sample.sample_id, sample.execution_id, sample.group_id) for sample in samples] == [
        (0, 0, 0), (1, 1, 0), (2, 2, 1), (3, 3, 1), (4, 4, 2), (5, 5, 2),
    ]  # fmt: skip
    assert [sample.prompt.text for sample in samples] == ["100", "100", "99", "99", "98", "98"]
    assert samples[2].tokens == TOKENIZER("99")["input_ids"] and samples[2].response_length == 0
    assert (samples[2].prompt.label, samples[2].metadata) == ("even", {"turn": 99})
    assert (source.num_rollouts_per_epoch(4), source.num_rollouts_per_epoch(400)) == (2, 1)


def test_save_and_load_of_the_source_follow_the_checkpoints():
    source = make()
    source.next_groups(3)
    assert source.state_dict() == {"saved_by_source": None, "num_groups": 3, "num_samples": 6}
    state = json.loads(json.dumps(source.state_dict(last_rollout_id=4)))
    assert source.source.calls == [("save", 4, 97)]
    again = make(load="/before")
    again.resume_from(Path("/out"))
    again.load_state_dict(state)
    assert again.source.calls == [("load", 4, "/out")]
    assert [group.group_id for group in again.next_groups(1)] == [3]
    again.state_dict()
    assert again.source.calls[1] == ("save", 4, 89)
    with pytest.raises(CheckpointError, match="is of a run without --data-source-path"):
        again.load_state_dict({"num_rows": 3})


def test_what_is_no_data_source_is_refused():
    with pytest.raises(QwenchError, match=r"--data-source-path gave 1 groups of \[2\] samples for 2 groups of 2"):
        make("Short").next_groups(2)
    for name, said in (("NoLength", "has no save, __len__"), ("a_function", "is no class")):
        with pytest.raises(ConfigError, match=said):
            check_data_source(f"{HERE}.{name}")


@pytest.fixture
def args(tmp_path: Path) -> Namespace:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"input": f"row {number}", "label": str(number)}) + "\n" for number in range(5)))
    model = tmp_path / "model"
    TOKENIZER.save_pretrained(model)
    columns = {"input_key": "input", "label_key": "label", "metadata_key": "metadata", "tool_key": "tools"}
    chat = {
        "apply_chat_template": False,
        "chat_template_path": None,
        "apply_chat_template_kwargs": None,
        "rollout_max_prompt_len": None,
    }
    order = {"rollout_global_dataset": True, "rollout_shuffle": True, "rollout_seed": 7, "n_samples_per_prompt": 2}
    places = {"save": str(tmp_path / "out"), "load": str(tmp_path / "out"), "hf_checkpoint": str(model)}
    return Namespace(prompt_data=str(rows), **columns, **chat, **order, **places)


def test_a_class_needs_the_four_methods_of_the_references_base_and_no_length():
    methods = {name: lambda *_: None for name in ("get_samples", "add_samples", "save", "load")}
    type("Mine", (DataSource,), methods)()
    for left_out in methods:
        with pytest.raises(TypeError, match=left_out):
            type("Mine", (DataSource,), {name: method for name, method in methods.items() if name != left_out})()


def test_the_references_own_source_has_the_order_of_the_runs(args):
    loaded = load_prompts(
        args.prompt_data, input_key="input", label_key="label", metadata_key=None, tool_key=None, tokenizer=TOKENIZER,
        apply_chat_template=False, apply_chat_template_kwargs=None, max_prompt_len=None,
    )  # fmt: skip
    ours = PromptSource(loaded.prompts, n_samples_per_prompt=2, shuffle=True, seed=7).next_groups(8)
    source = RolloutDataSource(args)
    theirs = source.get_samples(3) + source.get_samples(5)
    assert [group[0].prompt for group in theirs] == [group.samples[0].prompt.text for group in ours]
    assert [group[1].index for group in theirs] == [group.samples[1].sample_id for group in ours]
    assert [[one.group_index for one in group] for group in theirs] == [[number] * 2 for number in range(8)]
    assert len(source) == 5 and [group[0].label for group in theirs[:5]] != ["0", "1", "2", "3", "4"]


@pytest.mark.parametrize("templated", [False, True])
def test_a_prompt_is_handed_on_as_it_was_given_or_rendered_by_the_template(args, templated):
    rows = [{"input": [{"role": "user", "content": "hi"}], "label": "1", "metadata": {"level": 3}}]
    rows += [] if templated else [{"input": {"free": [1]}, "label": "2"}]
    Path(args.prompt_data).write_text("".join(json.dumps(row) + "\n" for row in rows))
    args.apply_chat_template, args.rollout_shuffle = templated, False
    groups = RolloutDataSource(args).get_samples(len(rows))
    rendered = TOKENIZER.apply_chat_template(rows[0]["input"], tokenize=False, add_generation_prompt=True)
    assert [group[0].prompt for group in groups] == ([rendered] if templated else [row["input"] for row in rows])
    assert [(group[0].label, group[0].metadata) for group in groups] == [("1", {"level": 3}), ("2", {})][: len(rows)]


@pytest.mark.parametrize("num_groups", [3, 7], ids=["first epoch", "second epoch"])
def test_the_references_own_source_goes_on_where_it_was_saved(args, num_groups: int):
    source = RolloutDataSourceWithBuffer(args)
    first = source.get_samples(num_groups)
    source.add_samples(first[:1])
    source.save(2)
    expected = source.get_samples(4)
    assert expected[0] is first[0]
    again = RolloutDataSourceWithBuffer(args)
    again.load(2)
    assert [group[0].prompt for group in again.get_samples(3)] == [group[0].prompt for group in expected[1:]]


def test_groups_that_are_given_back_are_counted_and_what_is_noted_is_found(args):
    source = RolloutDataSourceWithBuffer(args)
    first = source.get_samples(2)
    source.add_samples(first)
    source.update_metadata({"a": 1})
    source.update_metadata({"b": 2})
    assert (source.get_buffer_length(), source.get_metadata()) == (2, {"a": 1, "b": 2})
    assert source.get_samples(1) == first[:1] and source.get_buffer_length() == 1
    with pytest.raises(RuntimeError, match="RolloutDataSource takes no samples; extend RolloutDataSourceWithBuffer"):
        RolloutDataSource(args).add_samples(first)


def test_a_source_without_a_place_or_a_data_set_of_its_own_keeps_no_position(args, tmp_path):
    args.load = None
    RolloutDataSource(args).load(2)
    args.rollout_global_dataset, args.load = False, str(tmp_path)
    source = RolloutDataSource(args)
    source.save(2)
    source.load(2)
    assert len(source) == 0 and not Path(args.save).exists()
    assert [one.prompt for (one, _) in source.get_samples(1)] == [""]


def test_a_run_without_the_state_of_its_source_does_not_begin_the_data_anew(args, tmp_path):
    source = RolloutDataSource(args)
    source.get_samples(3)
    for rollout_id in (1, 2):
        source.save(rollout_id)
    args.load = str(tmp_path / "moved")
    with pytest.raises(CheckpointError, match=r"moved/rollout/global_dataset_state_dict_2.pt, the position of .* is missing"):
        RolloutDataSource(args).load(2)
