"""Where libtpms and we differ: cryptography, identities, PCRs, DAA.

TPM Main r116 Part 3, chapters 13 to 16 and 26.
"""

from tests.differential.deviations.deviation import Deviation

DEVIATIONS: tuple[Deviation, ...] = (
    Deviation(
        name="a refused TPM_SHA1Start",
        commands=("SHA1Start",),
        libtpms="ends the computation that is in progress",
        ours="changes nothing, as every refused command",
        section="Part 3 §13.1",
        steps=("*: SHA1Update 0", "*: SHA1Complete 0"),
    ),
    Deviation(
        name="a second session that is bound to something else",
        commands=("CertifyKey", "CertifyKey2"),
        libtpms="AUTHFAIL, as for the first; AUTH2FAIL for a wrong HMAC only",
        ours="AUTH2FAIL: the authorization for the second key failed",
        section="Part 2 §16",
        steps=("pairs of sessions: *, of the first", "pairs of sessions: *, of the SRK"),
    ),
    Deviation(
        name="a second session that is not there",
        commands=("CertifyKey", "CertifyKey2"),
        libtpms="looked for when the first has proven itself: AUTHFAIL before it",
        ours="INVALID_AUTHHANDLE: sessions are found before any is checked",
        section="Part 3 §13.8, §13.9",
        steps=("pairs of sessions: *, none",),
    ),
    Deviation(
        name="bytes before an auth block",
        commands=("Sign",),
        libtpms="takes them for the block's beginning: BAD_PARAMETER where what then stands for "
        "continueAuthSession is no BOOL",
        ours="BAD_PARAM_SIZE",
        section="Part 2 §16",
        steps=("sizes: byte before a block, *",),
    ),
    Deviation(
        name="locality of a key",
        commands=("Sign", "GetPubKey"),
        libtpms="WRONGPCRVAL for a wrong locality too",
        ours="BAD_LOCALITY: what to check and what to answer stands apart from the PCRs",
        section="Part 3 §13.8, action 9 a ii; §10.6, action 4 a ii",
        steps=(
            "tests of cryptographic: test_sign_checks_the_keys_binding",
            "tests of storage_keys: test_get_pub_key_checks_the_keys_locality",
        ),
    ),
    Deviation(
        name="signing in a session that joins",
        commands=("DAA_Sign",),
        libtpms="noticed at stage 2 only",
        ours="DAA_ISSUER_SETTINGS at stage 1: the session knows no issuer yet",
        section="Part 3 §26.2",
        steps=("crossed DAA: 31 at 1",),
    ),
    Deviation(
        name="order of TPM_RevokeTrust",
        commands=("RevokeTrust",),
        libtpms="asks for presence before EKReset",
        ours="EKReset first (AUTHFAIL), then presence, as the actions are numbered",
        section="Part 3 §14.3",
        steps=("endorsement: revoke none",),
    ),
    Deviation(
        name="scheme of the signer",
        commands=("CertifyKey", "CertifyKey2"),
        libtpms="looked at before the sessions",
        ours="sessions are proven first, whatever else is wrong",
        section="Part 3 §13.8, §13.9",
        steps=(
            "keys: certify 3[23] storage by DER alone",
            "keys: certify 3[23] storage by storage alone",
        ),
    ),
    Deviation(
        name="pcrIgnoredOnRead",
        commands=("CertifyKey", "CertifyKey2"),
        libtpms="PCRs of the certified key are checked all the same",
        ours="reading the public part skips them",
        section="Part 2 §5.10",
        steps=("keys: certify 3[23] ignoring", "keys: certify 3[23] ignoring alone"),
    ),
    Deviation(
        name="codes of TPM_ActivateIdentity",
        commands=("ActivateIdentity",),
        libtpms="AUTHFAIL and AUTH2FAIL swapped",
        ours="first block AUTHFAIL, second AUTH2FAIL",
        section="Part 3 §15.2",
        steps=("identities: activate block [01] wrong",),
    ),
    Deviation(
        name="schemes of an EK",
        commands=("CreateEndorsementKeyPair", "CreateRevocableEK"),
        libtpms="others than its own are refused",
        ours="ignored, and the EK's own are told",
        section="Part 3 §14.1",
        test="test_create_ek_ignores_the_schemes_and_tells_its_own",
    ),
    Deviation(
        name="sizes inside a transport session",
        commands=("SHA1Start", "GetCapability"),
        libtpms="as outside: blocks of that size do not fit into a wrapped request",
        ours="what fits into a wrapped request",
        section="Part 3 §24.2",
        test="test_execute_sha1_blocks_fit_into_a_wrapped_request",
    ),
)
