"""The world: users, items, and the rule by which a user leaves. No language model here.

An `Env` is a frozen record: the parameters of a simulator. `reset` and `step` are pure. They take
one user, or B users at once: policies that see numbers need millions of steps.

    n, m, c, d   numbers of users, items and categories, and the size of an item's vector
    user, item   indices into the world's arrays; item -1 is an empty place
    window, W    how many recommended items a user remembers
    too alike    nearer than `beta` to one of the last W recommended items
    left, cut    the user left; the step cap was reached. Never both
    Len, R_each, R_traj   steps an episode, reward a step, reward an episode (leaving step excluded)
    free         bool [B, m]: the items that a policy may still recommend to each of B users

Left out on purpose: slates, clicks, time. A step recommends one item and returns one rating.
"""
from __future__ import annotations

import ast
import csv
import html
import json
import pickle
import re
from contextlib import contextmanager
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any, Callable, Iterator, NamedTuple, Sequence

import numpy as np

Array = np.ndarray
Rng = np.random.Generator
Location = str | Path                   # of a folder of data files
Function = Callable[..., Array]        # of users and items, see `Env`

# ------------------------------------------------------------- the world and its leaving rule

RULE = ("window", "beta", "floor", "grace", "max_steps")


class Env(NamedTuple):
    """A world of n users, m items and c categories. `check` finds what does not fit together.

    `rate(users, items)` gives ratings from 1 to 5, none missing. `distance(users, a, b)` tells how
    far apart users feel the items a and b to be. Both take int arrays that broadcast together and
    return an array of that shape. `table` and `euclidean` make such functions.
    """
    name: str
    titles: tuple[str, ...]             # [m], without the year
    years: tuple[int | None, ...]       # [m]
    categories: tuple[str, ...]         # [c]
    belongs: Array                      # bool [m, c]: the categories of each item
    vectors: Array                      # float32 [m, d]: items that feel alike lie near each other
    rate: Function
    distance: Function
    histories: Sequence[Sequence[int]]  # [n]: the items each user liked before, oldest first
    learners: int                       # users below this index learn; the others are held out
    window: int = 4                     # W, recommended items a user compares the next one with
    beta: float = 1.0                   # an item nearer than this to one of them is too alike
    floor: float = 2.0                  # a rating below it disappoints
    grace: int = 0                      # steps at the start at which disappointment is forgiven
    max_steps: int = 50                 # the cap at which an episode is cut
    about: str = ""                     # how the world was made


class EnvState(NamedTuple):
    """The session of one user, or of B users along a leading axis."""
    user: Array                         # int [...]
    recent: Array                       # int [..., W]: the last W recommended items, newest last
    t: Array                            # int [...]: steps taken


def look_up(ratings: Array, users: Array, items: Array) -> Array:
    """The entries of a table [n, m]."""
    return ratings[users, items]


def table(ratings: Array) -> Function:
    """A `rate` that looks ratings up in a table [n, m].

    >>> table(np.array([[1, 2], [3, 4]]))(np.array([0, 1]), 1).tolist()
    [2, 4]
    """
    return partial(look_up, np.asarray(ratings))


def predict(p: Array, q: Array, offset: float, users: Array, items: Array) -> Array:
    """offset + the product of the users' rows of p and the items' rows of q; not rounded."""
    return offset + np.einsum("...k,...k->...", p[users], q[items])


def rounded(p: Array, q: Array, offset: float, users: Array, items: Array) -> Array:
    """What `predict` gives, rounded and clipped to 1..5; `partial(rounded, p, q, offset)` rates."""
    return np.clip(np.rint(predict(p, q, offset, users, items)), 1, 5)


def length_between(vectors: Array, users: Array, a: Array, b: Array) -> Array:
    """The Euclidean distance between the vectors of items a and b, the same for every user."""
    difference = vectors.take(a, 0) - vectors.take(b, 0)
    return np.sqrt(np.einsum("...d,...d->...", difference, difference))


def euclidean(vectors: Array) -> Function:
    """A `distance` between the rows of vectors [m, d].

    >>> float(euclidean([[0, 0], [3, 4]])(0, 0, 1))
    5.0
    """
    return partial(length_between, np.asarray(vectors))


def reset(env: Env, user: Array) -> EnvState:
    """A new session for a user (int) or for B users (int [B])."""
    user = np.asarray(user)
    nothing = np.full(user.shape + (env.window,), -1)
    return EnvState(user, nothing, np.zeros(user.shape, int))


def nearest(env: Env, state: EnvState, item: Array) -> Array:
    """float [...]: how far an item is from the nearest of the last W; infinite if there are none.

    The item broadcasts with the users of the state.
    """
    distance = np.full(np.broadcast_shapes(state.user.shape, item.shape), np.inf)
    for place in range(env.window):
        other = state.recent[..., place]
        apart = np.where(other >= 0, env.distance(state.user, other, item), np.inf)
        distance = np.minimum(distance, apart)
    return distance


def leaves(env: Env, state: EnvState, item: Array, rating: Array) -> Array:
    """bool [...]: whether each user leaves at an item that he or she would give this rating."""
    too_alike = nearest(env, state, item) < env.beta
    disappointed = (rating < env.floor) & (state.t >= env.grace)
    return too_alike | disappointed


def step(env: Env, state: EnvState, item: Array) -> tuple[EnvState, Array, Array, Array]:
    """Recommend an item to each user: (next state, reward, left, cut); item and results are [...].

    The reward is the rating; the leaving step earns 0. A session of `max_steps` steps is cut.
    """
    item = np.asarray(item)
    rating = env.rate(state.user, item)
    left = leaves(env, state, item, rating)
    recent = np.concatenate([state.recent, item[..., None]], -1)[..., 1:]
    after = EnvState(state.user, recent, state.t + 1)
    cut = ~left & (after.t >= env.max_steps)
    return after, np.where(left, 0, rating), left, cut


def why_left(env: Env, user: int, items: Sequence[int]) -> str:
    """In words, which part of the rule ended a session at the last of its items."""
    *earlier, item = items
    newest_first = earlier[::-1][:env.window]
    for back, other in enumerate(newest_first, 1):
        if env.distance(user, other, item) < env.beta:
            return f"too like {env.titles[other]}, {back} back"
    return f"disappointed: would rate it {env.rate(user, item):g}"


def demand(holds: bool, message: str) -> None:
    """Raise a ValueError unless something holds."""
    if not holds:
        raise ValueError(message)


def check(env: Env) -> None:
    """Raise a ValueError of one line if the parts of a world do not fit together.

    It looks at all ratings if there are at most 10^7, otherwise at those of some users.
    """
    n, m, c = len(env.histories), len(env.titles), len(env.categories)
    demand(min(n, m) > 0, f"a world of {n} users (histories) and {m} items (titles)")
    demand(0 <= env.learners <= n, f"learners is {env.learners} for {n} histories")
    demand(len(env.years) == m, f"there are {len(env.years)} years for {m} titles")
    demand(np.shape(env.belongs) == (m, c), f"belongs does not fit {m} titles, {c} categories")
    demand(np.shape(env.vectors)[:-1] == (m,), f"vectors does not fit {m} titles")
    for user, history in enumerate(env.histories):
        for item in history:
            fits = isinstance(item, (int, np.integer)) and 0 <= item < m
            demand(fits, f"user {user} has {item!r} in the history, which is not from 0..{m - 1}")
    users, items = np.random.default_rng(0).permutation(n)[:1 + 10 ** 7 // m], np.arange(m)
    try:
        ratings = env.rate(users[:, None], items)
        env.distance(0, items, 0)
    except IndexError as error:
        raise ValueError(f"rate or distance does not fit {n} users, {m} items: {error}") from None
    demand(np.shape(ratings) == (len(users), m), "rate does not return the shape of its arguments")
    wrong = ratings[~((ratings >= 1) & (ratings <= 5))]         # also what is not a number
    demand(len(wrong) == 0, f"ratings that are not between 1 and 5: {wrong[:9]}")


# ------------------------------------------------------- policies without a language model

# env, B sessions, free [B, m], rng -> items [B]
Policy = Callable[[Env, EnvState, Array, Rng], Array]


class Rollout(NamedTuple):
    """One episode for each of B users: -1 and 0 from the leaving step on."""
    items: Array                        # int [B, T]
    rewards: Array                      # float [B, T]


def unseen(env: Env, users: Array) -> Array:
    """bool [B, m]: the items that are not in each user's history."""
    free = np.ones((len(users), len(env.titles)), bool)
    for row, user in enumerate(users):
        free[row, np.asarray(env.histories[user], int)] = False
    return free


def rollout(env: Env, users: Array, policy: Policy, rng: Rng) -> Rollout:
    """One episode for each of B users, stepped at once; no item twice while another is free."""
    state, free = reset(env, users), unseen(env, users)
    rows = np.arange(len(users))
    active = np.ones(len(users), bool)
    items = np.full((len(users), env.max_steps), -1)
    rewards = np.zeros(items.shape)
    for t in range(env.max_steps):
        item = policy(env, state, free, rng)
        state, reward, left, _ = step(env, state, item)
        active = active & ~left
        free[rows, item] = False
        items[:, t] = np.where(active, item, -1)
        rewards[:, t] = np.where(active, reward, 0)
        if not active.any():
            break
    return Rollout(items, rewards)


def best(score: Array, allowed: Array) -> Array:
    """int [B]: the allowed item of the highest score, the first of equals; both are [B, m]."""
    return np.argmax(np.where(allowed, score, -np.inf), -1)


def draw(score: Array, allowed: Array, rng: Rng) -> Array:
    """int [B]: the allowed item of the highest score, any of equals."""
    score = np.where(allowed, score, -np.inf)
    equal = score == score.max(-1, keepdims=True)
    return np.argmax(np.where(equal, rng.random(equal.shape, np.float32), -1), -1)


def preferred(good: Array, free: Array) -> Array:
    """bool [B, m]: the free items that are good, or all free items of a user who has none."""
    both = good & free
    return np.where(both.any(-1, keepdims=True), both, free)


def with_all(env: Env, state: EnvState) -> tuple[EnvState, Array]:
    """B sessions and all m items, shaped such that they broadcast to [B, m]."""
    sessions = EnvState(state.user[:, None], state.recent[:, None], state.t[:, None])
    return sessions, np.arange(len(env.titles))


def random(env: Env, state: EnvState, free: Array, rng: Rng) -> Array:
    """Any free item, each as likely."""
    return draw(0, free, rng)


# Two policies see the user's own ratings, which no real recommender knows.


def greedy(env: Env, state: EnvState, free: Array, rng: Rng) -> Array:
    """The free item that the user rates best, without a thought of what comes after."""
    sessions, every = with_all(env, state)
    return best(env.rate(sessions.user, every), free)


def oracle(env: Env, state: EnvState, free: Array, rng: Rng) -> Array:
    """The item that the user rates best among the free items that do not make the user leave.

    It knows the rule but does not plan, so it is no proven upper bound. In practice it keeps nearly
    everybody to the cap.
    """
    sessions, every = with_all(env, state)
    ratings = env.rate(sessions.user, every)
    stays = ~leaves(env, sessions, every, ratings)
    return best(ratings, preferred(stays, free))


# Two policies see the learners' ratings, and give everybody the same list.


def popularity(env: Env) -> Array:
    """float [m]: each item's mean rating over the learners."""
    every = np.arange(len(env.titles))
    total = np.zeros(len(every))
    for user in range(env.learners):
        total += env.rate(user, every)
    return total / max(env.learners, 1)


def popular(appeal: Array, env: Env, state: EnvState, free: Array, rng: Rng) -> Array:
    """The free item of most appeal [m]. `partial(popular, popularity(env))` is a `Policy`."""
    return best(appeal, free)


def one_list(appeal: Array, env: Env, state: EnvState, free: Array, rng: Rng) -> Array:
    """The free item of most appeal [m] that is not too alike. See `popular`."""
    sessions, every = with_all(env, state)
    different = nearest(env, sessions, every) >= env.beta
    return best(appeal, preferred(different, free))


# Two policies are rules that see categories, not ratings.


def shared(env: Env, state: EnvState) -> Array:
    """float [B, m]: how many of each item's categories the last W items have among them."""
    recent = env.belongs[state.recent] & (state.recent >= 0)[..., None]
    return recent.any(1).astype(np.float32) @ env.belongs.T


def mean_liked(rows: Array, env: Env, users: Array) -> Array:
    """float32 [B, k]: the mean, over each user's history, of the items' rows [m, k]."""
    means = np.zeros((len(users), rows.shape[1]), np.float32)
    for place, user in enumerate(users):
        liked = rows[np.asarray(env.histories[user], int)]
        means[place] = liked.sum(0) / max(len(liked), 1)
    return means


def affinity(env: Env, state: EnvState) -> Array:
    """float [B, m]: how common an item's categories are in the user's history, on average."""
    sizes = np.maximum(env.belongs.sum(1), 1)
    return mean_liked(env.belongs, env, state.user) @ env.belongs.T / sizes


def varied(env: Env, state: EnvState, free: Array, rng: Rng) -> Array:
    """Any free item that shares no category with the last W; any free item if there is none."""
    return draw(0, preferred(shared(env, state) == 0, free), rng)


def common_sense(env: Env, state: EnvState, free: Array, rng: Rng) -> Array:
    """The item of the highest affinity among those that `varied` draws from."""
    allowed = preferred(shared(env, state) == 0, free)
    return draw(affinity(env, state), allowed, rng)


# ------------------------------------ policies that learn: a bandit, and an actor and critic


def staying(stay: Array, state: EnvState, free: Array) -> tuple[EnvState, Array]:
    """The sessions that go on, and what is free in them, by a mask [B]."""
    return EnvState(state.user[stay], state.recent[stay], state.t[stay]), free[stay]


def features(env: Env, state: EnvState) -> Array:
    """float [B, m, 4]: distance to the nearest of the last W, shared categories, affinity, 1."""
    sessions, every = with_all(env, state)
    # the distance is infinite at the first step, and beta is its unit in this world
    apart = np.minimum(nearest(env, sessions, every), 2 * env.beta)
    return np.stack([apart, shared(env, state), affinity(env, state), np.ones_like(apart)], -1)


def bandit(weights: Array, env: Env, state: EnvState, free: Array, rng: Rng) -> Array:
    """The free item of the highest predicted reward. `partial(bandit, weights)` is a `Policy`."""
    return draw(features(env, state) @ weights, free, rng)


def learn_bandit(env: Env, episodes: int, seed: int = 0, epsilon: float = 0.1) -> Policy:
    """A linear contextual bandit: ridge regression of the next reward on `features`, penalty 1.

    It learns from the rewards of its own episodes and does not look ahead. Learners take turns, in
    100 rounds of episodes. A random item is recommended at a rate of epsilon.
    """
    rng = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(6,)))
    turns = np.resize(rng.permutation(env.learners), episodes)
    gram, moment = np.eye(4), np.zeros(4)
    for users in np.array_split(turns, 100):
        state, free = reset(env, users), unseen(env, users)
        while len(free) > 0:
            x = features(env, state)
            predicted = x @ np.linalg.solve(gram, moment)
            explores = rng.random((len(x), 1)) < epsilon
            item = draw(np.where(explores, 0, predicted), free, rng)
            state, reward, left, cut = step(env, state, item)
            rows = np.arange(len(x))
            chosen = x[rows, item]
            gram = gram + chosen.T @ chosen
            moment = moment + reward @ chosen
            free[rows, item] = False
            state, free = staying(~(left | cut), state, free)
    return partial(bandit, np.linalg.solve(gram, moment))


CHOICES = 64        # items the actor-critic chooses among while it learns; m / 16 if that is more
ENTROPY = 0.05      # weight of the actor's bonus for keeping its choices open


class Weights(NamedTuple):
    """What the actor-critic learns.

    It sees a session as x = [mean vector of the history, sum of the last W vectors, 1].
    """
    match: Array                        # [2d + 1, d]: x @ match is the vector that fits
    appeal: Array                       # [m]: of each item, to anyone
    value: Array                        # [2d + 1]: V(s) = x @ value


def unpack(theta: Array, env: Env) -> Weights:
    """The weights that are learnt as one vector."""
    m, d = env.vectors.shape
    size = (2 * d + 1) * d
    return Weights(theta[:size].reshape(-1, d), theta[size:size + m], theta[size + m:])


def observe(env: Env, state: EnvState, taste: Array) -> Array:
    """float32 [B, 2d + 1]: x of each session, given the tastes [n, d] of all users."""
    recent = env.vectors[state.recent] * (state.recent >= 0)[..., None]
    one = np.ones((len(recent), 1), np.float32)
    return np.hstack([taste[state.user], recent.sum(1), one])


def log_chances(env: Env, weights: Weights, x: Array, items: Array, free: Array) -> Array:
    """float [B, k]: the logarithm of the chance that the actor takes each of k items.

    free [B, k] tells which it may take.
    """
    fit = x @ weights.match @ env.vectors[items].T + weights.appeal[items]
    fit = np.where(free, fit, -1e6)
    fit = fit - fit.max(1, keepdims=True)
    return fit - np.log(np.exp(fit).sum(1, keepdims=True))


def gradient(env: Env, x: Array, items: Array, log: Array, pick: Array,
             advantage: Array) -> Array:
    """The slope, uphill, of the sum over B sessions of advantage * log[pick] + ENTROPY * entropy.

    It is a vector as `unpack` takes it. For `value` it is the slope, downhill, of half the critic's
    squared error with the target fixed.
    """
    chance = np.exp(log)
    entropy = -(chance * log).sum(1, keepdims=True)
    slope = -chance * (advantage[:, None] + ENTROPY * (log + entropy))
    slope[np.arange(len(x)), pick] += advantage
    appeal = np.zeros(len(env.titles))
    appeal[items] = slope.sum(0)
    match = x.T @ slope @ env.vectors[items]
    return np.concatenate([match.ravel(), appeal, advantage @ x])


def a2c(weights: Weights, taste: Array, env: Env, state: EnvState, free: Array, rng: Rng) -> Array:
    """The free item that fits best. `partial(a2c, weights, taste)` is a `Policy`."""
    x = observe(env, state, taste)
    return best(log_chances(env, weights, x, np.arange(free.shape[1]), free), free)


def learn_a2c(env: Env, episodes: int, seed: int = 0, gamma: float = 0.5,
              pace: float = 0.3) -> Policy:
    """Advantage actor-critic. Learners take turns, in 200 rounds of episodes side by side.

    It learns at every step, by Adagrad: a weight moves less where its slopes have been steep.
    """
    rng = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(3,)))
    m, d = env.vectors.shape
    taste = mean_liked(env.vectors, env, np.arange(len(env.histories)))
    theta = np.zeros((2 * d + 1) * (d + 1) + m)
    choices = min(m, max(CHOICES, m // 16))
    squares = theta + 1e-6
    turns = np.resize(rng.permutation(env.learners), episodes)
    for users in np.array_split(turns, 200):
        state, free = reset(env, users), unseen(env, users)
        while len(free) > 0:
            weights, x = unpack(theta, env), observe(env, state, taste)
            items = rng.choice(m, choices, replace=False)
            log = log_chances(env, weights, x, items, free[:, items])
            pick = np.argmax(log + rng.gumbel(size=log.shape), 1)       # draws by these chances
            state, reward, left, cut = step(env, state, items[pick])
            after = observe(env, state, taste)
            target = reward + gamma * (after @ weights.value) * ~left
            advantage = target - x @ weights.value
            slope = gradient(env, x, items, log, pick, advantage)
            squares = squares + slope ** 2
            theta = theta + pace * slope / np.sqrt(squares)
            free[np.arange(len(free)), items[pick]] = False
            state, free = staying(~(left | cut), state, free)
    return partial(a2c, unpack(theta, env), taste)


POLICIES = ("random", "popular", "greedy", "varied", "common-sense", "one-list", "bandit", "a2c",
            "oracle")


def policy_named(name: str, env: Env, episodes: int = 0, seed: int = 0,
                 gamma: float = 0.5) -> Policy:
    """The policy of a name in POLICIES.

    Only bandit and a2c learn, from so many episodes. Only a2c has a discount gamma.
    """
    if name == "popular":
        return partial(popular, popularity(env))
    if name == "one-list":
        return partial(one_list, popularity(env))
    if name == "bandit":
        return learn_bandit(env, episodes, seed)
    if name == "a2c":
        return learn_a2c(env, episodes, seed, gamma)
    ready = {"random": random, "greedy": greedy, "varied": varied, "common-sense": common_sense,
             "oracle": oracle}
    return ready[name]


# ------------------------------------------------------------------------------------ metrics

METRICS = ("Len", "R_each", "R_traj")


def scores(lengths: Sequence[int], returns: Sequence[float]) -> Array:
    """float [1, N, 2]: the length and the return of each of N episodes of one seed."""
    return np.stack([lengths, returns], -1).astype(float)[None]


def totals(samples: Array) -> Array:
    """Scores [..., S, N, 2] -> [..., 3]: Len, R_each and R_traj over all S seeds and N episodes."""
    means = samples.mean((-3, -2))
    steps, reward = means[..., 0], means[..., 1]
    return np.stack([steps, reward / np.maximum(steps, 1e-9), reward], -1)


def gains(after: Array, before: Array) -> Array:
    """How much each of the three totals grew."""
    return totals(after) - totals(before)


# 0.975 quantiles of Student's t for 1, 2, ... degrees of freedom; the last serves for more.
STUDENT = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26)


def over_users(figure: Callable[..., Array], samples: Sequence[Array], draws: int) -> Array:
    """[2, ...]: the percentile bootstrap's 95 % interval of figure(*samples), users drawn with replacement."""
    rng = np.random.default_rng(0)
    users = samples[0].shape[1]
    drawn = rng.integers(users, size=(draws, 1, users))
    resampled = [sample[np.zeros_like(drawn), drawn] for sample in samples]
    return np.quantile(figure(*resampled), [0.025, 0.975], axis=0)


def intervals(figure: Callable[..., Array], *samples: Array, draws: int = 1000) -> list[list[float]]:
    """[mean, low, high] of each number in figure(*samples), with its 95 % confidence interval.

    Samples are [S, N, k]: S seeds with N users each, the same users in all samples, so that differences are
    paired. Several seeds give a t interval over the seeds' figures, because users of one seed share its world.
    One seed gives a bootstrap interval over its users.
    """
    seeds = len(samples[0])
    figures = []
    for seed in range(seeds):
        figures.append(figure(*[sample[seed:seed + 1] for sample in samples]))
    mean = np.mean(figures, 0)
    if seeds == 1:
        low, high = over_users(figure, samples, draws)
    else:
        quantile = STUDENT[min(seeds - 2, len(STUDENT) - 1)]
        margin = quantile * np.std(figures, 0, ddof=1) / np.sqrt(seeds)
        low, high = mean - margin, mean + margin
    return np.stack([mean, low, high], -1).round(4).tolist()


def metrics(after: Array, before: Array | None = None) -> dict[str, list[float]]:
    """[mean, low, high] of Len, R_each and R_traj of scores [S, N, 2], or of their gains."""
    if before is None:
        return dict(zip(METRICS, intervals(totals, after)))
    return dict(zip(METRICS, intervals(gains, after, before)))


# ---------------------------------------------------------------------------- the films world

NAMES = ("Action Adventure Animation Children Comedy Crime Documentary Drama Fantasy Horror "
         "Musical Mystery Romance Sci-Fi Thriller War Western")
CODES = dict(zip("AVNKCRODFHMYLSTWX", NAMES.split()))

FILMS = """
City Lights 1931 CL; Frankenstein 1931 HS; M 1931 RT; Duck Soup 1933 CMW; King Kong 1933 VH;
It Happened One Night 1934 CL; Snow White and the Seven Dwarfs 1937 NFM;
The Adventures of Robin Hood 1938 AVL; Gone with the Wind 1939 LW; Stagecoach 1939 AX;
The Wizard of Oz 1939 KFM; Fantasia 1940 NM; Pinocchio 1940 NKF; Rebecca 1940 YL;
The Great Dictator 1940 CW; Citizen Kane 1941 DY; The Maltese Falcon 1941 RY; Casablanca 1942 LW;
Double Indemnity 1944 RT; It's a Wonderful Life 1946 DF; The Treasure of the Sierra Madre 1948 VX;
The Third Man 1949 YT; Rashomon 1950 RY; The African Queen 1951 VLW;
The Day the Earth Stood Still 1951 ST; High Noon 1952 TX; Singin' in the Rain 1952 CML;
Rear Window 1954 YT; Seven Samurai 1954 AD; Night and Fog 1955 OW;
Invasion of the Body Snatchers 1956 HS; The Searchers 1956 DX; 12 Angry Men 1957 RD;
The Bridge on the River Kwai 1957 VW; The Seventh Seal 1957 DF; Vertigo 1958 YL;
North by Northwest 1959 VT; Rio Bravo 1959 AX; Some Like It Hot 1959 CR; Psycho 1960 RHY;
The Magnificent Seven 1960 AVX; Breakfast at Tiffany's 1961 L; West Side Story 1961 RML;
Lawrence of Arabia 1962 VW; To Kill a Mockingbird 1962 RD; The Birds 1963 HY;
The Great Escape 1963 AW; Goldfinger 1964 AT; Mary Poppins 1964 KFM; The Sound of Music 1965 KM;
The Good, the Bad and the Ugly 1966 VX; Bonnie and Clyde 1967 RL; The Graduate 1967 CL;
The Jungle Book 1967 NKM; 2001: A Space Odyssey 1968 VS; Night of the Living Dead 1968 HS;
Once Upon a Time in the West 1968 X; Planet of the Apes 1968 VS; Yellow Submarine 1968 NM;
Butch Cassidy and the Sundance Kid 1969 RX; Woodstock 1970 OM; A Clockwork Orange 1971 RS;
Willy Wonka & the Chocolate Factory 1971 KFM; Cabaret 1972 DM; The Godfather 1972 RD;
Enter the Dragon 1973 A; The Exorcist 1973 H; Westworld 1973 SX; Blazing Saddles 1974 CX;
Chinatown 1974 RY; Young Frankenstein 1974 CH; Grey Gardens 1975 OD; Jaws 1975 HT;
Monty Python and the Holy Grail 1975 CF; The Rocky Horror Picture Show 1975 CHM; Rocky 1976 D;
Close Encounters of the Third Kind 1977 YS; Star Wars 1977 AVS; Grease 1978 ML; Halloween 1978 HT;
Superman 1978 AF; Alien 1979 HS; Apocalypse Now 1979 DW; Airplane! 1980 C;
The Blues Brothers 1980 ACM; The Shining 1980 HY; Das Boot 1981 TW; Raiders of the Lost Ark 1981 AV;
Blade Runner 1982 YS; E.T. the Extra-Terrestrial 1982 KS; A Nightmare on Elm Street 1984 FH;
Ghostbusters 1984 CF; Stop Making Sense 1984 OM; The NeverEnding Story 1984 VKF;
The Terminator 1984 AS; This Is Spinal Tap 1984 CM; Back to the Future 1985 VCS; Shoah 1985 OW;
The Goonies 1985 VK; Aliens 1986 AHS; Labyrinth 1986 KFM; Platoon 1986 DW; Top Gun 1986 AL;
Predator 1987 AST; The Princess Bride 1987 VCFL; Akira 1988 ANS; Die Hard 1988 AT;
Grave of the Fireflies 1988 NW; My Neighbor Totoro 1988 NKF; The Thin Blue Line 1988 ROY;
Who Framed Roger Rabbit 1988 NCY; Roger & Me 1989 CO; The Little Mermaid 1989 NML;
When Harry Met Sally... 1989 CL; Back to the Future Part III 1990 CSX; Dances with Wolves 1990 VX;
Edward Scissorhands 1990 FL; Ghost 1990 FL; Goodfellas 1990 R; Home Alone 1990 KC;
Beauty and the Beast 1991 NFML; Terminator 2: Judgment Day 1991 AS;
The Silence of the Lambs 1991 HT; Unforgiven 1992 DX; Groundhog Day 1993 CFL; Jurassic Park 1993 VS;
Schindler's List 1993 DW; The Fugitive 1993 T; The Nightmare Before Christmas 1993 NHM;
Forrest Gump 1994 CD; Hoop Dreams 1994 O; Pulp Fiction 1994 CR; The Lion King 1994 NKM;
Braveheart 1995 AW; Ghost in the Shell 1995 NS; The Usual Suspects 1995 RY; Toy Story 1995 NKC;
Fargo 1996 CR; Scream 1996 HY; Princess Mononoke 1997 NF; Titanic 1997 DL;
Saving Private Ryan 1998 AW; Buena Vista Social Club 1999 OM; The Blair Witch Project 1999 H;
The Iron Giant 1999 NKS; The Matrix 1999 AS; The Sixth Sense 1999 HY;
Crouching Tiger, Hidden Dragon 2000 AFL; Gladiator 2000 A; Memento 2000 YT; Amélie 2001 CL;
Moulin Rouge! 2001 ML; Mulholland Drive 2001 YT; Shrek 2001 NCF; Spirited Away 2001 VNF;
The Lord of the Rings: The Fellowship of the Ring 2001 VF; Bowling for Columbine 2002 RO;
Chicago 2002 RM; City of God 2002 RD; Finding Nemo 2003 VNK;
Pirates of the Caribbean: The Curse of the Black Pearl 2003 VF; The Fog of War 2003 OW;
Eternal Sunshine of the Spotless Mind 2004 LS; Shaun of the Dead 2004 CH;
Brokeback Mountain 2005 LX; Grizzly Man 2005 OD; March of the Penguins 2005 KO;
An Inconvenient Truth 2006 O; Pan's Labyrinth 2006 FW; No Country for Old Men 2007 RTX;
Ratatouille 2007 NC; Man on Wire 2008 OT; The Dark Knight 2008 AR; WALL-E 2008 NLS;
Waltz with Bashir 2008 NOW; District 9 2009 ST; Inglourious Basterds 2009 AW; Up 2009 VNK;
Inception 2010 ST; The Social Network 2010 D; Rango 2011 NCX; Django Unchained 2012 AX;
The Act of Killing 2012 RO; Frozen 2013 NKM; Gravity 2013 ST; Inside Out 2015 NKF;
Mad Max: Fury Road 2015 AVS; La La Land 2016 ML; Coco 2017 NKM; Dunkirk 2017 TW; Get Out 2017 HYT;
Free Solo 2018 VO; Spider-Man: Into the Spider-Verse 2018 ANS; 1917 2019 W; Knives Out 2019 CRY;
Parasite 2019 CT; Dune 2021 VS; Everything Everywhere All at Once 2022 ACS; Barbie 2023 CF;
Oppenheimer 2023 D
"""


def unit(rows: Array) -> Array:
    """[n, d]: rows scaled to length 1; a row of zeros stays."""
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-9)


def labels(tags: Sequence[Sequence[str]]) -> tuple[tuple[str, ...], Array]:
    """The categories that occur in the items' tags, sorted, and bool [m, c]: which item has which.

    >>> labels([["War"], ["Drama", "War"]])[0]
    ('Drama', 'War')
    """
    names = sorted({tag for item_tags in tags for tag in item_tags})
    belongs = [[name in item_tags for name in names] for item_tags in tags]
    return tuple(names), np.array(belongs, bool).reshape(len(tags), len(names))


def films(seed: int = 0, users: int = 1000) -> Env:
    """The embedded default: 200 well-known films, and users whose tastes are drawn from `seed`.

    Titles, years and categories are facts; ratings are made up. A rating is mostly taste: how much
    the user likes the film's categories, which is in part shared with one of six archetypes. Then
    comes the film's general appeal, then noise. Two films are too alike when they share about half
    of their categories or more, which is about one pair in 25. Half of the users learn.
    """
    rows = re.findall(r"(.+?) (\d{4}) ([A-Z]+)(?:;\s+|$)", FILMS.strip())
    titles, years, codes = zip(*rows)
    categories, belongs = labels([[CODES[letter] for letter in letters] for letters in codes])
    rarity = np.sqrt(np.log(len(titles) / belongs.sum(0)))      # a rare category counts for more
    vectors = unit(belongs * rarity).astype(np.float32)

    # archetypes and appeal are the same for every seed
    common = np.random.default_rng(0)
    archetypes = common.normal(size=(6, len(categories)))
    appeal = common.normal(size=len(titles))

    rng = np.random.default_rng(np.random.SeedSequence(seed))
    taste = archetypes[rng.integers(6, size=users)]
    taste = taste + 0.8 * rng.normal(size=taste.shape)
    liking = taste @ (belongs / np.sqrt(belongs.sum(1, keepdims=True))).T
    noise = 0.5 * rng.normal(size=liking.shape)
    ratings = np.clip(np.rint(3.8 + 2 * liking + 0.8 * appeal + noise), 1, 5)

    # ten films drawn without replacement; one more point makes a film e times likelier
    order = np.argsort(-(ratings + rng.gumbel(size=ratings.shape)), 1)
    return Env(
        name="films", titles=titles, years=tuple(map(int, years)),
        categories=categories, belongs=belongs, vectors=vectors,
        rate=table(ratings.astype(np.int8)),
        distance=euclidean(vectors),
        histories=tuple(order[:, :10]), learners=users // 2, beta=0.9)


# ------------------------------------------------ data files: ratings, from MovieLens or anybody

ADVICE = ("the README tells what the files hold; whole copies of MovieLens are at "
          "grouplens.org/datasets/movielens")
LISTS = ("items.csv", "movies.csv", "movie.csv", "movies.dat")
HEADERS = {"movies.dat": ["movieId", "title", "genres"],                # .dat files have no header
           "ratings.dat": ["userId", "movieId", "rating", "timestamp"]}
ALIASES = {"item": "itemid item movieid filmid bookid productid id",
           "title": "title movietitle itemtitle name",
           "year": "year releaseyear",
           "categories": "categories category genres genre tags",
           "user": "user userid",
           "rating": "rating score stars",
           "time": "time timestamp date"}
NO_TAG = ("", "unknown", "(no genres listed)")
ARTICLE = r"^([^(]*), (The|A|An|Les?|La|L'|Il|El|Los|Las|Das|Der|Die|Une?)(?= \(|$)"
MANY = 10 ** 6      # more ratings than this take a while
Notice = Callable[[str], None]      # takes a line for the person who waits


class BadData(ValueError):
    """A data file is missing or malformed; one line names the file, the place and a remedy."""


@contextmanager
def reading(path: Location, names: Sequence[str], advice: str, world: str = "") -> Iterator[Path]:
    """A file of one of these names in a folder or below it; whatever fails inside is blamed on it.

    Of several it takes one in a folder named as the world, then the least deep, then by name.
    """
    folder = Path(path).expanduser()
    files = [file for name in names for file in folder.rglob(name) if file.is_file()]
    if not files:
        raise BadData(f"{folder}: no {' or '.join(names)} there or below; {advice}")
    # of equals min takes the first, and files are in the order of names
    file = min(files, key=lambda file: (world not in file.parts, len(file.parts)))
    try:
        yield file
    except Exception as error:      # damaged files make csv, json, numpy and pickle raise all sorts
        reason = str(error).partition("\n")[0] or type(error).__name__
        if isinstance(error, KeyError):
            reason = f"no key {reason}"
        raise BadData(f"{file}: {reason}; {advice}") from None


def silent(text: str) -> None:
    """Say nothing."""


def encoding(file: Path) -> str:
    """UTF-8, with or without a byte order mark, when the whole file is that; else latin-1."""
    try:
        with file.open(encoding="utf-8-sig") as lines:
            for _ in lines:
                pass
    except UnicodeDecodeError:
        return "latin-1"
    return "utf-8-sig"


def columns(header: Sequence[str]) -> dict[str, int]:
    """The places of the columns in a header, by any alias, case and punctuation.

    >>> columns(["Title", "Movie_ID"])
    {'item': 1, 'title': 0}
    """
    plain = [re.sub(r"[\W_]", "", text).lower() for text in header]
    places = {}
    for name, aliases in ALIASES.items():
        for alias in aliases.split():
            if alias in plain and name not in places:
                places[name] = plain.index(alias)
    return places


Row = dict[str, str]                # the texts of a line by the names in ALIASES


def read_rows(file: Path, needed: str, parse: Callable[[Row], Any],
              notice: Notice = silent) -> Iterator[Any]:
    """parse(row) of each line of a csv or .dat file that is not empty.

    A ValueError names the line.
    """
    with file.open(encoding=encoding(file), newline="") as stream:
        lines = csv.reader(stream, strict=True)
        if file.suffix == ".dat":
            tabbed = (line.replace("::", "\t") for line in stream)
            lines = csv.reader(tabbed, delimiter="\t", quoting=csv.QUOTE_NONE)
        try:
            header = HEADERS.get(file.name) or next(lines, [])
            places = columns(header)
            for name in needed.split():
                demand(name in places, f"no column for the {name} ({ALIASES[name]}) in the header "
                                       + repr(",".join(header)[:80]))
            for fields in lines:
                if lines.line_num == MANY:
                    notice(f"{file} has a million lines or more: reading and fitting takes a while")
                if any(fields):
                    if len(fields) != len(header):
                        raise ValueError(f"{len(fields)} fields instead of {len(header)}")
                    yield parse({name: fields[place].strip() for name, place in places.items()})
        except (ValueError, csv.Error) as error:
            raise ValueError(f"line {lines.line_num}: {error}") from None


class Item(NamedTuple):
    """One row of the list of items."""
    title: str
    year: int | None
    tags: list[str]


def split_title(text: str) -> tuple[str, int | None]:
    """The title, its article in front, and the year that may stand behind it.

    >>> split_title("Matrix, The (1999)")
    ('The Matrix', 1999)
    """
    # the pattern would be slow on a long run of spaces
    text = " ".join(text.split())
    title, year = re.fullmatch(r"(.*?) ?(?:\((\d{4})(?:[-–]\d*)?\))?", text).groups()
    title = re.sub(ARTICLE, r"\2 \1", title or text).replace("L' ", "L'")
    return title, int(year) if year else None


def parse_item(items: dict[str, Item], row: Row) -> tuple[str, Item]:
    """The id of an item, and the item, which must not be among items."""
    demand(row["item"] != "" and row["title"] != "", "an item without id or title")
    demand(row["item"] not in items, f"item {row['item']} is listed twice")
    title, year = split_title(row["title"])
    digits = re.search(r"\d{4}", row.get("year", ""))
    if digits:
        year = int(digits.group())
    names = [name.strip() for name in row.get("categories", "").split("|")]
    return row["item"], Item(title, year, [name for name in names if name not in NO_TAG])


def seconds(text: str) -> float:
    """A time as a number, which may be written as a date like 2005-04-02 23:53:47. No text is 0."""
    try:
        return float(text or 0)
    except ValueError:
        return datetime.fromisoformat(text).timestamp()


# a log is an array [N] of such records
LOG = [("user", int), ("item", int), ("rating", float), ("time", float)]


def parse_rating(users: dict[str, int], items: dict[str, int], row: Row) -> tuple:
    """The values of one record of a LOG, given the numbers of ids.

    A new user gets the next number.
    """
    rating = float(row["rating"])
    if not abs(rating) < np.inf:
        raise ValueError(f"the rating {rating} is not finite")
    if row["user"] == "":
        raise ValueError("a rating without user")
    if row["item"] not in items:
        raise ValueError(f"item {row['item']} is not in the list of items")
    user = users.setdefault(row["user"], len(users))
    return user, items[row["item"]], rating, seconds(row.get("time", ""))


def rescaled(ratings: Array) -> tuple[Array, str]:
    """Ratings, and a text for `Env.about`. If not all lie in 0.5..5, they are mapped onto 1..5.

    >>> rescaled(np.array([0, 50, 100]))
    (array([1., 3., 5.]), ', mapped linearly from 0..100 onto 1..5')
    """
    low, high = ratings.min(), ratings.max()
    if low >= 0.5 and high <= 5:
        return ratings, ""
    demand(low < high, f"every rating is {low:g}")
    mapped = 1 + 4 * (ratings - low) / (high - low)
    return mapped, f", mapped linearly from {low:g}..{high:g} onto 1..5"


def groups(keys: Array) -> list[Array]:
    """The places [.] of each distinct key, by key; within a key in order."""
    order = np.argsort(keys, kind="stable")
    return np.split(order, np.flatnonzero(np.diff(keys[order])) + 1)


def ridge(rows: Array, columns: Array, targets: Array, known: Array, count: int) -> Array:
    """float32 [count, k + 1]: for each row, the regression of its targets on [known[column], 1].

    The penalty is 3 + a tenth of the number of targets on each factor, and 3 on the bias.
    """
    known = np.insert(known, known.shape[1], 1, 1)
    fitted = np.zeros((count, known.shape[1]), np.float32)
    for own in groups(rows):
        x = known[columns[own]]
        penalty = np.full(len(x.T), 3 + len(own) / 10)
        penalty[-1] = 3
        fitted[rows[own[0]]] = np.linalg.solve(x.T @ x + np.diag(penalty), x.T @ targets[own])
    return fitted


class Model(NamedTuple):
    """What `predict` needs."""
    p: Array                            # float32 [n, rank + 2]: factors, bias, 1
    q: Array                            # float32 [m, rank + 2]: factors, 1, bias
    offset: float


def als(log: Array, n: int, m: int, rank: int, sweeps: int = 10) -> Model:
    """Alternating least squares: a rating is offset + user's bias + item's bias + p . q."""
    users, items, offset = log["user"], log["item"], log["rating"].mean()
    ratings = log["rating"] - offset
    q = 0.1 * np.random.default_rng(0).standard_normal((m, rank + 1), np.float32)
    q[:, rank] = 0
    for _ in range(sweeps):
        p = ridge(users, items, ratings - q[items, rank], q[:, :rank], n)
        q = ridge(items, users, ratings - p[users, rank], p[:, :rank], m)
    return Model(np.insert(p, rank + 1, 1, 1), np.insert(q, rank, 1, 1), float(offset))


def rmse(model: Model, log: Array) -> float:
    """The root of the mean squared error of the predicted ratings; 0 if there are none."""
    errors = predict(*model, log["user"], log["item"]) - log["rating"]
    return np.sqrt(np.square(errors).sum() / max(len(errors), 1))


def liked(log: Array) -> tuple[Array, ...]:
    """Each user's history: the last 20 items rated 4 or more, or else the last 20 rated best."""
    histories = []
    for own in groups(log["user"]):
        ratings = log["rating"][own]
        good = ratings >= min(4, ratings.max())
        histories.append(log["item"][own][good][-20:])
    return tuple(histories)


def fitted_world(items: Sequence[Item], log: Array, n: int, seed: int) -> Env:
    """A world whose ratings `als` predicts. `about` has its error on a tenth that it has not seen.

    Item vectors are item factors scaled to length 1; `beta` is the 0.2 quantile of their distances.
    Half of the users, drawn by `seed`, learn.
    """
    rng = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(5,)))
    m, size = len(items), len(log)
    log = log[np.lexsort((log["time"], log["user"]))]
    log["rating"], mapping = rescaled(log["rating"])
    log["user"] = rng.permutation(n)[log["user"]]
    held_out = rng.permutation(size) < size // 10
    train, test = log[~held_out], log[held_out]
    model, biases = als(train, n, m, 12), als(train, n, m, 0)
    vectors = unit(model.q[:, :12])
    a, b = rng.integers(m, size=(2, 100_000))
    beta = np.quantile(length_between(vectors, 0, a, b), 0.2)
    about = (f"{size} ratings{mapping}; RMSE on the tenth held out: {rmse(model, test):.4f} "
             f"predicted by factors, {rmse(biases, test):.4f} by biases alone")
    titles, years, tags = zip(*items)
    categories, belongs = labels(tags)
    return Env(
        name="csv", titles=titles, years=years,
        categories=categories, belongs=belongs, vectors=vectors,
        rate=partial(rounded, *model),
        distance=euclidean(vectors),
        histories=liked(log), learners=n // 2, beta=float(beta), about=about)


def ratings_folder(path: Location, seed: int = 0, notice: Notice = silent) -> Env:
    """The world of anybody's ratings: a folder with `items.csv` and `ratings.csv`.

    items.csv: id, title, optional year, optional categories separated by "|". ratings.csv: user,
    item, rating, optional time. The header names the columns by any of ALIASES, in any order; other
    columns are ignored. Ids are any text. Ratings of another scale are mapped: see `rescaled`.
    """
    items, users = {}, {}
    with reading(path, LISTS, ADVICE) as file:
        for key, item in read_rows(file, "item title", partial(parse_item, items), notice):
            items[key] = item
    numbers = {key: number for number, key in enumerate(items)}
    names = ["ratings" + file.suffix, "rating" + file.suffix]
    with reading(file.parent, names, ADVICE) as file:
        parse = partial(parse_rating, users, numbers)
        log = np.fromiter(read_rows(file, "user item rating", parse, notice), LOG)
        demand(len(users) > 1, "fewer than two users")
        return fitted_world(list(items.values()), log, len(users), seed)


def movielens(path: Location, seed: int = 0, notice: Notice = silent) -> Env:
    """The world of a folder as GroupLens ships it: csv files, or .dat files (ml-1m and ml-10M)."""
    return ratings_folder(path, seed, notice)._replace(name="movielens")


# ------------------------------------------------------- data files: the authors' two worlds

AUTHORS = "whole copies are in the authors' repository, github.com/jizhi-zhang/BiLLP"


class ArraysOnly(pickle.Unpickler):
    """An unpickler that admits what a pickled numpy array is made of, and calls nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        admitted = {("numpy", "ndarray"), ("numpy", "dtype"),
                    ("numpy.core.multiarray", "_reconstruct"),
                    ("numpy.core.numeric", "_frombuffer")}
        if (module.replace("_core", "core"), name) not in admitted:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which is refused")
        return super().find_class(module, name)


def load(file: Path) -> Any:
    """What a .json file holds, or the finite matrix of a .npy file (memory-mapped) or a pickle."""
    if file.suffix == ".json":
        return json.loads(file.read_bytes())
    if file.suffix == ".npy":
        matrix = np.load(file, "r", allow_pickle=False)
    else:
        with file.open("rb") as stream:
            matrix = ArraysOnly(stream).load()
    numeric = isinstance(matrix, np.ndarray) and matrix.dtype.kind in "iuf"
    fit = numeric and matrix.ndim == 2 and np.isfinite(matrix).all()
    demand(fit, "it does not hold one matrix of finite numbers")
    return matrix


@contextmanager
def content(path: Location, name: str, world: str) -> Iterator[Any]:
    """What a file of a world holds. The file is blamed for whatever fails inside."""
    with reading(path, [name], AUTHORS, world) as file:
        yield load(file)


def history_of(titles: Sequence[str], index: dict[str, int]) -> Array:
    """The last 20 distinct items that the index has, each at its last place in titles."""
    newest_first = {}           # a dict, because it keeps the order and each item once
    for title in reversed(titles):
        item = index.get(html.unescape(title))
        if item is not None:
            newest_first[item] = True
    return np.array(list(newest_first)[:20][::-1], int)


class Half(NamedTuple):
    """What the authors' files hold for the users who learn, or for the others."""
    titles: tuple[str, ...]             # [m]
    ratings: Array                      # [., m]
    apart: Array                        # [m, m]: distances
    rows: list[int]                     # of each user in `ratings`
    histories: list[Array]              # of each user


def read_half(path: Location, world: str, half: str) -> Half:
    """The half "train" or "test" of a world."""
    with content(path, f"{world}_{half}.npy", world) as ratings:
        m = ratings.shape[1]
    with content(path, "datamaps.json", world) as maps:
        titles = tuple(html.unescape(maps["id2item_dict"][str(item)]) for item in range(m))
    with content(path, f"{half}_distance_mat.pickle", world) as apart:
        demand(apart.shape == (m, m), f"the distances do not fit {m} items")
    index = {title: item for item, title in enumerate(titles)}
    with content(path, f"{half}.json", world) as users:
        rows = [int(user["userid_encoded"]) for user in users]
        histories = [history_of(user["pos_seq_name"], index) for user in users]
        fit = len(rows) > 0 and min(rows) >= 0 and max(rows) < len(ratings)
        demand(fit, f"the users do not fit {len(ratings)} rows of ratings")
    return Half(titles, ratings, apart, rows, histories)


def rate_by_half(learners: int, rows: Array, train: Array, test: Array, users: Array,
                 items: Array) -> Array:
    """Ratings from one table for learners and from another for the others, clipped to 1..5.

    rows [n] has each user's row. The rating of a user in the other's table is looked up in row 0
    and dropped.
    """
    learns = users < learners
    of_learners = train[np.where(learns, rows[users], 0), items]
    of_others = test[np.where(learns, 0, rows[users]), items]
    return np.clip(np.where(learns, of_learners, of_others), 1, 5)


def distance_by_half(learners: int, train: Array, test: Array, users: Array, a: Array,
                     b: Array) -> Array:
    """Distances from one matrix [m, m] for learners and from another for the others."""
    return np.where(users < learners, train[a, b], test[a, b])


def released(path: Location, name: str) -> Env:
    """The authors' world "steam" or "amazon", from their files wherever they lie below path.

    Users of train.json learn, those of test.json do not. Only `a2c` sees the vectors, which are the
    genres as rows of length 1.
    """
    train, test = read_half(path, name, "train"), read_half(path, name, "test")
    if train.titles != test.titles:
        raise BadData(f"{path}: the two halves of {name} do not fit each other; {AUTHORS}")
    with content(path, "list_genre.json", name) as sources:
        # each list of genres is written as Python source
        genres = {html.unescape(title): ast.literal_eval(sources[title]) for title in sources}
        categories, belongs = labels([genres.get(title, []) for title in train.titles])
    learners, rows = len(train.rows), np.array(train.rows + test.rows)
    return Env(
        name=name, titles=train.titles, years=(None,) * len(train.titles),
        categories=categories, belongs=belongs, vectors=unit(belongs).astype(np.float32),
        rate=partial(rate_by_half, learners, rows, train.ratings, test.ratings),
        distance=partial(distance_by_half, learners, train.apart, test.apart),
        histories=train.histories + test.histories, learners=learners,
        beta={"steam": 50.0, "amazon": 15.0}[name], grace=1)
