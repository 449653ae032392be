"""Does the manager lead? What becomes of the return when the worker is given other goals?

    python experiments/lead.py RUN
    python experiments/lead.py RUN --modes
    python experiments/lead.py RUN --watch
    python experiments/lead.py RUN --variant feudal

Ten episodes each, side by side. First form: with the manager's goals, with those that it chooses
for another player, who is elsewhere, and with goals of random codes, the worker's actions being the
most likely ones; then with the manager's goals and sampled actions, as in training. With --modes:
manager and worker, both sampled or most likely. Of a flat agent, there are only two ways to act.
With --watch: five episodes each, sampled and most likely actions, of every checkpoint that a run in
progress writes; a line of them in RUN/held.jsonl, with the checkpoint's step. Beside each mean
return: the mean value of the critic on the way, and the value that the rewards on the way justify.
With --variant: the run is that of a file in variants/.
"""

import importlib
import json
import pathlib
import sys
import time

import numpy as np
import torch

sys.path[:0] = map(str, (pathlib.Path(__file__).parents[1], pathlib.Path(__file__).parent))
from command import command

import director
from director import Director

EPISODES = 10


@torch.no_grad()
def play(agent: Director, envs, mode: str) -> tuple[list[float], float, float]:
    """Play an episode of each environment, side by side, and those that end with the last of them.

    Returns their returns; the mean value, on the way, of the player that the task pays; and the
    value that the rewards on the way justify: their mean, if it went on forever.
    """
    torch.manual_seed(agent.config.seed)
    driver, state, scores = director.Driver(envs, agent.config.seed), None, []
    player, values, rewards = agent.manager or agent.worker, [], []
    while len(scores) < envs.num_envs:
        action, state = agent.policy(driver.rows, state, mode)
        values.append(director.symexp(player.critics["extr"](player.feat(state))).mean().item())
        driver.step(action.cpu().numpy(), state)
        rewards.append(driver.rows["reward"].mean())
        scores += driver.score[driver.rows["is_last"]].tolist()
    justified = float(np.mean(rewards) / np.float64(1 - player.discount))  # or infinite
    return scores, float(np.mean(values)), justified


def play_checkpoints(run: str, kind: type):
    """Play each checkpoint once, until the run has made all its steps."""
    folder, step, steps = pathlib.Path(run), 0, 1
    while step < steps:
        early = (folder / "config.json").exists() and not (folder / "checkpoint.pt").exists()
        if early or (agent := director.load(run, kind)).origin["step"] == step:
            time.sleep(60)
            continue
        step, steps = agent.origin["step"], agent.config.steps
        with director.vector_envs(agent.config, 5) as envs:
            line = {"step": step}
            for mode in ("train", "eval"):
                line[mode], line[f"{mode}_value"], line[f"{mode}_justified"] = (
                    play(agent, envs, mode))
        print(line, flush=True)
        with open(folder / "held.jsonl", "a") as file:
            file.write(json.dumps(line) + "\n")


@torch.no_grad()
def main(run: str, modes: bool = False, watch: bool = False, variant: str | None = None
         ) -> dict[tuple, list[float]]:
    """Print mean returns; returns all of them by (goals, actions)."""
    try:
        kind = importlib.import_module(f"variants.{variant}").Agent if variant else Director
    except (ImportError, AttributeError) as error:
        raise director.UserError(f"--variant {variant}: {error}") from error
    if watch:
        return play_checkpoints(run, kind)
    agent, results = director.load(run, kind), {}
    config, choose = agent.config, agent.choose

    # Each of these chooses skill and goal for all players at once, whether or not it is time.

    def sampled(state: dict) -> dict:
        return choose(state, np.zeros(EPISODES, int))

    def for_another_player(state: dict) -> dict:
        return {key: x.roll(1, 0) for key, x in sampled(state).items()}

    def decoded(skill: torch.Tensor) -> dict:
        return {"skill": skill.flatten(1), "goal": agent.goals.decode(skill.flatten(1))}

    def most_likely(state: dict) -> dict:
        return decoded(agent.manager.dist(agent.manager.feat(state)).mode)

    def random_codes(state: dict) -> dict:
        codes = torch.zeros(EPISODES, *agent.goals.groups, device=config.device)
        one_hot = codes.ndim > 2  # or plain numbers, in a variant
        return decoded(director.OneHot(codes).rsample() if one_hot else codes.uniform_(-1, 1))

    def in_time(goals):
        """What `choose` shall be: new goals where it is time, the old ones elsewhere."""
        def choose_now(state: dict, count: np.ndarray) -> dict:
            now = torch.as_tensor(count % config.goal_duration == 0, device=config.device)[:, None]
            return {key: torch.where(now, x, state[key]) for key, x in goals(state).items()}
        return choose_now

    if not agent.manager:
        trials = [(None, "eval"), (None, "train")]
    elif modes:
        trials = [(x, mode) for x in (sampled, most_likely) for mode in ("train", "eval")]
    else:
        trials = [(x, "eval") for x in (sampled, for_another_player, random_codes)]
        trials.append((sampled, "train"))
    with director.vector_envs(config, EPISODES) as envs:
        for goals, mode in trials:
            if goals:
                agent.choose = in_time(goals)
            scores, value, justified = play(agent, envs, mode)
            names = (goals.__name__.replace("_", " ") if goals else "none",
                     "most likely" if mode == "eval" else "sampled")
            results[names] = scores
            print(f"goals: {names[0]}, actions: {names[1]}: mean return {np.mean(scores):.1f} "
                  f"({min(scores):.1f} to {max(scores):.1f}), value {value:.2f}, justified "
                  f"{justified:.2f}", flush=True)
    return results


if __name__ == "__main__":  # environments may start processes
    command(main, __doc__, **{
        "--modes": {"action": "store_true", "help": "sampled or most likely choices"},
        "--watch": {"action": "store_true", "help": "every checkpoint of a run in progress"},
        "--variant": {"help": "the run is of variants/<VARIANT>.py"}})
