"""One rank's worth of vLLM's distributed state, so that its real layers can be built in this process."""

import pytest
import torch
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.distributed import cleanup_dist_env_and_memory, init_distributed_environment, initialize_model_parallel


@pytest.fixture(scope="module")
def vllm_state(tmp_path_factory):
    address = f"file://{tmp_path_factory.mktemp('rendezvous') / 'store'}"
    threads = torch.get_num_threads()
    with set_current_vllm_config(VllmConfig()):
        init_distributed_environment(1, 0, address, 0, "gloo")
        initialize_model_parallel()
        yield
        cleanup_dist_env_and_memory()
    torch.set_num_threads(threads)
