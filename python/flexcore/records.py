"""Unknown fields of configurations: refused as flexcore's own errors, with the field that was probably meant."""

from __future__ import annotations

import difflib
import functools
from typing import Any

from flexcore._core import InvalidArgument, Unsupported

# PEFT's fields that users type by heart: right, but not here.
_UNSUPPORTED = {
    "LoraConfig": {
        "bias": "flexcore trains adapters only, no biases",
    }
}


def refuse_unknown_fields(cls: Any) -> None:
    """Makes the constructor of a compiled record name an unknown keyword in a flexcore.Error."""
    construct = cls.__init__

    @functools.wraps(construct)
    def __init__(self: Any, *args: Any, **fields: Any) -> None:
        for name in fields:
            if name not in cls._fields:
                raise _unknown(cls, name)
        construct(self, *args, **fields)

    cls.__init__ = __init__


def _unknown(cls: Any, name: str) -> Exception:
    reason = _UNSUPPORTED.get(cls.__name__, {}).get(name)
    if reason:
        return Unsupported(f"{cls.__name__}.{name}: {reason}; leave the field out")
    nearest = difflib.get_close_matches(name, cls._fields, n=1)
    known = dict.fromkeys([*nearest, *cls._fields])
    return InvalidArgument(f"{cls.__name__}: got a field {name!r}, wanted one of {', '.join(known)}")
