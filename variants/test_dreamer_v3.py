"""The techniques of DreamerV3.

Numbers that are called official are outputs of the official program for these inputs
(danijar/dreamerv3 at e3f0224, float32).
"""

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn

import director
from conftest import CONTINUOUS, DISCRETE, close, make_variant, short_name, starts_at, tensor
from variants import dreamer_v3

TECHNIQUES = ("latents", "two_hot", "percentiles", "critic_ema", "rms_silu", "laprop")
NONE = dict.fromkeys(TECHNIQUES, "no")


def test_two_hot_losses_and_means_are_the_official_ones():
    target = [0, 0.05, -0.3, 1, 7.5, -123.4, 1e4, -6e8, 1e9, 333.25]
    logits = 0.5 * np.sin(7 * np.arange(10)[:, None] + np.arange(255))
    logits[range(10), [127, 127, 125, 131, 140, 96, 185, 0, 254, 164]] += 30
    dist = dreamer_v3.TwoHot(tensor(logits))
    close(dist.bins[[0, 1, 100, 126, 127, 128, 129, 200, 254]], [
        -485165200.0, -414473600.0, -69.24358, -0.1705576, 0.0, 0.1705576, 0.3702051, 98326.82,
        485165200.0], rtol=1e-5)
    close(dist.loss(tensor(target)), [
        0.0, 8.911588, 10.49939, 11.50448, 16.99583, 11.50912, 13.94074, 0.0, 0.0, 3.087795],
        rtol=1e-4)
    assert dist.loss(tensor([math.nan] * 10)).isnan().all()
    close(dist.mean, [
        3.741804e-06, -7.678866e-06, -0.3702202, 0.8774511, 6.746513, -130.8797, 9262.699,
        -485165200.0, 485165200.0, 338.2615], atol=1e-4)


def test_a_two_hot_head_predicts_0_at_first_and_learns_the_mean_of_its_targets():
    config = dreamer_v3.Config(size="xs", device="cpu", units=16, layers=1)
    torch.manual_seed(0)
    head = dreamer_v3.TwoHotHead(4, config)
    assert head(torch.randn(100, 4)).mean.eq(0).all()
    optimizer = torch.optim.Adam(head.parameters(), 3e-2)
    feat = torch.ones(2, 4)
    for _ in range(200):
        loss = head(feat).loss(tensor([-1, 4])).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    close(head(feat).mean, [1.5, 1.5], rtol=0.05)


def test_the_kl_with_free_bits_is_the_official_one_and_has_no_gradient_below_a_nat():
    size = np.array([0.1, 1, 4])[:, None, None]
    inputs = [tensor(np.sin(np.arange(24)).reshape(3, 2, 4) * size).requires_grad_(),
              tensor(np.cos(3 * np.arange(24)).reshape(3, 2, 4) * size).requires_grad_()]
    mixed = [director.OneHot(x, unimix=0.01).logits for x in inputs]
    kl = dreamer_v3.free_bits_kl(*mixed)
    close(kl, [1.1, 1.1, 4.052001])
    post, prior = torch.autograd.grad(kl.sum(), inputs)
    assert post[:2].eq(0).all() and prior[:2].eq(0).all()
    close(post[2].flatten(), [0.04101544, -0.003909236, 0.002974824, -0.04008103, 0.1322442,
                              -0.1302129, -0.001630875, -0.000400402], atol=1e-6)
    close(prior[2].flatten(), [-0.04964689, 0.2943078, -0.004464784, -0.2401962, -0.04347057,
                               -0.186865, -0.0009925168, 0.2313281], atol=1e-6)


def test_an_agent_uses_each_technique_or_directors_own():
    rng = np.random.default_rng(0)
    for use in (True, False):
        agent = make_variant(dreamer_v3.Agent, **({} if use else NONE))
        heads = [agent.world_model.reward_head, *agent.manager.critics.values(),
                 *agent.worker.critics.values(), *agent.worker.slow.values()]
        kind = dreamer_v3.TwoHotHead if use else director.ScalarHead
        assert {type(head) for head in heads} == {kind}
        kind = dreamer_v3.LaProp if use else director.Optimizer
        assert {type(x) for x in agent.optimizers.values()} == {kind}
        states = {key: tensor(5 * rng.normal(size=(2, 6, 4, 4))) for key in ("post", "prior")}
        loss, metrics = agent.world_model.kl_loss(states)
        kl = director.balanced_kl(states["post"], states["prior"], 0.8)
        close(metrics["kl"], kl.mean())
        close(loss, 1.1 * kl if use else kl)  # Director's scale is 1 at first
        norms = [x for x in agent.modules() if isinstance(x, dreamer_v3.RMSNorm)]
        assert bool(norms) == use and all(norm.eps == 1e-4 for norm in norms)


def test_latents_are_mixed_with_the_uniform_distribution():
    rssm = make_variant(dreamer_v3.Agent, classes=4).world_model.rssm
    for net in (rssm.prior_net, rssm.post_net):
        net[-1].weight.data.mul_(1000)  # so that without mixing, probabilities are 0 or 1
    deter, embed = torch.randn(50, 16), torch.randn(50, rssm.post_net[0].in_features - 16)
    for logits in (rssm.prior(deter), rssm.posterior(deter, embed)[1]):
        probs = logits.softmax(-1)
        close(probs.min(), 0.01 / 4, rtol=1e-3)
        close(probs.max(), 0.99 + 0.01 / 4, rtol=1e-3)


def test_percentile_ranges_are_the_official_ones_and_each_reward_has_its_floor():
    sizes = np.array([0.1, 10, 40, 100, 400, 20])[:, None]
    batches = tensor(np.sin(np.arange(210)).reshape(6, 35) * sizes + 0.3)
    scale, ranges, divisors = dreamer_v3.PercentileScale(floor=1.0), [], []
    for x in batches:
        divisors.append(float((x / scale(x)).mean()))
        ranges.append(float(scale.spread))
    close(ranges, [0.001959121, 0.1963856, 0.9843131, 2.902024, 10.74971, 11.03388], rtol=1e-4)
    close(divisors, [1, 1, 1, 2.902024, 10.74971, 11.03388], rtol=1e-4)
    close(scale(batches[0], update=False), batches[0] / 11.03388)
    agent = make_variant(dreamer_v3.Agent, worker_extr=0.5)
    assert {name: x.floor for name, x in agent.manager.returnnorm.items()} == {
        "extr": 1.0, "expl": 0.1}
    assert {name: x.floor for name, x in agent.worker.returnnorm.items()} == {
        "goal": 0.1, "extr": 1.0}


def test_laprop_with_adaptive_clipping_and_warm_up_makes_the_official_steps():
    module = nn.Linear(3, 2, bias=False)
    module.weight.data = tensor(np.sin(np.arange(6)).reshape(2, 3))
    module.bias = nn.Parameter(torch.zeros(3))  # tensors are clipped one by one
    config = dreamer_v3.Config(size="xs", device="cpu", learning_rate=0.01, warmup=3)
    optimizer = dreamer_v3.LaProp(module, config)
    weights, biases = [], []
    for i, size in enumerate([1, 10, 0.1, 0, 3]):
        gradients = [size * np.cos(np.arange(n) * (i + 2)) for n in (6, 3)]
        loss = sum((x.flatten() * tensor(gradient)).sum()
                   for x, gradient in zip((module.weight, module.bias), gradients, strict=True))
        norm = optimizer.minimize(loss)
        close(norm, np.linalg.norm(np.concatenate(gradients)), atol=1e-6)
        weights.append(module.weight.detach().flatten().clone())
        biases.append(module.bias.detach().clone())
    close(torch.stack(weights), [
        [0.0, 0.841471, 0.9092974, 0.14112, -0.7568025, -0.9589243],
        [-0.003133874, 0.8452484, 0.9089828, 0.1410463, -0.7576489, -0.9558849],
        [-0.008192697, 0.8510504, 0.9087963, 0.139957, -0.7568896, -0.9526206],
        [-0.01357441, 0.8572229, 0.9085979, 0.1387982, -0.7560819, -0.9491479],
        [-0.02091936, 0.8579648, 0.9049595, 0.1353648, -0.7581043, -0.9473171]], atol=1e-6)
    close(torch.stack(biases), [
        [0.0, 0.0, 0.0],
        [-0.003058254, 0.00373781, -0.0002499162],
        [-0.01105432, 0.01258248, 0.002022699],
        [-0.01956074, 0.02199168, 0.004440368],
        [-0.03131136, 0.02371171, 0.0008233017]], atol=1e-6)


def test_rms_norm_is_the_official_one_and_replaces_every_layer_norm():
    norm = dreamer_v3.RMSNorm(5)
    norm.weight.data = tensor([0.5, 1, 1.5, 2, -1])
    close(norm(tensor(3 * np.sin(np.arange(10)).reshape(2, 5))).flatten(), [
        0.0, 1.289964, 2.090912, 0.4326702, 1.160168, -0.6677296, -0.3891319, 1.372442, 2.755687,
        -0.5739425])
    images = torch.randn(2, 5, 3, 3)
    close(norm(images)[0, :, 1, 2], norm(images[0, :, 1, 2]))
    agent = make_variant(dreamer_v3.Agent)
    kinds = {type(module) for module in agent.modules()}
    assert {dreamer_v3.RMSNorm, nn.SiLU} <= kinds and not {director.Norm, nn.ELU} & kinds


def test_returns_use_the_critics_of_before_the_step_and_critics_follow_their_means():
    agent = make_variant(dreamer_v3.Agent, DISCRETE, agent="dreamer", **{
        **NONE, "critic_ema": "yes"}, discount=0.9, lam=0.5)
    worker, critic = agent.worker, agent.worker.critics["extr"]
    before = {key: x.clone() for key, x in critic.state_dict().items()}
    worker.ema_critics["extr"].out.bias.data.fill_(2.0)
    means = {key: x.clone() for key, x in worker.ema_critics["extr"].state_dict().items()}
    traj = agent.imagine(starts_at(*torch.randn(2, 8, 16)))
    feat = worker.feat(traj)
    with torch.no_grad():
        pred = critic(feat)
        ret = director.lambda_return(
            traj["reward_extr"], pred.mean, 0.9 * traj["cont"][1:], 0.5)
        weight = director.trajectory_weights(traj["cont"], 0.9)[:-1]
        pred = director.Symlog(pred.pred[:-1])
        mean = worker.ema_critics["extr"](feat[:-1]).mean
        expected = ((pred.loss(ret) + pred.loss(mean)) * weight).mean()
        score = director.Normalizer("std", 0.999, 1e2)(ret)  # its first step divides by the std
        score = score - pred.mean / ret.std(correction=0)
        score = (score - score.mean()) / score.std(correction=0)
    worker.slow["extr"].out.bias.data.fill_(7.0)  # of no importance
    scores, train_actor = [], worker.train_actor
    worker.train_actor = lambda *args: scores.append(args[-1]) or train_actor(*args)
    metrics = worker.learn(traj, copy_slow=True)
    close(metrics["extr_critic_loss"], expected)
    close(metrics["extr_return"], ret.mean())
    close(scores[0], score, rtol=1e-4, atol=1e-5)
    for key, after in critic.state_dict().items():
        assert not torch.equal(after, before[key])
        close(worker.ema_critics["extr"].state_dict()[key],
              0.98 * means[key] + 0.02 * after, atol=1e-6)


def test_the_advantage_is_divided_by_the_range_and_not_standardized():
    agent = make_variant(dreamer_v3.Agent, DISCRETE, agent="dreamer", **{
        **NONE, "percentiles": "yes"})
    worker, scores = agent.worker, []
    worker.train_actor = lambda traj, weight, score: scores.append(score) or {}
    worker.returnnorm["extr"].percentiles.copy_(tensor([-3, 1]))
    traj = agent.imagine(starts_at(*torch.randn(2, 8, 16)))
    with torch.no_grad():
        ret, value = worker.returns("extr", worker.feat(traj), traj)
    metrics = worker.learn(traj, copy_slow=False)
    low, high = np.percentile(ret, [5, 95])
    found = 0.99 * 4 + 0.01 * (high - low)
    close(metrics["extr_return_range"], found, rtol=1e-5)
    close(scores[0], (ret - value) / found, atol=1e-6)


@pytest.mark.parametrize("space", [CONTINUOUS, DISCRETE], ids=short_name)
def test_without_its_techniques_the_agent_is_director(space):
    agent = make_variant(dreamer_v3.Agent, space, **NONE)
    batches = list(small_batches(agent.sizes["action"], 2))
    original = make_variant(director.Director, space)
    original.load_state_dict(agent.state_dict())
    found = []
    for each in (agent, original):
        torch.manual_seed(1)
        found.append([each.train_step(batch) for batch in batches])
    assert found[0][1].keys() == found[1][1].keys()
    for key, value in found[0][1].items():  # of the second step, after updates of all parameters
        close(value, found[1][1][key], rtol=1e-4)


def small_batches(actions, count):
    rng = np.random.default_rng(0)
    shape = (2, 16)
    for _ in range(count):
        batch = {"image": rng.integers(0, 256, (*shape, 64, 64, 3), np.uint8),
                 "action": np.eye(actions, dtype=np.float32)[rng.integers(actions, size=shape)],
                 "reward": rng.normal(size=shape).astype(np.float32)}
        yield batch | {key: np.zeros(shape, bool) for key in ("is_first", "is_last", "is_terminal")}


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_restored_agent_goes_on_as_if_it_had_not_been_interrupted(precision):
    def make():
        return make_variant(dreamer_v3.Agent, CONTINUOUS, precision=precision, warmup=5)

    batches = list(small_batches(3, 4))
    agents = [make()]
    found = []
    for i, batch in enumerate(batches):
        torch.manual_seed(i)
        metrics = agents[0].train_step(batch)
        assert all(value.isfinite() for value in metrics.values())
        if i == 1:
            state = {"agent": agents[0].state_dict(), "grad_steps": 2, "variant": "dreamer_v3",
                     "optimizers": {k: x.state_dict() for k, x in agents[0].optimizers.items()}}
            agents.append(make())
            agents[1].restore(copy.deepcopy(state))
        found.append(metrics)
    for i in (2, 3):
        torch.manual_seed(i)
        metrics = agents[1].train_step(batches[i])
        for key, value in metrics.items():
            close(value, found[i][key], rtol=1e-6)
    for a, b in zip(agents[0].parameters(), agents[1].parameters(), strict=True):
        assert torch.equal(a, b)


def test_the_learning_rate_is_0_4_of_directors_unless_it_is_given():
    rates = [dreamer_v3.Config(device="cpu", **flags).learning_rate for flags in (
        {"size": "paper"}, {"size": "xs"}, {"size": "xs", "laprop": "no"},
        {"size": "xs", "learning_rate": 3e-4})]
    close(rates, [4e-5, 1.6e-4, 4e-4, 3e-4])


def test_the_mean_of_a_two_hot_prediction_has_its_gradient():
    logits = (torch.randn(3, 255) - torch.linspace(-4, 4, 255) ** 2).requires_grad_()
    dist = dreamer_v3.TwoHot(logits)
    gradient, = torch.autograd.grad(dist.mean.sum(), [logits])
    probs = logits.softmax(-1)
    close(gradient, probs * (dist.bins - dist.mean[:, None]), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("technique", TECHNIQUES)
def test_each_technique_has_its_own_flag(technique):
    agent = make_variant(dreamer_v3.Agent, **{**NONE, technique: "yes"})
    model, players = agent.world_model, (agent.manager, agent.worker)
    norms = [[x for x in part.modules() if isinstance(x, (director.Norm, dreamer_v3.RMSNorm))]
             for part in (model, agent.goals, *players)]
    heads = [model.reward_head, *(x for player in players for x in player.critics.values())]
    found = {
        "latents": [model.free_bits, model.rssm.unimix > 0],
        "two_hot": [isinstance(head, dreamer_v3.TwoHotHead) for head in heads],
        "percentiles": [isinstance(x, dreamer_v3.PercentileScale)
                        for player in players for x in player.returnnorm.values()]
        + [isinstance(player.advnorm, nn.Identity) for player in players],
        "critic_ema": [hasattr(player, "ema_critics") for player in players],
        "rms_silu": [isinstance(norm, dreamer_v3.RMSNorm) for part in norms for norm in part],
        "laprop": [isinstance(x, dreamer_v3.LaProp) for x in agent.optimizers.values()]}
    for name, uses in found.items():
        assert uses == [name == technique] * len(uses), name


def test_samples_of_the_posterior_are_mixed_with_the_uniform_distribution_too():
    rssm = make_variant(dreamer_v3.Agent, classes=4).world_model.rssm
    rssm.post_net[-1].weight.data.mul_(1e4)  # without mixing, probabilities are 0 or 1
    embed = torch.randn(rssm.post_net[0].in_features - 16).expand(20_000, -1)
    stoch, logits = rssm.posterior(torch.ones(20_000, 16), embed)
    unlikely = stoch * (logits.flatten(-2) < np.log(0.1))
    assert 0.006 < float(unlikely.sum(-1).mean().detach()) / 4 < 0.009  # 3/4 of 1%
