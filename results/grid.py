"""Director's relatives on Grid-v0, beside themselves with their idea disconnected.

    python results/grid.py --seeds 0 1 2 [--only feudal higl] [--out grid.jsonl]

Each agent makes 900 gradient steps on a grid of 6 by 6 cells, all with the same networks, batches
and learning rates: a line of JSON for each, with the mean return of its last 24 episodes and its
tell-tales, first and last. An agent and a seed that --out has a line of are not run again. With
--planner, the agents of director.py are stopped after 100, 200 and 400 gradient steps, and play ten
episodes each with their actors and with each way to search. With --time_steps, train steps of all
take turns. On one core, a run takes about a minute.
"""

import argparse
import contextlib
import itertools
import json
import pathlib
import sys
import tempfile
import time

import numpy as np
import torch

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))
import director
from envs.grid import Grid
from variants import (
    diayn,
    disagreement,
    dyna_q,
    feudal,
    gaussian,
    hac,
    hdreamer,
    higl,
    hindsight,
    options,
    planner,
    prioritized,
    same_episode,
)

GRID = ["--task=gym_envs.grid:Grid-v0", "--processes=no", "--device=cpu", "--precision=float32",
        "--size=xs", "--units=32", "--deter=32", "--hidden=32", "--stoch=4", "--classes=4",
        "--skill_groups=4", "--skill_classes=4", "--horizon=8", "--goal_duration=4", "--learning_rate=2e-3",
        "--prefill=1000", "--train_every=8", "--kl_target=3.5", "--standardize=no"]
HAC, LONG = ["--horizon=32"], ["--task=gym_envs.grid:LongCorridor-v0"]


def unpaid(agent: type, player: str = "worker", reward: str = "reward_goal") -> type:
    """The same agent, whose worker (or another player) gets no reward for its goals."""
    class Unpaid(agent):
        def player_trajectories(self, traj):
            views = super().player_trajectories(traj)
            views[player][reward] = 0 * views[player][reward]
            return views
    return Unpaid


def frozen(part: str, agent: type = director.Director) -> type:
    """The same agent, of which a part never changes."""
    class Frozen(agent):
        def __init__(self, *args):
            super().__init__(*args)
            self.optimizers[part].minimize = lambda loss: loss.detach()
    return Frozen


class Uncorrected(hdreamer.Agent):
    """hdreamer, whose fine level never learns what it is for: its posterior is its prior."""

    def build(self, action):
        super().build(action)
        correction = self.world_model.rssm.correction
        correction.forward = lambda x, forward=correction.forward: 0 * forward(x)


class EndsFrozen(options.Agent):
    """Options end as they did at first: with a chance near a half, anywhere."""
    def build(self, action):
        super().build(action)
        self.worker.optimizers["end"].minimize = lambda loss: loss.detach()


class OptionsShuffled(options.Agent):
    """The worker learns under the options of other trajectories, which say nothing about these."""
    def player_trajectories(self, traj):
        return {"worker": {**traj, "option": traj["option"].roll(traj["option"].shape[1] // 2, 1)}}


class Again(dyna_q.Agent):
    """Dyna-Q that learns from the replayed transitions again in place of imagined ones."""

    def learn(self, index, steps):
        if index == 0:
            self.replayed = steps
        return super().learn(index, self.replayed)


CORRIDOR = ["--task=gym_Corridor-v0", "--steps=1900"]

AGENTS = {  # name: agent, flags
    "director": (director.Director, []),
    "director, 8x4 latents": (director.Director, ["--stoch=8"]),
    "director, worker unpaid": (unpaid(director.Director), []),
    "director, manager frozen": (frozen("manager/actor"), []),
    "director, model frozen": (frozen("world_model"), []),
    "flat": (director.Director, ["--agent=dreamer"]),
    "feudal": (feudal.Agent, []),
    "feudal, worker unpaid": (unpaid(feudal.Agent), []),
    "feudal, dot": (feudal.Agent, ["--feudal_reward=dot"]),
    "higl": (higl.Agent, []),
    "higl, worker unpaid": (unpaid(higl.Agent), []),
    "higl, contrastive": (higl.Agent, ["--higl_loss=contrastive"]),
    "diayn": (diayn.Agent, []),
    "diayn, worker unpaid": (unpaid(diayn.Agent), []),
    "diayn for the task": (diayn.Agent, ["--skills_for=task"]),
    "hindsight": (hindsight.Agent, []),
    "hindsight, none": (hindsight.Agent, ["--her=0"]),
    "disagreement": (disagreement.Agent, []),
    "disagreement, flat": (disagreement.Agent, ["--agent=dreamer"]),
    "hdreamer": (hdreamer.Agent, ["--bottom_stoch=4", "--bottom_classes=4"]),
    "hdreamer, uncorrected": (Uncorrected, ["--bottom_stoch=4", "--bottom_classes=4"]),
    "gaussian": (gaussian.Agent, []),
    "options": (options.Agent, []),
    "options, plain": (options.Agent, ["--option_entropy=0", "--option_cost=0"]),
    "options, no cost": (options.Agent, ["--option_cost=0"]),
    "options, no entropy": (options.Agent, ["--option_entropy=0"]),
    "options, ends frozen": (EndsFrozen, []),
    "options, shuffled": (OptionsShuffled, []),
    "hac": (hac.Agent, HAC),
    "hac, twice as long": (hac.Agent, [*HAC, "--steps=15400"]),
    "hac, hindsight": (hac.Agent, [*HAC, "--hindsight=1"]),
    "hac, worker unpaid": (unpaid(hac.Agent), HAC),
    "hac, middle unpaid": (unpaid(hac.Agent, "manager", "reward_reach"), HAC),
    "hac, top frozen": (frozen("top/actor", hac.Agent), HAC),
    "long corridor, director": (director.Director, LONG),
    "long corridor, flat": (director.Director, [*LONG, "--agent=dreamer"]),
    "long corridor, hac": (hac.Agent, [*HAC, *LONG]),
    "long corridor, hac, hindsight": (hac.Agent, [*HAC, *LONG, "--hindsight=1"]),
    "dyna_q": (dyna_q.Agent, []),
    "dyna_q, no planning": (dyna_q.Agent, ["--planning=0"]),
    "dyna_q, replayed again": (Again, []),
    "dyna_q, discount 0.9": (dyna_q.Agent, ["--discount=0.9"]),
    "dyna_q, corridor": (dyna_q.Agent, CORRIDOR),
    "dyna_q, corridor, no planning": (dyna_q.Agent, [*CORRIDOR, "--planning=0"]),
    "dyna_q, corridor, replayed again": (Again, CORRIDOR),
    "prioritized": (prioritized.Agent, []),
}
RARE = {  # name: agent, flags, of models that learn from a fixed replay
    "rare, uniform": (director.Director, []),
    "rare, prioritized": (prioritized.Agent, []),
    "rare, prioritized by visits": (prioritized.Agent, ["--priority_alpha=0"]),
    "rare, prioritized by errors": (prioritized.Agent, ["--priority_c=0"]),
}
TELL_TALES = ("goal_reward_last", "goal_reward_other", "goal_rank", "skill_right", "goal_rec",
              "manager_ent", "worker_ent", "manager_expl_reward", "worker_expl_reward",
              "kl", "coarse_kl", "fine_kl", "state_loss", "reward_loss",
              "worker_option_length", "worker_pick_ent",
              "reach_last", "reach_other", "top_ent", "top_extr_reward")


def run(logdir: str, agent: type, flags: list[str]):
    with open(pathlib.Path(logdir) / "out.txt", "a") as file, contextlib.redirect_stdout(file):
        code = director.main([*GRID, f"--logdir={logdir}/run", *flags], agent)
    assert code == 0, code


def states(agent: director.Director, replay: director.Replay) -> dict[str, torch.Tensor]:
    """Filtered states of 8 chunks of 32 steps, [B, T, ...], with the batch."""
    batch = agent.tensors(replay.sample(8, 32))
    with torch.no_grad():
        return {**batch, **agent.world_model.observe(batch)}


def replayed(logdir: str, agent: director.Director) -> director.Replay:
    replay = director.Replay(10**6)
    replay.load(pathlib.Path(logdir) / "run/replay", agent.resumed_from["episodes"])
    return replay


def ranks(x: np.ndarray) -> np.ndarray:
    """Ranks, equal values sharing their mean rank."""
    _, inverse, counts = np.unique(x, return_inverse=True, return_counts=True)
    return (counts.cumsum() - (counts - 1) / 2)[inverse]


def distances(agent: director.Director, replay: director.Replay) -> dict[str, float]:
    """What distances between codes say, over 8 batches of 8x32.

    moves: their rank correlation with numbers of moves between cells. same_cell: the mean of those
    between visits to one cell, as a share of all. rank: share of states K steps after others that
    are nearer to a state than its own successor is.
    """
    found, k = [], agent.config.goal_duration
    for _ in range(8):
        seen = states(agent, replay)
        cells = seen["state"].unflatten(-1, (2, 6)).argmax(-1).float()
        with torch.no_grad():
            codes = agent.goals.encode(seen["deter"])
        weight = same_episode(seen["is_first"], k).flatten()
        ways = torch.cdist(codes[:, :-k].flatten(0, 1), codes[:, k:].flatten(0, 1))
        rank = (ways < ways.diagonal()[:, None]).float().mean(-1)[weight].mean()
        codes, cells = codes.flatten(0, 1), cells.flatten(0, 1)
        moves, far = torch.cdist(cells, cells, p=1), torch.cdist(codes, codes)
        pairs = torch.ones_like(far).triu(1).bool()
        moves, far = moves[pairs].numpy(), far[pairs].numpy()
        correlation = np.corrcoef(ranks(moves), ranks(far))[0, 1]
        found.append((correlation, far[moves == 0].mean() / far.mean(), float(rank)))
    return dict(zip(("moves", "same_cell", "rank"), np.mean(found, 0).tolist(), strict=True))


def ends(agent: director.Director, copies: int = 32, steps: int = 20) -> tuple[float, float]:
    """Entropy of the cell after 20 steps in the grid: given 32 of all skills, 32 of one skill."""
    skills = agent.config.skills
    agent.pick = lambda state: torch.eye(skills).repeat(copies, 1)
    with director.vector_envs(agent.config, skills * copies) as envs:
        driver, state = director.Driver(envs, 0), None
        for _ in range(steps):
            action, state = agent.policy(driver.rows, state)
            driver.step(action.numpy())
    cell = driver.rows["state"].reshape(copies, skills, 2, 6).argmax(-1) @ [6, 1]
    counts = np.stack([np.bincount(x, minlength=36) for x in cell.T])  # [skills, cells]

    def entropy(p):
        p = p / p.sum(-1, keepdims=True)
        return -(p * np.log(np.where(p > 0, p, 1))).sum(-1)

    shuffled = np.random.default_rng(0).permutation(cell.flatten()).reshape(cell.T.shape)
    mixed = np.stack([np.bincount(x, minlength=36) for x in shuffled])  # as many a row, so unbiased
    return float(entropy(mixed).mean()), float(entropy(counts).mean())


def option_differences(agent: options.Agent, replay: director.Replay) -> dict[str, float]:
    """How much options differ in replayed states, over 8 batches of 8x32.

    values: the deviation of Q between options, as a share of that over states and options.
    actions: total variation between the actions' distributions of two options, 0 to 1.
    """
    count, found = agent.config.options, []
    for _ in range(8):
        seen = states(agent, replay)
        state = torch.cat([seen["deter"], seen["stoch"]], -1).flatten(0, 1)
        each = torch.eye(count)[:, None].expand(-1, len(state), -1)
        with torch.no_grad():
            feat = torch.cat([state.expand(count, -1, -1), each], -1)  # [W, N, F]
            probs = agent.worker.dist(feat).probs
            values = director.symexp(agent.worker.critics["extr"](feat))
        pairs = [(probs[i] - probs[j]).abs().sum(-1).mean() / 2
                 for i, j in itertools.combinations(range(count), 2)]
        found.append((values.std(0, correction=0).mean() / values.std(), np.mean(pairs)))
    return dict(zip(("values", "actions"), np.mean(found, 0).tolist(), strict=True))


def option_use(agent: options.Agent, copies: int = 32) -> dict:
    """One episode in each of 32 grids: how long options last, how many are used, what each earns.

    length: 1 over the mean chance to end. same: mean number of steps until another one is active.
    used: exp of the entropy of which option is active. alone: the return of each without others.
    """
    count, choose, scores = agent.config.options, agent.choose, []
    for only in (None, *torch.eye(count)):
        if only is not None:
            agent.choose = lambda state, steps, only=only: {"option": only.expand(copies, -1)}
        active, ends = [], []
        with director.vector_envs(agent.config, copies) as envs:
            driver, state = director.Driver(envs, 0), None
            while not driver.rows["is_last"][0]:
                action, state = agent.policy(driver.rows, state)
                driver.step(action.numpy())
                active.append(state["option"].argmax(-1))
                ends.append(state.get("beta"))
        scores.append(float(driver.score.mean()))
        if only is None:
            active, ends = torch.stack(active), torch.stack(ends)[1:]
            share = active.flatten().bincount(minlength=count) / active.numel()
            other = (active[1:] != active[:-1]).float().mean()
            use = {"length": float(1 / ends.mean()), "same": float(1 / other.clamp(min=1e-3)),
                   "used": float(torch.special.entr(share).sum().exp())}
    agent.choose = choose
    return {**use, "return": scores[0], "alone": scores[1:]}


def obeyed(agent: hac.Agent, replay: director.Replay) -> dict[str, float]:
    """What goals of the top's that are drawn uniformly pay the middle in the end, and others' do.

    The goals that it picks are soon alike, and exchanging like with like tells nothing.
    """
    agent.top.dist = lambda feat: director.OneHot(
        torch.zeros(*feat.shape[:-1], *agent.top.action))
    found = []
    for _ in range(8):
        starts = {key: value.flatten(0, 1) for key, value in states(agent, replay).items()
                  if key in ("deter", "stoch", "is_terminal")}
        with torch.no_grad():
            metrics = agent.train_imagined(agent.imagine(starts))
        found.append([float(metrics[f"reach_{key}"]) for key in ("last", "other")])
    return dict(zip(("last", "other"), np.mean(found, 0).tolist(), strict=True))


def half_walks(replay: director.Replay, side: int, amount: int, seed: int):
    """Add random walks of 32 steps in one half of the grid, each from some cell of it."""
    rng, env = np.random.default_rng(seed), Grid()
    for _ in range(amount):
        obs, _ = env.reset()
        env.cell = np.array([3 * side, 0]) + rng.integers((3, 6))
        action = 0
        for t in range(33):
            obs = np.eye(6, dtype=np.float32)[env.cell].flatten()
            row = {"state": obs, "action": np.eye(5, dtype=np.float32)[action] * (t > 0),
                   "reward": np.float32(0), "is_first": t == 0, "is_last": t == 32,
                   "is_terminal": False}
            replay.add({key: np.array(value)[None] for key, value in row.items()})
            action = int(rng.integers(5))
            before = env.cell
            env.step(action)
            if env.cell[0] // 3 != side:
                env.cell, action = before, 0  # a wall, as if it had stayed
def reaching(agent: director.Director, replay: director.Replay) -> dict[str, float]:
    """Shares of goals that are reached within K steps by the worker, and by random actions.

    manager: its goals, in imagination; seen: states from 1 to K steps later in replay, there, too,
    both of those that are not reached at the start. grid: in the grid itself, after 30 random
    steps, cells of replayed states that are from 1 to K moves away, the states being the goals.
    """
    k, dist, choose, found = agent.config.goal_duration, agent.worker.dist, agent.choose, {}
    limit = getattr(agent.config, "reached", hindsight.Config.reached)

    def random(feat):
        return director.OneHot(torch.zeros(len(feat), 5))

    for _ in range(8):
        seen = states(agent, replay)
        same = same_episode(seen["is_first"], k).flatten()
        starts = {key: seen[key][:, :-k].flatten(0, 1)[same] for key in (
            "deter", "stoch", "is_terminal")}
        later = torch.arange(32 - k) + torch.randint(1, k + 1, (8, 32 - k))
        goal = seen["deter"][torch.arange(8)[:, None], later].flatten(0, 1)[same]
        for name, more in (("manager", {}), ("seen", {"goal": goal})):
            for who, agent.worker.dist in (("worker", dist), ("random", random)):
                with torch.no_grad():
                    traj = agent.imagine({**starts, **more})
                near = director.max_cosine(traj["goal"][0], traj["deter"][: k + 1]) > limit
                found.setdefault(f"{name}_{who}", []).append(near[1:].any(0)[~near[0]].float())
    found, agent.worker.dist = {key: float(torch.cat(x).mean()) for key, x in found.items()}, dist

    pool = [states(agent, replay) for _ in range(4)]
    deter = torch.cat([x["deter"].flatten(0, 1) for x in pool])
    place = torch.cat([x["state"].flatten(0, 1) for x in pool]).unflatten(-1, (2, 6)).argmax(-1)
    for who in ("worker", "random"):
        agent.choose, rng = choose, np.random.default_rng(0)
        with director.vector_envs(agent.config, 256) as envs:
            driver, state, hit = director.Driver(envs, 0), None, False
            for t in range(30 + k):
                cell = torch.as_tensor(driver.rows["state"]).unflatten(-1, (2, 6)).argmax(-1)
                if t == 30:
                    moves = (cell[:, None] - place).abs().sum(-1)
                    near = ((moves > 0) & (moves <= k)).numpy()
                    goals = [rng.choice(np.flatnonzero(x)) for x in near]
                    agent.choose = lambda state, count: {"goal": deter[goals]}  # noqa: B023
                if t > 30:
                    hit = hit | (cell == place[goals]).all(-1)
                action, state = agent.policy(driver.rows, state)
                if t < 30 or who == "random":
                    action = torch.as_tensor(driver.random(), dtype=torch.float32)
                    state["action"] = action
                driver.step(action.numpy())
            cell = torch.as_tensor(driver.rows["state"]).unflatten(-1, (2, 6)).argmax(-1)
            found[f"grid_{who}"] = float((hit | (cell == place[goals]).all(-1)).float().mean())
    agent.choose = choose
    return found


def half_world(name: str, seed: int) -> dict:
    """Disagreement on both halves of the grid of an agent that has seen only the one."""
    replays = [director.Replay(10**6, seed) for _ in range(2)]
    for side in range(2):
        half_walks(replays[side], side, 40, seed)
    config = disagreement.Config(**director.parse_args(
        [*GRID, f"--disagreement_target={name.split()[-1]}"], disagreement.Config))
    torch.manual_seed(seed)
    agent = disagreement.Agent(
        director.spaces.Dict({"state": Grid.observation_space}), Grid.action_space, config)

    def look() -> list[float]:
        found = []
        for replay in replays:
            means = []
            for _ in range(8):
                seen = states(agent, replay)
                known = [seen["deter"][:, :-1], seen["stoch"][:, :-1], seen["action"][:, 1:]]
                with torch.no_grad():
                    new = agent.ensemble.disagreement(torch.cat(known, -1))
                means.append(float(new[same_episode(seen["is_first"], 1)].mean()))
            found.append(np.mean(means))
        return found

    untrained = look()
    for _ in range(300):
        agent.train_step(replays[0].sample(8, 32))
    known, new = look()
    return {"agent": name, "seed": seed, "untrained_known": untrained[0],
            "untrained_new": untrained[1], "known": known, "new": new}


def rare(name: str, seed: int) -> dict:
    """How fast a model learns of what is new and rare in its replay.

    It learns from 40 walks in the one half of the grid. After 100 gradient steps 2 walks in the
    other half arrive. errors: gradient steps since then, with the model's errors (its loss without
    the KL) on 40 other walks there, and on 40 in the old half.
    """
    agent, flags = RARE[name]
    config = agent.Config(**director.parse_args(
        [*GRID, "--agent=dreamer", *flags], agent.Config))
    torch.manual_seed(seed)
    made = agent(director.spaces.Dict({"state": Grid.observation_space}), Grid.action_space, config)
    made.imagine = made.player_trajectories = lambda _: {}  # the model alone learns
    replay, tests = agent.Replay(10**6, seed), []
    replay.agent = made
    half_walks(replay, 0, 40, seed)
    for side in (1, 0):
        other = director.Replay(10**6)
        half_walks(other, side, 40, seed + 1000)
        tests.append(made.tensors({key: np.stack([x[key] for x in other.episodes.values()])
                                   for key in other.episodes[0]}))

    def error(batch: dict) -> float:
        with torch.no_grad():
            before = made.world_model.kl_adapt.scale.clone()
            _, _, metrics = made.world_model.loss(batch)
            made.world_model.kl_adapt.scale.copy_(before)
        return float(sum(metrics[f"{key}_loss"] for key in ("state", "reward", "cont")))

    result = {"agent": name, "seed": seed, "errors": {}}
    for step in range(141):
        if step == 100:
            half_walks(replay, 1, 2, seed + 2000)
        if step - 100 in (0, 5, 10, 20, 40):
            result["errors"][step - 100] = [error(batch) for batch in tests]
        made.train_step(replay.sample(8, 32))
    return result


def relative(name: str, seed: int) -> dict:
    (agent, flags), start = AGENTS[name], time.time()
    with tempfile.TemporaryDirectory() as logdir:
        run(logdir, agent, ["--steps=8200", f"--seed={seed}", *flags])
        text = (pathlib.Path(logdir) / "run/metrics.jsonl").read_text()
        lines = [json.loads(x) for x in text.splitlines()]
        times, scores = zip(*[(x["step"], x["episode/score"]) for x in lines
                              if "episode/score" in x], strict=True)
        logged = [x for x in lines if "train/model_loss" in x]
        curve = np.array_split(scores, 8)  # from 1,000 steps to the next, about
        result = {"agent": name, "seed": seed, "return": np.mean(scores[-24:]),
                  "curve": [np.mean(part) for part in curve], "seconds": time.time() - start}
        result["return_by"] = {  # gradient steps: mean over all episodes that ended until then
            n: np.mean([score for step, score in zip(times, scores, strict=True)
                        if 1000 < step <= 1000 + 8 * n]) for n in (50, 100, 200, 400)}
        for key in TELL_TALES:
            if f"train/{key}" in logged[-1]:
                result[key] = [x[f"train/{key}"] for x in (logged[0], logged[-1])]
        made = director.load(f"{logdir}/run", agent)
        if name.startswith("higl"):
            replay, fresh = replayed(logdir, made), agent.Goals(made.config)
            result["distances"] = distances(made, replay)
            made.goals = fresh
            result["distances_untrained"] = distances(made, replay)
        if name.startswith("hac"):
            result["obeyed"] = obeyed(made, replayed(logdir, made))
        if name.startswith("hindsight") or name == "director":
            result["reaching"] = reaching(made, replayed(logdir, made))
        if name.startswith("diayn"):
            result["end_entropy"], result["end_entropy_given_skill"] = ends(made)
        if name.startswith("options"):
            replay = replayed(logdir, made)
            result["options"] = {**option_differences(made, replay), **option_use(made)}
            fresh = agent(made.obs_space, made.act_space, made.config)
            made.worker = fresh.worker
            result["options_untrained"] = option_differences(made, replay)
            result["option_lengths"] = [x["train/worker_option_length"] for x in logged]
    return result


def planners(name: str, seed: int):
    """Ten episodes with each way to search, of an agent after 100, 200 and 400 gradient steps."""
    ways = {"none": [], "shooting": ["--rounds=1"], "actions": [], "mcts": [], "codes": []}
    flags = AGENTS[name][1]
    with tempfile.TemporaryDirectory() as logdir:
        for updates in (100, 200, 400):
            steps = 1000 + 8 * updates
            run(logdir, director.Director, [*flags, f"--seed={seed}", f"--steps={steps}"])
            for way, more in ways.items():
                if (name, way) == ("flat", "codes"):
                    continue
                planner_flag = f"--planner={'actions' if way == 'shooting' else way}"
                agent = director.load(f"{logdir}/run", planner.Agent, **director.parse_args(
                    [planner_flag, *more], planner.Config))
                torch.manual_seed(seed)
                times = []
                for amount in (1, 10):  # the first for the time
                    with director.vector_envs(agent.config, amount) as envs:
                        driver, state, start = director.Driver(envs, seed), None, time.time()
                        while not driver.rows["is_last"][0]:
                            action, state = agent.policy(driver.rows, state, mode="eval")
                            driver.step(action.numpy())
                        times.append(time.time() - start)
                yield {"agent": f"{name}, {way}", "seed": seed, "updates": updates,
                       "return": driver.score.mean(), "seconds_per_action": times[0] / 60}


def speed(rounds: int = 15):
    """Milliseconds of a train step at xs, pixels, discrete and continuous; agents take turns."""
    names = ["director", "feudal", "higl", "diayn", "disagreement", "hindsight", "options", "hac",
             "prioritized", "hdreamer", "gaussian", "flat", "disagreement, flat", "dyna_q"]
    rng, space = np.random.default_rng(0), director.spaces.Dict({"image": director.IMAGE})
    for actions in (director.spaces.Discrete(5), director.spaces.Box(-1, 1, (6,), np.float32)):
        if isinstance(actions, director.spaces.Box):
            names.remove("dyna_q")  # which has none of these
        size = int(actions.n) if isinstance(actions, director.spaces.Discrete) else 6
        batch = {"image": rng.integers(0, 256, (8, 32, 64, 64, 3), np.uint8),
                 "action": np.eye(size, dtype=np.float32)[rng.integers(size, size=(8, 32))],
                 "reward": rng.normal(size=(8, 32)).astype(np.float32),
                 **{f"is_{x}": np.zeros((8, 32), bool) for x in ("first", "last", "terminal")}}
        agents = []
        for name in names:
            agent, flags = AGENTS[name]
            flags = [] if name == "hdreamer" else flags  # those are for the grid
            flags = director.parse_args(flags, agent.Config)
            config = agent.Config(size="xs", device="cpu", **flags)
            agents.append(agent(space, actions, config))
        times = np.zeros((rounds, len(names)))
        for i, (j, agent) in itertools.product(range(rounds), enumerate(agents)):
            start = time.perf_counter()
            agent.train_step(batch)
            times[i, j] = time.perf_counter() - start
        ratios = np.median(times[3:] / times[3:, :1], 0)
        for row in zip(names, 1000 * np.median(times[3:], 0), ratios, strict=True):
            print(f"{type(actions).__name__:9}", "{:20} {:7.1f} ms {:6.3f}".format(*row))


def main(seeds: list[int], only: list[str], out: str, planner: bool, time_steps: bool):
    if time_steps:
        return speed()
    path = pathlib.Path(out)
    done = [json.loads(x) for x in path.read_text().splitlines()] if path.exists() else []
    for seed in seeds:
        if planner:
            results = itertools.chain(planners("director", seed), planners("flat", seed))
        else:
            halves = [f"half world, {target}" for target in ("stoch", "embed", "deter")]
            names = [x for x in (*halves, *RARE, *AGENTS)
                     if not only or {x, x.split(",")[0]} & {*only}]
            names = [x for x in names if (x, seed) not in [(y["agent"], y["seed"]) for y in done]]
            results = ((relative if x in AGENTS else rare if x in RARE else half_world)(x, seed)
                       for x in names)
        for result in results:
            with open(path, "a") as file:
                file.write(json.dumps(result) + "\n")
            print(json.dumps(result), flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", nargs="+", default=[], metavar="AGENT",
                        help="some of: half world; rare; " + "; ".join(AGENTS))
    parser.add_argument("--out", default="relatives.jsonl")
    parser.add_argument("--planner", action="store_true", help="search, instead")
    parser.add_argument("--time_steps", action="store_true", help="time train steps, instead")
    main(**vars(parser.parse_args()))
