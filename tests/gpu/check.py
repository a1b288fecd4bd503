"""Checks for a machine with a GPU, on which little else is installed: docs/gpu.md.

    python tests/gpu/check.py protect --packages FOLDER --output protect.json
    python tests/gpu/check.py adversaries --packages FOLDER --photos FOLDER --output attacked.json

Needs PyTorch, torchvision, timm, NumPy, Pillow, SciPy and PyYAML there; no Ray, no open_clip, no
network. Runs on a CPU too; `--tiny` makes that seconds, for CI.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import tomllib
import zipfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

ROOT = Path(__file__).parents[2]


def main(arguments: list[str] | None = None) -> int:
    """Run a command; 0 if all its rows could be measured, 1 if one failed."""
    options = _parser().parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="one4all-gpu-") as scratch:
        make_importable(Path(scratch), options.packages)
        # Only now can they be imported.
        from gpu import adversaries, protect
        from gpu.record import Record

        told = {k: str(v) for k, v in vars(options).items() if k not in ("command", "output")}
        record = Record(
            options.output,
            options.command,
            told,
            minutes=options.minutes,
            say=lambda line: print(line, flush=True),
        )
        work = Path(scratch) / "work"
        work.mkdir()
        if options.command == "protect":
            protect.run(record, work, photos=options.photos, tiny=options.tiny)
            table = record.markdown()
        else:
            adversaries.run(
                record,
                work,
                photos=options.photos,
                epochs=options.epochs,
                num_seeds=options.seeds,
                tiny=options.tiny,
            )
            table = f"{record.markdown()}\n\n{adversaries.markdown(record)}"
        record.write()
        print(f"\n{table}\n\n{options.output}: {record.num_failed} rows failed")
        return 1 if record.num_failed else 0


def make_importable(scratch: Path, packages: Path | None) -> None:
    """Put this checkout, and packages that travelled with it, on Python's path.

    Args:
        scratch: Folder for what has to be unpacked.
        packages: Folder of wheels, or of packages.
    """
    if packages is not None:
        wheels = sorted(packages.glob("*.whl"))
        for wheel in wheels:
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(scratch / "packages")
        sys.path.insert(0, str((scratch / "packages" if wheels else packages).resolve()))
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    try:
        version("one4all")
    except PackageNotFoundError:  # a checkout alone is no distribution, and the package asks for it
        project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
        facts = scratch / "checkout" / f"one4all-{project['version']}.dist-info" / "METADATA"
        facts.parent.mkdir(parents=True)
        facts.write_text(
            f"Metadata-Version: 2.1\nName: one4all\nVersion: {project['version']}\n", "utf-8"
        )
        sys.path.append(str(scratch / "checkout"))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    for name, text in (
        ("protect", "parity with the CPU, images/s of the rewrite, the training step"),
        ("adversaries", "ResNet18 at 224 pixels on protected copies of photos"),
    ):
        command = commands.add_parser(name, help=text)
        command.add_argument("--output", type=Path, required=True, help="JSON file to write")
        command.add_argument("--packages", type=Path, help="folder of wheels that are missing here")
        command.add_argument(
            "--photos",
            type=Path,
            required=name == "adversaries",
            help="folder that travel.py made; without one, crops of the embedded photos",
        )
        command.add_argument(
            "--minutes", type=float, default=5.0, help="begin no row when these are over"
        )
        command.add_argument("--tiny", action="store_true", help="see whether it runs, in seconds")
        if name == "adversaries":
            command.add_argument("--epochs", type=int, default=15)
            command.add_argument("--seeds", type=int, default=1)
    return parser


if __name__ == "__main__":
    sys.exit(main())
