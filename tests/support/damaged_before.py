"""Shards whose photos version 0.1.0 damaged without a word; its outputs are in tests/fixtures.

They were made there by `one4all.rewrite_unit` with the protector of `make_protector()`.
"""

import struct

from PIL.PngImagePlugin import PngInfo
from support.builders import make_image, make_tar
from support.metadata_blocks import RIGHTS_XMP, block_of

from one4all.metadata import exif


def sources() -> dict[str, bytes]:
    """Name of a fixture to the shard that it was made from."""
    odd = struct.pack("<ii", -35, 1)
    copyright = "© Zoë Müller".encode()
    block = block_of(
        (0, [(0x0112, 3, 1, b"\6\0"), (0x8298, 2, len(copyright), copyright)]),
    )
    with_odd = block_of((0, [(0x0112, 3, 1, b"\6\0")]), (0x8825, [(0x0006, 10, 1, odd)]))
    raw = exif.PREFIX + block
    chunks = PngInfo()
    chunks.add_text("Raw profile type exif", f"\nexif\n{len(raw):8d}\n{raw.hex()}\n", zip=True)
    return {
        "rights": make_tar(
            [
                ("copyright.jpg", make_image("JPEG", quality=60, exif=exif.PREFIX + block)),
                ("odd.jpg", make_image("JPEG", quality=60, seed=1, exif=exif.PREFIX + with_odd)),
                ("xmp.jpg", make_image("JPEG", quality=60, seed=2, xmp=RIGHTS_XMP % b"")),
            ]
        ),
        "orientation": make_tar([("raw.png", make_image("PNG", pnginfo=chunks))]),
    }
