"""What tests share: tiny agents, batches, environments, programs, and runs in the background."""

import concurrent.futures
import contextlib
import json
import os
import pathlib
import runpy
import subprocess
import sys

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces

import director
from director import Director
from envs.dmc import DMControl
from envs.pin_pad import PinPad
from envs.wrappers import IMAGE

# Two cores are enough: one for the test that runs, one for a run in the background.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"  # for processes that tests start

HERE = pathlib.Path(director.__file__).parent
PROGRAM = [sys.executable, director.__file__]
CONTINUOUS = spaces.Box(-1, 1, (3,), np.float32)
DISCRETE = spaces.Discrete(5)

TINY = {  # networks of a tiny agent
    "deter": 16, "hidden": 18, "units": 16, "layers": 1, "stoch": 4, "classes": 4, "cnn_depth": 4,
    "device": "cpu", "precision": "float32"}
TINY_FLAGS = [f"--{key}={value}" for key, value in TINY.items()]
RUN = [  # flags of a tiny run
    "--task=pinpad_three", *TINY_FLAGS, "--size=xs", "--batch_size=2", "--batch_length=8",
    "--train_every=8", "--prefill=100", "--log_every=50", "--envs=2"]


# ---- Numbers --------------------------------------------------------------------------------


def tensor(values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float32)


def close(actual, expected, rtol=1e-5, atol=1e-7):
    """Assert that two tensors, arrays or lists are equal but for rounding."""
    actual, expected = (torch.as_tensor(x).detach().numpy() for x in (actual, expected))
    np.testing.assert_allclose(actual, expected, rtol, atol, equal_nan=False)


def prediction(mean):
    """What a head of rewards or values returns that predicts this mean."""
    return director.Symlog(director.symlog(mean))


@pytest.fixture
def modes(monkeypatch):
    """Replace every sample by the mode of its distribution."""
    def mode(dist):
        return dist.mode + (dist.probs - dist.probs.detach())

    monkeypatch.setattr(director.OneHot, "rsample", mode)
    monkeypatch.setattr(director.BoundedNormal, "rsample", lambda dist: dist.mean)


# ---- Agents and what they learn from --------------------------------------------------------


def make_variant(agent, space=DISCRETE, obs=None, /, **flags):
    """A tiny agent of class `agent`, with the same weights in each call."""
    torch.manual_seed(0)
    config = agent.Config(size="xs", **{**TINY, **flags})
    return agent(spaces.Dict(obs or {"image": IMAGE}), space, config)


def make_agent(space=CONTINUOUS, obs=None, **flags):
    return make_variant(Director, space, obs, **flags)


def random_batch(rng, size, length, discrete, actions):
    """A replay batch. Its second chunk has a terminal step 6, and a new episode from step 7."""
    batch = {
        "image": rng.integers(0, 256, (size, length, 64, 64, 3)).astype(np.uint8),
        "action": rng.normal(size=(size, length, actions)).astype(np.float32),
        "reward": rng.normal(size=(size, length)).astype(np.float32)}
    if discrete:
        batch["action"] = np.eye(actions, dtype=np.float32)[batch["action"].argmax(-1)]
    for key in ("is_first", "is_last", "is_terminal"):
        batch[key] = np.zeros((size, length), bool)
    batch["is_first"][:, 0] = batch["is_first"][1, 7] = batch["is_terminal"][1, 6] = True
    return batch


def replayed(agent, steps=12):
    """States of three replay chunks; in the last one, a second episode begins at step 5."""
    gen = torch.manual_seed(1)
    states = {"deter": torch.randn(3, steps, 16, generator=gen),
              "is_first": torch.zeros(3, steps, dtype=torch.bool)}
    states["is_first"][2, 5] = True
    return states


def starts_at(deter, stoch):
    """Starts for `Director.imagine`, none of them terminal."""
    return {"deter": deter, "stoch": stoch, "is_terminal": torch.zeros(len(deter), dtype=bool)}


def check_optimizer_ownership(agent, batch):
    """Each parameter belongs to exactly one optimizer, and each optimizer moves only its own.

    Returns the metrics of one train step; later ones are checked, too.
    """
    owned = [param for optimizer in agent.optimizers.values() for param in optimizer.params]
    assert len(owned) == len(set(owned)) == sum(p.requires_grad for p in agent.parameters())
    for optimizer in agent.optimizers.values():
        def minimize(loss, optimizer=optimizer, minimize=optimizer.minimize):
            before = {param: param.detach().clone() for param in agent.parameters()}
            norm = minimize(loss)
            moved = {param for param, old in before.items() if not torch.equal(param, old)}
            assert moved and moved <= set(optimizer.params)
            assert all(param.grad is None for param in agent.parameters())
            return norm

        optimizer.minimize = minimize
    return agent.train_step(batch)


def short_name(value) -> str:
    """The id of a parametrized test for an agent's class, its flags, or a space."""
    if isinstance(value, type):
        return director.agent_name(value)
    return "-".join(map(str, value.values())) if isinstance(value, dict) else type(value).__name__


# ---- Environments ---------------------------------------------------------------------------


def has_renderer() -> bool:
    try:
        DMControl("walker_walk")
    except ImportError:
        return False
    return True


needs_rendering = pytest.mark.skipif(not has_renderer(), reason="no OpenGL on this machine")


class Mixed(gymnasium.Env):
    """Observes a large image, a matrix, two vectors and a class, as a user's environment may."""

    observation_space = spaces.Dict({
        "camera": spaces.Box(0, 255, (80, 96, 3), np.uint8), "speed": spaces.Box(-1, 1, (2,)),
        "pose": spaces.Box(-1, 1, (2, 2), np.float64), "gear": spaces.Discrete(3)})
    action_space = spaces.Box(np.array([0, -3], np.float32), np.array([1, 3], np.float32))

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.steps = 0
        return self.observe(), {}

    def step(self, action):
        self.steps += 1
        self.action = action
        return self.observe(), float(action[1]), False, self.steps >= 9, {}

    def observe(self):
        image = np.full((80, 96, 3), 10 * self.steps, np.uint8)
        return {"camera": image, "speed": np.array([0.5, -0.5], np.float32),
                "pose": np.arange(4.0).reshape(2, 2) / 4, "gear": 1}


def short_pinpad():
    """Pin Pad with episodes of 100 steps, which rewards each visit of pad 1."""
    env = PinPad("three", length=100)
    env.target = (1,)
    return env


def pushed_pinpad():
    """The same with continuous actions: the sign of the first one is stay or down."""
    return gymnasium.wrappers.TransformAction(
        short_pinpad(), lambda action: int(action[0] > 0), spaces.Box(-1, 1, (2,)))


gymnasium.register("Mixed-v0", Mixed)
gymnasium.register("ShortPinPad-v0", short_pinpad)
gymnasium.register("PushedPinPad-v0", pushed_pinpad)


def towards_next_pad(env: PinPad) -> int:
    """First action of a shortest path to the pad that the sequence needs next."""
    matches = [k for k in range(len(env.target) + 1) if env.history[-k:] == env.target[:k]]
    done = max(matches, default=0)
    wanted = min(done + 1, len(env.target))
    here = env.cells[env.player[1], env.player[0]]
    came, queue = {env.player: None}, [env.player]
    for x, y in queue:
        if env.cells[y, x] == wanted:
            break
        for action, (dx, dy) in enumerate(((0, 0), (0, 1), (0, -1), (1, 0), (-1, 0))):
            cell = x + dx, y + dy
            if cell not in came and env.cells[cell[1], cell[0]] in (0, wanted, here):
                came[cell] = (x, y), action
                queue.append(cell)
    cell, action = (x, y), 0
    while came[cell]:
        cell, action = came[cell]
    return action


# ---- Runs and programs ----------------------------------------------------------------------


def read_metrics(logdir) -> list[dict]:
    return [json.loads(line) for line in open(f"{logdir}/metrics.jsonl")]


def run_program(monkeypatch, capsys, path, *args) -> str:
    """What a script of this repository prints; it runs in this process."""
    monkeypatch.setattr(sys, "argv", [str(path), *map(str, args)])
    capsys.readouterr()
    try:
        runpy.run_path(str(HERE / path), run_name="__main__")
    except SystemExit as done:
        if done.code:
            raise
    return capsys.readouterr().out


# ---- Runs in the background -----------------------------------------------------------------
# A module's BACKGROUND = {name of a test: work} lists what its tests wait for. The work, which is a
# function of a folder or the command line of a Python program, runs beside all other tests. The
# test asks for the fixture `background`, the folder with the results.


def background_work(item):
    return getattr(item.module, "BACKGROUND", {}).get(item.name)


def pytest_configure(config):
    config.addinivalue_line(
        "markers", "slow: takes several seconds: trains, starts processes, or breaks files")


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: background_work(item) is not None)  # those wait longest at the end


@pytest.fixture(scope="session", autouse=True)
def background_runs(request, tmp_path_factory):
    """{id of a test: the future folder of its work}; one after the other, on the second core."""
    processes = []

    def run(work, folder):
        if callable(work):
            work(folder)
            return folder
        command = [sys.executable, *work, f"--logdir={folder}/run"]
        with open(folder / "output", "w") as output, open(folder / "errors", "w") as errors:
            processes.append(subprocess.Popen(command, cwd=HERE, stdout=output, stderr=errors))
        assert processes[-1].wait() == 0, f"{command}: {(folder / 'errors').read_text()}"
        return folder

    with contextlib.ExitStack() as stack:
        pool = stack.enter_context(concurrent.futures.ThreadPoolExecutor(1))
        stack.callback(lambda: [process.kill() for process in processes])
        stack.callback(pool.shutdown, wait=False, cancel_futures=True)
        yield {item.nodeid: pool.submit(run, work, tmp_path_factory.mktemp("background"))
               for item in request.session.items if (work := background_work(item))}


@pytest.fixture
def background(background_runs, request):
    """The folder of this test's background work, once that has ended."""
    return background_runs[request.node.nodeid].result()
