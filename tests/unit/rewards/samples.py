"""Finished samples for the tests of rewards."""

from __future__ import annotations

from qwench.samples import Prompt, Sample


def finished(response: str, label: str | None = None, *, sample_id: int = 0, rm_type: str | None = None) -> Sample:
    metadata = {} if rm_type is None else {"rm_type": rm_type}
    prompt = Prompt(text="", token_ids=(1,), label=label, metadata=metadata)
    return Sample(prompt=prompt, sample_id=sample_id, group_id=0, response=response)
