"""Attributes computed when they are first read."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, TypeVar, overload

T = TypeVar("T")


class cached_property(Generic[T]):  # noqa: N801
    """``functools.cached_property`` without the lock it has before Python 3.12.

    That lock is one for all instances, and stays locked in a child that is forked while another
    thread computes. Two threads that come at once both compute here.
    """

    def __init__(self, compute: Callable[[Any], T]) -> None:
        """Take the method."""
        self._compute = compute
        self.__doc__ = compute.__doc__

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    @overload
    def __get__(self, instance: None, owner: type) -> cached_property[T]: ...

    @overload
    def __get__(self, instance: object, owner: type) -> T: ...

    def __get__(self, instance: object, owner: type) -> cached_property[T] | T:
        if instance is None:
            return self
        value = self._compute(instance)
        # From now on the instance's own dictionary comes first.
        return vars(instance).setdefault(self._name, value)  # type: ignore[no-any-return]
