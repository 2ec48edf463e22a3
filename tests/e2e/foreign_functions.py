"""Functions as users of slime and miles write them; test_foreign_functions names them by import path.

Each appends what it saw to the file of the environment variable CALLS.
"""

import asyncio
import json
import os
from pathlib import Path

import torch
from miles.rollout.base_types import GenerateFnOutput, RolloutFnEvalOutput, RolloutFnTrainOutput
from miles.rollout.inference_rollout.inference_rollout_common import InferenceRolloutFn
from slime.rollout.data_source import RolloutDataSource
from slime.rollout.filter_hub.base_types import DynamicFilterOutput
from slime.rollout.rm_hub import async_rm
from slime.rollout.rm_hub.math_dapo_utils import compute_score
from slime.rollout.sglang_rollout import GenerateState
from slime.utils.async_utils import run
from slime.utils.http_utils import get, post
from slime.utils.types import Sample

LOCK = asyncio.Semaphore(4)


def note(**record):
    with Path(os.environ["CALLS"]).open("a") as file:
        file.write(json.dumps(record) + "\n")


def digits(text):
    return sum(character in "0123456789" for character in text) / max(1, len(text))


async def reward(args, sample, **kwargs):
    assert isinstance(sample, Sample), type(sample)
    async with LOCK:
        await asyncio.sleep(0)
    note(name="reward", status=sample.status.name, turns=getattr(sample, "num_turns", None), length=sample.response_length)
    return {"score": digits(sample.response), "acc": 0.0}


def plain_reward(args, sample, **kwargs):
    note(name="plain_reward", dapo=compute_score("Answer: 7", "7")["score"])
    return digits(sample.response)


def one_point(args, sample, **kwargs):
    return 1.0


async def batched_reward(args, samples, **kwargs):
    note(name="batched_reward", count=len(samples), group=len({sample.group_index for sample in samples}))
    return [digits(sample.response) for sample in samples]


async def generate_with_tools(args, sample, sampling_params):
    """Turns by input ids, with tool output between them that is not trained on."""
    state = GenerateState(args)
    url = f"http://{args.sglang_router_ip}:{args.sglang_router_port}/generate"
    prompt_ids = state.tokenizer(sample.prompt, add_special_tokens=False)["input_ids"]
    response_ids, mask, log_probs, turns = [], [], [], 0
    for turns in (1, 2):
        params = {**sampling_params, "max_new_tokens": 4}
        answer = await post(url, {"input_ids": prompt_ids + response_ids, "sampling_params": params, "return_logprob": True})
        drawn = answer["meta_info"]["output_token_logprobs"]
        response_ids += [token for _, token, *_ in drawn]
        log_probs += [log_prob for log_prob, *_ in drawn]
        mask += [1] * len(drawn)
        if answer["meta_info"]["finish_reason"]["type"] == "abort":
            sample.status = Sample.Status.ABORTED
            return sample
        if turns == 1:
            tool = state.tokenizer(" 12 ", add_special_tokens=False)["input_ids"]
            response_ids, log_probs, mask = response_ids + tool, log_probs + [0.0] * len(tool), mask + [0] * len(tool)
    sample.tokens, sample.response_length = prompt_ids + response_ids, len(response_ids)
    sample.response, sample.loss_mask, sample.rollout_log_probs = state.tokenizer.decode(response_ids), mask, log_probs
    sample.num_turns, sample.status = turns, Sample.Status.TRUNCATED
    args.scratch = turns  # args can be written to
    note(name="generate_with_tools", trained=sum(mask), context=len(mask) - sum(mask), writable=args.scratch)
    return sample


async def generate_with_search(args, sample, sampling_params, evaluation=False):
    """One turn by text, over the wire, appended by the sample's own method; two samples of one execution."""
    import aiohttp  # noqa: PLC0415  # as such functions bring their own client

    url = f"http://{args.sglang_router_ip}:{args.sglang_router_port}"
    assert (await get(f"{url}/workers"))["workers"] == [{"url": url}]
    payload = {"text": sample.prompt, "sampling_params": sampling_params, "return_logprob": True}
    async with aiohttp.ClientSession() as client, client.post(f"{url}/generate", json=payload) as reply:
        answer = await reply.json()
    drawn = answer["meta_info"]["output_token_logprobs"]
    sample.tokens = GenerateState(args).tokenizer(sample.prompt)["input_ids"]
    sample.append_response_tokens(
        args, tokens=[token for _, token, *_ in drawn], log_probs=[value for value, *_ in drawn],
        meta_info=answer["meta_info"], text=answer["text"],
    )  # fmt: skip
    sample.validate()
    note(name="generate_with_search", evaluation=evaluation, versions=sample.weight_versions, status=sample.status.name)
    return sample


async def play_task(args, sample, sampling_params):
    """A task of an environment: the prompt is its number, and the environment gives the reward."""
    state = GenerateState(args)
    url = f"http://{args.sglang_router_ip}:{args.sglang_router_port}/generate"
    ids = state.tokenizer(f"task {int(sample.prompt)}")["input_ids"]
    answer = await post(url, {"input_ids": ids, "sampling_params": sampling_params, "return_logprob": True})
    drawn = answer["meta_info"]["output_token_logprobs"]
    sample.tokens = ids + [token for _, token, *_ in drawn]
    sample.response_length, sample.response = len(drawn), answer["text"]
    sample.rollout_log_probs, sample.status = [value for value, *_ in drawn], Sample.Status.COMPLETED
    sample.reward = digits(sample.response)
    note(name="play_task", task=sample.prompt, prompt_length=len(ids))
    return sample


async def generate_in_one(input):  # noqa: A002  # the name tells the form
    """The newer form of miles: one argument."""
    sample = input.sample
    url = f"http://{input.args.sglang_router_ip}:{input.args.sglang_router_port}/generate"
    ids = input.state.tokenizer(sample.prompt)["input_ids"]
    answer = await post(url, {"input_ids": ids, "sampling_params": input.sampling_params, "return_logprob": True})
    drawn = answer["meta_info"]["output_token_logprobs"]
    sample.tokens = ids
    tokens, log_probs = [token for _, token, *_ in drawn], [value for value, *_ in drawn]
    sample.append_response_tokens(tokens=tokens, log_probs=log_probs, meta_info=answer["meta_info"], text=answer["text"])
    note(name="generate_in_one", evaluation=input.evaluation, hops=input.args.max_hops, style=input.args.hop_style)
    return GenerateFnOutput(samples=sample)


def add_hops(parser):
    parser.add_argument("--max-hops", type=int, default=1)
    parser.add_argument("--hop-style", choices=["short", "long"], default="short")


generate_in_one.add_arguments = add_hops


def generate_rollout(args, rollout_id, data_source, evaluation=False):
    """A whole rollout by a plain function that runs coroutines."""
    groups = data_source.get_samples(args.rollout_batch_size)

    async def answer(sample):
        params = {"temperature": 1.0, "max_new_tokens": 6, "no_stop_trim": True, "skip_special_tokens": False}
        sample = await generate_with_search(args, sample, params)
        sample.reward = await reward(args, sample)
        return sample

    async def all_of_them():
        return [list(await asyncio.gather(*(answer(sample) for sample in group))) for group in groups]

    made = run(all_of_them())
    note(name="generate_rollout", rollout_id=rollout_id, groups=len(made), siblings=len(made[0]))
    return RolloutFnTrainOutput(samples=made, metrics={"rollout/mine": 3.0})


def roll_and_evaluate(args, rollout_id, data_source, evaluation=False):
    """One function for both, as a script without --eval-function-path means."""
    return (evaluate if evaluation else generate_rollout)(args, rollout_id, data_source, evaluation=evaluation)


class WithMetrics(InferenceRolloutFn):
    """The built-in rollout and evaluation of miles, with metrics of its own."""

    async def _call_train(self, input):  # noqa: A002  # the name tells the form
        output = await super()._call_train(input)
        rewards = [sample.reward for group in output.samples for sample in group]
        note(name="WithMetrics", rollout_id=input.rollout_id, rewards=len(rewards), groups=len(output.samples))
        return RolloutFnTrainOutput(samples=output.samples, metrics={**output.metrics, "rollout/mine": sum(rewards)})

    async def _call_eval(self, input):  # noqa: A002
        output = await super()._call_eval(input)
        note(name="WithMetrics", sets=sorted(output.data), samples=len(output.data["held_out"]["samples"]))
        return output


def evaluate(args, rollout_id, data_source, evaluation=False):
    note(name="evaluate", evaluation=evaluation)
    return RolloutFnEvalOutput(data={"mine": {"rewards": [{"score": 1.0}, {"score": 0.0}], "truncated": [True, False]}})


def keep_if_any(args, samples, **kwargs):
    rewards = [sample.get_reward_value(args) for sample in samples]
    note(name="keep_if_any", rewards=len(rewards))
    return DynamicFilterOutput(keep=True, reason=None)


def remove_first(args, groups):
    for group in groups:
        group[0].remove_sample = True
    note(name="remove_first", groups=len(groups))


def see_all(args, groups, data_source):
    note(name="see_all", groups=len(groups))


def centre(args, samples):
    raw = [sample.get_reward_value(args) for sample in samples]
    mean = sum(raw) / len(raw)
    note(name="centre", count=len(samples))
    return raw, [value - mean for value in raw]


def half_of_the_data(args, samples):
    """Make training data as the built-in conversion does, of the better half, with rewards around their mean."""
    samples = sorted(samples, key=lambda sample: -sample.reward)[: len(samples) // 2]
    mean = sum(sample.reward for sample in samples) / len(samples)
    note(name="half_of_the_data", count=len(samples))
    return {
        "tokens": [sample.tokens for sample in samples],
        "response_lengths": [sample.response_length for sample in samples],
        "rewards": [sample.reward - mean for sample in samples],
        "raw_reward": [sample.reward for sample in samples],
        "sample_indices": [sample.index for sample in samples],
        "loss_masks": [sample.loss_mask for sample in samples],
        "rollout_log_probs": [sample.rollout_log_probs for sample in samples],
    }


def log_rollout(rollout_id, args, samples, rollout_extra_metrics, rollout_time):
    note(name="log_rollout", rollout_id=rollout_id, count=len(samples), turns=getattr(samples[0], "num_turns", None))
    return False


def log_evaluation(rollout_id, args, data, extra_metrics):
    note(name="log_evaluation", sets=sorted(data), count=len(next(iter(data.values()))["samples"]))
    return True


async def hook(args, sample, rollout_id=None):
    sample.metadata["hooked"] = rollout_id
    note(name="hook", builtin=await async_rm(args, sample))
    return sample


def rewards_as_advantages(args, rollout_data):
    """Set the advantage of every token to the reward of its sample, as a function of slime does."""
    rollout_data["advantages"] = [
        torch.full((length,), reward)
        for length, reward in zip(rollout_data["response_lengths"], rollout_data["rewards"], strict=True)
    ]
    rollout_data["returns"] = rollout_data["advantages"]
    note(name="rewards_as_advantages", count=len(rollout_data["tokens"]), estimator=args.advantage_estimator)


def drop_half(args, rollout_id, rollout_data):
    """Leave nothing to learn from in the second half of the data."""
    half = len(rollout_data["advantages"]) // 2
    for values in rollout_data["advantages"][half:]:
        values.zero_()
    entropy = float(torch.cat(rollout_data["entropy"]).mean())
    firsts = [float(values[0]) for values in rollout_data["advantages"]]
    note(name="drop_half", rollout_id=rollout_id, first=firsts, entropy=entropy)


def correct_gap(args, *, pg_loss, train_log_probs, rollout_log_probs, loss_masks, total_lengths, response_lengths, **kwargs):
    """Weigh all tokens by 1/2, and keep the first half of each response."""
    masks = [mask * (torch.arange(len(mask)) < len(mask) / 2) for mask in loss_masks]
    gap, kept = len(train_log_probs) - len(rollout_log_probs), int(sum(mask.sum() for mask in masks))
    note(name="correct_gap", use_tis=args.use_tis, samples=len(loss_masks), gap=gap, kept=kept)
    return pg_loss / 2, masks, {"halves": torch.full_like(pg_loss, 0.5)}


def reduce_by_constant(total_lengths, response_lengths, loss_masks, calculate_per_token_loss=False):
    """Divide by a constant in place of the number of tokens."""
    note(name="reduce_by_constant", samples=len(loss_masks), tokens=int(sum(mask.sum() for mask in loss_masks)))
    return lambda values: sum((x * m).sum() / 100 for x, m in zip(values.split(response_lengths), loss_masks, strict=True))


def clipped_loss(args, batch, logits, sum_of_sample_mean):
    """Compute the clipped policy loss from logits, as a loss of slime and miles does."""
    assert logits.dim() == 3 and logits.dtype == torch.float32
    logits, log_probs, end = logits.squeeze(0) / args.rollout_temperature, [], 0
    for tokens, total, length in zip(batch["unconcat_tokens"], batch["total_lengths"], batch["response_lengths"], strict=True):
        end += total
        rows = logits[end - length - 1 : end - 1].log_softmax(-1)
        log_probs.append(rows.gather(1, tokens[-length:, None])[:, 0])
    ratio = (torch.cat(log_probs) - torch.cat(batch["log_probs"])).exp()
    advantages = torch.cat(batch["advantages"])
    loss = sum_of_sample_mean(torch.max(-ratio * advantages, -ratio.clamp(0.8, 1.2) * advantages))
    return loss, {"pg_loss": loss.clone().detach(), "mine": sum_of_sample_mean(torch.ones_like(ratio))}


class HardestFirst(RolloutDataSource):
    """Extend slime's and miles' own source: every prompt gets a mark, and the positions are noted."""

    def get_samples(self, num_samples):
        groups = super().get_samples(num_samples)
        note(name="get_samples", count=len(groups), offset=self.sample_offset, prompts=[group[0].prompt for group in groups])
        for sample in (sample for group in groups for sample in group):
            sample.metadata["mark"] = len(sample.prompt)
        return groups

    def save(self, rollout_id):
        note(name="save", rollout_id=rollout_id)
        super().save(rollout_id)


def marked_reward(args, sample, **kwargs):
    note(name="marked_reward", mark=sample.metadata["mark"] == len(sample.prompt))
    return digits(sample.response)


def at_start(args):
    note(name="at_start", layers=args.num_layers)


def before_log_probs(args, model, store_prefix):
    note(name="before_log_probs", prefix=store_prefix, chunks=len(model), names=len(list(model[0].named_parameters())))


def before_step(args, rollout_id, step_id, model, optimizer, opt_param_scheduler):
    note(name="before_step", at=[rollout_id, step_id], groups=len(optimizer.param_groups), chunks=len(model))


def after_write(args, version_dir, rollout_engines):
    files = sorted(path.name for path in Path(version_dir).iterdir())
    note(name="after_write", folder=Path(version_dir).name, engines=len(rollout_engines), config="config.json" in files)


def after_save(args, rollout_id, checkpoint_dir, hf_checkpoint_dir):
    note(
        name="after_save",
        rollout_id=rollout_id,
        whole=(Path(checkpoint_dir) / "meta.json").exists(),
        exported=hf_checkpoint_dir,
    )
