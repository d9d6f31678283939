"""The film catalogue: is what comes out near what a person would call near?"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest

from admin import films, tastes

pytest.importorskip("bokeh_sampledata")


class Catalogue:
    def __init__(self) -> None:
        self.films = films.read_films()
        self.vectors = films.embed(self.films)
        self.wide = self.vectors.astype(np.float32)
        self.row = {}
        for row, film in enumerate(self.films):
            self.row.setdefault(film.title, row)

    def nearest(self, title: str, count: int) -> list[str]:
        scores = self.wide @ self.wide[self.row[title]]
        order = [row for row in np.argsort(-scores) if row != self.row[title]]
        return [self.films[row].title for row in order[:count]]


@pytest.fixture(scope="module")
def catalogue() -> Catalogue:
    return Catalogue()


def test_every_film_of_the_data_is_there(catalogue: Catalogue) -> None:
    assert len(catalogue.films) == 17_472
    ids = [film.media_id for film in catalogue.films]
    assert ids == sorted(set(ids))
    assert catalogue.vectors.dtype == np.float16
    assert catalogue.vectors.shape == (17_472, films.DIM)


def test_vectors_are_unit_length(catalogue: Catalogue) -> None:
    lengths = np.linalg.norm(catalogue.wide, axis=1)
    assert np.abs(lengths - 1).max() < 2e-3  # FP16


@pytest.mark.parametrize(
    ("title", "sequels"),
    [
        ("Toy Story", {"Toy Story 2", "Toy Story 3"}),
        ("Toy Story 3", {"Toy Story", "Toy Story 2"}),
        ("The Godfather", {"The Godfather Part II", "The Godfather Part III"}),
        ("Alien", {"Aliens", "Alien 3", "Alien Resurrection"}),
        ("The Matrix", {"The Matrix Reloaded", "The Matrix Revolutions"}),
        ("Back to the Future", {"Back to the Future Part II", "Back to the Future Part III"}),
        ("Shrek", {"Shrek 2", "Shrek the Third", "Shrek Forever After"}),
        ("Scream", {"Scream 2", "Scream 3", "Scream 4"}),
        (
            "Star Wars: Episode IV – A New Hope",
            {"Star Wars: Episode V – The Empire Strikes Back", "Star Wars: Episode VI – Return of the Jedi"},
        ),
    ],
)
def test_sequels_are_among_the_five_nearest(catalogue: Catalogue, title: str, sequels: set[str]) -> None:
    assert sequels <= set(catalogue.nearest(title, 5))


def test_embedding_does_not_depend_on_the_hash_seed_of_the_process(catalogue: Catalogue) -> None:
    positions, values = films.coordinates("genre", "Animation")
    # From another process: a change of these numbers changes every vector that users have stored.
    assert positions.tolist() == [int(word) % films.DIM for word in _digest_words("genre\0Animation")]
    assert float(np.square(values).sum()) == pytest.approx(1)


def _digest_words(text: str) -> npt.NDArray[np.uint16]:
    from xxhash import xxh3_128_digest

    return np.frombuffer(xxh3_128_digest(text.encode()), dtype="<u2")


def test_class_ids_are_stable() -> None:
    # Users keep these numbers in their data.
    known = {
        "Action": 1,
        "Animation": 3,
        "Western": 21,
        "G": 40,
        "R": 43,
        "1990s": 69,
        "United States": 100,
        "Bulgaria": 153,
    }
    assert {name: films.CLASS_IDS[name] for name in known} == known
    assert max(films.CLASS_IDS.values()) < 256


def test_classes_and_metadata_of_a_film(catalogue: Catalogue) -> None:
    film = catalogue.films[catalogue.row["Toy Story"]]
    assert [films.CLASS_NAMES[one] for one in film.classes] == [
        "Adventure", "Animation", "Comedy", "Fantasy", "G", "1990s", "United States",
    ]  # fmt: skip
    assert film.metadata["title"] == "Toy Story"
    assert film.metadata["year"] == 1995
    assert set(film.metadata) >= {"genres", "director", "cast", "country", "language", "certificate", "score"}


def test_title_tokens_leave_out_numbering_and_plurals() -> None:
    assert films.title_tokens("Aliens 3: The Return") == ["alien", "return", "alien return"]
    assert films.title_tokens("The") == []


def test_viewers_are_the_same_for_the_same_seed_and_others_for_another(catalogue: Catalogue) -> None:
    one, two = (tastes.make_viewers(catalogue.films, catalogue.vectors, 20) for _ in range(2))
    assert [v.taste for v in one] == [v.taste for v in two]
    assert all((a.vector == b.vector).all() for a, b in zip(one, two, strict=True))
    other = tastes.make_viewers(catalogue.films, catalogue.vectors, 20, seed=8)
    assert [v.taste for v in one] != [v.taste for v in other]


def test_what_a_viewer_is_recommended_fits_the_taste_in_words(catalogue: Catalogue) -> None:
    for viewer in tastes.make_viewers(catalogue.films, catalogue.vectors, 30):
        best = np.argsort(-(catalogue.wide @ viewer.vector.astype(np.float32)))[:10]
        fitting = [row for row in best if set(viewer.genres) & set(catalogue.films[row].genres)]
        assert len(fitting) >= 8, viewer.taste


def test_missing_data_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "bokeh_sampledata", None)
    with pytest.raises(FileNotFoundError, match="pip install bokeh_sampledata"):
        films.database()
