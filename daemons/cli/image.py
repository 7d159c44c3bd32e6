"""Guest images: make and show."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from daemons.cli.options import Json, Root, new_app, places_of
from daemons.cli.output import print_json, print_line, print_rows
from daemons.errors import ExitCode, Failure
from daemons.named_files import read_bytes

Image = Annotated[
    Path,
    typer.Argument(metavar="IMAGE", help="A file, or the name of one under the root's /images."),
]
_FILE_BYTES_MAX = 256 * 1024 * 1024

app = new_app(name="image", help="Guest images: what a guest boots.")


def image_path(image: Path, root: str | None) -> Path:
    """Find an image: a file as named, else one under the root, where config files look.

    A name without a directory is looked for in the root's /images.
    """
    places = places_of(root)
    if image.is_absolute() and ".." not in image.parts:
        in_root = places.under_root(str(image))
        return in_root if _is_there(in_root) or not _is_there(image) else image
    if _is_there(image):
        return image
    return places.images("/images") / image if len(image.parts) == 1 else image


def _is_there(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # a name of 300 bytes, a directory that may not be entered
        return False


@app.command("make")
def image_make(  # noqa: PLR0913, PLR0917 - the options of the subcommand
    image: Image,
    kernel: Annotated[Path, typer.Option(help="The kernel; PCR 4 measures it.")],
    initrd: Annotated[Path | None, typer.Option(help="The initial RAM disk; PCR 5.")] = None,
    cmdline: Annotated[str, typer.Option(help="The kernel's command line; PCR 5.")] = "",
    force: Annotated[bool, typer.Option("--force", help="Write over what is there.")] = False,
    root: Root = None,
) -> None:
    """Write what a guest boots into an existing blank image."""
    from daemons.guest.boot_image import BootFiles, write_boot_image  # noqa: PLC0415 - tarfile

    files = BootFiles(
        kernel=_read(kernel),
        initrd=_read(initrd) if initrd is not None else None,
        command_line=cmdline,
        title=kernel.name if kernel.name.isprintable() else "guest",
    )
    path = image_path(image, root)
    write_boot_image(path, files, overwrite=force)
    print_line(str(path))


@app.command("show")
def image_show(image: Image, as_json: Json = False, root: Root = None) -> None:
    """Show what an image boots, and the digests that its loader will extend."""
    from daemons.guest.boot_image import BootImage  # noqa: PLC0415
    from daemons.guest.loader import measure  # noqa: PLC0415

    with BootImage(image_path(image, root)) as opened:
        entry = opened.entry()
        measurements = measure(opened)
    if as_json:
        print_json(
            {
                "image": str(opened.path),
                "title": entry.title,
                "kernel": f"/{entry.kernel}",
                "initrd": f"/{entry.initrd}" if entry.initrd else None,
                "command_line": entry.command_line,
                "measurements": [
                    {"pcr": m.pcr, "digest": m.digest, "what": m.what, "bytes": m.size}
                    for m in measurements
                ],
            }
        )
        return
    print_line(f"{opened.path} boots {entry.title!r}")
    print_rows(
        ("PCR", "SHA-1", "Bytes", "What"),
        [(m.pcr, m.digest, m.size, f"{m.what}: {m.name}") for m in measurements],
    )


def _read(path: Path) -> bytes:
    try:
        data = read_bytes(path, _FILE_BYTES_MAX)
    except OSError as error:
        raise Failure(
            f"cannot read {path}",
            why=error.strerror or str(error),
            next_step="name a file that is there; any file will do for a kernel here",
            exit_code=ExitCode.NO_INPUT,
        ) from error
    if len(data) > _FILE_BYTES_MAX:
        raise Failure(
            f"cannot use {path}",
            why=f"it has more than {_FILE_BYTES_MAX} bytes",
            next_step="choose a smaller file",
            exit_code=ExitCode.USAGE,
        )
    return data
