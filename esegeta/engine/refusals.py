"""Refusals: the one shape of their messages, and the classes by which code tells them from failures.

Needs neither torch nor numpy: a process that only starts others uses it, too.
"""


class Problem(str):
    """The text of a refusal, with who refuses. A ValueError, TypeError or NotImplementedError with it is one."""

    where = ""

    def by(self, name: str) -> "Problem":
        """Return the same, refused by another function."""
        text = Problem(name + self[len(self.where) :])
        text.where = name
        return text


def problem(where: str, expected: str, got: str, advice: str) -> Problem:
    """Return the message of an error in the one shape that all of them have.

    >>> print(problem("gradient", "a scalar score", "shape (2,)", "Apply a reducer"))
    gradient: expected a scalar score, got shape (2,). Apply a reducer.
    """
    text = Problem(f"{where}: expected {expected}, got {got}. {advice.rstrip('.')}.")
    text.where = where
    return text


class Refusal(Exception):
    """What was asked for is not possible: nothing went wrong, and trying again would change nothing."""


class Refused(Refusal, ValueError):
    """A refusal of a value."""


class RefusedType(Refusal, TypeError):
    """A refusal of something of the wrong type."""


class EmptyMask(Refused):
    """A mask without a voxel: there is nothing to explain."""


def refused(where: str, expected: str, got: str, advice: str) -> Refused:
    """Return the error for a value that is not as expected; its message is one line.

    >>> raise refused("gradient", "a scalar score", "shape (2,)", "Apply a reducer")
    Traceback (most recent call last):
    esegeta.engine.refusals.Refused: gradient: expected a scalar score, got shape (2,). Apply a reducer.
    """
    return Refused(problem(*map(one_line, (where, expected, got, advice))))


def refused_type(where: str, expected: str, got: str, advice: str) -> RefusedType:
    """Return the error for something of the wrong type; its message is one line.

    >>> raise refused_type("batched", "an explanation", "int 3", "Give it a score first")
    Traceback (most recent call last):
    esegeta.engine.refusals.RefusedType: batched: expected an explanation, got int 3. Give it a score first.
    """
    return RefusedType(problem(*map(one_line, (where, expected, got, advice))))


def is_refusal(error: BaseException) -> bool:
    """Check whether an error refuses what was asked for, by its class or by the classes of it and its message.

    What the system has no room for has a message of the same shape, and may go well another time.

    >>> is_refusal(ValueError(problem("ig", "steps >= 1", "0", "Raise it"))), is_refusal(ValueError("0"))
    (True, False)
    >>> is_refusal(OSError(problem("write", "to write x", "no room", "Make room")))
    False
    """
    of_what_is_asked = isinstance(error, (ValueError, TypeError, NotImplementedError))
    said = any(isinstance(text, Problem) for text in error.args[:1])
    return isinstance(error, Refusal) or (of_what_is_asked and said)


def one_line(text: object) -> str:
    """Return a text, or the message of an error, without line breaks.

    >>> one_line(ValueError("first\\n  second"))
    'first second'
    """
    return " ".join(str(text).split())
