"""SGLang's routes for LoRA adapters: /load_lora_adapter and /unload_lora_adapter; `/generate` names one by `lora_path`."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Mapping
from pathlib import Path

from fastapi import APIRouter, Response
from pydantic import BaseModel

from qwench.engines.embedded.compute.adapters import load_folder
from qwench.engines.embedded.engine import EmbeddedEngine
from qwench.errors import EngineError, QwenchError

_MAX_NAME_CHARS = 256

AdapterCheck = Callable[[Path], None]
"""Raises ConfigError if a PEFT folder was trained on another base than the checkpoint that is served."""


def any_base(folder: Path) -> None:
    """Accept an adapter of every base."""


class LoadBody(BaseModel):
    """Body of `/load_lora_adapter`."""

    # Other fields are ignored, as pinned: adapters are never evicted.

    lora_name: str
    lora_path: str
    """A PEFT folder of this machine."""


class UnloadBody(BaseModel):
    """Body of `/unload_lora_adapter`."""

    lora_name: str


class AdapterRoutes:
    """The handlers that change the adapters of one engine."""

    def __init__(self, engine: EmbeddedEngine, folders: Mapping[str, Path], check_base: AdapterCheck) -> None:
        """Load `folders`, by the names of the adapters; `check_base` sees those that are loaded later.

        Raises:
            ConfigError, CheckpointError: see `load_folder`.
        """
        self._engine, self._check_base = engine, check_base
        for name, folder in folders.items():
            load_folder(name, folder, engine.architecture)(engine.adapters, set())

    def add_to(self, router: APIRouter) -> None:
        """Add the paths to a router that checks the token."""
        router.add_api_route("/load_lora_adapter", self.load, methods=["POST"])
        router.add_api_route("/unload_lora_adapter", self.unload, methods=["POST"])

    async def load(self, body: LoadBody) -> Response:
        """Load an adapter under a new name."""
        name = body.lora_name
        if not 0 < len(name) <= _MAX_NAME_CHARS or not name.isprintable():
            return self._answer(f"lora_name {name[:40]!r} is no name: 1 to {_MAX_NAME_CHARS} printable characters.")
        try:
            if await self._engine.weight_version() == 0:  # later the weights are others than those of the checkpoint
                await asyncio.to_thread(self._check_base, Path(body.lora_path))
            add = await asyncio.to_thread(load_folder, name, Path(body.lora_path), self._engine.architecture)
            await self._engine.change_adapters(add)
        except (OSError, QwenchError) as error:
            return self._answer(str(error))
        return self._answer()

    async def unload(self, body: UnloadBody) -> Response:
        """Forget an adapter; unfinished requests go on with it."""
        try:
            await self._engine.change_adapters(lambda adapters, _: adapters.unload(body.lora_name))
        except EngineError as error:
            return self._answer(str(error))
        return self._answer()

    def _answer(self, error: str = "") -> Response:
        """Return SGLang's answer: the loaded adapters, and what went wrong."""
        content = {"success": not error, "loaded_adapters": self._engine.adapters.folders, "error_message": error}
        encoded = json.dumps(content, ensure_ascii=False).encode(errors="replace")  # a path may be no UTF-8
        return Response(encoded, status_code=400 if error else 200, media_type="application/json")
