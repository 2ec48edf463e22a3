"""YAML files that never end, or whose aliases stand for more than memory holds."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from qwench.config.yaml_file import read_yaml_file


def test_aliases_of_settings_are_read(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("base: &base {lr: 1}\nother: {<<: *base, seed: 2}\nlist: &l [1, 2]\nagain: *l\n")
    read = read_yaml_file(tmp_path / "a.yaml")
    assert read["other"] == {"lr": 1, "seed": 2} and read["again"] == [1, 2]


@pytest.mark.parametrize(
    "text",
    [
        "a0: &a0 [x, x, x, x, x, x, x, x, x]\n"
        + "".join(f"a{k}: &a{k} [{', '.join([f'*a{k - 1}'] * 9)}]\n" for k in range(1, 12)),
        "a: &a [*a]\n",
        "&a [*a]\n",
    ],
    ids=["exponential", "circle", "circle of the whole"],
)
def test_aliases_without_measure_are_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(yaml.YAMLError, match="aliases stand for more than 100,000 values"):
        read_yaml_file(tmp_path / "a.yaml")


def test_what_aliases_stand_for_is_counted_with_lists_and_mappings(tmp_path: Path) -> None:
    base, aliases = f"[{', '.join('x' * 999)}]", ", ".join(["*b"] * 98)

    def write(num_more: int) -> Path:
        more = ", ".join("y" * num_more)
        (tmp_path / "a.yaml").write_text(f"base: &b {base}\nlist: [{aliases}]\nmore: [{more}]\n")
        return tmp_path / "a.yaml"

    # 1 (the file) + 1000 (base) + 1 + 98 * 1000 (list) + 1 + 997 (more)
    assert len(read_yaml_file(write(997))["more"]) == 997
    with pytest.raises(yaml.YAMLError, match="aliases stand for more than 100,000 values"):
        read_yaml_file(write(998))


def test_two_mappings_may_be_merged_and_a_key_is_a_word(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("a: &a {lr: 1}\nb: &b {seed: 2}\nboth: {<<: *a, <<: *b}\n")
    assert read_yaml_file(tmp_path / "a.yaml")["both"] == {"lr": 1, "seed": 2}
    (tmp_path / "a.yaml").write_text("? [lr]\n: 1\n")
    with pytest.raises(yaml.YAMLError, match="unhashable key"):
        read_yaml_file(tmp_path / "a.yaml")


def test_a_key_that_is_named_twice_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("lr: 1e-4\nseed: 1\nlr: 1e-5\n")
    with pytest.raises(yaml.YAMLError, match="it names lr twice"):
        read_yaml_file(tmp_path / "a.yaml")


def test_a_file_that_never_ends_is_refused() -> None:
    with pytest.raises(OSError, match="more than 64 MiB"):
        read_yaml_file(Path("/dev/zero"))
