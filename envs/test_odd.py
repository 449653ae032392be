"""Environments as people have them: what reaches the agent, and what is refused in which words."""

import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import time

import gymnasium
import numpy as np
import pytest
from gymnasium import spaces

import director
import envs.vector
from conftest import HERE, RUN, TINY_FLAGS
from envs.wrappers import IMAGE, ActionRepeat, EnvironmentFailed, combine_actions

VECTOR = spaces.Box(-10, 10, (2,), np.float32)


class Odd(gymnasium.Env):
    """Twenty steps of little, unless a subclass says otherwise."""

    observation_space = VECTOR
    action_space = spaces.Discrete(3)
    limit = 20

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t = 0
        return self.observe(), {}

    def step(self, action):
        self.t += 1
        self.action = action
        return self.observe(), self.reward(), False, self.t >= self.limit, {}

    def observe(self):
        return np.array([0, self.t / 20], np.float32)

    def reward(self):
        return 1.0


def make(env_class, **config):
    """The environment that Director would make of a class."""
    task = f"{env_class.__name__}-v0"
    gymnasium.registry.pop(task, None)
    gymnasium.register(task, env_class)
    return director.make_env(f"gym_{task}", director.Config(**config))


# ---- Observations ---------------------------------------------------------------------------


class Nested(Odd):
    observation_space = spaces.Dict({"sensors": spaces.Dict({"camera": IMAGE, "speed": VECTOR}),
                                     "pair": spaces.Tuple([spaces.Discrete(2), VECTOR])})

    def observe(self):
        image = np.full((64, 64, 3), 100 + self.t, np.uint8)
        return {"sensors": {"camera": image, "speed": super().observe()},
                "pair": (1, np.float32([3, 4]))}


def test_images_and_numbers_are_found_in_nested_observations():
    env = make(Nested)
    env.reset()
    obs = env.step(0)[0]
    assert (obs["image"] == 101).all()
    np.testing.assert_allclose(obs["state"], [0, 1, 3, 4, 0, 0.05])


class Symbols(Odd):
    """A grid of symbols, as in MiniGrid, which declares it as a picture."""

    observation_space = spaces.Box(0, 255, (7, 7, 3), np.uint8)

    def observe(self):
        return np.full((7, 7, 3), self.t % 11, np.uint8)


class ZeroToOne(Odd):
    """A picture whose brightest value is 1."""

    observation_space = spaces.Box(0, 1, (20, 20), np.uint8)

    def observe(self):
        return np.full((20, 20), self.t % 2, np.uint8)


class Board(Odd):
    """Planes of a board game."""

    observation_space = spaces.Box(0, 1, (8, 8, 12), np.uint8)

    def observe(self):
        return np.full((8, 8, 12), self.t % 2, np.uint8)


@pytest.mark.parametrize(("env_class", "size"), [(Symbols, 147), (Board, 768)])
def test_small_arrays_are_numbers(env_class, size):
    env = make(env_class)
    env.reset()
    obs = env.step(0)[0]
    assert list(obs) == ["state"] and (obs["state"] == np.ones(size)).all()


def test_pictures_are_scaled_by_the_highest_value_of_their_space():
    env = make(ZeroToOne)
    assert (env.reset()[0]["image"] == 0).all() and (env.step(0)[0]["image"] == 255).all()


class WithMission(Odd):
    observation_space = spaces.Dict({"image": IMAGE, "mission": spaces.Text(20)})

    def observe(self):
        return {"image": np.full((64, 64, 3), 100, np.uint8), "mission": "go to the door"}


class UnknownSpace(WithMission):
    class Mission(spaces.Space):
        """Cannot say whether it flattens, as that of MiniGrid."""

    observation_space = spaces.Dict({"image": IMAGE, "mission": Mission((), None)})


@pytest.mark.parametrize("env_class", [WithMission, UnknownSpace])
def test_text_and_other_spaces_are_left_out_in_one_line(env_class, capsys):
    env = make(env_class)
    assert list(env.reset()[0]) == ["image"]
    line = "Not observed, as it holds neither image nor numbers: mission\n"
    assert capsys.readouterr().out == line


class HalfClass(Odd):
    observation_space = spaces.Discrete(5)

    def observe(self):
        return 2.7


class HalfBits(Odd):
    observation_space = spaces.MultiBinary(2)

    def observe(self):
        return [0.7, 0.2]


class TooBright(Odd):
    observation_space = spaces.Box(0, 1, (20, 20), np.uint8)

    def observe(self):
        return np.full((20, 20), 200, np.uint8)


@pytest.mark.parametrize("env_class", [HalfClass, HalfBits, TooBright])
def test_values_that_would_be_rounded_or_wrap_around_are_errors(env_class):
    with pytest.raises((TypeError, ValueError), match="the environment returned observation"):
        make(env_class).reset()


class PartlyEmpty(Odd):
    observation_space = spaces.Dict({"speed": VECTOR, "objects": spaces.Box(0, 1, (0,))})

    def observe(self):
        return {"speed": np.ones(2, np.float32), "objects": np.zeros(0, np.float32)}


def test_arrays_without_numbers_are_left_out():
    assert make(PartlyEmpty).reset()[0]["state"].tolist() == [1, 1]


def space(*shape, dtype=np.uint8, high=255):
    return spaces.Box(0, high, shape, dtype)


@pytest.mark.parametrize(("observed", "word"), [
    (space(0), "(0,)"), (spaces.Text(9), "Text"), (spaces.Dict(), "Dict()"),
    (spaces.Sequence(VECTOR), "Sequence"),
    (space(4, 84, 84), "(4, 84, 84)"), (space(84, 84, 4), "(84, 84, 4)"),
    (space(64, 64, 3, dtype=np.float32), "(64, 64, 3), float32"),
    (spaces.Dict({"left": IMAGE, "right": IMAGE}), "several images, left, right"),
    (space(2, 2, 2, 2), "(2, 2, 2, 2)"), (space(3, 32, 32), "(3, 32, 32)"),
    (space(32, 32, 4), "(32, 32, 4)"),
    (space(32, 32, 3, dtype=np.float32), "(32, 32, 3), float32")])
def test_other_observations_are_refused_and_the_accepted_ones_named(observed, word):
    class Refused(Odd):
        observation_space = observed

    with pytest.raises(director.UserError) as error:
        make(Refused)
    assert word in str(error.value) and "Accepted are" in str(error.value)


class ManyParts(Odd):
    """Two cameras and a large array beside numbers; two names that differ in their nesting only."""

    observation_space = spaces.Dict({
        "left": IMAGE, "right": IMAGE, "a.b": VECTOR, "a": spaces.Dict({"b": VECTOR})})

    def observe(self):
        image = np.zeros((64, 64, 3), np.uint8)
        return {"left": image, "right": image, "a.b": np.float32([1, 2]),
                "a": {"b": np.float32([3, 4])}}


def test_what_is_not_wanted_needs_no_wrapper():
    env = make(ManyParts, obs="state")
    assert env.reset()[0]["state"].tolist() == [3, 4, 1, 2]

    class Depth(Nested):
        observation_space = spaces.Dict({"image": IMAGE, "depth": space(65, 64, dtype=np.float32)})

    make(Depth, obs="pixels")
    with pytest.raises(director.UserError, match="as depth"):
        make(Depth)


class GrayFloats(Odd):
    """Declares uint8 and shows floats in 0..1."""

    observation_space = spaces.Box(0, 255, (84, 84), np.uint8)
    shown = np.full((84, 84), 0.4, np.float32)

    def observe(self):
        return self.shown


class ShowsList(GrayFloats):
    shown = [[0] * 84] * 84


class OtherSize(GrayFloats):
    shown = np.zeros((84, 80), np.uint8)


class FloatsForIntegers(Odd):
    observation_space = spaces.Box(0, 9, (2,), np.int64)


class OtherLength(Odd):
    observation_space = spaces.Box(0, 9, (3,), np.float32)


class Overflows(Odd):
    observation_space = spaces.Box(0, 255, (2,), np.uint8)

    def observe(self):
        return np.array([1, 300])


class NoClass(Odd):
    observation_space = spaces.Discrete(4)

    def observe(self):
        return -1


@pytest.mark.parametrize(("env_class", "words"), [
    (GrayFloats, ["observation as float32 (84, 84)", "uint8 (84, 84)"]),
    (ShowsList, ["int64 (84, 84)", "uint8"]), (OtherSize, ["(84, 80)", "(84, 84)"]),
    (FloatsForIntegers, ["float32 (2,)", "int64 (2,)"]), (OtherLength, ["(2,)", "(3,)"]),
    (Overflows, ["value that uint8 cannot hold"]), (NoClass, ["-1", "Discrete(4)"])])
def test_observations_that_differ_from_their_space_are_errors_that_name_both(env_class, words):
    env = make(env_class)
    with pytest.raises((TypeError, ValueError)) as error:
        env.reset()
    assert all(word in str(error.value) for word in words)


# ---- Actions, rewards, episodes -------------------------------------------------------------


class Locked(Odd):
    """The second actuator can only be 2."""

    action_space = spaces.Box(np.float32([-4, 2]), np.float32([0, 2]))


def test_a_locked_actuator_gets_its_only_value():
    env = make(Locked)
    env.reset()
    for action, expected in (([-1, -1], [-4, 2]), ([1, 1], [0, 2]), ([0.5, 0], [-1, 2])):
        env.step(np.float32(action))
        np.testing.assert_allclose(env.unwrapped.action, expected)


class Narrow(Odd):
    action_space = spaces.Box(np.array([0.17]), np.array([2.98]), dtype=np.float64)


def test_scaled_actions_stay_within_bounds_in_spite_of_rounding():
    env = make(Narrow)
    env.reset()
    for action in (-1.0, 1.0):
        env.step(np.array([action]))
        assert env.unwrapped.action_space.contains(env.unwrapped.action)


class Unlimited(Odd):
    action_space = spaces.Box(*np.float32([[-3.4e38], [3.4e38]]))


def test_the_widest_bounds_do_not_overflow():
    env = make(Unlimited)
    env.reset()
    env.step(np.float32([0.5]))
    np.testing.assert_allclose(env.unwrapped.action, 1.7e38, rtol=1e-6)


class Wheels(Odd):
    action_space = spaces.MultiDiscrete([3, 2])


class Buttons(Odd):
    action_space = spaces.MultiBinary(2)


@pytest.mark.parametrize(("env_class", "expected"), [
    (Wheels, [[0, 0], [0, 1], [1, 0], [1, 1], [2, 0], [2, 1]]),
    (Buttons, [[0, 0], [0, 1], [1, 0], [1, 1]])])
def test_several_discrete_actions_are_refused_with_the_wrapper_that_combines_them(
        env_class, expected):
    with pytest.raises(director.UserError, match="combine_actions"):
        make(env_class)
    env = make(type("Combined", (), {"__new__": lambda cls: combine_actions(env_class())}))
    env.reset()
    actions = []
    for action in range(env.action_space.n):
        env.step(action)
        assert env.unwrapped.action_space.contains(env.unwrapped.action)
        actions.append(env.unwrapped.action.tolist())
    assert actions == expected


class ArrayReward(Odd):
    def reward(self):
        return np.array([[1.5]], np.float32)


class TwoRewards(Odd):
    def reward(self):
        return np.array([1.0, 2.0])


class TextReward(Odd):
    def reward(self):
        return "3"


def test_a_reward_in_an_array_is_its_number_and_other_shapes_are_named():
    env = make(ArrayReward)
    env.reset()
    assert env.step(0)[1] == 1.5
    for env_class in (TwoRewards, TextReward):
        env = make(env_class)
        env.reset()
        with pytest.raises(TypeError, match="reward is .*; it has to be one number"):
            env.step(0)


class Endless(Odd):
    limit = np.inf


def test_episodes_are_truncated_after_ten_thousand_steps():
    env = make(Endless)
    env.reset()
    ends = [env.step(0)[2:4] for _ in range(10_000)]
    assert ends[-1] == (False, True) and not any(map(any, ends[:-1]))


def test_an_action_is_repeated_until_the_episode_ends_and_rewards_are_summed():
    env = make(Odd, action_repeat=3)
    env.reset()
    steps = [env.step(1)[1:4] for _ in range(7)]
    assert steps == [(3.0, False, False)] * 6 + [(2.0, False, True)]
    assert isinstance(env.env, ActionRepeat)


class OldStep(Odd):
    def step(self, action):
        return self.observe(), 0.0, False, {}


class OldReset(Odd):
    def reset(self):
        return self.observe()


class Exits(Odd):
    def step(self, action):
        sys.exit(0)


class NoLevel(Odd):
    def __init__(self):
        open("/no/level")  # noqa: SIM115


class NoAnswer(Odd):
    def step(self, action):
        raise TimeoutError("the simulator did not answer")


class Memory(Odd):
    def step(self, action):
        raise RuntimeError("the robot has not enough memory slots")


class PipeBroken(Odd):
    def close(self):
        raise BrokenPipeError(32, "Broken pipe")


class ExitsAtTheEnd(Odd):
    def close(self):
        sys.exit(0)


@pytest.mark.parametrize("env_class", [OldStep, OldReset])
def test_an_environment_of_the_old_gym_api_gets_a_note_about_it(env_class):
    env = make(env_class)

    def play():
        env.reset()
        env.step(0)

    with pytest.raises(EnvironmentFailed, match="the old Gym API"):
        play()


class ManyInfos(Odd):
    """Infos whose kinds and shapes change; vector environments would merge them, and fail."""

    def step(self, action):
        infos = [{"n": 1, "x": np.zeros(2)}, {"n": "fell", "x": np.zeros(3), "f": lambda: 0},
                 {"n": None, "x": {"y": 1}}]
        obs, reward, *ends, _ = super().step(action)
        return obs, reward, *ends, infos[self.t % 3]


def test_infos_of_any_kind_are_left_out(tmp_path):
    gymnasium.registry.pop("ManyInfos-v0", None)
    gymnasium.register("ManyInfos-v0", ManyInfos)
    flags = [*RUN, "--task=gym_ManyInfos-v0", "--steps=60", f"--logdir={tmp_path}/run"]
    assert director.main(flags) == 0


@pytest.mark.parametrize("env_class", [PipeBroken, ExitsAtTheEnd])
def test_an_evaluation_is_kept_if_the_environment_fails_to_close(env_class, tmp_path):
    task = f"{env_class.__name__}-v0"
    gymnasium.registry.pop(task, None)
    gymnasium.register(task, env_class)
    flags = [*RUN, f"--task=gym_{task}", "--steps=60", f"--logdir={tmp_path}/run"]
    for more in ([], ["--eval=1"]):
        with pytest.raises(EnvironmentFailed):
            director.main([*flags, *more])
    assert (tmp_path / "run/checkpoint.pt").exists()
    assert json.loads((tmp_path / "run/eval.json").read_text())["scores"] == [20.0]


# ---- Processes ------------------------------------------------------------------------------

MODULE = """
import multiprocessing, os, signal, subprocess, sys, time
import gymnasium, numpy as np
from envs.test_odd import Odd, spaces

class GlobalRandom(Odd):
    def __init__(self):
        self.world = np.random.uniform(-1, 1)

    def observe(self):
        return np.array([np.random.uniform(-1, 1), self.world], np.float32)

class Engine(Odd):
    # Has a simulator in a process of its own. `close` ends it, or forgets to.
    limit = 5

    def __init__(self, closes=True):
        code = "import time; time.sleep(600)  # engine of {folder}"
        self.closes = closes
        self.engine = subprocess.Popen([sys.executable, "-c", code])

    def close(self):
        if self.closes or not multiprocessing.parent_process():
            self.engine.terminate()
            self.engine.wait()

class Hangs(Odd):
    def step(self, action):
        self.total = getattr(self, "total", 0) + 1
        while self.total >= 90:
            print("hanging", flush=True)
            time.sleep(600)
        return super().step(action)

class Dies(Odd):
    def step(self, action):
        if self.t == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().step(action)

class Raises(Odd):
    def step(self, action):
        if self.t == 3:
            raise ZeroDivisionError("the simulator is unstable")
        return super().step(action)

class Unstable(Exception):
    # Cannot be sent to another process, as pickle does not know its arguments.
    def __init__(self, value, reason):
        super().__init__(f"{{value}} is {{reason}}")
        self.repeat = lambda: value

class RaisesUnusual(Odd):
    def step(self, action):
        if self.t == 3:
            raise Unstable("the simulator", "unstable")
        return super().step(action)

for env in (GlobalRandom, Engine, Hangs, Dies, Raises, RaisesUnusual):
    gymnasium.register(f"{{env.__name__}}-v0", env)
gymnasium.register("Orphan-v0", lambda: Engine(closes=False))
"""


def write_module(folder):
    (folder / "odd_module.py").write_text(MODULE.format(folder=folder))


@pytest.fixture
def module(tmp_path, monkeypatch):
    """A module odd_module of a user, in the current folder."""
    write_module(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield tmp_path
    sys.modules.pop("odd_module", None)
    for name in ("GlobalRandom", "Engine", "Hangs", "Dies", "Raises", "RaisesUnusual", "Orphan"):
        gymnasium.registry.pop(f"{name}-v0", None)


@pytest.mark.slow
@pytest.mark.parametrize("processes", ["yes", "no"])
def test_environments_with_global_generators_differ_from_each_other_and_repeat(processes, module):
    def play():
        config = director.Config(task="gym_odd_module:GlobalRandom-v0", processes=processes)
        with director.vector_envs(config, 3) as envs:
            driver = director.Driver(envs, seed=5)
            rows = [driver.rows["state"]]
            for _ in range(30):
                driver.step(driver.random_action())
                rows.append(driver.rows["state"])
        return np.stack(rows, 1)  # [environment, time, 2]

    first, second = play(), play()
    assert (first == second).all()
    for column in range(2):
        assert len({row.tobytes() for row in first[..., column]}) == 3


def program(folder, task, *flags, **kwargs):
    """director.py as a program in a folder from which it finds odd_module."""
    write_module(folder)
    env = {**os.environ, "PYTHONPATH": ""}
    command = [sys.executable, director.__file__, *RUN, f"--task=gym_odd_module:{task}-v0",
               f"--logdir={folder}/run", *flags]
    return subprocess.Popen(command, cwd=folder, env=env, text=True, start_new_session=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, **kwargs)


def processes_that_mention(folder) -> list[str]:
    if shutil.which("pgrep") is None:
        pytest.skip("pgrep is not installed")
    return subprocess.run(["pgrep", "-af", str(folder)], capture_output=True, text=True,
                          check=False).stdout.splitlines()


def run_engines(folder, task):
    with program(folder, task, "--steps=150") as process:
        output = process.communicate()
        assert process.returncode == 0, output
    assert (folder / "run/checkpoint.pt").exists()
    for _ in range(50):
        if not processes_that_mention(folder):
            return
        time.sleep(0.1)
    raise AssertionError(processes_that_mention(folder))


@pytest.mark.slow
@pytest.mark.parametrize("task", ["Engine", "Orphan"])
def test_processes_that_environments_start_end_with_the_program(task, background):
    assert director.load(background / "run").resumed_from["step"] == 150


def interrupt_hanging(folder, processes):
    with program(folder, "Hangs", f"--processes={processes}") as process:
        assert any("hanging" in line for line in process.stdout)
        start = time.monotonic()
        process.terminate()
        error = process.communicate()[1]
        assert process.returncode == 128 + 15 and "Saved at step" in error, error
        assert time.monotonic() - start < 30
    assert not processes_that_mention(folder)


@pytest.mark.slow
@pytest.mark.parametrize("processes", ["yes", "no"])
def test_a_signal_interrupts_environments_that_hang_and_the_run_is_saved(processes, background):
    assert director.load(background / "run").resumed_from["step"] > 150


def test_environments_that_hang_while_they_close_are_left_after_a_time(monkeypatch, capsys):
    class NeverCloses(Odd):
        def close(self):
            time.sleep(600)

    monkeypatch.setattr(envs.vector, "CLOSE_SECONDS", 0.5)
    with envs.vector.side_by_side([NeverCloses], processes=False):
        start = time.monotonic()
    assert time.monotonic() - start < 5
    assert "did not close within 0.5 seconds" in capsys.readouterr().err


def run_until_one_fails(folder, task):
    with program(folder, task, "--steps=150") as process:
        (folder / "error").write_text(process.communicate()[1])
        assert process.returncode == 1


@pytest.mark.slow
@pytest.mark.parametrize(("task", "words"), [
    ("Dies", ["RuntimeError: the process of environment", "died (SIGKILL)"]),
    ("Raises", ["ZeroDivisionError: the simulator is unstable"]),
    ("RaisesUnusual", ["Unstable: the simulator is unstable"])])
def test_the_error_or_death_of_an_environment_in_a_process_is_named(task, words, background):
    error = (background / "error").read_text()
    assert all(word in error.strip().splitlines()[-1] for word in words), error


@pytest.mark.parametrize(("env_class", "words"), [
    (Exits, "called sys.exit"), (NoLevel, "No such file or directory: '/no/level'"),
    (NoAnswer, "the simulator did not answer"), (Memory, "not enough memory slots"),
    (PipeBroken, "Broken pipe"), (ExitsAtTheEnd, "called sys.exit")])
def test_exits_and_system_errors_of_environments_are_errors_of_environments(
        env_class, words, tmp_path):
    task = f"{env_class.__name__}-v0"
    gymnasium.registry.pop(task, None)
    gymnasium.register(task, env_class)
    with pytest.raises(EnvironmentFailed, match=words):
        director.main([*RUN, f"--task=gym_{task}", "--steps=60", f"--logdir={tmp_path}/run"])


def test_a_module_inside_the_folder_of_a_run_is_not_imported(module, capsys):
    flags = [*RUN, "--task=gym_odd_module:GlobalRandom-v0", "--processes=no", "--steps=120"]
    assert director.main([*flags, f"--logdir={module}/run"]) == 0
    marker = module / "executed"
    (module / "odd_module.py").unlink()
    sys.modules.pop("odd_module")
    for name in ("odd_module.py", "odd_module.pyc", "odd_module/__init__.py"):
        path = module / "run" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"open({str(marker)!r}, 'w')\n")
        os.chdir(module / "run")
        assert director.main([f"--logdir={module}/run", "--eval=1"]) == 2
        assert "inside the run's folder" in capsys.readouterr().err and not marker.exists()
        path.unlink()


def run_script_without_guard(folder):
    write_module(folder)
    flags = [*TINY_FLAGS, "--task=gym_odd_module:GlobalRandom-v0", "--prefill=50", "--steps=60",
             "--envs=2", f"--logdir={folder}/run"]
    (folder / "script.py").write_text(
        f"import sys; sys.path.append({str(HERE)!r})\nimport director\ndirector.main({flags})\n")
    done = subprocess.run([sys.executable, "script.py"], cwd=folder, capture_output=True,
                          text=True, check=False)
    (folder / "error").write_text(done.stderr)


@pytest.mark.slow
def test_a_script_without_the_main_guard_is_told_about_it(background):
    error = (background / "error").read_text()
    assert 'if __name__ == "__main__":' in error and "Traceback" not in error


@pytest.mark.slow
def test_a_process_that_the_caller_started_is_left_alone():
    config = director.Config(task="pinpad_three", size="xs", device="cpu", processes="yes")
    with director.vector_envs(config, 1) as envs:
        own = multiprocessing.get_context("spawn").Process(target=time.sleep, args=(60,))
        own.start()
        envs.reset(seed=0)
    assert own.is_alive()
    own.kill()
    own.join()


HANGING = "test_a_signal_interrupts_environments_that_hang_and_the_run_is_saved"
NAMED = "test_the_error_or_death_of_an_environment_in_a_process_is_named"
STARTED = "test_processes_that_environments_start_end_with_the_program"
BACKGROUND = {  # see conftest.py
    f"{STARTED}[Engine]": lambda folder: run_engines(folder, "Engine"),
    f"{STARTED}[Orphan]": lambda folder: run_engines(folder, "Orphan"),
    f"{HANGING}[yes]": lambda folder: interrupt_hanging(folder, "yes"),
    f"{HANGING}[no]": lambda folder: interrupt_hanging(folder, "no"),
    f"{NAMED}[Dies-words0]": lambda folder: run_until_one_fails(folder, "Dies"),
    f"{NAMED}[Raises-words1]": lambda folder: run_until_one_fails(folder, "Raises"),
    f"{NAMED}[RaisesUnusual-words2]": lambda folder: run_until_one_fails(folder, "RaisesUnusual"),
    "test_a_script_without_the_main_guard_is_told_about_it": run_script_without_guard}
