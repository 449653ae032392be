"""Does the manager lead, and does the worker reach its goals?

    python results/goals.py RUN [--variant feudal]

Part 1 plays ten episodes, side by side, with each of three kinds of goals: those that the manager
samples, those that it samples for another player, and decodings of random codes. If returns fall
with other goals, the worker follows them. Beside each mean return: the mean value of the critic on
the way, and the value that the rewards on the way justify.

Part 2 starts from replayed states, 512 or less if episodes are short, and imagines 8 steps: mean
max-cosine between a goal and the last state, when the worker acts with this goal, when it acts with
another one, when actions are random, and when they are those of the replay.
"""

import argparse
import importlib
import pathlib
import sys

import numpy as np
import torch

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
import director
from director import Director
from variants import same_episode

EPISODES = 10


@torch.no_grad()
def play(agent: Director, envs, mode: str) -> tuple[list[float], float, float]:
    """Play the first episode of each environment, side by side.

    Returns their returns; until the last of them ends, the mean value of the player that receives
    the task reward, in all environments; and the value that the rewards justify: their mean, if it
    went on forever.
    """
    torch.manual_seed(agent.config.seed)
    driver = director.Driver(envs, agent.config.seed)
    player = agent.manager or agent.worker
    state, values, rewards = None, [], []
    scores = np.full(envs.num_envs, np.nan)  # of episodes that have ended
    while np.isnan(scores).any():
        action, state = agent.policy(driver.rows, state, mode)
        value = player.critics["extr"](player.feat(state)).mean
        values.append(value.mean().item())
        driver.step(action.cpu().numpy(), state)
        rewards.append(driver.rows["reward"].mean())
        ended = driver.rows["is_last"] & np.isnan(scores)
        scores[ended] = driver.score[ended]
    justified = float(np.mean(rewards) / np.float64(1 - agent.config.discount))  # or infinite
    return scores.tolist(), float(np.mean(values)), justified


def does_the_manager_lead(agent: Director):
    config, choose = agent.config, agent.choose

    def sampled_goals(state: dict) -> dict:
        return choose(state, np.zeros(EPISODES, int))  # for all players at once

    def goals_for_another_player(state: dict) -> dict:
        return {key: value.roll(1, 0) for key, value in sampled_goals(state).items()}

    def goals_of_random_codes(state: dict) -> dict:
        codes = torch.zeros(EPISODES, *agent.goals.groups, device=config.device)
        one_hot = codes.ndim > 2  # a variant's codes may be plain numbers
        codes = director.OneHot(codes).rsample() if one_hot else codes.uniform_(-1, 1)
        return {"skill": codes.flatten(1), "goal": agent.goals.decode(codes.flatten(1))}

    def every_k_steps(goals):
        """What `choose` shall be: new goals where it is time, the old ones elsewhere."""
        def choose_now(state: dict, count: np.ndarray) -> dict:
            due = torch.as_tensor(count % config.goal_duration == 0, device=config.device)[:, None]
            return {key: torch.where(due, x, state[key]) for key, x in goals(state).items()}
        return choose_now

    trials = [(sampled_goals, "eval"), (goals_for_another_player, "eval"),
              (goals_of_random_codes, "eval"), (sampled_goals, "train")]
    if not agent.manager:
        trials = [(None, "eval"), (None, "train")]
    with director.vector_envs(config, EPISODES) as envs:
        for goals, mode in trials:
            if goals:
                agent.choose = every_k_steps(goals)
            scores, value, justified = play(agent, envs, mode)
            name = goals.__name__.replace("_", " ") if goals else "no goals"
            actions = "most likely" if mode == "eval" else "sampled"
            print(f"{name}, {actions} actions: mean return {np.mean(scores):.1f} "
                  f"({min(scores):.1f} to {max(scores):.1f}), value {value:.2f}, justified "
                  f"{justified:.2f}", flush=True)
    agent.choose = choose


@torch.no_grad()
def does_the_worker_reach(agent: Director, replay: director.Replay):
    torch.manual_seed(0)
    model = agent.world_model
    actions = agent.sizes["action"]
    batch = agent.tensors(replay.sample(32, 32))
    states = model.observe(batch)
    same = same_episode(batch["is_first"], 8)[:, 8:]  # [32, 16]; M of these pairs are used
    if not same.any():
        print("no episode has the 8 steps that a goal takes here")
        return
    starts = {key: states[key][:, 8:24][same] for key in ("deter", "stoch")}  # [M, ...]
    later = states["deter"][:, 16:][same]  # what was reached 8 steps later
    replayed = [batch["action"][:, 9 + t : 25 + t][same] for t in range(8)]
    code = agent.goals.encode(later).rsample().flatten(-2)
    kinds = {"state 8 steps later": later,
             "the same, autoencoded": agent.goals.decode(code),
             "manager's choice": agent.choose(starts, np.zeros(len(later), int))["goal"]}

    def worker(goal: torch.Tensor):
        def act(t: int, state: dict) -> torch.Tensor:
            return agent.worker.dist(agent.worker.feat({**state, "goal": goal})).rsample()
        return act

    def random_actions(t: int, state: dict) -> torch.Tensor:
        if agent.discrete:
            return torch.eye(actions).to(later)[torch.randint(actions, (len(later),))]
        return 2 * torch.rand(len(later), actions).to(later) - 1

    for name, goal in kinds.items():
        policies = {"worker": worker(goal), "worker with another goal": worker(goal.roll(100, 0)),
                    "random actions": random_actions,
                    "replayed actions": lambda t, state: replayed[t]}
        for policy, act in policies.items():
            state = starts
            for t in range(8):
                deter, stoch = model.rssm.img_step(state["deter"], state["stoch"], act(t, state))
                state = {"deter": deter, "stoch": stoch}
            reached = director.max_cosine(goal, state["deter"]).mean()
            print(f"goal: {name}; {policy}: max-cosine {reached:.2f}")


def main(argv: list[str] | None = None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("run", help="the folder of a trained agent")
    parser.add_argument("--variant", help="the run is of variants/<VARIANT>.py")
    args = parser.parse_args(argv)
    try:
        module = importlib.import_module(f"variants.{args.variant}") if args.variant else None
        agent = director.load(args.run, module.Agent if module else Director)
        autoencoded = isinstance(getattr(agent, "goals", None), director.GoalAutoencoder)
        if autoencoded:
            replay = director.Replay(10**9)
            folder = pathlib.Path(args.run, "replay", agent.resumed_from["run_id"])
            replay.load(folder, agent.resumed_from["episodes"])
    except (director.UserError, ImportError) as error:
        parser.exit(2, f"{parser.prog}: {error}\n")
    does_the_manager_lead(agent)
    if autoencoded:
        does_the_worker_reach(agent, replay)


if __name__ == "__main__":  # environments may start processes
    main()
