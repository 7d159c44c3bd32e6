"""Where libtpms and we differ: saved contexts and eviction.

TPM Main r116 Part 3, chapters 21 and 22.
"""

from tests.differential.deviations.deviation import Deviation

DEVIATIONS: tuple[Deviation, ...] = (
    Deviation(
        name="what no TPM saved",
        commands=("LoadContext",),
        libtpms="DECRYPT_ERROR where nothing can be decrypted",
        ours="BADCONTEXT for everything that is no context of this TPM",
        section="Part 3 §21.3",
        steps=(
            "owned: LoadContext 0",
            "locked out: LoadContext 0",
            "bent blobs: context of another kind",
            "tests of context: test_every_flipped_byte_is_refused",
        ),
    ),
    Deviation(
        name="a context that finds no slot",
        commands=("LoadContext",),
        libtpms="is spent: BADCONTEXT when it is loaded again",
        ours="is good for the next try, for a command that fails changes nothing",
        section="Part 3 §21.3, actions 9 and 10",
        steps=("tests of context: test_failed_load_leaves_the_context_good",),
    ),
    Deviation(
        name="the SRK's handle for a saved session of the SRK",
        commands=("LoadContext",),
        libtpms="must be given where the session was opened by TPM_ET_KEYHANDLE, and need not "
        "where it was by TPM_ET_SRK",
        ours="need not be given: there is one SRK, which is always loaded",
        section="Part 3 §21.3, action 5 a ii (2)",
        steps=("tests of context: test_srk_is_always_there*",),
    ),
    Deviation(
        name="saved sessions of what has changed",
        commands=("LoadContext", "LoadAuthContext"),
        libtpms="come back after the SRK's secret, the owner's delegations or an NV area have "
        "changed",
        ours="RESOURCEMISSING for what is no longer what it was bound to, BADCONTEXT for what was "
        "ended with the sessions in the TPM",
        section="Part 3 §17.2, action 8; §19.1; §21.3, action 5 a ii (1)",
        steps=(
            "tests of context: test_session_of_the_srk_ends_with_its_secret",
            "tests of context: test_saved_*",
            "tests of context: test_session_of_an_area_needs_that_area",
            "tests of context: test_what_ends_delegated_sessions_ends_saved_ones*",
        ),
    ),
    Deviation(
        name="saved sessions and TPM_Reset",
        commands=("LoadContext",),
        libtpms="BADCONTEXT: TPM_Reset ends saved sessions, too",
        ours="come back: what TPM_SaveContext saved must not be affected by TPM_Reset",
        section="Part 3 §27.5, action 1 b",
        steps=("contexts: a session after TPM_Reset",),
    ),
    Deviation(
        name="flushing a DAA session that is not there",
        commands=("FlushSpecific",),
        libtpms="BAD_HANDLE",
        ours="BAD_PARAMETER",
        section="Part 3 §22.1",
        steps=("sessions: flush 8 of nothing",),
    ),
    Deviation(
        name="loading a context where its handle is taken",
        commands=("LoadContext",),
        libtpms="refuses, and throws out the key that has the handle",
        ours="refuses, and leaves that key alone",
        section="Part 3 §21.3",
        steps=("contexts: evict",),
    ),
    Deviation(
        name="size of a context",
        commands=("LoadContext",),
        libtpms="loaded though contextSize says more than there is",
        ours="BAD_PARAM_SIZE",
        section="Part 3 §21.3, incoming operands (contextSize)",
        steps=("bent blobs: context of a longer size",),
    ),
)
