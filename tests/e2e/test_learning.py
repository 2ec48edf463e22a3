"""Models learn: fine-tuning lowers the loss, reinforcement raises the reward, and every part agrees on the numbers."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.e2e.conftest import DIGITS, Workspace, column
from tests.verbs import run_verb

SFT_STEPS = 20
BATCH = 8
RL_ROLLOUTS = 12


@dataclass(frozen=True)
class Run:
    """What a finished run left."""

    save: Path
    exports: str
    """Path of the Hugging Face folders, with {rollout_id}."""
    recorded: str = ""
    """Path of the recorded rollouts, with {rollout_id}."""

    def export(self, rollout_id: int) -> Path:
        """Return the model that learned up to and including a rollout."""
        return Path(self.exports.format(rollout_id=rollout_id))


@pytest.fixture(scope="module")
def tuned(workspace: Workspace, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Fine-tune for some steps and, after an export, one more."""
    folder = tmp_path_factory.mktemp("tuned")
    run = Run(folder / "run", str(folder / "hf_{rollout_id}"))
    run_verb(workspace.sft_argv(run.save, num_rollout=SFT_STEPS + 1, save_interval=SFT_STEPS, save_hf=run.exports))
    return run


@pytest.fixture(scope="module")
def reinforced(workspace: Workspace, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Reward digits for some rollouts, and record them."""
    folder = tmp_path_factory.mktemp("reinforced")
    run = Run(folder / "run", str(folder / "hf_{rollout_id}"), str(folder / "rollout_{rollout_id}.jsonl"))
    flags = {"save_interval": RL_ROLLOUTS - 1, "save_hf": run.exports, "save_debug_rollout_data": run.recorded}
    run_verb(digits_argv(workspace, run.save, **flags))
    return run


def digits_argv(workspace: Workspace, save: Path, **overrides: object) -> list[str]:
    """Return a run that learns to write digits."""
    flags = {"num_rollout": RL_ROLLOUTS, "rollout_batch_size": 8, "n_samples_per_prompt": 8, "global_batch_size": 32}
    return workspace.train_argv(save, **{**DIGITS, **flags, "save_interval": None, "lr": 3e-3, **overrides})


def read_recorded(template: str, rollout_id: int) -> list[dict]:
    """Return the samples of a recorded rollout."""
    header, *samples = [json.loads(line) for line in Path(template.format(rollout_id=rollout_id)).read_text().splitlines()]
    assert header["rollout_id"] == rollout_id
    return samples


def test_fine_tuning_lowers_the_loss(tuned: Run) -> None:
    losses = column(tuned.save, "train/loss")
    assert len(losses) == SFT_STEPS + 1
    assert mean(losses[-3:]) < 0.6 * losses[0]


def test_exported_model_has_the_loss_in_transformers_that_the_trainer_had(workspace: Workspace, tuned: Run) -> None:
    export = tuned.export(SFT_STEPS - 1)
    model = AutoModelForCausalLM.from_pretrained(export, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(export)
    rows = [json.loads(line) for line in workspace.sft_data.read_text().splitlines()]
    token_losses = [plain_token_losses(model, tokenizer, row["messages"]) for row in rows[SFT_STEPS * BATCH :][:BATCH]]
    assert column(tuned.save, "train/loss")[SFT_STEPS] == pytest.approx(float(torch.cat(token_losses).mean()), rel=1e-5)


def plain_token_losses(model, tokenizer, messages) -> torch.Tensor:
    """Return the loss of each token that the assistant writes, from its turn's opening through the end marker."""
    prompt = tokenizer.apply_chat_template(messages[:1], tokenize=False, add_generation_prompt=True)
    answer = tokenizer.apply_chat_template(messages, tokenize=False).removeprefix(prompt).removesuffix("\n")
    assert answer.endswith("<|im_end|>")
    prompt_ids, answer_ids = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in (prompt, answer))
    tokens = torch.tensor([prompt_ids + answer_ids])
    with torch.no_grad():
        logits = model(tokens).logits[0, len(prompt_ids) - 1 : -1]
    return torch.nn.functional.cross_entropy(logits, torch.tensor(answer_ids), reduction="none")


def test_evaluation_writes_the_score_and_every_response(workspace: Workspace, tuned: Run, tmp_path: Path) -> None:
    run_verb(workspace.eval_argv(tuned.export(SFT_STEPS), tmp_path / "eval", n_samples_per_eval_prompt=2))
    score = json.loads((tmp_path / "eval" / "metrics.json").read_text())["eval/held_out"]
    responses = [json.loads(line) for line in (tmp_path / "eval" / "held_out.jsonl").read_text().splitlines()]
    asked = [json.loads(line)["label"] for line in workspace.test_data.read_text().splitlines()]
    assert [response["prompt"]["label"] for response in responses] == [label for label in asked for _ in range(2)]
    right = [f"\\boxed{{{r['prompt']['label']}}}" in r["response"] for r in responses]
    assert score == pytest.approx(mean(right))


def test_reinforcement_raises_the_reward(reinforced: Run) -> None:
    rewards = column(reinforced.save, "rollout/raw_reward")
    assert len(rewards) == RL_ROLLOUTS
    assert mean(rewards[-2:]) > mean(rewards[:2]) + 0.3


def test_engine_and_trainer_agree_on_the_log_probs_of_every_sampled_token(reinforced: Run) -> None:
    assert max(column(reinforced.save, "rollout/weight_version/max")) == RL_ROLLOUTS - 1
    assert max(column(reinforced.save, "train/train_rollout_logprob_abs_diff_max")) <= 1e-4


def test_sampled_tokens_have_the_log_probs_of_the_exported_model(reinforced: Run) -> None:
    """The last rollout was sampled by the policy that was exported right before it."""
    last = RL_ROLLOUTS - 1
    model = AutoModelForCausalLM.from_pretrained(reinforced.export(last - 1), dtype=torch.float32).eval()
    samples = read_recorded(reinforced.recorded, last)
    assert {version for sample in samples for version in sample["weight_versions"]} == {last}
    for sample in samples[:8]:
        length = sample["response_length"]
        tokens = torch.tensor([sample["tokens"]])
        with torch.no_grad():
            log_probs = model(tokens).logits[0, :-1].log_softmax(-1).gather(1, tokens[0, 1:, None])[-length:, 0]
        torch.testing.assert_close(torch.tensor(sample["rollout_log_probs"]), log_probs, atol=1e-4, rtol=0)


def test_recorded_rollouts_train_to_the_same_numbers(workspace: Workspace, reinforced: Run, tmp_path: Path) -> None:
    run_verb(digits_argv(workspace, tmp_path / "run", num_rollout=3, load_debug_rollout_data=reinforced.recorded))
    for name in ("train/loss", "train/grad_norm", "rollout/raw_reward"):
        assert column(tmp_path / "run", name) == column(reinforced.save, name)[: len(column(tmp_path / "run", name))]
    assert len(column(tmp_path / "run", "train/loss")) == 6


def test_generation_alone_makes_the_first_rollout_of_the_run(workspace: Workspace, reinforced: Run, tmp_path: Path) -> None:
    recorded = str(tmp_path / "rollout_{rollout_id}.jsonl")
    flags = {"debug_rollout_only": (), "num_rollout": 1, "lr": None, "save_debug_rollout_data": recorded}
    run_verb(digits_argv(workspace, tmp_path / "run", **flags))
    alone, first = (read_recorded(template, 0) for template in (recorded, reinforced.recorded))
    assert [sample["tokens"] for sample in alone] == [sample["tokens"] for sample in first]
    assert column(tmp_path / "run", "train/loss") == []
