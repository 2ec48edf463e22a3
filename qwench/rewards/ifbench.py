"""`--rm-type ifbench`: 1 if the response follows all instructions of its row, else 0.

The checkers are those of IFBench (https://github.com/allenai/IFBench), whose folder the user puts on PYTHONPATH. The metadata
of a row hold

    instruction_id_list    names of the instructions
    kwargs                 a record of arguments for each of them; missing ones are empty
    prompt_text            the prompt as the checkers know it

Source: the metadata are those of slime's ifbench reward, and so is the strict reading.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

from qwench.errors import ConfigError, RewardError
from qwench.samples import Json, Verdict

_MODULE = "evaluation_lib"


def load_checkers() -> Any:  # IFBench's module, which has no types
    """Import IFBench.

    Raises:
        ConfigError: it cannot be imported.
    """
    try:
        return importlib.import_module(_MODULE)
    except ImportError as error:
        raise ConfigError(
            f"--rm-type ifbench needs the checkers of IFBench ({error}); put the folder of "
            "https://github.com/allenai/IFBench on PYTHONPATH, and install what its requirements name."
        ) from error


def instructions_of(metadata: Mapping[str, Json]) -> list[str]:
    """Return the names of a row's instructions.

    Raises:
        RewardError: there is none.
    """
    names = [str(name).strip() for name in metadata.get("instruction_id_list") or ()]
    if not names:
        raise RewardError(
            "--rm-type ifbench needs instruction_id_list in the row's metadata; add it, or choose another --rm-type."
        )
    return names


def grade(response: str, metadata: Mapping[str, Json]) -> Verdict:
    """Judge a response by the instructions of its row.

    Raises:
        RewardError: the row names no instruction.
    """
    names = instructions_of(metadata)
    given = metadata.get("kwargs") or []
    records = given if isinstance(given, list) else [given] * len(names)
    records = [*records, *({} for _ in names)][: len(names)]
    prompt = str(metadata.get("prompt_text") or "")
    checkers = load_checkers()
    asked = checkers.InputExample(
        key=int(metadata.get("record_id") or 0),
        instruction_id_list=names,
        prompt=prompt,
        kwargs=[{name: value for name, value in (record or {}).items() if value is not None} for record in records],
    )
    followed = checkers.test_instruction_following_strict(asked, {prompt: response}).follow_all_instructions
    return Verdict(score=float(followed), reason="followed" if followed else "not_followed")
