"""Warnings of a piece of code, counted."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def told(count: int, *words: str) -> Iterator[None]:
    """There are `count` warnings inside, and `words` in each."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    messages = [str(warning.message) for warning in caught]
    assert len(messages) == count, messages
    assert all(word in message for message in messages for word in words), messages
