"""What Director observes of a Gymnasium environment: an image and a vector."""

import gymnasium
import numpy as np
from gymnasium import spaces
from PIL import Image

IMAGE = spaces.Box(0, 255, (64, 64, 3), np.uint8)


def image_and_state(env: gymnasium.Env, wanted: str) -> gymnasium.Env:
    """Observations as a Dict of "image" [64, 64, 3] uint8 and "state" [n] float32.

    The image is the only uint8 array with one or three channels, if there is one; the state is all
    else, flattened. wanted: "pixels", "state", "both", or "auto" for what there is. Raises
    gymnasium.error.Error if the environment does not observe that.
    """
    space = env.observation_space
    single = not isinstance(space, spaces.Dict)
    parts = {"": space} if single else space.spaces
    images = [key for key, x in parts.items() if x.dtype == np.uint8 and len(x.shape) > 1
              and x.shape[2:] in ((), (1,), (3,))]
    rest = spaces.Dict({key: x for key, x in parts.items() if key not in images})
    too_deep = any(len(x.shape or ()) > 2 for x in rest.values())
    if len(images) > 1 or not rest.is_np_flattenable or too_deep:
        raise gymnasium.error.Error(f"observes {space}, which is neither an image nor a vector, "
                                    "nor a Dict of one image and vectors")
    available = ["image"] * len(images) + ["state"] * bool(rest)
    choices = {"auto": available, "pixels": ["image"], "state": ["state"],
               "both": ["image", "state"]}
    keys = choices[wanted]
    if not keys or not set(keys) <= set(available):
        raise gymnasium.error.Error(
            f"--obs {wanted}: it shows {' and '.join(available) or 'nothing'} only")

    def convert(obs) -> dict[str, np.ndarray]:
        obs = {"": obs} if single else obs
        out = {}
        if "state" in keys:
            out["state"] = np.float32(spaces.flatten(rest, obs))
        if "image" in keys:
            image = Image.fromarray(obs[images[0]].squeeze()).convert("RGB")
            out["image"] = np.asarray(image.resize((64, 64), Image.Resampling.BOX))
        return out

    vector = spaces.Box(-np.inf, np.inf, (spaces.flatdim(rest),))
    converted = spaces.Dict({key: IMAGE if key == "image" else vector for key in keys})
    return gymnasium.wrappers.TransformObservation(env, convert, converted)
