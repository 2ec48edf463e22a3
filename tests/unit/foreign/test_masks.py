"""Slime's and miles' mask generator gives the tokens and masks of --loss-mask-type."""

from qwench.foreign.built_in import MultiTurnLossMaskGenerator
from qwench.models.built_tokenizers import build_small_tokenizer

TOKENIZER = build_small_tokenizer()
MESSAGES = [
    {"role": "user", "content": "q"},
    {"role": "assistant", "content": "a", "step_loss_mask": 0},
    {"role": "user", "content": "r"},
    {"role": "assistant", "content": "b"},
]
LAST = "<think>\n\n</think>\n\nb<|im_end|>\n"


def test_a_conversation_has_tokens_a_mask_and_the_length_of_its_response():
    generator = MultiTurnLossMaskGenerator(TOKENIZER, tokenizer_type="qwen3")
    tokens, mask = generator.get_loss_mask(MESSAGES)
    assert TOKENIZER.decode(tokens).startswith("<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n<think>")
    length = len(TOKENIZER(LAST, add_special_tokens=False)["input_ids"])
    assert mask == [0] * (len(tokens) - length) + [1] * length
    assert generator.get_response_lengths([mask, [0, 0], [0, 1, 0]]) == [length, 0, 2]
    assert generator.get_text_from_loss_mask(tokens, mask) == [LAST]
