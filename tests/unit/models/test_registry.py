from qwench.models.registry import find_size


def test_instruct_2507_differs_in_the_rotary_base():
    assert find_size("4B-Instruct-2507").rope_theta == 5e6
    assert find_size("4B").rope_theta == 1e6
