"""The text of `/metrics`."""

from qwench.engines.embedded.http.server import metrics_text
from qwench.engines.protocol import EngineStats

STATS = EngineStats(
    num_running=3, num_waiting=2, num_free_pages=30, num_pages=40, prompt_tokens=200, cached_prompt_tokens=50,
    generated_tokens=70, num_preempted=1, decode_steps=9,
)  # fmt: skip


def values(text: str) -> dict[str, str]:
    return dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))


def test_each_metric_has_its_value_its_kind_and_the_models_name():
    text = metrics_text(STATS, weight_version=5, model="m")
    assert values(text) == {
        'sglang:num_running_reqs{model_name="m"}': "3",
        'sglang:num_queue_reqs{model_name="m"}': "2",
        'sglang:token_usage{model_name="m"}': "0.25",
        'sglang:cache_hit_rate{model_name="m"}': "0.25",
        'sglang:prompt_tokens_total{model_name="m"}': "200",
        'sglang:cached_tokens_total{model_name="m"}': "50",
        'sglang:generation_tokens_total{model_name="m"}': "70",
        'qwench:preempted_requests_total{model_name="m"}': "1",
        'qwench:decode_steps_total{model_name="m"}': "9",
        'qwench:weight_version{model_name="m"}': "5",
    }
    kinds = dict(line.split()[2:4] for line in text.splitlines() if line.startswith("# TYPE"))
    assert all(kind == ("counter" if name.endswith("_total") else "gauge") for name, kind in kinds.items())
    assert len(kinds) == text.count("# HELP") == 10


def test_an_engine_without_pages_or_prompts_divides_by_nothing():
    found = values(metrics_text(EngineStats(), weight_version=0, model="m"))
    assert found['sglang:token_usage{model_name="m"}'] == found['sglang:cache_hit_rate{model_name="m"}'] == "0.0"


def test_a_name_is_one_label_whatever_its_characters():
    text = metrics_text(STATS, weight_version=0, model='a"b\\c\nd')
    assert 'sglang:num_queue_reqs{model_name="a\\"b\\\\c\\nd"} 2' in text.splitlines()
