"""Environments side by side, in this process or in a process each, and how they are driven."""

import contextlib
import functools
import multiprocessing
import multiprocessing.forkserver
import os
import signal
import sys
import time
from collections.abc import Callable, Iterable

import gymnasium
import numpy as np
from gymnasium import spaces

from envs import UserError

try:
    from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv
except ImportError as error:
    raise ImportError(f"gymnasium {gymnasium.__version__} is too old: it needs 1.1 or newer, see "
                      "requirements.txt") from error

# Signals that end a run, which saves first. Processes of environments do not get them.
SIGNALS = [x for x in signal.Signals if x.name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1")]

CLOSE_SECONDS = 10  # that environments may take to close


@contextlib.contextmanager
def side_by_side(makes: list[Callable], processes: bool):
    """A vector environment of `make()` for each make, closed at the end, whatever happens.

    Autoreset is NEXT_STEP: the last observation of an episode comes with its reward and flags;
    the step after that ignores its action and brings the first observation of the next one.
    """
    if not processes:
        envs = SyncVectorEnv(makes, autoreset_mode=AutoresetMode.NEXT_STEP)
        try:
            yield envs
        finally:
            with time_limit(CLOSE_SECONDS):
                envs.close()
        return
    if getattr(multiprocessing.current_process(), "_inheriting", False):
        raise UserError("a script that trains in processes has to begin with the line: "
                        'if __name__ == "__main__":')
    start_fork_server()
    others = set(multiprocessing.active_children())
    envs = None
    try:
        envs = AsyncVectorEnv([functools.partial(make_in_group, make) for make in makes],
                              context="forkserver", autoreset_mode=AutoresetMode.NEXT_STEP)
        yield envs
    finally:
        with ignored_signals():  # it takes CLOSE_SECONDS at most
            started = envs.processes if envs else set(multiprocessing.active_children()) - others
            close_processes(envs, started)


def start_fork_server():
    """Start the process that forks a process for each environment.

    This process cannot be forked, since it has threads and may have opened a GPU. The server
    ignores signals: those to the whole group are handled by this process alone.
    """
    multiprocessing.set_forkserver_preload(["__main__", "director"])
    with ignored_signals():
        multiprocessing.forkserver.ensure_running()


@contextlib.contextmanager
def ignored_signals():
    """Ignore SIGNALS inside the block; only the main thread can do that."""
    try:
        handlers = {number: signal.signal(number, signal.SIG_IGN) for number in SIGNALS}
    except ValueError:
        handlers = {}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def make_in_group(make: Callable) -> gymnasium.Env:
    """Make an environment; if this process is its own, in a process group of its own.

    So a terminal's Ctrl-C reaches only the main process. At the end, that kills the group with all
    that the environment has started, which begins with the default handling of signals.
    """
    if multiprocessing.parent_process() is not None:
        for number in SIGNALS:
            signal.signal(number, signal.SIG_DFL)
        os.setpgid(0, 0)
    return make()


def close_processes(envs: AsyncVectorEnv | None, processes: Iterable):
    """Close environments and end their processes, after CLOSE_SECONDS also against their will."""
    if envs is not None:
        for pipe in filter(None, envs.parent_pipes):  # None: this environment has raised an error
            with contextlib.suppress(OSError):  # its process has ended
                pipe.send(("close", None))
        deadline = time.monotonic() + CLOSE_SECONDS
        for process in processes:
            process.join(max(0.0, deadline - time.monotonic()))
        envs.closed = True
    for process in processes:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        process.kill()
        process.join()


class Expired(BaseException):
    """Not an Exception, so that no environment handles it."""


@contextlib.contextmanager
def time_limit(seconds: float):
    """Leave the block after so many seconds, with a line on stderr; POSIX, main thread only."""

    def expire(number, frame):
        raise Expired

    try:
        handler = signal.signal(signal.SIGALRM, expire)
    except (AttributeError, ValueError):
        yield
        return
    try:
        signal.setitimer(signal.ITIMER_REAL, seconds)
        yield
    except Expired:
        print(f"The environments did not close within {seconds} seconds.", file=sys.stderr)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)


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
        with self.named_deaths():
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
        if "image" in self.rows and state:
            goal = state["goal"][0].clone() if "goal" in state else None
            self.film.append((self.rows["image"][0].copy(), goal))  # not the whole batch
        is_first = self.rows["is_last"]
        action = np.where(is_first[:, None], 0, action)
        command = action.argmax(-1) + self.space.start if self.discrete else action.clip(-1, 1)
        with self.named_deaths():
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

    @contextlib.contextmanager
    def named_deaths(self):
        """If the process of an environment has died, say which one and of what."""
        try:
            yield
        except (EOFError, ConnectionError) as error:
            for index, process in enumerate(getattr(self.envs, "processes", [])):
                process.join(1)
                if process.exitcode is not None:
                    code = process.exitcode
                    cause = signal.Signals(-code).name if code < 0 else f"exit code {code}"
                    raise RuntimeError(
                        f"the process of environment {index} died ({cause})") from error
            raise
