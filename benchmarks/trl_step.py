"""GRPO steps of TRL's GRPOTrainer on the load of `benchmarks/step.py`: the peer of a whole step.

    python benchmarks/trl_step.py --output FILE [--size 0.6B] [--rollouts 2] [--new-tokens 1024] [--engine paged]

32 prompts of 256 tokens x 8 samples, lengths forced, rewards at random, no reference model (beta 0). The model generates in
bfloat16 with `generate`, or with transformers' continuous batching (`--engine paged`). TRL trains float32 weights with
autocast, its default; `--bf16-weights` halves that. The first step warms up. Needs `pip install trl datasets`, also for --help.
"""

from __future__ import annotations

import argparse
import json
import random
import string
import tempfile
import time
from pathlib import Path

import torch
from datasets import Dataset
from datasets.table import InMemoryTable
from step import PROMPT_TOKENS, SAMPLES
from train import make_model
from transformers import TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from qwench.models.built_tokenizers import build_small_tokenizer


class Clock(TrainerCallback):
    """Notes when each step ended."""

    def __init__(self) -> None:
        self.times: list[float] = [time.perf_counter()]

    def on_step_end(self, *_args: object, **_named: object) -> None:
        """Note the time, with the device's work done."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.times.append(time.perf_counter())


def random_reward(completions: list[str], **_columns: object) -> list[float]:
    """Return 0 or 1 for each completion."""
    return [float(random.random() < 0.5) for _ in completions]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="JSON file of the results")
    parser.add_argument("--size", default="0.6B", help="name of a size (qwench.models.random_qwen3)")
    parser.add_argument("--rollouts", type=int, default=2, help="steps; the first one warms up")
    parser.add_argument("--prompts", type=int, default=32, help="prompts of a step")
    parser.add_argument("--new-tokens", type=int, default=1024, help="length of a response")
    parser.add_argument("--per-device", type=int, default=8, help="sequences of a micro-batch")
    parser.add_argument(
        "--engine",
        choices=["generate", "paged"],
        default="generate",
        help="what generates: generate, or transformers' continuous batching (paged)",
    )
    parser.add_argument("--bf16-weights", action="store_true", help="train bfloat16 weights without autocast")
    given = parser.parse_args()
    cuda = torch.cuda.is_available()
    count = given.prompts * SAMPLES
    draw = random.Random(0)
    rows = [{"prompt": "".join(draw.choices(string.ascii_lowercase, k=PROMPT_TOKENS))} for _ in range(given.prompts)]
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as folder:
        make_model(Path(folder), given.size, torch.device("cuda:0" if cuda else "cpu"))
        build_small_tokenizer().save_pretrained(folder)
        if cuda:
            torch.cuda.empty_cache()
        clock = Clock()
        trainer = GRPOTrainer(
            model=folder,
            reward_funcs=random_reward,
            # datasets 5.2 cannot pickle a table of pyarrow 26 to derive the fingerprint
            train_dataset=Dataset(InMemoryTable.from_pylist(rows * given.rollouts), fingerprint="prompts"),
            callbacks=[clock],
            args=GRPOConfig(
                output_dir=f"{folder}/out", per_device_train_batch_size=given.per_device, num_generations=SAMPLES,
                gradient_accumulation_steps=count // given.per_device, generation_batch_size=count,
                max_steps=given.rollouts, max_completion_length=given.new_tokens, beta=0.0, temperature=1.0,
                generation_kwargs={"min_new_tokens": given.new_tokens}, bf16=cuda, gradient_checkpointing=False,
                learning_rate=1e-6, report_to=[], save_strategy="no", logging_steps=1, disable_tqdm=True, use_cpu=not cuda,
                model_init_kwargs={"dtype": "bfloat16" if given.bf16_weights else "float32"},
                **({"use_transformers_continuous_batching": True} if given.engine == "paged" else {}),
            ),
        )  # fmt: skip
        clock.times = [time.perf_counter()]
        trainer.train()
    steps = [end - start for start, end in zip(clock.times, clock.times[1:], strict=False)]
    result = {
        "size": given.size,
        "engine": given.engine,
        "steps s": steps,
        "samples/s": count / min(steps[1:] or steps),
        "peak GiB": torch.cuda.max_memory_allocated() / 2**30 if cuda else None,
        "log": [{k: v for k, v in line.items() if "length" in k or "loss" in k} for line in trainer.state.log_history[-2:]],
    }
    print(json.dumps(result), flush=True)
    given.output.write_text(json.dumps(result, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
