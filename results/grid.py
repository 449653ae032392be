"""Compares the variants on Grid-v0, each beside the same agent with its idea disconnected.

    python results/grid.py --seeds 0 1 2 [--only feudal higl] [--out grid.jsonl]
    python results/grid.py --planner
    python results/grid.py --time_steps

All agents have the same networks, batches and learning rates, and make 900 gradient steps on a grid
of 6 by 6 cells (envs/grid.py), except where AGENTS says otherwise. The program writes a line of
JSON per run to --out, with the mean return of the last 24 episodes and measurements that show
whether the agent's idea is at work. It skips runs that --out already has (but not with --planner).
A run takes half a minute to a quarter of an hour on one core.

With --planner, Director, the flat agent and disagreement stop after 100, 200 and 400 gradient
steps, and play ten episodes with their actors and with each kind of search. With --time_steps, it
prints milliseconds of a train step; all agents take turns.

results/grid.jsonl holds the rows that variants/README.md shows.
"""

import argparse
import contextlib
import itertools
import json
import pathlib
import sys
import tempfile
import time
from collections.abc import Iterator

import numpy as np
import torch
from gymnasium import spaces

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
import director
from director import Director
from envs.grid import Grid
from envs.wrappers import IMAGE
from variants import (
    diayn,
    disagreement,
    dreamer_v3,
    dyna_q,
    feudal,
    gaussian,
    hac,
    hdreamer,
    higl,
    hindsight,
    options,
    pets,
    planner,
    prioritized,
    same_episode,
)

FLAGS = [
    "--task=gym_envs.grid:Grid-v0", "--device=cpu", "--precision=float32", "--size=xs",
    "--units=32", "--deter=32", "--hidden=32", "--stoch=4", "--classes=4",
    "--learning_rate=2e-3", "--prefill=1000", "--train_every=8", "--kl_target=3.5",
    "--standardize=no"]
TRAJECTORIES = ["--horizon=8", "--goal_duration=4"]  # dyna_q imagines none
CODES = ["--skill_groups=4", "--skill_classes=4"]  # of agents that have Director's codes
WITHOUT_CODES = (higl.Agent, diayn.Agent, options.Agent, dyna_q.Agent)
PREFILL, TRAIN_EVERY = 1000, 8  # as in FLAGS
BATCHES, BATCH, LENGTH = 8, 8, 32  # measurements are means over 8 replay batches of 8x32 steps


# ---- Agents whose idea is disconnected ------------------------------------------------------


def without_reward(agent: type, player: str = "worker", reward: str = "reward_goal") -> type:
    """The same agent, whose worker (or another player) receives no reward for its goals."""
    class WithoutReward(agent):
        def player_trajectories(self, traj):
            trajectories = super().player_trajectories(traj)
            trajectories[player][reward] = 0 * trajectories[player][reward]
            return trajectories
    return WithoutReward


def frozen(part: str, agent: type = Director) -> type:
    """The same agent, with one optimizer that never moves its parameters."""
    class Frozen(agent):
        def __init__(self, *args):
            super().__init__(*args)
            self.optimizers[part].minimize = lambda loss: loss.detach()
    return Frozen


class AnyPoint(higl.Codes):
    """Goals of higl that are not clipped to where codes can be."""

    def decode(self, skill):
        return skill


class NotClipped(higl.Agent):
    Goals = AnyPoint


class Uncorrected(hdreamer.Agent):
    """hdreamer, whose fine level learns nothing from observations: its posterior is its prior."""

    def build(self, action):
        super().build(action)
        correction = self.world_model.rssm.correction
        correction.forward = lambda x, forward=correction.forward: 0 * forward(x)


class ShuffledOptions(options.Agent):
    """The worker learns with the options of other trajectories, which are unrelated to its own."""

    def player_trajectories(self, traj):
        others = traj["option"].roll(traj["option"].shape[1] // 2, 1)
        return {"worker": {**traj, "option": others}}


def to_the_wall(action: int, axis: int, wall: int) -> options.HandWritten:
    """An option by hand that repeats a move until the player is at the wall (0 or 5) of an axis."""
    def place(obs):
        return cells_of(obs["state"])[:, axis]
    return options.HandWritten(
        starts=lambda obs: place(obs) != wall, ends=lambda obs: place(obs) == wall,
        policy=lambda obs: torch.full_like(place(obs), action))


class OptionsByHand(options.Agent):
    """Down, up, right or left until the wall, and to stay for one step.

    Best possible return: 53, since a player that goes to a wall first comes too late by 2 steps.
    """

    hand_written = (
        to_the_wall(1, 1, 5), to_the_wall(2, 1, 0), to_the_wall(3, 0, 5), to_the_wall(4, 0, 0),
        options.HandWritten(
            starts=lambda obs: cells_of(obs["state"])[:, 0] >= 0,
            ends=lambda obs: cells_of(obs["state"])[:, 0] >= 0,
            policy=lambda obs: torch.zeros_like(cells_of(obs["state"])[:, 0])))


class OneModel(pets.Agent):
    """pets without its ensemble: a score is the mean of as many samples of the world model."""

    imagine_step = planner.Agent.imagine_step


class OneMember(pets.Agent):
    """pets whose first member imagines all trajectories."""

    def build(self, action):
        super().build(action)
        for member in self.ensemble.members[1:]:
            member.forward = self.ensemble.members[0].forward


class OneSample(OneModel):
    """A score is one sample of the world model, as in `planner`."""

    score = planner.Agent.score


class ReplayedAgain(dyna_q.Agent):
    """Dyna-Q that learns from the replayed transitions again instead of from imagined ones."""

    def learn(self, index, steps):
        if index == 0:
            self.replayed = steps
        return super().learn(index, self.replayed)


TWO_LEVELS = ["--bottom_stoch=4", "--bottom_classes=4"]
FREE_NATS = ["--free_nats=1", "--kl_target=1"]  # the target of size xs again, which is not read
THREE_LEVELS = ["--horizon=32"]
CORRIDOR = ["--task=gym_envs.grid:Corridor-v0", "--steps=1900"]
LONG_CORRIDOR = ["--task=gym_envs.grid:LongCorridor-v0"]
FLAT = ["--agent=dreamer"]
TECHNIQUES = ("latents", "two_hot", "percentiles", "critic_ema", "rms_silu", "laprop")


def techniques(*names: str) -> list[str]:
    """Flags of dreamer_v3 with these techniques alone.

    --kl_target=1 is the value of size xs, which is not read with free bits. LaProp has 0.4 of the
    learning rate, as always there, and a shorter warm-up: a run has 900 gradient steps.
    """
    flags = [f"--{name}={'yes' if name in names else 'no'}" for name in TECHNIQUES]
    if "latents" in names:
        flags.append("--kl_target=1")
    if "laprop" in names:
        flags += ["--learning_rate=8e-4", "--warmup=50"]
    return flags


AGENTS = {  # name: agent, flags
    "director": (Director, []),
    "director, 8x4 latents": (Director, ["--stoch=8"]),
    "director, worker without reward": (without_reward(Director), []),
    "director, manager frozen": (frozen("manager/actor"), []),
    "director, model frozen": (frozen("world_model"), []),
    "flat": (Director, FLAT),
    "feudal": (feudal.Agent, []),
    "feudal, worker without reward": (without_reward(feudal.Agent), []),
    "feudal, dot": (feudal.Agent, ["--feudal_reward=dot"]),
    "higl": (higl.Agent, []),
    "higl, worker without reward": (without_reward(higl.Agent), []),
    "higl, not clipped": (NotClipped, []),
    "higl, contrastive": (higl.Agent, ["--higl_loss=contrastive"]),
    "diayn": (diayn.Agent, []),
    "diayn, worker without reward": (without_reward(diayn.Agent), []),
    "diayn for the task": (diayn.Agent, ["--skills_for=task"]),
    "hindsight": (hindsight.Agent, []),
    "hindsight, none": (hindsight.Agent, ["--her=0"]),
    "disagreement": (disagreement.Agent, []),
    "disagreement, flat": (disagreement.Agent, FLAT),
    "hdreamer": (hdreamer.Agent, TWO_LEVELS),
    "hdreamer, uncorrected": (Uncorrected, TWO_LEVELS),
    "hdreamer, free nats": (hdreamer.Agent, [*TWO_LEVELS, *FREE_NATS]),
    "gaussian": (gaussian.Agent, []),
    "dreamer_v3": (dreamer_v3.Agent, techniques(*TECHNIQUES)),
    "dreamer_v3, flat": (dreamer_v3.Agent, [*techniques(*TECHNIQUES), *FLAT]),
    **{f"dreamer_v3, {name}": (dreamer_v3.Agent, techniques(name)) for name in TECHNIQUES},
    "dreamer_v3, laprop, same rate": (dreamer_v3.Agent, [
        *techniques("laprop"), "--learning_rate=2e-3"]),
    "dreamer_v3, same rate": (dreamer_v3.Agent, [
        *techniques(*TECHNIQUES), "--learning_rate=2e-3"]),
    "options": (options.Agent, []),
    "options, plain": (options.Agent, ["--option_entropy=0", "--option_cost=0"]),
    "options, no cost": (options.Agent, ["--option_cost=0"]),
    "options, no entropy": (options.Agent, ["--option_entropy=0"]),
    "options, ends frozen": (frozen("worker/beta", options.Agent), []),
    "options, shuffled": (ShuffledOptions, []),
    "options, by hand": (OptionsByHand, ["--options=0"]),
    "options, by hand, plain": (
        OptionsByHand, ["--options=0", "--option_entropy=0"]),
    "options, by hand and learned": (OptionsByHand, []),
    "options, by hand and learned, plain": (
        OptionsByHand, ["--option_entropy=0", "--option_cost=0"]),
    "hac": (hac.Agent, THREE_LEVELS),
    "hac, hindsight": (hac.Agent, [*THREE_LEVELS, "--hindsight=1"]),
    "hac, worker without reward": (without_reward(hac.Agent), THREE_LEVELS),
    "hac, middle without reward": (
        without_reward(hac.Agent, "manager", "reward_reach"), THREE_LEVELS),
    "hac, top frozen": (frozen("top/actor", hac.Agent), THREE_LEVELS),
    "long corridor, director": (Director, LONG_CORRIDOR),
    "long corridor, flat": (Director, [*LONG_CORRIDOR, *FLAT]),
    "long corridor, hac": (hac.Agent, [*THREE_LEVELS, *LONG_CORRIDOR]),
    "long corridor, hac, hindsight": (
        hac.Agent, [*THREE_LEVELS, *LONG_CORRIDOR, "--hindsight=1"]),
    "dyna_q": (dyna_q.Agent, []),
    "dyna_q, no planning": (dyna_q.Agent, ["--planning=0"]),
    "dyna_q, replayed again": (ReplayedAgain, []),
    "dyna_q, discount 0.9": (dyna_q.Agent, ["--discount=0.9"]),
    "dyna_q, expand 3": (dyna_q.Agent, ["--expand=3"]),
    "dyna_q, expand 5": (dyna_q.Agent, ["--expand=5"]),
    "dyna_q, corridor": (dyna_q.Agent, CORRIDOR),
    "dyna_q, corridor, no planning": (dyna_q.Agent, [*CORRIDOR, "--planning=0"]),
    "dyna_q, corridor, replayed again": (ReplayedAgain, CORRIDOR),
    "prioritized": (prioritized.Agent, []),
}
HALF_WORLDS = [f"half world, {target}" for target in ("stoch", "embed", "deter")]
RARE = {  # name: agent, flags; see `learn_rare_states`
    "rare, uniform": (Director, []),
    "rare, prioritized": (prioritized.Agent, []),
    "rare, prioritized by visits": (prioritized.Agent, ["--priority_alpha=0"]),
    "rare, prioritized by errors": (prioritized.Agent, ["--priority_c=0"]),
}
ACTORS = (planner.Agent, ["--planner=none"])
SHOOTING = (planner.Agent, ["--planner=actions", "--rounds=1"])
CEM = (planner.Agent, ["--planner=actions"])
CEM_CODES = (planner.Agent, ["--planner=codes"])
TREE = (planner.Agent, ["--planner=mcts"])
SEARCHES = {  # trained agent: {search: agent that plays, flags}
    "director": {
        "none": ACTORS, "shooting": SHOOTING, "actions": CEM, "mcts": TREE, "codes": CEM_CODES},
    "flat": {"none": ACTORS, "shooting": SHOOTING, "actions": CEM, "mcts": TREE},
    "disagreement": {
        "none": (pets.Agent, ["--planner=none"]), "actions": (OneSample, []),
        "samples": (OneModel, []), "one member": (OneMember, []),
        "ensemble": (pets.Agent, []),
        "ensemble, cost 1": (pets.Agent, ["--disagreement_cost=1"])},
}
LOGGED = (  # metrics of a run that go into its row, the first and the last of them
    "goal_reward_last", "goal_reward_other", "goal_rank", "skill_right", "goal_rec", "manager_ent",
    "worker_ent", "manager_expl_reward", "worker_expl_reward", "kl", "coarse_kl", "fine_kl",
    "coarse_kl_free", "fine_kl_free", "state_loss", "reward_loss", "worker_option_length",
    "manager_extr_return_range", "manager_expl_return_range", "worker_goal_return_range",
    "worker_pick_ent", "reach_last", "reach_other", "top_ent", "top_extr_reward")


# ---- Runs, replays and states ---------------------------------------------------------------


def grid_flags(agent: type) -> list[str]:
    flags = list(FLAGS)
    if not issubclass(agent, dyna_q.Agent):
        flags += TRAJECTORIES
    if not issubclass(agent, WITHOUT_CODES):
        flags += CODES
    return flags


def train(folder: pathlib.Path, agent: type, flags: list[str]):
    """Train an agent in folder/run, with what it prints in folder/out.txt."""
    flags = [*grid_flags(agent), f"--logdir={folder}/run", *flags]
    with open(folder / "out.txt", "a") as file, contextlib.redirect_stdout(file):
        code = director.main(flags, agent)
    if code != 0:
        raise RuntimeError(f"training ended with code {code}: {(folder / 'out.txt').read_text()}")


def load_replay(folder: pathlib.Path, agent: Director) -> director.Replay:
    replay = director.Replay(10**6)
    resumed = agent.resumed_from
    replay.load(folder / "run/replay" / resumed["run_id"], resumed["episodes"])
    return replay


def filtered_states(agent: Director, replay: director.Replay) -> dict[str, torch.Tensor]:
    """A replay batch with its filtered states: [8, 32, ...]."""
    batch = agent.tensors(replay.sample(BATCH, LENGTH))
    with torch.no_grad():
        return {**batch, **agent.world_model.observe(batch)}


def cells_of(state) -> torch.Tensor:
    """The cell (x, y) in each observation of Grid: [..., 12] -> [..., 2]."""
    return torch.as_tensor(state).unflatten(-1, (2, 6)).argmax(-1)


def ranks(x: np.ndarray) -> np.ndarray:
    """Ranks of the numbers; equal numbers share their mean rank."""
    _, inverse, counts = np.unique(x, return_inverse=True, return_counts=True)
    return (counts.cumsum() - (counts - 1) / 2)[inverse]


def entropy(counts: np.ndarray) -> np.ndarray:
    """Entropy in nats of each row of counts: [rows, n] -> [rows]."""
    p = counts / counts.sum(-1, keepdims=True)
    return -(p * np.log(np.where(p > 0, p, 1))).sum(-1)


# ---- Is the idea at work? -------------------------------------------------------------------


def code_distances(agent: higl.Agent, replay: director.Replay) -> dict[str, float]:
    """What distances between the codes of states say about the grid (higl).

    moves: rank correlation with the number of moves between the cells. same_cell: mean distance
    between two visits to one cell, as a fraction of the mean distance. rank: fraction of states K
    steps after others that are nearer to a state than its own successor.
    """
    k = agent.config.goal_duration
    found = []
    for _ in range(BATCHES):
        states = filtered_states(agent, replay)
        with torch.no_grad():
            codes = agent.goals.encode(states["deter"])  # [B, T, D]

        # Successors against the states K steps after others.
        valid = same_episode(states["is_first"], k).flatten()
        distance = torch.cdist(codes[:, :-k].flatten(0, 1), codes[:, k:].flatten(0, 1))
        rank = (distance < distance.diagonal()[:, None]).float().mean(-1)[valid].mean()

        # All pairs of states.
        cells = cells_of(states["state"]).flatten(0, 1).float()
        codes = codes.flatten(0, 1)
        pairs = torch.ones(len(codes), len(codes)).triu(1).bool()
        moves = torch.cdist(cells, cells, p=1)[pairs].numpy()
        distance = torch.cdist(codes, codes)[pairs].numpy()
        correlation = np.corrcoef(ranks(moves), ranks(distance))[0, 1]
        found.append((correlation, distance[moves == 0].mean() / distance.mean(), float(rank)))
    moves, same_cell, rank = np.mean(found, 0).tolist()
    return {"moves": moves, "same_cell": same_cell, "rank": rank}


def end_entropies(agent: diayn.Agent, copies: int = 32, steps: int = 20) -> tuple[float, float]:
    """Entropy of the cell after 20 steps of 32 players (diayn).

    First for players with all skills mixed, then the mean over skills for players with one skill.
    """
    skills = agent.config.skills
    agent.sample_skill = lambda state: torch.eye(skills).repeat(copies, 1)
    with director.vector_envs(agent.config, skills * copies) as envs:
        driver = director.Driver(envs, 0)
        state = None
        for _ in range(steps):
            action, state = agent.policy(driver.rows, state)
            driver.step(action.numpy())
    cell = (cells_of(driver.rows["state"]) @ torch.tensor([6, 1])).numpy()
    by_skill = cell.reshape(copies, skills).T
    # As many players per row, so that both estimates have the same bias.
    mixed = np.random.default_rng(0).permutation(cell).reshape(by_skill.shape)
    return tuple(
        float(entropy(np.stack([np.bincount(row, minlength=36) for row in cells])).mean())
        for cells in (mixed, by_skill))


def option_differences(agent: options.Agent, replay: director.Replay) -> dict[str, float]:
    """How much options differ in replayed states.

    values: standard deviation of Q between options, as a fraction of that over states and options.
    actions: total variation between the action distributions of two learned options, 0 to 1; it is
    missing if there is no pair.
    """
    worker = agent.worker
    found = []
    for _ in range(BATCHES):
        states = filtered_states(agent, replay)
        state = torch.cat([states["deter"], states["stoch"]], -1).flatten(0, 1)  # [N, F]
        option = torch.eye(worker.count)[:, None].expand(-1, len(state), -1)
        with torch.no_grad():
            feat = torch.cat([state.expand(worker.count, -1, -1), option], -1)  # [options, N, F]
            probs = director.OneHot(worker.actor(feat[: worker.learned]), unimix=0.01).probs
            values = worker.critics["extr"](feat).mean
        variations = [(probs[i] - probs[j]).abs().sum(-1).mean() / 2
                      for i, j in itertools.combinations(range(worker.learned), 2)]
        row = {"values": values.std(0, correction=0).mean() / values.std()}
        if variations:
            row["actions"] = np.mean(variations)
        found.append(row)
    return {key: float(np.mean([row[key] for row in found])) for key in found[0]}


def option_use(agent: options.Agent, players: int = 32) -> dict:
    """How an agent uses its options in one episode of each of 32 players.

    length: 1 over the mean probability to end. same: mean number of steps until another option is
    active. fractions: of steps in which each option is active. used: exp of their entropy. return:
    of the agent. alone: the return of each option when it is the only one, and never ends.
    """
    count, choose = agent.worker.count, agent.choose

    def play() -> tuple[float, torch.Tensor, torch.Tensor]:
        """Mean return; the active option [T, players]; the probabilities to end [T, players]."""
        active, ends = [], []
        with director.vector_envs(agent.config, players) as envs:
            driver = director.Driver(envs, 0)
            state = None
            while not driver.rows["is_last"][0]:
                action, state = agent.policy(driver.rows, state)
                driver.step(action.numpy())
                active.append(state["option"].argmax(-1))
                ends.append(state.get("beta", torch.zeros(players)))
        return float(driver.score.mean()), torch.stack(active), torch.stack(ends)

    score, active, ends = play()
    fractions = active.flatten().bincount(minlength=count) / active.numel()
    changes = (active[1:] != active[:-1]).float().mean()
    alone = []
    for option in torch.eye(count):
        agent.choose = lambda state, steps, option=option: {"option": option.expand(players, -1)}
        alone.append(play()[0])
    agent.choose = choose
    return {"length": float(1 / ends[1:].mean()), "same": float(1 / changes.clamp(min=1e-3)),
            "fractions": fractions.tolist(),
            "used": float(torch.special.entr(fractions).sum().exp()), "return": score,
            "alone": alone}


def value_errors(agent: dyna_q.Agent, players: int = 32, steps: int = 1000) -> dict[str, float]:
    """How far Q(s, a) of greedy actions is from the return that they really obtain (dyna_q).

    Player i makes i random steps first, so that states differ, then it acts greedily. States i to
    59 are compared, those of an episode in training. Q does not count a time limit as an end, so
    the returns go on after step 60: the grid is played for 1000 steps without its limit. (With a
    discount of 0.99, the rewards that are still missing add less than 0.01.)

    absolute, signed: means of |Q - return| and of Q - return. value, return: means of Q and of the
    return. late_reward: mean reward per step after step 60, where training never was.
    """
    rng = np.random.default_rng(0)
    envs = [Grid() for _ in range(players)]
    obs = np.stack([env.reset()[0] for env in envs])
    state = None
    values, rewards, greedy = [], [], []
    for t in range(steps):
        action, state = agent.policy({"state": obs}, state, mode="eval")
        with torch.no_grad():
            q = director.symexp(agent.worker.q(agent.worker.feat(state)))
        greedy.append(np.arange(players) <= t)
        random_action = torch.eye(5)[rng.integers(5, size=players)]
        action = torch.where(torch.as_tensor(greedy[-1])[:, None], action, random_action)
        state["action"] = action
        values.append((q * action).sum(-1).numpy())
        indices = action.argmax(-1).tolist()
        found = [env.step(index) for env, index in zip(envs, indices, strict=True)]
        obs = np.stack([x[0] for x in found])
        rewards.append([x[1] for x in found])
    returns = np.zeros((steps + 1, players))
    for t in reversed(range(steps)):
        returns[t] = rewards[t] + agent.config.discount * returns[t + 1]
    compared = np.stack(greedy)[:60]
    value, ret = np.stack(values)[:60][compared], returns[:60][compared]
    return {"absolute": np.abs(value - ret).mean(), "signed": (value - ret).mean(),
            "value": float(value.mean()), "return": ret.mean(),
            "late_reward": np.mean(rewards[60:])}


def measuring_values(agent: type, found: list, every: int = 100) -> type:
    """The same agent, which appends to `found` its `value_errors` after each 100 gradient steps.

    One measurement at the end would say little: greedy actions change a lot between gradient steps.
    """
    class MeasuringValues(agent):
        def train_step(self, batch):
            metrics = super().train_step(batch)
            if self.grad_steps % every == 0:
                with torch.random.fork_rng():  # so that training goes on as without it
                    found.append(value_errors(self))
            return metrics
    return MeasuringValues


def random_top_goals(agent: hac.Agent, replay: director.Replay) -> dict[str, float]:
    """How close the middle level of hac comes to uniformly drawn goals of the top level.

    last: its reward at the last step of such a goal. other: the same with exchanged goals. (The
    goals that the top level chooses soon resemble each other, so exchanging them shows nothing.)
    """
    agent.top.dist = lambda feat: director.OneHot(
        torch.zeros(*feat.shape[:-1], *agent.top.action_shape))
    found = []
    for _ in range(BATCHES):
        states = filtered_states(agent, replay)
        starts = {key: states[key].flatten(0, 1) for key in ("deter", "stoch", "is_terminal")}
        with torch.no_grad():
            metrics = agent.train_imagined(agent.imagine(starts))
        found.append([float(metrics["reach_last"]), float(metrics["reach_other"])])
    last, other = np.mean(found, 0).tolist()
    return {"last": last, "other": other}


def reached_in_imagination(agent: Director, replay: director.Replay) -> dict[str, float]:
    """Fraction of goals that the worker, and that random actions, reach within K imagined steps.

    manager: goals that the manager chooses. replayed: states from 1 to K steps later in the replay.
    Goals that are reached at the start do not count.
    """
    k, dist = agent.config.goal_duration, agent.worker.dist
    threshold = getattr(agent.config, "reached", hindsight.Config.reached)

    def random_actions(feat: torch.Tensor) -> director.OneHot:
        return director.OneHot(torch.zeros(len(feat), 5))

    found = {}
    for _ in range(BATCHES):
        states = filtered_states(agent, replay)
        same = same_episode(states["is_first"], k).flatten()
        starts = {key: states[key][:, :-k].flatten(0, 1)[same]
                  for key in ("deter", "stoch", "is_terminal")}
        later = torch.arange(LENGTH - k) + torch.randint(1, k + 1, (BATCH, LENGTH - k))
        goal = states["deter"][torch.arange(BATCH)[:, None], later].flatten(0, 1)[same]
        for goals, given in (("manager", {}), ("replayed", {"goal": goal})):
            for actions, policy in (("worker", dist), ("random", random_actions)):
                agent.worker.dist = policy
                with torch.no_grad():
                    traj = agent.imagine({**starts, **given})
                near = director.max_cosine(traj["goal"][0], traj["deter"][: k + 1]) > threshold
                reached = near[1:].any(0)[~near[0]].float()
                found.setdefault(f"{goals}_{actions}", []).append(reached)
    agent.worker.dist = dist
    return {key: float(torch.cat(reached).mean()) for key, reached in found.items()}


def reached_in_grid(agent: Director, replay: director.Replay, players: int = 256) -> dict:
    """Fraction of cells that the worker, and that random actions, reach within K steps in the grid.

    After 30 random steps, the goal is a replayed state whose cell is from 1 to K moves away.
    """
    k, choose = agent.config.goal_duration, agent.choose
    pool = [filtered_states(agent, replay) for _ in range(4)]
    deter = torch.cat([states["deter"].flatten(0, 1) for states in pool])
    pool_cells = torch.cat([cells_of(states["state"]).flatten(0, 1) for states in pool])
    found = {}
    for actions in ("worker", "random"):
        rng = np.random.default_rng(0)
        with director.vector_envs(agent.config, players) as envs:
            driver = director.Driver(envs, 0)
            state = None
            for _ in range(30):
                _, state = agent.policy(driver.rows, state)
                state["action"] = torch.as_tensor(driver.random_action(), dtype=torch.float32)
                driver.step(state["action"].numpy())

            moves = (cells_of(driver.rows["state"])[:, None] - pool_cells).abs().sum(-1)
            near = ((moves > 0) & (moves <= k)).numpy()  # [players, pool]
            goals = [rng.choice(np.flatnonzero(row)) for row in near]
            agent.choose = lambda state, count, goals=goals: {"goal": deter[goals]}
            hit = torch.zeros(players, dtype=torch.bool)
            for _ in range(k):
                _, state = agent.policy(driver.rows, state)
                if actions == "random":
                    state["action"] = torch.as_tensor(driver.random_action(), dtype=torch.float32)
                driver.step(state["action"].numpy())
                hit |= (cells_of(driver.rows["state"]) == pool_cells[goals]).all(-1)
            agent.choose = choose
        found[f"grid_{actions}"] = float(hit.float().mean())
    return found


# ---- Experiments: each returns the row of a run ---------------------------------------------


def compare(name: str, seed: int) -> dict:
    """Train an agent on the grid and measure whether its idea is at work."""
    agent_class, flags = AGENTS[name]
    q_errors = []
    if name.startswith("dyna_q") and "corridor" not in name:
        agent_class = measuring_values(agent_class, q_errors)
    start = time.time()
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        train(folder, agent_class, ["--steps=8200", f"--seed={seed}", *flags])
        lines = [json.loads(line) for line in open(folder / "run/metrics.jsonl")]
        episodes = [(x["step"], x["episode/score"]) for x in lines if "episode/score" in x]
        logged = [x for x in lines if "train/model_loss" in x]
        scores = [score for _, score in episodes]
        row = {"agent": name, "seed": seed, "return": np.mean(scores[-24:]),
               "curve": [np.mean(part) for part in np.array_split(scores, 8)],
               "seconds": time.time() - start, "return_by": {}}
        for updates in (50, 100, 200, 400):  # mean return of training episodes until then
            last_step = PREFILL + TRAIN_EVERY * updates
            found = [score for step, score in episodes if PREFILL < step <= last_step]
            if found:
                row["return_by"][updates] = np.mean(found)
        for key in LOGGED:
            if f"train/{key}" in logged[-1]:
                row[key] = [logged[0][f"train/{key}"], logged[-1][f"train/{key}"]]
        if q_errors:
            row["q_error"] = {key: [x[key] for x in q_errors] for key in q_errors[0]}
        agent = director.load(folder / "run", agent_class)
        replay = load_replay(folder, agent)
        if name.startswith("higl"):
            row["distances"] = code_distances(agent, replay)
            agent.goals = agent.Goals(agent.config)
            row["distances_untrained"] = code_distances(agent, replay)
        if name.startswith("hac"):
            row["random_top_goals"] = random_top_goals(agent, replay)
        if name.startswith("hindsight") or name == "director":
            row["reaching"] = {
                **reached_in_imagination(agent, replay), **reached_in_grid(agent, replay)}
        if name.startswith("diayn"):
            row["end_entropy"], row["end_entropy_given_skill"] = end_entropies(agent)
        if name.startswith("options"):
            row["options"] = {**option_differences(agent, replay), **option_use(agent)}
            agent.worker = agent_class(agent.obs_space, agent.act_space, agent.config).worker
            row["options_untrained"] = option_differences(agent, replay)
            row["option_lengths"] = [x["train/worker_option_length"] for x in logged]
    return row


def add_walks(replay: director.Replay, half: int, amount: int, seed: int):
    """Add random walks of 32 steps that stay in one half of the grid, columns 0-2 or 3-5."""
    rng, env = np.random.default_rng(seed), Grid()
    for _ in range(amount):
        env.reset()
        env.cell = np.array([3 * half, 0]) + rng.integers((3, 6))
        action = 0
        for t in range(LENGTH + 1):
            replay.add({
                "state": np.eye(6, dtype=np.float32)[env.cell].flatten()[None],
                "action": np.eye(5, dtype=np.float32)[[action]] * (t > 0),
                "reward": np.zeros(1, np.float32), "is_first": np.array([t == 0]),
                "is_last": np.array([t == LENGTH]), "is_terminal": np.array([False])})
            action = int(rng.integers(5))
            before = env.cell
            env.step(action)
            if env.cell[0] // 3 != half:  # the middle of the grid is a wall: the player stays
                env.cell, action = before, 0


def make_agent(agent_class: type, flags: list[str], seed: int) -> Director:
    """An untrained agent for the grid."""
    flags = director.parse_args([*grid_flags(agent_class), *flags], agent_class.Config)
    config = agent_class.Config(**flags)
    torch.manual_seed(seed)
    obs_space = spaces.Dict({"state": Grid.observation_space})
    return agent_class(obs_space, Grid.action_space, config)


def disagree_on_halves(name: str, seed: int) -> dict:
    """Disagreement in both halves of the grid when an agent has trained in one of them only."""
    replays = [director.Replay(10**6, seed) for _ in range(2)]
    for half, replay in enumerate(replays):
        add_walks(replay, half, 40, seed)
    agent = make_agent(disagreement.Agent, [f"--disagreement_target={name.split()[-1]}"], seed)

    def measure(replay: director.Replay) -> float:
        means = []
        for _ in range(BATCHES):
            states = filtered_states(agent, replay)
            inputs = [states["deter"][:, :-1], states["stoch"][:, :-1], states["action"][:, 1:]]
            with torch.no_grad():
                values = agent.ensemble.disagreement(torch.cat(inputs, -1))
            means.append(float(values[same_episode(states["is_first"], 1)].mean()))
        return float(np.mean(means))

    row = {"agent": name, "seed": seed, "untrained_known": measure(replays[0]),
           "untrained_new": measure(replays[1])}
    for _ in range(300):
        agent.train_step(replays[0].sample(BATCH, LENGTH))
    return {**row, "known": measure(replays[0]), "new": measure(replays[1])}


def learn_rare_states(name: str, seed: int) -> dict:
    """How fast a world model learns what is new and rare in its replay.

    It learns from 40 walks in one half of the grid. After 100 gradient steps, 2 walks in the other
    half are added. errors: {gradient steps since then: [error in the new half, in the old one]};
    an error is the model's loss without the KL on 40 walks that it does not train on.
    """
    agent_class, flags = RARE[name]
    agent = make_agent(agent_class, [*FLAT, *flags], seed)
    agent.imagine = agent.player_trajectories = lambda _: {}  # only the world model learns
    replay = agent_class.Replay(10**6, seed)
    replay.agent = agent
    add_walks(replay, 0, 40, seed)
    tests = []
    for half in (1, 0):
        walks = director.Replay(10**6)
        add_walks(walks, half, 40, seed + 1000)
        episodes = list(walks.episodes.values())
        tests.append(agent.tensors({key: np.stack([episode[key] for episode in episodes])
                                    for key in episodes[0]}))

    def error(batch: dict) -> float:
        scale = agent.world_model.kl_adapt.scale
        before = scale.clone()
        with torch.no_grad():
            _, _, metrics = agent.world_model.loss(batch)
            scale.copy_(before)
        return float(sum(metrics[f"{key}_loss"] for key in ("state", "reward", "cont")))

    errors = {}
    for step in range(141):
        if step == 100:
            add_walks(replay, 1, 2, seed + 2000)
        if step - 100 in (0, 5, 10, 20, 40):
            errors[step - 100] = [error(batch) for batch in tests]
        agent.train_step(replay.sample(BATCH, LENGTH))
    return {"agent": name, "seed": seed, "errors": errors}


def search(name: str, seed: int) -> Iterator[dict]:
    """Returns of an agent that searches, after 100, 200 and 400 gradient steps; a row per search.

    Each row has the mean return of ten episodes and the CPU seconds per action in one environment.
    """
    trained, trained_flags = AGENTS[name]
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        for updates in (100, 200, 400):
            steps = PREFILL + TRAIN_EVERY * updates
            train(folder, trained, [*trained_flags, f"--seed={seed}", f"--steps={steps}"])
            for key, (agent_class, flags) in SEARCHES[name].items():
                flags = director.parse_args(flags, agent_class.Config)
                agent = director.load(folder / "run", agent_class, **flags)
                torch.manual_seed(seed)
                _, seconds = play_episodes(agent, 1)
                scores, _ = play_episodes(agent, 10)
                yield {"agent": f"{name}, {key}", "seed": seed, "updates": updates,
                       "return": scores.mean(), "seconds_per_action": seconds / 60}


def play_episodes(agent: Director, players: int) -> tuple[np.ndarray, float]:
    """One episode of each player, with the worker's most likely actions: returns, CPU seconds."""
    with director.vector_envs(agent.config, players) as envs:
        driver = director.Driver(envs, agent.config.seed)
        state, start = None, time.process_time()
        while not driver.rows["is_last"][0]:
            action, state = agent.policy(driver.rows, state, mode="eval")
            driver.step(action.numpy())
        return driver.score, time.process_time() - start


def time_train_steps(rounds: int = 15, size: str = "xs"):
    """Print milliseconds of train steps on images, which all agents make in turn."""
    rng = np.random.default_rng(0)
    names = ["director", "feudal", "higl", "diayn", "disagreement", "hindsight", "options", "hac",
             "prioritized", "hdreamer", "gaussian", "flat", "disagreement, flat", "dyna_q",
             "dreamer_v3", *(f"dreamer_v3, {name}" for name in TECHNIQUES)]
    for act_space in (spaces.Discrete(5), spaces.Box(-1, 1, (6,), np.float32)):
        discrete = isinstance(act_space, spaces.Discrete)
        actions = 5 if discrete else 6
        batch = {"image": rng.integers(0, 256, (BATCH, LENGTH, 64, 64, 3), np.uint8),
                 "action": np.eye(actions, dtype=np.float32)[
                     rng.integers(actions, size=(BATCH, LENGTH))],
                 "reward": rng.normal(size=(BATCH, LENGTH)).astype(np.float32)}
        for key in ("is_first", "is_last", "is_terminal"):
            batch[key] = np.zeros((BATCH, LENGTH), bool)
        agents = {}
        for name in names:
            if name == "dyna_q" and not discrete:
                continue  # it needs discrete actions
            agent_class, flags = AGENTS[name]
            flags = [] if name == "hdreamer" else flags  # its flags are for the grid
            flags = director.parse_args([*flags, f"--size={size}"], agent_class.Config)
            config = agent_class.Config(**{**flags, "device": "cpu"})
            obs_space = spaces.Dict({"image": IMAGE})
            agents[name] = agent_class(obs_space, act_space, config)
        times = np.zeros((rounds, len(agents)))
        for i, (j, agent) in itertools.product(range(rounds), enumerate(agents.values())):
            start = time.perf_counter()
            agent.train_step(batch)
            times[i, j] = time.perf_counter() - start
        times = times[rounds // 5 :]  # without the first, slower ones
        milliseconds = 1000 * np.median(times, 0)
        ratios = np.median(times / times[:, :1], 0)
        kind = "discrete" if discrete else "continuous"
        for name, each, ratio in zip(agents, milliseconds, ratios, strict=True):
            print(f"{kind:10} {name:20} {each:7.1f} ms {ratio:6.3f} of director's")


def rows(seeds: list[int], only: list[str], done: set) -> Iterator[dict]:
    """Make all runs that are asked for and are not done."""
    for seed, name in itertools.product(seeds, [*HALF_WORLDS, *RARE, *AGENTS]):
        if only and name not in only and name.split(",")[0] not in only:
            continue
        if (name, seed) in done:
            continue
        if name in AGENTS:
            yield compare(name, seed)
        elif name in RARE:
            yield learn_rare_states(name, seed)
        else:
            yield disagree_on_halves(name, seed)


def main(argv: list[str] | None = None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", nargs="+", default=[], metavar="AGENT",
                        help="some of: half world; rare; " + "; ".join(AGENTS) + "; with "
                        "--planner some of: " + "; ".join(SEARCHES))
    parser.add_argument("--out", type=pathlib.Path, default="grid.jsonl", help="rows to write")
    parser.add_argument("--planner", action="store_true", help="compare kinds of search instead")
    parser.add_argument("--time_steps", action="store_true", help="time train steps instead")
    args = parser.parse_args(argv)
    names = SEARCHES if args.planner else [*HALF_WORLDS, *RARE, *AGENTS]
    known = {*names, *(name.split(",")[0] for name in names)}
    for name in args.only:
        if name not in known:
            parser.error(f"--only: {name} is not one of: {'; '.join(names)}")
    if args.time_steps:
        time_train_steps()
        return
    if args.planner:
        found = itertools.chain.from_iterable(
            search(name, seed) for seed in args.seeds for name in args.only or SEARCHES)
    else:
        lines = args.out.read_text().splitlines() if args.out.exists() else []
        done = {(row["agent"], row["seed"]) for row in map(json.loads, lines)}
        found = rows(args.seeds, args.only, done)
    for row in found:
        with open(args.out, "a") as file:
            file.write(json.dumps(row) + "\n")
        print(json.dumps(row), flush=True)


if __name__ == "__main__":  # environments may start processes
    main()
