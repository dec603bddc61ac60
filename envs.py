"""The world: users, items, and the rule by which a user leaves. No language model in sight.

An `Env` is a frozen record of arrays: the parameters of a simulator. `reset` and `step` are pure and take
one user or an array of B users through the same code: numbers-only policies need millions of steps.

    user, item   indices into the world's arrays; item -1 is an empty place
    near         two items whose vectors lie closer than `beta` (Euclidean)
    window, W    how many recommended items a user remembers
    terminated   the user left; truncated: the step cap was reached. Never both.
    Len, R_each, R_traj   steps an episode, reward a step, reward an episode (leaving step excluded)
    free         bool [B, m]: items that a policy may still recommend to each of B users
    credit       td_target, advantage: here because BiLLP and the actor-critic share them

Left out on purpose: slates, clicks, time. One item a step, one integer rating back.
"""
from __future__ import annotations

import ast
import csv
import html
import json
import pickle
import re
from contextlib import contextmanager
from functools import partial, reduce
from itertools import accumulate, compress
from pathlib import Path
from typing import Any, Callable, Iterator, NamedTuple, Sequence

import numpy as np

Array = np.ndarray
Rng = np.random.Generator

# ------------------------------------------------------------- the world and its quit rule


class Factors(NamedTuple):
    """Ratings worked out when asked for: offset + users . items, rounded and clipped to 1..5."""
    users: Array                        # float32 [n, k]
    items: Array                        # float32 [m, k]
    offset: float


class Halves(NamedTuple):
    """Ratings of learners and of held-out users in a table each, which may stay on disk."""
    rows: Array                         # int [n]: each user's row in its table
    tables: tuple[Array, Array]         # [., m] each


class Env(NamedTuple):
    """A world of n users, m items, c categories; for `apart` see `distance`, `about` tells how it was made."""
    name: str
    titles: tuple[str, ...]             # [m], without the year
    years: tuple[int | None, ...]       # [m]
    categories: tuple[str, ...]         # [c]
    belongs: Array                      # bool [m, c]: the categories of each item
    vectors: Array                      # float32 [m, d]: items that feel alike lie near each other
    ratings: Array | Factors | Halves   # [n, m]: what users would rate items, 1 to 5, none missing: see `rate`
    histories: Sequence[Array]          # [n] int arrays of items liked before, oldest first
    learners: int                       # users below this index learn; the rest are held out
    window: int = 4                     # W, recommended items a user compares the next one with
    beta: float = 1.0                   # an item nearer than this to one of them is too alike
    floor: float = 2.0                  # a rating below it disappoints
    grace: int = 0                      # steps at the start at which disappointment is forgiven
    max_steps: int = 50                 # the cap at which an episode is truncated
    apart: tuple[Array, ...] = ()
    about: str = ""


class EnvState(NamedTuple):
    """One user's session, or B sessions stacked along leading axes."""
    user: Array                         # [...] int
    recent: Array                       # [..., W] int: the last W recommended items, newest last
    t: Array                            # [...] int: steps taken


def predict(factors: Factors, users, items) -> Array:
    """Ratings before they are rounded and clipped; both int [...], broadcast together."""
    p, q = factors.users.take(users, 0), factors.items.take(items, 0)
    return factors.offset + np.einsum("...k,...k->...", p, q)


def rate(env: Env, users, items) -> Array:
    """What users would rate items, 1 to 5; both int [...], broadcast together."""
    if isinstance(env.ratings, Factors):
        return np.clip(np.rint(predict(env.ratings, users, items)), 1, 5)
    if isinstance(env.ratings, Halves):
        row = env.ratings.rows[users]           # there may be no such row in the other table
        return np.where(users < env.learners, *(table[row % len(table), items] for table in env.ratings.tables))
    return env.ratings[users, items]


def distance(env: Env, users, a, b) -> Array:
    """How far apart users feel items a and b to be; all int [...], users and b broadcast to a."""
    if env.apart:                               # a matrix [m, m] for learners, another for held-out users
        return np.where(users < env.learners, *(matrix[a, b] for matrix in env.apart))
    away = env.vectors.take(a, 0)
    away -= env.vectors.take(b, 0)      # in place: half the memory traffic
    return np.sqrt(np.einsum("...d,...d->...", away, away))


def reset(env: Env, user) -> EnvState:
    """A fresh session for a user (int) or for users (int [B])."""
    user = np.asarray(user)
    return EnvState(user, np.full(user.shape + (env.window,), -1), np.zeros(user.shape, int))


def step(env: Env, state: EnvState, item) -> tuple[EnvState, Array, Array, Array]:
    """Recommend an item, int [...], to each user: (next state, reward, terminated, truncated), all [...].

    A user leaves when the item is nearer than `beta` to one of the last W recommended items, or when its rating
    is below `floor` (from step `grace` on). The leaving step earns 0. Who stays `max_steps` steps is truncated.
    """
    item = np.asarray(item)
    rating = rate(env, state.user, item)
    near = distance(env, state.user[..., None], state.recent, item[..., None]) < env.beta
    left = (near & (state.recent >= 0)).any(-1) | (rating < env.floor) & (state.t >= env.grace)
    after = EnvState(state.user, np.concatenate([state.recent, item[..., None]], -1)[..., 1:], state.t + 1)
    return after, np.where(left, 0, rating), left, ~left & (after.t >= env.max_steps)


def why_left(env: Env, user: int, items: Sequence[int]) -> str:
    """In words, which part of the rule ended a session at the last of its items."""
    *past, item = items
    for back, other in enumerate(past[::-1][:env.window], 1):
        if distance(env, user, other, item) < env.beta:
            return f"too like {env.titles[other]}, {back} back"
    return f"disappointed: would rate it {rate(env, user, item):g}"


# --------------------------------------------------------------- policies that see the numbers

Policy = Callable[[Env, EnvState, Array, Rng], Array]       # env, B sessions, free [B, m], rng -> items [B]
Rollout = NamedTuple("Rollout", [("items", Array), ("rewards", Array)])   # [B, T]; -1 and 0 once it is over
CELLS = 2 ** 22         # users x items looked at in one go: bounds the memory of large worlds


def unseen(env: Env, users: Array) -> Array:
    """bool [B, m]: the items not in each user's history."""
    free = np.ones((len(users), len(env.titles)), bool)
    for row, user in zip(free, users):
        row[env.histories[user]] = False
    return free


def random(env: Env, state: EnvState, free: Array, rng: Rng) -> Array:
    """Any free item, each as likely."""
    return np.argmax(rng.random(free.shape, np.float32) * free, -1)


def popularity(env: Env) -> Array:
    """float [m]: each item's mean rating over the learners (of factors: before rounding, up to a constant)."""
    if isinstance(env.ratings, Factors):
        return env.ratings.items @ env.ratings.users[:env.learners].mean(0)
    every = np.arange(len(env.titles))
    return sum((rate(env, user, every) for user in range(env.learners)), np.zeros(len(every))) / env.learners


def popular(appeal: Array, env: Env, state: EnvState, free: Array, rng: Rng) -> Array:
    """The first free item of most appeal, [m] or [B, m]; a `Policy` once the appeal is filled in."""
    return np.argmax(np.where(free, appeal, -np.inf), -1)


def greedy(env: Env, state: EnvState, free: Array, rng: Rng) -> Array:
    """The best rating now: no thought of what comes after."""
    return popular(rate(env, state.user[:, None], np.arange(free.shape[1])), env, state, free, rng)


def distances(env: Env, users, items: Array, among: Array) -> Array:
    """[..., c]: how far each item [...] is from each of c others; users as for `distance`."""
    if env.apart:
        return distance(env, np.expand_dims(users, -1), items[..., None], among)
    a, b = env.vectors[items], env.vectors[among]
    squares = (a * a).sum(-1)[..., None] + (b * b).sum(-1) - 2 * a @ b.T
    return np.sqrt(np.maximum(squares, 0))


def oracle(env: Env, state: EnvState, free: Array, rng: Rng) -> Array:
    """The best rating among items that do not make the user leave; an upper bound in practice, not proven so.

    Among equals it takes the item that rules out the fewest of those safe once the oldest of W is forgotten.
    """
    user, every = state.user[:, None], np.arange(free.shape[1])
    some = every[::1 + len(every) ** 2 // CELLS]        # all of a small world, a sample of a large one
    ratings = rate(env, user, every)
    good = free & (ratings >= env.floor)
    near = (distances(env, user, state.recent, every) < env.beta) & (state.recent >= 0)[..., None]
    safe, still = good & ~near.any(1), (good & ~near[:, 1:].any(1))[:, some]
    close = distances(env, env.learners, some, every) < env.beta      # as held-out users feel: breaks ties
    lost = still @ close.astype(np.float32) / np.maximum(still.sum(-1, keepdims=True), 1)
    return np.argmax(np.where(safe, 6 + ratings - lost, free), -1)      # 6: above all that is not safe


def rollout(env: Env, users: Array, policy: Policy, rng: Rng) -> Rollout:
    """One episode for each of B users, stepped at once or in blocks; no item comes twice while any is left."""
    size = max(CELLS // len(env.titles), 1)
    if len(users) > size:
        parts = [rollout(env, block, policy, rng) for block in np.split(users, range(size, len(users), size))]
        return Rollout(*map(np.concatenate, zip(*parts)))
    state, free, rows = reset(env, users), unseen(env, users), np.arange(len(users))
    items = np.full((len(users), env.max_steps), -1)
    rewards, active = np.zeros(items.shape), np.ones(len(users), bool)
    for t in range(env.max_steps):
        item = policy(env, state, free, rng)
        state, reward, left, _ = step(env, state, item)
        active &= ~left
        free[rows, item] = False
        items[:, t], rewards[:, t] = np.where(active, item, -1), np.where(active, reward, 0)
        if not active.any():
            break
    return Rollout(items, rewards)


# ------------------------------------ credit, and a policy that learns from it: actor-critic


def td_target(reward, gamma, next_value, terminated):
    """r_n + gamma V(s_{n+1}), where V = 0 once the user has left (terminated). Floats or arrays.

    >>> td_target(4.0, 0.5, 6.0, False), td_target(0.0, 0.5, 6.0, True)
    (7.0, 0.0)
    """
    return reward + gamma * next_value * (1 - terminated)


def advantage(reward, gamma, value, next_value, terminated):
    """A(s_n, a_n) = r_n + gamma V(s_{n+1}) - V(s_n): how much better than the critic expected.

    >>> advantage(4.0, 0.5, 5.0, 6.0, False)
    2.0
    """
    return td_target(reward, gamma, next_value, terminated) - value


def discounted_return(rewards: Sequence[float], gamma: float) -> float:
    """The sum over n of gamma^n r_n.

    >>> discounted_return([4, 4, 4], 0.5)
    7.0
    """
    return reduce(lambda later, reward: reward + gamma * later, reversed(rewards), 0.0)


CHOICES = 48                # items that the learner chooses among at a time, or a 16th if that is more
ENTROPY = np.float32(0.05)  # weight of the learner's bonus for keeping its choices open


class Weights(NamedTuple):
    """What the actor-critic learns. A state is x = [mean of the history, sum of the last W, 1]."""
    match: Array                        # [2d + 1, d]: x @ match is the kind of item wanted now
    appeal: Array                       # [m]: of each item, to anyone
    value: Array                        # [2d + 1]: V(s) = x @ value


def observe(env: Env, state: EnvState, past: Array | None = None) -> Array:
    """float32 [B, 2d + 1]: x of each session; `past` is its first part [B, d] where that is known already."""
    if past is None:
        liked = (env.vectors[env.histories[user]] for user in state.user)
        past = np.stack([vectors.sum(0) / np.float32(max(len(vectors), 1)) for vectors in liked])
    places = state.recent.T                     # places first: sums over a leading axis are quick
    recent = (env.vectors.take(places, 0) * (places >= 0)[..., None]).sum(0)
    return np.concatenate([past, recent, np.ones((len(past), 1), np.float32)], -1)


def logits(env: Env, weights: Weights, x: Array, free: Array, among: Array) -> Array:
    """float32 [c, B]: how much each of B sessions wants each of c items; hardly any that is not free."""
    wanted = env.vectors[among] @ (x @ weights.match).T
    wanted += weights.appeal[among, None]
    return np.where(free, wanted, np.float32(-1e6))


def a2c(weights: Weights, env: Env, state: EnvState, free: Array, rng: Rng) -> Array:
    """The likeliest item of a learned softmax; a `Policy` once the weights are filled in."""
    return np.argmax(logits(env, weights, observe(env, state), free.T, np.arange(free.shape[1])), 0)


def sample(wanted: Array, rng: Rng) -> tuple[Array, Array, Array]:
    """From logits [c, B]: the softmax's logarithms and chances, both [c, B], and one draw a column [B]."""
    log = wanted - wanted.max(0)
    chance = np.exp(log)
    total = chance.sum(0)
    ladder = np.array([*accumulate(chance)])                    # row by row: quicker than cumsum
    pick = np.argmax(ladder > rng.random(len(total), np.float32) * total, 0)
    return log - np.log(total), chance / total, pick


def slopes(env: Env, x: Array, among: Array, log: Array, chance: Array, pick: Array, credit: Array) -> Weights:
    """Uphill for mean(credit log chance[pick] + entropy bonus), and for the critic's fit."""
    push = -ENTROPY * log
    push -= np.einsum("cb,cb->b", chance, push) + credit
    push *= chance
    push[pick, np.arange(len(pick))] += credit
    push /= np.float32(len(pick))
    appeal = np.zeros(len(env.titles), np.float32)
    appeal[among] = push.sum(1)
    return Weights(x.T @ (push.T @ env.vectors[among]), appeal, credit @ x / len(pick))


def learn_a2c(env: Env, episodes: int, seed: int = 0, gamma: float = 0.5, pace: float = 0.3) -> Policy:
    """Advantage actor-critic in one pass over `episodes` episodes of learners, taken in turn.

    A hundredth of them run side by side; each step of theirs, a choice of sampled items, is one of Adagrad.
    """
    rng = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(3,)))
    (m, d), choices = env.vectors.shape, max(CHOICES, len(env.vectors) // 16)
    pace *= (choices / CHOICES) ** 0.5          # the more choices, the smaller their chances and slopes
    zeros = partial(np.zeros, dtype=np.float32)
    weights = Weights(zeros((2 * d + 1, d)), zeros(m), zeros(2 * d + 1))
    squares = [np.full_like(w, 1e-6) for w in weights]
    count = max(1, min(episodes // 100, CELLS // m))
    order, begun, over = rng.permutation(env.learners), 0, np.full(count, True)
    state, free, x = reset(env, np.zeros(count, int)), np.empty((m, count), bool), zeros((count, 2 * d + 1))
    while begun - (~over).sum() < episodes:
        if over.any():                          # the next learners sit down where an episode is over
            users = order.take(np.arange(begun, begun + over.sum()), mode="wrap")
            begun, fresh = begun + len(users), reset(env, users)
            for held, new in zip((*state, free.T, x), (*fresh, unseen(env, users), observe(env, fresh))):
                held[over] = new
        among = rng.choice(m, choices, replace=False) if m > choices else np.arange(m)
        log, chance, pick = sample(logits(env, weights, x, free[among], among), rng)
        state, reward, left, cut = step(env, state, among[pick])
        free[among[pick], np.arange(count)], over = False, left | cut
        last, x = x, observe(env, state, x[:, :d])
        credit = advantage(reward, gamma, last @ weights.value, x @ weights.value, left).astype(np.float32)
        slope = slopes(env, last, among, log, chance, pick, credit)
        squares = [s + g * g for s, g in zip(squares, slope)]
        weights = Weights(*(w + np.float32(pace) * g / np.sqrt(s) for w, g, s in zip(weights, slope, squares)))
    return partial(a2c, weights)


POLICIES: dict[str, Callable[..., Policy]] = {      # (env, episodes, seed, gamma) -> policy
    "random": lambda *_: random, "popular": lambda env, *_: partial(popular, popularity(env)),
    "greedy": lambda *_: greedy, "oracle": lambda *_: oracle, "a2c": learn_a2c}


# ------------------------------------------------------------------------------------ metrics

METRICS = ("Len", "R_each", "R_traj")


def scores(lengths, returns) -> Array:
    """Length and return of each episode as one array float [1, episodes, 2]: one seed's scores."""
    return np.stack([lengths, returns], -1).astype(float)[None]


def totals(samples: Array) -> Array:
    """Scores [..., S, N, 2] -> [..., 3]: Len, R_each, R_traj over all seeds S and episodes N."""
    steps, reward = np.moveaxis(samples.mean((-3, -2)), -1, 0)
    return np.stack([steps, reward / np.maximum(steps, 1e-9), reward], -1)


def bootstrap(figure: Callable, *samples: Array, draws: int = 1000) -> list[list[float]]:
    """[mean, low, high] with the interval of 95 % for each number that `figure` makes of axes -3 and -2.

    Samples are [S, N, k]: S seeds with N users each, the same in all. One draw takes seeds with replacement
    and, within each, users with replacement, alike from every sample: so differences are paired.
    """
    rng, (seeds, users) = np.random.default_rng(0), samples[0].shape[:2]
    drawn = rng.integers(seeds, size=(draws, seeds, 1)), rng.integers(users, size=(draws, seeds, users))
    low, high = np.quantile(figure(*(sample[drawn] for sample in samples)), [0.025, 0.975], axis=0)
    return np.stack([figure(*samples), low, high], -1).round(4).tolist()


def metrics(after: Array, *before: Array) -> dict[str, list[float]]:
    """Len, R_each and R_traj of scores [S, N, 2], or, given others, their paired differences after - before."""
    return dict(zip(METRICS, bootstrap(lambda a, *b: totals(a) - sum(map(totals, b)), after, *before)))


def gini(counts: Array) -> float:
    """How unequally counts [m] are spread: 0 all equal, towards 1 all in one place.

    >>> gini(np.array([1, 1, 1, 1])), gini(np.array([0, 0, 0, 4]))
    (0.0, 0.75)
    """
    n = len(counts)
    return float(np.arange(1 - n, n, 2) @ np.sort(counts) / max(n * counts.sum(), 1))


# ---------------------------------------------------------------------------- the films world

CODES = dict(zip("AVNKCRODFHMYLSTWX", (
    "Action Adventure Animation Children Comedy Crime Documentary Drama Fantasy Horror Musical "
    "Mystery Romance Sci-Fi Thriller War Western").split()))

FILMS = """
City Lights 1931 CL; Frankenstein 1931 HS; M 1931 RT; Duck Soup 1933 CMW; King Kong 1933 VH;
It Happened One Night 1934 CL; Snow White and the Seven Dwarfs 1937 NFM;
The Adventures of Robin Hood 1938 AVL; Gone with the Wind 1939 LW; Stagecoach 1939 AX;
The Wizard of Oz 1939 KFM; Fantasia 1940 NM; Pinocchio 1940 NKF; Rebecca 1940 YL; The Great Dictator 1940 CW;
Citizen Kane 1941 DY; The Maltese Falcon 1941 RY; Casablanca 1942 LW; Double Indemnity 1944 RT;
It's a Wonderful Life 1946 DF; The Treasure of the Sierra Madre 1948 VX; The Third Man 1949 YT;
Rashomon 1950 RY; The African Queen 1951 VLW; The Day the Earth Stood Still 1951 ST; High Noon 1952 TX;
Singin' in the Rain 1952 CML; Rear Window 1954 YT; Seven Samurai 1954 AD; Night and Fog 1955 OW;
Invasion of the Body Snatchers 1956 HS; The Searchers 1956 DX; 12 Angry Men 1957 RD;
The Bridge on the River Kwai 1957 VW; The Seventh Seal 1957 DF; Vertigo 1958 YL; North by Northwest 1959 VT;
Rio Bravo 1959 AX; Some Like It Hot 1959 CR; Psycho 1960 RHY; The Magnificent Seven 1960 AVX;
Breakfast at Tiffany's 1961 L; West Side Story 1961 RML; Lawrence of Arabia 1962 VW;
To Kill a Mockingbird 1962 RD; The Birds 1963 HY; The Great Escape 1963 AW; Goldfinger 1964 AT;
Mary Poppins 1964 KFM; The Sound of Music 1965 KM; The Good, the Bad and the Ugly 1966 VX;
Bonnie and Clyde 1967 RL; The Graduate 1967 CL; The Jungle Book 1967 NKM; 2001: A Space Odyssey 1968 VS;
Night of the Living Dead 1968 HS; Once Upon a Time in the West 1968 X; Planet of the Apes 1968 VS;
Yellow Submarine 1968 NM; Butch Cassidy and the Sundance Kid 1969 RX; Woodstock 1970 OM;
A Clockwork Orange 1971 RS; Willy Wonka & the Chocolate Factory 1971 KFM; Cabaret 1972 DM;
The Godfather 1972 RD; Enter the Dragon 1973 A; The Exorcist 1973 H; Westworld 1973 SX;
Blazing Saddles 1974 CX; Chinatown 1974 RY; Young Frankenstein 1974 CH; Grey Gardens 1975 OD; Jaws 1975 HT;
Monty Python and the Holy Grail 1975 CF; The Rocky Horror Picture Show 1975 CHM; Rocky 1976 D;
Close Encounters of the Third Kind 1977 YS; Star Wars 1977 AVS; Grease 1978 ML; Halloween 1978 HT;
Superman 1978 AF; Alien 1979 HS; Apocalypse Now 1979 DW; Airplane! 1980 C; The Blues Brothers 1980 ACM;
The Shining 1980 HY; Das Boot 1981 TW; Raiders of the Lost Ark 1981 AV; Blade Runner 1982 YS;
E.T. the Extra-Terrestrial 1982 KS; A Nightmare on Elm Street 1984 FH; Ghostbusters 1984 CF;
Stop Making Sense 1984 OM; The NeverEnding Story 1984 VKF; The Terminator 1984 AS; This Is Spinal Tap 1984 CM;
Back to the Future 1985 VCS; Shoah 1985 OW; The Goonies 1985 VK; Aliens 1986 AHS; Labyrinth 1986 KFM;
Platoon 1986 DW; Top Gun 1986 AL; Predator 1987 AST; The Princess Bride 1987 VCFL; Akira 1988 ANS;
Die Hard 1988 AT; Grave of the Fireflies 1988 NW; My Neighbor Totoro 1988 NKF; The Thin Blue Line 1988 ROY;
Who Framed Roger Rabbit 1988 NCY; Roger & Me 1989 CO; The Little Mermaid 1989 NML;
When Harry Met Sally... 1989 CL; Back to the Future Part III 1990 CSX; Dances with Wolves 1990 VX;
Edward Scissorhands 1990 FL; Ghost 1990 FL; Goodfellas 1990 R; Home Alone 1990 KC;
Beauty and the Beast 1991 NFML; Terminator 2: Judgment Day 1991 AS; The Silence of the Lambs 1991 HT;
Unforgiven 1992 DX; Groundhog Day 1993 CFL; Jurassic Park 1993 VS; Schindler's List 1993 DW;
The Fugitive 1993 T; The Nightmare Before Christmas 1993 NHM; Forrest Gump 1994 CD; Hoop Dreams 1994 O;
Pulp Fiction 1994 CR; The Lion King 1994 NKM; Braveheart 1995 AW; Ghost in the Shell 1995 NS;
The Usual Suspects 1995 RY; Toy Story 1995 NKC; Fargo 1996 CR; Scream 1996 HY; Princess Mononoke 1997 NF;
Titanic 1997 DL; Saving Private Ryan 1998 AW; Buena Vista Social Club 1999 OM; The Blair Witch Project 1999 H;
The Iron Giant 1999 NKS; The Matrix 1999 AS; The Sixth Sense 1999 HY; Crouching Tiger, Hidden Dragon 2000 AFL;
Gladiator 2000 A; Memento 2000 YT; Amélie 2001 CL; Moulin Rouge! 2001 ML; Mulholland Drive 2001 YT;
Shrek 2001 NCF; Spirited Away 2001 VNF; The Lord of the Rings: The Fellowship of the Ring 2001 VF;
Bowling for Columbine 2002 RO; Chicago 2002 RM; City of God 2002 RD; Finding Nemo 2003 VNK;
Pirates of the Caribbean: The Curse of the Black Pearl 2003 VF; The Fog of War 2003 OW;
Eternal Sunshine of the Spotless Mind 2004 LS; Shaun of the Dead 2004 CH; Brokeback Mountain 2005 LX;
Grizzly Man 2005 OD; March of the Penguins 2005 KO; An Inconvenient Truth 2006 O; Pan's Labyrinth 2006 FW;
No Country for Old Men 2007 RTX; Ratatouille 2007 NC; Man on Wire 2008 OT; The Dark Knight 2008 AR;
WALL-E 2008 NLS; Waltz with Bashir 2008 NOW; District 9 2009 ST; Inglourious Basterds 2009 AW; Up 2009 VNK;
Inception 2010 ST; The Social Network 2010 D; Rango 2011 NCX; Django Unchained 2012 AX;
The Act of Killing 2012 RO; Frozen 2013 NKM; Gravity 2013 ST; Inside Out 2015 NKF;
Mad Max: Fury Road 2015 AVS; La La Land 2016 ML; Coco 2017 NKM; Dunkirk 2017 TW; Get Out 2017 HYT;
Free Solo 2018 VO; Spider-Man: Into the Spider-Verse 2018 ANS; 1917 2019 W; Knives Out 2019 CRY;
Parasite 2019 CT; Dune 2021 VS; Everything Everywhere All at Once 2022 ACS; Barbie 2023 CF; Oppenheimer 2023 D
"""


def unit(rows: Array) -> Array:
    """[n, d]: rows scaled to length 1, where they have a length."""
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-9)


def labels(tags: Sequence[Sequence[str]]) -> tuple[tuple[str, ...], Array]:
    """The categories that occur in items' tags, sorted, and bool [m, c] which item has which."""
    names = tuple(sorted(set().union(*tags)))
    return names, np.array([[name in own for name in names] for own in tags], bool)


def films(seed: int = 0, users: int = 1000) -> Env:
    """The embedded default: 200 well-known films, and users whose tastes are drawn from `seed`.

    Titles, years and categories are facts; ratings are made up: how much a user, who is near one of six
    archetypes, cares for the film's categories, plus the film's general appeal, plus noise, rounded to 1..5.
    Films feel alike when they share categories, rare ones more so. The first half of the users learn.
    """
    titles, years, codes = zip(*re.findall(r"(.+?) (\d{4}) ([A-Z]+)(?:;\s+|$)", FILMS.strip()))
    categories, belongs = labels([[CODES[letter] for letter in code] for code in codes])
    weighted = belongs * np.sqrt(np.log(len(titles) / belongs.sum(0)))
    common, own = np.random.default_rng(0), np.random.default_rng(np.random.SeedSequence(seed))
    archetypes, appeal = common.normal(size=(6, len(CODES))), common.normal(size=len(titles))
    taste = archetypes[own.integers(6, size=users)] + 0.5 * own.normal(size=(users, len(CODES)))
    liking = taste @ (belongs / np.sqrt(belongs.sum(1, keepdims=True))).T
    ratings = np.clip(np.rint(5 + 1.5 * liking + 2 * appeal + 0.5 * own.normal(size=liking.shape)), 1, 5)
    watched = np.argsort(-(ratings + own.gumbel(size=ratings.shape)), 1)[:, :10]
    return Env("films", titles, tuple(map(int, years)), categories, belongs, unit(weighted).astype(np.float32),
               ratings.astype(np.int8), tuple(watched), users // 2, beta=1.1)


def synthetic(users: int, items: int, seed: int = 0, kinds: int = 12, size: int = 32) -> Env:
    """A made-up world of any size; ratings come from factors, so that memory grows with users + items.

    Item i is of kind i % kinds. A user favours one kind, has watched 10 drawn from its items, likes others by
    chance.
    """
    rng = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(4,)))
    kinds = min(kinds, items)
    kind, favourite = np.arange(items) % kinds, rng.integers(kinds, size=users)
    centres = unit(rng.standard_normal((kinds, size), np.float32))
    vectors = unit(centres[kind] + 0.6 / size ** 0.5 * rng.standard_normal((items, size), np.float32))
    taste = 1.5 * centres[favourite] + 0.9 * rng.standard_normal((users, size), np.float32)
    watched = favourite[:, None] + kinds * rng.integers(items // kinds, size=(users, 10))
    return Env(f"synthetic:{users}x{items}", tuple(f"Item {i}" for i in range(items)), (None,) * items,
               tuple(f"Kind {k}" for k in range(kinds)), np.eye(kinds, dtype=bool)[kind], vectors,
               Factors(taste, vectors, 3.2), watched.astype(np.int32), users // 2)


# ------------------------------------------------------------- the outside world: data files

GROUPLENS = "grouplens.org/datasets/movielens"
AUTHORS = "the authors' repository, github.com/jizhi-zhang/BiLLP"
ARTICLE = r"^([^(]*), (The|A|An|Les?|La|L'|Il|El|Los|Las|Das|Der|Die|Une?)(?= \(|$)"
GENRES = ("unknown Action Adventure Animation Children's Comedy Crime Documentary Drama Fantasy "
          "Film-Noir Horror Musical Mystery Romance Sci-Fi Thriller War Western").split()
LAYOUTS = {"movies.csv": "ratings.csv", "movies.dat": "ratings.dat", "u.item": "u.data"}    # items: ratings
SEPARATORS = {".dat": "::", ".item": "|", ".data": "\t"}       # of the fields, in all but csv files


class BadData(ValueError):
    """A data file is missing or malformed; one line names the file, the place and a source."""


@contextmanager
def reading(path: str | Path, source: str, *names: str, world: str = "") -> Iterator[Path]:
    """The file of one of these names at or below path, preferably in a folder named as the world.

    Whatever fails while it is read becomes one line that names the file and the source.
    """
    found = [file for name in names for file in Path(path).rglob(name) if file.is_file()]
    if not found:
        raise BadData(f"{path}: no {' or '.join(names)} there or below; it can be had from {source}")
    file = min(found, key=lambda f: (names.index(f.name), world not in f.parts, len(f.parts), f))
    try:
        yield file
    except Exception as error:      # damaged files make csv, json, numpy and pickle raise all sorts
        reason = str(error).partition("\n")[0] or type(error).__name__
        key = "no key " if isinstance(error, KeyError) else ""
        raise BadData(f"{file}: {key}{reason}; whole copies are at {source}") from None


def table(file: Path, widths: tuple[int, ...], read: Callable[[list[str]], Any]) -> Iterator:
    """read(fields) of every row of a text table but a csv file's header and empty lines."""
    number, comma = 0, file.suffix == ".csv"
    with file.open(encoding="utf-8-sig" if comma else "latin-1", newline="") as lines:
        split = (line.rstrip("\r\n").split(SEPARATORS[file.suffix]) for line in lines)
        try:
            for number, fields in enumerate(csv.reader(lines, strict=True) if comma else split, 1):
                if any(fields) and number > comma:
                    if len(fields) not in widths:
                        raise ValueError(f"{len(fields)} fields where {' or '.join(map(str, widths))} belong")
                    yield read(fields)
        except (ValueError, csv.Error) as error:
            raise ValueError(f"line {number or 1}: {error}") from None


def read_movie(fields: list[str]) -> tuple[int, str, int | None, list[str]]:
    """(id, title, year, genres) of a row: three fields, or the 24 of u.item.

    >>> read_movie(["2571", "Matrix, The (1999)", "Action|Sci-Fi"])
    (2571, 'The Matrix', 1999, ['Action', 'Sci-Fi'])
    """
    tags = fields[2].split("|") if len(fields) == 3 else compress(GENRES, map("1".__eq__, fields[5:]))
    name = " ".join(fields[1].split())          # a long run of spaces would be tried at every length
    title, year = re.fullmatch(r"(.*?) ?(?:\((\d{4})(?:[-–]\d*)?\))?", name).groups()
    title = re.sub(ARTICLE, r"\2 \1", title or name).replace("L' ", "L'")
    known = [tag for tag in tags if tag not in ("", "unknown", "(no genres listed)")]
    return int(fields[0]), title, year and int(year), known


def read_rating(items: dict[int, int], fields: list[str]) -> tuple[int, int, float, float]:
    """(user id, item, rating, time) of a row; `items` tells the item of an id."""
    if not 0.5 <= float(fields[2]) <= 5:
        raise ValueError(f"the rating {fields[2]} is not between 0.5 and 5")
    if int(fields[1]) not in items:
        raise ValueError(f"item {fields[1]} is not in the list of movies")
    return int(fields[0]), items[int(fields[1])], float(fields[2]), float(fields[3])


def ridge(rows: Array, columns: Array, targets: Array, basis: Array, count: int) -> Array:
    """float32 [count, k + 1]: each row's own regression of its n targets on [basis of the column, 1]."""
    order, k = np.argsort(rows, kind="stable"), basis.shape[1] + 1
    basis = np.insert(basis, k - 1, 1, 1)
    sums = np.zeros((count, k, k + 1), np.float32)
    for block in np.split(order, range(16384, len(order), 16384)):
        row, x = rows[block], basis[columns[block]]
        y = np.hstack([x, targets[block, None]])
        starts = np.flatnonzero(np.diff(row, prepend=-1))
        sums[row[starts]] += np.add.reduceat(x[:, :, None] * y[:, None, :], starts)
    # the penalty is 3 + n / 10 on factors, 3 on the bias, which comes last
    penalty = 3 + np.bincount(rows, minlength=count)[:, None] / 10 * (np.arange(k) < k - 1)
    gram = sums[..., :-1] + np.eye(k, dtype=np.float32) * penalty[:, None].astype(np.float32)
    return np.linalg.solve(gram, sums[..., -1:])[..., 0]


def als(users: Array, items: Array, ratings: Array, shape: tuple, rank: int, sweeps: int = 10) -> Factors:
    """Alternating least squares: rating = mean + user bias + item bias + p . q, q [rank]."""
    mean = ratings.mean()
    q = 0.1 * np.random.default_rng(0).standard_normal((shape[1], rank + 1), np.float32)
    q[:, -1] = 0
    for _ in range(sweeps):
        p = ridge(users, items, ratings - mean - q[items, -1], q[:, :-1], shape[0])
        q = ridge(items, users, ratings - mean - p[users, -1], p[:, :-1], shape[1])
    return Factors(np.insert(p, rank + 1, 1, 1), np.insert(q, rank, 1, 1), float(mean))


def movielens(path: str | Path, seed: int = 0) -> Env:
    """A folder as GroupLens ships it: ml-latest-small and newer, ml-1m or ml-100k.

    Ratings are those that `als` predicts, fitted to nine tenths of the file's; `about` has its error on the
    last tenth. Item vectors are its item factors scaled to length 1; `beta` is the 0.2 quantile of their
    distances. Histories are the last 20 items a user rated 4 or more, or else best. Half, by `seed`, learn.
    """
    with reading(path, GROUPLENS, *LAYOUTS) as listed:
        movies = {number: movie for number, *movie in table(listed, (3, 24), read_movie)}
    read = partial(read_rating, {number: item for item, number in enumerate(movies)})
    with reading(listed.parent, GROUPLENS, LAYOUTS[listed.name]) as file:
        log = np.fromiter(table(file, (4,), read), np.dtype("i8, i8, f4, f8"))
        log = log[np.lexsort((log["f3"], log["f0"]))]
        _, first, users = np.unique(log["f0"], return_index=True, return_inverse=True)
        if len(first) < 2:
            raise ValueError("fewer than two users")
    titles, years, tags = zip(*movies.values())
    rng = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(5,)))
    users, items, ratings = rng.permutation(len(first))[users], log["f1"], log["f2"]
    shape = len(first), len(titles)
    held = rng.permutation(len(log)) < len(log) // 10
    models = [als(users[~held], items[~held], ratings[~held], shape, rank) for rank in (12, 0)]
    misses = (predict(model, users[held], items[held]) - ratings[held] for model in models)
    errors = [np.sqrt(np.square(miss).sum() / max(len(miss), 1)) for miss in misses]
    vectors = unit(models[0].items[:, :-2])
    pairs = vectors[rng.integers(len(titles), size=(2, 100_000))]
    rows = sorted(np.split(np.arange(len(log)), first[1:]), key=lambda own: users[own[0]])    # of each user
    histories = tuple(items[own[ratings[own] >= min(4, ratings[own].max())]][-20:] for own in rows)
    return Env("movielens", titles, years, *labels(tags), vectors, models[0], histories, len(first) // 2,
               beta=float(np.quantile(np.linalg.norm(pairs[0] - pairs[1], axis=1), 0.2)),
               about=f"{len(log)} ratings; RMSE on the tenth held out: {errors[0]:.4f} predicted by factors, "
                     f"{errors[1]:.4f} by biases alone")


class ArraysOnly(pickle.Unpickler):
    """An unpickler that admits what a pickled numpy array is made of, and calls nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        if (module.replace("_core", "core"), name) not in {
                ("numpy", "ndarray"), ("numpy", "dtype"), ("numpy.core.multiarray", "_reconstruct"),
                ("numpy.core.numeric", "_frombuffer")}:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which is refused")
        return super().find_class(module, name)


def read_matrix(opened: Callable, name: str) -> Array:
    """One matrix of numbers: .npy memory-mapped, a pickle through `ArraysOnly`."""
    with opened(name) as file, file.open("rb") as stream:
        array = np.load(file, "r", allow_pickle=False) if file.suffix == ".npy" else ArraysOnly(stream).load()
        if getattr(array, "ndim", 0) != 2 or array.dtype.kind not in "iuf" or not np.isfinite(array).all():
            raise ValueError("it does not hold one matrix of finite numbers")
        return array


def read_users(opened: Callable, name: str, titles: Sequence[str]) -> list[tuple[int, Array]]:
    """(row, history) of each record: the last 20 distinct items among the titles that exist."""
    index, users = {title: item for item, title in enumerate(titles)}, []
    with opened(name) as file:
        for record in json.loads(file.read_bytes()):
            latest = map(html.unescape, reversed(record["pos_seq_name"]))
            items = dict.fromkeys(index[title] for title in latest if title in index)
            users.append((int(record["userid_encoded"]), np.array([*items][:20][::-1], int)))
    return users


def released(path: str | Path, name: str) -> Env:
    """The authors' world "steam" or "amazon", from their files wherever they lie below path.

    Users of train.json learn, those of test.json are held out. `a2c` alone sees vectors: genres as unit rows.
    """
    opened, halves = partial(reading, path, AUTHORS, world=name), ("train", "test")
    tables, apart = (tuple(read_matrix(opened, file.format(half)) for half in halves)
                     for file in (name + "_{}.npy", "{}_distance_mat.pickle"))
    sizes = {table.shape[1] for table in tables} | {size for a in apart for size in a.shape}
    with opened("datamaps.json") as file:
        names = json.loads(file.read_text("utf-8"))["id2item_dict"]
        titles = tuple(html.unescape(names[str(item)]) for item in range(max(sizes)))
    with opened("list_genre.json") as file:
        tags = {html.unescape(k): v for k, v in json.loads(file.read_text("utf-8")).items()}
        genres, belongs = labels([[*map(str, ast.literal_eval(tags.get(title, "[]")))] for title in titles])
    users = [read_users(opened, f"{half}.json", titles) for half in halves]
    fit = [0 <= row < len(table) for table, own in zip(tables, users) for row, _ in own]
    if len(sizes) > 1 or not (all(sizes) and all(users) and all(fit)):
        raise BadData(f"{path}: the matrices of {name} do not fit each other or the users; "
                      f"whole copies are at {AUTHORS}")
    rows, histories = zip(*users[0], *users[1])
    return Env(name, titles, (None,) * len(titles), genres, belongs, unit(belongs).astype(np.float32),
               Halves(np.array(rows), tables), histories, len(users[0]),
               beta={"steam": 50.0, "amazon": 15.0}[name], grace=1, apart=apart)
