"""Stand-ins for the modules of `slime` and `miles` that user functions import.

They are found only where the real package is not installed, and only while a user's function loads; where its module has
imported one of them they stay, for the imports inside its functions. A name that is not offered fails with the reason.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from statistics import stdev
from types import ModuleType
from typing import Any

from transformers import AutoTokenizer

from qwench.errors import QwenchError
from qwench.foreign import built_in, session, stand_in_sources
from qwench.foreign.built_in import MultiTurnLossMaskGenerator
from qwench.foreign.sample import (
    DynamicFilterOutput,
    Foreign,
    GenerateFnInput,
    GenerateFnOutput,
    RolloutFnConstructorInput,
    RolloutFnEvalInput,
    RolloutFnEvalOutput,
    RolloutFnTrainInput,
    RolloutFnTrainOutput,
    Sample,
    SampleStatus,
    leaves,
)
from qwench.plugins import load_object
from qwench.rollout.filters import MIN_STD

ROOTS = ("slime", "miles")


class SingletonMeta(type):
    """Classes of it have one instance."""

    _instances: dict[type, Foreign] = {}  # of the metaclass itself

    def __call__(cls, *args: Foreign, **kwargs: Foreign) -> Foreign:
        """Return the instance; the first call makes it."""
        if cls not in cls._instances:
            cls._instances[cls] = super().__call__(*args, **kwargs)
        return cls._instances[cls]


def load_tokenizer(name_or_path: str, chat_template_path: str | None = None, **kwargs: Foreign) -> Foreign:
    """Load a tokenizer, with the chat template of a file."""
    tokenizer = AutoTokenizer.from_pretrained(name_or_path, **kwargs)
    if chat_template_path is not None:
        tokenizer.chat_template = Path(chat_template_path).read_text(encoding="utf-8")
    return tokenizer


def load_processor(*_: Foreign, **__: Foreign) -> None:
    """Return nothing: models read text."""


def encode_image_for_rollout_engine(image: Foreign) -> str:
    """Refuse an image.

    Raises:
        QwenchError: always.
    """
    raise QwenchError(f"models read text, and encode_image_for_rollout_engine got {type(image).__name__}.")


def check_reward_nonzero_std(args: Foreign, samples: Sequence[Sample], **_: Foreign) -> DynamicFilterOutput:
    """Keep a group whose rewards differ."""
    rewards = [float(sample.get_reward_value(args)) for sample in leaves(samples)]
    keep = len(rewards) > 1 and stdev(rewards) > MIN_STD
    return DynamicFilterOutput(keep=keep, reason=None if keep else f"zero_std_{round(rewards[0], 1)}")


def check_reward_nonzero_std_with_fallback(args: Foreign, samples: Sequence[Sample], **_: Foreign) -> DynamicFilterOutput:
    """Keep a group whose rewards differ, and any group where another would have to be generated in its place."""
    return replace(check_reward_nonzero_std(args, samples), keep_when_insufficient=True)


def check_no_aborted(args: Foreign, samples: Sequence[Sample], **_: Foreign) -> DynamicFilterOutput:
    """Keep a group none of whose samples was aborted."""
    keep = all(sample.status is not SampleStatus.ABORTED for sample in leaves(samples))
    return DynamicFilterOutput(keep=keep, reason=None if keep else "group_has_aborted")


def call_dynamic_filter(function: Foreign, *args: Foreign, **kwargs: Foreign) -> DynamicFilterOutput:
    """Call a filter; none keeps everything."""
    answer = DynamicFilterOutput(keep=True) if function is None else function(*args, **kwargs)
    return answer if isinstance(answer, DynamicFilterOutput) else DynamicFilterOutput(keep=bool(answer))


async def generate(args: Foreign, sample: Sample, sampling_params: dict[str, Any]) -> Sample:
    """Write the response in one request."""
    state = session.GenerateState(args)
    prompt_ids = state.tokenizer(sample.prompt, add_special_tokens=False)["input_ids"]
    if not sample.tokens:
        sample.tokens = list(prompt_ids)
    url = f"http://{args.sglang_router_ip}:{args.sglang_router_port}/generate"
    payload = {"input_ids": sample.tokens, "sampling_params": sampling_params, "return_logprob": True}
    answer = await session.post(url, payload)
    drawn = answer["meta_info"]["output_token_logprobs"]
    sample.append_response_tokens(
        args,
        tokens=[token for _, token, *_ in drawn],
        log_probs=[log_prob for log_prob, *_ in drawn],
        meta_info=answer["meta_info"],
        text=answer["text"],
    )
    return sample


async def generate_in_one(input: GenerateFnInput) -> GenerateFnOutput:  # noqa: A002  # the name tells the form
    """Write the response in one request, in the newer form of miles."""
    return GenerateFnOutput(samples=await generate(input.args, input.sample, input.sampling_params))


async def generate_and_rm(args: Foreign, sample: Sample, sampling_params: dict[str, Any], evaluation: bool = False) -> Sample:
    """Write the response, and grade it by the built-in reward."""
    sample = await generate(args, sample, sampling_params)
    if sample.reward is None and sample.status is not Sample.Status.ABORTED:
        sample.reward = await session.grade(args, sample)
    return sample


def all_gather_with_cp(tensor: Foreign, total_length: int, response_length: int) -> Foreign:
    """Return the values of a response as they are: functions get whole responses."""
    return tensor


def slice_log_prob_with_cp(log_prob: Foreign, total_length: int, response_length: int) -> Foreign:
    """Return the values of a response as they are: functions give whole responses."""
    return log_prob


def get_model_url(args: Foreign, model_name: str, endpoint: str = "/generate") -> str:
    """Return where the policy is reached; all engines serve it."""
    return f"http://{args.sglang_router_ip}:{args.sglang_router_port}{endpoint}"


class MetricGatherer:
    """Counts why a dynamic filter dropped groups."""

    def __init__(self) -> None:
        self._reasons: Counter[str] = Counter()

    def on_dynamic_filter_drop(self, reason: str | None) -> None:
        """Count one group."""
        if reason:
            self._reasons[reason] += 1

    def collect(self) -> dict[str, int]:
        """Return the counts as metrics."""
        return {f"rollout/dynamic_filter/drop_{reason}": count for reason, count in self._reasons.items()}


_TYPES = {"Sample": Sample, "RolloutBatch": dict[str, Any]}
_OUTPUTS: Mapping[str, Foreign] = {
    one.__name__: one
    for one in (
        RolloutFnConstructorInput,
        RolloutFnTrainInput,
        RolloutFnTrainOutput,
        RolloutFnEvalInput,
        RolloutFnEvalOutput,
        GenerateFnInput,
        GenerateFnOutput,
    )
}
_WHOLE = {"all_gather_with_cp": all_gather_with_cp, "slice_log_prob_with_cp": slice_log_prob_with_cp}
MODULES: Mapping[str, Mapping[str, Foreign]] = {
    "utils.types": _TYPES,
    "utils.http_utils": {"post": session.post, "get": session.get, "wait_http_ok": session.wait_http_ok},
    "utils.misc": {"load_function": load_object, "SingletonMeta": SingletonMeta},
    "utils.async_utils": {"run": session.run},
    "utils.mask_utils": {"MultiTurnLossMaskGenerator": MultiTurnLossMaskGenerator},
    "utils.processing_utils": {
        "load_tokenizer": load_tokenizer,
        "load_processor": load_processor,
        "encode_image_for_rollout_engine": encode_image_for_rollout_engine,
    },
    "rollout.base_types": {
        **_OUTPUTS,
        "RolloutFnInput": RolloutFnTrainInput,
        "RolloutFnOutput": RolloutFnTrainOutput,
    },
    "rollout.sglang_rollout": {
        "GenerateState": session.GenerateState,
        "generate": generate,
        "generate_and_rm": generate_and_rm,
        "get_model_url": get_model_url,
        "generate_rollout": built_in.generate_rollout,
    },
    "rollout.data_source": {
        "DataSource": stand_in_sources.DataSource,
        "RolloutDataSource": stand_in_sources.RolloutDataSource,
        "RolloutDataSourceWithBuffer": stand_in_sources.RolloutDataSourceWithBuffer,
    },
    "rollout.generate_hub.single_turn": {"generate": generate_in_one},
    "rollout.inference_rollout.inference_rollout_common": {
        "GenerateState": session.GenerateState,
        "InferenceRolloutFn": built_in.InferenceRolloutFn,
    },
    "rollout.rm_hub": {
        "async_rm": session.grade,
        "batched_async_rm": session.grade_all,
        "grade_answer_verl": built_in.grade_answer,
    },
    "rollout.rm_hub.math_utils": {"extract_answer": built_in.extract_answer, "grade_answer_verl": built_in.grade_answer},
    "rollout.rm_hub.math_dapo_utils": {"compute_score": built_in.compute_score},
    "rollout.rm_hub.deepscaler": {"get_deepscaler_rule_based_reward": built_in.grade_after_thinking},
    "rollout.rm_hub.f1": {"f1_score": built_in.f1_score},
    "rollout.filter_hub.base_types": {
        "DynamicFilterOutput": DynamicFilterOutput,
        "call_dynamic_filter": call_dynamic_filter,
        "MetricGatherer": MetricGatherer,
    },
    "backends.megatron_utils.cp_utils": _WHOLE,
    "backends.training_utils.cp_utils": _WHOLE,
    "rollout.filter_hub.dynamic_sampling_filters": {
        "check_reward_nonzero_std": check_reward_nonzero_std,
        "check_reward_nonzero_std_with_fallback": check_reward_nonzero_std_with_fallback,
        "check_no_aborted": check_no_aborted,
    },
}
"""Module below `slime` or `miles` -> its names."""
_PACKAGES = frozenset(".".join(parts[:depth]) for parts in (name.split(".") for name in MODULES) for depth in range(len(parts)))


class _Loader(importlib.abc.Loader):
    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        """Let the machinery make it."""
        return None

    def exec_module(self, module: ModuleType) -> None:
        """Fill it, and let what it lacks fail with the reason."""
        below = module.__name__.partition(".")[2]
        module.__dict__.update(MODULES.get(below, {}))

        def refuse(name: str) -> Foreign:
            if name.startswith("__"):
                raise AttributeError(name)
            known = ", ".join(MODULES.get(below, ())) or "nothing"
            raise ImportError(f"{module.__name__}.{name} is not part of Qwench; this stand-in of the module offers {known}")

        module.__dict__["__getattr__"] = refuse


class StandIns(importlib.abc.MetaPathFinder):
    """Finds what nothing before it has found."""

    def __init__(self) -> None:
        self.was_used = False

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """Return the stand-in of a module of slime or miles, and refuse those that have none."""
        root, _, below = fullname.partition(".")
        if root not in ROOTS:
            return None
        if below not in MODULES and below not in _PACKAGES:
            raise ModuleNotFoundError(
                f"{fullname} is not part of Qwench; of {root} it has stand-ins of {', '.join(sorted(MODULES))}", name=fullname
            )
        self.was_used = True
        return importlib.machinery.ModuleSpec(fullname, _Loader(), is_package=below in _PACKAGES)


_finder = StandIns()


@contextmanager
def stand_ins() -> Iterator[None]:
    """Offer the stand-ins while a user's function loads, and further where it has taken one."""
    if _finder in sys.meta_path:
        yield
        return
    sys.meta_path.append(_finder)
    try:
        yield
    finally:
        if not _finder.was_used:
            sys.meta_path.remove(_finder)


def keep_stand_ins() -> None:
    """Let the stand-ins stay: a module imports them when its functions are called."""
    _finder.was_used = True


def withdraw() -> None:
    """Forget the stand-ins and the modules made of them."""
    if _finder in sys.meta_path:
        sys.meta_path.remove(_finder)
    _finder.was_used = False
    for name in [one for one, module in sys.modules.items() if isinstance(getattr(module, "__loader__", None), _Loader)]:
        del sys.modules[name]
