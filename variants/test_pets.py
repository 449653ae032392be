"""Planning over an ensemble, against numbers worked out by hand."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import director
from conftest import (
    RUN,
    close,
    make_variant,
    prediction,
    tensor,
)
from variants import (
    disagreement,
    pets,
    planner,
)


def predict(agent, means):
    """Each member predicts its own mean [size], whatever the state."""
    for member, mean in zip(agent.ensemble.members, means, strict=True):
        member.forward = lambda x, mean=mean: torch.stack([mean, 0 * mean]).expand(len(x), -1, -1)


def classes(*groups):
    """A stochastic state with these classes in its four groups of four, [16]."""
    return F.one_hot(torch.tensor(groups), 4).float().flatten()


@pytest.mark.parametrize("cost", [0.0, 0.5])
def test_a_score_is_the_mean_return_of_the_members_minus_the_cost_of_their_deviation(cost):
    agent = make_variant(pets.Agent, agent="dreamer", members=2, discount=0.5,
                         disagreement_cost=cost)
    predict(agent, [classes(0, 0, 0, 0), classes(1, 0, 0, 0)])
    model = agent.world_model
    # Rewards 3 and 5 in the first group's classes 0 and 1, and the number of the action besides.
    model.rssm.recur = lambda deter, stoch, action: F.pad(action[:, :1], (0, 15))
    model.reward_head.forward = lambda feat: prediction(
        3 * feat[:, 16] + 5 * feat[:, 17] + feat[:, 0])
    model.cont_head.forward = lambda feat: torch.full((len(feat),), 50.0)
    agent.worker.critics["extr"].forward = lambda feat: prediction(8 * feat[:, 17])
    state = {"deter": torch.zeros(3, 16), "stoch": torch.zeros(3, 16)}
    moves = torch.arange(24.0).view(2, 3, 4, 1).expand(2, 3, 4, 5)  # [L, E, C, A]
    score = agent.score(state, moves)
    # Returns without the actions: 3 + 3 / 2 = 4.5, and 5 + 5 / 2 + 8 / 4 = 9.5.
    first = moves[0, :, :, 0] + 0.5 * moves[1, :, :, 0]
    close(score, first + 7 - cost * 5 / np.sqrt(2), rtol=1e-4)


@pytest.mark.parametrize("target", ["stoch", "embed", "deter"])
def test_each_member_imagines_a_trajectory_of_its_own(target, modes):
    agent = make_variant(pets.Agent, members=2, disagreement_target=target)
    rssm, gen = agent.world_model.rssm, torch.manual_seed(0)
    start = [torch.randn(6, 16, generator=gen) for _ in range(2)]
    action = torch.eye(5)[[0, 1, 2, 3, 4, 0]]
    for member in agent.ensemble.members:
        member.out.bias.data += 1  # so that means are positive, as after training
    deter, stoch = agent.imagine_step(*start, action)
    for row in range(6):
        old_deter, old_stoch, act = (x[row] for x in (*start, action))
        member = agent.ensemble.members[row // 3]
        mean = member(torch.cat([old_deter, old_stoch, act]))[0]
        new = mean if target == "deter" else rssm.recur(old_deter, old_stoch, act)
        close(deter[row], new, atol=1e-6)
        if target == "stoch":
            logits = mean.view(4, 4)
        elif target == "embed":
            logits = rssm.post_net(torch.cat([new, mean])).view(4, 4)
        else:
            logits = rssm.prior(new)
        assert stoch[row].view(4, 4).argmax(-1).tolist() == logits.argmax(-1).tolist()
        close(stoch[row].view(4, 4).sum(-1), np.ones(4))


def test_a_member_samples_classes_as_often_as_it_expects_them():
    agent = make_variant(pets.Agent, members=2)
    mean = tensor([[0.6, 0.3, 0.1, -0.2], [0, 0, 0.5, 0], [2, 2, 0, 0], [0.25] * 4])
    predict(agent, [mean.flatten(), mean.flatten()])
    zeros = torch.zeros(8000, 16)
    _, stoch = agent.imagine_step(zeros, zeros, torch.zeros(8000, 5))
    expected = [[0.6, 0.3, 0.1, 0], [0, 0, 1, 0], [0.5, 0.5, 0, 0], [0.25] * 4]
    close(stoch.mean(0).view(4, 4), expected, atol=0.02)


@pytest.mark.parametrize("target", ["stoch", "embed", "deter"])
def test_the_score_of_equal_members_is_that_of_one(target, modes):
    state = dict(zip(("deter", "stoch"), torch.randn(2, 3, 16, generator=torch.manual_seed(0)),
                     strict=True))
    moves = torch.eye(5)[torch.randint(5, (4, 3, 7), generator=torch.manual_seed(1))]
    agent = make_variant(pets.Agent, members=3, disagreement_target=target, disagreement_cost=9)
    different = agent.score(state, moves)
    for member in agent.ensemble.members[1:]:
        member.load_state_dict(agent.ensemble.members[0].state_dict())
    equal = agent.score(state, moves)
    agent.ensemble.members, agent.config.members = agent.ensemble.members[:1], 1
    alone = planner.Agent.score(agent, state, moves)  # without mean and cost
    close(equal, alone, rtol=1e-4, atol=1e-6)
    assert not torch.allclose(different, alone, rtol=1e-3)


def test_a_cost_leads_away_from_what_the_members_disagree_on(modes):
    """Action 0 is worth 4 to every member, action 1 is worth 0, 0 and 15."""
    found = []
    for cost in (0, 1):
        agent = make_variant(pets.Agent, agent="dreamer", members=3, disagreement_cost=cost,
                             plan_length=1, candidates=40)
        for number, member in enumerate(agent.ensemble.members):
            def forward(x, number=number):
                stoch = torch.stack([classes(0, 0, 0, 0), classes(1 + (number == 2), 0, 0, 0)])
                mean = stoch[x[:, 33].long()]  # the input ends with the five actions
                return torch.stack([mean, mean], 1)

            member.forward = forward
        agent.world_model.reward_head.forward = lambda feat: prediction(
            4 * feat[:, 16] + 15 * feat[:, 18])
        agent.worker.critics["extr"].forward = lambda feat: prediction(torch.zeros(len(feat)))
        agent.world_model.cont_head.forward = lambda feat: torch.zeros(len(feat))
        candidates = torch.eye(5)[[0, 1]].view(1, 1, 2, 5)
        state = {"deter": torch.zeros(1, 16), "stoch": torch.zeros(1, 16)}
        found.append(agent.score(state, candidates).argmax(-1).tolist())
    assert found == [[1], [0]]


@pytest.mark.slow
def test_it_plays_what_disagreement_trained_and_leaves_it_as_it_is(tmp_path, capsys):
    run = [*RUN, "--task=gym_envs.grid:Corridor-v0", "--processes=no", "--members=3",
           "--disagreement_target=deter", "--steps=150", f"--logdir={tmp_path}"]
    assert director.main(run, disagreement.Agent) == 0
    before = (tmp_path / "checkpoint.pt").read_bytes()
    flags = ["--candidates=20", "--rounds=1", "--eval=1", f"--logdir={tmp_path}"]
    assert director.main([*flags, "--disagreement_cost=1"], pets.Agent) == 0
    assert (tmp_path / "checkpoint.pt").read_bytes() == before
    assert director.main([*flags, "--members=4"], pets.Agent) == 2
    assert "holds a run with --members 3" in capsys.readouterr().err
    assert director.main(flags, planner.Agent) == 2


def test_stochastic_states_are_samples_also_if_members_predict_deter():
    agent = make_variant(pets.Agent, members=2, disagreement_target="deter")
    deter, stoch = agent.imagine_step(
        torch.zeros(8000, 16), torch.zeros(8000, 16), torch.zeros(8000, 5))
    for part in (slice(0, 4000), slice(4000, 8000)):  # of both members
        dist = director.OneHot(agent.world_model.rssm.prior(deter[part][0]))
        close(stoch[part].mean(0).view(4, 4), dist.probs, rtol=0, atol=0.04)
