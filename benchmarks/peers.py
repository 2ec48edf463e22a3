"""Peers of the embedded engine, on random weights: stock SGLang and transformers' generate.

    python benchmarks/engine.py --output FILE --peers sglang transformers

`engine.py` measures them; this file alone does nothing but print this text.
"""

from __future__ import annotations

import json
import random
import subprocess
import tempfile
import time
from collections.abc import Sequence
from functools import cache

import torch
from torch import nn
from transformers import PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

_SGLANG = """
import json, random, sys, time
import sglang
folder, new_tokens, rounds = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
if __name__ == "__main__":
    engine = sglang.Engine(
        model_path=folder, load_format="dummy", skip_tokenizer_init=True, dtype="bfloat16", attention_backend="fa3",
        grammar_backend="none", sampling_backend="pytorch", mem_fraction_static=0.8, cuda_graph_max_bs_decode=256,
        max_running_requests=256, context_length=8192, log_level="error", random_seed=1)
    source = random.Random(0)
    prompts = [p for p in [[source.randrange(151000) for _ in range(256)] for _ in range(32)] for _ in range(8)]
    def run(count):
        engine.flush_cache()
        time.sleep(0.3)
        start = time.time()
        engine.generate(input_ids=prompts, return_logprob=True,
                        sampling_params=dict(temperature=1.0, max_new_tokens=count, ignore_eos=True))
        return time.time() - start
    run(32)
    print("RATES", json.dumps([round(256 * new_tokens / run(new_tokens)) for _ in range(rounds)]), flush=True)
    engine.shutdown()
"""


def sglang_rate(config: Qwen3Config, new_tokens: int, *, python: str, rounds: int) -> object:
    """Return output tokens a second of stock SGLang's offline engine, in runs of 32 x 8 samples with log-probs.

    Args:
        python: The interpreter that has SGLang.
        rounds: Timed runs, after a short one.
    """
    with tempfile.TemporaryDirectory() as folder:
        config.architectures = ["Qwen3ForCausalLM"]
        config.save_pretrained(folder)
        script = f"{folder}/run.py"
        with open(script, "w") as file:  # noqa: PTH123
            file.write(_SGLANG)
        done = subprocess.run(
            [python, script, folder, str(new_tokens), str(rounds)], capture_output=True, text=True, check=False
        )
    rates = [line for line in done.stdout.splitlines() if line.startswith("RATES")]
    return json.loads(rates[0].removeprefix("RATES")) if rates else f"failed: {done.stderr[-1500:]}"


def transformers_rate(
    config: Qwen3Config, device: str, dtype: torch.dtype, prompts: Sequence[Sequence[int]], new_tokens: int
) -> float:
    """Return output tokens a second of `generate`: a static batch of equal lengths, sampled at temperature 1, SDPA."""
    model = _model(json.dumps(config.to_dict(), sort_keys=True), device, dtype)
    ids = torch.tensor(prompts, device=device)
    _synchronize(device)
    start = time.perf_counter()
    output = model.generate(  # type: ignore[operator]  # a method of a mixin
        ids, attention_mask=torch.ones_like(ids), do_sample=True, max_new_tokens=new_tokens, min_new_tokens=new_tokens,
        top_k=0, pad_token_id=0,
    )  # fmt: skip
    _synchronize(device)
    assert output.shape[1] == ids.shape[1] + new_tokens
    return len(prompts) * new_tokens / (time.perf_counter() - start)


@cache
def _model(config: str, device: str, dtype: torch.dtype) -> PreTrainedModel:
    torch.manual_seed(random.Random(0).randrange(1000))
    with torch.device(device):
        model: PreTrainedModel = Qwen3ForCausalLM(Qwen3Config(**json.loads(config)))
    nn.Module.to(model, dtype)  # that of transformers is not annotated
    model.eval()
    return model


def _synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    print(__doc__)
