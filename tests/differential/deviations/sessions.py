"""Where libtpms and we differ: sessions, changes of secrets, delegation.

TPM Main r116 Part 3, chapters 17 to 19.
"""

from tests.differential.deviations.deviation import Deviation

DEVIATIONS: tuple[Deviation, ...] = (
    Deviation(
        name="sessions without an owner",
        commands=("OSAP",),
        libtpms="NOSRK",
        ours="open: an NV area or a counter has a secret of its own",
        section="Part 3 §18.2",
        steps=("unowned: OSAP *",),
    ),
    Deviation(
        name="one session for two authorizations",
        commands=(
            "ChangeAuth",
            "Unseal",
            "CertifyKey",
            "CertifyKey2",
            "CreateMigrationBlob",
            "MakeIdentity",
            "ActivateIdentity",
        ),
        libtpms="takes it for both, and the response's two new nonces leave it with the second; "
        "TPM_ChangeAuth looks at the operands before it refuses",
        ours="INVALID_AUTHHANDLE, whatever the operands are: one use spends a session's nonceEven, "
        "so such a request has no second session",
        section="Part 1 §22",
        steps=("owned: ChangeAuth 2", "one session twice: * twice"),
    ),
    Deviation(
        name="a new secret of a delegation under OIAP",
        commands=("Delegate_CreateKeyDelegation",),
        libtpms="BAD_MODE",
        ours="INVALID_AUTHHANDLE",
        section="Part 3 §19.2, action 5",
        steps=("tests of delegation: test_oiap_session_masks_no_secret",),
    ),
    Deviation(
        name="lengths inside a delegation",
        commands=("Delegate_LoadOwnerDelegation", "Delegate_VerifyDelegation"),
        libtpms="blobSize is not compared with the blob, bytes behind one are ignored; a length "
        "that is too large is SIZE or INVALID_PCR_INFO",
        ours="BAD_PARAM_SIZE for what is no whole structure of the size that is said, before "
        "anything is done with it; what is one and was changed is AUTHFAIL",
        section="Part 3 §19.4, incoming operands (blobSize); §19.7, actions 1 and 8",
        steps=(
            "tests of delegation: test_load_refuses",
            "tests of delegation: test_verify_refuses",
            "tests of delegation: test_every_flipped_byte_of_a_delegation_is_refused",
        ),
    ),
    Deviation(
        name="delegations that end libtpms",
        commands=("Delegate_LoadOwnerDelegation", "Delegate_UpdateVerification"),
        libtpms="a row or family that is not there ends the process",
        ours="BADINDEX, AUTHFAIL",
        section="Part 3 §19.4, §19.6",
        steps=(
            "tests of delegation: test_unowned_load_refuses",
            "tests of delegation: test_update_refuses",
        ),
    ),
    Deviation(
        name="enabling or locking a family with neither TRUE nor FALSE",
        commands=("Delegate_Manage",),
        libtpms="any byte but 0 is TRUE",
        ours="BAD_PARAMETER",
        section="Part 2 §2.2.4",
        steps=("delegation: enable b'\\x02'", "lists: lock b'\\x02'"),
    ),
    Deviation(
        name="bytes behind a delegate row's number",
        commands=("DSAP",),
        libtpms="not looked at",
        ours="BAD_PARAM_SIZE",
        section="Part 3 §18.3",
        steps=("delegation: DSAP 8 blob", "delegation: DSAP 8 altered"),
    ),
    Deviation(
        name="a delegated session under AES",
        commands=("DSAP",),
        libtpms="takes the blob for a row of the table: the process ends",
        ours="open",
        section="Part 3 §18.3",
        steps=("tests of delegation: test_secret_may_come_under_aes_from_a_delegate",),
    ),
    Deviation(
        name="a key that is said to be sealed data",
        commands=("ChangeAuth",),
        libtpms="re-encrypted as if it were",
        ours="INVALID_STRUCTURE",
        section="Part 3 §17.1",
        steps=("new secrets: change key as data",),
    ),
    Deviation(
        name="family of the owner pointer",
        commands=("Delegate_Manage",),
        libtpms="wants the family of a DSAP session from any session: DELEGATE_FAMILY",
        ours="the family of the delegation in that row; the owner's own sessions have none",
        section="Part 3 §19.1, action 6b",
        steps=(
            "tests of delegation: test_changes_set_the_owner_pointer_back",
            "tests of delegation: test_delegate_by_owner_pointer_manages_its_own_family_only",
            "tests of delegation: test_owners_own_session_is_not_bound_by_the_owner_pointer",
        ),
    ),
    Deviation(
        name="order of the families",
        commands=("Delegate_ReadTable",),
        libtpms="by the slot of each family",
        ours="ascending",
        section="Part 3 §19.5",
        steps=("lists: table with the third",),
    ),
)
