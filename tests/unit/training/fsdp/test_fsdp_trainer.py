"""The backend on one rank, in this process: precision, reference, sharing, buckets, checkpoints."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM

from qwench.algorithms.columns import MicroBatch, RolloutBatch, TokenLoss
from qwench.config.sections.lora import LoraConfig
from qwench.config.sections.optimizer import OptimizerConfig
from qwench.config.sections.training import TrainingConfig
from qwench.errors import CheckpointError, ConfigError
from qwench.models.hf import load_hf_config
from qwench.training.batch import pack
from qwench.training.fsdp import fsdp_trainer
from qwench.training.fsdp.fsdp_trainer import FsdpTrainer
from qwench.training.fsdp.optimizer import local_shard
from qwench.training.process_group import init_process_group
from qwench.training.reference import Reference
from tests.contract.train_backend_cases import write_model
from tests.deadlines import patient
from tests.fakes.sections import adamw, offloaded
from tests.fakes.trainer import take_step
from tests.unit.training.fsdp.tiny import tiny_model
from tests.verbs import run_verb

pytestmark = pytest.mark.usefixtures("process_group")

_CPU = torch.device("cpu")
_ADAM = adamw(weight_decay=0.0, clip_grad=0.0)


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(3)
    tiny_model().to(torch.bfloat16).save_pretrained(folder)
    return folder


def _build(
    folder: Path,
    *,
    adam: OptimizerConfig = _ADAM,
    dtype: torch.dtype = torch.float32,
    training: TrainingConfig | None = None,
    dp_replicate: int = 1,
    **model: object,
) -> FsdpTrainer:
    return FsdpTrainer.build(
        folder,
        training=training or TrainingConfig(),
        optimizer=adam,
        total_steps=1,
        param_dtype=dtype,
        device=_CPU,
        dp_replicate=dp_replicate,
        **model,
    )


def _micro_batches() -> list[MicroBatch]:
    draw = torch.Generator().manual_seed(0)
    batch = RolloutBatch(
        tokens=[torch.randint(32, (length,), generator=draw) for length in (6, 9, 4)],
        loss_mask=[torch.ones(length - 2, dtype=torch.bool) for length in (6, 9, 4)],
        rewards=torch.zeros(3),
        graded=torch.ones(3, dtype=torch.bool),
        group_ids=torch.zeros(3, dtype=torch.int64),
        execution_ids=torch.arange(3),
    )
    return [pack(batch, [0, 2]), pack(batch, [1])]


def _mean_loss(log_probs, entropy, micro_batch) -> TokenLoss:
    return TokenLoss(loss=-log_probs.sum() / 13, metrics={})


def _train(backend: FsdpTrainer, steps: int = 1) -> list[float]:
    return [take_step(backend, _micro_batches(), _mean_loss, temperature=1.0, with_entropy=False).loss for _ in range(steps)]


def _published(backend: FsdpTrainer) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for bucket in backend.weights(bucket_bytes=1 << 20) for name, tensor in bucket}


def test_masters_keep_steps_that_bfloat16_would_lose(model_folder: Path):
    backend = _build(model_folder, adam=replace(_ADAM, lr=2e-6), dtype=torch.bfloat16)
    before = _published(backend)
    _train(backend)
    after_one = _published(backend)
    _train(backend, steps=200)
    moved = _published(backend)
    name = "model.layers.0.mlp.up_proj.weight"
    assert after_one[name].dtype == torch.bfloat16
    large = before[name].abs() > 0.01
    # One step of 2e-6 is far below half a bfloat16 ulp (2e-5) of these weights; 200 of them are not.
    assert (after_one[name] == before[name])[large].all()
    assert (moved[name] != before[name])[large].float().mean() > 0.5
    assert all(torch.equal(tensor, moved[name]) for name, tensor in backend.shared_weights().items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("flags", "moves"),
    [
        ({"freeze_params_name_list": ("embed_tokens", r"layers\.0\.")}, lambda name: "embed" not in name and ".0." not in name),
        ({"only_train_params_name_list": (r"layers\.0\..*_proj",)}, lambda name: ".0." in name and "_proj" in name),
    ],
)
def test_frozen_parameters_take_no_gradient_no_moments_and_stay(model_folder, tmp_path, dtype, flags, moves):
    training = TrainingConfig(**flags)
    backend, whole = (_build(model_folder, dtype=dtype, training=each) for each in (training, TrainingConfig()))
    before = _published(backend)
    assert _train(backend) == pytest.approx(_train(whole), rel=1e-5)
    first = _published(backend)
    _train(backend, steps=2)
    after = _published(backend)
    assert {name for name in before if not torch.equal(before[name], after[name])} == {name for name in before if moves(name)}
    assert 0 < sum(map(moves, before)) < len(before)
    if dtype == torch.float32:  # without clipping a step is that of the whole model
        of_whole = _published(whole)
        assert all(torch.allclose(first[name], of_whole[name], atol=1e-6) for name in before if moves(name))
    assert {name.rsplit(".exp_avg", 1)[0] for name in backend._optimizer.moments()} == {name for name in before if moves(name)}
    backend.save(tmp_path)
    loaded = _build(model_folder, dtype=dtype, training=training)
    loaded.load(tmp_path)
    assert all(torch.equal(after[name], weight) for name, weight in _published(loaded).items())
    assert _train(loaded, steps=2) == _train(backend, steps=2)
    unfrozen = _build(model_folder, dtype=dtype)
    unfrozen.load(tmp_path, weights_only=True)  # the folder holds the frozen weights too
    assert all(torch.equal(after[name], weight) for name, weight in _published(unfrozen).items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_reference_scores_as_the_policy_did_and_the_policy_comes_back_exactly(model_folder: Path, dtype: torch.dtype):
    backend, undisturbed = _build(model_folder, dtype=dtype), _build(model_folder, dtype=dtype)
    first = backend.forward(_micro_batches(), temperature=0.7).log_probs
    reference_model = Reference(backend)
    assert _train(backend, steps=2) == _train(undisturbed, steps=2)
    referenced = reference_model.forward(_micro_batches(), temperature=0.7).log_probs
    assert all(torch.equal(scored, wanted) for scored, wanted in zip(referenced, first, strict=True))
    assert not torch.equal(backend.forward(_micro_batches(), temperature=0.7).log_probs[0], first[0])
    # Masters restored in bfloat16 only would show within these steps.
    assert _train(backend, steps=3) == _train(undisturbed, steps=3)
    assert all(torch.equal(_published(undisturbed)[name], tensor) for name, tensor in _published(backend).items())


def test_shared_weights_follow_every_update_without_another_call(model_folder: Path):
    backend = _build(model_folder)
    shared = backend.shared_weights()
    assert shared is not None
    before = {name: tensor.clone() for name, tensor in shared.items()}
    _train(backend)
    assert all(not torch.equal(shared[name], before[name]) for name in shared)
    assert all(torch.equal(shared[name], tensor) for name, tensor in _published(backend).items())
    assert not any(tensor.requires_grad for tensor in shared.values())


def test_buckets_respect_their_size_and_hold_everything_once(model_folder: Path):
    backend = _build(model_folder, dtype=torch.bfloat16)
    buckets = [list(bucket) for bucket in backend.weights(bucket_bytes=1024)]
    sizes = [sum(tensor.nbytes for _, tensor in bucket) for bucket in buckets]
    assert all(size <= 1024 or len(bucket) == 1 for size, bucket in zip(sizes, buckets, strict=True))
    assert len(buckets) < sum(map(len, buckets)), "small tensors share a bucket"
    checkpoint = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.bfloat16)
    weights = dict(checkpoint.named_parameters())
    published = [entry for bucket in buckets for entry in bucket]
    assert sorted(name for name, _ in published) == sorted(weights)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in published)


def test_vectors_are_not_decayed(model_folder: Path):
    decaying = replace(_ADAM, weight_decay=10.0)
    plain, decayed = _build(model_folder), _build(model_folder, adam=decaying)
    before = _published(plain)
    _train(plain)
    _train(decayed)
    for name, weight in _published(decayed).items():
        expected = _published(plain)[name]
        if weight.ndim == 2:
            expected = expected - 1e-3 * 10.0 * before[name]
        torch.testing.assert_close(weight, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("optimizer", ["adam", "muon", "adam8bit"])
def test_every_weight_is_stepped_by_one_optimizer(model_folder: Path, optimizer: str):
    backend = _build(model_folder, adam=replace(_ADAM, optimizer=optimizer, weight_decay=0.25))
    groups = backend._optimizer._param_groups
    held = {local_shard(weight).data_ptr(): weight for weight in backend._weights.values()}
    stepped = [shard for group in groups for shard in group["params"]]
    assert len(stepped) == len(held) and {shard.data_ptr() for shard in stepped} == held.keys()
    vectors = [group for group in groups if group["params"][0].ndim == 1]
    assert [(group["weight_decay"], {shard.ndim for shard in group["params"]}) for group in vectors] == [(0.0, {1})]


def test_a_loaded_checkpoint_goes_on_bit_for_bit(model_folder: Path, tmp_path: Path):
    backend = _build(model_folder)
    _train(backend, steps=2)
    torch.manual_seed(8)
    backend.save(tmp_path)
    drawn = torch.rand(3)
    onward = _train(backend, steps=2)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["lr_scheduler", "model", "optimizer", "rng.pt"]

    resumed = _build(model_folder)
    resumed.load(tmp_path)
    assert torch.equal(torch.rand(3), drawn)
    assert _train(resumed, steps=2) == onward
    assert all(torch.equal(_published(resumed)[name], tensor) for name, tensor in _published(backend).items())


def test_a_converted_checkpoint_goes_on_bit_for_bit_where_optimizer_and_base_fit_it(model_folder: Path, tmp_path: Path):
    backend = _build(model_folder)
    _train(backend, steps=2)
    backend.save(tmp_path / "fsdp")
    onward, trained = _train(backend, steps=2), _published(backend)
    words = ["--input", tmp_path / "fsdp", "--output", tmp_path / "dist", "--to", "torch_dist", "--hf-checkpoint", model_folder]
    run_verb(["convert", *map(str, words)])
    init_process_group(_CPU, environ={}, timeout_s=patient(60))  # the verb has left it
    folder = tmp_path / "dist" / "release"
    resumed = _build(model_folder)
    resumed.load(folder, with_rng=False)
    assert _train(resumed, steps=2) == onward
    assert all(torch.equal(_published(resumed)[name], tensor) for name, tensor in trained.items())
    with pytest.raises(ConfigError, match=r"has AdamW's state of all weights, .* muon has its own; give --no-load-optim"):
        _build(model_folder, adam=replace(_ADAM, optimizer="muon")).load(folder)
    lora = LoraConfig(lora_rank=2, lora_base="nf4")
    with pytest.raises(ConfigError, match=r"--lora-base nf4 reads Hugging Face checkpoints; convert .* to one"):
        _build(folder, lora=lora, hf_config=load_hf_config(model_folder))


def test_loading_weights_only_leaves_a_fresh_optimizer(model_folder: Path, tmp_path: Path):
    backend = _build(model_folder)
    _train(backend, steps=3)
    backend.save(tmp_path)
    torch.manual_seed(1)
    fresh = _build(model_folder)
    state = torch.get_rng_state()
    fresh.load(tmp_path, weights_only=True)
    assert torch.equal(torch.get_rng_state(), state)
    before = _published(fresh)
    assert all(torch.equal(before[name], tensor) for name, tensor in _published(backend).items())
    _train(fresh)
    # The first step of Adam has the size of the learning rate wherever the gradient is not tiny.
    step = (_published(fresh)["model.norm.weight"] - before["model.norm.weight"]).abs()
    torch.testing.assert_close(step, torch.full_like(step, 1e-3), rtol=1e-2, atol=0)


def test_a_checkpoint_without_optimizer_says_so(model_folder: Path, tmp_path: Path):
    backend = _build(model_folder)
    _train(backend)
    backend.save(tmp_path, with_optimizer=False)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["model", "rng.pt"]
    with pytest.raises(CheckpointError, match="--no-load-optim"):
        _build(model_folder).load(tmp_path)
    fresh = _build(model_folder)
    fresh.load(tmp_path, weights_only=True)
    assert all(torch.equal(_published(fresh)[name], tensor) for name, tensor in _published(backend).items())


def test_the_generators_can_be_left_alone(model_folder: Path, tmp_path: Path):
    backend = _build(model_folder)
    torch.manual_seed(8)
    backend.save(tmp_path)
    torch.manual_seed(9)
    state = torch.get_rng_state()
    backend.load(tmp_path, with_rng=False)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_checkpoint_before_the_first_step_loads(model_folder: Path, tmp_path: Path):
    _build(model_folder).save(tmp_path)
    resumed = _build(model_folder)
    resumed.load(tmp_path)
    assert _train(resumed) == _train(_build(model_folder))


def test_a_missing_or_foreign_checkpoint_is_named(model_folder: Path, tmp_path: Path):
    backend = _build(model_folder)
    with pytest.raises(CheckpointError, match=str(tmp_path / "absent" / "model")):
        backend.load(tmp_path / "absent")
    write_model(tmp_path / "foreign", tied=True)
    (tmp_path / "saved").mkdir()
    _build(tmp_path / "foreign").save(tmp_path / "saved")
    with pytest.raises(CheckpointError, match="Is it whole, and of the same model"):
        backend.load(tmp_path / "saved")


def test_sleep_on_a_cpu_leaves_shared_weights_usable(model_folder: Path):
    backend = _build(model_folder)
    _train(backend)
    shared = backend.shared_weights()
    backend.sleep()
    assert all(tensor.isfinite().all() for tensor in shared.values())
    backend.wake()
    assert _train(backend)


def test_sleep_on_a_device_keeps_there_what_an_engine_computes_with(model_folder: Path):
    backend, lent = _build(model_folder), _build(model_folder)
    lent.shared_weights()
    kept = []
    for trainer in (backend, lent):
        _train(trainer)
        weights = [local_shard(weight) for weight in trainer._weights.values()]
        before = [weight.clone() for weight in weights]
        trainer.device = torch.device("meta")  # not a CPU
        trainer.sleep()
        kept.append({weight.untyped_storage().nbytes() > 0 for weight in weights})
        trainer.wake()
        trainer.device = _CPU
        assert all(torch.equal(*pair) for pair in zip(weights, before, strict=True))
    assert kept == [{False}, {True}]
    assert _train(backend) == _train(lent)


def test_the_state_of_the_optimizer_is_made_before_the_first_step_if_asked_for(model_folder: Path):
    backend = _build(model_folder)
    [optimizer] = backend._optimizer._optimizers
    assert not optimizer.state
    backend.prepare_steps()
    assert len(optimizer.state) == len(backend._weights)


def test_a_trainer_that_sleeps_does_nothing_else(model_folder: Path, tmp_path: Path):
    backend = _build(model_folder)
    scoring = {"temperature": 1.0, "with_entropy": False}
    backend.forward_backward(_micro_batches(), _mean_loss, **scoring, after_each=lambda: None)  # sleep drops its gradients
    backend.device = torch.device("meta")  # not a CPU
    backend.sleep()
    for work in (
        backend.sleep,
        partial(backend.forward, _micro_batches(), **scoring),
        partial(backend.forward_backward, _micro_batches(), _mean_loss, **scoring, after_each=lambda: None),
        lambda: list(backend.weights(bucket_bytes=1 << 20)),
        backend.copy_held_weights,
        partial(backend.copy_for_frozen, model_folder),
        partial(backend.save, tmp_path),
        partial(backend.save_held_weights, tmp_path),
        partial(backend.load, tmp_path),
    ):
        with pytest.raises(AssertionError, match=r"^wake\(\) comes first"):
            work()
    backend.wake()
    backend.device = _CPU
    assert _train(backend) == _train(_build(model_folder))


def test_weights_are_placed_in_float32_unless_the_host_has_their_masters(model_folder: Path, monkeypatch: pytest.MonkeyPatch):
    placed, place_policy = [], fsdp_trainer.place_policy

    def watch(model, architecture, place, **options):
        placed.append(place.stored_dtype)
        return place_policy(model, architecture, place, **options)

    monkeypatch.setattr(fsdp_trainer, "place_policy", watch)
    for adam in (_ADAM, offloaded(_ADAM, 0.5), offloaded(_ADAM, 1.0)):
        _build(model_folder, adam=adam, dtype=torch.bfloat16)
    assert placed == [torch.float32, torch.bfloat16, torch.bfloat16]


def test_gradients_are_reduced_once_a_step_unless_they_are_too_large_to_be_whole(model_folder: Path):
    backend = _build(model_folder)
    num_bytes = 4 * sum(weight.numel() for weight in backend._weights.values())
    told = []
    backend._policy.reduce_in_next_backward = lambda *, whole, is_last: told.append((whole, is_last))
    for num_shards, most, each in ((2, num_bytes - 1, True), (2, num_bytes, False), (1, 0, False)):
        trainer = FsdpTrainer(
            backend._policy,
            backend._optimizer,
            backend._architecture,
            device=_CPU,
            mesh={"dp_shard": SimpleNamespace(size=lambda number=num_shards: number)},
            param_dtype=torch.float32,
            whole_gradient_bytes=most,
        )
        trainer.forward_backward(_micro_batches(), _mean_loss, temperature=1.0, with_entropy=False, after_each=lambda: None)
        assert told[-2:] == [(each, False), (True, True)]


def test_replicas_must_divide_the_ranks(model_folder: Path):
    with pytest.raises(ConfigError, match="--dp-replicate 2 does not divide the 1 ranks"):
        _build(model_folder, dp_replicate=2)


def test_deterministic_mode_is_torchs(model_folder: Path):
    try:
        _build(model_folder, training=TrainingConfig(deterministic_mode=True))
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)
