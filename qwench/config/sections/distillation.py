"""On-policy distillation."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from qwench.config.limits import check_not_negative
from qwench.errors import ConfigError

_KL_COEF = 1.0


@dataclass(frozen=True, kw_only=True, slots=True)
class DistillationConfig:
    """On-policy distillation: a teacher scores what the policy samples, and the advantages follow the teacher."""

    use_opd: bool = False
    """Subtract --opd-kl-coef times (policy's - teacher's log-prob) from the advantage of every token."""
    opd_type: Literal["megatron"] | None = None
    """Where the teacher scores. megatron: in the trainer, of either backend. Required with --use-opd."""
    opd_kl_coef: float = _KL_COEF
    """Weight of the reverse KL to the teacher in the advantages. Needs --use-opd."""
    opd_teacher_load: Path | None = None
    """Checkpoint of the teacher, of the policy's architecture and any format. Required with --use-opd."""
    opd_teacher_ckpt_step: int | None = None
    """Checkpoint of --opd-teacher-load to use. None: the newest."""

    def __post_init__(self) -> None:
        check_not_negative("--opd-kl-coef", self.opd_kl_coef)
        given = {
            "--opd-type": self.opd_type is not None,
            "--opd-kl-coef": self.opd_kl_coef != _KL_COEF,
            "--opd-teacher-load": self.opd_teacher_load is not None,
            "--opd-teacher-ckpt-step": self.opd_teacher_ckpt_step is not None,
        }
        for flag, is_given in given.items():
            if is_given and not self.use_opd:
                raise ConfigError(f"{flag} has no effect without --use-opd; add it")
        if missing := [flag for flag in ("--opd-type", "--opd-teacher-load") if self.use_opd and not given[flag]]:
            raise ConfigError(
                f"--use-opd needs a teacher; give {' and '.join(missing)} (--opd-type megatron scores in the trainer)"
            )
