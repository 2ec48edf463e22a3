"""What SGLang 0.5.16 does with weights, without a model: it unpickles, fuses, splits over tensor-parallel ranks and hashes.

Written from SGLang's sources, independently of our sender: parameters are allocated first and filled shard by shard, as its
weight loaders do, and hashes are computed in NumPy's 32-bit arithmetic.
"""

import base64
import io
import json
import pickle
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

ALLOWED = ("builtins.", "collections.", "copyreg.", "functools.", "types.", "torch.", "multiprocessing.resource_sharer.",
           "multiprocessing.reduction.")  # fmt: skip
ADAPTER_BODIES = {
    "/load_lora_adapter": {"lora_name": str, "lora_path": str},
    "/unload_lora_adapter": {"lora_name": str},
    "/update_weight_version": {"new_version": str, "abort_all_requests": bool},
}
"""Fields of these bodies that a trainer needs, and their types (managers/io_struct.py); other fields are optional."""
QKV = {"q_proj": 0, "k_proj": 1, "v_proj": 2}
GATE_UP = {"gate_proj": 0, "up_proj": 1}


class AllowingUnpickler(pickle.Unpickler):
    """SGLang's rule: only globals below these modules."""

    def find_class(self, module: str, name: str):
        if not (module + ".").startswith(ALLOWED):
            raise RuntimeError(f"Blocked unsafe class loading ({module}.{name})")
        return super().find_class(module, name)


class FakeSglang:
    """A server in a thread; a context manager."""

    def __init__(
        self,
        shapes: dict[str, tuple[int, ...]],
        *,
        tp_size: int,
        token: str,
        caches_prefixes: bool = True,
        num_waiting: int = 0,
    ) -> None:
        self.shapes = shapes
        self.tp_size = tp_size
        self.token = token
        self.caches_prefixes, self.num_waiting = caches_prefixes, num_waiting
        self.version = "default"
        self.requests: list[tuple[str, dict]] = []
        self.damaged: str | None = None
        self.adapters: dict[str, str] = {}
        """Loaded adapters: name -> the text of their adapter_config.json."""
        self.params: list[dict[str, Tensor]] = [{} for _ in range(tp_size)]
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._thread = threading.Thread(target=self._server.serve_forever, args=[0.01], daemon=True)

    @property
    def base_url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *error) -> None:
        self._server.shutdown()
        self._server.server_close()

    def answer(self, path: str, body: dict) -> tuple[int, dict]:
        self.requests.append((path, body))
        if path == "/server_info":
            return 200, {"tp_size": self.tp_size, "disable_radix_cache": not self.caches_prefixes}
        if path == "/model_info":
            return 200, {"model_path": "m", "weight_version": self.version}
        if path == "/weights_checker":
            ranks = [
                {"checksums": checksums(params), "parallelism_info": {"tp_rank": r}} for r, params in enumerate(self.params)
            ]
            return 200, {"success": True, "message": "Success.", "ranks": ranks}
        if path in ADAPTER_BODIES:
            return self._change_adapters(path, body)
        if body["flush_cache"]:
            assert not self.num_waiting, "Cache flush failed after updating weights"  # of which SGLang's scheduler dies
        assert path == "/update_weights_from_tensor", path
        assert body["load_format"] == "flattened_bucket"
        for rank, payload in enumerate(body["serialized_named_tensors"]):
            bucket = AllowingUnpickler(io.BytesIO(base64.b64decode(payload))).load()
            for meta in bucket["metadata"]:
                octets = bucket["flattened_tensor"][meta.start_idx : meta.end_idx]
                self._load(rank, meta.name, octets.view(meta.dtype).reshape(meta.shape))
        self.version = body.get("weight_version", self.version)
        return 200, {"success": True, "message": "Success"}

    def _change_adapters(self, path: str, body: dict) -> tuple[int, dict]:
        assert {name: type(value) for name, value in body.items()} == ADAPTER_BODIES[path]
        if path == "/update_weight_version":
            assert not body["abort_all_requests"]
            self.version = body["new_version"]
            return 200, {"success": True, "message": "", "new_version": self.version}
        name = body["lora_name"]
        if path == "/load_lora_adapter":
            if name in self.adapters:
                return 400, {
                    "success": False,
                    "error_message": f"Failed to load LoRA adapter {name} because it is already loaded",
                }
            self.adapters[name] = (Path(body["lora_path"]) / "adapter_config.json").read_text()
        elif self.adapters.pop(name, None) is None:
            return 400, {"success": False, "error_message": f"LoRA with name {name} does not exist. Loaded LoRAs: []"}
        return 200, {"success": True, "error_message": None, "loaded_adapters": dict.fromkeys(self.adapters, "folder")}

    def _load(self, rank: int, name: str, tensor: Tensor) -> None:
        prefix, module, kind = name.rsplit(".", 2) if name.count(".") > 1 else ("", *name.split("."))
        params, tp = self.params[rank], self.tp_size
        fused = QKV if module in QKV else GATE_UP if module in GATE_UP else None
        if fused is not None:
            rows = [self.shapes[f"{prefix}.{part}.{kind}"][0] // tp for part in fused]
            target = f"{prefix}.{'qkv_proj' if fused is QKV else 'gate_up_proj'}.{kind}"
            if target not in params:
                params[target] = torch.zeros(sum(rows), *tensor.shape[1:], dtype=tensor.dtype)
            own = rows[fused[module]]
            start = sum(rows[: fused[module]])
            params[target][start : start + own] = tensor[rank * own : (rank + 1) * own]
        elif module in ("o_proj", "down_proj"):
            own = tensor.shape[1] // tp
            params[name] = tensor[:, rank * own : (rank + 1) * own].clone(memory_format=torch.contiguous_format)
        elif module in ("embed_tokens", "lm_head"):
            own = (tensor.shape[0] + 63) // 64 * 64 // tp
            params[name] = torch.zeros(own, tensor.shape[1], dtype=tensor.dtype)
            part = tensor[rank * own : (rank + 1) * own]
            params[name][: len(part)] = part
        else:
            params[name] = tensor.clone()
        if name == self.damaged and rank == tp - 1:
            params[name].view(-1)[0] += 1


def checksums(params: dict[str, Tensor]) -> dict[str, str]:
    """Hash every parameter; FP8 weights as the bfloat16 that they stand for, their scales not at all."""
    hashes = {}
    for name, tensor in params.items():
        scale = params.get(name + "_scale_inv")
        if name.endswith("_scale_inv"):
            continue
        if scale is not None:
            whole = tensor.float()
            for i in range(scale.shape[0]):
                for j in range(scale.shape[1]):
                    whole[i * 128 : (i + 1) * 128, j * 128 : (j + 1) * 128] *= scale[i, j]
            tensor = whole.bfloat16()
        hashes[name] = f"{numpy_hash(tensor):016x}"
    return hashes


def _handler(fake: FakeSglang) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def _answer(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers.get("Content-Length", 0))) or b"{}")
            allowed = self.headers.get("Authorization") == f"Bearer {fake.token}"
            status, answer = fake.answer(self.path, body) if allowed else (401, {"error": "Unauthorized"})
            content = json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        do_GET = do_POST = _answer  # noqa: N815 - http.server's names

        def log_message(self, *arguments: object) -> None:
            pass

    return Handler


def numpy_hash(tensor: Tensor) -> int:
    """Hash as SGLang's `gpu_tensor_hash` kernel does, tile after tile in uint32."""
    octets = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
    octets = np.concatenate([octets, np.zeros(-len(octets) % 4, np.uint8)])
    words = octets.view(np.uint32)
    if not len(words):
        return 0
    total = 0
    with np.errstate(over="ignore"):
        for start in range(0, len(words), 8192):
            v = words[start : start + 8192]
            index = np.arange(start, start + len(v), dtype=np.uint32)
            out = 0
            for seed, factor, turn in ((0x243F6A88, 0x27D4EB2D, 15), (_second_seed(), 0x165667B1, 13)):
                place = (index * np.uint32(factor) + np.uint32(seed)) ^ (
                    (index << np.uint32(turn)) | (index >> np.uint32(32 - turn))
                )
                h = np.sum(_mix(v ^ place), dtype=np.uint32) ^ np.uint32(len(words) * 4 & 0xFFFFFFFF)
                out = (out << 32) | int(_mix(np.array([h], np.uint32))[0])
            total = (total + out) % 2**64
    x = total
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
    return x ^ (x >> 31)


def _second_seed() -> int:
    return ((0x243F6A88 * 0x9E3779B1) ^ 0xDEADBEEF) % 2**32


def _mix(x: np.ndarray) -> np.ndarray:
    x = x ^ (x >> np.uint32(16))
    x = x * np.uint32(0x85EBCA6B)
    x = x ^ (x >> np.uint32(13))
    x = x * np.uint32(0xC2B2AE35)
    return x ^ (x >> np.uint32(16))
