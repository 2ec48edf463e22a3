"""Which configurations the embedded engine accepts."""

from __future__ import annotations

import pytest
from transformers import Qwen3Config

from qwench.errors import ConfigError
from qwench.models.architecture import architecture_from_config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "gpt2"}, "model_type 'gpt2'"),
        ({"hidden_act": "gelu"}, "'gelu'"),
        ({"use_sliding_window": True}, "full attention"),
    ],
)
def test_models_the_forward_pass_would_not_reproduce_are_refused(change, message):
    config = Qwen3Config()
    for name, value in change.items():
        setattr(config, name, value)
    with pytest.raises(ConfigError, match=message):
        architecture_from_config(config)
