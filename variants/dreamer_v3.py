"""DreamerV3: six techniques of its world model and actor-critic, under Director's hierarchy.

Paper: Mastering diverse control tasks through world models (Hafner et al., Nature 2025), whose
official code is danijar/dreamerv3.

    python -m variants.dreamer_v3 --task pinpad_three
    python -m variants.dreamer_v3 --task pinpad_three --agent dreamer
    python -m variants.dreamer_v3 --task pinpad_three --two_hot no

Idea: DreamerV3 learns many kinds of tasks with the same settings. Each of its techniques is a flag
here, so that its effect on Director, or on the flat agent, can be seen alone. By default all are
used.

--latents         Priors and posteriors are mixed with 1% of the uniform distribution. The KL has no
                  adaptive scale. Each of its two terms is clipped, so that below 1 nat (summed over
                  the groups) it has no gradient:
                  max(1, KL(sg(post) || prior)) + 0.1 max(1, KL(post || sg(prior)))
--two_hot         Rewards and values are categorical over 255 bins b = symexp(-20..20). A target y
                  is divided between the bins b[k] <= y <= b[k+1] so that its mean is y. The
                  prediction is the mean, sum_k p[k] b[k]. The weights of output layers start at 0,
                  so the first prediction is exactly 0.
--percentiles     The actor's advantage is sum_i w_i (R_i - v_i) / max(floor_i, P95_i - P5_i) over
                  its rewards i with Director's weights w. P5 and P95 are moving averages of the
                  percentiles of the returns in a batch (decay 0.99, from 0, without bias
                  correction). The floor is 1 for the task reward. It is 0.1 for exploration, whose
                  returns have a range below 0.1 (a floor of 1 would nearly switch it off), and for
                  goals, whose range is below 1 at first. Director's own normalizations of returns
                  and of the advantage are off.
--critic_ema      Returns use the critics v themselves, not slow copies. Each critic has a second
                  loss, of the same form, towards the prediction of v', a critic whose weights are
                  an exponential moving average of those of v (decay 0.98).
--rms_silu        RMSNorm and SiLU in place of layer norm and ELU. Linear layers get biases, since
                  an RMSNorm has none.
--laprop          LaProp in place of Adam, without weight decay. The gradient of each tensor w is
                  clipped to a norm of at most 0.3 max(|w|, 0.001). The learning rate is 0.4 times
                  Director's (4e-5 at size paper) unless --learning_rate is given, and rises
                  linearly over the first 1,000 gradient steps (--warmup).

What stays Director's: the adaptive scale of the entropy, gradients of a continuous worker through
the dynamics, the goal autoencoder on `deter`, goals of 8 steps, the max-cosine reward; the order of
updates (world model, goals, critics, actors; the official code makes one step of all); sizes,
depths and initial weights of networks; that the recurrent unit's gates are normalized (by an
RMSNorm with --rms_silu); its learned first state; 16 imagined steps; the distribution of continuous
actions; uniform replay.

What is left out: critics that also learn from replayed states; REINFORCE for continuous workers;
the block-diagonal recurrent network; symlog of vector observations; the discount of 1 - 1/333,
because Director's manager discounts once per decision.
"""

import copy
import dataclasses
import sys

import torch
from gymnasium import spaces
from torch import Tensor, nn

import director
from director import OneHot, symexp
from variants import refuse

YES_NO = ("yes", "no")


@dataclasses.dataclass
class Config(director.Config):
    latents: str = director.flag("yes", "uniform mixing and free bits", YES_NO, group="dreamer_v3",
                                 fixed=True)
    two_hot: str = director.flag("yes", "categorical rewards and values", YES_NO, fixed=True)
    percentiles: str = director.flag("yes", "advantages over the range of returns", YES_NO,
                                     fixed=True)
    critic_ema: str = director.flag("yes", "regularize critics by their means", YES_NO, fixed=True)
    rms_silu: str = director.flag("yes", "RMSNorm and SiLU", YES_NO, fixed=True)
    laprop: str = director.flag("yes", "LaProp, adaptive clipping, 0.4 of the learning rate",
                                YES_NO, fixed=True)
    warmup: int = director.flag(1000, "gradient steps in which LaProp's rate rises", low=0)

    def __post_init__(self):
        own_rate = self.learning_rate is None
        super().__post_init__()
        if self.latents == "yes":
            refuse(self, ("kl_target",), "with --latents yes, the KL has no target")
        if self.critic_ema == "yes":
            refuse(self, ("slow_every",), "with --critic_ema yes, there are no slow copies")
        if self.laprop == "no":
            refuse(self, ("warmup",), "it is LaProp's")
        elif own_rate:
            self.learning_rate *= 0.4


# ---- Latents --------------------------------------------------------------------------------


class RSSM(director.RSSM):
    """Logits are log probabilities after the uniform mixing."""

    def __init__(self, embed: int, action: int, config: Config):
        super().__init__(embed, action, config)
        self.unimix = 0.01 if config.latents == "yes" else 0.0

    def prior(self, deter: Tensor, stoch: Tensor | None = None) -> Tensor:
        return OneHot(super().prior(deter), self.unimix).logits

    def posterior(self, deter: Tensor, embed: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.post_net(torch.cat([deter, embed], -1)).float()
        dist = OneHot(logits.unflatten(-1, self.groups), self.unimix)
        return dist.rsample().flatten(-2), dist.logits


def free_bits_kl(post: Tensor, prior: Tensor) -> Tensor:
    """max(1, KL(sg(post) || prior)) + 0.1 max(1, KL(post || sg(prior))), [..., S, C] -> [...]."""
    prior_loss = director.balanced_kl(post, prior, balance=1.0)
    post_loss = director.balanced_kl(post, prior, balance=0.0)
    return prior_loss.clamp(min=1.0) + 0.1 * post_loss.clamp(min=1.0)


# ---- Rewards and values ---------------------------------------------------------------------


class TwoHot:
    """A number [...] that is predicted as a categorical over 255 bins, from logits [..., 255]."""

    def __init__(self, logits: Tensor):
        self.log_probs = logits.log_softmax(-1)
        # symexp(linspace(-20, 20, 255)), but exactly symmetric.
        positive = symexp(torch.linspace(0, 20, 128, device=logits.device))[1:]
        self.bins = torch.cat([-positive.flip(0), torch.zeros_like(positive[:1]), positive])

    @property
    def mean(self) -> Tensor:
        # Each bin is added to its negative first: for equal probabilities the sum is exactly 0.
        terms = self.log_probs.exp() * self.bins
        negative, zero, positive = terms.split([127, 1, 127], -1)
        return (negative.flip(-1) + positive).sum(-1) + zero.squeeze(-1)

    def loss(self, target: Tensor) -> Tensor:
        """Cross entropy with the two-hot target, [...]; its upper bin has this weight."""
        target = target.detach().clamp(self.bins[0], self.bins[-1])
        above = torch.searchsorted(self.bins, target).clamp(1, 254)
        below = above - 1
        weight = (target - self.bins[below]) / (self.bins[above] - self.bins[below])
        log_below = self.log_probs.gather(-1, below[..., None]).squeeze(-1)
        log_above = self.log_probs.gather(-1, above[..., None]).squeeze(-1)
        return -((1 - weight) * log_below + weight * log_above)


class TwoHotHead(director.MLP):
    """[..., F] -> `TwoHot` [...]."""

    def __init__(self, inputs: int, config: Config):
        super().__init__(inputs, (255,), config)
        nn.init.zeros_(self.out.weight)

    def forward(self, x: Tensor) -> TwoHot:
        return TwoHot(super().forward(x))


# ---- Layers and optimizer -------------------------------------------------------------------


class RMSNorm(nn.RMSNorm):
    """Over the features of [..., C], or over the channels of images [N, C, h, w].

    It first adds the bias that Director's linear layers and convolutions do not have.
    """

    def __init__(self, features: int):
        super().__init__(features, eps=1e-4)
        self.bias = nn.Parameter(torch.zeros(features))

    def forward(self, x: Tensor) -> Tensor:  # in float32, as director.Norm
        channels = 1 if x.ndim == 4 else -1
        features = x.movedim(channels, -1).float()
        return super().forward(features + self.bias).to(x.dtype).movedim(-1, channels)


def use_rms_silu(module: nn.Module):
    """Replace every layer norm by an RMSNorm and every ELU by a SiLU, in all submodules."""
    for name, child in module.named_children():
        if isinstance(child, director.Norm):
            setattr(module, name, RMSNorm(*child.normalized_shape))
        elif isinstance(child, nn.ELU):
            setattr(module, name, nn.SiLU())
        else:
            use_rms_silu(child)


class LaProp(torch.optim.Optimizer):
    """LaProp (Ziyin et al., 2020): gradients are divided by their RMS before they are averaged.

        v <- 0.999 v + 0.001 g^2,   m <- 0.9 m + 0.1 g / sqrt(v'),   w <- w - rate m'

    where v' and m' are corrected for their start at 0. Adam averages first. Adaptive gradient
    clipping (Brock et al., 2021), for whole tensors. The learning rate is 0 in the first step, as
    in the official code.
    """

    def __init__(self, module: nn.Module, config: Config):
        self.params = list(module.parameters())
        self.warmup = config.warmup
        super().__init__(self.params, {"lr": config.learning_rate})

    def minimize(self, loss: Tensor) -> Tensor:
        """One step of these parameters alone; returns the norm of the gradient before clipping."""
        gradients = director.all_reduce_mean(torch.autograd.grad(loss, self.params))
        for param, gradient in zip(self.params, gradients, strict=True):
            param.grad = gradient
        norm = torch.stack([gradient.norm() for gradient in gradients]).norm()
        self.step()
        self.zero_grad()
        return norm

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for param in group["params"]:
                self.update(param, group["lr"])

    def update(self, param: Tensor, learning_rate: float):
        state = self.state[param]
        if not state:
            state["step"] = torch.zeros(())
            state["square"] = torch.zeros_like(param)
            state["momentum"] = torch.zeros_like(param)
        state["step"] += 1
        t = int(state["step"])
        largest = 0.3 * param.norm().clamp(min=1e-3)
        gradient = param.grad / (param.grad.norm() / largest).clamp(min=1)
        square = state["square"].lerp_(gradient**2, 1 - 0.999)
        normalized = gradient / ((square / (1 - 0.999**t)).sqrt() + 1e-20)
        momentum = state["momentum"].lerp_(normalized, 1 - 0.9)
        warm = min(1.0, (t - 1) / self.warmup) if self.warmup else 1.0
        param.sub_(momentum / (1 - 0.9**t), alpha=learning_rate * warm)


# ---- Models and players ---------------------------------------------------------------------


class WorldModel(director.WorldModel):
    RSSM = RSSM

    def __init__(self, obs_space: spaces.Dict, action: int, config: Config):
        super().__init__(obs_space, action, config)
        self.free_bits = config.latents == "yes"
        if config.two_hot == "yes":
            self.reward_head = TwoHotHead(config.deter + self.rssm.size, config)
        if config.rms_silu == "yes":
            use_rms_silu(self)

    def kl_loss(self, states: dict[str, Tensor]) -> tuple[Tensor, dict]:
        loss, metrics = super().kl_loss(states)
        if self.free_bits:
            loss = free_bits_kl(states["post"], states["prior"])
            del metrics["kl_scale"]
        return loss, metrics


class GoalAutoencoder(director.GoalAutoencoder):

    def __init__(self, config: Config):
        super().__init__(config)
        if config.rms_silu == "yes":
            use_rms_silu(self)


class PercentileScale(nn.Module):
    """Divides by the range between the 5th and the 95th percentile, or by `floor` if it is less."""

    def __init__(self, floor: float):
        super().__init__()
        self.floor = floor
        self.register_buffer("percentiles", torch.zeros(2))

    def forward(self, x: Tensor, update: bool = True) -> Tensor:
        """With `update`, the percentiles of x go into the averages first."""
        if update:
            levels = torch.tensor([0.05, 0.95], device=x.device)
            found = torch.quantile(x.detach().float().flatten(), levels)
            self.percentiles.lerp_(director.all_reduce_mean([found])[0], 0.01)
        return x / self.spread.clamp(min=self.floor)

    @property
    def spread(self) -> Tensor:
        return self.percentiles[1] - self.percentiles[0]


class ActorCritic(director.ActorCritic):

    def __init__(self, keys: tuple, feat: int, action: tuple, discrete: bool,
                 rewards: dict[str, float], config: Config, reinforce: bool = False):
        super().__init__(keys, feat, action, discrete, rewards, config, reinforce)
        if config.two_hot == "yes":
            self.critics = nn.ModuleDict({name: TwoHotHead(feat, config) for name in rewards})
        if config.rms_silu == "yes":
            use_rms_silu(self.actor)
            use_rms_silu(self.critics)
        self.slow = copy.deepcopy(self.critics).requires_grad_(False)
        if config.critic_ema == "yes":
            self.ema_critics = copy.deepcopy(self.slow)
        if config.percentiles == "yes":
            floors = {name: 1.0 if name == "extr" else 0.1 for name in rewards}
            self.returnnorm = nn.ModuleDict(
                {name: PercentileScale(floor) for name, floor in floors.items()})
            self.advnorm = nn.Identity()
        optimizer = optimizer_class(config)
        self.optimizers = {"actor": optimizer(self.actor, config)}
        for name, critic in self.critics.items():
            self.optimizers[f"{name}_critic"] = optimizer(critic, config)

    def learn(self, traj: dict[str, Tensor], copy_slow: bool) -> dict[str, Tensor]:
        ema = self.config.critic_ema == "yes"
        if ema:
            # `returns` reads self.slow. Here it is a copy of the critics as they are before this
            # step. A continuous actor back-propagates through it after the critics have changed.
            self.slow.load_state_dict(self.critics.state_dict())
        metrics = super().learn(traj, copy_slow and not ema)
        if ema:
            with torch.no_grad():
                pairs = zip(self.ema_critics.parameters(), self.critics.parameters(), strict=True)
                for average, weight in pairs:
                    average.lerp_(weight, 0.02)
        if self.config.percentiles == "yes":
            for name, scale in self.returnnorm.items():
                metrics[f"{name}_return_range"] = scale.spread
        return metrics

    def critic_loss(self, name: str, pred, feat: Tensor, ret: Tensor) -> Tensor:
        loss = pred.loss(ret)
        if self.config.critic_ema == "yes":
            loss = loss + pred.loss(self.ema_critics[name](feat).mean)
        return loss


def optimizer_class(config: Config) -> type:
    return LaProp if config.laprop == "yes" else director.Optimizer


class Agent(director.Director):
    """Director, or the flat agent, with DreamerV3's techniques."""

    Config, WorldModel, Goals = Config, WorldModel, GoalAutoencoder

    def build(self, action: tuple):
        super().build(action)
        optimizer = optimizer_class(self.config)
        self.optimizers["world_model"] = optimizer(self.world_model, self.config)
        if self.manager:
            self.optimizers["goals"] = optimizer(self.goals, self.config)

    def player(self, keys: tuple, action: tuple, discrete: bool, rewards: dict, **kwargs):
        feat = sum(self.sizes[key] for key in keys)
        return ActorCritic(keys, feat, action, discrete, rewards, self.config, **kwargs)


if __name__ == "__main__":
    sys.exit(director.main(agent=Agent))
