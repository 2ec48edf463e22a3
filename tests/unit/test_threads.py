import os
import subprocess
import sys

import pytest

from qwench.threads import daemon, quota_cores, usable_cores, waiting_defaults


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_a_process_may_use_the_cores_of_its_affinity_mask_or_all_where_there_is_none(tmp_path, monkeypatch):
    assert usable_cores(affinity={3, 5, 7}, proc_file=tmp_path / "none", mount=tmp_path) == 3
    monkeypatch.setattr(os, "sched_getaffinity", {0: {1, 2}}.__getitem__, raising=False)
    assert usable_cores(proc_file=tmp_path / "none", mount=tmp_path) == 2
    monkeypatch.delattr(os, "sched_getaffinity")
    for count, cores in ((6, 6), (None, 1)):
        monkeypatch.setattr(os, "cpu_count", lambda count=count: count)
        assert usable_cores(proc_file=tmp_path / "none", mount=tmp_path) == cores


@pytest.mark.parametrize(
    ("quotas", "cores"),
    [
        ({"job/cpu.max": "150000 100000\n"}, 1),
        ({"job/cpu.max": "50000 100000\n"}, 1),
        ({"job/cpu.max": "max 100000\n"}, 8),
        ({"job/cpu.max": "max 100000\n", "cpu.max": "300000 100000\n"}, 3),
        ({"job/cpu.max": "400000 100000\n", "cpu.max": "300000 100000\n"}, 3),
        ({"job/cpu.max": "nonsense\n"}, 8),
        ({}, 8),
    ],
)
def test_the_quota_of_a_control_group_and_of_those_above_it_bounds_the_cores(tmp_path, quotas, cores):
    for name, text in quotas.items():
        write(tmp_path / "cgroup" / name, text)
    write(tmp_path / "self", "0::/job\n")
    write(tmp_path / "cpu.max", "1000 100000\n")  # above the mount
    assert usable_cores(affinity=set(range(8)), proc_file=tmp_path / "self", mount=tmp_path / "cgroup") == cores


def test_a_control_group_of_the_first_version_has_its_quota_in_two_files(tmp_path):
    folder = tmp_path / "cgroup" / "cpu" / "docker" / "x"
    write(folder / "cpu.cfs_quota_us", "250000\n")
    write(folder / "cpu.cfs_period_us", "100000\n")
    write(tmp_path / "self", "3:memory:/other\n2:cpu,cpuacct:/docker/x\n1:cpuset:/\n")
    assert quota_cores(tmp_path / "self", tmp_path / "cgroup") == 2.5
    write(folder / "cpu.cfs_quota_us", "-1\n")
    assert quota_cores(tmp_path / "self", tmp_path / "cgroup") is None


def test_a_container_sees_its_own_group_at_the_root(tmp_path):
    """With a namespace of its own, the path that the kernel names does not exist under the mount."""
    write(tmp_path / "cgroup" / "cpu.max", "200000 100000\n")
    write(tmp_path / "self", "0::/kubepods/pod7/box\n")
    assert quota_cores(tmp_path / "self", tmp_path / "cgroup") == 2.0


def test_threads_wait_briefly_unless_the_user_says_how():
    assert waiting_defaults({}) == {"GOMP_SPINCOUNT": "1000", "KMP_BLOCKTIME": "1"}
    assert waiting_defaults({"GOMP_SPINCOUNT": "7", "PATH": "/bin"}) == {"KMP_BLOCKTIME": "1"}
    assert waiting_defaults({"OMP_WAIT_POLICY": "active"}) == {}


def test_every_verb_sets_how_threads_wait_before_it_imports_torch(tmp_path):
    code = (
        "import os, sys\n"
        "from qwench import cli\n"
        "def show(words):\n"
        "    print(os.environ['GOMP_SPINCOUNT'], 'torch' in sys.modules)\n"
        "cli.main([], command=show)\n"
    )
    environ = {name: text for name, text in os.environ.items() if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    shown = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, env=environ)
    assert shown.stdout == "1000 False\n"


def test_a_daemon_runs_its_function_and_keeps_no_process_alive():
    said: list[object] = []
    thread = daemon("speaker", lambda *words: said.extend(words), "a", "b")
    assert (thread.name, thread.daemon, said) == ("speaker", True, [])
    thread.start()
    thread.join()
    assert said == ["a", "b"]
