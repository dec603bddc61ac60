"""BiLLP: a language model that learns to recommend for the long run without training a weight.

After "Large Language Models are Learnable Planners for Long-Term Recommendation" (SIGIR 2024, arXiv
2403.00843). Four roles share one model; all that is learned lies in three memories.

    state s_n      history and session as text, e.g. 10 liked films, then 3 recommended ones
    thought t_n    the planner's line, "a comedy next, nothing like the last three films"
    action a_n     a catalogue item; reward r_n its rating, 0 when the user leaves
    V(s), A(s, a)  the critic's value; the advantage r + gamma V(s') - V(s)
    v_n            what the actor remembers of an action: 1 encouraged if A >= 0, else 0 discouraged
    M_P, M_A, M_C  planner, actor and critic memories (an `Agent`); M <- M + M' is `merge(M, M')`
    key            (seed, phase, episode, step), plain ints and str: names every draw, so that a run repeats

All functions are pure: the model comes in as `llm`, parallelism as `map` (any that takes one
iterable or more, as the built-in one, and keeps the order).
"""
from __future__ import annotations

from functools import partial, reduce
from itertools import chain, islice
from math import fsum
from typing import Any, Callable, Iterator, NamedTuple, Sequence

import numpy as np

import envs
import prompts
from envs import EnvState, advantage, discounted_return, td_target
from prompts import LLM, Ask, Catalog, Malformed, ground

# --------------------------------------------------------------------------------- config


class Config(NamedTuple):
    """Every number and switch of the method, each with its reason; run.py makes them flags."""
    thoughts: bool = True           # the planner is asked for a thought t_n before each action
    lessons: str = "nearest"        # which reflections the planner gets: none, latest or nearest
    experience: bool = True         # M_A and M_C are written and recalled; without, no critic is asked
    baseline: bool = True           # the critic's V(s) counts; without, V = 0: all is encouraged, M_C is idle
    gamma: float = 0.5              # discount of later rewards; the paper's gamma
    k_lessons: int = 2              # reflections recalled; the paper's K
    k_actions: int = 24             # experiences recalled for the actor, enough to choose among
    k_values: int = 8               # values recalled for the critic, enough to average
    tau_actor: float = 1.2          # farthest experience, squared L2: cos >= 0.4 suits n-grams; paper: 0.01
    tau_critic: float = 1.2         # farthest value, squared L2: cos >= 0.4 suits n-grams; paper: 0.1
    titles: int = 10                # items in a state's text, and liked ones in a prompt; as the paper
    batch: int = 10                 # episodes between updates of the memories; as the paper
    transcript: int = 24000         # characters of a session in a prompt, about 6,000 tokens: fits contexts
    temperature: float = 0.5        # of every ask; as the paper
    reply_tokens: int = 256         # longest reply asked for; reasoning models need thousands
    retries: int = 2                # times a malformed reply is asked for again
    repeats: bool = False           # whether items liked before or shown already may be recommended


DEFAULT = Config()

METHODS: dict[str, dict[str, Any]] = {          # each method is a row of switches over the same roles
    "act": dict(thoughts=False, lessons="none", experience=False),
    "react": dict(lessons="none", experience=False),
    "reflexion": dict(lessons="latest", experience=False),
    "billp": dict(),
    "billp-no-macro": dict(lessons="none"),
    "billp-no-micro": dict(experience=False),
    "billp-no-critic": dict(baseline=False),
}

# --------------------------------------------------------------------------------- memory


class Record(NamedTuple):
    """One thing remembered."""
    key: str                        # the text it is found by
    action: str                     # what was done there; "" where the key alone identifies
    value: Any                      # a reflection, v_n or a TD target


class Chunk(NamedTuple):
    """Records that lie together, oldest first, and the vectors they are found by."""
    records: tuple[Record, ...]
    vectors: np.ndarray             # float [n, d], unit rows, row i embeds records[i].key


# A memory is a tuple of chunks, oldest first, each at least twice as long as the next: the
# logarithmic method of Bentley and Saxe. Appending copies O(log n) records on average, and every
# older memory stays valid because no chunk is ever changed.
Memory = tuple[Chunk, ...]
EMPTY: Memory = ()


def push(memory: Memory, chunk: Chunk) -> Memory:
    """The memory with a chunk of newer records behind it."""
    chunk = chunk._replace(vectors=chunk.vectors.astype(float))     # in single, products vary with processors
    while memory and len(memory[-1].records) < 2 * len(chunk.records):    # each stays twice the next
        last, memory = memory[-1], memory[:-1]
        chunk = Chunk(last.records + chunk.records, np.concatenate([last.vectors, chunk.vectors]))
    return memory + (chunk,)


def merge(memory: Memory, newer: Memory) -> Memory:
    """All records of both, `newer` counting as newer. Associative in its records, EMPTY is its unit."""
    return reduce(push, newer, memory)


def remember(memory: Memory, key: str, value: Any, vector: np.ndarray, action: str = "") -> Memory:
    """The memory and one new record; the old memory is left as it was."""
    return push(memory, Chunk((Record(key, action, value),), np.asarray(vector)[None]))


def records(memory: Memory) -> tuple[Record, ...]:
    """All records, oldest first."""
    return tuple(chain.from_iterable(chunk.records for chunk in memory))


def recall(memory: Memory, vector: np.ndarray, k: int, tau: float = np.inf) -> tuple[Record, ...]:
    """The k records nearest to a unit vector [d], nearest first, none farther than tau.

    Distance is squared L2, 2 - 2 cos between unit vectors, rounded so that equal texts tie. Newest
    first among equals; of records with the same (key, action) only the newest counts. A zero
    vector is equally far from everything and so recalls the newest (lessons = "latest").
    """
    if not memory or k < 1:
        return ()
    distance = (2 - 2 * np.concatenate([np.vecdot(c.vectors, vector) for c in memory])).round(5)
    everything, found = records(memory), {}
    near = np.flatnonzero(distance <= tau)[::-1]                    # newest first, and so among equals:
    for i in near[np.argsort(distance[near], kind="stable")]:       # this sort is stable
        found.setdefault(everything[i][:2], everything[i])          # by (key, action)
        if len(found) == k:
            break
    return tuple(found.values())


# ------------------------------------------------------------------------------------ roles


class State(NamedTuple):
    """All that a role may know of an episode at step n."""
    key: tuple                      # (seed, phase, episode, step), step from 0
    history: tuple[str, ...]        # the last `titles` item lines liked before
    session: str                    # the transcript so far
    text: str                       # the last `titles` item lines: the key of the memories
    vector: np.ndarray              # float32 [d] embeds the text
    taken: tuple[int, ...]          # items liked before or shown in this session
    top: float                      # the largest value there can be: a 5 at every step to the cap, discounted
    thought: str = ""               # t_n, once the planner has spoken: for the actor alone


class Answer(NamedTuple):
    """What a role answers: the value and how it came about."""
    value: Any                      # thought, item, value or reflection
    said: str                       # the same as parsed, before it is grounded or clipped; "" if none
    recalled: tuple = ()            # nearest first: reflections, or (item line, v_n or target) pairs
    malformed: int = 0              # replies that could not be parsed
    fallback: bool = False          # none could
    exact: bool = True              # the actor named a free item of the catalogue


class Agent(NamedTuple):
    """All that is learned."""
    planner: Memory = EMPTY         # M_P: state -> reflection
    actor: Memory = EMPTY           # M_A: state, action -> 1 encouraged or 0 discouraged
    critic: Memory = EMPTY          # M_C: state -> target


NOVICE = Agent()


class Step(NamedTuple):
    """One recommendation: what was known, thought, done and earned."""
    state: State
    plan: Answer
    act: Answer
    line: str                       # the recommended item as the model reads it
    reward: float


class Trajectory(NamedTuple):
    """One episode, from its first step to the state after its last, and what it teaches once studied."""
    user: int
    steps: tuple[Step, ...]         # at least one; the last is the leaving step if terminated
    last: State                     # s_{N+1}
    terminated: bool                # the user left
    values: tuple[float, ...] = ()          # V(s_1) .. V(s_{N+1}), the last 0 if the user left
    advantages: tuple[float, ...] = ()      # A(s_n, a_n)
    answers: tuple[Answer, ...] = ()        # of critic and reflector
    gained: Agent = NOVICE                  # three small memories to merge


Output = tuple[Answer, Memory]      # of every role; one that only reads gives back the very same memory


def consult(llm: LLM, role: str, state: State, question: str, parse: Callable, config: Config,
            fallback: Any) -> Answer:
    """A role's question about a state, put to the model; the fallback if no reply can be parsed."""
    prompt = prompts.shared(state.history, prompts.bounded(state.session, config.transcript)) + question
    messages = (("system", prompts.SYSTEM), ("user", prompt))
    ask = Ask(role, state.key, messages, config.reply_tokens, config.temperature)
    value, malformed = prompts.insist(llm, ask, parse, config.retries)
    if isinstance(value, Malformed):
        return Answer(fallback, "", (), malformed, True)
    return Answer(value, str(value), (), malformed)


def planner(state: State, memory: Memory, llm: LLM, config: Config = DEFAULT) -> Output:
    """Macro level: the thought t_n, given the state and K reflections. Fallback: no thought."""
    near, nowhere = state.vector, np.zeros_like(state.vector)
    which = {"none": (near, 0), "latest": (nowhere, config.k_lessons), "nearest": (near, config.k_lessons)}
    lessons = tuple(record.value for record in recall(memory, *which[config.lessons]))
    question = prompts.render_planner(state.key[-1] + 1, lessons)
    answer = consult(llm, "planner", state, question, prompts.parse_planner, config, "")
    return answer._replace(recalled=lessons), memory


def actor(state: State, memory: Memory, llm: LLM, catalog: Catalog, config: Config = DEFAULT) -> Output:
    """Micro level: the item a_n, given thought and like experience. Fallback: nearest to thought or state."""
    found = recall(memory, state.vector, config.k_actions if config.experience else 0, config.tau_actor)
    tried = tuple((record.action, record.value) for record in found)
    question = prompts.render_actor(state.key[-1] + 1, state.thought, state.history, tried, config.repeats)
    answer = consult(llm, "actor", state, question, prompts.parse_actor, config, state.thought or state.text)
    listed = catalog._replace(names={}) if answer.fallback else catalog        # a fallback names no title
    item, exact = ground(answer.value, listed, () if config.repeats else state.taken)
    return answer._replace(value=item, recalled=tried, exact=exact), memory


def critic(state: State, memory: Memory, llm: LLM, config: Config = DEFAULT) -> Output:
    """Micro level: V(s_n) in [0, state.top], given targets of states like it. Fallback: their mean, or 0."""
    found = recall(memory, state.vector, config.k_values, config.tau_critic)
    values = tuple((record.key.rpartition("\n")[2], record.value) for record in found)
    question = prompts.render_critic(values, config.gamma, state.top)
    fallback = fsum(value for _, value in values) / max(len(values), 1)     # the same on every Python
    answer = consult(llm, "critic", state, question, prompts.parse_critic, config, fallback)
    return answer._replace(value=min(max(answer.value, 0.0), state.top), recalled=values), memory


def reflector(trajectory: Trajectory, memory: Memory, llm: LLM, config: Config = DEFAULT) -> Output:
    """Macro level: a principle drawn from an episode, kept under its first state. Fallback: nothing is kept."""
    question, first = prompts.render_reflector(), trajectory.steps[0].state
    answer = consult(llm, "reflector", trajectory.last, question, prompts.parse_reflector, config, "")
    return answer, memory if answer.fallback else remember(memory, first.text, answer.value, first.vector)


# ---------------------------------------------------------------------------------- episode


def score(trajectory: Trajectory) -> tuple[int, float]:
    """Len and return of an episode; the leaving step counts in neither."""
    return len(trajectory.steps) - trajectory.terminated, fsum(step.reward for step in trajectory.steps)


def opening(catalog: Catalog, user: int, key: tuple, config: Config = DEFAULT) -> State:
    """The state before the first step of a session; key is (seed, phase, episode)."""
    items = catalog.env.histories[user].tolist()
    history = tuple(catalog.lines[i] for i in items[-config.titles:])
    text = "\n".join(history)
    top = discounted_return([5.0] * catalog.env.max_steps, config.gamma)
    return State(key + (0,), history, "", text, catalog.embed([text])[0], tuple(items), top)


def advance(state: State, catalog: Catalog, step: Step, left: bool, cut: bool, config: Config) -> State:
    """The state after one more step: the transcript grown by one turn, nothing rewritten."""
    n = state.key[-1] + 1
    text = "\n".join([*state.text.splitlines(), step.line][-config.titles:])
    return state._replace(
        key=state.key[:-1] + (n,), text=text, vector=catalog.embed([text])[0],
        session=state.session + prompts.turn(n, step.plan.value, step.line, step.reward, left, cut),
        taken=state.taken + (step.act.value,))


def play(catalog: Catalog, world: EnvState, state: State, agent: Agent, llm: LLM, config: Config) -> Trajectory:
    """Think, act, observe from this state on, until the user leaves or the cap is reached."""
    steps, left, cut = (), False, False
    while not (left or cut):
        plan = planner(state, agent.planner, llm, config)[0] if config.thoughts else Answer("", "")
        act, _ = actor(state._replace(thought=plan.value), agent.actor, llm, catalog, config)
        world, reward, *ends = envs.step(catalog.env, world, act.value)
        left, cut = map(bool, ends)
        steps += (Step(state, plan, act, catalog.lines[act.value], float(reward)),)
        state = advance(state, catalog, steps[-1], left, cut, config)
    return Trajectory(int(world.user), steps, state, left)


def episode(catalog: Catalog, user: int, key: tuple, agent: Agent, llm: LLM,
            config: Config = DEFAULT) -> Trajectory:
    """One session with one user. The agent is read, never changed; key = (seed, phase, episode)."""
    return play(catalog, envs.reset(catalog.env, user), opening(catalog, user, key, config), agent, llm, config)


# --------------------------------------------------------------------------------- learning


def conclude(trajectory: Trajectory, values: list[Output], drawn: list[Output], config: Config) -> Trajectory:
    """The episode with what it teaches: `values` are the critic's outputs, `drawn` the reflector's, or []."""
    steps, n = trajectory.steps, len(trajectory.steps)
    v = np.array([answer.value for answer, _ in values] + [0.0] * (n + 1 - len(values)))      # 0 if not asked
    rewards = np.array([step.reward for step in steps])
    ended = np.array([False] * (n - 1) + [trajectory.terminated])
    targets = td_target(rewards, config.gamma, v[1:], ended).tolist()
    advantages = advantage(rewards, config.gamma, v[:-1], v[1:], ended).tolist()
    vectors = np.stack([step.state.vector for step in steps])
    tried = Chunk(tuple(Record(s.state.text, s.line, int(a >= 0)) for s, a in zip(steps, advantages)), vectors)
    valued = Chunk(tuple(Record(s.state.text, "", target) for s, target in zip(steps, targets)), vectors)
    gained = Agent(drawn[0][1] if drawn else EMPTY, (tried,) if config.experience else EMPTY,
                   (valued,) if values else EMPTY)
    return trajectory._replace(values=tuple(v.tolist()), advantages=tuple(advantages),
                               answers=tuple(answer for answer, _ in values + drawn), gained=gained)


def study(trajectories: Sequence[Trajectory], agent: Agent, llm: LLM, config: Config = DEFAULT,
          map: Callable = map) -> tuple[Trajectory, ...]:
    """The batch with what it teaches, all asked at once; the state after a leaving is worth 0, unasked."""
    states = [[step.state for step in t.steps] + ([] if t.terminated else [t.last]) for t in trajectories]
    values = iter(map(partial(critic, memory=agent.critic, llm=llm, config=config),
                      chain(*states) if config.experience and config.baseline else ()))
    drawn = iter(map(partial(reflector, memory=EMPTY, llm=llm, config=config),
                     trajectories if config.lessons != "none" else ()))
    return tuple(conclude(t, list(islice(values, len(own))), list(islice(drawn, 1)), config)
                 for t, own in zip(trajectories, states))


def absorb(agent: Agent, trajectory: Trajectory) -> Agent:
    """M <- M + M' for each of the three memories, with what an episode teaches."""
    return Agent(*map(merge, agent, trajectory.gained))


def evaluate(catalog: Catalog, users: Sequence[int], agent: Agent, llm: LLM, seed: int, phase: str,
             config: Config = DEFAULT, map: Callable = map, first: int = 0) -> tuple[Trajectory, ...]:
    """One episode a user, the agent frozen; (seed, phase, first + i) names the draws of users[i]."""
    one = partial(episode, catalog, agent=agent, llm=llm, config=config)
    return tuple(map(one, users, [(seed, phase, first + i) for i in range(len(users))]))


def train(catalog: Catalog, users: Sequence[int], llm: LLM, seed: int = 0, agent: Agent = NOVICE,
          config: Config = DEFAULT, map: Callable = map, first: int = 0) -> Iterator[tuple[Agent, tuple]]:
    """The paper's algorithm, a left fold: yields (agent, trajectories) by batch; `first` episodes are past."""
    for start in range(0, len(users), config.batch):
        batch = users[start:start + config.batch]
        played = evaluate(catalog, batch, agent, llm, seed, "learn", config, map, first + start)
        studied = study(played, agent, llm, config, map)
        agent = reduce(absorb, studied, agent)
        yield agent, studied
