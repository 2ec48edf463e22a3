"""Run the command line of slime's or miles' train.py as it is; `qwench train` has other defaults (docs/migration.md).

python tools/train.py --actor-num-nodes 1 --actor-num-gpus-per-node 8 --colocate ...
"""

from __future__ import annotations

from qwench.cli import main
from qwench.commands.train import run_train

if __name__ == "__main__":
    main(command=run_train)
