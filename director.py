"""Director: deep hierarchical planning from pixels, in one file of PyTorch.

Director (Hafner, Lee, Fischer, Abbeel, NeurIPS 2022, "the paper") learns a world model from
pixels and plans inside it on two levels. Every K = 8 steps a *manager* picks a discrete code,
the *skill*; a goal autoencoder turns it into a *goal*, a point in the world model's state space.
A *worker* chooses the primitive actions and is rewarded for reaching the goal, nothing else. The
manager is rewarded for task reward and for novelty. Nobody is told what a good goal looks like.

    python director.py --task dmc_walker_walk       train; the same command resumes
    python director.py --logdir RUN --eval 10       play 10 episodes with a trained agent

From the paper to this file, in its order:
    Configuration, numerics  Config, balanced_kl (Section 2.1, eq. 2), AutoAdapt, Normalizer
    Networks                 Encoder, Decoder, RSSM (2.1, eq. 1)
    Models and players       WorldModel (2.1, eq. 2), GoalAutoencoder (2.2, eq. 3-4, 6), ActorCritic
    Hierarchical returns     max_cosine (eq. 8), lambda_return, split_ and abstract_trajectory
    The agent                Director: choose (2.3), act, imagine (2.4), train_goals, train_step
    Replay, environments     Replay, make_env, vector_envs, Driver
    A run                    load, Run, draw, train, evaluate, main

Symbols in shapes: B replay chunks in a batch, T steps in each; N = BT imagined trajectories, H
steps in each; K steps for a goal; D deterministic state; SC stochastic state, S groups of C
classes; GL skill, G groups of L classes; A action; E environments; F features of a state.

A trajectory is a dict of tensors, time first, that `Director.imagine` plays from N replayed states,
and of which `split_trajectory` makes the worker's, `abstract_trajectory` the manager's:
    key             shape              entry t is
    deter, stoch    [H+1, N, D or SC]  the state at time t; at 0 the replayed one
    skill, goal     [H+1, N, GL or D]  the manager's code, and its decoding, during action t
    action, ent     [H+1, N, A]        what the worker does in state t; its entropy, if needed
    cont            [H+1, N]           the chance that state t is no end if t-1 is none; 0 or 1 at 0
    reward_<name>   [H, N]             what action t earns, a function of state t+1
"""

import argparse
import contextlib
import copy
import ctypes
import dataclasses
import functools
import io
import itertools
import json
import math
import multiprocessing.forkserver
import os
import pathlib
import signal
import sys
import time
import warnings
import zipfile

import gymnasium
import numpy as np
import torch
import torch.nn.functional as F
import tqdm
from gymnasium import spaces
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv
from PIL import Image
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter

with contextlib.suppress(ImportError):  # PyTorch's LLVM has to be loaded before an OpenGL driver's
    import triton  # noqa: F401

# ---- Configuration --------------------------------------------------------------------------

class UserError(ValueError):
    """A mistake of the user's: `main` prints it in one line and exits with code 2."""


def option(default, text: str, *choices: str, low=1, high=1e12, group="", fixed=False):
    """A field of Config and its flag; a run keeps what is fixed: it shapes networks or data."""
    return dataclasses.field(default=default, metadata=locals())


@dataclasses.dataclass
class Config:
    """All that can be set, and its flags; a tuple holds the defaults of sizes paper, s and xs."""

    task: str = option("dmc_walker_walk", "dmc_<domain>_<task>, pinpad_<three..eight>, gym_<id> or "
                       "gym_<module>:<id>", group="run", fixed=True)
    obs: str = option("auto", "dmc_: pixels, or all", "auto", "pixels", "state", "both", fixed=True)
    agent: str = option("director", "dreamer: flat", "director", "dreamer", fixed=True)
    size: str = option("auto", "paper on a GPU, else xs", "auto", "paper", "s", "xs", fixed=True)
    device: str = option("auto", "where to compute", "auto", "cpu", "cuda")
    precision: str = option("auto", "auto: bfloat16 if native", "auto", "float32", "bfloat16")
    eager: bool = option(False, "no CUDA graphs on a GPU, which variants never use")
    seed: int = option(0, "of networks, samples and environments", low=0, high=2**32 - 1)
    steps: int = option(1_000_000, "environment steps in all, prefill included")
    logdir: str = option("", "where to write; default: runs/<task>/<agent>-<size>-<seed>")
    eval: int = option(0, "play this many episodes with the agent in --logdir, and exit", low=0)
    log_every: int = option(1000, "environment steps between two log lines")
    save_every: int = option(10_000, "environment steps between two checkpoints")
    video_every: int = option(20_000, "environment steps between two sets of pictures")
    envs: int = option(4, "environments that are played side by side", group="data")
    processes: str = option("auto", "for each; auto: dmc_, gym_<module>:<id>", "auto", "yes", "no")
    render_quality: str = option("full", "fast: no shadows, jagged", "full", "fast", fixed=True)
    prefill: int = option(10_000, "random environment steps before training starts")
    random: int = option((0, 0, 50_000), "random steps at most, till it sees (discrete)", low=0)
    replay_size: int = option(1_000_000, "steps to keep; the oldest episodes go first")
    train_every: int = option((16, 16, 8), "environment steps per gradient step")
    batch_size: int = option((16, 16, 8), "replay chunks in a batch")
    batch_length: int = option((64, 64, 32), "steps in a replay chunk")
    deter: int = option((1024, 256, 128), "deterministic state", group="networks", fixed=True)
    hidden: int = option((1024, 256, 128), "hidden units of the recurrent model", fixed=True)
    stoch: int = option((32, 16, 16), "groups of the stochastic state", fixed=True)
    classes: int = option((32, 16, 16), "classes in each group of the stochastic state", fixed=True)
    units: int = option((512, 256, 128), "units in the hidden layers of the MLPs", fixed=True)
    layers: int = option((4, 2, 2), "hidden layers of the MLPs", fixed=True)
    cnn_depth: int = option((64, 32, 16), "channels of the first convolution", fixed=True)
    standardize: str = option(("no", "no", "yes"), "observed vectors", "no", "yes", fixed=True)
    skill_groups: int = option(8, "groups of the manager's code", fixed=True)
    skill_classes: int = option(8, "classes in each group of the code", low=2, fixed=True)
    learning_rate: float = option((1e-4, 2e-4, 4e-4), "of all optimisers", low=0, group="learning")
    kl_target: float = option((3.5, 3.5, 1.0), "nats a step that the model need not foresee", low=0)
    kl_weight: float = option((1.0, 1.0, 10.0), "of the KL, in batches of images it sees", low=1e-5)
    discount: float = option(0.99, "of rewards, per step of the worker", low=0.01, high=1)
    manager_discount: float = option(0.99, "per choice of the manager", low=0.01, high=1)
    lam: float = option(0.95, "lambda of the returns", low=0, high=1)
    horizon: int = option(16, "imagined steps, a multiple of --goal_duration")
    goal_duration: int = option(8, "steps that a goal lasts")
    worker_extr: float = option(0.0, "task reward for the worker, 0.5 say", low=0, fixed=True)
    manager_expl: float = option(0.1, "weight of the exploration reward for the manager", low=0)
    slow_every: int = option((100, 100, 20), "gradient steps between copies to the slow critics")

    def __post_init__(self):
        cuda = torch.cuda.is_available()
        if self.device == "cuda" and not cuda:
            raise UserError("--device cuda: PyTorch finds no CUDA GPU here; use --device cpu")
        self.device = ("cuda" if cuda else "cpu") if self.device == "auto" else self.device
        gpu = self.device == "cuda"
        self.size = ("paper" if gpu else "xs") if self.size == "auto" else self.size
        if self.precision == "auto":
            cpu = getattr(torch.cpu, "get_capabilities", dict)()
            native = torch.cuda.is_bf16_supported(including_emulation=False) if gpu else (
                cpu.get("avx512_bf16") or cpu.get("amx_bf16") or cpu.get("bf16"))
            self.precision = "bfloat16" if native else "float32"
        for field in dataclasses.fields(self):
            value, low, high = getattr(self, field.name), *map(field.metadata.get, ("low", "high"))
            if isinstance(value, tuple):
                value = value[("paper", "s", "xs").index(self.size)]
                setattr(self, field.name, value)
            if field.type in (int, float) and not low <= value <= high:
                raise UserError(f"--{field.name} {value}: must be from {low} to {high:g}")
        if self.agent == "director" and self.horizon % self.goal_duration:
            raise UserError(f"--horizon {self.horizon}: not a multiple of --goal_duration")


def parse_args(argv: list[str] | None, config: type) -> dict:
    """The flags given on the command line, and only those; raises UserError."""

    def integer(text: str) -> int:
        if not float(text).is_integer():
            raise ValueError
        return int(float(text))  # people write --steps 1e6

    def fail(message: str):
        raise UserError(message)

    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.error = fail
    for field in dataclasses.fields(config):
        text, choices, title = map(field.metadata.get, ("text", "choices", "group"))
        if title:
            group = parser.add_argument_group(title)
        value = {"action": "store_true"} if field.type is bool else {
            "type": integer if field.type is int else field.type, "choices": choices or None,
            "metavar": None if choices else ""}
        group.add_argument(f"--{field.name}", default=argparse.SUPPRESS,
                           help=f"{text} [{field.default}]", **value)
    return vars(parser.parse_args(argv))


# ---- Numerics and distributions -------------------------------------------------------------

def symlog(x: Tensor) -> Tensor:
    """sign(x) ln(1 + |x|): compresses rewards and returns of any size."""
    return x.sign() * x.abs().log1p()


def symexp(x: Tensor) -> Tensor:
    """The inverse of `symlog`."""
    return x.sign() * x.abs().expm1()


class OneHot:
    """Categorical distributions [...] of logits [..., C], of which a share `unimix` is uniform."""

    def __init__(self, logits: Tensor, unimix: float = 0.0):
        if unimix:
            logits = ((1 - unimix) * logits.softmax(-1) + unimix / logits.shape[-1]).log()
        self.logits = logits.log_softmax(-1)
        self.probs = self.logits.exp()
        self.entropy_range = 0.0, math.log(logits.shape[-1])

    def rsample(self) -> Tensor:
        # The class whose part of [0, 1) a random number falls into. Random numbers are slow on a
        # CPU, and this takes one where the Gumbel trick takes C: xs 0.86 -> 0.74 s a step.
        below = self.probs.detach().cumsum(-1)
        index = (below[..., :-1] <= torch.rand_like(below[..., :1])).sum(-1, keepdim=True)
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


class BoundedNormal(torch.distributions.Normal):
    """Normal(tanh(mean), std) per dimension, [..., A], std in 0.03..1; samples are not clipped."""

    entropy_range = tuple(0.5 + 0.5 * math.log(2 * math.pi) + math.log(x) for x in (0.03, 1.0))

    def __init__(self, mean: Tensor, std: Tensor):
        super().__init__(mean.tanh(), 0.97 * std.sigmoid() + 0.03, validate_args=False)


def entropy_share(dist: OneHot | BoundedNormal) -> Tensor:
    """Entropy as a share of what is possible, per group of a code or dimension of an action."""
    low, high = dist.entropy_range
    return (dist.entropy() - low) / (high - low)


def balanced_kl(post_logit: Tensor, prior_logit: Tensor, balance: float) -> Tensor:
    """balance * KL(sg(post) || prior) + (1 - balance) * KL(post || sg(prior)) (paper, eq. 2).

    [..., S, C], [..., S, C] -> [...], summed over groups. With balance > 0.5 the prior moves
    towards the posterior more than the posterior gives up towards the prior.
    """
    post, prior = post_logit.log_softmax(-1), prior_logit.log_softmax(-1)
    forward = F.kl_div(prior, post.detach(), reduction="none", log_target=True)
    backward = F.kl_div(prior.detach(), post, reduction="none", log_target=True)
    return (balance * forward + (1 - balance) * backward).sum((-2, -1))


def average(tensors: list[Tensor]) -> list[Tensor]:
    """Means over processes that train together: a parallel run puts them here."""
    return tensors


class AutoAdapt(nn.Module):
    """Weights a regulariser such that its mean stays near `target`.

    The scale, one for each element of `shape`, starts at 1 and moves by 10%, within [low, high], on
    calls where the mean is 10% off. `inverse`: grow it below the target, and negate (an entropy).
    """

    def __init__(self, shape: tuple, target: float, low: float, high: float, inverse=False):
        super().__init__()
        self.target, self.low, self.high, self.inverse = target, low, high, inverse
        self.register_buffer("scale", torch.ones(shape))

    def forward(self, reg: Tensor) -> Tensor:
        """Update the scale from `reg` [..., *shape], then return the weighted regulariser."""
        mean, = average([reg.detach().flatten(0, reg.ndim - self.scale.ndim - 1).mean(0)])
        above, below = mean > 1.1 * self.target, mean < self.target / 1.1
        grow, shrink = (below, above) if self.inverse else (above, below)
        self.scale.mul_(1.1 ** (grow.float() - shrink.float())).clamp_(self.low, self.high)
        return self.scale.clone() * (-reg if self.inverse else reg)


class Normalizer(nn.Module):
    """Divides by a running standard deviation ("std"), or standardises ("mean_std").

    Exponential means of x and x^2 over all but `shape`, bias-corrected; deviation >= 1 / limit.
    """

    def __init__(self, impl: str, decay: float, limit: float, shape: tuple = ()):
        super().__init__()
        self.impl, self.decay, self.limit = impl, decay, limit
        self.register_buffer("moments", torch.zeros(2, *shape, dtype=torch.float64))
        self.register_buffer("count", torch.zeros((), dtype=torch.float64))

    def forward(self, x: Tensor, update: bool = True) -> Tensor:
        """Normalise x [..., *shape], after taking it into the statistics with `update`."""
        if update:
            y = x.detach().double().reshape(-1, *self.moments.shape[1:])
            moments, = average([torch.stack([y.mean(0), (y**2).mean(0)])])
            self.moments.lerp_(moments, 1 - self.decay)
            self.count += 1
        mean, square = self.moments / (1 - self.decay**self.count).clamp(min=1e-9)  # 0 of 0
        scale = (square - mean**2).clamp(min=self.limit**-2).rsqrt().float()
        return (x - mean.float()) * scale if self.impl == "mean_std" else x * scale


# ---- Networks -------------------------------------------------------------------------------
# Hidden layers are linear without bias, layer norm, ELU. Weights are Glorot uniform.

def glorot(layer: nn.Module, scale: float = 1.0) -> nn.Module:
    """Glorot uniform weights, their variance times scale, and no bias."""
    nn.init.xavier_uniform_(layer.weight, gain=scale**0.5)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer


class Norm(nn.LayerNorm):
    """Layer norm over the features of [N, C], or the channels of [N, C, h, w]."""

    def forward(self, x: Tensor) -> Tensor:  # in float32: bfloat16 sums gradients wrong
        y = super().forward(x.movedim(1, -1).float() if x.ndim == 4 else x.float()).to(x.dtype)
        return y.movedim(-1, 1) if x.ndim == 4 else y


def dense(inputs: int, outputs: int) -> list[nn.Module]:
    return [glorot(nn.Linear(inputs, outputs, bias=False)), Norm(outputs, eps=1e-3), nn.ELU()]


def hidden_layers(inputs: int, config: Config) -> nn.Sequential:
    """[..., inputs] -> [..., units]."""
    sizes = [inputs] + [config.units] * config.layers
    return nn.Sequential(*[x for a, b in itertools.pairwise(sizes) for x in dense(a, b)])


class MLP(nn.Module):
    """Hidden layers and a linear one that is float32 always, [..., inputs] -> [..., *outputs]."""

    def __init__(self, inputs: int, outputs: tuple, config: Config):
        super().__init__()
        self.outputs = outputs
        self.hidden = hidden_layers(inputs, config)
        self.out = glorot(nn.Linear(config.units, math.prod(outputs)), 0.1)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.hidden(x).float()
        with torch.autocast(x.device.type, enabled=False):  # bfloat16 keeps 8 bits of a value
            return self.out(hidden).reshape(*x.shape[:-1], *self.outputs)


def convolutions(kind: type, channels: list[int], kernels: list[int]) -> list[nn.Module]:
    """Layers of stride 2, each with norm and activation."""
    layers = []
    for (a, b), kernel in zip(itertools.pairwise(channels), kernels, strict=True):
        layers += [glorot(kind(a, b, kernel, stride=2, bias=False)), Norm(b, eps=1e-3), nn.ELU()]
    return layers


class Encoder(nn.Module):
    """Observation to [..., size]. Images shrink 64 -> 31 -> 14 -> 6 -> 2; states go to an MLP."""

    def __init__(self, space: spaces.Dict, config: Config):
        super().__init__()
        self.keys, self.size, self.norm = list(space), 0, None
        if "image" in self.keys:
            channels = [3] + [config.cnn_depth * 2**i for i in range(4)]
            layers = convolutions(nn.Conv2d, channels, [4] * 4)
            self.image = nn.Sequential(*layers).to(memory_format=torch.channels_last)
            self.size += 4 * channels[-1]
        if "state" in self.keys:
            self.state = hidden_layers(space["state"].shape[0], config)
            self.size += config.units
            if config.standardize == "yes":
                self.norm = Normalizer("mean_std", 0.999, 1e2, space["state"].shape)

    def forward(self, obs: dict[str, Tensor]) -> Tensor:
        outs = []
        if "image" in self.keys:
            image = self.scaled("image", obs["image"])  # [..., 64, 64, 3]: permuted, channels-last
            x = self.image(image.flatten(0, -4).permute(0, 3, 1, 2))
            outs.append(x.permute(0, 2, 3, 1).reshape(*image.shape[:-3], -1))
        if "state" in self.keys:
            outs.append(self.state(self.scaled("state", obs["state"])))
        return torch.cat(outs, -1)

    def scaled(self, key: str, value: Tensor, update: bool = False) -> Tensor:
        """As it is seen, and to be predicted: an image in 0..1, a vector by `norm`, if any."""
        if key == "image":
            return value.float() / 255
        return self.norm(value.float(), update).clamp(-10, 10) if self.norm else value.float()


class Decoder(nn.Module):
    """Features [..., F] to image [..., 64, 64, 3] in 0..1 (1 -> 5 -> 13 -> 30 -> 64) and state."""

    def __init__(self, feat: int, space: spaces.Dict, config: Config):
        super().__init__()
        self.keys = list(space)
        if "image" in self.keys:
            channels = [feat] + [config.cnn_depth * 2**i for i in (2, 1, 0)]
            layers = convolutions(nn.ConvTranspose2d, channels, [5, 5, 6])
            layers.append(glorot(nn.ConvTranspose2d(channels[-1], 3, 6, 2)))
            self.image = nn.Sequential(*layers).to(memory_format=torch.channels_last)
        if "state" in self.keys:
            self.state = MLP(feat, space["state"].shape, config)

    def forward(self, feat: Tensor) -> dict[str, Tensor]:
        outs = {}
        if "image" in self.keys:
            # On one pixel, a transposed convolution is a matrix product: paper 8.7 -> 6.5 s a step.
            first = self.image[0]
            x = F.linear(feat, first.weight.permute(2, 3, 1, 0).flatten(0, 2))
            x = x.reshape(-1, *first.kernel_size, first.out_channels).permute(0, 3, 1, 2)
            x = self.image[1:](x).float().sigmoid().permute(0, 2, 3, 1)
            outs["image"] = x.reshape(*feat.shape[:-1], *x.shape[1:])
        if "state" in self.keys:
            outs["state"] = self.state(feat)
        return outs


class RSSM(nn.Module):
    """Recurrent state-space model (paper, eq. 1): `deter` [..., D] and `stoch` [..., SC]."""

    def __init__(self, embed: int, action: int, config: Config):
        super().__init__()
        deter, hidden, self.groups = config.deter, config.hidden, (config.stoch, config.classes)
        self.size = math.prod(self.groups)  # of stoch
        self.initial_deter = nn.Parameter(torch.zeros(deter))
        self.inputs = nn.Sequential(*dense(self.size + action, hidden))
        self.gru = nn.Sequential(*dense(deter + hidden, 3 * deter)[:2])
        self.prior_net, self.post_net = (
            nn.Sequential(*dense(size, hidden), glorot(nn.Linear(hidden, self.size)))
            for size in (deter, deter + embed))

    def prior(self, deter: Tensor, stoch: Tensor | None = None) -> Tensor:
        """Logits [..., S, C] before the observation; stoch is for variants with levels in it."""
        return self.prior_net(deter).float().unflatten(-1, self.groups)

    def posterior(self, deter: Tensor, embed: Tensor) -> tuple[Tensor, Tensor]:
        """A sample [..., SC], and logits [..., S, C], once the observation is seen."""
        logit = self.post_net(torch.cat([deter, embed], -1)).float().unflatten(-1, self.groups)
        return OneHot(logit).rsample().flatten(-2), logit

    def guess(self, deter: Tensor, sample: bool = True) -> Tensor:
        """stoch [..., SC] without an observation: drawn from the prior, or its mode."""
        dist = OneHot(self.prior(deter))
        return (dist.rsample() if sample else dist.mode).flatten(-2)

    def initial(self) -> tuple[Tensor, Tensor]:
        """The learned first state: deter [D], and the mode of the prior there, [SC]."""
        deter = self.initial_deter.tanh()
        return deter, self.guess(deter, sample=False)

    def recur(self, deter: Tensor, stoch: Tensor, action: Tensor) -> Tensor:
        """The next deter, [..., D]."""
        x = self.inputs(torch.cat([stoch, action], -1))
        reset, cand, update = self.gru(torch.cat([deter, x], -1)).float().chunk(3, -1)
        update = (update - 1).sigmoid()  # remembers, at first
        return update * (reset.sigmoid() * cand).tanh() + (1 - update) * deter

    def img_step(self, deter: Tensor, stoch: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
        """A step into the unseen: the next deter and stoch."""
        deter = self.recur(deter, stoch, action)
        return deter, self.guess(deter)

    def obs_step(self, deter, stoch, action, embed, is_first, initial=None) -> tuple:
        """A step with an observation, where is_first from `initial`: deter, stoch, its logits."""
        first, (initial_deter, initial_stoch) = is_first[:, None], initial or self.initial()
        deter = torch.where(first, initial_deter, deter)
        stoch = torch.where(first, initial_stoch, stoch)
        deter = self.recur(deter, stoch, action.masked_fill(first, 0))
        return deter, *self.posterior(deter, embed)


# ---- World model, goal autoencoder, actor-critic --------------------------------------------

def autocast(config: Config) -> torch.autocast:
    """Mixed precision for forward passes; a context must not span an optimiser's step."""
    return torch.autocast(config.device, torch.bfloat16, config.precision == "bfloat16")


class Optimizer(torch.optim.AdamW):
    """Adam with clipped gradients, and weight decay for matrices only. It is `module.optimizer`."""

    def __init__(self, module: nn.Module, config: Config):
        self.params = list(module.parameters())
        groups = [{"params": [p for p in self.params if p.ndim > 1], "weight_decay": 1e-2},
                  {"params": [p for p in self.params if p.ndim <= 1], "weight_decay": 0.0}]
        super().__init__(groups, lr=config.learning_rate, eps=1e-6, fused=True)
        module.optimizer = self

    def minimize(self, loss: Tensor) -> Tensor:
        """One step of these parameters alone; returns the norm of the gradient before clipping."""
        gradients = average(torch.autograd.grad(loss, self.params))
        for param, gradient in zip(self.params, gradients, strict=True):
            param.grad = gradient
        norm = nn.utils.clip_grad_norm_(self.params, 100.0)
        self.step()
        self.zero_grad()
        return norm


class WorldModel(nn.Module):
    """Learns to encode observations and to predict what follows (paper, Section 2.1)."""

    RSSM = RSSM

    def __init__(self, obs_space: spaces.Dict, action: int, config: Config):
        super().__init__()
        self.encoder = Encoder(obs_space, config)
        self.rssm = self.RSSM(self.encoder.size, action, config)
        feat = config.deter + self.rssm.size
        self.decoder = Decoder(feat, obs_space, config)
        self.reward_head = MLP(feat, (), config)  # in symlog space
        self.cont_head = MLP(feat, (), config)  # logit of not being terminal
        self.kl_adapt, self.kl_weight = AutoAdapt((), config.kl_target, 1e-5, 1), config.kl_weight

    def observe(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Filter chunks [B, T, ...]: embed, deter, stoch, and logits of posterior and prior."""
        embed, first, steps = self.encoder(batch), batch["is_first"], []
        initial = self.rssm.initial()
        deter, stoch = (x.expand(len(first), -1) for x in initial)
        rows = (x.unbind(1) for x in (batch["action"], embed, first))
        for row in zip(*rows, strict=True):
            deter, stoch, logit = self.rssm.obs_step(deter, stoch, *row, initial)
            steps.append((deter, stoch, logit))
        deter, stoch, post = (torch.stack(x, 1) for x in zip(*steps, strict=True))
        prior = self.rssm.prior(deter, stoch)
        return {"embed": embed, "deter": deter, "stoch": stoch, "post": post, "prior": prior}

    def kl_loss(self, states: dict[str, Tensor]) -> tuple[Tensor, dict]:
        """What keeps posterior and prior together, [B, T], and metrics."""
        kl = balanced_kl(states["post"], states["prior"], 0.8)
        metrics = {"kl": kl.mean(), "kl_scale": self.kl_adapt.scale}
        for key in ("prior", "post"):
            metrics[f"{key}_ent"] = OneHot(states[key]).entropy().sum(-1).mean()
        return self.kl_adapt(kl), metrics

    def loss(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict, dict]:
        """Paper, eq. 2, on chunks [B, T, ...]: loss, states [B, T, ...], metrics."""
        states = self.observe(batch)
        feat = torch.cat([states["deter"], states["stoch"]], -1)
        losses, sees = {}, torch.zeros((), device=feat.device)
        for key, mean in self.decoder(feat).items():
            target = self.encoder.scaled(key, batch[key], update=True)
            losses[key] = ((mean - target) ** 2).flatten(2).sum(-1)
            if key == "image":  # to see is to explain 95% of the variance
                x, error = target.flatten(0, 1), losses[key].detach().mean()
                error, center, square = average([error, x.mean(0), x.square().sum() / len(x)])
                sees = (error < 0.05 * (square - center.square().sum())).float()
        losses["reward"] = (self.reward_head(feat) - symlog(batch["reward"])) ** 2
        losses["cont"] = F.binary_cross_entropy_with_logits(
            self.cont_head(feat), 1 - batch["is_terminal"].float(), reduction="none")
        kl, metrics = self.kl_loss(states)
        losses["kl"], metrics["sees"] = kl * self.kl_weight**sees, sees
        losses["model"] = states["error"] = sum(losses.values())  # [B, T], like each of them
        metrics |= {f"{key}_loss": value.mean() for key, value in losses.items()}
        return metrics["model_loss"], states, metrics


class GoalAutoencoder(nn.Module):
    """Compresses states into codes, G one-hot vectors of L, [..., GL] (paper, 2.2, eq. 3)."""

    def __init__(self, config: Config):
        super().__init__()
        self.groups, self.size = (config.skill_groups, config.skill_classes), config.deter
        self.encoder = MLP(config.deter, self.groups, config)
        self.decode = MLP(math.prod(self.groups), (config.deter,), config)  # [..., GL] -> [..., D]
        self.kl_adapt = AutoAdapt((), target=10.0, low=1e-5, high=1.0)

    def encode(self, deter: Tensor) -> OneHot:
        """[..., D] to a distribution over codes, [..., G, L]."""
        return OneHot(self.encoder(deter))

    def loss(self, deter: Tensor, weight: float | Tensor = 1.0) -> tuple[Tensor, dict]:
        """Paper, eq. 4, on states [N, D] of these weights [N]: loss, metrics."""
        code = self.encode(deter)
        rec = ((self.decode(code.rsample().flatten(-2)) - deter) ** 2).sum(-1) * weight
        kl = (math.log(self.groups[1]) - code.entropy()).sum(-1) * weight  # to a uniform prior
        loss = (rec + self.kl_adapt(kl)).mean()
        return loss, {"goal_loss": loss, "goal_rec": rec.mean(), "goal_kl": kl.mean(),
                      "goal_kl_scale": self.kl_adapt.scale}

    @torch.no_grad()
    def novelty(self, deter: Tensor) -> Tensor:
        """Exploration reward: how badly states are reconstructed, [..., D] -> [...] (eq. 6)."""
        skill = self.encode(deter).rsample().flatten(-2)
        return ((self.decode(skill) - deter) ** 2).mean(-1)


class ActorCritic(nn.Module):
    """An actor, and a critic for each kind of reward, that learn from imagined trajectories.

    keys, feat: the parts of a state that both see, and their size. action: its shape, ([groups,]
    classes) if discrete, else (dimensions,). rewards: their weights. discount: per action. Actors
    of continuous actions learn by back-propagated returns, if not `reinforce`; others by REINFORCE.
    """

    def __init__(self, keys: tuple, feat: int, action: tuple, discrete: bool,
                 rewards: dict[str, float], config: Config, reinforce: bool = False,
                 discount: float = 0.0):
        super().__init__()
        self.keys, self.action, self.rewards, self.config = keys, action, rewards, config
        self.discount = discount or config.discount
        self.discrete, self.reinforce = discrete, discrete or reinforce
        self.actor = MLP(feat, action if discrete else (2, *action), config)
        if not discrete:  # means and deviations are two layers in one, each with its own scale
            for part, scale in zip(self.actor.out.weight.chunk(2), (0.1, 1.0), strict=True):
                nn.init.xavier_uniform_(part, gain=scale**0.5)
        self.critics = nn.ModuleDict({name: MLP(feat, (), config) for name in rewards})
        self.slow = copy.deepcopy(self.critics).requires_grad_(False)
        for network in (self.actor, *self.critics.values()):
            Optimizer(network, config)
        self.returnnorm = nn.ModuleDict({name: Normalizer("std", 0.999, 1e2) for name in rewards})
        self.advnorm = Normalizer("mean_std", 0.99, 1e8)
        scales = action[:-1] if discrete else action  # for each group of a code, each dimension
        self.ent_adapt = AutoAdapt(scales, 0.5, 1e-5, 1e2, inverse=True)

    def feat(self, state: dict[str, Tensor]) -> Tensor:
        """What actor and critics see of a state or trajectory, [..., F]."""
        return torch.cat([state[key] for key in self.keys], -1)

    def dist(self, feat: Tensor) -> OneHot | BoundedNormal:
        """Distribution of actions, [..., F] -> [..., *action]."""
        out = self.actor(feat)
        return OneHot(out, unimix=0.01) if self.discrete else BoundedNormal(*out.unbind(-2))

    def returns(self, name: str, feat: Tensor, traj: dict) -> tuple[Tensor, Tensor]:
        """Lambda returns, and values of the slow critic, [H, N] both."""
        value = symexp(self.slow[name](feat))
        discount = self.discount * traj["cont"][1:]
        return lambda_return(traj[f"reward_{name}"], value, discount, self.config.lam), value[:-1]

    def learn(self, traj: dict[str, Tensor], copy_slow: bool) -> dict[str, Tensor]:
        """Train critics, copy them to the slow ones if asked, train the actor; returns metrics."""
        metrics, score, feat = {}, 0.0, self.feat(traj)
        weight = trajectory_weights(traj["cont"].detach(), self.discount)[:-1]
        for name, critic in self.critics.items():
            with autocast(self.config):
                ret, value = self.returns(name, feat, traj)
                pred = critic(feat[:-1].detach())
            loss = ((pred - symlog(ret.detach())) ** 2 * weight).mean()
            norm = critic.optimizer.minimize(loss)
            metrics |= {f"{name}_critic_loss": loss, f"{name}_critic_grad_norm": norm,
                        f"{name}_reward": traj[f"reward_{name}"].mean(),
                        f"{name}_return": ret.mean(), f"{name}_value": symexp(pred).mean()}
            if copy_slow:  # the actor is scored by the slow critic after this, as officially
                self.slow[name].load_state_dict(critic.state_dict())
                with autocast(self.config):
                    ret, value = self.returns(name, feat, traj)
            normed = self.returnnorm[name](ret) - self.returnnorm[name](value, update=False)
            metrics[f"{name}_score"] = normed.mean()
            score = score + self.rewards[name] * normed
        score = self.advnorm(score)  # [H, N]
        if self.reinforce:
            with autocast(self.config):
                dist = self.dist(feat[:-1].detach())
            action = traj["action"][:-1].detach().unflatten(-1, self.action)
            loss = -dist.log_prob(action).reshape(*score.shape, -1).sum(-1) * score.detach()
            entropy = entropy_share(dist)
        else:
            loss, entropy = -score, traj["ent"][:-1]
        bonus = self.ent_adapt(entropy).reshape(*score.shape, -1).sum(-1)
        loss = ((loss + bonus) * weight).mean()
        norm = self.actor.optimizer.minimize(loss)
        return metrics | {"actor_loss": loss, "actor_grad_norm": norm, "ent": entropy.mean(),
                          "ent_scale": self.ent_adapt.scale.mean()}


# ---- Hierarchical returns -------------------------------------------------------------------

def max_cosine(goal: Tensor, feat: Tensor) -> Tensor:
    """Goal reward, [..., D], [..., D] -> [...] (paper, eq. 8).

    The cosine, but with the larger of both norms in place of each: lengths have to match, too.
    """
    norm = torch.maximum(goal.norm(dim=-1, keepdim=True), feat.norm(dim=-1, keepdim=True)) + 1e-12
    return ((goal / norm) * (feat / norm)).sum(-1)


def lambda_return(reward: Tensor, value: Tensor, discount: Tensor, lam: float) -> Tensor:
    """R[t] = r[t] + d[t] ((1 - lam) v[t+1] + lam R[t+1]), R[H] = v[H].

    [H, ...], [H+1, ...], [H, ...] -> [H, ...]; `discount` includes the continuation.
    """
    last, returns = value[-1], []
    for t in reversed(range(len(reward))):
        last = reward[t] + discount[t] * ((1 - lam) * value[t + 1] + lam * last)
        returns.append(last)
    return torch.stack(returns[::-1])


def trajectory_weights(cont: Tensor, discount: float) -> Tensor:
    """Discounted chances to get there, [H+1, ...] -> [H+1, ...]: cont[0] first, 0 from an end."""
    return (discount * cont).cumprod(0) / discount


def split_trajectory(traj: dict[str, Tensor], k: int) -> dict[str, Tensor]:
    """Cut a trajectory into the worker's, one for each goal (paper, Section 2.4).

    [H+1, N, ...], rewards [H, N] -> [k+1, N*H/k, ...], rewards [k, N*H/k]; all first segments come
    before all second ones. With H = 6 and k = 3:
        states   0 1 2 3 4 5 6   ->   0 1 2 3 | 3 4 5 6   neighbours share a state
        rewards    1 2 3 4 5 6   ->     1 2 3 |   4 5 6   named after the state they are for
        goals    a a a b b b c   ->   a a a a | b b b b   so that the value of the last state is
                                                          that under the goal that was pursued
    """
    horizon, split = len(traj["cont"]) - 1, {}
    assert horizon % k == 0, (horizon, k)
    for key, value in traj.items():
        length = k if key.startswith("reward") else k + 1
        split[key] = torch.cat([value[t : t + length] for t in range(0, horizon, k)], 1)
    split["goal"] = torch.cat([split["goal"][:-1], split["goal"][:1]])
    return split


def abstract_trajectory(traj: dict[str, Tensor], k: int) -> dict[str, Tensor]:
    """See a trajectory as the manager does: every k-th state, skills as actions (Section 2.3).

    [H+1, N, ...], rewards [H, N] -> [H/k+1, N, ...], rewards [H/k, N]. A reward is the mean over a
    block, weighted by the chance to get so far in it; cont the product over the block before.
    """
    alive = traj["cont"][:-1].unflatten(0, (-1, k)).cumprod(1)  # [H/k, k, N]
    abstract = {"action": traj["skill"][::k]}
    for key, value in traj.items():
        if key.startswith("reward"):
            abstract[key] = (value.unflatten(0, (-1, k)) * alive).mean(1)
        elif key == "cont":
            abstract[key] = torch.cat([value[:1], value[1:].unflatten(0, (-1, k)).prod(1)])
        elif key not in ("action", "skill"):
            abstract[key] = value[::k]
    return abstract


# ---- The agent ------------------------------------------------------------------------------

class Director(nn.Module):
    """World model, goal autoencoder, manager and worker.

    With `--agent dreamer`, the paper's flat baseline, a worker alone learns from the task reward.
    A variant (`variants/`) is a subclass; `loads` names those whose checkpoints it reads, too.
    """

    Config, WorldModel, Goals, loads = Config, WorldModel, GoalAutoencoder, ()  # Replay, Run: below

    def __init__(self, obs_space: spaces.Dict, act_space: spaces.Space, config: Config):
        super().__init__()
        self.config, self.obs_space, self.act_space = config, obs_space, act_space
        self.discrete = isinstance(act_space, spaces.Discrete)
        action = (int(act_space.n),) if self.discrete else act_space.shape
        self.manager = None
        with torch.device(config.device):
            self.world_model = self.WorldModel(obs_space, action[0], config)
            Optimizer(self.world_model, config)
            # The parts of a state that players can see and that acting carries from step to step.
            self.sizes = {"deter": config.deter, "stoch": self.world_model.rssm.size,
                          "action": action[0]}
            self.build(action)
        parts = dict(self.named_modules())
        self.players = {key: x for key, x in parts.items() if isinstance(x, ActorCritic)}
        self.optimizers = {key: x.optimizer for key, x in parts.items() if hasattr(x, "optimizer")}
        self.grad_steps, self.origin = 0, {"step": 0, "seconds": 0.0}  # and what `load` knows

    def restore(self, state: dict):
        """Take weights, optimisers and count from a checkpoint."""
        self.load_state_dict(state["agent"])
        self.grad_steps = int(state["grad_steps"])
        for key, optimizer in self.optimizers.items():
            optimizer.load_state_dict(state["optimizers"][key])
            for group in optimizer.param_groups:
                group |= {"lr": self.config.learning_rate, "capturable": False}
            for param, values in optimizer.state.items():
                if any(x.shape not in ((), param.shape) for x in values.values()):
                    raise ValueError(f"the optimiser of {key} has other shapes")

    def build(self, action: tuple):
        """Make all else that learns: goals, and players, which train in the order made here."""
        config, parts = self.config, ("deter", "stoch")
        if config.agent == "dreamer":
            self.worker = self.player(parts, action, self.discrete, {"extr": 1.0})
            return
        self.goals = self.Goals(config)
        Optimizer(self.goals, config)
        self.sizes |= {"skill": math.prod(self.goals.groups), "goal": self.goals.size}
        rewards = {"goal": 1.0} | ({"extr": config.worker_extr} if config.worker_extr else {})
        self.worker = self.player((*parts, "goal"), action, self.discrete, rewards)
        rewards = {"extr": 1.0, "expl": config.manager_expl}
        classes = len(self.goals.groups) > 1  # a variant's codes may be plain numbers
        self.manager = self.player(parts, self.goals.groups, classes, rewards, reinforce=True,
                                   discount=config.manager_discount)

    def player(self, keys: tuple, action: tuple, discrete: bool, rewards: dict, **kwargs):
        """An actor-critic that sees these parts of a state."""
        feat = sum(self.sizes[key] for key in keys)
        return ActorCritic(keys, feat, action, discrete, rewards, self.config, **kwargs)

    def tensors(self, arrays: dict[str, np.ndarray]) -> dict[str, Tensor]:
        return {k: torch.as_tensor(v, device=self.config.device) for k, v in arrays.items()}

    @torch.no_grad()
    def choose(self, state: dict[str, Tensor], count: np.ndarray) -> dict[str, Tensor]:
        """What the manager changes in a state [N, ...]: every K steps skill and goal (Section 2.3).

        count [N]: steps since the episode or trajectory began, in NumPy: no GPU is waited for.
        """
        now = count % self.config.goal_duration == 0
        if not self.manager or not now.any():
            return {}
        skill = self.pick(state)
        chosen = {"skill": skill, "goal": self.goals.decode(skill)}
        if now.all():
            return chosen
        now = torch.as_tensor(now, device=skill.device)[:, None]
        return {key: torch.where(now, value, state[key]) for key, value in chosen.items()}

    def pick(self, state: dict[str, Tensor]) -> Tensor:
        """The manager's code in a state [N, ...]: [N, GL]."""
        return self.manager.dist(self.manager.feat(state)).rsample().flatten(1)

    def act(self, state: dict, first: np.ndarray, mode: str) -> dict:
        """Add goal and action to a filtered state [E, ...]; at `first` [E] the count is 0.

        In mode "eval" the worker takes its most likely action; the manager samples in any case.
        """
        count = np.where(first, 0, state["count"])
        state = {**state, **self.choose(state, count), "count": count + 1}
        dist = self.worker.dist(self.worker.feat(state))
        return {**state, "action": dist.mode if mode == "eval" else dist.rsample()}

    @torch.no_grad()
    def policy(self, obs: dict, state: dict | None = None, mode: str = "train"):
        """Act on an observation, arrays [E, ...]: actions [E, A], and a state for the next call.

        Without a state, and at obs["is_first"] [E], memory, goal and count start anew. Actions are
        one-hot, or not clipped. mode: "train" or "eval".
        """
        model = self.world_model
        obs = {"is_first": np.zeros(len(obs[model.encoder.keys[0]]), bool), **obs}
        if state is None:
            obs["is_first"] = np.ones_like(obs["is_first"])
            state = {key: torch.zeros(len(obs["is_first"]), size, device=self.config.device)
                     for key, size in self.sizes.items()} | {"count": 0}
        seen = self.tensors({key: obs[key] for key in ("is_first", *model.encoder.keys)})
        last = [state[key] for key in ("deter", "stoch", "action")]
        with autocast(self.config):
            deter, stoch, _ = model.rssm.obs_step(*last, model.encoder(seen), seen["is_first"])
            state = self.act({**state, "deter": deter, "stoch": stoch}, obs["is_first"], mode)
        return state["action"], state

    def imagine(self, starts: dict[str, Tensor]) -> dict[str, Tensor]:
        """Play on in the world model from N states for H steps: a trajectory (see the top).

        starts: deter, stoch, is_terminal, [N, ...], and what shall not be chosen (a goal, say).
        Only back-propagating workers need a graph. In it, what states are worth (rewards, cont,
        values) leads back to earlier actions through the dynamics alone: the rest is detached.
        """
        state = {key: value for key, value in starts.items() if key != "is_terminal"}
        steps, model = [], self.world_model
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.worker.reinforce):
            for t in range(self.config.horizon + 1):
                if t:
                    deter, stoch = model.rssm.img_step(
                        state["deter"], state["stoch"], state["action"])
                    state = {**state, "deter": deter, "stoch": stoch}
                seen = {key: value.detach() for key, value in state.items()}
                chosen = self.choose(seen, np.full(len(seen["deter"]), t))
                chosen = {key: value for key, value in chosen.items() if key not in starts}
                dist = self.worker.dist(self.worker.feat({**seen, **chosen}))
                state = {**state, **chosen, "action": dist.rsample()}
                if not self.worker.reinforce:
                    state["ent"] = entropy_share(dist)
                steps.append(state)
            traj = {key: torch.stack([step[key] for step in steps]) for key in state}
            feat = torch.cat([traj["deter"], traj["stoch"]], -1)
            cont = model.cont_head(feat[1:]).sigmoid()
            traj["cont"] = torch.cat([1 - starts["is_terminal"].float()[None], cont])
            for name in sorted({name for x in self.players.values() for name in x.rewards}):
                traj[f"reward_{name}"] = getattr(self, f"reward_{name}")(traj)
        return traj

    def reward_extr(self, traj: dict[str, Tensor]) -> Tensor:
        """The task reward that the world model predicts for states 1..H: [H, N]."""
        feat = torch.cat([traj["deter"], traj["stoch"]], -1)
        return symexp(self.world_model.reward_head(feat[1:]))

    def reward_expl(self, traj: dict[str, Tensor]) -> Tensor:
        """How new states 1..H are: [H, N] (paper, eq. 6)."""
        return self.goals.novelty(traj["deter"][1:])

    def reward_goal(self, traj: dict[str, Tensor]) -> Tensor:
        """How near states 1..H are to the goals of the actions that led there: [H, N] (eq. 8)."""
        return max_cosine(traj["goal"][:-1], traj["deter"][1:])

    def train_step(self, batch: dict[str, np.ndarray]) -> dict[str, Tensor]:
        """One gradient step of everything on replay chunks [B, T, ...]; scalar metrics."""
        batch = self.tensors(batch)
        copy_slow = self.grad_steps % self.config.slow_every == 0
        self.grad_steps += 1

        with autocast(self.config):  # the world model
            loss, states, metrics = self.world_model.loss(batch)
        metrics["model_grad_norm"] = self.world_model.optimizer.minimize(loss)
        states = {**batch, **{key: value.detach() for key, value in states.items()}}
        metrics |= self.train_goals(states)

        with autocast(self.config):  # behaviour, from every state of the batch
            starts = {key: states[key].flatten(0, 1) for key in ("deter", "stoch", "is_terminal")}
            traj = self.imagine(starts)
        for name, view in self.views(traj).items():
            more = self.players[name].learn(view, copy_slow)
            metrics |= {f"{name}_{key}": value for key, value in more.items()}
        metrics |= self.train_imagined(traj)
        # Copies, since a later step changes scales in place; and without a graph to keep alive.
        return {key: value.detach().clone() for key, value in metrics.items()}

    def train_goals(self, states: dict[str, Tensor]) -> dict[str, Tensor]:
        """Goal autoencoder, on replayed states and their batch, [B, T, ...]; returns metrics."""
        if not self.manager:
            return {}
        with autocast(self.config):
            loss, metrics = self.goals.loss(states["deter"].flatten(0, 1))
        return metrics | {"goal_grad_norm": self.goals.optimizer.minimize(loss)}

    def views(self, traj: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
        """The trajectory that each player learns from, in the order in which they do."""
        if not self.manager:
            return {"worker": traj}
        k, flat = self.config.goal_duration, {key: x.detach() for key, x in traj.items()}
        return {"worker": split_trajectory(traj, k), "manager": abstract_trajectory(flat, k)}

    def train_imagined(self, traj: dict[str, Tensor]) -> dict[str, Tensor]:
        """Whatever else learns from the trajectory, after the players; returns metrics."""
        if "reward_goal" not in traj:
            return {}
        last = slice(self.config.goal_duration - 1, None, self.config.goal_duration)
        other = {**traj, "goal": traj["goal"].roll(traj["goal"].shape[1] // 2, 1)}
        with torch.no_grad(), autocast(self.config):
            shuffled = self.reward_goal(other)[last].mean()
        return {"goal_reward_last": traj["reward_goal"][last].mean(), "goal_reward_other": shuffled}

    def picture_goal(self, goal: Tensor) -> Tensor | None:
        """Image [..., 64, 64, 3] of a goal [..., D], if it has one, at the prior's mode."""
        feat = torch.cat([goal, self.world_model.rssm.guess(goal, sample=False)], -1)
        return self.world_model.decoder(feat).get("image")


# ---- Replay ---------------------------------------------------------------------------------

class Replay:
    """Episodes in memory as they were observed, 12 KB a step with pixels; the oldest go first."""

    def __init__(self, capacity: int, seed: int = 0):
        self.capacity, self.rng = capacity, np.random.default_rng(seed)
        self.episodes = {}  # name: {key: array [length, ...]}, finished, oldest first
        self.running = {}  # environment: (name, {key: list of length})
        self.names = itertools.count()
        self.saved, self.steps = {}, 0  # name: length in its file; of all episodes together

    def add(self, rows: dict[str, np.ndarray]):
        """Add one step of each environment, arrays [E, ...] as in `Driver.rows`."""
        for env in range(len(rows["reward"])):
            if env not in self.running:
                self.running[env] = next(self.names), {key: [] for key in rows}
            name, episode = self.running[env]
            for key, value in rows.items():
                episode[key].append(value[env])
            if rows["is_last"][env] or len(episode["reward"]) >= 10_000:
                self.episodes[name] = {key: np.stack(value) for key, value in episode.items()}
                del self.running[env]
            self.steps += 1
        while self.steps > self.capacity and len(self.episodes) > 1:
            self.steps -= len(self.episodes.pop(next(iter(self.episodes)))["reward"])

    def sample(self, batch_size: int, length: int) -> dict[str, np.ndarray]:
        """Draw chunks, arrays [B, T, ...], that start with is_first.

        An episode is drawn uniformly among the finished ones (or the running ones, while there are
        no others), then a start in 0..len, clipped so that the chunk fits, which shows ends often.
        If an episode is too short, the next one drawn follows.
        """
        pool = list(self.episodes.values()) or [episode for _, episode in self.running.values()]
        chunks = {key: [] for key in pool[0]}
        for _ in range(batch_size):
            missing = length
            while missing:
                episode = pool[self.rng.integers(len(pool))]
                total = len(episode["reward"])
                start = max(0, min(self.rng.integers(total + 1), total - missing))
                stop = min(start + missing, total)
                for key, pieces in chunks.items():
                    pieces.append(np.array(episode[key][start:stop]))
                chunks["is_first"][-1][0] = True
                missing -= stop - start
        return {key: np.concatenate(value).reshape(batch_size, length, *value[0].shape[1:])
                for key, value in chunks.items()}

    def save(self, folder: pathlib.Path) -> dict[int, int]:
        """Write a file for each episode, if need be; returns the lengths of all by name."""
        episodes = {**self.episodes, **dict(self.running.values())}
        for name, episode in episodes.items():
            if self.saved.get(name) != len(episode["reward"]):
                buffer = io.BytesIO()
                np.savez_compressed(buffer, **episode)
                write_file(folder / f"{name}.npz", buffer)
        self.saved = {name: len(episode["reward"]) for name, episode in episodes.items()}
        return self.saved

    def load(self, folder: pathlib.Path, lengths: dict[int, int]):
        """Read what `save` wrote, but files that are damaged."""
        for name, length in lengths.items():
            try:
                with np.load(folder / f"{name}.npz") as file:
                    self.episodes[name] = {key: file[key][:length] for key in file}
            except Exception as error:  # noqa: BLE001, whatever a damaged file leads to
                print(f"Going on without {folder}/{name}.npz, which cannot be used: {error}")
        self.saved = {name: len(episode["reward"]) for name, episode in self.episodes.items()}
        self.names = itertools.count(max(lengths, default=-1) + 1)
        self.steps = sum(self.saved.values())


# ---- Environments ---------------------------------------------------------------------------
# All are gymnasium.Env with a Dict observation: "image" [64, 64, 3] uint8, "state" [n] float32.

IMAGE = spaces.Box(0, 255, (64, 64, 3), np.uint8)


class DMControl(gymnasium.Env):
    """A task of the DeepMind Control Suite; quality "fast" has no shadows and no multisampling."""

    def __init__(self, name: str, pixels: bool = True, quality: str = "full"):
        if pixels and sys.platform == "linux" and not os.environ.get("DISPLAY"):
            os.environ.setdefault("MUJOCO_GL", "egl")  # before dm_control is imported
        try:
            with warnings.catch_warnings(action="ignore"):  # of glfw's, where there is no screen
                from dm_control import mujoco, suite
            if pixels:
                mujoco.Physics.from_xml_string("<mujoco/>").render(8, 8)
        except ModuleNotFoundError as error:
            raise UserError("dm_control is missing: README.md says how to install it") from error
        except Exception as error:
            raise UserError(
                f"MuJoCo cannot render with MUJOCO_GL={os.environ.get('MUJOCO_GL')}. On Debian: "
                "apt-get install libegl1 libgl1-mesa-dri; without: --obs state") from error
        tasks = {f"dmc_{domain}_{task}": (domain, task) for domain, task in suite.ALL_TASKS}
        tasks["dmc_cup_catch"] = "ball_in_cup", "catch"
        if f"dmc_{name}" not in tasks:
            raise UserError(f"--task dmc_{name}: is none of {', '.join(sorted(tasks))}")
        self.env, self.pixels = suite.load(*tasks[f"dmc_{name}"]), pixels
        self.camera = 2 if name.startswith("quadruped") else 0
        if quality == "fast":
            self.env.physics.model.vis.quality.offsamples = 0
            self.env.physics.model.vis.quality.shadowsize = 0
        parts = {key: spaces.Box(-np.inf, np.inf, spec.shape, np.float64)
                 for key, spec in self.env.observation_spec().items()}
        self.observation_space = spaces.Dict(parts | ({"image": IMAGE} if pixels else {}))
        spec = self.env.action_spec()
        self.action_space = spaces.Box(np.float32(spec.minimum), np.float32(spec.maximum))

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        if seed is not None:
            self.env.task._random = np.random.RandomState(seed)
        return self.look(self.env.reset()), {}

    def step(self, action):
        now = self.env.step(action)
        terminated = now.last() and now.discount == 0
        return self.look(now), now.reward, terminated, now.last() and not terminated, {}

    def look(self, now):
        obs = {key: np.asarray(value, np.float64) for key, value in now.observation.items()}
        if self.pixels:
            obs["image"] = self.env.physics.render(64, 64, camera_id=self.camera)
        return obs


def image_and_state(env: gymnasium.Env, task: str, wanted: str) -> gymnasium.Env:
    """Observations as a Dict of the "image", if there is one, and of all else in one vector.

    An image is a uint8 array with one channel or three. wanted: auto, pixels, state or both.
    """
    space, single = env.observation_space, not isinstance(env.observation_space, spaces.Dict)
    parts = {"": space} if single else space.spaces
    images = [key for key, x in parts.items() if x.dtype == np.uint8 and len(x.shape) > 1
              and x.shape[2:] in ((), (1,), (3,))]
    rest = spaces.Dict({key: x for key, x in parts.items() if key not in images})
    if (len(images) > 1 or not rest.is_np_flattenable
            or any(len(x.shape or ()) > 2 for x in rest.values())):
        raise UserError(f"--task {task}: observes {space}, which is neither an image nor a vector, "
                        "nor a Dict of one image and vectors")
    there = ["image"] * len(images) + ["state"] * bool(rest)
    keys = {"pixels": ["image"], "state": ["state"], "auto": there}.get(wanted, ["image", "state"])
    if not set(keys) <= set(there):
        raise UserError(f"--obs {wanted}: {task} shows {' and '.join(there) or 'nothing'} only")

    def convert(obs) -> dict[str, np.ndarray]:
        obs, out = {"": obs} if single else obs, {}
        if "state" in keys:
            out["state"] = np.float32(spaces.flatten(rest, obs))
        if "image" in keys:
            image = Image.fromarray(obs[images[0]].squeeze()).convert("RGB")
            out["image"] = np.asarray(image.resize((64, 64), Image.Resampling.BOX))
        return out

    vector = spaces.Box(-np.inf, np.inf, (spaces.flatdim(rest),))
    made = spaces.Dict({key: IMAGE if key == "image" else vector for key in keys})
    return gymnasium.wrappers.TransformObservation(env, convert, made)


def make_env(task: str, config: Config) -> gymnasium.Env:
    """One environment, continuous actions scaled to [-1, 1]; UserError if there cannot be one."""
    suite, _, name = task.partition("_")
    wanted = "pixels" if suite == "dmc" and config.obs == "auto" else config.obs
    if suite == "dmc":
        env = DMControl(name, wanted != "state", config.render_quality)
    else:
        module, _, name = (f"variants.pin_pad:PinPad{name.capitalize()}-v0" if suite == "pinpad"
                           else task.removeprefix("gym_")).rpartition(":")
        try:
            __import__(module or "gymnasium")  # it registers its environments
            env = gymnasium.make(name, disable_env_checker=True)
        except (gymnasium.error.Error, ImportError) as error:  # or its simulator is not installed
            raise UserError(f"--task {task}: {' '.join(str(error).split())} (Tasks: dmc_<domain>_"
                            "<task>, pinpad_<three..eight>, gym_[<module>:]<id>.)") from error
    env = image_and_state(env, task, wanted)
    space = env.action_space
    if isinstance(space, spaces.Discrete) and space.n > 1:
        return env
    if (isinstance(space, spaces.Box) and len(space.shape) == 1 and space.shape[0] > 0
            and space.is_bounded() and np.issubdtype(space.dtype, np.floating)):
        return gymnasium.wrappers.RescaleAction(env, np.float32(-1), np.float32(1))
    raise UserError(f"--task {task}: acts in {space}, neither Discrete nor a bounded Box of floats")


SIGNALS = [x for x in signal.Signals if x.name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1")]


@contextlib.contextmanager
def vector_envs(config: Config, amount: int):
    """Environments side by side, in this process or in one for each.

    Autoreset is NEXT_STEP: the last observation of an episode comes with its reward and flags;
    the step after that ignores its action and brings the first observation of the next one.
    """
    make = [functools.partial(make_env, config.task, config)] * amount
    slow = sys.platform != "win32" and (config.task.startswith("dmc_") or ":" in config.task)
    kind, others = SyncVectorEnv, set(multiprocessing.active_children())
    if {"auto": slow, "yes": True, "no": False}[config.processes]:
        # Not forked from this process, which has threads and may have opened a GPU. What the fork
        # server ignores, its children do: signals to the whole group are for this process.
        kind = functools.partial(AsyncVectorEnv, context="forkserver")
        multiprocessing.set_forkserver_preload(["__main__", "director"])
        with contextlib.suppress(ValueError):  # another thread than the main one cannot
            handlers = [signal.signal(number, signal.SIG_IGN) for number in SIGNALS]
            multiprocessing.forkserver.ensure_running()
            for number, handler in zip(SIGNALS, handlers, strict=True):
                signal.signal(number, handler)
    envs = None
    try:
        envs = kind(make, autoreset_mode=AutoresetMode.NEXT_STEP)
        yield envs
    finally:
        for process in set(multiprocessing.active_children()) - others:
            process.kill()  # they may hang
            process.join()
        if envs:
            envs.closed = isinstance(envs, AsyncVectorEnv)  # as their processes have ended
            envs.close()


class Driver:
    """Plays a vector environment, and shapes its steps for the replay and for the policy.

    `rows`, arrays [E, ...]: the observation; the action **that led to it**, one-hot or unclipped,
    zeros on a first step; reward, is_first, is_last, is_terminal. `score` and `length` [E] are
    those of the episode so far; `film` has the images of the first environment, with its goals.
    """

    def __init__(self, envs: gymnasium.vector.VectorEnv, seed: int):
        self.envs, self.space = envs, envs.single_action_space
        self.discrete = isinstance(self.space, spaces.Discrete)
        self.shape = envs.num_envs, int(self.space.n) if self.discrete else self.space.shape[0]
        self.score, self.length, self.film = 0, 0, []
        envs.action_space.seed(seed)
        obs, _ = envs.reset(seed=seed)
        no = np.zeros(envs.num_envs, bool)
        self.update(obs, np.zeros(self.shape), np.zeros(len(no)), ~no, no, no)

    def random(self) -> np.ndarray:
        """Uniformly random actions [E, A]."""
        action = self.envs.action_space.sample()
        return np.eye(self.shape[1])[action - self.space.start] if self.discrete else action

    def step(self, action: np.ndarray, state: dict | None = None):
        """Act, [E, A], in the policy's state; where an episode has ended, the next one begins."""
        if self.rows["is_first"][0]:
            self.film = []
        if "image" in self.rows and state and len(self.film) < 10_000:
            self.film.append((self.rows["image"][0], state["goal"][0] if "goal" in state else None))
        is_first = self.rows["is_last"]
        action = np.where(is_first[:, None], 0, action)
        command = action.argmax(-1) + self.space.start if self.discrete else action.clip(-1, 1)
        obs, reward, terminated, truncated, _ = self.envs.step(command.astype(self.space.dtype))
        self.update(obs, action, reward, is_first, terminated | truncated, terminated)

    def update(self, obs, action, reward, is_first, is_last, is_terminal):
        self.rows = {**obs, "action": np.float32(action), "reward": np.float32(reward),
                     "is_first": is_first, "is_last": is_last, "is_terminal": is_terminal}
        for key, value in self.rows.items():
            if not np.isfinite(value).all():
                raise FloatingPointError(f"{key} is not finite: {value}")
        self.score = np.where(is_first, 0, self.score + reward)
        self.length = np.where(is_first, 0, self.length + 1)


# ---- A run ----------------------------------------------------------------------------------

@contextlib.contextmanager
def writing(where):
    """A full disk, a missing permission, a closed pipe: one line for the user, who can mend it."""
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot write to {where}: {error.strerror or error}") from error


def write_file(path: pathlib.Path, buffer: io.BytesIO):
    """Replace a file, or make it; when this is cut short, what was there is there, whole."""
    temporary = path.with_name(f".tmp-{os.urandom(8).hex()}")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(temporary, "xb") as file:
                file.write(buffer.getbuffer())
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def agent_name(agent: type) -> str:
    """Of the class, or of its file if it is just called Agent, as those in `variants/`."""
    file = getattr(sys.modules.get(agent.__module__), "__file__", "agent")  # a notebook has none
    return pathlib.Path(file if agent.__name__ == "Agent" else agent.__name__).stem.lower()


def folder_of(config: Config, agent: type) -> pathlib.Path:
    name = f"{agent_name(agent)}-{config.agent}".removesuffix("-director").removeprefix("director-")
    default = f"runs/{config.task.replace('/', '-')}/{name}-{config.size}-{config.seed}"
    return pathlib.Path(config.logdir or default)


def load(logdir: str | pathlib.Path, agent: type = Director, /, *shown, **flags) -> Director:
    """The agent that was trained in a folder, with its flags but these; UserError if none was.

    `shown`, the spaces of an environment, have to be the run's. Only tensors, numbers, strings and
    their containers are read: no code of a stranger's runs.
    """
    path = pathlib.Path(logdir) / "checkpoint.pt"
    try:
        with zipfile.ZipFile(path) as file:
            if file.testzip():
                raise ValueError("its checksums do not match")
        state = torch.load(path, map_location="cpu", weights_only=True)
        if state.get("format") != 2:
            raise ValueError("it is of an older version of this program")
        if state["variant"] not in (agent_name(agent), *agent.loads):
            raise UserError(f"--logdir {logdir}: holds a run of {state['variant']}")
        for field in dataclasses.fields(agent.Config):
            old = state["config"].get(field.name, flags.get(field.name))  # or a flag since
            if field.metadata["fixed"] and flags.get(field.name, old) != old:
                raise UserError(f"--logdir {logdir}: holds a run with --{field.name} {old}, not "
                                f"{flags[field.name]}; use its flags, or another --logdir")
        free = {"device": "auto", "precision": "auto"}
        kept = {k: v for k, v in state["config"].items() if hasattr(agent.Config, k)}
        sizes, action = state["spaces"]
        made = agent(
            spaces.Dict({key: IMAGE if key == "image" else spaces.Box(-np.inf, np.inf, (size,))
                         for key, size in sizes.items()}),
            spaces.Discrete(action) if isinstance(action, int) else spaces.Box(-1, 1, action),
            agent.Config(**kept | free | flags | {"logdir": str(logdir)}))
        now = shown and (shown[0], type(shown[1]), spaces.flatdim(shown[1]))
        if now and now != (made.obs_space, type(made.act_space), made.sizes["action"]):
            raise UserError(f"--logdir {logdir}: holds a run in {made.obs_space}, {made.act_space},"
                            f" not {shown[0]}, {shown[1]}; use another --logdir")
        made.restore(state)
        made.origin = {key: state[key] for key in ("step", "seconds", "episodes", "config")}
        return made
    except UserError:
        raise
    except Exception as error:  # damaged or foreign: it can go wrong in many ways
        reason = " ".join(str(getattr(error, "strerror", None) or error).split())[:300]
        raise UserError(f"{path} cannot be used: {reason}") from error


class Run:
    """The state of a run, and its folder. A subclass can agree with others on what `train` asks."""

    def __init__(self, config: Config, agent: type, *shown):  # and, to make one, its spaces
        self.config, self.variant, self.logdir = config, agent_name(agent), folder_of(config, agent)
        self.path, self.replays = self.logdir / "checkpoint.pt", self.logdir / "replay"
        self.replay = agent.Replay(config.replay_size)
        self.metrics, self.whole = [], True  # of steps since the last report; none was cut short
        self.stops, self.handlers = [], {}  # signals that asked to stop; who handled them before
        self.claim()
        if self.path.exists():
            self.agent = load(self.path.parent, agent, *shown, **dataclasses.asdict(config))
        else:
            self.agent = agent(*shown, config)
        self.step = self.agent.origin["step"]  # rows of all environments so far
        self.saved = self.drawn = self.reported = self.step  # that of the last time
        self.since = time.time()  # of the last report
        self.start = self.since - self.agent.origin["seconds"]  # of the run, without pauses

    def open(self):
        """Go on with the files of the run, and listen to signals."""
        config, metrics, lines = self.config, self.logdir / "metrics.jsonl", []
        with writing(self.logdir):
            if metrics.exists() and not self.path.exists():
                aside = metrics.with_name(f"metrics-{os.urandom(4).hex()}.jsonl")
                metrics.rename(aside)
                print(f"{metrics} is of a run that never saved; it is now {aside}")
            metrics.touch()
            for line in metrics.read_text(errors="replace").splitlines():
                try:
                    lines += [line + "\n"] if json.loads(line)["step"] <= self.step else []
                except (ValueError, TypeError, KeyError):
                    print(f"A damaged line of {metrics} is left out: {line[:60]}")
            write_file(metrics, io.BytesIO("".join(lines).encode()))
            settings = json.dumps(dataclasses.asdict(config), indent=2)
            write_file(self.logdir / "config.json", io.BytesIO(settings.encode()))
            self.writer = SummaryWriter(self.logdir, purge_step=self.step + 1)
        self.bar = tqdm.tqdm(total=config.steps, initial=self.step, unit="step", disable=None)
        with contextlib.suppress(ValueError):  # signals can be caught in the main thread only
            for number in SIGNALS:
                if signal.getsignal(number) != signal.SIG_IGN:  # as it is under nohup
                    self.handlers[number] = signal.signal(number, self.stop)
        self.say(f"{config.task}: {self.variant} of size {config.size}, {config.precision} on "
                 f"{config.device}, in {self.logdir}")
        if self.saved:
            new, old = dataclasses.asdict(config), self.agent.origin["config"]
            changed = [f" --{key} is {new[key]}, was {old[key]}." for key in new
                       if old.get(key, new[key]) != new[key]]
            self.say(f"Resumed at step {self.step}.{''.join(changed)}")

    def claim(self):
        """Make the folder this process's, for as long as it lives; UserError if it cannot be."""
        with writing(self.logdir):
            self.logdir.mkdir(parents=True, exist_ok=True)
            there = {path.name for path in self.logdir.iterdir()}
            if there and not there & {"lock", "metrics.jsonl", "checkpoint.pt"}:
                raise UserError(f"--logdir {self.logdir}: holds {min(there)}, no run; use another")
            self.lock = open(self.logdir / "lock", "a")  # noqa: SIM115
            try:
                import fcntl
                fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise UserError(f"--logdir {self.logdir}: another process trains there") from error
            except (ImportError, OSError):  # Windows and some file systems have none
                pass
            for leftover in self.logdir.rglob(".tmp-" + 16 * "[0-9a-f]"):
                leftover.unlink()  # of a process that was killed

    def stop(self, number: int, frame):
        """On Ctrl-C, say: finish the step, then `close`; a second one of its kind acts at once."""
        self.stops.append(number)
        signal.signal(number, signal.SIG_DFL)

    def seed(self, *more: int) -> int:
        """Seed what is drawn, as a run that resumes here would; returns a seed for environments."""
        seeds = np.random.SeedSequence([self.config.seed, self.step, *more]).generate_state(3)
        torch.manual_seed(int(seeds[0]))
        self.replay.rng = np.random.default_rng(seeds[1])
        return int(seeds[2]) // 2

    def save(self):
        """Write the episodes, then the checkpoint that lists them, if there is anything new."""
        if self.step == self.saved or not self.whole:
            return
        self.means()
        agent, before, buffer = self.agent, self.replay.saved, io.BytesIO()
        action = int(agent.act_space.n) if agent.discrete else tuple(agent.act_space.shape)
        torch.save({
            "format": 2, "variant": self.variant, "config": dataclasses.asdict(self.config),
            "spaces": ({k: math.prod(x.shape) for k, x in agent.obs_space.items()}, action),
            "step": self.step, "seconds": time.time() - self.start,
            "agent": agent.state_dict(), "grad_steps": agent.grad_steps,
            "optimizers": {k: x.state_dict() for k, x in agent.optimizers.items()},
            "episodes": self.replay.save(self.replays)}, buffer)
        self.write(buffer)
        for name in before.keys() - self.replay.saved.keys():  # forgotten since the last time
            (self.replays / f"{name}.npz").unlink(missing_ok=True)
        self.saved = self.step
        self.seed()

    def write(self, checkpoint: io.BytesIO):
        write_file(self.path, checkpoint)

    def close(self):
        """Whatever has ended the loop: save, unless a gradient step was cut short or went wrong."""
        try:
            self.save()
            if (self.stops or sys.exc_info()[0]) and self.step == self.saved > 0:
                self.bar.write(f"Saved at step {self.step}; the same command resumes.", sys.stderr)
        finally:
            for number, handler in self.handlers.items():
                signal.signal(number, handler)
            with writing(self.logdir):
                for opened in (self.lock, self.bar, self.writer):
                    opened.close()

    def goes_on(self) -> bool:
        return self.step < self.config.steps and not self.stops

    def due(self, every: int) -> int:
        """How many multiples of `every` were reached with the last step of the environments."""
        return self.step // every - (self.step - self.config.envs) // every

    def record(self, driver: Driver):
        """Take in a step of all environments, and the episodes that ended with it."""
        self.replay.add(driver.rows)
        self.step += self.config.envs
        for env in np.flatnonzero(driver.rows["is_last"]):
            score, length = float(driver.score[env]), int(driver.length[env])
            self.log({"episode/score": score, "episode/length": length})
            self.say(f"step {self.step}: episode of {length} steps, return {score:.1f}")
        with writing("the terminal"):
            self.bar.update(self.config.envs)

    def means(self) -> dict[str, float]:
        """Of the metrics since the last report; FloatingPointError if one is not finite."""
        keys = list((self.metrics or [{}])[0])
        means = average([torch.stack([x[key] for x in self.metrics]).mean() for key in keys])
        means = {key: mean.item() for key, mean in zip(keys, means, strict=True)}
        for key, value in means.items():
            if not math.isfinite(value):
                self.whole = False
                raise FloatingPointError(f"{key} is {value} since step {self.reported}; nothing is "
                                         f"saved after the checkpoint of step {self.saved}")
        return means

    def report(self):
        """A line of metrics: what happened since the last one."""
        means = self.means()
        rate = (self.step - self.reported) / (time.time() - self.since)
        self.log({**{f"train/{key}": value for key, value in means.items()},
                  "train/grad_steps": self.agent.grad_steps, "train/steps_per_second": rate,
                  "train/replay_steps": self.replay.steps})
        text = f"step {self.step}: {self.agent.grad_steps} gradient steps, {rate:.1f} steps/s"
        self.say(text + (f", model loss {means['model_loss']:.4g}" if means else ""))
        self.metrics, self.since, self.reported = [], time.time(), self.step

    def log(self, metrics: dict[str, float]):
        """Append to metrics.jsonl, and to TensorBoard's events under the same names."""
        line = {"step": self.step, "seconds": round(time.time() - self.start, 1), **metrics}
        with writing(self.logdir), open(self.logdir / "metrics.jsonl", "a") as file:
            file.write(json.dumps(line) + "\n")
            for key, value in metrics.items():
                self.writer.add_scalar(key, value, self.step)

    def say(self, text: str):
        with writing("the standard output"):
            print(text, flush=True) if self.bar.disable else self.bar.write(text)


Director.Replay, Director.Run = Replay, Run


@torch.no_grad()
def draw(agent: Director, film: list[tuple], batch: dict, path: pathlib.Path, writer=None):
    """Moving pictures, to <path>-<name>.gif and to TensorBoard.

    episode: a film of (image, goal), side by side. openloop: replayed chunks, the prediction from
    five frames and the actions, the difference. worker: the manager's goals, imagined ways to them.
    """
    model, batch = agent.world_model, agent.tensors(batch)
    states = model.observe({key: value[:, :5] for key, value in batch.items()})
    start = {key: states[key][:, -1] for key in ("deter", "stoch")}
    (deter, stoch), truth, feats = start.values(), batch["image"][:, 5:].float() / 255, []
    for action in batch["action"][:, 5:].unbind(1):
        deter, stoch = model.rssm.img_step(deter, stoch, action)
        feats.append(torch.cat([deter, stoch], -1))
    guess = model.decoder(torch.stack(feats, 1))["image"]
    images = torch.from_numpy(np.stack([image for image, _ in film])).float() / 255
    pictures = {"openloop": [truth, guess, (guess - truth + 1) / 2], "episode": [images[None]]}
    if film[0][1] is not None and agent.picture_goal(film[0][1]) is not None:
        goals = torch.stack([goal for _, goal in film]).split(64)
        goals = torch.cat([agent.picture_goal(goal) for goal in goals]).cpu()
        pictures["episode"] = [torch.stack([images, goals])]
        traj = agent.imagine({**start, "is_terminal": torch.zeros_like(deter[:, 0])})
        ways = model.decoder(torch.cat([traj["deter"], traj["stoch"]], -1))["image"]
        pictures["worker"] = [x.transpose(0, 1) for x in (agent.picture_goal(traj["goal"]), ways)]
    octree = functools.partial(Image.Image.quantize, method=Image.Quantize.FASTOCTREE)  # 10x faster
    for name, rows in pictures.items():  # rows of B images, [B, frames, height, width, 3]
        frames = torch.cat(rows, 2).permute(1, 2, 0, 3, 4).flatten(2, 3)
        frames, buffer = (frames * 255).byte().cpu().numpy(), io.BytesIO()
        first, *rest = [octree(Image.fromarray(frame)) for frame in frames]
        first.save(buffer, "gif", save_all=True, append_images=rest, duration=50, loop=0)
        write_file(path.with_name(f"{path.name}-{name}.gif"), buffer)
        if writer:
            strip = np.concatenate(frames[:: math.ceil(len(frames) / 8)], 1)
            writer.add_image(f"pictures/{name}", strip, int(path.name), dataformats="HWC")


def train(config: Config, agent: type = Director) -> int:
    """Train until `config.steps` or a signal; returns the exit code, 0 or 128 + that signal."""
    torch.manual_seed(config.seed)
    with vector_envs(config, config.envs) as envs:
        run = agent.Run(config, agent, envs.single_observation_space, envs.single_action_space)
        run.open()
        try:
            if not run.goes_on():
                run.say(f"Step {config.steps} was reached; for more, raise --steps.")
                return 0
            driver, state, learn = Driver(envs, run.seed()), None, run.agent.train_step
            end = max(config.prefill, config.random * (driver.discrete and "image" in driver.rows))
            if run.step < end:
                run.say(f"Random actions until {end} at most; training from {config.prefill} on.")
            if config.device == "cuda" and agent is Director and not config.eager:
                with contextlib.suppress(ModuleNotFoundError):  # director.py may be there alone
                    from variants.graph import Graphed
                    learn = Graphed(run.agent)  # the same, five times as fast
            if run.saved:
                run.replay.load(run.replays, run.agent.origin["episodes"])
            while run.goes_on():
                run.record(driver)  # what the last actions led to

                # Learn. An error in here leaves a state that is half of one step, half of the next.
                run.whole = False
                for _ in range(run.due(config.train_every) if run.step > config.prefill else 0):
                    batch = run.replay.sample(config.batch_size, config.batch_length)
                    run.metrics.append(learn(batch))
                run.whole = True
                if run.step < end and run.metrics and run.metrics[-1].get("sees"):
                    run.say(f"The model sees; from step {run.step} on the agent acts.")
                    end = run.step

                # Report.
                if run.due(config.log_every) or run.step >= config.steps:
                    run.report()
                wait = run.step < run.drawn + config.video_every or not driver.rows["is_last"][0]
                if driver.film and not wait:
                    path, run.drawn = run.logdir / f"pictures/{run.step}", run.step
                    draw(run.agent, driver.film, run.replay.sample(6, 64), path, run.writer)

                # Save.
                if run.due(config.save_every):
                    run.save()

                # Act.
                if run.step < end:
                    action = driver.random()
                else:
                    action, state = run.agent.policy(driver.rows, state)
                    action = action.cpu().numpy()
                driver.step(action, state)
        finally:
            run.close()
        return 128 + run.stops[0] if run.stops else 0


def evaluate(config: Config, agent: type = Director) -> list[float]:
    """Play `config.eval` episodes with the agent in the run's folder; writes and returns scores."""
    logdir, replay, scores, state = folder_of(config, agent), agent.Replay(10_000), [], None
    with vector_envs(config, 1) as envs:
        player = load(logdir, agent, envs.single_observation_space, envs.single_action_space,
                      **dataclasses.asdict(config))
        torch.manual_seed(config.seed)
        driver = Driver(envs, config.seed)
        while len(scores) < config.eval:
            action, state = player.policy(driver.rows, state, mode="eval")
            replay.add(driver.rows)
            driver.step(action.cpu().numpy(), state)
            if driver.rows["is_last"][0]:
                scores.append(float(driver.score[0]))
                with writing("the standard output"):
                    print(f"episode {len(scores)}: return {scores[-1]:.1f}, so far mean "
                          f"{np.mean(scores):.1f}, deviation {np.std(scores):.1f}", flush=True)
                if driver.film and len(scores) == 1:
                    draw(player, driver.film, replay.sample(6, 64), logdir / "pictures/eval")
    result = {"mean": np.mean(scores), "std": np.std(scores), "scores": scores}
    write_file(logdir / "eval.json", io.BytesIO(json.dumps(result).encode()))
    return scores


def main(argv: list[str] | None = None, agent: type = Director) -> int:
    """The command line; returns the exit code, which is 2 for a user's mistake."""
    try:
        flags = parse_args(argv, agent.Config)
        config = agent.Config(**flags)
        # glibc shall keep large buffers: xs at 16x64 in float32, two cores: 1.51 -> 1.09 s a step.
        with contextlib.suppress(AttributeError, OSError, TypeError):
            for setting in ((-4, 0), (-1, 2**31 - 1)):  # M_MMAP_MAX, M_TRIM_THRESHOLD
                ctypes.CDLL(None).mallopt(*setting)
        if not config.eval:
            return train(config, agent)
        evaluate(load(folder_of(config, agent), agent, **flags).config, agent)
        return 0
    except UserError as error:
        with contextlib.suppress(OSError):
            print(f"director.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:  # before the run has begun, or in an evaluation
        return 128 + signal.SIGINT


if __name__ == "__main__":
    sys.exit(main())
