"""`/metrics`: load and counters in Prometheus' text format, under SGLang's names where it has them."""

from __future__ import annotations

from qwench.engines.protocol import EngineStats

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


def metrics_text(stats: EngineStats, *, weight_version: int, model: str) -> str:
    """Return one sample of each metric, labelled with the model's name."""
    used = stats.num_pages - stats.num_free_pages
    metrics = (
        ("sglang:num_running_reqs", "gauge", "Requests that are computed now.", stats.num_running),
        ("sglang:num_queue_reqs", "gauge", "Requests that wait for room.", stats.num_waiting),
        ("sglang:token_usage", "gauge", "Share of the KV cache's pages in use.", used / max(stats.num_pages, 1)),
        ("sglang:cache_hit_rate", "gauge", "Share of all prompt tokens that were cached.",
         stats.cached_prompt_tokens / max(stats.prompt_tokens, 1)),
        ("sglang:prompt_tokens_total", "counter", "Prompt tokens, cached ones included.", stats.prompt_tokens),
        ("sglang:cached_tokens_total", "counter", "Prompt tokens that were cached.", stats.cached_prompt_tokens),
        ("sglang:generation_tokens_total", "counter", "Tokens that were sampled.", stats.generated_tokens),
        ("qwench:preempted_requests_total", "counter", "Preemptions of requests for want of pages.", stats.num_preempted),
        ("qwench:decode_steps_total", "counter", "Forward passes with decoding requests.", stats.decode_steps),
        ("qwench:weight_version", "gauge", "Version of the weights in use.", weight_version),
    )  # fmt: skip
    label = model.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return "".join(
        f'# HELP {name} {meaning}\n# TYPE {name} {kind}\n{name}{{model_name="{label}"}} {value}\n'
        for name, kind, meaning, value in metrics
    )
