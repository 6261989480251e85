"""The errors a user may meet. Each message is one sentence: the culprit, what was found, what to do about it."""

from __future__ import annotations

from collections.abc import Sequence


class ModelzipError(Exception):
    """Base of all errors that the command line turns into a sentence and an exit code."""

    exit_code = 2


class RecipeError(ModelzipError):
    """A recipe or an option is wrong."""


class CheckpointError(ModelzipError):
    """A model can't be read: not there, broken, or of a kind that the method doesn't take."""


class CalibrationError(ModelzipError):
    """Calibration or evaluation data can't be used."""


class OutputError(ModelzipError):
    """The output can't be written where it was asked for."""


class GateError(ModelzipError):
    """The result is there, but misses a quality gate."""

    exit_code = 3


class MachineError(ModelzipError):
    """The machine failed: memory, disk or device."""

    exit_code = 4


class ProblemsError(RecipeError):
    """Several mistakes found in one go; `sentences` holds one line each."""

    def __init__(self, sentences: Sequence[str]) -> None:
        super().__init__("\n".join(sentences))
        self.sentences = tuple(sentences)
