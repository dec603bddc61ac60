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
    return an array of that shape. `table`, `factors` and `euclidean` make such functions.
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
    """What `predict` gives, rounded and clipped to 1..5."""
    return np.clip(np.rint(predict(p, q, offset, users, items)), 1, 5)


def factors(p: Array, q: Array, offset: float) -> Function:
    """A `rate` that predicts ratings from user factors p [n, k] and item factors q [m, k]."""
    return partial(rounded, p, q, offset)


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


def leaves(env: Env, state: EnvState, item: Array, rating: Array) -> Array:
    """bool [...]: whether each user leaves at an item that he or she would give this rating."""
    apart = env.distance(state.user[..., None], state.recent, item[..., None])
    too_alike = ((apart < env.beta) & (state.recent >= 0)).any(-1)
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

    All ratings are checked if there are at most 10^7, otherwise 10^6 of them.
    """
    n, m, c = len(env.histories), len(env.titles), len(env.categories)
    demand(n > 0 and m > 0, "a world needs at least one user (histories) and one item (titles)")
    demand(0 <= env.learners <= n, f"learners is {env.learners} for {n} histories")
    d = np.shape(env.vectors)[-1] if np.ndim(env.vectors) else 0
    for field, shape in {"years": (m,), "belongs": (m, c), "vectors": (m, d)}.items():
        actual = np.shape(getattr(env, field))
        demand(actual == shape, f"{field} has shape {actual} instead of {shape}")
    demand(np.isfinite(env.vectors).all(), "vectors holds a number that is not finite")
    for user, history in enumerate(env.histories):
        items = np.asarray(history)
        demand(items.ndim == 1, f"the history of user {user} is not a list of items")
        if len(items) > 0:
            demand(items.dtype.kind in "iu", f"the history of user {user} does not hold integers")
            inside = items.min() >= 0 and items.max() < m
            demand(inside, f"the history of user {user} has an item outside 0..{m - 1}")
    check_functions(env, n, m)


def check_functions(env: Env, n: int, m: int) -> None:
    """Raise a ValueError of one line if `rate` or `distance` does not fit n users and m items."""
    users, items = np.arange(n), np.arange(m)
    if n * m > 10 ** 7:
        rng = np.random.default_rng(0)
        users, items = rng.integers(n, size=1000), rng.integers(m, size=1000)
    try:
        ratings = np.asarray(env.rate(users[:, None], items))
        apart = np.asarray(env.distance(0, items, items[0]))
    except IndexError as error:
        raise ValueError(f"rate or distance fails for {n} users and {m} items: {error}") from None
    demand(ratings.shape == (len(users), len(items)), f"rate gives the shape {ratings.shape}")
    demand(apart.shape == items.shape, f"distance gives the shape {apart.shape}")
    demand(not np.isnan(apart).any(), "a distance is not a number")
    wrong = ~((ratings >= 1) & (ratings <= 5))          # also where a rating is not a number
    if wrong.any():
        row, column = np.argwhere(wrong)[0]
        raise ValueError(f"user {users[row]} rates item {items[column]} {ratings[row, column]}, "
                         "which is not between 1 and 5")


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


def random(env: Env, state: EnvState, free: Array, rng: Rng) -> Array:
    """Any free item, each as likely."""
    return np.argmax(rng.random(free.shape, np.float32) * free, -1)


def popularity(env: Env) -> Array:
    """float [m]: each item's mean rating over the learners."""
    every = np.arange(len(env.titles))
    total = np.zeros(len(every))
    for user in range(env.learners):
        total += env.rate(user, every)
    return total / max(env.learners, 1)


def popular(appeal: Array, env: Env, state: EnvState, free: Array, rng: Rng) -> Array:
    """The free item of most appeal [m]. `partial(popular, popularity(env))` is a `Policy`."""
    return np.argmax(np.where(free, appeal, -np.inf), -1)


def greedy(env: Env, state: EnvState, free: Array, rng: Rng) -> Array:
    """The free item of the best rating now, without a thought of what comes after."""
    ratings = env.rate(state.user[:, None], np.arange(free.shape[1]))
    return np.argmax(np.where(free, ratings, -np.inf), -1)


def oracle(env: Env, state: EnvState, free: Array, rng: Rng) -> Array:
    """The best rating among the free items that do not make the user leave.

    If all do, it takes the first free item. For films with the default rule this is an upper bound
    in practice, which is not proven.
    """
    every, best = np.arange(free.shape[1]), []
    # one user at a time, because all their distances at once would need much memory
    for user, recent, t, free_items in zip(*state, free):
        ratings = env.rate(user, every)
        left = leaves(env, EnvState(user, recent, t), every, ratings)
        best.append(np.argmax(np.where(free_items & ~left, 1 + ratings, free_items)))
    return np.array(best)


# ----------------------------------------------------- a policy that learns: actor and critic

CHOICES = 48        # items that the learner chooses among at a step; a 16th of all if that is more
ENTROPY = 0.05      # weight of the learner's bonus for keeping its choices open


class Weights(NamedTuple):
    """What the actor-critic learns.

    It sees a session as x = [mean vector of the history, sum of the last W vectors, 1].
    """
    match: Array                        # float32 [2d + 1, d]: x @ match is the vector that fits
    appeal: Array                       # float32 [m]: of each item, to anyone
    value: Array                        # float32 [2d + 1]: V(s) = x @ value


def tastes(env: Env, users: Array) -> Array:
    """float32 [B, d]: the mean vector of each user's history."""
    means = np.zeros((len(users), env.vectors.shape[1]), np.float32)
    for row, user in enumerate(users):
        vectors = env.vectors[np.asarray(env.histories[user], int)]
        means[row] = vectors.sum(0) / max(len(vectors), 1)
    return means


def observe(env: Env, state: EnvState, taste: Array) -> Array:
    """float32 [B, 2d + 1]: x of each session, given the users' tastes [B, d]."""
    filled = (state.recent >= 0)[..., None]
    recent = (env.vectors.take(state.recent, 0) * filled).sum(1)
    one = np.ones((len(taste), 1), np.float32)
    return np.hstack([taste, recent, one])


def logits(env: Env, weights: Weights, x: Array, items: Array, free: Array) -> Array:
    """float32 [B, c]: how well c items fit each session; free [B, c] tells which may be taken."""
    fit = x @ weights.match @ env.vectors[items].T + weights.appeal[items]
    return np.where(free, fit, np.float32(-1e6))


def sample(fit: Array, rng: Rng) -> tuple[Array, Array]:
    """From logits [B, c]: logarithms of the softmax [B, c], and a draw from each row [B]."""
    shifted = fit - fit.max(1, keepdims=True)
    log = shifted - np.log(np.exp(shifted).sum(1, keepdims=True))
    ladder = np.cumsum(np.exp(log), 1)
    draw = rng.random((len(fit), 1), np.float32) * ladder[:, -1:]
    return log, np.argmax(ladder > draw, 1)


def gradient(env: Env, x: Array, items: Array, log: Array, pick: Array,
             advantage: Array) -> Weights:
    """The slope, uphill, of the sum over B sessions of advantage * log[pick] + ENTROPY * entropy.

    For `value` it is the slope, downhill, of half the critic's squared error with the target fixed.
    """
    chance = np.exp(log)
    entropy = -(chance * log).sum(1, keepdims=True)
    slope = -chance * (advantage[:, None] + ENTROPY * (log + entropy))
    slope[np.arange(len(x)), pick] += advantage
    appeal = np.zeros(len(env.titles), np.float32)
    appeal[items] = slope.sum(0)
    match = x.T @ slope @ env.vectors[items]
    return Weights(match, appeal, advantage @ x)


def adagrad(weights: Weights, squares: Weights, slope: Weights, pace: float) -> list[Weights]:
    """One step uphill: the new weights and their sums of squared slopes."""
    moved, sums = [], []
    for weight, square, g in zip(weights, squares, slope):
        square = square + g * g
        moved.append(weight + pace * g / np.sqrt(square))
        sums.append(square)
    return [Weights(*moved), Weights(*sums)]


def learn_round(env: Env, users: Array, learnt: list[Weights], gamma: float, pace: float,
                rng: Rng) -> list[Weights]:
    """Play an episode of each of B users, side by side until all are over; learn at every step.

    What is learnt are the weights and, for Adagrad, their sums of squared slopes.
    """
    m = len(env.titles)
    choices = min(m, max(CHOICES, m // 16))
    state = reset(env, users)
    free = unseen(env, users)
    taste = tastes(env, users)
    x = observe(env, state, taste)
    while len(x) > 0:
        weights = learnt[0]
        items = rng.choice(m, choices, replace=False)
        log, pick = sample(logits(env, weights, x, items, free[:, items]), rng)
        item = items[pick]
        state, reward, left, cut = step(env, state, item)
        after = observe(env, state, taste)
        target = reward + gamma * (after @ weights.value) * ~left
        advantage = (target - x @ weights.value).astype(np.float32)
        learnt = adagrad(*learnt, gradient(env, x, items, log, pick, advantage), pace)
        free[np.arange(len(x)), item] = False
        stay = ~(left | cut)
        state = EnvState(*(field[stay] for field in state))
        x, free, taste = after[stay], free[stay], taste[stay]
    return learnt


def a2c(weights: Weights, env: Env, state: EnvState, free: Array, rng: Rng) -> Array:
    """The free item that fits best. `partial(a2c, weights)` is a `Policy`."""
    x = observe(env, state, tastes(env, state.user))
    return np.argmax(logits(env, weights, x, np.arange(free.shape[1]), free), -1)


def learn_a2c(env: Env, episodes: int, seed: int = 0, gamma: float = 0.5,
              pace: float = 0.3) -> Policy:
    """Advantage actor-critic, trained in 200 rounds of episodes of learners, taken in turn."""
    rng = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(3,)))
    m, d = env.vectors.shape
    shapes = (2 * d + 1, d), m, 2 * d + 1
    weights = Weights(*(np.zeros(shape, np.float32) for shape in shapes))
    learnt = [weights, Weights(*(w + np.float32(1e-6) for w in weights))]
    turns = np.resize(rng.permutation(env.learners), episodes)
    size = max(1, episodes // 200)
    for first in range(0, episodes, size):
        learnt = learn_round(env, turns[first:first + size], learnt, gamma, pace, rng)
    return partial(a2c, learnt[0])


POLICIES = ("random", "popular", "greedy", "oracle", "a2c")


def policy_named(name: str, env: Env, episodes: int = 0, seed: int = 0,
                 gamma: float = 0.5) -> Policy:
    """The policy of a name in POLICIES. Only a2c learns and uses the last three arguments."""
    if name == "popular":
        return partial(popular, popularity(env))
    if name == "a2c":
        return learn_a2c(env, episodes, seed, gamma)
    return {"random": random, "greedy": greedy, "oracle": oracle}[name]


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


def bootstrap(figure: Callable[..., Array], *samples: Array,
              draws: int = 1000) -> list[list[float]]:
    """[mean, low, high] of each number in figure(*samples), with its 95 % confidence interval.

    Samples are [S, N, k]: S seeds with N users each, the same users in all samples. A draw takes
    seeds with replacement and, within each, users with replacement. All samples share the draw, so
    differences are paired.
    """
    rng = np.random.default_rng(0)
    seeds, users = samples[0].shape[:2]
    drawn_seeds = rng.integers(seeds, size=(draws, seeds, 1))
    drawn_users = rng.integers(users, size=(draws, seeds, users))
    resampled = [sample[drawn_seeds, drawn_users] for sample in samples]
    low, high = np.quantile(figure(*resampled), [0.025, 0.975], axis=0)
    return np.stack([figure(*samples), low, high], -1).round(4).tolist()


def metrics(after: Array, before: Array | None = None) -> dict[str, list[float]]:
    """[mean, low, high] of Len, R_each and R_traj of scores [S, N, 2], or of their gains."""
    if before is None:
        intervals = bootstrap(totals, after)
    else:
        intervals = bootstrap(gains, after, before)
    return dict(zip(METRICS, intervals))


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

    Titles, years and categories are facts. Ratings are made up: how much a user, who is near one of
    six archetypes, cares for the film's categories, plus the film's general appeal, plus noise,
    rounded to 1..5. Films feel alike when they share categories, rare ones more so. Half the users
    learn.
    """
    rows = re.findall(r"(.+?) (\d{4}) ([A-Z]+)(?:;\s+|$)", FILMS.strip())
    titles, years, codes = zip(*rows)
    categories, belongs = labels([[CODES[letter] for letter in letters] for letters in codes])
    rarity = np.sqrt(np.log(len(titles) / belongs.sum(0)))
    vectors = unit(belongs * rarity).astype(np.float32)

    # archetypes and appeal are the same for every seed
    common = np.random.default_rng(0)
    archetypes = common.normal(size=(6, len(categories)))
    appeal = common.normal(size=len(titles))

    rng = np.random.default_rng(np.random.SeedSequence(seed))
    taste = archetypes[rng.integers(6, size=users)]
    taste = taste + 0.5 * rng.normal(size=taste.shape)
    liking = taste @ (belongs / np.sqrt(belongs.sum(1, keepdims=True))).T
    noise = 0.5 * rng.normal(size=liking.shape)
    ratings = 5 + 1.5 * liking + 2 * appeal + noise
    ratings = np.clip(np.rint(ratings), 1, 5)

    # ten films drawn without replacement; one more point makes a film e times likelier
    order = np.argsort(-(ratings + rng.gumbel(size=ratings.shape)), 1)
    return Env(
        name="films", titles=titles, years=tuple(map(int, years)),
        categories=categories, belongs=belongs, vectors=vectors,
        rate=table(ratings.astype(np.int8)),
        distance=euclidean(vectors),
        histories=tuple(order[:, :10]), learners=users // 2, beta=1.1)


# --------------------------------------------------- data files: finding and reading them

GROUPLENS = "whole copies are at grouplens.org/datasets/movielens"
AUTHORS = "whole copies are in the authors' repository, github.com/jizhi-zhang/BiLLP"
OWN_DATA = "the README tells what the two files hold"


class BadData(ValueError):
    """A data file is missing or malformed; one line names the file, the place and a remedy."""


def find(path: Location, names: Sequence[str], advice: str, world: str = "") -> Path:
    """The file of the first of these names that occurs in a folder or below it.

    Of several such files it takes one in a folder named as the world, then the least deep one.
    """
    folder = Path(path).expanduser()
    for name in names:
        files = [file for file in folder.rglob(name) if file.is_file()]
        if files:
            return min(files, key=lambda file: (world not in file.parts, len(file.parts), file))
    raise BadData(f"{folder}: no {' or '.join(names)} there or below; {advice}")


@contextmanager
def blaming(file: Path, advice: str) -> Iterator[None]:
    """Turn whatever fails inside into one line that names the file and gives the advice."""
    try:
        yield
    except Exception as error:      # damaged files make csv, json, numpy and pickle raise all sorts
        reason = str(error).partition("\n")[0] or type(error).__name__
        if isinstance(error, KeyError):
            reason = f"no key {reason}"
        raise BadData(f"{file}: {reason}; {advice}") from None


# ------------------------------------------------ data files: ratings, from MovieLens or anybody

LISTS = ("items.csv", "movies.csv", "movie.csv", "movies.dat")
RATINGS = {".csv": ("ratings.csv", "rating.csv"), ".dat": ("ratings.dat",)}
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


def split_lines(file: Path) -> Iterator[tuple[int, list[str]]]:
    """(line number, fields) of each line of a csv or .dat file that is not empty."""
    with file.open(encoding=encoding(file), newline="") as stream:
        if file.suffix == ".dat":
            for number, line in enumerate(stream, 1):
                if line.strip():
                    yield number, line.rstrip("\r\n").split("::")
            return
        rows = csv.reader(stream, strict=True)
        try:
            for fields in rows:
                if any(fields):
                    yield rows.line_num, fields
        except csv.Error as error:
            raise ValueError(f"line {rows.line_num}: {error}") from None


def column(header: list[str], name: str) -> int:
    """The place of a column in a header, by any alias, case and punctuation; -1 if there is none.

    >>> column(["Title", "Movie_ID"], "item"), column(["Title"], "year")
    (1, -1)
    """
    plain = [re.sub(r"[\W_]", "", title).lower() for title in header]
    for alias in ALIASES[name].split():
        if alias in plain:
            return plain.index(alias)
    return -1


def read_columns(file: Path, needed: str, optional: str) -> Iterator[tuple[int, list[str]]]:
    """(line number, texts of the needed and optional columns) of each row; "" if there is none."""
    lines = split_lines(file)
    header = HEADERS.get(file.name)
    if header is None:
        _, header = next(lines, (1, [""]))
    places = [column(header, name) for name in (needed + " " + optional).split()]
    start = ",".join(header)[:80]
    for name in needed.split():
        names = ALIASES[name].replace(" ", " or ")
        demand(column(header, name) >= 0, f"line 1: the header {start!r} has no column {names}")
    for number, fields in lines:
        fit = len(fields) == len(header)
        demand(fit, f"line {number}: {len(fields)} fields where the header has {len(header)}")
        fields.append("")           # where the place -1 of a missing column points
        yield number, [fields[place].strip() for place in places]


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


def read_items(file: Path) -> dict[str, Item]:
    """The items by their ids, in the order of the file."""
    items = {}
    for number, (key, text, date, tags) in read_columns(file, "item title", "year categories"):
        demand(key != "" and text != "", f"line {number}: an item without id or title")
        demand(key not in items, f"line {number}: item {key} is listed twice")
        title, year = split_title(text)
        digits = re.search(r"\d{4}", date)
        if digits:
            year = int(digits.group())
        names = [tag.strip() for tag in tags.split("|")]
        items[key] = Item(title, year, [tag for tag in names if tag not in NO_TAG])
    return items


def seconds(text: str) -> float:
    """A time as a number, which may be written as a date like 2005-04-02 23:53:47. No text is 0."""
    try:
        return float(text or 0)
    except ValueError:
        return datetime.fromisoformat(text).timestamp()


def parse_ratings(file: Path, items: dict[str, Item], notice: Notice) -> Iterator[tuple]:
    """(user, item, rating, time) of each row; users are numbered as they come."""
    users, places = {}, {key: place for place, key in enumerate(items)}
    rows = read_columns(file, "user item rating", "time")
    for count, (number, texts) in enumerate(rows, 1):
        user, item, rating, time = texts
        demand(user != "", f"line {number}: a rating without user")
        demand(item in places, f"line {number}: item {item} is not in the list of items")
        if count == MANY:
            notice(f"{file} has a million ratings or more: reading and fitting takes a while")
        try:
            value, when = float(rating), seconds(time)
        except ValueError:
            raise ValueError(f"line {number}: the rating {rating!r} is not a number or "
                             f"the time {time!r} is not a time") from None
        demand(np.isfinite(value), f"line {number}: the rating {rating} is not finite")
        yield users.setdefault(user, len(users)), places[item], value, when


class Log(NamedTuple):
    """Ratings, sorted by user and then by time; all [N]."""
    users: Array                        # int
    items: Array                        # int
    ratings: Array                      # float32


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


def read_log(file: Path, items: dict[str, Item], notice: Notice) -> tuple[Log, str]:
    """The ratings of a file, and how they were mapped."""
    rows = np.fromiter(parse_ratings(file, items, notice), np.dtype((float, 4)))
    users, places, ratings, times = rows.T
    demand(users.any(), "fewer than two users")
    ratings, mapping = rescaled(ratings)
    order = np.lexsort((times, users))
    log = Log(users.astype(int), places.astype(int), ratings.astype(np.float32))
    return rows_of(log, order), mapping


def rows_of(log: Log, rows: Array) -> Log:
    """Part of a log, by numbers of rows or a mask."""
    return Log(log.users[rows], log.items[rows], log.ratings[rows])


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


def als(log: Log, n: int, m: int, rank: int, sweeps: int = 10) -> Model:
    """Alternating least squares: a rating is offset + user's bias + item's bias + p . q."""
    users, items, offset = log.users, log.items, log.ratings.mean()
    ratings = log.ratings - offset
    q = 0.1 * np.random.default_rng(0).standard_normal((m, rank + 1), np.float32)
    q[:, rank] = 0
    for _ in range(sweeps):
        p = ridge(users, items, ratings - q[items, rank], q[:, :rank], n)
        q = ridge(items, users, ratings - p[users, rank], p[:, :rank], m)
    return Model(np.insert(p, rank + 1, 1, 1), np.insert(q, rank, 1, 1), float(offset))


def rmse(model: Model, log: Log) -> float:
    """The root of the mean squared error of the predicted ratings; 0 if there are none."""
    errors = predict(*model, log.users, log.items) - log.ratings
    return np.sqrt(np.square(errors).sum() / max(len(errors), 1))


def liked(log: Log) -> tuple[Array, ...]:
    """Each user's history: the last 20 items rated 4 or more, or else the last 20 rated best."""
    histories = []
    for own in groups(log.users):
        ratings = log.ratings[own]
        good = ratings >= min(4, ratings.max())
        histories.append(log.items[own][good][-20:])
    return tuple(histories)


def fitted_world(name: str, items: Sequence[Item], log: Log, mapping: str, seed: int) -> Env:
    """A world whose ratings `als` predicts. `about` has its error on a tenth that it has not seen.

    Item vectors are item factors scaled to length 1; `beta` is the 0.2 quantile of their distances.
    Half of the users, drawn by `seed`, learn.
    """
    rng = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(5,)))
    n, m, size = log.users.max() + 1, len(items), len(log.users)
    log = log._replace(users=rng.permutation(n)[log.users])
    held_out = rng.permutation(size) < size // 10
    train, test = rows_of(log, ~held_out), rows_of(log, held_out)
    model, biases = als(train, n, m, 12), als(train, n, m, 0)
    vectors = unit(model.q[:, :12])
    a, b = rng.integers(m, size=(2, 100_000))
    beta = np.quantile(length_between(vectors, 0, a, b), 0.2)
    about = (f"{size} ratings{mapping}; RMSE on the tenth held out: {rmse(model, test):.4f} "
             f"predicted by factors, {rmse(biases, test):.4f} by biases alone")
    titles, years, tags = zip(*items)
    categories, belongs = labels(tags)
    return Env(
        name=name, titles=titles, years=years,
        categories=categories, belongs=belongs, vectors=vectors,
        rate=factors(*model),
        distance=euclidean(vectors),
        histories=liked(log), learners=n // 2, beta=float(beta), about=about)


def read_ratings(name: str, path: Location, seed: int, notice: Notice, advice: str) -> Env:
    """The world of a list of items and a file of ratings beside it."""
    file = find(path, LISTS, advice)
    with blaming(file, advice):
        items = read_items(file)
    file = find(file.parent, RATINGS[file.suffix], advice)
    with blaming(file, advice):
        log, mapping = read_log(file, items, notice)
    return fitted_world(name, list(items.values()), log, mapping, seed)


def ratings_folder(path: Location, seed: int = 0, notice: Notice = silent) -> Env:
    """The world of anybody's ratings: a folder with `items.csv` and `ratings.csv`.

    items.csv: id, title, optional year, optional categories separated by "|". ratings.csv: user,
    item, rating, optional time. The header names the columns by any of ALIASES, in any order; other
    columns are ignored. Ids are any text. Ratings of another scale are mapped: see `rescaled`.
    """
    return read_ratings("csv", path, seed, notice, OWN_DATA)


def movielens(path: Location, seed: int = 0, notice: Notice = silent) -> Env:
    """The world of a folder as GroupLens ships it: csv files, or .dat files (ml-1m and ml-10M)."""
    return read_ratings("movielens", path, seed, notice, GROUPLENS)


# ------------------------------------------------------- data files: the authors' two worlds


class ArraysOnly(pickle.Unpickler):
    """An unpickler that admits what a pickled numpy array is made of, and calls nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        admitted = {("numpy", "ndarray"), ("numpy", "dtype"),
                    ("numpy.core.multiarray", "_reconstruct"),
                    ("numpy.core.numeric", "_frombuffer")}
        if (module.replace("_core", "core"), name) not in admitted:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which is refused")
        return super().find_class(module, name)


def read_matrix(path: Location, name: str, world: str) -> Array:
    """One matrix of finite numbers: .npy stays on disk, memory-mapped; a pickle is loaded."""
    file = find(path, [name], AUTHORS, world)
    with blaming(file, AUTHORS):
        if file.suffix == ".npy":
            matrix = np.load(file, "r", allow_pickle=False)
        else:
            with file.open("rb") as stream:
                matrix = ArraysOnly(stream).load()
        numeric = isinstance(matrix, np.ndarray) and matrix.dtype.kind in "iuf"
        fit = numeric and matrix.ndim == 2 and np.isfinite(matrix).all()
        demand(fit, "it does not hold one matrix of finite numbers")
        return matrix


def read_titles(path: Location, world: str, count: int) -> tuple[str, ...]:
    """The titles of the items 0..count - 1."""
    file = find(path, ["datamaps.json"], AUTHORS, world)
    with blaming(file, AUTHORS):
        names = json.loads(file.read_text("utf-8"))["id2item_dict"]
        return tuple(html.unescape(names[str(item)]) for item in range(count))


def read_genres(path: Location, world: str, titles: Sequence[str]) -> list[list[str]]:
    """The genres of each title; the file writes each list as Python source."""
    file = find(path, ["list_genre.json"], AUTHORS, world)
    with blaming(file, AUTHORS):
        sources = json.loads(file.read_text("utf-8"))
        by_title = {html.unescape(title): source for title, source in sources.items()}
        lists = [ast.literal_eval(by_title.get(title, "[]")) for title in titles]
        return [[str(genre) for genre in genres] for genres in lists]


def read_users(path: Location, name: str, world: str,
               titles: Sequence[str]) -> list[tuple[int, Array]]:
    """(row in the table of ratings, history) of each user.

    A history is the last 20 distinct items that exist, each at its last place.
    """
    file = find(path, [name], AUTHORS, world)
    index = {title: item for item, title in enumerate(titles)}
    users = []
    with blaming(file, AUTHORS):
        for record in json.loads(file.read_bytes()):
            newest_first = {}           # a dict, because it keeps the order and each item once
            for title in reversed(record["pos_seq_name"]):
                item = index.get(html.unescape(title))
                if item is not None:
                    newest_first[item] = True
            history = np.array(list(newest_first)[:20][::-1], int)
            users.append((int(record["userid_encoded"]), history))
    return users


def rate_by_half(learners: int, rows: Array, train: Array, test: Array, users: Array,
                 items: Array) -> Array:
    """Ratings from one table for learners and from another for the others; rows [n] of both.

    The rating of a user in the other's table is looked up in row 0 and dropped.
    """
    learns = users < learners
    of_learners = train[np.where(learns, rows[users], 0), items]
    of_others = test[np.where(learns, 0, rows[users]), items]
    return np.where(learns, of_learners, of_others)


def distance_by_half(learners: int, train: Array, test: Array, users: Array, a: Array,
                     b: Array) -> Array:
    """Distances from one matrix [m, m] for learners and from another for the others."""
    return np.where(users < learners, train[a, b], test[a, b])


def released(path: Location, name: str) -> Env:
    """The authors' world "steam" or "amazon", from their files wherever they lie below path.

    Users of train.json learn, those of test.json do not. Only `a2c` sees the vectors, which are the
    genres as rows of length 1.
    """
    ratings = [read_matrix(path, f"{name}_{half}.npy", name) for half in ("train", "test")]
    apart = [read_matrix(path, f"{half}_distance_mat.pickle", name) for half in ("train", "test")]
    m = ratings[0].shape[1]
    titles = read_titles(path, name, m)
    train, test = (read_users(path, f"{half}.json", name, titles) for half in ("train", "test"))
    with blaming(path, AUTHORS):
        demand(min(m, len(train), len(test)) > 0, f"{name} has no items or no users")
        sizes = {len(apart[0]), len(apart[1]), *(matrix.shape[1] for matrix in ratings + apart)}
        demand(sizes == {m}, f"the matrices of {name} do not fit each other")
        for users, table in zip((train, test), ratings):
            places = [row for row, _ in users]
            fit = min(places) >= 0 and max(places) < len(table)
            demand(fit, f"the ratings of {name} do not fit the users")
    rows, histories = zip(*train, *test)
    genres, belongs = labels(read_genres(path, name, titles))
    learners = len(train)
    return Env(
        name=name, titles=titles, years=(None,) * m,
        categories=genres, belongs=belongs, vectors=unit(belongs).astype(np.float32),
        rate=partial(rate_by_half, learners, np.array(rows), *ratings),
        distance=partial(distance_by_half, learners, *apart),
        histories=histories, learners=learners,
        beta={"steam": 50.0, "amazon": 15.0}[name], grace=1)
