"""What a picture says about itself, kept without what may hold a second, unprotected copy.

* `exif`: EXIF blocks, edited as bytes.
* `xmp`: XMP packets; also the reservation against data mining.
* `iptc`: IPTC records, as Photoshop stores them in a JPEG.

All three are bounded by what they are given and by a limit on what they keep, and none raises for
what a file may hold.
"""
