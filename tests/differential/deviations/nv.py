"""Where libtpms and we differ: NV memory.

TPM Main r116 Part 3, chapter 20.
"""

from tests.differential.deviations.deviation import Deviation

DEVIATIONS: tuple[Deviation, ...] = (
    Deviation(
        name="a PCR selection that ends too early",
        commands=("NV_DefineSpace", "Quote", "Quote2", "PCR_Reset", "CreateWrapKey"),
        libtpms="INVALID_PCR_INFO for a sizeOfSelect that is too large, also without the bytes",
        ours="INVALID_PCR_INFO where they are there, else BAD_PARAM_SIZE: this is no structure",
        section="Part 2 §8.1",
        steps=("sizes: select beyond, *",),
    ),
    Deviation(
        name="NV areas before TPM_Startup",
        commands=("NV_DefineSpace",),
        libtpms="defined without a start",
        ours="INVALID_POSTINIT: TPM_Startup is the only command then",
        section="Part 3 §3.1",
        steps=("before start-up: NV_DefineSpace *",),
    ),
    Deviation(
        name="write protection by locality",
        commands=("NV_DefineSpace",),
        libtpms="looks at the localities of pcrInfoRead",
        ours="looks at those of pcrInfoWrite",
        section="Part 3 §20.1",
        steps=("nv definitions: define limited *",),
    ),
    Deviation(
        name="no room in NV memory",
        commands=("NV_DefineSpace",),
        libtpms="SIZE, from its allocator",
        ours="NOSPACE",
        section="Part 3 §20.1",
        steps=("nv definitions: define much",),
    ),
    Deviation(
        name="NV offset plus size",
        commands=("NV_ReadValue", "NV_WriteValue", "NV_ReadValueAuth", "NV_WriteValueAuth"),
        libtpms="added in 32 bits: a read past the area ends the process",
        ours="wide arithmetic, NOSPACE",
        section="Part 3 §20.2, §20.4",
        test="test_past_the_end_is_nospace",
    ),
    Deviation(
        name="a redefinition that is refused",
        commands=("NV_DefineSpace",),
        libtpms="has deleted the old area; 0.9.2 then enters failure mode",
        ours="the old area stays",
        section="Part 3 §20.1",
        test="test_define_again_that_fails_leaves_the_old_area",
    ),
    Deviation(
        name="limit on NV writes without authorization",
        commands=("NV_WriteValue",),
        libtpms="also while there is an owner",
        ours="before there is an owner",
        section="Part 3 §20.2",
        test="test_with_an_owner_nothing_is_counted",
    ),
    Deviation(
        name="an OSAP session of one fresh NV area",
        commands=("NV_ReadValueAuth", "NV_WriteValueAuth"),
        libtpms="opens another area with the same secret",
        ours="AUTHFAIL",
        section="Part 3 §18.2",
        test="test_osap_session_of_an_area_does_not_open_another_with_the_same_secret",
    ),
    Deviation(
        name="NV indices of general-purpose pins",
        commands=("NV_DefineSpace",),
        libtpms="an ordinary area",
        ours="BADINDEX: there are no pins",
        section="Part 2 §19.1",
        test="test_define_of_an_index_that_is_not_served",
    ),
)
