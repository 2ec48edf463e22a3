"""From a configuration to a run: the only place that chooses implementations, and the verbs that use it.

inputs      what can be checked and read before a model is loaded
trainer     backend and learner
generation  engines, rollouts, evaluation
build       all of it as a `controller.Run`
verbs       what `qwench train`, `sft`, `eval` and `serve` do
"""

from qwench.launch.build import build, build_sft
from qwench.launch.inputs import plan_inputs
from qwench.launch.verbs import evaluate, serve, sft, train

__all__ = ["build", "build_sft", "evaluate", "plan_inputs", "serve", "sft", "train"]
