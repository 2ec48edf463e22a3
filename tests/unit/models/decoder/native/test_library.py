"""The library of C++ kernels: compiled once, and done without where it cannot be."""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import pwd
import re
import shutil
import time
from ctypes import CDLL
from pathlib import Path

import pytest
import torch

from qwench.engines.embedded.settings import EmbeddedSettings
from qwench.models.decoder.native import compiler
from qwench.models.decoder.native import library as module
from qwench.models.decoder.native.compiler import find_compilers
from tests.compiler import HAS_COMPILER, needs_compiler

_make = module.library.__wrapped__
"""Without the memory of an earlier call."""


def _compiler(folder: Path, script: str) -> str:
    path = folder / "bad++"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return str(path)


def test_without_a_compiler_there_is_no_library_and_one_line_says_so(monkeypatch, caplog):
    monkeypatch.setattr(compiler, "COMPILERS", ("no-such-compiler",))
    with caplog.at_level(logging.INFO):
        assert _make() is None
    assert [record.levelname for record in caplog.records] == ["INFO"]
    assert "no C++ compiler" in caplog.text


@pytest.mark.parametrize(
    ("script", "said"),
    [
        ("exit 3", "exit status 3"),
        ("printf '\\377 bad' >&2; exit 3", "\ufffd bad"),
        ('test "$1" = --version || { echo "no room" >&2; exit 1; }', "no room"),
    ],
)
def test_a_compiler_that_fails_is_quoted_and_pytorch_computes(monkeypatch, caplog, tmp_path, script, said):
    monkeypatch.setattr(compiler, "COMPILERS", (_compiler(tmp_path, script),))
    monkeypatch.setenv("HOME", str(tmp_path))
    assert _make() is None
    assert said in caplog.text


@needs_compiler
def test_the_next_compiler_is_tried_and_libraries_that_nothing_uses_are_removed(monkeypatch, caplog, tmp_path):
    built, bad = Path(module.library()._name), _compiler(tmp_path, 'test "$1" = --version || exit 3')

    def compile_library(path, sources, folder):
        return compiler.compile_library(path, sources, folder) if path == bad else built

    monkeypatch.setattr(module, "compile_library", compile_library)
    monkeypatch.setattr(compiler, "COMPILERS", (bad, *find_compilers()))
    monkeypatch.setenv("HOME", str(tmp_path))
    folder = tmp_path / ".cache" / "qwench"
    (folder / "kernels-stays.so").mkdir(parents=True)  # like a file of another user, it cannot be removed
    month_ago, stay = time.time() - 31 * 86400, {folder / name for name in ("kernels-new.so", "other", "kernels-stays.so")}
    for path in (folder / "kernels-old.so", *stay):
        path.is_dir() or path.touch()
        when = month_ago + 2 * 86400 * (path.name == "kernels-new.so")
        os.utime(path, (when, when))
    loaded = _make()
    assert isinstance(loaded, CDLL) and "bad++" in caplog.text and "PyTorch" not in caplog.text
    [made] = set(folder.iterdir()) - stay
    assert all(path.exists() for path in stay) and loaded._name == str(made) and made.name != "kernels-old.so"
    os.utime(made, (month_ago, month_ago))
    assert isinstance(_make(), CDLL)
    assert made.stat().st_mtime > month_ago + 86400  # a use that counts


@needs_compiler
def test_the_library_is_compiled_once_and_again_where_it_is_damaged_or_cannot_be_kept(monkeypatch, tmp_path):
    compiled, built = [], Path(module.library()._name).read_bytes()

    def compile_library(path, sources, folder):
        compiled.append([path.name for path in sources])
        (folder / "kernels.so").write_bytes(built)
        return folder / "kernels.so"

    monkeypatch.setattr(module, "compile_library", compile_library)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert isinstance(_make(), CDLL) and isinstance(_make(), CDLL)
    assert compiled == [["attention.cpp", "draw.cpp", "elementwise.cpp", "products.cpp"]]
    [kept] = (tmp_path / ".cache" / "qwench").iterdir()
    whole = kept.read_bytes()
    assert whole == built + hashlib.sha256(built).digest()
    for half in (b"", whole[:5000], whole[: len(whole) // 2], whole[:-1]):
        kept.unlink()  # this process has loaded it
        kept.write_bytes(half)
        assert isinstance(_make(), CDLL)
        assert kept.read_bytes() == whole
    assert len(compiled) == 5
    with monkeypatch.context() as patch:
        patch.setattr(module, "_load_kept", lambda kept: CDLL(str(kept / "no file")))
        assert isinstance(_make(), CDLL)  # where files of the home cannot be executed
    (tmp_path / "file").touch()
    monkeypatch.setenv("HOME", str(tmp_path / "file"))
    assert isinstance(_make(), CDLL)
    monkeypatch.delenv("HOME")
    monkeypatch.setattr(pwd, "getpwuid", {}.__getitem__)  # a user without an entry has no home
    assert isinstance(_make(), CDLL)
    assert len(compiled) == 8


def test_the_compiler_is_asked_for_objects_and_for_a_library_of_them(monkeypatch, tmp_path):
    log = tmp_path / "asked"
    script = f'echo "$@" >> {log}; pwd >> {log}; test "$1" != -shared || touch kernels.so'
    monkeypatch.setattr(compiler, "COMPILERS", (_compiler(tmp_path, script),))
    monkeypatch.setenv("HOME", str(tmp_path))
    assert _make() is None  # an empty file is no library
    version, _, objects, folder, shared, again = log.read_text().splitlines()
    parts = [Path(module.__file__).with_name(name) for name in ("attention", "draw", "elementwise", "products")]
    options = "-std=c++17 -O3 -march=native -fno-math-errno -fPIC"
    assert version == "--version"
    assert objects == " ".join([options, "-c", *(f"{part}.cpp" for part in parts)])
    assert shared == " ".join(["-shared -o kernels.so", *(f"{part.name}.o" for part in parts)])
    assert folder == again and not Path(folder).exists()


@needs_compiler
def test_a_working_folder_that_is_gone_hides_no_compiler(monkeypatch, tmp_path):
    folder = tmp_path / "gone"
    folder.mkdir()
    monkeypatch.chdir(folder)
    folder.rmdir()
    assert compiler.facts_of(find_compilers()[0])


@needs_compiler
def test_another_processor_needs_another_library(monkeypatch, tmp_path):
    monkeypatch.setattr(module, "compile_library", lambda *given: Path(module.library()._name))
    monkeypatch.setattr(compiler, "_CPU_INFO", tmp_path / "cpuinfo")
    monkeypatch.setenv("HOME", str(tmp_path))
    lines = ["model name : A", "flags : sse", "Features : asimd", "CPU part : 0xd40"]
    others = [[*lines[:i], f"{line} B", *lines[i + 1 :]] for i, line in enumerate(lines)]
    found = []
    for cores in (None, lines, ["processor : 0", *lines, "processor : 1", *lines], *others):
        if cores is not None:
            (tmp_path / "cpuinfo").write_text("\n".join(cores))
        assert isinstance(_make(), CDLL)
        found.append({path.name for path in (tmp_path / ".cache" / "qwench").iterdir()})
    assert [len(names) for names in found] == [1, 2, 2, 3, 4, 5, 6]
    assert all(re.fullmatch(r"kernels-[0-9a-f]{16}\.so", name) for name in found[-1])


def test_threads_share_work_that_is_large(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 5)
    assert [module.threads_for(work, smallest=4) for work in (3, 4, 5)] == [1, 5, 5]


@needs_compiler
def test_a_library_that_found_no_room_leaves_nothing_behind(monkeypatch, tmp_path):
    def refuse(source, target):
        place = Path(target)
        (place / "half" if place.is_dir() else place).touch()
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(module, "compile_library", lambda *given: Path(module.library()._name))
    monkeypatch.setattr(shutil, "copy", refuse)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert isinstance(_make(), CDLL)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


@pytest.mark.skipif(not HAS_COMPILER or shutil.which("clang++") is None, reason="needs clang++")
def test_a_library_of_clang_finds_its_threads_in_pytorch(monkeypatch, tmp_path):
    monkeypatch.setattr(compiler, "COMPILERS", ("clang++",))
    monkeypatch.setenv("HOME", str(tmp_path))
    assert isinstance(_make(), CDLL)


def test_engines_on_gpus_in_other_dtypes_or_with_equal_bits_do_without(monkeypatch):
    monkeypatch.setattr("qwench.engines.embedded.settings.library", lambda: object())
    assert EmbeddedSettings().resolved_native
    assert not EmbeddedSettings(device="cuda").resolved_native
    assert not EmbeddedSettings(batch_invariant=True).resolved_native
    sizes = EmbeddedSettings().sizes
    assert not EmbeddedSettings(sizes=type(sizes)(embedded_native_kernels=False)).resolved_native
