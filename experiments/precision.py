"""What does bfloat16 cost the advantages that actors learn from?

    python experiments/precision.py RUN

From 256 replayed states, the same imagined trajectories for all: for each reward of each player,
the advantage (lambda return less value) with the slow critic's hidden layers in bfloat16 and its
output layer in float32, as director.py has it; and with a float32 critic whose output is rounded
to bfloat16, or to float16. The error's standard deviation, as a share of the advantage's in
float32; the correlation with that; and the mean value.
"""

import pathlib
import sys

import torch

sys.path[:0] = map(str, (pathlib.Path(__file__).parents[1], pathlib.Path(__file__).parent))
from command import agent_and_replay, command

import director


@torch.no_grad()
def main(run: str):
    agent, replay = agent_and_replay(run, precision="float32")
    config = agent.config
    batch = agent.tensors(replay.sample(8, 32))
    states = batch | agent.world_model.observe(batch)
    traj = agent.imagine({key: states[key].flatten(0, 1)
                          for key in ("deter", "stoch", "is_terminal")})

    def advantages(player: director.ActorCritic, name: str, view: dict, dtype=None, half=False):
        """[H, N]; the critic's output rounded to `dtype`, its hidden layers in bfloat16."""
        with torch.autocast(config.device, torch.bfloat16, half):
            out = player.slow[name](player.feat(view))
        value = director.symexp(out.to(dtype).float() if dtype else out)
        discount = player.discount * view["cont"][1:]
        ret = director.lambda_return(view[f"reward_{name}"], value, discount, config.lam)
        return ret - value[:-1]

    for who, view in agent.views(traj).items():
        player = agent.players[who]
        for name in player.rewards:
            exact = advantages(player, name, view)
            value = director.symexp(player.slow[name](player.feat(view))).mean()
            for way, flags in {"hidden layers in bfloat16": {"half": True},
                               "output rounded to bfloat16": {"dtype": torch.bfloat16},
                               "output rounded to float16": {"dtype": torch.float16}}.items():
                other = advantages(player, name, view, **flags)
                share = (other - exact).std() / exact.std()
                near = torch.corrcoef(torch.stack([other.flatten(), exact.flatten()]))[0, 1]
                print(f"{who}, {name}, value {value:.3g}: {way}: error {share:.3f}, correlation "
                      f"{near:.3f}")


if __name__ == "__main__":  # environments may start processes
    command(main, __doc__)
