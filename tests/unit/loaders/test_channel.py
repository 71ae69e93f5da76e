"""Frames arrive whole and in order, however the stream cuts them."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shiwu_worker.loaders.channel import READ_BYTES, FrameChannel
from shiwu_worker.loaders.protocol import ProtocolError, Ready, SandboxFault, read_loader_frame

MAX_BYTES = 100


@pytest.fixture
def ends() -> Iterator[tuple[socket.socket, socket.socket]]:
    """Both ends of a stream."""
    first, second = socket.socketpair()
    first.settimeout(10)
    with first, second:
        yield first, second


@given(texts=st.lists(st.text(max_size=200), min_size=1, max_size=20), cuts=st.lists(st.integers(0, 5000), max_size=8))
def test_frames_arrive_however_they_are_cut(texts: list[str], cuts: list[int]) -> None:
    """Also those with line breaks, which JSON escapes."""
    sent = [SandboxFault(text) for text in texts]
    first, second = socket.socketpair()
    reader, writer = os.pipe()
    with first, second:
        FrameChannel(writer, max_bytes=0).send(sent)
        os.close(writer)
        data = b"".join(iter(lambda: os.read(reader, 1 << 16), b""))
        os.close(reader)
        channel, got = FrameChannel(second.fileno(), max_bytes=len(data)), list[bytes]()
        ends = sorted({min(cut, len(data)) for cut in cuts} | {len(data)})
        for begin, end in zip([0, *ends], ends, strict=False):
            if begin < end:
                first.sendall(data[begin:end])
                got += channel.receive()
    assert [read_loader_frame(frame) for frame in got] == sent


def test_several_frames_take_one_call(ends: tuple[socket.socket, socket.socket]) -> None:
    """To send, and to receive."""
    sent = [Ready(), SandboxFault("one"), SandboxFault("two")]
    FrameChannel(ends[0].fileno(), max_bytes=MAX_BYTES).send(sent)
    frames = FrameChannel(ends[1].fileno(), max_bytes=MAX_BYTES).receive()
    assert [read_loader_frame(frame) for frame in frames] == sent


def test_more_than_one_call_takes_is_sent_whole(ends: tuple[socket.socket, socket.socket]) -> None:
    """Frames that are longer than a read are put together."""
    channel, sent = FrameChannel(ends[1].fileno(), max_bytes=4 * READ_BYTES), SandboxFault("x" * 2 * READ_BYTES)
    FrameChannel(ends[0].fileno(), max_bytes=0).send([sent])
    got: list[bytes] = []
    while not got:
        got = channel.receive()
    assert [read_loader_frame(frame) for frame in got] == [sent]


@pytest.mark.parametrize("end", [b"", b"\n", b"\n{}\n"], ids=["no end", "end", "another"])
def test_frame_that_is_too_long_is_refused(ends: tuple[socket.socket, socket.socket], end: bytes) -> None:
    """Whether its end has come or not, so what a loader sends without an end takes no memory."""
    channel = FrameChannel(ends[1].fileno(), max_bytes=MAX_BYTES)
    ends[0].sendall(b"x" * MAX_BYTES)
    assert channel.receive() == []
    ends[0].sendall(b"x" + end)
    with pytest.raises(ProtocolError, match=f"at most {MAX_BYTES} bytes"):
        channel.receive()


def test_end_of_the_stream_ends_the_frames(ends: tuple[socket.socket, socket.socket]) -> None:
    """A frame without its end is none."""
    channel = FrameChannel(ends[1].fileno(), max_bytes=MAX_BYTES)
    ends[0].sendall(b"{}\n{")
    assert channel.receive() == [b"{}"]
    ends[0].close()
    with pytest.raises(EOFError):
        channel.receive()
    with pytest.raises(OSError, match=r"Broken pipe|reset"):
        channel.send([Ready()])
