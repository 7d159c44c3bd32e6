"""Where libtpms and we differ: commands of 1.1 age.

TPM Main r116 Part 3, chapter 27.
"""

from tests.differential.deviations.deviation import Deviation

DEVIATIONS: tuple[Deviation, ...] = (
    Deviation(
        name="owner commands without an owner",
        commands=(
            "DirWriteAuth",
            "NV_DefineSpace",
            "NV_WriteValue",
            "NV_ReadValue",
            "SetCapability",
        ),
        libtpms="looks at the session first: BADTAG, INVALID_AUTHHANDLE, AUTHFAIL",
        ours="NOSRK",
        section="Part 3 §7.2, §20.1, §20.2, §20.4, §27.3.1",
        steps=(
            "unowned: DirWriteAuth *",
            "unowned: NV_WriteValue 1",
            "unowned: NV_DefineSpace 1",
            "DIR of nobody: * as the owner",
            "tests of capability: test_set_capability_with_a_session_but_no_owner_is_nosrk",
        ),
    ),
    Deviation(
        name="eviction without an owner",
        commands=("EvictKey",),
        libtpms="NOSRK",
        ours="allowed: it has nothing to do with an owner",
        section="Part 3 §27.1.1",
        steps=("unowned: EvictKey *",),
    ),
    Deviation(
        name="parentPCRStatus of a key for new secrets",
        commands=("ChangeAuthAsymStart",),
        libtpms="TRUE in certifyInfo; the signature is over that",
        ours="FALSE, as the field's description demands",
        section="Part 3 §27.4.1",
        steps=(
            "asymmetric change: start good",
            "wrapped asymmetric change: start",
            "FIPS keys: new secrets by 1024",
        ),
    ),
    Deviation(
        name="no slot for an old context of a key",
        commands=("LoadKeyContext",),
        libtpms="RESOURCES",
        ours="NOSPACE, as for every other key that finds no slot",
        section="Part 3 §27.2.2",
        steps=("full: load an old context",),
    ),
    Deviation(
        name="old context of a key that the owner keeps",
        commands=("SaveKeyContext",),
        libtpms="saved, and the key is gone",
        ours="OWNER_CONTROL, as TPM_SaveContext has it: only the owner lets it go",
        section="Part 3 §21.1, §21.2",
        steps=("full: save what is kept",),
    ),
    Deviation(
        name="contexts of 1.1 and of 1.2",
        commands=("LoadKeyContext", "LoadAuthContext", "LoadContext"),
        libtpms="each loads what the other saved",
        ours="BADCONTEXT: TPM_Reset ends what the commands of 1.1 saved, and nothing else",
        section="Part 3 §27.2, §27.5",
        steps=("tests of context: test_legacy_and_new_contexts_do_not_mix",),
    ),
)
