"""The ring as a pure machine: pages, handshake, sequence numbers, cancel, resume, and any bytes."""

from dataclasses import replace
from uuid import UUID

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protocol import tpmif, tpmif_page
from protocol.tpmif import (
    MESSAGE_BYTES_MAX,
    PREFIX_BYTES,
    Attached,
    BackendConnected,
    BackendKeys,
    BackendRing,
    BackendWaiting,
    CancelAsked,
    Cancelled,
    Fate,
    Finished,
    FrontendReady,
    FrontendRing,
    Kind,
    PeerClosed,
    PeerClosing,
    Prefix,
    Repeat,
    Request,
    Submitted,
    kick,
    publication,
)
from protocol.tpmif_page import (
    PACKET_BYTES_MAX,
    PAGE_TRANSITIONS,
    PageHeader,
    PageState,
    RingError,
    RingMisuseError,
    page_image,
    read_page,
)
from protocol.wire import DecodeError, encode
from protocol.xenbus import Side, XenbusState

KEYS = BackendKeys(handle=0, uuid=UUID(int=0xABC), ring_id="guest1/0", memory="m1")
IDLE, SUBMIT, FINISH, CANCEL = PageState
REQUEST, RESPONSE = b"\x00\xc1request", b"\x00\xc4response"


def connect(frontend, backend, last_sequence=0, keys=KEYS):
    """Walk the handshake as Linux does and give the frontend's last event."""
    assert isinstance(frontend.receive(backend.open()), BackendWaiting)
    assert backend.receive(frontend.publish()) == FrontendReady(0)
    event = frontend.receive(backend.connect(keys, last_sequence))
    assert isinstance(backend.receive(frontend.connected()), Attached)
    assert frontend.is_attached
    assert backend.is_attached
    return event


def pair(last_sequence=0, frontend=None):
    frontend, backend = frontend or FrontendRing(0), BackendRing()
    connect(frontend, backend, last_sequence)
    return frontend, backend


# -- page and prefix


@given(st.integers(0, 2**32 - 1), *[st.integers(0, 255)] * 4)
def test_page_header_of_hot_path_equals_its_declaration(length, state, locality, pad, extra):
    declared = encode(
        PageHeader(length=length, state=state, locality=locality, pad=pad, nr_extra_pages=extra)
    )
    assert declared == tpmif_page._PAGE_HEADER.pack(length, state, locality, pad, extra)
    assert len(declared) == tpmif_page.PAGE_HEADER_BYTES == 8


@given(st.integers(0, 255), st.integers(0, 2**64 - 1))
def test_prefix_of_hot_path_equals_its_declaration(kind, sequence):
    declared = encode(Prefix(kind=kind, sequence=sequence))
    assert declared == tpmif._PREFIX.pack(kind, sequence)
    assert len(declared) == PREFIX_BYTES


@given(st.integers(0, 2**64 - 1), st.integers(0, 2**32 - 1), st.binary(min_size=4, max_size=4))
def test_message_of_hot_path_equals_its_declarations(sequence, length, rest):
    state, locality, pad, extra = rest
    page = PageHeader(length=length, state=state, locality=locality, pad=pad, nr_extra_pages=extra)
    declared = encode(Prefix(kind=2, sequence=sequence)) + encode(page)
    assert declared == tpmif._MESSAGE.pack(2, sequence, length, *rest)
    assert len(declared) == tpmif._MESSAGE_BYTES


def test_page_image_is_the_tpmif_page_byte_for_byte():
    assert page_image(SUBMIT, 2, b"abc").hex() == "0300000001020000616263"


@given(st.sampled_from(list(PageState)), st.integers(0, 255), st.binary(max_size=100))
def test_page_comes_out_as_it_went_in(state, locality, packet):
    assert read_page(b"xx" + page_image(state, locality, packet), 2) == (state, locality, packet)


def test_longest_packet_fits_and_one_byte_more_does_not():
    assert read_page(page_image(SUBMIT, 0, bytes(4088)))[2] == bytes(4088)
    with pytest.raises(RingMisuseError):
        page_image(SUBMIT, 0, bytes(4089))


@pytest.mark.parametrize("length", [0, 1, 9, 11, 4088, 4089, 2**31, 2**32 - 8, 2**32 - 1])
def test_length_that_is_not_the_packets_is_refused(length):
    image = encode(PageHeader(length=length, state=1, locality=0, pad=0, nr_extra_pages=0))
    with pytest.raises(RingError):
        read_page(image + bytes(10))


def test_packet_longer_than_the_page_is_refused_though_its_length_is_true():
    header = encode(PageHeader(length=4089, state=1, locality=0, pad=0, nr_extra_pages=0))
    with pytest.raises(RingError):
        read_page(header + bytes(4089))


@pytest.mark.parametrize(("pad", "extra"), [(1, 0), (0, 1), (0, 255)])
def test_extra_pages_and_used_padding_are_refused(pad, extra):
    header = encode(PageHeader(length=0, state=1, locality=0, pad=pad, nr_extra_pages=extra))
    with pytest.raises(RingError):
        read_page(header)


@pytest.mark.parametrize("cut", range(8))
def test_cut_page_header_is_refused(cut):
    with pytest.raises(RingError):
        read_page(page_image(IDLE)[:cut])


def test_page_table_lets_each_side_set_only_its_own_states():
    for state in PageState:
        assert PAGE_TRANSITIONS[Side.FRONTEND][state] <= {SUBMIT, CANCEL}
        assert PAGE_TRANSITIONS[Side.BACKEND][state] <= {FINISH, IDLE}


# -- handshake


def test_handshake_tells_both_sides_what_they_need():
    event = connect(FrontendRing(0), BackendRing(), last_sequence=41)
    assert event == BackendConnected(0, UUID(int=0xABC), "guest1/0", 41, Fate.NONE)


def test_frontend_that_goes_to_connected_at_once_is_taken():
    backend = BackendRing()
    backend.open()
    keys = {"feature-protocol-v2": "1", "feature-resume": "1", "handle": "3"}
    assert backend.receive(publication(XenbusState.CONNECTED, keys)) == FrontendReady(3)
    backend.connect(KEYS, 0)
    assert backend.is_attached


def test_refused_frontend_is_told_why():
    frontend, backend = FrontendRing(0), BackendRing()
    assert frontend.receive(backend.refuse("label guest_t may not")) == PeerClosed(
        "label guest_t may not"
    )


def test_frontend_refused_after_its_keys_is_told_why():
    frontend, backend = FrontendRing(0), BackendRing()
    frontend.receive(backend.open())
    backend.receive(frontend.publish())
    assert frontend.receive(backend.refuse("no device 0\x1b[2J")) == PeerClosed("no device 0?[2J")


@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"feature-protocol-v2": "2", "feature-resume": "1", "handle": "0"},
        {"feature-protocol-v2": "01", "feature-resume": "1", "handle": "0"},
        {"feature-protocol-v2": "1", "handle": "0"},
        {"feature-protocol-v2": "1", "feature-resume": "1"},
        {"feature-protocol-v2": "1", "feature-resume": "1", "handle": "-1"},
        {"feature-protocol-v2": "1", "feature-resume": "1", "handle": "00"},
        {"feature-protocol-v2": "1", "feature-resume": "1", "handle": "65536"},
        {"feature-protocol-v2": "1", "feature-resume": "1", "handle": "9" * 200},
    ],
)
def test_frontend_with_wrong_keys_is_refused(keys):
    backend = BackendRing()
    backend.open()
    with pytest.raises(RingError):
        backend.receive(publication(XenbusState.INITIALISED, keys))


GOOD_BACKEND_KEYS = {
    "feature-protocol-v2": "1",
    "feature-resume": "1",
    "handle": "0",
    "uuid": str(UUID(int=1)),
    "ring": "guest1/0",
    "memory": "m1",
    "last-sequence": "7",
}


@pytest.mark.parametrize(
    ("key", "text"),
    [
        ("feature-protocol-v2", "0"),
        ("feature-resume", "0"),
        ("handle", "x"),
        ("uuid", "not-a-uuid"),
        ("ring", ""),
        ("ring", "r" * 129),
        ("memory", ""),
        ("last-sequence", "-1"),
        ("last-sequence", str(2**63)),
        ("last-sequence", "9" * 250),
        ("last-sequence", "1e3"),
    ],
)
def test_backend_with_wrong_keys_is_refused(key, text):
    frontend = FrontendRing(0)
    frontend.receive(BackendRing().open())
    frontend.publish()
    with pytest.raises(RingError):
        frontend.receive(publication(XenbusState.CONNECTED, GOOD_BACKEND_KEYS | {key: text}))


@pytest.mark.parametrize("state", list(XenbusState))
def test_backend_that_does_not_begin_with_init_wait_or_an_end_is_refused(state):
    frontend = FrontendRing(0)
    if state in {XenbusState.INIT_WAIT, XenbusState.CLOSING, XenbusState.CLOSED}:
        assert frontend.receive(publication(state, GOOD_BACKEND_KEYS)) is not None
    else:
        with pytest.raises(DecodeError):
            frontend.receive(publication(state, GOOD_BACKEND_KEYS))


def test_frontend_closes_and_comes_back_over_the_same_connection():
    frontend, backend = pair()
    backend.receive(frontend.submit(REQUEST))
    frontend.receive(backend.finish(RESPONSE))
    assert backend.receive(frontend.closing()) == PeerClosing("")
    assert frontend.receive(backend.closing()) == PeerClosing("")
    assert backend.receive(frontend.closed()) == PeerClosed("")
    assert frontend.receive(backend.wait_again()) is None
    assert backend.receive(publication(XenbusState.INITIALISING, {})) is None
    keys = {"feature-protocol-v2": "1", "feature-resume": "1", "handle": "0"}
    assert backend.receive(publication(XenbusState.INITIALISED, keys)) == FrontendReady(0)


def test_frontend_may_close_without_closing_first():
    frontend, backend = pair()
    assert backend.receive(frontend.closed()) == PeerClosed("")
    assert frontend.receive(backend.wait_again()) is None


# -- commands


def test_request_and_response_travel_with_sequence_and_locality():
    frontend, backend = pair()
    assert backend.receive(frontend.submit(REQUEST, 2)) == Submitted(1, 2, REQUEST)
    assert backend.is_busy
    assert frontend.receive(backend.finish(RESPONSE)) == Finished(1, RESPONSE)
    assert not backend.is_busy
    assert backend.receive(frontend.submit(REQUEST)) == Submitted(2, 0, REQUEST)


def test_count_goes_on_from_where_the_backend_is():
    frontend, backend = pair(last_sequence=41)
    assert backend.receive(frontend.submit(REQUEST)) == Submitted(42, 0, REQUEST)


@pytest.mark.parametrize("side", [Side.FRONTEND, Side.BACKEND])
@pytest.mark.parametrize("on_page", list(PageState))
@pytest.mark.parametrize("new", [*PageState, 4, 255])
def test_every_page_step_is_taken_or_refused_as_the_table_says(side, on_page, new):
    """Bring the page into each state, then let a side set each state."""
    frontend, backend = pair(last_sequence=5)
    backend.receive(frontend.submit(REQUEST))
    sequence = 6
    if on_page is CANCEL:
        backend.receive(frontend.cancel())
    if on_page in {FINISH, IDLE}:
        frontend.receive(backend.finish(RESPONSE) if on_page is FINISH else backend.idle())
    is_allowed = new in PAGE_TRANSITIONS[side][on_page]
    next_sequence = sequence + (new == SUBMIT and on_page in {FINISH, IDLE})
    message = kick(next_sequence, page_image(new))
    receiver = backend if side is Side.FRONTEND else frontend
    if is_allowed:
        assert receiver.receive(message) is not None
    else:
        with pytest.raises(RingError):
            receiver.receive(message)


@pytest.mark.parametrize("sequence", [0, 4, 7, 2**63, 2**64 - 1])
def test_sequence_that_is_neither_next_nor_last_is_refused(sequence):
    _, backend = pair(last_sequence=5)
    with pytest.raises(RingError):
        backend.receive(kick(sequence, page_image(SUBMIT, 0, REQUEST)))


def test_repeat_of_nothing_is_refused():
    _, backend = pair(last_sequence=0)
    with pytest.raises(RingError):
        backend.receive(kick(0, page_image(SUBMIT, 0, REQUEST)))


def test_kick_before_the_handshake_is_refused():
    backend = BackendRing()
    backend.open()
    with pytest.raises(RingError):
        backend.receive(kick(1, page_image(SUBMIT, 0, REQUEST)))


def test_kick_after_closing_is_refused():
    frontend, backend = pair()
    backend.receive(frontend.closing())
    with pytest.raises(RingError):
        backend.receive(kick(1, page_image(SUBMIT, 0, REQUEST)))


@pytest.mark.parametrize("length", [0, 1, 8, MESSAGE_BYTES_MAX + 1])
def test_message_of_impossible_length_is_refused_by_both(length):
    for ring in pair():
        with pytest.raises(RingError):
            ring.receive(bytes([Kind.KICK]) * length)


@pytest.mark.parametrize("kind", [0, 3, 255])
def test_unknown_kind_is_refused_by_both(kind):
    for ring in pair():
        with pytest.raises(RingError):
            ring.receive(encode(Prefix(kind=kind, sequence=1)) + page_image(SUBMIT))


def test_own_mistakes_are_told_apart_from_the_peers():
    frontend, backend = pair()
    with pytest.raises(RingMisuseError):
        backend.finish(RESPONSE)
    with pytest.raises(RingMisuseError):
        frontend.resubmit()
    with pytest.raises(RingMisuseError):
        frontend.abandon()
    frontend.submit(REQUEST)
    with pytest.raises(RingMisuseError):
        frontend.submit(REQUEST)
    with pytest.raises(RingMisuseError):
        frontend.abandon()
    with pytest.raises(RingMisuseError):
        BackendRing().connect(KEYS, 0)
    with pytest.raises(RingMisuseError):
        FrontendRing(0).submit(REQUEST)


def test_submit_of_a_packet_too_long_changes_nothing():
    frontend, backend = pair()
    with pytest.raises(RingMisuseError):
        frontend.submit(bytes(PACKET_BYTES_MAX + 1))
    assert backend.receive(frontend.submit(REQUEST)) == Submitted(1, 0, REQUEST)


def test_unexpected_answers_are_refused_by_the_frontend():
    frontend, _ = pair()
    with pytest.raises(RingError):
        frontend.receive(kick(0, page_image(FINISH, 0, RESPONSE)))
    frontend, _ = pair()
    frontend.submit(REQUEST)
    with pytest.raises(RingError):
        frontend.receive(kick(2, page_image(FINISH, 0, RESPONSE)))
    with pytest.raises(RingError):
        frontend.receive(kick(1, page_image(IDLE, 0, RESPONSE)))


# -- cancel


def test_cancel_is_acknowledged_with_idle():
    frontend, backend = pair()
    backend.receive(frontend.submit(REQUEST))
    assert backend.receive(frontend.cancel()) == CancelAsked(1, is_late=False)
    assert frontend.receive(backend.idle()) == Cancelled(1)
    assert backend.receive(frontend.submit(REQUEST)) == Submitted(2, 0, REQUEST)


def test_cancel_that_came_too_late_is_answered_with_the_response():
    frontend, backend = pair()
    backend.receive(frontend.submit(REQUEST))
    backend.receive(frontend.cancel())
    assert frontend.receive(backend.finish(RESPONSE)) == Finished(1, RESPONSE)


def test_cancel_that_crosses_the_answer_is_acknowledged_and_dropped():
    frontend, backend = pair()
    backend.receive(frontend.submit(REQUEST))
    answer, cancel = backend.finish(RESPONSE), frontend.cancel()
    assert frontend.receive(answer) == Finished(1, RESPONSE)
    following = frontend.submit(REQUEST)
    assert backend.receive(cancel) == CancelAsked(1, is_late=True)
    assert frontend.receive(backend.idle()) is None
    assert backend.receive(following) == Submitted(2, 0, REQUEST)
    with pytest.raises(RingError):  # only one
        frontend.receive(kick(1, page_image(IDLE)))


def test_second_cancel_is_refused():
    frontend, backend = pair()
    backend.receive(frontend.submit(REQUEST))
    cancel = frontend.cancel()
    backend.receive(cancel)
    frontend.receive(backend.idle())
    with pytest.raises(RingError):
        backend.receive(cancel)


def test_cancel_of_another_sequence_is_refused():
    frontend, backend = pair(5)
    backend.receive(frontend.submit(REQUEST))
    with pytest.raises(RingError):
        backend.receive(kick(5, page_image(CANCEL)))


def test_cancel_of_nothing_is_not_sent_and_not_taken():
    frontend, backend = pair()
    assert frontend.cancel() is None
    with pytest.raises(RingError):
        backend.receive(kick(0, page_image(CANCEL)))


# -- resume


def test_request_that_was_executed_is_told_as_a_repeat():
    frontend, backend = pair(last_sequence=5)
    backend.receive(frontend.submit(REQUEST, 1))
    backend.finish(RESPONSE)  # and is lost on the way
    frontend.reconnect()
    backend = BackendRing()
    assert connect(frontend, backend, 6).fate is Fate.EXECUTED
    assert backend.receive(frontend.resubmit()) == Repeat(6, 1, REQUEST)
    assert frontend.receive(backend.finish(RESPONSE)) == Finished(6, RESPONSE)
    assert backend.receive(frontend.submit(REQUEST)) == Submitted(7, 0, REQUEST)


def test_request_that_was_not_executed_is_told_as_new():
    frontend, _ = pair(last_sequence=5)
    frontend.submit(REQUEST, 1)
    frontend.reconnect()
    backend = BackendRing()
    assert connect(frontend, backend, 5).fate is Fate.NOT_EXECUTED
    assert backend.receive(frontend.resubmit()) == Submitted(6, 1, REQUEST)


@pytest.mark.parametrize("last_sequence", [4, 0])
def test_request_that_a_backend_does_not_remember_is_submitted_under_the_next_number(
    last_sequence,
):
    """It crashed, and what it answered since did not change anything."""
    frontend, _ = pair(last_sequence=5)
    frontend.submit(REQUEST, 1)
    frontend.reconnect()
    backend = BackendRing()
    assert connect(frontend, backend, last_sequence).fate is Fate.NOT_EXECUTED
    submitted = backend.receive(frontend.resubmit())
    assert submitted == Submitted(last_sequence + 1, 1, REQUEST)
    assert frontend.receive(backend.finish(b"done")) == Finished(last_sequence + 1, b"done")


def answered(kept, frontend=None):
    """A frontend with answers 1 to 3, of which those in `kept` must be remembered."""
    frontend, backend = pair(frontend=frontend)
    for number in range(1, 4):
        backend.receive(frontend.submit(REQUEST))
        message = backend.finish(RESPONSE, is_kept=number in kept)
        assert frontend.receive(message) == Finished(number, RESPONSE)
    return frontend


@pytest.mark.parametrize("last_sequence", range(4))
@pytest.mark.parametrize("kept", [{}, {1}, {2}, {1, 3}, {3}])
@pytest.mark.parametrize("is_outstanding", [True, False])
def test_backend_that_remembers_less_than_it_said_it_would_is_noticed(
    kept, last_sequence, is_outstanding
):
    frontend = answered(kept)
    if is_outstanding:
        frontend.submit(REQUEST)
    for _ in range(2):  # and again by the next connection
        frontend.reconnect()
        fate = connect(frontend, BackendRing(), last_sequence).fate
        assert (fate is Fate.ROLLED_BACK) is (last_sequence < max(kept, default=0))


@pytest.mark.parametrize(("may_forget", "is_noticed"), [(True, False), (False, True)])
def test_backend_that_was_started_anew_is_noticed_by_who_must(may_forget, is_noticed):
    frontend = answered({2}, FrontendRing(0, may_forget=may_forget))
    frontend.reconnect()
    fate = connect(frontend, BackendRing(), 0, replace(KEYS, memory="another")).fate
    assert (fate is Fate.ROLLED_BACK) is is_noticed


def test_frontend_that_does_not_ask_for_it_is_not_told_what_is_kept():
    """Its driver knows one kind of kick."""
    _, backend = pair()
    keys = {"feature-protocol-v2": "1", "feature-resume": "1", "handle": "0"}
    plain = BackendRing()
    plain.open()
    plain.receive(publication(XenbusState.INITIALISED, keys))
    plain.connect(KEYS, 0)
    plain.receive(publication(XenbusState.CONNECTED, keys))
    for ring, kind in ((backend, Kind.KEPT), (plain, Kind.KICK)):
        ring.receive(kick(1, page_image(PageState.SUBMIT, 0, REQUEST)))
        assert ring.finish(RESPONSE, is_kept=True)[0] == kind


def test_answer_that_is_kept_is_no_message_of_a_frontend():
    frontend, backend = pair()
    submitted = frontend.submit(REQUEST)
    with pytest.raises(RingError):
        backend.receive(bytes([Kind.KEPT]) + submitted[1:])


def test_request_of_an_earlier_process_can_be_taken_over():
    frontend = FrontendRing(0)
    frontend.restore(KEYS.memory, Request(6, 0, REQUEST))
    backend = BackendRing()
    assert connect(frontend, backend, 6).fate is Fate.EXECUTED
    assert backend.receive(frontend.resubmit()) == Repeat(6, 0, REQUEST)
    with pytest.raises(RingMisuseError):
        frontend.restore(KEYS.memory, Request(6, 0, REQUEST))


def test_request_can_be_abandoned_when_it_was_not_executed():
    frontend, _ = pair(last_sequence=5)
    frontend.submit(REQUEST)
    frontend.reconnect()
    backend = BackendRing()
    connect(frontend, backend, 5)
    frontend.abandon()
    assert backend.receive(frontend.submit(b"other")) == Submitted(6, 0, b"other")


@pytest.mark.parametrize(("last_sequence", "memory"), [(7, "m1"), (6, "m2"), (5, "m2"), (0, "m2")])
def test_backend_that_is_out_of_step_or_lost_its_memory_is_noticed(last_sequence, memory):
    frontend, _ = pair(last_sequence=5)
    frontend.submit(REQUEST)
    frontend.reconnect()
    keys = BackendKeys(handle=0, uuid=KEYS.uuid, ring_id=KEYS.ring_id, memory=memory)
    backend = BackendRing()
    assert connect(frontend, backend, last_sequence, keys).fate is Fate.UNKNOWN
    frontend.abandon()
    assert backend.receive(frontend.submit(REQUEST)).sequence == last_sequence + 1


def test_first_request_of_a_ring_is_not_run_again_by_a_backend_without_memory():
    frontend, _ = pair(last_sequence=0)
    frontend.submit(REQUEST)
    frontend.reconnect()
    keys = BackendKeys(handle=0, uuid=KEYS.uuid, ring_id=KEYS.ring_id, memory="another")
    assert connect(frontend, BackendRing(), 0, keys).fate is Fate.UNKNOWN


def test_idle_frontend_adopts_a_backend_without_memory():
    frontend, _ = pair(last_sequence=5)
    frontend.reconnect()
    keys = BackendKeys(handle=0, uuid=KEYS.uuid, ring_id=KEYS.ring_id, memory="another")
    backend = BackendRing()
    assert connect(frontend, backend, 0, keys).fate is Fate.NONE
    assert backend.receive(frontend.submit(REQUEST)) == Submitted(1, 0, REQUEST)


# -- any bytes


def answer_as_a_server(backend, event):
    """Do what `ring_server` does, so that no peer can make our own side misuse the ring."""
    if isinstance(event, FrontendReady):
        backend.connect(KEYS, 3)
    elif isinstance(event, Submitted | Repeat):
        backend.finish(RESPONSE)
    elif isinstance(event, CancelAsked):
        backend.idle()
    elif isinstance(event, PeerClosing):
        backend.closing()
    elif isinstance(event, PeerClosed):
        backend.wait_again()


PAGES = st.builds(
    page_image,
    st.sampled_from(list(PageState)),
    st.integers(0, 255),
    st.binary(max_size=6),
)
KEY_SETS = st.sampled_from([{}, GOOD_BACKEND_KEYS, {"error": "x"}])
MESSAGES = st.one_of(
    st.binary(max_size=40),
    st.builds(kick, st.integers(0, 8), PAGES),
    st.builds(kick, st.integers(0, 8), st.binary(max_size=20)),
    st.builds(publication, st.sampled_from(list(XenbusState)), KEY_SETS),
    st.builds(
        lambda kind, sequence, rest: encode(Prefix(kind=kind, sequence=sequence)) + rest,
        st.integers(0, 3),
        st.integers(0, 2**64 - 1),
        st.binary(max_size=30),
    ),
)


@settings(max_examples=400)
@given(st.booleans(), st.lists(MESSAGES, max_size=12))
def test_any_messages_to_a_backend_give_events_or_one_named_error(is_connected, messages):
    backend = BackendRing()
    if is_connected:
        connect(FrontendRing(0), backend, 3)
    else:
        backend.open()
    for message in messages:
        try:
            event = backend.receive(message)
        except DecodeError:
            return
        is_connected = is_connected or backend.is_attached
        if isinstance(event, PeerClosing | PeerClosed) and not is_connected:
            return  # before the ring was attached this ends the connection
        answer_as_a_server(backend, event)


@settings(max_examples=400)
@given(st.booleans(), st.lists(MESSAGES, max_size=12))
def test_any_messages_to_a_frontend_give_events_or_one_named_error(is_connected, messages):
    frontend = FrontendRing(0)
    if is_connected:
        connect(frontend, BackendRing(), 3)
        frontend.submit(REQUEST)
    for message in messages:
        try:
            event = frontend.receive(message)
        except DecodeError:
            return
        if isinstance(event, BackendWaiting):
            frontend.publish()
        elif isinstance(event, BackendConnected):
            frontend.connected()
        elif isinstance(event, PeerClosing | PeerClosed):
            return  # the client drops the connection
        elif isinstance(event, Finished | Cancelled):
            frontend.submit(REQUEST)


# -- the remaining refusals, so that each line has been seen to refuse


def test_own_steps_out_of_order_are_misuse():
    frontend, backend = pair()
    with pytest.raises(RingMisuseError):
        backend.connect(KEYS, 2**63)
    with pytest.raises(RingMisuseError):
        frontend.publish()
    backend = BackendRing()
    backend.open()
    with pytest.raises(RingMisuseError):
        backend.open()
    frontend, _ = pair()
    with pytest.raises(RingMisuseError):
        frontend.connected()
    frontend, _ = pair()
    frontend.submit(REQUEST)
    with pytest.raises(RingMisuseError):
        frontend.resubmit()


def test_sequence_numbers_end_with_a_refusal_not_a_wrap():
    frontend, _ = pair(last_sequence=tpmif.SEQUENCE_MAX)
    with pytest.raises(RingError, match="used up"):
        frontend.submit(REQUEST)


def test_frontend_that_publishes_twice_is_refused():
    frontend, backend = FrontendRing(0), BackendRing()
    frontend.receive(backend.open())
    backend.receive(frontend.publish())
    with pytest.raises(RingError):
        backend.receive(frontend.connected())


def test_answer_before_the_handshake_is_refused():
    frontend = FrontendRing(0)
    with pytest.raises(RingError):
        frontend.receive(kick(1, page_image(FINISH, 0, RESPONSE)))


def test_backend_that_connects_before_the_frontend_is_ready_is_refused():
    frontend = FrontendRing(0)
    frontend.receive(BackendRing().open())
    with pytest.raises(RingError):
        frontend.receive(publication(XenbusState.CONNECTED, GOOD_BACKEND_KEYS))


def test_backend_that_lets_go_of_a_connected_frontend_is_refused():
    frontend, backend = pair()
    with pytest.raises(RingError):
        frontend.receive(backend.wait_again())
