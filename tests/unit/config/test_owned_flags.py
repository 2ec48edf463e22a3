"""Flags of SGLang and its router that a run sets itself."""

import pytest

from qwench.config.sections.engine import EngineConfig
from qwench.config.sglang_flags import unknown_sglang_flag
from qwench.errors import ConfigError

OF_A_SERVER = {
    "use --hf-checkpoint": "model-path model tokenizer-path",
    "Qwench reads the groups of engines, see --sglang-config": "config",
    "use --rollout-num-gpus-per-engine": "tp-size tensor-parallel-size tp",
    "an engine is one server of --rollout-num-gpus-per-engine": "dp-size data-parallel-size pp-size pipeline-parallel-size "
    "ep-size expert-parallel-size nnodes node-rank dist-init-addr nccl-init-addr",
    "GPUs are placed by Qwench": "base-gpu-id gpu-id-step",
    "addresses are chosen by Qwench": "host port nccl-port grpc-port",
    "use --use-sglang-router and --router-port": "router-ip router-port",
    "use --colocate or --offload-rollout": "enable-memory-saver",
    "weights are published again": "enable-weights-cpu-backup",
    "use --train-dtype": "dtype",
    "use --rollout-seed": "random-seed",
    "models are those that transformers knows": "trust-remote-code",
    "it is the number of rollouts": "weight-version",
    "each run makes its own token": "api-key admin-api-key",
    "stop words need the tokenizer": "skip-tokenizer-init",
    "an engine generates": "is-embedding",
}
OF_THE_ROUTER = {
    "the router serves this run only": "host",
    "the engines are added by Qwench; give addresses": "worker-urls",
    "an engine does both prefill and decode": "pd-disaggregation",
    "the engines are added by Qwench": "service-discovery",
    "it belongs to prefill-decode": "mini-lb",
    "the router is reached from this run only": "api-key",
    "engines speak SGLang's API": "backend",
}


@pytest.mark.parametrize(
    ("args", "prefix", "owned"), [("sglang_args", "--sglang-", OF_A_SERVER), ("router_args", "--router-", OF_THE_ROUTER)]
)
def test_a_flag_that_the_run_sets_is_refused_with_what_to_use(args, prefix, owned):
    for reason, names in owned.items():
        for name in names.split():
            with pytest.raises(ConfigError) as refused:
                EngineConfig(**{args: ("--other", "1", f"--{name}", "x")})
            assert f"{prefix}{name} " in str(refused.value) and reason in str(refused.value), name


def test_a_misspelt_flag_of_sglang_is_told_the_nearest_one():
    assert unknown_sglang_flag(("--page-size", "4", "mem-fraction")) is None
    assert unknown_sglang_flag(("--page-siz", "4")) == (
        "unknown flag --sglang-page-siz: SGLang has no --page-siz; did you mean --sglang-page-size?"
    )
    assert unknown_sglang_flag(("--qqqqqq",)) == (
        "unknown flag --sglang-qqqqqq: SGLang has no --qqqqqq; see python -m sglang.launch_server --help"
    )
