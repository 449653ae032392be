"""From the name of a task to environments that Director can run."""

import functools
import importlib
import sys

import gymnasium
import numpy as np
from gymnasium import spaces

from envs import UserError
from envs.vector import side_by_side
from envs.wrappers import image_and_state


def make_env(task: str, config) -> gymnasium.Env:
    """One environment for the flags in `config`, a director.Config; raises UserError.

    Observations are a Dict of "image" [64, 64, 3] uint8 and "state" [n] float32, or one of them.
    Actions are Discrete, or continuous and scaled to [-1, 1].
    """
    suite, _, name = task.partition("_")
    wanted = config.obs
    if wanted == "auto" and suite in ("dmc", "pinpad"):
        wanted = "pixels"
    try:
        if suite == "dmc":
            from envs.dmc import DMControl
            env = DMControl(name, wanted, config.render_quality)
        elif suite == "pinpad":
            from envs import pin_pad  # noqa: F401, it registers its environments
            observe = {"pixels": "image"}.get(wanted, wanted)
            env = gymnasium.make(f"PinPad{name.capitalize()}-v0", observe=observe)
        else:
            module, _, name = task.removeprefix("gym_").rpartition(":")
            importlib.import_module(module or "gymnasium")
            env = gymnasium.make(name, disable_env_checker=True)
        env = image_and_state(env, wanted)
    except (gymnasium.error.Error, ImportError) as error:  # or its simulator is not installed
        raise UserError(f"--task {task}: {' '.join(str(error).split())} (Tasks: dmc_<domain>_"
                        "<task>, pinpad_<three..eight>, gym_[<module>:]<id>.)") from error
    space = env.action_space
    if isinstance(space, spaces.Discrete) and space.n > 1:
        return env
    if (isinstance(space, spaces.Box) and len(space.shape) == 1 and space.shape[0] > 0
            and space.is_bounded() and np.issubdtype(space.dtype, np.floating)):
        return gymnasium.wrappers.RescaleAction(env, np.float32(-1), np.float32(1))
    raise UserError(f"--task {task}: acts in {space}, neither Discrete nor a bounded Box of floats")


def vector_envs(config, amount: int):
    """Environments side by side, in a process each where --processes says so: a context manager."""
    processes = config.processes == "yes"
    if config.processes == "auto" and sys.platform != "win32":  # for those that are slow
        processes = config.task.startswith("dmc_") or ":" in config.task
    make = functools.partial(make_env, config.task, config)
    return side_by_side(make, amount, processes)
