"""The world: users, items, and the rule by which a user leaves. No language model here.

An `Env` is a frozen record: the parameters of a simulator. `reset` and `step` are pure. They take
one user, or B users at once. Batches are for speed: policies without language need millions of
steps.

    n, m, c, d   numbers of users, items and categories, and the size of an item's vector
    user, item   indices into the world's arrays; item -1 is an empty slot
    window, W    how many recommended items a user remembers
    too similar  nearer than `beta` to one of the last W recommended items
    left, cut    the user left; the step cap was reached. Never both
    Len, R_each, R_traj   steps per episode, reward per step, reward per episode, all without the
                 step at which the user leaves
    free         bool [B, m]: the items that a policy may still recommend to each of B users

Left out on purpose: slates, clicks, time. A step recommends one item and returns one rating.
"""
from __future__ import annotations

import ast
import csv
import html
import json
import os
import pickle
import re
from contextlib import contextmanager
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any, Callable, Iterator, NamedTuple, Sequence

import numpy as np

Array = np.ndarray
Rng = np.random.Generator
Location = str | Path                   # of a folder of data files

# For each seed each of these purposes has its own random stream; the first three are for run.py.
# The numbers must not change, so that a seed gives the same users in every version; 4 is unused.
BRANCHES = {"learners": 0, "held-out users": 1, "policy": 2, "actor-critic": 3, "data": 5,
            "bandit": 6}


def branch(seed: int, purpose: str) -> Rng:
    """The random stream of a seed for a purpose in BRANCHES."""
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(BRANCHES[purpose],)))


# ------------------------------------------------------------- the world and its leaving rule

# the rule of leaving: fields of Env, and flags of run.py
RULE = ("window", "beta", "floor", "grace", "max_steps")


class Env(NamedTuple):
    """A world of n users, m items and c categories. `check` reports what does not fit together.

    `rate(users, items)` gives ratings from 1 to 5, none missing. `distance(users, a, b)` tells how
    unlike the items a and b are to these users. Both take ints or int arrays that broadcast
    together, and return numbers of that shape. If distances are the same for all users, the result
    may have the shape of a and b alone. Item a may be -1, no item: then any number will do. `table`
    and `euclidean` make such functions.
    """
    titles: tuple[str, ...]             # [m], without the year
    years: tuple[int | None, ...]       # [m]
    categories: tuple[str, ...]         # [c]
    belongs: Array                      # bool [m, c]: the categories of each item
    vectors: Array                      # float32 [m, d]: similar items lie near each other
    rate: Callable
    distance: Callable
    # [n]: the items each user liked before, oldest first if their order is known
    histories: Sequence[Sequence[int]]
    learners: int                       # users below this index are learned from, others held out
    window: int = 4                     # W, recommended items a user compares the next one with
    beta: float = 1.0                   # an item nearer than this to one of them is too similar
    floor: float = 2.0                  # a rating below it disappoints
    grace: int = 0                      # steps at the start at which disappointment is forgiven
    max_steps: int = 50                 # the cap at which an episode is cut
    about: str = ""                     # how the world was made


class EnvState(NamedTuple):
    """The session of one user, or of B users along a leading axis."""
    user: Array                         # int [...]
    recent: Array                       # int [..., W]: the last W recommended items, newest last
    t: Array                            # int [...]: steps taken


# A world is pickled to go to another process, and a closure cannot be pickled. So `table` and
# `euclidean` return a `partial` of a function of the module.


def look_up(ratings: Array, users: Array, items: Array) -> Array:
    """The entries of a table [n, m]."""
    return ratings[users, items]


def table(ratings: Array) -> Callable:
    """A `rate` that looks ratings up in a table [n, m].

    >>> table([[1, 2], [3, 4]])(np.array([0, 1]), 1).tolist()
    [2, 4]
    """
    return partial(look_up, np.asarray(ratings))


def length_between(vectors: Array, users: Array, a: Array, b: Array) -> Array:
    """The Euclidean distance between the vectors of items a and b, the same for every user."""
    difference = vectors.take(a, 0) - vectors.take(b, 0)
    return np.sqrt(np.einsum("...d,...d->...", difference, difference))


def euclidean(vectors: Array) -> Callable:
    """A `distance` between the rows of vectors [m, d].

    >>> float(euclidean([[0, 0], [3, 4]])(0, 0, 1))
    5.0
    """
    return partial(length_between, np.asarray(vectors))


def reset(env: Env, user: Array) -> EnvState:
    """A new session for a user (int) or for B users (int [B])."""
    user = np.asarray(user)
    nothing = np.full(user.shape + (env.window,), -1)
    return EnvState(user, nothing, np.zeros_like(user))


def with_every_item(env: Env, state: EnvState) -> tuple[EnvState, Array]:
    """B sessions and all m items, in shapes that broadcast to [B, m].

    In the sessions user and t become [B, 1], and recent becomes [B, 1, W]. Items are [m]. So
    `env.rate(sessions.user, items)` is [B, m]: each user's rating of each item.
    """
    sessions = EnvState(*[part[:, None] for part in state])
    return sessions, np.arange(len(env.titles))


def distance_to_recent(env: Env, state: EnvState, item: Array) -> Array:
    """The distance of an item to the nearest of the last W recommended items.

    It is infinite if there are none. Its shape is [B] for B sessions with an item each, and [B, m]
    for what `with_every_item` returns.
    """
    smallest = np.full(np.broadcast(state.user, item).shape, np.inf)
    slots = np.moveaxis(state.recent, -1, 0)        # W slots, each [B] or [B, 1], as state.user
    # one slot at a time: all at once is slower with many items
    for earlier in slots:
        # an empty slot is -1, which indexes the last item: that distance is dropped
        distance = env.distance(state.user, earlier, item)
        smallest = np.minimum(smallest, np.where(earlier < 0, np.inf, distance))
    return smallest


def too_similar(env: Env, distance: Array) -> Array:
    """bool [...]: whether distances are below beta.

    They are rounded, because the last digits differ between processors.
    """
    return np.round(distance, 5) < env.beta


def leaves(env: Env, state: EnvState, item: Array, rating: Array) -> Array:
    """bool [...]: whether each user leaves, given the item and his or her rating of it."""
    disappointed = (rating < env.floor) & (state.t >= env.grace)
    return too_similar(env, distance_to_recent(env, state, item)) | disappointed


def step(env: Env, state: EnvState, item: Array) -> tuple[EnvState, Array, Array, Array]:
    """Recommend an item to each user: (next state, reward, left, cut).

    The last three have the shape of `item`. The reward is the rating; the leaving step earns 0. A
    session of `max_steps` steps is cut.
    """
    item = np.asarray(item)
    rating = env.rate(state.user, item)
    left = leaves(env, state, item, rating)
    recent = np.concatenate([state.recent, item[..., None]], -1)
    after = EnvState(state.user, recent[..., 1:], state.t + 1)      # without the oldest
    cut = ~left & (after.t >= env.max_steps)
    return after, np.where(left, 0, rating), left, cut


def why_left(env: Env, user: int, items: Sequence[int]) -> str:
    """In words: why the user left at the last of these items."""
    *earlier, item = items
    newest_first = earlier[::-1][:env.window]
    for back, other in enumerate(newest_first, 1):
        if too_similar(env, env.distance(user, other, item)):
            return f"too similar to {env.titles[other]}, {back} back"
    return f"disappointed: would rate it {env.rate(user, item):g}"


def demand(holds: Any, message: str) -> None:
    """Raise a ValueError unless something holds."""
    if not holds:
        raise ValueError(message)


def check_functions(env: Env) -> None:
    """Raise a ValueError of one line if `rate` or `distance` does not fit a world.

    It looks at all ratings if there are fewer than 10^7, otherwise at those of some users.
    """
    n, m = len(env.histories), len(env.titles)
    every_nth = 1 + n * m // 10 ** 7
    users, items = np.arange(0, n, every_nth), np.arange(m)
    try:
        ratings = env.rate(users[:, None], items)
        distances = env.distance(0, items, 0)
    except (IndexError, TypeError) as error:
        raise ValueError(f"rate or distance does not fit {n} users, {m} items: {error}; "
                         "`table` and `euclidean` make such functions") from None
    is_table = isinstance(ratings, np.ndarray) and ratings.shape == (len(users), m)
    demand(is_table, "rate does not return an array of the shape of its arguments")
    is_row = np.shape(distances) == (m,) and not np.isnan(distances).any()
    demand(is_row, "distance does not return a number for each of its arguments")
    low, high = ratings.min(), ratings.max()            # both are NaN if a rating is
    demand(1 <= low and high <= 5, f"ratings that are not between 1 and 5: [{low:g}, {high:g}]")


def check(env: Env) -> None:
    """Raise a ValueError of one line if the parts of a world do not fit together."""
    n, m, c = len(env.histories), len(env.titles), len(env.categories)
    demand(n > 0 and m > 0, f"a world of {n} users (histories) and {m} items (titles)")
    demand(env.learners in range(n + 1), f"learners is {env.learners} for {n} histories")
    for name in (*env.titles, *env.categories):
        demand(isinstance(name, str), f"the title or category {name!r} is not a text")
    demand(np.shape(env.years) == (m,), f"years are not {m} numbers or None, one for each title")
    for name in ("belongs", "vectors"):
        demand(isinstance(getattr(env, name), np.ndarray), f"{name} is not an array")
    shape = env.belongs.shape
    demand(shape == (m, c), f"belongs has the shape {shape} instead of {(m, c)}")
    demand(env.vectors.ndim == 2 and len(env.vectors) == m, f"vectors is not a matrix of {m} rows")
    demand(np.isfinite(env.vectors).all(), "vectors holds a number that is not finite")
    strangers = set().union(*env.histories) - set(range(m))
    examples = ", ".join(map(str, list(strangers)[:9]))
    demand(not strangers, f"the histories hold items outside 0..{m - 1}: {examples}")
    check_functions(env)


# ------------------------------------------------------- policies without a language model

# env, B sessions, free [B, m], rng -> items [B]. A user for whom nothing is free gets any item.
Policy = Callable[[Env, EnvState, Array, Rng], Array]


class Rollout(NamedTuple):
    """One episode for each of B users. Items are -1 and rewards 0 from the leaving step on."""
    items: Array                        # int [B, T]
    rewards: Array                      # float [B, T]


def unseen(env: Env, users: Array) -> Array:
    """bool [B, m]: for each user the items outside the history."""
    free = np.ones((len(users), len(env.titles)), bool)
    for row, user in enumerate(users):
        # An empty list would make an array of floats, which cannot be an index.
        free[row, np.asarray(env.histories[user], int)] = False
    return free


def rollout(env: Env, users: Array, policy: Policy, rng: Rng) -> Rollout:
    """One episode for each of B users. No user gets an item twice while another is free."""
    state, free = reset(env, users), unseen(env, users)
    active = np.ones(len(users), bool)
    items = np.full((len(users), env.max_steps), -1)
    rewards = np.zeros(items.shape)
    for t in range(env.max_steps):
        # users who left are stepped too, which keeps the arrays [B]; nothing of it is recorded
        item = policy(env, state, free, rng)
        state, reward, left, _ = step(env, state, item)
        free[np.arange(len(users)), item] = False
        active = active & ~left
        items[active, t] = item[active]
        rewards[active, t] = reward[active]
        if not active.any():
            break
    return Rollout(items, rewards)


def best(score: Array, allowed: Array) -> Array:
    """int [B]: the allowed item with the highest score [B, m] or [m]; the first of equals."""
    return np.argmax(np.where(allowed, score, -np.inf), -1)


def best_at_random(score: Array, allowed: Array, rng: Rng) -> Array:
    """int [B]: an allowed item with the highest score, ties broken at random.

    The score is [B, m], or 0 if all items are equal. Random numbers below 10^-6 are added.
    """
    return best(score + 1e-6 * rng.random(allowed.shape), allowed)


def preferred(good: Array, free: Array) -> Array:
    """bool [B, m]: for each user the free items that are good, or if none is, all free items."""
    both = good & free
    has_one = both.any(-1, keepdims=True)
    return np.where(has_one, both, free)


def random(env: Env, state: EnvState, free: Array, rng: Rng) -> Array:
    """A free item, drawn with equal chances."""
    return best_at_random(0, free, rng)


# Two policies see the user's own ratings, which no real recommender knows.


def greedy(env: Env, state: EnvState, free: Array, rng: Rng) -> Array:
    """The free item that the user rates best. It does not look ahead."""
    sessions, every = with_every_item(env, state)
    return best(env.rate(sessions.user, every), free)


def oracle(env: Env, state: EnvState, free: Array, rng: Rng) -> Array:
    """The item that the user rates best among the free items that do not make the user leave.

    If there is none, it is the best of all free items. It knows the rule but does not plan, so it
    is not proven to be an upper bound. In practice nearly every user stays to the cap.
    """
    sessions, every = with_every_item(env, state)
    ratings = env.rate(sessions.user, every)
    stays = ~leaves(env, sessions, every, ratings)
    return best(ratings, preferred(stays, free))


# Two policies see the learners' ratings. They rank the items in the same order for everybody.


def popularity(env: Env) -> Array:
    """float [m]: each item's mean rating over the learners."""
    every = np.arange(len(env.titles))
    total = np.zeros(len(every))
    for user in range(env.learners):
        total += env.rate(user, every)
    return total / max(env.learners, 1)


def popular(appeal: Array, env: Env, state: EnvState, free: Array, rng: Rng) -> Array:
    """The free item with the most appeal [m]. `partial(popular, popularity(env))` is a `Policy`."""
    return best(appeal, free)


def one_list(appeal: Array, env: Env, state: EnvState, free: Array, rng: Rng) -> Array:
    """The item with the most appeal [m] among the free ones that are not too similar.

    If all free items are too similar, it is the one with the most appeal among them.
    """
    sessions, every = with_every_item(env, state)
    different = ~too_similar(env, distance_to_recent(env, sessions, every))
    return best(appeal, preferred(different, free))


# Two policies are rules that see categories, not ratings.


def rows_of_recent(rows: Array, state: EnvState) -> Array:
    """[B, W, k]: the rows [m, k] of the last W items; zeros for an empty slot."""
    # an empty slot is -1, which indexes the last row: it is replaced by zeros
    filled = (state.recent >= 0)[..., None]
    return np.where(filled, rows[state.recent], 0)


def overlap(env: Env, state: EnvState) -> Array:
    """float32 [B, m]: how many of an item's categories occur among the last W items."""
    occur = rows_of_recent(env.belongs, state).any(1)           # [B, c]
    return occur.astype(np.float32) @ env.belongs.T


def mean_liked(rows: Array, env: Env, users: Array) -> Array:
    """float32 [B, k]: the mean of the items' rows [m, k] over each user's history."""
    member = (~unseen(env, users)).astype(np.float32)           # [B, m]: 1 in the history, else 0
    return member @ rows / np.maximum(member.sum(1, keepdims=True), 1)


def affinity(env: Env, state: EnvState) -> Array:
    """float [B, m]: how much of the user's history lies in the categories of each item.

    The share of a category is the part of the liked items that have it. The affinity is the mean
    share over the item's categories. If 4 of 10 liked items are in War and 2 in Drama, it is
    (0.4 + 0.2) / 2 for an item in both.
    """
    share = mean_liked(env.belongs, env, state.user)            # [B, c]: of the history
    sizes = np.maximum(env.belongs.sum(1), 1)                   # [m]: categories of each item
    return share @ env.belongs.T / sizes


def fresh(env: Env, state: EnvState, free: Array) -> Array:
    """bool [B, m]: the free items that share no category with the last W, or else all free ones."""
    return preferred(overlap(env, state) == 0, free)


def varied(env: Env, state: EnvState, free: Array, rng: Rng) -> Array:
    """One of the `fresh` items, drawn with equal chances."""
    return best_at_random(0, fresh(env, state, free), rng)


def common_sense(env: Env, state: EnvState, free: Array, rng: Rng) -> Array:
    """The `fresh` item with the highest affinity."""
    return best_at_random(affinity(env, state), fresh(env, state, free), rng)


# ------------------------------------ policies that learn: a bandit, and an actor and critic


def new_sessions(env: Env, episodes: int, rounds: int,
                 rng: Rng) -> Iterator[tuple[EnvState, Array]]:
    """Episodes in rounds: yields the new sessions of each round, and what is free in them.

    The caller plays the sessions of a round side by side, a step at a time. Learners are taken in a
    random order, again and again until there are enough. With fewer episodes than rounds some
    rounds are empty.
    """
    if env.learners == 0:           # `np.resize` turns an empty list into zeros, and 0 is a user
        return
    users = np.resize(rng.permutation(env.learners), episodes)      # repeats the order
    for group in np.array_split(users, rounds):
        yield reset(env, group), unseen(env, group)


def remaining(state: EnvState, free: Array, item: Array, over: Array) -> tuple[EnvState, Array]:
    """The sessions that go on, and the items still free in them."""
    on = ~over
    still_free = free[on]               # a copy
    still_free[np.arange(len(still_free)), item[on]] = False
    return EnvState(*[part[on] for part in state]), still_free


def features(env: Env, state: EnvState) -> Array:
    """float [B, m, 4]: distance to the nearest of the last W, overlap, affinity, 1."""
    sessions, every = with_every_item(env, state)
    # At the first step the distance is infinite, which a regression cannot use. So it has a cap.
    # Worlds measure distance in different units, so the cap is a multiple of the world's beta.
    distance = np.minimum(distance_to_recent(env, sessions, every), 2 * env.beta)
    one = np.ones_like(distance)
    return np.stack([distance, overlap(env, state), affinity(env, state), one], -1)


def bandit(weights: Array, env: Env, state: EnvState, free: Array, rng: Rng) -> Array:
    """The free item with the highest predicted reward. `partial(bandit, weights)` is a `Policy`."""
    return best_at_random(features(env, state) @ weights, free, rng)


def learn_bandit(env: Env, episodes: int, seed: int = 0) -> Policy:
    """A linear contextual bandit: ridge regression of the next reward on `features`, penalty 1.

    It learns from the rewards of its own episodes and does not look ahead. While it learns, it
    recommends a random item one time in ten.
    """
    rng = branch(seed, "bandit")
    # The weights solve square @ weights = product. Here square is the penalty times the identity
    # plus the sum of outer(x, x), and product is the sum of reward * x, over recommended items.
    square, product = np.eye(4), np.zeros(4)
    for state, free in new_sessions(env, episodes, rounds=100, rng=rng):
        while len(free) > 0:
            x = features(env, state)
            predicted = x @ np.linalg.solve(square, product)
            explores = rng.random((len(x), 1)) < 0.1
            # scores of 0 are all equal, so `best_at_random` takes any
            item = best_at_random(np.where(explores, 0, predicted), free, rng)
            state, reward, left, cut = step(env, state, item)
            chosen = x[np.arange(len(x)), item]
            square += chosen.T @ chosen
            product += reward @ chosen
            state, free = remaining(state, free, item, left | cut)
    return partial(bandit, np.linalg.solve(square, product))


ENTROPY = 0.05      # weight of the entropy of the actor's choices
# Size of a learning step. Of 0.03, 0.1, 0.3, 1 and 3 it is the best with 100 and 1,000 episodes of
# `films`, seeds 0 to 4.
RATE = 0.3


class Weights(NamedTuple):
    """What the actor-critic learns.

    It sees a session as x = [mean vector of the history, sum of the last W vectors, 1].
    """
    match: Array                        # [2d + 1, d]: x @ match @ an item's vector is its fit to x
    appeal: Array                       # [m]: of each item, to anyone
    value: Array                        # [2d + 1]: V(s) = x @ value


def observe(env: Env, state: EnvState) -> Array:
    """float32 [B, 2d + 1]: x of each session."""
    taste = mean_liked(env.vectors, env, state.user)
    recent = rows_of_recent(env.vectors, state).sum(1)
    one = np.ones_like(taste[:, :1])
    return np.hstack([taste, recent, one])


def log_chances(env: Env, weights: Weights, x: Array, items: Array, free: Array) -> Array:
    """float [B, k]: the logarithm of the chance that the actor takes each of k items.

    free [B, k] tells which it may take. A user for whom none is free gets any.
    """
    fit = x @ weights.match @ env.vectors[items].T + weights.appeal[items]
    # not -inf, because 0 * -inf would make the entropy NaN
    fit = np.where(free, fit, -1e6)
    return fit - np.logaddexp.reduce(fit, 1, keepdims=True)


def td_errors(reward: Array, gamma: float, value: Array, next_value: Array, left: Array) -> Array:
    """float [B]: the advantage, as in `billp.py`, for B sessions. A user who left has no future."""
    future = np.where(left, 0, next_value)
    return reward + gamma * future - value


def gradient(env: Env, x: Array, items: Array, log_chance: Array, pick: Array,
             td_error: Array) -> Weights:
    """The slopes of the objectives, summed over B sessions.

    The weights `match` and `appeal` have the objective td_error * log_chance[pick] + ENTROPY *
    entropy, in which td_error counts as a constant. The weights `value` have the objective
    -(target - V(s))^2 / 2, in which the target is constant; td_error is target - V(s).
    """
    chance = np.exp(log_chance)
    entropy = -(chance * log_chance).sum(1, keepdims=True)
    picked = np.eye(len(items))[pick]           # [B, k]: 1 at the pick, 0 elsewhere
    # First the derivatives by fit [B, k], see `log_chances`. Both follow from the derivative of a
    # softmax, d chance_i / d fit_j = chance_i * ([i is j] - chance_j).
    of_pick = picked - chance                           # d log_chance[pick] / d fit
    # entropy = -sum_i chance_i * log_chance_i, so d entropy / d fit_j
    #     = -sum_i (log_chance_i + 1) * d chance_i / d fit_j
    #     = -chance_j * (log_chance_j + 1) + chance_j * sum_i chance_i * (log_chance_i + 1)
    #     = -chance_j * (log_chance_j + 1) + chance_j * (1 - entropy)
    of_entropy = -chance * (log_chance + entropy)
    by_fit = td_error[:, None] * of_pick + ENTROPY * of_entropy
    # Then the derivatives by the weights.
    # fit_j = x @ match @ vector_j + appeal_j, so d fit_j / d match is outer(x, vector_j)
    match = x.T @ by_fit @ env.vectors[items]           # [2d + 1, B] @ [B, k] @ [k, d]
    appeal = np.zeros(len(env.titles))
    appeal[items] = by_fit.sum(0)                       # d fit_j / d appeal_j is 1
    # V(s) = x @ value, so d V / d value is x
    value = td_error @ x
    return Weights(match, appeal, value)        # slopes in the shapes of the weights


def a2c(weights: Weights, env: Env, state: EnvState, free: Array, rng: Rng) -> Array:
    """The free item with the highest chance. `partial(a2c, weights)` is a `Policy`."""
    every = np.arange(len(env.titles))
    return best(log_chances(env, weights, observe(env, state), every, free), free)


def learn_a2c(env: Env, episodes: int, seed: int = 0, gamma: float = 0.5) -> Policy:
    """Advantage actor-critic, which learns at every step of many episodes side by side."""
    rng = branch(seed, "actor-critic")
    m, d = env.vectors.shape
    width = 2 * d + 1       # the length of x
    weights = Weights(np.zeros((width, d)), np.zeros(m), np.zeros(width))
    # the sums of the squared slopes so far
    squares = [np.full_like(weight, 1e-6) for weight in weights]
    # while it learns it chooses among a few items, which is quicker
    few = min(m, max(64, m // 16))
    for state, free in new_sessions(env, episodes, rounds=200, rng=rng):
        while len(free) > 0:
            x = observe(env, state)
            # the same for all sessions of this step
            items = rng.choice(m, few, replace=False)
            log_chance = log_chances(env, weights, x, items, free[:, items])
            # the Gumbel trick: the item with the largest sum is a draw with these chances
            pick = np.argmax(log_chance + rng.gumbel(size=log_chance.shape), 1)
            item = items[pick]
            state, reward, left, cut = step(env, state, item)
            next_value = observe(env, state) @ weights.value
            td_error = td_errors(reward, gamma, x @ weights.value, next_value, left)
            slopes = gradient(env, x, items, log_chance, pick, td_error)
            # A step of Adagrad up the slopes: a weight moves less if its slopes were steep. Here +=
            # changes the arrays of `weights` and `squares` in place.
            for weight, square, slope in zip(weights, squares, slopes):
                square += slope ** 2
                weight += RATE * slope / np.sqrt(square)
            state, free = remaining(state, free, item, left | cut)
    return partial(a2c, weights)


# Some policies are ready. The others are made for a world.
READY = {"random": random, "greedy": greedy, "varied": varied, "common-sense": common_sense,
         "oracle": oracle}
POLICIES = (*READY, "popular", "one-list", "bandit", "a2c")


def policy_named(name: str, env: Env, episodes: int = 0, seed: int = 0,
                 gamma: float = 0.5) -> Policy:
    """The policy of a name in POLICIES.

    Only bandit and a2c learn, from the given number of episodes. Only a2c has a discount gamma.
    """
    if name == "popular":
        return partial(popular, popularity(env))
    if name == "one-list":
        return partial(one_list, popularity(env))
    if name == "bandit":
        return learn_bandit(env, episodes, seed)
    if name == "a2c":
        return learn_a2c(env, episodes, seed, gamma)
    return READY[name]


# ------------------------------------------------------------------------------------ metrics

METRICS = ("Len", "R_each", "R_traj")


def scores(lengths: Sequence[int], returns: Sequence[float]) -> Array:
    """float [1, N, 2]: the length and the return of each of N episodes of one seed."""
    return np.stack([lengths, returns], -1).astype(float)[None]


def means(samples: Array) -> Array:
    """Scores [S, N, 2] -> [S, 3]: for each seed mean length, reward of a step and mean return.

    The reward of a step is all reward divided by all steps, or 0 without a step.
    """
    steps, reward = samples.mean(1).T
    return np.stack([steps, reward / np.maximum(steps, 1e-9), reward], -1)


def gains(samples: Array, reference: Array) -> Array:
    """By how much each of the three means exceeds that of the reference."""
    return means(samples) - means(reference)


# 0.975 quantiles of Student's t for 1, 2, ... degrees of freedom
STUDENT = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26)


def student(freedom: int) -> float:
    """The 0.975 quantile of Student's t, to within 0.005.

    >>> student(1), round(student(10), 2), round(student(29), 2)
    (12.71, 2.23, 2.05)
    """
    if freedom <= len(STUDENT):
        return STUDENT[freedom - 1]
    return 1.96 + 2.372 / freedom + 2.82 / freedom ** 2         # Cornish and Fisher's expansion


def intervals(statistic: Callable, *samples: Array) -> list[list[float]]:
    """[mean, low, high] of each number in statistic(*samples), with its 95 % confidence interval.

    - Samples are [S, N, k]: S seeds with N users each. All have the same users, because differences
      are paired. ValueError if their shapes differ.
    - The statistic takes [S, N, k] and returns [S, q]: q figures for each seed. The mean is taken
      over the seeds.
    - One seed: a percentile bootstrap interval over its users. The same users are drawn, with
      replacement, from all samples.
    - Several seeds: a t interval over the figures of the seeds. Users of one seed are not
      independent, because they share its world.
    """
    shapes = {np.shape(sample) for sample in samples}
    demand(len(shapes) == 1, f"give samples of the same seeds and users, not of shapes {shapes}")
    figures = statistic(*samples)                               # [S, q]
    mean, seeds = figures.mean(0), len(figures)
    if seeds > 1:
        margin = student(seeds - 1) * figures.std(0, ddof=1) / np.sqrt(seeds)
        low, high = mean - margin, mean + margin
    else:
        users = samples[0].shape[1]
        # more than 1000 draws would change the ends little
        drawn = np.random.default_rng(0).integers(users, size=(1000, users))
        # [1000, N, k]: the draws stand where the statistic expects seeds
        resampled = [sample[0][drawn] for sample in samples]
        low, high = np.quantile(statistic(*resampled), [0.025, 0.975], axis=0)
    return np.stack([mean, low, high], -1).round(4).tolist()


def metrics(samples: Array, reference: Array | None = None) -> dict[str, list[float]]:
    """[mean, low, high] of Len, R_each and R_traj of scores [S, N, 2].

    With a reference they are those of the paired differences.
    """
    if reference is None:
        return dict(zip(METRICS, intervals(means, samples)))
    return dict(zip(METRICS, intervals(gains, samples, reference)))


# ---------------------------------------------------------------------------- the films world

# the letters that stand after each film's year
CODES = {"A": "Action", "V": "Adventure", "N": "Animation", "K": "Children", "C": "Comedy",
         "R": "Crime", "O": "Documentary", "D": "Drama", "F": "Fantasy", "H": "Horror",
         "M": "Musical", "Y": "Mystery", "L": "Romance", "S": "Sci-Fi", "T": "Thriller",
         "W": "War", "X": "Western"}

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
    """float32 [n, d]: rows scaled to length 1; a row of zeros stays."""
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    return (rows / np.maximum(lengths, 1e-9)).astype(np.float32)


def category_table(tags: Sequence[Sequence[str]]) -> tuple[tuple[str, ...], Array]:
    """The categories that occur in the items' tags, sorted, and `belongs` of `Env`.

    >>> category_table([["War"], ["Drama", "War"]])[0]
    ('Drama', 'War')
    """
    names = sorted({tag for item_tags in tags for tag in item_tags})
    belongs = [np.isin(names, item_tags) for item_tags in tags]
    return tuple(names), np.array(belongs)


def made_up(belongs: Array, users: int, rng: Rng) -> Array:
    """int8 [n, m]: ratings of films, given their categories; see `films`.

    The numbers are chosen so that taste matters. A session is cut at 50 steps. With random items it
    lasts 3 to 5 on average, depending on the seed; with `one_list` it lasts at most 32 on average.
    """
    m, c = belongs.shape
    # archetypes and appeal are the same for every seed
    common = np.random.default_rng(0)
    archetypes = common.normal(size=(6, c))
    appeal = common.normal(size=m)

    taste = archetypes[rng.integers(6, size=users)]
    taste = taste + 0.8 * rng.normal(size=taste.shape)
    # The standard deviation of a sum of k independent tastes grows as the root of k. So the sum is
    # divided by the root.
    liking = taste @ (belongs / np.sqrt(belongs.sum(1, keepdims=True))).T
    noise = 0.5 * rng.normal(size=liking.shape)
    ratings = np.rint(3.8 + 2 * liking + 0.8 * appeal + noise)
    return np.clip(ratings, 1, 5).astype(np.int8)


def films(seed: int = 0) -> Env:
    """The built-in default: 200 well-known films, and users whose tastes are drawn from `seed`.

    Titles, years and categories are facts; ratings are made up. A rating is mostly taste: how much
    the user likes the film's categories. A user's taste is that of one of six archetypes, changed
    at random. The film's general appeal counts less, and noise least. Two films are too similar if
    the cosine of their weighted categories is above 0.595. That is about one pair in 25, mostly
    pairs that share at least half of their combined categories. A history is ten films, drawn
    without replacement with weights exp(rating); the order of the draw counts as the order of time.
    The agent learns from half of the users.
    """
    titles, years, letters = zip(*re.findall(r"(\S.*?) (\d{4}) ([A-Z]+)[;\n]", FILMS))
    tags = [[CODES[letter] for letter in word] for word in letters]
    categories, belongs = category_table(tags)
    # The square of a weight is log(1 / the category's frequency). That is what a shared category
    # adds to the dot product of two films, before their rows are scaled to length 1. So films that
    # share a rare one are nearer to each other.
    weight = np.sqrt(np.log(len(titles) / belongs.sum(0)))
    vectors = unit(belongs * weight)
    rng = np.random.default_rng(seed)
    ratings = made_up(belongs, 1000, rng)
    # the Gumbel trick: the ten largest of rating + Gumbel noise are a draw without replacement
    keys = ratings + rng.gumbel(size=ratings.shape)
    largest_first = np.argsort(-keys, 1)
    # Between vectors of length 1 a distance below 0.9 is a cosine above 1 - 0.9 ** 2 / 2 = 0.595.
    return Env(
        titles=titles, years=tuple(map(int, years)),
        categories=categories, belongs=belongs, vectors=vectors,
        rate=table(ratings), distance=euclidean(vectors),
        histories=largest_first[:, :10], learners=500, beta=0.9)


# ------------------------------------------------ data files: ratings, from MovieLens or anybody

ADVICE = ("the README tells what the files hold, in fields separated by commas; complete copies of "
          "MovieLens are at grouplens.org/datasets/movielens")
HEADERS = {"movies.dat": ["movieId", "title", "genres"],                # .dat files have no header
           "ratings.dat": ["userId", "movieId", "rating", "timestamp"]}
ALIASES = {"user": "userid user",
           "item": "itemid item movieid filmid bookid productid id isbn movie film book product",
           "title": "title movietitle itemtitle name",
           "year": "year releaseyear",
           "categories": "categories category genres genre tags",
           "rating": "rating score stars",
           "time": "time timestamp date"}
NO_TAG = ("", "unknown", "(no genres listed)")


class BadData(ValueError):
    """A data file is missing or malformed; one line names the file or folder and a remedy."""


def find_file(path: Location, *names: str, world: str = "") -> Path:
    """A file of one of these names in a folder or below it; ValueError if there is none.

    Of several it prefers those in a folder named after the world, of these the ones nearest to the
    top, and of these the one whose name stands first in `names`.
    """
    folder = Path(os.path.expanduser(path))         # an unknown ~name stays as it is
    demand(folder.is_dir(), "it is no folder")
    files = []
    for name in names:
        files += [file for file in sorted(folder.rglob(name)) if file.is_file()]
    demand(files, f"no {' or '.join(names)} in {folder} or below")

    def rank(file: Path) -> tuple[bool, int]:
        parts = file.relative_to(folder).parts          # folders, then the file's name
        return world not in parts, len(parts)           # False comes before True

    return min(files, key=rank)                         # the first of equals


@contextmanager
def in_one_line(place: Location, advice: str) -> Iterator[None]:
    """If the block of a `with` fails, its error becomes BadData: place, error, advice."""
    try:
        yield                       # the block runs here, so its errors arrive below
    except BadData:                 # it names its file already
        raise
    except Exception as error:      # damaged files make csv, json, numpy, pickle raise anything
        reason = str(error).partition("\n")[0] or type(error).__name__
        if isinstance(error, KeyError):
            reason = f"no key {reason}"
        raise BadData(f"{place}: {reason}; {advice}") from None


def encoding(file: Path) -> str:
    """UTF-8, with or without a byte order mark, if the whole file is valid; otherwise cp1252."""
    try:
        with file.open(encoding="utf-8-sig") as stream:
            for _ in stream:        # line by line, because files may be large
                pass
    except UnicodeDecodeError:
        return "cp1252"             # latin-1 with typographic quotes, dashes and trademarks
    return "utf-8-sig"


def columns(header: Sequence[str], needed: Sequence[str]) -> dict[str, int]:
    """The places of the columns in a header; ValueError if a needed one is missing.

    A column may have any of its ALIASES; if there are several, the first in ALIASES counts. Case
    and punctuation do not matter. Files of ratings need no title.

    >>> columns(["Title", "Movie_ID"], ["item"])
    {'item': 1, 'title': 0}
    >>> columns(["user", "user_id"], ["user"])
    {'user': 1}
    """
    demand(header, "the file is empty")
    plain = [re.sub(r"[\W_]", "", text).lower() for text in header]
    is_ratings_file = "title" not in needed
    places = {}
    for name, aliases in ALIASES.items():
        known = aliases.split()
        if name == "item" and is_ratings_file:
            known.remove("id")          # among ratings it is the number of the line, not an item
        present = [alias for alias in known if alias in plain]
        if present:
            places[name] = plain.index(present[0])
        elif name in needed:
            raise ValueError(f"no column for the {name} ({' '.join(known)}) in the first line, the "
                             f"header: {str(header):.80}")
    return places


def read_rows(file: Path, needed: Sequence[str], parse: Callable) -> Iterator:
    """parse(**row) of each line that is not empty, one line at a time.

    A ValueError, including one that parse raises, names the line.
    """
    with file.open(encoding=encoding(file), newline="") as stream:
        lines = csv.reader(stream, strict=True)
        if file.suffix == ".dat":
            # .dat files separate fields by two colons, and csv takes only one character
            tabbed = (line.replace("::", "\t") for line in stream)
            lines = csv.reader(tabbed, delimiter="\t", quoting=csv.QUOTE_NONE)
        try:
            rows = (cells for cells in lines if "".join(cells).strip())
            header = HEADERS.get(file.name) or next(rows, [])
            places = columns(header, needed)
            for cells in rows:
                is_whole = len(cells) == len(header)
                demand(is_whole, f"{len(cells)} fields instead of {len(header)}")
                yield parse(**{name: cells[place].strip() for name, place in places.items()})
        except (ValueError, csv.Error) as error:
            raise ValueError(f"{file}: line {lines.line_num}: {error}") from None


# "Matrix, The": the article stands at the end, or before a parenthesis
ARTICLE = r"^([^(]*), (The|A|An|Les?|La|L'|Il|El|Los|Las|Das|Der|Die|Une?)(?= \(|$)"


def split_title(text: str) -> tuple[str, int | None]:
    """The title with its article first, and the year at the end of the text, or None.

    >>> split_title("Matrix, The (1999)")
    ('The Matrix', 1999)
    >>> split_title("Avventura, L' (Adventure, The) (1960)")
    ("L'Avventura (Adventure, The)", 1960)
    >>> split_title("Babylon 5 (1994-1998)"), split_title("Say (now")
    (('Babylon 5', 1994), ('Say (now', None))
    """
    title, year = " ".join(text.split()), None
    # (?<=.): something must stand before the year, or else it is itself the title
    at_end = re.search(r"(?<=.) ?\((\d{4})([-–]\d*)?\)$", title)
    if at_end:
        title, year = title[:at_end.start()], int(at_end[1])
    title = re.sub(ARTICLE, r"\2 \1", title)
    return re.sub("^L' ", "L'", title), year        # this article takes no space


def parse_entry(items: dict, item: str, title: str, year: str = "", categories: str = "",
                **others: str) -> tuple:
    """The title, year and tags of an item. It adds the item's id and number to `items`."""
    demand(item and title, "an item without id or title")
    demand(item not in items, f"item {item} is listed twice")
    items[item] = len(items)
    name, when = split_title(html.unescape(title))
    digits = re.search(r"\d{4}", year)
    if digits:
        when = int(digits.group())
    categories = html.unescape(categories)      # "Children&#39;s"
    wrong_separator = re.search(r"^[\[{]|;", categories)        # ['War', 'Drama'] or War;Drama
    demand(not wrong_separator, 'separate categories by "|", as in War|Drama')
    tags = [tag.strip() for tag in categories.split("|")]
    return name, when, [tag for tag in tags if tag not in NO_TAG]


def timestamp(text: str) -> float:
    """A time written as a number or as a date like 2005-04-02 23:53:47, as a number; "" is 0.

    >>> timestamp("2005-04-02T23:53:47.5+02:00") - timestamp("2005-04-02 21:53:40")
    7.5
    """
    try:
        return float(text or 0)
    except ValueError:
        # Before Python 3.11 a date may not end in Z, and seconds need 3 or 6 decimals. So decimals
        # are cut, or filled with zeros, to a dot and six digits.
        text = re.sub(r"\.\d+", lambda match: match[0][:7].ljust(7, "0"), text)
        date = datetime.fromisoformat(text.replace("Z", "+00:00"))
        # without a time zone it counts as UTC, so that it means the same everywhere
        return date.replace(tzinfo=date.tzinfo or timezone.utc).timestamp()


# votes are an array [N] of such records, in which users and items are numbers
VOTE = [("user", int), ("item", int), ("rating", float), ("time", float)]


def parse_vote(users: dict, items: dict, user: str, item: str, rating: str, time: str = "",
               **others: str) -> tuple:
    """A rating as a record of VOTE. `users` and `items` map ids to numbers; new users are added."""
    demand(user, "a rating without user")
    demand(rating, "a line without rating")
    number = float(rating)
    demand(np.isfinite(number), f"the rating {rating} is not finite")
    demand(item in items, f"item {item} is not in the list of items")
    return users.setdefault(user, len(users)), items[item], number, timestamp(time)


def rescaled(ratings: Array) -> tuple[Array, str]:
    """Ratings, and a note for `Env.about`. If any lies outside 0.5..5, all are mapped onto 1..5.

    0.5..5 is the scale of half stars. The world's ratings are 1..5, see `stars`.

    >>> rescaled(np.array([0, 50, 100]))
    (array([1., 3., 5.]), ', mapped linearly from 0..100 onto 1..5')
    """
    low, high = ratings.min(), ratings.max()
    demand(low < high, f"every rating is {low:g}")
    if low >= 0.5 and high <= 5:
        return ratings, ""
    mapped = 1 + 4 * (ratings - low) / (high - low)
    return mapped, f", mapped linearly from {low:g}..{high:g} onto 1..5"


def groups(keys: Array) -> list[Array]:
    """For each distinct key, in increasing order, the indices at which it stands.

    >>> groups(np.array([7, 5, 7]))
    [array([1]), array([0, 2])]
    """
    order = np.argsort(keys, kind="stable")
    starts_of_new_keys = np.flatnonzero(np.diff(keys[order])) + 1
    return np.split(order, starts_of_new_keys)


def ridge(row_of_rating: Array, fixed_row_of_rating: Array, ratings: Array, fixed: Array,
          count: int) -> Array:
    """Fit the rows of one side, users or items, while the rows `fixed` of the other side stay.

    float32 [count, k + 1]: k factors and then a bias for each row. Rating i belongs to row
    row_of_rating[i] of the fitted side and to row fixed_row_of_rating[i] of the fixed side. Ratings
    come without the global offset.
    The penalty on a bias is 3, that on a factor 3 + a tenth of the row's number of ratings.
    """
    # rating - fixed bias = [fixed factors, 1] @ [fitted factors, fitted bias]
    targets = ratings - fixed[fixed_row_of_rating, -1]
    inputs = fixed.copy()
    inputs[:, -1] = 1
    width = fixed.shape[1]
    fitted = np.zeros((count, width), np.float32)
    for group in groups(row_of_rating):         # the ratings of one row
        x = inputs[fixed_row_of_rating[group]]
        penalty = np.full(width, 3 + len(group) / 10)
        penalty[-1] = 3
        row = row_of_rating[group[0]]
        fitted[row] = np.linalg.solve(x.T @ x + np.diag(penalty), x.T @ targets[group])
    return fitted


class Factorisation(NamedTuple):
    """A rating is offset + the user's bias + the item's bias + the product of their factors."""
    p: Array                            # float32 [n, rank + 1]: each user's factors and bias
    q: Array                            # float32 [m, rank + 1]: each item's factors and bias
    offset: float


def predict(model: Factorisation, users: Array, items: Array) -> Array:
    """float [...]: the ratings of items [...] by users [...], not yet whole numbers."""
    p, q = model.p[users], model.q[items]
    products = np.einsum("...k,...k->...", p[..., :-1], q[..., :-1])
    biases = p[..., -1] + q[..., -1]
    ratings = model.offset + biases + products
    # The last digits depend on the shape of the arrays. Rounding makes them the same in any shape.
    return ratings.round(5)


def star_limits(model: Factorisation, votes: Array) -> Array:
    """[4]: the lowest predictions that become a rating of 2, 3, 4 and 5.

    A fitted model predicts few high and few low ratings, and users would rarely be disappointed.
    With these limits each rating is as frequent among the predictions for the votes as among the
    votes themselves. Half stars are rounded up.
    """
    shares_below = np.array([(votes["rating"] < edge).mean() for edge in (1.5, 2.5, 3.5, 4.5)])
    limits = np.quantile(predict(model, votes["user"], votes["item"]), shares_below)
    # Predictions for other pairs may be lower or higher than those for the votes. Infinite limits
    # keep their ratings between the lowest and the highest vote.
    limits[shares_below == 0] = -np.inf     # if nobody voted 1, no prediction becomes 1
    limits[shares_below == 1] = np.inf      # if nobody voted 5, no prediction becomes 5
    return limits


def stars(model: Factorisation, limits: Array, users: Array, items: Array) -> Array:
    """float [...]: predicted ratings 1, 2, ... 5. `partial(stars, model, limits)` is a `rate`."""
    return 1.0 + np.searchsorted(limits, predict(model, users, items), side="right")


def als(votes: Array, n: int, m: int, rank: int) -> Factorisation:
    """Alternating least squares: ten times it fits the users' rows, then the items' rows."""
    users, items, offset = votes["user"], votes["item"], votes["rating"].mean()
    ratings = votes["rating"] - offset
    q = 0.1 * np.random.default_rng(0).standard_normal((m, rank + 1), np.float32)
    q[:, -1] = 0
    for _ in range(10):
        p = ridge(users, items, ratings, q, n)
        q = ridge(items, users, ratings, p, m)
    return Factorisation(p, q, float(offset))


def rmse(model: Factorisation, votes: Array) -> float:
    """The root of the mean squared error of the predicted ratings; 0 if there are none."""
    errors = predict(model, votes["user"], votes["item"]) - votes["rating"]
    return np.sqrt(np.square(errors).sum() / max(len(errors), 1))


def last_distinct(items: Sequence[int]) -> Array:
    """The last 20 distinct items. An item that comes twice keeps its later place.

    >>> last_distinct([3, 1, 3, 2])
    array([1, 3, 2])
    """
    # a dict keeps the order, and each item once
    newest_first = list(dict.fromkeys(items[::-1]))
    return np.array(newest_first[:20][::-1], int)


def liked_items(votes: Array) -> list[Array]:
    """Each user's history: the last 20 items rated 4 or more.

    A user without such an item gets the last 20 items of his or her highest rating.
    Votes are in the order of time for each user. Each of the users 0, 1, 2, ... has a vote.
    """
    histories = []
    for group in groups(votes["user"]):         # of user 0, 1, 2, ...
        own = votes[group]
        threshold = min(4, own["rating"].max())
        good = own["rating"] >= threshold
        histories.append(last_distinct(own["item"][good].tolist()))
    return histories


def similarity(belongs: Array, factors: Array, fitted: bool, one: Array,
               other: Array) -> tuple[str, Array, float]:
    """What makes items similar, in words; the items' vectors [m, d] for it; and beta.

    `belongs` is that of `Env`; `factors` [m, k] are fitted to the ratings. `one` and `other`, both
    [pairs], are random pairs of items.
    """
    if belongs.any() and not fitted:
        return "categories", unit(belongs), 0.9         # the beta of `films`
    # Fitted distances have no natural limit. Our choice: one pair in five is too similar.
    vectors = unit(factors)
    beta = float(np.quantile(length_between(vectors, 0, one, other), 0.2))
    words = "fitted vectors"
    if not belongs.any():               # perhaps the column of categories was not recognised
        words += ", no item has a category"
    return words, vectors, beta


def predicted_world(entries: Sequence[tuple], votes: Array, n: int, seed: int, fitted: bool) -> Env:
    """A world of n users whose ratings `als` predicts from votes, an array of VOTE.

    `entries` are the items: (title, year, categories). Similarity is by categories, because prompts
    show them. If `fitted`, or if no item has a category, it is by fitted vectors. `about` states
    the error on a held-out tenth of the votes, and how many pairs of items are too similar.
    """
    rng = branch(seed, "data")
    m, size = len(entries), len(votes)
    # a copy, sorted by user, then by time: for lexsort the last key counts most
    votes = votes[np.lexsort((votes["time"], votes["user"]))]
    # Users get random numbers, because the first half is learned from. The votes of each user stay
    # in the order of time.
    votes["user"] = rng.permutation(n)[votes["user"]]
    votes["rating"], note = rescaled(votes["rating"])
    is_test = rng.permutation(size) < size // 10            # true for a random tenth
    train, test = votes[~is_test], votes[is_test]
    model = als(train, n, m, rank=12)
    biases = als(train, n, m, rank=0)       # no factors: biases alone
    titles, years, tags = zip(*entries)
    categories, belongs = category_table(tags)
    # Random pairs of different items. An item without ratings is left out: its factors are 0.
    rated = np.unique(train["item"])
    demand(len(rated) > 1, "fewer than two items with ratings")
    one, other = rng.choice(rated, size=(2, 100_000))
    one, other = one[one != other], other[one != other]
    words, vectors, beta = similarity(belongs, model.q[:, :-1], fitted, one, other)
    share = (length_between(vectors, 0, one, other) < beta).mean()
    about = (f"{size} ratings{note}; {len(categories)} categories; "
             f"RMSE on a held-out tenth {rmse(model, test):.3f}, "
             f"by biases alone {rmse(biases, test):.3f}; "
             f"{share:.0%} of pairs too similar by {words}; beta {beta:.2f}")
    return Env(
        titles=titles, years=years, categories=categories, belongs=belongs, vectors=vectors,
        rate=partial(stars, model, star_limits(model, train)), distance=euclidean(vectors),
        histories=liked_items(votes), learners=n // 2, beta=beta, about=about)


def ratings_folder(path: Location, seed: int = 0, fitted: bool = False) -> Env:
    """The world of anybody's ratings: a folder with `items.csv` and `ratings.csv`.

    items.csv: id, title, optional year, optional categories separated by "|". ratings.csv: user,
    item, rating, optional time. The header names the columns by any of ALIASES, in any order; other
    columns are ignored. An id may be any text. Ratings of another scale are mapped: see `rescaled`.
    Two items are too similar if the cosine of their categories is above 0.595 (a distance below
    0.9), or if neither has a category. With `fitted`, or if no item of the world has a category,
    vectors fitted to the ratings decide instead.
    MovieLens as GroupLens ships it is such a folder, also with .dat files (ml-1m and ml-10M).
    BadData if a file is missing or malformed.
    """
    items, users = {}, {}               # the number of each id; the parsers add to them
    with in_one_line(path, ADVICE):
        item_file = find_file(path, "items.csv", "movies.csv", "movie.csv", "movies.dat")
        parse = partial(parse_entry, items)
        entries = list(read_rows(item_file, ("item", "title"), parse))
        names = ["ratings.dat"] if item_file.suffix == ".dat" else ["ratings.csv", "rating.csv"]
        rating_file = find_file(item_file.parent, *names)
        parse = partial(parse_vote, users, items)
        rows = read_rows(rating_file, ("user", "item", "rating"), parse)
        votes = np.fromiter(rows, VOTE)
        demand(len(users) > 1, "fewer than two users")
        return predicted_world(entries, votes, len(users), seed, fitted)


movielens = ratings_folder          # a MovieLens folder is one of them


# ------------------------------------------------------- data files: the authors' two worlds

AUTHORS = "complete copies are in the authors' repository, github.com/jizhi-zhang/BiLLP"

# what a pickled numpy array is made of; numpy 2 writes numpy._core for numpy.core
ADMITTED = ("numpy.ndarray", "numpy.dtype",
            "numpy.core.multiarray._reconstruct", "numpy._core.multiarray._reconstruct",
            "numpy.core.numeric._frombuffer", "numpy._core.numeric._frombuffer")


class ArraysOnly(pickle.Unpickler):
    """An unpickler that reads numpy arrays and refuses everything else.

    pickle calls `find_class` for each function or class that a file names.
    """

    def find_class(self, module: str, name: str) -> Any:
        if f"{module}.{name}" not in ADMITTED:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which is refused")
        return super().find_class(module, name)


def load(path: Location, world: str, name: str) -> Any:
    """The content of a .json file, or the matrix in a .npy file (memory-mapped) or a pickle."""
    file = find_file(path, name, world=world)
    with in_one_line(file, AUTHORS):
        if file.suffix == ".json":
            return json.loads(file.read_bytes())
        if file.suffix == ".npy":
            matrix = np.load(file, "r")         # it refuses a pickle
        else:
            with file.open("rb") as stream:
                matrix = np.asarray(ArraysOnly(stream).load())
        is_sound = matrix.ndim == 2 and np.isfinite(matrix).all()
        demand(is_sound, "it does not hold one matrix of finite numbers")
        return matrix


def distance_by_half(learners: int, train: Array, test: Array, users: Array, a: Array,
                     b: Array) -> Array:
    """Distances from one matrix [m, m] for learners and from another for the others."""
    return np.where(users < learners, train[a, b], test[a, b])


def released(path: Location, world: str) -> Env:
    """The authors' world "steam" or "amazon", from their files anywhere under path.

    The agent learns from the users of train.json; those of test.json are held out. Only `a2c` sees
    the vectors, which are the genres as rows of length 1. BadData if a file is missing or
    malformed.
    """
    halves = ("train", "test")
    with in_one_line(path, AUTHORS):
        predicted = [load(path, world, f"{world}_{half}.npy") for half in halves]
        distances = [load(path, world, f"{half}_distance_mat.pickle") for half in halves]
        m = predicted[0].shape[1]
        for matrix in distances:
            demand(matrix.shape == (m, m), f"the distances do not fit {m} items")
        names = load(path, world, "datamaps.json")["id2item_dict"]
        titles = [html.unescape(names[str(item)]) for item in range(m)]
        sources = load(path, world, "list_genre.json")   # lists of genres, written as Python source
        genres = {html.unescape(title): ast.literal_eval(sources[title]) for title in sources}
        categories, belongs = category_table([genres.get(title, []) for title in titles])
        item_of_title = {title: item for item, title in enumerate(titles)}
        ratings, histories = [], []
        for half, matrix in zip(halves, predicted):
            people = load(path, world, f"{half}.json")
            rows = [int(person["userid_encoded"]) for person in people]     # of the matrix
            ratings.append(matrix[rows])
            for person in people:
                seen = map(html.unescape, person["pos_seq_name"])       # titles, oldest first
                items = [item_of_title[title] for title in seen if title in item_of_title]
                histories.append(last_distinct(items))
        learners = len(ratings[0])          # the users of train.json
        return Env(
            titles=tuple(titles), years=(None,) * m,
            categories=categories, belongs=belongs, vectors=unit(belongs),
            # predictions may lie outside the scale
            rate=table(np.clip(np.concatenate(ratings), 1, 5)),
            distance=partial(distance_by_half, learners, *distances),
            histories=histories, learners=learners,
            beta={"steam": 50.0, "amazon": 15.0}[world],        # the paper's
            grace=1)                # in the authors' code the first item ends no session
