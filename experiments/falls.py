"""Why do returns of Pin Pad Three fall? The same task without images, at three times the speed.

    python experiments/falls.py AGENT [--seed 0 ...]      train; other flags are director.py's
    python experiments/falls.py parts RUN PART ...        what mends it: learn on, these parts alone

AGENT is "director", as it is, "fresh", whose batches are drawn from running episodes, too, or
"rounded", whose networks' outputs are rounded to bfloat16's 8 bits.
Their runs are in runs/gym_PinPadTold-v0; with --task pinpad_three --random 0 --kl_weight 1, they
train from images.
A RUN is the folder of any run of Director. A PART is model, goals, worker, manager, critics (the
manager's, with its actor as it is) or nearer (discount its choices by 0.92). These make 1000
gradient steps on the replay as it is, and the agent plays five episodes before, half-way and after,
its actions sampled: mean return, value on the way, and what the rewards justify, as lead.py has it.
Nothing is written.
"""

import pathlib
import sys

import numpy as np
import torch

sys.path[:0] = map(str, (pathlib.Path(__file__).parents[1], pathlib.Path(__file__).parent))
import lead
from command import agent_and_replay, command

import director


class Fresh(director.Director):
    """What was seen last is learned from at once, not when its episode has ended."""

    loads = ("director",)

    class Replay(director.Replay):
        def sample(self, batch_size, length):
            finished = self.episodes
            self.episodes = {**finished, **{name: episode for name, episode in self.running.values()
                                            if len(episode["reward"]) >= length}}
            try:
                return super().sample(batch_size, length)
            finally:
                self.episodes = finished


class Rounded(director.Director):
    """Outputs of networks as bfloat16 holds them, as --precision bfloat16 once had them."""

    loads = ("director",)

    def build(self, action):
        super().build(action)
        for module in self.modules():
            if isinstance(module, director.MLP):
                module.register_forward_hook(
                    lambda module, seen, out: out + (out.bfloat16().float() - out).detach())


PARTS = "model", "goals", "worker", "manager", "critics", "nearer"
AGENTS = {"director": director.Director, "fresh": Fresh, "rounded": Rounded}


def parts(run: str, names: list[str], steps: int = 1000) -> list[tuple]:
    """Print, and return, gradient steps, returns, value on the way and the value they justify."""
    (agent, replay), played = agent_and_replay(run, Fresh), []
    config, manager = agent.config, agent.manager
    if "nearer" in names:
        manager.discount = 0.92
    if "critics" in names:
        manager.actor.optimizer.minimize = lambda loss: torch.zeros(())
    with director.vector_envs(config, 5) as envs:
        for step in range(steps + 1):
            if step % (steps // 2) == 0:
                played.append((step, *lead.play(agent, envs, "train")))
                scores, value, justified = played[-1][1:]
                print(f"{step:5} gradient steps of {', '.join(names)}: return {np.mean(scores):.0f}"
                      f", value {value:.2f}, justified {justified:.2f}", flush=True)
            batch = agent.tensors(replay.sample(config.batch_size, config.batch_length))
            with director.autocast(config):
                loss, states, _ = agent.world_model.loss(batch)
            if "model" in names:
                agent.world_model.optimizer.minimize(loss)
            states = {**batch, **{key: value.detach() for key, value in states.items()}}
            if "goals" in names:
                agent.train_goals(states)
            with director.autocast(config):
                traj = agent.imagine({key: states[key].flatten(0, 1)
                                      for key in ("deter", "stoch", "is_terminal")})
            views, copy_slow = agent.views(traj), step % config.slow_every == 0
            if "worker" in names:
                agent.worker.learn(views["worker"], copy_slow)
            if {"manager", "critics"} & set(names):
                manager.learn(views["manager"], copy_slow)
    return played


if __name__ == "__main__":
    if sys.argv[1:2] == ["parts"]:
        command(parts, __doc__, sys.argv[2:], names={"nargs": "+", "choices": PARTS})
    elif sys.argv[1:] and sys.argv[1] in AGENTS:
        sys.exit(director.main(["--task=gym_PinPadTold-v0", *sys.argv[2:]], AGENTS[sys.argv[1]]))
    else:
        print(__doc__, file=sys.stderr)
        sys.exit(2)
