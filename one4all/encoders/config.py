"""Which encoder, and what computes its embeddings; said without PyTorch, which takes seconds."""

from __future__ import annotations

from typing import Annotated, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field

from one4all.errors import ConfigError

BackendName = Literal["auto", "torch", "openvino", "torch-bfloat16", "openvino-bfloat16"]
"""How embeddings are computed: "auto" is float32 by the fastest that is here, or bfloat16 where a
protector sees that the pattern is the same; the next two are float32 by that one, and the others
are bfloat16."""

Precision = Literal["float32", "torch-bfloat16", "openvino-bfloat16"]
"""What of a `BackendName` changes patterns."""


class EncoderConfig(BaseModel):
    """Which encoder, and how it is built.

    Attributes:
        kind: "embedded" or "open_clip".
        model_name: open_clip model name, or ``local-dir:PATH`` of a folder in open_clip's format.
            Of the embedded kind: "lite0", "lite2" or "lite0+lite2"; "" means "lite0".
        pretrained: open_clip tag (such as ``openai``) or path of a local checkpoint.
        quick_gelu: Activation a *local* checkpoint was trained with. It cannot be read from the
            weights, and the wrong one gives silently wrong features, so it must be stated.
        input_size: Side in pixels at which images are encoded; 0 means the model's own, 224 if
            embedded. Only the embedded encoder, which is convolutional, accepts another one.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    kind: Literal["embedded", "open_clip"] = "embedded"
    model_name: str = ""
    pretrained: str = ""
    quick_gelu: bool | None = None
    input_size: Annotated[int, Field(ge=0, le=1024)] = 0


def precision_of(backend: BackendName) -> Precision:
    """What a destination is bound to, if its embeddings are computed by this backend."""
    return backend if backend in ("torch-bfloat16", "openvino-bfloat16") else "float32"


def backend_of(precision: Precision) -> BackendName:
    """The backend that makes the patterns of a precision; any, in float32."""
    return "auto" if precision == "float32" else precision


def check_backend(backend: str) -> None:
    """Raises: ConfigError if there is none of that name."""
    if backend not in get_args(BackendName):
        names = ", ".join(get_args(BackendName))
        raise ConfigError(f"no encoder_backend {backend!r}, only {names}")
