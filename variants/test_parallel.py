"""Training on several processes is the same algorithm as on one."""

import concurrent.futures
import os
import signal
import socket
import subprocess
import sys

import numpy as np
import pytest
import torch

import director
from conftest import (
    HERE,
    RUN,
    read_metrics,
)
from variants import (
    parallel,
)

pytestmark = pytest.mark.slow
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2"]


HALVES = """
import sys
sys.path.insert(0, {here!r})
import numpy as np, torch, conftest, director
from variants import parallel

def make(kind, parts):
    agent = conftest.make_variant(director.Director, getattr(conftest, kind))
    batch = conftest.random_batch(
        np.random.default_rng(0), 4, 9, agent.discrete, agent.sizes["action"])
    batch = {{key: x.astype(float) if x.dtype == np.float32 else x for key, x in batch.items()}}
    return agent, {{key: np.split(x, parts)[parallel.RANK % parts] for key, x in batch.items()}}

def steps(kind, parts):
    agent, part = make(kind, parts)
    for _ in range(5):
        metrics = agent.train_step(part)
    metrics.pop("goal_reward_other")  # other goals are exchanged
    return torch.stack(director.all_reduce_mean(list(metrics.values()))), agent.state_dict()

torch.set_default_dtype(torch.float64)
torch.Tensor.float = torch.Tensor.double
director.OneHot.rsample = lambda dist: dist.mode + (dist.probs - dist.probs.detach())
director.BoundedNormal.rsample = lambda dist: dist.mean
kinds = "DISCRETE", "CONTINUOUS"
whole = [steps(kind, 1) for kind in kinds]
torch.distributed.init_process_group("gloo")
director.all_reduce_mean = parallel.all_reduce_mean
halves = [steps(kind, 2) for kind in kinds]
torch.save((whole, halves), f"{{parallel.RANK}}.pt")
torch.distributed.destroy_process_group()
"""


def train_halves(folder):
    (folder / "halves.py").write_text(HALVES.format(here=str(HERE)))
    subprocess.run([*TORCHRUN, "halves.py"], check=True, cwd=folder)


def test_two_processes_with_halves_of_a_batch_equal_one_with_the_whole(ended):
    for rank in range(2):
        results = torch.load(ended / f"{rank}.pt")
        for whole, halves in zip(*results, strict=True):
            assert whole[0].dtype == torch.float64
            np.testing.assert_allclose(halves[0], whole[0], rtol=1e-10)
            for key, value in whole[1].items():
                np.testing.assert_allclose(halves[1][key], value, rtol=1e-10, atol=1e-10)


def ranks(*command) -> list[subprocess.Popen]:
    """Both processes of a run, as torchrun starts them, which takes it seconds."""
    with socket.create_server(("localhost", 0)) as server:
        port = server.getsockname()[1]
    env = {**os.environ, "MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    return [subprocess.Popen([sys.executable, "-m", "variants.parallel", *command], cwd=HERE,
                             env={**env, "RANK": str(rank)}, stdout=subprocess.PIPE,
                             stderr=subprocess.STDOUT, text=True) for rank in range(2)]


TOGETHER = [*RUN, "--task=gym_envs.grid:Corridor-v0", "--processes=no", "--envs=4", "--steps=400"]


def train_save_resume(folder):
    flags = [*TOGETHER, f"--logdir={folder}"]
    # A signal to one of them stops both, after the same step; rank 0 alone prints.
    first, second = ranks(*flags, "--steps=9000")
    assert any("model loss" in line for line in first.stdout)  # both are training
    second.send_signal(signal.SIGTERM)
    said, silence = first.communicate()[0], second.communicate()[0]
    saved = torch.load(folder / "checkpoint.pt")
    assert f"Saved at step {saved['step']}; the same" in said and "gradient" not in silence
    assert [sum(x.values()) for x in saved["episodes"].values()] == [saved["step"] // 2] * 2
    assert first.returncode == second.returncode == 128 + signal.SIGTERM
    for more, word in (("--steps=900", f"Resumed at step {saved['step']}."),
                       ("--eval=1", "episode 1: return")):
        first, second = ranks(*flags, more)
        said, silence = first.communicate()[0], second.communicate()[0]
        assert said.count(word) == 1 and silence == "", said + silence
        assert first.returncode == second.returncode == 0


def test_two_processes_train_save_and_resume_as_one_run(ended, monkeypatch, capsys):
    flags = [*TOGETHER, f"--logdir={ended}"]
    assert read_metrics(ended)[-1]["train/grad_steps"] == (900 - 100) / 8
    assert director.main(flags, parallel.Agent) == 2
    assert "is of 2 processes, not 1" in capsys.readouterr().err
    monkeypatch.setattr(parallel, "RANKS", 2)
    assert director.main([*flags, "--envs=3"], parallel.Agent) == 2
    assert "--envs: not multiples of 2 processes" in capsys.readouterr().err


BESIDE = {  # what these tests wait for: two processes, which take half a minute to start
    "test_two_processes_train_save_and_resume_as_one_run": train_save_resume,
    "test_two_processes_with_halves_of_a_batch_equal_one_with_the_whole": train_halves}


@pytest.fixture(scope="module", autouse=True)
def processes(request, tmp_path_factory):
    """{test: its folder, once its processes have ended}; beside other tests, a pair at a time."""
    def run(name):
        folder = tmp_path_factory.mktemp("beside")
        BESIDE[name](folder)
        return folder

    names = [name for name in BESIDE if name in {item.name for item in request.session.items}]
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        yield {name: pool.submit(run, name) for name in names}


@pytest.fixture
def ended(processes, request):
    return processes[request.node.name].result()
