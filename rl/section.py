"""The base of every section of a config, and the types of its values."""

from typing import Annotated, Any

import numpy as np
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, field_validator
from pydantic_core import PydanticCustomError

from rl.command_line import at_home

LEAST, MOST = float(np.finfo(np.float32).tiny), float(np.finfo(np.float32).max)
"""What float32, in which a run's numbers are computed, holds with all its bits."""


def _below_one(value: float) -> float:
    if np.float32(value) == 1:
        raise PydanticCustomError("below_one", "is 1 in float32, and must be less than 1")
    return value


def found_at_home(path: str) -> str:
    """Returns a path whose ~ is somebody's folder; a reason for pydantic where it is nobody's."""
    try:
        return at_home(path)
    except ValueError as error:
        raise PydanticCustomError("home", "{reason}", {"reason": str(error)}) from None


Positive = Annotated[int, Field(gt=0)]
Natural = Annotated[int, Field(ge=0)]
Steps = Annotated[int, Field(ge=0, lt=5 * 10**7)]  # a checkpoint's name has 8 digits for those of both kinds
Seconds = Annotated[int, Field(gt=0, le=10**6)]
Decay = Annotated[float, Field(ge=0, lt=1), AfterValidator(_below_one)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Text = Annotated[str, Field(min_length=1)]
Folder = Annotated[Text, AfterValidator(found_at_home)]


class Section(BaseModel):
    """Refuses unknown keys and numbers that no dtype holds, and cannot be changed."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False)

    @field_validator("*")
    @classmethod
    def _held(cls, value: Any) -> Any:
        """Refuses, in every field of every section, a number that its dtype does not hold: it would be another one, 0 or
        infinity by the time it is computed with."""
        for number in value if isinstance(value, tuple | list) else (value,):
            if isinstance(number, float) and number and not LEAST <= abs(number) <= MOST:
                raise PydanticCustomError("float32", f"must be a number from 2^-126 to {MOST:.3g}, which float32 holds")
            if isinstance(number, int) and abs(number) >= 2**63:
                raise PydanticCustomError("int64", "must be below 2^63, which int64 holds")
        return value
