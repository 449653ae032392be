"""Ideas of other papers, each as one change of director.py. Here: what several of them share."""

import dataclasses

import torch
from torch import Tensor

from envs import UserError


def refuse(config, names: tuple, reason: str):
    """UserError if a flag that an agent does not read was changed from its default."""
    for field in dataclasses.fields(config):
        default = config.sizes[config.size].get(field.name, field.default)
        if field.name in names and getattr(config, field.name) != default:
            raise UserError(f"--{field.name} has no effect here: {reason} (default: {default})")


def same_episode(is_first: Tensor, k: int) -> Tensor:
    """Which steps t of replay chunks are in one episode with step t + k: bool [B, T] -> [B, T-k].

    Losses over such pairs divide by B (T-k), not by the number of pairs: no value has to be read
    from the GPU, and parallel processes average correctly. Where many pairs are left out, such a
    loss is smaller in proportion, and so are means that `AutoAdapt` compares with its target. If no
    episode is longer than k, nothing is learned; the metric `goal_pairs` shows the fraction of
    pairs that count.
    """
    return ~is_first[:, 1:].unfold(1, k, 1).any(-1)


def reward_at_end(reward: Tensor, k: int) -> Tensor:
    """Rewards of the k-th state of each block, [H/k, N], as rewards of single steps, [H, N].

    `director.abstract_trajectory` takes the mean over a block, in which it weights each step by the
    probability of getting that far. So the k-th step has k times the reward, the others have none.
    """
    steps = torch.zeros_like(reward).repeat_interleave(k, 0)
    steps[k - 1 :: k] = k * reward
    return steps
