"""The small worlds are as their docstrings say."""

import gymnasium
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

import envs.grid  # noqa: F401, registers the worlds


@pytest.mark.parametrize("task", ["Grid-v0", "Corridor-v0", "LongCorridor-v0"])
def test_the_small_worlds_pass_the_gymnasium_checker(task):
    check_env(gymnasium.make(task, disable_env_checker=True).unwrapped, skip_render_check=True)


@pytest.mark.parametrize(("task", "actions", "best"), [
    ("Grid-v0", [1] * 3 + [3] * 3 + [0] * 54, 55),
    ("Corridor-v0", [2] * 50, 44), ("LongCorridor-v0", [2] * 100, 78)])
def test_the_shortest_way_brings_the_best_return_and_the_time_limit_truncates(task, actions, best):
    env = gymnasium.make(task, disable_env_checker=True)
    env.reset(seed=0)
    steps = [env.step(action) for action in actions]
    assert np.sum([reward for _, reward, *_ in steps]) == best
    assert [truncated for _, _, _, truncated, _ in steps] == [False] * (len(steps) - 1) + [True]
    assert not any(terminated for _, _, terminated, *_ in steps)
