"""What Director observes of a Gymnasium environment, and how it acts in it.

`image_and_state` is applied to every environment, `scale_actions` to those with continuous actions.
`combine_actions` is for environments with several discrete actions at once, in a module of yours:

    gymnasium.register("Wheels-v1", lambda: combine_actions(gymnasium.make("Wheels-v0")))
"""

import contextlib
import math
import random
import re

import gymnasium
import numpy as np
from gymnasium import spaces
from gymnasium.utils import RecordConstructorArgs
from PIL import Image

from envs import UserError

IMAGE = spaces.Box(0, 255, (64, 64, 3), np.uint8)

LEAST_SIDE = 16  # pixels; smaller arrays are boards or grids of symbols, which are numbers
MOST_NUMBERS = 4096  # in an array of more than one dimension
ACCEPTED = (
    "Accepted are one image and any number of vectors. An image is uint8, height x width, or "
    f"height x width x 1 or 3, from {LEAST_SIDE} x {LEAST_SIDE} pixels to any size; channel-first "
    "images, stacks of frames and RGBA need a wrapper (the model remembers, so a stack is not "
    f"needed). Other arrays have one dimension, or up to three and up to {MOST_NUMBERS} numbers")


# ---- Observations ---------------------------------------------------------------------------


def image_and_state(env: gymnasium.Env, wanted: str, quiet: bool = True) -> gymnasium.Env:
    """Observations as a Dict of "image" [64, 64, 3] uint8 and "state" [n] float32.

    The observation may be nested. The image is its only picture, if it has one, resized, and scaled
    from 0..high of its space to 0..255. The state is all other numbers, flattened. Text and other
    spaces without a fixed number of numbers are left out, which is printed unless `quiet`.

    wanted: "pixels", "state", "both", or "auto" for what there is. Raises gymnasium.error.Error if
    the environment does not observe that.
    """
    leaves = dict(leaf_spaces(env.observation_space))
    kinds = {path: kind_of(leaf) for path, leaf in leaves.items()}
    images = [path for path, kind in kinds.items() if kind == "image"]
    numbers = [path for path, kind in kinds.items() if kind in ("numbers", "refused")]
    others = [path for path, kind in kinds.items() if kind == "other"]
    if others and not quiet:
        print("Not observed, as it holds neither image nor numbers: "
              f"{', '.join(map(name_of, others))}", flush=True)
    available = ["image"] * bool(images) + ["state"] * bool(numbers)
    if not available:
        raise gymnasium.error.Error(f"observes {env.observation_space}. {ACCEPTED}.")
    choices = {"auto": available, "pixels": ["image"], "state": ["state"],
               "both": ["image", "state"]}
    keys = choices[wanted]
    if not set(keys) <= set(available):
        raise gymnasium.error.Error(f"--obs {wanted}: it shows {' and '.join(available)} only")
    if "image" in keys and len(images) > 1:
        names = ", ".join(map(name_of, images))
        raise gymnasium.error.Error(f"observes several images, {names}. {ACCEPTED}.")
    for path in numbers:
        if "state" in keys and kinds[path] == "refused":
            raise gymnasium.error.Error(f"observes {leaves[path]} as {name_of(path)}. {ACCEPTED}.")

    def convert(obs) -> dict[str, np.ndarray]:
        out = {}
        if "state" in keys:
            parts = [flatten(name_of(path), leaves[path], value_at(path, obs)) for path in numbers]
            out["state"] = np.float32(np.concatenate(parts))
        if "image" in keys:
            path = images[0]
            out["image"] = resize(name_of(path), leaves[path], value_at(path, obs))
        return out

    size = sum(spaces.flatdim(leaves[path]) for path in numbers)
    vector = spaces.Box(-np.inf, np.inf, (size,))
    converted = spaces.Dict({key: IMAGE if key == "image" else vector for key in keys})
    return gymnasium.wrappers.TransformObservation(env, convert, converted)


def leaf_spaces(space: spaces.Space, path: tuple = ()):
    """The leaves of a nested space: pairs of a path, such as ("sensors", "camera"), and a space."""
    if isinstance(space, spaces.Dict):
        for key, part in space.spaces.items():
            yield from leaf_spaces(part, (*path, key))
    elif isinstance(space, spaces.Tuple):
        for index, part in enumerate(space.spaces):
            yield from leaf_spaces(part, (*path, index))
    else:
        yield path, space


def value_at(path: tuple, obs):
    """The part of a nested observation at the path of a leaf."""
    for key in path:
        obs = obs[key]
    return obs


def name_of(path: tuple) -> str:
    return ".".join(map(str, path)) or "observation"


def kind_of(leaf: spaces.Space) -> str:
    """ "image", "numbers", "other", or "refused" for arrays that are too large or like an image."""
    if isinstance(leaf, (spaces.Discrete, spaces.MultiDiscrete, spaces.MultiBinary)):
        return "numbers"
    if not isinstance(leaf, spaces.Box):
        return "other"
    shape = leaf.shape
    if math.prod(shape) == 0:
        return "other"
    if len(shape) <= 1:
        return "numbers"
    picture = len(shape) in (2, 3) and shape[2:] in ((), (1,), (3,))
    if leaf.dtype == np.uint8 and picture and min(shape[:2]) >= LEAST_SIDE:
        return "image"
    sides = sorted(shape)
    like_picture = len(shape) == 3 and sides[0] <= 4 and sides[1] >= LEAST_SIDE
    if len(shape) > 3 or math.prod(shape) > MOST_NUMBERS or like_picture:
        return "refused"
    return "numbers"


def flatten(name: str, leaf: spaces.Space, value) -> np.ndarray:
    """The numbers of a leaf, [n]; discrete ones as one-hot vectors."""
    array = np.asarray(value)
    accepted = "biuf" if leaf.dtype.kind == "f" else "biu"  # floats would be rounded
    if array.shape != leaf.shape or array.dtype.kind not in accepted:
        raise mismatch(name, leaf, array)
    converted = array.astype(leaf.dtype)
    if leaf.dtype.kind != "f" and (array != converted).any():
        raise ValueError(f"the environment returned {name} with a value that {leaf.dtype} cannot "
                         "hold, the dtype of its observation_space")
    if isinstance(leaf, spaces.Box):
        return converted.ravel()
    converted = converted if converted.shape else converted[()]  # Discrete wants a scalar
    if not leaf.contains(converted):
        raise ValueError(f"the environment returned {name} as {value}, which is not in {leaf}")
    return spaces.flatten(leaf, converted)


def resize(name: str, leaf: spaces.Box, value) -> np.ndarray:
    """A picture as [64, 64, 3] uint8."""
    image = np.asarray(value)
    if image.shape != leaf.shape or image.dtype != leaf.dtype:
        raise mismatch(name, leaf, image)
    high = max(1, int(leaf.high.max()))
    if high != 255:
        if image.max() > high:
            raise ValueError(f"the environment returned {name} with a value of {image.max()}, but "
                             f"its observation_space says at most {high}")
        image = np.uint8(image * (255 / high))
    image = image[:, :, 0] if image.shape[2:] == (1,) else image
    image = Image.fromarray(image).convert("RGB")
    return np.asarray(image.resize((64, 64), Image.Resampling.BOX))


def mismatch(name: str, leaf: spaces.Space, array: np.ndarray) -> TypeError:
    return TypeError(
        f"the environment returned {name} as {array.dtype} {array.shape}, but its "
        f"observation_space says {leaf.dtype} {leaf.shape}")


# ---- Actions --------------------------------------------------------------------------------


def scale_actions(env: gymnasium.Env) -> gymnasium.Env:
    """Continuous actions in [-1, 1]; an actuator whose bounds are equal gets its only value."""
    dtype = env.action_space.dtype
    low, high = np.float64(env.action_space.low), np.float64(env.action_space.high)
    center, half = high / 2 + low / 2, high / 2 - low / 2
    space = spaces.Box(-1, 1, low.shape, dtype)
    return gymnasium.wrappers.TransformAction(
        env, lambda action: (center + half * action).clip(low, high).astype(dtype), space)


def combine_actions(env: gymnasium.Env) -> gymnasium.Env:
    """One Discrete action for each combination of a MultiDiscrete or MultiBinary action."""
    space = env.action_space
    sizes = space.nvec if isinstance(space, spaces.MultiDiscrete) else np.full(space.shape, 2)
    start = getattr(space, "start", 0)

    def split_action(action: int) -> np.ndarray:
        parts = np.array(np.unravel_index(action, sizes.ravel()))
        return (parts.reshape(space.shape) + start).astype(space.dtype)

    return gymnasium.wrappers.TransformAction(env, split_action, spaces.Discrete(sizes.prod()))


class ActionRepeat(gymnasium.Wrapper, RecordConstructorArgs):
    """Takes each action `times` times, or until the episode ends; rewards are summed."""

    def __init__(self, env: gymnasium.Env, times: int):
        RecordConstructorArgs.__init__(self, times=times)
        gymnasium.Wrapper.__init__(self, env)
        self.times = times

    def step(self, action):
        total = 0.0
        for _ in range(self.times):
            obs, reward, terminated, truncated, info = self.env.step(action)
            total += reward
            if terminated or truncated:
                break
        return obs, total, terminated, truncated, info


# ---- Faults of environments -----------------------------------------------------------------


def seed_global_generators(seed: int):
    """Seed the global generators of numpy and Python, which environments may draw from.

    All processes start with equal states of these, which would make their episodes identical.
    """
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002


class Checked(gymnasium.Wrapper, RecordConstructorArgs):
    """Turns what environments do against the interface into numbers or into errors that say so.

    It drops what they return as info, which Director does not use: vector environments would merge
    it, and fail if its kinds or shapes change.
    """

    def __init__(self, env: gymnasium.Env):
        RecordConstructorArgs.__init__(self)
        gymnasium.Wrapper.__init__(self, env)

    def reset(self, *, seed=None, options=None):
        if seed is not None:
            seed_global_generators(seed)
        with environment_errors():
            obs, _ = self.env.reset(seed=seed, options=options)
        return obs, {}

    def step(self, action):
        with environment_errors():
            obs, reward, terminated, truncated, _ = self.env.step(action)
        number = np.asarray(reward)
        if number.size != 1 or number.dtype.kind not in "biuf":
            raise TypeError(f"the environment's reward is {reward!r}; it has to be one number")
        return obs, number.item(), bool(terminated), bool(truncated), {}

    def close(self):
        with environment_errors():
            return self.env.close()


class EnvironmentFailed(Exception):
    """An error of an environment, as a text, so that any of them can be sent between processes."""


@contextlib.contextmanager
def environment_errors():
    """Raise EnvironmentFailed for errors of an environment, but not for those that users can mend.

    So none of them is taken for one of Director's, such as a full disk. Too little memory is one
    that users can mend.
    """
    try:
        yield
    except (UserError, gymnasium.error.Error, ImportError, MemoryError):
        raise
    except (Exception, SystemExit) as error:
        text = f"{type(error).__name__}: {error}"
        if isinstance(error, SystemExit):
            text = "it called sys.exit"
        elif isinstance(error, (TypeError, ValueError)) and re.search(
                "to unpack|unexpected keyword argument", text):
            text += (" (If the environment follows the old Gym API: Director needs that of "
                     "gymnasium, reset(seed=, options=) -> obs, info; step(action) -> obs, reward, "
                     "terminated, truncated, info.)")
        raise EnvironmentFailed(text) from error
