"""On-policy distillation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

from qwench.config.limits import as_flag, check_not_negative
from qwench.errors import ConfigError

TopKStrategy = Literal["only-student", "only-teacher", "intersection", "union", "xor"]
WeightMode = Literal["student_p", "teacher_p", "none"]
DEFAULT_TEACHER = "default"
"""Name in --opd-teacher-urls of the teacher of rows that name no other."""
_OF_MEGATRON = ("opd_teacher_load", "opd_teacher_ckpt_step")
_OF_SGLANG = ("opd_teacher_urls", "opd_teacher_key", "opd_log_prob_top_k", *("opd_top_k_strategy", "opd_reward_weight_mode"))
_OF_TOP_K = ("opd_top_k_strategy", "opd_reward_weight_mode")


@dataclass(frozen=True, kw_only=True, slots=True)
class DistillationConfig:
    """On-policy distillation: a teacher scores what the policy samples, and the advantages follow the teacher."""

    use_opd: bool = False
    """Subtract --opd-kl-coef times (policy's - teacher's log-prob) from the advantage of every token."""
    opd_type: Literal["sglang", "megatron"] | None = None
    """Where the teacher scores. megatron: in the trainer, of either backend. sglang: on a server with SGLang's API, given by
    --rm-url or --opd-teacher-urls, during the rollout. Required with --use-opd."""
    opd_kl_coef: float = 1.0
    """Weight of the reverse KL to the teacher in the advantages. Needs --use-opd."""
    opd_teacher_load: Path | None = None
    """Checkpoint of the teacher, of the policy's architecture and any format. Required with --opd-type megatron."""
    opd_teacher_ckpt_step: int | None = None
    """Checkpoint of --opd-teacher-load to use. None: the newest."""
    opd_teacher_urls: tuple[str, ...] = ()
    """Several teachers, as NAME=URL. The teacher named default scores rows that name no other."""
    opd_teacher_key: str = "opd_teacher"
    """Entry of a row's metadata that names its teacher of --opd-teacher-urls."""
    opd_log_prob_top_k: int = 0
    """Compare this many of the likeliest tokens at each position instead of the sampled one. 0: the sampled one."""
    opd_top_k_strategy: TopKStrategy = "only-student"
    """Whose likeliest tokens --opd-log-prob-top-k compares: the policy's, the teacher's, those of both, of either, or of
    exactly one."""
    opd_reward_weight_mode: WeightMode = "student_p"
    """Weight of each compared token: the policy's probability, the teacher's, or equal weights."""

    def __post_init__(self) -> None:
        check_not_negative("--opd-kl-coef", self.opd_kl_coef)
        check_not_negative("--opd-log-prob-top-k", self.opd_log_prob_top_k)
        given = {item.name: as_flag(item.name) for item in fields(self) if getattr(self, item.name) != item.default}
        if not self.use_opd:
            for flag in given.values():
                raise ConfigError(f"{flag} has no effect without --use-opd; add it")
        self._check_type(given)
        if self.opd_log_prob_top_k == 0:
            for name in _OF_TOP_K:
                if name in given:
                    raise ConfigError(f"{given[name]} has no effect without --opd-log-prob-top-k; give it, or leave both out")
        self._check_urls()

    def _check_type(self, given: Mapping[str, str]) -> None:
        if self.use_opd and self.opd_type is None:
            raise ConfigError(
                "--use-opd needs a teacher; give --opd-type megatron and --opd-teacher-load, or --opd-type sglang and --rm-url"
            )
        if self.opd_type == "megatron" and self.opd_teacher_load is None:
            raise ConfigError("--opd-type megatron scores with a teacher in the trainer; give its --opd-teacher-load")
        for name in _OF_SGLANG if self.opd_type == "megatron" else _OF_MEGATRON:
            if name in given:
                raise ConfigError(f"{given[name]} has no effect with --opd-type {self.opd_type}; leave one of them out")

    def _check_urls(self) -> None:
        seen = set[str]()
        for entry in self.opd_teacher_urls:
            name, _, url = entry.partition("=")
            if not name or not url.startswith(("http://", "https://")):
                raise ConfigError(f"--opd-teacher-urls must be NAME=URL, with http:// or https://, got {entry!r}")
            if name in seen:
                raise ConfigError(f"--opd-teacher-urls names the teacher {name} twice; give each its own name")
            seen.add(name)

    @property
    def teacher_flag(self) -> str:
        """Return the flag that says where the teachers are."""
        return "--opd-teacher-urls" if self.opd_teacher_urls else "--rm-url"

    def teacher_urls(self, rm_url: str | None) -> dict[str, str]:
        """Return name -> URL of the teachers on servers; there are none with another --opd-type."""
        if self.opd_type != "sglang":
            return {}
        named = dict(entry.split("=", 1) for entry in self.opd_teacher_urls)
        return named or ({} if rm_url is None else {DEFAULT_TEACHER: rm_url})
