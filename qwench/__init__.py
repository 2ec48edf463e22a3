"""Post-train Qwen3 with reinforcement learning and supervised fine-tuning."""

__version__ = "0.2.0"
