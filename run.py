"""The command line: flags, files, threads, tables.

    python run.py --episodes 50             learn; evaluate the same users before and after
    python run.py --method reflexion        the same with another method
    python run.py --show RUN                one episode of a finished run, step by step
    python run.py --experiment table5       one of the paper's tables or figures, over several seeds

All input and output is here, except for data files (envs.py) and HTTP with its log (prompts.py).
Results go to stdout. Progress and errors go to stderr.

A run directory holds config.json (what determines the result), calls.jsonl (the answers of a real
model), episodes.jsonl, memory.json and summary.json. A directory of experiments holds config.json,
MODEL/calls.jsonl, and NAME.json and NAME.png of each experiment. The same command continues or
repeats a run. Results and answers of another configuration are never touched.
Exit codes: 0 done, 2 a mistake that the user can correct, 3 the budget is spent, 130 interrupted.
"""
from __future__ import annotations

import os
import signal

if __name__ == "__main__":
    # Ctrl-C while the libraries are loaded ends the command without a traceback.
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))

import hashlib
import json
import re
import sys
import time
from argparse import (ArgumentParser, ArgumentTypeError, BooleanOptionalAction, Namespace,
                      RawDescriptionHelpFormatter)
from collections import Counter, defaultdict
from concurrent import futures
from contextlib import contextmanager
from functools import cache, partial
from multiprocessing import parent_process
from pathlib import Path
from threading import Event, Thread
from typing import Any, Callable, Iterable, Iterator, NamedTuple, Sequence
from urllib.parse import quote

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")      # matrices are small: more threads only wait
import numpy as np

import billp
import envs
import prompts
from billp import Agent, Config, Trajectory
from envs import Array
from prompts import LLM, Ask, Embed, Key, Reply


class UserError(Exception):
    """A mistake that the user can correct: one line, exit code 2."""


# errors that `main` reports in one line
ONE_LINE_ERRORS = (UserError, prompts.EndpointError, envs.BadData, OSError, MemoryError,
                   futures.BrokenExecutor)
STAND_IN = ("offline, a rule-based stand-in: it shows the mechanism at work "
            "and is no evidence about real models")
WORLDS = "films, csv:DIR, movielens:DIR, fitted:DIR, steam:DIR, amazon:DIR"
OF_RATINGS = ("csv", "movielens", "fitted")     # kinds of world that `envs.ratings_folder` reads
Json = dict[str, Any]               # a JSON object
METHOD_NAMES = (*envs.POLICIES, *billp.METHODS)
ROLES = ("planner", "actor", "critic", "reflector")


def say(*lines: str) -> None:
    """Print lines to stderr. A closed stream is no error."""
    try:
        if sys.stderr:
            print(*lines, sep="\n", file=sys.stderr, flush=True)
    except OSError:
        pass


# ---------------------------------------------------------------------------------- flags

FLAGS = {                               # group -> flag -> what it does
    "one run": {
        "method": f"{', '.join(METHOD_NAMES)} (default billp)",
        "world": f"{WORLDS} (default films); fitted is csv with similarity by fitted vectors",
        "episodes": "learning episodes (default 50; 100 in experiments)",
        "users": "held-out users to evaluate on (default 50)",
        "seed": "determines every random draw (default 0)",
        "workers": "sessions played at once (default: 1 offline, else a batch); "
                   "in offline experiments: runs at once (default: all cores)",
        "out": "run directory (default: one of its own under runs/)",
        "load": "go on from the memories of another run; with the same world and seed, learners of "
                "that run are skipped",
    },
    "look at a finished run": {
        "show": "print one episode of this run directory",
        "pick": "PHASE (before, learn or after) takes its last episode, PHASE:N its episode N, "
                "counted from 0 (default: the last of learn, or else of the run); with --load, "
                "learn continues the numbers of the loaded run",
        "prompts": "print the prompts of the episode and their replies",
    },
    "experiments": {
        "experiment": "one or more, such as table3,fig5, or all",
        "rows": "only these rows, such as react,billp",
        "models": "the models that table6 compares, such as a,b",
        "seeds": "number of seeds, counted up from --seed (default 5)",
        "cluster": "address of a dask.distributed scheduler for offline runs",
    },
    "a real model": {
        "model": "model name, or offline (default: OPENAI_MODEL; without an endpoint offline)",
        "base_url": "endpoint (default: OPENAI_BASE_URL or OPENAI_API_BASE); the key is "
                    "OPENAI_API_KEY",
        "embed_model": "embedding model (default: OPENAI_EMBED_MODEL, or character trigrams)",
        "extra_body": "a JSON object: more fields for each chat request",
        "header": "one more request header, as NAME=VALUE; may be given several times",
        "timeout": "seconds for one request (default 300)",
        "max_calls": "stop cleanly after this many chat requests to each model",
        "replay": "answer from the run's log alone",
    },
    "roles and memories": {
        "thoughts": "ask the planner for a thought before each action",
        "lessons": "reflections to read: none (and write none), latest or nearest",
        "experience": "write and recall the memories of actor and critic",
        "baseline": "use the critic's V(s); without it every action is encouraged",
        "gamma": "discount of later rewards; the paper's gamma",
        "k_lessons": "reflections recalled; the paper's K",
        "k_experience": "nearest records of M_A recalled for the actor, of all items together",
        "k_actions": "remembered items shown to the actor if --candidates is 0",
        "k_values": "values recalled for the critic",
        "candidates": "free items to choose from; 0: only remembered items are listed, and any may "
                      "be named",
        "line_weight": "weight of an item's whole line in its nearness to a query; its categories "
                       "alone have the weight 1 - N",
        "lately": "how many steps back the category tool looks",
        "fresh_thoughts": "a thought is malformed if it names a category shown lately and none of "
                          "the other liked ones, as long as there are others",
        "titles": "number of items in a state's text and in a prompt's history",
        "batch": "episodes between two updates of the memories",
        "transcript": "at most this many characters of a session in a prompt",
        "temperature": "sampling temperature of every ask",
        "reply_tokens": "longest reply asked for; models that reason need thousands",
        "retries": "how often a malformed reply is asked for again",
        "repeats": "allow an item twice in a session, and items of the history; for methods with "
                   "language only",
    },
    "rule of leaving": {
        "window": "number of items that a user remembers; the paper's W",
        "beta": "an item nearer than this to a remembered one is too similar; the paper's beta",
        "floor": "a rating below this disappoints",
        "grace": "number of steps at the start at which a low rating is forgiven",
        "max_steps": "the cap at which an episode is cut",
    },
}
NOTES = {
    "roles and memories": "--method sets --thoughts, --lessons, --experience and --baseline;\n"
                          "billp-no-model sets --retries to -1; in one run flags override this",
    "rule of leaving": "default: the world's own value; films has window 4, beta 0.9, floor 2, "
                       "grace 0 and 50 steps"}
MANY = 10**9                            # more than anybody asks for
# The lowest and the highest number that a flag takes, if they are not 0 and MANY. A window or a
# session far longer than any world's is only slow.
LIMITS = {
    "users": (1, MANY), "workers": (1, 1000), "seed": (0, 10**18), "seeds": (1, MANY),
    "timeout": (0.001, MANY), "gamma": (0, 1), "line_weight": (0, 1), "lately": (1, MANY),
    "titles": (1, MANY), "batch": (1, MANY), "transcript": (1000, MANY), "temperature": (0, 2),
    "reply_tokens": (1, MANY), "retries": (0, 100), "window": (1, 1000), "max_steps": (1, 10_000)}
# A flag that is missing here, such as --out, --model or --gamma, is None if it is not given. Config
# and Env then use their own defaults.
DEFAULTS = {
    "episodes": 50, "users": 50, "method": "billp", "world": "films", "seed": 0, "seeds": 5,
    # workers: 0 stands for the number that the help names
    "workers": 0, "timeout": 300.0, "header": (), "extra_body": {}, "max_calls": MANY,
    "replay": False, "prompts": False}
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
    """The flag of a name, as the user types it."""
    return "--" + name.replace("_", "-")


def directory(text: str) -> Path:
    """The path of a directory, from what the user typed."""
    if not text:
        raise ArgumentTypeError("it is given without a value")
    return Path(os.path.expanduser(text))


def json_object(text: str) -> Json:
    """A JSON object such as {"top_p": 0.9}, from what the user typed."""
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if not isinstance(value, dict):     # the text is not shown: it may hold a secret
        raise ArgumentTypeError("it takes a JSON object, such as '{\"top_p\": 0.9}'")
    return value


DIRECTORY = {"type": directory, "metavar": "DIR"}
OPTIONS = {                             # what argparse is told of flags that take no plain text
    "out": DIRECTORY, "load": DIRECTORY, "show": DIRECTORY, "header": {"action": "append"},
    "extra_body": {"type": json_object, "metavar": "JSON"},
    "method": {"choices": METHOD_NAMES, "metavar": "METHOD"},
    "lessons": {"choices": ("none", "latest", "nearest"), "metavar": "LESSONS"}}


def make_parser() -> Parser:
    """All flags. A flag that is not given is None here.

    The default of a flag in Env, Config or DEFAULTS decides what the flag takes. With True or False
    it is a switch. With a number it takes a number of that type. All other flags take a text, or
    what OPTIONS says.
    """
    parser = Parser("run.py", allow_abbrev=False, epilog=EXAMPLES,
                    formatter_class=RawDescriptionHelpFormatter,
                    description=f"Learn, then evaluate. The default model is\n{STAND_IN}.")
    defaults = {**envs.Env._field_defaults, **Config._field_defaults, **DEFAULTS}
    for title, flags in FLAGS.items():
        group = parser.add_argument_group(title, NOTES.get(title))
        for name, text in flags.items():
            default = defaults.get(name)
            options = OPTIONS.get(name, {})
            if isinstance(default, bool):
                options = {"action": BooleanOptionalAction}
            elif isinstance(default, (int, float)):
                options = {"type": type(default), "metavar": "N"}
            if title == "roles and memories":
                text += f" (default {default})"
            group.add_argument(flag(name), help=text, **options)
    return parser


def check_values(args: Namespace) -> None:
    """UserError for a value that a flag does not take."""
    for name, value in args.given.items():
        if value == "":                 # often a variable of the shell that is not set
            raise UserError(f"{flag(name)} is given without a value")
        low, high = LIMITS.get(name, (0, MANY))
        if type(value) in (int, float) and not low <= value <= high:
            raise UserError(f"{flag(name)} takes a number from {low} to {high}")
    for name in args.experiment:
        if name not in (*EXPERIMENTS, "all"):
            raise UserError(f"no experiment {name!r}; choose from all, {', '.join(EXPERIMENTS)}")
    for header in args.header:
        if not re.match(r"[\w.-]+=", header):
            raise UserError("--header takes NAME=VALUE")


def idle_in_experiments(args: Namespace) -> Iterator[tuple[Iterable[str], str]]:
    """`idle_flags` for the experiments asked for."""
    # each row sets its method and these switches, and starts without memories
    yield ["method", "load", "thoughts", "lessons", "experience", "baseline"], "with --experiment"
    if args.cluster:
        yield ["workers"], "with --cluster"
    varied = {EXPERIMENTS[name].varied for name in args.experiment}
    if "model" not in varied:
        yield ["models"], "without --experiment table6"
    # If all experiments vary the same flag, its value is never used. --model is not among these
    # flags, because table6 without --models plays it.
    if varied in ({"episodes"}, {"window"}):
        yield varied, "here: the experiment varies it"
    if args.experiment == ["fig4"]:
        yield ["users"], "here: the experiment takes two users"


def idle_flags(args: Namespace) -> Iterator[tuple[Iterable[str], str]]:
    """Flags that have no effect here, each group with the reason. `parse` refuses them."""
    of_show = FLAGS["look at a finished run"].keys()
    if args.show:
        yield args.given.keys() - of_show, "with --show"
        return
    yield of_show, "without --show"
    if args.models_asked == ["offline"]:
        yield FLAGS["a real model"].keys() - {"model"}, "without a real model"
    else:
        yield ["cluster"], "with a real model"
    if args.models:
        yield ["model"], "with --models"
    if args.method in envs.POLICIES:
        # Policies ask no model and keep no memory. Of these flags only gamma is used, by a2c.
        unused = {"model", "load", "workers", *FLAGS["roles and memories"]}
        if args.method == "a2c":
            unused.remove("gamma")
        yield unused, f"with {args.method}"
    if args.experiment:
        yield from idle_in_experiments(args)
    else:
        yield FLAGS["experiments"], "without --experiment"


def variable(name: str) -> str:
    """The value of an environment variable, or ""."""
    return os.environ.get(name, "").strip()


def base_url_of(args: Namespace) -> str:
    """The endpoint that the flags or the environment name, or ""."""
    return args.base_url or variable("OPENAI_BASE_URL") or variable("OPENAI_API_BASE")


def defaults_of(given: Json) -> Json:
    """DEFAULTS for these flags: experiments learn from 100 episodes."""
    return DEFAULTS | {"episodes": 100} if "experiment" in given else DEFAULTS


def parts(names: str) -> list[str]:
    """The names in a text such as "a, b"."""
    return [name.strip() for name in names.split(",")]


def models_of(args: Namespace) -> list[str]:
    """The models that the flags or the environment name, the main one first.

    "offline" is the stand-in. UserError if a model is named without an endpoint or a key, or an
    endpoint without a model.
    """
    if args.method in envs.POLICIES:            # a policy asks no model
        return ["offline"]
    # A missing name is "". Only --models is split at commas.
    names = [args.model or variable("OPENAI_MODEL")]
    if args.models:
        names = parts(args.models)
    if names == ["offline"]:
        return names
    # A replay needs no endpoint: its log stands for one.
    has_endpoint = args.replay or base_url_of(args)
    has_key = variable("OPENAI_API_KEY")        # with a key alone the endpoint is OpenAI's
    names_no_model = names == [""]
    if names_no_model and not has_endpoint:
        if has_key:                 # many people have one in their environment
            say("OPENAI_API_KEY is set without a model: the stand-in answers")
        return ["offline"]
    lacks_name = "" in names
    lacks_server = not has_endpoint and not has_key
    if lacks_name or lacks_server:
        raise UserError("an endpoint and a model are needed: set OPENAI_BASE_URL and OPENAI_MODEL, "
                        "or give --base-url and --model; --model offline is the stand-in; with "
                        "--replay, --model alone is enough")
    return names


def parse(argv: Sequence[str] | None) -> Namespace:
    """The flags, checked, with DEFAULTS filled in. UserError for a mistake."""
    parser = make_parser()
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        word = unknown[0].partition("=")[0]
        what = f"unknown flag {word}"
        if not word.startswith("-"):
            if len(word) > 12:          # it may be an API key: all known ones are longer
                word = "a word"
            what = f"{word} stands alone: every value needs its flag, as in --seed 1"
        parser.error(what)
    given = {name: value for name, value in vars(args).items() if value is not None}
    values = vars(args) | defaults_of(given) | given        # the last dict wins
    args = Namespace(**values, given=given)
    args.experiment = parts(args.experiment) if args.experiment else []
    check_values(args)
    if "all" in args.experiment:
        args.experiment = list(EXPERIMENTS)
    kind, _, folder = args.world.partition(":")
    if folder:                          # "csv:data" and "csv:./data/" are one world
        args.world = f"{kind}:{os.path.normpath(folder)}"
    args.models_asked = [] if args.show else models_of(args)
    for flags, reason in idle_flags(args):
        idle = sorted(given.keys() & flags)
        if idle:
            raise UserError(f"{flag(idle[0])} has no effect {reason}")
    return args


class Settings(NamedTuple):
    """The configuration of a run, as written to config.json.

    The endpoint's address, its headers and the content of data files are no part of it.
    """
    world: str
    method: str
    model: str
    embedding: str
    seed: int
    episodes: int
    users: int
    first: int                  # number of learners that the loaded memory has met
    load: str                   # digest of the memory.json started from, "" for none
    extra: str                  # digest of --extra-body, "" for none
    config: Json                # fields of Config
    rule: Json                  # the fields of Env that flags change


def digest(text: str) -> str:
    """A short name for a text."""
    return hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()[:16]


def given_of(args: Namespace, names: Iterable[str]) -> Json:
    """The values of the flags among `names` that were given."""
    return {name: args.given[name] for name in names if name in args.given}


def embedding_of(args: Namespace) -> str:
    """The embedding that flags or environment name. UserError if the model cannot use it."""
    # The models of table6 share one embedding. If the stand-in is among them, it is the trigrams.
    if "offline" in args.models_asked:
        if args.embed_model:
            raise UserError("the stand-in takes no embedding model")
        return "hashed_ngrams"
    return args.embed_model or variable("OPENAI_EMBED_MODEL") or "hashed_ngrams"


def learns(run: Settings) -> bool:
    """Whether the method can learn from episodes."""
    if run.method in envs.POLICIES:
        return run.method in ("bandit", "a2c")
    reads_lessons = run.config["thoughts"] and run.config["lessons"] != "none"
    return run.config["experience"] or reads_lessons


def without_idle_learning(run: Settings) -> Settings:
    """The run, without its learning episodes if its method learns nothing."""
    return run if learns(run) else run._replace(episodes=0)


def settings(args: Namespace, saved: Json) -> Settings:
    """What the flags and the environment ask for. `saved` is what `read_memory` gives.

    In experiments `settings_of` replaces the method by that of each row.
    """
    config = Config()._asdict() | billp.METHODS.get(args.method, {})
    extra = dumps(args.extra_body, sort_keys=True)          # the same for all ways to write it
    run = Settings(
        world=args.world, method=args.method, model=args.models_asked[0],
        embedding=embedding_of(args), seed=args.seed, episodes=args.episodes, users=args.users,
        first=learners_met(saved, args.world, args.seed), load=saved["digest"],
        extra=digest(extra) if args.extra_body else "",
        config=config | given_of(args, Config._fields), rule=given_of(args, envs.RULE))
    # A policy that learns nothing plays no learning episodes. act and react learn nothing either,
    # but play these episodes: one can look at them, and after minus before shows what chance does.
    # In experiments `settings_of` drops the episodes.
    if args.method in envs.POLICIES:
        run = without_idle_learning(run)
    return run


# ---------------------------------------------------------------------------------- world


released = cache(envs.released)         # its large files are the same for all seeds


@cache                  # fitting ratings is slow: runs of one world and seed do it once
def load_world(name: str, seed: int) -> envs.Env:
    """A world by its name on the command line. UserError if there is none of this name."""
    kind, _, folder = name.partition(":")
    if name == "films":
        return envs.films(seed)
    if folder and kind in (*OF_RATINGS, "steam", "amazon"):
        say(f"reading {folder}")    # millions of ratings take a while
        if kind in OF_RATINGS:
            return envs.ratings_folder(folder, seed, kind == "fitted")
        return released(folder, kind)
    raise UserError(f"no world {name!r}; choose from {WORLDS}")


class Place(NamedTuple):
    """The world of a run and its users."""
    env: envs.Env
    learners: list[int]         # users to learn from, in the seed's order
    held_out: list[int]         # users to evaluate on


def build_place(run: Settings) -> Place:
    """The world of a run under its rule of leaving, with its users.

    UserError if learners or held-out users are too few. A policy never has too few learners: it may
    draw one several times.
    """
    env = load_world(run.world, run.seed)._replace(**run.rule)
    # The agent learns from the first env.learners users. The others are held out.
    order = envs.branch(run.seed, "learners").permutation(env.learners)
    others = len(env.histories) - env.learners
    held_out = envs.branch(run.seed, "held-out users").permutation(others) + env.learners
    needed = run.first + run.episodes
    if needed > env.learners and run.method in billp.METHODS:
        raise UserError(f"{run.world} has {env.learners} users to learn from, too few for "
                        f"{needed} episodes")
    if run.users > others:
        raise UserError(f"--users {run.users}: {run.world} has {others} held-out users")
    return Place(env, order[run.first:needed].tolist(), held_out[:run.users].tolist())


# ---------------------------------------------------------------------------------- files


def dumps(value: Any, **options: Any) -> str:
    """JSON with letters of all alphabets as they are."""
    return json.dumps(value, ensure_ascii=False, **options)


def write(path: Path, content: str) -> None:
    """Write, then rename: the file is whole or not there.

    A kill may leave a draft. Its name has a dot in front, so `run_directory` ignores it.
    """
    draft = path.with_name(f".{path.name}.{os.getpid()}.part")
    draft.write_bytes(content.encode("utf-8", "replace"))
    os.replace(draft, path)


def read_object(path: Path) -> Json:
    """The JSON object in a file, empty without a file. UserError for other content."""
    if not path.exists():
        return {}
    try:
        return dict(json.loads(path.read_bytes()))
    except (ValueError, TypeError):
        raise UserError(f"{path} holds no JSON object; choose another directory") from None


def flattened(content: Json) -> Json:
    """The fields of a config.json in one level: those of its "config" and its "rule", too."""
    flat = dict(content)
    for group in ("config", "rule"):
        flat |= prompts.as_object(flat.pop(group, None))
    return flat


def default_directory(args: Namespace, config: Json) -> Path:
    """runs/WORLD-METHOD-MODEL-seedN-CHANGES-DIGEST, without MODEL for the stand-in.

    In place of METHOD experiments have their names. CHANGES are the flags that shape the result and
    do not have their default values.
    """
    name = args.world.partition(":")[0] + "-" + ("+".join(args.experiment) or args.method)
    if config["model"] != "offline":
        name += "-" + quote(config["model"], safe="")
    name += f"-seed{args.seed}"
    defaults = (Config._field_defaults | billp.METHODS.get(args.method, {})
                | defaults_of(args.given))
    given = given_of(args, ["episodes", "users", *Config._fields, *envs.RULE])
    for field, value in given.items():
        if value != defaults.get(field):
            name += f"-{field}{value}"
    name = name[:200]                   # a file system takes names of at most 255 bytes
    return Path("runs", f"{name}-{digest(dumps(config))[:6]}")


def run_directory(args: Namespace, content: Json) -> Path:
    """The directory of this run, made if need be. `content` is for its config.json.

    UserError if it holds another run or the files of another program, or no log to replay. A run
    that got no answer, such as one with a mistyped model, may be replaced: it left only its
    config.json.
    """
    path = args.out or default_directory(args, content)
    # names with a dot in front are drafts, or those of the file manager, such as .DS_Store
    names = {file.name for file in path.rglob("[!.]*") if file.is_file()}
    earlier = read_object(path / "config.json")
    holds_run = set(Settings._fields) <= earlier.keys()
    is_empty = names <= {"calls.jsonl"}                 # a log may have been copied there
    got_no_answer = holds_run and names == {"config.json"}
    may_be_taken = is_empty or got_no_answer
    if not may_be_taken and not holds_run:
        raise UserError(f"{path} is not empty and holds no run; choose another --out")
    if not may_be_taken:
        # an experiment has fields that a run lacks, so the fields of both are compared
        fields, earlier_fields = flattened(content), flattened(earlier)
        changed = [field for field in earlier_fields | fields
                   if earlier_fields.get(field) != fields.get(field)]
        if changed:
            raise UserError(f"{path} holds another configuration ({', '.join(changed)}); choose "
                            "another --out")
    if args.replay and "calls.jsonl" not in names:
        raise UserError(f"{path} holds no log to replay: run without --replay, or give the "
                        "directory of the log as --out")
    path.mkdir(parents=True, exist_ok=True)
    write(path / "config.json", dumps(content, indent=1) + "\n")
    return path


def memory_text(run: Settings, agent: Agent, met: dict[tuple[str, int], int]) -> str:
    """The memories as JSON, without their vectors.

    `met` holds the number of learners met in earlier runs, by world and seed.
    """
    if run.method in billp.METHODS:         # a policy adds nothing to the memories
        met = met | {(run.world, run.seed): run.first + run.episodes}
    rows = [[world, seed, learners] for (world, seed), learners in met.items() if learners]
    content = {"met": rows}
    for role, memory in agent._asdict().items():
        content[role] = billp.records(memory)
    return dumps(content, indent=1) + "\n"


def read_memory(path: Path | None) -> Json:
    """What `memory_text` wrote, with each row made a Record, and a digest of the file.

    `path` is a run directory or its memory.json. UserError for any other. Without a path nothing
    was learned before: the three memories are missing.
    """
    if path is None:
        return {"met": {}, "digest": ""}
    file = path / "memory.json" if path.is_dir() else path
    try:
        content = file.read_text("utf-8")
        saved = json.loads(content) | {"digest": digest(content)}
        for role in Agent._fields:
            saved[role] = [billp.Record(*row) for row in saved[role]]
        saved["met"] = {(str(world), int(seed)): int(met) for world, seed, met in saved["met"]}
    except (OSError, ValueError, LookupError, TypeError, OverflowError):
        raise UserError(f"{file} is no memory.json of this program: --load takes the directory of "
                        "a finished run") from None
    return saved


def learners_met(saved: Json, world: str, seed: int) -> int:
    """How many learners of this world and seed a memory has met. The run skips them.

    UserError if the memory may have learned from users that this seed holds out.
    """
    # Only in worlds of ratings does the seed choose who is held out. There a memory of another seed
    # may know them. The names of the folders do not matter: two may hold the same ratings.
    for earlier_world, earlier_seed in saved["met"]:
        kinds = {name.partition(":")[0] for name in (world, earlier_world)}
        both_of_ratings = kinds <= set(OF_RATINGS)
        if both_of_ratings and seed != earlier_seed:
            raise UserError(f"--load: this memory may know users that --seed {seed} holds out; "
                            f"use its own --seed {earlier_seed}")
    return saved["met"].get((world, seed), 0)


def agent_of(saved: Json, embed: Embed) -> Agent:
    """The agent with the records that `read_memory` gave. Vectors are made again."""
    memories = {}
    for role in Agent._fields:
        if saved.get(role):             # a memory that is left out is empty
            vectors = embed([record.text for record in saved[role]])
            memories[role] = billp.push(billp.EMPTY, billp.Chunk(tuple(saved[role]), vectors))
    return Agent(**memories)


# --------------------------------------------------------------------------------- one run


class Live(NamedTuple):
    """The counts of a command, printed also after Ctrl-C. Threads share them."""
    # of each role: calls, and the tokens that the server counts
    counts: dict[str, Counter]
    # "asked": new answers of endpoints; "known": answers of logs; "empty: KIND": replies without
    # a text. A prompts.Route adds "requests", "retries: KIND" and "system_fingerprint".
    stats: Json
    # of the episodes finished so far: malformed, fallbacks, actions, and ungrounded, which are
    # actions that named no free item
    replies: Counter
    failures: list[Exception]   # errors of the model's calls; the first is the cause
    stop: Event                 # set when no further call shall begin


def new_live() -> Live:
    """Empty counts, before the first call."""
    return Live({role: Counter(calls=0) for role in ROLES}, {}, Counter(), [], Event())


def counted(llm: LLM, live: Live, ask: Ask) -> Reply:
    """Ask the model and count the reply. Once a call has failed, no other begins."""
    if live.stop.is_set():
        raise prompts.EndpointError("stopped")
    try:
        reply = llm(ask)
    except (prompts.EndpointError, OSError) as error:       # OSError: the log cannot be written
        # once `stop` is set, other calls fail because of it
        if not live.stop.is_set():
            live.failures.append(error)
        live.stop.set()
        raise
    if reply.reason:
        kind = reply.reason.partition(":")[0]       # the rest may hold the number of a request
        prompts.count(live.stats, f"empty: {kind}")
    with prompts.LOCK:
        counts = live.counts[ask.role]
        counts["calls"] += 1
        for kind, tokens in reply.usage._asdict().items():
            if tokens is not None:
                counts[kind] += tokens
    return reply


def open_model(args: Namespace, run: Settings, folder: Path, live: Live) -> tuple[LLM, Embed]:
    """The model and the embedding of a run. Those of an endpoint are recorded in the folder."""
    if run.model == "offline":
        return prompts.offline, prompts.hashed_ngrams
    url = base_url_of(args) or "https://api.openai.com/v1"
    headers = dict(header.split("=", 1) for header in args.header)
    options = {"key": variable("OPENAI_API_KEY"), "timeout": args.timeout, "headers": headers,
               "notice": say, "sleep": live.stop.wait, "stats": live.stats}
    model_id = [run.model, run.embedding, run.extra]
    log = prompts.open_log(folder / "calls.jsonl", model_id, args.replay)
    # "asked" tells `ledger`, `watched` and `main` that a log is open
    live.stats.setdefault("asked", 0)
    live.stats.setdefault("known", 0)
    llm = embed = prompts.unlogged
    if not args.replay:
        # if an earlier run got a text, an empty reply is no sign of wrong settings
        llm = prompts.openai(url, run.model, extra=args.extra_body, has_answered=log.has_answered,
                             **options)
        llm = prompts.limited(llm, args.max_calls)
    llm = prompts.recorded(llm, log, live.stats)
    if run.embedding == "hashed_ngrams":
        return llm, prompts.hashed_ngrams
    if not args.replay:
        embed = prompts.embeddings(url, run.embedding, **options)
    return llm, prompts.recorded_embed(embed, log)


@contextmanager
def parallel(pool: futures.Executor, stop: Event) -> Iterator[Callable]:
    """The pool's map. After an error `stop` is set, and `counted` begins no further call.

    Ctrl-C ends at once. Any other error waits for the requests already sent, so that their answers
    are logged.
    """
    try:
        yield pool.map
    except BaseException as error:
        stop.set()
        pool.shutdown(wait=not isinstance(error, KeyboardInterrupt))
        raise
    pool.shutdown()


class Session(NamedTuple):
    """What tables need of one episode; the leaving step is left out."""
    items: list[int]
    reward: float               # the sum


class Outcome(NamedTuple):
    """What a run gives. The phases are before, learn and after."""
    sessions: dict[str, list[Session]]          # of each phase
    trajectories: tuple[Trajectory, ...] = ()   # of all phases; a policy leaves none
    agent: Agent = billp.NOVICE


def count_replies(trajectory: Trajectory, replies: Counter) -> None:
    """Count the replies of an episode in `Live.replies`."""
    answers = list(trajectory.answers)
    for step in trajectory.steps:
        answers += [step.plan, step.act]
    replies["actions"] += len(trajectory.steps)
    for answer in answers:
        replies["malformed"] += answer.malformed
        replies["fallbacks"] += answer.fallback
        replies["ungrounded"] += not answer.exact      # only an actor's answer can be inexact


def watched(pmap: Callable, run: Settings, live: Live) -> Callable:
    """The same map. It also counts replies and reports every tenth episode, and the last."""
    # phase -> the lengths of its episodes so far; learning calls the map once for each batch
    lengths_of = defaultdict(list)

    def watched_map(function: Callable, users: Sequence[int], keys: Sequence[Key]) -> Iterator:
        phase = keys[0].phase
        lengths = lengths_of[phase]
        total = run.episodes if phase == "learn" else run.users
        for trajectory in pmap(function, users, keys):
            if run.config["retries"] >= 0:          # otherwise no model is asked
                count_replies(trajectory, live.replies)
            length, _ = billp.score(trajectory)
            lengths.append(length)
            done = len(lengths)
            if done % 10 == 0 or done == total:
                # the stand-in has no log, so there is no count of new answers
                asked = live.stats.get("asked")
                new = "" if asked is None else f", {asked} new answers"
                mean = np.mean(lengths)
                say(f"{phase}: {done} of {total} episodes, mean Len so far {mean:.1f}{new}")
            yield trajectory
    return watched_map


def session_of(trajectory: Trajectory) -> Session:
    """What tables need of an episode."""
    length, reward = billp.score(trajectory)
    return Session([step.act.result for step in trajectory.steps[:length]], reward)


def scores_of(sessions: Sequence[Session]) -> Array:
    """Length and return of each session: [1, sessions, 2], because they are of one seed."""
    lengths = [len(session.items) for session in sessions]
    return envs.scores(lengths, [session.reward for session in sessions])


def policy_sessions(run: Settings, place: Place, phase: str) -> list[Session]:
    """Sessions of a policy before or after it has learned. Both phases have the same draws."""
    episodes = run.episodes if phase == "after" else 0
    policy = envs.policy_named(run.method, place.env, episodes, run.seed, run.config["gamma"])
    rng = envs.branch(run.seed, "policy")
    played = envs.rollout(place.env, place.held_out, policy, rng)
    # -1 stands after the end
    return [Session(items[items >= 0].tolist(), float(rewards.sum()))
            for items, rewards in zip(played.items, played.rewards)]


def perform(run: Settings, place: Place, agent: Agent, llm: LLM, embed: Embed, pmap: Callable,
            phases: Sequence[str]) -> Outcome:
    """Play some phases of a run, in their order: before, learn, after."""
    if run.method in envs.POLICIES:
        return Outcome({phase: policy_sessions(run, place, phase)
                        for phase in phases if phase != "learn"})
    config = Config(**run.config)
    catalog = prompts.catalog(place.env, embed)
    sessions, everything = {}, ()
    for phase in phases:
        if phase == "learn":
            played = ()
            batches = billp.train(catalog, place.learners, llm, run.seed, agent, config, pmap,
                                  run.first)
            for learned, batch in batches:
                agent = learned                 # the next phase plays with the last one
                played += batch
        else:
            played = billp.evaluate(catalog, place.held_out, agent, llm, run.seed, phase, config,
                                    pmap)
        sessions[phase] = [session_of(trajectory) for trajectory in played]
        everything += played
    return Outcome(sessions, everything, agent)


def describe(env: envs.Env, trajectory: Trajectory) -> Json:
    """One episode as a line of episodes.jsonl: all that --show needs."""
    steps = [{"lessons": step.plan.recalled, "thought": step.plan.result,
              "listed": step.act.recalled, "said": step.act.said, "exact": step.act.exact,
              "item": step.line, "reward": step.reward} for step in trajectory.steps]
    left = ""
    if trajectory.terminated:
        items = [step.act.result for step in trajectory.steps]
        left = prompts.clean(envs.why_left(env, trajectory.user, items))
    key = trajectory.last.key
    reflections = [record.content for record in billp.records(trajectory.gained.planner)]
    return {"phase": key.phase, "episode": key.episode, "user": trajectory.user,
            "history": trajectory.last.history, "steps": steps, "left": left,
            "values": trajectory.values, "advantages": trajectory.advantages,
            "reflection": "".join(reflections)}             # there is at most one


def summarise(run: Settings, outcome: Outcome, live: Live, began: float) -> Json:
    """The content of summary.json, for other programs. An interval is [mean, low, high], 95 %."""
    lengths = [len(session.items) for session in outcome.sessions.get("learn", [])]
    size = run.config["batch"]
    means = [float(np.mean(lengths[start:start + size])) for start in range(0, len(lengths), size)]
    before = scores_of(outcome.sessions["before"])
    after = scores_of(outcome.sessions.get("after", outcome.sessions["before"]))
    replies = live.replies
    content_of_run = run._asdict()
    rule = content_of_run.pop("rule")
    return content_of_run | {
        "config": run.config | rule,            # the fields of Config and those of the rule
        "learning": means,
        "before": envs.metrics(before), "after": envs.metrics(after),
        "difference": envs.metrics(after, before) if run.episodes else None,
        "reflections": len(billp.records(outcome.agent.planner)),
        "malformed": replies["malformed"], "fallbacks": replies["fallbacks"],
        "ungrounded": round(replies["ungrounded"] / (replies["actions"] or 1), 4),
        "calls": live.counts, "endpoint": live.stats,
        "seconds": round(time.perf_counter() - began, 2)}


def interval_cells(figures: dict[str, Sequence[float]]) -> dict[str, str]:
    """Means with their intervals, as cells of a `grid`."""
    form = "{:.2f} [{:.2f}, {:.2f}]"
    return {f"{name} [95 %]": form.format(*figure) for name, figure in figures.items()}


def grid(rows: dict[str, Json]) -> list[str]:
    """A table as lines. Labels are aligned to the left, cells to the right. A missing cell is 0.

    `rows` maps each label to its cells: the name of the column -> the content.

    >>> grid({"actor": {"calls": 12}, "critic": {}}), grid({"a": {"": "low"}})
    (['        calls', 'actor      12', 'critic      0'], ['', 'a  low'])
    """
    columns = dict.fromkeys(name for cells in rows.values() for name in cells)
    labels = ["", *rows]
    label_width = max(map(len, labels))
    lines = [label.ljust(label_width) for label in labels]
    for name in columns:
        column = [name, *(str(cells.get(name, 0)) for cells in rows.values())]
        width = max(map(len, column))
        lines = [f"{line}  {cell:>{width}}" for line, cell in zip(lines, column)]
    return [line.rstrip() for line in lines]


def chart(summary: Json) -> Iterator[str]:
    """The learning curve of a run as text, a line for each batch.

    >>> summary = {"first": 9, "episodes": 3, "learning": [20.0, 5.0], "config": {"batch": 2}}
    >>> list(chart(summary))[2]
    '   12-12    ########## 5.0'
    """
    top = max([1.0, *summary["learning"]])
    done = summary["first"]                         # with --load episodes were learned before
    end = done + summary["episodes"]
    yield "learning episodes, mean Len of each batch"
    for mean in summary["learning"]:
        first = done + 1
        done = min(done + summary["config"]["batch"], end)
        bar = "#" * round(40 * mean / top)          # the longest has 40 marks, about half a line
        yield f"{first:5}-{done:<5} {bar} {mean:.1f}"


def ledger(live: Live) -> Iterator[str]:
    """Calls and tokens of each role, the counts of the endpoint, and the unusable replies."""
    with prompts.LOCK:                  # threads may still count
        table = {role: dict(row) for role, row in live.counts.items() if row["calls"]}
        stats = dict(live.stats)
    if table:
        yield from grid(table)
    if "asked" in stats:                # an endpoint or its log was opened
        asked, known = stats.pop("asked"), stats.pop("known")
        yield f"answers   {known} from the log, {asked} new"
        for name, value in stats.items():
            yield f"endpoint  {name}: {value}"
    replies = live.replies
    if replies:
        share = replies["ungrounded"] / replies["actions"]
        yield (f"replies   malformed {replies['malformed']}, fallbacks {replies['fallbacks']}, "
               f"actions that named no free item {share:.0%}")


def report(summary: Json, about: str, agent: Agent, live: Live) -> Iterator[str]:
    """The results as a person reads them."""
    model = summary["model"]
    if model == "offline":
        model = STAND_IN
    if not live.replies:                # a policy or billp-no-model: no reply was counted
        model = "none: this method asks no language model"
    heading = ("{method} on {world}, seed {seed}: {episodes} learning episodes, "
               "{users} held-out users")
    yield heading.format_map(summary)
    if about:
        yield f"world     {about}"
    yield f"model     {model}"
    yield ""
    # without learning episodes "after" is a copy of "before"
    phases = ("before", "after", "difference") if summary["difference"] else ("before",)
    yield from grid({phase: interval_cells(summary[phase]) for phase in phases})
    if summary["users"] == 1:
        yield "one user: the intervals have no width and say nothing"
    yield ""
    if summary["learning"]:
        yield from chart(summary)
        yield ""
    for record in billp.records(agent.planner)[-1:]:        # the newest, if there is one
        yield f"lesson    {record.content}"
    yield from ledger(live)
    yield f"seconds   {summary['seconds']}"


def phases_of(run: Settings) -> tuple[str, ...]:
    """The phases of a run. Without learning episodes the held-out users play once."""
    return ("before", "learn", "after") if run.episodes else ("before",)


def batch_workers(run: Settings) -> int:
    """How many sessions with an endpoint are played at once, unless --workers is given: a batch."""
    return min(run.config["batch"], LIMITS["workers"][1])


def one_run(args: Namespace, live: Live) -> None:
    """Learn, evaluate, write the run directory, print the results."""
    began = time.perf_counter()
    saved = read_memory(args.load)
    run = settings(args, saved)
    if args.load and not learns(run):
        raise UserError(f"--load has no effect: {run.method} reads no memories")
    if run.episodes and not learns(run):
        say(f"{run.method} learns nothing: --episodes 0 skips its learning episodes")
    place = build_place(run)
    folder = run_directory(args, run._asdict())
    llm, embed = open_model(args, run, folder, live)
    agent = agent_of(saved, embed)
    if args.load and not any(agent):
        say(f"{args.load} holds empty memories: its run learned nothing")
    workers = args.workers or (1 if run.model == "offline" else batch_workers(run))
    with parallel(futures.ThreadPoolExecutor(workers), live.stop) as pmap:
        outcome = perform(run, place, agent, partial(counted, llm, live), embed,
                          watched(pmap, run, live), phases_of(run))
    summary = summarise(run, outcome, live, began)
    episodes = [dumps(describe(place.env, played)) + "\n" for played in outcome.trajectories]
    run_directory(args, run._asdict())      # it fails if another run has taken the folder meanwhile
    write(folder / "episodes.jsonl", "".join(episodes))
    write(folder / "memory.json", memory_text(run, outcome.agent, saved["met"]))
    write(folder / "summary.json", dumps(summary, indent=1) + "\n")
    lines = report(summary, place.env.about, outcome.agent, live)
    print(*lines, f"run       {folder}", sep="\n")


# ------------------------------------------------------------------------ a look at a run


def step_rows(episode: Json, n: int) -> Iterator[tuple[str, str]]:
    """Step n of an episode in words: labels and texts. A text may be empty."""
    step = episode["steps"][n]
    for lesson in step["lessons"]:
        yield "recalled", lesson
    yield "thought", step["thought"]
    listed = [prompts.Candidate(*fields) for fields in step["listed"]]
    for line in prompts.render_evidence(listed).splitlines():
        yield "evidence", line
    for item in listed:
        yield "listed", item.line
    yield "said", step["said"]
    yield "item", step["item"]
    if not step["exact"]:
        why = "the reply names no free item; this one was taken in its place"
        if not step["said"]:
            why = "by the fallback"
        yield "", why
    yield "reward", f"{step['reward']:g}"
    if episode["advantages"]:
        value, advantage = episode["values"][n], episode["advantages"][n]
        verdict = "encouraged" if advantage >= 0 else "discouraged"
        yield "value", f"{value:.2f}, advantage {advantage:+.2f}: {verdict}"


def story(episode: Json) -> Iterator[str]:
    """An episode in words: what was recalled, thought, done, seen and learned at each step."""
    yield "{phase} episode {episode}, user {user}".format_map(episode)
    yield "\nliked before"
    for line in episode["history"]:
        yield f"    {line}"
    for n in range(len(episode["steps"])):
        yield f"\nstep {n + 1}"
        for label, text in step_rows(episode, n):
            if text:
                yield f"    {label:12}{text}"
    left = episode["left"]
    yield f"\nthe user left: {left}" if left else "\nthe user stayed to the last step"
    if episode["reflection"]:
        yield f"\nreflection  {episode['reflection']}"


def episode_of(folder: Path, pick: str | None) -> Json:
    """The episode of a finished run that --pick names.

    By default it is the last one learned from, or else the last one.
    """
    try:
        lines = (folder / "episodes.jsonl").read_bytes().splitlines()
        episodes = [json.loads(line) for line in lines]
    except (OSError, ValueError):
        raise UserError(f"{folder} holds no episodes.jsonl: --show takes the directory of a "
                        "finished run") from None
    if not episodes:
        raise UserError(f"{folder} holds no episodes: policies without a language model keep none")
    choice = pick or "learn"           # "learn", or "learn:3"
    for episode in reversed(episodes):
        name = "{phase}:{episode}".format_map(episode)
        if choice in (episode["phase"], name):
            return episode
    if pick:
        last = "{phase}:{episode}".format_map(episodes[-1])
        raise UserError(f"the run has no episode {pick!r}: --pick takes before, learn or after, "
                        f"as in after:3; the last one here is {last}")
    return episodes[-1]


def prompts_of(args: Namespace, episode: Json) -> str:
    """What the model was sent in an episode, and what it answered.

    The files hold no prompts. So the run is repeated up to this phase, from its log or by the
    stand-in, and the asks of this episode are caught. UserError if the repeated episode differs.
    """
    run = Settings(**read_object(args.show / "config.json"))
    if run.config["retries"] < 0:
        raise UserError(f"{args.show} asked no model: it has no prompts")
    if run.load:
        raise UserError(f"{args.show} was started with --load: its prompts cannot be made again")
    args.replay = True                  # no endpoint is asked
    llm, embed = open_model(args, run, args.show, new_live())
    lines = []

    def caught(ask: Ask) -> Reply:
        reply = llm(ask)
        if (ask.key.phase, ask.key.episode) == (episode["phase"], episode["episode"]):
            lines.append(f"==== {ask.role}, step {ask.key.step + 1}, attempt {ask.key.attempt + 1}")
            for role, text in [*ask.messages, ("reply", reply.text)]:
                lines.append(f"---- {role}\n{text}")
            lines.append("")
        return reply

    phases = phases_of(run)
    needed = phases[:phases.index(episode["phase"]) + 1]
    place = build_place(run)
    try:
        outcome = perform(run, place, billp.NOVICE, caught, embed, map, needed)
    except prompts.EndpointError:
        raise UserError(f"{args.show}: its log lacks answers, or the program has changed since. So "
                        "its prompts cannot be made again") from None
    repeated = [dumps(describe(place.env, played)) for played in outcome.trajectories]
    if dumps(episode) not in repeated:
        raise UserError(f"{args.show}: the repeated run gives another episode. The data or the "
                        "program have changed since, so its prompts cannot be made again")
    return "\n".join(lines)


def show(args: Namespace) -> None:
    """Print one episode of a finished run, or its prompts."""
    try:
        episode = episode_of(args.show, args.pick)
        # also a check that this version can read the episode
        text = "\n".join(story(episode))
        if args.prompts:
            text = prompts_of(args, episode)
    except (LookupError, TypeError, ValueError) as error:
        raise UserError(f"{args.show} was made by another version of this program, or its data "
                        f"are gone: {error}") from None
    print(text)


# ------------------------------------------------------------------------------ experiments


class Experiment(NamedTuple):
    """A table or figure of the paper; `curve` is ours."""
    title: str
    series: str                         # methods, or method:episodes; --rows selects some
    varied: str = ""                    # the flag that differs between its cells, if there is one
    x_values: Sequence[int | None] = (None,)    # of that flag; table6 takes the models asked for
    measure: str = "scores"             # what is measured: scores, shares or errors
    axis: str = ""                      # the name of the x axis; without one, bars are drawn
    label: str = "reward of an episode"         # what is measured, in words for the picture


EXPERIMENTS = {
    "table3": Experiment("Main comparison",
                         "random popular greedy varied common-sense one-list bandit a2c a2c:100000 "
                         "act react reflexion billp-no-model billp oracle"),
    "table5": Experiment("Ablation", "billp-no-macro billp-no-micro billp-no-critic "
                                     "billp-no-model billp"),
    "fig3": Experiment("Popularity of what is recommended", "billp a2c:10000", measure="shares",
                       axis="popularity of items, by quintile", label="share of recommendations"),
    "fig4": Experiment("The critic's estimate and one return", "billp", "episodes", (10, 50, 100),
                       measure="errors", axis="learning episodes",
                       label="mean squared error of the value"),
    "fig5": Experiment("How many items a user remembers", "react a2c reflexion billp", "window",
                       (1, 2, 4, 6, 8), axis="window W (items that a user remembers)"),
    "table6": Experiment("Language models", "billp", "model"),
    "curve": Experiment("Learning curve", "common-sense bandit a2c billp-no-model billp",
                        "episodes", (0, 10, 20, 50, 100, 200), axis="learning episodes"),
}


class Job(NamedTuple):
    """A run and what is measured in it."""
    run: Settings
    measure: str


# the series, such as "billp" or "a2c:10000", and the value of the flag that is varied, if any
Cell = tuple[str, Any]


def settings_of(base: Settings, varied: str, series: str, x: Any) -> Settings:
    """The settings of a cell with the first seed. `cells_of` sets the others."""
    method, _, episodes = series.partition(":")     # such as a2c:10000
    run = base._replace(method=method, config=base.config | billp.METHODS.get(method, {}))
    if varied == "window":
        run = run._replace(rule=base.rule | {"window": x})
    elif varied:                    # episodes or model, which are fields
        run = run._replace(**{varied: x})
    if episodes:                    # no experiment that varies the episodes has such rows
        run = run._replace(episodes=int(episodes))
    # A method that learns nothing plays no learning episodes. So if these vary, its cells are
    # equal, and `experiments` performs their runs once.
    return without_idle_learning(run)


def cells_of(args: Namespace, base: Settings, name: str) -> dict[Cell, list[Job]]:
    """Each cell with its jobs, one for each seed. UserError if --rows names an unknown row."""
    experiment = EXPERIMENTS[name]
    known = experiment.series.split()
    x_values = args.models_asked if experiment.varied == "model" else experiment.x_values
    cells = {}
    for series in parts(args.rows) if args.rows else known:
        if series not in known:
            raise UserError(f"--rows: {name} has no row {series!r}, only {' '.join(known)}")
        for x in x_values:
            run = settings_of(base, experiment.varied, series, x)
            seeds = range(base.seed, base.seed + args.seeds)
            cells[series, x] = [Job(run._replace(seed=seed), experiment.measure) for seed in seeds]
    return cells


def shares(env: envs.Env, sessions: Sequence[Session]) -> list[list[int]]:
    """[sessions, 5]: how many of the items are in each quintile of popularity, the lowest first."""
    order = np.argsort(envs.popularity(env), kind="stable")         # the least popular first
    ranks = np.argsort(order)                       # ranks[item] is its place in this order
    quintile = ranks * 5 // len(ranks)
    return [np.bincount(quintile[session.items], minlength=5).tolist() for session in sessions]


def shortened(env: envs.Env, gamma: float) -> envs.Env:
    """The world with sessions cut where a reward counts for less than 0.001 of the first one."""
    discounts = gamma ** np.arange(env.max_steps)           # of the first reward, the second, ...
    return env._replace(max_steps=int(np.sum(discounts >= 0.001)))


def errors_at(catalog: prompts.Catalog, user: int, key: Key, agent: Agent, llm: LLM,
              config: Config, pmap: Callable, draws: int) -> tuple[float, float]:
    """The error of one return, and that of the critic's V, at the first state of a user's session.

    The mean return of `draws` more sessions counts as the truth. `key` is that of the critic's ask.
    """
    # The returns are played in a shorter world, which takes half the time.
    catalog_to_play = catalog._replace(env=shortened(catalog.env, config.gamma))
    # The number of a session is part of its key, so each has its own draws; the phase "continue"
    # separates them from those of other phases.
    played = billp.evaluate(catalog_to_play, [user] * (draws + 1), agent, llm, key.seed,
                            "continue", config, pmap)
    # the first return is judged, the others tell what it should be
    one_return, *others = [billp.discounted_return(trajectory.last.rewards, config.gamma)
                           for trajectory in played]
    truth = np.mean(others)
    state = billp.state_after(catalog, user, key, config)
    answer, _ = billp.critic(state, agent.critic, llm, config)
    return one_return - truth, answer.result - truth


def critic_errors(run: Settings, place: Place, llm: LLM, embed: Embed, pmap: Callable,
                  agents: int = 6, draws: int = 200) -> list[list[float]]:
    """How well the return of one session and the critic's V estimate the value of a first state.

    [2, 6]: for each of the first two users bias, variance and mean squared error (MSE) of the
    return, then of V. Several agents learn, each with other draws. Bias and variance are taken over
    these agents. The variance divides by their number, so that it and the squared bias add up to
    the MSE. `draws` is that of `errors_at`.
    """
    config = Config(**run.config)
    catalog = prompts.catalog(place.env, embed)
    users = place.held_out[:2]
    errors = np.zeros((agents, len(users), 2))
    for number in range(agents):
        # Up to 1000 seeds of a table share no learning run: seed 0 uses 1000, 2000, ..., seed 1
        # uses 1001, 2001, ...
        seed = run.seed + 1000 * (number + 1)
        # the same world and users, but the learners in another order
        learners = envs.branch(seed, "learners").permutation(place.learners).tolist()
        agent = billp.NOVICE
        for agent, _ in billp.train(catalog, learners, llm, seed, config=config, pmap=pmap):
            pass                        # the last agent counts
        for i, user in enumerate(users):
            key = Key(seed, "value", i)
            errors[number, i] = errors_at(catalog, user, key, agent, llm, config, pmap, draws)
    bias, variance = errors.mean(0), errors.var(0)      # [users, 2]: of the return, of the critic
    figures = np.stack([bias, variance, bias ** 2 + variance], -1)      # [users, 2, 3]
    return figures.reshape(len(users), 6).tolist()


def measure_job(job: Job, llm: LLM = prompts.offline, embed: Embed = prompts.hashed_ngrams,
                pmap: Callable = map) -> list[list[float]]:
    """Perform a run and return the samples of what is measured, [users or states, k].

    The defaults are the stand-in's, so that any process can do an offline job.
    """
    place = build_place(job.run)
    if job.measure == "errors":
        return critic_errors(job.run, place, llm, embed, pmap)
    outcome = perform(job.run, place, billp.NOVICE, llm, embed, pmap, ("learn", "after"))
    sessions = outcome.sessions["after"]
    if job.measure == "shares":
        return shares(place.env, sessions)
    return scores_of(sessions)[0].tolist()


def end_with_parent() -> None:
    """What a worker process does first: it ignores Ctrl-C and watches for the end of its parent.

    Ctrl-C ends the parent. The worker ends after it, also if the parent was killed.
    """
    def wait() -> None:
        parent_process().join()
        os._exit(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    Thread(target=wait, daemon=True).start()


@contextmanager
def offline_pool(args: Namespace) -> Iterator[futures.Executor]:
    """The pool for offline runs: a cluster, or processes of this machine.

    `parallel` shuts the pool down. UserError if there is no such cluster.
    """
    if not args.cluster:
        yield futures.ProcessPoolExecutor(args.workers or None, initializer=end_with_parent)
        return
    try:
        from distributed import Client
    except ImportError:
        raise UserError("--cluster needs dask: pip install -e '.[cluster]'") from None
    try:
        client = Client(args.cluster, timeout=10)
    except (ValueError, TypeError, OSError) as error:
        raise UserError(f"--cluster takes HOST:PORT of a scheduler: {error}") from None
    with client:
        for file in (envs.__file__, prompts.__file__, billp.__file__, __file__):
            client.upload_file(file)
        yield client.get_executor()


def do_jobs(args: Namespace, jobs: Sequence[Job], folder: Path, live: Live) -> dict[str, list]:
    """The samples of each job. The keys are texts of jobs: a Job holds dicts and cannot be a key.

    Offline jobs run side by side. Jobs with a real model run one after the other.
    """
    samples_of = {}

    def finish(job: Job, samples: list) -> None:
        samples_of[dumps(job)] = samples
        say(f"{len(samples_of)} of {len(jobs)} runs: {job.run.method}, {job.run.episodes} "
            f"episodes, seed {job.run.seed}")

    if args.models_asked == ["offline"]:
        with offline_pool(args) as pool, parallel(pool, live.stop) as pmap:
            for job, samples in zip(jobs, pmap(measure_job, jobs)):
                finish(job, samples)
        return samples_of
    models = {}                         # one client and one log for each
    workers = args.workers or batch_workers(jobs[0].run)
    with parallel(futures.ThreadPoolExecutor(workers), live.stop) as pmap:
        for job in jobs:
            name = job.run.model
            if name not in models:
                models[name] = open_model(args, job.run, folder / quote(name, safe=""), live)
            llm, embed = models[name]
            # fig4 also plays sessions of no phase of a run, so no progress is shown.
            job_map = pmap if job.measure == "errors" else watched(pmap, job.run, live)
            finish(job, measure_job(job, partial(counted, llm, live), embed, job_map))
    return samples_of


class Row(NamedTuple):
    """One row of a table, or one point of a picture. Intervals are [mean, low, high], 95 %."""
    series: str
    x: Any                              # int, or the name of a model, or None
    figures: dict[str, list[float]]     # a picture shows the last one
    gain: list[float] | None = None     # R_traj minus that of billp


def share_of(counts: Array) -> Array:
    """Counts [..., users, 5] -> the share of each quintile [..., 5]."""
    sums = counts.sum(-2)
    return sums / np.maximum(sums.sum(-1, keepdims=True), 1)


def rows_of(series: str, x: Any, samples: dict[Cell, Array], measure: str) -> Iterator[Row]:
    """The rows of one cell. Scores give one row, shares one for each quintile, errors two.

    `samples` holds an array of every cell, [seeds, users or states, k], because a gain is taken
    against billp's.
    """
    own = samples[series, x]
    if measure == "scores":
        gain = None
        if series != "billp" and ("billp", x) in samples:
            gain = envs.metrics(own, samples["billp", x])["R_traj"]
        yield Row(series, x, envs.metrics(own), gain)
    if measure == "shares":
        for n, share in enumerate(envs.intervals(share_of, own), 1):
            yield Row(series, n, {"share": share})
    if measure == "errors":             # six columns, see `critic_errors`
        names = ("bias", "variance", "MSE")
        intervals = envs.intervals(partial(np.mean, axis=-2), own)
        yield Row("one return", x, dict(zip(names, intervals[:3])))
        yield Row("critic", x, dict(zip(names, intervals[3:])))


def comparison(gain: list[float]) -> str:
    """How a row compares with billp. It is higher or lower only if the interval holds no 0.

    With one user and one seed the interval has no width and says nothing.
    """
    _, low, high = gain
    if 0 < low < high:
        return "higher"
    return "lower" if low < high < 0 else "not significant"


def label_of(row: Row) -> str:
    """The name of a row in tables and pictures."""
    return row.series if row.x is None else f"{row.series}, {row.x}"


# Okabe and Ito's palette: a series has one colour in all pictures, and those not listed are grey
COLOURS = {
    "billp": "#0072B2", "billp-no-macro": "#0072B2", "billp-no-micro": "#0072B2",
    "billp-no-critic": "#0072B2", "billp-no-model": "#000000", "reflexion": "#D55E00",
    "react": "#009E73", "act": "#CC79A7", "a2c": "#E69F00", "a2c:10000": "#E69F00",
    "a2c:100000": "#E69F00", "bandit": "#56B4E9", "critic": "#0072B2", "one return": "#E69F00"}
GREY = "#999999"


def pictured(rows: Sequence[Row]) -> Array:
    """What a picture shows of each row, its last figure: [3, rows], the means, lows and highs."""
    return np.transpose([list(row.figures.values())[-1] for row in rows])


def limit_of(rows: Sequence[Row]) -> float:
    """Where an axis ends: just above all intervals, but not beyond 1.6 times the largest mean.

    So one wide interval does not flatten the others.
    """
    means, _, highs = pictured(rows)
    return min(1.05 * highs.max(), 1.6 * means.max()) or 1.0        # an axis needs some length


def plot_bars(axes: Any, rows: Sequence[Row]) -> None:
    """Horizontal bars with intervals, the first row at the top."""
    means, lows, highs = pictured(rows)
    names = [f"{label_of(row)}: {mean:.0f}" for row, mean in zip(rows, means)]
    colours = [COLOURS.get(row.series, GREY) for row in rows]
    axes.barh(names, means, xerr=[means - lows, highs - means], color=colours, capsize=3)
    axes.invert_yaxis()
    # The axis ends at most 30 % beyond the methods with language. A longer bar, such as the
    # oracle's, is cut.
    methods = [row for row in rows if row.series in billp.METHODS] or rows
    end = min(limit_of(rows), 1.3 * limit_of(methods))
    axes.set_xlim(0, end)


def plot_lines(axes: Any, rows: Sequence[Row]) -> None:
    """One line with intervals for each series."""
    for series in dict.fromkeys(row.series for row in rows):
        points = [row for row in rows if row.series == series]
        x = [row.x for row in points]
        mean, low, high = pictured(points)
        colour = COLOURS.get(series, GREY)
        axes.errorbar(x, mean, [mean - low, high - mean], label=series, color=colour, marker="o",
                      capsize=3)
    axes.set_xticks(sorted({row.x for row in rows}))
    axes.set_ylim(0, limit_of(rows))
    axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))       # beside the axes


def plot(experiment: Experiment, heading: str, rows: Sequence[Row], path: Path) -> None:
    """Draw an experiment: lines over its x axis, or else bars."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        say("no picture: pip install -e '.[plot]' draws it")
        return
    figure = Figure((8, 4.5), layout="constrained")
    axes = figure.subplots()
    label = f"{experiment.label} (mean, 95 % confidence interval)"
    if experiment.axis:
        plot_lines(axes, rows)
        axes.set(xlabel=experiment.axis)
        axes.set_ylabel(label, fontsize=8)
    else:
        plot_bars(axes, rows)
        axes.set(xlabel=label)
    axes.grid(alpha=0.3)
    figure.suptitle(f"{experiment.title}\n{heading}", fontsize=8, parse_math=False)
    figure.savefig(path)


def publish(name: str, base: Settings, samples: dict[Cell, Array], folder: Path) -> None:
    """Print the tables of an experiment and write its files. `samples` are those of each cell."""
    experiment = EXPERIMENTS[name]
    models = [base.model]
    if experiment.varied == "model":
        models = [model for _, model in samples]
    model_names = [STAND_IN if model == "offline" else model for model in models]
    rows, raw = [], []
    for series, x in samples:
        rows += rows_of(series, x, samples, experiment.measure)
        raw.append({"series": series, "x": x, "samples": samples[series, x].tolist()})
    any_cell = next(iter(samples.values()))
    last = base.seed + len(any_cell) - 1            # the first axis of a cell is its seeds
    units = "states" if experiment.measure == "errors" else "held-out users"
    heading = (f"{name} on {base.world}, seeds {base.seed} to {last}, "
               f"{any_cell.shape[1]} {units} each\nmodel {', '.join(model_names)}")
    content = {"experiment": name, "settings": base._asdict(),
               "rows": [row._asdict() for row in rows], "cells": raw}
    write(folder / f"{name}.json", dumps(content) + "\n")
    figures = {label_of(row): interval_cells(row.figures) for row in rows}
    print(heading, "", *grid(figures), "", sep="\n")
    gains = {}
    for row in rows:
        if row.gain:
            cells = interval_cells({"R_traj minus billp's": row.gain})
            gains[label_of(row)] = cells | {"": comparison(row.gain)}
    if gains:
        print(*grid(gains), "", sep="\n")
    plot(experiment, heading, rows, folder / f"{name}.png")


def experiments(args: Namespace, live: Live) -> None:
    """Perform the experiments asked for. A job that two of them need is performed once."""
    began = time.perf_counter()
    base = settings(args, read_memory(None))
    tables = {name: cells_of(args, base, name) for name in args.experiment}
    jobs = []
    for cells in tables.values():
        for needed in cells.values():
            jobs += [job for job in needed if job not in jobs]
    # First methods with language, then policies: a mistyped model then ends the command at once. In
    # both groups those with more episodes come first.
    jobs.sort(key=lambda job: (job.run.method in envs.POLICIES, -job.run.episodes))
    # The first job needs the most learners. Its world is built before anything is written, so a
    # lack of users leaves no files. The world is cached.
    place = build_place(jobs[0].run)
    if place.env.about:
        say(f"world {place.env.about}")
    flags = {name: getattr(args, name) for name in ("experiment", "seeds", "models", "rows")}
    folder = run_directory(args, base._asdict() | flags)
    samples_of = do_jobs(args, jobs, folder, live)
    run_directory(args, base._asdict() | flags)     # as in `one_run`
    for name, cells in tables.items():
        samples = {}
        for cell, needed in cells.items():
            samples[cell] = np.array([samples_of[dumps(job)] for job in needed], float)
        publish(name, base, samples, folder)
    print(*ledger(live), f"seconds   {time.perf_counter() - began:.1f}", f"run       {folder}",
          sep="\n")


# ------------------------------------------------------------------------------------ main


def main(argv: Sequence[str] | None = None) -> int:
    """Do what the flags say. Return the exit code."""
    live = new_live()
    try:
        args = parse(argv)
        if args.show:
            show(args)
        elif args.experiment:
            experiments(args, live)
        else:
            one_run(args, live)
        print(end="", flush=True)       # a closed pipe must raise here
        return 0
    except BrokenPipeError:             # the reader of the output has closed it
        return 0
    except KeyboardInterrupt:
        then = ""
        if "asked" in live.stats:       # an endpoint or its log was opened
            then = "; the same command goes on and asks nothing that the log answers"
        say(*ledger(live), f"run.py: interrupted{then}")
        return 130
    except ONE_LINE_ERRORS as error:
        # another thread's error may be raised first, but the first failure is the cause
        cause = (live.failures or [error])[0]
        reason = str(cause) or type(cause).__name__         # a MemoryError has no text
        say(*ledger(live), f"run.py: {prompts.clean(reason, 999)}")
        return 3 if isinstance(cause, prompts.BudgetSpent) else 2


if __name__ == "__main__":
    import run          # other processes find its functions by this name, not as those of __main__
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if sys.stdout:                      # letters that a terminal cannot show become a ?
        sys.stdout.reconfigure(errors="replace")
    exit_code = run.main()
    # `os._exit` ends threads that still wait for an answer after Ctrl-C. It flushes nothing, so
    # print does that first.
    try:
        print(end="", flush=True)
    except OSError:
        pass
    os._exit(exit_code)
