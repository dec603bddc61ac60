"""BiLLP: how a language model learns to recommend for the long run. No weight is trained.

After "Large Language Models are Learnable Planners for Long-Term Recommendation" (SIGIR 2024,
arXiv 2403.00843). Four roles share one model. All that is learned lies in three memories.

    state s_n      history and session as text, for example 7 liked films and 3 recommended ones
    thought t_n    the planner's line, "Comedy, because the last films were dramas"
    action a_n     an item of the catalogue; its reward r_n is the rating, or 0 if the user leaves
    V(s), A(s, a)  the critic's value of a state; the advantage r + gamma V(s') - V(s)
    verdict v_n    what the actor remembers of an action: 1 encouraged if A >= 0, else 0 discouraged
    reflection     what the reflector writes after an episode; a recalled reflection is a lesson
    M_P, M_A, M_C  the memories of planner, actor and critic (an `Agent`)
    episode        one session with one user
    free           neither liked before nor recommended in this session (with `repeats` all items)
    category tool  tells which categories were shown in the last `lately` steps, and which others
                   were liked before (prompts.category_tool)
    item line      an item as the model reads it, "Alien [Horror, Sci-Fi]"; to ground a reply is to
                   find the item that it names, or else one near to it
    evidence       how often an item was encouraged in similar states, and how often discouraged
    ask            one question to the model (prompts.Ask); its key (prompts.Key) tells where in the
                   run it is asked, and seeds the draw of the answer
    malformed      a reply that a parser cannot use; after the last retry a role gives its fallback

A record (s_n, a_n, encouraged) makes a_n more likely to be listed and chosen in similar states
(`prompts.chance`). A policy-gradient step has the same aim. But it changes weights, and in
proportion to A; a record keeps only the sign of A.
We add two things. The actor chooses from a list of free items; with `candidates=0` only remembered
items are listed, and any may be named. The planner is told which categories were shown lately. The
README lists all differences from the paper.

All functions are pure, apart from the model and an embedding that asks an endpoint. The model is
the argument `llm`. The embedding is part of the catalogue.
Parallelism is the argument `pmap`: any function that works like the built-in `map` and keeps the
order.
Credit and memory need numpy and the standard library alone. They can be copied into another project
as one block.
"""
from __future__ import annotations

from collections import Counter
from functools import partial, reduce
from math import fsum
from statistics import fmean
from typing import Any, Callable, Iterable, Iterator, NamedTuple, Sequence

import numpy as np

import envs
import prompts
from prompts import LLM, Ask, Candidate, Catalog, Evidence, Key, Malformed

# --------------------------------------------------------------------------------- config


class Config(NamedTuple):
    """The numbers and switches of the method. run.py makes them flags."""
    thoughts: bool = True           # the planner is asked for a thought t_n before each action
    # the reflections that the planner reads: none, latest or nearest; with none, or without
    # thoughts, the reflector is not asked
    lessons: str = "nearest"
    experience: bool = True         # M_A is written and recalled; M_C, too, if `baseline` is on
    # an action is judged by the critic's V; without it V is 0, so A >= 0 and all are encouraged
    baseline: bool = True
    gamma: float = 0.5              # discount of later rewards; the paper's gamma
    k_lessons: int = 2              # reflections recalled; the paper's K
    # nearest records of M_A that are counted by item; films has 200 items, so about five for each
    k_experience: int = 1000
    k_actions: int = 10             # remembered items shown if candidates is 0
    k_values: int = 8               # values recalled for the critic, enough to average
    # Free items to choose from. With ten a 1.5B model names a free item in 97 % of its actions.
    # 0: only remembered items are listed, and any may be named.
    candidates: int = 10
    # Weight of an item's whole line when items are ranked, see `prompts.closest`; its categories
    # alone have the weight 1 - line_weight. At 1 the letters of titles would often outweigh the
    # evidence. At 0 titles would not count. README compares 0, 0.5 and 1.
    line_weight: float = 0.5
    # how many steps the category tool looks back, at least 1; as in the released code
    lately: int = 4
    # A thought is malformed if it names a category shown lately and none of the other liked ones,
    # as long as there are others. A small model has such thoughts at 4 % of the steps, and many
    # users leave there.
    fresh_thoughts: bool = True
    # items in a state's text and in a prompt's history, at least 1; as in the paper
    titles: int = 10
    batch: int = 10                 # episodes between two updates of the memories; as in the paper
    transcript: int = 24000         # characters of a session in a prompt: about 6,000 tokens
    temperature: float = 0.5        # of every ask; as in the paper
    # longest reply asked for: enough for a chatty one; models that reason need thousands
    reply_tokens: int = 256
    # How often a malformed reply is asked for again; with -1 the model is not asked at all. Of 70
    # malformed first replies of a 1.5B model the first retry mended 54, the second two more.
    retries: int = 2
    repeats: bool = False           # whether an item may come twice or come from the history


DEFAULT = Config()

# each method is a row of switches over the same roles
METHODS = {
    "act": {"thoughts": False, "lessons": "none", "experience": False},
    "react": {"lessons": "none", "experience": False},
    "reflexion": {"lessons": "latest", "experience": False},
    "billp": {},
    "billp-no-macro": {"lessons": "none"},
    "billp-no-micro": {"experience": False},
    "billp-no-critic": {"baseline": False},
    # Nothing is asked: each role gives its fallback. The planner takes the first category that its
    # question would offer, the actor the first item that its list would hold. M_A and M_C are
    # written, M_P is not. A useful model beats this.
    "billp-no-model": {"retries": -1},
}

# --------------------------------------------------------------------------------- credit


def td_target(reward: float, gamma: float, next_value: float, terminated: bool) -> float:
    """What a state turned out to be worth: r_n + gamma V(s_{n+1}); V is 0 if the user left.

    >>> td_target(4.0, 0.5, 6.0, False), td_target(0.0, 0.5, 6.0, True)
    (7.0, 0.0)
    """
    return reward + gamma * next_value * (1 - terminated)


def advantage(reward: float, gamma: float, value: float, next_value: float,
              terminated: bool) -> float:
    """A(s_n, a_n) = r_n + gamma V(s_{n+1}) - V(s_n): how much better than the critic expected.

    >>> advantage(4.0, 0.5, 5.0, 6.0, False)
    2.0
    """
    return td_target(reward, gamma, next_value, terminated) - value


def discounted_return(rewards: Sequence[float], gamma: float) -> float:
    """The sum over n of gamma^n r_n, n from 0.

    >>> discounted_return([4, 4, 4], 0.5)
    7.0
    """
    total = 0.0
    for reward in reversed(rewards):
        total = reward + gamma * total
    return total


# --------------------------------------------------------------------------------- memory


class Record(NamedTuple):
    """One thing remembered."""
    text: str                       # the text by which it is found: a state
    # an item line: in M_A that of the recommended item; in M_C that of the state's last item, which
    # stands for the state in the critic's prompt; in M_P ""
    item: str
    content: Any                    # a reflection, a verdict or a TD target


class Chunk(NamedTuple):
    """A block of records, oldest first, with the vectors by which they are found."""
    records: tuple[Record, ...]
    vectors: np.ndarray             # [n, d], unit rows; row i embeds records[i].text


# A memory is a tuple of chunks, oldest first. Each chunk is at least twice as long as the next.
# So a new record causes little copying on average. Nothing is changed in place: the memory before
# a new record remains valid.
Memory = tuple[Chunk, ...]
EMPTY: Memory = ()


def push(memory: Memory, chunk: Chunk) -> Memory:
    """The memory with a chunk of newer records at its end.

    After 1, 2, 3, 4, 5 single records the chunks have the lengths (1), (2), (2, 1), (4), (4, 1).
    The fourth record joins twice: 1 and 1 make 2, then 2 and 2 make 4.
    """
    # In float64 the digits in which processors differ are so small that `recall` rounds them away.
    last = Chunk(chunk.records, chunk.vectors.astype(float))
    while memory:
        before = memory[-1]
        if len(before.records) >= 2 * len(last.records):
            break
        last = Chunk(before.records + last.records, np.concatenate([before.vectors, last.vectors]))
        memory = memory[:-1]
    return memory + (last,)


def merge(memory: Memory, newer: Memory) -> Memory:
    """The memory with all records of a newer one at its end."""
    return reduce(push, newer, memory)


def remember(memory: Memory, text: str, content: Any, vector: np.ndarray, item: str = "") -> Memory:
    """The memory with one new record. `vector` [d] is the text's embedding, of length 1."""
    return push(memory, Chunk((Record(text, item, content),), np.asarray(vector)[None]))


def records(memory: Memory) -> tuple[Record, ...]:
    """All records, oldest first."""
    return sum((chunk.records for chunk in memory), ())


def recall(memory: Memory, vector: np.ndarray, k: int, tau: float = np.inf) -> tuple[Record, ...]:
    """The k records nearest to a unit vector [d], nearest first, none farther than tau.

    The distance is squared L2, which is 2 - 2 cos between unit vectors. It is rounded, so that
    every processor gives the same order. Among equals the newest comes first. Of records with the
    same text and item only the newest counts: a later verdict, target or reflection replaces the
    earlier one. The paper uses a tau; the roles below do not.
    """
    if not memory:
        return ()
    cosines = np.concatenate([np.vecdot(chunk.vectors, vector) for chunk in memory])
    distances = (2 - 2 * cosines).round(5)
    oldest_first = records(memory)
    # A newer record counts as nearer, by less than 10^-6. Distances that are not equal differ by
    # 10^-5 or more, so this decides between equals only. A stable sort would be slower.
    newness = 1e-6 * np.arange(len(distances)) / len(distances)
    found = {}                          # (text, item) -> record
    for i in np.argsort(distances - newness):
        if distances[i] > tau or len(found) >= k:
            break
        record = oldest_first[i]
        # Records with the same text have the same distance, so the newest of them came first.
        found.setdefault((record.text, record.item), record)
    return tuple(found.values())


# ---------------------------------------------------------------------------------- roles


class State(NamedTuple):
    """All that a role may know of an episode at step n."""
    key: Key                        # key.step counts from 0
    history: tuple[str, ...]        # lines of the last `titles` items liked before
    shown: tuple[str, ...]          # lines of the items recommended in this session
    rewards: tuple[float, ...]      # what they earned
    tastes: prompts.Tastes          # what the category tool reports
    turns: tuple[str, ...]          # the transcript: the lines of each step of this session
    text: str                       # the last `titles` lines, liked or shown, to search memories by
    vector: np.ndarray              # float32 [d], the embedding of the text
    # items that cannot be recommended: liked before or shown in this session; with `repeats` none
    taken: tuple[int, ...]
    top: float                      # the largest discounted return; the critic's V is at most this
    thought: str = ""               # t_n, once the planner has spoken; for the actor alone


class Answer(NamedTuple):
    """What a role answers, and how it came to the answer."""
    result: Any                     # thought, item, V(s) or reflection
    said: str                       # what was parsed, before grounding or clipping; "" if nothing
    recalled: tuple = ()            # reflections, candidates, or pairs (item line, target)
    malformed: int = 0              # replies that could not be parsed
    fallback: bool = False          # no usable reply came, or none was asked for
    exact: bool = True              # false if the actor named no free item of the catalogue


class Agent(NamedTuple):
    """All that is learned."""
    planner: Memory = EMPTY         # M_P: state -> reflection
    actor: Memory = EMPTY           # M_A: state, item -> verdict
    critic: Memory = EMPTY          # M_C: state -> TD target


NOVICE = Agent()


class Step(NamedTuple):
    """One recommendation."""
    state: State
    plan: Answer
    act: Answer
    line: str                       # the recommended item as the model reads it
    reward: float
    turn: str                       # the lines that it adds to the transcript


class Trajectory(NamedTuple):
    """One episode, and what it teaches once it has been studied."""
    user: int
    steps: tuple[Step, ...]         # at least one; the last is the leaving step if terminated
    last: State                     # s_{N+1}, the state after the last step
    terminated: bool                # the user left
    # V(s_1) .. V(s_{N+1}); the last is 0 if the user left, and all are 0 without the critic.
    # Without `experience` there are no values and no advantages.
    values: tuple[float, ...] = ()
    advantages: tuple[float, ...] = ()      # A(s_1, a_1) .. A(s_N, a_N)
    answers: tuple[Answer, ...] = ()        # of critic and reflector
    gained: Agent = NOVICE                  # what this episode adds to the three memories


# What every role returns, so that all roles have one form. The reflector adds to M_P. The others
# return the very same memory: what M_A and M_C gain is known after the episode, see `study`.
Output = tuple[Answer, Memory]


def consult(llm: LLM, role: str, state: State, question: str, parse: Callable, config: Config,
            fallback: Any) -> Answer:
    """Put a role's question to the model.

    After a malformed reply the model is told what was wrong and asked again, at most
    `config.retries` times. Then the answer is the fallback. With -1 the model is not asked.
    """
    # A long transcript loses its oldest turns.
    transcript = prompts.bounded(state.turns, config.transcript)
    # History and session come first, the same for all roles, then the question of this role.
    prompt = prompts.shared(state.history, transcript) + question
    messages = (("system", prompts.SYSTEM), ("user", prompt))
    for attempt in range(config.retries + 1):
        key = state.key._replace(attempt=attempt)
        reply = llm(Ask(role, key, messages, config.reply_tokens, config.temperature))
        text = reply.text or ""         # a client's content may be None
        parsed = parse(text)
        if not isinstance(parsed, Malformed):
            return Answer(parsed, str(parsed), malformed=attempt)
        messages += prompts.complaint(text, parsed)
    return Answer(fallback, "", malformed=config.retries + 1, fallback=True)


def are_alike(a: str, b: str) -> bool:
    """Whether two texts share more than 4/5 of their combined words, for example 9 of 11.

    Small models write one lesson several times with a few words changed.
    """
    words_a, words_b = set(a.split()), set(b.split())
    return 5 * len(words_a & words_b) > 4 * len(words_a | words_b)


def distinct(lessons: Iterable[str], k: int) -> tuple[str, ...]:
    """Up to k lessons in their order. A lesson like one already chosen is skipped."""
    chosen = []
    for lesson in lessons:
        if len(chosen) < k and not any(are_alike(lesson, earlier) for earlier in chosen):
            chosen.append(lesson)
    return tuple(chosen)


def planner(state: State, memory: Memory, llm: LLM, config: Config = DEFAULT) -> Output:
    """Macro level: the thought t_n, given the state, K reflections and the category tool.

    Fallback: the first category that the question offers; it is the most liked one not shown
    lately. If none is offered, the fallback is "".
    """
    recalled = ()
    if config.lessons == "nearest":
        # more than k, because `distinct` drops near-duplicates
        recalled = recall(memory, state.vector, 4 * config.k_lessons)
    if config.lessons == "latest":
        recalled = records(memory)[::-1]
    lessons = distinct((record.content for record in recalled), config.k_lessons)
    tastes = state.tastes
    question = prompts.render_planner(lessons, tastes, config.lately)
    fallback = tastes.other[0] if tastes.other else ""
    # without tastes the parser takes any thought
    parse = partial(prompts.parse_planner, tastes=tastes if config.fresh_thoughts else None)
    answer = consult(llm, "planner", state, question, parse, config, fallback)
    return answer._replace(recalled=lessons), memory


def ranked_lines(state: State, evidence: Evidence, catalog: Catalog, config: Config) -> list[str]:
    """The lines of items, the most promising first; `shortlist` drops those that are not free.

    An item's bonus is the chance that it is encouraged minus the average chance, see
    `prompts.chance`. With `candidates` 0 only items with evidence come, ranked by the bonus.
    Otherwise all items come, ranked by nearness plus bonus: near to what the thought asks for, and
    to the liked categories not shown lately, see `prompts.query`.
    """
    average = prompts.average_chance(evidence)
    # The keys of `evidence` are pairs (item line, verdict), those of the nearest records first.
    tried = dict.fromkeys(line for line, _ in evidence)
    bonus = {line: prompts.chance(line, evidence, average) - average for line in tried}
    if not config.candidates:
        in_catalog = set(catalog.lines)             # a loaded memory may come from another world
        known = [line for line in tried if line in in_catalog]
        return sorted(known, key=bonus.get, reverse=True)       # equals stay nearest first
    # "[War]", what the thought asks for, and "[Comedy, Drama]", liked and not shown lately
    texts = prompts.query(state.thought, catalog.env.categories, state.tastes)
    items = prompts.closest(texts, catalog, bonus, config.line_weight)
    return [catalog.lines[item] for item in items]


def shortlist(state: State, memory: Memory, catalog: Catalog,
              config: Config) -> tuple[Candidate, ...]:
    """The free items that the actor is shown, with the evidence for them.

    They are the first of `ranked_lines`. Among these, items without a category shown lately come
    first: a small model tends to take the first item, and would too often repeat a category.
    """
    evidence = Counter()        # (item line, verdict) -> how often it was given in similar states
    if config.experience:
        recalled = recall(memory, state.vector, config.k_experience)
        evidence = Counter((record.item, record.content) for record in recalled)
    # Two items may have the same line, and the model could not tell them apart. So each line comes
    # once. Lines of taken items are left out.
    taken_lines = {catalog.lines[item] for item in state.taken}
    lines = dict.fromkeys(ranked_lines(state, evidence, catalog, config))
    free_lines = [line for line in lines if line not in taken_lines]
    chosen = free_lines[:config.candidates or config.k_actions]
    recent = set(state.tastes.recent)
    # False comes before True, and a sort keeps the order of equals
    chosen.sort(key=lambda line: bool(recent.intersection(prompts.line_tags(line))))
    return tuple(Candidate(line, evidence[line, 1], evidence[line, 0]) for line in chosen)


def actor(state: State, memory: Memory, llm: LLM, catalog: Catalog,
          config: Config = DEFAULT) -> Output:
    """Micro level: the item a_n, given the thought, free items and the evidence for them.

    The item is the free one that the reply names. If the reply names none, it is the nearest listed
    one, or with `candidates` 0 the nearest of all free ones; `prompts.ground` tells what is near.
    Fallback: the first listed item; if none is listed, the free item nearest to the state.
    """
    listed = shortlist(state, memory, catalog, config)
    form = prompts.ACTOR if config.candidates else prompts.OPEN_ACTOR
    question = prompts.render_actor(state.key.step + 1, state.thought, listed, form)
    answer = consult(llm, "actor", state, question, prompts.parse_actor, config, "")
    if not answer.fallback:
        # with `candidates` 0 the actor may choose any free item, so `ground` prefers none
        listed_lines = {candidate.line for candidate in listed} if config.candidates else ()
        item, exact = prompts.ground(answer.result, catalog, state.taken, listed_lines)
    elif listed:
        item, exact = catalog.lines.index(listed[0].line), False
    else:
        item, exact = prompts.free_by_nearness(state.text, catalog, state.taken)[0], False
    return answer._replace(result=item, recalled=listed, exact=exact), memory


def critic(state: State, memory: Memory, llm: LLM, config: Config = DEFAULT) -> Output:
    """Micro level: V(s_n) in [0, state.top], given TD targets of similar states.

    Fallback: the mean of the targets, or else the value if the user goes on as before.
    """
    recalled = recall(memory, state.vector, config.k_values)
    targets = tuple((record.item, record.content) for record in recalled)
    # A session of equal rewards r is worth r / 5 of `top`. Before the first step r counts as 3.
    mean_reward = fmean(state.rewards or [3.0])
    as_before = state.top * mean_reward / 5
    expected = fmean([target for _, target in targets] or [as_before])
    question = prompts.render_critic(targets, expected, as_before)
    answer = consult(llm, "critic", state, question, prompts.parse_critic, config, expected)
    value = min(max(answer.result, 0.0), state.top)
    return answer._replace(result=value, recalled=targets), memory


def reflector(trajectory: Trajectory, memory: Memory, llm: LLM, config: Config = DEFAULT) -> Output:
    """Macro level: a reflection on a finished episode.

    It is kept under the episode's first state, so that later sessions of similar users find it.
    Fallback: nothing is kept.
    """
    last = trajectory.last
    question = prompts.render_reflector(last.shown[-1], last.tastes, trajectory.terminated)
    answer = consult(llm, "reflector", last, question, prompts.parse_reflector, config, "")
    if answer.fallback:
        return answer, memory
    first = trajectory.steps[0].state
    return answer, remember(memory, first.text, answer.result, first.vector)


# -------------------------------------------------------------------------------- episode


def score(trajectory: Trajectory) -> tuple[int, float]:
    """Length and undiscounted return of an episode. The leaving step counts in neither."""
    length = len(trajectory.steps) - trajectory.terminated
    return length, fsum(step.reward for step in trajectory.steps)


def state_after(catalog: Catalog, user: int, key: Key, config: Config = DEFAULT,
                steps: Sequence[Step] = ()) -> State:
    """The state after these steps of a session; without steps, before the first one.

    A step adds one turn to the transcript and leaves the earlier ones as they are. So a prompt
    begins like the one before it, and endpoints can reuse what they have read.
    """
    liked = [int(item) for item in catalog.env.histories[user]]
    history = tuple(catalog.lines[item] for item in liked[-config.titles:])
    shown = tuple(step.line for step in steps)
    text = "\n".join((history + shown)[-config.titles:])
    taken = liked + [step.act.result for step in steps]
    return State(
        key=key._replace(step=len(steps)),
        history=history,
        shown=shown,
        rewards=tuple(step.reward for step in steps),
        tastes=prompts.category_tool(history, shown, config.lately),
        turns=tuple(step.turn for step in steps),
        text=text,
        vector=catalog.embed([text])[0],
        taken=() if config.repeats else tuple(taken),
        top=discounted_return([5.0] * catalog.env.max_steps, config.gamma))


def episode(catalog: Catalog, user: int, key: Key, agent: Agent, llm: LLM,
            config: Config = DEFAULT) -> Trajectory:
    """One session with one user: think, act and observe until it ends.

    The agent is read and never changed.
    """
    env_state = envs.reset(catalog.env, user)
    state = state_after(catalog, user, key, config)
    steps = []
    left = cut = False
    while not (left or cut):
        plan = Answer("", "")
        if config.thoughts:
            plan, _ = planner(state, agent.planner, llm, config)
        state = state._replace(thought=plan.result)
        act, _ = actor(state, agent.actor, llm, catalog, config)
        env_state, reward, left, cut = envs.step(catalog.env, env_state, act.result)
        line = catalog.lines[act.result]
        # The transcript notes a reply that named no free item. For a fallback `said` is "".
        unavailable = "" if act.exact else act.said
        turn = prompts.turn(len(steps) + 1, plan.result, line, reward, left, unavailable)
        steps.append(Step(state, plan, act, line, float(reward), turn))
        state = state_after(catalog, user, key, config, steps)
    return Trajectory(user, tuple(steps), state, bool(left))


# ------------------------------------------------------------------------------- learning


def study(trajectory: Trajectory, agent: Agent, llm: LLM, config: Config = DEFAULT) -> Trajectory:
    """The episode with what it teaches: three small memories, not yet merged into the agent's."""
    steps = trajectory.steps
    answers, values, advantages = (), [], []
    m_p, m_a, m_c = EMPTY, EMPTY, EMPTY             # what this episode adds to the three memories
    if config.experience:
        states = [step.state for step in steps] + [trajectory.last]
        values = [0.0] * len(states)                # V(s_1) .. V(s_{N+1}) without the critic
        if config.baseline:
            # if the user left, the last state has no future: its value is 0 and nothing is asked
            with_future = states[:-1] if trajectory.terminated else states
            answers = tuple(critic(state, agent.critic, llm, config)[0] for state in with_future)
            values[:len(answers)] = [answer.result for answer in answers]
        for step, value, next_value in zip(steps, values, values[1:]):
            state = step.state
            left = trajectory.terminated and step is steps[-1]      # users leave at the last step
            adv = advantage(step.reward, config.gamma, value, next_value, left)
            advantages.append(adv)
            m_a = remember(m_a, state.text, int(adv >= 0), state.vector, item=step.line)
            if config.baseline:
                target = td_target(step.reward, config.gamma, next_value, left)
                last_line = state.text.rpartition("\n")[2]      # of the last item liked or shown
                m_c = remember(m_c, state.text, target, state.vector, item=last_line)
    if config.thoughts and config.lessons != "none":
        reflection, m_p = reflector(trajectory, m_p, llm, config)
        answers += (reflection,)
    return trajectory._replace(values=tuple(values), advantages=tuple(advantages), answers=answers,
                               gained=Agent(m_p, m_a, m_c))


def session(catalog: Catalog, user: int, key: Key, agent: Agent, llm: LLM,
            config: Config = DEFAULT) -> Trajectory:
    """Play an episode, then study it. Both read the same frozen agent."""
    played = episode(catalog, user, key, agent, llm, config)
    return study(played, agent, llm, config)


def absorb(agent: Agent, trajectory: Trajectory) -> Agent:
    """M <- M + M' for each of the three memories, with what an episode teaches."""
    return Agent(*map(merge, agent, trajectory.gained))


def play_all(play: Callable, users: Sequence[int], keys: Sequence[Key],
             pmap: Callable) -> tuple[Trajectory, ...]:
    """The trajectory of each user, in order. ValueError if some are missing."""
    trajectories = tuple(pmap(play, users, keys))
    is_complete = len(trajectories) == len(users)
    envs.demand(is_complete, "sessions are missing: did the model raise StopIteration, which ends "
                             "a map, or did `pmap` lose them?")
    return trajectories


def evaluate(catalog: Catalog, users: Sequence[int], agent: Agent, llm: LLM, seed: int, phase: str,
             config: Config = DEFAULT, pmap: Callable = map) -> tuple[Trajectory, ...]:
    """One episode with each user while the agent stays as it is.

    (seed, phase, i) determines the draws of users[i].
    """
    # int, because the text of a key is hashed: np.int64(0) would give other draws
    keys = [Key(int(seed), phase, i) for i in range(len(users))]
    play = partial(episode, catalog, agent=agent, llm=llm, config=config)
    return play_all(play, users, keys, pmap)


def train(catalog: Catalog, users: Sequence[int], llm: LLM, seed: int = 0, agent: Agent = NOVICE,
          config: Config = DEFAULT, pmap: Callable = map,
          first: int = 0) -> Iterator[tuple[Agent, tuple]]:
    """Learn from users in batches: yields (agent, trajectories) after each batch.

    This is the paper's algorithm, except for what the README lists. Each batch plays with the agent
    that the batch before it produced.
    `first` is the number of episodes learned before, so that learning can go on where it stopped.
    """
    for start in range(0, len(users), config.batch):
        batch = users[start:start + config.batch]
        keys = [Key(int(seed), "learn", first + start + i) for i in range(len(batch))]
        play = partial(session, catalog, agent=agent, llm=llm, config=config)
        trajectories = play_all(play, batch, keys, pmap)
        agent = reduce(absorb, trajectories, agent)
        yield agent, trajectories
