"""What a picture says about itself, kept without what may hold a second, unprotected copy.

* `description`: all of it, for one image.
* `exif`: EXIF blocks, edited as bytes.
* `xmp`: XMP packets; also the reservation against data mining.
* `iptc`: IPTC records, as Photoshop stores them in a JPEG.
* `png_texts`: such blocks in the texts of a PNG.

The work is bounded by what is given, what is kept by limits, and nothing is raised for what a file
may hold.
"""

from one4all.metadata.description import MAX_EXIF, MAX_TEXT, MAX_TEXTS, Description

__all__ = ["MAX_EXIF", "MAX_TEXT", "MAX_TEXTS", "Description"]
