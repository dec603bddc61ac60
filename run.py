"""The shell: flags, files, threads, progress, tables.

    python run.py --episodes 50             learn; evaluate the same users before and after
    python run.py --method reflexion        the same with another row of switches
    python run.py --show RUN                one episode of a finished run, step by step
    python run.py --experiment table5       one of the paper's tables or figures, over several seeds, or all

Every effect is here, but for the sections "the outside world": data files in envs.py, HTTP and the log in
prompts.py. Results go to stdout, progress and errors to stderr. A run directory holds config.json (what
determines the result), calls.jsonl (a real model's answers), episodes.jsonl, memory.json and summary.json; that
of experiments config.json, MODEL/calls.jsonl, and NAME.json and NAME.png of each. The same command again
continues or repeats the run; a directory of another configuration is never touched.
Exit codes: 0 done, 2 a mistake that can be mended, 3 the budget is spent, 130 interrupted.
"""
from __future__ import annotations

import argparse
import gc
import hashlib
import inspect
import json
import os
import re
import signal
import sys
import time
from concurrent import futures
from contextlib import contextmanager, suppress
from functools import lru_cache, partial, reduce
from importlib.util import find_spec
from io import BytesIO
from itertools import chain, product
from operator import itemgetter
from pathlib import Path
from threading import Event, Thread
from typing import Any, Callable, Iterable, Iterator, NamedTuple, Sequence
from urllib.parse import quote

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")      # matrices are small here: more threads only wait
import numpy as np

import billp
import envs
import prompts
from billp import Agent, Catalog, Config, Trajectory
from prompts import LLM, Embed, Usage


class UserError(Exception):
    """A mistake that the person at the keyboard can mend: one line, exit code 2."""


MENDABLE = (UserError, prompts.EndpointError, envs.BadData, OSError, MemoryError, RecursionError,
            futures.BrokenExecutor)
NAMES = {"offline": "offline, a rule-based stand-in: it shows the mechanism at work and is no evidence about "
                    "real models"}      # what is no language model never passes for one
EXPECTED = "expected, by a run of the offline reader at 4 characters a token:"
WORLDS = "films, synthetic:USERSxITEMS, movielens:DIR, steam:DIR, amazon:DIR"
METHODS = (*envs.POLICIES, *billp.METHODS)
BUDGET = 100                            # learning episodes of language models in the paper
Counts = dict[str, "int | None"]        # calls and tokens; None where the server does not say
Job = tuple["Settings", list[str]]      # a run and the experiments that need it
Row = dict[str, Any]                    # what is known of a cell, or of a row in a table
URLS = ("OPENAI_BASE_URL", "OPENAI_API_BASE")
COLOURS = "#0072B2 #D55E00 #009E73 #CC79A7 #E69F00 #56B4E9 #000000".split()     # Okabe and Ito
PAPER = {"billp": "69.19, 42.44", "reflexion": "57.42, 40.67", "billp-no-macro": "64.96, -",
         "billp-no-micro": "64.72, -"}
ORIENTATION = ("paper: R_traj on Steam and Amazon-Book with gpt-3.5-turbo; its worlds and models differ from "
               "these, the figures are for orientation only")


class Experiment(NamedTuple):
    """A table or figure, of the paper's but for `curve`."""
    rows: str                           # methods, or method:episodes; table6 has --models instead
    varied: str = ""                    # what else differs between its cells
    places: Sequence[int | None] = (None,)      # the values of that
    axis: str = ""                      # the x axis's name, if there is one
    what: str = "R_traj"                # the figure that is drawn
    label: str = "reward an episode"    # that figure's name in the picture


EXPERIMENTS = {
    "table3": Experiment("random popular greedy a2c a2c:100000 act react reflexion billp oracle"),
    "table5": Experiment("billp-no-macro billp-no-micro billp-no-critic billp"),
    "fig3": Experiment("billp a2c:10000",       # a tenth of what RL gets already gives the picture
                       axis="popularity group of items (1: least popular fifth)",
                       what="share", label="share of recommendations"),
    "fig4": Experiment("billp", "episodes", (10, 50, 100, 200), "learning episodes",
                       "MSE", "mean squared error of the value"),
    "fig5": Experiment("react a2c reflexion billp", "window", (1, 2, 4, 6, 8),
                       "window W (items a user remembers)"),
    "table6": Experiment("", "model"),
    "curve": Experiment("a2c billp", "episodes", (0, 10, 20, 50, 100, 200), "learning episodes")}

# ------------------------------------------------------------------------------------ flags

FLAGS: dict[str, dict[str, Any]] = {
    "--episodes": dict(type=int, help=f"learning episodes (default 50; {BUDGET} in experiments)"),
    "--users": dict(type=int, default=50, help="held-out users to evaluate on (default 50)"),
    "--method": dict(default="billp", choices=METHODS, metavar="METHOD", help=" ".join(METHODS)),
    "--world": dict(default="films", help=f"{WORLDS} (default films)"),
    "--seed": dict(type=int, default=0, help="names every random draw (default 0)"),
    "--workers": dict(type=int, help="episodes at once (default: 1 offline, else a batch); of offline "
                      "experiments runs at once (default: all cores)"),
    "--out": dict(type=Path, help="run directory (default: one of its own under runs/)"),
    "--load": dict(type=Path, help="start from another run's memory.json"),
    "--show": dict(type=Path, metavar="RUN", help="print one episode of a run"),
    "--pick": dict(default="", metavar="PHASE:N", help="which one: before, learn or after, and its number"),
    "--experiment": dict(metavar="A,B", help="the paper's tables and figures, over "
                         f"--seeds: {' '.join(EXPERIMENTS)}, or all; flags do not set what they vary, "
                         "as the method; a run that two of them need is made once"),
    "--seeds": dict(type=int, default=5, help="seeds of an experiment, from --seed on (default 5)"),
    "--rows": dict(metavar="A,B", help="only these rows of experiments, but of table6, as react,billp"),
    "--models": dict(metavar="A,B", help="the models that table6 compares"),
    "--model": dict(help="model name, or offline (default: OPENAI_MODEL)"),
    "--base-url": dict(help="endpoint (default: OPENAI_BASE_URL; the key is read from OPENAI_API_KEY)"),
    "--embed-model": dict(help="embedding model (default: OPENAI_EMBED_MODEL, or character n-grams)"),
    "--timeout": dict(type=float, default=300.0, help="seconds for one answer (default 300)"),
    "--header": dict(action="append", default=[], metavar="K=V", help="one more request header"),
    "--extra-body": dict(default="{}", metavar="JSON", help="more fields for each request"),
    "--max-calls": dict(type=int, help="stop cleanly after so many live calls of each model, not embeddings"),
    "--max-tokens": dict(type=int, help="stop cleanly after so many tokens of each model"),
    "--replay": dict(action="store_true", help="answer from the run's log alone"),
    "--dry-run": dict(action="store_true", help="expected calls and tokens; sends nothing")}
GROUPS = {"method (default: the row of --method)": Config, "world (default: the world's own)": envs.Env}
KINDS = {bool: dict(action=argparse.BooleanOptionalAction), str: dict(choices=("none", "latest", "nearest"))}
BOUNDS = [                              # lowest, highest, and the flags that must lie between
    (0, 1, "gamma"), (0, 2, "temperature"), (0, 4, "tau_actor tau_critic"), (0.001, 10**6, "timeout"),
    (1, 1000, "workers seeds titles window"), (0, 100, "retries"), (1, 10**5, "max_steps"),
    (1, 10**9, "users batch reply_tokens"), (1000, 10**9, "transcript"), (0, 10**18, "seed"),
    (0, 10**9, "episodes k_lessons k_actions k_values beta floor grace max_calls max_tokens")]


def reasons(record: type) -> dict[str, str]:
    """The comment beside each field that has a default."""
    return dict(re.findall(r"^    (\w+): .*?= .*?# (.*)$", inspect.getsource(record), re.M))


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line."""

    def error(self, message: str) -> None:      # argparse would print its whole usage first, and keys given it
        told = re.sub("(?s)(unrecognized arguments:).*?( --?[a-z-]+|$).*", r"\1\2", message)
        raise UserError(f"{told}; --help lists the flags")


def chosen(args: argparse.Namespace, names: Iterable[str]) -> dict[str, Any]:
    """The flags among `names` that were given."""
    return {name: getattr(args, name) for name in names if getattr(args, name) is not None}


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The flags, each within its bounds."""
    text = f"BiLLP learns, then is evaluated. The built-in model is {NAMES['offline']}"
    parser = Parser("run.py", description=text, allow_abbrev=False)
    for flag, how in FLAGS.items():
        parser.add_argument(flag, **how)
    for heading, record in GROUPS.items():
        group = parser.add_argument_group(heading)
        for name, why in reasons(record).items():       # left out, the method's or world's own value stands
            default = record._field_defaults[name]
            kind = type(default)
            how = KINDS.get(kind, dict(type=kind, metavar=kind.__name__))
            text = why if kind is bool or record is envs.Env else f"{why} (default {default})"
            group.add_argument(f"--{name.replace('_', '-')}", help=text.replace("%", "%%"), **how)
    args = parser.parse_args(argv)
    named = [] if args.experiment is None else args.experiment.replace("all", ",".join(EXPERIMENTS)).split(",")
    if not set(named) <= set(EXPERIMENTS):
        raise UserError(f"no experiment {args.experiment!r}; there are all, {', '.join(EXPERIMENTS)}")
    args.experiment = list(dict.fromkeys(named))
    if args.episodes is None:
        args.episodes = BUDGET if args.experiment else 50
    for low, high, names in BOUNDS:
        for name, value in chosen(args, names.split()).items():
            if not low <= value <= high:
                raise UserError(f"--{name.replace('_', '-')} is {value}; it must lie from {low} to {high}")
    if not all("=" in header for header in args.header):
        raise UserError("--header takes NAME=VALUE")
    with suppress(ValueError):
        if isinstance(json.loads(args.extra_body), dict):
            return args
    raise UserError("--extra-body takes a JSON object, such as '{\"top_p\": 0.9}'")


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


def digest(content: bytes) -> str:
    """A short name for the content."""
    return hashlib.sha256(content).hexdigest()[:16]


def variable(*names: str) -> str:
    """The first of these environment variables that is set."""
    return next(filter(None, map(os.environ.get, names)), "")


def endpoint(args: argparse.Namespace) -> bool:
    """Whether the flags or the environment point to an endpoint."""
    return bool(args.base_url or args.replay or variable(*URLS, "OPENAI_API_KEY"))


def settings(args: argparse.Namespace) -> Settings:
    """What the flags and the environment ask for; an experiment's cells add their own method's row."""
    live = endpoint(args)
    compared = (args.models or "").split(",")
    model = args.model or (live and variable("OPENAI_MODEL")) or compared[0] or ("" if live else "offline")
    models = {model, *(compared if args.models else ())}
    if models & {"", ".", ".."} or not (live or models == {"offline"}):
        raise UserError("an endpoint and a model are needed: set OPENAI_BASE_URL and OPENAI_MODEL, "
                        "or give --base-url and --model; --model offline is the built-in reader")
    named = "" if models == {"offline"} else variable("OPENAI_EMBED_MODEL")
    embedding = args.embed_model or named or "hashed_ngrams"
    if "offline" in models and embedding != "hashed_ngrams":
        raise UserError(f"the built-in reader takes no embedding model such as {embedding}")
    load = digest(args.load.read_bytes()) if args.load else ""
    extra = digest(args.extra_body.encode("utf-8", "replace")) if args.extra_body != "{}" else ""
    row = {} if args.experiment else billp.METHODS.get(args.method, {})
    config = {**Config()._asdict(), **row, **chosen(args, Config._fields)}
    return Settings(args.world, args.method, model, embedding, args.seed, args.episodes, args.users,
                    load, extra, config, chosen(args, reasons(envs.Env)))


@lru_cache(64)
def load_world(name: str, seed: int) -> envs.Env:
    """A world by its name on the command line."""
    kind, _, rest = name.partition(":")
    size = re.fullmatch(r"(\d{1,9})x(\d{1,9})", rest)
    if name == "films":
        return envs.films(seed)
    if kind == "synthetic" and size and min(map(int, size.groups())) > 1:
        return envs.synthetic(*map(int, size.groups()), seed)
    if kind == "movielens" and rest:
        return envs.movielens(rest, seed)
    if kind in ("steam", "amazon") and rest:
        return load_world(name, 0) if seed else envs.released(rest, kind)  # nothing in it is drawn
    raise UserError(f"no world {name!r}; there are {WORLDS}")


def generator(wanted: Settings, branch: int) -> np.random.Generator:
    """The random draws of one purpose, as the run's seed names them."""
    return np.random.default_rng(np.random.SeedSequence(wanted.seed, spawn_key=(branch,)))


def build_world(wanted: Settings) -> tuple[envs.Env, list[int], list[int]]:
    """A run's world under its rule of leaving, its learners and its held-out users, in the seed's order."""
    env = load_world(wanted.world, wanted.seed)._replace(**wanted.rule)
    learners, held_out = np.split(np.arange(len(env.histories)), [env.learners])
    if wanted.episodes > len(learners) and wanted.method in billp.METHODS:
        raise UserError(f"{wanted.world} has {len(learners)} learning users, too few for {wanted.episodes} "
                        "episodes")
    if wanted.users > len(held_out):
        raise UserError(f"--users {wanted.users}: {wanted.world} has {len(held_out)} held-out users")
    return (env, generator(wanted, 0).permutation(learners)[:wanted.episodes].tolist(),
            generator(wanted, 1).permutation(held_out)[:wanted.users].tolist())


# ------------------------------------------------------------------------------------ files

dumps = partial(json.dumps, ensure_ascii=False)


def write(path: Path, content: str | bytes) -> None:
    """Write, then rename: the file is whole or not there."""
    draft = path.with_name(f"{path.name}.{os.getpid()}.part")
    draft.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "replace"))
    os.replace(draft, path)


def contents(env: envs.Env) -> str:
    """A digest of a world that comes from files, where the same name may come to stand for other data."""
    if env.name.startswith(("films", "synthetic")):
        return ""
    held = dumps([env.titles, env.about, [history.tolist() for history in env.histories]])
    return digest(held.encode("utf-8", "replace") + b"".join(map(bytes, getattr(env.ratings, "tables", ()))))


def run_directory(args: argparse.Namespace, wanted: dict[str, Any], env: envs.Env) -> Path:
    """The directory of this run, made if need be; refused if it holds anything else."""
    text = dumps({**wanted, "data": contents(env)}, indent=1).encode("utf-8", "replace").decode() + "\n"
    what = f"{wanted['world'].partition(':')[0]}-{'+'.join(args.experiment or [wanted['method']])}"
    path = args.out or Path("runs", f"{what}-{digest(text.encode())[:8]}")
    held = path / "config.json"
    if held.exists():
        old, new = (re.findall(r'(\w+)": ([^{].*?),?$', content, re.M)
                    for content in (held.read_text("utf-8", "replace"), text))
        if changed := dict.fromkeys(pair[0] for pair in old + new if (pair in old) != (pair in new)):
            raise UserError(f"{path} holds a run of another configuration ({', '.join(changed)}); "
                            "choose another --out")
    elif path.exists() and any(file.suffix != ".part" for file in path.iterdir()):
        raise UserError(f"{path} is not empty and holds no run; choose another --out")
    elif args.replay:
        raise UserError(f"{path} holds no run to replay: run without --replay, or give its --out")
    path.mkdir(parents=True, exist_ok=True)
    write(held, text)
    return path


def save_memory(agent: Agent, embedding: str) -> str:
    """The memories as JSON, a record a line; vectors are left out and made again on loading."""
    parts = [f'"{name}": [\n' + ",\n".join(map(dumps, billp.records(memory))) + "\n]"
             for name, memory in agent._asdict().items()]
    return f'{{"billp": 1, "embedding": {dumps(embedding)},\n' + ",\n".join(parts) + "}\n"


def load_memory(path: Path, embedding: str) -> dict[str, list[billp.Record]]:
    """The records that `save_memory` wrote, per role; anything else is refused."""
    usable = {"planner": lambda v: isinstance(v, str), "actor": lambda v: type(v) is int and v in (0, 1),
              "critic": lambda v: np.isfinite(v + 0.0)}
    try:
        held = json.loads(path.read_bytes())
        rows = {name: [billp.Record(*row) for row in held[name]] for name in usable}
        if held["billp"] != 1 or not all(isinstance(r.key + r.action, str) and usable[name](r.value)
                                         for name in rows for r in rows[name]):
            raise ValueError
        if held["embedding"] != embedding:
            raise UserError(f"{path} was made with the embedding {held['embedding']}, not {embedding}")
    except (ValueError, KeyError, TypeError, OverflowError):
        raise UserError(f"{path} is not a memory.json of this program, which is JSON in UTF-8")
    return rows


def embed_memory(rows: dict[str, list[billp.Record]], embed: Embed) -> Agent:
    """An agent from records; each text is embedded once."""
    texts = list(dict.fromkeys(record.key for held in rows.values() for record in held))
    vectors = dict(zip(texts, embed(texts))) if texts else {}
    chunks = {name: billp.Chunk(tuple(held), np.stack([vectors[r.key] for r in held]))
              for name, held in rows.items() if held}
    return Agent(**{name: billp.push(billp.EMPTY, chunk) for name, chunk in chunks.items()})


def describe(env: envs.Env, t: Trajectory) -> dict[str, Any]:
    """One episode as a line of episodes.jsonl: all that --show needs."""
    steps = [{"lessons": s.plan.recalled, "thought": s.plan.value, "experience": s.act.recalled,
              "said": s.act.said, "exact": s.act.exact, "item": s.line, "reward": s.reward} for s in t.steps]
    left = envs.why_left(env, t.user, [s.act.value for s in t.steps]) if t.terminated else ""
    reflection = "".join(record.value for record in billp.records(t.gained.planner))
    values, advantages = (t.values, t.advantages) if t.gained.actor else ((), ())      # else none is credited
    _, phase, number, _ = t.last.key
    return {"phase": phase, "episode": number, "user": t.user, "history": t.last.history,
            "steps": steps, "left": prompts.clean(left),        # it names titles, which are data
            "values": values, "advantages": advantages, "reflection": reflection}


# ----------------------------------------------------------------------------------- tables


def grid(rows: Sequence[tuple[str, dict[str, Sequence[float]]]], width: int) -> list[str]:
    """A table: a line of headings, then one a row, each figure with its interval."""
    lines = [("", [f"{name} [95 %]" for name in rows[0][1]])]
    lines += [(label, [f"{mean:.2f} [{low:.2f}, {high:.2f}]" for mean, low, high in figures.values()])
              for label, figures in rows]
    return [f"{label:{width}}" + "".join(f"{text:>24}" for text in texts) for label, texts in lines]


def spelled(counts: Counts) -> str:
    """Calls, and tokens of the kinds that the server counts.

    >>> spelled({"calls": 2, "prompt": 9, "cached": None, "completion": 4})
    '2 calls, tokens: prompt 9, completion 4'
    """
    kinds = [f"{name} {counts[name]}" for name in Usage._fields if counts[name] is not None]
    return f"{counts['calls']} calls" + ", tokens: " * bool(kinds) + ", ".join(kinds)


def ledger(roles: dict[str, Counts], stats: dict[str, Any]) -> list[str]:
    """Calls and tokens per role; last, what an endpoint's client saw, if there was one."""
    lines = [f"{role:10}{spelled(counts)}" for role, counts in roles.items() if counts["calls"]]
    if stats:
        lines.append(f"retries {len(stats.get('retries', ()))}, system {stats.get('system_fingerprint', '?')}")
    return lines


def report(s: dict[str, Any], about: str, lessons: Sequence[str]) -> list[str]:
    """The results as a person reads them, from summary.json."""
    policy, learning = s["method"] in envs.POLICIES, s["learning"]
    model = "none: this policy sees the numbers" if policy else NAMES.get(s["model"], s["model"])
    lines = [f"{s['method']} on {s['world']}, seed {s['seed']}: {s['episodes']} learning episodes, then "
             f"{s['users']} held-out users", *[f"world     {about}"] * bool(about), f"model     {model}", "",
             *grid([(row, s[row]) for row in ("before", "after", "difference")], 10), ""]
    if learning:
        least, most = min(learning), max(learning)
        bars = "".join("▁▂▃▄▅▆▇█"[int(7 * (length / (most or 1)))] for length in learning)
        lines.append(f"learning  {bars}  mean Len of each batch, {least:.1f} to {most:.1f}")
    lines += [*(f"lesson    {text}" for text in lessons), *ledger(s["calls"], {})]
    if s["calls"]["actor"]["calls"]:
        lines.append(f"replies   malformed {s['malformed']}, fallbacks {s['fallbacks']}, "
                     f"actions that named no free item {s['ungrounded']:.0%}")
    return [*lines, f"seconds   {s['seconds']}"]


def story(e: dict[str, Any]) -> str:
    """An episode in words: what was recalled, thought, done, seen and learnt at each step."""
    lines = [f"{e['phase']} episode {e['episode']}, user {e['user']}", "",
             "liked before", *(f"    {line}" for line in e["history"])]
    for n, step in enumerate(e["steps"]):
        tried, more = step["experience"][:5], len(step["experience"]) - 5
        left = e["left"] if n == len(e["steps"]) - 1 else ""
        rows = [*(("recalled", lesson) for lesson in step["lessons"]), ("thought", step["thought"]),
                *((prompts.VERDICT[v], line) for line, v in tried),
                ("", f"and {more} more experiences" if more > 0 else ""), ("said", step["said"]),
                ("item", step["item"] + " (the nearest; no free title was named)" * (not step["exact"])),
                ("reward", f"{step['reward']:g}" + (f", the user left: {left}" if left else ""))]
        if e["advantages"]:
            a = e["advantages"][n]
            rows.append(("value", f"{e['values'][n]:.2f}, advantage {a:+.2f}: {prompts.VERDICT[a >= 0]}"))
        lines += ["", f"step {n + 1}", *(f"    {label:12}{text}" for label, text in rows if text)]
    lines += [] if e["left"] else ["", "the user stayed to the last step"]
    return "\n".join(lines + (["", f"reflection  {e['reflection']}"] if e["reflection"] else []))


def show(path: Path, pick: str) -> None:
    """Print one episode of a finished run: by default the last one learnt from."""
    phase, _, number = pick.partition(":")
    try:
        episodes = [json.loads(line) for line in (path / "episodes.jsonl").read_bytes().splitlines()]
        wanted = [e for e in episodes if e["phase"] == (phase or "learn")
                  and e["episode"] == int(number or e["episode"])]
        print(story((wanted if pick else wanted or episodes)[-1]))
    except (ValueError, LookupError, TypeError, OverflowError):
        raise UserError(f"{path} holds no episode {pick}".rstrip() + " (they are kept of language methods)")


# ---------------------------------------------------------------------------------- running


class Live(NamedTuple):
    """What is known of a run's calls at any moment, however it ends."""
    tally: dict[str, list[Counts]]      # of each call answered, per role
    stats: dict[str, Any]               # what an endpoint's client saw: retries, fingerprint
    stop: Event                         # set when calls under way shall give up
    files: list[Any]                    # logs open for writing; closed at the end


def say(text: str) -> None:
    """What is no result goes to stderr, if anybody still listens."""
    with suppress(OSError):
        print(text, file=sys.stderr)


def counted(llm: LLM, live: Live, ask: prompts.Ask) -> prompts.Reply:
    """The model's answer, unless it shall stop; what the call used is noted (appending is atomic)."""
    if live.stop.is_set():
        raise prompts.EndpointError("stopped")
    reply = llm(ask)
    live.tally.setdefault(ask.role, []).append({"calls": 1, **reply.usage._asdict()})
    return reply


def estimated(ask: prompts.Ask) -> prompts.Reply:
    """The offline reader, with about as many tokens as a model would be paid for."""
    reply = prompts.offline(ask)
    return reply._replace(usage=prompts.guessed(ask, reply))


def connect(args: argparse.Namespace, wanted: Settings, path: Path | None, live: Live) -> tuple[LLM, Embed]:
    """The model and the embedding of a run; those of an endpoint are recorded in its directory."""
    if args.dry_run or wanted.model == "offline":
        return (estimated if args.dry_run else prompts.offline), prompts.hashed_ngrams
    url = args.base_url or variable(*URLS) or "https://api.openai.com/v1"
    options = dict(key=variable("OPENAI_API_KEY"), timeout=args.timeout, notice=say,
                   extra=json.loads(args.extra_body), stats=live.stats, sleep=live.stop.wait,
                   headers=dict(header.split("=", 1) for header in args.header))
    path.mkdir(exist_ok=True)
    log = prompts.open_log(path / "calls.jsonl", [wanted.model, wanted.embedding, wanted.extra],
                           replay=args.replay, notice=say)
    live.files.append(log.file)
    llm = prompts.limited(prompts.openai(url, wanted.model, **options), args.max_calls, args.max_tokens)
    embed = prompts.hashed_ngrams
    if wanted.embedding != "hashed_ngrams":
        embed = prompts.recorded_embed(prompts.embeddings(url, wanted.embedding, **options), log)
    return prompts.recorded(llm, log), embed


def in_turn(tasks: Sequence[futures.Future], every: Sequence[futures.Future]) -> Iterator:
    """The results of these tasks in order; but the failure of any task so far is raised at once."""
    ended = futures.as_completed(every)
    for task in tasks:
        while not task.done():
            next(ended).result()
        yield task.result()


def submitted(pool: futures.Executor, every: list, f: Callable, *columns: Iterable) -> Iterator:
    """As the pool's map; but `every` gathers all of its tasks, for `in_turn`."""
    tasks = [pool.submit(f, *row) for row in zip(*columns)]
    every += tasks
    return in_turn(tasks, every)


@contextmanager
def mapping(executor: Callable, count: int, stop: Event) -> Iterator[Callable]:
    """A map: the built-in one for 0, or a pool's. An error or Ctrl-C also stops what is under way."""
    if not count:
        yield map
        return
    pool, every = executor(count), []
    try:
        yield partial(submitted, pool, every)
    except BaseException as error:
        if not isinstance(error, prompts.BudgetSpent):  # else what is under way is paid for: it is recorded
            from multiprocessing import active_children
            stop.set()
            for process in active_children():
                process.terminate()     # it would go on, and then wait for its parent for ever
        raise
    finally:
        pool.shutdown(wait=not stop.is_set(), cancel_futures=True)
        futures.wait([task for task in every if task.running()], 1)     # for answers on their way: recorded


def end_with_parent() -> None:
    """Tells this process to stop once its parent has ended, however that ended."""
    from multiprocessing import parent_process
    parent_process().join()
    os.kill(os.getpid(), signal.SIGTERM)


def as_worker(told: Any = signal.SIG_DFL) -> None:
    """Makes this a worker: it leaves Ctrl-C and hang-ups to its parent, with which it ends, as `told` says."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(getattr(signal, "SIGHUP", signal.SIGINT), signal.SIG_IGN)     # Windows has none
    signal.signal(signal.SIGTERM, told)
    Thread(target=end_with_parent, daemon=True).start()


def progress(batches: Iterable, total: int, size: int) -> Iterator:
    """The batches as they come, with a bar on a terminal (tqdm) or a line each."""
    if find_spec("tqdm") and sys.stderr.isatty():
        from tqdm import tqdm
        yield from tqdm(batches, "learning", total=-(-total // size), unit="batch", leave=False)
        return
    for agent, trajectories in batches:
        mean = np.mean([billp.score(t)[0] for t in trajectories])
        say(f"learning: {trajectories[-1].last.key[2] + 1} of {total} episodes, mean Len {mean:.1f}")
        yield agent, trajectories


class Outcome(NamedTuple):
    """What a run gives: scores [1, users, 2] of the held-out users, and how it came to them."""
    before: np.ndarray
    after: np.ndarray
    items: list[np.ndarray]             # of each user: what was recommended after learning
    agent: Agent = billp.NOVICE
    episodes: tuple[Trajectory, ...] = ()       # before, while and after learning


def perform(wanted: Settings, rows: dict, models: tuple[LLM, Embed], map: Callable,
            watched: bool = False) -> Outcome:
    """Evaluate if watched, learn, evaluate the same users (again), starting from memory records."""
    env, learners, held_out = build_world(wanted)
    if policy := envs.POLICIES.get(wanted.method):      # only a2c learns
        played = [envs.rollout(env, np.array(held_out), policy(env, n, wanted.seed, wanted.config["gamma"]),
                               generator(wanted, 2)) for n in ([0] if watched else []) + [wanted.episodes]]
        scores = [envs.scores((p.items >= 0).sum(1), p.rewards.sum(1)) for p in played]
        return Outcome(scores[0], scores[-1], [row[row >= 0] for row in played[-1].items])
    (llm, embed), config = models, Config(**wanted.config)
    catalog, agent = prompts.catalog(env, embed), embed_memory(rows, embed)
    evaluate = partial(billp.evaluate, catalog, held_out, llm=llm, seed=wanted.seed, config=config, map=map)
    before, learnt = evaluate(agent, phase="before") if watched else (), ()
    batches = billp.train(catalog, learners, llm, wanted.seed, agent, config, map)
    for agent, trajectories in progress(batches, len(learners), config.batch) if watched else batches:
        learnt += trajectories
    after = evaluate(agent, phase="after")
    first, last = (envs.scores(*zip(*map(billp.score, ts))) for ts in (before or after, after))
    items = [np.array([step.act.value for step in t.steps[:billp.score(t)[0]]], int) for t in after]
    return Outcome(first, last, items, agent, before + learnt + after)


def added(rows: Sequence[Counts]) -> Counts:
    """Their sum; None where none of them is known.

    >>> added([{"calls": 1, "cached": None}, {"calls": 1, "cached": None}])
    {'calls': 2, 'cached': None}
    """
    known = {name: [row[name] for row in rows if row[name] is not None] for name in rows[0]}
    return {name: sum(counts) if counts else None for name, counts in known.items()}


def calls(live: Live) -> dict[str, Counts]:
    """Calls and tokens per role."""
    none, roles = {"calls": 0, **Usage()._asdict()}, ("planner", "actor", "critic", "reflector")
    return {role: added([none, *live.tally.get(role, ())]) for role in roles}


def cost(outcome: Outcome, live: Live, began: float) -> dict[str, Any]:
    """What a run cost: replies that were of no use, calls and tokens, seconds."""
    steps = [step for t in outcome.episodes for step in t.steps]
    answers = list(chain(*((s.plan, s.act) for s in steps), *(t.answers for t in outcome.episodes)))
    return {"malformed": sum(a.malformed for a in answers), "fallbacks": sum(a.fallback for a in answers),
            "ungrounded": round(float(np.mean([not s.act.exact for s in steps])), 4) if steps else 0.0,
            "calls": calls(live), "seconds": round(time.perf_counter() - began, 2)}


def run(args: argparse.Namespace, live: Live) -> None:
    """The default flow: learn, evaluate, write the run directory, print the results."""
    began, wanted = time.perf_counter(), settings(args)
    env, *_ = build_world(wanted)
    rows = load_memory(args.load, wanted.embedding) if args.load else {}
    path = None if args.dry_run else run_directory(args, wanted._asdict(), env)
    llm, embed = connect(args, wanted, path, live)
    workers = args.workers or (0 if args.dry_run or wanted.model == "offline" else wanted.config["batch"])
    with mapping(futures.ThreadPoolExecutor, workers, live.stop) as map:
        outcome = perform(wanted, rows, (partial(counted, llm, live), embed), map, watched=True)
    if args.dry_run:
        print("\n".join([EXPECTED, *(ledger(calls(live), {}) or ["no calls"])]))
        return
    lessons, summary = [record.value for record in billp.records(outcome.agent.planner)], wanted._asdict()
    episodes, batch = [describe(env, t) for t in outcome.episodes], wanted.config["batch"]
    lengths = [billp.score(t)[0] for t in outcome.episodes if "learn" in t.last.key]
    learning = [float(np.mean(lengths[n:n + batch])) for n in range(0, len(lengths), batch)]
    summary |= {"config": {**wanted.config, **summary.pop("rule")}, "learning": learning,
                "before": envs.metrics(outcome.before), "after": envs.metrics(outcome.after),
                "difference": envs.metrics(outcome.after, outcome.before), "reflections": len(lessons),
                **cost(outcome, live, began)}       # the contract that scripts read
    write(path / "episodes.jsonl", "".join(dumps(episode) + "\n" for episode in episodes))
    write(path / "memory.json", save_memory(outcome.agent, wanted.embedding))
    write(path / "summary.json", dumps(summary, indent=1) + "\n")
    print("\n".join([*report(summary, env.about, lessons[-2:]), f"run       {path}"]))
    if live.stats:
        say(ledger({}, live.stats)[0])


# ------------------------------------------------------------------------------ experiments


def change(base: Settings, name: str, series: str, x: int | None, seed: int) -> Settings:
    """The settings of one cell for one seed."""
    varied = EXPERIMENTS[name].varied
    model, text = (series, base.method) if varied == "model" else (base.model, series)
    method, _, budget = text.partition(":")
    config = {**base.config, **billp.METHODS.get(method, {})}
    idle = config["lessons"] == "none" and not config["experience"]         # nothing to learn
    episodes = 0 if idle else x if varied == "episodes" else int(budget or base.episodes)
    rule = {**base.rule, "window": x} if varied == "window" else base.rule
    own = ("window", load_world(base.world, base.seed).window)     # named or not, it is the same run
    return base._replace(seed=seed, model=model, method=method, episodes=episodes, config=config,
                         rule={name: value for name, value in rule.items() if (name, value) != own})


def plan(args: argparse.Namespace, base: Settings, name: str) -> list[tuple[Row, list[Settings]]]:
    """An experiment's series and places, a run a seed for each; a mistake is found before any run begins."""
    experiment = EXPERIMENTS[name]
    known = experiment.rows.split() or list(dict.fromkeys((args.models or base.model).split(",")))
    rows = args.rows.split(",") if args.rows and experiment.rows else known
    if not set(rows) <= set(known):
        raise UserError(f"--rows {args.rows}: {name} has no such rows, only {' '.join(known)}")
    seeds = range(base.seed, base.seed + args.seeds)
    jobs = [({"series": series, "x": x}, [change(base, name, series, x, seed) for seed in seeds])
            for series, x in product(known, experiment.places) if series in rows]
    for _, runs in jobs:
        build_world(runs[0])
    return [job for job in jobs if not (args.dry_run and job[1][0].method in envs.POLICIES)]


def continuation(catalog: Catalog, play: Callable, gamma: float, start: tuple[Trajectory, int],
                 key: tuple) -> float:
    """The return of an episode played anew from its step n, as far as discounts are above 1/1000."""
    (t, n), most = start, catalog.env.max_steps
    far = next((steps for steps in range(most) if gamma ** steps < 0.001), most)
    env, state = catalog.env._replace(max_steps=min(n + far, most)), t.steps[n].state
    world = reduce(lambda world, step: envs.step(env, world, step.act.value)[0], t.steps[:n],
                   envs.reset(env, t.user))
    played = play(catalog._replace(env=env), world, state._replace(key=key + state.key[-1:]))
    return billp.discounted_return([step.reward for step in played.steps], gamma)


def values_of(wanted: Settings, env: envs.Env, outcome: Outcome, llm: LLM, embed: Embed, map: Callable,
              states: int = 40, draws: int = 8) -> list[list[float]]:
    """[states, 3]: for states of held-out episodes their Monte-Carlo value, one return and the critic's V."""
    config, agent = Config(**wanted.config), outcome.agent
    played = [(t, n) for t in outcome.episodes if "after" in t.last.key for n in range(len(t.steps))]
    starts = [played[i] for i in generator(wanted, 3).integers(len(played), size=states)]
    tries = product(starts, [(wanted.seed, "continue", draw) for draw in range(draws)])
    play = partial(billp.play, agent=agent, llm=llm, config=config)
    go_on = partial(continuation, prompts.catalog(env, embed), play, config.gamma)
    sampled = np.reshape(list(map(go_on, *zip(*tries))), (states, draws))
    critic = partial(billp.critic, memory=agent.critic, llm=llm, config=config)
    answers = [answer.value for answer, _ in map(critic, [t.steps[n].state for t, n in starts])]
    single = [billp.discounted_return([step.reward for step in t.steps[n:]], config.gamma) for t, n in starts]
    return [list(row) for row in zip(sampled.mean(1).tolist(), single, answers)]


def shares(env: envs.Env, outcome: Outcome) -> dict[str, Any]:
    """How often each user was given items of each fifth by popularity (least first), Gini and coverage."""
    rank = np.argsort(np.argsort(envs.popularity(env), kind="stable"))
    counts = np.bincount(np.concatenate(outcome.items), minlength=len(rank))
    return {"shares": [np.bincount(rank[row] * 5 // len(rank), minlength=5).tolist() for row in outcome.items],
            "gini": envs.gini(counts), "coverage": float((counts > 0).mean())}


def run_cell(rows: dict, models: dict[str, tuple[LLM, Embed]], workers: int, job: Job) -> dict[str, Row]:
    """One run, as each of the experiments that it belongs to sees it."""
    (wanted, names), began, live = job, time.perf_counter(), Live({}, {}, Event(), [])
    (llm, embed), (env, *_) = models[wanted.model], build_world(wanted)
    mine = partial(counted, llm, live), embed
    with mapping(futures.ThreadPoolExecutor, workers, live.stop) as map:
        outcome = perform(wanted, rows, mine, map)
        seen = {"seed": wanted.seed, "scores": outcome.after[0].tolist(), **cost(outcome, live, began)}
        views = dict.fromkeys(names, seen)
        if "fig3" in names:
            views["fig3"] = {**seen, **shares(env, outcome)}
        if "fig4" in names:
            values = values_of(wanted, env, outcome, *mine, map)
            views["fig4"] = {**seen, "values": values, **cost(outcome, live, began)}
    return views


def errors(samples: np.ndarray) -> np.ndarray:
    """[..., S, N, 1 + k], truth and k estimates -> [..., k, 3]: bias, variance and mean squared error of each.

    The variance is that of the error over all states and seeds, not of an estimator at one state; the truth is
    itself a mean of a few returns, whose noise is in both rows of fig4.
    """
    error, all_over = samples[..., 1:] - samples[..., :1], (-3, -2)
    return np.stack([error.mean(all_over), error.var(all_over), (error ** 2).mean(all_over)], -1)


def column(results: list[Row], *keys: str) -> np.ndarray:
    """What was measured over a cell's seeds [S, ...]; several things side by side [S, keys]."""
    return np.array([itemgetter(*keys)(result) for result in results], float)


def title(row: Row) -> str:
    """A row's or a cell's name in tables."""
    return row["series"] + ("" if row["x"] is None else f", {row['x']}")


def tabulate(name: str, found: list[list[Row]]) -> list[Row]:
    """An experiment's rows: one a popularity group in fig3, one an estimate in fig4, else one a cell.

    R_traj is held against the row above in table3 and table6, else against billp.
    """
    rows, billps = [], {results[0]["x"]: results for results in found if results[0]["series"] == "billp"}
    for results, above in zip(found, found[:1] + found):
        head = {key: results[0][key] for key in ("series", "x")}
        if name == "fig3":
            groups = envs.bootstrap(lambda n: n.sum((-3, -2)) / np.maximum(n.sum((-3, -2, -1)), 1)[..., None],
                                    column(results, "shares"))
            pair = column(results, "gini", "coverage")[:, None]                 # of all items together
            whole = dict(zip(("gini", "coverage"), envs.bootstrap(lambda n: n.mean((-3, -2)), pair)))
            rows += [{**head, "x": i, "figures": {"share": one, **whole}} for i, one in enumerate(groups, 1)]
        elif name == "fig4":
            both = zip(("one return", "critic"), envs.bootstrap(errors, column(results, "values")))
            rows += [{**head, "series": series, "figures": dict(zip(("bias", "variance", "MSE"), figures))}
                     for series, figures in both]
        else:
            other = above if name in ("table3", "table6") else billps.get(head["x"], results)
            scores = [column(cell, "scores") for cell in (results, other)]
            gain = envs.metrics(*scores)["R_traj"] if other is not results else None
            rows.append({**head, "figures": envs.metrics(scores[0]), "against": title(other[0]), "gain": gain,
                         "paper": PAPER.get(head["series"], "") if head["x"] is None else ""})
    return rows


def remark(row: Row) -> str:
    """What stands behind a row. It is called higher or lower only if the interval holds no 0."""
    text = f"   paper {row['paper']}" if row.get("paper") else ""
    if not row.get("gain"):
        return text
    mean, low, high = row["gain"]
    verdict = "higher" if low > 0 else "lower" if high < 0 else "not told apart"
    return f"   R_traj {mean:+.2f} [{low:.2f}, {high:.2f}] against {row['against']}: {verdict}{text}"


def plot(name: str, heading: str, rows: list[Row], path: Path) -> None:
    """One figure with its intervals: lines over x, or one point a row where there is no x."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return say("no picture: pip install -e '.[plot]' draws it")
    *_, axis, what, label = EXPERIMENTS[name]
    figure, image = Figure((8, 4.5), dpi=100, layout="constrained"), BytesIO()
    axes, names = figure.subplots(), list(dict.fromkeys(row["series"] for row in rows))
    for i, series in enumerate(names):
        mine, plain = [row for row in rows if row["series"] == series], series.replace("$", r"\$")
        places = [row["x"] for row in mine] if axis else [plain]
        mean, low, high = np.array([row["figures"][what] for row in mine]).T
        axes.errorbar(places, mean, np.maximum([mean - low, high - mean], 0), label=plain,
                      color=COLOURS[i % len(COLOURS)], marker="osD^vPX*"[i % 8], capsize=3)
    if axis:
        axes.set(xlabel=axis, xticks=sorted({row["x"] for row in rows}))
        axes.legend(frameon=False)
    else:
        axes.tick_params("x", labelrotation=10)         # names of models can be long
    axes.set_ylabel(f"{label}\n(mean, 95 % interval)")
    axes.set_title(heading, fontsize=9, parse_math=False)
    axes.grid(alpha=0.3)
    figure.savefig(image)
    write(path, image.getvalue())


def bill(results: list[Row]) -> str:
    """What one cell cost over all its seeds: calls, tokens, replies that were of no use, seconds."""
    counts = added([role for result in results for role in result["calls"].values()])
    bad, replaced, none, seconds = column(results, "malformed", "fallbacks", "ungrounded", "seconds").mean(0)
    return (f"{title(results[0]):24}{spelled(counts)}; a run: malformed {bad:.1f}, fallbacks {replaced:.1f}, "
            f"named no free item {none:.0%}, {seconds:.1f} s")


def gather(args: argparse.Namespace, base: Settings, jobs: list[Job], path: Path | None, start: dict,
           live: Live) -> list[dict[str, Row]]:
    """What the runs give, in order: side by side offline, else one by one with threads of its own."""
    folder = partial(quote, safe="", errors="replace")
    models = {model: connect(args, base._replace(model=model), path and path / folder(model), live)
              for model in dict.fromkeys(wanted.model for wanted, _ in jobs)}      # one client and log each
    if args.dry_run or set(models) == {"offline"}:
        count, workers = min(args.workers or os.cpu_count() or 1, len(jobs), 60), 0
        count = count if count > 1 else 0               # one alone needs no process of its own
    else:
        count, workers = 0, args.workers or base.config["batch"]
        models = {model: (partial(counted, llm, live), embed) for model, (llm, embed) in models.items()}
    pool, found = partial(futures.ProcessPoolExecutor, initializer=as_worker), []
    with mapping(pool, count, live.stop) as map:
        for (wanted, names), result in zip(jobs, map(partial(run_cell, start, models, workers), jobs)):
            found.append(result)
            what = [wanted.method, f"{wanted.episodes} episodes", *(f"{k} {v}" for k, v in wanted.rule.items())]
            say(f"{' '.join(names)}: {len(found)} of {len(jobs)}, {', '.join(what)}, seed {wanted.seed}")
    return found


def publish(name: str, base: Settings, found: list[list[Row]], path: Path) -> None:
    """The table of an experiment on stdout, NAME.json and NAME.png in the run directory."""
    rows, cells, last = tabulate(name, found), list(chain(*found)), base.seed + len(found[0]) - 1
    models = [results[0]["series"] for results in found] if name == "table6" else [base.model]
    heading = (f"{name} on {base.world}, seeds {base.seed} to {last}, {base.users} held-out users each\n"
               f"model {', '.join(NAMES.get(model, model) for model in models)}")
    head, *lines = grid([(title(row), row["figures"]) for row in rows], 24)
    print("\n".join([heading, "", head, *(line + remark(row) for line, row in zip(lines, rows)),
                     *[ORIENTATION] * any(row.get("paper") for row in rows), "",
                     *(bill(results) for results in found if results[0]["calls"]["actor"]["calls"]), ""]))
    seconds = [result.pop("seconds") for result in cells]
    held = {"experiment": name, "settings": base._asdict(), "rows": rows, "cells": cells, "seconds": seconds}
    write(path / f"{name}.json", dumps(held) + "\n")
    plot(name, heading, rows, path / f"{name}.png")


def experiments(args: argparse.Namespace, live: Live) -> None:
    """Those asked for; a run that two of them need is made once."""
    began, base = time.perf_counter(), settings(args)
    plans, jobs = {name: plan(args, base, name) for name in args.experiment}, {}
    for name, table in plans.items():
        for wanted in chain(*(runs for _, runs in table)):
            jobs.setdefault(dumps(wanted), (wanted, []))[1].append(name)
    start = load_memory(args.load, base.embedding) if args.load else {}
    also = dict(experiment=",".join(args.experiment), seeds=args.seeds, models=args.models, rows=args.rows)
    world = load_world(base.world, base.seed)
    path = None if args.dry_run else run_directory(args, {**base._asdict(), **also}, world)
    jobs = dict(sorted(jobs.items(), key=lambda job: -job[1][0].episodes))      # long ones last would run alone
    results = dict(zip(jobs, gather(args, base, list(jobs.values()), path, start, live)))
    for name, table in plans.items():
        found = [[{**head, **results[dumps(wanted)][name]} for wanted in runs] for head, runs in table]
        if args.dry_run:
            print("\n".join([f"{name}: {EXPECTED}", *map(bill, found), ""]))
        else:
            publish(name, base, found, path)
    if path:
        print(f"seconds   {time.perf_counter() - began:.1f}\nrun       {path}")
    elif results:
        whole = [views.get("fig4", next(iter(views.values()))) for views in results.values()]   # it asks most
        counts = added([role for view in whole for role in view["calls"].values()])
        print(f"in all, each run once: {spelled(counts)}")


def main(argv: Sequence[str] | None = None, guarded: bool = False) -> int:
    """Does what the flags say, with an endpoint in a process apart if guarded; the exit code."""
    live = Live({}, {}, Event(), [])
    try:
        args = parse(argv)
        asking = endpoint(args) and args.model != "offline" and not args.dry_run
        if guarded and asking and os.name == "posix":
            return guard(argv)
        if args.show:
            show(args.show, args.pick)
        else:
            (experiments if args.experiment else run)(args, live)
        sys.stdout.flush()
        return 0
    except (KeyboardInterrupt, prompts.BudgetSpent) as error:
        halted = str(error) or "interrupted; run the same command again: answered calls are kept"
        say("\n".join([*ledger(calls(live), live.stats), f"run.py: {halted}"]))
        return 3 if isinstance(error, prompts.BudgetSpent) else 130
    except BrokenPipeError:     # whoever read has seen enough
        return 0
    except MENDABLE as error:
        say("run.py: " + prompts.clean(str(error), 999))
        return 2
    finally:
        for file in filter(None, live.files):
            file.close()


def guard(argv: Sequence[str] | None) -> int:
    """main in a process of its own: if this one is killed, the answers on their way are still recorded."""
    from multiprocessing import get_context     # a fork is safe here, before any thread, and starts at once
    context = get_context("fork" if sys.platform == "linux" else "spawn")
    worker = context.Process(target=process, args=(argv, True))
    worker.start()
    with suppress(KeyboardInterrupt):       # a second one ends this process; the worker records on
        worker.join()
    worker.terminate()                      # if it is still at work
    worker.join()
    if worker.exitcode < 0:
        say("run.py: killed from outside; run the same command again: answered calls are kept")
    return worker.exitcode if worker.exitcode >= 0 else 130


def interrupt(*_: Any) -> None:
    """Does as at Ctrl-C when told to stop, and is told but once."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise KeyboardInterrupt


def process(argv: Sequence[str] | None = None, worker: bool = False) -> None:
    """main as a whole process, which ends with its exit code; a worker also when its parent says so, or ends.

    A worker keeps to one core: Python's threads take turns anyway, and to hand over from core to core costs a
    hundred of them up to half of their time.
    """
    code = 130
    with suppress(KeyboardInterrupt):           # outside main: at the very start or end
        if worker:
            as_worker(interrupt)
            with suppress(AttributeError, OSError):     # not every system knows of this, or allows it
                cores = sorted(os.sched_getaffinity(0))
                os.sched_setaffinity(0, {cores[os.getpid() % len(cores)]})      # other runs, other cores
        gc.set_threshold(10**5)     # new objects, not 700: most are kept, and each search holds all threads up
        sys.stdout = sys.stdout or open(os.devnull, "w")        # they may have been closed
        sys.stderr = sys.stderr or open(os.devnull, "w")
        sys.stdout.reconfigure(errors="replace")                # a console without bars gets question marks
        code = main(argv, guarded=not worker)
        with suppress(OSError):
            sys.stdout.flush()
    os._exit(code)              # threads that still wait for an answer must not hold up the end


if __name__ == "__main__":
    process()
