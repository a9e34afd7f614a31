"""The families of vision towers: one module a family, and those of other distributions.

Every module of this package but `vistower.families.record` has one record, ``FAMILY``. Another
distribution brings a family by an entry point of the group ``vistower.families`` whose name is the
model type and whose value is a `Family`; it is imported when such a model type is met, and never
takes the place of a built-in one.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping
from functools import lru_cache

from vistower.errors import BundleUnsupportedError
from vistower.families.record import Family

GROUP = "vistower.families"

__all__ = ["GROUP", "Family", "built_in", "find_family", "known_types"]


@lru_cache(maxsize=1)
def built_in() -> Mapping[str, Family]:
    """Model type → family, of those in this package."""
    found = {}
    for module in pkgutil.iter_modules(__path__):
        if module.name != "record":
            family: Family = importlib.import_module(f"{__name__}.{module.name}").FAMILY
            found[family.model_type] = family
    return found


@lru_cache(maxsize=64)
def find_family(model_type: str) -> Family | None:
    """The family of a model type, or of a config that holds such a tower; None if there is none.

    Raises:
        BundleUnsupportedError: a distribution claims the type, and gives no family for it.
    """
    for family in built_in().values():
        if model_type in (family.model_type, *family.accepts):
            return family
    return _from_elsewhere(model_type)


def known_types() -> tuple[str, ...]:
    """The model types of the built-in families."""
    return tuple(sorted(built_in()))


def _from_elsewhere(model_type: str) -> Family | None:
    # Half as long to import as all of vistower, and hardly ever needed.
    from importlib.metadata import entry_points

    found = list(entry_points(group=GROUP, name=model_type))
    if not found:
        return None
    if len(found) > 1:
        raise BundleUnsupportedError(
            f"Several distributions bring the family {model_type!r} "
            f"({', '.join(one.value for one in found)}). Uninstall all but one."
        )
    try:
        family = found[0].load()
    # Whatever a stranger's module raises.
    except Exception as error:
        raise BundleUnsupportedError(
            f"The family {model_type!r} of {found[0].value} cannot be imported: "
            f"{type(error).__name__}: {error}. Reinstall that distribution."
        ) from error
    if not isinstance(family, Family) or model_type not in (family.model_type, *family.accepts):
        raise BundleUnsupportedError(
            f"The entry point {found[0].value} of the group {GROUP} is no family of model type "
            f"{model_type!r}. Reinstall that distribution."
        )
    return family
