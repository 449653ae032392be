"""Data parallelism: one run on several processes, GPUs or machines, with torch.distributed.

    torchrun --nproc_per_node 2 -m variants.parallel --task pinpad_three

It trains Director and the flat agent of director.py, no variants. The same flags give the same
algorithm: `--batch_size`, `--envs` and `--replay_size` are those of all processes together, and
`--steps` counts the steps of all environments. Each process steps its own environments, has its own
replay, and trains on its part of the batch, which comes from that replay. Gradients, the statistics
of adaptive scales and normalizers, and metrics are averaged over processes. Random numbers depend
on seed, step and rank.

Rank 0 prints, and writes the checkpoint for all. Rank r > 0 logs and keeps its episodes in the
folder `rank<r>` inside the run's folder, which all processes must be able to write to.

A signal to any process, or to torchrun, stops all after the same step, and a checkpoint is saved.
An error in one process, or its death, ends all without saving; the same command then continues from
the last checkpoint.

Communication: 16 collectives in a train step (from pixels), one in a step of the environments; 189
MB of gradients at size `paper`, about 1 ms over NVLink (calculated, not measured).
"""

import contextlib
import os
import sys

import torch
import torch.distributed as dist

import director

RANK = int(os.environ.get("RANK", "0"))
RANKS = int(os.environ.get("WORLD_SIZE", "1"))


def all_reduce_mean(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    """Means over processes, with one collective; each keeps the memory layout of its tensor."""
    flat = torch.cat([tensor.flatten() for tensor in tensors] or [torch.zeros(0)])
    dist.all_reduce(flat)
    parts = (flat / RANKS).split([tensor.numel() for tensor in tensors])
    means = []
    for tensor, part in zip(tensors, parts, strict=True):
        means.append(torch.empty_like(tensor).copy_(part.view_as(tensor)))
    return means


class Replay(director.Replay):
    """The replay of one process. A checkpoint has {rank: {name: length}}."""

    def sample(self, batch_size: int, length: int) -> dict:
        return super().sample(max(1, batch_size // RANKS), length)

    def save(self, folder) -> dict:
        lengths = [None] * RANKS
        dist.all_gather_object(lengths, super().save(folder))  # takes about 10 ms
        return dict(enumerate(lengths))

    def load(self, folder, lengths: dict, rows: dict | None = None, skip_missing: bool = False):
        super().load(folder, lengths[RANK], rows, skip_missing)


class Run(director.Run):
    """A run whose processes agree on when to stop."""

    def lock_folder(self):
        if self.config.batch_size % RANKS or self.config.envs % RANKS:
            raise director.UserError(f"--batch_size, --envs: not multiples of {RANKS} processes")
        self.replay.capacity //= RANKS
        if RANK > 0:
            self.logdir = self.logdir / f"rank{RANK}"
            self.config.track = False
        super().lock_folder()

    def open(self):
        if self.step:
            before = len(self.agent.resumed_from["episodes"])
            if before != RANKS:
                raise director.UserError(
                    f"{self.checkpoint}: is of {before} processes, not {RANKS}")
        super().open()
        if RANK == 0:
            dist.barrier()  # the other processes wait for it in `main`

    def reseed(self) -> int:
        return super().reseed(RANK) if RANK > 0 else super().reseed()

    def on_signal(self, number: int, frame):
        # Unlike director.py's, it keeps its handler: torchrun repeats a signal of the terminal.
        self.received_signals.append(number)

    def interruptible(self):
        """Nothing interrupts a step of the environments, since all processes stop together."""
        return contextlib.nullcontext()

    def should_continue(self) -> bool:
        signal = max(self.received_signals, default=0)
        # The largest -step is minus the smallest step, so one collective compares all steps.
        news = torch.tensor([signal, self.step, -self.step])
        dist.all_reduce(news, dist.ReduceOp.MAX)
        signal, last, minus_first = news.tolist()
        if last != -minus_first:
            raise director.UserError("processes at different steps: they have to share --logdir")
        if signal and not self.received_signals:
            self.received_signals.append(signal)  # that of another process
        return self.step < self.config.steps and not signal

    def write_checkpoint(self, buffer):
        if RANK == 0:
            super().write_checkpoint(buffer)
        dist.barrier()  # old episodes are deleted only when the checkpoint is written

    def close(self):
        if sys.exc_info()[0]:
            self.update_complete = False  # after an error nothing is saved
        super().close()


class Agent(director.Director):
    Replay, Run = Replay, Run

    def __init__(self, *args):
        super().__init__(*args)
        if RANK > 0:  # the run has one id, that of rank 0
            settings = director.read_settings(director.run_folder(self.config, Agent))
            self.resumed_from["run_id"] = settings["run_id"]


def main(argv: list[str]) -> int:
    """director.main in each of RANKS processes."""
    backend = "cpu:gloo"
    if torch.cuda.is_available():
        backend += ",cuda:nccl"
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    if RANKS == 1:  # also without torchrun
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    else:
        dist.init_process_group(backend)

    all_envs = director.vector_envs
    director.vector_envs = lambda config, amount: all_envs(config, max(1, amount // RANKS))
    director.all_reduce_mean = all_reduce_mean
    try:
        if RANK > 0:
            if any(flag.startswith(("--eval", "--help", "-h")) for flag in argv):
                return 0  # rank 0 does that alone
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115
            dist.barrier()  # rank 0 goes first and alone reports mistakes in flags or folders
        code = director.main(argv, Agent)
        dist.destroy_process_group()
        return code
    except RuntimeError as error:
        if "gloo" in str(error) or isinstance(error, dist.DistError):
            return 1  # another process has ended; torchrun says which
        raise


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
