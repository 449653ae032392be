"""The folder of a run: its name, its lock, and what is read from it.

A run has an id, which is in config.json, in the checkpoint, and in the names of the folder of its
episodes and of temporary files. Such files with another id are never read or changed.
"""

import contextlib
import dataclasses
import json
import os
import pathlib
import sys
import zipfile

import filelock
import numpy as np
import torch
from gymnasium import spaces

from envs import UserError
from envs.wrappers import IMAGE


def agent_name(agent: type) -> str:
    """The name of its file, and of its class unless that is Director or Agent."""
    file = getattr(sys.modules.get(agent.__module__), "__file__", "notebook")
    name = pathlib.Path(file).stem
    return name if agent.__name__ in ("Director", "Agent") else f"{name}-{agent.__name__}"


def run_names(config, agent: type) -> list[str]:
    """["director"], ["dreamer"], or for a variant ["hac"] or ["disagreement", "dreamer"]."""
    names = [name for name in (agent_name(agent), config.agent) if name != "director"]
    return names or ["director"]


def run_folder(config, agent: type) -> pathlib.Path:
    """--logdir, or its default, from task, agent, size and seed."""
    name = "-".join(run_names(config, agent))
    default = f"runs/{config.task.replace('/', '-')}/{name}-{config.size}-{config.seed}"
    folder = pathlib.Path(config.logdir or default).absolute()
    try:
        str(folder).encode()
    except UnicodeEncodeError as error:
        raise UserError(f"--logdir {ascii(str(folder))}: its name is not UTF-8") from error
    return folder


def read_settings(logdir: pathlib.Path) -> dict:
    """What is in config.json; {} if the folder holds no run."""
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
        settings = json.loads((logdir / "config.json").read_text())
        return settings if settings["run_id"] else {}
    return {}


class Lock:
    """Reserves a folder for this process, as long as it lives; UserError if it cannot be."""

    def __init__(self, logdir: pathlib.Path):
        self.logdir = logdir
        self.path = logdir / "lock"
        logdir.mkdir(parents=True, exist_ok=True)
        names = [path.name for path in logdir.iterdir()
                 if path.name != "lock" and not path.name.startswith(".tmp-")]
        if names and not read_settings(logdir):
            raise UserError(f"--logdir {logdir}: holds {min(names)}, but no run whose config.json "
                            "can be read; use another folder")
        self.lock = filelock.FileLock(self.path)
        try:
            self.lock.acquire(blocking=False)
        except filelock.Timeout as error:
            raise UserError(f"--logdir {logdir}: another process trains there") from error
        self.stat = self.path.stat()

    def check(self, replay_dir: pathlib.Path):
        """UserError if this is no longer the folder that was reserved, or its episodes are gone."""
        if (not replay_dir.exists() or not self.path.exists()
                or not os.path.samestat(self.path.stat(), self.stat)):
            raise UserError(f"{self.logdir}, its file lock or its replay was moved or deleted; "
                            "nothing is saved there")

    def release(self):
        self.lock.release()


@contextlib.contextmanager
def reading(path: pathlib.Path):
    """Turns whatever a damaged or foreign file raises into a UserError."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        reason = " ".join(str(getattr(error, "strerror", None) or error).split())[:300]
        raise UserError(f"{path} cannot be used: {reason}") from error


def read_checkpoint(path: pathlib.Path) -> dict:
    """Checksums are verified, and only tensors, numbers, strings and containers are unpickled."""
    with zipfile.ZipFile(path) as file:
        if file.testzip():
            raise ValueError("its checksums do not match")
    saved = torch.load(path, map_location="cpu", weights_only=True)
    if saved.get("format") != 4:
        raise ValueError("it was written by an older version of this program")
    return saved


def refuse_other_run(saved: dict, logdir: pathlib.Path, agent: type, flags: dict):
    """UserError if a checkpoint is of another kind of agent, task or network than asked for."""
    if saved["variant"] not in (agent_name(agent), *agent.compatible_variants):
        raise UserError(f"--logdir {logdir}: holds a run of {saved['variant']}; use its program")
    for field in dataclasses.fields(agent.Config):
        old = saved["config"].get(field.name)
        new = flags.get(field.name, old)
        if field.metadata["fixed"] and old not in (None, new):
            raise UserError(f"--logdir {logdir}: holds a run with --{field.name} {old}, not {new}; "
                            "use its flags, or another --logdir")


def saved_arguments(saved: dict, logdir: pathlib.Path, agent: type, flags: dict) -> tuple:
    """The spaces and settings, except the given flags, with which a checkpoint's agent was made."""
    old = {key: value for key, value in saved["config"].items() if hasattr(agent.Config, key)}
    config = agent.Config(
        **{**old, "device": "auto", "precision": "auto", **flags, "logdir": str(logdir)})
    sizes, action = saved["spaces"]
    obs_space = spaces.Dict({key: IMAGE if key == "image" else spaces.Box(-np.inf, np.inf, (size,))
                             for key, size in sizes.items()})
    act_space = spaces.Discrete(action) if isinstance(action, int) else spaces.Box(-1, 1, action)
    return obs_space, act_space, config


def read_run(path: pathlib.Path, agent: type, flags: dict) -> tuple[dict, tuple]:
    """What a checkpoint holds, and the arguments with which its agent is made; raises UserError."""
    with reading(path):
        saved = read_checkpoint(path)
        refuse_other_run(saved, path.parent, agent, flags)
        return saved, saved_arguments(saved, path.parent, agent, flags)
