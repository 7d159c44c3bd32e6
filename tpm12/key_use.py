"""The use of a key that a handler authorizes itself, because other checks come first there.

Where nothing comes first a command declares its key handle as what a session is over, and the
dispatcher does this (`Authorized.verify_declared`).
"""

from __future__ import annotations

from protocol.constants import AuthDataUsage
from protocol.return_codes import ReturnCode, TpmError
from tpm12.authorization import Authorized, key_entity
from tpm12.keys import LoadedKey


def authorize(auth: Authorized, over: str, key: LoadedKey) -> None:
    """Check the session that came for a key, if one came.

    Args:
        auth: Of the command.
        over: What the declared session is over.
        key: The key that it is to prove the use of.

    Raises:
        TpmError: AUTHFAIL, also when none came and the key needs one; as `Authorized.verify`.
    """
    if auth.has(over):
        auth.verify(over, key.usage_hmac, key_entity(key))
    elif key.auth_data_usage != AuthDataUsage.NEVER:
        raise TpmError(ReturnCode.AUTHFAIL, "this key needs an authorization session")
