"""Made-up users with a taste that is written in words, so that a person can judge their recommendations."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from admin.films import CLASS_IDS, Film, coordinates, unit

FILMS_MIN = 6  # a director or actor with fewer films in the data makes too thin a taste
LIKED_MAX = 12
# Genres that people do ask for together: a random pair such as Western and Musical has no films behind it.
GENRE_TASTES: tuple[tuple[str, ...], ...] = (
    ("Animation", "Family"), ("Sci-Fi", "Action"), ("Horror", "Thriller"), ("Romance", "Comedy"),
    ("Crime", "Drama"), ("War", "Drama"), ("Western",), ("Documentary", "Biography"),
    ("Fantasy", "Adventure"), ("Mystery", "Crime"), ("Musical", "Romance"), ("Sport", "Drama"), ("Comedy",),
    ("Sci-Fi", "Horror"), ("History", "War"),
)  # fmt: skip
# Eras of this catalogue with enough films; "" is no preference, and the most usual taste.
ERAS = ("", "", "", "1970s", "1980s", "1990s", "2000s", "2010s")


@dataclass(frozen=True, kw_only=True, slots=True)
class Viewer:
    """One user: what they like, as tokens, as words and as a unit vector float16 [DIM]."""

    user_id: int
    genres: tuple[str, ...]
    people: tuple[str, ...]
    era: str
    liked: tuple[str, ...]
    vector: npt.NDArray[np.float16]

    @property
    def taste(self) -> str:
        """A sentence, as in: Animation and Family of the 1990s, with John Lasseter."""
        words = " and ".join(self.genres) + (f" of the {self.era}" if self.era else "")
        return words + (f", with {' and '.join(self.people)}" if self.people else "")

    @property
    def classes(self) -> tuple[int, ...]:
        """The class ids that the ranking may favour for this user, ascending."""
        return tuple(sorted(CLASS_IDS[name] for name in (*self.genres, self.era) if name))

    @property
    def metadata(self) -> dict[str, object]:
        """What `gmco get user` shows."""
        return {"name": f"viewer {self.user_id}", "taste": self.taste, "liked": list(self.liked)}


def make_viewers(
    films: Sequence[Film], vectors: npt.NDArray[np.float16], count: int = 300, seed: int = 7
) -> list[Viewer]:
    """`count` users, ids from 1, the same for the same films and seed. `vectors`: float16 [films, DIM]."""
    chance = random.Random(seed)
    by_genres = {genres: _rows(films, genres, "") for genres in GENRE_TASTES}
    known = _people(films)
    viewers = []
    for user_id in range(1, count + 1):
        genres = GENRE_TASTES[(user_id - 1) % len(GENRE_TASTES)]
        era = chance.choice(ERAS)
        rows = _rows(films, genres, era) if era else by_genres[genres]
        people = _favourites(films, rows, known, chance)
        liked = _liked(films, rows, people, chance)
        vector = _vector(vectors, liked, genres, people, era)
        titles = tuple(f"{films[row].title} ({films[row].year})" for row in liked[:5])
        viewers.append(
            Viewer(user_id=user_id, genres=genres, people=people, era=era, liked=titles, vector=vector)
        )
    return viewers


def _rows(films: Sequence[Film], genres: Iterable[str], era: str) -> list[int]:
    wanted = set(genres)
    return [r for r, film in enumerate(films) if wanted <= set(film.genres) and era in ("", film.decade)]


def _people(films: Sequence[Film]) -> frozenset[str]:
    counts = Counter(name for film in films for name in {*film.directors, *film.cast})
    return frozenset(name for name, films_with in counts.items() if films_with >= FILMS_MIN)


def _favourites(
    films: Sequence[Film], rows: Sequence[int], known: frozenset[str], chance: random.Random
) -> tuple[str, ...]:
    """Up to two people who stand behind many of the films in question."""
    counts = Counter(
        name for row in rows for name in {*films[row].directors, *films[row].cast} if name in known
    )
    # Ties by name: a Counter of sets has no order of its own, and string hashes change from run to run.
    leading = sorted(counts, key=lambda name: (-counts[name], name))[:25]
    return tuple(sorted(chance.sample(leading, min(len(leading), chance.randint(0, 2)))))


def _liked(
    films: Sequence[Film], rows: Sequence[int], people: Iterable[str], chance: random.Random
) -> list[int]:
    """The films this user has liked: those with their people first, then the best regarded of the taste."""
    favourites = set(people)
    theirs = [row for row in rows if favourites & {*films[row].directors, *films[row].cast}]
    best = sorted(rows, key=lambda row: (-(films[row].score or 0.0), films[row].media_id))[:60]
    others = chance.sample(best, min(len(best), LIKED_MAX))
    return list(dict.fromkeys([*theirs[: LIKED_MAX // 2], *others]))[:LIKED_MAX]


def _vector(
    vectors: npt.NDArray[np.float16],
    liked: Sequence[int],
    genres: Iterable[str],
    people: Iterable[str],
    era: str,
) -> npt.NDArray[np.float16]:
    """The mean of what they liked, and the tokens of their taste, so that the mean does not blur it."""
    mean = (
        unit(vectors[list(liked)].astype(np.float32).sum(axis=0))
        if liked
        else np.zeros(vectors.shape[1], np.float32)
    )
    asked = np.zeros(vectors.shape[1], dtype=np.float32)
    tokens = [("genre", name, 1.0) for name in genres]
    tokens += [(field, name, 0.5) for name in people for field in ("director", "cast")]
    tokens += [("decade", era, 0.4)] if era else []
    for field, token, weight in tokens:
        positions, values = coordinates(field, token)
        np.add.at(asked, positions, np.float32(weight) * values)
    vector: npt.NDArray[np.float16] = unit(mean + unit(asked)).astype(np.float16)
    return vector
