"""CUDA graphs: a GPU replays what a train step has launched once, instead of being told it again.

A train step of the paper's size launches about 12,000 kernels, which is several times as much work
for Python as it is for a large GPU. Its shapes never change, all that it trains keeps its memory,
and it reads nothing back, so it can be recorded. On a GPU director.py learns through this, if
`--eager` is not set; a variant whose train step does something in Python that differs from step to
step (`prioritized`, `dyna_q`) must not, so none does. The results are those of eager steps, random
numbers included. The recording takes seconds; it keeps its memory until the program ends.
"""

import numpy as np
import torch
from torch import Tensor


class Graphed:
    """`agent.train_step` for batches of one shape: eager a few times, which train as well, then two
    graphs, one for steps that copy the critics to the slow ones."""

    def __init__(self, agent, eager: int = 3):
        self.agent, self.eager = agent, eager
        self.batch, self.graphs = {}, {}  # whether it copies: (graph, names of metrics, values)
        self.stream, self.pool = torch.cuda.Stream(), torch.cuda.graph_pool_handle()

    def __call__(self, arrays: dict[str, np.ndarray]) -> dict[str, Tensor]:
        """One gradient step on arrays [B, T, ...]; scalar metrics."""
        agent, main = self.agent, torch.cuda.current_stream()
        self.batch = self.batch or agent.tensors(arrays)
        for key, value in self.batch.items():
            value.copy_(torch.as_tensor(arrays[key]))
        if self.eager:  # on another stream than the usual one, as a recording will be
            self.eager -= 1
            self.stream.wait_stream(main)
            with torch.cuda.stream(self.stream):
                metrics = agent.train_step(self.batch)
            main.wait_stream(self.stream)
            return metrics
        copies = agent.grad_steps % agent.config.slow_every == 0
        if copies not in self.graphs:
            self.graphs[copies] = self.record()
        graph, names, values = self.graphs[copies]
        graph.replay()
        agent.grad_steps += 1
        return dict(zip(names, values.clone(), strict=True))

    def record(self) -> tuple[torch.cuda.CUDAGraph, list[str], Tensor]:
        """Of a train step, without doing it: the graph, and where it leaves its metrics, [M]."""
        for optimizer in self.agent.optimizers.values():
            for group in optimizer.param_groups:
                group["capturable"] = True  # PyTorch asks for it; the fused Adam always is
        graph, steps = torch.cuda.CUDAGraph(), self.agent.grad_steps
        with torch.cuda.graph(graph, pool=self.pool):
            metrics = self.agent.train_step(self.batch)
            values = torch.stack([x.float() for x in metrics.values()])
        self.agent.grad_steps = steps
        return graph, list(metrics), values
