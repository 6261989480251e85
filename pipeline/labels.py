"""What the labels of examples mean: classes by name or number, or numbers to be predicted."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Final

from modelzip.checkpoints.errors import CalibrationError

NUMBERS: Final = "score"
"""A column of this name holds numbers to be predicted, even where all of them are whole."""


def class_ids(
    values: list[Any],
    places: list[str],
    column: str,
    *,
    names: Sequence[str] | None,
    stated: tuple[str, ...] | None,
) -> tuple[tuple[int, ...] | tuple[float, ...], tuple[str, ...]]:
    """Class ids and names, or numbers and no names. stated: names that the source gives the whole numbers in it."""
    for value, where in zip(values, places, strict=True):
        if value is None or value == "" or not isinstance(value, str | int | float):
            raise CalibrationError(f"{where} has no label in the column {column!r}: each example needs one.")
    numbers = _numbers(values)
    whole = numbers is not None and all(number.is_integer() for number in numbers) and not _has_floats(values)
    if names is None and stated is None and numbers is not None and (not whole or column == NUMBERS):
        names = ()
    if names is not None and not names:
        if numbers is None:
            wrong = next(place for place, value in zip(places, values, strict=True) if _number(value) is None)
            raise CalibrationError(
                f"{wrong}: the label in the column {column!r} is no number, which is what is learnt."
            )
        return tuple(numbers), ()
    if (
        stated is not None and whole and numbers is not None
    ):  # a dataset's ids may stand in another order than the model's
        values = [stated[int(one)] if 0 <= one < len(stated) else str(int(one)) for one in numbers]
        if names is None:
            names = stated
        elif {one.casefold() for one in names} != {one.casefold() for one in stated}:
            values = [str(int(one)) for one in numbers]
    if names is None:
        names = _classes(values, numbers if whole else None)
    return _ids(values, places, column, names), tuple(names)


def _ids(values: Sequence[Any], places: Sequence[str], column: str, names: Sequence[str]) -> tuple[int, ...]:
    """The class of each label: its name's place, or, where labels aren't names, the whole number that it is."""
    ids = {name.casefold(): place for place, name in enumerate(names)}
    are_names = all(str(value).casefold() in ids for value in set(map(str, values)))
    found = []
    for value, where in zip(values, places, strict=True):
        number = _number(value)
        if are_names:
            found.append(ids[str(value).casefold()])
        elif number is not None and number.is_integer() and 0 <= number < len(names):
            found.append(int(number))
        elif str(value).casefold() in ids:
            found.append(ids[str(value).casefold()])
        else:
            hidden = " (-1 marks labels that are held back: choose another split)" if number == -1 else ""
            raise CalibrationError(
                f"{where}: the label {value!r} in the column {column!r} is none of the {len(names)} classes "
                f"{', '.join(names)}, nor the number of one{hidden}."
            )
    return tuple(found)


def _classes(values: Sequence[Any], whole: Sequence[float] | None) -> tuple[str, ...]:
    if whole is not None and min(whole) >= 0:
        return tuple(str(one) for one in range(int(max(whole)) + 1))
    return tuple(sorted({str(value) for value in values}))


def _number(value: Any) -> float | None:
    """The number that a label is or spells, None for words, nan and infinity among them."""
    try:
        number = float(value)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def _numbers(values: Sequence[Any]) -> list[float] | None:
    found = [_number(value) for value in values]
    return None if None in found else [number for number in found if number is not None]


def _has_floats(values: Sequence[Any]) -> bool:
    return any("." in value if isinstance(value, str) else isinstance(value, float) for value in values)
