"""What is wrong with a request's fields, in our words: which field, what is expected, and what came. Pure.

msgspec finds it and says it in a sentence of its own, which names Python's types; that sentence is read here, for its
parts, and never sent on. One that we cannot read still names its field.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from router.errors import Code, RequestError

_SENTENCE = re.compile(r"(?P<what>.*?)(?: - at (?P<key>`key` in )?`\$?\.?(?P<path>[^`]*)`)?", re.DOTALL)
_NAMED = re.compile(r"Object (?P<how>contains unknown|missing required) field `(?P<name>[^`]*)`", re.DOTALL)
_TYPE = re.compile(r"Expected `(?P<expected>[^`]*)`, got `(?P<came>[^`]*)`")
_LENGTH = re.compile(
    r"Expected `(?P<kind>\w+)` of length (?P<bound><= |>= )?(?P<size>\d+)(?:, got (?P<came>\d+))?"
)
_RANGE = re.compile(r"Expected `[^`]*` (?P<bound><=|>=|<|>) (?P<number>-?[\d.e+]+)")
_CHOICE = re.compile(r"Invalid enum value (?P<came>.*)", re.DOTALL)

_EXPECTED = {
    "id": "an id (a whole number or its decimal digits)",
    "int": "a whole number",
    "float": "a number",
    "str": "a string",
    "bool": "true or false",
    "array": "a list",
    "object": "a map",
    "null": "null",
}
_CAME = {**_EXPECTED, "bool": "a boolean", "float": "a floating-point number", "bytes": "bytes"}
_UNITS = {"str": ("character", "characters"), "array": ("entry", "entries")}
_BOUNDS = {"<=": "at most", ">=": "at least", "<": "less than", ">": "more than"}
_SHOWN_CHARS_MAX = 200


def translate(sentence: str, choices: Mapping[str, Sequence[str]]) -> RequestError:
    """The refusal that one of msgspec's sentences means. `choices`: the words that some fields take, by path."""
    match = _SENTENCE.fullmatch(sentence)
    assert match is not None, "every part of the pattern is optional"
    what, path = match["what"], _printable(match["path"] or "")
    if named := _NAMED.match(what):
        name = _printable(named["name"])
        field = f"{path}.{name}" if path else name
        if named["how"] == "contains unknown":
            return RequestError("unknown_field", f"this op has no field {name!a}; remove it", field)
        return RequestError("missing_field", f"send {name}", field)
    code, must = _must(what, choices.get(path, ()))
    subject = path or "the request"
    if match["key"]:
        subject = f"a key of {subject}"
    return RequestError(code, f"{subject} {must}", path or None)


def _must(what: str, choices: Sequence[str]) -> tuple[Code, str]:
    """The code, and the sentence after its subject."""
    if wrong := _TYPE.fullmatch(what):
        expected = _one_of(choices) if choices else _expected(wrong["expected"])
        return "bad_type", f"must be {expected}, not {_CAME.get(wrong['came'], 'a value of another kind')}"
    if wrong := _LENGTH.fullmatch(what):
        one, many = _UNITS.get(wrong["kind"], ("entry", "entries"))
        unit = one if wrong["size"] == "1" else many
        if wrong["bound"] is None:
            return "bad_type", f"must have {wrong['size']} {unit}, not {wrong['came']}"
        bound = wrong["bound"].strip()
        code: Code = "too_large" if bound == "<=" else "bad_type"
        return code, f"must have {_BOUNDS[bound]} {wrong['size']} {unit}"
    if wrong := _RANGE.fullmatch(what):
        return "out_of_range", f"must be {_BOUNDS[wrong['bound']]} {wrong['number'].removesuffix('.0')}"
    if wrong := _CHOICE.fullmatch(what):
        return "out_of_range", f"must be {_one_of(choices)}, not {_printable(wrong['came'])}"
    if "out of range" in what:
        return "out_of_range", "must fit 64 bits"
    return "bad_type", "is not of the form that docs/protocol.md gives"


def _expected(types: str) -> str:
    names = types.split(" | ")
    if "int" in names and "str" in names:  # only ids may be either
        names = ["id", *names[2:]]
    return " or ".join(_EXPECTED.get(name, "a value of another kind") for name in names)


def _one_of(words: Sequence[str]) -> str:
    """`"a", "b" or "c"`; without words, what can be said without them."""
    quoted = [f'"{word}"' for word in words]
    if not quoted:
        return "one of the words that docs/protocol.md gives"
    return " or ".join([", ".join(quoted[:-1]), quoted[-1]] if len(quoted) > 1 else quoted)


def _printable(text: str) -> str:
    """Safe to send back: bounded, and without what UTF-8 cannot hold."""
    return text[:_SHOWN_CHARS_MAX].encode("ascii", "backslashreplace").decode("ascii")
