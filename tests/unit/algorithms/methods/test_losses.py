import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qwench.algorithms.columns import RolloutBatch
from qwench.algorithms.methods import build_method
from qwench.config.sections.algorithm import AlgorithmConfig
from qwench.errors import ConfigError
from qwench.training.batch import idle, pack

LENGTHS = [(2, 3), (1, 1), (3, 4), (1, 2)]  # prompt and response of each sample


def _batch(seed=0, *, with_old=True, lengths=LENGTHS):
    """Return random columns of a step; the weights stand for any reduction."""
    generator = torch.Generator().manual_seed(seed)

    def column(scale=0.3):
        return [scale * torch.randn(response, generator=generator) - 1.0 for _, response in lengths]

    mask = [torch.rand(response, generator=generator) > 0.25 for _, response in lengths]
    batch = RolloutBatch(
        tokens=[torch.randint(0, 9, (sum(length),), generator=generator) for length in lengths],
        loss_mask=mask,
        rewards=torch.zeros(len(lengths)),
        graded=torch.ones(len(lengths), dtype=torch.bool),
        group_ids=torch.zeros(len(lengths), dtype=torch.int64),
        execution_ids=torch.arange(len(lengths)),
        rollout_log_probs=column(),
        ref_log_probs=column(),
        advantages=[torch.randn((), generator=generator).expand(response).clone() for _, response in lengths],
        loss_weights=[m * torch.rand(len(m), generator=generator) for m in mask],
    )
    return batch.with_columns(old_log_probs=column()) if with_old else batch


def _current(batch, seed=7):
    """Return response-aligned log-probs of the current policy."""
    generator = torch.Generator().manual_seed(seed)
    return [0.3 * torch.randn(len(mask), generator=generator) - 1.0 for mask in batch.loss_mask]


def _evaluate(config, batch, current, bins, *, entropy_value=None):
    """Sum the loss and metrics over micro-batches whose current log-probs are given; return (loss, metrics)."""
    loss, metrics = torch.zeros(()), {}
    function = build_method(config).loss
    for members in bins:
        micro_batch = pack(batch, members)
        log_probs = pack(batch.with_columns(ref_log_probs=current), members).ref_log_probs
        entropy = None if entropy_value is None else torch.full_like(log_probs, entropy_value)
        result = function(log_probs, entropy, micro_batch)
        loss = loss + result.loss
        for name, value in result.metrics.items():
            metrics[name] = metrics.get(name, 0.0) + float(value)
    return float(loss), metrics


def _ratio(level, own, of_sequence):
    """Return a token's ratio, or its sequence's product or geometric mean."""
    total = {"token": own, "sequence": sum(of_sequence), "geometric": sum(of_sequence) / len(of_sequence)}
    return math.exp(total[level])


def _corrected(config, gap, gaps):
    """Return a token's importance weight, its lower bound, the bounded weight, and whether it is kept and vetoed."""
    importance = _ratio(config.tis_level, gap, gaps)
    lower_bound = config.tis_lower_bound or 1 / config.tis_clip
    low = config.tis_clip_low if config.tis_mode in ("truncate", "icepop") else lower_bound
    bounded = min(max(importance, low), config.tis_clip)
    kept, vetoed = True, False
    if bounded != importance and config.tis_mode == "icepop":
        bounded = 0.0
    elif bounded != importance and config.tis_mode == "mask":
        bounded, kept = importance, not config.use_tis
    if config.use_rs:
        vetoed = any(math.exp(one) < (config.rs_veto_threshold or 0.0) for one in gaps)
        lowest, highest = config.rs_lower_bound or lower_bound, config.rs_upper_bound or config.tis_clip
        kept = kept and lowest <= _ratio(config.rs_level, gap, gaps) <= highest and not vetoed
    return importance, low, bounded, kept, vetoed


def _plain(config, batch, current, entropy_value=None):
    """Compute the same token by token in Python floats."""
    sums = dict.fromkeys(["loss", "pg_loss", "pg_clipfrac", "ppo_kl", "kl_loss", "tis", "tis_clipfrac", "tis_abs", "ois"], 0.0)
    sums |= dict.fromkeys(["train_rollout_logprob_abs_diff", "train_rollout_kl", "opsm_clipfrac", "ess_ratio"], 0.0)
    sums |= dict.fromkeys(["tis_low_fraction", "tis_high_fraction", "rs_fraction", "rs_veto_fraction"], 0.0)
    eps_low, eps_high = config.eps_clip, config.eps_clip_high or config.eps_clip
    for i, mask in enumerate(batch.loss_mask):
        trained = [t for t in range(len(mask)) if mask[t]]
        new, ref, rollout = (
            [float(x) for x in column[i]] for column in (current, batch.ref_log_probs, batch.rollout_log_probs)
        )
        trainer = [float(x) for x in batch.old_log_probs[i]] if batch.old_log_probs is not None else new
        old = rollout if config.use_rollout_logprobs else trainer
        drift = sum(old[t] - new[t] for t in trained) / max(len(trained), 1)
        ratios = {t: math.exp(-drift if config.advantage_estimator == "gspo" else new[t] - old[t]) for t in trained}
        for t in trained:
            weight, ratio, advantage = float(batch.loss_weights[i][t]), ratios[t], float(batch.advantages[i][t])
            bounded = min(max(ratio, 1 - eps_low), 1 + eps_high)
            if config.advantage_estimator == "cispo":
                loss, clipped = -bounded * advantage * new[t], bounded != ratio
            else:
                loss, clipped = max(-ratio * advantage, -bounded * advantage), -bounded * advantage > -ratio * advantage
                if config.eps_clip_c is not None and advantage < 0:
                    loss = min(loss, -config.eps_clip_c * advantage)
            if config.use_opsm and advantage < 0 and drift > config.opsm_delta:
                loss = 0.0
                sums["opsm_clipfrac"] += weight
            gap, gaps = trainer[t] - rollout[t], [trainer[s] - rollout[s] for s in trained]
            importance, low, bounded_importance, kept, vetoed = _corrected(config, gap, gaps)
            sums["rs_fraction"] += weight * (not kept)
            sums["rs_veto_fraction"] += weight * vetoed
            if config.use_tis:
                loss *= bounded_importance
            loss *= kept
            kl = math.exp(ref[t] - new[t]) - 1 - (ref[t] - new[t])
            if config.use_unbiased_kl:
                kl *= math.exp(new[t] - old[t])
            kl *= kept
            sums["pg_loss"] += weight * loss
            sums["kl_loss"] += weight * kl
            total = loss + (config.kl_loss_coef * kl if config.use_kl_loss else 0.0)
            sums["loss"] += weight * (total - config.entropy_coef * (entropy_value or 0.0))
            sums["pg_clipfrac"] += weight * clipped
            sums["ppo_kl"] += weight * -math.log(ratio)
            sums["ois"] += weight * ratio
            sums["tis"] += weight * importance
            sums["tis_clipfrac"] += weight * (importance != bounded_importance)
            sums["tis_abs"] += weight * abs(importance - 1)
            sums["tis_low_fraction"] += weight * (importance < low)
            sums["tis_high_fraction"] += weight * (importance > config.tis_clip)
            sums["train_rollout_logprob_abs_diff"] += weight * abs(gap)
            sums["train_rollout_kl"] += weight * (math.exp(gap) - 1 - gap)
            sums["ess_ratio"] += weight * sum(ratios.values()) ** 2 / (len(trained) * sum(r * r for r in ratios.values()))
    return sums


VARIANTS = {
    "grpo": {},
    "clip_higher_dual_clip": {"eps_clip": 0.1, "eps_clip_high": 0.28, "eps_clip_c": 1.2},
    "gspo": {"advantage_estimator": "gspo", "eps_clip": 0.05},
    "cispo": {"advantage_estimator": "cispo", "eps_clip_high": 0.28},
    "tis": {"use_tis": True, "tis_clip": 1.2, "tis_clip_low": 0.8},
    "icepop": {"use_tis": True, "tis_mode": "icepop", "tis_clip": 1.2, "tis_clip_low": 0.8},
    "clip_of_sequences": {
        "use_tis": True,
        "tis_mode": "clip",
        "tis_level": "sequence",
        "tis_clip": 1.2,
        "tis_lower_bound": 0.7,
    },
    "mask_of_geometric_means": {"use_tis": True, "tis_mode": "mask", "tis_level": "geometric", "tis_clip": 1.1},
    "rejection": {
        "use_rs": True,
        "rs_lower_bound": 0.8,
        "rs_upper_bound": 1.3,
        "use_kl_loss": True,
        "kl_loss_coef": 0.3,
        "kl_loss_type": "k3",
    },
    "rejection_by_sequence_and_veto": {
        "use_rs": True,
        "use_tis": True,
        "rs_level": "sequence",
        "tis_clip": 1.02,
        "rs_lower_bound": 0.6,
        "rs_upper_bound": 1.5,
        "rs_veto_threshold": 0.9,
    },
    "mismatch_metrics_only": {"get_mismatch_metrics": True},
    "engine_log_probs_as_old": {"use_rollout_logprobs": True},
    "kl_loss": {"use_kl_loss": True, "kl_loss_coef": 0.3, "kl_loss_type": "low_var_kl"},
    "unbiased_kl": {"use_kl_loss": True, "kl_loss_coef": 0.3, "kl_loss_type": "k3", "use_unbiased_kl": True},
    "entropy": {"entropy_coef": 0.2},
    "opsm": {"use_opsm": True, "opsm_delta": 0.01},
    "opsm_with_engine_log_probs_as_old": {"use_opsm": True, "opsm_delta": 0.01, "use_rollout_logprobs": True},
}
RATIO_OF_OLD = {"clip_higher_dual_clip", "gspo", "opsm", "unbiased_kl"}
"""Without old log-probs their ratios are 1: nothing is clipped, dropped or weighted."""
CASES = [(name, with_old) for with_old in (True, False) for name in VARIANTS if with_old or name not in RATIO_OF_OLD]


def _case(name, with_old):
    """Return a variant's config, its batch, the current log-probs and the entropy."""
    config, batch = AlgorithmConfig(**VARIANTS[name]), _batch(seed=1, with_old=with_old)
    return config, batch, _current(batch), 1.7 if config.entropy_coef else None


@pytest.mark.parametrize(("name", "with_old"), CASES)
def test_policy_loss_and_metrics_equal_a_loop_over_tokens(name, with_old):
    config, batch, current, entropy = _case(name, with_old)
    loss, metrics = _evaluate(config, batch, current, [[0, 1, 2, 3]], entropy_value=entropy)
    expected = _plain(config, batch, current, entropy)
    assert loss == pytest.approx(expected["loss"], rel=1e-5, abs=1e-6)
    if entropy is not None:
        expected["entropy_loss"] = entropy * sum(float(weights.sum()) for weights in batch.loss_weights)
    assert metrics == pytest.approx({metric: expected[metric] for metric in metrics}, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("with_old", [True, False], ids=["old", "no_old"])
def test_every_variant_computes_something_else(with_old):
    results = []
    for name in (name for name, old in CASES if old == with_old):
        config, batch, current, entropy = _case(name, with_old)
        results.append(_evaluate(config, batch, current, [[0, 1, 2, 3]], entropy_value=entropy))
        changed = {"opsm_clipfrac", "rs_fraction"} | ({"tis_clipfrac"} if config.tis_mode != "mask" else set())
        fractions = [value for metric, value in results[-1][1].items() if metric in changed]
        assert all(fraction > 0 for fraction in fractions) or config.get_mismatch_metrics, name
    assert all(results.count(result) == 1 for result in results)


def test_metrics_are_those_the_flags_ask_for():
    def names(**flags):
        batch = _batch()
        return set(_evaluate(AlgorithmConfig(**flags), batch, _current(batch), [[0, 1, 2, 3]])[1])

    always = {"pg_loss", "pg_clipfrac", "ppo_kl", "train_rollout_logprob_abs_diff", "train_rollout_kl"}
    assert names() == always
    assert names(use_kl_loss=True) == always | {"kl_loss"}
    assert names(use_opsm=True) == always | {"opsm_clipfrac"}
    assert names(use_rs=True) == always | {"rs_fraction"}
    assert names(use_rs=True, rs_veto_threshold=0.9) == always | {"rs_fraction", "rs_veto_fraction"}
    assert names(use_tis=True) == always | {"tis", "tis_clipfrac", "tis_abs", "ois", "ess_ratio"}


@settings(max_examples=30)
@given(st.permutations(range(4)), st.lists(st.booleans(), min_size=3, max_size=3), st.sampled_from(sorted(VARIANTS)))
def test_order_and_micro_batches_do_not_change_loss_and_metrics(order, cuts, name):
    config, batch = AlgorithmConfig(**VARIANTS[name]), _batch(seed=3)
    bins = [[order[0]]]
    for i, cut in zip(order[1:], cuts, strict=True):
        if cut:
            bins.append([i])
        else:
            bins[-1].append(i)
    whole = _evaluate(config, batch, _current(batch), [[0, 1, 2, 3]], entropy_value=0.5)
    parts = _evaluate(config, batch, _current(batch), bins, entropy_value=0.5)
    assert parts[0] == pytest.approx(whole[0], rel=1e-5, abs=1e-6)
    assert parts[1] == pytest.approx(whole[1], rel=1e-5, abs=1e-6)


def test_masked_positions_cannot_spread_nan_into_loss_or_gradient():
    batch = _batch().with_columns(loss_mask=[torch.tensor([True, False, True]), *_batch().loss_mask[1:]])
    batch = batch.with_columns(loss_weights=[mask.float() for mask in batch.loss_mask])
    config = AlgorithmConfig(use_tis=True, use_kl_loss=True, kl_loss_coef=0.1, kl_loss_type="k2")
    loss = build_method(config).loss

    def gradient(values):
        poisoned = {name: [column.clone() for column in getattr(batch, name)] for name in ("old_log_probs", "ref_log_probs")}
        for columns in poisoned.values():
            columns[0][1] = values
        micro_batch = pack(batch.with_columns(**poisoned), [0, 1, 2, 3])
        log_probs = torch.full((micro_batch.num_tokens,), -1.0)
        log_probs[~micro_batch.loss_mask] = values
        log_probs.requires_grad_()
        result = loss(log_probs, None, micro_batch)
        result.loss.backward()
        return result.loss.detach(), log_probs.grad

    for values in (math.nan, math.inf):
        torch.testing.assert_close(gradient(values), gradient(0.0))


@pytest.mark.parametrize("column", ["log_probs", "old_log_probs", "rollout_log_probs", "advantages", "ref_log_probs"])
def test_nan_in_a_trained_token_makes_the_loss_nan(column):
    config = AlgorithmConfig(use_tis=True, use_kl_loss=True, kl_loss_coef=0.1, use_opsm=True, eps_clip_c=3.0)
    micro_batch = pack(_batch(), [0, 1, 2, 3])
    position = int(micro_batch.loss_mask.nonzero()[0])
    log_probs = torch.full((micro_batch.num_tokens,), -1.0)
    (log_probs if column == "log_probs" else getattr(micro_batch, column))[position] = math.nan
    assert torch.isnan(build_method(config).loss(log_probs, None, micro_batch).loss)


def test_idle_micro_batch_has_loss_zero_and_a_gradient_of_zero():
    nothing = idle(_batch())
    log_probs = torch.full((nothing.num_tokens,), -1.0, requires_grad=True)
    result = build_method(AlgorithmConfig(use_tis=True, use_kl_loss=True, advantage_estimator="gspo")).loss(
        log_probs, None, nothing
    )
    result.loss.backward()
    assert result.loss.item() == 0.0
    assert set(map(float, result.metrics.values())) == {0.0}
    assert log_probs.grad.tolist() == [0.0, 0.0]


def test_sft_loss_is_the_weighted_negative_log_likelihood():
    batch = _batch()
    current = _current(batch)
    loss, metrics = _evaluate(AlgorithmConfig(loss_type="sft_loss"), batch, current, [[0, 2], [1, 3]])
    expected = -sum(float((weights * values).sum()) for weights, values in zip(batch.loss_weights, current, strict=True))
    assert loss == pytest.approx(expected, rel=1e-5)
    assert metrics == {}


def test_the_peak_is_the_largest_difference_over_trained_tokens():
    batch = _batch()
    batch.old_log_probs[2][:] = batch.rollout_log_probs[2] + torch.where(batch.loss_mask[2], 0.0, 50.0)
    batch.old_log_probs[2][batch.loss_mask[2].nonzero()[0]] -= 5.0
    micro_batch = pack(batch, [2])
    result = build_method(AlgorithmConfig()).loss(torch.zeros(micro_batch.num_tokens), None, micro_batch)
    assert {name: float(peak) for name, peak in result.peaks.items()} == {
        "train_rollout_logprob_abs_diff_max": pytest.approx(5.0)
    }


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({"loss_type": "custom_loss"}, "--loss-type custom_loss has no effect without --custom-loss-function-path"),
        ({"custom_loss_function_path": "a.b"}, "--custom-loss-function-path has no effect without --loss-type custom_loss"),
        ({"loss_type": "custom_loss", "custom_loss_function_path": "a.b", "use_tis": True}, "--use-tis has no effect"),
        (
            {"loss_type": "custom_loss", "custom_loss_function_path": "a.b", "advantage_estimator": "ppo"},
            "custom_loss trains no critic",
        ),
        ({"custom_tis_function_path": "a.b"}, "--custom-tis-function-path has no effect without --use-tis"),
        (
            {"custom_pg_loss_reducer_function_path": "a.b", "advantage_estimator": "dr_grpo"},
            "--custom-pg-loss-reducer-function-path has no effect with --advantage-estimator dr_grpo",
        ),
    ],
)
def test_functions_in_the_loss_need_what_they_act_on(flags, said):
    with pytest.raises(ConfigError, match=said):
        AlgorithmConfig(**flags)
