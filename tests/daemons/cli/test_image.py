"""vtpm image make and show."""

import hashlib
import json
import os

import pytest

from daemons.errors import ExitCode

CMDLINE = "root=/dev/xvda1 ro"


@pytest.fixture
def files(tmp_path):
    (tmp_path / "vmlinuz").write_bytes(b"kernel" * 50)
    (tmp_path / "initrd").write_bytes(b"initrd" * 50)
    return tmp_path / "vmlinuz", tmp_path / "initrd"


@pytest.fixture
def image(places):
    places.images("/images").mkdir()
    path = places.images("/images/guest1.img")
    path.write_bytes(bytes(2 * 1024 * 1024))
    return path


def make(vtpm, image, files, *more):
    kernel, initrd = files
    return vtpm(
        "image", "make", image, "--kernel", kernel, "--initrd", initrd, "--cmdline", CMDLINE, *more
    )


@pytest.mark.parametrize("name", ["guest1.img", "/images/guest1.img", "path"])
def test_image_is_found_under_the_root_or_by_its_path(vtpm, image, files, name):
    done = make(vtpm, image if name == "path" else name, files)
    assert (done.exit_code, done.stdout) == (0, f"{image}\n")
    shown = json.loads(vtpm("image", "show", name if name != "path" else image, "--json").stdout)
    assert shown == {
        "image": str(image),
        "title": "vmlinuz",
        "kernel": "/boot/vmlinuz",
        "initrd": "/boot/initrd.img",
        "command_line": CMDLINE,
        "measurements": [
            {"pcr": pcr, "digest": hashlib.sha1(data).hexdigest(), "what": what, "bytes": len(data)}
            for pcr, what, data in (
                (4, "kernel", b"kernel" * 50),
                (5, "command line", CMDLINE.encode()),
                (5, "initrd", b"initrd" * 50),
            )
        ],
    }


def test_image_show_prints_what_boots(vtpm, image, files):
    make(vtpm, image, files)
    done = vtpm("image", "show", image)
    assert done.exit_code == 0
    assert "boots 'vmlinuz'" in done.stdout
    assert f"command line: {CMDLINE}" in done.stdout


def test_image_make_refuses_what_is_not_blank(vtpm, image, files):
    assert make(vtpm, image, files).exit_code == 0
    done = make(vtpm, image, files)
    assert done.exit_code == ExitCode.USAGE
    assert "not blank" in done.stderr
    assert make(vtpm, image, files, "--force").exit_code == 0


def test_image_make_refuses_a_missing_image_or_kernel(vtpm, image, files):
    assert make(vtpm, "none.img", files).exit_code == ExitCode.NO_INPUT
    assert make(vtpm, image, (files[0] / "none", files[1])).exit_code == ExitCode.NO_INPUT


@pytest.mark.usefixtures("image")
def test_image_show_of_a_blank_image_says_what_to_do(vtpm):
    done = vtpm("image", "show", "guest1.img")
    assert done.exit_code == ExitCode.NO_INPUT
    assert "nothing to boot" in done.stderr
    assert "vtpm image make" in done.stderr


def test_image_show_of_a_damaged_image_keeps_it(vtpm, image):
    image.write_bytes(os.urandom(4096))
    before = image.read_bytes()
    assert vtpm("image", "show", image).exit_code == ExitCode.DAMAGED
    assert image.read_bytes() == before
