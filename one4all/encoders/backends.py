"""What computes image embeddings when no gradient is asked for: PyTorch, or OpenVINO on a CPU.

PyTorch's convolutions leave most of a CPU idle. OpenVINO compiles the same network, converted in
memory, for the CPU that it finds: half the CPU time in float32, a quarter in bfloat16
(docs/pipeline.md, "Speed"). It takes one image at a time at no loss, so nothing is filled up, and
an image's embedding does not depend on its neighbours, nor on the number of threads.

In float32 both are the same to six digits, and make the same patterns; which of them computes is
nobody's business. In bfloat16 each makes patterns of its own, so it has to be asked for by name. As
a draft bfloat16 serves float32, too: most images have the same pattern by either, and a protector
can tell which (`PerturbationModel.is_settled`). The others are embedded again.

Shape suffixes: B batch, H W image, C channels, D embedding width.
"""

from __future__ import annotations

import logging
import sys
import threading
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from typing import Any, TypeAlias, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from one4all.encoders.base import Encoder
from one4all.encoders.config import BackendName, check_backend
from one4all.errors import ConfigError
from one4all.extras import installed, require
from one4all.images import Pixels

_log = logging.getLogger(__name__)
_Result = TypeVar("_Result")

# Largest difference of a value of an embedding, of unit length, from PyTorch's in float32.
_TOLERANCE = {"float32": 1e-4, "bfloat16": 0.1}

# Largest distance of a draft from the embedding in float32: twice that of any of 5,788 photos.
_DRAFT_TOLERANCE = 0.3
# Images that come before drafts are compiled: so many drafts make up for half a second.
_IMAGES_BEFORE_DRAFTS = 50
# Drafts that show whether they pay: half of them have to do, since one costs half an embedding.
_DRAFTS_TRIED = 200

IsSettled: TypeAlias = Callable[[Tensor], Tensor]
"""Says of embeddings in bfloat16, (B, D), which do as well as those in float32: bool (B,)."""


class EncoderBackend(ABC):
    """Embeds images by an encoder, without gradients.

    Attributes:
        label: Name and precision, for people.
        one_by_one: Whether each image is computed alone, in whatever number they come.
    """

    label: str
    one_by_one: bool

    @abstractmethod
    def embed(self, image_BHWC: Pixels, is_settled: IsSettled | None = None) -> Tensor:
        """Embeddings of images.

        Args:
            image_BHWC: (B, S, S, 3) uint8; S is the size that it was loaded for.
            is_settled: Which drafts will do, if any. Not called where none are made.

        Returns:
            (B, D) float32, L2-normalised, on the device of the backend.
        """

    def map(self, function: Callable[..., _Result], *items: Iterable[Any]) -> Iterator[_Result]:
        """As the built-in; on all threads where images are computed one by one."""
        return map(function, *items)


def load_backend(
    encoder: Encoder,
    backend: BackendName = "auto",
    *,
    image_size: int = 0,
    device: torch.device | str = "cpu",
    drafts: bool = False,
) -> EncoderBackend:
    """Prepare an encoder for inference.

    Args:
        encoder: Frozen encoder, on ``device``. OpenVINO takes a copy of its weights.
        backend: Which one. "auto" falls back to PyTorch, and says so once, where OpenVINO is not
            installed or does not compute this encoder as PyTorch does.
        image_size: Side of the images that will come, pixels; 0 means the encoder's own. It
            resizes others.
        device: Where to compute. On a GPU, "auto" is PyTorch in float32.
        drafts: Whether "auto" gets ready for drafts in bfloat16. It does where the CPU computes in
            it, and the encoder says ``can_draft`` and need not resize.

    Raises:
        ConfigError: No such backend, or it cannot be had here.
        UsageError: Its package is not installed.
    """
    check_backend(backend)
    device = torch.device(device)
    size = image_size or encoder.input_size
    if backend.startswith("openvino"):
        if device.type != "cpu":
            raise ConfigError(
                f"encoder_backend {backend} computes on CPUs, and this worker has a GPU; use auto, "
                "torch or torch-bfloat16, or no GPU: gpus_per_worker=0"
            )
        require("openvino", "openvino")
        return _open_vino(encoder, size, bfloat16=backend == "openvino-bfloat16")
    if backend == "auto" and device.type == "cpu":
        if not installed("openvino"):
            _say_once(
                logging.INFO,  # for a photo or two it is no loss
                "openvino is not installed: embeddings are computed by PyTorch, which takes twice "
                "the CPU time: pip install 'one4all[openvino]'",
            )
        else:
            try:
                return _open_vino(encoder, size, drafts=drafts)
            except ConfigError as error:
                slower = f"{error}: embeddings are computed by PyTorch, which takes longer"
                _say_once(logging.WARNING, slower)
    return TorchBackend(encoder, device, bfloat16=backend == "torch-bfloat16")


class TorchBackend(EncoderBackend):
    """PyTorch, on a CPU or a GPU.

    The rounding of an embedding depends on the number of images in a pass, so the caller gives
    passes of one size.

    Args:
        encoder: Frozen encoder.
        device: Where it is.
        bfloat16: Compute in bfloat16 where PyTorch's autocast holds that to be safe.
    """

    one_by_one = False

    def __init__(self, encoder: Encoder, device: torch.device, *, bfloat16: bool = False) -> None:
        self.label = f"torch {'bfloat16' if bfloat16 else 'float32'}"
        self._encoder, self._device, self._bfloat16 = encoder, device, bfloat16

    @torch.inference_mode()
    def embed(self, image_BHWC: Pixels, is_settled: IsSettled | None = None) -> Tensor:
        """See the base class; there are no drafts."""
        image = to_device(image_BHWC, self._device)
        autocast = torch.autocast(self._device.type, torch.bfloat16, enabled=self._bfloat16)
        # TF32, which GPUs take for float32 unless told otherwise, has the digits of float16.
        with autocast, torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            return self._encoder.encode_image(image).float()


class OpenVinoBackend(EncoderBackend):
    """OpenVINO on the CPU, on as many threads as PyTorch has here, each with an image of its own.

    Args:
        encoder: Frozen encoder, on the CPU.
        image_size: Side of the images that will come, pixels.
        bfloat16: Compute in bfloat16.
        drafts: Make drafts where CPU and encoder allow it.

    Raises:
        ConfigError: The encoder cannot be converted, it comes out as another function, or the CPU
            has no bfloat16.
    """

    one_by_one = True

    def __init__(
        self, encoder: Encoder, image_size: int, *, bfloat16: bool = False, drafts: bool = False
    ) -> None:
        if bfloat16 and not cpu_has_bfloat16():
            raise ConfigError(
                "this CPU does not compute in bfloat16 (it takes AMX or AVX512_BF16); use "
                "encoder_backend auto"
            )
        self._threads = torch.get_num_threads()
        # For what follows an embedding: PyTorch would start a team of threads for each.
        self._pool = ThreadPoolExecutor(self._threads, "images", torch.set_num_threads, (1,))
        self._width, self._lock = encoder.embedding_dim, threading.RLock()
        probe_1HWC = _probe(image_size)
        try:
            with one_thread():
                expected_1D = _expected(encoder, probe_1HWC)
                converted = _convert(encoder, probe_1HWC)
            self._queue = self._compile(converted, bfloat16=bfloat16)
        except Exception as error:  # of every kind: an operation it does not know, a shape
            reason = str(error).strip().partition("\n")[0]
            raise ConfigError(f"OpenVINO cannot convert this encoder ({reason})") from error
        difference = float((self.embed(probe_1HWC) - expected_1D).abs().max())
        if not difference <= _TOLERANCE["bfloat16" if bfloat16 else "float32"]:
            raise ConfigError(
                f"OpenVINO {_openvino().__version__} embeds a test image differently from PyTorch, "
                f"by {difference:.2g}; use another version of it, or encoder_backend torch"
            )
        self.label = f"openvino {'bfloat16' if bfloat16 else 'float32'}"
        self._drafts: Any = None
        self._to_draft: Any = None  # what drafts are compiled of, until they are
        self._images_before_drafts = _IMAGES_BEFORE_DRAFTS
        self._num_drafts = self._num_settled = 0
        measured = encoder.can_draft and image_size == encoder.input_size
        if drafts and measured and cpu_has_bfloat16():
            self.label += ", drafts in bfloat16"
            self._to_draft = converted

    def embed(self, image_BHWC: Pixels, is_settled: IsSettled | None = None) -> Tensor:
        """See the base class."""
        drafts = None if is_settled is None else self._ready_drafts(image_BHWC)
        if is_settled is None or drafts is None:
            return self._infer(self._queue, image_BHWC)
        embedding_BD = self._infer(drafts, image_BHWC)
        settled_B = torch.cat(list(self.map(is_settled, embedding_BD[:, None])))
        if not settled_B.all():
            embedding_BD[~settled_B] = self._infer(self._queue, image_BHWC[~settled_B.numpy()])
        self._count(settled_B)
        return embedding_BD

    def _ready_drafts(self, image_BHWC: Pixels) -> Any:
        """The queue that makes drafts, once so many images have come that it pays; or None."""
        with self._lock:
            if self._to_draft is not None and self._images_before_drafts <= 0:
                converted, self._to_draft = self._to_draft, None  # as large as the weights
                self._drafts = self._compile_drafts(converted, image_BHWC)
            self._images_before_drafts -= len(image_BHWC)
            return self._drafts

    def _count(self, settled_B: Tensor) -> None:
        """Give drafts up if too many images of this corpus need more: it is full of thumbnails."""
        with self._lock:
            self._num_drafts += len(settled_B)
            self._num_settled += int(settled_B.sum())
            if self._num_drafts >= _DRAFTS_TRIED and 2 * self._num_settled < self._num_drafts:
                self._drafts = None

    def _compile_drafts(self, converted: Any, image_BHWC: Pixels) -> Any:
        """A queue that makes drafts; None if those of these images are not near the truth."""
        queue = self._compile(converted, bfloat16=True)
        exact_BD = self._infer(self._queue, image_BHWC)
        distance = float((self._infer(queue, image_BHWC) - exact_BD).norm(dim=1).max())
        if distance <= _DRAFT_TOLERANCE:
            return queue
        _say_once(
            logging.WARNING,
            f"OpenVINO {_openvino().__version__} embeds images in bfloat16 differently than in "
            f"float32, by {distance:.2g}: all are embedded in float32, which takes longer",
        )
        return None

    def _compile(self, converted: Any, *, bfloat16: bool) -> Any:
        """A queue of requests to a network, compiled for this CPU."""
        settings = {
            "INFERENCE_PRECISION_HINT": "bf16" if bfloat16 else "f32",
            "INFERENCE_NUM_THREADS": self._threads,
            "NUM_STREAMS": self._threads,
            # Workers side by side would all choose the same cores.
            "ENABLE_CPU_PINNING": False,
        }
        compiled = _core().compile_model(converted, "CPU", settings)
        queue = _openvino().AsyncInferQueue(compiled, self._threads)
        queue.set_callback(_keep)
        return queue

    def _infer(self, queue: Any, image_BHWC: Pixels) -> Tensor:
        """What a network says of each image, float32 (B, D)."""
        result_BD = np.empty((len(image_BHWC), self._width), np.float32)
        with self._lock:
            for row, image in zip(result_BD, np.ascontiguousarray(image_BHWC), strict=True):
                queue.start_async([image[None]], userdata=row)
            queue.wait_all()
        return torch.from_numpy(result_BD)

    def map(self, function: Callable[..., _Result], *items: Iterable[Any]) -> Iterator[_Result]:
        """See the base class."""
        return self._pool.map(function, *items)


def cpu_has_bfloat16() -> bool:
    """Whether this CPU computes in bfloat16 (AMX or AVX512_BF16) and is faster so; False if nobody
    can tell, because OpenVINO is not installed."""
    if not installed("openvino"):
        return False
    return "BF16" in _core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


@cache
def _core() -> Any:
    return _openvino().Core()


def _openvino() -> Any:
    # The package tells its makers of each use, unless that part of it cannot be imported.
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
    import openvino

    return openvino


_last: dict[object, OpenVinoBackend] = {}


def _open_vino(
    encoder: Encoder, size: int, *, bfloat16: bool = False, drafts: bool = False
) -> OpenVinoBackend:
    """A backend; the last one is kept, and shared by several protectors of one encoder."""
    key = (encoder.content_hash(), size, bfloat16, drafts, torch.get_num_threads())
    if key not in _last:
        backend = OpenVinoBackend(encoder, size, bfloat16=bfloat16, drafts=drafts)
        _last.clear()
        _last[key] = backend
    return _last[key]


def _keep(request: Any, row: Any) -> None:
    """Copy what a request has computed to where it is wanted."""
    row[:] = request.get_output_tensor().data[0]


def to_device(image_BHWC: Pixels, device: torch.device) -> Tensor:
    """(B, 3, H, W) in [0, 1]. Channels stay last in memory: (B, H, W, C) permuted is that."""
    image = torch.from_numpy(image_BHWC).to(device, non_blocking=True)
    return image.permute(0, 3, 1, 2).float() / 255


class _OfPixels(nn.Module):
    """An encoder that takes (B, H, W, C) uint8, to be traced as one graph."""

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, image_BHWC: Tensor) -> Tensor:
        return self.encoder.encode_image(image_BHWC.permute(0, 3, 1, 2).float() / 255)


def _convert(encoder: Encoder, example_1HWC: Pixels) -> Any:
    """OpenVINO's form of an encoder, for one image of that size."""
    pixels = torch.from_numpy(example_1HWC)
    with warnings.catch_warnings(), torch.inference_mode():
        # Tracing is to be replaced by torch.export, which takes seconds more.
        warnings.simplefilter("ignore")
        trace: Any = torch.jit.trace
        traced = trace(_OfPixels(encoder).eval(), pixels, check_trace=False)
        frozen = torch.jit.freeze(traced)
        return _openvino().convert_model(frozen, example_input=pixels, input=[pixels.shape])


@contextmanager
def one_thread() -> Iterator[None]:
    """PyTorch on one thread: for little work, others spin longer than they help."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@torch.inference_mode()
def _expected(encoder: Encoder, image_BHWC: Pixels) -> Tensor:
    return encoder.encode_image(to_device(image_BHWC, torch.device("cpu"))).float()


def _probe(size: int) -> Pixels:
    """A picture with something everywhere, (1, S, S, 3) uint8: noise, the same each time."""
    return np.random.default_rng(0).integers(0, 256, (1, size, size, 3), dtype=np.uint8)


@cache
def _say_once(level: int, sentence: str) -> None:
    _log.log(level, "%s", sentence)
