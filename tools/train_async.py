"""Run the command line of slime's or miles' train_async.py as it is: generation runs one rollout ahead of training.

python tools/train_async.py --actor-num-nodes 1 --actor-num-gpus-per-node 4 --rollout-num-gpus 4 ...
"""

from __future__ import annotations

from qwench.cli import main
from qwench.commands.train import run_train_async

if __name__ == "__main__":
    main(command=run_train_async)
