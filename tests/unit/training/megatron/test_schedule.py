"""Learning rates and constants of AdamW against megatron-core's own."""

from types import SimpleNamespace

import pytest
from megatron.core.optimizer import OptimizerConfig as MegatronConfig
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from qwench.config.sections.optimizer import OptimizerConfig
from qwench.training.optimizers.schedule import LrSchedule

SAMPLES = 6
"""Of a step, by which Megatron counts."""


def megatrons_rates(section: OptimizerConfig, total_steps: int) -> list[float]:
    """Return the rates of a run, as slime and miles set Megatron's scheduler up."""
    decay = (section.lr_decay_iters or total_steps) * SAMPLES
    fraction = section.lr_warmup_fraction
    wsd = section.lr_wsd_decay_iters
    optimizer = SimpleNamespace(param_groups=[{}])
    scheduler = OptimizerParamScheduler(
        optimizer,
        init_lr=section.lr_warmup_init,
        max_lr=section.lr,
        min_lr=section.min_lr,
        lr_warmup_steps=section.lr_warmup_iters * SAMPLES if fraction is None else fraction * decay,
        lr_decay_steps=decay,
        lr_decay_style=section.lr_decay_style,
        start_wd=section.weight_decay,
        end_wd=section.weight_decay,
        wd_incr_steps=total_steps * SAMPLES,
        wd_incr_style="constant",
        wsd_decay_steps=None if wsd is None else wsd * SAMPLES,
        lr_wsd_decay_style=section.lr_wsd_decay_style,
    )
    rates = []
    for _ in range(total_steps):
        rates.append(optimizer.param_groups[0]["lr"])
        assert optimizer.param_groups[0]["weight_decay"] == section.weight_decay
        scheduler.step(SAMPLES)
    return rates


@pytest.mark.parametrize(
    "flags",
    [
        {"lr_decay_style": "constant"},
        {"lr_decay_style": "constant", "lr_warmup_iters": 3, "lr_warmup_init": 1e-7},
        {"lr_decay_style": "linear", "lr_warmup_fraction": 0.1, "min_lr": 1e-7},
        {"lr_decay_style": "cosine", "lr_warmup_fraction": 0.07, "min_lr": 1e-7},
        {"lr_decay_style": "cosine", "lr_warmup_iters": 2, "lr_decay_iters": 9},
        {"lr_decay_style": "inverse-square-root", "lr_warmup_iters": 4},
        {"lr_decay_style": "inverse-square-root", "lr_warmup_fraction": 0.15, "min_lr": 4e-7},
        *({"lr_decay_style": "WSD", "lr_wsd_decay_iters": 7, "lr_wsd_decay_style": style, "lr_warmup_fraction": 0.1}
          for style in ("exponential", "linear", "cosine", "minus_sqrt")),
    ],
)  # fmt: skip
def test_rates_of_a_run_are_megatrons(flags):
    section = OptimizerConfig(lr=1e-6, weight_decay=0.1, **flags)
    schedule = LrSchedule(section, total_steps=25)
    assert [schedule.at(step) for step in range(25)] == pytest.approx(megatrons_rates(section, 25), rel=1e-12)


def test_constants_are_megatrons():
    ours, theirs = OptimizerConfig(), MegatronConfig()
    names = ("weight_decay", "adam_beta1", "adam_beta2", "adam_eps")
    assert [getattr(ours, name) for name in names] == [getattr(theirs, name) for name in names]
    assert theirs.decoupled_weight_decay
