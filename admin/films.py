"""The films of PyPI `bokeh_sampledata`, embedded without any model: a catalogue that a person can judge.

The embedding is feature hashing (Weinberger et al., 2009, "Feature Hashing for Large Scale Multitask
Learning"): each token of a film (a genre, a name, a word of the title, …) owns `SPREAD` signed coordinates
given by a hash of its text, so equal tokens pull two films together and different ones are nearly orthogonal.
Within a field rare tokens weigh more; between fields `WEIGHTS` decides. Nothing is learnt or downloaded.
"""

from __future__ import annotations

import math
import re
import sqlite3
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import numpy.typing as npt
from xxhash import xxh3_128_digest

DIM = 1024
# Coordinates per token, one per 16 bits of its hash: unrelated names then share a little, never everything.
SPREAD = 8
CAST_MAX = 40  # some casts list hundreds of extras, each of whom would dilute the leads

# Between fields. Franchise and people first: they are what a viewer would call similar; the rest breaks ties.
WEIGHTS: Mapping[str, float] = {
    "title": 0.75,
    "genre": 0.70,
    "director": 0.45,
    "writer": 0.50,
    "cast": 0.60,
    "decade": 0.25,
    "country": 0.25,
    "language": 0.25,
    "certificate": 0.15,
}

# Class ids are part of the data that users keep: append, never renumber.
GENRES = (
    "Action", "Adventure", "Animation", "Biography", "Comedy", "Crime", "Documentary", "Drama", "Family",
    "Fantasy", "History", "Horror", "Music", "Musical", "Mystery", "Romance", "Sci-Fi", "Sport", "Thriller",
    "War", "Western",
)  # fmt: skip
CERTIFICATES = ("G", "PG", "PG-13", "R", "NC-17", "M/PG", "GP", "M", "X")
DECADES = tuple(f"{year}s" for year in range(1900, 2100, 10))
COUNTRIES = (
    "United States", "United Kingdom", "France", "Germany", "Canada", "Italy", "Australia", "Japan",
    "Spain", "India", "Belgium", "Mexico", "Hong Kong", "Sweden", "People's Republic of China", "Denmark",
    "Ireland", "Switzerland", "Netherlands", "South Korea", "Israel", "Austria", "Argentina", "Russia",
    "Norway", "South Africa", "Brazil", "Poland", "New Zealand", "Iran", "Czech Republic", "Hungary",
    "Romania", "Portugal", "Luxembourg", "Taiwan", "Thailand", "Finland", "Soviet Union", "Iceland",
    "Chile", "Greece", "Turkey", "West Germany", "Colombia", "Philippines", "Egypt", "Peru", "Palestine",
    "Czechoslovakia", "Yugoslavia", "Morocco", "Cuba", "Bulgaria",
)  # fmt: skip
FIRST_CLASS = {"genre": 1, "certificate": 40, "decade": 60, "country": 100}


def _class_table() -> dict[str, int]:
    table: dict[str, int] = {}
    named = {"genre": GENRES, "certificate": CERTIFICATES, "decade": DECADES, "country": COUNTRIES}
    for field, names in named.items():
        for offset, name in enumerate(names):
            assert name not in table
            table[name] = FIRST_CLASS[field] + offset
    assert len(set(table.values())) == len(table)
    assert max(table.values()) < 256
    return table


CLASS_IDS: Mapping[str, int] = _class_table()
CLASS_NAMES: Mapping[int, str] = {number: name for name, number in CLASS_IDS.items()}


@dataclass(frozen=True, kw_only=True, slots=True)
class Film:
    """One row of the catalogue. Lists are in the order of the data; `score` is the critics' mean, 0 to 10."""

    media_id: int
    title: str
    year: int
    certificate: str
    genres: tuple[str, ...]
    directors: tuple[str, ...]
    writers: tuple[str, ...]
    cast: tuple[str, ...]
    countries: tuple[str, ...]
    languages: tuple[str, ...]
    score: float | None

    @property
    def decade(self) -> str:
        return f"{self.year // 10 * 10}s"

    @property
    def classes(self) -> tuple[int, ...]:
        """Class ids, ascending: genres, certificate, decade and the countries that have one."""
        names = (*self.genres, self.certificate, self.decade, *self.countries)
        return tuple(sorted({CLASS_IDS[name] for name in names if name in CLASS_IDS}))

    @property
    def metadata(self) -> dict[str, object]:
        """What a reply shows of the film; short, because it travels with every hit."""
        return {
            "title": self.title,
            "year": self.year,
            "genres": list(self.genres),
            "director": ", ".join(self.directors[:2]),
            "cast": ", ".join(self.cast[:4]),
            "country": ", ".join(self.countries[:3]),
            "language": ", ".join(self.languages[:3]),
            "certificate": self.certificate,
            "score": self.score,
        }

    def tokens(self, field: str) -> list[str]:
        """The film's tokens in one field of `WEIGHTS`, without repeats."""
        match field:
            case "title":
                return title_tokens(self.title)
            case "genre":
                found: Sequence[str] = self.genres
            case "director":
                found = self.directors
            case "writer":
                found = self.writers
            case "cast":
                found = self.cast[:CAST_MAX]
            case "country":
                found = self.countries
            case "language":
                found = self.languages
            case "decade":
                found = (self.decade,)
            case "certificate":
                found = (self.certificate,) if self.certificate else ()
            case _:
                raise ValueError(f"unknown field {field!r}")
        return list(dict.fromkeys(found))


def _split(text: str | None) -> tuple[str, ...]:
    return tuple(part for part in (piece.strip() for piece in (text or "").split(", ")) if part)


def database() -> Path:
    """Where `bokeh_sampledata` keeps its films. Raises FileNotFoundError with what to install."""
    try:
        import bokeh_sampledata  # an extra: only the demo needs it
    except ImportError as error:
        raise FileNotFoundError("the film data is not installed: pip install bokeh_sampledata") from error
    path = Path(next(iter(bokeh_sampledata.__path__))) / "_data" / "movies.db"
    if not path.is_file():
        raise FileNotFoundError(f"bokeh_sampledata has no {path.name}: pip install -U bokeh_sampledata")
    return path


def read_films(path: Path | None = None) -> list[Film]:
    """Every film, by ascending media id (the data's own row id)."""
    connection = sqlite3.connect(f"file:{path or database()}?mode=ro", uri=True)
    try:
        rows = connection.execute(
            "SELECT o.ID, o.Title, o.Year, o.Rating, o.Genre, o.Director, o.Writer, o.'Cast', o.Country,"
            " o.Language, t.Rating FROM omdb o LEFT JOIN tomatoes t ON t.ID = o.ID ORDER BY o.ID"
        ).fetchall()
    finally:
        connection.close()
    return [
        Film(
            media_id=row[0],
            title=str(row[1]),
            year=int(row[2]),
            certificate=row[3] or "",
            genres=_split(row[4]),
            directors=_split(row[5]),
            writers=_split(row[6]),
            cast=_split(row[7]),
            countries=_split(row[8]),
            languages=_split(row[9]),
            score=row[10],
        )
        for row in rows
    ]


_WORD = re.compile(r"[^\W_]+")
# Words that say nothing of a film, and the numbering of sequels, which says only that it is one.
_STOP_WORDS = """
    the a an of and in on to is at by for with from de la le el les der die das part episode chapter vol
    volume
    i ii iii iv v vi vii viii ix x 1 2 3 4 5 6 7 8 9 10
"""
_STOP = frozenset(_STOP_WORDS.split())


def title_tokens(title: str) -> list[str]:
    """Words (lower case, plural s cut off, no stop words) and neighbouring pairs of them, without repeats."""
    words = [
        word for word in _WORD.findall(title.lower().replace("'s", "").replace("’s", "")) if word not in _STOP
    ]
    stems = [
        word[:-1] if len(word) > 3 and word.endswith("s") and not word.endswith("ss") else word
        for word in words
    ]
    pairs = [f"{first} {second}" for first, second in pairwise(stems)]
    return list(dict.fromkeys(stems + pairs))


def coordinates(field: str, token: str) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
    """The token's positions int64 [SPREAD] and values float32 [SPREAD]; a squared norm of about 1."""
    words = np.frombuffer(xxh3_128_digest(f"{field}\0{token}".encode()), dtype="<u2").astype(np.int64)
    signs = np.where(words & 0x8000, np.float32(-1), np.float32(1))
    return words % DIM, (signs / math.sqrt(SPREAD)).astype(np.float32)


def token_weights(films: Iterable[Film], field: str) -> dict[str, float]:
    """How much each token of a field says, by its rarity: log(1 + n / films with it), as in idf."""
    catalogue = list(films)
    counts = Counter(token for film in catalogue for token in film.tokens(field))
    return {token: math.log1p(len(catalogue) / count) for token, count in counts.items()}


def embed(films: Sequence[Film]) -> npt.NDArray[np.float16]:
    """Unit vectors, float16 [len(films), DIM].

    Fields are normalised one by one, so that a long cast is no advantage.
    """
    total = np.zeros((len(films), DIM), dtype=np.float32)
    for field, weight in WEIGHTS.items():
        total += np.float32(weight) * _embed_field(films, field)
    return unit(total).astype(np.float16)


def unit(vectors: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Rows scaled to length 1; a row of zeros stays."""
    lengths = np.linalg.norm(vectors, axis=-1, keepdims=True)
    return (vectors / np.where(lengths == 0, np.float32(1), lengths)).astype(np.float32, copy=False)


def _embed_field(films: Sequence[Film], field: str) -> npt.NDArray[np.float32]:
    """One field's unit vectors, float32 [len(films), DIM]; zeros where a film says nothing."""
    weights = token_weights(films, field)
    numbers = {token: number for number, token in enumerate(weights)}
    pairs = [coordinates(field, token) for token in weights]
    positions = np.stack([position for position, _ in pairs])
    values = (
        np.stack([value for _, value in pairs]) * np.array(list(weights.values()), dtype=np.float32)[:, None]
    )
    rows: list[int] = []
    tokens: list[int] = []
    for row, film in enumerate(films):
        found = [numbers[token] for token in film.tokens(field)]
        rows.extend([row] * len(found))
        tokens.extend(found)
    places = np.array(rows, dtype=np.int64)[:, None] * DIM + positions[tokens]
    flat = np.bincount(places.ravel(), weights=values[tokens].ravel(), minlength=len(films) * DIM)
    return unit(flat.reshape(len(films), DIM).astype(np.float32))
