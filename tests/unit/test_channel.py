"""Messages between host and worker."""

from __future__ import annotations

import json
import os
import socket
import struct
import threading
import tracemalloc
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from parallel.wire.channel import LONGEST, Channel, ChannelBlocked, ChannelClosed, ChannelGarbled

Pair = tuple[Channel, Channel]


@pytest.fixture
def pair() -> Iterator[Pair]:
    ends = tuple(Channel(end) for end in socket.socketpair())
    yield ends  # type: ignore[misc]
    for end in ends:
        end.close()


def file_with(content: bytes) -> int:
    fd = os.memfd_create("test")
    os.write(fd, content)
    return fd


def content_of(fd: int) -> bytes:
    content = os.pread(fd, 1000, 0)
    os.close(fd)
    return content


def test_messages_arrive_whole_and_in_order(pair: Pair):
    host, worker = pair
    messages = [{"op": "step", "numbers": [1, 2.5, None, True], "text": "σ → 0"}, {}, {"nested": {"a": [[]]}}]
    for message in messages:
        host.send(message)
    assert [worker.receive() for _ in messages] == [(message, []) for message in messages]


def test_both_ends_may_talk(pair: Pair):
    host, worker = pair
    host.send({"id": 1})
    worker.send({"id": 2})
    assert (worker.receive()[0], host.receive()[0]) == ({"id": 1}, {"id": 2})


def test_a_message_larger_than_the_socket_buffer(pair: Pair):
    host, worker = pair
    fd = file_with(b"big")
    big = {"text": "x" * 5_000_000}
    with ThreadPoolExecutor(1) as pool:
        sending = pool.submit(host.send, big, (fd,))  # blocks until the other end reads
        message, fds = worker.receive()
        sending.result(timeout=10)
    assert message == big
    assert [content_of(received) for received in fds] == [b"big"]
    os.close(fd)
    host.send({"after": 1})
    assert worker.receive() == ({"after": 1}, [])


def test_descriptors_stay_with_their_message(pair: Pair):
    host, worker = pair
    first, second, third = (file_with(content) for content in (b"first", b"second", b"third"))
    host.send({"id": 0})
    host.send({"id": 1}, (first,))
    host.send({"id": 2})
    host.send({"id": 3}, (second, third))
    for fd in (first, second, third):
        os.close(fd)  # the receiver has duplicates of its own
    received = [worker.receive() for _ in range(4)]
    assert [message["id"] for message, _ in received] == [0, 1, 2, 3]
    assert [[content_of(fd) for fd in fds] for _, fds in received] == [[], [b"first"], [], [b"second", b"third"]]


def test_threads_do_not_mix_their_messages(pair: Pair):
    host, worker = pair
    senders = [
        threading.Thread(target=lambda n=n: [host.send({"from": n, "pad": "x" * 20_000}) for _ in range(20)])
        for n in range(4)
    ]
    for sender in senders:
        sender.start()
    received = [worker.receive()[0] for _ in range(80)]
    for sender in senders:
        sender.join()
    assert sorted(message["from"] for message in received) == sorted([0, 1, 2, 3] * 20)
    assert all(message["pad"] == "x" * 20_000 for message in received)


def test_a_closed_end_is_noticed_by_both_calls(pair: Pair):
    host, worker = pair
    worker.close()
    with pytest.raises(ChannelClosed):
        host.receive()
    with pytest.raises(ChannelClosed):
        host.send({"op": "step"})


def test_what_was_sent_before_the_end_closed_is_still_read(pair: Pair):
    host, worker = pair
    worker.send({"id": 1})
    worker.close()
    assert host.receive() == ({"id": 1}, [])
    with pytest.raises(ChannelClosed):
        host.receive()


def test_an_end_that_closes_in_the_middle_of_a_message():
    ours, theirs = socket.socketpair()
    channel = Channel(ours)
    theirs.sendall(b"\x00\x00\x00\x10\x00" + b'{"id":')  # announces 16 bytes, sends 6
    theirs.close()
    with pytest.raises(ChannelClosed):
        channel.receive()
    channel.close()


def test_a_waiting_receiver_wakes_when_the_other_end_closes(pair: Pair):
    host, worker = pair
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(host.receive)
        worker.close()
        with pytest.raises(ChannelClosed):
            waiting.result(timeout=60)


def test_only_plain_data_can_be_sent(pair: Pair):
    host, worker = pair
    with pytest.raises(ValueError):
        host.send({"x": float("nan")})
    with pytest.raises(TypeError):
        host.send({"x": object()})
    host.send({"x": 1})  # nothing of the refused ones has been sent
    assert worker.receive() == ({"x": 1}, [])


def test_a_receiver_that_reads_nothing_does_not_hold_the_sender_for_ever():
    ours, theirs = socket.socketpair()
    with theirs:
        channel = Channel(ours, send_timeout_s=0.1)
        with pytest.raises(ChannelBlocked):
            channel.send({"padding": " " * (8 << 20)})
        channel.close()


def test_a_time_limit_of_sending_is_none_of_receiving():
    ours, theirs = socket.socketpair()
    channel, other = Channel(ours, send_timeout_s=0.01), Channel(theirs)
    late = threading.Timer(0.2, lambda: other.send({"late": True}))
    late.start()
    assert channel.receive() == ({"late": True}, [])
    channel.close()
    other.close()


# --- what is no message -----------------------------------------------------------------------------------------------


def frame(text: bytes, descriptors: int = 0, length: int | None = None) -> bytes:
    return struct.pack("!IB", len(text) if length is None else length, descriptors) + text


def open_descriptors() -> set[str]:
    """What they are of."""
    links = [f"/proc/self/fd/{name}" for name in os.listdir("/proc/self/fd")]
    return {os.readlink(link) for link in links if os.path.lexists(link)}  # that of the listing itself has gone


@pytest.fixture
def raw() -> Iterator[tuple[socket.socket, Channel]]:
    """The other end, and a channel that gives a begun message 0.2 s."""
    theirs, ours = socket.socketpair()
    channel = Channel(ours, receive_timeout_s=0.2)
    with theirs:
        yield theirs, channel
    channel.close()


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        (b"", "no JSON"),
        (b"no json", "no JSON"),
        (b"\xff\xfe{}", "no JSON"),
        ("{}".encode("utf-16"), "no JSON"),
        (b"[]", "no JSON object"),
        (b"3", "no JSON object"),
        (b"null", "no JSON object"),
        (b'{"x": NaN}', "NaN is not finite"),
        (b'{"x": -Infinity}', "-Infinity is not finite"),
        (b'{"x": 1e999}', "1e999 is not finite"),
        (b'{"x": ' + b"9" * 5000 + b"}", "no JSON"),
        (b'{"x": ' + b"[" * 200_000 + b"]" * 200_000 + b"}", "recursion"),
        (b'{"x": 1} {"y": 2}', "no JSON"),
    ],
    ids=lambda value: repr(value)[:20],
)
def test_what_is_no_message_is_refused_by_name(raw: tuple[socket.socket, Channel], text: bytes, complaint: str):
    theirs, channel = raw
    with ThreadPoolExecutor(1) as pool:
        sending = pool.submit(theirs.sendall, frame(text) + frame(b"{}"))
        with pytest.raises(ChannelGarbled, match=complaint):
            channel.receive()
        sending.result(timeout=10)
    with pytest.raises(ChannelGarbled, match=complaint):  # where the next message begins nobody knows
        channel.receive()


def test_the_longest_message_is_refused_before_it_takes_memory(raw: tuple[socket.socket, Channel]):
    theirs, channel = raw
    theirs.sendall(frame(b"{", length=LONGEST + 1))
    tracemalloc.start()
    with pytest.raises(ChannelGarbled, match=f"{LONGEST + 1} bytes is announced"):
        channel.receive()
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()


def test_an_announced_length_takes_no_memory_before_the_bytes_arrive(raw: tuple[socket.socket, Channel]):
    theirs, channel = raw
    theirs.sendall(frame(b'{"x":', length=LONGEST))
    tracemalloc.start()
    with pytest.raises(ChannelGarbled, match=r"did not come within 0\.2 s"):
        channel.receive()
    assert tracemalloc.get_traced_memory()[1] < 4 << 20
    tracemalloc.stop()


def test_a_message_that_is_too_long_is_not_sent(pair: Pair, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("parallel.wire.channel.LONGEST", 100)
    host, worker = pair
    with pytest.raises(ValueError, match="the longest may have 100"):
        host.send({"text": "x" * 100})
    host.send({"text": "y"})
    assert worker.receive() == ({"text": "y"}, [])


@pytest.mark.parametrize("part", [b"\x00", b"\x00\x00\x00\x09", frame(b'{"a":', length=9)], ids=["1", "4", "text"])
def test_the_rest_of_a_message_is_not_waited_for_for_ever(raw: tuple[socket.socket, Channel], part: bytes):
    theirs, channel = raw
    theirs.sendall(part)
    with pytest.raises(ChannelGarbled, match=r"did not come within 0\.2 s"):
        channel.receive()


def test_the_first_byte_of_a_message_has_all_the_time(raw: tuple[socket.socket, Channel]):
    theirs, channel = raw
    late = threading.Timer(0.5, theirs.sendall, (frame(b'{"late": true}'),))
    late.start()
    assert channel.receive() == ({"late": True}, [])


@pytest.mark.parametrize(
    ("announced", "sent"), [(0, 1), (1, 0), (2, 1), (255, 3), (16, 20)], ids=lambda count: str(count)
)
def test_descriptors_of_a_garbled_message_are_closed(raw: tuple[socket.socket, Channel], announced: int, sent: int):
    theirs, channel = raw
    files = [os.memfd_create("garbled") for _ in range(sent)]
    socket.send_fds(theirs, [frame(b"{}", announced)], files)
    for file in files:
        os.close(file)
    with pytest.raises(ChannelGarbled, match="descriptors"):
        channel.receive()
    assert not any("garbled" in name for name in open_descriptors())


@pytest.mark.parametrize("text", [b"no json", b'{"begun": '], ids=["garbled", "torn"])
def test_no_descriptor_is_left_of_what_is_no_message(raw: tuple[socket.socket, Channel], text: bytes):
    theirs, channel = raw
    file = os.memfd_create("garbled")
    socket.send_fds(theirs, [frame(text, 1, length=10 if text.startswith(b"{") else None)], [file])
    os.close(file)
    theirs.shutdown(socket.SHUT_WR)
    with pytest.raises(ChannelClosed):
        channel.receive()
    assert not any("garbled" in name for name in open_descriptors())


def test_descriptors_that_ride_behind_the_header_are_refused(raw: tuple[socket.socket, Channel]):
    theirs, channel = raw
    file = os.memfd_create("garbled")
    whole = frame(b"{}", 1)
    theirs.sendall(whole[:5])
    socket.send_fds(theirs, [whole[5:]], [file, file])
    os.close(file)
    with pytest.raises(ChannelGarbled, match="1 descriptors are announced, 2 came"):
        channel.receive()
    assert not any("garbled" in name for name in open_descriptors())


def test_received_descriptors_are_not_inherited_by_programs(pair: Pair):
    host, worker = pair
    file = os.memfd_create("mine")
    host.send({}, (file,))
    os.close(file)
    (received,) = worker.receive()[1]
    assert not os.get_inheritable(received)
    os.close(received)


def test_a_whole_message_of_single_bytes(raw: tuple[socket.socket, Channel]):
    theirs, channel = raw
    message = {"text": "σ" * 50}
    for byte in frame(json.dumps(message, ensure_ascii=False).encode()):
        theirs.sendall(bytes([byte]))
    assert channel.receive() == (message, [])
