"""Beginnings of HTTP replies."""

from __future__ import annotations

from tests.support.raw_server import says

OK = b"HTTP/1.1 200 OK\r\n"


CHUNKED = OK + b"Transfer-Encoding: chunked\r\n\r\n"


SLOW = {
    "status line": says(b"HTTP/1.1 ", then=b"2"),
    "header": says(OK + b"X: ", then=b"x"),
    "headers": says(OK, then=b"X: y\r\n"),
    "answers before the answer": says(then=b"HTTP/1.1 100 Continue\r\n\r\n"),
    "body": says(OK + b"Content-Length: 5000\r\n\r\n", then=b"x"),
    "body without length": says(OK + b"\r\n", then=b"x"),
    "size of a chunk": says(CHUNKED, then=b"0"),
    "chunk": says(CHUNKED + b"ff\r\n", then=b"x"),
    "small chunks": says(CHUNKED, then=b"1\r\nx\r\n"),
    "extension of a chunk": says(CHUNKED + b"5;", then=b"x"),
    "trailers": says(CHUNKED + b"0\r\n", then=b"X: y\r\n"),
    "body of a redirect": says(OK.replace(b"200", b"302") + b"Location: /\r\nContent-Length: 9999\r\n\r\n", then=b"x"),
}
