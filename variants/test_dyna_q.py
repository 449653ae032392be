"""What dyna q does, against numbers worked out by hand."""

import math

import numpy as np
import pytest
import torch

import director
from conftest import (
    DISCRETE,
    close,
    make_variant,
    random_batch,
    starts_at,
    tensor,
)
from variants import (
    dyna_q,
)


def symlog(x: float) -> float:
    return math.copysign(math.log1p(abs(x)), x)


def test_dyna_q_learns_the_one_step_target_also_at_ends_and_time_limits():
    agent, losses = make_variant(dyna_q.Agent, batch_length=5), []
    values = tensor([[0, 1], [2, -1], [0.5, 0.2], [1, 3], [4, 5], [0.1, 2]])  # of states 0..5
    agent.worker.q.forward = lambda feat: values[feat[..., 0].long()]
    agent.worker.slow.forward = lambda feat: 2 * values[feat[..., 0].long()]
    agent.optimizers["q"].minimize = lambda loss: losses.append(loss) or torch.zeros(())
    agent.grad_steps = 1
    deter = torch.arange(6.0)[None, :, None].expand(1, 6, 16)
    action = tensor([[0, 0], [0, 1], [1, 0], [0, 0], [0, 1], [1, 0]])[None]  # led to the state
    states = {"deter": deter, "stoch": deter, "action": action,
              "reward": tensor([[9, 1, -2, 9, 5, 7]]),
              "is_first": torch.tensor([[1, 0, 0, 1, 0, 0]]).bool(),
              "is_terminal": torch.tensor([[0, 0, 0, 0, 0, 1]]).bool(),
              "is_last": torch.tensor([[0, 0, 1, 0, 0, 1]]).bool()}  # at 2 a time limit
    agent.train_goals(states)
    expected = [
        (1 - symlog(1 + 0.99 * math.expm1(4))) ** 2,  # 0 to 1 by the second action; 2 max(2, -1)
        (2 - symlog(-2 + 0.99 * math.expm1(1))) ** 2,  # 1 to 2: a time limit, so it goes on
        (3 - symlog(5 + 0.99 * math.expm1(10))) ** 2,  # 3 to 4; from 2 to 3 nothing leads
        (4 - symlog(7)) ** 2]  # 4 to 5, the end
    close(losses[0], sum(expected) / 5)


def expansion(gen=None, **flags):
    """An agent whose world model and Q-networks are tables of 4 states, and these tables.

    The first number of deter is the state. Values are in symlog space, [4, 5]; rewards in symlog
    space and logits of the continuation, [4], are those of the state that a step leads to.
    """
    agent = make_variant(dyna_q.Agent, **flags)
    model, network = agent.world_model, agent.worker
    tables = {"q": torch.randn(4, 5, generator=gen), "slow": torch.randn(4, 5, generator=gen),
              "reward": torch.randn(4, generator=gen), "cont": torch.randn(4, generator=gen),
              "next": torch.randint(4, (4, 5), generator=gen)}

    def read(key):
        return lambda feat: tables[key][feat[..., 0].long()]

    def img_step(deter, stoch, action):
        state = tables["next"][deter[..., 0].long(), action.argmax(-1)]
        return state[..., None].float().expand(deter.shape), stoch

    network.q.forward, network.slow.forward = read("q"), read("slow")
    model.reward_head.forward = lambda feat: director.Symlog(read("reward")(feat))
    model.cont_head.forward = read("cont")
    model.rssm.img_step = img_step
    return agent, tables


def transitions(agent, before, action, after, reward, cont) -> dict[str, torch.Tensor]:
    def feat(state):
        return torch.as_tensor(state).float()[..., None].expand(*np.shape(state), 32)

    return {"before": feat(before), "action": torch.eye(5)[torch.as_tensor(action)],
            "after": feat(after), "reward": tensor(reward), "cont": tensor(cont),
            "weight": torch.ones(np.shape(before))}


def test_value_expansion_adds_imagined_rewards_of_greedy_actions_to_the_target():
    agent, tables = expansion(expand=3, discount=0.9)
    tables["slow"][1] = tensor([0, 4, 1, 2, 3])  # in state 1, action 1 is best; it leads to 2
    tables["slow"][2] = tensor([2, 0, 0, 1, 0])  # in state 2, action 0; it leads to 3
    tables["slow"][3] = tensor([1, 0, 3, 2, 1])
    tables["q"][0] = tensor([9, 9, 5, 9, 9])
    tables["next"][1, 1], tables["next"][2, 0] = 2, 3
    tables["reward"][2:] = tensor([symlog(3), symlog(-1)])
    tables["cont"][2:] = tensor([0, math.log(4)])  # continues with probabilities 0.5 and 0.8
    losses = []
    agent.optimizers["q"].minimize = lambda loss: losses.append(loss) or torch.zeros(())
    agent.grad_steps = 1
    agent.learn(0, transitions(agent, [0], [2], [1], [7.0], [1.0]))  # from 0 by action 2 to 1
    target = 7 + 0.9 * (3 + 0.9 * 0.5 * (-1 + 0.9 * 0.8 * math.expm1(3)))
    close(losses[0], (5 - symlog(target)) ** 2)
    agent.learn(0, transitions(agent, [0], [2], [1], [7.0], [0.0]))  # the same, but it ends there
    close(losses[1], (5 - symlog(7)) ** 2)


@pytest.mark.parametrize("expand", [1, 2, 5])
def test_value_expansion_is_the_recursion_over_imagined_steps(expand):
    agent, tables = expansion(torch.manual_seed(expand), expand=expand)
    slow = tables["slow"].double()

    def brute_force(state: int, reward: float, cont: float, steps: int) -> float:
        """The target of a step that leads to `state`."""
        best = int(slow[state].argmax())
        if steps == 1:
            value = float(slow[state, best])
            return reward + 0.99 * cont * math.copysign(math.expm1(abs(value)), value)
        after = int(tables["next"][state, best])
        predicted = float(tables["reward"][after])
        predicted = math.copysign(math.expm1(abs(predicted)), predicted)
        survives = 1 / (1 + math.exp(-float(tables["cont"][after])))
        return reward + 0.99 * cont * brute_force(after, predicted, survives, steps - 1)

    rng = np.random.default_rng(expand)
    after, reward = rng.integers(4, size=(3, 7)), rng.normal(size=(3, 7))
    cont = rng.choice([0, 0.3, 1], (3, 7))
    steps = transitions(agent, 0 * after, 0 * after, after, reward, cont)
    expected = [[brute_force(*step, expand) for step in zip(*row, strict=True)]
                for row in zip(after, reward, cont, strict=True)]
    close(agent.target(steps), expected, rtol=1e-4)
    assert not agent.target(steps).requires_grad


def test_value_expansion_is_used_for_replayed_and_for_imagined_transitions():
    batch = random_batch(np.random.default_rng(0), 2, 9, True, 5)
    for expand in (1, 4):
        agent, calls = make_variant(dyna_q.Agent, planning=2, expand=expand), []
        step = agent.model_step
        agent.model_step = lambda *args, step=step, calls=calls: (
            calls.append(len(args[0])) or step(*args))
        agent.train_step(batch)
        # 2 chunks are replayed; 2 rounds of planning start together from their 18 states.
        assert calls == [2] * (expand - 1) + [2] + [18] * 2 * (expand - 1)


def test_dyna_q_plans_one_random_step_from_each_replayed_state_but_ends():
    agent, seen = make_variant(dyna_q.Agent, planning=3), []
    deter, stoch = torch.randn(2, 400, 16)
    end = torch.arange(400) % 4 == 0
    agent.world_model.reward_head.forward = lambda feat: director.Symlog(feat[..., 0])
    agent.world_model.cont_head.forward = lambda feat: feat[..., 1]
    traj = agent.imagine({**starts_at(deter, stoch), "is_terminal": end})
    assert {len(x) for x in traj.values()} == {3}
    share = traj["action"].flatten(0, 1).mean(0).numpy()
    assert share == pytest.approx(0.2 * np.ones(5), abs=0.06)
    assert not torch.equal(traj["action"][0], traj["action"][1])
    for i in range(3):
        close(traj["before"][i], torch.cat([deter, stoch], -1))
        after = agent.world_model.rssm.recur(deter, stoch, traj["action"][i])
        close(traj["after"][i, :, :16], after)
    close(traj["reward"], director.symexp(traj["after"][..., 0]))
    close(traj["cont"], traj["after"][..., 1].sigmoid())
    assert torch.equal(traj["weight"], (~end).float().expand(3, -1))
    agent.learn = lambda index, steps: seen.append((index, steps)) or {}
    agent.train_imagined(traj)
    assert [index for index, _ in seen] == [1, 2, 3]
    for i, (_, steps) in enumerate(seen):
        assert all(torch.equal(steps[key], traj[key][i]) for key in traj)


def test_dyna_q_updates_once_from_replay_then_plans_and_copies_by_the_number_of_updates():
    batch = random_batch(np.random.default_rng(0), 2, 9, True, 5)
    for planning in (0, 2):
        agent, updates = make_variant(dyna_q.Agent, planning=planning, slow_every=4), []
        network, minimize = agent.worker, agent.optimizers["q"].minimize

        def check(loss, network=network, minimize=minimize, updates=updates):
            if updates:  # whether it was copied after the last update
                updates[-1] = torch.equal(network.q.out.weight, network.slow.out.weight)
            updates.append(None)
            assert loss.requires_grad
            return minimize(loss)

        agent.optimizers["q"].minimize = check
        for _ in range(4):
            metrics = agent.train_step(batch)
        assert len(updates) == 4 * (1 + planning)
        assert [i for i, copied in enumerate(updates) if copied] == list(range(0, len(updates), 4))
        assert ("imagined_loss" in metrics) == bool(planning)


def test_dyna_q_acts_greedily_but_for_a_share_of_epsilon():
    agent = make_variant(dyna_q.Agent, epsilon=0.3)
    agent.worker.q.forward = lambda feat: feat[..., :5]
    feat = tensor([[0, 3, 1, 2, 2.9]]).expand(20_000, -1)
    dist = agent.worker.dist(feat)
    close(dist.probs[0], [0.06, 0.76, 0.06, 0.06, 0.06])
    assert dist.rsample().mean(0).numpy() == pytest.approx([0.06, 0.76, 0.06, 0.06, 0.06], abs=0.01)
    assert dist.mode[:, 1].all()
    agent.worker.epsilon = 0.0
    assert agent.worker.dist(feat).rsample()[:, 1].all()


def test_planning_finds_the_way_that_replay_never_took():
    """The model rewards an action that was never tried."""
    found = []
    for planning in (0, 5):
        agent = make_variant(dyna_q.Agent, planning=planning, learning_rate=3e-3)
        model = agent.world_model
        model.rssm.img_step = lambda deter, stoch, action: (
            torch.cat([action, deter[..., 5:]], -1), stoch)
        # The fourth action is rewarded.
        model.reward_head.forward = lambda feat: director.Symlog(2 * feat[..., 3])
        model.cont_head.forward = lambda feat: -9 + 0 * feat[..., 0]  # one step, and it ends
        gen = torch.manual_seed(0)
        for _ in range(60):
            agent.grad_steps += 1
            deter, stoch = torch.randn(2, 4, 9, 16, generator=gen)
            tried = torch.eye(5)[torch.randint(0, 3, (4, 9), generator=gen)]
            agent.train_goals({
                "deter": deter, "stoch": stoch, "action": tried, "reward": torch.zeros(4, 9),
                "is_first": torch.zeros(4, 9).bool(), "is_terminal": torch.ones(4, 9).bool()})
            traj = agent.imagine({"deter": deter.flatten(0, 1), "stoch": stoch.flatten(0, 1),
                                  "is_terminal": torch.zeros(36).bool()})
            agent.train_imagined(traj)
        feat = agent.worker.feat({"deter": deter, "stoch": stoch})
        found.append(float(agent.worker.dist(feat).mode[..., 3].mean()))
    assert found[0] < 0.9 < found[1], found


def test_dyna_q_wants_discrete_actions_and_no_goals(capsys, tmp_path):
    run = ["--task=gym_Pendulum-v1", f"--logdir={tmp_path}/run"]
    assert director.main(run, dyna_q.Agent) == 2
    error = capsys.readouterr().err
    assert "dyna_q needs discrete actions" in error and error.count("\n") == 1
    assert not (tmp_path / "run").exists()
    folder = director.run_folder(dyna_q.Config(task="gym_Corridor-v0", size="xs"), dyna_q.Agent)
    assert folder.parts[-3:] == ("runs", "gym_Corridor-v0", "dyna_q-dreamer-xs-0")
    assert make_variant(dyna_q.Agent, DISCRETE).players == {}
