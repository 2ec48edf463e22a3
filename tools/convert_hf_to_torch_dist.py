"""Write a Hugging Face checkpoint as torch_dist, by the command lines of slime's recipes; `qwench convert` does the same.

python tools/convert_hf_to_torch_dist.py ${MODEL_ARGS[@]} --hf-checkpoint Qwen3-4B --save Qwen3-4B_torch_dist
torchrun --nproc-per-node 8 tools/convert_hf_to_torch_dist.py ...
"""

from __future__ import annotations

from qwench.cli import main
from qwench.commands.convert import convert_hf_to_torch_dist

if __name__ == "__main__":
    main(command=convert_hf_to_torch_dist)
