"""What `qwench serve` loads, and which adapters it takes."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from qwench.config.sections.engine import EngineConfig
from qwench.config.sections.model import ModelConfig
from qwench.config.sections.verbs import ServeConfig, ServerConfig
from qwench.engines.embedded.settings import EmbeddedSettings
from qwench.errors import CheckpointError, ConfigError
from qwench.launch import engines
from tests.unit.config.architectures import QWEN3_4B
from tests.unit.launch.test_engines import config_of
from tests.unit.launch.test_placement import inputs_of


def test_a_server_of_the_embedded_engine_has_the_flags_of_its_verb(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    served: list[object] = []
    monkeypatch.setattr(engines, "is_fp8_checkpoint", lambda folder: True)
    monkeypatch.setattr(engines, "serve_engine", lambda folder, settings, **options: served.extend([folder, settings, options]))
    monkeypatch.setattr(engines, "plan_inputs", lambda config, *, trains: (config, trains))
    monkeypatch.setattr(engines, "read_inputs", lambda config, plan: replace(inputs_of(config), model_folder=tmp_path))
    monkeypatch.setattr(engines, "check_weights", lambda *given: served.append(given[1:]))
    monkeypatch.setattr(engines, "_find_adapter", lambda name, folder, inputs: (name, folder))
    monkeypatch.setattr(engines, "open_process_log", lambda *given: served.append(given))
    monkeypatch.setenv("QWENCH_TOKEN", "secret")
    config = ServeConfig(
        model=ModelConfig(hf_checkpoint="model"), engine=EngineConfig(embedded_max_running_requests=7),
        server=ServerConfig(host="0.0.0.0", port=5, deterministic_mode=True, lora=("x=y",)),
    )  # fmt: skip
    engines.serve(config)
    check = served[-1].pop("check_base")
    assert (check.func, check.args[0].model_folder) == (engines._check_adapter_base, tmp_path)
    settings = EmbeddedSettings(
        sizes=replace(config.engine, embedded_max_running_requests=1), dtype=torch.float32, fp8=True, device="cpu", seed=42,
        inline=True, prefix_cache=False,
    )  # fmt: skip
    options = {"host": "0.0.0.0", "port": 5, "token": "secret", "adapters": {"x": ("x", Path("y"))}, "waits_for_weights": False}
    assert served == [(QWEN3_4B, tmp_path), ("info", "engine at port 5"), "model", settings, options]
    engines.serve(replace(config, server=ServerConfig(num_gpus=2, wait_for_weights=True)))
    assert served[-2].num_devices == 2 and not served[-2].inline and served[-1]["waits_for_weights"] is True


def test_a_served_adapter_is_checked_against_the_model_and_its_base(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    checked: list[object] = []
    monkeypatch.setattr(engines, "is_fp8_checkpoint", lambda folder: True)
    monkeypatch.setattr(engines, "find_checkpoint", lambda folder, *, flag: folder / flag)
    monkeypatch.setattr(
        engines, "AdapterFolder", lambda folder: SimpleNamespace(check_fits=lambda model: checked.append((folder, model)))
    )
    monkeypatch.setattr(engines, "check_base", lambda *given: checked.append(given))
    monkeypatch.setattr(engines, "open_weights", lambda *given: given)
    inputs, found = inputs_of(config_of()), Path("folder/--lora")
    assert engines._find_adapter("a", Path("folder"), inputs) == found
    assert checked == [(found, QWEN3_4B)], "an FP8 base cannot be told from another"
    monkeypatch.setattr(engines, "is_fp8_checkpoint", lambda folder: False)
    assert engines._find_adapter("a", Path("folder"), inputs) == found and not caplog.messages
    monkeypatch.setattr(engines, "frozen_form", {found: "nf4"}.get)
    engines._check_adapter_base(inputs, found)
    (said,) = caplog.messages
    assert said.startswith(f"{found} was trained beside a base that --lora-base rounded to nf4; the base served here is not")
    checked.pop()
    assert checked[1:] == [(found, QWEN3_4B), (found, inputs.model_folder, (inputs.model_folder, QWEN3_4B))]

    def refuse(*given: object) -> None:
        raise CheckpointError("damaged")

    monkeypatch.setattr(engines, "check_base", refuse)
    with pytest.raises(ConfigError, match=r"^--lora a=folder: damaged$"):
        engines._find_adapter("a", Path("folder"), inputs)
