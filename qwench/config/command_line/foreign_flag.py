"""What becomes of a flag of slime, miles or Megatron that no field of the configuration takes."""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase

ANY = ("*",)
"""Pattern of every value, and of none at all."""
ON = ("true",)
OFF = ("false",)
NEVER: tuple[str, ...] = ()
NOT_SUPPORTED = "is not supported"
NOT_BUILT = "is not built yet"


@dataclass(frozen=True, slots=True)
class ForeignFlag:
    """A flag of theirs without a field of ours. It is accepted where it changes nothing, and refused by name elsewhere."""

    name: str
    """Without dashes in front, as the reference spells it: also no-rope-fusion, and sglang-dp-size."""
    values: tuple[str, ...]
    """Patterns of the values that change nothing. None: the flag is always refused."""
    reason: str
    told: bool = False
    """An accepted flag has an effect in the reference and none here: a warning names it."""
    same_as: str | None = None
    """Flag of ours whose value it must repeat; paths are compared by their last part."""
    fate: str = NOT_SUPPORTED
    """What a refusal says of the flag."""

    def accepts(self, spelled: str, values: tuple[str, ...]) -> bool:
        """Tell whether the flag, spelled `name` or `no-name`, was given at a value that changes nothing."""
        return any(_same(_value(self.name, spelled, values), neutral) for neutral in self.values)

    def refusal(self, spelled: str, values: tuple[str, ...]) -> str:
        """Say why the flag is refused at this value, and what would be accepted."""
        got = f" {' '.join(values)}" if values else ""
        return f"--{spelled}{got} {self.fate}: {self.reason}{self._advice()}"

    def _advice(self) -> str:
        if not self.values or self.fate == NOT_BUILT:
            return "; leave it out"
        if self.values in (ON, OFF):
            return ""
        return f"; leave it out or give {' or '.join(self.values)}"


def flags(
    values: tuple[str, ...], reason: str, names: str, *, told: bool = False, same_as: str | None = None
) -> list[ForeignFlag]:
    """Return flags of one reason; `names` are separated by blanks."""
    return [ForeignFlag(name, values, reason, told, same_as) for name in names.split()]


def planned(reason: str, names: str) -> list[ForeignFlag]:
    """Return flags whose names are reserved for what is not built yet; `name=value` is accepted at that value, too."""
    made = []
    for word in names.split():
        name, equals, off = word.partition("=")
        made.append(ForeignFlag(name, (*OFF, off) if equals else OFF, reason, fate=NOT_BUILT))
    return made


def _value(name: str, spelled: str, values: tuple[str, ...]) -> str:
    if values:
        return " ".join(values)
    return "true" if spelled == name else "false"


def _same(value: str, neutral: str) -> bool:
    try:
        return float(value) == float(neutral)
    except ValueError:
        return fnmatchcase(value.lower(), neutral.lower())
