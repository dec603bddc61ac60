"""The shell: flags, files, threads, progress, tables. All effects of the project live here, but
for the ruled section of prompts.py that speaks HTTP.

    python run.py --episodes 50                 learn, then evaluate before and after
    python run.py --method reflexion            the same with another row of switches
    python run.py --show RUN                    one episode of a finished run, step by step

Results go to stdout, progress and errors to stderr. A run directory holds config.json (what
determines the result), episodes.jsonl, memory.json and summary.json. Running the same command
again gives the same bytes; a directory of another configuration is never written to.
Exit codes: 0 done, 2 a mistake in the input, 130 interrupted.
"""
from __future__ import annotations

import argparse
import hashlib
import inspect
import json
import os
import re
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from threading import Lock
from typing import Any, Callable, Iterable, Iterator, NamedTuple, Sequence

import numpy as np

import billp
import envs
import prompts
from billp import Agent, Catalog, Config, Trajectory

STAND_IN = ("offline (a rule-based stand-in: it shows the mechanism at work and is no evidence "
            "about real models)")
WORLD_FIELDS = ("window", "beta", "floor", "grace", "max_steps")
BOUNDS = {"gamma": (0, 1), "batch": (1, 10**6), "titles": (1, 1000), "window": (1, 1000),
          "max_steps": (1, 10**6), "max_tokens": (1, 10**6), "temperature": (0, 2),
          "retries": (0, 100), "workers": (1, 1000), "episodes": (0, 10**9), "users": (1, 10**9)}


class UserError(Exception):
    """A mistake that the person at the keyboard can mend; shown as one line, exit code 2."""


# ------------------------------------------------------------------------------------ flags


def knobs(record: type) -> dict[str, str]:
    """The reason that the comment beside each field with a default gives."""
    found = re.findall(r"^    (\w+): .*?= .*?# (.*)$", inspect.getsource(record), re.M)
    return {name: why for name, why in found if name in record._field_defaults}


def add_field(parser: Any, record: type, name: str, why: str) -> None:
    """One flag for one field; left out, the method's or world's own value stands."""
    default = record._field_defaults[name]
    flag, text = "--" + name.replace("_", "-"), f"{why} (default {default})".replace("%", "%%")
    if isinstance(default, bool):
        parser.add_argument(flag, action=argparse.BooleanOptionalAction, help=why)
    elif name == "lessons":
        parser.add_argument(flag, choices=("none", "latest", "nearest"), help=text)
    else:
        parser.add_argument(flag, type=type(default), metavar=type(default).__name__, help=text)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], allow_abbrev=False,
        epilog="The default model is " + STAND_IN + ".")
    parser.add_argument("--episodes", type=int, default=50, help="learning episodes (default 50)")
    parser.add_argument("--users", type=int, default=50, help="held-out users (default 50)")
    parser.add_argument("--method", default="billp", help=" ".join((*envs.POLICIES, *billp.METHODS)))
    parser.add_argument("--world", default="films", help="films")
    parser.add_argument("--seed", type=int, default=0, help="names every random draw (default 0)")
    parser.add_argument("--workers", type=int, default=1, help="episodes played at once")
    parser.add_argument("--out", type=Path, help="run directory (default: under runs/)")
    parser.add_argument("--load", type=Path, help="start from the memory.json of another run")
    parser.add_argument("--show", metavar="RUN", type=Path, help="print one episode of a run")
    parser.add_argument("--pick", default="", metavar="PHASE:N",
                        help="which one: learn, before or after, and its number (default: the last learnt)")
    method = parser.add_argument_group("method (default: the row of --method)")
    for name, why in knobs(Config).items():
        add_field(method, Config, name, why)
    world = parser.add_argument_group("world (default: the world's own)")
    for name, why in knobs(envs.Env).items():
        add_field(world, envs.Env, name, why)
    args = parser.parse_args(argv)
    for name, (low, high) in BOUNDS.items():
        value = getattr(args, name)
        if value is not None and not low <= value <= high:
            raise UserError(f"--{name.replace('_', '-')} is {value}; it must lie from {low} to {high}")
    return args


def chosen(args: argparse.Namespace, names: Iterable[str]) -> dict[str, Any]:
    """The flags among `names` that were given."""
    return {name: getattr(args, name) for name in names if getattr(args, name) is not None}


# --------------------------------------------------------------------------------- settings


class Settings(NamedTuple):
    """What determines a result, and nothing else: written to config.json."""
    world: str
    method: str
    model: str
    seed: int
    episodes: int
    users: int
    load: str                   # digest of the memory started from, "" for none
    config: dict[str, Any]      # of the method
    rule: dict[str, Any]        # the world's fields as far as they were set by flag


def settings(args: argparse.Namespace) -> Settings:
    if args.method not in billp.METHODS and args.method not in envs.POLICIES:
        raise UserError(f"no method {args.method!r}; there are "
                        + " ".join((*envs.POLICIES, *billp.METHODS)))
    row = billp.METHODS.get(args.method, {})
    config = Config()._replace(**row)._replace(**chosen(args, Config._fields))
    load = hashlib.sha256(read(args.load).encode()).hexdigest()[:16] if args.load else ""
    return Settings(args.world, args.method, "offline", args.seed, args.episodes, args.users, load,
                    config._asdict(), chosen(args, WORLD_FIELDS))


def build_world(wanted: Settings) -> envs.Env:
    """The world a run asks for, with the run's own rule of leaving."""
    if wanted.world != "films":
        raise UserError(f"no world {wanted.world!r}; there is films")
    env = envs.films(wanted.seed)._replace(**wanted.rule)
    held_out = len(env.histories) - env.learners
    if wanted.episodes > env.learners and wanted.method in billp.METHODS:
        raise UserError(f"--episodes {wanted.episodes}: {wanted.world} has {env.learners} learning users")
    if wanted.users > held_out:
        raise UserError(f"--users {wanted.users}: {wanted.world} has {held_out} held-out users")
    return env


def choose_users(env: envs.Env, wanted: Settings) -> tuple[list[int], list[int]]:
    """Learning and held-out users in an order drawn from the seed; a longer list extends a shorter."""
    def draw(branch: int, users: np.ndarray) -> list[int]:
        sequence = np.random.SeedSequence(wanted.seed, spawn_key=(branch,))
        return np.random.default_rng(sequence).permutation(users).tolist()
    everyone = np.arange(len(env.histories))
    return (draw(0, everyone[:env.learners])[:wanted.episodes],
            draw(1, everyone[env.learners:])[:wanted.users])


# ------------------------------------------------------------------------------------ files


def read(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {getattr(error, 'strerror', None) or 'not UTF-8 text'}")


def write(path: Path, text: str) -> None:
    """Write, then rename: the file is whole or not there."""
    draft = path.with_name(path.name + ".part")
    draft.write_text(text, "utf-8")
    os.replace(draft, path)


def dumps(value: Any, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)


def run_directory(out: Path | None, wanted: Settings) -> Path:
    """The directory of this run, made if need be; refused when it holds anything else."""
    text = dumps(wanted._asdict(), 1) + "\n"
    name = f"{wanted.world.partition(':')[0]}-{wanted.method}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"
    path = out or Path("runs") / name
    try:
        path.mkdir(parents=True, exist_ok=True)
        held = path / "config.json"
        if not held.exists() and any(path.iterdir()):
            raise UserError(f"{path} is not empty and holds no run; choose another --out")
        if held.exists() and held.read_text("utf-8") != text:
            raise UserError(f"{path} holds a run of another configuration "
                            f"({differing(held, wanted)}); choose another --out")
        write(held, text)
    except OSError as error:
        raise UserError(f"cannot use {path} as run directory: {error.strerror}")
    return path


def differing(held: Path, wanted: Settings) -> str:
    """The names of the settings in which a config.json differs."""
    try:
        old, new = json.loads(held.read_text("utf-8")), wanted._asdict()
        flat_old, flat_new = ({**d, **d["config"], **d["rule"]} for d in (old, new))
        return ", ".join(k for k in flat_new if k not in ("config", "rule")
                         and flat_old.get(k) != flat_new[k]) or "other fields"
    except (ValueError, KeyError, TypeError):
        return "unreadable config.json"


def save_memory(agent: Agent) -> str:
    """The agent's memories as JSON lines within one object; vectors are made again on loading."""
    parts = [f'"{name}": [\n' + ",\n".join(map(dumps, billp.records(memory))) + "\n]"
             for name, memory in agent._asdict().items()]
    return '{"billp": 1, "embedding": "hashed_ngrams",\n' + ",\n".join(parts) + "}\n"


def load_memory(path: Path, embed: prompts.Embed) -> Agent:
    """The agent that `save_memory` wrote; each text is embedded once."""
    try:
        held = json.loads(read(path))
        assert held["billp"] == 1 and held["embedding"] == "hashed_ngrams"
        kinds = {"planner": str, "actor": int, "critic": (int, float)}
        rows = {name: [billp.Record(*row) for row in held[name]] for name in Agent._fields}
        assert all(isinstance(r.key, str) and isinstance(r.action, str) and isinstance(r.value, kinds[name])
                   for name in rows for r in rows[name])
    except (ValueError, KeyError, TypeError, AssertionError):
        raise UserError(f"{path} is not a memory.json of this program")
    texts = list(dict.fromkeys(record.key for records in rows.values() for record in records))
    vectors = dict(zip(texts, embed(texts)))
    chunk = {name: billp.Chunk(tuple(r), np.stack([vectors[x.key] for x in r]))
             for name, r in rows.items() if r}
    return Agent(**{name: (c,) for name, c in chunk.items()})


def describe(env: envs.Env, phase: str, trajectory: Trajectory) -> dict[str, Any]:
    """One episode as a line of episodes.jsonl: all that --show needs."""
    lesson, items = trajectory.lesson, [step.act.value for step in trajectory.steps]
    return {
        "phase": phase, "episode": trajectory.last.key[2], "user": trajectory.user,
        "history": trajectory.last.history,
        "steps": [{"lessons": step.plan.recalled if step.plan else [],
                   "thought": step.plan.value if step.plan else "",
                   "experience": step.act.recalled, "said": step.act.said, "exact": step.act.exact,
                   "item": step.line, "reward": step.reward} for step in trajectory.steps],
        "left": envs.why_left(env, trajectory.user, items) if trajectory.terminated else "",
        "values": lesson and lesson.values, "advantages": lesson and lesson.advantages,
        "reflection": lesson.reflection if lesson else ""}


# --------------------------------------------------------------------------------- running


def counted(llm: prompts.LLM, tally: dict[str, list]) -> prompts.LLM:
    """The same model; calls and tokens are added up in `tally`, per role."""
    lock = Lock()

    def ask(question: prompts.Ask) -> prompts.Reply:
        reply = llm(question)
        with lock:
            row = tally.setdefault(question.role, [0, None, None, None])
            row[0] += 1
            for i, tokens in enumerate(reply.usage, 1):
                row[i] = row[i] if tokens is None else (row[i] or 0) + tokens
        return reply
    return ask


@contextmanager
def workers(count: int) -> Iterator[Callable]:
    """A map: the built-in one, or a thread pool's."""
    if count == 1:
        yield map
        return
    with ThreadPoolExecutor(count) as pool:
        try:
            yield pool.map
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def progress(batches: Iterable, total: int, size: int) -> Iterator:
    """The batches as they come, with a bar on stderr (tqdm) or a line each."""
    try:
        from tqdm import tqdm
        yield from tqdm(batches, "learning", total=-(-total // size), unit="batch", file=sys.stderr)
    except ImportError:
        for agent, trajectories in batches:
            yield agent, trajectories
            done = trajectories[-1].last.key[2] + 1
            print(f"learning: {done} of {total} episodes, mean Len "
                  f"{mean_length(trajectories):.1f}", file=sys.stderr)


def mean_length(trajectories: Sequence[Trajectory]) -> float:
    return float(np.mean([billp.score(t)[0] for t in trajectories]))


class Outcome(NamedTuple):
    """What a run gives: the episodes of each phase and the agent it ended with."""
    before: np.ndarray          # scores [1, users, 2] of the held-out users
    after: np.ndarray
    agent: Agent = Agent()
    learning: tuple[float, ...] = ()
    episodes: dict[str, tuple[Trajectory, ...]] = {}


def learn(wanted: Settings, env: envs.Env, agent: Agent, llm: prompts.LLM, map: Callable) -> Outcome:
    """Evaluate, learn, evaluate the same users again."""
    config, catalog = Config(**wanted.config), billp.catalog(env)
    learners, held_out = choose_users(env, wanted)

    def evaluate(agent: Agent, phase: str) -> tuple[Trajectory, ...]:
        return billp.evaluate(catalog, held_out, agent, llm, wanted.seed, phase, config, map)
    before, learnt, lengths = evaluate(agent, "before"), (), ()
    batches = billp.train(catalog, learners, llm, wanted.seed, agent, config, map)
    for agent, trajectories in progress(batches, len(learners), config.batch):
        learnt += trajectories
        lengths += (mean_length(trajectories),)
    after = evaluate(agent, "after")
    first, last = (envs.scores(*zip(*(billp.score(t) for t in ts))) for ts in (before, after))
    return Outcome(first, last, agent, lengths, {"before": before, "learn": learnt, "after": after})


def roll(wanted: Settings, env: envs.Env) -> Outcome:
    """The same flow for a policy that sees the numbers and learns nothing."""
    rng = np.random.default_rng(np.random.SeedSequence(wanted.seed, spawn_key=(2,)))
    users = np.array(choose_users(env, wanted)[1])
    played = envs.rollout(env, users, envs.POLICIES[wanted.method], rng)
    after = envs.scores((played.items >= 0).sum(1), played.rewards.sum(1))
    return Outcome(after, after)


def summarize(wanted: Settings, outcome: Outcome, tally: dict[str, list], seconds: float) -> dict:
    """summary.json, the contract that scripts read."""
    everything = [t for ts in outcome.episodes.values() for t in ts]
    acts = [step.act for t in everything for step in t.steps]
    answers = acts + [step.plan for t in everything for step in t.steps if step.plan] + [
        answer for t in everything if t.lesson for answer in t.lesson.answers]
    columns = ("calls", "prompt", "cached", "completion")
    return {**{k: v for k, v in wanted._asdict().items() if k != "rule"},
            "config": {**wanted.config, **wanted.rule}, "learning": outcome.learning,
            "before": envs.metrics(outcome.before), "after": envs.metrics(outcome.after),
            "difference": envs.metrics(outcome.after, outcome.before),
            "reflections": len(billp.records(outcome.agent.planner)),
            "malformed": sum(a.malformed for a in answers), "fallbacks": sum(a.fallback for a in answers),
            "ungrounded": round(float(np.mean([not a.exact for a in acts])), 4) if acts else 0.0,
            "calls": {role: dict(zip(columns, tally.get(role, [0, None, None, None])))
                      for role in ("planner", "actor", "critic", "reflector")},
            "seconds": round(seconds, 2)}


def run(args: argparse.Namespace) -> None:
    """The default flow: learn, evaluate, write the run directory, print the results."""
    began, wanted, tally = time.perf_counter(), settings(args), {}
    env = build_world(wanted)
    agent = load_memory(args.load, prompts.hashed_ngrams) if args.load else Agent()
    path = run_directory(args.out, wanted)
    if wanted.method in envs.POLICIES:
        outcome = roll(wanted, env)
    else:
        with workers(args.workers) as pool_map:
            outcome = learn(wanted, env, agent, counted(prompts.offline, tally), pool_map)
    lines = [dumps(describe(env, phase, t)) + "\n" for phase, ts in outcome.episodes.items() for t in ts]
    summary = summarize(wanted, outcome, tally, time.perf_counter() - began)
    write(path / "episodes.jsonl", "".join(lines))
    write(path / "memory.json", save_memory(outcome.agent))
    write(path / "summary.json", dumps(summary, 1) + "\n")
    print(report(summary, [r.value for r in billp.records(outcome.agent.planner)[-2:]]))
    print(f"run       {path}")


# ---------------------------------------------------------------------------------- tables


def report(summary: dict[str, Any], reflections: Sequence[str]) -> str:
    """The results as a person reads them, from summary.json."""
    s = summary
    model = STAND_IN if s["model"] == "offline" else s["model"]
    lines = [f"{s['method']} on {s['world']}, {s['episodes']} learning episodes, then {s['users']} "
             f"held-out users, seed {s['seed']}", f"model     {model}", "",
             f"{'':10}" + "".join(f"{name + ', 95 %':>24}" for name in envs.METRICS)]
    for row in ("before", "after", "difference"):
        cells = (f"{mean:.2f} [{low:.2f}, {high:.2f}]" for mean, low, high in s[row].values())
        lines.append(f"{row:10}" + "".join(f"{cell:>24}" for cell in cells))
    lines.append("")
    if s["learning"]:
        lines.append(f"learning  {sparkline(s['learning'])}  mean Len a batch, "
                     f"{min(s['learning']):.1f} to {max(s['learning']):.1f}")
    lines += [f"lesson    {text}" for text in reflections]
    lines += [f"{role:10}{c['calls']} calls, tokens: prompt {c['prompt'] or '?'}, cached "
              f"{c['cached'] or '?'}, completion {c['completion'] or '?'}"
              for role, c in s["calls"].items() if c["calls"]]
    if s["calls"]["actor"]["calls"]:
        lines.append(f"replies   malformed {s['malformed']}, fallbacks {s['fallbacks']}, "
                     f"actions that named no item {s['ungrounded']:.0%}")
    return "\n".join(lines + [f"seconds   {s['seconds']}"])


def sparkline(numbers: Sequence[float]) -> str:
    """The numbers as bars.

    >>> sparkline([0, 1, 2])
    '▁▄█'
    """
    top = max(numbers) or 1
    return "".join("▁▂▃▄▅▆▇█"[int(7 * number / top)] for number in numbers)


def show(path: Path, pick: str) -> None:
    """Print one episode of a finished run, as a person would follow it."""
    try:
        episodes = [json.loads(line) for line in read(path / "episodes.jsonl").splitlines()]
        phase, _, number = pick.partition(":")
        wanted = [e for e in episodes if (not phase or e["phase"] == phase)
                  and (not number or e["episode"] == int(number))]
        learnt = [e for e in wanted if e["phase"] == "learn"]
        print(story((learnt or wanted)[-1]))
    except (ValueError, KeyError, IndexError, TypeError):
        raise UserError(f"{path} holds no episode {pick or 'at all'}")


def story(e: dict[str, Any]) -> str:
    """An episode in words: what was recalled, thought, done, seen and learnt at each step."""
    lines = [f"{e['phase']} episode {e['episode']}, user {e['user']}", "", "liked before"]
    lines += [f"    {line}" for line in e["history"]]
    for n, step in enumerate(e["steps"]):
        left = n == len(e["steps"]) - 1 and e["left"]
        grounded = step["item"] if step["exact"] else f"{step['item']} (nearest item)"
        lines += ["", f"step {n + 1}"]
        lines += [f"    recalled    {lesson}" for lesson in step["lessons"]]
        lines += [f"    thought     {step['thought']}"] * bool(step["thought"])
        lines += [f"    {prompts.VERDICT[v]:12}{line}" for line, v in step["experience"][:5]]
        more = len(step["experience"]) - 5
        lines += [f"                and {more} more experiences"] * (more > 0)
        lines += [f"    said        {step['said']}", f"    item        {grounded}",
                  f"    reward      {step['reward']:g}" + (f", the user left: {left}" if left else "")]
        if e["advantages"]:
            lines.append(f"    value       {e['values'][n]:.2f}, advantage {e['advantages'][n]:+.2f}: "
                         f"{prompts.VERDICT[e['advantages'][n] >= 0]}")
    ended = "" if e["left"] else "\nthe user stayed to the last step"
    return "\n".join(lines) + ended + (f"\n\nreflection {e['reflection']}" if e["reflection"] else "")


def main(argv: Sequence[str] | None = None) -> int:
    try:
        args = parse(argv)
        show(args.show, args.pick) if args.show else run(args)
        return 0
    except UserError as error:
        print(f"run.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the same command starts it again", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
