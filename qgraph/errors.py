"""Errors: what was asked, where, what was found, and the nearest thing that works."""

from collections.abc import Iterable
from difflib import get_close_matches


class QGraphError(Exception):
    """Base of every error that qgraph raises on purpose; the text is one readable line."""


class CaptureError(QGraphError):
    """A torch module could not be captured as a graph."""


class ModelError(QGraphError):
    """A model file or graph is missing, corrupt, or not what was asked for."""


class RecipeError(QGraphError):
    """A recipe, rule or option is unknown, contradictory, or matches nothing."""


class CalibrationError(QGraphError):
    """Calibration data does not fit the model, or there is none."""


class LoweringError(QGraphError):
    """A backend cannot lower a graph, or did not do what it promised."""


class VerificationError(QGraphError):
    """A pass broke its contract, or a graph is not legal."""


def nearest(word: str, known: Iterable[str]) -> str:
    """`; did you mean 'x'?` or `; known: a, b, c` for an error about an unknown `word`."""
    known = sorted(known)
    close = get_close_matches(word, known, n=3, cutoff=0.5)
    if close:
        return f"; did you mean {' or '.join(map(repr, close))}?"
    return f"; known: {', '.join(known[:12])}{', ...' if len(known) > 12 else ''}" if known else ""
