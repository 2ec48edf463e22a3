"""Another run, which holds its outputs."""

from __future__ import annotations

import sys
import time
from contextlib import ExitStack
from pathlib import Path

from qwench.config.config import Config
from qwench.config.sections.checkpoint import CheckpointConfig
from qwench.config.sections.debug import DebugConfig
from qwench.config.sections.logging import LoggingConfig
from qwench.launch.outputs import claim_outputs, own_results


def hold(*, save: Path, hf: str, dumps: str, log: Path, curves: Path, results: Path) -> None:
    """Claim everything, say "held", and wait."""
    config = Config(
        checkpoint=CheckpointConfig(save=save, save_hf=hf),
        debug=DebugConfig(save_debug_rollout_data=dumps),
        logging=LoggingConfig(log_dir=log, use_tensorboard=True, tensorboard_dir=curves),
    )
    with ExitStack() as held:
        claim_outputs(config, held)
        own_results(results, held)
        sys.stdout.write("held\n")
        sys.stdout.flush()
        time.sleep(600)
