"""Joining ranks: alone, as a launcher's environment says, and under torchrun."""

import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from qwench.training.fsdp.parallelize import build_mesh
from qwench.training.process_group import init_process_group
from tests.deadlines import patient

_CPU = torch.device("cpu")
_SCRIPT = """
import os, torch, torch.distributed as dist
from qwench.training.process_group import init_process_group
init_process_group(torch.device("cpu"), environ=os.environ, timeout_s=60)
total = torch.tensor([dist.get_rank() + 1.0])
dist.all_reduce(total)
assert total.item() == 3.0, total
dist.destroy_process_group()
"""


def _free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


@pytest.mark.parametrize("launched", [False, True], ids=["alone", "by-a-launcher"])
def test_a_group_of_one(launched: bool):
    address = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": _free_port()}
    init_process_group(_CPU, environ=address if launched else {}, timeout_s=patient(30))
    try:
        init_process_group(_CPU, environ={}, timeout_s=patient(30))  # a second call finds it
        assert (dist.get_rank(), dist.get_world_size(), dist.get_backend()) == (0, 1, "gloo")
        mesh = build_mesh(_CPU, dp_replicate=1)
        assert (mesh.mesh_dim_names, mesh.size()) == (("dp_shard",), 1)
    finally:
        dist.destroy_process_group()


def test_two_ranks_under_torchrun(tmp_path: Path):
    script = tmp_path / "ranks.py"
    script.write_text(_SCRIPT)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2"]
    command = [*torchrun, "--master-addr=127.0.0.1", f"--master-port={_free_port()}", str(script)]
    finished = subprocess.run(command, cwd=Path(__file__).parents[4], capture_output=True, text=True, timeout=patient(120))
    assert finished.returncode == 0, finished.stderr
