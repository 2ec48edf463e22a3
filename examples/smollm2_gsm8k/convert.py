"""Turn the GGUF of SmolLM2-135M-Instruct into a Hugging Face checkpoint: `python convert.py MODEL.gguf OUTPUT_DIR`.

The 4-bit weights are dequantised and stored in bfloat16. Needs the package gguf; runs on the CPU in half a minute.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

END_OF_TURN = "<|im_end|>"
NOT_THE_MODELS = ("quantization_config", "_name_or_path", "architectures")
"""Settings of the configuration that describe the file it came from."""


def load_model(gguf: Path) -> PreTrainedModel:
    """Return the dequantised model in bfloat16: a fresh one, since transformers does not save a model that was quantised."""
    source = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    settings = {name: value for name, value in source.config.to_dict().items() if name not in NOT_THE_MODELS}
    model = type(source)(type(source.config)(**settings, architectures=[type(source).__name__]))
    model.load_state_dict(source.state_dict())
    model.generation_config = source.generation_config
    model.config.dtype = torch.bfloat16
    return model.to(torch.bfloat16).eval()


def load_tokenizer(gguf: Path) -> PreTrainedTokenizerBase:
    """Return the tokenizer with the splitting of digits that SmolLM2 was trained with.

    GGUF only names the rule (tokenizer.ggml.pre = smollm), and transformers does not know the name: without the rule a blank
    line before a number would become other tokens than in pretraining.
    """
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    splitting = Sequence([Digits(individual_digits=True), ByteLevel(add_prefix_space=False, use_regex=True)])
    tokenizer.backend_tokenizer.pre_tokenizer = splitting
    return tokenizer


def end_turns(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Let tokenizer and model agree on what ends a response; how much of it is read from GGUF differs between versions."""
    tokenizer.eos_token = END_OF_TURN
    end = tokenizer.convert_tokens_to_ids(END_OF_TURN)
    model.config.eos_token_id = model.generation_config.eos_token_id = end


def check(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Check what training relies on: exact round trips, the end of a turn, and a sensible greedy answer."""
    text = "Add 48+24.\n\n12 is a dozen \u2013 \\boxed{72}."
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text, "the tokenizer does not round-trip"
    end = tokenizer.convert_tokens_to_ids(END_OF_TURN)
    assert tokenizer.eos_token_id == end, f"the end of a turn is {end}, the tokenizer ends with {tokenizer.eos_token_id}"
    question = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = model.generate(**prompt, max_new_tokens=32, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert answer[-1] == end and "Paris" in tokenizer.decode(answer), f"odd answer: {tokenizer.decode(answer)!r}"
    print(f"greedy answer: {tokenizer.decode(answer)!r}")


def main() -> None:
    """Convert, check, and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("gguf", type=Path)
    parser.add_argument("output", type=Path)
    arguments = parser.parse_args()
    model, tokenizer = load_model(arguments.gguf), load_tokenizer(arguments.gguf)
    end_turns(model, tokenizer)
    check(model, tokenizer)
    model.save_pretrained(arguments.output)
    tokenizer.save_pretrained(arguments.output)
    print(f"{model.num_parameters() / 1e6:.1f} M parameters in {arguments.output}")


if __name__ == "__main__":
    main()
