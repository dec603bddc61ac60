"""The shell: flags, files, threads, progress, tables.

    python run.py --episodes 50             learn; evaluate the same users before and after
    python run.py --method reflexion        the same with another row of switches
    python run.py --show RUN                one episode of a finished run, step by step

Every effect of the project is here, but for the part of prompts.py that speaks HTTP. Results go to
stdout, progress and errors to stderr. A run directory holds config.json (what determines the
result), calls.jsonl (a real model's answers), episodes.jsonl, memory.json and summary.json. The same
command again continues or repeats the run; a directory of another configuration is never touched.
Exit codes: 0 done, 2 a mistake that can be mended, 3 the budget is spent, 130 interrupted.
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
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager
from functools import lru_cache, partial
from pathlib import Path
from signal import SIG_IGN, SIGINT, signal
from threading import Event, Lock
from typing import Any, Callable, Iterable, Iterator, NamedTuple, Sequence

import numpy as np

import billp
import envs
import prompts
from billp import Agent, Config, Trajectory

STAND_IN = ("offline, a rule-based stand-in: it shows the mechanism at work and is no evidence about "
            "real models")
ROLES = ("planner", "actor", "critic", "reflector")
COLUMNS = ("calls", "prompt", "cached", "completion")
WORLDS = "films, synthetic:USERSxITEMS, movielens:DIR, steam:DIR, amazon:DIR"
WORLD_FIELDS = ("window", "beta", "floor", "grace", "max_steps")
MANY = 10**9
BOUNDS = {
    "gamma": (0, 1), "temperature": (0, 2), "tau_actor": (0, 4), "tau_critic": (0, 4), "timeout": (0.001, 10**6),
    "workers": (1, 1000), "seeds": (1, 1000), "titles": (1, 1000), "window": (1, 1000), "retries": (0, 100),
    **{name: (1, MANY) for name in ("users", "batch", "max_steps", "reply_tokens")},
    **{name: (0, MANY) for name in ("episodes", "k_lessons", "k_actions", "k_values", "beta", "floor", "grace",
                                    "max_calls", "max_tokens")}, "transcript": (1000, MANY)}
BUDGET, RL_BUDGET = 100, 100_000        # learning episodes of the paper: language models, RL
SIZES, WINDOWS = (10, 50, 100, 200), (1, 2, 4, 6, 8)
EXPERIMENTS = {                         # what each measures, and on which axes it is drawn
    "table3": ("R_traj", "reward an episode"), "table5": ("R_traj", "reward an episode"),
    "fig3": ("share", "share of recommendations", "popularity group of items (1: least popular fifth)"),
    "fig4": ("MSE", "mean squared error of the value", "learning episodes"),
    "fig5": ("R_traj", "reward an episode", "window W (items a user remembers)"),
    "table6": ("R_traj", "reward an episode"),
    "curve": ("R_traj", "reward an episode", "learning episodes")}


PAPER = {                               # R_traj on Steam and on Amazon-Book, as the paper reports it
    "billp": "69.19, 42.44", "reflexion": "57.42, 40.67", "billp-no-macro": "64.96, -",
    "billp-no-micro": "64.72, -"}
ORIENTATION = ("paper: R_traj on Steam and Amazon-Book with gpt-3.5-turbo; its worlds and models differ from "
               "these, the figures are for orientation only")


class UserError(Exception):
    """A mistake that the person at the keyboard can mend: one line, exit code 2."""


# ------------------------------------------------------------------------------------ flags

FLAGS: dict[str, dict[str, Any]] = {
    "--episodes": dict(type=int, help=f"learning episodes (default 50; {BUDGET} in experiments)"),
    "--users": dict(type=int, default=50, help="held-out users to evaluate on (default 50)"),
    "--method": dict(default="billp", help=" ".join((*envs.POLICIES, *billp.METHODS))),
    "--world": dict(default="films", help=WORLDS + " (default films)"),
    "--seed": dict(type=int, default=0, help="names every random draw (default 0)"),
    "--workers": dict(type=int, help="episodes played at once (default: 1 offline, else a batch)"),
    "--out": dict(type=Path, help="run directory (default: one of its own under runs/)"),
    "--load": dict(type=Path, help="start from another run's memory.json"),
    "--show": dict(type=Path, metavar="RUN", help="print one episode of a run"),
    "--pick": dict(default="", metavar="PHASE:N", help="which one: before, learn or after, and its number"),
    "--experiment": dict(choices=EXPERIMENTS, help="one of the paper's tables or figures, over --seeds"),
    "--seeds": dict(type=int, default=5, help="seeds of an experiment, from --seed on (default 5)"),
    "--rows": dict(metavar="A,B", help="only these rows of an experiment, as react,reflexion,billp"),
    "--models": dict(metavar="A,B", help="the models that table6 compares"),
    "--model": dict(help="model name, or offline (default: OPENAI_MODEL)"),
    "--base-url": dict(help="endpoint (default: OPENAI_BASE_URL; the key is read from OPENAI_API_KEY)"),
    "--embed-model": dict(help="embedding model (default: OPENAI_EMBED_MODEL, or character n-grams)"),
    "--timeout": dict(type=float, default=300.0, help="seconds for one answer (default 300)"),
    "--header": dict(action="append", default=[], metavar="K=V", help="one more request header"),
    "--extra-body": dict(default="{}", metavar="JSON", help="more fields for each request"),
    "--max-calls": dict(type=int, help="stop cleanly after so many live calls"),
    "--max-tokens": dict(type=int, help="stop cleanly after so many tokens"),
    "--replay": dict(action="store_true", help="answer from the run's log alone"),
    "--dry-run": dict(action="store_true", help="expected calls and tokens; sends nothing"),
}


def reasons(record: type) -> dict[str, str]:
    """The comment beside each field that has a default."""
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


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:      # argparse would print its whole usage first
        raise UserError(f"{message}; --help lists the flags")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(description="BiLLP learns, then is evaluated. The built-in model is " + STAND_IN,
                    allow_abbrev=False)
    for flag, how in FLAGS.items():
        parser.add_argument(flag, **how)
    for title, record in (("method (default: the row of --method)", Config),
                          ("world (default: the world's own)", envs.Env)):
        group = parser.add_argument_group(title)
        for name, why in reasons(record).items():
            add_field(group, record, name, why)
    args = parser.parse_args(argv)
    if args.episodes is None:
        args.episodes = BUDGET if args.experiment else 50
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
    embedding: str
    seed: int
    episodes: int
    users: int
    load: str                   # digest of the memory started from, "" for none
    extra: str                  # digest of --extra-body, "" for none
    config: dict[str, Any]      # of the method
    rule: dict[str, Any]        # the world's fields as far as flags set them


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def settings(args: argparse.Namespace) -> Settings:
    known = (*envs.POLICIES, *billp.METHODS)
    if args.method not in known:
        raise UserError(f"no method {args.method!r}; there are {' '.join(known)}")
    live = bool(args.base_url or variable("OPENAI_BASE_URL", "OPENAI_API_BASE", "OPENAI_API_KEY")
                or args.replay)
    model = args.model or (variable("OPENAI_MODEL") if live else "offline")
    if not model or (model != "offline" and not live):
        raise UserError("an endpoint and a model are needed: set OPENAI_BASE_URL and OPENAI_MODEL, "
                        "or give --base-url and --model; --model offline is the built-in reader")
    embedding = args.embed_model or (live and variable("OPENAI_EMBED_MODEL")) or "hashed_ngrams"
    config = Config()._replace(**billp.METHODS.get(args.method, {}))
    return Settings(args.world, args.method, model, embedding, args.seed, args.episodes,
                    args.users,
                    digest(read(args.load)) if args.load else "",
                    digest(args.extra_body) if args.extra_body != "{}" else "",
                    config._replace(**chosen(args, Config._fields))._asdict(),
                    chosen(args, WORLD_FIELDS))


def variable(*names: str) -> str:
    """The first of these environment variables that is set."""
    return next((os.environ[name] for name in names if os.environ.get(name)), "")


@lru_cache(4)
def load_world(name: str, seed: int) -> envs.Env:
    """A world by its name on the command line."""
    kind, _, rest = name.partition(":")
    size = re.fullmatch(r"(\d{1,9})x(\d{1,9})", rest)
    try:
        if name == "films":
            return envs.films(seed)
        if kind == "synthetic" and size and min(int(size[1]), int(size[2])) > 1:
            return envs.synthetic(int(size[1]), int(size[2]), seed)
        if kind == "movielens" and rest:
            return envs.movielens(rest, seed)
        if kind in ("steam", "amazon") and rest:
            return envs.released(rest, kind)
    except envs.BadData as error:
        raise UserError(str(error))
    raise UserError(f"no world {name!r}; there are {WORLDS}")


def build_world(wanted: Settings) -> envs.Env:
    """The world a run asks for, under the run's own rule of leaving."""
    env = load_world(wanted.world, wanted.seed)._replace(**wanted.rule)
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


dumps = partial(json.dumps, ensure_ascii=False)


def run_directory(out: Path | None, wanted: Settings, also: dict[str, Any] | None = None) -> Path:
    """The directory of this run, made if need be; refused if it holds anything else."""
    also = also or {}
    settings = {**wanted._asdict(), **also}
    text = dumps(settings, indent=1) + "\n"
    what = f"{wanted.world.partition(':')[0]}-{also.get('experiment', wanted.method)}"
    path = out or Path("runs") / f"{what}-{digest(text)[:8]}"
    held = path / "config.json"
    try:
        path.mkdir(parents=True, exist_ok=True)
        if not held.exists() and any(path.iterdir()):
            raise UserError(f"{path} is not empty and holds no run; choose another --out")
        if held.exists() and held.read_text("utf-8") != text:
            raise UserError(f"{path} holds a run of another configuration "
                            f"({differing(read(held), settings)}); choose another --out")
        write(held, text)
    except OSError as error:
        raise UserError(f"cannot use {path} as run directory: {error.strerror}")
    return path


def differing(held: str, wanted: dict[str, Any]) -> str:
    """The names of the settings in which a config.json differs."""
    try:
        old, new = ({**d, **d["config"], **d["rule"]} for d in (json.loads(held), wanted))
        return ", ".join(k for k in {**old, **new} if k not in ("config", "rule")
                         and old.get(k) != new.get(k))
    except (ValueError, KeyError, TypeError):
        return "config.json is damaged"


def save_memory(agent: Agent, embedding: str) -> str:
    """The memories as JSON, a record a line; vectors are left out and made again on loading."""
    parts = [f'"{name}": [\n' + ",\n".join(map(dumps, billp.records(memory))) + "\n]"
             for name, memory in agent._asdict().items()]
    return f'{{"billp": 1, "embedding": {dumps(embedding)},\n' + ",\n".join(parts) + "}\n"


def load_memory(path: Path, embedding: str) -> dict[str, list[billp.Record]]:
    """The records that `save_memory` wrote, per role; anything else is refused."""
    kinds = {"planner": str, "actor": int, "critic": (int, float)}
    try:
        held = json.loads(read(path))
        rows = {name: [billp.Record(*row) for row in held[name]] for name in kinds}
        if held["billp"] != 1 or not all(isinstance(r.key + r.action, str) and isinstance(
                r.value, kinds[name]) for name in kinds for r in rows[name]):
            raise ValueError
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{path} is not a memory.json of this program")
    if held["embedding"] != embedding:
        raise UserError(f"{path} was made with the embedding {held['embedding']}, not {embedding}")
    return rows


def embed_memory(rows: dict[str, list[billp.Record]], embed: prompts.Embed) -> Agent:
    """An agent from records; each text is embedded once."""
    texts = list(dict.fromkeys(record.key for held in rows.values() for record in held))
    vectors = dict(zip(texts, embed(texts))) if texts else {}
    return Agent(**{name: (billp.Chunk(tuple(held), np.stack([vectors[r.key] for r in held])),)
                    for name, held in rows.items() if held})


def describe(env: envs.Env, phase: str, t: Trajectory) -> dict[str, Any]:
    """One episode as a line of episodes.jsonl: all that --show needs."""
    steps = [{"lessons": s.plan.recalled if s.plan else (), "thought": s.plan.value if s.plan else "",
              "experience": s.act.recalled, "said": s.act.said, "exact": s.act.exact, "item": s.line,
              "reward": s.reward} for s in t.steps]
    left = envs.why_left(env, t.user, [s.act.value for s in t.steps]) if t.terminated else ""
    left = prompts.clean(left)          # it names titles, which are data
    values, advantages, _, reflection, _ = t.lesson or ((), (), (), "", ())
    return {"phase": phase, "episode": t.last.key[2], "user": t.user, "history": t.last.history,
            "steps": steps, "left": left, "values": values, "advantages": advantages,
            "reflection": reflection}


# ----------------------------------------------------------------------------------- models


def counted(llm: prompts.LLM, tally: dict[str, list], stop: Event) -> prompts.LLM:
    """The same model until `stop` is set; calls and tokens are added up in `tally`, per role."""
    lock = Lock()

    def ask(question: prompts.Ask) -> prompts.Reply:
        if stop.is_set():
            raise prompts.EndpointError("stopped")
        reply = llm(question)
        with lock:
            row = tally.setdefault(question.role, [0, None, None, None])
            for i, count in enumerate((1, *reply.usage)):
                row[i] = row[i] if count is None else (row[i] or 0) + count
        return reply
    return ask


def estimated(ask: prompts.Ask) -> prompts.Reply:
    """The offline reader, with the tokens that a model would be paid for: 4 characters each."""
    reply = prompts.offline(ask)
    sent = sum(len(text) for _, text in ask.messages)
    return reply._replace(usage=prompts.Usage(sent // 4, None, len(reply.text) // 4))


def json_object(text: str) -> dict[str, Any]:
    """What --extra-body holds; anything but a JSON object is a mistake."""
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise UserError("--extra-body takes a JSON object, such as '{\"top_p\": 0.9}'")
    return value


def connect(args: argparse.Namespace, wanted: Settings, path: Path, stats: dict,
            stop: Event) -> tuple[prompts.LLM, prompts.Embed]:
    """The model and the embedding of a run; those of an endpoint are recorded in its directory."""
    if wanted.model == "offline":
        return prompts.offline, prompts.hashed_ngrams
    url = args.base_url or variable("OPENAI_BASE_URL", "OPENAI_API_BASE") or "https://api.openai.com/v1"
    if not all("=" in header for header in args.header):
        raise UserError("--header takes NAME=VALUE")
    options = dict(key=variable("OPENAI_API_KEY"), timeout=args.timeout, notice=say,
                   extra=json_object(args.extra_body), stats=stats, sleep=stop.wait,
                   headers=dict(header.split("=", 1) for header in args.header))
    log = prompts.open_log(path / "calls.jsonl", [wanted.model, wanted.embedding, wanted.extra],
                           replay=args.replay, notice=say)
    live = prompts.limited(prompts.openai(url, wanted.model, **options), args.max_calls, args.max_tokens)
    embed = prompts.hashed_ngrams
    if wanted.embedding != "hashed_ngrams":
        embed = prompts.recorded_embed(prompts.embeddings(url, wanted.embedding, **options), log)
    return prompts.recorded(live, log), embed


def say(text: str) -> None:
    print(text, file=sys.stderr)


# ---------------------------------------------------------------------------------- running


@contextmanager
def workers(count: int, stop: Event) -> Iterator[Callable]:
    """A map: the built-in one, or a thread pool's. An error or Ctrl-C also stops what is under way."""
    if count == 1:
        yield map
        return
    pool = ThreadPoolExecutor(count)
    try:
        yield pool.map
    except prompts.BudgetSpent:         # what is under way is paid for: it is finished and recorded
        raise
    except BaseException:
        stop.set()
        raise
    finally:
        pool.shutdown(wait=not stop.is_set(), cancel_futures=True)


def progress(batches: Iterable, total: int, size: int) -> Iterator:
    """The batches as they come, with a bar on stderr (tqdm) or a line each."""
    try:
        from tqdm import tqdm
        yield from tqdm(batches, "learning", total=-(-total // size), unit="batch", file=sys.stderr)
    except ImportError:
        for agent, trajectories in batches:
            done = trajectories[-1].last.key[2] + 1
            print(f"learning: {done} of {total} episodes, mean Len "
                  f"{mean_length(trajectories):.1f}", file=sys.stderr)
            yield agent, trajectories


def mean_length(trajectories: Sequence[Trajectory]) -> float:
    return float(np.mean([billp.score(t)[0] for t in trajectories]))


class Outcome(NamedTuple):
    """What a run gives: scores [1, users, 2] of the held-out users, and how it came to them."""
    before: np.ndarray
    after: np.ndarray
    items: np.ndarray                   # int [users, steps]: recommended after learning, -1: over
    agent: Agent = billp.NOVICE
    learning: tuple[float, ...] = ()
    episodes: dict[str, tuple[Trajectory, ...]] = {}


def learn(wanted: Settings, env: envs.Env, agent: Agent, llm: prompts.LLM, embed: prompts.Embed,
          map: Callable, watch: Callable | None) -> Outcome:
    """Evaluate, learn, evaluate the same users again; unwatched, only learn and evaluate."""
    config, catalog = Config(**wanted.config), billp.catalog(env, embed)
    learners, held_out = choose_users(env, wanted)

    def evaluate(agent: Agent, phase: str) -> tuple[Trajectory, ...]:
        return billp.evaluate(catalog, held_out, agent, llm, wanted.seed, phase, config, map)
    before, learnt, lengths = evaluate(agent, "before") if watch else (), (), ()
    batches = billp.train(catalog, learners, llm, wanted.seed, agent, config, map)
    for agent, trajectories in watch(batches, len(learners), config.batch) if watch else batches:
        learnt += trajectories
        lengths += (mean_length(trajectories),)
    after = evaluate(agent, "after")
    first, last = (envs.scores(*zip(*map(billp.score, ts))) for ts in (before or after, after))
    items = np.full((len(after), env.max_steps), -1)
    for row, t in zip(items, after):
        row[:billp.score(t)[0]] = [step.act.value for step in t.steps][:billp.score(t)[0]]
    return Outcome(first, last, items, agent, lengths, {"before": before, "learn": learnt, "after": after})


def roll(wanted: Settings, env: envs.Env) -> Outcome:
    """The same flow for a policy that sees the numbers; only a2c learns."""
    users, scores = np.array(choose_users(env, wanted)[1]), []
    for episodes in (0, wanted.episodes):
        policy = envs.POLICIES[wanted.method](env, episodes, wanted.seed)
        rng = np.random.default_rng(np.random.SeedSequence(wanted.seed, spawn_key=(2,)))
        played = envs.rollout(env, users, policy, rng)
        scores.append(envs.scores((played.items >= 0).sum(1), played.rewards.sum(1)))
    return Outcome(*scores, played.items)


def summarize(wanted: Settings, outcome: Outcome, tally: dict[str, list], seconds: float) -> dict:
    """summary.json, the contract that scripts read."""
    everything = [t for ts in outcome.episodes.values() for t in ts]
    acts = [step.act for t in everything for step in t.steps]
    answers = acts + [step.plan for t in everything for step in t.steps if step.plan] + [
        answer for t in everything if t.lesson for answer in t.lesson.answers]
    return {**{k: v for k, v in wanted._asdict().items() if k != "rule"},
            "config": {**wanted.config, **wanted.rule}, "learning": outcome.learning,
            "before": envs.metrics(outcome.before), "after": envs.metrics(outcome.after),
            "difference": envs.metrics(outcome.after, outcome.before),
            "reflections": len(billp.records(outcome.agent.planner)),
            "malformed": sum(a.malformed for a in answers), "fallbacks": sum(a.fallback for a in answers),
            "ungrounded": round(float(np.mean([not a.exact for a in acts])), 4) if acts else 0.0,
            "calls": {role: dict(zip(COLUMNS, tally.get(role, (0, None, None, None)))) for role in ROLES},
            "seconds": round(seconds, 2)}


def perform(args: argparse.Namespace, wanted: Settings, models: tuple, tally: dict, stop: Event,
            watch: Callable | None = None) -> Outcome:
    """One run in memory: from a model to an outcome."""
    env, (llm, embed) = build_world(wanted), models
    if wanted.method in envs.POLICIES:
        return roll(wanted, env)
    rows = load_memory(args.load, wanted.embedding) if args.load else {}
    with workers(args.workers or (1 if wanted.model == "offline" else wanted.config["batch"]), stop) as map:
        return learn(wanted, env, embed_memory(rows, embed), counted(llm, tally, stop), embed, map, watch)


def run(args: argparse.Namespace, tally: dict[str, list]) -> None:
    """The default flow: learn, evaluate, write the run directory, print the results."""
    began, wanted, stats, stop = time.perf_counter(), settings(args), {}, Event()
    env = build_world(wanted)
    if args.load:
        load_memory(args.load, wanted.embedding)        # a bad file is found before anything is made
    if args.dry_run:
        perform(args, wanted._replace(model="offline"), pretended(wanted), tally, stop, progress)
        print("\n".join([EXPECTED, *call_table(tally)]))
        return
    path = run_directory(args.out, wanted)
    outcome = perform(args, wanted, connect(args, wanted, path, stats, stop), tally, stop, progress)
    lines = [dumps(describe(env, phase, t)) + "\n" for phase, ts in outcome.episodes.items() for t in ts]
    summary = summarize(wanted, outcome, tally, time.perf_counter() - began)
    write(path / "episodes.jsonl", "".join(lines))
    write(path / "memory.json", save_memory(outcome.agent, wanted.embedding))
    write(path / "summary.json", dumps(summary, indent=1) + "\n")
    print(report(summary, env.about, [r.value for r in billp.records(outcome.agent.planner)[-2:]]))
    print(f"run       {path}")
    if stats:
        say(f"retries {len(stats.get('retries', ()))}, system {stats.get('system_fingerprint') or '?'}")


EXPECTED = "expected, by a run of the offline reader at 4 characters a token:"

# ----------------------------------------------------------------------------------- tables


def header_of(names: Iterable[str], width: int) -> str:
    return " " * width + "".join(f"{name + ' [95 %]':>24}" for name in names)


def row_of(label: str, figures: dict[str, Sequence[float]], width: int) -> str:
    """A table's line: each figure with its interval."""
    return f"{label:{width}}" + "".join(f"{f'{mean:.2f} [{low:.2f}, {high:.2f}]':>24}"
                                        for mean, low, high in figures.values())


def call_table(tally: dict[str, Sequence]) -> list[str]:
    """Calls and tokens per role; ? where the server does not say."""
    return [f"{role:10}{row[0]} calls, tokens: " + ", ".join(
        f"{name} {'?' if count is None else count}" for name, count in zip(COLUMNS[1:], row[1:]))
        for role, row in tally.items() if row[0]]


def model_named(model: str, method: str = "") -> str:
    """The model as tables name it: what is no language model never passes for one."""
    if method in envs.POLICIES:
        return "none: this policy sees the numbers"
    return STAND_IN if model == "offline" else model


def report(s: dict[str, Any], about: str, reflections: Sequence[str]) -> str:
    """The results as a person reads them, from summary.json."""
    lines = [f"{s['method']} on {s['world']}, seed {s['seed']}: {s['episodes']} learning episodes, then "
             f"{s['users']} held-out users", *([f"world     {about}"] if about else []),
             f"model     {model_named(s['model'], s['method'])}", "", header_of(envs.METRICS, 10), *(row_of(row, s[row], 10) for row in ("before", "after", "difference")), ""]
    if s["learning"]:
        lines.append(f"learning  {sparkline(s['learning'])}  mean Len of each batch, "
                     f"{min(s['learning']):.1f} to {max(s['learning']):.1f}")
    lines += [f"lesson    {text}" for text in reflections]
    lines += call_table({role: tuple(row.values()) for role, row in s["calls"].items()})
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
    """Print one episode of a finished run: by default the last one learnt from."""
    phase, _, number = pick.partition(":")
    try:
        episodes = [json.loads(line) for line in read(path / "episodes.jsonl").splitlines()]
        wanted = [e for e in episodes if e["phase"] == (phase or "learn")
                  and e["episode"] == int(number or e["episode"])] or episodes * (not pick)
        print(story(wanted[-1]))
    except (ValueError, KeyError, IndexError, TypeError):
        raise UserError(f"{path} holds no episode {pick}".rstrip())


def story(e: dict[str, Any]) -> str:
    """An episode in words: what was recalled, thought, done, seen and learnt at each step."""
    lines = [f"{e['phase']} episode {e['episode']}, user {e['user']}", "", "liked before"]
    lines += [f"    {line}" for line in e["history"]]
    for n, step in enumerate(e["steps"]):
        more, left = len(step["experience"]) - 5, e["left"] if n == len(e["steps"]) - 1 else ""
        rows = [("recalled", lesson) for lesson in step["lessons"]] + [("thought", step["thought"])]
        rows += [(prompts.VERDICT[v], line) for line, v in step["experience"][:5]]
        rows += [("", f"and {more} more experiences" if more > 0 else ""), ("said", step["said"]),
                 ("item", step["item"] + " (the nearest; no title was named)" * (not step["exact"])),
                 ("reward", f"{step['reward']:g}" + (f", the user left: {left}" if left else ""))]
        if e["advantages"]:
            a = e["advantages"][n]
            rows.append(("value", f"{e['values'][n]:.2f}, advantage {a:+.2f}: {prompts.VERDICT[a >= 0]}"))
        lines += ["", f"step {n + 1}"] + [f"    {label:12}{text}" for label, text in rows if text]
    lines += [] if e["left"] else ["", "the user stayed to the last step"]
    return "\n".join(lines + (["", f"reflection  {e['reflection']}"] if e["reflection"] else []))


# -------------------------------------------------------------------------------- experiments

class Cell(NamedTuple):
    """One run of an experiment, repeated over seeds."""
    series: str
    x: Any                      # its place on the horizontal axis, None in a plain table
    changes: dict[str, Any]     # of the settings; those of `rule` and `config` are merged


def by_method(*methods: str) -> list[Cell]:
    return [Cell(method, None, {"method": method}) for method in methods]


def cells(name: str, models: Sequence[str]) -> list[Cell]:
    """The experiments of the paper, each a table of runs over one and the same path."""
    def rl(episodes: int) -> Cell:
        return Cell(f"a2c, {episodes:,}", None, {"method": "a2c", "episodes": episodes})
    return {
        "table3": [*by_method("random", "popular", "greedy", "a2c"), rl(RL_BUDGET),
                   *by_method("act", "react", "reflexion", "billp", "oracle")],
        "table5": by_method("billp-no-macro", "billp-no-micro", "billp-no-critic", "billp"),
        "fig3": [*by_method("billp"), rl(RL_BUDGET // 10)],     # a tenth already gives the picture
        "fig4": [Cell("billp", size, {"episodes": size}) for size in SIZES],
        "fig5": [Cell(method, width, {"method": method, "rule": {"window": width}})
                 for method in ("react", "a2c", "reflexion", "billp") for width in WINDOWS],
        "table6": [Cell(model, None, {"model": model}) for model in models],
        "curve": [Cell(method, size, {"method": method, "episodes": size})
                  for method in ("a2c", "billp") for size in (0, *SIZES[:1], 20, *SIZES[1:])]}[name]


def change(base: Settings, cell: Cell, seed: int) -> Settings:
    """The settings of one cell for one seed."""
    wanted = base._replace(seed=seed)._replace(**cell.changes)
    config = {**base.config, **billp.METHODS.get(wanted.method, {})}
    idle = config["lessons"] == "none" and not config["experience"]         # nothing to learn
    return wanted._replace(rule={**base.rule, **wanted.rule}, config=config,
                           episodes=0 if idle else wanted.episodes)


def run_cell(args: argparse.Namespace, name: str, models_for: Callable, job: tuple[Cell, Settings]) -> dict:
    """One cell for one seed: the default run, and what this experiment reads off it."""
    (cell, wanted), began, tally = job, time.perf_counter(), {}
    models = models_for(wanted)
    outcome = perform(args, wanted, models, tally, Event())
    summary, env = summarize(wanted, outcome, tally, time.perf_counter() - began), build_world(wanted)
    counts = np.bincount(outcome.items[outcome.items >= 0], minlength=len(env.titles))
    extra = {"fig3": lambda: {"shares": popularity_shares(env, outcome.items), "gini": envs.gini(counts),
                              "coverage": float((counts > 0).mean())},
             "fig4": lambda: {"values": values_of(wanted, env, outcome, models)}}.get(name, dict)()
    kept = ("malformed", "fallbacks", "ungrounded", "calls", "seconds")
    return {"series": cell.series, "x": cell.x, "seed": wanted.seed, "scores": outcome.after[0].tolist(),
            **{key: summary[key] for key in kept}, **extra}


def popularity_shares(env: envs.Env, items: np.ndarray) -> list[list[int]]:
    """How often each user was given items of each fifth by popularity, the least popular first."""
    rank = np.argsort(np.argsort(envs.popularity(env), kind="stable"))
    group = np.append(rank * 5 // len(rank), 5)                     # the last is for item -1
    return np.stack([np.bincount(row, minlength=6)[:5] for row in group[items]]).tolist()


def values_of(wanted: Settings, env: envs.Env, outcome: Outcome, models: tuple,
              states: int = 40, draws: int = 8) -> list[list[float]]:
    """[states, 3]: for states of held-out episodes the Monte-Carlo value, one return, the critic's V.

    Monte-Carlo: the mean discounted return of `draws` continuations with the frozen agent, each
    followed until what may still come is discounted below a thousandth.
    """
    config, catalog = Config(**wanted.config), billp.catalog(env, models[1])
    far = next((n for n in range(env.max_steps) if config.gamma ** n < 0.001), env.max_steps)
    played = [(t, n) for t in outcome.episodes["after"] for n in range(len(t.steps))]
    rng, rows = np.random.default_rng(np.random.SeedSequence(wanted.seed, spawn_key=(3,))), []
    for t, n in (played[i] for i in rng.integers(len(played), size=states)):
        start = Trajectory(t.user, t.steps[:n], t.steps[n].state, False)
        near = catalog._replace(env=env._replace(max_steps=min(n + far, env.max_steps)))
        runs = [billp.episode(near, t.user, (wanted.seed, "continue", draw), outcome.agent, models[0],
                              config, start) for draw in range(draws)]
        value, _ = billp.critic(start.last, outcome.agent.critic, models[0], config)
        returns = [billp.discounted_return([s.reward for s in r.steps], config.gamma)
                   for r in (*runs, t._replace(steps=t.steps[n:]))]
        rows.append([float(np.mean(returns[:-1])), returns[-1], value.value])
    return rows


def errors(samples: np.ndarray) -> np.ndarray:
    """[..., S, N, 2] of (truth, estimate) -> [..., 3]: bias, variance and mean squared error."""
    error = (samples[..., 1] - samples[..., 0]).reshape(*samples.shape[:-3], -1)
    return np.stack([error.mean(-1), error.var(-1), (error ** 2).mean(-1)], -1)


def tabulate(name: str, found: list[list[dict]]) -> list[dict[str, Any]]:
    """The rows of an experiment's table, from each cell's results over seeds.

    What a row's R_traj is compared with: the row above in table3 and table6, elsewhere billp at the
    same place.
    """
    stacks = [{key: np.array([result[key] for result in results], float) for key in
               ("scores", "shares", "gini", "coverage", "values") if key in results[0]} for results in found]
    heads = [{key: results[0][key] for key in ("series", "x")} for results in found]
    if name == "fig3":
        return [{**head, "x": group, "figures": figures} for head, stack in zip(heads, stacks)
                for group, figures in enumerate(spread(stack), 1)]
    if name == "fig4":
        return [{**head, "series": series, "figures": dict(zip(("bias", "variance", "MSE"), envs.bootstrap(
            errors, stack["values"][..., [0, column]])))} for head, stack in zip(heads, stacks)
            for column, series in ((1, "one return"), (2, "critic"))]
    rows = []
    for i, (head, stack) in enumerate(zip(heads, stacks)):
        twin = next((j for j, other in enumerate(heads) if other == {**head, "series": "billp"}), i)
        other = max(i - 1, 0) if name in ("table3", "table6") else twin
        gain = envs.metrics(stack["scores"], stacks[other]["scores"])["R_traj"] if other != i else None
        rows.append({**head, "figures": envs.metrics(stack["scores"]), "against": title(heads[other]),
                     "gain": gain, "paper": "" if head["x"] else PAPER.get(head["series"], "")})
    return rows


def spread(stack: dict[str, np.ndarray]) -> list[dict[str, list[float]]]:
    """How recommendations are spread over popularity groups; Gini and coverage are of all items."""
    shares = envs.bootstrap(lambda s: s.sum((-3, -2)) / s.sum((-3, -2, -1))[..., None], stack["shares"])
    whole = {key: envs.bootstrap(lambda s: s.mean((-3, -2)), stack[key][:, None, None])[0]
             for key in ("gini", "coverage")}
    return [{"share": share, **whole} for share in shares]


def title(row: dict[str, Any]) -> str:
    return row["series"] + ("" if row["x"] is None else f", {row['x']}")


def show_table(rows: list[dict[str, Any]]) -> str:
    """An experiment's table. A row is called higher or lower only if the interval holds no 0."""
    lines = [header_of(rows[0]["figures"], 24)]
    for row in rows:
        line = row_of(title(row), row["figures"], 24)
        if row.get("gain"):
            mean, low, high = row["gain"]
            verdict = "higher" if low > 0 else "lower" if high < 0 else "not told apart"
            line += f"   R_traj {mean:+.2f} [{low:.2f}, {high:.2f}] against {row['against']}: {verdict}"
        lines.append(line + (f"   paper {row['paper']}" if row.get("paper") else ""))
    return "\n".join(lines + [ORIENTATION] * any(row.get("paper") for row in rows))


def plot(name: str, heading: str, rows: list[dict[str, Any]], path: Path) -> None:
    """One figure with its intervals: lines over x, or one point a row where there is no x."""
    try:
        import matplotlib
    except ImportError:
        say("no picture: pip install 'billp[plot]' draws it")
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    what, label, *axis = EXPERIMENTS[name]
    figure, axes = plt.subplots(figsize=(8, 4.5), dpi=100, layout="constrained")
    for i, series in enumerate(dict.fromkeys(row["series"] for row in rows)):
        mine = [row for row in rows if row["series"] == series]
        mean, low, high = np.array([row["figures"][what] for row in mine]).T
        style = dict(color=COLOURS[i % len(COLOURS)], marker="osD^vPX*"[i % 8], capsize=3)
        if axis:
            axes.errorbar([row["x"] for row in mine], mean, [mean - low, high - mean], label=series, **style)
        else:
            axes.errorbar(mean, [i], xerr=[mean - low, high - mean], **style)
    names, measured = list(dict.fromkeys(row["series"] for row in rows)), f"{label}\n(mean, 95 % interval)"
    if axis:
        axes.set(xlabel=axis[0], ylabel=measured, xticks=sorted({row["x"] for row in rows}))
        axes.legend(frameon=False)
    else:
        axes.set(xlabel=measured, yticks=range(len(names)), yticklabels=names)
        axes.invert_yaxis()
    axes.set_title(heading, fontsize=9)
    axes.grid(alpha=0.3)
    figure.savefig(path)
    plt.close(figure)


COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")   # Okabe and Ito


def costs(results: list[dict]) -> str:
    """What one cell cost over all its seeds: calls, tokens, replies that were of no use, seconds."""
    calls = [role for result in results for role in result["calls"].values()]
    counts = [sum(role[column] or 0 for role in calls) or "?" for column in COLUMNS]
    means = [np.mean([result[key] for result in results]) for key in ("malformed", "fallbacks", "ungrounded")]
    return (f"{title(results[0]):24}" + ", ".join(f"{name} {count}" for name, count in zip(COLUMNS, counts))
            + f"; a run: malformed {means[0]:.1f}, fallbacks {means[1]:.1f}, named no item {means[2]:.0%}, "
            + f"{np.mean([result['seconds'] for result in results]):.1f} s")


@contextmanager
def processes(count: int) -> Iterator[Callable]:
    """A map over processes, for cells that keep a core busy; Ctrl-C is left to the parent."""
    if count == 1:
        yield map
        return
    pool = ProcessPoolExecutor(count, initializer=signal, initargs=(SIGINT, SIG_IGN))
    try:
        yield pool.map
    finally:
        pool.shutdown(cancel_futures=True)


def built_in(wanted: Settings) -> tuple[prompts.LLM, prompts.Embed]:
    return prompts.offline, prompts.hashed_ngrams


def pretended(wanted: Settings) -> tuple[prompts.LLM, prompts.Embed]:
    return estimated, prompts.hashed_ngrams


def experiment(args: argparse.Namespace) -> None:
    """All cells of one experiment over all seeds: a table, a JSON file and a picture."""
    name, base, began, known = args.experiment, settings(args), time.perf_counter(), {}
    table = cells(name, (args.models or base.model).split(","))
    if args.rows:
        table = [cell for cell in table if cell.series in args.rows.split(",")]
    if not table:
        raise UserError(f"--rows {args.rows}: {name} has no such rows")
    if args.dry_run:
        table = [cell for cell in table if cell.changes.get("method", "billp") in billp.METHODS]
    jobs = [(cell, change(base, cell, base.seed + s)) for cell in table for s in range(args.seeds)]
    for _, wanted in jobs[::args.seeds]:
        build_world(wanted)                             # a mistake is found before anything runs
    also = {"experiment": name, "seeds": args.seeds, "models": args.models, "rows": args.rows}
    path = None if args.dry_run else run_directory(args.out, base, also)

    def connected(wanted: Settings) -> tuple[prompts.LLM, prompts.Embed]:
        if wanted.model not in known:                   # one client and one log a model
            log = path / re.sub(r"\W+", "-", wanted.model)
            log.mkdir(exist_ok=True)
            known[wanted.model] = connect(args, wanted, log, {}, Event())
        return known[wanted.model]
    local = args.dry_run or all(wanted.model == "offline" for _, wanted in jobs)
    models_for = pretended if args.dry_run else built_in if local else connected
    results: list[dict] = []
    with processes((args.workers or os.cpu_count() or 1) if local else 1) as map:
        for result in map(partial(run_cell, args, name, models_for), jobs):
            results.append(result)
            say(f"{name}: {len(results)} of {len(jobs)}, {title(result)}, seed {result['seed']}")
    found = [results[i:i + args.seeds] for i in range(0, len(results), args.seeds)]
    if args.dry_run:
        print("\n".join([EXPECTED, *map(costs, found)]))
        return
    rows = tabulate(name, found)
    cost = [costs(cell) for cell in found if cell[0]["calls"]["actor"]["calls"]]
    heading = (f"{name} on {base.world}, seeds {base.seed} to {base.seed + args.seeds - 1}, {base.users} held-out "
               f"users each\nmodel {model_named(base.model)}")
    print(f"{heading}\n\n{show_table(rows)}\n")
    print("\n".join(cost) + f"\n\nseconds   {time.perf_counter() - began:.1f}\nrun       {path}")
    seconds = [result.pop("seconds") for result in results]
    held = {**also, "settings": base._asdict(), "rows": rows, "cells": results, "seconds": seconds}
    write(path / "results.json", dumps(held) + "\n")
    plot(name, heading, rows, path / f"{name}.png")


def main(argv: Sequence[str] | None = None) -> int:
    tally: dict[str, list] = {}
    try:
        args = parse(argv)
        show(args.show, args.pick) if args.show else experiment(args) if args.experiment else run(args, tally)
        return 0
    except prompts.BudgetSpent as error:
        say("\n".join([*call_table(tally), f"run.py: {error}"]))
        return 3
    except (UserError, prompts.EndpointError) as error:
        say(f"run.py: {error}")
        return 2
    except KeyboardInterrupt:
        say("\n".join([*call_table(tally), "interrupted; the same command continues it"]))
        return 130


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)              # threads that still wait for an answer must not hold up the end
