"""Where libtpms and we differ: migration and maintenance.

TPM Main r116 Part 3, chapters 11 and 12.
"""

from tests.differential.deviations.deviation import Deviation

_MAINTENANCE = (
    "CreateMaintenanceArchive",
    "LoadMaintenanceArchive",
    "KillMaintenanceFeature",
    "LoadManuMaintPub",
    "ReadManuMaintPub",
)

DEVIATIONS: tuple[Deviation, ...] = (
    Deviation(
        name="maintenance",
        commands=_MAINTENANCE,
        libtpms="not built: BAD_ORDINAL",
        ours="there, and optional as in the specification",
        section="Part 3 §12",
        steps=tuple(f"*: {name} *" for name in _MAINTENANCE),
    ),
    Deviation(
        name="a plain migratable key that comes as a certified one",
        commands=("CMK_ConvertMigration",),
        libtpms="AUTHFAIL",
        ours="INVALID_STRUCTURE",
        section="Part 3 §11.10",
        steps=("certified keys: come plain",),
    ),
    Deviation(
        name="order of TPM_CMK_CreateTicket",
        commands=("CMK_CreateTicket",),
        libtpms="looks at the key before it looks at the owner's proof",
        ours="the owner first, as the actions are numbered",
        section="Part 3 §11.8",
        steps=(
            "tests of migration_cmk: test_create_ticket_checks_in_the_order_of_the_specification",
        ),
    ),
    Deviation(
        name="what is no key in a migration",
        commands=("CreateMigrationBlob",),
        libtpms="the second session is proven against whatever stands there: AUTH2FAIL",
        ours="INVALID_STRUCTURE",
        section="Part 3 §11.1",
        steps=("tests of migration: test_create_migration_blob_of_what_is_no_key_*",),
    ),
    Deviation(
        name="parameters of a public key",
        commands=(
            "AuthorizeMigrationKey",
            "CreateMigrationBlob",
            "CMK_CreateTicket",
            "KeyControlOwner",
        ),
        libtpms="read with the request: BAD_PARAM_SIZE or BAD_KEY_PROPERTY before anything else",
        ours="bytes of a length until they are needed: a changed ticket is AUTHFAIL, a key that is "
        "not the loaded one BAD_PARAMETER, and what is no parameters BAD_KEY_PROPERTY",
        section="Part 2 §10.1, §10.5; Part 3 §11.1, §21.1",
        steps=(
            "bent public keys: send algorithm",
            "bent public keys: keep algorithm",
            "bent public keys: * exponent",
        ),
    ),
    Deviation(
        name="a destination of another size than it says",
        commands=("AuthorizeMigrationKey",),
        libtpms="authorized: what is said is enough, and the modulus is not looked at",
        ours="BAD_KEY_PROPERTY: keyLength is not that of the modulus",
        section="Part 2 §10.1.1",
        steps=("bent public keys: authorize bits",),
    ),
    Deviation(
        name="a migration block that holds no key",
        commands=("ConvertMigrationBlob",),
        libtpms="the length of the private key is not looked at; the code of the field at which "
        "reading ends",
        ours="INVALID_STRUCTURE",
        section="Part 3 §11.2",
        steps=("bent public keys: arrived, *",),
    ),
    Deviation(
        name="the scheme that the owner authorized",
        commands=("CreateMigrationBlob", "CMK_CreateBlob"),
        libtpms="ignored: an authorization for one scheme serves another",
        ours="BAD_MODE when it is not the one that is asked for",
        section="Part 3 §11.1, §11.9",
        steps=(
            "migration: blob [34] [12] key",
            "tests of migration_cmk: test_cmk_create_blob_other_scheme_than_authorized_is_bad_mode",
        ),
    ),
    Deviation(
        name="a destination that nobody can decrypt for",
        commands=("MigrateKey",),
        libtpms="encrypts under an exponent of 0 or 2, and the key is lost",
        ours="ENCRYPT_ERROR",
        section="Part 3 §11.4",
        steps=("tests of migration: test_migrate_key_to_what_has_no_inverse*",),
    ),
)
