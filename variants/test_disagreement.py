"""What disagreement does, against numbers worked out by hand."""

import itertools
import math

import torch

import director
from conftest import (
    CONTINUOUS,
    close,
    make_variant,
    replayed,
    starts_at,
)
from variants import (
    disagreement,
)


def test_disagreement_is_the_variance_of_means_and_grows_where_nothing_was_seen():
    agent = make_variant(disagreement.Agent, members=3)
    ensemble, x = agent.ensemble, torch.randn(7, 37)
    means = torch.stack([member(x)[:, 0] for member in ensemble.members]).detach()
    close(ensemble.disagreement(x), means.numpy().var(0, ddof=1).mean(-1))
    sides = [torch.rand(256, 37) * side for side in (1, -1)]  # the first one is seen
    target = sides[0][:, :16].sin()
    for _ in range(200):
        mean, std = ensemble(sides[0])
        loss = (0.5 * ((mean - target) / std) ** 2 + std.log()).mean()
        agent.optimizers["ensemble"].minimize(loss)
    seen, unseen = (ensemble.disagreement(x).mean() for x in sides)
    assert unseen > 2 * seen


def test_disagreement_in_bfloat16_is_that_of_the_float32_means_that_are_learned():
    agent = make_variant(disagreement.Agent, precision="bfloat16")
    ensemble, x = agent.ensemble, torch.randn(7, 37)
    with torch.no_grad(), director.autocast(agent.config):
        means, _ = ensemble(x)
        found = ensemble.disagreement(x)
    assert means.dtype == found.dtype == torch.float32
    close(found, means.var(0).mean(-1), rtol=1e-4)


def test_the_ensemble_learns_the_next_state_from_state_and_action_by_likelihood():
    agent = make_variant(disagreement.Agent)
    states = {**replayed(agent), "stoch": torch.randn(3, 12, 16), "action": torch.randn(3, 12, 5),
              "is_terminal": torch.zeros(3, 12)}
    loss = agent.train_goals(states)["ensemble_loss"]
    agent = make_variant(disagreement.Agent)
    expected = 0.0
    for member in agent.ensemble.members:
        for b, t in itertools.product(range(3), range(11)):
            if states["is_first"][b, t + 1]:
                continue
            x = [states["deter"][b, t], states["stoch"][b, t], states["action"][b, t + 1]]
            mean, std = member(torch.cat(x))
            dist = torch.distributions.Normal(mean, std.exp().log1p() + 0.1)
            log_prob = dist.log_prob(states["stoch"][b, t + 1]) + 0.5 * math.log(2 * math.pi)
            expected -= log_prob.mean() / 33
    close(loss, expected, rtol=1e-4)


def test_disagreement_is_about_the_action_that_leads_to_the_state():
    agent = make_variant(disagreement.Agent)
    agent.ensemble.disagreement = lambda x: x[..., 0] + 10 * x[..., 16] + 100 * x[..., 32]
    traj = agent.imagine(starts_at(*torch.randn(2, 3, 16)))
    expected = traj["deter"][:, :, 0] + 10 * traj["stoch"][:, :, 0] + 100 * traj["action"][:, :, 0]
    close(traj["reward_expl"], expected[:-1])


def test_only_the_flat_agent_is_led_by_the_gradient_of_disagreement():
    for flat in (True, False):
        kind = "dreamer" if flat else "director"
        agent = make_variant(disagreement.Agent, CONTINUOUS, agent=kind)
        traj = agent.imagine(starts_at(*torch.randn(2, 4, 16)))
        assert traj["reward_expl"].requires_grad == flat
        assert dict(agent.worker.rewards) == ({"extr": 1.0, "expl": 0.1} if flat else {"goal": 1.0})


def test_the_flat_agent_has_its_own_weight_of_disagreement_and_the_gradient_of_all_inputs():
    agent = make_variant(disagreement.Agent, CONTINUOUS, agent="dreamer", worker_expl=0.7)
    assert dict(agent.worker.rewards) == {"extr": 1.0, "expl": 0.7}
    traj = {key: torch.randn(4, 3, size, requires_grad=True)
            for key, size in (("deter", 16), ("stoch", 16), ("action", 3))}
    for gradient in torch.autograd.grad(agent.reward_expl(traj).sum(), list(traj.values())):
        assert gradient[:-1].abs().sum() > 0
