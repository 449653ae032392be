"""Data parallelism: one run on several processes, GPUs or machines, with torch.distributed.

    torchrun --nproc_per_node 2 -m variants.parallel --task pinpad_three

The same flags are the same algorithm: `--batch_size`, `--envs` and `--replay_size` are those of all
processes together, and steps count all their rows. Each plays its environments into its own replay
and learns on its part of a batch; gradients, means of adapters and normalisers, and metrics are
averaged. What is drawn follows from (seed, step, rank). Rank 0 prints and writes the checkpoint for
all, the others log in `rank1` ... in its folder, which all have to share. A signal to any of them,
or to torchrun, stops all after the same step, saved. An error in one, or its death, ends all, not
saved: the same command goes on from the last checkpoint. On paper: 17 collectives in a train step,
one in a step of environments; 189 MB of gradients at the paper's size, 1 ms over NVLink.
"""

import os
import sys

import torch
import torch.distributed as dist

import director

RANK, RANKS = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def all_reduce_mean(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    """Means over processes, each in the memory layout of its tensor; one collective."""
    flat = torch.cat([x.flatten() for x in tensors] or [torch.zeros(0)])
    dist.all_reduce(flat)
    means = (flat / RANKS).split([x.numel() for x in tensors])
    return [torch.empty_like(x).copy_(y.view_as(x)) for x, y in zip(tensors, means, strict=True)]


class Replay(director.Replay):
    """The part of one process; a checkpoint has names and lengths of all."""

    def sample(self, batch_size: int, length: int) -> dict:
        return super().sample(batch_size // RANKS or 1, length)

    def save(self, folder) -> dict:
        everyone = [None] * RANKS
        dist.all_gather_object(everyone, super().save(folder))  # some 10 ms
        return dict(enumerate(everyone))

    def load(self, folder, lengths: dict):
        super().load(folder, lengths[RANK])


class Run(director.Run):
    """Agrees with the others when to stop."""

    def lock_folder(self):
        if self.config.batch_size % RANKS or self.config.envs % RANKS:
            raise director.UserError(f"--batch_size, --envs: not multiples of {RANKS} processes")
        self.replay.capacity //= RANKS
        if RANK:
            self.logdir = self.logdir / f"rank{RANK}"
            self.replay_dir = self.logdir / "replay"
        super().lock_folder()

    def open(self):
        before = len(self.agent.resumed_from["episodes"]) if self.step else RANKS
        if before != RANKS:
            raise director.UserError(f"{self.checkpoint}: is of {before} processes, not {RANKS}")
        super().open()
        self.bar.close() if RANK else dist.barrier()  # now the others may begin

    def reseed(self) -> int:
        return super().reseed(*[RANK] * (RANK > 0))

    def on_signal(self, number: int, frame):
        self.received_signals.append(number)  # torchrun repeats what a terminal has sent

    def should_continue(self) -> bool:
        told = torch.tensor([max(self.received_signals, default=0), self.step, -self.step])
        dist.all_reduce(told, dist.ReduceOp.MAX)
        number, most, least = told.tolist()
        if most != -least:
            raise director.UserError("processes at different steps: they have to share --logdir")
        self.received_signals += [number] if number and not self.received_signals else []
        return self.step < self.config.steps and not number

    def write_checkpoint(self, buffer):
        if RANK == 0:
            super().write_checkpoint(buffer)
        dist.barrier()  # nothing is deleted before it is there

    def close(self):
        self.update_complete = self.update_complete and not sys.exc_info()[0]
        super().close()


class Agent(director.Director):
    Replay, Run = Replay, Run


def main(argv: list[str]) -> int:
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    alone = {"store": dist.HashStore(), "rank": 0, "world_size": 1} if RANKS == 1 else {}
    dist.init_process_group("cpu:gloo" + ",cuda:nccl" * torch.cuda.is_available(), **alone)
    director.all_reduce_mean = all_reduce_mean
    envs = director.vector_envs
    director.vector_envs = lambda config, amount: envs(config, amount // RANKS or 1)
    try:
        if RANK:
            if any(flag.startswith(("--eval", "--help", "-h")) for flag in argv):
                return 0  # one process can do that
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115
            dist.barrier()  # rank 0 goes first; what is wrong with flags or folder, it says alone
        code = director.main(argv, Agent)
        dist.destroy_process_group()
        return code
    except RuntimeError as error:
        if "gloo" in str(error) or isinstance(error, dist.DistError):
            return 1  # another process has ended; torchrun says which
        raise


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
