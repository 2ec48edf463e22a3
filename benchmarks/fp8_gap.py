"""The gap of FP8 rollouts by layer: how far log-probs move when one layer's products are computed in FP8.

    python benchmarks/fp8_gap.py --model FOLDER [--samples FILE] [--activations] [--tokens 2048] [--output FILE]

FOLDER holds the plain weights. FILE is a rollout of --save-debug-rollout-data that FP8 engines sampled from these weights at
temperature 1; without it the texts are random tokens. The embedded engine rounds matrices alone. With --activations the inputs
of each product are rounded too, as SGLang does: 128 values of a token by their largest.

Prints a Markdown table of mean absolute differences from the plain model: of each layer alone, of all layers, and of FILE's own
log-probs from the plain and from the rounded model. A layer's share is that of its squared differences: errors of layers are
independent, so that their squares add up. All is computed in float32. In bfloat16 the rounding of every product hides a layer.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import Linear, Module
from transformers import PreTrainedModel

from qwench.models.fp8 import BLOCK, FP8_DTYPE, LARGEST, dequantize, is_quantized_name, quantize
from qwench.models.hf import load_model

RANDOM_LENGTH = 256
SMALLEST = 1e-10
"""SGLang's lower bound of a group's largest value."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Text:
    """A prompt and its response."""

    tokens: Sequence[int]
    start: int
    """Place of the first token that is scored."""
    log_probs: Sequence[float] = ()
    """Of the engine, for the tokens from `start` on; empty for random texts."""


def read_texts(file: Path, *, num_tokens: int) -> list[Text]:
    """Return the first samples of a saved rollout, `num_tokens` in all or, where the first is longer, this one."""
    texts: list[Text] = []
    for line in file.read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        if "tokens" not in record:
            continue
        tokens = record["tokens"]
        if texts and sum(len(text.tokens) for text in texts) + len(tokens) > num_tokens:
            break
        texts.append(Text(tokens=tokens, start=len(tokens) - record["response_length"], log_probs=record["rollout_log_probs"]))
    if not texts:
        raise SystemExit(f"{file} has no samples; give a rollout of --save-debug-rollout-data")
    return texts


def random_texts(vocab_size: int, *, num_tokens: int) -> list[Text]:
    """Return texts of random tokens, all but the first of which are scored."""
    drawn = torch.randint(vocab_size, (num_tokens,), generator=torch.Generator().manual_seed(0))
    return [Text(tokens=part.tolist(), start=1) for part in drawn.split(RANDOM_LENGTH)]


@torch.no_grad()
def score(model: PreTrainedModel, texts: Iterable[Text]) -> Tensor:
    """Return the log-probs of all scored tokens, texts in order: [N] float32 on the host."""
    scores = []
    for text in texts:
        tokens = torch.tensor([text.tokens], device=model.device)
        logits = model(tokens).logits[0, text.start - 1 : -1]
        scores.append(logits.log_softmax(-1).gather(-1, tokens[0, text.start :, None]).squeeze(-1))
    return torch.cat(scores).cpu()


def rounded_activations(x: Tensor) -> Tensor:
    """Return values [..., n * 128] as e4m3 keeps them, each group of 128 scaled by its largest value / 448."""
    groups: Tensor = x.unflatten(-1, (-1, BLOCK))
    scale = groups.abs().amax(-1, keepdim=True).clamp_min(SMALLEST) / LARGEST
    return ((groups / scale).to(FP8_DTYPE).to(x.dtype) * scale).flatten(-2)


@contextmanager
def in_fp8(layer: Module, *, name: str, activations: bool) -> Iterator[None]:
    """Compute a layer's products from rounded matrices and, where asked for, rounded inputs, inside the block."""
    linears = [
        module
        for path, module in layer.named_modules()
        if isinstance(module, Linear) and is_quantized_name(f"{name}.{path}.weight")
    ]
    plain = [linear.weight.data for linear in linears]
    hooks = []
    for linear in linears:
        linear.weight.data = dequantize(*quantize(linear.weight.data), linear.weight.dtype)
        if activations:
            hooks.append(linear.register_forward_pre_hook(lambda _, inputs: (rounded_activations(inputs[0]),)))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for linear, weight in zip(linears, plain, strict=True):
            linear.weight.data = weight


def measure(model: PreTrainedModel, texts: Sequence[Text], *, activations: bool) -> dict[str, object]:
    """Return the mean absolute differences by what is rounded, and each layer's share of the squared ones."""
    layers = {f"model.layers.{index}": layer for index, layer in enumerate(model.get_submodule("model.layers").children())}
    exact = score(model, texts)
    moved = []
    for name, layer in layers.items():
        with in_fp8(layer, name=name, activations=activations):
            moved.append(score(model, texts) - exact)
    with ExitStack() as stack:
        for name, layer in layers.items():
            stack.enter_context(in_fp8(layer, name=name, activations=activations))
        rounded = score(model, texts)
    squares = torch.stack([one.square().mean() for one in moved])
    found: dict[str, object] = {
        "layers": [one.abs().mean().item() for one in moved],
        "shares": (squares / squares.sum()).tolist(),
        "all layers": (rounded - exact).abs().mean().item(),
    }
    sampled = torch.tensor([value for text in texts for value in text.log_probs])
    if len(sampled):
        found["engine, from the plain model"] = (sampled - exact).abs().mean().item()
        found["engine, from the rounded model"] = (sampled - rounded).abs().mean().item()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="folder of the plain weights")
    parser.add_argument("--samples", type=Path, help="a rollout of --save-debug-rollout-data")
    parser.add_argument("--activations", action="store_true", help="round the inputs of each product too, as SGLang does")
    parser.add_argument("--tokens", type=int, default=2048, help="scored with their prompts")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="where to compute")
    parser.add_argument("--output", type=Path, help="JSON file of the figures")
    given = parser.parse_args()
    texts = [] if given.samples is None else read_texts(given.samples, num_tokens=given.tokens)
    model = load_model(given.model, dtype=torch.float32).to(given.device)
    texts = texts or random_texts(model.config.vocab_size, num_tokens=given.tokens)
    found = measure(model, texts, activations=given.activations)
    layers, shares = found.pop("layers"), found.pop("shares")
    assert isinstance(layers, list) and isinstance(shares, list)
    print("| in FP8 | mean difference | share |\n| --- | --- | --- |")
    for index, (difference, share) in enumerate(zip(layers, shares, strict=True)):
        print(f"| layer {index} | {difference:.5f} | {share:.3f} |")
    for name, value in found.items():
        print(f"| {name} | {value:.5f} | |")
    if given.output is not None:
        given.output.write_text(json.dumps({"layers": layers, "shares": shares, **found}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
