"""The world: users, items, and the rule by which a user leaves. No language model in sight.

An `Env` is a frozen record of arrays: the parameters of a simulator. `reset` and `step` are pure
and take one user or an array of B users through the same code, because numbers-only policies need
millions of steps.

    user, item   indices into the world's arrays; item -1 is an empty place
    near         two items whose vectors lie closer than `beta` (Euclidean)
    window, W    how many recommended items a user remembers
    terminated   the user left; truncated: the step cap was reached. Never both.
    Len, R_each, R_traj   steps an episode, reward a step, reward an episode (leaving step excluded)

Left out on purpose: slates, clicks, time. One item a step, one integer rating back.
"""
from __future__ import annotations

import re
from typing import Callable, NamedTuple, Sequence

import numpy as np

# ---------------------------------------------------------------------------------- records


class Env(NamedTuple):
    """A world with n users, m items and c categories."""
    name: str
    titles: tuple[str, ...]             # [m], without the year
    years: tuple[int | None, ...]       # [m]
    categories: tuple[str, ...]         # [c]
    belongs: np.ndarray                 # bool [m, c]: the categories of each item
    vectors: np.ndarray                 # float32 [m, d]: items that feel alike lie near each other
    ratings: np.ndarray                 # [n, m]: what each user would rate each item, 1 to 5
    histories: tuple[np.ndarray, ...]   # [n] of item indices: liked before, oldest first
    learners: int                       # users below this index learn; the rest are held out
    window: int = 4                     # W, recommended items a user compares the next one with
    beta: float = 1.0                   # an item nearer than this to one of them is too alike
    floor: float = 2.0                  # a rating below it disappoints
    grace: int = 0                      # steps at the start at which disappointment is forgiven
    max_steps: int = 50                 # the cap at which an episode is truncated


class EnvState(NamedTuple):
    """One user's session, or B sessions stacked along leading axes."""
    user: np.ndarray                    # [...] int
    recent: np.ndarray                  # [..., W] int: the last W recommended items, newest last
    t: np.ndarray                       # [...] int: steps taken

# -------------------------------------------------------------------------------- the quit rule


def reset(env: Env, user) -> EnvState:
    """A fresh session for a user (int) or for users (int [B])."""
    user = np.asarray(user)
    return EnvState(user, np.full(user.shape + (env.window,), -1), np.zeros(user.shape, int))


def step(env: Env, state: EnvState, item) -> tuple[EnvState, np.ndarray, np.ndarray, np.ndarray]:
    """Recommend one item to each user: (next state, reward, terminated, truncated), all [...].

    A user leaves when the item is nearer than `beta` to one of the last W recommended items, or
    when its rating is below `floor` (from step `grace` on). The leaving step earns 0. A user who
    has not left after `max_steps` steps is truncated.
    """
    item = np.asarray(item)
    rating = env.ratings[state.user, item]
    away = env.vectors[state.recent] - env.vectors[item][..., None, :]
    near = np.einsum("...d,...d->...", away, away) < env.beta ** 2
    left = (near & (state.recent >= 0)).any(-1)
    left |= (rating < env.floor) & (state.t >= env.grace)
    recent = np.concatenate([state.recent[..., 1:], item[..., None]], -1)
    after = EnvState(state.user, recent, state.t + 1)
    return after, np.where(left, 0, rating), left, ~left & (after.t >= env.max_steps)


def why_left(env: Env, user: int, items: Sequence[int]) -> str:
    """In words, which part of the rule ended a session at the last of its items."""
    item, recent = items[-1], items[-1 - env.window:-1]
    distances = squared_distances(env.vectors[[item]], env.vectors[list(recent)])[0]
    for back, distance in enumerate(distances[::-1], 1):
        if distance < env.beta ** 2:
            return f"too like {env.titles[items[-1 - back]]}, {back} back"
    return f"disappointed: would rate it {env.ratings[user, item]:g}"


# --------------------------------------------------------------- policies that see the numbers

Policy = Callable[[Env, EnvState, np.ndarray, np.random.Generator], np.ndarray]
Rollout = NamedTuple("Rollout", [("items", np.ndarray), ("rewards", np.ndarray)])   # [B, T], -1: over


def unseen(env: Env, users: np.ndarray) -> np.ndarray:
    """bool [B, m]: the items not in each user's history."""
    free = np.ones((len(users), len(env.titles)), bool)
    for row, user in zip(free, users):
        row[env.histories[user]] = False
    return free


def random(env: Env, state: EnvState, free: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Any free item, each as likely."""
    return np.argmax(rng.random(free.shape, np.float32) * free, -1)


def greedy(env: Env, state: EnvState, free: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The best rating now, the first such item: no thought of what comes after."""
    return np.argmax(np.where(free, env.ratings[state.user], -1), -1)


def oracle(env: Env, state: EnvState, free: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The best rating among items that do not make the user leave, scarce kinds of item last.

    Knows the quit rule and every rating: an upper bound in practice, though not proven optimal.
    """
    ratings = env.ratings[state.user]
    good = free & (ratings >= env.floor)
    close = squared_distances(env.vectors, env.vectors) < env.beta ** 2
    safe = good & ~(close[state.recent] & (state.recent >= 0)[..., None]).any(-2)
    plenty = good @ close.astype(np.float32) / len(close)
    return np.argmax(np.where(safe, 6 + ratings + plenty, free), -1)


def squared_distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """[n, d], [m, d] -> squared Euclidean distances [n, m]."""
    return (a * a).sum(-1)[:, None] + (b * b).sum(-1) - 2 * a @ b.T


POLICIES: dict[str, Policy] = {"random": random, "greedy": greedy, "oracle": oracle}


def rollout(env: Env, users: np.ndarray, policy: Policy, rng: np.random.Generator) -> Rollout:
    """One episode for each of B users, all stepped at once; no item is recommended twice.

    items and rewards are [B, max_steps]; -1 and 0 from the leaving step on.
    """
    state, free, rows = reset(env, users), unseen(env, users), np.arange(len(users))
    items, rewards = np.full((2, len(users), env.max_steps), -1)
    active = np.ones(len(users), bool)
    for t in range(env.max_steps):
        item = policy(env, state, free, rng)
        state, reward, left, _ = step(env, state, item)
        active &= ~left
        free[rows, item] = False
        items[:, t], rewards[:, t] = np.where(active, item, -1), np.where(active, reward, 0)
        if not active.any():
            break
    return Rollout(items, np.where(items < 0, 0, rewards))


# ------------------------------------------------------------------------------------ metrics


def scores(lengths, returns) -> np.ndarray:
    """Length and return of each episode as one array float [1, episodes, 2]: one seed's scores."""
    return np.stack([lengths, returns], -1).astype(float)[None]


def summarize(samples: np.ndarray) -> np.ndarray:
    """[..., S, N, 2] -> [..., 3]: Len, R_each, R_traj over all seeds S and episodes N."""
    total = samples.sum((-3, -2))
    steps, reward, count = total[..., 0], total[..., 1], samples.shape[-3] * samples.shape[-2]
    return np.stack([steps / count, reward / np.maximum(steps, 1), reward / count], -1)


def metrics(after: np.ndarray, before: np.ndarray | None = None, draws: int = 1000) -> dict:
    """Len, R_each and R_traj as [mean, low, high], the interval of 95 % by bootstrap.

    Scores are [S, N, 2] as `scores` makes them: S seeds, N users each. A draw resamples seeds and,
    within each, users. With `before` (same seeds, same users) the figures are the paired
    differences after - before: one draw takes the same users from both.
    """
    rng = np.random.default_rng(0)
    seeds, users = after.shape[:2]
    s = rng.integers(seeds, size=(draws, seeds, 1))
    u = rng.integers(users, size=(draws, seeds, users))

    def figure(pick):
        return summarize(after[pick]) - (0 if before is None else summarize(before[pick]))

    low, high = np.quantile(figure((s, u)), [0.025, 0.975], axis=0)
    rows = zip(figure(...), low, high)
    return {name: [round(float(x), 4) for x in row] for name, row in zip(METRICS, rows)}


METRICS = ("Len", "R_each", "R_traj")

# ---------------------------------------------------------------------------- the films world

CODES = dict(zip("AVNKCRODFHMYLSTWX", (
    "Action Adventure Animation Children Comedy Crime Documentary Drama Fantasy Horror Musical "
    "Mystery Romance Sci-Fi Thriller War Western").split()))

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


def films(seed: int = 0, users: int = 1000) -> Env:
    """The embedded default: 200 well-known films, and users whose tastes are drawn from `seed`.

    Titles, years and categories are facts; ratings are made up: how much a user cares for the
    film's categories, plus the film's general appeal, plus noise, rounded to 1..5. A user's taste
    lies around one of six archetypes. Films feel alike when they share categories, rare ones more
    so (weight sqrt(log(films / films with it))). The first half of the users learn.
    """
    rows = re.findall(r"(.+?) (\d{4}) ([A-Z]+)(?:;\s+|$)", FILMS.strip())
    titles, years, codes = zip(*rows)
    belongs = np.array([[letter in code for letter in CODES] for code in codes])
    weighted = belongs * np.sqrt(np.log(len(rows) / belongs.sum(0)))
    common, own = np.random.default_rng(0), np.random.default_rng(np.random.SeedSequence(seed))
    archetypes, appeal = common.normal(size=(6, len(CODES))), common.normal(size=len(rows))
    taste = archetypes[own.integers(6, size=users)] + 0.5 * own.normal(size=(users, len(CODES)))
    liking = taste @ (belongs / np.sqrt(belongs.sum(1, keepdims=True))).T
    noise = own.normal(size=liking.shape)
    ratings = np.clip(np.rint(5 + 1.5 * liking + 2 * appeal + 0.5 * noise), 1, 5)
    watched = np.argsort(-(ratings + own.gumbel(size=ratings.shape)), 1)[:, :10]
    vectors = weighted / np.linalg.norm(weighted, axis=1, keepdims=True)
    return Env("films", titles, tuple(map(int, years)), tuple(CODES.values()), belongs,
               vectors.astype(np.float32), ratings.astype(np.int8), tuple(watched), users // 2,
               beta=1.1)
