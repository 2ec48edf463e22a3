"""Names and guards of AdamW, the same for every trainer."""

from __future__ import annotations

MASTER = "master_param"
"""Name of the float32 masters, in Megatron and in Transformer Engine."""
REST = "master_rest"
"""Name of what bfloat16 parameters lack of their masters; see `split_masters`."""
MOMENTS = ("exp_avg", "exp_avg_sq")
"""Names of the running averages, in torch and in Megatron."""
NORM_EPS = 1e-6
"""Megatron's and torch's guard in clip / (norm + eps)."""
