"""Latent states: two levels, Gaussian."""

import dataclasses

import numpy as np
import pytest
import torch

import director
from conftest import (
    RUN,
    close,
    make_variant,
    tensor,
)
from variants import (
    gaussian,
    hdreamer,
)


def kl(post, prior):
    """KL of categoricals, [..., S, C] -> [...], by PyTorch's distributions."""
    kind = torch.distributions.OneHotCategorical
    return torch.distributions.kl_divergence(kind(logits=post), kind(logits=prior)).sum(-1)


def test_hdreamer_has_a_kl_and_a_scale_for_each_level():
    sizes = {"stoch": 4, "classes": 4, "bottom_stoch": 3, "bottom_classes": 5}
    agent = make_variant(hdreamer.Agent, **sizes, kl_target=2)
    model, gen = agent.world_model, torch.manual_seed(0)
    states = {key: torch.randn(2, 6, 16 + 15, generator=gen, requires_grad=True)
              for key in ("post", "prior")}
    close(model.kl_adapt.target, [2 * 4 / 7, 2 * 3 / 7])
    model.kl_adapt.target = tensor([1e3, 1e-3])  # so that one scale falls, the other stays at most
    loss, metrics = model.kl_loss(states)
    coarse, fine = ((states[key][..., :16].unflatten(-1, (4, 4)),
                     states[key][..., 16:].unflatten(-1, (3, 5))) for key in ("post", "prior"))
    coarse, fine = kl(coarse[0], fine[0]), kl(coarse[1], fine[1])
    close(metrics["coarse_kl"].detach(), coarse.detach().mean(), rtol=1e-5)
    close(metrics["fine_kl"].detach(), fine.detach().mean(), rtol=1e-5)
    close(model.kl_adapt.scale, [1 / 1.1, 1])
    close(loss.detach(), (coarse / 1.1 + fine).detach(), rtol=1e-5)
    whole = torch.autograd.grad((coarse / 1.1 + fine).sum(), list(states.values()))
    found = torch.autograd.grad(loss.sum(), list(states.values()))
    close(found[0], 0.2 * whole[0], atol=1e-6)
    close(found[1], 0.8 * whole[1], atol=1e-6)


def test_free_nats_clip_the_kl_of_each_level_in_each_step():
    model = make_variant(hdreamer.Agent, stoch=2, classes=2, bottom_stoch=1, bottom_classes=2,
                         free_nats=1).world_model
    same, some, much = ([0.5, 0.5], [0.5, 0.5]), ([0.2, 0.8], [0.8, 0.2]), ([0.1, 0.9], [0.9, 0.1])
    # KLs of these: 0, 0.6 log 4 = 0.83, 0.8 log 9 = 1.76. The coarse level has two groups.
    steps = [(some, some, same), (some, same, much), (some, same, same)]
    post, prior = (tensor([[sum((group[i] for group in step), []) for step in steps]]).log()
                   for i in range(2))  # [1, 3, 6]
    post.requires_grad_()
    prior.requires_grad_()
    loss, metrics = model.kl_loss({"post": post, "prior": prior})
    log4, log9 = np.log([4, 9])
    close(loss[0], [1.2 * log4 + 1, 1 + 0.8 * log9, 1 + 1])
    close(torch.stack([metrics["coarse_kl"], metrics["fine_kl"]]), [0.8 * log4, 0.8 * log9 / 3])
    close([metrics["coarse_kl_free"], metrics["fine_kl_free"]], [2 / 3, 2 / 3])
    assert "coarse_kl_scale" not in metrics and (model.kl_adapt.scale == 1).all()
    grad_post, grad_prior = torch.autograd.grad(loss.sum(), [post, prior])
    # Of the prior's logits: 0.8 (prior - post); of the posterior's: 0.2 post (log(p / q) - KL).
    up = 0.48 * np.array([1, -1])
    close(grad_prior[0], [[*up, *up, 0, 0], [0, 0, 0, 0, 0.64, -0.64], [0] * 6], atol=1e-6)
    up = 0.064 * log4 * np.array([-1, 1])
    high = 0.2 * 0.9 * 0.2 * log9
    close(grad_post[0], [[*up, *up, 0, 0], [0, 0, 0, 0, -high, high], [0] * 6], atol=1e-6)
    assert not grad_post[0, 2].any() and not grad_prior[0, 2].any()  # exactly 0 below the clip


def test_free_nats_refuse_a_target_of_the_kl_that_nothing_reads(capsys, tmp_path):
    flags = ["--task=gym_Corridor-v0", "--size=xs", f"--logdir={tmp_path}/run", "--free_nats=1"]
    assert director.main([*flags, "--kl_target=2"], hdreamer.Agent) == 2
    error = capsys.readouterr().err
    assert "--kl_target has no effect here" in error and error.count("\n") == 1
    assert not (tmp_path / "run").exists()
    config = hdreamer.Config(size="xs", free_nats=1)
    assert hdreamer.Config(**dataclasses.asdict(config)) == config  # as a resumed run reads it
    assert hdreamer.Config(size="xs", kl_target=2).free_nats == 0


def test_hdreamer_draws_the_fine_level_given_the_coarse_and_corrects_its_prior():
    rssm = make_variant(hdreamer.Agent, bottom_stoch=3, bottom_classes=5).world_model.rssm
    rssm.correction[-1].weight.data.normal_()
    deter, embed = torch.randn(7, 16), torch.randn(7, rssm.correction[0].in_features - 32)
    stoch, post = rssm.posterior(deter, embed)
    coarse, fine = stoch.split([16, 15], -1)
    close(fine.detach().unflatten(-1, (3, 5)).sum(-1), np.ones((7, 3)))
    prior = rssm.prior(deter, stoch)
    correction = rssm.correction(torch.cat([deter, coarse, embed], -1))
    close((post - prior)[:, 16:].detach(), correction.detach(), atol=1e-5)
    assert correction.abs().max() > 0.1 and not torch.equal(post[:, :16], prior[:, :16])
    nets = [rssm.fine_net[0].weight, rssm.correction[0].weight, rssm.post_net[0].weight]
    assert all(x.abs().sum() > 0 for x in torch.autograd.grad(post[:, 16:].square().sum(), nets))
    other = rssm.prior(deter, stoch.roll(1, 0))
    assert torch.equal(other[:, :16], prior[:, :16]) and not torch.equal(other, prior)
    # A guess is the chain of both priors: the mode of one, then the other's mode given it.
    mode = director.OneHot(rssm.prior_net(deter).unflatten(-1, (4, 4))).mode.flatten(-2)
    logit = rssm.fine_net(torch.cat([deter, mode], -1)).unflatten(-1, (3, 5))
    expected = torch.cat([mode, director.OneHot(logit).mode.flatten(-2)], -1)
    assert torch.equal(rssm.predict_stoch(deter, sample=False), expected)
    found = torch.stack([rssm.predict_stoch(deter)[:, 16:] for _ in range(2000)]).mean(0)
    logits = [rssm.prior(deter, rssm.predict_stoch(deter))[:, 16:] for _ in range(2000)]
    dists = [director.OneHot(x.unflatten(-1, (3, 5))) for x in logits]
    chance = torch.stack([dist.probs.flatten(-2) for dist in dists]).mean(0)
    close(found.detach(), chance.detach(), atol=0.05)


@pytest.mark.parametrize("task", ["gym_ShortPinPad-v0", "gym_envs.grid:Corridor-v0"])
def test_hdreamer_goes_on_with_a_run_of_director_and_first_acts_as_it_did(
        task, tmp_path, monkeypatch):
    run = [*RUN, f"--task={task}", "--processes=no", f"--logdir={tmp_path}"]
    assert director.main([*run, "--steps=150"]) == 0
    flags = {"bottom_stoch": 3, "bottom_classes": 5, "device": "cpu", "precision": "float32"}
    agents = [director.load(tmp_path, device="cpu", precision="float32"),
              director.load(tmp_path, hdreamer.Agent, **flags)]
    assert agents[1].grad_steps == agents[0].grad_steps > 0
    with monkeypatch.context() as patch:
        patch.setattr(director.OneHot, "rsample", lambda dist: dist.mode)
        found = []
        for agent in agents:
            state, outs = None, []
            for step in range(6):
                gen = np.random.default_rng(step)
                obs = {key: gen.integers(0, 256, (3, *x.shape), np.uint8) if key == "image" else
                       np.float32(gen.normal(size=(3, *x.shape)))
                       for key, x in agent.obs_space.items()}
                action, state = agent.policy(obs, state)
                outs.append(action)
            starts = {key: state[key] for key in ("deter", "stoch")}
            with torch.no_grad():
                traj = agent.imagine({**starts, "is_terminal": torch.zeros(3)})
                feat = torch.cat([traj["deter"], traj["stoch"]], -1)
                outs += [traj[key] for key in (
                    "deter", "goal", "cont", "reward_extr", "reward_expl", "reward_goal")]
                outs += agent.world_model.decoder(feat).values()
                for player in agent.players.values():
                    seen = player.feat(traj)
                    critics = (*player.critics.values(), *player.slow.values())
                    outs += [critic(seen).pred for critic in critics]
            found.append(outs)
        for flat, made in zip(*found, strict=True):
            close(made, flat, rtol=1e-6, atol=1e-6)
    shape = agents[1].world_model.reward_head.hidden[0].weight.shape
    assert shape[1] == agents[0].world_model.reward_head.hidden[0].weight.shape[1] + 15
    for steps in (200, 250):  # as itself, from then on
        more = ["--bottom_stoch=3", "--bottom_classes=5", f"--steps={steps}"]
        assert director.main([*run, *more], hdreamer.Agent) == 0
    saved = torch.load(tmp_path / "checkpoint.pt")
    assert saved["variant"] == "hdreamer" and saved["step"] == 250
    fine = saved["agent"]["world_model.reward_head.hidden.0.weight"][:, -15:]
    assert fine.abs().sum() > 0
    assert director.main([*run, "--steps=300"]) == 2


def test_gaussian_draws_reparameterised_numbers_and_has_a_balanced_kl():
    model = make_variant(gaussian.Agent).world_model
    rssm, deter = model.rssm, torch.randn(3, 16)
    mean, std = rssm.prior(deter).unbind(-1)
    out = rssm.prior_net(deter)
    close(mean.detach(), out[:, :16].detach())
    close(std.detach(), (1 + out[:, 16:].exp()).log().detach() + 0.1, rtol=1e-5)
    found = torch.stack([rssm.predict_stoch(deter) for _ in range(4000)])
    close(found.mean(0).detach(), mean.detach(), atol=0.08)
    close(found.std(0).detach(), std.detach(), rtol=0.08)
    assert torch.equal(rssm.predict_stoch(deter, sample=False), mean)
    stoch, params = rssm.posterior(deter, torch.randn(3, rssm.post_net[0].in_features - 16))
    grad, = torch.autograd.grad(stoch.sum(), params)
    noise = (stoch - params[..., 0]) / params[..., 1]
    close(grad, torch.stack([torch.ones_like(noise), noise], -1), atol=1e-5)
    gen = torch.manual_seed(0)
    states = {key: (torch.rand(2, 5, 16, 2, generator=gen) + 0.1).requires_grad_()
              for key in ("post", "prior")}
    (m1, s1), (m2, s2) = (states[key].unbind(-1) for key in ("post", "prior"))
    whole = ((s2 / s1).log() + (s1**2 + (m1 - m2) ** 2) / (2 * s2**2) - 0.5).sum(-1)
    loss, metrics = model.kl_loss(states)
    close(metrics["kl"].detach(), whole.mean().detach(), rtol=1e-5)
    close(loss.detach(), whole.detach() * model.kl_adapt.scale, rtol=1e-5)
    for scale, key in ((0.2, "post"), (0.8, "prior")):
        grad, = torch.autograd.grad(loss.sum(), states[key], retain_graph=True)
        full, = torch.autograd.grad(whole.sum(), states[key], retain_graph=True)
        close(grad, scale * model.kl_adapt.scale * full, atol=1e-5)


def test_gradients_of_hdreamer_lead_through_the_samples_of_both_levels():
    rssm = make_variant(hdreamer.Agent, bottom_stoch=3, bottom_classes=5).world_model.rssm
    rssm.correction[-1].weight.data.normal_()
    deter, embed = torch.randn(7, 16), torch.randn(7, rssm.correction[0].in_features - 32)
    direction = torch.randn(7, 15)
    prior, fine, correction = (
        net[-1].weight for net in (rssm.prior_net, rssm.fine_net, rssm.correction))

    def reaches(value, *inputs):
        found = torch.autograd.grad((value * direction).sum(), inputs, allow_unused=True)
        return all(x is not None and x.abs().sum() > 0 for x in found)

    assert reaches(rssm.posterior(deter, embed)[0][:, 16:], fine, correction)
    assert reaches(rssm.predict_stoch(deter)[:, 16:], prior, fine)
    stoch = torch.randn(7, 31, requires_grad=True)
    assert reaches(rssm.prior(deter, stoch)[:, 16:], stoch)


def test_gaussian_noise_is_independent_and_imagined_samples_have_the_gradient_of_mean_and_std():
    rssm = make_variant(gaussian.Agent).world_model.rssm
    deter = torch.randn(500, 16, requires_grad=True)
    embed = torch.randn(500, rssm.post_net[0].in_features - 16)
    stoch, params = rssm.posterior(deter, embed)
    for sample, (mean, std) in ((rssm.predict_stoch(deter), rssm.prior(deter).unbind(-1)),
                                (stoch, params.unbind(-1))):
        noise = ((sample - mean) / std).detach()
        close(noise.T.corrcoef(), np.eye(16), rtol=0, atol=0.2)
        found, wanted = (torch.autograd.grad(x.sum(), [deter], retain_graph=True)[0]
                         for x in (sample, mean + std * noise))
        close(found, wanted, rtol=1e-4, atol=1e-5)
