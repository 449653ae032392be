"""Egocentric Ant Maze (Hafner et al., 2022, Section 3): a quadruped searches a maze for the goal.

The ant has to learn to walk and where to go at once, from its own camera and its joints; it is
not told where it is, and only reaching the goal is rewarded.
`--task gym_envs.ant_maze:AntMazeS-v0` trains it.
Registers AntMazeS-v0, M, L, XL and, with cheaper images, AntMazeFastS-v0, M, L, XL. Equal seeds and
actions bring images, states and rewards equal to those of the official environment.
"""

import gymnasium
import numpy as np
from gymnasium import spaces

from envs.dmc import import_suite

try:
    import_suite(render=True)
    import labmaze
    from dm_control import composer, mjcf
    from dm_control.locomotion.arenas import MazeWithTargets
    from dm_control.locomotion.props import TargetSphere
    from dm_control.locomotion.tasks import RepeatSingleGoalMaze
    from dm_control.locomotion.walkers import Ant
except Exception as error:
    raise ImportError("The Ant Maze needs labmaze (Python 3.11 or 3.12) and OpenGL (on Debian: apt"
                      f"-get install libegl1 libgl1-mesa-dri), but: {error}.") from error

# Seen from above, in cells of 1.2 x 1.2 m: P start, G goal, digits walls, 2 m high, in colours.
DRAWING = """\
S          |M          |L             |XL
      66666|66668887777|88887776666   |99999998888 44444
      6   6|6         7|8         6   |9         8 4   4
      6 G 6|6 G       7|8 G       6   |9       G 8 4   4
      6   6|6         7|8         6555|9         8 4   4
      5   4|6665555   4|8888777      5|6   7778888 5   3
      5   4|      5   4|      7      5|6   7       5   3
1111555   4|1111555   4|11111 7      5|6   777555555   3
1         3|1         3|1   1 7999   5|5               3
1 P       3|1 P       3|1   1    9   5|5               3
1         3|1         3|1   111999   5|5               3
11112223333|11112223333|2            4|5555444   666   3
           |           |2    P       4|      4   6 6   3
           |           |2            4|1111444   6 6   3
           |           |22223333334444|1         2 1   1
           |           |              |1 P       2 1   1
           |           |              |1         2 1   1
           |           |              |11111112222 11111
"""
MAZES = {name.strip(): [row for row in rows if row.strip()] for name, *rows in zip(
    *(line.split("|") for line in DRAWING.splitlines()), strict=True)}
COLORS = np.array(((31, 119, 180), (255, 127, 14), (44, 160, 44), (214, 39, 40), (148, 103, 189),
                   (140, 86, 75), (227, 119, 194), (127, 127, 127), (188, 189, 34)))  # of tab10


class Wall(composer.Entity):
    """What MazeWithTargets asks of a kind of walls; here one colour, RGB in [0, 1]."""

    mjcf_model = None

    def _build(self, name, rgb):
        self.mjcf_model = mjcf.RootElement(model=name)
        self.textures = [self.mjcf_model.asset.add("texture", name="wall", type="2d", rgb1=rgb,
                                                   builtin="flat", width=100, height=100)]


class FirstTouch(RepeatSingleGoalMaze):
    """Rewards 1 in each step from the first touch of the goal on, and never ends the episode."""

    def should_terminate_episode(self, physics):
        return False


class AntMaze(gymnasium.Env):
    """An ant in maze `name`; quality "fast" draws without multisampling (nothing has shadows).

    image   [64, 64, 3] uint8, what the ant sees
    state   [153] in m, rad, s: feet 12, places 39 and quaternions 52 of all parts, height 1, feet
            12, joints 8, their speeds 8, accelerometer 3, gyro 3, touch 9, velocimeter 3, up 3
    action  [8] torques in [-1, 1], for 0.02 s
    reward  1 from the first touch of the goal on: a green half ball of radius 1.2 m, then unseen
    It starts upright, in any direction. Nothing ends an episode but its `length`, by truncation.
    """

    observation_space = spaces.Dict({"image": spaces.Box(0, 255, (64, 64, 3), np.uint8),
                                     "state": spaces.Box(-np.inf, np.inf, (153,), np.float64)})
    action_space = spaces.Box(-1, 1, (8,))

    def __init__(self, name: str, length: int = 3000, quality: str = "full"):
        self.length = length
        maze = labmaze.FixedMazeWithRandomGoals("\n".join([*MAZES[name], ""]))
        walls = {str(i): Wall(f"wall{i}", rgb / 255) for i, rgb in enumerate(COLORS, 1)}
        arena = MazeWithTargets(maze, xy_scale=1.2, z_height=2.0, wall_textures=walls)
        if quality == "fast":  # not in the physics, which each reset makes anew
            arena.mjcf_model.visual.quality.offsamples = 0
        self.env = composer.Environment(FirstTouch(
            Ant(), arena, TargetSphere(radius=1.2, height_above_ground=0.0), physics_timestep=0.005,
            control_timestep=0.02, contact_termination=False), strip_singleton_obs_buffer_dim=True)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        if seed is not None:
            self.env.random_state.seed(seed)
        self.steps = 0
        return self.render_observation(self.env.reset()), {}

    def step(self, action):
        now = self.env.step(action)
        self.steps += 1
        return self.render_observation(now), now.reward, False, self.steps >= self.length, {}

    def render_observation(self, now) -> dict[str, np.ndarray]:
        obs = dict(now.observation)  # in alphabetical order
        return {"image": obs.pop("walker/egocentric_camera"), "state": np.hstack([*obs.values()])}


for name in MAZES:
    gymnasium.register(f"AntMaze{name}-v0", AntMaze, kwargs={"name": name})
    gymnasium.register(f"AntMazeFast{name}-v0", AntMaze, kwargs={"name": name, "quality": "fast"})
