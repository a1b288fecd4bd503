"""Workers that die in mid-shard; importable by the processes that they die in."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

from one4all.corpus.loose import LooseWriter
from one4all.corpus.tar import TarWriter
from one4all.protectors.protector import Protector
from pipelines.protect.worker import ProtectWorker


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)


class PoisonedWorker(ProtectWorker):
    """A shard whose name starts with "poison" kills its process, when it is half written."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        original = TarWriter.replace

        def replace(writer, member, **changes):
            original(writer, member, **changes)
            if self._current.startswith("poison"):
                _die()

        TarWriter.replace = replace

    def protect(self, unit, *, recorded=""):
        self._current = unit.name
        return super().protect(unit, recorded=recorded)


class PoisonedByImageWorker(ProtectWorker):
    """A loose image whose name has "poison" in it kills its process when it is written."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        original = LooseWriter.replace

        def replace(writer, member, **changes):
            if "poison" in member.name:
                _die()
            original(writer, member, **changes)

        LooseWriter.replace = replace


class OnceKilledWorker(ProtectWorker):
    """Dies in the middle of every shard the first time; what was killed is noted in a folder."""

    def __init__(self, folder: Path, *args, **options):
        super().__init__(*args, **options)
        original = TarWriter.replace

        def replace(writer, member, **changes):
            original(writer, member, **changes)
            mark = folder / self._current
            if not mark.exists():
                mark.touch()
                _die()

        TarWriter.replace = replace

    def protect(self, unit, *, recorded=""):
        self._current = unit.name
        return super().protect(unit, recorded=recorded)


class StillbornWorker(ProtectWorker):
    """Dies while it loads the protector, before it can say which shard it works on."""

    def __init__(self, *args, **options):
        Protector.load = lambda *arguments, **options: _die()
        super().__init__(*args, **options)
