"""A learner of a table of logits, and rollouts of random tokens for it."""

import itertools
from dataclasses import replace
from pathlib import Path

import torch

from qwench.algorithms.method import UserTerms
from qwench.algorithms.methods import build_method
from qwench.config.config import Config
from qwench.config.plan import plan_run
from qwench.config.sections.algorithm import AlgorithmConfig
from qwench.config.sections.debug import ProfilingConfig
from qwench.config.sections.rollout import RolloutConfig
from qwench.config.sections.training import TrainingConfig
from qwench.models.memory import SequenceCost
from qwench.observability.timing import PhaseTimer
from qwench.samples import Group, Prompt, Rollout, Sample, Status
from qwench.training.critic_learner import CriticLearner
from qwench.training.hooks import NO_HOOKS
from qwench.training.learner import Learner
from qwench.training.profiler import TrainProfiler
from qwench.training.reference import PastPolicies, Reference
from qwench.training.rollout_columns import RolloutColumns
from qwench.training.state import TrainingState
from tests.fakes.console import RecordingConsole
from tests.fakes.trainer import TableTrainer
from tests.unit.config.architectures import QWEN3_4B

V = 6
TABLE = torch.randn(V, V, generator=torch.Generator().manual_seed(5))
TEMPERATURE = 0.7
COLUMNS = {"reward_post_process": None, "targets": None, "shaping": None, "convert": None, "truncated": False}
OF_LEARNER = {
    "equal_bits": False,
    "link": None,
    "record": None,
    "forgets_moments": False,
    "peak_tflops": None,
    "profiler": TrainProfiler(ProfilingConfig(), Path(), rank=0),
}


def make_rollout(num_groups=2, group_size=4, *, seed=0, rollout_id=0, off_policy=0.1):
    """Return samples of random tokens with 0/1 rewards, context in some responses, and log-probs near the table's."""
    generator = torch.Generator().manual_seed(seed)
    ids = itertools.count()

    def draw(low, high, n=1):
        return torch.randint(low, high, (n,), generator=generator).tolist()

    def sample(group_id):
        prompt = Prompt(text="", token_ids=tuple(draw(0, V, draw(1, 4)[0])))
        made = Sample(prompt=prompt, sample_id=next(ids), group_id=group_id, status=Status.COMPLETED)
        for _ in range(draw(1, 3)[0]):
            made.append(draw(0, V, 2), log_probs=None, version=0) if made.response_length else None
            tokens = draw(0, V, draw(1, 5)[0])
            context = [*made.tokens, *tokens]
            rows = (TABLE / TEMPERATURE).log_softmax(-1)[context[len(made.tokens) - 1 : -1]]
            noise = off_policy * torch.randn(len(tokens), generator=generator)
            made.append(tokens, log_probs=(rows[range(len(tokens)), tokens] + noise).tolist(), version=0)
        made.reward = float(draw(0, 2)[0])
        return made

    groups = [Group(group_id=g, samples=[sample(g) for _ in range(group_size)]) for g in range(num_groups)]
    return Rollout(rollout_id=rollout_id, groups=groups)


def make_learner(backend=None, *, global_batch_size=8, training=None, console=None, timer=None, **algorithm):
    hook = algorithm.pop("reward_post_process", None)
    hooks = algorithm.pop("hooks", NO_HOOKS)
    user_terms = algorithm.pop("user_terms", UserTerms())
    critic, num_critic_only = algorithm.pop("critic", None), algorithm.pop("num_critic_only", 0)
    opd_kl_coef = algorithm.pop("opd_kl_coef", None)
    num_past, others = algorithm.pop("num_past", 0), dict(algorithm.pop("others", {}))
    backend = backend or TableTrainer(TABLE)
    section = AlgorithmConfig(**algorithm)
    reference = Reference(backend) if section.needs_reference else None
    plan = make_plan(section, global_batch_size, num_critic_only=num_critic_only, **(training or {}))
    method = build_method(section, user_terms=user_terms, opd_kl_coef=opd_kl_coef)
    of_columns = {name: others.pop(name, without) for name, without in COLUMNS.items()}
    return Learner(
        TrainingState(
            backend,
            reference,
            reference_moves=section.ref_update_interval is not None,
            critic=critic,
            teacher=others.pop("teacher", None),
            past_policies=PastPolicies(backend, num_kept=num_past) if num_past else None,
        ),
        method,
        RolloutColumns(method, plan, **{**of_columns, "reward_post_process": hook}),
        plan=plan,
        temperature=TEMPERATURE,
        timer=timer or PhaseTimer(),
        console=console or RecordingConsole(),
        hooks=hooks,
        **{**OF_LEARNER, **others},
    )


def make_plan(section, global_batch_size, *, num_critic_only, **training):
    config = Config(
        rollout=RolloutConfig(rollout_batch_size=global_batch_size),
        training=TrainingConfig(global_batch_size=global_batch_size, **training),
        algorithm=section,
    )
    return replace(plan_run(config, QWEN3_4B), cost=SequenceCost(linear=1.0, quadratic=0.1), num_critic_only=num_critic_only)


def make_critic_learner(critic, link, timer, *, global_batch_size, num_critic_only, **algorithm):
    """Return the learner of a critic on a rank of its own."""
    section = AlgorithmConfig(**algorithm)
    plan, method = make_plan(section, global_batch_size, num_critic_only=num_critic_only), build_method(section)
    parts = {"plan": plan, "temperature": TEMPERATURE, "timer": timer, "console": RecordingConsole()}
    return CriticLearner(critic, method, RolloutColumns(method, plan, **COLUMNS), link, **parts, forgets_moments=False)


def learn(rollout, **kwargs):
    backend = kwargs.pop("backend", None) or TableTrainer(TABLE)
    learned = make_learner(backend, **kwargs).learn(rollout)
    return backend, learned
