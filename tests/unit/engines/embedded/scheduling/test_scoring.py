"""What a request may want scored."""

from __future__ import annotations

import pytest

from qwench.engines.embedded.scheduling.scoring import check_scoring
from qwench.engines.protocol import Scoring
from qwench.errors import EngineError


def test_more_named_tokens_than_can_be_scored_are_refused() -> None:
    check_scoring(Scoring(start=1, token_ids=(7,) * 1024), [5, 6], vocab_size=8, name="one")
    with pytest.raises(EngineError, match="one wants log-probs of 1025 token ids; at most 1024 are scored"):
        check_scoring(Scoring(start=1, token_ids=(7,) * 1025), [5, 6], vocab_size=8, name="one")
