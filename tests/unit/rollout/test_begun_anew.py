from qwench.rollout.continuous import begun_anew, oldest_version
from qwench.samples import Status
from tests.unit.rollout.scene import group


def test_oldest_version_and_a_fresh_beginning():
    one = group("a", size=2, group_id=4)
    assert oldest_version(one) is None
    one.samples[0].append([1, 2], log_probs=[-0.5, -0.5], version=3)
    one.samples[1].append([1], log_probs=None, version=-1)
    one.samples[1].append([1], log_probs=[-1.0], version=2)
    assert oldest_version(one) == 2
    one.samples[1].append([1], log_probs=[-1.0], version=0)
    assert oldest_version(one) == 0
    fresh = begun_anew(one)
    assert [(s.sample_id, s.group_id, s.response_length, s.status) for s in fresh.samples] == [
        (8, 4, 0, Status.PENDING),
        (9, 4, 0, Status.PENDING),
    ]
