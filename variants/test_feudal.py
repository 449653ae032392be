"""What feudal does, against numbers worked out by hand."""

import numpy as np
import torch

import director
from conftest import (
    close,
    make_variant,
    replayed,
    tensor,
)
from variants import (
    feudal,
)


def test_feudal_rewards_the_mean_cosine_of_all_moves_since_the_goal_was_set():
    agent = make_variant(feudal.Agent, horizon=4, goal_duration=2)
    deter = tensor([[0, 0], [3, 4], [3, 0], [3, 0], [4, 0]])[:, None]
    goal = tensor([[1, 0], [1, 0], [0, 2], [0, 2], [5, 5]])[:, None]
    reward = agent.reward_goal({"deter": deter, "goal": goal})
    # 3 of 5 along x; then (0, -4) and (3, 0); no move at all; then (1, 0) and (1, 0), across.
    close(reward, [[0.6], [(0 + 1) / 2], [0], [0]])
    agent.config.feudal_reward = "dot"
    close(agent.reward_goal({"deter": deter, "goal": goal}), [[3], [0], [0], [0]])


def test_feudal_learns_unit_directions_of_pairs_within_an_episode():
    agent = make_variant(feudal.Agent, goal_duration=4)
    states, losses = replayed(agent), []
    close(agent.goals.decode(torch.randn(5, 64)).norm(dim=-1), np.ones(5))
    agent.optimizers["goals"].minimize = losses.append
    agent.goals.loss = lambda move, weight: (losses.append((move, weight)) or (0, {}))
    agent.train_goals(states)
    move, weight = losses[0]
    close(move.norm(dim=-1), np.ones(24))
    way = states["deter"][1, 7] - states["deter"][1, 3]
    close(move[8 + 3], way / way.norm())
    assert weight.tolist() == [True] * 16 + [True] + [False] * 4 + [True] * 3


def test_pairs_of_no_weight_do_not_train_the_goal_autoencoder(monkeypatch):
    monkeypatch.setattr(director.OneHot, "rsample", lambda dist: dist.probs)
    agent, gradients = make_variant(feudal.Agent), []
    deter, weight = torch.randn(6, 16), tensor([1, 1, 0, 1, 0, 0])
    for other in (deter, torch.where(weight[:, None] > 0, deter, 5.0), deter + 1):
        agent.goals.kl_adapt.scale.fill_(1.0)
        loss = agent.goals.loss(other, weight)[0]
        gradients.append(torch.cat([x.flatten() for x in torch.autograd.grad(
            loss, list(agent.goals.parameters()))]))
    assert torch.equal(gradients[0], gradients[1]) and not torch.equal(*gradients[1:])


def test_feudal_explores_directions_that_are_new_over_a_whole_goal():
    agent = make_variant(feudal.Agent, horizon=4, goal_duration=2)
    agent.goals.novelty = lambda way: way[..., 0]
    deter = tensor([[0, 0], [9, 9], [3, 4], [9, 9], [3, 9]])[:, None]
    reward = agent.reward_expl({"deter": deter})
    close(reward, [[0], [2 * 0.6], [0], [0]])
    # The manager's reward is 0.6 times the probability of getting to the end of the goal, 0.5. The
    # second goal has a reward of 0 in the first place.
    traj = {"deter": deter, "skill": deter, "action": deter, "reward_expl": reward,
            "cont": tensor([1, 0.5, 0.9, 1, 1])[:, None]}
    close(director.abstract_trajectory(traj, 2)["reward_expl"], [[0.6 * 0.5], [0]])
