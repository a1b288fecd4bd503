"""The protector: the artefact that protects images.

A folder with ``card.json`` (what it is, readable) and ``generator.safetensors`` (weights; nothing
that unpickles). Frozen encoder E_I, model M and budget together map images to perturbations:

    delta = epsilon * M(E_I(x), x);  protected = clip(round(x + delta), x +- epsilon)

Source: paper Eq. 1 and 2.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from pydantic import BaseModel
from safetensors.torch import load as load_tensors
from safetensors.torch import save_file
from torch import Tensor

from one4all.concepts import ConceptBank
from one4all.encoders import EncoderConfig, load_encoder
from one4all.encoders.backends import EncoderBackend, IsSettled, load_backend, one_thread, to_device
from one4all.encoders.base import Encoder
from one4all.encoders.config import BackendName, check_backend
from one4all.errors import BadImageError, ProtectorError, UsageError
from one4all.gray_images import in_colour
from one4all.images import (
    DEFAULT_MAX_PIXELS,
    DecodedImage,
    OutputFormat,
    Pixels,
    check_pixels,
    decode,
    from_pillow,
    to_pillow,
    working_copy,
)
from one4all.perturbation import DEFAULT_EPSILON_LEVELS, Levels, apply_perturbation
from one4all.protectors.card import (
    CARD,
    DEFAULT_PROTECTOR,
    WEIGHTS,
    ProtectorCard,
    load_card,
    other_tensors,
    read_weights,
)
from one4all.protectors.kinds import build_model, kind_of
from one4all.protectors.model import PerturbationModel
from one4all.recode import recode
from one4all.storage import Storage

_GOLDEN_TOLERANCE = 1e-3


class Protector:
    """Images in, perturbations or protected images out.

    Args:
        card: Description; its encoder must be the one given.
        encoder: Frozen encoder.
        model: Trained network, fitted codebook, or whatever kind the card says.
        encoder_backend: What computes embeddings; see `BackendName`.
    """

    def __init__(
        self,
        card: ProtectorCard,
        encoder: Encoder,
        model: PerturbationModel,
        *,
        encoder_backend: BackendName = "auto",
    ) -> None:
        self.card = card
        self.encoder = encoder
        self.model = model.eval().requires_grad_(False)
        check_backend(encoder_backend)
        self._encoder_backend = encoder_backend
        self._loaded_backend: EncoderBackend | None = None
        self.to("cpu")

    @classmethod
    def assemble(
        cls,
        encoder_config: EncoderConfig,
        encoder: Encoder,
        model: PerturbationModel,
        *,
        name: str,
        working_size: int,
        config: BaseModel,
        epsilon_levels: int = DEFAULT_EPSILON_LEVELS,
        bank: ConceptBank | None = None,
        training: Mapping[str, Any] | None = None,
    ) -> Self:
        """A new protector, with its card.

        Args:
            encoder_config, encoder: Frozen encoder, on the CPU, and how it is loaded again.
            model: Trained or fitted model.
            name: Name for people.
            working_size: Side in pixels of the copy that encoder and model see.
            config: Configuration of the model.
            epsilon_levels: Budget in 8-bit levels.
            bank: Concepts it was trained against or fitted to, if they are names.
            training: Record of where it comes from.
        """
        card = ProtectorCard(
            name=name,
            encoder=encoder_config,
            encoder_hash=encoder.content_hash(),
            golden_embedding=golden_embedding(encoder),
            vocabulary=bank.vocabulary if bank else "",
            concept_bank_hash=bank.hash if bank else "",
            kind=kind_of(config),
            generator=config,
            working_size=working_size,
            epsilon_levels=epsilon_levels,
            training=dict(training or {}),
        )
        return cls(card, encoder, model)

    def to(self, device: str | torch.device) -> Self:
        """Move to a device. On a GPU, a trained generator runs in bfloat16 autocast."""
        self._device = torch.device(device)
        self._loaded_backend = None
        self.encoder.to(self._device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.model.to(self._device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        return self

    @property
    def is_coloured(self) -> bool:
        """Whether the pattern is mainly in colour, so that gray images hold hardly any of it."""
        return self.model.is_coloured

    @property
    def backend(self) -> EncoderBackend:
        """What computes embeddings; loaded when it is first asked for, which may take seconds.

        Raises:
            ConfigError, UsageError: See `load_backend`.
        """
        if self._loaded_backend is None:
            self._loaded_backend = load_backend(
                self.encoder,
                self._encoder_backend,
                image_size=self.card.working_size,
                device=self._device,
                drafts=self.model.takes_drafts,
            )
        return self._loaded_backend

    @torch.inference_mode()
    def perturb(
        self,
        working_NHWC: Pixels,
        embedding_ND: Tensor | None = None,
        *,
        batch_size: int | None = None,
    ) -> Levels:
        """Perturbations of working copies.

        Args:
            working_NHWC: (N, S, S, 3) uint8 with S = ``card.working_size``, N at least 1.
            embedding_ND: Their embeddings, if they are known (`embed`).
            batch_size: Images a forward pass; default: all. The last pass is filled up, so that
                each has the same shape and an image's result does not depend on its neighbours.
                Where the backend computes images one by one, passes are of one image.

        Returns:
            (N, h, w, 3) float32 in levels, within +-``card.epsilon_levels``, on the generator's
            grid; `apply` takes it to an image's own size.
        """
        size = self._pass_size(len(working_NHWC), batch_size)
        if embedding_ND is None:
            embedding_ND = self._embed(working_NHWC, size, self.model.is_settled)
        starts = range(0, len(working_NHWC), size)
        working = (_fill(working_NHWC[start : start + size], size) for start in starts)
        known = (embedding_ND[start : start + size] for start in starts)
        filled = (F.pad(part, (0, 0, 0, size - len(part))) for part in known)
        parts = list(self.backend.map(self._levels, working, filled))
        return np.concatenate(parts)[: len(working_NHWC)]

    @torch.inference_mode()
    def _levels(self, working_BHWC: Pixels, embedding_BD: Tensor) -> Levels:
        """Perturbations of one pass, float32 (B, h, w, 3) in levels."""
        seen_BHWC = working_BHWC if self.model.sees_image else working_BHWC[:, :0, :0]
        image, on_gpu = to_device(seen_BHWC, self._device), self._device.type == "cuda"
        with torch.autocast(self._device.type, torch.bfloat16, enabled=on_gpu):
            delta = self.model(embedding_BD.to(self._device), image)
        levels = delta.float() * self.card.epsilon_levels
        result: Levels = levels.permute(0, 2, 3, 1).cpu().numpy()
        return result

    @torch.inference_mode()
    def embed(self, images: Sequence[Pixels], *, batch_size: int = 8) -> Tensor:
        """Embeddings from which `protect` makes what it makes without: for several protectors of
        one encoder and working size, which then encode the images once.

        Returns:
            float32 (N, D), L2-normalised, on the CPU.
        """
        parts = [torch.zeros(0, self.encoder.embedding_dim)]
        for start in range(0, len(images), batch_size):
            working = np.stack(self._working(images[start : start + batch_size]))
            parts.append(self._embed(working, self._pass_size(len(working), batch_size)).cpu())
        return torch.cat(parts)

    def _pass_size(self, num_images: int, batch_size: int | None) -> int:
        return 1 if self.backend.one_by_one else batch_size or num_images

    def _embed(
        self, working_NHWC: Pixels, pass_size: int, is_settled: IsSettled | None = None
    ) -> Tensor:
        """Embeddings of working copies, float32 (N, D), on the device of the backend; drafts of
        those that `is_settled`, if it is given."""
        if self.backend.one_by_one:  # it does so itself, on all threads
            return self.backend.embed(working_NHWC, is_settled)
        parts = []
        for start in range(0, len(working_NHWC), pass_size):
            working = working_NHWC[start : start + pass_size]
            parts.append(self.backend.embed(_fill(working, pass_size))[: len(working)])
        return torch.cat(parts)

    def protect_image(self, image: Image.Image, *, tint_gray: bool = False) -> Image.Image:
        """Protect a Pillow image.

        Args:
            image: Any mode of 8 bits a channel or fewer. As in the pipeline, a palette, one bit and
                CMYK become true colour or gray, which a perturbation can be added to.
            tint_gray: Make a gray image a colour image, so that it holds a pattern in colour. If
                not, it stays gray, and is hardly protected by such a pattern.

        Returns:
            A new image of the same size. Alpha, EXIF (less thumbnails), ICC profile and resolution
            are kept, and Pillow writes them to a file if `Image.save` is given them:
            ``save(path, exif=image.getexif(), icc_profile=image.info.get("icc_profile"))``.

        Raises:
            BadImageError: An image that cannot be protected; the text is the reason.
            UsageError: No Pillow image.
        """
        return self.protect_images([image], tint_gray=tint_gray)[0]

    def protect_images(
        self, images: Sequence[Image.Image], *, tint_gray: bool = False
    ) -> list[Image.Image]:
        """Protect several Pillow images, some in one forward pass; see `protect_image`."""
        written = []
        for before, after in self._protect_decoded(map(from_pillow, images), tint_gray):
            if np.array_equal(before.pixels, after):
                raise BadImageError("the perturbation changes no pixel of it")
            written.append(to_pillow(replace(before, pixels=after)))
        return written

    def protect_file(
        self,
        data: bytes,
        *,
        output_format: OutputFormat = "match",
        max_pixels: int = DEFAULT_MAX_PIXELS,
        tint_gray: bool = False,
    ) -> bytes:
        """Protect an image file: the bytes that the pipeline writes for it.

        Args:
            data: A JPEG, PNG, WebP, BMP or TIFF file.
            output_format: "match" writes the same format; "lossless" writes a JPEG as PNG, so that
                the budget holds bit for bit on what a reader decodes.
            max_pixels: Refuse, before decoding, an image that declares more pixels than this.
            tint_gray: Make a gray image a colour image; see `protect_image`.

        Returns:
            The protected file, checked as `recode` does.

        Raises:
            BadImageError: A file that cannot be protected; the text is the reason.
        """
        return self.protect_files(
            [data], output_format=output_format, max_pixels=max_pixels, tint_gray=tint_gray
        )[0]

    def protect_files(
        self,
        files: Sequence[bytes],
        *,
        output_format: OutputFormat = "match",
        max_pixels: int = DEFAULT_MAX_PIXELS,
        tint_gray: bool = False,
    ) -> list[bytes]:
        """Protect several image files, some in one forward pass; see `protect_file`."""
        for data in files:
            if not isinstance(data, bytes | bytearray | memoryview):
                raise UsageError(
                    f"a {type(data).__name__} is no image file; give its bytes, or a Pillow image "
                    "to protect_image"
                )
        clean = [decode(bytes(data), max_pixels=max_pixels) for data in files]
        return [
            recode(
                before,
                after,
                output_format=output_format,
                epsilon_levels=self.card.epsilon_levels,
                max_pixels=max_pixels,
            ).payload
            for before, after in self._protect_decoded(clean, tint_gray)
        ]

    def _protect_decoded(
        self, images: Iterable[DecodedImage], tint_gray: bool
    ) -> list[tuple[DecodedImage, Pixels]]:
        """What is to be protected, in colour if it is so wished, and its protected pixels."""
        seen = list(images)
        clean = [in_colour(image) for image in seen] if tint_gray else seen
        # As in the pipeline: the encoder sees the tones of the file, not those converted to sRGB.
        protected = self._protect([i.pixels for i in seen], [i.pixels for i in clean])
        return list(zip(clean, protected, strict=True))

    def protect(
        self,
        images: Sequence[Pixels],
        *,
        batch_size: int = 8,
        embeddings_ND: Tensor | None = None,
    ) -> list[Pixels]:
        """Protect images of any size and layout; see `apply_perturbation` for the promise.

        Args:
            images: (H, W, C) uint8 each, C in 1..4: gray, gray and alpha, RGB, RGB and alpha.
            batch_size: Images in memory at once, and in a forward pass; see `perturb`.
            embeddings_ND: What `embed` gave for these images, if they are known.

        Raises:
            UsageError: Something else than such arrays.
        """
        for pixels in images:
            check_pixels(pixels)
        return self._protect(images, images, batch_size=batch_size, embeddings_ND=embeddings_ND)

    def _protect(
        self,
        seen: Sequence[Pixels],
        clean: Sequence[Pixels],
        *,
        batch_size: int = 8,
        embeddings_ND: Tensor | None = None,
    ) -> list[Pixels]:
        """See `protect`; the encoder sees other pixels than those that are protected."""
        protected: list[Pixels] = []
        for start in range(0, len(clean), batch_size):
            batch = slice(start, start + batch_size)
            working = np.stack(self._working(seen[batch]))
            known = None if embeddings_ND is None else embeddings_ND[batch]
            deltas = self.perturb(working, known, batch_size=batch_size)
            protected += map(self.apply, clean[batch], deltas)
        return protected

    def apply(self, clean: Pixels, delta_hwC: Levels) -> Pixels:
        """Add what `perturb` gave for an image to it; see `apply_perturbation`.

        Where on the image it lies is told by the kind (`PerturbationModel.place`).
        """
        delta_hwC = self.model.place(delta_hwC, clean)
        return apply_perturbation(clean, delta_hwC, epsilon_levels=self.card.epsilon_levels)

    def _working(self, images: Sequence[Pixels]) -> list[Pixels]:
        return [working_copy(pixels, self.card.working_size) for pixels in images]

    def save(self, folder: str | Path) -> ProtectorCard:
        """Write the artefact; returns the card with the digest of the weights filled in."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        weights = {name: t.cpu().contiguous() for name, t in self.model.state_dict().items()}
        save_file(weights, folder / WEIGHTS)
        digest = hashlib.sha256((folder / WEIGHTS).read_bytes()).hexdigest()
        self.card = self.card.model_copy(update={"weights_sha256": digest})
        (folder / CARD).write_text(self.card.model_dump_json(indent=2) + "\n", "utf-8")
        return self.card

    def publish(self, storage: Storage) -> ProtectorCard:
        """`save`, to a folder or s3:// prefix. The card goes last: a folder with a card is whole.

        Raises:
            StorageError: It cannot be written.
        """
        with tempfile.TemporaryDirectory() as folder:
            card = self.save(Path(folder))
            for name in (WEIGHTS, CARD):
                storage.write_bytes(name, (Path(folder) / name).read_bytes())
        return card

    @classmethod
    def load(
        cls,
        protector: str,
        *,
        strength: str = "",
        encoder: Encoder | None = None,
        encoder_backend: BackendName = "auto",
    ) -> Protector:
        """Load a protector by name, path or URI.

        Args:
            protector: Name of a shipped one (``default``, ``14a``), a folder, or
                ``s3://bucket/prefix``.
            strength: Another look of a codebook than its own, a name of `STRENGTHS`; see
                `ProtectorCard.with_strength`.
            encoder: Use this one instead of loading the card's; it must have the same content.
            encoder_backend: What computes embeddings: "auto", "torch" or "openvino" for the same
                images; "openvino-bfloat16" and "torch-bfloat16" are faster and make others. It is
                loaded with the first image, or by `backend`.

        Raises:
            ProtectorError: Missing, damaged, or of another version; or the encoder found here is
                not the one it was trained with.
            UsageError: There is no such strength, or the protector is no codebook.
        """
        card = load_card(protector)
        weights = load_tensors(read_weights(protector, card))
        if strength:
            card = card.with_strength(strength)
        with one_thread():
            encoder = encoder or load_encoder(card.encoder)
            _check_encoder(card, encoder)
        model = build_model(card.generator, encoder.embedding_dim)
        try:
            model.load_state_dict(weights)
        except RuntimeError as error:
            raise other_tensors(protector) from error
        return cls(card, encoder, model, encoder_backend=encoder_backend)


def load(
    protector: str = DEFAULT_PROTECTOR,
    *,
    strength: str = "",
    encoder_backend: BackendName = "auto",
) -> Protector:
    """Load a protector by name, path or URI; see `Protector.load`.

    Args:
        protector: Name of a shipped one (``default``, ``14a``), a folder, or ``s3://bucket/prefix``.
        strength: Another look of a codebook than its own: discreet, balanced, strong or gray-proof.
        encoder_backend: What computes embeddings: "auto", "torch", "openvino", or one of these in
            bfloat16.
    """
    return Protector.load(protector, strength=strength, encoder_backend=encoder_backend)


def golden_embedding(encoder: Encoder) -> tuple[float, ...]:
    """Sums over 8 sections of the embedding of a fixed test image."""
    ramp = torch.linspace(0, 1, encoder.input_size)
    image = torch.stack(
        [ramp[:, None] * ramp, ramp[:, None].expand(-1, len(ramp)), ramp.flip(0) * ramp[:, None]]
    )
    with torch.inference_mode():
        sections = encoder.encode_image(image[None])[0].tensor_split(8)
    return tuple(round(float(section.sum()), 6) for section in sections)


def _fill(images_NHWC: Pixels, size: int) -> Pixels:
    """(size, H, W, C): filled up with zeros."""
    missing = size - len(images_NHWC)
    return np.pad(images_NHWC, ((0, missing), (0, 0), (0, 0), (0, 0))) if missing else images_NHWC


def _check_encoder(card: ProtectorCard, encoder: Encoder) -> None:
    if encoder.content_hash() != card.encoder_hash:
        raise ProtectorError(
            f"encoder mismatch: protector {card.name!r} was trained with encoder content "
            f"{card.encoder_hash[:12]}, the one found here is {encoder.content_hash()[:12]}"
        )
    difference = np.abs(np.subtract(golden_embedding(encoder), card.golden_embedding)).max()
    if difference > _GOLDEN_TOLERANCE:
        raise ProtectorError(
            f"encoder mismatch: the weights are those of protector {card.name!r}, but they embed "
            f"its test image differently (by {difference:.2g}); check open_clip and timm versions"
        )
