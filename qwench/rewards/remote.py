"""`--rm-type remote_rm`: a server of the user grades.

    POST --rm-url {"prompt": ..., "response": ..., "label": ...}  ->  0.5  or  {"score": 0.5}; --reward-key: another key

A request that fails is sent again, 10 times in all, after 1, 2, 4, ... at most 30 s and up to one more; a refusal (400 to 499)
is not. A response that is still not graded ends the run: a broken reward is never a 0. The waits are those of slime's
remote_rm.
"""

from __future__ import annotations

import asyncio
import random
import socket
from collections.abc import Mapping
from urllib.parse import urlsplit

import aiohttp

from qwench.errors import ConfigError, RewardError, counted
from qwench.rewards.boxed import last_box
from qwench.rewards.scores import Answer, read_answer
from qwench.samples import Json, Sample, Verdict

REMOTE = "remote_rm"
ATTEMPTS = 10
REQUEST_TIMEOUT_S = 120.0
LONGEST_PAUSE_S = 30.0
CONNECT_TIMEOUT_S = 10.0
_SHOWN_CHARS = 200
_REQUESTS_AT_ONCE = 64
_SENT_AGAIN = (408, 429)
"""Refusals that may succeed later."""


class RemoteReward:
    """Asks one server; any number of samples at once, of which a bounded number is sent."""

    def __init__(self, url: str, *, key: str | None) -> None:
        self._url = url
        self._key = key
        self._server = JsonServer(url, flag="--rm-url")

    async def grade(self, sample: Sample, *, boxed: bool = False) -> Verdict:
        """Return the server's verdict on one sample.

        Args:
            boxed: send only the content of the last box.

        Raises:
            RewardError: the server cannot be reached, refused, or answered no score.
        """
        response = (last_box(sample.response) or "") if boxed else sample.response
        body = {"prompt": sample.prompt.text, "response": response, "label": sample.prompt.label}
        answer = await self._server.ask(body, what=f"sample {sample.sample_id}")
        verdict = read_answer(answer, key=self._key, source="remote")
        if verdict is None:
            raise RewardError(
                f"--rm-url {self._url} must answer a finite number, or an object with one under {self._key or 'score'!r} "
                f"(--reward-key), for sample {sample.sample_id}; got {str(answer)[:_SHOWN_CHARS]}."
            )
        return verdict


class JsonServer:
    """A server that answers JSON; a bounded number of requests is under way."""

    def __init__(
        self, url: str, *, flag: str, headers: Mapping[str, str] | None = None, deadline_s: float | None = None
    ) -> None:
        """Take an address; `flag` names it in messages.

        Args:
            deadline_s: of a question with all its requests, from the first one on. None: a number of requests is the limit.
        """
        self._url, self._flag, self._headers = url, flag, dict(headers or {})
        self._deadline_s = deadline_s
        self._places = asyncio.Semaphore(_REQUESTS_AT_ONCE)

    async def ask(self, body: Mapping[str, Json], *, what: str) -> Answer:
        """Return the answer; a request that fails is sent again.

        Raises:
            RewardError: the server refused, or there is no deadline and it cannot be reached.
            TimeoutError: the deadline has passed.
        """
        async with self._places:
            failed: list[Exception] = []
            try:
                async with asyncio.timeout(self._deadline_s):
                    return await self._ask(body, what=what, failed=failed)
            except TimeoutError as late:
                why = f": {str(failed[-1]) or repr(failed[-1])}" if failed else ""
                raise TimeoutError(f"no verdict within {self._deadline_s:g} s{why}") from late

    async def _ask(self, body: Mapping[str, Json], *, what: str, failed: list[Exception]) -> Answer:
        """Send requests until one is answered; `failed` gets what became of the others."""
        while True:
            try:
                return await self._post(body, self._deadline_s or REQUEST_TIMEOUT_S)
            except (_Refused, aiohttp.ClientError, OSError, ValueError) as cause:
                failed.append(cause)
                is_last = self._deadline_s is None and len(failed) == ATTEMPTS
                if is_last or (isinstance(cause, _Refused) and cause.is_final):
                    raise RewardError(
                        f"{self._flag} {self._url} did not grade {what}, asked {counted(len(failed), 'time')}: "
                        f"{str(cause) or repr(cause)}; look at the server's log"
                    ) from cause
            await asyncio.sleep(pause_s(len(failed) - 1))

    async def _post(self, body: Mapping[str, Json], timeout_s: float) -> Answer:
        timeout = aiohttp.ClientTimeout(total=timeout_s)
        opened = aiohttp.ClientSession(timeout=timeout, headers=self._headers)
        async with opened as session, session.post(self._url, json=body) as response:
            if response.status >= 400:
                raise _Refused(response.status, (await response.text())[:_SHOWN_CHARS])
            return await response.json(content_type=None)


class _Refused(Exception):  # noqa: N818 - it is caught where it is raised
    def __init__(self, status: int, said: str) -> None:
        super().__init__(f"status {status}: {said}")
        self.is_final = status < 500 and status not in _SENT_AGAIN


def pause_s(attempt: int) -> float:
    """Return how long to wait after attempt 0, 1, ...; the random part keeps many requests from coming again together."""
    return min(2.0 ** min(attempt, 9), LONGEST_PAUSE_S) + random.random()


def check_reachable(url: str, *, what: str = "the server", flag: str = "--rm-url") -> None:
    """Check before the run starts that a server listens; a run would find out after its first rollout only.

    Raises:
        ConfigError: no server listens.
    """
    parts = urlsplit(url)
    try:
        port = parts.port or (443 if parts.scheme == "https" else 80)
        socket.create_connection((parts.hostname or "", port), timeout=CONNECT_TIMEOUT_S).close()
    except (OSError, ValueError) as cause:
        raise ConfigError(f"{what} {flag} {url} cannot be reached: {cause}; start it, or correct the flag") from cause
