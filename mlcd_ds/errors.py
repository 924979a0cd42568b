"""Errors that a user can mend. A door (train.py, tools/) prints the message alone and exits with `exit_code`.

A message says what was found, where, what was expected, and what to do.
"""

SECONDS_FOR_RANK_0 = 5.0
"""So long the other ranks hold back their message: most errors are everybody's, and are to be read once."""


def differences(before: dict, now: dict) -> str:
    """What of `now` stood otherwise in `before`, for people: "k 150 then, 151 now", commas between; "" for nothing."""
    return ", ".join(f"{name} {before.get(name)!r} then, {v!r} now" for name, v in now.items() if before.get(name) != v)


class UserError(Exception):
    """Base of every error whose cause lies in the user's input, not in this program."""

    exit_code = 2


class ConfigError(UserError):
    """A flag, a JSON key or a combination of them is wrong."""

    exit_code = 2


class DataError(UserError):
    """A shard, an image, a feature or a label file is missing, damaged or does not fit."""

    exit_code = 3


class CheckpointError(UserError):
    """A run folder or a checkpoint is in use, incomplete, damaged or of another run."""

    exit_code = 4


class NewerFormatError(CheckpointError):
    """A checkpoint is whole, but a later version of this program has written it."""


class NonFiniteError(UserError):
    """The loss or a gradient stopped being a number."""

    exit_code = 5


class PeerError(UserError):
    """Another rank has gone, or did not answer within --timeout_minutes."""

    exit_code = 6


class SaveError(UserError):
    """A checkpoint, or what a run must write, could not be: a full or read-only disk. Checkpoints before are untouched."""

    exit_code = 7


class DeviceMemoryError(UserError):
    """The GPU's memory did not suffice."""

    exit_code = 8


class Preempted(BaseException):
    """The run was asked to stop (a signal, a launcher that is gone), and has; --resume auto goes on from there.

    No Exception, as KeyboardInterrupt is none: a signal raises it anywhere while a run starts, and whoever takes any
    Exception there for damage of what is being read would throw away a good checkpoint.
    """

    exit_code = 75
