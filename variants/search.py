"""Search in a learned model: the cross-entropy method, and MuZero's tree search.

`planner.py` uses both; they know nothing of Director, and search for several states at once.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from director import OneHot


def cross_entropy(score: Callable, start: Tensor, one_hot: bool, candidates: int,
                  rounds: int) -> Tensor:
    """The elite of sequences of moves, best first, [L, E, candidates / 10, ...] (PETS, PlaNet).

    Candidates are drawn again and again from a distribution that is fitted to the best tenth of
    those before: means [L, E, ...], first `start`, with deviations, first 1, samples in [-1, 1]; or
    `one_hot` classes, with logits. A single round is random shooting.
    score(sequences [L, E, candidates, ...]): [E, candidates].
    """
    mean, std = start[:, :, None], torch.ones_like(start[:, :, None])
    for _ in range(rounds):
        mean, std = (x.expand(-1, -1, candidates, *start.shape[2:]) for x in (mean, std))
        moves = OneHot(mean, 0.01).rsample() if one_hot else torch.normal(mean, std).clamp(-1, 1)
        best = score(moves).topk(candidates // 10).indices  # [E, elites]
        elite = moves[:, torch.arange(len(best))[:, None], best]
        mean, std = elite.mean(2, keepdim=True), elite.std(2, keepdim=True)
        mean = mean.log() if one_hot else mean
    return elite


def tree_search(root: dict, options: Callable, imagine: Callable, value: Callable,
                simulations: int) -> tuple[Tensor, Tensor]:
    """The root's moves [E, M, ...] and how often each was visited [E, M], for E states [E, ...].

    PUCT (Schrittwieser et al., 2020, Appendix B): from the root, the move is followed that has the
    largest Q + 1.25 P sqrt(visits of the node) / (1 + visits of the move), P being its prior and Q
    the mean of what was found behind it, min-max normalised over the tree (0 where nothing was),
    until a move has no node yet. That is imagined, its value is asked for, and reward and value go
    back up the way. Every simulation adds one node to every tree. (In MuZero the 1.25 grows with
    the log of visits, by 0.003 in 50 simulations, and least and most are those of Q.)

    options(state): moves to try, [E, M, ...], and their prior [E, M]. imagine(state, move): the
    next state, the reward on the way, and the discount of what follows, [E]. value(state): [E].
    """
    state, (moves, prior) = root, options(root)
    rows, shape = np.arange(len(prior)), (len(prior), simulations + 1, prior.shape[1])
    child, visits, total, reward, discount, priors = (np.zeros(shape) for _ in range(6))
    low, high = np.full(len(rows), np.inf), np.full(len(rows), -np.inf)
    states, tried, priors[:, 0] = [state], [moves], prior.cpu().numpy()
    for new in range(1, simulations + 1):
        node, going, way = np.zeros(len(rows), int), np.ones(len(rows), bool), []
        while going.any():  # where a tree's way has ended, node and move stay those of its end
            seen, width = visits[rows, node], np.maximum(high - low, 1e-8)[:, None]
            mean = total[rows, node] / np.maximum(seen, 1)
            score = np.where(seen > 0, (mean - low[:, None]) / width, 0)
            explore = np.sqrt(seen.sum(1, keepdims=True) + 1) / (1 + seen)
            move = (score + 1.25 * priors[rows, node] * explore).argmax(1)
            way.append((node, move, going))
            below = child[rows, node, move].astype(int)
            going = going & (below > 0)
            node = np.where(going, below, node)
        leaf = {x: torch.stack([state[x] for state in states])[node, rows]
                for x in ("deter", "stoch")}
        state, *found = imagine(leaf, torch.stack(tried)[node, rows, move])
        reward[rows, node, move], discount[rows, node, move] = (x.cpu().numpy() for x in found)
        child[rows, node, move] = new
        moves, prior = options(state)
        states, tried, priors[:, new] = [*states, state], [*tried, moves], prior.cpu().numpy()
        back = value(state).cpu().numpy()
        for node, move, on in reversed(way):
            at = rows[on], node[on], move[on]
            back[on] = reward[at] + discount[at] * back[on]
            total[at] += back[on]
            visits[at] += 1
            low[on], high[on] = np.minimum(low, back)[on], np.maximum(high, back)[on]
    return tried[0], torch.from_numpy(visits[:, 0]).to(prior.device)
