"""Flags that contradict others are refused by name: the second words of a row beside the first, which are accepted alone."""

from __future__ import annotations

import pytest

from qwench.config.command_line.parse import parse_flags
from qwench.config.config import Config
from qwench.config.rules import check_rules
from qwench.config.sections.agent import AGENT, TOOL_LOOP
from qwench.config.sglang_flags import SGLANG_FLAGS, SGLANG_OWN_FLAGS
from qwench.errors import ConfigError

CUSTOM_LOSS = "--loss-type custom_loss --custom-loss-function-path a.b"
REINFORCE = "--advantage-estimator reinforce_plus_plus --normalize-advantages"
BESIDE = "--eval-num-gpus 1 --fully-async --rollout-num-gpus 2"
ON_SET = f"{BESIDE} --eval-prompt-data a a.jsonl"
TABLE = [
    (
        CUSTOM_LOSS,
        "--get-mismatch-metrics --custom-tis-function-path a.b",
        "--custom-tis-function-path has no effect with --loss-",
    ),
    (
        CUSTOM_LOSS,
        "--custom-pg-loss-reducer-function-path a.b",
        "--custom-pg-loss-reducer-function-path has no effect with --loss",
    ),
    ("", "--loss-type custom_loss", "--loss-type custom_loss has no effect without --custom-loss-function-path; give both"),
    ("", "--custom-loss-function-path a.b", "--custom-loss-function-path has no effect without --loss-type custom_loss; give"),
    (CUSTOM_LOSS, "--use-tis", "--use-tis has no effect with --loss-type custom_loss"),
    (CUSTOM_LOSS, "--use-rs", "--use-rs has no effect with --loss-type custom_loss"),
    (CUSTOM_LOSS, "--use-opsm", "--use-opsm has no effect with --loss-type custom_loss"),
    (CUSTOM_LOSS, "--skip-actor-forward-only", "--skip-actor-forward-only has no effect with --loss-type custom_loss"),
    ("", "--rs-level sequence", "--rs-level sequence has no effect without --use-rs"),
    ("", "--rs-lower-bound 0.5", "--rs-lower-bound 0.5 has no effect without --use-rs"),
    ("", "--rs-upper-bound 2", "--rs-upper-bound 2.0 has no effect without --use-rs"),
    ("", "--rs-veto-threshold 0.1", "--rs-veto-threshold 0.1 has no effect without --use-rs"),
    (
        f"{REINFORCE} --skip-actor-forward-only",
        "--kl-coef 0.1",
        "--kl-coef needs the old log-probs that --skip-actor-forward-only leaves out",
    ),
    ("--skip-actor-forward-only", "--use-tis --tis-batch-normalize", "--tis-batch-normalize needs the old log-probs that"),
    ("", "--keep-checkpoints 2", "--keep-checkpoints (2) has no effect without a folder to save to"),
    ("", "--save-retain-interval 2", "--save-retain-interval (2) has no effect without a folder to save to"),
    ("", "--save-hf h-{rollout_id}", "--save-hf (h-{rollout_id}) has no effect without a folder to save to"),
    ("", "--save-trigger-sentinel s", "--save-trigger-sentinel (s) has no effect without a folder to save to"),
    ("", "--keep-best", "--keep-best has no effect without a folder to save to"),
    ("", "--save-numbering last", "--save-numbering (last) has no effect without a folder to save to"),
    (
        "--save s --save-interval 4",
        "--save-retain-interval 6",
        "--save-retain-interval (6) must be a multiple of --save-interval (4)",
    ),
    ("--save s", "--keep-best --save-numbering last", "--keep-best may keep the weights before rollout 0"),
    (
        "--num-gpus-per-node 8",
        "--actor-num-gpus-per-node 9",
        "--actor-num-gpus-per-node (9) is more than --num-gpus-per-node (8)",
    ),
    (
        "--num-gpus-per-node 8",
        "--rollout-num-gpus-per-engine 9",
        "--rollout-num-gpus-per-engine (9) is more than --num-gpus-per",
    ),
    ("", "--curriculum-key rate", "--curriculum-key has no effect without --curriculum-band"),
    ("", "--curriculum-pass-reward 0.5", "--curriculum-pass-reward has no effect without --curriculum-band"),
    ("", "--curriculum-retry-epochs 2", "--curriculum-retry-epochs has no effect without --curriculum-band"),
    ("--optimizer muon", "--optimizer-cpu-offload", "--optimizer-cpu-offload is for --optimizer adam"),
    ("--optimizer muon", "--use-precision-aware-optimizer", "--use-precision-aware-optimizer is for --optimizer adam"),
    ("", "--muon-momentum 0.9", "--muon-momentum has no effect with --optimizer adam"),
    ("", "--muon-num-ns-steps 4", "--muon-num-ns-steps has no effect with --optimizer adam"),
    ("", "--lr-wsd-decay-iters 4", "--lr-wsd-decay-iters has no effect with --lr-decay-style"),
    ("", "--lr-wsd-decay-style cosine", "--lr-wsd-decay-style has no effect with --lr-decay-style"),
    ("", "--judge-prompt-path p.txt", "--judge-prompt-path has no effect without --judge-url"),
    ("", "--judge-scores 0 2", "--judge-scores has no effect without --judge-url"),
    ("", "--judge-model m", "--judge-model has no effect without --judge-url"),
    (
        "",
        f"--custom-generate-function-path {TOOL_LOOP}",
        "--custom-generate-function-path names a built-in function that needs --gen",
    ),
    (
        "",
        f"--custom-generate-function-path {AGENT}",
        "--custom-generate-function-path names a built-in function that needs --cust",
    ),
    (
        "",
        "--generate-execute-tool-function-path a.b",
        "--generate-execute-tool-function-path has no effect without --custom-gen",
    ),
    ("", "--custom-agent-function-path a.b", "--custom-agent-function-path has no effect without --custom-generate-function"),
    ("", "--session-server-port 65536", "--session-server-port must be one port from 0 to 65535, got 65536"),
    ("", "--session-server-port 1 2", "--session-server-port must be one port from 0 to 65535, got 1 2"),
    ("", "--prometheus-port 65536", "--prometheus-port must be from 1 to 65535, got 65536"),
    ("", "--prometheus-port 0", "--prometheus-port must be from 1 to 65535, got 0"),
    ("", "--rm-url localhost:80", "--rm-url must begin with http:// or https://, got 'localhost:80'"),
    (
        "--save-debug-rollout-data r/{rollout_id}",
        "--save-debug-train-data r/{rollout_id}",
        "--save-debug-train-data and --save-debug-",
    ),
    ("", "--use-pytorch-profiler", "--use-pytorch-profiler has no folder to write to; give --log-dir or --save"),
    ("", "--use-tensorboard", "--use-tensorboard has no folder to write to; give --log-dir or --save"),
    ("--save s --save-hf h", "--ref-load h", "--save-hf h would replace --ref-load h"),
    (
        "--save s --save-hf h",
        "--use-opd --opd-type megatron --opd-teacher-load h/t",
        "--save-hf h would replace --opd-teacher-load h/t",
    ),
    ("--save s --save-hf h", "--advantage-estimator ppo --critic-load h/c", "--save-hf h would replace --critic-load h/c"),
    ("--save s --save-hf h", "--hf-checkpoint h", "--save-hf h would replace --hf-checkpoint h"),
    ("--save s --save-hf h", "--log-dir h/logs", "--save-hf h would replace --log-dir h/logs"),
    (
        "--loss-type sft_loss",
        "--mask-truncated-completions",
        "--mask-truncated-completions has no effect with --loss-type sft_loss",
    ),
    (BESIDE, "", "--eval-num-gpus 1 has nothing to evaluate on; give --eval-prompt-data NAME FILE"),
    (
        ON_SET,
        "--rollout-external-engine-addrs h:1",
        "--eval-num-gpus 1 starts engines; --rollout-external-engine-addrs has its own",
    ),
    (ON_SET, "--pause-generation-mode abort", "--eval-num-gpus 1 needs --pause-generation-mode retract or in_place"),
    (ON_SET, "--deterministic-mode", "--eval-num-gpus 1 has another order in every run; leave --deterministic-mode out"),
    (ON_SET, "--save s --keep-best", "--eval-num-gpus 1 ends after the weights have changed; leave --keep-best out"),
    (
        "--advantage-estimator gdpo --rm-type f1,math",
        "--rollout-max-response-len 9 --overlong-buffer-len 4",
        "--overlong-buffer-len changes a sum",
    ),
    (
        "--advantage-estimator gdpo --rm-type f1,math",
        "--custom-reward-post-process-path a.b",
        "--custom-reward-post-process-path chan",
    ),
    ("--rollout-top-p 0.9", CUSTOM_LOSS, "--rollout-top-p 0.9 does not work in training with --loss-type custom_loss"),
    (
        "--rollout-top-p 0.9",
        f"--custom-generate-function-path {AGENT} --custom-agent-function-path a.b",
        "--rollout-top-p 0.9 does not work in training with an agent",
    ),
    (
        "--curriculum-band 0 1",
        "--disable-rollout-global-dataset --rollout-function-path a.b",
        "--curriculum-band has no effect with --d",
    ),
    (
        "--curriculum-band 0 1",
        "--load-debug-rollout-data r/{rollout_id}",
        "--curriculum-band has no effect with --load-debug-rollout",
    ),
    ("--keep-old-actor", "--true-on-policy-mode", "--keep-old-actor has no effect with --true-on-policy-mode"),
    (
        "--skip-actor-forward-only",
        "--true-on-policy-mode",
        "--true-on-policy-mode needs the old log-probs that --skip-actor-forward",
    ),
    (
        "--skip-actor-forward-only",
        "--rollout-data-postprocess-path a.b",
        "--rollout-data-postprocess-path needs the old log-probs",
    ),
    (
        "--freeze-params-name-list embed",
        "--batch-invariant-mode",
        "--freeze-params-name-list does not work with --batch-invariant",
    ),
    (
        "",
        "--disable-rollout-global-dataset",
        "--disable-rollout-global-dataset leaves no prompts; give --rollout-function-path or",
    ),
    ("--data-source-path a.b", "--loss-type sft_loss", "--data-source-path has no effect with --loss-type sft_loss"),
    (
        "--advantage-estimator ppo --tensor-model-parallel-size 2 --actor-num-gpus-per-node 2",
        "--critic-num-gpus-per-node 3",
        "--tensor-model-parallel-size 2 (2 ranks for one copy of the model) does not divide the 3 trainer ranks of --critic",
    ),
    ("", "--sglang-port 1", "--sglang-port is not passed on: "),
    ("", "--router-host 0.0.0.0", "--router-host is not passed on: "),
]


def test_flags_that_are_not_passed_on_are_those_of_sglang():
    assert SGLANG_OWN_FLAGS.keys() - SGLANG_FLAGS == {"tp", "router-ip", "router-port"}, "short for tp-size, and slime's"


def problem_of(words: str) -> str | None:
    """Return what the sections, functions and rules refuse, in this order."""
    try:
        config = parse_flags(Config, words.split(), prog="qwench train")
        config.agent.check_generate(config.rollout.custom_generate_function_path)
        check_rules(config)
    except ConfigError as error:
        return str(error)
    return None


@pytest.mark.parametrize(("given", "added", "message"), TABLE)
def test_a_flag_that_contradicts_others_is_refused_by_its_name(given, added, message):
    said = problem_of(f"--rollout-batch-size 8 {given} {added}")
    assert said is not None and said.startswith(message), said


@pytest.mark.parametrize("given", sorted({given for given, _, _ in TABLE} - {BESIDE}))
def test_what_it_contradicts_is_accepted_without_it(given):
    assert problem_of(f"--rollout-batch-size 8 {given}") is None
