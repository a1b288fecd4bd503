"""What somebody protected already, among the compared methods: a corpus that is read back."""

from __future__ import annotations

from typing import Annotated, ClassVar

import numpy as np
from pydantic import AfterValidator, BaseModel, ConfigDict

from one4all.errors import UsageError
from one4all.evaluation.labelled import LabelledImages, read_labelled
from one4all.evaluation.methods.base import FittedMethod


def _given(uri: str) -> str:
    if not uri:
        raise ValueError("say where the protected images are: {corpus: FOLDER or s3://...}")
    return uri


class CorpusConfig(BaseModel):
    """Which corpus.

    Attributes:
        corpus: Folder or s3:// prefix of the protected training split, in the order of the clean
            one.
        sidecar_patterns: Images of a sample that are no photos, such as ``*.seg.png``.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    corpus: Annotated[str, AfterValidator(_given)] = ""
    sidecar_patterns: tuple[str, ...] = ()


class StoredCopy(FittedMethod):
    """A corpus that was protected before.

    Args:
        config: Where it is.
    """

    within_budget: ClassVar[bool] = False  # a codec may have added to it

    def __init__(self, config: CorpusConfig) -> None:
        self.config = config

    def protect(self, images: LabelledImages, *, own: bool, seed: int) -> LabelledImages:
        """Read the protected images at the size of the clean ones.

        Raises:
            UsageError: It is not there, or not these images with nothing dropped.
            ShardError: It cannot be read.
        """
        uri = self.config.corpus
        found = read_labelled(uri, size=images.size, sidecar_patterns=self.config.sidecar_patterns)
        if not np.array_equal(found.labels_N, images.labels_N):
            raise UsageError(
                f"{uri} holds {len(found)} images and the clean data set {len(images)}, or their "
                "labels differ; it must be that data set, protected, with nothing dropped"
            )
        return found


def fit(images: LabelledImages, config: CorpusConfig, **unused: object) -> StoredCopy:
    """Nothing is fitted."""
    return StoredCopy(config)
