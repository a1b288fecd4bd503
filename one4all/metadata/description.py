"""What a picture says about itself, in the kinds of blocks that image formats share.

A block is kept without what may hold a picture, and only so many bytes of each kind are: 64 KB in
all, in which a second copy of a photo does not fit.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from one4all.metadata import exif as exif_blocks
from one4all.metadata import iptc as iptc_records
from one4all.metadata import xmp as xmp_packets

MAX_EXIF, MAX_XMP, MAX_IPTC = 16_384, 32_768, 8_192  # bytes
MAX_TEXTS = 8_192  # bytes of all comments and texts of an image
MAX_TEXT = 2048  # bytes of one of them


@dataclass(frozen=True)
class Description:
    """Metadata of one image.

    Attributes:
        exif: EXIF block in TIFF structure, without a prefix.
        xmp: XMP packet.
        iptc: IPTC records.
        comment: Comment of a JPEG, or the text of a PNG that is called so.
        tiff: Other descriptive tags of a TIFF; its EXIF is among them.
    """

    exif: bytes = field(default=b"", repr=False)
    xmp: bytes = field(default=b"", repr=False)
    iptc: bytes = field(default=b"", repr=False)
    comment: bytes = field(default=b"", repr=False)
    tiff: tuple[exif_blocks.Entry, ...] = field(default=(), repr=False)

    @classmethod
    def of(
        cls, *, exif: object = b"", xmp: object = b"", iptc: object = b"", comment: object = b""
    ) -> Description:
        """What is kept of the blocks of a file; what is no bytes counts as none."""
        comment = _bytes(comment)
        return cls(
            exif=exif_blocks.without_pictures(_bytes(exif), max_bytes=MAX_EXIF),
            xmp=xmp_packets.without_pictures(_bytes(xmp), max_bytes=MAX_XMP),
            iptc=iptc_records.without_pictures(_bytes(iptc), max_bytes=MAX_IPTC),
            comment=comment if len(comment) <= MAX_TEXT else b"",
        )

    @property
    def orientation(self) -> int:
        """Orientation, 1 to 8: of EXIF, or else of XMP."""
        stated = exif_blocks.orientation(self.exif)
        return stated if stated > 1 else xmp_packets.orientation(self.xmp)

    @property
    def data_mining(self) -> str:
        """The reservation that the XMP packet states, a URI of the PLUS vocabulary, or ""."""
        return xmp_packets.data_mining(self.xmp)

    def upright(self) -> Description:
        """The same for pixels that were turned on reading: it states no orientation."""
        return replace(
            self,
            exif=exif_blocks.without_orientation(self.exif),
            xmp=xmp_packets.without_orientation(self.xmp),
        )

    def with_data_mining_prohibited(self) -> Description:
        """The same with a reservation against training, unless it states one already."""
        return replace(self, xmp=xmp_packets.with_data_mining_prohibited(self.xmp))


def _bytes(block: object) -> bytes:
    return block if isinstance(block, bytes) else b""
