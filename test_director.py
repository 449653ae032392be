"""What a user of director.py can rely on. Numbers named "official" come from danijar/director."""

import contextlib
import dataclasses
import functools
import importlib
import io
import itertools
import json
import math
import os
import pathlib
import re
import resource
import signal
import subprocess
import sys
import time
import types

import dm_env
import gymnasium
import imageio.v2 as imageio
import numpy as np
import pytest
import torch
from gymnasium import spaces
from gymnasium.utils.env_checker import check_env
from gymnasium.vector import AsyncVectorEnv
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import director
import envs.dmc
import envs.folder
import envs.make
import envs.vector
from conftest import (
    CONTINUOUS,
    DISCRETE,
    HERE,
    PROGRAM,
    RUN,
    TINY,
    Mixed,
    check_optimizer_ownership,
    close,
    make_agent,
    make_variant,
    needs_rendering,
    random_batch,
    read_metrics,
    starts_at,
    tensor,
)
from director import Config, Director, Driver, Replay
from envs.dmc import DMControl, import_suite
from envs.grid import Corridor
from envs.pin_pad import PinPad
from envs.wrappers import IMAGE, EnvironmentFailed, resize

# ---- Configuration --------------------------------------------------------------------------


@pytest.mark.parametrize("size", list(director.SIZES))
def test_a_size_sets_what_is_not_given(size):
    for name, value in director.SIZES[size].items():
        assert getattr(Config(size=size), name) == value
    assert Config(size=size, deter=64).deter == 64
    assert Config(size=size, learning_rate=0.0).learning_rate == 0  # given, although it is falsy


def test_the_settings_of_size_paper_are_those_of_the_paper():
    settings = {
        "deter": 1024, "hidden": 1024, "stoch": 32, "classes": 32, "units": 512, "layers": 4,
        "cnn_depth": 64, "batch_size": 16, "batch_length": 64, "train_every": 16, "slow_every": 100,
        "learning_rate": 1e-4, "kl_target": 3.5, "standardize": "no", "skill_groups": 8,
        "skill_classes": 8, "discount": 0.99, "lam": 0.95, "horizon": 16, "goal_duration": 8,
        "worker_extr": 0.0, "manager_expl": 0.1, "envs": 4, "prefill": 10_000,
        "replay_size": 1_000_000, "action_repeat": 1}
    config = dataclasses.asdict(Config(size="paper"))
    assert {key: config[key] for key in settings} == settings


def test_the_default_size_is_that_of_the_paper_on_a_gpu_only(monkeypatch):
    assert Config(device="cpu").size == "xs"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **kwargs: True)
    assert Config().size == "paper" and Config().device == "cuda"


@pytest.mark.parametrize("found, expected", [
    ({"cpu_name": "AMD EPYC", "avx512_bf16": True}, "bfloat16"),
    ({"cpu_name": "AMD EPYC", "avx2": True, "avx512_bf16": False}, "float32"),
    ({"cpu_name": "Intel Xeon", "avx512_bf16": True, "amx_bf16": True}, "bfloat16"),
    ({"cpu_name": "Intel Xeon", "avx512_bf16": True, "amx_bf16": False}, "float32"),  # 1.4 times
    ({"bf16": True}, "bfloat16"),  # ARM
])
def test_bfloat16_is_the_default_on_processors_where_it_is_faster(found, expected, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: found)
    assert Config(device="cpu").precision == expected


def test_the_flat_agent_accepts_any_horizon():
    assert Config(agent="dreamer", horizon=15).horizon == 15


def test_help_shows_each_flag_with_its_choices_and_defaults(capsys):
    with pytest.raises(SystemExit):
        director.main(["--help"])
    words = " ".join(capsys.readouterr().out.split())
    for field in dataclasses.fields(Config):
        assert f"--{field.name} " in words and field.metadata["text"] in words
        default = field.default
        if default is None:
            default = ", ".join(f"{size} {row[field.name]}" for size, row in Config.sizes.items())
        assert default == "" or f"{field.metadata['text']} [{default}]" in words
        if field.metadata["choices"]:
            assert f"--{field.name} {{{','.join(field.metadata['choices'])}}}" in words


def test_tasks_agents_sizes_and_seeds_have_default_folders_of_their_own():
    folders = {
        "runs/pinpad_six/director-xs-0": {},
        "runs/pinpad_six/dreamer-xs-0": {"agent": "dreamer"},
        "runs/pinpad_six/director-s-0": {"size": "s"},
        "runs/pinpad_six/director-xs-3": {"seed": 3},
        "runs/gym_ALE-Pong-v5/director-xs-0": {"task": "gym_ALE/Pong-v5"}}
    for folder, flags in folders.items():
        config = Config(**{"task": "pinpad_six", "size": "xs", **flags})
        assert director.run_folder(config, Director) == pathlib.Path.cwd() / folder


def test_the_default_folder_names_the_file_and_the_class_of_a_subclass():
    class Agent(Director):
        pass

    class Mine(Director):
        pass

    copy = type("Director", (Director,), {"__module__": __name__})  # in this file
    names = [director.run_folder(Config(size="xs"), x).name for x in (Agent, copy, Mine, Director)]
    assert names == ["test_director-xs-0", "test_director-xs-0", "test_director-Mine-xs-0",
                     "director-xs-0"]


@pytest.mark.parametrize("wrong", [
    {"agent": "dreamer2"}, {"size": "big"}, {"standardize": True}, {"precision": "bf16"},
    {"device": "gpu"}])
def test_settings_of_a_program_are_checked_like_flags(wrong):
    with pytest.raises(director.UserError, match=f"--{next(iter(wrong))} .* choose from "):
        Config(**wrong)


# ---- Functions, against the official code and against brute force ---------------------------


OFFICIAL = {  # inputs and outputs of single functions of the official code
    "kl_post": [[1.223388, -0.6676047, -0.8761746, -0.05839498, -4.822755, 0.5683473],
     [-0.1460819, -0.5409068, -2.091649, 8.030306, -3.453235, 0.3211097],
     [-2.844139, 1.90531, 0.02953549, -1.814035, 1.507461, -0.6542363],
     [-2.019569, -1.004789, -0.1832417, -3.35439, -0.08763962, -1.199788]],
    "kl_prior": [[-0.7076086, -1.354358, 2.82424, 2.54891, 1.451576, -1.755195],
     [2.754371, -0.4965875, 0.3364733, -1.497064, -0.5905356, 0.6450922],
     [-1.658512, 1.874804, 5.026001, -0.8455824, 0.6419631, 2.177063],
     [1.417609, 0.4072589, 3.708367, 0.4406717, 3.043389, 1.11637]],
    "kl_value": 9.715265,
    "onehot_logits": [[-3.862942, 9.927528, 6.205058, -12.04849, 11.34185],
     [-7.300737, -3.510437, -1.10245, -4.38099, 8.480548],
     [-0.5251718, 3.765723, 2.694756, -2.235156, 11.89365]],
    "onehot_action": [[0, 0, 0, 1, 0],
     [0, 0, 1, 0, 0],
     [0, 1, 0, 0, 0]],
    "onehot_logprob": -18.47397,
    "onehot_entropy": [0.559457, 0.05816182, 0.06012553],
    "normal_mean": [-0.9238727, 0.4764954, 1.644217, -0.6765172, -2.147368, -1.357561],
    "normal_std": [0.4607834, 0.1943514, -0.2329836, -0.4162066, -0.1040552, -0.837996],
    "normal_action": [-0.1469131, -0.07600965, 0.783722, 0.06966898, -2.241175, 0.9543368],
    "normal_logprob": -22.54576,
    "normal_entropy": [0.8658749, 0.8356551, 0.777777, 0.7495356, 0.7964443, 0.6776275],
    "goal": [0.4460081, -0.1353927, -0.123016, -0.07244141, 0.4472504, -0.7338715,
     -1.052885, -1.675032, 0.824944, 0.05078574, 1.039288, -0.006163864],
    "feat": [-0.6465144, 0.1992961, 0.8914496, -0.002793061, 0.1399558, -0.02689079,
     0.3112146, 0.628743, -0.7060629, -0.4825338, 0.04358893, -0.6657321],
    "goal_reward": -0.3427913,
    "lam_reward": [0.8390635, 0.07781734, -0.6368898, -0.9671727, -0.2513558, -0.6734893,
     0.7848259, -0.9879493, -1.869595, -1.345718, 0.09291717, 1.062195,
     0.1998004, -0.3147527, -1.473607, 0.2727261],
    "lam_value": [0.0133768, -0.659783, -0.2565005, -1.240264, -0.02117782, 1.23399,
     0.7041091, -0.8603001, -1.937191, -0.152324, 0.187046, 1.01653, -0.8853627,
     0.9115737, -0.8788993, -0.364611, -0.9100593],
    "lam_cont": [0.8428251, 0.8456201, 0.937165, 0.6269913, 0.6927134, 0.5286231, 0.7467071,
     0.6430792, 0.9124345, 0.9300441, 0.8714085, 0.7788001, 0.8720051,
     0.9072509, 0.7152889, 0.9226003, 0.994479],
    "lam_return": [-0.2887437, -1.383355, -1.644278, -1.643072, -1.036342, -1.643855,
     -1.418798, -3.598184, -2.939761, -1.215441, 0.1491161, 0.02322459,
     -1.220253, -1.712227, -2.031063, -0.6232585],
    "symlog_pred": [-1.103994, -2.139242, 5.473247, 0.5432662, -3.407344, -2.393105,
     -0.1968105, -5.11788],
    "symlog_target": [-9.050948, -95.09498, -31.60806, 19.32578, 25.62593, 37.20761, -15.9843,
     18.8083],
    "symlog_loss": [1.448828, 5.885939, 80.24228, 6.094103, 44.74578, 36.43498, 6.94575,
     65.67451],
    "symlog_mean": [-2.016189, -7.492995, 237.2324, 0.7216208, -29.18496, -9.947431,
     -0.2175133, -165.981],
}


def test_functions_give_the_numbers_of_the_official_code():
    o = {key: tensor(value) for key, value in OFFICIAL.items()}
    close(director.balanced_kl(o["kl_post"], o["kl_prior"], 0.8), o["kl_value"])
    close(director.max_cosine(o["goal"], o["feat"]), o["goal_reward"])
    args = o["lam_reward"], o["lam_value"], 0.99 * o["lam_cont"][1:]
    close(director.lambda_return(*args, 0.95), o["lam_return"], atol=1e-6)
    onehot = director.OneHot(o["onehot_logits"], unimix=0.01)
    close(onehot.log_prob(o["onehot_action"]).sum(), o["onehot_logprob"])
    close(onehot.entropy(), o["onehot_entropy"])
    normal = director.BoundedNormal(o["normal_mean"], o["normal_std"])
    low, high = normal.entropy_range
    close(normal.log_prob(o["normal_action"]).sum(), o["normal_logprob"])
    close((normal.entropy() - low) / (high - low), o["normal_entropy"])
    dist = director.Symlog(o["symlog_pred"])
    close(dist.loss(o["symlog_target"]), o["symlog_loss"])
    close(dist.mean, o["symlog_mean"])


def test_symlog_and_symexp_are_inverse():
    x = tensor([-1000.0, -1.5, -0.01, 0.0, 0.3, 7.0, 1e6])
    close(director.symexp(director.symlog(x)), x, rtol=1e-4)
    close(director.symlog(tensor([-1.0, math.e - 1])), [-math.log(2), 1.0])


def test_one_hot_matches_torch_and_samples_with_straight_through_gradients():
    torch.manual_seed(0)
    logits = torch.randn(3, 4, requires_grad=True)
    dist, reference = director.OneHot(logits), torch.distributions.Categorical(logits=logits)
    close(dist.entropy(), reference.entropy().detach())
    expected = reference.log_prob(torch.tensor([0, 1, 2])).detach()
    close(dist.log_prob(torch.eye(4)[[0, 1, 2]]), expected)
    samples = torch.stack([dist.rsample() for _ in range(4000)])
    assert ((samples.detach() - samples.detach().round()).abs() < 1e-6).all()
    close(samples.mean(0), reference.probs.detach(), rtol=0, atol=0.03)
    weight = torch.randn(3, 4)
    ours = torch.autograd.grad((dist.rsample() * weight).sum(), logits, retain_graph=True)
    close(ours[0], torch.autograd.grad((dist.probs * weight).sum(), logits)[0])
    mixed = director.OneHot(tensor([100.0, 0.0]), unimix=0.01)
    close(mixed.probs, [0.995, 0.005], rtol=1e-4)


def test_samples_of_different_rows_and_groups_are_independent():
    torch.manual_seed(0)
    rows = director.OneHot(torch.zeros(2, 5000, 4)).rsample()
    groups = director.OneHot(torch.zeros(5000, 2, 4)).rsample().movedim(1, 0)
    for a, b in (rows, groups):
        assert (a * b).sum(-1).mean().item() == pytest.approx(0.25, abs=0.03)


def test_bounded_normal_matches_torch_and_knows_its_range_of_entropy():
    torch.manual_seed(0)
    dist = director.BoundedNormal(torch.randn(5, 3), torch.randn(5, 3))
    reference = torch.distributions.Normal(dist.mean, dist.stddev)
    value = torch.randn(5, 3)
    close(dist.log_prob(value), reference.log_prob(value))
    close(dist.entropy(), reference.entropy())
    low, high = director.BoundedNormal(torch.zeros(2), tensor([-100.0, 100.0])).entropy()
    close(low, dist.entropy_range[0])
    close(high, dist.entropy_range[1])


def test_balanced_kl_matches_torch_and_balances_gradients():
    gen = torch.manual_seed(0)
    post, prior = (torch.randn(5, 4, 6, generator=gen, requires_grad=True) for _ in range(2))
    dists = [torch.distributions.Categorical(logits=x) for x in (post, prior)]
    expected = torch.distributions.kl_divergence(*dists).sum(-1)
    close(director.balanced_kl(post, prior, 0.8), expected.detach())
    full = torch.autograd.grad(expected.sum(), [post, prior])
    ours = torch.autograd.grad(director.balanced_kl(post, prior, 0.8).sum(), [post, prior])
    close(ours[0], 0.2 * full[0], atol=1e-6)
    close(ours[1], 0.8 * full[1], atol=1e-6)


def test_auto_adapt_moves_by_ten_percent_outside_the_band_and_stays_inside():
    adapt = director.AutoAdapt((), target=3.5, low=0.9, high=1.2)
    expected = (3.9, 1.1), (9.0, 1.2), (3.5, 1.2), (3.0, 1.2 / 1.1), (0.0, 0.99174), (0.0, 0.9016)
    for mean, scale in expected:
        close(adapt(torch.full((2, 3), float(mean))), np.full((2, 3), mean * scale), rtol=1e-4)
    adapt = director.AutoAdapt((2,), target=0.5, low=1e-5, high=1e2, inverse=True)
    close(adapt(tensor([[0.3, 0.9]])), [[-0.3 * 1.1, -0.9 / 1.1]])


def test_normalizer_matches_brute_force_running_moments():
    gen = np.random.default_rng(0)
    values = [gen.normal(2.0, 3.0, size=(4, 3)) for _ in range(3)]
    for impl, decay, limit in (("std", 0.999, 1e2), ("mean_std", 0.99, 1e8)):
        norm, mean, square = director.Normalizer(impl, decay, limit), 0.0, 0.0
        for step, x in enumerate(values, 1):
            mean = decay * mean + (1 - decay) * x.mean()
            square = decay * square + (1 - decay) * (x**2).mean()
            m, s = mean / (1 - decay**step), square / (1 - decay**step)
            std = math.sqrt(max(s - m**2, limit**-2))
            expected = (x - m) / std if impl == "mean_std" else x / std
            close(norm(tensor(x)), expected)
            close(norm(tensor(x), update=False), expected)
    close(director.Normalizer("std", 0.999, 1e2)(torch.ones(5)), np.full(5, 100.0))

    norm = director.Normalizer("mean_std", 0.99, 1e2, (3,))  # each of 3 elements by itself
    x = gen.normal([1.0, -200.0, 0.5], [1.0, 50.0, 0.0], size=(2, 40, 3))
    expected = (x - x.mean((0, 1))) / np.maximum(x.std((0, 1)), 1e-2)
    close(norm(tensor(x)), expected, atol=1e-5)


def test_max_cosine_is_one_only_for_the_same_vector():
    goal = tensor([[3.0, 4.0], [3.0, 4.0], [3.0, 4.0], [0.0, 0.0]])
    feat = tensor([[3.0, 4.0], [6.0, 8.0], [-4.0, 3.0], [0.0, 0.0]])
    close(director.max_cosine(goal, feat), [1.0, 0.5, 0.0, 0.0])


def test_lambda_return_matches_a_brute_force_mixture_of_n_step_returns():
    rng = np.random.default_rng(0)
    reward, value, discount = rng.normal(size=(6, 2)), rng.normal(size=(7, 2)), rng.random((6, 2))
    lam = 0.8
    expected = np.zeros((6, 2))
    for t in range(6):
        def n_step(n, t=t):
            total, factor = 0.0, 1.0
            for i in range(t, t + n):
                total, factor = total + factor * reward[i], factor * discount[i]
            return total + factor * value[t + n]
        last = 6 - t
        expected[t] = lam ** (last - 1) * n_step(last)
        expected[t] += sum((1 - lam) * lam ** (n - 1) * n_step(n) for n in range(1, last))
    args = (torch.tensor(x) for x in (reward, value, discount))
    close(director.lambda_return(*args, lam), expected)


def test_trajectory_weights_stop_after_a_terminal_state():
    cont = tensor([[1.0, 0.0], [1.0, 1.0], [0.0, 1.0], [1.0, 1.0]])
    close(director.trajectory_weights(cont, 0.9), [[1, 0], [0.9, 0], [0, 0], [0, 0]])


def counting_trajectory(horizon=16, amount=3):
    """Each element is 100 times its time, plus its column."""
    index = tensor(np.arange(horizon + 1)[:, None] * 100 + np.arange(amount))
    return {
        "deter": index[..., None].repeat(1, 1, 2), "goal": index[..., None] // 800,
        "cont": index / 1e4, "action": index[..., None], "skill": index[..., None],
        "reward_goal": index[1:]}


def test_split_trajectory_cuts_segments_that_share_a_state_and_keep_their_goal():
    split = director.split_trajectory(counting_trajectory(), 8)
    assert split["deter"].shape == (9, 6, 2) and split["reward_goal"].shape == (8, 6)
    for segment in range(2):
        for column in range(3):
            times = 100 * (8 * segment + np.arange(9)) + column
            close(split["deter"][:, 3 * segment + column, 0], times)
            close(split["reward_goal"][:, 3 * segment + column], times[1:])
            close(split["goal"][:, 3 * segment + column, 0], np.full(9, segment))


def test_abstract_trajectory_matches_brute_force():
    traj = counting_trajectory()
    traj["cont"] = torch.rand(17, 3, generator=torch.manual_seed(0))
    abstract = director.abstract_trajectory(traj, 8)
    assert abstract["deter"].shape == (3, 3, 2) and "skill" not in abstract
    close(abstract["action"][:, 1, 0], [1, 801, 1601])
    close(abstract["cont"][0], traj["cont"][0])
    for block in range(2):
        start = 8 * block
        close(abstract["cont"][block + 1], traj["cont"][start + 1 : start + 9].prod(0))
        total = 0.0
        for t in range(8):
            alive = traj["cont"][start : start + t + 1].prod(0)
            total = total + alive * traj["reward_goal"][start + t]
        close(abstract["reward_goal"][block], total / 8)


def test_optimizer_clips_decays_matrices_only_and_follows_adam():
    torch.manual_seed(0)
    layer = torch.nn.Linear(3, 2)
    with torch.no_grad():
        layer.bias.fill_(1.0)
    optimizer = director.Optimizer(layer, Config(size="paper", learning_rate=0.1))
    params = [p.detach().double().numpy().copy() for p in (layer.weight, layer.bias)]
    first, second = [np.zeros((2, 3)), np.zeros(2)], [np.zeros((2, 3)), np.zeros(2)]
    inputs = np.full(3, 1000.0)
    for step in range(1, 4):
        norm = optimizer.minimize((layer(tensor(inputs)) ** 2).sum())
        out = params[0] @ inputs + params[1]
        grads = [2 * out[:, None] * inputs, 2 * out]
        expected = math.sqrt(sum((g**2).sum() for g in grads))
        assert float(norm) == pytest.approx(expected, rel=1e-3) and expected > 100
        for i, decay in ((0, 1e-2), (1, 0.0)):
            grad = grads[i] * 100 / expected
            first[i] = 0.9 * first[i] + 0.1 * grad
            second[i] = 0.999 * second[i] + 0.001 * grad**2
            update = first[i] / (1 - 0.9**step) / (np.sqrt(second[i] / (1 - 0.999**step)) + 1e-6)
            params[i] = params[i] * (1 - 0.1 * decay) - 0.1 * update
    close(layer.weight, params[0], rtol=1e-3)
    close(layer.bias, params[1], rtol=1e-3)


def test_tiny_gradients_make_small_steps():
    layer = nn.Linear(1, 1, bias=False)
    layer.weight.data.zero_()
    optimizer = director.Optimizer(layer, Config(size="xs", learning_rate=0.1))
    optimizer.minimize(1e-6 * layer.weight.sum())
    close(layer.weight, [[-0.05]], rtol=1e-3)  # g / (|g| + eps), where g = eps = 1e-6


# ---- The agent ------------------------------------------------------------------------------


def test_first_weights_are_glorot_uniform_and_those_of_outputs_are_smaller():
    agent = make_agent(units=64, layers=2, cnn_depth=8)
    outputs = {module.out for module in agent.modules() if isinstance(module, director.MLP)}
    for layer in agent.modules():
        if not isinstance(layer, (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)):
            continue
        parts = [(layer.weight, 0.1 if layer in outputs else 1.0)]
        if layer is agent.worker.actor.out:
            mean, std = layer.weight.chunk(2)
            parts = [(mean, 0.1), (std, 1.0)]
        for weight, scale in parts:
            fans = sum(nn.init._calculate_fan_in_and_fan_out(weight))
            assert 0.9 < weight.abs().max() / math.sqrt(6 * scale / fans) < 1.0001, layer
        assert layer.bias is None or not layer.bias.any()


def test_players_weigh_their_rewards_by_the_flags():
    agent = make_agent(worker_extr=0.5, manager_expl=0.3)
    assert agent.worker.rewards == {"goal": 1.0, "extr": 0.5}
    assert agent.manager.rewards == {"extr": 1.0, "expl": 0.3}
    assert make_agent(agent="dreamer").worker.rewards == {"extr": 1.0}


@pytest.mark.parametrize("space", [CONTINUOUS, DISCRETE])
@pytest.mark.parametrize("agent", ["director", "dreamer"])
def test_each_optimizer_moves_its_own_parameters_and_no_others(space, agent):
    agent = make_agent(space, agent=agent, slow_every=1000)
    agent.grad_steps = 1  # after the first copy to the slow critics
    batch = random_batch(np.random.default_rng(0), 2, 9, agent.discrete, agent.sizes["action"])
    metrics = check_optimizer_ownership(agent, batch)
    assert all(torch.isfinite(value) for value in metrics.values())
    assert all(param in optimizer.state for optimizer in agent.optimizers.values()
               for param in optimizer.params)


def test_slow_critics_are_copied_in_the_first_step_and_then_in_every_nth():
    agent, fresh = make_agent(DISCRETE, slow_every=3), []
    batch = random_batch(np.random.default_rng(0), 2, 9, True, 5)
    for _ in range(7):
        agent.train_step(batch)
        weights = agent.manager.critics["expl"].out.weight, agent.manager.slow["expl"].out.weight
        fresh.append(torch.equal(*weights))
    assert fresh == [True, False, False, True, False, False, True]


def test_returns_bootstrap_from_the_slow_critics_only():
    agent = make_agent(DISCRETE, worker_extr=0.5)
    imagined = agent.imagine(starts_at(torch.randn(4, 16), torch.randn(4, 16)))
    for name, traj in agent.player_trajectories(imagined).items():
        player = agent.players[name]
        for reward in player.rewards:
            player.slow[reward].out.bias.data.fill_(3.0)
            _, value = player.returns(reward, player.feat(traj), traj)
            assert (value > 5).all()  # those of the critics are near 0


def test_training_reads_whether_a_state_is_terminal_and_not_whether_it_is_the_last():
    metrics = []
    for last in (False, True):
        agent = make_agent(DISCRETE)
        batch = random_batch(np.random.default_rng(0), 2, 9, True, 5)
        batch["is_last"][:] = last
        torch.manual_seed(0)
        metrics.append({key: value.item() for key, value in agent.train_step(batch).items()})
    assert metrics[0] == metrics[1]


@pytest.mark.parametrize("target, scale", [(0, 1), (1e-3, 1), (1e9, 1.1**-3)])
def test_the_weight_of_the_kl_adapts_to_the_target_in_the_flag(target, scale):
    model, gen = make_agent(kl_target=target).world_model, torch.manual_seed(0)
    states = {"post": torch.randn(2, 3, 16, generator=gen), "prior": torch.zeros(2, 3, 16)}
    for _ in range(3):
        loss, metrics = model.kl_loss(states)
    close(metrics["kl_scale"], scale)  # which is at most 1
    close(loss.mean().detach(), metrics["kl"].detach() * scale, rtol=1e-5)


def test_worker_steps_and_manager_decisions_are_discounted_once_each(monkeypatch):
    agent, used = make_agent(DISCRETE, discount=0.8), []
    lambda_return, weights = director.lambda_return, director.trajectory_weights

    def record_return(reward, value, discount, lam):
        used.append(("return", len(reward), round(float(discount.max()), 3)))
        return lambda_return(reward, value, discount, lam)

    def record_weights(cont, discount):
        used.append(("weight", len(cont) - 1, discount))
        return weights(cont, discount)

    monkeypatch.setattr(director, "lambda_return", record_return)
    monkeypatch.setattr(director, "trajectory_weights", record_weights)
    agent.world_model.cont_head.forward = lambda feat: torch.full(feat.shape[:-1], 100.0)
    traj = agent.imagine(starts_at(torch.zeros(4, 16), torch.zeros(4, 16)))
    for name, player_traj in agent.player_trajectories(traj).items():
        agent.players[name].learn(player_traj, copy_slow=False)
    assert set(used) == {(kind, length, 0.8) for kind in ("return", "weight")
                         for length in (8, 2)}  # steps of the worker, decisions of the manager


def test_imagination_keeps_goals_for_eight_steps_and_has_gradients_for_continuous_actions_only():
    for space in (DISCRETE, CONTINUOUS):
        agent = make_agent(space, worker_extr=0.5)
        starts = {"deter": torch.randn(4, 16), "stoch": torch.randn(4, 16),
                  "is_terminal": torch.tensor([False, True, False, False])}
        traj = agent.imagine(starts)
        assert traj["deter"].shape == (17, 4, 16) and traj["reward_goal"].shape == (16, 4)
        close(traj["cont"][0], [1, 0, 1, 1])
        for key in ("reward_goal", "reward_extr", "deter", "cont"):
            assert traj[key].requires_grad == (space is CONTINUOUS)
        assert not any(traj[key].requires_grad for key in ("skill", "goal", "reward_expl"))
        assert len(traj["goal"].unique(dim=0)) == 3  # new goals at 0, 8 and 16
        close(traj["goal"][7], traj["goal"][0])
        assert not torch.equal(traj["goal"][8], traj["goal"][7])
        given = agent.imagine({**starts, "goal": torch.ones(4, 16)})
        assert (given["goal"] == 1).all()


@pytest.mark.parametrize("space", [CONTINUOUS, DISCRETE])
def test_imagined_codes_states_and_actions_are_samples(space):
    agent = make_agent(space)
    starts = starts_at(torch.zeros(30, 16), torch.zeros(30, 16))
    traj = agent.imagine(starts)
    assert len(traj["skill"][0].unique(dim=0)) > 5
    assert len(traj["stoch"][1].unique(dim=0)) > 5
    traj = agent.imagine({**starts, "goal": torch.zeros(30, 16)})  # all in the same state
    assert len(traj["action"][0].unique(dim=0)) > 3


@pytest.mark.parametrize("space", [CONTINUOUS, DISCRETE])
def test_only_the_worker_and_only_in_an_evaluation_takes_its_most_likely_action(space):
    agent = make_agent(space)
    state = agent.policy({"image": np.zeros((1, 64, 64, 3), np.uint8)})[1]
    going, first = np.zeros(1, bool), np.ones(1, bool)
    with torch.no_grad():
        best = agent.worker.dist(agent.worker.feat(state)).mode
        for mode in ("train", "eval"):
            actions = torch.cat([agent.act(state, going, mode)["action"] for _ in range(30)])
            assert (actions == best).all() == (mode == "eval")
            skills = torch.cat([agent.act(state, first, mode)["skill"] for _ in range(30)])
            assert len(skills.unique(dim=0)) > 1


def test_goal_reward_belongs_to_the_goal_under_which_the_action_was_taken():
    agent = make_agent(DISCRETE)
    traj = agent.imagine(starts_at(torch.randn(4, 16), torch.randn(4, 16)))
    close(traj["reward_goal"][7], director.max_cosine(traj["goal"][0], traj["deter"][8]))
    close(traj["reward_goal"][8], director.max_cosine(traj["goal"][8], traj["deter"][9]))


def test_the_goal_reward_is_logged_beside_that_of_exchanged_goals():
    agent = make_agent(DISCRETE)
    traj = agent.imagine(starts_at(torch.randn(4, 16), torch.randn(4, 16)))
    metrics = agent.train_imagined(traj)
    for key, goals in (("last", [0, 1, 2, 3]), ("other", [2, 3, 0, 1])):
        rewards = [director.max_cosine(traj["goal"][t, goals], traj["deter"][t + 1])
                   for t in (7, 15)]
        close(metrics[f"goal_reward_{key}"], torch.stack(rewards).mean())


def test_back_propagated_actor_gradient_matches_finite_differences(modes):
    agent = make_agent(CONTINUOUS, horizon=8, goal_duration=8)
    deter, stoch = torch.randn(6, 16), torch.zeros(6, 16)
    actor = agent.worker.actor

    def reward():
        traj = agent.imagine(starts_at(deter, stoch))
        return traj["reward_goal"].double().sum()

    # Samples are not differentiable and actors read detached states: switch both inputs off.
    agent.world_model.rssm.inputs[0].weight.data[:, :16] = 0
    actor.hidden[0].weight.data.zero_()
    actor.out.bias.data[:3] = 0.5
    gradient = torch.autograd.grad(reward(), actor.out.bias)[0]
    for index in range(3):
        values = []
        for eps in (0.01, -0.01):
            actor.out.bias.data[index] += eps
            values.append(float(reward().detach()))
            actor.out.bias.data[index] -= eps
        assert float(gradient[index]) == pytest.approx((values[0] - values[1]) / 0.02, rel=0.02)


def test_policy_restarts_with_each_episode_and_keeps_a_goal_for_eight_steps():
    agent, rng = make_agent(DISCRETE), np.random.default_rng(0)
    state, goals = None, []
    firsts = np.zeros((20, 2), bool)
    firsts[0] = firsts[11, 1] = True
    images = rng.integers(0, 256, (20, 2, 64, 64, 3)).astype(np.uint8)
    for t in range(20):
        action, state = agent.policy({"image": images[t], "is_first": firsts[t]}, state)
        assert action.shape == (2, 5) and (action.sum(-1) == 1).all()
        goals.append(state["goal"])
    changes = (torch.stack(goals)[1:] != torch.stack(goals)[:-1]).any(-1).T
    assert (1 + changes[0].nonzero().flatten()).tolist() == [8, 16]
    assert (1 + changes[1].nonzero().flatten()).tolist() == [8, 11, 19]
    fresh = agent.policy({"image": images[11], "is_first": ~firsts[11]}, None, "eval")[1]
    reset = agent.policy({"image": images[11], "is_first": firsts[0]}, state, "eval")[1]
    close(fresh["deter"], reset["deter"])


def test_training_and_acting_filter_the_same_states(modes):
    agent = make_agent(DISCRETE)
    batch = random_batch(np.random.default_rng(0), 3, 17, True, 5)
    with torch.no_grad():
        states = agent.world_model.observe(agent.tensors(batch))
        state = None
        for t in range(17):
            obs = {key: batch[key][:, t] for key in ("image", "is_first")}
            if state is not None:
                state["action"] = torch.tensor(batch["action"][:, t])
            _, state = agent.policy(obs, state)
            close(state["deter"], states["deter"][:, t], atol=1e-5)


def test_float64_observations_give_the_same_actions_as_float32():
    actions = []
    for dtype in (np.float32, np.float64):
        agent = make_agent(CONTINUOUS, spaces.Dict({"state": spaces.Box(-9, 9, (3,))}))
        torch.manual_seed(0)
        actions.append(agent.policy({"state": np.full((2, 3), 0.3, dtype)}, mode="eval")[0])
    assert torch.equal(*actions)


def test_standardized_states_give_the_same_losses_in_any_unit():
    space, results = spaces.Dict({"state": spaces.Box(-np.inf, np.inf, (3,))}), {}
    batch = random_batch(np.random.default_rng(0), 4, 9, True, 2)
    values = np.random.default_rng(1).normal(size=(4, 9, 3)).astype(np.float32)
    for size in ("xs", "paper"):
        for name, scale, shift in (("as it is", 1, 0), ("in other units", [30, 0.5, 7], 4)):
            state = np.float32(values * scale + shift)
            torch.manual_seed(0)
            agent = director.Director(space, spaces.Discrete(2), Config(size=size, **TINY))
            untrained, _ = agent.policy({"state": state[:, 0]})
            assert untrained.isfinite().all()
            for _ in range(2):  # the first call initializes the running moments
                torch.manual_seed(1)
                _, _, metrics = agent.world_model.loss(agent.tensors({**batch, "state": state}))
            results[size, name] = [metrics[f"{key}_loss"].item() for key in ("state", "kl")]
    close(results["xs", "in other units"], results["xs", "as it is"], rtol=1e-3)
    assert results["paper", "in other units"][0] > 100 * results["paper", "as it is"][0]
    target = agent.world_model.encoder.preprocess
    close(target("state", tensor([[300.0, 0, -7]])), [[300.0, 0, -7]])
    close(target("image", torch.full((1, 64, 64, 3), 51, dtype=torch.uint8)).unique(), [0.2])


def test_standardized_states_are_clipped():
    space = spaces.Dict({"state": spaces.Box(-np.inf, np.inf, (3,))})
    encoder = make_agent(obs=space, standardize="yes").world_model.encoder
    close(encoder.preprocess("state", tensor([[1e6, 0, -1e6]])), [[10.0, 0, -10.0]])


@pytest.mark.parametrize("space", [CONTINUOUS, DISCRETE])
def test_a_subclass_can_replace_the_manager_its_goals_and_its_rewards(space):
    class Agent(Director):
        """Its manager picks three numbers instead of a code, and its goals are not trained."""

        def build(self, action):
            super().build(action)
            self.sizes["skill"] = 3
            self.goals.decode = director.MLP(3, (self.config.deter,), self.config)
            self.optimizers["goals"] = director.Optimizer(self.goals, self.config)
            self.manager = self.player(("deter", "stoch"), (3,), False,
                                       {"extr": 1.0, "expl": 0.1}, reinforce=True)

        def choose(self, state, count):
            if count[0] % 8:
                return {}
            skill = self.manager.dist(self.manager.feat(state)).rsample().detach()
            return {"skill": skill, "goal": self.goals.decode(skill).detach()}

        def train_goals(self, states):
            assert states["deter"].shape[:2] == states["is_first"].shape == (2, 9)
            return {}

        def reward_expl(self, traj):
            return torch.ones_like(traj["cont"][1:])

    agent = make_variant(Agent, space)
    before = agent.manager.actor.out.weight.detach().clone()
    size = agent.sizes["action"]
    batch = random_batch(np.random.default_rng(0), 2, 9, agent.discrete, size)
    metrics = agent.train_step(batch)
    assert all(torch.isfinite(value) for value in metrics.values())
    traj = agent.imagine(starts_at(torch.randn(4, 16), torch.randn(4, 16)))
    assert (traj["reward_expl"] == 1).all() and traj["skill"].shape == (17, 4, 3)
    assert not torch.equal(before, agent.manager.actor.out.weight)
    action, state = agent.policy({"image": np.zeros((2, 64, 64, 3), np.uint8)})
    assert action.shape == (2, size) and state["skill"].shape == (2, 3)


# ---- Precision and speed --------------------------------------------------------------------


def test_bfloat16_gives_nearly_the_same_losses_and_gradients(modes, monkeypatch):
    monkeypatch.setattr(director.OneHot, "rsample", lambda dist: dist.probs)  # no sample can differ
    gradients, losses = [], []
    for precision in ("float32", "bfloat16"):
        agent = make_agent(precision=precision, deter=64, hidden=64, units=64, cnn_depth=8)
        batch = agent.tensors(random_batch(np.random.default_rng(0), 8, 17, False, 3))
        with director.autocast(agent.config):
            loss, _, metrics = agent.world_model.loss(batch)
        gradients.append(torch.autograd.grad(loss, agent.optimizers["world_model"].params))
        losses.append(metrics)
    for name in ("image_loss", "reward_loss", "cont_loss"):
        assert losses[1][name].item() == pytest.approx(losses[0][name].item(), rel=0.02), name
    for full, half in zip(*gradients, strict=True):
        assert (half - full).norm() < 0.15 * full.norm() + 1e-3, full.shape


def test_critics_keep_the_resolution_of_float32_in_bfloat16():
    """Values of neighboring states differ by 1%, which bfloat16 would round away."""
    agent = make_agent(precision="bfloat16", units=64)
    critic, feat = agent.manager.critics["extr"], torch.randn(200, 32)
    with torch.no_grad():
        critic.out.bias.fill_(3.0)
        exact = critic(feat).pred
        with director.autocast(agent.config):
            value = critic(feat).pred
    assert value.dtype == torch.float32 and 0 < (value - exact).std() < 0.1 * exact.std()
    assert len(value.unique()) > 150 > len(exact.bfloat16().unique())


def test_the_fast_decoder_equals_a_chain_of_transposed_convolutions():
    decoder, feat = make_agent().world_model.decoder, torch.randn(2, 3, 32)
    close(decoder(feat)["image"], decoder.image(feat.reshape(6, 32, 1, 1)).permute(0, 2, 3, 1)
          .sigmoid().reshape(2, 3, 64, 64, 3), rtol=1e-4)


class NoTransfers(TorchDispatchMode):
    """Fails if an operation waits for values of a GPU, or makes a tensor of Python's numbers.

    The latter is copied to the GPU, which a CUDA graph cannot record.
    """

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        assert name not in ("_local_scalar_dense", "nonzero", "equal", "is_nonzero"), name
        assert name != "lift_fresh"
        if name == "index":  # with a mask it would have to read how many elements are set
            assert all(i is None or i.dtype != torch.bool for i in args[1])
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("space", [CONTINUOUS, DISCRETE])
def test_a_train_step_updates_in_place_and_never_waits_for_the_gpu(space):
    agent = make_agent(space)
    batch = random_batch(np.random.default_rng(0), 2, 9, agent.discrete, agent.sizes["action"])
    batch = agent.tensors(batch)
    agent.train_step(batch)

    def tensors():
        states = [s for o in agent.optimizers.values() for s in o.state.values()]
        moments = [x for state in states for x in state.values()]
        return {x.data_ptr(): x.clone() for x in (*agent.state_dict().values(), *moments)}

    before, first = tensors(), agent.train_step(batch)
    values = {key: value.clone() for key, value in first.items()}
    after = tensors()
    with NoTransfers():
        agent.train_step(batch)
    assert before.keys() == after.keys()
    assert sum(not torch.equal(before[key], after[key]) for key in before) > 0.7 * len(before)
    assert all(torch.equal(first[key], values[key]) for key in first)  # metrics are copies


# ---- Learning: each test fails if its part is disconnected ----------------------------------


def pinpad_batch(size=2, length=8):
    env, rng, rows = PinPad("three"), np.random.default_rng(0), []
    obs, _ = env.reset(seed=0)
    for t in range(size * length):
        action = int(rng.integers(5))
        if t:
            obs = env.step(action)[0]
        reward = np.float32(env.player[0] > 12)  # in 11 of 16 steps
        rows.append((obs["image"], np.eye(5, dtype=np.float32)[action], reward))
    batch = random_batch(rng, size, length, True, 5)
    for key, values in zip(("image", "action", "reward"), zip(*rows, strict=True), strict=True):
        batch[key] = np.stack(values).reshape(size, length, *values[0].shape)
    return batch


@pytest.mark.slow
def test_world_model_learns_the_images_rewards_and_ends_of_a_batch():
    agent = make_agent(DISCRETE, deter=64, hidden=64, units=64, stoch=8, classes=8, cnn_depth=8,
                       learning_rate=8e-3)
    model, optimizer, first = agent.world_model, agent.optimizers["world_model"], None
    batch = agent.tensors(pinpad_batch())
    for _ in range(170):
        loss, states, metrics = model.loss(batch)
        first = first or metrics["image_loss"].item()
        optimizer.minimize(loss)
    assert metrics["image_loss"].item() < 0.02 * first
    feat = torch.cat([states["deter"], states["stoch"]], -1)
    # Except on first steps: no action predicts their reward, which is learned much later.
    right = (model.reward_head(feat).mean > 0.5) == (batch["reward"] > 0.5)
    assert right[~batch["is_first"]].all() and 0.2 < batch["reward"].mean() < 0.8
    ends = model.cont_head(feat) < 0
    assert torch.equal(ends, batch["is_terminal"])


def test_goal_autoencoder_reconstructs_known_states_and_finds_others_novel():
    agent = make_agent(units=64, layers=2, learning_rate=2e-3)
    deter = torch.randn(16, 16, generator=torch.manual_seed(0))
    for _ in range(400):
        loss, metrics = agent.goals.loss(deter)
        agent.optimizers["goals"].minimize(loss)
    assert float(metrics["goal_rec"].detach()) < 0.1 * float((deter**2).sum(-1).mean())
    new = torch.randn(64, 16, generator=torch.manual_seed(1))
    assert agent.goals.novelty(new).mean() > 5 * agent.goals.novelty(deter).mean()


@pytest.mark.parametrize("space", [CONTINUOUS, DISCRETE])
def test_worker_learns_to_reach_a_goal_in_a_fixed_world_model(space):
    agent = make_agent(space, learning_rate=3e-3, discount=0.9)
    rssm = agent.world_model.rssm
    rssm.inputs[0].weight.data[:, 16:] *= 3  # actions matter
    deter, stoch = torch.zeros(64, 16), torch.zeros(64, 16)
    action = torch.zeros(64, agent.sizes["action"])
    action[:, 1] = 1.0
    goal, other = deter, stoch
    with torch.no_grad():
        for _ in range(8):
            goal, other = rssm.img_step(goal, other, action)
    goal = goal.mean(0).expand(64, -1)
    rewards = []
    for step in range(60):
        traj = agent.imagine({**starts_at(deter, stoch), "goal": goal})
        rewards.append(traj["reward_goal"][4:8].mean().item())
        agent.worker.learn(director.split_trajectory(traj, 8), copy_slow=step % 10 == 0)
    assert np.mean(rewards[-10:]) > np.mean(rewards[:5]) + 0.1, (rewards[:5], rewards[-5:])


def test_manager_learns_to_pick_the_rewarded_code():
    config = Config(size="xs", **{**TINY, "learning_rate": 3e-3})
    torch.manual_seed(0)
    manager = director.ActorCritic(("deter",), 4, (1, 2), True, {"extr": 1.0, "expl": 0.1}, config)
    deter = torch.zeros(3, 64, 4)
    for step in range(100):  # later, the entropy is regulated to half of its maximum
        skill = manager.dist(deter).rsample().detach().flatten(-2)
        traj = {"deter": deter, "action": skill, "cont": torch.ones(3, 64),
                "reward_extr": skill[:2, :, 1], "reward_expl": torch.zeros(2, 64)}
        manager.learn(traj, copy_slow=step % 10 == 0)
    assert manager.dist(deter).probs[0, 0, 0, 1] > 0.9  # 0.95 or 0.96 on twenty seeds


# ---- Replay ---------------------------------------------------------------------------------


def add_steps(replay, episode, length, finished=True):
    """Add an episode whose state is its number and the step."""
    for t in range(length):
        replay.add({
            "state": np.array([[episode, t]]), "reward": np.zeros(1),
            "is_first": np.array([t == 0]), "is_last": np.array([finished and t == length - 1])})


def filled(lengths, capacity=10**6):
    """A replay of finished episodes of these lengths."""
    replay = Replay(capacity)
    for episode, length in enumerate(lengths):
        add_steps(replay, episode, length)
    return replay


def test_replay_samples_episodes_uniformly_and_their_ends_more_often():
    state = filled([20, 40]).sample(20_000, 8)["state"]
    assert (state[:, :, 0] == state[:, :1, 0]).all() and (np.diff(state[:, :, 1]) == 1).all()
    assert (state[:, 0, 0] == 0).mean() == pytest.approx(0.5, abs=0.02)
    starts = state[state[:, 0, 0] == 0][:, 0, 1]
    for start in range(12):
        assert (starts == start).mean() == pytest.approx(1 / 21, abs=0.01)
    assert (starts == 12).mean() == pytest.approx(9 / 21, abs=0.02)


def test_replay_joins_short_episodes_in_a_chunk_and_marks_them_by_is_first():
    batch = filled([3, 5, 2]).sample(500, 8)
    assert batch["is_first"][:, 0].all()
    jumps = (np.diff(batch["state"][..., 0]) != 0) | (np.diff(batch["state"][..., 1]) != 1)
    assert (batch["is_first"][:, 1:] == jumps).all() and jumps.sum(1).min() >= 1
    assert set(batch["state"][..., 0].flat) == {0, 1, 2}


def test_replay_keeps_what_was_added_when_the_arrays_are_used_again():
    replay = Replay(100)
    with pytest.raises(ValueError, match="the replay is empty"):
        replay.sample(1, 5)
    rows = {"state": np.zeros((1, 2), np.float32), "reward": np.zeros(1, np.float32),
            "is_first": np.ones(1, bool), "is_last": np.zeros(1, bool)}
    for t in range(5):
        rows["state"][:] = rows["reward"][:] = t
        rows["is_last"][:] = t == 4
        replay.add(rows)
    chunk = replay.sample(1, 5)
    assert chunk["reward"].tolist() == [[0, 1, 2, 3, 4]] and chunk["reward"].dtype == np.float32
    assert (chunk["state"] == chunk["reward"][..., None]).all()


def test_replay_samples_running_episodes_until_finished_ones_fill_a_batch():
    replay = Replay(1000)

    def sampled():
        return {tuple(row) for _ in range(100) for row in
                replay.sample(2, 8)["state"].reshape(-1, 2).tolist()}

    add_steps(replay, 0, 12, finished=False)
    assert sampled() == {(0, t) for t in range(12)}
    replay = filled([3])
    add_steps(replay, 1, 12, finished=False)
    both = {(0, t) for t in range(3)} | {(1, t) for t in range(12)}
    assert sampled() == both  # a single short episode is not all that is learned from
    replay = filled([3, 13])
    add_steps(replay, 2, 12, finished=False)
    assert {episode for episode, _ in sampled()} == {0, 1}


def test_replay_drops_the_oldest_episodes_first():
    replay = filled([10] * 20, capacity=100)
    assert replay.steps <= 100
    assert {episode["state"][0, 0] for episode in replay.episodes.values()} == set(range(10, 20))


def test_replay_loads_what_it_saved_except_damaged_episodes(tmp_path, capsys):
    replay = filled([10] * 6, capacity=40)
    add_steps(replay, 9, 3, finished=False)
    lengths = replay.save(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["3.npz", "4.npz", "5.npz", "6.npz"]
    loaded = Replay(40)
    rows = {key: np.zeros((1, 2)) if key == "state" else np.zeros(1)
            for key in ("state", "reward", "is_first", "is_last")}
    loaded.load(tmp_path, lengths, rows)
    assert loaded.steps == replay.steps == 33 and len(loaded.episodes) == 4
    assert loaded.episodes[6]["state"].tolist() == [[9, 0], [9, 1], [9, 2]]
    assert not capsys.readouterr().out
    # Damage one file, delete another, and let a third one hold something else.
    data = bytearray((tmp_path / "4.npz").read_bytes())
    data[len(data) // 2] ^= 1
    (tmp_path / "4.npz").write_bytes(data)
    (tmp_path / "6.npz").unlink()
    np.savez(tmp_path / "5.npz", state=np.zeros((10, 3)))
    loaded = Replay(40)
    with pytest.raises(director.UserError, match="1 of 4 replay files are missing"):
        loaded.load(tmp_path, lengths, rows)
    loaded.load(tmp_path, lengths, rows, skip_missing=True)
    assert list(loaded.episodes) == [3] and loaded.left_out == {4: 10, 5: 10}
    output = capsys.readouterr().out
    assert output.count("Continuing without") == 3
    assert "its state has the shape (10, 3)" in output


def test_new_episodes_of_a_resumed_run_do_not_replace_old_ones(tmp_path):
    replay = filled([10] * 6, capacity=40)
    loaded = Replay(40)
    loaded.load(tmp_path, replay.save(tmp_path))
    add_steps(loaded, 9, 10)
    assert list(loaded.episodes) == [3, 4, 5, 6]


def test_an_episode_that_was_saved_while_it_ran_is_saved_again_and_cut_to_its_checkpoint(tmp_path):
    replay = Replay(100)
    add_steps(replay, 0, 3, finished=False)
    first = replay.save(tmp_path)
    add_steps(replay, 0, 4)
    second = replay.save(tmp_path)
    for lengths, size in ((second, 7), (first, 3)):  # or the program ended before the checkpoint
        loaded = Replay(100)
        loaded.load(tmp_path, lengths, {"reward": np.zeros(1)})
        assert len(loaded.episodes[0]["state"]) == loaded.steps == size


# ---- Environments ---------------------------------------------------------------------------


@pytest.mark.parametrize(("task", "obs", "keys"), [
    pytest.param("dmc_walker_walk", "pixels", ["image"], marks=needs_rendering),
    pytest.param("dmc_cup_catch", "both", ["image", "state"], marks=needs_rendering),
    ("dmc_cartpole_swingup", "state", ["state"]),
    ("pinpad_six", "pixels", ["image"]),
    ("gym_CartPole-v1", "auto", ["state"]),
    ("gym_Pendulum-v1", "state", ["state"]),
    ("gym_FrozenLake-v1", "auto", ["state"]),
    ("gym_Mixed-v0", "auto", ["image", "state"]),
    ("gym_Mixed-v0", "pixels", ["image"]),
    ("gym_envs.pin_pad:PinPadFour-v0", "auto", ["image"])])
@pytest.mark.filterwarnings("ignore")
def test_environments_pass_the_gymnasium_checker(task, obs, keys):
    env = director.make_env(task, Config(task=task, obs=obs))
    check_env(env, skip_render_check=True)
    assert list(env.observation_space) == keys
    if isinstance(env.action_space, spaces.Box):
        assert (env.action_space.low == -1).all() and (env.action_space.high == 1).all()


@needs_rendering
def test_walker_images_show_movement_and_episodes_are_truncated_after_1000_steps():
    env = director.make_env("dmc_walker_walk", Config(task="dmc_walker_walk"))
    first, _ = env.reset(seed=1)
    image = env.step(np.ones(6, np.float32))[0]["image"]
    assert image.std() > 20 and not np.array_equal(image, first["image"])
    env = director.make_env("dmc_walker_walk", Config(task="dmc_walker_walk", obs="state"))
    env.reset(seed=1)
    for step in range(1, 1001):
        _, _, terminated, truncated, _ = env.step(np.zeros(6, np.float32))
        assert not terminated and truncated == (step == 1000)


@needs_rendering
def test_fast_rendering_changes_images_little():
    images = []
    for quality in ("full", "fast"):
        config = Config(task="dmc_walker_walk", render_quality=quality)
        images.append(director.make_env(config.task, config).reset(seed=0)[0]["image"])
    assert 0 < np.abs(np.subtract(*np.float32(images))).mean() < 10


@needs_rendering
@pytest.mark.parametrize(("task", "camera"), [("walker_walk", 0), ("quadruped_walk", 2)])
def test_images_of_dm_control_are_those_of_its_camera(task, camera):
    env = DMControl(task)
    image = env.reset(seed=0)[0]["image"]
    assert np.array_equal(image, env.env.physics.render(64, 64, camera_id=camera))


@pytest.mark.parametrize("discount", [0.0, 1.0])
def test_a_dm_control_episode_terminates_only_with_a_discount_of_zero(discount):
    env = DMControl("cartpole_balance", "state")
    env.reset(seed=0)
    last = env.env.step(np.zeros(1))._replace(step_type=dm_env.StepType.LAST, discount=discount)
    env.env.step = lambda action: last
    assert env.step(np.zeros(1))[2:4] == (discount == 0, discount == 1)


def test_large_pictures_are_averaged():
    checkers = np.uint8(255 * (np.indices((128, 128)).sum(0) % 2))
    image = resize("", spaces.Box(0, 255, (128, 128), np.uint8), checkers)
    assert np.abs(image.astype(int) - 127).max() <= 1


@pytest.mark.slow
def test_the_state_of_a_dm_control_task_is_one_vector_of_all_its_observations():
    from dm_control import suite
    config = Config(obs="state")
    for domain, task in suite.ALL_TASKS:
        if domain not in ("dog", "humanoid_CMU"):  # slow to load, and like the others
            env = director.make_env(f"dmc_{domain}_{task}", config)
            state = env.reset(seed=0)[0]["state"]
            specs = env.unwrapped.env.observation_spec().values()
            assert env.observation_space["state"].shape == state.shape
            assert state.size == sum(math.prod(spec.shape) for spec in specs), (domain, task)


def test_a_dict_observation_becomes_an_image_and_a_state_vector():
    env = director.make_env("gym_Mixed-v0", Config(task="gym_Mixed-v0"))
    env.reset(seed=0)
    obs = env.step(np.array([0.0, 1.0], np.float32))[0]
    assert (obs["image"] == 10).all() and obs["image"].shape == (64, 64, 3)
    # In the order of their names: gear, pose, speed.
    close(obs["state"], [0, 1, 0, 0, 0.25, 0.5, 0.75, 0.5, -0.5])
    close(env.unwrapped.action, [0.5, 3.0])


class Counter(gymnasium.Env):
    """Observes its step, last action and episode; every second episode is terminated."""

    observation_space = spaces.Dict({"state": spaces.Box(-9, 99, (3,), np.float32)})
    action_space = spaces.Box(-1, 1, (1,), np.float32)
    episodes = 0

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.time, self.length = 0, 3 + 2 * self.episodes % 7
        self.episodes += 1
        return {"state": np.array([0, 0, self.episodes], np.float32)}, {}

    def step(self, action):
        self.time += 1
        end = self.time == self.length
        obs = {"state": np.array([self.time, action[0], self.episodes], np.float32)}
        terminates = self.episodes % 2 == 0
        return obs, self.time / 10, end and terminates, end and not terminates, {}


@pytest.mark.parametrize("processes", [False, True])
def test_every_step_arrives_in_replay_once_with_its_action_reward_and_flags(processes):
    replay, ends = Replay(10**6), []
    with envs.vector.side_by_side([Counter] * 3, processes) as vector:
        driver = Driver(vector, seed=0)
        replay.add(driver.rows)
        for _ in range(60):
            driver.step(driver.random_action() * 1.5)
            replay.add(driver.rows)
            ends += [(driver.length[e], driver.score[e])
                     for e in range(3) if driver.rows["is_last"][e]]
    assert len(replay.episodes) == len(ends) > 20
    assert replay.steps == 3 * 61
    for episode, (length, score) in zip(replay.episodes.values(), ends, strict=True):
        size = len(episode["reward"])
        assert length == size - 1 and score == pytest.approx(sum(range(size)) / 10)
        close(episode["state"][:, 0], np.arange(size))
        close(episode["reward"], np.arange(size) / 10)
        close(episode["state"][:, 1], episode["action"][:, 0].clip(-1, 1))
        assert episode["action"][0] == 0 and (np.abs(episode["action"][1:]) > 0).all()
        assert episode["is_first"].tolist() == [True] + [False] * (size - 1)
        assert episode["is_last"].tolist() == [False] * (size - 1) + [True]
        assert not episode["is_terminal"][:-1].any()
        assert episode["is_terminal"][-1] == (episode["state"][-1, 2] % 2 == 0)
    assert np.abs(np.concatenate([e["action"] for e in replay.episodes.values()])).max() > 1


def fail(*args):
    raise ZeroDivisionError("deep inside")


@pytest.mark.parametrize("fails", [False, True])
def test_environments_are_closed_also_after_an_error(fails, monkeypatch):
    closed = []
    monkeypatch.setattr(Mixed, "close", lambda self: closed.append(self))
    both = director.vector_envs(Config(task="gym_Mixed-v0"), 2)
    with contextlib.suppress(ZeroDivisionError), both as vector:
        vector.reset()
        if fails:
            fail()
    assert len(set(map(id, closed))) == 2


# ---- Training, resuming, loading, evaluating ------------------------------------------------


def test_a_run_writes_metrics_and_a_checkpoint_that_the_same_command_resumes(tmp_path, capsys):
    flags = [*RUN, f"--logdir={tmp_path}"]
    assert director.main([*flags, "--steps=200"]) == 0
    assert "Actions are random until step 100" in capsys.readouterr().out
    assert director.main([*flags, "--steps=300", "--learning_rate=1e-3"]) == 0
    assert ("Resumed at step 200. --steps is 300, was 200. --learning_rate is 0.001, was 0.0004.\n"
            in capsys.readouterr().out)
    steps = [line["step"] for line in read_metrics(tmp_path) if "train/grad_steps" in line]
    assert steps == [50, 100, 150, 200, 250, 300]
    last = read_metrics(tmp_path)[-1]
    assert last["train/grad_steps"] == 25 and last["train/model_loss"] > 0
    accumulator = EventAccumulator(str(tmp_path), size_guidance={"scalars": 0})
    accumulator.Reload()
    names = {key for line in read_metrics(tmp_path) for key in line} - {"step", "seconds"}
    assert names == set(accumulator.Tags()["scalars"])
    events = accumulator.Scalars("train/model_loss")
    assert [event.step for event in events] == [150, 200, 250, 300]
    assert events[-1].value == pytest.approx(last["train/model_loss"])
    before = (tmp_path / "checkpoint.pt").read_bytes()
    for other in (["--agent=dreamer"], ["--deter=20"], ["--task=pinpad_four"]):
        assert director.main([*flags, *other, "--steps=400"]) == 2
        assert other[0].split("=")[0] in capsys.readouterr().err
    assert director.main([*flags, "--steps=300"]) == 0
    assert "for more, raise --steps" in capsys.readouterr().out
    assert (tmp_path / "checkpoint.pt").read_bytes() == before
    for agent_flags, rate in (({}, 1e-3), ({"learning_rate": 5e-4}, 5e-4)):
        agent = director.load(tmp_path, **agent_flags)
        rates = {group["lr"] for x in agent.optimizers.values() for group in x.param_groups}
        assert rates == {rate}


@pytest.mark.slow
def test_equal_seeds_give_equal_metrics_and_others_do_not(tmp_path):
    results = []
    for index, seed in enumerate((0, 0, 1)):
        flags = [*RUN, f"--seed={seed}", "--steps=200", f"--logdir={tmp_path}/{index}"]
        assert director.main(flags) == 0
        lines = read_metrics(tmp_path / str(index))
        assert lines[-1]["train/grad_steps"] == 13
        results.append([{key: value for key, value in line.items() if "second" not in key}
                        for line in lines])
    assert results[0] == results[1] != results[2]


def test_all_draws_depend_on_the_seed_and_on_the_step_at_which_a_run_starts():
    draws = []
    for seed, step in ((0, 0), (0, 0), (0, 160), (1, 0)):
        run = types.SimpleNamespace(config=Config(seed=seed), step=step, replay=Replay(9))
        draws.append((director.Run.reseed(run), int(run.replay.rng.integers(2**40)),
                      int(torch.randint(2**40, ()))))
    assert draws[0] == draws[1]
    assert all(len(set(column)) == 3 for column in zip(*draws, strict=True))


def test_environments_have_other_seeds_in_another_run_and_after_a_resume(tmp_path, monkeypatch):
    seeds = []

    class Recorded(Driver):
        def __init__(self, vector, seed):
            seeds.append(seed)
            super().__init__(vector, seed)

    monkeypatch.setattr(director, "Driver", Recorded)
    for seed, steps in ((0, 60), (0, 80), (1, 60)):
        assert director.main([*RUN, f"--seed={seed}", f"--steps={steps}",
                              f"--logdir={tmp_path}/{seed}"]) == 0
    assert len(set(seeds)) == 3


@pytest.mark.parametrize(("amount", "every"), [(2, 8), (4, 6), (4, 1), (3, 10)])
def test_each_multiple_of_a_period_is_due_once(amount, every):
    run = types.SimpleNamespace(config=Config(envs=amount), step=0)
    total = 0
    for run.step in range(amount, 121, amount):
        total += director.Run.times_due(run, every)
        assert total == run.step // every


def test_a_run_and_an_evaluation_hand_the_policy_its_last_state(tmp_path, monkeypatch):
    calls, policy = [], Director.policy

    def record(self, obs, state=None, mode="train"):
        action, new = policy(self, obs, state, mode)
        calls.append((mode, state, new))
        return action, new

    monkeypatch.setattr(Director, "policy", record)
    flags = [*RUN, "--task=gym_envs.grid:Corridor-v0", "--processes=no", f"--logdir={tmp_path}"]
    for mode, more in (("train", "--steps=120"), ("eval", "--eval=1")):
        calls.clear()
        assert director.main([*flags, more]) == 0
        assert len(calls) > 9 and {call[0] for call in calls} == {mode} and calls[0][1] is None
        assert all(after[1] is before[2] for before, after in itertools.pairwise(calls))


@pytest.mark.parametrize("task", ["pinpad_three", "gym_Pendulum-v1"])
@pytest.mark.parametrize(("random", "first_choice"), [(160, 160), (0, 100)])
def test_random_actions_last_until_the_flag_while_training_starts_after_prefill(
        task, random, first_choice, tmp_path, monkeypatch):
    chosen, policy = [], Director.policy

    def record(self, *args):
        chosen.append(self.grad_steps)
        return policy(self, *args)

    monkeypatch.setattr(Director, "policy", record)
    flags = [*RUN, f"--task={task}", f"--random={random}", "--steps=200", f"--logdir={tmp_path}"]
    assert director.main(flags) == 0
    assert len(chosen) == (200 - first_choice) / 2 + 1
    assert chosen[0] == (first_choice - 96) // 8  # gradient steps that were taken by then
    lines = [line for line in read_metrics(tmp_path) if "train/grad_steps" in line]
    assert [line["train/grad_steps"] for line in lines] == [0, 0, 6, 13]


def test_a_gradient_step_precedes_the_first_choice_of_the_policy(tmp_path, monkeypatch):
    chosen, policy = [], Director.policy

    def record(self, *args):
        chosen.append(self.grad_steps)
        return policy(self, *args)

    monkeypatch.setattr(Director, "policy", record)
    flags = [*RUN, "--prefill=48", "--steps=64", f"--logdir={tmp_path}"]
    assert director.main([*flags, "--task=gym_CartPole-v1"]) == 0
    assert chosen[0] == 1 and len(chosen) == (64 - 48) / 2 + 1


def test_reports_print_the_returns_since_the_last_one_and_metrics_keep_each(tmp_path, capsys):
    flags = [*RUN, "--task=gym_CartPole-v1", "--steps=300", f"--logdir={tmp_path}"]
    assert director.main(flags) == 0
    lines = re.findall(r"step (\d+): .*?(\d+) episodes with returns ([\d.]+) to ([\d.]+), mean "
                       r"([\d.]+)", capsys.readouterr().out)
    assert [int(line[0]) for line in lines] == [50, 100, 150, 200, 250, 300]
    episodes = [x for x in read_metrics(tmp_path) if "episode/score" in x]
    assert len(episodes) > 8
    for step, count, low, high, mean in lines:
        scores = [x["episode/score"] for x in episodes if int(step) - 50 < x["step"] <= int(step)]
        assert int(count) == len(scores)
        close([float(low), float(high), float(mean)],
              [min(scores), max(scores), np.mean(scores)], atol=0.051)


def test_reported_metrics_are_means_since_the_last_report(tmp_path, monkeypatch):
    def count(self, batch):
        self.grad_steps += 1
        value = torch.tensor(float(self.grad_steps))
        rare = {"rare": value} if self.grad_steps % 5 == 0 else {}
        return {"model_loss": value, **rare}

    monkeypatch.setattr(Director, "train_step", count)
    assert director.main([*RUN, "--steps=200", f"--logdir={tmp_path}"]) == 0
    lines = [line for line in read_metrics(tmp_path) if "train/model_loss" in line]
    # Of gradient steps 1 to 6, and 7 to 13; one of them in each report is a multiple of 5.
    assert [line["train/model_loss"] for line in lines] == [3.5, 10.0]
    assert [line["train/rare"] for line in lines] == [5.0, 10.0]


def test_repeated_actions_are_one_step_and_frames_are_logged(tmp_path):
    flags = [*RUN, "--task=gym_CartPole-v1", "--action_repeat=3", "--steps=150"]
    assert director.main([*flags, f"--logdir={tmp_path}"]) == 0
    lines = read_metrics(tmp_path)
    assert all(line["frames"] == 3 * line["step"] for line in lines) and lines[-1]["step"] == 150
    for line in lines:
        if "episode/score" in line:  # CartPole gives 1 for each frame
            assert line["episode/length"] == math.ceil(line["episode/score"] / 3)


def test_track_starts_weights_and_biases_before_events_are_written(tmp_path, monkeypatch, capsys):
    calls, ended = [], []

    def init(**kwargs):
        calls.append(kwargs)
        assert not list(tmp_path.glob("events.*"))
        return types.SimpleNamespace(finish=lambda exit_code: ended.append(exit_code))

    monkeypatch.setenv("WANDB_PROJECT", "mine")
    flags = [*RUN, "--track", "--steps=60", f"--logdir={tmp_path}"]
    monkeypatch.setitem(sys.modules, "wandb", None)  # as if it were not installed
    assert director.main(flags) == 2
    error = capsys.readouterr().err
    assert "pip install wandb" in error and error.count("\n") == 1
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    assert director.main(flags) == 0
    call, = calls
    assert ended == [0]
    assert call["project"] == "mine" and call["sync_tensorboard"]
    assert call["name"] == tmp_path.name and call["config"]["task"] == "pinpad_three"
    assert call["id"] == json.loads((tmp_path / "config.json").read_text())["run_id"]


@pytest.mark.slow
@needs_rendering
def test_the_quality_of_images_is_decided_once_for_a_run(tmp_path, monkeypatch, capsys):
    chosen, find = [], envs.dmc.default_quality
    monkeypatch.setattr(envs.dmc, "default_quality", lambda: chosen.append(1) or "fast")
    flags = [*RUN, "--task=dmc_cartpole_balance", "--processes=no", f"--logdir={tmp_path}"]
    assert director.main([*flags, "--steps=60"]) == 0
    monkeypatch.setattr(envs.dmc, "default_quality", find)
    assert director.main([*flags, "--steps=80"]) == 0
    assert director.load(tmp_path).config.render_quality == "fast" and len(chosen) == 1
    assert director.main([*flags, "--steps=90", "--render_quality=full"]) == 2
    assert "--render_quality fast" in capsys.readouterr().err
    assert director.main([*flags, "--steps=90", "--obs=state"]) == 2
    assert "holds a run in Dict('image'" in capsys.readouterr().err
    monkeypatch.setattr(envs.make, "LONGEST_EPISODE", 30)
    assert director.main([f"--logdir={tmp_path}", "--render_quality=auto", "--eval=1"]) == 0


@pytest.mark.slow
def test_pictures_do_not_change_what_a_run_learns(tmp_path):
    results = []
    for every in (100, 1000):
        folder = tmp_path / str(every)
        flags = [*RUN, "--task=gym_ShortPinPad-v0", f"--logdir={folder}", "--steps=300"]
        assert director.main([*flags, "--train_every=16", f"--video_every={every}"]) == 0
        assert (folder / "pictures").exists() == (every == 100)
        results.append([{key: value for key, value in line.items() if "second" not in key}
                        for line in read_metrics(folder)])
    assert results[0] == results[1]
    first_picture = min(int(path.name.split("-")[0]) for path in tmp_path.glob("*/pictures/*"))
    assert first_picture < results[0][-1]["step"] - 50  # the run learned after it


@pytest.mark.slow
def test_a_resumed_run_learns_exactly_like_an_uninterrupted_one(tmp_path):
    def make_run(folder):
        config = Config(task="pinpad_three", size="xs", **TINY, batch_size=2, batch_length=16,
                        logdir=str(tmp_path / folder), slow_every=7)
        return director.Run(config, Director, spaces.Dict({"image": IMAGE}), DISCRETE)

    def learn(run, steps):
        return [{key: value.item() for key, value in run.agent.train_step(
            run.replay.sample(2, 16)).items()} for _ in range(steps)]

    run, rng = make_run("run"), np.random.default_rng(0)
    run.open()
    for _ in range(8):
        for t in range(20):
            batch = random_batch(rng, 2, 9, True, 5)
            rows = {key: value[0, t % 9][None] for key, value in batch.items()}
            rows |= {"is_first": np.array([t == 0]), "is_last": np.array([t == 19])}
            run.replay.add(rows)
    run.reseed()
    learn(run, 10)
    run.step = 160
    run.save()
    run.reseed()
    expected = learn(run, 10)
    run.lock.release()
    torch.manual_seed(123)
    resumed = make_run("run")
    resumed.reseed()
    resumed.replay.load(resumed.replay_dir, resumed.agent.resumed_from["episodes"], rows)
    assert resumed.step == 160 and learn(resumed, 10) == expected


@pytest.mark.parametrize("flags", [
    ["--task=gym_Pendulum-v1"], ["--task=gym_Mixed-v0", "--worker_extr=0.5"],
    pytest.param(["--task=dmc_cartpole_balance", "--obs=state"], marks=pytest.mark.slow)])
def test_continuous_tasks_train_resume_and_play(flags, tmp_path):
    flags = [*RUN, *flags, f"--logdir={tmp_path}"]
    for steps in (120, 160):
        assert director.main([*flags, f"--steps={steps}"]) == 0
    assert read_metrics(tmp_path)[-1]["train/grad_steps"] == 8
    assert director.main([f"--logdir={tmp_path}", "--eval=1"]) == 0


@pytest.mark.slow
@pytest.mark.parametrize("agent", ["director", "dreamer"])
def test_evaluation_needs_only_the_folder_and_writes_scores_and_pictures(agent, tmp_path, capsys):
    flags = [*RUN, "--task=gym_ShortPinPad-v0", f"--agent={agent}", f"--logdir={tmp_path}",
             "--steps=300", "--train_every=32", "--video_every=150"]
    assert director.main(flags) == 0
    names = {"episode", "openloop"}
    pictures = [path.stem.split("-") for path in (tmp_path / "pictures").iterdir()]
    assert {name for _, name in pictures} == names
    assert all(step.isdigit() for step, _ in pictures)
    assert director.main([f"--logdir={tmp_path}", "--eval=2"]) == 0
    result = json.loads((tmp_path / "eval.json").read_text())
    assert len(result["scores"]) == 2 and result["mean"] == np.mean(result["scores"])
    assert f"mean so far {result['mean']:.1f} +- " in capsys.readouterr().out
    pictures = {name: imageio.mimread(tmp_path / f"pictures/eval-{name}.gif") for name in names}
    columns = 2 if agent == "director" else 1
    assert pictures["episode"][0].shape[:2] == (64, 64 * columns)
    assert pictures["openloop"][0].shape[:2] == (192, 384)
    first = PinPad("three").reset(seed=0)[0]["image"]
    error = np.abs(pictures["episode"][0][:64, :64, :3].astype(int) - first)
    assert error.mean() < 5 and error.max() <= 24  # a GIF has 256 colors


def test_an_evaluation_reads_the_checkpoint_once(tmp_path, monkeypatch):
    flags = [*RUN, "--task=gym_Corridor-v0", "--steps=120", f"--logdir={tmp_path}"]
    assert director.main(flags) == 0
    reads, read_checkpoint = [], envs.folder.read_checkpoint

    def record(path):
        reads.append(path)
        return read_checkpoint(path)

    monkeypatch.setattr(envs.folder, "read_checkpoint", record)
    assert director.main(["--eval=1", f"--logdir={tmp_path}"]) == 0
    assert reads == [tmp_path / "checkpoint.pt"]


def test_a_trained_agent_loads_and_acts_without_its_environment_after_its_folder_moved(tmp_path):
    flags = [*RUN, "--task=gym_ShortPinPad-v0", "--steps=150"]
    assert director.main([*flags, f"--logdir={tmp_path}/old"]) == 0
    weights = torch.load(tmp_path / "old/checkpoint.pt", weights_only=True)["agent"]
    (tmp_path / "old").rename(tmp_path / "new")
    agent, state = director.load(tmp_path / "new", device="cpu"), None
    assert all(torch.equal(value, weights[key]) for key, value in agent.state_dict().items())
    images = np.zeros((3, 64, 64, 3), np.uint8)
    for _ in range(9):
        action, state = agent.policy({"image": images}, state)
        assert action.shape == (3, 5) and (action.sum(-1) == 1).all()
    assert state["count"].tolist() == [9, 9, 9]
    assert agent.grad_steps == 6 and agent.config.logdir == str(tmp_path / "new")
    with pytest.raises(director.UserError, match="old"):
        director.load(tmp_path / "old")
    assert director.main(["--eval=1", f"--logdir={tmp_path}/new"]) == 0
    assert (tmp_path / "new/eval.json").exists() and not (tmp_path / "old").exists()


CURIOUS = [*RUN, "--task=gym_CartPole-v1"]


def run_curious(folder):
    (folder / "curious.py").write_text(f"""
from __future__ import annotations  # with it, dataclasses know types by their names only
import dataclasses, sys
sys.path.insert(0, {str(HERE)!r})
import director
@dataclasses.dataclass
class Config(director.Config):
    sizes = {{name: row | {{"hops": 3}} for name, row in director.SIZES.items()}}
    thirst: float = director.flag(0.5, "for novelty", low=0, group="curious", fixed=True)
    hops: int = director.flag(None, "set by the size")
class Agent(director.Director):
    Config = Config
    def reward_expl(self, traj):
        assert self.config.hops == 3
        return self.config.thirst * super().reward_expl(traj)
if __name__ == "__main__":
    sys.exit(director.main(agent=Agent))
""")
    command = [sys.executable, "curious.py", *CURIOUS, "--steps=150", "--thirst=2"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
    assert done.stderr == ""


@pytest.mark.slow
def test_a_variant_has_flags_a_folder_and_checkpoints_of_its_own(background, monkeypatch, capsys):
    folder = background / "runs/gym_CartPole-v1/curious-xs-0"
    assert (folder / "checkpoint.pt").exists()
    monkeypatch.chdir(background)
    monkeypatch.syspath_prepend(background)
    agent = importlib.import_module("curious").Agent
    assert director.main([*CURIOUS, "--steps=150"], agent) == 2
    assert "--thirst 2.0, not 0.5" in capsys.readouterr().err
    assert director.main([*CURIOUS, "--thirst=-1"], agent) == 2
    assert "--thirst -1.0: must be from 0" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        director.main(["--help"], agent)
    printed = capsys.readouterr().out
    assert "curious:" in printed and "[paper 3, s 3, xs 3]" in printed
    assert director.main([*CURIOUS, f"--logdir={folder}"]) == 2
    assert "holds a run of curious" in capsys.readouterr().err
    assert director.main(["--eval=1", f"--logdir={folder}"], agent) == 0


@pytest.mark.slow
def test_an_agent_from_a_notebook_has_a_default_folder():
    program = ("import director\nclass Agent(director.Director): pass\n"
               "print(director.run_folder(Agent.Config(size='xs'), Agent))")
    printed = subprocess.check_output([sys.executable, "-c", program], cwd=HERE, text=True)
    assert printed.endswith("notebook-xs-0\n")


def test_a_mistake_in_a_subclass_is_shown_with_its_traceback_not_as_a_damaged_file(tmp_path):
    class Broken(Director):
        compatible_variants = ("director",)

        def build(self, action):
            super().build(action)
            self.config.no_such_setting  # noqa: B018

    class Reads(Director):
        compatible_variants = ("director",)

        def policy(self, *args, **kwargs):
            return open(tmp_path / "no_such_file")  # noqa: SIM115

    assert director.main([*RUN, "--task=gym_CartPole-v1", "--steps=150",
                          f"--logdir={tmp_path}"]) == 0
    for agent, error in ((Broken, AttributeError), (Reads, FileNotFoundError)):
        with pytest.raises(error):
            director.main(["--eval=1", f"--logdir={tmp_path}"], agent)


def test_a_program_evaluates_with_the_settings_of_the_run(tmp_path, monkeypatch):
    configs, vector_envs = [], director.vector_envs

    def record(config, amount):
        configs.append(config)
        return vector_envs(config, amount)

    monkeypatch.setattr(director, "vector_envs", record)
    flags = [*RUN, "--task=gym_CartPole-v1", "--action_repeat=3", "--steps=150"]
    assert director.main([*flags, f"--logdir={tmp_path}"]) == 0
    scores = director.evaluate(Config(logdir=str(tmp_path), eval=2))
    assert configs[1].task == "gym_CartPole-v1" and configs[1].action_repeat == 3
    assert len(scores) == 2 and json.loads((tmp_path / "eval.json").read_text())["scores"] == scores


# ---- Mistakes -------------------------------------------------------------------------------


@pytest.mark.parametrize(("flags", "words"), [
    (["--task=dmc_walker_wlak", "--obs=state"], ["dmc_walker_walk", "dmc_cheetah_run"]),
    (["--task=pinpad_there"], ["PinPadThree"]),
    (["--task=gym_CartPole-v7"], ["CartPole", "v1"]),
    (["--task=gym_no_such_module:Id-v0"], ["no_such_module"]),
    (["--task=gym_a:b:Id-v0"], ["No module named 'a:b'"]),
    (["--task=gym_:Id-v0"], ["Environment `Id` doesn't exist"]),
    (["--task=walker"], ["dmc_<domain>_<task>"]),
    (["--task=gym_envs.pin_pad:PinPadThree-v0", "--obs=state"], ["shows image only"]),
    (["--task=gym_CartPole-v1", "--obs=pixels"], ["shows state only"]),
    (["--task=gym_Strange-v0"], ["combine_actions"]),
    (["--horizon=12"], ["multiple of --goal_duration"]),
    (["--batch_size=0"], ["from 1"]),
    (["--units=-5"], ["from 1"]),
    (["--learning_rate=nan"], ["from 0"]),
    (["--discount=1.5"], ["to 1"]),
    (["--steps=many"], ["invalid integer value"]),
    (["--steps=1.5"], ["invalid integer value"]),
    (["--size=huge"], ["paper"]),
    (["--no_such_flag"], ["--no_such_flag"]),
    (["--eval=3", "--task=pinpad_three"], ["checkpoint.pt"]),
    (["--eval=3", "--logdir=nothing"], ["nothing/checkpoint.pt"]),
    (["--steps=inf"], ["invalid integer value"]),
    (["--seed=1e20"], ["--seed", "4.29497e+09"]),
    (["--skill_classes=1"], ["from 2"]),
    (["--discount=0"], ["from 0.01"]),
    (["--task=gym_Channels-v0"], ["channel-first"]),
    (["--task=gym_Integers-v0"], ["of floats"])])
def test_bad_input_gets_one_line_and_exit_code_2_before_anything_is_written(
        flags, words, tmp_path, monkeypatch, capsys):
    class Strange(Corridor):
        action_space = spaces.MultiBinary(3)

    class Integers(Corridor):
        action_space = spaces.Box(0, 9, (2,), np.int32)

    class Channels(Corridor):
        observation_space = spaces.Box(0, 255, (4, 84, 84), np.uint8)

    for env in (Strange, Integers, Channels):
        if f"{env.__name__}-v0" not in gymnasium.registry:
            gymnasium.register(f"{env.__name__}-v0", env)
    monkeypatch.chdir(tmp_path)
    assert director.main(flags) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and all(word in error for word in words), error
    assert not list(tmp_path.iterdir())


def run_without_opengl(folder):
    env = {**os.environ, "MUJOCO_GL": "osmesa", "PYOPENGL_PLATFORM": "osmesa", "DISPLAY": "",
           "LD_LIBRARY_PATH": "/nowhere"}
    code = ("import ctypes.util, sys, director; ctypes.util.find_library = lambda name: None; "
            "sys.exit(director.main(['--task=dmc_walker_walk', '--device=cpu']))")
    done = subprocess.run([sys.executable, "-c", code], env=env, cwd=HERE, check=False,
                          capture_output=True, text=True)
    (folder / "error").write_text(done.stderr)
    assert done.returncode == 2, done.stderr


def test_an_attempt_to_render_without_opengl_does_not_prevent_numbers(monkeypatch):
    def render(*args):
        raise RuntimeError("no OpenGL")

    for name in ("DISPLAY", "MUJOCO_GL", "PYOPENGL_PLATFORM"):
        monkeypatch.delenv(name, raising=False)
    import_suite(render=False)
    monkeypatch.setattr("dm_control.mujoco.Physics.from_xml_string", render)
    before = dict(os.environ)
    with pytest.raises(ImportError, match="--obs state"):
        import_suite(render=True)
    assert dict(os.environ) == before


@pytest.mark.slow
def test_without_opengl_the_error_says_what_to_install(background):
    error = (background / "error").read_text()
    assert error.count("\n") == 1, error
    assert "libegl1 libgl1-mesa-dri" in error and "--obs state" in error


def test_a_folder_that_holds_no_run_is_refused_and_left_unchanged(tmp_path, capsys):
    (tmp_path / "replay").mkdir()
    (tmp_path / "replay/thesis.npz").write_text("mine")
    (tmp_path / "file").write_text("mine")
    (tmp_path / "config.json").write_text('{"steps": 3}')
    (tmp_path / "lock").write_text("mine")
    (tmp_path / "metrics.jsonl").write_text("mine")
    (tmp_path / ".tmp-0123456789abcdef").write_text("mine")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for logdir in (tmp_path, tmp_path / "file", tmp_path / "file" / "below"):
        assert director.main([*RUN, f"--logdir={logdir}"]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and str(tmp_path) in error
    after = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert before == after and len(before) == 6


@pytest.mark.parametrize("spaces_now", [
    {"observation_space": spaces.Box(0, 1, (9,), np.float32), "cells": 9},
    {"action_space": spaces.Discrete(4)},
    {"action_space": spaces.Box(0, 1, (3,), np.float32)}])
def test_an_environment_with_other_spaces_is_refused_and_the_run_stays_unchanged(
        spaces_now, tmp_path, monkeypatch, capsys):
    flags = [*RUN, "--task=gym_Corridor-v0", f"--logdir={tmp_path}"]
    assert director.main([*flags, "--steps=130"]) == 0
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.npz")}
    before |= {path: path.read_bytes() for path in [tmp_path / "checkpoint.pt"]}
    with monkeypatch.context() as patch:
        for key, value in spaces_now.items():
            patch.setattr(Corridor, key, value)
        for more in (["--steps=200"], ["--eval=1"]):
            assert director.main([*flags, *more]) == 2
            error = capsys.readouterr().err
            assert error.count("\n") == 1 and "holds a run in Dict" in error, error
    assert all(path.read_bytes() == data for path, data in before.items()) and len(before) > 4
    assert director.main([*flags, "--steps=200"]) == 0
    assert "Continuing without" not in capsys.readouterr().out


# ---- Files ----------------------------------------------------------------------------------


def test_written_files_replace_links_and_have_the_permissions_of_the_umask(tmp_path):
    (tmp_path / "mine").write_text("mine")
    (tmp_path / "file").symlink_to(tmp_path / "mine")
    director.write_file(tmp_path / "file", io.BytesIO(b"new"))
    assert (tmp_path / "mine").read_text() == "mine"
    assert (tmp_path / "file").read_text() == "new" and not (tmp_path / "file").is_symlink()
    umask = os.umask(0)
    os.umask(umask)
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o666 & ~umask


def test_a_run_deletes_its_old_episodes_and_temporary_files_and_nothing_else(tmp_path):
    flags = [*RUN, "--task=gym_CartPole-v1", f"--logdir={tmp_path}", "--replay_size=60"]
    assert director.main([*flags, "--steps=120"]) == 0
    folder, = (tmp_path / "replay").iterdir()
    before = {path.name for path in folder.iterdir()}
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "replay/0.npz").write_text("mine")
    (tmp_path / "replay/.tmp-0123456789abcdef").write_text("mine")
    (folder / f".tmp-{folder.name}").write_text("half an episode")  # of a process that was killed
    (tmp_path / f".tmp-{folder.name}").write_text("half a checkpoint")
    (folder / "1000.npz").write_text("of a checkpoint that was never written")
    assert director.main([*flags, "--steps=300"]) == 0
    for name in ("notes.txt", "replay/0.npz", "replay/.tmp-0123456789abcdef"):
        assert (tmp_path / name).read_text() == "mine"
    names = {path.name for path in folder.iterdir()}
    assert names == {f"{name}.npz" for name in director.load(tmp_path).resumed_from["episodes"]}
    assert not names & before and not (tmp_path / f".tmp-{folder.name}").exists()


def test_files_of_another_run_in_the_folder_are_never_read_or_changed(tmp_path, capsys):
    flags = [*RUN, "--task=gym_CartPole-v1"]
    for name in ("a", "b"):
        assert director.main([*flags, f"--logdir={tmp_path}/{name}", "--steps=150"]) == 0
    for folder in (tmp_path / "b/replay").iterdir():
        folder.rename(tmp_path / "a/replay" / folder.name)
    before = {path: path.read_bytes() for path in folder.parent.parent.parent.rglob("*.npz")}
    # A checkpoint whose episodes are not there is refused, and so is one of another run.
    assert director.main([*flags, f"--logdir={tmp_path}/b", "--steps=200"]) == 2
    error = capsys.readouterr().err
    assert "replay files are missing" in error and error.count("\n") == 1
    # Without its checkpoint, a run begins anew beside the old files.
    (tmp_path / "a/checkpoint.pt").rename(tmp_path / "checkpoint.pt")
    assert director.main([*flags, f"--logdir={tmp_path}/a", "--steps=150"]) == 0
    assert len(list((tmp_path / "a/replay").iterdir())) == 3
    (tmp_path / "checkpoint.pt").rename(tmp_path / "a/checkpoint.pt")
    assert director.main([*flags, f"--logdir={tmp_path}/a", "--steps=200"]) == 2
    assert "is of another run than config.json" in capsys.readouterr().err
    assert all(path.read_bytes() == data for path, data in before.items() if path.exists())
    assert sum(path.exists() for path in before) == len(before)


def test_replay_files_that_cannot_be_used_stay_on_disk(tmp_path, capsys):
    flags = [*RUN, "--task=gym_CartPole-v1", f"--logdir={tmp_path}"]
    assert director.main([*flags, "--steps=150"]) == 0
    damaged = sorted(tmp_path.glob("replay/*/*.npz"))[:2]
    for path in damaged:
        path.write_bytes(path.read_bytes()[:-9])
    for steps in (200, 250):  # in later resumed runs, too
        assert director.main([*flags, f"--steps={steps}"]) == 0
        assert capsys.readouterr().out.count("Continuing without") == 2
        assert all(path.exists() for path in damaged)
    for path in tmp_path.glob("replay/*/*.npz"):
        path.write_bytes(path.read_bytes()[:-9])
    assert director.main([*flags, "--steps=300"]) == 2
    assert "no replay file can be used" in capsys.readouterr().err


def test_missing_replay_files_are_not_forgotten_unless_a_flag_says_so(tmp_path, capsys):
    flags = [*RUN, "--task=gym_CartPole-v1", f"--logdir={tmp_path}"]
    assert director.main([*flags, "--steps=150"]) == 0
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    (tmp_path / "replay").rename(tmp_path / "moved")
    assert director.main([*flags, "--steps=200"]) == 2
    error = capsys.readouterr().err
    assert re.search(r"(\d+) of \1 replay files are missing", error) and "--skip_missing" in error
    (tmp_path / "moved").rename(tmp_path / "replay")
    assert all(path.read_bytes() == data for path, data in before.items())
    next(tmp_path.glob("replay/*/*.npz")).unlink()
    assert director.main([*flags, "--steps=200", "--skip_missing"]) == 0
    assert capsys.readouterr().out.count("Continuing without") == 1
    for path in tmp_path.glob("replay/*/*.npz"):
        path.unlink()
    assert director.main([*flags, "--steps=250", "--skip_missing"]) == 2
    assert "no replay file can be used" in capsys.readouterr().err


def test_a_resumed_run_accepts_what_shows_the_same_observations(tmp_path, capsys):
    flags = [*RUN, "--task=gym_envs.grid:Grid-v0", "--processes=no", f"--logdir={tmp_path}"]
    for steps, obs in ((40, "state"), (60, "auto"), (80, "state"), (100, "auto")):
        assert director.main([*flags, f"--steps={steps}", f"--obs={obs}"]) == 0
    assert director.main([f"--logdir={tmp_path}", "--obs=state", "--eval=1"]) == 0
    for more in ([*flags, "--steps=120"], [f"--logdir={tmp_path}", "--eval=1"]):
        assert director.main([*more, "--obs=pixels"]) == 2
        assert capsys.readouterr().err.count("\n") == 1
    flags = [*RUN, "--task=pinpad_three", f"--logdir={tmp_path / 'pixels'}"]
    assert director.main([*flags, "--steps=40"]) == 0
    assert director.main([*flags, "--steps=60", "--obs=state"]) == 2
    error = capsys.readouterr().err
    assert "holds a run in" in error and error.count("\n") == 1


def test_a_run_that_is_interrupted_while_it_closes_has_released_its_folder(tmp_path):
    class Run(director.Run):
        def close(self):
            self.handlers = {"no signal": None}  # signal.signal raises, as after Ctrl-C
            super().close()

    class Agent(director.Director):
        pass

    Agent.Run = Run
    before = {number: signal.getsignal(number) for number in envs.vector.SIGNALS}
    flags = director.parse_args([*RUN, "--steps=60", f"--logdir={tmp_path}"], Config)
    try:
        for _ in range(2):  # the second time, the folder is not locked
            with pytest.raises(TypeError):
                director.train(Config(**flags), Agent)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])["step"] == 60


def test_a_program_can_train_in_a_folder_after_a_call_that_was_refused(tmp_path):
    def config(*flags):
        return Config(**director.parse_args([*RUN, f"--logdir={tmp_path}", *flags], Config))

    assert director.train(config("--steps=120")) == 0
    errors = []  # a notebook keeps the last one, and the frames of its traceback
    for wrong in ("--units=8", "--envs=3"):
        if wrong == "--envs=3":
            next(tmp_path.glob("replay/*/*.npz")).unlink()
        try:
            director.train(config("--steps=140", wrong))
        except director.UserError as error:
            errors.append(error)
    assert [word in str(error) for word, error in
            zip(("--units 16, not 8", "1 of"), errors, strict=True)] == [True, True]
    assert director.train(config("--steps=140", "--skip_missing")) == 0


def test_settings_that_do_not_exist_and_evaluations_of_no_episode_are_refused(tmp_path):
    assert director.main([*RUN, "--steps=60", f"--logdir={tmp_path}"]) == 0
    with pytest.raises(director.UserError, match="there is no setting devic"):
        director.load(tmp_path, devic="cpu")
    with pytest.raises(director.UserError, match="at least one episode"):
        director.evaluate(Config(logdir=str(tmp_path)))
    assert not (tmp_path / "eval.json").exists()


@pytest.mark.parametrize("name", ["caf\udce9", "loop/run"])
def test_folders_that_cannot_be_used_get_one_line(name, tmp_path, capsys):
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    flags = [*RUN, "--task=gym_envs.grid:Grid-v0", "--processes=no", "--steps=60"]
    assert director.main([*flags, f"--logdir={tmp_path}/{name}"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and ("not UTF-8" in error or "cannot write" in error)


def test_a_module_with_a_relative_name_is_refused_in_one_line(tmp_path, capsys):
    assert director.main([*RUN, "--task=gym_./odd:Odd-v0", f"--logdir={tmp_path}/run"]) == 2
    error = capsys.readouterr().err
    assert "./odd is not the name of a module" in error and error.count("\n") == 1


@pytest.mark.parametrize("loss", ["folder", "replay"])
def test_a_run_whose_folder_is_moved_or_deleted_says_so_and_saves_nothing(
        loss, tmp_path, monkeypatch, capsys):
    steps, train_step = [], Director.train_step

    def remove(self, batch):
        steps.append(batch)
        if len(steps) == 5 and loss == "folder":
            (tmp_path / "run").rename(tmp_path / "moved")
            (tmp_path / "run").mkdir()
        elif len(steps) == 5:
            (tmp_path / "run/replay").rename(tmp_path / "replay")
        return train_step(self, batch)

    monkeypatch.setattr(Director, "train_step", remove)
    assert director.main([*RUN, f"--logdir={tmp_path}/run", "--steps=200"]) == 2
    error = capsys.readouterr().err
    assert "was moved or deleted; nothing is saved" in error and error.count("\n") == 1
    assert not list(tmp_path.rglob("*.npz")) and not list(tmp_path.rglob("checkpoint.pt"))


def test_the_folder_of_a_run_stays_when_an_environment_changes_the_current_one(
        tmp_path, monkeypatch):
    class Wanders(Corridor):
        def reset(self, **kwargs):
            os.chdir("/")
            return super().reset(**kwargs)

    gymnasium.registry.pop("Wanders-v0", None)
    gymnasium.register("Wanders-v0", Wanders)
    monkeypatch.chdir(tmp_path)
    flags = [*RUN, "--task=gym_Wanders-v0", "--logdir=run", "--steps=150"]
    assert director.main(flags) == 0
    assert (tmp_path / "run/checkpoint.pt").exists()
    assert director.load(tmp_path / "run").resumed_from["step"] == 150


def test_resuming_drops_metrics_that_are_damaged_or_later_than_the_checkpoint(tmp_path):
    flags = [*RUN, f"--logdir={tmp_path}"]
    assert director.main([*flags, "--steps=150"]) == 0
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 170, "from": "after the checkpoint"}\n{"step": 1')
    assert director.main([*flags, "--steps=200"]) == 0
    steps = [line["step"] for line in read_metrics(tmp_path)]
    assert steps == sorted(steps) and steps[-1] == 200 and 170 not in steps


def test_metrics_of_a_run_that_never_saved_are_set_aside(tmp_path, capsys):
    (tmp_path / "config.json").write_text('{"run_id": "0123456789abcdef"}')
    (tmp_path / "metrics.jsonl").write_text('{"step": 9}\n')
    assert director.main([*RUN, "--steps=120", f"--logdir={tmp_path}"]) == 0
    assert "never saved; it is now" in capsys.readouterr().out
    aside, = tmp_path.glob("metrics-before-*.jsonl")
    assert aside.read_text() == '{"step": 9}\n'
    assert read_metrics(tmp_path)[0]["step"] == 50


def test_a_checkpoint_cannot_run_code(tmp_path, capsys):
    class Evil:
        def __reduce__(self):
            return print, ("executed",)

    torch.save({"format": Evil()}, tmp_path / "checkpoint.pt")
    assert director.main([*RUN, f"--logdir={tmp_path}"]) == 2
    assert "executed" not in capsys.readouterr().out


@pytest.mark.slow
def test_a_damaged_checkpoint_is_noticed_and_never_overwritten(tmp_path, capsys):
    assert director.main([*RUN, "--steps=150", f"--logdir={tmp_path}"]) == 0
    path, rng = tmp_path / "checkpoint.pt", np.random.default_rng(0)
    whole, expected = path.read_bytes(), director.load(tmp_path).state_dict()
    errors = []
    for _ in range(60):  # one flipped bit anywhere
        data = bytearray(whole)
        data[rng.integers(len(data))] ^= 1 << rng.integers(8)
        path.write_bytes(data)
        try:
            loaded = director.load(tmp_path).state_dict()
        except director.UserError as error:
            errors.append(str(error))
        else:
            assert all(torch.equal(value, expected[key]) for key, value in loaded.items())
    assert len(errors) > 40
    assert all("checkpoint.pt cannot be used" in x and "\n" not in x for x in errors)
    state = torch.load(io.BytesIO(whole), weights_only=True)
    optimizer = state["optimizers"]["world_model"]["state"][0]
    for change in ({"format": 1}, {"agent": {}}, {"grad_steps": None}, {"optimizers": {}},
                   {"spaces": 3}, {"config": None}):
        torch.save({**state, **change}, path)
        assert director.main([*RUN, "--steps=300", f"--logdir={tmp_path}"]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and "cannot be used" in error
    optimizer["exp_avg"] = torch.zeros(3)
    torch.save(state, path)
    for damaged in (path.read_bytes(), whole[: len(whole) // 2], b"", b"hello"):
        path.write_bytes(damaged)
        assert director.main([*RUN, "--steps=300", f"--logdir={tmp_path}"]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and "cannot be used" in error
        assert path.read_bytes() == damaged


# ---- Errors and signals ---------------------------------------------------------------------


class Faulty(Corridor):
    """Raises, returns NaN, or kills or signals its process, in given steps of its life."""

    faults, life = {}, 0  # {step: fault}, steps so far

    def step(self, action):
        Faulty.life += 1
        obs, reward, terminated, truncated, info = super().step(action)
        fault = self.faults.get(Faulty.life)
        if fault == "raise":
            raise ZeroDivisionError("the simulator is unstable")
        if fault == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if fault in envs.vector.SIGNALS:
            signal.raise_signal(fault)
        reward = math.nan if fault == "reward" else reward
        return obs * (math.nan if fault == "obs" else 1), reward, terminated, truncated, info


gymnasium.register("Faulty-v0", Faulty)


@pytest.fixture
def fail_in_step(monkeypatch):
    """A function that makes Faulty environments fail in a step of their life, which is 0 again."""
    def prepare(faults):
        monkeypatch.setattr(Faulty, "faults", faults)
        monkeypatch.setattr(Faulty, "life", 0)

    prepare({})
    return prepare


def test_an_evaluation_shows_the_traceback_of_an_environment_that_fails(tmp_path, fail_in_step):
    assert director.main([*RUN, "--task=gym_Faulty-v0", "--steps=120", f"--logdir={tmp_path}"]) == 0
    fail_in_step({20: "raise"})
    with pytest.raises(EnvironmentFailed, match="ZeroDivisionError: the simulator is unstable"):
        director.main([f"--logdir={tmp_path}", "--eval=1"])


def test_an_error_or_nan_inside_a_gradient_step_leaves_the_checkpoint_unchanged(
        tmp_path, monkeypatch, capsys):
    flags = [*RUN, f"--logdir={tmp_path}"]
    assert director.main([*flags, "--steps=200"]) == 0
    before = (tmp_path / "checkpoint.pt").read_bytes()
    loss = director.GoalAutoencoder.loss

    def broken(self, deter):
        value, metrics = loss(self, deter)
        return value * math.nan, {**metrics, "goal_loss": value * math.nan}

    for replacement, error in ((broken, FloatingPointError), (fail, ZeroDivisionError)):
        monkeypatch.setattr(director.GoalAutoencoder, "loss", replacement)
        with pytest.raises(error, match="goal_loss is nan|deep inside"):
            director.main([*flags, "--steps=300"])
        assert (tmp_path / "checkpoint.pt").read_bytes() == before
        assert "Saved" not in capsys.readouterr().err


def listen():
    """Do not inherit ignored signals from the tests, which may run under nohup."""
    for number in director.SIGNALS:
        signal.signal(number, signal.SIG_DFL)


def launch(tmp_path, *flags, preexec_fn=listen, **kwargs):
    """Start a program that trains for minutes."""
    command = [*PROGRAM, *RUN, "--steps=10000", f"--logdir={tmp_path}", *flags]
    return subprocess.Popen(
        command, text=True, preexec_fn=preexec_fn,
        **{"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, **kwargs})


def start(*args, **kwargs):
    """Start a program that trains for minutes, and wait until it trains."""
    process = launch(*args, **kwargs)
    assert any(line.startswith("step 150: ") for line in process.stdout)
    return process


def resumes(tmp_path, *flags):
    """Resume a run for 20 steps; returns the step of its checkpoint."""
    step = director.load(tmp_path).resumed_from["step"]
    assert director.main([*RUN, f"--steps={step + 20}", f"--logdir={tmp_path}", *flags]) == 0
    return step


@pytest.mark.slow
@pytest.mark.filterwarnings(  # of gymnasium, about the process that was killed
    "ignore:.*Calling `close`", "ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize(("fault", "error", "words"), [
    ("raise", EnvironmentFailed, "unstable"),
    ("reward", FloatingPointError, "reward is not finite"),
    ("obs", FloatingPointError, "state is not finite"),
    ("kill", (EOFError, ConnectionError), None)])
def test_a_failing_environment_saves_the_run_and_shows_its_traceback(
        fault, error, words, tmp_path, fail_in_step, monkeypatch, capfd):
    fail_in_step({120: fault})
    flags = [*RUN, "--task=gym_Faulty-v0", f"--logdir={tmp_path}"]
    if fault == "kill":
        in_processes = functools.partial(AsyncVectorEnv, context="fork")
        monkeypatch.setattr(envs.vector, "SyncVectorEnv", in_processes)
    with pytest.raises(error, match=words):
        director.main([*flags, "--steps=5000"])
    step = director.load(tmp_path).resumed_from["step"]
    assert step > 100 and f"Saved at step {step}" in capfd.readouterr().err
    fail_in_step({})
    assert director.main([*flags, f"--steps={step + 20}"]) == 0


@pytest.mark.slow
@pytest.mark.parametrize("number", envs.vector.SIGNALS)
def test_a_run_saves_and_stops_on_each_signal_and_resumes(number, tmp_path, fail_in_step, capsys):
    before = signal.signal(number, signal.SIG_DFL)
    fail_in_step({120: number})
    flags = ["--task=gym_Faulty-v0", f"--logdir={tmp_path}"]
    assert director.main([*RUN, *flags, "--steps=5000"]) == 128 + number
    printed = capsys.readouterr().err
    assert f"Saved at step {resumes(tmp_path, *flags[:1])}; the same command resumes." in printed
    assert signal.signal(number, before) == signal.SIG_DFL  # the handler from before the run


def test_a_signal_shortly_before_a_step_of_the_environments_prevents_it(
        tmp_path, fail_in_step, monkeypatch):
    before, policy = signal.signal(signal.SIGTERM, signal.SIG_DFL), Director.policy

    def interrupted(self, *args):
        fail_in_step({1: "raise"})  # the next step would fail
        os.kill(os.getpid(), signal.SIGTERM)
        return policy(self, *args)

    monkeypatch.setattr(Director, "policy", interrupted)
    flags = [*RUN, "--task=gym_Faulty-v0", f"--logdir={tmp_path}", "--steps=5000"]
    assert director.main(flags) == 128 + signal.SIGTERM
    signal.signal(signal.SIGTERM, before)
    assert director.load(tmp_path).resumed_from["step"] == 100


def test_a_signal_during_the_last_save_does_not_interrupt_it(tmp_path, fail_in_step, monkeypatch):
    fail_in_step({120: "raise"})
    before, save = signal.signal(signal.SIGTERM, signal.SIG_DFL), Replay.save

    def interrupted(self, folder):
        os.kill(os.getpid(), signal.SIGTERM)
        return save(self, folder)

    monkeypatch.setattr(Replay, "save", interrupted)
    with pytest.raises(EnvironmentFailed, match="unstable"):
        director.main([*RUN, "--task=gym_Faulty-v0", f"--logdir={tmp_path}", "--steps=5000"])
    signal.signal(signal.SIGTERM, before)
    assert director.load(tmp_path).resumed_from["step"] > 100


def signal_program(folder):
    def ignore():
        listen()
        signal.signal(signal.SIGHUP, signal.SIG_IGN)

    with start(folder / "run", preexec_fn=ignore) as process:
        process.send_signal(signal.SIGHUP)
        assert any(line.startswith("step 250: ") for line in process.stdout)
        process.terminate()
        (folder / "rest").write_text(process.communicate()[0])
        assert process.returncode == 128 + signal.SIGTERM


@pytest.mark.slow
def test_a_program_saves_and_stops_on_a_signal_unless_it_was_started_to_ignore_it(background):
    step = resumes(background / "run")
    assert f"Saved at step {step}; the same command resumes." in (background / "rest").read_text()


def wait_for_group(number, seconds):
    """Raise ProcessLookupError once no process of the group is left."""
    for _ in range(10 * seconds):
        os.killpg(number, 0)
        time.sleep(0.1)


CARTPOLE = ["--task=dmc_cartpole_balance", "--obs=state"]


def signal_group(folder):
    with start(folder / "run", *CARTPOLE, "--processes=yes", start_new_session=True,
               stderr=subprocess.PIPE) as process:
        os.killpg(process.pid, signal.SIGTERM)
        (folder / "error").write_text(process.communicate()[1])
        assert process.returncode == 128 + signal.SIGTERM
    with pytest.raises(ProcessLookupError):
        wait_for_group(process.pid, seconds=5)


@pytest.mark.slow
def test_a_signal_to_the_process_group_saves_and_leaves_no_process(background):
    error = (background / "error").read_text()
    assert re.fullmatch(r"Saved at step \d+; the same command resumes.\n", error)
    assert resumes(background / "run", *CARTPOLE, "--processes=no") >= 150


def close_outputs(folder):
    with (open("/dev/full", "w") as full,
          launch(folder / "full", stdout=full, stderr=subprocess.PIPE) as other,
          start(folder / "pipe", stderr=subprocess.PIPE) as process):
        process.stdout.close()
        (folder / "pipe_error").write_text(process.stderr.read())
        (folder / "full_error").write_text(other.stderr.read())
        assert process.wait() == other.wait() == 2


@pytest.mark.slow
def test_an_output_that_cannot_be_written_saves_the_run_and_gets_one_line(background):
    assert "No space left" in (background / "full_error").read_text()
    error = (background / "pipe_error").read_text()
    assert "cannot write to stdout or --logdir: Broken pipe" in error
    assert "Saved at step" in error and "Traceback" not in error
    assert resumes(background / "pipe") >= 150


@pytest.mark.slow
def test_a_second_process_in_a_folder_is_refused_but_may_evaluate(tmp_path, capsys):
    with start(tmp_path, "--task=gym_CartPole-v1", "--save_every=100") as process:
        assert director.main([*RUN, f"--logdir={tmp_path}"]) == 2
        error = capsys.readouterr().err
        assert "another process trains there" in error and error.count("\n") == 1
        assert director.main(["--eval=1", f"--logdir={tmp_path}"]) == 0
        process.kill()
        process.stdout.read()
    assert resumes(tmp_path, "--task=gym_CartPole-v1") >= 100  # the lock ended with the process


@pytest.mark.slow
def test_a_full_disk_gets_one_line_and_leaves_the_checkpoint_unchanged(tmp_path):
    def limit_files():  # to 200 kB: metrics fit, checkpoints do not
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, resource.RLIM_INFINITY))

    flags = [*RUN, f"--logdir={tmp_path}"]
    assert director.main([*flags, "--steps=150"]) == 0
    before = (tmp_path / "checkpoint.pt").read_bytes()
    done = subprocess.run([*PROGRAM, *flags, "--steps=250"], preexec_fn=limit_files,
                          capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "cannot write" in done.stderr and done.stderr.count("\n") == 1, done.stderr
    assert (tmp_path / "checkpoint.pt").read_bytes() == before
    assert not list(tmp_path.rglob(".tmp-*"))
    assert resumes(tmp_path) == 150


# ---- Tasks, learned in the background -------------------------------------------------------


SMALL = ["--device=cpu", "--precision=float32", "--size=xs", "--units=32", "--deter=32",
         "--hidden=32", "--stoch=4", "--classes=4", "--horizon=8", "--batch_length=16",
         "--prefill=1000", "--processes=no"]
LEARN_CORRIDOR = [
    director.__file__, "--task=gym_envs.grid:Corridor-v0", "--agent=dreamer",
    "--learning_rate=1e-3", "--train_every=4", "--steps=2200", *SMALL]
LEARN_GRID = [
    director.__file__, "--task=gym_envs.grid:Grid-v0", "--skill_groups=4", "--skill_classes=4",
    "--goal_duration=4", "--learning_rate=2e-3", "--train_every=8", "--steps=6600", *SMALL]


@pytest.mark.slow
def test_the_flat_agent_solves_a_corridor(background):
    lines = read_metrics(background / "run")
    scores = [line["episode/score"] for line in lines if "episode/score" in line]
    assert np.mean(scores[:20]) < 8 and np.mean(scores[-8:]) > 20, scores


@pytest.mark.slow
def test_director_learns_to_stay_in_the_far_corner_of_a_grid(background):
    """It fails without the worker's reward, the manager or the world model."""
    lines = read_metrics(background / "run")
    scores = [line["episode/score"] for line in lines if "episode/score" in line]
    last = [line for line in lines if "train/model_loss" in line][-1]
    assert np.mean(scores[-24:]) > 12, scores
    # Without the worker's reward below 0.45, and no more than with exchanged goals.
    assert last["train/goal_reward_last"] > max(0.5, last["train/goal_reward_other"])
    assert last["train/manager_ent"] < 0.8  # a manager that does not learn stays near 1


# ---- The README's programs ------------------------------------------------------------------


def readme_program(word: str) -> str:
    """The Python program in README.md in which this word occurs."""
    blocks = re.findall(r"```python\n(.*?)```", (HERE / "README.md").read_text(), re.S)
    program, = [block for block in blocks if word in block]
    return program


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """Another folder than that of the repository is the current one."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    return tmp_path


def run_readme_environment(folder):
    (folder / "my_envs.py").write_text(readme_program("class Switches"))
    command, = re.findall(r"^    python director.py (.*Switches-v0)$",
                          (HERE / "README.md").read_text(), re.M)
    flags = [*RUN, *command.split(), "--steps=300", "--logdir=run"]
    done = subprocess.run([*PROGRAM, *flags], check=False, cwd=folder, capture_output=True,
                          text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_the_environment_in_the_readme_runs_as_printed(background):
    assert director.load(background / "run").act_space == spaces.Discrete(4)
    lines = [line for line in read_metrics(background / "run") if "episode/score" in line]
    assert {line["episode/length"] for line in lines} == {100}
    assert all(5 < line["episode/score"] < 50 for line in lines)  # a quarter of the steps


@pytest.mark.slow
def test_the_loop_in_the_readme_runs_as_printed(elsewhere):
    flags = [*RUN, "--steps=120", "--logdir=runs/pinpad_three/director-xs-0"]
    assert director.main(flags) == 0
    result = {}
    exec(readme_program("director.load"), result)
    assert result["action"].shape == (2, 5) and set(result["choice"]) <= set(range(5))
    assert result["state"]["count"].tolist() == [2, 1]


def run_readme_variant(folder):
    (folder / "my_agent.py").write_text(readme_program("class Agent"))
    env = {**os.environ, "PYTHONPATH": str(HERE)}
    for steps, code in ((200, 0), (0, 2)):
        command = [sys.executable, "my_agent.py", *RUN, f"--steps={steps}"]
        done = subprocess.run(command, cwd=folder, env=env, check=False, capture_output=True,
                              text=True)
        assert done.returncode == code, done.stderr


@pytest.mark.slow
def test_the_variant_in_the_readme_runs_as_printed(background):
    assert (background / "runs/pinpad_three/my_agent-xs-0/checkpoint.pt").exists()


@pytest.mark.parametrize("flags", [["--deter=1e7"], ["--stoch=1e9", "--classes=1e9"]])
def test_networks_that_do_not_fit_into_memory_get_one_line(flags, tmp_path, capsys):
    flags = [*RUN, *flags, f"--logdir={tmp_path}", "--task=gym_CartPole-v1"]
    assert director.main(flags) == 2
    error = capsys.readouterr().err
    assert "too little memory" in error and error.count("\n") == 1


def test_a_wrong_observation_for_the_policy_gets_the_expected_shapes():
    agent = make_agent(obs={"image": IMAGE, "state": spaces.Box(-1, 1, (3,))})
    image = np.zeros((2, 64, 64, 3), np.uint8)
    for obs in ({"image": image}, {"image": image[0], "state": np.zeros(3)},
                {"image": image, "state": np.zeros((2, 4))}, {}):
        with pytest.raises(ValueError, match=r"needs \{'image': \(64, 64, 3\), 'state': \(3,\)\}"):
            agent.policy(obs)
    obs = {"image": image, "state": np.zeros((2, 3))}
    assert agent.policy(obs)[0].shape == (2, 3)
    with pytest.raises(ValueError, match="dtype uint8"):
        agent.policy({**obs, "image": np.float32(image) / 255})  # it would be divided twice
    with pytest.raises(ValueError, match="mode 'evaluate': must be 'train' or 'eval'"):
        agent.policy(obs, mode="evaluate")
    state = agent.policy(obs)[1]
    for first in ([True], [1, 1], np.ones((2, 1), bool), True):  # some would be broadcast
        with pytest.raises(ValueError, match="needs is_first, 2 bools"):
            agent.policy({**obs, "is_first": first}, state)
    with pytest.raises(ValueError, match="a state of 2"):
        agent.policy({key: value[:1] for key, value in obs.items()}, state)


BACKGROUND = {  # see conftest.py
    "test_the_flat_agent_solves_a_corridor": LEARN_CORRIDOR,
    "test_director_learns_to_stay_in_the_far_corner_of_a_grid": LEARN_GRID,
    "test_a_variant_has_flags_a_folder_and_checkpoints_of_its_own": run_curious,
    "test_without_opengl_the_error_says_what_to_install": run_without_opengl,
    "test_a_program_saves_and_stops_on_a_signal_unless_it_was_started_to_ignore_it": signal_program,
    "test_a_signal_to_the_process_group_saves_and_leaves_no_process": signal_group,
    "test_an_output_that_cannot_be_written_saves_the_run_and_gets_one_line": close_outputs,
    "test_the_environment_in_the_readme_runs_as_printed": run_readme_environment,
    "test_the_variant_in_the_readme_runs_as_printed": run_readme_variant}
