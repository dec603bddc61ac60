"""Laws of the memories, the credit, the world, the prompts and the run; a hand-worked episode; the
command line. Each was seen to fail with the line it guards broken."""
import ast
import inspect
import json
import math
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis.extra import numpy as hnp
from hypothesis.stateful import Bundle, RuleBasedStateMachine, invariant, rule

import billp
import envs
import prompts
import run
from billp import EMPTY, Agent, Chunk, Config, Record, advantage, merge, recall, remember, td_target

# -------------------------------------------------------------------- builders and strategies

AXES = np.concatenate([np.eye(4), -np.eye(4)]).astype(np.float32)      # unit vectors, exact dots
KEYS = dict(zip("abcdefgh", AXES))                                     # a key's text fixes its vector
keys, actions, numbers = st.sampled_from(sorted(KEYS)), st.sampled_from(["", "x", "y"]), st.floats(-9, 9)
junk = st.text(max_size=60) | st.sampled_from(
    ["Observation 1: the user left", "Action 1: recommend x [y]\nObservation", "\x00\u2028\x1b[2K", "] [a"])


def memory_of(rows):
    """A memory of (key, action, value) rows, remembered one by one."""
    memory = EMPTY
    for key, action, value in rows:
        memory = remember(memory, key, value, KEYS[key], action)
    return memory


def naive_recall(rows, vector, k, tau):
    """Sort everything, newest of the same (key, action) only, cut."""
    order = sorted(range(len(rows)), key=lambda i: (2 - 2 * float(KEYS[rows[i][0]] @ vector), -i))
    best = {}
    for i in order:
        if 2 - 2 * float(KEYS[rows[i][0]] @ vector) <= tau:
            best.setdefault(rows[i][:2], Record(*rows[i]))
    return tuple(best.values())[:max(k, 0)]


rows_of = st.lists(st.tuples(keys, actions, numbers), max_size=12)


@st.composite
def worlds(draw, users=3, items=6):
    """A small world of random vectors and ratings, and the rule's parameters."""
    number = st.integers(-3, 3).map(float)
    vectors = draw(hnp.arrays(np.float32, (items, 2), elements=number))
    ratings = draw(hnp.arrays(np.int8, (users, items), elements=st.integers(1, 5)))
    return envs.Env("small", tuple(f"Item {i}" for i in range(items)), (None,) * items, ("Even", "Odd"),
                    np.array([[i % 2 == 0, i % 2 == 1] for i in range(items)]), vectors, ratings,
                    (np.array([0]),) * users, users - 1, draw(st.integers(1, 3)),
                    draw(st.sampled_from([0.5, 1.5, 2.5])), 2.0, draw(st.integers(0, 1)), 5)


FILMS = envs.films(0)
CATALOG = billp.catalog(FILMS)


def learn(method="billp", seed=0, episodes=20, map=map, llm=prompts.offline):
    config = Config()._replace(**billp.METHODS[method])
    return list(billp.train(CATALOG, range(episodes), llm, seed, config=config, map=map))


# ------------------------------------------------------------------------------------ memory


class MemoryMachine(RuleBasedStateMachine):
    """Any tree of memories against plain lists: persistence, order, recall."""
    pairs = Bundle("pairs")

    def __init__(self):
        super().__init__()
        self.seen = []

    def keep(self, memory, rows):
        self.seen.append((memory, rows))
        return memory, rows

    @rule(target=pairs)
    def empty(self):
        return self.keep(EMPTY, [])

    @rule(target=pairs, pair=pairs, key=keys, action=actions, value=numbers)
    def remember(self, pair, key, action, value):
        return self.keep(remember(pair[0], key, value, KEYS[key], action), pair[1] + [(key, action, value)])

    @rule(target=pairs, a=pairs, b=pairs)
    def merge(self, a, b):
        return self.keep(merge(a[0], b[0]), a[1] + b[1])

    @rule(pair=pairs, query=keys | st.none(), k=st.integers(-1, 9), tau=st.sampled_from([-1, 0, 2, np.inf]))
    def recall(self, pair, query, k, tau):
        vector = KEYS[query] if query else np.zeros(4, np.float32)
        assert recall(pair[0], vector, k, tau) == naive_recall(pair[1], vector, k, tau)

    @invariant()
    def nothing_old_has_changed(self):
        for memory, rows in self.seen:
            assert list(billp.records(memory)) == rows
            assert all(np.array_equal(c.vectors, [KEYS[r.key] for r in c.records]) for c in memory)


TestMemory = MemoryMachine.TestCase
TestMemory.settings = settings(max_examples=60, stateful_step_count=25, deadline=None)


@given(rows_of, rows_of, rows_of, keys, st.integers(0, 5))
def test_merge_is_associative_with_empty_as_unit_and_recalls_the_best_of_both(a, b, c, query, k):
    x, y, z = map(memory_of, (a, b, c))
    assert billp.records(merge(merge(x, y), z)) == billp.records(merge(x, merge(y, z)))
    assert billp.records(merge(EMPTY, x)) == billp.records(merge(x, EMPTY)) == billp.records(x)
    whole = naive_recall(a + b, KEYS[query], k, np.inf)
    assert recall(merge(x, y), KEYS[query], k) == whole
    one = (Chunk(billp.records(x), np.stack([KEYS[r[0]] for r in a])),) if a else EMPTY
    assert recall(merge(one, y), KEYS[query], k) == whole           # chunking is invisible


@given(st.integers(0, 300))
def test_chunks_at_least_halve_so_that_there_are_few(n):
    sizes = [len(chunk.records) for chunk in memory_of([("a", "", 0.0)] * n)]
    assert all(big >= 2 * small for big, small in zip(sizes, sizes[1:])) and sum(sizes) == n


# ------------------------------------------------------------------------------------ credit

rewards, gammas = st.floats(0, 5), st.floats(0, 1)


@given(rewards, gammas, numbers, numbers, numbers, st.booleans())
def test_advantage_is_target_minus_value_and_shifts_with_the_baseline(r, g, v, v2, c, left):
    a = advantage(r, g, v, v2, left)
    assert a == td_target(r, g, v2, left) - v
    assert math.isclose(advantage(r, g, v + c, v2, left), a - c, abs_tol=1e-9)
    assert advantage(r, 0.0, v, v2, left) == r - v
    assert td_target(r, g, v2, True) == r and td_target(r, g, v2, False) == r + g * v2


@given(st.lists(st.tuples(rewards, numbers), min_size=1, max_size=8), gammas, numbers, st.booleans())
def test_discounted_advantages_telescope_to_return_minus_first_value(steps, g, last, left):
    rs, values = [r for r, _ in steps], [v for _, v in steps] + [last]
    ends = [left and n == len(rs) - 1 for n in range(len(rs))]
    total = sum(g ** n * advantage(r, g, values[n], values[n + 1], ends[n]) for n, r in enumerate(rs))
    tail = 0 if left else g ** len(rs) * last
    assert math.isclose(total, billp.discounted_return(rs, g) + tail - values[0], abs_tol=1e-6)


# ------------------------------------------------------------------------------------- world


@given(worlds(), st.lists(st.integers(0, 5), min_size=1, max_size=6), st.data())
def test_users_stepped_at_once_fare_as_each_alone_and_by_the_rule(env, items, data):
    users = np.array(data.draw(st.lists(st.integers(0, 2), min_size=1, max_size=4)))
    many = envs.reset(env, users)
    alone = [envs.reset(env, int(u)) for u in users]
    for t, item in enumerate(items):
        before = [np.array(x) for x in many]
        after, reward, left, cut = envs.step(env, many, np.full(len(users), item))
        assert all(map(np.array_equal, before, many))                   # inputs unchanged
        for b, user in enumerate(users):
            alone[b], r, gone, end = envs.step(env, alone[b], item)
            assert (r, gone, end) == (reward[b], left[b], cut[b])
            assert all(np.array_equal(x[b], y) for x, y in zip(after, alone[b]))
            assert (alone[b].recent >= 0).sum() == min(t + 1, env.window)
            near = any(np.linalg.norm(env.vectors[item] - env.vectors[past]) < env.beta
                       for past in items[max(0, t - env.window):t])
            assert gone == (near or (env.ratings[user, item] < env.floor and t >= env.grace))
            assert r == (0 if gone else env.ratings[user, item])
            assert end == (not gone and t + 1 >= env.max_steps)
        many = after


@given(worlds(), st.permutations(range(3)), st.permutations(range(6)), st.integers(0, 2),
       st.lists(st.integers(0, 5), min_size=1, max_size=5))
def test_renaming_users_and_items_renames_results(env, users, items, user, path):
    users, items = np.array(users), np.array(items)
    renamed = env._replace(vectors=env.vectors[items], ratings=env.ratings[users][:, items])
    a, b = envs.reset(env, int(users[user])), envs.reset(renamed, user)
    for item in path:
        a, *seen = envs.step(env, a, int(items[item]))
        b, *same = envs.step(renamed, b, item)
        assert seen == same


def test_films_are_real_and_planning_matters_in_their_world():
    assert len(FILMS.titles) == 200 == len(set(FILMS.titles)) and FILMS.belongs.any(1).all()
    assert 3.8 < FILMS.ratings.mean() < 4.2 and set(np.unique(FILMS.ratings)) == {1, 2, 3, 4, 5}
    users, lengths = np.arange(500, 700), {}
    for name, policy in envs.POLICIES.items():
        played = envs.rollout(FILMS, users, policy, np.random.default_rng(0))
        lengths[name] = (played.items >= 0).sum(1)
        for row in played.items:                                        # nothing twice
            assert len(set(row[row >= 0])) == (row >= 0).sum()
    assert 1 <= lengths["random"].mean() <= 3 and lengths["greedy"].mean() < 5
    assert (lengths["oracle"] == FILMS.max_steps).mean() > 0.95


def test_metrics_by_hand():
    before, after = envs.scores([1, 3], [4, 10]), envs.scores([2, 4], [10, 20])
    got, gain = envs.metrics(after), envs.metrics(after, before)
    assert [got[m][0] for m in envs.METRICS] == [3, 5, 15]
    assert got["Len"] == [3, 2, 4] and got["R_traj"] == [15, 10, 20]    # all resamples of two users
    assert gain["Len"] == [1, 1, 1] and gain["R_traj"] == [8, 6, 10]    # the same users on both sides
    assert envs.metrics(envs.scores([0], [0]))["R_each"] == [0, 0, 0]


# ----------------------------------------------------------------------------------- prompts


@given(junk)
def test_parsers_are_total(text):
    for parser, kind in ((prompts.parse_planner, str), (prompts.parse_actor, str),
                         (prompts.parse_critic, float), (prompts.parse_reflector, str)):
        value = parser(text)
        assert isinstance(value, (kind, prompts.Malformed))
        assert kind is float or isinstance(value, prompts.Malformed) or value == prompts.clean(value, 600) != ""


said = junk.map(prompts.clean).map(lambda t: t.strip("*#>_- \"'“”[]:")).filter(
    lambda t: t and not re.match(r"(?i)(action|observation|thought|value|reflection|recommend|i |would )", t))


@given(said, st.integers(1, 50), st.floats(0, 10))
def test_parse_inverts_what_a_well_behaved_model_writes(text, n, value):
    assert prompts.parse_planner(f"Thought {n}: {text}\nAction {n}: recommend x") == text
    assert prompts.parse_actor(f"Action {n}: recommend {text}\nObservation {n}: rated 5 of 5") == text
    assert prompts.parse_reflector(f"**Reflection**: {text}") == text
    assert math.isclose(prompts.parse_critic(f"Value: {value:.3f}"), value, abs_tol=1e-3)


@given(junk, junk, junk, st.integers(1, 9))
def test_no_title_or_thought_forges_a_line(title, thought, category, n):
    line = prompts.item_line(title, 1999, [category])
    assert line.isprintable() and line.count("[") == line.count("]") == 1
    turn = prompts.turn(n, thought, line, 5, False, False).splitlines()
    heads = [f"Thought {n}: "] * bool(prompts.clean(thought)) + [f"Action {n}: ", f"Observation {n}: "]
    assert [t.startswith(h) for t, h in zip(turn, heads)] == [True] * len(turn) == [True] * len(heads)


def test_every_prompt_extends_the_one_before_it():
    seen = {}

    def watch(ask):
        stem = ask.messages[1][1].rpartition("\nLessons from")[0]
        if ask.role == "planner" and ask.key[1] == "learn":
            assert stem.startswith(seen.get(ask.key[2], stem[:20]))
            seen[ask.key[2]] = stem
        return prompts.offline(ask)
    learn(llm=watch)
    assert len(seen) == 20


@given(junk, junk)
def test_embeddings_are_unit_rows_one_text_at_a_time_or_many(a, b):
    rows = prompts.hashed_ngrams([a, b])
    assert np.allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-5) and rows.dtype == np.float32
    assert np.array_equal(rows[1], prompts.hashed_ngrams([b])[0])


@given(junk | st.sampled_from(FILMS.titles), st.sets(st.integers(0, 199), max_size=199))
def test_grounding_never_returns_what_is_excluded(text, exclude):
    item, exact = billp.ground(text, CATALOG, exclude)
    assert item not in exclude
    assert not exact or prompts.fold(FILMS.titles[item]) in prompts.fold(text)


@pytest.mark.parametrize("text, title", [
    ("The Matrix", "The Matrix"), ("the matrix (1999)", "The Matrix"), ("amelie", "Amélie"),
    ("AMÉLIE (2001) [Comedy, Romance]", "Amélie"), ("2001: A Space Odyssey", "2001: A Space Odyssey")])
def test_grounding_by_title_ignores_case_accents_and_year(text, title):
    item, exact = billp.ground(text, CATALOG)
    assert exact and FILMS.titles[item] == title


# ----------------------------------------------------------------------- roles and learning


def test_roles_that_only_read_return_the_very_same_memory():
    agent, trajectories = learn()[-1]
    state = trajectories[0].steps[-1].state
    for role, memory in ((billp.planner, agent.planner), (billp.critic, agent.critic)):
        assert role(state, memory, prompts.offline)[1] is memory
    assert billp.actor(state, agent.actor, prompts.offline, CATALOG)[1] is agent.actor
    reflection, after = billp.reflector(trajectories[0], agent.planner, prompts.offline)
    assert billp.records(after)[:-1] == billp.records(agent.planner)
    assert billp.records(after)[-1].value == reflection.value


ASKED = {"act": {"actor"}, "react": {"planner", "actor"}, "reflexion": {"planner", "actor", "reflector"},
         "billp-no-micro": {"planner", "actor", "reflector"}, "billp-no-macro": {"planner", "actor", "critic"},
         "billp-no-critic": {"planner", "actor", "reflector"},
         "billp": {"planner", "actor", "critic", "reflector"}}


@pytest.mark.parametrize("method", billp.METHODS)
def test_a_method_asks_its_roles_and_no_other_and_the_critic_only_while_learning(method):
    asks = []
    agent, _ = learn(method, llm=lambda ask: asks.append(ask) or prompts.offline(ask))[-1]
    assert {ask.role for ask in asks} == ASKED[method]
    micro, macro = "critic" in ASKED[method] or method == "billp-no-critic", "reflector" in ASKED[method]
    assert [bool(m) for m in agent] == [macro, micro, "critic" in ASKED[method]]
    asks.clear()
    config = Config()._replace(**billp.METHODS[method])
    billp.evaluate(CATALOG, [500], agent, lambda ask: asks.append(ask) or prompts.offline(ask), 0, "after", config)
    assert {ask.role for ask in asks} == ASKED[method] - {"critic", "reflector"}


def test_the_sign_of_the_advantage_is_what_the_actor_remembers():
    for _, trajectories in learn(episodes=30):
        for t in trajectories:
            kept = [r.value for r in billp.records(t.lesson.gained.actor)]
            assert kept == [int(a >= 0) for a in t.lesson.advantages]
            values, targets = t.lesson.values, [r.value for r in billp.records(t.lesson.gained.critic)]
            assert np.allclose(np.array(targets) - values[:-1], t.lesson.advantages)
            assert values[-1] == 0 or not t.terminated


def test_any_map_gives_the_same_run_and_an_ask_is_named_once():
    asks = []
    with ThreadPoolExecutor(8) as pool:
        threaded = learn(map=pool.map, llm=lambda ask: asks.append((ask.role, ask.key)) or prompts.offline(ask))
    plain = learn(map=lambda f, *xs: [f(*x) for x in zip(*xs)])
    assert [[t._replace(last=0, steps=0, lesson=0) for t in ts] for _, ts in threaded] \
        == [[t._replace(last=0, steps=0, lesson=0) for t in ts] for _, ts in plain]
    assert [billp.records(m) for m in threaded[-1][0]] == [billp.records(m) for m in plain[-1][0]]
    assert len(asks) == len(set(asks))


@given(st.tuples(st.integers(), st.text(), st.integers(), st.integers(), st.integers()))
@settings(max_examples=20)
def test_the_offline_reader_gets_what_an_endpoint_gets_text_and_seed(key):
    asks = []
    learn(episodes=10, llm=lambda ask: asks.append(ask) or prompts.offline(ask))
    for ask in asks[::40]:
        cold = ask._replace(temperature=0.0)
        assert prompts.offline(cold._replace(key=key)) == prompts.offline(cold)


def test_malformed_replies_are_asked_again_then_fall_back_and_are_counted():
    flaky = prompts.scripted({"planner": ["", "Thought: go on"], "actor": ["\n", "Thought: hm", ""]})
    trajectory = billp.episode(CATALOG, 0, (0, "learn", 0), Agent(), flaky)
    first = trajectory.steps[0]
    assert first.plan.value == "go on" and first.plan.malformed == 1 and not first.plan.fallback
    assert first.act.malformed == 3 and first.act.fallback


def hand_world():
    """Four items on a line, one user who hates the last; near is closer than 1, W = 2."""
    return envs.Env("hand", ("Ant", "Bee", "Bat", "Cow"), (None, 1990, 1991, None), ("Bug", "Beast"),
                    np.array([[1, 0], [1, 0], [0, 1], [0, 1]], bool),
                    np.array([[0.0], [5.0], [5.5], [9.0]], np.float32), np.array([[4, 5, 3, 1]]),
                    (np.array([3]),), 1, window=2, beta=1.0)


def test_an_episode_worked_by_hand():
    """Ant earns 4, Bee 5, then Bat lies 0.5 from Bee: the user leaves and Bat earns 0."""
    llm = prompts.scripted({
        "planner": ["Thought: bugs", "Thought: bugs still", "Thought: a beast"],
        "actor": ["Action: recommend Ant", "Action: recommend Bee (1990)", "Action: recommend bat"],
        "critic": ["Value: 6", "Value: 5", "Value: 2"], "reflector": ["Reflection: Bat is like Bee."]})
    catalog = billp.catalog(hand_world())
    (agent, (t,)), = billp.train(catalog, [0], llm)
    assert [s.line for s in t.steps] == ["Ant [Bug]", "Bee (1990) [Bug]", "Bat (1991) [Beast]"]
    assert [s.reward for s in t.steps] == [4, 5, 0] and t.terminated and billp.score(t) == (2, 9)
    assert t.lesson.values == (6, 5, 2, 0)
    # A = 4 + .5*5 - 6, 5 + .5*2 - 5, 0 - 2; targets 4 + .5*5, 5 + .5*2, 0
    assert t.lesson.advantages == (0.5, 1.0, -2.0)
    assert [r.value for r in billp.records(agent.critic)] == [6.5, 6.0, 0.0]
    assert [(r.action, r.value) for r in billp.records(agent.actor)] == [
        ("Ant [Bug]", 1), ("Bee (1990) [Bug]", 1), ("Bat (1991) [Beast]", 0)]
    assert billp.records(agent.planner) == (Record("Cow [Beast]", "", "Bat is like Bee."),)
    assert billp.records(agent.critic)[2].key == "Cow [Beast]\nAnt [Bug]\nBee (1990) [Bug]"
    assert t.last.session == (
        "Thought 1: bugs\nAction 1: recommend Ant [Bug]\nObservation 1: rated 4 of 5\n"
        "Thought 2: bugs still\nAction 2: recommend Bee (1990) [Bug]\nObservation 2: rated 5 of 5\n"
        "Thought 3: a beast\nAction 3: recommend Bat (1991) [Beast]\nObservation 3: the user left\n")
    assert envs.why_left(catalog.env, 0, [0, 1, 2]) == "too like Bee, 1 back"


def test_running_out_of_steps_bootstraps_and_leaving_does_not():
    env = hand_world()._replace(max_steps=2)
    llm = prompts.scripted({"planner": ["Thought: t"], "actor": ["Ant", "Bee"], "reflector": ["r"],
                            "critic": ["6", "5", "2"]})
    (_, (t,)), = billp.train(billp.catalog(env), [0], llm)
    assert not t.terminated and t.lesson.values == (6, 5, 2) and t.lesson.advantages == (0.5, 1.0)
    assert billp.score(t) == (2, 9) and t.last.session.endswith("(last step)\n")


def test_golden_run():
    agent, trajectories = learn(episodes=20)[-1]
    assert [billp.score(t) for t in trajectories] == GOLDEN
    assert billp.records(agent.planner)[-1].value == GOLDEN_REFLECTION


GOLDEN = [(4, 18), (10, 46), (4, 20), (4, 18), (10, 45), (4, 17), (6, 26), (6, 28), (4, 17), (6, 30)]
GOLDEN_REFLECTION = (
    "The user left because Frankenstein (1931) came 5 steps after The Sixth Sense (1999), its like. "
    "Keep like items 6 steps apart for those who like Drama, Musical, Romance.")

# ------------------------------------------------------------------------------------ purity

IMPURE = {"print", "open", "input", "exec", "eval", "globals", "setattr", "delattr"}
EFFECTS = re.compile(r"^(os|sys|time|random|datetime|threading|subprocess|socket|Path)\.|^np\.random\.(?!"
                     r"default_rng|SeedSequence|Generator)|\.(environ|write_text|read_text|urandom)$")


@pytest.mark.parametrize("module", ["envs", "billp", "prompts"])
def test_the_pure_modules_are_pure(module):
    source = Path(inspect.getsourcefile(globals()[module])).read_text("utf-8")
    tree = ast.parse(re.split(r"(?m)^# -+ the outside world", source)[0])
    for function in (n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)):
        arguments = function.args.posonlyargs + function.args.args + function.args.kwonlyargs
        names = {a.arg for a in arguments}
        defaults = function.args.defaults + [d for d in function.args.kw_defaults if d]
        assert not any(isinstance(d, (ast.List, ast.Dict, ast.Set, ast.Call)) for d in defaults), function.name
        for node in ast.walk(function):
            assert not isinstance(node, (ast.Global, ast.Nonlocal, ast.Delete)), function.name
            if isinstance(node, (ast.Attribute, ast.Subscript)) and not isinstance(node.ctx, ast.Load):
                base = node.value
                while isinstance(base, (ast.Attribute, ast.Subscript)):
                    base = base.value
                assert not (isinstance(base, ast.Name) and base.id in names), (function.name, ast.unparse(node))
                assert not isinstance(node, ast.Attribute), (function.name, ast.unparse(node))
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                assert called not in IMPURE and not EFFECTS.search(called), (function.name, called)


# ------------------------------------------------------------------------------ command line


def cli(capsys, *argv):
    code = run.main([str(a) for a in argv])
    out, err = capsys.readouterr()
    return code, out, err


FILES = ("episodes.jsonl", "memory.json")


def result(path):
    summary = json.loads((path / "summary.json").read_text("utf-8"))
    return [(path / f).read_bytes() for f in FILES], {**summary, "seconds": 0}


def test_the_same_bytes_for_any_worker_count_and_a_second_run(tmp_path, capsys):
    small = ("--episodes", 20, "--users", 10)
    for name, workers in (("a", 1), ("b", 8), ("a", 1)):
        code, out, err = cli(capsys, *small, "--workers", workers, "--out", tmp_path / name)
        assert code == 0 and "no evidence about real models" in out and "learning" in err
    assert result(tmp_path / "a") == result(tmp_path / "b")
    summary = result(tmp_path / "a")[1]
    assert set(summary) >= {"world", "method", "model", "seed", "episodes", "users", "config", "learning",
                            "before", "after", "difference", "reflections", "malformed", "fallbacks",
                            "ungrounded", "calls", "seconds"}
    assert summary["reflections"] == 20 and summary["calls"]["reflector"]["calls"] == 20
    code, out, _ = cli(capsys, "--show", tmp_path / "a")
    assert code == 0 and all(w in out for w in ("liked before", "recalled", "thought", "encouraged", "said",
                                               "reward", "the user left", "advantage", "reflection"))
    assert cli(capsys, "--show", tmp_path / "a", "--pick", "before:3")[0] == 0


def test_a_loaded_memory_is_the_agent_that_was_saved(tmp_path, capsys):
    cold = ("--users", 5, "--temperature", 0)               # else before and after draw differently
    assert cli(capsys, *cold, "--episodes", 10, "--out", tmp_path / "a")[0] == 0
    assert cli(capsys, *cold, "--episodes", 0, "--load", tmp_path / "a" / "memory.json",
               "--out", tmp_path / "b")[0] == 0
    (_, memory), first = result(tmp_path / "a")
    (_, loaded), second = result(tmp_path / "b")
    assert memory == loaded and first["after"] == second["before"] == second["after"]


@pytest.mark.parametrize("method", [*envs.POLICIES, "act", "react", "reflexion"])
def test_every_method_runs(method, tmp_path, capsys):
    assert cli(capsys, "--method", method, "--episodes", 10, "--users", 5, "--out", tmp_path / "r")[0] == 0


@pytest.mark.parametrize("argv, words", [
    (("--world", "mars"), "mars"), (("--method", "magic"), "billp-no-macro"), (("--episodes", -1), "--episodes"),
    (("--episodes", 501), "500 learning users"), (("--users", 501), "500 held-out"), (("--gamma", "nan"), "gamma"),
    (("--users", 0), "--users"), (("--workers", 0), "--workers"), (("--load", "nowhere.json"), "nowhere.json"),
    (("--load", "foreign.json"), "foreign.json"), (("--load", "binary.json"), "UTF-8"),
    (("--show", "nowhere"), "nowhere"), (("--out", "foreign.json"), "foreign.json"), (("--out", "full"), "full")])
def test_bad_input_gets_one_clear_line_and_changes_nothing(argv, words, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("foreign.json").write_text('{"billp": 1, "planner": [[1]]}')
    Path("binary.json").write_bytes(b"\xff\xfe\x00")
    Path("full").mkdir()
    Path("full/thesis.txt").write_text("years of work")
    code, out, err = cli(capsys, *argv)
    assert code == 2 and out == "" and words in err and err.count("\n") == 1
    assert sorted(str(p) for p in Path().rglob("*")) == ["binary.json", "foreign.json", "full", "full/thesis.txt"]


def test_a_run_directory_is_never_overwritten_by_another_run(tmp_path, capsys):
    small = ("--episodes", 10, "--users", 5, "--out", tmp_path)
    assert cli(capsys, *small)[0] == 0
    held = result(tmp_path)
    code, _, err = cli(capsys, *small, "--seed", 1, "--gamma", 0.9)
    assert code == 2 and "seed, gamma" in err and result(tmp_path) == held
