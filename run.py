"""The command line: flags, files, threads, tables.

    python run.py --episodes 50             learn; evaluate the same users before and after
    python run.py --method reflexion        the same with another method
    python run.py --show RUN                one episode of a finished run, step by step
    python run.py --experiment table5       one of the paper's tables or figures, over several seeds

Every effect is here, except for the sections "the outside world" of envs.py (data files) and prompts.py
(HTTP and the log). Results go to stdout. Progress and errors go to stderr.

A run directory holds config.json (what determines the result), calls.jsonl (the answers of a real model),
episodes.jsonl, memory.json and summary.json. A directory of experiments holds config.json, MODEL/calls.jsonl,
and NAME.json and NAME.png of each experiment. The same command continues or repeats a run. A directory of
another configuration is never touched.
Exit codes: 0 done, 2 a mistake that can be mended, 3 the budget is spent, 130 interrupted.
"""
from __future__ import annotations

import hashlib
import json
import os
import signal
import sys
import time
from argparse import ArgumentParser, ArgumentTypeError, BooleanOptionalAction, Namespace, RawDescriptionHelpFormatter
from concurrent import futures
from contextlib import contextmanager
from functools import partial
from multiprocessing import active_children
from pathlib import Path
from threading import Event
from typing import Any, Callable, Iterable, Iterator, NamedTuple, Sequence
from urllib.parse import quote

if __name__ == "__main__":
    # Ctrl-C while the libraries are loaded ends the command without a traceback.
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")      # matrices are small here: more threads only wait
import numpy as np

import billp
import envs
import prompts
from billp import Agent, Config, Trajectory
from envs import Array
from prompts import LLM, Ask, Embed, Key, Reply, Usage


class UserError(Exception):
    """A mistake that the person at the keyboard can mend: one line, exit code 2."""


MENDABLE = (UserError, prompts.EndpointError, envs.BadData, OSError, MemoryError, futures.BrokenExecutor)
STAND_IN = ("offline, a rule-based stand-in: it shows the mechanism at work "
            "and is no evidence about real models")
WORLDS = "films, csv:DIR, movielens:DIR, steam:DIR, amazon:DIR"
METHODS = (*envs.POLICIES, *billp.METHODS)
ROLES = ("planner", "actor", "critic", "reflector")


def say(text: str) -> None:
    """Print to stderr what is no result, if anybody still listens."""
    try:
        print(text, file=sys.stderr, flush=True)
    except OSError:
        pass


# ---------------------------------------------------------------------------------- flags

TEXTS = {                               # flags that take a text: group, help
    "method": ("one run", f"{', '.join(METHODS)} (default billp)"),
    "world": ("one run", f"{WORLDS} (default films)"),
    "out": ("one run", "run directory (default: one of its own under runs/)"),
    "load": ("one run", "go on from the memories of another run, with users not yet seen"),
    "show": ("look at a finished run", "print one episode of this run directory"),
    "pick": ("look at a finished run", "which one: before, learn or after and its number, as after:3"),
    "experiment": ("experiments", "one or more, as table3,fig5, or all (listed at the end)"),
    "rows": ("experiments", "only these rows, as react,billp"),
    "models": ("experiments", "the models that table6 compares, as a,b"),
    "cluster": ("experiments", "address of a dask.distributed scheduler that offline runs are sent to"),
    "model": ("a real model", "model name, or offline (default: OPENAI_MODEL)"),
    "base_url": ("a real model", "endpoint (default: OPENAI_BASE_URL); the key is OPENAI_API_KEY"),
    "embed_model": ("a real model", "embedding model (default: OPENAI_EMBED_MODEL, or letter trigrams)"),
    "extra_body": ("a real model", "a JSON object: more fields for each chat request"),
    "lessons": ("method", "reflections to read: none, latest or nearest"),
}
NUMBERS = {                             # flags that take a number: group, lowest, highest, help
    "episodes": ("one run", 0, 10**9, "learning episodes (default 50; 100 in experiments)"),
    "users": ("one run", 1, 10**9, "held-out users to evaluate on (default 50)"),
    "seed": ("one run", 0, 10**18, "names every random draw (default 0)"),
    "workers": ("one run", 1, 1000, "episodes at once (default: 1 offline, else a batch); "
                                    "of offline experiments runs at once (default: all cores)"),
    "seeds": ("experiments", 1, 1000, "seeds of an experiment, from --seed on (default 5)"),
    "timeout": ("a real model", 0.001, 10**6, "seconds for one answer (default 300)"),
    "max_calls": ("a real model", 0, 10**12, "stop cleanly after so many requests to each model"),
    "gamma": ("method", 0, 1, "discount of later rewards; the paper's gamma"),
    "k_lessons": ("method", 0, 10**6, "reflections recalled; the paper's K"),
    "k_experience": ("method", 0, 10**6, "experiences recalled for the actor, counted for each item"),
    "k_actions": ("method", 0, 10**6, "items shown for their experience where there are no candidates"),
    "candidates": ("method", 0, 10**6, "free items shown to the actor; 0 as in the paper"),
    "lately": ("method", 1, 1000, "steps that the category tool calls lately"),
    "k_values": ("method", 0, 10**6, "values recalled for the critic"),
    "titles": ("method", 1, 1000, "items in a state's text and in a prompt's list"),
    "batch": ("method", 1, 10**9, "episodes between two updates of the memories"),
    "transcript": ("method", 1000, 10**9, "characters of a session in a prompt"),
    "temperature": ("method", 0, 2, "sampling temperature of every ask"),
    "reply_tokens": ("method", 1, 10**9, "longest reply asked for; models that reason need thousands"),
    "retries": ("method", 0, 100, "how often a malformed reply is asked for again"),
    "window": ("rule of leaving", 1, 1000, "recommended items that a user remembers; the paper's W"),
    "beta": ("rule of leaving", 0, 10**9, "an item nearer than this to one of them is too alike"),
    "floor": ("rule of leaving", 0, 10**9, "a rating below this disappoints"),
    "grace": ("rule of leaving", 0, 10**9, "steps at the start at which disappointment is forgiven"),
    "max_steps": ("rule of leaving", 1, 10**5, "the cap at which an episode is cut"),
}
SWITCHES = {                            # flags that are given or not, and with --no- before them
    "thoughts": ("method", "ask the planner for a thought before each action"),
    "experience": ("method", "write and recall the memories of actor and critic"),
    "baseline": ("method", "use the critic's V(s); without it every action is encouraged"),
    "repeats": ("method", "allow an item to come twice in a session, or from the history"),
    "replay": ("a real model", "answer from the run's log alone"),
    "prompts": ("look at a finished run", "print the prompts of the episode and their replies"),
    "plot": ("look at a finished run", "draw the learning curve into RUN/learning.png"),
}
GROUPS = {"one run": "", "look at a finished run": "", "experiments": "", "a real model": "",
          "method": "left out, the value of the row of --method stands; Config gives the reasons",
          "rule of leaving": "left out, the world's own value stands"}
DEFAULTS = {"users": 50, "method": "billp", "world": "films", "seed": 0, "seeds": 5, "timeout": 300.0,
            "header": [], "extra_body": "{}", "pick": ""}
NEEDS = {"seeds": "experiment", "rows": "experiment", "models": "experiment", "cluster": "experiment",
         "pick": "show", "prompts": "show", "plot": "show"}
ENDPOINT = ("base_url", "embed_model", "extra_body", "timeout", "header", "max_calls", "replay")
EXAMPLES = """\
examples:
  run.py --episodes 50
  run.py --method reflexion --seed 1
  run.py --experiment table3,table5 --seeds 3"""


class Parser(ArgumentParser):
    """A parser whose errors are one line."""

    def error(self, message: str) -> None:
        raise UserError(f"{message}; --help lists the flags")


def flag(name: str) -> str:
    """A flag as it is typed."""
    return "--" + name.replace("_", "-")


def number(name: str, kind: type) -> Callable[[str], float]:
    """A reader of the numbers that a flag takes."""
    _, low, high, _ = NUMBERS[name]

    def read(text: str) -> float:
        value = kind(text)
        if not low <= value <= high:
            raise ArgumentTypeError(f"{text} does not lie from {low} to {high}")
        return value
    read.__name__ = kind.__name__       # argparse says "invalid float value"
    return read


def make_parser() -> Parser:
    """All flags. One that is not given is None."""
    parser = Parser("run.py", allow_abbrev=False, formatter_class=RawDescriptionHelpFormatter, epilog=EXAMPLES,
                    description=f"Learn, then evaluate. The built-in model is {STAND_IN}.")
    groups = {title: parser.add_argument_group(title, text) for title, text in GROUPS.items()}
    fields = {**envs.Env._field_defaults, **Config._field_defaults, "timeout": 0.0}
    for name, (title, text) in TEXTS.items():
        groups[title].add_argument(flag(name), help=text)
    for name, (title, _, _, text) in NUMBERS.items():
        kind = type(fields.get(name, 0))
        if title == "method":
            text += f" (default {fields[name]})"
        groups[title].add_argument(flag(name), type=number(name, kind), metavar="N", help=text)
    for name, (title, text) in SWITCHES.items():
        groups[title].add_argument(flag(name), action=BooleanOptionalAction, help=text)
    groups["a real model"].add_argument("--header", action="append", metavar="K=V", help="one more request header")
    return parser


def check_flags(given: set[str]) -> None:
    """UserError for a flag that would have no effect."""
    for name in sorted(given):
        if name in NEEDS and NEEDS[name] not in given:
            raise UserError(f"{flag(name)} has no effect without {flag(NEEDS[name])}")
        if "show" in given and name != "show" and NEEDS.get(name) != "show":
            raise UserError(f"{flag(name)} has no effect beside --show")
        if "experiment" in given and name in ("method", "load"):
            raise UserError(f"{flag(name)} has no effect beside --experiment")


def checked_json(text: str) -> str:
    """The text, if it is a JSON object."""
    try:
        usable = isinstance(json.loads(text), dict)
    except ValueError:
        usable = False
    if not usable:
        raise UserError("--extra-body takes a JSON object, such as '{\"top_p\": 0.9}'")
    return text


def parse(argv: Sequence[str] | None) -> Namespace:
    """The flags, checked, with defaults filled in."""
    args, unknown = make_parser().parse_known_args(argv)
    if unknown:                         # words without a dash are not shown: one may be a key
        names = [word.partition("=")[0] for word in unknown if word.startswith("-")]
        what = f"unknown flag {names[0]}" if names else "every value needs its flag, as in --method billp"
        raise UserError(f"{what}; --help lists the flags")
    given = {name for name, value in vars(args).items() if value is not None}
    check_flags(given)
    args.given = given
    for name, default in DEFAULTS.items():
        if name not in given:
            setattr(args, name, default)
    for name in given & {"out", "load", "show"}:
        setattr(args, name, Path(getattr(args, name)).expanduser())
    if args.episodes is None:
        args.episodes = 100 if args.experiment else 50
    if args.method not in METHODS:
        raise UserError(f"no method {args.method!r}; there are {', '.join(METHODS)}")
    if args.lessons not in (None, "none", "latest", "nearest"):
        raise UserError("--lessons takes none, latest or nearest")
    args.experiment = args.experiment.split(",") if args.experiment is not None else []
    if args.experiment == ["all"]:
        args.experiment = list(EXPERIMENTS)
    for name in args.experiment:
        if name not in EXPERIMENTS:
            raise UserError(f"no experiment {name!r}; there are all, {', '.join(EXPERIMENTS)}")
    for header in args.header:
        if "=" not in header:
            raise UserError("--header takes NAME=VALUE")
    checked_json(args.extra_body)
    return args


class Settings(NamedTuple):
    """What determines a result, and nothing else: written to config.json."""
    world: str
    method: str
    model: str
    embedding: str
    seed: int
    episodes: int
    users: int
    first: int                  # learners that a loaded memory has met already
    load: str                   # digest of the memory started from, "" for none
    extra: str                  # digest of --extra-body, "" for none
    config: dict[str, Any]      # fields of Config
    rule: dict[str, Any]        # fields of the world that flags replace


def digest(content: bytes) -> str:
    """A short name for the content."""
    return hashlib.sha256(content).hexdigest()[:16]


def variable(*names: str) -> str:
    """The first of these environment variables that is set, or ""."""
    for name in names:
        if os.environ.get(name):
            return os.environ[name]
    return ""


def chosen(args: Namespace, names: Iterable[str]) -> dict[str, Any]:
    """The flags among `names` that were given."""
    values = {name: getattr(args, name) for name in names}
    return {name: value for name, value in values.items() if value is not None}


def model_names(args: Namespace) -> list[str]:
    """The models that the flags or the environment name, the main one first."""
    endpoint = args.base_url or args.replay or variable("OPENAI_BASE_URL", "OPENAI_API_BASE", "OPENAI_API_KEY")
    compared = args.models.split(",") if args.models else []
    model = args.model
    if not model and endpoint:
        model = variable("OPENAI_MODEL")
    if not model and compared:
        model = compared[0]
    if not model and not endpoint:
        model = "offline"
    names = list(dict.fromkeys([model, *compared]))
    if not all(names) or (not endpoint and names != ["offline"]):
        raise UserError("an endpoint and a model are needed: set OPENAI_BASE_URL and OPENAI_MODEL, or give "
                        "--base-url and --model; --model offline is the built-in reader")
    return names


def check_idle(args: Namespace, live: bool) -> None:
    """UserError for a flag that has no effect on the model or the method."""
    for name in sorted(args.given):
        if name in ENDPOINT and not live:
            raise UserError(f"{flag(name)} has no effect on the built-in reader, which asks no endpoint")
        is_policy = args.method in envs.POLICIES and not args.experiment
        if is_policy and name in Config._fields and name != "gamma":
            raise UserError(f"{flag(name)} has no effect on {args.method}, which asks no language model")


def settings(args: Namespace) -> Settings:
    """What the flags and the environment ask for. The runs of experiments add their own method's row."""
    models = model_names(args)
    live = models != ["offline"]
    embedding = args.embed_model or (live and variable("OPENAI_EMBED_MODEL")) or "hashed_ngrams"
    if "offline" in models and embedding != "hashed_ngrams":
        raise UserError("the built-in reader takes no embedding model")
    check_idle(args, live)
    memory, first = load_path(args.load, args.world, args.seed) if args.load else (None, 0)
    config = Config()._asdict()
    if not args.experiment:
        config |= billp.METHODS.get(args.method, {})
    return Settings(
        world=args.world, method=args.method, model=models[0], embedding=embedding, seed=args.seed,
        episodes=args.episodes, users=args.users, first=first,
        load=digest(memory.read_bytes()) if memory else "",
        extra=digest(args.extra_body.encode("utf-8", "replace")) if args.extra_body != "{}" else "",
        config=config | chosen(args, Config._fields), rule=chosen(args, envs.RULE))


# ---------------------------------------------------------------------------------- world


def load_world(name: str, seed: int) -> envs.Env:
    """A world by its name on the command line."""
    kind, _, folder = name.partition(":")
    if name == "films":
        return envs.films(seed)
    if kind == "csv" and folder:
        return envs.ratings_folder(folder, seed, notice=say)
    if kind == "movielens" and folder:
        return envs.movielens(folder, seed, notice=say)
    if kind in ("steam", "amazon") and folder:
        return envs.released(folder, kind)
    raise UserError(f"no world {name!r}; there are {WORLDS}")


def generator(seed: int, branch: int) -> np.random.Generator:
    """The random draws of one purpose in the run of this seed."""
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(branch,)))


class Place(NamedTuple):
    """Where a run takes place."""
    env: envs.Env
    learners: list[int]         # users to learn from, in the seed's order
    held_out: list[int]         # users to evaluate on


def build_place(run: Settings) -> Place:
    """The world of a run under its rule of leaving, with its users."""
    env = load_world(run.world, run.seed)._replace(**run.rule)
    users = np.arange(len(env.histories))
    learners, held_out = users[:env.learners], users[env.learners:]
    needed = run.first + run.episodes
    if needed > len(learners) and run.method in billp.METHODS:
        raise UserError(f"{run.world} has {len(learners)} learning users, too few for {needed} episodes")
    if run.users > len(held_out):
        raise UserError(f"--users {run.users}: {run.world} has {len(held_out)} held-out users")
    order = generator(run.seed, 0).permutation(learners)
    return Place(env, order[run.first:needed].tolist(),
                 generator(run.seed, 1).permutation(held_out)[:run.users].tolist())


# ---------------------------------------------------------------------------------- files


def dumps(value: Any, **options: Any) -> str:
    """JSON with letters of all alphabets as they are."""
    return json.dumps(value, ensure_ascii=False, **options)


def write(path: Path, content: str | bytes) -> None:
    """Write, then rename: the file is whole or not there."""
    if isinstance(content, str):
        content = content.encode("utf-8", "replace")
    draft = path.with_name(f"{path.name}.{os.getpid()}.part")
    draft.write_bytes(content)
    os.replace(draft, path)


def read_config(path: Path) -> dict[str, Any] | None:
    """The config.json of a run directory, or None where there is none."""
    if not path.exists():
        return None
    try:
        return dict(json.loads(path.read_bytes()))
    except (ValueError, TypeError):
        raise UserError(f"{path} is damaged: delete it, or choose another --out") from None


def run_name(config: dict[str, Any], label: str) -> str:
    """The name of a run directory: world, method and a digest of the configuration."""
    world = config["world"].partition(":")[0]
    return f"{world}-{label}-seed{config['seed']}-{digest(dumps(config).encode('utf-8', 'replace'))[:6]}"


def run_directory(args: Namespace, config: dict[str, Any]) -> Path:
    """The directory of this run, made if need be. UserError if it holds anything else."""
    config = json.loads(json.dumps(config))
    path = args.out or Path("runs", run_name(config, "+".join(args.experiment) or args.method))
    earlier = read_config(path / "config.json")
    if earlier is not None:
        changed = [name for name in {**earlier, **config} if earlier.get(name) != config.get(name)]
        if changed:
            raise UserError(f"{path} holds a run of another configuration ({', '.join(changed)}); "
                            "choose another --out")
    elif path.exists() and any(file.suffix != ".part" for file in path.iterdir()):
        raise UserError(f"{path} is not empty and holds no run; choose another --out")
    elif args.replay:
        raise UserError(f"{path} holds no run to replay: run without --replay, or give its --out")
    path.mkdir(parents=True, exist_ok=True)
    write(path / "config.json", dumps(config, indent=1) + "\n")
    return path


def save_memory(agent: Agent, embedding: str) -> str:
    """The memories as JSON, one record a line. Vectors are left out and made again on loading."""
    parts = [f'{{"billp": 1, "embedding": {dumps(embedding)}']
    for role, memory in agent._asdict().items():
        rows = ",\n".join(dumps(record) for record in billp.records(memory))
        parts.append(f'"{role}": [\n{rows}\n]')
    return ",\n".join(parts) + "}\n"


def load_path(path: Path, world: str, seed: int) -> tuple[Path, int]:
    """The memory.json of a run (a directory or the file), and how many learners of this world it has met."""
    memory = path / "memory.json" if path.is_dir() else path
    if not memory.is_file():
        raise UserError(f"{path} holds no memory.json: --load takes the directory of a finished run")
    config = read_config(memory.with_name("config.json")) or {}
    if config.get("world") != world or config.get("seed") != seed:
        return memory, 0
    return memory, config["first"] + config["episodes"]


def read_record(role: str, row: list) -> billp.Record:
    """A record of a role's memory; ValueError or TypeError if it is damaged."""
    record = billp.Record(*row)
    usable = {str: role == "planner", int: role != "planner", float: role == "critic"}
    if not usable.get(type(record.content)) or type(record.text) is not str or type(record.item) is not str:
        raise ValueError("a field of another type")
    if role == "actor" and record.content not in (0, 1) or role == "critic" and not np.isfinite(record.content):
        raise ValueError("a number out of range")
    return record


def read_memory(path: Path, embedding: str) -> dict[str, list[billp.Record]]:
    """The records of each role that `save_memory` wrote. UserError for any other file."""
    try:
        content = json.loads(path.read_bytes())
        made_with = content["embedding"]
        records = {role: [read_record(role, row) for row in content[role]] for role in Agent._fields}
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{path} is not a memory.json of this program") from None
    if made_with != embedding:
        raise UserError(f"{path} was made with the embedding {made_with}, not {embedding}")
    return records


def agent_of(records: dict[str, list[billp.Record]], embed: Embed) -> Agent:
    """The agent with these records. Vectors are made again."""
    memories = {}
    for role, rows in records.items():
        memories[role] = billp.EMPTY
        if rows:
            vectors = embed([record.text for record in rows])
            memories[role] = billp.push(billp.EMPTY, billp.Chunk(tuple(rows), vectors))
    return Agent(**memories)


# --------------------------------------------------------------------------------- one run


class Live(NamedTuple):
    """What is known of a run's calls at any moment, however it ends. Appending is safe among threads."""
    replies: list[tuple[str, Reply]]    # role and reply, from the log or new
    paid: list[str]                     # the role of each reply that was asked for now
    stats: dict[str, Any]                       # what an endpoint's client counts
    failures: list[Exception]                   # of calls that failed for good
    stop: Event                                 # set when no further call shall begin


def new_live() -> Live:
    """Nothing has been asked yet."""
    return Live([], [], {}, [], Event())


def counted(llm: LLM, live: Live, ask: Ask) -> Reply:
    """The model's reply, noted. After one call has failed for good no other begins."""
    if live.stop.is_set():
        raise prompts.EndpointError("stopped")
    try:
        reply = llm(ask)
    except prompts.EndpointError as error:
        live.failures.append(error)
        live.stop.set()
        raise
    live.replies.append((ask.role, reply))
    return reply


def paid(llm: LLM, live: Live, ask: Ask) -> Reply:
    """The model's reply, noted as asked for now."""
    reply = llm(ask)
    live.paid.append(ask.role)
    return reply


def connect(args: Namespace, run: Settings, folder: Path, live: Live) -> tuple[LLM, Embed]:
    """The model and the embedding of a run. Those of an endpoint are recorded in the folder."""
    if run.model == "offline":
        return prompts.offline, prompts.hashed_ngrams
    url = args.base_url or variable("OPENAI_BASE_URL", "OPENAI_API_BASE") or "https://api.openai.com/v1"
    options = {"key": variable("OPENAI_API_KEY"), "timeout": args.timeout, "notice": say, "stats": live.stats,
               "sleep": live.stop.wait, "headers": dict(header.split("=", 1) for header in args.header)}
    folder.mkdir(exist_ok=True)
    log = prompts.open_log(folder / "calls.jsonl", [run.model, run.embedding, run.extra],
                           replay=bool(args.replay))
    llm = prompts.openai(url, run.model, extra=json.loads(args.extra_body), **options)
    if args.max_calls is not None:
        llm = prompts.limited(llm, args.max_calls)
    llm = partial(paid, llm, live)
    embed = prompts.hashed_ngrams
    if run.embedding != "hashed_ngrams":
        embed = prompts.recorded_embed(prompts.embeddings(url, run.embedding, **options), log)
    return prompts.recorded(llm, log), embed


@contextmanager
def parallel(pool: futures.Executor | None, stop: Event) -> Iterator[Callable]:
    """The pool's map, or the built-in one. After an error no further call begins."""
    if pool is None:
        yield map
        return
    try:
        yield pool.map
    except BaseException as error:
        stop.set()
        # Answers on their way are waited for and logged, except after Ctrl-C.
        pool.shutdown(wait=not isinstance(error, KeyboardInterrupt))
        for process in active_children():
            process.terminate()
        raise
    pool.shutdown()


def threads(count: int | None) -> futures.Executor | None:
    """A pool of threads, or None where one episode is played after the other."""
    return futures.ThreadPoolExecutor(count) if count and count > 1 else None


class Outcome(NamedTuple):
    """What a run gives."""
    before: Array          # scores [1, users, 2] of the held-out users
    after: Array
    items: list[list[int]]      # what each held-out user was recommended after learning
    agent: Agent = billp.NOVICE
    episodes: tuple[Trajectory, ...] = ()       # before, while and after learning


def watched(pmap: Callable, totals: dict[str, int]) -> Callable:
    """The same map, which tells after every tenth episode how far its phase has come."""
    lengths: dict[str, list[int]] = {phase: [] for phase in totals}

    def watched_map(function: Callable, users: Sequence[int], keys: Sequence[Key]) -> Iterator[Trajectory]:
        for trajectory in pmap(function, users, keys):
            phase = trajectory.last.key.phase
            seen = lengths[phase]
            seen.append(billp.score(trajectory)[0])
            if len(seen) % 10 == 0 or len(seen) == totals[phase]:
                say(f"{phase}: {len(seen)} of {totals[phase]} episodes, mean Len {np.mean(seen):.1f}")
            yield trajectory
    return watched_map


def scores_of(trajectories: Iterable[Trajectory]) -> Array:
    """Scores [1, episodes, 2]."""
    pairs = [billp.score(trajectory) for trajectory in trajectories]
    return envs.scores([length for length, _ in pairs], [total for _, total in pairs])


def perform_policy(run: Settings, place: Place) -> Outcome:
    """A run of a policy without a language model: evaluated untrained and trained, with the same draws."""
    played, scores = None, []
    for episodes in (0, run.episodes):
        policy = envs.policy_named(run.method, place.env, episodes, run.seed, run.config["gamma"])
        played = envs.rollout(place.env, np.array(place.held_out), policy, generator(run.seed, 2))
        scores.append(envs.scores((played.items >= 0).sum(1), played.rewards.sum(1)))
    items = [row[row >= 0].tolist() for row in played.items]
    return Outcome(scores[0], scores[1], items)


def perform(run: Settings, place: Place, agent: Agent, llm: LLM, embed: Embed, pmap: Callable,
            phases: Sequence[str] = ("before", "after")) -> Outcome:
    """Evaluate, learn, and evaluate the same users again; or only before, or only after learning."""
    if run.method in envs.POLICIES:
        return perform_policy(run, place)
    config = Config(**run.config)
    catalog = prompts.catalog(place.env, embed)
    before, learned, after = (), (), ()
    if "before" in phases:
        before = billp.evaluate(catalog, place.held_out, agent, llm, run.seed, "before", config, pmap)
    for agent, trajectories in billp.train(catalog, place.learners, llm, run.seed, agent, config, pmap, run.first):
        learned += trajectories
    if "after" in phases:
        after = billp.evaluate(catalog, place.held_out, agent, llm, run.seed, "after", config, pmap)
    items = []
    for trajectory in after:
        length, _ = billp.score(trajectory)
        items.append([step.act.value for step in trajectory.steps[:length]])
    return Outcome(scores_of(before or after), scores_of(after or before), items, agent, before + learned + after)


def calls_by_role(live: Live) -> dict[str, dict[str, int | None]]:
    """Calls and tokens of each role. A kind of token that the server never counts is None."""
    table = {}
    for role in ROLES:
        usages = [reply.usage for answered, reply in live.replies if answered == role]
        table[role] = {"calls": len(usages)}
        for kind in Usage._fields:
            counts = [getattr(usage, kind) for usage in usages if getattr(usage, kind) is not None]
            table[role][kind] = sum(counts) if counts else None
    return table


def cost(outcome: Outcome, live: Live, began: float) -> dict[str, Any]:
    """What a run cost: replies that were of no use, calls and tokens, seconds."""
    steps = [step for trajectory in outcome.episodes for step in trajectory.steps]
    answers = [answer for step in steps for answer in (step.plan, step.act)]
    for trajectory in outcome.episodes:
        answers += trajectory.answers
    unnamed = [not step.act.exact for step in steps]
    return {"malformed": sum(answer.malformed for answer in answers),
            "fallbacks": sum(answer.fallback for answer in answers),
            "ungrounded": round(float(np.mean(unnamed)), 4) if steps else 0.0,
            "calls": calls_by_role(live), "endpoint": live.stats, "seconds": round(time.perf_counter() - began, 2)}


def describe(env: envs.Env, trajectory: Trajectory) -> dict[str, Any]:
    """One episode as a line of episodes.jsonl: all that --show needs."""
    steps = []
    for step in trajectory.steps:
        steps.append({"lessons": step.plan.recalled, "thought": step.plan.value,
                      "listed": step.act.recalled, "said": step.act.said, "exact": step.act.exact,
                      "item": step.line, "reward": step.reward})
    left = ""
    if trajectory.terminated:
        left = envs.why_left(env, trajectory.user, [step.act.value for step in trajectory.steps])
    key, gained = trajectory.last.key, trajectory.gained
    credited = gained.actor != billp.EMPTY
    return {"phase": key.phase, "episode": key.episode, "user": trajectory.user,
            "history": trajectory.last.history, "steps": steps, "left": prompts.clean(left),
            "values": trajectory.values if credited else (),
            "advantages": trajectory.advantages if credited else (),
            "reflection": "".join(record.content for record in billp.records(gained.planner))}


def summarise(run: Settings, outcome: Outcome, live: Live, began: float) -> dict[str, Any]:
    """summary.json, which other programs read. An interval is [mean, low, high], 95 %."""
    lengths = [billp.score(t)[0] for t in outcome.episodes if t.last.key.phase == "learn"]
    size = run.config["batch"]
    batches = [float(np.mean(lengths[start:start + size])) for start in range(0, len(lengths), size)]
    summary = run._asdict()
    summary["config"] = summary["config"] | summary.pop("rule")
    difference = envs.metrics(outcome.after, outcome.before) if run.episodes else None
    return summary | {"learning": batches, "before": envs.metrics(outcome.before),
                      "after": envs.metrics(outcome.after), "difference": difference,
                      "reflections": len(billp.records(outcome.agent.planner)),
                      **cost(outcome, live, began)}


def interval(figure: Sequence[float]) -> str:
    """A mean with its interval."""
    mean, low, high = figure
    return f"{mean:.2f} [{low:.2f}, {high:.2f}]"


def grid(rows: dict[str, dict[str, str]]) -> list[str]:
    """A table as lines: a heading, then one row a line. All rows have the columns of the first."""
    columns = list(next(iter(rows.values())))
    label_width = max(len(label) for label in rows)
    widths = {name: max(len(row[name]) for row in [*rows.values(), {name: name}]) for name in columns}
    lines = []
    for label, row in {"": {name: name for name in columns}, **rows}.items():
        cells = [f"{row[name]:>{widths[name]}}" for name in columns]
        lines.append("  ".join([f"{label:{label_width}}", *cells]).rstrip())
    return lines


def spelled_calls(counts: dict[str, int | None]) -> str:
    """Calls, and tokens of the kinds that the server counts.

    >>> spelled_calls({"calls": 2, "prompt": 9, "cached": None, "completion": 4})
    '2 calls, tokens: prompt 9, completion 4'
    """
    tokens = [f"{kind} {counts[kind]}" for kind in Usage._fields if counts[kind] is not None]
    return f"{counts['calls']} calls" + (f", tokens: {', '.join(tokens)}" if tokens else "")


def ledger(live: Live) -> list[str]:
    """Calls and tokens of each role, then what the endpoint's client counted."""
    lines = []
    for role, counts in calls_by_role(live).items():
        if counts["calls"]:
            lines.append(f"{role:10}{spelled_calls(counts)}")
    if live.stats:
        known = len(live.replies) - len(live.paid)
        lines.append(f"answers   {known} from the log, {len(live.paid)} asked for now")
        lines.append(f"requests  {live.stats.get('requests', 0)}, retries {sum(live.stats.get('retries', {}).values())}, "
                     f"system {live.stats.get('system_fingerprint', 'not named')}")
        for reason, number in live.stats.get("empty", {}).items():
            lines.append(f"empty     {number} replies: {reason}")
    return lines


def report(summary: dict[str, Any], about: str, lessons: Sequence[str], live: Live) -> list[str]:
    """The results as a person reads them."""
    policy = summary["method"] in envs.POLICIES
    model = "none: this policy asks no language model" if policy else summary["model"]
    rows = {}
    for label in ("before", "after", "difference"):
        if summary[label]:
            rows[label] = {f"{name} [95 %]": interval(figure) for name, figure in summary[label].items()}
    lines = [f"{summary['method']} on {summary['world']}, seed {summary['seed']}: {summary['episodes']} "
             f"learning episodes, then {summary['users']} held-out users"]
    if about:
        lines.append(f"world     {about}")
    lines += [f"model     {STAND_IN if model == 'offline' else model}", "", *grid(rows), ""]
    learning = summary["learning"]
    if learning:
        top = max(learning) or 1
        bars = "".join("▁▂▃▄▅▆▇█"[int(7 * length / top)] for length in learning)
        lines.append(f"learning  {bars}  mean Len of each batch, {min(learning):.1f} to {max(learning):.1f}")
    lines += [f"lesson    {lesson}" for lesson in lessons]
    lines += ledger(live)
    if summary["calls"]["actor"]["calls"]:
        lines.append(f"replies   malformed {summary['malformed']}, fallbacks {summary['fallbacks']}, "
                     f"actions that named no free item {summary['ungrounded']:.0%}")
    return [*lines, f"seconds   {summary['seconds']}"]


def phases_of(run: Settings) -> tuple[str, ...]:
    """When the held-out users are asked. Where nothing is learned, once is enough."""
    return ("before", "after") if run.episodes else ("before",)


def one_run(args: Namespace, live: Live) -> None:
    """Learn, evaluate, write the run directory, print the results."""
    began = time.perf_counter()
    run = settings(args)
    place = build_place(run)
    records = {}
    if args.load:
        path, _ = load_path(args.load, run.world, run.seed)
        records = read_memory(path, run.embedding)
    folder = run_directory(args, run._asdict())
    llm, embed = connect(args, run, folder, live)
    agent = agent_of(records, embed)
    totals = {"before": run.users, "learn": run.episodes, "after": run.users}
    workers = args.workers or (1 if run.model == "offline" else run.config["batch"])
    with parallel(threads(workers), live.stop) as pmap:
        outcome = perform(run, place, agent, partial(counted, llm, live), embed, watched(pmap, totals), phases_of(run))
    summary = summarise(run, outcome, live, began)
    lessons = [record.content for record in billp.records(outcome.agent.planner)]
    episodes = [dumps(describe(place.env, trajectory)) + "\n" for trajectory in outcome.episodes]
    write(folder / "episodes.jsonl", "".join(episodes))
    write(folder / "memory.json", save_memory(outcome.agent, run.embedding))
    write(folder / "summary.json", dumps(summary, indent=1) + "\n")
    print("\n".join([*report(summary, place.env.about, lessons[-2:], live), f"run       {folder}"]))


# ------------------------------------------------------------------------ a look at a run


def story(episode: dict[str, Any]) -> list[str]:
    """An episode in words: what was recalled, thought, done, seen and learned at each step."""
    lines = [f"{episode['phase']} episode {episode['episode']}, user {episode['user']}", "", "liked before"]
    lines += [f"    {line}" for line in episode["history"]]
    for n, step in enumerate(episode["steps"]):
        rows = [("recalled", lesson) for lesson in step["lessons"]]
        rows.append(("thought", step["thought"]))
        rows += [("listed", prompts.render_candidate(prompts.Candidate(*item))) for item in step["listed"][:5]]
        if len(step["listed"]) > 5:
            rows.append(("", f"and {len(step['listed']) - 5} more"))
        nearest = "" if step["exact"] else " (in its place: no free title was named)"
        rows += [("said", step["said"]), ("item", step["item"] + nearest)]
        last = n == len(episode["steps"]) - 1
        left = f", the user left: {episode['left']}" if last and episode["left"] else ""
        rows.append(("reward", f"{step['reward']:g}{left}"))
        if episode["advantages"]:
            gain = episode["advantages"][n]
            verdict = prompts.VERDICT[gain >= 0]
            rows.append(("value", f"{episode['values'][n]:.2f}, advantage {gain:+.2f}: {verdict}"))
        lines += ["", f"step {n + 1}", *(f"    {label:12}{text}" for label, text in rows if text)]
    if not episode["left"]:
        lines += ["", "the user stayed to the last step"]
    if episode["reflection"]:
        lines += ["", f"reflection  {episode['reflection']}"]
    return lines


def read_episodes(folder: Path) -> list[dict[str, Any]]:
    """The episodes of a finished run, in the order in which they were played."""
    try:
        lines = (folder / "episodes.jsonl").read_bytes().splitlines()
        episodes = [json.loads(line) for line in lines]
    except (OSError, ValueError):
        raise UserError(f"{folder} holds no episodes.jsonl: --show takes the directory of a finished run") from None
    if not episodes:
        raise UserError(f"{folder} holds no episodes: policies without a language model keep none")
    return episodes


def picked(episodes: list[dict[str, Any]], pick: str) -> dict[str, Any]:
    """The episode that --pick names; by default the last one learned from, or else the last one."""
    phase, _, number = pick.partition(":")
    for episode in reversed(episodes):
        if episode["phase"] == (phase or "learn") and number in ("", str(episode["episode"])):
            return episode
    if pick:
        raise UserError(f"the run has no episode {pick!r}: --pick takes before, learn or after, as in after:3")
    return episodes[-1]


def asks_of(folder: Path, phase: str, number: int) -> list[tuple[Ask, Reply]]:
    """The asks of an episode with their replies, made again from the log or by the stand-in."""
    config = read_config(folder / "config.json") or {}
    if config.get("load", "") or "experiment" in config:
        raise UserError(f"{folder} was started by --load or --experiment: its prompts cannot be made again")
    run = Settings(**config)
    llm, embed = prompts.offline, prompts.hashed_ngrams
    if run.model != "offline":
        log = prompts.open_log(folder / "calls.jsonl", [run.model, run.embedding, run.extra], replay=True)
        llm = prompts.recorded(prompts.offline, log)
        if run.embedding != "hashed_ngrams":
            embed = prompts.recorded_embed(prompts.hashed_ngrams, log)
    pairs = []

    def tapped(ask: Ask) -> Reply:
        reply = llm(ask)
        if (ask.key.phase, ask.key.episode) == (phase, number):
            pairs.append((ask, reply))
        return reply

    perform(run, build_place(run), billp.NOVICE, tapped, embed, map, phases_of(run))
    return pairs


def show_prompts(folder: Path, episode: dict[str, Any]) -> None:
    """Print what the model was sent in an episode, and what it answered."""
    for ask, reply in asks_of(folder, episode["phase"], episode["episode"]):
        print(f"==== {ask.role}, step {ask.key.step + 1}, attempt {ask.key.attempt + 1}")
        for role, text in ask.messages:
            print(f"---- {role}\n{text}")
        print(f"---- reply\n{reply.text}\n")


def plot_learning(folder: Path, episodes: list[dict[str, Any]]) -> None:
    """Draw the length of each learning episode, and the mean of each batch, into learning.png."""
    lengths = [len(e["steps"]) - bool(e["left"]) for e in episodes if e["phase"] == "learn"]
    size = (read_config(folder / "config.json") or {"config": {"batch": 10}})["config"]["batch"]
    figure = new_figure()
    if figure is None or not lengths:
        raise UserError("no picture: the run has no learning episodes, or matplotlib is not installed")
    axes = figure.subplots()
    axes.plot(range(1, len(lengths) + 1), lengths, "o", color="#BBBBBB", label="one episode")
    starts = range(0, len(lengths), size)
    means = [np.mean(lengths[start:start + size]) for start in starts]
    middles = [start + (min(size, len(lengths) - start) + 1) / 2 for start in starts]
    axes.plot(middles, means, "o-", color=COLOURS[0], label=f"mean of {size} episodes")
    axes.set(xlabel="learning episode", ylabel="steps until the user left", ylim=(0, None))
    axes.legend(frameon=False)
    save_figure(figure, folder / "learning.png")
    print(folder / "learning.png")


def show(args: Namespace) -> None:
    """Print one episode of a finished run, its prompts, or draw its learning curve."""
    episodes = read_episodes(args.show)
    episode = picked(episodes, args.pick)
    if args.plot:
        plot_learning(args.show, episodes)
    elif args.prompts:
        show_prompts(args.show, episode)
    else:
        print("\n".join(story(episode)))


# ------------------------------------------------------------------------------ experiments


class Experiment(NamedTuple):
    """A table or figure of the paper; `curve` is ours."""
    rows: str                           # methods, or method:episodes; table6 has --models instead
    varied: str = ""                    # what else differs between its cells: episodes, window or model
    places: Sequence[int | None] = (None,)      # the values of that
    measure: str = "scores"             # what is measured: scores, shares or values
    axis: str = ""                      # the name of the x axis, if there is one
    label: str = "reward an episode"    # the name of the y axis


EXPERIMENTS = {
    "table3": Experiment("random popular greedy varied common-sense one-list bandit a2c a2c:100000 act react reflexion billp oracle"),
    "table5": Experiment("billp-no-macro billp-no-micro billp-no-critic billp"),
    "fig3": Experiment("billp a2c:10000", measure="shares", axis="popularity of items, by quintile",
                       label="share of recommendations"),
    "fig4": Experiment("billp", "episodes", (10, 50, 100), "values", "learning episodes",
                       "mean squared error of the value"),
    "fig5": Experiment("react a2c reflexion billp", "window", (1, 2, 4, 6, 8),
                       axis="window W (items that a user remembers)"),
    "table6": Experiment("", "model"),
    "curve": Experiment("a2c billp", "episodes", (0, 10, 20, 50, 100, 200), axis="learning episodes"),
}


class Cell(NamedTuple):
    """One row of a table, or one point of a line."""
    series: str                         # the method or model
    x: int | None                       # the place on the x axis, if there is one
    runs: list[Settings]                # one for each seed


class Job(NamedTuple):
    """A run and what is measured in it."""
    run: Settings
    measure: str


class Result(NamedTuple):
    """What a job gives."""
    samples: list                       # [users or states, k]
    cost: dict[str, Any]


def cell_settings(base: Settings, experiment: Experiment, series: str, x: int | None, seed: int) -> Settings:
    """The settings of one run of a cell."""
    run = base._replace(seed=seed)
    text = series
    if experiment.varied == "model":
        run = run._replace(model=series)
        text = base.method
    if experiment.varied == "window":
        run = run._replace(rule=base.rule | {"window": x})
    method, _, budget = text.partition(":")
    config = base.config | billp.METHODS.get(method, {})
    episodes = int(budget or base.episodes)
    if experiment.varied == "episodes":
        episodes = x
    if config["lessons"] == "none" and not config["experience"]:
        episodes = 0                    # this method learns nothing
    return run._replace(method=method, episodes=episodes, config=config)


def cells_of(args: Namespace, base: Settings, name: str) -> list[Cell]:
    """The cells of an experiment. A mistake is found before any run begins."""
    experiment = EXPERIMENTS[name]
    known = experiment.rows.split() or model_names(args)
    rows = args.rows.split(",") if args.rows and experiment.rows else known
    for row in rows:
        if row not in known:
            raise UserError(f"--rows {row}: {name} has no such row, only {' '.join(known)}")
    seeds = range(base.seed, base.seed + args.seeds)
    cells = []
    for series in known:
        for x in experiment.places:
            if series in rows:
                runs = [cell_settings(base, experiment, series, x, seed) for seed in seeds]
                build_place(runs[0])
                cells.append(Cell(series, x, runs))
    return cells


def shares(place: Place, outcome: Outcome) -> list[list[int]]:
    """[users, 5]: how often each user was given items of each quintile by popularity, the least popular first."""
    order = np.argsort(envs.popularity(place.env), kind="stable")
    quintile = np.empty(len(order), int)
    quintile[order] = np.arange(len(order)) * 5 // len(order)
    return [np.bincount(quintile[items], minlength=5).tolist() for items in outcome.items]


def measure_job(job: Job, agent: Agent, llm: LLM, embed: Embed, pmap: Callable, live: Live) -> Result:
    """Perform a run and measure what its experiment needs."""
    began = time.perf_counter()
    place = build_place(job.run)
    outcome = perform(job.run, place, agent, llm, embed, pmap, ("after",))
    if job.measure == "shares":
        samples = shares(place, outcome)
    elif job.measure == "values":
        samples = critic_errors(job.run, place, llm, embed, pmap)
    else:
        samples = outcome.after[0].tolist()
    return Result(samples, cost(outcome, live, began))


def offline_job(job: Job) -> Result:
    """A job of the stand-in or of a policy, complete in itself, so that any process can do it."""
    live = new_live()
    llm = partial(counted, prompts.offline, live)
    return measure_job(job, billp.NOVICE, llm, prompts.hashed_ngrams, map, live)


def critic_errors(run: Settings, place: Place, llm: LLM, embed: Embed, pmap: Callable,
                  repeats: int = 6, states: int = 2, draws: int = 200) -> list[list[float]]:
    """[states, 6]: bias, variance and mean squared error of one return, then of the critic's V.

    Errors are taken at the first state of a session, over `repeats` learning runs that differ in their random
    draws. The reference is the mean of `draws` further returns of the same agent from the same state.
    """
    config = Config(**run.config)
    catalog = prompts.catalog(place.env, embed)
    horizon = 1
    while horizon < place.env.max_steps and config.gamma ** horizon >= 0.001:
        horizon += 1                    # later rewards hardly count
    short = catalog._replace(env=place.env._replace(max_steps=horizon))
    errors = np.zeros((repeats, states, 2))
    for repeat in range(repeats):
        seed = run.seed + 1000 * (repeat + 1)
        agent = billp.NOVICE
        learners = generator(seed, 0).permutation(place.learners).tolist()
        for agent, _ in billp.train(catalog, learners, llm, seed, agent, config, pmap):
            pass
        for i, user in enumerate(place.held_out[:states]):
            play = partial(billp.episode, short, agent=agent, llm=llm, config=config)
            keys = [Key(seed, "continue", draw) for draw in range(draws + 1)]
            returns = []
            for trajectory in pmap(play, [user] * len(keys), keys):
                rewards = [step.reward for step in trajectory.steps]
                returns.append(billp.discounted_return(rewards, config.gamma))
            reference = np.mean(returns[1:])
            state = billp.opening(catalog, user, Key(seed, "value", i), config)
            answer, _ = billp.critic(state, agent.critic, llm, config)
            errors[repeat, i] = returns[0] - reference, answer.value - reference
    bias, variance = errors.mean(0), errors.var(0)
    return np.stack([bias, variance, bias ** 2 + variance], -1).reshape(states, 6).tolist()


class Row(NamedTuple):
    """One row of a table, or one point of a picture. Intervals are [mean, low, high], 95 %."""
    series: str
    x: int | None
    figures: dict[str, list[float]]
    gain: list[float] | None = None     # R_traj less that of billp, paired by user


def share_of(counts: Array) -> Array:
    """Counts [..., seeds, users, 5] -> the share of each quintile [..., 5]."""
    sums = counts.sum((-3, -2))
    return sums / np.maximum(sums.sum(-1, keepdims=True), 1)


def mean_of(samples: Array) -> Array:
    """Samples [..., seeds, states, k] -> their means [..., k]."""
    return samples.mean((-3, -2))


def rows_of(cell: Cell, measure: str, samples: Array, reference: Array | None) -> list[Row]:
    """The rows of one cell, from its samples [seeds, users, k]. `reference` is that of billp, if it is another."""
    if measure == "shares":
        intervals = envs.intervals(share_of, samples)
        return [Row(cell.series, place, {"share": figure}) for place, figure in enumerate(intervals, 1)]
    if measure == "values":
        names = ("bias", "variance", "MSE")
        intervals = envs.intervals(mean_of, samples)
        return [Row("one return", cell.x, dict(zip(names, intervals[:3]))),
                Row("critic", cell.x, dict(zip(names, intervals[3:])))]
    gain = None if reference is None else envs.metrics(samples, reference)["R_traj"]
    return [Row(cell.series, cell.x, envs.metrics(samples), gain)]


def verdict(gain: list[float]) -> str:
    """How a row compares with billp. It is higher or lower only if the interval holds no 0."""
    _, low, high = gain
    if low > 0:
        return "higher"
    return "lower" if high < 0 else "not significant"


def label_of(row: Row | Cell) -> str:
    """The name of a row in tables."""
    return row.series if row.x is None else f"{row.series}, {row.x}"


def table_of(rows: Sequence[Row]) -> list[str]:
    """The rows as lines of text."""
    texts = {}
    for row in rows:
        cells = {f"{name} [95 %]": interval(figure) for name, figure in row.figures.items()}
        if any(row.gain for row in rows):
            cells["R_traj less billp's"] = interval(row.gain) if row.gain else "-"
            cells[""] = verdict(row.gain) if row.gain else ""
        texts[label_of(row)] = cells
    return grid(texts)


COLOURS = "#0072B2 #D55E00 #009E73 #CC79A7 #E69F00 #56B4E9 #000000".split()     # Okabe and Ito
COLOUR = {                              # one colour for a method in all pictures; ablations share that of billp
    "billp": "#0072B2", "reflexion": "#D55E00", "react": "#009E73", "act": "#CC79A7", "a2c": "#E69F00",
    "one return": "#E69F00", "critic": "#0072B2",
}
TITLES = {"table3": "Main comparison", "table5": "Ablation", "fig3": "Popularity of what is recommended",
          "fig4": "The critic's estimate and one return", "fig5": "How many items a user remembers",
          "table6": "Language models", "curve": "Learning curve"}


def new_figure() -> Any:
    """An empty figure, or None where matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return None
    return Figure((8, 4.5), dpi=100, layout="constrained")


def save_figure(figure: Any, path: Path) -> None:
    """Write a picture whole or not at all."""
    draft = path.with_suffix(".part.png")
    figure.savefig(draft)
    os.replace(draft, path)


def plot_bars(axes: Any, rows: Sequence[Row], drawn: str) -> None:
    """Horizontal bars with intervals. A bar far beyond the methods with language is cut and says so."""
    means = [row.figures[drawn][0] for row in rows]
    highest = [row.figures[drawn][2] for row in rows if row.series in billp.METHODS]
    limit = 1.3 * max(highest or means)
    for place, row in enumerate(reversed(rows)):
        mean, low, high = row.figures[drawn]
        colour = COLOUR.get(row.series.partition(":")[0].partition("-no-")[0], "#999999")
        axes.barh(place, mean, xerr=[[mean - low], [high - mean]], color=colour, capsize=3)
        if mean > limit:
            axes.text(limit * 0.99, place, f"{mean:.0f} (cut)", ha="right", va="center", color="white")
    axes.set_yticks(range(len(rows)), [row.series for row in reversed(rows)])
    axes.set_xlim(0, min(limit, 1.05 * max(row.figures[drawn][2] for row in rows)))


def plot_lines(axes: Any, rows: Sequence[Row], drawn: str) -> None:
    """One line with intervals for each series."""
    for place, series in enumerate(dict.fromkeys(row.series for row in rows)):
        points = [row for row in rows if row.series == series]
        mean, low, high = np.array([row.figures[drawn] for row in points]).T
        colour = COLOUR.get(series.partition(":")[0], COLOURS[place % len(COLOURS)])
        axes.errorbar([row.x for row in points], mean, [mean - low, high - mean], label=series, color=colour,
                      marker="o", capsize=3)
    axes.set_xticks(sorted({row.x for row in rows}))
    axes.set_ylim(0, None)
    axes.legend(frameon=False)


def plot(name: str, heading: str, rows: Sequence[Row], path: Path) -> None:
    """Draw an experiment: lines over its x axis, or else bars."""
    figure = new_figure()
    if figure is None:
        say("no picture: pip install -e '.[plot]' draws it")
        return
    experiment = EXPERIMENTS[name]
    axes = figure.subplots()
    drawn = {"scores": "R_traj", "shares": "share", "values": "MSE"}[experiment.measure]
    label = f"{experiment.label} (mean, 95 % confidence interval)"
    if experiment.axis:
        plot_lines(axes, rows, drawn)
        axes.set(xlabel=experiment.axis, ylabel=label)
    else:
        plot_bars(axes, rows, drawn)
        axes.set_xlabel(label)
    axes.set_title(f"{TITLES[name]}\n{heading}", fontsize=9, parse_math=False)
    axes.grid(alpha=0.3)
    save_figure(figure, path)


def bill(cell: Cell, results: Sequence[Result]) -> str:
    """What a cell cost: calls and tokens of all its seeds; per run, replies of no use and seconds."""
    totals: dict[str, int | None] = {}
    for result in results:
        for counts in result.cost["calls"].values():
            for kind, count in counts.items():
                totals[kind] = totals.get(kind) if count is None else (totals.get(kind) or 0) + count
    means = {}
    for kind in ("malformed", "fallbacks", "ungrounded", "seconds"):
        means[kind] = np.mean([result.cost[kind] for result in results])
    return (f"{label_of(cell)}: {spelled_calls(totals)}; a run: malformed {means['malformed']:.1f}, fallbacks "
            f"{means['fallbacks']:.1f}, named no free item {means['ungrounded']:.0%}, {means['seconds']:.1f} s")


def offline_pool(args: Namespace, jobs: int) -> futures.Executor | None:
    """Where offline runs are performed: on a cluster, in processes of this machine, or here."""
    if args.cluster:
        try:
            from distributed import Client
        except ImportError:
            raise UserError("--cluster needs dask: pip install -e '.[cluster]'") from None
        client = Client(args.cluster, timeout=10)
        for module in ("envs", "prompts", "billp", "run"):
            client.upload_file(f"{module}.py")
        return client.get_executor()
    count = min(args.workers or os.cpu_count() or 1, jobs)
    if count == 1:
        return None
    # Ctrl-C is for this process, which then ends the others.
    return futures.ProcessPoolExecutor(count, initializer=signal.signal, initargs=(signal.SIGINT, signal.SIG_IGN))


def do_jobs(args: Namespace, jobs: dict[str, Job], folder: Path, live: Live) -> Iterator[Result]:
    """The results of jobs in their order: side by side in processes offline, else one after the other."""
    if all(job.run.model == "offline" for job in jobs.values()):
        with parallel(offline_pool(args, len(jobs)), live.stop) as pmap:
            yield from pmap(offline_job, jobs.values())
        return
    models: dict[str, tuple[LLM, Embed]] = {}       # one client and one log for each
    for job in jobs.values():
        name = job.run.model
        if name not in models:
            models[name] = connect(args, job.run, folder / quote(name, safe=""), live)
        llm, embed = models[name]
        own = live._replace(replies=[])
        with parallel(threads(args.workers or job.run.config["batch"]), live.stop) as pmap:
            yield measure_job(job, billp.NOVICE, partial(counted, llm, own), embed, pmap, own)
        live.replies.extend(own.replies)


def publish(name: str, base: Settings, cells: Sequence[Cell], results: Sequence[Sequence[Result]],
            folder: Path) -> None:
    """Print the table of an experiment; write NAME.json and NAME.png."""
    measure = EXPERIMENTS[name].measure
    samples = [np.array([result.samples for result in row], float) for row in results]
    billps = {cell.x: array for cell, array in zip(cells, samples) if cell.series == "billp"}
    rows = []
    for cell, array in zip(cells, samples):
        reference = None if cell.series == "billp" else billps.get(cell.x)
        rows += rows_of(cell, measure, array, reference)
    seeds = [run.seed for run in cells[0].runs]
    models = list(dict.fromkeys(cell.runs[0].model for cell in cells))
    named = ", ".join(STAND_IN if model == "offline" else model for model in models)
    heading = (f"{name} on {base.world}, seeds {seeds[0]} to {seeds[-1]}, {base.users} held-out users each\n"
               f"model {named}")
    bills = []
    for cell, row in zip(cells, results):
        if row[0].cost["calls"]["actor"]["calls"]:
            bills.append(bill(cell, row))
    print("\n".join([heading, "", *table_of(rows), "", *bills, ""]))
    content = {"experiment": name, "settings": base._asdict(), "rows": [row._asdict() for row in rows],
               "cells": [{"series": cell.series, "x": cell.x, "results": [result._asdict() for result in row]}
                         for cell, row in zip(cells, results)]}
    write(folder / f"{name}.json", dumps(content) + "\n")
    plot(name, heading, rows, folder / f"{name}.png")


def experiments(args: Namespace, live: Live) -> None:
    """Perform the experiments asked for. A run that two of them need is performed once."""
    began = time.perf_counter()
    base = settings(args)
    tables = {name: cells_of(args, base, name) for name in args.experiment}
    jobs: dict[str, Job] = {}
    for name, cells in tables.items():
        for cell in cells:
            for run in cell.runs:
                job = Job(run, EXPERIMENTS[name].measure)
                jobs[dumps(job)] = job
    # The longest come first: at the end, no core waits long for another.
    jobs = dict(sorted(jobs.items(), key=lambda item: -item[1].run.episodes))
    asked = {"experiment": args.experiment, "seeds": args.seeds, "models": args.models, "rows": args.rows}
    folder = run_directory(args, base._asdict() | asked)
    results: dict[str, Result] = {}
    for key, result in zip(jobs, do_jobs(args, jobs, folder, live)):
        results[key] = result
        run = jobs[key].run
        say(f"{len(results)} of {len(jobs)} runs: {run.method}, {run.episodes} episodes, seed {run.seed}")
    for name, cells in tables.items():
        measure = EXPERIMENTS[name].measure
        found = [[results[dumps(Job(run, measure))] for run in cell.runs] for cell in cells]
        publish(name, base, cells, found, folder)
    print(f"seconds   {time.perf_counter() - began:.1f}\nrun       {folder}")


# ------------------------------------------------------------------------------------ main


def main(argv: Sequence[str] | None = None) -> int:
    """Do what the flags say; the exit code."""
    live = new_live()
    try:
        args = parse(argv)
        if args.show:
            show(args)
        elif args.experiment:
            experiments(args, live)
        else:
            one_run(args, live)
        sys.stdout.flush()
        return 0
    except BrokenPipeError:             # the reader of the output has closed it
        return 0
    except KeyboardInterrupt:
        say("\n".join([*ledger(live), "run.py: interrupted; run the same command again: answered calls are kept"]))
        return 130
    except MENDABLE as error:
        cause = live.failures[0] if live.failures else error        # later ones only follow from the first
        spent = isinstance(cause, prompts.BudgetSpent)
        say("\n".join([*(ledger(live) if spent else []), f"run.py: {prompts.clean(str(cause), 999)}"]))
        return 3 if spent else 2


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    exit_code = main()
    # A thread may still wait for an answer after Ctrl-C. It must not hold up the end.
    os._exit(exit_code)
