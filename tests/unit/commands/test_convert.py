"""What `qwench convert` says when it has ended."""

from pathlib import Path

import pytest
from transformers import PretrainedConfig

from qwench.checkpoints.convert import Conversion, Converted
from qwench.commands.convert import _report
from tests.fakes.console import RecordingConsole


@pytest.mark.parametrize(("with_optimizer", "what"), [(True, "fsdp, with the optimizer's state"), (False, "fsdp")])
def test_the_report_has_format_size_speed_and_the_largest_peak(with_optimizer: bool, what: str) -> None:
    conversion = Conversion(source=Path("a"), output=Path("b"), to="fsdp", hf_folder=Path("hf"), config=PretrainedConfig())
    converted = Converted(num_tensors=7, nbytes=3 * 10**9, with_optimizer=with_optimizer)
    console = RecordingConsole()
    _report(console, conversion, converted, seconds=1.5, peaks=[4 * 10**9, 5 * 10**9])
    assert console.lines == [
        f"wrote b ({what}): 7 tensors, 3.00 GB in 1.5 s (2.00 GB/s); every tensor was read back and has the checksum it was "
        "written with; peak memory 5.00 GB per process"
    ]
