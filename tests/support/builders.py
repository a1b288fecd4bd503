"""Small real objects for tests, built in code."""

from __future__ import annotations

import io
import json
import struct
import tarfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
import torch
from PIL import Image

from one4all.concepts import ConceptBank
from one4all.corpus import Unit, list_units
from one4all.encoders import EncoderConfig, load_encoder
from one4all.images import Pixels
from one4all.ledger.records import Binding
from one4all.protectors.card import ProtectorCard
from one4all.protectors.config import GeneratorConfig
from one4all.protectors.generator import Generator
from one4all.protectors.protector import Protector, golden_embedding
from one4all.rewrite import RewriteConfig
from one4all.storage import Storage

TINY_ENCODER = EncoderConfig(input_size=32)
TINY_GENERATOR = GeneratorConfig(width=8, num_blocks=1, embedding_channels=16)


def make_pixels(height: int = 40, width: int = 56, channels: int = 3, *, seed: int = 0) -> Pixels:
    """A smooth random picture with some texture, (H, W, C) uint8."""
    random = np.random.default_rng(seed)
    coarse = random.uniform(0, 255, (4, 4, channels)).astype(np.float32)
    planes = [
        np.asarray(
            Image.fromarray(coarse[:, :, c]).resize((width, height), Image.Resampling.BICUBIC)
        )
        for c in range(channels)
    ]
    noisy = np.stack(planes, axis=2) + random.normal(0, 6, (height, width, channels))
    return np.clip(noisy, 0, 255).astype(np.uint8)


def make_image(format: str = "JPEG", mode: str = "RGB", *, seed: int = 0, **options: Any) -> bytes:
    """An image file of 56x40 pixels."""
    channels = {"L": 1, "LA": 2, "RGB": 3, "RGBA": 4, "CMYK": 4}.get(mode, 3)
    pixels = make_pixels(channels=channels, seed=seed)
    if mode in ("L", "LA", "RGB", "RGBA"):
        image = Image.fromarray(pixels[:, :, 0] if mode == "L" else pixels)
    elif mode == "CMYK":
        image = Image.frombytes("CMYK", (56, 40), pixels.tobytes())
    else:
        image = Image.fromarray(pixels).convert(mode)
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def make_16_bit_png(channels: int) -> bytes:
    """A real PNG with 16 bits a channel, gray (1) or RGB (3)."""
    rows = b"".join(b"\0" + bytes(2 * channels * 8) for _ in range(8))

    def chunk(kind: bytes, payload: bytes) -> bytes:
        body = kind + payload
        return struct.pack(">I", len(payload)) + body + struct.pack(">I", zlib.crc32(body))

    header = struct.pack(">IIBBBBB", 8, 8, 16, 0 if channels == 1 else 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )


def make_bomb_png() -> bytes:
    """A few hundred bytes that declare 20,000 x 20,000 pixels."""
    png = bytearray(make_image("PNG"))
    png[16:24] = struct.pack(">II", 20_000, 20_000)
    png[29:33] = struct.pack(">I", zlib.crc32(bytes(png[12:29])))
    return bytes(png)


def make_samples(num_samples: int = 5, *, seed: int = 0) -> list[tuple[str, bytes]]:
    """Members of a shard: image, class, text and JSON for each sample."""
    files = []
    for index in range(num_samples):
        key = f"sample{index:04d}"
        files.append((f"{key}.jpg", make_image(seed=seed + index, quality=92)))
        files.append((f"{key}.cls", str(index % 3).encode()))
        files.append((f"{key}.txt", f"ein Bild, {index} - ü".encode()))
        files.append((f"{key}.json", json.dumps({"index": index, "ü": [1.50]}).encode()))
    return files


def make_tar(files: list[tuple[str, bytes]], *, format: int = tarfile.GNU_FORMAT) -> bytes:
    """A tar written by tarfile, with owner, mode and time of its own."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=format) as archive:
        for index, (name, payload) in enumerate(files):
            info = tarfile.TarInfo(name)
            info.size, info.mtime, info.mode = len(payload), 1_700_000_000 + index, 0o640
            info.uid, info.gid, info.uname, info.gname = 1000, 100, "ann", "users"
            archive.addfile(info, io.BytesIO(payload))
    return buffer.getvalue()


def write_corpus(folder: Path, *, num_shards: int = 2, num_samples: int = 5) -> Path:
    """A folder of shards."""
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(num_shards):
        tar = make_tar(make_samples(num_samples, seed=100 * index))
        (folder / f"shard-{index:03d}.tar").write_bytes(tar)
    return folder


def fill_corpus(storage: Storage, container: str, *, num_images: int = 6) -> None:
    """Put images into a place, and something beside them, as a container has it."""
    images = [make_image(seed=index) for index in range(num_images)]
    if container == "tar":
        storage.write_bytes("photos.tar", make_tar(make_samples(num_images)))
    elif container == "images":
        for index, image in enumerate(images):
            storage.write_bytes(f"a/photo {index} ü+%.jpg", image)
        storage.write_bytes("a/notes.txt", b"beside them")
    else:
        rows = pa.table({"image": images, "label": list(range(num_images))})
        file = io.BytesIO()
        parquet.write_table(rows, file, row_group_size=4)
        storage.write_bytes("photos.parquet", file.getvalue())


def read_members(tar: bytes) -> dict[str, bytes]:
    """Name to content, in order, as tarfile sees it."""
    with tarfile.open(fileobj=io.BytesIO(tar)) as archive:
        return {
            member.name: archive.extractfile(member).read()  # type: ignore[union-attr]
            for member in archive
            if member.isreg()
        }


def make_protector(*, seed: int = 0, epsilon_levels: int = 8) -> Protector:
    """A small protector with random weights on the embedded encoder at 32 pixels."""
    encoder = load_encoder(TINY_ENCODER)
    torch.manual_seed(seed)
    card = ProtectorCard(
        name="tiny",
        encoder=TINY_ENCODER,
        encoder_hash=encoder.content_hash(),
        golden_embedding=golden_embedding(encoder),
        vocabulary="broad",
        concept_bank_hash=ConceptBank.build("broad", encoder).hash,
        generator=TINY_GENERATOR,
        working_size=32,
        epsilon_levels=epsilon_levels,
    )
    return Protector(card, encoder, Generator(TINY_GENERATOR, encoder.embedding_dim))


def first_unit(storage: Storage) -> Unit:
    return next(list_units(storage))


def make_binding(source_uri: str = "in", **changes: Any) -> Binding:
    """What a destination of tests is bound to: the protector of `make_protector`, and changes."""
    settings = RewriteConfig(max_image_pixels=10**6).bound
    common = {"protector": "tiny", "protector_sha256": "", "epsilon_levels": 8}
    return Binding(
        **({"source_uri": source_uri, "transform_version": 1} | common | settings | changes)
    )
