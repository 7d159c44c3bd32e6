"""The words of extra=."""

import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from daemons.policy import LocalityRule
from daemons.xl.domain_arguments import (
    LogLevel,
    ManagerArguments,
    StartupType,
    TpmDriver,
    VtpmArguments,
    parse_manager_arguments,
    parse_vtpm_arguments,
)
from daemons.xl.xl_config import WrongTextError


def test_manager_defaults():
    assert parse_manager_arguments("") == ManagerArguments()
    assert ManagerArguments().owner_auth == bytes(20)


def test_manager_every_option_has_an_effect():
    arguments = parse_manager_arguments(
        f"owner_auth=hash:{'aB' * 20}  srk_auth=text:secret\ttpmdriver=tpmfront "
        "tpmiomem=0xFED40000 tpmirq=probe tpmlocality=2"
    )
    assert arguments == ManagerArguments(
        owner_auth=b"\xab" * 20,
        srk_auth=hashlib.sha1(b"secret").digest(),
        tpm_driver=TpmDriver.TPMFRONT,
        tpm_iomem=0xFED40000,
        tpm_irq=None,
        tpm_locality=2,
    )
    assert parse_manager_arguments("owner_auth=well-known tpmirq=7").tpm_irq == 7


@pytest.mark.parametrize(
    ("extra", "reason", "index"),
    [
        ("tpmlocality=2 color=red", "no option 'color=red'", 14),
        ("locality", "no option", 0),
        ("tpmlocality", "not a locality", 0),
        ("tpmlocality=5", "not a locality", 0),
        ("tpmlocality=02", "not a locality", 0),
        ("tpmlocality=1 tpmlocality=2", "given twice", 14),
        ("owner_auth=secret", "none of well-known", 0),
        ("owner_auth=hash:1234", "none of well-known", 0),
        ("srk_auth=", "none of well-known", 0),
        ("tpmdriver=tpm_crb", "neither tpm_tis", 0),
        ("tpmiomem=fed40000", "not an address", 0),
        ("tpmiomem=0x1000", "no TPM is at", 0),
        ("tpmirq=256", "neither an interrupt", 0),
        ("tpmirq=-1", "neither an interrupt", 0),
        ("tpm2=1", "TPM 1.2", 0),
        ("srk_handle=81000000", "TPM 1.2", 0),
    ],
)
def test_manager_unknown_or_malformed_option_is_refused(extra, reason, index):
    with pytest.raises(WrongTextError, match=reason) as caught:
        parse_manager_arguments(extra)
    assert caught.value.index == index


def test_secrets_are_not_shown():
    arguments = parse_manager_arguments("owner_auth=text:hunter2")
    assert repr(arguments.owner_auth) not in repr(arguments)
    with pytest.raises(WrongTextError) as caught:
        parse_manager_arguments("owner_auth=hunter2")
    assert "hunter2" not in str(caught.value)


def test_vtpm_defaults():
    assert parse_vtpm_arguments("") == VtpmArguments()
    assert VtpmArguments().loglevel is LogLevel.INFO


def test_vtpm_every_option_has_an_effect():
    arguments = parse_vtpm_arguments(
        "loglevel=debug save maintcmds=1 hwinitpcr=0-3,7 "
        "locality=*:vm_r:guest_t=0,2 locality=system_u:system_r:dom0_t=4"
    )
    assert arguments == VtpmArguments(
        loglevel=LogLevel.DEBUG,
        startup=StartupType.SAVE,
        has_maintenance_commands=True,
        hardware_init_pcrs=frozenset({0, 1, 2, 3, 7}),
        locality_rules=(
            LocalityRule("*:vm_r:guest_t", frozenset({0, 2})),
            LocalityRule("system_u:system_r:dom0_t", frozenset({4})),
        ),
    )


@pytest.mark.parametrize("word", ["hwinitpcr", "hwinitpcrs"])
@pytest.mark.parametrize(
    ("spec", "pcrs"),
    [
        ("all", set(range(24))),
        ("none", set()),
        ("all,none,5", {5}),
        ("0-23", set(range(24))),
        ("5-5", {5}),
        ("16,4-6", {4, 5, 6, 16}),
    ],
)
def test_vtpm_hardware_pcrs_in_both_spellings_with_real_ranges(word, spec, pcrs):
    assert parse_vtpm_arguments(f"{word}={spec}").hardware_init_pcrs == pcrs


@pytest.mark.parametrize(
    ("extra", "reason"),
    [
        ("hwinitpcr=24", "0 to 23"),
        ("hwinitpcr=5-3", "0 to 23"),
        ("hwinitpcr=1-24", "0 to 23"),
        ("hwinitpcr=", "none of all"),
        ("hwinitpcr=1,,2", "none of all"),
        ("hwinitpcr=x", "none of all"),
        ("loglevel=loud", "error, info, debug"),
        ("maintcmds=yes", "neither 0 nor 1"),
        ("locality=0", "a locality rule"),
        ("locality=*=0", "a locality rule"),
        ("locality==0", "a locality rule"),
        ("locality=u:r:t=", "not a locality"),
        ("locality=u:r:t=5", "not a locality"),
        (" ".join(["locality=u:r:t=0"] * 17), "more than 16"),
    ],
)
def test_vtpm_malformed_option_is_refused(extra, reason):
    with pytest.raises(WrongTextError, match=reason):
        parse_vtpm_arguments(extra)


def test_vtpm_unknown_words_are_kept_aside():
    assert parse_vtpm_arguments("shiny loglevel=error x=1").unknown == ("shiny", "x=1")


@pytest.mark.parametrize("parser", [parse_manager_arguments, parse_vtpm_arguments])
@given(extra=st.text())
def test_any_text_gives_arguments_or_one_error_inside_the_text(parser, extra):
    try:
        parser(extra)
    except WrongTextError as wrong:
        assert 0 <= wrong.index <= len(extra)  # noqa: PT017 - either outcome is right
