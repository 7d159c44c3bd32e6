"""The guest's image: round trip, ordinary tools, refusals."""

import io
import os
import shutil
import subprocess
import tarfile
from pathlib import Path

import pytest

from daemons.errors import ExitCode
from daemons.guest import boot_image
from daemons.guest.boot_image import (
    BootFiles,
    BootImage,
    ImageBlank,
    ImageDamaged,
    ImageMissing,
    ImageRefused,
    ImageUnreadable,
    make_archive,
    write_boot_image,
)

IMAGE_BYTES = 64 * 1024
FILES = BootFiles(kernel=b"kernel" * 100, initrd=b"initrd", command_line="root=/dev/xvda1 ro")


@pytest.fixture
def image(tmp_path):
    path = tmp_path / "guest1.img"
    path.write_bytes(bytes(IMAGE_BYTES))
    return path


def archive_of(*members, form=tarfile.USTAR_FORMAT):
    """A tar archive of (name, data) or ready TarInfo objects."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=form) as archive:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                archive.addfile(member)
                continue
            name, data = member
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return stream.getvalue()


def special(name, kind, linkname=""):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, linkname
    return info


def put(path, archive):
    with path.open("r+b") as file:
        file.write(archive)


def test_image_made_is_read_back(image):
    write_boot_image(image, FILES)
    with BootImage(image) as opened:
        entry = opened.entry()
        assert entry.command_line == FILES.command_line
        assert opened.read(entry.kernel) == FILES.kernel
        assert opened.read(entry.initrd) == FILES.initrd
    assert image.stat().st_size == IMAGE_BYTES


def test_image_without_initrd_has_none(image):
    write_boot_image(image, BootFiles(kernel=b"k", initrd=None, command_line=""))
    with BootImage(image) as opened:
        assert opened.entry().initrd is None
        assert sorted(opened.members) == ["boot/grub/menu.lst", "boot/vmlinuz"]


def test_image_rest_stays_as_it_is(image):
    tail = bytes(IMAGE_BYTES - 4) + b"tail"
    image.write_bytes(tail)
    write_boot_image(image, FILES, overwrite=True)
    assert image.read_bytes().endswith(b"tail")


def test_image_same_files_give_same_bytes(image):
    assert make_archive(image, FILES) == make_archive(image, FILES)


@pytest.mark.skipif(shutil.which("tar") is None, reason="needs tar")
def test_image_is_read_and_written_by_tar(image, tmp_path):
    write_boot_image(image, FILES)
    listed = subprocess.run(["tar", "tf", image], capture_output=True, text=True, check=True)
    assert "boot/vmlinuz" in listed.stdout.split()
    tree = tmp_path / "tree"
    (tree / "boot/grub").mkdir(parents=True)
    (tree / "boot/bzImage").write_bytes(b"other kernel")
    (tree / "boot/grub/menu.lst").write_text("title t\nkernel /boot/bzImage quiet\n")
    for form in ("gnu", "ustar"):
        made = subprocess.run(
            ["tar", f"--format={form}", "-C", tree, "-c", "./boot"], capture_output=True, check=True
        )
        image.write_bytes(bytes(IMAGE_BYTES))
        put(image, made.stdout)
        with BootImage(image) as opened:
            assert opened.read(opened.entry().kernel) == b"other kernel"


def test_image_missing_is_named(tmp_path):
    with pytest.raises(ImageMissing) as failure:
        BootImage(tmp_path / "none.img")
    assert failure.value.exit_code is ExitCode.NO_INPUT


def test_image_whose_disk_fails_is_refused_and_named():
    with pytest.raises(ImageUnreadable) as failure:
        BootImage(Path("/proc/self/mem"))
    assert failure.value.exit_code is ExitCode.IO_ERROR
    assert failure.value.why == "invalid argument"  # it has no end


def test_image_blank_of_a_terabyte_is_told_at_once(image):
    os.truncate(image, 1 << 40)
    with pytest.raises(ImageBlank):
        BootImage(image)
    with image.open("r+b") as file:
        file.seek(1 << 39)
        file.write(b"x")
    with pytest.raises(ImageDamaged):
        BootImage(image)


@pytest.mark.parametrize("size", [0, 1, 512, IMAGE_BYTES])
def test_image_blank_says_how_to_make_one(image, size):
    os.truncate(image, 0)
    os.truncate(image, size)
    with pytest.raises(ImageBlank) as failure:
        BootImage(image)
    assert "vtpm image make" in failure.value.next_step


def test_image_that_is_no_file_is_refused(tmp_path):
    with pytest.raises(ImageRefused, match="cannot open"):
        BootImage(tmp_path)
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(ImageRefused, match="cannot open"):
        BootImage(tmp_path / "fifo")


REFUSED = {
    "no tar header": b"\x7fELF" + bytes(IMAGE_BYTES - 4),
    "no archive at its beginning": bytes(1024) + b"x" + bytes(IMAGE_BYTES - 1025),
    "'/etc/passwd' leads out": archive_of(("/etc/passwd", b"x")),
    "'boot/../../x' leads out": archive_of(("boot/../../x", b"x")),
    "'boot//x' leads out": archive_of(("boot//x", b"x")),
    "has boot/x twice": archive_of(("boot/x", b"1"), ("./boot/x", b"2")),
    "'boot/link' is neither": archive_of(special("boot/link", tarfile.SYMTYPE, "/etc/shadow")),
    "'boot/hard' is neither": archive_of(special("boot/hard", tarfile.LNKTYPE, "boot/x")),
    "'boot/device' is neither": archive_of(special("boot/device", tarfile.CHRTYPE)),
    "is neither a file nor": archive_of(("b" * 120, b"x"), form=tarfile.GNU_FORMAT),
    "more than 64 members": archive_of(*((f"f{n}", b"") for n in range(65))),
    "passes the end": archive_of(("big", bytes(8)))[:512] + bytes(3),
    "ends inside the archive": archive_of(("big", bytes(512)))[:1030],
}


@pytest.mark.parametrize("reason", REFUSED)
def test_image_that_is_no_plain_archive_is_refused(image, reason):
    image.write_bytes(REFUSED[reason])
    with pytest.raises(ImageDamaged) as failure:
        BootImage(image)
    assert reason in failure.value.why
    assert failure.value.exit_code is ExitCode.DAMAGED


def test_image_every_flipped_header_byte_is_refused_or_changes_no_name_or_size(image):
    write_boot_image(image, FILES)
    whole = bytearray(image.read_bytes())
    with BootImage(image) as opened:
        members = opened.members
    for at in range(512):
        broken = bytearray(whole)
        broken[at] ^= 0x01
        image.write_bytes(broken)
        try:
            with BootImage(image) as opened:
                assert opened.members == members
        except ImageDamaged:
            continue


def test_image_menu_that_names_a_missing_file_is_refused(image):
    put(image, archive_of(("boot/grub/menu.lst", b"title t\nkernel /boot/none\n")))
    with BootImage(image) as opened, pytest.raises(ImageDamaged, match="cannot boot") as failure:
        opened.read(opened.entry().kernel)
    assert "has no boot/none" in failure.value.why


def test_image_damaged_menu_names_its_line(image):
    put(image, archive_of(("boot/grub/menu.lst", b"title t\nkernle /k\n")))
    with BootImage(image) as opened, pytest.raises(ImageDamaged) as failure:
        opened.entry()
    assert "menu.lst, line 2: unknown directive 'kernle'" in failure.value.why


def test_image_file_over_the_limit_is_not_read(image):
    put(image, archive_of(("boot/grub/menu.lst", b"x" * (boot_image.MENU_BYTES_MAX + 1))))
    with BootImage(image) as opened, pytest.raises(ImageDamaged) as failure:
        opened.entry()
    assert "more than 65536 are not read" in failure.value.why


def test_make_refuses_an_image_that_is_not_blank(image):
    write_boot_image(image, FILES)
    before = image.read_bytes()
    other = BootFiles(kernel=b"other", initrd=None, command_line="")
    with pytest.raises(ImageRefused, match="cannot write"):
        write_boot_image(image, other)
    assert image.read_bytes() == before
    write_boot_image(image, other, overwrite=True)
    with BootImage(image) as opened:
        assert opened.read("boot/vmlinuz") == b"other"


def test_make_refuses_an_image_that_is_too_small(image):
    os.truncate(image, 4096)
    with pytest.raises(ImageRefused) as failure:
        write_boot_image(image, FILES)
    assert "the image 4096" in failure.value.why
    assert image.read_bytes() == bytes(4096)


def test_make_does_not_create_an_image(tmp_path):
    with pytest.raises(ImageMissing):
        write_boot_image(tmp_path / "none.img", FILES)


@pytest.mark.parametrize("command_line", [" a", "a\tb", "a\nb", "a\r", "a\\", "a\0b", "a\udcff"])
def test_make_refuses_a_command_line_that_a_menu_would_change(image, command_line):
    with pytest.raises(ImageRefused, match="cannot write"):
        write_boot_image(image, BootFiles(kernel=b"k", initrd=None, command_line=command_line))
    assert image.read_bytes() == bytes(IMAGE_BYTES)


def test_make_torn_anywhere_leaves_nothing_that_boots(image, monkeypatch):
    write_boot_image(image, BootFiles(kernel=b"old", initrd=None, command_line="old"))
    syncs = []

    def stop_at_second(descriptor):
        syncs.append(descriptor)
        if len(syncs) == 2:
            raise OSError("power cut")

    monkeypatch.setattr(boot_image.os, "fsync", stop_at_second)
    with pytest.raises(OSError, match="power cut"):
        write_boot_image(image, FILES, overwrite=True)
    with pytest.raises(ImageDamaged):
        BootImage(image)
