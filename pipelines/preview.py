"""Contact sheet of what a protector does to a few images."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from one4all.corpus import images_of, list_units, open_source, read_samples
from one4all.errors import BadImageError, NotFoundError, UsageError
from one4all.image_kinds import IMAGE_EXTENSIONS
from one4all.images import decode
from one4all.protectors.protector import Protector
from one4all.report import contact_sheet
from one4all.storage import LocalStorage, open_storage
from one4all.visibility import measurable, visibility


def preview(source: str, output: Path, *, protector: str, num_images: int) -> int:
    """Draw clean image, protected image and amplified perturbation to a PNG file.

    Images are drawn at real size; of large ones the middle. Below each row stands how visible the
    protection of the whole image is, if the extra `visibility` is installed.

    Args:
        source: An image, or a corpus: a folder of images, a .tar shard, a Parquet file; local or
            s3://.
        output: PNG file.
        protector: Name, folder or URI.
        num_images: At most; the first ones found.

    Returns:
        Number of images drawn; unreadable ones are left out.

    Raises:
        UsageError: No readable image; or the output is a folder.
    """
    if output.is_dir():
        raise UsageError(
            f"{output} is a folder; name the PNG file to write, such as {output / 'preview.png'}"
        )
    names, images = [], []
    try:
        for name, data in _images(source):
            with suppress(BadImageError):
                images.append(decode(data).pixels)
                names.append(name)
            if len(images) == num_images:
                break
    except NotFoundError as error:
        raise UsageError(str(error)) from error
    if not images:
        raise UsageError(f"{source} holds no image that can be read")
    model = Protector.load(protector)
    rows = [
        (f"{name}: {visibility(clean, protected)}" if measurable() else name, clean, protected)
        for name, clean, protected in zip(names, images, model.protect(images), strict=True)
    ]
    output.parent.mkdir(parents=True, exist_ok=True)
    contact_sheet(rows).save(output, "PNG")
    return len(rows)


def _images(source: str) -> Iterator[tuple[str, bytes]]:
    """(name, file) of the images of a source, in order."""
    parent, _, base = source.rstrip("/").rpartition("/")
    if base.rpartition(".")[2].lower() in IMAGE_EXTENSIONS:
        storage = open_storage(parent or ("/" if source.startswith("/") else "."))
        if not (isinstance(storage, LocalStorage) and (storage.root / base).is_dir()):
            yield base, storage.read_bytes(base)
            return
    corpus = open_source(source)
    corpus.check(writable=False)
    for unit in list_units(corpus):
        for sample in read_samples(corpus, unit):
            yield from ((member.name, member.payload) for member in images_of(sample))
