from qwench.config.config import Config
from qwench.config.environment import engine_environment, reward_environment, trainer_environment, without_rank
from qwench.config.sections.cluster import ClusterConfig
from qwench.config.sections.engine import EngineConfig
from qwench.config.sections.parallel import ParallelConfig
from qwench.config.sections.training import TrainingConfig


def test_the_variables_of_the_flag_are_set():
    config = Config(cluster=ClusterConfig(train_env_vars={"NCCL_DEBUG": "INFO"}))
    assert trainer_environment(config, {"NCCL_DEBUG": "WARN"}) == {"NCCL_DEBUG": "INFO"}


def test_deterministic_mode_gives_cublas_a_workspace_unless_there_is_one():
    deterministic, own = TrainingConfig(deterministic_mode=True), {"CUBLAS_WORKSPACE_CONFIG": ":16:8"}
    assert trainer_environment(Config(training=deterministic), {}) == {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
    assert trainer_environment(Config(training=deterministic), own) == {}
    config = Config(training=deterministic, cluster=ClusterConfig(train_env_vars=own))
    assert trainer_environment(config, {}) == own


def test_tensor_parallel_ranks_queue_in_order_unless_the_environment_says_otherwise():
    config = Config(parallel=ParallelConfig(tensor_model_parallel_size=2))
    assert trainer_environment(config, {}) == {"CUDA_DEVICE_MAX_CONNECTIONS": "1"}
    assert trainer_environment(config, {"CUDA_DEVICE_MAX_CONNECTIONS": "8"}) == {}


def test_the_nccl_of_trainers_gets_its_memory_as_that_of_sglang_servers_unless_the_environment_says_otherwise():
    config = Config(engine=EngineConfig(rollout_engine="sglang"))
    assert trainer_environment(config, {}) == {"NCCL_CUMEM_ENABLE": "0"}
    assert trainer_environment(config, {"NCCL_CUMEM_ENABLE": "1"}) == {}  # servers inherit it
    assert trainer_environment(Config(engine=EngineConfig(rollout_engine="embedded")), {}) == {}


def test_engines_do_not_inherit_what_was_set_for_the_trainer():
    environ = {"PATH": "/bin", "CUDA_DEVICE_MAX_CONNECTIONS": "1", "NCCL_DEBUG": "WARN"}
    trainers = {"CUDA_DEVICE_MAX_CONNECTIONS": "1", "NCCL_DEBUG": "INFO"}
    assert engine_environment(environ, trainers) == {"PATH": "/bin", "NCCL_DEBUG": "WARN"}


def test_a_process_that_a_rank_starts_is_no_rank_and_a_function_of_the_users_gets_no_key_of_ours():
    ranks = "RANK LOCAL_RANK WORLD_SIZE LOCAL_WORLD_SIZE GROUP_RANK ROLE_RANK MASTER_ADDR MASTER_PORT TORCHELASTIC_RUN_ID"
    ours = {"QWENCH_TOKEN": "a", "QWENCH_JUDGE_KEY": "b"}
    kept = {"PATH": "/bin", "OPENAI_API_KEY": "c", "MY_RANK": "7"}
    environ = {**dict.fromkeys(ranks.split(), "0"), **ours, **kept}
    assert without_rank(environ) == {**ours, **kept}
    assert reward_environment(environ) == kept
