"""Laws and worked examples of all modules.

Expected values come from naive code or from a calculation by hand. Servers are simulated or run on
loopback. Each test was seen to fail after the line that it guards had been broken.
"""
import ast
import email.utils
import json
import math
import os
import pickle
import re
import signal
import subprocess
import sys
import threading
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from functools import cache, partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import StringIO
from itertools import count, pairwise, product, repeat
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import hypothesis.strategies as st
import httpx
import numpy as np
import pytest
from hypothesis import assume, given, settings

import billp
import envs
import prompts
import run
from billp import EMPTY, NOVICE, Config, Record, merge, recall, records, remember
from prompts import Ask, BudgetSpent, Candidate, EndpointError, Key, Malformed, Reply, Usage

settings.register_profile("tests", deadline=None)
settings.load_profile("tests")

# -------------------------------------------------------------------- builders: worlds


def hand_world(places=(0, 5, 5.5, 9), ratings=(4, 5, 3, 1), **changes):
    """Items on a line and one user, who liked the last. Bat is nearer to Bee than beta = 1."""
    vectors, m = np.array(places, np.float32)[:, None], len(places)
    world = envs.Env(
        titles=("Ant", "Bee", "Bat", "Cow")[:m], years=(None, 1990, 1991, None)[:m],
        categories=("Bug", "Beast"), belongs=np.array([[1, 0], [1, 0], [0, 1], [0, 1]], bool)[:m],
        vectors=vectors, rate=envs.table([ratings]), distance=envs.euclidean(vectors),
        histories=((m - 1,),), learners=1, window=2)
    return world._replace(**changes)


def small_world(seed, kind="table", items=9, **rule):
    """A random world, its ratings [6, m] and the distances [2, m, m] of learners and of others."""
    rng = np.random.default_rng(seed)
    vectors = rng.normal(size=(items, 2)).astype("f4")
    ratings = rng.integers(1, 6, (6, items))
    apart = np.array([[[math.dist(a, b) for a in vectors] for b in vectors]] * 2)
    rate, distance = envs.table(ratings), envs.euclidean(vectors)
    if kind == "halves":
        apart = rng.random((2, items, items)) * 3
        distance = partial(envs.distance_by_half, 3, *apart)
    env = envs.Env(
        titles=tuple(f"Item {item}" for item in range(items)), years=(None,) * items,
        categories=("A", "B", "C"), belongs=rng.random((items, 3)) < 0.4,
        vectors=vectors, rate=rate, distance=distance,
        histories=[rng.permutation(items)[:2] for _ in range(6)], learners=3,
        **{"window": 3, "max_steps": 6} | rule)
    return env, ratings, apart


FILMS = envs.films(0)
CATALOG = prompts.catalog(FILMS)
ALIEN, JAWS, UP = map(FILMS.titles.index, ("Alien", "Jaws", "Up"))
# titles like refusals, labels or numbers, with marks or accents, with a rival, and twins
ODD = ("Sorry to Bother You", "I Can't Sleep", "Missing in Action 2: The Beginning",
       "The Beginning", "28 Up", "BioShock™", "L’Été & Co", "Ōkami®", "The Heat", "Heat", "M",
       "Sabrina", "SABRINA", "The Lost World: Jurassic Park")
ODDLY_TITLED = prompts.catalog(FILMS._replace(
    titles=ODD + FILMS.titles[14:], years=(None,) * 11 + (1953, 1954, None) + FILMS.years[14:]))
NAMES = [line.partition(" [")[0] for line in ODDLY_TITLED.lines]

# --------------------------------------------------------- builders: models and episodes

STATE = billp.state_after(CATALOG, 0, Key(0, "learn", 0))
NO_TASTES = prompts.Tastes((), (), ())
REPLIES = {
    "planner": ["Thought: bugs", "Thought: bugs still", "Thought: a beast"],
    "actor": ["Action: recommend Ant", "Action: recommend Bee (1990)", "Action: recommend bat"],
    "critic": ["Value: 6.5", "Value: 5", "Value: 2"],
    "reflector": ["Reflection: Bat is like Bee."],
}
AXES = np.concatenate([np.eye(3), -np.eye(3), [[0.6, 0.8, 0], [0.99998, 0.00632, 0]]])
VECTORS = dict(zip("abcdefgh", AXES))           # h is near a; a text fixes its vector


def memory_of(rows, memory=EMPTY):
    """The memory with these records remembered one by one."""
    for row in rows:
        memory = remember(memory, row.text, row.content, VECTORS[row.text], row.item)
    return memory


@cache
def learn(episodes=20, llm=prompts.offline, **options):
    """The batches that a model learns on films."""
    return list(billp.train(CATALOG, range(episodes), llm, **options))


def scripted(replies):
    """A model with texts for each role. It says text number step + attempt, or the last one."""
    def answer(ask):
        texts = replies[ask.role]
        place = min(ask.key.step + ask.key.attempt, len(texts) - 1)
        return Reply(texts[place])
    return answer


def noting(llm):
    """The same model, and a list of what it is asked."""
    asks = []

    def noted(ask):
        asks.append(ask)
        return llm(ask)
    return noted, asks


# ------------------------------------------------------------------------- strategies

numbers = st.floats(-9, 9)
gammas = st.floats(0, 1)
queries = st.sampled_from("abcdefgh")
rows_of = st.lists(st.builds(Record, queries, st.sampled_from(["", "x"]), numbers), max_size=12)
junk = st.text(max_size=60) | st.sampled_from([
    "x [y]\nObservation 1: the user left\nAction 2: recommend Bee [", "\n\nThought 1: so",
    "a\u2028Action: b\r\x85Value: 9\x00\x1e\x1b[2J", '"}\n{"ask": "x"}\n', "] [a, b", "\ud83d",
    "a: b]\n" * 400, "9" * 400])
seeds = st.integers(0, 10 ** 6)
kinds = st.sampled_from(["table", "halves"])
# lines as a well-behaved model writes them: no marks at the ends, no label in front
plain_texts = st.from_regex("[A-ZÉÖ][a-zéöß]{2,8}( [a-zéöß0-9]{1,9}){0,5}", fullmatch=True)


# ------------------------------------------------- builders: a scripted client, files, logs

SECRET = "sk-Quite5ecretKey42"
ASK = Ask("actor", Key(0, "learn", 1, 2), (("system", "Be brief."), ("user", "Hi")))
USAGE = {"prompt_tokens": 9, "completion_tokens": 2, "prompt_tokens_details": {"cached_tokens": 4}}
GOOD = Reply("hello", Usage(9, 4, 2))
ASKS = [ASK._replace(key=ASK.key._replace(attempt=attempt)) for attempt in range(3)]
LOGGED = dict(zip(ASKS, [GOOD, Reply("", GOOD.usage, "flagged"), Reply("b")]))


def completion(content="hello", finish="stop", usage=USAGE, **more):
    """A response with a chat completion."""
    choice = {"message": {"content": content, **more}, "finish_reason": finish}
    answer = {"choices": [choice], "usage": usage, "system_fingerprint": f"fp {SECRET}"}
    return httpx.Response(200, json=answer)


def response(status, body="", header=""):
    """A response, given its HTTP status, or an exception, given its name.

    A plain text becomes the message of an error object.
    """
    if status.endswith(("Error", "Timeout")):
        return getattr(httpx, status, UnicodeError)(body)
    if body and not body.startswith(("{", "[", "<", "data:")):
        body = json.dumps({"error": {"message": body}})
    headers = dict([header.split(": ", 1)]) if header else {}
    return httpx.Response(int(status), text=body, headers=headers)


def table(text):
    """The rows of a text: one a line, cells between " | ". In a cell \\n is a new line.

    Several entries in the first two columns, as in "a ; b", make a row each: "a ; b | c | d" is the
    rows (a, c, d) and (b, c, d). In "a ;" the second entry is empty.
    """
    rows = []
    for line in text.strip().splitlines():
        line = line.replace(r"\n", "\n")
        first, second, *rest = [cell.strip(" ") for cell in re.split(r" \|(?= |$)", line)]
        entries = [re.split(" ;(?: |$)", cell) for cell in (first, second)]
        rows += [(*pair, *rest) for pair in product(*entries)]
    return rows


def without(name, text="Unsupported parameter: '{}' is not supported"):
    """A server that refuses this parameter."""
    def act(body):
        return response("400", text.format(name)) if name in body else completion()
    return act


def client(*script, base="http://localhost:8080", make=prompts.openai, **options):
    """A client, as `seen.ask`, and what passed between it and a server.

    The server acts out the script (responses, exceptions, or functions of the request's body), and
    then always says hello.
    """
    acts = iter(script)
    seen = SimpleNamespace(requests=[], bodies=[], notices=[], waits=[], stats={})

    def handle(request):
        body = json.loads(request.content)
        seen.requests.append(request)
        seen.bodies.append(body)
        act = next(acts, completion())
        if callable(act):
            act = act(body)
        if isinstance(act, Exception):
            raise act
        return httpx.Response(act.status_code, content=act.content, headers=act.headers)
    options = {"key": SECRET, "notice": seen.notices.append, "sleep": seen.waits.append,
               "stats": seen.stats, "transport": httpx.MockTransport(handle)} | options
    seen.ask = make(base, "m", **options)
    return seen


def failure(act, *arguments, kind=EndpointError):
    """The one line of an error, checked to hold no key anywhere."""
    with pytest.raises(kind) as caught:
        act(*arguments)
    line = str(caught.value)
    assert line.isprintable() and len(line) < 700
    assert SECRET not in "".join(traceback.format_exception(caught.value)) + repr(caught.value)
    return line


def logged_answers(path, llm=prompts.unlogged):
    """The replies to ASKS of a model that is recorded there."""
    llm = prompts.recorded(llm, prompts.open_log(path, "m"))
    return [llm(ask) for ask in ASKS]


def lay(path, files):
    """Write these files below a path."""
    for name, content in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


# -------------------------------------------------- builders: commands and a server on loopback
# The server answers as the stand-in would: a run over HTTP must leave the files of one offline.

SMALL = ("--episodes", 4, "--users", 3, "--batch", 2, "--max-steps", 4)
ROLE = {"Next category": "planner", "Free item": "actor", "Value": "critic",
        "Reflection": "reflector"}


@pytest.fixture(scope="session", autouse=True)
def no_endpoint():
    """No test asks a real endpoint."""
    kept = {name: text for name, text in os.environ.items() if not name.startswith("OPENAI_")}
    with mock.patch.dict(os.environ, kept, clear=True):
        yield


def command(*argv, **variables):
    """The exit code, stdout and stderr of a command, which runs in this process."""
    out, err = StringIO(), StringIO()
    with mock.patch.dict(os.environ, variables), redirect_stdout(out), redirect_stderr(err):
        code = run.main([str(word) for word in argv])
    return code, out.getvalue(), err.getvalue()


def succeed(*argv):
    """The stdout of a command that ends well."""
    code, out, err = command(*argv)
    assert code == 0, err
    return out


def refuse(*argv, **variables):
    """The last line of a command that ends with 2 and no result."""
    code, out, err = command(*argv, **variables)
    assert (code, out) == (2, "") and SECRET not in err
    assert "Traceback" not in err and err.count("run.py: ") == 1
    return err.splitlines()[-1]


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """The directory of the small run without an endpoint."""
    folder = tmp_path_factory.mktemp("finished")
    assert "no evidence about real models" in succeed(*SMALL, "--out", folder)
    return folder


def files(folder):
    """The bytes that a run left, and its summary without what differs between runs over HTTP."""
    summary = read(folder / "summary.json")
    for name in ("seconds", "model", "calls", "endpoint"):
        del summary[name]
    return (folder / "episodes.jsonl").read_bytes(), (folder / "memory.json").read_bytes(), summary


def episodes_in(folder):
    """The lines of episodes.jsonl."""
    return [json.loads(line) for line in (folder / "episodes.jsonl").open(encoding="utf-8")]


def read(path):
    """The content of a JSON file."""
    return json.loads(path.read_text("utf-8"))


def settings_of(text):
    """The settings that flags ask for."""
    return run.settings(run.parse(text.split()), run.read_memory(None))


def stand_in(body):
    """The stand-in's answer to a request."""
    if "input" in body:
        rows = prompts.hashed_ngrams(body["input"]).tolist()
        return 200, json.dumps({"data": [{"embedding": row} for row in rows]})
    prompt = body["messages"][0]["content"].removeprefix(prompts.SYSTEM + "\n\n")
    label, _, _ = prompt.rpartition("\n")[2].partition(":")         # the last line begins with it
    text = prompts.offline_text(ROLE[label], prompt, body["seed"])
    answer = {"choices": [{"message": {"content": text}}], "system_fingerprint": "fp_1"}
    return 200, json.dumps(answer)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    log_message = mock.Mock()               # it would print each request

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if "seed" in body:
            self.server.asked.append((body["messages"][0]["content"], body["seed"]))
        self.server.headers.append(self.headers)
        status, text = self.server.act(body) or stand_in(body)
        self.send_response(status)
        self.send_header("Content-Length", str(len(text.encode())))
        self.end_headers()
        self.wfile.write(text.encode())


class Server(ThreadingHTTPServer):
    request_queue_size = 128
    handle_error = mock.Mock()              # it would print that a client was killed


@contextmanager
def endpoint(act=lambda body: None):
    """A server that does what `act` says: (status, text), or None for the stand-in's answer."""
    with Server(("127.0.0.1", 0), Handler) as server:
        server.act, server.asked, server.headers = act, [], []
        server.url = f"http://127.0.0.1:{server.server_port}"
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield server
        server.shutdown()


def flags_of(url, folder, *more):
    """The flags of the small run over HTTP."""
    return (*SMALL, "--base-url", url, "--model", "m", "--out", folder, *more)


def answers_in(folder):
    """How many asks have an answer in the log, in whole lines."""
    lines = (folder / "calls.jsonl").read_bytes().split(b"\n")[:-1]
    return len({json.loads(line)["ask"] for line in lines})


# -------------------------------------------------------------------------- memory and credit


@given(st.lists(st.tuples(st.integers(0, 9), rows_of | st.integers(0, 9)), max_size=20))
def test_memories_of_any_ancestry_are_lists_that_never_change(script):
    """A step remembers rows in an earlier memory, or merges two earlier ones."""
    pool = [(EMPTY, [])]
    for place, growth in script:
        memory, rows = pool[place % len(pool)]
        if isinstance(growth, int):
            newer, more = pool[growth % len(pool)]
            pool.append((merge(memory, newer), rows + more))
        else:
            pool.append((memory_of(growth, memory), rows + growth))
    for memory, rows in pool:
        assert list(records(memory)) == rows
        for chunk in memory:
            assert np.array_equal(chunk.vectors, [VECTORS[row.text] for row in chunk.records])
        for older, newer in pairwise(memory):
            assert len(older.records) >= 2 * len(newer.records)


@given(rows_of, rows_of, queries, st.integers(0, 5),
       st.sampled_from([-1, 0, 0.4, 2, np.inf]))
def test_recall_is_sort_and_cut(a, b, query, k, tau):
    """The newest record of each text and item, sorted by squared L2, cut at k and tau."""
    rows, distances = a + b, {}
    newest = {(row.text, row.item): place for place, row in enumerate(rows)}
    for place in newest.values():
        difference = VECTORS[rows[place].text] - VECTORS[query]
        distances[place] = round(float(difference @ difference), 5)
    nearest = sorted(distances, key=lambda place: (distances[place], -place))
    near = [rows[place] for place in nearest if distances[place] <= tau]
    memory = merge(memory_of(a), memory_of(b))
    assert recall(memory, VECTORS[query], k, tau) == tuple(near[:k])


@given(numbers, gammas, numbers, numbers, st.booleans(), numbers)
def test_an_advantage_falls_as_its_baseline_rises(reward, gamma, value, next_value, left, rise):
    """And the actor-critic computes the same."""
    before = billp.advantage(reward, gamma, value, next_value, left)
    after = billp.advantage(reward, gamma, value + rise, next_value, left)
    assert after == pytest.approx(before - rise, abs=1e-9)
    td_error = envs.td_errors(reward, gamma, value, next_value, np.array([left]))
    assert td_error == pytest.approx(before)


@given(st.lists(st.tuples(numbers, numbers), min_size=1), numbers, gammas, st.booleans())
def test_discounted_advantages_telescope_to_return_minus_first_value(pairs, last, gamma, left):
    rewards, values = zip(*pairs)
    lefts = [False] * (len(pairs) - 1) + [left]
    next_values = [*values[1:], last]
    advantages = [*map(billp.advantage, rewards, repeat(gamma), values, next_values, lefts)]
    bootstrap = 0 if left else gamma ** len(pairs) * last
    gain = billp.discounted_return(rewards, gamma) + bootstrap - values[0]
    assert billp.discounted_return(advantages, gamma) == pytest.approx(gain, abs=1e-9)


def test_the_block_to_copy_needs_numpy_alone():
    source = Path(billp.__file__).read_text("utf-8")
    block = re.search("(?ms)^# -+ credit$.*?(?=^# -+ roles$)", source)[0]
    imports = ("from __future__ import annotations\nfrom functools import reduce\n"
               "from typing import Any, NamedTuple, Sequence\nimport numpy as np\n")
    alone = {"__name__": "alone"}
    exec(imports + block, alone)
    memory = alone["remember"](alone["EMPTY"], "text", 7, np.ones(1))
    assert [record.content for record in alone["recall"](memory, np.ones(1), 1)] == [7]
    assert alone["advantage"](4, 0.5, 6, 5, False) == 0.5


# -------------------------------------------------------------------------- roles and episode


def nearby(*pairs):
    """A memory of contents and items, all found in the state STATE."""
    memory = EMPTY
    for place, (content, item) in enumerate(pairs):
        memory = remember(memory, str(place), content, STATE.vector, item)
    return memory


@pytest.mark.parametrize("role, changes, recalled", [
    (billp.planner, {}, "BA"), (billp.planner, {"lessons": "latest"}, "CB"),
    (billp.planner, {"lessons": "none"}, ""), (billp.critic, {"k_values": 1}, "B")])
def test_a_reader_recalls_by_its_own_numbers_and_changes_nothing(role, changes, recalled):
    a, b, c = "ABC" if role == billp.planner else (1, 1, 1)
    memory = nearby((a, "A"), (b, "B"))                                 # B is the newer
    memory = remember(memory, "C", c, np.roll(STATE.vector, 1), "C")    # far, and the newest
    answer, after = role(STATE, memory, llm=prompts.offline, config=Config(**changes))
    assert [entry[0] for entry in answer.recalled] == list(recalled)
    assert after is memory


def test_near_duplicates_of_a_lesson_are_shown_once():
    """Of two that share 9 of 11 words the newer is shown. Two that share 4 of 5 are both shown."""
    lessons = ["a b c d", "a b c d e", "a b c d e f g h i j", "a b c d e f g h i k"]
    memory = nearby(*[(lesson, "") for lesson in lessons])
    for k, shown in ((3, (lessons[3], lessons[1], lessons[0])), (2, (lessons[3], lessons[1]))):
        plan, _ = billp.planner(STATE, memory, prompts.offline, Config(k_lessons=k))
        assert plan.recalled == shown


def test_candidates_fit_the_thought_and_are_ranked_by_evidence():
    """Of 18 near verdicts 14 encourage: the average chance is 15 / 20, by Laplace's rule.

    Four equal verdicts move an item a third of the way to 0 or 1: 4 / (4 + ADDED_TRIALS).
    """
    state = STATE._replace(thought="Western next")
    plain = billp.shortlist(state, EMPTY, CATALOG, Config())
    assert len(plain) == 10 and all("Western" in item.line for item in plain)
    bad, good = plain[0].line, plain[-1].line
    near = nearby(*4 * [(0, bad), (1, good)], *10 * [(1, "an item of another world")])
    memory = merge(near, remember(EMPTY, "far", 0, np.roll(STATE.vector, 1), good))     # the 19th
    texts = prompts.query(state.thought, FILMS.categories, state.tastes)
    items = prompts.closest(texts, CATALOG, {bad: -0.75 / 3, good: 0.25 / 3}, 0.5)
    lines = [CATALOG.lines[item] for item in items if item not in state.taken][:10]
    assert lines.index(bad) > 1 and lines.index(good) < 9               # both have moved
    ranked = billp.shortlist(state, memory, CATALOG, Config(k_experience=18))
    assert [item.line for item in ranked] == lines
    assert {Candidate(good, 4, 0), Candidate(bad, 0, 4)} < set(ranked)
    assert Candidate(good, 4, 1) in billp.shortlist(state, memory, CATALOG, Config(k_experience=19))
    assert billp.shortlist(state, memory, CATALOG, Config(experience=False)) == plain


@given(junk | st.sampled_from([FILMS.titles[item] for item in STATE.taken]))
def test_a_listed_item_replaces_what_is_not_available(text):
    """A small model repeats recent items. The nearest of all items would be too similar."""
    act, _ = billp.actor(STATE, EMPTY, scripted({"actor": [text]}), CATALOG)
    lines = [candidate.line for candidate in act.recalled]
    assert act.exact or CATALOG.lines[act.result] in lines


def test_without_candidates_experience_is_shown_and_nothing_else():
    """Neither a taken item nor one of another world is shown."""
    config = Config(candidates=0, k_actions=2)
    assert billp.shortlist(STATE, EMPTY, CATALOG, config) == ()
    taken, a, b, c = (CATALOG.lines[item] for item in (STATE.taken[0], ALIEN, JAWS, UP))
    memory = nearby((1, b), (1, c), (0, a), (1, taken), (1, "Nobody [War]"))
    llm, asks = noting(scripted({"actor": ["a musical"]}))
    act, _ = billp.actor(STATE, memory, llm, CATALOG, config)
    assert act.recalled == (Candidate(c, 1, 0), Candidate(b, 1, 0))
    assert not act.exact and "Musical" in CATALOG.lines[act.result]      # the nearest of all
    prompt = asks[0].messages[1][1]
    assert f":\n- {c}\n- {b}\n\n" in prompt and "or another" in prompt
    assert "Encouraged in similar situations: Up (1 of 1), Jaws (1 of 1)." in prompt


def test_the_list_is_free_items_and_begins_with_new_categories():
    """New: shares no category with the last four items shown."""
    llm, asks = noting(prompts.offline)
    steps = [step for _, [t] in learn(20, llm, config=Config(batch=1)) for step in t.steps]
    is_mixed = []
    for step, ask in zip(steps, [ask for ask in asks if ask.role == "actor"], strict=True):
        lines = [item.line for item in step.act.recalled]
        assert f"Free items:\n{prompts.bullets(lines)}\n\n" in ask.messages[1][1]
        taken = {CATALOG.lines[item] for item in step.state.taken}
        assert len(set(lines) - taken) == len(lines) == 10
        shown = {tag for line in step.state.shown[-4:] for tag in prompts.line_tags(line)}
        are_new = [shown.isdisjoint(prompts.line_tags(line)) for line in lines]
        assert are_new == sorted(are_new, reverse=True)
        is_mixed.append(len(set(are_new)) == 2)
    assert sum(is_mixed) > 10


@pytest.mark.parametrize("method, roles, memories", table("""
act | actor |
react | planner actor |
reflexion | planner actor reflector | planner
billp | planner actor critic reflector | planner actor critic
billp-no-macro | planner actor critic | actor critic
billp-no-micro | planner actor reflector | planner
billp-no-critic | planner actor reflector | planner actor
billp-no-model | | actor critic
"""))
def test_a_method_asks_its_roles_and_writes_its_memories(method, roles, memories):
    """And no two asks share role and key."""
    llm, asks = noting(prompts.offline)
    config = Config(**billp.METHODS[method])
    agent, trajectories = learn(10, llm, config=config, seed=np.int64(0))[-1]
    assert {ask.role for ask in asks} == set(roles.split())
    assert {role for role, memory in agent._asdict().items() if memory} == set(memories.split())
    for t in trajectories:
        steps = len(t.steps) if config.experience else 0
        assert (len(t.values), len(t.advantages)) == (steps + config.experience, steps)
    assert config.baseline or {record.content for record in records(agent.actor)} == {1}
    learning = len(asks)
    [t, _] = billp.evaluate(CATALOG, [500, 500], agent, llm, np.int64(0), "after", config)
    played = {ask.role for ask in asks[learning:]}
    assert played == set(roles.split()) - {"critic", "reflector"}
    assert t.gained == NOVICE
    assert len({(ask.role, ask.key) for ask in asks}) == len(asks)
    assert all(type(ask.key.seed) is int for ask in asks)       # else it would draw otherwise


def test_a_malformed_reply_is_asked_again():
    """The prompt stays as it was, and each complaint follows it."""
    replies = [None, "<think>War</think>", "Sorry, but\nI can't", "Thought: go on"]
    llm, asks = noting(scripted({"planner": replies}))
    turns = tuple(prompts.turn(n, "", "a line", 5, False) for n in range(10, 99))
    newest = "".join(turns[-7:])
    config = Config(reply_tokens=77, temperature=0.3, transcript=len(newest), retries=3)
    plan, _ = billp.planner(STATE._replace(turns=turns), EMPTY, llm, config)
    assert (plan.result, plan.malformed, plan.fallback, len(asks)) == ("go on", 3, False, 4)
    for attempt, ask in enumerate(asks):
        prompt, complaints = ask.messages[:2], ask.messages[2:]
        assert prompt == asks[0].messages and f"so far:\n{newest}\nCategories" in prompt[1][1]
        assert [role for role, _ in complaints] == ["assistant", "user"] * attempt
        assert all(text.isprintable() and "War" not in text for _, text in complaints)
        assert all("no line" in text for role, text in complaints if role == "user")
        assert ask.key == STATE.key._replace(attempt=attempt)
        assert (ask.max_tokens, ask.temperature) == (77, 0.3)
    assert prompts.bounded(turns, 9) == turns[-1]               # at least one turn


@pytest.mark.parametrize("thought, is_usable", [
    ("War again, because it was liked", False), ("War, not Comedy", False), ("warm beasts", True),
    ("War or Comedy", True), ("Western, because War was shown", True), ("Avoid War.", True)])
def test_a_planner_that_repeats_a_category_is_asked_again(thought, is_usable):
    """Unless none is offered, or the check is switched off."""
    tastes = prompts.category_tool(("A [Comedy]", "B [Drama]"), ("C [War]",), 4)
    state = STATE._replace(tastes=tastes)
    llm = scripted({"planner": [f"Next category: {thought}", "Next category: new"]})
    plan, _ = billp.planner(state, EMPTY, llm)
    assert (plan.result, plan.malformed) == ((thought, 0) if is_usable else ("new", 1))
    for other, config in ((state, Config(fresh_thoughts=False)),
                          (STATE._replace(tastes=NO_TASTES), Config())):
        plan, _ = billp.planner(other, EMPTY, llm, config)
        assert (plan.result, plan.malformed) == (thought, 0)


def test_a_later_line_may_tell_what_should_come_next():
    tastes = prompts.Tastes(("War",), ("Comedy",), ())
    chatty = "War was shown lately.\nComedy was not.\n\n**Comedy** should come next."
    assert prompts.parse_planner(chatty, tastes) == "Comedy should come next."
    assert isinstance(prompts.parse_planner(f"Thought: {chatty}", tastes), Malformed)


def test_after_unreadable_replies_the_first_that_is_offered_is_taken():
    llm, asks = noting(scripted({"planner": [""], "actor": [""]}))
    plan, _ = billp.planner(STATE, EMPTY, llm, Config(retries=0))
    [first] = re.findall(r"should come next: (.*?), ", asks[0].messages[1][1])
    assert (plan.result, plan.said, plan.fallback) == (first, "", True)
    plan, _ = billp.planner(STATE._replace(tastes=NO_TASTES), EMPTY, llm, Config(retries=0))
    assert (plan.result, plan.fallback) == ("", True)            # nothing was offered
    state = STATE._replace(thought="Western next")
    act, _ = billp.actor(state, EMPTY, llm, CATALOG, Config(retries=4))
    assert (act.said, act.malformed, act.fallback, act.exact) == ("", 5, True, False)
    assert CATALOG.lines[act.result] == act.recalled[0].line
    act, _ = billp.actor(state, EMPTY, llm, CATALOG, Config(candidates=0))
    assert [act.result] == prompts.free_by_nearness(STATE.text, CATALOG, STATE.taken)[:1]


def test_twins_are_listed_once_and_not_if_one_is_taken():
    """Twins have one line. An item with the same title and another line is listed, too."""
    catalog = prompts.catalog(hand_world(titles=("Ant", "Ant", "Bat", "Ant"), years=(None,) * 4))
    opening = billp.state_after(catalog, 0, Key(0, "learn", 0))
    for taken, lines in (((2,), ["Ant [Bug]", "Ant [Beast]"]), ((0, 2, 3), [])):
        state = opening._replace(taken=taken, thought="Bug", tastes=NO_TASTES)
        listed = billp.shortlist(state, EMPTY, catalog, Config(candidates=2))
        assert [item.line for item in listed] == lines


@pytest.mark.parametrize("reply, ratings, as_before, value", [
    ("Value: 7", (), 6, 7), ("999", (4.0, 1.0), 5, 10), ("Value: -3", (), 6, 0),
    ("hm", (4.0, 1.0), 5, 3)])
def test_a_value_lies_between_0_and_the_top(reply, ratings, as_before, value):
    """As before is the mean rating so far, or 3 of 5. The fallback is the mean of 2 and 4."""
    memory = remember(remember(EMPTY, "a", 2.0, STATE.vector), "b", 4.0, STATE.vector)
    state = STATE._replace(rewards=ratings, top=10.0)
    llm, asks = noting(scripted({"critic": [reply]}))
    assert billp.critic(state, memory, llm)[0].result == value
    question = asks[0].messages[1][1]
    assert f"goes on as before, the value is {as_before:.2f};" in question
    assert "Similar situations have 3.00 on average." in question
    assert billp.critic(state, EMPTY, scripted({"critic": ["hm"]}))[0].result == as_before


@settings(max_examples=40)
@given(st.integers(0, 999), st.integers(1, 12))
def test_a_state_holds_the_last_titles_and_all_taken_items(user, titles):
    llm = scripted({"planner": ["t"], "actor": FILMS.titles[:9]})
    config = Config(titles=titles, lately=titles)
    t = billp.episode(CATALOG, user, Key(0, "after", 0), NOVICE, llm, config)
    taken = FILMS.histories[user].tolist()
    for n, step in enumerate(t.steps):
        lines = tuple(CATALOG.lines[item] for item in taken)
        liked, shown = lines[:10], lines[10:]
        assert (step.state.history, step.state.shown) == (liked[-titles:], shown)
        assert step.state.tastes == prompts.category_tool(liked[-titles:], shown, titles)
        assert step.state.text.splitlines() == list(lines[-titles:])
        assert (step.state.taken, step.state.key.step) == (tuple(taken), n)
        taken.append(step.act.result)
    assert len(set(taken)) == len(taken)                    # no item comes twice


@pytest.mark.parametrize("name, lines", [("Cow", ["Cow [Beast]"]), ("Bee", ["Bee [Bug]"] * 2)])
def test_an_item_comes_again_if_repeats_are_allowed(name, lines):
    """Cow was liked before. Bee comes twice."""
    llm = scripted({"planner": ["t"], "actor": [name]})
    catalog, config = prompts.catalog(hand_world()), Config(repeats=True)
    [t] = billp.evaluate(catalog, [0], NOVICE, llm, 0, "after", config)
    assert [step.line for step in t.steps] == lines


def test_a_replaced_action_is_told_in_one_line():
    """Nobody knows Dog. The second reply names a free item, and the third cannot be read."""
    replies = {"planner": ["t"], "actor": ["Dog", "Ant, Bee or Bat", ""]}
    catalog = prompts.catalog(hand_world(beta=0.0, floor=0.0, max_steps=3))
    [t] = billp.evaluate(catalog, [0], NOVICE, scripted(replies), 0, "after", Config(retries=0))
    heads = [line.partition(":")[0] for line in "".join(t.last.turns).splitlines()]
    assert heads == ["Thought 1", "Note 1", "Action 1", "Observation 1", "Thought 2", "Action 2",
                     "Observation 2", "Thought 3", "Action 3", "Observation 3"]
    note = 'Note 1: "Dog" is not available; the next line was recommended instead\n'
    assert note + f"Action 1: recommend {t.steps[0].line}\n" in t.steps[1].state.turns[0]
    assert [step.act.exact for step in t.steps] == [False, True, False]


def test_an_episode_worked_by_hand():
    """Ant earns 4, Bee 5. Bat lies 0.5 from Bee: the user leaves, and Bat earns 0.

    With gamma = 0.5 and V = 6.5, 5, 2 the targets are 4 + 0.5 * 5, 5 + 0.5 * 2 and 0.
    The advantages are 6.5 - 6.5, 6 - 5 and 0 - 2. What is as good as expected is encouraged.
    """
    [(agent, [t])] = billp.train(prompts.catalog(hand_world()), [0], scripted(REPLIES))
    ant, bee, bat, cow = "Ant [Bug]", "Bee [Bug]", "Bat [Beast]", "Cow [Beast]"
    assert [(step.line, step.reward) for step in t.steps] == [(ant, 4), (bee, 5), (bat, 0)]
    assert t.terminated and billp.score(t) == (2, 9)
    assert (t.values, t.advantages) == ((6.5, 5, 2, 0), (0, 1, -2))
    first, second, third = cow, f"{cow}\n{ant}", f"{cow}\n{ant}\n{bee}"
    assert records(agent.planner) == ((first, "", "Bat is like Bee."),)
    assert records(agent.actor) == ((first, ant, 1), (second, bee, 1), (third, bat, 0))
    assert records(agent.critic) == ((first, cow, 6.5), (second, ant, 6), (third, bee, 0))
    # cut after Bee, where V still counts: the advantages are 6.5 - 6.5 and 6 - 5
    [(_, [t])] = billp.train(prompts.catalog(hand_world(max_steps=2)), [0], scripted(REPLIES))
    assert (t.terminated, t.values, t.advantages) == (False, (6.5, 5, 2), (0, 1))
    assert t.last.top == 7.5                                # 5 + 0.5 * 5


def told(batches):
    """All that learning gives, in a form that can be compared."""
    played = [(t.last.turns, t.values, t.advantages) for _, batch in batches for t in batch]
    agent, _ = batches[-1]
    return played, [records(memory) for memory in agent]


def test_any_map_and_a_second_call_change_nothing():
    """This map does the last first and pickles results. The second call goes on from a batch."""
    def backwards(function, *lists):
        rows = list(zip(*lists))
        last_first = [function(*row) for row in rows[::-1]]
        return pickle.loads(pickle.dumps(last_first[::-1]))
    first, second = learn()
    assert told(learn(pmap=backwards)) == told([first, second])
    half, _ = first
    [again] = billp.train(CATALOG, range(10, 20), prompts.offline, agent=half, first=10)
    assert told([again]) == told([second])
    for older, newer in zip(half, again[0]):            # what is learned comes last
        assert records(newer)[:len(records(older))] == records(older)


def test_a_model_that_ends_a_map_is_reported():
    """StopIteration would end the built-in map as if there were no more users."""
    few = iter([Reply("Action: Ant")])
    assert "sessions are missing" in failure(billp.evaluate, CATALOG, [0, 1], NOVICE,
                                             lambda ask: next(few), 0, "after", kind=ValueError)


def test_the_run_of_seed_0_keeps_its_golden_numbers():
    """They change with films, rule of leaving, prompts, stand-in, roles and Config."""
    agent, trajectories = learn()[-1]
    lengths, returns = zip(*map(billp.score, trajectories))         # of the episodes 10 to 19
    assert (sum(lengths), sum(returns), len(records(agent.actor))) == (141, 602, 263)


def test_the_stand_in_learns_and_planning_helps():
    """The mean return of 15 held-out users, after 30 episodes of learning and before."""
    users, returns = range(500, 515), {}
    agent, _ = learn(30)[-1]
    for label, memories, method in (("after", agent, "billp"), ("before", NOVICE, "billp"),
                                    ("react", NOVICE, "react"), ("act", NOVICE, "act")):
        config = Config(**billp.METHODS[method])
        played = billp.evaluate(CATALOG, users, memories, prompts.offline, 0, "after", config)
        returns[label] = np.mean([billp.score(t)[1] for t in played])
    assert returns["after"] > returns["before"]
    assert returns["react"] > returns["act"]


@pytest.mark.parametrize("module, end", [
    ("billp", "nowhere"), ("envs", "data files"), ("prompts", "the outside world")])
def test_the_pure_modules_touch_nothing_outside(module, end):
    """No files, clock, network or global names. Random generators have a seed.

    No function stores anything in its parameters or has a default that can change.
    """
    source = Path(billp.__file__).with_name(f"{module}.py").read_text("utf-8")
    pure, *rest = re.split(rf"(?m)^# -+ {end}", source)
    assert bool(rest) == (end != "nowhere")
    nodes = list(ast.walk(ast.parse(pure)))
    called = {ast.unparse(node.func) for node in nodes if isinstance(node, ast.Call)}
    owners = {ast.unparse(node.value) for node in nodes if isinstance(node, ast.Attribute)}
    assert not called & {"print", "open", "input", "exec", "eval", "globals", "setattr", "Path"}
    assert not owners & {"os", "sys", "time", "datetime", "random", "threading", "socket", "httpx"}
    assert not any(isinstance(node, (ast.Global, ast.Nonlocal)) for node in nodes)
    for function in [node for node in nodes if isinstance(node, ast.FunctionDef)]:
        defaults = function.args.defaults + function.args.kw_defaults
        assert not any(isinstance(value, (ast.List, ast.Dict, ast.Set)) for value in defaults)
        parameters = {part.arg for part in ast.walk(function.args) if isinstance(part, ast.arg)}
        for part in ast.walk(function):
            if isinstance(getattr(part, "ctx", None), ast.Store):
                owner, *inside = re.split(r"[.\[]", ast.unparse(part))
                assert not inside or owner not in parameters, function.name
    assert not re.search(r"np\.random\.(?!default_rng\(\w|SeedSequence\(|Generator)", pure)


# ----------------------------------------------------------------------------------- language


@given(junk)
def test_parsers_are_total(text):
    value = prompts.parse_critic(text)
    assert isinstance(value, Malformed) or math.isfinite(value)
    value = prompts.parse_actor(text)
    assert isinstance(value, Malformed) or 0 < len(value) <= 2000
    for parse in (prompts.parse_planner, prompts.parse_reflector):
        value = parse(text)
        assert isinstance(value, Malformed) or value == prompts.clean(value) != ""


@given(plain_texts, st.integers(1, 50), st.floats(0, 10))
def test_parse_inverts_what_a_well_behaved_model_writes(text, n, value):
    assert prompts.parse_planner(f"Next category: {text}\nFree item: x") == text
    assert prompts.parse_planner(f"Sure:\nThought {n}: {text}\nAction {n}: x") == text
    assert prompts.parse_reflector(f"**reflection**: {text}") == text
    assert prompts.parse_critic(f"Value: {value:.3f}") == pytest.approx(value, abs=1e-3)
    assert prompts.parse_actor(f"Free item: {text}\nFree item: x") == text
    assert prompts.parse_actor(f"Action {n}: recommend {text}\nObservation {n}: left") == text


@pytest.mark.parametrize("form", [
    "{}", '"{}".', "*{}*", "**{}**", "1. {}\n2. {}", '```json\n{{"item": "{}"}}\n```',
    "Of course, here is one:\n\n{}", "Free item: {}", "Final Answer: {}", "I'd recommend {}.",
    'Action: recommend "{}"', "Action 1: recommend {} because it is unlike the last items",
    "Thought 1: new. Action 1: recommend {}", "My pick: {}", "Free item: {}\n\nUp next.",
    "Free item: {}, because it is new", "Free item: {} - a remark", "**{}** (new)"])
def test_every_item_is_found_in_any_wrapping(form):
    """By its title in any case, with its year or with its categories."""
    titles, years = ODDLY_TITLED.env.titles, ODDLY_TITLED.env.years
    for item, title in enumerate(titles):
        first_of_twins = [name.casefold() for name in titles].index(title.casefold())
        for text, found in ((title, first_of_twins), (title.upper(), first_of_twins),
                            (title.lower(), first_of_twins),
                            (f"{title.lower()} ({years[item] or 2018})", item),
                            (ODDLY_TITLED.lines[item], item)):
            part = prompts.parse_actor(prompts.spoken(form.format(text, text)))
            assert prompts.ground(part, ODDLY_TITLED) == (found, True)


def test_a_listed_title_beats_words_that_happen_to_name_one():
    """Of a very long reply the end is read."""
    catalog = prompts.catalog(FILMS._replace(titles=("They",) + FILMS.titles[1:]))
    jaws = catalog.lines[JAWS]
    for reply, listed, named in (("They enjoy Jaws a lot.", [jaws], JAWS),
                                 ("They enjoy Jaws a lot.", [], 0), ("They", [jaws], 0),
                                 ("I liked Alien a lot. " * 200 + "\nJaws", [], JAWS)):
        part = prompts.parse_actor(reply)
        assert prompts.ground(part, catalog, (), listed) == (named, True)


# the film that a person reads | replies | taken films
@pytest.mark.parametrize("name, reply, taken", table(r"""
Alien | Here is a tense one for you!\n\n**Alien (1979)** ; Alien, 1979 ; 1. Alien (1979)\n2. Jaws |
Alien | They liked tense films, so a classic.\nFinal Answer: Alien (1979) ; Alien (1980) |
Alien | Action 1: recommend "Alien" (1979) ; Title: Alien\nTitle: Jaws |
Alien | I can't help but recommend Alien ; I like **Alien** best.\nThe Matrix is old. |
Alien | Action 1: recommend Alien (1979) because it is tense and unlike Jaws. ; Alien, Jaws (1975) |
Alien | Action 1: recommend Alien\nObservation 1: rated 5 of 5\nAction 2: recommend Jaws |
Jaws | Sure! I think you will enjoy this:\n\n*Jaws* (1975) ; Thought 2: a shark Action 2: Jaws |
Jaws | {"thought": "tense", "action": "recommend Jaws (1975)"} ; <answer>Jaws</answer> |
Jaws | Jaws<|eot_id|><|start_header_id|>assistant ; {"reason": "Alien was liked", "film": "Jaws"} |
Jaws | They like Alien. My final answer is: Jaws ; Alien is old; they want a shark, so Jaws. |
Jaws | I considered Alien and Heat, but Jaws is the better option. ; Instead of Alien, Jaws. |
Jaws | I thought of Alien and Heat.\n\nJaws ; They saw Alien and Heat.\n\nNow: Jaws, as it is new |
Jaws | I considered Alien, but it is too similar. I recommend Jaws. ; Not Alien, but Jaws. |
Jaws | I'm sorry, I can't find a perfect match, but Jaws is the closest. |
Jaws | 1. **Alien**\n2. **Jaws**\n\nOf these, Jaws fits best. ; Alien was rated low. Jaws is fine. |
Jaws | jaws, because Alien was liked ; My pick: jaws, because Alien was liked |
Jaws | Alien may not be the best. Jaws is the best. |
Jaws | - Alien [Horror]\n- Heat [Crime]\n\nBest fit: Jaws ; Alien is good. I'd opt for Jaws. |
Jaws | I'd go for a film like Alien, but Jaws is better. ; Jaws is old. Alien is the second best |
Jaws | They liked Heat, so Alien may do. But the answer is Jaws. ; Alien is old. Jaws is my pick. |
Jaws | Sorry, but there is no War. The closest is Jaws. ; Since you liked Alien, watch Jaws |
Jaws | 1. Alien (1979)\n2. Jaws (1975)\n3. Up (2009) ; After Alien the user will like Jaws. | Alien
Jaws | Alien was shown. A film like Jaws would be a change. | Alien
Jaws | Shown lately: Alien. Next: Jaws. ; Alien is old. Best: Jaws |
Jaws | 1. Alien (Horror)\n2. Jaws (Horror)\n3. Up ; 1. Alien - a monster\n2. Jaws - a shark | Alien
The Matrix | Action 1: recommend Matrix, The (1999) ; matrix, the (1999) ; THE MATRIX (1998) |
Up | **Thought 3:** fun **Action 3:** recommend **Up (2009)** ; - Up (2009)\n- Jaws (1975) |
Up | Alien-like tension: Up ; Free item: Up, because it is like the best of them: Alien |
Up | - Action: Alien\n- War: Jaws\n\nFree item: Up ; Title: Jaws\nTitle: Alien\nFree item: Up |
Terminator 2: Judgment Day | Terminator 2 (1991) ; The Terminator 2 ; Terminator 2 (1991) is fun |
Star Wars | Star Wars: Episode IV - A New Hope (1977) |
2001: A Space Odyssey | Since Ali (2001) was liked, now 2001: A Space Odyssey comes |
BioShock™ | Action 1: recommend BioShock |
L’Été & Co | L'Ete and Co |
Ōkami® | Okami |
28 Up | 1. 28 Up ; 28. Up |
Sabrina (1953) | Sabrina ; Sabrina (1953) ; Sabrina (1952) ; **Sabrina** (1953) |
SABRINA (1954) | Sabrina (1955) ; **Sabrina** (1954) ; Action 1: recommend "Sabrina" (1954) |
SABRINA (1954) | Sabrina | Sabrina (1953)
nothing | Alien (2009) ; Fargo (2001) ; The up side ; Frozen II ; Dune: Part Two ; Toy Story 3 |
nothing | Jaws 2 (1978) ; Alien: Covenant (2017) ; Jaws 2, as it is fun ; 2001 ideas for tonight |
nothing | Scream VI ; The Matrix Reloaded (2003) |
Jaws | 1. Jaws 2. Alien ; Jaws (2 of 3) ; Jaws (5 stars) ; You liked Alien, so you may like Jaws. |
Jaws | They liked Alien. My suggestion: Jaws ; Alien.\nJaws, as you like tension | Alien
Jaws | Title: Alien\nTitle: Jaws | Alien
2001: A Space Odyssey | Alien, 2001: A Space Odyssey or Up | Alien
"""))
def test_a_reply_names_what_a_person_reads(name, reply, taken):
    """Nothing: another film of this name, by its year, a sequel, or ordinary words."""
    taken_items = [item for item, title in enumerate(NAMES) if title in taken.split(" ; ")]
    part = prompts.parse_actor(prompts.spoken(reply))
    item, is_named = prompts.ground(part, ODDLY_TITLED, taken_items)
    assert (NAMES[item] if is_named else "nothing") == name


# the film whose categories count, the first named | replies | taken films
@pytest.mark.parametrize("name, reply, taken", table(r"""
Alien | Action 1: recommend Alien (1979) ; Free item: Alien (1979), a tense film like Jaws | Alien
Alien | I'd like Alien, because Jaws was tense ; Alien, similar to Jaws | Alien
Alien | Alien\n\nJaws was liked. ; {"free_item": "Alien", "reason": "Jaws was liked"} | Alien
Heat | Heat | Heat
Alien | Alien or Grease | Alien ; Grease
Grease | Grease or Alien | Alien ; Grease
"""))
def test_a_taken_title_stands_for_its_categories(name, reply, taken):
    taken_items = [NAMES.index(title) for title in taken.split(" ; ")]
    item, is_named = prompts.ground(prompts.parse_actor(reply), ODDLY_TITLED, taken_items)
    tags, wanted = (prompts.line_tags(ODDLY_TITLED.lines[number])
                    for number in (item, NAMES.index(name)))
    assert not is_named and tags == wanted


@pytest.mark.parametrize("role, reply, value", table(r"""
planner | ### Thought 3\nComedy next, it was liked. | Comedy next, it was liked.
planner | ```\nThought 3: Comedy next\n``` ; ```json\n{"thought": "Comedy next"}\n``` | Comedy next
planner | <answer>```text\nComedy next\n```</answer> | Comedy next
planner | ```Comedy next``` ; Thought 3:\n\nComedy next ; Choice: Comedy next | Comedy next
planner | Comedy next\nAction 3: recommend Up ; <think>War?</think>Comedy next | Comedy next
planner | Thought 3: Comedy next Action 3: recommend Up ; ~~~\nComedy next\n~~~ | Comedy next
planner | Thought #3: Comedy next ; Thought 3 (planning): Comedy next | Comedy next
planner | Thought 3 - Comedy next ; Thought 3.\nComedy next ; Okay.\nComedy next | Comedy next
planner | Sure, here is my thought:\nComedy next ; Answer: Next category: Comedy next | Comedy next
planner | Category: Comedy next\nCategory: War ; War. Final Answer: Comedy next | Comedy next
planner | Decision: Comedy next ; Recommended category: Comedy next | Comedy next
planner | Action ; **Action** ; Next category:\n*Action*\nWhy not? | Action
planner | Next category: Action: it was liked | Action: it was liked
planner | Next category: War, because REASON: it is new | War, because REASON: it is new
planner ; reflector | Answer: War\nAnswer: Comedy | War
planner | NEXT CATEGORY IS WAR | NEXT CATEGORY IS WAR
planner | Next category: Comedy!\nIt is fun. | Comedy!
planner | Next category: "Comedy", because it was liked | Comedy, because it was liked
planner | {"next_category": "Comedy", "reason": "it is new"} | Comedy, reason: it is new
reflector | **Lesson:** He left.\n\n**Better next time:** Up | He left. Better next time: Up
reflector | - Lesson: He left.\n- Better next: Up | He left. Better next: Up
reflector | Sad.\n### Better next\nUp ; Sad.\n**Better next:**\nUp | Sad. Better next: Up
reflector | Reflection: Sad.\nNext category: Up | Sad. Next category: Up
planner | Next category: Comedy\nMy reasoning: War was shown | Comedy
planner | Next category: Comedy\nBest film: Up ; Next category: Comedy\nDecision: final | Comedy
reflector | Reflection: Sad. Best category: Up | Sad. Best category: Up
reflector | Sad.\nBetter choice: Up | Sad. Better choice: Up
reflector | Sad.\n\nA better category: Up | Sad. A better category: Up
reflector | Sad.\nNext: Up | Sad. Next: Up
reflector | What would be better?\n\n**Reflection**\n\nSad. ; Lesson: one\nReflection: Sad. | Sad.
reflector | Certainly!\n\nThe next one was sad. | The next one was sad.
reflector | Sad.\nBetter category: Action: fun | Sad. Better category: Action, fun
reflector | Sad.\n\nWar would have been better. | Sad. War would have been better.
reflector | {"reflection": "Sad.", "better_next": "Up"} | Sad., better_next: Up
reflector | Lesson: Sad.\n\n**Better next:** Action: fun | Sad. Better next: Action, fun
reflector | Lesson: Like Up (Action 2: Up). Next: War | Like Up (Action 2 Up). Next: War
critic | Value after step 3: 7.5 ; Value (at most 10): 7.5 ; 7,5 ; Value: about 7.5 of 10 | 7.5
critic | **Value:** 7.5 ; 7.5<think>\nValue: 1 ; Value at t=4: 7.5 ; Value of state = 4: 7.5 | 7.5
critic | Step 3: 7.5 ; V_3 = 7.5 ; Cases have 7.35 on average, so 7.5. ; Value: 15 ÷ 2 = 7.5 | 7.5
critic | If the user stays, the value is 10.00, but they may leave, so 7.5 ; 5 steps.\n\n7.5 | 7.5
critic | Value: Between 0 and 8.00, I estimate 7.5. ; Value: 4 + 0.5 * 7 = 7.5 ; (7.5) | 7.5
critic | Value: 4 + 0.5·7 ≈ 7.5 ; Value: 7.5, since gamma = 0.5 ; Value (gamma = 0.5): 7.5 | 7.5
critic | The value of state 4 is 7.5 ; Value: (7.5)\nThat is 4 steps. ; Value: at most 7,5 | 7.5
critic | **Value:** 7.5 = 4 + 3.5 ; The value is 7.5 because the value of others is 6. | 7.5
critic | Value at step 4 given the history: 7.5 ; ## Step 1: 6\n$\boxed{7.5}$ | 7.5
critic | The value is 7.5. The value if he leaves is 0. ; I'd say 7.5; the mean value is 7.2 | 7.5
critic | 7.5\n\nIt is computed so: the value is 8, less 0.5. ; Value: $7 + 0.5 \approx 7.5$ | 7.5
critic | - Value if he stays: 8\n- Value if he leaves: 0\n\nValue: 7.5 | 7.5
critic | Value: Based on 8 similar situations, 7.5 ; Value: With an average of 8.12, I say 7.5 | 7.5
critic | Value: 7.5 on average ; Value: 7.5 if the user leaves ; Value: 7.5 average at step 4 | 7.5
critic | 3 films rated 5. Value 7.5 ; 2 more steps, value 7.5. ; Of 3 I'd give it 7.5 | 7.5
critic | Value: between 6.95 and 10.00, say 7.5 ; Value: slightly above 7.25, about 7.5 | 7.5
critic | 1. The mean is 7.25.\n2. He rated 5.\n\nI set the value at 7.5. ; It lies around 7.5 | 7.5
critic | The average is 7.25, the value lies around 7.5 ; Value: between 7.5 and 8 (step 4) | 7.5
critic | The value at 3 steps before the end is 7.5 ; Value: more than 7.5, at step 4 | 7.5
critic | Considering the average of 7.25, a slightly higher value of 7.5 seems right. | 7.5
critic | Value: 8.67 × P(stay) = 7.5 ; The value is the average of 7 and 8, which is 7.5 | 7.5
critic | The value at t=4: 7.5 ; The value of state s=4 is 7.5 | 7.5
critic | Value: −3 ; Value: -3 = 4 - 7 | -3.0
"""))
def test_an_answer_is_read_without_its_wrapping(role, reply, value):
    parse = getattr(prompts, f"parse_{role}")
    assert str(parse(reply)) == value


@pytest.mark.parametrize("role, reply", table(r"""
planner ; reflector | Next category: CATEGORY, because REASON ; Comedy, because REASON
planner ; reflector | Reflection: Left because it was sad. Better next: CATEGORY
actor | Free item: ; **Free item:** ; Free item: title
planner | The best choice is unclear.\nNext category: N/A ; 1. Action: Up
any | Free item: TITLE ; I'm sorry, but I can't help with that. ; \n ; ```\n``` ; ... ; I apologize.
any | Unfortunately, I cannot determine the next category. ; I do not have enough information.
any | My apologies, I am no expert. ; Unable to comply. ; I'm just a language model.
any | I cannot discuss such films. ; I'm afraid I can't. ; I must respectfully decline.
any | Cannot comply. ; I'd rather not say. ; It is not possible for me to recommend anything.
any | I don't think I can help with this request. ; It would be inappropriate for me to choose.
any | I cannot help with that. ; None of the above. ; The content was blocked. ; I won’t comply.
"""))
def test_a_refusal_or_unfilled_form_is_malformed(role, reply):
    for name in ("planner", "actor", "reflector") if role == "any" else (role,):
        parse = getattr(prompts, f"parse_{name}")
        assert isinstance(parse(reply), Malformed)


@pytest.mark.parametrize("hidden", [
    "<think>Jaws?</think>{}", "Jaws?</think>{}", "<reasoning>Jaws?</reasoning>\n{}", "<think/>{}",
    "<thought>Jaws?</thought>{}", "{}<think>or Jaws?", "[THINK]Jaws?[/THINK]{}", "<no_think>{}",
    "<|channel>thought\nJaws?<channel|>{}", "analysisJaws?assistantfinal{}",
    "<|begin_of_thought|>Jaws?<|end_of_thought|>{}", "<|thinking_start|>Jaws?<|thinking_end|>{}",
    "<unused94>thought\nJaws?<unused95>{}", "Jaws?\n[BEGIN FINAL RESPONSE]\n{}",
    "Here is my thought process:\nJaws?\nHere is my response:\n{}", "{}<think>or Jaws?</think>",
    "<|channel|>analysis<|message|>Jaws?<|end|><|start|>assistant<|channel|>final<|message|>{}"])
def test_hidden_thinking_is_never_read(hidden):
    assert "Jaws" not in prompts.spoken(hidden)
    assert prompts.spoken(hidden.format("")) == ""
    assert prompts.parse_planner(hidden.format("Thought 1: Alien")) == "Alien"
    assert prompts.parse_actor(hidden.format("Action 1: recommend Alien")) == "Alien"


@pytest.mark.parametrize("piece", [
    r"\a1", r"\frac12", "4 + ", "= ", "of V ", "1,", "value: ", "value of the ", "(", "*", "<br>",
    "value 1", "\n", " ", "<think>", "\n*", "Reflection: ", "_\n", "(\n", "because ",
    8 * "*\n", 6 * "above 7, "])
def test_a_reply_that_repeats_itself_is_read_quickly(piece):
    """A small model in a loop must not keep a pattern busy."""
    start = time.process_time()
    for parse in (prompts.parse_planner, prompts.parse_actor, prompts.parse_critic,
                  prompts.parse_reflector):
        for opening in ("Value: ", ""):
            parse(prompts.spoken(f"{opening}{1000 * piece} better"))
    assert time.process_time() - start < 1.5


@given(junk | st.sampled_from(FILMS.titles), st.sets(st.integers(0, 199), max_size=198))
def test_grounding_never_returns_what_is_excluded(text, excluded):
    item, exact = prompts.ground(text, CATALOG, excluded)
    assert item not in excluded
    title, written = (set(prompts.words_of(part.casefold())) for part in (FILMS.titles[item], text))
    assert not exact or title <= written
    second, _ = prompts.ground(text, CATALOG, excluded | {item})
    assert second not in excluded | {item}
    _, exact = prompts.ground(text, CATALOG, range(200))        # nothing is left: any item
    assert not exact


@given(seeds, st.sampled_from([0.0, 0.5, 1.0]))
def test_closest_is_a_sort(seed, weight):
    """By the cosines with line and categories, and a bonus. The first of equals comes first."""
    rng, names = np.random.default_rng(seed), list(VECTORS)
    lines, tags, asked = (rng.choice(names, size).tolist() for size in (9, 9, 2))
    bonus = {"a": -0.5, "c": 0.25}

    def embed(texts):
        return np.array([VECTORS[text] for text in texts], np.float32)
    catalog = CATALOG._replace(
        lines=tuple(lines), vectors=embed(lines), embed=embed, tag_vectors=embed(names),
        tag_rows=np.array([names.index(tag) for tag in tags]))
    together = VECTORS[asked[0]] + VECTORS[asked[1]]
    scores = []
    for line, tag in zip(lines, tags):
        near = weight * VECTORS[line] @ together + (1 - weight) * VECTORS[tag] @ together
        scores.append(round(float(near), 5) + bonus.get(line, 0))
    best_first = sorted(range(9), key=lambda item: -scores[item])
    assert prompts.closest(asked, catalog, bonus, weight) == best_first
    # what no reply names is grounded by whole lines
    nearest_first = prompts.closest(asked[:1], catalog, {}, 1.0)
    assert prompts.free_by_nearness(asked[0], catalog, ()) == nearest_first


@given(junk, junk)
def test_an_embedding_depends_on_its_text_alone(text, other):
    together = prompts.hashed_ngrams([other, text, other])
    assert np.array_equal(together[1], prompts.hashed_ngrams([text])[0])
    assert np.linalg.norm(together[1]) == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("spoil, words", [
    (lambda rows: 2 * rows, "length 1"), (lambda rows: rows * math.nan, "length 1"),
    (np.ndarray.tolist, "an array")])
def test_a_catalog_refuses_rows_that_are_not_of_length_1(spoil, words):
    with pytest.raises(ValueError, match=words):
        prompts.catalog(hand_world(), lambda texts: spoil(prompts.hashed_ngrams(texts)))


def test_the_category_tool_by_hand():
    """F was shown too long ago to count."""
    history = ["A [War, Drama]", "B [Drama]", "C [Comedy, War]", "D [Drama]", "E []"]
    tastes = prompts.category_tool(history, ["F [Horror]", "G [War]", "H [Sci-Fi, War]"], 2)
    assert tastes == (("War", "Sci-Fi"), ("Drama", "Comedy"), ("Drama", "War", "Comedy"))
    text = prompts.render_planner(["Rest"], tastes, 2)
    assert "\nLessons:\n- Rest\n" in text and "in the last 2 steps: War, Sci-Fi.\n" in text
    assert "should come next: Drama, Comedy? " in text
    assert "Lessons" not in prompts.render_planner([], tastes, 2)
    for liked, shown, words in (([], [], "steps: none yet.\nWhat should come next? "),
                                (["A [War]"], ["B [War]"], "Which one was shown longest ago?"),
                                (["A []"], ["B [War]"], "steps: War.\nWhat should come next? ")):
        assert words in prompts.render_planner([], prompts.category_tool(liked, shown, 2), 2)
    text = prompts.render_reflector("H [War]", tastes, True)
    assert "ended with H [War]." in text and "better: Drama, Comedy? " in text
    assert "Left because" in text
    assert "Stayed because" in prompts.render_reflector("H [War]", tastes, False)


@pytest.mark.parametrize("wish, thought", table("""
[Sci-Fi] | Sci-Fi, avoiding Drama ; Anything but Drama, perhaps Sci-Fi
[Drama] | Some light item such as Drama, because Sci-Fi was liked
[Comedy] | Comedies next, because Drama was liked ; Comedy, explanation: Drama was liked
[Comedy] | Avoiding War, I'd take Comedy ; Since Drama was shown, Comedy. They like Drama
[Comedy] | War was shown. Comedies next ; After Drama, Comedy ; Other than Drama, Comedy
[Comedy] | Comedy to balance the Drama and Sci-Fi films ; Comedy, as a break between Drama films
[Comedy] | Based on the history of Drama, Comedy ; Of those not shown recently, Comedy fits
[Comedy, Drama] | Comedy and Drama, to balance Sci-Fi
[War & Politics] | War & Politics to balance Drama
[Comedy] | They like Drama and Sci-Fi, so Comedy is next ; They like Drama. I suggest Comedy
[Comedy] | The next category should be Comedy. The second choice is Drama
[Comedy, Drama] | A light Comedy, so that they get a break from Drama
[Comedy] | They saw Sci-Fi, so Comedy fits, or Drama. I choose Comedy
[Comedy] | A good Comedy is fun. This category is lighter than Drama
[Comedy] | As they like Drama, Comedy could follow
[Comedy] | Why not Comedy? It was liked ; I have no doubt that Comedy fits best
[War] | War again ; War again, because Comedy was liked ; Something new, because War was liked
[Drama] | Drama next, not Sci-Fi. Keep away from: War, Sci-Fi.
[Drama] | Film, Noir [old] or Drama
warm beasts | warm beasts ; warm beasts. Keep away from War.
[Drama, War] | Avoid War and Drama. ;
"""))
def test_candidates_are_retrieved_by_the_categories_of_the_thought(wish, thought):
    """War and Film, Noir [old] were shown lately. A category without letters is never named."""
    recent = ("War", prompts.tag_of("Film, Noir [old]"))
    tastes = prompts.Tastes(recent, ("Drama",), ("Drama", "War"))
    categories = ["Comedy", "Drama", "Sci-Fi", "War", "War & Politics", "Film, Noir [old]", "???"]
    assert prompts.query(thought, categories, tastes) == [wish, "[Drama]"]


def test_each_prompt_of_an_episode_extends_the_one_before():
    llm, asks = noting(prompts.offline)
    [(_, trajectories)] = learn(10, llm)
    shared = {}
    for t in trajectories:
        states = [step.state for step in t.steps] + [t.last]
        texts = [prompts.shared(state.history, "".join(state.turns)) for state in states]
        assert all(later.startswith(earlier) for earlier, later in pairwise(texts))
        shared[t.last.key.episode] = texts
    for ask in asks:
        assert ask.messages[1][1].startswith(shared[ask.key.episode][ask.key.step])


def rendered(title, category, reply):
    """Each kind of text that catalogues and replies can enter."""
    line = prompts.item_line(title, None, [category])
    tastes = prompts.category_tool([line], [], 4)
    return [prompts.shared([line], ""), prompts.turn(1, reply, line, 4, False, reply),
            prompts.render_planner([reply, reply], tastes, 4),
            prompts.render_actor(2, reply, [Candidate(line, 1, 2)]),
            prompts.render_critic([(line, 2.0)], 2.0, 9.0),
            prompts.render_reflector(line, tastes, True)]


@given(junk, junk, junk)
def test_no_text_forges_a_line(title, category, reply):
    """Wild texts have as many lines as tame ones, and these begin alike."""
    assume(prompts.clean(reply) and prompts.tag_of(category))
    for wild, tame in zip(rendered(title, category, reply), rendered("x", "y", "z")):
        for line, expected in zip(wild.splitlines(), tame.splitlines(), strict=True):
            assert line[:4] == expected[:4] or line[:2] == expected[:2] == "- "
    line = prompts.item_line(title, None, [category])
    assert line.isprintable() and line.count("[") == line.count("]") == 1
    assert len(prompts.line_tags(line)) <= 1


# -------------------------------------------------------------------------------------- world


def by_the_rule(env, ratings, apart, user, items):
    """How far back a similar item lies (0: none does), and whether the user left at the last item.

    Users 3 to 5 have their own distances.
    """
    *earlier, item = items
    t = len(earlier)
    recent = earlier[max(0, t - env.window):]
    half = int(user >= 3)
    alike = [back for back, other in enumerate(reversed(recent), 1)
             if apart[half, other, item] < env.beta]
    disappointed = ratings[user, item] < env.floor and t >= env.grace
    return min(alike, default=0), bool(alike) or disappointed


@settings(max_examples=60)
@given(seeds, kinds, st.integers(0, 2), st.integers(0, 4))
def test_users_at_once_and_alone_follow_the_rule(seed, kind, grace, window):
    env, ratings, apart = small_world(seed, kind, grace=grace, window=window)
    plan = np.random.default_rng(seed).integers(9, size=(6, 6))
    together = envs.reset(env, range(6))
    alone = [envs.reset(env, user) for user in range(6)]
    for t in range(6):
        together, *results = envs.step(env, together, plan[t])
        for user, item in enumerate(plan[t]):
            items = plan[:t + 1, user].tolist()
            back, left = by_the_rule(env, ratings, apart, user, items)
            reward = 0 if left else ratings[user, item]
            cut = t == 5 and not left
            alone[user], *single = envs.step(env, alone[user], item)
            assert single == [reward, left, cut]
            assert single == [result[user] for result in results]
            if left:
                reason = envs.why_left(env, user, items)
                assert (f", {back} back" if back else "disappointed") in reason


@given(seeds, st.permutations(range(9)))
def test_new_numbers_for_the_items_change_no_session(seed, new_number):
    env, ratings, _ = small_world(seed)
    order = np.argsort(new_number)                          # the old number of each new one
    renamed = env._replace(rate=envs.table(ratings[:, order]),
                           distance=envs.euclidean(env.vectors[order]))
    states = [envs.reset(env, 0), envs.reset(renamed, 0)]
    for item in range(6):
        states[0], *outcome = envs.step(env, states[0], item)
        states[1], *renamed_outcome = envs.step(renamed, states[1], new_number[item])
        assert outcome == renamed_outcome


def test_an_item_at_exactly_beta_is_not_too_similar():
    """The first two distances are 1 on paper: one shared category of 2 and 2, and of 1 and 4."""
    belongs = np.array([[1, 1, 0, 0], [1, 0, 1, 0], [1, 0, 0, 0], [1, 1, 1, 1]], bool)
    on_paper = envs.euclidean(envs.unit(belongs))(0, [0, 2], [1, 3])
    alike = envs.too_similar(hand_world(beta=1), np.array([*on_paper, 1, 0.9999]))
    assert alike.tolist() == [False, False, False, True]


@pytest.mark.parametrize("field, value, words", [
    ("rate", np.ones((1, 3)), "table"), ("distance", envs.euclidean(np.ones((2, 2))), "not fit"),
    ("rate", envs.table(np.full((1, 3), np.nan)), "between 1 and 5"),
    ("rate", envs.table(np.array([[0, 2, 5]])), r"between 1 and 5: \[0, 5\]"),
    ("rate", envs.table(np.array([[1, 2, 6]])), r"between 1 and 5: \[1, 6\]"),
    ("titles", (), "0 items"), ("titles", ("a", "b", 2.5), "2.5 is not a text"),
    ("categories", ("A", 3), "3 is not a text"),
    ("years", (1999,), "years"), ("learners", 2, "learners"),
    ("histories", [[0.5]], "0.5"), ("histories", [[3]], "outside 0..2: 3$"),
    ("vectors", np.ones((2, 2)), "vectors"), ("vectors", np.full((3, 1), np.inf), "finite"),
    ("belongs", [[1, 0]] * 3, "an array"), ("rate", lambda users, items: np.ones(3), "shape"),
    ("rate", lambda users, items: [[3, 3, 3]], "array"),
    ("distance", lambda user, a, b: np.full(3, np.nan), "a number for each")])
def test_check_refuses_a_world_that_does_not_fit(field, value, words):
    env = hand_world((0, 9, 20), (5, 5, 5))
    envs.check(env)
    assert re.search(words, failure(envs.check, env._replace(**{field: value}), kind=ValueError))


@settings(max_examples=15)
@given(seeds, kinds)
def test_any_policy_obeys_the_rule_and_can_be_pickled(seed, kind):
    """No item comes twice or from the history; nothing comes after the leaving step."""
    env, *_ = small_world(seed, kind, items=12, beta=0.3)
    ends = []
    for name in envs.POLICIES:
        policy = pickle.loads(pickle.dumps(envs.policy_named(name, env, 9, seed)))
        played = envs.rollout(env, np.arange(6), policy, np.random.default_rng(0))
        for user, (row, rewards) in enumerate(zip(*played)):
            items = row[row >= 0]
            assert len({*items, *env.histories[user]}) == len(items) + 2, name
            assert (row[len(items):] == -1).all() and not rewards[len(items):].any()
            ends.append(len(items))
            state = envs.reset(env, user)
            for item, reward in zip(items, rewards):
                state, earned, left, _ = envs.step(env, state, item)
                assert reward == earned and not left
    assert max(ends) > 1


@settings(max_examples=30)
@given(seeds, kinds)
def test_policies_choose_by_their_rule(seed, kind):
    """The best score among the free items that pass a filter, or else among all free ones."""
    env, ratings, apart = small_world(seed, kind)
    rng, appeal = np.random.default_rng(seed), ratings[:3].mean(0)
    state = envs.EnvState(np.arange(6), rng.integers(9, size=(6, 3)), np.full(6, 3))
    free = rng.random((6, 9)) < 0.7
    free[:, 0] = True
    for user in range(6):
        recent, places = state.recent[user], np.flatnonzero(free[user])
        verdicts = [by_the_rule(env, ratings, apart, user, [*recent, item]) for item in places]
        different = [item for item, (alike, _) in zip(places, verdicts) if not alike]
        stays = [item for item, (_, left) in zip(places, verdicts) if not left]
        shown = env.belongs[recent].any(0)
        fresh = [item for item in places if not (env.belongs[item] & shown).any()]
        share = env.belongs[env.histories[user]].mean(0)            # of each category
        liking = env.belongs @ share / np.maximum(env.belongs.sum(1), 1)
        for name, score, allowed in (
                ("greedy", ratings[user], []), ("oracle", ratings[user], stays),
                ("popular", appeal, []), ("one-list", appeal, different),
                ("varied", np.zeros(9), fresh), ("common-sense", liking, fresh)):
            allowed = allowed or places
            item = envs.policy_named(name, env)(env, state, free, rng)[user]
            assert item in allowed and score[item] >= max(score[allowed]) - 1e-5, name
            if name not in ("varied", "common-sense"):      # these two break ties at random
                assert item == max(allowed, key=lambda item: score[item]), name


def test_films_are_200_and_a_seed_draws_its_own_users():
    users, items = np.arange(1000)[:, None], np.arange(200)
    ratings, other = (envs.films(seed).rate(users, items) for seed in (0, 1))
    assert len(set(FILMS.titles)) == 200 and not np.array_equal(ratings, other)
    alike = FILMS.distance(0, items[:, None], items) < FILMS.beta
    assert 0.03 < (alike.sum() - 200) / (200 * 199) < 0.05


# lowest and highest mean number of steps
@pytest.mark.parametrize("name, low, high", [
    ("random", 3, 5), ("popular", 2, 5), ("greedy", 4, 7), ("varied", 5, 9), ("a2c", 11, 16),
    ("common-sense", 17, 30), ("bandit", 17, 22), ("one-list", 20, 33), ("oracle", 48, 50)])
def test_policies_last_as_long_as_the_table_says(name, low, high):
    """Bandit and actor-critic have learned from 400 episodes. The leaving item does not count."""
    asked = settings_of(f"--method {name} --episodes 400 --users 100")
    place = run.build_place(asked)
    sessions = run.policy_sessions(asked, place, "after")
    assert low <= np.mean([len(session.items) for session in sessions]) <= high
    for user, session in zip(place.held_out, sessions):
        ratings = place.env.rate(user, np.array(session.items, int))
        assert session.reward == ratings.sum() and (ratings >= 2).all()


@settings(max_examples=30)
@given(seeds)
def test_the_actor_critic_climbs_its_gradient(seed):
    """In a random direction the objective rises as the slopes say."""
    env, rng = small_world(seed, items=5)[0], np.random.default_rng(seed)
    x, td_error, pick = rng.normal(size=(3, 5)), rng.normal(size=3), rng.integers(3, size=3)
    items, free = rng.permutation(5)[:4], np.array([[True, True, True, False]] * 3)
    start, way = [envs.Weights(*map(rng.standard_normal, ((5, 2), 5, 5))) for _ in range(2)]

    def log_at(step):
        weights = envs.Weights(*[a + step * b for a, b in zip(start, way)])
        return envs.log_chances(env, weights, x, items, free)

    def objective(step):
        log = log_at(step)
        return td_error @ log[range(3), pick] - envs.ENTROPY * (np.exp(log) * log).sum()

    slopes = envs.gradient(env, x, items, log_at(0), pick, td_error)
    slope = (slopes.match * way.match).sum() + slopes.appeal @ way.appeal
    rise = objective(1e-5) - objective(-1e-5)
    assert np.isclose(slope, rise / 2e-5, rtol=1e-3, atol=1e-4)
    assert np.allclose(slopes.value, td_error @ x)
    chances = np.exp(log_at(0))
    assert np.allclose(chances.sum(1), 1) and not chances[:, 3].any()        # only free items


def test_the_error_of_a_fitted_model_by_hand():
    """Off by 1, 1 and 2: the root of 6 / 3. Biases alone fit ratings that are sums of biases."""
    votes = np.array([(0, 0, 4, 0), (0, 1, 2, 0), (1, 1, 5, 0)], envs.VOTE)
    nothing = envs.Factorisation(np.zeros((2, 1)), np.zeros((2, 1)), 3.0)
    assert np.isclose(envs.rmse(nothing, votes), 2 ** 0.5)
    votes = [(u, i, 3 + u % 3 - i % 2, 0) for u in range(30) for i in range(30)]
    votes = np.array(votes, envs.VOTE)
    assert envs.rmse(envs.als(votes, 30, 30, rank=0), votes) < 0.2


@given(seeds, st.sampled_from([(0.5, 1, 1.5, 2, 2.5, 3, 3.5, 4, 4.5, 5, 5), (2, 3, 4)]))
def test_predicted_ratings_are_as_frequent_as_given_ones(seed, scale):
    """Half stars count upwards. No prediction lies outside the scale, however far off it is."""
    rng, votes = np.random.default_rng(seed), np.zeros(200, envs.VOTE)
    users, items = np.divmod(np.arange(200), 20)
    votes["user"], votes["item"] = users, items
    votes["rating"] = rng.choice(scale, 200)
    half_up = np.maximum(np.floor(votes["rating"] + 0.5), 1).astype(int)
    model = envs.Factorisation(rng.normal(size=(10, 3)), rng.normal(size=(20, 3)), 3.0)
    limits = envs.star_limits(model, votes)
    stars = envs.stars(model, limits, users, items).astype(int)
    differences = np.bincount(stars, minlength=6) - np.bincount(half_up, minlength=6)
    assert np.abs(differences).max() <= 1
    # a higher prediction never means fewer stars
    order = np.argsort(envs.predict(model, users, items))
    assert (np.diff(stars[order]) >= 0).all()
    for offset in (-9.0, 9.0):
        far = model._replace(offset=offset)
        assert {*envs.stars(far, limits, users, items)} <= {*half_up}


def test_metrics_by_hand():
    before, after = envs.scores([1, 3], [4, 10]), envs.scores([2, 4], [10, 20])
    assert envs.metrics(after) == {"Len": [3, 2, 4], "R_each": [5, 5, 5], "R_traj": [15, 10, 20]}
    growth = envs.metrics(after, before)
    assert growth["Len"] == [1, 1, 1] and growth["R_traj"] == [8, 6, 10]
    assert envs.metrics(envs.scores([0], [0]))["R_each"] == [0, 0, 0]
    seeds = np.concatenate([envs.scores([1], [5]), envs.scores([3], [9])])
    assert envs.metrics(seeds)["Len"] == [2, -10.71, 14.71]     # Student's t of two seeds is 12.71
    assert envs.metrics(seeds)["R_traj"] == [7, -18.42, 32.42]
    with pytest.raises(ValueError, match="same seeds and users"):
        envs.metrics(before, envs.scores([1], [4]))


@pytest.mark.parametrize("seeds, spread", [(1, 0), (5, 3), (20, 3)])
def test_a_95_percent_interval_covers_the_truth(seeds, spread):
    """With one seed only the users vary. With several the seeds vary, too."""
    rng, covered = np.random.default_rng(0), []
    for _ in range(100):
        samples = rng.normal(size=(seeds, 40, 2)) + spread * rng.normal(size=(seeds, 1, 2))
        for _, low, high in envs.intervals(lambda s: s.mean(-2), samples):
            covered.append(low <= 0 <= high)
    assert 0.9 < np.mean(covered) < 0.99


MOVIES = [("1", "Matrix, The (1999)", "Action|Sci-Fi"), ("2", "Say (now’s", "(no genres listed)"),
          ("3", "Amélie (2001)", "Comedy"), ("6", "Misérables, Les (1995)", "Drama")]
VOTES = [("7", "1", 4.5, 9), ("7", "2", 0.5, 8), ("7", "3", 4, 7), ("9", "6", 1.5, 9)]
VOTES += [("7", "1", 4.5, 1)]               # rated twice: the last time counts
VOTES += [(f"u{u}", i, 3 + (u + int(i)) % 3, u) for u in range(20) for i in "1236"]
ITEMS = "movieId,title,genres\n" + "".join(f'{i},"{title}",{tags}\n' for i, title, tags in MOVIES)
RATINGS = "userId,movieId,rating,timestamp\n" + "".join(
    f"{u},{i},{r},{t}\n" for u, i, r, t in VOTES)
NUMBERED = "id," + RATINGS.rstrip().replace("rating,", "Stars,", 1).replace("\n", "\n0,")
REORDERED = "\n\nISBN,Year,Genre,NAME,ID\n" + "".join(
    f'x,,{tags},"{title}",{i}\n\n' for i, title, tags in MOVIES)
REORDERED = REORDERED.replace("é", "&#233;").replace("Sci-Fi", "Sci&#45;Fi")


def dat(rows):
    """Rows as a .dat file: no header, no quotes, :: between the fields."""
    return "".join("::".join(map(str, row)) + "\n" for row in rows)


@pytest.mark.parametrize("layout", [
    {"deep/movies.csv": ITEMS, "deep/ratings.csv": RATINGS, "deep/er/items.csv": "an old copy"},
    {"movies.csv": ITEMS.encode("utf-8-sig"), "ratings.csv": RATINGS.replace("\n", "\r\n")},
    {"movie.csv": ITEMS.encode("cp1252"), "rating.csv": RATINGS},
    {"items.csv": REORDERED, "ratings.csv": NUMBERED},
    {"movies.dat": dat(MOVIES).encode("cp1252"), "ratings.dat": dat(VOTES)},
    {"movies.dat": dat(MOVIES), "ratings.dat": dat(VOTES)}])
def test_every_layout_of_files_gives_the_same_world(tmp_path, monkeypatch, layout):
    monkeypatch.setenv("HOME", str(lay(tmp_path, layout)))
    env = envs.movielens("~")
    envs.check(env)
    assert env.titles == ("The Matrix", "Say (now’s", "Amélie", "Les Misérables")
    assert env.years == (1999, None, 2001, 1995) and env.learners == 11
    assert env.categories == ("Action", "Comedy", "Drama", "Sci-Fi")
    assert env.belongs.sum(1).tolist() == [2, 0, 1, 1]
    assert "85 ratings; 4 categories" in env.about
    fitted = envs.movielens("~", fitted=True)
    # A quarter of the pairs drawn are an item with itself. If they counted, beta would be 0.
    assert fitted.beta > 0
    histories = [history.tolist() for history in env.histories]
    # one user liked Amélie, then The Matrix; another rated one item, and that low
    assert [2, 0] in histories and [3] in histories
    assert histories != [history.tolist() for history in envs.movielens("~", 1).histories]


@pytest.mark.parametrize("world, tags, pairs, most, words", [
    ("csv", ["War|Drama", "War", "War|Drama|Crime", "", "Jazz"], {(0, 1), (0, 2)}, 2,
     "20% of pairs too similar by categories"),         # 2 of 10
    ("csv", [""] * 5, {(2, 3)}, 3, "by fitted vectors, no item has a category"),
    ("fitted", ["War"] * 5, {(2, 3)}, 3, "by fitted vectors; beta")])
def test_similarity_is_by_categories_or_fitted_vectors(tmp_path, world, tags, pairs, most, words):
    """The cosine of War and of War, Drama, Crime is 0.577, below the limit of 0.595.

    All users give the items 2 and 3 the same ratings. The fitted beta is the 0.2 quantile of 10.
    """
    items = "id,title,categories\n" + "".join(f"{n},Film {n},{t}\n" for n, t in enumerate(tags))
    votes = "user,item,rating\n" + "".join(
        f"{user},{item},{1 + user * step % 5}\n" for user in range(40)
        for item, step in enumerate((1, 2, 3, 3, 4)))
    lay(tmp_path, {"items.csv": items, "ratings.csv": votes})
    env = run.load_world(f"{world}:{tmp_path}", 0)
    found = {(a, b) for b in range(5) for a in range(b) if env.distance(0, a, b) < env.beta}
    assert pairs <= found and len(found) <= most and words in env.about
    assert f"; {len(env.categories)} categories; " in env.about
    # Rounded predictions would lie between 1 and 5.
    assert {*env.rate(np.arange(40)[:, None], np.arange(5)).ravel()} == {1, 2, 3, 4, 5}
    assert run.load_world(f"{world}:{tmp_path}", 0) is env      # a process fits it once


@pytest.mark.parametrize("name, text, words", table(r"""
items.csv | id,title\n1,Heat, no quotes | line 2: 3 fields
items.csv | id,title\n1,Heat\n1,Heat | line 3: item 1 is listed twice
items.csv | id,title,genres\n1,Heat,['War'] | line 2: separate categories by
items.csv | | the file is empty
ratings.csv | 1,1,4\n2,1,4 | no column for the user
ratings.csv | id,user,sku,rating\n0,1,1,4 | no column for the item
ratings.csv | user,item,rating\na,1,nan | ratings.csv: line 2: the rating nan
ratings.csv | user,item,rating\na,1,good | line 2: .*'good'
ratings.csv | user,item,rating\na,77,4 | line 2: item 77 is not
ratings.csv | user,item,rating\na,1, | line 2: a line without rating
ratings.csv | user,item,rating\na,1,4 | fewer than two users
ratings.csv | user,item,rating\na,1,9\nb,1,9 | every rating is 9
ratings.csv | user,item,rating\na,1,4\nb,1,5 | fewer than two items
"""))
def test_bad_ratings_are_refused_in_one_line(tmp_path, name, text, words):
    lay(tmp_path, {"items.csv": ITEMS, "ratings.csv": RATINGS} | {name: text})
    line = failure(envs.ratings_folder, tmp_path, kind=envs.BadData)
    assert re.search(words, line) and "README" in line


def test_another_scale_is_mapped_and_reported(tmp_path):
    """Item 0 is rated last, and items from 25 on are not liked: a history is the last 20 liked."""
    numbers = range(30)
    items = "id,title,year\n" + "".join(f"{n},Film {n},{1980 + n}\n" for n in numbers)
    votes = "user,item,rating,time\n" + "".join(
        f"{user},{n},{100 if n < 25 else 0},{100 - n}\n" for user in "ab" for n in numbers)
    lay(tmp_path, {"items.csv": items, "ratings.csv": votes})
    env = envs.ratings_folder(tmp_path)
    assert "from 0..100 onto 1..5" in env.about and "by fitted vectors" in env.about
    assert env.years[4] == 1984
    assert [history.tolist() for history in env.histories] == [[*range(19, -1, -1)]] * 2


def release(path, world="steam"):
    """The authors' layout with made-up content."""
    titles = ("Doom", "Tea &amp; Co", "Twin", "Twin", "It's")
    genres = {"Doom": "['Action']", "Tea &amp; Co": "[\"Chef's\", 'Action']"}
    home = f"deep/{world}/"
    lay(path, {
        "datamaps.json": "of another world",
        home + "datamaps.json": json.dumps({"id2item_dict": dict(enumerate(titles))}),
        home + "list_genre.json": json.dumps(genres)})
    for half, first in (("train", 0), ("test", 2)):
        np.save(path / home / f"{world}_{half}.npy", np.arange(20.0).reshape(4, 5) / 4 + first)
        liked = ["It's", "Doom", "Gone", "Tea &amp; Co", "Doom"]
        users = [{"userid_encoded": row, "pos_seq_name": liked} for row in range(first, 4)]
        lay(path, {
            home + f"{half}_distance_mat.pickle": pickle.dumps(np.full((5, 5), 40.0 + 10 * first)),
            f"data/{world}/{half}.json": json.dumps(users)})
    return path / home


def test_the_released_layout_loads(tmp_path):
    release(tmp_path)
    env = envs.released(tmp_path, "steam")
    envs.check(env)
    assert (env.learners, len(env.histories), env.grace, env.beta) == (4, 6, 1, 50)
    assert env.titles == ("Doom", "Tea & Co", "Twin", "Twin", "It's")
    assert env.belongs[:2].tolist() == [[1, 0], [1, 1]] and env.histories[5].tolist() == [4, 1, 0]
    assert env.rate(np.array([0, 1, 4, 5]), 2).tolist() == [1, 1.75, 5, 5]     # clipped to 1..5
    assert env.distance(np.array([0, 4]), 1, 2).tolist() == [40, 60]
    release(tmp_path, "amazon")
    assert envs.released(tmp_path, "amazon").beta == 15


MKDIR = b"cos\nmkdir\n(S'evidence'\ntR."      # a pickle that makes a folder when it is loaded


@pytest.mark.parametrize("name, content, words", [
    ("test_distance_mat.pickle", MKDIR, "os.mkdir, which is refused"),
    ("test_distance_mat.pickle", np.array([[print]], object), "print, which is refused"),
    ("test_distance_mat.pickle", b"\x80\x04\x8c\x04os\nx\x8c\x06system\x93.", "it names os"),
    ("steam_test.npy", MKDIR, "pickle"),
    ("train_distance_mat.pickle", np.full((5, 5), np.nan), "one matrix of finite"),
    ("train_distance_mat.pickle", np.ones((4, 4)), "do not fit"),
    ("datamaps.json", b"{}", "no key 'id2item_dict'"),
    ("list_genre.json", b'{"Doom": "f()"}', "malformed")])
def test_bad_or_malicious_files_are_refused(tmp_path, monkeypatch, name, content, words):
    monkeypatch.chdir(tmp_path)
    file = release(tmp_path) / name
    file.write_bytes(content if isinstance(content, bytes) else pickle.dumps(content))
    line = failure(envs.released, tmp_path, "steam", kind=envs.BadData)
    assert re.search(words, line) and line.count("authors") == 1
    assert not os.path.exists("evidence")


# ---------------------------------------------------------------------------------- endpoints

PARTS = [{"type": "thinking", "text": "so"}, {"type": "reasoning_text", "text": "so"},
         {"type": "text", "text": "hel"},
         {"type": "output_text", "text": "lo"}]
ACTS = [
    completion(), completion(""), response("403", "flagged"),
    response("429", "", "Retry-After: 20"), response("500"), response("200", "<html>"),
    response("ReadError"), response("ReadTimeout"),
    response("307", "", "Location: /x"), without("seed"), without("max_tokens")]


@pytest.mark.parametrize("status, body, reason, times", table("""
400 | {"error": {"message": "API key policy", "code": "content_filter"}} | API key policy | 1
403 | <html>Attention Required! | Attention | 1
200 | {"choices": [{"message": {"content": "A"}, "finish_reason": "guardrail_hit"}]} | guardrail | 1
403 | Your input was flagged ; Content violates usage guidelines. SAFETY_CHECK | 403 | 1
200 | {"choices": []} ; {"choices": null, "base_resp": "out of tea"} | missing | 4
200 | {"choices": [], "promptFeedback": {"blockReason": "SAFETY"}} | blockReason | 1
200 | {"id": "1", "usage": {"prompt_tokens": 9}, "model": "g"} | missing {"model": "g"} | 4
400 | Could not finish the message because max_tokens or model output limit was reached. | limit | 1
200 | {"choices": [{"message": {"content": "A"}, "finish_reason": "abort"}]} | half a | 4
200 | {"choices": [{"message": {"content": "A"}, "error": "lost"}]} | lost | 2
200 | {"choices": [{"message": {"refusal": "I cannot"}}]} | I cannot | 1
200 | {"choices": [{"finish_reason": "content_filter"}]} | content_filter | 1
200 | {"choices": [{"message": {"content": "Act"}, "finish_reason": "content_filter"}]} | filter | 1
200 | {"choices": [{"message": {"content": "<think>so"}, "finish_reason": "length"}]} | length | 1
200 | {"choices": [{"message": {"content": "<think>so</think>"}}]} | no text | 2
200 | {"choices": [{"message": {"content": null}}]} | no text | 2
200 | {"choices": [{"message": {"content": "a"}, "finish_reason": "error"}]} | error | 4
200 | data: {"choices": [{"delta": {"content": "a"}}]} | missing and half a text | 4
400 | {"error": {"code": "tool_use_failed"}} ; output_parse_failed | failed | 4
400 | Model unloaded. | unloaded | 4
"""))
def test_a_blocked_or_empty_answer_is_an_empty_reply(status, body, reason, times):
    """After one fault fewer there is an answer."""
    seen = client(*[response(status, body)] * (int(times) - 1))
    assert seen.ask(ASK) == GOOD
    seen = client(*[response(status, body)] * int(times))
    reply = seen.ask(ASK)
    assert reply.text == "" and reason in reply.reason
    assert (reply.usage.prompt == 9) == ('"prompt_tokens": 9' in body)
    assert reply.reason in seen.notices[-1]
    assert seen.stats["requests"] == len(seen.requests) == int(times)
    assert seen.ask(ASK) == GOOD


@pytest.mark.parametrize("status, body, header, words, times", table("""
401 ; 403 | no | | OPENAI_API_KEY | 1
400 | [{"error": {"code": 400, "message": "API key not valid."}}] | | OPENAI_API_KEY valid | 1
401 ; 402 ; 500 | {"error": {"code": "insufficient_quota"}} | | top up | 1
400 ; 403 ; 412 ; 429 | credit balance is too low ; not enough credits ; spend limit | | top up | 1
404 | model 'm' not found | | 404 /v1/chat/completions --model | 1
400 ; 500 | unknown: seed. context size is 9 ; The input token count (9) exceeds 8 | | --titles | 1
500 | Input prompt is too big compared to KV size | | --titles | 1
413 ; 422 | Prompt exceeds 8 | | --transcript | 1
400 | {"error": {"message": "max_tokens limit", "code": "context_length_exceeded"}} | | --titles | 1
400 | Unknown name "safety_settings" | | --extra-body | 1
200 | {"error": "Unexpected endpoint or method. (POST /chat/completions)"} | | --base-url | 1
400 ; 422 | max_tokens too big ; max_new_tokens must be <= 512 | | --reply-tokens | 1
400 | max_tokens is larger than allowed | | --reply-tokens | 1
400 | Model Not Exist ; m is not a valid model ID | | --model --base-url | 1
200 | {"error": {"message": "who?", "code": "401"}} | | 401 who? OPENAI_API_KEY | 1
503 | down | x-should-retry: false | 503 down resumes | 1
400 ; 501 | odd request ; max_new_tokens is odd, tools are fine | | odd --extra-body | 1
400 | {"error": {"message": "error", "metadata": {"raw": "bad tea"}}} | | bad tea | 1
200 | <html> sk-Quite5ecretKey42 | | 200 <html> *** /v1? | 2
200 | [] ; | | 200 /v1? | 2
200 | data: [DONE] | | 200 /v1? | 2
200 | [{"error": {"message": "who?", "code": 401}}] | | 401 who? OPENAI_API_KEY | 1
429 | {"error": {"details": [{"retryDelay": "25862s"}]}} | | 25862 resumes | 1
200 | {"choices": [{"mess ; data: {"choices": [{"del | | breaks off resumes | 7
429 | Please try again in 7h12m0s | Retry-After: 25920 | 7h12m0s 25920 resumes | 1
301 ; 307 | | Location: https://b.example/x?k=1 | https://b.example/x; --base-url | 1
302 | | Location: /again | http://a.example/again; --base-url | 1
308 | | Location: https://a.example/x | https://a.example/x; --base-url | 1
308 | | Location: /again | http://a.example/again; --base-url | 2
403 ; 429 ; 503 | You are being rate limited | | limited resumes | 17
429 | Allocated quota: insufficient_quota ; Rate limit: content policy, API key, max_tokens | | | 17
200 | {"error": {"message": "busy", "code": 503}} | | 503 busy resumes | 17
200 | {"error": {"code": "rate_limit"}} | | resumes | 7
408 ; 409 ; 423 ; 424 ; 425 ; 498 ; 499 ; 529 | no | | no resumes | 7
400 | odd | x-should-retry: true | odd resumes | 7
500 ; ReadError ; RemoteProtocolError | sk-Quite5ecretKey42 | | *** resumes | 7
ReadTimeout | slow | | ReadTimeout --timeout | 2
ConnectError ; UnicodeError | refused | | start the server --base-url | 3
LocalProtocolError | odd | | LocalProtocolError --extra-body | 1
"""))
def test_a_fatal_fault_ends_in_one_line_that_helps(status, body, header, words, times):
    """One fault fewer is survived."""
    act = response(status, body, header)
    seen = client(*[act] * (int(times) - 1))
    assert seen.ask(ASK) == GOOD and len(seen.requests) == int(times)
    retries = [seen.stats[name] for name in seen.stats if name.startswith("retries: ")]
    assert sum(retries) == int(times) - 1
    seen = client(*[act] * 20, base="http://a.example")
    line = failure(seen.ask, ASK)
    assert line.startswith("http://a.example/")
    assert all(word in line for word in words.split()), line
    assert len(seen.requests) == int(times)


def test_answers_in_odd_forms_are_read():
    """A count that is no number is unknown. The pieces of a stream are joined."""
    plain, *others = (completion(text).text for text in ("hello", PARTS, "<think>a</think>hello"))
    for text in ("\n\n" + plain, "\ufeff" + plain, *others):
        seen = client(httpx.Response(200, content=text.encode()))
        assert seen.ask(ASK) == GOOD and len(seen.requests) == 1
    for usage in (None, {"prompt_tokens": None, "prompt_tokens_details": None},
                  {"prompt_tokens": True, "completion_tokens": "5"}, {"prompt_tokens": 5.5}):
        assert client(completion(usage=usage)).ask(ASK) == Reply("hello")
    pieces = [{"choices": [{"delta": {"role": "assistant"}}]},
              {"choices": [{"delta": {"content": "hel"}}]},
              {"choices": [{"delta": {"content": "lo"}, "finish_reason": "length"}]},
              {"choices": [{"delta": {}}]},
              {"choices": [], "usage": json.loads(plain)["usage"]}]
    lines = [f"data: {json.dumps(piece)}\n\n" for piece in pieces]
    for text in ("".join(lines), ": comment\n\n" + "".join(lines) + "data: [DONE]\n\n"):
        seen = client(httpx.Response(200, text=text))
        assert seen.ask(ASK) == GOOD and "--reply-tokens" in seen.notices[0]
    del pieces[2]["choices"][0]["finish_reason"]            # the count of tokens ends the stream
    pieces[2]["choices"][0]["delta"]["content"] = [{"type": "text", "text": "lo"}]
    lines = [f"data: {json.dumps(piece)}\n\n" for piece in pieces]
    for text, reply in (("".join(lines), GOOD),
                        ("".join(lines[:4]) + "data: [DONE]\n\n", Reply("hello"))):
        seen = client(httpx.Response(200, text=text))
        assert seen.ask(ASK) == reply and len(seen.requests) == 1
    error = httpx.Response(200, text='data: {"choices": []}\ndata: {"error": {"code": 401}}')
    assert "OPENAI_API_KEY" in failure(client(error).ask, ASK)


@pytest.mark.parametrize("prompt, act, words", [
    ("word " * 999, completion(), "num_ctx"),
    ("Hi", completion(finish="length"), "--reply-tokens")])
def test_cut_prompts_and_cut_texts_are_reported_once(prompt, act, words):
    seen = client(act, act)
    ask = ASK._replace(messages=(("user", prompt),))
    assert [seen.ask(ask), seen.ask(ask)] == [GOOD, GOOD]
    assert len(seen.notices) == 1 and words in seen.notices[0]


def test_a_request_holds_ask_extra_fields_and_key():
    """Half of a split character is sent as a question mark."""
    key = f" {SECRET}\r\n"
    seen = client(key=key, extra={"enable_thinking": False}, headers={"X-Team": "a b"})
    seen.ask(ASK._replace(messages=(("system", "Be brief."), ("user", "Am\ud800lie"))))
    assert seen.bodies[0] == {
        "model": "m", "messages": [{"role": "user", "content": "Be brief.\n\nAm?lie"}],
        "max_tokens": 256, "temperature": 0.5, "seed": prompts.seed_of(ASK.key),
        "stream": False, "enable_thinking": False}
    headers = seen.requests[0].headers
    assert headers["Authorization"] == f"Bearer {SECRET}" and headers["X-Team"] == "a b"
    seen = client(headers={"Authorization": "Basic me"})
    seen.ask(ASK)
    assert seen.requests[0].headers.get_list("authorization") == ["Basic me"]       # and no key
    seen = client(key=" \n")
    assert seen.ask(ASK) == GOOD and "Authorization" not in seen.requests[0].headers


@pytest.mark.parametrize("name, text", [
    ("max_tokens", "Unsupported parameter: '{}' is not supported"),
    ("stream", "Unsupported parameter: '{}' is not supported"),
    ("temperature", '{{"error": {{"message": "Unsupported parameter", "param": "{}"}}}}'),
    ("seed", '{{"error": {{"message": "Unsupported parameter", "cause": "{}"}}}}')])
def test_a_refused_parameter_is_replaced_or_dropped_and_reported(name, text):
    seen = client(*[without(name, text)] * 3)
    assert seen.ask(ASK) == seen.ask(ASK) == GOOD
    assert len(seen.notices) == 1 and name in seen.notices[0] and not seen.waits
    assert [name in body for body in seen.bodies] == [True, False, False]
    assert ("max_completion_tokens" in seen.bodies[1]) == (name == "max_tokens")


def test_a_field_goes_only_if_refused_and_not_the_users():
    seen = client(without("max_tokens"), without("max_completion_tokens"))
    assert seen.ask(ASK) == GOOD
    assert not seen.bodies[2].keys() & {"max_tokens", "max_completion_tokens"}
    seen = client(without("seed", text="unknown {}; allowed: max_tokens, temperature"))
    assert seen.ask(ASK) == GOOD and {"max_tokens", "temperature"} <= seen.bodies[1].keys()
    seen = client(response("422", '{"detail": [{"type": "extra_forbidden", "loc": ["seed"]}]}'))
    assert seen.ask(ASK) == GOOD and "seed" not in seen.bodies[1]
    seen = client(without("seed"), extra={"seed": 1})
    assert "seed" in failure(seen.ask, ASK) and len(seen.requests) == 1


@pytest.mark.parametrize("header, low, high", table("""
Retry-After: 7 | 7 | 7
Retry-After: 0 ; Retry-After: Mon, 01 Jan 2001 00:00:00 GMT | .37 | .5
Retry-After: soon ; | 99 | 99
Retry-After: 99999 ; Retry-After: Fri, 31 Dec 9999 23:59:59 GMT | 120 | 120
Retry-After: SOON | 50 | 100
retry-after-ms: 1500 | 1.5 | 1.5
"""))
def test_a_wait_is_what_the_server_asks_or_a_backoff(header, low, high):
    """At most LONGEST_WAIT. A wait in the body counts if no header tells one."""
    header = header.replace("SOON", email.utils.formatdate(time.time() + 100, usegmt=True))
    seen = client(*[response("400", "tool_use_failed: try again in 99 s", header)] * 2)
    assert seen.ask(ASK) == GOOD
    assert float(low) <= seen.waits[0] <= float(high)
    assert len(seen.notices) == (float(high) > 5)


def test_waits_double_are_bounded_and_end_with_the_run():
    """The waits come to at least 0.75 * 103.5 s."""
    for status in ("429", "503"):
        seen = client(*[response(status)] * 16)
        assert seen.ask(ASK) == GOOD and len(seen.notices) == 1 and "waiting" in seen.notices[0]
        for wait, longest in zip(seen.waits, [.5, 1, 2, 4] + [8] * 12, strict=True):
            assert .75 <= wait / longest <= 1
    seen = client(response("429"), sleep=lambda seconds: True)
    assert failure(seen.ask, ASK) == "stopped"
    assert len(seen.requests) == 1


def test_a_redirect_to_a_path_of_the_server_is_followed():
    """It is remembered and told once. A second redirect is not followed."""
    seen = client(response("307", "", "Location: /x/?k=1"), base="http://a:1")
    assert seen.ask(ASK) == seen.ask(ASK) == GOOD
    assert [request.url.raw_path for request in seen.requests[1:]] == [b"/x/?k=1"] * 2
    assert seen.requests[1].content == seen.requests[0].content
    old, new = "http://a:1/v1/chat/completions", "http://a:1/x/"
    assert seen.notices == [f"{old}: 307 redirects to {new}"]
    chain = [response("308", "", f"Location: /{path}") for path in "xyx"]
    assert "redirects to" in failure(client(*chain).ask, ASK)


def test_a_busy_server_is_outlasted_while_it_answers_others():
    """Of 40 refusals each tenth is followed by the answer to another ask. Then 17 more end it."""
    refusals, waits = [], []

    def answer(request):
        if b"other" in request.content or len(refusals) == most:
            return completion()
        refusals.append(request)
        if len(refusals) in (10, 20, 30, 40):
            model(ASK._replace(messages=(("user", "other"),)))
        return response("429")
    model = prompts.openai("http://a", "m", sleep=waits.append, notice=print,
                           transport=httpx.MockTransport(answer))
    most = 40
    assert model(ASK) == GOOD and min(waits[5:]) > 5
    refusals.clear()
    most = 999
    assert "--workers" in failure(model, ASK) and len(refusals) == 40 + 17 - 1


# `acts` are the answers to the requests of one ask: "abort" is asked four times
@pytest.mark.parametrize("acts, words, at_start, patience", [
    ([response("500")] * 7, "resumes", 1, 4),
    ([response("ReadTimeout")] * 2, "--timeout", 1, 4),
    ([response("403", "<p>")], "a firewall", 10, 20),
    ([completion("", "length")], "--reply-tokens", 10, 20),
    ([completion("", "abort")] * 4, "abort", 10, 100),
    ([completion("", refusal="No.")], "No.", 10, 1000)])
def test_empty_replies_in_a_row_end_the_run(acts, words, at_start, patience):
    """At the start fewer are enough than later. A text starts the count again."""
    nearly = [completion(), *acts * (patience - 1)]
    for script, texts in ((acts * 10, [""] * (at_start - 1)),
                          ([*nearly, *nearly, *acts], ["hello", *[""] * (patience - 1)] * 2)):
        seen = client(*script)
        assert [seen.ask(ASK).text for _ in texts] == texts
        assert words in failure(seen.ask, ASK)
        assert sum("an empty reply" in notice for notice in seen.notices) == ("" in texts)


@settings(max_examples=60)
@given(st.lists(st.sampled_from(ACTS), max_size=40), st.integers(0, 90), st.sampled_from([1, 8]))
def test_any_faults_end_in_a_reply_or_line_within_budget(script, most, workers):
    seen = client(*script)

    def outcome_of(ask):
        try:
            return ask(ASK)
        except EndpointError as ended:
            return ended
    with ThreadPoolExecutor(workers) as pool:
        results = list(pool.map(outcome_of, [prompts.limited(seen.ask, most)] * 40))
    for result in results:
        is_line = isinstance(result, EndpointError) and str(result).isprintable()
        assert result == GOOD or is_line or result.reason
    assert seen.stats.get("requests", 0) == len(seen.requests) <= most
    if BudgetSpent in map(type, results):
        assert len(seen.requests) == most
    if len(seen.requests) > len(script):                    # the script is over
        assert outcome_of(seen.ask) == GOOD


@pytest.mark.parametrize("base, root", table("""
http://localhost:1 ; localhost:1/ ; http://localhost:1/v1/ | http://localhost:1/v1
api.example ; HTTPS://api.example | https://api.example/v1
localhost.example | https://localhost.example/v1
192.168.1.5:11434 | http://192.168.1.5:11434/v1
myserver:8000 | http://myserver:8000/v1
http://a/chat/completions ; http://a/embeddings | http://a
http://a/api/v3 ; http://a/api/v3/embeddings | http://a/api/v3
http://a/openai/deployments/d?api-version=2 | http://a/openai/deployments/d
"""))
def test_a_base_url_of_any_form_leads_to_its_route(base, root):
    seen = client(base=base)
    _, mark, query = base.partition("?")
    assert seen.ask(ASK) == GOOD
    assert seen.requests[0].url == f"{root}/chat/completions{mark}{query}"
    assert seen.requests[0].headers.get("api-key") == (SECRET if query else None)


BAD_BASES = f"""htp://x http:///v1 http://x:999999 http://[::1 http://[1:2] http://u:{SECRET}@x
//{SECRET}@x?{SECRET} http://u:{SECRET}/b@x/v1 http://{SECRET}?x@127.0.0.1 http://xn--""".split()
DAMAGED = [SECRET + mark + SECRET for mark in ("\n", "\u201d", "\x00", "\u00e9", "\ud800")]


@pytest.mark.parametrize("words, options", [
    *[("base URL", {"base": base}) for base in BAD_BASES],
    *[("key or a header", {"key": key}) for key in DAMAGED],
    *[("key or a header", {"headers": {"x": value}}) for value in DAMAGED]])
def test_a_bad_address_key_or_header_is_not_shown(words, options):
    assert words in failure(lambda: client(**options))


@pytest.mark.parametrize("secret", [SECRET, f"{SECRET}-more", f"Bearer {SECRET}", "sk-abc",
                                    "id=1234", "url/key-42", "url%2Fkey-42", r"url\/key-42"])
@pytest.mark.parametrize("status", ["200", "400", "401", "500", "ConnectError", "302"])
def test_no_secret_is_in_errors_and_notices(secret, status):
    """No part of one is there, either: "***-more" would show how the longer one ends."""
    act = response(status, f"<p>{secret}", f"Location: http://b/{secret.split()[-1]}")
    headers = {"X-Token": f"{SECRET}-more", "Authorization": "Bearer sk-abc", "Cookie": "id=1234",
               "X-Secret": SECRET}
    base = f"localhost/{SECRET}-more/v1?k=url%2Fkey-42"
    seen = client(*[act] * 9, base=base, headers=headers)
    line = failure(seen.ask, ASK)
    notices = "".join(seen.notices)
    assert secret not in line + notices and SECRET not in notices
    assert line.count("***") > 1 and "-more" not in line


def test_no_key_is_logged_or_kept(tmp_path):
    told, blocked = f"the key is {SECRET}", f"flagged {SECRET}"
    seen = client(response("403", blocked), completion(told), response("429", SECRET))
    logged_answers(tmp_path / "log", seen.ask)
    log = (tmp_path / "log").read_text()
    route = prompts.connect("localhost", "x", SECRET)
    assert SECRET not in log + repr((seen.notices, seen.stats, seen.ask, route))
    assert "flagged ***" in seen.notices[0] and "the key is ***" in log
    assert seen.stats["system_fingerprint"] == "fp ***"


@pytest.mark.parametrize("name, value, base", [
    ("ALL_PROXY", f"socks5://u:{SECRET}@127.0.0.1:9", "http://example.invalid"),
    ("ALL_PROXY", f"http://u:{SECRET}/x@[::1", "http://example.invalid"),
    ("SSL_CERT_FILE", "none.pem", "https://127.0.0.1:9")])
def test_proxies_and_certificates_are_read_where_needed(name, value, base, monkeypatch):
    monkeypatch.setenv(name, value)
    assert "start the server" in failure(client(base="http://127.0.0.1:9", transport=None).ask, ASK)
    assert name in failure(lambda: client(base=base, transport=None))


def test_one_deadline_covers_the_whole_answer():
    drops = (time.sleep(.01) or b"\n" for _ in count())
    transport = httpx.MockTransport(lambda request: httpx.Response(200, content=drops))
    start = time.monotonic()
    assert "--timeout" in failure(client(timeout=.1, transport=transport).ask, ASK)
    assert time.monotonic() - start < 9


def rowed(body):
    """Embeddings of texts: their length and ones, in reverse order."""
    rows = [{"index": i, "embedding": [len(text), 1, 1]} for i, text in enumerate(body["input"])]
    return httpx.Response(200, json={"data": rows[::-1]})


def embedder(*script):
    return client(*script, *[rowed] * 99, make=prompts.embeddings)


def test_embeddings_are_unit_rows_in_order():
    seen = embedder(without("encoding_format"))
    vectors = seen.ask(["a" * n for n in range(1, 101)])
    assert vectors.dtype == np.float32
    assert np.allclose(np.linalg.norm(vectors, axis=1), 1)
    assert np.allclose(vectors[:, 0] / vectors[:, 1], range(1, 101))
    assert [body.get("encoding_format") for body in seen.bodies] == ["float", None, None]
    seen.ask([""])
    assert seen.bodies[-1]["input"] == [" "]


# the embeddings of two texts, the first two perhaps with an index; base64 may lack its =
@pytest.mark.parametrize("first, second, is_sound", table("""
[3, 4] | [4, 3] | yes
[3, 4], "index": 0 | [4, 3], "index": 0 | yes
[4, 3], "index": "10" | [3, 4], "index": "9" | yes
[4, 3], "index": 1 | [3, 4] | yes
"AABAQAAAgEA=" | "AACAQAAAQEA" | yes
[1, 1] | [0, 0] ; ["x", 1] ; [1] |
1 | 1 |
"""))
def test_embeddings_are_read_by_index_order_or_from_base64(first, second, is_sound):
    """If they are no rows of numbers, or not one for each text, one line tells."""
    act = response("200", f'{{"data": [{{"embedding": {first}}}, {{"embedding": {second}}}]}}')
    if is_sound:
        assert np.allclose(embedder(act).ask(["a", "b"]), [[.6, .8], [.8, .6]])
        for texts in (["a"], ["a", "b", "c"]):
            assert f"2 for {len(texts)} texts" in failure(embedder(act, act).ask, texts)
    else:
        assert "--embed-model" in failure(embedder(act, act).ask, ["a", "b"])


@pytest.mark.parametrize("most, status, text", [
    (10, "400", "at most 10 inputs"), (1, "422", "too large"), (7, "413", "too large"),
    (9, "500", "batch too big"), (9, "429", "Too many tokens per request")])
def test_a_batch_is_halved_until_it_is_taken(most, status, text):
    refusal = response(status, text)

    def takes_few(body):
        return rowed(body) if len(body["input"]) <= most else refusal
    seen = client(*[takes_few] * 99, make=prompts.embeddings)
    vectors = seen.ask(["a" * n for n in range(1, 31)])
    assert (np.diff(vectors[:, 0]) > 0).all()               # the longer the text, the larger
    assert len(seen.bodies) < 60
    assert text in failure(embedder(*[refusal] * 99).ask, ["a", "b"])


def test_asks_of_a_log_without_texts_are_sent_again(tmp_path):
    """Embeddings are no texts, and are kept. Once a text has come, it is kept, too."""
    path = tmp_path / "log"
    silent = dict.fromkeys(LOGGED, Reply(""))
    prompts.recorded_embed(embedder().ask, prompts.open_log(path, "m"))(["a"])
    assert logged_answers(path, silent.get) == [Reply("")] * len(LOGGED)
    assert not prompts.open_log(path, "m").has_answered
    assert logged_answers(path, LOGGED.get) == logged_answers(path) == list(LOGGED.values())
    log = prompts.open_log(path, "m")
    assert log.has_answered and len(prompts.recorded_embed(prompts.unlogged, log)(["a"])) == 1


@pytest.mark.parametrize("reason, is_known", [
    ("failure: 500", False), ("slow: ReadTimeout", False), ("firewall: 403 <", False),
    ("blocked: 403", True)])
def test_failures_at_the_end_of_a_log_are_sent_again(tmp_path, reason, is_known):
    """After a later text they count as empty replies."""
    hello, lost, later = ASKS
    replies = {hello: GOOD, lost: Reply("", reason=reason), later: GOOD}

    def known_after(*asks):
        llm = prompts.recorded(replies.get, prompts.open_log(tmp_path / "log", "m"))
        assert [llm(ask) for ask in asks] == [replies[ask] for ask in asks]
        stats = {}
        log = prompts.open_log(tmp_path / "log", "m")
        prompts.recorded(replies.get, log, stats)(lost)
        return "known" in stats
    assert known_after(hello, lost) == is_known
    replay = prompts.open_log(tmp_path / "log", "m", replay=True)
    assert prompts.recorded(prompts.unlogged, replay)(lost) == replies[lost]
    assert known_after(hello, lost, later)


@pytest.mark.parametrize("damage", [
    bytes, lambda log: log[:-1], lambda log: log[:-30],
    lambda log: log.replace(b'"text": "hello"', b'"text": 5'),
    lambda log: log + log.splitlines(True)[0].replace(b"hello", b"other")])
def test_a_damaged_log_loses_only_what_cannot_be_read(tmp_path, monkeypatch, damage):
    """It lies below the home folder. Of two replies to one ask the first counts."""
    monkeypatch.setenv("HOME", str(tmp_path))
    name, path = "~/a new folder/log", tmp_path / "a new folder" / "log"
    logged_answers(name, LOGGED.get)
    whole = path.read_bytes()
    first = json.loads(whole.splitlines()[0])
    assert (first["role"], first["key"]) == (ASKS[0].role, list(ASKS[0].key))
    path.write_bytes(damage(whole))
    assert logged_answers(name, LOGGED.get) == logged_answers(name) == list(LOGGED.values())
    assert set(whole.splitlines()) <= set(path.read_bytes().splitlines())
    for model_id, role in (("m", "critic"), ("another model", "actor")):
        replay = prompts.recorded(prompts.unlogged, prompts.open_log(name, model_id))
        line = failure(replay, ASK._replace(role=role))
        assert f"lacks an answer to ('{role}', Key(seed=0, phase='learn'" in line


def test_of_two_answers_at_once_the_first_counts(tmp_path):
    """Two threads embed the same text, and wait() gives each another number."""
    log, both = prompts.open_log(tmp_path / "log", "m"), threading.Barrier(2, timeout=9)
    embed = prompts.recorded_embed(lambda texts: np.full((1, 3), both.wait(), "f4"), log)
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(embed, [["a"], ["a"]])
    assert first.tobytes() == second.tobytes()
    assert (tmp_path / "log").read_bytes().count(b"\n") == 1


def test_embeddings_are_recorded_once_to_the_bit_and_never_mix(tmp_path):
    seen, texts = embedder(), ["a", "bb", "a", "ccc"]
    vectors = prompts.recorded_embed(seen.ask, prompts.open_log(tmp_path / "log", "m"))(texts)
    assert seen.bodies[0]["input"] == ["a", "bb", "ccc"]
    log = prompts.open_log(tmp_path / "log", "m")
    assert prompts.recorded_embed(prompts.unlogged, log)(texts).tobytes() == vectors.tobytes()
    larger = prompts.recorded_embed(lambda texts: np.ones((1, 5), "f4"), log)
    assert "{3, 5}" in failure(larger, ["a", "new"]) and len(log.known) == 3
    assert larger(["a"]).tobytes() == vectors[:1].tobytes()         # the refused size is forgotten


@pytest.mark.parametrize("key", ["none", "message", "content", "ollama", "123456"])
def test_keys_that_are_words_are_starred_only_in_errors(key):
    words = "none message content ollama"
    act = completion(words, usage={"prompt_tokens": 1234567})
    assert client(act, key=key).ask(ASK).text == words
    line = failure(client(response("400", f"key: {key}"), key=key).ask, ASK)
    assert key not in line and "***" in line


# ------------------------------------------------------------------------------- command line


@pytest.mark.parametrize("workers", [1, 8])
def test_workers_a_second_run_and_a_draft_change_nothing(workers, finished, tmp_path):
    """The config.json of a run without answers (a mistyped model) changes nothing, either."""
    (tmp_path / ".config.json.1.part").write_text("{")      # left by a kill
    mistyped = settings_of("")._replace(model="mistyped")
    run.write(tmp_path / "config.json", run.dumps(mistyped._asdict()))
    for _ in range(2):
        succeed(*SMALL, "--workers", workers, "--out", tmp_path)
        assert files(tmp_path) == files(finished)


def test_the_summary_tells_what_the_episodes_hold(finished):
    summary, rows = read(finished / "summary.json"), episodes_in(finished)
    assert summary.keys() == set(
        "world method model embedding seed episodes users first load extra config learning"
        " before after difference reflections malformed fallbacks ungrounded calls endpoint"
        " seconds".split())
    assert [row["phase"] for row in rows] == ["before"] * 3 + ["learn"] * 4 + ["after"] * 3
    length, reward = 0, 0
    for row in rows[-3:]:
        length += len(row["steps"]) - bool(row["left"])
        reward += sum(step["reward"] for step in row["steps"])
    means = [length / 3, reward / length, reward / 3]
    assert [interval[0] for interval in summary["after"].values()] == pytest.approx(means, abs=1e-4)
    assert summary["reflections"] == summary["calls"]["reflector"]["calls"] == 4


def test_empty_replies_are_counted_by_their_kind():
    live = run.new_live()
    for number in "12":
        run.counted(lambda ask: Reply("", reason=f"blocked: request {number}"), live, ASK)
    assert live.stats == {"empty: blocked": 2}


def test_useless_replies_are_counted(tmp_path, monkeypatch):
    """Each reply is malformed 3 times. Then the fallback answers, which names no item."""
    monkeypatch.setattr(prompts, "offline", scripted(dict.fromkeys(REPLIES, [""])))
    out = succeed(*SMALL, "--episodes", 0, "--out", tmp_path)
    summary = read(tmp_path / "summary.json")
    calls = sum(row["calls"] for row in summary["calls"].values())
    assert summary["malformed"] == calls == 3 * summary["fallbacks"] > 0
    assert summary["ungrounded"] == 1
    counts = f"malformed {calls}, fallbacks {calls // 3}, actions that named no free item 100%"
    assert f"replies   {counts}\n" in out


@pytest.mark.parametrize("method", run.METHOD_NAMES)
def test_every_method_runs_and_shows_its_episodes(method, tmp_path):
    flags = ("--episodes", 2, "--users", 2, "--max-steps", 3, "--method", method)
    code, out, err = command(*flags, "--out", tmp_path)
    assert code == 0 and f"{method} on films" in out
    asks_nothing = method in (*envs.POLICIES, "billp-no-model")
    assert asks_nothing == ("asks no language model" in out) and "no width" not in out
    assert ("learns nothing" in err) == (method in ("act", "react"))
    has_learning = method in ("bandit", "a2c", *billp.METHODS)
    assert has_learning == ("2 learning episodes" in out) == ("difference" in out)
    code, out, _ = command("--show", tmp_path)
    assert code == (2 if method in envs.POLICIES else 0)
    credited = method in ("billp", "billp-no-macro", "billp-no-critic", "billp-no-model")
    assert ("advantage" in out) == credited


@pytest.mark.parametrize("pick, number", [("learn", 3), ("learn:0", 0), ("before:1", 1)])
def test_show_tells_the_episode_picked(pick, number, finished):
    phase = pick.partition(":")[0]
    out = succeed("--show", finished, "--pick", pick)
    assert out.startswith(f"{phase} episode {number},")
    gains = [line for line in out.splitlines() if "advantage" in line]
    assert bool(gains) == (phase == "learn")
    assert all(("advantage +" in line) == ("encouraged" in line) for line in gains)
    for missing in ("learn:4", "3"):
        error = refuse("--show", finished, "--pick", missing)
        assert f"no episode '{missing}'" in error and "the last one here is after:2" in error


def test_show_refuses_an_unreadable_episode_in_one_line(finished, tmp_path):
    content = (finished / "episodes.jsonl").read_text("utf-8")
    run.write(tmp_path / "episodes.jsonl", re.sub(r'"reward": [\d.]+', '"reward": "good"', content))
    assert "another version" in refuse("--show", tmp_path)
    folder = tmp_path / "silent"
    succeed(*SMALL, "--method", "billp-no-model", "--out", folder)
    assert "asked no model" in refuse("--show", folder, "--prompts")
    changed = content.replace('"thought": "', '"thought": "Not ')       # as with other data
    run.write(tmp_path / "episodes.jsonl", changed)
    run.write(tmp_path / "config.json", (finished / "config.json").read_text("utf-8"))
    assert "gives another episode" in refuse("--show", tmp_path, "--prompts")


def test_a_loaded_run_goes_on_with_unseen_users(tmp_path):
    learners, load = [], ()
    for name in "abc":
        folder = tmp_path / name
        out = succeed(*SMALL, *load, "--out", folder)
        assert read(folder / "summary.json")["first"] == len(learners)
        assert f"    {len(learners) + 1}-" in out            # the number of the first episode
        learners += [row["user"] for row in episodes_in(folder) if row["phase"] == "learn"]
        load = ("--load", folder)
    assert len(set(learners)) == 12
    assert "--load" in refuse("--show", folder, "--prompts")
    assert "reads no memories" in refuse(*SMALL, *load, "--method", "react", "--out", folder)


def test_a_memory_knows_every_world_it_has_met(tmp_path):
    """Through other worlds, too. In csv and movielens another seed would hold out other users."""
    text = run.memory_text(settings_of("--episodes 9"), NOVICE, {("csv:a", 0): 7})
    run.write(tmp_path / "memory.json", text)
    saved = run.read_memory(tmp_path)
    assert saved["met"] == {("csv:a", 0): 7, ("films", 0): 9}
    assert run.learners_met(saved, "csv:a", 0) == 7 and run.learners_met(saved, "films", 1) == 0
    line = failure(run.learners_met, saved, "movielens:b", 1, kind=run.UserError)
    assert "own --seed 0" in line


def test_a_loaded_memory_is_the_agent_that_was_saved(tmp_path):
    """At temperature 0 a loaded run meets users before learning as the first met them after it."""
    cold = (*SMALL, "--temperature", 0, "--out")
    succeed(*cold, tmp_path / "a")
    succeed(*cold, tmp_path / "b", "--load", tmp_path / "a", "--episodes", 0)
    episodes, memory, _ = files(tmp_path / "a")
    again, memory_again, _ = files(tmp_path / "b")
    after = b"".join(episodes.splitlines(True)[-3:])
    assert again == after.replace(b'"phase": "after"', b'"phase": "before"')
    assert memory_again == memory


def test_a_run_directory_is_never_touched_by_another_run(finished):
    before = {path.name: path.read_bytes() for path in finished.iterdir()}
    line = refuse(*SMALL, "--out", finished, "--seed", 1, "--gamma", 0.9)
    assert "(seed, gamma)" in line
    assert "(window)" in refuse(*SMALL, "--out", finished, "--window", 2)
    assert {path.name: path.read_bytes() for path in finished.iterdir()} == before


@pytest.mark.parametrize("name, flags", [
    ("summarise", ["--seed", 1]),
    ("do_jobs", ["--experiment", "table5", "--rows", "billp", "--seeds", 1, "--workers", 1])])
def test_a_run_that_finished_meanwhile_is_not_touched(name, flags, finished, tmp_path, monkeypatch):
    """It finishes while another run or experiment is at work in its directory."""
    original = getattr(run, name)

    def late(*arguments):
        lay(tmp_path, {path.name: path.read_bytes() for path in finished.iterdir()})
        return original(*arguments)
    monkeypatch.setattr(run, name, late)
    assert "holds another configuration" in refuse(*SMALL, *flags, "--out", tmp_path)
    assert files(tmp_path) == files(finished)


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    run.write(tmp_path / "a", "old")
    with mock.patch.object(os, "replace", side_effect=OSError), pytest.raises(OSError):
        run.write(tmp_path / "a", "new")
    assert (tmp_path / "a").read_text() == "old"


FOLDER = {                                  # what is there when bad input is tried
    "full/thesis.txt": "years of work",
    "foreign/config.json": '{"port": 80}',
    "foreign.json": '{"billp": 1, "planner": [[1]]}',
    "half/items.csv": "id,title\n1,Heat\n"}


@pytest.mark.parametrize("argv, words", table(f"""
--world mars | mars
--world csv:half | no ratings.csv
--world csv:none | it is no folder
--method magic | billp-no-macro
--episodes -1 ; --episodes x | --episodes
--episodes 501 ; --experiment fig3 --seeds 1 --episodes 501 --out new | 500 users to learn from
--users 501 ; --experiment table5,curve --users 501 --out new | 500 held-out
--gamma nan ; --gamma 1.1 ; --line-weight 1.1 | takes a number from 0 to 1
--users 0 ; --batch 0 ; --window 1001 ; --max-steps 10001 | takes a number from 1 to
--load nowhere.json ; --load foreign.json | is no memory.json
--show nowhere | nowhere
--pick after:3 ; --seeds 3 ; --rows react ; --show full --seed 1 ; --max-calls 9 | has no effect
--model offline --replay ; --method greedy --lately 3 ; --method a2c --load full | has no effect
--experiment fig5 --window 2 ; --experiment curve --episodes 9 | has no effect
--experiment fig4 --users 3 ; --experiment table5 --method act | has no effect
--experiment table5 --cluster a --workers 2 | has no effect
--out full ; --out foreign | choose another --out
--experiment table9 | table9
--experiment table5 --rows act ; --experiment table5 --rows billp, | only billp-no-macro
--experiment table6 --models m,n | --base-url
--base-url x | --model
--replay --model m | --replay
--base-url x --model m --extra-body 1 ; --base-url x --model m --extra-body {SECRET} | JSON object
--base-url x --model m --header a ; --base-url x --model m --header api-key:{SECRET}= | --header
--model= ; --experiment table5 --rows= ; --out= ; --load= | without a value
--api-key={SECRET} | --api-key
billp ; --experiment table3, table5 | alone: every value needs its flag
{SECRET} | a word stands alone
--method react --load nowhere.json | is no memory.json
"""))
def test_bad_input_gets_one_line_and_changes_nothing(argv, words, tmp_path, monkeypatch):
    monkeypatch.chdir(lay(tmp_path, FOLDER))
    before = set(Path().rglob("*"))
    code, out, err = command(*argv.split())
    *announced, line = err.splitlines()
    assert set(Path().rglob("*")) == before
    assert code == 2 and out == "" and words in line and SECRET not in err
    assert announced == [f"reading {folder}" for folder in re.findall("csv:(.*)", argv)]
    assert {str(path): path.read_text() for path in before if path.is_file()} == FOLDER


def test_flags_reach_what_they_name():
    assert {*run.FLAGS["roles and memories"]} == {*Config._fields}
    assert {*run.FLAGS["rule of leaving"]} == {*envs.RULE}
    run_settings = settings_of("--beta 0.3 --floor 0 --window 2 --grace 3 --max-steps 7 --users 9")
    place = run.build_place(run_settings)
    assert [getattr(place.env, name) for name in envs.RULE] == [2, 0.3, 0, 3, 7]
    assert len(place.held_out) == 9
    given = "--base-url x --model a/b --users 9 --episodes 50 --beta 0.5 --gamma 0.5"
    args = run.parse(given.split())
    assert args.models_asked == ["a/b"]
    name = run.default_directory(args, {"model": "a/b"}).name
    assert name.startswith("films-billp-a%2Fb-seed0-users9-beta0.5-")
    for episodes, shown in ((50, "-episodes50"), (100, "")):
        args = run.parse(f"--experiment table3 --episodes {episodes}".split())
        name = run.default_directory(args, {"model": "offline"}).name
        assert re.fullmatch(f"films-table3-seed0{shown}-[0-9a-f]{{6}}", name)
    assert run.parse("--experiment table6 --base-url x --model m".split()).models_asked == ["m"]
    config = settings_of("--method act --thoughts --lessons latest").config
    assert config == billp.Config(lessons="latest", experience=False)._asdict()


def test_learners_and_held_out_users_never_mix():
    for seed in (0, 1):
        place = run.build_place(settings_of(f"--users 500 --episodes 500 --seed {seed}"))
        assert sorted(place.learners) == list(range(500))
        assert sorted(place.held_out) == list(range(500, 1000))


@pytest.mark.parametrize("variables, flags, asked", table("""
MODEL= ; API_KEY=k | | offline hashed_ngrams
MODEL=m API_KEY=k ; MODEL=m API_BASE=a | | m hashed_ngrams
MODEL=m EMBED_MODEL=e BASE_URL=a | | m e
MODEL=m EMBED_MODEL=e BASE_URL=a | --model n --embed-model f | n f
MODEL=m EMBED_MODEL=e BASE_URL=a | --model offline | offline hashed_ngrams
"""))
def test_a_flag_beats_the_environment(variables, flags, asked, monkeypatch, capsys):
    for variable in variables.split():
        name, _, value = variable.partition("=")
        monkeypatch.setenv(f"OPENAI_{name}", value)
    found = settings_of(flags)
    assert f"{found.model} {found.embedding}" == asked
    assert ("without a model" in capsys.readouterr().err) == (variables == "API_KEY=k")


def test_spellings_of_one_setting_are_one_run():
    assert settings_of("--world csv:./data/").world == "csv:data"
    flags = "--base-url x --model m --extra-body"
    one, same, other = (settings_of(f"{flags} {text}").extra
                        for text in ('{"a":1,"b":2}', '{"b":2,"a":1}', "{}"))
    assert one == same != other and "{" not in one      # config.json holds no secret of the body


@mock.patch.object(run, "plot")
def test_experiments_share_runs_and_are_the_same_for_any_workers(plot, tmp_path):
    flags = ("--experiment", "table3,table5", "--rows", "billp", "--seeds", 2, *SMALL)
    args = run.parse(list(map(str, flags)))
    base = run.settings(args, run.read_memory(None))
    [jobs] = run.cells_of(args, base, "table3").values()
    assert [job.run.seed for job in jobs] == [0, 1]
    expected = [run.measure_job(job) for job in jobs]
    for workers in (1, 2):
        code, out, err = command(*flags, "--workers", workers, "--out", tmp_path / str(workers))
        assert code == 0 and "table3 on films, seeds 0 to 1" in out
        assert err.count("runs: billp") == 2                # the tables share their runs
        [row] = read(tmp_path / str(workers) / "table3.json")["cells"]
        assert row["samples"] == expected
    assert "(experiment, seeds, rows)" in refuse(*SMALL, "--out", tmp_path / "1")


@pytest.mark.parametrize("own, of_billp, gain, word", [
    ((0, 10), (3, 11), [-2, -3, -1], "lower"),
    ((8, 18), (5, 13), [4, 3, 5], "higher"),
    ((5, 15), (5, 13), [1, 0, 2], "not significant"),
    ((9, 17), (5, 13), [4] * 3, "not significant"),
    ((1, 9), (3, 11), [-2] * 3, "not significant")])
def test_a_row_is_compared_with_billp_at_the_same_x(own, of_billp, gain, word):
    """Higher or lower only if the interval of the difference has a width and no 0."""
    returns = {("billp", 1): (90, 99), ("billp", 2): of_billp, ("a", 2): own}
    samples = {cell: np.array([[[1, total] for total in totals]], float)
               for cell, totals in returns.items()}
    [row] = run.rows_of("a", 2, samples, "scores")
    assert (row.gain, run.comparison(row.gain)) == (gain, word)
    [row] = run.rows_of("billp", 2, samples, "scores")
    assert row.gain is None


def test_shares_of_popularity_by_hand():
    """Of ten items, 7 is liked least, then 8, 9, 0, 1 and so on up to 6."""
    ratings = [(item + 3) % 10 + 1 for item in range(10)]
    env = hand_world(titles=tuple("abcdefghij"), rate=envs.table([ratings]))
    sessions = [run.Session(items, 0.0) for items in ([7, 8, 6], [], [4])]
    shares = run.shares(env, sessions)
    assert shares == [[2, 0, 0, 0, 1], [0] * 5, [0, 0, 0, 1, 0]]
    assert run.share_of(np.array(shares)).tolist() == [0.5, 0, 0, 0.25, 0.25]


def test_errors_of_the_critic_by_hand():
    """Every return is 4 + 0.5 * 5 = 6.5 and V = 8: the bias is 1.5, its square 2.25."""
    llm = scripted(REPLIES | {"critic": ["Value: 8"]})
    errors = run.critic_errors(settings_of(""), run.Place(hand_world(), [0], [0, 0]), llm,
                               prompts.hashed_ngrams, map, agents=2, draws=3)
    assert errors == [[0, 0, 0, 1.5, 0, 2.25]] * 2          # of two users
    # a figure is the mean over two seeds of two states
    samples = np.array([errors, [[1, 2, 3, .5, 0, .25], [1, 2, 3, .5, 0, 1.25]]])
    one_return, critic = run.rows_of("billp", 50, {("billp", 50): samples}, "errors")
    assert [row.series for row in (one_return, critic)] == ["one return", "critic"]
    means = [figure[0] for row in (one_return, critic) for figure in row.figures.values()]
    assert means == [.5, 1, 1.5, 1, 0, 1.5]
    # 0.5 ** 9 is about 0.002, the weight of the tenth reward; the next is below a thousandth
    steps = [run.shortened(FILMS, gamma).max_steps for gamma in (0.0, 0.5, 1.0)]
    assert steps == [1, 10, FILMS.max_steps]


@pytest.mark.parametrize("workers, has_faults", [(1, False), (8, True)])
def test_a_run_over_http_is_the_offline_run_and_replays(workers, has_faults, finished, tmp_path):
    """Also if every 30th request meets a fault."""
    turns = count()

    def act(body):
        return (503, "busy") if has_faults and next(turns) % 30 == 0 else None
    with endpoint(act) as server:
        flags = flags_of(server.url, tmp_path, "--workers", workers)
        out = succeed(*flags)
    assert files(tmp_path) == files(finished)
    assert answers_in(tmp_path) == len(set(server.asked))
    assert f"answers   0 from the log, {answers_in(tmp_path)} new" in out
    assert (len(server.asked) > answers_in(tmp_path)) == has_faults
    assert read(tmp_path / "summary.json")["endpoint"]["system_fingerprint"] == "fp_1"
    for name in ("config.json", "episodes.jsonl", "memory.json", "summary.json"):
        (tmp_path / name).unlink()
    code, out, err = command(*flags, "--replay")        # a log alone
    assert code == 0 and "from the log, 0 new" in out and ", 0 new answers" in err
    assert files(tmp_path) == files(finished)
    out = succeed("--show", tmp_path, "--prompts", "--pick", "learn:2")
    steps = episodes_in(tmp_path)[5]["steps"]           # after 3 episodes before learning
    assert out.count("==== actor") == len(steps)
    for step in steps:
        assert f"---- reply\nNext category: {step['thought']}\n" in out
        assert f"---- reply\nFree item: {step['said']}\n" in out
    log = (tmp_path / "calls.jsonl").read_bytes().splitlines(True)
    (tmp_path / "calls.jsonl").write_bytes(b"".join(log[:-1]))
    assert "--replay" in refuse(*flags, "--replay")
    assert "its log lacks" in refuse("--show", tmp_path, "--prompts", "--pick", "after")
    refusals = iter([(400, "against our terms")])
    with endpoint(lambda body: next(refusals, None)) as server:
        succeed(*flags_of(server.url, tmp_path))        # a refused prompt must not end the run
    (tmp_path / "calls.jsonl").unlink()                 # the results alone
    assert "no log to replay" in refuse(*flags, "--replay")


def test_embeddings_over_http_are_recorded(tmp_path):
    """The user's own fields go where the seed goes, to the chat route. The headers go to both."""
    bodies = []
    more = ("--embed-model", "e", "--extra-body", '{"top_p": 0.9}', "--header", "X-Team=a=b")
    with endpoint(bodies.append) as server:
        flags = flags_of(server.url, tmp_path / "a", *more)
        succeed(*flags)
    before = files(tmp_path / "a")
    succeed(*flags, "--replay")
    assert files(tmp_path / "a") == before
    assert {"seed" in body for body in bodies} == {True, False}
    assert all(("top_p" in body) == ("seed" in body) for body in bodies)
    assert {headers["X-Team"] for headers in server.headers} == {"a=b"}


def test_rows_that_ask_the_model_are_played_first(tmp_path):
    model = ("--base-url", "http://127.0.0.1:9", "--model", "m", "--max-calls", 0)
    code, _, err = command(*model, "--experiment", "table3", "--rows", "bandit,billp",
                           "--seeds", 1, "--users", 2, "--out", tmp_path)
    assert code == 3 and "1 of 2 runs" not in err


def test_a_spent_budget_exits_with_3_and_can_go_on(finished, tmp_path):
    with endpoint() as server:
        for budget in (0, 9, 20):
            start = len(server.asked)
            code, _, err = command(*flags_of(server.url, tmp_path, "--max-calls", budget))
            assert code == 3 and "--max-calls" in err.splitlines()[-1]
            assert len(server.asked) == start + budget
        assert "(seed)" in refuse(*flags_of(server.url, tmp_path, "--seed", 1))     # a log counts
        succeed(*flags_of(server.url, tmp_path))
    assert files(tmp_path) == files(finished)
    assert len(server.asked) == len(set(server.asked))


def test_a_failure_among_many_threads_is_one_line(finished, tmp_path):
    """The second user's session fails. The line names its fault, not that others were stopped."""
    history = "\n- ".join(episodes_in(finished)[1]["history"])

    def act(body):
        if history in body["messages"][0]["content"]:
            return 401, SECRET
        time.sleep(0.2)
    with endpoint(act) as server:
        flags = (*SMALL, "--workers", 2, "--out", tmp_path)
        code, _, err = command(*flags, OPENAI_API_KEY=SECRET, OPENAI_MODEL="m",
                               OPENAI_BASE_URL=server.url, OPENAI_API_BASE="http://127.0.0.1:9")
    *_, line = err.splitlines()
    assert code == 2 and line.startswith(f"run.py: {server.url}") and "OPENAI_API_KEY" in line
    assert f"endpoint  requests: {len(server.asked)}\n" in err and SECRET not in err
    assert len(server.asked) < 5                # no other call begins; a session has 2 or more


@pytest.mark.parametrize("name, code", [("SIGKILL", -9), ("SIGINT", 130)])
def test_a_run_that_is_ended_loses_nothing_and_resumes(name, code, finished, tmp_path):
    """No answer in the log is asked for again. Ctrl-C waits for none that is on its way."""
    turns = count()
    with endpoint(lambda body: time.sleep(5) if next(turns) >= 9 else None) as server:
        argv = [sys.executable, run.__file__, *flags_of(server.url, tmp_path, "--workers", 4)]
        child = subprocess.Popen(list(map(str, argv)), stdout=subprocess.DEVNULL,
                                 stderr=subprocess.PIPE, text=True)
        deadline = time.monotonic() + 20
        while len(server.asked) <= 10 or answers_in(tmp_path) < 9:
            assert time.monotonic() < deadline
            time.sleep(0.001)
        began = time.monotonic()
        child.send_signal(getattr(signal, name))
        _, err = child.communicate()
        assert child.returncode == code and time.monotonic() - began < 4     # an answer takes 5
        assert name == "SIGKILL" or err.splitlines()[-1].startswith("run.py: interrupted")
        answered, start = answers_in(tmp_path), len(server.asked)
        server.act = lambda body: None
        succeed(*flags_of(server.url, tmp_path))
    assert files(tmp_path) == files(finished)
    asked_later = set(server.asked[start:])
    assert answered == 9 and len(asked_later) == answers_in(tmp_path) - answered


def test_ctrl_c_during_the_imports_leaves_no_traceback(tmp_path):
    """The first library that is imported sends the signal."""
    lay(tmp_path, {"numpy.py": "import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n"})
    variables = os.environ | {"PYTHONPATH": str(tmp_path)}
    child = subprocess.run([sys.executable, run.__file__], env=variables, capture_output=True)
    assert (child.returncode, child.stdout, child.stderr) == (130, b"", b"")


def test_models_are_compared_each_with_a_log_of_its_own(tmp_path):
    with endpoint() as server:
        flags = ("--experiment", "table6", "--models", "m/1,n,offline", "--seeds", 1, *SMALL,
                 "--base-url", server.url, "--out", tmp_path)
        succeed(*flags)
    table6 = read(tmp_path / "table6.json")
    out = succeed(*flags, "--replay")
    assert read(tmp_path / "table6.json") == table6
    answers = answers_in(tmp_path / "m%2F1") + answers_in(tmp_path / "n")
    assert f"answers   {answers} from the log, 0 new" in out       # the stand-in has none
    first, second, offline = table6["rows"]
    assert [first["x"], second["x"], offline["x"]] == ["m/1", "n", "offline"]
    assert first["figures"] == second["figures"] == offline["figures"]
