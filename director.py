"""Director: deep hierarchical planning from pixels, in one file of PyTorch.

Director (Hafner, Lee, Fischer, Abbeel, NeurIPS 2022, "the paper") learns a world model from
pixels and plans inside it on two levels. Every K = 8 steps a *manager* picks a discrete code,
the *skill*; a goal autoencoder turns it into a *goal*, a point in the world model's state space.
A *worker* chooses the primitive actions and is rewarded for reaching the goal, nothing else. The
manager is rewarded for task reward and for novelty. Nobody is told what a good goal looks like.

    python director.py --task dmc_walker_walk       train; the same command resumes
    python director.py --logdir RUN --eval 10       play 10 episodes with a trained agent
    python director.py --benchmark                  time the parts of training
    python director.py --help                       every flag

Where the paper is in this file:
    Section 2.1, eq. 1-2   world model              WorldModel, RSSM, balanced_kl
    Section 2.2, eq. 3-4   goal autoencoder         GoalAutoencoder
    Section 2.3            manager                  Director.propose, abstract_trajectory
                 eq. 6     exploration reward       GoalAutoencoder.novelty
    Section 2.4            worker                   Director.imagine, split_trajectory
                 eq. 8     goal reward              max_cosine
    both                   learning in imagination  ActorCritic, lambda_return, trajectory_weights,
                                                    Normalizer, AutoAdapt

Symbols in shape comments (trajectories are time-major):
    B  batch of replay chunks       D    deterministic state       F  features of a state,
    T  length of a replay chunk     SC   stochastic state: S          deter ++ stoch
    N  imagined trajectories, BT         groups of C classes       A  size of an action
    H  imagination horizon          G L  skill: groups, classes    E  environments
    K  steps that a goal lasts
"""

import argparse
import contextlib
import copy
import ctypes
import dataclasses
import difflib
import errno
import functools
import io
import itertools
import json
import math
import multiprocessing
import os
import pathlib
import re
import resource
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
import zipfile

import gymnasium
import imageio.v2 as imageio
import numpy as np
import torch
import torch.nn.functional as F
import tqdm
from gymnasium import spaces
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv
from PIL import Image
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from torch.utils.tensorboard import SummaryWriter

# ---- Configuration --------------------------------------------------------------------------


class UserError(ValueError):
    """A mistake of the user's: `main` prints it in one line and exits with code 2."""


class RunError(RuntimeError):
    """Why a run cannot go on: `main` prints it in one line and exits with code 1."""


def option(default, text: str, *choices: str):
    """A field of Config with the help text and the choices of its command line flag."""
    return dataclasses.field(default=default, metadata={"text": text, "choices": choices})


@dataclasses.dataclass
class Config:
    """Everything that can be set; the command line flags are made from these fields.

    Three defaults are those of the sizes paper, s and xs; any flag overrides its preset. "auto" is
    decided by the hardware when the object is made. Raises UserError for what cannot work.
    """

    # Run
    task: str = option("dmc_walker_walk", "dmc_<domain>_<task>, pinpad_<three..eight>, gym_<id>")
    obs: str = option("auto", "auto: pixels if there are any", "auto", "pixels", "state", "both")
    agent: str = option("director", "dreamer: flat, on the same model", "director", "dreamer")
    size: str = option("auto", "auto: paper on a GPU, else xs", "auto", "paper", "s", "xs")
    device: str = option("auto", "where to compute", "auto", "cpu", "cuda")
    precision: str = option("auto", "auto: bfloat16 if native", "auto", "float32", "bfloat16")
    seed: int = option(0, "seed of networks, samples and environments")
    steps: int = option(1_000_000, "environment steps in all, prefill included")
    logdir: str = option("", "where to write; default: runs/<task>/<agent>-<size>-<seed>")
    eval: int = option(0, "play this many episodes with the agent in --logdir, and exit")
    benchmark: bool = option(False, "time the parts of training, and exit")
    json: bool = option(False, "--benchmark as JSON")
    log_every: int = option(1000, "environment steps between two log lines")
    save_every: float = option(300.0, "seconds between two checkpoints")
    video_every: int = option(20_000, "environment steps between two sets of pictures")
    # Data
    envs: int = option(4, "environments that are played side by side")
    render_quality: str = option("full", "of MuJoCo; fast: no shadows, jagged", "full", "fast")
    prefill: int = option(10_000, "random environment steps before training starts")
    replay_size: int = option(1_000_000, "steps to keep; the oldest episodes go first")
    train_every: int = option((16, 16, 8), "environment steps per gradient step")
    batch_size: int = option((16, 16, 8), "replay chunks in a batch")
    batch_length: int = option((64, 64, 32), "steps in a replay chunk")
    # Networks
    deter: int = option((1024, 256, 128), "size of the deterministic state and of goals")
    hidden: int = option((1024, 256, 128), "hidden units of the recurrent model")
    stoch: int = option((32, 16, 16), "groups of the stochastic state")
    classes: int = option((32, 16, 16), "classes in each group of the stochastic state")
    units: int = option((512, 256, 128), "units in the hidden layers of the MLPs")
    layers: int = option((4, 2, 2), "hidden layers of the MLPs")
    cnn_depth: int = option((64, 32, 16), "channels of the first convolution")
    skill_groups: int = option(8, "groups of the manager's code")
    skill_classes: int = option(8, "classes in each group of the manager's code")
    # Learning
    learning_rate: float = option((1e-4, 2e-4, 4e-4), "of all optimisers")
    discount: float = option(0.99, "per step of the worker and of the manager")
    lam: float = option(0.95, "lambda of the returns")
    horizon: int = option(16, "imagined steps, a multiple of --goal_duration")
    goal_duration: int = option(8, "steps that a goal lasts")
    worker_extr: float = option(0.0, "weight of task reward for the worker; the variant: 0.5")
    manager_expl: float = option(0.1, "weight of the exploration reward for the manager")
    slow_every: int = option((100, 100, 20), "gradient steps between copies to the slow critics")

    def __post_init__(self):
        cuda = torch.cuda.is_available()
        if self.device == "cuda" and not cuda:
            raise UserError("--device cuda: PyTorch finds no CUDA GPU here; use --device cpu")
        if self.device == "auto":
            self.device = "cuda" if cuda else "cpu"
        if self.size == "auto":
            self.size = "paper" if self.device == "cuda" else "xs"
        if self.precision == "auto":
            if self.device == "cuda":  # emulated bfloat16 is slower than float32
                native = torch.cuda.is_bf16_supported(including_emulation=False)
            else:
                cpu = getattr(torch.cpu, "get_capabilities", dict)()
                native = cpu.get("avx512_bf16") or cpu.get("amx_bf16") or cpu.get("bf16")
            self.precision = "bfloat16" if native else "float32"
        for field in dataclasses.fields(self):
            name, choices = field.name, field.metadata["choices"]
            if choices and getattr(self, name) not in choices:
                raise UserError(f"--{name} {getattr(self, name)}: use {', '.join(choices)}")
            if isinstance(getattr(self, name), tuple):
                preset = dict(zip(("paper", "s", "xs"), field.default, strict=True))
                setattr(self, name, preset[self.size])
            low = 1 if field.type is int and field.default != 0 else 0
            low = {"skill_classes": 2, "discount": 0.01}.get(name, low)
            if field.type in (int, float) and not low <= getattr(self, name) < math.inf:
                raise UserError(f"--{name} {getattr(self, name)}: must be at least {low}")
        if self.horizon % self.goal_duration:
            raise UserError(f"--horizon {self.horizon}: must be a multiple of --goal_duration "
                            f"{self.goal_duration}")
        if self.batch_length < self.goal_duration:
            raise UserError(f"--batch_length {self.batch_length}: must not be under "
                            f"--goal_duration {self.goal_duration}")
        if max(self.discount, self.lam) > 1:
            raise UserError(f"--discount {self.discount} --lam {self.lam}: must be at most 1")
        if self.json and not self.benchmark:
            raise UserError("--json: prints the times of --benchmark, which is missing")
        if self.seed >= 2**32:
            raise UserError(f"--seed {self.seed}: must be less than 2^32")
        if not self.logdir:
            task = self.task.replace("/", "-")
            self.logdir = f"runs/{task}/{self.agent}-{self.size}-{self.seed}"


def parse_args(argv: list[str] | None) -> dict:
    """The flags given on the command line, and only those; raises UserError."""

    def integer(text: str) -> int:
        if not float(text).is_integer():
            raise ValueError
        return int(float(text))  # people write --steps 1e6

    def fail(message: str):
        raise UserError(message)

    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.error = fail
    starts = {"task": "run", "envs": "data", "deter": "networks", "learning_rate": "learning"}
    for field in dataclasses.fields(Config):
        if field.name in starts:
            group = parser.add_argument_group(starts[field.name])
        text, choices = field.metadata["text"], field.metadata["choices"] or None
        kind = integer if field.type is int else field.type
        value = {"action": "store_true"} if kind is bool else {
            "type": kind, "choices": choices, "metavar": None if choices else ""}
        group.add_argument(f"--{field.name}", default=argparse.SUPPRESS,
                           help=f"{text} [{field.default}]", **value)
    return vars(parser.parse_args(argv))


# ---- Environments ---------------------------------------------------------------------------
# All are gymnasium.Env with a Dict observation: "image" [64, 64, 3] uint8, "state" [n] float32.


@functools.cache
def choose_renderer() -> str:
    """Set MUJOCO_GL to a backend that renders here without a screen; UserError if none does.

    It has to be known before dm_control is imported. Each candidate is tried in a process of
    its own, because a broken driver can take its process with it. Returns the name that OpenGL
    gives the renderer, with "llvmpipe" or "softpipe" in it where the CPU does the work.
    """
    probe = ("import contextlib; from dm_control import mujoco; "
             "physics = mujoco.Physics.from_xml_string('<mujoco><worldbody/></mujoco>'); "
             "physics.render(8, 8)\n"
             "with contextlib.suppress(Exception), physics.contexts.gl.make_current() as context:\n"
             "    from OpenGL import GL\n"
             "    print(context.call(GL.glGetString, GL.GL_RENDERER).decode())")
    command, given = [sys.executable, "-c", probe], os.environ.get("MUJOCO_GL")
    for backend in [given] if given else ["egl", "osmesa", "glfw"]:
        env = {**os.environ, "MUJOCO_GL": backend}
        tried = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
        if tried.returncode == 0:
            os.environ["MUJOCO_GL"] = backend
            return tried.stdout.strip()
    raise UserError(f"MuJoCo cannot render here with MUJOCO_GL={given or 'egl, osmesa or glfw'}. "
                    "On Debian or Ubuntu: apt-get install libegl1 libgl1-mesa-dri. Without "
                    "rendering: --obs state, or --task pinpad_three")


def unknown_task(task: str, known) -> UserError:
    """An error that names the nearest match and lists what exists."""
    near = difflib.get_close_matches(task, known, 1, 0.0)
    return UserError(f"--task {task}: there is no such task; did you mean {near[0]}? "
                     f"There are: {', '.join(sorted(known))}")


class DMControl(gymnasium.Env):
    """A task of the DeepMind Control Suite, "walker_walk" for instance.

    obs: "pixels" (the task's camera), "state" (all its observations in one vector), or "both".
    quality: "fast" renders without shadows and multisampling. Most tasks truncate episodes after
    1000 steps.
    """

    def __init__(self, name: str, obs: str = "pixels", quality: str = "full"):
        with warnings.catch_warnings(action="ignore"):  # of glfw's, where there is no screen
            from dm_control import suite  # after `choose_renderer`

        tasks = {f"{domain}_{task}": (domain, task) for domain, task in suite.ALL_TASKS}
        tasks["cup_catch"] = tasks["ball_in_cup_catch"]
        if name not in tasks:
            raise unknown_task(f"dmc_{name}", [f"dmc_{task}" for task in tasks])
        self.env = suite.load(*tasks[name])
        self.camera = 2 if tasks[name][0] == "quadruped" else 0
        if quality == "fast":
            self.env.physics.model.vis.quality.offsamples = 0
            self.env.physics.model.vis.quality.shadowsize = 0
        self.keys = {"pixels": ("image",), "state": ("state",), "both": ("image", "state")}[obs]
        size = sum(math.prod(spec.shape) for spec in self.env.observation_spec().values())
        space = {"image": spaces.Box(0, 255, (64, 64, 3), np.uint8),
                 "state": spaces.Box(-np.inf, np.inf, (size,), np.float32)}
        self.observation_space = spaces.Dict({key: space[key] for key in self.keys})
        spec = self.env.action_spec()
        self.action_space = spaces.Box(np.float32(spec.minimum), np.float32(spec.maximum))

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        if seed is not None:
            self.env.task._random = np.random.RandomState(seed)
        return self.observe(self.env.reset()), {}

    def step(self, action):
        time_step = self.env.step(action)
        terminated = time_step.last() and time_step.discount == 0
        truncated = time_step.last() and not terminated
        return self.observe(time_step), time_step.reward, terminated, truncated, {}

    def observe(self, time_step):
        obs = {}
        if "image" in self.keys:
            obs["image"] = self.env.physics.render(64, 64, camera_id=self.camera)
        if "state" in self.keys:
            obs["state"] = np.float32(np.hstack(list(time_step.observation.values())))
        return obs


PADS = {  # rectangles: number of the pad, left, top, width, height; (0, 0) is a corner of the wall
    "three": ((1, 1, 1, 4, 4), (3, 11, 1, 4, 4), (2, 6, 9, 4, 4)),
    "four": ((1, 1, 1, 4, 4), (4, 11, 1, 4, 4), (3, 1, 9, 4, 4), (2, 11, 9, 4, 4)),
    "five": ((4, 11, 1, 4, 3), (1, 1, 2, 3, 4), (5, 12, 5, 3, 4), (3, 1, 8, 3, 4),
             (2, 11, 10, 4, 3)),
    "six": ((1, 1, 1, 3, 3), (5, 12, 1, 3, 3), (3, 1, 5, 2, 4), (6, 13, 5, 2, 4),
            (4, 1, 10, 3, 3), (2, 12, 10, 3, 3)),
    "seven": ((1, 1, 1, 3, 2), (1, 1, 3, 2, 1), (4, 12, 1, 3, 2), (4, 13, 3, 2, 1),
              (3, 1, 5, 2, 4), (5, 13, 5, 2, 4), (6, 1, 10, 2, 1), (6, 1, 11, 3, 2),
              (2, 13, 10, 2, 1), (2, 12, 11, 3, 2), (7, 6, 11, 4, 2)),
}
PADS["eight"] = (*PADS["seven"], (8, 6, 1, 4, 2))
PAD_COLORS = np.array((  # floor, pads 1 to 8, wall
    (255, 255, 255), (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0), (255, 0, 255),
    (0, 255, 255), (128, 0, 128), (0, 128, 128), (192, 192, 192)))


class PinPad(gymnasium.Env):
    """Visual Pin Pad: walk over n coloured pads in the right order (paper, Section 3).

    The image shows cells of 4x4 pixels, 16 by 14, and in a margin below the last n pads visited.
    Actions: stay, down, up, right, left. The sequence 1..n pays 10; the floor is tinted for 10
    more steps, then the player is put into a random cell, with no history. Truncated at `length`.
    """

    def __init__(self, name: str, length: int = 2000):
        if name not in PADS:
            raise unknown_task(f"pinpad_{name}", [f"pinpad_{task}" for task in PADS])
        self.length = length
        self.cells = np.full((16, 16), -1)  # [y, x]: number of the pad, 0 floor, -1 wall or margin
        self.cells[1:13, 1:15] = 0
        for pad, x, y, width, height in PADS[name]:
            self.cells[y : y + height, x : x + width] = pad
        self.target = tuple(range(1, self.cells.max() + 1))
        self.observation_space = spaces.Dict({"image": spaces.Box(0, 255, (64, 64, 3), np.uint8)})
        self.action_space = spaces.Discrete(5)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.steps = self.countdown = 0
        self.spawn()
        return self.observe(), {}

    def step(self, action):
        if self.countdown:
            self.countdown -= 1
            if not self.countdown:
                self.spawn()
        dx, dy = ((0, 0), (0, 1), (0, -1), (1, 0), (-1, 0))[action]
        x, y = self.player[0] + dx, self.player[1] + dy
        pad = int(self.cells[y, x])
        if pad >= 0:
            self.player = x, y
        if pad > 0 and self.history[-1:] != (pad,):
            self.history = (*self.history, pad)[-len(self.target) :]
        reward = 0.0
        if self.history == self.target and not self.countdown:
            reward, self.countdown = 10.0, 10
        self.steps += 1
        return self.observe(), reward, False, self.steps >= self.length, {}

    def spawn(self):
        free = np.argwhere(self.cells.T >= 0)
        self.player = tuple(free[self.np_random.integers(len(free))].tolist())
        self.history = ()

    def observe(self):
        x, y = self.player
        colors = PAD_COLORS.copy()
        colors[1:9] = (colors[1:9] + 9 * 255) // 10  # pale, but for the pad that is stood on
        colors[self.cells[y, x]] = PAD_COLORS[self.cells[y, x]]
        if self.countdown:
            colors[0] = 223, 255, 223
        grid = colors[self.cells]
        grid[y, x] = 0
        grid[14, 1 : 2 * len(self.history) : 2] = PAD_COLORS[list(self.history)]
        return {"image": grid.astype(np.uint8).repeat(4, 0).repeat(4, 1)}


def make_gym(name: str) -> gymnasium.Env:
    """Any Gymnasium id that observes an image or a vector and acts in a Box or Discrete space."""
    with contextlib.suppress(ImportError):  # Atari, where somebody has installed it
        import ale_py

        gymnasium.register_envs(ale_py)
    if name not in gymnasium.registry:
        raise unknown_task(f"gym_{name}", [f"gym_{task}" for task in gymnasium.registry])
    try:
        env = gymnasium.make(name, disable_env_checker=True)
    except (gymnasium.error.Error, ImportError) as error:  # a simulator that is not installed
        raise UserError(f"--task gym_{name}: {error}") from error
    space = env.observation_space
    image = isinstance(space, spaces.Box) and space.dtype == np.uint8
    if image and (len(space.shape) == 2 or space.shape[2:] in ((1,), (3,))):
        key, convert, space = "image", resize, spaces.Box(0, 255, (64, 64, 3), np.uint8)
    elif isinstance(space, spaces.Box) and len(space.shape) == 1:
        key, convert = "state", np.float32
        space = spaces.Box(np.float32(space.low), np.float32(space.high), dtype=np.float32)
    else:
        raise UserError(f"--task gym_{name}: observes {space}, which is neither an image nor a "
                        "vector")
    return gymnasium.wrappers.TransformObservation(
        env, lambda obs: {key: convert(obs)}, spaces.Dict({key: space}))


def resize(image: np.ndarray) -> np.ndarray:
    """uint8 image [height, width] or [height, width, channels] to [64, 64, 3]."""
    image = Image.fromarray(image.squeeze()).convert("RGB")
    return np.asarray(image.resize((64, 64), Image.Resampling.BOX))


def make_env(task: str, config: Config) -> gymnasium.Env:
    """One environment, continuous actions scaled to [-1, 1].

    UserError for a task that does not exist or that Director cannot play.
    """
    suite, _, name = task.partition("_")
    if suite == "dmc":
        obs = "pixels" if config.obs == "auto" else config.obs
        if obs != "state":
            choose_renderer()
        env = DMControl(name, obs, config.render_quality)
    elif suite in ("pinpad", "gym"):
        env = PinPad(name) if suite == "pinpad" else make_gym(name)
    else:
        raise unknown_task(task, ["dmc_<domain>_<task>", "pinpad_<three..eight>", "gym_<id>"])
    shows = "both" if len(env.observation_space) > 1 else (
        "pixels" if "image" in env.observation_space.spaces else "state")
    if config.obs not in ("auto", shows):
        raise UserError(f"--obs {config.obs}: {task} shows {shows} only")
    space = env.action_space
    if isinstance(space, spaces.Discrete) and space.n > 1:
        return env
    vector = isinstance(space, spaces.Box) and len(space.shape) == 1 and space.shape[0] > 0
    if vector and space.is_bounded() and np.issubdtype(space.dtype, np.floating):
        return gymnasium.wrappers.RescaleAction(env, np.float32(-1), np.float32(1))
    raise UserError(f"--task {task}: acts in {space}, which is neither Discrete nor a "
                    "bounded vector (Box) of floats")


class Guard(gymnasium.Wrapper):
    """Makes an environment anew when it raises or is not finite, and closes its episode.

    That episode ends truncated; `info["guard_traceback"]` says why.
    """

    def __init__(self, make):
        super().__init__(make())
        self.make = make
        if multiprocessing.parent_process():  # Ctrl-C is for the main process to handle
            signal.signal(signal.SIGINT, signal.SIG_IGN)

    def reset(self, **kwargs):
        try:
            self.last, info = self.env.reset(**kwargs)
            self.demand_finite(0.0, self.last)
        except Exception:  # noqa: BLE001, whatever it raises
            info = {"guard_traceback": self.renew()}
            self.last, _ = self.env.reset(**kwargs)
        return self.last, info

    def step(self, action):
        try:
            obs, reward, terminated, truncated, info = self.env.step(action)
            self.demand_finite(reward, obs)
            self.last = obs
        except Exception:  # noqa: BLE001, whatever it raises
            return self.last, 0.0, False, True, {"guard_traceback": self.renew()}
        return obs, reward, terminated, truncated, info

    def demand_finite(self, reward: float, obs: dict):
        if not all(np.isfinite(x).all() for x in (reward, *obs.values())):
            raise ValueError(f"observation or reward is not finite: {reward}, {obs}")

    def renew(self) -> str:
        error = traceback.format_exc()
        with contextlib.suppress(Exception):
            self.env.close()
        self.env = self.make()
        return error


def make_envs(config: Config, amount: int) -> gymnasium.vector.VectorEnv:
    """Environments side by side: each in its own process, cheap ones in this one.

    Autoreset is NEXT_STEP: the last observation of an episode comes with its reward and flags;
    the step after that ignores its action and brings the first observation of the next one.
    """
    make_env(config.task, config).close()  # a user's mistake shows here, in this process
    if config.task.startswith("dmc_") and config.obs != "state" and config.render_quality == "full":
        renderer = choose_renderer()
        if re.search("llvmpipe|softpipe|software", renderer, re.IGNORECASE):
            print(f"MuJoCo is rendered on the CPU ({renderer}); --render_quality fast, without "
                  "shadows and smooth edges, is several times as fast.", file=sys.stderr)
    make = [functools.partial(Guard, functools.partial(make_env, config.task, config))] * amount
    if config.task.startswith(("pinpad_", "gym_")) and not config.task.startswith("gym_ALE/"):
        return SyncVectorEnv(make, autoreset_mode=AutoresetMode.NEXT_STEP)
    # Forking is quick and shares memory, but a process that has opened a GPU must not fork.
    context = "fork" if sys.platform == "linux" and config.device == "cpu" else "spawn"
    return AsyncVectorEnv(make, context=context, autoreset_mode=AutoresetMode.NEXT_STEP)


class Driver:
    """Plays a vector environment, and shapes its steps for the replay and for the policy.

    `rows`, arrays [E, ...]: the observation; the action **that led to it**, one-hot or unclipped,
    zeros on a first step; reward, is_first, is_last, is_terminal. `score` and `length` [E] are
    those of the episode so far; `film` has the images of the first environment, with goals.
    """

    def __init__(self, envs: gymnasium.vector.VectorEnv, seed: int):
        self.envs, self.space = envs, envs.single_action_space
        self.discrete = isinstance(self.space, spaces.Discrete)
        self.shape = envs.num_envs, int(self.space.n) if self.discrete else self.space.shape[0]
        self.score, self.length, self.film = np.zeros(envs.num_envs), np.zeros(envs.num_envs), []
        obs, _ = envs.reset(seed=seed)
        no = np.zeros(envs.num_envs, bool)
        self.update(obs, np.zeros(self.shape), self.score, ~no, no, no)

    def random(self, rng: np.random.Generator) -> np.ndarray:
        """Uniformly random actions [E, A]."""
        if self.discrete:
            return np.eye(self.shape[1])[rng.integers(self.shape[1], size=self.shape[0])]
        return rng.uniform(-1, 1, self.shape)

    def step(self, action: np.ndarray, goal: Tensor | None = None):
        """Act, [E, A], under goals [E, D]; where an episode has ended, the next one begins."""
        if self.rows["is_first"][0]:
            self.film = []
        if "image" in self.rows and goal is not None:
            self.film.append((self.rows["image"][0], goal[0]))
        is_first = self.rows["is_last"]
        action = np.where(is_first[:, None], 0, action)
        if self.discrete:
            command = action.argmax(-1) + self.space.start
        else:
            command = np.float32(action.clip(-1, 1))
        obs, reward, terminated, truncated, info = self.envs.step(command)
        self.errors = [error for error in info.get("guard_traceback", ()) if error]
        self.update(obs, action, reward, is_first, terminated | truncated, terminated)

    def update(self, obs, action, reward, is_first, is_last, is_terminal):
        self.rows = {**obs, "action": np.float32(action), "reward": np.float32(reward),
                     "is_first": is_first, "is_last": is_last, "is_terminal": is_terminal}
        self.score = np.where(is_first, 0, self.score + reward)
        self.length = np.where(is_first, 0, self.length + 1)


# ---- Replay ---------------------------------------------------------------------------------


class Replay:
    """Episodes in memory as they were observed, images in uint8; the oldest ones go first.

    Memory is taken as steps come, 12 KB each with pixels. `save` and `load` keep the episodes in
    a folder, one file each.
    """

    def __init__(self, capacity: int, seed: int = 0):
        self.capacity, self.rng = capacity, np.random.default_rng(seed)
        self.episodes = {}  # name: {key: array [length, ...]}, finished, oldest first
        self.running = {}  # environment: (name, {key: list of length})
        self.names = itertools.count()
        self.saved = {}  # name: length of the file
        self.steps = 0

    def add(self, rows: dict[str, np.ndarray]):
        """Add one step of each environment, arrays [E, ...] as in `Driver.rows`."""
        for env in range(len(rows["reward"])):
            if env not in self.running or rows["is_first"][env]:
                self.running[env] = next(self.names), {key: [] for key in rows}
            name, episode = self.running[env]
            for key, value in rows.items():
                episode[key].append(value[env])
            if rows["is_last"][env] or len(episode["reward"]) >= 10_000:
                self.episodes[name] = {key: np.stack(value) for key, value in episode.items()}
                del self.running[env]
            self.steps += 1
        while self.steps > self.capacity and len(self.episodes) > 1:
            self.steps -= len(self.episodes.pop(next(iter(self.episodes)))["reward"])

    def sample(self, batch_size: int, length: int) -> dict[str, np.ndarray]:
        """Draw chunks, arrays [B, T, ...], that start with is_first.

        An episode is drawn uniformly among the finished ones (or the running ones, while there
        are no others), then a start in 0..len, clipped so that the chunk fits; that shows the
        ends of episodes often enough. If an episode is too short, the next one drawn follows.
        """
        pool = list(self.episodes.values()) or [episode for _, episode in self.running.values()]
        chunks = {key: [] for key in pool[0]}
        for _ in range(batch_size):
            missing = length
            while missing:
                episode = pool[self.rng.integers(len(pool))]
                total = len(episode["reward"])
                start = max(0, min(self.rng.integers(total + 1), total - missing))
                stop = min(start + missing, total)
                for key, pieces in chunks.items():
                    pieces.append(np.array(episode[key][start:stop]))
                chunks["is_first"][-1][0] = True
                missing -= stop - start
        return {key: np.concatenate(value).reshape(batch_size, length, *value[0].shape[1:])
                for key, value in chunks.items()}

    def save(self, folder: pathlib.Path) -> dict[int, int]:
        """Write what the folder does not hold yet; returns the length of each episode by name.

        What this call and the one before are without is deleted.
        """
        folder.mkdir(exist_ok=True)
        episodes = {**self.episodes, **dict(self.running.values())}
        known = {str(name) for name in (*self.saved, *episodes)}
        for path in folder.iterdir():
            if path.stem not in known:
                path.unlink()
        for name, episode in episodes.items():
            if self.saved.get(name) != len(episode["reward"]):
                buffer = io.BytesIO()
                np.savez_compressed(buffer, **episode)
                write_file(folder / f"{name}.npz", buffer)
        self.saved = {name: len(episode["reward"]) for name, episode in episodes.items()}
        return self.saved

    def load(self, folder: pathlib.Path, lengths: dict[int, int]):
        """Read what `save` wrote; episodes that were running end where they were."""
        for name, length in lengths.items():
            try:
                with np.load(folder / f"{name}.npz") as file:
                    self.episodes[name] = {key: file[key][:length] for key in file}
            except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
                print(f"Going on without {folder}/{name}.npz, which cannot be read: {error}")
        self.saved = {name: len(episode["reward"]) for name, episode in self.episodes.items()}
        self.names = itertools.count(max(lengths, default=-1) + 1)
        self.steps = sum(self.saved.values())


# ---- Numerics and distributions -------------------------------------------------------------


def symlog(x: Tensor) -> Tensor:
    """sign(x) ln(1 + |x|): compresses rewards and returns of any size."""
    return x.sign() * x.abs().log1p()


def symexp(x: Tensor) -> Tensor:
    """The inverse of `symlog`."""
    return x.sign() * x.abs().expm1()


class OneHot:
    """Categorical distributions with logits [..., C], independent; samples are one-hot [..., C].

    Samples have straight-through gradients (Bengio et al., 2013). `unimix` is the share of a
    uniform distribution that is mixed in. `log_prob` and `entropy` are per distribution, [...].
    """

    def __init__(self, logits: Tensor, unimix: float = 0.0):
        if unimix:
            logits = ((1 - unimix) * logits.softmax(-1) + unimix / logits.shape[-1]).log()
        self.logits = logits.log_softmax(-1)
        self.probs = self.logits.exp()
        self.entropy_range = 0.0, math.log(logits.shape[-1])

    def rsample(self) -> Tensor:
        # The class whose part of [0, 1) a random number falls into. Random numbers are slow on a
        # CPU, and this takes one where the Gumbel trick takes C: xs 0.86 -> 0.74 s a step.
        below = self.probs.detach().cumsum(-1)
        index = (below <= torch.rand_like(below[..., :1])).sum(-1, keepdim=True)
        index = index.clamp(max=below.shape[-1] - 1)  # where rounding keeps the sum under 1
        return self.one_hot(index) + (self.probs - self.probs.detach())

    @property
    def mode(self) -> Tensor:
        return self.one_hot(self.probs.argmax(-1, keepdim=True))

    def one_hot(self, index: Tensor) -> Tensor:
        """[..., 1] -> [..., C], without gradient."""
        return torch.zeros_like(self.probs).scatter_(-1, index, 1.0)

    def log_prob(self, onehot: Tensor) -> Tensor:
        return (self.logits * onehot).sum(-1)

    def entropy(self) -> Tensor:
        return -(self.logits * self.probs).sum(-1)


class BoundedNormal(torch.distributions.Normal):
    """Normal(tanh(mean), std) per dimension, [..., A], with std between 0.03 and 1.

    Samples are not clipped. `log_prob` and `entropy` are per dimension, [..., A].
    """

    LOW, HIGH = 0.03, 1.0
    entropy_range = tuple(0.5 + 0.5 * math.log(2 * math.pi) + math.log(x) for x in (LOW, HIGH))

    def __init__(self, mean: Tensor, std: Tensor):
        std = (self.HIGH - self.LOW) * std.sigmoid() + self.LOW
        super().__init__(mean.tanh(), std, validate_args=False)


def balanced_kl(post_logit: Tensor, prior_logit: Tensor, balance: float) -> Tensor:
    """balance * KL(sg(post) || prior) + (1 - balance) * KL(post || sg(prior)) (paper, eq. 2).

    [..., S, C], [..., S, C] -> [...], summed over groups. With balance > 0.5 the prior moves
    towards the posterior more than the posterior gives up towards the prior.
    """

    def kl(p: Tensor, q: Tensor) -> Tensor:
        return (p.exp() * (p - q)).sum((-2, -1))

    post, prior = post_logit.log_softmax(-1), prior_logit.log_softmax(-1)
    return balance * kl(post.detach(), prior) + (1 - balance) * kl(post, prior.detach())


class AutoAdapt(nn.Module):
    """Weights a regulariser such that its mean stays near `target`.

    The scale starts at 1 and moves by 10% on each call on which the mean is more than 10% off,
    within [low, high]. `inverse` is for an entropy, which is to stay up: the scale grows below
    the target, and the result is negative. There is one scale for each element of `shape`.
    """

    def __init__(self, shape: tuple, target: float, low: float, high: float, inverse=False):
        super().__init__()
        self.target, self.low, self.high, self.inverse = target, low, high, inverse
        self.register_buffer("scale", torch.ones(shape))

    def forward(self, reg: Tensor) -> Tensor:
        """Update the scale from `reg` [..., *shape], then return the weighted regulariser."""
        mean = reg.detach().flatten(0, reg.ndim - self.scale.ndim - 1).mean(0)
        above, below = mean > 1.1 * self.target, mean < self.target / 1.1
        grow, shrink = (below, above) if self.inverse else (above, below)
        scale = self.scale * torch.where(grow, 1.1, torch.where(shrink, 1 / 1.1, 1.0))
        scale = scale.clamp(self.low, self.high)
        self.scale.copy_(scale)
        return scale * (-reg if self.inverse else reg)


class Normalizer(nn.Module):
    """Divides by a running standard deviation ("std"), or standardises ("mean_std").

    Exponential means of x and x^2 with bias correction, in float64; the deviation is at least
    1 / limit. No gradient flows into the statistics.
    """

    def __init__(self, impl: str, decay: float, limit: float):
        super().__init__()
        assert impl in ("std", "mean_std"), impl
        self.impl, self.decay, self.limit = impl, decay, limit
        self.register_buffer("moments", torch.zeros(2, dtype=torch.float64))
        self.register_buffer("count", torch.zeros((), dtype=torch.float64))

    def forward(self, x: Tensor, update: bool = True) -> Tensor:
        """Normalise x of any shape, after taking it into the statistics with `update`."""
        if update:
            y = x.detach().double()
            self.moments.lerp_(torch.stack([y.mean(), (y**2).mean()]), 1 - self.decay)
            self.count += 1
        mean, square = self.moments / (1 - self.decay**self.count)
        scale = (square - mean**2).clamp(min=self.limit**-2).rsqrt().float()
        return (x - mean.float()) * scale if self.impl == "mean_std" else x * scale


# ---- Networks -------------------------------------------------------------------------------
# Hidden layers are linear without bias, layer norm, ELU. Weights are Glorot uniform.


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """F.linear: [..., I], [O, I], [O] -> [..., O].

    In float32 on a CPU as a 1x1 convolution, which PyTorch gives to oneDNN and not to MKL, whose
    matrix products are slow on AMD processors: paper 14.8 -> 9.7 s a train step, xs 0.93 -> 0.80.
    """
    rows = x.numel() // x.shape[-1]
    if (rows < 64 or x.device.type != "cpu" or torch.is_autocast_enabled("cpu")
            or not torch.backends.mkldnn.is_available()):
        return F.linear(x, weight, bias)
    x4 = x.reshape(1, rows, 1, -1).permute(0, 3, 1, 2)  # one image, channels-last
    y = F.conv2d(x4, weight[:, :, None, None], bias)
    return y.permute(0, 2, 3, 1).reshape(*x.shape[:-1], -1)


class Linear(nn.Linear):
    """nn.Linear, by way of `linear`."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


def glorot(layer: nn.Module, scale: float = 1.0) -> nn.Module:
    """Glorot uniform weights, their variance times scale, and no bias."""
    nn.init.xavier_uniform_(layer.weight, gain=scale**0.5)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer


class Norm(nn.LayerNorm):
    """Layer norm over the features of [N, C], or the channels of [N, C, h, w], in float32.

    In bfloat16 the gradients of scale and offset, sums over many rows, would not be summed right.
    Channels-last images are not copied.
    """

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x.movedim(1, -1).float() if x.ndim == 4 else x.float()).to(x.dtype)
        return y.movedim(-1, 1) if x.ndim == 4 else y


def dense(inputs: int, outputs: int) -> list[nn.Module]:
    return [glorot(Linear(inputs, outputs, bias=False)), Norm(outputs, eps=1e-3), nn.ELU()]


def hidden_layers(inputs: int, config: Config) -> nn.Sequential:
    """[..., inputs] -> [..., units]."""
    sizes = [inputs] + [config.units] * config.layers
    return nn.Sequential(*itertools.chain(*itertools.starmap(dense, itertools.pairwise(sizes))))


class MLP(nn.Module):
    """Hidden layers and a linear one, [..., inputs] -> [..., *shape], in float32."""

    def __init__(self, inputs: int, shape: tuple, config: Config):
        super().__init__()
        self.shape = shape
        self.hidden = hidden_layers(inputs, config)
        self.out = glorot(Linear(config.units, math.prod(shape)), 0.1)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.hidden(x)).float().reshape(*x.shape[:-1], *self.shape)


def convolutions(kind: type, channels: list[int], kernels: list[int]) -> list[nn.Module]:
    """Layers of stride 2, each with norm and activation."""
    layers = []
    for (a, b), kernel in zip(itertools.pairwise(channels), kernels, strict=True):
        conv = glorot(kind(a, b, kernel, stride=2, bias=False))
        layers += [conv, Norm(b, eps=1e-3), nn.ELU()]
    return layers


class Encoder(nn.Module):
    """Observation to [..., size]. Images shrink 64 -> 31 -> 14 -> 6 -> 2; states go to an MLP."""

    def __init__(self, space: spaces.Dict, config: Config):
        super().__init__()
        self.keys, self.size = list(space), 0
        if "image" in self.keys:
            channels = [3] + [config.cnn_depth * 2**i for i in range(4)]
            self.image = nn.Sequential(*convolutions(nn.Conv2d, channels, [4] * 4))
            self.image.to(memory_format=torch.channels_last)
            self.size += 4 * channels[-1]
        if "state" in self.keys:
            self.state = hidden_layers(space["state"].shape[0], config)
            self.size += config.units

    def forward(self, obs: dict[str, Tensor]) -> Tensor:
        outs = []
        if "image" in self.keys:
            image = obs["image"]  # [..., 64, 64, 3], so the permuted one is channels-last
            x = self.image(image.flatten(0, -4).permute(0, 3, 1, 2).float() / 255)
            outs.append(x.permute(0, 2, 3, 1).reshape(*image.shape[:-3], -1))
        if "state" in self.keys:
            outs.append(self.state(obs["state"]))
        return torch.cat(outs, -1)


class Decoder(nn.Module):
    """Features [..., F] to image [..., 64, 64, 3] in 0..1 (1 -> 5 -> 13 -> 30 -> 64) and state."""

    def __init__(self, feat: int, space: spaces.Dict, config: Config):
        super().__init__()
        self.keys = list(space)
        if "image" in self.keys:
            channels = [feat] + [config.cnn_depth * 2**i for i in (2, 1, 0)]
            layers = convolutions(nn.ConvTranspose2d, channels, [5, 5, 6])
            self.image = nn.Sequential(*layers, glorot(nn.ConvTranspose2d(channels[-1], 3, 6, 2)))
            self.image.to(memory_format=torch.channels_last)
        if "state" in self.keys:
            self.state = MLP(feat, space["state"].shape, config)

    def forward(self, feat: Tensor) -> dict[str, Tensor]:
        outs = {}
        if "image" in self.keys:
            # On one pixel, a transposed convolution is a matrix product: paper 8.7 -> 6.5 s a step.
            first, *rest = self.image
            x = linear(feat, first.weight.permute(2, 3, 1, 0).flatten(0, 2))
            x = x.reshape(-1, *first.kernel_size, first.out_channels).permute(0, 3, 1, 2)
            for layer in rest:
                x = layer(x)
            x = x.float().sigmoid().permute(0, 2, 3, 1)
            outs["image"] = x.reshape(*feat.shape[:-1], *x.shape[1:])
        if "state" in self.keys:
            outs["state"] = self.state(feat)
        return outs


class RSSM(nn.Module):
    """Recurrent state-space model (paper, eq. 1): `deter` [..., D] and `stoch` [..., SC]."""

    def __init__(self, embed: int, action: int, config: Config):
        super().__init__()
        deter, hidden, stoch = config.deter, config.hidden, config.stoch * config.classes
        self.shape = config.stoch, config.classes
        self.initial_deter = nn.Parameter(torch.zeros(deter))
        self.inputs = nn.Sequential(*dense(stoch + action, hidden))
        self.gru = nn.Sequential(*dense(deter + hidden, 3 * deter)[:2])
        self.prior_net = nn.Sequential(*dense(deter, hidden), glorot(Linear(hidden, stoch)))
        self.post_net = nn.Sequential(
            *dense(deter + embed, hidden), glorot(Linear(hidden, stoch)))

    def initial(self) -> tuple[Tensor, Tensor]:
        """The learned first state: deter [D], and the mode of the prior there, [SC]."""
        deter = self.initial_deter.tanh()
        return deter, OneHot(self.prior(deter)).mode.flatten(-2)

    def recur(self, deter: Tensor, stoch: Tensor, action: Tensor) -> Tensor:
        """The next deter, [..., D]."""
        x = self.inputs(torch.cat([stoch, action], -1))
        reset, cand, update = self.gru(torch.cat([deter, x], -1)).float().chunk(3, -1)
        update = (update - 1).sigmoid()  # remembers, at first
        return update * (reset.sigmoid() * cand).tanh() + (1 - update) * deter

    def prior(self, deter: Tensor) -> Tensor:
        """Logits [..., S, C] of stoch before the observation is seen."""
        return self.prior_net(deter).float().unflatten(-1, self.shape)

    def imagine(self, deter: Tensor, stoch: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
        """A step into the unseen: the next deter and stoch."""
        deter = self.recur(deter, stoch, action)
        return deter, OneHot(self.prior(deter)).rsample().flatten(-2)

    def observe(self, deter, stoch, action, embed, is_first, initial=None) -> tuple:
        """A step with an observation, whose embedding is [E, embed]: deter, stoch, its logits.

        Where is_first [E], the step starts from `initial` (by default from `initial()`), without
        the action.
        """
        first, (initial_deter, initial_stoch) = is_first[:, None], initial or self.initial()
        deter = torch.where(first, initial_deter, deter)
        stoch = torch.where(first, initial_stoch, stoch)
        deter = self.recur(deter, stoch, torch.where(first, 0, action))
        logit = self.post_net(torch.cat([deter, embed], -1)).float().unflatten(-1, self.shape)
        return deter, OneHot(logit).rsample().flatten(-2), logit


# ---- World model, goal autoencoder, actor-critic --------------------------------------------


def autocast(config: Config) -> torch.autocast:
    """Mixed precision for forward passes; a context must not span an optimiser's step."""
    return torch.autocast(config.device, torch.bfloat16, config.precision == "bfloat16")


class Optimizer(torch.optim.AdamW):
    """Adam with clipped gradients, and with weight decay for weight matrices only."""

    def __init__(self, module: nn.Module, config: Config):
        self.params = list(module.parameters())
        groups = [{"params": [p for p in self.params if p.ndim > 1], "weight_decay": 1e-2},
                  {"params": [p for p in self.params if p.ndim <= 1], "weight_decay": 0.0}]
        super().__init__(groups, lr=config.learning_rate, eps=1e-6, fused=config.device == "cuda")

    def minimize(self, loss: Tensor) -> Tensor:
        """One step; returns the norm of the gradient before clipping.

        Only these parameters get a gradient, whatever else the loss depends on.
        """
        for param, grad in zip(self.params, torch.autograd.grad(loss, self.params), strict=True):
            param.grad = grad
        norm = nn.utils.clip_grad_norm_(self.params, 100.0)
        self.step()
        self.zero_grad()
        return norm


class WorldModel(nn.Module):
    """Learns to encode observations and to predict what follows (paper, Section 2.1)."""

    def __init__(self, obs_space: spaces.Dict, action: int, config: Config):
        super().__init__()
        self.encoder = Encoder(obs_space, config)
        self.rssm = RSSM(self.encoder.size, action, config)
        feat = config.deter + config.stoch * config.classes
        self.decoder = Decoder(feat, obs_space, config)
        self.reward_head = MLP(feat, (), config)  # in symlog space
        self.cont_head = MLP(feat, (), config)  # logit of not being terminal
        self.kl_adapt = AutoAdapt((), target=3.5, low=1e-5, high=1.0)

    def observe(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Filter chunks [B, T, ...]: deter, stoch, and logits of posterior and prior."""
        embed, first, steps = self.encoder(batch).unbind(1), batch["is_first"], []
        initial = self.rssm.initial()
        deter, stoch = (x.expand(len(first), -1) for x in initial)
        for t in range(first.shape[1]):
            deter, stoch, logit = self.rssm.observe(
                deter, stoch, batch["action"][:, t], embed[t], first[:, t], initial)
            steps.append((deter, stoch, logit))
        deter, stoch, post = (torch.stack(x, 1) for x in zip(*steps, strict=True))
        return {"deter": deter, "stoch": stoch, "post": post, "prior": self.rssm.prior(deter)}

    def loss(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict, dict]:
        """Paper, eq. 2, on chunks [B, T, ...]: loss, states [B, T, ...], metrics."""
        states = self.observe(batch)
        feat = torch.cat([states["deter"], states["stoch"]], -1)
        losses = {}
        for key, mean in self.decoder(feat).items():
            target = batch[key].float() / 255 if key == "image" else batch[key]
            losses[key] = ((mean - target) ** 2).flatten(2).sum(-1)
        losses["reward"] = (self.reward_head(feat) - symlog(batch["reward"])) ** 2
        cont = 1 - batch["is_terminal"].float()
        losses["cont"] = F.binary_cross_entropy_with_logits(
            self.cont_head(feat), cont, reduction="none")
        kl = balanced_kl(states["post"], states["prior"], 0.8)
        losses["kl"] = self.kl_adapt(kl)
        loss = sum(losses.values()).mean()  # each of them is [B, T]
        metrics = {f"{key}_loss": value.mean() for key, value in losses.items()}
        metrics |= {"model_loss": loss, "kl": kl.mean(), "kl_scale": self.kl_adapt.scale}
        for key in ("prior", "post"):
            metrics[f"{key}_ent"] = OneHot(states[key]).entropy().sum(-1).mean()
        return loss, states, metrics

    def decode_goal(self, goal: Tensor) -> dict[str, Tensor]:
        """What a goal [..., D] looks like, with the most likely stochastic state for it."""
        stoch = OneHot(self.rssm.prior(goal)).mode.flatten(-2)
        return self.decoder(torch.cat([goal, stoch], -1))


class GoalAutoencoder(nn.Module):
    """Compresses states into codes that a manager can choose from (paper, Section 2.2)."""

    def __init__(self, config: Config):
        super().__init__()
        self.shape = config.skill_groups, config.skill_classes
        self.encoder = MLP(config.deter, self.shape, config)
        self.decoder = MLP(math.prod(self.shape), (config.deter,), config)
        self.kl_adapt = AutoAdapt((), target=10.0, low=1e-5, high=1.0)

    def encode(self, deter: Tensor) -> OneHot:
        """[..., D] to a distribution of skills [..., G, L] (eq. 3)."""
        return OneHot(self.encoder(deter))

    def decode(self, skill: Tensor) -> Tensor:
        """Skill [..., G, L] to goal [..., D] (eq. 3)."""
        return self.decoder(skill.flatten(-2))

    def loss(self, deter: Tensor) -> tuple[Tensor, dict]:
        """Eq. 4 on states [N, D]: loss, metrics."""
        code = self.encode(deter)
        rec = ((self.decode(code.rsample()) - deter) ** 2).sum(-1)
        kl = (math.log(self.shape[1]) - code.entropy()).sum(-1)  # to a uniform prior
        loss = (rec + self.kl_adapt(kl)).mean()
        return loss, {"goal_loss": loss, "goal_rec": rec.mean(), "goal_kl": kl.mean(),
                      "goal_kl_scale": self.kl_adapt.scale}

    @torch.no_grad()
    def novelty(self, deter: Tensor) -> Tensor:
        """Exploration reward: how badly states are reconstructed, [..., D] -> [...] (eq. 6)."""
        return ((self.decode(self.encode(deter).rsample()) - deter) ** 2).mean(-1)


class ActorCritic(nn.Module):
    """An actor, and a critic for each kind of reward, that learn from imagined trajectories.

    keys, inputs: the parts of a trajectory that both see, and their total size. weights: those
    of the rewards. Discrete actions learn by REINFORCE, continuous ones by back-propagation of
    the returns through the dynamics into the actions (paper, Sections 2.3 and 2.4).
    """

    def __init__(self, keys: tuple, inputs: int, shape: tuple, discrete: bool,
                 weights: dict[str, float], config: Config):
        super().__init__()
        self.keys, self.discrete, self.weights, self.config = keys, discrete, weights, config
        self.actor = MLP(inputs, shape if discrete else (2, *shape), config)
        if not discrete:  # means and deviations are two layers in one, each with its own scale
            for part, scale in zip(self.actor.out.weight.chunk(2), (0.1, 1.0), strict=True):
                nn.init.xavier_uniform_(part, gain=scale**0.5)
        self.critics = nn.ModuleDict({name: MLP(inputs, (), config) for name in weights})
        self.slow = copy.deepcopy(self.critics).requires_grad_(False)
        self.returnnorm = nn.ModuleDict({name: Normalizer("std", 0.999, 1e2) for name in weights})
        self.advnorm = Normalizer("mean_std", 0.99, 1e8)
        # A scale for each dimension of the action, or for each group of a skill.
        self.ent_adapt = AutoAdapt(shape[:-1] if discrete else shape, 0.5, 1e-5, 1e2, inverse=True)
        self.optimizers = {"actor": Optimizer(self.actor, config)}
        self.optimizers |= {f"critic_{k}": Optimizer(v, config) for k, v in self.critics.items()}

    def inputs(self, traj: dict[str, Tensor]) -> Tensor:
        return torch.cat([traj[key] for key in self.keys], -1)

    def policy(self, inputs: Tensor) -> OneHot | BoundedNormal:
        """Distribution of actions, [..., F] -> [..., *shape]."""
        out = self.actor(inputs)
        return OneHot(out, unimix=0.01) if self.discrete else BoundedNormal(*out.unbind(-2))

    def returns(self, name: str, inputs: Tensor, traj: dict) -> tuple[Tensor, Tensor]:
        """Lambda returns, and values of the slow critic, [H, N] both."""
        value = symexp(self.slow[name](inputs))
        discount = self.config.discount * traj["cont"][1:]
        return lambda_return(traj[f"reward_{name}"], value, discount, self.config.lam), value[:-1]

    def update(self, traj: dict[str, Tensor], copy_slow: bool) -> dict[str, Tensor]:
        """Train critics, then actor, on a trajectory [H+1, N, ...]; returns scalar metrics.

        It holds the `keys`, action, cont, and reward_<name> [H, N] for each weight; for continuous
        actions also ent, the `entropy_share` of the actor there, with its graph. `copy_slow`: make
        the slow critics equal to the critics, after the step of the latter.
        """
        metrics, score = {}, 0.0
        inputs = self.inputs(traj)
        weight = trajectory_weights(traj["cont"].detach(), self.config.discount)[:-1]
        for name in self.weights:
            with autocast(self.config):
                ret, value = self.returns(name, inputs, traj)
                pred = self.critics[name](inputs[:-1].detach())
            loss = ((pred - symlog(ret.detach())) ** 2 * weight).mean()
            norm = self.optimizers[f"critic_{name}"].minimize(loss)
            metrics |= {f"{name}_critic_loss": loss, f"{name}_critic_grad_norm": norm,
                        f"{name}_reward": traj[f"reward_{name}"].mean(),
                        f"{name}_return": ret.mean(), f"{name}_value": symexp(pred).mean()}
            if copy_slow:
                self.slow[name].load_state_dict(self.critics[name].state_dict())
                with autocast(self.config):
                    ret, value = self.returns(name, inputs, traj)
            normed = self.returnnorm[name](ret) - self.returnnorm[name](value, update=False)
            metrics[f"{name}_score"] = normed.mean()
            score = score + self.weights[name] * normed
        score = self.advnorm(score)

        if self.discrete:
            with autocast(self.config):
                policy = self.policy(inputs[:-1].detach())
            log_prob = policy.log_prob(traj["action"][:-1].detach())
            loss = -log_prob.reshape(*score.shape, -1).sum(-1) * score.detach()
            entropy = entropy_share(policy)
        else:
            loss, entropy = -score, traj["ent"][:-1]
        bonus = self.ent_adapt(entropy).reshape(*score.shape, -1).sum(-1)
        loss = ((loss + bonus) * weight).mean()
        norm = self.optimizers["actor"].minimize(loss)
        return metrics | {"actor_loss": loss, "actor_grad_norm": norm, "ent": entropy.mean(),
                          "ent_scale": self.ent_adapt.scale.mean()}


def entropy_share(policy: OneHot | BoundedNormal) -> Tensor:
    """Entropy as a share of what is possible, [..., G] or [..., A]."""
    low, high = policy.entropy_range
    return (policy.entropy() - low) / (high - low)


# ---- Hierarchical returns -------------------------------------------------------------------


def max_cosine(goal: Tensor, feat: Tensor) -> Tensor:
    """Goal reward, [..., D], [..., D] -> [...] (paper, eq. 8).

    The cosine, but with the larger of both norms in place of each: lengths have to match, too.
    """
    norm = torch.maximum(goal.norm(dim=-1, keepdim=True), feat.norm(dim=-1, keepdim=True)) + 1e-12
    return ((goal / norm) * (feat / norm)).sum(-1)


def lambda_return(reward: Tensor, value: Tensor, discount: Tensor, lam: float) -> Tensor:
    """R[t] = r[t] + d[t] ((1 - lam) v[t+1] + lam R[t+1]), R[H] = v[H].

    [H, ...], [H+1, ...], [H, ...] -> [H, ...]; `discount` includes the continuation.
    """
    last, returns = value[-1], []
    for t in reversed(range(len(reward))):
        last = reward[t] + discount[t] * ((1 - lam) * value[t + 1] + lam * last)
        returns.append(last)
    return torch.stack(returns[::-1])


def trajectory_weights(cont: Tensor, discount: float) -> Tensor:
    """How much a step counts: the discounted chance to get there, [H+1, ...] -> [H+1, ...].

    1 at the first step, but 0 throughout if that is terminal.
    """
    return (discount * cont).cumprod(0) / discount


def split_trajectory(traj: dict[str, Tensor], k: int) -> dict[str, Tensor]:
    """Cut a trajectory into the worker's, one for each goal (paper, Section 2.4).

    Arrays [H+1, N, ...], rewards [H, N], to arrays [k+1, N*H/k, ...], rewards [k, N*H/k], the
    index of the segment slowest. Neighbours share a state. The goal at a segment's last state is
    the segment's own, so that values there are those under the goal that was pursued.
    """
    horizon = len(traj["cont"]) - 1
    assert horizon % k == 0, (horizon, k)
    split = {}
    for key, value in traj.items():
        length = k if key.startswith("reward") else k + 1
        split[key] = torch.cat([value[t : t + length] for t in range(0, horizon, k)], 1)
    if "goal" in traj:
        split["goal"] = torch.cat([split["goal"][:-1], split["goal"][:1]])
    return split


def abstract_trajectory(traj: dict[str, Tensor], k: int) -> dict[str, Tensor]:
    """See a trajectory as the manager does: every k-th state, skills as actions (Section 2.3).

    Arrays [H+1, N, ...], rewards [H, N], to arrays [H/k+1, N, ...], rewards [H/k, N]. A reward
    is the mean over k steps, each weighted by the chance to get there within the block; cont
    is the product over the block that leads to a state.
    """
    alive = traj["cont"][:-1].unflatten(0, (-1, k)).cumprod(1)  # [H/k, k, N]
    abstract = {"action": traj["skill"][::k]}
    for key, value in traj.items():
        if key.startswith("reward"):
            abstract[key] = (value.unflatten(0, (-1, k)) * alive).mean(1)
        elif key == "cont":
            abstract[key] = torch.cat([value[:1], value[1:].unflatten(0, (-1, k)).prod(1)])
        elif key not in ("action", "skill"):
            abstract[key] = value[::k]
    return abstract


# ---- The agent ------------------------------------------------------------------------------


class Director(nn.Module):
    """World model, goal autoencoder, manager and worker.

    With `--agent dreamer` there are no goals and no manager; the worker is an actor-critic on
    the task reward over the same imagination, the paper's flat baseline.
    """

    def __init__(self, obs_space: spaces.Dict, act_space: spaces.Space, config: Config):
        super().__init__()
        self.config = config
        self.discrete = isinstance(act_space, spaces.Discrete)
        action = (int(act_space.n),) if self.discrete else act_space.shape
        self.sizes = {"deter": config.deter, "stoch": config.stoch * config.classes,
                      "action": action[0], "goal": config.deter}
        self.world_model = WorldModel(obs_space, action[0], config)
        self.optimizers = {"model": Optimizer(self.world_model, config)}
        self.manager, keys, rewards = None, ("deter", "stoch"), {"extr": 1.0}
        feat = config.deter + config.stoch * config.classes
        if config.agent == "director":
            self.goals = GoalAutoencoder(config)
            self.optimizers["goal"] = Optimizer(self.goals, config)
            self.manager = ActorCritic(keys, feat, self.goals.shape, True,
                                       {"extr": 1.0, "expl": config.manager_expl}, config)
            keys, feat, rewards = (*keys, "goal"), feat + config.deter, {"goal": 1.0}
            if config.worker_extr:
                rewards["extr"] = config.worker_extr
        self.worker = ActorCritic(keys, feat, action, self.discrete, rewards, config)
        self.players = {"worker": self.worker} | ({"manager": self.manager} if self.manager else {})
        for name, player in self.players.items():
            self.optimizers |= {f"{name}_{k}": v for k, v in player.optimizers.items()}
        self.grad_steps = 0
        self.to(config.device)

    def tensors(self, arrays: dict[str, np.ndarray]) -> dict[str, Tensor]:
        return {k: torch.as_tensor(v, device=self.config.device) for k, v in arrays.items()}

    @torch.no_grad()
    def propose(self, state: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """The manager's choice: skill [..., G, L] and goal [..., D] (paper, Section 2.3)."""
        skill = self.manager.policy(self.manager.inputs(state)).rsample()
        return skill, self.goals.decode(skill)

    @torch.no_grad()
    def policy(self, obs: dict, state: dict | None = None, mode: str = "train"):
        """Act on an observation, arrays [E, ...] with is_first: actions [E, A] and a state.

        Pass that state to the next call. Actions are one-hot, or not clipped. In mode "eval"
        the worker takes its most likely action; the manager samples in any case. Memory, goal
        and counter start anew at is_first, and everywhere without a state.
        """
        obs = self.tensors({k: obs[k] for k in (*self.world_model.encoder.keys, "is_first")})
        first = obs["is_first"]
        if state is None:
            first = torch.ones_like(first)
            state = {k: first.new_zeros(len(first), n, dtype=torch.float32)
                     for k, n in self.sizes.items()} | {"count": torch.zeros_like(first, dtype=int)}
        with autocast(self.config):
            deter, stoch, _ = self.world_model.rssm.observe(
                state["deter"], state["stoch"], state["action"],
                self.world_model.encoder(obs), first)
            state = {**state, "deter": deter, "stoch": stoch}
            if self.manager:
                count = torch.where(first, 0, state["count"])
                switch = (count % self.config.goal_duration == 0)[:, None]
                state["goal"] = torch.where(switch, self.propose(state)[1], state["goal"])
                state["count"] = count + 1
            policy = self.worker.policy(self.worker.inputs(state))
        state["action"] = policy.mode if mode == "eval" else policy.rsample()
        return state["action"], state

    def imagine(self, deter: Tensor, stoch: Tensor, terminal: Tensor) -> dict[str, Tensor]:
        """Play on in the world model from N states, for H steps.

        Returns deter, stoch, action, cont, and with a manager skill and goal, [H+1, N, ...], and
        the rewards [H, N] of states 1..H. Where actions are continuous, a graph leads from all
        of these back into the actions, and there is ent, their entropy; else there is no graph.
        """
        state, steps = {}, []
        with torch.set_grad_enabled(not self.discrete):
            for t in range(self.config.horizon + 1):
                if t:
                    deter, stoch = self.world_model.rssm.imagine(deter, stoch, state["action"])
                state = {**state, "deter": deter, "stoch": stoch}
                # Actors do not change their inputs: the only way back is through the actions.
                seen = {key: value.detach() for key, value in state.items()}
                if self.manager and t % self.config.goal_duration == 0:
                    state["skill"], state["goal"] = self.propose(seen)
                    seen["goal"] = state["goal"]
                policy = self.worker.policy(self.worker.inputs(seen))
                state["action"] = policy.rsample()
                if not self.discrete:
                    state["ent"] = entropy_share(policy)
                steps.append(state)
            traj = {key: torch.stack([step[key] for step in steps]) for key in state}
            feat = torch.cat([traj["deter"], traj["stoch"]], -1)[1:]
            cont = self.world_model.cont_head(feat).sigmoid()
            traj["cont"] = torch.cat([1 - terminal.float()[None], cont])
            traj["reward_extr"] = symexp(self.world_model.reward_head(feat))
            if self.manager:
                # A state is judged by the goal under which the action that led to it was taken.
                traj["reward_goal"] = max_cosine(traj["goal"][:-1], traj["deter"][1:])
                traj["reward_expl"] = self.goals.novelty(traj["deter"][1:])
        return traj

    def train_step(self, batch: dict[str, np.ndarray]) -> dict[str, Tensor]:
        """One gradient step of everything on replay chunks [B, T, ...]; scalar metrics."""
        batch = self.tensors(batch)
        copy_slow = self.grad_steps % self.config.slow_every == 0
        self.grad_steps += 1
        deter, stoch, metrics = self.train_model(batch)
        if self.manager:
            metrics |= self.train_goals(deter)
        metrics |= self.train_behavior(deter, stoch, batch["is_terminal"].flatten(), copy_slow)
        return {key: value.detach().clone() for key, value in metrics.items()}

    def train_model(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor, dict]:
        """World model; returns deter and stoch of all BT states, and metrics."""
        with autocast(self.config):
            loss, states, metrics = self.world_model.loss(batch)
        metrics["model_grad_norm"] = self.optimizers["model"].minimize(loss)
        deter, stoch = (states[key].detach().flatten(0, 1) for key in ("deter", "stoch"))
        return deter, stoch, metrics

    def train_goals(self, deter: Tensor) -> dict[str, Tensor]:
        """Goal autoencoder, on states [N, D]; returns metrics."""
        with autocast(self.config):
            loss, metrics = self.goals.loss(deter)
        return metrics | {"goal_grad_norm": self.optimizers["goal"].minimize(loss)}

    def train_behavior(self, deter: Tensor, stoch: Tensor, terminal: Tensor, copy_slow: bool):
        """Worker and manager, on trajectories imagined from N states; returns metrics."""
        with autocast(self.config):
            traj = self.imagine(deter, stoch, terminal)
        trajs, metrics, k = {"worker": traj}, {}, self.config.goal_duration
        if self.manager:
            metrics["goal_reached"] = (traj["reward_goal"][k - 1 :: k] > 0.7).float().mean()
            trajs["worker"] = split_trajectory(traj, k)
            trajs["manager"] = abstract_trajectory({k: v.detach() for k, v in traj.items()}, k)
        for name, player in self.players.items():
            more = player.update(trajs[name], copy_slow)
            metrics |= {f"{name}_{key}": value for key, value in more.items()}
        return metrics


# ---- Logging, pictures, checkpoints ---------------------------------------------------------


def write_file(path: pathlib.Path, buffer: io.BytesIO, backup: pathlib.Path | None = None):
    """Write a file such that at any time there is the old one or the new one, never a part."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(buffer.getbuffer())
            file.flush()
            os.fsync(file.fileno())
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    if backup and path.exists():
        os.replace(path, backup)
    os.replace(temporary, path)


def read_metrics(path: pathlib.Path) -> list[dict]:
    """The lines of a metrics.jsonl, without one that a killed process left half-written."""
    lines = []
    for line in path.read_text().splitlines():
        with contextlib.suppress(json.JSONDecodeError):
            lines.append(json.loads(line))
    return lines


class Run:
    """The state of a run, which is what a checkpoint holds, and the folder where it is kept.

    In `logdir`: checkpoint.pt (weights, optimisers, counters, random states, metrics since the
    last log line) and the one before, replay/ (episodes), metrics.jsonl, TensorBoard's events,
    pictures/, config.json.
    """

    def __init__(self, config: Config, envs: gymnasium.vector.VectorEnv):
        torch.manual_seed(config.seed)
        self.config, self.logdir = config, pathlib.Path(config.logdir)
        self.agent = Director(envs.single_observation_space, envs.single_action_space, config)
        self.replay = Replay(config.replay_size, config.seed)
        self.rng = np.random.default_rng([config.seed, 1])  # random actions
        self.step = 0  # environment steps
        self.pending = 0  # environment steps since the last gradient step
        self.metrics = []  # of the gradient steps since the last log line
        self.start = time.time()  # minus what earlier processes took
        self.training = 0.0  # seconds in train steps
        self.best = -math.inf  # score
        self.paths = [self.logdir / name for name in ("checkpoint.pt", "previous.pt")]
        self.writer = None

    def save(self):
        """Write the episodes, then the checkpoint that lists them."""
        self.check()
        buffer = io.BytesIO()
        torch.save({
            "config": dataclasses.asdict(self.config), "agent": self.agent.state_dict(),
            "optimizers": {k: v.state_dict() for k, v in self.agent.optimizers.items()},
            "counters": [self.step, self.pending, self.agent.grad_steps, self.best],
            "seconds": time.time() - self.start,
            "rngs": [self.rng.bit_generator.state, self.replay.rng.bit_generator.state],
            "torch_rngs": [torch.get_rng_state(), *torch.cuda.get_rng_state_all()[:1]],
            "metrics": self.metrics, "episodes": self.replay.save(self.logdir / "replay")}, buffer)
        write_file(self.paths[0], buffer, backup=self.paths[1])

    def load(self, replay: bool = True) -> dict:
        """Continue from the newest readable checkpoint; UserError if it is of another run.

        Returns the configuration that it was made with, {} if there is no checkpoint.
        """
        paths = [path for path in self.paths if path.exists()]
        for path in paths:
            try:
                state = torch.load(path, map_location="cpu", weights_only=True)
                counters, episodes = state["counters"], state["episodes"]
                break
            except Exception as error:  # noqa: BLE001, truncated or foreign, all can happen
                reason = str(error).split("\n")[0]
                print(f"{path} cannot be read: {reason}", file=sys.stderr)
        else:
            if paths:
                raise UserError(f"--logdir {self.logdir}: no checkpoint there can be read; move "
                                "them away to start anew, or use another --logdir")
            return {}
        for key in ("task", "obs", "render_quality", "agent", "deter", "hidden", "stoch", "classes",
                    "units", "layers", "cnn_depth", "skill_groups", "skill_classes", "worker_extr"):
            old, new = state["config"][key], getattr(self.config, key)
            if old != new:
                raise UserError(f"--logdir {self.logdir}: holds a run with --{key} {old}, not "
                                f"{new}; use its flags, or another --logdir")
        self.agent.load_state_dict(state["agent"])
        for key, optimizer in self.agent.optimizers.items():
            optimizer.load_state_dict(state["optimizers"][key])
        self.step, self.pending, self.agent.grad_steps, self.best = counters
        self.start = time.time() - state["seconds"]
        self.rng.bit_generator.state, self.replay.rng.bit_generator.state = state["rngs"]
        torch.set_rng_state(state["torch_rngs"][0])
        if self.config.device == "cuda" and state["torch_rngs"][1:]:
            torch.cuda.set_rng_state(state["torch_rngs"][1])
        self.metrics = [{key: value.to(self.config.device) for key, value in row.items()}
                        for row in state["metrics"]]
        if replay:
            self.replay.load(self.logdir / "replay", episodes)
        return state["config"]

    def open(self):
        """Start to write: forget metrics from after the checkpoint, which will come again."""
        self.logdir.mkdir(parents=True, exist_ok=True)
        config = json.dumps(dataclasses.asdict(self.config), indent=2)
        write_file(self.logdir / "config.json", io.BytesIO(config.encode()))
        path = self.logdir / "metrics.jsonl"
        lines = read_metrics(path) if path.exists() else []
        text = "".join(json.dumps(line) + "\n" for line in lines if line["step"] <= self.step)
        write_file(path, io.BytesIO(text.encode()))
        self.writer = SummaryWriter(self.logdir, purge_step=self.step + 1)

    def log(self, metrics: dict[str, float]):
        """Append to metrics.jsonl, and to TensorBoard's events under the same names."""
        line = {"step": self.step, "seconds": round(time.time() - self.start, 1), **metrics}
        with open(self.logdir / "metrics.jsonl", "a") as file:
            file.write(json.dumps(line) + "\n")
        for key, value in metrics.items():
            self.writer.add_scalar(key, value, self.step)

    def check(self) -> Tensor:
        """The metrics since the last log line, [rows, names]; RunError if one is not finite."""
        rows = [torch.stack(list(row.values())) for row in self.metrics]
        table = torch.stack(rows).cpu() if rows else torch.zeros(0, 0)
        for row, column in torch.nonzero(~table.isfinite())[:1].tolist():
            name, step = list(self.metrics[0])[column], self.agent.grad_steps - len(rows) + row + 1
            raise RunError(f"{name} is {table[row, column]} at gradient step {step}; the "
                           f"checkpoint in {self.logdir} is from before")
        return table

    def averages(self) -> dict[str, float]:
        """Means of the metrics since the last call."""
        means = self.check().mean(0).tolist()
        names = [f"train/{key}" for row in self.metrics[:1] for key in row]
        self.metrics = []
        return dict(zip(names, means, strict=True))

    def train(self, steps: int):
        """The gradient steps that are due after so many environment steps."""
        self.pending += steps
        while self.pending >= self.config.train_every:
            self.pending -= self.config.train_every
            batch = self.replay.sample(self.config.batch_size, self.config.batch_length)
            begin = time.time()
            self.metrics.append(self.agent.train_step(batch))
            self.training += time.time() - begin

    def picture(self, name: str, *rows: Tensor):
        """Images [B, T, h, w, 3] uint8, rows of B of them, to pictures/<step>-<name>.

        That is a GIF of T frames, or a PNG if T is 1; TensorBoard shows eight frames of it.
        """
        frames = torch.cat(rows, 2).permute(1, 2, 0, 3, 4).flatten(2, 3).numpy()
        path, buffer = self.logdir / "pictures" / f"{self.step}-{name}", io.BytesIO()
        path.parent.mkdir(exist_ok=True)
        if len(frames) > 1:  # to 256 colours in a way that is ten times as fast as the default one
            octree = functools.partial(Image.Image.quantize, method=Image.Quantize.FASTOCTREE)
            colors = [np.asarray(octree(Image.fromarray(x)).convert("RGB")) for x in frames]
            imageio.mimwrite(buffer, colors, format="gif", duration=50, loop=0)
        else:
            imageio.imwrite(buffer, frames[0], format="png")
        write_file(path.with_suffix(".gif" if len(frames) > 1 else ".png"), buffer)
        if self.writer:
            strip = np.concatenate(frames[:: math.ceil(len(frames) / 8)], 1)
            self.writer.add_image(f"pictures/{name}", strip, self.step, dataformats="HWC")

    @torch.no_grad()
    def draw(self, film: list[tuple], steps: int = 64):
        """Pictures of an episode, (image, goal) per step, and of six imagined trajectories."""
        agent, model = self.agent, self.agent.world_model

        def as_bytes(image: Tensor) -> Tensor:
            return (image * 255).byte().cpu()

        rows = [torch.from_numpy(np.stack([image for image, _ in film]))]
        if agent.manager:
            goals = torch.stack([goal for _, goal in film]).split(64)
            rows.append(torch.cat([as_bytes(model.decode_goal(goal)["image"]) for goal in goals]))
        self.picture("episode", torch.cat(rows, 2)[None])
        self.picture("filmstrip", *(row[::25, None] for row in rows))

        batch = agent.tensors(self.replay.sample(6, steps))
        states = model.observe({key: value[:, :5] for key, value in batch.items()})

        def unroll(act) -> Tensor:
            """Images [6, steps, 64, 64, 3] of five observed states, and of imagined ones."""
            feats = list(torch.cat([states["deter"], states["stoch"]], -1).unbind(1))
            deter, stoch = states["deter"][:, -1], states["stoch"][:, -1]
            for t in range(5, steps):
                deter, stoch = model.rssm.imagine(deter, stoch, act(t, deter, stoch))
                feats.append(torch.cat([deter, stoch], -1))
            return model.decoder(torch.stack(feats, 1))["image"]

        truth = batch["image"].float() / 255
        guess = unroll(lambda t, deter, stoch: batch["action"][:, t])
        self.picture("openloop", *map(as_bytes, (truth, guess, (guess - truth + 1) / 2)))
        if not agent.manager:
            return
        start = {"deter": states["deter"][:, -1], "stoch": states["stoch"][:, -1]}
        codes = {"manager": agent.manager.policy(agent.manager.inputs(start)),
                 "prior": OneHot(torch.zeros(6, *agent.goals.shape, device=truth.device)),
                 "replay": agent.goals.encode(start["deter"].roll(1, 0))}
        for name, code in codes.items():
            goal = agent.goals.decode(code.rsample())
            images = unroll(lambda t, deter, stoch, goal=goal: agent.worker.policy(
                torch.cat([deter, stoch, goal], -1)).rsample())
            still = model.decode_goal(goal)["image"][:, None].expand_as(images)
            start_image = truth[:, 4:5].expand_as(images)
            self.picture(f"worker-{name}", *map(as_bytes, (start_image, still, images)))


# ---- Training and evaluation ----------------------------------------------------------------


def train(config: Config) -> int:
    """Train until `config.steps`, from the checkpoint in `config.logdir` if there is one.

    Returns 0, or the number of the signal (SIGINT, SIGTERM) after which it saved and stopped.
    """
    envs = make_envs(config, config.envs)
    run = Run(config, envs)
    old = run.load()
    if run.step >= config.steps:
        close(envs)
        print(f"{run.logdir} is at step {run.step} already; for more, raise --steps.")
        return 0
    seed = np.random.SeedSequence([config.seed, run.step]).generate_state(1)[0] // 2
    driver = Driver(envs, int(seed))
    run.open()
    size = sum(param.numel() for param in run.agent.parameters())
    print(f"{config.task}: {config.agent} of size {config.size} ({size / 1e6:.1f}M parameters), "
          f"{config.precision} on {config.device}, in {run.logdir}")
    if old:
        new = dataclasses.asdict(config)
        changed = [f" --{key} is {new[key]}, was {old[key]}." for key in old.keys() & new
                   if old[key] != new[key]]
        print(f"Resumed at step {run.step}.", *sorted(changed), sep="", flush=True)
    if run.step < config.prefill:
        print(f"Until step {config.prefill} actions are random, then training starts.", flush=True)
    stops, previous = [], {}

    def stop(number, frame):  # finish the step; the second signal acts at once
        stops.append(number)
        signal.signal(number, signal.SIG_DFL)

    with contextlib.suppress(ValueError):  # signals can be caught in the main thread only
        previous = {number: signal.signal(number, stop)
                    for number in (signal.SIGINT, signal.SIGTERM)}
    bar = tqdm.tqdm(total=config.steps, initial=run.step, unit="step", disable=None)
    try:
        play(run, driver, bar, stops)
        run.save()
    finally:
        bar.close()
        run.writer.close()
        for number, handler in previous.items():
            signal.signal(number, handler)
        close(envs)
    if stops:
        print(f"Stopped and saved at step {run.step}; the same command resumes.")
    return stops[0] if stops else 0


def play(run: Run, driver: Driver, bar: tqdm.tqdm, stops: list):
    """The training loop, until `config.steps`, or until `stops` is not empty."""
    config, state, goal, errors = run.config, None, None, []
    say = functools.partial(print, flush=True) if bar.disable else bar.write
    run.replay.add(driver.rows)
    saved, drawn = time.time(), run.step
    logged, since, run.training = run.step, time.time(), 0.0
    while run.step < config.steps and not stops:
        before = run.step
        if before < config.prefill:
            action = driver.random(run.rng)
        else:
            action, state = run.agent.policy(driver.rows, state)
            action, goal = action.cpu().numpy(), state["goal"]
            if not np.isfinite(action).all():
                run.check()  # tells which loss it was
        try:
            driver.step(action, goal)
        except (EOFError, ConnectionError):
            run.save()
            raise
        run.replay.add(driver.rows)
        for env in np.flatnonzero(~driver.rows["is_first"]):
            run.step += 1
            if driver.rows["is_last"][env]:
                score, length = float(driver.score[env]), int(driver.length[env])
                run.best = max(run.best, score)
                run.log({"episode/score": score, "episode/length": length})
                say(f"step {run.step}: episode of {length} steps, return {score:.1f}")
                bar.set_postfix(last=score, best=run.best, grads=run.agent.grad_steps)
        for error in driver.errors:
            errors = [step for step in errors if step > run.step - 1000] + [run.step]
            say(f"step {run.step}: an environment failed and was made anew\n{error}")
            if len(errors) >= 5:
                run.save()
                raise RunError(f"environments failed {len(errors)} times in 1000 steps, see above; "
                               f"saved at step {run.step}. The last: {error.splitlines()[-1]}")
        if before >= config.prefill:
            run.train(run.step - before)
        bar.set_description("random actions" if run.step < config.prefill else "training", False)
        bar.update(run.step - before)

        if before // config.log_every < run.step // config.log_every or run.step >= config.steps:
            metrics = run.averages()
            seconds = time.time() - since
            rate = (run.step - logged) / seconds
            run.log({
                **metrics, "train/grad_steps": run.agent.grad_steps,
                "train/steps_per_second": rate, "train/other_seconds": seconds - run.training,
                "train/training_seconds": run.training, "train/replay_steps": run.replay.steps,
                "train/peak_memory_gb": peak_memory()})
            losses = [f"  {k[6:]} {v:.3g}" for k, v in metrics.items() if k.endswith("loss")]
            say(f"step {run.step}: {run.agent.grad_steps} gradient steps, {rate:.1f} steps/s"
                + "".join(losses))
            logged, since, run.training = run.step, time.time(), 0.0
        due = driver.film and run.step >= drawn + config.video_every
        if due and driver.rows["is_last"][0]:
            run.draw(driver.film)
            drawn = run.step
        if time.time() > saved + config.save_every:
            run.save()
            saved = time.time()


def close(envs: gymnasium.vector.VectorEnv):
    """Close environments; those in processes are terminated, which works with dead ones, too."""
    if isinstance(envs, AsyncVectorEnv):
        for process in envs.processes:
            process.terminate()
            process.join()
        envs.closed = True
    envs.close()


def evaluate(config: Config) -> list[float]:
    """Play `config.eval` episodes with the agent in `config.logdir`; prints and returns scores.

    Writes eval.json, and pictures of the first episode.
    """
    envs = make_envs(config, 1)
    run = Run(config, envs)
    if not run.load(replay=False):
        raise UserError(f"--logdir {config.logdir}: holds no checkpoint.pt")
    driver, state, scores = Driver(envs, config.seed), None, []
    while len(scores) < config.eval:
        action, state = run.agent.policy(driver.rows, state, mode="eval")
        if not scores:
            run.replay.add(driver.rows)  # for the pictures
        driver.step(action.cpu().numpy(), state["goal"])
        if driver.errors:
            raise RunError(f"the environment failed:\n{driver.errors[0]}")
        if driver.rows["is_last"][0]:
            scores.append(float(driver.score[0]))
            print(f"episode {len(scores)}: return {scores[-1]:.1f}", flush=True)
            if driver.film and len(scores) == 1:
                run.draw(driver.film)
    close(envs)
    result = {"step": run.step, "mean": np.mean(scores), "std": np.std(scores), "scores": scores}
    write_file(run.logdir / "eval.json", io.BytesIO(json.dumps(result).encode()))
    print(f"mean {result['mean']:.1f}, standard deviation {result['std']:.1f}")
    return scores


def benchmark(config: Config) -> dict[str, dict]:
    """Time the parts of training; prints and returns {part: {median, min, max, unit}}."""
    make_env(config.task, config).close()  # a user's mistake shows here
    rows = {}

    def add(part: str, unit: str, values) -> float:
        low, median, high = np.quantile(values, (0, 0.5, 1)).tolist()
        rows[part] = {"median": median, "min": low, "max": high, "unit": unit}
        return median

    def measure(part: str, repeats: int, call, amount: float = 0, unit: str = "steps/s") -> float:
        """Median seconds of a call, after two others; or the rate, if it does some amount."""
        times = [time.perf_counter()]
        for _ in range(repeats + 2):
            call()
            if config.device == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter())
        seconds = np.diff(times)[2:]
        return add(part, unit, amount / seconds) if amount else add(part, "s", seconds)

    # The whole program: from its start to the first gradient step, then the loop.
    with tempfile.TemporaryDirectory() as folder:
        flags = {k: v for k, v in dataclasses.asdict(config).items() if not isinstance(v, bool)}
        flags |= {"logdir": folder, "prefill": config.envs * config.batch_length,
                  "log_every": 4 * config.train_every}
        for grad_steps in (1, 24):
            flags["steps"] = flags["prefill"] + grad_steps * config.train_every
            command = [sys.executable, __file__, *(f"--{k}={v}" for k, v in flags.items())]
            begin = time.perf_counter()
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            if grad_steps == 1:
                add("start to first gradient step", "s", time.perf_counter() - begin)
        lines = read_metrics(pathlib.Path(folder, "metrics.jsonl"))
    lines = [line for line in lines if "train/model_loss" in line][2:]
    train, other = ([x[f"train/{key}_seconds"] for x in lines] for key in ("training", "other"))
    add("whole loop", "steps/s", [line["train/steps_per_second"] for line in lines])
    add("whole loop, all but train steps", "of 1", np.divide(other, np.add(train, other)))

    envs = make_envs(config, config.envs)
    run, driver = Run(config, envs), Driver(envs, config.seed)
    agent, drivers = run.agent, {"environments, all at once": driver}
    bare = "state" if config.task.startswith("dmc_") else config.obs  # without rendering
    for obs in dict.fromkeys((config.obs, bare)):
        make = functools.partial(make_env, config.task, dataclasses.replace(config, obs=obs))
        drivers[f"one environment, --obs {obs}"] = Driver(SyncVectorEnv([make]), config.seed)
    for part, each in drivers.items():
        play_random = functools.partial(lambda each: each.step(each.random(run.rng)), each)
        measure(part, 200, play_random, len(each.score))
    for _ in range(2 * config.batch_length):
        run.replay.add(driver.rows)
        driver.step(driver.random(run.rng))
    measure("acting", 50, lambda: agent.policy(driver.rows)[0].cpu())
    sample = functools.partial(run.replay.sample, config.batch_size, config.batch_length)
    measure("replay, one batch", 20, sample)

    arrays = sample()
    seconds = measure("train step", 5, lambda: agent.train_step(arrays))
    batch = agent.tensors(arrays)
    deter, stoch, _ = agent.train_model(batch)
    measure("  of it model", 5, lambda: agent.train_model(batch))
    if agent.manager:
        measure("  of it goals", 5, lambda: agent.train_goals(deter))
    terminal = batch["is_terminal"].flatten()
    measure("  of it behavior", 5, lambda: agent.train_behavior(deter, stoch, terminal, False))
    for param in agent.parameters():
        param.grad = torch.zeros_like(param)
    measure("  of it optimizers, in all", 5, lambda: [x.step() for x in agent.optimizers.values()])
    n = 2048 if config.device == "cpu" else 8192
    x = torch.randn(n, n, device=config.device, dtype=getattr(torch, config.precision))
    with autocast(config):
        rate = measure("matrix product", 10, lambda: linear(x, x), 2e-12 * n**3, "TFLOP/s")
    with FlopCounterMode(display=False) as counter:
        agent.train_step(arrays)
    work = add("train step, arithmetic", "TFLOP", counter.get_total_flops() / 1e12)
    add("train step, of the matrix rate", "of 1", work / seconds / rate)
    add("peak memory", "GB", peak_memory())
    close(envs)
    if config.json:
        print(json.dumps({"config": dataclasses.asdict(config), **rows}))
    else:
        for part, row in rows.items():
            print(f"{part:32}" + "{median:10.4g} {unit} ({min:.4g} to {max:.4g})".format(**row))
    return rows


def peak_memory() -> float:
    """Most memory that this process has had, in GB: of the GPU, if it computes there."""
    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated() / 2**30
    unit = 2**20 if sys.platform == "linux" else 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def keep_memory():
    """Ask glibc not to hand large buffers back to the kernel after each step.

    Median of 8 train steps on two cores, xs at 16x64 in float32: 1.09 s instead of 1.51 s.
    """
    with contextlib.suppress(AttributeError, OSError, TypeError):
        libc = ctypes.CDLL(None)
        libc.mallopt(-4, 0)  # M_MMAP_MAX: allocate from the heap
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: and keep it


def saved_config(path: pathlib.Path) -> dict:
    """What a run was started with; where to compute is for this machine to decide."""
    try:
        config = {**json.loads(path.read_text()), "device": "auto", "precision": "auto"}
        Config(**config)
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{path}: not the configuration of a run: {error}") from error
    return config


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit code: 2 for a user's mistake, 1 for a run that failed."""
    try:
        flags = parse_args(argv)
        if flags.get("eval") and "logdir" in flags:
            flags = {**saved_config(pathlib.Path(flags["logdir"], "config.json")), **flags}
        config = Config(**flags)
        keep_memory()
        if config.eval or config.benchmark:
            (evaluate if config.eval else benchmark)(config)
            return 0
        number = train(config)
        return 128 + number if number else 0
    except (UserError, RunError) as error:
        print(f"director.py: {error}", file=sys.stderr)
        return 2 if isinstance(error, UserError) else 1
    except (EOFError, ConnectionError):
        print("director.py: the process of an environment has died (killed, out of memory?); what "
              "was saved in --logdir is kept, and the same command resumes", file=sys.stderr)
        return 1
    except KeyboardInterrupt:  # before the run has begun, or at the second one
        return 128 + signal.SIGINT
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES,
                               errno.EPERM, errno.EEXIST, errno.ENOTDIR):
            raise
        print(f"director.py: cannot write to --logdir: {error}; what was saved there is kept, and "
              "the same command resumes from it", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
