"""The page as plain files for any web host: the network runs in the visitor's browser.

    python -m server.static OUT

OUT needs no server of this project, and photos never leave the browser. A server of this project
that is given OUT (--device-dir) offers the same on its own page. The runtime for browsers is
fetched with npm, or taken from --runtime.
"""

import argparse
import shutil
import sys
from pathlib import Path

from common.files import write_atomically
from common.program import Help, program
from server.backends import BackendError
from server.http.device import FOLDER, LISTING
from server.settings import SHIPPED_MODEL
from server.static.runtime import PACKAGE, RUNTIMES, RuntimeMissingError, runtime_files

_ROOT = Path(__file__).parent.parent.parent


def check_out(out: Path) -> None:
    """Check that nothing of somebody else's would be written over.

    Raises:
        ValueError: `out` is neither new, nor empty, nor written by this command.
    """
    ours = out / FOLDER / LISTING
    if out.exists() and not (out.is_dir() and (ours.is_file() or not any(out.iterdir()))):
        raise ValueError(f"{out} is there, and was not written by this command: name another")


def write_site(out: Path, found: dict[str, bytes]) -> None:
    """Write files to `out`, and remove a network and runtime that were there before.

    Args:
        out: a folder for which `check_out` raises nothing.
        found: the files by their paths below it.

    Raises:
        OSError: it cannot be written.
    """
    for name, data in found.items():
        path = out / name
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, data)
    kept = {(out / name).parent for name in found}
    for folder in (out / FOLDER).iterdir():
        if folder.is_dir() and folder not in kept:
            shutil.rmtree(folder)


def _told(found: dict[str, bytes]) -> str:
    sizes = {name: len(data) for name, data in found.items()}
    page = sum(size for name, size in sizes.items() if not name.startswith(f"{FOLDER}/"))
    device = {Path(name).name: size for name, size in sizes.items() if name.startswith(FOLDER)}
    runs = ", ".join(
        f"{way} {sum(device[name] for name in names) / 1e6:.1f} MB"
        f" ({sum(device[f'{name}.gz'] for name in names) / 1e6:.1f} MB compressed)"
        for way, names in RUNTIMES.items()
    )
    network = device["network.onnx"]
    return f"page {page / 1e3:.0f} kB, network {network / 1e6:.1f} MB, runtime {runs}"


def main() -> int:
    """Run the command; return its exit code."""
    parser = argparse.ArgumentParser(
        prog=program("server.static"), description=__doc__, formatter_class=Help
    )
    parser.add_argument(
        "out", type=Path, metavar="OUT", help="folder to write; new, empty, or written so before"
    )
    parser.add_argument(
        "--model",
        type=Path,
        default=_ROOT / SHIPPED_MODEL,
        metavar="FILE",
        help=f"the network, an ONNX file (default: {SHIPPED_MODEL})",
    )
    parser.add_argument(
        "--runtime",
        type=Path,
        metavar="FILE",
        help=f"{PACKAGE} as `npm pack` writes it; fetched with npm if not given",
    )
    parser.add_argument(
        "--exact", action="store_true", help="keep the weights in float32, twice the size"
    )
    args = parser.parse_args()
    try:
        # It needs the library onnx, which serving does not.
        from server.static.site import device_files, page_files
    except ModuleNotFoundError as error:
        parser.exit(
            1, f"{parser.prog} needs {error.name}: pip install -r requirements-browser.txt\n"
        )
    try:
        check_out(args.out)
        found = page_files() | device_files(
            args.model, runtime_files(args.runtime), exact=args.exact
        )
        write_site(args.out, found)
    except (BackendError, RuntimeMissingError, ValueError, OSError) as error:
        parser.exit(1, f"error: {error}\n")
    print(f"{args.out}: {_told(found)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
