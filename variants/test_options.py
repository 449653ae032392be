"""What options does, against numbers worked out by hand."""

import dataclasses
import itertools
import types

import numpy as np
import pytest
import torch

import director
from conftest import (
    CONTINUOUS,
    DISCRETE,
    RUN,
    check_optimizer_ownership,
    close,
    make_variant,
    prediction,
    random_batch,
    read_metrics,
    starts_at,
    tensor,
)
from envs.grid import Grid
from variants import (
    options,
)

# Two states, two options: option 0 stays, option 1 goes to the other state.
BETA = np.array([[0.3, 0.8], [0.6, 0.1]])  # state, option


PICK = np.array([[0.7, 0.3], [0.4, 0.6]])


REWARD, CONT, DISCOUNT = np.array([1.0, -2.0]), np.array([0.9, 0.7]), 0.3  # of the state reached


def option_values(beta, pick, bonus):
    """Q [state, option], by solving a linear system; a pick in state s earns bonus[s]."""
    system, right = np.eye(4), np.zeros(4)
    for s, w in itertools.product(range(2), range(2)):
        s2, row = s ^ w, 2 * s + w
        d, end = DISCOUNT * CONT[s2], beta[s2, w]
        right[row] = REWARD[s2] + d * end * bonus[s2]
        system[row, 2 * s2 + w] -= d * (1 - end)
        system[row, 2 * s2 : 2 * s2 + 2] -= d * end * pick[s2]
    return np.linalg.solve(system, right).reshape(2, 2)


def entropies(pick):
    return -(pick * np.log(pick)).sum(-1)


def every_way(horizon):
    """All trajectories of the two states: [H+1, N], with their probabilities given the start."""
    columns = []
    for start, *ways in itertools.product(range(2), *[range(2)] * (horizon + 1)):
        states, chance, ends = [start], 1.0, [1.0]
        for t in range(horizon):
            s, w, after = states[-1] ^ ways[t], ways[t], ways[t + 1]
            chance *= (1 - BETA[s, w]) * (after == w) + BETA[s, w] * PICK[s, after]
            states.append(s)
            ends.append(BETA[s, w])
        columns.append((states, ways, ends, chance))
    states, ways, ends, chance = map(np.array, zip(*columns, strict=True))
    traj = {"deter": torch.eye(16)[states.T], "stoch": torch.zeros(horizon + 1, len(states), 16),
            "option": torch.eye(2)[ways.T], "beta": tensor(ends.T), "pi": tensor(PICK[states.T]),
            "cont": tensor(CONT[states.T]), "reward_extr": tensor(REWARD[states.T[1:]]),
            "action": torch.eye(5)[ways.T]}
    return traj, states.T, ways.T, chance


def two_states(table, **flags):
    """An agent whose slow critic has these Q, and whose advantages are taken as they are."""
    agent = make_variant(options.Agent, options=2, discount=DISCOUNT, **flags)
    worker = agent.worker
    worker.slow["extr"].forward = lambda feat: prediction(
        torch.einsum("...s,...w,sw->...", feat[..., :2], feat[..., -2:], tensor(table)))
    worker.advantage_std.forward = lambda x, update=True: x
    logits = tensor(np.log(PICK))
    worker.pi_net.forward = lambda state: torch.einsum("...s,sw->...w", state[..., :2], logits)
    worker.pi = lambda state, available: director.OneHot(worker.pi_net(state))
    return agent


def test_option_returns_bootstrap_from_going_on_and_from_a_new_pick():
    agent = two_states([[1, 2], [3, 5]], lam=0.5, option_entropy=0)
    at, option = [0, 1, 1], [1, 0, 0]
    traj = {"deter": torch.eye(16)[at][:, None], "stoch": torch.zeros(3, 1, 16),
            "option": torch.eye(2)[option][:, None], "pi": tensor(PICK[at])[:, None],
            "beta": tensor([1, 0.1, 0.6])[:, None], "cont": torch.ones(3, 1),
            "reward_extr": tensor([10, 20])[:, None]}
    ret, value = agent.worker.returns("extr", agent.worker.feat(traj), traj)
    close(value, [[2], [3]])  # Q of the options that act
    # V of state 1 is 0.4 * 3 + 0.6 * 5 = 4.2. With option 1 it is worth 0.9 * 5 + 0.1 * 4.2 = 4.92
    # to arrive there, with option 0 it is 0.4 * 3 + 0.6 * 4.2 = 3.72.
    last = 20 + 0.3 * 3.72
    close(ret, [[10 + 0.3 * (0.5 * 4.92 + 0.5 * last)], [last]])


@pytest.mark.parametrize("lam", [0.0, 0.7, 1.0])
@pytest.mark.parametrize("entropy", [0.0, 2.0])
def test_true_option_values_are_what_their_returns_are_on_average(entropy, lam):
    """Over all ways that a trajectory can go, each with its chance; the values solve the chain."""
    table = option_values(BETA, PICK, entropy * entropies(PICK))
    traj, states, ways, chance = every_way(3)
    agent = two_states(table, lam=lam, option_entropy=entropy)
    ret, value = agent.worker.returns("extr", agent.worker.feat(traj), traj)
    close(value, table[states, ways][:-1], rtol=1e-4)
    for t, s, w in itertools.product(range(3), range(2), range(2)):
        chosen = (states[t] == s) & (ways[t] == w)
        mean = (ret[t].numpy() * chance)[chosen].sum() / chance[chosen].sum()
        close(mean, table[s, w], rtol=1e-4)


@pytest.mark.parametrize("entropy", [0.0, 2.0])
def test_the_gradient_of_ending_is_that_of_the_option_values(entropy):
    """Against finite differences of the values' linear system in each of the four chances."""
    bonus, logits = entropy * entropies(PICK), np.log(BETA / (1 - BETA))
    table, expected = option_values(BETA, PICK, bonus), np.zeros((2, 2))
    for s, w in itertools.product(range(2), range(2)):
        step = np.zeros((2, 2))
        step[s, w] = 1e-4
        high, low = (option_values(1 / (1 + np.exp(-x)), PICK, bonus).sum()
                     for x in (logits + step, logits - step))
        expected[s, w] = (high - low) / 2e-4
    traj, states, ways, chance = every_way(8)
    traj["cont"][0] = tensor(chance)  # a trajectory counts by its chance
    agent, losses = two_states(table, option_entropy=entropy, option_cost=0), []
    param = tensor(logits).requires_grad_()
    agent.worker.beta_net.forward = lambda state: torch.einsum(
        "...s,sw->...w", state[..., :2], param)
    agent.worker.optimizers["beta"].minimize = lambda loss: losses.append(loss) or torch.zeros(())
    agent.worker.optimizers["pi"].minimize = lambda loss: torch.zeros(())
    agent.worker.learn(traj, copy_slow=False)
    gradient, = torch.autograd.grad(losses[0], param, retain_graph=True)
    close(-gradient * traj["reward_extr"].numel(), expected, rtol=1e-3, atol=1e-4)

    agent.config.option_cost = 1.5  # of ending, where one gets to with an option
    agent.worker.learn(traj, copy_slow=False)
    dearer, = torch.autograd.grad(losses[1] - losses[0], param)
    weights = director.trajectory_weights(traj["cont"], DISCOUNT)[1:].numpy()
    for s, w in itertools.product(range(2), range(2)):
        there = (states[1:] == s) & (ways[:-1] == w)
        slope = BETA[s, w] * (1 - BETA[s, w])
        close(dearer[s, w], 1.5 * slope * (weights * there).mean(), rtol=1e-4)


def test_picks_go_to_options_that_are_worth_more_and_stay_uncertain():
    table = np.array([[1.0, 4.0], [2.0, 1.0]])
    traj, states, _, _ = every_way(2)
    agent, losses = two_states(table, option_entropy=0.5), []
    agent.worker.optimizers["pi"].minimize = lambda loss: losses.append(loss) or torch.zeros(())
    agent.worker.optimizers["beta"].minimize = lambda loss: torch.zeros(())
    param = tensor(np.log(PICK)).requires_grad_()
    agent.worker.pi_net.forward = lambda state: torch.einsum("...s,sw->...w", state[..., :2], param)
    agent.worker.learn(traj, copy_slow=False)
    weights = director.trajectory_weights(traj["cont"], DISCOUNT).numpy()
    gradient, = torch.autograd.grad(losses[0], param)
    for s, w in itertools.product(range(2), range(2)):
        worth = table[s] - 0.5 * np.log(PICK[s])  # Q - 0.5 log pi, whose mean is V with entropy
        slope = PICK[s, w] * (worth[w] - (PICK[s] * worth).sum())
        close(gradient[s, w], -slope * (weights * (states == s)).mean(), rtol=1e-4, atol=1e-6)


def test_rewards_of_any_size_teach_the_same_ends_and_picks():
    found = []
    for size in (1, 1000):
        agent = make_variant(options.Agent, options=2, option_entropy=0.1, option_cost=0.2)
        traj = agent.imagine(starts_at(*torch.randn(2, 8, 16)))
        old = agent.worker.slow["extr"].forward
        agent.worker.slow["extr"].forward = lambda feat, size=size, old=old: prediction(
            size * old(feat).pred)
        traj["reward_extr"] = size * traj["reward_extr"]
        for name in ("beta", "pi"):
            agent.worker.optimizers[name].minimize = (
                lambda loss: found[-1].append(loss.detach()) or torch.zeros(()))
        found.append([])
        agent.worker.learn(traj, copy_slow=False)
        ret, _ = agent.worker.returns("extr", agent.worker.feat(traj), traj)
        found[-1].append(ret.mean() / size)
    close(found[0], found[1], rtol=1e-3)


def test_a_step_that_copies_the_slow_critic_uses_one_unit_of_entropy_in_both_of_its_returns():
    agent = make_variant(options.Agent, options=2, option_entropy=1)
    worker = agent.worker
    traj = agent.imagine(starts_at(*torch.randn(2, 8, 16)))
    traj["reward_extr"] = 0 * traj["reward_extr"]
    worker.learn(traj, copy_slow=False)
    worker.values = lambda state, pick: (10 * pick, (10 * pick).mean(-1))  # the unit changes now
    feat, found = worker.feat(traj), []
    before, _ = worker.returns("extr", feat, traj)
    returns = worker.returns
    worker.returns = lambda *args: found.append(returns(*args)) or found[-1]
    worker.learn(traj, copy_slow=True)
    assert len(found) == 2 and worker.advantage_std.count == 2  # two calls, one batch each step
    for ret, _ in found:
        close(ret, before)
    assert not torch.allclose(returns("extr", feat, traj)[0], before)


@pytest.mark.parametrize("acting", [True, False])
def test_an_option_ends_in_the_state_arrived_in_by_its_own_chance(acting):
    """Option 0 never ends, 1 always, 2 where t is a multiple of 3; picks are 0, 1, 2 in turns."""
    agent = make_variant(options.Agent, options=3, horizon=8)
    worker = agent.worker

    def end(features):
        where = features[:, :1]  # t
        never, always = torch.full_like(where, -50), torch.full_like(where, 50)
        return torch.cat([never, always, torch.where(where % 3 == 0, always, never)], -1)

    worker.beta_net.forward = end
    picks = torch.eye(3)[[0, 1, 2]]
    worker.pi = lambda state, available: types.SimpleNamespace(
        rsample=lambda: picks, probs=picks, mode=picks)
    agent.world_model.rssm.img_step = lambda deter, stoch, action: (deter + 1, stoch)
    steps, state = [], starts_at(torch.zeros(3, 16), torch.zeros(3, 16))
    if acting:
        for t in range(9):
            state["deter"] = torch.full((3, 16), float(t))
            picks = torch.eye(3)[[0, 1, 2]].roll(t, 0)
            state = {"count": np.zeros(3), **state}
            state = agent.act(state, np.array([t == 0, t == 0, t in (0, 5)]), "train")
            steps.append(state["option"].argmax(-1).tolist())
        # Picks at time t: (0 - t, 1 - t, 2 - t) mod 3, used where the option before has ended.
        assert [x[0] for x in steps] == [0] * 9
        assert [x[1] for x in steps] == [1, 0, 0, 0, 0, 0, 0, 0, 0]
        assert [x[2] for x in steps] == [2, 2, 2, 2, 2, 0, 0, 0, 0]  # anew at 5
    else:
        traj = agent.imagine(state)
        assert traj["option"].argmax(-1)[:, 1].tolist() == [1] * 9  # picked again in each state
        close(traj["beta"], [[1, 1, 1]] + [[0, 1, t % 3 == 0] for t in range(1, 9)])


def test_options_last_as_long_as_beta_says_and_an_episode_picks_anew():
    agent = make_variant(options.Agent, options=4)
    agent.worker.beta_net.forward = lambda features: torch.full((len(features), 4), 0.25).logit()
    agent.worker.pi_net.forward = lambda features: torch.zeros(len(features), 4)
    state, ended = {"deter": torch.zeros(4000, 16), "stoch": torch.zeros(4000, 16)}, []
    before = agent.choose(state, np.zeros(4000))["option"]
    close(before.mean(0), [0.25] * 4, atol=0.03)
    count = np.where(np.arange(4000) < 2000, 0, 7)
    chosen = agent.choose({**state, "option": before}, count)
    close(chosen["beta"], np.where(count == 0, 1, 0.25))
    close(chosen["pi"], np.full((4000, 4), 0.25))
    ended = (chosen["option"] != before).any(-1).float()
    assert float(ended[:2000].mean()) == pytest.approx(3 / 4, abs=0.04)
    assert float(ended[2000:].mean()) == pytest.approx(3 / 16, abs=0.04)  # of 1/4, 1 of 4 the same


def test_one_option_is_the_flat_agent():
    agent = make_variant(options.Agent, options=1, option_entropy=0.3, option_cost=0.1)
    traj = agent.imagine(starts_at(*torch.randn(2, 6, 16)))
    feat = agent.worker.feat(traj)
    flat = director.ActorCritic.returns(agent.worker, "extr", feat, traj)
    for found, expected in zip(agent.worker.returns("extr", feat, traj), flat, strict=True):
        close(found, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("space", [CONTINUOUS, DISCRETE])
def test_no_gradient_of_actions_leads_through_ends_and_picks(space):
    agent = make_variant(options.Agent, space)
    traj = agent.imagine(starts_at(*torch.randn(2, 6, 16)))
    assert not any(traj[key].requires_grad for key in ("option", "beta", "pi"))
    assert traj["reward_extr"].requires_grad == (space is CONTINUOUS)
    ret, _ = agent.worker.returns("extr", agent.worker.feat(traj), traj)
    assert ret.requires_grad == (space is CONTINUOUS)


def test_options_learn_to_end_where_another_is_worth_more():
    """Option w is worth 1 more in state w; with a high cost, options do not end."""
    found, everywhere = [], torch.ones(2, dtype=torch.bool)
    for cost in (0.1, 50):
        agent = make_variant(options.Agent, options=2, learning_rate=1e-2, discount=DISCOUNT,
                     option_cost=cost, option_entropy=0.01)
        worker, feats = agent.worker, torch.eye(32)[:2]
        worker.slow["extr"].forward = lambda feat: director.Symlog(
            (feat[..., :2] * feat[..., -2:]).sum(-1))
        traj, *_ = every_way(2)
        for _ in range(100):
            traj["pi"] = worker.pi(worker.feat(traj)[..., :-2], everywhere).probs.detach()
            worker.learn(traj, copy_slow=False)
        found.append((worker.pi(feats, everywhere).probs, worker.beta_net(feats).sigmoid()))
    (pick, end), (_, dear) = found
    assert (pick.diagonal() > 0.9).all() and (end.diagonal() < 0.3).all(), (pick, end)
    assert (end.flip(0).diagonal() > 0.7).all() and (dear < 0.3).all(), (end, dear)


# ---- Options by hand ------------------------------------------------------------------------


def column(obs):  # of the player, [N]
    return obs["state"][:, :6].argmax(-1)


right = options.HandWritten(  # goes right until the wall
    starts=lambda obs: column(obs) < 5, ends=lambda obs: column(obs) == 5,
    policy=lambda obs: torch.full_like(column(obs), 3))
left = options.HandWritten(
    starts=lambda obs: column(obs) > 0, ends=lambda obs: column(obs) == 0,
    policy=lambda obs: torch.full_like(column(obs), 4))
GRID = {"state": Grid.observation_space}


class Walls(options.Agent):
    hand_written = (right, left)


class Nowhere(options.Agent):
    hand_written = (options.HandWritten(
        starts=lambda obs: column(obs) < 0, ends=right.ends, policy=right.policy),)


class Steady(options.Agent):
    """The option by hand of continuous actions reads the image; it ends in a third of states."""

    hand_written = (options.HandWritten(
        starts=lambda obs: obs["image"].mean((1, 2, 3)) >= 0,
        ends=lambda obs: torch.full((len(obs["image"]),), 1 / 3),
        policy=lambda obs: tensor([[0.5, -1, 0]]).expand(len(obs["image"]), -1)),)


def in_columns(agent, columns):
    """States whose decoded observation has the player in these columns; deter tells which."""
    agent.world_model.decoder.forward = lambda feat: {"state": torch.eye(12)[feat[..., 0].long()]}
    return starts_at(torch.zeros(len(columns), 16) + tensor(columns)[:, None],
                     torch.zeros(len(columns), 16))


@pytest.mark.parametrize(("agent", "space", "obs"), [
    (Walls, DISCRETE, GRID), (Steady, CONTINUOUS, None)])
@pytest.mark.parametrize("learned", [0, 2])
def test_an_agent_learns_from_options_by_hand_alone_and_beside_learned_ones(
        learned, agent, space, obs):
    agent = make_variant(agent, space, obs, options=learned)
    batch = random_batch(np.random.default_rng(0), 2, 19, agent.discrete, agent.sizes["action"])
    if obs:
        batch["state"] = np.eye(12, dtype=np.float32)[np.zeros((2, 19), int)]
    for _ in range(3):
        metrics = check_optimizer_ownership(agent, batch)
    assert all(value.isfinite() for value in metrics.values()), metrics
    assert metrics["worker_extr_critic_grad_norm"] > 0
    for name in ("actor", "beta"):  # of learned options
        assert (metrics[f"worker_{name}_grad_norm"] > 0) == (learned > 0)


def test_a_run_with_options_by_hand_saves_and_resumes(tmp_path):
    flags = [*RUN, "--task=gym_envs.grid:Grid-v0", "--processes=no", f"--logdir={tmp_path}"]
    for steps in (116, 132):
        assert director.main([*flags, f"--steps={steps}"], Walls) == 0
    assert read_metrics(tmp_path)[-1]["train/grad_steps"] == 4
    assert director.main([f"--logdir={tmp_path}", "--eval=1"], Walls) == 0


@pytest.mark.slow
def test_an_option_by_hand_goes_along_the_wall_of_the_real_grid():
    """It reads what a world model decodes that has learned from random walks for some seconds."""
    agent = make_variant(Walls, DISCRETE, GRID, learning_rate=1e-2, options=1,
                         task="gym_envs.grid:Grid-v0", processes="no")
    replay = director.Replay(10_000)
    with director.vector_envs(agent.config, 8) as envs:
        driver = director.Driver(envs, 0)
        for _ in range(122):
            replay.add(driver.rows)
            driver.step(driver.random_action())
        agent.imagine = agent.player_trajectories = lambda _: {}  # only the world model learns
        for _ in range(250):
            agent.train_step(replay.sample(16, 16))
        agent.worker.pi_net.forward = lambda state: tensor([0, 50, 0]).expand(len(state), -1)
        driver, state, cells, acting = director.Driver(envs, 0), None, [], []
        for _ in range(8):
            cells.append(tensor(driver.rows["state"]).unflatten(-1, (2, 6)).argmax(-1))
            action, state = agent.policy(driver.rows, state)
            driver.step(action.numpy())
            acting.append(state["option"].argmax(-1))
    cells, acting = torch.stack(cells), torch.stack(acting)
    for t in range(6):
        assert (cells[t] == tensor([t, 0])).all(), (t, cells[t])
    assert (acting[:5] == 1).all() and (acting[5] != 1).all(), acting


def test_the_policy_over_options_is_zero_where_an_option_cannot_start():
    agent = make_variant(Walls, DISCRETE, GRID, options=1)
    logits = tensor([1, 2, 3]).requires_grad_()
    agent.worker.pi_net.forward = lambda state: logits.expand(len(state), -1)
    starts = in_columns(agent, [0, 3, 5])
    chosen = agent.choose(starts, np.zeros(3))
    expected = torch.zeros(3, 3)
    for row, can in enumerate(([0, 1], [0, 1, 2], [0, 2])):  # learned, right, left
        expected[row, can] = director.OneHot(tensor([1, 2, 3])[can], unimix=0.01).probs
    close(chosen["pi"], expected)
    pi = agent.worker.pi(torch.zeros(3, 32), expected > 0)
    close(pi.entropy(), torch.special.entr(expected).sum(-1))
    gradient, = torch.autograd.grad((pi.entropy() + pi.probs[:, 0]).sum(), logits)
    assert gradient.isfinite().all() and (gradient != 0).all()


def test_an_option_that_cannot_start_is_never_picked_but_can_go_on():
    agent = make_variant(Walls, DISCRETE, GRID, options=0)
    starts = in_columns(agent, [5] * 5000)
    assert (agent.choose(starts, np.zeros(5000))["option"] == tensor([0, 1])).all()
    agent.worker.pi_net.forward = lambda state: tensor([90, -90]).expand(len(state), -1)
    assert (agent.choose(starts, np.zeros(5000))["option"] == tensor([0, 1])).all()
    moving = {**in_columns(agent, [4, 0]), "option": torch.eye(2)[[0, 1]]}
    chosen = agent.choose(moving, np.ones(2))
    close(chosen["beta"], [0, 1])  # right is on its way, left has come to the wall
    assert chosen["option"].tolist() == [[1, 0], [1, 0]]

    class FromTheLeft(options.Agent):
        hand_written = (dataclasses.replace(right, starts=lambda obs: column(obs) == 0), left)

    agent = make_variant(FromTheLeft, DISCRETE, GRID, options=0)
    chosen = agent.choose({**in_columns(agent, [3]), "option": torch.eye(2)[[0]]}, np.ones(1))
    close(chosen["pi"], [[0, 1]])
    assert chosen["option"].tolist() == [[1, 0]]


def test_the_same_functions_act_in_imagination_and_in_the_environment():
    agent = make_variant(Walls, DISCRETE, GRID, options=0, horizon=8)
    agent.world_model.rssm.img_step = lambda deter, stoch, action: (
        deter + action[:, 3:4] - action[:, 4:5], stoch)
    traj = agent.imagine(in_columns(agent, [0, 2]))
    # Right to the wall, then left; the other wall is out of reach.
    assert traj["deter"][:, 0, 0].tolist() == [0, 1, 2, 3, 4, 5, 4, 3, 2]
    assert traj["option"][:, 0].argmax(-1).tolist() == [0] * 5 + [1] * 4
    close(traj["beta"][:, 0], [1, 0, 0, 0, 0, 1, 0, 0, 0])
    state = {"count": np.zeros(2), **in_columns(agent, [0, 5])}
    for mode in ("train", "eval"):
        state = agent.act(state, np.array([True, True]), mode)
        assert state["action"].argmax(-1).tolist() == [3, 4]


def test_options_by_hand_read_states_in_the_units_of_the_environment():
    agent = make_variant(Walls, DISCRETE, GRID, standardize="yes")
    data = torch.randn(1000, 12, generator=torch.manual_seed(0)) * 7 + 3
    agent.world_model.encoder.preprocess("state", data, update=True)
    feat = torch.randn(5, 32)
    decoded = agent.world_model.decoder(feat)["state"].detach().double()
    std, mean = data.double().std(0, correction=0), data.double().mean(0)
    close(agent.decode(feat)["state"], decoded * std + mean, rtol=1e-4)


def test_steps_by_hand_do_not_teach_the_actor_or_its_entropy():
    found = []
    for change in (0, 100):  # of rewards in trajectories in which the option by hand acts
        agent = make_variant(Walls, DISCRETE, GRID, options=1)
        worker, losses = agent.worker, []
        traj = agent.imagine(in_columns(agent, [1, 2, 3, 4]))
        traj["option"][:] = torch.eye(3)[[0, 0, 1, 2]]
        dist = worker.dist(worker.feat(traj))
        entropy = director.normalized_entropy(dist)  # by hand: the mean of the others
        close(entropy[:, 2:], entropy[:, :2].mean().expand(17, 2))
        assert (dist.log_prob(traj["action"])[:, 2:] == 0).all()
        worker.optimizers["actor"].minimize = lambda loss, losses=losses: (
            losses.append(loss) or torch.zeros(()))
        score = torch.arange(64.0).view(16, 4) % 7
        score[:, 2:] += change
        worker.train_actor(traj, torch.ones(16, 4), score)
        found.append(torch.cat([x.flatten() for x in torch.autograd.grad(
            losses[0], list(worker.actor.parameters()))]))
        assert float(worker.ent_adapt.scale) == pytest.approx(1 / 1.1)  # learned ones: above 0.5
    close(found[0], found[1])
    assert found[0].norm() > 0
    traj["option"][:] = torch.eye(3)[1]  # by hand alone: what the adaptive scale aims at
    close(director.normalized_entropy(worker.dist(worker.feat(traj))), torch.full((17, 4), 0.5))


def test_a_given_action_of_continuous_ones_has_no_gradient():
    agent = make_variant(Steady, CONTINUOUS, options=1)
    starts = starts_at(*torch.randn(2, 6, 16))
    starts["option"] = torch.eye(2)[[0, 0, 0, 1, 1, 1]]
    traj = agent.imagine(starts)
    close(traj["action"][:, 3:], tensor([0.5, -1, 0]).expand(17, 3, 3))
    gradient = torch.autograd.grad(traj["action"].sum(), list(agent.worker.actor.parameters()),
                                   retain_graph=True)
    own = torch.autograd.grad(traj["action"][:, :3].sum(), list(agent.worker.actor.parameters()))
    for both, learned in zip(gradient, own, strict=True):
        close(both, learned)


def test_without_an_option_that_can_start_there_is_one_clear_error(capsys, tmp_path):
    flags = [*RUN, "--task=gym_envs.grid:Grid-v0", "--processes=no", "--options=0"]
    for agent, file, words in (
            (Nowhere, "test_options-Nowhere.py", "no option by hand can start in a state"),
            (options.Agent, "options.py", "--options 0: there are no options by hand either")):
        assert director.main([*flags, f"--logdir={tmp_path}/{words[:3]}"], agent) == 2
        error = capsys.readouterr().err
        assert error.splitlines()[-1].startswith(f"{file}: {words}")
    assert not (tmp_path / "--o").exists()  # refused before there is a folder
    agent = make_variant(Nowhere, DISCRETE, GRID, options=1)  # a learned one starts everywhere
    chosen = agent.choose(in_columns(agent, [0, 5]), np.zeros(2))
    close(chosen["pi"], [[1, 0], [1, 0]])


def test_what_an_option_is_worth_where_it_cannot_start_does_not_matter():
    found = []
    for worth in (0, 100):
        agent, losses = make_variant(Walls, DISCRETE, GRID, options=1), []
        agent.world_model.rssm.img_step = lambda deter, stoch, action: (deter, stoch)
        traj = agent.imagine(in_columns(agent, [0, 5]))
        assert (traj["pi"] == 0).any(-1).all()

        def values(state, pi, worth=worth):
            q = pi + worth * (pi == 0)
            return q, (pi * q).sum(-1)

        agent.worker.values = values
        for name in ("beta", "pi"):
            agent.worker.optimizers[name].minimize = lambda loss, losses=losses: (
                losses.append(loss.detach()) or torch.zeros(()))
        agent.worker.learn(traj, copy_slow=False)
        found.append(torch.stack(losses))
    close(*found)


def test_a_pick_of_probability_0_becomes_the_likeliest_option(monkeypatch):
    agent = make_variant(Walls, DISCRETE, GRID, options=0)
    monkeypatch.setattr(director.OneHot, "rsample", lambda dist: torch.eye(2)[[0]])
    assert agent.choose(in_columns(agent, [5]), np.zeros(1))["option"].tolist() == [[0, 1]]


def test_the_metric_of_option_lengths_leaves_out_the_pick_in_the_first_state():
    agent = make_variant(options.Agent)
    traj = agent.imagine(starts_at(*torch.randn(2, 6, 16)))
    metrics = agent.worker.learn(traj, copy_slow=False)
    close(metrics["option_length"], 1 / traj["beta"][1:].mean())


def test_the_entropy_of_steps_by_hand_has_no_gradient():
    agent = make_variant(Walls, DISCRETE, GRID, options=1)
    traj = agent.imagine(in_columns(agent, [1, 2, 3, 4]))
    traj["option"][:] = torch.eye(3)[[0, 0, 1, 2]]
    entropy = agent.worker.dist(agent.worker.feat(traj)).entropy()
    weight = agent.worker.actor.out.weight
    by_hand, = torch.autograd.grad(entropy[:, 2:].sum(), [weight], retain_graph=True)
    learned, = torch.autograd.grad(entropy[:, :2].sum(), [weight])
    assert not by_hand.any() and learned.any()
