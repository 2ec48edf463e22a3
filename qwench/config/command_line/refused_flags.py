"""Flags of slime, miles and Megatron that are refused by name, with the reason; and names that later features will take."""

from __future__ import annotations

from collections.abc import Mapping

from qwench.config.command_line.accepted_flags import BUFFER_SERVER, MEGATRON_LOOP
from qwench.config.command_line.foreign_flag import NEVER, ForeignFlag, flags, planned

DENSE = "Qwench trains dense models, not mixtures of experts"
TEXT_ONLY = "Qwench trains text models with full attention"
GROUPED = "Qwen3 has grouped-query attention"

REFUSED: tuple[ForeignFlag, ...] = (
    *flags(
        NEVER,
        "Qwench serves dense models with full attention",
        """
        sglang-enable-dp-attention sglang-enable-dp-lm-head sglang-moe-dense-tp-size sglang-moe-runner-backend
        sglang-nsa-decode-backend sglang-nsa-prefill-backend
        """,
    ),
    *flags(
        NEVER,
        "Qwench serves text models, which have no image attention",
        """
        sglang-mm-attention-backend
        """,
    ),
    *flags(NEVER, "it needs a patched SGLang server", "opd-topk-per-position"),
    *flags(NEVER, "rollouts would come from another policy than the one that trains", "lora-train-only"),
    *flags(NEVER, DENSE, "experts-shared-outer-loras no-sglang-lora-use-virtual-experts"),
    *flags(
        NEVER,
        "one run trains one adapter; many adapters over one base are another program",
        """
        multi-lora-n-adapters multi-lora-adapter multi-lora-idle-poll-s multi-lora-http-server-path
        multi-lora-backend-path multi-lora-api-port multi-lora-disable-service-mode
        multi-lora-max-adapter-global-batch-size multi-lora-max-coalesce-wait-s multi-lora-max-empty-wait-s
        """,
    ),
    *flags(
        NEVER,
        "it replaces a class of miles; --max-weight-staleness bounds the age of samples",
        """
        custom-async-data-buffer-path
        """,
    ),
    *flags(
        NEVER,
        "sessions are linear, and nothing branches",
        """
        session-sample-picker-path session-sample-postprocessor-path
        """,
    ),
    *flags(
        NEVER,
        "config.json describes the model, and Megatron is used unpatched",
        """
        custom-model-provider-path
        """,
    ),
    *flags(
        NEVER,
        "it reads or writes comparison files of slime's and miles' own tests",
        """
        ci-save-grad-norm ci-load-grad-norm ci-save-model-hash ci-check-model-hash ci-ft-test-actions
        ci-inject-rollout-data-path ci-inject-rollout-data-start-rollout-id ci-inject-rollout-data-min-match-ratio
        """,
    ),
    *flags(
        NEVER,
        "offloaded state rests in host memory, not on a disk",
        """
        offload-train-disk-dir stream-optimizer-state-to-disk stream-optimizer-state-moment-dtype
        """,
    ),
    *flags(NEVER, BUFFER_SERVER, "rollout-buffer-url"),
    *flags(
        NEVER,
        "float16 training needs loss scaling; training is in bfloat16",
        """
        loss-scale initial-loss-scale min-loss-scale loss-scale-window hysteresis fp16-lm-cross-entropy
        """,
    ),
    *flags(
        NEVER,
        "it belongs to the development of miles, and would change the run",
        """
        debug-skip-weight-update debug-disable-optimizer debug-deterministic-collective dumper-enable dumper-dir
        dumper-inference dumper-fwd-only dumper-fwd-bwd dumper-source-patcher-config-inference
        dumper-source-patcher-config-train save-debug-event-data save-local-weight-checksum enable-event-analyzer
        enable-witness witness-buffer-size
        """,
    ),
    *flags(
        NEVER,
        "trainer replicas do not outlive each other; the same command resumes a killed run exactly",
        """
        indep-dp mini-ft-controller-enable mini-ft-controller-poll-interval mini-ft-controller-resume-delay
        trainer-heartbeat-checker-interval trainer-heartbeat-checker-timeout trainer-heartbeat-checker-first-wait
        trainer-heartbeat-checker-failure-threshold
        """,
    ),
    *flags(NEVER, "every engine prefills and decodes", "prefill-num-servers"),
    *flags(
        NEVER,
        TEXT_ONLY,
        """
        multimodal-keys allgather-cp miles-dsa-topk-backend dsa-attention-backend use-indexer-replay
        use-rollout-indexer-replay enable-mtp-training
        """,
    ),
    *flags(
        NEVER,
        DENSE,
        """
        use-routing-replay use-rollout-routing-replay megatron-deepgemm-moe-forward-layers
        megatron-deepgemm-moe-forward-modules
        """,
    ),
    *flags(
        NEVER,
        "matrix products of training are in bfloat16, and Megatron is used unpatched",
        """
        megatron-deepgemm-forward-layers megatron-deepgemm-forward-modules
        """,
    ),
    *flags(NEVER, "gradients are accumulated and reduced in float32", "grad-reduce-in-bf16"),
    *flags(
        NEVER,
        "the FSDP2 trainer is --train-backend fsdp",
        """
        use-torch-fsdp2 use-megatron-fsdp data-parallel-sharding-strategy fsdp-double-buffer
        """,
    ),
    *flags(NEVER, "one learning rate trains all parameters", "decoupled-lr decoupled-min-lr"),
    *flags(NEVER, "AdamW is the only optimizer", "sgd-momentum"),
    *flags(
        NEVER,
        "prompts and conversations come from --prompt-data",
        """
        data-path train-data-path valid-data-path test-data-path split data-cache-path vocab-file merge-file
        """,
    ),
    *flags(
        NEVER,
        "checkpoints are whole and go to --save; --ref-load reads other weights, and qwench convert converts",
        """
        non-persistent-save-interval non-persistent-ckpt-type non-persistent-global-ckpt-dir
        non-persistent-local-ckpt-dir pretrained-checkpoint ckpt-convert-format ckpt-convert-save
        """,
    ),
    *flags(
        NEVER,
        "Megatron is used unpatched; --config FILE.yaml reads flags from a file",
        """
        spec te-precision-config-file yaml-cfg
        """,
    ),
    *flags(
        NEVER,
        "FP4 training needs hardware that Qwench is not built for",
        """
        fp4-format fp4-recipe fp4-param-gather
        """,
    ),
    *flags(
        NEVER,
        "context parallelism has one level",
        """
        hierarchical-context-parallel-sizes hybrid-context-parallel max-seqlen-per-dp-cp-rank
        """,
    ),
    *flags(NEVER, "the batch size is constant; use --global-batch-size", "rampup-batch-size"),
    *flags(
        NEVER,
        "slime and miles have removed it; use --dynamic-sampling-filter-path or --buffer-filter-path",
        """
        agent-rollout-buffer-url buffer-read-function-path buffer-write-function-path diversity-sampling-filter-path
        over-sampling-filter-path partial-rollout-filter-path partial-rollout-min-response-length
        partial-rollout-min-tokens partial-rollout-mix-ratio slime-router-middleware-paths miles-router-middleware-paths
        custom-delta-pre-push-path custom-delta-pre-read-path tito-allowed-append-roles
        """,
    ),
    *flags(NEVER, "rollouts are in bfloat16 or FP8", "int4-params-rollout"),
    *flags(NEVER, "master weights are always float32", "disable-fp32-master"),
    *flags(NEVER, "engines restart with --use-fault-tolerance; trainer ranks do not", "ft-components"),
    *flags(NEVER, TEXT_ONLY, "freeze-indexer experimental-attention-variant is-hybrid-model patch-dim num-classes"),
    *flags(NEVER, DENSE, "num-experts"),
    *flags(
        NEVER,
        GROUPED,
        """
        multi-latent-attention q-lora-rank kv-lora-rank qk-head-dim qk-pos-emb-head-dim v-head-dim cache-mla-latents
        rotary-scaling-factor
        """,
    ),
    *flags(
        NEVER,
        "rollouts come from SGLang or the embedded engine",
        """
        flash-decode max-tokens-to-oom use-legacy-static-engine decode-only-cuda-graphs enable-chunked-prefill
        """,
    ),
    *flags(NEVER, "it belongs to Megatron's own RL loop; qwench train has slime's flags", "perform-rl-step refit-method"),
    *flags(NEVER, "it belongs to an experiment of Megatron", "use-kitchen-attention use-mup"),
)

PLANNED: tuple[ForeignFlag, ...] = (
    *planned("a place of its own for the critic; each checkpoint of --save holds it in its folder critic", "critic-save"),
    *planned("a choice of FP8 layers", "extra-high-precision-layers-hf extra-high-precision-layers-megatron"),
    *planned(
        "other divisions of a pipeline; --decoder-first-pipeline-num-layers and --decoder-last-pipeline-num-layers divide it",
        """
        account-for-embedding-in-pipeline-split
        account-for-loss-in-pipeline-split pipeline-model-parallel-layout
        """,
    ),
    *planned(
        "FP8 training, which needs Transformer Engine",
        """
        fp8-format fp8-recipe fp8-param-gather first-last-layers-bf16 num-layers-at-start-in-bf16 num-layers-at-end-in-bf16
        """,
    ),
)

REFUSED_PREFIXES: Mapping[str, str] = {
    "moe-": DENSE,
    "fsdp-": "Qwench's own flags set up FSDP2, see qwench train --help",
    "mla-": GROUPED,
    "mscale": GROUPED,
    **dict.fromkeys(
        ["dsa-", "linear-", "hybrid-", "mamba-", "gdp-", "mhc-", "engram-", "heterogeneous-", "mtp-"],
        TEXT_ONLY,
    ),
    "inference-": "rollouts come from SGLang or the embedded engine",
    **dict.fromkeys(["rl-", "grpo-", "langrl-"], "it belongs to Megatron's own RL loop; qwench train has slime's flags"),
    **dict.fromkeys(["lion-", "qk-clip"], "the optimizers are AdamW and Muon"),
    "muon-": "Muon uses Nesterov's momentum and Moonlight's scale, on each of q, k and v apart",
    **dict.fromkeys(
        ["bert-", "ict-", "biencoder-", "retro-", "vision-", "swin-", "dino-", "img-", "fim-", "titles-data-", "block-data-"],
        "it belongs to other models and their data",
    ),
    **dict.fromkeys(
        ["kitchen-", "mup-", "gtp-", "megatron-fsdp-", "logits-save-", "logits-load-", "symmetric-"],
        "it belongs to an experiment of Megatron",
    ),
}
"""First part of a name -> why no flag that begins so is taken."""

ACCEPTED_PREFIXES: Mapping[str, str] = {
    "cuda-graph-": "CUDA graphs of training change speed alone",
    "one-logger": MEGATRON_LOOP,
    "inprocess-": MEGATRON_LOOP,
    "straggler-": MEGATRON_LOOP,
    "rerun-": MEGATRON_LOOP,
    "error-injection-": MEGATRON_LOOP,
    "fault-injector-": MEGATRON_LOOP,
    "workload-": MEGATRON_LOOP,
    "flight-recorder-": MEGATRON_LOOP,
    "otel-": MEGATRON_LOOP,
    "msc-": MEGATRON_LOOP,
    "adlr-autoresume": MEGATRON_LOOP,
    "replication": MEGATRON_LOOP,
}
"""First part of a name -> why every flag that begins so changes nothing."""
