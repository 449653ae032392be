"""Director: deep hierarchical planning from pixels, in one file of PyTorch.

Director (Hafner, Lee, Fischer, Abbeel, NeurIPS 2022, "the paper") learns a world model from
pixels and plans inside it on two levels. Every K = 8 steps a *manager* picks a discrete code,
the *skill*; a goal autoencoder turns it into a *goal*, a point in the world model's state space.
A *worker* is rewarded for reaching that goal and chooses the primitive actions. The manager is
rewarded for task reward and for novelty. Nobody tells either of them what a good goal is.

    python director.py --task dmc_walker_walk       train; the same command resumes
    python director.py --logdir RUN --eval 10       play 10 episodes of a trained agent
    python director.py --help                       every flag

Where the paper is in this file:
    Section 2.1, equations 1-2   world model                   WorldModel, RSSM, balanced_kl
    Section 2.2, equations 3-4   goal autoencoder              GoalAutoencoder
    Section 2.3, equations 5-7   manager, exploration reward   Director.imagine, ActorCritic,
                                                               GoalAutoencoder.novelty,
                                                               abstract_trajectory
    Section 2.4, equation 8      worker, goal reward           max_cosine, split_trajectory
    Section 2.3-2.4, Appendix    returns, normalisation        lambda_return, Normalizer, AutoAdapt

Symbols in shape comments (trajectories are time-major):
    B  batch of replay chunks      D    deterministic state      S x C  stochastic state: groups
    T  length of a replay chunk    A    action size                     times classes, flat: SC
    N  imagined trajectories, BT   E    environments             F      inputs of a network
    H  imagination horizon         K    steps that a goal lasts  G x L  skill: groups x classes
"""

import argparse
import collections
import contextlib
import copy
import dataclasses
import difflib
import functools
import json
import math
import os
import pathlib
import subprocess
import sys
import time

import gymnasium
import numpy as np
import torch
import torch.nn.functional as F
from gymnasium import spaces
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv
from torch import nn

# ---------------------------------------------------------------------------------------------
# Configuration
# ---------------------------------------------------------------------------------------------


class UserError(ValueError):
    """A mistake of the user's: `main` prints it as one line and exits with code 2."""


SIZES = {  # what --size sets; the paper's agent, and two for a CPU. Any single flag overrides it.
    #                 paper    s     xs
    "deter":         (1024,   256,   128),
    "hidden":        (1024,   256,   128),
    "units":         (512,    256,   128),
    "layers":        (4,      2,     2),
    "stoch":         (32,     16,    16),
    "classes":       (32,     16,    16),
    "cnn_depth":     (64,     32,    16),
    "batch_size":    (16,     16,    8),
    "batch_length":  (64,     64,    32),
    "train_every":   (16,     16,    8),
    "learning_rate": (1e-4,   2e-4,  4e-4),
}  # fmt: skip


def option(group: str, default, text: str, choices: tuple = ()):
    """A dataclass field that also carries what its command line flag needs."""
    return dataclasses.field(default=default, metadata=dict(group=group, text=text, choices=choices))


@dataclasses.dataclass
class Config:
    """Everything that can be set; argparse flags are generated from these fields.

    Fields whose default is None get their value from the size preset, `auto` fields from the
    hardware, when the object is made. Raises UserError for values that cannot work.
    """

    task: str = option("run", "dmc_walker_walk", "dmc_<domain>_<task>, pinpad_<three..eight>, gym_<id>")
    obs: str = option(
        "run", "auto", "what to observe; auto: pixels where there are any",
        ("auto", "pixels", "state", "both"))  # fmt: skip
    agent: str = option(
        "run", "director", "director, or the flat actor-critic on the same world model",
        ("director", "dreamer"))  # fmt: skip
    size: str = option(
        "run", "auto", "preset; auto: paper on a CUDA GPU, otherwise xs", ("auto", "paper", "s", "xs"))
    device: str = option("run", "auto", "where to compute", ("auto", "cpu", "cuda"))
    precision: str = option(
        "run", "auto", "of matrix products; auto: bfloat16 where the hardware has it",
        ("auto", "float32", "bfloat16"))  # fmt: skip
    seed: int = option("run", 0, "of networks, samples and environments")
    steps: int = option("run", 1_000_000, "environment steps, over all environments, prefill included")
    logdir: str = option("run", "", "where to write; default runs/<task>/<agent>-<size>-<seed>")
    eval: int = option("run", 0, "play this many episodes of the agent in --logdir and exit")
    log_every: int = option("run", 1000, "environment steps between log lines")
    save_every: float = option("run", 300.0, "seconds between checkpoints")

    envs: int = option("data", 4, "parallel environments")
    prefill: int = option("data", 10_000, "random environment steps before training starts")
    replay_size: int = option("data", 1_000_000, "steps kept in memory, the oldest episodes go first")
    train_every: int = option("data", None, "environment steps per gradient step")
    batch_size: int = option("data", None, "replay chunks per gradient step")
    batch_length: int = option("data", None, "steps per replay chunk")

    deter: int = option("networks", None, "deterministic state, and so the goals")
    hidden: int = option("networks", None, "hidden units of the recurrent model")
    stoch: int = option("networks", None, "groups of the stochastic state")
    classes: int = option("networks", None, "classes per group of the stochastic state")
    units: int = option("networks", None, "hidden units of all multi-layer perceptrons")
    layers: int = option("networks", None, "hidden layers of all multi-layer perceptrons")
    cnn_depth: int = option("networks", None, "channels of the first convolution")
    skill_groups: int = option("networks", 8, "groups of the manager's code")
    skill_classes: int = option("networks", 8, "classes per group of the manager's code")

    learning_rate: float = option("learning", None, "of every optimiser")
    discount: float = option("learning", 0.99, "per step of the worker, and per step of the manager")
    lam: float = option("learning", 0.95, "mixing of the lambda return")
    horizon: int = option("learning", 16, "imagined steps, a multiple of the goal duration")
    goal_duration: int = option("learning", 8, "steps that a goal lasts")
    worker_extr: float = option("learning", 0.0, "weight of task reward for the worker; the paper's variant: 0.5")
    manager_expl: float = option("learning", 0.1, "weight of the exploration reward for the manager")
    slow_every: int = option("learning", 100, "gradient steps between copies to the slow critics")

    def __post_init__(self):
        cuda = torch.cuda.is_available()
        if self.device == "cuda" and not cuda:
            raise UserError("--device cuda: this PyTorch finds no CUDA GPU; use --device cpu")
        self.device = ("cuda" if cuda else "cpu") if self.device == "auto" else self.device
        if self.size == "auto":
            self.size = "paper" if self.device == "cuda" else "xs"
        if self.precision == "auto":
            # Emulated bfloat16 is slower than float32, so ask for native instructions.
            cpu = getattr(torch.cpu, "get_capabilities", dict)()
            native = cpu.get("avx512_bf16") or cpu.get("amx_bf16") or cpu.get("bf16")
            if self.device == "cuda":
                native = torch.cuda.is_bf16_supported(including_emulation=False)
            self.precision = "bfloat16" if native else "float32"
        for field in dataclasses.fields(self):
            choices, value = field.metadata["choices"], getattr(self, field.name)
            if choices and value not in choices:
                raise UserError(f"--{field.name} {value}: choose from {', '.join(choices)}")
            if value is None:
                setattr(self, field.name, SIZES[field.name][("paper", "s", "xs").index(self.size)])
            elif field.type in (int, float) and not value >= 0:
                raise UserError(f"--{field.name} {value}: must not be negative")
            if field.type is int and field.name not in ("seed", "eval", "prefill") and not getattr(self, field.name):
                raise UserError(f"--{field.name} 0: must be at least 1")
        if self.horizon % self.goal_duration:
            raise UserError(
                f"--horizon {self.horizon}: must be a multiple of --goal_duration {self.goal_duration}")
        if self.batch_length < self.goal_duration:
            raise UserError(
                f"--batch_length {self.batch_length}: must be at least --goal_duration {self.goal_duration}")
        if not self.discount <= 1 or not self.lam <= 1:
            raise UserError(f"--discount {self.discount} --lam {self.lam}: must be at most 1")
        if not self.logdir:
            name = self.task.replace("/", "-")
            self.logdir = f"runs/{name}/{self.agent}-{self.size}-{self.seed}"


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(message)


def parse_args(argv: list[str] | None) -> Config:
    """Command line to Config; raises UserError. Only the flags that were given override a preset."""
    parser = _Parser(description=__doc__.split("\n")[0], allow_abbrev=False)
    groups = {}
    for field in dataclasses.fields(Config):
        meta = field.metadata
        group = meta["group"]
        if group not in groups:
            groups[group] = parser.add_argument_group(group)
        # int("1e6") fails, and people write --steps 1e6.
        kind = (lambda text: _integer(text)) if field.type is int else field.type
        default = "set by --size" if field.default is None else f"default {field.default!r}"
        groups[group].add_argument(
            f"--{field.name}", type=kind, default=argparse.SUPPRESS, choices=meta["choices"] or None,
            metavar=None if meta["choices"] else field.type.__name__.upper(),
            help=f"{meta['text']} ({default})")  # fmt: skip
    return Config(**vars(parser.parse_args(argv)))


def _integer(text: str) -> int:
    number = float(text)
    if number != int(number):
        raise argparse.ArgumentTypeError(f"{text} is not a whole number")
    return int(number)


# ---------------------------------------------------------------------------------------------
# Environments: gymnasium.Env with a Dict observation of "image" [64, 64, 3] uint8 and/or vectors
# ---------------------------------------------------------------------------------------------


def choose_renderer():
    """Set MUJOCO_GL to a backend that can render without a screen; raises UserError if none can.

    Has to run before dm_control is imported, because it picks its backend at import. Each
    candidate is tried in a process of its own, since a failing one can take the process with it.
    """
    if "MUJOCO_GL" in os.environ:
        return
    probe = "import mujoco; context = mujoco.GLContext(64, 64); context.make_current()"
    for backend in ("egl", "osmesa", "glfw"):
        env = {**os.environ, "MUJOCO_GL": backend}
        if subprocess.run([sys.executable, "-c", probe], env=env, capture_output=True).returncode == 0:
            os.environ["MUJOCO_GL"] = backend
            return
    raise UserError(
        "MuJoCo cannot render here: no OpenGL library works (on Debian or Ubuntu: apt-get install "
        "libegl1 libgl1-mesa-dri); or train without rendering: --obs state, or --task pinpad_three")


def unknown_task(task: str, prefix: str, names) -> UserError:
    """An error that lists what exists and the nearest match."""
    names = [prefix + name for name in sorted(names)]
    near = difflib.get_close_matches(task, names, 1, 0.5)
    hint = f"did you mean {near[0]}? " if near else ""
    return UserError(f"--task {task}: unknown; {hint}There are: {', '.join(names)}")


class DMControl(gymnasium.Env):
    """A DeepMind Control Suite task, `walker_walk` for instance. Actions are scaled to [-1, 1].

    obs: "pixels" (64x64 from the task's camera), "state" (one vector per observation), or "both".
    Episodes last 1000 steps and are truncated, except where a task itself terminates.
    """

    CAMERAS = {"quadruped": 2}

    def __init__(self, name: str, obs: str = "pixels"):
        try:
            from dm_control import suite
        except Exception as error:  # a MUJOCO_GL that does not work fails here, in many ways
            backend = os.environ.get("MUJOCO_GL")
            raise UserError(f"dm_control cannot be imported with MUJOCO_GL={backend}: {error!r}") from error
        tasks = {f"{domain}_{task}": (domain, task) for domain, task in suite.ALL_TASKS}
        tasks["cup_catch"] = ("ball_in_cup", "catch")
        if name not in tasks:
            raise unknown_task(f"dmc_{name}", "dmc_", tasks)
        self._env = suite.load(*tasks[name])
        self._camera = self.CAMERAS.get(tasks[name][0], 0)
        self._pixels = obs != "state"
        self._vectors = {} if obs == "pixels" else {
            key: int(np.prod(spec.shape)) for key, spec in self._env.observation_spec().items()
            if 0 not in spec.shape}  # fmt: skip
        space = {k: spaces.Box(-np.inf, np.inf, (n,), np.float32) for k, n in self._vectors.items()}
        if self._pixels:
            space["image"] = spaces.Box(0, 255, (64, 64, 3), np.uint8)
        self.observation_space = spaces.Dict(space)
        spec = self._env.action_spec()
        self._low, self._high = spec.minimum, spec.maximum
        self.action_space = spaces.Box(-1, 1, spec.shape, np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        if seed is not None:
            self._env.task._random = np.random.RandomState(seed)
        return self._observe(self._env.reset()), {}

    def step(self, action):
        action = self._low + (np.asarray(action, np.float64) + 1) / 2 * (self._high - self._low)
        time_step = self._env.step(action)
        terminated = time_step.last() and time_step.discount == 0
        truncated = time_step.last() and not terminated
        return self._observe(time_step), float(time_step.reward), terminated, truncated, {}

    def _observe(self, time_step):
        obs = {k: np.float32(time_step.observation[k]).reshape(n) for k, n in self._vectors.items()}
        if self._pixels:
            obs["image"] = self._env.physics.render(64, 64, camera_id=self._camera)
        return obs


class PinPad(gymnasium.Env):
    """Visual Pin Pad (paper, Section 3.2): step on n coloured pads in the right order.

    Observation: image [64, 64, 3] uint8 of a 16x14 grid, 4 pixels a cell, with the history of the
    last n pads in the bottom margin. Actions: stay, down, up, right, left. Reward 10 for the
    sequence 1..n; after 10 more steps on a tinted floor the player respawns with no history.
    Truncated after `length` steps.
    """

    COLORS = ((255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0),
              (255, 0, 255), (0, 255, 255), (128, 0, 128), (0, 128, 128))  # fmt: skip
    MOVES = ((0, 0), (0, 1), (0, -1), (1, 0), (-1, 0))  # (x, y)
    PADS = {  # per task: (pad, x, y, width, height), cell (0, 0) is the top left corner of the wall
        "three": ((1, 1, 1, 4, 4), (3, 11, 1, 4, 4), (2, 6, 9, 4, 4)),
        "four": ((1, 1, 1, 4, 4), (4, 11, 1, 4, 4), (3, 1, 9, 4, 4), (2, 11, 9, 4, 4)),
        "five": ((4, 11, 1, 4, 3), (1, 1, 2, 3, 4), (5, 12, 5, 3, 4), (3, 1, 8, 3, 4), (2, 11, 10, 4, 3)),
        "six": ((1, 1, 1, 3, 3), (5, 12, 1, 3, 3), (3, 1, 5, 2, 4), (6, 13, 5, 2, 4),
                (4, 1, 10, 3, 3), (2, 12, 10, 3, 3)),
        "seven": ((1, 1, 1, 3, 2), (1, 1, 3, 2, 1), (4, 12, 1, 3, 2), (4, 13, 3, 2, 1), (3, 1, 5, 2, 4),
                  (5, 13, 5, 2, 4), (6, 1, 10, 2, 1), (6, 1, 11, 3, 2), (2, 13, 10, 2, 1),
                  (2, 12, 11, 3, 2), (7, 6, 11, 4, 2)),
    }  # fmt: skip
    PADS["eight"] = PADS["seven"] + ((8, 6, 1, 4, 2),)

    def __init__(self, name: str, length: int = 2000):
        if name not in self.PADS:
            raise unknown_task(f"pinpad_{name}", "pinpad_", self.PADS)
        self.length = length
        self.pads = np.zeros((16, 14), np.int64)  # [x, y] -> pad number, 0 none, -1 wall
        self.pads[[0, -1]] = self.pads[:, [0, -1]] = -1
        for pad, x, y, width, height in self.PADS[name]:
            self.pads[x : x + width, y : y + height] = pad
        self.spawns = np.argwhere(self.pads >= 0)  # [cells, 2]
        self.target = tuple(range(1, self.pads.max() + 1))
        self.observation_space = spaces.Dict({"image": spaces.Box(0, 255, (64, 64, 3), np.uint8)})
        self.action_space = spaces.Discrete(5)
        self._floors = {}  # (tinted, pad under the player) -> [16, 16, 3] in rows and columns

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.steps = self.countdown = 0
        self._respawn()
        return self._observe(), {}

    def step(self, action):
        if self.countdown:
            self.countdown -= 1
            if not self.countdown:
                self._respawn()
        x, y = self.player[0] + self.MOVES[action][0], self.player[1] + self.MOVES[action][1]
        pad = int(self.pads[x, y])
        if pad >= 0:  # the grid has walls all around, so x and y stay inside
            self.player = (x, y)
        if pad > 0 and self.history[-1:] != (pad,):
            self.history = (self.history + (pad,))[-len(self.target) :]
        reward = 0.0
        if self.history == self.target and not self.countdown:
            reward, self.countdown = 10.0, 10
        self.steps += 1
        return self._observe(), reward, False, self.steps >= self.length, {}

    def _respawn(self):
        self.player = tuple(map(int, self.spawns[self.np_random.integers(len(self.spawns))]))
        self.history = ()

    def _observe(self):
        key = (self.countdown > 0, int(self.pads[self.player]))
        if key not in self._floors:
            self._floors[key] = self._floor(*key)
        grid = self._floors[key].copy()
        grid[self.player[1], self.player[0]] = 0
        for index, pad in enumerate(self.history):
            grid[14, 2 * index + 1] = self.COLORS[pad - 1]
        return {"image": grid.repeat(4, 0).repeat(4, 1)}

    def _floor(self, tinted, under):
        grid = np.full((16, 16, 3), (223, 255, 223) if tinted else 255, np.uint8)
        grid[14:] = 192
        for (x, y), pad in np.ndenumerate(self.pads):
            if pad:
                color = np.array(self.COLORS[pad - 1] if pad > 0 else (192, 192, 192))
                pale = pad > 0 and pad != under  # a pad shines when the player stands on it
                grid[y, x] = (color + 9 * 255) // 10 if pale else color
        return grid


def make_gym(name: str) -> gymnasium.Env:
    """Any Gymnasium id with a Box observation (image or vector) and Box or Discrete actions."""
    with contextlib.suppress(ImportError):  # Atari, where it is installed
        import ale_py

        gymnasium.register_envs(ale_py)
    try:
        env = gymnasium.make(name, disable_env_checker=True)
    except (gymnasium.error.UnregisteredEnv, gymnasium.error.NameNotFound) as error:
        raise unknown_task(f"gym_{name}", "gym_", gymnasium.registry) from error
    except (gymnasium.error.Error, ImportError) as error:
        raise UserError(f"--task gym_{name}: {error}") from error
    space = env.observation_space
    shape = getattr(space, "shape", None)
    if isinstance(space, spaces.Box) and space.dtype == np.uint8 and len(shape) in (2, 3):
        convert, key, space = resize_image, "image", spaces.Box(0, 255, (64, 64, 3), np.uint8)
    elif isinstance(space, spaces.Box) and len(shape) == 1:
        low, high = np.float32(space.low), np.float32(space.high)
        convert, key, space = np.float32, "state", spaces.Box(low, high, shape, np.float32)
    else:
        raise UserError(f"--task gym_{name}: observes {space}; Director needs an image or a vector")
    env = gymnasium.wrappers.TransformObservation(
        env, lambda obs: {key: convert(obs)}, spaces.Dict({key: space}))
    if isinstance(env.action_space, spaces.Box):
        if not np.isfinite([env.action_space.low, env.action_space.high]).all():
            raise UserError(f"--task gym_{name}: acts in {env.action_space}; Director needs finite bounds")
        return gymnasium.wrappers.RescaleAction(env, np.float32(-1), np.float32(1))
    return env


def resize_image(image: np.ndarray) -> np.ndarray:
    """uint8 [height, width] or [height, width, channels] to [64, 64, 3]."""
    from PIL import Image

    return np.asarray(Image.fromarray(image.squeeze()).convert("RGB").resize((64, 64), Image.BOX))


def make_env(task: str, config: Config) -> gymnasium.Env:
    """One environment. Raises UserError for an unknown task or one that Director cannot play."""
    suite, _, name = task.partition("_")
    if suite == "dmc":
        obs = "pixels" if config.obs == "auto" else config.obs
        if obs != "state":
            choose_renderer()
        env = DMControl(name, obs)
    elif suite == "pinpad":
        env = PinPad(name)
    elif suite == "gym":
        env = make_gym(name)
    else:
        raise unknown_task(task, "", ["dmc_walker_walk", "pinpad_three", "gym_CartPole-v1"])
    has = {"pixels": "image" in env.observation_space.spaces}
    has["state"] = bool(set(env.observation_space) - {"image"})
    has["both"] = all(has.values())
    if config.obs != "auto" and not has[config.obs]:
        raise UserError(f"--obs {config.obs}: {task} shows only {'pixels' if has['pixels'] else 'state'}")
    action = env.action_space
    if not isinstance(action, spaces.Discrete) and not (isinstance(action, spaces.Box) and len(action.shape) == 1):
        raise UserError(f"--task {task}: acts in {action}; Director needs Box (a vector) or Discrete")
    return env


def make_envs(config: Config, amount: int) -> gymnasium.vector.VectorEnv:
    """`amount` environments: simulators and image games in processes, cheap ones in this process.

    With NEXT_STEP autoreset the last observation of an episode arrives with its reward and its
    flags; the step after it ignores the action and returns the first one of the next episode.
    """
    make = functools.partial(make_env, config.task, config)
    if config.task.startswith(("dmc_", "gym_ALE/")):
        # Forked workers start at once and share this process' memory; they use neither GPU nor torch.
        context = "fork" if sys.platform == "linux" else None
        return AsyncVectorEnv([make] * amount, context=context, autoreset_mode=AutoresetMode.NEXT_STEP)
    return SyncVectorEnv([make] * amount, autoreset_mode=AutoresetMode.NEXT_STEP)


class Driver:
    """Steps a vector environment and keeps the current row of every environment.

    `rows`: dict of arrays [E, ...]: the observation, the (one-hot or unclipped) action **that led
    to it**, reward, is_first, is_last, is_terminal, ready for the replay and for the policy.
    """

    def __init__(self, envs: gymnasium.vector.VectorEnv, seed: int | None = None):
        self.envs = envs
        self.amount = envs.num_envs
        space = envs.single_action_space
        self.discrete = isinstance(space, spaces.Discrete)
        self.start = int(space.start) if self.discrete else 0
        self.action_size = int(space.n) if self.discrete else space.shape[0]
        obs, _ = envs.reset(seed=seed)
        none = np.zeros(self.amount, bool)
        self._set(obs, np.zeros((self.amount, self.action_size)), none, ~none, none, none)

    def _set(self, obs, action, reward, is_first, is_last, is_terminal):
        self.rows = {
            **obs, "action": np.float32(action), "reward": np.float32(reward),
            "is_first": is_first, "is_last": is_last, "is_terminal": is_terminal}  # fmt: skip
        if is_first.all():
            self.score, self.length = np.zeros(self.amount), np.zeros(self.amount, int)
        self.score = np.where(is_first, 0, self.score + reward)
        self.length = np.where(is_first, 0, self.length + 1)

    def random_action(self, rng: np.random.Generator) -> np.ndarray:
        """Uniformly random actions [E, A]."""
        if self.discrete:
            return np.eye(self.action_size)[rng.integers(self.action_size, size=self.amount)]
        return rng.uniform(-1, 1, (self.amount, self.action_size))

    def step(self, action: np.ndarray):
        """Act with `action` [E, A]; environments whose episode has ended reset instead."""
        is_first = self.rows["is_last"]
        action = np.where(is_first[:, None], 0, action)
        command = action.argmax(-1) + self.start if self.discrete else np.clip(action, -1, 1)
        obs, reward, terminal, truncated, _ = self.envs.step(np.asarray(command, self.envs.single_action_space.dtype))
        self._set(obs, action, reward, is_first, terminal | truncated, terminal)


# ---------------------------------------------------------------------------------------------
# Replay
# ---------------------------------------------------------------------------------------------


class Replay:
    """Episodes in memory, as they were observed (images in uint8); the oldest ones go first.

    Memory is taken as steps arrive (12 KB a step for pixels), never up front.
    """

    def __init__(self, capacity: int, seed: int = 0):
        self.capacity = capacity
        self.rng = np.random.default_rng(seed)
        self.episodes = []  # finished: dicts of arrays [length, ...]
        self.running = {}  # environment -> dict of lists
        self.steps = 0

    def add(self, rows: dict[str, np.ndarray]):
        """Add one step of every environment: dict of arrays [E, ...] as in `Driver.rows`."""
        for env, (first, last) in enumerate(zip(rows["is_first"], rows["is_last"])):
            if first:
                self.running[env] = {key: [] for key in rows}
            for key, value in rows.items():
                self.running[env][key].append(value[env])
            self.steps += 1
            if last:
                self.append({k: np.stack(v) for k, v in self.running.pop(env).items()})
        while self.steps > self.capacity and len(self.episodes) > 1:
            self.steps -= len(self.episodes.pop(0)["reward"])

    def append(self, episode: dict[str, np.ndarray]):
        """Add a finished episode whose steps are already counted."""
        self.episodes.append(episode)

    def save(self, folder):
        return []

    def load(self, folder, episodes):
        pass

    def sample(self, batch_size: int, length: int) -> dict[str, np.ndarray]:
        """Draw chunks: dict of arrays [B, T, ...]; every chunk starts with is_first.

        An episode is drawn uniformly among the finished ones (while there are none, among the
        running ones), then a start uniformly in 0..len, clipped so that the chunk fits. That shows
        the ends of episodes more often. A chunk that a short episode does not fill goes on with
        the next drawn one, marked by is_first.
        """
        pool = self.episodes or list(self.running.values())
        keys = pool[0].keys()
        chunks = {k: [] for k in keys}
        for _ in range(batch_size):
            missing = length
            while missing:
                episode = pool[self.rng.integers(len(pool))]
                total = len(episode["reward"])
                start = max(0, min(self.rng.integers(total + 1), total - missing))
                stop = min(total, start + missing)
                for key in keys:
                    piece = np.array(episode[key][start:stop])
                    if key == "is_first":
                        piece[0] = True
                    chunks[key].append(piece)
                missing -= stop - start
        return {k: np.concatenate(v).reshape(batch_size, length, *v[0].shape[1:]) for k, v in chunks.items()}


# ---------------------------------------------------------------------------------------------
# Numerics and distributions
# ---------------------------------------------------------------------------------------------


def symlog(x: torch.Tensor) -> torch.Tensor:
    """sign(x) ln(1 + |x|): squashes large rewards and returns, keeps small ones."""
    return x.sign() * x.abs().log1p()


def symexp(x: torch.Tensor) -> torch.Tensor:
    """The inverse of `symlog`."""
    return x.sign() * x.abs().expm1()


class OneHot:
    """Independent categorical distributions, `[..., C]` logits; samples are one-hot vectors.

    Samples carry straight-through gradients (Bengio et al., 2013). `unimix` mixes in that share
    of the uniform distribution. `log_prob` and `entropy` are per row: `[...]`.
    """

    def __init__(self, logits: torch.Tensor, unimix: float = 0.0):
        if unimix:
            logits = ((1 - unimix) * logits.softmax(-1) + unimix / logits.shape[-1]).log()
        self.logits = logits.log_softmax(-1)
        self.probs = self.logits.exp()
        self.entropy_range = 0.0, math.log(logits.shape[-1])

    def sample(self) -> torch.Tensor:
        # The index of the smallest of exponential variables with rates p is distributed as p.
        with torch.no_grad():
            index = (self.probs / torch.empty_like(self.probs).exponential_()).argmax(-1, True)
            onehot = torch.zeros_like(self.probs).scatter_(-1, index, 1.0)
        return onehot + self.probs - self.probs.detach()

    def mode(self) -> torch.Tensor:
        with torch.no_grad():
            index = self.probs.argmax(-1, True)
            return torch.zeros_like(self.probs).scatter_(-1, index, 1.0)

    def log_prob(self, onehot: torch.Tensor) -> torch.Tensor:
        return (self.logits * onehot).sum(-1)

    def entropy(self) -> torch.Tensor:
        return -(self.logits * self.probs).sum(-1)


class BoundedNormal:
    """Normal(tanh(mean), std) per dimension, with std between 0.03 and 1. Both inputs `[..., A]`.

    `log_prob` and `entropy` are per dimension: `[..., A]`.
    """

    LOW, HIGH = 0.03, 1.0

    def __init__(self, mean: torch.Tensor, std: torch.Tensor):
        self.mean = mean.tanh()
        self.std = (self.HIGH - self.LOW) * std.sigmoid() + self.LOW
        self.entropy_range = (0.5 * math.log(2 * math.pi * math.e * s**2) for s in (self.LOW, self.HIGH))

    def sample(self) -> torch.Tensor:
        return self.mean + self.std * torch.randn_like(self.mean)

    def mode(self) -> torch.Tensor:
        return self.mean

    def log_prob(self, value: torch.Tensor) -> torch.Tensor:
        return -0.5 * (((value - self.mean) / self.std) ** 2 + math.log(2 * math.pi)) - self.std.log()

    def entropy(self) -> torch.Tensor:
        return 0.5 * math.log(2 * math.pi * math.e) + self.std.log()


def balanced_kl(post_logit: torch.Tensor, prior_logit: torch.Tensor, balance: float) -> torch.Tensor:
    """KL with balancing (paper, eq. 2): the prior learns faster than the posterior.

    `[..., S, C], [..., S, C] -> [...]`: `balance * KL(sg(post) || prior) + (1 - balance) *
    KL(post || sg(prior))`, summed over the groups.
    """

    def kl(p, q):
        return (p.exp() * (p - q)).sum((-2, -1))

    post, prior = post_logit.log_softmax(-1), prior_logit.log_softmax(-1)
    return balance * kl(post.detach(), prior) + (1 - balance) * kl(post, prior.detach())


class AutoAdapt(nn.Module):
    """Scales a regulariser so that its mean stays near a target.

    The scale starts at 1 and moves by 10% when the mean leaves target +-10%. `inverse=True` is
    for quantities to be kept up, as entropies: the weight grows below the target, and the result
    is negative. The mean is taken over all axes but the last ones, which have `shape`.
    """

    def __init__(self, shape: tuple, target: float, low: float, high: float, inverse: bool = False):
        super().__init__()
        self.target, self.low, self.high, self.inverse = target, low, high, inverse
        self.register_buffer("scale", torch.ones(shape))

    def forward(self, reg: torch.Tensor) -> torch.Tensor:
        """Update the scale from `reg` `[..., *shape]`, then return the weighted regulariser."""
        mean = reg.detach().flatten(0, reg.ndim - self.scale.ndim - 1).mean(0)
        above, below = mean > 1.1 * self.target, mean < self.target / 1.1
        if self.inverse:
            above, below = below, above
        factor = torch.where(above, 1.1, torch.where(below, 1 / 1.1, 1.0))
        self.scale.copy_((self.scale * factor).clamp(self.low, self.high))
        return self.scale.clone() * (-reg if self.inverse else reg)


class Normalizer(nn.Module):
    """Divides by a moving standard deviation (`impl="std"`), or standardises (`"mean_std"`).

    Exponential means of x and x^2 with bias correction, in float64; the deviation is floored at
    1 / limit. No gradient flows into the statistics.
    """

    def __init__(self, impl: str, decay: float, limit: float):
        super().__init__()
        assert impl in ("std", "mean_std"), impl
        self.impl, self.decay, self.limit = impl, decay, limit
        for name in ("mean", "square", "count"):
            self.register_buffer(name, torch.zeros((), dtype=torch.float64))

    def forward(self, x: torch.Tensor, update: bool = True) -> torch.Tensor:
        """Normalise `x` of any shape; with `update`, include it in the statistics first."""
        if update:
            y = x.detach().double()
            self.mean.lerp_(y.mean(), 1 - self.decay)
            self.square.lerp_((y**2).mean(), 1 - self.decay)
            self.count.add_(1)
        correction = 1 - self.decay**self.count
        mean = self.mean / correction
        var = self.square / correction - mean**2
        scale = var.clamp(min=self.limit**-2).rsqrt().float()
        return (x - mean.float()) * scale if self.impl == "mean_std" else x * scale


# ---------------------------------------------------------------------------------------------
# Networks: linear without bias, layer norm, ELU
# ---------------------------------------------------------------------------------------------


def glorot(layer: nn.Module, scale: float = 1.0) -> nn.Module:
    """Glorot uniform weights (variance scaled by `scale`, fan average), zero biases."""
    nn.init.xavier_uniform_(layer.weight, gain=scale**0.5)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer


def linear_norm(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(glorot(nn.Linear(inputs, outputs, bias=False)), nn.LayerNorm(outputs, eps=1e-3))


def dense(inputs: int, outputs: int) -> nn.Sequential:
    return linear_norm(inputs, outputs).append(nn.ELU())


class MLP(nn.Module):
    """`layers` hidden layers of `units`, then a linear layer to each of `shapes`.

    `[..., inputs] -> [..., *shape]` in float32; a tuple of these if there are several shapes.
    Without shapes, the hidden features `[..., units]`.
    """

    def __init__(self, inputs: int, config: Config, *shapes: tuple, scales: tuple = (0.1,)):
        super().__init__()
        sizes = [inputs] + [config.units] * config.layers
        self.body = nn.Sequential(*(dense(a, b) for a, b in zip(sizes, sizes[1:])))
        self.shapes = shapes
        scales = scales * len(shapes) if len(scales) == 1 else scales
        self.outs = nn.ModuleList(
            glorot(nn.Linear(sizes[-1], math.prod(shape)), scale) for shape, scale in zip(shapes, scales))

    def forward(self, x: torch.Tensor):
        x = self.body(x)
        outs = [out(x).float().reshape(*x.shape[:-1], *shape) for out, shape in zip(self.outs, self.shapes)]
        return x if not outs else outs[0] if len(outs) == 1 else outs


class ChannelNorm(nn.LayerNorm):
    """Layer norm over the channels of `[N, C, height, width]`; free of copies in channels-last."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Encoder(nn.Module):
    """Observation to `[..., size]`: four strided convolutions for the image, an MLP for vectors.

    Images go 64 -> 31 -> 14 -> 6 -> 2 pixels; the vectors are concatenated in the space's order.
    """

    def __init__(self, space: spaces.Dict, config: Config):
        super().__init__()
        self.vectors = [key for key in space if key != "image"]
        self.size = 0
        self.image = None
        if "image" in space.spaces:
            channels = [space["image"].shape[-1]] + [config.cnn_depth * 2**i for i in range(4)]
            layers = []
            for a, b in zip(channels, channels[1:]):
                layers += [glorot(nn.Conv2d(a, b, 4, 2, bias=False)), ChannelNorm(b, eps=1e-3), nn.ELU()]
            self.image = nn.Sequential(*layers).to(memory_format=torch.channels_last)
            self.size += 4 * channels[-1]
        if self.vectors:
            self.vector = MLP(sum(space[k].shape[0] for k in self.vectors), config)
            self.size += config.units

    def forward(self, obs: dict[str, torch.Tensor]) -> torch.Tensor:
        outs = []
        if self.image:
            image = obs["image"]  # [..., 64, 64, 3] uint8, so the permuted image is channels-last
            x = image.flatten(0, -4).permute(0, 3, 1, 2).float() / 255
            x = self.image(x).permute(0, 2, 3, 1)
            outs.append(x.reshape(*image.shape[:-3], -1))
        if self.vectors:
            outs.append(self.vector(torch.cat([obs[k] for k in self.vectors], -1)))
        return torch.cat(outs, -1)


class Decoder(nn.Module):
    """Features `[..., F]` to reconstructions: image `[..., 64, 64, 3]` in [0, 1], and vectors."""

    def __init__(self, inputs: int, space: spaces.Dict, config: Config):
        super().__init__()
        self.vectors = [key for key in space if key != "image"]
        self.image = None
        if "image" in space.spaces:
            depths = [inputs] + [config.cnn_depth * 2**i for i in (2, 1, 0)]
            layers = []
            for a, b, kernel in zip(depths, depths[1:], (5, 5, 6)):
                layers += [glorot(nn.ConvTranspose2d(a, b, kernel, 2, bias=False)), ChannelNorm(b, eps=1e-3), nn.ELU()]
            layers.append(glorot(nn.ConvTranspose2d(depths[-1], space["image"].shape[-1], 6, 2)))
            self.image = nn.Sequential(*layers).to(memory_format=torch.channels_last)
        if self.vectors:
            self.vector = MLP(inputs, config, *(space[key].shape for key in self.vectors))

    def forward(self, feat: torch.Tensor) -> dict[str, torch.Tensor]:
        outs = {}
        if self.image:
            x = self.image(feat.reshape(-1, feat.shape[-1], 1, 1)).permute(0, 2, 3, 1)
            outs["image"] = x.float().sigmoid().reshape(*feat.shape[:-1], *x.shape[1:])
        if self.vectors:
            x = self.vector(feat)
            outs.update(zip(self.vectors, [x] if len(self.vectors) == 1 else x))
        return outs


class RSSM(nn.Module):
    """Recurrent state-space model (paper, eq. 1; Hafner et al., 2019).

    The state is `deter` `[..., D]`, a GRU's, and `stoch` `[..., SC]`, S flattened one-hot vectors.
    """

    def __init__(self, embed: int, action: int, config: Config):
        super().__init__()
        self.shape = (config.stoch, config.classes)
        deter, hidden, stoch = config.deter, config.hidden, config.stoch * config.classes
        self.initial_deter = nn.Parameter(torch.zeros(deter))
        self.action_in = dense(stoch + action, hidden)
        self.gru = linear_norm(deter + hidden, 3 * deter)
        self.prior_out = dense(deter, hidden).append(glorot(nn.Linear(hidden, stoch)))
        self.post_out = dense(deter + embed, hidden).append(glorot(nn.Linear(hidden, stoch)))

    def initial(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The learned first state: deter `[D]`, stoch `[SC]`, the mode of the prior there."""
        deter = self.initial_deter.tanh()
        return deter, OneHot(self.prior(deter)).mode().flatten(-2)

    def step(self, deter: torch.Tensor, stoch: torch.Tensor, action: torch.Tensor) -> torch.Tensor:
        """The next `deter` `[..., D]`: a GRU whose reset gate acts on the candidate."""
        x = self.action_in(torch.cat([stoch, action], -1))
        reset, cand, update = self.gru(torch.cat([deter, x], -1)).float().chunk(3, -1)
        update = (update - 1).sigmoid()
        return update * (reset.sigmoid() * cand).tanh() + (1 - update) * deter

    def prior(self, deter: torch.Tensor) -> torch.Tensor:
        """Logits `[..., S, C]` of the stochastic state before seeing the observation."""
        return self.prior_out(deter).float().unflatten(-1, self.shape)

    def posterior(self, deter: torch.Tensor, embed: torch.Tensor) -> torch.Tensor:
        """Logits `[..., S, C]` of the stochastic state after seeing it."""
        return self.post_out(torch.cat([deter, embed], -1)).float().unflatten(-1, self.shape)

    def imagine_step(self, deter, stoch, action) -> tuple[torch.Tensor, torch.Tensor]:
        """One step without an observation; `stoch` is a sample of the prior."""
        deter = self.step(deter, stoch, action)
        return deter, OneHot(self.prior(deter)).sample().flatten(-2)

    def observe_step(self, deter, stoch, action, embed, is_first) -> tuple[torch.Tensor, ...]:
        """One step with an observation; is_first `[...]` puts in the initial state, drops the action.

        Returns deter, stoch and the posterior's logits.
        """
        first = is_first[..., None]
        initial = self.initial()
        deter, stoch = torch.where(first, initial[0], deter), torch.where(first, initial[1], stoch)
        deter = self.step(deter, stoch, torch.where(first, 0, action))
        logit = self.posterior(deter, embed)
        return deter, OneHot(logit).sample().flatten(-2), logit

    def observe(self, embed, action, is_first) -> dict[str, torch.Tensor]:
        """Posterior states of chunks: inputs `[B, T, ...]`; returns deter, stoch, post, prior."""
        deter, stoch = (x.expand(len(action), -1) for x in self.initial())
        steps = []
        for t in range(action.shape[1]):
            deter, stoch, logit = self.observe_step(deter, stoch, action[:, t], embed[:, t], is_first[:, t])
            steps.append((deter, stoch, logit))
        states = dict(zip(("deter", "stoch", "post"), (torch.stack(x, 1) for x in zip(*steps))))
        return {**states, "prior": self.prior(states["deter"])}


# ---------------------------------------------------------------------------------------------
# World model, goal autoencoder, actor-critic
# ---------------------------------------------------------------------------------------------


class Optimizer(torch.optim.AdamW):
    """Adam with gradient clipping, and weight decay on weight matrices only."""

    def __init__(self, module: nn.Module, config: Config):
        self.params = list(module.parameters())
        groups = [
            dict(params=[p for p in self.params if p.ndim >= 2], weight_decay=1e-2),
            dict(params=[p for p in self.params if p.ndim < 2], weight_decay=0.0),
        ]
        super().__init__(groups, lr=config.learning_rate, eps=1e-6)

    def minimize(self, loss: torch.Tensor) -> torch.Tensor:
        """One step on a scalar loss; returns the gradient's norm before clipping.

        Gradients are computed for these parameters only, however many others the loss depends on.
        """
        for param, grad in zip(self.params, torch.autograd.grad(loss, self.params)):
            param.grad = grad
        norm = nn.utils.clip_grad_norm_(self.params, 100.0)
        self.step()
        self.zero_grad()
        return norm


class WorldModel(nn.Module):
    """Encoder, RSSM and heads (paper, Section 2.1). `feat` is `deter ++ stoch`, `[..., F]`."""

    def __init__(self, obs_space: spaces.Dict, action: int, config: Config):
        super().__init__()
        self.encoder = Encoder(obs_space, config)
        self.rssm = RSSM(self.encoder.size, action, config)
        feat = config.deter + config.stoch * config.classes
        self.decoder = Decoder(feat, obs_space, config)
        self.reward_head = MLP(feat, config, ())
        self.cont_head = MLP(feat, config, ())
        self.kl_adapt = AutoAdapt((), target=3.5, low=1e-5, high=1.0)

    def reward(self, feat: torch.Tensor) -> torch.Tensor:
        """Expected reward of states, `[..., F] -> [...]`."""
        return symexp(self.reward_head(feat))

    def cont(self, feat: torch.Tensor) -> torch.Tensor:
        """Probability that the episode goes on after a state, `[..., F] -> [...]`."""
        return self.cont_head(feat).sigmoid()

    def goal_feat(self, goal: torch.Tensor) -> torch.Tensor:
        """Complete a goal `[..., D]` by the mode of the prior there, so that it can be decoded."""
        return torch.cat([goal, OneHot(self.rssm.prior(goal)).mode().flatten(-2)], -1)

    def loss(self, batch: dict[str, torch.Tensor]):
        """Paper, eq. 2, on chunks `[B, T, ...]`: loss, posterior states `[B, T, ...]`, metrics."""
        states = self.rssm.observe(self.encoder(batch), batch["action"], batch["is_first"])
        feat = torch.cat([states["deter"], states["stoch"]], -1)
        losses = {}
        for key, mean in self.decoder(feat).items():
            target = batch[key].float() / 255 if key == "image" else batch[key]
            losses[key] = ((mean - target) ** 2).flatten(2).sum(-1)
        losses["reward"] = (self.reward_head(feat) - symlog(batch["reward"])) ** 2
        losses["cont"] = F.binary_cross_entropy_with_logits(
            self.cont_head(feat), 1 - batch["is_terminal"].float(), reduction="none")
        kl = balanced_kl(states["post"], states["prior"], 0.8)
        losses["kl"] = self.kl_adapt(kl)
        loss = sum(losses.values()).mean()  # each one is [B, T]
        metrics = {f"{key}_loss": value.mean() for key, value in losses.items()}
        metrics.update(
            model_loss=loss, kl=kl.mean(), kl_scale=self.kl_adapt.scale.clone(),
            prior_ent=OneHot(states["prior"]).entropy().sum(-1).mean(),
            post_ent=OneHot(states["post"]).entropy().sum(-1).mean())  # fmt: skip
        return loss, states, metrics


class GoalAutoencoder(nn.Module):
    """Compresses states into discrete codes, so that the manager picks among few (Section 2.2)."""

    def __init__(self, config: Config):
        super().__init__()
        self.skill_shape = (config.skill_groups, config.skill_classes)
        self.encoder = MLP(config.deter, config, self.skill_shape)
        self.decoder = MLP(math.prod(self.skill_shape), config, (config.deter,))
        self.kl_adapt = AutoAdapt((), target=10.0, low=1e-5, high=1.0)

    def encode(self, deter: torch.Tensor) -> OneHot:
        """`[..., D]` to a distribution over skills `[..., G, L]` (eq. 3)."""
        return OneHot(self.encoder(deter))

    def decode(self, skill: torch.Tensor) -> torch.Tensor:
        """Skill `[..., G, L]` to goal `[..., D]` (eq. 3)."""
        return self.decoder(skill.flatten(-2))

    def loss(self, deter: torch.Tensor):
        """Eq. 4 on states `[N, D]`: loss, metrics."""
        code = self.encode(deter)
        rec = ((self.decode(code.sample()) - deter) ** 2).sum(-1)
        kl = (math.log(self.skill_shape[1]) - code.entropy()).sum(-1)  # to the uniform prior
        loss = (rec + self.kl_adapt(kl)).mean()
        metrics = dict(
            goal_loss=loss, goal_rec=rec.mean(), goal_kl=kl.mean(), goal_kl_scale=self.kl_adapt.scale.clone())
        return loss, metrics

    def novelty(self, deter: torch.Tensor) -> torch.Tensor:
        """Exploration reward (eq. 6): how badly states `[..., D]` are reconstructed, `[...]`."""
        return ((self.decode(self.encode(deter).sample()) - deter) ** 2).mean(-1)


class Actor(nn.Module):
    """Inputs `[..., F]` to a distribution over actions: OneHot or BoundedNormal."""

    def __init__(self, inputs: int, shape: tuple, discrete: bool, config: Config):
        super().__init__()
        self.discrete = discrete
        self.net = MLP(inputs, config, shape) if discrete else MLP(
            inputs, config, shape, shape, scales=(0.1, 1.0))

    def forward(self, x: torch.Tensor) -> OneHot | BoundedNormal:
        out = self.net(x)
        return OneHot(out, unimix=0.01) if self.discrete else BoundedNormal(*out)


class ActorCritic(nn.Module):
    """An actor with one critic per reward, learning from imagined trajectories (Sections 2.3, 2.4).

    `keys`: the parts of a trajectory that it sees, with their total size `inputs`. `scales`:
    weight of each reward. Discrete actions are learned by REINFORCE, continuous ones by
    back-propagating the returns through the dynamics into the actions.
    """

    def __init__(self, keys: tuple, inputs: int, shape: tuple, discrete: bool, scales: dict, config: Config):
        super().__init__()
        self.keys, self.discrete, self.scales, self.config = keys, discrete, scales, config
        self.actor = Actor(inputs, shape, discrete, config)
        self.critic = nn.ModuleDict({name: MLP(inputs, config, ()) for name in scales})
        self.slow = copy.deepcopy(self.critic).requires_grad_(False)
        self.returnnorm = nn.ModuleDict({name: Normalizer("std", 0.999, 1e2) for name in scales})
        self.advnorm = Normalizer("mean_std", 0.99, 1e8)
        # One scale per action dimension, or per group of the skill.
        self.ent_adapt = AutoAdapt(shape[:-1] if discrete else shape, 0.5, 1e-5, 1e2, inverse=True)
        self.optimizers = {"actor": Optimizer(self.actor, config)}
        self.optimizers.update({f"critic_{k}": Optimizer(net, config) for k, net in self.critic.items()})
        self.autocast = functools.partial(
            torch.autocast, config.device, torch.bfloat16, enabled=config.precision == "bfloat16")

    def inputs(self, traj: dict[str, torch.Tensor]) -> torch.Tensor:
        return torch.cat([traj[key] for key in self.keys], -1)

    def returns(self, name: str, inputs: torch.Tensor, traj: dict) -> tuple[torch.Tensor, torch.Tensor]:
        """Lambda returns under the slow critic, and its values, both `[H, N]`."""
        value = symexp(self.slow[name](inputs))
        discount = self.config.discount * traj["cont"][1:]
        return lambda_return(traj[f"reward_{name}"], value, discount, self.config.lam), value[:-1]

    def update(self, traj: dict[str, torch.Tensor], copy_slow: bool) -> dict[str, torch.Tensor]:
        """Train the critics, then the actor, on a trajectory `[H+1, N, ...]`; returns metrics.

        `traj` holds `keys`, action, cont, and for each reward `reward_<name>` `[H, N]`.
        `copy_slow`: copy the critics to the slow critics after their step.
        """
        metrics, score = {}, 0.0
        inputs = self.inputs(traj)
        weight = trajectory_weights(traj["cont"].detach(), self.config.discount)[:-1]
        for name, scale in self.scales.items():
            with self.autocast():
                ret, base = self.returns(name, inputs, traj)
                value = self.critic[name](inputs[:-1].detach())
                loss = ((value - symlog(ret.detach())) ** 2 * weight).mean()
            metrics[f"{name}_critic_grad_norm"] = self.optimizers[f"critic_{name}"].minimize(loss)
            metrics[f"{name}_return"] = ret.mean()
            if copy_slow:
                self.slow[name].load_state_dict(self.critic[name].state_dict())
                with self.autocast():
                    ret, base = self.returns(name, inputs, traj)
            metrics[f"{name}_critic_loss"] = loss
            metrics[f"{name}_value"] = symexp(value).mean()
            metrics[f"{name}_reward"] = traj[f"reward_{name}"].mean()
            ret, base = self.returnnorm[name](ret), self.returnnorm[name](base, update=False)
            score = score + scale * (ret - base)
            metrics[f"{name}_score"] = (ret - base).mean()
        score = self.advnorm(score)

        with self.autocast():
            policy = self.actor(inputs[:-1].detach())
        if self.discrete:
            logprob = policy.log_prob(traj["action"][:-1].detach())  # [H, N] or [H, N, G]
            loss = -sum_dims(logprob) * score.detach()
        else:
            loss = -score
        low, high = policy.entropy_range
        entropy = (policy.entropy() - low) / (high - low)
        loss = ((loss + sum_dims(self.ent_adapt(entropy))) * weight).mean()
        metrics["actor_grad_norm"] = self.optimizers["actor"].minimize(loss)
        metrics.update(actor_loss=loss, ent=entropy.mean(), ent_scale=self.ent_adapt.scale.mean())
        return metrics


def sum_dims(x: torch.Tensor) -> torch.Tensor:
    """`[H, N, ...] -> [H, N]`."""
    return x.reshape(*x.shape[:2], -1).sum(-1)


# ---------------------------------------------------------------------------------------------
# Hierarchical returns
# ---------------------------------------------------------------------------------------------


def max_cosine(goal: torch.Tensor, feat: torch.Tensor) -> torch.Tensor:
    """Goal reward (paper, eq. 8), `[..., D], [..., D] -> [...]`.

    A cosine in which both are divided by the larger norm, so that the size has to match, too.
    """
    norm = torch.maximum(goal.norm(dim=-1, keepdim=True), feat.norm(dim=-1, keepdim=True)) + 1e-12
    return ((goal / norm) * (feat / norm)).sum(-1)


def lambda_return(reward, value, discount, lam: float) -> torch.Tensor:
    """`R[t] = r[t] + d[t] ((1 - lam) v[t+1] + lam R[t+1])`, `R[H] = v[H]` (paper, eq. 7).

    `[H, ...], [H+1, ...], [H, ...] -> [H, ...]`; `discount` includes the continuation.
    """
    last, returns = value[-1], []
    for t in reversed(range(len(reward))):
        last = reward[t] + discount[t] * ((1 - lam) * value[t + 1] + lam * last)
        returns.append(last)
    return torch.stack(returns[::-1])


def trajectory_weights(cont: torch.Tensor, discount: float) -> torch.Tensor:
    """How much each step counts, `[H+1, ...] -> [H+1, ...]`: the chance to get there, discounted.

    1 at the first step, or 0 where the trajectory starts at a terminal state.
    """
    return (discount * cont).cumprod(0) / discount


def split_trajectory(traj: dict[str, torch.Tensor], k: int) -> dict[str, torch.Tensor]:
    """Cut a trajectory into the worker's, one per goal (Section 2.4).

    dict of `[H+1, N, ...]` (rewards: `[H, N]`) to dict of `[k+1, N*H/k, ...]` (rewards: `[k, ...]`),
    the segment's index slowest. Neighbours share their boundary state: it is the last of one and
    the first of the next. There, the last one keeps its own goal, to bootstrap under the goal
    that the worker pursued.
    """
    horizon = len(traj["action"]) - 1
    assert horizon % k == 0, (horizon, k)
    result = {}
    for key, value in traj.items():
        length = k if key.startswith("reward") else k + 1
        result[key] = torch.cat([value[i : i + length] for i in range(0, horizon, k)], 1)
    if "goal" in traj:
        result["goal"] = torch.cat([result["goal"][:-1], result["goal"][:1]])
    return result


def abstract_trajectory(traj: dict[str, torch.Tensor], k: int) -> dict[str, torch.Tensor]:
    """See a trajectory as the manager does, every k-th state, with skills as actions (Section 2.3).

    dict of `[H+1, N, ...]` (rewards: `[H, N]`) to dict of `[H/k+1, N, ...]` (rewards: `[H/k, N]`).
    A block's reward is the mean over its steps, each weighted by the chance that the episode has
    gone on within the block; a later state's `cont` is the product over the block before it.
    """
    traj = {**traj, "action": traj["skill"]}
    del traj["skill"]
    blocks = {key: (-1, k) + value.shape[1:] for key, value in traj.items()}
    weight = traj["cont"][:-1].reshape(blocks["cont"]).cumprod(1)
    result = {}
    for key, value in traj.items():
        if key.startswith("reward"):
            result[key] = (value.reshape(blocks[key]) * weight).mean(1)
        elif key == "cont":
            result[key] = torch.cat([value[:1], value[1:].reshape(blocks[key]).prod(1)])
        else:
            result[key] = value[::k]
    return result


# ---------------------------------------------------------------------------------------------
# The agent
# ---------------------------------------------------------------------------------------------


class Director(nn.Module):
    """World model, goal autoencoder, manager and worker.

    With `config.agent == "dreamer"` there is no manager and no goal: the worker is an actor-critic
    on the task reward over the same imagination, the paper's flat baseline.
    """

    def __init__(self, obs_space: spaces.Dict, act_space: spaces.Space, config: Config):
        super().__init__()
        self.config = config
        self.discrete = isinstance(act_space, spaces.Discrete)
        shape = (int(act_space.n),) if self.discrete else act_space.shape
        self.action_size = shape[0]
        self.world_model = WorldModel(obs_space, shape[0], config)
        feat = config.deter + config.stoch * config.classes
        keys = ("deter", "stoch")
        self.optimizers = {"model": Optimizer(self.world_model, config)}
        self.manager = None
        if config.agent == "dreamer":
            self.worker = ActorCritic(keys, feat, shape, self.discrete, {"extr": 1.0}, config)
        else:
            self.goals = GoalAutoencoder(config)
            self.optimizers["goal"] = Optimizer(self.goals, config)
            self.manager = ActorCritic(
                keys, feat, self.goals.skill_shape, True, {"extr": 1.0, "expl": config.manager_expl}, config)
            rewards = {"goal": 1.0, **({"extr": config.worker_extr} if config.worker_extr else {})}
            self.worker = ActorCritic(
                keys + ("goal",), feat + config.deter, shape, self.discrete, rewards, config)
            self.optimizers.update({f"manager_{k}": v for k, v in self.manager.optimizers.items()})
        self.optimizers.update({f"worker_{k}": v for k, v in self.worker.optimizers.items()})
        self.autocast = self.worker.autocast
        self.grad_steps = 0
        self.to(config.device)

    def get_extra_state(self):
        return {"grad_steps": self.grad_steps}

    def set_extra_state(self, state):
        self.grad_steps = state["grad_steps"]

    def propose(self, state: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """The manager's choice in a state: skill `[..., G, L]` and goal `[..., D]` (eq. 5)."""
        skill = self.manager.actor(self.manager.inputs(state)).sample()
        return skill, self.goals.decode(skill)

    @torch.no_grad()
    def policy(self, obs: dict, state: dict | None = None, mode: str = "train"):
        """Act: observation arrays `[E, ...]` with is_first, and the state that the last call returned.

        Returns actions `[E, A]` (one-hot, or unclipped), and the state. In mode "eval" the worker
        takes its most likely action; the manager still samples. Everything restarts at is_first.
        """
        keys = (*self.world_model.encoder.vectors, "image", "is_first")
        obs = self.to_device({k: obs[k] for k in keys if k in obs})
        first = obs["is_first"]
        if state is None:
            new = functools.partial(torch.zeros, device=first.device)
            state = {"deter": new(len(first), self.config.deter)}
            state["stoch"] = new(len(first), self.config.stoch * self.config.classes)
            state["action"] = new(len(first), self.action_size)
            state["goal"] = new(len(first), self.config.deter)
            state["count"] = new(len(first))
        with self.autocast():
            embed = self.world_model.encoder(obs)
            deter, stoch, _ = self.world_model.rssm.observe_step(
                state["deter"], state["stoch"], state["action"], embed, first)
            state = {**state, "deter": deter, "stoch": stoch}
            if self.manager:
                count = torch.where(first, 0, state["count"])
                switch = (count % self.config.goal_duration == 0)[:, None]
                state["goal"] = torch.where(switch, self.propose(state)[1], state["goal"])
                state["count"] = count + 1
            policy = self.worker.actor(self.worker.inputs(state))
        state["action"] = policy.mode() if mode == "eval" else policy.sample()
        return state["action"], state

    def imagine(self, deter: torch.Tensor, stoch: torch.Tensor, terminal: torch.Tensor) -> dict:
        """Roll the policy out in the world model from N states, for H steps (eq. 5-8).

        Returns deter, stoch, action, cont, and with a manager skill and goal, `[H+1, N, ...]`, and
        the rewards `[H, N]` of the states 1..H. For continuous actions a graph leads from
        everything back to the actions; for discrete ones there is none.
        """
        traj = collections.defaultdict(list)
        state = {"deter": deter, "stoch": stoch}
        with torch.set_grad_enabled(not self.discrete):
            for t in range(self.config.horizon + 1):
                # The actors see their inputs as given: the only way back is through the actions.
                inputs = {key: value.detach() for key, value in state.items()}
                if self.manager and t % self.config.goal_duration == 0:
                    with torch.no_grad():
                        state["skill"], state["goal"] = self.propose(inputs)
                    inputs["goal"] = state["goal"]
                state["action"] = self.worker.actor(self.worker.inputs(inputs)).sample()
                for key, value in state.items():
                    traj[key].append(value)
                if t < self.config.horizon:
                    state["deter"], state["stoch"] = self.world_model.rssm.imagine_step(
                        state["deter"], state["stoch"], state["action"])
            traj = {key: torch.stack(value) for key, value in traj.items()}
            feat = torch.cat([traj["deter"], traj["stoch"]], -1)[1:]
            traj["cont"] = torch.cat([1 - terminal.float()[None], self.world_model.cont(feat)])
            if self.manager:
                # Each state is judged by the goal under which the action into it was chosen.
                traj["reward_goal"] = max_cosine(traj["goal"][:-1], traj["deter"][1:])
        with torch.set_grad_enabled(not self.discrete and "extr" in self.worker.scales):
            traj["reward_extr"] = self.world_model.reward(feat)
        if self.manager:
            with torch.no_grad():
                traj["reward_expl"] = self.goals.novelty(traj["deter"][1:])
        return traj

    def train_step(self, batch: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
        """One gradient step of everything on replay chunks `[B, T, ...]`; returns scalar metrics."""
        batch = self.to_device(batch)
        copy_slow = self.grad_steps % self.config.slow_every == 0
        self.grad_steps += 1
        with self.autocast():
            loss, states, metrics = self.world_model.loss(batch)
        metrics["model_grad_norm"] = self.optimizers["model"].minimize(loss)

        deter, stoch = (states[key].detach().flatten(0, 1) for key in ("deter", "stoch"))
        if self.manager:
            with self.autocast():
                loss, mets = self.goals.loss(deter)
            metrics.update(mets, goal_grad_norm=self.optimizers["goal"].minimize(loss))

        with self.autocast():
            traj = self.imagine(deter, stoch, batch["is_terminal"].flatten(0, 1))
        updates = {"worker": traj}
        if self.manager:
            k = self.config.goal_duration
            metrics["goal_reached"] = (traj["reward_goal"][k - 1 :: k] > 0.7).float().mean()
            updates["worker"] = split_trajectory(traj, k)
            updates["manager"] = abstract_trajectory({k: v.detach() for k, v in traj.items()}, k)
        for name, traj in updates.items():
            mets = getattr(self, name).update(traj, copy_slow)
            metrics.update({f"{name}_{key}": value for key, value in mets.items()})
        return {key: value.detach() for key, value in metrics.items()}

    def to_device(self, arrays: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
        return {key: torch.as_tensor(value, device=self.config.device) for key, value in arrays.items()}


# ---------------------------------------------------------------------------------------------
# Running it
# ---------------------------------------------------------------------------------------------


class Run:
    """The state of a training run: what a checkpoint holds, and where it is written.

    `<logdir>/checkpoint.pt` holds weights, optimisers, counters and random states;
    `<logdir>/replay/<episode>.npz` the episodes.
    """

    def __init__(self, config: Config, obs_space: spaces.Dict, act_space: spaces.Space):
        self.config = config
        self.logdir = pathlib.Path(config.logdir)
        torch.manual_seed(config.seed)
        self.agent = Director(obs_space, act_space, config)
        self.replay = Replay(config.replay_size, config.seed)
        self.rng = np.random.default_rng(config.seed)  # of random actions
        self.step = 0  # environment steps
        self.pending = 0  # environment steps since the last gradient step
        self.metrics = []  # of the gradient steps since the last log line

    def save(self):
        """Write the episodes, then the checkpoint that counts them."""
        episodes = self.replay.save(self.logdir / "replay")
        state = {
            "config": dataclasses.asdict(self.config), "step": self.step, "pending": self.pending,
            "agent": self.agent.state_dict(), "torch": torch.get_rng_state(),
            "optimizers": {k: v.state_dict() for k, v in self.agent.optimizers.items()},
            "rngs": [self.rng.bit_generator.state, self.replay.rng.bit_generator.state],
            "episodes": episodes,
        }  # fmt: skip
        torch.save(state, self.logdir / "checkpoint.tmp")
        os.replace(self.logdir / "checkpoint.tmp", self.logdir / "checkpoint.pt")

    def load(self) -> bool:
        """Go on where a checkpoint ends, if there is one."""
        path = self.logdir / "checkpoint.pt"
        if not path.exists():
            return False
        state = torch.load(path, map_location=self.config.device, weights_only=True)
        for name in ("task", "obs", "agent", "size"):
            if state["config"][name] != getattr(self.config, name):
                raise UserError(
                    f"{path} was trained with --{name} {state['config'][name]}, not "
                    f"{getattr(self.config, name)}; use another --logdir")
        self.agent.load_state_dict(state["agent"])
        for key, optimizer in self.agent.optimizers.items():
            optimizer.load_state_dict(state["optimizers"][key])
        self.step, self.pending = state["step"], state["pending"]
        self.rng.bit_generator.state, self.replay.rng.bit_generator.state = state["rngs"]
        torch.set_rng_state(state["torch"].cpu())
        self.replay.load(self.logdir / "replay", state["episodes"])
        return True

    def train(self, steps: int):
        """The gradient steps that `steps` environment steps are good for."""
        self.pending += steps
        while self.pending >= self.config.train_every:
            self.pending -= self.config.train_every
            batch = self.replay.sample(self.config.batch_size, self.config.batch_length)
            self.metrics.append(self.agent.train_step(batch))

    def averages(self) -> dict[str, float]:
        """Means of the metrics since the last call; raises FloatingPointError if one is not finite."""
        if not self.metrics:
            return {}
        names = list(self.metrics[0])
        table = torch.stack([torch.stack([m[k].float() for k in names]) for m in self.metrics]).cpu()
        for row, values in enumerate(table):
            for name, value in zip(names, values):
                if not value.isfinite():
                    step = self.agent.grad_steps - len(table) + row + 1
                    raise FloatingPointError(
                        f"{name} is {value} at gradient step {step}; the checkpoint in "
                        f"{self.logdir} is from before")
        self.metrics = []
        return {f"train/{k}": v for k, v in zip(names, table.mean(0).tolist())}

    def log(self, step: int, values: dict[str, float]):
        with open(self.logdir / "metrics.jsonl", "a") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")


def train(config: Config):
    """Train until `config.steps`, from the checkpoint in `config.logdir` if there is one."""
    envs = make_envs(config, config.envs)
    run = Run(config, envs.single_observation_space, envs.single_action_space)
    run.logdir.mkdir(parents=True, exist_ok=True)
    resumed = run.load()
    count = sum(p.numel() for p in run.agent.parameters()) / 1e6
    print(f"{config.agent}, size {config.size} ({count:.1f}M parameters), on {config.device} in "
          f"{config.precision}; task {config.task}; writing to {run.logdir}")  # fmt: skip
    print(f"Resumed at step {run.step}." if resumed else
          f"The first {config.prefill} steps are random; training starts after them.")  # fmt: skip
    driver = Driver(envs, config.seed + run.step)
    run.replay.add(driver.rows)
    state, saved, logged = None, time.time(), (time.time(), run.step, run.agent.grad_steps)
    while run.step < config.steps:
        if run.step < config.prefill:
            action = driver.random_action(run.rng)
        else:
            action, state = run.agent.policy(driver.rows, state)
            action = action.cpu().numpy()
        driver.step(action)
        run.replay.add(driver.rows)
        before = run.step
        for env in np.flatnonzero(~driver.rows["is_first"]):
            run.step += 1
            if driver.rows["is_last"][env]:
                score, length = float(driver.score[env]), int(driver.length[env])
                run.log(run.step, {"episode/score": score, "episode/length": length})
                print(f"step {run.step}: episode of {length} steps, return {score:.1f}", flush=True)
        if run.step >= config.prefill:
            run.train(run.step - before)
        due = time.time() > saved + config.save_every
        if run.step // config.log_every > before // config.log_every or due:
            values = run.averages()
            now = (time.time(), run.step, run.agent.grad_steps)
            rate = (now[1] - logged[1]) / (now[0] - logged[0])
            logged = now
            run.log(run.step, {**values, "train/steps_per_second": rate, "train/grad_steps": now[2]})
            losses = "  ".join(f"{k.removeprefix('train/')} {v:.4g}" for k, v in values.items() if "loss" in k)
            print(f"step {run.step}: {rate:.1f} steps/s, {now[2]} gradient steps  {losses}", flush=True)
        if due:
            run.save()
            saved = time.time()
    run.averages()
    run.save()
    envs.close()


def evaluate(config: Config) -> list[float]:
    """Play `config.eval` episodes with the agent in `config.logdir`; returns their returns."""
    envs = make_envs(config, 1)
    run = Run(config, envs.single_observation_space, envs.single_action_space)
    if not run.load():
        raise UserError(f"--logdir {config.logdir}: there is no checkpoint.pt to evaluate")
    driver, state, scores = Driver(envs, config.seed), None, []
    while len(scores) < config.eval:
        action, state = run.agent.policy(driver.rows, state, mode="eval")
        driver.step(action.cpu().numpy())
        if driver.rows["is_last"][0]:
            scores.append(float(driver.score[0]))
            print(f"episode {len(scores)}: return {scores[-1]:.1f}", flush=True)
    envs.close()
    print(f"mean {np.mean(scores):.1f}, standard deviation {np.std(scores):.1f}")
    return scores


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit code."""
    try:
        config = parse_args(argv)
        if config.eval:
            evaluate(config)
        else:
            train(config)
    except UserError as error:
        print(f"director.py: {error}", file=sys.stderr)
        return 2
    except FloatingPointError as error:
        print(f"director.py: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
