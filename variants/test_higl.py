"""What higl does, against numbers worked out by hand."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from conftest import (
    close,
    make_variant,
    replayed,
    starts_at,
    tensor,
)
from variants import (
    higl,
)


def test_higl_rewards_minus_the_squared_distance_of_codes_and_novelty():
    agent = make_variant(higl.Agent, latent=2, horizon=8)
    agent.goals.encode = lambda deter: deter[..., :2]
    deter = tensor([[0, 0], [1, 2], [1, 1]])[:, None].expand(-1, 4, -1)
    goal = tensor([[1, 0], [1, 0], [7, 7]])[:, None].expand(-1, 4, -1)
    close(agent.reward_goal({"deter": deter, "goal": goal})[:, 0], [-4, -1])
    agent.goals.memory.fill_(9.0)[5] = tensor([1, 5])
    close(agent.reward_expl({"deter": deter})[:, 1], [3, 4])


def test_higl_goals_are_where_codes_can_be_and_the_manager_learns_its_own_samples():
    agent = make_variant(higl.Agent, latent=2, horizon=8, goal_duration=4)
    agent.manager.actor.out.bias.data[2:] = 9  # standard deviations near 1
    traj = agent.imagine(starts_at(*torch.randn(2, 50, 16)))
    outside = traj["skill"].abs() > 1
    assert 0.2 < outside.float().mean() < 0.6
    close(traj["goal"][~outside], traj["skill"][~outside])
    close(traj["goal"][outside], traj["skill"][outside].sign())
    close(agent.player_trajectories(traj)["manager"]["action"], traj["skill"][::4])
    state = {"count": np.zeros(50), **starts_at(*torch.randn(2, 50, 16))}
    state = agent.act(state, np.ones(50, dtype=bool), "train")
    assert (state["skill"].abs() > 1).any() and (state["goal"].abs() <= 1).all()


@pytest.mark.parametrize("loss", ["prediction", "contrastive"])
def test_higl_learns_from_pairs_within_an_episode_and_remembers_the_newest_codes(loss):
    agent = make_variant(higl.Agent, latent=2, higl_loss=loss, goal_duration=4)
    states, goals, losses = replayed(agent), agent.goals, []
    goals.memory.copy_(torch.arange(2048.0).view(1024, 2))
    agent.optimizers["goals"].minimize = lambda loss: losses.append(loss) or torch.zeros(())
    agent.train_goals(states)
    with torch.no_grad():
        codes = goals.encode(states["deter"])
        pairs = [(b, t) for b in range(3) for t in range(8)]
        now, later = (torch.stack([codes[b, t + k] for b, t in pairs]) for k in (0, 4))
        if loss == "prediction":
            after = torch.stack([states["deter"][b, t + 4] for b, t in pairs])
            errors = (goals.predictor(now) - after).square().sum(-1)
        else:
            errors = F.cross_entropy(
                -torch.cdist(now, later) ** 2 / 0.5, torch.arange(24), reduction="none")
    errors = [float(x) for x, (b, t) in zip(errors, pairs, strict=True) if b < 2 or t < 1 or t > 4]
    close(losses[0], sum(errors) / 24, rtol=1e-4)
    close(goals.memory[:36], codes.flatten(0, 1))
    close(goals.memory[36:38], [[0, 1], [2, 3]])


def test_higl_contrasts_each_pair_with_all_others():
    agent = make_variant(higl.Agent, latent=3, higl_loss="contrastive", temperature=0.7)
    now, later = torch.randn(2, 5, 3, requires_grad=True)
    weight = tensor([1, 1, 0, 1, 1])
    loss, metrics = agent.goals.info_nce(now, later, weight)
    logits = -torch.cdist(now, later) ** 2 / 0.7
    each = F.cross_entropy(logits, torch.arange(5), reduction="none")
    close(loss, (each * weight).sum().detach() / 5)
    before = [(logits[i] > logits[i, i]).float().mean() for i in range(5)]
    close(metrics["goal_rank"], (tensor(before) * weight).sum() / 5)
    assert all(x.abs().sum() > 0 for x in torch.autograd.grad(loss, [now, later]))


@pytest.mark.parametrize("loss", ["prediction", "contrastive"])
def test_higl_codes_of_a_walk_tell_how_far_apart_its_places_are(loss):
    """Places on a line, whose observations are random vectors."""
    agent = make_variant(higl.Agent, higl_loss=loss, goal_duration=2, learning_rate=3e-3, units=32)
    gen = np.random.default_rng(0)
    place = torch.as_tensor(np.abs((gen.integers(-1, 2, (16, 24)).cumsum(1) + 12) % 24 - 12))
    looks = torch.randn(13, 16, generator=torch.manual_seed(0))
    visited = place.unique()

    def told() -> float:
        with torch.no_grad():
            codes = agent.goals.encode(looks[visited])
        far = torch.cdist(codes, codes)
        moves = (visited[:, None] - visited).abs().float()
        return float(torch.corrcoef(torch.stack([far.flatten(), moves.flatten()]))[0, 1])

    before, states = told(), {"deter": looks[place], "is_first": torch.zeros(16, 24).bool()}
    losses = [float(agent.train_goals(states)["goal_loss"].detach()) for _ in range(150)]
    assert losses[-1] < 0.95 * losses[0]
    after = told()
    assert after > 0.9 if loss == "contrastive" else after > before + 0.15, (before, after)
