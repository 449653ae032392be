"""CUDA graphs: the kernels of a train step are recorded once and then replayed by the GPU.

A train step of size `paper` launches about 12,000 kernels. Launching them from Python takes several
times as long as a large GPU needs to compute them. A train step can be recorded because its shapes
never change, parameters and statistics stay at their addresses, and it reads no value back.

director.py trains in this way on a GPU unless `--eager` is set. Variants do not: a recording
repeats the kernels of one step, so that Python which differs between steps (`prioritized`,
`dyna_q`) would not run. Results equal those of eager steps up to rounding, random numbers included.
Recording takes seconds, and its memory is in use until the program ends.
"""

import numpy as np
import torch
from torch import Tensor


class Graphed:
    """`agent.train_step` as CUDA graphs, for batches of one shape.

    The first `eager` steps are executed as usual, since PyTorch asks for a warm-up. Then there are
    two graphs: of steps that copy the critics to the slow critics, and of steps that do not.
    """

    def __init__(self, agent, eager: int = 3):
        self.agent = agent
        self.eager = eager
        self.batch = {}  # the tensors that the graphs read
        self.graphs = {}  # {copies critics: (graph, names of metrics, values [M])}
        self.stream = torch.cuda.Stream()
        self.pool = torch.cuda.graph_pool_handle()

    def __call__(self, arrays: dict[str, np.ndarray]) -> dict[str, Tensor]:
        """One gradient step on replay chunks, arrays [B, T, ...]; returns scalar metrics."""
        agent = self.agent
        if not self.batch:
            self.batch = agent.tensors(arrays)
        for key, value in self.batch.items():
            value.copy_(torch.as_tensor(arrays[key]))
        if self.eager > 0:
            self.eager -= 1
            return self.warm_up()
        copies = agent.grad_steps % agent.config.slow_every == 0
        if copies not in self.graphs:
            self.graphs[copies] = self.record()
        graph, names, values = self.graphs[copies]
        graph.replay()
        agent.grad_steps += 1
        return dict(zip(names, values.clone(), strict=True))

    def warm_up(self) -> dict[str, Tensor]:
        """An eager train step on a side stream, as recordings are."""
        current = torch.cuda.current_stream()
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            metrics = self.agent.train_step(self.batch)
        current.wait_stream(self.stream)
        return metrics

    def record(self) -> tuple[torch.cuda.CUDAGraph, list[str], Tensor]:
        """Record a train step without executing it: the graph, names and values [M] of metrics."""
        for optimizer in self.agent.optimizers.values():
            for group in optimizer.param_groups:
                group["capturable"] = True  # required inside a graph
        graph = torch.cuda.CUDAGraph()
        grad_steps = self.agent.grad_steps
        with torch.cuda.graph(graph, pool=self.pool):
            metrics = self.agent.train_step(self.batch)
            values = torch.stack([value.float() for value in metrics.values()])
        self.agent.grad_steps = grad_steps
        return graph, list(metrics), values
