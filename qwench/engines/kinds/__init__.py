"""What differs between kinds of engine; one file a kind, one entry here."""

from collections.abc import Mapping

from qwench.engines.kinds.embedded import EMBEDDED
from qwench.engines.kinds.kind import EngineKind
from qwench.engines.kinds.sglang import SGLANG

KINDS: Mapping[str, EngineKind] = {kind.name: kind for kind in (EMBEDDED, SGLANG)}
"""`answers` of each is tried in this order for a server of unknown kind."""
