"""What diayn does, against numbers worked out by hand."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from conftest import (
    close,
    make_variant,
    random_batch,
    starts_at,
    tensor,
)
from variants import (
    diayn,
)


def test_diayn_rewards_how_much_better_than_by_chance_a_skill_is_recognised():
    agent = make_variant(diayn.Agent, skills=4)
    agent.goals.discriminator.forward = lambda deter: deter[..., :4].log()
    deter = tensor([[1, 1, 1, 1], [0.7, 0.1, 0.1, 0.1], [0.25] * 4])[:, None]
    goal = torch.eye(4)[[0, 1, 2]][:, None]
    close(agent.reward_goal({"deter": deter, "goal": goal}),
          [[math.log(0.7 * 4)], [math.log(0.25 * 4)]], atol=1e-6)


def test_the_discriminator_learns_which_skill_led_to_a_state_of_those_drawn_from_the_prior():
    agent, losses = make_variant(diayn.Agent, skills=4, horizon=8), []
    agent.goals.discriminator.forward = lambda deter: deter[..., :4]
    agent.optimizers["goals"].minimize = lambda loss: losses.append(loss) or torch.zeros(())
    traj = agent.imagine(starts_at(*torch.randn(2, 6, 16)))
    traj["cont"] = torch.ones(9, 6)
    traj["cont"][3, 1], traj["cont"][5, 2] = 0, 0.5
    for agent.config.skills_for, columns in (("diversity", 6), ("task", 3)):
        metrics = agent.train_imagined(traj)
        logits, skill = traj["deter"][1:, :columns, :4], traj["skill"][:-1, :columns].argmax(-1)
        entropy = F.cross_entropy(logits.movedim(-1, 1), skill, reduction="none")
        entropy[3:, 1] = 0  # one ends in state 3, which is learned, too; half of one in state 5
        entropy[5:, 2] /= 2
        close(losses[-1], entropy.mean())
        close(metrics["skill_right"], (logits.argmax(-1) == skill).float().mean())


def test_diayn_draws_skills_uniformly_until_a_manager_picks():
    agent = make_variant(diayn.Agent, skills=4)
    agent.manager.actor.out.bias.data[:] = tensor([9, 0, 0, 0])  # it wants the first
    deter, stoch = torch.randn(2, 2000, 16)
    starts, batch = starts_at(deter, stoch), random_batch(np.random.default_rng(0), 2, 9, True, 5)
    uniform = 0.25 * np.ones(4)
    assert agent.imagine(starts)["skill"][0].mean(0).numpy() == pytest.approx(uniform, abs=0.05)
    assert agent.sample_skill(starts).mean(0).numpy() == pytest.approx(uniform, abs=0.05)
    before = agent.manager.actor.out.weight.detach().clone()
    agent.train_step(batch)
    assert torch.equal(agent.manager.actor.out.weight, before)
    agent.config.skills_for = "task"
    traj = agent.imagine(starts)
    assert traj["skill"][0, :1000].mean(0).numpy() == pytest.approx(uniform, abs=0.07)
    assert traj["skill"][0, 1000:, 0].mean() > 0.95
    assert agent.sample_skill(starts)[:, 0].mean() > 0.95
    view = agent.player_trajectories(traj)["manager"]
    assert torch.equal(view["action"], traj["skill"][::8, 1000:])
    agent.train_step(batch)
    assert not torch.equal(agent.manager.actor.out.weight, before)


def test_skills_become_recognisable_in_a_fixed_world_model():
    """Without the worker's reward, skills stay as hard to recognise as they were."""
    found = []
    for paid in (1, 0):
        agent = make_variant(diayn.Agent, skills=4, learning_rate=3e-3, horizon=8)
        agent.world_model.rssm.inputs[0].weight.data[:, 16:] *= 3  # actions matter
        for step in range(100):
            traj = agent.imagine(starts_at(*torch.zeros(2, 64, 16)))
            metrics = agent.train_imagined(traj)
            view = agent.player_trajectories(traj)["worker"]
            agent.worker.learn({**view, "reward_goal": paid * view["reward_goal"]}, step % 10 == 0)
        found.append(float(metrics["skill_right"]))
        assert (metrics["goal_reward_last"] > metrics["goal_reward_other"] + 0.2) == paid
    assert found[0] > 0.5 and found[1] < 0.4, found


def test_the_manager_of_skills_is_rewarded_for_the_task_and_the_worker_for_skills():
    agent = make_variant(diayn.Agent, skills_for="task")
    assert dict(agent.manager.rewards) == {"extr": 1.0}
    assert dict(agent.worker.rewards) == {"goal": 1.0}
