"""The DeepMind Control Suite as Gymnasium environments: `--task dmc_walker_walk`.

Rendering needs OpenGL. Without a screen, MuJoCo uses EGL, unless MUJOCO_GL says otherwise.
"""

import contextlib
import ctypes.util
import os
import sys
import warnings

import gymnasium
import numpy as np
from gymnasium import spaces


def import_suite(render: bool):
    """dm_control.suite; ImportError, with what to do, if it or OpenGL for rendering is missing."""
    # To be set before dm_control is imported. Some tasks need OpenGL even if nothing is rendered.
    before = dict(os.environ)
    found = render or ctypes.util.find_library("EGL")
    if sys.platform == "linux" and not os.environ.get("DISPLAY") and found:
        os.environ.setdefault("MUJOCO_GL", "egl")
    with contextlib.suppress(ImportError):  # PyTorch's LLVM, before that of an OpenGL driver
        import triton  # noqa: F401
    try:
        with warnings.catch_warnings(action="ignore"):  # glfw warns where there is no screen
            from dm_control import mujoco, suite
        if render:
            mujoco.Physics.from_xml_string("<mujoco/>").render(8, 8)
    except ModuleNotFoundError as error:
        raise ImportError("dm_control is missing: README.md says how to install it") from error
    except Exception as error:
        backend = os.environ.get("MUJOCO_GL")
        for name in {"MUJOCO_GL", "PYOPENGL_PLATFORM"} - before.keys():
            os.environ.pop(name, None)  # so that --obs state works after this
        raise ImportError(
            f"MuJoCo cannot render with MUJOCO_GL={backend}. On Debian: apt-get install libegl1 "
            "libgl1-mesa-dri; without: --obs state") from error
    return suite


def default_quality() -> str:
    """"full" where a GPU renders, "fast" where the CPU does, which takes it 20 ms a full image."""
    import_suite(render=True)
    from dm_control import mujoco
    from OpenGL import GL
    physics = mujoco.Physics.from_xml_string("<mujoco/>")
    physics.render(8, 8)
    with physics.contexts.gl.make_current() as context:
        renderer = context.call(GL.glGetString, GL.GL_RENDERER).decode().lower()
    software = any(name in renderer for name in ("llvmpipe", "softpipe", "swrast", "software"))
    return "fast" if software else "full"


class DMControl(gymnasium.Env):
    """A task of the suite, named "<domain>_<task>".

    obs: "pixels" (an image [64, 64, 3] uint8), "state" (the suite's vectors), or "both".
    quality: "fast" draws without shadows and antialiasing. Without shadows, the floor is darker.
    Episodes are truncated after the suite's time limit, usually 1000 steps.
    Raises ImportError, with what to do, if dm_control or OpenGL is missing, or the task unknown.
    """

    def __init__(self, name: str, obs: str = "pixels", quality: str = "full"):
        self.pixels = obs != "state"
        suite = import_suite(render=self.pixels)
        tasks = {f"{domain}_{task}": (domain, task) for domain, task in suite.ALL_TASKS}
        tasks["cup_catch"] = ("ball_in_cup", "catch")
        if name not in tasks:
            raise ImportError(f"is none of {', '.join(f'dmc_{x}' for x in sorted(tasks))}")
        self.env = suite.load(*tasks[name])
        self.camera = 2 if name.startswith("quadruped") else 0
        if quality == "fast":
            self.env.physics.model.vis.quality.offsamples = 0
            self.env.physics.model.vis.quality.shadowsize = 0
        parts = {key: spaces.Box(-np.inf, np.inf, spec.shape, np.float64)
                 for key, spec in self.env.observation_spec().items()}
        if self.pixels:
            parts["image"] = spaces.Box(0, 255, (64, 64, 3), np.uint8)
        self.observation_space = spaces.Dict(parts)
        spec = self.env.action_spec()
        self.action_space = spaces.Box(np.float32(spec.minimum), np.float32(spec.maximum))

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        if seed is not None:
            self.env.task._random = np.random.RandomState(seed)
        return self.render_observation(self.env.reset()), {}

    def step(self, action):
        result = self.env.step(action)
        terminated = result.last() and result.discount == 0
        truncated = result.last() and not terminated
        return self.render_observation(result), result.reward, terminated, truncated, {}

    def render_observation(self, result) -> dict[str, np.ndarray]:
        obs = {key: np.asarray(value, np.float64) for key, value in result.observation.items()}
        if self.pixels:
            obs["image"] = self.env.physics.render(64, 64, camera_id=self.camera)
        return obs
