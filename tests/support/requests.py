"""Hypothesis strategies for requests."""

from __future__ import annotations

from hypothesis import strategies as st

from shiwu.contract import (
    Request,
)

REFERENCES = st.sampled_from(["s3://b/k", "https://h/p?sig=1", "http://h:8080/p", "file:///a/b.jpg", "s3://b/键.jpg"])
LABELS = st.one_of(
    st.none(),
    st.just("six-zh"),
    st.lists(st.text("猫狗鸟abc", min_size=1, max_size=8), min_size=1, max_size=8, unique=True).map(tuple),
)


REQUESTS = st.builds(
    Request,
    image=REFERENCES,
    labels=LABELS,
    top_k=st.integers(1, 1000),
    threshold=st.floats(0, 1),
    head=st.sampled_from([None, "softmax", "sigmoid"]),
    callback=st.sampled_from([None, "orders", "订单", "https://h/hook?a=1"]),
    metadata=st.recursive(st.none() | st.integers(-9, 9) | st.text(max_size=9), lambda x: st.lists(x, max_size=3)),
)
