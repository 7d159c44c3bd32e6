"""Programs of others that use a TPM through TrouSerS: attestation, and keys for PKCS#11.

On a guest's TPM. What they say is not believed but checked with another library.
"""

import hashlib
import shutil
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import padding, utils
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicNumbers

from protocol.constants import Ordinal
from protocol.return_codes import ReturnCode
from tests.clients.trousers import trousers_on, why_not
from tests.system.scratch_stack import FIRST_CHAIN, GUEST1, scratch_stack, vtpm_command

QUOTE_TOOLS = ("tpm_mkuuid", "tpm_mkaik", "tpm_loadkey", "tpm_getpcrhash", "tpm_getquote")
PROGRAM = Path(__file__).parents[1] / "clients" / "tspi_session.c"
PKCS11_TOOLS = ("stpm-keygen", "stpm-sign", "stpm-verify")

pytestmark = pytest.mark.skipif(bool(why_not()), reason=f"TrouSerS: {why_not()}")
needs_quote_tools = pytest.mark.skipif(
    bool(why_not(*QUOTE_TOOLS)), reason=f"tpm-quote-tools: {why_not(*QUOTE_TOOLS)}"
)
needs_pkcs11_tools = pytest.mark.skipif(
    bool(why_not(*PKCS11_TOOLS)), reason=f"simple-tpm-pk11: {why_not(*PKCS11_TOOLS)}"
)


@pytest.fixture(scope="module")
def booted():
    with scratch_stack() as stack:
        stack.make_images()
        stack.make_boot(GUEST1)
        stack.up(*FIRST_CHAIN)
        yield stack


@pytest.fixture(scope="module")
def owned(booted):
    """tcsd in guest1, whose TPM has an owner with the well-known secret."""
    inside = [*vtpm_command(), "exec", GUEST1, "--"]
    tpm0 = booted.places.domain(GUEST1).tpm0
    with trousers_on(tpm0, within=inside, environment=booted.environment) as tools:
        tools.run("tpm_takeownership", "-y", "-z")
        yield tools


# -- attestation -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def identity(owned):
    """An attestation identity key, registered with tcsd; its public half."""
    owned.run("tpm_mkuuid", "uuid")
    owned.run("tpm_mkaik", "-z", "aik.blob", "aik.pub")
    owned.run("tpm_loadkey", "aik.blob", "uuid")
    # A TSS blob in DER around a TPM_PUBKEY, whose last 256 bytes are the modulus.
    modulus = (owned.directory / "aik.pub").read_bytes()[-256:]
    return RSAPublicNumbers(65537, int.from_bytes(modulus, "big")).public_key()


def signed_data(directory, nonce):
    """The TPM_QUOTE_INFO2 that `tpm_getpcrhash` wrote, with the nonce of a quote in its place."""
    quote_info = (directory / "hash").read_bytes()
    assert quote_info[:6] == b"\x00\x36QUT2"
    return quote_info[:6] + nonce + quote_info[26:]


def verify(identity, signature, data):
    digest = utils.Prehashed(hashes.SHA1())
    signed = hashlib.sha1(data, usedforsecurity=False).digest()
    identity.verify(signature, signed, padding.PKCS1v15(), digest)


@needs_quote_tools
def test_quote_says_what_the_guest_has_booted(owned, identity, booted):
    nonce = bytes(range(20))
    (owned.directory / "nonce").write_bytes(nonce)
    owned.run("tpm_getpcrhash", "uuid", "hash", "values", "4", "5", "10")
    said = owned.run("tpm_getquote", "uuid", "nonce", "quote", "4", "5", "10")
    # tcsd first tries to load the key without the parent's secret, which its parent does not allow.
    assert said.refusals == {(Ordinal.LOAD_KEY2, ReturnCode.AUTHFAIL)}
    verify(identity, (owned.directory / "quote").read_bytes(), signed_data(owned.directory, nonce))
    values = dict(
        line.lower().split("=") for line in (owned.directory / "values").read_text().splitlines()
    )
    with booted.tpm(GUEST1) as tpm:
        assert values == {str(pcr): tpm.pcr_read(pcr).hex() for pcr in (4, 5, 10)}


@needs_quote_tools
def test_quote_changes_with_a_pcr(owned, identity, booted):
    nonce = bytes(20)
    (owned.directory / "nonce").write_bytes(nonce)
    owned.run("tpm_getpcrhash", "uuid", "hash", "values", "11")
    before = signed_data(owned.directory, nonce)
    with booted.tpm(GUEST1) as tpm:
        tpm.extend(11, b"\x11" * 20)
    owned.run("tpm_getquote", "uuid", "nonce", "quote", "11")
    owned.run("tpm_getpcrhash", "uuid", "hash", "values", "11")
    after = signed_data(owned.directory, nonce)
    assert before != after
    verify(identity, (owned.directory / "quote").read_bytes(), after)


# -- keys for PKCS#11 ------------------------------------------------------------------------------


@needs_pkcs11_tools
def test_key_made_for_pkcs11_signs(owned):
    (owned.directory / "text").write_bytes(b"to be signed")
    owned.run("stpm-keygen", "-o", "my.key")
    owned.run("sh", "-c", "stpm-sign -r -k my.key -f text >signature")
    said = owned.run("stpm-verify", "-k", "my.key", "-f", "text", "-s", "signature")
    assert "success" in said.out
    (owned.directory / "text").write_bytes(b"another text")
    said = owned.run("stpm-verify", "-k", "my.key", "-f", "text", "-s", "signature", status=None)
    assert said.status != 0


@needs_pkcs11_tools
@pytest.mark.skipif(shutil.which("ssh-keygen") is None, reason="ssh-keygen is not installed")
def test_ssh_finds_the_key_in_the_tpm(owned):
    owned.run("stpm-keygen", "-o", "ssh.key")
    module = next(Path("/usr/lib").glob("*/libsimple-tpm-pk11.so"))
    (owned.directory / "config").write_text(f"key {owned.directory}/ssh.key\n")
    config = f"SIMPLE_TPM_PK11_CONFIG={owned.directory}/config"
    said = owned.run("env", config, "ssh-keygen", "-D", str(module))
    assert said.out.startswith("ssh-rsa ")


# -- an application's own program ------------------------------------------------------------------


def cannot_compile():
    """Whether there is no compiler, or not what a program for libtspi is compiled with."""
    return shutil.which("gcc") is None or not Path("/usr/include/tss/tspi.h").exists()


@pytest.mark.skipif(cannot_compile(), reason="gcc or libtspi-dev is not installed")
def test_program_over_libtspi(owned):
    words = ["gcc", "-Wall", "-Werror", "-o", "session", str(PROGRAM), "-ltspi"]
    owned.run(*words)
    said = owned.run("./session")
    assert said.out.endswith("all done\n")
    # Keys are loaded, bound to, sealed and quoted with; and some of it inside a transport session.
    used = {
        Ordinal.CREATE_WRAP_KEY,
        Ordinal.UN_BIND,
        Ordinal.SEAL,
        Ordinal.UNSEAL,
        Ordinal.SIGN,
        Ordinal.QUOTE,
        Ordinal.TICK_STAMP_BLOB,
        Ordinal.ESTABLISH_TRANSPORT,
        Ordinal.EXECUTE_TRANSPORT,
    }
    assert used <= said.ordinals
    assert {code for _, code in said.refusals} <= {ReturnCode.AUTHFAIL}
