"""One rank's part in a publication: buckets are numbered, offered and awaited; folders are written, read and removed."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from qwench.config.sections.engine import EngineConfig
from qwench.engines.protocol import Portion
from qwench.errors import EngineLostError, WeightSyncError
from qwench.weights import remote
from qwench.weights.plan import NamedAdapter, PublicationPlan
from qwench.weights.remote import _IpcSender, _Parcel, _Publication
from qwench.weights.routes import Route

PLAN = PublicationPlan(engine=EngineConfig(), model_folder=Path("model"), fp8=False, timeout_s=3.0)
PORTION = Portion(version=7, index=1, final=False)
Said = list[object]


def publication(said: Said, plan: PublicationPlan = PLAN, *, rank: int = 0, routes: tuple[Route, ...] = ()) -> _Publication:
    made = object.__new__(_Publication)
    made._plan, made._version, made._routes, made._ledgers = plan, 7, list(routes), {}
    made._exchange = SimpleNamespace(rank=rank, gather=lambda told, *, failure: said.append((told, failure)) or [told])
    made._loop = SimpleNamespace(run=lambda work, **options: said.append(options) or asyncio.run(work))
    made._addresses = [SimpleNamespace(base_url=f"http://{number}") for number in range(3)]
    made._receivers = [
        SimpleNamespace(
            window=lambda transport, number=number: number + 4, ledger_kind="ab"[number % 2], make_ledger=lambda: "ledger",
            **{name: keep(said, f"{name} {number}") for name in ("take_folder", "take_adapter", "confirm", "close", "open")},
        )
        for number in range(3)
    ]  # fmt: skip
    return made


def keep(said: Said, name: str) -> Callable[..., object]:
    async def act(*given: object, **options: object) -> None:
        said.append((name, *given, *([options] if options else [])))

    return act


def route(transport: str, *ranks: int) -> Route:
    return Route(address="address", transport=transport, ranks=ranks)


def routes(*transports: str) -> tuple[Route, ...]:
    return tuple(route(transport, number % 2) for number, transport in enumerate(transports))


def test_buckets_are_numbered_and_the_last_one_says_so() -> None:
    found = list(publication([])._numbered(iter(["a", "b", "c"])))
    assert found == [(Portion(version=7, index=index, final=index == 2), name) for index, name in enumerate("abc")]
    assert list(publication([])._numbered(["a"])) == [(Portion(version=7, index=0, final=True), "a")]


def test_as_many_buckets_are_under_way_as_every_engine_takes() -> None:
    assert publication([], routes=routes("ipc", "broadcast", "ipc"))._window() == 4
    assert publication([], routes=routes("disk", "broadcast", "ipc"))._window() == 5, "a folder is no bucket"


def test_a_rank_asks_the_engines_whose_first_rank_it_serves() -> None:
    said: Said = []
    made = publication(said, rank=1, routes=(route("ipc", 1, 0), route("disk", 0, 1)))
    assert [number for number, _, _ in made._served()] == [0, 1]
    assert [number for number, _, _ in made._served("disk")] == [1] and made._served("broadcast") == []
    assert made._asked() == made._receivers[:1] and made.serves("disk", "x") and not made.serves("broadcast")
    made._open()
    label = {"label": "ask engines for its size", "timeout_s": PLAN.total_timeout_s}
    assert said == [label, ("open 0",)] and made._ledgers == {"a": "ledger"}
    said.clear()
    made.confirm()
    asked = {"label": "confirm weight version 7", "timeout_s": PLAN.total_timeout_s}
    assert said == [asked, ("confirm 0", "ledger", {"version": 7}), ({}, None)]
    said.clear()
    made.close()
    closing = {"label": "close connections to engines", "timeout_s": 3.0}
    assert said == [closing, *((f"close {number}",) for number in range(3))]
    said.clear()
    made._plan = replace(PLAN, named=NamedAdapter(config="config"))
    made.confirm()
    assert said == [], "an adapter was named when it was loaded"


def test_an_engine_that_tells_nothing_in_time_is_lost() -> None:
    made = publication([], replace(PLAN, timeout_s=0.01))
    with pytest.raises(EngineLostError, match=r"^an engine did not tell its devices within 0\.01 s\.$"):
        made._ask([asyncio.sleep(30)], "its devices")
    assert made._ask([asyncio.sleep(0, "a"), asyncio.sleep(0, "b")], "x") == ["a", "b"]


@pytest.mark.parametrize("keeps", [False, True])
@pytest.mark.parametrize("shared", [False, True])
def test_a_folder_is_read_by_all_and_then_removed(
    shared: bool, keeps: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: Said = []
    own = tmp_path / "own"
    own.mkdir()
    monkeypatch.setattr(remote.tempfile, "mkdtemp", lambda *, prefix: said.append(prefix) or str(own))
    disk = str(tmp_path / "shared") if shared else None
    engine = EngineConfig(update_weight_disk_dir=disk, update_weight_disk_keep_files=keeps)
    plan = replace(PLAN, engine=engine, after_write=lambda *given: said.append(given))
    made = publication(said, plan, routes=(route("disk", 0), route("disk", 0, 1)))
    folder = (tmp_path / "shared" if shared else own) / "weights_0000007"

    def write(target: Path, buckets: list[str]) -> None:
        assert (target, buckets) == (folder, ["bucket"])
        target.mkdir(parents=True)

    monkeypatch.setattr(made, "_write", write)
    made.send_folder(["bucket"])
    assert said == [
        *([] if shared else ["qwench-weights-"]),
        (folder, ["http://0", "http://1"]),
        {"label": "load weights from disk", "timeout_s": 6.0},
        ("take_folder 0", folder, {"version": 7}),
        ("take_folder 1", folder, {"version": 7}),
        ({}, None),
    ]
    assert folder.exists() is keeps and folder.parent.exists() is (keeps or shared)


def test_other_ranks_only_gather_what_one_writes() -> None:
    said: Said = []
    publication(said, rank=1).send_folder(iter([said.append("bucket") or "a"]))
    assert said == ["bucket", ({}, None)]
    failing = publication(said, replace(PLAN, engine=EngineConfig(update_weight_disk_dir="/nowhere")), rank=0)
    failing._write_and_load = lambda *given: (_ for _ in ()).throw(WeightSyncError("no disk"))
    failing.send_folder([])
    assert str(said[-1][1]) == "no disk"


def test_an_adapter_s_folder_has_its_matrices_and_a_checkpoint_all_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: Said = []
    monkeypatch.setattr(remote, "write_adapter", lambda *given: said.append(given))
    monkeypatch.setattr(remote, "write_hf_checkpoint", lambda *given, source: said.append((*given, source)))
    monkeypatch.setattr(remote, "noted", lambda buckets, ledgers: (buckets, list(ledgers)))
    a, b = torch.ones(2), torch.zeros(3)
    named = NamedAdapter(config="config", name="v7", retired=("v5", "v6"))
    made = publication(said, replace(PLAN, named=named))
    made._write(tmp_path / "new", [[("a", a), ("lora_scale", b)], [("b", b)]])
    [(folder, config, matrices)] = said
    assert (folder, config, [*matrices]) == (tmp_path / "new", "config", ["a", "b"]) and folder.is_dir()
    said.clear()
    asyncio.run(made._load_folder(made._receivers[0], tmp_path))
    assert said == [("take_adapter 0", tmp_path, "v7", {"version": 7, "retired": ("v5", "v6")})]
    said.clear()
    plain = publication(said)
    plain._ledgers = {"a": "ledger"}
    plain._write(tmp_path, ["bucket"])
    assert said == [(tmp_path, (["bucket"], ["ledger"]), Path("model"))]
    with pytest.raises(WeightSyncError, match=r"^publication from disk needs the folder of --hf-checkpoint, for the config"):
        publication(said, replace(PLAN, model_folder=None))._write(tmp_path, [])


def test_engines_are_asked_to_load_what_all_ranks_offered_and_waited_for_in_turn() -> None:
    said: Said = []

    def receiver(number: int) -> SimpleNamespace:
        return SimpleNamespace(
            offer=lambda buffer, entries: f"{number} of {buffer} {entries}",
            take_shared=lambda own, portion: (number, own, portion),
        )

    loop = SimpleNamespace(
        start=lambda work: said.append(work) or SimpleNamespace(result=lambda: said.append(f"done {work[2]}"))
    )
    ways = [route("ipc", 1, 0), route("ipc", 0, 1, 1)]
    sender = _IpcSender(1, [(number + 4, way, receiver(number)) for number, way in enumerate(ways)], loop)
    assert sender.offers("buffer", "entries") == {
        "4:0": "0 of buffer entries", "5:1": "1 of buffer entries", "5:2": "1 of buffer entries"
    }  # fmt: skip
    sender.start({"4:0": "x", "4:1": "y", "5:0": "z"}, 1)
    sender.start({"4:0": "p", "4:1": "q"}, 2)
    assert said == [(0, ["x", "y"], 1), (0, ["p", "q"], 2)]
    sender.wait(left=1)
    assert said[2:] == ["done 1"]
    sender.wait()
    assert said[3:] == ["done 2"] and sender._loading == []


@pytest.mark.parametrize(("served", "sends", "packs"), [(["engine"], False, True), ([], True, True), ([], False, False)])
def test_a_rank_packs_what_it_sends(served: list[str], sends: bool, packs: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    made = publication([])
    monkeypatch.setattr(_Publication, "_sends_broadcasts", property(lambda self: sends))
    monkeypatch.setattr(made, "_served", lambda transport: served if transport == "ipc" else [])
    memory = torch.zeros(32, dtype=torch.uint8)
    ring = SimpleNamespace(next=lambda size, device: SimpleNamespace(tensor=memory[: size + 8]))
    offers = SimpleNamespace(offers=lambda buffer, entries: {"0:0": len(buffer.tensor)})
    parcel, weight = _Parcel(), torch.tensor([1.0, 2.0])
    made._pack(parcel, [("a", weight)], ring, offers)
    if not packs:
        assert (parcel.content, parcel.offers, parcel.entries) == (None, {}, ())
        return
    assert [entry.name for entry in parcel.entries] == ["a"]
    size = len(parcel.content)
    assert parcel.offers == {"0:0": size + 8} and torch.equal(parcel.content[:8].view(torch.float32), weight)
    sent: Said = []
    made._link = SimpleNamespace(start=lambda *given, **options: sent.append((given[1:], options)))
    monkeypatch.setattr(made, "_served", lambda transport: [(0, "route", f"receiver of {transport}")])
    made._start_broadcast(parcel, PORTION)
    options = {"loop": made._loop, "timeout_s": 3.0}
    assert sent == [((parcel.entries, PORTION, ["receiver of broadcast"]), options)]


def test_a_publication_ends_its_thread_and_its_own_link(monkeypatch: pytest.MonkeyPatch) -> None:
    said: Said = []
    for name in ("_Publication", "BroadcastLink", "EventLoopThread"):
        monkeypatch.setattr(remote, name, lambda *given, name=name: part(name, given))

    def part(name: str, given: tuple[object, ...]) -> SimpleNamespace:
        if name == "_Publication":
            said.append(given[2:])
        acts = ("choose_routes", "send", "send_folder", "confirm", "close")
        made = {act: (lambda *given, act=act: said.append((name, act, *map(str, given)))) for act in acts}
        return SimpleNamespace(**made, serves=lambda *transports: bool(transports) and ways.intersection(transports))

    class Source:
        def weights(self, *, bucket_bytes: int, part: str) -> object:
            said.append((bucket_bytes, part))
            return iter([[("a", torch.zeros(1))]])

    plan = replace(PLAN, engine=EngineConfig(update_weight_buffer_size=9), part="adapter")
    for ways, kept in (({"ipc"}, None), ({"disk"}, "kept"), ({"broadcast", "disk"}, "kept")):
        said.clear()
        remote.publish_from_rank(Source(), ["address"], 7, plan, link=kept)
        acts = [one[1] for one in said if isinstance(one, tuple) and one[0] == "_Publication"]
        sends = ["send"] * bool(ways - {"disk"}) + ["send_folder"] * ("disk" in ways)
        assert acts == ["choose_routes", *sends, "confirm", "close"]
        assert said[:2] == [(9, "adapter"), (["address"], 7, plan)]
        assert said.count((9, "adapter")) == 1 + bool(ways - {"disk"}), "buckets that were sent are gathered again"
        ends = [("BroadcastLink", "close")] * (kept is None) + [("EventLoopThread", "close")]
        assert said[-len(ends) :] == ends and ("BroadcastLink", "close") not in said[: -len(ends)]
        if kept:
            assert ("BroadcastLink", "close") not in said
