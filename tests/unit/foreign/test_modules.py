"""Stand-ins of small functions of slime and miles."""

import asyncio
from argparse import Namespace

import pytest
from aiohttp import web

from qwench.errors import QwenchError
from qwench.foreign.modules import (
    MODULES,
    MetricGatherer,
    all_gather_with_cp,
    call_dynamic_filter,
    check_no_aborted,
    check_reward_nonzero_std,
    check_reward_nonzero_std_with_fallback,
    encode_image_for_rollout_engine,
    get_model_url,
    load_processor,
    load_tokenizer,
    slice_log_prob_with_cp,
)
from qwench.foreign.sample import DynamicFilterOutput, Sample, SampleStatus
from qwench.foreign.session import wait_http_ok
from qwench.models.built_tokenizers import build_small_tokenizer

ARGS = Namespace(reward_key=None)


def rewarded(*rewards):
    return [Sample(reward=reward) for reward in rewards]


def test_filters_of_the_references_keep_what_theirs_keep():
    # torch.tensor([0.5, 0.5 + 1e-6]).std() is 7.1e-7: not above 1e-6
    dropped = DynamicFilterOutput(keep=False, reason="zero_std_0.7")
    assert (
        check_reward_nonzero_std(ARGS, rewarded(0.66, 0.66 + 1e-6)) == check_reward_nonzero_std(ARGS, rewarded(0.66)) == dropped
    )
    assert check_reward_nonzero_std(ARGS, [rewarded(0.5, 0.5), rewarded(0.6)]).keep
    assert check_reward_nonzero_std_with_fallback(ARGS, rewarded(1, 1)) == DynamicFilterOutput(
        keep=False, reason="zero_std_1.0", keep_when_insufficient=True
    )
    aborted = [*rewarded(1), [Sample(status=SampleStatus.ABORTED)]]
    assert check_no_aborted(ARGS, aborted) == DynamicFilterOutput(keep=False, reason="group_has_aborted")
    assert check_no_aborted(ARGS, rewarded(1, 0)) == DynamicFilterOutput(keep=True)


def test_a_dynamic_filter_is_called_with_all_it_is_given_and_none_keeps_everything():
    kept = DynamicFilterOutput(keep=True)
    assert call_dynamic_filter(None, ARGS, []) == kept
    calls = []

    def keep(args, samples, **more):
        calls.append((args, samples, more))
        return [kept, 0][len(calls) - 1]

    answers = [call_dynamic_filter(keep, ARGS, ["a"], step=3) for _ in range(2)]
    assert answers == [kept, DynamicFilterOutput(keep=False)] and calls == [(ARGS, ["a"], {"step": 3})] * 2


def test_dropped_groups_are_counted_by_their_reason():
    gatherer = MetricGatherer()
    for reason in ("same", "short", None, "same", ""):
        gatherer.on_dynamic_filter_drop(reason)
    assert gatherer.collect() == {"rollout/dynamic_filter/drop_same": 2, "rollout/dynamic_filter/drop_short": 1}


def test_a_class_of_the_singleton_type_is_made_once_with_its_first_arguments():
    class State(metaclass=MODULES["utils.misc"]["SingletonMeta"]):
        def __init__(self, *values, **more):
            self.given = values, more

    class Other(State):
        pass

    first = State(1, a=2)
    assert State(3) is first and first.given == ((1,), {"a": 2})
    assert type(Other(4)) is Other and Other(5).given == ((4,), {})


def test_functions_get_whole_responses_text_and_one_address():
    assert all_gather_with_cp("values", 9, 3) == slice_log_prob_with_cp("values", 9, 3) == "values"
    address = Namespace(sglang_router_ip="10.0.0.1", sglang_router_port=30)
    assert get_model_url(address, "any") == "http://10.0.0.1:30/generate"
    assert get_model_url(address, "any", "/v1/models") == "http://10.0.0.1:30/v1/models"
    assert load_processor("any") is None
    with pytest.raises(QwenchError, match="models read text, and encode_image_for_rollout_engine got bytes"):
        encode_image_for_rollout_engine(b"")


def test_a_tokenizer_gets_the_chat_template_of_a_file(tmp_path):
    build_small_tokenizer().save_pretrained(tmp_path)
    (tmp_path / "mine.jinja").write_text("{{ messages[0].content }}!")
    tokenizer = load_tokenizer(str(tmp_path), chat_template_path=str(tmp_path / "mine.jinja"))
    assert tokenizer.apply_chat_template([{"role": "user", "content": "q"}], tokenize=False) == "q!"


def test_an_address_is_waited_for_until_it_answers_with_200(monkeypatch):
    asked = []

    async def answer(request: web.Request) -> web.Response:
        asked.append((request.method, await request.text()))
        return web.Response(status=200 if len(asked) == 3 else 503)

    async def wait() -> None:
        app = web.Application()
        app.router.add_route("*", "/", answer)
        runner = web.AppRunner(app)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        url = f"http://127.0.0.1:{runner.addresses[0][1]}/"
        await wait_http_ok(url, json_payload={"a": 1}, timeout=60.0)
        with pytest.raises(TimeoutError, match="was not ready after 0 s: status 503"):
            await wait_http_ok(url, timeout=0)
        await runner.cleanup()

    monkeypatch.setattr("qwench.foreign.session._RETRY_S", 0.0)
    asyncio.run(wait())
    assert asked == [("POST", '{"a": 1}')] * 3 + [("GET", "")]
    assert MODULES["utils.http_utils"]["wait_http_ok"] is wait_http_ok


NAMES = {
    "utils.types": "Sample RolloutBatch",
    "utils.http_utils": "post get wait_http_ok",
    "utils.misc": "load_function SingletonMeta",
    "utils.async_utils": "run",
    "utils.mask_utils": "MultiTurnLossMaskGenerator",
    "utils.processing_utils": "load_tokenizer load_processor encode_image_for_rollout_engine",
    "rollout.base_types": (
        "RolloutFnConstructorInput RolloutFnTrainInput RolloutFnTrainOutput RolloutFnEvalInput RolloutFnEvalOutput "
        "GenerateFnInput GenerateFnOutput RolloutFnInput RolloutFnOutput"
    ),
    "rollout.sglang_rollout": "GenerateState generate generate_and_rm get_model_url generate_rollout",
    "rollout.data_source": "DataSource RolloutDataSource RolloutDataSourceWithBuffer",
    "rollout.generate_hub.single_turn": "generate",
    "rollout.inference_rollout.inference_rollout_common": "GenerateState InferenceRolloutFn",
    "rollout.rm_hub": "async_rm batched_async_rm grade_answer_verl",
    "rollout.rm_hub.math_utils": "extract_answer grade_answer_verl",
    "rollout.rm_hub.math_dapo_utils": "compute_score",
    "rollout.rm_hub.deepscaler": "get_deepscaler_rule_based_reward",
    "rollout.rm_hub.f1": "f1_score",
    "rollout.filter_hub.base_types": "DynamicFilterOutput call_dynamic_filter MetricGatherer",
    "rollout.filter_hub.dynamic_sampling_filters": (
        "check_reward_nonzero_std check_reward_nonzero_std_with_fallback check_no_aborted"
    ),
    "backends.megatron_utils.cp_utils": "all_gather_with_cp slice_log_prob_with_cp",
    "backends.training_utils.cp_utils": "all_gather_with_cp slice_log_prob_with_cp",
}


def test_the_names_that_scripts_of_slime_and_miles_import_are_there():
    assert {module: set(names) for module, names in MODULES.items()} == {
        module: set(names.split()) for module, names in NAMES.items()
    }
