from collections.abc import Iterator

import pytest
import torch

from qwench.training.process_group import init_process_group, leave_process_group
from tests.deadlines import patient


@pytest.fixture(scope="module")
def process_group() -> Iterator[None]:
    """The group of one rank on a CPU."""
    init_process_group(torch.device("cpu"), environ={}, timeout_s=patient(60))
    yield
    leave_process_group()
