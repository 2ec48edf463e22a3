"""Training data that a function of slime and miles makes of a rollout."""

from argparse import Namespace

import pytest

from qwench.errors import ConfigError, TrainingError
from qwench.foreign.conversion import conversion, load_conversion, read_rewards
from qwench.samples import Group, Prompt, Rollout, Sample, Status

ARGS = Namespace(n_samples_per_prompt=2)


def sample(sample_id: int, reward: float, tokens: tuple[int, ...] = (5, 6, 7)) -> Sample:
    made = Sample(prompt=Prompt(text="p", token_ids=(1, 2)), sample_id=sample_id, group_id=0, reward=reward)
    made.append(list(tokens), log_probs=[-0.5] * len(tokens), version=3)
    made.status = Status.COMPLETED
    return made


ROLLOUT = Rollout(
    rollout_id=4, groups=[Group(group_id=0, samples=[sample(8, 1.0), sample(9, 0.0, (5, 6))])], metrics={"a": 1.0}
)


def convert(function, rollout: Rollout = ROLLOUT) -> Rollout:
    return conversion(function, lambda: ARGS, as_text=True)(rollout)


def as_there(args, samples):
    """Convert like the built-in function of slime and miles, with rewards around their mean."""
    assert args is ARGS
    raw = [one.reward for one in samples]
    return {
        "tokens": [one.tokens for one in samples],
        "response_lengths": [one.response_length for one in samples],
        "rewards": [one - sum(raw) / len(raw) for one in raw],
        "raw_reward": raw,
        "truncated": [0] * len(samples),
        "sample_indices": [one.index for one in samples],
        "rollout_ids": [0, 1],
        "loss_masks": [[1] * one.response_length for one in samples],
        "rollout_mask_sums": [one.response_length for one in samples],
        "rollout_log_probs": [one.rollout_log_probs for one in samples],
    }


def test_its_rewards_are_learned_from_and_its_raw_ones_logged():
    made = convert(as_there)
    assert read_rewards(made.samples) == [0.5, -0.5]
    assert [one.reward for one in made.samples] == [1.0, 0.0]
    assert [one.tokens for one in made.samples] == [[1, 2, 5, 6, 7], [1, 2, 5, 6]]
    assert [one.rollout_log_probs for one in made.samples] == [[-0.5] * 3, [-0.5] * 2]
    assert [one.weight_versions for one in made.samples] == [[3] * 3, [3] * 2]
    assert (made.rollout_id, made.metrics) == (4, {"a": 1.0})
    assert ROLLOUT.samples[0].sample_id == 8 and "converted_reward" not in ROLLOUT.samples[0].metadata


def test_every_known_key_may_be_there_and_those_that_are_read_have_an_entry_for_each_sample():
    read = {
        "teacher_log_probs": lambda samples: [[-2.0] * one.response_length for one in samples],
        **{
            name: lambda samples, name=name: as_there(ARGS, samples)[name] for name in as_there(ARGS, []) if name != "truncated"
        },
    }
    of_logs = ("truncated", "total_lengths", "metadata", "round_number", "source_names", "prompt")

    def whole(args, samples):
        return {name: make(samples) for name, make in read.items()} | dict.fromkeys(of_logs, ())

    made = convert(whole)
    assert [one.teacher_log_probs for one in made.samples] == [[-2.0] * 3, [-2.0] * 2]
    for name in read:
        with pytest.raises(TrainingError, match=rf"returned (1 {name} for 2 samples|\d \w+ for 1 samples)\."):
            convert(lambda args, samples, name=name: (data := whole(args, samples)) | {name: data[name][:1]})


def test_tokens_of_unknown_versions_count_as_those_of_version_0():
    for versions, expected in (([-1, -1, -1], [0, 0, 0]), ([2, 0, -1], [2, 0, 0]), ([2, 5, -1], [2, 5, 2])):
        one = sample(8, 1.0)
        one.weight_versions = versions
        made = convert(as_there, Rollout(rollout_id=4, groups=[Group(group_id=0, samples=[one, sample(9, 0.0)])], metrics={}))
        assert [x.weight_versions for x in made.samples] == [expected, [3] * 3]


def test_without_indices_rows_are_the_samples_in_their_order_and_keep_their_metadata():
    one, other = sample(8, 1.0), sample(9, 0.0, (5, 6))
    one.metadata["level"] = 3
    made = convert(
        lambda args, samples: {name: column for name, column in as_there(args, samples).items() if name != "sample_indices"},
        Rollout(rollout_id=4, groups=[Group(group_id=0, samples=[one, other])]),
    )
    assert [x.metadata for x in made.samples] == [{"level": 3, "converted_reward": 0.5}, {"converted_reward": -0.5}]
    assert [x.tokens for x in made.samples] == [one.tokens, other.tokens]


def test_the_tokens_that_sampling_kept_stay_beside_a_response_of_the_same_length():
    kept = [sample(8, 1.0), sample(9, 0.0, (5, 6))]
    kept[0].support, kept[1].support = [[5], [6, 1], [7]], [[5, 2], [6]]
    rollout = Rollout(rollout_id=4, groups=[Group(group_id=0, samples=kept)])
    assert [one.support for one in convert(as_there, rollout).samples] == [[[5], [6, 1], [7]], [[5, 2], [6]]]
    first = {"tokens": [kept[0].tokens[:3], kept[1].tokens], "response_lengths": [1, 2], "loss_masks": [[1], [1, 1]]}
    cut = convert(
        lambda args, samples: as_there(args, samples) | first | {"rollout_log_probs": None, "rollout_mask_sums": [1, 2]},
        rollout,
    )
    assert [one.support for one in cut.samples] == [[], [[5, 2], [6]]]


def test_a_sample_may_become_several_of_one_execution():
    def split(args, samples):
        first, second = samples
        return {
            "tokens": [first.tokens[:3], first.tokens, second.tokens],
            "response_lengths": [1, 2, 2],
            "rewards": [2, 2, -1],
            "loss_masks": [[1], [0, 1], [1, 1]],
            "rollout_ids": [7, 7, 8],
            "rollout_mask_sums": [2, 2, 2],
            "sample_indices": [first.index, first.index, second.index],
        }

    made = convert(split).samples
    assert [one.execution_id for one in made] == [7, 7, 8]
    assert [one.loss_mask for one in made] == [[1], [0, 1], [1, 1]]
    assert [one.weight_versions for one in made] == [[3], [-1, 3], [3, 3]]
    assert read_rewards(made) == [2.0, 2.0, -1.0] == [one.reward for one in made]
    assert [one.rollout_log_probs for one in made] == [[0.0], [0.0, 0.0], [0.0, 0.0]]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"tokens": None}, "returned no tokens"),
        ({"rewards": [1.0]}, "returned 1 rewards for 2 samples"),
        ({"rollout_top_p_token_ids": [[1], [2]]}, "returned rollout_top_p_token_ids, which nothing here reads"),
        ({"sample_indices": [8, 10]}, "sample_indices with 10"),
        ({"loss_masks": [[1], [1, 1]]}, "row 0 has 5 tokens, a response of 3 and a loss mask of 1"),
        ({"rollout_log_probs": [[0.0], [0.0, 0.0]]}, "row 0 has 1 rollout_log_probs for a response of 3"),
        ({"rewards": [0.5, float("nan")]}, "row 1 has nan among its rewards; it must be finite"),
        ({"raw_reward": [float("inf"), 0.5]}, "row 0 has inf among its raw_reward; it must be finite"),
        ({"rollout_log_probs": [[0.0, float("-inf"), 0.0], [0.0, 0.0]]}, "row 0 has -inf among its rollout_log_probs"),
        ({"rollout_mask_sums": [3, 100]}, "rollout_mask_sums of row 1 is 100, and its rollout_id has 2 trained tokens"),
    ],
)
def test_data_that_cannot_be_learned_from_is_named(change, said):
    with pytest.raises(TrainingError, match=said):
        convert(lambda args, samples: as_there(args, samples) | change)


def test_another_number_of_samples_needs_their_indices():
    def first_only(args, samples):
        return {name: values[:1] for name, values in as_there(args, samples).items() if name != "sample_indices"}

    with pytest.raises(TrainingError, match="returned 1 samples of 2; sample_indices must say"):
        convert(first_only)
    with pytest.raises(TrainingError, match="must return a dict of lists, got 3"):
        convert(lambda args, samples: 3)


def test_a_function_is_loaded_by_its_path(tmp_path):
    (tmp_path / "mine.py").write_text("from tests.unit.foreign.test_conversion import as_there\ndef other(samples): ...\n")
    loaded = load_conversion(f"{tmp_path}/mine.py:as_there", lambda: ARGS, as_text=True)
    assert loaded is not None and read_rewards(loaded(ROLLOUT).samples) == [0.5, -0.5]
    with pytest.raises(ConfigError, match=r"mine.py:other' has the signature .* called as fn\(args, samples\)"):
        load_conversion(f"{tmp_path}/mine.py:other", lambda: ARGS, as_text=True)
    assert load_conversion(None, lambda: ARGS, as_text=True) is None
