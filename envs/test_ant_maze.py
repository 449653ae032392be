"""What ant maze does, against numbers worked out by hand."""

import importlib.util
import sys
import zlib

import gymnasium
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

import director
from conftest import close, needs_rendering

pytestmark = pytest.mark.slow

OFFICIAL_MAZES = {  # crc32 of the layout, shortest way in cells, yaw on the last steps to the goal;
    # then observations and rewards of the official environment in the episode of the test:
    # state @ cos(0, 1, ..., 152), mean of the image's channels, reward
    "S": (3676918905, 12, 90, (
        (-0.159662, 25.321, 72.606, 106.109, 0), (-1.207208, 26.099, 74.460, 109.115, 0),
        (-17.251844, 40.208, 58.464, 55.360, 0), (-2.938773, 63.385, 56.210, 61.562, 1),
        (-5.196243, 27.605, 76.392, 109.983, 1))),
    "M": (2363714658, 16, 180, (
        (-0.159662, 25.321, 72.606, 106.109, 0), (-1.207208, 26.099, 74.460, 109.115, 0),
        (-7.977971, 40.302, 59.012, 56.284, 0), (-2.184181, 63.580, 56.401, 61.798, 1),
        (-5.680140, 27.764, 76.949, 110.822, 1))),
    "L": (515737317, 22, 180, (
        (-0.159662, 59.368, 63.767, 55.016, 0), (-1.207208, 59.841, 64.490, 57.627, 0),
        (-7.977971, 38.977, 62.875, 60.581, 0), (-2.184181, 59.702, 68.385, 77.060, 1),
        (-5.680140, 58.796, 61.558, 64.209, 1))),
    "XL": (129366694, 26, 0, (
        (-0.159662, 25.321, 72.606, 106.109, 0), (-1.207208, 26.099, 74.460, 109.115, 0),
        (-1.534766, 39.045, 62.693, 60.717, 0), (-2.685182, 59.455, 68.098, 76.738, 1),
        (-6.022177, 46.468, 50.454, 59.262, 1))),
}


def needs_ant_maze(test):
    there = importlib.util.find_spec("labmaze")
    return pytest.mark.skipif(not there, reason="no labmaze for this Python")(needs_rendering(test))


def ant_maze(name, **flags):
    """The environment, what a step of random actions brings, and how to put the ant somewhere."""
    env = gymnasium.make(f"envs.ant_maze:AntMaze{name}-v0", disable_env_checker=True, **flags)
    env, gen = env.unwrapped, np.random.default_rng(0)

    def act():
        return env.step(np.float32(gen.uniform(-1, 1, 8)))

    def put(yaw, distance):  # metres in front of the goal, looking at it; None: at the start
        arena, way = env.env.task.root_entity, np.array([np.cos(yaw), np.sin(yaw), 0])
        place = arena.spawn_positions[0] if distance is None else (
            arena.target_positions[0] - distance * way)
        turn = [np.cos(yaw / 2), 0, 0, np.sin(yaw / 2)]
        env.env.physics.named.data.qpos["walker/"] = [*place, *turn]

    return env, act, put


@needs_ant_maze
@pytest.mark.parametrize("name", list(OFFICIAL_MAZES))
def test_ant_maze_equals_the_official_environment_in_images_states_and_rewards(name):
    _, _, yaw, expected = OFFICIAL_MAZES[name]
    env, act, put = ant_maze(name)
    (obs, _), reward, found = env.reset(seed=0), 0, []
    for step in range(21):
        if step in (0, 4, 6, 8, 20):
            state = obs["state"] @ np.cos(np.arange(153))
            found.append((state, *obs["image"].mean((0, 1)), reward))
        if step in (4, 6, 8):
            put(np.deg2rad(yaw), {4: 3, 6: 1, 8: None}[step])
        obs, reward, terminated, truncated, _ = act()
        assert not terminated and not truncated
    found, expected = np.array(found), np.array(expected)
    close(found[:, 0], expected[:, 0], rtol=1e-4, atol=1e-4)
    close(found[:, 1:4], expected[:, 1:4], atol=1)
    assert found[:, 4].tolist() == expected[:, 4].tolist()


@needs_ant_maze
@pytest.mark.parametrize("name", list(OFFICIAL_MAZES))
def test_ant_maze_has_the_official_layout_and_a_way_to_the_goal(name):
    from envs.ant_maze import COLORS, MAZES
    rows, size = MAZES[name], len(MAZES[name])
    checksum, moves, _, _ = OFFICIAL_MAZES[name]
    assert zlib.crc32("\n".join(rows).encode()) == checksum
    assert zlib.crc32(COLORS.astype(np.uint8).tobytes()) == 915387414
    cells = {(y, x): cell for y, row in enumerate(rows) for x, cell in enumerate(row)}
    place = {cell: where for where, cell in cells.items()}
    seen, ring, steps = {place["P"]}, {place["P"]}, 0
    while place["G"] not in seen:
        ring = {(y + dy, x + dx) for y, x in ring for dy, dx in ((0, 1), (1, 0), (0, -1), (-1, 0))
                if cells.get((y + dy, x + dx), "1") in " G"} - seen
        assert ring
        seen, steps = seen | ring, steps + 1
    assert steps == moves
    env, *_ = ant_maze(name)  # from above, a wall shows 0.9 of its colour
    env.reset(seed=0)
    image = env.env.physics.render(20 * size, 20 * size, camera_id="top_camera")
    for (y, x), cell in cells.items():
        row, column = (round(10 * size + (i + 0.5 - size / 2) * 20 / 1.1) for i in (y, x))
        if cell.isdigit():
            close(image[row, column], 0.9 * COLORS[int(cell) - 1], atol=4)


@needs_ant_maze
def test_ant_maze_rewards_from_the_first_touch_of_the_goal_until_the_episode_ends():
    env, act, put = ant_maze("S", length=12)
    for _ in range(2):
        env.reset(seed=0)
        assert env.env.physics.named.model.mat_rgba["target/target_sphere", "a"] == 1
        rewards, truncated = [], []
        for step in range(12):
            if step in (3, 6):
                put(0, 0 if step == 3 else None)
            _, reward, _, ended, _ = act()
            rewards.append(reward)
            truncated.append(ended)
        assert rewards == [0] * 3 + [1] * 9 and truncated == [False] * 11 + [True]
        assert env.env.physics.named.model.mat_rgba["target/target_sphere", "a"] == 0
    assert gymnasium.spec("AntMazeXL-v0").kwargs == {"name": "XL"} and type(env)("L").length == 3000


@needs_ant_maze
@pytest.mark.filterwarnings("ignore")
def test_ant_maze_gives_director_pixels_and_proprioception_and_a_seed_makes_the_episode():
    task = "gym_envs.ant_maze:AntMazeFastS-v0"
    env, episodes = director.make_env(task, director.Config(task=task)), []
    check_env(env, skip_render_check=True)
    assert env.observation_space["state"].shape == (153,) and env.action_space.shape == (8,)
    for seed in (1, 1, None):
        episodes.append([env.reset(seed=seed)[0]])
        episodes[-1] += [env.step(np.full(8, 0.5, np.float32))[0] for _ in range(3)]
    same = [all(np.array_equal(x[key], y[key]) for x, y in zip(episodes[0], other, strict=True)
                for key in ("image", "state")) for other in episodes]
    assert same == [True, True, False]
    full, fast = ant_maze("S")[0].reset(seed=1)[0]["image"], episodes[0][0]["image"]
    assert 0 < np.abs(fast.astype(int) - full).mean() < 3


def test_ant_maze_without_labmaze_gets_one_line(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "labmaze", None)
    monkeypatch.delitem(sys.modules, "envs.ant_maze", raising=False)
    assert director.main(["--task=gym_envs.ant_maze:AntMazeS-v0"]) == 2
    error = capsys.readouterr().err
    assert "needs labmaze" in error and error.count("\n") == 1
