"""Training on several processes is the same algorithm as on one."""

import contextlib
import os
import signal
import socket
import subprocess
import sys

import numpy as np
import pytest
import torch

import director
from conftest import HERE, RUN, read_metrics
from variants import parallel

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


def test_two_processes_with_halves_of_a_batch_equal_one_with_the_whole(background):
    for rank in range(2):
        results = torch.load(background / f"{rank}.pt")
        for whole, halves in zip(*results, strict=True):
            assert whole[0].dtype == torch.float64
            np.testing.assert_allclose(halves[0], whole[0], rtol=1e-10)
            for key, value in whole[1].items():
                np.testing.assert_allclose(halves[1][key], value, rtol=1e-10, atol=1e-10)


@contextlib.contextmanager
def two_ranks(*flags):
    """Both processes of a run, started directly, as torchrun takes seconds; killed at the end."""
    with socket.create_server(("localhost", 0)) as server:
        port = server.getsockname()[1]
    env = {**os.environ, "MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    processes = [
        subprocess.Popen([sys.executable, "-m", "variants.parallel", *flags], cwd=HERE,
                         env={**env, "RANK": str(rank)}, stdout=subprocess.PIPE,
                         stderr=subprocess.STDOUT, text=True) for rank in range(2)]
    try:
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.wait()


TOGETHER = [*RUN, "--task=gym_envs.grid:Corridor-v0", "--processes=no", "--envs=4", "--steps=400"]


def train_save_resume(folder):
    flags = [*TOGETHER, f"--logdir={folder}"]
    # A signal to one of them stops both after the same step; rank 0 alone prints.
    with two_ranks(*flags, "--steps=9000") as (first, second):
        assert any("model loss" in line for line in first.stdout)  # both are training
        second.send_signal(signal.SIGTERM)
        printed, silence = first.communicate()[0], second.communicate()[0]
        assert first.returncode == second.returncode == 128 + signal.SIGTERM
    saved = torch.load(folder / "checkpoint.pt")
    assert f"Saved at step {saved['step']}; the same" in printed and "gradient" not in silence
    assert [sum(x.values()) for x in saved["episodes"].values()] == [saved["step"] // 2] * 2
    for flag, expected in (("--steps=900", f"Resumed at step {saved['step']}."),
                           ("--eval=1", "episode 1: return")):
        with two_ranks(*flags, flag) as (first, second):
            printed, silence = first.communicate()[0], second.communicate()[0]
            assert printed.count(expected) == 1 and silence == "", printed + silence
            assert first.returncode == second.returncode == 0


def test_two_processes_train_save_and_resume_as_one_run(background, monkeypatch, capsys):
    flags = [*TOGETHER, f"--logdir={background}"]
    assert read_metrics(background)[-1]["train/grad_steps"] == (900 - 100) / 8
    assert director.main(flags, parallel.Agent) == 2
    assert "is of 2 processes, not 1" in capsys.readouterr().err
    monkeypatch.setattr(parallel, "RANKS", 2)
    assert director.main([*flags, "--envs=3"], parallel.Agent) == 2
    assert "--envs: not multiples of 2 processes" in capsys.readouterr().err


BACKGROUND = {  # see conftest.py; two processes take half a minute to start
    "test_two_processes_train_save_and_resume_as_one_run": train_save_resume,
    "test_two_processes_with_halves_of_a_batch_equal_one_with_the_whole": train_halves}
