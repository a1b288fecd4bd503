"""What an evaluation leaves on disk: a small JSON record for each trial, copy and diagnosis."""

from __future__ import annotations

import os
import platform
from importlib.metadata import version
from typing import Any, Self

import torch
from pydantic import BaseModel, ConfigDict

from one4all.evaluation.diagnostics import Diagnosis
from one4all.visibility import VisibilitySummary
from pipelines.provenance import commit


class _Record(BaseModel):
    model_config = ConfigDict(
        frozen=True, extra="forbid", ser_json_bytes="base64", val_json_bytes="base64"
    )


class Outcome(_Record):
    """What one adversary reached.

    Attributes:
        last, peak: Test accuracy of the last and of the best epoch, 0..1.
        curve: Test accuracy of each epoch.
        majority: Accuracy of always answering the most frequent test label.
        confusion: Number of test images by true class (row) and answer (column).
        seconds: Time it took.
    """

    last: float
    peak: float
    curve: tuple[float, ...]
    majority: float
    confusion: tuple[tuple[int, ...], ...]
    seconds: float


class Environment(_Record):
    """Command, code and hardware behind a result.

    Attributes:
        command: Command line, to be run again.
        version, commit: Version of one4all, and commit of its checkout if it runs from one.
        torch: Version of PyTorch.
        cpu, num_cpus, gpu: Hardware of the driver; ``gpu`` is "" without one.
    """

    command: str
    version: str
    commit: str
    torch: str
    cpu: str
    num_cpus: int
    gpu: str

    @classmethod
    def here(cls, command: str) -> Self:
        return cls(
            command=command,
            version=version("one4all"),
            commit=commit(),
            torch=torch.__version__,
            cpu=platform.processor() or platform.machine(),
            num_cpus=os.cpu_count() or 0,
            gpu=torch.cuda.get_device_name() if torch.cuda.is_available() else "",
        )


class TrialRecord(_Record):
    """A finished trial.

    Attributes:
        trial: `Trial.identity`: all that determines the outcome.
        title: `Trial.title`.
        outcome: Accuracies.
        environment: Where they come from.
    """

    trial: dict[str, Any]
    title: str
    outcome: Outcome
    environment: Environment


class CopyRecord(_Record):
    """A protected copy.

    Attributes:
        max_levels: Largest difference to the clean images, in levels of 8 bits.
        psnr_db: Mean peak signal-to-noise ratio of some images, in dB.
        seconds: Time it took to make.
        visibility: Of a fixed sample of the images, at the size at which they were protected; None
            in records of before, and where the extra `visibility` is not installed.
    """

    max_levels: int
    psnr_db: float
    seconds: float
    visibility: VisibilitySummary | None = None


class DiagnosisRecord(_Record):
    """The diagnosis of a copy.

    Attributes:
        diagnosis: Figures.
        picture: PNG of some images: clean, difference, protected.
    """

    diagnosis: Diagnosis
    picture: bytes
