"""Director: deep hierarchical planning from pixels, in one file of PyTorch.

Director (Hafner, Lee, Fischer, Abbeel, NeurIPS 2022, "the paper") learns a world model from
pixels and plans inside it on two levels. Every K = 8 steps a *manager* picks a discrete code,
the *skill*; a goal autoencoder decodes it into a *goal*, a point in the world model's state space.
A *worker* chooses the primitive actions and is rewarded for reaching the goal, nothing else. The
manager is rewarded for the task and for novelty. No goals are given by hand.

    python director.py --task dmc_walker_walk       train; the same command resumes
    python director.py --logdir RUN --eval 10       play 10 episodes with a trained agent

From the paper to this file, in its order (`# ---- ` begins a part):
    Configuration, numerics   Config, SIZES; symlog, OneHot, balanced_kl, AutoAdapt, Normalizer
    Networks                  Encoder, Decoder, RSSM (Section 2.1, eq. 1)
    Hierarchical returns      max_cosine (eq. 8), lambda_return, split_ and abstract_trajectory
    Models and players        WorldModel (eq. 2), GoalAutoencoder (2.2, eq. 3, 4, 6), ActorCritic
    The agent                 Director: choose (2.3, a goal every K steps), sample_skill (eq. 5),
                              act (2.4, eq. 7), imagine, reward_expl (eq. 6), reward_goal (eq. 8),
                              train_step
    Replay                    Replay; environments are in envs/ (make_env, Driver)
    The training loop         train, evaluate
    A run's folder            load, Run: metrics, checkpoints, signals
    The command line          main

Symbols in shapes: B replay chunks in a batch, T steps in each; N = BT imagined trajectories, H
steps in each; K steps for a goal; D deterministic state; SC stochastic state, S groups of C
classes; GL skill, G groups of L classes; A action; E environments; F features of a state.

A trajectory is a dict of tensors, time first, that `Director.imagine` creates from replayed states
and from which `split_trajectory` and `abstract_trajectory` make the worker's and the manager's:
    key             shape              entry t is
    deter, stoch    [H+1, N, D or SC]  the state at time t; at t = 0 the replayed state
    skill, goal     [H+1, N, GL or D]  the manager's code, and its decoding, during action t
    action          [H+1, N, A]        the worker's action in state t
    ent             [H+1, N, A]        its normalized entropy; only for continuous actions
    cont            [H+1, N]           probability that the episode continues at state t
    reward_<name>   [H, N]             reward for action t, a function of state t+1
"""

import contextlib
import copy
import dataclasses
import io
import itertools
import json
import math
import os
import pathlib
import re
import signal
import sys
import time

import numpy as np
import torch
import torch.nn.functional as F
from gymnasium import spaces
from torch import Tensor, nn

from envs import CANNOT_WRITE, UserError, pictures, write_file  # envs/ has to be beside this file
from envs.flags import check_values, fastest_precision, keep_freed_memory, parse_args
from envs.folder import Lock, agent_name, read_run, read_settings, reading, run_folder, run_names
from envs.log import Logger
from envs.make import check_policy_input, choose_quality, refuse_other_spaces, vector_envs
from envs.make import make_env as make_env  # for users of this module
from envs.vector import SIGNALS, Driver

# ---- Configuration --------------------------------------------------------------------------
SIZES = {  # what --size sets; a flag of its own takes precedence
    "paper": {
        "deter": 1024, "hidden": 1024, "stoch": 32, "classes": 32, "units": 512, "layers": 4,
        "cnn_depth": 64, "batch_size": 16, "batch_length": 64, "train_every": 16,
        "slow_every": 100, "learning_rate": 1e-4, "kl_target": 3.5, "standardize": "no"},
    "s": {
        "deter": 256, "hidden": 256, "stoch": 16, "classes": 16, "units": 256, "layers": 2,
        "cnn_depth": 32, "batch_size": 16, "batch_length": 64, "train_every": 16,
        "slow_every": 100, "learning_rate": 2e-4, "kl_target": 3.5, "standardize": "no"},
    "xs": {
        "deter": 128, "hidden": 128, "stoch": 16, "classes": 16, "units": 128, "layers": 2,
        "cnn_depth": 16, "batch_size": 8, "batch_length": 32, "train_every": 8,
        "slow_every": 20, "learning_rate": 4e-4, "kl_target": 1.0, "standardize": "yes"}}


def flag(default, text: str, choices=None, low=1, high=1e12, group="", fixed=False):
    """A field of Config and its command-line flag; its default is None if `SIZES` sets it.

    choices, low, high: what is allowed, also for the default. A bool is False unless the flag is
    given. group: heading in --help for this flag and the following. fixed: it shapes networks or
    data, so a resumed run cannot change it.
    """
    return dataclasses.field(default=default, metadata={
        "text": text, "choices": choices, "low": low, "high": high, "group": group, "fixed": fixed})


@dataclasses.dataclass
class Config:
    """All settings, each a command-line flag. A subclass may extend `sizes`, too."""

    sizes = SIZES

    task: str = flag("dmc_walker_walk", "dmc_<domain>_<task>, pinpad_<three..eight>, gym_<id> or "
                     "gym_<module>:<id>", group="run", fixed=True)
    obs: str = flag("auto", "auto: pixels for dmc_ and pinpad_, everything for gym_",
                    ("auto", "pixels", "state", "both"))
    agent: str = flag("director", "dreamer: the flat baseline", ("director", "dreamer"), fixed=True)
    size: str = flag("auto", "values of SIZES; auto: paper on a GPU, else xs",
                     ("auto", *SIZES), fixed=True)
    device: str = flag("auto", "device that trains", ("auto", "cpu", "cuda"))
    precision: str = flag("auto", "auto: bfloat16 if it is faster", ("auto", "float32", "bfloat16"))
    eager: bool = flag(False, "do not use CUDA graphs on a GPU")
    seed: int = flag(0, "seed of networks, samples and environments", low=0, high=2**32 - 1)
    steps: int = flag(1_000_000, "environment steps of the whole run, prefill included")
    logdir: str = flag("", "folder of the run; default: runs/<task>/<agent>-<size>-<seed>")
    eval: int = flag(0, "play this many episodes with the agent in --logdir, then exit", low=0)
    log_every: int = flag(1000, "environment steps between two lines of metrics")
    save_every: int = flag(10_000, "environment steps between two checkpoints")
    video_every: int = flag(20_000, "environment steps between two sets of pictures")
    track: bool = flag(False, "also log to Weights & Biases")
    skip_missing: bool = flag(False, "resume without replay files that are missing")
    envs: int = flag(4, "environments that run side by side", group="data")
    processes: str = flag("auto", "a process for each environment; auto: for dmc_ and "
                          "gym_<module>:<id>", ("auto", "yes", "no"))
    action_repeat: int = flag(1, "times that the environment repeats each action", fixed=True)
    render_quality: str = flag("auto", "images of dmc_ tasks; fast: no shadows; auto: fast "
                               "if the CPU renders", ("auto", "full", "fast"), fixed=True)
    prefill: int = flag(10_000, "random environment steps before training starts")
    random: int = flag(0, "actions stay random until this step, also after --prefill", low=0)
    replay_size: int = flag(1_000_000, "steps to keep; the oldest finished episodes leave first")
    train_every: int = flag(None, "environment steps per gradient step")
    batch_size: int = flag(None, "replay chunks in a batch")
    batch_length: int = flag(None, "steps in a replay chunk")
    deter: int = flag(None, "units of the deterministic state", group="networks", fixed=True)
    hidden: int = flag(None, "hidden units of the recurrent model", fixed=True)
    stoch: int = flag(None, "groups of the stochastic state", fixed=True)
    classes: int = flag(None, "classes in each group of the stochastic state", fixed=True)
    units: int = flag(None, "units in the hidden layers of the MLPs", fixed=True)
    layers: int = flag(None, "hidden layers of the MLPs", fixed=True)
    cnn_depth: int = flag(None, "channels of the first convolution", fixed=True)
    standardize: str = flag(None, "shift and scale state vectors to mean 0, std 1",
                            ("yes", "no"), fixed=True)
    skill_groups: int = flag(8, "groups of the manager's code", fixed=True)
    skill_classes: int = flag(8, "classes in each group of the code", low=2, fixed=True)
    learning_rate: float = flag(None, "learning rate of all optimizers", low=0, group="learning")
    kl_target: float = flag(None, "target of the world model's KL, in nats per step", low=0)
    discount: float = flag(0.99, "discount per worker step, and per manager decision", low=0.01,
                           high=1)
    lam: float = flag(0.95, "lambda of the returns", low=0, high=1)
    horizon: int = flag(16, "imagined steps, a multiple of --goal_duration")
    goal_duration: int = flag(8, "steps that a goal lasts")
    worker_extr: float = flag(0.0, "weight of the task reward for the worker; paper: 0 or 0.5",
                              low=0, fixed=True)
    manager_expl: float = flag(0.1, "weight of the manager's exploration reward", low=0)
    slow_every: int = flag(None, "gradient steps between two copies to the slow critics")

    def __post_init__(self):
        cuda = torch.cuda.is_available()
        if self.device == "cuda" and not cuda:
            raise UserError("--device cuda: PyTorch finds no CUDA GPU here; use --device cpu")
        if self.device == "auto":
            self.device = "cuda" if cuda else "cpu"
        if self.size == "auto":
            self.size = "paper" if self.device == "cuda" else "xs"
        for name, value in self.sizes.get(self.size, {}).items():
            if getattr(self, name) is None:
                setattr(self, name, value)
        if self.precision == "auto":
            self.precision = fastest_precision(self.device)
        check_values(self)
        if self.agent == "director" and self.horizon % self.goal_duration:
            raise UserError(f"--horizon {self.horizon}: not a multiple of --goal_duration")


# ---- Numerics and distributions -------------------------------------------------------------
def symlog(x: Tensor) -> Tensor:
    """sign(x) ln(1 + |x|): compresses rewards and returns of any size."""
    return x.sign() * x.abs().log1p()


def symexp(x: Tensor) -> Tensor:
    """The inverse of `symlog`."""
    return x.sign() * x.abs().expm1()


class OneHot:
    """Categoricals with logits [..., C]: probs = (1 - unimix) softmax(logits) + unimix / C."""

    def __init__(self, logits: Tensor, unimix: float = 0.0):
        if unimix:
            logits = ((1 - unimix) * logits.softmax(-1) + unimix / logits.shape[-1]).log()
        self.logits = logits.log_softmax(-1)
        self.probs = self.logits.exp()
        self.entropy_range = (0.0, math.log(logits.shape[-1]))

    def rsample(self) -> Tensor:
        """A one-hot sample [..., C] whose gradient is that of the probabilities."""
        # Inverse transform sampling: it draws one random number per distribution, where the Gumbel
        # trick draws C. Random numbers are slow on a CPU. The last sum, 1, is not compared, because
        # rounding may leave it below 1.
        cumulated = self.probs.detach().cumsum(-1)
        index = (cumulated[..., :-1] <= torch.rand_like(cumulated[..., :1])).sum(-1, keepdim=True)
        return self.one_hot(index) + (self.probs - self.probs.detach())  # straight-through

    @property
    def mode(self) -> Tensor:
        return self.one_hot(self.probs.argmax(-1, keepdim=True))

    def one_hot(self, index: Tensor) -> Tensor:
        return torch.zeros_like(self.probs).scatter_(-1, index, 1.0)

    def log_prob(self, onehot: Tensor) -> Tensor:
        return (self.logits * onehot).sum(-1)

    def entropy(self) -> Tensor:
        return -(self.logits * self.probs).sum(-1)


class Symlog:
    """A number [...] that is predicted in symlog space, by the squared error there."""

    def __init__(self, pred: Tensor):
        self.pred = pred

    @property
    def mean(self) -> Tensor:
        return symexp(self.pred)

    def loss(self, target: Tensor) -> Tensor:
        return (self.pred - symlog(target)) ** 2


class BoundedNormal(torch.distributions.Normal):
    """Normal per dimension, [..., A], mean in -1..1, std in 0.03..1; samples are not clipped.

    raw_mean, raw_std: outputs of a network, of any size.
    """

    max_entropy = 0.5 * math.log(2 * math.pi * math.e)  # at std 1
    entropy_range = (max_entropy + math.log(0.03), max_entropy)

    def __init__(self, raw_mean: Tensor, raw_std: Tensor):
        mean = raw_mean.tanh()
        std = 0.97 * raw_std.sigmoid() + 0.03
        super().__init__(mean, std, validate_args=False)


def normalized_entropy(dist: OneHot | BoundedNormal) -> Tensor:
    """Entropy scaled to 0..1, for each code group or action dimension.

    0 is a deterministic choice or the least standard deviation, 1 is uniform or the greatest one.
    """
    low, high = dist.entropy_range
    return (dist.entropy() - low) / (high - low)


def balanced_kl(post_logit: Tensor, prior_logit: Tensor, balance: float) -> Tensor:
    """balance * KL(sg(post) || prior) + (1 - balance) * KL(post || sg(prior)) (paper, eq. 2).

    [..., S, C], [..., S, C] -> [...], in nats, summed over groups; sg stops gradients. With
    balance > 0.5 the prior learns to predict the posterior faster than the posterior is made
    predictable.
    """
    post = post_logit.log_softmax(-1)
    prior = prior_logit.log_softmax(-1)
    # F.kl_div(p, q) is KL(q || p).
    prior_loss = F.kl_div(prior, post.detach(), reduction="none", log_target=True)
    post_loss = F.kl_div(prior.detach(), post, reduction="none", log_target=True)
    return (balance * prior_loss + (1 - balance) * post_loss).sum((-2, -1))


def all_reduce_mean(tensors: list[Tensor]) -> list[Tensor]:
    """Means over parallel processes; here there is one. variants/parallel.py replaces this."""
    return tensors


class AutoAdapt(nn.Module):
    """Weights a regularizer so that its mean stays near `target`.

    Each element of `shape` has a scale, which starts at 1. If the mean is above 1.1 times (below
    1/1.1 of) the target, the scale is multiplied (divided) by 1.1, then clipped to [low, high].
    `inverse`, for an entropy: the scale grows below the target, and the loss is negated. Gradients
    flow through the regularizer only.
    """

    def __init__(self, shape: tuple, target: float, low: float, high: float, inverse=False):
        super().__init__()
        self.target, self.low, self.high, self.inverse = target, low, high, inverse
        self.register_buffer("scale", torch.ones(shape))

    def forward(self, reg: Tensor) -> Tensor:
        """Update the scale from `reg` [..., *shape], then return the weighted regularizer."""
        mean = reg.detach().flatten(0, reg.ndim - self.scale.ndim - 1).mean(0)
        mean = all_reduce_mean([mean])[0]
        above = mean > 1.1 * self.target
        below = mean < self.target / 1.1
        grow, shrink = (below, above) if self.inverse else (above, below)
        self.scale.mul_(1.1 ** (grow.float() - shrink.float())).clamp_(self.low, self.high)
        return -self.scale * reg if self.inverse else self.scale * reg


class Normalizer(nn.Module):
    """Divides by a running standard deviation ("std"), or also subtracts the mean ("mean_std").

    It keeps exponential moving averages of x and x^2, each of `shape`, over all leading dimensions,
    with bias correction as in Adam. The standard deviation is at least 1 / limit.
    """

    def __init__(self, impl: str, decay: float, limit: float, shape: tuple = ()):
        super().__init__()
        self.impl, self.decay, self.limit = impl, decay, limit
        self.register_buffer("moments", torch.zeros(2, *shape, dtype=torch.float64))
        self.register_buffer("count", torch.zeros((), dtype=torch.float64))

    def forward(self, x: Tensor, update: bool = True) -> Tensor:
        """Normalize x [..., *shape]; with `update`, x is added to the statistics before that."""
        if update:
            samples = x.detach().double().reshape(-1, *self.moments.shape[1:])
            moments = [torch.stack([samples.mean(0), (samples**2).mean(0)])]
            self.moments.lerp_(all_reduce_mean(moments)[0], 1 - self.decay)
            self.count += 1
        correction = (1 - self.decay**self.count).clamp(min=1e-9)  # not 0 before the first update
        mean, square = self.moments / correction
        scale = (square - mean**2).clamp(min=self.limit**-2).rsqrt().float()
        return (x - mean.float()) * scale if self.impl == "mean_std" else x * scale


# ---- Networks -------------------------------------------------------------------------------
# Hidden layers are linear without bias, layer norm, ELU. Weights are Glorot uniform.

def glorot(layer: nn.Module, scale: float = 1.0) -> nn.Module:
    """Glorot uniform weights, their variance times scale; biases are 0."""
    nn.init.xavier_uniform_(layer.weight, gain=scale**0.5)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer


class Norm(nn.LayerNorm):
    """Layer norm over the features of [..., C]."""

    def forward(self, x: Tensor) -> Tensor:  # float32, as bfloat16 sums its gradients inaccurately
        return super().forward(x.float()).to(x.dtype)


class ChannelNorm(Norm):
    """Layer norm over the channels of images [N, C, h, w]."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


def dense(inputs: int, outputs: int) -> list[nn.Module]:
    return [glorot(nn.Linear(inputs, outputs, bias=False)), Norm(outputs, eps=1e-3), nn.ELU()]


def hidden_layers(inputs: int, config: Config) -> nn.Sequential:
    """[..., inputs] -> [..., units]."""
    layers = dense(inputs, config.units)
    for _ in range(config.layers - 1):
        layers += dense(config.units, config.units)
    return nn.Sequential(*layers)


class MLP(nn.Module):
    """Hidden layers and a linear one, which is always float32: [..., inputs] -> [..., *outputs]."""

    def __init__(self, inputs: int, outputs: tuple, config: Config):
        super().__init__()
        self.outputs = outputs
        self.hidden = hidden_layers(inputs, config)
        self.out = glorot(nn.Linear(config.units, math.prod(outputs)), 0.1)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.hidden(x).float()
        with torch.autocast(x.device.type, enabled=False):  # bfloat16 is too coarse for values
            return self.out(hidden).reshape(*x.shape[:-1], *self.outputs)


class ScalarHead(MLP):
    """An MLP that predicts a number, a reward or a value: [..., F] -> `Symlog` [...]."""

    def forward(self, x: Tensor) -> Symlog:
        return Symlog(super().forward(x))


def convolutions(kind: type, channels: list[int], kernels: list[int]) -> list[nn.Module]:
    """Layers of stride 2, each with norm and activation."""
    layers = []
    for i, kernel in enumerate(kernels):
        conv = glorot(kind(channels[i], channels[i + 1], kernel, stride=2, bias=False))
        layers += [conv, ChannelNorm(channels[i + 1], eps=1e-3), nn.ELU()]
    return layers


class Encoder(nn.Module):
    """Observation to embedding [..., size]: convolutions for the image, an MLP for the state."""

    def __init__(self, space: spaces.Dict, config: Config):
        super().__init__()
        self.keys = list(space)
        self.size = 0
        self.norm = None  # running statistics of the state, with --standardize yes
        if "image" in self.keys:  # height and width: 64 -> 31 -> 14 -> 6 -> 2
            channels = [3] + [config.cnn_depth * 2**i for i in range(4)]
            layers = convolutions(nn.Conv2d, channels, [4, 4, 4, 4])
            self.image = nn.Sequential(*layers).to(memory_format=torch.channels_last)
            self.size += 2 * 2 * channels[-1]
        if "state" in self.keys:
            self.state = hidden_layers(space["state"].shape[0], config)
            self.size += config.units
            if config.standardize == "yes":
                self.norm = Normalizer("mean_std", 0.999, 1e2, space["state"].shape)

    def forward(self, obs: dict[str, Tensor]) -> Tensor:
        outs = []
        if "image" in self.keys:
            image = self.preprocess("image", obs["image"])  # [..., 64, 64, 3]
            x = image.flatten(0, -4).permute(0, 3, 1, 2)  # [N, 3, 64, 64], channels-last
            x = self.image(x).permute(0, 2, 3, 1)
            outs.append(x.reshape(*image.shape[:-3], -1))
        if "state" in self.keys:
            outs.append(self.state(self.preprocess("state", obs["state"])))
        return torch.cat(outs, -1)

    def preprocess(self, key: str, value: Tensor, update: bool = False) -> Tensor:
        """What the encoder reads and the decoder predicts: images in 0..1, standardized states."""
        value = value.float()
        if key == "image":
            return value / 255
        return self.norm(value, update).clamp(-10, 10) if self.norm else value


class Decoder(nn.Module):
    """Features [..., F] to image [..., 64, 64, 3] in 0..1, and to state [..., n]."""

    def __init__(self, feat_size: int, space: spaces.Dict, config: Config):
        super().__init__()
        self.keys = list(space)
        if "image" in self.keys:  # height and width: 1 -> 5 -> 13 -> 30 -> 64
            channels = [feat_size] + [config.cnn_depth * 2**i for i in (2, 1, 0)]
            layers = convolutions(nn.ConvTranspose2d, channels, [5, 5, 6])
            layers.append(glorot(nn.ConvTranspose2d(channels[-1], 3, 6, 2)))
            self.image = nn.Sequential(*layers).to(memory_format=torch.channels_last)
        if "state" in self.keys:
            self.state = MLP(feat_size, space["state"].shape, config)

    def forward(self, feat: Tensor) -> dict[str, Tensor]:
        outs = {}
        if "image" in self.keys:
            # The transposed convolution of a single pixel is a matrix product, which is several
            # times as fast on a CPU.
            conv = self.image[0]
            x = F.linear(feat, conv.weight.permute(2, 3, 1, 0).flatten(0, 2))
            x = x.reshape(-1, *conv.kernel_size, conv.out_channels).permute(0, 3, 1, 2)
            x = self.image[1:](x).float().sigmoid().permute(0, 2, 3, 1)  # [..., 64, 64, 3]
            outs["image"] = x.reshape(*feat.shape[:-1], *x.shape[1:])
        if "state" in self.keys:
            outs["state"] = self.state(feat)
        return outs


class RSSM(nn.Module):
    """Recurrent state-space model (paper, eq. 1): `deter` [..., D] and `stoch` [..., SC]."""

    def __init__(self, embed_size: int, action_size: int, config: Config):
        super().__init__()
        deter, hidden = config.deter, config.hidden
        self.groups = (config.stoch, config.classes)
        self.size = math.prod(self.groups)  # of stoch
        self.initial_deter = nn.Parameter(torch.zeros(deter))
        self.inputs = nn.Sequential(*dense(self.size + action_size, hidden))
        self.gru = nn.Sequential(
            glorot(nn.Linear(deter + hidden, 3 * deter, bias=False)), Norm(3 * deter, eps=1e-3))
        self.prior_net = nn.Sequential(*dense(deter, hidden), glorot(nn.Linear(hidden, self.size)))
        self.post_net = nn.Sequential(
            *dense(deter + embed_size, hidden), glorot(nn.Linear(hidden, self.size)))

    def prior(self, deter: Tensor, stoch: Tensor | None = None) -> Tensor:
        """Logits [..., S, C] without the observation; a variant's may depend on stoch, too."""
        return self.prior_net(deter).float().unflatten(-1, self.groups)

    def posterior(self, deter: Tensor, embed: Tensor) -> tuple[Tensor, Tensor]:
        """A sample [..., SC], and logits [..., S, C], given the embedded observation."""
        logit = self.post_net(torch.cat([deter, embed], -1)).float().unflatten(-1, self.groups)
        return OneHot(logit).rsample().flatten(-2), logit

    def predict_stoch(self, deter: Tensor, sample: bool = True) -> Tensor:
        """stoch [..., SC] without an observation: a sample of the prior, or its mode."""
        dist = OneHot(self.prior(deter))
        return (dist.rsample() if sample else dist.mode).flatten(-2)

    def initial(self) -> tuple[Tensor, Tensor]:
        """The learned first state: deter [D], and the mode of the prior there, [SC]."""
        deter = self.initial_deter.tanh()
        return deter, self.predict_stoch(deter, sample=False)

    def recur(self, deter: Tensor, stoch: Tensor, action: Tensor) -> Tensor:
        """The next deter, [..., D]: a gated recurrent unit."""
        x = self.inputs(torch.cat([stoch, action], -1))  # [..., hidden]
        reset, cand, update = self.gru(torch.cat([deter, x], -1)).float().chunk(3, -1)
        update = (update - 1).sigmoid()  # the -1 makes it keep its memory at first
        return update * (reset.sigmoid() * cand).tanh() + (1 - update) * deter

    def img_step(self, deter: Tensor, stoch: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
        """An imagined step: the next deter and stoch."""
        deter = self.recur(deter, stoch, action)
        return deter, self.predict_stoch(deter)

    def obs_step(self, deter: Tensor, stoch: Tensor, action: Tensor, embed: Tensor,
                 is_first: Tensor, initial: tuple | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """A step with an observation, [N, ...]: the next deter, stoch and its posterior logits.

        action: what led to the observation. Where is_first [N], memory starts from `initial`, which
        is computed if it is not given.
        """
        initial_deter, initial_stoch = self.initial() if initial is None else initial
        first = is_first[:, None]
        deter = torch.where(first, initial_deter, deter)
        stoch = torch.where(first, initial_stoch, stoch)
        deter = self.recur(deter, stoch, action.masked_fill(first, 0))
        stoch, logit = self.posterior(deter, embed)
        return deter, stoch, logit


# ---- Hierarchical returns -------------------------------------------------------------------
def max_cosine(goal: Tensor, feat: Tensor) -> Tensor:
    """Goal reward, [..., D], [..., D] -> [...] (paper, eq. 8).

    g . s / max(|g|, |s|)^2 of goal g and state s: a cosine that is 1 only if g and s are equal.
    """
    norm = torch.maximum(goal.norm(dim=-1, keepdim=True), feat.norm(dim=-1, keepdim=True)) + 1e-12
    return ((goal / norm) * (feat / norm)).sum(-1)


def lambda_return(reward: Tensor, value: Tensor, discount: Tensor, lam: float) -> Tensor:
    """R[t] = r[t] + d[t] ((1 - lam) v[t+1] + lam R[t+1]), R[H] = v[H].

    [H, ...], [H+1, ...], [H, ...] -> [H, ...]; `discount` includes the continuation.
    """
    last = value[-1]
    returns = []
    for t in reversed(range(len(reward))):
        last = reward[t] + discount[t] * ((1 - lam) * value[t + 1] + lam * last)
        returns.append(last)
    return torch.stack(returns[::-1])


def trajectory_weights(cont: Tensor, discount: float) -> Tensor:
    """Discounted probability that no state up to t is terminal, [H+1, ...] -> [H+1, ...].

    w[0] = cont[0], w[t] = w[t-1] * discount * cont[t]. So a terminal state itself has weight 0.
    """
    return (discount * cont).cumprod(0) / discount


def split_trajectory(traj: dict[str, Tensor], k: int) -> dict[str, Tensor]:
    """Cut a trajectory into the worker's, one for each goal (paper, Section 2.4).

    [H+1, N, ...], rewards [H, N] -> [k+1, N*H/k, ...], rewards [k, N*H/k]; all first segments come
    before all second ones. With H = 6 and k = 3:
        states   0 1 2 3 4 5 6   ->   0 1 2 3 | 3 4 5 6   neighbors share a state
        rewards  0 1 2 3 4 5     ->   0 1 2   | 3 4 5     for the actions in these states
        goals    a a a b b b c   ->   a a a a | b b b b   the last state of a segment is valued
                                                          under the goal that was pursued in it
    Action and skill of a segment's last state belong to the next goal; nothing uses them.
    """
    horizon = len(traj["cont"]) - 1
    assert horizon % k == 0, (horizon, k)
    split = {}
    for key, value in traj.items():
        length = k if key.startswith("reward") else k + 1
        segments = [value[start : start + length] for start in range(0, horizon, k)]
        split[key] = torch.cat(segments, 1)
    split["goal"][-1] = split["goal"][0]  # the critic bootstraps under the pursued goal
    return split


def abstract_trajectory(traj: dict[str, Tensor], k: int) -> dict[str, Tensor]:
    """Reduce a trajectory to the manager's: every k-th state, skills as actions (Section 2.3).

    [H+1, N, ...], rewards [H, N] -> [H/k+1, N, ...], rewards [H/k, N]. As in the official program,
        reward[b] = mean over i < k of  cont[bk] * ... * cont[bk+i] * reward[bk+i]
        cont[b]   = cont[(b-1)k+1] * ... * cont[bk],  cont[0] stays
    Thus cont[bk] counts twice: in reward[b], and in the decision's weight (`trajectory_weights`).
    """
    alive = traj["cont"][:-1].unflatten(0, (-1, k)).cumprod(1)  # [H/k, k, N]
    abstract = {"action": traj["skill"][::k]}
    for key, value in traj.items():
        if key.startswith("reward"):
            abstract[key] = (value.unflatten(0, (-1, k)) * alive).mean(1)
        elif key == "cont":
            blocks = value[1:].unflatten(0, (-1, k)).prod(1)
            abstract[key] = torch.cat([value[:1], blocks])
        elif key not in ("action", "skill"):
            abstract[key] = value[::k]
    return abstract


# ---- World model, goal autoencoder, actor-critic --------------------------------------------
def autocast(config: Config) -> torch.autocast:
    """Mixed precision for forward passes. It must end before optimizers step: it caches weights."""
    return torch.autocast(config.device, torch.bfloat16, config.precision == "bfloat16")


class Optimizer(torch.optim.AdamW):
    """Adam with clipped gradients, and weight decay for matrices only."""

    def __init__(self, module: nn.Module, config: Config):
        self.params = list(module.parameters())
        groups = [{"params": [p for p in self.params if p.ndim > 1], "weight_decay": 1e-2},
                  {"params": [p for p in self.params if p.ndim <= 1], "weight_decay": 0.0}]
        super().__init__(groups, lr=config.learning_rate, eps=1e-6, fused=True)

    def minimize(self, loss: Tensor) -> Tensor:
        """One step of these parameters alone; returns the norm of the gradient before clipping."""
        gradients = all_reduce_mean(torch.autograd.grad(loss, self.params))
        for param, gradient in zip(self.params, gradients, strict=True):
            param.grad = gradient
        norm = nn.utils.clip_grad_norm_(self.params, 100.0)
        self.step()
        self.zero_grad()
        return norm


class WorldModel(nn.Module):
    """Learns to encode observations and to predict what follows (paper, Section 2.1)."""

    RSSM = RSSM  # a subclass may replace it

    def __init__(self, obs_space: spaces.Dict, action_size: int, config: Config):
        super().__init__()
        self.encoder = Encoder(obs_space, config)
        self.rssm = self.RSSM(self.encoder.size, action_size, config)
        feat_size = config.deter + self.rssm.size
        self.decoder = Decoder(feat_size, obs_space, config)
        self.reward_head = ScalarHead(feat_size, (), config)
        self.cont_head = MLP(feat_size, (), config)  # logit of not being terminal
        self.kl_adapt = AutoAdapt((), config.kl_target, low=1e-5, high=1.0)

    def observe(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Filter chunks [B, T, ...]: embed, deter, stoch, and logits of posterior and prior."""
        embed = self.encoder(batch)  # [B, T, embed]
        initial = self.rssm.initial()
        deter, stoch = initial  # [D], [SC]; from the first step on [B, D], [B, SC]
        deters, stochs, posts = [], [], []
        for t in range(embed.shape[1]):
            deter, stoch, post = self.rssm.obs_step(
                deter, stoch, batch["action"][:, t], embed[:, t], batch["is_first"][:, t], initial)
            deters.append(deter)
            stochs.append(stoch)
            posts.append(post)
        deter, stoch, post = torch.stack(deters, 1), torch.stack(stochs, 1), torch.stack(posts, 1)
        prior = self.rssm.prior(deter, stoch)
        return {"embed": embed, "deter": deter, "stoch": stoch, "post": post, "prior": prior}

    def kl_loss(self, states: dict[str, Tensor]) -> tuple[Tensor, dict]:
        """The weighted KL between posterior and prior, [B, T], and metrics."""
        kl = balanced_kl(states["post"], states["prior"], 0.8)
        loss = self.kl_adapt(kl)
        metrics = {"kl": kl.mean(), "kl_scale": self.kl_adapt.scale}
        for key in ("prior", "post"):
            metrics[f"{key}_ent"] = OneHot(states[key]).entropy().sum(-1).mean()
        return loss, metrics

    def loss(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict, dict]:
        """Paper, eq. 2, on chunks [B, T, ...]: loss, states [B, T, ...], metrics."""
        targets = {}
        for key in self.encoder.keys:  # first, as it updates the statistics that `observe` uses
            targets[key] = self.encoder.preprocess(key, batch[key], update=True)
        states = self.observe(batch)
        feat = torch.cat([states["deter"], states["stoch"]], -1)  # [B, T, F]
        losses = {}  # each [B, T]
        for key, pred in self.decoder(feat).items():
            losses[key] = ((pred - targets[key]) ** 2).flatten(2).sum(-1)
        losses["reward"] = self.reward_head(feat).loss(batch["reward"])
        losses["cont"] = F.binary_cross_entropy_with_logits(
            self.cont_head(feat), 1 - batch["is_terminal"].float(), reduction="none")
        losses["kl"], metrics = self.kl_loss(states)
        states["loss"] = sum(losses.values())  # [B, T], for variants/prioritized.py
        loss = states["loss"].mean()
        metrics |= {f"{key}_loss": value.mean() for key, value in losses.items()}
        metrics["model_loss"] = loss
        return loss, states, metrics


class GoalAutoencoder(nn.Module):
    """Compresses states into codes, G one-hot vectors of L, [..., GL] (paper, 2.2, eq. 3)."""

    discrete = True  # codes are one-hot; a variant's may be plain numbers

    def __init__(self, config: Config):
        super().__init__()
        self.groups = (config.skill_groups, config.skill_classes)
        self.size = config.deter  # of a goal
        self.encoder = MLP(config.deter, self.groups, config)
        self.decode = MLP(math.prod(self.groups), (config.deter,), config)  # skill to goal
        # In nats; an 8x8 code holds at most 16.6. Codes that hold less than 10 never reach the
        # target, so that the weight of their KL falls to its minimum.
        self.kl_adapt = AutoAdapt((), target=10.0, low=1e-5, high=1.0)

    def encode(self, deter: Tensor) -> OneHot:
        """[..., D] to a distribution over codes, [..., G, L]."""
        return OneHot(self.encoder(deter))

    def loss(self, deter: Tensor, weight: float | Tensor = 1.0) -> tuple[Tensor, dict]:
        """Paper, eq. 4, on states [N, D] with weights [N]: loss, metrics."""
        code = self.encode(deter)
        rec = ((self.decode(code.rsample().flatten(-2)) - deter) ** 2).sum(-1) * weight
        kl = (math.log(self.groups[1]) - code.entropy()).sum(-1) * weight  # to a uniform prior
        loss = (rec + self.kl_adapt(kl)).mean()
        return loss, {"goal_loss": loss, "goal_rec": rec.mean(), "goal_kl": kl.mean(),
                      "goal_kl_scale": self.kl_adapt.scale}

    @torch.no_grad()
    def novelty(self, deter: Tensor) -> Tensor:
        """Exploration reward: the error of reconstructed states, [..., D] -> [...] (eq. 6)."""
        skill = self.encode(deter).rsample().flatten(-2)
        # The mean over D, while the loss is the sum; the official program does both.
        return ((self.decode(skill) - deter) ** 2).mean(-1)


class ActorCritic(nn.Module):
    """An actor, and a critic for each kind of reward, that learn from imagined trajectories.

    keys, feat_size: the parts of a state that both read, and their total size. action_shape:
    (classes,) or (groups, classes) if discrete, else (dimensions,). rewards: the weights of their
    advantages. Each advantage is divided by the standard deviation of its returns first, so that
    the scale of a reward has no effect, unless that standard deviation is below 0.01. Actors of
    continuous actions learn by back-propagated returns unless `reinforce`; others by REINFORCE.
    """

    def __init__(self, keys: tuple, feat_size: int, action_shape: tuple, discrete: bool,
                 rewards: dict[str, float], config: Config, reinforce: bool = False):
        super().__init__()
        self.keys, self.action_shape = keys, action_shape
        self.rewards, self.config = rewards, config
        self.discrete = discrete
        self.reinforce = discrete or reinforce
        self.actor = MLP(feat_size, action_shape if discrete else (2, *action_shape), config)
        if not discrete:  # means and standard deviations are two layers, initialized separately
            mean, std = self.actor.out.weight.chunk(2)
            nn.init.xavier_uniform_(mean, gain=0.1**0.5)
            nn.init.xavier_uniform_(std)
        self.critics = nn.ModuleDict({name: ScalarHead(feat_size, (), config) for name in rewards})
        self.slow = copy.deepcopy(self.critics).requires_grad_(False)
        self.optimizers = {"actor": Optimizer(self.actor, config)}
        for name, critic in self.critics.items():
            self.optimizers[f"{name}_critic"] = Optimizer(critic, config)
        self.returnnorm = nn.ModuleDict({name: Normalizer("std", 0.999, 1e2) for name in rewards})
        self.advnorm = Normalizer("mean_std", 0.99, 1e8)
        scales = action_shape[:-1] if discrete else action_shape  # one per code group or dimension
        self.ent_adapt = AutoAdapt(scales, 0.5, 1e-5, 1e2, inverse=True)

    def feat(self, state: dict[str, Tensor]) -> Tensor:
        """What actor and critics read of a state or trajectory, [..., F]."""
        return torch.cat([state[key] for key in self.keys], -1)

    def dist(self, feat: Tensor) -> OneHot | BoundedNormal:
        """Distribution of actions, [..., F] -> [..., *action]."""
        out = self.actor(feat)
        return OneHot(out, unimix=0.01) if self.discrete else BoundedNormal(*out.unbind(-2))

    def returns(self, name: str, feat: Tensor, traj: dict) -> tuple[Tensor, Tensor]:
        """Lambda returns, and values of the slow critic, [H, N] both."""
        value = self.slow[name](feat).mean  # [H+1, N]
        # For the manager, a step is a decision: K environment steps are discounted once.
        discount = self.config.discount * traj["cont"][1:]
        returns = lambda_return(traj[f"reward_{name}"], value, discount, self.config.lam)
        return returns, value[:-1]

    def critic_loss(self, name: str, pred: Symlog, feat: Tensor, ret: Tensor) -> Tensor:
        """Loss [H, N] of a critic's prediction in states [H, N, F] with returns [H, N]."""
        return pred.loss(ret)

    def learn(self, traj: dict[str, Tensor], copy_slow: bool) -> dict[str, Tensor]:
        """Train critics, then the actor, on a trajectory [H+1, N, ...]; returns metrics."""
        weight = trajectory_weights(traj["cont"].detach(), self.config.discount)[:-1]  # [H, N]
        advantage, metrics = self.train_critics(traj, weight, copy_slow)
        return metrics | self.train_actor(traj, weight, advantage)

    def train_critics(self, traj: dict, weight: Tensor, copy_slow: bool) -> tuple[Tensor, dict]:
        """Each critic learns its lambda returns; returns advantages [H, N] and metrics."""
        feat = self.feat(traj)  # [H+1, N, F]
        states = feat[:-1].detach()  # [H, N, F]
        total = 0.0
        metrics = {}
        for name, critic in self.critics.items():
            with autocast(self.config):
                ret, baseline = self.returns(name, feat, traj)
                pred = critic(states)
                loss = self.critic_loss(name, pred, states, ret.detach())
            loss = (loss * weight).mean()
            norm = self.optimizers[f"{name}_critic"].minimize(loss)
            metrics |= {f"{name}_critic_loss": loss, f"{name}_critic_grad_norm": norm,
                        f"{name}_reward": traj[f"reward_{name}"].mean(),
                        f"{name}_return": ret.mean(), f"{name}_value": pred.mean.mean()}
            if copy_slow:  # before the actor's advantages, as in the official program
                self.slow[name].load_state_dict(critic.state_dict())
                with autocast(self.config):
                    ret, baseline = self.returns(name, feat, traj)
            # The baseline V(s[t]) is not detached, as in the official program. Where returns are
            # back-propagated, the action that led to s[t] gets the gradient of -V(s[t]), too.
            normalize = self.returnnorm[name]
            advantage = normalize(ret) - normalize(baseline, update=False)
            metrics[f"{name}_advantage"] = advantage.mean()
            total = total + self.rewards[name] * advantage
        return self.advnorm(total), metrics

    def train_actor(self, traj: dict, weight: Tensor, advantage: Tensor) -> dict[str, Tensor]:
        """The actor learns by advantages [H, N], and keeps its entropy; returns metrics."""
        if self.reinforce:
            with autocast(self.config):
                dist = self.dist(self.feat(traj)[:-1].detach())
            action = traj["action"][:-1].detach().unflatten(-1, self.action_shape)
            log_prob = dist.log_prob(action)  # [H, N], or [H, N, groups or dimensions]
            log_prob = log_prob.reshape(*weight.shape, -1).sum(-1)  # [H, N]
            loss = -log_prob * advantage.detach()
            entropy = normalized_entropy(dist)
        else:  # back-propagation through the imagined dynamics
            loss = -advantage
            entropy = traj["ent"][:-1]
        # Summed over code groups or action dimensions, if there are any: [H, N].
        entropy_loss = self.ent_adapt(entropy).reshape(*weight.shape, -1).sum(-1)
        loss = ((loss + entropy_loss) * weight).mean()
        norm = self.optimizers["actor"].minimize(loss)
        return {"actor_loss": loss, "actor_grad_norm": norm, "ent": entropy.mean(),
                "ent_scale": self.ent_adapt.scale.mean()}


# ---- The agent ------------------------------------------------------------------------------
class Director(nn.Module):
    """World model, goal autoencoder, manager and worker.

    With `--agent dreamer`, the paper's flat baseline, a worker alone learns from the task reward.
    A variant is a subclass. compatible_variants: names of others whose checkpoints it loads.
    """

    # A subclass may replace these classes. Replay and Run are set below the definition of Run.
    Config = Config
    WorldModel = WorldModel
    Goals = GoalAutoencoder
    compatible_variants = ()

    def __init__(self, obs_space: spaces.Dict, act_space: spaces.Space, config: Config):
        super().__init__()
        self.config, self.obs_space, self.act_space = config, obs_space, act_space
        self.discrete = isinstance(act_space, spaces.Discrete)
        action = (int(act_space.n),) if self.discrete else act_space.shape
        self.manager = None
        self.grad_steps = 0
        self.resumed_from = {"step": 0, "seconds": 0.0}  # `load` fills it from the checkpoint
        with torch.device(config.device):
            self.world_model = self.WorldModel(obs_space, action[0], config)
            self.optimizers = {"world_model": Optimizer(self.world_model, config)}
            # Sizes of the parts of a state, which players read and `policy` carries between steps.
            self.sizes = {"deter": config.deter, "stoch": self.world_model.rssm.size,
                          "action": action[0]}
            self.build(action)
        self.players = {k: x for k, x in self.named_children() if isinstance(x, ActorCritic)}
        for name, player in self.players.items():
            for key, optimizer in player.optimizers.items():
                self.optimizers[f"{name}/{key}"] = optimizer

    def build(self, action: tuple):
        """Create what learns beside the world model: goals and players."""
        config = self.config
        state = ("deter", "stoch")
        if config.agent == "dreamer":
            self.worker = self.player(state, action, self.discrete, {"extr": 1.0})
            return
        self.goals = self.Goals(config)
        self.optimizers["goals"] = Optimizer(self.goals, config)
        self.sizes |= {"skill": math.prod(self.goals.groups), "goal": self.goals.size}
        rewards = {"goal": 1.0}
        if config.worker_extr:
            rewards["extr"] = config.worker_extr
        self.worker = self.player((*state, "goal"), action, self.discrete, rewards)
        rewards = {"extr": 1.0, "expl": config.manager_expl}
        self.manager = self.player(
            state, self.goals.groups, self.goals.discrete, rewards, reinforce=True)

    def player(self, keys: tuple, action_shape: tuple, discrete: bool, rewards: dict, **kwargs):
        """An actor-critic that reads these parts of a state."""
        size = sum(self.sizes[key] for key in keys)
        return ActorCritic(keys, size, action_shape, discrete, rewards, self.config, **kwargs)

    def restore(self, state: dict):
        """Load weights, optimizers and the number of gradient steps from a checkpoint."""
        self.load_state_dict(state["agent"])
        self.grad_steps = int(state["grad_steps"])
        for key, optimizer in self.optimizers.items():
            optimizer.load_state_dict(state["optimizers"][key])
            for group in optimizer.param_groups:  # capturable: variants/graph.py sets it
                group.update(lr=self.config.learning_rate, capturable=False)
            for param, values in optimizer.state.items():  # fused steps do not compare shapes
                if any(x.shape not in ((), param.shape) for x in values.values()):
                    raise ValueError(f"the optimizer of {key} has other shapes")

    def tensors(self, arrays: dict[str, np.ndarray]) -> dict[str, Tensor]:
        return {k: torch.as_tensor(v, device=self.config.device) for k, v in arrays.items()}

    @torch.no_grad()
    def choose(self, state: dict[str, Tensor], count: np.ndarray) -> dict[str, Tensor]:
        """The manager's decision: every K steps a new skill and goal (Section 2.3).

        state: [N, ...]. count [N]: steps since the episode or the trajectory began, as a NumPy
        array, so that nothing waits for the GPU. Returns the parts of the state that change.
        """
        due = count % self.config.goal_duration == 0
        if not self.manager or not due.any():
            return {}
        skill = self.sample_skill(state)
        chosen = {"skill": skill, "goal": self.goals.decode(skill)}
        if due.all():
            return chosen
        mask = torch.as_tensor(due, device=skill.device)[:, None]  # [N, 1]
        return {key: torch.where(mask, value, state[key]) for key, value in chosen.items()}

    def sample_skill(self, state: dict[str, Tensor]) -> Tensor:
        """The manager's code in a state [N, ...]: [N, GL] (paper, eq. 5)."""
        return self.manager.dist(self.manager.feat(state)).rsample().flatten(1)

    def act(self, state: dict, first: np.ndarray, mode: str) -> dict:
        """Add goal and action (eq. 7) to a filtered state [E, ...]; first [E]: an episode begins.

        In mode "eval" the worker takes its most likely action; the manager always samples.
        """
        count = np.where(first, 0, state["count"])
        state = {**state, **self.choose(state, count), "count": count + 1}
        dist = self.worker.dist(self.worker.feat(state))
        return {**state, "action": dist.mode if mode == "eval" else dist.rsample()}

    @torch.no_grad()
    def policy(self, obs: dict, state: dict | None = None, mode: str = "train"):
        """Act on an observation, arrays [E, ...]: actions [E, A], and a state for the next call.

        Without a state, and where obs["is_first"] [E] is set, memory, goal and count start anew.
        Actions are one-hot, or continuous and not clipped. If another action than this is executed,
        it has to be put into state["action"] [E, A]. mode: "train" or "eval".
        """
        check_policy_input(self, obs, state, mode)
        model = self.world_model
        num_envs = len(obs[model.encoder.keys[0]])
        obs = {"is_first": np.zeros(num_envs, bool), **obs}
        if state is None:
            obs["is_first"] = np.ones(num_envs, bool)
            state = {key: torch.zeros(num_envs, size, device=self.config.device)
                     for key, size in self.sizes.items()}
            state["count"] = 0
        observed = self.tensors({key: obs[key] for key in ("is_first", *model.encoder.keys)})
        with autocast(self.config):
            deter, stoch, _ = model.rssm.obs_step(
                state["deter"], state["stoch"], state["action"], model.encoder(observed),
                observed["is_first"])
            state = self.act({**state, "deter": deter, "stoch": stoch}, obs["is_first"], mode)
        return state["action"], state

    def imagine(self, starts: dict[str, Tensor]) -> dict[str, Tensor]:
        """Act in the world model from N states for H steps: a trajectory (see the top).

        starts: deter, stoch, is_terminal, [N, ...]. A goal or skill in it is kept for the whole
        trajectory instead of the manager's. Gradients are recorded only for a worker that learns by
        them. They flow through the world model's states and the actions, not into what the actors
        read, which is detached.
        """
        model = self.world_model
        state = {key: value for key, value in starts.items() if key != "is_terminal"}
        steps = []
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.worker.reinforce):
            for t in range(self.config.horizon + 1):
                if t > 0:
                    deter, stoch = model.rssm.img_step(
                        state["deter"], state["stoch"], state["action"])
                    state = {**state, "deter": deter, "stoch": stoch}
                detached = {key: value.detach() for key, value in state.items()}
                chosen = self.choose(detached, np.full(len(state["deter"]), t))  # eq. 5
                # What the caller has given is not replaced.
                chosen = {key: value for key, value in chosen.items() if key not in starts}
                dist = self.worker.dist(self.worker.feat({**detached, **chosen}))  # eq. 7
                state = {**state, **chosen, "action": dist.rsample()}
                if not self.worker.reinforce:
                    state["ent"] = normalized_entropy(dist)
                steps.append(state)
            traj = {key: torch.stack([step[key] for step in steps]) for key in steps[0]}
            feat = torch.cat([traj["deter"], traj["stoch"]], -1)  # [H+1, N, F]
            cont = model.cont_head(feat[1:]).sigmoid()
            start_cont = 1 - starts["is_terminal"].float()  # [N]
            traj["cont"] = torch.cat([start_cont[None], cont])
            rewards = {name for player in self.players.values() for name in player.rewards}
            for name in sorted(rewards):  # reward_expl, reward_extr, reward_goal
                traj[f"reward_{name}"] = getattr(self, f"reward_{name}")(traj)
        return traj

    def reward_extr(self, traj: dict[str, Tensor]) -> Tensor:
        """The task reward that the world model predicts for states 1..H: [H, N]."""
        feat = torch.cat([traj["deter"], traj["stoch"]], -1)
        return self.world_model.reward_head(feat[1:]).mean

    def reward_expl(self, traj: dict[str, Tensor]) -> Tensor:
        """The novelty of states 1..H: [H, N] (paper, eq. 6)."""
        return self.goals.novelty(traj["deter"][1:])

    def reward_goal(self, traj: dict[str, Tensor]) -> Tensor:
        """How close states 1..H are to the goals of the actions that led there: [H, N] (eq. 8)."""
        return max_cosine(traj["goal"][:-1], traj["deter"][1:])

    def train_step(self, batch: dict[str, np.ndarray]) -> dict[str, Tensor]:
        """One gradient step of everything on replay chunks [B, T, ...]; returns scalar metrics.

        1. World model: filters the chunks; predicts images, rewards and ends (eq. 2).
        2. Goal autoencoder: compresses the filtered states (eq. 3, 4).
        3. `imagine`: H steps from each filtered state, and their rewards (eq. 5 to 8).
        4. Worker, on segments of K steps with one goal: critics, then actor.
        5. Manager, on every K-th state: critics, then actor.
        """
        batch = self.tensors(batch)
        copy_slow = self.grad_steps % self.config.slow_every == 0
        self.grad_steps += 1

        # World model, then goals, on replayed data.
        with autocast(self.config):
            loss, states, metrics = self.world_model.loss(batch)
        metrics["model_grad_norm"] = self.optimizers["world_model"].minimize(loss)
        states = batch | {key: value.detach() for key, value in states.items()}  # [B, T, ...]
        metrics |= self.train_goals(states)

        # Players, on trajectories that are imagined from every state of the batch.
        with autocast(self.config):
            starts = {key: states[key].flatten(0, 1) for key in ("deter", "stoch", "is_terminal")}
            traj = self.imagine(starts)
        for name, player_traj in self.player_trajectories(traj).items():
            for key, value in self.players[name].learn(player_traj, copy_slow).items():
                metrics[f"{name}_{key}"] = value
        metrics |= self.train_imagined(traj)
        # Copies, because later steps change the adaptive scales in place.
        return {key: value.detach().clone() for key, value in metrics.items()}

    def train_goals(self, states: dict[str, Tensor]) -> dict[str, Tensor]:
        """Goal autoencoder, on replayed states and their batch, [B, T, ...]; returns metrics."""
        if not self.manager:
            return {}
        with autocast(self.config):
            loss, metrics = self.goals.loss(states["deter"].flatten(0, 1))
        metrics["goal_grad_norm"] = self.optimizers["goals"].minimize(loss)
        return metrics

    def player_trajectories(self, traj: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
        """The trajectory that each player learns from, in the order in which they learn.

        A player without a trajectory here does not learn.
        """
        if not self.manager:
            return {"worker": traj}
        k = self.config.goal_duration
        detached = {key: value.detach() for key, value in traj.items()}
        return {"worker": split_trajectory(traj, k), "manager": abstract_trajectory(detached, k)}

    def train_imagined(self, traj: dict[str, Tensor]) -> dict[str, Tensor]:
        """What else learns from the trajectory, after the players; returns metrics.

        Here nothing does. The metrics are the goal reward at the last step of each goal, and, for
        comparison, the same for the goals of other trajectories.
        """
        if "reward_goal" not in traj:
            return {}
        k = self.config.goal_duration
        exchanged = {**traj, "goal": traj["goal"].roll(traj["goal"].shape[1] // 2, 1)}
        with torch.no_grad(), autocast(self.config):
            other = self.reward_goal(exchanged)
        return {"goal_reward_last": traj["reward_goal"][k - 1 :: k].mean(),
                "goal_reward_other": other[k - 1 :: k].mean()}

    def picture_goal(self, goal: Tensor) -> Tensor | None:
        """Image [..., 64, 64, 3] of a goal [..., D] at the prior's mode; None if it has none."""
        stoch = self.world_model.rssm.predict_stoch(goal, sample=False)
        return self.world_model.decoder(torch.cat([goal, stoch], -1)).get("image")


# ---- Replay ---------------------------------------------------------------------------------
class Replay:
    """Episodes in memory as observed, 12 KB a step with pixels; the oldest leave first.

    A step holds image and state, the action that led there (zeros in the first step of an
    episode), its reward, is_first, is_last and is_terminal. The last step of an episode has
    is_last, and is_terminal unless a time limit has cut the episode. Episodes that were running
    when a run stopped are kept as they are, without is_last. Running episodes never leave, so they
    may exceed the capacity.
    """

    def __init__(self, capacity: int, seed: int = 0):
        self.capacity = capacity
        self.rng = np.random.default_rng(seed)
        self.episodes = {}  # finished, oldest first: {name: {key: array [length, ...]}}
        self.running = {}  # {environment: (name, {key: list of length})}
        self.names = itertools.count()
        self.steps = 0  # in all episodes
        self.lengths_on_disk = {}  # {name: length}
        self.left_out = {}  # {name: length} of files that cannot be used; they stay on disk

    def add(self, rows: dict[str, np.ndarray]):
        """Add one step of each environment, arrays [E, ...], which are copied."""
        for env in range(len(rows["reward"])):
            if env not in self.running:
                self.running[env] = next(self.names), {key: [] for key in rows}
            name, episode = self.running[env]
            for key, value in rows.items():
                episode[key].append(np.copy(value[env]))
            if rows["is_last"][env]:
                self.episodes[name] = {key: np.stack(value) for key, value in episode.items()}
                del self.running[env]
            self.steps += 1
        while self.steps > self.capacity and len(self.episodes) > 1:
            oldest = next(iter(self.episodes))
            self.steps -= len(self.episodes.pop(oldest)["reward"])

    def sample(self, batch_size: int, length: int) -> dict[str, np.ndarray]:
        """Draw chunks, arrays [B, T, ...], that start with is_first, even in mid-episode.

        An episode is drawn uniformly from the finished ones (until they hold as many steps as a
        batch, also from the running ones), then a start in 0..len, clipped so that the chunk fits,
        which makes ends frequent. If an episode is too short, the next one drawn follows.
        """
        pool = list(self.episodes.values())
        running = [episode for _, episode in self.running.values()]
        finished_steps = self.steps - sum(len(episode["reward"]) for episode in running)
        if finished_steps < batch_size * length:
            pool += running
        if not pool:
            raise ValueError("the replay is empty")
        pieces = []
        for _ in range(batch_size):
            missing = length
            while missing:
                episode = pool[self.rng.integers(len(pool))]
                total = len(episode["reward"])
                start = self.rng.integers(total + 1)  # 0..len
                start = max(0, min(start, total - missing))  # so that the piece fits
                stop = min(start + missing, total)
                piece = {key: np.array(value[start:stop]) for key, value in episode.items()}
                piece["is_first"][0] = True
                pieces.append(piece)
                missing -= stop - start
        rows = {key: np.concatenate([piece[key] for piece in pieces]) for key in pieces[0]}
        return {key: x.reshape(batch_size, length, *x.shape[1:]) for key, x in rows.items()}

    def save(self, folder: pathlib.Path) -> dict[int, int]:
        """Write the episodes that are new or longer than on disk; returns all files' lengths."""
        episodes = dict(self.episodes)
        for name, episode in self.running.values():
            episodes[name] = episode
        lengths = {name: len(episode["reward"]) for name, episode in episodes.items()}
        for name, episode in episodes.items():
            if self.lengths_on_disk.get(name) != lengths[name]:
                buffer = io.BytesIO()
                np.savez_compressed(buffer, **episode)
                write_file(folder / f"{name}.npz", buffer, run_id=folder.name)
        self.lengths_on_disk = lengths
        return {**self.left_out, **lengths}

    def load(self, folder: pathlib.Path, lengths: dict[int, int], rows=None, skip_missing=False):
        """Read what `save` wrote; UserError if files are missing, unless skip_missing.

        rows: a step as in `add`, to compare shapes with. Files that are damaged or have other
        shapes are left out, with a line of output.
        """
        paths = {name: folder / f"{name}.npz" for name in lengths}
        missing = sum(not os.access(path, os.R_OK) for path in paths.values())
        if missing and not skip_missing:
            raise UserError(f"{folder}: {missing} of {len(paths)} replay files are missing or not "
                            "readable; put them back, or go on without them by --skip_missing")
        for name, length in lengths.items():
            try:
                with np.load(paths[name]) as file:
                    episode = {key: file[key][:length] for key in file}
                for key, value in (rows or {}).items():
                    if episode[key].shape != (length, *value.shape[1:]):
                        raise ValueError(f"its {key} has the shape {episode[key].shape}")
                self.episodes[name] = episode
            except Exception as error:  # noqa: BLE001, a damaged file can raise anything
                print(f"Continuing without {paths[name]}, which cannot be used: {error}")
                if paths[name].exists():
                    self.left_out[name] = length
        if lengths and not self.episodes:
            raise UserError(f"{folder}: no replay file can be used; put the files back, or start a "
                            "new run in another --logdir")
        self.lengths_on_disk = {
            name: len(episode["reward"]) for name, episode in self.episodes.items()}
        self.names = itertools.count(max(lengths, default=-1) + 1)
        self.steps = sum(self.lengths_on_disk.values())


# ---- The training loop ----------------------------------------------------------------------
def train(config: Config, agent: type = Director) -> int:
    """Train until `config.steps` or a signal; returns the exit code, 0 or 128 + that signal.

    `Run`, below, keeps what belongs to the folder: metrics, pictures, checkpoints, signals. What
    --render_quality auto means is written into `config`.
    """
    torch.manual_seed(config.seed)
    config.render_quality = choose_quality(config, read_settings(run_folder(config, agent)))
    print(f"Starting {config.envs} environments of {config.task}", flush=True)
    with vector_envs(config, config.envs) as envs:
        run = agent.Run(config, agent, envs.single_observation_space, envs.single_action_space)
        try:
            env_seed = run.reseed()  # this also seeds PyTorch and the replay
            # driver.rows is what each environment shows now, with the action that led there (zeros
            # in the first step of an episode). A reset takes a step of its own.
            driver = Driver(envs, env_seed)
            if run.step:
                run.replay.load(run.replay_dir, run.agent.resumed_from["episodes"], driver.rows,
                                config.skip_missing)
            run.open()
            state = None  # of the policy, whose memory starts with the first action not random
            train_step = run.agent.train_step
            if config.device == "cuda" and agent is Director and not config.eager:
                from variants.graph import Graphed
                train_step = Graphed(run.agent)  # recorded as CUDA graphs, five times as fast
            random_until = max(config.prefill, config.random)
            if run.step < random_until:
                print(f"Actions are random until step {random_until}, training starts at step "
                      f"{config.prefill}.", flush=True)
            if run.step >= config.steps:
                print(f"Step {config.steps} was reached; for more, raise --steps.", flush=True)
            while run.should_continue():
                run.record(driver)  # what the last actions led to

                # Learn. After an error in here, parameters are of different steps: save nothing.
                run.update_complete = False
                if run.step >= config.prefill:
                    for _ in range(run.times_due(config.train_every)):
                        batch = run.replay.sample(config.batch_size, config.batch_length)
                        run.metrics.append(train_step(batch))
                run.update_complete = True

                # Report and save.
                if run.times_due(config.log_every) or run.step >= config.steps:
                    run.report()
                video_due = run.step >= run.last_video + config.video_every
                if video_due and driver.film and driver.rows["is_last"][0]:
                    run.draw(driver.film)
                if run.times_due(config.save_every):
                    run.save()

                # Act.
                if run.step < random_until:
                    action = driver.random_action()
                else:
                    action, state = run.agent.policy(driver.rows, state)
                    action = action.cpu().numpy()
                with run.interruptible():
                    driver.step(action, state)
        except KeyboardInterrupt:
            if not run.received_signals:
                raise
        finally:
            run.close()
        if run.received_signals:
            return 128 + run.received_signals[0]
        return 0


def evaluate(config: Config, agent: type = Director, flags: dict | None = None) -> list[float]:
    """Play `config.eval` episodes with the agent in the run's folder; writes and returns scores.

    Other settings are those of the run, except `flags`, and device and precision as in `load`.
    """
    if config.eval < 1:
        raise UserError(f"--eval {config.eval}: must be at least one episode")
    logdir = run_folder(config, agent)
    loaded = load(logdir, agent, **(flags or {}))
    with vector_envs(loaded.config, 1) as envs:
        refuse_other_spaces(loaded, envs.single_observation_space, envs.single_action_space)
        torch.manual_seed(loaded.config.seed)
        driver = Driver(envs, loaded.config.seed)
        replay = agent.Replay(10_000)
        scores = []
        state = None
        while len(scores) < config.eval:
            action, state = loaded.policy(driver.rows, state, mode="eval")
            if not scores:  # for the pictures of the first episode
                replay.add(driver.rows)
            driver.step(action.cpu().numpy(), state)
            if driver.rows["is_last"][0]:
                scores.append(float(driver.score[0]))
                print(f"episode {len(scores)}: return {scores[-1]:.1f}, mean so far "
                      f"{np.mean(scores):.1f} +- {np.std(scores):.1f}", flush=True)
                if driver.film and len(scores) == 1:
                    pictures.write(loaded, driver.film, replay.sample(6, 64),
                                   logdir / "pictures/eval")
            elif driver.length[0] and driver.length[0] % 1000 == 0:
                print(f"episode {len(scores) + 1}: step {driver.length[0]}", flush=True)
        result = {"mean": np.mean(scores), "std": np.std(scores), "scores": scores}
        write_file(logdir / "eval.json", io.BytesIO(json.dumps(result).encode()))
    return scores


# ---- A run's folder: metrics, checkpoints, signals ------------------------------------------
# How a run ends. Ctrl-C (or TERM, HUP, USR1) calls Run.on_signal, which notes the signal and
# interrupts a step of the environments. If it comes earlier in an iteration of `train`,
# Run.interruptible() ends the loop before that step; if later, Run.should_continue() does.
# The `finally` of `train` calls Run.close(), which saves a checkpoint, also after errors of
# environments and closed pipes. A second signal of the same kind ends the program without saving.
# After an error or a NaN inside a gradient step, update_complete prevents saving.

def load(logdir: str | pathlib.Path, agent: type = Director, /, **flags) -> Director:
    """The agent trained in a folder, with its settings except these flags; raises UserError.

    Device and precision are those of this machine unless flags name them. (The slash is there
    because `agent` and `logdir` are flags, too.)
    """
    unknown = set(flags) - {field.name for field in dataclasses.fields(agent.Config)}
    if unknown:
        raise UserError(f"there is no setting {min(unknown)}")
    path = pathlib.Path(logdir) / "checkpoint.pt"
    flags = {key: value for key, value in flags.items() if value != "auto"}  # as if not given
    saved, arguments = read_run(path, agent, flags)
    loaded = agent(*arguments)  # outside of `reading`: an error in a variant is no damaged file
    with reading(path):
        loaded.restore(saved)
    keys = ("run_id", "step", "seconds", "episodes", "config")
    loaded.resumed_from = {key: saved[key] for key in keys}
    return loaded


class Run:
    """The state of a run, and its folder."""

    def __init__(self, config: Config, agent: type, obs_space: spaces.Dict,
                 act_space: spaces.Space):
        self.config, self.variant = config, agent_name(agent)
        self.logdir = run_folder(config, agent)
        self.checkpoint = self.logdir / "checkpoint.pt"
        self.replay = agent.Replay(config.replay_size)
        self.metrics = []  # of gradient steps since the last report
        self.scores = []  # of episodes since then
        self.update_complete = True  # false within gradient steps
        self.in_env_step = False
        self.received_signals = []
        self.handlers = {}  # of signals, before this run
        self.logger = None  # until the run is opened
        self.lock_folder()
        try:
            self.agent = self.load_or_create(agent, obs_space, act_space)
        except BaseException:  # a notebook keeps the exception, and with it this object
            self.lock.release()
            raise
        self.run_id = self.agent.resumed_from.get("run_id") or os.urandom(8).hex()
        self.replay_dir = self.logdir / "replay" / self.run_id
        self.step = self.agent.resumed_from["step"]  # of all environments together, so far
        self.last_save = self.last_video = self.last_report = self.step
        self.start_time = time.monotonic() - self.agent.resumed_from["seconds"]  # without pauses

    def lock_folder(self):
        self.lock = Lock(self.logdir)

    def load_or_create(self, agent: type, obs_space: spaces.Dict,
                       act_space: spaces.Space) -> Director:
        if not self.checkpoint.exists():
            return agent(obs_space, act_space, self.config)
        loaded = load(self.checkpoint.parent, agent, **dataclasses.asdict(self.config))
        refuse_other_spaces(loaded, obs_space, act_space)
        if loaded.resumed_from["run_id"] != read_settings(self.logdir).get("run_id"):
            raise UserError(f"{self.checkpoint} is of another run than config.json beside it")
        return loaded

    def open(self):
        """Continue the files of the run, and listen to signals."""
        config = dataclasses.asdict(self.config)
        settings = json.dumps({"run_id": self.run_id, **config}, indent=2)
        write_file(self.logdir / "config.json", io.BytesIO(settings.encode()), self.run_id)
        self.replay_dir.mkdir(parents=True, exist_ok=True)
        self.logger = Logger(self.logdir, self.run_id, self.step, config)
        self.report_time = time.monotonic()
        with contextlib.suppress(ValueError):  # only the main thread can handle signals
            for number in SIGNALS:
                if signal.getsignal(number) != signal.SIG_IGN:  # as HUP is under nohup
                    self.handlers[number] = signal.signal(number, self.on_signal)
        names = " ".join(run_names(self.config, type(self.agent)))
        print(f"{self.config.task}: {names} of size {self.config.size}, {self.config.precision} on "
              f"{self.config.device}, in {self.logdir}", flush=True)
        if self.step:
            old = self.agent.resumed_from["config"]
            changed = [f" --{key} is {config[key]}, was {old[key]}." for key in config
                       if key in old and old[key] != config[key]]
            print(f"Resumed at step {self.step}.{''.join(changed)}", flush=True)

    def on_signal(self, number: int, frame):
        """Note the signal; a second one of its kind ends the program without saving."""
        self.received_signals.append(number)
        signal.signal(number, signal.SIG_DFL)
        if self.in_env_step:
            self.in_env_step = False
            raise KeyboardInterrupt

    @contextlib.contextmanager
    def interruptible(self):
        """Inside, signals raise KeyboardInterrupt; so does one that was received before."""
        self.in_env_step = True
        try:
            if self.received_signals:
                raise KeyboardInterrupt
            yield
        finally:
            self.in_env_step = False

    def should_continue(self) -> bool:
        return self.step < self.config.steps and not self.received_signals

    def reseed(self, *more: int) -> int:
        """Seed all draws by seed and step when a run starts; returns a seed for environments."""
        seeds = np.random.SeedSequence([self.config.seed, self.step, *more]).generate_state(3)
        torch.manual_seed(int(seeds[0]))
        self.replay.rng = np.random.default_rng(seeds[1])
        return int(seeds[2]) // 2  # below 2**31: environment i adds i

    def save(self):
        """Write new episodes, then the checkpoint that lists all; never after a broken update."""
        if self.step == self.last_save or not self.update_complete:
            return
        self.mean_metrics()  # raises if one is not finite
        self.lock.check(self.replay_dir)
        agent = self.agent
        action = int(agent.act_space.n) if agent.discrete else tuple(agent.act_space.shape)
        sizes = {key: math.prod(space.shape) for key, space in agent.obs_space.items()}
        saved = {
            "format": 4, "run_id": self.run_id, "variant": self.variant,
            "config": dataclasses.asdict(self.config),
            "spaces": (sizes, action), "agent": agent.state_dict(),
            "optimizers": {key: x.state_dict() for key, x in agent.optimizers.items()},
            "grad_steps": agent.grad_steps, "step": self.step,
            "seconds": time.monotonic() - self.start_time,
            "episodes": self.replay.save(self.replay_dir)}
        buffer = io.BytesIO()
        torch.save(saved, buffer)
        self.write_checkpoint(buffer)
        kept = {f"{name}.npz" for name in (*self.replay.lengths_on_disk, *self.replay.left_out)}
        for path in self.replay_dir.glob("[0-9]*.npz"):
            if path.name not in kept:  # dropped, or written after the last checkpoint
                path.unlink()
        self.last_save = self.step

    def write_checkpoint(self, buffer: io.BytesIO):
        write_file(self.checkpoint, buffer, self.run_id)

    def close(self):
        """Save and release everything, whatever has ended the loop."""
        try:
            self.save()
            # `train` calls this in a `finally`, so an exception may be on its way.
            interrupted = self.received_signals or sys.exc_info()[0]
            if self.logger and interrupted and self.step == self.last_save > 0:
                with contextlib.suppress(OSError):  # stderr may be full or closed
                    print(f"Saved at step {self.step}; the same command resumes.", file=sys.stderr)
        finally:
            try:
                if self.logger:
                    self.logger.close()
            finally:
                self.lock.release()
                for number, handler in self.handlers.items():  # last: from now on signals interrupt
                    signal.signal(number, handler)

    def times_due(self, every: int) -> int:
        """How many multiples of `every` were reached with the steps that `record` has added."""
        return self.step // every - (self.step - self.config.envs) // every

    def record(self, driver: Driver):
        """Add a step of all environments to the replay, and log the episodes that ended."""
        self.replay.add(driver.rows)
        self.step += self.config.envs
        for env in np.flatnonzero(driver.rows["is_last"]):
            self.scores.append(float(driver.score[env]))
            self.log({"episode/score": self.scores[-1], "episode/length": int(driver.length[env])})

    def mean_metrics(self) -> dict[str, float]:
        """Means since the last report; FloatingPointError if one is not finite."""
        values = {}  # of each metric; a variant may not have all of them in every gradient step
        for step in self.metrics:
            for key, value in step.items():
                values.setdefault(key, []).append(value)
        averages = [torch.stack(each).mean() for each in values.values()]
        means = {}
        for key, average in zip(values, all_reduce_mean(averages), strict=True):
            means[key] = average.item()
        for key, value in means.items():
            if not math.isfinite(value):
                self.update_complete = False
                raise FloatingPointError(f"{key} is {value} since step {self.last_report}; nothing "
                                         f"is saved after the checkpoint of step {self.last_save}")
        return means

    def report(self):
        """Log the mean metrics of the gradient steps since the last report, and print a line."""
        means = self.mean_metrics()
        now = time.monotonic()
        rate = (self.step - self.last_report) / max(now - self.report_time, 1e-9)
        self.log({**{f"train/{key}": value for key, value in means.items()},
                  "train/grad_steps": self.agent.grad_steps, "train/steps_per_second": rate,
                  "train/replay_steps": self.replay.steps})
        line = [f"{self.agent.grad_steps} gradient steps"]
        if self.scores:
            line.append(f"{len(self.scores)} episodes with returns {min(self.scores):.1f} to "
                        f"{max(self.scores):.1f}, mean {np.mean(self.scores):.1f}")
        if means:
            line.append(f"model loss {means['model_loss']:.4g}")
        line.append(f"{rate:.1f} steps/s")
        if means and rate:  # random actions before training are much faster
            hours = (self.config.steps - self.step) / rate / 3600
            line.append(f"{hours:.2f} hours left")
        print(f"step {self.step}: {', '.join(line)}", flush=True)
        self.metrics, self.scores = [], []
        self.report_time, self.last_report = now, self.step

    def log(self, metrics: dict[str, float]):
        extra = {"seconds": round(time.monotonic() - self.start_time, 1)}
        if self.config.action_repeat > 1:
            extra["frames"] = self.step * self.config.action_repeat
        self.logger.write(metrics, self.step, **extra)

    def draw(self, film: list[tuple]):
        """Write pictures of an episode and of replay; random draws of training stay the same."""
        rng = copy.deepcopy(self.replay.rng)
        with torch.random.fork_rng():
            pictures.write(self.agent, film, self.replay.sample(6, 64),
                           self.logdir / f"pictures/{self.step}", self.logger.events)
        self.replay.rng = rng
        self.last_video = self.step


Director.Replay, Director.Run = Replay, Run


# ---- The command line -----------------------------------------------------------------------
def main(argv: list[str] | None = None, agent: type = Director) -> int:
    """The command line; returns the exit code, which is 2 for a user's mistake."""
    with contextlib.suppress(AttributeError):  # without a terminal: None, or a notebook's
        sys.stdout.reconfigure(errors="replace")  # print ? for what the terminal cannot show
    try:
        flags = parse_args(argv, agent.Config, __doc__.split("\n")[0])
        config = agent.Config(**flags)
        keep_freed_memory()
        if not config.eval:
            return train(config, agent)
        evaluate(config, agent, flags)
        return 0
    except UserError as error:
        message = str(error)
    except OSError as error:
        if error.errno not in CANNOT_WRITE:
            raise  # it is not the user's mistake
        message = f"cannot write to {error.filename or 'stdout or --logdir'}: {error.strerror}"
    except (MemoryError, RuntimeError) as error:  # PyTorch raises the latter
        if not re.search("(allocate|enough|out of) memory|Storage size|MemoryError", repr(error)):
            raise
        message = "there is too little memory; try smaller networks (--size) or --replay_size"
    except KeyboardInterrupt:  # before the run has begun, or in an evaluation
        return 128 + signal.SIGINT
    with contextlib.suppress(OSError):
        print(f"{agent_name(agent)}.py: {message}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
