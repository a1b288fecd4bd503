"""What can go wrong, as one tree.

    One4AllError                 anything this package raises on purpose
    ├── UsageError               the caller must change something: exit code 2
    │   ├── ConfigError          a configuration key or value
    │   ├── ProtectorError       a protector is missing, damaged or does not fit its encoder
    │   ├── BindingError         the destination belongs to another configuration
    │   └── AccessError          a bucket is missing, unreachable or denied
    ├── LeaseHeldError           another run is at work on the destination: exit code 75
    ├── StalledRunError          another run holds the destination and gets nothing done
    ├── NotFiniteError           a loss or a gradient of a training is NaN or infinite
    ├── PerturbationError        a generator's output cannot be used
    ├── BadImageError            one image cannot be protected; the bad-image policy decides
    ├── ShardError               one shard cannot be trusted; it is not published
    │   ├── BudgetError          a protected image is over the budget; a defect of the program
    │   └── SourceChangedError   the shard was replaced while it was read; plan it again
    └── StorageError             a store failed after all retries
        ├── NotFoundError        no such object
        └── ConflictError        a conditional write lost: the object exists or has changed

A message says what was given, what is allowed and what to do next.
"""


class One4AllError(Exception):
    """Root of the tree. ``exit_code`` is what the command line returns for it."""

    exit_code = 1


class UsageError(One4AllError):
    """The request cannot be carried out as given; nothing has been written."""

    exit_code = 2


class ConfigError(UsageError):
    """A configuration key or value is unknown or out of range."""


class ProtectorError(UsageError):
    """A protector is missing, damaged, or does not fit the encoder it names."""


class BindingError(UsageError):
    """The destination prefix is bound to another configuration, or is not ours to write to."""


class AccessError(UsageError):
    """A bucket or folder is missing, unreachable, or refuses our credentials."""


class LeaseHeldError(One4AllError):
    """Another run is at work on the destination; try again later (EX_TEMPFAIL of sysexits.h)."""

    exit_code = 75


class StalledRunError(One4AllError):
    """Another run holds the destination and gets nothing done; waiting does not help."""


class NotFiniteError(One4AllError):
    """A training has met a loss or a gradient that is NaN or infinite, and must not go on.

    Attributes:
        images: URI of the unit and key of the sample, of each image that may be the reason.
        is_loss: Whether it was a loss, so that one of these images is the reason.
    """

    def __init__(
        self, message: str, images: list[tuple[str, str]], *, is_loss: bool = True
    ) -> None:
        super().__init__(message)
        self.images, self.is_loss = images, is_loss


class PerturbationError(One4AllError):
    """A generator's output cannot be used; its protector is broken, whatever the image."""


class BadImageError(One4AllError):
    """One image cannot be protected. The text is the reason recorded in the manifest."""


class ShardError(One4AllError):
    """One shard is truncated, garbled or ambiguous and must not be published."""


class BudgetError(ShardError):
    """A protected image is over the budget: a defect of the program, never of the image."""


class SourceChangedError(ShardError):
    """The source object was replaced while it was being read."""


class StorageError(One4AllError):
    """A store failed and the retries did not help."""


class NotFoundError(StorageError):
    """The object does not exist."""


class ConflictError(StorageError):
    """A conditional write lost: the object already exists, or is not the version expected."""
