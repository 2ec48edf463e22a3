"""What every method has unless it says otherwise."""

import pytest
import torch

from qwench.algorithms.columns import RolloutBatch
from qwench.algorithms.method import Needs, UserTerms
from qwench.algorithms.methods import build_method
from qwench.algorithms.reduction import step_share
from qwench.config.sections.algorithm import AlgorithmConfig
from qwench.estimators import METHODS
from qwench.training.batch import pack

MASKS = [torch.tensor([True, True, False]), torch.tensor([False]), torch.tensor([True])]
SFT = AlgorithmConfig(loss_type="sft_loss")


def batch_of(**columns):
    return RolloutBatch(
        tokens=[torch.arange(len(mask) + 1) for mask in MASKS],
        loss_mask=MASKS,
        rewards=torch.tensor([1.0, 2.0, 3.0]),
        graded=torch.ones(3, dtype=torch.bool),
        group_ids=torch.zeros(3, dtype=torch.int64),
        execution_ids=torch.tensor([4, 4, 9]),
        **columns,
    )


def test_a_method_keeps_its_flags_and_the_functions_of_the_user():
    terms = UserTerms(reduce=lambda *words: torch.zeros(()))
    method = build_method(AlgorithmConfig(), opd_kl_coef=0.5, user_terms=terms, reward_weights=(1.0, 2.0))
    assert (method.section, method.opd_kl_coef, method.user_terms) == (AlgorithmConfig(), 0.5, terms)
    assert method.reward_weights == (1.0, 2.0) and build_method(AlgorithmConfig()).reward_weights == ()
    needed = [UserTerms(), terms, UserTerms(loss=lambda *words: torch.zeros(()))]
    assert [one.need_step_share for one in needed] == [False, True, True]


@pytest.mark.parametrize("name", [name for name, facts in METHODS.items() if not facts.critic])
def test_only_a_method_with_a_critic_has_its_loss(name):
    flags = {"loss_type": "sft_loss"} if name == "sft" else {"advantage_estimator": name}
    if METHODS[name].requires_whitening:
        flags["normalize_advantages"] = True
    if name == "dr_grpo":
        flags["dr_grpo_length"] = 8
    with pytest.raises(AssertionError, match="has no critic"):
        build_method(AlgorithmConfig(**flags)).value_loss(torch.zeros(1), None, None)


def test_tokens_count_by_their_execution_or_all_the_same():
    by_execution, by_token = (
        build_method(AlgorithmConfig(calculate_per_token_loss=flag)).token_weights(batch_of()) for flag in (False, True)
    )
    # two executions, of which the first has two trained tokens; four tokens, as a sample without any counts as one
    assert [one.tolist() for one in by_execution] == [[0.25, 0.25, 0.0], [0.0], [0.5]]
    assert [one.tolist() for one in by_token] == [[0.25, 0.25, 0.0], [0.0], [0.25]]
    for per_token, share in ((False, 0.5), (True, 0.25)):
        shares = step_share(MASKS, torch.tensor([4, 4, 9]), per_token=per_token)
        assert [one.tolist() for one in shares] == [[share] * 3, [share], [share]]


def test_a_reduction_of_the_user_gets_the_share_of_the_step():
    terms = UserTerms(reduce=lambda *words: torch.zeros(()))
    for flags, share in (({}, 0.5), ({"calculate_per_token_loss": True}, 0.25)):
        columns = build_method(AlgorithmConfig(**flags), user_terms=terms).step_columns(batch_of())
        assert [one.tolist() for one in columns["step_share"]] == [[share] * 3, [share], [share]]
    dr_grpo = AlgorithmConfig(advantage_estimator="dr_grpo", dr_grpo_length=8)
    columns = build_method(dr_grpo, user_terms=terms).step_columns(batch_of())
    # the mean over 4 tokens becomes the sum over them divided by 2 executions x 8
    assert {name: column[0].tolist() for name, column in columns.items()} == {
        "step_share": [0.5] * 3, "loss_scale": [0.25] * 3,
    }  # fmt: skip


def test_fine_tuning_compares_nothing_and_measures_the_entropy_where_it_is_asked():
    method = build_method(SFT)
    assert (method.needs(num_steps=3), method.targets(batch_of()), method.step_columns(batch_of())) == (Needs(), {}, {})
    assert method.rewards(batch_of()).tolist() == [1.0, 2.0, 3.0]
    observed = AlgorithmConfig(loss_type="sft_loss", observe_training_entropy=True)
    assert build_method(observed).needs(num_steps=1) == Needs(entropy=True)
    packed = pack(batch_of(loss_weights=[mask * 0.5 for mask in MASKS]), [0])
    log_probs, entropy = torch.tensor([-1.0, -2.0, 7.0, 9.0]), torch.tensor([0.5, 1.5, 7.0, 9.0])
    made = method.loss(log_probs, entropy, packed)
    assert float(made.loss) == 1.5
    assert {name: float(value) for name, value in made.metrics.items()} == {"entropy_loss": 1.0}
    assert method.loss(log_probs, None, packed).metrics == {}


@pytest.mark.parametrize("name", ["clip_cov", "kl_cov"])
def test_what_is_picked_comes_beside_the_advantages(name):
    batch = batch_of(old_log_probs=[torch.full((len(mask),), -1.0) for mask in MASKS])
    assert build_method(AlgorithmConfig(advantage_estimator=name)).targets(batch).keys() == {"advantages", "picked"}
