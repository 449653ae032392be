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

    Losses over such pairs are means over all B (T-k) positions, with weight 0 where a pair crosses
    the border of two episodes. So with many short episodes the loss, and a mean that `AutoAdapt`
    compares with its target, are smaller, by the factor that is logged as `goal_pairs`. If no
    episode is longer than k, nothing is learned.
    """
    return ~is_first[:, 1:].unfold(1, k, 1).any(-1)


def reward_at_end(reward: Tensor, k: int) -> Tensor:
    """Rewards of the k-th state of each block, [H/k, N], as rewards of single steps, [H, N].

    `director.abstract_trajectory` computes R[b] = 1/k sum over i < k of alive[i] r[bk+i], where
    alive[i] is the probability of getting to step i. With r = k * reward in the last step of the
    block and 0 before, R[b] = alive[k-1] * reward[b].
    """
    steps = torch.zeros_like(reward).repeat_interleave(k, 0)
    steps[k - 1 :: k] = k * reward
    return steps
