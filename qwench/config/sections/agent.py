"""The built-in loop of tool calls, and agents behind a session server."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from qwench.config.limits import check_import_path, check_positive
from qwench.errors import ConfigError

TOOL_LOOP = "qwench.rollout.tool_loop.generate"
"""Value of --custom-generate-function-path that means the built-in loop of tool calls."""
AGENT = "qwench.rollout.agent_sessions.generate"
"""Value of --custom-generate-function-path that means an agent behind a session server."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AgentConfig:
    """Tools and agents that the policy acts through."""

    generate_max_turns: int = 16
    """Largest number of turns of one sample in the built-in tool loop."""
    generate_multi_samples: bool = False
    """Learn from every turn as a separate sample, whose prompt is all that comes before it. Off: one sample holds all turns.
    Needs --custom-generate-function-path."""
    generate_tool_specs_path: str | None = None
    """Import path of the list of tool schemas that the chat template shows to the policy."""
    generate_tool_call_parser: Literal["qwen25", "qwen", "hermes"] | None = None
    """Form of a tool call. All names, and None, mean one JSON object between <tool_call> and </tool_call>."""
    generate_execute_tool_function_path: str | None = None
    """Async function fn(name, arguments) that runs a tool and returns its output as text. Needs
    --custom-generate-function-path qwench.rollout.tool_loop.generate."""
    custom_agent_function_path: str | None = None
    """Async function fn(base_url=, prompt=, request_kwargs=, metadata=) of an agent. It talks to the policy at base_url,
    the OpenAI endpoint of the sample. The record that it returns joins the sample's metadata. Needs
    --custom-generate-function-path qwench.rollout.agent_sessions.generate."""
    use_session_server: bool = False
    """Accepted for scripts of miles: --custom-generate-function-path qwench.rollout.agent_sessions.generate serves agents by
    itself. Needs that function."""
    session_server_ip: str | None = None
    """Address of this machine that the endpoints of agents listen at. None: 127.0.0.1."""
    session_server_port: tuple[int, ...] = ()
    """Port of the endpoints of agents. Empty: a free one."""
    tito_model: Literal["default", "qwen3"] = "default"
    """How messages become tokens. Both names mean the chat template, and tokens that were sampled stay as they are."""
    max_seq_len: int | None = None
    """Bound on the tokens of an agent's session. None: that of the model, or --rollout-max-context-len."""

    def __post_init__(self) -> None:
        check_positive("--generate-max-turns", self.generate_max_turns)
        check_positive("--max-seq-len", self.max_seq_len)
        if len(self.session_server_port) > 1 or any(not 0 <= port < 2**16 for port in self.session_server_port):
            raise ConfigError(
                f"--session-server-port must be one port from 0 to 65535, got {' '.join(map(str, self.session_server_port))}"
            )
        for flag, path in (
            ("--generate-tool-specs-path", self.generate_tool_specs_path),
            ("--generate-execute-tool-function-path", self.generate_execute_tool_function_path),
            ("--custom-agent-function-path", self.custom_agent_function_path),
        ):
            check_import_path(flag, path)

    @property
    def served_at(self) -> tuple[str, int]:
        """Return host and port of the endpoints of agents; port 0 is a free one."""
        return self.session_server_ip or "127.0.0.1", next(iter(self.session_server_port), 0)

    def check_generate(self, path: str | None) -> None:
        """Check that the flags fit what --custom-generate-function-path names.

        Raises:
            ConfigError: a function is missing, or has no user.
        """
        if self.use_session_server and path != AGENT:
            raise ConfigError(f"--use-session-server serves --custom-generate-function-path {AGENT}; give it, or leave it out")
        if self.generate_multi_samples and path is None:
            raise ConfigError("--generate-multi-samples divides the turns of --custom-generate-function-path; give that too")
        for built_in, flag, given in (
            (TOOL_LOOP, "--generate-execute-tool-function-path", self.generate_execute_tool_function_path),
            (AGENT, "--custom-agent-function-path", self.custom_agent_function_path),
        ):
            if path == built_in and given is None:
                raise ConfigError(f"--custom-generate-function-path names a built-in function that needs {flag}; give it")
            if path != built_in and given is not None:
                raise ConfigError(f"{flag} has no effect without --custom-generate-function-path {built_in}; add it")
