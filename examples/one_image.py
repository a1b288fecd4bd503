"""Protect one picture: a PIL image in, a PIL image out.

python examples/one_image.py photo.jpg protected.jpg [--protector NAME_OR_FOLDER]
"""

import argparse

from PIL import Image

import one4all


def main() -> None:
    parser = argparse.ArgumentParser(description="Protect one picture.")
    parser.add_argument("source")
    parser.add_argument("destination")
    parser.add_argument("--protector", default="default")
    options = parser.parse_args()

    protector = one4all.load(options.protector)
    with Image.open(options.source) as clean:
        protected = protector.protect_image(clean)

    # Pillow writes metadata only if it is told to. High quality and 4:4:4 keep the perturbation in
    # a JPEG. `protect_file` takes care of both by itself: see folder.py.
    protected.save(
        options.destination,
        exif=protected.getexif(),
        icc_profile=protected.info.get("icc_profile"),
        quality=95,
        subsampling=0,
    )


if __name__ == "__main__":
    main()
