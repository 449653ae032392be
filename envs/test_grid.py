"""What grid does, against numbers worked out by hand."""

import gymnasium
import pytest
from gymnasium.utils.env_checker import check_env


@pytest.mark.parametrize("task", ["Grid-v0", "Corridor-v0", "LongCorridor-v0"])
def test_the_small_worlds_pass_the_gymnasium_checker(task):
    check_env(gymnasium.make(task, disable_env_checker=True).unwrapped, skip_render_check=True)
