"""Where libtpms and we differ: ticks, transport sessions, counters.

TPM Main r116 Part 3, chapters 23 to 25.
"""

from tests.differential.deviations.deviation import Deviation

DEVIATIONS: tuple[Deviation, ...] = (
    Deviation(
        name="what is no command inside a transport session",
        commands=("ExecuteTransport",),
        libtpms="BAD_ORDINAL or BAD_PARAM_SIZE for the outer command",
        ours="BAD_PARAMETER: wrappedCmd cannot be parsed",
        section="Part 3 §24.2",
        steps=(
            "transport: * wraps e6",
            "transport: unknown inside",
            "wrapped frames: wrapped, no ordinal",
            "wrapped frames: wrapped, nothing",
            "wrapped frames: wrapped, cut handle",
            "wrapped frames: wrapped, cut session",
            "bent commands: wrapped, end of the session",
        ),
    ),
    Deviation(
        name="a wrapped command that ends before its resource type",
        commands=("ExecuteTransport",),
        libtpms="BAD_PARAM_SIZE for the outer command, which ends the session",
        ours="BAD_PARAM_SIZE in the wrapped response: handles of keys are for the log only",
        section="Part 3 §24.2, actions 3 and 10",
        steps=(
            "wrapped frames: wrapped, cut kind of resource",
            "bent commands: wrapped, cut handle in the log",
        ),
    ),
    Deviation(
        name="commands inside a transport session that there are not",
        commands=("ExecuteTransport",),
        libtpms="BAD_ORDINAL in the wrapped response for those that it has a name for",
        ours="BAD_PARAMETER for all: wrappedCmd cannot be parsed",
        section="Part 3 §24.2",
        steps=("bent commands: wrapped, deleted command",),
    ),
    Deviation(
        name="handles of TPM_ReleaseTransportSigned inside a transport session",
        commands=("ExecuteTransport",),
        libtpms="none, so that who leaves the key's out of H1 gets AUTH2FAIL",
        ours="one, and NO_WRAP_TRANSPORT",
        section="Part 3 §24.2, action 2; §24.3, incoming operands",
        steps=("bent commands: wrapped, end of the session, whole",),
    ),
    Deviation(
        name="bytes behind a TPM_TRANSPORT_AUTH",
        commands=("EstablishTransport",),
        libtpms="not looked at",
        ours="BAD_PARAM_SIZE",
        section="Part 3 §24.1, action 2 d",
        steps=("wrapped frames: secret, byte behind",),
    ),
    Deviation(
        name="the log and a key that may not be used now",
        commands=("ExecuteTransport",),
        libtpms="WRONGPCRVAL for the outer command, which ends the session",
        ours="WRONGPCRVAL in the wrapped response: the log wants a loaded key and no more",
        section="Part 3 §24.2, action 10 g",
        steps=("logged keys: * bound 2",),
    ),
    Deviation(
        name="handles of TPM_ChangeAuthAsymFinish",
        commands=("ExecuteTransport",),
        libtpms="outside a transport session it has two; inside, the second is a parameter: hashed "
        "and encrypted, and not in the log",
        ours="two",
        section="Part 3 §27.4.2, incoming operands; §24.2, action 2",
        steps=("wrapped asymmetric change: finish *",),
    ),
    Deviation(
        name="wrong HMAC of a transport session",
        commands=("ExecuteTransport",),
        libtpms="AUTH2FAIL",
        ours="AUTHFAIL",
        section="Part 3 §24.2",
        steps=("transport: wrong HMAC",),
    ),
    Deviation(
        name="an OSAP session of another counter",
        commands=("IncrementCounter",),
        libtpms="opens a counter with the same secret, when the TPM has been started since",
        ours="AUTHFAIL",
        section="Part 3 §18.2",
        steps=("counters after a start: the other's, after a start",),
    ),
    Deviation(
        name="ticks",
        commands=("GetTicks",),
        libtpms="from the wall clock; a step back is failure mode",
        ours="from a monotonic clock",
        section="Part 3 §23.1",
        test="test_ticks_hold_for_longer_than_32_bits",
    ),
)
