"""Samples and their members: what every container is read as.

Names are data: nothing is extracted, nothing is unpickled, no name is ever used as a path.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from one4all.image_kinds import is_image
from one4all.wrapped_images import why_wrapped

DEFAULT_MAX_SAMPLE_BYTES = 1 << 30


@dataclass(frozen=True, kw_only=True)
class Member:
    """One file of a sample, with its content in memory.

    Attributes:
        name: Name in its container.
        payload: Content; empty unless it is a regular file.
        envelope: All that a copy must keep beside the content, byte for byte, such as a tar header.
        is_file: Whether it is a regular file; a folder or a link is not.
        link_target: Name that a link, hard or symbolic, stands for; "" for everything else.
        is_declared_image: Whether its container says that it is an image, such as a column of a
            table; then it is one, whatever its name and content.
    """

    name: str
    payload: bytes = field(repr=False)
    envelope: bytes = field(default=b"", repr=False)
    is_file: bool = True
    link_target: str = ""
    is_declared_image: bool = False

    @property
    def stored_bytes(self) -> int:
        """Bytes that it takes in its container."""
        return len(self.envelope) + len(self.payload)

    @property
    def is_dot_file(self) -> bool:
        """Whether it is a file whose name starts with a dot."""
        return self.is_file and self.name.rpartition("/")[2].startswith(".")

    @property
    def has_key(self) -> bool:
        """Whether WebDataset reads it: a file whose name has a dot, and not as its first letter."""
        return self.is_file and "." in self.name.rpartition("/")[2] and not self.is_dot_file

    @property
    def key(self) -> str:
        """WebDataset key: the name up to the first dot of its last component.

        A name that starts with a dot has no key there; it stands alone, under its whole name.
        """
        folder, slash, base = self.name.rpartition("/")
        return folder + slash + (base.partition(".")[0] or base)

    def changes_beside(self, written: Member, *, replaced: bool) -> Iterator[str]:
        """How the envelope of what was written differs: a sentence each, that begins with "its".

        Args:
            written: What was written for this member.
            replaced: Whether it is a protected image, whose envelope may tell its size and name.
        """
        if not replaced and self.envelope != written.envelope:
            yield "its header is not the source's"

    def changes(self, written: Member) -> Iterator[str]:
        """How a copy differs from this member: a sentence each, that begins with "its"."""
        yield from self.changes_beside(written, replaced=False)
        if self.payload != written.payload:
            yield "its bytes are not the source's"


@dataclass(frozen=True)
class Sample:
    """Consecutive members that share a key, and files without one that stand between them.

    A member that is no file stands alone. Without members, it is an object that is passed over.
    """

    key: str
    members: tuple[Member, ...]

    @property
    def num_bytes(self) -> int:
        """Bytes of content."""
        return sum(len(member.payload) for member in self.members)

    @property
    def stored_bytes(self) -> int:
        """Bytes that it takes in its container."""
        return sum(member.stored_bytes for member in self.members)


def is_exempt(member: Member, sidecar_patterns: Sequence[str]) -> bool:
    """Whether a member shall be left alone, image or not.

    Args:
        member: One member.
        sidecar_patterns: Such as ``*.seg.png``; matched, with case, against the last component of
            the name.
    """
    base = member.name.rpartition("/")[2]
    return any(fnmatch.fnmatchcase(base, pattern) for pattern in sidecar_patterns)


def is_protectable(member: Member, sidecar_patterns: Sequence[str] = ()) -> bool:
    """Whether a member is an image that must be protected; everything else is a sidecar.

    Args:
        member: One member.
        sidecar_patterns: Images to leave alone; see `is_exempt`.
    """
    if not member.is_file or is_exempt(member, sidecar_patterns):
        return False
    return (
        member.is_declared_image
        or is_image(member.name, member.payload)
        or bool(why_wrapped(member.payload))
    )


def images_of(sample: Sample, sidecar_patterns: Sequence[str] = ()) -> list[Member]:
    """Members of a sample that are images to be protected, or learnt from; see `is_protectable`."""
    return [member for member in sample.members if is_protectable(member, sidecar_patterns)]


def printable(text: str) -> str:
    """Text that any encoding can hold: bytes of a name that are no UTF-8 become ``\\xe9``."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
