"""Environments side by side, in this process or in a process each, and how they are driven."""

import contextlib
import functools
import multiprocessing.forkserver
import signal
from collections.abc import Callable

import gymnasium
import numpy as np
from gymnasium import spaces
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv

# Signals that end a run; it saves first. The main process alone handles them.
SIGNALS = [x for x in signal.Signals if x.name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1")]


@contextlib.contextmanager
def side_by_side(make: Callable, amount: int, processes: bool):
    """A vector environment of `amount` times `make()`, closed at the end, whatever happens.

    Autoreset is NEXT_STEP: the last observation of an episode comes with its reward and flags;
    the step after that ignores its action and brings the first observation of the next one.
    """
    vector_class = SyncVectorEnv
    others = set(multiprocessing.active_children())
    if processes:
        # A fork server, since this process has threads and may have opened a GPU. It inherits
        # ignored signals, so that a signal to the whole group is handled by this process alone.
        vector_class = functools.partial(AsyncVectorEnv, context="forkserver")
        multiprocessing.set_forkserver_preload(["__main__", "director"])
        with contextlib.suppress(ValueError):  # only the main thread can set handlers
            handlers = {number: signal.signal(number, signal.SIG_IGN) for number in SIGNALS}
            multiprocessing.forkserver.ensure_running()
            for number, handler in handlers.items():
                signal.signal(number, handler)
    envs = None
    try:
        envs = vector_class([make] * amount, autoreset_mode=AutoresetMode.NEXT_STEP)
        yield envs
    finally:
        for process in set(multiprocessing.active_children()) - others:
            process.kill()  # it may hang
            process.join()
        if envs:
            envs.closed = isinstance(envs, AsyncVectorEnv)  # as their processes have ended
            envs.close()


class Driver:
    """Steps a vector environment, and shapes its data for the replay and for the policy.

    `rows`, arrays [E, ...]: the observation; the action **that led to it**, one-hot or unclipped,
    zeros on a first step; reward, is_first, is_last, is_terminal. `score` and `length` [E] are
    those of the episode so far. `film` holds (image, goal) of the first environment's episode.
    """

    def __init__(self, envs: gymnasium.vector.VectorEnv, seed: int):
        self.envs = envs
        self.space = envs.single_action_space
        self.discrete = isinstance(self.space, spaces.Discrete)
        self.actions = int(self.space.n) if self.discrete else self.space.shape[0]
        self.score = self.length = 0
        self.film = []
        envs.action_space.seed(seed)
        obs, _ = envs.reset(seed=seed)
        amount = envs.num_envs
        no = np.zeros(amount, bool)
        self.update(obs, np.zeros((amount, self.actions)), np.zeros(amount), ~no, no, no)

    def random_action(self) -> np.ndarray:
        """Uniformly random actions [E, A]."""
        action = self.envs.action_space.sample()
        return np.eye(self.actions)[action - self.space.start] if self.discrete else action

    def step(self, action: np.ndarray, state: dict | None = None):
        """Act, [E, A], in the policy's state; where an episode has ended, the next one begins."""
        if self.rows["is_first"][0]:
            self.film = []
        if "image" in self.rows and state and len(self.film) < 10_000:
            goal = state["goal"][0] if "goal" in state else None
            self.film.append((self.rows["image"][0], goal))
        is_first = self.rows["is_last"]
        action = np.where(is_first[:, None], 0, action)
        command = action.argmax(-1) + self.space.start if self.discrete else action.clip(-1, 1)
        obs, reward, terminated, truncated, _ = self.envs.step(command.astype(self.space.dtype))
        self.update(obs, action, reward, is_first, terminated | truncated, terminated)

    def update(self, obs, action, reward, is_first, is_last, is_terminal):
        self.rows = {**obs, "action": np.float32(action), "reward": np.float32(reward),
                     "is_first": is_first, "is_last": is_last, "is_terminal": is_terminal}
        for key, value in self.rows.items():
            if not np.isfinite(value).all():
                raise FloatingPointError(f"{key} is not finite: {value}")
        self.score = np.where(is_first, 0, self.score + reward)
        self.length = np.where(is_first, 0, self.length + 1)
