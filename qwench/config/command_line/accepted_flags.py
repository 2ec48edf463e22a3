"""Flags of slime, miles and Megatron that are accepted because they change nothing here.

Some name what is always so. Others have an effect in the reference and none here, and a warning names them (`told`).
"""

from __future__ import annotations

from qwench.config.command_line.foreign_flag import ANY, OFF, ON, ForeignFlag, flags

CI = "it belongs to slime's and miles' own test harness"
ARCHITECTURE = "config.json describes the architecture"
BUFFER_SERVER = "rollouts come from the engines, not from a buffer server"
MEGATRON_LOOP = "it belongs to Megatron's own training loop, which slime and miles never run"

ACCEPTED: tuple[ForeignFlag, ...] = (
    # What is always so here.
    *flags(("0",), "Qwen3 has no dropout", "attention-dropout hidden-dropout"),
    *flags(ON, "gradients are always accumulated and reduced in float32", "accumulate-allreduce-grads-in-fp32"),
    *flags(ON, "the softmax of attention is always computed in float32", "attention-softmax-in-fp32"),
    *flags(("auto", "flash", "fused", "unfused", "local"), "--attn-implementation chooses the kernel", "attention-backend"),
    *flags(ON, "optimizer state is always sharded over data-parallel ranks", "use-distributed-optimizer"),
    *flags(ON, "training is in bfloat16 on GPUs; see --train-dtype", "bf16"),
    *flags(ON, "the Megatron model is always that of Megatron-Core", "use-mcore-models"),
    *flags(("true", "false"), "models are those that transformers knows", "trust-remote-code"),
    *flags(("kv_cache weight", "weight kv_cache"), "an engine that sleeps gives both back", "offload-rollout-level"),
    *flags(("strict",), "roles, contents and calls of repeated messages are compared", "session-message-matcher"),
    *flags(("canonical_lora", "lora"), "each projection has its own A and B", "lora-type", told=True),
    *flags(OFF, "float16 training needs loss scaling, which Qwench does not do; training is in bfloat16", "fp16"),
    *flags(
        ("true", "false"), "logits are always computed in chunks and recomputed in the backward pass", "recompute-loss-function"
    ),
    *flags(
        ANY,
        "evaluations sample with the engines' own weights, and write no snapshots",
        "eval-hf-dir eval-keep-snapshots",
        told=True,
    ),
    *flags(
        ANY,
        "engines of --eval-num-gpus have --rollout-num-gpus-per-engine, which changes speed and memory, not results",
        "eval-num-gpus-per-engine",
        told=True,
    ),
    *flags(ON, "checksums confirm every publication", "check-weight-update-equal"),
    *flags(
        ON,
        "engines get whole weights with the adapters merged, confirmed by checksums",
        "lora-sync-from-tensor lora-base-cpu-backup check-lora-weight-equal",
    ),
    *flags(("all", "target"), "there is no draft model", "check-weight-update-selector"),
    *flags(("torch_dist",), "checkpoints are torch_dist", "ckpt-format"),
    *flags(("constant",), "weight decay is constant", "weight-decay-incr-style"),
    *flags(ANY, "weight decay is constant", "start-weight-decay end-weight-decay", same_as="weight-decay"),
    *flags(ON, "master weights are always float32", "keep-fp32-master"),
    *flags(("cpu",), "offloaded state rests in host memory", "offload-train-target"),
    *flags(ON, "names are used as they are given", "disable-wandb-random-suffix"),
    *flags(ANY, "the tokenizer is that of --hf-checkpoint", "tokenizer-model sglang-tokenizer-path", same_as="hf-checkpoint"),
    *flags(("HuggingFaceTokenizer",), "the tokenizer is that of --hf-checkpoint", "tokenizer-type"),
    *flags(ON, "tokenizers are always the fast ones", "tokenizer-hf-use-fast"),
    *flags(
        ("qwen3_dense_true_on_policy_v1",),
        "there is one set of kernels, which --true-on-policy-mode chooses",
        "true-on-policy-contract sglang-true-on-policy-contract",
    ),
    *flags(
        ANY,
        "engines register with no router that runs already, and requests go to the engines themselves",
        "sglang-router-ip",
        told=True,
    ),
    *flags(ANY, "an engine address implies it", "rollout-external", same_as="rollout-external-engine-addrs"),
    *flags(ON, "positions are rotary", "no-position-embedding"),
    *flags(("rope",), ARCHITECTURE, "rope-type"),
    *flags(("*qwen*",), ARCHITECTURE, "model-name"),
    *flags(OFF, ARCHITECTURE, "rotary-interleaved"),
    *flags(("vanilla",), ARCHITECTURE, "softmax-type"),
    *flags(("0",), ARCHITECTURE, "glu-linear-offset mtp-num-layers"),
    *flags(("0",), "no server takes commands during a run", "control-server-port"),
    *flags(ANY, "there are no layers that predict several tokens", "mtp-loss-scaling-factor"),
    *flags(("fla",), "Qwen3 has full attention", "qwen-gdn-backend linear-attention-backend"),
    *flags(("cuda", "hip"), "Qwench runs on NVIDIA and AMD GPUs, not on Ascend NPUs", "sglang-device"),
    # What has a default there that changes nothing.
    *flags(("-1",), BUFFER_SERVER, "fetch-trajectory-retry-times"),
    *flags(("1",), BUFFER_SERVER, "min-batch-collection-ratio"),
    *flags(("math",), "--rm-type chooses the reward", "rollout-task-type"),
    *flags(("torch",), "--record-memory-history uses PyTorch's own recorder", "memory-recorder"),
    *flags(("fp32",), "masters are always float32, and gradients are summed in it", "main-params-dtype main-grads-dtype"),
    *flags(ON, "the flags always set the learning rates", "override-opt-param-scheduler override-lr-scheduler"),
    # What has an effect in the reference and none here.
    *flags(ANY, CI, "ci-train-rollout-logprob-abs-diff-threshold"),
    *flags(ANY, "the environment of the process sets the proxy", "http-proxy", told=True),
    *flags(ANY, "packed batches are not padded", "data-pad-size-multiplier"),
    *flags(ANY, "the driver reads all rows at the start, without worker processes", "num-workers", told=True),
    *flags(
        ANY,
        "a checkpoint is complete before training goes on, so nothing of it is written in the background",
        "async-save",
        told=True,
    ),
    *flags(ANY, "--recompute-granularity selective recomputes attention", "recompute-activations", told=True),
    *flags(ANY, "--optimizer-cpu-offload puts optimizer state on the host", "offload-optimizer-states", told=True),
    *flags(("broadcast", "p2p", "disk-delta"), "it says where bytes travel", "update-weight-transfer-mode", told=True),
    *flags(
        ANY,
        "weights reach every engine by --update-weight-transport",
        """
        sglang-remote-instance-weight-loader-start-seed-via-transfer-engine
        """,
        told=True,
    ),
    *flags(
        ("1",),
        "an engine is one server with one copy of the model; --rollout-num-gpus gives more engines",
        """
        sglang-dp-size sglang-ep-size
        """,
    ),
    *flags(
        ANY,
        "it steers assertions in the tests of slime and miles, which change no result",
        """
        ci-test ci-disable-kl-checker ci-disable-logprobs-checker ci-disable-weight-update-checker
        """,
        told=True,
    ),
    *flags(
        ("raw", "bridge"),
        "Hugging Face weights are read and written directly",
        """
        megatron-to-hf-mode
        """,
        told=True,
    ),
    *flags(ANY, "the plan of the run counts the memory", "train-memory-margin-bytes", told=True),
    *flags(
        ANY,
        "telemetry; the report, the metrics and the logs of the run show it",
        """
        use-miles-dashboard dashboard-flush-interval dashboard-gpu-sample-interval dashboard-sglang-scrape-interval
        dashboard-sglang-scrape-mode dashboard-sglang-metrics dashboard-forward-prometheus env-report
        """,
        told=True,
    ),
    *flags(
        ANY,
        "it says where bytes travel or rest, not what is computed",
        """
        update-weight-mode update-weight-delta-encoding update-weight-delta-checksum update-weight-local-checkpoint-dir
        p2p-transfer-num-workers p2p-transfer-timeout object-store-backend mooncake-store-init-kwargs
        mooncake-replica-num rollout-data-transport use-distributed-post release-train low-memory-resume
        rematerialize-param-from-master-weight check-rematerialize-param-from-master-weight pin-rollout-manager-to-head
        delay-split-train-data-by-dp qkv-format use-miles-router miles-router-timeout miles-router-max-connections
        miles-router-health-check-failure-threshold offload-train-disk-chunk-mb
        """,
        told=True,
    ),
    *flags(
        ANY,
        "checksums confirm every tensor of every publication",
        """
        check-weight-update-skip-list check-weight-update-allow-quant-error
        """,
    ),
    *flags(
        ANY,
        "it says where state is gathered, not what is computed",
        """
        fsdp-state-dict-cpu-offload fsdp-cpu-backend
        """,
        told=True,
    ),
    *flags(ANY, "nothing reads it in miles either", "warmup-ratio wandb-run-name", told=True),
    *flags(
        ANY,
        "it chooses a kernel by speed or rounding; --attn-implementation chooses here",
        """
        use-flash-attn no-gradient-accumulation-fusion no-rope-fusion no-bias-swiglu-fusion no-bias-gelu-fusion
        no-bias-dropout-fusion no-masked-softmax-fusion no-persist-layer-norm cross-entropy-loss-fusion
        cross-entropy-fusion-impl disable-jit-fuser use-te-activation-func disable-bf16-reduced-precision-matmul
        te-rng-tracker use-fused-weighted-squared-relu batch-invariant-backend fused-residual-rmsnorm
        use-transformer-engine-op-fuser flash-attention-version enable-experimental
        """,
        told=True,
    ),
    *flags(
        ANY,
        "it changes when ranks exchange data, not the result",
        """
        cp-comm-type overlap-grad-reduce overlap-param-gather overlap-param-gather-with-optimizer-step
        no-align-param-gather no-align-grad-reduce ddp-num-buckets ddp-bucket-size ddp-average-in-collective
        ddp-pad-buckets-for-high-nccl-busbw ddp-reduce-scatter-with-fp32-accumulation
        num-distributed-optimizer-instances use-ring-exchange-p2p no-overlap-p2p-communication
        overlap-p2p-communication-warmup-flush defer-embedding-wgrad-compute wgrad-deferral-limit delay-wgrad-compute
        tp-comm-overlap tp-comm-overlap-cfg tp-comm-overlap-rs-dgrad tp-comm-bootstrap-backend no-tp-comm-overlap-ag
        no-tp-comm-overlap-rs no-tp-comm-bulk-dgrad no-tp-comm-bulk-wgrad no-tp-comm-split-ag no-tp-comm-split-rs
        pipeline-model-parallel-comm-backend use-tp-pp-dp-mapping high-priority-stream-groups
        nccl-communicator-config-path use-nccl-ub use-sharp sharp-enabled-group distributed-backend
        distributed-timeout-seconds-after-init disable-gloo-process-groups symmetric-ar-type
        num-layers-per-virtual-pipeline-stage num-virtual-stages-per-pipeline-rank
        microbatch-group-size-per-virtual-pipeline-stage no-scatter-gather-tensors-in-pipeline
        no-async-tensor-model-parallel-allreduce
        """,
        told=True,
    ),
    *flags(
        ANY,
        "it changes the memory that Megatron takes, not the result",
        """
        distribute-saved-activations cpu-offloading-num-layers fine-grained-activation-offloading offload-modules
        empty-unused-memory-level no-pin-cpu-grads no-pin-cpu-params use-torch-optimizer-for-cpu-offload manual-gc
        manual-gc-interval
        """,
        told=True,
    ),
    *flags(
        ANY,
        "weights come from a checkpoint, and its vocabulary is never padded on disk",
        """
        use-cpu-initialization no-initialization init-method-std embedding-init-method-std init-method-xavier-uniform
        init-model-with-meta-device data-parallel-random-init make-vocab-size-divisible-by padded-vocab-size
        no-pad-vocab-size
        """,
        told=True,
    ),
    *flags(
        ANY,
        "--max-tokens-per-gpu packs sequences of any length",
        """
        seq-length encoder-seq-length decoder-seq-length
        """,
        told=True,
    ),
    *flags(
        ANY,
        MEGATRON_LOOP,
        """
        train-iters train-samples eval-iters log-interval exit-interval exit-duration-in-mins exit-signal-handler
        skip-train full-validation decrease-batch-size-if-needed iterations-to-skip train-sync-interval
        check-weight-hash-across-dp-replicas-interval lr-decay-samples lr-warmup-samples lr-wsd-decay-samples
        dataloader-type no-create-attention-mask-in-dataloader reset-position-ids reset-attention-mask eod-mask-loss
        num-dataset-builder-threads no-mmap-bin-files mock-data
        """,
        told=True,
    ),
    *flags(
        ANY,
        "checkpoints are always complete torch_dist folders that any layout can read",
        """
        use-dist-ckpt auto-detect-ckpt-format use-persistent-ckpt-worker ckpt-fully-parallel-save
        no-ckpt-fully-parallel-save ckpt-fully-parallel-load ckpt-assume-constant-structure dist-ckpt-strictness
        dist-ckpt-optim-fully-reshardable distrib-optim-fully-reshardable-mem-efficient dist-ckpt-workers async-strategy
        use-checkpoint-args use-mp-args-from-checkpoint-args no-use-tokenizer-model-from-checkpoint-args
        verify-integrity no-save-tokenizer-assets
        """,
        told=True,
    ),
    *flags(
        ANY,
        "a loss or gradient that is not finite always ends the run with its cause",
        """
        check-for-spiky-loss check-for-large-grads no-check-for-nan-in-loss-and-grad
        """,
        told=True,
    ),
    *flags(
        OFF,
        "config.json describes the architecture",
        """
        rotary-seq-len-interpolation-factor use-rope-scaling rope-scaling-factor yarn-original-max-position-embeddings
        yarn-beta-fast yarn-beta-slow window-size window-attn-skip-freq no-rope-freq qk-l2-norm attention-output-gate
        apply-layernorm-1p apply-residual-connection-post-layernorm fp32-residual-connection
        apply-query-key-layer-scaling squared-relu openai-gelu quick-geglu activation-func-clamp-value
        encoder-num-layers
        """,
    ),
    *flags(
        ANY,
        "it is Megatron's own logging; the run logs its own metrics",
        """
        log-throughput log-progress log-timers-to-tensorboard log-memory-to-tensorboard
        log-validation-ppl-to-tensorboard log-world-size-to-tensorboard log-params-norm log-num-zeros-in-grad log-energy
        log-straggler timing-log-level timing-log-option tensorboard-log-interval tensorboard-queue-size wandb-exp-name
        wandb-save-dir wandb-entity logging-level no-barrier-with-level-1-timing result-rejected-tracker-filename
        """,
        told=True,
    ),
    *flags(
        ANY,
        "slime and miles have removed it",
        """
        offload-old-actor offload-ref experimental-offload offload-train-mode disable-weights-backuper
        ref-micro-batch-size disable-recompute-loss-function use-hf-config-for-megatron use-http2 use-token-output
        use-slime-router slime-router-timeout slime-router-max-connections slime-router-health-check-failure-threshold
        miles-router-enable-token-input-for-chat-completions num-proc update-weight-encoding
        """,
        told=True,
    ),
    *flags(
        ANY,
        "CUDA graphs of training change speed alone",
        "enable-cuda-graph external-cuda-graph optimizer-cuda-graph",
        told=True,
    ),
    *flags(
        ANY,
        MEGATRON_LOOP,
        "enable-ft-package calc-ft-timeouts",
        told=True,
    ),
)
