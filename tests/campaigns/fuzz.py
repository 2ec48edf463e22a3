"""Fuzz the engine's HTTP server: `python -m tests.campaigns.fuzz --cases 10000` (needs the extra `fuzz`: schemathesis).

Odd values of every sampling parameter are refused (4xx) or answered (200) by `/generate` and by OpenAI's paths, whole and as
streams, and none ends the engine. Then schemathesis makes
requests, valid and not, from the server's own OpenAPI schema, half of them with the server's token: no answer may be a 5xx but
that the engine waits for weights, which a request with the token may cause. Afterwards the engine samples as before, unless
the token was shown, and holds no row and no page.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterator
from typing import Any

from qwench.engines.embedded.http.serving import ServerThread
from qwench.models.built_tokenizers import build_small_tokenizer
from tests.contract.engine_hosts import make_engine, make_model

Json = Any
TOKEN = "secret"
LASTING = ("group", "distributed", "pause", "release")
"""Routes that wait for other processes, up to ten minutes a request, or change what later requests find."""
HUGE = 10**30
ODD_NUMBERS: tuple[Json, ...] = (-1, 0, 1e-45, 1e300, 2**31, 2**63, HUGE, -HUGE, math.nan, math.inf, None, "1", True, [], {})
ODD_LISTS: tuple[Json, ...] = ([-1], [2**31], [HUGE], [1.5], ["a"], [[]], [None], "a", 7, {}, [1] * 1000)
ODD_TEXTS: tuple[Json, ...] = ("", [""], ["\ud83d"], ["x" * 20_000], ["x"] * 300, ["\0"], [1], 7, {}, [[]])
NUMBERS = ("temperature", "top_p", "top_k", "min_p")
OPENAI_NAMES = {"max_new_tokens": "max_tokens", "min_new_tokens": "min_tokens", "sampling_seed": "seed"}
ODD_FIELDS: dict[str, tuple[Json, ...]] = {
    "n": (0, -1, 129, HUGE, 1.5, "2", []),
    "logprobs": (True, 5, -1, "a"),
    "stream_options": ({}, {"include_usage": "x"}, 7),
    "messages": ([], [{}], [{"role": "user"}], [{"role": "x", "content": "y"}], [{"role": "user", "content": 7}], "x", [[]]),
    "tools": ([{}], [7], [{"type": "function"}], [{"function": {"name": []}}], "x"),
    "chat_template_kwargs": ({"chat_template": "{{ 1/0 }}"}, {"tokenize": True}, {"enable_thinking": []}, {"a b": 1}, 7),
    "prompt": ("", [], [[]], [""], [-1], [HUGE], "\ud83d", ["a", 1], {}, "x" * 200_000),
    "model": ("", "\0", 7, "x" * 10_000),
}
SEED_BODY = {"input_ids": [5, 6, 7], "sampling_params": {"max_new_tokens": 4, "temperature": 0}, "return_logprob": True}


def odd_bodies() -> Iterator[tuple[str, Json]]:
    """Yield what to send: every odd value of every parameter, alone."""
    for name in NUMBERS:
        for value in ODD_NUMBERS:
            yield f"{name}={value!r:.30}", {name: value}
    for value in (-1, HUGE, 1.5, "many"):
        yield f"max_new_tokens={value!r}", {"max_new_tokens": value}
        yield f"min_new_tokens={value!r}", {"min_new_tokens": value}
    for value in ODD_LISTS:
        yield f"stop_token_ids={value!r:.30}", {"stop_token_ids": value}
        yield f"stop_token_ids={value!r:.30} with min_new_tokens", {"stop_token_ids": value, "min_new_tokens": 2}
    for value in ODD_TEXTS:
        yield f"stop={value!r:.30}", {"stop": value}
    for value in (HUGE, -1, 0.5, "a"):
        yield f"sampling_seed={value!r}", {"sampling_seed": value}


def odd_openai_bodies() -> Iterator[tuple[str, str, Json]]:
    """Yield path, name and body: the odd parameters under OpenAI's names, and odd values of the fields of its paths."""
    bases: dict[str, Json] = {
        "/v1/completions": {"prompt": "x", "max_tokens": 2},
        "/v1/chat/completions": {"messages": [{"role": "user", "content": "x"}], "max_tokens": 2},
    }
    for path, base in bases.items():
        for name, params in odd_bodies():
            yield path, name, base | {OPENAI_NAMES.get(key, key): value for key, value in params.items()}
        for field, values in ODD_FIELDS.items():
            for value in values:
                yield path, f"{field}={value!r:.30}", base | {field: value}


def post(url: str, body: Json, *, path: str = "/generate") -> tuple[int, Json]:
    """Send JSON (with NaN and infinity as Python spells them); a stream is returned as text."""
    request = urllib.request.Request(url + path, data=json.dumps(body).encode(), headers={"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            content = response.read().decode()
            return response.status, json.loads(content) if content.startswith(("{", "[")) else content
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode(errors="replace")


def server_info(url: str) -> dict[str, Json]:
    """Return what the server counts."""
    with urllib.request.urlopen(f"{url}/server_info", timeout=60) as response:
        return dict(json.load(response)["stats"])


def is_well(url: str, before: Json) -> list[str]:
    """Return what is wrong with the engine: it must sample as before, and hold nothing."""
    status, answer = post(url, SEED_BODY)
    faults = [] if status == 200 and answer["output_ids"] == before["output_ids"] else [f"it answers {status}: {answer!r:.200}"]
    stats = server_info(url)
    held = {name: stats[name] for name in ("num_running", "num_waiting") if stats[name]}
    if held or stats["num_free_pages"] != stats["num_pages"]:
        faults.append(f"it holds {held} and {stats['num_pages'] - stats['num_free_pages']} pages")
    return faults


def send_odd(url: str) -> tuple[Counter[int], list[str]]:
    """Send every odd body; return the statuses, and what went wrong."""
    _, before = post(url, SEED_BODY)
    statuses, faults = Counter[int](), list[str]()
    for name, params in odd_bodies():
        status, answer = post(url, {"input_ids": [5, 6], "sampling_params": {"max_new_tokens": 2, **params}})
        statuses[status] += 1
        if status >= 500:
            faults.append(f"{name}: {status} {answer!r:.200}")
    for path, name, body in odd_openai_bodies():
        whole, streamed = (post(url, body | {"stream": stream}, path=path) for stream in (False, True))
        statuses.update((whole[0], streamed[0]))
        differ = whole[0] != streamed[0] and "stream_options" not in body
        broken = streamed[0] == 200 and '"error"' in streamed[1]
        if max(whole[0], streamed[0]) >= 500 or differ or broken:
            faults.append(f"{path} {name}: {whole!r:.200} {streamed!r:.200}")
    return statuses, faults + is_well(url, before)


def send_from_schema(url: str, *, num_cases: int, seed: int, token: str | None = None) -> tuple[Counter[int], list[str]]:
    """Send what schemathesis makes of the OpenAPI schema; return the statuses, and what went wrong.

    Args:
        token: shown with every request. Then routes that leave the engine without memory, or paused, are left out.
    """
    import schemathesis  # noqa: PLC0415  # an extra
    from hypothesis import HealthCheck, Phase, given, settings  # noqa: PLC0415  # likewise
    from hypothesis import seed as seeded  # noqa: PLC0415

    _, before = post(url, SEED_BODY)
    schema = schemathesis.openapi.from_url(f"{url}/openapi.json")
    operations = [result.ok() for result in schema.get_all_operations()]
    if token is not None:
        operations = [one for one in operations if not any(word in one.path for word in LASTING)]
    headers = {} if token is None else {"Authorization": f"Bearer {token}"}
    statuses, faults = Counter[int](), list[str]()
    while sum(statuses.values()) < num_cases:  # an operation without arguments makes one case a round
        for operation in operations:

            @seeded(seed)
            @settings(
                max_examples=-(-num_cases // len(operations)), deadline=None, database=None, phases=[Phase.generate],
                suppress_health_check=list(HealthCheck),
            )  # fmt: skip
            @given(case=operation.as_strategy())
            def send(case: Any) -> None:
                response = case.call(timeout=60, headers=headers)
                statuses[response.status_code] += 1
                if response.status_code >= 500 and not (token is not None and "has no weights" in response.text):
                    faults.append(
                        f"{case.method} {case.path}: {response.status_code} {response.text[:200]} for {case.body!r:.200}"
                    )

            send()
        seed += 1
    if token is not None:
        return statuses, faults + ([] if server_info(url) else ["it does not answer /server_info"])
    return statuses, faults + is_well(url, before)


def main(words: list[str]) -> int:
    """Run both parts and print their statuses."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    flags = parser.parse_args(words)
    engine = make_engine(make_model("qwen3"), tokenizer=build_small_tokenizer(), prefix_cache=False)
    with ServerThread(engine, model_path="tiny", token=TOKEN) as server:
        odd, faults = send_odd(server.base_url)
        print(f"odd parameters: {sum(odd.values())} requests, statuses {dict(odd)}, {len(faults)} faults", flush=True)
        for token in (None, TOKEN):
            made, more = send_from_schema(server.base_url, num_cases=flags.cases // 2, seed=flags.seed, token=token)
            shown = "without" if token is None else "with"
            print(
                f"schema, {shown} token: {sum(made.values())} requests, statuses {dict(made)}, {len(more)} faults", flush=True
            )
            faults += more
    for fault in faults[:50]:
        print(fault)
    return int(bool(faults))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
