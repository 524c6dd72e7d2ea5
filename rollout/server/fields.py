"""A JSON body, field by field: what is not understood is refused with one line that says why."""

import json
import math
from collections.abc import Iterable, Mapping
from typing import Any

_MISSING = object()


class BadRequest(ValueError):
    """Answered with `status`, and with the message as the reason."""

    def __init__(self, message: str, status: int = 400) -> None:
        super().__init__(message)
        self.status = status


def parse(body: bytes) -> "Fields":
    def refuse(constant: str) -> None:
        raise BadRequest(f"the body holds {constant}, which is not JSON")

    try:
        value = json.loads(body, parse_constant=refuse)
    except RecursionError:
        raise BadRequest("the body is nested too deeply") from None
    except BadRequest:
        raise
    except ValueError as error:  # also bytes that are no UTF-8, and numbers of thousands of digits
        raise BadRequest(f"the body is not JSON: {error}") from None
    return Fields(value, "the body")


class Fields:
    """An object whose fields are taken one by one; `done` refuses those that nobody took."""

    def __init__(self, value: Any, where: str) -> None:
        if not isinstance(value, dict):
            raise BadRequest(f"{where} must be a JSON object")
        self.value: dict[str, Any] = value
        self.where = where
        self.taken: set[str] = set()

    def any(self, name: str, default: Any = None) -> Any:
        self.taken.add(name)
        value = self.value.get(name, _MISSING)
        return default if value is _MISSING or value is None else value

    def integer(self, name: str, default: int | None, least: int, most: int) -> Any:
        value = self.any(name, default)
        if value is None:
            return None
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int):
            raise BadRequest(f"{name} must be an integer, not {_show(value)}")
        if not least <= value <= most:
            raise BadRequest(f"{name}={_show(value)} must be in {least} .. {most}")
        return value

    def number(self, name: str, default: float) -> float:
        value = self.any(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise BadRequest(f"{name} must be a number, not {_show(value)}")
        try:
            value = float(value)
        except OverflowError:
            value = math.inf
        if not math.isfinite(value):
            raise BadRequest(f"{name}={value} must be finite")
        return value

    def boolean(self, name: str, default: bool = False) -> bool:
        value = self.any(name, default)
        if not isinstance(value, bool):
            raise BadRequest(f"{name} must be true or false, not {_show(value)}")
        return value

    def text(self, name: str, default: str | None = None) -> Any:
        value = self.any(name, default)
        if value is not None and not isinstance(value, str):
            raise BadRequest(f"{name} must be a string, not {_show(value)}")
        return value

    def texts(self, name: str, most: int) -> tuple[str, ...]:
        """A string or a list of strings."""
        value = self.any(name, [])
        value = [value] if isinstance(value, str) else value
        if not isinstance(value, list) or not all(isinstance(v, str) for v in value):
            raise BadRequest(f"{name} must be a string or a list of strings, not {_show(value)}")
        if len(value) > most:
            raise BadRequest(f"{name} has {len(value)} entries; at most {most} are taken")
        return tuple(v for v in value if v)

    def integers(self, name: str, most: int) -> tuple[int, ...]:
        value = self.any(name, [])
        if not isinstance(value, list) or not all(is_integer(v) for v in value):
            raise BadRequest(f"{name} must be a list of integers, not {_show(value)}")
        if len(value) > most:
            raise BadRequest(f"{name} has {len(value)} entries; at most {most} are taken")
        return tuple(value)

    def neutral(self, table: Mapping[str, Iterable[Any]]) -> None:
        """Fields of other servers that are not supported and may only say what changes nothing; an empty table entry: any
        value, since the field cannot change what is sampled."""
        for name, values in table.items():
            allowed = list(values)
            value = self.any(name)
            if name in self.value and value is not None and allowed and not any(_same(value, v) for v in allowed):
                raise BadRequest(
                    f"{name}={_show(value)} is not supported; it may only be {_show(allowed[0])} or absent"
                )

    def done(self) -> None:
        unknown = sorted(set(self.value) - self.taken)
        if unknown:
            raise BadRequest(
                f"{self.where} has an unknown field {_show(unknown[0])}; fields: {', '.join(sorted(self.taken))}"
            )


def is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _same(value: Any, other: Any) -> bool:
    return value == other and isinstance(value, bool) == isinstance(other, bool)


def _show(value: Any) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 60 else text[:57] + "..."
