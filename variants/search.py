"""Search in a learned model: the cross-entropy method, and MuZero's tree search.

`planner.py` uses both. They do not depend on Director's networks, and search for E states at once.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from director import OneHot


def cross_entropy(score: Callable, start: Tensor, one_hot: bool, candidates: int,
                  rounds: int) -> Tensor:
    """The cross-entropy method (PETS, PlaNet): the best sequences of moves, best first.

    Each round draws candidates from a distribution that was fitted to the elites, the best tenth,
    of the round before. The distribution of continuous moves is Gaussian, clipped to [-1, 1], at
    first with standard deviation 1; that of `one_hot` moves is categorical, with 1% uniform.

    start: means or logits of the first round, [L, E, ...]. score(sequences [L, E, candidates, ...])
    returns scores [E, candidates]. Returns the last elites, [L, E, candidates / 10, ...].
    """
    center = start[:, :, None]  # means or logits
    std = torch.ones_like(center)
    for _ in range(rounds):
        center = center.expand(-1, -1, candidates, *start.shape[2:])
        std = std.expand(-1, -1, candidates, *start.shape[2:])
        if one_hot:
            moves = OneHot(center, 0.01).rsample()
        else:
            moves = torch.normal(center, std).clamp(-1, 1)
        best = score(moves).topk(candidates // 10).indices  # [E, elites]
        elite = moves[:, torch.arange(len(best))[:, None], best]  # [L, E, elites, ...]
        mean = elite.mean(2, keepdim=True)
        center = mean.log() if one_hot else mean
        std = elite.std(2, keepdim=True)
    return elite


def tree_search(root: dict, moves_to_try: Callable, imagine: Callable, value: Callable,
                simulations: int) -> tuple[Tensor, Tensor]:
    """MuZero's tree search: moves of the root [E, M, ...], and their visits [E, M].

    root: E states. moves_to_try(state): moves [E, M, ...], and their prior probabilities, [E, M].
    imagine(state, move): the next state, the reward on the way [E], and the discount [E] of
    what follows. value(state): [E].

    Each simulation adds one node to each of the E trees (Schrittwieser et al., 2020, Appendix B).
    From the root on, it follows the move with the largest

        Q + 1.25 P sqrt(visits of the node) / (1 + visits of the move),

    (eq. 2) where the visits of a node are 1 + those of its moves, P is the prior, and Q the mean of
    the returns that were backed up through the move, scaled to 0..1 by the least and the largest
    present Q in the tree (MuZero: of all so far; 0 if there is none), until it comes to a move
    without a node. It imagines that move, evaluates the new state, and adds the return to all
    moves on the way. (In MuZero, 1.25 grows with the logarithm of visits, by 0.003 in 50
    simulations.)
    """
    moves, prior = moves_to_try(root)
    trees = np.arange(len(prior))
    shape = (len(prior), simulations + 1, prior.shape[1])  # of arrays [E, node, move]
    child = np.zeros(shape, int)  # the node to which a move leads; 0 if there is none yet
    visits = np.zeros(shape)
    total = np.zeros(shape)  # sum of returns
    reward = np.zeros(shape)
    discount = np.zeros(shape)
    priors = np.zeros(shape)
    priors[:, 0] = prior.cpu().numpy()
    states = [root]  # of nodes
    tried = [moves]
    for new in range(1, simulations + 1):
        q = total / np.maximum(visits, 1)
        low = np.where(visits > 0, q, np.inf).min((1, 2), keepdims=True)
        high = np.where(visits > 0, q, -np.inf).max((1, 2), keepdims=True)
        scaled = np.where(visits > 0, (q - low) / np.maximum(high - low, 1e-8), 0)

        # Go down to a move without a node. A tree that has found such a move waits there.
        node = np.zeros(len(trees), int)
        going = np.ones(len(trees), bool)
        path = []
        while going.any():
            move_visits = visits[trees, node]  # [E, M]
            explore = np.sqrt(1 + move_visits.sum(1, keepdims=True)) / (1 + move_visits)
            move = (scaled[trees, node] + 1.25 * priors[trees, node] * explore).argmax(1)
            path.append((node, move, going))
            below = child[trees, node, move]
            going = going & (below > 0)
            node = np.where(going, below, node)

        # Imagine the move, and evaluate the new node.
        leaf = {key: torch.stack([state[key] for state in states])[node, trees]  # [E, ...]
                for key in ("deter", "stoch")}
        state, move_reward, move_discount = imagine(leaf, torch.stack(tried)[node, trees, move])
        reward[trees, node, move] = move_reward.cpu().numpy()
        discount[trees, node, move] = move_discount.cpu().numpy()
        child[trees, node, move] = new
        moves, prior = moves_to_try(state)
        priors[:, new] = prior.cpu().numpy()
        states.append(state)
        tried.append(moves)

        # Back up the return.
        back = value(state).cpu().numpy()
        for node, move, on_path in reversed(path):  # on_path: trees that had not found a move yet
            at = trees[on_path], node[on_path], move[on_path]
            back[on_path] = reward[at] + discount[at] * back[on_path]
            total[at] += back[on_path]
            visits[at] += 1
    return tried[0], torch.from_numpy(visits[:, 0]).to(prior.device)
