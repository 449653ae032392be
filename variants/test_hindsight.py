"""What hindsight does, against numbers worked out by hand."""

import copy
import itertools

import numpy as np
import pytest
import torch

import director
from conftest import (
    CONTINUOUS,
    DISCRETE,
    close,
    make_variant,
    random_batch,
    starts_at,
    tensor,
)
from variants import (
    hindsight,
)


def script(steps=12):
    """Three chunks whose states tell chunk and step; a second episode in the last one."""
    deter = torch.zeros(3, steps, 16)
    deter[..., 0], deter[..., 1] = torch.arange(3)[:, None], torch.arange(steps)
    is_first = torch.zeros(3, steps, dtype=torch.bool)
    is_first[:, 0] = is_first[2, 5] = True
    return {"deter": deter, "stoch": torch.randn(3, steps, 16), "is_first": is_first,
            "action": torch.eye(5)[torch.randint(5, (3, steps))],
            "is_terminal": torch.zeros(3, steps, dtype=torch.bool)}


@pytest.fixture
def only_worker(monkeypatch):
    """train_goals trains no goal autoencoder."""
    monkeypatch.setattr(director.Director, "train_goals", lambda agent, states: {})


def test_goals_in_hindsight_are_all_that_comes_later_in_the_episode_and_nothing_else():
    torch.manual_seed(0)
    states = script()
    goals = hindsight.later_states(states["deter"], states["is_first"], 300)
    assert goals.shape == (300, 3, 11, 16)
    for b, t in itertools.product(range(3), range(11)):
        end = 5 if b == 2 and t < 5 else 12
        assert (goals[:, b, t, 0] == b).all()
        found, counts = goals[:, b, t, 1].unique(return_counts=True)
        if t + 1 < end:  # else it is masked
            assert found.tolist() == list(range(t + 1, end))
            assert counts.min() > 0.4 * 300 / len(found)


@pytest.mark.parametrize("space", [DISCRETE, CONTINUOUS], ids=["discrete", "continuous"])
def test_targets_of_q_equal_those_of_a_loop_over_own_and_later_goals(
        space, monkeypatch, only_worker):
    agent = make_variant(hindsight.Agent, space, her=2, goal_duration=4, horizon=8, reached=0.8)
    states, own, later = script(), torch.randn(3, 11, 16), torch.randn(2, 3, 11, 16)
    if not agent.discrete:
        states["action"] = torch.randn(3, 12, 3)
    states["deter"] = torch.randn(3, 12, 16)
    states["is_terminal"][1, 11] = states["is_terminal"][2, 4] = states["is_terminal"][0, 6] = True
    own[0, 3], later[0, 1, 2] = states["deter"][0, 4], states["deter"][1, 3]  # these are reached
    later[1, 1, 7] = states["deter"][1, 7]  # not this: it is where one starts
    monkeypatch.setattr(hindsight, "later_states", lambda *args: later)
    agent.goals.decode.forward = lambda code: own.flatten(0, 1)
    for param in agent.slow.parameters():  # no copy of the worker
        param += 0.3 * torch.randn_like(param)
    agent.grad_steps, losses = 2, []
    worker, slow = agent.worker, agent.slow
    agent.optimizers["worker"].minimize = lambda loss: losses.append(loss) or torch.zeros(())
    agent.train_goals(states)

    def q(nets, b, t, goal, action):
        x = torch.cat([states["deter"][b, t], states["stoch"][b, t], goal])
        x = (x if agent.discrete else torch.cat([x, action]))[None]
        return nets.q(x)[0, action.argmax()] if agent.discrete else nets.q(x)[0]

    def actor(nets, b, t, goal):
        x = torch.cat([states["deter"][b, t], states["stoch"][b, t], goal])
        return nets.actor(x[None])[0].tanh()

    expected, climbed, paid, clipped = 0.0, 0.0, 0, 0
    for goals, b, t in itertools.product([own, *later], range(3), range(11)):
        if states["is_first"][b, t + 1]:
            continue
        goal, there = goals[b, t], states["deter"][b, t + 1]
        cosine = goal @ there / max(goal @ goal, there @ there)
        if agent.discrete:
            future = max(float(q(slow, b, t + 1, goal, action)) for action in torch.eye(5))
        else:
            future = float(q(slow, b, t + 1, goal, actor(slow, b, t + 1, goal)))
            climbed += q(slow, b, t, goal, actor(worker, b, t, goal)) / 99
        paid, clipped = paid + int(cosine > 0.8), clipped + int(not 0 <= future <= 1)
        ends = states["is_terminal"][b, t + 1]
        target = 1.0 if cosine > 0.8 else 0.0 if ends else 0.75 * min(max(future, 0), 1)
        expected += (q(worker, b, t, goal, states["action"][b, t + 1]) - target) ** 2 / 99
    assert paid == 2 and clipped > 0
    close(losses[0], expected - climbed, rtol=1e-4)
    # The actor's gradient reaches nothing but the actor, and Q's nothing but Q.
    assert all(x.grad is None for x in agent.slow.parameters())
    params = list(worker.q.parameters())
    for found, wanted in zip(torch.autograd.grad(losses[0], params, retain_graph=True),
                             torch.autograd.grad(expected, params), strict=True):
        close(found, wanted, rtol=1e-3, atol=1e-6)
    if not agent.discrete:
        params = list(worker.actor.parameters())
        for found, wanted in zip(torch.autograd.grad(losses[0], params),
                                 torch.autograd.grad(-climbed, params), strict=True):
            close(found, wanted, rtol=1e-3, atol=1e-6)


def test_a_transition_has_its_own_goal_from_the_manager_in_the_state_it_starts_from(only_worker):
    agent = make_variant(hindsight.Agent, her=1, goal_duration=4, horizon=8)
    states, seen, losses = script(), [], []
    agent.sample_skill = lambda state: seen.append(state) or state["deter"]
    agent.goals.decode.forward = lambda code: seen.append(code) or code.requires_grad_()
    agent.optimizers["worker"].minimize = lambda loss: losses.append(loss) or torch.zeros(())
    agent.train_goals(states)
    assert torch.equal(seen[0]["stoch"], states["stoch"][:, :-1].reshape(33, 16))
    assert torch.equal(seen[1], states["deter"][:, :-1].reshape(33, 16))
    assert torch.autograd.grad(losses[0], seen[1], allow_unused=True) == (None,)


def test_the_slow_worker_becomes_the_worker_every_so_many_steps():
    agent = make_variant(hindsight.Agent, CONTINUOUS, slow_every=3)
    batch = random_batch(np.random.default_rng(0), 2, 9, False, 3)
    for step in range(5):
        before = [copy.deepcopy(x.state_dict()) for x in (agent.worker, agent.slow)]
        agent.train_step(batch)
        for key, value in agent.slow.state_dict().items():
            assert torch.equal(value, before[0 if step % 3 == 0 else 1][key])
    assert not torch.equal(agent.worker.actor.out.weight, agent.slow.actor.out.weight)


def test_noise_is_in_what_is_sampled_and_never_in_an_evaluation():
    feat = torch.randn(20_000, 48)
    for space, noise in itertools.product((DISCRETE, CONTINUOUS), (0.0, 0.3)):
        agent = make_variant(hindsight.Agent, space, noise=noise)
        dist, best = agent.worker.dist(feat), agent.worker.best(feat)
        close(dist.mode, best)
        off = dist.rsample() - best
        if agent.discrete:
            assert torch.equal(best.argmax(-1), agent.worker.q(feat).argmax(-1))
            share = off.abs().amax(-1).mean().detach()  # a random action is the best one, too
            assert abs(float(share) - noise * 4 / 5) < 0.015
        else:
            close(best, agent.worker.actor(feat).tanh())
            assert abs(float(off.std().detach()) - noise) < 0.01
    obs = {"image": np.zeros((50, 64, 64, 3), np.uint8)}
    for space, mode in itertools.product((DISCRETE, CONTINUOUS), ("eval", "train")):
        agent = make_variant(hindsight.Agent, space, noise=0.9)
        action, state = agent.policy(obs, mode=mode)
        exact = torch.equal(action, agent.worker.best(agent.worker.feat(state)))
        assert exact == (mode == "eval")


def test_reaching_a_goal_is_rewarded_with_1_and_the_worker_is_not_trained_in_imagination():
    agent = make_variant(hindsight.Agent, horizon=8, reached=0.5)
    traj = agent.imagine(starts_at(*torch.randn(2, 6, 16)))
    near = director.max_cosine(traj["goal"][:-1], traj["deter"][1:])
    paid = agent.reward_goal(traj)
    assert torch.equal(paid, (near > 0.5).float())
    assert list(agent.player_trajectories(traj)) == ["manager"]
    assert not any(value.requires_grad for value in traj.values())
    close(agent.train_imagined(traj)["goal_reward_last"], paid[7::8].mean())
    goal, deter = tensor([[1, 0]] * 3), tensor([[9, 9], [1, 0.1], [1, 3]])
    assert agent.reward_goal({"goal": goal, "deter": deter}).tolist() == [1, 0]


def test_hindsight_teaches_the_way_to_goals_that_are_never_rewarded_without_it(only_worker):
    """A line of eight places; the manager's goals lie outside of it."""
    reached, moves = [], torch.tensor([0, 1, -1, 1, -1])
    for her in (4, 0):
        agent = make_variant(hindsight.Agent, her=her, learning_rate=1e-2, units=32, slow_every=10,
                             noise=0.0)
        gen = torch.manual_seed(0)
        places, no = 3 * torch.eye(16)[:8], torch.zeros(8, 20, dtype=torch.bool)
        agent.sample_skill = lambda state: torch.zeros(len(state["deter"]), 64)
        agent.goals.decode.forward = lambda code: -torch.ones(len(code), 16)
        for _ in range(200):
            agent.grad_steps += 1
            action = torch.randint(5, (8, 20), generator=gen)
            place = [torch.randint(8, (8,), generator=gen)]
            for t in range(1, 20):
                place.append((place[-1] + moves[action[:, t]]).clamp(0, 7))
            agent.train_goals({
                "deter": places[torch.stack(place, 1)], "stoch": torch.zeros(8, 20, 16),
                "action": torch.eye(5)[action], "is_first": no, "is_terminal": no})
        here, goal = torch.arange(8).repeat_interleave(8), torch.arange(8).repeat(8)
        for _ in range(8):
            feat = torch.cat([places[here], torch.zeros(64, 16), places[goal]], -1)
            here = (here + moves[agent.worker.dist(feat).mode.argmax(-1)]).clamp(0, 7)
        reached.append(float((here == goal).float().mean()))
    assert reached[0] > 0.5 and reached[1] < 0.25, reached


def test_the_manager_above_a_worker_in_hindsight_learns_directors_trajectory():
    agent = make_variant(hindsight.Agent, horizon=8, goal_duration=4)
    traj = agent.imagine(starts_at(*torch.randn(2, 3, 16)))
    found = agent.player_trajectories(traj)["manager"]
    for key, value in director.abstract_trajectory(traj, 4).items():
        close(found[key], value)
