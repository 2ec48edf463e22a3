"""Labels of rows: what is read, and what no answer could match."""

import pytest

from qwench.errors import ConfigError
from tests.unit.data.test_prompts import load, load_one


@pytest.mark.parametrize(
    ("label", "problem"),
    [
        (["7"], r"must be a string or a number, got \[\"7\"\]"),
        (["x" * 56], rf"must be a string or a number, got \[\"{'x' * 56}\"\];"),
        (["x" * 57], rf"must be a string or a number, got \[\"{'x' * 55}\.\.\.;"),
        ({"ground_truth": "7"}, "must be a string or a number"),
        (True, "must be a string or a number, got true"),
        (" \t", "is blank"),
        ("", "is blank"),
        ("\\boxed{7", "has a box that does not end"),
        (float("nan"), "is nan: no answer can match it"),
        (float("inf"), "is inf: no answer can match it"),
        (None, "is null"),
        ("\u200b", "is blank"),
        ("####", "is blank"),
        ("2+5=7\n#### \n", "is blank"),
        ("\\boxed{}", "is blank"),
        ("\\text{ }", "is blank"),
        ("$$", "is blank"),
        ("\\[ \\]", "is blank"),
        ("{}", "is blank"),
        ("nan", "is nan: no answer can match it"),
        (" NaN", "is NaN: no answer can match it"),
    ],
)
def test_a_label_that_no_answer_can_match_is_refused_by_line(tmp_path, label, problem):
    rows = [{"prompt": "a", "label": "1"}, {"prompt": "b", "label": label}]
    with pytest.raises(ConfigError, match=rf"data\.jsonl:2: key 'label' \(--label-key\) {problem}"):
        load(tmp_path, rows, label_key="label", require_label=True)


def test_a_missing_number_of_parquet_and_one_beyond_floats_are_no_labels(tmp_path):
    rows = [{"prompt": "a", "label": 1.0}, {"prompt": "b", "label": float("nan")}]
    with pytest.raises(ConfigError, match=r"data\.parquet row 2: key 'label' \(--label-key\) is nan: no answer can match it"):
        load(tmp_path, rows, label_key="label", require_label=True, parquet=True)
    raw = tmp_path / "raw.jsonl"
    raw.write_text('{"prompt": "a", "label": 1}\n{"prompt": "b", "label": 1e400}\n')
    with pytest.raises(ConfigError, match=r"raw\.jsonl:2: key 'label' \(--label-key\) is inf: no answer can match it"):
        load(tmp_path, [], label_key="label", require_label=True, path=raw)


@pytest.mark.parametrize("required", [True, False])
@pytest.mark.parametrize(
    ("number", "text"),
    [
        ("1e20", "1" + 20 * "0"),
        ("-25e17", "-25" + 17 * "0"),
        ("1e-7", "0.0000001"),
        ("1.50", "1.5"),
        ("3", "3"),
        ("2.0", "2.0"),
    ],
)
def test_a_number_as_label_is_text_without_an_exponent(tmp_path, number, text, required):
    raw = tmp_path / "raw.jsonl"
    raw.write_text(f'{{"prompt": "a", "label": {number}}}\n')
    (prompt,) = load(tmp_path, [], label_key="label", require_label=required, path=raw).prompts
    assert prompt.label == text


@pytest.mark.parametrize(
    ("label", "read"),
    [
        ("2+5=7\n#### 7", "7"),
        ("#### 1,000", "1,000"),
        ("a #### 1\n#### -2", "-2"),
        ("{1}", "{1}"),
        ("{1", "{1"),
        ("\\boxed{1}", "\\boxed{1}"),
        ("None", "None"),
    ],
)
def test_the_answer_of_gsm8ks_solutions_is_read(tmp_path, label, read):
    assert load_one(tmp_path, {"prompt": "a", "label": label}, label_key="label", require_label=True).label == read


def test_a_custom_reward_gets_any_label(tmp_path):
    rows = [{"prompt": "a", "label": {"x": ["é"]}}, {"prompt": "b", "label": " "}, {"prompt": "c", "label": "#### 7"}]
    labels = [prompt.label for prompt in load(tmp_path, rows, label_key="label").prompts]
    assert labels == ['{"x": ["é"]}', " ", "#### 7"]


def test_a_list_column_of_parquet_is_no_label(tmp_path):
    with pytest.raises(ConfigError, match=r'data\.parquet row 1: key .label. .* must be a string or a number, got \["é"\]'):
        load(tmp_path, [{"prompt": "x", "label": ["é"]}], label_key="label", require_label=True, parquet=True)
