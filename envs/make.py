"""From the name of a task to environments that Director can run."""

import functools
import importlib
import multiprocessing
import os
import pathlib
import sys

import gymnasium
import numpy as np
from gymnasium import spaces

from envs import UserError
from envs.vector import side_by_side
from envs.wrappers import (
    ActionRepeat,
    Checked,
    environment_errors,
    image_and_state,
    scale_actions,
    seed_global_generators,
)

LONGEST_EPISODE = 10_000  # steps of the agent; longer ones are truncated


def make_env(task: str, config, index: int = 0) -> gymnasium.Env:
    """Environment number `index` for the flags in `config`, a director.Config; raises UserError.

    Observations are a Dict of "image" [64, 64, 3] uint8 and "state" [n] float32, or one of them.
    Actions are Discrete, or continuous and scaled to [-1, 1].
    """
    suite, _, name = task.partition("_")
    wanted = config.obs
    if wanted == "auto" and suite in ("dmc", "pinpad"):
        wanted = "pixels"
    seed_global_generators(config.seed + index)
    in_process = multiprocessing.parent_process() is not None
    try:
        with environment_errors():
            if suite == "dmc":
                from envs.dmc import DMControl
                env = DMControl(name, wanted, choose_quality(config, {}))
            elif suite == "pinpad":
                from envs import pin_pad  # noqa: F401, it registers its environments
                observe = {"pixels": "image"}.get(wanted, wanted)
                env = gymnasium.make(f"PinPad{name.capitalize()}-v0", observe=observe)
            else:
                module, _, name = task.removeprefix("gym_").rpartition(":")
                import_module(module or "gymnasium", config.logdir)
                env = gymnasium.make(name, disable_env_checker=True)
        env = image_and_state(Checked(env), wanted, quiet=in_process or index > 0)
    except (gymnasium.error.Error, ImportError) as error:  # or its simulator is not installed
        raise UserError(f"--task {task}: {' '.join(str(error).split())} (Tasks: dmc_<domain>_"
                        "<task>, pinpad_<three..eight>, gym_[<module>:]<id>.)") from error
    except MemoryError as error:
        raise UserError(f"--task {task}: there is too little memory for it") from error
    space = env.action_space
    if isinstance(space, (spaces.MultiDiscrete, spaces.MultiBinary)):
        raise UserError(f"--task {task}: acts in {space}. envs.wrappers.combine_actions makes one "
                        "Discrete action of each combination; README.md shows how")
    if isinstance(space, spaces.Box):
        if (len(space.shape) != 1 or space.shape[0] == 0 or not space.is_bounded()
                or not np.issubdtype(space.dtype, np.floating)):
            raise UserError(f"--task {task}: acts in {space}. A Box of actions has to be a vector "
                            "of floats with finite bounds")
        env = scale_actions(env)
    elif not isinstance(space, spaces.Discrete) or space.n < 2:
        raise UserError(f"--task {task}: acts in {space}, neither Discrete with two or more "
                        "actions nor a bounded Box of floats")
    if config.action_repeat > 1:
        env = ActionRepeat(env, config.action_repeat)
    return gymnasium.wrappers.TimeLimit(env, LONGEST_EPISODE)


def import_module(name: str, logdir: str):
    """Import a module that registers environments, also from the current folder.

    Modules and packages inside the folder of a run are refused: a run of someone else must not run
    code.
    """
    if name.startswith("."):
        raise ImportError(f"{name} is not the name of a module")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    if logdir:
        run = real_path(logdir)
        for folder in sys.path:
            parent = real_path(folder)
            for part in name.split("."):
                if run in (parent, *parent.parents) and any(parent.glob(f"{part}*")):
                    raise ImportError(f"the module {name} is inside the run's folder {logdir}")
                parent = real_path(parent / part)
    importlib.import_module(name)


def real_path(path: str | pathlib.Path) -> pathlib.Path:
    """Without links; unlike Path.resolve(), it accepts links that form a loop."""
    return pathlib.Path(os.path.realpath(path))


def choose_quality(config, settings: dict) -> str:
    """What --render_quality auto means for this task; settings: config.json of a resumed run."""
    if config.render_quality != "auto":
        return config.render_quality
    if settings.get("render_quality"):
        return settings["render_quality"]
    if not config.task.startswith("dmc_") or config.obs == "state":
        return "full"  # it is not used
    from envs.dmc import default_quality
    try:
        return default_quality()
    except ImportError as error:
        raise UserError(f"--task {config.task}: {error}") from error


def vector_envs(config, amount: int):
    """Environments side by side, in a process each where --processes says so: a context manager."""
    processes = config.processes == "yes"
    if config.processes == "auto" and sys.platform != "win32":  # for those that are slow
        processes = config.task.startswith("dmc_") or ":" in config.task
    makes = [functools.partial(make_env, config.task, config, index) for index in range(amount)]
    return side_by_side(makes, processes)


def refuse_other_spaces(agent, obs_space: spaces.Dict, act_space: spaces.Space):
    """UserError if a loaded agent was trained with other observations or actions."""
    actions = (type(act_space), spaces.flatdim(act_space))
    if (obs_space, actions) != (agent.obs_space, (type(agent.act_space), agent.sizes["action"])):
        raise UserError(f"--logdir {agent.config.logdir}: holds a run in {agent.obs_space}, "
                        f"{agent.act_space}, not {obs_space}, {act_space}; use its flags, or "
                        "another --logdir")


def check_policy_input(agent, obs: dict, state: dict | None, mode: str):
    """ValueError if observations, state or mode are not what `Director.policy` expects."""
    expected = {key: space.shape for key, space in agent.obs_space.items()}
    found = {key: np.shape(obs[key])[1:] for key in expected if key in obs}
    if found != expected:
        raise ValueError(f"policy needs {expected} of each environment, but got {found}")
    if "image" in expected and np.asarray(obs["image"]).dtype != np.uint8:
        raise ValueError("policy needs images of dtype uint8, 0 to 255")
    if mode not in ("train", "eval"):
        raise ValueError(f"mode {mode!r}: must be 'train' or 'eval'")
    amount = len(obs[next(iter(expected))])
    if state is None:
        return
    first = np.asarray(obs.get("is_first", np.zeros(amount, bool)))
    if first.dtype != bool or first.shape != (amount,) or len(state["deter"]) != amount:
        raise ValueError(f"policy needs is_first, {amount} bools, and a state of as many "
                         f"environments, but got {first.dtype} {first.shape} and a state of "
                         f"{len(state['deter'])}")
