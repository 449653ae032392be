"""A train step as CUDA graphs is the eager one."""

import numpy as np
import pytest
import torch
from gymnasium import spaces

import director
from conftest import (
    CONTINUOUS,
    DISCRETE,
    TINY,
    random_batch,
    short_name,
)
from variants.graph import Graphed


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA GPU")
@pytest.mark.parametrize("space", [CONTINUOUS, DISCRETE], ids=short_name)
def test_a_train_step_as_cuda_graphs_equals_the_eager_one(space):
    """Over copies of the critics, new batches, and random numbers that are seeded in between."""
    results, rng = [], np.random.default_rng(0)
    size = 5 if space is DISCRETE else 3
    batches = [random_batch(rng, 4, 12, space is DISCRETE, size) for _ in range(5)]
    for batch in batches:  # convolutions differ a little from time to time
        batch["state"] = batch.pop("image")[..., 0, 0, :].astype(np.float32) / 255
    for graphs in (False, True):
        torch.manual_seed(0)
        config = director.Config(**{**TINY, "size": "xs", "device": "cuda", "slow_every": 4})
        agent = director.Director(spaces.Dict({"state": spaces.Box(0, 1, (3,))}), space, config)
        step, metrics = Graphed(agent) if graphs else agent.train_step, []
        for i in range(18):
            if i in (7, 10):
                torch.manual_seed(i)  # as where a checkpoint is saved
            metrics.append(step(batches[i % 5]))
        results.append(([{k: float(v) for k, v in x.items()} for x in metrics],
                        {k: v.cpu() for k, v in agent.state_dict().items()}, agent.grad_steps))
    (expected, weights, count), (found, others, other) = results
    assert count == other == 18
    for one, two in zip(expected, found, strict=True):
        assert one == pytest.approx(two, rel=1e-3, abs=1e-5)
    torch.testing.assert_close(others, weights, rtol=1e-4, atol=1e-5)
