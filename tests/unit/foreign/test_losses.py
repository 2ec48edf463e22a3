"""Losses, corrections and reductions of slime's and miles' convention, in steps of a learner."""

from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from transformers import Qwen3Config, Qwen3ForCausalLM

from qwench.algorithms.columns import TokenLoss
from qwench.algorithms.method import Corrected, UserTerms
from qwench.config.sections.training import TrainingConfig
from qwench.errors import ConfigError, TrainingError
from qwench.foreign.losses import (
    foreign_correction,
    foreign_loss,
    foreign_reduction,
    load_correction,
    load_loss,
    load_reduction,
)
from qwench.training.fsdp.fsdp_trainer import FsdpTrainer
from qwench.training.process_group import init_process_group
from tests.deadlines import patient
from tests.fakes.sections import adamw
from tests.unit.training.table_learning import TEMPERATURE, learn, make_rollout

SMALL = {"training": {"use_dynamic_batch_size": True, "max_tokens_per_gpu": 24}}


def truncate(args, *, pg_loss, train_log_probs, rollout_log_probs, loss_masks, total_lengths, response_lengths, **kwargs):
    """Return what slime's own function does, written by hand: weights of at most 2, no token removed."""
    assert args == "the args" and not kwargs
    assert [len(mask) for mask in loss_masks] == response_lengths
    assert all(total > length for total, length in zip(total_lengths, response_lengths, strict=True))
    weights = (torch.cat(train_log_probs) - torch.cat(rollout_log_probs)).exp().detach()
    clipped = weights.clamp(0, 2)
    return pg_loss * clipped, loss_masks, {"tis": weights.clone(), "tis_clipfrac": (weights != clipped).float()}


def mean_of_samples(total_lengths, response_lengths, loss_masks, calculate_per_token_loss=False):
    """Return slime's default reduction, written by hand."""
    assert not calculate_per_token_loss

    def reduce(values):
        parts = zip(values.split(response_lengths), loss_masks, strict=True)
        return sum((part * mask).sum() / mask.sum().clamp(min=1) for part, mask in parts)

    return reduce


def sum_over_constant(total_lengths, response_lengths, loss_masks, calculate_per_token_loss=False):
    """Divide by 10, as the reference's example of Dr. GRPO does by 1000."""
    return lambda values: sum(
        (part * mask).sum() / 10 for part, mask in zip(values.split(response_lengths), loss_masks, strict=True)
    )


def correction(function) -> UserTerms:
    return UserTerms(correct=foreign_correction(function, lambda: "the args"))


def reduction(function, *, per_token=False) -> UserTerms:
    return UserTerms(reduce=foreign_reduction(function, per_token=per_token))


def test_a_users_truncation_at_two_equals_the_built_in_one():
    rollout = make_rollout(off_policy=1.0)
    own, built_in = (
        learn(rollout, use_tis=True, user_terms=correction(truncate), **SMALL),
        learn(rollout, use_tis=True, **SMALL),
    )
    torch.testing.assert_close(own[0].table, built_in[0].table)
    ours, theirs = built_in[1].steps[0], own[1].steps[0]
    assert 0 < theirs["train/tis_clipfrac"] < 1
    for name in ("train/loss", "train/pg_loss", "train/tis", "train/tis_clipfrac", "train/ois", "train/grad_norm"):
        assert theirs[name] == pytest.approx(ours[name], rel=1e-5)


def test_tokens_that_a_users_masks_remove_leave_the_divisors():
    def remove_all_but_the_first(args, *, pg_loss, loss_masks, **_):
        masks = [torch.cat([mask[:1], torch.zeros(len(mask) - 1)]) for mask in loss_masks]
        return pg_loss, masks, {}

    rollout = make_rollout()
    backend, _ = learn(rollout, use_tis=True, user_terms=correction(remove_all_but_the_first))
    whole, _ = learn(rollout)
    for group in rollout.groups:
        for sample in group.samples:
            del sample.loss_mask[1:]
            sample.loss_mask += [0] * (sample.response_length - 1)
    first_only, _ = learn(rollout)
    assert not torch.equal(backend.table, whole.table)
    # The same tokens, but there each sample divides by 1 and here by its number of trained tokens: smaller, not equal.
    assert not torch.equal(backend.table, first_only.table)


def test_a_users_mean_of_samples_equals_the_default():
    rollout = make_rollout()
    own, default = learn(rollout, user_terms=reduction(mean_of_samples), **SMALL), learn(rollout, **SMALL)
    torch.testing.assert_close(own[0].table, default[0].table)
    for name in ("train/loss", "train/pg_loss", "train/grad_norm"):
        assert own[1].steps[0][name] == pytest.approx(default[1].steps[0][name], abs=1e-6)


def test_a_reduction_that_divides_by_a_constant_equals_dr_grpo_of_that_length():
    rollout, flags = make_rollout(), {"disable_grpo_std_normalization": True}
    own, _ = learn(rollout, user_terms=reduction(sum_over_constant), **flags, **SMALL)
    dr_grpo, _ = learn(rollout, advantage_estimator="dr_grpo", dr_grpo_length=10, **SMALL)
    torch.testing.assert_close(own.table, dr_grpo.table)


def test_a_reduction_reduces_the_policy_loss_alone():
    rollout, flags = make_rollout(), {"use_kl_loss": True, "kl_loss_coef": 0.5, "entropy_coef": 0.1}
    with_terms = learn(rollout, global_batch_size=4, **flags)[1].steps
    own = learn(rollout, global_batch_size=4, user_terms=reduction(mean_of_samples), **flags)[1].steps
    for ours, theirs in zip(with_terms, own, strict=True):
        for name in ("train/loss", "train/kl_loss", "train/entropy_loss", "train/pg_loss"):
            assert theirs[name] == pytest.approx(ours[name], abs=1e-6)


def test_sums_of_tokens_are_divided_by_the_tokens_of_the_step():
    def sum_of_tokens(total_lengths, response_lengths, loss_masks, calculate_per_token_loss):
        assert calculate_per_token_loss
        return lambda values: (values * torch.cat(loss_masks)).sum()

    rollout, flags = make_rollout(), {"calculate_per_token_loss": True}
    own, _ = learn(rollout, user_terms=reduction(sum_of_tokens, per_token=True), **flags, **SMALL)
    default, _ = learn(rollout, **flags, **SMALL)
    torch.testing.assert_close(own.table, default.table)


def test_both_functions_work_together():
    terms = UserTerms(correct=correction(truncate).correct, reduce=reduction(mean_of_samples).reduce)
    rollout = make_rollout(off_policy=1.0)
    own, default = learn(rollout, use_tis=True, user_terms=terms), learn(rollout, use_tis=True)
    torch.testing.assert_close(own[0].table, default[0].table)


def test_an_answer_of_another_shape_is_refused_with_the_flag():
    rollout = make_rollout()
    for function, said in (
        (lambda **_: None, "must return the loss, the masks and a dict"),
        (lambda *, pg_loss, loss_masks, **_: (pg_loss[1:], loss_masks, {}), "returned a tensor of shape"),
        (lambda *, pg_loss, loss_masks, **_: (pg_loss, [], {}), "returned 0 masks for"),
    ):
        with pytest.raises(TrainingError, match=f"--custom-tis-function-path {said}"):
            learn(rollout, use_tis=True, user_terms=correction(function))
    with pytest.raises(
        TrainingError, match="--custom-pg-loss-reducer-function-path must make a function that returns a scalar"
    ):
        learn(rollout, user_terms=reduction(lambda *_: lambda values: values))


def own_correction(loss, trainer_log_probs, rollout_log_probs, micro_batch) -> Corrected:
    weights = (trainer_log_probs - rollout_log_probs).exp().clamp(0, 2)
    return Corrected(loss=loss * weights, kept=torch.ones_like(micro_batch.loss_mask), metrics={"weight": weights})


def own_reduction(loss, kept, micro_batch):
    return loss.where(kept, 0.0).sum() / 10


def test_functions_of_their_convention_are_called_with_the_flags():
    module, rollout = "tests.unit.foreign.test_losses", make_rollout(off_policy=1.0)
    correct = load_correction(f"{module}.truncate", "auto", lambda: "the args")
    reduce = load_reduction(f"{module}.mean_of_samples", "auto", per_token=False)
    own, built_in = (
        learn(rollout, use_tis=True, user_terms=UserTerms(correct=correct, reduce=reduce)),
        learn(rollout, use_tis=True),
    )
    torch.testing.assert_close(own[0].table, built_in[0].table)


def test_functions_of_our_convention_are_called_with_columns():
    module = "tests.unit.foreign.test_losses"
    rollout = make_rollout(off_policy=1.0)
    terms = UserTerms(correct=load_correction(f"{module}.own_correction", "auto", dict))
    own, learned = learn(rollout, use_tis=True, user_terms=terms)
    torch.testing.assert_close(own.table, learn(rollout, use_tis=True)[0].table)
    assert 0 < learned.steps[0]["train/weight"] <= 2
    terms = UserTerms(reduce=load_reduction(f"{module}.own_reduction", "qwench", per_token=False))
    same = UserTerms(reduce=load_reduction(f"{module}.sum_over_constant", "auto", per_token=False))
    torch.testing.assert_close(learn(rollout, user_terms=terms)[0].table, learn(rollout, user_terms=same)[0].table)
    by_its_names = load_reduction(f"{module}.own_reduction", "auto", per_token=False)
    assert by_its_names(torch.ones(3), torch.ones(3).bool(), None) == pytest.approx(0.3)


def short(args, pg_loss):
    """Take none of the other keywords."""


def test_a_signature_that_cannot_be_called_is_refused_before_a_run():
    module = "tests.unit.foreign.test_losses"
    with pytest.raises(ConfigError, match=r"--custom-tis-function-path .*cannot be called as fn\(args=, pg_loss="):
        load_correction(f"{module}.short", "auto", dict)
    for api, called_as in (("auto", r"fn\(loss, kept, micro_batch\)"), ("slime", r"fn\(total_lengths, response_lengths")):
        with pytest.raises(ConfigError, match=f"^--custom-pg-loss-reducer-function-path .*is called as {called_as}"):
            load_reduction(f"{module}.short", api, per_token=False)
    for api, called_as in (("auto", r"fn\(args, batch, logits, sum_of"), ("qwench", r"fn\(log_probs, entropy, micro_batch\)")):
        with pytest.raises(ConfigError, match=f"^--custom-loss-function-path .*is called as {called_as}"):
            load_loss(f"{module}.short", api, dict)
    with pytest.raises(ConfigError, match=r"^--custom-tis-function-path .*is called as fn\(loss, trainer_log_probs, rollout_"):
        load_correction(f"{module}.short", "qwench", dict)


@pytest.fixture(scope="module")
def process_group() -> Iterator[None]:
    init_process_group(torch.device("cpu"), environ={}, timeout_s=patient(60))
    yield
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(3)
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    Qwen3ForCausalLM(Qwen3Config(**sizes, **heads, tie_word_embeddings=True)).save_pretrained(folder)
    return folder


def trainer(folder: Path, *, logits: bool) -> FsdpTrainer:
    return FsdpTrainer.build(
        folder,
        training=TrainingConfig(),
        optimizer=adamw(lr=0.01),
        total_steps=2,
        param_dtype=torch.float32,
        device=torch.device("cpu"),
        logits=logits,
    )


def clipped_loss(args, batch, logits, sum_of_sample_mean):
    """Return the clipped loss and the KL to the reference, from logits alone."""
    assert batch["tokens"].tolist() == [torch.cat(batch["unconcat_tokens"]).tolist()]
    assert torch.equal(torch.cat(batch["returns"]), torch.cat(batch["advantages"])) and batch["entropy"] is None
    for name in ("loss_masks", "rollout_log_probs"):
        assert [len(one) for one in batch[name]] == batch["response_lengths"]
    assert [int(mask.sum()) for mask in batch["loss_masks"]] == [int(one) for one in batch["rollout_mask_sums"]]
    assert all(mask.dtype == torch.int32 for mask in batch["loss_masks"])
    logits = logits.squeeze(0) / args.rollout_temperature
    log_probs, end = [], 0
    for tokens, total, length in zip(batch["unconcat_tokens"], batch["total_lengths"], batch["response_lengths"], strict=True):
        end += total
        rows = logits[end - length - 1 : end - 1].log_softmax(-1)
        log_probs.append(rows.gather(1, tokens[-length:, None])[:, 0])
    ratio = (torch.cat(log_probs) - torch.cat(batch["log_probs"])).exp()
    advantages = torch.cat(batch["advantages"])
    pg_loss = sum_of_sample_mean(torch.max(-ratio * advantages, -ratio.clamp(0.8, 1.2) * advantages))
    gap = torch.cat(batch["ref_log_probs"]) - torch.cat(log_probs)
    kl = sum_of_sample_mean(gap.exp() - gap - 1)
    return pg_loss + 0.5 * kl, {"pg_loss": pg_loss.detach(), "kl_loss": kl.detach()}


def test_a_users_loss_from_logits_equals_the_built_in_one(process_group, model_folder):
    flags = {"global_batch_size": 4, "use_kl_loss": True, "kl_loss_coef": 0.5, "kl_loss_type": "low_var_kl"}
    args = Namespace(rollout_temperature=TEMPERATURE)
    loss, takes_logits = load_loss("tests.unit.foreign.test_losses.clipped_loss", "auto", lambda: args)
    terms = UserTerms(loss=loss, takes_logits=takes_logits)
    rollout = make_rollout()
    _, built_in = learn(rollout, backend=trainer(model_folder, logits=False), **flags, **SMALL)
    own_flags = {**flags, "loss_type": "custom_loss", "custom_loss_function_path": "mine.loss", "user_terms": terms}
    _, own = learn(rollout, backend=trainer(model_folder, logits=True), **own_flags, **SMALL)
    assert len(own.steps) == 2 and own.steps[1]["train/kl_loss"] > 0
    for ours, theirs in zip(built_in.steps, own.steps, strict=True):
        for name in ("train/loss", "train/pg_loss", "train/kl_loss", "train/grad_norm"):
            assert theirs[name] == pytest.approx(ours[name], rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("answer", [None, torch.zeros(1), (1.0, {}), (torch.zeros(2), {}), (torch.zeros(1), {}, {})])
def test_a_loss_of_another_shape_is_refused_with_the_flag(process_group, model_folder, answer):
    terms = UserTerms(loss=foreign_loss(lambda *_: answer, dict), takes_logits=True)
    flags = {"loss_type": "custom_loss", "custom_loss_function_path": "mine.loss", "user_terms": terms}
    with pytest.raises(TrainingError, match=r"^--custom-loss-function-path must return a scalar tensor and a dict of metrics"):
        learn(make_rollout(), backend=trainer(model_folder, logits=True), **flags, **SMALL)


def mean_log_prob(log_probs, entropy, micro_batch):
    loss = -(log_probs * micro_batch.loss_weights).sum()
    return TokenLoss(loss=loss, metrics={"nll": loss.detach()})


def test_a_loss_of_our_convention_gets_log_probs_and_needs_no_advantages():
    loss, takes_logits = load_loss("tests.unit.foreign.test_losses.mean_log_prob", "auto", dict)
    assert not takes_logits
    rollout, path = make_rollout(), "mine.loss"
    terms, flags = UserTerms(loss=loss), {"disable_compute_advantages_and_returns": True}
    own, learned = learn(rollout, loss_type="custom_loss", custom_loss_function_path=path, user_terms=terms, **flags)
    fine_tuned, steps = learn(rollout, loss_type="sft_loss")
    torch.testing.assert_close(own.table, fine_tuned.table)
    assert learned.steps[0]["train/nll"] == pytest.approx(steps.steps[0]["train/loss"])
