"""Messages between host and worker."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from parallel.wire.channel import Channel, ChannelBlocked, ChannelClosed

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
            waiting.result(timeout=5)


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
